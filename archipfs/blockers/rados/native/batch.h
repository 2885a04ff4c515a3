/*
 * Operations on stripes of one data object that run at once. At most a window of them is on its way; who adds one more
 * waits for the oldest.
 */
#ifndef ARCHIPFS_RADOS_BATCH_H
#define ARCHIPFS_RADOS_BATCH_H

#include "client.h"

#define BATCH_WINDOW 16
/* kind/ident, a slash, 16 digits. */
#define STRIPE_NAME_BYTES (RA_KEY_BYTES_MAX + 18)

enum batch_kind { BATCH_READ, BATCH_WRITE, BATCH_ZERO, BATCH_REMOVE, BATCH_STAT };

struct batch_piece {
    enum batch_kind kind;
    ra_completion completion;
    char *buffer;
    size_t length;
    uint64_t stripe;
    uint64_t offset;
    uint64_t size;
    time_t mtime;
};

struct batch {
    struct ra_call *call;
    const char *key;
    /* The first error. */
    int result;
    /* Of all reads so far: some stripe was not there. Its bytes are zeros. */
    bool missing;
    /* Of all stats so far: where the last stripe ends, as an offset of the data object. */
    uint64_t end;
    /* A ring: pieces on their way are first … first + count − 1. */
    unsigned first;
    unsigned count;
    struct batch_piece pieces[BATCH_WINDOW];
};

void batch_begin(struct batch *batch, struct ra_call *call, const char *key);

/* `offset` counts from the stripe's beginning. After an error nothing more is sent. */
void batch_read(struct batch *batch, uint64_t stripe, void *buffer, size_t length, uint64_t offset);
void batch_write(struct batch *batch, uint64_t stripe, const void *buffer, size_t length, uint64_t offset);
/* Does nothing to a stripe that is not there. */
void batch_zero(struct batch *batch, uint64_t stripe, uint64_t length, uint64_t offset);
void batch_remove(struct batch *batch, uint64_t stripe);
void batch_stat(struct batch *batch, uint64_t stripe);

/* Wait for all of them. The first error. */
int batch_end(struct batch *batch);

/* What the result of a read means: `*missing` is set if the stripe is not there, and its bytes are zeros. */
int stripe_read_settle(int got, char *buffer, size_t length, bool *missing);
/* What the result of a change means: one that had no answer may still take effect. */
int stripe_change_settle(struct ra_call *call, int result);

/* One alone, on a completion of the caller's. */
int stripe_read_begin(struct ra_call *call, const char *key, uint64_t stripe, ra_completion completion, void *buffer,
                      size_t length, uint64_t offset);
int stripe_write_begin(struct ra_call *call, const char *key, uint64_t stripe, ra_completion completion,
                       const void *buffer, size_t length, uint64_t offset);

/* One alone, without a completion. */
int stripe_read(struct ra_call *call, const char *key, uint64_t stripe, void *buffer, size_t length, uint64_t offset,
                bool *missing);
int stripe_write(struct ra_call *call, const char *key, uint64_t stripe, const void *buffer, size_t length,
                 uint64_t offset);

#endif
