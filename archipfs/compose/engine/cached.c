/*
 * A pack that lies far away, read through its file in the pack cache.
 *
 *   read: file, as far as its blocks are there; else a flight
 *
 * A *flight* fetches a run of blocks, and all who ask for one of them meanwhile wait for it and take their bytes out of
 * its buffer: so each block is fetched once, also where the disk does not take it. A flight that was queued to be
 * fetched ahead is flown by whoever needs it first, one of the fetchers or a reader.
 *
 * All about flights is under the cache's lock, which nobody holds while he fetches or touches the disk.
 */
#include "cache.h"
#include "region.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define PACK_BYTES_MAX ((uint64_t)1 << 30)
#define FLIGHT_BLOCKS 16u
#define QUEUED_MAX 64u

struct cached {
    atomic_uint references; /* the object, and its flights */
    struct ae_cache *cache;
    struct ae_cache_entry *entry;
    struct ae_object source;
    uint64_t size;
};

enum flight_state { FLIGHT_QUEUED, FLIGHT_UNDER_WAY, FLIGHT_LANDED };

struct ae_flight {
    struct ae_flight *next; /* of the same entry */
    struct ae_flight *queue_next;
    struct cached *cached;
    uint64_t offset;
    size_t length;
    enum flight_state state;
    unsigned holders; /* the queue or who flies it, and each passenger */
    int result;
    char *bytes;
    pthread_cond_t landed;
};

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static void cached_release(struct cached *cached) {
    if (atomic_fetch_sub(&cached->references, 1) != 1)
        return;
    cached->source.ops->close(cached->source.ctx);
    ae_cache_leave(cached->cache, cached->entry);
    ae_cache_release(cached->cache);
    free(cached);
}

/* Flights */

/* The one that has the block, with the lock held. */
static struct ae_flight *flight_find(const struct ae_cache_entry *entry, uint64_t block) {
    uint64_t offset = block * AE_BLOCK_BYTES;
    struct ae_flight *flight = entry->flights;
    while (flight != NULL && !(flight->offset <= offset && offset < flight->offset + flight->length))
        flight = flight->next;
    return flight;
}

/* Of blocks from `first` on, up to `end` at most, that are neither there nor in a flight; with the lock held. */
static struct ae_flight *flight_make(struct cached *cached, const struct ae_cache_file *file, uint64_t first,
                                     uint64_t end) {
    struct ae_flight *flight = calloc(1, sizeof *flight);
    if (flight == NULL || pthread_cond_init(&flight->landed, NULL) != 0) {
        free(flight);
        return NULL;
    }
    uint64_t until = first + 1;
    while (until < end && until < first + FLIGHT_BLOCKS && flight_find(cached->entry, until) == NULL &&
           !(file != NULL && ae_cache_file_has(file, until)))
        until++;
    flight->offset = first * AE_BLOCK_BYTES;
    flight->length = (size_t)(smaller(until * AE_BLOCK_BYTES, cached->size) - flight->offset);
    flight->holders = 1;
    flight->cached = cached;
    atomic_fetch_add(&cached->references, 1);
    flight->next = cached->entry->flights;
    cached->entry->flights = flight;
    return flight;
}

/* Without the lock. */
static void flight_leave(struct ae_flight *flight) {
    struct cached *cached = flight->cached;
    pthread_mutex_lock(&cached->cache->lock);
    bool last = --flight->holders == 0;
    pthread_mutex_unlock(&cached->cache->lock);
    if (!last)
        return;
    pthread_cond_destroy(&flight->landed);
    free(flight->bytes);
    free(flight);
    cached_release(cached);
}

static void flight_unlist(struct ae_flight *flight) {
    struct ae_flight **at = &flight->cached->entry->flights;
    while (*at != flight)
        at = &(*at)->next;
    *at = flight->next;
}

static struct ae_flight *queue_take(struct ae_cache *cache, struct ae_flight *flight) {
    struct ae_flight **at = &cache->queue;
    while (*at != flight)
        at = &(*at)->queue_next;
    *at = flight->queue_next;
    if (flight->queue_next == NULL)
        cache->queue_end = at;
    cache->queued--;
    flight->state = FLIGHT_UNDER_WAY;
    return flight;
}

/* Keep what was fetched. Returns the file that has it now, with a reference; NULL: none. */
static struct ae_cache_file *keep(const struct ae_flight *flight) {
    struct cached *cached = flight->cached;
    struct ae_cache_file *file = ae_cache_need_file(cached->cache, cached->entry);
    if (file == NULL || ae_cache_rests(cached->cache))
        return file;
    if (ae_cache_file_store(file, flight->bytes, flight->length, flight->offset) < 0)
        ae_cache_rest(cached->cache);
    return file;
}

