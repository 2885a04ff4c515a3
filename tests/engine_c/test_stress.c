/*
 * Many threads on one volume, while heads are swapped and flushed under them.
 *
 * Lanes: each writer owns one lane of bytes in every sector, so writers share sectors and never bytes; whatever it
 * wrote or discarded last must be there. Sequence: one writer stamps rising numbers into slots; a frozen chain must
 * hold an exact prefix of them, and a power cut at any moment must leave all that a returned flush covered.
 */
#include "check.h"
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#define SECTOR ((uint64_t)AE_SECTOR_BYTES)

static const uint8_t boot_id[16] = {1};

static void pause_ms(long ms) { nanosleep(&(struct timespec){.tv_nsec = ms * 1000000}, NULL); }

/* Lanes */

#define LANES 4
#define LANE_BYTES (SECTOR / LANES)
#define LANE_SECTORS 96
#define LANE_ROUNDS 6000
/* So that two bitmap pages are in play. */
#define LANE_START ((UINT64_C(128) << 20) - LANE_SECTORS / 2 * SECTOR)
#define SWAPS_MAX (CHAIN_MAX - 1)

struct lanes {
    struct ae_volume *volume;
    atomic_bool stop;
    uint32_t last[LANES][LANE_SECTORS];
};

struct lane {
    struct lanes *lanes;
    unsigned number;
};

static uint64_t lane_offset(unsigned lane, unsigned sector) { return LANE_START + sector * SECTOR + lane * LANE_BYTES; }

static void check_lane(struct lanes *lanes, unsigned lane, unsigned sector) {
    uint32_t words[LANE_BYTES / 4];
    CHECK_EQUAL(ae_read(lanes->volume, words, sizeof words, lane_offset(lane, sector)), sizeof words);
    for (size_t i = 0; i < LANE_BYTES / 4; i++)
        CHECK_EQUAL(words[i], lanes->last[lane][sector]);
}

static void *lane_run(void *argument) {
    struct lane *lane = argument;
    struct lanes *lanes = lane->lanes;
    uint64_t random = random_seed(lane->number);
    for (uint32_t round = 1; round <= LANE_ROUNDS; round++) {
        unsigned sector = (unsigned)random_below(&random, LANE_SECTORS);
        uint64_t offset = lane_offset(lane->number, sector);
        if (random_below(&random, 5) == 0) {
            CHECK_EQUAL(ae_discard(lanes->volume, offset, LANE_BYTES), 0);
            lanes->last[lane->number][sector] = 0;
        } else {
            uint32_t words[LANE_BYTES / 4];
            uint32_t stamp = round << 4 | (lane->number + 1);
            for (size_t i = 0; i < LANE_BYTES / 4; i++)
                words[i] = stamp;
            CHECK_EQUAL(ae_write(lanes->volume, words, sizeof words, offset), sizeof words);
            lanes->last[lane->number][sector] = stamp;
        }
        check_lane(lanes, lane->number, (unsigned)random_below(&random, LANE_SECTORS));
    }
    return NULL;
}

/* Whole sectors beside the lanes: written, read back, discarded. */
static void *blocks_run(void *argument) {
    struct lanes *lanes = argument;
    uint64_t random = random_seed(77);
    static uint8_t bytes[8 * AE_SECTOR_BYTES], read_back[8 * AE_SECTOR_BYTES];
    for (unsigned round = 0; !atomic_load(&lanes->stop); round++) {
        uint64_t offset = LANE_START + (LANE_SECTORS + random_below(&random, 64)) * SECTOR;
        uint64_t length = (1 + random_below(&random, 8)) * SECTOR;
        memset(bytes, (int)(round % 255 + 1), length);
        CHECK_EQUAL(ae_write(lanes->volume, bytes, length, offset), length);
        if (round % 3 == 0) {
            CHECK_EQUAL(ae_write_zeros(lanes->volume, offset, length), 0);
            memset(bytes, 0, length);
        }
        CHECK_EQUAL(ae_read(lanes->volume, read_back, length, offset), length);
        CHECK(memcmp(bytes, read_back, length) == 0);
    }
    return NULL;
}

