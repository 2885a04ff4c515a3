/* Reads and writes that go on while no thread waits for them, by the functions that the engine has. */
#include "world.h"

#include "striped.h"

#include <errno.h>
#include <string.h>

#ifndef CHURNS
#define CHURNS 25
#endif
#define KEY "layer/a"
#define LOCK "lock/a"
#define CLAIM_OBJECT "claim/" LOCK
#define LENGTH 4096

/* One of them. */
struct flight {
    struct ae_transfer transfer;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool landed;
    char bytes[LENGTH];
};

static void land(struct ae_transfer *transfer) {
    struct flight *flight = (struct flight *)transfer;
    pthread_mutex_lock(&flight->mutex);
    CHECK(!flight->landed);
    flight->landed = true;
    pthread_cond_signal(&flight->changed);
    pthread_mutex_unlock(&flight->mutex);
}

static void flight_init(struct flight *flight, char fill) {
    *flight = (struct flight){.transfer.landed = land};
    CHECK_EQUAL(pthread_mutex_init(&flight->mutex, NULL), 0);
    CHECK_EQUAL(pthread_cond_init(&flight->changed, NULL), 0);
    memset(flight->bytes, fill, LENGTH);
}

static void flight_destroy(struct flight *flight) {
    pthread_cond_destroy(&flight->changed);
    pthread_mutex_destroy(&flight->mutex);
}

static int begin_write(struct flight *flight, const struct ae_object *object, uint64_t offset) {
    return object->ops->pwrite_begin(object->ctx, flight->bytes, LENGTH, offset, &flight->transfer);
}

static int begin_read(struct flight *flight, const struct ae_object *object, uint64_t offset) {
    return object->ops->pread_begin(object->ctx, flight->bytes, LENGTH, offset, &flight->transfer);
}

static bool has_landed(void *argument) {
    struct flight *flight = argument;
    pthread_mutex_lock(&flight->mutex);
    bool landed = flight->landed;
    pthread_mutex_unlock(&flight->mutex);
    return landed;
}

static int settle(struct flight *flight, const struct ae_object *object) {
    pthread_mutex_lock(&flight->mutex);
    while (!flight->landed)
        pthread_cond_wait(&flight->changed, &flight->mutex);
    pthread_mutex_unlock(&flight->mutex);
    return object->ops->settle(object->ctx, &flight->transfer);
}

/* A whole one, that is begun. */
static int write_one(const struct ae_object *object, uint64_t offset, char fill) {
    struct flight flight;
    flight_init(&flight, fill);
    int result = begin_write(&flight, object, offset);
    if (result == 0)
        result = settle(&flight, object);
    flight_destroy(&flight);
    return result;
}

static int read_one(const struct ae_object *object, uint64_t offset, char bytes[LENGTH]) {
    struct flight flight;
    flight_init(&flight, '?');
    int result = begin_read(&flight, object, offset);
    if (result == 0)
        result = settle(&flight, object);
    if (result == 0)
        memcpy(bytes, flight.bytes, LENGTH);
    flight_destroy(&flight);
    return result;
}

static bool all_are(const char *bytes, size_t length, char byte) {
    for (size_t i = 0; i < length; i++)
        if (bytes[i] != byte)
            return false;
    return true;
}

struct place {
    struct ra_client *client;
    struct ra_data *data;
    struct ae_object object;
};

static void place_make(struct place *place, bool claimed, unsigned operation_timeout_s) {
    fake_reset();
    place->client = client_open(operation_timeout_s);
    CHECK_EQUAL(ra_data_create(place->client, KEY, &place->data), 0);
    if (claimed) {
        ra_data_close(place->data);
        CHECK_EQUAL(ra_claim(place->client, LOCK, "node/1"), 0);
        CHECK_EQUAL(ra_data_open(place->client, KEY, true, LOCK, &place->data), 0);
    }
    ra_data_share(place->data, &place->object);
}

static void place_close(struct place *place) {
    place->object.ops->close(place->object.ctx);
    ra_data_close(place->data);
    ra_client_close(place->client);
    CHECK_EQUAL(fake_clients(), 0);
}

static void shut_out(struct ra_client *client) {
    char address[100];
    CHECK_EQUAL(ra_client_addresses(client, address, sizeof address), 0);
    fake_blocklist(address);
}

static bool is_done(void *call) { return call_is_done(call); }
static bool one_is_stopped(void *argument) {
    (void)argument;
    return fake_stopped() == 1;
}

