#include "gate.h"

int ra_gate_init(struct ra_gate *gate) {
    *gate = (struct ra_gate){0};
    int result = pthread_mutex_init(&gate->mutex, NULL);
    if (result != 0)
        return -result;
    result = pthread_cond_init(&gate->changed, NULL);
    if (result != 0)
        pthread_mutex_destroy(&gate->mutex);
    return -result;
}

void ra_gate_destroy(struct ra_gate *gate) {
    pthread_cond_destroy(&gate->changed);
    pthread_mutex_destroy(&gate->mutex);
}

static bool is_open(const struct ra_gate *gate) { return !gate->alone && gate->want_alone == 0; }

void ra_gate_enter(struct ra_gate *gate) {
    pthread_mutex_lock(&gate->mutex);
    while (!is_open(gate))
        pthread_cond_wait(&gate->changed, &gate->mutex);
    gate->inside++;
    pthread_mutex_unlock(&gate->mutex);
}

bool ra_gate_try_enter(struct ra_gate *gate) {
    pthread_mutex_lock(&gate->mutex);
    bool enters = is_open(gate);
    gate->inside += enters;
    pthread_mutex_unlock(&gate->mutex);
    return enters;
}

void ra_gate_leave(struct ra_gate *gate) {
    pthread_mutex_lock(&gate->mutex);
    if (--gate->inside == 0 && gate->want_alone > 0)
        pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->mutex);
}

void ra_gate_close(struct ra_gate *gate) {
    pthread_mutex_lock(&gate->mutex);
    gate->want_alone++;
    while (gate->alone || gate->inside > 0)
        pthread_cond_wait(&gate->changed, &gate->mutex);
    gate->want_alone--;
    gate->alone = true;
    pthread_mutex_unlock(&gate->mutex);
}

void ra_gate_open(struct ra_gate *gate) {
    pthread_mutex_lock(&gate->mutex);
    gate->alone = false;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->mutex);
}
