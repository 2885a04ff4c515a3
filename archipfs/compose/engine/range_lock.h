/*
 * Ranges of sectors that a call has for itself. Only calls that meet a clear bit take one: to complete a sector from
 * the parent, or to leave a bit clear, is a decision that holds only as long as nobody sets the bit.
 */
#ifndef ARCHIPFS_ENGINE_RANGE_LOCK_H
#define ARCHIPFS_ENGINE_RANGE_LOCK_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Of the call that holds it, and there as long as it does. */
struct ae_held_range {
    uint64_t first;
    uint64_t end;
    struct ae_held_range *next;
};

struct ae_range_lock {
    pthread_mutex_t mutex;
    pthread_cond_t released;
    struct ae_held_range *held;
    unsigned waiting;
    atomic_uint count;
};

int ae_range_lock_init(struct ae_range_lock *lock);
void ae_range_lock_destroy(struct ae_range_lock *lock);
/* Wait until nobody holds a part of [first, end), then hold it. */
void ae_range_acquire(struct ae_range_lock *lock, struct ae_held_range *range, uint64_t first, uint64_t end);
/* As ae_range_acquire, but false instead of waiting. */
bool ae_range_try_acquire(struct ae_range_lock *lock, struct ae_held_range *range, uint64_t first, uint64_t end);
void ae_range_release(struct ae_range_lock *lock, struct ae_held_range *range);
/* Wait until nobody holds a part of [first, end). Costs one load when nothing is held. */
void ae_range_await(struct ae_range_lock *lock, uint64_t first, uint64_t end);
/* Whether nobody holds a part of [first, end). */
bool ae_range_is_free(struct ae_range_lock *lock, uint64_t first, uint64_t end);

#endif
