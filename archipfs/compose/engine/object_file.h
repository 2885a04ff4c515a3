/* Whole reads and writes of a file descriptor, as the objects that lie in files need them. */
#ifndef ARCHIPFS_ENGINE_OBJECT_FILE_H
#define ARCHIPFS_ENGINE_OBJECT_FILE_H

#include <stddef.h>
#include <stdint.h>

/*
 * What lies beyond the end: zeros, or -EIO. Or -EAGAIN where the page cache does not have all of it, or the file system
 * cannot tell.
 */
enum ae_read_mode { AE_READ_PADDED, AE_READ_WITHIN, AE_READ_NOWAIT };

int ae_file_read(int fd, void *buffer, size_t length, uint64_t offset, enum ae_read_mode mode);
int ae_file_write(int fd, const void *buffer, size_t length, uint64_t offset);

#endif
