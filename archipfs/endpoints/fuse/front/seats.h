/*
 * Who reads requests. There are so many seats, one a core as a rule, and only a thread on a seat reads. A thread that
 * is going to wait for a disk gives its seat to another one, which is made if none is idle, and on its way back it
 * takes a free seat or rests until one is. So slow requests never hold up fast ones, and fast ones never pay for a
 * hand-over.
 *
 * Who was waiting for a network when he gave his seat away need not rest: for him there are stools beside the seats. A
 * network has many requests under way, each of which would else wake one who rests, and send another one to rest. They
 * are for that only: who carried out something else on one goes to rest.
 *
 * A sync knows beforehand that it will wait, and so does a read: the page cache says so. So does any call on a volume
 * whose data lies behind a network. Others do not: a watch looks every few milliseconds, while there is anything to
 * look at, and takes the seats of those who are still where they were.
 */
#ifndef ARCHIPFS_FRONT_SEATS_H
#define ARCHIPFS_FRONT_SEATS_H

#include "front.h"

#include <pthread.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

struct af_seats;

/* Requests, by who carried them out. */
struct af_counts {
    _Atomic uint64_t served;
    _Atomic uint64_t forwarded;
};

/* A thread of the pool, with its buffer. */
struct af_server {
    alignas(64) struct af_seats *seats;
    void *context;
    pthread_t thread;
    char *buffer;
    /* 0: not in a call. Else twice the call's number, plus one if the seat was given away. */
    _Atomic uint64_t call;
    _Atomic uint64_t calls; /* ever begun; written by the thread itself */
    struct af_counts counts;
    uint64_t seen_call; /* the watch's: what it saw last */
    bool far;           /* the thread's own: its call waits for a network */
};

struct af_seats {
    pthread_mutex_t mutex;
    pthread_cond_t free_seat;
    pthread_cond_t work; /* for the watch */
    uint32_t seats;
    _Atomic uint32_t seated; /* changed with the mutex held */
    uint32_t resting;
    uint32_t threads;
    atomic_bool stopping;
    atomic_bool watch_sleeps;
    bool watch_runs;
    pthread_t watch;
    size_t buffer_bytes;
    void (*run)(struct af_server *server);
    struct af_server servers[AF_THREADS_MAX];
};

/* `run` is what each thread does, until af_seats_stopping. */
int af_seats_init(struct af_seats *seats, uint32_t count, size_t buffer_bytes, void (*run)(struct af_server *server),
                  void *context);
/* Once. When it fails, no thread is left. */
int af_seats_start(struct af_seats *seats);
/*
 * Ends and joins all threads, if there are any; one that is in a call is waited for, one that waits for a request is
 * not.
 */
void af_seats_stop(struct af_seats *seats);
void af_seats_destroy(struct af_seats *seats);

uint32_t af_seats_threads(struct af_seats *seats);

/* A thread that gets no signals: they are the business of the process's own threads. */
int af_start_thread(pthread_t *thread, void *(*function)(void *), void *argument);

static inline bool af_seats_stopping(struct af_seats *seats) { return atomic_load(&seats->stopping); }

/* Around each call, by its thread. */
void af_call_begin(struct af_server *server);
void af_call_end(struct af_server *server);
/* In a call: it is going to wait, for a disk or, if it is far, for a network. */
void af_call_waits(struct af_server *server);
void af_call_is_far(struct af_server *server);

#endif
