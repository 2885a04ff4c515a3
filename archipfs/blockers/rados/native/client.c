#include "client.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAMESPACE_BYTES_MAX 256

/* Connecting */

static void disconnect(struct ra_connection *connection) {
    if (connection->packs != NULL)
        connection->library.ioctx_destroy(connection->packs);
    if (connection->data != NULL)
        connection->library.ioctx_destroy(connection->data);
    if (connection->base != NULL)
        connection->library.ioctx_destroy(connection->base);
    if (connection->cluster != NULL)
        connection->library.shutdown(connection->cluster);
    ra_library_close(&connection->library);
    free(connection);
}

struct ra_connection *ra_connection_keep(struct ra_connection *connection) {
    atomic_fetch_add_explicit(&connection->references, 1, memory_order_relaxed);
    return connection;
}

void ra_connection_drop(struct ra_connection *connection) {
    if (atomic_fetch_sub_explicit(&connection->references, 1, memory_order_acq_rel) == 1)
        disconnect(connection);
}

static int set_seconds(struct ra_connection *connection, const char *option, unsigned seconds) {
    char text[16];
    snprintf(text, sizeof text, "%u", seconds);
    return connection->library.conf_set(connection->cluster, option, text);
}

/*
 * An OSD that was killed and started again is another address, which a client finds in a new map. It asks for one when
 * an operation was not answered for `objecter_timeout`, at the next of its ticks: by default after 10 to 15 seconds. An
 * operation that is given up before never has it ask; so with a short timeout, no later one would succeed either.
 */
static int set_patience(struct ra_connection *connection, unsigned operation_timeout_s) {
    unsigned ms = operation_timeout_s == 0 || operation_timeout_s > 8 ? 2000 : operation_timeout_s * 250;
    char text[16];
    snprintf(text, sizeof text, "%u.%03u", ms / 1000, ms % 1000);
    int result = connection->library.conf_set(connection->cluster, "objecter_timeout", text);
    return result < 0 ? result : connection->library.conf_set(connection->cluster, "objecter_tick_interval", text);
}

static int open_namespace(struct ra_connection *connection, const struct ra_settings *settings, const char *suffix,
                          ra_ioctx *io) {
    char name[NAMESPACE_BYTES_MAX];
    int length = snprintf(name, sizeof name, "%s%s", settings->space, suffix);
    if (length < 0 || (size_t)length >= sizeof name)
        return -EINVAL;
    int result = connection->library.ioctx_create(connection->cluster, settings->pool, io);
    if (result < 0) {
        *io = NULL;
        return result;
    }
    connection->library.ioctx_set_namespace(*io, name);
    /* A write to a full cluster is refused (ENOSPC) instead of waiting for room; what needs no room is carried out. */
    connection->library.set_pool_full_try(*io);
    return 0;
}

static int connect_to(struct ra_connection *connection, const struct ra_settings *settings, char *problem,
                      size_t problem_bytes) {
    const struct ra_library *library = &connection->library;
    int result = library->create(&connection->cluster, settings->user);
    if (result < 0) {
        connection->cluster = NULL;
        snprintf(problem, problem_bytes, "making a client failed");
        return result;
    }
    result = library->conf_read_file(connection->cluster, settings->conf);
    if (result < 0) {
        snprintf(problem, problem_bytes, "%s cannot be read", settings->conf);
        return result;
    }
    if (settings->keyring != NULL)
        result = library->conf_set(connection->cluster, "keyring", settings->keyring);
    if (result == 0)
        result = set_seconds(connection, "client_mount_timeout", settings->timeout_s);
    if (result == 0)
        result = set_seconds(connection, "rados_mon_op_timeout", settings->timeout_s);
    if (result == 0)
        result = set_seconds(connection, "rados_osd_op_timeout", settings->operation_timeout_s);
    if (result == 0)
        result = set_patience(connection, settings->operation_timeout_s);
    if (result < 0) {
        snprintf(problem, problem_bytes, "librados does not take its settings");
        return result;
    }
    result = library->connect(connection->cluster);
    if (result < 0) {
        snprintf(problem, problem_bytes, "the cluster does not answer");
        return result;
    }
    result = open_namespace(connection, settings, "", &connection->base);
    if (result == 0)
        result = open_namespace(connection, settings, ".data", &connection->data);
    if (result == 0)
        result = open_namespace(connection, settings, ".packs", &connection->packs);
    if (result < 0)
        snprintf(problem, problem_bytes, "pool %s cannot be used", settings->pool);
    return result;
}

