/*
 * One pack's file in the pack cache: the pack's bytes at their own offsets, as far as they were ever fetched, and a
 * checksum of each block that is there. docs/format.md has the layout.
 *
 * A block that is there does not change any more. What a process before us left is believed block by block, when it is
 * first looked at: nothing here is ever flushed.
 */
#ifndef ARCHIPFS_ENGINE_CACHE_FILE_H
#define ARCHIPFS_ENGINE_CACHE_FILE_H

#include "engine.h"

#include <stdatomic.h>

#define AE_BLOCK_BYTES 65536u

struct ae_cache_file {
    atomic_uint references;
    int fd;
    uint64_t size; /* of the pack */
    uint32_t blocks;
    atomic_uint blocks_there;
    _Atomic uint64_t *sums;  /* as in the file; 0: not there */
    _Atomic uint8_t *states; /* enum block_state */
};

/* Open the file, or make it anew where it is not this pack's. What it holds is only known to be there, not to be right.
 */
int ae_cache_file_open(const char *path, const uint8_t pack[32], uint64_t size, struct ae_cache_file **file);
void ae_cache_file_retain(struct ae_cache_file *file);
void ae_cache_file_release(struct ae_cache_file *file);

/* Bytes of the disk that it takes, about. */
uint64_t ae_cache_file_bytes(const struct ae_cache_file *file);
/* Whether a block is there, for all that is known. */
bool ae_cache_file_has(const struct ae_cache_file *file, uint64_t block);
/*
 * How many bytes of the range, from its start on, lie in blocks that are there and right. With `nowait` only blocks
 * count that were looked at before.
 */
size_t ae_cache_file_have(struct ae_cache_file *file, size_t length, uint64_t offset, bool nowait);
/* A range of blocks that were found to be there. An error says that they are not, after all: tell by _lose. */
int ae_cache_file_read(struct ae_cache_file *file, void *buffer, size_t length, uint64_t offset, bool nowait);
/* The blocks of the range cannot be read: they are not there any more. */
void ae_cache_file_lose(struct ae_cache_file *file, size_t length, uint64_t offset);
/*
 * Put blocks that are not there, from a block's start to another's or to the pack's end. One thread a block. The bytes
 * are aligned to a sector; where they end within one, the rest of it may be written too.
 */
int ae_cache_file_store(struct ae_cache_file *file, const void *bytes, size_t length, uint64_t offset);

#endif
