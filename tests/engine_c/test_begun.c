/* Calls that begin on one thread and end on another: what waits for them, what refuses them, what they leave. */
#include "check.h"
#include "world.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#define SECTOR ((uint64_t)AE_SECTOR_BYTES)
#define SIZE (64 * SECTOR)

static const uint8_t boot_id[16] = {1};
static const uint8_t later_boot_id[16] = {2};

/* A volume of up to two layers, on disks behind a network. */
struct rig {
    struct machine machine;
    char directory[128];
    struct stored_layer stored[2];
    struct ae_layer *layers[2]; /* head first */
    size_t count;
    struct ae_volume *volume;
};

static void rig_open(struct rig *rig, const uint8_t boot[16]) {
    for (size_t i = 0; i < rig->count; i++)
        rig->layers[i] = stored_layer_open(&rig->stored[rig->count - 1 - i], i == 0, true, boot);
    CHECK_EQUAL(ae_volume_open(rig->layers, rig->count, SIZE, true, &rig->volume), 0);
}

static void rig_start(struct rig *rig) {
    memset(rig, 0, sizeof *rig);
    machine_start(&rig->machine, 1);
    rig->machine.disks_wait = true;
    rig->machine.begin_misses = 0;
    rig->machine.lands_at_once = false;
    directory_make(rig->directory);
    stored_layer_init(&rig->stored[0], &rig->machine, rig->directory, 0);
    rig->count = 1;
    rig_open(rig, boot_id);
}

static void rig_close(struct rig *rig) {
    ae_volume_close(rig->volume, false);
    for (size_t i = 0; i < rig->count; i++)
        ae_layer_release(rig->layers[i]);
}

static void rig_end(struct rig *rig) {
    rig_close(rig);
    for (size_t i = 0; i < rig->count; i++)
        stored_layer_free(&rig->stored[i]);
    directory_remove(rig->directory);
    machine_stop(&rig->machine);
}

static struct ae_layer *next_head(struct rig *rig) {
    struct stored_layer *fresh = &rig->stored[rig->count];
    stored_layer_init(fresh, &rig->machine, rig->directory, (unsigned)rig->count);
    fresh->parent_visible = AE_SIZE_MAX;
    return stored_layer_open(fresh, true, true, boot_id);
}

static void swap_to(struct rig *rig, struct ae_layer *head) {
    CHECK(ae_volume_swap_head(rig->volume, head) >= 0);
    memmove(&rig->layers[1], &rig->layers[0], rig->count * sizeof rig->layers[0]);
    rig->layers[0] = head;
    rig->count++;
}

static void put(struct rig *rig, uint64_t sector, char byte) {
    char bytes[AE_SECTOR_BYTES];
    memset(bytes, byte, sizeof bytes);
    CHECK_EQUAL(ae_write(rig->volume, bytes, sizeof bytes, sector * SECTOR), SECTOR);
}

static char get(struct rig *rig, uint64_t sector) {
    char byte = 'x';
    CHECK_EQUAL(ae_read(rig->volume, &byte, 1, sector * SECTOR), 1);
    return byte;
}

/* A transfer of one sector. */
struct trip {
    struct ae_begun begun;
    atomic_bool landed;
    char bytes[AE_SECTOR_BYTES];
};

static void note(struct ae_transfer *transfer) { atomic_store(&((struct trip *)transfer)->landed, true); }

static int trip_write(struct trip *trip, struct rig *rig, uint64_t sector, char byte) {
    *trip = (struct trip){.begun.transfer.landed = note};
    memset(trip->bytes, byte, sizeof trip->bytes);
    return ae_write_begin(rig->volume, trip->bytes, sizeof trip->bytes, sector * SECTOR, &trip->begun);
}

static int trip_read(struct trip *trip, struct rig *rig, uint64_t sector) {
    *trip = (struct trip){.begun.transfer.landed = note};
    return ae_read_begin(rig->volume, trip->bytes, sizeof trip->bytes, sector * SECTOR, &trip->begun);
}

static ssize_t trip_end(struct trip *trip, struct rig *rig) {
    while (!atomic_load(&trip->landed))
        CHECK(machine_land(&rig->machine));
    return ae_settle(&trip->begun);
}

