/* See bitmap.h. */
#include "bitmap.h"

#include <errno.h>
#include <string.h>

#define FORMAT_VERSION 1u

static const uint8_t bitmap_magic[8] = {'a', 'r', 'c', 'h', 'b', 'i', 't', 's'};
static const uint8_t live_magic[8] = {'a', 'r', 'c', 'h', 'l', 'i', 'v', 'e'};

uint32_t ae_bits_until_not(const ae_word *words, uint32_t first, uint32_t end, bool value) {
    uint64_t same = value ? ~UINT64_C(0) : 0;
    while (first < end) {
        uint64_t differing = (atomic_load(&words[first / 64]) ^ same) >> first % 64;
        if (differing != 0) {
            uint32_t found = first + (uint32_t)__builtin_ctzll(differing);
            return found < end ? found : end;
        }
        first = (first / 64 + 1) * 64;
    }
    return end;
}

bool ae_bits_set(ae_word *words, uint32_t first, uint32_t end) {
    bool changed = false;
    while (first < end) {
        uint32_t border = (first / 64 + 1) * 64;
        uint64_t mask = ~UINT64_C(0) << first % 64;
        if (end < border)
            mask &= ~UINT64_C(0) >> (border - end);
        ae_word *word = &words[first / 64];
        if ((atomic_load(word) & mask) != mask)
            changed |= (atomic_fetch_or(word, mask) & mask) != mask;
        first = border;
    }
    return changed;
}

/* Bit by bit: a header is small and read once. */
static uint32_t crc32c(const void *data, size_t length) {
    const uint8_t *bytes = data;
    uint32_t crc = ~UINT32_C(0);
    for (size_t i = 0; i < length; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (UINT32_C(0x82f63b78) & (0u - (crc & 1)));
    }
    return ~crc;
}

static uint32_t bitmap_checksum(const struct ae_bitmap_header *header) {
    struct ae_bitmap_header copy = *header;
    copy.checksum = 0;
    return crc32c(&copy, sizeof copy);
}

static uint32_t live_checksum(const struct ae_live_header *header) {
    uint8_t fixed[offsetof(struct ae_live_header, size)];
    memcpy(fixed, header, sizeof fixed);
    memset(fixed + offsetof(struct ae_live_header, checksum), 0, sizeof header->checksum);
    return crc32c(fixed, sizeof fixed);
}

void ae_bitmap_header_make(struct ae_bitmap_header *header, const uint8_t id[16]) {
    *header = (struct ae_bitmap_header){.version = FORMAT_VERSION, .sector_bytes = AE_SECTOR_BYTES};
    memcpy(header->magic, bitmap_magic, sizeof header->magic);
    memcpy(header->layer_id, id, sizeof header->layer_id);
    header->checksum = bitmap_checksum(header);
}

int ae_bitmap_header_check(const struct ae_bitmap_header *header, const uint8_t id[16]) {
    if (memcmp(header->magic, bitmap_magic, sizeof header->magic) != 0 || header->checksum != bitmap_checksum(header))
        return -EUCLEAN;
    if (header->version > FORMAT_VERSION)
        return -EPROTONOSUPPORT;
    bool ours = header->version == FORMAT_VERSION && header->sector_bytes == AE_SECTOR_BYTES &&
                memcmp(header->layer_id, id, sizeof header->layer_id) == 0;
    return ours ? 0 : -EUCLEAN;
}

void ae_live_header_make(struct ae_live_header *header, const uint8_t id[16], const uint8_t boot_id[16]) {
    memcpy(header->magic, live_magic, sizeof header->magic);
    header->version = FORMAT_VERSION;
    memcpy(header->layer_id, id, sizeof header->layer_id);
    memcpy(header->boot_id, boot_id, sizeof header->boot_id);
    atomic_store(&header->size, 0);
    atomic_store(&header->distrusted, 0);
    header->reserved = 0;
    header->checksum = live_checksum(header);
}

bool ae_live_header_believed(const struct ae_live_header *header, const uint8_t id[16], const uint8_t boot_id[16]) {
    return memcmp(header->magic, live_magic, sizeof header->magic) == 0 && header->checksum == live_checksum(header) &&
           header->version == FORMAT_VERSION && memcmp(header->layer_id, id, sizeof header->layer_id) == 0 &&
           memcmp(header->boot_id, boot_id, sizeof header->boot_id) == 0 && atomic_load(&header->distrusted) == 0;
}
