/*
 * Memory that requests are read into and answered from.
 *
 * The kernel copies between a request and such a buffer. If it finds a page missing while the process is being killed,
 * it gives up and answers the request with EIO, although the next process would have served it. So all pages are there
 * from the beginning, and a fork does not take away the right to write to them.
 */
#ifndef ARCHIPFS_FRONT_BUFFER_H
#define ARCHIPFS_FRONT_BUFFER_H

#include <stddef.h>

/* Aligned to a page. NULL: no memory. */
char *af_buffer_make(size_t bytes);
/* Of NULL, nothing. */
void af_buffer_free(char *buffer, size_t bytes);

#endif
