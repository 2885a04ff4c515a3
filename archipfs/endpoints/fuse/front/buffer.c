#include "buffer.h"

#include <sys/mman.h>

char *af_buffer_make(size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
    char *buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (buffer == MAP_FAILED)
        return NULL;
    if (madvise(buffer, bytes, MADV_DONTFORK) == 0)
        return buffer;
    af_buffer_free(buffer, bytes);
    return NULL;
}

void af_buffer_free(char *buffer, size_t bytes) {
    if (buffer != NULL)
        (void)munmap(buffer, bytes);
}