static void *flush_run(void *argument) {
    struct lanes *lanes = argument;
    while (!atomic_load(&lanes->stop)) {
        CHECK_EQUAL(ae_flush(lanes->volume), 0);
        struct ae_statistics statistics;
        ae_volume_statistics(lanes->volume, &statistics);
        CHECK_EQUAL(statistics.failed, 0);
        CHECK(ae_seek_data(lanes->volume, 0) >= 0 || ae_seek_hole(lanes->volume, 0) == 0);
        sched_yield();
    }
    return NULL;
}

static int scratch_file(const char *directory) {
    int fd = open(directory, O_TMPFILE | O_RDWR, 0600);
    CHECK(fd >= 0);
    return fd;
}

static struct ae_layer *file_layer_open(const char *directory, unsigned number, const int fds[2], bool head,
                                        uint64_t parent_visible) {
    struct ae_layer_spec spec = {.parent_visible = parent_visible, .head = head};
    char path[160];
    snprintf(path, sizeof path, "%s/live-%u", directory, number);
    memcpy(spec.id, &number, sizeof number);
    memcpy(spec.boot_id, boot_id, sizeof boot_id);
    spec.live_path = path;
    CHECK_EQUAL(ae_object_file(fds[0], &spec.data), 0);
    CHECK_EQUAL(ae_object_file(fds[1], &spec.bitmap), 0);
    struct ae_layer *layer = NULL;
    CHECK_EQUAL(ae_layer_open(&spec, &layer), 0);
    return layer;
}

static void file_layer_create(const char *directory, unsigned number, int fds[2]) {
    uint8_t id[16] = {0};
    memcpy(id, &number, sizeof number);
    fds[0] = scratch_file(directory);
    fds[1] = scratch_file(directory);
    struct ae_object bitmap;
    CHECK_EQUAL(ae_object_file(fds[1], &bitmap), 0);
    CHECK_EQUAL(ae_bitmap_format(bitmap, id), 0);
    bitmap.ops->close(bitmap.ctx);
}

