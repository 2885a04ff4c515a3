/*
 * The pack cache: packs that lie far away, read through local files by several threads, which are evicted, deleted,
 * damaged and left behind meanwhile.
 */
#include "buffers.h"
#include "check.h"
#include "world.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK ((uint64_t)65536)
#define MIB (UINT64_C(1) << 20)
#define BLOCKS_MAX 128
#define PACKS 8
#ifndef CACHE_ROUNDS
#define CACHE_ROUNDS 400
#define MEASURES_MEMORY /* sanitizers keep what was freed */
#endif

_Static_assert(PACKS < 256, "a pack's number fits its name");

static void pause_us(long us) { nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL); }

/* Far away */

struct far {
    uint8_t number;
    uint64_t size;   /* as it should be */
    uint64_t length; /* as it is */
    atomic_long delay_us;
    atomic_int fail_with;
    atomic_uint reads, closed;
    atomic_uint under_way, most_under_way;
    atomic_uint fetched[BLOCKS_MAX];
};

static uint8_t byte_at(const struct far *far, uint64_t offset) {
    uint64_t word = (offset / 8 + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ (uint64_t)far->number << 56;
    return (uint8_t)(word >> offset % 8 * 8);
}

static void fill(const struct far *far, char *to, size_t length, uint64_t offset) {
    for (size_t i = 0; i < length; i++)
        to[i] = offset + i < far->length ? (char)byte_at(far, offset + i) : 0;
}

static int far_pread(void *ctx, void *buffer, size_t length, uint64_t offset) {
    struct far *far = ctx;
    unsigned under_way = atomic_fetch_add(&far->under_way, 1) + 1;
    unsigned most = atomic_load(&far->most_under_way);
    while (most < under_way && !atomic_compare_exchange_weak(&far->most_under_way, &most, under_way))
        ;
    if (atomic_load(&far->delay_us) > 0)
        pause_us(atomic_load(&far->delay_us));
    atomic_fetch_add(&far->reads, 1);
    int result = atomic_load(&far->fail_with);
    for (uint64_t block = offset / BLOCK; result == 0 && block * BLOCK < offset + length; block++)
        atomic_fetch_add(&far->fetched[block], 1);
    if (result == 0)
        fill(far, buffer, length, offset);
    atomic_fetch_sub(&far->under_way, 1);
    return result;
}

static int far_size(void *ctx, uint64_t *size) {
    *size = ((struct far *)ctx)->length;
    return 0;
}

static void far_close(void *ctx) { atomic_fetch_add(&((struct far *)ctx)->closed, 1); }

static const struct ae_object_ops far_ops = {.pread = far_pread, .size = far_size, .close = far_close};

/* A cache in a directory of its own, and packs */

struct rig {
    char directory[128];
    struct ae_cache *cache;
    struct far packs[PACKS];
};

static void rig_init(struct rig *rig, uint64_t bytes_max, uint64_t pack_bytes) {
    memset(rig, 0, sizeof *rig);
    directory_make(rig->directory);
    for (unsigned i = 0; i < PACKS; i++) {
        rig->packs[i].number = (uint8_t)i;
        rig->packs[i].size = rig->packs[i].length = pack_bytes;
        CHECK(pack_bytes <= BLOCKS_MAX * BLOCK);
    }
    CHECK_EQUAL(ae_cache_open(bytes_max, 0, &rig->cache), 0);
}

static void rig_end(struct rig *rig) {
    ae_cache_close(rig->cache);
    directory_remove(rig->directory);
}

static void path_of(const struct rig *rig, unsigned pack, char path[160]) {
    snprintf(path, 160, "%s/pack-%u", rig->directory, pack);
}

static struct ae_object open_pack(struct rig *rig, unsigned pack) {
    char path[160];
    path_of(rig, pack, path);
    struct ae_object source = {.ops = &far_ops, .ctx = &rig->packs[pack], .waits = true};
    struct ae_object object;
    uint8_t id[32] = {(uint8_t)(pack + 1)};
    CHECK_EQUAL(ae_object_cached(rig->cache, path, id, source, rig->packs[pack].size, &object), 0);
    CHECK(object.waits);
    return object;
}

static void close_object(struct ae_object object) { object.ops->close(object.ctx); }

/* Another process: all is closed, and the files are found again. */
static void rig_restart(struct rig *rig, uint64_t bytes_max) {
    ae_cache_close(rig->cache);
    CHECK_EQUAL(ae_cache_open(bytes_max, 0, &rig->cache), 0);
    for (unsigned i = 0; i < PACKS; i++) {
        char path[160];
        struct stat status;
        path_of(rig, i, path);
        if (stat(path, &status) == 0)
            CHECK_EQUAL(ae_cache_adopt(rig->cache, path, (uint64_t)status.st_blocks * 512), 0);
    }
}

/* What is fetched stays in memory from now on, as far as it may. */
static void let_stay(struct rig *rig) {
    ae_cache_close(rig->cache);
    CHECK_EQUAL(ae_cache_open(UINT64_MAX, UINT64_C(3600) * 1000000000, &rig->cache), 0);
}

static void check_bytes(const struct far *far, const char *bytes, size_t length, uint64_t offset) {
    for (size_t i = 0; i < length; i++)
        if ((uint8_t)bytes[i] != byte_at(far, offset + i)) {
            fprintf(stderr, "pack %u, offset %llu: wrong\n", far->number, (unsigned long long)(offset + i));
            CHECK(false);
        }
}

static void check_read(struct rig *rig, unsigned pack, struct ae_object object, uint64_t offset, size_t length) {
    char *bytes = malloc(length);
    CHECK(bytes != NULL);
    memset(bytes, 0x5a, length);
    CHECK_EQUAL(object.ops->pread_within(object.ctx, bytes, length, offset), 0);
    check_bytes(&rig->packs[pack], bytes, length, offset);
    free(bytes);
}

static struct ae_cache_statistics statistics_of(struct rig *rig) {
    struct ae_cache_statistics statistics;
    ae_cache_statistics(rig->cache, &statistics);
    return statistics;
}

/* Until no more than that is still to be written to the files, or was found not to go there. */
static void await_landed(struct rig *rig, uint64_t bytes_max) {
    for (int i = 0; statistics_of(rig).landed_bytes > bytes_max; i++) {
        CHECK(i < 10000);
        pause_us(1000);
    }
}

static void await_kept(struct rig *rig) { await_landed(rig, 0); }

static void check_kept(struct rig *rig, unsigned pack, struct ae_object object, uint64_t offset, size_t length) {
    check_read(rig, pack, object, offset, length);
    await_kept(rig);
}

static void change_file(struct rig *rig, unsigned pack, const void *bytes, size_t length, uint64_t offset) {
    char path[160];
    path_of(rig, pack, path);
    int fd = open(path, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, bytes, length, (off_t)offset) == (ssize_t)length);
    close(fd);
}

