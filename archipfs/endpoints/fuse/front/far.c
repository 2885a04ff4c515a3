/* See far.h. One mutex, held for a few instructions. */
#include "far.h"

#include <stdlib.h>
#include <string.h>

int af_far_init(struct af_far *far) {
    *far = (struct af_far){.end = &far->first};
    return -pthread_mutex_init(&far->mutex, NULL);
}

void af_far_destroy(struct af_far *far) { pthread_mutex_destroy(&far->mutex); }

struct af_parked *af_parked_make(struct af_entry *entry, const struct af_request *request, const char *message,
                                 size_t length) {
    struct af_parked *parked = malloc(sizeof *parked + length);
    if (parked == NULL)
        return NULL;
    *parked = (struct af_parked){.entry = entry, .request = *request, .length = length};
    memcpy(parked->message, message, length);
    if (request->data != NULL)
        parked->request.data = parked->message + ((const char *)request->data - message);
    return parked;
}

bool af_far_is_full(struct af_far *far) {
    pthread_mutex_lock(&far->mutex);
    bool full = far->under_way >= AF_FAR_MAX;
    pthread_mutex_unlock(&far->mutex);
    return full;
}

bool af_far_enter(struct af_far *far, struct af_parked *parked) {
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

struct af_parked *af_far_leave(struct af_far *far) {
    pthread_mutex_lock(&far->mutex);
    struct af_parked *parked = far->first;
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
