/*
 * The buffers of flights. Not malloc's: what is freed a second later, by another thread and in another order than it
 * was made, leaves malloc with many times as much as is in use. They are mapped, and unmapped when they are not needed
 * any more. But since new memory costs as much as all the rest of a flight, some are kept for the next ones, until all
 * is quiet.
 *
 * There are few sizes, so that what is kept fits: a pack's last flight may be of any length, and a buffer of just that
 * length is never asked for again.
 */
#ifndef ARCHIPFS_ENGINE_BUFFERS_H
#define ARCHIPFS_ENGINE_BUFFERS_H

#include <pthread.h>
#include <stddef.h>

#define AE_BUFFER_BYTES_MIN ((size_t)64 << 10)
#define AE_BUFFER_BYTES_MAX ((size_t)17 << 16)
#define AE_SPARES_MAX 64u
#define AE_SPARE_BYTES_MAX ((size_t)16 << 20)

struct ae_spare {
    char *buffer;
    size_t bytes;
};

struct ae_buffers {
    pthread_mutex_t lock;                  /* for a few instructions; none is taken inside */
    size_t count, bytes;                   /* of the spares */
    struct ae_spare spares[AE_SPARES_MAX]; /* the oldest first */
};

int ae_buffers_init(struct ae_buffers *buffers);
void ae_buffers_destroy(struct ae_buffers *buffers);

/* What a buffer for so many bytes takes, up to AE_BUFFER_BYTES_MAX: that many, or a power of two if half will do. */
size_t ae_buffer_room(size_t bytes);
/* With so much room, aligned to a page, with any content. NULL: there is no memory. */
char *ae_buffer_take(struct ae_buffers *buffers, size_t bytes);
/* For as many bytes as it was taken for. What has been a spare for longest goes for it. NULL is allowed. */
void ae_buffer_give(struct ae_buffers *buffers, char *buffer, size_t bytes);
/* Keep none. */
void ae_buffers_trim(struct ae_buffers *buffers);

#endif
