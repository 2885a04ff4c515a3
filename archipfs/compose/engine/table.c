/*
 * See table.h. A hash table in stripes, each with a mutex of its own, and a clock for what has to go.
 *
 * Empty regions come in runs, and a run that covers an aligned block of 256, 65,536 or 16,777,216 regions is kept under
 * the block's number on level 1, 2 or 3; so a hole of terabytes is one entry, whichever part of it is asked for. All
 * else is on level 0, under the region's own number.
 *
 * The bound is exact: bytes are reserved before a region goes in, and if they cannot be had it stays out, which costs
 * another resolve and nothing else.
 *
 * A stripe's lock is held for a few instructions, never two at a time, never across a resolve, and never while a region
 * is released: that may close a pack, which may call anything.
 */
#include "table.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define STRIPES 64u
#define LEVELS 4u
#define LEVEL_BITS 8u
/* One bucket, of a pointer, for so many bytes of regions. */
#define BUCKET_BYTES 1024u

struct ae_waiter {
    struct ae_waiter *next;
    struct ae_region *region;
    int result;
    bool done;
};

struct stripe {
    pthread_mutex_t lock;
    pthread_cond_t settled;
    struct ae_region **buckets;
    size_t hand; /* the bucket where the clock goes on */
    struct ae_ticket *tickets;
    uint64_t regions, hits, misses, evictions;
};

struct ae_table {
    atomic_uint references;
    size_t bytes_max;
    atomic_size_t bytes;
    size_t buckets; /* of each stripe, a power of two */
    _Atomic uint64_t generation;
    atomic_uint hand; /* the stripe where the clock goes on */
    unsigned ready;   /* stripes whose locks were made */
    struct stripe stripes[STRIPES];
};

/* Opening and closing */

static void table_free(struct ae_table *table) {
    for (unsigned i = 0; i < table->ready; i++) {
        struct stripe *stripe = &table->stripes[i];
        for (size_t bucket = 0; bucket < table->buckets; bucket++) {
            while (stripe->buckets[bucket] != NULL) {
                struct ae_region *region = stripe->buckets[bucket];
                stripe->buckets[bucket] = region->next;
                ae_region_release(region);
            }
        }
        free(stripe->buckets);
        pthread_cond_destroy(&stripe->settled);
        pthread_mutex_destroy(&stripe->lock);
    }
    free(table);
}

static int stripe_init(struct stripe *stripe, size_t buckets) {
    stripe->buckets = calloc(buckets, sizeof stripe->buckets[0]);
    if (stripe->buckets == NULL)
        return -ENOMEM;
    if (pthread_mutex_init(&stripe->lock, NULL) == 0) {
        if (pthread_cond_init(&stripe->settled, NULL) == 0)
            return 0;
        pthread_mutex_destroy(&stripe->lock);
    }
    free(stripe->buckets);
    return -ENOMEM;
}

int ae_table_open(size_t bytes_max, struct ae_table **opened) {
    struct ae_table *table = calloc(1, sizeof *table);
    if (table == NULL)
        return -ENOMEM;
    atomic_init(&table->references, 1);
    table->bytes_max = bytes_max;
    table->buckets = 1;
    while (table->buckets < bytes_max / BUCKET_BYTES / STRIPES)
        table->buckets *= 2;
    for (; table->ready < STRIPES; table->ready++) {
        if (stripe_init(&table->stripes[table->ready], table->buckets) < 0) {
            table_free(table);
            return -ENOMEM;
        }
    }
    *opened = table;
    return 0;
}

void ae_table_retain(struct ae_table *table) { atomic_fetch_add(&table->references, 1); }

void ae_table_release(struct ae_table *table) {
    if (atomic_fetch_sub(&table->references, 1) == 1)
        table_free(table);
}

/* Keys */

static struct ae_region_key key_of(const uint8_t layer[16], uint64_t number, uint32_t level) {
    struct ae_region_key key = {.level = level, .number = number >> (level * LEVEL_BITS)};
    memcpy(key.layer, layer, sizeof key.layer);
    return key;
}

static bool key_equal(const struct ae_region_key *a, const struct ae_region_key *b) {
    return a->number == b->number && a->level == b->level && memcmp(a->layer, b->layer, sizeof a->layer) == 0;
}

