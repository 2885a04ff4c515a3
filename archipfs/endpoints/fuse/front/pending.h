/*
 * The requests that libfuse has and has not answered yet: some answers are adjusted on their way back, and carry no
 * sign of what they answer but the request's unique number.
 *
 * Each has a tag, which is told to pyfuse3 in the header's `pid` and leads back to the number: 32 bits where the
 * number needs 64. Of the number's own bits no 32 would do: all that the kernel promises is that it is unique.
 */
#ifndef ARCHIPFS_FRONT_PENDING_H
#define ARCHIPFS_FRONT_PENDING_H

#include "wire.h"

#include <pthread.h>

#define AF_PENDING_BUCKETS 256u

struct af_pending_request {
    uint64_t unique;
    enum af_kind kind; /* what its answer needs; AF_OTHER: nothing */
    uint32_t next;     /* tag of the next one in the bucket, or of the next free place; 0: none */
};

struct af_pending {
    pthread_mutex_t mutex;
    struct af_pending_request *requests; /* tag 1 is the first */
    uint32_t used;                       /* places ever used */
    uint32_t room;
    uint32_t free; /* tag of a place that was used before */
    uint32_t buckets[AF_PENDING_BUCKETS];
};

int af_pending_init(struct af_pending *pending);
void af_pending_destroy(struct af_pending *pending);
/* The request's tag, which is its own until it is taken; -ENOMEM. */
int af_pending_add(struct af_pending *pending, uint64_t unique, enum af_kind kind, uint32_t *tag);
/* What the request was, which is forgotten now; AF_OTHER if it was not noted. */
enum af_kind af_pending_take(struct af_pending *pending, uint64_t unique);
/* The number of the request that has this tag; 0 if none has. */
uint64_t af_pending_unique(struct af_pending *pending, uint32_t tag);

#endif