/* Tests */

static void test_each_block_is_fetched_once(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 20 * BLOCK + 5000);
    struct ae_object object = open_pack(&rig, 0);
    uint64_t random = random_seed(1);
    for (int i = 0; i < 300; i++) {
        uint64_t offset = random_below(&random, rig.packs[0].size);
        size_t length = (size_t)random_below(&random, i % 2 ? 5000 : 5 * BLOCK) + 1;
        if (length > rig.packs[0].size - offset)
            length = rig.packs[0].size - offset;
        check_read(&rig, 0, object, offset, length);
    }
    check_kept(&rig, 0, object, 0, rig.packs[0].size);
    for (int block = 0; block < 21; block++)
        CHECK_EQUAL(rig.packs[0].fetched[block], 1);
    struct ae_cache_statistics statistics = statistics_of(&rig);
    CHECK_EQUAL(statistics.fetched_bytes, rig.packs[0].size);
    CHECK(statistics.files == 1 && statistics.bytes == 21 * BLOCK + 4096 && statistics.failures == 0);
    CHECK(statistics.hits > 200 && statistics.ahead_bytes == 0);
    close_object(object);
    CHECK_EQUAL(rig.packs[0].closed, 1);
    rig_end(&rig);
}

static void test_a_run_of_blocks_is_one_read(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 64 * BLOCK);
    struct ae_object object = open_pack(&rig, 0);
    check_kept(&rig, 0, object, 4 * BLOCK + 1, 10);
    check_kept(&rig, 0, object, 0, 16 * BLOCK);
    CHECK_EQUAL(rig.packs[0].reads, 3); /* what was there parts it */
    check_kept(&rig, 0, object, 32 * BLOCK, 32 * BLOCK);
    CHECK_EQUAL(rig.packs[0].reads, 5); /* 1 MiB each */
    close_object(object);
    rig_end(&rig);
}

static void test_the_ends(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, BLOCK + 100);
    struct ae_object object = open_pack(&rig, 0);
    char bytes[300];
    CHECK_EQUAL(object.ops->pread_within(object.ctx, bytes, 101, BLOCK), -EIO);
    CHECK_EQUAL(object.ops->pread_within(object.ctx, bytes, 1, UINT64_MAX), -EIO);
    CHECK_EQUAL(object.ops->pread_within(object.ctx, bytes, 0, BLOCK + 100), 0);
    CHECK_EQUAL(object.ops->pread_nowait(object.ctx, bytes, 101, BLOCK), -EAGAIN);
    CHECK_EQUAL(rig.packs[0].reads, 0);
    memset(bytes, 0x5a, sizeof bytes);
    CHECK_EQUAL(object.ops->pread(object.ctx, bytes, 300, BLOCK), 0);
    check_bytes(&rig.packs[0], bytes, 100, BLOCK);
    for (int i = 100; i < 300; i++)
        CHECK_EQUAL(bytes[i], 0);
    CHECK_EQUAL(object.ops->pread(object.ctx, bytes, 300, 2 * BLOCK), 0);
    CHECK_EQUAL(bytes[0], 0);

    uint64_t found;
    CHECK(object.ops->size(object.ctx, &found) == 0 && found == BLOCK + 100);
    CHECK(object.ops->next_data(object.ctx, 5, &found) == 0 && found == 5);
    CHECK(object.ops->next_hole(object.ctx, 5, &found) == 0 && found == BLOCK + 100);
    CHECK_EQUAL(object.ops->next_data(object.ctx, BLOCK + 100, &found), -ENXIO);
    CHECK_EQUAL(object.ops->pwrite(object.ctx, bytes, 1, 0), -EROFS);
    CHECK_EQUAL(object.ops->punch(object.ctx, 0, 1), -EROFS);
    CHECK_EQUAL(object.ops->truncate(object.ctx, 1), -EROFS);

    uint8_t id[32] = {1};
    char path[160];
    path_of(&rig, 0, path);
    struct ae_object source = {.ops = &far_ops, .ctx = &rig.packs[0]}, other;
    CHECK_EQUAL(ae_object_cached(rig.cache, path, id, source, 0, &other), -EINVAL);
    CHECK_EQUAL(ae_object_cached(rig.cache, path, id, source, UINT64_C(1) << 31, &other), -EINVAL);
    CHECK_EQUAL(ae_object_cached(rig.cache, path, id, source, BLOCK, &other), -EINVAL); /* open as another */
    CHECK_EQUAL(rig.packs[0].closed, 3);
    close_object(object);
    rig_end(&rig);
}

