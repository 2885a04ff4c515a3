/*
 * Sealed layers: regions that lie in packs, against plain bytes; packs that move, shrink and are damaged; resolvers
 * that fail; and a volume that is written, snapshotted, sealed and rebased by several threads at once.
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
#define REGION ((uint64_t)AE_REGION_BYTES)
#define MIB (UINT64_C(1) << 20)
#define PACKS 4
#define PACK_SECTORS 512
#define ISLANDS 6
/* As many as a map has room for. */
#define MAP_REGIONS (UINT64_C(1) << 32)
#ifndef SEALED_ROUNDS
#define SEALED_ROUNDS 24
#endif

static const uint8_t boot_id[16] = {1};
static const uint8_t base_id[16] = {0xba, 0x5e};
/* Three side by side, and holes that levels 1 and 2 of the table are for. */
static const uint64_t island_region[ISLANDS] = {0, 1, 2, 700, 70000, 262143};
static const uint64_t volume_size = UINT64_C(262143) * REGION + REGION;

static void pause_us(long us) { nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL); }

/* A map: islands of regions that lie in packs, the even ones simulated disks, the odd ones files. */

struct island {
    struct ae_extent extents[AE_REGION_SECTORS];
    size_t count;
    bool damaged[AE_REGION_SECTORS];
    uint8_t bytes[AE_REGION_SECTORS * AE_SECTOR_BYTES];
    bool mapped[AE_REGION_SECTORS];
};

struct map {
    struct machine machine;
    char directory[128];
    struct disk disks[PACKS];
    int fds[PACKS];
    struct ae_pack *packs[PACKS];
    struct island *islands[ISLANDS];
    struct ae_table *table;
    atomic_uint resolves, closed;
    atomic_uint under_way, most_under_way;
    atomic_int fail_with;
    atomic_long delay_us;
};

/* Chunks need not lie on a sector's border. */
static uint64_t pack_offset(uint32_t pack, uint64_t sector) { return pack * 8 + sector * SECTOR; }

static uint64_t pack_bytes(uint32_t pack) { return pack_offset(pack, PACK_SECTORS); }

static void fill_stamp(void *sector, uint32_t pack, uint64_t number) {
    uint64_t *words = sector;
    for (size_t i = 0; i < SECTOR / 8; i++)
        words[i] = (uint64_t)(pack + 1) << 32 | (number + 1);
}

static void pack_make(struct map *map, uint32_t pack) {
    disk_init(&map->disks[pack], &map->machine);
    map->fds[pack] = open(map->directory, O_TMPFILE | O_RDWR, 0600);
    CHECK(map->fds[pack] >= 0);
    struct ae_object object = disk_object(&map->disks[pack]);
    if (pack % 2 == 1)
        CHECK_EQUAL(ae_object_file(map->fds[pack], &object), 0);
    uint64_t words[SECTOR / 8];
    for (uint64_t number = 0; number < PACK_SECTORS; number++) {
        fill_stamp(words, pack, number);
        CHECK_EQUAL(object.ops->pwrite(object.ctx, words, SECTOR, pack_offset(pack, number)), 0);
    }
    CHECK_EQUAL(ae_pack_open(object, pack_bytes(pack), &map->packs[pack]), 0);
}

static int map_resolve(void *ctx, uint64_t region, struct ae_region **made) {
    struct map *map = ctx;
    unsigned under_way = atomic_fetch_add(&map->under_way, 1) + 1;
    unsigned most = atomic_load(&map->most_under_way);
    while (most < under_way && !atomic_compare_exchange_weak(&map->most_under_way, &most, under_way))
        ;
    if (atomic_load(&map->delay_us) > 0)
        pause_us(atomic_load(&map->delay_us));
    int result = atomic_load(&map->fail_with);
    uint64_t first = 0, end = MAP_REGIONS;
    const struct island *island = NULL;
    for (size_t i = 0; i < ISLANDS; i++) {
        if (island_region[i] == region)
            island = map->islands[i];
        else if (island_region[i] < region)
            first = island_region[i] + 1;
        else if (end == MAP_REGIONS)
            end = island_region[i];
    }
    if (result == 0 && island != NULL)
        result = ae_region_make(region, region + 1, island->extents, island->count, map->packs, PACKS, made);
    else if (result == 0)
        result = ae_region_make(first, end, NULL, 0, NULL, 0, made);
    atomic_fetch_add(&map->resolves, 1);
    atomic_fetch_sub(&map->under_way, 1);
    return result;
}

static void map_close(void *ctx) { atomic_fetch_add(&((struct map *)ctx)->closed, 1); }

