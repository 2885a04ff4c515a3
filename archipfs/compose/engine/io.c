/*
 * Read, write, discard and seek, and what copy.c makes a copy out of.
 *
 *   read:  gate, plan runs over the layers, one read of a data object a run
 *   write: gate, data object, bitmap bit
 *
 * A write whose sectors all have their bits set is one write to the head's data object. Otherwise the call holds the
 * range of sectors, and decides anew under it, since bits may have been set meanwhile: a part of a sector that is not
 * in the head yet is completed from the parent and written whole.
 *
 * A call that found every bit set still waits for those who hold a part of its range: one of them may have set a bit
 * and not have marked its page as dirty, and a flush that follows this call has to find it so.
 */
#include "volume.h"

#include <errno.h>
#include <string.h>

/* A seek looks this far at a time, so that a chain of many short runs is not scanned to its end for each of them. */
#define SEEK_WINDOW_BYTES (UINT64_C(8) << 30)

/* Reading */

static ssize_t read_call(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset, bool nowait) {
    struct ae_stack *stack;
    struct ae_outcome outcome = {.reads = 1};
    int result = ae_call_begin(volume, nowait ? AE_CALL_READ_NOWAIT : AE_CALL_READ, &stack);
    if (result < 0)
        return result;
    uint64_t size = atomic_load(&volume->size);
    uint64_t count = offset < size ? size - offset : 0;
    if (count > length)
        count = length;
    result = ae_chain_read(stack->layers, stack->count, buffer, (size_t)count, offset, nowait);
    if (result == 0)
        outcome.read_bytes = count;
    ae_call_end(volume, stack, &outcome);
    return result < 0 ? result : (ssize_t)count;
}

ssize_t ae_read(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset) {
    return read_call(volume, buffer, length, offset, false);
}

ssize_t ae_read_nowait(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset) {
    return read_call(volume, buffer, length, offset, true);
}

/* Writing */

/* Where a call writes to, and the parents that shine through. */
struct target {
    struct ae_volume *volume;
    struct ae_stack *stack;
    struct ae_layer *head;
    uint64_t first; /* sectors */
    uint64_t end;
    bool holds;
    struct ae_held_range held;
};

static int sector_is_set(struct ae_layer *head, uint64_t sector) { return ae_layer_all_set(head, sector, sector + 1); }

/* Whether the range starts or ends within a sector that is not in the head. */
static int has_clear_edge(struct ae_layer *head, uint64_t offset, uint64_t length) {
    int set = 1;
    if (offset % AE_SECTOR_BYTES != 0)
        set = sector_is_set(head, ae_sector_floor(offset));
    if (set == 1 && (offset + length) % AE_SECTOR_BYTES != 0)
        set = sector_is_set(head, ae_sector_floor(offset + length));
    return set < 0 ? set : !set;
}

/* Hold the range, unless all of it is in the head already. */
static int target_take(struct target *target, struct ae_volume *volume, struct ae_stack *stack, uint64_t offset,
                       uint64_t length) {
    *target = (struct target){
        .volume = volume,
        .stack = stack,
        .head = stack->layers[0],
        .first = ae_sector_floor(offset),
        .end = ae_sector_ceil(offset + length),
    };
    int all_set = ae_layer_all_set(target->head, target->first, target->end);
    if (all_set < 0)
        return all_set;
    if (all_set) {
        ae_range_await(&volume->ranges, target->first, target->end);
        return 0;
    }
    int clear_edge = has_clear_edge(target->head, offset, length);
    if (clear_edge < 0)
        return clear_edge;
    if (clear_edge)
        ae_call_await_predecessor(volume, stack);
    ae_range_acquire(&volume->ranges, &target->held, target->first, target->end);
    target->holds = true;
    return 0;
}

static void target_release(struct target *target) {
    if (target->holds)
        ae_range_release(&target->volume->ranges, &target->held);
}

/* Write a part of a sector that is not in the head: the rest comes from the parent. NULL for zeros. */
static int fill_sector(const struct target *target, const struct ae_piece *piece, const char *from) {
    char sector[AE_SECTOR_BYTES];
    uint64_t start = ae_sector_floor(piece->offset) * AE_SECTOR_BYTES;
    int result = ae_chain_read(target->stack->layers, target->stack->count, sector, sizeof sector, start, false);
    if (result < 0)
        return result;
    if (from != NULL)
        memcpy(sector + (piece->offset - start), from, piece->length);
    else
        memset(sector + (piece->offset - start), 0, piece->length);
    return ae_layer_write(target->head, sector, sizeof sector, start);
}

