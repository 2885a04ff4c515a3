/*
 * The threads, with a socket in the kernel's place, another one in libfuse's, and an engine that waits when it is told
 * to.
 */
#include "front.h"

#include "anew.h"
#include "buffer.h"
#include "check.h"
#include "engine.h"
#include "far.h"
#include "landing.h"
#include "message.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

_Thread_local uint64_t check_seed;

#define NODE 42u
#define REQUEST_BYTES 4096u
#define LONG_MS 10000
#define SHORT_MS 150

/* An engine of which every call can be made to wait. */

struct ae_volume {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool closed;     /* calls wait while it is */
    bool reads_wait; /* a read would wait for a disk */
    bool waits;      /* its data lies behind a network */
    atomic_int inside;
    atomic_ullong size;
    atomic_ullong discards;
    atomic_int sync_result;
    atomic_int syncs;
    atomic_int failure; /* what calls that may wait come to; 0: what they should */
    bool begins;        /* reads and writes are begun, and land when the test has them */
    struct {
        struct ae_begun *begun;
        void *buffer; /* of a read */
        size_t length;
        uint64_t offset;
        int result;
    } begun[AF_BEGUN_MAX];
    unsigned begun_count;
};

static void volume_init(struct ae_volume *volume) {
    *volume = (struct ae_volume){.size = 8192};
    CHECK(pthread_mutex_init(&volume->mutex, NULL) == 0 && pthread_cond_init(&volume->changed, NULL) == 0);
}

static void set_closed(struct ae_volume *volume, bool closed) {
    pthread_mutex_lock(&volume->mutex);
    volume->closed = closed;
    pthread_cond_broadcast(&volume->changed);
    pthread_mutex_unlock(&volume->mutex);
}

static void enter(struct ae_volume *volume) {
    atomic_fetch_add(&volume->inside, 1);
    pthread_mutex_lock(&volume->mutex);
    while (volume->closed)
        pthread_cond_wait(&volume->changed, &volume->mutex);
    pthread_mutex_unlock(&volume->mutex);
    atomic_fetch_sub(&volume->inside, 1);
}

static ssize_t fake_read(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset) {
    enter(volume);
    if (atomic_load(&volume->failure) != 0)
        return atomic_load(&volume->failure);
    memset(buffer, (int)(offset / 4096) + 'a', length);
    return (ssize_t)length;
}

static ssize_t fake_read_nowait(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset) {
    pthread_mutex_lock(&volume->mutex);
    bool waits = volume->reads_wait;
    pthread_mutex_unlock(&volume->mutex);
    if (waits)
        return -EAGAIN;
    memset(buffer, (int)(offset / 4096) + 'a', length);
    return (ssize_t)length;
}

static ssize_t fake_write(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset) {
    (void)offset;
    enter(volume);
    if (atomic_load(&volume->failure) != 0)
        return atomic_load(&volume->failure);
    return memchr(buffer, '!', length) != NULL ? -EIO : (ssize_t)length;
}

static int fake_discard(struct ae_volume *volume, uint64_t offset, uint64_t length) {
    (void)offset;
    enter(volume);
    atomic_fetch_add(&volume->discards, length);
    return 0;
}

static int fake_grow(struct ae_volume *volume, uint64_t size) {
    if (size > atomic_load(&volume->size))
        atomic_store(&volume->size, size);
    return 0;
}

static int64_t fake_seek(struct ae_volume *volume, uint64_t offset) {
    return offset < atomic_load(&volume->size) ? (int64_t)offset + 1 : -ENXIO;
}

static int fake_sync(struct ae_volume *volume) {
    enter(volume);
    atomic_fetch_add(&volume->syncs, 1);
    return atomic_load(&volume->sync_result);
}

static int begin(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset, struct ae_begun *begun) {
    pthread_mutex_lock(&volume->mutex);
    bool begins = volume->begins;
    if (begins) {
        CHECK(volume->begun_count < AF_BEGUN_MAX);
        begun->volume = volume;
        begun->length = volume->begun_count;
        volume->begun[volume->begun_count].begun = begun;
        volume->begun[volume->begun_count].buffer = buffer;
        volume->begun[volume->begun_count].length = length;
        volume->begun[volume->begun_count].offset = offset;
        volume->begun[volume->begun_count++].result = 0;
    }
    pthread_mutex_unlock(&volume->mutex);
    return begins ? 0 : -EAGAIN;
}

static int fake_read_begin(struct ae_volume *volume, void *buffer, size_t length, uint64_t offset,
                           struct ae_begun *begun) {
    return begin(volume, buffer, length, offset, begun);
}

static int fake_write_begin(struct ae_volume *volume, const void *buffer, size_t length, uint64_t offset,
                            struct ae_begun *begun) {
    (void)buffer;
    return begin(volume, NULL, length, offset, begun);
}

static ssize_t fake_settle(struct ae_begun *begun) {
    struct ae_volume *volume = begun->volume;
    pthread_mutex_lock(&volume->mutex);
    size_t at = begun->length;
    if (volume->begun[at].buffer != NULL)
        memset(volume->begun[at].buffer, (int)(volume->begun[at].offset / 4096) + 'A', volume->begun[at].length);
    ssize_t result = volume->begun[at].result < 0 ? volume->begun[at].result : (ssize_t)volume->begun[at].length;
    pthread_mutex_unlock(&volume->mutex);
    return result;
}

static void await_begun(struct ae_volume *volume, unsigned count) {
    for (int i = 0;; i++) {
        pthread_mutex_lock(&volume->mutex);
        unsigned begun = volume->begun_count;
        pthread_mutex_unlock(&volume->mutex);
        if (begun == count)
            return;
        CHECK(begun < count && i < LONG_MS);
        usleep(1000);
    }
}

static void land(struct ae_volume *volume, unsigned at, int result) {
    pthread_mutex_lock(&volume->mutex);
    volume->begun[at].result = result;
    struct ae_begun *begun = volume->begun[at].begun;
    pthread_mutex_unlock(&volume->mutex);
    begun->transfer.landed(&begun->transfer);
}

static bool fake_waits(struct ae_volume *volume) { return volume->waits; }

static const struct ae_calls engine = {
    .read = fake_read,
    .read_nowait = fake_read_nowait,
    .write = fake_write,
    .read_begin = fake_read_begin,
    .write_begin = fake_write_begin,
    .settle = fake_settle,
    .discard = fake_discard,
    .write_zeros = fake_discard,
    .grow = fake_grow,
    .seek_data = fake_seek,
    .seek_hole = fake_seek,
    .sync = fake_sync,
    .waits = fake_waits,
};

/* A front between three sockets */

struct bench {
    int kernel; /* what the kernel holds of it */
    int device; /* what the front holds */
    int libfuse;
    int socket;
    int upcalled;
    int upcalls;
    int session; /* -1: none */
    struct af_front *front;
    struct ae_volume volume;
};

static void pair_make(int *theirs, int *ours) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    *theirs = pair[0];
    *ours = pair[1];
}

