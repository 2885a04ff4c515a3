/*
 * See layer.h. Locks: flush_lock before load_lock; neither is held by a caller that takes the other of another layer.
 *
 * A live file on a tmpfs that is full answers a touched hole with SIGBUS, and reading a hole takes space as well. So
 * space is asked for with fallocate before a block of states or a page is touched, and a state byte is looked at only
 * where its block is known to have space.
 *
 * Where the bitmap object lies behind a network, what is read or written of it costs a journey, however little it is.
 * So pages are read a group at a time, and what lies between two pages to be written is written as well.
 */
#include "layer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define STATES_OFFSET ((size_t)AE_PAGE_BYTES)
#define LIVE_PAGES_OFFSET (STATES_OFFSET + AE_PAGES_MAX)
#define LIVE_BYTES (LIVE_PAGES_OFFSET + AE_PAGES_MAX * AE_PAGE_BYTES)
#define FLUSH_PAGES 256u
/* What is read at once where that is a journey: 256 KiB, for 8 GiB of the volume. */
#define GROUP_PAGES 64u

static uint8_t page_state(const struct ae_layer *layer, uint64_t page) {
    if (page >= layer->capacity_pages || !atomic_load(&layer->block_ready[page / AE_BLOCK_STATES]))
        return AE_PAGE_ABSENT;
    return atomic_load(&layer->states[page]);
}

static ae_word *page_words(const struct ae_layer *layer, uint64_t page) { return layer->pages + page * AE_PAGE_WORDS; }

static uint64_t page_object_offset(uint64_t page) { return AE_PAGE_BYTES * (1 + page); }

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* The live file */

