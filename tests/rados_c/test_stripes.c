/*
 * A data object as an array of bytes: against a model, and with the client stopped after each single change that it
 * makes to the cluster.
 */
#include "world.h"

#include <errno.h>
#include <string.h>

#ifndef SEQUENCES
#define SEQUENCES 24
#endif
#ifndef CHURNS
#define CHURNS 25
#endif
#ifndef ONLY_THREADS
#define ONLY_THREADS 0
#endif
#define STRIPES 5
#define SPAN (STRIPES * STRIPE)
#define KEY "layer/a"

struct world {
    struct ra_client *client;
    struct ra_data *data;
    char *model;
    uint64_t size;
    char *found;
};

static void world_open(struct world *world) {
    fake_reset();
    *world = (struct world){.client = client_open(0), .model = calloc(1, SPAN), .found = malloc(SPAN)};
    CHECK(world->model != NULL && world->found != NULL);
    CHECK_EQUAL(ra_data_create(world->client, KEY, &world->data), 0);
}

static void world_close(struct world *world) {
    ra_data_close(world->data);
    ra_client_close(world->client);
    CHECK_EQUAL(fake_clients(), 0);
    free(world->model);
    free(world->found);
}

enum kind { WRITE, WRITE_EACH, PUNCH, TRUNCATE };

struct change {
    enum kind kind;
    uint64_t offset;
    uint64_t length;
    char fill;
};

/* Something near or across borders of stripes. */
static struct change draw_change(uint64_t *random) {
    uint64_t border = random_below(random, STRIPES) * STRIPE;
    static const uint64_t lengths[] = {1, 4096, 70000, STRIPE - 1, STRIPE, STRIPE + 1, 2 * STRIPE + 5};
    static const uint64_t steps[] = {0, 0, 1, 4096, STRIPE - 1, STRIPE - 4096};
    struct change change = {.kind = (enum kind)random_below(random, 4),
                            .offset = border + steps[random_below(random, 6)],
                            .length = lengths[random_below(random, 7)],
                            .fill = (char)(1 + random_below(random, 100))};
    if (change.length > SPAN - change.offset)
        change.length = SPAN - change.offset;
    return change;
}

/* In pieces, of which the last comes first. */
static int apply_each(struct ra_data *data, const struct change *change) {
    enum { PIECES = 20 };
    char *bytes = malloc(change->length);
    CHECK(bytes != NULL);
    memset(bytes, change->fill, change->length);
    struct ae_write writes[PIECES];
    size_t count = 0;
    uint64_t piece = change->length / PIECES + 1;
    for (uint64_t end = change->length; end > 0; end -= writes[count++].length) {
        uint64_t length = end < piece ? end : piece;
        writes[count] = (struct ae_write){.buffer = bytes, .length = length, .offset = change->offset + end - length};
    }
    int result = ra_data_write_each(data, writes, count);
    free(bytes);
    return result;
}

static int apply(struct ra_data *data, const struct change *change) {
    if (change->kind == WRITE_EACH)
        return apply_each(data, change);
    if (change->kind == PUNCH)
        return ra_data_punch(data, change->offset, change->length);
    if (change->kind == TRUNCATE)
        return ra_data_truncate(data, change->offset);
    struct call call = {.data = data, .offset = change->offset, .length = change->length, .fill = change->fill};
    return call_write(&call);
}

static void apply_to_model(char *model, uint64_t *size, const struct change *change) {
    uint64_t end = change->offset + change->length;
    switch (change->kind) {
    case WRITE:
    case WRITE_EACH:
        memset(model + change->offset, change->fill, change->length);
        if (end > *size)
            *size = end;
        break;
    case PUNCH:
        memset(model + change->offset, 0, change->length);
        break;
    case TRUNCATE:
        memset(model + change->offset, 0, SPAN - change->offset);
        *size = change->offset;
        break;
    }
}

static uint64_t size_of(struct ra_data *data) {
    uint64_t size;
    CHECK_EQUAL(ra_data_size(data, &size), 0);
    return size;
}

