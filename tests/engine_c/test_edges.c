/* What the world can do to the engine at its borders: odd ranges, full and failing stores, damaged and stale files. */
#include "check.h"
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#define SECTOR ((uint64_t)AE_SECTOR_BYTES)
#define TIB (UINT64_C(1) << 40)

static const uint8_t boot_id[16] = {1};
static const uint8_t later_boot_id[16] = {2};

/* A volume of up to three layers. */
struct rig {
    struct machine machine;
    char directory[128];
    struct stored_layer stored[3];
    struct ae_layer *layers[3]; /* head first; stored[i] is layers[count - 1 - i] */
    size_t count;
    struct ae_volume *volume;
};

static void rig_open(struct rig *rig, uint64_t size, const uint8_t boot[16]) {
    for (size_t i = 0; i < rig->count; i++)
        rig->layers[i] = stored_layer_open(&rig->stored[rig->count - 1 - i], i == 0, true, boot);
    CHECK_EQUAL(ae_volume_open(rig->layers, rig->count, size, true, &rig->volume), 0);
}

static void rig_start(struct rig *rig, uint64_t size) {
    memset(rig, 0, sizeof *rig);
    machine_start(&rig->machine, 1);
    rig->machine.nowait_misses = 0;
    directory_make(rig->directory);
    stored_layer_init(&rig->stored[0], &rig->machine, rig->directory, 0);
    rig->count = 1;
    rig_open(rig, size, boot_id);
}

static void rig_close(struct rig *rig, bool clean) {
    ae_volume_close(rig->volume, clean);
    for (size_t i = 0; i < rig->count; i++)
        ae_layer_release(rig->layers[i]);
}

static void rig_end(struct rig *rig) {
    rig_close(rig, false);
    for (size_t i = 0; i < rig->count; i++)
        stored_layer_free(&rig->stored[i]);
    directory_remove(rig->directory);
    machine_stop(&rig->machine);
}

static struct stored_layer *rig_head(struct rig *rig) { return &rig->stored[rig->count - 1]; }

static void rig_snapshot(struct rig *rig) {
    struct stored_layer *fresh = &rig->stored[rig->count];
    stored_layer_init(fresh, &rig->machine, rig->directory, (unsigned)rig->count);
    fresh->parent_visible = AE_SIZE_MAX;
    struct ae_layer *head = stored_layer_open(fresh, true, true, boot_id);
    CHECK_EQUAL(ae_volume_swap_head(rig->volume, head), ae_volume_size(rig->volume));
    memmove(&rig->layers[1], &rig->layers[0], rig->count * sizeof rig->layers[0]);
    rig->layers[0] = head;
    rig->count++;
}

static void put(struct rig *rig, uint64_t offset, size_t length, char byte) {
    char *bytes = malloc(length);
    CHECK(bytes != NULL);
    memset(bytes, byte, length);
    CHECK_EQUAL(ae_write(rig->volume, bytes, length, offset), length);
    free(bytes);
}

static char get(struct rig *rig, uint64_t offset) {
    char byte = 'x';
    CHECK_EQUAL(ae_read(rig->volume, &byte, 1, offset), 1);
    return byte;
}

/* Ranges */

static void test_ranges(void) {
    struct rig rig;
    rig_start(&rig, 3 * SECTOR + 100);
    char bytes[64] = {0};
    CHECK_EQUAL(ae_read(rig.volume, bytes, 64, UINT64_MAX), 0);
    CHECK_EQUAL(ae_read(rig.volume, bytes, 64, UINT64_MAX - 63), 0);
    CHECK_EQUAL(ae_read(rig.volume, bytes, 64, 3 * SECTOR + 90), 10);
    CHECK_EQUAL(ae_read(rig.volume, bytes, 0, 0), 0);
    CHECK_EQUAL(ae_read(rig.volume, bytes, 0, TIB), 0);
    CHECK_EQUAL(ae_write(rig.volume, bytes, 64, UINT64_MAX), -EFBIG);
    CHECK_EQUAL(ae_write(rig.volume, bytes, 64, UINT64_MAX - 10), -EFBIG);
    CHECK_EQUAL(ae_write(rig.volume, bytes, 64, AE_SIZE_MAX - 63), -EFBIG);
    CHECK_EQUAL(ae_write(rig.volume, bytes, 0, AE_SIZE_MAX + 1), -EFBIG);
    CHECK_EQUAL(ae_write(rig.volume, bytes, 0, TIB), 0);
    CHECK_EQUAL(ae_volume_size(rig.volume), 3 * SECTOR + 100);
    CHECK_EQUAL(ae_discard(rig.volume, UINT64_MAX, UINT64_MAX), 0);
    CHECK_EQUAL(ae_discard(rig.volume, 10, UINT64_MAX), 0);
    CHECK_EQUAL(ae_discard(rig.volume, 0, 0), 0);
    CHECK_EQUAL(ae_seek_data(rig.volume, UINT64_MAX), -ENXIO);
    CHECK_EQUAL(ae_seek_hole(rig.volume, 3 * SECTOR + 100), -ENXIO);
    CHECK_EQUAL(ae_seek_hole(rig.volume, 3 * SECTOR + 99), 3 * SECTOR + 99);
    ae_volume_pause(rig.volume);
    CHECK_EQUAL(ae_volume_resize(rig.volume, AE_SIZE_MAX + 1), -EFBIG);
    CHECK_EQUAL(ae_volume_resize(rig.volume, AE_SIZE_MAX), 0);
    ae_volume_resume(rig.volume);
    put(&rig, AE_SIZE_MAX - 1, 1, 'z');
    CHECK_EQUAL(get(&rig, AE_SIZE_MAX - 1), 'z');
    CHECK_EQUAL(ae_seek_data(rig.volume, 0), AE_SIZE_MAX - SECTOR);
    CHECK_EQUAL(ae_discard(rig.volume, 0, UINT64_MAX), 0);
    CHECK_EQUAL(get(&rig, AE_SIZE_MAX - 1), 0);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 1);
    rig_end(&rig);
}

