/*
 * The engine: read, write, discard, seek and flush over the layers of one volume.
 *
 * Plain C11 and POSIX: no FUSE, no Python, no globals. Everything here may be called from any thread at any time,
 * except that a handle must not be used after it was closed, and that the calls marked "control" must not run
 * beside each other on one volume (the composer holds the volume's mutex).
 *
 * Results: 0 or a byte count when it worked, a negative errno when it did not.
 */
#ifndef ARCHIPFS_ENGINE_H
#define ARCHIPFS_ENGINE_H

#include "object.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define AE_SECTOR_BYTES 4096u
#define AE_SIZE_MAX (UINT64_C(64) << 40)
#define AE_LAYERS_MAX 65536u
#define AE_COPY_BYTES_MAX (UINT64_C(64) << 20)
#define AE_REGION_SECTORS 1024u
#define AE_REGION_BYTES (UINT64_C(4) << 20)
#define AE_REGIONS_MAX (AE_SIZE_MAX / AE_REGION_BYTES)
#define AE_PACK_DAMAGED UINT32_MAX

/* An object over a file descriptor; it keeps a duplicate of `fd`. */
int ae_object_file(int fd, struct ae_object *object);

/*
 * A layer: what was written between two snapshots.
 *
 * `live_path` names the file that the live bitmap is mapped from (NULL: none may be kept). A head always gets one,
 * made if it is not there. A layer that is not a head uses it only if it is there, believed, and so left behind by
 * a crash. It is believed while its boot id and layer id are those given and nobody marked it as distrusted.
 *
 * `parent_visible` is how many bytes of the parent shine through: a clear bit at or beyond it reads as zeros.
 */
struct ae_layer;

struct ae_layer_spec {
    uint8_t id[16];
    struct ae_object data;
    struct ae_object bitmap;
    uint64_t parent_visible;
    const char *live_path;
    uint8_t boot_id[16];
    bool head;
};

/* Takes over both objects, and closes them when it fails. `-EUCLEAN`: the bitmap object's header is damaged. */
int ae_layer_open(const struct ae_layer_spec *spec, struct ae_layer **layer);
/* Write the header of an empty bitmap object and flush it: what makes a new object a layer's bitmap. */
int ae_bitmap_format(struct ae_object bitmap, const uint8_t id[16]);
/* Counted references: a volume holds one on each of its layers, the opener one. */
void ae_layer_release(struct ae_layer *layer);
/* The size that the live bitmap remembers, 0 if there was none to believe. */
uint64_t ae_layer_live_size(const struct ae_layer *layer);
/* How far the parent shines through now: a resize, an open at a smaller size or a swap may have changed it. */
uint64_t ae_layer_parent_visible(const struct ae_layer *layer);
/* Whether a live bitmap left behind by a crash was taken over. */
bool ae_layer_recovered(const struct ae_layer *layer);
/* Whether bits were set that are not durable yet. */
bool ae_layer_dirty(const struct ae_layer *layer);
/* Sectors whose bit is set; reads the whole bitmap, a page at a time. Of a sealed layer: those that are no hole. */
int64_t ae_layer_count(struct ae_layer *layer);

/* A pack: an immutable object that sealed layers read. What lies beyond `size` is -EIO, never zeros. Counted. */
struct ae_pack;

/* Takes over the object, and closes it when it fails. The opener has one reference, each region that names it one. */
int ae_pack_open(struct ae_object object, uint64_t size, struct ae_pack **pack);
void ae_pack_release(struct ae_pack *pack);

/*
 * The pack cache: local files of what was fetched of packs that lie far away, `bytes_max` bytes of disk at most. Those
 * go first that nobody has read for long. An error of the disk costs speed and nothing else.
 */
struct ae_cache;

/* What was fetched stays in memory for `stay_ns` before it is written, but for 32 MiB of it at most. */
int ae_cache_open(uint64_t bytes_max, uint64_t stay_ns, struct ae_cache **cache);
/* What was fetched is in the files, and no more is fetched ahead. Objects that are read through it go on. */
void ae_cache_close(struct ae_cache *cache);
/* Have it take less of the disk from now on, or more. */
void ae_cache_limit(struct ae_cache *cache, uint64_t bytes_max);
/* A file that a process before us left at `path`, of so many bytes; those used longest ago first. */
int ae_cache_adopt(struct ae_cache *cache, const char *path, uint64_t bytes);

