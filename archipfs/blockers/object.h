/*
 * The southbound contract as C code sees it: what a driver gives by DataObject.native(), and the engine takes.
 * Results: 0 when it worked, a negative errno when it did not.
 */
#ifndef ARCHIPFS_OBJECT_H
#define ARCHIPFS_OBJECT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ae_object;

struct ae_write {
    const void *buffer;
    size_t length;
    uint64_t offset;
};

/*
 * A read or write that goes on while no thread waits for it. Whoever begins it gives it room, and keeps that and the
 * buffer until it is settled.
 */
struct ae_transfer {
    /* It has landed: told once, by any thread, perhaps one of the store's own, perhaps before the call that begins it
     * has returned. Takes note and does nothing else. */
    void (*landed)(struct ae_transfer *transfer);
    void *driver;
};

/*
 * A place where bytes lie: a file, an object of a cluster, a simulated disk that loses what was
 * not flushed, a Python object.
 * The functions may block and may be called from several threads at once.
 */
struct ae_object_ops {
    /* Fill the whole buffer; holes and what lies beyond the end are zeros. */
    int (*pread)(void *ctx, void *buffer, size_t length, uint64_t offset);
    /* As pread, but -EAGAIN when it would wait for a disk. NULL: always would. */
    int (*pread_nowait)(void *ctx, void *buffer, size_t length, uint64_t offset);
    /* As pread, but -EIO where the object ends before. NULL: it takes a look at the size beside each read. */
    int (*pread_within)(void *ctx, void *buffer, size_t length, uint64_t offset);
    int (*pwrite)(void *ctx, const void *buffer, size_t length, uint64_t offset);
    /* As so many writes, which do not overlap, in any order or all at once. NULL: one after the other. */
    int (*pwrite_each)(void *ctx, const struct ae_write *writes, size_t count);
    /*
     * Begin what pread and pwrite do. 0: it lands, and has to be settled. -EAGAIN: nothing was begun, since it would
     * have to wait for something first; pread and pwrite say what comes of it. All three are there, or NULL.
     */
    int (*pread_begin)(void *ctx, void *buffer, size_t length, uint64_t offset, struct ae_transfer *transfer);
    int (*pwrite_begin)(void *ctx, const void *buffer, size_t length, uint64_t offset, struct ae_transfer *transfer);
    /* What came of a transfer that has landed: as pread, pwrite; -EAGAIN: unknown, it is to be done anew. Waits for
     * nothing. */
    int (*settle)(void *ctx, struct ae_transfer *transfer);
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
    /* Calls wait for a network, not for a disk: whoever has other requests to serve does not wait himself. */
    bool waits;
    /* What is written to a place for the first time comes in pieces that end on multiples of this; 0: whole. */
    size_t first_write_bytes;
};

#endif
