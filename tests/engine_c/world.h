/*
 * What the tests stand on: a machine with disks that forget what was not flushed when the power fails, and a chain of
 * layers on them with the records a mapper would keep.
 */
#ifndef WORLD_H
#define WORLD_H

#include "engine.h"

#include <pthread.h>

#define CHAIN_MAX 64

#define DISK_FIRST_WRITE_BYTES ((uint64_t)4 * AE_SECTOR_BYTES)

struct disk_transfer;

/* One mutex over all disks, so that a power cut finds them all at the same moment. */
struct machine {
    pthread_mutex_t mutex;
    struct disk_transfer *transfers; /* begun, and still on their way */
    unsigned begin_misses;           /* of 100 transfers, how many cannot be begun, and how many come to nothing */
    bool lands_at_once;              /* whether some land before they were begun */
    uint64_t random;
    unsigned nowait_misses; /* of 100 reads that must not wait, how many would */
    bool disks_copy;        /* whether one takes a range of another by itself */
    bool disks_wait;        /* whether they lie behind a network; those of layers that are opened from then on */
    long flush_ns;          /* how long a flush goes on after it has done its work */
};

void machine_start(struct machine *machine, uint64_t seed);
void machine_stop(struct machine *machine);

/* Have any of the transfers to disks that wait land. False: there are none. */
bool machine_land(struct machine *machine);
/* As ae_read and ae_write, but begun and settled where the engine does that. */
ssize_t machine_read(struct machine *machine, struct ae_volume *volume, void *buffer, size_t length, uint64_t offset);
ssize_t machine_write(struct machine *machine, struct ae_volume *volume, const void *buffer, size_t length,
                      uint64_t offset);

enum disk_call {
    DISK_READ,
    DISK_WRITE,
    DISK_PUNCH,
    DISK_TRUNCATE,
    DISK_FLUSH,
    DISK_COPY,
    DISK_SIZE,
    DISK_SEEK,
    DISK_CALLS
};

struct disk_sector {
    uint64_t number;
    uint8_t *now;  /* NULL: a hole */
    uint8_t *safe; /* as flushed */
    bool changed;
};

struct disk {
    struct machine *machine;
    struct disk_sector *sectors;
    size_t count, room;
    uint64_t size_now, size_safe;
    uint64_t calls[DISK_CALLS];
    /* The call of each kind that fails: in so many calls (0: none), and with what. */
    unsigned fail_in[DISK_CALLS];
    int fail_with[DISK_CALLS];
    bool keeps_failing;
};

void disk_init(struct disk *disk, struct machine *machine);
void disk_free(struct disk *disk);
struct ae_object disk_object(struct disk *disk);
void disk_fail(struct disk *disk, enum disk_call call, unsigned in, int error);
/* The power fails: each sector that was not flushed is as flushed or as written. */
void disk_power_cut(struct disk *disk, uint64_t *random);
/* As a power cut would leave it, while the original goes on. The caller holds the machine's mutex. */
void disk_copy_cut(const struct disk *disk, struct disk *copy, uint64_t *random);

/* A layer on the machine's disks, and what is recorded of it. */
struct stored_layer {
    uint8_t id[16];
    struct disk data, bitmap;
    uint64_t parent_visible;
    char live_path[160];
};

void stored_layer_init(struct stored_layer *stored, struct machine *machine, const char *directory, unsigned number);
void stored_layer_free(struct stored_layer *stored);
struct ae_layer *stored_layer_open(struct stored_layer *stored, bool head, bool live, const uint8_t boot_id[16]);

/* A fresh directory for live files, and its end. */
void directory_make(char path[128]);
void directory_remove(const char *path);

#endif
