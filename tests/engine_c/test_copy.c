/*
 * Copies of ranges, the exchange of a chain, what an extension asks, and flushes by themselves.
 *
 * The crossing copies: two volumes are copied onto each other by several threads while both get new heads and are
 * resized. Every sector of both was written once, so none may ever read as zeros or as parts of two.
 */
#include "check.h"
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR ((uint64_t)AE_SECTOR_BYTES)
#define MIB (UINT64_C(1) << 20)
#define SIDE_LAYERS_MAX 24

static const uint8_t boot_id[16] = {1};

/* A volume on disks of its own. */
struct side {
    struct machine *machine;
    const char *directory;
    unsigned first_id;
    struct stored_layer stored[SIDE_LAYERS_MAX]; /* the oldest first */
    struct ae_layer *layers[SIDE_LAYERS_MAX];    /* in the same order */
    size_t count;
    struct ae_volume *volume;
};

struct pair {
    struct machine machine;
    char directory[128];
    struct side a, b;
};

static struct ae_layer *side_add(struct side *side) {
    struct stored_layer *stored = &side->stored[side->count];
    stored_layer_init(stored, side->machine, side->directory, side->first_id + (unsigned)side->count);
    stored->parent_visible = AE_SIZE_MAX;
    side->layers[side->count] = stored_layer_open(stored, true, true, boot_id);
    return side->layers[side->count++];
}

static void side_snapshot(struct side *side) {
    CHECK_EQUAL(ae_volume_swap_head(side->volume, side_add(side)), ae_volume_size(side->volume));
}

static void side_start(struct side *side, struct pair *pair, unsigned first_id, uint64_t size) {
    side->machine = &pair->machine;
    side->directory = pair->directory;
    side->first_id = first_id;
    side->count = 0;
    struct ae_layer *head = side_add(side);
    CHECK_EQUAL(ae_volume_open(&head, 1, size, true, &side->volume), 0);
}

static void side_end(struct side *side) {
    ae_volume_close(side->volume, false);
    for (size_t i = 0; i < side->count; i++) {
        ae_layer_release(side->layers[i]);
        stored_layer_free(&side->stored[i]);
    }
}

static struct pair *pair_start(uint64_t size_a, uint64_t size_b, bool disks_copy) {
    struct pair *pair = calloc(1, sizeof *pair);
    CHECK(pair != NULL);
    machine_start(&pair->machine, 1);
    pair->machine.disks_copy = disks_copy;
    directory_make(pair->directory);
    side_start(&pair->a, pair, 100, size_a);
    side_start(&pair->b, pair, 200, size_b);
    return pair;
}

static void pair_end(struct pair *pair) {
    side_end(&pair->a);
    side_end(&pair->b);
    directory_remove(pair->directory);
    machine_stop(&pair->machine);
    free(pair);
}

static void put(struct side *side, uint64_t offset, size_t length, char byte) {
    char *bytes = malloc(length);
    CHECK(bytes != NULL);
    memset(bytes, byte, length);
    CHECK_EQUAL(ae_write(side->volume, bytes, length, offset), length);
    free(bytes);
}

static char get(struct side *side, uint64_t offset) {
    char byte = 'x';
    CHECK_EQUAL(ae_read(side->volume, &byte, 1, offset), 1);
    return byte;
}

static struct disk *head_data(struct side *side) { return &side->stored[side->count - 1].data; }

/* Copies */

static void test_borders(void) {
    struct pair *pair = pair_start(100 * MIB + 10, SECTOR, true);
    struct ae_volume *a = pair->a.volume, *b = pair->b.volume;
    put(&pair->a, 0, 5, 'a');
    put(&pair->a, 100 * MIB, 10, 'z');
    CHECK_EQUAL(ae_copy(b, 0, a, 100 * MIB + 10, 1), 0);
    CHECK_EQUAL(ae_copy(b, 0, a, UINT64_MAX, UINT64_MAX), 0);
    CHECK_EQUAL(ae_copy(b, 0, a, 0, 0), 0);
    CHECK_EQUAL(ae_copy(b, UINT64_MAX, a, 0, 1), -EFBIG);
    CHECK_EQUAL(ae_copy(b, AE_SIZE_MAX - 4, a, 0, 5), -EFBIG);
    CHECK_EQUAL(ae_volume_size(b), SECTOR);
    CHECK_EQUAL(ae_copy(b, 1, a, 0, UINT64_MAX), AE_COPY_BYTES_MAX);
    CHECK_EQUAL(ae_volume_size(b), AE_COPY_BYTES_MAX + 1);
    CHECK_EQUAL(get(&pair->b, 5), 'a');
    CHECK_EQUAL(get(&pair->b, 6), 0);
    CHECK_EQUAL(ae_copy(b, 7, a, 100 * MIB + 9, UINT64_MAX), 1);
    CHECK_EQUAL(get(&pair->b, 7), 'z');
    pair_end(pair);
}

