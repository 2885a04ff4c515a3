/*
 * What a seal asks of an engine: what has changed since a layer, and to go over to a sealed one while it is written,
 * snapshotted and flushed by several threads.
 */
#include "check.h"
#include "volume.h"
#include "world.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#define SECTOR ((uint64_t)AE_SECTOR_BYTES)
#define REGION ((uint64_t)AE_REGION_BYTES)
#define MIB (UINT64_C(1) << 20)
/* As many as a map has room for. */
#define MAP_REGIONS (UINT64_C(1) << 32)
#define SEALS 150

static const uint8_t boot_id[16] = {1};
static const uint8_t base_id[16] = {0xba, 0x5e};

static void pause_us(long us) { nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL); }

struct scene {
    struct machine machine;
    char directory[128];
    struct ae_table *table;
};

static void scene_start(struct scene *scene, uint64_t seed) {
    check_seed = seed;
    machine_start(&scene->machine, seed);
    directory_make(scene->directory);
    CHECK_EQUAL(ae_table_open(MIB, &scene->table), 0);
}

static void scene_end(struct scene *scene) {
    ae_table_release(scene->table);
    directory_remove(scene->directory);
    machine_stop(&scene->machine);
}

static int resolve_hollow(void *ctx, uint64_t region, struct ae_region **made) {
    (void)ctx, (void)region;
    return ae_region_make(0, MAP_REGIONS, NULL, 0, NULL, 0, made);
}

static void close_nothing(void *ctx) { (void)ctx; }

/* A sealed layer of zeros. */
static struct ae_layer *hollow_layer(struct scene *scene) {
    struct ae_resolver resolver = {.resolve = resolve_hollow, .close = close_nothing};
    struct ae_layer *layer = NULL;
    CHECK_EQUAL(ae_layer_open_sealed(base_id, scene->table, resolver, &layer), 0);
    return layer;
}

/* What has changed */

static void test_changes_since_a_layer(void) {
    struct scene scene;
    scene_start(&scene, 8);
    struct stored_layer stored[3];
    struct ae_layer *layers[4] = {NULL, NULL, NULL, hollow_layer(&scene)};
    for (unsigned i = 0; i < 3; i++)
        stored_layer_init(&stored[i], &scene.machine, scene.directory, i);
    /* The second shows 100 sectors and a half of what is below it. */
    stored[1].parent_visible = 100 * SECTOR + 1000;
    stored[0].parent_visible = stored[2].parent_visible = AE_SIZE_MAX;
    uint64_t size = UINT64_C(1) << 40;
    char bytes[SECTOR];
    memset(bytes, 'x', sizeof bytes);
    for (unsigned i = 3; i-- > 0;) {
        struct ae_layer *head = stored_layer_open(&stored[i], true, true, boot_id);
        struct ae_volume *volume;
        CHECK_EQUAL(ae_volume_open(&head, 1, size, true, &volume), 0);
        CHECK_EQUAL(ae_write(volume, bytes, SECTOR, (10 + i) * SECTOR), SECTOR);
        CHECK_EQUAL(ae_write(volume, bytes, SECTOR, size / 2 + 50 * i * MIB), SECTOR);
        CHECK_EQUAL(ae_flush(volume), 0);
        ae_volume_close(volume, true);
        ae_layer_release(head);
        layers[i] = stored_layer_open(&stored[i], false, false, boot_id);
    }
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(layers, 4, size, false, &volume), 0);
    uint64_t from, until;
    CHECK_EQUAL(ae_volume_next_change(volume, base_id, 0, size, &from, &until), 0);
    CHECK_EQUAL(from, 10 * SECTOR);
    CHECK_EQUAL(until, 13 * SECTOR);
    CHECK_EQUAL(ae_volume_next_change(volume, base_id, until, size, &from, &until), 0);
    CHECK_EQUAL(from, 100 * SECTOR);
    CHECK_EQUAL(until, size);
    /* The layer itself, and those below, do not count. */
    CHECK_EQUAL(ae_volume_next_change(volume, stored[1].id, 0, size, &from, &until), 0);
    CHECK_EQUAL(from, 10 * SECTOR);
    CHECK_EQUAL(until, 11 * SECTOR);
    CHECK_EQUAL(ae_volume_next_change(volume, stored[1].id, until, size, &from, &until), 0);
    CHECK_EQUAL(from, size / 2);
    CHECK_EQUAL(until, size / 2 + SECTOR);
    CHECK_EQUAL(ae_volume_next_change(volume, stored[1].id, until, size, &from, &until), -ENXIO);
    CHECK_EQUAL(ae_volume_next_change(volume, stored[0].id, 0, size, &from, &until), -ENXIO);
    uint8_t unknown[16] = {0xee};
    CHECK_EQUAL(ae_volume_next_change(volume, unknown, 0, size, &from, &until), -ENOENT);
    CHECK_EQUAL(ae_volume_next_change(volume, base_id, 1, size, &from, &until), -EINVAL);
    CHECK_EQUAL(ae_volume_next_change(volume, base_id, size, size, &from, &until), -ENXIO);
    CHECK_EQUAL(ae_volume_next_change(volume, base_id, 0, AE_SIZE_MAX + 1, &from, &until), -EINVAL);
    uint64_t end;
    CHECK_EQUAL(ae_volume_shows(volume, base_id, 20 * SECTOR, size, &end), 0);
    CHECK_EQUAL(end, 100 * SECTOR + 1000);
    ae_volume_close(volume, false);
    for (size_t i = 0; i < 4; i++)
        ae_layer_release(layers[i]);
    for (size_t i = 0; i < 3; i++)
        stored_layer_free(&stored[i]);
    scene_end(&scene);
}