static void test_what_was_begun_arrives(void) {
    struct place place;
    place_make(&place, false, 0);
    char bytes[LENGTH];
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, STRIPE), 0);
    CHECK_EQUAL(write_one(&place.object, STRIPE + LENGTH, 'a'), 0);
    CHECK_EQUAL(read_one(&place.object, STRIPE + LENGTH, bytes), 0);
    CHECK(all_are(bytes, LENGTH, 'a'));
    /* Behind the end of a stripe are zeros. */
    CHECK_EQUAL(read_one(&place.object, STRIPE + LENGTH + 1, bytes), 0);
    CHECK(all_are(bytes, LENGTH - 1, 'a') && bytes[LENGTH - 1] == 0);
    uint64_t size;
    CHECK_EQUAL(ra_data_size(place.data, &size), 0);
    CHECK_EQUAL(size, STRIPE + 2 * LENGTH);
    place_close(&place);
}

static void test_what_takes_more_than_that_is_not_begun(void) {
    struct place place;
    place_make(&place, false, 0);
    struct flight flight;
    flight_init(&flight, 'a');
    const struct ae_object *object = &place.object;
    /* The stripe's byte has to be set before. */
    CHECK_EQUAL(begin_write(&flight, object, 0), -EAGAIN);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, STRIPE), 0);
    CHECK_EQUAL(begin_write(&flight, object, STRIPE - 1), -EAGAIN);
    CHECK_EQUAL(begin_read(&flight, object, STRIPE - 1), -EAGAIN);
    CHECK_EQUAL(begin_write(&flight, object, RA_DATA_BYTES_MAX), -EAGAIN);
    CHECK_EQUAL(begin_read(&flight, object, RA_DATA_BYTES_MAX), -EAGAIN);
    CHECK_EQUAL(object->ops->pwrite_begin(object->ctx, flight.bytes, 0, 0, &flight.transfer), -EAGAIN);
    struct ra_data *readable;
    struct ae_object shared;
    CHECK_EQUAL(ra_data_open(place.client, KEY, false, NULL, &readable), 0);
    ra_data_share(readable, &shared);
    CHECK_EQUAL(begin_write(&flight, &shared, 0), -EAGAIN);
    shared.ops->close(shared.ctx);
    ra_data_close(readable);
    CHECK(!flight.landed);
    flight_destroy(&flight);
    place_close(&place);
}

static void test_why_a_stripe_is_missing_is_for_who_may_wait(void) {
    struct place place;
    place_make(&place, false, 0);
    char bytes[LENGTH];
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 2 * STRIPE), 0);
    CHECK_EQUAL(ra_data_punch(place.data, 0, STRIPE), 0);
    CHECK_EQUAL(read_one(&place.object, 0, bytes), -EAGAIN);
    CHECK_EQUAL(ra_data_read(place.data, bytes, LENGTH, 0), 0);
    CHECK(all_are(bytes, LENGTH, 0));
    place_close(&place);
}

static int truncate_to_nothing(struct call *call) { return ra_data_truncate(call->data, 0); }

static bool is_refused(void *argument) { return write_one(argument, 2 * LENGTH, 'b') == -EAGAIN; }

static void test_what_is_read_encrypted_is_for_who_may_wait(void) {
    struct place place;
    char bytes[LENGTH];
    place_make(&place, false, 0);
    memset(bytes, 'e', LENGTH);
    CHECK_EQUAL(ra_data_write(place.data, bytes, 1000, 0), 0);
    CHECK_EQUAL(ra_data_write(place.data, bytes, 10, STRIPE - 5), 0);
    fake_encrypt();
    CHECK_EQUAL(read_one(&place.object, STRIPE - LENGTH, bytes), 0);
    CHECK(all_are(bytes + LENGTH - 5, 5, 'e'));
    CHECK_EQUAL(read_one(&place.object, STRIPE, bytes), -EAGAIN);
    CHECK_EQUAL(ra_data_read(place.data, bytes, LENGTH, STRIPE), 0);
    CHECK(all_are(bytes, 5, 'e') && all_are(bytes + 5, LENGTH - 5, 0));
    CHECK_EQUAL(ra_data_read(place.data, bytes, 20, STRIPE - 10), 0);
    CHECK(all_are(bytes, 5, 0) && all_are(bytes + 5, 10, 'e') && all_are(bytes + 15, 5, 0));
    place_close(&place);
}

