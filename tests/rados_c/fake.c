#include "fake.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NAME_BYTES 512
#define LOCKERS_MAX 8
#define WORKERS 3
#define DIFFERS 4095

/* Only a bug in the client leads here. */
#define INSIST(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: the client's bug: not so: %s\n", __FILE__, __LINE__, #condition);                  \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

enum step_kind { CREATE, COMPARE, WRITE, ZERO, REMOVE, READ, STAT };

struct step {
    enum step_kind kind;
    int exclusive;
    uint64_t offset;
    size_t length;
    char *bytes;
    char *buffer;
    uint64_t *size;
};

struct op {
    struct step *steps;
    size_t count;
};

struct locker {
    char client[32];
    char cookie[256];
};

struct object {
    struct object *next;
    char name[NAME_BYTES];
    char *bytes;
    size_t size;
    bool there;
    char tag[256];
    struct locker lockers[LOCKERS_MAX];
    unsigned locker_count;
};

struct held {
    struct held *next;
    char name[NAME_BYTES];
    struct op *op;
};

struct rule {
    char part[64];
    bool changes;
    int result;
    unsigned count;
};

struct completion {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool queued, done;
    int result;
    void (*complete)(void *, void *); /* or NULL */
    void *argument;
};

struct queued {
    struct queued *next;
    char name[NAME_BYTES];
    struct op *op;
    struct completion *completion;
    bool running;
};

struct client {
    char address[32];
    bool blocklisted, connected, stopping;
    unsigned inside; /* calls that begin something, and have not returned */
    pthread_t workers[WORKERS];
    pthread_cond_t changed;
    struct queued *queue;
    struct client *next;
};

struct io {
    struct client *client;
    char space[128];
    bool full_try;
};

/* The cluster: all of it under one mutex. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;
static struct object *objects;
static struct client *clients;
static struct held *held, **held_end = &held;
static struct rule rule;
static char hold_part[64], stop_part[64];
static unsigned delay_us, stopped, client_count, addresses_given;
static long changes_left = -1, changes_done;
static bool full, keeping, encrypts;
static uint64_t draw = 88172645463325252u;

/* Operations */

static void op_free(struct op *op) {
    for (size_t i = 0; i < op->count; i++)
        free(op->steps[i].bytes);
    free(op->steps);
    free(op);
}

static struct step *op_add(struct op *op, enum step_kind kind) {
    op->steps = realloc(op->steps, (op->count + 1) * sizeof *op->steps);
    INSIST(op->steps != NULL);
    struct step *step = &op->steps[op->count++];
    *step = (struct step){.kind = kind};
    return step;
}

static struct op *op_make(void) {
    struct op *op = calloc(1, sizeof *op);
    INSIST(op != NULL);
    return op;
}

static char *copy(const void *bytes, size_t length) {
    char *made = malloc(length > 0 ? length : 1);
    INSIST(made != NULL);
    memcpy(made, bytes, length);
    return made;
}

static struct op *op_copy(const struct op *from) {
    struct op *op = op_make();
    for (size_t i = 0; i < from->count; i++) {
        struct step *step = op_add(op, from->steps[i].kind);
        *step = from->steps[i];
        if (step->bytes != NULL)
            step->bytes = copy(step->bytes, step->length);
    }
    return op;
}

static bool op_changes(const struct op *op) {
    for (size_t i = 0; i < op->count; i++)
        if (op->steps[i].kind != READ && op->steps[i].kind != STAT)
            return true;
    return false;
}

static struct object *object_find(const char *name, bool make) {
    struct object *object = objects;
    while (object != NULL && strcmp(object->name, name) != 0)
        object = object->next;
    if (object == NULL && make) {
        object = calloc(1, sizeof *object);
        INSIST(object != NULL);
        snprintf(object->name, sizeof object->name, "%s", name);
        object->next = objects;
        objects = object;
    }
    return object;
}

static void object_resize(struct object *object, size_t size) {
    if (size > object->size) {
        object->bytes = realloc(object->bytes, size);
        INSIST(object->bytes != NULL);
        memset(object->bytes + object->size, 0, size - object->size);
    }
    object->size = size;
}

