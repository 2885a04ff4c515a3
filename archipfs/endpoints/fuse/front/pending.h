/*
 * The forwarded requests whose answers are adjusted on their way back: INIT, and O_DIRECT opens. An answer carries no
 * sign of what it answers but the request's unique number.
 */
#ifndef ARCHIPFS_FRONT_PENDING_H
#define ARCHIPFS_FRONT_PENDING_H

#include "wire.h"

#include <pthread.h>

struct af_pending_request {
    uint64_t unique;
    enum af_kind kind; /* AF_INIT, AF_OPEN, AF_CREATE */
};

struct af_pending {
    pthread_mutex_t mutex;
    struct af_pending_request *requests;
    size_t count;
    size_t room;
};

int af_pending_init(struct af_pending *pending);
void af_pending_destroy(struct af_pending *pending);
/* -ENOMEM: the answer will pass as it is. */
int af_pending_add(struct af_pending *pending, uint64_t unique, enum af_kind kind);
/* What the request was, which is forgotten now; AF_OTHER if it was not noted. */
enum af_kind af_pending_take(struct af_pending *pending, uint64_t unique);

#endif