/* Up to where it would read the first request. */
static void bench_prepare(struct bench *bench, uint32_t seats, int session) {
    pair_make(&bench->kernel, &bench->device);
    pair_make(&bench->libfuse, &bench->socket);
    pair_make(&bench->upcalled, &bench->upcalls);
    bench->session = session;
    volume_init(&bench->volume);
    struct af_options options = {
        .device = bench->device,
        .socket = bench->socket,
        .upcalls = bench->upcalls,
        .session = session,
        .seats = seats,
        .request_bytes = REQUEST_BYTES,
        .engine = &engine,
    };
    CHECK(af_front_start(&options, &bench->front) == 0);
    CHECK(af_front_register(bench->front, NODE, &bench->volume, 1 << 20) == 0);
}

static void bench_start(struct bench *bench, uint32_t seats) {
    bench_prepare(bench, seats, -1);
    CHECK(af_front_serve(bench->front) == 0);
}

static void bench_close(struct bench *bench) {
    close(bench->kernel);
    close(bench->device);
    close(bench->libfuse);
    close(bench->socket);
    close(bench->upcalled);
    close(bench->upcalls);
    pthread_cond_destroy(&bench->volume.changed);
    pthread_mutex_destroy(&bench->volume.mutex);
}

static void bench_stop(struct bench *bench) {
    af_front_stop(bench->front);
    bench_close(bench);
}

static bool readable(int descriptor, int timeout_ms) {
    struct pollfd polled = {.fd = descriptor, .events = POLLIN};
    return poll(&polled, 1, timeout_ms) == 1;
}

static void give(int descriptor, const struct message *message) {
    CHECK(send(descriptor, message->bytes, message->length, MSG_NOSIGNAL) == (ssize_t)message->length);
}

static struct message take(int descriptor) {
    struct message message;
    CHECK(readable(descriptor, LONG_MS));
    ssize_t length = recv(descriptor, message.bytes, sizeof message.bytes, 0);
    CHECK(length > 0);
    message.length = (size_t)length;
    return message;
}

static struct fuse_in_header header_of(struct message message) {
    struct fuse_in_header header;
    memcpy(&header, message.bytes, sizeof header);
    return header;
}

static uint32_t opcode_of(struct message message) { return header_of(message).opcode; }

/* Whether `seen` is what was sent, but for the tag. */
static bool is_handed_on(struct message seen, struct message sent) {
    size_t at = offsetof(struct fuse_in_header, pid);
    memset(seen.bytes + at, 0, sizeof(uint32_t));
    memset(sent.bytes + at, 0, sizeof(uint32_t));
    return seen.length == sent.length && memcmp(seen.bytes, sent.bytes, sent.length) == 0;
}

/* The answer to `unique`, and what it carries. */
static int take_answer(struct bench *bench, uint64_t unique, void *body, size_t length) {
    struct message message = take(bench->kernel);
    struct fuse_out_header header;
    CHECK(message.length >= sizeof header);
    memcpy(&header, message.bytes, sizeof header);
    CHECK_EQUAL(header.len, message.length);
    CHECK_EQUAL(header.unique, unique);
    if (header.error == 0) {
        CHECK_EQUAL(message.length, sizeof header + length);
        if (length > 0)
            memcpy(body, message.bytes + sizeof header, length);
    }
    return header.error;
}

static void ask_read(struct bench *bench, uint64_t unique, uint64_t offset) {
    struct fuse_read_in in = {.offset = offset, .size = REQUEST_BYTES};
    struct message message = message_make(FUSE_READ, unique, NODE, &in, sizeof in);
    give(bench->kernel, &message);
}

static void ask_write(struct bench *bench, uint64_t unique, const char *text) {
    struct fuse_write_in in = {.size = (uint32_t)strlen(text)};
    struct message message = message_make(FUSE_WRITE, unique, NODE, &in, sizeof in);
    message_add(&message, text, strlen(text));
    give(bench->kernel, &message);
}

static void ask_sync(struct bench *bench, uint64_t unique, uint64_t node) {
    struct fuse_fsync_in in = {.fsync_flags = unique % 2 ? FUSE_FSYNC_FDATASYNC : 0};
    struct message message = message_make(FUSE_FSYNC, unique, node, &in, sizeof in);
    give(bench->kernel, &message);
}

static void expect_read(struct bench *bench, uint64_t unique, char byte) {
    char body[REQUEST_BYTES];
    CHECK_EQUAL(take_answer(bench, unique, body, sizeof body), 0);
    for (size_t i = 0; i < sizeof body; i++)
        CHECK(body[i] == byte);
}

