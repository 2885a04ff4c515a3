/*
 * The gate: who is inside, in which chain, and how the chain is exchanged under way.
 *
 * A call takes the current stack when it begins and keeps it to its end. A swap puts a new stack in place, which costs
 * one short lock, and then waits until the calls on the old one are gone; those that begin meanwhile use the new one at
 * once. Only a call that completes a sector from the parent waits for the old calls: one of them may be writing to that
 * very sector of the parent.
 *
 * A rebase puts a stack in place as well, and waits for nobody: both stacks show the same and have the same head. The
 * calls on the old one linger. Whoever waits until nobody is inside, or writes to a head, waits for these too; so there
 * is never one that lingers on another head than the present one, save while a swap waits for it.
 *
 * Locks, in the order they are taken; each is released before a call waits for a disk, save where said:
 *   1. a range (range_lock.h), held across the I/O of the call that needs it
 *   2. a layer's flush_lock, held across its flush
 *   3. a layer's load_lock, held while a bitmap page is read
 *   4. the volume's gate, or a stripe of the table of regions (table.c)
 * The wait for a predecessor and the wait at the gate are taken with none of them held.
 *
 * Nobody waits at the gate of a volume who is inside the gate of another: a copy goes in at its target's only, and
 * holds its source's stack. So two copies that cross, and resizes of both volumes meanwhile, cannot wait for each
 * other.
 */
#include "volume.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void wait_for_change(struct ae_volume *volume) {
    volume->waiting++;
    pthread_cond_wait(&volume->changed, &volume->gate);
    volume->waiting--;
}

static void announce_change(struct ae_volume *volume) {
    if (volume->waiting > 0)
        pthread_cond_broadcast(&volume->changed);
}

/* Stacks */

static struct ae_stack *stack_make(struct ae_layer *top, struct ae_layer *const *rest, size_t rest_count,
                                   struct ae_layer *bottom) {
    size_t count = rest_count + (top != NULL) + (bottom != NULL);
    struct ae_stack *stack = calloc(1, sizeof *stack + count * sizeof stack->layers[0]);
    if (stack == NULL)
        return NULL;
    stack->holds = 1;
    if (top != NULL)
        stack->layers[stack->count++] = top;
    for (size_t i = 0; i < rest_count; i++)
        stack->layers[stack->count++] = rest[i];
    if (bottom != NULL)
        stack->layers[stack->count++] = bottom;
    for (size_t i = 0; i < count; i++)
        ae_layer_retain(stack->layers[i]);
    return stack;
}

static void stack_free(struct ae_stack *stack) {
    for (size_t i = 0; i < stack->count; i++)
        ae_layer_release(stack->layers[i]);
    free(stack);
}

/* With the gate held: whether that was the last hold, and the caller has to free the stack outside. */
static bool stack_unhold(struct ae_stack *stack) { return --stack->holds == 0 && stack->calls == 0; }

struct ae_stack *ae_stack_hold(struct ae_volume *volume) {
    pthread_mutex_lock(&volume->gate);
    struct ae_stack *stack = volume->current;
    stack->holds++;
    volume->inside++;
    pthread_mutex_unlock(&volume->gate);
    return stack;
}

void ae_stack_unhold(struct ae_volume *volume, struct ae_stack *stack) {
    pthread_mutex_lock(&volume->gate);
    bool unused = stack_unhold(stack);
    if (--volume->inside == 0)
        announce_change(volume);
    pthread_mutex_unlock(&volume->gate);
    if (unused)
        stack_free(stack);
}

/* Calls */

int ae_call_begin(struct ae_volume *volume, enum ae_call_kind kind, struct ae_stack **stack) {
    bool writes = kind == AE_CALL_WRITE || kind == AE_CALL_WRITE_NOWAIT;
    bool nowait = kind == AE_CALL_READ_NOWAIT || kind == AE_CALL_WRITE_NOWAIT;
    int result = 0;
    pthread_mutex_lock(&volume->gate);
    volume->inside++;
    for (;;) {
        if (writes && !volume->writable)
            result = -EROFS;
        else if (writes && atomic_load(&volume->failed) != 0)
            result = -atomic_load(&volume->failed);
        else if (volume->paused && nowait)
            result = -EAGAIN;
        if (result < 0 || !volume->paused)
            break;
        wait_for_change(volume);
    }
    if (result == 0) {
        *stack = volume->current;
        volume->current->calls++;
    } else if (--volume->inside == 0) {
        announce_change(volume);
    }
    pthread_mutex_unlock(&volume->gate);
    return result;
}

