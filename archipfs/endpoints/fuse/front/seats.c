/*
 * Locks: one mutex for the counts. A server's `call` decides by compare-and-swap whether the seat was given away, by
 * the thread itself or by the watch, so that only one of them does.
 *
 * A thread that begins a call first says so in `call` and then looks whether the watch sleeps; the watch says that it
 * sleeps and then looks for calls. Both are sequentially consistent, so one sees the other.
 */
#include "seats.h"

#include "buffer.h"

#include <errno.h>
#include <signal.h>
#include <time.h>

#define STOOLS 16u
#define WATCH_PERIOD_NS 10000000
/* The watch goes to sleep when it saw nothing happen so many times. */
#define WATCH_QUIET_PERIODS 20

static void *server_main(void *argument) {
    struct af_server *server = argument;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    server->seats->run(server);
    return NULL;
}

int af_start_thread(pthread_t *thread, void *(*function)(void *), void *argument) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    int result = pthread_sigmask(SIG_SETMASK, &all, &before);
    if (result != 0)
        return -result;
    result = pthread_create(thread, NULL, function, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -result;
}

/* With the mutex held. The new thread has a seat. */
static int add_server(struct af_seats *seats) {
    if (seats->threads == AF_THREADS_MAX)
        return -EAGAIN;
    struct af_server *server = &seats->servers[seats->threads];
    if (server->buffer == NULL)
        server->buffer = af_buffer_make(seats->buffer_bytes);
    if (server->buffer == NULL)
        return -ENOMEM;
    int result = af_start_thread(&server->thread, server_main, server);
    if (result == 0) {
        seats->threads++;
        seats->seated++;
    }
    return result;
}

/* With the mutex held: a seat is free. Where no thread can be had, it stays free until one comes back. */
static void fill_seat(struct af_seats *seats) {
    if (atomic_load(&seats->stopping) || seats->seated >= seats->seats)
        return;
    if (seats->resting > 0)
        pthread_cond_signal(&seats->free_seat);
    else
        (void)add_server(seats);
}

static void give_up_seat(struct af_seats *seats) {
    pthread_mutex_lock(&seats->mutex);
    seats->seated--;
    fill_seat(seats);
    pthread_mutex_unlock(&seats->mutex);
}

/* With the mutex held. */
static void await_seat(struct af_seats *seats, uint32_t most) {
    while (seats->seated >= most && !atomic_load(&seats->stopping)) {
        seats->resting++;
        pthread_cond_wait(&seats->free_seat, &seats->mutex);
        seats->resting--;
    }
    seats->seated++;
}

static void take_seat(struct af_seats *seats, uint32_t most) {
    pthread_mutex_lock(&seats->mutex);
    await_seat(seats, most);
    pthread_mutex_unlock(&seats->mutex);
}

/* Rest, if there are more who read than seats. */
static void leave_stool(struct af_seats *seats) {
    pthread_mutex_lock(&seats->mutex);
    if (seats->seated > seats->seats) {
        seats->seated--;
        await_seat(seats, seats->seats);
    }
    pthread_mutex_unlock(&seats->mutex);
}

void af_call_begin(struct af_server *server) {
    uint64_t calls = atomic_load_explicit(&server->calls, memory_order_relaxed) + 1;
    atomic_store_explicit(&server->calls, calls, memory_order_relaxed);
    atomic_store(&server->call, 2 * calls);
    struct af_seats *seats = server->seats;
    if (atomic_load(&seats->watch_sleeps)) {
        pthread_mutex_lock(&seats->mutex);
        atomic_store(&seats->watch_sleeps, false);
        pthread_cond_signal(&seats->work);
        pthread_mutex_unlock(&seats->mutex);
    }
}

void af_call_waits(struct af_server *server) {
    if ((atomic_fetch_or(&server->call, 1) & 1) == 0)
        give_up_seat(server->seats);
}

void af_call_is_far(struct af_server *server) {
    server->far = true;
    af_call_waits(server);
}

void af_call_end(struct af_server *server) {
    struct af_seats *seats = server->seats;
    bool far = server->far;
    server->far = false;
    if (atomic_exchange(&server->call, 0) & 1)
        take_seat(seats, far ? seats->seats + STOOLS : seats->seats);
    else if (atomic_load_explicit(&seats->seated, memory_order_relaxed) > seats->seats)
        leave_stool(seats);
}

/* The watch */