/* What an OSD does with it: all of it, or nothing. */
static int op_apply(const char *name, const struct op *op) {
    struct object *object = object_find(name, op_changes(op));
    bool there = object != NULL && object->there, grows = false;
    size_t size = there ? object->size : 0;
    for (size_t i = 0; i < op->count; i++) {
        const struct step *step = &op->steps[i];
        if (step->kind == CREATE && step->exclusive && there)
            return -EEXIST;
        if ((step->kind == READ || step->kind == STAT || step->kind == REMOVE) && !there)
            return -ENOENT;
        if (step->kind == COMPARE)
            for (size_t at = 0; at < step->length; at++) {
                size_t place = step->offset + at;
                if ((place < size ? object->bytes[place] : 0) != step->bytes[at])
                    return -DIFFERS - (int)at;
            }
        if (step->kind == CREATE || (step->kind == WRITE && step->offset + step->length > size))
            grows = true;
    }
    if (grows && full)
        return -ENOSPC;
    int result = 0;
    for (size_t i = 0; i < op->count; i++) {
        const struct step *step = &op->steps[i];
        size_t have = object != NULL && object->there && step->offset < object->size ? object->size - step->offset : 0;
        size_t length = step->length < have ? step->length : have;
        switch (step->kind) {
        case CREATE:
            object->there = true;
            break;
        case WRITE:
            object->there = true;
            if (step->offset + step->length > object->size)
                object_resize(object, step->offset + step->length);
            memcpy(object->bytes + step->offset, step->bytes, step->length);
            break;
        case ZERO:
            if (length > 0)
                memset(object->bytes + step->offset, 0, length);
            /* As an OSD does: up to the end, it is a truncate. */
            if (length > 0 && length == have)
                object_resize(object, step->offset);
            break;
        case REMOVE:
            object_resize(object, 0);
            object->there = false;
            break;
        case READ:
            if (length > 0)
                memcpy(step->buffer, object->bytes + step->offset, length);
            result = (int)length;
            break;
        case STAT:
            *step->size = object->size;
            break;
        case COMPARE:
            break;
        }
    }
    return result;
}

static bool matches(const char *part, const char *name) { return part[0] != '\0' && strstr(name, part) != NULL; }

static unsigned draw_below(unsigned bound) {
    draw ^= draw << 13;
    draw ^= draw >> 7;
    draw ^= draw << 17;
    return (unsigned)(draw % bound);
}

/* With the mutex held, which is given back while it waits. */
static int op_run(struct client *client, const char *name, const struct op *op) {
    INSIST(client->connected);
    bool changes = op_changes(op);
    if (delay_us > 0) {
        unsigned us = draw_below(delay_us);
        pthread_mutex_unlock(&mutex);
        usleep(us);
        pthread_mutex_lock(&mutex);
    }
    if (matches(stop_part, name)) {
        stopped++;
        while (matches(stop_part, name))
            pthread_cond_wait(&released, &mutex);
        stopped--;
    }
    if (client->blocklisted)
        return -ESHUTDOWN;
    if (rule.count > 0 && rule.changes == changes && matches(rule.part, name)) {
        rule.count--;
        return rule.result;
    }
    if (changes && matches(hold_part, name)) {
        struct held *late = calloc(1, sizeof *late);
        INSIST(late != NULL);
        snprintf(late->name, sizeof late->name, "%s", name);
        late->op = op_copy(op);
        *held_end = late;
        held_end = &late->next;
        return -ETIMEDOUT;
    }
    if (!changes)
        return op_apply(name, op);
    if (changes_left == 0)
        return -EIO;
    if (changes_left > 0)
        changes_left--;
    changes_done++;
    return op_apply(name, op);
}

static void name_of(const struct io *io, const char *oid, char name[NAME_BYTES]) {
    INSIST(io->client->connected);
    INSIST(io->full_try);
    snprintf(name, NAME_BYTES, "%s|%s", io->space, oid);
}

static int run_and_free(struct io *io, const char *oid, struct op *op) {
    char name[NAME_BYTES];
    pthread_mutex_lock(&mutex);
    name_of(io, oid, name);
    int result = op_run(io->client, name, op);
    pthread_mutex_unlock(&mutex);
    op_free(op);
    return result;
}

/* Asynchronous ones */

