/*
 * FUSE requests as they come from the kernel: what we look at of them, checked. Pure: no I/O, no state.
 * The structures are those of <linux/fuse.h>, in the machine's byte order.
 */
#ifndef ARCHIPFS_FRONT_WIRE_H
#define ARCHIPFS_FRONT_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What <linux/fuse.h> may be too old to have. */
#define AF_DIRECT_IO_ALLOW_MMAP (UINT64_C(1) << 36) /* of INIT; Linux 6.6 */
#define AF_HAS_RESEND (UINT64_C(1) << 39)           /* of INIT; Linux 6.9 */
#define AF_NOTIFY_RESEND 7                          /* Linux 6.9 */
#define AF_UNIQUE_RESEND (UINT64_C(1) << 63)        /* of a request's number: it is sent again; Linux 6.9 */
#define AF_COPY_FILE_RANGE_64 53                    /* opcode, of a fuse_copy_file_range_in; Linux 6.18 */

enum af_kind {
    AF_READ,
    AF_WRITE,
    AF_ALLOCATE, /* the space is there as soon as it is written to; grows unless `keeps_size` */
    AF_PUNCH,    /* back to zeros, and the space back to the store */
    AF_ZERO,     /* back to zeros; grows unless `keeps_size` */
    AF_SEEK_DATA,
    AF_SEEK_HOLE,
    AF_SYNC, /* fsync and fdatasync alike */
    AF_INIT,
    AF_INIT_AGAIN, /* one that a process before us had, and that the kernel does not wait for */
    AF_OPEN,
    AF_CREATE,
    AF_UPCALL, /* IOCTL, COPY_FILE_RANGE */
    AF_INTERRUPT,
    AF_OTHER,
};

struct af_request {
    enum af_kind kind;
    bool answered; /* whether the kernel waits for an answer: not for FORGET, say */
    bool keeps_size;
    bool direct; /* OPEN, CREATE: with O_DIRECT */
    uint64_t unique;
    uint64_t node;
    uint64_t offset;
    uint64_t length;
    const void *data; /* WRITE: `length` bytes, inside the buffer */
};

/*
 * Read the request that fills `buffer`; `data_bytes_max` is the most that a READ or WRITE may carry.
 *
 * 0; -EBADMSG if not even the header is whole, so that nobody can be answered; else the error that the request is to be
 * answered with, and `request` has `unique` and `answered`.
 */
int af_parse(const void *buffer, size_t length, uint32_t data_bytes_max, struct af_request *request);

/* Tell pyfuse3 a request's tag, in the header's `pid`. The message has a whole header. */
void af_set_tag(void *buffer, uint32_t tag);

/*
 * The length of the INIT request that lies at the beginning of `room` bytes; 0: there are zeros, so none. -EBADMSG:
 * something else.
 */
ssize_t af_init_length(const void *kept, size_t room);

/*
 * Adjusting what passes between kernel and libfuse. All return false, and change nothing, if the message is not whole.
 */

/* What the kernel offered. */
struct af_offer {
    uint64_t flags;
    bool whole; /* false: no INIT has been seen */
};

/* The kernel's INIT, on its way to libfuse: it can splice neither from nor to a socket. */
bool af_adjust_init_request(void *buffer, size_t length, struct af_offer *offer);
/* libfuse's answer to INIT: ask for what the front makes use of, as far as it was offered. */
bool af_adjust_init_answer(void *buffer, size_t length, const struct af_offer *offer, uint32_t data_bytes_max);
/* The answer to an O_DIRECT open: past the page cache, and several writes at once. */
bool af_adjust_open_answer(void *buffer, size_t length, bool create, const struct af_offer *offer);

#endif
