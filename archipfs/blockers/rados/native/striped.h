/*
 * An open data object: a header object, and stripes of 4 MiB. docs/architecture.md, "A data object in RADOS", has the
 * steps of each operation, and what a crash leaves after each.
 */
#ifndef ARCHIPFS_RADOS_STRIPED_H
#define ARCHIPFS_RADOS_STRIPED_H

#include "client.h"
#include "gate.h"
#include "header.h"

/* Stripes that somebody is about to write for the first time. */
struct mark {
    struct mark *next;
    struct stripe_range range;
    bool done;
    int result;
};

struct ra_data {
    atomic_uint references;
    struct ra_client *client;
    struct ra_claim *claim;
    bool writable;
    char key[RA_KEY_BYTES_MAX + 1];

    /* Held alone by whoever changes the size in the header; else shared. */
    struct ra_gate gate;

    /* Guards all that follows. */
    pthread_mutex_t table;
    /* A mark is done, or it is somebody else's turn to set them. */
    pthread_cond_t marked;
    /* The bytes of stripes that are known to be set, durably. Others may be set too, by others. */
    unsigned char *stripes;
    uint64_t stripe_count;
    /* What the header said last. */
    uint64_t header_size;
    struct mark *marks;
    bool marking;
};

/* Whether the byte of a stripe is known to be set; if not, nothing is to be written there yet. */
bool ra_data_may_have(struct ra_data *data, uint64_t stripe);

#endif