static int write_pieces(const struct target *target, const char *buffer, size_t length, uint64_t offset,
                        uint64_t *fills) {
    if (!target->holds)
        return ae_layer_write(target->head, buffer, length, offset);
    int result = ae_layer_prepare(target->head, target->first, target->end);
    struct ae_range rest = {.offset = offset, .end = offset + length};
    struct ae_piece piece;
    while (result == 0 && ae_piece_next(&rest, &piece)) {
        const char *from = buffer + (piece.offset - offset);
        int set = piece.partial ? sector_is_set(target->head, ae_sector_floor(piece.offset)) : 1;
        if (set < 0)
            return set;
        if (set) {
            result = ae_layer_write_first(target->head, from, piece.length, piece.offset);
        } else {
            result = fill_sector(target, &piece, from);
            *fills += 1;
        }
    }
    if (result == 0)
        ae_layer_set(target->head, target->first, target->end);
    return result;
}

ssize_t ae_write(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset) {
    struct ae_stack *stack;
    struct ae_outcome outcome = {.writes = 1};
    int result = ae_call_begin(volume, AE_CALL_WRITE, &stack);
    if (result < 0)
        return result;
    if (offset > AE_SIZE_MAX || length > AE_SIZE_MAX - offset) {
        result = -EFBIG;
    } else if (length > 0) {
        struct target target;
        result = target_take(&target, volume, stack, offset, length);
        if (result == 0) {
            result = write_pieces(&target, buffer, length, offset, &outcome.fills);
            target_release(&target);
        }
    }
    if (result == 0 && length > 0) {
        outcome.written_bytes = length;
        outcome.written_end = offset + length;
        outcome.changed = true;
    }
    ae_call_end(volume, stack, &outcome);
    return result < 0 ? result : (ssize_t)length;
}

int ae_write_from(struct ae_volume *volume, uint64_t offset, const struct ae_object *source, uint64_t from,
                  size_t length) {
    struct ae_stack *stack;
    struct ae_outcome outcome = {0};
    int result = ae_call_begin(volume, AE_CALL_WRITE, &stack);
    if (result < 0)
        return result;
    if (offset > AE_SIZE_MAX || length > AE_SIZE_MAX - offset) {
        result = -EFBIG;
    } else {
        struct target target;
        result = target_take(&target, volume, stack, offset, length);
        if (result == 0) {
            if (target.holds)
                result = ae_layer_prepare(target.head, target.first, target.end);
            if (result == 0)
                result = ae_layer_copy(target.head, offset, source, from, length);
            if (result == 0 && target.holds)
                ae_layer_set(target.head, target.first, target.end);
            target_release(&target);
        }
    }
    if (result == 0)
        outcome =
            (struct ae_outcome){.writes = 1, .written_bytes = length, .written_end = offset + length, .changed = true};
    ae_call_end(volume, stack, &outcome);
    return result;
}

/* Discarding */

/* How far something shines through the head's clear bits. */
static uint64_t shines_until(const struct target *target) {
    return target->stack->count > 1 ? atomic_load(&target->head->parent_visible) : 0;
}

static int zero_part(const struct target *target, const struct ae_piece *piece, uint64_t *fills) {
    static const char zeros[AE_SECTOR_BYTES];
    uint64_t sector = ae_sector_floor(piece->offset);
    int set = sector_is_set(target->head, sector);
    if (set < 0)
        return set;
    if (set)
        return ae_layer_write(target->head, zeros, piece->length, piece->offset);
    if (piece->offset >= shines_until(target))
        return 0;
    int result = ae_layer_prepare(target->head, sector, sector + 1);
    if (result == 0)
        result = fill_sector(target, piece, NULL);
    if (result < 0)
        return result;
    *fills += 1;
    ae_layer_set(target->head, sector, sector + 1);
    return 0;
}

/* Whole sectors, a bitmap page of them at a time. Where nothing shines through, pages without bits are passed over. */
static int zero_body(const struct target *target, const struct ae_piece *piece) {
    uint64_t shines_end = ae_sector_ceil(shines_until(target));
    uint64_t sector = ae_sector_floor(piece->offset);
    uint64_t end = ae_sector_floor(piece->offset + piece->length);
    while (sector < end) {
        int result;
        if (sector >= shines_end) {
            result = ae_layer_skip_clear(target->head, sector, end, &sector);
            if (result < 0 || sector == end)
                return result;
        }
        uint64_t border = (sector / AE_PAGE_SECTORS + 1) * AE_PAGE_SECTORS;
        if (border > end)
            border = end;
        bool shines = sector < shines_end;
        result = shines ? ae_layer_prepare(target->head, sector, border) : 0;
        if (result == 0)
            result = ae_layer_punch(target->head, sector * AE_SECTOR_BYTES, (border - sector) * AE_SECTOR_BYTES);
        if (result < 0)
            return result;
        if (shines)
            ae_layer_set(target->head, sector, border);
        sector = border;
    }
    return 0;
}

