/*
 * See flight.h. All about flights is under the cache's lock, which nobody holds while he fetches or touches the disk.
 */
#include "flight.h"
#include "plan.h"
#include "region.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FETCHERS 8u
#define KEEPERS 2u
/* 1 MiB, and a block more: packs of 4 MiB are a bit longer than that, and would take five flights instead of four. */
#define FLIGHT_BLOCKS (AE_BUFFER_BYTES_MAX / AE_BLOCK_BYTES)
#define QUEUED_MAX 64u
/* So much of what has landed may stay in memory, for somebody who is about to come; and so much at most. */
#define LANDED_BYTES_REST ((size_t)16 << 20)
#define LANDED_BYTES_MAX ((size_t)32 << 20)

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void enqueue(struct ae_flight_queue *queue, struct ae_flight *flight) {
    flight->queue_next = NULL;
    *queue->end = flight;
    queue->end = &flight->queue_next;
    queue->count++;
}

static void dequeue(struct ae_flight_queue *queue, struct ae_flight *flight) {
    struct ae_flight **at = &queue->first;
    while (*at != flight)
        at = &(*at)->queue_next;
    *at = flight->queue_next;
    if (flight->queue_next == NULL)
        queue->end = at;
    queue->count--;
}

/* The one that has the block, with the lock held. */
static struct ae_flight *flight_find(const struct ae_cache_entry *entry, uint64_t block) {
    uint64_t offset = block * AE_BLOCK_BYTES;
    struct ae_flight *flight = entry->flights;
    while (flight != NULL && !(flight->offset <= offset && offset < flight->offset + flight->length))
        flight = flight->next;
    return flight;
}