/* The head's first bitmap page is at hand once something was written. */
static void rig_start_written(struct rig *rig) {
    rig_start(rig);
    put(rig, 0, 'z');
}

static void test_written_and_read(void) {
    struct rig rig;
    struct trip trip, other;
    rig_start_written(&rig);
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), 0);
    CHECK_EQUAL(trip_write(&other, &rig, 0, 'b'), 0);
    CHECK_EQUAL(trip_end(&other, &rig), SECTOR);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    CHECK_EQUAL(trip_read(&trip, &rig, 1), 0);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    CHECK(trip.bytes[0] == 'a' && trip.bytes[SECTOR - 1] == 'a');
    CHECK_EQUAL(get(&rig, 0), 'b');
    struct ae_statistics statistics;
    ae_volume_statistics(rig.volume, &statistics);
    CHECK_EQUAL(statistics.writes, 3);
    CHECK_EQUAL(statistics.written_bytes, 3 * SECTOR);
    CHECK_EQUAL(statistics.reads, 2);
    CHECK_EQUAL(statistics.read_bytes, SECTOR + 1);
    rig_end(&rig);
}

static void test_what_takes_more_than_one_transfer_is_not_begun(void) {
    struct rig rig;
    struct trip trip;
    rig_start(&rig);
    /* The bitmap page is not at hand, and nothing is there to read. */
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), -EAGAIN);
    CHECK_EQUAL(trip_read(&trip, &rig, 1), -EAGAIN);
    put(&rig, 1, 'a');
    char bytes[2 * AE_SECTOR_BYTES] = {0};
    /* A part of a sector that is not in the head yet; sectors of which one is not; beyond the end; nothing at all. */
    CHECK_EQUAL(ae_write_begin(rig.volume, bytes, 10, 2 * SECTOR + 5, &trip.begun), -EAGAIN);
    CHECK_EQUAL(ae_read_begin(rig.volume, bytes, sizeof bytes, SECTOR, &trip.begun), -EAGAIN);
    put(&rig, SIZE / SECTOR - 1, 'a');
    CHECK_EQUAL(ae_read_begin(rig.volume, bytes, sizeof bytes, SIZE - SECTOR, &trip.begun), -EAGAIN);
    CHECK_EQUAL(ae_read_begin(rig.volume, bytes, SECTOR, SIZE, &trip.begun), -EAGAIN);
    CHECK_EQUAL(ae_read_begin(rig.volume, bytes, 0, 0, &trip.begun), -EAGAIN);
    CHECK_EQUAL(ae_write_begin(rig.volume, bytes, 0, 0, &trip.begun), -EAGAIN);
    CHECK_EQUAL(ae_write_begin(rig.volume, bytes, SECTOR, UINT64_MAX - 10, &trip.begun), -EAGAIN);
    CHECK_EQUAL(ae_write_begin(rig.volume, bytes, SECTOR, AE_SIZE_MAX, &trip.begun), -EAGAIN);
    /* But a part of one that is. */
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'b'), 0);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    trip = (struct trip){.begun.transfer.landed = note};
    CHECK_EQUAL(ae_write_begin(rig.volume, "ccc", 3, SECTOR + 1, &trip.begun), 0);
    CHECK_EQUAL(trip_end(&trip, &rig), 3);
    CHECK_EQUAL(ae_read(rig.volume, bytes, 5, SECTOR), 5);
    CHECK_EQUAL(memcmp(bytes, "bcccb", 5), 0);
    ae_volume_fence(rig.volume);
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'd'), -EAGAIN);
    rig_end(&rig);
}

static void test_a_bit_is_set_when_it_is_settled(void) {
    struct rig rig;
    struct trip trip;
    rig_start_written(&rig);
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), 0);
    while (machine_land(&rig.machine))
        ;
    /* The data is there, but nobody has been told; a flush now does not count it. */
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 1);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 2);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    uint64_t random = random_seed(1);
    rig_close(&rig);
    disk_power_cut(&rig.stored[0].data, &random);
    disk_power_cut(&rig.stored[0].bitmap, &random);
    rig_open(&rig, later_boot_id);
    CHECK_EQUAL(get(&rig, 1), 'a');
    rig_end(&rig);
}