/* Let the passengers go. With an error, whoever comes next tries again. */
static void land(struct ae_flight *flight, int result, bool ahead) {
    struct ae_cache *cache = flight->cached->cache;
    pthread_mutex_lock(&cache->lock);
    flight->result = result;
    flight->state = FLIGHT_LANDED;
    if (result == 0) {
        cache->counts.fetches++;
        cache->counts.fetched_bytes += flight->length;
        cache->counts.ahead_bytes += ahead ? flight->length : 0;
    } else {
        flight_unlist(flight);
    }
    pthread_cond_broadcast(&flight->landed);
    pthread_mutex_unlock(&cache->lock);
}

/*
 * By its pilot: without the lock, and with the hold that was the queue's. Passengers do not wait for the disk; until it
 * has the blocks, whoever needs one finds the flight, which has landed.
 */
static void fly(struct ae_flight *flight, bool ahead) {
    struct cached *cached = flight->cached;
    struct ae_cache *cache = cached->cache;
    int result = -ENOMEM;
    flight->bytes =
        aligned_alloc(AE_SECTOR_BYTES, (flight->length + AE_SECTOR_BYTES - 1) & ~(size_t)(AE_SECTOR_BYTES - 1));
    if (flight->bytes != NULL)
        result = ae_object_read_within(&cached->source, flight->bytes, flight->length, flight->offset);
    land(flight, result, ahead);
    if (result < 0)
        return;
    struct ae_cache_file *file = keep(flight);
    pthread_mutex_lock(&cache->lock);
    flight_unlist(flight);
    if (file != NULL)
        ae_cache_charge(cache, cached->entry, file);
    pthread_mutex_unlock(&cache->lock);
    if (file != NULL) {
        ae_cache_file_release(file);
        ae_cache_settle(cache);
    }
}

/*
 * Be on the flight that brings the block of `offset`, and wait for it. `*boarded` is NULL, where the block has come
 * meanwhile. A new flight takes along what is missing up to `end`.
 */
static int board(struct cached *cached, const struct ae_cache_file *file, uint64_t offset, uint64_t end,
                 struct ae_flight **boarded) {
    struct ae_cache *cache = cached->cache;
    uint64_t block = offset / AE_BLOCK_BYTES;
    bool pilot = false;
    int result = 0;
    *boarded = NULL;
    pthread_mutex_lock(&cache->lock);
    struct ae_flight *flight = flight_find(cached->entry, block);
    if (flight != NULL) {
        pilot = flight->state == FLIGHT_QUEUED;
        if (pilot)
            queue_take(cache, flight);
        else
            flight->holders++;
    } else if (file == NULL || !ae_cache_file_has(file, block)) {
        flight = flight_make(cached, file, block, (end + AE_BLOCK_BYTES - 1) / AE_BLOCK_BYTES);
        pilot = flight != NULL;
        if (pilot)
            flight->state = FLIGHT_UNDER_WAY;
        else
            result = -ENOMEM;
    }
    if (flight != NULL && !pilot) {
        while (flight->state != FLIGHT_LANDED)
            pthread_cond_wait(&flight->landed, &cache->lock);
        result = flight->result;
    }
    pthread_mutex_unlock(&cache->lock);
    if (pilot) {
        fly(flight, false);
        result = flight->result;
    }
    if (result == 0)
        *boarded = flight;
    else if (flight != NULL)
        flight_leave(flight);
    return result;
}

/* Reading */

static void mark_used(struct ae_cache_entry *entry) {
    if (!atomic_load_explicit(&entry->used, memory_order_relaxed))
        atomic_store_explicit(&entry->used, true, memory_order_relaxed);
}

static void count_hit(struct ae_cache_entry *entry) {
    atomic_fetch_add_explicit(&entry->hits, 1, memory_order_relaxed);
}

/* Some of it: `*done` bytes, which may be none yet. */
static int read_some(struct cached *cached, char *to, size_t length, uint64_t offset, size_t *done) {
    struct ae_cache_file *file = ae_cache_need_file(cached->cache, cached->entry);
    *done = file != NULL ? ae_cache_file_have(file, length, offset, false) : 0;
    if (*done > 0) {
        int result = ae_cache_file_read(file, to, *done, offset, false);
        if (result < 0) {
            ae_cache_file_lose(file, *done, offset);
            *done = 0;
        } else {
            count_hit(cached->entry);
        }
        ae_cache_file_release(file);
        return 0;
    }
    struct ae_flight *flight;
    int result = board(cached, file, offset, offset + length, &flight);
    if (flight != NULL) {
        *done = (size_t)smaller(length, flight->offset + flight->length - offset);
        memcpy(to, flight->bytes + (offset - flight->offset), *done);
        flight_leave(flight);
    }
    if (file != NULL)
        ae_cache_file_release(file);
    return result;
}

static int cached_pread_within(void *ctx, void *buffer, size_t length, uint64_t offset) {
    struct cached *cached = ctx;
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
    const struct cached *cached = ctx;
    size_t within = offset < cached->size ? (size_t)smaller(length, cached->size - offset) : 0;
    memset((char *)buffer + within, 0, length - within);
    return cached_pread_within(ctx, buffer, within, within > 0 ? offset : 0);
}

