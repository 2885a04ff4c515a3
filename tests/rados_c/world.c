#include "world.h"

#include <inttypes.h>
#include <string.h>
#include <time.h>

_Thread_local uint64_t check_seed;

struct ra_client *client_open(unsigned operation_timeout_s) {
    struct ra_settings settings = {.library = FAKE,
                                   .conf = "conf",
                                   .user = "admin",
                                   .pool = "pool",
                                   .space = CLAIM_SPACE,
                                   .timeout_s = 1,
                                   .operation_timeout_s = operation_timeout_s};
    char problem[500] = "";
    struct ra_client *client;
    int result = ra_client_open(&settings, &client, problem, sizeof problem);
    if (result < 0)
        fprintf(stderr, "%s\n", problem);
    CHECK_EQUAL(result, 0);
    return client;
}

void stripe_name(const char *key, uint64_t stripe, char name[256]) {
    snprintf(name, 256, "%s/%016" PRIx64, key, stripe);
}

void wait_until(bool (*so)(void *), void *argument) {
    struct timespec pause = {.tv_nsec = 1000000};
    for (unsigned i = 0; i < 10000; i++) {
        if (so(argument))
            return;
        nanosleep(&pause, NULL);
    }
    CHECK(!"waited in vain");
}

static void *run(void *argument) {
    struct call *call = argument;
    int result = call->make(call);
    pthread_mutex_lock(&call->mutex);
    call->result = result;
    call->done = true;
    pthread_mutex_unlock(&call->mutex);
    return NULL;
}

void call_start(struct call *call) {
    call->done = false;
    CHECK_EQUAL(pthread_mutex_init(&call->mutex, NULL), 0);
    CHECK_EQUAL(pthread_create(&call->thread, NULL, run, call), 0);
}

bool call_is_done(struct call *call) {
    pthread_mutex_lock(&call->mutex);
    bool done = call->done;
    pthread_mutex_unlock(&call->mutex);
    return done;
}

int call_end(struct call *call) {
    CHECK_EQUAL(pthread_join(call->thread, NULL), 0);
    pthread_mutex_destroy(&call->mutex);
    return call->result;
}

int call_write(struct call *call) {
    char *content = malloc(call->length);
    CHECK(content != NULL);
    memset(content, call->fill, call->length);
    int result = ra_data_write(call->data, content, call->length, call->offset);
    free(content);
    return result;
}
