/*
 * Cuts sectors into chunks by their content. A chunk ends after a sector whose xxh3-64 has its low bits clear, before
 * a sector of zeros, at AC_CHUNK_SECTORS_MAX, and at the end of the data. Only the sector itself decides, and file
 * systems move files by whole sectors: so the same file is cut alike wherever it lies.
 */
#ifndef ARCHIPFS_CHUNKER_H
#define ARCHIPFS_CHUNKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AC_SECTOR_BYTES 4096
#define AC_CHUNK_SECTORS_MAX 128

struct ac_piece {
    uint32_t first;
    uint32_t count;
};

/*
 * Cut `sectors` sectors, at most UINT32_MAX, into pieces that hold all but the zeros; a hash whose bits in `mask` are
 * clear ends one. `pieces` has room for as many as there are sectors. Returns how many there are.
 */
size_t ac_cut(const void *data, size_t sectors, uint64_t mask, struct ac_piece *pieces);

bool ac_is_zero(const void *data, size_t bytes);

#endif
