/*
 * The bytes of a sealed layer: which region, where it lies, and one read of a pack for each run of sectors that lie
 * side by side in it.
 */
#ifndef ARCHIPFS_ENGINE_SEALED_H
#define ARCHIPFS_ENGINE_SEALED_H

#include "region.h"

struct ae_sealed;

/* Takes over the resolver, and closes it when it fails. */
int ae_sealed_open(const uint8_t id[16], struct ae_table *table, struct ae_resolver resolver,
                   struct ae_sealed **sealed);
void ae_sealed_close(struct ae_sealed *sealed);

/* Whether a part of it that was read lies in a pack that lies far away. */
bool ae_sealed_is_far(const struct ae_sealed *sealed);
/* With `nowait` -EAGAIN where it would resolve a region, wait for a disk, or find that a pack has moved. */
int ae_sealed_read(struct ae_sealed *sealed, void *buffer, size_t length, uint64_t offset, bool nowait);
/* The first data (hole) at or after `offset`; `end` if there is none before. */
int ae_sealed_seek(const struct ae_sealed *sealed, uint64_t offset, uint64_t end, bool data, uint64_t *found);
/* Where `offset` lies, up to `end` at most. The caller releases the region, which holds the pack. */
int ae_sealed_place(const struct ae_sealed *sealed, uint64_t offset, uint64_t end, struct ae_region **region,
                    struct ae_place *place);
/* How many sectors are no hole; goes over all regions. */
int64_t ae_sealed_count(const struct ae_sealed *sealed);

#endif
