/* Claims, being shut out and going on, operations that are not answered, and the end of a client. */
#include "world.h"

#include "client.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#ifndef ROUNDS
#define ROUNDS 40
#endif
#define KEY "layer/a"
#define LOCK "lock/a"
#define CLAIM_OBJECT "claim/" LOCK

static void shut_out(struct ra_client *client) {
    char address[100];
    CHECK_EQUAL(ra_client_addresses(client, address, sizeof address), 0);
    fake_blocklist(address);
}

static struct ra_data *open_claimed(struct ra_client *client) {
    struct ra_data *data;
    CHECK_EQUAL(ra_data_create(client, KEY, &data), 0);
    ra_data_close(data);
    CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
    CHECK_EQUAL(ra_data_open(client, KEY, true, LOCK, &data), 0);
    return data;
}

static bool knows(void *client) { return ra_client_is_shut_out(client); }
static bool is_done(void *call) { return call_is_done(call); }
static bool one_is_stopped(void *argument) {
    (void)argument;
    return fake_stopped() == 1;
}

static bool is_given_up(void *client) {
    struct ra_data *data;
    int result = ra_data_open(client, KEY, false, LOCK, &data);
    if (result == 0)
        ra_data_close(data);
    return result == -EIO;
}

static void test_a_claim_has_one_owner(void) {
    fake_reset();
    struct ra_client *client = client_open(0), *other = client_open(0);
    bool kept;
    CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
    CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 1);
    CHECK_EQUAL(ra_claim(other, LOCK, "node/2"), -EBUSY);
    CHECK_EQUAL(ra_claim(other, LOCK, "node/1"), 0);
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 2);
    CHECK_EQUAL(ra_disclaim(other, LOCK, &kept), 0);
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK(!kept);
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 0);
    CHECK_EQUAL(ra_claim(other, LOCK, "node/2"), 0);
    struct ra_data *data;
    CHECK_EQUAL(ra_data_open(client, KEY, true, LOCK, &data), -EIO);
    ra_client_close(other);
    ra_client_close(client);
}

static int disclaim(struct call *call) {
    bool kept;
    int result = ra_disclaim(call->client, LOCK, &kept);
    return result == 0 && kept ? 1 : result;
}

static void test_giving_a_claim_up_waits_for_what_is_under_way(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *data = open_claimed(client);
    struct call write = {.make = call_write, .data = data, .length = 100, .fill = 1};
    struct call end = {.make = disclaim, .client = client};
    fake_stop(KEY "/");
    call_start(&write);
    wait_until(one_is_stopped, NULL);
    call_start(&end);
    /* Nothing more comes in, and the lock stays until the write has arrived. */
    wait_until(is_given_up, client);
    CHECK(!call_is_done(&end));
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 1);
    fake_stop(NULL);
    CHECK_EQUAL(call_end(&end), 0);
    CHECK_EQUAL(call_end(&write), 0);
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 0);
    ra_data_close(data);
    ra_client_close(client);
}

static void test_a_claim_under_which_a_write_was_not_answered_is_kept(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *data = open_claimed(client);
    CHECK_EQUAL(ra_data_write(data, "x", 1, 0), 0);
    fake_hold(KEY "/");
    CHECK_EQUAL(ra_data_write(data, "y", 1, 0), -ETIMEDOUT);
    fake_hold(NULL);
    bool kept;
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK(kept);
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 1);
    /* Claimed again it is as it was: the write may still be on its way. */
    CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK(kept);
    /* By another connection it is free of that: the former one is shut out. */
    shut_out(client);
    struct ra_client *successor = client_open(0);
    ra_client_adopt(client, successor);
    CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK(!kept);
    ra_data_close(data);
    ra_client_close(client);
    ra_client_close(successor);
    CHECK_EQUAL(fake_clients(), 0);
}