/*
 * A pack of `size` bytes, read through a file at `path` (of no other pack), in a directory that is there. Blocks of 64
 * KiB that the file does not have are read from `source` and kept: each once, however many ask for it. It takes over
 * the source, and closes it when it fails. -EINVAL: a size that no pack has, or the path is open with another one.
 */
int ae_object_cached(struct ae_cache *cache, const char *path, const uint8_t pack[32], struct ae_object source,
                     uint64_t size, struct ae_object *object);

struct ae_cache_statistics {
    uint64_t bytes, files; /* of the disk, now */
    uint64_t hits;         /* reads, or parts of them, that waited for nothing to be fetched */
    uint64_t fetches, fetched_bytes;
    uint64_t ahead_bytes;  /* of these, those that nobody had asked for yet */
    uint64_t landed_bytes; /* of these, those that are in memory now, to be written to the files */
    uint64_t evictions;
    uint64_t failures; /* of the local disk */
};

void ae_cache_statistics(struct ae_cache *cache, struct ae_cache_statistics *statistics);

/* The sectors [first, first + count) of a region lie one after the other from a byte offset of a pack on. */
struct ae_extent {
    uint16_t first;
    uint16_t count;
    uint32_t pack; /* among the region's packs; AE_PACK_DAMAGED: known to be damaged, a read of it is -EIO */
    uint64_t offset;
};

/*
 * Where the sectors of one region lie, or that the regions [first_region, end_region) are empty: then there are no
 * extents. Extents come in order and do not overlap; between them there are zeros. All of it is copied; a reference is
 * kept on each pack. -EINVAL: not so.
 */
struct ae_region;

int ae_region_make(uint64_t first_region, uint64_t end_region, const struct ae_extent *extents, size_t count,
                   struct ae_pack *const *packs, size_t pack_count, struct ae_region **region);
/* For a resolver that made one and fails after all. */
void ae_region_release(struct ae_region *region);

/*
 * Who knows where a region of a sealed layer lies. `resolve` makes the one that has `region` in it, which goes over to
 * the caller; it may block, is called from any thread that reads, and must not call a volume of the engine.
 */
struct ae_resolver {
    int (*resolve)(void *ctx, uint64_t region, struct ae_region **made);
    void (*close)(void *ctx);
    void *ctx;
};

/*
 * The resolved regions of all sealed layers of a process: at most `bytes_max` bytes of them. A region takes 104
 * bytes, 16 for each extent (those that continue each other in one pack are one) and 8 for each pack it names. A pack
 * is let go of with the last region that names it. Regions in a reader's hands are kept beside that until he is done.
 */
struct ae_table;

int ae_table_open(size_t bytes_max, struct ae_table **table);
/* The opener has one reference, each sealed layer one. */
void ae_table_release(struct ae_table *table);
/* How many bytes the regions in it take now. */
size_t ae_table_bytes(struct ae_table *table);
/* Drop all of it: packs have gone, or damaged chunks have a good copy now. What is being resolved is not kept. */
void ae_table_forget(struct ae_table *table);

struct ae_table_statistics {
    uint64_t bytes, regions;
    uint64_t hits;
    uint64_t misses; /* the resolver was asked, or somebody who was asking it was waited for */
    uint64_t evictions;
};

void ae_table_statistics(struct ae_table *table, struct ae_table_statistics *statistics);

/*
 * A layer that was hashed: its bytes lie in packs. It has all that it shows, so it ends its chain; it does not change
 * and is never dirty. Layers with the same id share what the table has of them. Takes over the resolver, and closes it
 * when it fails.
 *
 * When reading a pack fails with -ENOENT, -ESTALE or -EIO, the region is resolved once more before the error counts:
 * its chunks may lie in another pack by now.
 */
int ae_layer_open_sealed(const uint8_t id[16], struct ae_table *table, struct ae_resolver resolver,
                         struct ae_layer **layer);

struct ae_volume;

/*
 * `layers[0]` is the head, each next one the parent of the one before; only the last may be sealed. For a writable
 * volume the head must have been opened as one; whatever its data object holds beyond `size` is cut off, and its parent
 * shows no further than that.
 */
int ae_volume_open(struct ae_layer *const *layers, size_t count, uint64_t size, bool writable,
                   struct ae_volume **volume);
/*
 * Control. Waits for the calls inside. Nothing is flushed. With `clean` (only after a successful flush) the live
 * bitmap files are removed; without it they stay, as after a crash.
 */
void ae_volume_close(struct ae_volume *volume, bool clean);