static void test_growth_shows_zeros(void) {
    struct rig rig;
    rig_start(&rig, 2 * SECTOR);
    put(&rig, 0, 2 * SECTOR, 'a');
    rig_snapshot(&rig);
    ae_volume_pause(rig.volume);
    CHECK_EQUAL(ae_volume_resize(rig.volume, SECTOR + 10), 0);
    CHECK_EQUAL(ae_volume_resize(rig.volume, 2 * SECTOR), 0);
    ae_volume_resume(rig.volume);
    CHECK_EQUAL(get(&rig, SECTOR + 9), 'a');
    CHECK_EQUAL(get(&rig, SECTOR + 10), 0);
    /* The parent ends within the sector that is completed. */
    put(&rig, SECTOR + 20, 1, 'b');
    CHECK_EQUAL(get(&rig, SECTOR + 9), 'a');
    CHECK_EQUAL(get(&rig, SECTOR + 10), 0);
    CHECK_EQUAL(get(&rig, SECTOR + 20), 'b');
    CHECK_EQUAL(get(&rig, SECTOR + 21), 0);
    put(&rig, 9 * SECTOR, 1, 'c');
    CHECK_EQUAL(ae_volume_size(rig.volume), 9 * SECTOR + 1);
    CHECK_EQUAL(get(&rig, 5 * SECTOR), 0);
    CHECK_EQUAL(ae_layer_live_size(rig.layers[0]), 9 * SECTOR + 1);
    rig_end(&rig);
}

static void test_grow(void) {
    struct rig rig;
    rig_start(&rig, 2 * SECTOR);
    put(&rig, 0, 2 * SECTOR, 'a');
    rig_snapshot(&rig);
    CHECK_EQUAL(ae_grow(rig.volume, SECTOR), 0);
    CHECK_EQUAL(ae_volume_size(rig.volume), 2 * SECTOR);
    CHECK_EQUAL(ae_grow(rig.volume, 5 * SECTOR + 1), 0);
    CHECK_EQUAL(ae_volume_size(rig.volume), 5 * SECTOR + 1);
    CHECK_EQUAL(ae_layer_live_size(rig.layers[0]), 5 * SECTOR + 1);
    CHECK_EQUAL(get(&rig, 2 * SECTOR - 1), 'a');
    CHECK_EQUAL(get(&rig, 5 * SECTOR), 0);
    CHECK_EQUAL(ae_grow(rig.volume, AE_SIZE_MAX + 1), -EFBIG);
    ae_volume_fence(rig.volume);
    CHECK_EQUAL(ae_grow(rig.volume, 9 * SECTOR), -EIO);
    rig_end(&rig);
}

static void test_the_time_of_change(void) {
    struct rig rig;
    rig_start(&rig, 2 * SECTOR);
    CHECK_EQUAL(ae_volume_changed_ns(rig.volume), 0);
    CHECK_EQUAL(get(&rig, 0), 0);
    CHECK_EQUAL(ae_discard(rig.volume, 9 * SECTOR, SECTOR), 0);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(ae_volume_changed_ns(rig.volume), 0);
    struct timespec before;
    CHECK_EQUAL(clock_gettime(CLOCK_REALTIME_COARSE, &before), 0);
    put(&rig, 0, 1, 'a');
    CHECK(ae_volume_changed_ns(rig.volume) >= (uint64_t)before.tv_sec * 1000000000u + (uint64_t)before.tv_nsec);
    ae_volume_forget_change(rig.volume);
    CHECK_EQUAL(ae_volume_changed_ns(rig.volume), 0);
    CHECK_EQUAL(ae_discard(rig.volume, 0, 1), 0);
    CHECK(ae_volume_changed_ns(rig.volume) != 0);
    ae_volume_forget_change(rig.volume);
    CHECK_EQUAL(ae_grow(rig.volume, 3 * SECTOR), 0);
    CHECK(ae_volume_changed_ns(rig.volume) != 0);
    rig_end(&rig);
}