/* Without a base, what was discarded is no data: a file system that is made discards the whole disk first. */
static void test_data_without_a_base(void) {
    struct machine machine;
    machine_start(&machine, 9);
    char directory[128];
    directory_make(directory);
    struct stored_layer stored;
    stored_layer_init(&stored, &machine, directory, 1);
    stored.parent_visible = AE_SIZE_MAX;
    struct ae_layer *head = stored_layer_open(&stored, true, true, boot_id);
    struct ae_volume *volume;
    uint64_t size = 400 * MIB + 100, from, until;
    CHECK_EQUAL(ae_volume_open(&head, 1, size, true, &volume), 0);
    CHECK_EQUAL(ae_discard(volume, 0, size), 0);
    CHECK_EQUAL(ae_volume_next_change(volume, NULL, 0, size, &from, &until), -ENXIO);
    CHECK_EQUAL(ae_write(volume, "abc", 3, 300 * MIB + 5), 3);
    CHECK_EQUAL(ae_write(volume, "abc", 3, size - 3), 3);
    CHECK_EQUAL(ae_volume_next_change(volume, NULL, 0, size, &from, &until), 0);
    CHECK_EQUAL(from, 300 * MIB);
    CHECK_EQUAL(until, 300 * MIB + SECTOR);
    CHECK_EQUAL(ae_volume_next_change(volume, NULL, until, size, &from, &until), 0);
    CHECK_EQUAL(from, 400 * MIB);
    CHECK_EQUAL(until, 400 * MIB + SECTOR);
    CHECK_EQUAL(ae_volume_next_change(volume, NULL, 0, 300 * MIB, &from, &until), -ENXIO);
    ae_volume_close(volume, true);
    ae_layer_release(head);
    stored_layer_free(&stored);
    directory_remove(directory);
    machine_stop(&machine);
}

/* Rebase */

struct lingerer {
    struct ae_volume *volume;
    struct ae_layer *fresh;
    atomic_bool swapped;
    int64_t size;
};

/* A part of a sector that the head does not have, beyond the end. */
static void *write_part(void *argument) {
    struct lingerer *lingerer = argument;
    CHECK_EQUAL(ae_write(lingerer->volume, "abc", 3, 10 * MIB + 5), 3);
    return NULL;
}

static void *swap_head(void *argument) {
    struct lingerer *lingerer = argument;
    lingerer->size = ae_volume_swap_head(lingerer->volume, lingerer->fresh);
    atomic_store(&lingerer->swapped, true);
    return NULL;
}

static uint64_t calls_inside(struct ae_volume *volume) {
    pthread_mutex_lock(&volume->gate);
    uint64_t inside = volume->inside;
    pthread_mutex_unlock(&volume->gate);
    return inside;
}

static bool is_draining(struct ae_volume *volume) {
    pthread_mutex_lock(&volume->gate);
    bool draining = volume->draining != NULL;
    pthread_mutex_unlock(&volume->gate);
    return draining;
}

/*
 * A writer is held up before it looks at the head's bits. The rebase does not wait for it; the swap after that does,
 * and counts what it wrote; and the writer, which completes a sector, does not wait for the swap.
 */