static void await_inside(struct bench *bench, int count) {
    for (int i = 0; i < LONG_MS && atomic_load(&bench->volume.inside) != count; i++)
        usleep(1000);
    CHECK_EQUAL(atomic_load(&bench->volume.inside), count);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Tests */

static void test_served(void) {
    struct bench bench;
    bench_start(&bench, 2);
    ask_read(&bench, 1, 8192);
    expect_read(&bench, 1, 'c');
    struct fuse_write_out written;
    ask_write(&bench, 2, "text");
    CHECK_EQUAL(take_answer(&bench, 2, &written, sizeof written), 0);
    CHECK_EQUAL(written.size, 4);
    ask_write(&bench, 3, "fails!");
    CHECK_EQUAL(take_answer(&bench, 3, NULL, 0), -EIO);

    struct fuse_lseek_in seek = {.offset = 10, .whence = SEEK_DATA};
    struct fuse_lseek_out found;
    struct message message = message_make(FUSE_LSEEK, 4, NODE, &seek, sizeof seek);
    give(bench.kernel, &message);
    CHECK_EQUAL(take_answer(&bench, 4, &found, sizeof found), 0);
    CHECK_EQUAL(found.offset, 11);

    struct fuse_fallocate_in allocate = {.offset = 4096, .length = 8192};
    message = message_make(FUSE_FALLOCATE, 5, NODE, &allocate, sizeof allocate);
    give(bench.kernel, &message);
    CHECK_EQUAL(take_answer(&bench, 5, NULL, 0), 0);
    CHECK_EQUAL(atomic_load(&bench.volume.size), 12288);
    allocate.length = 2 << 20; /* more than the volume may have */
    message = message_make(FUSE_FALLOCATE, 6, NODE, &allocate, sizeof allocate);
    give(bench.kernel, &message);
    CHECK_EQUAL(take_answer(&bench, 6, NULL, 0), -EFBIG);

    struct af_statistics statistics;
    af_front_statistics(bench.front, &statistics);
    CHECK(statistics.forwarded == 0 && statistics.volumes == 1);
    CHECK(!readable(bench.libfuse, 0));
    bench_stop(&bench);
}

static void test_forwarded(void) {
    struct bench bench;
    bench_start(&bench, 2);
    struct message request = message_make(FUSE_GETATTR, 1, NODE, "whatever", 8);
    give(bench.kernel, &request);
    struct message seen = take(bench.libfuse);
    CHECK(is_handed_on(seen, request));
    struct fuse_out_header header = {.len = sizeof header, .unique = 1, .error = -ENOENT};
    struct message answer = {.length = sizeof header};
    memcpy(answer.bytes, &header, sizeof header);
    give(bench.libfuse, &answer);
    CHECK_EQUAL(take_answer(&bench, 1, NULL, 0), -ENOENT);

    /* A notification, unchanged. */
    header = (struct fuse_out_header){.len = sizeof header, .error = FUSE_NOTIFY_INVAL_INODE};
    memcpy(answer.bytes, &header, sizeof header);
    give(bench.libfuse, &answer);
    seen = take(bench.kernel);
    CHECK(seen.length == sizeof header && memcmp(seen.bytes, &header, sizeof header) == 0);

    /* What is of no volume that is known goes to libfuse, unless that would answer ENOSYS. */
    struct fuse_read_in read_in = {.size = 1};
    request = message_make(FUSE_READ, 2, NODE + 1, &read_in, sizeof read_in);
    give(bench.kernel, &request);
    seen = take(bench.libfuse);
    CHECK(seen.length == request.length);
    struct fuse_fallocate_in allocate = {.length = 1};
    request = message_make(FUSE_FALLOCATE, 3, NODE + 1, &allocate, sizeof allocate);
    give(bench.kernel, &request);
    CHECK_EQUAL(take_answer(&bench, 3, NULL, 0), -EOPNOTSUPP);

    /* Interrupts end here, and what is malformed is answered here. */
    request = message_make(FUSE_INTERRUPT, 4, 0, "12345678", 8);
    give(bench.kernel, &request);
    request = message_make(FUSE_READ, 5, NODE, "", 0);
    give(bench.kernel, &request);
    CHECK_EQUAL(take_answer(&bench, 5, NULL, 0), -EINVAL);
    CHECK(!readable(bench.libfuse, SHORT_MS));
    bench_stop(&bench);
}

static void test_adjusted(void) {
    struct bench bench;
    bench_start(&bench, 1);
    struct fuse_init_in init = {
        .major = 7, .flags = FUSE_SPLICE_READ | FUSE_ASYNC_DIO | FUSE_INIT_EXT, .flags2 = 1u << 4};
    struct message message = message_make(FUSE_INIT, 1, 0, &init, sizeof init);
    give(bench.kernel, &message);
    message = take(bench.libfuse);
    memcpy(&init, message.bytes + sizeof(struct fuse_in_header), sizeof init);
    CHECK_EQUAL(init.flags, FUSE_ASYNC_DIO | FUSE_INIT_EXT);
    struct {
        struct fuse_out_header header;
        struct fuse_init_out out;
    } answer = {.header = {.len = sizeof answer, .unique = 1}};
    CHECK(send(bench.libfuse, &answer, sizeof answer, 0) == sizeof answer);
    struct fuse_init_out out;
    CHECK_EQUAL(take_answer(&bench, 1, &out, sizeof out), 0);
    CHECK(out.max_write == REQUEST_BYTES && (out.flags & FUSE_ASYNC_DIO) && out.flags2 == 1u << 4);

    for (int direct = 0; direct < 2; direct++) {
        struct fuse_open_in open_in = {.flags = O_RDWR | (direct ? O_DIRECT : 0)};
        message = message_make(FUSE_OPEN, 2, NODE, &open_in, sizeof open_in);
        give(bench.kernel, &message);
        take(bench.libfuse);
        struct {
            struct fuse_out_header header;
            struct fuse_open_out out;
        } opened = {.header = {.len = sizeof opened, .unique = 2}};
        CHECK(send(bench.libfuse, &opened, sizeof opened, 0) == sizeof opened);
        struct fuse_open_out open_out;
        CHECK_EQUAL(take_answer(&bench, 2, &open_out, sizeof open_out), 0);
        CHECK_EQUAL(open_out.open_flags, direct ? FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES : 0);
    }
    bench_stop(&bench);
}

/* A session */

static int session_make(const struct message *init) {
    int session = memfd_create("session", MFD_CLOEXEC);
    CHECK(session >= 0 && ftruncate(session, 12288) == 0);
    if (init != NULL)
        CHECK(pwrite(session, init->bytes, init->length, 4096) == (ssize_t)init->length);
    return session;
}

static struct message make_init(uint64_t offered) {
    struct fuse_init_in in = {.major = 7, .minor = 45, .flags = FUSE_SPLICE_READ | FUSE_INIT_EXT};
    in.flags |= (uint32_t)offered;
    in.flags2 = (uint32_t)(offered >> 32);
    return message_make(FUSE_INIT, 2, 0, &in, sizeof in);
}

static void answer_init(struct bench *bench) {
    struct {
        struct fuse_out_header header;
        struct fuse_init_out out;
    } answer = {.header = {.len = sizeof answer, .unique = 2}};
    CHECK(send(bench->libfuse, &answer, sizeof answer, 0) == sizeof answer);
}

static void check_init_is_kept(uint64_t offered) {
    struct message init = make_init(offered);
    struct bench bench;
    bench_prepare(&bench, 1, session_make(NULL));
    CHECK(af_front_serve(bench.front) == 0);
    give(bench.kernel, &init);
    struct message seen = take(bench.libfuse);
    CHECK(opcode_of(seen) == FUSE_INIT && !is_handed_on(seen, init)); /* adjusted, which what is kept is not */
    struct message kept = {.length = init.length};
    CHECK(pread(bench.session, kept.bytes, kept.length, 4096) == (ssize_t)kept.length);
    CHECK(memcmp(kept.bytes, init.bytes, init.length) == 0);

    CHECK(!readable(af_front_initialised_fd(bench.front), SHORT_MS));
    answer_init(&bench);
    struct fuse_init_out out;
    CHECK_EQUAL(take_answer(&bench, 2, &out, sizeof out), 0);
    CHECK_EQUAL(out.flags2, offered >> 32);
    CHECK(readable(af_front_initialised_fd(bench.front), LONG_MS));
    CHECK_EQUAL(af_front_resumable(bench.front), offered != 0);
    close(bench.session);
    bench_stop(&bench);
}

static void test_init_is_kept_before_libfuse_has_it(void) {
    check_init_is_kept(AF_HAS_RESEND);
    check_init_is_kept(0); /* of an old kernel */
}

static void test_init_that_cannot_be_kept_fails(void) {
    struct message init = make_init(AF_HAS_RESEND);
    struct bench bench;
    bench_prepare(&bench, 1, session_make(NULL));
    CHECK(af_front_serve(bench.front) == 0);
    CHECK(close(bench.session) == 0);
    give(bench.kernel, &init);
    CHECK_EQUAL(take_answer(&bench, 2, NULL, 0), -EBADF);
    CHECK(!readable(bench.libfuse, 0));
    bench_stop(&bench);
}

static void test_a_session_is_taken_up_again(void) {
    struct message init = make_init(AF_HAS_RESEND);
    struct bench bench;
    bench_prepare(&bench, 1, session_make(&init));
    struct message seen = take(bench.libfuse);
    CHECK(opcode_of(seen) == FUSE_INIT && header_of(seen).unique == 2 && !is_handed_on(seen, init));
    CHECK(!readable(af_front_initialised_fd(bench.front), 0));
    answer_init(&bench);
    CHECK(readable(af_front_initialised_fd(bench.front), LONG_MS));
    CHECK(af_front_resumable(bench.front));

    ask_read(&bench, 4, 0);
    CHECK(!readable(bench.kernel, SHORT_MS)); /* neither the answer to INIT, nor one to what is not read yet */
    CHECK(af_front_serve(bench.front) == 0);
    struct fuse_out_header resend;
    seen = take(bench.kernel);
    CHECK_EQUAL(seen.length, sizeof resend);
    memcpy(&resend, seen.bytes, sizeof resend);
    CHECK(resend.len == sizeof resend && resend.unique == 0 && resend.error == AF_NOTIFY_RESEND);
    expect_read(&bench, 4, 'a');
    CHECK(!readable(bench.kernel, SHORT_MS)); /* asked once */
    close(bench.session);
    bench_stop(&bench);
}

static void test_nothing_is_sent_again_in_a_new_session(void) {
    struct bench bench;
    bench_prepare(&bench, 1, session_make(NULL));
    ask_read(&bench, 4, 0);
    CHECK(!readable(bench.libfuse, SHORT_MS) && !readable(bench.kernel, 0));
    CHECK(af_front_serve(bench.front) == 0);
    expect_read(&bench, 4, 'a');
    CHECK(!readable(bench.libfuse, 0) && !readable(bench.kernel, 0));
    close(bench.session);
    bench_stop(&bench);
}

static void test_a_damaged_session(void) {
    struct message init = make_init(0);
    init.bytes[offsetof(struct fuse_in_header, opcode)]++;
    struct af_options options = {.device = -1,
                                 .socket = -1,
                                 .upcalls = -1,
                                 .session = session_make(&init),
                                 .seats = 1,
                                 .request_bytes = REQUEST_BYTES,
                                 .engine = &engine};
    struct af_front *front;
    CHECK_EQUAL(af_front_start(&options, &front), -EBADMSG);
    close(options.session);
}

static void test_stopping_before_anything_was_read(void) {
    struct bench bench;
    bench_prepare(&bench, 2, -1);
    bench_stop(&bench);
}

/* Numbers */

static void test_the_tag_of_a_request_leads_to_its_number_until_it_is_answered(void) {
    static const uint64_t numbers[] = {2, 4, UINT64_C(1) << 33, (UINT64_C(1) << 62) + 2, INT64_MAX - 1};
    enum { COUNT = sizeof numbers / sizeof numbers[0] };
    struct bench bench;
    bench_start(&bench, 1);
    bool resent;
    uint32_t tags[2 * COUNT];
    for (unsigned i = 0; i < 2 * COUNT; i++) {
        uint64_t unique = numbers[i / 2] | (i % 2 ? AF_UNIQUE_RESEND : 0);
        struct message request = message_make(FUSE_MKNOD, unique, NODE, "name", 5);
        give(bench.kernel, &request);
        struct fuse_in_header header = header_of(take(bench.libfuse));
        CHECK(header.unique == unique); /* the answer needs it as it came */
        tags[i] = header.pid;
    }
    for (unsigned i = 0; i < 2 * COUNT; i++) {
        CHECK(tags[i] > 0 && tags[i] <= INT32_MAX); /* a pid_t for pyfuse3 */
        CHECK(af_front_number(bench.front, tags[i], &resent) == numbers[i / 2] && resent == (i % 2 == 1));
    }
    struct fuse_out_header out = {.len = sizeof out, .unique = numbers[1] | AF_UNIQUE_RESEND};
    CHECK(send(bench.libfuse, &out, sizeof out, 0) == sizeof out);
    CHECK_EQUAL(take_answer(&bench, out.unique, NULL, 0), 0);
    CHECK_EQUAL(af_front_number(bench.front, tags[3], &resent), 0);
    CHECK(af_front_number(bench.front, tags[2], &resent) == numbers[1] && !resent);
    CHECK_EQUAL(af_front_number(bench.front, 0, &resent), 0);
    CHECK_EQUAL(af_front_number(bench.front, UINT32_MAX, &resent), 0);

    /* Nobody answers it, so nothing is noted. */
    struct message request = message_make(FUSE_FORGET, 6, NODE, "12345678", 8);
    give(bench.kernel, &request);
    CHECK_EQUAL(header_of(take(bench.libfuse)).pid, 0);
    bench_stop(&bench);
}

/* Upcalls */

static void test_upcalls_go_their_own_way_as_they_came(void) {
    struct bench bench;
    bench_start(&bench, 1);
    struct fuse_ioctl_in ioctl_in = {.cmd = 7, .in_size = 4};
    struct fuse_copy_file_range_in copy_in = {.len = 1 << 20};
    struct message requests[] = {
        message_make(FUSE_IOCTL, 2, NODE, &ioctl_in, sizeof ioctl_in),
        message_make(FUSE_COPY_FILE_RANGE, 4, NODE, &copy_in, sizeof copy_in),
        message_make(AF_COPY_FILE_RANGE_64, 6 | AF_UNIQUE_RESEND, NODE + 1, &copy_in, sizeof copy_in),
    };
    message_add(&requests[0], "four", 4);
    for (size_t i = 0; i < sizeof requests / sizeof requests[0]; i++) {
        struct fuse_in_header header = header_of(requests[i]);
        header.pid = 1234;
        memcpy(requests[i].bytes, &header, sizeof header);
        give(bench.kernel, &requests[i]);
        struct message seen = take(bench.upcalled);
        CHECK_EQUAL(seen.length, requests[i].length);
        CHECK(memcmp(seen.bytes, requests[i].bytes, seen.length) == 0);
    }
    struct message cut = message_make(FUSE_COPY_FILE_RANGE, 8, NODE, &copy_in, sizeof copy_in - 1);
    give(bench.kernel, &cut);
    CHECK_EQUAL(take_answer(&bench, 8, NULL, 0), -EINVAL);
    CHECK(!readable(bench.upcalled, 0) && !readable(bench.libfuse, 0) && !readable(bench.kernel, 0));
    af_front_drain(bench.front);
    char byte;
    CHECK(readable(bench.upcalled, LONG_MS));
    CHECK_EQUAL(recv(bench.upcalled, &byte, 1, 0), 0); /* its reader sees the end */
    bench_stop(&bench);
}

static void test_what_nobody_is_there_to_carry_out_is_not_answered(void) {
    struct bench bench;
    bench_start(&bench, 1);
    shutdown(bench.libfuse, SHUT_RDWR);
    shutdown(bench.upcalled, SHUT_RDWR);
    struct fuse_copy_file_range_in copy_in = {.len = 1};
    struct fuse_open_in open_in = {.flags = O_DIRECT};
    struct message requests[] = {
        message_make(FUSE_GETATTR, 2, NODE, "", 0),
        message_make(FUSE_OPEN, 4, NODE, &open_in, sizeof open_in),
        message_make(FUSE_COPY_FILE_RANGE, 6, NODE, &copy_in, sizeof copy_in),
    };
    for (size_t i = 0; i < sizeof requests / sizeof requests[0]; i++)
        give(bench.kernel, &requests[i]);
    ask_read(&bench, 8, 0); /* behind them, and the first that is answered */
    expect_read(&bench, 8, 'a');
    CHECK(!readable(bench.kernel, SHORT_MS));
    bench_stop(&bench);
}

/* With one seat: whoever waits has to give it up. */
static void test_slow_requests_do_not_hold_up_fast_ones(void) {
    struct bench bench;
    bench_start(&bench, 1);
    set_closed(&bench.volume, true);
    for (uint64_t unique = 1; unique <= 20; unique++)
        ask_write(&bench, unique, "slow");
    await_inside(&bench, 20);
    ask_read(&bench, 100, 0);
    expect_read(&bench, 100, 'a');

    pthread_mutex_lock(&bench.volume.mutex);
    bench.volume.reads_wait = true;
    pthread_mutex_unlock(&bench.volume.mutex);
    for (uint64_t unique = 21; unique <= 40; unique++)
        ask_read(&bench, unique, 0);
    await_inside(&bench, 40);
    struct message request = message_make(FUSE_GETATTR, 101, NODE, "", 0);
    give(bench.kernel, &request);
    take(bench.libfuse);
    set_closed(&bench.volume, false);
    bool seen[41] = {false};
    for (int i = 1; i <= 40; i++) {
        struct message message = take(bench.kernel);
        struct fuse_out_header header;
        memcpy(&header, message.bytes, sizeof header);
        CHECK(header.error == 0 && header.unique >= 1 && header.unique <= 40 && !seen[header.unique]);
        seen[header.unique] = true;
    }
    struct af_statistics statistics;
    af_front_statistics(bench.front, &statistics);
    CHECK(statistics.threads > 40 && statistics.threads <= AF_THREADS_MAX);
    ask_read(&bench, 102, 4096);
    expect_read(&bench, 102, 'b');
    bench_stop(&bench);
}

static void *open_up(void *argument) {
    usleep(50000);
    set_closed(argument, false);
    return NULL;
}

/* How long it takes until so many writes to a volume behind a network are all inside; then they are answered. */
static uint64_t writes_together_ns(struct bench *bench, int count) {
    set_closed(&bench->volume, true);
    uint64_t begun = now_ns();
    for (int unique = 1; unique <= count; unique++)
        ask_write(bench, (uint64_t)unique, "far away");
    while (atomic_load(&bench->volume.inside) < count && now_ns() - begun < LONG_MS * 1000000ull)
        sched_yield();
    uint64_t taken = now_ns() - begun;
    CHECK_EQUAL(atomic_load(&bench->volume.inside), count);
    set_closed(&bench->volume, false);
    for (int i = 0; i < count; i++)
        CHECK_EQUAL(take(bench->kernel).length, sizeof(struct fuse_out_header) + sizeof(struct fuse_write_out));
    return taken;
}

/* With two seats, the watch would need as many of its periods of 10 ms as there are pairs of writes. */
static void test_writes_that_wait_for_a_network_are_under_way_together_at_once(void) {
    enum { COUNT = 48, WATCH_MS = COUNT / 2 * 10 };
    struct bench bench;
    bench_start(&bench, 2);
    bench.volume.waits = true;
    uint64_t best = UINT64_MAX;
    for (int attempt = 0; attempt < 10 && best > WATCH_MS / 2 * 1000000ull; attempt++) {
        uint64_t taken = writes_together_ns(&bench, COUNT);
        best = taken < best ? taken : best;
    }
    CHECK(best <= WATCH_MS / 2 * 1000000ull);
    bench_stop(&bench);
}

static void ask_write_near(struct bench *bench, uint64_t unique) {
    struct fuse_write_in in = {.size = 4};
    struct message message = message_make(FUSE_WRITE, unique, NODE + 1, &in, sizeof in);
    message_add(&message, "near", 4);
    give(bench->kernel, &message);
}

static bool stays_inside(struct bench *bench, int count) {
    for (int i = 0; i < 30; i++) {
        if (atomic_load(&bench->volume.inside) != count)
            return false;
        usleep(1000);
    }
    return true;
}

static uint64_t seated(struct bench *bench) {
    struct af_statistics statistics;
    af_front_statistics(bench->front, &statistics);
    return statistics.seated;
}

static void await_seated(struct bench *bench, uint64_t least, uint64_t most) {
    uint64_t begun = now_ns();
    while (seated(bench) < least || seated(bench) > most) {
        CHECK(now_ns() - begun < LONG_MS * 1000000ull);
        sched_yield();
    }
}

static void test_who_waited_for_a_network_reads_on_beside_the_seats_until_other_requests_come(void) {
    struct bench bench;
    bench_start(&bench, 2);
    bench.volume.waits = true;
    writes_together_ns(&bench, 40);
    await_seated(&bench, 18, 18);
    CHECK(writes_together_ns(&bench, 16) < LONG_MS * 1000000ull);
    await_seated(&bench, 18, 18);
    bench.volume.waits = false;
    for (uint64_t unique = 1; unique <= 100; unique++) {
        ask_read(&bench, unique, 0);
        expect_read(&bench, unique, 'a');
    }
    await_seated(&bench, 2, 2);
    bench_stop(&bench);
}

/* However many requests it has, and as long as it may take. */
static void test_a_volume_behind_a_network_holds_up_no_other(void) {
    enum { COUNT = 200, FAILS = 150, SYNC = 201 };
    struct bench bench;
    struct ae_volume near;
    bench_start(&bench, 2);
    volume_init(&near);
    CHECK_EQUAL(af_front_register(bench.front, NODE + 1, &near, 1 << 20), 0);
    bench.volume.waits = bench.volume.reads_wait = true;
    atomic_store(&bench.volume.sync_result, -EAGAIN);
    set_closed(&bench.volume, true);
    for (uint64_t unique = 1; unique <= COUNT; unique++)
        unique % 3 == 1 ? ask_read(&bench, unique, 8192) : ask_write(&bench, unique, unique == FAILS ? "no!" : "far");
    ask_sync(&bench, SYNC, NODE);
    await_inside(&bench, AF_FAR_MAX);
    for (uint64_t unique = 1000; unique < 1100; unique++) {
        struct fuse_write_out written;
        ask_write_near(&bench, unique);
        CHECK_EQUAL(take_answer(&bench, unique, &written, sizeof written), 0);
    }
    struct message request = message_make(FUSE_GETATTR, 2000, NODE, "", 0);
    give(bench.kernel, &request);
    CHECK_EQUAL(opcode_of(take(bench.libfuse)), FUSE_GETATTR);
    CHECK(stays_inside(&bench, AF_FAR_MAX));

    set_closed(&bench.volume, false);
    bool seen[COUNT + 1] = {false};
    for (int i = 0; i < COUNT; i++) {
        struct message message = take(bench.kernel);
        struct fuse_out_header header;
        memcpy(&header, message.bytes, sizeof header);
        CHECK(header.unique >= 1 && header.unique <= COUNT && !seen[header.unique]);
        seen[header.unique] = true;
        CHECK_EQUAL(header.error, header.unique == FAILS ? -EIO : 0);
        if (header.unique % 3 == 1)
            CHECK(message.length == sizeof header + REQUEST_BYTES && message.bytes[message.length - 1] == 'c');
    }
    request = take(bench.libfuse); /* parked, and left to the composer in the end */
    CHECK(opcode_of(request) == FUSE_FSYNC && header_of(request).unique == SYNC);
    CHECK(!readable(bench.kernel, 0));
    ask_write(&bench, 3000, "again");
    struct fuse_write_out written;
    CHECK_EQUAL(take_answer(&bench, 3000, &written, sizeof written), 0);
    bench_stop(&bench);
    pthread_cond_destroy(&near.changed);
    pthread_mutex_destroy(&near.mutex);
}

static void test_stopping_answers_what_is_parked(void) {
    enum { COUNT = AF_FAR_MAX + 20 };
    struct bench bench;
    bench_start(&bench, 2);
    bench.volume.waits = true;
    set_closed(&bench.volume, true);
    for (uint64_t unique = 1; unique <= COUNT; unique++)
        ask_write(&bench, unique, "far");
    await_inside(&bench, AF_FAR_MAX);
    CHECK(stays_inside(&bench, AF_FAR_MAX));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, open_up, &bench.volume) == 0);
    af_front_drain(bench.front);
    for (int i = 0; i < COUNT; i++)
        CHECK_EQUAL(take(bench.kernel).length, sizeof(struct fuse_out_header) + sizeof(struct fuse_write_out));
    CHECK(pthread_join(thread, NULL) == 0);
    bench_stop(&bench);
}

