/*
 * Requests that were begun (engine.h): where they land, and the one thread that settles and answers them. What the
 * store's own threads do there is to put them on a list.
 */
#ifndef ARCHIPFS_FRONT_LANDING_H
#define ARCHIPFS_FRONT_LANDING_H

#include "kept.h"
#include "seats.h"

#include <pthread.h>

/*
 * Of one request, and of requests at a time: 16 MiB of memory, and a quarter of what librados takes before it has
 * callers wait. Larger ones gain nothing by it.
 */
#define AF_BEGUN_BYTES_MAX 65536u
#define AF_BEGUN_MAX 256u

struct af_landing {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint32_t under_way; /* begun, and not settled yet */
    struct af_kept *first, **end;
    bool sleeps;
    bool stopping;
    bool runs;
    pthread_t thread;
    /* Settles one, which waits for nothing, and has it answered and freed. */
    void (*settle)(struct af_kept *kept);
    struct af_counts counts;
};

int af_landing_init(struct af_landing *landing, void (*settle)(struct af_kept *kept));
/* The thread does not run. */
void af_landing_destroy(struct af_landing *landing);

int af_landing_start(struct af_landing *landing);
/* Waits for all that were begun. Nobody begins any more. */
void af_landing_stop(struct af_landing *landing);

/* Whether one more may be begun, and has to land, or leave again if it could not be. */
bool af_landing_enter(struct af_landing *landing);
void af_landing_leave(struct af_landing *landing);
void af_landing_land(struct af_landing *landing, struct af_kept *kept);

#endif
