/*
 * Requests that were begun in vain (engine.h), and the threads that do them anew. That may wait for a network, which
 * the one thread that settles must not; and it must not wait for libfuse either, as who hands something on to it may.
 */
#ifndef ARCHIPFS_FRONT_ANEW_H
#define ARCHIPFS_FRONT_ANEW_H

#include "kept.h"
#include "seats.h"

#include <pthread.h>

/* As many as may wait for a network on the other threads. */
#define AF_ANEW_MAX 48u

struct af_anew {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct af_kept *first, **end;
    uint32_t waiting; /* in the list */
    uint32_t resting;
    bool stopping;
    uint32_t count;
    pthread_t threads[AF_ANEW_MAX];
    /* Does one, answers it or hands it on, and frees it. */
    void (*carry_out)(struct af_kept *kept);
    struct af_counts counts;
};

int af_anew_init(struct af_anew *anew, void (*carry_out)(struct af_kept *kept));
/* No thread runs. */
void af_anew_destroy(struct af_anew *anew);

/* One thread; others come when there is more to do than those who rest can. */
int af_anew_start(struct af_anew *anew);
/* Waits for all that were added. Nobody adds any more. */
void af_anew_stop(struct af_anew *anew);

void af_anew_add(struct af_anew *anew, struct af_kept *kept);

#endif
