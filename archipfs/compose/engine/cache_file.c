/* See cache_file.h. */
#include "cache_file.h"
#include "object_file.h"
#include "plan.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define VERSION 1u

enum block_state {
    BLOCK_ABSENT = 0,
    BLOCK_CLAIMED = 1, /* the table says that it is there */
    BLOCK_RIGHT = 2,   /* it was put by us, or its checksum was compared */
};

/* Behind the blocks; the checksums of the blocks follow. */
struct header {
    uint8_t magic[8]; /* "archpcch" */
    uint32_t version;
    uint32_t block_bytes;
    uint64_t size;
    uint8_t pack[32];
    uint64_t checksum; /* XXH3-64 of all before */
};

_Static_assert(sizeof(struct header) == 64, "as stored");

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t header_offset(uint64_t blocks) { return blocks * AE_BLOCK_BYTES; }

static uint64_t sum_offset(uint64_t blocks, uint64_t block) {
    return header_offset(blocks) + sizeof(struct header) + block * sizeof(uint64_t);
}

static size_t block_bytes(const struct ae_cache_file *file, uint64_t block) {
    return (size_t)smaller(AE_BLOCK_BYTES, file->size - block * AE_BLOCK_BYTES);
}

static uint64_t sum_of(const void *bytes, size_t length) {
    uint64_t sum = XXH3_64bits(bytes, length);
    return sum != 0 ? sum : 1;
}

static struct header header_make(const uint8_t pack[32], uint64_t size) {
    struct header header = {.magic = "archpcch", .version = VERSION, .block_bytes = AE_BLOCK_BYTES, .size = size};
    memcpy(header.pack, pack, sizeof header.pack);
    header.checksum = XXH3_64bits(&header, offsetof(struct header, checksum));
    return header;
}

/* Opening */

static struct ae_cache_file *file_make(uint64_t size) {
    uint64_t blocks = (size + AE_BLOCK_BYTES - 1) / AE_BLOCK_BYTES;
    struct ae_cache_file *file = calloc(1, sizeof *file);
    if (file == NULL)
        return NULL;
    *file = (struct ae_cache_file){.fd = -1, .size = size, .blocks = (uint32_t)blocks};
    atomic_init(&file->references, 1);
    file->sums = calloc(blocks, sizeof file->sums[0]);
    file->states = calloc(blocks, sizeof file->states[0]);
    if (file->sums != NULL && file->states != NULL)
        return file;
    ae_cache_file_release(file);
    return NULL;
}

/* 0: it is this pack's, and what its table says is taken over. */
static int file_adopt(struct ae_cache_file *file, const char *path, const struct header *expected) {
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -errno;
    struct header header;
    uint64_t *sums = malloc(file->blocks * sizeof sums[0]);
    int result = sums != NULL ? 0 : -ENOMEM;
    if (result == 0)
        result = ae_file_read(fd, &header, sizeof header, header_offset(file->blocks), AE_READ_WITHIN);
    if (result == 0 && memcmp(&header, expected, sizeof header) != 0)
        result = -EUCLEAN;
    if (result == 0)
        result = ae_file_read(fd, sums, file->blocks * sizeof sums[0], sum_offset(file->blocks, 0), AE_READ_WITHIN);
    for (uint64_t block = 0; result == 0 && block < file->blocks; block++) {
        atomic_store(&file->sums[block], sums[block]);
        atomic_store(&file->states[block], sums[block] != 0 ? BLOCK_CLAIMED : BLOCK_ABSENT);
        atomic_fetch_add(&file->blocks_there, sums[block] != 0);
    }
    free(sums);
    if (result == 0)
        file->fd = fd;
    else
        close(fd);
    return result;
}

/* Never over one that is there: somebody may still be reading that. */
static int file_create(struct ae_cache_file *file, const char *path, const struct header *header) {
    if (unlink(path) < 0 && errno != ENOENT)
        return -errno;
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    int result = ftruncate(fd, (off_t)sum_offset(file->blocks, file->blocks)) < 0 ? -errno : 0;
    if (result == 0)
        result = ae_file_write(fd, header, sizeof *header, header_offset(file->blocks));
    if (result == 0) {
        file->fd = fd;
    } else {
        close(fd);
        unlink(path);
    }
    return result;
}

int ae_cache_file_open(const char *path, const uint8_t pack[32], uint64_t size, struct ae_cache_file **opened) {
    struct header header = header_make(pack, size);
    struct ae_cache_file *file = file_make(size);
    if (file == NULL)
        return -ENOMEM;
    int result = file_adopt(file, path, &header);
    if (result < 0)
        result = file_create(file, path, &header);
    if (result < 0) {
        ae_cache_file_release(file);
        return result;
    }
    *opened = file;
    return 0;
}

void ae_cache_file_retain(struct ae_cache_file *file) { atomic_fetch_add(&file->references, 1); }

