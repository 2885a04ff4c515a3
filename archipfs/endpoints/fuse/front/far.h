/*
 * Requests for volumes that lie behind a network. When that does not answer, each of them takes a thread until a time
 * limit ends it; so not all threads may be there at once, or nobody would be left for other volumes and for libfuse.
 * Who comes when so many are under way is parked, and carried out by the next who comes back.
 */
#ifndef ARCHIPFS_FRONT_FAR_H
#define ARCHIPFS_FRONT_FAR_H

#include "front.h"
#include "kept.h"

#include <pthread.h>

#define AF_FAR_MAX (AF_THREADS_MAX - 16u)

struct af_far {
    pthread_mutex_t mutex;
    uint32_t under_way;
    struct af_kept *first, **end;
};

int af_far_init(struct af_far *far);
/* Nobody is in it any more, and nobody is parked. */
void af_far_destroy(struct af_far *far);

/* Whether somebody who comes now would be parked. */
bool af_far_is_full(struct af_far *far);
/* True: go on, and leave afterwards. False: `parked` was kept, and is not the caller's any more. NULL is never kept. */
bool af_far_enter(struct af_far *far, struct af_kept *parked);
/* Whose turn it is: the caller carries it out, and leaves once more. NULL: nobody's, and the caller has left. */
struct af_kept *af_far_leave(struct af_far *far);

#endif
