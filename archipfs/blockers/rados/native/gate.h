/*
 * Passed by many at once, or by one alone. Unlike with a lock of pthreads, another thread may leave than the one that
 * entered: what was begun is settled elsewhere.
 */
#ifndef ARCHIPFS_RADOS_GATE_H
#define ARCHIPFS_RADOS_GATE_H

#include <pthread.h>
#include <stdbool.h>

struct ra_gate {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    unsigned inside;
    bool alone;
    /* Who waits to be alone goes before all who come after him, else he would wait for as long as anybody comes. */
    unsigned want_alone;
};

int ra_gate_init(struct ra_gate *gate);
/* Nobody is inside. */
void ra_gate_destroy(struct ra_gate *gate);

void ra_gate_enter(struct ra_gate *gate);
/* False: it would have to wait. */
bool ra_gate_try_enter(struct ra_gate *gate);
void ra_gate_leave(struct ra_gate *gate);

void ra_gate_close(struct ra_gate *gate);
void ra_gate_open(struct ra_gate *gate);

#endif
