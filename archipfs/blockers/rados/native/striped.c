#include "striped.h"

#include "batch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STRIPE ((uint64_t)RA_STRIPE_BYTES)
/* How many ranges of stripes one change of the header sets. */
#define MARKS_AT_ONCE 32

/* Opening and closing */

static int data_make(struct ra_client *client, const char *key, bool writable, const char *claim,
                     struct ra_data **made) {
    int result = ra_check_length(key, RA_KEY_BYTES_MAX);
    if (result < 0)
        return result;
    struct ra_data *data = calloc(1, sizeof *data);
    if (data == NULL)
        return -ENOMEM;
    atomic_init(&data->references, 1);
    data->client = client;
    data->writable = writable;
    memcpy(data->key, key, strlen(key) + 1);
    result = ra_gate_init(&data->gate);
    if (result < 0)
        goto no_gate;
    result = -pthread_mutex_init(&data->table, NULL);
    if (result < 0)
        goto no_table;
    result = -pthread_cond_init(&data->marked, NULL);
    if (result < 0)
        goto no_condition;
    result = ra_client_use(client, claim, &data->claim);
    if (result < 0)
        goto no_client;
    *made = data;
    return 0;

no_client:
    pthread_cond_destroy(&data->marked);
no_condition:
    pthread_mutex_destroy(&data->table);
no_table:
    ra_gate_destroy(&data->gate);
no_gate:
    free(data);
    return result;
}

void ra_data_close(struct ra_data *data) {
    if (atomic_fetch_sub_explicit(&data->references, 1, memory_order_acq_rel) != 1)
        return;
    ra_client_unuse(data->client, data->claim);
    pthread_cond_destroy(&data->marked);
    pthread_mutex_destroy(&data->table);
    ra_gate_destroy(&data->gate);
    free(data->stripes);
    free(data);
}

/* What header_read finds, as far as it is not deleted. `*stripes` is to be freed unless this fails. */
static int read_live(const struct ra_call *call, const char *key, struct header *header, unsigned char **stripes,
                     uint64_t *count) {
    int result = header_read(call, key, header, stripes, count);
    if (result == 0 && header->state == HEADER_DELETED)
        result = -ENOENT;
    if (result < 0) {
        free(*stripes);
        *stripes = NULL;
    }
    return result;
}

/* With the table held: make room for the bytes of `count` stripes. */
static int make_room(struct ra_data *data, uint64_t count) {
    if (count <= data->stripe_count)
        return 0;
    uint64_t room = data->stripe_count * 2 > count ? data->stripe_count * 2 : count;
    unsigned char *stripes = realloc(data->stripes, room);
    if (stripes == NULL)
        return -ENOMEM;
    memset(stripes + data->stripe_count, 0, room - data->stripe_count);
    data->stripes = stripes;
    data->stripe_count = room;
    return 0;
}

/* Learn what the header says now. */
static int reload(const struct ra_call *call, struct ra_data *data) {
    struct header header;
    unsigned char *stripes;
    uint64_t count;
    int result = read_live(call, data->key, &header, &stripes, &count);
    if (result < 0)
        return result;
    pthread_mutex_lock(&data->table);
    result = make_room(data, count);
    if (result == 0) {
        for (uint64_t stripe = 0; stripe < count; stripe++)
            data->stripes[stripe] |= stripes[stripe];
        data->header_size = header.size;
    }
    pthread_mutex_unlock(&data->table);
    free(stripes);
    return result;
}

int ra_data_create(struct ra_client *client, const char *key, struct ra_data **made) {
    struct ra_data *data;
    int result = data_make(client, key, true, NULL, &data);
    if (result < 0)
        return result;
    struct ra_call call = {.client = client};
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = header_create(&call, key);
    while (ra_call_again(&call, result));
    if (result < 0)
        ra_data_close(data);
    else
        *made = data;
    return result;
}

int ra_data_open(struct ra_client *client, const char *key, bool writable, const char *claim, struct ra_data **opened) {
    struct ra_data *data;
    int result = data_make(client, key, writable, claim, &data);
    if (result < 0)
        return result;
    struct ra_call call = {.client = client, .claim = data->claim};
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = reload(&call, data);
    while (ra_call_again(&call, result));
    if (result < 0)
        ra_data_close(data);
    else
        *opened = data;
    return result;
}

int ra_data_exists(struct ra_client *client, const char *key) {
    struct ra_call call = {.client = client};
    int result = ra_check_length(key, RA_KEY_BYTES_MAX);
    if (result < 0)
        return result;
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = header_stat(&call, key);
    while (ra_call_again(&call, result));
    return result;
}