/* Bytes read: less than `length` only at the end of the volume. */
ssize_t ae_read(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset);
/* As ae_read, but -EAGAIN when it would wait for a disk, a lock or the gate. */
ssize_t ae_read_nowait(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset);
/* All of it or an error; a write beyond the end makes the volume larger. */
ssize_t ae_write(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset);
/* Both make the range read as zeros and give its space back; clipped to the volume's size. */
int ae_discard(struct ae_volume *volume, uint64_t offset, uint64_t length);
int ae_write_zeros(struct ae_volume *volume, uint64_t offset, uint64_t length);
/* Make the volume at least `size` bytes large; what is added reads as zeros. May run beside everything else. */
int ae_grow(struct ae_volume *volume, uint64_t size);
/* The first data (hole) at or after `offset`; -ENXIO as lseek(2) has it: the end of the volume is a hole. */
int64_t ae_seek_data(struct ae_volume *volume, uint64_t offset);
int64_t ae_seek_hole(struct ae_volume *volume, uint64_t offset);
/*
 * Copy a range of `source` to `target`, another volume or another range of the same one; ranges that overlap are the
 * caller's mistake. Holes stay holes. What is written to either range meanwhile is in the copy or not, sector by
 * sector. Returns how many bytes were copied, at most AE_COPY_BYTES_MAX: 0 only at or beyond the end of the source; an
 * error only when there are none.
 */
ssize_t ae_copy(struct ae_volume *target, uint64_t target_offset, struct ae_volume *source, uint64_t source_offset,
                uint64_t length);
/* All that returned before is durable: data, then bitmap, of every layer that is not yet. */
int ae_flush(struct ae_volume *volume);
/* As ae_flush, but for the head: that of what a swap has frozen, without holding up those who write to the new head. */
int ae_volume_flush_parents(struct ae_volume *volume);
/*
 * As ae_flush, its size too; -EAGAIN, and nothing done, where this is not known to be all that a flush takes: there is
 * no guard, or it says that the volume's lock has changed, or the size is not the one that was recorded.
 */
int ae_sync(struct ae_volume *volume);

/*
 * Control. From its return on, writes go to `head`, and none is under way to the old one; the old one is part of the
 * chain and still has to be flushed. Nobody waits for a disk meanwhile. Returns the size that the old one holds: that
 * of a snapshot taken so. The new head shows its parent at least that far. Whoever records the head beforehand cannot
 * know that size: AE_SIZE_MAX as its parent_visible is safe, since a layer holds nothing beyond its end.
 */
int64_t ae_volume_swap_head(struct ae_volume *volume, struct ae_layer *head);
/* Control. Close the gate: wait for the calls inside, hold the others at the door until ae_volume_resume. */
void ae_volume_pause(struct ae_volume *volume);
void ae_volume_resume(struct ae_volume *volume);
/* Control, while paused: have the live bitmap remember `size` (before a shrink is committed). */
void ae_volume_announce_size(struct ae_volume *volume, uint64_t size);
/* Control, while paused: cut or grow. What a shrink cut off reads as zeros if the volume grows again. */
int ae_volume_resize(struct ae_volume *volume, uint64_t size);
/*
 * Control, while paused: go over to another chain, at its size; whoever waits at the gate is served from that. The old
 * chain was flushed, and its live bitmap files are removed. As ae_volume_open otherwise.
 */
int ae_volume_replace(struct ae_volume *volume, struct ae_layer *const *layers, size_t count, uint64_t size);
/*
 * Control. How far from `offset` on, up to `end`, the volume shows what `layer` of its chain shows there: no layer
 * above has a bit, and each lets it shine through. -ENOENT: it has no such layer.
 */
int ae_volume_shows(struct ae_volume *volume, const uint8_t layer[16], uint64_t offset, uint64_t end, uint64_t *until);
/* Control, while paused: 1 if the head has no bit in the range, so that all of it is the parent's, else 0. */
int ae_volume_head_is_clear(struct ae_volume *volume, uint64_t offset, uint64_t end);
/* Control, while paused: show the parent as far as `size`, and be that large. Not smaller than the volume is. */
int ae_volume_extend(struct ae_volume *volume, uint64_t size);
/*
 * Control. Have the sealed layer take the place of `layer` of its chain and of all below: it shows the same. Calls
 * under way end on the old chain, and nobody waits; the old layers are let go of when the last of those calls is gone.
 * -ENOENT: the volume has no such layer. -EBUSY: it is the head that is written to, or not all from there on is
 * durable.
 */