static void *unregister(void *argument) {
    struct bench *bench = argument;
    af_front_unregister(bench->front, NODE);
    CHECK_EQUAL(atomic_load(&bench->volume.inside), 0);
    return NULL;
}

/* Whether a read is served, or goes to libfuse. */
static bool is_let_in(struct bench *bench, uint64_t unique) {
    ask_read(bench, unique, 0);
    struct pollfd polled[2] = {{.fd = bench->kernel, .events = POLLIN}, {.fd = bench->libfuse, .events = POLLIN}};
    CHECK(poll(polled, 2, LONG_MS) > 0);
    if (polled[1].revents & POLLIN) {
        take(bench->libfuse);
        return false;
    }
    expect_read(bench, unique, 'a');
    return true;
}

/* What is begun */

static void bench_start_beginning(struct bench *bench, uint32_t seats) {
    bench_start(bench, seats);
    bench->volume.waits = bench->volume.reads_wait = bench->volume.begins = true;
}

static uint64_t threads_of(struct bench *bench) {
    struct af_statistics statistics;
    af_front_statistics(bench->front, &statistics);
    return statistics.threads;
}

static void expect_written(struct bench *bench, uint64_t unique, uint32_t size) {
    struct fuse_write_out written;
    CHECK_EQUAL(take_answer(bench, unique, &written, sizeof written), 0);
    CHECK_EQUAL(written.size, size);
}

