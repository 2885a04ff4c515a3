/*
 * The threads and how messages pass between them:
 *
 *   /dev/fuse ─▶ servers (seats.h) ─▶ engine ─▶ /dev/fuse
 *                   │        └─▶ upcalls
 *                   │ what is neither
 *                   ▼
 *                socket ─▶ libfuse ─▶ socket ─▶ relay ─▶ /dev/fuse
 *                                                 │ notifications
 *                                                 ▼
 *                                               notifier ─▶ /dev/fuse
 *
 * The notifier is a thread of its own because the kernel may wait, inside the write of a notification, for a request
 * whose answer has yet to pass the relay.
 *
 * A request is answered only by whoever carried it out or knows that it cannot be. One that cannot be handed on because
 * we are going, or libfuse went, is left alone: the kernel ends it with the connection, or sends it to our successor.
 *
 * FUSE_INTERRUPT is dropped: pyfuse3 has no use for it, and what is served here ends soon by itself.
 *
 * Locks: those of table.c, pending.c, seats.c, far.c, landing.c and anew.c, each held for a few instructions and never
 * one inside another.
 */
#include "front.h"

#include "anew.h"
#include "answer.h"
#include "buffer.h"
#include "engine.h"
#include "far.h"
#include "landing.h"
#include "pending.h"
#include "seats.h"
#include "session.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

/* The header of a WRITE goes before its data, so that the data is aligned to a page. */
#define WRITE_HEADER_BYTES (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
/* Room for an answer's header beside its data. */
#define ANSWER_HEADER_BYTES 4096u

struct af_front {
    struct af_options options;
    size_t page_bytes;
    int ended_fd;
    int initialised_fd;
    int notes[2]; /* the relay's end, the notifier's end */
    char *relay_buffer;
    char *notifier_buffer;
    struct af_offer offer; /* written by whoever reads INIT, before libfuse can answer anything */
    atomic_bool resumable;
    bool resumed; /* the session held an INIT when we started */
    struct af_table table;
    struct af_pending pending;
    struct af_seats seats;
    struct af_far far;
    struct af_landing landing;
    struct af_anew anew;
    pthread_t relay;
    pthread_t notifier;
};

/* Servers */

static void count(_Atomic uint64_t *counter) { atomic_fetch_add_explicit(counter, 1, memory_order_relaxed); }

/* pyfuse3 has no handler for these: libfuse would answer ENOSYS, and the kernel never ask again, for no volume. */
static int refusal_of(enum af_kind kind) {
    switch (kind) {
    case AF_ALLOCATE:
    case AF_PUNCH:
    case AF_ZERO:
    case AF_SEEK_DATA:
    case AF_SEEK_HOLE:
        return -EOPNOTSUPP;
    default:
        return 0;
    }
}

