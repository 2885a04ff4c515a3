/*
 * A copy is a sequence of calls to the target, each one a step of what the source has: a hole, or data of one object.
 *
 *   copy: hold the source's stack, plan a step, then: clear the range, or object to object, or through a buffer
 *
 * Object to object goes what is whole sectors on both sides: the offsets are congruent modulo a sector. Everything
 * else, and what the objects cannot do by themselves, goes through the buffer and is an ordinary write. So all that
 * holds of writes holds of each step, and a snapshot of either volume may come between any two.
 */
#include "volume.h"

#include <errno.h>
#include <stdlib.h>

/* A step holds up who writes to its range, and a resize of the target. */
#define STEP_BYTES (UINT64_C(8) << 20)
#define BUFFER_BYTES (UINT64_C(1) << 20)

struct copy {
    struct ae_volume *target;
    const struct ae_stack *source;
    bool by_object;
    void *buffer; /* NULL until it is needed */
};

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* The step at `from`, up to `end` at most: bytes that are all data of `run->source`, or all zeros. */
static int plan_step(const struct copy *copy, uint64_t from, uint64_t end, struct ae_run *run) {
    int result = ae_run_at(copy->source->layers, copy->source->count, from, end, false, run);
    if (result < 0 || run->source == NULL)
        return result;
    const struct ae_object *object = &run->source->data;
    uint64_t found;
    result = object->ops->next_data(object->ctx, from, &found);
    if (result == -ENXIO || (result == 0 && found > from)) {
        run->source = NULL;
        if (result == 0)
            run->length = smaller(run->length, found - from);
        return 0;
    }
    if (result == 0)
        result = object->ops->next_hole(object->ctx, from, &found);
    /* The object became shorter between the two calls: the read will find zeros. */
    if (result == -ENXIO)
        return 0;
    if (result == 0 && found > from)
        run->length = smaller(run->length, found - from);
    return result;
}

/* Returns how much of the range was copied, at least a byte. */
static ssize_t copy_through_buffer(struct copy *copy, const struct ae_run *run, uint64_t to) {
    if (copy->buffer == NULL)
        copy->buffer = malloc(BUFFER_BYTES);
    if (copy->buffer == NULL)
        return -ENOMEM;
    size_t length = (size_t)smaller(run->length, BUFFER_BYTES);
    const struct ae_object *object = &run->source->data;
    int result = object->ops->pread(object->ctx, copy->buffer, length, run->offset);
    return result < 0 ? result : ae_write(copy->target, copy->buffer, length, to);
}

/* The whole sectors that the run begins with by the objects themselves; its edges through the buffer. */
static ssize_t copy_data(struct copy *copy, struct ae_run *run, uint64_t to) {
    struct ae_range rest = {.offset = run->offset, .end = run->offset + run->length};
    struct ae_piece piece;
    if (copy->by_object && ae_piece_next(&rest, &piece)) {
        run->length = piece.length;
        if (!piece.partial) {
            int result = ae_write_from(copy->target, to, &run->source->data, run->offset, (size_t)run->length);
            if (result == 0)
                return (ssize_t)run->length;
            if (result != -EOPNOTSUPP)
                return result;
            copy->by_object = false;
        }
    }
    return copy_through_buffer(copy, run, to);
}

static ssize_t copy_step(struct copy *copy, uint64_t from, uint64_t end, uint64_t to) {
    struct ae_run run;
    int result = plan_step(copy, from, smaller(end, from + STEP_BYTES), &run);
    if (result < 0)
        return result;
    if (run.source != NULL)
        return copy_data(copy, &run, to);
    result = ae_clear(copy->target, to, run.length);
    return result < 0 ? result : (ssize_t)run.length;
}

ssize_t ae_copy(struct ae_volume *target, uint64_t target_offset, struct ae_volume *source, uint64_t source_offset,
                uint64_t length) {
    uint64_t size = ae_volume_size(source);
    if (source_offset >= size)
        return 0;
    length = smaller(smaller(length, size - source_offset), AE_COPY_BYTES_MAX);
    if (target_offset > AE_SIZE_MAX || length > AE_SIZE_MAX - target_offset)
        return -EFBIG;
    struct ae_stack *stack = ae_stack_hold(source);
    struct copy copy = {
        .target = target,
        .source = stack,
        .by_object = source_offset % AE_SECTOR_BYTES == target_offset % AE_SECTOR_BYTES,
    };
    uint64_t done = 0;
    ssize_t step = 0;
    while (step >= 0 && done < length) {
        step = copy_step(&copy, source_offset + done, source_offset + length, target_offset + done);
        if (step > 0)
            done += (uint64_t)step;
    }
    free(copy.buffer);
    ae_stack_unhold(source, stack);
    return done > 0 ? (ssize_t)done : step;
}