static void test_what_is_there_is_read_without_waiting(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 4 * BLOCK);
    struct ae_object object = open_pack(&rig, 0);
    char bytes[5000];
    CHECK_EQUAL(object.ops->pread_nowait(object.ctx, bytes, sizeof bytes, BLOCK - 2500), -EAGAIN);
    check_kept(&rig, 0, object, BLOCK - 1, 1);
    CHECK_EQUAL(object.ops->pread_nowait(object.ctx, bytes, sizeof bytes, BLOCK - 2500), -EAGAIN);
    check_kept(&rig, 0, object, BLOCK, 1);
    /* A file system that cannot tell what is in memory always has it wait. */
    if (object.ops->pread_nowait(object.ctx, bytes, sizeof bytes, BLOCK - 2500) == 0)
        check_bytes(&rig.packs[0], bytes, sizeof bytes, BLOCK - 2500);
    close_object(object);
    rig_restart(&rig, UINT64_MAX);
    object = open_pack(&rig, 0);
    check_kept(&rig, 0, object, 0, 1);
    CHECK_EQUAL(object.ops->pread_nowait(object.ctx, bytes, sizeof bytes, BLOCK - 2500), -EAGAIN); /* not looked at */
    CHECK_EQUAL(rig.packs[0].reads, 2);
    close_object(object);
    rig_end(&rig);
}

struct reader {
    struct rig *rig;
    struct ae_object object;
    int result;
    pthread_t thread;
};

static void *read_block_three(void *argument) {
    struct reader *reader = argument;
    char bytes[100];
    reader->result = reader->object.ops->pread_within(reader->object.ctx, bytes, sizeof bytes, 3 * BLOCK + 50);
    if (reader->result == 0)
        check_bytes(&reader->rig->packs[0], bytes, sizeof bytes, 3 * BLOCK + 50);
    return NULL;
}

/* Through two objects; returns what each of them got. */
static int read_together(struct rig *rig) {
    enum { READERS = 8 };
    struct reader readers[READERS];
    struct ae_object objects[2] = {open_pack(rig, 0), open_pack(rig, 0)};
    for (int i = 0; i < READERS; i++) {
        readers[i] = (struct reader){.rig = rig, .object = objects[i % 2]};
        CHECK(pthread_create(&readers[i].thread, NULL, read_block_three, &readers[i]) == 0);
    }
    for (int i = 0; i < READERS; i++)
        CHECK(pthread_join(readers[i].thread, NULL) == 0);
    for (int i = 0; i < READERS; i++)
        CHECK_EQUAL(readers[i].result, readers[0].result);
    close_object(objects[0]);
    close_object(objects[1]);
    return readers[0].result;
}

static void test_all_who_need_a_block_wait_for_one_fetch(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 8 * BLOCK);
    rig.packs[0].delay_us = 100000;
    rig.packs[0].fail_with = -ETIMEDOUT;
    CHECK_EQUAL(read_together(&rig), -ETIMEDOUT); /* one time limit for all, not one after the other */
    CHECK(rig.packs[0].most_under_way == 1);
    unsigned reads = rig.packs[0].reads;
    rig.packs[0].fail_with = 0;
    CHECK_EQUAL(read_together(&rig), 0);
    CHECK_EQUAL(rig.packs[0].reads, reads + 1);
    await_kept(&rig); /* what has landed has its pack open */
    CHECK_EQUAL(rig.packs[0].closed, 4);
    CHECK_EQUAL(statistics_of(&rig).fetches, 1);
    rig_end(&rig);
}

/* There is no directory. */
static void test_without_a_disk_they_do_so_too(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 8 * BLOCK);
    CHECK(rmdir(rig.directory) == 0);
    rig.packs[0].delay_us = 100000;
    CHECK_EQUAL(read_together(&rig), 0);
    CHECK(rig.packs[0].most_under_way == 1 && rig.packs[0].reads < 8);
    CHECK(statistics_of(&rig).failures > 0 && statistics_of(&rig).files == 0);
    CHECK(mkdir(rig.directory, 0700) == 0);
    rig_end(&rig);
}

static void test_a_source_that_became_shorter_is_an_error(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 4 * BLOCK);
    rig.packs[0].length = 2 * BLOCK + 1;
    struct ae_object object = open_pack(&rig, 0);
    char byte;
    for (int attempt = 0; attempt < 2; attempt++)
        CHECK_EQUAL(object.ops->pread_within(object.ctx, &byte, 1, 2 * BLOCK), -EIO);
    check_read(&rig, 0, object, 0, 2 * BLOCK);
    rig.packs[0].length = 4 * BLOCK;
    check_read(&rig, 0, object, 0, 4 * BLOCK);
    close_object(object);
    rig_end(&rig);
}