static void test_model(void) {
    struct world world;
    for (uint64_t sequence = 0; sequence < SEQUENCES; sequence++) {
        uint64_t random = check_seed = random_seed(sequence);
        world_open(&world);
        struct ra_data *other;
        CHECK_EQUAL(ra_data_open(world.client, KEY, true, NULL, &other), 0);
        for (unsigned i = 0; i < 8; i++) {
            struct change change = draw_change(&random);
            CHECK_EQUAL(apply(random_below(&random, 2) ? other : world.data, &change), 0);
            apply_to_model(world.model, &world.size, &change);
            struct ra_data *reader = random_below(&random, 2) ? other : world.data;
            CHECK_EQUAL(size_of(reader), world.size);
            CHECK_EQUAL(ra_data_read(reader, world.found, SPAN, 0), 0);
            CHECK(memcmp(world.found, world.model, SPAN) == 0);
        }
        CHECK_EQUAL(ra_data_delete(world.client, KEY), 0);
        CHECK_EQUAL(fake_objects(), 0);
        ra_data_close(other);
        world_close(&world);
    }
}

/* No stripe is there that the header does not name. */
static void check_header(void) {
    for (uint64_t stripe = 0; stripe < STRIPES + 3; stripe++) {
        char name[256];
        stripe_name(KEY, stripe, name);
        if (fake_has(DATA_SPACE, name, NULL))
            CHECK_EQUAL(fake_byte(DATA_SPACE, KEY, HEADER_BYTES + stripe), 1);
    }
}

/* Each byte is what it was or what it was to become, and so is the size or something between. */
static void check_torn(struct world *world, const struct change *change) {
    uint64_t after_size = world->size;
    char *after = malloc(SPAN);
    CHECK(after != NULL);
    memcpy(after, world->model, SPAN);
    apply_to_model(after, &after_size, change);
    uint64_t least = world->size < after_size ? world->size : after_size;
    uint64_t most = world->size < after_size ? after_size : world->size;
    uint64_t size = size_of(world->data);
    CHECK(least <= size && size <= most);
    CHECK_EQUAL(ra_data_read(world->data, world->found, SPAN, 0), 0);
    for (uint64_t at = 0; at < SPAN; at += 61)
        CHECK(world->found[at] == world->model[at] || world->found[at] == after[at]);
    free(after);
}

/* What another client finds after ours ended with so many changes made. Returns whether that was in the middle. */
static bool crash_after(uint64_t seed, long changes) {
    struct world world;
    uint64_t random = check_seed = seed;
    world_open(&world);
    for (unsigned i = 0; i < 3; i++) {
        struct change change = draw_change(&random);
        CHECK_EQUAL(apply(world.data, &change), 0);
        apply_to_model(world.model, &world.size, &change);
    }
    struct change last = draw_change(&random);
    fake_crash_after(changes);
    int result = apply(world.data, &last);
    fake_crash_after(-1);
    ra_data_close(world.data);
    ra_client_close(world.client);
    world.client = client_open(0);
    CHECK_EQUAL(ra_data_open(world.client, KEY, true, NULL, &world.data), 0);
    check_header();
    check_torn(&world, &last);
    if (result == 0) {
        apply_to_model(world.model, &world.size, &last);
        CHECK_EQUAL(size_of(world.data), world.size);
        CHECK_EQUAL(ra_data_read(world.data, world.found, SPAN, 0), 0);
        CHECK(memcmp(world.found, world.model, SPAN) == 0);
    }
    /* Doing it again mends it. */
    CHECK_EQUAL(apply(world.data, &last), 0);
    if (result < 0) {
        apply_to_model(world.model, &world.size, &last);
        CHECK_EQUAL(ra_data_read(world.data, world.found, SPAN, 0), 0);
        CHECK(memcmp(world.found, world.model, SPAN) == 0);
    }
    CHECK_EQUAL(ra_data_delete(world.client, KEY), 0);
    CHECK_EQUAL(fake_objects(), 0);
    world_close(&world);
    return result < 0;
}