static void test_a_flush_after_it_makes_it_durable_where_the_bit_was_set_before(void) {
    struct rig rig;
    struct trip trip;
    rig_start_written(&rig);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    CHECK_EQUAL(trip_write(&trip, &rig, 0, 'a'), 0);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    CHECK_EQUAL(ae_flush(rig.volume), 0);
    for (uint64_t seed = 0; seed < 8; seed++) {
        struct disk cut;
        uint64_t random = random_seed(seed);
        pthread_mutex_lock(&rig.machine.mutex);
        disk_copy_cut(&rig.stored[0].data, &cut, &random);
        pthread_mutex_unlock(&rig.machine.mutex);
        struct ae_object object = disk_object(&cut);
        char byte;
        CHECK_EQUAL(object.ops->pread(object.ctx, &byte, 1, 0), 0);
        CHECK_EQUAL(byte, 'a');
        disk_free(&cut);
    }
    rig_end(&rig);
}

static void test_one_that_fails_sets_no_bit_and_holds_nothing(void) {
    struct rig rig;
    struct trip trip;
    rig_start_written(&rig);
    uint64_t changed_ns = ae_volume_changed_ns(rig.volume);
    ae_volume_forget_change(rig.volume);
    disk_fail(&rig.stored[0].data, DISK_WRITE, 1, -ENOSPC);
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), 0);
    CHECK_EQUAL(trip_end(&trip, &rig), -ENOSPC);
    CHECK(changed_ns != 0);
    CHECK_EQUAL(ae_volume_changed_ns(rig.volume), 0);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 1);
    CHECK_EQUAL(get(&rig, 1), 0);
    put(&rig, 1, 'b');
    CHECK_EQUAL(get(&rig, 1), 'b');
    rig_end(&rig);
}

static void test_one_of_unknown_outcome_is_as_if_it_had_not_been(void) {
    struct rig rig;
    struct trip trip;
    rig_start_written(&rig);
    rig.machine.begin_misses = 100;
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), -EAGAIN);
    rig.machine.begin_misses = 0;
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), 0);
    rig.machine.begin_misses = 100;
    CHECK_EQUAL(trip_end(&trip, &rig), -EAGAIN);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 1);
    struct ae_statistics statistics;
    ae_volume_statistics(rig.volume, &statistics);
    CHECK_EQUAL(statistics.writes, 1);
    put(&rig, 1, 'b');
    rig_end(&rig);
}

static void test_it_grows_the_volume_when_it_is_settled(void) {
    struct rig rig;
    struct trip trip;
    rig_start_written(&rig);
    CHECK_EQUAL(trip_write(&trip, &rig, 100, 'a'), 0);
    while (machine_land(&rig.machine))
        ;
    CHECK_EQUAL(ae_volume_size(rig.volume), SIZE);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    CHECK_EQUAL(ae_volume_size(rig.volume), 101 * SECTOR);
    CHECK_EQUAL(get(&rig, 100), 'a');
    rig_end(&rig);
}

/* What waits for it */

struct waiting {
    struct rig *rig;
    void (*wait)(struct waiting *waiting);
    struct ae_layer *head;
    atomic_bool done;
    pthread_t thread;
};

static void *waiting_run(void *argument) {
    struct waiting *waiting = argument;
    waiting->wait(waiting);
    atomic_store(&waiting->done, true);
    return NULL;
}

static void waiting_start(struct waiting *waiting, struct rig *rig, void (*wait)(struct waiting *waiting)) {
    *waiting = (struct waiting){.rig = rig, .wait = wait};
    CHECK(pthread_create(&waiting->thread, NULL, waiting_run, waiting) == 0);
}

static void expect_waiting(struct waiting *waiting) {
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    CHECK(!atomic_load(&waiting->done));
}

static void waiting_end(struct waiting *waiting) { CHECK(pthread_join(waiting->thread, NULL) == 0); }

static void put_there_too(struct waiting *waiting) { put(waiting->rig, 1, 'b'); }

static void test_a_first_write_has_its_range_for_itself(void) {
    struct rig rig;
    struct trip trip, other;
    struct waiting waiting;
    rig_start_written(&rig);
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), 0);
    CHECK_EQUAL(trip_write(&other, &rig, 1, 'c'), -EAGAIN);
    waiting_start(&waiting, &rig, put_there_too);
    expect_waiting(&waiting);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    waiting_end(&waiting);
    CHECK_EQUAL(get(&rig, 1), 'b');
    rig_end(&rig);
}