static void island_put(struct island *island, uint32_t first, uint32_t count, uint32_t pack, uint64_t number) {
    island->extents[island->count++] = (struct ae_extent){
        .first = (uint16_t)first,
        .count = (uint16_t)count,
        .pack = pack,
        .offset = pack == AE_PACK_DAMAGED ? 0 : pack_offset(pack, number),
    };
    for (uint32_t i = 0; i < count; i++) {
        island->mapped[first + i] = true;
        island->damaged[first + i] = pack == AE_PACK_DAMAGED;
        if (pack != AE_PACK_DAMAGED)
            fill_stamp(island->bytes + (first + i) * SECTOR, pack, number + i);
    }
}

/* Extents at random, many of which go on where the one before ended. */
static void island_fill(struct island *island, uint64_t *random, bool damage) {
    uint32_t pack = 0;
    uint64_t number = 0;
    uint32_t at = (uint32_t)random_below(random, 30);
    while (at < AE_REGION_SECTORS) {
        uint32_t count = (uint32_t)(1 + random_below(random, 60));
        bool goes_on = random_below(random, 3) == 0;
        if (!goes_on || number + count > PACK_SECTORS) {
            pack = (uint32_t)random_below(random, PACKS);
            number = random_below(random, PACK_SECTORS - count);
        }
        if (at + count > AE_REGION_SECTORS)
            count = AE_REGION_SECTORS - at;
        island_put(island, at, count, damage && random_below(random, 6) == 0 ? AE_PACK_DAMAGED : pack, number);
        number += count;
        at += count + (goes_on ? 0 : (uint32_t)random_below(random, 40));
    }
}

static struct map *map_start(uint64_t seed, size_t bytes_max, bool damage) {
    struct map *map = calloc(1, sizeof *map);
    CHECK(map != NULL);
    check_seed = seed;
    uint64_t random = random_seed(seed);
    machine_start(&map->machine, seed);
    directory_make(map->directory);
    for (uint32_t pack = 0; pack < PACKS; pack++)
        pack_make(map, pack);
    for (size_t i = 0; i < ISLANDS; i++) {
        map->islands[i] = calloc(1, sizeof *map->islands[i]);
        CHECK(map->islands[i] != NULL);
        island_fill(map->islands[i], &random, damage);
    }
    CHECK_EQUAL(ae_table_open(bytes_max, &map->table), 0);
    return map;
}

static void map_end(struct map *map) {
    ae_table_release(map->table);
    for (size_t i = 0; i < PACKS; i++) {
        ae_pack_release(map->packs[i]);
        disk_free(&map->disks[i]);
        close(map->fds[i]);
    }
    for (size_t i = 0; i < ISLANDS; i++)
        free(map->islands[i]);
    directory_remove(map->directory);
    machine_stop(&map->machine);
    free(map);
}

static struct ae_layer *map_layer(struct map *map) {
    struct ae_resolver resolver = {.resolve = map_resolve, .close = map_close, .ctx = map};
    struct ae_layer *layer = NULL;
    CHECK_EQUAL(ae_layer_open_sealed(base_id, map->table, resolver, &layer), 0);
    return layer;
}

/* A read-only volume of the sealed layer alone. */
static struct ae_volume *map_volume(struct map *map) {
    struct ae_layer *layer = map_layer(map);
    struct ae_volume *volume;
    CHECK_EQUAL(ae_volume_open(&layer, 1, volume_size, false, &volume), 0);
    ae_layer_release(layer);
    return volume;
}

/* What the map holds from `offset` on. */
static void expect(const struct map *map, uint8_t *to, uint64_t offset, size_t length) {
    memset(to, 0, length);
    for (size_t i = 0; i < ISLANDS; i++) {
        uint64_t start = island_region[i] * REGION;
        uint64_t from = offset > start ? offset : start;
        uint64_t end = offset + length < start + REGION ? offset + length : start + REGION;
        if (from < end)
            memcpy(to + (from - offset), map->islands[i]->bytes + (from - start), end - from);
    }
}

static uint64_t random_offset(uint64_t *random) {
    uint64_t region = random_below(random, 5) == 0 ? random_below(random, volume_size / REGION)
                                                   : island_region[random_below(random, ISLANDS)];
    return region * REGION + random_below(random, REGION);
}

/* Volumes over a map, against plain bytes */

#define HEADS_MAX 5
#define MODEL_BYTES ((size_t)192 * 1024)

