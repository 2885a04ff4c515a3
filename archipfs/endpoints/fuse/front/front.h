/*
 * The front: threads on /dev/fuse that answer READ, WRITE, FALLOCATE, LSEEK and FSYNC of open volumes out of their
 * engines, and hand all other requests to libfuse (and so to pyfuse3) over a SOCK_SEQPACKET pair, one message a request
 * or answer. IOCTL and COPY_FILE_RANGE, for which pyfuse3 has no handlers, are upcalls: they go over a second such
 * pair, as they came, and whoever reads them there answers on /dev/fuse.
 *
 * Plain C11: no Python, no globals. Results are 0 or a negative errno.
 */
#ifndef ARCHIPFS_FRONT_H
#define ARCHIPFS_FRONT_H

#include <stdbool.h>
#include <stdint.h>

#define AF_THREADS_MAX 64u

struct ae_calls;
struct ae_volume;
struct af_front;

struct af_options {
    int device;             /* /dev/fuse, mounted; stays the caller's, and open until af_front_stop has returned */
    int socket;             /* our end of the pair to libfuse; the same */
    int upcalls;            /* our end of a second such pair; the same */
    int session;            /* memfd of the session (docs/format.md); the same. -1: nothing is kept */
    uint32_t seats;         /* threads that read requests at a time: 1 to AF_THREADS_MAX */
    uint32_t request_bytes; /* of data in a READ or WRITE at most: a multiple of the page size */
    const struct ae_calls *engine;
};

/*
 * Takes its place between libfuse and the kernel, and reads no requests yet: volumes can be registered before it does.
 * If the session holds an INIT request, which a process before us had, libfuse gets it again now, and its answer goes
 * nowhere. -EBADMSG: what the session holds is no INIT request.
 */
int af_front_start(const struct af_options *options, struct af_front **front);
/*
 * Begins to read requests; once. In a session that is taken up again the kernel is first asked to send again what has
 * no answer yet. When it fails, there is only af_front_stop left.
 */
int af_front_serve(struct af_front *front);

/* Readable once libfuse's answer to INIT has passed, or gone nowhere. */
int af_front_initialised_fd(const struct af_front *front);
/* Whether another process can go on from the session: the kernel sends again what had no answer. Known once
 * initialised. */
bool af_front_resumable(const struct af_front *front);
/*
 * The number of the request that libfuse has and that has `tag` in its header's `pid`; `resent` is whether the kernel
 * sends it again. The number is the same each time it is sent. 0: there is none, or it is answered.
 */
uint64_t af_front_number(struct af_front *front, uint32_t tag, bool *resent);

/* Readable as soon as the kernel has ended the connection: unmounted, or aborted. */
int af_front_ended_fd(const struct af_front *front);

/*
 * From now on answer requests for `node` out of `volume`, which may grow to `size_max` bytes. -EEXIST: it is known
 * already. When this fails, libfuse goes on getting those requests.
 */
int af_front_register(struct af_front *front, uint64_t node, struct ae_volume *volume, uint64_t size_max);
/* Waits until no request is inside the volume any more. Of a node that is not known, nothing. */
void af_front_unregister(struct af_front *front, uint64_t node);

/*
 * Requests under way in the engine are answered, and no more are read. libfuse and the upcalls get no more: what was
 * read and cannot be handed on is left without an answer. Either the connection ends now, and with it all requests, or
 * another process gets them again.
 */
void af_front_drain(struct af_front *front);
/*
 * Drains, ends all threads and frees the front. End the connection before (umount2 with MNT_FORCE does): a notification
 * may be waiting in the kernel for a request that nobody will answer any more.
 */
void af_front_stop(struct af_front *front);

struct af_statistics {
    uint64_t served;    /* requests answered here */
    uint64_t forwarded; /* requests handed to libfuse, and upcalls */
    uint64_t volumes;   /* registered now */
    uint64_t threads;   /* that read and serve requests, those without a seat too */
    uint64_t seated;    /* of these, those that read requests, or carry out what need not wait */
};

void af_front_statistics(struct af_front *front, struct af_statistics *statistics);

#endif
