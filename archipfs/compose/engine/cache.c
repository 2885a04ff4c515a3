/*
 * See cache.h. Locks, in the order they are taken: an entry's `opening`, the cache's lock, an entry's `gate`. Files are
 * opened, removed and closed with the last two released.
 *
 * What is evicted goes by its name only. Whoever is just reading the file goes on with it; who comes later makes a new
 * one. So no block ever changes under a reader.
 */
#include "cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A file counts as that much at least, which bounds how many there are. */
#define CHARGE_MIN ((uint64_t)256 << 10)
#define REST_NS (UINT64_C(5) * 1000000000u)

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Entries; all with the lock held */

static struct ae_cache_entry **bucket_of(struct ae_cache *cache, const char *path) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
    for (const char *at = path; *at != 0; at++)
        hash = (hash ^ (uint8_t)*at) * UINT64_C(0x100000001b3);
    return &cache->buckets[hash % AE_CACHE_BUCKETS];
}

static struct ae_cache_entry **entry_find(struct ae_cache *cache, const char *path) {
    struct ae_cache_entry **at = bucket_of(cache, path);
    while (*at != NULL && strcmp((*at)->path, path) != 0)
        at = &(*at)->next;
    return at;
}

static struct ae_cache_entry *entry_make(const char *path) {
    size_t path_bytes = strlen(path) + 1;
    struct ae_cache_entry *entry = calloc(1, sizeof *entry + path_bytes);
    if (entry == NULL)
        return NULL;
    memcpy(entry->path, path, path_bytes);
    if (pthread_mutex_init(&entry->opening, NULL) == 0) {
        if (pthread_mutex_init(&entry->gate, NULL) == 0)
            return entry;
        pthread_mutex_destroy(&entry->opening);
    }
    free(entry);
    return NULL;
}

static void entry_free(struct ae_cache_entry *entry) {
    if (entry->file != NULL)
        ae_cache_file_release(entry->file);
    pthread_mutex_destroy(&entry->gate);
    pthread_mutex_destroy(&entry->opening);
    free(entry);
}

/* Behind the hand: it comes by last. */
static struct ae_cache_entry *entry_add(struct ae_cache *cache, const char *path) {
    struct ae_cache_entry *entry = entry_make(path);
    if (entry == NULL)
        return NULL;
    *entry_find(cache, path) = entry;
    if (cache->hand == NULL) {
        cache->hand = entry->before = entry->behind = entry;
    } else {
        entry->behind = cache->hand;
        entry->before = cache->hand->before;
        entry->before->behind = entry->behind->before = entry;
    }
    return entry;
}

/* If nothing is left of it. */
static void entry_drop(struct ae_cache *cache, struct ae_cache_entry *entry) {
    if (entry->users > 0 || entry->charged > 0)
        return;
    *entry_find(cache, entry->path) = entry->next;
    if (cache->hand == entry)
        cache->hand = entry->behind != entry ? entry->behind : NULL;
    entry->before->behind = entry->behind;
    entry->behind->before = entry->before;
    entry_free(entry);
}

static void charge(struct ae_cache *cache, struct ae_cache_entry *entry, uint64_t bytes) {
    cache->counts.files += (bytes > 0) - (entry->charged > 0);
    cache->counts.bytes += bytes - entry->charged;
    entry->charged = bytes;
}

int ae_cache_enter(struct ae_cache *cache, const char *path, const uint8_t pack[32], uint64_t size,
                   struct ae_cache_entry **entered) {
    int result = 0;
    pthread_mutex_lock(&cache->lock);
    struct ae_cache_entry *entry = *entry_find(cache, path);
    if (entry == NULL)
        entry = entry_add(cache, path);
    if (entry == NULL)
        result = -ENOMEM;
    else if (entry->objects > 0 && (entry->size != size || memcmp(entry->pack, pack, 32) != 0))
        result = -EINVAL;
    if (result == 0) {
        if (entry->objects++ == 0) {
            memcpy(entry->pack, pack, 32);
            entry->size = size;
        }
        entry->users++;
    }
    pthread_mutex_unlock(&cache->lock);
    *entered = entry;
    return result;
}

static void entry_leave(struct ae_cache *cache, struct ae_cache_entry *entry, bool object) {
    pthread_mutex_lock(&cache->lock);
    struct ae_cache_file *file = NULL;
    entry->objects -= object;
    if (--entry->users == 0) {
        pthread_mutex_lock(&entry->gate);
        file = entry->file;
        entry->file = NULL;
        pthread_mutex_unlock(&entry->gate);
        cache->counts.hits += atomic_exchange(&entry->hits, 0);
        entry_drop(cache, entry);
    }
    pthread_mutex_unlock(&cache->lock);
    if (file != NULL)
        ae_cache_file_release(file);
}

void ae_cache_leave(struct ae_cache *cache, struct ae_cache_entry *entry) { entry_leave(cache, entry, true); }

/* Files */

struct ae_cache_file *ae_cache_file_of(struct ae_cache_entry *entry) {
    pthread_mutex_lock(&entry->gate);
    struct ae_cache_file *file = entry->file;
    if (file != NULL)
        ae_cache_file_retain(file);
    pthread_mutex_unlock(&entry->gate);
    return file;
}

void ae_cache_rest(struct ae_cache *cache) {
    atomic_store(&cache->rests_until_ns, now_ns() + REST_NS);
    pthread_mutex_lock(&cache->lock);
    cache->counts.failures++;
    pthread_mutex_unlock(&cache->lock);
}

bool ae_cache_rests(struct ae_cache *cache) {
    uint64_t until = atomic_load(&cache->rests_until_ns);
    return until != 0 && now_ns() < until;
}