struct model {
    struct map *map;
    uint64_t random;
    struct stored_layer stored[HEADS_MAX];
    struct ae_layer *layers[HEADS_MAX + 1]; /* the lowest first */
    size_t heads;
    struct ae_volume *volume;
    bool changed[ISLANDS][AE_REGION_SECTORS]; /* since the sealed layer */
    uint8_t bytes[MODEL_BYTES], expected[MODEL_BYTES];
};

static struct ae_layer *model_head(struct model *model) {
    struct stored_layer *stored = &model->stored[model->heads];
    stored_layer_init(stored, &model->map->machine, model->map->directory, (unsigned)model->heads + 1);
    stored->parent_visible = AE_SIZE_MAX;
    model->layers[++model->heads] = stored_layer_open(stored, true, true, boot_id);
    return model->layers[model->heads];
}

static void model_read(struct model *model) {
    uint64_t offset = random_offset(&model->random);
    size_t length = (size_t)(1 + random_below(&model->random, MODEL_BYTES));
    if (length > volume_size - offset)
        length = volume_size - offset;
    bool nowait = random_below(&model->random, 4) == 0;
    ssize_t got = nowait ? ae_read_nowait(model->volume, model->bytes, length, offset)
                         : ae_read(model->volume, model->bytes, length, offset);
    if (nowait && got == -EAGAIN)
        return;
    CHECK_EQUAL(got, length);
    expect(model->map, model->expected, offset, length);
    CHECK(memcmp(model->bytes, model->expected, length) == 0);
}

/* A write, or a discard, within an island. */
static void model_change(struct model *model, bool discard) {
    size_t island = (size_t)random_below(&model->random, ISLANDS);
    uint64_t at = random_below(&model->random, REGION);
    uint64_t length = 1 + random_below(&model->random, 40 * SECTOR);
    if (random_below(&model->random, 2) == 0)
        length = 1 + length % 3000;
    if (length > REGION - at)
        length = REGION - at;
    memset(model->bytes, discard ? 0 : (int)(1 + random_below(&model->random, 255)), length);
    uint64_t offset = island_region[island] * REGION + at;
    if (discard)
        CHECK_EQUAL(ae_discard(model->volume, offset, length), 0);
    else
        CHECK_EQUAL(ae_write(model->volume, model->bytes, length, offset), length);
    memcpy(model->map->islands[island]->bytes + at, model->bytes, length);
    for (uint64_t sector = at / SECTOR; sector * SECTOR < at + length; sector++)
        model->changed[island][sector] = true;
}

static bool is_changed(const struct model *model, uint64_t sector) {
    for (size_t i = 0; i < ISLANDS; i++)
        if (sector / AE_REGION_SECTORS == island_region[i])
            return model->changed[i][sector % AE_REGION_SECTORS];
    return false;
}

static void model_next_change(struct model *model) {
    uint64_t offset = random_offset(&model->random) / SECTOR * SECTOR;
    uint64_t end = offset + random_below(&model->random, 3 * REGION);
    if (end > volume_size)
        end = volume_size;
    uint64_t from, until, expected = offset / SECTOR, sectors_end = (end + SECTOR - 1) / SECTOR;
    int result = ae_volume_next_change(model->volume, base_id, offset, end, &from, &until);
    while (expected < sectors_end && !is_changed(model, expected))
        expected++;
    CHECK_EQUAL(result, expected < sectors_end ? 0 : -ENXIO);
    if (result < 0)
        return;
    CHECK_EQUAL(from, expected * SECTOR);
    while (expected < sectors_end && is_changed(model, expected))
        expected++;
    CHECK_EQUAL(until, expected * SECTOR);
}

/* Whatever a seek passes over has to be zeros. */
static void model_seek(struct model *model) {
    uint64_t offset = random_offset(&model->random);
    int64_t hole = ae_seek_hole(model->volume, offset);
    CHECK(hole >= (int64_t)offset);
    size_t rest = (size_t)(SECTOR - (uint64_t)hole % SECTOR);
    if ((uint64_t)hole < volume_size) {
        expect(model->map, model->expected, (uint64_t)hole, rest);
        CHECK(model->expected[0] == 0 && memcmp(model->expected, model->expected + 1, rest - 1) == 0);
    }
    int64_t data = ae_seek_data(model->volume, offset);
    CHECK(data >= (int64_t)offset || data == -ENXIO);
    uint64_t end = data < 0 ? volume_size : (uint64_t)data;
    size_t length = end - offset < MODEL_BYTES ? (size_t)(end - offset) : MODEL_BYTES;
    expect(model->map, model->expected, offset, length);
    for (size_t i = 0; i < length; i++)
        CHECK_EQUAL(model->expected[i], 0);
}