void ae_cache_file_release(struct ae_cache_file *file) {
    if (atomic_fetch_sub(&file->references, 1) != 1)
        return;
    if (file->fd >= 0)
        close(file->fd);
    free(file->sums);
    free(file->states);
    free(file);
}

/* Blocks */

uint64_t ae_cache_file_bytes(const struct ae_cache_file *file) {
    uint64_t table_bytes = sizeof(struct header) + file->blocks * sizeof(uint64_t);
    uint64_t page_bytes = (table_bytes + AE_SECTOR_BYTES - 1) / AE_SECTOR_BYTES * AE_SECTOR_BYTES;
    return page_bytes + (uint64_t)atomic_load(&file->blocks_there) * AE_BLOCK_BYTES;
}

bool ae_cache_file_has(const struct ae_cache_file *file, uint64_t block) {
    return atomic_load(&file->states[block]) != BLOCK_ABSENT;
}

/* It goes from being there to not being there once, whoever finds out. */
static void block_lose(struct ae_cache_file *file, uint64_t block, uint8_t state) {
    if (atomic_compare_exchange_strong(&file->states[block], &state, BLOCK_ABSENT))
        atomic_fetch_sub(&file->blocks_there, 1);
}

static bool block_is_right(struct ae_cache_file *file, uint64_t block) {
    size_t length = block_bytes(file, block);
    void *bytes = malloc(length);
    uint64_t sum = atomic_load(&file->sums[block]);
    bool right = bytes != NULL && ae_file_read(file->fd, bytes, length, block * AE_BLOCK_BYTES, AE_READ_WITHIN) == 0 &&
                 sum_of(bytes, length) == sum;
    free(bytes);
    uint8_t claimed = BLOCK_CLAIMED;
    if (right)
        atomic_compare_exchange_strong(&file->states[block], &claimed, BLOCK_RIGHT);
    else
        block_lose(file, block, BLOCK_CLAIMED);
    return right;
}

size_t ae_cache_file_have(struct ae_cache_file *file, size_t length, uint64_t offset, bool nowait) {
    uint64_t end = offset + length;
    uint64_t at = offset;
    while (at < end) {
        uint64_t block = at / AE_BLOCK_BYTES;
        uint8_t state = atomic_load(&file->states[block]);
        if (state == BLOCK_ABSENT || (state == BLOCK_CLAIMED && (nowait || !block_is_right(file, block))))
            break;
        at = smaller((block + 1) * AE_BLOCK_BYTES, end);
    }
    return (size_t)(at - offset);
}

int ae_cache_file_read(struct ae_cache_file *file, void *buffer, size_t length, uint64_t offset, bool nowait) {
    return ae_file_read(file->fd, buffer, length, offset, nowait ? AE_READ_NOWAIT : AE_READ_WITHIN);
}

void ae_cache_file_lose(struct ae_cache_file *file, size_t length, uint64_t offset) {
    for (uint64_t block = offset / AE_BLOCK_BYTES; block * AE_BLOCK_BYTES < offset + length; block++)
        block_lose(file, block, BLOCK_RIGHT);
}

/*
 * Past the page cache: in a virtual machine whose memory is new, to copy into it costs more than all the rest of a
 * fetch, and who reads it once may never come again. Where there are no such writes, through the page cache.
 */
static int blocks_write(const struct ae_cache_file *file, const void *bytes, size_t length, uint64_t offset) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", file->fd);
    int direct = open(path, O_WRONLY | O_DIRECT | O_CLOEXEC);
    if (direct >= 0) {
        int result = ae_file_write(direct, bytes, ae_sector_ceil(length) * AE_SECTOR_BYTES, offset);
        close(direct);
        if (result != -EINVAL)
            return result;
    }
    return ae_file_write(file->fd, bytes, length, offset);
}

int ae_cache_file_store(struct ae_cache_file *file, const void *bytes, size_t length, uint64_t offset) {
    uint64_t first = offset / AE_BLOCK_BYTES;
    uint64_t count = (length + AE_BLOCK_BYTES - 1) / AE_BLOCK_BYTES;
    uint64_t *sums = malloc(count * sizeof sums[0]);
    if (sums == NULL)
        return -ENOMEM;
    for (uint64_t i = 0; i < count; i++)
        sums[i] = sum_of((const char *)bytes + i * AE_BLOCK_BYTES, block_bytes(file, first + i));
    int result = blocks_write(file, bytes, length, offset);
    if (result == 0)
        result = ae_file_write(file->fd, sums, count * sizeof sums[0], sum_offset(file->blocks, first));
    for (uint64_t i = 0; result == 0 && i < count; i++) {
        atomic_store(&file->sums[first + i], sums[i]);
        if (atomic_exchange(&file->states[first + i], BLOCK_RIGHT) == BLOCK_ABSENT)
            atomic_fetch_add(&file->blocks_there, 1);
    }
    free(sums);
    return result;
}