/* One of those that are the first of their object. */
static struct queued *queue_take(struct client *client) {
    struct queued *ready[64];
    unsigned count = 0;
    for (struct queued *each = client->queue; each != NULL && count < 64; each = each->next) {
        bool first = !each->running;
        for (struct queued *before = client->queue; before != each; before = before->next)
            first = first && strcmp(before->name, each->name) != 0;
        if (first)
            ready[count++] = each;
    }
    return count > 0 ? ready[draw_below(count)] : NULL;
}

static void *work(void *argument) {
    struct client *client = argument;
    pthread_mutex_lock(&mutex);
    for (;;) {
        struct queued *job = queue_take(client);
        if (job == NULL) {
            if (client->stopping)
                break;
            pthread_cond_wait(&client->changed, &mutex);
            continue;
        }
        job->running = true;
        int result = op_run(client, job->name, job->op);
        if (encrypts && job->op->steps[0].kind == READ && result > 0 && result % 16 != 0)
            result = -ERANGE;
        struct queued **at = &client->queue;
        while (*at != job)
            at = &(*at)->next;
        *at = job->next;
        struct completion *completion = job->completion;
        pthread_mutex_lock(&completion->mutex);
        completion->done = true;
        completion->result = result;
        void (*complete)(void *, void *) = completion->complete;
        void *complete_argument = completion->argument;
        pthread_cond_broadcast(&completion->changed);
        pthread_mutex_unlock(&completion->mutex);
        op_free(job->op);
        free(job);
        pthread_cond_broadcast(&client->changed);
        if (complete != NULL) {
            pthread_mutex_unlock(&mutex);
            complete(completion, complete_argument);
            pthread_mutex_lock(&mutex);
        }
    }
    pthread_mutex_unlock(&mutex);
    return NULL;
}

static int queue_op(struct io *io, const char *oid, struct completion *completion, struct op *op) {
    struct client *client = io->client;
    struct queued *job = calloc(1, sizeof *job);
    INSIST(job != NULL);
    completion->queued = true;
    pthread_mutex_lock(&mutex);
    client->inside++;
    name_of(io, oid, job->name);
    job->op = op;
    job->completion = completion;
    struct queued **at = &io->client->queue;
    while (*at != NULL)
        at = &(*at)->next;
    *at = job;
    pthread_cond_broadcast(&client->changed);
    while (keeping)
        pthread_cond_wait(&released, &mutex);
    client->inside--;
    pthread_mutex_unlock(&mutex);
    return 0;
}

static struct op *op_range(enum step_kind kind, const char *bytes, char *buffer, size_t length, uint64_t offset) {
    struct op *op = op_make();
    struct step *step = op_add(op, kind);
    step->bytes = bytes != NULL ? copy(bytes, length) : NULL;
    step->buffer = buffer;
    step->length = length;
    step->offset = offset;
    return op;
}

/* The calls of librados */

#define API __attribute__((visibility("default")))

API int rados_create(void **cluster, const char *id) {
    INSIST(id != NULL);
    struct client *client = calloc(1, sizeof *client);
    if (client == NULL)
        return -ENOMEM;
    pthread_cond_init(&client->changed, NULL);
    *cluster = client;
    return 0;
}

API int rados_conf_read_file(void *cluster, const char *path) {
    (void)cluster;
    return strcmp(path, "missing") == 0 ? -ENOENT : 0;
}

API int rados_conf_set(void *cluster, const char *option, const char *value) {
    (void)cluster;
    INSIST(option != NULL && value != NULL);
    return 0;
}

API int rados_connect(void *cluster) {
    struct client *client = cluster;
    pthread_mutex_lock(&mutex);
    snprintf(client->address, sizeof client->address, "10.0.0.1:0/%u", ++addresses_given);
    client->connected = true;
    client->next = clients;
    clients = client;
    client_count++;
    pthread_mutex_unlock(&mutex);
    for (unsigned i = 0; i < WORKERS; i++)
        INSIST(pthread_create(&client->workers[i], NULL, work, client) == 0);
    return 0;
}

API void rados_shutdown(void *cluster) {
    struct client *client = cluster;
    pthread_mutex_lock(&mutex);
    bool connected = client->connected;
    INSIST(client->queue == NULL && client->inside == 0);
    client->stopping = true;
    pthread_cond_broadcast(&client->changed);
    pthread_mutex_unlock(&mutex);
    if (connected) {
        for (unsigned i = 0; i < WORKERS; i++)
            pthread_join(client->workers[i], NULL);
        pthread_mutex_lock(&mutex);
        struct client **at = &clients;
        while (*at != client)
            at = &(*at)->next;
        *at = client->next;
        client_count--;
        pthread_mutex_unlock(&mutex);
    }
    pthread_cond_destroy(&client->changed);
    free(client);
}