static void model_copy(struct model *model) {
    uint64_t from = random_offset(&model->random), to = random_below(&model->random, 3 * SECTOR);
    if (random_below(&model->random, 2) == 0)
        to = from % SECTOR;
    struct stored_layer stored;
    stored_layer_init(&stored, &model->map->machine, model->map->directory, 99);
    struct ae_layer *head = stored_layer_open(&stored, true, true, boot_id);
    struct ae_volume *target;
    CHECK_EQUAL(ae_volume_open(&head, 1, 0, true, &target), 0);
    ssize_t copied = ae_copy(target, to, model->volume, from, MODEL_BYTES);
    CHECK_EQUAL(copied, volume_size - from < MODEL_BYTES ? volume_size - from : MODEL_BYTES);
    CHECK_EQUAL(ae_read(target, model->bytes, (size_t)copied, to), copied);
    expect(model->map, model->expected, from, (size_t)copied);
    CHECK(memcmp(model->bytes, model->expected, (size_t)copied) == 0);
    ae_volume_close(target, false);
    ae_layer_release(head);
    unlink(stored.live_path);
    stored_layer_free(&stored);
}

static void model_round(uint64_t seed, size_t bytes_max) {
    struct model *model = calloc(1, sizeof *model);
    CHECK(model != NULL);
    model->map = map_start(seed, bytes_max, false);
    model->random = random_seed(seed + 1000);
    model->layers[0] = map_layer(model->map);
    struct ae_layer *chain[2] = {model_head(model), model->layers[0]};
    CHECK_EQUAL(ae_volume_open(chain, 2, volume_size, true, &model->volume), 0);
    for (unsigned step = 0; step < 400; step++) {
        uint64_t what = random_below(&model->random, 20);
        if (what < 8)
            model_read(model);
        else if (what < 14)
            model_change(model, what < 10);
        else if (what < 16)
            model_next_change(model);
        else if (what < 18)
            model_seek(model);
        else if (what == 18)
            model_copy(model);
        else if (model->heads < HEADS_MAX && random_below(&model->random, 3) == 0)
            CHECK_EQUAL(ae_volume_swap_head(model->volume, model_head(model)), volume_size);
        else
            ae_table_forget(model->map->table);
        CHECK(ae_table_bytes(model->map->table) <= bytes_max);
    }
    struct ae_statistics counts;
    ae_volume_statistics(model->volume, &counts);
    CHECK_EQUAL(counts.layers, model->heads + 1);
    CHECK_EQUAL(ae_flush(model->volume), 0);
    ae_volume_close(model->volume, true);
    for (size_t i = 0; i <= model->heads; i++)
        ae_layer_release(model->layers[i]);
    for (size_t i = 0; i < model->heads; i++)
        stored_layer_free(&model->stored[i]);
    CHECK_EQUAL(atomic_load(&model->map->closed), 1);
    map_end(model->map);
    free(model);
}

static void test_model(void) {
    static const size_t bounds[] = {0, 2000, 8000, 10 * MIB};
    for (uint64_t seed = 0; seed < SEALED_ROUNDS; seed++)
        model_round(seed, bounds[seed % 4]);
}

/* The sealed layer alone */

static void test_damaged_extents_fail_and_nothing_else_does(void) {
    struct map *map = map_start(1, 10 * MIB, true);
    struct ae_volume *volume = map_volume(map);
    uint8_t *bytes = malloc(SECTOR);
    CHECK(bytes != NULL);
    unsigned damaged = 0;
    int64_t mapped = 0;
    for (size_t i = 0; i < ISLANDS; i++) {
        const struct island *island = map->islands[i];
        for (uint64_t sector = 0; sector < AE_REGION_SECTORS; sector++) {
            ssize_t got = ae_read(volume, bytes, SECTOR, island_region[i] * REGION + sector * SECTOR);
            CHECK_EQUAL(got, island->damaged[sector] ? -EIO : (ssize_t)SECTOR);
            CHECK(got < 0 || memcmp(bytes, island->bytes + sector * SECTOR, SECTOR) == 0);
            damaged += island->damaged[sector];
            mapped += island->mapped[sector];
        }
    }
    CHECK(damaged > 0);
    CHECK_EQUAL(atomic_load(&map->resolves), ISLANDS);
    struct ae_layer *layer = map_layer(map);
    CHECK_EQUAL(ae_layer_count(layer), mapped);
    CHECK(!ae_layer_dirty(layer));
    ae_layer_release(layer);
    free(bytes);
    ae_volume_close(volume, false);
    map_end(map);
}

