/* See anew.h. One mutex, held for a few instructions, and while a thread is made. */
#include "anew.h"

int af_anew_init(struct af_anew *anew, void (*carry_out)(struct af_kept *kept)) {
    *anew = (struct af_anew){.end = &anew->first, .carry_out = carry_out};
    int result = pthread_mutex_init(&anew->mutex, NULL);
    if (result != 0)
        return -result;
    result = pthread_cond_init(&anew->changed, NULL);
    if (result != 0)
        pthread_mutex_destroy(&anew->mutex);
    return -result;
}

void af_anew_destroy(struct af_anew *anew) {
    pthread_cond_destroy(&anew->changed);
    pthread_mutex_destroy(&anew->mutex);
}

/* NULL: the end. */
static struct af_kept *await_next(struct af_anew *anew) {
    pthread_mutex_lock(&anew->mutex);
    while (anew->first == NULL && !anew->stopping) {
        anew->resting++;
        pthread_cond_wait(&anew->changed, &anew->mutex);
        anew->resting--;
    }
    struct af_kept *kept = anew->first;
    if (kept != NULL) {
        anew->waiting--;
        anew->first = kept->next;
        if (anew->first == NULL)
            anew->end = &anew->first;
    }
    pthread_mutex_unlock(&anew->mutex);
    return kept;
}

static void *anew_main(void *argument) {
    struct af_anew *anew = argument;
    struct af_kept *kept;
    while ((kept = await_next(anew)) != NULL)
        anew->carry_out(kept);
    return NULL;
}

/* With the mutex held. */
static int add_thread(struct af_anew *anew) {
    int result = af_start_thread(&anew->threads[anew->count], anew_main, anew);
    anew->count += result == 0;
    return result;
}

int af_anew_start(struct af_anew *anew) {
    pthread_mutex_lock(&anew->mutex);
    int result = add_thread(anew);
    pthread_mutex_unlock(&anew->mutex);
    return result;
}

void af_anew_stop(struct af_anew *anew) {
    pthread_mutex_lock(&anew->mutex);
    anew->stopping = true;
    pthread_cond_broadcast(&anew->changed);
    uint32_t count = anew->count;
    anew->count = 0;
    pthread_mutex_unlock(&anew->mutex);
    for (uint32_t i = 0; i < count; i++)
        pthread_join(anew->threads[i], NULL);
}

void af_anew_add(struct af_anew *anew, struct af_kept *kept) {
    kept->next = NULL;
    pthread_mutex_lock(&anew->mutex);
    *anew->end = kept;
    anew->end = &kept->next;
    anew->waiting++;
    /* Where no thread can be had, those that are there do it, one after the other. */
    if (anew->waiting > anew->resting && anew->count < AF_ANEW_MAX)
        (void)add_thread(anew);
    pthread_cond_signal(&anew->changed);
    pthread_mutex_unlock(&anew->mutex);
}