static void test_a_swap_waits_for_who_lingers_after_a_rebase(void) {
    struct scene scene;
    scene_start(&scene, 10);
    struct machine slow;
    machine_start(&slow, 1);
    struct stored_layer stored[3];
    struct ae_layer *layers[3];
    for (unsigned i = 0; i < 3; i++) {
        stored_layer_init(&stored[i], &scene.machine, scene.directory, i);
        stored[i].parent_visible = AE_SIZE_MAX;
    }
    /* The head has a page of bits in its object that is yet to be read. */
    layers[0] = stored_layer_open(&stored[0], true, true, boot_id);
    struct lingerer lingerer = {.size = 0};
    CHECK_EQUAL(ae_volume_open(layers, 1, MIB, true, &lingerer.volume), 0);
    CHECK_EQUAL(ae_write(lingerer.volume, "x", 1, 0), 1);
    CHECK_EQUAL(ae_flush(lingerer.volume), 0);
    ae_volume_close(lingerer.volume, true);
    ae_layer_release(layers[0]);

    layers[0] = stored_layer_open(&stored[0], true, true, boot_id);
    layers[1] = stored_layer_open(&stored[1], false, false, boot_id);
    layers[2] = lingerer.fresh = stored_layer_open(&stored[2], true, true, boot_id);
    CHECK_EQUAL(ae_volume_open(layers, 2, MIB, true, &lingerer.volume), 0);
    struct ae_layer *sealed = hollow_layer(&scene);
    CHECK_EQUAL(ae_volume_rebase(lingerer.volume, stored[0].id, sealed), -EBUSY);
    CHECK_EQUAL(ae_volume_rebase(lingerer.volume, stored[2].id, sealed), -ENOENT);
    CHECK_EQUAL(ae_volume_rebase(lingerer.volume, stored[1].id, layers[1]), -EINVAL);

    stored[0].bitmap.machine = &slow;
    pthread_mutex_lock(&slow.mutex);
    pthread_t writer, swapper;
    CHECK(pthread_create(&writer, NULL, write_part, &lingerer) == 0);
    while (calls_inside(lingerer.volume) == 0)
        sched_yield();
    CHECK_EQUAL(ae_volume_rebase(lingerer.volume, stored[1].id, sealed), 0);
    ae_layer_release(sealed);
    CHECK(pthread_create(&swapper, NULL, swap_head, &lingerer) == 0);
    while (!is_draining(lingerer.volume))
        sched_yield();
    pause_us(20000);
    CHECK(!atomic_load(&lingerer.swapped));
    pthread_mutex_unlock(&slow.mutex);
    CHECK(pthread_join(writer, NULL) == 0);
    CHECK(pthread_join(swapper, NULL) == 0);
    CHECK_EQUAL(lingerer.size, 10 * MIB + 8);
    struct ae_statistics counts;
    ae_volume_statistics(lingerer.volume, &counts);
    CHECK_EQUAL(counts.layers, 3);
    char bytes[3];
    CHECK_EQUAL(ae_read(lingerer.volume, bytes, 3, 10 * MIB + 5), 3);
    CHECK(memcmp(bytes, "abc", 3) == 0);
    /* The head below the new one is not durable yet. */
    sealed = hollow_layer(&scene);
    CHECK_EQUAL(ae_volume_rebase(lingerer.volume, stored[0].id, sealed), -EBUSY);
    CHECK_EQUAL(ae_flush(lingerer.volume), 0);
    CHECK_EQUAL(ae_volume_rebase(lingerer.volume, stored[0].id, sealed), 0);
    ae_layer_release(sealed);

    ae_volume_close(lingerer.volume, true);
    for (unsigned i = 0; i < 3; i++) {
        ae_layer_release(layers[i]);
        stored_layer_free(&stored[i]);
    }
    machine_stop(&slow);
    scene_end(&scene);
}

/* Sealing under load: writers own lanes of every sector, and must always find there what they wrote last. */

#define LANES 3
#define LANE_BYTES (SECTOR / 4)
#define LANE_SECTORS 64
/* Two regions, and two pages of the bitmap. */
#define LANE_START ((UINT64_C(128) << 20) - LANE_SECTORS / 2 * SECTOR)
#define LANE_END (LANE_START + LANE_SECTORS * SECTOR)

/* What one seal has made: both regions, in one pack. */
struct seal {
    struct machine *machine;
    struct disk disk;
    struct ae_pack *pack;
    struct ae_extent extents[2][LANE_SECTORS];
    size_t counts[2];
};