/* Reading */

/* A stripe that is not there is a hole, or went with the whole object. */
static int look_why_missing(const struct ra_call *call, const struct ra_data *data, bool missing) {
    return missing ? header_look(call, data->key) : 0;
}

static int read_stripes(struct ra_call *call, const struct ra_data *data, char *buffer, size_t length,
                        uint64_t offset) {
    bool missing = false;
    int result;
    if (offset % STRIPE + length <= STRIPE) {
        result = stripe_read(call, data->key, offset / STRIPE, buffer, length, offset % STRIPE, &missing);
    } else {
        struct batch batch;
        batch_begin(&batch, call, data->key);
        while (length > 0) {
            size_t piece = STRIPE - offset % STRIPE;
            piece = piece < length ? piece : length;
            batch_read(&batch, offset / STRIPE, buffer, piece, offset % STRIPE);
            buffer += piece;
            offset += piece;
            length -= piece;
        }
        result = batch_end(&batch);
        missing = batch.missing;
    }
    return result < 0 ? result : look_why_missing(call, data, missing);
}

int ra_data_read(struct ra_data *data, void *buffer, size_t length, uint64_t offset) {
    uint64_t there = offset < RA_DATA_BYTES_MAX ? RA_DATA_BYTES_MAX - offset : 0;
    if (length > there) {
        memset((char *)buffer + there, 0, length - there);
        length = there;
    }
    if (length == 0)
        return 0;
    int result;
    struct ra_call call = {.client = data->client, .claim = data->claim};
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = read_stripes(&call, data, buffer, length, offset);
    while (ra_call_again(&call, result));
    return result;
}

/* Setting bytes of stripes */

/* With the table held. */
static bool all_set(const struct ra_data *data, struct stripe_range range) {
    if (range.last >= data->stripe_count)
        return false;
    for (uint64_t stripe = range.first; stripe <= range.last; stripe++)
        if (data->stripes[stripe] == 0)
            return false;
    return true;
}

bool ra_data_may_have(struct ra_data *data, uint64_t stripe) {
    pthread_mutex_lock(&data->table);
    bool set = stripe < data->stripe_count && data->stripes[stripe] != 0;
    pthread_mutex_unlock(&data->table);
    return set;
}

/* With the table held, which is given back meanwhile: set what has been asked for, `own` in any case. */
static void set_marks(struct ra_call *call, struct ra_data *data, struct mark *own) {
    struct mark *taken[MARKS_AT_ONCE];
    struct stripe_range ranges[MARKS_AT_ONCE];
    size_t count = 1;
    taken[0] = own;
    for (struct mark **at = &data->marks; *at != NULL;) {
        struct mark *mark = *at;
        if (mark != own && count == MARKS_AT_ONCE) {
            at = &mark->next;
            continue;
        }
        *at = mark->next;
        if (mark != own)
            taken[count++] = mark;
    }
    for (size_t i = 0; i < count; i++)
        ranges[i] = taken[i]->range;
    data->marking = true;
    pthread_mutex_unlock(&data->table);
    int result = header_set(call, data->key, ranges, count);
    pthread_mutex_lock(&data->table);
    data->marking = false;
    for (size_t i = 0; i < count; i++) {
        struct mark *mark = taken[i];
        /* Others may be using another connection, which nobody has shut out. */
        if (result == -ESHUTDOWN && mark != own) {
            mark->next = data->marks;
            data->marks = mark;
            continue;
        }
        if (result == 0)
            memset(data->stripes + mark->range.first, 1, mark->range.last - mark->range.first + 1);
        mark->result = result;
        mark->done = true;
    }
    pthread_cond_broadcast(&data->marked);
}

/* Have the bytes of these stripes set, durably. Who comes while the header is written joins the next change of it. */
static int mark_stripes(struct ra_call *call, struct ra_data *data, struct stripe_range range) {
    struct mark mark = {.range = range};
    pthread_mutex_lock(&data->table);
    if (all_set(data, range)) {
        pthread_mutex_unlock(&data->table);
        return 0;
    }
    int result = make_room(data, range.last + 1);
    if (result == 0) {
        mark.next = data->marks;
        data->marks = &mark;
        while (!mark.done) {
            if (data->marking)
                pthread_cond_wait(&data->marked, &data->table);
            else
                set_marks(call, data, &mark);
        }
        result = mark.result;
    }
    pthread_mutex_unlock(&data->table);
    return result;
}

/* Writing */