static void test_the_next_process_finds_it(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 10 * BLOCK + 77);
    struct ae_object object = open_pack(&rig, 0);
    check_read(&rig, 0, object, 3 * BLOCK, 7 * BLOCK + 77);
    close_object(object);
    rig_restart(&rig, UINT64_MAX);
    CHECK(statistics_of(&rig).files == 1 && statistics_of(&rig).bytes >= 7 * BLOCK);
    rig.packs[0].fail_with = -EIO;
    object = open_pack(&rig, 0);
    check_read(&rig, 0, object, 3 * BLOCK, 7 * BLOCK + 77);
    close_object(object);
    rig_end(&rig);
}

static void test_blocks_that_are_not_right_are_fetched_anew(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 10 * BLOCK + 77);
    struct ae_object object = open_pack(&rig, 0);
    check_kept(&rig, 0, object, 0, rig.packs[0].size);
    close_object(object);
    uint8_t flipped = byte_at(&rig.packs[0], 2 * BLOCK + 9) ^ 1;
    change_file(&rig, 0, &flipped, 1, 2 * BLOCK + 9);
    flipped = byte_at(&rig.packs[0], rig.packs[0].size - 1) ^ 0x80;
    change_file(&rig, 0, &flipped, 1, rig.packs[0].size - 1);
    static const char zeros[BLOCK]; /* as after a power cut: what the table says never came to the disk */
    change_file(&rig, 0, zeros, sizeof zeros, 5 * BLOCK);
    rig_restart(&rig, UINT64_MAX);
    object = open_pack(&rig, 0);
    for (uint64_t offset = 0; offset < rig.packs[0].size; offset += 1000)
        check_kept(&rig, 0, object, offset, rig.packs[0].size - offset < 1000 ? rig.packs[0].size - offset : 1000);
    for (int block = 0; block <= 10; block++)
        CHECK_EQUAL(rig.packs[0].fetched[block], block == 2 || block == 5 || block == 10 ? 2 : 1);
    close_object(object);
    rig_restart(&rig, UINT64_MAX);
    object = open_pack(&rig, 0);
    check_kept(&rig, 0, object, 0, rig.packs[0].size);
    CHECK_EQUAL(rig.packs[0].fetched[5], 2);
    close_object(object);
    rig_end(&rig);
}

static void test_what_has_landed_is_read_from_memory_and_is_there_at_the_end(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 20 * BLOCK + 77);
    let_stay(&rig);
    struct ae_object object = open_pack(&rig, 0);
    char bytes[BLOCK];
    check_read(&rig, 0, object, 3 * BLOCK, 17 * BLOCK + 77);
    /* One of 17 blocks, and one of a bit, which takes a block. */
    CHECK_EQUAL(statistics_of(&rig).landed_bytes, 18 * BLOCK);
    for (uint64_t offset = 3 * BLOCK; offset < 18 * BLOCK; offset += 1111) {
        CHECK_EQUAL(object.ops->pread_nowait(object.ctx, bytes, 1000, offset), 0);
        check_bytes(&rig.packs[0], bytes, 1000, offset);
    }
    /* One that has not come, and one that lies in two flights. */
    CHECK_EQUAL(object.ops->pread_nowait(object.ctx, bytes, 1000, 3 * BLOCK - 1), -EAGAIN);
    CHECK_EQUAL(object.ops->pread_nowait(object.ctx, bytes, 177, 20 * BLOCK - 100), -EAGAIN);
    check_read(&rig, 0, object, 20 * BLOCK - 100, 177);
    CHECK_EQUAL(rig.packs[0].reads, 2);
    close_object(object);
    rig_restart(&rig, UINT64_MAX);
    rig.packs[0].fail_with = -EIO;
    object = open_pack(&rig, 0);
    check_read(&rig, 0, object, 3 * BLOCK, 17 * BLOCK + 77);
    close_object(object);
    rig_end(&rig);
}

static void test_no_more_stays_in_memory_than_may(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, BLOCKS_MAX * BLOCK);
    let_stay(&rig);
    struct ae_object objects[PACKS];
    for (unsigned i = 0; i < PACKS; i++) {
        objects[i] = open_pack(&rig, i);
        for (uint64_t offset = 0; offset < rig.packs[i].size; offset += MIB) {
            check_read(&rig, i, objects[i], offset, MIB);
            CHECK(statistics_of(&rig).landed_bytes <= 32 * MIB);
        }
    }
    await_landed(&rig, 16 * MIB);
    CHECK_EQUAL(statistics_of(&rig).fetched_bytes, PACKS * BLOCKS_MAX * BLOCK);
    for (unsigned i = 0; i < PACKS; i++)
        close_object(objects[i]);
    rig_end(&rig);
    for (unsigned i = 0; i < PACKS; i++)
        CHECK_EQUAL(rig.packs[i].closed, 1);
}

static void give(struct ae_buffers *buffers, size_t count, size_t bytes) {
    char *taken[AE_SPARES_MAX];
    for (size_t i = 0; i < count; i++)
        CHECK((taken[i] = ae_buffer_take(buffers, bytes)) != NULL);
    for (size_t i = 0; i < count; i++)
        ae_buffer_give(buffers, taken[i], bytes);
}