/* Whether anything happened since the last look. */
static bool look(struct af_seats *seats) {
    bool busy = false;
    uint32_t threads = af_seats_threads(seats);
    for (uint32_t i = 0; i < threads; i++) {
        struct af_server *server = &seats->servers[i];
        uint64_t call = atomic_load(&server->call);
        uint64_t calls = atomic_load_explicit(&server->calls, memory_order_relaxed);
        busy = busy || call != 0 || 2 * calls != server->seen_call;
        bool still_there = call != 0 && (call & 1) == 0 && call == server->seen_call;
        if (still_there && atomic_compare_exchange_strong(&server->call, &call, call | 1))
            give_up_seat(seats);
        server->seen_call = 2 * calls;
    }
    return busy;
}

static bool in_any_call(struct af_seats *seats) {
    for (uint32_t i = 0; i < seats->threads; i++)
        if (atomic_load(&seats->servers[i].call) != 0)
            return true;
    return false;
}

static void watch_sleep(struct af_seats *seats) {
    pthread_mutex_lock(&seats->mutex);
    atomic_store(&seats->watch_sleeps, true);
    while (!in_any_call(seats) && atomic_load(&seats->watch_sleeps) && !atomic_load(&seats->stopping))
        pthread_cond_wait(&seats->work, &seats->mutex);
    atomic_store(&seats->watch_sleeps, false);
    pthread_mutex_unlock(&seats->mutex);
}

static void *watch_main(void *argument) {
    struct af_seats *seats = argument;
    unsigned quiet = 0;
    while (!atomic_load(&seats->stopping)) {
        nanosleep(&(struct timespec){.tv_nsec = WATCH_PERIOD_NS}, NULL);
        quiet = look(seats) ? 0 : quiet + 1;
        if (quiet >= WATCH_QUIET_PERIODS) {
            watch_sleep(seats);
            quiet = 0;
        }
    }
    return NULL;
}

uint32_t af_seats_threads(struct af_seats *seats) {
    pthread_mutex_lock(&seats->mutex);
    uint32_t threads = seats->threads;
    pthread_mutex_unlock(&seats->mutex);
    return threads;
}

/* Starting and stopping */

static int init_locks(struct af_seats *seats) {
    int result = pthread_mutex_init(&seats->mutex, NULL);
    if (result != 0)
        return -result;
    result = pthread_cond_init(&seats->free_seat, NULL);
    if (result == 0) {
        result = pthread_cond_init(&seats->work, NULL);
        if (result == 0)
            return 0;
        pthread_cond_destroy(&seats->free_seat);
    }
    pthread_mutex_destroy(&seats->mutex);
    return -result;
}

int af_seats_init(struct af_seats *seats, uint32_t count, size_t buffer_bytes, void (*run)(struct af_server *server),
                  void *context) {
    if (count == 0 || count > AF_THREADS_MAX)
        return -EINVAL;
    *seats = (struct af_seats){.seats = count, .buffer_bytes = buffer_bytes, .run = run};
    for (uint32_t i = 0; i < AF_THREADS_MAX; i++)
        seats->servers[i] = (struct af_server){.seats = seats, .context = context};
    return init_locks(seats);
}

int af_seats_start(struct af_seats *seats) {
    int result = 0;
    pthread_mutex_lock(&seats->mutex);
    while (result == 0 && seats->seated < seats->seats)
        result = add_server(seats);
    pthread_mutex_unlock(&seats->mutex);
    if (result == 0) {
        result = af_start_thread(&seats->watch, watch_main, seats);
        seats->watch_runs = result == 0;
    }
    if (result < 0)
        af_seats_stop(seats);
    return result;
}

void af_seats_stop(struct af_seats *seats) {
    pthread_mutex_lock(&seats->mutex);
    atomic_store(&seats->stopping, true);
    pthread_cond_broadcast(&seats->free_seat);
    pthread_cond_signal(&seats->work);
    uint32_t threads = seats->threads;
    seats->threads = 0;
    bool watch_runs = seats->watch_runs;
    seats->watch_runs = false;
    pthread_mutex_unlock(&seats->mutex);
    if (watch_runs)
        pthread_join(seats->watch, NULL);
    for (uint32_t i = 0; i < threads; i++)
        pthread_cancel(seats->servers[i].thread);
    for (uint32_t i = 0; i < threads; i++)
        pthread_join(seats->servers[i].thread, NULL);
}

void af_seats_destroy(struct af_seats *seats) {
    for (uint32_t i = 0; i < AF_THREADS_MAX; i++)
        af_buffer_free(seats->servers[i].buffer, seats->buffer_bytes);
    pthread_cond_destroy(&seats->work);
    pthread_cond_destroy(&seats->free_seat);
    pthread_mutex_destroy(&seats->mutex);
}
