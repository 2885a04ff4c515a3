/* See chunker.h. */
#include "chunker.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/* The first word is zero, and every byte equals the one a word before it. Most data ends this at the first word. */
bool ac_is_zero(const void *data, size_t bytes) {
    const uint8_t *at = data;
    uint64_t head = 0;
    size_t head_bytes = bytes < sizeof(head) ? bytes : sizeof(head);
    if (head_bytes > 0)
        memcpy(&head, at, head_bytes);
    return head == 0 && (bytes == head_bytes || memcmp(at, at + head_bytes, bytes - head_bytes) == 0);
}

size_t ac_cut(const void *data, size_t sectors, uint64_t mask, struct ac_piece *pieces) {
    size_t pieces_count = 0;
    uint32_t run = 0;
    for (size_t sector = 0; sector < sectors; sector++) {
        const uint8_t *bytes = (const uint8_t *)data + sector * AC_SECTOR_BYTES;
        if (ac_is_zero(bytes, AC_SECTOR_BYTES)) {
            run = 0;
            continue;
        }
        if (run == 0)
            pieces[pieces_count++] = (struct ac_piece){.first = (uint32_t)sector};
        pieces[pieces_count - 1].count = ++run;
        if (run == AC_CHUNK_SECTORS_MAX || (XXH3_64bits(bytes, AC_SECTOR_BYTES) & mask) == 0)
            run = 0;
    }
    return pieces_count;
}