/* -ESHUTDOWN: we are going, or the other end went. */
static int hand_on(int socket, const char *message, size_t length) {
    ssize_t sent;
    do
        sent = send(socket, message, length, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return 0;
    return errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN ? -ESHUTDOWN : -EIO;
}

/* Noted first, since the answer may be here before `send` returns. */
static int hand_to_libfuse(struct af_front *front, const struct af_request *request, char *message, size_t length) {
    uint32_t tag = 0;
    if (request->answered) {
        bool opens = request->kind == AF_OPEN || request->kind == AF_CREATE;
        enum af_kind kind = opens && !request->direct ? AF_OTHER : request->kind;
        int error = af_pending_add(&front->pending, request->unique, kind, &tag);
        if (error < 0)
            return error;
    }
    af_set_tag(message, tag);
    int error = hand_on(front->options.socket, message, length);
    if (error < 0 && request->answered)
        (void)af_pending_take(&front->pending, request->unique);
    return error;
}

static int adjust_init(struct af_front *front, char *message, size_t length) {
    if (!af_adjust_init_request(message, length, &front->offer))
        return -EPROTO;
    atomic_store(&front->resumable, (front->offer.flags & AF_HAS_RESEND) != 0);
    return 0;
}

static int forward(struct af_front *front, const struct af_request *request, char *message, size_t length) {
    if (request->kind == AF_UPCALL)
        return hand_on(front->options.upcalls, message, length);
    int error = refusal_of(request->kind);
    if (request->kind == AF_INIT) {
        if (front->options.session >= 0)
            error = af_session_keep_init(front->options.session, message, length);
        if (error == 0)
            error = adjust_init(front, message, length);
    }
    return error < 0 ? error : hand_to_libfuse(front, request, message, length);
}

static void pass_on(struct af_front *front, const struct af_request *request, char *message, size_t length,
                    struct af_counts *counts) {
    int error = forward(front, request, message, length);
    count(&counts->forwarded);
    if (error < 0 && error != -ESHUTDOWN && request->answered)
        af_answer(front->options.device, request->unique, error, NULL, 0);
}

/* Whoever has a disk open is not told that it is not there, or what it lies in. */
static int outward(int error) { return error == -ENOENT || error == -ESTALE || error == -ESHUTDOWN ? -EIO : error; }

static void answer(const struct af_front *front, const struct af_request *request, const struct af_result *result,
                   struct af_counts *counts) {
    af_answer(front->options.device, request->unique, outward(result->error), result->data, result->length);
    count(&counts->served);
}

/*
 * What the engine leaves to the composer: a flush that takes more than that; what needs an object that another node has
 * deleted, since it lies elsewhere by now, or a store that has shut us out, until we are back.
 */
static bool is_for_composer(const struct af_request *request, const struct af_result *result) {
    switch (result->error) {
    case -EAGAIN:
        return request->kind == AF_SYNC;
    case -ENOENT:
    case -ESTALE:
    case -ESHUTDOWN:
        return request->kind == AF_READ || request->kind == AF_WRITE;
    default:
        return false;
    }
}

/* Inside the entry, which it leaves. */
static void carry_out(struct af_front *front, struct af_entry *entry, const struct af_request *request, char *message,
                      size_t length, char *buffer, struct af_counts *counts) {
    struct af_result result;
    af_serve(front->options.engine, entry, request, buffer, &result);
    af_table_leave(&front->table, entry);
    if (is_for_composer(request, &result))
        pass_on(front, request, message, length, counts);
    else
        answer(front, request, &result, counts);
}

static void carry_out_here(struct af_server *server, struct af_entry *entry, const struct af_request *request,
                           char *message, size_t length) {
    struct af_front *front = server->context;
    /* The request was read whole, or copied: what a read finds goes over it. */
    carry_out(front, entry, request, message, length, server->buffer + front->page_bytes, &server->counts);
}

/* A request that was begun has landed. Settling waits for nothing; whoever does it anew may. */
static void settle(struct af_kept *kept) {
    struct af_front *front = kept->context;
    struct af_result result;
    af_settle(front->options.engine, kept, &result);
    if (result.error == -EAGAIN || is_for_composer(&kept->request, &result)) {
        af_anew_add(&front->anew, kept);
        return;
    }
    af_table_leave(&front->table, kept->entry);
    answer(front, &kept->request, &result, &front->landing.counts);
    free(kept);
}

static void do_anew(struct af_kept *kept) {
    struct af_front *front = kept->context;
    carry_out(front, kept->entry, &kept->request, kept->message, kept->length, kept->room, &front->anew.counts);
    free(kept);
}

static void landed(struct ae_transfer *transfer) {
    struct af_kept *kept = (struct af_kept *)transfer;
    struct af_front *front = kept->context;
    af_landing_land(&front->landing, kept);
}

/* Whether it goes on by itself from here: then it has been inside the entry for as long as it takes. */
static bool begin(struct af_front *front, struct af_entry *entry, const struct af_request *request, const char *message,
                  size_t length) {
    bool reads = request->kind == AF_READ;
    if ((!reads && request->kind != AF_WRITE) || request->length > AF_BEGUN_BYTES_MAX ||
        !af_landing_enter(&front->landing))
        return false;
    struct af_kept *kept = af_kept_make(entry, request, message, length, reads ? request->length : 0);
    bool begun = false;
    if (kept != NULL) {
        kept->context = front;
        kept->begun.transfer.landed = landed;
        begun = af_serve_begin(front->options.engine, kept);
    }
    if (!begun) {
        af_landing_leave(&front->landing);
        free(kept);
    }
    return begun;
}

/* As carry_out, on a volume behind a network, and after that those who were parked meanwhile. */
static void carry_out_far(struct af_server *server, struct af_entry *entry, const struct af_request *request,
                          char *message, size_t length) {
    struct af_front *front = server->context;
    struct af_kept *parked = NULL;
    if (af_far_is_full(&front->far))
        parked = af_kept_make(entry, request, message, length, 0);
    if (!af_far_enter(&front->far, parked))
        return;
    free(parked);
    af_call_is_far(server);
    carry_out_here(server, entry, request, message, length);
    while ((parked = af_far_leave(&front->far)) != NULL) {
        carry_out_here(server, parked->entry, &parked->request, parked->message, parked->length);
        free(parked);
    }
}

/* Whether it is served here. */
static bool serve(struct af_server *server, const struct af_request *request, char *message, size_t length) {
    struct af_front *front = server->context;
    const struct ae_calls *engine = front->options.engine;
    struct af_entry *entry = af_is_served(request->kind) ? af_table_enter(&front->table, request->node) : NULL;
    if (entry == NULL)
        return false;
    struct af_result result;
    bool reads = request->kind == AF_READ;
    if (reads && af_serve_nowait(engine, entry, request, server->buffer + front->page_bytes, &result)) {
        af_table_leave(&front->table, entry);
        if (is_for_composer(request, &result))
            return false;
        answer(front, request, &result, &server->counts);
    } else if (engine->waits(entry->volume)) {
        if (!begin(front, entry, request, message, length))
            carry_out_far(server, entry, request, message, length);
    } else {
        if (reads || request->kind == AF_SYNC)
            af_call_waits(server);
        carry_out_here(server, entry, request, message, length);
    }
    return true;
}

static void handle(struct af_server *server, char *message, size_t length) {
    struct af_front *front = server->context;
    struct af_request request;
    int error = af_parse(message, length, front->options.request_bytes, &request);
    if (error == -EBADMSG || (error == 0 && request.kind == AF_INTERRUPT))
        return;
    if (error == 0 && !serve(server, &request, message, length))
        pass_on(front, &request, message, length, &server->counts);
    if (error < 0 && request.answered)
        af_answer(front->options.device, request.unique, error, NULL, 0);
}

/* Other errors are about the one request that was to be read: interrupted, or gone meanwhile. */
static bool is_end(ssize_t length, int error) {
    return length == 0 || error == ENODEV || error == ECONNABORTED || error == EBADF || error == EINVAL;
}

static void tell(int event) { (void)!write(event, &(uint64_t){1}, sizeof(uint64_t)); }

static void run_server(struct af_server *server) {
    struct af_front *front = server->context;
    char *message = server->buffer + front->page_bytes - WRITE_HEADER_BYTES;
    size_t room = WRITE_HEADER_BYTES + front->options.request_bytes;
    while (!af_seats_stopping(server->seats)) {
        int state;
        pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &state);
        ssize_t length = read(front->options.device, message, room);
        int error = length < 0 ? errno : 0;
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
        if (length > 0) {
            af_call_begin(server);
            handle(server, message, (size_t)length);
            af_call_end(server);
        } else if (is_end(length, error)) {
            tell(front->ended_fd);
            return;
        }
    }
}