static void test_what_a_former_owner_opened_stays_without_a_claim(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *former = open_claimed(client), *present;
    bool kept;
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK_EQUAL(ra_claim(client, LOCK, "node/3"), 0);
    CHECK_EQUAL(ra_data_write(former, "x", 1, 0), -EIO);
    CHECK_EQUAL(ra_data_open(client, KEY, true, LOCK, &present), 0);
    CHECK_EQUAL(ra_data_write(present, "y", 1, 0), 0);
    CHECK_EQUAL(ra_data_write(former, "x", 1, 0), -EIO);
    ra_data_close(former);
    CHECK_EQUAL(ra_data_write(present, "z", 1, 0), 0);
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 0);
    ra_data_close(present);
    ra_client_close(client);
    CHECK_EQUAL(fake_clients(), 0);
}

/* Told again, too, when giving it up is repeated: else somebody would take the lock for one that may go. */
static void test_that_a_claim_is_kept_is_said_each_time(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *data = open_claimed(client);
    bool kept;
    CHECK_EQUAL(ra_data_write(data, "x", 1, 0), 0);
    fake_hold(KEY "/");
    CHECK_EQUAL(ra_data_write(data, "y", 1, 0), -ETIMEDOUT);
    fake_hold(NULL);
    for (unsigned i = 0; i < 2; i++) {
        CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
        CHECK(kept);
    }
    CHECK_EQUAL(ra_claim(client, LOCK, "node/2"), -EBUSY);
    CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK(kept);
    ra_data_close(data);
    ra_client_close(client);
    CHECK_EQUAL(fake_clients(), 0);
}

static void test_a_read_that_was_not_answered_keeps_no_claim(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *data = open_claimed(client);
    char byte;
    bool kept;
    fake_fail(KEY, false, -ETIMEDOUT, 1);
    CHECK_EQUAL(ra_data_read(data, &byte, 1, 0), -ETIMEDOUT);
    CHECK_EQUAL(ra_disclaim(client, LOCK, &kept), 0);
    CHECK(!kept);
    ra_data_close(data);
    ra_client_close(client);
}

static void test_who_waits_goes_on_when_the_claim_is_there_again(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *data = open_claimed(client), *free_one;
    CHECK_EQUAL(ra_data_open(client, KEY, false, NULL, &free_one), 0);
    CHECK_EQUAL(ra_claim(client, "lock/b", "node/1"), 0);
    struct ra_data *lost;
    CHECK_EQUAL(ra_data_open(client, KEY, true, "lock/b", &lost), 0);
    shut_out(client);
    struct call write = {.make = call_write, .data = data, .length = 3 * STRIPE, .fill = 5};
    struct call never = {.make = call_write, .data = lost, .length = 10, .fill = 6};
    call_start(&write);
    call_start(&never);
    wait_until(knows, client);
    char byte = 9;
    CHECK_EQUAL(ra_data_read(free_one, &byte, 1, 0), -ESHUTDOWN);
    struct ae_object object;
    ra_data_share(free_one, &object);
    CHECK_EQUAL(object.ops->pread(object.ctx, &byte, 1, 0), -ESHUTDOWN);
    object.ops->close(object.ctx);
    CHECK_EQUAL(ra_claim(client, "lock/c", "node/1"), -ESHUTDOWN);
    CHECK_EQUAL(ra_client_wait_for_latest_map(client), -ESHUTDOWN);

    struct ra_client *successor = client_open(0);
    ra_client_adopt(client, successor);
    ra_client_close(successor);
    CHECK(!ra_client_is_shut_out(client));
    CHECK_EQUAL(ra_client_wait_for_latest_map(client), 0);
    CHECK_EQUAL(ra_data_read(free_one, &byte, 1, 0), 0);
    CHECK_EQUAL(byte, 0);
    CHECK(!call_is_done(&write) && !call_is_done(&never));
    bool kept;
    CHECK_EQUAL(ra_disclaim(client, "lock/b", &kept), 0);
    CHECK_EQUAL(call_end(&never), -EIO);
    CHECK(!call_is_done(&write));
    CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
    CHECK_EQUAL(call_end(&write), 0);
    CHECK_EQUAL(ra_data_read(free_one, &byte, 1, 3 * STRIPE - 1), 0);
    CHECK_EQUAL(byte, 5);
    ra_data_close(lost);
    ra_data_close(free_one);
    ra_data_close(data);
    ra_client_close(client);
    CHECK_EQUAL(fake_clients(), 0);
}