/* Whatever is wrong with the disk: the call that may wait finds out. */
static int cached_pread_nowait(void *ctx, void *buffer, size_t length, uint64_t offset) {
    struct cached *cached = ctx;
    if (offset > cached->size || length > cached->size - offset)
        return -EAGAIN;
    struct ae_cache_file *file = ae_cache_file_of(cached->entry);
    if (file == NULL)
        return -EAGAIN;
    mark_used(cached->entry);
    bool got = ae_cache_file_have(file, length, offset, true) == length &&
               ae_cache_file_read(file, buffer, length, offset, true) == 0;
    ae_cache_file_release(file);
    if (!got)
        return -EAGAIN;
    count_hit(cached->entry);
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
    *size = ((const struct cached *)ctx)->size;
    return 0;
}

static int cached_next_data(void *ctx, uint64_t offset, uint64_t *found) {
    *found = offset;
    return offset < ((const struct cached *)ctx)->size ? 0 : -ENXIO;
}

static int cached_next_hole(void *ctx, uint64_t offset, uint64_t *found) {
    uint64_t size = ((const struct cached *)ctx)->size;
    *found = offset < size ? size : offset;
    return 0;
}

static void cached_close(void *ctx) { cached_release(ctx); }

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
    struct cached *cached = malloc(sizeof *cached);
    int result = cached == NULL ? -ENOMEM : size == 0 || size > PACK_BYTES_MAX ? -EINVAL : 0;
    if (result == 0) {
        *cached = (struct cached){.cache = cache, .source = source, .size = size};
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

/* Fetching ahead */

static void *fetch(void *argument) {
    struct ae_cache *cache = argument;
    pthread_mutex_lock(&cache->lock);
    while (!cache->stopping) {
        if (cache->queue == NULL) {
            cache->fetchers_idle++;
            pthread_cond_wait(&cache->work, &cache->lock);
            cache->fetchers_idle--;
            continue;
        }
        struct ae_flight *flight = queue_take(cache, cache->queue);
        pthread_mutex_unlock(&cache->lock);
        fly(flight, true);
        flight_leave(flight);
        pthread_mutex_lock(&cache->lock);
    }
    pthread_mutex_unlock(&cache->lock);
    return NULL;
}

/* With the lock held. A thread that gets no signals. Where none can be had, readers fly what is queued. */
static void fetcher_add(struct ae_cache *cache) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&cache->fetchers[cache->fetchers_count], NULL, fetch, cache) == 0)
        cache->fetchers_count++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void ae_fetchers_stop(struct ae_cache *cache) {
    pthread_mutex_lock(&cache->lock);
    cache->stopping = true;
    pthread_cond_broadcast(&cache->work);
    size_t count = cache->fetchers_count;
    pthread_mutex_unlock(&cache->lock);
    for (size_t i = 0; i < count; i++)
        pthread_join(cache->fetchers[i], NULL);
    pthread_mutex_lock(&cache->lock);
    while (cache->queue != NULL) {
        struct ae_flight *flight = queue_take(cache, cache->queue);
        flight_unlist(flight);
        pthread_mutex_unlock(&cache->lock);
        flight_leave(flight);
        pthread_mutex_lock(&cache->lock);
    }
    pthread_mutex_unlock(&cache->lock);
}

bool ae_object_is_cached(const struct ae_object *object) { return object->ops == &cached_ops; }

void ae_cached_will_need(const struct ae_object *object, uint64_t length, uint64_t offset) {
    struct cached *cached = object->ctx;
    struct ae_cache *cache = cached->cache;
    if (offset >= cached->size)
        return;
    uint64_t end = (offset + smaller(length, cached->size - offset) + AE_BLOCK_BYTES - 1) / AE_BLOCK_BYTES;
    struct ae_cache_file *file = ae_cache_need_file(cache, cached->entry);
    if (file == NULL)
        return; /* there is nowhere to keep it */
    pthread_mutex_lock(&cache->lock);
    for (uint64_t block = offset / AE_BLOCK_BYTES;
         block < end && cache->queued < QUEUED_MAX && !cache->stopping && !ae_cache_rests(cache); block++) {
        if (ae_cache_file_has(file, block) || flight_find(cached->entry, block) != NULL)
            continue;
        struct ae_flight *flight = flight_make(cached, file, block, end);
        if (flight == NULL)
            break;
        *cache->queue_end = flight;
        cache->queue_end = &flight->queue_next;
        cache->queued++;
        if (cache->fetchers_idle < cache->queued && cache->fetchers_count < AE_FETCHERS)
            fetcher_add(cache);
        pthread_cond_signal(&cache->work);
    }
    pthread_mutex_unlock(&cache->lock);
    ae_cache_file_release(file);
}