/* Of blocks from `first` on, up to `end` at most, that are neither there nor in a flight; with the lock held. */
static struct ae_flight *flight_make(struct ae_cached *cached, const struct ae_cache_file *file, uint64_t first,
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

/* With the lock held. */
static void flight_unlist(struct ae_flight *flight) {
    struct ae_flight **at = &flight->cached->entry->flights;
    while (*at != flight)
        at = &(*at)->next;
    *at = flight->next;
}

void ae_flight_leave(struct ae_flight *flight) {
    struct ae_cached *cached = flight->cached;
    pthread_mutex_lock(&cached->cache->lock);
    bool last = --flight->holders == 0;
    pthread_mutex_unlock(&cached->cache->lock);
    if (!last)
        return;
    pthread_cond_destroy(&flight->landed);
    ae_buffer_give(&cached->cache->buffers, flight->bytes, flight->length);
    free(flight);
    ae_cached_release(cached);
}

/* With the lock held: whoever takes it flies it, with the hold that was the queue's. */
static struct ae_flight *take_off(struct ae_flight *flight) {
    dequeue(&flight->cached->cache->ahead, flight);
    flight->state = AE_FLIGHT_UNDER_WAY;
    return flight;
}

/* Writing to the disk */

/* Whoever has it in hand now: the file has the blocks, or nobody keeps them. Without the lock. */
static void keep(struct ae_flight *flight) {
    struct ae_cached *cached = flight->cached;
    struct ae_cache *cache = cached->cache;
    struct ae_cache_file *file = ae_cache_need_file(cache, cached->entry);
    if (file != NULL && !ae_cache_rests(cache) &&
        ae_cache_file_store(file, flight->bytes, flight->length, flight->offset) < 0)
        ae_cache_rest(cache);
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

/* With the lock held: how long the one that landed first may still stay. At the end, what is in hand is written. */
static uint64_t stays_ns(const struct ae_cache *cache) {
    uint64_t age_ns = now_ns() - cache->landed.first->landed_ns;
    bool due = cache->landed_bytes > LANDED_BYTES_REST || cache->keepers.stopping || age_ns >= cache->stay_ns;
    return due ? 0 : cache->stay_ns - age_ns;
}

static void *keep_landed(void *argument) {
    struct ae_cache *cache = argument;
    bool trimmed = false;
    pthread_mutex_lock(&cache->lock);
    while (cache->landed.first != NULL || !cache->keepers.stopping) {
        struct ae_flight *flight = cache->landed.first;
        uint64_t left_ns = flight != NULL ? stays_ns(cache) : 0;
        if (flight == NULL && trimmed) {
            ae_crew_wait(&cache->keepers);
            trimmed = false;
        } else if (flight == NULL) {
            pthread_mutex_unlock(&cache->lock);
            ae_buffers_trim(&cache->buffers);
            pthread_mutex_lock(&cache->lock);
            trimmed = true;
        } else if (left_ns > 0) {
            ae_crew_wait_for(&cache->keepers, left_ns);
        } else {
            dequeue(&cache->landed, flight);
            pthread_mutex_unlock(&cache->lock);
            keep(flight);
            size_t room = ae_buffer_room(flight->length);
            ae_flight_leave(flight);
            pthread_mutex_lock(&cache->lock);
            cache->landed_bytes -= room;
            trimmed = false;
        }
    }
    pthread_mutex_unlock(&cache->lock);
    return NULL;
}

/* With the lock held. False: the caller has to keep it himself. */
static bool leave_to_keepers(struct ae_cache *cache, struct ae_flight *flight) {
    bool first = cache->landed.first == NULL;
    size_t room = ae_buffer_room(flight->length);
    bool due = cache->landed_bytes + room > LANDED_BYTES_REST;
    if (ae_cache_rests(cache) || cache->landed_bytes + room > LANDED_BYTES_MAX)
        return false;
    if ((first || due) && !ae_crew_call(&cache->keepers, due ? cache->landed.count + 1 : 1))
        return false;
    flight->holders++;
    flight->landed_ns = now_ns();
    cache->landed_bytes += room;
    enqueue(&cache->landed, flight);
    return true;
}

/* Flying */

/* Let the passengers go. With an error, whoever comes next tries again. True: it is still to be kept. */
static bool land(struct ae_flight *flight, int result, bool ahead) {
    struct ae_cache *cache = flight->cached->cache;
    bool to_keep = false;
    pthread_mutex_lock(&cache->lock);
    flight->result = result;
    flight->state = AE_FLIGHT_LANDED;
    if (result == 0) {
        cache->counts.fetches++;
        cache->counts.fetched_bytes += flight->length;
        cache->counts.ahead_bytes += ahead ? flight->length : 0;
        to_keep = !leave_to_keepers(cache, flight);
    } else {
        flight_unlist(flight);
    }
    pthread_cond_broadcast(&flight->landed);
    pthread_mutex_unlock(&cache->lock);
    return to_keep;
}

/* By its pilot, without the lock. */
static void fly(struct ae_flight *flight, bool ahead) {
    struct ae_cached *cached = flight->cached;
    int result = -ENOMEM;
    flight->bytes = ae_buffer_take(&cached->cache->buffers, flight->length);
    if (flight->bytes != NULL) {
        /* The last sector is written whole. */
        size_t written = (size_t)ae_sector_ceil(flight->length) * AE_SECTOR_BYTES;
        memset(flight->bytes + flight->length, 0, written - flight->length);
        result = ae_object_read_within(&cached->source, flight->bytes, flight->length, flight->offset);
    }
    if (land(flight, result, ahead))
        keep(flight);
}

int ae_flight_board(struct ae_cached *cached, const struct ae_cache_file *file, uint64_t offset, uint64_t end,
                    struct ae_flight **boarded) {
    struct ae_cache *cache = cached->cache;
    uint64_t block = offset / AE_BLOCK_BYTES;
    bool pilot = false;
    int result = 0;
    *boarded = NULL;
    pthread_mutex_lock(&cache->lock);
    struct ae_flight *flight = flight_find(cached->entry, block);
    if (flight != NULL) {
        pilot = flight->state == AE_FLIGHT_QUEUED;
        if (pilot)
            take_off(flight);
        else
            flight->holders++;
        if (flight->state == AE_FLIGHT_LANDED)
            ae_cache_count_hit(cached->entry);
    } else if (file == NULL || !ae_cache_file_has(file, block)) {
        flight = flight_make(cached, file, block, (end + AE_BLOCK_BYTES - 1) / AE_BLOCK_BYTES);
        pilot = flight != NULL;
        if (pilot)
            flight->state = AE_FLIGHT_UNDER_WAY;
        else
            result = -ENOMEM;
    }
    if (flight != NULL && !pilot) {
        while (flight->state != AE_FLIGHT_LANDED)
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
        ae_flight_leave(flight);
    return result;
}

struct ae_flight *ae_flight_landed(struct ae_cached *cached, uint64_t offset) {
    pthread_mutex_lock(&cached->cache->lock);
    struct ae_flight *flight = flight_find(cached->entry, offset / AE_BLOCK_BYTES);
    if (flight != NULL && (flight->state != AE_FLIGHT_LANDED || flight->result < 0))
        flight = NULL;
    if (flight != NULL)
        flight->holders++;
    pthread_mutex_unlock(&cached->cache->lock);
    return flight;
}

/* Fetching ahead */

static void *fetch_ahead(void *argument) {
    struct ae_cache *cache = argument;
    pthread_mutex_lock(&cache->lock);
    while (!cache->fetchers.stopping) {
        if (cache->ahead.first == NULL) {
            ae_crew_wait(&cache->fetchers);
            continue;
        }
        struct ae_flight *flight = take_off(cache->ahead.first);
        pthread_mutex_unlock(&cache->lock);
        fly(flight, true);
        ae_flight_leave(flight);
        pthread_mutex_lock(&cache->lock);
    }
    pthread_mutex_unlock(&cache->lock);
    return NULL;
}

void ae_cached_will_need(const struct ae_object *object, uint64_t length, uint64_t offset) {
    struct ae_cached *cached = object->ctx;
    struct ae_cache *cache = cached->cache;
    if (offset >= cached->size)
        return;
    uint64_t end = (offset + smaller(length, cached->size - offset) + AE_BLOCK_BYTES - 1) / AE_BLOCK_BYTES;
    struct ae_cache_file *file = ae_cache_need_file(cache, cached->entry);
    if (file == NULL)
        return; /* there is nowhere to keep it */
    pthread_mutex_lock(&cache->lock);
    for (uint64_t block = offset / AE_BLOCK_BYTES;
         block < end && cache->ahead.count < QUEUED_MAX && !cache->fetchers.stopping && !ae_cache_rests(cache);
         block++) {
        if (ae_cache_file_has(file, block) || flight_find(cached->entry, block) != NULL)
            continue;
        struct ae_flight *flight = flight_make(cached, file, block, end);
        if (flight == NULL)
            break;
        enqueue(&cache->ahead, flight);
        /* Where no thread can be had, readers fly what is queued. */
        (void)ae_crew_call(&cache->fetchers, cache->ahead.count);
    }
    pthread_mutex_unlock(&cache->lock);
    ae_cache_file_release(file);
}

/* Beginning and end */

int ae_flights_init(struct ae_cache *cache) {
    cache->ahead.end = &cache->ahead.first;
    cache->landed.end = &cache->landed.first;
    int result = ae_buffers_init(&cache->buffers);
    if (result < 0)
        return result;
    result = ae_crew_init(&cache->fetchers, "pack-fetcher", FETCHERS, &cache->lock, fetch_ahead, cache);
    if (result == 0) {
        result = ae_crew_init(&cache->keepers, "pack-keeper", KEEPERS, &cache->lock, keep_landed, cache);
        if (result == 0)
            return 0;
        ae_crew_destroy(&cache->fetchers);
    }
    ae_buffers_destroy(&cache->buffers);
    return result;
}

/* Fetchers first: what they have under way is still to be kept. */
void ae_flights_stop(struct ae_cache *cache) {
    ae_crew_stop(&cache->fetchers);
    ae_crew_join(&cache->fetchers);
    ae_crew_stop(&cache->keepers);
    ae_crew_join(&cache->keepers);
    pthread_mutex_lock(&cache->lock);
    while (cache->ahead.first != NULL) {
        struct ae_flight *flight = take_off(cache->ahead.first);
        flight_unlist(flight);
        pthread_mutex_unlock(&cache->lock);
        ae_flight_leave(flight);
        pthread_mutex_lock(&cache->lock);
    }
    pthread_mutex_unlock(&cache->lock);
}

void ae_flights_destroy(struct ae_cache *cache) {
    ae_crew_destroy(&cache->keepers);
    ae_crew_destroy(&cache->fetchers);
    ae_buffers_destroy(&cache->buffers);
}
