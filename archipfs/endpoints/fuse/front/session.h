/*
 * What the front keeps of a session (docs/format.md, "The session"): the kernel's INIT request, as it came. The next
 * process needs it, since the kernel sends it once, and libfuse begins with nothing else.
 */
#ifndef ARCHIPFS_FRONT_SESSION_H
#define ARCHIPFS_FRONT_SESSION_H

#include <stddef.h>
#include <sys/types.h>

#define AF_SESSION_INIT_BYTES 4096u

/* -EMSGSIZE: longer than there is room for. */
int af_session_keep_init(int session, const void *message, size_t length);
/* The length of the INIT request, which is in `buffer` then; 0: none was kept. -EBADMSG: what lies there is none. */
ssize_t af_session_read_init(int session, char buffer[AF_SESSION_INIT_BYTES]);

#endif
