/*
 * The engine against a byte array: every operation, snapshots, resizes, clean ends, killed processes and power cuts.
 *
 * The volume is large and what is written lies on a few islands in it, so that several bitmap pages, and the ranges
 * between them, are in play. For each sector the model keeps its content and every content it had since the last flush:
 * after a power cut it has to be one of them.
 */
#include "check.h"
#include "world.h"

#include <errno.h>
#include <string.h>

#define SECTOR ((uint64_t)AE_SECTOR_BYTES)
#define ISLAND_SECTORS 24
#define ISLANDS 4
#define SECTORS (ISLANDS * ISLAND_SECTORS)
#define VERSIONS_MAX 40

static const uint64_t island_start[ISLANDS] = {
    0,
    (UINT64_C(128) << 20) - 12 * 4096,
    UINT64_C(300) << 30,
    (UINT64_C(1) << 40) - 12 * 4096,
};

struct world {
    struct machine machine;
    char directory[128];
    uint64_t random;
    uint8_t boot_id[16];
    unsigned boots;

    struct stored_layer *chain[CHAIN_MAX]; /* head first */
    struct ae_layer *open[CHAIN_MAX];
    size_t count;
    unsigned made;
    struct ae_volume *volume;
    uint64_t size;     /* of the volume */
    uint64_t recorded; /* what a power cut leaves of it */

    uint8_t now[SECTORS][AE_SECTOR_BYTES];
    uint8_t *versions[SECTORS][VERSIONS_MAX];
    size_t versions_count[SECTORS];

    uint8_t *frozen[CHAIN_MAX]; /* what the chain from this layer on held when it was frozen */
    uint64_t frozen_size[CHAIN_MAX];
};

/* The model */

static uint64_t sector_offset(size_t sector) {
    return island_start[sector / ISLAND_SECTORS] + sector % ISLAND_SECTORS * SECTOR;
}

static void remember(struct world *world, size_t sector) {
    CHECK(world->versions_count[sector] < VERSIONS_MAX);
    uint8_t *copy = malloc(SECTOR);
    CHECK(copy != NULL);
    memcpy(copy, world->now[sector], SECTOR);
    world->versions[sector][world->versions_count[sector]++] = copy;
}

static void forget_versions(struct world *world) {
    for (size_t i = 0; i < SECTORS; i++) {
        while (world->versions_count[i] > 0)
            free(world->versions[i][--world->versions_count[i]]);
        remember(world, i);
    }
}

/* Put bytes (NULL: zeros) into the model; what lies between the islands must be zeros. */
static void model_put(struct world *world, const uint8_t *bytes, uint64_t offset, uint64_t end) {
    for (size_t i = 0; i < SECTORS; i++) {
        uint64_t start = sector_offset(i);
        uint64_t from = offset > start ? offset : start;
        uint64_t to = end < start + SECTOR ? end : start + SECTOR;
        if (from >= to)
            continue;
        if (bytes != NULL)
            memcpy(world->now[i] + (from - start), bytes + (from - offset), to - from);
        else
            memset(world->now[i] + (from - start), 0, to - from);
        remember(world, i);
    }
}

/* Whether a buffer is what the model has; NULL: whether the model has zeros. */
static bool model_equals(const struct world *world, const uint8_t *bytes, uint64_t offset, uint64_t end) {
    for (size_t i = 0; i < SECTORS; i++) {
        uint64_t start = sector_offset(i);
        uint64_t from = offset > start ? offset : start;
        uint64_t to = end < start + SECTOR ? end : start + SECTOR;
        for (uint64_t at = from; at < to; at++)
            if (world->now[i][at - start] != (bytes != NULL ? bytes[at - offset] : 0))
                return false;
    }
    return true;
}

static size_t most_versions(const struct world *world) {
    size_t most = 0;
    for (size_t i = 0; i < SECTORS; i++)
        if (world->versions_count[i] > most)
            most = world->versions_count[i];
    return most;
}

/* Opening and closing */

static void world_open(struct world *world, bool believe) {
    uint64_t live_size = 0;
    for (size_t i = 0; i < world->count; i++) {
        world->open[i] = stored_layer_open(world->chain[i], i == 0, true, world->boot_id);
        if (live_size == 0)
            live_size = ae_layer_live_size(world->open[i]);
    }
    uint64_t size = believe && live_size > world->recorded ? live_size : world->recorded;
    CHECK_EQUAL(size, world->size);
    CHECK_EQUAL(ae_volume_open(world->open, world->count, size, true, &world->volume), 0);
    world->chain[0]->parent_visible = ae_layer_parent_visible(world->open[0]);
}

static void world_close(struct world *world, bool clean) {
    /* Any order will do. */
    bool volume_first = random_below(&world->random, 2) == 0;
    if (volume_first)
        ae_volume_close(world->volume, clean);
    for (size_t i = 0; i < world->count; i++)
        ae_layer_release(world->open[i]);
    if (!volume_first)
        ae_volume_close(world->volume, clean);
}

