/*
 * A call (client.h) that begins on one thread and ends on another. Between the two, librados has it. Whatever else may
 * be needed, a byte of the header set, a lock taken again, a look at why a stripe is missing, would wait for the
 * cluster: then it is left to who may wait.
 *
 * It may be settled before the function of librados that begins it has returned; so whoever begins it keeps the
 * connection as well.
 */
#include "begun.h"

#include "batch.h"
#include "object.h"

#include <errno.h>
#include <stdlib.h>

#define STRIPE ((uint64_t)RA_STRIPE_BYTES)

struct begun {
    struct ra_call call;
    struct ae_transfer *transfer;
    ra_completion completion;
    bool writes;
    char *buffer; /* of a read */
    size_t length;
};

/* By a thread of librados. */
static void landed(ra_completion completion, void *argument) {
    (void)completion;
    struct begun *begun = argument;
    begun->transfer->landed(begun->transfer);
}

static struct begun *begun_make(struct ra_data *data, bool writes, struct ae_transfer *transfer) {
    struct begun *begun = malloc(sizeof *begun);
    if (begun == NULL)
        return NULL;
    *begun = (struct begun){
        .call = {.client = data->client, .claim = data->claim, .nowait = true},
        .transfer = transfer,
        .writes = writes,
    };
    if (ra_call_begin(&begun->call) < 0) {
        free(begun);
        return NULL;
    }
    const struct ra_library *library = &begun->call.connection->library;
    if (library->aio_create_completion2(begun, landed, &begun->completion) < 0) {
        ra_call_again(&begun->call, 0);
        free(begun);
        return NULL;
    }
    return begun;
}

static void begun_drop(struct begun *begun, int result) {
    begun->call.connection->library.aio_release(begun->completion);
    ra_call_again(&begun->call, result);
    free(begun);
}

static bool in_one_stripe(size_t length, uint64_t offset) {
    return length > 0 && offset < RA_DATA_BYTES_MAX && length <= STRIPE - offset % STRIPE;
}

bool ra_data_read_begin(struct ra_data *data, void *buffer, size_t length, uint64_t offset,
                        struct ae_transfer *transfer) {
    struct begun *begun = in_one_stripe(length, offset) ? begun_make(data, false, transfer) : NULL;
    if (begun == NULL)
        return false;
    begun->buffer = buffer;
    begun->length = length;
    transfer->driver = begun;
    struct ra_connection *connection = ra_connection_keep(begun->call.connection);
    int result =
        stripe_read_begin(&begun->call, data->key, offset / STRIPE, begun->completion, buffer, length, offset % STRIPE);
    if (result < 0)
        begun_drop(begun, result);
    ra_connection_drop(connection);
    return result == 0;
}

/* Inside the gate. */
static int write_begin(struct ra_data *data, struct begun *begun, const void *buffer, size_t length, uint64_t offset) {
    if (!ra_data_may_have(data, offset / STRIPE))
        return -EAGAIN;
    return stripe_write_begin(&begun->call, data->key, offset / STRIPE, begun->completion, buffer, length,
                              offset % STRIPE);
}

bool ra_data_write_begin(struct ra_data *data, const void *buffer, size_t length, uint64_t offset,
                         struct ae_transfer *transfer) {
    if (!data->writable || !in_one_stripe(length, offset))
        return false;
    struct begun *begun = begun_make(data, true, transfer);
    if (begun == NULL)
        return false;
    transfer->driver = begun;
    struct ra_connection *connection = ra_connection_keep(begun->call.connection);
    int result = -EAGAIN;
    if (ra_gate_try_enter(&data->gate)) {
        result = write_begin(data, begun, buffer, length, offset);
        if (result < 0)
            ra_gate_leave(&data->gate);
    }
    if (result < 0)
        begun_drop(begun, result);
    ra_connection_drop(connection);
    return result == 0;
}

int ra_data_settle(struct ra_data *data, struct ae_transfer *transfer, bool *anew) {
    struct begun *begun = transfer->driver;
    const struct ra_library *library = &begun->call.connection->library;
    int result = library->aio_get_return_value(begun->completion);
    library->aio_release(begun->completion);
    bool missing = false, scattered = !begun->writes && result == RA_SCATTERED;
    if (begun->writes) {
        result = stripe_change_settle(&begun->call, result);
        ra_gate_leave(&data->gate);
    } else {
        result = stripe_read_settle(result, begun->buffer, begun->length, &missing);
    }
    *anew = ra_call_again(&begun->call, result) || missing || scattered;
    free(begun);
    return result;
}
