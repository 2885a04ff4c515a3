#include "answer.h"

#include "engine.h"

#include <errno.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/uio.h>

_Static_assert(sizeof(struct fuse_write_out) == sizeof(uint64_t), "af_result.body holds it");
_Static_assert(sizeof(struct fuse_lseek_out) == sizeof(uint64_t), "af_result.body holds it");

static bool send_answer(int device, const struct iovec *parts, int count) {
    ssize_t sent;
    do
        sent = writev(device, parts, count);
    while (sent < 0 && errno == EINTR);
    /* The request was interrupted or the connection has ended: nobody waits any more. */
    return sent >= 0 || errno == ENOENT || errno == ENODEV || errno == ECONNABORTED;
}

void af_answer(int device, uint64_t unique, int error, const void *data, size_t length) {
    struct fuse_out_header header = {.unique = unique, .error = error};
    if (error < 0)
        length = 0;
    header.len = (uint32_t)(sizeof header + length);
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)(uintptr_t)data, length}};
    if (send_answer(device, parts, length > 0 ? 2 : 1) || error < 0)
        return;
    /* The kernel did not take it, and would wait for another for ever. */
    header.error = -EIO;
    header.len = sizeof header;
    send_answer(device, parts, 1);
}

void af_answer_whole(int device, const void *message, size_t length) {
    struct fuse_out_header header;
    struct iovec part = {(void *)(uintptr_t)message, length};
    if (send_answer(device, &part, 1) || length < sizeof header)
        return;
    memcpy(&header, message, sizeof header);
    if (header.unique != 0) /* a notification is lost where the kernel knows nothing of what it is about */
        af_answer(device, header.unique, -EIO, NULL, 0);
}

int af_ask_resend(int device) {
    struct fuse_out_header header = {.len = sizeof header, .error = AF_NOTIFY_RESEND};
    struct iovec part = {&header, sizeof header};
    return send_answer(device, &part, 1) ? 0 : -errno;
}

bool af_is_served(enum af_kind kind) {
    switch (kind) {
    case AF_READ:
    case AF_WRITE:
    case AF_ALLOCATE:
    case AF_PUNCH:
    case AF_ZERO:
    case AF_SEEK_DATA:
    case AF_SEEK_HOLE:
    case AF_SYNC:
        return true;
    default:
        return false;
    }
}

static void set_body(struct af_result *result, const void *body) {
    memcpy(result->body, body, sizeof result->body);
    result->data = result->body;
    result->length = sizeof result->body;
}

static void set_read(struct af_result *result, ssize_t count, const void *buffer) {
    *result = (struct af_result){.error = count < 0 ? (int)count : 0};
    if (count > 0) {
        result->data = buffer;
        result->length = (size_t)count;
    }
}

/* Where the range ends beyond the end of the volume, that becomes its size. */
static int grow(const struct ae_calls *engine, const struct af_entry *entry, const struct af_request *request) {
    uint64_t end = request->offset + request->length;
    if (request->keeps_size)
        return 0;
    return end > entry->size_max ? -EFBIG : engine->grow(entry->volume, end);
}

bool af_serve_nowait(const struct ae_calls *engine, const struct af_entry *entry, const struct af_request *request,
                     void *buffer, struct af_result *result) {
    ssize_t count = engine->read_nowait(entry->volume, buffer, (size_t)request->length, request->offset);
    if (count == -EAGAIN)
        return false;
    set_read(result, count, buffer);
    return true;
}

bool af_serve_begin(const struct ae_calls *engine, struct af_kept *kept) {
    struct ae_volume *volume = kept->entry->volume;
    const struct af_request *request = &kept->request;
    size_t length = (size_t)request->length;
    if (request->kind == AF_READ)
        return engine->read_begin(volume, kept->room, length, request->offset, &kept->begun) == 0;
    return engine->write_begin(volume, request->data, length, request->offset, &kept->begun) == 0;
}

void af_settle(const struct ae_calls *engine, struct af_kept *kept, struct af_result *result) {
    ssize_t done = engine->settle(&kept->begun);
    if (kept->request.kind == AF_READ) {
        set_read(result, done, kept->room);
        return;
    }
    *result = (struct af_result){.error = done < 0 ? (int)done : 0};
    if (done >= 0)
        set_body(result, &(struct fuse_write_out){.size = (uint32_t)done});
}

void af_serve(const struct ae_calls *engine, const struct af_entry *entry, const struct af_request *request,
              void *buffer, struct af_result *result) {
    struct ae_volume *volume = entry->volume;
    int64_t done = 0;
    *result = (struct af_result){0};
    switch (request->kind) {
    case AF_READ:
        set_read(result, engine->read(volume, buffer, (size_t)request->length, request->offset), buffer);
        return;
    case AF_WRITE:
        done = engine->write(volume, request->data, (size_t)request->length, request->offset);
        if (done >= 0)
            set_body(result, &(struct fuse_write_out){.size = (uint32_t)done});
        break;
    case AF_ALLOCATE:
        done = grow(engine, entry, request);
        break;
    case AF_PUNCH:
        done = engine->discard(volume, request->offset, request->length);
        break;
    case AF_ZERO:
        done = engine->write_zeros(volume, request->offset, request->length);
        if (done == 0)
            done = grow(engine, entry, request);
        break;
    case AF_SEEK_DATA:
    case AF_SEEK_HOLE:
        done = request->kind == AF_SEEK_DATA ? engine->seek_data(volume, request->offset)
                                             : engine->seek_hole(volume, request->offset);
        if (done >= 0)
            set_body(result, &(struct fuse_lseek_out){.offset = (uint64_t)done});
        break;
    case AF_SYNC:
        done = engine->sync(volume);
        break;
    default:
        done = -ENOSYS;
    }
    result->error = done < 0 ? (int)done : 0;
}