static void test_holes_stay_holes(void) {
    struct pair *pair = pair_start(32 * MIB, 0, true);
    struct ae_volume *a = pair->a.volume, *b = pair->b.volume;
    put(&pair->a, 8 * MIB, SECTOR, 'a');
    CHECK_EQUAL(ae_copy(b, 0, a, 0, 32 * MIB), 32 * MIB);
    CHECK_EQUAL(ae_volume_size(b), 32 * MIB);
    CHECK_EQUAL(ae_layer_count(pair->b.layers[0]), 1);
    CHECK_EQUAL(ae_seek_data(b, 0), 8 * MIB);
    CHECK_EQUAL(ae_seek_data(b, 8 * MIB + SECTOR), -ENXIO);
    /* What was there goes, also where it shines through from a parent. */
    put(&pair->b, 16 * MIB, 2 * SECTOR, 'b');
    side_snapshot(&pair->b);
    CHECK_EQUAL(ae_copy(b, 12 * MIB, a, 12 * MIB, 8 * MIB), 8 * MIB);
    CHECK_EQUAL(get(&pair->b, 16 * MIB), 0);
    CHECK_EQUAL(ae_seek_data(b, 8 * MIB + SECTOR), -ENXIO);
    /* One whose sectors all have their bits. */
    put(&pair->a, 24 * MIB, 4 * SECTOR, 'c');
    CHECK_EQUAL(ae_discard(a, 24 * MIB + SECTOR, 2 * SECTOR), 0);
    CHECK_EQUAL(ae_copy(b, 24 * MIB, a, 24 * MIB, MIB), MIB);
    CHECK_EQUAL(ae_seek_hole(b, 24 * MIB), 24 * MIB + SECTOR);
    CHECK_EQUAL(ae_seek_data(b, 24 * MIB + SECTOR), 24 * MIB + 3 * SECTOR);
    CHECK_EQUAL(get(&pair->b, 24 * MIB + 3 * SECTOR), 'c');
    pair_end(pair);
}

static void test_object_to_object(void) {
    struct pair *pair = pair_start(8 * SECTOR, 8 * SECTOR, true);
    struct ae_volume *a = pair->a.volume, *b = pair->b.volume;
    put(&pair->a, 0, 8 * SECTOR, 'a');
    put(&pair->b, 0, 8 * SECTOR, 'b');
    struct disk *to = head_data(&pair->b);
    uint64_t writes = to->calls[DISK_WRITE];
    CHECK_EQUAL(ae_copy(b, 2 * SECTOR + 9, a, 9, 4 * SECTOR), 4 * SECTOR);
    CHECK_EQUAL(to->calls[DISK_COPY], 1);
    CHECK_EQUAL(to->calls[DISK_WRITE] - writes, 2); /* the edges */
    CHECK_EQUAL(get(&pair->b, 2 * SECTOR + 8), 'b');
    CHECK_EQUAL(get(&pair->b, 2 * SECTOR + 9), 'a');
    CHECK_EQUAL(get(&pair->b, 6 * SECTOR + 8), 'a');
    CHECK_EQUAL(get(&pair->b, 6 * SECTOR + 9), 'b');
    CHECK_EQUAL(ae_copy(b, 10, a, 9, 4 * SECTOR), 4 * SECTOR);
    CHECK_EQUAL(to->calls[DISK_COPY], 1);
    /* One that cannot is asked once a copy. */
    disk_fail(to, DISK_COPY, 1, -EOPNOTSUPP);
    to->keeps_failing = true;
    put(&pair->a, 0, 8 * SECTOR, 'c');
    CHECK_EQUAL(ae_discard(a, 4 * SECTOR, SECTOR), 0);
    CHECK_EQUAL(ae_copy(b, 0, a, 0, 8 * SECTOR), 8 * SECTOR);
    CHECK_EQUAL(to->calls[DISK_COPY], 2);
    CHECK_EQUAL(get(&pair->b, 8 * SECTOR - 1), 'c');
    pair_end(pair);
}