static int open_connection(const struct ra_settings *settings, struct ra_connection **made, char *problem,
                           size_t problem_bytes) {
    struct ra_connection *connection = calloc(1, sizeof *connection);
    if (connection == NULL) {
        snprintf(problem, problem_bytes, "no memory");
        return -ENOMEM;
    }
    atomic_init(&connection->references, 1);
    atomic_init(&connection->shut_out, false);
    int result = ra_library_open(&connection->library, settings->library, problem, problem_bytes);
    if (result < 0) {
        free(connection);
        return result;
    }
    result = connect_to(connection, settings, problem, problem_bytes);
    if (result < 0) {
        disconnect(connection);
        return result;
    }
    *made = connection;
    return 0;
}

/* Clients */

static int make_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    int result = pthread_condattr_init(&attributes);
    if (result != 0)
        return -result;
    result = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    if (result == 0)
        result = pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
    return -result;
}

int ra_client_open(const struct ra_settings *settings, struct ra_client **made, char *problem, size_t problem_bytes) {
    struct ra_client *client = calloc(1, sizeof *client);
    if (client == NULL) {
        snprintf(problem, problem_bytes, "no memory");
        return -ENOMEM;
    }
    client->references = 1;
    client->operation_timeout_s = settings->operation_timeout_s;
    int result = -pthread_mutex_init(&client->mutex, NULL);
    if (result < 0)
        goto no_mutex;
    result = make_condition(&client->changed);
    if (result < 0)
        goto no_condition;
    result = open_connection(settings, &client->connection, problem, problem_bytes);
    if (result < 0)
        goto no_connection;
    *made = client;
    return 0;

no_connection:
    pthread_cond_destroy(&client->changed);
no_condition:
    pthread_mutex_destroy(&client->mutex);
no_mutex:
    free(client);
    return result;
}

/* Gives the mutex back. */
static void drop_reference(struct ra_client *client) {
    bool last = --client->references == 0;
    pthread_mutex_unlock(&client->mutex);
    if (!last)
        return;
    while (client->claims != NULL) {
        struct ra_claim *claim = client->claims;
        client->claims = claim->next;
        free(claim);
    }
    ra_connection_drop(client->connection);
    pthread_cond_destroy(&client->changed);
    pthread_mutex_destroy(&client->mutex);
    free(client);
}

void ra_client_close(struct ra_client *client) {
    pthread_mutex_lock(&client->mutex);
    client->closed = true;
    for (struct ra_claim *claim = client->claims; claim != NULL; claim = claim->next)
        claim->held = false;
    pthread_cond_broadcast(&client->changed);
    drop_reference(client);
}

bool ra_client_is_shut_out(struct ra_client *client) {
    pthread_mutex_lock(&client->mutex);
    bool shut_out = atomic_load(&client->connection->shut_out);
    pthread_mutex_unlock(&client->mutex);
    return shut_out;
}

static struct ra_connection *connection_of(struct ra_client *client) {
    pthread_mutex_lock(&client->mutex);
    struct ra_connection *connection = client->connection;
    atomic_fetch_add(&connection->references, 1);
    pthread_mutex_unlock(&client->mutex);
    return connection;
}

void ra_client_adopt(struct ra_client *client, struct ra_client *successor) {
    if (client == successor)
        return;
    struct ra_connection *connection = connection_of(successor);
    pthread_mutex_lock(&client->mutex);
    struct ra_connection *former = client->connection;
    client->connection = connection;
    client->number++;
    pthread_cond_broadcast(&client->changed);
    pthread_mutex_unlock(&client->mutex);
    ra_connection_drop(former);
}