static int seal_resolve(void *ctx, uint64_t region, struct ae_region **made) {
    struct seal *seal = ctx;
    uint64_t middle = LANE_START / REGION + 1;
    pause_us((long)(region % 3) * 20);
    if (region != middle && region != middle - 1)
        return region < middle ? ae_region_make(0, middle - 1, NULL, 0, NULL, 0, made)
                               : ae_region_make(middle + 1, MAP_REGIONS, NULL, 0, NULL, 0, made);
    size_t which = region == middle;
    return ae_region_make(region, region + 1, seal->extents[which], seal->counts[which], &seal->pack, 1, made);
}

struct load {
    struct ae_volume *volume;
    struct ae_table *table;
    atomic_bool stop;
    uint32_t last[LANES][LANE_SECTORS];
};

struct lane {
    struct load *load;
    unsigned number;
};

static uint64_t lane_offset(unsigned lane, unsigned sector) { return LANE_START + sector * SECTOR + lane * LANE_BYTES; }

static void *lane_run(void *argument) {
    struct lane *lane = argument;
    struct load *load = lane->load;
    uint64_t random = random_seed(lane->number);
    uint32_t words[LANE_BYTES / 4];
    for (uint32_t round = 1; !atomic_load(&load->stop); round++) {
        unsigned sector = (unsigned)random_below(&random, LANE_SECTORS);
        uint32_t stamp = random_below(&random, 4) == 0 ? 0 : round << 4 | (lane->number + 1);
        for (size_t i = 0; i < LANE_BYTES / 4; i++)
            words[i] = stamp;
        if (stamp == 0)
            CHECK_EQUAL(ae_discard(load->volume, lane_offset(lane->number, sector), LANE_BYTES), 0);
        else
            CHECK_EQUAL(ae_write(load->volume, words, LANE_BYTES, lane_offset(lane->number, sector)), LANE_BYTES);
        load->last[lane->number][sector] = stamp;
        sector = (unsigned)random_below(&random, LANE_SECTORS);
        CHECK_EQUAL(ae_read(load->volume, words, LANE_BYTES, lane_offset(lane->number, sector)), LANE_BYTES);
        for (size_t i = 0; i < LANE_BYTES / 4; i++)
            CHECK_EQUAL(words[i], load->last[lane->number][sector]);
        pause_us(50);
    }
    return NULL;
}

static void *others_run(void *argument) {
    struct load *load = argument;
    uint8_t bytes[8 * SECTOR];
    while (!atomic_load(&load->stop)) {
        uint64_t from, until;
        int changed = ae_volume_next_change(load->volume, NULL, 0, LANE_END, &from, &until);
        CHECK(changed == 0 || changed == -ENXIO);
        CHECK_EQUAL(ae_read(load->volume, bytes, sizeof bytes, LANE_END - sizeof bytes), sizeof bytes);
        CHECK_EQUAL(ae_flush(load->volume), 0);
        ae_table_forget(load->table);
        CHECK(ae_table_bytes(load->table) <= 1000);
        pause_us(200);
    }
    return NULL;
}

/* Seal a frozen chain: its bytes go to a pack, sector by sector, the last one first. */
static struct ae_layer *seal_chain(struct seal *seal, struct load *load, struct machine *machine,
                                   struct ae_layer *const *chain, size_t count, const uint8_t id[16]) {
    static const uint8_t zeros[AE_SECTOR_BYTES];
    static uint8_t bytes[LANE_SECTORS][AE_SECTOR_BYTES];
    struct ae_volume *frozen;
    CHECK_EQUAL(ae_volume_open(chain, count, LANE_END, false, &frozen), 0);
    CHECK_EQUAL(ae_read(frozen, bytes, sizeof bytes, LANE_START), sizeof bytes);
    ae_volume_close(frozen, false);
    disk_init(&seal->disk, machine);
    struct ae_object object = disk_object(&seal->disk);
    seal->counts[0] = seal->counts[1] = 0;
    for (unsigned sector = 0; sector < LANE_SECTORS; sector++) {
        if (memcmp(bytes[sector], zeros, SECTOR) == 0)
            continue;
        uint64_t offset = (LANE_SECTORS - 1 - sector) * SECTOR, at = LANE_START / SECTOR + sector;
        CHECK_EQUAL(object.ops->pwrite(object.ctx, bytes[sector], SECTOR, offset), 0);
        size_t which = sector >= LANE_SECTORS / 2;
        seal->extents[which][seal->counts[which]++] =
            (struct ae_extent){.first = (uint16_t)(at % AE_REGION_SECTORS), .count = 1, .offset = offset};
    }
    CHECK_EQUAL(ae_pack_open(object, LANE_SECTORS * SECTOR, &seal->pack), 0);
    struct ae_resolver resolver = {.resolve = seal_resolve, .close = close_nothing, .ctx = seal};
    struct ae_layer *layer = NULL;
    CHECK_EQUAL(ae_layer_open_sealed(id, load->table, resolver, &layer), 0);
    return layer;
}

