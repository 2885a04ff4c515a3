/* Reads and writes of one stripe that go on while no thread waits for them: what ae_object_ops.pread_begin asks for. */
#ifndef ARCHIPFS_RADOS_BEGUN_H
#define ARCHIPFS_RADOS_BEGUN_H

#include "striped.h"

struct ae_transfer;

/* False: nothing was begun, since it would have to wait, or is more than one read or write of a stripe. */
bool ra_data_read_begin(struct ra_data *data, void *buffer, size_t length, uint64_t offset,
                        struct ae_transfer *transfer);
bool ra_data_write_begin(struct ra_data *data, const void *buffer, size_t length, uint64_t offset,
                         struct ae_transfer *transfer);

/* The result of one that has landed. `*anew`: it has none, and is to be done by ra_data_read or ra_data_write. */
int ra_data_settle(struct ra_data *data, struct ae_transfer *transfer, bool *anew);

#endif