int ra_client_addresses(struct ra_client *client, char *addresses, size_t addresses_bytes) {
    struct ra_connection *connection = connection_of(client);
    char *found = NULL;
    int result = connection->library.getaddrs(connection->cluster, &found);
    if (result == 0) {
        int length = snprintf(addresses, addresses_bytes, "%s", found);
        connection->library.buffer_free(found);
        if (length < 0 || (size_t)length >= addresses_bytes)
            result = -ERANGE;
    }
    ra_connection_drop(connection);
    return result;
}

int ra_client_wait_for_latest_map(struct ra_client *client) {
    struct ra_call call = {.client = client};
    int result = ra_call_begin(&call);
    if (result < 0)
        return result;
    result = call.connection->library.wait_for_latest_osdmap(call.connection->cluster);
    ra_call_again(&call, result);
    return result;
}

int ra_check_length(const char *text, size_t bytes_max) { return strlen(text) <= bytes_max ? 0 : -EINVAL; }

int ra_client_use(struct ra_client *client, const char *claim_key, struct ra_claim **claim) {
    int result = 0;
    pthread_mutex_lock(&client->mutex);
    *claim = NULL;
    if (claim_key != NULL) {
        for (*claim = client->claims; *claim != NULL && strcmp((*claim)->key, claim_key) != 0;)
            *claim = (*claim)->next;
        if (*claim == NULL)
            result = -EIO;
    }
    if (client->closed)
        result = -EBADF;
    if (result == 0) {
        client->references++;
        if (*claim != NULL)
            (*claim)->references++;
    }
    pthread_mutex_unlock(&client->mutex);
    return result;
}

void ra_client_unuse(struct ra_client *client, struct ra_claim *claim) {
    pthread_mutex_lock(&client->mutex);
    if (claim != NULL) {
        claim->references--;
        ra_claim_forget(client, claim);
    }
    drop_reference(client);
}

/* Calls */

/* With the mutex held. False: the time is over. */
static bool wait_for_change(struct ra_call *call) {
    struct ra_client *client = call->client;
    if (client->operation_timeout_s == 0) {
        pthread_cond_wait(&client->changed, &client->mutex);
        return true;
    }
    if (!call->has_deadline) {
        clock_gettime(CLOCK_MONOTONIC, &call->deadline);
        call->deadline.tv_sec += client->operation_timeout_s;
        call->has_deadline = true;
    }
    return pthread_cond_timedwait(&client->changed, &client->mutex, &call->deadline) != ETIMEDOUT;
}

int ra_call_begin(struct ra_call *call) {
    struct ra_client *client = call->client;
    struct ra_claim *claim = call->claim;
    int result = 0;
    pthread_mutex_lock(&client->mutex);
    for (;;) {
        bool shut_out = atomic_load_explicit(&client->connection->shut_out, memory_order_relaxed);
        if (claim == NULL) {
            result = shut_out ? -ESHUTDOWN : 0;
            break;
        }
        if (!claim->held) {
            result = -EIO;
            break;
        }
        if (!shut_out && claim->number == client->number)
            break;
        if (call->nowait) {
            result = -EAGAIN;
            break;
        }
        if (!wait_for_change(call)) {
            result = -EIO;
            break;
        }
    }
    if (result == 0) {
        call->connection = client->connection;
        call->number = client->number;
        call->uncertain = false;
        atomic_fetch_add_explicit(&call->connection->references, 1, memory_order_relaxed);
        if (claim != NULL)
            claim->calls++;
    }
    pthread_mutex_unlock(&client->mutex);
    return result;
}

bool ra_call_again(struct ra_call *call, int result) {
    struct ra_connection *connection = call->connection;
    if (connection == NULL)
        return false;
    call->connection = NULL;
    if (result == -ESHUTDOWN)
        atomic_store(&connection->shut_out, true);
    if (call->claim != NULL) {
        struct ra_claim *claim = call->claim;
        pthread_mutex_lock(&call->client->mutex);
        if (call->uncertain)
            claim->uncertain = true;
        if (--claim->calls == 0 && !claim->held)
            pthread_cond_broadcast(&call->client->changed);
        pthread_mutex_unlock(&call->client->mutex);
    }
    ra_connection_drop(connection);
    return result == -ESHUTDOWN && call->claim != NULL;
}