static int write_stripes(struct ra_call *call, struct ra_data *data, const char *buffer, size_t length,
                         uint64_t offset) {
    struct stripe_range range = {offset / STRIPE, (offset + length - 1) / STRIPE};
    int result = mark_stripes(call, data, range);
    if (result < 0)
        return result;
    if (range.first == range.last)
        return stripe_write(call, data->key, range.first, buffer, length, offset % STRIPE);
    struct batch batch;
    batch_begin(&batch, call, data->key);
    while (length > 0) {
        size_t piece = STRIPE - offset % STRIPE;
        piece = piece < length ? piece : length;
        batch_write(&batch, offset / STRIPE, buffer, piece, offset % STRIPE);
        buffer += piece;
        offset += piece;
        length -= piece;
    }
    return batch_end(&batch);
}

static int write_all(struct ra_call *call, struct ra_data *data, const char *buffer, size_t length, uint64_t offset) {
    int result = 0;
    ra_gate_enter(&data->gate);
    while (result == 0 && length > 0) {
        size_t piece = HEADER_RANGE_MAX * STRIPE - offset % STRIPE;
        piece = piece < length ? piece : length;
        result = write_stripes(call, data, buffer, piece, offset);
        buffer += piece;
        offset += piece;
        length -= piece;
    }
    ra_gate_leave(&data->gate);
    return result;
}

int ra_data_write(struct ra_data *data, const void *buffer, size_t length, uint64_t offset) {
    if (!data->writable)
        return -EBADF;
    if (length == 0)
        return 0;
    if (offset > RA_DATA_BYTES_MAX || length > RA_DATA_BYTES_MAX - offset)
        return -EFBIG;
    int result;
    struct ra_call call = {.client = data->client, .claim = data->claim};
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = write_all(&call, data, buffer, length, offset);
    while (ra_call_again(&call, result));
    return result;
}

/* As write_all, for pieces anywhere: all of them are on their way at once. */
static int write_each(struct ra_call *call, struct ra_data *data, const struct ae_write *writes, size_t count) {
    int result = 0;
    ra_gate_enter(&data->gate);
    for (size_t i = 0; result == 0 && i < count; i++) {
        uint64_t last = (writes[i].offset + writes[i].length - 1) / STRIPE;
        for (uint64_t stripe = writes[i].offset / STRIPE; result == 0 && stripe <= last; stripe++)
            result = mark_stripes(call, data, (struct stripe_range){stripe, stripe});
    }
    if (result == 0) {
        struct batch batch;
        batch_begin(&batch, call, data->key);
        for (size_t i = 0; i < count; i++) {
            const char *from = writes[i].buffer;
            uint64_t offset = writes[i].offset, end = offset + writes[i].length;
            while (offset < end) {
                size_t piece = STRIPE - offset % STRIPE;
                piece = piece < end - offset ? piece : end - offset;
                batch_write(&batch, offset / STRIPE, from, piece, offset % STRIPE);
                from += piece;
                offset += piece;
            }
        }
        result = batch_end(&batch);
    }
    ra_gate_leave(&data->gate);
    return result;
}

int ra_data_write_each(struct ra_data *data, const struct ae_write *writes, size_t count) {
    if (!data->writable)
        return -EBADF;
    for (size_t i = 0; i < count; i++) {
        if (writes[i].length == 0)
            return -EINVAL;
        if (writes[i].offset > RA_DATA_BYTES_MAX || writes[i].length > RA_DATA_BYTES_MAX - writes[i].offset)
            return -EFBIG;
    }
    int result;
    struct ra_call call = {.client = data->client, .claim = data->claim};
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = write_each(&call, data, writes, count);
    while (ra_call_again(&call, result));
    return result;
}

/* Sizes */

/*
 * The larger of what the header says and where the last stripe ends. Stripes that end before the former do not matter;
 * of the others, any may be missing.
 */
static int find_size(struct ra_call *call, const char *key, const struct header *header, const unsigned char *stripes,
                     uint64_t count, uint64_t *size) {
    uint64_t least = header->size / STRIPE;
    *size = header->size;
    while (count > least) {
        struct batch batch;
        batch_begin(&batch, call, key);
        for (unsigned asked = 0; asked < BATCH_WINDOW && count > least; count--)
            if (stripes[count - 1] != 0) {
                batch_stat(&batch, count - 1);
                asked++;
            }
        int result = batch_end(&batch);
        if (result < 0)
            return result;
        if (batch.end > *size) {
            *size = batch.end;
            return 0;
        }
    }
    return 0;
}

