/*
 * How fast a data object is, called as the engine calls it, from some threads:
 *     bench CONF POOL read|write BLOCK_BYTES THREADS SECONDS [OBJECT_BYTES]
 */
#include "native.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct worker {
    pthread_t thread;
    const struct ae_object *object;
    bool writes;
    size_t block;
    uint64_t blocks;
    uint64_t seed;
    uint64_t done;
    uint64_t step;
    int result;
    const atomic_bool *stop;
};

static void die(const char *what, int result) {
    fprintf(stderr, "bench: %s: %s\n", what, strerror(-result));
    exit(1);
}

static void *work(void *argument) {
    struct worker *worker = argument;
    char *buffer = malloc(worker->block);
    if (buffer == NULL)
        exit(1);
    memset(buffer, (int)worker->seed, worker->block);
    const struct ae_object_ops *ops = worker->object->ops;
    uint64_t at = worker->seed;
    while (!atomic_load_explicit(worker->stop, memory_order_relaxed) && worker->result == 0) {
        if (worker->step > 0) {
            at += worker->step;
        } else {
            at ^= at << 13;
            at ^= at >> 7;
            at ^= at << 17;
        }
        uint64_t offset = at % worker->blocks * worker->block;
        worker->result = worker->writes ? ops->pwrite(worker->object->ctx, buffer, worker->block, offset)
                                        : ops->pread(worker->object->ctx, buffer, worker->block, offset);
        worker->done++;
    }
    free(buffer);
    return NULL;
}

int main(int count, char **arguments) {
    if (count < 7) {
        fprintf(stderr,
                "usage: bench CONF POOL read|write|seqread|seqwrite BLOCK_BYTES THREADS SECONDS [OBJECT_BYTES]\n");
        return 2;
    }
    const char *how = arguments[3];
    size_t block = (size_t)strtoull(arguments[4], NULL, 10);
    unsigned threads = (unsigned)strtoul(arguments[5], NULL, 10), seconds = (unsigned)strtoul(arguments[6], NULL, 10);
    uint64_t size = count > 7 ? strtoull(arguments[7], NULL, 10) : UINT64_C(1) << 30;
    struct ra_settings settings = {.library = "librados.so.2",
                                   .conf = arguments[1],
                                   .user = "admin",
                                   .pool = arguments[2],
                                   .space = "bench",
                                   .timeout_s = 10,
                                   .operation_timeout_s = 60};
    char problem[500];
    struct ra_client *client;
    struct ra_data *data;
    int result = ra_client_open(&settings, &client, problem, sizeof problem);
    if (result < 0)
        die(problem, result);
    result = ra_data_create(client, "bench/a", &data);
    bool made = result == 0;
    if (!made && (result = ra_data_open(client, "bench/a", true, NULL, &data)) < 0)
        die("opening", result);
    struct ae_object object;
    ra_data_share(data, &object);
    if (made) {
        char *content = malloc(4 << 20);
        if (content == NULL)
            return 1;
        memset(content, 'x', 4 << 20);
        for (uint64_t at = 0; at < size && result == 0; at += 4 << 20)
            result = object.ops->pwrite(object.ctx, content, 4 << 20, at);
        free(content);
        if (result < 0 && result != -EEXIST)
            die("filling", result);
    }
    atomic_bool stop = false;
    struct worker *workers = calloc(threads, sizeof *workers);
    if (workers == NULL)
        return 1;
    struct timespec begun, ended, pause = {.tv_sec = seconds};
    clock_gettime(CLOCK_MONOTONIC, &begun);
    bool sequential = strncmp(how, "seq", 3) == 0;
    for (unsigned i = 0; i < threads; i++) {
        workers[i] = (struct worker){.object = &object,
                                     .writes = strstr(how, "write") != NULL,
                                     .block = block,
                                     .blocks = size / block,
                                     .seed = sequential ? i : (i + 1) * UINT64_C(0x9e3779b97f4a7c15),
                                     .step = sequential ? threads : 0,
                                     .stop = &stop};
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0)
            return 1;
    }
    nanosleep(&pause, NULL);
    atomic_store(&stop, true);
    uint64_t done = 0;
    for (unsigned i = 0; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        if (workers[i].result < 0)
            die("a request", workers[i].result);
        done += workers[i].done;
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    double took = (double)(ended.tv_sec - begun.tv_sec) + (double)(ended.tv_nsec - begun.tv_nsec) / 1e9;
    printf("ours %-8s %7zu bytes %2u threads %8.0f iops %8.1f MB/s\n", how, block, threads, (double)done / took,
           (double)done * (double)block / took / 1e6);
    free(workers);
    object.ops->close(object.ctx);
    ra_data_close(data);
    ra_client_close(client);
    return 0;
}