/* The way back */

static size_t relay_room(const struct af_front *front) { return front->options.request_bytes + ANSWER_HEADER_BYTES; }

/* The next message, 0 at the end. */
static size_t receive(int socket, char *buffer, size_t room) {
    for (;;) {
        ssize_t length = recv(socket, buffer, room, 0);
        if (length >= 0)
            return (size_t)length;
        if (errno != EINTR)
            return 0;
    }
}

static void relay_answer(struct af_front *front, char *message, size_t length, uint64_t unique) {
    enum af_kind kind = af_pending_take(&front->pending, unique);
    if (kind == AF_INIT)
        (void)af_adjust_init_answer(message, length, &front->offer, front->options.request_bytes);
    else if (kind == AF_OPEN || kind == AF_CREATE)
        (void)af_adjust_open_answer(message, length, kind == AF_CREATE, &front->offer);
    if (kind != AF_INIT_AGAIN)
        af_answer_whole(front->options.device, message, length);
    if (kind == AF_INIT || kind == AF_INIT_AGAIN)
        tell(front->initialised_fd);
}

static void *run_relay(void *argument) {
    struct af_front *front = argument;
    size_t length;
    while ((length = receive(front->options.socket, front->relay_buffer, relay_room(front))) > 0) {
        struct fuse_out_header header;
        if (length < sizeof header)
            continue;
        memcpy(&header, front->relay_buffer, sizeof header);
        if (header.unique != 0)
            relay_answer(front, front->relay_buffer, length, header.unique);
        else
            (void)!send(front->notes[0], front->relay_buffer, length, MSG_NOSIGNAL);
    }
    return NULL;
}