static void test_open_cuts_the_data_object(void) {
    struct rig rig;
    rig_start(&rig, 4 * SECTOR);
    put(&rig, 0, 4 * SECTOR, 'a');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    rig_close(&rig, true);
    rig_open(&rig, SECTOR + 5, boot_id);
    ae_volume_pause(rig.volume);
    CHECK_EQUAL(ae_volume_resize(rig.volume, 4 * SECTOR), 0);
    ae_volume_resume(rig.volume);
    CHECK_EQUAL(get(&rig, SECTOR + 4), 'a');
    CHECK_EQUAL(get(&rig, SECTOR + 5), 0);
    CHECK_EQUAL(get(&rig, 3 * SECTOR), 0);
    rig_end(&rig);
}

/* What a large empty volume costs, in calls to the store. */
static void test_large_and_empty_is_cheap(void) {
    struct rig rig;
    rig_start(&rig, 16 * TIB);
    put(&rig, 0, SECTOR, 'a');
    put(&rig, 8 * TIB, SECTOR, 'b');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    rig_close(&rig, true);
    struct stored_layer *head = rig_head(&rig);
    memset(head->bitmap.calls, 0, sizeof head->bitmap.calls);
    rig_open(&rig, 16 * TIB, boot_id);
    CHECK_EQUAL(head->bitmap.calls[DISK_READ], 1);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 2);
    CHECK_EQUAL(head->bitmap.calls[DISK_READ], 3);
    CHECK_EQUAL(ae_seek_data(rig.volume, SECTOR), 8 * TIB);
    CHECK_EQUAL(ae_seek_data(rig.volume, 8 * TIB + SECTOR), -ENXIO);
    CHECK_EQUAL(ae_seek_hole(rig.volume, 8 * TIB), 8 * TIB + SECTOR);
    CHECK(head->bitmap.calls[DISK_READ] <= 6);
    CHECK_EQUAL(ae_discard(rig.volume, 0, 16 * TIB), 0);
    CHECK_EQUAL(head->data.calls[DISK_PUNCH], 2);
    CHECK_EQUAL(ae_seek_data(rig.volume, 0), -ENXIO);
    rig_end(&rig);
}

static uint64_t journeys(const struct rig *rig) {
    const struct stored_layer *head = &rig->stored[rig->count - 1];
    uint64_t count = 0;
    for (enum disk_call call = 0; call < DISK_CALLS; call++)
        count += head->data.calls[call] + head->bitmap.calls[call];
    return count;
}

/* What a volume costs that lies behind a network, in calls to the store: each is a journey. */
static void test_journeys_are_few(void) {
    enum { WRITES = 10000, PAGES = 8192 };
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, TIB - SECTOR, SECTOR, 'z');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    rig_close(&rig, true);
    rig.machine.disks_wait = true;

    uint64_t before = journeys(&rig);
    rig_open(&rig, TIB, boot_id);
    CHECK(journeys(&rig) - before <= 3); /* the bitmap's header and size, the data's size */
    CHECK(ae_volume_waits(rig.volume));
    before = journeys(&rig);
    put(&rig, TIB / 2, SECTOR, 'a');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK(journeys(&rig) - before <= 5); /* a group of pages, and what a write and a flush are */

    uint64_t random = random_seed(3);
    before = rig_head(&rig)->bitmap.calls[DISK_READ];
    for (int i = 0; i < WRITES; i++)
        put(&rig, random_below(&random, TIB / SECTOR) * SECTOR, SECTOR, 'b');
    CHECK(rig_head(&rig)->bitmap.calls[DISK_READ] - before <= PAGES / 64);
    before = journeys(&rig);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK(journeys(&rig) - before <= PAGES / 256 + 3);
    int64_t counted = ae_layer_count(rig.layers[0]);
    CHECK(counted > WRITES - 100 && counted <= WRITES + 2);
    rig_close(&rig, true);

    rig_open(&rig, TIB, boot_id);
    before = journeys(&rig);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), counted);
    CHECK(journeys(&rig) - before <= 2 * PAGES / 64 + 1);
    before = journeys(&rig);
    for (uint64_t i = 0; i < 16; i++) /* each in another group */
        put(&rig, i * (TIB / 16) + 7 * SECTOR, SECTOR, 'c');
    CHECK(journeys(&rig) - before <= 2 * 16);
    before = journeys(&rig);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(journeys(&rig) - before, 3); /* data, all pages at once, bitmap */
    CHECK_EQUAL(get(&rig, TIB / 2), 'a');
    CHECK_EQUAL(get(&rig, TIB - SECTOR), 'z');
    rig_end(&rig);
}