/* Layer ids are random; the finisher of MurmurHash3 (Austin Appleby, public domain) spreads the numbers. */
static uint64_t key_hash(const struct ae_region_key *key) {
    uint64_t words[2];
    memcpy(words, key->layer, sizeof words);
    uint64_t hash = words[0] ^ words[1] ^ (key->number << 2 | key->level);
    hash = (hash ^ hash >> 33) * UINT64_C(0xff51afd7ed558ccd);
    hash = (hash ^ hash >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
    return hash ^ hash >> 33;
}

static struct stripe *stripe_of(struct ae_table *table, uint64_t hash) { return &table->stripes[hash % STRIPES]; }

static struct ae_region **bucket_of(const struct ae_table *table, const struct stripe *stripe, uint64_t hash) {
    return &stripe->buckets[hash / STRIPES & (table->buckets - 1)];
}

/* The highest level of which the region covers the whole block around `number`. */
static uint32_t level_of(const struct ae_region *region, uint64_t number) {
    uint32_t level = LEVELS - 1;
    for (; level > 0; level--) {
        unsigned shift = level * LEVEL_BITS;
        uint64_t first = number >> shift << shift;
        if (region->first_region <= first && first + (UINT64_C(1) << shift) <= region->end_region)
            break;
    }
    return level;
}

/* Finding */

/* With the stripe's lock. */
static struct ae_region *stripe_find(const struct ae_table *table, struct stripe *stripe,
                                     const struct ae_region_key *key, uint64_t hash) {
    struct ae_region *region = *bucket_of(table, stripe, hash);
    while (region != NULL && !key_equal(&region->key, key))
        region = region->next;
    if (region == NULL)
        return NULL;
    if (!region->used)
        region->used = true;
    stripe->hits++;
    ae_region_retain(region);
    return region;
}

static struct ae_region *find_on_level(struct ae_table *table, const uint8_t layer[16], uint64_t number,
                                       uint32_t level) {
    struct ae_region_key key = key_of(layer, number, level);
    uint64_t hash = key_hash(&key);
    struct stripe *stripe = stripe_of(table, hash);
    pthread_mutex_lock(&stripe->lock);
    struct ae_region *region = stripe_find(table, stripe, &key, hash);
    pthread_mutex_unlock(&stripe->lock);
    return region;
}

struct ae_region *ae_table_find(struct ae_table *table, const uint8_t layer[16], uint64_t number) {
    struct ae_region *region = NULL;
    for (uint32_t level = 0; region == NULL && level < LEVELS; level++)
        region = find_on_level(table, layer, number, level);
    return region;
}

/* Evicting */

/* One that was not used since the hand came by, within one turn of it; the others lose their mark. */
static struct ae_region *stripe_evict(const struct ae_table *table, struct stripe *stripe) {
    struct ae_region *evicted = NULL;
    pthread_mutex_lock(&stripe->lock);
    for (size_t n = 0; evicted == NULL && stripe->regions > 0 && n < table->buckets; n++) {
        struct ae_region **link = &stripe->buckets[stripe->hand];
        while (*link != NULL && (*link)->used) {
            (*link)->used = false;
            link = &(*link)->next;
        }
        evicted = *link;
        if (evicted == NULL) {
            stripe->hand = (stripe->hand + 1) & (table->buckets - 1);
        } else {
            *link = evicted->next;
            stripe->regions--;
            stripe->evictions++;
        }
    }
    pthread_mutex_unlock(&stripe->lock);
    return evicted;
}

static void drop(struct ae_table *table, struct ae_region *region) {
    atomic_fetch_sub(&table->bytes, region->bytes);
    ae_region_release(region);
}

/* Two turns over all stripes: the first may only have taken marks away. */
static bool evict_one(struct ae_table *table) {
    for (unsigned n = 0; n < 2 * STRIPES; n++) {
        struct stripe *stripe = &table->stripes[atomic_fetch_add(&table->hand, 1) % STRIPES];
        struct ae_region *evicted = stripe_evict(table, stripe);
        if (evicted != NULL) {
            drop(table, evicted);
            return true;
        }
    }
    return false;
}

static bool reserve(struct ae_table *table, size_t bytes) {
    if (bytes > table->bytes_max)
        return false;
    size_t present = atomic_load(&table->bytes);
    for (;;) {
        if (present > table->bytes_max - bytes) {
            if (!evict_one(table))
                return false;
            present = atomic_load(&table->bytes);
        } else if (atomic_compare_exchange_weak(&table->bytes, &present, present + bytes)) {
            return true;
        }
    }
}

/* Put it in place of what the table has under its key, unless all was forgotten since the resolve began. */
static void insert(struct ae_table *table, const struct ae_ticket *ticket, struct ae_region *region) {
    if (!reserve(table, region->bytes))
        return;
    region->key = key_of(ticket->key.layer, ticket->key.number, level_of(region, ticket->key.number));
    uint64_t hash = key_hash(&region->key);
    struct stripe *stripe = stripe_of(table, hash);
    struct ae_region *replaced = NULL;
    pthread_mutex_lock(&stripe->lock);
    bool current = atomic_load(&table->generation) == ticket->generation;
    if (current) {
        struct ae_region **bucket = bucket_of(table, stripe, hash), **link = bucket;
        while (*link != NULL && !key_equal(&(*link)->key, &region->key))
            link = &(*link)->next;
        replaced = *link;
        if (replaced != NULL)
            *link = replaced->next;
        stripe->regions += replaced == NULL;
        ae_region_retain(region);
        region->next = *bucket;
        *bucket = region;
    }
    pthread_mutex_unlock(&stripe->lock);
    if (!current)
        atomic_fetch_sub(&table->bytes, region->bytes);
    if (replaced != NULL)
        drop(table, replaced);
}

void ae_table_forget(struct ae_table *table) {
    /* First: what comes in later was resolved later. */
    atomic_fetch_add(&table->generation, 1);
    for (unsigned i = 0; i < STRIPES; i++) {
        struct stripe *stripe = &table->stripes[i];
        struct ae_region *dropped = NULL;
        pthread_mutex_lock(&stripe->lock);
        for (size_t bucket = 0; bucket < table->buckets; bucket++) {
            while (stripe->buckets[bucket] != NULL) {
                struct ae_region *region = stripe->buckets[bucket];
                stripe->buckets[bucket] = region->next;
                region->next = dropped;
                dropped = region;
            }
        }
        stripe->regions = 0;
        pthread_mutex_unlock(&stripe->lock);
        while (dropped != NULL) {
            struct ae_region *region = dropped;
            dropped = region->next;
            drop(table, region);
        }
    }
}

/* Resolving */

static struct ae_ticket **ticket_of(struct stripe *stripe, const struct ae_region_key *key, uint64_t generation) {
    struct ae_ticket **link = &stripe->tickets;
    while (*link != NULL && !((*link)->generation == generation && key_equal(&(*link)->key, key)))
        link = &(*link)->next;
    return link;
}

int ae_table_take(struct ae_table *table, const uint8_t layer[16], uint64_t number, struct ae_ticket *ticket,
                  struct ae_region **found) {
    *found = ae_table_find(table, layer, number);
    if (*found != NULL)
        return 0;
    struct ae_region_key key = key_of(layer, number, 0);
    uint64_t hash = key_hash(&key);
    struct stripe *stripe = stripe_of(table, hash);
    struct ae_waiter waiter = {0};
    pthread_mutex_lock(&stripe->lock);
    *found = stripe_find(table, stripe, &key, hash);
    if (*found != NULL) {
        pthread_mutex_unlock(&stripe->lock);
        return 0;
    }
    stripe->misses++;
    uint64_t generation = atomic_load(&table->generation);
    struct ae_ticket *other = *ticket_of(stripe, &key, generation);
    if (other == NULL) {
        *ticket = (struct ae_ticket){.key = key, .generation = generation, .next = stripe->tickets};
        stripe->tickets = ticket;
        pthread_mutex_unlock(&stripe->lock);
        return 1;
    }
    waiter.next = other->waiters;
    other->waiters = &waiter;
    while (!waiter.done)
        pthread_cond_wait(&stripe->settled, &stripe->lock);
    pthread_mutex_unlock(&stripe->lock);
    *found = waiter.region;
    return waiter.result;
}

void ae_table_settle(struct ae_table *table, struct ae_ticket *ticket, int result, struct ae_region *region) {
    if (result == 0)
        insert(table, ticket, region);
    struct stripe *stripe = stripe_of(table, key_hash(&ticket->key));
    pthread_mutex_lock(&stripe->lock);
    struct ae_ticket **link = ticket_of(stripe, &ticket->key, ticket->generation);
    *link = ticket->next;
    for (struct ae_waiter *waiter = ticket->waiters; waiter != NULL; waiter = waiter->next) {
        waiter->result = result;
        waiter->done = true;
        if (result == 0) {
            ae_region_retain(region);
            waiter->region = region;
        }
    }
    if (ticket->waiters != NULL)
        pthread_cond_broadcast(&stripe->settled);
    pthread_mutex_unlock(&stripe->lock);
}

void ae_table_renew_begin(struct ae_table *table, const uint8_t layer[16], uint64_t number, struct ae_ticket *ticket) {
    *ticket = (struct ae_ticket){.key = key_of(layer, number, 0), .generation = atomic_load(&table->generation)};
}

void ae_table_renew_end(struct ae_table *table, const struct ae_ticket *ticket, struct ae_region *region) {
    insert(table, ticket, region);
}

/* Looking */

size_t ae_table_bytes(struct ae_table *table) { return atomic_load(&table->bytes); }

void ae_table_statistics(struct ae_table *table, struct ae_table_statistics *statistics) {
    *statistics = (struct ae_table_statistics){.bytes = ae_table_bytes(table)};
    for (unsigned i = 0; i < STRIPES; i++) {
        struct stripe *stripe = &table->stripes[i];
        pthread_mutex_lock(&stripe->lock);
        statistics->regions += stripe->regions;
        statistics->hits += stripe->hits;
        statistics->misses += stripe->misses;
        statistics->evictions += stripe->evictions;
        pthread_mutex_unlock(&stripe->lock);
    }
}
