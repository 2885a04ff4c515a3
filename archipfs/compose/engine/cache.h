/*
 * The pack cache: which files there are, how much they may take together, and which of them goes (cache.c); the objects
 * that are read through them (cached.c); and fetching what is missing (flight.c).
 */
#ifndef ARCHIPFS_ENGINE_CACHE_H
#define ARCHIPFS_ENGINE_CACHE_H

#include "buffers.h"
#include "cache_file.h"
#include "crew.h"

#include <pthread.h>

#define AE_CACHE_BUCKETS 4096u

/* A file of the cache, whether anybody has it open or not. */
struct ae_cache_entry {
    /* Under the cache's lock. */
    struct ae_cache_entry *next;            /* in its bucket */
    struct ae_cache_entry *before, *behind; /* on the ring that the hand goes round */
    uint64_t objects;                       /* that are open on it */
    uint64_t users;                         /* these, and who evicts it just now */
    uint64_t charged;                       /* of the cache's bytes; 0: there is no file */
    struct ae_flight *flights;              /* under way or queued */
    uint8_t pack[32];
    uint64_t size;

    atomic_bool used;           /* since the hand came by */
    pthread_mutex_t opening;    /* held while the file is opened or removed */
    pthread_mutex_t gate;       /* for `file`: a few instructions */
    struct ae_cache_file *file; /* NULL: not open; changed with the cache's lock and the gate held */
    _Atomic uint64_t hits;
    char path[];
};

struct ae_flight_queue {
    struct ae_flight *first, **end;
    size_t count;
};

struct ae_cache {
    atomic_uint references;
    pthread_mutex_t lock;
    struct ae_cache_entry *buckets[AE_CACHE_BUCKETS];
    struct ae_cache_entry *hand;
    uint64_t bytes_max;
    bool evicting;
    struct ae_cache_statistics counts;
    /* Nothing is written to the disk before that moment: it failed a while ago. */
    _Atomic uint64_t rests_until_ns;

    struct ae_flight_queue ahead;  /* to be flown by one of the fetchers */
    struct ae_flight_queue landed; /* to be written to the disk by one of the keepers */
    uint64_t stay_ns;              /* until then they may stay in memory */
    size_t landed_bytes;           /* of these, and of what the keepers have in hand */
    struct ae_crew fetchers, keepers;
    struct ae_buffers buffers; /* of flights; its lock is never taken inside another */
};

void ae_cache_retain(struct ae_cache *cache);
void ae_cache_release(struct ae_cache *cache);

/* The entry for a path, which the caller uses until he gives it back. -EINVAL: it is open as another pack's. */
int ae_cache_enter(struct ae_cache *cache, const char *path, const uint8_t pack[32], uint64_t size,
                   struct ae_cache_entry **entry);
void ae_cache_leave(struct ae_cache *cache, struct ae_cache_entry *entry);

/* The entry's file, with a reference, if it is open. */
struct ae_cache_file *ae_cache_file_of(struct ae_cache_entry *entry);
/* The same; it is opened, or made. NULL: the disk does not let us. */
struct ae_cache_file *ae_cache_need_file(struct ae_cache *cache, struct ae_cache_entry *entry);
static inline void ae_cache_count_hit(struct ae_cache_entry *entry) {
    atomic_fetch_add_explicit(&entry->hits, 1, memory_order_relaxed);
}

/* Writing to the cache's disk failed: leave it alone for a while. */
void ae_cache_rest(struct ae_cache *cache);
bool ae_cache_rests(struct ae_cache *cache);
/* With the lock held: blocks were put into that file of the entry. */
void ae_cache_charge(struct ae_cache *cache, struct ae_cache_entry *entry, const struct ae_cache_file *file);
/* Evict what is too much, if nobody does so already. */
void ae_cache_settle(struct ae_cache *cache);

/* Of flight.c. Before the cache is given up, its threads are stopped; no more is fetched ahead then. */
int ae_flights_init(struct ae_cache *cache);
void ae_flights_stop(struct ae_cache *cache);
void ae_flights_destroy(struct ae_cache *cache);

/* Have a range fetched, without waiting for it. An object of another kind has nothing to fetch. */
bool ae_object_is_cached(const struct ae_object *object);
void ae_cached_will_need(const struct ae_object *object, uint64_t length, uint64_t offset);

#endif
