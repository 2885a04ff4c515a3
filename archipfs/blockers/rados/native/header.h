/*
 * The header object of a data object: docs/format.md, "Data objects in RADOS".
 *
 * 4096 bytes that say what it is, then one byte for each stripe: 1 where the stripe may exist. A byte is durable before
 * the stripe is written for the first time, and is never taken back, so nobody who has the bytes misses a stripe: not
 * one that is written by somebody who knows less, nor one that a write makes that had been given up on.
 */
#ifndef ARCHIPFS_RADOS_HEADER_H
#define ARCHIPFS_RADOS_HEADER_H

#include "client.h"

#define HEADER_BYTES 4096
/* Magic, version and state: what each change of the header compares first. */
#define HEADER_GUARD_BYTES 16

enum header_state { HEADER_LIVE = 1, HEADER_DELETED = 2 };

struct header {
    enum header_state state;
    uint64_t size;
};

void header_encode(const struct header *header, unsigned char bytes[HEADER_BYTES]);

/* -EUCLEAN: damaged. -EPROTONOSUPPORT: written by a later archipfs. */
int header_decode(const unsigned char bytes[HEADER_BYTES], struct header *header);

/*
 * Read it all. `*stripes` gets the bytes of stripes, to be freed, and `*count` how many there are; the last one is set.
 * They are given with -EUCLEAN too, for whoever deletes it; with other errors, `*stripes` is NULL.
 */
int header_read(const struct ra_call *call, const char *key, struct header *header, unsigned char **stripes,
                uint64_t *count);

/* Whether it is there, be it half removed: 0, or -ENOENT. */
int header_stat(const struct ra_call *call, const char *key);

/* Whether it is there and not being deleted: 0, or -ENOENT. */
int header_look(const struct ra_call *call, const char *key);

/* -EEXIST. */
int header_create(struct ra_call *call, const char *key);

/* Replace what stands before the bytes of stripes. -ENOENT: deleted. */
int header_replace(struct ra_call *call, const char *key, const struct header *header);

struct stripe_range {
    uint64_t first;
    uint64_t last;
};

/* Ranges that are set at once are no longer than this. */
#define HEADER_RANGE_MAX 16

/* Set the bytes of some stripes. -ENOENT: deleted. */
int header_set(struct ra_call *call, const char *key, const struct stripe_range *ranges, size_t count);

#endif