int ae_volume_rebase(struct ae_volume *volume, const uint8_t layer[16], struct ae_layer *sealed);
/*
 * The next run of whole sectors [from, until) at or after `offset`, a multiple of the sector's size, that the volume
 * does not show straight from the layer `base` of its chain: written, discarded or hidden above it. Without a base
 * (NULL): that hold any data. `until` may lie beyond an `end` within a sector. -ENXIO: none before `end`. -ENOENT: the
 * volume has no such layer.
 */
int ae_volume_next_change(struct ae_volume *volume, const uint8_t base[16], uint64_t offset, uint64_t end,
                          uint64_t *from, uint64_t *until);
/*
 * Have ae_sync believe that the volume's lock is ours as long as there is something at the path `present` and nothing
 * at `following`, and that `size` is recorded. Both NULL: the store takes nothing from us once the lock is not ours, so
 * it needs no look. Any thread; the last call counts.
 */
int ae_volume_guard(struct ae_volume *volume, const char *present, const char *following, uint64_t size);
/*
 * For good: every later write, discard and flush gives -EIO, and so do those that wait at the gate. The live bitmaps
 * are marked as distrusted, since somebody else may write to the layers from now on.
 */
void ae_volume_fence(struct ae_volume *volume);

/*
 * Whether calls on it wait for a network, not for memory or a disk: its head lies there, or what was read of its sealed
 * layer.
 */
bool ae_volume_waits(struct ae_volume *volume);
uint64_t ae_volume_size(const struct ae_volume *volume);
/* How many bytes of the head's parent shine through now. Control. */
uint64_t ae_volume_parent_visible(const struct ae_volume *volume);
/* When a write, discard or growth last changed it: nanoseconds since 1970, 0 if none did since it was opened. */
uint64_t ae_volume_changed_ns(const struct ae_volume *volume);
/* As if nothing had changed it yet: somebody set the time of change. */
void ae_volume_forget_change(struct ae_volume *volume);

struct ae_statistics {
    uint64_t reads, read_bytes;
    uint64_t writes, written_bytes;
    uint64_t discards, discarded_bytes;
    uint64_t flushes;
    uint64_t fills; /* first writes to a part of a sector, completed from the parent */
    uint64_t layers;
    int32_t failed; /* 0, or the errno that made the engine refuse further writes */
};

void ae_volume_statistics(struct ae_volume *volume, struct ae_statistics *statistics);

/*
 * A read or write that goes on while no thread waits for it. `transfer.landed` is set by whoever begins it, who keeps
 * this and the buffer until ae_settle has returned; the rest is the engine's.
 */
struct ae_begun {
    struct ae_transfer transfer; /* first: what has landed is this */
    struct ae_volume *volume;
    struct ae_stack *stack;
    struct ae_layer *layer;
    struct ae_held_range *held; /* NULL: it needs no range, or reads */
    bool writes;
    size_t length;
    uint64_t offset;
};

/*
 * Begin what ae_read and ae_write do. 0: it lands, and has to be settled; until then it is inside the volume. -EAGAIN:
 * nothing was begun, since it takes more than one transfer, or would have to wait first.
 */
int ae_read_begin(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset, struct ae_begun *begun);
int ae_write_begin(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset,
                   struct ae_begun *begun);
/* What came of one that has landed, as ae_read and ae_write would say. -EAGAIN: unknown, it is to be done anew. Waits
 * for no network. */
ssize_t ae_settle(struct ae_begun *begun);

/* What an endpoint in another module calls of the above. It is handed this table, and so needs no engine of its own. */
struct ae_calls {
    ssize_t (*read)(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset);
    ssize_t (*read_nowait)(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset);
    ssize_t (*write)(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset);
    int (*read_begin)(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset, struct ae_begun *begun);
    int (*write_begin)(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset,
                       struct ae_begun *begun);
    ssize_t (*settle)(struct ae_begun *begun);
    int (*discard)(struct ae_volume *volume, uint64_t offset, uint64_t length);
    int (*write_zeros)(struct ae_volume *volume, uint64_t offset, uint64_t length);
    int (*grow)(struct ae_volume *volume, uint64_t size);
    int64_t (*seek_data)(struct ae_volume *volume, uint64_t offset);
    int64_t (*seek_hole)(struct ae_volume *volume, uint64_t offset);
    /* 0: all that returned before is durable. -EAGAIN: the composer has to see to it. */
    int (*sync)(struct ae_volume *volume);
    /* Whether calls on it wait for a network, where memory cannot answer them. */
    bool (*waits)(struct ae_volume *volume);
};

const struct ae_calls *ae_calls(void);

#endif
