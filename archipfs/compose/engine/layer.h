/*
 * A layer: its data object, and which sectors lie in it.
 *
 * The bits are kept in one mapping with a state byte for each bitmap page. A page is read from the bitmap object when
 * it is first touched, so that opening costs the same whatever the size. Under a head the mapping is shared with the
 * live file: a bit that is set is in the kernel's hands, and a killed process loses none.
 *
 * Who sets a bit has written the data before. Who makes a bit durable has copied it before flushing the data, so it
 * takes along no bit whose data came later.
 *
 * A sealed layer has neither object nor bits: all its bits read as clear. Whoever goes through a chain asks it last,
 * for all that is left (plan.c).
 */
#ifndef ARCHIPFS_ENGINE_LAYER_H
#define ARCHIPFS_ENGINE_LAYER_H

#include "bitmap.h"
#include "sealed.h"

#include <pthread.h>

#define AE_BLOCK_STATES 4096u
#define AE_STATE_BLOCKS (AE_PAGES_MAX / AE_BLOCK_STATES)

enum ae_page_state {
    AE_PAGE_ABSENT = 0, /* not read yet: the bitmap object has it */
    AE_PAGE_LOADED = 1, /* as durable, or being made durable */
    AE_PAGE_DIRTY = 2,  /* has bits that are not durable */
};

struct ae_layer {
    atomic_uint references;
    uint8_t id[16];
    struct ae_sealed *sealed; /* NULL: it has the two objects */
    struct ae_object data;
    struct ae_object bitmap;
    _Atomic uint64_t parent_visible;
    bool head;      /* opened to be written */
    bool recovered; /* a live bitmap was taken over */

    uint64_t durable_pages;  /* the bitmap object had at open; beyond them an absent page is clear */
    uint64_t capacity_pages; /* the mapping has; beyond them all is clear, and nothing is ever set */
    uint8_t *mapping;
    size_t mapping_bytes;
    struct ae_live_header *live; /* at the start of the mapping, or NULL */
    int live_fd;
    char *live_path;
    _Atomic uint8_t *states;
    ae_word *pages;
    /* Which blocks of state bytes the live file has space for: touching one without could kill the process. */
    atomic_bool block_ready[AE_STATE_BLOCKS];

    pthread_mutex_t load_lock;
    pthread_mutex_t flush_lock;
    atomic_bool data_dirty;   /* written or punched since the data flush before */
    atomic_bool bitmap_dirty; /* pages written since the bitmap flush before */
    atomic_bool frozen;       /* no call writes to it any more */
    atomic_bool settled;      /* frozen and durable: there is nothing to do for it ever again */
    atomic_bool failed;       /* a flush failed: nobody knows what is durable */
};

void ae_layer_retain(struct ae_layer *layer);
/* Whether a part of it that was read lies in a pack that lies far away. */
bool ae_layer_is_far(const struct ae_layer *layer);

/*
 * How the sector `first` and those after it up to `end` stand: `*set` is its bit, `*until` the first that differs. With
 * `nowait` -EAGAIN instead of reading the bitmap object.
 */
int ae_layer_run(struct ae_layer *layer, uint64_t first, uint64_t end, bool nowait, bool *set, uint64_t *until);
/* Whether every bit in [first, end) is set: 1 or 0, or a negative errno. */
int ae_layer_all_set(struct ae_layer *layer, uint64_t first, uint64_t end);
/* The first sector at or after `first` (`end` if none) on a bitmap page that may have bits; it reads no page. */
int ae_layer_skip_clear(struct ae_layer *layer, uint64_t first, uint64_t end, uint64_t *found);
/* Have the pages of [first, end) at hand, so that ae_layer_set cannot fail. */
int ae_layer_prepare(struct ae_layer *layer, uint64_t first, uint64_t end);
/* Whether they are. */
bool ae_layer_is_prepared(const struct ae_layer *layer, uint64_t first, uint64_t end);
/* Set bits whose pages were prepared and whose data was written. The caller holds the range. */
void ae_layer_set(struct ae_layer *layer, uint64_t first, uint64_t end);

int ae_layer_write(struct ae_layer *layer, const void *buffer, size_t length, uint64_t offset);
/* As ae_layer_write, where something may be written for the first time. */
int ae_layer_write_first(struct ae_layer *layer, const void *buffer, size_t length, uint64_t offset);
/* -EAGAIN: not now, or never. */
int ae_layer_write_begin(struct ae_layer *layer, const void *buffer, size_t length, uint64_t offset,
                         struct ae_transfer *transfer);
int ae_layer_write_settle(struct ae_layer *layer, struct ae_transfer *transfer);
int ae_layer_punch(struct ae_layer *layer, uint64_t offset, uint64_t length);
/* -EOPNOTSUPP where the layer's data object cannot take it from that one by itself. */
int ae_layer_copy(struct ae_layer *layer, uint64_t offset, const struct ae_object *source, uint64_t from,
                  size_t length);

/* Make durable what was written before. `*fatal`: the flush itself failed, and the layer is marked so for good. */
int ae_layer_flush(struct ae_layer *layer, bool *fatal);
/* No call writes to it any more; once it is durable its live file can go. */
void ae_layer_freeze(struct ae_layer *layer);
void ae_layer_remember_size(struct ae_layer *layer, uint64_t size);
/* The bits in the live file must not be believed by a later process. */
void ae_layer_distrust(struct ae_layer *layer);
/* Remove the live file unless it has what is nowhere else. The caller knows that nobody writes. */
void ae_layer_drop_live(struct ae_layer *layer);

#endif