static void test_seeks_are_exact(void) {
    struct map *map = map_start(2, 10 * MIB, true);
    struct ae_volume *volume = map_volume(map);
    uint64_t next_data = volume_size, next_hole = volume_size;
    for (size_t i = ISLANDS; i-- > 0;) {
        if (i + 1 < ISLANDS && island_region[i + 1] != island_region[i] + 1)
            next_hole = (island_region[i] + 1) * REGION;
        for (uint64_t sector = AE_REGION_SECTORS; sector-- > 0;) {
            uint64_t offset = island_region[i] * REGION + sector * SECTOR;
            if (map->islands[i]->mapped[sector])
                next_data = offset;
            else
                next_hole = offset;
            CHECK_EQUAL(ae_seek_data(volume, offset), next_data == volume_size ? -ENXIO : (int64_t)next_data);
            CHECK_EQUAL(ae_seek_hole(volume, offset), next_hole);
        }
    }
    /* A terabyte of holes was passed over in a few pieces for each window of a seek, not region by region. */
    CHECK(atomic_load(&map->resolves) < 200);
    CHECK_EQUAL(ae_seek_data(volume, (island_region[4] + 1) * REGION), ae_seek_data(volume, island_region[5] * REGION));
    ae_volume_close(volume, false);
    map_end(map);
}

static void test_regions_that_cannot_be(void) {
    struct map *map = map_start(3, 0, false);
    struct ae_region *region;
    static const struct ae_extent wrong[][2] = {
        {{.first = 0, .count = 0}, {.first = 1, .count = 1}},
        {{.first = 0, .count = 2}, {.first = 1, .count = 1}},
        {{.first = 5, .count = 1}, {.first = 1, .count = 1}},
        {{.first = 0, .count = 1, .pack = PACKS}, {.first = 1, .count = 1}},
        {{.first = 0, .count = 1}, {.first = 1000, .count = 25}},
        {{.first = 0, .count = 1, .offset = UINT64_MAX}, {.first = 1, .count = 1}},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK_EQUAL(ae_region_make(0, 1, wrong[i], 2, map->packs, PACKS, &region), -EINVAL);
    const struct ae_extent right = {.first = 1023, .count = 1};
    CHECK_EQUAL(ae_region_make(0, 2, &right, 1, map->packs, PACKS, &region), -EINVAL);
    CHECK_EQUAL(ae_region_make(1, 1, NULL, 0, NULL, 0, &region), -EINVAL);
    CHECK_EQUAL(ae_region_make(AE_REGIONS_MAX, AE_REGIONS_MAX + 1, &right, 1, map->packs, PACKS, &region), -EINVAL);
    CHECK_EQUAL(ae_region_make(0, 1, &right, 1, map->packs, PACKS, &region), 0);
    ae_region_release(region);
    map_end(map);
}

static int resolve_elsewhere(void *ctx, uint64_t region, struct ae_region **made) {
    (void)ctx;
    return ae_region_make(region + 1, region + 2, NULL, 0, NULL, 0, made);
}

static int resolve_nothing(void *ctx, uint64_t region, struct ae_region **made) {
    (void)ctx, (void)region, (void)made;
    return 0;
}

static void test_a_failing_resolver_fails_the_call(void) {
    struct map *map = map_start(4, 10 * MIB, false);
    struct ae_volume *volume = map_volume(map);
    char byte;
    /* What would mean something else to the caller comes as EIO. */
    static const int errors[][2] = {{-EIO, -EIO},        {-ENXIO, -EIO},  {-EAGAIN, -EIO},
                                    {-EOPNOTSUPP, -EIO}, {-ENOENT, -EIO}, {-ENOMEM, -ENOMEM}};
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++) {
        atomic_store(&map->fail_with, errors[i][0]);
        CHECK_EQUAL(ae_read(volume, &byte, 1, 0), errors[i][1]);
        CHECK_EQUAL(ae_seek_data(volume, 0), errors[i][1]);
        CHECK_EQUAL(ae_read_nowait(volume, &byte, 1, 0), -EAGAIN);
    }
    atomic_store(&map->fail_with, 0);
    CHECK_EQUAL(ae_read(volume, &byte, 1, 0), 1);
    ae_volume_close(volume, false);

    int (*const wrong[])(void *, uint64_t, struct ae_region **) = {resolve_elsewhere, resolve_nothing};
    for (size_t i = 0; i < 2; i++) {
        struct ae_resolver resolver = {.resolve = wrong[i], .close = map_close, .ctx = map};
        struct ae_layer *layer;
        CHECK_EQUAL(ae_layer_open_sealed((const uint8_t[16]){7}, map->table, resolver, &layer), 0);
        CHECK_EQUAL(ae_volume_open(&layer, 1, volume_size, false, &volume), 0);
        CHECK_EQUAL(ae_read(volume, &byte, 1, 0), -EIO);
        ae_volume_close(volume, false);
        ae_layer_release(layer);
    }
    map_end(map);
}

