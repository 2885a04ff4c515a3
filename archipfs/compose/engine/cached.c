/*
 * A pack that lies far away, read through its file in the pack cache.
 *
 *   read: file, as far as its blocks are there; else a flight (flight.h)
 */
#include "flight.h"
#include "region.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PACK_BYTES_MAX ((uint64_t)1 << 30)

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

void ae_cached_release(struct ae_cached *cached) {
    if (atomic_fetch_sub(&cached->references, 1) != 1)
        return;
    cached->source.ops->close(cached->source.ctx);
    ae_cache_leave(cached->cache, cached->entry);
    ae_cache_release(cached->cache);
    free(cached);
}

/* Reading */

static void mark_used(struct ae_cache_entry *entry) {
    if (!atomic_load_explicit(&entry->used, memory_order_relaxed))
        atomic_store_explicit(&entry->used, true, memory_order_relaxed);
}

/* Some of it: `*done` bytes, which may be none yet. */
static int read_some(struct ae_cached *cached, char *to, size_t length, uint64_t offset, size_t *done) {
    struct ae_cache_file *file = ae_cache_need_file(cached->cache, cached->entry);
    *done = file != NULL ? ae_cache_file_have(file, length, offset, false) : 0;
    if (*done > 0) {
        int result = ae_cache_file_read(file, to, *done, offset, false);
        if (result < 0) {
            ae_cache_file_lose(file, *done, offset);
            *done = 0;
        } else {
            ae_cache_count_hit(cached->entry);
        }
        ae_cache_file_release(file);
        return 0;
    }
    struct ae_flight *flight;
    int result = ae_flight_board(cached, file, offset, offset + length, &flight);
    if (flight != NULL) {
        *done = (size_t)smaller(length, flight->offset + flight->length - offset);
        memcpy(to, flight->bytes + (offset - flight->offset), *done);
        ae_flight_leave(flight);
    }
    if (file != NULL)
        ae_cache_file_release(file);
    return result;
}

static int cached_pread_within(void *ctx, void *buffer, size_t length, uint64_t offset) {
    struct ae_cached *cached = ctx;
    char *to = buffer;
    if (offset > cached->size || length > cached->size - offset)
        return -EIO;
    mark_used(cached->entry);
    while (length > 0) {
        size_t done;
        int result = read_some(cached, to, length, offset, &done);
        if (result < 0)
            return result;
        to += done;
        offset += done;
        length -= done;
    }
    return 0;
}

static int cached_pread(void *ctx, void *buffer, size_t length, uint64_t offset) {
    const struct ae_cached *cached = ctx;
    size_t within = offset < cached->size ? (size_t)smaller(length, cached->size - offset) : 0;
    memset((char *)buffer + within, 0, length - within);
    return cached_pread_within(ctx, buffer, within, within > 0 ? offset : 0);
}

/* Whatever is wrong with the disk: the call that may wait finds out. */
static bool file_read_nowait(struct ae_cached *cached, char *to, size_t length, uint64_t offset) {
    struct ae_cache_file *file = ae_cache_file_of(cached->entry);
    if (file == NULL)
        return false;
    bool got = ae_cache_file_have(file, length, offset, true) == length &&
               ae_cache_file_read(file, to, length, offset, true) == 0;
    ae_cache_file_release(file);
    return got;
}

static bool landed_read(struct ae_cached *cached, char *to, size_t length, uint64_t offset) {
    struct ae_flight *flight = ae_flight_landed(cached, offset);
    if (flight == NULL)
        return false;
    bool whole = offset + length <= flight->offset + flight->length;
    if (whole)
        memcpy(to, flight->bytes + (offset - flight->offset), length);
    ae_flight_leave(flight);
    return whole;
}

static int cached_pread_nowait(void *ctx, void *buffer, size_t length, uint64_t offset) {
    struct ae_cached *cached = ctx;
    if (offset > cached->size || length > cached->size - offset)
        return -EAGAIN;
    mark_used(cached->entry);
    if (!file_read_nowait(cached, buffer, length, offset) && !landed_read(cached, buffer, length, offset))
        return -EAGAIN;
    ae_cache_count_hit(cached->entry);
    return 0;
}

/* The rest: it never changes, and is data from end to end */

static int cached_pwrite(void *ctx, const void *buffer, size_t length, uint64_t offset) {
    (void)ctx, (void)buffer, (void)length, (void)offset;
    return -EROFS;
}

static int cached_punch(void *ctx, uint64_t offset, uint64_t length) {
    (void)ctx, (void)offset, (void)length;
    return -EROFS;
}

static int cached_truncate(void *ctx, uint64_t size) {
    (void)ctx, (void)size;
    return -EROFS;
}

static int cached_flush(void *ctx) {
    (void)ctx;
    return 0;
}

static int cached_size(void *ctx, uint64_t *size) {
    *size = ((const struct ae_cached *)ctx)->size;
    return 0;
}

static int cached_next_data(void *ctx, uint64_t offset, uint64_t *found) {
    *found = offset;
    return offset < ((const struct ae_cached *)ctx)->size ? 0 : -ENXIO;
}

static int cached_next_hole(void *ctx, uint64_t offset, uint64_t *found) {
    uint64_t size = ((const struct ae_cached *)ctx)->size;
    *found = offset < size ? size : offset;
    return 0;
}

static void cached_close(void *ctx) { ae_cached_release(ctx); }

static const struct ae_object_ops cached_ops = {
    .pread = cached_pread,
    .pread_nowait = cached_pread_nowait,
    .pread_within = cached_pread_within,
    .pwrite = cached_pwrite,
    .punch = cached_punch,
    .truncate = cached_truncate,
    .flush = cached_flush,
    .size = cached_size,
    .next_data = cached_next_data,
    .next_hole = cached_next_hole,
    .close = cached_close,
};

int ae_object_cached(struct ae_cache *cache, const char *path, const uint8_t pack[32], struct ae_object source,
                     uint64_t size, struct ae_object *object) {
    struct ae_cached *cached = malloc(sizeof *cached);
    int result = cached == NULL ? -ENOMEM : size == 0 || size > PACK_BYTES_MAX ? -EINVAL : 0;
    if (result == 0) {
        *cached = (struct ae_cached){.cache = cache, .source = source, .size = size};
        result = ae_cache_enter(cache, path, pack, size, &cached->entry);
    }
    if (result < 0) {
        source.ops->close(source.ctx);
        free(cached);
        return result;
    }
    atomic_init(&cached->references, 1);
    ae_cache_retain(cache);
    *object = (struct ae_object){.ops = &cached_ops, .ctx = cached, .waits = source.waits};
    return 0;
}

bool ae_object_is_cached(const struct ae_object *object) { return object->ops == &cached_ops; }