/* What is written beside dirty pages tells of nothing that is not durable, and fails as they do. */
static void test_a_failed_flush_of_pages_in_a_gap(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    rig_close(&rig, true);
    rig.machine.disks_wait = true;
    rig_open(&rig, TIB, boot_id);
    const uint64_t page = 128 << 20;
    put(&rig, 0, SECTOR, 'a');
    put(&rig, 9 * page, SECTOR, 'b');
    disk_fail(&rig_head(&rig)->bitmap, DISK_WRITE, 1, -ENOSPC);
    CHECK_EQUAL(ae_flush(rig.volume), -ENOSPC);
    CHECK(ae_layer_dirty(rig.layers[0]));
    put(&rig, 4 * page, SECTOR, 'c');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK(!ae_layer_dirty(rig.layers[0]));
    uint64_t random = random_seed(1);
    rig_close(&rig, true);
    disk_power_cut(&rig_head(&rig)->bitmap, &random);
    disk_power_cut(&rig_head(&rig)->data, &random);
    rig_open(&rig, TIB, boot_id);
    CHECK(get(&rig, 0) == 'a' && get(&rig, 9 * page) == 'b' && get(&rig, 4 * page) == 'c' && get(&rig, 5 * page) == 0);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 3);
    rig_end(&rig);
}

/* Stores that are full or fail */

static void test_failed_write_leaves_the_old(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, 4 * SECTOR, 'a');
    rig_snapshot(&rig);
    struct stored_layer *head = rig_head(&rig);
    char bytes[2 * AE_SECTOR_BYTES] = {'b'};
    disk_fail(&head->data, DISK_WRITE, 1, -ENOSPC);
    CHECK_EQUAL(ae_write(rig.volume, bytes, sizeof bytes, 100), -ENOSPC);
    CHECK_EQUAL(get(&rig, 0), 'a');
    CHECK_EQUAL(get(&rig, 100), 'a');
    disk_fail(&head->data, DISK_PUNCH, 1, -EIO);
    CHECK_EQUAL(ae_discard(rig.volume, 0, 4 * SECTOR), -EIO);
    CHECK_EQUAL(get(&rig, SECTOR), 'a');
    disk_fail(&rig.stored[0].data, DISK_READ, 1, -EIO);
    CHECK_EQUAL(ae_write(rig.volume, bytes, 10, 100), -EIO);
    CHECK_EQUAL(get(&rig, 100), 'a');
    struct ae_statistics statistics;
    ae_volume_statistics(rig.volume, &statistics);
    CHECK_EQUAL(statistics.failed, 0);
    put(&rig, 100, 1, 'b');
    CHECK_EQUAL(get(&rig, 100), 'b');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    rig_end(&rig);
}

static void test_full_bitmap_object_is_not_fatal(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    put(&rig, 300 * (SECTOR << 15), SECTOR, 'b');
    struct stored_layer *head = rig_head(&rig);
    disk_fail(&head->bitmap, DISK_WRITE, 2, -ENOSPC);
    CHECK_EQUAL(ae_flush(rig.volume), -ENOSPC);
    CHECK(ae_layer_dirty(rig.layers[0]));
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK(!ae_layer_dirty(rig.layers[0]));
    rig_close(&rig, true);
    uint64_t random = 1;
    disk_power_cut(&head->data, &random);
    disk_power_cut(&head->bitmap, &random);
    rig_open(&rig, TIB, later_boot_id);
    CHECK_EQUAL(get(&rig, 0), 'a');
    CHECK_EQUAL(get(&rig, 300 * (SECTOR << 15)), 'b');
    rig_end(&rig);
}

static void check_poisoned(struct rig *rig) {
    CHECK_EQUAL(ae_flush(rig->volume), -EIO);
    CHECK_EQUAL(ae_write(rig->volume, "b", 1, 0), -EIO);
    CHECK_EQUAL(ae_discard(rig->volume, 0, 1), -EIO);
    CHECK_EQUAL(get(rig, 0), 'a');
    struct ae_statistics statistics;
    ae_volume_statistics(rig->volume, &statistics);
    CHECK_EQUAL(statistics.failed, EIO);
    /* What the live bitmap says of a store that lost writes is not believed, in the same boot either. */
    rig_close(rig, false);
    rig_open(rig, TIB, boot_id);
    CHECK(!ae_layer_recovered(rig->layers[0]));
    CHECK_EQUAL(get(rig, 0), 0);
    put(rig, 0, 1, 'c');
    CHECK_EQUAL(ae_flush(rig->volume), 0);
}

static void test_failed_data_flush_is_fatal(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    disk_fail(&rig_head(&rig)->data, DISK_FLUSH, 1, -ENOSPC);
    CHECK_EQUAL(ae_flush(rig.volume), -ENOSPC);
    check_poisoned(&rig);
    rig_end(&rig);
}