static void new_boot(struct world *world) {
    world->boots++;
    memcpy(world->boot_id, &world->boots, sizeof world->boots);
}

static struct stored_layer *new_layer(struct world *world) {
    struct stored_layer *stored = malloc(sizeof *stored);
    CHECK(stored != NULL);
    stored_layer_init(stored, &world->machine, world->directory, ++world->made);
    return stored;
}

static struct world *world_start(uint64_t seed) {
    struct world *world = calloc(1, sizeof *world);
    CHECK(world != NULL);
    check_seed = seed;
    world->random = random_seed(seed);
    machine_start(&world->machine, seed);
    world->machine.disks_wait = seed % 2 == 1;
    directory_make(world->directory);
    new_boot(world);
    forget_versions(world);
    world->chain[0] = new_layer(world);
    world->count = 1;
    world->size = world->recorded = random_below(&world->random, island_start[3] + ISLAND_SECTORS * SECTOR);
    world_open(world, false);
    return world;
}

static void world_end(struct world *world) {
    world_close(world, false);
    for (size_t i = 0; i < world->count; i++) {
        stored_layer_free(world->chain[i]);
        free(world->chain[i]);
        free(world->frozen[i]);
    }
    forget_versions(world);
    for (size_t i = 0; i < SECTORS; i++)
        free(world->versions[i][0]);
    directory_remove(world->directory);
    machine_stop(&world->machine);
    free(world);
}

/* Operations */

static uint64_t some_offset(struct world *world) {
    size_t island = random_below(&world->random, ISLANDS);
    uint64_t within = random_below(&world->random, ISLAND_SECTORS * SECTOR);
    if (random_below(&world->random, 2) == 0)
        within = within / SECTOR * SECTOR;
    return island_start[island] + within;
}

static uint64_t island_end(uint64_t offset) {
    for (size_t i = 0; i < ISLANDS; i++)
        if (offset >= island_start[i] && offset < island_start[i] + ISLAND_SECTORS * SECTOR)
            return island_start[i] + ISLAND_SECTORS * SECTOR;
    CHECK(!"an offset off the islands");
    return 0;
}

static uint64_t some_end(struct world *world, uint64_t offset) {
    uint64_t room = island_end(offset) - offset;
    uint64_t length = 1 + random_below(&world->random, room < 6 * SECTOR ? room : 6 * SECTOR);
    if (length > SECTOR && random_below(&world->random, 2) == 0)
        length = length / SECTOR * SECTOR;
    return offset + length;
}

static void do_write(struct world *world) {
    uint64_t offset = some_offset(world);
    uint64_t end = some_end(world, offset);
    uint8_t bytes[6 * AE_SECTOR_BYTES];
    for (size_t i = 0; i < end - offset; i++)
        bytes[i] = (uint8_t)random_next(&world->random) | 1;
    CHECK_EQUAL(machine_write(&world->machine, world->volume, bytes, end - offset, offset), end - offset);
    model_put(world, bytes, offset, end);
    if (end > world->size)
        world->size = end;
}

static void do_discard(struct world *world) {
    uint64_t offset = some_offset(world);
    uint64_t end = random_below(&world->random, 4) == 0 ? some_offset(world) : some_end(world, offset);
    if (end < offset) {
        uint64_t swap = end;
        end = offset;
        offset = swap;
    }
    int result = random_below(&world->random, 2) == 0 ? ae_discard(world->volume, offset, end - offset)
                                                      : ae_write_zeros(world->volume, offset, end - offset);
    CHECK_EQUAL(result, 0);
    uint64_t clipped = end < world->size ? end : world->size;
    if (offset < clipped)
        model_put(world, NULL, offset, clipped);
}

static void do_copy(struct world *world) {
    uint64_t from = some_offset(world), to = some_offset(world);
    uint64_t length = some_end(world, from) - from;
    if (random_below(&world->random, 2) == 0)
        to = to / SECTOR * SECTOR + from % SECTOR;
    uint64_t room = island_end(to) - to;
    if (length > room)
        length = room;
    uint64_t expected = from < world->size ? world->size - from : 0;
    if (expected > length)
        expected = length;
    if (from < to + expected && to < from + expected)
        return;
    uint8_t bytes[6 * AE_SECTOR_BYTES];
    CHECK_EQUAL(machine_read(&world->machine, world->volume, bytes, expected, from), expected);
    world->machine.disks_copy = random_below(&world->random, 4) != 0;
    CHECK_EQUAL(ae_copy(world->volume, to, world->volume, from, length), expected);
    model_put(world, bytes, to, to + expected);
    if (expected > 0 && to + expected > world->size)
        world->size = to + expected;
}

