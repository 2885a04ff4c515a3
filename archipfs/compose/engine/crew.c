/* See crew.h. */
#include "crew.h"

#include <errno.h>
#include <signal.h>
#include <time.h>

#define SECOND_NS UINT64_C(1000000000)

int ae_crew_init(struct ae_crew *crew, const char *name, size_t most, pthread_mutex_t *lock,
                 void *(*run)(void *context), void *context) {
    *crew = (struct ae_crew){.name = name, .lock = lock, .most = most, .run = run, .context = context};
    pthread_condattr_t attributes;
    int result = most <= AE_CREW_MAX ? pthread_condattr_init(&attributes) : EINVAL;
    if (result != 0)
        return -result;
    result = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    if (result == 0)
        result = pthread_cond_init(&crew->work, &attributes);
    pthread_condattr_destroy(&attributes);
    return -result;
}

void ae_crew_destroy(struct ae_crew *crew) { pthread_cond_destroy(&crew->work); }

/* Signals are the business of the process's own threads. */
static void add(struct ae_crew *crew) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&crew->threads[crew->count], NULL, crew->run, crew->context) == 0) {
        (void)pthread_setname_np(crew->threads[crew->count], crew->name);
        crew->count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

bool ae_crew_call(struct ae_crew *crew, size_t pieces) {
    if (crew->stopping)
        return false;
    if (crew->idle < pieces && crew->count < crew->most)
        add(crew);
    pthread_cond_signal(&crew->work);
    return crew->count > 0;
}

void ae_crew_wait(struct ae_crew *crew) {
    crew->idle++;
    pthread_cond_wait(&crew->work, crew->lock);
    crew->idle--;
}

void ae_crew_wait_for(struct ae_crew *crew, uint64_t ns) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    ns += (uint64_t)until.tv_nsec;
    until.tv_sec += (time_t)(ns / SECOND_NS);
    until.tv_nsec = (long)(ns % SECOND_NS);
    crew->idle++;
    pthread_cond_timedwait(&crew->work, crew->lock, &until);
    crew->idle--;
}

void ae_crew_stop(struct ae_crew *crew) {
    pthread_mutex_lock(crew->lock);
    crew->stopping = true;
    pthread_cond_broadcast(&crew->work);
    pthread_mutex_unlock(crew->lock);
}

void ae_crew_join(struct ae_crew *crew) {
    for (size_t i = 0; i < crew->count; i++)
        pthread_join(crew->threads[i], NULL);
}