static void count_outcome(struct ae_statistics *counts, const struct ae_outcome *outcome) {
    counts->reads += outcome->reads;
    counts->read_bytes += outcome->read_bytes;
    counts->writes += outcome->writes;
    counts->written_bytes += outcome->written_bytes;
    counts->discards += outcome->discards;
    counts->discarded_bytes += outcome->discarded_bytes;
    counts->fills += outcome->fills;
}

/* The clock that file systems use for this: a few milliseconds coarse, and for that it costs next to nothing. */
static void note_change(struct ae_volume *volume) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME_COARSE, &now) == 0)
        atomic_store(&volume->changed_ns, (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
}

void ae_call_end(struct ae_volume *volume, struct ae_stack *stack, const struct ae_outcome *outcome) {
    if (outcome->changed)
        note_change(volume);
    pthread_mutex_lock(&volume->gate);
    count_outcome(&volume->counts, outcome);
    if ((stack == volume->draining || stack->lingering) && outcome->written_end > volume->draining_size)
        volume->draining_size = outcome->written_end;
    if (outcome->written_end > atomic_load(&volume->size)) {
        /* Remembered by the present head, even if this call wrote to the one before. */
        atomic_store(&volume->size, outcome->written_end);
        ae_layer_remember_size(volume->current->layers[0], outcome->written_end);
    }
    volume->inside--;
    volume->lingering -= stack->lingering;
    bool last = --stack->calls == 0;
    bool unused = last && stack->holds == 0;
    if (last || volume->inside == 0)
        announce_change(volume);
    pthread_mutex_unlock(&volume->gate);
    if (unused)
        stack_free(stack);
}

void ae_call_await_predecessor(struct ae_volume *volume, const struct ae_stack *stack) {
    pthread_mutex_lock(&volume->gate);
    while (volume->draining != NULL && volume->draining != stack && !stack->lingering)
        wait_for_change(volume);
    pthread_mutex_unlock(&volume->gate);
}

/* Opening and closing */

/* The gate is held for a few instructions: to spin for it is cheaper than to sleep. */
static int gate_init(pthread_mutex_t *gate) {
    pthread_mutexattr_t attributes;
    if (pthread_mutexattr_init(&attributes) != 0)
        return -ENOMEM;
    int result = pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);
    if (result == 0)
        result = pthread_mutex_init(gate, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return -result;
}

static int volume_init_locks(struct ae_volume *volume) {
    if (ae_range_lock_init(&volume->ranges) < 0)
        return -ENOMEM;
    if (gate_init(&volume->gate) < 0) {
        ae_range_lock_destroy(&volume->ranges);
        return -ENOMEM;
    }
    if (pthread_cond_init(&volume->changed, NULL) != 0) {
        pthread_mutex_destroy(&volume->gate);
        ae_range_lock_destroy(&volume->ranges);
        return -ENOMEM;
    }
    return 0;
}

static int cut_data(struct ae_layer *head, uint64_t size) {
    uint64_t data_size;
    int result = head->data.ops->size(head->data.ctx, &data_size);
    if (result < 0 || data_size <= size)
        return result;
    result = head->data.ops->truncate(head->data.ctx, size);
    atomic_store(&head->data_dirty, true);
    return result;
}

/* Beyond the end of the volume nothing of the parent may ever come to light. */
static void hide_parent(struct ae_layer *head, uint64_t size) {
    if (atomic_load(&head->parent_visible) > size)
        atomic_store(&head->parent_visible, size);
}

static int check_chain(struct ae_layer *const *layers, size_t count, uint64_t size, bool writable) {
    if (count == 0 || count > AE_LAYERS_MAX || (writable && (!layers[0]->head || atomic_load(&layers[0]->frozen))))
        return -EINVAL;
    for (size_t i = 0; i + 1 < count; i++)
        if (layers[i]->sealed != NULL)
            return -EINVAL;
    return size > AE_SIZE_MAX ? -EFBIG : 0;
}

int ae_volume_open(struct ae_layer *const *layers, size_t count, uint64_t size, bool writable,
                   struct ae_volume **opened) {
    int wrong = check_chain(layers, count, size, writable);
    if (wrong < 0)
        return wrong;
    if (writable) {
        int result = cut_data(layers[0], size);
        if (result < 0)
            return result;
    }
    struct ae_volume *volume = calloc(1, sizeof *volume);
    struct ae_stack *stack = stack_make(NULL, layers, count, NULL);
    if (volume == NULL || stack == NULL || volume_init_locks(volume) < 0) {
        if (stack != NULL)
            stack_free(stack);
        free(volume);
        return -ENOMEM;
    }
    volume->current = stack;
    volume->writable = writable;
    atomic_init(&volume->size, size);
    atomic_init(&volume->changed_ns, 0);
    atomic_init(&volume->failed, 0);
    if (writable) {
        hide_parent(layers[0], size);
        ae_layer_remember_size(layers[0], size);
    }
    *opened = volume;
    return 0;
}

void ae_volume_close(struct ae_volume *volume, bool clean) {
    pthread_mutex_lock(&volume->gate);
    volume->paused = false;
    announce_change(volume);
    while (volume->inside > 0)
        wait_for_change(volume);
    pthread_mutex_unlock(&volume->gate);

    struct ae_stack *stack = volume->current;
    for (size_t i = 0; clean && i < stack->count; i++)
        ae_layer_drop_live(stack->layers[i]);
    stack_free(stack);
    pthread_cond_destroy(&volume->changed);
    pthread_mutex_destroy(&volume->gate);
    ae_range_lock_destroy(&volume->ranges);
    free(volume->guard.paths);
    free(volume);
}

/* Control */

int64_t ae_volume_swap_head(struct ae_volume *volume, struct ae_layer *head) {
    struct ae_stack *old = volume->current;
    if (!volume->writable || !head->head || head == old->layers[0] || atomic_load(&head->frozen))
        return -EINVAL;
    if (atomic_load(&volume->failed) != 0)
        return -atomic_load(&volume->failed);
    if (old->count >= AE_LAYERS_MAX)
        return -EMLINK;
    struct ae_stack *fresh = stack_make(head, old->layers, old->count, NULL);
    if (fresh == NULL)
        return -ENOMEM;
    uint64_t visible = atomic_load(&head->parent_visible);
    /* A call on the old head may yet make the volume larger, and what it writes has to shine through. */
    atomic_store(&head->parent_visible, AE_SIZE_MAX);

    pthread_mutex_lock(&volume->gate);
    ae_layer_remember_size(head, atomic_load(&volume->size));
    volume->current = fresh;
    volume->draining = old;
    volume->draining_size = atomic_load(&volume->size);
    while (old->calls > 0 || volume->lingering > 0)
        wait_for_change(volume);
    volume->draining = NULL;
    uint64_t size = volume->draining_size;
    atomic_store(&head->parent_visible, visible > size ? visible : size);
    ae_layer_freeze(old->layers[0]);
    bool unused = stack_unhold(old);
    announce_change(volume);
    pthread_mutex_unlock(&volume->gate);
    if (unused)
        stack_free(old);
    return (int64_t)size;
}

void ae_volume_pause(struct ae_volume *volume) {
    pthread_mutex_lock(&volume->gate);
    volume->paused = true;
    while (volume->current->calls > 0 || volume->lingering > 0)
        wait_for_change(volume);
    pthread_mutex_unlock(&volume->gate);
}

void ae_volume_resume(struct ae_volume *volume) {
    pthread_mutex_lock(&volume->gate);
    volume->paused = false;
    announce_change(volume);
    pthread_mutex_unlock(&volume->gate);
}

int ae_volume_replace(struct ae_volume *volume, struct ae_layer *const *layers, size_t count, uint64_t size) {
    int result = volume->writable ? check_chain(layers, count, size, true) : -EROFS;
    if (result == 0)
        result = -atomic_load(&volume->failed);
    if (result == 0)
        result = cut_data(layers[0], size);
    if (result < 0)
        return result;
    struct ae_stack *fresh = stack_make(NULL, layers, count, NULL);
    if (fresh == NULL)
        return -ENOMEM;
    hide_parent(layers[0], size);
    ae_layer_remember_size(layers[0], size);

    pthread_mutex_lock(&volume->gate);
    struct ae_stack *old = volume->current;
    volume->current = fresh;
    atomic_store(&volume->size, size);
    pthread_mutex_unlock(&volume->gate);

    ae_layer_freeze(old->layers[0]);
    for (size_t i = 0; i < old->count; i++)
        ae_layer_drop_live(old->layers[i]);
    pthread_mutex_lock(&volume->gate);
    bool unused = stack_unhold(old);
    pthread_mutex_unlock(&volume->gate);
    if (unused)
        stack_free(old);
    return 0;
}

int ae_volume_rebase(struct ae_volume *volume, const uint8_t layer[16], struct ae_layer *sealed) {
    if (sealed->sealed == NULL)
        return -EINVAL;
    struct ae_stack *old = volume->current;
    size_t at = 0;
    while (at < old->count && memcmp(old->layers[at]->id, layer, 16) != 0)
        at++;
    if (at == old->count)
        return -ENOENT;
    if (volume->writable && at == 0)
        return -EBUSY;
    for (size_t i = at; i < old->count; i++)
        if (!atomic_load(&old->layers[i]->settled))
            return -EBUSY;
    struct ae_stack *fresh = stack_make(NULL, old->layers, at, sealed);
    if (fresh == NULL)
        return -ENOMEM;

    pthread_mutex_lock(&volume->gate);
    volume->current = fresh;
    old->lingering = true;
    volume->lingering += old->calls;
    bool unused = stack_unhold(old);
    pthread_mutex_unlock(&volume->gate);
    if (unused)
        stack_free(old);
    return 0;
}

/* Lower `*end` to where `above` lets its parent shine through from `offset` on. */
static int shine_through(struct ae_layer *above, uint64_t offset, uint64_t *end) {
    uint64_t visible = atomic_load(&above->parent_visible);
    if (visible < *end)
        *end = visible > offset ? visible : offset;
    if (*end == offset)
        return 0;
    bool set;
    uint64_t until;
    int result = ae_layer_run(above, ae_sector_floor(offset), ae_sector_ceil(*end), false, &set, &until);
    if (result < 0)
        return result;
    if (set)
        *end = offset;
    else if (until * AE_SECTOR_BYTES < *end)
        *end = until * AE_SECTOR_BYTES;
    return 0;
}

int ae_volume_shows(struct ae_volume *volume, const uint8_t layer[16], uint64_t offset, uint64_t end, uint64_t *until) {
    if (offset > end || end > AE_SIZE_MAX)
        return -EINVAL;
    struct ae_stack *stack = ae_stack_hold(volume);
    int result = 0;
    size_t above = 0;
    while (result == 0 && above < stack->count && memcmp(stack->layers[above]->id, layer, 16) != 0)
        result = shine_through(stack->layers[above++], offset, &end);
    if (result == 0 && above == stack->count)
        result = -ENOENT;
    ae_stack_unhold(volume, stack);
    *until = end;
    return result;
}

int ae_volume_head_is_clear(struct ae_volume *volume, uint64_t offset, uint64_t end) {
    if (offset >= end || end > AE_SIZE_MAX)
        return -EINVAL;
    bool set;
    uint64_t until;
    int result =
        ae_layer_run(volume->current->layers[0], ae_sector_floor(offset), ae_sector_ceil(end), false, &set, &until);
    return result < 0 ? result : !set && until == ae_sector_ceil(end);
}

int ae_volume_extend(struct ae_volume *volume, uint64_t size) {
    if (!volume->writable)
        return -EROFS;
    if (size > AE_SIZE_MAX)
        return -EFBIG;
    if (volume->current->count < 2 || size < atomic_load(&volume->size))
        return -EINVAL;
    if (atomic_load(&volume->failed) != 0)
        return -atomic_load(&volume->failed);
    struct ae_layer *head = volume->current->layers[0];
    atomic_store(&head->parent_visible, size);
    atomic_store(&volume->size, size);
    ae_layer_remember_size(head, size);
    return 0;
}

static void volume_fail(struct ae_volume *volume) {
    pthread_mutex_lock(&volume->gate);
    atomic_store(&volume->failed, EIO);
    announce_change(volume);
    pthread_mutex_unlock(&volume->gate);
}

void ae_volume_announce_size(struct ae_volume *volume, uint64_t size) {
    ae_layer_remember_size(volume->current->layers[0], size);
}

int ae_volume_resize(struct ae_volume *volume, uint64_t size) {
    if (!volume->writable)
        return -EROFS;
    if (size > AE_SIZE_MAX)
        return -EFBIG;
    if (atomic_load(&volume->failed) != 0)
        return -atomic_load(&volume->failed);
    struct ae_layer *head = volume->current->layers[0];
    hide_parent(head, size < atomic_load(&volume->size) ? size : atomic_load(&volume->size));
    int result = cut_data(head, size);
    atomic_store(&volume->size, size);
    ae_layer_remember_size(head, size);
    /* What was not cut off would come to light when the volume grows. */
    if (result < 0)
        volume_fail(volume);
    return result;
}

void ae_volume_fence(struct ae_volume *volume) {
    volume_fail(volume);
    /* Whoever broke our lock may write from now on: what these bits say is then out of date. */
    pthread_mutex_lock(&volume->gate);
    for (size_t i = 0; i < volume->current->count; i++)
        if (!atomic_load(&volume->current->layers[i]->settled))
            ae_layer_distrust(volume->current->layers[i]);
    pthread_mutex_unlock(&volume->gate);
}

/* Flushing */

/* The layers of the stack, but for the first `spared`. */
static int flush_layers(struct ae_volume *volume, size_t spared) {
    struct ae_stack *stack = ae_stack_hold(volume);
    int result = -atomic_load(&volume->failed);

    /* Parents first: a child's bits never become durable before the layer they lie on. */
    bool fatal = false;
    for (size_t i = stack->count; result == 0 && i > spared; i--)
        result = ae_layer_flush(stack->layers[i - 1], &fatal);
    if (fatal)
        volume_fail(volume);

    pthread_mutex_lock(&volume->gate);
    volume->counts.flushes += result == 0;
    pthread_mutex_unlock(&volume->gate);
    ae_stack_unhold(volume, stack);
    return result;
}

int ae_flush(struct ae_volume *volume) { return flush_layers(volume, 0); }

int ae_volume_flush_parents(struct ae_volume *volume) { return flush_layers(volume, 1); }

int ae_volume_guard(struct ae_volume *volume, const char *present, const char *following, uint64_t size) {
    struct ae_guard guard = {.stands = true, .size = size};
    if ((present == NULL) != (following == NULL))
        return -EINVAL;
    if (present != NULL) {
        size_t present_bytes = strlen(present) + 1, following_bytes = strlen(following) + 1;
        if (present_bytes > PATH_MAX || following_bytes > PATH_MAX)
            return -ENAMETOOLONG;
        guard.paths_bytes = present_bytes + following_bytes;
        guard.paths = malloc(guard.paths_bytes);
        if (guard.paths == NULL)
            return -ENOMEM;
        memcpy(guard.paths, present, present_bytes);
        memcpy(guard.paths + present_bytes, following, following_bytes);
    }

    pthread_mutex_lock(&volume->gate);
    char *old = volume->guard.paths;
    volume->guard = guard;
    pthread_mutex_unlock(&volume->gate);
    free(old);
    return 0;
}

/*
 * `following` first: whoever replaces a record has the new version in place before the old one goes, and the versions
 * between go oldest first. So if `following` was not there, and `present` is there after that, nothing was ever put in
 * its place before we looked. Over NFS a name that was missing may be remembered as missing for a while; so the server
 * is asked for `present`, which is gone before another node knows the lock to be its own.
 */
static bool guard_holds(const char *present, const char *following) {
    struct statx status;
    return faccessat(AT_FDCWD, following, F_OK, 0) < 0 && errno == ENOENT &&
           statx(AT_FDCWD, present, AT_STATX_FORCE_SYNC, STATX_TYPE, &status) == 0;
}

int ae_sync(struct ae_volume *volume) {
    char paths[2 * PATH_MAX];
    pthread_mutex_lock(&volume->gate);
    const struct ae_guard *guard = &volume->guard;
    bool stands = volume->writable && guard->stands && guard->size == atomic_load(&volume->size);
    bool looks = stands && guard->paths != NULL;
    if (looks)
        memcpy(paths, guard->paths, guard->paths_bytes);
    pthread_mutex_unlock(&volume->gate);
    if (!stands || (looks && !guard_holds(paths, paths + strlen(paths) + 1)))
        return -EAGAIN;
    return ae_flush(volume);
}

/* Looking */

bool ae_volume_waits(struct ae_volume *volume) {
    pthread_mutex_lock(&volume->gate);
    const struct ae_stack *stack = volume->current;
    bool waits = stack->layers[0]->data.waits || ae_layer_is_far(stack->layers[stack->count - 1]);
    pthread_mutex_unlock(&volume->gate);
    return waits;
}

uint64_t ae_volume_size(const struct ae_volume *volume) { return atomic_load(&volume->size); }

uint64_t ae_volume_parent_visible(const struct ae_volume *volume) {
    return ae_layer_parent_visible(volume->current->layers[0]);
}

uint64_t ae_volume_changed_ns(const struct ae_volume *volume) { return atomic_load(&volume->changed_ns); }

void ae_volume_forget_change(struct ae_volume *volume) { atomic_store(&volume->changed_ns, 0); }

void ae_volume_statistics(struct ae_volume *volume, struct ae_statistics *statistics) {
    pthread_mutex_lock(&volume->gate);
    *statistics = volume->counts;
    statistics->layers = volume->current->count;
    statistics->failed = atomic_load(&volume->failed);
    pthread_mutex_unlock(&volume->gate);
}
