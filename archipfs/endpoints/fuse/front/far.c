/* See far.h. One mutex, held for a few instructions. */
#include "far.h"

int af_far_init(struct af_far *far) {
    *far = (struct af_far){.end = &far->first};
    return -pthread_mutex_init(&far->mutex, NULL);
}

void af_far_destroy(struct af_far *far) { pthread_mutex_destroy(&far->mutex); }

bool af_far_is_full(struct af_far *far) {
    pthread_mutex_lock(&far->mutex);
    bool full = far->under_way >= AF_FAR_MAX;
    pthread_mutex_unlock(&far->mutex);
    return full;
}

bool af_far_enter(struct af_far *far, struct af_kept *parked) {
    pthread_mutex_lock(&far->mutex);
    bool enters = far->under_way < AF_FAR_MAX || parked == NULL;
    if (enters) {
        far->under_way++;
    } else {
        *far->end = parked;
        far->end = &parked->next;
    }
    pthread_mutex_unlock(&far->mutex);
    return enters;
}

struct af_kept *af_far_leave(struct af_far *far) {
    pthread_mutex_lock(&far->mutex);
    struct af_kept *parked = far->first;
    if (parked == NULL) {
        far->under_way--;
    } else {
        far->first = parked->next;
        if (far->first == NULL)
            far->end = &far->first;
    }
    pthread_mutex_unlock(&far->mutex);
    return parked;
}