/* Packs that change under us */

/* Region 0 in one pack, region 1 in the other. */
static struct map *map_of_two(uint32_t first, uint32_t second) {
    struct map *map = map_start(5, 10 * MIB, false);
    for (size_t i = 0; i < 2; i++) {
        memset(map->islands[i], 0, sizeof *map->islands[i]);
        island_put(map->islands[i], 0, 100, i == 0 ? first : second, 0);
    }
    return map;
}

static void check_sectors(struct map *map, struct ae_volume *volume, size_t island, uint64_t first, uint64_t count) {
    uint8_t *bytes = malloc(count * SECTOR);
    CHECK(bytes != NULL);
    CHECK_EQUAL(ae_read(volume, bytes, count * SECTOR, island_region[island] * REGION + first * SECTOR),
                count * SECTOR);
    CHECK(memcmp(bytes, map->islands[island]->bytes + first * SECTOR, count * SECTOR) == 0);
    free(bytes);
}

static void test_a_pack_that_moved_is_looked_for_once_more(void) {
    struct map *map = map_of_two(0, 2);
    struct ae_volume *volume = map_volume(map);
    check_sectors(map, volume, 0, 0, 100);
    unsigned resolves = 1;
    static const int errors[] = {-ENOENT, -ESTALE, -EIO};
    for (size_t i = 0; i < 3; i++) {
        disk_fail(&map->disks[0], DISK_READ, 1, errors[i]);
        check_sectors(map, volume, 0, 0, 100);
        CHECK_EQUAL(atomic_load(&map->resolves), ++resolves);
    }
    char byte;
    disk_fail(&map->disks[0], DISK_READ, 1, -ENOMEM);
    CHECK_EQUAL(ae_read(volume, &byte, 1, 0), -ENOMEM);
    /* These would mean something else to whoever reads, seeks or copies. */
    static const int others[] = {-EAGAIN, -ENXIO, -EOPNOTSUPP};
    for (size_t i = 0; i < 3; i++) {
        disk_fail(&map->disks[0], DISK_READ, 1, others[i]);
        CHECK_EQUAL(ae_read(volume, &byte, 1, 0), -EIO);
    }
    CHECK_EQUAL(atomic_load(&map->resolves), resolves);
    map->disks[0].keeps_failing = true;
    disk_fail(&map->disks[0], DISK_READ, 1, -ENOENT);
    CHECK_EQUAL(ae_read(volume, &byte, 1, 0), -EIO);
    check_sectors(map, volume, 1, 0, 100);
    disk_fail(&map->disks[0], DISK_READ, 0, 0);
    check_sectors(map, volume, 0, 0, 100);
    ae_volume_close(volume, false);
    map_end(map);
}

static void test_a_truncated_pack_is_no_zeros(void) {
    for (uint32_t pack = 0; pack < 2; pack++) {
        struct map *map = map_of_two(pack, 3);
        struct ae_volume *volume = map_volume(map);
        check_sectors(map, volume, 0, 0, 100);
        uint64_t cut = pack_offset(pack, 60) + 5;
        if (pack == 0)
            CHECK_EQUAL(disk_object(&map->disks[0]).ops->truncate(&map->disks[0], cut), 0);
        else
            CHECK(ftruncate(map->fds[1], (off_t)cut) == 0);
        char bytes[2 * SECTOR];
        check_sectors(map, volume, 0, 0, 60);
        for (uint64_t sector = 60; sector < 100; sector++) {
            CHECK_EQUAL(ae_read(volume, bytes, SECTOR, sector * SECTOR), -EIO);
            CHECK_EQUAL(ae_read_nowait(volume, bytes, SECTOR, sector * SECTOR), -EAGAIN);
        }
        CHECK_EQUAL(ae_read(volume, bytes, sizeof bytes, 59 * SECTOR), -EIO);
        check_sectors(map, volume, 1, 0, 100);

        struct stored_layer stored;
        stored_layer_init(&stored, &map->machine, map->directory, 99);
        struct ae_layer *head = stored_layer_open(&stored, true, true, boot_id);
        struct ae_volume *target;
        CHECK_EQUAL(ae_volume_open(&head, 1, 0, true, &target), 0);
        CHECK_EQUAL(ae_copy(target, 0, volume, 0, 60 * SECTOR), 60 * SECTOR);
        CHECK_EQUAL(ae_copy(target, 60 * SECTOR, volume, 60 * SECTOR, 10 * SECTOR), -EIO);
        ae_volume_close(target, true);
        ae_layer_release(head);
        unlink(stored.live_path);
        stored_layer_free(&stored);
        ae_volume_close(volume, false);
        map_end(map);
    }
}