static void test_what_is_begun_takes_no_thread_and_is_answered_when_it_lands(void) {
    enum { COUNT = 60 };
    struct bench bench;
    bench_start_beginning(&bench, 1);
    for (unsigned i = 0; i < COUNT; i++) {
        i % 2 == 0 ? ask_read(&bench, i + 1, 4096ull * i) : ask_write(&bench, i + 1, "begun");
        await_begun(&bench.volume, i + 1);
    }
    CHECK_EQUAL(threads_of(&bench), 1);
    CHECK(!readable(bench.kernel, 0));
    for (unsigned i = COUNT; i-- > 0;) {
        land(&bench.volume, i, 0);
        if (i % 2 == 0)
            expect_read(&bench, i + 1, (char)('A' + i));
        else
            expect_written(&bench, i + 1, 5);
    }
    struct af_statistics statistics;
    af_front_drain(bench.front);
    af_front_statistics(bench.front, &statistics);
    CHECK_EQUAL(statistics.served, COUNT);
    CHECK_EQUAL(statistics.forwarded, 0);
    bench_stop(&bench);
}

static const int in_vain[] = {-EAGAIN, -ESHUTDOWN, -ESTALE, -ENOENT};
enum { IN_VAIN = sizeof in_vain / sizeof in_vain[0] };

