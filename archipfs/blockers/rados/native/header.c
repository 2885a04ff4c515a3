#include "header.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define VERSION 1
#define STATE_AT 12
#define SIZE_AT 16
#define STRIPE_BYTES_AT 24
#define CHECKSUM_AT (HEADER_BYTES - 8)
/* One read has the bytes of 1 TiB; the next ones four times as much each. */
#define FIRST_READ_BYTES (HEADER_BYTES + RA_DATA_BYTES_MAX / RA_STRIPE_BYTES / 64)
#define ALL_BYTES (HEADER_BYTES + RA_DATA_BYTES_MAX / RA_STRIPE_BYTES)
/* rados_write_op_cmpext: the first byte that differs is told as -(this + its place). */
#define DIFFERS 4095

static const unsigned char magic[8] = {'a', 'r', 'c', 'h', 'i', 'p', 'd', 'o'};

static void put(unsigned char *at, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++)
        at[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t get(const unsigned char *at, unsigned bytes) {
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

static void put_guard(unsigned char *bytes, enum header_state state) {
    memcpy(bytes, magic, sizeof magic);
    put(bytes + sizeof magic, VERSION, 4);
    put(bytes + STATE_AT, state, 4);
}

void header_encode(const struct header *header, unsigned char bytes[HEADER_BYTES]) {
    memset(bytes, 0, HEADER_BYTES);
    put_guard(bytes, header->state);
    put(bytes + SIZE_AT, header->size, 8);
    put(bytes + STRIPE_BYTES_AT, RA_STRIPE_BYTES, 8);
    put(bytes + CHECKSUM_AT, XXH3_64bits(bytes, CHECKSUM_AT), 8);
}

int header_decode(const unsigned char bytes[HEADER_BYTES], struct header *header) {
    if (memcmp(bytes, magic, sizeof magic) != 0)
        return -EUCLEAN;
    if (get(bytes + CHECKSUM_AT, 8) != XXH3_64bits(bytes, CHECKSUM_AT))
        return -EUCLEAN;
    if (get(bytes + sizeof magic, 4) > VERSION)
        return -EPROTONOSUPPORT;
    uint64_t state = get(bytes + STATE_AT, 4);
    header->size = get(bytes + SIZE_AT, 8);
    if ((state != HEADER_LIVE && state != HEADER_DELETED) || header->size > RA_DATA_BYTES_MAX ||
        get(bytes + STRIPE_BYTES_AT, 8) != RA_STRIPE_BYTES)
        return -EUCLEAN;
    header->state = (enum header_state)state;
    return 0;
}

/* All of the object, to be freed. */
static int read_whole(const struct ra_call *call, const char *key, unsigned char **read, size_t *read_bytes) {
    size_t room = FIRST_READ_BYTES, length = 0;
    unsigned char *bytes = malloc(room);
    if (bytes == NULL)
        return -ENOMEM;
    for (;;) {
        int got =
            call->connection->library.read(call->connection->data, key, (char *)bytes + length, room - length, length);
        if (got < 0) {
            free(bytes);
            return got;
        }
        length += (size_t)got;
        if (length < room || room == ALL_BYTES)
            break;
        size_t more = HEADER_BYTES + (room - HEADER_BYTES) * 4;
        room = more < ALL_BYTES ? more : ALL_BYTES;
        unsigned char *larger = realloc(bytes, room);
        if (larger == NULL) {
            free(bytes);
            return -ENOMEM;
        }
        bytes = larger;
    }
    *read = bytes;
    *read_bytes = length;
    return 0;
}

int header_read(const struct ra_call *call, const char *key, struct header *header, unsigned char **stripes,
                uint64_t *count) {
    unsigned char *bytes;
    size_t length;
    *stripes = NULL;
    *count = 0;
    int result = read_whole(call, key, &bytes, &length);
    if (result < 0)
        return result;
    result = length < HEADER_BYTES ? -EUCLEAN : header_decode(bytes, header);
    if (result < 0 && result != -EUCLEAN) {
        free(bytes);
        return result;
    }
    if (length > HEADER_BYTES) {
        *count = length - HEADER_BYTES;
        memmove(bytes, bytes + HEADER_BYTES, *count);
        while (*count > 0 && bytes[*count - 1] == 0)
            --*count;
    }
    /* Most are short. What cannot be made smaller stays as it is. */
    unsigned char *fitting = realloc(bytes, *count > 0 ? *count : 1);
    *stripes = fitting != NULL ? fitting : bytes;
    return result;
}

int header_stat(const struct ra_call *call, const char *key) {
    uint64_t size;
    time_t mtime;
    return call->connection->library.stat(call->connection->data, key, &size, &mtime);
}

int header_look(const struct ra_call *call, const char *key) {
    unsigned char found[HEADER_GUARD_BYTES], live[HEADER_GUARD_BYTES];
    put_guard(live, HEADER_LIVE);
    int got = call->connection->library.read(call->connection->data, key, (char *)found, sizeof found, 0);
    if (got < 0)
        return got;
    return (size_t)got == sizeof found && memcmp(found, live, sizeof live) == 0 ? 0 : -ENOENT;
}

/* Carry out and release `op`. */
static int operate(struct ra_call *call, const char *key, ra_write_op op) {
    const struct ra_library *library = &call->connection->library;
    int result = library->write_op_operate(op, call->connection->data, key, NULL, 0);
    library->release_write_op(op);
    if (result == -ETIMEDOUT)
        call->uncertain = true;
    return result <= -DIFFERS ? -ENOENT : result;
}

/* An operation that does something to a live header. NULL: no memory. */
static ra_write_op begin(struct ra_call *call, const unsigned char live[HEADER_GUARD_BYTES]) {
    ra_write_op op = call->connection->library.create_write_op();
    if (op != NULL)
        call->connection->library.write_op_cmpext(op, (const char *)live, HEADER_GUARD_BYTES, 0, NULL);
    return op;
}

int header_create(struct ra_call *call, const char *key) {
    unsigned char bytes[HEADER_BYTES];
    header_encode(&(struct header){.state = HEADER_LIVE}, bytes);
    const struct ra_library *library = &call->connection->library;
    ra_write_op op = library->create_write_op();
    if (op == NULL)
        return -ENOMEM;
    library->write_op_create(op, RA_CREATE_EXCLUSIVE, NULL);
    library->write_op_write(op, (const char *)bytes, sizeof bytes, 0);
    return operate(call, key, op);
}

int header_replace(struct ra_call *call, const char *key, const struct header *header) {
    unsigned char live[HEADER_GUARD_BYTES], bytes[HEADER_BYTES];
    put_guard(live, HEADER_LIVE);
    header_encode(header, bytes);
    ra_write_op op = begin(call, live);
    if (op == NULL)
        return -ENOMEM;
    call->connection->library.write_op_write(op, (const char *)bytes, sizeof bytes, 0);
    return operate(call, key, op);
}

int header_set(struct ra_call *call, const char *key, const struct stripe_range *ranges, size_t count) {
    static const char ones[HEADER_RANGE_MAX] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    unsigned char live[HEADER_GUARD_BYTES];
    put_guard(live, HEADER_LIVE);
    ra_write_op op = begin(call, live);
    if (op == NULL)
        return -ENOMEM;
    for (size_t i = 0; i < count; i++)
        call->connection->library.write_op_write(op, ones, ranges[i].last - ranges[i].first + 1,
                                                 HEADER_BYTES + ranges[i].first);
    return operate(call, key, op);
}
