/* See buffers.h. */
#include "buffers.h"

#include <stdbool.h>
#include <sys/mman.h>

int ae_buffers_init(struct ae_buffers *buffers) {
    *buffers = (struct ae_buffers){0};
    return -pthread_mutex_init(&buffers->lock, NULL);
}

void ae_buffers_destroy(struct ae_buffers *buffers) {
    ae_buffers_trim(buffers);
    pthread_mutex_destroy(&buffers->lock);
}

static char *spare_take(struct ae_buffers *buffers, size_t bytes) {
    char *found = NULL;
    pthread_mutex_lock(&buffers->lock);
    for (size_t i = buffers->count; found == NULL && i-- > 0;) {
        if (buffers->spares[i].bytes != bytes)
            continue;
        found = buffers->spares[i].buffer;
        buffers->spares[i] = buffers->spares[--buffers->count];
        buffers->bytes -= bytes;
    }
    pthread_mutex_unlock(&buffers->lock);
    return found;
}

static bool spare_keep(struct ae_buffers *buffers, char *buffer, size_t bytes) {
    pthread_mutex_lock(&buffers->lock);
    bool kept = buffers->count < AE_SPARES_MAX && buffers->bytes + bytes <= AE_SPARE_BYTES_MAX;
    if (kept) {
        buffers->spares[buffers->count++] = (struct ae_spare){.buffer = buffer, .bytes = bytes};
        buffers->bytes += bytes;
    }
    pthread_mutex_unlock(&buffers->lock);
    return kept;
}

char *ae_buffer_take(struct ae_buffers *buffers, size_t bytes) {
    char *spare = spare_take(buffers, bytes);
    if (spare != NULL)
        return spare;
    void *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mapped != MAP_FAILED ? mapped : NULL;
}

void ae_buffer_give(struct ae_buffers *buffers, char *buffer, size_t bytes) {
    if (buffer != NULL && !spare_keep(buffers, buffer, bytes))
        (void)munmap(buffer, bytes);
}

void ae_buffers_trim(struct ae_buffers *buffers) {
    struct ae_spare spares[AE_SPARES_MAX];
    pthread_mutex_lock(&buffers->lock);
    size_t count = buffers->count;
    for (size_t i = 0; i < count; i++)
        spares[i] = buffers->spares[i];
    buffers->count = buffers->bytes = 0;
    pthread_mutex_unlock(&buffers->lock);
    for (size_t i = 0; i < count; i++)
        (void)munmap(spares[i].buffer, spares[i].bytes);
}