static void test_what_was_begun_in_vain_is_done_anew(void) {
    struct bench bench;
    bench_start_beginning(&bench, 2);
    for (unsigned i = 0; i < IN_VAIN; i++) {
        ask_write(&bench, 2 * i + 1, "again");
        await_begun(&bench.volume, 2 * i + 1);
        land(&bench.volume, 2 * i, in_vain[i]);
        expect_written(&bench, 2 * i + 1, 5);
        ask_read(&bench, 2 * i + 2, 4096ull * i);
        await_begun(&bench.volume, 2 * i + 2);
        land(&bench.volume, 2 * i + 1, in_vain[i]);
        expect_read(&bench, 2 * i + 2, (char)('a' + i));
    }
    ask_write(&bench, 3000, "fails");
    await_begun(&bench.volume, 2 * IN_VAIN + 1);
    land(&bench.volume, 2 * IN_VAIN, -ENOSPC);
    CHECK_EQUAL(take_answer(&bench, 3000, NULL, 0), -ENOSPC);
    CHECK(!readable(bench.libfuse, 0));
    bench_stop(&bench);
}

static void test_what_is_in_vain_anew_goes_to_the_composer_as_it_came(void) {
    struct bench bench;
    bench_start_beginning(&bench, 2);
    for (unsigned i = 1; i < IN_VAIN; i++) {
        struct fuse_write_in in = {.size = 5};
        struct message message = message_make(FUSE_WRITE, i, NODE, &in, sizeof in);
        message_add(&message, "again", 5);
        give(bench.kernel, &message);
        await_begun(&bench.volume, i);
        /* Other messages go through the buffer that it was read into. */
        bench.volume.waits = false;
        ask_write(&bench, 1000, "other");
        expect_written(&bench, 1000, 5);
        bench.volume.waits = true;
        atomic_store(&bench.volume.failure, in_vain[i]);
        land(&bench.volume, i - 1, -EAGAIN);
        CHECK(is_handed_on(take(bench.libfuse), message));
        atomic_store(&bench.volume.failure, 0);
    }
    CHECK(!readable(bench.kernel, 0));
    bench_stop(&bench);
}

/* The thread that settles waits neither for the network nor for libfuse: others may be waiting for what has landed. */
static void check_that_others_are_settled(struct bench *bench, unsigned count) {
    for (unsigned i = 0; i < count; i++)
        ask_write(bench, i + 1, "in vain");
    await_begun(&bench->volume, count);
    for (unsigned i = 0; i < count; i++)
        land(&bench->volume, i, -EAGAIN);
    ask_write(bench, 1000, "settles");
    await_begun(&bench->volume, count + 1);
    land(&bench->volume, count, 0);
    expect_written(bench, 1000, 7);
}

static void test_what_waits_anew_holds_up_nobody(void) {
    enum { COUNT = 2 * AF_ANEW_MAX };
    struct bench bench;
    bench_start_beginning(&bench, 1);
    set_closed(&bench.volume, true);
    check_that_others_are_settled(&bench, COUNT);
    await_inside(&bench, AF_ANEW_MAX);
    CHECK(!readable(bench.libfuse, 0));
    set_closed(&bench.volume, false);
    for (unsigned i = 0; i < COUNT; i++)
        CHECK_EQUAL(take(bench.kernel).length, sizeof(struct fuse_out_header) + sizeof(struct fuse_write_out));
    bench_stop(&bench);
}

