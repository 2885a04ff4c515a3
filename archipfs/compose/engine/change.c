/*
 * What a volume has changed since one of the layers of its chain: what a seal has to cut and hash.
 *
 * The chain is held and the gate is not entered, so that a look over terabytes is in nobody's way.
 */
#include "volume.h"

#include <errno.h>
#include <string.h>

/* As for a seek: a chain of many short runs is not scanned to its end for each of them. */
#define WINDOW_SECTORS ((UINT64_C(8) << 30) / AE_SECTOR_BYTES)

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* How `sector` and those after it up to `end` stand: changed in one of the layers, or shown straight from below them.
 */
static int change_run(struct ae_layer *const *layers, size_t count, uint64_t sector, uint64_t end, bool *changed,
                      uint64_t *until) {
    *changed = false;
    *until = end;
    for (size_t i = 0; i < count && !*changed; i++) {
        /* A sector of which only a part shines through is another than the one below. */
        uint64_t visible_end = ae_sector_floor(atomic_load(&layers[i]->parent_visible));
        int result = ae_layer_run(layers[i], sector, *until, false, changed, until);
        if (result < 0)
            return result;
        if (!*changed && visible_end <= sector)
            *changed = true;
        else if (!*changed)
            *until = smaller(*until, visible_end);
    }
    return 0;
}

/* The first sector at or after `sector` that stands as `changed` says; `end` if there is none before. */
static int change_seek(struct ae_layer *const *layers, size_t count, uint64_t sector, uint64_t end, bool changed,
                       uint64_t *found) {
    while (sector < end) {
        uint64_t window_end = smaller((sector / WINDOW_SECTORS + 1) * WINDOW_SECTORS, end);
        bool here;
        uint64_t until;
        int result = change_run(layers, count, sector, window_end, &here, &until);
        if (result < 0)
            return result;
        if (here == changed)
            break;
        sector = until;
    }
    *found = sector;
    return 0;
}

/* In `*from` and `*until`, sectors; equal where nothing has changed. */
static int change_since(const struct ae_stack *stack, const uint8_t base[16], uint64_t sector, uint64_t end,
                        uint64_t *from, uint64_t *until) {
    size_t above = 0;
    while (above < stack->count && memcmp(stack->layers[above]->id, base, 16) != 0)
        above++;
    if (above == stack->count)
        return -ENOENT;
    int result = change_seek(stack->layers, above, sector, end, true, from);
    return result < 0 ? result : change_seek(stack->layers, above, *from, end, false, until);
}

static int data_of(const struct ae_stack *stack, uint64_t offset, uint64_t end, uint64_t *from, uint64_t *until) {
    uint64_t data, hole;
    int result = ae_chain_seek(stack->layers, stack->count, offset, end, true, &data);
    if (result == 0)
        result = ae_chain_seek(stack->layers, stack->count, data, end, false, &hole);
    if (result < 0)
        return result;
    *from = ae_sector_floor(data);
    *until = data < end ? ae_sector_ceil(hole) : *from;
    return 0;
}

int ae_volume_next_change(struct ae_volume *volume, const uint8_t base[16], uint64_t offset, uint64_t end,
                          uint64_t *from, uint64_t *until) {
    if (offset % AE_SECTOR_BYTES != 0 || end > AE_SIZE_MAX)
        return -EINVAL;
    struct ae_stack *stack = ae_stack_hold(volume);
    int result;
    if (base != NULL)
        result = change_since(stack, base, ae_sector_floor(offset), ae_sector_ceil(end), from, until);
    else
        result = data_of(stack, offset, end, from, until);
    ae_stack_unhold(volume, stack);
    if (result < 0)
        return result;
    if (*from == *until)
        return -ENXIO;
    *from *= AE_SECTOR_BYTES;
    *until *= AE_SECTOR_BYTES;
    return 0;
}