static void test_a_crash_after_each_step(void) {
    for (uint64_t sequence = 0; sequence < SEQUENCES / 4; sequence++) {
        long changes = 0;
        while (crash_after(random_seed(sequence), changes))
            changes++;
    }
}

static void test_a_deletion_that_crashes_is_never_half_there(void) {
    struct world world;
    for (long changes = 0;; changes++) {
        world_open(&world);
        struct change change = {.kind = WRITE, .length = SPAN, .fill = 7};
        CHECK_EQUAL(apply(world.data, &change), 0);
        fake_crash_after(changes);
        int result = ra_data_delete(world.client, KEY);
        fake_crash_after(-1);
        struct ra_data *found;
        int opened = ra_data_open(world.client, KEY, false, NULL, &found);
        /* As long as anything is left, it is found by whoever can remove it. */
        CHECK_EQUAL(ra_data_exists(world.client, KEY), result < 0 ? 0 : -ENOENT);
        int read = ra_data_read(world.data, world.found, SPAN, 0);
        if (opened == 0) {
            CHECK_EQUAL(read, 0);
            CHECK(memchr(world.found, 0, SPAN) == NULL);
            ra_data_close(found);
        } else {
            CHECK_EQUAL(opened, -ENOENT);
            /* Whoever had it open never reads zeros for what is gone. */
            CHECK(read == -ENOENT || (read == 0 && memchr(world.found, 0, SPAN) == NULL));
        }
        change = (struct change){.kind = WRITE, .offset = SPAN, .length = 1, .fill = 7};
        CHECK_EQUAL(apply(world.data, &change), opened);
        CHECK_EQUAL(ra_data_delete(world.client, KEY), 0);
        CHECK_EQUAL(fake_objects(), 0);
        CHECK_EQUAL(ra_data_truncate(world.data, 5), -ENOENT);
        CHECK_EQUAL(fake_objects(), 0);
        world_close(&world);
        if (result == 0)
            break;
    }
}

static void test_a_write_that_arrives_late_is_not_lost_sight_of(void) {
    struct world world;
    char name[256];
    world_open(&world);
    struct change change = {.kind = WRITE, .offset = 2 * STRIPE, .length = 4096, .fill = 7};
    stripe_name(KEY, 2, name);
    fake_hold(name);
    CHECK_EQUAL(apply(world.data, &change), -ETIMEDOUT);
    fake_hold(NULL);
    CHECK_EQUAL(ra_data_truncate(world.data, 0), 0);
    fake_arrive();
    CHECK(fake_has(DATA_SPACE, name, NULL));
    CHECK_EQUAL(size_of(world.data), 2 * STRIPE + 4096);
    CHECK_EQUAL(ra_data_delete(world.client, KEY), 0);
    CHECK_EQUAL(fake_objects(), 0);
    world_close(&world);
}

static void test_a_full_cluster(void) {
    struct world world;
    world_open(&world);
    struct change change = {.kind = WRITE, .length = STRIPE + 5, .fill = 7};
    CHECK_EQUAL(apply(world.data, &change), 0);
    fake_full(true);
    CHECK_EQUAL(apply(world.data, &change), 0);
    struct change more = {.kind = WRITE, .offset = STRIPE, .length = STRIPE, .fill = 8};
    CHECK_EQUAL(apply(world.data, &more), -ENOSPC);
    more.offset = 4 * STRIPE;
    CHECK_EQUAL(apply(world.data, &more), -ENOSPC);
    CHECK_EQUAL(ra_data_punch(world.data, 0, STRIPE + 5), 0);
    CHECK_EQUAL(size_of(world.data), STRIPE + 5);
    CHECK_EQUAL(ra_data_delete(world.client, KEY), 0);
    CHECK_EQUAL(fake_objects(), 0);
    world_close(&world);
}