void ae_cache_charge(struct ae_cache *cache, struct ae_cache_entry *entry, const struct ae_cache_file *file) {
    if (entry->file == file)
        charge(cache, entry, larger(ae_cache_file_bytes(file), CHARGE_MIN));
}

/* With `opening` held. */
static struct ae_cache_file *file_open(struct ae_cache *cache, struct ae_cache_entry *entry) {
    struct ae_cache_file *file;
    int result = ae_cache_file_open(entry->path, entry->pack, entry->size, &file);
    if (result < 0) {
        ae_cache_rest(cache);
        return NULL;
    }
    ae_cache_file_retain(file);
    pthread_mutex_lock(&cache->lock);
    pthread_mutex_lock(&entry->gate);
    entry->file = file;
    pthread_mutex_unlock(&entry->gate);
    ae_cache_charge(cache, entry, file);
    pthread_mutex_unlock(&cache->lock);
    return file;
}

struct ae_cache_file *ae_cache_need_file(struct ae_cache *cache, struct ae_cache_entry *entry) {
    struct ae_cache_file *file = ae_cache_file_of(entry);
    if (file != NULL || ae_cache_rests(cache))
        return file;
    pthread_mutex_lock(&entry->opening);
    file = ae_cache_file_of(entry);
    if (file == NULL)
        file = file_open(cache, entry);
    pthread_mutex_unlock(&entry->opening);
    return file;
}

/* Eviction */

/* The next entry that nobody used since the hand came by. */
static struct ae_cache_entry *victim(struct ae_cache *cache) {
    struct ae_cache_entry *end = cache->hand;
    for (int round = 0; end != NULL && round < 2; round++) {
        do {
            struct ae_cache_entry *entry = cache->hand;
            cache->hand = entry->behind;
            if (entry->charged > 0 && !atomic_exchange(&entry->used, false))
                return entry;
        } while (cache->hand != end);
    }
    return NULL;
}

/* The lock is held, and released meanwhile. */
static void evict(struct ae_cache *cache, struct ae_cache_entry *entry) {
    entry->users++;
    pthread_mutex_unlock(&cache->lock);

    pthread_mutex_lock(&entry->opening);
    bool gone = unlink(entry->path) == 0 || errno == ENOENT;
    pthread_mutex_lock(&cache->lock);
    pthread_mutex_lock(&entry->gate);
    struct ae_cache_file *file = entry->file;
    entry->file = NULL;
    pthread_mutex_unlock(&entry->gate);
    charge(cache, entry, 0);
    cache->counts.evictions++;
    pthread_mutex_unlock(&cache->lock);
    pthread_mutex_unlock(&entry->opening);

    if (!gone)
        ae_cache_rest(cache);
    if (file != NULL)
        ae_cache_file_release(file);
    entry_leave(cache, entry, false);
    pthread_mutex_lock(&cache->lock);
}

void ae_cache_settle(struct ae_cache *cache) {
    pthread_mutex_lock(&cache->lock);
    if (!cache->evicting && cache->counts.bytes > cache->bytes_max) {
        cache->evicting = true;
        struct ae_cache_entry *entry;
        while (cache->counts.bytes > cache->bytes_max && (entry = victim(cache)) != NULL)
            evict(cache, entry);
        cache->evicting = false;
    }
    pthread_mutex_unlock(&cache->lock);
}

int ae_cache_adopt(struct ae_cache *cache, const char *path, uint64_t bytes) {
    int result = 0;
    pthread_mutex_lock(&cache->lock);
    struct ae_cache_entry *entry = *entry_find(cache, path);
    if (entry == NULL) {
        entry = entry_add(cache, path);
        if (entry != NULL)
            charge(cache, entry, larger(bytes, CHARGE_MIN));
        else
            result = -ENOMEM;
    }
    pthread_mutex_unlock(&cache->lock);
    ae_cache_settle(cache);
    return result;
}

void ae_cache_limit(struct ae_cache *cache, uint64_t bytes_max) {
    pthread_mutex_lock(&cache->lock);
    cache->bytes_max = bytes_max;
    pthread_mutex_unlock(&cache->lock);
    ae_cache_settle(cache);
}

/* The whole */

int ae_cache_open(uint64_t bytes_max, uint64_t stay_ns, struct ae_cache **opened) {
    struct ae_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL)
        return -ENOMEM;
    atomic_init(&cache->references, 1);
    cache->bytes_max = bytes_max;
    cache->stay_ns = stay_ns;
    int result = -pthread_mutex_init(&cache->lock, NULL);
    if (result == 0) {
        result = ae_flights_init(cache);
        if (result == 0) {
            *opened = cache;
            return 0;
        }
        pthread_mutex_destroy(&cache->lock);
    }
    free(cache);
    return result;
}

void ae_cache_retain(struct ae_cache *cache) { atomic_fetch_add(&cache->references, 1); }

void ae_cache_release(struct ae_cache *cache) {
    if (atomic_fetch_sub(&cache->references, 1) != 1)
        return;
    while (cache->hand != NULL) {
        cache->hand->charged = 0;
        entry_drop(cache, cache->hand);
    }
    ae_flights_destroy(cache);
    pthread_mutex_destroy(&cache->lock);
    free(cache);
}

void ae_cache_close(struct ae_cache *cache) {
    ae_flights_stop(cache);
    ae_cache_release(cache);
}

void ae_cache_statistics(struct ae_cache *cache, struct ae_cache_statistics *statistics) {
    pthread_mutex_lock(&cache->lock);
    *statistics = cache->counts;
    statistics->landed_bytes = cache->landed_bytes;
    struct ae_cache_entry *entry = cache->hand;
    if (entry != NULL) {
        do {
            statistics->hits += atomic_load(&entry->hits);
            entry = entry->behind;
        } while (entry != cache->hand);
    }
    pthread_mutex_unlock(&cache->lock);
}