static void test_a_failed_copy_leaves_the_old(void) {
    struct pair *pair = pair_start(3 * MIB, 3 * MIB, true);
    struct ae_volume *a = pair->a.volume, *b = pair->b.volume;
    put(&pair->a, 0, MIB, 'a');
    put(&pair->a, 2 * MIB, MIB, 'a');
    put(&pair->b, 0, 3 * MIB, 'b');
    side_snapshot(&pair->b);
    disk_fail(head_data(&pair->b), DISK_COPY, 2, -ENOSPC);
    CHECK_EQUAL(ae_copy(b, 0, a, 0, 3 * MIB), 2 * MIB);
    CHECK_EQUAL(get(&pair->b, MIB - 1), 'a');
    CHECK_EQUAL(get(&pair->b, 2 * MIB - 1), 0);
    CHECK_EQUAL(get(&pair->b, 2 * MIB), 'b');
    disk_fail(head_data(&pair->b), DISK_COPY, 1, -ENOSPC);
    CHECK_EQUAL(ae_copy(b, 2 * MIB, a, 2 * MIB, MIB), -ENOSPC);
    disk_fail(head_data(&pair->a), DISK_READ, 1, -EIO);
    CHECK_EQUAL(ae_copy(b, 1, a, 0, MIB), -EIO);
    CHECK_EQUAL(get(&pair->b, 2 * MIB), 'b');
    ae_volume_fence(b);
    CHECK_EQUAL(ae_copy(b, 0, a, 0, MIB), -EIO);
    CHECK_EQUAL(ae_copy(b, 0, a, MIB, SECTOR), -EIO);
    pair_end(pair);
}

static void test_a_volume_that_is_only_read(void) {
    struct pair *pair = pair_start(SECTOR, SECTOR, true);
    put(&pair->a, 0, SECTOR, 'a');
    struct ae_volume *reader;
    CHECK_EQUAL(ae_volume_open(pair->a.layers, 1, SECTOR, false, &reader), 0);
    CHECK_EQUAL(ae_copy(pair->b.volume, 0, reader, 0, SECTOR), SECTOR);
    CHECK_EQUAL(ae_copy(reader, 0, pair->b.volume, 0, SECTOR), -EROFS);
    CHECK_EQUAL(ae_volume_replace(reader, pair->a.layers, 1, SECTOR), -EROFS);
    CHECK_EQUAL(ae_volume_extend(reader, 2 * SECTOR), -EROFS);
    CHECK_EQUAL(ae_volume_guard(reader, "/", "/nothing-there", SECTOR), 0);
    CHECK_EQUAL(ae_sync(reader), -EAGAIN);
    ae_volume_close(reader, false);
    pair_end(pair);
}

/* Crossing copies */

#define CROSS_SECTORS 64
#define CROSS_COPIES 3000
#define CROSS_SWAPS 12

struct crossing {
    struct ae_volume *from, *to;
    uint64_t seed;
};

static void check_stamps(struct ae_volume *volume, uint64_t sector) {
    uint64_t words[AE_SECTOR_BYTES / 8];
    CHECK_EQUAL(ae_read(volume, words, sizeof words, sector * SECTOR), sizeof words);
    CHECK(words[0] != 0);
    for (size_t i = 1; i < AE_SECTOR_BYTES / 8; i++)
        CHECK_EQUAL(words[i], words[0]);
}

static void stamp(struct ae_volume *volume, uint64_t sector, uint64_t number) {
    uint64_t words[AE_SECTOR_BYTES / 8];
    for (size_t i = 0; i < AE_SECTOR_BYTES / 8; i++)
        words[i] = number;
    CHECK_EQUAL(ae_write(volume, words, sizeof words, sector * SECTOR), sizeof words);
}