static void test_failed_bitmap_flush_is_fatal(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    struct stored_layer *head = rig_head(&rig);
    disk_fail(&head->bitmap, DISK_FLUSH, 1, -EIO);
    CHECK_EQUAL(ae_flush(rig.volume), -EIO);
    /* As a disk does that forgets what it could not write. */
    disk_free(&head->bitmap);
    CHECK_EQUAL(ae_bitmap_format(disk_object(&head->bitmap), head->id), 0);
    check_poisoned(&rig);
    rig_end(&rig);
}

static void test_failed_cut_is_fatal(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, 2 * SECTOR, 'a');
    disk_fail(&rig_head(&rig)->data, DISK_TRUNCATE, 1, -EIO);
    ae_volume_pause(rig.volume);
    CHECK_EQUAL(ae_volume_resize(rig.volume, SECTOR), -EIO);
    ae_volume_resume(rig.volume);
    CHECK_EQUAL(ae_write(rig.volume, "b", 1, 0), -EIO);
    rig_close(&rig, false);
    rig_open(&rig, SECTOR, boot_id);
    ae_volume_pause(rig.volume);
    CHECK_EQUAL(ae_volume_resize(rig.volume, 2 * SECTOR), 0);
    ae_volume_resume(rig.volume);
    CHECK_EQUAL(get(&rig, SECTOR), 0);
    rig_end(&rig);
}

/* Nothing is flushed that is clean: a flush after a flush asks nothing of the store. */
static void test_first_writes_come_in_pieces(void) {
    const uint64_t piece = DISK_FIRST_WRITE_BYTES;
    struct rig rig;
    rig_start(&rig, TIB);
    uint64_t *writes = &rig_head(&rig)->data.calls[DISK_WRITE];
    put(&rig, piece / 2, 3 * piece, 'a');
    CHECK_EQUAL(*writes, 4);
    put(&rig, piece / 2, 3 * piece, 'b');
    CHECK_EQUAL(*writes, 5);
    /* A piece that fails leaves those before it without bits, so with the old content. */
    rig_snapshot(&rig);
    disk_fail(&rig_head(&rig)->data, DISK_WRITE, 3, -ENOSPC);
    char bytes[3 * DISK_FIRST_WRITE_BYTES];
    memset(bytes, 'c', sizeof bytes);
    CHECK_EQUAL(ae_write(rig.volume, bytes, sizeof bytes, piece / 2), -ENOSPC);
    CHECK_EQUAL(ae_read(rig.volume, bytes, sizeof bytes, piece / 2), sizeof bytes);
    for (size_t i = 0; i < sizeof bytes; i++)
        CHECK_EQUAL(bytes[i], 'b');
    rig_end(&rig);
}

static void test_flush_does_what_is_needed(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    struct stored_layer *head = rig_head(&rig);
    uint64_t bitmap_flushes = head->bitmap.calls[DISK_FLUSH];
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(head->data.calls[DISK_FLUSH], 0);
    put(&rig, 0, SECTOR, 'a');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(head->data.calls[DISK_FLUSH], 1);
    CHECK_EQUAL(head->bitmap.calls[DISK_FLUSH], bitmap_flushes + 1);
    put(&rig, 0, SECTOR, 'b');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(head->data.calls[DISK_FLUSH], 2);
    CHECK_EQUAL(head->bitmap.calls[DISK_FLUSH], bitmap_flushes + 1);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(head->data.calls[DISK_FLUSH], 2);
    rig_end(&rig);
}

/* A snapshot that a clone shares is flushed by whichever of the two comes first. */
static void test_shared_layer(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    rig_snapshot(&rig);
    struct stored_layer clone;
    stored_layer_init(&clone, &rig.machine, rig.directory, 9);
    clone.parent_visible = TIB;
    struct ae_layer *layers[2] = {stored_layer_open(&clone, true, true, boot_id), rig.layers[1]};
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(layers, 2, TIB, true, &volume), 0);
    CHECK(ae_layer_dirty(rig.layers[1]));
    CHECK_EQUAL(access(rig.stored[0].live_path, F_OK), 0);
    CHECK_EQUAL(ae_flush(volume), 0);
    CHECK(!ae_layer_dirty(rig.layers[1]));
    CHECK_EQUAL(access(rig.stored[0].live_path, F_OK), -1);
    CHECK_EQUAL(access(clone.live_path, F_OK), 0);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(get(&rig, 0), 'a');
    ae_volume_close(volume, true);
    ae_layer_release(layers[0]);
    stored_layer_free(&clone);
    rig_end(&rig);
}

/* A flush of the frozen layer fails: whoever stands on it must not say that it is durable. */
static void test_failed_flush_of_a_shared_layer(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    rig_snapshot(&rig);
    struct stored_layer clone;
    stored_layer_init(&clone, &rig.machine, rig.directory, 9);
    clone.parent_visible = TIB;
    struct ae_layer *layers[2] = {stored_layer_open(&clone, true, true, boot_id), rig.layers[1]};
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(layers, 2, TIB, true, &volume), 0);
    disk_fail(&rig.stored[0].data, DISK_FLUSH, 1, -EIO);
    CHECK_EQUAL(ae_flush(volume), -EIO);
    CHECK_EQUAL(ae_flush(rig.volume), -EIO);
    CHECK_EQUAL(ae_write(rig.volume, "b", 1, 0), -EIO);
    ae_volume_close(volume, false);
    ae_layer_release(layers[0]);
    stored_layer_free(&clone);
    rig_end(&rig);
}

