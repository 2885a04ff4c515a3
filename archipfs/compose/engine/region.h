/*
 * Packs, and regions of a sealed layer as they lie in packs: immutable and counted, so that a reader keeps what it
 * reads from, whatever the table does meanwhile.
 */
#ifndef ARCHIPFS_ENGINE_REGION_H
#define ARCHIPFS_ENGINE_REGION_H

#include "engine.h"

#include <stdatomic.h>

/* What the table finds a region by: `number` is of regions, or of aligned runs of empty ones (see table.c). */
struct ae_region_key {
    uint8_t layer[16];
    uint32_t level;
    uint64_t number;
};

struct ae_region {
    atomic_uint references;
    uint64_t first_region, end_region;
    size_t bytes;

    /* The table's, under the lock of a stripe of it. */
    struct ae_region *next;
    struct ae_region_key key;
    bool used; /* since the hand came by */

    struct ae_pack **packs; /* behind the extents */
    size_t pack_count;
    size_t count;
    struct ae_extent extents[];
};

void ae_region_retain(struct ae_region *region);

/* What lies at an offset of the volume: how far it is the same, and where. */
struct ae_place {
    uint64_t length;      /* bytes */
    bool data;            /* else zeros */
    struct ae_pack *pack; /* NULL: zeros, or data that is known to be damaged */
    uint64_t offset;      /* in the pack */
};

/* The place of `offset`, which the region has, up to `end` or the region's end. The region holds its pack. */
void ae_region_place(const struct ae_region *region, uint64_t offset, uint64_t end, struct ae_place *place);

/* A read of an object of which -EIO, not zeros, is what lies beyond its end. */
int ae_object_read_within(const struct ae_object *object, void *buffer, size_t length, uint64_t offset);

int ae_pack_read(struct ae_pack *pack, void *buffer, size_t length, uint64_t offset, bool nowait);
/* Whether it is read through the pack cache; if so, have a range of it fetched, without waiting. */
bool ae_pack_is_far(const struct ae_pack *pack);
void ae_pack_will_need(const struct ae_pack *pack, uint64_t length, uint64_t offset);
/*
 * The pack's object, to copy a range of it from. NULL: only a read tells what is wrong with the range, or the object
 * could be shorter than it should be and be copied with zeros.
 */
const struct ae_object *ae_pack_object(const struct ae_pack *pack, uint64_t offset, uint64_t length);

#endif