static void test_lanes(void) {
    char directory[128];
    directory_make(directory);
    int fds[CHAIN_MAX][2];
    struct ae_layer *layers[CHAIN_MAX];
    file_layer_create(directory, 0, fds[0]);
    layers[0] = file_layer_open(directory, 0, fds[0], true, AE_SIZE_MAX);
    static struct lanes lanes;
    memset(&lanes, 0, sizeof lanes);
    uint64_t size = LANE_START + 1024 * SECTOR;
    CHECK_EQUAL(ae_volume_open(layers, 1, size, true, &lanes.volume), 0);

    pthread_t threads[LANES], blocks, flusher;
    struct lane lane[LANES];
    for (unsigned i = 0; i < LANES; i++) {
        lane[i] = (struct lane){.lanes = &lanes, .number = i};
        CHECK(pthread_create(&threads[i], NULL, lane_run, &lane[i]) == 0);
    }
    CHECK(pthread_create(&blocks, NULL, blocks_run, &lanes) == 0);
    CHECK(pthread_create(&flusher, NULL, flush_run, &lanes) == 0);

    unsigned count = 1;
    while (count <= SWAPS_MAX) {
        pause_ms(2);
        file_layer_create(directory, count, fds[count]);
        layers[count] = file_layer_open(directory, count, fds[count], true, AE_SIZE_MAX);
        CHECK_EQUAL(ae_volume_swap_head(lanes.volume, layers[count]), size);
        count++;
        if (count % 8 == 0) {
            ae_volume_pause(lanes.volume);
            CHECK_EQUAL(ae_volume_resize(lanes.volume, size), 0);
            ae_volume_resume(lanes.volume);
        }
    }
    for (unsigned i = 0; i < LANES; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    atomic_store(&lanes.stop, true);
    CHECK(pthread_join(blocks, NULL) == 0);
    CHECK(pthread_join(flusher, NULL) == 0);

    /* Once as it is, once as after a killed process, once as after a clean end. */
    for (int time = 0; time < 3; time++) {
        for (unsigned lane = 0; lane < LANES; lane++)
            for (unsigned sector = 0; sector < LANE_SECTORS; sector++)
                check_lane(&lanes, lane, sector);
        bool clean = time == 1;
        if (clean)
            CHECK_EQUAL(ae_flush(lanes.volume), 0);
        ae_volume_close(lanes.volume, clean);
        for (unsigned i = 0; i < count; i++)
            ae_layer_release(layers[i]);
        if (time == 2)
            break;
        for (unsigned i = 0; i < count; i++) {
            unsigned number = count - 1 - i;
            layers[i] = file_layer_open(directory, number, fds[number], i == 0, AE_SIZE_MAX);
        }
        CHECK_EQUAL(ae_volume_open(layers, count, size, true, &lanes.volume), 0);
    }
    for (unsigned i = 0; i < count; i++) {
        close(fds[i][0]);
        close(fds[i][1]);
    }
    directory_remove(directory);
}

/* Sequence */

#ifndef SEQUENCE_ROUNDS
#define SEQUENCE_ROUNDS 12
#define HALVES_ROUNDS 1500
#endif

#define SLOTS 256
#define SLOT_BYTES 512

struct sequence {
    struct machine machine;
    struct ae_volume *volume;
    atomic_bool stop;
    _Atomic uint64_t written; /* the last number whose write returned */
    _Atomic uint64_t flushed; /* all up to it were written before a flush that returned */
};

static uint64_t slot_offset(uint64_t number) { return number % SLOTS * SLOT_BYTES * 3; }

static void *sequence_write(void *argument) {
    struct sequence *sequence = argument;
    uint64_t words[SLOT_BYTES / 8];
    for (uint64_t number = 1; !atomic_load(&sequence->stop); number++) {
        for (size_t i = 0; i < SLOT_BYTES / 8; i++)
            words[i] = number;
        CHECK_EQUAL(machine_write(&sequence->machine, sequence->volume, words, sizeof words, slot_offset(number)),
                    sizeof words);
        atomic_store(&sequence->written, number);
    }
    return NULL;
}

/* A second writer in the same sectors: whoever finds the other's bit set must not be flushed without it. */
static void *neighbour_write(void *argument) {
    struct sequence *sequence = argument;
    uint64_t random = random_seed(5);
    uint8_t bytes[SLOT_BYTES];
    memset(bytes, 0xaa, sizeof bytes);
    while (!atomic_load(&sequence->stop))
        CHECK_EQUAL(machine_write(&sequence->machine, sequence->volume, bytes, sizeof bytes,
                                  slot_offset(random_below(&random, SLOTS)) + SLOT_BYTES),
                    sizeof bytes);
    return NULL;
}

static void *sequence_flush(void *argument) {
    struct sequence *sequence = argument;
    while (!atomic_load(&sequence->stop)) {
        uint64_t written = atomic_load(&sequence->written);
        CHECK_EQUAL(ae_flush(sequence->volume), 0);
        uint64_t known = atomic_load(&sequence->flushed);
        while (known < written && !atomic_compare_exchange_weak(&sequence->flushed, &known, written))
            ;
    }
    return NULL;
}

/* Read the chain by itself. Each slot holds the newest number up to some `end`; returns it, and checks that it is one
 * for all slots (`exact`), or that no slot has less than `least` asks for. */
static uint64_t check_sequence(struct ae_layer **layers, size_t count, uint64_t least, bool exact) {
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(layers, count, SLOTS * SLOT_BYTES * 3, false, &volume), 0);
    uint64_t newest[SLOTS], end = 0;
    for (uint64_t slot = 0; slot < SLOTS; slot++) {
        uint64_t words[SLOT_BYTES / 8];
        CHECK_EQUAL(ae_read(volume, words, sizeof words, slot_offset(slot)), sizeof words);
        for (size_t i = 1; i < SLOT_BYTES / 8; i++)
            CHECK_EQUAL(words[i], words[0]);
        newest[slot] = words[0];
        CHECK(words[0] == 0 || words[0] % SLOTS == slot);
        if (words[0] > end)
            end = words[0];
    }
    CHECK(end >= least);
    uint64_t floor = exact ? end : least;
    for (uint64_t slot = 0; slot < SLOTS; slot++) {
        uint64_t behind = (floor + SLOTS - slot) % SLOTS;
        uint64_t expected = floor > behind ? floor - behind : 0;
        CHECK(exact ? newest[slot] == expected : newest[slot] >= expected);
    }
    ae_volume_close(volume, false);
    for (size_t i = 0; i < count; i++)
        ae_layer_release(layers[i]);
    return end;
}