static void test_sealing_under_load(void) {
    struct machine machine;
    machine_start(&machine, 11);
    char directory[128];
    directory_make(directory);
    static struct stored_layer stored[SEALS + 1];
    static struct seal seals[SEALS];
    static struct load load;
    uint64_t random = random_seed(11);
    CHECK_EQUAL(ae_table_open(1000, &load.table), 0);
    stored_layer_init(&stored[0], &machine, directory, 1);
    struct ae_layer *chain[3] = {stored_layer_open(&stored[0], true, true, boot_id)};
    size_t depth = 1;
    CHECK_EQUAL(ae_volume_open(chain, 1, LANE_END, true, &load.volume), 0);

    pthread_t lanes[LANES], others;
    struct lane lane[LANES];
    for (unsigned i = 0; i < LANES; i++) {
        lane[i] = (struct lane){.load = &load, .number = i};
        CHECK(pthread_create(&lanes[i], NULL, lane_run, &lane[i]) == 0);
    }
    CHECK(pthread_create(&others, NULL, others_run, &load) == 0);

    for (unsigned i = 0; i < SEALS; i++) {
        pause_us((long)random_below(&random, 1500));
        stored_layer_init(&stored[i + 1], &machine, directory, i + 2);
        stored[i + 1].parent_visible = AE_SIZE_MAX;
        struct ae_layer *head = stored_layer_open(&stored[i + 1], true, true, boot_id);
        CHECK_EQUAL(ae_volume_swap_head(load.volume, head), LANE_END);
        CHECK_EQUAL(ae_volume_flush_parents(load.volume), 0);
        struct ae_layer *sealed = seal_chain(&seals[i], &load, &machine, chain, depth, stored[i].id);
        CHECK_EQUAL(ae_volume_rebase(load.volume, stored[i].id, sealed), 0);
        for (size_t layer = 0; layer < depth; layer++)
            ae_layer_release(chain[layer]);
        chain[0] = head;
        chain[1] = sealed;
        depth = 2;
        if (random_below(&random, 3) == 0) {
            pthread_mutex_lock(&machine.mutex);
            disk_fail(&seals[i].disk, DISK_READ, (unsigned)(1 + random_below(&random, 20)), -ENOENT);
            pthread_mutex_unlock(&machine.mutex);
        }
        if (i % 16 == 0) {
            ae_volume_pause(load.volume);
            ae_volume_resume(load.volume);
        }
    }
    atomic_store(&load.stop, true);
    for (unsigned i = 0; i < LANES; i++)
        CHECK(pthread_join(lanes[i], NULL) == 0);
    CHECK(pthread_join(others, NULL) == 0);
    struct ae_statistics counts;
    ae_volume_statistics(load.volume, &counts);
    CHECK_EQUAL(counts.layers, 2);
    CHECK_EQUAL(counts.failed, 0);
    CHECK_EQUAL(ae_flush(load.volume), 0);
    ae_volume_close(load.volume, true);
    for (size_t layer = 0; layer < depth; layer++)
        ae_layer_release(chain[layer]);
    ae_table_release(load.table);
    for (unsigned i = 0; i < SEALS; i++) {
        ae_pack_release(seals[i].pack);
        disk_free(&seals[i].disk);
    }
    for (unsigned i = 0; i <= SEALS; i++)
        stored_layer_free(&stored[i]);
    directory_remove(directory);
    machine_stop(&machine);
}

int main(void) {
    static const struct test tests[] = {
        {"changes since a layer", test_changes_since_a_layer},
        {"data without a base", test_data_without_a_base},
        {"a swap waits for who lingers after a rebase", test_a_swap_waits_for_who_lingers_after_a_rebase},
        {"sealing under load", test_sealing_under_load},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
