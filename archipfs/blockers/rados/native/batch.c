#include "batch.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static void stripe_name(const char *key, uint64_t stripe, char name[STRIPE_NAME_BYTES]) {
    snprintf(name, STRIPE_NAME_BYTES, "%s/%016" PRIx64, key, stripe);
}

int stripe_read_settle(int got, char *buffer, size_t length, bool *missing) {
    if (got == -ENOENT) {
        *missing = true;
        got = 0;
    }
    if (got < 0)
        return got;
    if ((size_t)got > length)
        return -EIO;
    memset(buffer + got, 0, length - (size_t)got);
    return 0;
}

int stripe_change_settle(struct ra_call *call, int result) {
    if (result == -ETIMEDOUT)
        call->uncertain = true;
    return result < 0 ? result : 0;
}

int stripe_read(struct ra_call *call, const char *key, uint64_t stripe, void *buffer, size_t length, uint64_t offset,
                bool *missing) {
    char name[STRIPE_NAME_BYTES];
    stripe_name(key, stripe, name);
    int got = call->connection->library.read(call->connection->data, name, buffer, length, offset);
    return stripe_read_settle(got, buffer, length, missing);
}

int stripe_write(struct ra_call *call, const char *key, uint64_t stripe, const void *buffer, size_t length,
                 uint64_t offset) {
    char name[STRIPE_NAME_BYTES];
    stripe_name(key, stripe, name);
    return stripe_change_settle(call,
                                call->connection->library.write(call->connection->data, name, buffer, length, offset));
}

int stripe_read_begin(struct ra_call *call, const char *key, uint64_t stripe, ra_completion completion, void *buffer,
                      size_t length, uint64_t offset) {
    char name[STRIPE_NAME_BYTES];
    stripe_name(key, stripe, name);
    struct ra_connection *connection = call->connection;
    return connection->library.aio_read(connection->data, name, completion, buffer, length, offset);
}

int stripe_write_begin(struct ra_call *call, const char *key, uint64_t stripe, ra_completion completion,
                       const void *buffer, size_t length, uint64_t offset) {
    char name[STRIPE_NAME_BYTES];
    stripe_name(key, stripe, name);
    struct ra_connection *connection = call->connection;
    return connection->library.aio_write(connection->data, name, completion, buffer, length, offset);
}

void batch_begin(struct batch *batch, struct ra_call *call, const char *key) {
    batch->call = call;
    batch->key = key;
    batch->result = 0;
    batch->missing = false;
    batch->end = 0;
    batch->first = batch->count = 0;
}

static void finish_oldest(struct batch *batch) {
    struct batch_piece *piece = &batch->pieces[batch->first];
    const struct ra_library *library = &batch->call->connection->library;
    library->aio_wait_for_complete(piece->completion);
    int result = library->aio_get_return_value(piece->completion);
    library->aio_release(piece->completion);
    batch->first = (batch->first + 1) % BATCH_WINDOW;
    batch->count--;
    switch (piece->kind) {
    case BATCH_READ:
        result = result == RA_SCATTERED ? stripe_read(batch->call, batch->key, piece->stripe, piece->buffer,
                                                      piece->length, piece->offset, &batch->missing)
                                        : stripe_read_settle(result, piece->buffer, piece->length, &batch->missing);
        break;
    case BATCH_REMOVE:
        result = result == -ENOENT ? 0 : stripe_change_settle(batch->call, result);
        break;
    case BATCH_WRITE:
    case BATCH_ZERO:
        result = stripe_change_settle(batch->call, result);
        break;
    case BATCH_STAT:
        if (result == 0 && piece->size > 0 && piece->stripe * RA_STRIPE_BYTES + piece->size > batch->end)
            batch->end = piece->stripe * RA_STRIPE_BYTES + piece->size;
        if (result == -ENOENT)
            result = 0;
        break;
    }
    if (result < 0 && batch->result == 0)
        batch->result = result;
}

/* The place for one more, with a completion. NULL: an error was met. */
static struct batch_piece *add(struct batch *batch, enum batch_kind kind, uint64_t stripe,
                               char name[STRIPE_NAME_BYTES]) {
    if (batch->count == BATCH_WINDOW)
        finish_oldest(batch);
    if (batch->result < 0)
        return NULL;
    struct batch_piece *piece = &batch->pieces[(batch->first + batch->count) % BATCH_WINDOW];
    *piece = (struct batch_piece){.kind = kind, .stripe = stripe};
    batch->result = batch->call->connection->library.aio_create_completion2(NULL, NULL, &piece->completion);
    if (batch->result < 0)
        return NULL;
    stripe_name(batch->key, stripe, name);
    return piece;
}

/* `result`: of handing the piece over. */
static void added(struct batch *batch, struct batch_piece *piece, int result) {
    if (result < 0) {
        batch->call->connection->library.aio_release(piece->completion);
        batch->result = result;
        return;
    }
    batch->count++;
}

void batch_read(struct batch *batch, uint64_t stripe, void *buffer, size_t length, uint64_t offset) {
    char name[STRIPE_NAME_BYTES];
    struct ra_connection *connection = batch->call->connection;
    struct batch_piece *piece = add(batch, BATCH_READ, stripe, name);
    if (piece == NULL)
        return;
    piece->buffer = buffer;
    piece->length = length;
    piece->offset = offset;
    added(batch, piece,
          connection->library.aio_read(connection->data, name, piece->completion, buffer, length, offset));
}

void batch_write(struct batch *batch, uint64_t stripe, const void *buffer, size_t length, uint64_t offset) {
    char name[STRIPE_NAME_BYTES];
    struct ra_connection *connection = batch->call->connection;
    struct batch_piece *piece = add(batch, BATCH_WRITE, stripe, name);
    if (piece != NULL)
        added(batch, piece,
              connection->library.aio_write(connection->data, name, piece->completion, buffer, length, offset));
}

void batch_zero(struct batch *batch, uint64_t stripe, uint64_t length, uint64_t offset) {
    char name[STRIPE_NAME_BYTES];
    struct ra_connection *connection = batch->call->connection;
    ra_write_op op = connection->library.create_write_op();
    if (op == NULL) {
        batch->result = batch->result < 0 ? batch->result : -ENOMEM;
        return;
    }
    /* Beyond the end of the stripe an OSD does nothing, and up to its end it cuts it. */
    connection->library.write_op_zero(op, offset, length);
    struct batch_piece *piece = add(batch, BATCH_ZERO, stripe, name);
    if (piece != NULL)
        added(batch, piece,
              connection->library.aio_write_op_operate(op, connection->data, piece->completion, name, NULL, 0));
    connection->library.release_write_op(op);
}

void batch_remove(struct batch *batch, uint64_t stripe) {
    char name[STRIPE_NAME_BYTES];
    struct ra_connection *connection = batch->call->connection;
    struct batch_piece *piece = add(batch, BATCH_REMOVE, stripe, name);
    if (piece != NULL)
        added(batch, piece, connection->library.aio_remove(connection->data, name, piece->completion));
}

void batch_stat(struct batch *batch, uint64_t stripe) {
    char name[STRIPE_NAME_BYTES];
    struct ra_connection *connection = batch->call->connection;
    struct batch_piece *piece = add(batch, BATCH_STAT, stripe, name);
    if (piece != NULL)
        added(batch, piece,
              connection->library.aio_stat(connection->data, name, piece->completion, &piece->size, &piece->mtime));
}

int batch_end(struct batch *batch) {
    while (batch->count > 0)
        finish_oldest(batch);
    return batch->result;
}