/* What one look at the header tells; `*stripes` is to be freed. */
static int look(struct ra_call *call, struct ra_data *data, uint64_t *size, unsigned char **stripes, uint64_t *count) {
    struct header header;
    ra_gate_enter(&data->gate);
    int result = read_live(call, data->key, &header, stripes, count);
    if (result == 0) {
        result = find_size(call, data->key, &header, *stripes, *count, size);
        if (result < 0)
            free(*stripes);
    }
    ra_gate_leave(&data->gate);
    return result;
}

static int look_again(struct ra_data *data, uint64_t *size, unsigned char **stripes, uint64_t *count) {
    int result;
    struct ra_call call = {.client = data->client, .claim = data->claim};
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = look(&call, data, size, stripes, count);
    while (ra_call_again(&call, result));
    return result;
}

int ra_data_size(struct ra_data *data, uint64_t *size) {
    unsigned char *stripes;
    uint64_t count;
    int result = look_again(data, size, &stripes, &count);
    if (result == 0)
        free(stripes);
    return result;
}

int ra_data_allocated(struct ra_data *data, uint64_t *bytes) {
    unsigned char *stripes;
    uint64_t count, size;
    int result = look_again(data, &size, &stripes, &count);
    if (result < 0)
        return result;
    *bytes = 0;
    for (uint64_t stripe = 0; stripe < count; stripe++)
        *bytes += stripes[stripe] != 0 ? STRIPE : 0;
    if (*bytes > size)
        *bytes = size;
    free(stripes);
    return 0;
}

/* The first offset from `offset` on in a stripe that may exist, or that does not. */
static int seek(struct ra_data *data, uint64_t offset, bool for_data, uint64_t *found) {
    unsigned char *stripes;
    uint64_t count, size;
    int result = look_again(data, &size, &stripes, &count);
    if (result < 0)
        return result;
    uint64_t stripe = offset / STRIPE;
    while (stripe < count && (stripes[stripe] != 0) != for_data)
        stripe++;
    free(stripes);
    bool none = offset >= size || (for_data && stripe >= count);
    *found = stripe * STRIPE > offset ? stripe * STRIPE : offset;
    if (for_data)
        return none || *found >= size ? -ENXIO : 0;
    if (*found > size)
        *found = size;
    return none ? -ENXIO : 0;
}

int ra_data_next_data(struct ra_data *data, uint64_t offset, uint64_t *found) {
    return seek(data, offset, true, found);
}

int ra_data_next_hole(struct ra_data *data, uint64_t offset, uint64_t *found) {
    return seek(data, offset, false, found);
}

/* Punching */

/* With the gate held alone. */
static int put_size(struct ra_call *call, struct ra_data *data, uint64_t size) {
    int result = header_replace(call, data->key, &(struct header){.state = HEADER_LIVE, .size = size});
    if (result == 0) {
        pthread_mutex_lock(&data->table);
        data->header_size = size;
        pthread_mutex_unlock(&data->table);
    }
    return result;
}

/* With the gate held alone: the header alone says what the size is. */
static int pin_size(struct ra_call *call, struct ra_data *data) {
    int result = reload(call, data);
    if (result < 0)
        return result;
    struct header header = {.state = HEADER_LIVE, .size = data->header_size};
    uint64_t size;
    result = find_size(call, data->key, &header, data->stripes, data->stripe_count, &size);
    return result < 0 || size == header.size ? result : put_size(call, data, size);
}

static int punch_stripes(struct ra_call *call, struct ra_data *data, uint64_t offset, uint64_t end) {
    struct batch batch;
    batch_begin(&batch, call, data->key);
    while (offset < end) {
        uint64_t stripe = offset / STRIPE, length = STRIPE - offset % STRIPE;
        length = length < end - offset ? length : end - offset;
        if (ra_data_may_have(data, stripe)) {
            if (length == STRIPE)
                batch_remove(&batch, stripe);
            else
                batch_zero(&batch, stripe, length, offset % STRIPE);
        }
        offset += length;
    }
    return batch_end(&batch);
}

/* Whether all stripes of the range are known; `*end` is lowered to where the known ones end, `*pinned` compares. */
static bool know_stripes(struct ra_data *data, uint64_t offset, uint64_t *end, bool *pinned) {
    pthread_mutex_lock(&data->table);
    bool known = all_set(data, (struct stripe_range){offset / STRIPE, (*end - 1) / STRIPE});
    if (*end > data->stripe_count * STRIPE)
        *end = data->stripe_count * STRIPE;
    *pinned = *end <= data->header_size;
    pthread_mutex_unlock(&data->table);
    return known;
}