#define SEQUENCE_SWAPS 40

static void sequence_round(uint64_t seed) {
    check_seed = seed;
    uint64_t random = random_seed(seed);
    static struct sequence sequence;
    memset(&sequence, 0, sizeof sequence);
    machine_start(&sequence.machine, seed);
    sequence.machine.disks_wait = seed % 2 == 1;
    sequence.machine.flush_ns = seed % 2 == 0 ? 50000 : 0;
    char directory[128];
    directory_make(directory);
    static struct stored_layer stored[SEQUENCE_SWAPS + 1];
    struct ae_layer *layers[SEQUENCE_SWAPS + 1];
    uint64_t written_at_swap[SEQUENCE_SWAPS + 1];
    stored_layer_init(&stored[0], &sequence.machine, directory, 0);
    layers[0] = stored_layer_open(&stored[0], true, true, boot_id);
    CHECK_EQUAL(ae_volume_open(layers, 1, SLOTS * SLOT_BYTES * 3, true, &sequence.volume), 0);

    pthread_t threads[4];
    CHECK(pthread_create(&threads[0], NULL, sequence_write, &sequence) == 0);
    CHECK(pthread_create(&threads[1], NULL, sequence_flush, &sequence) == 0);
    CHECK(pthread_create(&threads[2], NULL, sequence_flush, &sequence) == 0);
    CHECK(pthread_create(&threads[3], NULL, neighbour_write, &sequence) == 0);

    size_t count = 1;
    while (count <= SEQUENCE_SWAPS) {
        nanosleep(&(struct timespec){.tv_nsec = (long)random_below(&random, 1500000)}, NULL);
        struct stored_layer *fresh = &stored[count];
        stored_layer_init(fresh, &sequence.machine, directory, (unsigned)count);
        fresh->parent_visible = AE_SIZE_MAX;
        layers[count] = stored_layer_open(fresh, true, true, boot_id);
        written_at_swap[count - 1] = atomic_load(&sequence.written);
        CHECK(ae_volume_swap_head(sequence.volume, layers[count]) >= 0);
        count++;

        /* The power fails, in a copy of the world. */
        nanosleep(&(struct timespec){.tv_nsec = (long)random_below(&random, 1000000)}, NULL);
        static struct stored_layer cut[SEQUENCE_SWAPS + 1];
        pthread_mutex_lock(&sequence.machine.mutex);
        uint64_t flushed = atomic_load(&sequence.flushed);
        for (size_t i = 0; i < count; i++) {
            cut[i] = stored[i];
            disk_copy_cut(&stored[i].data, &cut[i].data, &random);
            disk_copy_cut(&stored[i].bitmap, &cut[i].bitmap, &random);
        }
        pthread_mutex_unlock(&sequence.machine.mutex);
        struct ae_layer *left[SEQUENCE_SWAPS + 1];
        for (size_t i = 0; i < count; i++)
            left[i] = stored_layer_open(&cut[count - 1 - i], false, false, boot_id);
        check_sequence(left, count, flushed, false);
        for (size_t i = 0; i < count; i++)
            stored_layer_free(&cut[i]);
    }
    atomic_store(&sequence.stop, true);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK_EQUAL(ae_flush(sequence.volume), 0);

    uint64_t before = 0;
    for (size_t top = 0; top + 1 < count; top++) {
        struct ae_layer *chain[SEQUENCE_SWAPS + 1];
        for (size_t i = 0; i <= top; i++)
            chain[i] = stored_layer_open(&stored[top - i], false, false, boot_id);
        uint64_t end = check_sequence(chain, top + 1, written_at_swap[top], true);
        CHECK(end >= before);
        before = end;
    }
    ae_volume_close(sequence.volume, true);
    for (size_t i = 0; i < count; i++) {
        ae_layer_release(layers[i]);
        stored_layer_free(&stored[i]);
    }
    directory_remove(directory);
    machine_stop(&sequence.machine);
}

