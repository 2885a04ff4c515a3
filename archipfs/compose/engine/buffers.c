/* See buffers.h. */
#include "buffers.h"

#include <string.h>
#include <sys/mman.h>

int ae_buffers_init(struct ae_buffers *buffers) {
    *buffers = (struct ae_buffers){0};
    return -pthread_mutex_init(&buffers->lock, NULL);
}

void ae_buffers_destroy(struct ae_buffers *buffers) {
    ae_buffers_trim(buffers);
    pthread_mutex_destroy(&buffers->lock);
}

static void unmap(const struct ae_spare *spares, size_t count) {
    for (size_t i = 0; i < count; i++)
        (void)munmap(spares[i].buffer, spares[i].bytes);
}

/* With the lock held. */
static struct ae_spare spare_remove(struct ae_buffers *buffers, size_t index) {
    struct ae_spare *at = &buffers->spares[index];
    struct ae_spare removed = *at;
    buffers->bytes -= removed.bytes;
    buffers->count--;
    memmove(at, at + 1, (buffers->count - index) * sizeof *at);
    return removed;
}

/* The one that was used last: the processor may still have it. */
static char *spare_take(struct ae_buffers *buffers, size_t room) {
    char *found = NULL;
    pthread_mutex_lock(&buffers->lock);
    for (size_t i = buffers->count; found == NULL && i-- > 0;)
        if (buffers->spares[i].bytes == room)
            found = spare_remove(buffers, i).buffer;
    pthread_mutex_unlock(&buffers->lock);
    return found;
}

size_t ae_buffer_room(size_t bytes) {
    size_t room = AE_BUFFER_BYTES_MIN;
    while (room < bytes)
        room *= 2;
    return room <= AE_BUFFER_BYTES_MAX / 2 ? room : AE_BUFFER_BYTES_MAX;
}

char *ae_buffer_take(struct ae_buffers *buffers, size_t bytes) {
    size_t room = ae_buffer_room(bytes);
    char *spare = spare_take(buffers, room);
    if (spare != NULL)
        return spare;
    void *mapped = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mapped != MAP_FAILED ? mapped : NULL;
}

void ae_buffer_give(struct ae_buffers *buffers, char *buffer, size_t bytes) {
    if (buffer == NULL)
        return;
    struct ae_spare excess[AE_SPARES_MAX];
    size_t room = ae_buffer_room(bytes), excess_count = 0;
    pthread_mutex_lock(&buffers->lock);
    while (buffers->count == AE_SPARES_MAX || buffers->bytes + room > AE_SPARE_BYTES_MAX)
        excess[excess_count++] = spare_remove(buffers, 0);
    buffers->spares[buffers->count++] = (struct ae_spare){.buffer = buffer, .bytes = room};
    buffers->bytes += room;
    pthread_mutex_unlock(&buffers->lock);
    unmap(excess, excess_count);
}

void ae_buffers_trim(struct ae_buffers *buffers) {
    struct ae_spare spares[AE_SPARES_MAX];
    pthread_mutex_lock(&buffers->lock);
    size_t count = buffers->count;
    for (size_t i = 0; i < count; i++)
        spares[i] = buffers->spares[i];
    buffers->count = buffers->bytes = 0;
    pthread_mutex_unlock(&buffers->lock);
    unmap(spares, count);
}
