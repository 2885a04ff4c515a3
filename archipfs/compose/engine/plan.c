/* See plan.h. */
#include "plan.h"

#include <errno.h>
#include <string.h>

bool ae_piece_next(struct ae_range *rest, struct ae_piece *piece) {
    if (rest->offset >= rest->end)
        return false;
    uint64_t end = ae_sector_floor(rest->end) * AE_SECTOR_BYTES;
    piece->partial = rest->offset % AE_SECTOR_BYTES != 0 || end <= rest->offset;
    if (piece->partial) {
        uint64_t border = (ae_sector_floor(rest->offset) + 1) * AE_SECTOR_BYTES;
        end = rest->end < border ? rest->end : border;
    }
    piece->offset = rest->offset;
    piece->length = end - rest->offset;
    rest->offset = end;
    return true;
}

int ae_run_at(struct ae_layer *const *layers, size_t count, uint64_t offset, uint64_t end, bool nowait,
              struct ae_run *run) {
    *run = (struct ae_run){.offset = offset};
    struct ae_layer *last = layers[count - 1];
    size_t unsealed = count - (last->sealed != NULL);
    size_t i = 0;
    for (; i < unsealed; i++) {
        bool set;
        uint64_t until;
        int result = ae_layer_run(layers[i], ae_sector_floor(offset), ae_sector_ceil(end), nowait, &set, &until);
        if (result < 0)
            return result;
        if (until * AE_SECTOR_BYTES < end)
            end = until * AE_SECTOR_BYTES;
        if (set) {
            run->source = layers[i];
            break;
        }
        uint64_t visible = atomic_load(&layers[i]->parent_visible);
        if (visible <= offset)
            break;
        if (visible < end)
            end = visible;
    }
    if (i < count && i == unsealed)
        run->source = last;
    run->length = end - offset;
    return 0;
}

int ae_run_read(const struct ae_run *run, void *buffer, size_t length, bool nowait) {
    const struct ae_layer *layer = run->source;
    if (layer->sealed != NULL)
        return ae_sealed_read(layer->sealed, buffer, length, run->offset, nowait);
    const struct ae_object *data = &layer->data;
    if (!nowait)
        return data->ops->pread(data->ctx, buffer, length, run->offset);
    return data->ops->pread_nowait != NULL ? data->ops->pread_nowait(data->ctx, buffer, length, run->offset) : -EAGAIN;
}

int ae_chain_read(struct ae_layer *const *layers, size_t count, void *buffer, size_t length, uint64_t offset,
                  bool nowait) {
    char *to = buffer;
    uint64_t end = offset + length;
    while (offset < end) {
        struct ae_run run;
        int result = ae_run_at(layers, count, offset, end, nowait, &run);
        if (result < 0)
            return result;
        if (run.source == NULL)
            memset(to, 0, run.length);
        else
            result = ae_run_read(&run, to, run.length, nowait);
        if (result < 0)
            return result;
        to += run.length;
        offset += run.length;
    }
    return 0;
}