static void test_sequence(void) {
    for (uint64_t seed = 0; seed < SEQUENCE_ROUNDS; seed++)
        sequence_round(seed);
}

/* A volume that grows by writes while heads are swapped loses none of them, nor its size. */

struct growth {
    struct ae_volume *volume;
    atomic_bool stop;
    _Atomic uint64_t sectors;
};

static void *growth_run(void *argument) {
    struct growth *growth = argument;
    uint8_t bytes[AE_SECTOR_BYTES];
    for (uint64_t i = 0; !atomic_load(&growth->stop); i++) {
        memset(bytes, (int)(i % 255 + 1), sizeof bytes);
        CHECK_EQUAL(ae_write(growth->volume, bytes, SECTOR, i * SECTOR), SECTOR);
        CHECK(ae_volume_size(growth->volume) >= (i + 1) * SECTOR);
        uint8_t back;
        CHECK_EQUAL(ae_read(growth->volume, &back, 1, (i + 1) * SECTOR - 1), 1);
        CHECK_EQUAL(back, i % 255 + 1);
        atomic_store(&growth->sectors, i + 1);
    }
    return NULL;
}

static void test_growth(void) {
    char directory[128];
    directory_make(directory);
    static struct growth growth;
    int fds[30][2];
    struct ae_layer *layers[30];
    file_layer_create(directory, 0, fds[0]);
    layers[0] = file_layer_open(directory, 0, fds[0], true, 0);
    CHECK_EQUAL(ae_volume_open(layers, 1, 0, true, &growth.volume), 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, growth_run, &growth) == 0);
    for (unsigned i = 1; i < 30; i++) {
        pause_ms(1);
        file_layer_create(directory, i, fds[i]);
        /* As far as was known before; the swap finds out how far it really went. */
        layers[i] = file_layer_open(directory, i, fds[i], true, ae_volume_size(growth.volume));
        pause_ms(1);
        CHECK(ae_volume_swap_head(growth.volume, layers[i]) >= (int64_t)(atomic_load(&growth.sectors) > 0));
    }
    atomic_store(&growth.stop, true);
    CHECK(pthread_join(thread, NULL) == 0);
    uint64_t sectors = atomic_load(&growth.sectors);
    CHECK_EQUAL(ae_volume_size(growth.volume), sectors * SECTOR);
    CHECK_EQUAL(ae_layer_live_size(layers[29]), sectors * SECTOR);
    for (uint64_t i = 0; i < sectors; i++) {
        uint8_t back;
        CHECK_EQUAL(ae_read(growth.volume, &back, 1, i * SECTOR), 1);
        CHECK_EQUAL(back, i % 255 + 1);
    }
    ae_volume_close(growth.volume, false);
    for (unsigned i = 0; i < 30; i++) {
        ae_layer_release(layers[i]);
        close(fds[i][0]);
        close(fds[i][1]);
    }
    directory_remove(directory);
}

/*
 * Two write to the two halves of one sector that is not in the head yet. One of them then flushes, and the power fails:
 * its half is there, though it may have been the other who set the bit.
 */

struct halves {
    struct ae_volume *volume;
    pthread_barrier_t start;
};

static void *half_write(void *argument) {
    struct halves *halves = argument;
    pthread_barrier_wait(&halves->start);
    CHECK_EQUAL(ae_write(halves->volume, "a", 1, 0), 1);
    return NULL;
}