static void test_a_truncation_waits_until_it_is_settled(void) {
    struct place place;
    place_make(&place, false, 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    struct flight flight;
    flight_init(&flight, 'a');
    CHECK_EQUAL(begin_write(&flight, &place.object, 0), 0);
    struct call truncation = {.make = truncate_to_nothing, .data = place.data};
    call_start(&truncation);
    /* Nothing more comes in. */
    wait_until(is_refused, &place.object);
    CHECK(!call_is_done(&truncation));
    CHECK_EQUAL(settle(&flight, &place.object), 0);
    CHECK_EQUAL(call_end(&truncation), 0);
    uint64_t size;
    CHECK_EQUAL(ra_data_size(place.data, &size), 0);
    CHECK_EQUAL(size, 0);
    flight_destroy(&flight);
    place_close(&place);
}

static void test_shut_out_under_a_claim_it_is_done_anew(void) {
    struct place place;
    place_make(&place, true, 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    shut_out(place.client);
    CHECK_EQUAL(write_one(&place.object, 0, 'a'), -EAGAIN);
    CHECK(ra_client_is_shut_out(place.client));
    /* Known now: nothing is begun, since it would have to wait for the claim. */
    struct flight flight;
    flight_init(&flight, 'b');
    CHECK_EQUAL(begin_write(&flight, &place.object, 0), -EAGAIN);
    CHECK_EQUAL(begin_read(&flight, &place.object, 0), -EAGAIN);
    CHECK(!flight.landed);
    flight_destroy(&flight);
    struct ra_client *successor = client_open(0);
    ra_client_adopt(place.client, successor);
    CHECK_EQUAL(ra_claim(place.client, LOCK, "node/1"), 0);
    CHECK_EQUAL(write_one(&place.object, 0, 'c'), 0);
    ra_client_close(successor);
    place_close(&place);
}

static void test_shut_out_without_a_claim_the_composer_has_to_know(void) {
    struct place place;
    place_make(&place, false, 0);
    char bytes[LENGTH];
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    shut_out(place.client);
    CHECK_EQUAL(read_one(&place.object, 0, bytes), -ESHUTDOWN);
    place_close(&place);
}

static void test_a_write_that_is_not_answered_keeps_the_claim(void) {
    struct place place;
    place_make(&place, true, 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    fake_hold(KEY "/");
    CHECK_EQUAL(write_one(&place.object, 0, 'a'), -EIO);
    fake_hold(NULL);
    bool kept;
    CHECK_EQUAL(ra_disclaim(place.client, LOCK, &kept), 0);
    CHECK(kept);
    fake_arrive();
    place_close(&place);
}

static int disclaim(struct call *call) {
    bool kept;
    return ra_disclaim(call->client, LOCK, &kept);
}

static bool begins_nothing(void *argument) {
    char bytes[LENGTH];
    return read_one(argument, 0, bytes) == -EAGAIN;
}

static void test_giving_a_claim_up_waits_until_it_is_settled(void) {
    struct place place;
    place_make(&place, true, 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    struct flight flight;
    flight_init(&flight, 'a');
    CHECK_EQUAL(begin_write(&flight, &place.object, 0), 0);
    struct call end = {.make = disclaim, .client = place.client};
    call_start(&end);
    wait_until(begins_nothing, &place.object);
    CHECK(!call_is_done(&end));
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 1);
    CHECK_EQUAL(settle(&flight, &place.object), 0);
    CHECK_EQUAL(call_end(&end), 0);
    CHECK_EQUAL(fake_lockers(CLAIM_SPACE, CLAIM_OBJECT), 0);
    flight_destroy(&flight);
    place_close(&place);
}

static void test_the_connection_is_there_until_it_is_settled(void) {
    struct place place;
    place_make(&place, false, 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    struct flight flight;
    flight_init(&flight, 'a');
    fake_stop(KEY "/");
    CHECK_EQUAL(begin_write(&flight, &place.object, 0), 0);
    wait_until(one_is_stopped, NULL);
    struct ra_client *successor = client_open(0);
    ra_client_adopt(place.client, successor);
    CHECK_EQUAL(fake_clients(), 2);
    fake_stop(NULL);
    CHECK_EQUAL(settle(&flight, &place.object), 0);
    CHECK_EQUAL(fake_clients(), 1);
    flight_destroy(&flight);
    ra_client_close(successor);
    place_close(&place);
}

struct departure {
    struct call call;
    struct flight flight;
};

static int depart(struct call *call) {
    struct ae_object object;
    ra_data_share(call->data, &object);
    int result = begin_write(&((struct departure *)call)->flight, &object, 0);
    object.ops->close(object.ctx);
    return result;
}

static void test_the_connection_is_there_until_it_has_been_begun(void) {
    struct place place;
    place_make(&place, false, 0);
    CHECK_EQUAL(ra_data_write(place.data, "x", 1, 0), 0);
    struct departure departure = {.call = {.make = depart, .data = place.data}};
    struct flight *flight = &departure.flight;
    flight_init(flight, 'a');
    fake_keep(true);
    call_start(&departure.call);
    struct ra_client *successor = client_open(0);
    wait_until(has_landed, flight);
    ra_client_adopt(place.client, successor);
    CHECK_EQUAL(settle(flight, &place.object), 0);
    CHECK_EQUAL(fake_clients(), 2);
    fake_keep(false);
    CHECK_EQUAL(call_end(&departure.call), 0);
    CHECK_EQUAL(fake_clients(), 1);
    flight_destroy(flight);
    ra_client_close(successor);
    place_close(&place);
}

/* Threads that each have some sectors of one stripe for themselves, beside one that changes the header. */

enum { OWNERS = 4, OWN_BYTES = 8 * LENGTH };

static int churn(struct call *call) {
    struct ae_object object;
    ra_data_share(call->data, &object);
    for (int round = 0; round < CHURNS; round++) {
        char fill = (char)(1 + (round + call->fill) % 100), bytes[LENGTH];
        uint64_t offset = call->offset + (uint64_t)(round % 8) * LENGTH;
        int result = write_one(&object, offset, fill);
        if (result == -EAGAIN) {
            memset(bytes, fill, LENGTH);
            result = ra_data_write(call->data, bytes, LENGTH, offset);
        }
        CHECK_EQUAL(result, 0);
        result = read_one(&object, offset, bytes);
        if (result == -EAGAIN)
            result = ra_data_read(call->data, bytes, LENGTH, offset);
        CHECK_EQUAL(result, 0);
        CHECK(all_are(bytes, LENGTH, fill));
    }
    object.ops->close(object.ctx);
    return 0;
}

static void test_begun_and_not_at_once(void) {
    struct place place;
    place_make(&place, false, 0);
    fake_delay_us(200);
    struct call owners[OWNERS];
    for (int i = 0; i < OWNERS; i++) {
        owners[i] =
            (struct call){.make = churn, .data = place.data, .offset = (uint64_t)i * OWN_BYTES, .fill = (char)(20 * i)};
        call_start(&owners[i]);
    }
    while (!is_done(&owners[0])) {
        CHECK_EQUAL(ra_data_truncate(place.data, 2 * STRIPE), 0);
        CHECK_EQUAL(ra_data_punch(place.data, STRIPE, STRIPE), 0);
    }
    for (int i = 0; i < OWNERS; i++)
        CHECK_EQUAL(call_end(&owners[i]), 0);
    place_close(&place);
}

int main(void) {
    static const struct test tests[] = {
        {"what was begun arrives", test_what_was_begun_arrives},
        {"what takes more than that is not begun", test_what_takes_more_than_that_is_not_begun},
        {"why a stripe is missing is for who may wait", test_why_a_stripe_is_missing_is_for_who_may_wait},
        {"what is read encrypted is for who may wait", test_what_is_read_encrypted_is_for_who_may_wait},
        {"a truncation waits until it is settled", test_a_truncation_waits_until_it_is_settled},
        {"shut out under a claim it is done anew", test_shut_out_under_a_claim_it_is_done_anew},
        {"shut out without a claim", test_shut_out_without_a_claim_the_composer_has_to_know},
        {"a write that is not answered keeps the claim", test_a_write_that_is_not_answered_keeps_the_claim},
        {"giving a claim up waits until it is settled", test_giving_a_claim_up_waits_until_it_is_settled},
        {"the connection is there until it is settled", test_the_connection_is_there_until_it_is_settled},
        {"the connection is there until it has been begun", test_the_connection_is_there_until_it_has_been_begun},
        {"begun and not, at once", test_begun_and_not_at_once},
    };
    return run_tests(tests, sizeof tests / sizeof *tests);
}