/* Up to the end of the volume; where it `grows`, beyond that too, and the end with it. */
static int zero_call(struct ae_volume *volume, uint64_t offset, uint64_t length, bool grows) {
    struct ae_stack *stack;
    struct ae_outcome outcome = {.discards = 1};
    int result = ae_call_begin(volume, AE_CALL_WRITE, &stack);
    if (result < 0)
        return result;
    uint64_t limit = grows ? AE_SIZE_MAX : atomic_load(&volume->size);
    uint64_t count = offset < limit ? limit - offset : 0;
    if (grows && count < length)
        result = -EFBIG;
    if (count > length)
        count = length;
    if (result == 0 && count > 0) {
        struct target target;
        result = target_take(&target, volume, stack, offset, count);
        if (result == 0) {
            struct ae_range rest = {.offset = offset, .end = offset + count};
            struct ae_piece piece;
            while (result == 0 && ae_piece_next(&rest, &piece))
                result = piece.partial ? zero_part(&target, &piece, &outcome.fills) : zero_body(&target, &piece);
            target_release(&target);
        }
    }
    if (result == 0) {
        outcome.discarded_bytes = count;
        outcome.changed = count > 0;
        outcome.written_end = grows ? offset + count : 0;
    }
    ae_call_end(volume, stack, &outcome);
    return result;
}

int ae_discard(struct ae_volume *volume, uint64_t offset, uint64_t length) {
    return zero_call(volume, offset, length, false);
}

int ae_clear(struct ae_volume *volume, uint64_t offset, uint64_t length) {
    return zero_call(volume, offset, length, true);
}

int ae_write_zeros(struct ae_volume *volume, uint64_t offset, uint64_t length) {
    return ae_discard(volume, offset, length);
}

int ae_grow(struct ae_volume *volume, uint64_t size) {
    struct ae_stack *stack;
    int result = ae_call_begin(volume, AE_CALL_WRITE, &stack);
    if (result < 0)
        return result;
    struct ae_outcome outcome = {0};
    if (size > AE_SIZE_MAX) {
        result = -EFBIG;
    } else if (size > atomic_load(&volume->size)) {
        outcome.written_end = size;
        outcome.changed = true;
    }
    ae_call_end(volume, stack, &outcome);
    return result;
}

/* Seeking */

/* The first data (or hole) in a run; its end if there is none. */
static int seek_in_run(const struct ae_run *run, bool data, uint64_t *found) {
    *found = run->offset + run->length;
    if (run->source == NULL) {
        if (!data)
            *found = run->offset;
        return 0;
    }
    if (run->source->sealed != NULL)
        return ae_sealed_seek(run->source->sealed, run->offset, *found, data, found);
    const struct ae_object *object = &run->source->data;
    uint64_t at;
    int result = data ? object->ops->next_data(object->ctx, run->offset, &at)
                      : object->ops->next_hole(object->ctx, run->offset, &at);
    if (result == -ENXIO) {
        /* The object ends before: a hole. */
        if (!data)
            *found = run->offset;
        return 0;
    }
    if (result == 0 && at < *found)
        *found = at;
    return result;
}

int ae_chain_seek(struct ae_layer *const *layers, size_t count, uint64_t offset, uint64_t end, bool data,
                  uint64_t *found) {
    bool hit = false;
    while (!hit && offset < end) {
        /* Windows end on a bitmap page's border, so that pages in a hole are passed over and not read. */
        uint64_t window_end = (offset / SEEK_WINDOW_BYTES + 1) * SEEK_WINDOW_BYTES;
        if (window_end > end)
            window_end = end;
        struct ae_run run;
        int result = ae_run_at(layers, count, offset, window_end, false, &run);
        if (result == 0)
            result = seek_in_run(&run, data, &offset);
        if (result < 0)
            return result;
        hit = offset < run.offset + run.length;
    }
    *found = offset;
    return 0;
}

static int64_t seek_call(struct ae_volume *volume, uint64_t offset, bool data) {
    struct ae_stack *stack;
    int result = ae_call_begin(volume, AE_CALL_READ, &stack);
    if (result < 0)
        return result;
    uint64_t size = atomic_load(&volume->size);
    if (offset >= size)
        result = -ENXIO;
    if (result == 0)
        result = ae_chain_seek(stack->layers, stack->count, offset, size, data, &offset);
    if (result == 0 && data && offset >= size)
        result = -ENXIO;
    ae_call_end(volume, stack, &(struct ae_outcome){0});
    return result < 0 ? result : (int64_t)offset;
}

int64_t ae_seek_data(struct ae_volume *volume, uint64_t offset) { return seek_call(volume, offset, true); }

int64_t ae_seek_hole(struct ae_volume *volume, uint64_t offset) { return seek_call(volume, offset, false); }

/* For others */

const struct ae_calls *ae_calls(void) {
    static const struct ae_calls calls = {
        .read = ae_read,
        .read_nowait = ae_read_nowait,
        .write = ae_write,
        .read_begin = ae_read_begin,
        .write_begin = ae_write_begin,
        .settle = ae_settle,
        .discard = ae_discard,
        .write_zeros = ae_write_zeros,
        .grow = ae_grow,
        .seek_data = ae_seek_data,
        .seek_hole = ae_seek_hole,
        .sync = ae_sync,
        .waits = ae_volume_waits,
    };
    return &calls;
}
