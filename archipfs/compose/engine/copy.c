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

/* Bytes that are all data, or all zeros. */
struct step {
    struct ae_run run;              /* no source: zeros */
    const struct ae_object *object; /* has them, from `offset` on; NULL: only a read tells what is wrong with them */
    uint64_t offset;
    struct ae_region *region; /* keeps the pack that is the object; NULL: it is the source's data object */
};

static int plan_sealed(struct step *step) {
    struct ae_run *run = &step->run;
    struct ae_place place;
    int result = ae_sealed_place(run->source->sealed, run->offset, run->offset + run->length, &step->region, &place);
    if (result < 0)
        return result;
    run->length = place.length;
    if (!place.data)
        run->source = NULL;
    if (place.pack != NULL)
        step->object = ae_pack_object(place.pack, place.offset, place.length);
    step->offset = place.offset;
    return 0;
}

static int plan_data(struct step *step) {
    struct ae_run *run = &step->run;
    const struct ae_object *object = step->object = &run->source->data;
    step->offset = run->offset;
    uint64_t found;
    int result = object->ops->next_data(object->ctx, run->offset, &found);
    if (result == -ENXIO || (result == 0 && found > run->offset)) {
        run->source = NULL;
        if (result == 0)
            run->length = smaller(run->length, found - run->offset);
        return 0;
    }
    if (result == 0)
        result = object->ops->next_hole(object->ctx, run->offset, &found);
    /* The object became shorter between the two calls: the read will find zeros. */
    if (result == -ENXIO)
        return 0;
    if (result == 0 && found > run->offset)
        run->length = smaller(run->length, found - run->offset);
    return result;
}

/* The step at `from`, up to `end` at most. */
static int plan_step(const struct copy *copy, uint64_t from, uint64_t end, struct step *step) {
    *step = (struct step){0};
    int result = ae_run_at(copy->source->layers, copy->source->count, from, end, false, &step->run);
    if (result < 0 || step->run.source == NULL)
        return result;
    return step->run.source->sealed != NULL ? plan_sealed(step) : plan_data(step);
}

/* Returns how much of the range was copied, at least a byte. */
static ssize_t copy_through_buffer(struct copy *copy, const struct ae_run *run, uint64_t to) {
    if (copy->buffer == NULL)
        copy->buffer = malloc(BUFFER_BYTES);
    if (copy->buffer == NULL)
        return -ENOMEM;
    size_t length = (size_t)smaller(run->length, BUFFER_BYTES);
    int result = ae_run_read(run, copy->buffer, length, false);
    return result < 0 ? result : ae_write(copy->target, copy->buffer, length, to);
}

/* The whole sectors that the run begins with by the objects themselves; its edges through the buffer. */
static ssize_t copy_data(struct copy *copy, struct step *step, uint64_t to) {
    struct ae_run *run = &step->run;
    struct ae_range rest = {.offset = run->offset, .end = run->offset + run->length};
    struct ae_piece piece;
    if (copy->by_object && step->object != NULL && ae_piece_next(&rest, &piece)) {
        run->length = piece.length;
        if (!piece.partial) {
            int result = ae_write_from(copy->target, to, step->object, step->offset, (size_t)run->length);
            if (result == 0)
                return (ssize_t)run->length;
            /* Of a pack, a read finds out whether it has moved. */
            if (result != -EOPNOTSUPP && step->region == NULL)
                return result;
            copy->by_object = false;
        }
    }
    return copy_through_buffer(copy, run, to);
}

static ssize_t copy_step(struct copy *copy, uint64_t from, uint64_t end, uint64_t to) {
    struct step step;
    ssize_t done = plan_step(copy, from, smaller(end, from + STEP_BYTES), &step);
    if (done == 0 && step.run.source != NULL) {
        done = copy_data(copy, &step, to);
    } else if (done == 0) {
        done = ae_clear(copy->target, to, step.run.length);
        if (done == 0)
            done = (ssize_t)step.run.length;
    }
    if (step.region != NULL)
        ae_region_release(step.region);
    return done;
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
