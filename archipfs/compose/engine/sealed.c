/* See sealed.h. */
#include "sealed.h"
#include "table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct ae_sealed {
    uint8_t id[16];
    struct ae_table *table;
    struct ae_resolver resolver;
};

int ae_sealed_open(const uint8_t id[16], struct ae_table *table, struct ae_resolver resolver,
                   struct ae_sealed **opened) {
    struct ae_sealed *sealed = malloc(sizeof *sealed);
    if (sealed == NULL) {
        resolver.close(resolver.ctx);
        return -ENOMEM;
    }
    *sealed = (struct ae_sealed){.table = table, .resolver = resolver};
    memcpy(sealed->id, id, sizeof sealed->id);
    ae_table_retain(table);
    *opened = sealed;
    return 0;
}

void ae_sealed_close(struct ae_sealed *sealed) {
    sealed->resolver.close(sealed->resolver.ctx);
    ae_table_release(sealed->table);
    free(sealed);
}

/* Regions */

/* What means something else to whoever reads, seeks, copies or flushes a volume, and a pack that is not there. */
static int as_failure(int error) {
    switch (error) {
    case -EAGAIN:
    case -ENOENT:
    case -ENXIO:
    case -EOPNOTSUPP:
    case -ESTALE:
        return -EIO;
    default:
        return error;
    }
}

static int resolve(const struct ae_sealed *sealed, uint64_t number, struct ae_region **region) {
    *region = NULL;
    int result = sealed->resolver.resolve(sealed->resolver.ctx, number, region);
    if (result < 0)
        return as_failure(result);
    if (*region == NULL)
        return -EIO;
    if ((*region)->first_region <= number && number < (*region)->end_region)
        return 0;
    ae_region_release(*region);
    return -EIO;
}

static int region_take(const struct ae_sealed *sealed, uint64_t number, struct ae_region **region) {
    struct ae_ticket ticket;
    int result = ae_table_take(sealed->table, sealed->id, number, &ticket, region);
    if (result <= 0)
        return result;
    result = resolve(sealed, number, region);
    ae_table_settle(sealed->table, &ticket, result, *region);
    return result;
}

static int region_renew(const struct ae_sealed *sealed, uint64_t number, struct ae_region **region) {
    struct ae_ticket ticket;
    ae_table_renew_begin(sealed->table, sealed->id, number, &ticket);
    int result = resolve(sealed, number, region);
    if (result == 0)
        ae_table_renew_end(sealed->table, &ticket, *region);
    return result;
}

/* Reading */

/* `*moved`: a pack could not be read, and may have been replaced by another. */
static int region_read(const struct ae_region *region, char *to, uint64_t offset, uint64_t end, bool nowait,
                       bool *moved) {
    while (offset < end) {
        struct ae_place place;
        ae_region_place(region, offset, end, &place);
        if (!place.data) {
            memset(to, 0, place.length);
        } else if (place.pack == NULL) {
            return -EIO;
        } else {
            int result = ae_pack_read(place.pack, to, place.length, place.offset, nowait);
            *moved = result == -ENOENT || result == -ESTALE || result == -EIO;
            if (result < 0)
                return result;
        }
        to += place.length;
        offset += place.length;
    }
    return 0;
}

static int read_again(const struct ae_sealed *sealed, char *to, uint64_t offset, uint64_t end) {
    struct ae_region *region;
    int result = region_renew(sealed, offset / AE_REGION_BYTES, &region);
    if (result < 0)
        return result;
    bool moved;
    result = region_read(region, to, offset, end, false, &moved);
    ae_region_release(region);
    return as_failure(result);
}

int ae_sealed_read(const struct ae_sealed *sealed, void *buffer, size_t length, uint64_t offset, bool nowait) {
    char *to = buffer;
    uint64_t end = offset + length;
    while (offset < end) {
        uint64_t number = offset / AE_REGION_BYTES;
        struct ae_region *region;
        int result = 0;
        if (!nowait)
            result = region_take(sealed, number, &region);
        else if ((region = ae_table_find(sealed->table, sealed->id, number)) == NULL)
            result = -EAGAIN;
        if (result < 0)
            return result;
        uint64_t part_end = region->end_region * AE_REGION_BYTES;
        if (part_end > end)
            part_end = end;
        bool moved = false;
        result = region_read(region, to, offset, part_end, nowait, &moved);
        ae_region_release(region);
        if (moved)
            result = nowait ? -EAGAIN : read_again(sealed, to, offset, part_end);
        else if (!nowait)
            result = as_failure(result);
        if (result < 0)
            return result;
        to += part_end - offset;
        offset = part_end;
    }
    return 0;
}

/* Looking */

int ae_sealed_place(const struct ae_sealed *sealed, uint64_t offset, uint64_t end, struct ae_region **region,
                    struct ae_place *place) {
    int result = region_take(sealed, offset / AE_REGION_BYTES, region);
    if (result == 0)
        ae_region_place(*region, offset, end, place);
    return result;
}

int ae_sealed_seek(const struct ae_sealed *sealed, uint64_t offset, uint64_t end, bool data, uint64_t *found) {
    bool hit = false;
    while (!hit && offset < end) {
        struct ae_region *region;
        int result = region_take(sealed, offset / AE_REGION_BYTES, &region);
        if (result < 0)
            return result;
        uint64_t region_end = region->end_region * AE_REGION_BYTES;
        while (!hit && offset < end && offset < region_end) {
            struct ae_place place;
            ae_region_place(region, offset, end, &place);
            hit = place.data == data;
            if (!hit)
                offset += place.length;
        }
        ae_region_release(region);
    }
    *found = offset;
    return 0;
}

/* What the table does not have is resolved past it: this goes over everything once, and would drive out what is read.
 */
int64_t ae_sealed_count(const struct ae_sealed *sealed) {
    int64_t count = 0;
    uint64_t number = 0;
    while (number < AE_REGIONS_MAX) {
        struct ae_region *region = ae_table_find(sealed->table, sealed->id, number);
        int result = region == NULL ? resolve(sealed, number, &region) : 0;
        if (result < 0)
            return result;
        for (size_t i = 0; i < region->count; i++)
            count += region->extents[i].count;
        number = region->end_region;
        ae_region_release(region);
    }
    return count;
}
