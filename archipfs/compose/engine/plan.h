/*
 * The range planner: a range of bytes becomes pieces that start and end on sector borders wherever they can, or runs
 * that one layer serves. Every operation on a range goes through one of the two.
 */
#ifndef ARCHIPFS_ENGINE_PLAN_H
#define ARCHIPFS_ENGINE_PLAN_H

#include "layer.h"

/* A part of one sector, or a run of whole sectors. */
struct ae_piece {
    uint64_t offset;
    uint64_t length;
    bool partial;
};

/* What is left of a range. */
struct ae_range {
    uint64_t offset;
    uint64_t end;
};

/* Take the next piece off the range: at most a partial head, a body of whole sectors, a partial tail. */
bool ae_piece_next(struct ae_range *rest, struct ae_piece *piece);

/*
 * Bytes that lie in one layer's data object, or nowhere (NULL): those are zeros. A sealed layer is the source of all
 * that it is asked for, holes too.
 */
struct ae_run {
    uint64_t offset;
    uint64_t length;
    struct ae_layer *source;
};

/* The run at `offset`, up to `end` at most, of a chain: layers[0] on top, each next one the parent of the one before.
 */
int ae_run_at(struct ae_layer *const *layers, size_t count, uint64_t offset, uint64_t end, bool nowait,
              struct ae_run *run);

/* Fill the buffer from the beginning of a run that has a source. */
int ae_run_read(const struct ae_run *run, void *buffer, size_t length, bool nowait);

/* Fill the buffer from a chain, one call to a data object a run. */
int ae_chain_read(struct ae_layer *const *layers, size_t count, void *buffer, size_t length, uint64_t offset,
                  bool nowait);

static inline uint64_t ae_sector_floor(uint64_t offset) { return offset / AE_SECTOR_BYTES; }
static inline uint64_t ae_sector_ceil(uint64_t offset) { return (offset + AE_SECTOR_BYTES - 1) / AE_SECTOR_BYTES; }

#endif