static void halves_round(uint64_t seed) {
    uint64_t random = random_seed(seed);
    struct machine machine;
    machine_start(&machine, seed);
    static struct stored_layer stored, cut;
    char directory[128] = "";
    stored_layer_init(&stored, &machine, directory, 0);
    struct ae_layer *layer = stored_layer_open(&stored, true, false, boot_id);
    struct halves halves;
    CHECK_EQUAL(ae_volume_open(&layer, 1, SECTOR, true, &halves.volume), 0);
    CHECK(pthread_barrier_init(&halves.start, NULL, 2) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, half_write, &halves) == 0);
    pthread_barrier_wait(&halves.start);
    for (uint64_t spin = random_below(&random, 2000); spin > 0; spin--)
        atomic_signal_fence(memory_order_seq_cst);
    CHECK_EQUAL(ae_write(halves.volume, "b", 1, SECTOR / 2), 1);
    CHECK_EQUAL(ae_flush(halves.volume), 0);
    cut = stored;
    pthread_mutex_lock(&machine.mutex);
    disk_copy_cut(&stored.data, &cut.data, &random);
    disk_copy_cut(&stored.bitmap, &cut.bitmap, &random);
    pthread_mutex_unlock(&machine.mutex);
    CHECK(pthread_join(thread, NULL) == 0);
    ae_volume_close(halves.volume, true);
    ae_layer_release(layer);

    layer = stored_layer_open(&cut, false, false, boot_id);
    CHECK_EQUAL(ae_volume_open(&layer, 1, SECTOR, false, &halves.volume), 0);
    char byte;
    CHECK_EQUAL(ae_read(halves.volume, &byte, 1, SECTOR / 2), 1);
    CHECK_EQUAL(byte, 'b');
    ae_volume_close(halves.volume, false);
    ae_layer_release(layer);
    pthread_barrier_destroy(&halves.start);
    stored_layer_free(&cut);
    stored_layer_free(&stored);
    machine_stop(&machine);
}

static void test_halves(void) {
    for (uint64_t seed = 0; seed < HALVES_ROUNDS; seed++) {
        check_seed = seed;
        halves_round(seed);
    }
}

/* First writes, each beside a read of a part of the same sector: that sector's bit changes while it is looked at. */

#define FRESH_SECTORS 60000u

struct fresh {
    struct ae_volume *volume;
    atomic_uint reached;
};

static void *fresh_read(void *argument) {
    struct fresh *fresh = argument;
    unsigned sector;
    while ((sector = atomic_load(&fresh->reached)) < FRESH_SECTORS) {
        uint8_t bytes[64], beyond[64];
        memset(beyond, 0xee, sizeof beyond);
        CHECK_EQUAL(ae_read(fresh->volume, bytes, sizeof bytes, sector * SECTOR + SECTOR / 2), sizeof bytes);
        for (size_t i = 0; i < sizeof bytes; i++)
            CHECK((bytes[i] == 0 || bytes[i] == 7) && beyond[i] == 0xee);
    }
    return NULL;
}

static void test_fresh(void) {
    char directory[128];
    directory_make(directory);
    int fds[2];
    file_layer_create(directory, 0, fds);
    struct ae_layer *layer = file_layer_open(directory, 0, fds, true, 0);
    struct fresh fresh = {0};
    CHECK_EQUAL(ae_volume_open(&layer, 1, FRESH_SECTORS * SECTOR, true, &fresh.volume), 0);
    pthread_t reader;
    CHECK(pthread_create(&reader, NULL, fresh_read, &fresh) == 0);
    uint8_t bytes[AE_SECTOR_BYTES];
    memset(bytes, 7, sizeof bytes);
    for (unsigned sector = 0; sector < FRESH_SECTORS; sector++) {
        CHECK_EQUAL(ae_write(fresh.volume, bytes, sizeof bytes, sector * SECTOR), sizeof bytes);
        atomic_store(&fresh.reached, sector + 1);
    }
    CHECK(pthread_join(reader, NULL) == 0);
    ae_volume_close(fresh.volume, false);
    ae_layer_release(layer);
    close(fds[0]);
    close(fds[1]);
    directory_remove(directory);
}

int main(void) {
    static const struct test tests[] = {
        {"writers that share sectors, under swaps", test_lanes},
        {"prefixes in snapshots, flushes and power cuts", test_sequence},
        {"growth under swaps", test_growth},
        {"a bit that a neighbour set", test_halves},
        {"reads within sectors that get their bit", test_fresh},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
