/* See landing.h. One mutex, held for a few instructions. */
#include "landing.h"

int af_landing_init(struct af_landing *landing, void (*settle)(struct af_kept *kept)) {
    *landing = (struct af_landing){.end = &landing->first, .settle = settle};
    int result = pthread_mutex_init(&landing->mutex, NULL);
    if (result != 0)
        return -result;
    result = pthread_cond_init(&landing->changed, NULL);
    if (result != 0)
        pthread_mutex_destroy(&landing->mutex);
    return -result;
}

void af_landing_destroy(struct af_landing *landing) {
    pthread_cond_destroy(&landing->changed);
    pthread_mutex_destroy(&landing->mutex);
}

bool af_landing_enter(struct af_landing *landing) {
    pthread_mutex_lock(&landing->mutex);
    bool enters = landing->under_way < AF_BEGUN_MAX;
    landing->under_way += enters;
    pthread_mutex_unlock(&landing->mutex);
    return enters;
}

void af_landing_leave(struct af_landing *landing) {
    pthread_mutex_lock(&landing->mutex);
    landing->under_way--;
    pthread_mutex_unlock(&landing->mutex);
}

void af_landing_land(struct af_landing *landing, struct af_kept *kept) {
    kept->next = NULL;
    pthread_mutex_lock(&landing->mutex);
    *landing->end = kept;
    landing->end = &kept->next;
    bool sleeps = landing->sleeps;
    landing->sleeps = false;
    if (sleeps)
        pthread_cond_signal(&landing->changed);
    pthread_mutex_unlock(&landing->mutex);
}

/* All that have landed, in their order, and how many settled ones to count off. NULL: the end. */
static struct af_kept *await_landed(struct af_landing *landing, uint32_t settled) {
    pthread_mutex_lock(&landing->mutex);
    landing->under_way -= settled;
    while (landing->first == NULL && !(landing->stopping && landing->under_way == 0)) {
        landing->sleeps = true;
        pthread_cond_wait(&landing->changed, &landing->mutex);
    }
    landing->sleeps = false;
    struct af_kept *landed = landing->first;
    landing->first = NULL;
    landing->end = &landing->first;
    pthread_mutex_unlock(&landing->mutex);
    return landed;
}

static void *landing_main(void *argument) {
    struct af_landing *landing = argument;
    struct af_kept *landed;
    uint32_t settled = 0;
    while ((landed = await_landed(landing, settled)) != NULL) {
        settled = 0;
        while (landed != NULL) {
            struct af_kept *next = landed->next;
            landing->settle(landed);
            landed = next;
            settled++;
        }
    }
    return NULL;
}

int af_landing_start(struct af_landing *landing) {
    int result = af_start_thread(&landing->thread, landing_main, landing);
    landing->runs = result == 0;
    return result;
}

void af_landing_stop(struct af_landing *landing) {
    if (!landing->runs)
        return;
    pthread_mutex_lock(&landing->mutex);
    landing->stopping = true;
    pthread_cond_signal(&landing->changed);
    pthread_mutex_unlock(&landing->mutex);
    pthread_join(landing->thread, NULL);
    landing->runs = false;
}