/* From a file to a file, by the files themselves. */
static void test_copies_from_pack_to_head(void) {
    struct map *map = map_of_two(1, 3);
    island_put(map->islands[0], 200, 20, AE_PACK_DAMAGED, 0);
    struct ae_volume *volume = map_volume(map);
    int fd = open(map->directory, O_TMPFILE | O_RDWR, 0600);
    CHECK(fd >= 0);
    struct stored_layer stored;
    stored_layer_init(&stored, &map->machine, map->directory, 99);
    struct ae_layer_spec spec = {.bitmap = disk_object(&stored.bitmap), .live_path = stored.live_path, .head = true};
    memcpy(spec.id, stored.id, sizeof spec.id);
    CHECK_EQUAL(ae_object_file(fd, &spec.data), 0);
    struct ae_layer *head;
    CHECK_EQUAL(ae_layer_open(&spec, &head), 0);
    struct ae_volume *target;
    CHECK_EQUAL(ae_volume_open(&head, 1, 0, true, &target), 0);

    static uint8_t bytes[160 * SECTOR], expected[160 * SECTOR];
    CHECK_EQUAL(ae_copy(target, 7 * SECTOR, volume, 0, 160 * SECTOR), 160 * SECTOR);
    CHECK_EQUAL(ae_read(target, bytes, sizeof bytes, 7 * SECTOR), sizeof bytes);
    expect(map, expected, 0, sizeof expected);
    CHECK(memcmp(bytes, expected, sizeof bytes) == 0);
    CHECK_EQUAL(ae_copy(target, 3, volume, REGION + 5, 9999), 9999);
    CHECK_EQUAL(ae_read(target, bytes, 9999, 3), 9999);
    expect(map, expected, REGION + 5, 9999);
    CHECK(memcmp(bytes, expected, 9999) == 0);
    /* Up to what is damaged, and then an error. */
    CHECK_EQUAL(ae_copy(target, 0, volume, 190 * SECTOR, 20 * SECTOR), 10 * SECTOR);
    CHECK_EQUAL(ae_copy(target, 0, volume, 200 * SECTOR, SECTOR), -EIO);
    ae_volume_close(target, true);
    ae_layer_release(head);
    unlink(stored.live_path);
    stored_layer_free(&stored);
    close(fd);
    ae_volume_close(volume, false);
    map_end(map);
}

/* Resolving */

struct reader {
    struct map *map;
    struct ae_volume *volume;
    ssize_t result;
};

static void *read_one(void *argument) {
    struct reader *reader = argument;
    char byte;
    reader->result = ae_read(reader->volume, &byte, 1, 0);
    return NULL;
}

#define READERS 8
#define CROWD_ROUNDS 1500
#define CROWD_TABLE_BYTES 3000u

static void test_one_resolve_serves_all_who_wait(void) {
    static const int results[] = {0, -ENOMEM};
    for (size_t round = 0; round < 4; round++) {
        /* Also where the table has no room to keep it. */
        struct map *map = map_start(6, round < 2 ? 10 * MIB : 0, false);
        struct ae_volume *volume = map_volume(map);
        atomic_store(&map->delay_us, 30000);
        atomic_store(&map->fail_with, results[round % 2]);
        pthread_t threads[READERS];
        struct reader readers[READERS];
        for (size_t i = 0; i < READERS; i++) {
            readers[i] = (struct reader){.map = map, .volume = volume};
            CHECK(pthread_create(&threads[i], NULL, read_one, &readers[i]) == 0);
        }
        for (size_t i = 0; i < READERS; i++) {
            CHECK(pthread_join(threads[i], NULL) == 0);
            CHECK_EQUAL(readers[i].result, round % 2 == 0 ? 1 : -ENOMEM);
        }
        CHECK_EQUAL(atomic_load(&map->most_under_way), 1);
        CHECK(atomic_load(&map->resolves) < READERS);
        struct ae_table_statistics counts;
        ae_table_statistics(map->table, &counts);
        CHECK_EQUAL(counts.regions, round == 0);
        CHECK_EQUAL(counts.hits + counts.misses, READERS);
        ae_volume_close(volume, false);
        map_end(map);
    }
}