static void *cross_run(void *argument) {
    struct crossing *crossing = argument;
    uint64_t random = random_seed(crossing->seed);
    for (unsigned round = 0; round < CROSS_COPIES; round++) {
        uint64_t length = 1 + random_below(&random, 8);
        uint64_t from = random_below(&random, CROSS_SECTORS - length);
        uint64_t to = random_below(&random, CROSS_SECTORS - length);
        CHECK_EQUAL(ae_copy(crossing->to, to * SECTOR, crossing->from, from * SECTOR, length * SECTOR),
                    length * SECTOR);
        check_stamps(crossing->to, to);
        stamp(crossing->to, random_below(&random, CROSS_SECTORS), round << 8 | crossing->seed);
        if (round % 16 == 0)
            CHECK_EQUAL(ae_flush(crossing->to), 0);
    }
    return NULL;
}

static void test_crossing_copies(void) {
    struct pair *pair = pair_start(CROSS_SECTORS * SECTOR, CROSS_SECTORS * SECTOR, true);
    struct side *sides[2] = {&pair->a, &pair->b};
    for (uint64_t sector = 0; sector < CROSS_SECTORS; sector++)
        for (int i = 0; i < 2; i++)
            stamp(sides[i]->volume, sector, 1000 + sector);
    pthread_t threads[4];
    struct crossing crossing[4];
    for (unsigned i = 0; i < 4; i++) {
        crossing[i] = (struct crossing){sides[i % 2]->volume, sides[1 - i % 2]->volume, i + 1};
        CHECK(pthread_create(&threads[i], NULL, cross_run, &crossing[i]) == 0);
    }
    for (unsigned swap = 0; swap < CROSS_SWAPS; swap++) {
        nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL);
        for (int i = 0; i < 2; i++) {
            side_snapshot(sides[i]);
            ae_volume_pause(sides[i]->volume);
            CHECK_EQUAL(ae_volume_resize(sides[i]->volume, CROSS_SECTORS * SECTOR), 0);
            ae_volume_resume(sides[i]->volume);
        }
    }
    for (unsigned i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    for (uint64_t sector = 0; sector < CROSS_SECTORS; sector++)
        for (int i = 0; i < 2; i++)
            check_stamps(sides[i]->volume, sector);
    pair_end(pair);
}

/* Another chain */

struct waiting {
    struct ae_volume *volume;
    ssize_t written, read;
    char byte;
};

static void *wait_write(void *argument) {
    struct waiting *waiting = argument;
    waiting->written = ae_write(waiting->volume, "w", 1, SECTOR);
    return NULL;
}

static void *wait_read(void *argument) {
    struct waiting *waiting = argument;
    waiting->read = ae_read(waiting->volume, &waiting->byte, 1, 0);
    return NULL;
}

static void test_who_waits_at_the_gate_finds_the_new_chain(void) {
    struct pair *pair = pair_start(2 * SECTOR, 0, true);
    put(&pair->a, 0, 2 * SECTOR, 'a');
    side_snapshot(&pair->a);
    CHECK_EQUAL(ae_flush(pair->a.volume), 0);
    CHECK_EQUAL(ae_flush(pair->b.volume), 0);

    struct ae_volume *volume = pair->b.volume;
    ae_volume_pause(volume);
    struct waiting waiting = {.volume = volume};
    pthread_t threads[2];
    CHECK(pthread_create(&threads[0], NULL, wait_write, &waiting) == 0);
    CHECK(pthread_create(&threads[1], NULL, wait_read, &waiting) == 0);
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    struct ae_layer *chain[2] = {side_add(&pair->b), pair->a.layers[0]};
    CHECK_EQUAL(ae_volume_replace(volume, &chain[1], 1, SECTOR), -EINVAL); /* no head */
    CHECK_EQUAL(ae_volume_replace(volume, chain, 2, AE_SIZE_MAX + 1), -EFBIG);
    CHECK_EQUAL(ae_volume_replace(volume, chain, 2, 2 * SECTOR), 0);
    CHECK(access(pair->b.stored[0].live_path, F_OK) < 0);
    CHECK(access(pair->b.stored[1].live_path, F_OK) == 0);
    CHECK_EQUAL(ae_layer_live_size(chain[0]), 2 * SECTOR);
    ae_volume_resume(volume);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK_EQUAL(waiting.written, 1);
    CHECK_EQUAL(waiting.read, 1);
    CHECK_EQUAL(waiting.byte, 'a');
    CHECK_EQUAL(get(&pair->b, SECTOR), 'w');
    CHECK_EQUAL(get(&pair->b, SECTOR + 1), 'a');
    CHECK_EQUAL(ae_layer_count(pair->b.layers[0]), 0);
    CHECK_EQUAL(ae_flush(volume), 0);
    pair_end(pair);
}

