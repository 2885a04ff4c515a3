/* An open pack: one RADOS object that never changes. */
#ifndef ARCHIPFS_RADOS_PACK_H
#define ARCHIPFS_RADOS_PACK_H

#include "client.h"

struct ra_pack {
    atomic_uint references;
    struct ra_client *client;
    uint64_t size;
    char key[RA_KEY_BYTES_MAX + 1];
};

#endif