API int rados_wait_for_latest_osdmap(void *cluster) {
    struct client *client = cluster;
    pthread_mutex_lock(&mutex);
    INSIST(client->connected);
    int result = client->blocklisted ? -ESHUTDOWN : 0;
    pthread_mutex_unlock(&mutex);
    return result;
}

API int rados_getaddrs(void *cluster, char **addresses) {
    *addresses = strdup(((struct client *)cluster)->address);
    return *addresses != NULL ? 0 : -ENOMEM;
}

API void rados_buffer_free(char *buffer) { free(buffer); }

API int rados_ioctx_create(void *cluster, const char *pool, void **made) {
    if (strcmp(pool, "missing") == 0)
        return -ENOENT;
    struct io *io = calloc(1, sizeof *io);
    if (io == NULL)
        return -ENOMEM;
    io->client = cluster;
    *made = io;
    return 0;
}

API void rados_ioctx_set_namespace(void *io, const char *name) {
    snprintf(((struct io *)io)->space, sizeof((struct io *)io)->space, "%s", name);
}

API void rados_ioctx_destroy(void *io) { free(io); }

API void rados_set_pool_full_try(void *io) { ((struct io *)io)->full_try = true; }

API int rados_read(void *io, const char *oid, char *buffer, size_t length, uint64_t offset) {
    return run_and_free(io, oid, op_range(READ, NULL, buffer, length, offset));
}

API int rados_write(void *io, const char *oid, const char *buffer, size_t length, uint64_t offset) {
    return run_and_free(io, oid, op_range(WRITE, buffer, NULL, length, offset));
}

API int rados_stat(void *io, const char *oid, uint64_t *size, time_t *mtime) {
    struct op *op = op_make();
    op_add(op, STAT)->size = size;
    *mtime = 0;
    return run_and_free(io, oid, op);
}

API int rados_remove(void *io, const char *oid) { return run_and_free(io, oid, op_range(REMOVE, NULL, NULL, 0, 0)); }

API int rados_aio_create_completion2(void *argument, void (*complete)(void *, void *), void **made) {
    INSIST((argument == NULL) == (complete == NULL));
    struct completion *completion = calloc(1, sizeof *completion);
    if (completion == NULL)
        return -ENOMEM;
    completion->complete = complete;
    completion->argument = argument;
    pthread_mutex_init(&completion->mutex, NULL);
    pthread_cond_init(&completion->changed, NULL);
    *made = completion;
    return 0;
}

API int rados_aio_wait_for_complete(void *made) {
    struct completion *completion = made;
    pthread_mutex_lock(&completion->mutex);
    while (!completion->done)
        pthread_cond_wait(&completion->changed, &completion->mutex);
    pthread_mutex_unlock(&completion->mutex);
    return 0;
}

API int rados_aio_get_return_value(void *made) {
    struct completion *completion = made;
    INSIST(completion->done);
    return completion->result;
}

API void rados_aio_release(void *made) {
    struct completion *completion = made;
    INSIST(completion->done || !completion->queued);
    pthread_cond_destroy(&completion->changed);
    pthread_mutex_destroy(&completion->mutex);
    free(completion);
}

API int rados_aio_read(void *io, const char *oid, void *completion, char *buffer, size_t length, uint64_t offset) {
    return queue_op(io, oid, completion, op_range(READ, NULL, buffer, length, offset));
}

API int rados_aio_write(void *io, const char *oid, void *completion, const char *buffer, size_t length,
                        uint64_t offset) {
    return queue_op(io, oid, completion, op_range(WRITE, buffer, NULL, length, offset));
}

API int rados_aio_remove(void *io, const char *oid, void *completion) {
    return queue_op(io, oid, completion, op_range(REMOVE, NULL, NULL, 0, 0));
}

API int rados_aio_stat(void *io, const char *oid, void *completion, uint64_t *size, time_t *mtime) {
    struct op *op = op_make();
    op_add(op, STAT)->size = size;
    *mtime = 0;
    return queue_op(io, oid, completion, op);
}

API void *rados_create_write_op(void) { return op_make(); }

