/*
 * Reads and writes that go on while no thread waits for them: a call goes through the gate on one thread, and leaves it
 * on another. That is for calls that one transfer of one data object carries out; ae_read and ae_write (io.c) do the
 * others, in the same steps:
 *
 *   read:  gate, one run over the layers, the data object
 *   write: gate, the range if its bits are not set, the data object, bitmap bits
 */
#include "volume.h"

#include <errno.h>
#include <stdlib.h>

static void take_note(struct ae_begun *begun, struct ae_volume *volume, struct ae_stack *stack, struct ae_layer *layer,
                      size_t length, uint64_t offset) {
    begun->volume = volume;
    begun->stack = stack;
    begun->layer = layer;
    begun->held = NULL;
    begun->length = length;
    begun->offset = offset;
}

/* Reading */

/* The layer whose data object has all of the range; NULL: none does. */
static struct ae_layer *layer_with(const struct ae_stack *stack, uint64_t offset, uint64_t end) {
    struct ae_run run;
    if (ae_run_at(stack->layers, stack->count, offset, end, true, &run) < 0 || run.length < end - offset)
        return NULL;
    struct ae_layer *layer = run.source;
    return layer != NULL && layer->sealed == NULL && layer->data.ops->pread_begin != NULL ? layer : NULL;
}

int ae_read_begin(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset, struct ae_begun *begun) {
    struct ae_stack *stack;
    if (length == 0 || ae_call_begin(volume, AE_CALL_READ_NOWAIT, &stack) < 0)
        return -EAGAIN;
    int result = -EAGAIN;
    uint64_t size = atomic_load(&volume->size);
    struct ae_layer *layer = NULL;
    if (offset < size && length <= size - offset)
        layer = layer_with(stack, offset, offset + length);
    if (layer != NULL) {
        take_note(begun, volume, stack, layer, length, offset);
        begun->writes = false;
        result = layer->data.ops->pread_begin(layer->data.ctx, buffer, length, offset, &begun->transfer);
    }
    if (result < 0)
        ae_call_end(volume, stack, &(struct ae_outcome){0});
    return result;
}

/* Writing */

/* Hold the range, unless all of it is in the head already; only whole sectors are written for the first time so. */
static int take_range(struct ae_begun *begun) {
    struct ae_layer *head = begun->layer;
    uint64_t first = ae_sector_floor(begun->offset), end = ae_sector_ceil(begun->offset + begun->length);
    bool set;
    uint64_t until;
    int result = ae_layer_run(head, first, end, true, &set, &until);
    if (result < 0)
        return result;
    if (set && until == end)
        return ae_range_is_free(&begun->volume->ranges, first, end) ? 0 : -EAGAIN;
    bool whole = begun->offset % AE_SECTOR_BYTES == 0 && begun->length % AE_SECTOR_BYTES == 0;
    if (!whole || head->data.first_write_bytes > 0 || !ae_layer_is_prepared(head, first, end))
        return -EAGAIN;
    begun->held = malloc(sizeof *begun->held);
    if (begun->held == NULL)
        return -EAGAIN;
    if (ae_range_try_acquire(&begun->volume->ranges, begun->held, first, end))
        return 0;
    free(begun->held);
    begun->held = NULL;
    return -EAGAIN;
}

static void release_range(struct ae_begun *begun) {
    if (begun->held == NULL)
        return;
    ae_range_release(&begun->volume->ranges, begun->held);
    free(begun->held);
}

int ae_write_begin(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset,
                   struct ae_begun *begun) {
    struct ae_stack *stack;
    if (length == 0 || offset > AE_SIZE_MAX || length > AE_SIZE_MAX - offset ||
        ae_call_begin(volume, AE_CALL_WRITE_NOWAIT, &stack) < 0)
        return -EAGAIN;
    take_note(begun, volume, stack, stack->layers[0], length, offset);
    begun->writes = true;
    int result = take_range(begun);
    if (result == 0) {
        result = ae_layer_write_begin(begun->layer, buffer, length, offset, &begun->transfer);
        if (result < 0)
            release_range(begun);
    }
    if (result < 0)
        ae_call_end(volume, stack, &(struct ae_outcome){0});
    return result < 0 ? -EAGAIN : 0;
}

/* Both */

static int settle_read(struct ae_begun *begun, struct ae_outcome *outcome) {
    const struct ae_object *data = &begun->layer->data;
    int result = data->ops->settle(data->ctx, &begun->transfer);
    outcome->reads = result != -EAGAIN;
    outcome->read_bytes = result == 0 ? begun->length : 0;
    return result;
}

static int settle_write(struct ae_begun *begun, struct ae_outcome *outcome) {
    int result = ae_layer_write_settle(begun->layer, &begun->transfer);
    outcome->writes = result != -EAGAIN;
    if (result == 0) {
        if (begun->held != NULL)
            ae_layer_set(begun->layer, begun->held->first, begun->held->end);
        outcome->written_bytes = begun->length;
        outcome->written_end = begun->offset + begun->length;
        outcome->changed = true;
    }
    release_range(begun);
    return result;
}

ssize_t ae_settle(struct ae_begun *begun) {
    struct ae_outcome outcome = {0};
    int result = begun->writes ? settle_write(begun, &outcome) : settle_read(begun, &outcome);
    ae_call_end(begun->volume, begun->stack, &outcome);
    return result < 0 ? result : (ssize_t)begun->length;
}
