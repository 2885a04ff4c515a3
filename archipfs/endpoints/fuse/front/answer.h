/* Answering the kernel, and serving what the engine can serve. */
#ifndef ARCHIPFS_FRONT_ANSWER_H
#define ARCHIPFS_FRONT_ANSWER_H

#include "kept.h"
#include "table.h"
#include "wire.h"

struct ae_calls;

/* `error` is 0 or a negative errno; with one, there is no data. A request that is gone meanwhile needs no answer. */
void af_answer(int device, uint64_t unique, int error, const void *data, size_t length);
/* Hand an answer or a notification on as it is. */
void af_answer_whole(int device, const void *message, size_t length);
/* Have the kernel send again what was read and never answered. -EINVAL: it cannot. */
int af_ask_resend(int device);

/* Whether the front serves this kind of request by itself. */
bool af_is_served(enum af_kind kind);

/* What to answer. */
struct af_result {
    int error; /* 0 or a negative errno */
    const void *data;
    size_t length;
    uint64_t body[1]; /* what `data` points at where it is not a read's buffer */
};

/* A read that memory can answer, into `buffer`; false if it would wait. */
bool af_serve_nowait(const struct ae_calls *engine, const struct af_entry *entry, const struct af_request *request,
                     void *buffer, struct af_result *result);
/*
 * Any request that is served here; may wait for a disk. A read goes into `buffer`, which has room for it. A sync with
 * -EAGAIN was not done: libfuse has to get it.
 */
void af_serve(const struct ae_calls *engine, const struct af_entry *entry, const struct af_request *request,
              void *buffer, struct af_result *result);

/* Begin a READ or WRITE that is kept, as engine.h has it; false: it is for af_serve. */
bool af_serve_begin(const struct ae_calls *engine, struct af_kept *kept);
/* What to answer when it has landed. -EAGAIN: it has to be done anew. */
void af_settle(const struct ae_calls *engine, struct af_kept *kept, struct af_result *result);

#endif
