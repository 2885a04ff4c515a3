/* See range_lock.h. The list is as long as there are calls at once that meet clear bits: a handful. */
#include "range_lock.h"

#include <errno.h>

int ae_range_lock_init(struct ae_range_lock *lock) {
    lock->held = NULL;
    lock->waiting = 0;
    atomic_init(&lock->count, 0);
    if (pthread_mutex_init(&lock->mutex, NULL) != 0)
        return -ENOMEM;
    if (pthread_cond_init(&lock->released, NULL) != 0) {
        pthread_mutex_destroy(&lock->mutex);
        return -ENOMEM;
    }
    return 0;
}

void ae_range_lock_destroy(struct ae_range_lock *lock) {
    pthread_cond_destroy(&lock->released);
    pthread_mutex_destroy(&lock->mutex);
}

static bool is_held(const struct ae_range_lock *lock, uint64_t first, uint64_t end) {
    for (const struct ae_held_range *held = lock->held; held != NULL; held = held->next)
        if (held->first < end && first < held->end)
            return true;
    return false;
}

static void wait_until_free(struct ae_range_lock *lock, uint64_t first, uint64_t end) {
    lock->waiting++;
    while (is_held(lock, first, end))
        pthread_cond_wait(&lock->released, &lock->mutex);
    lock->waiting--;
}

/* With the mutex held. */
static void hold(struct ae_range_lock *lock, struct ae_held_range *range, uint64_t first, uint64_t end) {
    *range = (struct ae_held_range){.first = first, .end = end, .next = lock->held};
    lock->held = range;
    atomic_fetch_add(&lock->count, 1);
}

void ae_range_acquire(struct ae_range_lock *lock, struct ae_held_range *range, uint64_t first, uint64_t end) {
    pthread_mutex_lock(&lock->mutex);
    wait_until_free(lock, first, end);
    hold(lock, range, first, end);
    pthread_mutex_unlock(&lock->mutex);
}

bool ae_range_try_acquire(struct ae_range_lock *lock, struct ae_held_range *range, uint64_t first, uint64_t end) {
    pthread_mutex_lock(&lock->mutex);
    bool is_free = !is_held(lock, first, end);
    if (is_free)
        hold(lock, range, first, end);
    pthread_mutex_unlock(&lock->mutex);
    return is_free;
}

void ae_range_release(struct ae_range_lock *lock, struct ae_held_range *range) {
    pthread_mutex_lock(&lock->mutex);
    struct ae_held_range **link = &lock->held;
    while (*link != range)
        link = &(*link)->next;
    *link = range->next;
    atomic_fetch_sub(&lock->count, 1);
    if (lock->waiting > 0)
        pthread_cond_broadcast(&lock->released);
    pthread_mutex_unlock(&lock->mutex);
}

void ae_range_await(struct ae_range_lock *lock, uint64_t first, uint64_t end) {
    if (atomic_load(&lock->count) == 0)
        return;
    pthread_mutex_lock(&lock->mutex);
    wait_until_free(lock, first, end);
    pthread_mutex_unlock(&lock->mutex);
}

bool ae_range_is_free(struct ae_range_lock *lock, uint64_t first, uint64_t end) {
    if (atomic_load(&lock->count) == 0)
        return true;
    pthread_mutex_lock(&lock->mutex);
    bool is_free = !is_held(lock, first, end);
    pthread_mutex_unlock(&lock->mutex);
    return is_free;
}
