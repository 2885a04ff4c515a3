/*
 * A few threads that wait for the same kind of work. What work there is lies with whoever has the crew, under his lock;
 * a thread is made when there is more of it than threads are idle.
 */
#ifndef ARCHIPFS_ENGINE_CREW_H
#define ARCHIPFS_ENGINE_CREW_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AE_CREW_MAX 8u

struct ae_crew {
    const char *name;
    pthread_mutex_t *lock; /* guards all that follows */
    pthread_cond_t work;
    void *(*run)(void *context);
    void *context;
    size_t most, count, idle;
    bool stopping;
    pthread_t threads[AE_CREW_MAX];
};

/* `most` threads of that name (15 bytes at most), each of which does `run` until it finds that the crew is stopping. */
int ae_crew_init(struct ae_crew *crew, const char *name, size_t most, pthread_mutex_t *lock,
                 void *(*run)(void *context), void *context);
/* When it was stopped, or never called. */
void ae_crew_destroy(struct ae_crew *crew);

/* With the lock held: so many pieces of work wait. False: nobody is there to do them, and nobody can be had. */
bool ae_crew_call(struct ae_crew *crew, size_t pieces);
/* With the lock held, by one of the crew: until there is work, or for that time. */
void ae_crew_wait(struct ae_crew *crew);
void ae_crew_wait_for(struct ae_crew *crew, uint64_t ns);

/* Without the lock: from now on it is stopping. */
void ae_crew_stop(struct ae_crew *crew);
/* All of them have ended. */
void ae_crew_join(struct ae_crew *crew);

#endif
