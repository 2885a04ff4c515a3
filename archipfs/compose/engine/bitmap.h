/*
 * Bits in a bitmap page, and the two headers that name a layer. Nothing here does I/O or takes a lock.
 *
 * Bit n of a page is bit n % 64 of its word n / 64; words are little-endian, so that bit n is also bit n % 8 of the
 * page's byte n / 8.
 */
#ifndef ARCHIPFS_ENGINE_BITMAP_H
#define ARCHIPFS_ENGINE_BITMAP_H

#include "engine.h"

#include <stdatomic.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the bitmap is mapped as it is stored: little-endian");

#define AE_PAGE_BYTES 4096u
#define AE_PAGE_WORDS (AE_PAGE_BYTES / 8)
#define AE_PAGE_SECTORS (AE_PAGE_BYTES * 8u)
#define AE_PAGES_MAX (AE_SIZE_MAX / AE_SECTOR_BYTES / AE_PAGE_SECTORS)

typedef _Atomic uint64_t ae_word;

static inline bool ae_bit_test(const ae_word *words, uint32_t bit) {
    return atomic_load(&words[bit / 64]) >> bit % 64 & 1;
}

/* The first bit in [first, end) that is not `value`; `end` if there is none. */
uint32_t ae_bits_until_not(const ae_word *words, uint32_t first, uint32_t end, bool value);
/* Set [first, end). Returns whether any of it was clear. */
bool ae_bits_set(ae_word *words, uint32_t first, uint32_t end);

/*
 * The bitmap object: a block of AE_PAGE_BYTES that starts with this header (the rest is zeros), then the pages: page i,
 * the sectors [32768 i, 32768 (i + 1)), lies at 4096 (1 + i). What is missing or in a hole is clear.
 */
struct ae_bitmap_header {
    uint8_t magic[8];  /* "archbits" */
    uint32_t version;  /* 1 */
    uint32_t checksum; /* CRC-32C of these 64 bytes with this field zero */
    uint8_t layer_id[16];
    uint32_t sector_bytes; /* 4096 */
    uint8_t reserved[28];
};

/*
 * The live bitmap file: a block that starts with this header, then a state byte for each of AE_PAGES_MAX pages, then
 * the pages. It means something to this boot of this machine only, so what changes while it is used is not checksummed.
 */
struct ae_live_header {
    uint8_t magic[8];  /* "archlive" */
    uint32_t version;  /* 1 */
    uint32_t checksum; /* CRC-32C of the first 48 bytes with this field zero */
    uint8_t layer_id[16];
    uint8_t boot_id[16];
    _Atomic uint64_t size;       /* of the volume whose head this is; 0: none yet */
    _Atomic uint32_t distrusted; /* a flush failed or the volume was fenced: never believe these bits */
    uint32_t reserved;
};

_Static_assert(sizeof(struct ae_bitmap_header) == 64, "as stored");
_Static_assert(sizeof(struct ae_live_header) == 64, "as stored");

void ae_bitmap_header_make(struct ae_bitmap_header *header, const uint8_t id[16]);
/* 0, -EPROTONOSUPPORT from a later version, -EUCLEAN damaged or another layer's. */
int ae_bitmap_header_check(const struct ae_bitmap_header *header, const uint8_t id[16]);
void ae_live_header_make(struct ae_live_header *header, const uint8_t id[16], const uint8_t boot_id[16]);
bool ae_live_header_believed(const struct ae_live_header *header, const uint8_t id[16], const uint8_t boot_id[16]);

#endif
