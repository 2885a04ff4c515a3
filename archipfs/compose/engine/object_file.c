/*
 * An object over a file descriptor: the calls are made again until they are done, and what lies beyond the end of the
 * file reads as zeros, so that nobody above has to think of short counts.
 */
#include "object_file.h"
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define ZEROS_BYTES ((size_t)64 * 1024)
/*
 * The first write to a place decides how large the folios of the page cache are there, and ext4 goes over all blocks of
 * a folio at each later write to it, however small. Folios of 256 KiB make those two fifths cheaper than ones of 1 MiB
 * and larger and cost 1 MiB requests nothing; smaller ones go further with the former and cost the latter
 * (docs/benchmarks.md).
 */
#define FIRST_WRITE_BYTES ((size_t)256 * 1024)

struct file {
    int fd;
};

static int file_fd(void *ctx) { return ((struct file *)ctx)->fd; }

int ae_file_read(int fd, void *buffer, size_t length, uint64_t offset, enum ae_read_mode mode) {
    int flags = mode == AE_READ_NOWAIT ? RWF_NOWAIT : 0;
    char *to = buffer;
    while (length > 0) {
        struct iovec piece = {.iov_base = to, .iov_len = length};
        ssize_t got = preadv2(fd, &piece, 1, (off_t)offset, flags);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return mode == AE_READ_NOWAIT && errno == EOPNOTSUPP ? -EAGAIN : -errno;
        /* Some kernels (5.9, 5.10) say so of a read that would have to wait, not only at the end. */
        if (got == 0 && mode == AE_READ_NOWAIT)
            return -EAGAIN;
        if (got == 0 && mode == AE_READ_WITHIN)
            return -EIO;
        if (got == 0) {
            memset(to, 0, length);
            return 0;
        }
        to += got;
        offset += (uint64_t)got;
        length -= (size_t)got;
    }
    return 0;
}

int ae_file_write(int fd, const void *buffer, size_t length, uint64_t offset) {
    const char *from = buffer;
    while (length > 0) {
        ssize_t put = pwrite(fd, from, length, (off_t)offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return -errno;
        if (put == 0)
            return -EIO;
        from += put;
        offset += (uint64_t)put;
        length -= (size_t)put;
    }
    return 0;
}

static int file_pread(void *ctx, void *buffer, size_t length, uint64_t offset) {
    return ae_file_read(file_fd(ctx), buffer, length, offset, AE_READ_PADDED);
}

static int file_pread_within(void *ctx, void *buffer, size_t length, uint64_t offset) {
    return ae_file_read(file_fd(ctx), buffer, length, offset, AE_READ_WITHIN);
}

static int file_pread_nowait(void *ctx, void *buffer, size_t length, uint64_t offset) {
    return ae_file_read(file_fd(ctx), buffer, length, offset, AE_READ_NOWAIT);
}

static int file_pwrite(void *ctx, const void *buffer, size_t length, uint64_t offset) {
    return ae_file_write(file_fd(ctx), buffer, length, offset);
}

static int file_size(void *ctx, uint64_t *size) {
    struct stat status;
    if (fstat(file_fd(ctx), &status) < 0)
        return -errno;
    *size = (uint64_t)status.st_size;
    return 0;
}

static int file_seek(void *ctx, uint64_t offset, int whence, uint64_t *found) {
    off_t at = lseek(file_fd(ctx), (off_t)offset, whence);
    if (at < 0)
        return -errno;
    *found = (uint64_t)at;
    return 0;
}

static int file_next_data(void *ctx, uint64_t offset, uint64_t *found) {
    return file_seek(ctx, offset, SEEK_DATA, found);
}

static int file_next_hole(void *ctx, uint64_t offset, uint64_t *found) {
    return file_seek(ctx, offset, SEEK_HOLE, found);
}

/* For file systems that cannot punch. */
static int file_overwrite(void *ctx, uint64_t offset, uint64_t end) {
    void *zeros = calloc(1, ZEROS_BYTES);
    if (zeros == NULL)
        return -ENOMEM;
    int result = 0;
    while (result == 0 && offset < end) {
        uint64_t piece = end - offset < ZEROS_BYTES ? end - offset : ZEROS_BYTES;
        result = file_pwrite(ctx, zeros, (size_t)piece, offset);
        offset += piece;
    }
    free(zeros);
    return result;
}

static int file_punch(void *ctx, uint64_t offset, uint64_t length) {
    uint64_t size;
    int result = file_size(ctx, &size);
    if (result < 0 || offset >= size)
        return result;
    if (length > size - offset)
        length = size - offset;
    do
        result = fallocate(file_fd(ctx), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    while (result < 0 && errno == EINTR);
    if (result < 0 && errno == EOPNOTSUPP)
        return file_overwrite(ctx, offset, offset + length);
    return result < 0 ? -errno : 0;
}

static int file_truncate(void *ctx, uint64_t size) {
    int result;
    do
        result = ftruncate(file_fd(ctx), (off_t)size);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

static int file_flush(void *ctx) {
    int result;
    do
        result = fdatasync(file_fd(ctx));
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

/* A file system that shares blocks among files shares them here; others copy within the kernel. */
static int file_copy_from(void *ctx, uint64_t offset, const struct ae_object *source, uint64_t from, size_t length) {
    if (source->ops->pread != file_pread)
        return -EOPNOTSUPP;
    while (length > 0) {
        off_t read_at = (off_t)from, write_at = (off_t)offset;
        ssize_t done = copy_file_range(file_fd(source->ctx), &read_at, file_fd(ctx), &write_at, length, 0);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && (errno == EXDEV || errno == EINVAL || errno == ENOSYS))
            return -EOPNOTSUPP;
        if (done < 0)
            return -errno;
        /* The source has become shorter meanwhile; what is missing reads as zeros. */
        if (done == 0)
            return -EOPNOTSUPP;
        from += (uint64_t)done;
        offset += (uint64_t)done;
        length -= (size_t)done;
    }
    return 0;
}

static void file_close(void *ctx) {
    close(file_fd(ctx));
    free(ctx);
}

static const struct ae_object_ops file_ops = {
    .pread = file_pread,
    .pread_nowait = file_pread_nowait,
    .pread_within = file_pread_within,
    .pwrite = file_pwrite,
    .punch = file_punch,
    .truncate = file_truncate,
    .flush = file_flush,
    .size = file_size,
    .next_data = file_next_data,
    .next_hole = file_next_hole,
    .copy_from = file_copy_from,
    .close = file_close,
};

int ae_object_file(int fd, struct ae_object *object) {
    struct file *file = malloc(sizeof *file);
    if (file == NULL)
        return -ENOMEM;
    file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (file->fd < 0) {
        int error = errno;
        free(file);
        return -error;
    }
    *object = (struct ae_object){.ops = &file_ops, .ctx = file, .first_write_bytes = FIRST_WRITE_BYTES};
    return 0;
}
