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

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define AE_SECTOR_BYTES 4096u
#define AE_SIZE_MAX (UINT64_C(64) << 40)
#define AE_LAYERS_MAX 65536u
#define AE_COPY_BYTES_MAX (UINT64_C(64) << 20)

struct ae_object;

/*
 * A place where bytes lie: a file, a simulated disk that loses what was not flushed, a Python object.
 * The functions may block and may be called from several threads at once.
 */
struct ae_object_ops {
    /* Fill the whole buffer; holes and what lies beyond the end are zeros. */
    int (*pread)(void *ctx, void *buffer, size_t length, uint64_t offset);
    /* As pread, but -EAGAIN when it would wait for a disk. NULL: always would. */
    int (*pread_nowait)(void *ctx, void *buffer, size_t length, uint64_t offset);
    int (*pwrite)(void *ctx, const void *buffer, size_t length, uint64_t offset);
    int (*punch)(void *ctx, uint64_t offset, uint64_t length);
    int (*truncate)(void *ctx, uint64_t size);
    int (*flush)(void *ctx);
    int (*size)(void *ctx, uint64_t *size);
    /* The first offset at or after `offset` that may hold data, that lies in a hole; -ENXIO: none before the end. */
    int (*next_data)(void *ctx, uint64_t offset, uint64_t *found);
    int (*next_hole)(void *ctx, uint64_t offset, uint64_t *found);
    /*
     * Copy a range of another object to `offset`, as if it had been read and written, but without the bytes coming
     * here. -EOPNOTSUPP: not between these two, or not now; any part may have been copied then. NULL: never.
     */
    int (*copy_from)(void *ctx, uint64_t offset, const struct ae_object *source, uint64_t from, size_t length);
    void (*close)(void *ctx);
};

struct ae_object {
    const struct ae_object_ops *ops;
    void *ctx;
    /* What is written to a place for the first time comes in pieces that end on multiples of this; 0: whole. */
    size_t first_write_bytes;
};

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
/* Sectors whose bit is set; reads the whole bitmap, a page at a time. */
int64_t ae_layer_count(struct ae_layer *layer);

struct ae_volume;

/*
 * `layers[0]` is the head, each next one the parent of the one before. For a writable volume the head must have been
 * opened as one; whatever its data object holds beyond `size` is cut off, and its parent shows no further than that.
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
 * Have ae_sync believe that the volume's lock is ours as long as there is something at the path `present` and nothing
 * at `following`, and that `size` is recorded. Any thread; the last call counts.
 */
int ae_volume_guard(struct ae_volume *volume, const char *present, const char *following, uint64_t size);
/*
 * For good: every later write, discard and flush gives -EIO, and so do those that wait at the gate. The live bitmaps
 * are marked as distrusted, since somebody else may write to the layers from now on.
 */
void ae_volume_fence(struct ae_volume *volume);

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

/* What an endpoint in another module calls of the above. It is handed this table, and so needs no engine of its own. */
struct ae_calls {
    ssize_t (*read)(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset);
    ssize_t (*read_nowait)(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset);
    ssize_t (*write)(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset);
    int (*discard)(struct ae_volume *volume, uint64_t offset, uint64_t length);
    int (*write_zeros)(struct ae_volume *volume, uint64_t offset, uint64_t length);
    int (*grow)(struct ae_volume *volume, uint64_t size);
    int64_t (*seek_data)(struct ae_volume *volume, uint64_t offset);
    int64_t (*seek_hole)(struct ae_volume *volume, uint64_t offset);
    /* 0: all that returned before is durable. -EAGAIN: the composer has to see to it. */
    int (*sync)(struct ae_volume *volume);
};

const struct ae_calls *ae_calls(void);

#endif