static void test_extension(void) {
    struct pair *pair = pair_start(8 * SECTOR, 0, true);
    put(&pair->a, 0, 8 * SECTOR, 'a');
    side_snapshot(&pair->a);
    CHECK_EQUAL(ae_flush(pair->a.volume), 0);
    const uint8_t *shared = pair->a.stored[0].id;
    struct ae_volume *source = pair->a.volume, *target = pair->b.volume;
    uint64_t until;
    CHECK_EQUAL(ae_volume_extend(target, SECTOR), -EINVAL); /* no parent */
    ae_volume_pause(target);
    struct ae_layer *chain[2] = {side_add(&pair->b), pair->a.layers[0]};
    CHECK_EQUAL(ae_volume_replace(target, chain, 2, SECTOR + 10), 0);

    CHECK_EQUAL(ae_volume_shows(source, shared, SECTOR + 10, 8 * SECTOR, &until), 0);
    CHECK_EQUAL(until, 8 * SECTOR);
    CHECK_EQUAL(ae_volume_shows(target, shared, 0, 8 * SECTOR, &until), 0);
    CHECK_EQUAL(until, SECTOR + 10);
    CHECK_EQUAL(ae_volume_shows(target, shared, 2 * SECTOR, 8 * SECTOR, &until), 0);
    CHECK_EQUAL(until, 2 * SECTOR);
    CHECK_EQUAL(ae_volume_shows(source, pair->b.stored[1].id, 0, SECTOR, &until), -ENOENT);
    CHECK_EQUAL(ae_volume_shows(source, shared, SECTOR, 0, &until), -EINVAL);
    /* A sector that the source wrote since is another, from its very beginning. */
    put(&pair->a, 4 * SECTOR + 100, 1, 'x');
    CHECK_EQUAL(ae_volume_shows(source, shared, SECTOR + 10, 8 * SECTOR, &until), 0);
    CHECK_EQUAL(until, 4 * SECTOR);
    CHECK_EQUAL(ae_volume_shows(source, shared, 4 * SECTOR + 200, 8 * SECTOR, &until), 0);
    CHECK_EQUAL(until, 4 * SECTOR + 200);

    CHECK_EQUAL(ae_volume_head_is_clear(target, SECTOR + 10, 4 * SECTOR), 1);
    CHECK_EQUAL(ae_volume_extend(target, SECTOR), -EINVAL); /* smaller */
    CHECK_EQUAL(ae_volume_extend(target, AE_SIZE_MAX + 1), -EFBIG);
    CHECK_EQUAL(ae_volume_extend(target, 4 * SECTOR), 0);
    ae_volume_resume(target);
    CHECK_EQUAL(ae_volume_size(target), 4 * SECTOR);
    CHECK_EQUAL(ae_layer_live_size(chain[0]), 4 * SECTOR);
    CHECK_EQUAL(get(&pair->b, SECTOR + 10), 'a');
    CHECK_EQUAL(get(&pair->b, 4 * SECTOR - 1), 'a');

    /* What a shrink cut off is still in the head: as zeros. */
    put(&pair->b, 4 * SECTOR, SECTOR, 'b');
    ae_volume_pause(target);
    CHECK_EQUAL(ae_volume_resize(target, 4 * SECTOR), 0);
    CHECK_EQUAL(ae_volume_head_is_clear(target, 4 * SECTOR, 5 * SECTOR), 0);
    CHECK_EQUAL(ae_volume_head_is_clear(target, 5 * SECTOR, AE_SIZE_MAX), 1);
    CHECK_EQUAL(ae_volume_head_is_clear(target, SECTOR, SECTOR), -EINVAL);
    ae_volume_fence(target);
    CHECK_EQUAL(ae_volume_extend(target, 8 * SECTOR), -EIO);
    ae_volume_resume(target);
    pair_end(pair);
}

