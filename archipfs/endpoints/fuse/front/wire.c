#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <string.h>
#include <unistd.h>

/* A copy of the next `size` bytes, wherever they lie; false if there are not so many. */
static bool take(const char **at, size_t *left, void *into, size_t size) {
    if (*left < size)
        return false;
    memcpy(into, *at, size);
    *at += size;
    *left -= size;
    return true;
}

static int check_range(uint64_t offset, uint64_t length) {
    if (offset > INT64_MAX)
        return -EINVAL;
    return length > INT64_MAX - offset ? -EFBIG : 0;
}

static int parse_read(const char *at, size_t left, uint32_t data_bytes_max, struct af_request *request) {
    struct fuse_read_in in;
    if (!take(&at, &left, &in, sizeof in) || in.size > data_bytes_max)
        return -EINVAL;
    request->kind = AF_READ;
    request->offset = in.offset;
    request->length = in.size;
    return check_range(in.offset, in.size);
}

static int parse_write(const char *at, size_t left, uint32_t data_bytes_max, struct af_request *request) {
    struct fuse_write_in in;
    if (!take(&at, &left, &in, sizeof in) || in.size > data_bytes_max || in.size > left)
        return -EINVAL;
    request->kind = AF_WRITE;
    request->offset = in.offset;
    request->length = in.size;
    request->data = at;
    return check_range(in.offset, in.size);
}

static int parse_fallocate(const char *at, size_t left, struct af_request *request) {
    struct fuse_fallocate_in in;
    if (!take(&at, &left, &in, sizeof in) || in.length == 0)
        return -EINVAL;
    request->offset = in.offset;
    request->length = in.length;
    request->keeps_size = (in.mode & FALLOC_FL_KEEP_SIZE) != 0;
    switch (in.mode) {
    case 0:
    case FALLOC_FL_KEEP_SIZE:
        request->kind = AF_ALLOCATE;
        break;
    case FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE:
        request->kind = AF_PUNCH;
        break;
    case FALLOC_FL_ZERO_RANGE:
    case FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE:
        request->kind = AF_ZERO;
        break;
    default:
        return -EOPNOTSUPP;
    }
    return check_range(in.offset, in.length);
}

static int parse_lseek(const char *at, size_t left, struct af_request *request) {
    struct fuse_lseek_in in;
    if (!take(&at, &left, &in, sizeof in) || (in.whence != SEEK_DATA && in.whence != SEEK_HOLE))
        return -EINVAL;
    request->kind = in.whence == SEEK_DATA ? AF_SEEK_DATA : AF_SEEK_HOLE;
    request->offset = in.offset;
    return in.offset > INT64_MAX ? -ENXIO : 0;
}

static int parse_fsync(const char *at, size_t left, struct af_request *request) {
    struct fuse_fsync_in in;
    if (!take(&at, &left, &in, sizeof in))
        return -EINVAL;
    request->kind = AF_SYNC;
    return 0;
}

static int parse_open(const char *at, size_t left, struct af_request *request) {
    struct fuse_open_in in;
    if (!take(&at, &left, &in, sizeof in))
        return -EINVAL;
    request->kind = AF_OPEN;
    request->direct = (in.flags & O_DIRECT) != 0;
    return 0;
}

/* There are no attributes but the user's: `ls -l` asks each file for its ACL, and gets the answer without a detour. */
static int parse_getxattr(const char *at, size_t left) {
    static const char users[] = {'u', 's', 'e', 'r', '.'};
    struct fuse_getxattr_in in;
    if (!take(&at, &left, &in, sizeof in))
        return -EINVAL;
    return left < sizeof users || memcmp(at, users, sizeof users) != 0 ? -ENODATA : 0;
}

static int parse_create(const char *at, size_t left, struct af_request *request) {
    struct fuse_create_in in;
    if (!take(&at, &left, &in, sizeof in))
        return -EINVAL;
    request->kind = AF_CREATE;
    request->direct = (in.flags & O_DIRECT) != 0;
    return 0;
}

static int parse_ioctl(const char *at, size_t left, struct af_request *request) {
    struct fuse_ioctl_in in;
    if (!take(&at, &left, &in, sizeof in) || in.in_size > left)
        return -EINVAL;
    request->kind = AF_UPCALL;
    return 0;
}

static int parse_copy(const char *at, size_t left, struct af_request *request) {
    struct fuse_copy_file_range_in in;
    if (!take(&at, &left, &in, sizeof in))
        return -EINVAL;
    request->kind = AF_UPCALL;
    return 0;
}

static bool is_answered(uint32_t opcode) {
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_NOTIFY_REPLY &&
           opcode != FUSE_INTERRUPT;
}

int af_parse(const void *buffer, size_t length, uint32_t data_bytes_max, struct af_request *request) {
    const char *at = buffer;
    size_t left = length;
    struct fuse_in_header header;
    if (!take(&at, &left, &header, sizeof header) || header.len != length)
        return -EBADMSG;
    *request = (struct af_request){
        .kind = AF_OTHER,
        .answered = is_answered(header.opcode),
        .unique = header.unique,
        .node = header.nodeid,
    };
    switch (header.opcode) {
    case FUSE_READ:
        return parse_read(at, left, data_bytes_max, request);
    case FUSE_WRITE:
        return parse_write(at, left, data_bytes_max, request);
    case FUSE_FALLOCATE:
        return parse_fallocate(at, left, request);
    case FUSE_LSEEK:
        return parse_lseek(at, left, request);
    case FUSE_FSYNC:
        return parse_fsync(at, left, request);
    case FUSE_OPEN:
        return parse_open(at, left, request);
    case FUSE_GETXATTR:
        return parse_getxattr(at, left);
    case FUSE_CREATE:
        return parse_create(at, left, request);
    case FUSE_INIT:
        request->kind = AF_INIT;
        return 0;
    case FUSE_INTERRUPT:
        request->kind = AF_INTERRUPT;
        return 0;
    case FUSE_IOCTL:
        return parse_ioctl(at, left, request);
    case FUSE_COPY_FILE_RANGE:
    case AF_COPY_FILE_RANGE_64:
        return parse_copy(at, left, request);
    default:
        return 0;
    }
}

void af_set_tag(void *buffer, uint32_t tag) {
    memcpy((char *)buffer + offsetof(struct fuse_in_header, pid), &tag, sizeof tag);
}
