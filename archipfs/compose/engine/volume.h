/* What volume.c (who may be inside, and in which chain) and io.c (what they do there) share. */
#ifndef ARCHIPFS_ENGINE_VOLUME_H
#define ARCHIPFS_ENGINE_VOLUME_H

#include "plan.h"
#include "range_lock.h"

/* The chain as it was when a call began. It never changes; a swap makes another one. */
struct ae_stack {
    uint64_t calls; /* inside the gate */
    bool lingering; /* a rebase took its place: its calls write to the head that the present one has too */
    uint64_t holds; /* the volume itself, and flushes and the source's side of copies, which stay outside the gate */
    size_t count;
    struct ae_layer *layers[];
};

/* What tells ae_sync that nothing but a flush is needed: see ae_volume_guard. */
struct ae_guard {
    bool stands;
    char *paths; /* `present` and `following`, each with its zero; NULL: the store itself keeps others out */
    size_t paths_bytes;
    uint64_t size;
};

struct ae_volume {
    pthread_mutex_t gate;
    pthread_cond_t changed;
    uint64_t waiting; /* on `changed` */
    uint64_t inside;  /* calls of every kind; the volume is not freed before they are gone */
    bool paused;
    struct ae_stack *current;
    struct ae_stack *draining; /* a swap waits for its last calls */
    uint64_t draining_size;    /* of the volume, as far as the calls on that head made it */
    uint64_t lingering;        /* calls on stacks that a rebase took the place of */
    struct ae_statistics counts;
    struct ae_guard guard;

    bool writable;
    _Atomic uint64_t size;
    _Atomic uint64_t changed_ns;
    atomic_int failed;
    struct ae_range_lock ranges;
};

enum ae_call_kind { AE_CALL_READ, AE_CALL_READ_NOWAIT, AE_CALL_WRITE, AE_CALL_WRITE_NOWAIT };

/* What a call did, for the statistics and the size. */
struct ae_outcome {
    uint64_t reads, read_bytes;
    uint64_t writes, written_bytes;
    uint64_t discards, discarded_bytes;
    uint64_t fills;
    uint64_t written_end; /* 0, or where a write ended */
    bool changed;
};

/* Go through the gate; every 0 is followed by one ae_call_end. */
int ae_call_begin(struct ae_volume *volume, enum ae_call_kind kind, struct ae_stack **stack);
void ae_call_end(struct ae_volume *volume, struct ae_stack *stack, const struct ae_outcome *outcome);
/* Wait until the calls that write to the head before this stack's own are gone. Hold no range meanwhile. */
void ae_call_await_predecessor(struct ae_volume *volume, const struct ae_stack *stack);

/* Keep the present chain without being inside the gate: a pause does not wait for it, the end of the volume does. */
struct ae_stack *ae_stack_hold(struct ae_volume *volume);
void ae_stack_unhold(struct ae_volume *volume, struct ae_stack *stack);

/* The first data (hole) of a chain at or after `offset`; `end` if there is none before. */
int ae_chain_seek(struct ae_layer *const *layers, size_t count, uint64_t offset, uint64_t end, bool data,
                  uint64_t *found);
/* Make the range read as zeros, like ae_discard, but beyond the end too: the volume becomes larger. */
int ae_clear(struct ae_volume *volume, uint64_t offset, uint64_t length);
/* Whole sectors out of another object, like ae_write; -EOPNOTSUPP where the objects cannot do that by themselves. */
int ae_write_from(struct ae_volume *volume, uint64_t offset, const struct ae_object *source, uint64_t from,
                  size_t length);

#endif