/* The gate */

struct door {
    struct ae_volume *volume;
    ssize_t result;
    atomic_int done;
};

static void *door_write(void *argument) {
    struct door *door = argument;
    door->result = ae_write(door->volume, "b", 1, 0);
    atomic_store(&door->done, 1);
    return NULL;
}

static void door_check(bool fenced) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, 1, 'a');
    struct door door = {.volume = rig.volume};
    char byte;
    CHECK_EQUAL(ae_read_nowait(rig.volume, &byte, 1, 0), 1);
    ae_volume_pause(rig.volume);
    CHECK_EQUAL(ae_read_nowait(rig.volume, &byte, 1, 0), -EAGAIN);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, door_write, &door) == 0);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    CHECK_EQUAL(atomic_load(&door.done), 0);
    if (fenced)
        ae_volume_fence(rig.volume);
    else
        ae_volume_resume(rig.volume);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_EQUAL(door.result, fenced ? -EIO : 1);
    if (fenced) {
        ae_volume_resume(rig.volume);
        CHECK_EQUAL(ae_flush(rig.volume), -EIO);
        CHECK_EQUAL(get(&rig, 0), 'a');
        rig_close(&rig, false);
        rig_open(&rig, TIB, boot_id);
        CHECK(!ae_layer_recovered(rig.layers[0]));
    }
    rig_end(&rig);
}

static void test_pause_holds_writers(void) { door_check(false); }

static void test_fence(void) { door_check(true); }

static void test_swaps_that_cannot_be(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    CHECK_EQUAL(ae_volume_swap_head(rig.volume, rig.layers[0]), -EINVAL);
    struct stored_layer other;
    stored_layer_init(&other, &rig.machine, rig.directory, 5);
    struct ae_layer *layer = stored_layer_open(&other, false, false, boot_id);
    CHECK_EQUAL(ae_volume_swap_head(rig.volume, layer), -EINVAL);
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(&layer, 1, TIB, true, &volume), -EINVAL);
    CHECK_EQUAL(ae_volume_open(&layer, 0, TIB, false, &volume), -EINVAL);
    CHECK_EQUAL(ae_volume_open(&layer, 1, AE_SIZE_MAX + 1, false, &volume), -EFBIG);
    CHECK_EQUAL(ae_volume_open(&layer, 1, TIB, false, &volume), 0);
    CHECK_EQUAL(ae_write(volume, "b", 1, 0), -EROFS);
    CHECK_EQUAL(ae_discard(volume, 0, 1), -EROFS);
    CHECK_EQUAL(ae_volume_resize(volume, 1), -EROFS);
    CHECK_EQUAL(ae_flush(volume), 0);
    ae_volume_close(volume, false);
    ae_layer_release(layer);
    stored_layer_free(&other);
    rig_end(&rig);
}

static void test_nowait_loads_no_bitmap(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    rig_close(&rig, true);
    rig_open(&rig, TIB, boot_id);
    char byte;
    CHECK_EQUAL(ae_read_nowait(rig.volume, &byte, 1, 0), -EAGAIN);
    CHECK_EQUAL(ae_read_nowait(rig.volume, &byte, 1, TIB / 2), 1);
    CHECK_EQUAL(get(&rig, 0), 'a');
    CHECK_EQUAL(ae_read_nowait(rig.volume, &byte, 1, 0), 1);
    rig.machine.nowait_misses = 100;
    CHECK_EQUAL(ae_read_nowait(rig.volume, &byte, 1, 0), -EAGAIN);
    rig_end(&rig);
}

/* Headers and live files */

static int open_result(struct stored_layer *stored, const uint8_t boot[16], bool *recovered) {
    struct ae_layer_spec spec = {
        .data = disk_object(&stored->data),
        .bitmap = disk_object(&stored->bitmap),
        .live_path = stored->live_path,
        .head = true,
    };
    memcpy(spec.id, stored->id, sizeof spec.id);
    memcpy(spec.boot_id, boot, sizeof spec.boot_id);
    struct ae_layer *layer;
    int result = ae_layer_open(&spec, &layer);
    if (result == 0) {
        if (recovered != NULL)
            *recovered = ae_layer_recovered(layer);
        ae_layer_release(layer);
    }
    return result;
}