static int file_reserve(int fd, uint64_t offset, uint64_t length) {
    int result;
    do
        result = fallocate(fd, 0, (off_t)offset, (off_t)length);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

static int layer_map(struct ae_layer *layer, int fd, uint64_t pages) {
    size_t states_bytes = fd >= 0 ? AE_PAGES_MAX : (pages + AE_PAGE_BYTES - 1) / AE_PAGE_BYTES * AE_PAGE_BYTES;
    size_t bytes = STATES_OFFSET + states_bytes + pages * AE_PAGE_BYTES;
    int flags = (fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | MAP_NORESERVE;
    void *mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (mapping == MAP_FAILED)
        return -errno;
    /* Where the live file lies on a disk, a first touch would read megabytes of its holes ahead. It is only advice. */
    if (fd >= 0)
        (void)madvise(mapping, bytes, MADV_RANDOM);
    layer->mapping = mapping;
    layer->mapping_bytes = bytes;
    layer->capacity_pages = pages;
    layer->states = (_Atomic uint8_t *)(layer->mapping + STATES_OFFSET);
    layer->pages = (ae_word *)(void *)(layer->mapping + STATES_OFFSET + states_bytes);
    for (size_t block = 0; block < AE_STATE_BLOCKS; block++)
        atomic_init(&layer->block_ready[block], fd < 0);
    if (fd >= 0) {
        layer->live = (struct ae_live_header *)mapping;
        layer->live_fd = fd;
    }
    return 0;
}

/* Find the state blocks of a live file that was left behind. Their loaded pages count as dirty: the process that died
 * may have been about to write them. -EUCLEAN: a state that nobody writes. */
static int live_take_over(struct ae_layer *layer) {
    uint64_t offset = STATES_OFFSET;
    while (offset < LIVE_PAGES_OFFSET) {
        off_t data = lseek(layer->live_fd, (off_t)offset, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            return -errno;
        if (data < 0 || (uint64_t)data >= LIVE_PAGES_OFFSET)
            return 0;
        size_t block = ((size_t)data - STATES_OFFSET) / AE_BLOCK_STATES;
        int result = file_reserve(layer->live_fd, STATES_OFFSET + block * AE_BLOCK_STATES, AE_BLOCK_STATES);
        if (result < 0)
            return result;
        atomic_store(&layer->block_ready[block], true);
        for (size_t page = block * AE_BLOCK_STATES; page < (block + 1) * AE_BLOCK_STATES; page++) {
            uint8_t state = atomic_load(&layer->states[page]);
            if (state > AE_PAGE_DIRTY)
                return -EUCLEAN;
            if (state == AE_PAGE_LOADED)
                atomic_store(&layer->states[page], AE_PAGE_DIRTY);
        }
        offset = STATES_OFFSET + (block + 1) * AE_BLOCK_STATES;
    }
    return 0;
}

static void layer_unmap(struct ae_layer *layer) {
    if (layer->mapping != NULL)
        munmap(layer->mapping, layer->mapping_bytes);
    if (layer->live_fd >= 0)
        close(layer->live_fd);
    layer->mapping = NULL;
    layer->live = NULL;
    layer->live_fd = -1;
}

/* 0: mapped and believed. -ENOENT: there is none, or none to believe. */
static int live_open(struct ae_layer *layer, const struct ae_layer_spec *spec) {
    int fd = open(spec->live_path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -errno;
    struct stat status;
    struct ae_live_header header;
    if (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode) || (uint64_t)status.st_size != LIVE_BYTES ||
        pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header ||
        !ae_live_header_believed(&header, spec->id, spec->boot_id)) {
        close(fd);
        return -ENOENT;
    }
    int result = layer_map(layer, fd, AE_PAGES_MAX);
    if (result < 0) {
        close(fd);
        return result;
    }
    result = live_take_over(layer);
    if (result < 0)
        layer_unmap(layer);
    return result == -EUCLEAN ? -ENOENT : result;
}

/* Under a temporary name first: a live file is never seen half made. */
static int live_create(struct ae_layer *layer, const struct ae_layer_spec *spec) {
    size_t length = strlen(spec->live_path);
    char *fresh_path = malloc(length + sizeof ".new");
    if (fresh_path == NULL)
        return -ENOMEM;
    memcpy(fresh_path, spec->live_path, length);
    memcpy(fresh_path + length, ".new", sizeof ".new");

    int result = 0;
    int fd = open(fresh_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) {
        result = -errno;
        free(fresh_path);
        return result;
    }
    if (ftruncate(fd, (off_t)LIVE_BYTES) < 0)
        result = -errno;
    if (result == 0)
        result = file_reserve(fd, 0, AE_PAGE_BYTES);
    if (result == 0)
        result = layer_map(layer, fd, AE_PAGES_MAX);
    if (result < 0) {
        close(fd);
    } else {
        ae_live_header_make(layer->live, spec->id, spec->boot_id);
        if (rename(fresh_path, spec->live_path) < 0) {
            result = -errno;
            layer_unmap(layer);
        }
    }
    if (result < 0)
        unlink(fresh_path);
    free(fresh_path);
    return result;
}

/* Choose the mapping: the live file that was left behind, a fresh one, or memory. */
static int layer_attach(struct ae_layer *layer, const struct ae_layer_spec *spec) {
    if (spec->live_path != NULL) {
        layer->live_path = strdup(spec->live_path);
        if (layer->live_path == NULL)
            return -ENOMEM;
        int result = live_open(layer, spec);
        if (result == 0) {
            layer->recovered = true;
            /* What the process before wrote may still be in the page cache only. */
            atomic_store(&layer->data_dirty, true);
            return 0;
        }
        if (result != -ENOENT)
            return result;
        if (spec->head)
            return live_create(layer, spec);
        /* One that is not believed is of no use to anybody. */
        unlink(spec->live_path);
    }
    return layer_map(layer, -1, spec->head ? AE_PAGES_MAX : layer->durable_pages);
}

/* Opening and closing */

static int bitmap_open(struct ae_layer *layer) {
    struct ae_bitmap_header header;
    int result = layer->bitmap.ops->pread(layer->bitmap.ctx, &header, sizeof header, 0);
    if (result == 0)
        result = ae_bitmap_header_check(&header, layer->id);
    uint64_t size = 0;
    if (result == 0)
        result = layer->bitmap.ops->size(layer->bitmap.ctx, &size);
    if (result < 0)
        return result;
    uint64_t blocks = (size + AE_PAGE_BYTES - 1) / AE_PAGE_BYTES;
    layer->durable_pages = smaller(blocks > 0 ? blocks - 1 : 0, AE_PAGES_MAX);
    return 0;
}

static void layer_free(struct ae_layer *layer) {
    layer_unmap(layer);
    free(layer->live_path);
    if (layer->sealed != NULL) {
        ae_sealed_close(layer->sealed);
    } else {
        layer->data.ops->close(layer->data.ctx);
        layer->bitmap.ops->close(layer->bitmap.ctx);
    }
    pthread_mutex_destroy(&layer->load_lock);
    pthread_mutex_destroy(&layer->flush_lock);
    free(layer);
}

static struct ae_layer *layer_make(const uint8_t id[16]) {
    struct ae_layer *layer = calloc(1, sizeof *layer);
    if (layer == NULL)
        return NULL;
    if (pthread_mutex_init(&layer->load_lock, NULL) == 0) {
        if (pthread_mutex_init(&layer->flush_lock, NULL) == 0) {
            atomic_init(&layer->references, 1);
            memcpy(layer->id, id, sizeof layer->id);
            layer->live_fd = -1;
            return layer;
        }
        pthread_mutex_destroy(&layer->load_lock);
    }
    free(layer);
    return NULL;
}

int ae_layer_open(const struct ae_layer_spec *spec, struct ae_layer **opened) {
    struct ae_layer *layer = layer_make(spec->id);
    if (layer == NULL) {
        spec->data.ops->close(spec->data.ctx);
        spec->bitmap.ops->close(spec->bitmap.ctx);
        return -ENOMEM;
    }
    layer->data = spec->data;
    layer->bitmap = spec->bitmap;
    atomic_init(&layer->parent_visible, spec->parent_visible);
    layer->head = spec->head;

    int result = bitmap_open(layer);
    if (result == 0)
        result = layer_attach(layer, spec);
    if (result < 0) {
        layer_free(layer);
        return result;
    }
    atomic_init(&layer->frozen, !spec->head);
    atomic_init(&layer->settled, !spec->head && !layer->recovered);
    *opened = layer;
    return 0;
}

int ae_layer_open_sealed(const uint8_t id[16], struct ae_table *table, struct ae_resolver resolver,
                         struct ae_layer **opened) {
    struct ae_sealed *sealed;
    int result = ae_sealed_open(id, table, resolver, &sealed);
    if (result < 0)
        return result;
    struct ae_layer *layer = layer_make(id);
    if (layer == NULL) {
        ae_sealed_close(sealed);
        return -ENOMEM;
    }
    layer->sealed = sealed;
    atomic_init(&layer->frozen, true);
    atomic_init(&layer->settled, true);
    *opened = layer;
    return 0;
}

int ae_bitmap_format(struct ae_object bitmap, const uint8_t id[16]) {
    struct ae_bitmap_header *header = calloc(1, AE_PAGE_BYTES);
    if (header == NULL)
        return -ENOMEM;
    ae_bitmap_header_make(header, id);
    int result = bitmap.ops->pwrite(bitmap.ctx, header, AE_PAGE_BYTES, 0);
    if (result == 0)
        result = bitmap.ops->flush(bitmap.ctx);
    free(header);
    return result;
}

void ae_layer_retain(struct ae_layer *layer) { atomic_fetch_add(&layer->references, 1); }

bool ae_layer_is_far(const struct ae_layer *layer) { return layer->sealed != NULL && ae_sealed_is_far(layer->sealed); }

void ae_layer_release(struct ae_layer *layer) {
    if (atomic_fetch_sub(&layer->references, 1) == 1)
        layer_free(layer);
}

uint64_t ae_layer_live_size(const struct ae_layer *layer) {
    return layer->live != NULL ? atomic_load(&layer->live->size) : 0;
}

void ae_layer_remember_size(struct ae_layer *layer, uint64_t size) {
    if (layer->live != NULL)
        atomic_store(&layer->live->size, size);
}

uint64_t ae_layer_parent_visible(const struct ae_layer *layer) { return atomic_load(&layer->parent_visible); }

bool ae_layer_recovered(const struct ae_layer *layer) { return layer->recovered; }

void ae_layer_distrust(struct ae_layer *layer) {
    if (layer->live != NULL)
        atomic_store(&layer->live->distrusted, 1);
}

/* Bits */

static uint64_t group_pages(const struct ae_layer *layer) { return layer->bitmap.waits ? GROUP_PAGES : 1; }

/* With the lock held: pages that are absent go over what the object has of them. */
static int pages_read(struct ae_layer *layer, uint64_t page, uint64_t end) {
    uint64_t durable_end = smaller(end, layer->durable_pages);
    if (page >= durable_end)
        return 0;
    if (durable_end == page + 1)
        return layer->bitmap.ops->pread(layer->bitmap.ctx, page_words(layer, page), AE_PAGE_BYTES,
                                        page_object_offset(page));
    size_t length = (durable_end - page) * AE_PAGE_BYTES;
    char *bytes = malloc(length);
    if (bytes == NULL)
        return -ENOMEM;
    int result = layer->bitmap.ops->pread(layer->bitmap.ctx, bytes, length, page_object_offset(page));
    for (uint64_t each = page; result == 0 && each < durable_end; each++)
        if (atomic_load(&layer->states[each]) == AE_PAGE_ABSENT)
            memcpy(page_words(layer, each), bytes + (each - page) * AE_PAGE_BYTES, AE_PAGE_BYTES);
    free(bytes);
    return result;
}

/* With the lock held, and the page absent: read it, and its neighbours where that costs no more. */
static int group_load(struct ae_layer *layer, uint64_t page) {
    uint64_t first = page, end = page + 1;
    if (page < layer->durable_pages) {
        first = page - page % group_pages(layer);
        end = smaller(smaller(first + group_pages(layer), layer->durable_pages), layer->capacity_pages);
    }
    int result = 0;
    if (layer->live != NULL)
        result = file_reserve(layer->live_fd, LIVE_PAGES_OFFSET + first * AE_PAGE_BYTES, (end - first) * AE_PAGE_BYTES);
    if (result == 0)
        result = pages_read(layer, first, end);
    for (uint64_t each = first; result == 0 && each < end; each++)
        if (atomic_load(&layer->states[each]) == AE_PAGE_ABSENT)
            atomic_store(&layer->states[each], AE_PAGE_LOADED);
    return result;
}

static int page_load(struct ae_layer *layer, uint64_t page) {
    if (page >= layer->capacity_pages)
        return -EFBIG;
    pthread_mutex_lock(&layer->load_lock);
    int result = 0;
    uint64_t block = page / AE_BLOCK_STATES;
    if (!atomic_load(&layer->block_ready[block])) {
        result = file_reserve(layer->live_fd, STATES_OFFSET + block * AE_BLOCK_STATES, AE_BLOCK_STATES);
        if (result == 0)
            atomic_store(&layer->block_ready[block], true);
    }
    if (result == 0 && atomic_load(&layer->states[page]) == AE_PAGE_ABSENT)
        result = group_load(layer, page);
    pthread_mutex_unlock(&layer->load_lock);
    return result;
}

/* The words of a page, NULL when it is known to be clear. */
static int page_view(struct ae_layer *layer, uint64_t page, bool nowait, const ae_word **words) {
    *words = NULL;
    if (page_state(layer, page) == AE_PAGE_ABSENT) {
        if (page >= layer->durable_pages)
            return 0;
        if (nowait)
            return -EAGAIN;
        int result = page_load(layer, page);
        if (result < 0)
            return result;
    }
    *words = page_words(layer, page);
    return 0;
}

/* The first page at or after `page` (`end` if none) that may have bits: one in memory, or one the object has data for.
 */
static int page_skip_clear(struct ae_layer *layer, uint64_t page, uint64_t end, uint64_t *found) {
    uint64_t durable_end = smaller(layer->durable_pages, end);
    uint64_t hole_end = page;
    for (; page < end && page_state(layer, page) == AE_PAGE_ABSENT; page++) {
        if (page >= durable_end || page < hole_end)
            continue;
        uint64_t data;
        int result = layer->bitmap.ops->next_data(layer->bitmap.ctx, page_object_offset(page), &data);
        if (result < 0 && result != -ENXIO)
            return result;
        hole_end = result < 0 ? end : data / AE_PAGE_BYTES - 1;
        if (hole_end <= page)
            break;
    }
    *found = page;
    return 0;
}

int ae_layer_skip_clear(struct ae_layer *layer, uint64_t first, uint64_t end, uint64_t *found) {
    uint64_t page;
    int result = page_skip_clear(layer, first / AE_PAGE_SECTORS, (end + AE_PAGE_SECTORS - 1) / AE_PAGE_SECTORS, &page);
    if (result < 0)
        return result;
    uint64_t sector = page * AE_PAGE_SECTORS;
    *found = sector < first ? first : smaller(sector, end);
    return 0;
}

int ae_layer_run(struct ae_layer *layer, uint64_t first, uint64_t end, bool nowait, bool *set, uint64_t *until) {
    uint64_t sector = first;
    while (sector < end) {
        /* Over a long range a page is not read where the bitmap object has a hole. */
        if (!nowait && sector % AE_PAGE_SECTORS == 0 && end - sector >= AE_PAGE_SECTORS && (sector == first || !*set)) {
            uint64_t next;
            int result = ae_layer_skip_clear(layer, sector, end, &next);
            if (result < 0)
                return result;
            if (next > sector) {
                *set = false;
                sector = next;
                continue;
            }
        }
        uint64_t page = sector / AE_PAGE_SECTORS;
        uint32_t bit = (uint32_t)(sector % AE_PAGE_SECTORS);
        uint32_t bit_end = (uint32_t)smaller(end - page * AE_PAGE_SECTORS, AE_PAGE_SECTORS);
        const ae_word *words;
        int result = page_view(layer, page, nowait, &words);
        if (result < 0)
            return result;
        bool here = words != NULL && ae_bit_test(words, bit);
        if (sector == first)
            *set = here;
        else if (here != *set)
            break;
        /* The bit itself is not looked at again: it may have been set meanwhile, and a run is never empty. */
        uint32_t bit_until = words != NULL ? ae_bits_until_not(words, bit + 1, bit_end, here) : bit_end;
        sector = page * AE_PAGE_SECTORS + bit_until;
        if (bit_until < bit_end)
            break;
    }
    *until = sector;
    return 0;
}

int ae_layer_all_set(struct ae_layer *layer, uint64_t first, uint64_t end) {
    bool set;
    uint64_t until;
    int result = ae_layer_run(layer, first, end, false, &set, &until);
    return result < 0 ? result : set && until == end;
}

int ae_layer_prepare(struct ae_layer *layer, uint64_t first, uint64_t end) {
    for (uint64_t page = first / AE_PAGE_SECTORS; page * AE_PAGE_SECTORS < end; page++) {
        if (page_state(layer, page) != AE_PAGE_ABSENT)
            continue;
        int result = page_load(layer, page);
        if (result < 0)
            return result;
    }
    return 0;
}

bool ae_layer_is_prepared(const struct ae_layer *layer, uint64_t first, uint64_t end) {
    for (uint64_t page = first / AE_PAGE_SECTORS; page * AE_PAGE_SECTORS < end; page++)
        if (page_state(layer, page) == AE_PAGE_ABSENT)
            return false;
    return true;
}

void ae_layer_set(struct ae_layer *layer, uint64_t first, uint64_t end) {
    while (first < end) {
        uint64_t page = first / AE_PAGE_SECTORS;
        uint64_t border = smaller((page + 1) * AE_PAGE_SECTORS, end);
        bool changed = ae_bits_set(page_words(layer, page), (uint32_t)(first - page * AE_PAGE_SECTORS),
                                   (uint32_t)(border - page * AE_PAGE_SECTORS));
        /* After the bits: a flush that turned the page clean before them did not see them. */
        if (changed && atomic_load(&layer->states[page]) != AE_PAGE_DIRTY)
            atomic_store(&layer->states[page], AE_PAGE_DIRTY);
        first = border;
    }
}

static int64_t words_count(const ae_word *words) {
    int64_t count = 0;
    for (size_t i = 0; i < AE_PAGE_WORDS; i++)
        count += __builtin_popcountll(atomic_load(&words[i]));
    return count;
}

/* How many bits are set in the pages of a group from `page` on, as far as they are in memory or the object has them. */
static int64_t group_count(struct ae_layer *layer, uint64_t page, ae_word *copy, uint64_t *until) {
    if (page_state(layer, page) != AE_PAGE_ABSENT) {
        *until = page + 1;
        return words_count(page_words(layer, page));
    }
    *until = smaller(page - page % group_pages(layer) + group_pages(layer), layer->durable_pages);
    int result =
        layer->bitmap.ops->pread(layer->bitmap.ctx, copy, (*until - page) * AE_PAGE_BYTES, page_object_offset(page));
    int64_t count = 0;
    for (uint64_t each = page; result == 0 && each < *until; each++) {
        bool in_memory = page_state(layer, each) != AE_PAGE_ABSENT;
        count += words_count(in_memory ? page_words(layer, each) : copy + (each - page) * AE_PAGE_WORDS);
    }
    return result < 0 ? result : count;
}

/* A count read straight from the object leaves its pages unloaded: it is asked for whole volumes, once. */
int64_t ae_layer_count(struct ae_layer *layer) {
    if (layer->sealed != NULL)
        return ae_sealed_count(layer->sealed);
    ae_word *copy = malloc(group_pages(layer) * AE_PAGE_BYTES);
    if (copy == NULL)
        return -ENOMEM;
    int64_t count = 0;
    uint64_t page = 0;
    for (;;) {
        int64_t result = page_skip_clear(layer, page, AE_PAGES_MAX, &page);
        if (result == 0 && page == AE_PAGES_MAX)
            break;
        if (result == 0)
            result = group_count(layer, page, copy, &page);
        if (result < 0) {
            free(copy);
            return result;
        }
        count += result;
    }
    free(copy);
    return count;
}

/* Data */

/* Said after the data was written: a flush that takes the mark away has the data before it. */
static void mark_data_dirty(struct ae_layer *layer) {
    if (!atomic_load(&layer->data_dirty))
        atomic_store(&layer->data_dirty, true);
}

int ae_layer_write(struct ae_layer *layer, const void *buffer, size_t length, uint64_t offset) {
    int result = layer->data.ops->pwrite(layer->data.ctx, buffer, length, offset);
    mark_data_dirty(layer);
    return result;
}

int ae_layer_write_first(struct ae_layer *layer, const void *buffer, size_t length, uint64_t offset) {
    size_t piece_bytes = layer->data.first_write_bytes;
    const char *from = buffer;
    int result = 0;
    while (result == 0 && length > 0) {
        size_t piece = piece_bytes > 0 ? (size_t)smaller(piece_bytes - offset % piece_bytes, length) : length;
        result = ae_layer_write(layer, from, piece, offset);
        from += piece;
        offset += piece;
        length -= piece;
    }
    return result;
}

int ae_layer_write_begin(struct ae_layer *layer, const void *buffer, size_t length, uint64_t offset,
                         struct ae_transfer *transfer) {
    const struct ae_object *data = &layer->data;
    return data->ops->pwrite_begin != NULL ? data->ops->pwrite_begin(data->ctx, buffer, length, offset, transfer)
                                           : -EAGAIN;
}

int ae_layer_write_settle(struct ae_layer *layer, struct ae_transfer *transfer) {
    int result = layer->data.ops->settle(layer->data.ctx, transfer);
    mark_data_dirty(layer);
    return result;
}

int ae_layer_punch(struct ae_layer *layer, uint64_t offset, uint64_t length) {
    int result = layer->data.ops->punch(layer->data.ctx, offset, length);
    mark_data_dirty(layer);
    return result;
}

int ae_layer_copy(struct ae_layer *layer, uint64_t offset, const struct ae_object *source, uint64_t from,
                  size_t length) {
    const struct ae_object *data = &layer->data;
    if (data->ops->copy_from == NULL)
        return -EOPNOTSUPP;
    int result = data->ops->copy_from(data->ctx, offset, source, from, length);
    mark_data_dirty(layer);
    return result;
}

/* Flushing */

static bool state_block_is_dirty(const struct ae_layer *layer, uint64_t block) {
    uint64_t end = smaller((block + 1) * AE_BLOCK_STATES, layer->capacity_pages);
    for (uint64_t page = block * AE_BLOCK_STATES; page < end; page++)
        if (atomic_load(&layer->states[page]) == AE_PAGE_DIRTY)
            return true;
    return false;
}

static bool pages_are_dirty(const struct ae_layer *layer) {
    for (uint64_t block = 0; block * AE_BLOCK_STATES < layer->capacity_pages; block++)
        if (atomic_load(&layer->block_ready[block]) && state_block_is_dirty(layer, block))
            return true;
    return false;
}

bool ae_layer_dirty(const struct ae_layer *layer) {
    if (atomic_load(&layer->settled))
        return false;
    return atomic_load(&layer->failed) || atomic_load(&layer->data_dirty) || atomic_load(&layer->bitmap_dirty) ||
           pages_are_dirty(layer);
}

struct batch {
    uint64_t page[FLUSH_PAGES];
    uint64_t copy[FLUSH_PAGES][AE_PAGE_WORDS];
    size_t count;
    struct ae_write writes[FLUSH_PAGES];
};

/* What nobody has touched and the object does not have is clear. */
static void batch_add(const struct ae_layer *layer, uint64_t page, struct batch *batch) {
    uint64_t *copy = batch->copy[batch->count];
    batch->page[batch->count++] = page;
    if (page_state(layer, page) == AE_PAGE_ABSENT) {
        memset(copy, 0, AE_PAGE_BYTES);
        return;
    }
    const ae_word *words = page_words(layer, page);
    for (size_t i = 0; i < AE_PAGE_WORDS; i++)
        copy[i] = atomic_load(&words[i]);
}

/*
 * How many clean pages to write before `page`, so that it goes out with the one before. They may go like dirty ones:
 * what is copied before the data is flushed never tells of data that is not.
 */
static size_t gap_before(const struct ae_layer *layer, uint64_t page, const struct batch *batch) {
    if (batch->count == 0 || !layer->bitmap.waits)
        return 0;
    uint64_t first = batch->page[batch->count - 1] + 1;
    if (page - first >= GROUP_PAGES || page - first >= FLUSH_PAGES - batch->count)
        return 0;
    for (uint64_t each = first; each < page; each++)
        if (each < layer->durable_pages && page_state(layer, each) == AE_PAGE_ABSENT)
            return 0;
    return (size_t)(page - first);
}

/* Take the next dirty pages at or after `page`: turn them clean, then copy them. Returns where to go on. */
static uint64_t batch_take(struct ae_layer *layer, uint64_t page, struct batch *batch) {
    batch->count = 0;
    while (page < layer->capacity_pages && batch->count < FLUSH_PAGES) {
        if (!atomic_load(&layer->block_ready[page / AE_BLOCK_STATES])) {
            page = (page / AE_BLOCK_STATES + 1) * AE_BLOCK_STATES;
            continue;
        }
        uint8_t dirty = AE_PAGE_DIRTY;
        if (atomic_load(&layer->states[page]) == AE_PAGE_DIRTY &&
            atomic_compare_exchange_strong(&layer->states[page], &dirty, AE_PAGE_LOADED)) {
            for (size_t gap = gap_before(layer, page, batch); gap > 0; gap--)
                batch_add(layer, page - gap, batch);
            batch_add(layer, page, batch);
        }
        page++;
    }
    return page;
}

/* Neighbours go out in one call. */
static int batch_write(struct ae_layer *layer, struct batch *batch) {
    const struct ae_object *bitmap = &layer->bitmap;
    size_t count = 0;
    for (size_t i = 0; i < batch->count;) {
        size_t run = 1;
        while (i + run < batch->count && batch->page[i + run] == batch->page[i] + run)
            run++;
        batch->writes[count++] = (struct ae_write){
            .buffer = batch->copy[i],
            .length = run * AE_PAGE_BYTES,
            .offset = page_object_offset(batch->page[i]),
        };
        i += run;
    }
    if (bitmap->ops->pwrite_each != NULL)
        return bitmap->ops->pwrite_each(bitmap->ctx, batch->writes, count);
    int result = 0;
    for (size_t i = 0; result == 0 && i < count; i++)
        result =
            bitmap->ops->pwrite(bitmap->ctx, batch->writes[i].buffer, batch->writes[i].length, batch->writes[i].offset);
    return result;
}

/* None of it counts as written. A page that was only in a gap, and that nobody has touched, is clean in any case. */
static void batch_give_back(struct ae_layer *layer, const struct batch *batch) {
    for (size_t i = 0; i < batch->count; i++)
        if (page_state(layer, batch->page[i]) != AE_PAGE_ABSENT)
            atomic_store(&layer->states[batch->page[i]], AE_PAGE_DIRTY);
}

static int flush_fatal(struct ae_layer *layer, int result, bool *fatal) {
    *fatal = true;
    atomic_store(&layer->failed, true);
    ae_layer_distrust(layer);
    return result;
}

static int flush_pages(struct ae_layer *layer, struct batch *batch, bool *fatal) {
    uint64_t page = 0;
    do {
        page = batch_take(layer, page, batch);
        if (atomic_exchange(&layer->data_dirty, false)) {
            int result = layer->data.ops->flush(layer->data.ctx);
            if (result < 0)
                return flush_fatal(layer, result, fatal);
        }
        if (batch->count > 0)
            atomic_store(&layer->bitmap_dirty, true);
        int result = batch_write(layer, batch);
        if (result < 0) {
            batch_give_back(layer, batch);
            return result;
        }
    } while (page < layer->capacity_pages);
    if (atomic_load(&layer->bitmap_dirty)) {
        int result = layer->bitmap.ops->flush(layer->bitmap.ctx);
        if (result < 0)
            return flush_fatal(layer, result, fatal);
        atomic_store(&layer->bitmap_dirty, false);
    }
    return 0;
}

/* With flush_lock held. The mapping stays: whoever holds the layer goes on reading its bits there. */
static void drop_live(struct ae_layer *layer) {
    if (layer->live == NULL || layer->live_path == NULL)
        return;
    unlink(layer->live_path);
    free(layer->live_path);
    layer->live_path = NULL;
}

int ae_layer_flush(struct ae_layer *layer, bool *fatal) {
    if (atomic_load(&layer->settled))
        return 0;
    struct batch *batch = malloc(sizeof *batch);
    if (batch == NULL)
        return -ENOMEM;
    pthread_mutex_lock(&layer->flush_lock);
    int result = 0;
    if (atomic_load(&layer->failed)) {
        *fatal = true;
        result = -EIO;
    } else if (!atomic_load(&layer->settled)) {
        bool frozen = atomic_load(&layer->frozen);
        result = flush_pages(layer, batch, fatal);
        if (result == 0 && frozen) {
            atomic_store(&layer->settled, true);
            drop_live(layer);
        }
    }
    pthread_mutex_unlock(&layer->flush_lock);
    free(batch);
    return result;
}

void ae_layer_freeze(struct ae_layer *layer) { atomic_store(&layer->frozen, true); }

void ae_layer_drop_live(struct ae_layer *layer) {
    pthread_mutex_lock(&layer->flush_lock);
    if (!ae_layer_dirty(layer))
        drop_live(layer);
    pthread_mutex_unlock(&layer->flush_lock);
}
