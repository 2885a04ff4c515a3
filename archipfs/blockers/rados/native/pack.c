#include "pack.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

int ra_pack_open(struct ra_client *client, const char *key, struct ra_pack **opened) {
    int result = ra_check_length(key, RA_KEY_BYTES_MAX);
    if (result < 0)
        return result;
    struct ra_pack *pack = calloc(1, sizeof *pack);
    if (pack == NULL)
        return -ENOMEM;
    atomic_init(&pack->references, 1);
    pack->client = client;
    memcpy(pack->key, key, strlen(key) + 1);
    struct ra_claim *claim;
    result = ra_client_use(client, NULL, &claim);
    if (result < 0) {
        free(pack);
        return result;
    }
    struct ra_call call = {.client = client};
    result = ra_call_begin(&call);
    if (result == 0) {
        time_t mtime;
        result = call.connection->library.stat(call.connection->packs, key, &pack->size, &mtime);
    }
    ra_call_again(&call, result);
    if (result < 0)
        ra_pack_close(pack);
    else
        *opened = pack;
    return result;
}

void ra_pack_close(struct ra_pack *pack) {
    if (atomic_fetch_sub_explicit(&pack->references, 1, memory_order_acq_rel) != 1)
        return;
    ra_client_unuse(pack->client, NULL);
    free(pack);
}

uint64_t ra_pack_bytes(const struct ra_pack *pack) { return pack->size; }

/*
 * By a completion, though nobody does anything else meanwhile: librados' own synchronous read copies what it got twice.
 */
static int read_piece(const struct ra_connection *connection, const char *key, char *to, size_t length,
                      uint64_t offset) {
    const struct ra_library *library = &connection->library;
    ra_completion completion;
    int got = library->aio_create_completion2(NULL, NULL, &completion);
    if (got < 0)
        return got;
    got = library->aio_read(connection->packs, key, completion, to, length, offset);
    if (got == 0) {
        library->aio_wait_for_complete(completion);
        got = library->aio_get_return_value(completion);
    }
    library->aio_release(completion);
    if (got == RA_SCATTERED)
        got = library->read(connection->packs, key, to, length, offset);
    /* It never changes: short of its size it is damaged. */
    return got < 0 ? got : (size_t)got < length ? -EIO : 0;
}

int ra_pack_read(struct ra_pack *pack, void *buffer, size_t length, uint64_t offset) {
    uint64_t there = offset < pack->size ? pack->size - offset : 0;
    if (length > there) {
        memset((char *)buffer + there, 0, length - there);
        length = there;
    }
    char *to = buffer;
    int result = 0;
    while (result == 0 && length > 0) {
        /* What librados returns is an int. */
        size_t piece = length < INT_MAX ? length : INT_MAX;
        struct ra_call call = {.client = pack->client};
        result = ra_call_begin(&call);
        if (result == 0)
            result = read_piece(call.connection, pack->key, to, piece, offset);
        ra_call_again(&call, result);
        to += piece;
        offset += piece;
        length -= piece;
    }
    return result;
}
