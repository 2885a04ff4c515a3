/*
 * See sealed.h.
 *
 * Of packs that lie far away, what a sequential reader will come to is fetched ahead. His reads make a *stream*: what
 * follows is one that begins about where the last one ended, since several requests at a time arrive in any order. Each
 * read that finds room ahead has more fetched, up to the end of a region, so that several of them find out at once
 * where the next regions lie; when all that may be ahead is, twice as much may.
 */
#include "sealed.h"
#include "table.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define STREAMS 4u
#define WINDOW_BYTES_MIN ((uint64_t)256 << 10)
#define WINDOW_BYTES_MAX ((uint64_t)16 << 20)
/* So many requests of one reader may be under way at once. */
#define STREAM_DEPTH 4u

struct stream {
    uint64_t next;   /* where the reader has come to */
    uint64_t ahead;  /* as far as it was fetched */
    uint64_t window; /* bytes to be ahead; 0: it has not gone on yet */
    uint64_t last;   /* which read was its last */
};

struct ae_sealed {
    uint8_t id[16];
    struct ae_table *table;
    struct ae_resolver resolver;
    atomic_bool far; /* a part of it that was read lies in a pack that lies far away */
    pthread_mutex_t streams_lock;
    uint64_t reads;
    struct stream streams[STREAMS];
};

int ae_sealed_open(const uint8_t id[16], struct ae_table *table, struct ae_resolver resolver,
                   struct ae_sealed **opened) {
    struct ae_sealed *sealed = calloc(1, sizeof *sealed);
    if (sealed == NULL || pthread_mutex_init(&sealed->streams_lock, NULL) != 0) {
        free(sealed);
        resolver.close(resolver.ctx);
        return -ENOMEM;
    }
    sealed->table = table;
    sealed->resolver = resolver;
    memcpy(sealed->id, id, sizeof sealed->id);
    ae_table_retain(table);
    *opened = sealed;
    return 0;
}

void ae_sealed_close(struct ae_sealed *sealed) {
    sealed->resolver.close(sealed->resolver.ctx);
    ae_table_release(sealed->table);
    pthread_mutex_destroy(&sealed->streams_lock);
    free(sealed);
}

bool ae_sealed_is_far(const struct ae_sealed *sealed) { return atomic_load(&sealed->far); }

/* Regions */

/* What means something else to whoever reads, seeks, copies or flushes a volume, and a pack that is not there. */
static int as_failure(int error) {
    switch (error) {
    case -EAGAIN:
    case -ENOENT:
    case -ENXIO:
    case -EOPNOTSUPP:
    case -ESTALE:
    case -ETIMEDOUT:
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

/* Fetching ahead */

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

static void region_will_need(const struct ae_region *region, uint64_t offset, uint64_t end) {
    while (offset < end) {
        struct ae_place place;
        ae_region_place(region, offset, end, &place);
        if (place.pack != NULL && ae_pack_is_far(place.pack))
            ae_pack_will_need(place.pack, place.length, place.offset);
        offset += place.length;
    }
}

/* What cannot be resolved fails when it is read. */
static void fetch_ahead(const struct ae_sealed *sealed, uint64_t offset, uint64_t end) {
    struct ae_region *region;
    while (offset < end && region_take(sealed, offset / AE_REGION_BYTES, &region) == 0) {
        uint64_t part_end = smaller(region->end_region * AE_REGION_BYTES, end);
        region_will_need(region, offset, part_end);
        ae_region_release(region);
        offset = part_end;
    }
}

/* The stream that the read goes on, or one that begins with it in place of the one that is quiet for longest. */
static struct stream *stream_of(struct ae_sealed *sealed, uint64_t offset, uint64_t end) {
    uint64_t slack = STREAM_DEPTH * (end - offset);
    struct stream *oldest = &sealed->streams[0];
    for (size_t i = 0; i < STREAMS; i++) {
        struct stream *stream = &sealed->streams[i];
        if (stream->last > 0 && offset <= stream->next + slack && stream->next <= offset + slack)
            return stream;
        if (stream->last < oldest->last)
            oldest = stream;
    }
    *oldest = (struct stream){.next = end, .ahead = end};
    return oldest;
}

/* Note a read. Whether something is to be fetched ahead of it: with `takes` the caller does so, [from, until). */
static bool stream_note(struct ae_sealed *sealed, uint64_t offset, uint64_t end, bool takes, uint64_t *from,
                        uint64_t *until) {
    pthread_mutex_lock(&sealed->streams_lock);
    struct stream *stream = stream_of(sealed, offset, end);
    stream->last = ++sealed->reads;
    if (end > stream->next) {
        stream->next = end;
        if (stream->window == 0)
            stream->window = WINDOW_BYTES_MIN;
    }
    uint64_t room = smaller(stream->window / 2, AE_REGION_BYTES);
    bool wanted = stream->window > 0 && stream->ahead + room <= stream->next + stream->window;
    if (wanted && takes) {
        *from = larger(stream->ahead, stream->next);
        uint64_t border = (*from / AE_REGION_BYTES + 1) * AE_REGION_BYTES;
        uint64_t wished = smaller(stream->next + stream->window, AE_SIZE_MAX);
        *until = stream->ahead = smaller(wished, border);
        if (*until == wished)
            stream->window = smaller(2 * stream->window, WINDOW_BYTES_MAX);
    }
    pthread_mutex_unlock(&sealed->streams_lock);
    return wanted;
}

/* -EAGAIN: not without waiting. */
static int look_ahead(struct ae_sealed *sealed, uint64_t offset, uint64_t end, bool nowait) {
    uint64_t from, until;
    if (!atomic_load(&sealed->far) || !stream_note(sealed, offset, end, !nowait, &from, &until))
        return 0;
    if (nowait)
        return -EAGAIN;
    fetch_ahead(sealed, from, until);
    return 0;
}

/* Reading */

/* `*moved`: a pack could not be read, and may have been replaced by another. */
static int region_read(struct ae_sealed *sealed, const struct ae_region *region, char *to, uint64_t offset,
                       uint64_t end, bool nowait, bool *moved) {
    bool far = false;
    while (offset < end) {
        struct ae_place place;
        ae_region_place(region, offset, end, &place);
        if (!far && place.pack != NULL && ae_pack_is_far(place.pack)) {
            far = true;
            if (!atomic_load_explicit(&sealed->far, memory_order_relaxed))
                atomic_store(&sealed->far, true);
            /* What lies elsewhere comes meanwhile. */
            if (!nowait)
                region_will_need(region, offset + place.length, end);
        }
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

static int read_again(struct ae_sealed *sealed, char *to, uint64_t offset, uint64_t end) {
    struct ae_region *region;
    int result = region_renew(sealed, offset / AE_REGION_BYTES, &region);
    if (result < 0)
        return result;
    bool moved;
    result = region_read(sealed, region, to, offset, end, false, &moved);
    ae_region_release(region);
    return as_failure(result);
}

int ae_sealed_read(struct ae_sealed *sealed, void *buffer, size_t length, uint64_t offset, bool nowait) {
    char *to = buffer;
    uint64_t end = offset + length;
    int looked = look_ahead(sealed, offset, end, nowait);
    if (looked < 0)
        return looked;
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
        result = region_read(sealed, region, to, offset, part_end, nowait, &moved);
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