/* Flushes by themselves */

static void touch(const char *path) {
    int fd = open(path, O_CREAT | O_WRONLY, 0600);
    CHECK(fd >= 0);
    close(fd);
}

static void test_sync_believes_its_guard(void) {
    struct pair *pair = pair_start(SECTOR, 0, true);
    struct ae_volume *volume = pair->a.volume;
    char present[160], following[160];
    snprintf(present, sizeof present, "%s/1", pair->directory);
    snprintf(following, sizeof following, "%s/2", pair->directory);
    put(&pair->a, 0, SECTOR, 'a');
    CHECK_EQUAL(ae_sync(volume), -EAGAIN); /* none yet */
    CHECK_EQUAL(ae_volume_guard(volume, present, following, SECTOR), 0);
    CHECK_EQUAL(ae_sync(volume), -EAGAIN);
    CHECK(ae_layer_dirty(pair->a.layers[0]));
    touch(present);
    CHECK_EQUAL(ae_sync(volume), 0);
    CHECK(!ae_layer_dirty(pair->a.layers[0]));

    put(&pair->a, 0, SECTOR + 1, 'b');
    CHECK_EQUAL(ae_sync(volume), -EAGAIN); /* it has grown */
    CHECK_EQUAL(ae_volume_guard(volume, present, following, SECTOR + 1), 0);
    CHECK_EQUAL(ae_sync(volume), 0);

    touch(following);
    CHECK_EQUAL(ae_sync(volume), -EAGAIN);
    CHECK(unlink(present) == 0);
    CHECK_EQUAL(ae_sync(volume), -EAGAIN);
    CHECK(unlink(following) == 0);
    CHECK_EQUAL(ae_sync(volume), -EAGAIN); /* nothing left is not "unchanged" */
    touch(present);
    CHECK_EQUAL(ae_volume_guard(volume, present, "/dev/null/2", SECTOR + 1), 0);
    CHECK_EQUAL(ae_sync(volume), -EAGAIN); /* ENOTDIR */
    char long_path[5000];
    memset(long_path, 'x', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = 0;
    CHECK_EQUAL(ae_volume_guard(volume, present, long_path, SECTOR + 1), -ENAMETOOLONG);

    CHECK_EQUAL(ae_volume_guard(volume, present, following, SECTOR + 1), 0);
    put(&pair->a, 0, 1, 'c');
    disk_fail(head_data(&pair->a), DISK_FLUSH, 1, -EIO);
    CHECK_EQUAL(ae_sync(volume), -EIO);
    CHECK_EQUAL(ae_sync(volume), -EIO);
    CHECK(unlink(present) == 0);
    pair_end(pair);
}

struct syncing {
    struct ae_volume *volume;
    atomic_bool stop;
};

static void *sync_run(void *argument) {
    struct syncing *syncing = argument;
    while (!atomic_load(&syncing->stop))
        CHECK_EQUAL(ae_sync(syncing->volume), 0);
    return NULL;
}

static void test_a_guard_without_paths_goes_by_the_size(void) {
    struct pair *pair = pair_start(SECTOR, 0, true);
    struct ae_volume *volume = pair->a.volume;
    put(&pair->a, 0, SECTOR, 'a');
    CHECK_EQUAL(ae_volume_guard(volume, NULL, "/nothing-there", SECTOR), -EINVAL);
    CHECK_EQUAL(ae_volume_guard(volume, "/", NULL, SECTOR), -EINVAL);
    CHECK_EQUAL(ae_sync(volume), -EAGAIN);
    CHECK_EQUAL(ae_volume_guard(volume, NULL, NULL, SECTOR), 0);
    CHECK_EQUAL(ae_sync(volume), 0);
    CHECK(!ae_layer_dirty(pair->a.layers[0]));

    put(&pair->a, 0, SECTOR + 1, 'b');
    CHECK_EQUAL(ae_sync(volume), -EAGAIN); /* it has grown */
    CHECK_EQUAL(ae_volume_guard(volume, NULL, NULL, SECTOR + 1), 0);
    CHECK_EQUAL(ae_sync(volume), 0);
    CHECK_EQUAL(ae_volume_guard(volume, "/nothing-there", "/nothing-there", SECTOR + 1), 0);
    CHECK_EQUAL(ae_sync(volume), -EAGAIN); /* the last call counts */
    CHECK_EQUAL(ae_volume_guard(volume, NULL, NULL, SECTOR + 1), 0);
    CHECK_EQUAL(ae_sync(volume), 0);
    ae_volume_fence(volume);
    CHECK_EQUAL(ae_sync(volume), -EIO);
    pair_end(pair);
}

static void test_the_guard_is_renewed_under_syncs(void) {
    struct pair *pair = pair_start(SECTOR, 0, true);
    char present[160], following[160];
    snprintf(present, sizeof present, "%s/1", pair->directory);
    snprintf(following, sizeof following, "%s/2", pair->directory);
    touch(present);
    CHECK_EQUAL(ae_volume_guard(pair->a.volume, present, following, SECTOR), 0);
    struct syncing syncing = {.volume = pair->a.volume};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, sync_run, &syncing) == 0);
    for (unsigned round = 0; round < 2000; round++) {
        put(&pair->a, 0, SECTOR, 'a');
        CHECK_EQUAL(ae_volume_guard(pair->a.volume, present, following, SECTOR), 0);
    }
    atomic_store(&syncing.stop, true);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(unlink(present) == 0);
    pair_end(pair);
}