API void rados_release_write_op(void *op) { op_free(op); }

API void rados_write_op_create(void *op, int exclusive, const char *category) {
    INSIST(category == NULL);
    op_add(op, CREATE)->exclusive = exclusive;
}

static void op_add_range(void *op, enum step_kind kind, const char *bytes, size_t length, uint64_t offset) {
    struct step *step = op_add(op, kind);
    step->bytes = bytes != NULL ? copy(bytes, length) : NULL;
    step->length = length;
    step->offset = offset;
}

API void rados_write_op_cmpext(void *op, const char *buffer, size_t length, uint64_t offset, int *result) {
    INSIST(result == NULL);
    op_add_range(op, COMPARE, buffer, length, offset);
}

API void rados_write_op_write(void *op, const char *buffer, size_t length, uint64_t offset) {
    op_add_range(op, WRITE, buffer, length, offset);
}

API void rados_write_op_zero(void *op, uint64_t offset, uint64_t length) {
    op_add_range(op, ZERO, NULL, (size_t)length, offset);
}

API int rados_write_op_operate(void *op, void *io, const char *oid, time_t *mtime, int flags) {
    INSIST(mtime == NULL && flags == 0);
    return run_and_free(io, oid, op_copy(op));
}

API int rados_aio_write_op_operate(void *op, void *io, void *completion, const char *oid, time_t *mtime, int flags) {
    INSIST(mtime == NULL && flags == 0);
    return queue_op(io, oid, completion, op_copy(op));
}

