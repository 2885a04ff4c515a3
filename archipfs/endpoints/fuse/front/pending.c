/* Few at a time: an unordered array, one mutex, held for a few instructions. */
#include "pending.h"

#include <errno.h>
#include <stdlib.h>

#define ROOM_FIRST 16u

int af_pending_init(struct af_pending *pending) {
    *pending = (struct af_pending){0};
    return -pthread_mutex_init(&pending->mutex, NULL);
}

void af_pending_destroy(struct af_pending *pending) {
    free(pending->requests);
    pthread_mutex_destroy(&pending->mutex);
}

static int make_room(struct af_pending *pending) {
    if (pending->count < pending->room)
        return 0;
    size_t room = pending->room == 0 ? ROOM_FIRST : 2 * pending->room;
    struct af_pending_request *requests = realloc(pending->requests, room * sizeof *requests);
    if (requests == NULL)
        return -ENOMEM;
    pending->requests = requests;
    pending->room = room;
    return 0;
}

int af_pending_add(struct af_pending *pending, uint64_t unique, enum af_kind kind) {
    pthread_mutex_lock(&pending->mutex);
    int result = make_room(pending);
    if (result == 0)
        pending->requests[pending->count++] = (struct af_pending_request){.unique = unique, .kind = kind};
    pthread_mutex_unlock(&pending->mutex);
    return result;
}

enum af_kind af_pending_take(struct af_pending *pending, uint64_t unique) {
    enum af_kind kind = AF_OTHER;
    pthread_mutex_lock(&pending->mutex);
    for (size_t i = 0; i < pending->count; i++) {
        if (pending->requests[i].unique == unique) {
            kind = pending->requests[i].kind;
            pending->requests[i] = pending->requests[--pending->count];
            break;
        }
    }
    pthread_mutex_unlock(&pending->mutex);
    return kind;
}