/* File objects */

static struct ae_object scratch_object(const char *directory) {
    int fd = open(directory, O_TMPFILE | O_RDWR, 0600);
    CHECK(fd >= 0);
    struct ae_object object;
    CHECK_EQUAL(ae_object_file(fd, &object), 0);
    close(fd);
    return object;
}

static void test_file_objects(void) {
    struct pair *pair = pair_start(SECTOR, SECTOR, true);
    struct ae_object from = scratch_object("/tmp"), to = scratch_object("/tmp");
    struct ae_object disk = disk_object(head_data(&pair->a));
    char bytes[3 * AE_SECTOR_BYTES];
    memset(bytes, 'a', sizeof bytes);
    CHECK_EQUAL(from.ops->pwrite(from.ctx, bytes, sizeof bytes, 0), 0);
    CHECK_EQUAL(to.ops->copy_from(to.ctx, 5 * SECTOR, &from, SECTOR, 2 * SECTOR), 0);
    memset(bytes, 0, sizeof bytes);
    CHECK_EQUAL(to.ops->pread(to.ctx, bytes, sizeof bytes, 4 * SECTOR), 0);
    CHECK(bytes[SECTOR - 1] == 0 && bytes[SECTOR] == 'a' && bytes[3 * SECTOR - 1] == 'a');
    CHECK_EQUAL(to.ops->copy_from(to.ctx, 0, &from, 3 * SECTOR, SECTOR), -EOPNOTSUPP); /* beyond the end */
    CHECK_EQUAL(to.ops->copy_from(to.ctx, 0, &to, 4 * SECTOR, 2 * SECTOR), 0);
    CHECK_EQUAL(to.ops->copy_from(to.ctx, 0, &to, SECTOR, 2 * SECTOR), -EOPNOTSUPP); /* onto itself */
    CHECK_EQUAL(to.ops->copy_from(to.ctx, 0, &disk, 0, SECTOR), -EOPNOTSUPP);
    from.ops->close(from.ctx);
    to.ops->close(to.ctx);
    pair_end(pair);
}

int main(void) {
    static const struct test tests[] = {
        {"copies at the borders", test_borders},
        {"holes stay holes", test_holes_stay_holes},
        {"object to object", test_object_to_object},
        {"a failed copy leaves the old", test_a_failed_copy_leaves_the_old},
        {"a volume that is only read", test_a_volume_that_is_only_read},
        {"crossing copies, under swaps and resizes", test_crossing_copies},
        {"who waits at the gate finds the new chain", test_who_waits_at_the_gate_finds_the_new_chain},
        {"extension", test_extension},
        {"sync believes its guard", test_sync_believes_its_guard},
        {"a guard without paths", test_a_guard_without_paths_goes_by_the_size},
        {"the guard is renewed under syncs", test_the_guard_is_renewed_under_syncs},
        {"file objects copy", test_file_objects},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
