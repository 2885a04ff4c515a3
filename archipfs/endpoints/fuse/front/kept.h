/* A request that is kept aside from the thread that read it, whose buffer is for the next one. */
#ifndef ARCHIPFS_FRONT_KEPT_H
#define ARCHIPFS_FRONT_KEPT_H

#include "engine.h"
#include "wire.h"

struct af_entry;

struct af_kept {
    struct ae_begun begun; /* first; of one that was begun */
    struct af_kept *next;
    void *context;
    struct af_entry *entry; /* it is inside */
    struct af_request request;
    size_t length;
    char *room;     /* for what it reads */
    char message[]; /* a copy, which the request's data lies in */
};

/* With so many bytes of room. NULL: there is no memory. Freed by whoever carries it out. */
struct af_kept *af_kept_make(struct af_entry *entry, const struct af_request *request, const char *message,
                             size_t length, size_t room_bytes);

#endif