static void test_a_full_socket_to_libfuse_holds_up_nothing_that_has_landed(void) {
    struct bench bench;
    bench_prepare(&bench, 1, -1);
    int room = 1;
    CHECK(setsockopt(bench.socket, SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
    CHECK(af_front_serve(bench.front) == 0);
    bench.volume.waits = bench.volume.reads_wait = bench.volume.begins = true;
    atomic_store(&bench.volume.failure, -ESHUTDOWN);
    check_that_others_are_settled(&bench, AF_ANEW_MAX / 2);
    for (unsigned i = 0; i < AF_ANEW_MAX / 2; i++)
        CHECK_EQUAL(opcode_of(take(bench.libfuse)), FUSE_WRITE);
    bench_stop(&bench);
}

static void test_only_so_many_are_begun_at_a_time(void) {
    struct bench bench;
    bench_start_beginning(&bench, 1);
    for (unsigned i = 0; i < AF_BEGUN_MAX; i++)
        ask_write(&bench, i + 1, "begun");
    await_begun(&bench.volume, AF_BEGUN_MAX);
    set_closed(&bench.volume, true);
    ask_write(&bench, 1000, "on a thread");
    await_inside(&bench, 1);
    set_closed(&bench.volume, false);
    expect_written(&bench, 1000, 11);
    for (unsigned i = 0; i < AF_BEGUN_MAX; i++)
        land(&bench.volume, i, 0);
    for (unsigned i = 0; i < AF_BEGUN_MAX; i++)
        CHECK_EQUAL(take(bench.kernel).length, sizeof(struct fuse_out_header) + sizeof(struct fuse_write_out));
    pthread_mutex_lock(&bench.volume.mutex);
    bench.volume.begun_count = 0;
    pthread_mutex_unlock(&bench.volume.mutex);
    /* And then others, as soon as those are counted off, a moment after they are answered. */
    uint64_t unique = 2000;
    for (ask_write(&bench, unique, "begun"); readable(bench.kernel, SHORT_MS); ask_write(&bench, ++unique, "begun"))
        expect_written(&bench, unique, 5);
    await_begun(&bench.volume, 1);
    land(&bench.volume, 0, 0);
    expect_written(&bench, unique, 5);
    bench_stop(&bench);
}

static void *land_all(void *argument) {
    struct ae_volume *volume = argument;
    usleep(20000);
    for (unsigned i = 0; i < 5; i++)
        land(volume, i, 0);
    return NULL;
}

static void test_stopping_answers_what_was_begun(void) {
    struct bench bench;
    bench_start_beginning(&bench, 2);
    for (uint64_t unique = 1; unique <= 5; unique++)
        ask_write(&bench, unique, "begun");
    await_begun(&bench.volume, 5);
    ask_write(&bench, 6, "in vain");
    await_begun(&bench.volume, 6);
    land(&bench.volume, 5, -EAGAIN);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, land_all, &bench.volume) == 0);
    af_front_drain(bench.front);
    for (int i = 0; i < 6; i++)
        CHECK_EQUAL(take(bench.kernel).length, sizeof(struct fuse_out_header) + sizeof(struct fuse_write_out));
    CHECK(pthread_join(thread, NULL) == 0);
    bench_stop(&bench);
}

static void test_unregistering_waits_for_what_was_begun(void) {
    struct bench bench;
    bench_start_beginning(&bench, 1);
    ask_write(&bench, 1, "begun");
    await_begun(&bench.volume, 1);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, unregister, &bench) == 0);
    pthread_mutex_lock(&bench.volume.mutex);
    bench.volume.reads_wait = false;
    pthread_mutex_unlock(&bench.volume.mutex);
    for (uint64_t unique = 2; is_let_in(&bench, unique); unique++)
        continue;
    CHECK_EQUAL(pthread_tryjoin_np(thread, NULL), EBUSY);
    land(&bench.volume, 0, 0);
    expect_written(&bench, 1, 5);
    CHECK(pthread_join(thread, NULL) == 0);
    bench_stop(&bench);
}

static void test_syncs_are_done_by_the_engine_unless_the_composer_has_to(void) {
    struct bench bench;
    bench_start(&bench, 1);
    for (uint64_t unique = 1; unique <= 2; unique++) {
        ask_sync(&bench, unique, NODE);
        CHECK_EQUAL(take_answer(&bench, unique, NULL, 0), 0);
    }
    atomic_store(&bench.volume.sync_result, -EIO);
    ask_sync(&bench, 3, NODE);
    CHECK_EQUAL(take_answer(&bench, 3, NULL, 0), -EIO);
    CHECK_EQUAL(atomic_load(&bench.volume.syncs), 3);
    CHECK(!readable(bench.libfuse, 0));

    atomic_store(&bench.volume.sync_result, -EAGAIN);
    ask_sync(&bench, 4, NODE);
    CHECK_EQUAL(opcode_of(take(bench.libfuse)), FUSE_FSYNC);
    CHECK_EQUAL(atomic_load(&bench.volume.syncs), 4);
    ask_sync(&bench, 5, NODE + 1); /* of no volume that is known */
    CHECK_EQUAL(opcode_of(take(bench.libfuse)), FUSE_FSYNC);
    CHECK_EQUAL(atomic_load(&bench.volume.syncs), 4);
    CHECK(!readable(bench.kernel, 0));

    atomic_store(&bench.volume.sync_result, 0);
    set_closed(&bench.volume, true);
    for (uint64_t unique = 6; unique <= 10; unique++)
        ask_sync(&bench, unique, NODE);
    await_inside(&bench, 5);
    ask_read(&bench, 100, 0);
    expect_read(&bench, 100, 'a');
    set_closed(&bench.volume, false);
    for (int i = 0; i < 5; i++)
        CHECK_EQUAL(take(bench.kernel).length, sizeof(struct fuse_out_header));
    bench_stop(&bench);
}

static void test_unregistering_waits_for_those_inside(void) {
    struct bench bench;
    bench_start(&bench, 2);
    CHECK_EQUAL(af_front_register(bench.front, NODE, &bench.volume, 1), -EEXIST);
    set_closed(&bench.volume, true);
    ask_write(&bench, 1, "slow");
    await_inside(&bench, 1);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, unregister, &bench) == 0);
    uint64_t unique = 2;
    while (is_let_in(&bench, unique))
        unique++;
    /* Nobody is let in any more. */
    ask_write(&bench, unique + 1, "goes to libfuse");
    take(bench.libfuse);
    CHECK_EQUAL(atomic_load(&bench.volume.inside), 1);
    set_closed(&bench.volume, false);
    CHECK(pthread_join(thread, NULL) == 0);
    struct fuse_write_out written;
    CHECK_EQUAL(take_answer(&bench, 1, &written, sizeof written), 0);
    af_front_unregister(bench.front, NODE);
    CHECK_EQUAL(af_front_register(bench.front, NODE, &bench.volume, 1), 0);
    bench_stop(&bench);
}

static void test_the_end_of_the_connection_is_told(void) {
    struct bench bench;
    bench_start(&bench, 3);
    CHECK(!readable(af_front_ended_fd(bench.front), 0));
    shutdown(bench.kernel, SHUT_RDWR);
    CHECK(readable(af_front_ended_fd(bench.front), LONG_MS));
    bench_stop(&bench);
}

