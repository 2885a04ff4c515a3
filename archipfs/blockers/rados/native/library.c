#include "library.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* A pointer to data as one to a function: POSIX has it so for dlsym, ISO C knows no cast for it. */
static int find(struct ra_library *library, const char *name, void *member, char *problem, size_t problem_bytes) {
    void *symbol = dlsym(library->handle, name);
    if (symbol == NULL) {
        snprintf(problem, problem_bytes, "librados is too old: it has no %s", name);
        return -ENOPKG;
    }
    memcpy(member, &symbol, sizeof symbol);
    return 0;
}

int ra_library_open(struct ra_library *library, const char *path, char *problem, size_t problem_bytes) {
    memset(library, 0, sizeof *library);
    /* Never unloaded: its threads' destructors may still be to come when the last client is gone. */
    library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library->handle == NULL) {
        const char *reason = dlerror();
        snprintf(problem, problem_bytes, "%s", reason != NULL ? reason : path);
        return -ENOPKG;
    }
    int result = 0;
#define RA_FIND(type, name, parameters)                                                                                \
    if (result == 0)                                                                                                   \
        result = find(library, "rados_" #name, &library->name, problem, problem_bytes);
    RA_FUNCTIONS(RA_FIND)
#undef RA_FIND
    if (result < 0)
        ra_library_close(library);
    return result;
}

void ra_library_close(struct ra_library *library) {
    if (library->handle != NULL)
        dlclose(library->handle);
    library->handle = NULL;
}