static void test_a_buffer_is_used_again_for_another_length(void) {
    struct ae_buffers buffers;
    CHECK_EQUAL(ae_buffers_init(&buffers), 0);
    char *first = ae_buffer_take(&buffers, AE_BUFFER_BYTES_MAX - 20000);
    CHECK(first != NULL);
    memset(first, 1, ae_buffer_room(AE_BUFFER_BYTES_MAX - 20000));
    ae_buffer_give(&buffers, first, AE_BUFFER_BYTES_MAX - 20000);
    CHECK_EQUAL(buffers.bytes, AE_BUFFER_BYTES_MAX);
    char *small = ae_buffer_take(&buffers, 1);
    CHECK(small != first);
    CHECK(ae_buffer_take(&buffers, AE_BUFFER_BYTES_MAX) == first);
    ae_buffer_give(&buffers, first, AE_BUFFER_BYTES_MAX);
    ae_buffer_give(&buffers, small, 1);
    CHECK_EQUAL(buffers.bytes, AE_BUFFER_BYTES_MAX + BLOCK);
    ae_buffers_trim(&buffers);
    CHECK_EQUAL(buffers.bytes, 0);
    CHECK_EQUAL(buffers.count, 0);
    ae_buffers_destroy(&buffers);
}

static void test_spares_that_nobody_asks_for_go(void) {
    struct ae_buffers buffers;
    CHECK_EQUAL(ae_buffers_init(&buffers), 0);
    give(&buffers, AE_SPARES_MAX, BLOCK);
    CHECK_EQUAL(buffers.count, AE_SPARES_MAX);
    size_t most = AE_SPARE_BYTES_MAX / AE_BUFFER_BYTES_MAX;
    give(&buffers, most + 3, AE_BUFFER_BYTES_MAX);
    CHECK_EQUAL(buffers.count, most);
    CHECK(buffers.bytes <= AE_SPARE_BYTES_MAX);
    for (size_t i = 0; i < buffers.count; i++)
        CHECK_EQUAL(buffers.spares[i].bytes, AE_BUFFER_BYTES_MAX);
    ae_buffers_destroy(&buffers);
}

static void test_a_file_that_is_no_packs_is_made_anew(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 4 * BLOCK);
    uint64_t cuts[] = {0, 4 * BLOCK, 4 * BLOCK + 63, 4 * BLOCK + 64 + 31};
    struct ae_object object = open_pack(&rig, 0);
    check_kept(&rig, 0, object, 0, 4 * BLOCK);
    close_object(object);
    char path[160];
    path_of(&rig, 0, path);
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        CHECK(truncate(path, (off_t)cuts[i]) == 0);
        rig_restart(&rig, UINT64_MAX);
        object = open_pack(&rig, 0);
        check_kept(&rig, 0, object, 0, 4 * BLOCK);
        CHECK_EQUAL(rig.packs[0].fetched[0], i + 2);
        close_object(object);
    }
    for (uint64_t byte = 0; byte < 64; byte += 7) {
        change_file(&rig, 0, "\x99", 1, 4 * BLOCK + byte);
        rig_restart(&rig, UINT64_MAX);
        object = open_pack(&rig, 0);
        check_kept(&rig, 0, object, 0, 4 * BLOCK);
        close_object(object);
    }
    CHECK_EQUAL(rig.packs[0].fetched[0], 5 + 10);
    /* One of another pack, and none at all */
    char other[160];
    path_of(&rig, 1, other);
    CHECK(rename(path, other) == 0);
    rig_restart(&rig, UINT64_MAX);
    object = open_pack(&rig, 1);
    check_kept(&rig, 1, object, 0, 4 * BLOCK);
    close_object(object);
    CHECK(unlink(other) == 0 && symlink("/etc/passwd", other) == 0);
    rig_restart(&rig, UINT64_MAX);
    object = open_pack(&rig, 1);
    check_kept(&rig, 1, object, 0, 4 * BLOCK);
    CHECK_EQUAL(rig.packs[1].fetched[0], 2);
    close_object(object);
    rig_end(&rig);
}

static void test_a_file_that_is_cut_under_us_is_no_loss(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 4 * BLOCK);
    struct ae_object object = open_pack(&rig, 0);
    check_kept(&rig, 0, object, 0, 4 * BLOCK);
    char path[160], byte;
    path_of(&rig, 0, path);
    CHECK(truncate(path, BLOCK) == 0);
    CHECK_EQUAL(object.ops->pread_nowait(object.ctx, &byte, 1, 3 * BLOCK), -EAGAIN);
    check_kept(&rig, 0, object, 0, 4 * BLOCK);
    close_object(object);
    rig_end(&rig);
}

static void test_a_disk_that_is_full_costs_speed(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 4 * BLOCK);
    struct ae_object object = open_pack(&rig, 0);
    check_kept(&rig, 0, object, 0, 1);
    CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    struct rlimit before, none;
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    none = (struct rlimit){.rlim_cur = BLOCK, .rlim_max = before.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
    for (int i = 0; i < 3; i++)
        check_kept(&rig, 0, object, 0, 4 * BLOCK);
    struct ae_object fresh = open_pack(&rig, 1);
    check_kept(&rig, 1, fresh, 0, 4 * BLOCK);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK_EQUAL(rig.packs[0].fetched[0], 1);
    CHECK_EQUAL(rig.packs[0].fetched[1], 3);
    CHECK(statistics_of(&rig).failures > 0);
    close_object(fresh);
    close_object(object);
    rig_end(&rig);
}

static uint64_t files_in(const char *path, uint64_t *blocks) {
    uint64_t count = 0;
    DIR *directory = opendir(path);
    CHECK(directory != NULL);
    struct dirent *entry;
    *blocks = 0;
    while ((entry = readdir(directory)) != NULL) {
        struct stat status;
        if (entry->d_name[0] == '.')
            continue;
        CHECK(fstatat(dirfd(directory), entry->d_name, &status, 0) == 0);
        *blocks += (uint64_t)status.st_blocks * 512;
        count++;
    }
    closedir(directory);
    return count;
}

