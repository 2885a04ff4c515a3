/*
 * The calls of librados that we use, found with dlopen when a client is made: a machine without Ceph needs no librados,
 * and a build none of its headers. The prototypes are those of the C API of librados 14 and later; the handles are
 * opaque there too.
 */
#ifndef ARCHIPFS_RADOS_LIBRARY_H
#define ARCHIPFS_RADOS_LIBRARY_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/time.h>
#include <time.h>

typedef void *ra_cluster;
typedef void *ra_ioctx;
typedef void *ra_completion;
typedef void *ra_write_op;
typedef void (*ra_callback)(ra_completion completion, void *argument);

/* LIBRADOS_CREATE_EXCLUSIVE, LIBRADOS_LOCK_FLAG_MAY_RENEW */
#define RA_CREATE_EXCLUSIVE 1
#define RA_LOCK_MAY_RENEW 1

/*
 * What an asynchronous read comes to whose answer arrived in several pieces of memory: librados puts those together for
 * who waits, and not for a completion. With ms_client_mode = secure that is any that finds no multiple of 16 bytes.
 */
#define RA_SCATTERED (-ERANGE)

/* F(result, name without "rados_", (parameters)) */
#define RA_FUNCTIONS(F)                                                                                                \
    F(int, create, (ra_cluster * cluster, const char *id))                                                             \
    F(int, conf_read_file, (ra_cluster cluster, const char *path))                                                     \
    F(int, conf_set, (ra_cluster cluster, const char *option, const char *value))                                      \
    F(int, connect, (ra_cluster cluster))                                                                              \
    F(void, shutdown, (ra_cluster cluster))                                                                            \
    F(int, getaddrs, (ra_cluster cluster, char **addresses))                                                           \
    F(int, wait_for_latest_osdmap, (ra_cluster cluster))                                                               \
    F(void, buffer_free, (char *buffer))                                                                               \
    F(int, ioctx_create, (ra_cluster cluster, const char *pool, ra_ioctx *io))                                         \
    F(void, ioctx_set_namespace, (ra_ioctx io, const char *name))                                                      \
    F(void, ioctx_destroy, (ra_ioctx io))                                                                              \
    F(void, set_pool_full_try, (ra_ioctx io))                                                                          \
    F(int, read, (ra_ioctx io, const char *oid, char *buffer, size_t length, uint64_t offset))                         \
    F(int, stat, (ra_ioctx io, const char *oid, uint64_t *size, time_t *mtime))                                        \
    F(int, remove, (ra_ioctx io, const char *oid))                                                                     \
    F(int, write, (ra_ioctx io, const char *oid, const char *buffer, size_t length, uint64_t offset))                  \
    F(int, aio_create_completion2, (void *argument, ra_callback complete, ra_completion *completion))                  \
    F(int, aio_wait_for_complete, (ra_completion completion))                                                          \
    F(int, aio_get_return_value, (ra_completion completion))                                                           \
    F(void, aio_release, (ra_completion completion))                                                                   \
    F(int, aio_read,                                                                                                   \
      (ra_ioctx io, const char *oid, ra_completion completion, char *buffer, size_t length, uint64_t offset))          \
    F(int, aio_write,                                                                                                  \
      (ra_ioctx io, const char *oid, ra_completion completion, const char *buffer, size_t length, uint64_t offset))    \
    F(int, aio_remove, (ra_ioctx io, const char *oid, ra_completion completion))                                       \
    F(int, aio_stat, (ra_ioctx io, const char *oid, ra_completion completion, uint64_t *size, time_t *mtime))          \
    F(ra_write_op, create_write_op, (void))                                                                            \
    F(void, release_write_op, (ra_write_op op))                                                                        \
    F(void, write_op_create, (ra_write_op op, int exclusive, const char *category))                                    \
    F(void, write_op_cmpext, (ra_write_op op, const char *buffer, size_t length, uint64_t offset, int *result))        \
    F(void, write_op_write, (ra_write_op op, const char *buffer, size_t length, uint64_t offset))                      \
    F(void, write_op_zero, (ra_write_op op, uint64_t offset, uint64_t length))                                         \
    F(int, write_op_operate, (ra_write_op op, ra_ioctx io, const char *oid, time_t *mtime, int flags))                 \
    F(int, aio_write_op_operate,                                                                                       \
      (ra_write_op op, ra_ioctx io, ra_completion completion, const char *oid, time_t *mtime, int flags))              \
    F(int, lock_shared,                                                                                                \
      (ra_ioctx io, const char *oid, const char *name, const char *cookie, const char *tag, const char *description,   \
       struct timeval *duration, uint8_t flags))                                                                       \
    F(int, unlock, (ra_ioctx io, const char *oid, const char *name, const char *cookie))

struct ra_library {
    void *handle;
#define RA_MEMBER(result, name, parameters) result(*name) parameters;
    RA_FUNCTIONS(RA_MEMBER)
#undef RA_MEMBER
};

/*
 * Load `path`. -ENOPKG: there is no such library, or it lacks one of the calls; `problem` says which, in a line.
 */
int ra_library_open(struct ra_library *library, const char *path, char *problem, size_t problem_bytes);

void ra_library_close(struct ra_library *library);

#endif
