/* See region.h and engine.h. */
#include "region.h"

#include "cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Packs */

struct ae_pack {
    atomic_uint references;
    struct ae_object object;
    uint64_t size;
};

int ae_pack_open(struct ae_object object, uint64_t size, struct ae_pack **opened) {
    struct ae_pack *pack = malloc(sizeof *pack);
    if (pack == NULL) {
        object.ops->close(object.ctx);
        return -ENOMEM;
    }
    *pack = (struct ae_pack){.object = object, .size = size};
    atomic_init(&pack->references, 1);
    *opened = pack;
    return 0;
}

void ae_pack_release(struct ae_pack *pack) {
    if (atomic_fetch_sub(&pack->references, 1) != 1)
        return;
    pack->object.ops->close(pack->object.ctx);
    free(pack);
}

static bool pack_has(const struct ae_pack *pack, uint64_t offset, uint64_t length) {
    return offset <= pack->size && length <= pack->size - offset;
}

const struct ae_object *ae_pack_object(const struct ae_pack *pack, uint64_t offset, uint64_t length) {
    return pack_has(pack, offset, length) && pack->object.ops->pread_within != NULL ? &pack->object : NULL;
}

int ae_object_read_within(const struct ae_object *object, void *buffer, size_t length, uint64_t offset) {
    if (object->ops->pread_within != NULL)
        return object->ops->pread_within(object->ctx, buffer, length, offset);
    uint64_t size;
    int result = object->ops->size(object->ctx, &size);
    if (result == 0 && (offset > size || length > size - offset))
        result = -EIO;
    return result < 0 ? result : object->ops->pread(object->ctx, buffer, length, offset);
}

int ae_pack_read(struct ae_pack *pack, void *buffer, size_t length, uint64_t offset, bool nowait) {
    const struct ae_object *object = &pack->object;
    if (!pack_has(pack, offset, length))
        return -EIO;
    if (!nowait)
        return ae_object_read_within(object, buffer, length, offset);
    /* Where a truncated object could pass for zeros, nothing is read without a look at its size. */
    if (object->ops->pread_nowait == NULL || object->ops->pread_within == NULL)
        return -EAGAIN;
    return object->ops->pread_nowait(object->ctx, buffer, length, offset);
}

bool ae_pack_is_far(const struct ae_pack *pack) { return ae_object_is_cached(&pack->object); }

void ae_pack_will_need(const struct ae_pack *pack, uint64_t length, uint64_t offset) {
    if (pack_has(pack, offset, length))
        ae_cached_will_need(&pack->object, length, offset);
}

/* Regions */

static bool extents_are_right(const struct ae_extent *extents, size_t count, size_t pack_count) {
    uint32_t end = 0;
    for (size_t i = 0; i < count; i++) {
        const struct ae_extent *extent = &extents[i];
        if (extent->count == 0 || extent->first < end)
            return false;
        end = (uint32_t)extent->first + extent->count;
        if (end > AE_REGION_SECTORS || (extent->pack >= pack_count && extent->pack != AE_PACK_DAMAGED))
            return false;
        if (extent->offset > UINT64_MAX - AE_REGION_BYTES)
            return false;
    }
    return true;
}

static bool continues(const struct ae_extent *extent, const struct ae_extent *next) {
    return next->first == extent->first + extent->count && next->pack == extent->pack &&
           (next->pack == AE_PACK_DAMAGED ||
            next->offset == extent->offset + (uint64_t)extent->count * AE_SECTOR_BYTES);
}

/* Copy the extents, those that continue each other as one. Without `to` they are only counted. */
static size_t join(const struct ae_extent *extents, size_t count, struct ae_extent *to) {
    size_t joined = 0;
    struct ae_extent last = {0};
    for (size_t i = 0; i < count; i++) {
        if (joined > 0 && continues(&last, &extents[i])) {
            last.count = (uint16_t)(last.count + extents[i].count);
        } else {
            last = extents[i];
            joined++;
        }
        if (to != NULL)
            to[joined - 1] = last;
    }
    return joined;
}

int ae_region_make(uint64_t first_region, uint64_t end_region, const struct ae_extent *extents, size_t count,
                   struct ae_pack *const *packs, size_t pack_count, struct ae_region **made) {
    /* A map may have room for more regions than a volume can have. */
    if (end_region > AE_REGIONS_MAX)
        end_region = AE_REGIONS_MAX;
    if (first_region >= end_region || count > AE_REGION_SECTORS || pack_count > AE_REGION_SECTORS ||
        (count > 0 && end_region != first_region + 1) || !extents_are_right(extents, count, pack_count))
        return -EINVAL;
    size_t joined = join(extents, count, NULL);
    size_t bytes = sizeof(struct ae_region) + joined * sizeof extents[0] + pack_count * sizeof packs[0];
    struct ae_region *region = calloc(1, bytes);
    if (region == NULL)
        return -ENOMEM;
    atomic_init(&region->references, 1);
    region->first_region = first_region;
    region->end_region = end_region;
    region->bytes = bytes;
    region->count = join(extents, count, region->extents);
    region->packs = (struct ae_pack **)(void *)&region->extents[joined];
    region->pack_count = pack_count;
    for (size_t i = 0; i < pack_count; i++) {
        atomic_fetch_add(&packs[i]->references, 1);
        region->packs[i] = packs[i];
    }
    *made = region;
    return 0;
}

void ae_region_retain(struct ae_region *region) { atomic_fetch_add(&region->references, 1); }

void ae_region_release(struct ae_region *region) {
    if (atomic_fetch_sub(&region->references, 1) != 1)
        return;
    for (size_t i = 0; i < region->pack_count; i++)
        ae_pack_release(region->packs[i]);
    free(region);
}

/* The first extent that ends behind `sector`, the number of extents if none does. */
static size_t extent_at(const struct ae_region *region, uint32_t sector) {
    size_t low = 0, high = region->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if ((uint32_t)region->extents[middle].first + region->extents[middle].count <= sector)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void ae_region_place(const struct ae_region *region, uint64_t offset, uint64_t end, struct ae_place *place) {
    uint64_t region_end = region->end_region * AE_REGION_BYTES;
    if (end > region_end)
        end = region_end;
    *place = (struct ae_place){.length = end - offset};
    if (region->count == 0)
        return;
    uint64_t start = region->first_region * AE_REGION_BYTES;
    size_t at = extent_at(region, (uint32_t)((offset - start) / AE_SECTOR_BYTES));
    if (at == region->count)
        return;
    const struct ae_extent *extent = &region->extents[at];
    uint64_t extent_start = start + (uint64_t)extent->first * AE_SECTOR_BYTES;
    uint64_t extent_end = extent_start + (uint64_t)extent->count * AE_SECTOR_BYTES;
    place->data = extent_start <= offset;
    uint64_t border = place->data ? extent_end : extent_start;
    if (border < end)
        place->length = border - offset;
    if (place->data && extent->pack != AE_PACK_DAMAGED) {
        place->pack = region->packs[extent->pack];
        place->offset = extent->offset + (offset - extent_start);
    }
}