static void do_read(struct world *world) {
    uint64_t offset = some_offset(world);
    uint64_t end = some_end(world, offset);
    uint8_t bytes[6 * AE_SECTOR_BYTES];
    memset(bytes, 0xee, sizeof bytes);
    uint64_t expected = offset < world->size ? world->size - offset : 0;
    if (expected > end - offset)
        expected = end - offset;
    ssize_t got =
        random_below(&world->random, 3) == 0 ? ae_read_nowait(world->volume, bytes, end - offset, offset) : -EAGAIN;
    if (got == -EAGAIN)
        got = machine_read(&world->machine, world->volume, bytes, end - offset, offset);
    CHECK_EQUAL(got, expected);
    CHECK(model_equals(world, bytes, offset, offset + expected));
}

static void do_seek(struct world *world) {
    uint64_t offset = some_offset(world);
    int64_t data = ae_seek_data(world->volume, offset);
    int64_t hole = ae_seek_hole(world->volume, offset);
    if (offset >= world->size) {
        CHECK_EQUAL(data, -ENXIO);
        CHECK_EQUAL(hole, -ENXIO);
        return;
    }
    CHECK(data == -ENXIO || (data >= (int64_t)offset && data < (int64_t)world->size));
    CHECK(model_equals(world, NULL, offset, data < 0 ? world->size : (uint64_t)data));
    CHECK(hole >= (int64_t)offset && hole <= (int64_t)world->size);
    if (hole < (int64_t)world->size)
        CHECK(model_equals(world, NULL, (uint64_t)hole, (uint64_t)hole + 1));
}

static void do_flush(struct world *world) {
    bool full = random_below(&world->random, 4) == 0;
    if (full)
        disk_fail(&world->chain[0]->bitmap, DISK_WRITE, 1, -ENOSPC);
    int result = ae_flush(world->volume);
    if (result == -ENOSPC && full)
        result = ae_flush(world->volume);
    CHECK_EQUAL(result, 0);
    disk_fail(&world->chain[0]->bitmap, DISK_WRITE, 0, 0);
    for (size_t i = 0; i < world->count; i++)
        CHECK(!ae_layer_dirty(world->open[i]));
    world->recorded = world->size;
    forget_versions(world);
}

static void do_snapshot(struct world *world) {
    if (world->count == CHAIN_MAX)
        return;
    struct stored_layer *stored = new_layer(world);
    stored->parent_visible = AE_SIZE_MAX;
    struct ae_layer *head = stored_layer_open(stored, true, true, world->boot_id);
    world->chain[0]->parent_visible = ae_layer_parent_visible(world->open[0]);
    CHECK_EQUAL(ae_volume_swap_head(world->volume, head), world->size);

    memmove(&world->chain[1], &world->chain[0], world->count * sizeof world->chain[0]);
    memmove(&world->open[1], &world->open[0], world->count * sizeof world->open[0]);
    memmove(&world->frozen[1], &world->frozen[0], world->count * sizeof world->frozen[0]);
    memmove(&world->frozen_size[1], &world->frozen_size[0], world->count * sizeof world->frozen_size[0]);
    world->chain[0] = stored;
    world->open[0] = head;
    world->count++;
    world->frozen[0] = NULL;
    /* A snapshot is one only after the flush; without it the layer just lies in the chain. */
    if (random_below(&world->random, 2) == 0) {
        do_flush(world);
        uint8_t *copy = malloc(sizeof world->now);
        CHECK(copy != NULL);
        memcpy(copy, world->now, sizeof world->now);
        world->frozen[1] = copy;
        world->frozen_size[1] = world->size;
        stored->parent_visible = world->size;
    }
}

/* A snapshot, read by itself as another process would, holds what it held. */
static void check_frozen(struct world *world) {
    size_t at = random_below(&world->random, world->count);
    if (world->frozen[at] == NULL)
        return;
    struct ae_layer *layers[CHAIN_MAX];
    size_t count = world->count - at;
    for (size_t i = 0; i < count; i++)
        layers[i] = stored_layer_open(world->chain[at + i], false, false, world->boot_id);
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(layers, count, world->frozen_size[at], false, &volume), 0);
    CHECK_EQUAL(ae_write(volume, "x", 1, 0), -EROFS);
    for (size_t i = 0; i < SECTORS; i++) {
        uint8_t bytes[AE_SECTOR_BYTES];
        ssize_t got = ae_read(volume, bytes, SECTOR, sector_offset(i));
        CHECK(got >= 0 && memcmp(bytes, world->frozen[at] + i * SECTOR, (size_t)got) == 0);
    }
    ae_volume_close(volume, false);
    for (size_t i = 0; i < count; i++)
        ae_layer_release(layers[i]);
}

/* What a shrink cut off is gone from every content that a power cut may bring back: a smaller size is recorded before
 * anything else happens. */
