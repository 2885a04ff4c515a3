/*
 * What the engine adds to a read and a write of 4 KiB: random ones on a file in the page cache, raw and through it; and
 * reads of a sealed layer whose chunks of 32 KiB lie in a pack in no order, when the table has them, in place and
 * through the pack cache, when that has all of it.
 *
 *     bench [DIRECTORY [THREADS]]
 */
#include "check.h"
#include "engine.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTOR ((uint64_t)AE_SECTOR_BYTES)
#define FILE_BYTES (UINT64_C(256) << 20)
#define OPS 400000
#define THREADS_MAX 64

#define CHUNK_SECTORS 8u

enum kind { RAW_READ, ENGINE_READ, SEALED_READ, CACHED_READ, RAW_WRITE, ENGINE_WRITE, KINDS };

static const char *const names[KINDS] = {"raw pread",   "engine read", "sealed read",
                                         "cached read", "raw pwrite",  "engine write"};

struct job {
    enum kind kind;
    int fd;
    struct ae_volume *volume;
    struct ae_volume *sealed;
    struct ae_volume *cached;
    uint64_t seed;
};

static void *job_run(void *argument) {
    struct job *job = argument;
    uint64_t random = random_seed(job->seed);
    char bytes[AE_SECTOR_BYTES] = {1};
    for (unsigned i = 0; i < OPS; i++) {
        uint64_t offset = random_below(&random, FILE_BYTES / SECTOR) * SECTOR;
        ssize_t done = job->kind == RAW_READ      ? pread(job->fd, bytes, SECTOR, (off_t)offset)
                       : job->kind == ENGINE_READ ? ae_read(job->volume, bytes, SECTOR, offset)
                       : job->kind == SEALED_READ ? ae_read(job->sealed, bytes, SECTOR, offset)
                       : job->kind == CACHED_READ ? ae_read(job->cached, bytes, SECTOR, offset)
                       : job->kind == RAW_WRITE   ? pwrite(job->fd, bytes, SECTOR, (off_t)offset)
                                                  : ae_write(job->volume, bytes, SECTOR, offset);
        CHECK_EQUAL(done, SECTOR);
    }
    return NULL;
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* The chunks of the file, each elsewhere than where the volume shows it. */
static int resolve(void *ctx, uint64_t region, struct ae_region **made) {
    struct ae_pack *pack = ctx;
    struct ae_extent extents[AE_REGION_SECTORS / CHUNK_SECTORS];
    uint64_t chunks = FILE_BYTES / SECTOR / CHUNK_SECTORS;
    for (unsigned i = 0; i < AE_REGION_SECTORS / CHUNK_SECTORS; i++) {
        uint64_t chunk = region * (AE_REGION_SECTORS / CHUNK_SECTORS) + i;
        extents[i] = (struct ae_extent){.first = (uint16_t)(i * CHUNK_SECTORS),
                                        .count = CHUNK_SECTORS,
                                        .offset = chunk * 4999 % chunks * CHUNK_SECTORS * SECTOR};
    }
    return ae_region_make(region, region + 1, extents, AE_REGION_SECTORS / CHUNK_SECTORS, &pack, 1, made);
}

static void resolver_close(void *ctx) { ae_pack_release(ctx); }

/* Through a cache, if there is one. */
static struct ae_volume *sealed_open(int fd, struct ae_cache *cache, const char *path) {
    struct ae_object object;
    struct ae_resolver resolver = {.resolve = resolve, .close = resolver_close};
    struct ae_pack *pack;
    CHECK_EQUAL(ae_object_file(fd, &object), 0);
    if (cache != NULL)
        CHECK_EQUAL(ae_object_cached(cache, path, (const uint8_t[32]){1}, object, FILE_BYTES, &object), 0);
    CHECK_EQUAL(ae_pack_open(object, FILE_BYTES, &pack), 0);
    resolver.ctx = pack;
    struct ae_table *table;
    struct ae_layer *layer;
    struct ae_volume *volume;
    CHECK_EQUAL(ae_table_open(8 << 20, &table), 0);
    CHECK_EQUAL(ae_layer_open_sealed((const uint8_t[16]){cache != NULL}, table, resolver, &layer), 0);
    CHECK_EQUAL(ae_volume_open(&layer, 1, FILE_BYTES, false, &volume), 0);
    ae_layer_release(layer);
    ae_table_release(table);
    return volume;
}

static double measure(enum kind kind, int fd, struct ae_volume *volume, struct ae_volume *sealed,
                      struct ae_volume *cached, unsigned threads) {
    pthread_t thread[THREADS_MAX];
    struct job job[THREADS_MAX];
    double start = seconds_now();
    for (unsigned i = 0; i < threads; i++) {
        job[i] = (struct job){.kind = kind, .fd = fd, .volume = volume, .sealed = sealed, .cached = cached, .seed = i};
        CHECK(pthread_create(&thread[i], NULL, job_run, &job[i]) == 0);
    }
    for (unsigned i = 0; i < threads; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    return seconds_now() - start;
}

static int scratch_file(const char *directory) {
    int fd = open(directory, O_TMPFILE | O_RDWR, 0600);
    CHECK(fd >= 0);
    return fd;
}

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : "/dev/shm";
    unsigned threads = argc > 2 ? (unsigned)atoi(argv[2]) : 2;
    CHECK(threads > 0 && threads <= THREADS_MAX);

    int fd = scratch_file(directory), bitmap_fd = scratch_file(directory);
    char live_path[64];
    snprintf(live_path, sizeof live_path, "/dev/shm/engine-bench-%d", getpid());
    struct ae_layer_spec spec = {.head = true, .live_path = live_path};
    CHECK_EQUAL(ae_object_file(fd, &spec.data), 0);
    CHECK_EQUAL(ae_object_file(bitmap_fd, &spec.bitmap), 0);
    CHECK_EQUAL(ae_bitmap_format(spec.bitmap, spec.id), 0);
    struct ae_layer *layer;
    CHECK_EQUAL(ae_layer_open(&spec, &layer), 0);
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(&layer, 1, FILE_BYTES, true, &volume), 0);
    char *bytes = malloc(1 << 20);
    CHECK(bytes != NULL);
    memset(bytes, 'a', 1 << 20);
    for (uint64_t offset = 0; offset < FILE_BYTES; offset += 1 << 20)
        CHECK_EQUAL(ae_write(volume, bytes, 1 << 20, offset), 1 << 20);

    struct ae_volume *sealed = sealed_open(fd, NULL, NULL);
    struct ae_cache *cache;
    char cache_path[256];
    snprintf(cache_path, sizeof cache_path, "%s/engine-bench-cache-%d", directory, getpid());
    CHECK_EQUAL(ae_cache_open(UINT64_MAX, 0, &cache), 0);
    struct ae_volume *cached = sealed_open(fd, cache, cache_path);
    for (uint64_t offset = 0; offset < FILE_BYTES; offset += 1 << 20)
        CHECK_EQUAL(ae_read(cached, bytes, 1 << 20, offset), 1 << 20);
    for (unsigned count = 1; count <= threads; count *= 2) {
        double raw_us = 0;
        for (enum kind kind = 0; kind < KINDS; kind++) {
            double best = measure(kind, fd, volume, sealed, cached, count);
            for (int again = 0; again < 2; again++) {
                double seconds = measure(kind, fd, volume, sealed, cached, count);
                best = seconds < best ? seconds : best;
            }
            double us = best * 1e6 / OPS;
            printf("%-13s %2u threads %9.0f ops/s %6.3f us", names[kind], count, OPS * count / best, us);
            if (kind == RAW_READ || kind == RAW_WRITE)
                raw_us = us;
            else
                printf("  (%+.3f us)", us - raw_us);
            printf("\n");
        }
    }
    CHECK_EQUAL(ae_flush(volume), 0);
    ae_volume_close(sealed, false);
    ae_volume_close(cached, false);
    ae_cache_limit(cache, 0);
    ae_cache_close(cache);
    ae_volume_close(volume, true);
    ae_layer_release(layer);
    free(bytes);
    close(fd);
    close(bitmap_fd);
    return 0;
}