static void test_waiting_for_a_claim_ends(void) {
    fake_reset();
    struct ra_client *client = client_open(1);
    struct ra_data *data = open_claimed(client);
    shut_out(client);
    CHECK_EQUAL(ra_data_write(data, "x", 1, 0), -EIO);
    ra_data_close(data);
    ra_client_close(client);
}

static void test_closing_ends_the_waiting(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *data = open_claimed(client);
    shut_out(client);
    struct call write = {.make = call_write, .data = data, .length = 10, .fill = 1};
    call_start(&write);
    wait_until(knows, client);
    ra_client_close(client);
    CHECK_EQUAL(call_end(&write), -EIO);
    CHECK_EQUAL(fake_clients(), 1);
    ra_data_close(data);
    CHECK_EQUAL(fake_clients(), 0);
}

static void test_a_connection_outlives_the_calls_that_use_it(void) {
    fake_reset();
    struct ra_client *client = client_open(0), *successor = client_open(0);
    struct ra_data *data;
    CHECK_EQUAL(ra_data_create(client, KEY, &data), 0);
    CHECK_EQUAL(ra_data_write(data, "x", 1, 0), 0);
    struct call write = {.make = call_write, .data = data, .length = 100, .fill = 1};
    fake_stop(KEY "/");
    call_start(&write);
    wait_until(one_is_stopped, NULL);
    ra_client_adopt(client, successor);
    ra_client_close(client);
    CHECK_EQUAL(fake_clients(), 2);
    CHECK(!call_is_done(&write));
    fake_stop(NULL);
    CHECK_EQUAL(call_end(&write), 0);
    CHECK_EQUAL(fake_clients(), 1);
    ra_data_close(data);
    ra_client_close(successor);
    CHECK_EQUAL(fake_clients(), 0);
}

/* Who waits for a change of the header that somebody else makes is not shut out with him. */
static void test_a_change_of_the_header_by_one_who_is_shut_out(void) {
    for (unsigned round = 0; round < 20; round++) {
        fake_reset();
        struct ra_client *client = client_open(0), *successor = client_open(0);
        struct ra_data *data;
        CHECK_EQUAL(ra_data_create(client, KEY, &data), 0);
        struct call calls[5];
        for (unsigned i = 0; i < 5; i++)
            calls[i] = (struct call){.make = call_write, .data = data, .offset = i * STRIPE, .length = 9, .fill = 1};
        char address[100];
        CHECK_EQUAL(ra_client_addresses(client, address, sizeof address), 0);
        /* The first is changing the header, two more wait for that, and two by the next connection. */
        fake_stop(KEY);
        call_start(&calls[0]);
        wait_until(one_is_stopped, NULL);
        call_start(&calls[1]);
        call_start(&calls[2]);
        struct timespec pause = {.tv_nsec = 3000000};
        nanosleep(&pause, NULL);
        ra_client_adopt(client, successor);
        call_start(&calls[3]);
        call_start(&calls[4]);
        nanosleep(&pause, NULL);
        fake_blocklist(address);
        fake_stop(NULL);
        CHECK_EQUAL(call_end(&calls[0]), -ESHUTDOWN);
        /* They may have been slow to begin. */
        int second = call_end(&calls[1]), third = call_end(&calls[2]);
        CHECK(second == 0 || second == -ESHUTDOWN);
        CHECK(third == 0 || third == -ESHUTDOWN);
        CHECK_EQUAL(call_end(&calls[3]), 0);
        CHECK_EQUAL(call_end(&calls[4]), 0);
        CHECK(!ra_client_is_shut_out(client));
        ra_data_close(data);
        ra_client_close(client);
        ra_client_close(successor);
    }
}

