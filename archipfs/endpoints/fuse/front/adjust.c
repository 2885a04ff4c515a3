/*
 * INIT and OPEN as they pass between kernel and libfuse.
 *
 * An O_DIRECT open gets FOPEN_DIRECT_IO, without which FOPEN_PARALLEL_DIRECT_WRITES means nothing: eight threads that
 * write synchronously would take turns at the inode's lock. Only where the kernel keeps the page cache of other,
 * buffered opens coherent with that, and lets such a file be mapped: since 6.6, which is when it offers
 * DIRECT_IO_ALLOW_MMAP.
 *
 * What the kernel caches of a volume is dropped when we say so, and not whenever it sees another time of change
 * (AUTO_INVAL_DATA, which libfuse asks for). It drops pages whose write is still on its way to us, too: a reader then
 * fetches the old content behind the write's back, and it stays in the cache after the write has returned.
 */
#include "wire.h"

#include <errno.h>
#include <linux/fuse.h>
#include <string.h>
#include <unistd.h>

/* Requests of which nobody waits for each one: read-ahead, asynchronous direct I/O. */
#define BACKGROUND_MAX 128
#define BACKGROUND_CONGESTED 96

/* Used if offered. HANDLE_KILLPRIV_V2, or every write would first ask for security.capability. */
#define WANTED                                                                                                         \
    (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES |                      \
     FUSE_HANDLE_KILLPRIV_V2 | FUSE_EXPLICIT_INVAL_DATA | AF_DIRECT_IO_ALLOW_MMAP | AF_HAS_RESEND)

/* Before 7.36 the body of INIT ended with `flags`. */
#define INIT_BYTES_LEAST                                                                                               \
    (sizeof(struct fuse_in_header) + offsetof(struct fuse_init_in, flags) + sizeof(((struct fuse_init_in *)0)->flags))

ssize_t af_init_length(const void *kept, size_t room) {
    struct fuse_in_header header = {0};
    memcpy(&header, kept, room < sizeof header ? room : sizeof header);
    if (header.len == 0)
        return 0;
    if (header.opcode != FUSE_INIT || header.len > room || header.len < INIT_BYTES_LEAST)
        return -EBADMSG;
    return (ssize_t)header.len;
}

bool af_adjust_init_request(void *buffer, size_t length, struct af_offer *offer) {
    struct fuse_init_in in = {0};
    if (length < INIT_BYTES_LEAST)
        return false;
    char *body = (char *)buffer + sizeof(struct fuse_in_header);
    size_t size = length - sizeof(struct fuse_in_header);
    if (size > sizeof in)
        size = sizeof in;
    memcpy(&in, body, size);
    bool extended = (in.flags & FUSE_INIT_EXT) != 0;
    offer->flags = in.flags | (extended ? (uint64_t)in.flags2 << 32 : 0);
    offer->whole = true;
    in.flags &= ~(uint32_t)(FUSE_SPLICE_WRITE | FUSE_SPLICE_MOVE | FUSE_SPLICE_READ);
    memcpy(body, &in, size);
    return true;
}

bool af_adjust_init_answer(void *buffer, size_t length, const struct af_offer *offer, uint32_t data_bytes_max) {
    struct fuse_out_header header;
    struct fuse_init_out out;
    if (length < sizeof header + sizeof out || !offer->whole)
        return false;
    char *body = (char *)buffer + sizeof header;
    memcpy(&header, buffer, sizeof header);
    memcpy(&out, body, sizeof out);
    if (header.error != 0)
        return false;
    uint64_t flags = WANTED & offer->flags;
    out.flags |= (uint32_t)flags;
    out.flags &= ~(uint32_t)FUSE_AUTO_INVAL_DATA;
    if (offer->flags & FUSE_INIT_EXT) {
        if (!(out.flags & FUSE_INIT_EXT))
            out.flags2 = 0;
        out.flags |= FUSE_INIT_EXT;
        out.flags2 |= (uint32_t)(flags >> 32);
    }
    out.max_write = data_bytes_max;
    out.max_pages = (uint16_t)(data_bytes_max / (uint32_t)sysconf(_SC_PAGESIZE));
    out.max_background = BACKGROUND_MAX;
    out.congestion_threshold = BACKGROUND_CONGESTED;
    memcpy(body, &out, sizeof out);
    return true;
}

bool af_adjust_open_answer(void *buffer, size_t length, bool create, const struct af_offer *offer) {
    struct fuse_out_header header;
    struct fuse_open_out out;
    size_t at = sizeof header + (create ? sizeof(struct fuse_entry_out) : 0);
    if (length < at + sizeof out || !(offer->flags & AF_DIRECT_IO_ALLOW_MMAP))
        return false;
    memcpy(&header, buffer, sizeof header);
    memcpy(&out, (char *)buffer + at, sizeof out);
    if (header.error != 0)
        return false;
    out.open_flags |= FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
    memcpy((char *)buffer + at, &out, sizeof out);
    return true;
}