static void cut_versions(struct world *world, uint64_t size) {
    for (size_t i = 0; i < SECTORS; i++) {
        uint64_t start = sector_offset(i);
        uint64_t kept = size <= start ? 0 : size - start < SECTOR ? size - start : SECTOR;
        for (size_t v = 0; v < world->versions_count[i]; v++)
            memset(world->versions[i][v] + kept, 0, SECTOR - kept);
    }
}

static void do_resize(struct world *world) {
    uint64_t size = some_offset(world);
    /* As the composer does, lest a size is recorded over what is not durable; requests may come in between. */
    do_flush(world);
    if (random_below(&world->random, 2) == 0)
        do_write(world);
    ae_volume_pause(world->volume);
    if (size < world->size)
        ae_volume_announce_size(world->volume, size);
    world->recorded = size;
    if (size < world->chain[0]->parent_visible)
        world->chain[0]->parent_visible = size;
    CHECK_EQUAL(ae_volume_resize(world->volume, size), 0);
    ae_volume_resume(world->volume);
    if (size < world->size)
        model_put(world, NULL, size, world->size);
    cut_versions(world, size);
    world->size = size;
    CHECK_EQUAL(ae_volume_size(world->volume), size);
    world->chain[0]->parent_visible = ae_layer_parent_visible(world->open[0]);
}

static void check_all(struct world *world) {
    for (size_t i = 0; i < SECTORS; i++) {
        uint8_t bytes[AE_SECTOR_BYTES];
        ssize_t got = machine_read(&world->machine, world->volume, bytes, SECTOR, sector_offset(i));
        CHECK(got >= 0 && memcmp(bytes, world->now[i], (size_t)got) == 0);
    }
}

static void do_end_and_open(struct world *world) {
    do_flush(world);
    world_close(world, true);
    for (size_t i = 0; i < world->count; i++) {
        FILE *live = fopen(world->chain[i]->live_path, "r");
        CHECK(live == NULL);
    }
    if (random_below(&world->random, 2) == 0)
        new_boot(world);
    world_open(world, false);
    check_all(world);
}

static void do_kill(struct world *world) {
    world_close(world, false);
    world_open(world, true);
    check_all(world);
}

static void do_power_cut(struct world *world) {
    world_close(world, false);
    for (size_t i = 0; i < world->count; i++) {
        disk_power_cut(&world->chain[i]->data, &world->random);
        disk_power_cut(&world->chain[i]->bitmap, &world->random);
    }
    new_boot(world);
    world->size = world->recorded;
    world_open(world, false);
    for (size_t i = 0; i < SECTORS; i++) {
        uint64_t start = sector_offset(i);
        ssize_t got = machine_read(&world->machine, world->volume, world->now[i], SECTOR, start);
        CHECK(got >= 0);
        bool known = false;
        for (size_t v = 0; v < world->versions_count[i]; v++)
            known = known || memcmp(world->now[i], world->versions[i][v], (size_t)got) == 0;
        CHECK(known);
        memset(world->now[i] + got, 0, SECTOR - (size_t)got);
    }
    forget_versions(world);
}

static void run_world(uint64_t seed, unsigned steps) {
    struct world *world = world_start(seed);
    for (unsigned step = 0; step < steps; step++) {
        uint64_t dice = random_below(&world->random, 100);
        if (most_versions(world) > VERSIONS_MAX - 6)
            do_flush(world);
        else if (dice < 34)
            do_write(world);
        else if (dice < 40)
            do_copy(world);
        else if (dice < 55)
            do_read(world);
        else if (dice < 67)
            do_discard(world);
        else if (dice < 74)
            do_seek(world);
        else if (dice < 79)
            do_flush(world);
        else if (dice < 85)
            do_snapshot(world);
        else if (dice < 89)
            do_resize(world);
        else if (dice < 92)
            check_frozen(world);
        else if (dice < 94)
            do_end_and_open(world);
        else if (dice < 97)
            do_kill(world);
        else
            do_power_cut(world);
    }
    check_all(world);
    world_end(world);
}

#ifndef WORLDS
#define WORLDS 40
#endif

static void test_short_worlds(void) {
    for (uint64_t seed = 0; seed < WORLDS; seed++)
        run_world(seed, 120);
}

static void test_long_worlds(void) {
    for (uint64_t seed = 1000; seed < 1000 + WORLDS / 10; seed++)
        run_world(seed, 700);
}

int main(int argc, char **argv) {
    if (argc > 1) {
        run_world(strtoull(argv[1], NULL, 10), argc > 2 ? (unsigned)atoi(argv[2]) : 120);
        return 0;
    }
    static const struct test tests[] = {
        {"a byte array agrees over short lives", test_short_worlds},
        {"a byte array agrees over long lives", test_long_worlds},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