struct storm {
    struct ra_data *data;
    atomic_bool stop;
    atomic_uint written;
};

static int storm_write(struct call *call) {
    struct storm *storm = (struct storm *)(void *)call->client;
    uint64_t random = random_seed((uint64_t)call->fill);
    char block[512], found[512];
    while (!atomic_load(&storm->stop)) {
        /* Each thread has blocks of its own. */
        uint64_t block_at = random_below(&random, 64) * 8 + (uint64_t)call->fill;
        uint64_t offset = block_at % 16 * (STRIPE / 2) + block_at * 512;
        memset(block, (int)(random_below(&random, 255) + 1), sizeof block);
        int result = ra_data_write(storm->data, block, sizeof block, offset);
        if (result == 0)
            result = ra_data_read(storm->data, found, sizeof found, offset);
        if (result < 0)
            return result;
        CHECK(memcmp(block, found, sizeof block) == 0);
        atomic_fetch_add(&storm->written, 1);
    }
    return 0;
}

/* Shut out and back again, over and over, beside those who write and read: none of them notices. */
static void test_shut_out_over_and_over(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct storm storm = {.data = open_claimed(client)};
    struct call calls[5];
    fake_delay_us(30);
    for (unsigned i = 0; i < 5; i++) {
        calls[i] = (struct call){.make = storm_write, .client = (void *)&storm, .fill = (char)i};
        call_start(&calls[i]);
    }
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned before = atomic_load(&storm.written);
        shut_out(client);
        wait_until(knows, client);
        struct ra_client *successor = client_open(0);
        ra_client_adopt(client, successor);
        ra_client_close(successor);
        CHECK_EQUAL(ra_claim(client, LOCK, "node/1"), 0);
        struct timespec pause = {.tv_nsec = 2000000};
        for (unsigned i = 0; i < 5000 && atomic_load(&storm.written) < before + 20; i++)
            nanosleep(&pause, NULL);
        CHECK(atomic_load(&storm.written) >= before + 20);
    }
    atomic_store(&storm.stop, true);
    for (unsigned i = 0; i < 5; i++)
        CHECK_EQUAL(call_end(&calls[i]), 0);
    fake_delay_us(0);
    ra_data_close(storm.data);
    CHECK_EQUAL(ra_data_delete(client, KEY), 0);
    ra_client_close(client);
    CHECK_EQUAL(fake_clients(), 0);
}

static void test_giving_up_a_claim_does_not_wait_for_those_who_wait(void) {
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_data *data = open_claimed(client);
    shut_out(client);
    struct call write = {.make = call_write, .data = data, .length = 10, .fill = 1};
    call_start(&write);
    wait_until(knows, client);
    struct call end = {.make = disclaim, .client = client};
    call_start(&end);
    wait_until(is_done, &end);
    CHECK_EQUAL(call_end(&write), -EIO);
    CHECK_EQUAL(call_end(&end), -ESHUTDOWN);
    ra_data_close(data);
    ra_client_close(client);
}