static void test_bitmap_headers(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    struct stored_layer stored;
    stored_layer_init(&stored, &rig.machine, rig.directory, 7);
    CHECK_EQUAL(open_result(&stored, boot_id, NULL), 0);
    uint8_t good[AE_SECTOR_BYTES], bytes[AE_SECTOR_BYTES];
    struct ae_object object = disk_object(&stored.bitmap);
    CHECK_EQUAL(object.ops->pread(object.ctx, good, sizeof good, 0), 0);
    for (size_t i = 0; i < 64; i++) {
        memcpy(bytes, good, sizeof bytes);
        bytes[i] ^= 4;
        CHECK_EQUAL(object.ops->pwrite(object.ctx, bytes, sizeof bytes, 0), 0);
        CHECK_EQUAL(open_result(&stored, boot_id, NULL), -EUCLEAN);
    }
    /* Version 2, with the checksum that belongs to it. */
    static const uint8_t later[64] = {'a', 'r', 'c', 'h', 'b', 'i', 't', 's', 2, 0, 0, 0, 0xf6, 0x94, 0x7d, 0x00};
    memset(bytes, 0, sizeof bytes);
    memcpy(bytes, later, sizeof later);
    CHECK_EQUAL(object.ops->pwrite(object.ctx, bytes, sizeof bytes, 0), 0);
    CHECK_EQUAL(open_result(&stored, boot_id, NULL), -EPROTONOSUPPORT);
    CHECK_EQUAL(object.ops->pwrite(object.ctx, good, sizeof good, 0), 0);
    stored.id[3] ^= 1;
    CHECK_EQUAL(open_result(&stored, boot_id, NULL), -EUCLEAN);
    disk_free(&stored.bitmap);
    CHECK_EQUAL(open_result(&stored, boot_id, NULL), -EUCLEAN);
    disk_fail(&stored.bitmap, DISK_READ, 1, -ETIMEDOUT);
    CHECK_EQUAL(open_result(&stored, boot_id, NULL), -ETIMEDOUT);
    stored_layer_free(&stored);
    rig_end(&rig);
}

static void live_damage(const char *path, off_t offset, uint8_t byte) {
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0 && pwrite(fd, &byte, 1, offset) == 1);
    close(fd);
}

static void test_live_files_that_are_not_believed(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    rig_close(&rig, false);
    struct stored_layer *head = rig_head(&rig);
    bool recovered;
    CHECK_EQUAL(open_result(head, boot_id, &recovered), 0);
    CHECK(recovered);
    CHECK_EQUAL(open_result(head, later_boot_id, &recovered), 0);
    CHECK(!recovered);
    CHECK_EQUAL(open_result(head, later_boot_id, &recovered), 0);
    CHECK(recovered);
    for (off_t offset = 0; offset < 48; offset++) {
        live_damage(head->live_path, offset, 0x77);
        CHECK_EQUAL(open_result(head, boot_id, &recovered), 0);
        CHECK(!recovered);
    }
    live_damage(head->live_path, 4096 + 10, 9);
    CHECK_EQUAL(open_result(head, boot_id, &recovered), 0);
    CHECK(!recovered);
    CHECK_EQUAL(truncate(head->live_path, 4096), 0);
    CHECK_EQUAL(open_result(head, boot_id, &recovered), 0);
    CHECK(!recovered);
    CHECK_EQUAL(unlink(head->live_path), 0);
    CHECK_EQUAL(open_result(head, boot_id, &recovered), 0);
    CHECK(!recovered);
    char path[sizeof head->live_path];
    memcpy(path, head->live_path, sizeof path);
    snprintf(head->live_path, sizeof head->live_path, "%s/absent/live", rig.directory);
    CHECK_EQUAL(open_result(head, boot_id, &recovered), -ENOENT);
    memcpy(head->live_path, path, sizeof path);
    rig_open(&rig, TIB, boot_id);
    rig_end(&rig);
}

/* Killed between turning a page clean and writing it: the page counts as dirty again. */
static void test_killed_within_a_flush(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    struct stored_layer *head = rig_head(&rig);
    struct disk before;
    uint64_t random = 3;
    disk_copy_cut(&head->bitmap, &before, &random);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    rig_close(&rig, false);
    struct disk after = head->bitmap;
    head->bitmap = before;
    rig_open(&rig, TIB, boot_id);
    CHECK(ae_layer_recovered(rig.layers[0]) && ae_layer_dirty(rig.layers[0]));
    CHECK_EQUAL(get(&rig, 0), 'a');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    rig_close(&rig, true);
    rig_open(&rig, TIB, later_boot_id);
    CHECK_EQUAL(get(&rig, 0), 'a');
    disk_free(&after);
    rig_end(&rig);
}

/* Killed after a snapshot and before the old head was flushed: its live bitmap is found below the new head. */
static void test_killed_within_a_snapshot(void) {
    struct rig rig;
    rig_start(&rig, TIB);
    put(&rig, 0, SECTOR, 'a');
    rig_snapshot(&rig);
    put(&rig, SECTOR, 1, 'b');
    rig_close(&rig, false);
    rig_open(&rig, TIB, boot_id);
    CHECK(ae_layer_recovered(rig.layers[0]) && ae_layer_recovered(rig.layers[1]));
    CHECK_EQUAL(get(&rig, 0), 'a');
    CHECK_EQUAL(get(&rig, SECTOR), 'b');
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(access(rig.stored[0].live_path, F_OK), -1);
    CHECK_EQUAL(access(rig.stored[1].live_path, F_OK), 0);
    rig_close(&rig, true);
    CHECK_EQUAL(access(rig.stored[1].live_path, F_OK), -1);
    rig_open(&rig, TIB, later_boot_id);
    CHECK_EQUAL(get(&rig, 0), 'a');
    CHECK_EQUAL(get(&rig, SECTOR), 'b');
    rig_end(&rig);
}