static void test_limits(void) {
    struct world world;
    struct ra_data *other;
    char bytes[8] = "abcdefg", found[8];
    world_open(&world);
    CHECK_EQUAL(ra_data_create(world.client, KEY, &other), -EEXIST);
    CHECK_EQUAL(ra_data_write(world.data, bytes, 4, RA_DATA_BYTES_MAX - 4), 0);
    CHECK_EQUAL(ra_data_write(world.data, bytes, 5, RA_DATA_BYTES_MAX - 4), -EFBIG);
    CHECK_EQUAL(ra_data_write(world.data, bytes, 5, UINT64_MAX - 2), -EFBIG);
    struct ae_write writes[] = {{bytes, 4, 0}, {bytes, 5, RA_DATA_BYTES_MAX - 4}, {bytes, 0, 0}};
    CHECK_EQUAL(ra_data_write_each(world.data, writes, 2), -EFBIG);
    CHECK_EQUAL(ra_data_write_each(world.data, writes + 2, 1), -EINVAL);
    CHECK_EQUAL(ra_data_write_each(world.data, writes, 0), 0);
    CHECK_EQUAL(ra_data_truncate(world.data, RA_DATA_BYTES_MAX + 1), -EFBIG);
    CHECK_EQUAL(size_of(world.data), RA_DATA_BYTES_MAX);
    memset(found, 1, sizeof found);
    CHECK_EQUAL(ra_data_read(world.data, found, 8, RA_DATA_BYTES_MAX - 4), 0);
    CHECK(memcmp(found, "abcd\0\0\0\0", 8) == 0);
    memset(found, 1, sizeof found);
    CHECK_EQUAL(ra_data_read(world.data, found, 8, UINT64_MAX - 2), 0);
    CHECK(memcmp(found, "\0\0\0\0\0\0\0\0", 8) == 0);
    CHECK_EQUAL(ra_data_punch(world.data, UINT64_MAX - 2, UINT64_MAX), 0);
    CHECK_EQUAL(ra_data_punch(world.data, RA_DATA_BYTES_MAX - 4, UINT64_MAX), 0);
    CHECK_EQUAL(ra_data_read(world.data, found, 4, RA_DATA_BYTES_MAX - 4), 0);
    CHECK(memcmp(found, "\0\0\0\0", 4) == 0);
    CHECK_EQUAL(ra_data_open(world.client, KEY, false, NULL, &other), 0);
    CHECK_EQUAL(ra_data_write(other, bytes, 4, 0), -EBADF);
    CHECK_EQUAL(ra_data_write_each(other, writes, 1), -EBADF);
    CHECK_EQUAL(ra_data_punch(other, 0, 4), -EBADF);
    CHECK_EQUAL(ra_data_truncate(other, 0), -EBADF);
    ra_data_close(other);
    world_close(&world);
}

static void test_as_the_engine_has_it(void) {
    struct world world;
    struct ae_object object;
    char found[3];
    uint64_t at;
    world_open(&world);
    ra_data_share(world.data, &object);
    ra_data_close(world.data);
    CHECK(object.waits);
    CHECK_EQUAL(object.ops->pwrite(object.ctx, "abc", 3, STRIPE - 1), 0);
    CHECK_EQUAL(object.ops->flush(object.ctx), 0);
    CHECK_EQUAL(object.ops->pread(object.ctx, found, 3, STRIPE - 1), 0);
    CHECK(memcmp(found, "abc", 3) == 0);
    CHECK_EQUAL(object.ops->next_data(object.ctx, 5, &at), 0);
    CHECK_EQUAL(at, 5);
    CHECK_EQUAL(object.ops->next_hole(object.ctx, 5, &at), 0);
    CHECK_EQUAL(at, STRIPE + 2);
    CHECK_EQUAL(object.ops->next_data(object.ctx, STRIPE + 2, &at), -ENXIO);
    CHECK_EQUAL(object.ops->truncate(object.ctx, 3 * STRIPE), 0);
    CHECK_EQUAL(object.ops->next_hole(object.ctx, 5, &at), 0);
    CHECK_EQUAL(at, 2 * STRIPE);
    CHECK_EQUAL(object.ops->next_data(object.ctx, 2 * STRIPE, &at), -ENXIO);
    /* That the cluster does not answer is EIO to a guest. */
    fake_fail(KEY, false, -ETIMEDOUT, 1);
    CHECK_EQUAL(object.ops->pread(object.ctx, found, 3, 0), -EIO);
    object.ops->close(object.ctx);
    ra_client_close(world.client);
    CHECK_EQUAL(fake_clients(), 0);
    free(world.model);
    free(world.found);
}

