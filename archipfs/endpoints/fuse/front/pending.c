/* An array of places, those in use chained from a hash table, the others in a list. One mutex, for a few instructions.
 */
#include "pending.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>

#define ROOM_FIRST 64u
#define ROOM_MAX (UINT32_C(1) << 30)

int af_pending_init(struct af_pending *pending) {
    *pending = (struct af_pending){0};
    return -pthread_mutex_init(&pending->mutex, NULL);
}

void af_pending_destroy(struct af_pending *pending) {
    free(pending->requests);
    pthread_mutex_destroy(&pending->mutex);
}

static struct af_pending_request *place(struct af_pending *pending, uint32_t tag) {
    return &pending->requests[tag - 1];
}

/* The kernel's numbers are even but for the bit that marks an interrupt. */
static uint32_t *bucket_of(struct af_pending *pending, uint64_t unique) {
    return &pending->buckets[unique / 2 % AF_PENDING_BUCKETS];
}

static int make_room(struct af_pending *pending) {
    if (pending->used < pending->room)
        return 0;
    uint32_t room = pending->room == 0 ? ROOM_FIRST : 2 * pending->room;
    if (room > ROOM_MAX)
        return -ENOMEM;
    struct af_pending_request *requests = realloc(pending->requests, room * sizeof *requests);
    if (requests == NULL)
        return -ENOMEM;
    pending->requests = requests;
    pending->room = room;
    return 0;
}

/* With the mutex held: the tag of a place for another request, 0 if there is no memory. */
static uint32_t take_place(struct af_pending *pending) {
    uint32_t tag = pending->free;
    if (tag != 0)
        pending->free = place(pending, tag)->next;
    else if (make_room(pending) == 0)
        tag = ++pending->used;
    return tag;
}

int af_pending_add(struct af_pending *pending, uint64_t unique, enum af_kind kind, uint32_t *added) {
    pthread_mutex_lock(&pending->mutex);
    uint32_t tag = take_place(pending);
    if (tag != 0) {
        uint32_t *bucket = bucket_of(pending, unique);
        *place(pending, tag) = (struct af_pending_request){.unique = unique, .kind = kind, .next = *bucket};
        *bucket = tag;
    }
    pthread_mutex_unlock(&pending->mutex);
    *added = tag;
    return tag != 0 ? 0 : -ENOMEM;
}

enum af_kind af_pending_take(struct af_pending *pending, uint64_t unique) {
    enum af_kind kind = AF_OTHER;
    pthread_mutex_lock(&pending->mutex);
    for (uint32_t *at = bucket_of(pending, unique); *at != 0; at = &place(pending, *at)->next) {
        struct af_pending_request *request = place(pending, *at);
        if (request->unique == unique) {
            uint32_t tag = *at;
            kind = request->kind;
            *at = request->next;
            *request = (struct af_pending_request){.next = pending->free};
            pending->free = tag;
            break;
        }
    }
    pthread_mutex_unlock(&pending->mutex);
    return kind;
}

uint64_t af_pending_unique(struct af_pending *pending, uint32_t tag) {
    pthread_mutex_lock(&pending->mutex);
    uint64_t unique = tag != 0 && tag <= pending->used ? place(pending, tag)->unique : 0;
    pthread_mutex_unlock(&pending->mutex);
    return unique;
}