static void test_what_is_too_much_goes_that_was_not_used_for_longest(void) {
    struct rig rig;
    rig_init(&rig, 4 * (16 * BLOCK + 4096), 16 * BLOCK);
    struct ae_object objects[PACKS];
    for (unsigned i = 0; i < PACKS; i++)
        objects[i] = open_pack(&rig, i);
    for (unsigned i = 0; i < 4; i++)
        check_kept(&rig, i, objects[i], 0, 16 * BLOCK);
    CHECK_EQUAL(statistics_of(&rig).evictions, 0);
    check_kept(&rig, 4, objects[4], 0, 16 * BLOCK); /* the hand takes all marks, and one file */
    CHECK(statistics_of(&rig).evictions >= 1);
    for (unsigned i = 5; i < PACKS; i++) {
        check_kept(&rig, 4, objects[4], 7, 100);
        check_kept(&rig, i, objects[i], 0, 16 * BLOCK);
    }
    CHECK_EQUAL(rig.packs[4].fetched[0], 1);
    uint64_t bytes, files = files_in(rig.directory, &bytes);
    struct ae_cache_statistics statistics = statistics_of(&rig);
    CHECK_EQUAL(statistics.files, files);
    CHECK(statistics.bytes <= 4 * (16 * BLOCK + 4096) && bytes <= statistics.bytes);
    for (unsigned i = 0; i < PACKS; i++)
        check_kept(&rig, i, objects[i], 0, 16 * BLOCK);
    ae_cache_limit(rig.cache, 0);
    statistics = statistics_of(&rig);
    CHECK(statistics.files == 0 && statistics.bytes == 0 && files_in(rig.directory, &bytes) == 0);
    for (unsigned i = 0; i < PACKS; i++) {
        check_kept(&rig, i, objects[i], 5, BLOCK);
        close_object(objects[i]);
    }
    rig_end(&rig);
}

static void test_files_that_nobody_has_open_count_and_go(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 16 * BLOCK);
    for (unsigned i = 0; i < PACKS; i++) {
        struct ae_object object = open_pack(&rig, i);
        check_kept(&rig, i, object, 0, 16 * BLOCK);
        close_object(object);
    }
    rig_restart(&rig, 3 * (16 * BLOCK + 4096));
    uint64_t bytes;
    CHECK(statistics_of(&rig).files <= 3 && files_in(rig.directory, &bytes) == statistics_of(&rig).files);
    struct ae_object object = open_pack(&rig, PACKS - 1); /* found last: used last */
    check_kept(&rig, PACKS - 1, object, 0, 16 * BLOCK);
    CHECK_EQUAL(rig.packs[PACKS - 1].fetched[0], 1);
    close_object(object);
    rig_end(&rig);
}

static void test_a_directory_that_is_deleted_is_no_loss(void) {
    struct rig rig;
    rig_init(&rig, UINT64_MAX, 8 * BLOCK);
    struct ae_object objects[2] = {open_pack(&rig, 0), open_pack(&rig, 1)};
    check_kept(&rig, 0, objects[0], 0, 8 * BLOCK);
    directory_remove(rig.directory);
    check_kept(&rig, 0, objects[0], 0, 8 * BLOCK);
    check_kept(&rig, 1, objects[1], 0, 8 * BLOCK);
    CHECK(mkdir(rig.directory, 0700) == 0);
    struct ae_object third = open_pack(&rig, 2);
    check_kept(&rig, 2, third, 0, 8 * BLOCK);
    CHECK_EQUAL(rig.packs[0].fetched[3], 1);
    close_object(objects[0]);
    close_object(objects[1]);
    close_object(third);
    rig_end(&rig);
}

/* A sealed layer over one far pack after the other */

static int far_resolve(void *ctx, uint64_t region, struct ae_region **made) {
    struct ae_pack **packs = ctx;
    if (region >= PACKS)
        return ae_region_make(region, UINT32_MAX, NULL, 0, NULL, 0, made);
    struct ae_extent extent = {.count = AE_REGION_SECTORS};
    return ae_region_make(region, region + 1, &extent, 1, &packs[region], 1, made);
}

static void nothing(void *ctx) { (void)ctx; }

struct far_volume {
    struct rig rig;
    struct ae_pack *packs[PACKS];
    struct ae_table *table;
    struct ae_volume *volume;
};

static void far_volume_open(struct far_volume *far) {
    rig_init(&far->rig, UINT64_MAX, AE_REGION_BYTES);
    for (unsigned i = 0; i < PACKS; i++)
        CHECK_EQUAL(ae_pack_open(open_pack(&far->rig, i), AE_REGION_BYTES, &far->packs[i]), 0);
    CHECK_EQUAL(ae_table_open(1 << 20, &far->table), 0);
    struct ae_resolver resolver = {.resolve = far_resolve, .close = nothing, .ctx = far->packs};
    static const uint8_t id[16] = {7};
    struct ae_layer *layer;
    CHECK_EQUAL(ae_layer_open_sealed(id, far->table, resolver, &layer), 0);
    CHECK_EQUAL(ae_volume_open(&layer, 1, PACKS * AE_REGION_BYTES, false, &far->volume), 0);
    ae_layer_release(layer);
}

static void far_volume_close(struct far_volume *far) {
    ae_volume_close(far->volume, false);
    for (unsigned i = 0; i < PACKS; i++)
        ae_pack_release(far->packs[i]);
    ae_table_release(far->table);
    rig_end(&far->rig);
}