static void pause_and_resize(struct waiting *waiting) {
    ae_volume_pause(waiting->rig->volume);
    CHECK_EQUAL(ae_volume_resize(waiting->rig->volume, 0), 0);
    ae_volume_resume(waiting->rig->volume);
}

static void test_a_pause_waits_for_it_and_lets_none_begin(void) {
    struct rig rig;
    struct trip trip, other;
    struct waiting waiting;
    rig_start_written(&rig);
    CHECK_EQUAL(trip_write(&trip, &rig, 0, 'a'), 0);
    waiting_start(&waiting, &rig, pause_and_resize);
    int result;
    while ((result = trip_read(&other, &rig, 0)) == 0)
        CHECK_EQUAL(trip_end(&other, &rig), SECTOR);
    CHECK_EQUAL(result, -EAGAIN);
    CHECK_EQUAL(trip_write(&other, &rig, 0, 'b'), -EAGAIN);
    CHECK(!atomic_load(&waiting.done));
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    waiting_end(&waiting);
    CHECK_EQUAL(ae_volume_size(rig.volume), 0);
    rig_end(&rig);
}

static void swap(struct waiting *waiting) { swap_to(waiting->rig, waiting->head); }

static void test_a_swap_waits_for_it_and_nobody_else(void) {
    struct rig rig;
    struct trip trip;
    struct waiting waiting;
    rig_start_written(&rig);
    struct ae_layer *head = next_head(&rig);
    CHECK_EQUAL(trip_write(&trip, &rig, 1, 'a'), 0);
    waiting = (struct waiting){.rig = &rig, .wait = swap, .head = head};
    CHECK(pthread_create(&waiting.thread, NULL, waiting_run, &waiting) == 0);
    expect_waiting(&waiting);
    /* The new head takes writes all the same; the old one is what the first went to. */
    put(&rig, 2, 'b');
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    waiting_end(&waiting);
    CHECK_EQUAL(ae_layer_count(rig.layers[0]), 1);
    CHECK_EQUAL(ae_layer_count(rig.layers[1]), 2);
    CHECK_EQUAL(get(&rig, 1), 'a');
    rig_end(&rig);
}

static void close_volume(struct waiting *waiting) { ae_volume_close(waiting->rig->volume, false); }

static void test_the_end_of_the_volume_waits_for_it(void) {
    struct rig rig;
    struct trip trip;
    struct waiting waiting;
    rig_start_written(&rig);
    CHECK_EQUAL(trip_read(&trip, &rig, 0), 0);
    waiting_start(&waiting, &rig, close_volume);
    expect_waiting(&waiting);
    CHECK_EQUAL(trip_end(&trip, &rig), SECTOR);
    CHECK_EQUAL(trip.bytes[0], 'z');
    waiting_end(&waiting);
    ae_layer_release(rig.layers[0]);
    rig_open(&rig, boot_id);
    rig_end(&rig);
}

int main(void) {
    static const struct test tests[] = {
        {"written and read", test_written_and_read},
        {"what takes more than one transfer", test_what_takes_more_than_one_transfer_is_not_begun},
        {"a bit is set when it is settled", test_a_bit_is_set_when_it_is_settled},
        {"a flush after it", test_a_flush_after_it_makes_it_durable_where_the_bit_was_set_before},
        {"one that fails", test_one_that_fails_sets_no_bit_and_holds_nothing},
        {"one of unknown outcome", test_one_of_unknown_outcome_is_as_if_it_had_not_been},
        {"it grows the volume when it is settled", test_it_grows_the_volume_when_it_is_settled},
        {"a first write has its range for itself", test_a_first_write_has_its_range_for_itself},
        {"a pause waits for it", test_a_pause_waits_for_it_and_lets_none_begin},
        {"a swap waits for it", test_a_swap_waits_for_it_and_nobody_else},
        {"the end of the volume waits for it", test_the_end_of_the_volume_waits_for_it},
    };
    return run_tests(tests, sizeof tests / sizeof *tests);
}
