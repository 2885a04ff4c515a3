/*
 * A *flight* fetches a run of blocks of a pack, and all who ask for one of them meanwhile wait for it and take their
 * bytes out of its buffer: so each block is fetched once, also where the disk does not take it. A flight that was
 * queued to be fetched ahead is flown by whoever needs it first, one of the fetchers or a reader.
 *
 * What has landed stays where it is for a moment, in which the reader comes that it was fetched ahead of; then a keeper
 * writes it to the disk, and until the file has the blocks, who needs one finds the flight. Where the disk is slower
 * than the store, so that much has landed, whoever flies the next one writes it himself.
 */
#ifndef ARCHIPFS_ENGINE_FLIGHT_H
#define ARCHIPFS_ENGINE_FLIGHT_H

#include "cache.h"

/* A pack that lies far away, read through its file. */
struct ae_cached {
    atomic_uint references; /* the object, and its flights */
    struct ae_cache *cache;
    struct ae_cache_entry *entry;
    struct ae_object source;
    uint64_t size;
};

void ae_cached_release(struct ae_cached *cached);

enum ae_flight_state { AE_FLIGHT_QUEUED, AE_FLIGHT_UNDER_WAY, AE_FLIGHT_LANDED };

struct ae_flight {
    struct ae_flight *next; /* of the same entry */
    struct ae_flight *queue_next;
    struct ae_cached *cached;
    uint64_t offset;
    size_t length;
    enum ae_flight_state state;
    unsigned holders; /* the pilot or the queue, the keeper or his queue, and each passenger */
    int result;
    uint64_t landed_ns;
    char *bytes;
    pthread_cond_t landed;
};

/*
 * Be on the flight that brings the block of `offset`, and wait for it. `*boarded` is NULL, where the block has come
 * meanwhile. A new flight takes along what is missing up to `end`.
 */
int ae_flight_board(struct ae_cached *cached, const struct ae_cache_file *file, uint64_t offset, uint64_t end,
                    struct ae_flight **boarded);
/* The one that has brought the block of `offset`, if there is one; never waits for more than a lock. */
struct ae_flight *ae_flight_landed(struct ae_cached *cached, uint64_t offset);
void ae_flight_leave(struct ae_flight *flight);

#endif
