/*
 * The buffers of flights. Not malloc's: what is freed a second later, by another thread and in another order than it
 * was made, leaves malloc with many times as much as is in use. They are mapped, and unmapped when they are not needed
 * any more. But since new memory costs as much as all the rest of a flight, some are kept for the next ones of the same
 * size, until all is quiet.
 */
#ifndef ARCHIPFS_ENGINE_BUFFERS_H
#define ARCHIPFS_ENGINE_BUFFERS_H

#include <pthread.h>
#include <stddef.h>

#define AE_SPARES_MAX 64u
#define AE_SPARE_BYTES_MAX ((size_t)16 << 20)

struct ae_spare {
    char *buffer;
    size_t bytes;
};

struct ae_buffers {
    pthread_mutex_t lock; /* for a few instructions; none is taken inside */
    size_t count, bytes;  /* of the spares */
    struct ae_spare spares[AE_SPARES_MAX];
};

int ae_buffers_init(struct ae_buffers *buffers);
void ae_buffers_destroy(struct ae_buffers *buffers);

/* Aligned to a page, with any content. NULL: there is no memory. */
char *ae_buffer_take(struct ae_buffers *buffers, size_t bytes);
/* Of that many bytes, as it was taken. NULL is allowed. */
void ae_buffer_give(struct ae_buffers *buffers, char *buffer, size_t bytes);
/* Keep none. */
void ae_buffers_trim(struct ae_buffers *buffers);

#endif