/* Files */

static void test_file_objects(void) {
    char directory[128];
    directory_make(directory);
    int fd = open(directory, O_TMPFILE | O_RDWR, 0600);
    CHECK(fd >= 0);
    struct ae_object object;
    CHECK_EQUAL(ae_object_file(fd, &object), 0);
    close(fd);
    const struct ae_object_ops *ops = object.ops;
    char bytes[8192], *large = malloc(1 << 20);
    CHECK(large != NULL);
    uint64_t at;
    memset(bytes, 'x', sizeof bytes);
    CHECK_EQUAL(ops->pread(object.ctx, bytes, sizeof bytes, 1 << 20), 0);
    CHECK(bytes[0] == 0 && bytes[8191] == 0);
    CHECK_EQUAL(ops->next_data(object.ctx, 0, &at), -ENXIO);
    CHECK_EQUAL(ops->next_hole(object.ctx, 0, &at), -ENXIO);
    CHECK_EQUAL(ops->punch(object.ctx, 0, TIB), 0);
    memset(large, 'a', 1 << 20);
    CHECK_EQUAL(ops->pwrite(object.ctx, large, 1 << 20, 4096), 0);
    CHECK_EQUAL(ops->size(object.ctx, &at), 0);
    CHECK_EQUAL(at, (1 << 20) + 4096);
    CHECK_EQUAL(ops->pread(object.ctx, bytes, sizeof bytes, at - 4096), 0);
    CHECK(bytes[4095] == 'a' && bytes[4096] == 0);
    memset(bytes, 'x', sizeof bytes);
    int result = ops->pread_nowait(object.ctx, bytes, sizeof bytes, at - 4096);
    CHECK(result == -EAGAIN || (result == 0 && bytes[4095] == 'a' && bytes[4096] == 0));
    CHECK_EQUAL(ops->punch(object.ctx, 8192, TIB), 0);
    CHECK_EQUAL(ops->size(object.ctx, &at), 0);
    CHECK_EQUAL(at, (1 << 20) + 4096);
    CHECK_EQUAL(ops->next_data(object.ctx, 0, &at), 0);
    CHECK_EQUAL(at, 4096);
    CHECK_EQUAL(ops->next_hole(object.ctx, 4096, &at), 0);
    CHECK_EQUAL(at, 8192);
    CHECK_EQUAL(ops->truncate(object.ctx, 100), 0);
    CHECK_EQUAL(ops->flush(object.ctx), 0);
    ops->close(object.ctx);
    CHECK_EQUAL(ae_object_file(-1, &object), -EBADF);
    free(large);
    directory_remove(directory);
}

int main(void) {
    static const struct test tests[] = {
        {"ranges at the borders of the number line", test_ranges},
        {"growth shows zeros, not the parent", test_growth_shows_zeros},
        {"growth by itself", test_grow},
        {"the time of change", test_the_time_of_change},
        {"open cuts the data object", test_open_cuts_the_data_object},
        {"large and empty is cheap", test_large_and_empty_is_cheap},
        {"journeys are few", test_journeys_are_few},
        {"a failed flush of pages in a gap", test_a_failed_flush_of_pages_in_a_gap},
        {"a failed write leaves the old", test_failed_write_leaves_the_old},
        {"a full bitmap object is not fatal", test_full_bitmap_object_is_not_fatal},
        {"a failed data flush is fatal", test_failed_data_flush_is_fatal},
        {"a failed bitmap flush is fatal", test_failed_bitmap_flush_is_fatal},
        {"a failed cut is fatal", test_failed_cut_is_fatal},
        {"first writes come in pieces", test_first_writes_come_in_pieces},
        {"a flush does what is needed", test_flush_does_what_is_needed},
        {"a shared layer", test_shared_layer},
        {"a failed flush of a shared layer", test_failed_flush_of_a_shared_layer},
        {"pause holds writers", test_pause_holds_writers},
        {"a fence is for good", test_fence},
        {"swaps that cannot be", test_swaps_that_cannot_be},
        {"nowait loads no bitmap", test_nowait_loads_no_bitmap},
        {"bitmap headers", test_bitmap_headers},
        {"live files that are not believed", test_live_files_that_are_not_believed},
        {"killed within a flush", test_killed_within_a_flush},
        {"killed within a snapshot", test_killed_within_a_snapshot},
        {"file objects", test_file_objects},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