static void far_volume_check(struct far_volume *far, uint64_t offset, size_t length) {
    char *bytes = malloc(length);
    CHECK(bytes != NULL);
    ssize_t got = ae_read_nowait(far->volume, bytes, length, offset);
    if (got == -EAGAIN)
        got = ae_read(far->volume, bytes, length, offset);
    CHECK_EQUAL(got, length);
    for (uint64_t at = offset; at < offset + length;) {
        uint64_t pack = at / AE_REGION_BYTES, end = (pack + 1) * AE_REGION_BYTES;
        if (end > offset + length)
            end = offset + length;
        check_bytes(&far->rig.packs[pack], bytes + (at - offset), (size_t)(end - at), at % AE_REGION_BYTES);
        at = end;
    }
    free(bytes);
}

static unsigned most_under_way(const struct far_volume *far) {
    unsigned most = 0;
    for (unsigned i = 0; i < PACKS; i++)
        most += far->rig.packs[i].most_under_way;
    return most;
}

static void test_a_sequential_reader_is_fetched_ahead_for(void) {
    struct far_volume far;
    far_volume_open(&far);
    for (unsigned i = 0; i < PACKS; i++)
        far.rig.packs[i].delay_us = 2000;
    for (uint64_t offset = 0; offset < PACKS * AE_REGION_BYTES; offset += 2 * BLOCK)
        far_volume_check(&far, offset, 2 * BLOCK);
    struct ae_cache_statistics statistics = statistics_of(&far.rig);
    CHECK(statistics.ahead_bytes > PACKS * AE_REGION_BYTES / 2);
    CHECK(most_under_way(&far) > PACKS); /* several at a time */
    CHECK_EQUAL(statistics.fetched_bytes, PACKS * AE_REGION_BYTES);
    for (unsigned i = 0; i < PACKS; i++)
        for (unsigned block = 0; block < AE_REGION_BYTES / BLOCK; block++)
            CHECK_EQUAL(far.rig.packs[i].fetched[block], 1);
    far_volume_close(&far);
}

static void test_a_random_reader_is_not(void) {
    struct far_volume far;
    far_volume_open(&far);
    uint64_t random = random_seed(4);
    for (int i = 0; i < 60; i++)
        far_volume_check(&far, random_below(&random, PACKS * AE_REGION_BYTES / 4096 - 1) * 4096, 4096);
    /* Two of them may lie side by side by chance. */
    CHECK(statistics_of(&far.rig).ahead_bytes <= MIB);
    far_volume_close(&far);
}

/* It may be damaged, and lie elsewhere too; but a time limit has to pass once only. */
static void test_what_cannot_be_fetched_is_tried_twice_unless_that_took_too_long(void) {
    struct far_volume far;
    far_volume_open(&far);
    char bytes[4096];
    far.rig.packs[0].fail_with = -EIO;
    CHECK_EQUAL(ae_read(far.volume, bytes, sizeof bytes, 0), -EIO);
    CHECK_EQUAL(far.rig.packs[0].reads, 2);
    far.rig.packs[0].fail_with = -ETIMEDOUT;
    CHECK_EQUAL(ae_read(far.volume, bytes, sizeof bytes, 0), -EIO);
    CHECK_EQUAL(far.rig.packs[0].reads, 3);
    far.rig.packs[0].fail_with = 0;
    far_volume_check(&far, 0, sizeof bytes);
    far_volume_close(&far);
}

static void test_what_is_queued_is_dropped_at_the_end(void) {
    struct far_volume far;
    far_volume_open(&far);
    for (unsigned i = 0; i < PACKS; i++)
        far.rig.packs[i].delay_us = 20000;
    for (uint64_t offset = 0; offset < 8 * MIB; offset += MIB)
        far_volume_check(&far, offset, MIB);
    ae_cache_close(far.rig.cache);
    CHECK_EQUAL(ae_cache_open(UINT64_MAX, 0, &far.rig.cache), 0);
    for (unsigned i = 0; i < PACKS; i++)
        far.rig.packs[i].delay_us = 0;
    for (uint64_t offset = 0; offset < PACKS * AE_REGION_BYTES; offset += MIB)
        far_volume_check(&far, offset, MIB); /* goes on without those who fetch ahead */
    far_volume_close(&far);
    for (unsigned i = 0; i < PACKS; i++)
        CHECK_EQUAL(far.rig.packs[i].closed, 1);
}

/* All at once */

struct crowd {
    struct rig *rig;
    atomic_bool over;
    unsigned number;
};

static void *crowd_read(void *argument) {
    struct crowd *crowd = argument;
    struct rig *rig = crowd->rig;
    uint64_t random = random_seed(100 + crowd->number);
    for (int round = 0; round < CACHE_ROUNDS; round++) {
        unsigned pack = (unsigned)random_below(&random, PACKS);
        struct ae_object object = open_pack(rig, pack);
        for (int i = 0; i < 8; i++) {
            uint64_t offset = random_below(&random, rig->packs[pack].size - 9000);
            size_t length = (size_t)random_below(&random, 9000) + 1;
            char bytes[9000];
            if (object.ops->pread_nowait(object.ctx, bytes, length, offset) == 0)
                check_bytes(&rig->packs[pack], bytes, length, offset);
            else
                check_read(rig, pack, object, offset, length);
        }
        close_object(object);
    }
    return NULL;
}