static void *run_notifier(void *argument) {
    struct af_front *front = argument;
    size_t length;
    while ((length = receive(front->notes[1], front->notifier_buffer, relay_room(front))) > 0)
        af_answer_whole(front->options.device, front->notifier_buffer, length);
    return NULL;
}

/* Starting and stopping */

static void free_front(struct af_front *front) {
    if (front->ended_fd >= 0)
        close(front->ended_fd);
    if (front->initialised_fd >= 0)
        close(front->initialised_fd);
    for (int i = 0; i < 2; i++)
        if (front->notes[i] >= 0)
            close(front->notes[i]);
    af_buffer_free(front->relay_buffer, relay_room(front));
    af_buffer_free(front->notifier_buffer, relay_room(front));
    free(front);
}

static struct af_front *make_front(const struct af_options *options) {
    struct af_front *front = aligned_alloc(alignof(struct af_front), sizeof *front);
    if (front == NULL)
        return NULL;
    *front = (struct af_front){
        .options = *options,
        .page_bytes = (size_t)sysconf(_SC_PAGESIZE),
        .ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .initialised_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .notes = {-1, -1},
    };
    front->relay_buffer = af_buffer_make(relay_room(front));
    front->notifier_buffer = af_buffer_make(relay_room(front));
    bool paired = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, front->notes) == 0;
    bool buffered = front->relay_buffer != NULL && front->notifier_buffer != NULL;
    if (front->ended_fd < 0 || front->initialised_fd < 0 || !paired || !buffered) {
        free_front(front);
        return NULL;
    }
    return front;
}

static void stop_receiver(int socket, pthread_t thread) {
    shutdown(socket, SHUT_RDWR);
    pthread_join(thread, NULL);
}

/* What was made already is taken back when the next thing fails. */
static int init_parts(struct af_front *front) {
    int result = af_far_init(&front->far);
    if (result < 0)
        return result;
    result = af_landing_init(&front->landing, settle);
    if (result < 0) {
        af_far_destroy(&front->far);
        return result;
    }
    result = af_anew_init(&front->anew, do_anew);
    if (result < 0) {
        af_landing_destroy(&front->landing);
        af_far_destroy(&front->far);
        return result;
    }
    result = af_table_init(&front->table);
    if (result < 0) {
        af_anew_destroy(&front->anew);
        af_landing_destroy(&front->landing);
        af_far_destroy(&front->far);
        return result;
    }
    result = af_pending_init(&front->pending);
    if (result == 0) {
        size_t buffer_bytes = front->page_bytes + front->options.request_bytes;
        result = af_seats_init(&front->seats, front->options.seats, buffer_bytes, run_server, front);
        if (result == 0)
            return 0;
        af_pending_destroy(&front->pending);
    }
    af_table_destroy(&front->table);
    af_anew_destroy(&front->anew);
    af_landing_destroy(&front->landing);
    af_far_destroy(&front->far);
    return result;
}

static void destroy_parts(struct af_front *front) {
    af_seats_destroy(&front->seats);
    af_pending_destroy(&front->pending);
    af_table_destroy(&front->table);
    af_anew_destroy(&front->anew);
    af_landing_destroy(&front->landing);
    af_far_destroy(&front->far);
}