static void test_stopping_answers_what_is_under_way(void) {
    struct bench bench;
    bench_start(&bench, 2);
    set_closed(&bench.volume, true);
    for (uint64_t unique = 1; unique <= 5; unique++)
        ask_write(&bench, unique, "slow");
    await_inside(&bench, 5);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, open_up, &bench.volume) == 0);
    af_front_drain(bench.front);
    for (int i = 0; i < 5; i++)
        CHECK_EQUAL(take(bench.kernel).length, sizeof(struct fuse_out_header) + sizeof(struct fuse_write_out));
    CHECK(pthread_join(thread, NULL) == 0);
    bench_stop(&bench);
}

static void test_stopping_with_nobody_at_the_other_end_of_a_full_socket(void) {
    struct bench bench;
    bench_start(&bench, 2);
    struct message request = message_make(FUSE_GETATTR, 1, NODE, "", 0);
    while (send(bench.kernel, request.bytes, request.length, MSG_DONTWAIT) > 0)
        continue;
    usleep(50000);
    af_front_stop(bench.front);
    CHECK(!readable(bench.kernel, 0)); /* what was on its way there is not answered */
    bench_close(&bench);
}

static void *hammer(void *argument) {
    struct bench *bench = argument;
    for (int i = 0; i < 2000; i++) {
        af_front_unregister(bench->front, NODE);
        CHECK_EQUAL(af_front_register(bench->front, NODE, &bench->volume, 1 << 20), 0);
    }
    return NULL;
}

static void *answer_for_libfuse(void *argument) {
    struct bench *bench = argument;
    struct message message;
    ssize_t length;
    while ((length = recv(bench->libfuse, message.bytes, sizeof message.bytes, 0)) > 0) {
        struct fuse_in_header in;
        memcpy(&in, message.bytes, sizeof in);
        struct fuse_out_header out = {.len = sizeof out, .unique = in.unique, .error = -EAGAIN};
        CHECK(send(bench->libfuse, &out, sizeof out, MSG_NOSIGNAL) == sizeof out);
    }
    return NULL;
}

/* Every request is answered once, by whomever. */
static void test_registering_under_load(void) {
    struct bench bench;
    bench_start(&bench, 4);
    pthread_t hammering;
    pthread_t libfuse;
    CHECK(pthread_create(&hammering, NULL, hammer, &bench) == 0);
    CHECK(pthread_create(&libfuse, NULL, answer_for_libfuse, &bench) == 0);
    for (uint64_t round = 0; round < 500; round++) {
        for (uint64_t i = 0; i < 8; i++)
            i % 2 ? ask_read(&bench, 8 * round + i + 1, 0) : ask_write(&bench, 8 * round + i + 1, "text");
        unsigned seen = 0;
        for (int i = 0; i < 8; i++) {
            struct message message = take(bench.kernel);
            struct fuse_out_header header;
            memcpy(&header, message.bytes, sizeof header);
            CHECK(header.error == 0 || header.error == -EAGAIN);
            seen |= 1u << (header.unique - 8 * round - 1);
        }
        CHECK_EQUAL(seen, 255);
    }
    CHECK(pthread_join(hammering, NULL) == 0);
    shutdown(bench.libfuse, SHUT_RDWR);
    CHECK(pthread_join(libfuse, NULL) == 0);
    bench_stop(&bench);
}

static void test_buffers_are_there_from_the_beginning_and_not_shared_with_a_fork(void) {
    enum { PAGES = 65 };
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    char *buffer = af_buffer_make(PAGES * page_bytes);
    CHECK(buffer != NULL);
    unsigned char resident[PAGES];
    CHECK(mincore(buffer, sizeof resident * page_bytes, resident) == 0);
    for (int i = 0; i < PAGES; i++)
        CHECK(resident[i] & 1);
    pid_t child = fork();
    if (child == 0)
        _exit(mincore(buffer, page_bytes, resident) < 0 && errno == ENOMEM ? 0 : 1);
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_EQUAL(status, 0);
    af_buffer_free(buffer, sizeof resident * page_bytes);
}

static void test_options(void) {
    struct af_options options = {
        .device = -1, .socket = -1, .upcalls = -1, .session = -1, .seats = 1, .request_bytes = 1000, .engine = &engine};
    struct af_front *front;
    CHECK_EQUAL(af_front_start(&options, &front), -EINVAL);
    options.request_bytes = 0;
    CHECK_EQUAL(af_front_start(&options, &front), -EINVAL);
    options.request_bytes = 4096;
    options.seats = AF_THREADS_MAX + 1;
    CHECK_EQUAL(af_front_start(&options, &front), -EINVAL);
    options.seats = 0;
    CHECK_EQUAL(af_front_start(&options, &front), -EINVAL);
}

int main(void) {
    static const struct test tests[] = {
        {"served by the engine", test_served},
        {"handed to libfuse and back", test_forwarded},
        {"INIT and O_DIRECT opens are adjusted", test_adjusted},
        {"INIT is kept", test_init_is_kept_before_libfuse_has_it},
        {"INIT that cannot be kept", test_init_that_cannot_be_kept_fails},
        {"a session is taken up again", test_a_session_is_taken_up_again},
        {"a new session", test_nothing_is_sent_again_in_a_new_session},
        {"a damaged session", test_a_damaged_session},
        {"stopping before anything was read", test_stopping_before_anything_was_read},
        {"tags and numbers", test_the_tag_of_a_request_leads_to_its_number_until_it_is_answered},
        {"upcalls", test_upcalls_go_their_own_way_as_they_came},
        {"what nobody is there for", test_what_nobody_is_there_to_carry_out_is_not_answered},
        {"slow requests do not hold up fast ones", test_slow_requests_do_not_hold_up_fast_ones},
        {"writes that wait for a network", test_writes_that_wait_for_a_network_are_under_way_together_at_once},
        {"a network holds up no other volume", test_a_volume_behind_a_network_holds_up_no_other},
        {"stopping answers what is parked", test_stopping_answers_what_is_parked},
        {"what is begun takes no thread", test_what_is_begun_takes_no_thread_and_is_answered_when_it_lands},
        {"what was begun in vain", test_what_was_begun_in_vain_is_done_anew},
        {"what is in vain anew", test_what_is_in_vain_anew_goes_to_the_composer_as_it_came},
        {"what waits anew holds up nobody", test_what_waits_anew_holds_up_nobody},
        {"a full socket holds up nothing landed", test_a_full_socket_to_libfuse_holds_up_nothing_that_has_landed},
        {"only so many are begun at a time", test_only_so_many_are_begun_at_a_time},
        {"stopping answers what was begun", test_stopping_answers_what_was_begun},
        {"unregistering waits for what was begun", test_unregistering_waits_for_what_was_begun},
        {"syncs", test_syncs_are_done_by_the_engine_unless_the_composer_has_to},
        {"readers beside the seats", test_who_waited_for_a_network_reads_on_beside_the_seats_until_other_requests_come},
        {"unregistering waits for those inside", test_unregistering_waits_for_those_inside},
        {"the end of the connection is told", test_the_end_of_the_connection_is_told},
        {"stopping answers what is under way", test_stopping_answers_what_is_under_way},
        {"stopping with a full socket", test_stopping_with_nobody_at_the_other_end_of_a_full_socket},
        {"registering under load", test_registering_under_load},
        {"buffers", test_buffers_are_there_from_the_beginning_and_not_shared_with_a_fork},
        {"options", test_options},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
