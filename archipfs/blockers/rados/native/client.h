/*
 * A client, its connection to the cluster, and the calls that use it.
 *
 * A connection is used by counted references: one of each client that has it, one of each call under way. Whoever lets
 * go of the last one shuts it down, so no call ever meets a connection that is being shut down.
 *
 * Lock order, for all files here:
 *     ra_data.gate → ra_data.table → ra_client.mutex
 * Nothing waits for the cluster with `table` or `mutex` held. The gate is passed, not locked: what was begun passes it
 * on one thread, and leaves it on another.
 */
#ifndef ARCHIPFS_RADOS_CLIENT_H
#define ARCHIPFS_RADOS_CLIENT_H

#include "library.h"
#include "native.h"

#include <pthread.h>
#include <stdatomic.h>

struct ra_connection {
    struct ra_library library;
    ra_cluster cluster;
    /* The backend's namespace, that of data objects, that of packs. */
    ra_ioctx base;
    ra_ioctx data;
    ra_ioctx packs;
    atomic_bool shut_out;
    atomic_uint references;
};

struct ra_claim {
    struct ra_claim *next;
    char key[RA_KEY_BYTES_MAX + 1];
    char owner[RA_OWNER_BYTES_MAX + 1];
    bool held;
    /* The connection (ra_client.number) that it was made on. */
    uint64_t number;
    /* A change under it got no answer in time. */
    bool uncertain;
    /* Of open objects. */
    unsigned references;
    /* Calls that are using a connection under it. */
    unsigned calls;
};

struct ra_client {
    pthread_mutex_t mutex;
    /* `connection`, `claims` or what is in one of them has changed. */
    pthread_cond_t changed;
    struct ra_connection *connection;
    /* Counts the connections this client has had. */
    uint64_t number;
    struct ra_claim *claims;
    bool closed;
    /* Of whoever opened it, and of open objects. */
    unsigned references;
    unsigned operation_timeout_s;
};

/*
 * One call on an object:
 *     struct ra_call call = {.client = …, .claim = …};
 *     do
 *         if ((result = ra_call_begin(&call)) == 0)
 *             result = … by call.connection …
 *     while (ra_call_again(&call, result));
 */
struct ra_call {
    struct ra_client *client;
    /* Or NULL: not under a claim. */
    struct ra_claim *claim;
    /* Begin gives -EAGAIN instead of waiting. */
    bool nowait;
    /* Set by begin, until again. */
    struct ra_connection *connection;
    uint64_t number;
    /* To be set when something that changes the store had no answer in time. */
    bool uncertain;
    bool has_deadline;
    struct timespec deadline;
};

/*
 * Get a connection to use. Waits until the claim is there again if it was lost, but no longer than an operation may
 * take. -ESHUTDOWN: shut out, and not under a claim. -EIO: the claim was given up, or did not come back in time.
 */
int ra_call_begin(struct ra_call *call);

/* The call is over with `result`. True: it met its end by being shut out, and is to be made once more. */
bool ra_call_again(struct ra_call *call, int result);

/* Beyond the end of a call: for what may still be inside librados then. */
struct ra_connection *ra_connection_keep(struct ra_connection *connection);
void ra_connection_drop(struct ra_connection *connection);

/* Objects keep their client, and the claim they were opened under. */
int ra_client_use(struct ra_client *client, const char *claim_key, struct ra_claim **claim);
void ra_client_unuse(struct ra_client *client, struct ra_claim *claim);

/* With the mutex held: forget it if nobody can need it any more. */
void ra_claim_forget(struct ra_client *client, struct ra_claim *claim);

/* -EINVAL for a key or an owner that is longer than it may be. */
int ra_check_length(const char *text, size_t bytes_max);

#endif