static void *crowd_disturb(void *argument) {
    struct crowd *crowd = argument;
    struct rig *rig = crowd->rig;
    uint64_t random = random_seed(7);
    while (!atomic_load(&crowd->over)) {
        char path[160];
        path_of(rig, (unsigned)random_below(&random, PACKS), path);
        if (random_below(&random, 2) == 0)
            (void)!unlink(path);
        ae_cache_limit(rig->cache, random_below(&random, 4) * MIB);
        statistics_of(rig);
        pause_us(500);
    }
    return NULL;
}

static void test_a_crowd_reads_right_whatever_happens_to_the_files(void) {
    enum { READERS = 4 };
    struct rig rig;
    rig_init(&rig, 2 * MIB, 12 * BLOCK + 100);
    pthread_t threads[READERS + 1];
    struct crowd crowds[READERS + 1];
    for (unsigned i = 0; i <= READERS; i++) {
        crowds[i] = (struct crowd){.rig = &rig, .number = i};
        CHECK(pthread_create(&threads[i], NULL, i < READERS ? crowd_read : crowd_disturb, &crowds[i]) == 0);
    }
    for (unsigned i = 0; i < READERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    atomic_store(&crowds[READERS].over, true);
    CHECK(pthread_join(threads[READERS], NULL) == 0);
    await_kept(&rig);
    ae_cache_limit(rig.cache, MIB);
    uint64_t bytes;
    files_in(rig.directory, &bytes);
    CHECK(statistics_of(&rig).bytes <= MIB && bytes <= MIB);
    rig_end(&rig);
}

#ifdef MEASURES_MEMORY

#define MANY 24

static char room[MANY][MIB];

/* In kinds of pieces and an order that leave holes everywhere. */
static void *read_all_kinds(void *argument) {
    struct crowd *crowd = argument;
    struct rig *rig = crowd->rig;
    uint64_t random = random_seed(200 + crowd->number);
    char *bytes = room[crowd->number];
    for (int round = 0; round < 20; round++) {
        unsigned pack = (unsigned)random_below(&random, PACKS);
        struct ae_object object = open_pack(rig, pack);
        for (int i = 0; i < 8; i++) {
            size_t length = i % 2 == 0 ? MIB : 100;
            CHECK_EQUAL(object.ops->pread_within(object.ctx, bytes, length, random_below(&random, 8) * MIB), 0);
        }
        close_object(object);
    }
    return NULL;
}

static uint64_t resident_bytes(void) {
    unsigned long long all, resident;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%llu %llu", &all, &resident) == 2);
    fclose(file);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

static void test_memory_is_given_back_when_all_is_quiet(void) {
    struct rig rig;
    rig_init(&rig, MIB, BLOCKS_MAX * BLOCK);
    ae_cache_close(rig.cache);
    CHECK_EQUAL(ae_cache_open(MIB, 100000000, &rig.cache), 0);
    memset(room, 1, sizeof room);
    uint64_t before = resident_bytes();
    pthread_t threads[MANY];
    struct crowd crowds[MANY];
    for (unsigned i = 0; i < MANY; i++) {
        crowds[i] = (struct crowd){.rig = &rig, .number = i};
        CHECK(pthread_create(&threads[i], NULL, read_all_kinds, &crowds[i]) == 0);
    }
    for (unsigned i = 0; i < MANY; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    await_kept(&rig);
    CHECK(resident_bytes() < before + 32 * MIB);
    rig_end(&rig);
}

#endif

int main(void) {
    static const struct test tests[] = {
        {"each block is fetched once", test_each_block_is_fetched_once},
        {"a run of blocks is one read", test_a_run_of_blocks_is_one_read},
        {"the ends", test_the_ends},
        {"reads that must not wait", test_what_is_there_is_read_without_waiting},
        {"all wait for one fetch", test_all_who_need_a_block_wait_for_one_fetch},
        {"without a disk too", test_without_a_disk_they_do_so_too},
        {"a source that became shorter", test_a_source_that_became_shorter_is_an_error},
        {"the next process", test_the_next_process_finds_it},
        {"what has landed", test_what_has_landed_is_read_from_memory_and_is_there_at_the_end},
        {"what may stay in memory", test_no_more_stays_in_memory_than_may},
        {"buffers", test_a_buffer_is_used_again_for_another_length},
        {"buffers that nobody asks for", test_spares_that_nobody_asks_for_go},
        {"blocks that are not right", test_blocks_that_are_not_right_are_fetched_anew},
        {"files that are not right", test_a_file_that_is_no_packs_is_made_anew},
        {"a file that is cut", test_a_file_that_is_cut_under_us_is_no_loss},
        {"a full disk", test_a_disk_that_is_full_costs_speed},
        {"eviction", test_what_is_too_much_goes_that_was_not_used_for_longest},
        {"eviction of what nobody has open", test_files_that_nobody_has_open_count_and_go},
        {"a directory that is deleted", test_a_directory_that_is_deleted_is_no_loss},
        {"fetching ahead", test_a_sequential_reader_is_fetched_ahead_for},
        {"not fetching ahead", test_a_random_reader_is_not},
        {"what cannot be fetched", test_what_cannot_be_fetched_is_tried_twice_unless_that_took_too_long},
        {"dropping what is queued", test_what_is_queued_is_dropped_at_the_end},
#ifdef MEASURES_MEMORY
        {"memory is given back", test_memory_is_given_back_when_all_is_quiet},
#endif
        {"a crowd", test_a_crowd_reads_right_whatever_happens_to_the_files},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