static void test_what_cannot_be_opened(void) {
    fake_reset();
    struct ra_settings settings = {.library = "./none.so", .conf = "conf", .user = "a", .pool = "pool", .space = "s"};
    struct ra_client *client;
    char problem[500];
    settings.timeout_s = 1;
    CHECK_EQUAL(ra_client_open(&settings, &client, problem, sizeof problem), -ENOPKG);
    CHECK(strstr(problem, "none.so") != NULL);
    settings.library = "libm.so.6";
    CHECK_EQUAL(ra_client_open(&settings, &client, problem, sizeof problem), -ENOPKG);
    CHECK(strstr(problem, "rados_create") != NULL);
    settings.library = FAKE;
    settings.conf = "missing";
    CHECK_EQUAL(ra_client_open(&settings, &client, problem, sizeof problem), -ENOENT);
    CHECK(strstr(problem, "missing") != NULL);
    settings.conf = "conf";
    settings.pool = "missing";
    CHECK_EQUAL(ra_client_open(&settings, &client, problem, sizeof problem), -ENOENT);
    CHECK(strstr(problem, "pool missing") != NULL);
    CHECK_EQUAL(fake_clients(), 0);

    char key[RA_KEY_BYTES_MAX + 2];
    memset(key, 'a', sizeof key - 1);
    key[sizeof key - 1] = '\0';
    struct ra_data *data;
    struct ra_pack *pack;
    bool kept;
    client = client_open(0);
    CHECK_EQUAL(ra_data_create(client, key, &data), -EINVAL);
    CHECK_EQUAL(ra_data_open(client, key, false, NULL, &data), -EINVAL);
    CHECK_EQUAL(ra_data_delete(client, key), -EINVAL);
    CHECK_EQUAL(ra_data_exists(client, key), -EINVAL);
    CHECK_EQUAL(ra_pack_open(client, key, &pack), -EINVAL);
    CHECK_EQUAL(ra_claim(client, key, "node/1"), -EINVAL);
    CHECK_EQUAL(ra_disclaim(client, key, &kept), -EINVAL);
    CHECK_EQUAL(ra_data_open(client, KEY, false, NULL, &data), -ENOENT);
    CHECK_EQUAL(ra_pack_open(client, KEY, &pack), -ENOENT);
    ra_client_close(client);
    CHECK_EQUAL(fake_clients(), 0);
}

static void test_a_pack_is_read_over_an_encrypted_connection(void) {
    enum { BYTES = 5003 };
    fake_reset();
    struct ra_client *client = client_open(0);
    struct ra_connection *connection = client->connection;
    char content[BYTES], found[BYTES] = {0};
    memset(content, 'p', BYTES);
    CHECK_EQUAL(connection->library.write(connection->packs, "pack/a", content, BYTES, 0), 0);
    struct ra_pack *pack;
    CHECK_EQUAL(ra_pack_open(client, "pack/a", &pack), 0);
    fake_encrypt();
    CHECK_EQUAL(ra_pack_read(pack, found, BYTES, 0), 0);
    CHECK_EQUAL(memcmp(found, content, BYTES), 0);
    ra_pack_close(pack);
    ra_client_close(client);
}

int main(void) {
    static const struct test tests[] = {
        {"a claim has one owner", test_a_claim_has_one_owner},
        {"giving a claim up waits for what is under way", test_giving_a_claim_up_waits_for_what_is_under_way},
        {"a write was not answered: the claim is kept", test_a_claim_under_which_a_write_was_not_answered_is_kept},
        {"what a former owner opened", test_what_a_former_owner_opened_stays_without_a_claim},
        {"that a claim is kept is said each time", test_that_a_claim_is_kept_is_said_each_time},
        {"a read was not answered: it is not", test_a_read_that_was_not_answered_keeps_no_claim},
        {"who waits goes on when the claim is there", test_who_waits_goes_on_when_the_claim_is_there_again},
        {"waiting for a claim ends", test_waiting_for_a_claim_ends},
        {"closing ends the waiting", test_closing_ends_the_waiting},
        {"a connection outlives the calls that use it", test_a_connection_outlives_the_calls_that_use_it},
        {"a change of the header by one who is shut out", test_a_change_of_the_header_by_one_who_is_shut_out},
        {"giving up does not wait for those who wait", test_giving_up_a_claim_does_not_wait_for_those_who_wait},
        {"shut out over and over", test_shut_out_over_and_over},
        {"what cannot be opened", test_what_cannot_be_opened},
        {"a pack over an encrypted connection", test_a_pack_is_read_over_an_encrypted_connection},
    };
    return run_tests(tests, sizeof tests / sizeof *tests);
}