static void test_what_is_resolved_during_a_forget_is_not_kept(void) {
    struct map *map = map_start(7, 10 * MIB, false);
    struct reader reader = {.map = map, .volume = map_volume(map)};
    atomic_store(&map->delay_us, 20000);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, read_one, &reader) == 0);
    while (atomic_load(&map->under_way) == 0)
        sched_yield();
    ae_table_forget(map->table);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_EQUAL(reader.result, 1);
    CHECK_EQUAL(ae_table_bytes(map->table), 0);
    ae_volume_close(reader.volume, false);
    map_end(map);
}

struct crowd {
    struct map *map;
    struct ae_volume *volume;
    atomic_bool stop;
};

struct crowd_reader {
    struct crowd *crowd;
    uint64_t seed;
};

static void *read_at_random(void *argument) {
    const struct crowd_reader *reader = argument;
    struct crowd *crowd = reader->crowd;
    uint64_t random = random_seed(reader->seed);
    size_t room = 40 * SECTOR;
    uint8_t *bytes = malloc(room), *expected = malloc(room);
    CHECK(bytes != NULL && expected != NULL);
    for (unsigned round = 0; round < CROWD_ROUNDS; round++) {
        uint64_t offset = random_offset(&random);
        size_t length = (size_t)(1 + random_below(&random, room));
        if (length > volume_size - offset)
            length = volume_size - offset;
        ssize_t got = ae_read(crowd->volume, bytes, length, offset);
        /* A pack may have moved twice under one read. */
        CHECK(got == (ssize_t)length || got == -EIO);
        expect(crowd->map, expected, offset, length);
        CHECK(got < 0 || memcmp(bytes, expected, length) == 0);
        CHECK(ae_table_bytes(crowd->map->table) <= CROWD_TABLE_BYTES);
    }
    free(bytes);
    free(expected);
    return NULL;
}

static void *forget_and_fail(void *argument) {
    struct crowd *crowd = argument;
    struct map *map = crowd->map;
    for (unsigned round = 0; !atomic_load(&crowd->stop); round++) {
        if (round % 4 == 0)
            ae_table_forget(map->table);
        pthread_mutex_lock(&map->machine.mutex);
        disk_fail(&map->disks[round % 2 * 2], DISK_READ, 1 + round % 7, -ESTALE);
        pthread_mutex_unlock(&map->machine.mutex);
        pause_us(1000);
    }
    return NULL;
}

/* In a table that has room for two of the six regions, while packs move and all is forgotten now and then. */
static void test_readers_in_a_crowd(void) {
    struct crowd crowd = {.map = map_start(12, CROWD_TABLE_BYTES, false)};
    crowd.volume = map_volume(crowd.map);
    struct crowd_reader readers[READERS];
    pthread_t threads[READERS], troubles;
    for (size_t i = 0; i < READERS; i++) {
        readers[i] = (struct crowd_reader){.crowd = &crowd, .seed = i};
        CHECK(pthread_create(&threads[i], NULL, read_at_random, &readers[i]) == 0);
    }
    CHECK(pthread_create(&troubles, NULL, forget_and_fail, &crowd) == 0);
    for (size_t i = 0; i < READERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    atomic_store(&crowd.stop, true);
    CHECK(pthread_join(troubles, NULL) == 0);
    struct ae_table_statistics counts;
    ae_table_statistics(crowd.map->table, &counts);
    CHECK(counts.evictions > 0 && counts.hits > 0);
    ae_table_forget(crowd.map->table);
    ae_table_statistics(crowd.map->table, &counts);
    CHECK_EQUAL(counts.bytes, 0);
    CHECK_EQUAL(counts.regions, 0);
    ae_volume_close(crowd.volume, false);
    map_end(crowd.map);
}

int main(void) {
    static const struct test tests[] = {
        {"sealed layers against plain bytes", test_model},
        {"damaged extents fail, and nothing else does", test_damaged_extents_fail_and_nothing_else_does},
        {"seeks are exact", test_seeks_are_exact},
        {"regions that cannot be", test_regions_that_cannot_be},
        {"a failing resolver fails the call", test_a_failing_resolver_fails_the_call},
        {"a pack that moved is looked for once more", test_a_pack_that_moved_is_looked_for_once_more},
        {"a truncated pack is no zeros", test_a_truncated_pack_is_no_zeros},
        {"copies from pack to head", test_copies_from_pack_to_head},
        {"one resolve serves all who wait", test_one_resolve_serves_all_who_wait},
        {"what is resolved during a forget is not kept", test_what_is_resolved_during_a_forget_is_not_kept},
        {"readers in a crowd", test_readers_in_a_crowd},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