static int punch(struct ra_call *call, struct ra_data *data, uint64_t offset, uint64_t length) {
    uint64_t end = offset + length;
    bool pinned;
    int result = 0;
    ra_gate_enter(&data->gate);
    if (!know_stripes(data, offset, &end, &pinned)) {
        result = reload(call, data);
        end = offset + length;
        know_stripes(data, offset, &end, &pinned);
    }
    /* An OSD cuts a stripe whose end is zeroed, and would so make the object shorter. */
    bool alone = result == 0 && offset < end && !pinned;
    if (alone) {
        ra_gate_leave(&data->gate);
        ra_gate_close(&data->gate);
        result = pin_size(call, data);
    }
    if (result == 0)
        result = punch_stripes(call, data, offset, end);
    if (alone)
        ra_gate_open(&data->gate);
    else
        ra_gate_leave(&data->gate);
    return result;
}

int ra_data_punch(struct ra_data *data, uint64_t offset, uint64_t length) {
    if (!data->writable)
        return -EBADF;
    if (offset >= RA_DATA_BYTES_MAX || length == 0)
        return 0;
    if (length > RA_DATA_BYTES_MAX - offset)
        length = RA_DATA_BYTES_MAX - offset;
    int result;
    struct ra_call call = {.client = data->client, .claim = data->claim};
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = punch(&call, data, offset, length);
    while (ra_call_again(&call, result));
    return result;
}

/* Truncating */

/* With the gate held alone: no stripe has anything at or behind `size` any more. */
static int cut_stripes(struct ra_call *call, const struct ra_data *data, uint64_t size) {
    uint64_t stripe = size / STRIPE;
    struct batch batch;
    batch_begin(&batch, call, data->key);
    if (size % STRIPE != 0) {
        if (stripe < data->stripe_count && data->stripes[stripe] != 0)
            batch_zero(&batch, stripe, STRIPE - size % STRIPE, size % STRIPE);
        stripe++;
    }
    for (; stripe < data->stripe_count; stripe++)
        if (data->stripes[stripe] != 0)
            batch_remove(&batch, stripe);
    return batch_end(&batch);
}

/* Stripes behind the new size count until they are gone, so the size is never outside of what it was and becomes. */
static int truncate_alone(struct ra_call *call, struct ra_data *data, uint64_t size) {
    int result = reload(call, data);
    if (result == 0 && data->header_size != size)
        result = put_size(call, data, size);
    return result == 0 ? cut_stripes(call, data, size) : result;
}

int ra_data_truncate(struct ra_data *data, uint64_t size) {
    if (!data->writable)
        return -EBADF;
    if (size > RA_DATA_BYTES_MAX)
        return -EFBIG;
    int result;
    struct ra_call call = {.client = data->client, .claim = data->claim};
    do
        if ((result = ra_call_begin(&call)) == 0) {
            ra_gate_close(&data->gate);
            result = truncate_alone(&call, data, size);
            ra_gate_open(&data->gate);
        }
    while (ra_call_again(&call, result));
    return result;
}

/* Deleting */

static int delete_now(struct ra_call *call, const char *key) {
    struct header header;
    unsigned char *stripes;
    uint64_t count;
    int result = header_read(call, key, &header, &stripes, &count);
    if (result == 0 && header.state == HEADER_LIVE) {
        free(stripes);
        header.state = HEADER_DELETED;
        result = header_replace(call, key, &header);
        /* Not live any more: somebody else deletes it too. */
        if (result < 0 && result != -ENOENT)
            return result;
        /* No more bytes are set from here on; some may have been since. */
        result = header_read(call, key, &header, &stripes, &count);
    }
    if (result == -ENOENT)
        return 0;
    /* Of one that is damaged, the bytes of stripes are the best there is. */
    if (result < 0 && result != -EUCLEAN)
        return result;
    struct batch batch;
    batch_begin(&batch, call, key);
    for (uint64_t stripe = 0; stripe < count; stripe++)
        if (stripes[stripe] != 0)
            batch_remove(&batch, stripe);
    free(stripes);
    result = batch_end(&batch);
    if (result < 0)
        return result;
    result = call->connection->library.remove(call->connection->data, key);
    return result == -ENOENT ? 0 : result;
}

int ra_data_delete(struct ra_client *client, const char *key) {
    struct ra_call call = {.client = client};
    int result = ra_check_length(key, RA_KEY_BYTES_MAX);
    if (result < 0)
        return result;
    do
        if ((result = ra_call_begin(&call)) == 0)
            result = delete_now(&call, key);
    while (ra_call_again(&call, result));
    return result;
}