API int rados_lock_shared(void *made, const char *oid, const char *name, const char *cookie, const char *tag,
                          const char *description, struct timeval *duration, uint8_t flags) {
    struct io *io = made;
    INSIST(strcmp(name, "archipfs") == 0 && description != NULL && duration == NULL && flags == 1);
    char full_name[NAME_BYTES];
    int result = 0;
    pthread_mutex_lock(&mutex);
    name_of(io, oid, full_name);
    struct object *object = object_find(full_name, true);
    unsigned at = 0;
    while (at < object->locker_count && strcmp(object->lockers[at].client, io->client->address) != 0)
        at++;
    if (io->client->blocklisted) {
        result = -ESHUTDOWN;
    } else if (object->locker_count > 0 && strcmp(object->tag, tag) != 0) {
        result = -EBUSY;
    } else if (at == object->locker_count) {
        INSIST(at < LOCKERS_MAX);
        object->there = true;
        snprintf(object->tag, sizeof object->tag, "%s", tag);
        snprintf(object->lockers[at].client, sizeof object->lockers[at].client, "%s", io->client->address);
        snprintf(object->lockers[at].cookie, sizeof object->lockers[at].cookie, "%s", cookie);
        object->locker_count++;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

API int rados_unlock(void *made, const char *oid, const char *name, const char *cookie) {
    struct io *io = made;
    INSIST(strcmp(name, "archipfs") == 0);
    char full_name[NAME_BYTES];
    int result = -ENOENT;
    pthread_mutex_lock(&mutex);
    name_of(io, oid, full_name);
    struct object *object = object_find(full_name, true);
    for (unsigned at = 0; at < object->locker_count; at++)
        if (strcmp(object->lockers[at].client, io->client->address) == 0 &&
            strcmp(object->lockers[at].cookie, cookie) == 0) {
            object->lockers[at] = object->lockers[--object->locker_count];
            result = 0;
            break;
        }
    if (io->client->blocklisted)
        result = -ESHUTDOWN;
    pthread_mutex_unlock(&mutex);
    return result;
}

/* What tests do to it */

static void set_part(char part[64], const char *to) { snprintf(part, 64, "%s", to != NULL ? to : ""); }

API void fake_reset(void) {
    pthread_mutex_lock(&mutex);
    INSIST(clients == NULL);
    while (objects != NULL) {
        struct object *object = objects;
        objects = object->next;
        free(object->bytes);
        free(object);
    }
    while (held != NULL) {
        struct held *late = held;
        held = late->next;
        op_free(late->op);
        free(late);
    }
    held_end = &held;
    rule.count = 0;
    hold_part[0] = stop_part[0] = '\0';
    delay_us = 0;
    changes_left = -1;
    changes_done = 0;
    full = keeping = encrypts = false;
    pthread_mutex_unlock(&mutex);
}

API void fake_delay_us(unsigned most) {
    pthread_mutex_lock(&mutex);
    delay_us = most;
    pthread_mutex_unlock(&mutex);
}

API void fake_fail(const char *part, bool changes, int result, unsigned count) {
    pthread_mutex_lock(&mutex);
    set_part(rule.part, part);
    rule.changes = changes;
    rule.result = result;
    rule.count = count;
    pthread_mutex_unlock(&mutex);
}

API void fake_hold(const char *part) {
    pthread_mutex_lock(&mutex);
    set_part(hold_part, part);
    pthread_mutex_unlock(&mutex);
}

API void fake_arrive(void) {
    pthread_mutex_lock(&mutex);
    while (held != NULL) {
        struct held *late = held;
        held = late->next;
        op_apply(late->name, late->op);
        op_free(late->op);
        free(late);
    }
    held_end = &held;
    pthread_mutex_unlock(&mutex);
}

API void fake_stop(const char *part) {
    pthread_mutex_lock(&mutex);
    set_part(stop_part, part);
    pthread_cond_broadcast(&released);
    pthread_mutex_unlock(&mutex);
}

API void fake_keep(bool now) {
    pthread_mutex_lock(&mutex);
    keeping = now;
    pthread_cond_broadcast(&released);
    pthread_mutex_unlock(&mutex);
}

API void fake_encrypt(void) {
    pthread_mutex_lock(&mutex);
    encrypts = true;
    pthread_mutex_unlock(&mutex);
}

API unsigned fake_stopped(void) {
    pthread_mutex_lock(&mutex);
    unsigned count = stopped;
    pthread_mutex_unlock(&mutex);
    return count;
}

API void fake_crash_after(long changes) {
    pthread_mutex_lock(&mutex);
    changes_left = changes;
    changes_done = 0;
    pthread_mutex_unlock(&mutex);
}

API long fake_changes(void) {
    pthread_mutex_lock(&mutex);
    long count = changes_done;
    pthread_mutex_unlock(&mutex);
    return count;
}

API void fake_full(bool now) {
    pthread_mutex_lock(&mutex);
    full = now;
    pthread_mutex_unlock(&mutex);
}

API void fake_blocklist(const char *address) {
    pthread_mutex_lock(&mutex);
    for (struct client *client = clients; client != NULL; client = client->next)
        if (strcmp(client->address, address) == 0)
            client->blocklisted = true;
    for (struct object *object = objects; object != NULL; object = object->next)
        for (unsigned at = object->locker_count; at-- > 0;)
            if (strcmp(object->lockers[at].client, address) == 0)
                object->lockers[at] = object->lockers[--object->locker_count];
    pthread_mutex_unlock(&mutex);
}

/* With the mutex held. */
static struct object *object_at(const char *space, const char *oid) {
    char name[NAME_BYTES];
    snprintf(name, sizeof name, "%s|%s", space, oid);
    struct object *object = object_find(name, false);
    return object != NULL && object->there ? object : NULL;
}

API bool fake_has(const char *space, const char *oid, uint64_t *size) {
    pthread_mutex_lock(&mutex);
    struct object *object = object_at(space, oid);
    if (object != NULL && size != NULL)
        *size = object->size;
    pthread_mutex_unlock(&mutex);
    return object != NULL;
}

API unsigned char fake_byte(const char *space, const char *oid, uint64_t offset) {
    pthread_mutex_lock(&mutex);
    struct object *object = object_at(space, oid);
    unsigned char byte = object != NULL && offset < object->size ? (unsigned char)object->bytes[offset] : 0;
    pthread_mutex_unlock(&mutex);
    return byte;
}

API size_t fake_objects(void) {
    size_t count = 0;
    pthread_mutex_lock(&mutex);
    for (struct object *object = objects; object != NULL; object = object->next)
        count += object->there ? 1 : 0;
    pthread_mutex_unlock(&mutex);
    return count;
}

API unsigned fake_lockers(const char *space, const char *oid) {
    pthread_mutex_lock(&mutex);
    struct object *object = object_at(space, oid);
    unsigned count = object != NULL ? object->locker_count : 0;
    pthread_mutex_unlock(&mutex);
    return count;
}

API unsigned fake_clients(void) {
    pthread_mutex_lock(&mutex);
    unsigned count = client_count;
    pthread_mutex_unlock(&mutex);
    return count;
}