/* The answer waits in the socket until the relay runs. */
static int replay_init(struct af_front *front) {
    char message[AF_SESSION_INIT_BYTES];
    ssize_t length = af_session_read_init(front->options.session, message);
    if (length <= 0)
        return (int)length;
    struct af_request request;
    int error = af_parse(message, (size_t)length, front->options.request_bytes, &request);
    if (error == 0)
        error = adjust_init(front, message, (size_t)length);
    if (error < 0)
        return error;
    front->resumed = true;
    request.kind = AF_INIT_AGAIN;
    return hand_to_libfuse(front, &request, message, (size_t)length);
}

static int start_threads(struct af_front *front) {
    int result = af_start_thread(&front->notifier, run_notifier, front);
    if (result < 0)
        return result;
    result = af_start_thread(&front->relay, run_relay, front);
    if (result < 0)
        stop_receiver(front->notes[0], front->notifier);
    return result;
}

int af_front_start(const struct af_options *options, struct af_front **started) {
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    if (options->request_bytes == 0 || options->request_bytes % page_bytes != 0)
        return -EINVAL;
    struct af_front *front = make_front(options);
    if (front == NULL)
        return -ENOMEM;
    int result = init_parts(front);
    if (result == 0) {
        if (options->session >= 0)
            result = replay_init(front);
        if (result == 0)
            result = start_threads(front);
        if (result == 0) {
            *started = front;
            return 0;
        }
        destroy_parts(front);
    }
    free_front(front);
    return result;
}

int af_front_serve(struct af_front *front) {
    int result = front->resumed ? af_ask_resend(front->options.device) : 0;
    if (result == 0)
        result = af_anew_start(&front->anew);
    if (result == 0)
        result = af_landing_start(&front->landing);
    return result < 0 ? result : af_seats_start(&front->seats);
}

int af_front_initialised_fd(const struct af_front *front) { return front->initialised_fd; }

bool af_front_resumable(const struct af_front *front) { return atomic_load(&front->resumable); }

uint64_t af_front_number(struct af_front *front, uint32_t tag, bool *resent) {
    uint64_t unique = af_pending_unique(&front->pending, tag);
    *resent = (unique & AF_UNIQUE_RESEND) != 0;
    return unique & ~AF_UNIQUE_RESEND;
}

int af_front_ended_fd(const struct af_front *front) { return front->ended_fd; }

int af_front_register(struct af_front *front, uint64_t node, struct ae_volume *volume, uint64_t size_max) {
    return af_table_add(&front->table, node, volume, size_max);
}

void af_front_unregister(struct af_front *front, uint64_t node) { af_table_remove(&front->table, node); }

void af_front_drain(struct af_front *front) {
    /* Wakes those who wait for room in them. libfuse's answers still come through. */
    shutdown(front->options.socket, SHUT_WR);
    shutdown(front->options.upcalls, SHUT_WR);
    af_seats_stop(&front->seats);
    af_landing_stop(&front->landing);
    af_anew_stop(&front->anew);
}

void af_front_stop(struct af_front *front) {
    af_front_drain(front);
    stop_receiver(front->options.socket, front->relay);
    stop_receiver(front->notes[0], front->notifier);
    destroy_parts(front);
    free_front(front);
}

static void add_counts(struct af_statistics *statistics, struct af_counts *counts) {
    statistics->served += atomic_load_explicit(&counts->served, memory_order_relaxed);
    statistics->forwarded += atomic_load_explicit(&counts->forwarded, memory_order_relaxed);
}

void af_front_statistics(struct af_front *front, struct af_statistics *statistics) {
    *statistics = (struct af_statistics){.volumes = af_table_count(&front->table)};
    add_counts(statistics, &front->landing.counts);
    add_counts(statistics, &front->anew.counts);
    for (uint32_t i = 0; i < AF_THREADS_MAX; i++)
        add_counts(statistics, &front->seats.servers[i].counts);
    statistics->threads = af_seats_threads(&front->seats);
    statistics->seated = atomic_load(&front->seats.seated);
}
