/*
 * Data objects and packs as the engine takes them. Of errnos that only say how the cluster could not be reached, a
 * guest gets EIO. That something is missing, or that we were shut out (ESHUTDOWN), is for the composer to know.
 */
#include "begun.h"
#include "pack.h"
#include "striped.h"

#include <errno.h>

static int outward(int result) {
    switch (result) {
    case -ETIMEDOUT:
    case -ENOTCONN:
    case -EHOSTDOWN:
    case -EHOSTUNREACH:
    case -ENETUNREACH:
    case -ECONNREFUSED:
    case -ECONNRESET:
    case -ECONNABORTED:
    case -EAGAIN:
    case -EPERM:
    case -EACCES:
        return -EIO;
    case -EDQUOT:
        return -ENOSPC;
    default:
        return result;
    }
}

static int data_pread(void *ctx, void *buffer, size_t length, uint64_t offset) {
    return outward(ra_data_read(ctx, buffer, length, offset));
}

static int data_pwrite(void *ctx, const void *buffer, size_t length, uint64_t offset) {
    return outward(ra_data_write(ctx, buffer, length, offset));
}

static int data_pwrite_each(void *ctx, const struct ae_write *writes, size_t count) {
    return outward(ra_data_write_each(ctx, writes, count));
}

static int data_pread_begin(void *ctx, void *buffer, size_t length, uint64_t offset, struct ae_transfer *transfer) {
    return ra_data_read_begin(ctx, buffer, length, offset, transfer) ? 0 : -EAGAIN;
}

static int data_pwrite_begin(void *ctx, const void *buffer, size_t length, uint64_t offset,
                             struct ae_transfer *transfer) {
    return ra_data_write_begin(ctx, buffer, length, offset, transfer) ? 0 : -EAGAIN;
}

static int data_settle(void *ctx, struct ae_transfer *transfer) {
    bool anew;
    int result = ra_data_settle(ctx, transfer, &anew);
    return anew ? -EAGAIN : outward(result);
}

static int data_punch(void *ctx, uint64_t offset, uint64_t length) {
    return outward(ra_data_punch(ctx, offset, length));
}

static int data_truncate(void *ctx, uint64_t size) { return outward(ra_data_truncate(ctx, size)); }

/* RADOS answers a write when all replicas have it on disk, so what has returned is durable. */
static int data_flush(void *ctx) {
    (void)ctx;
    return 0;
}

static int data_size(void *ctx, uint64_t *size) { return outward(ra_data_size(ctx, size)); }

static int data_next_data(void *ctx, uint64_t offset, uint64_t *found) {
    return outward(ra_data_next_data(ctx, offset, found));
}

static int data_next_hole(void *ctx, uint64_t offset, uint64_t *found) {
    return outward(ra_data_next_hole(ctx, offset, found));
}

static void data_close(void *ctx) { ra_data_close(ctx); }

static const struct ae_object_ops data_ops = {
    .pread = data_pread,
    .pwrite = data_pwrite,
    .pwrite_each = data_pwrite_each,
    .pread_begin = data_pread_begin,
    .pwrite_begin = data_pwrite_begin,
    .settle = data_settle,
    .punch = data_punch,
    .truncate = data_truncate,
    .flush = data_flush,
    .size = data_size,
    .next_data = data_next_data,
    .next_hole = data_next_hole,
    .close = data_close,
};

void ra_data_share(struct ra_data *data, struct ae_object *object) {
    atomic_fetch_add_explicit(&data->references, 1, memory_order_relaxed);
    *object = (struct ae_object){.ops = &data_ops, .ctx = data, .waits = true};
}

/* The engine looks for a pack that it cannot read once more, elsewhere, but not for one it has waited for in vain. */
static int pack_pread(void *ctx, void *buffer, size_t length, uint64_t offset) {
    int result = ra_pack_read(ctx, buffer, length, offset);
    return result == -ETIMEDOUT ? result : outward(result);
}

static int pack_pread_within(void *ctx, void *buffer, size_t length, uint64_t offset) {
    uint64_t size = ra_pack_bytes(ctx);
    return offset > size || length > size - offset ? -EIO : pack_pread(ctx, buffer, length, offset);
}

static int pack_pwrite(void *ctx, const void *buffer, size_t length, uint64_t offset) {
    (void)ctx, (void)buffer, (void)length, (void)offset;
    return -EBADF;
}

static int pack_punch(void *ctx, uint64_t offset, uint64_t length) {
    (void)ctx, (void)offset, (void)length;
    return -EBADF;
}

static int pack_truncate(void *ctx, uint64_t size) {
    (void)ctx, (void)size;
    return -EBADF;
}

static int pack_flush(void *ctx) {
    (void)ctx;
    return 0;
}

static int pack_size(void *ctx, uint64_t *size) {
    *size = ra_pack_bytes(ctx);
    return 0;
}

static int pack_next_data(void *ctx, uint64_t offset, uint64_t *found) {
    *found = offset;
    return offset < ra_pack_bytes(ctx) ? 0 : -ENXIO;
}

static int pack_next_hole(void *ctx, uint64_t offset, uint64_t *found) {
    *found = ra_pack_bytes(ctx);
    return offset < *found ? 0 : -ENXIO;
}

static void pack_close(void *ctx) { ra_pack_close(ctx); }

static const struct ae_object_ops pack_ops = {
    .pread = pack_pread,
    .pread_within = pack_pread_within,
    .pwrite = pack_pwrite,
    .punch = pack_punch,
    .truncate = pack_truncate,
    .flush = pack_flush,
    .size = pack_size,
    .next_data = pack_next_data,
    .next_hole = pack_next_hole,
    .close = pack_close,
};

void ra_pack_share(struct ra_pack *pack, struct ae_object *object) {
    atomic_fetch_add_explicit(&pack->references, 1, memory_order_relaxed);
    *object = (struct ae_object){.ops = &pack_ops, .ctx = pack, .waits = true};
}
