/* What the tests share: a client of the stand-in, and threads that each make one call. */
#ifndef WORLD_H
#define WORLD_H

#include "check.h"
#include "fake.h"
#include "native.h"

#include <pthread.h>

#define STRIPE ((uint64_t)RA_STRIPE_BYTES)
#define DATA_SPACE "space.data"
#define CLAIM_SPACE "space"
#define HEADER_BYTES 4096

struct ra_client *client_open(unsigned operation_timeout_s);
void stripe_name(const char *key, uint64_t stripe, char name[256]);
/* Until it is so; the test fails after ten seconds. */
void wait_until(bool (*so)(void *), void *argument);

/* A call on a thread of its own. */
struct call {
    int (*make)(struct call *call);
    struct ra_client *client;
    struct ra_data *data;
    uint64_t offset;
    size_t length;
    char fill;
    int result;
    bool done;
    pthread_mutex_t mutex;
    pthread_t thread;
};

void call_start(struct call *call);
bool call_is_done(struct call *call);
/* Its result, when it is over. */
int call_end(struct call *call);

int call_write(struct call *call);

#endif
