#include "session.h"

#include "wire.h"

#include <errno.h>
#include <unistd.h>

#define INIT_AT 4096

int af_session_keep_init(int session, const void *message, size_t length) {
    if (length > AF_SESSION_INIT_BYTES)
        return -EMSGSIZE;
    ssize_t written;
    do
        written = pwrite(session, message, length, INIT_AT);
    while (written < 0 && errno == EINTR);
    if (written < 0)
        return -errno;
    return (size_t)written == length ? 0 : -EIO;
}

ssize_t af_session_read_init(int session, char buffer[AF_SESSION_INIT_BYTES]) {
    ssize_t count;
    do
        count = pread(session, buffer, AF_SESSION_INIT_BYTES, INIT_AT);
    while (count < 0 && errno == EINTR);
    return count < 0 ? -errno : af_init_length(buffer, (size_t)count);
}