static void test_first_writes_at_once(void) {
    struct world world;
    world_open(&world);
    enum { THREADS = 24 };
    struct call calls[THREADS];
    fake_delay_us(300);
    for (unsigned round = 0; round < 4; round++) {
        fake_crash_after(-1);
        for (unsigned i = 0; i < THREADS; i++) {
            calls[i] = (struct call){.make = call_write,
                                     .data = world.data,
                                     .offset = (round * THREADS + i) * STRIPE / 2,
                                     .length = 100,
                                     .fill = (char)(i + 1)};
            call_start(&calls[i]);
        }
        for (unsigned i = 0; i < THREADS; i++)
            CHECK_EQUAL(call_end(&calls[i]), 0);
        /* A write each, and the header less often than each stripe would take alone. */
        CHECK(fake_changes() < THREADS + THREADS / 2);
        for (unsigned i = 0; i < THREADS; i++) {
            char found[100];
            CHECK_EQUAL(ra_data_read(world.data, found, 100, (round * THREADS + i) * STRIPE / 2), 0);
            CHECK(found[0] == (char)(i + 1) && found[99] == (char)(i + 1));
        }
    }
    fake_delay_us(0);
    CHECK_EQUAL(ra_data_delete(world.client, KEY), 0);
    CHECK_EQUAL(fake_objects(), 0);
    world_close(&world);
}

/* Punches, truncates and writes beside each other: none of them makes a stripe that nobody knows of. */
static int churn(struct call *call) {
    uint64_t random = random_seed((uint64_t)call->fill);
    for (unsigned i = 0; i < CHURNS; i++) {
        struct change change = draw_change(&random);
        change.length = change.length < 100000 ? change.length : STRIPE;
        if (change.length > SPAN - change.offset)
            change.length = SPAN - change.offset;
        int result = apply(call->data, &change);
        if (result < 0)
            return result;
    }
    return 0;
}

static void test_changes_at_once(void) {
    struct world world;
    world_open(&world);
    struct call calls[6];
    fake_delay_us(50);
    for (unsigned i = 0; i < 6; i++) {
        calls[i] = (struct call){.make = churn, .data = world.data, .fill = (char)(i + 1)};
        call_start(&calls[i]);
    }
    for (unsigned i = 0; i < 6; i++)
        CHECK_EQUAL(call_end(&calls[i]), 0);
    check_header();
    CHECK(size_of(world.data) <= SPAN);
    CHECK_EQUAL(ra_data_delete(world.client, KEY), 0);
    CHECK_EQUAL(fake_objects(), 0);
    world_close(&world);
}

int main(void) {
    static const struct test tests[] = {
        {"first writes at once", test_first_writes_at_once},
        {"changes at once", test_changes_at_once},
        /* From here on, each is one thread. */
        {"model", test_model},
        {"a crash after each step", test_a_crash_after_each_step},
        {"a deletion that crashes is never half there", test_a_deletion_that_crashes_is_never_half_there},
        {"a write that arrives late is not lost sight of", test_a_write_that_arrives_late_is_not_lost_sight_of},
        {"a full cluster", test_a_full_cluster},
        {"limits", test_limits},
        {"as the engine has it", test_as_the_engine_has_it},
    };
    return run_tests(tests, ONLY_THREADS ? 2 : sizeof tests / sizeof *tests);
}
