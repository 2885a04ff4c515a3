/* See world.h. */
#include "world.h"
#include "check.h"

#include <dirent.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#define SECTOR AE_SECTOR_BYTES

_Thread_local uint64_t check_seed;

void machine_start(struct machine *machine, uint64_t seed) {
    CHECK(pthread_mutex_init(&machine->mutex, NULL) == 0);
    machine->random = random_seed(seed);
    machine->nowait_misses = 30;
    machine->transfers = NULL;
    machine->begin_misses = 10;
    machine->lands_at_once = true;
    machine->flush_ns = 0;
    machine->disks_copy = true;
    machine->disks_wait = false;
}

void machine_stop(struct machine *machine) { pthread_mutex_destroy(&machine->mutex); }

/* Sectors are kept in order of their number. */

static size_t sector_at(const struct disk *disk, uint64_t number) {
    size_t low = 0, high = disk->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (disk->sectors[middle].number < number)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static const uint8_t *sector_look(const struct disk *disk, uint64_t number) {
    size_t at = sector_at(disk, number);
    return at < disk->count && disk->sectors[at].number == number ? disk->sectors[at].now : NULL;
}

static struct disk_sector *sector_get(struct disk *disk, uint64_t number) {
    size_t at = sector_at(disk, number);
    if (at < disk->count && disk->sectors[at].number == number)
        return &disk->sectors[at];
    if (disk->count == disk->room) {
        disk->room = disk->room * 2 + 16;
        disk->sectors = realloc(disk->sectors, disk->room * sizeof disk->sectors[0]);
        CHECK(disk->sectors != NULL);
    }
    memmove(&disk->sectors[at + 1], &disk->sectors[at], (disk->count - at) * sizeof disk->sectors[0]);
    disk->count++;
    disk->sectors[at] = (struct disk_sector){.number = number};
    return &disk->sectors[at];
}

/* Bytes that are the sector's own, so that neither version ever changes under the other. */
static uint8_t *sector_own(struct disk_sector *sector) {
    uint8_t *bytes = calloc(1, SECTOR);
    CHECK(bytes != NULL);
    if (sector->now != NULL)
        memcpy(bytes, sector->now, SECTOR);
    if (sector->now != sector->safe)
        free(sector->now);
    sector->now = bytes;
    sector->changed = true;
    return bytes;
}

static void sector_clear(struct disk_sector *sector) {
    if (sector->now != sector->safe)
        free(sector->now);
    sector->now = NULL;
    sector->changed = true;
}

static void sector_settle(struct disk_sector *sector, bool keep_now) {
    if (sector->now != sector->safe)
        free(keep_now ? sector->safe : sector->now);
    if (keep_now)
        sector->safe = sector->now;
    else
        sector->now = sector->safe;
    sector->changed = false;
}

static int disk_enter(struct disk *disk, enum disk_call call) {
    pthread_mutex_lock(&disk->machine->mutex);
    disk->calls[call]++;
    if (disk->fail_in[call] == 0)
        return 0;
    if (disk->fail_in[call] > 1) {
        disk->fail_in[call]--;
        return 0;
    }
    if (!disk->keeps_failing)
        disk->fail_in[call] = 0;
    return disk->fail_with[call];
}

static int disk_leave(struct disk *disk, int result) {
    pthread_mutex_unlock(&disk->machine->mutex);
    return result;
}

static void copy_out(const struct disk *disk, char *to, size_t length, uint64_t offset) {
    while (length > 0) {
        size_t within = offset % SECTOR;
        size_t piece = SECTOR - within < length ? SECTOR - within : length;
        const uint8_t *bytes = offset < disk->size_now ? sector_look(disk, offset / SECTOR) : NULL;
        if (bytes != NULL)
            memcpy(to, bytes + within, piece);
        else
            memset(to, 0, piece);
        to += piece;
        offset += piece;
        length -= piece;
    }
}

static int disk_pread(void *ctx, void *buffer, size_t length, uint64_t offset) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_READ);
    if (result == 0)
        copy_out(disk, buffer, length, offset);
    return disk_leave(disk, result);
}

static int disk_pread_nowait(void *ctx, void *buffer, size_t length, uint64_t offset) {
    struct disk *disk = ctx;
    pthread_mutex_lock(&disk->machine->mutex);
    if (random_below(&disk->machine->random, 100) < disk->machine->nowait_misses)
        return disk_leave(disk, -EAGAIN);
    copy_out(disk, buffer, length, offset);
    return disk_leave(disk, 0);
}

static void copy_in(struct disk *disk, const char *from, size_t length, uint64_t offset) {
    while (length > 0) {
        size_t within = offset % SECTOR;
        size_t piece = SECTOR - within < length ? SECTOR - within : length;
        memcpy(sector_own(sector_get(disk, offset / SECTOR)) + within, from, piece);
        from += piece;
        offset += piece;
        length -= piece;
        if (disk->size_now < offset)
            disk->size_now = offset;
    }
}

static int disk_pwrite(void *ctx, const void *buffer, size_t length, uint64_t offset) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_WRITE);
    /* One that fails has done its first half. */
    if (result < 0)
        length /= 2;
    copy_in(disk, buffer, length, offset);
    return disk_leave(disk, result);
}

static void clear_range(struct disk *disk, uint64_t offset, uint64_t end) {
    for (size_t i = sector_at(disk, offset / SECTOR); i < disk->count && disk->sectors[i].number * SECTOR < end; i++) {
        struct disk_sector *sector = &disk->sectors[i];
        uint64_t start = sector->number * SECTOR;
        uint64_t from = offset > start ? offset - start : 0;
        uint64_t to = end - start < SECTOR ? end - start : SECTOR;
        if (from == 0 && to == SECTOR)
            sector_clear(sector);
        else if (sector->now != NULL)
            memset(sector_own(sector) + from, 0, to - from);
    }
}

static int disk_punch(void *ctx, uint64_t offset, uint64_t length) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_PUNCH);
    if (result == 0)
        clear_range(disk, offset, offset + length);
    return disk_leave(disk, result);
}

static int disk_truncate(void *ctx, uint64_t size) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_TRUNCATE);
    if (result == 0) {
        if (size < disk->size_now)
            clear_range(disk, size, UINT64_MAX);
        disk->size_now = size;
    }
    return disk_leave(disk, result);
}

static int disk_flush(void *ctx) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_FLUSH);
    if (result == 0) {
        for (size_t i = 0; i < disk->count; i++)
            sector_settle(&disk->sectors[i], true);
        disk->size_safe = disk->size_now;
    }
    disk_leave(disk, result);
    if (disk->machine->flush_ns > 0)
        nanosleep(&(struct timespec){.tv_nsec = disk->machine->flush_ns}, NULL);
    return result;
}

static int disk_size(void *ctx, uint64_t *size) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_SIZE);
    *size = disk->size_now;
    return disk_leave(disk, result);
}

static int disk_next_data(void *ctx, uint64_t offset, uint64_t *found) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_SEEK);
    if (result < 0)
        return disk_leave(disk, result);
    for (size_t i = sector_at(disk, offset / SECTOR); i < disk->count; i++) {
        uint64_t start = disk->sectors[i].number * SECTOR;
        if (disk->sectors[i].now != NULL && start < disk->size_now) {
            *found = start > offset ? start : offset;
            return disk_leave(disk, *found < disk->size_now ? 0 : -ENXIO);
        }
    }
    return disk_leave(disk, -ENXIO);
}

static int disk_next_hole(void *ctx, uint64_t offset, uint64_t *found) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_SEEK);
    if (result < 0)
        return disk_leave(disk, result);
    if (offset >= disk->size_now)
        return disk_leave(disk, -ENXIO);
    *found = offset;
    while (*found < disk->size_now && sector_look(disk, *found / SECTOR) != NULL)
        *found = (*found / SECTOR + 1) * SECTOR;
    if (*found > disk->size_now)
        *found = disk->size_now;
    return disk_leave(disk, 0);
}

/* Under one lock: a copy is all there or not at all. */
static int disk_copy_from(void *ctx, uint64_t offset, const struct ae_object *source, uint64_t from, size_t length) {
    struct disk *disk = ctx;
    if (source->ops->pread != disk_pread || !disk->machine->disks_copy)
        return -EOPNOTSUPP;
    char *bytes = malloc(length);
    CHECK(bytes != NULL);
    int result = disk_enter(disk, DISK_COPY);
    if (result == 0) {
        copy_out(source->ctx, bytes, length, from);
        copy_in(disk, bytes, length, offset);
    }
    free(bytes);
    return disk_leave(disk, result);
}

static void disk_close(void *ctx) { (void)ctx; }

static const struct ae_object_ops disk_ops = {
    .pread = disk_pread,
    .pread_nowait = disk_pread_nowait,
    .pwrite = disk_pwrite,
    .punch = disk_punch,
    .truncate = disk_truncate,
    .flush = disk_flush,
    .size = disk_size,
    .next_data = disk_next_data,
    .next_hole = disk_next_hole,
    .copy_from = disk_copy_from,
    .close = disk_close,
};

/* One journey for all of them; in the middle of it the power may fail. */
static int disk_pwrite_each(void *ctx, const struct ae_write *writes, size_t count) {
    struct disk *disk = ctx;
    int result = disk_enter(disk, DISK_WRITE);
    disk_leave(disk, result);
    for (size_t i = 0; i < count; i++) {
        pthread_mutex_lock(&disk->machine->mutex);
        /* The last first: they come in any order. */
        const struct ae_write *each = &writes[count - 1 - i];
        if (result == 0 || i < count / 2)
            copy_in(disk, each->buffer, each->length, each->offset);
        disk_leave(disk, 0);
    }
    return result;
}

/* Transfers */

struct disk_transfer {
    struct disk_transfer *next;
    struct ae_transfer *transfer;
    struct disk *disk;
    bool writes;
    void *buffer; /* of a write, a copy: the cluster's client has one too */
    size_t length;
    uint64_t offset;
    int result;
};

static int begin(struct disk *disk, bool writes, void *buffer, size_t length, uint64_t offset,
                 struct ae_transfer *transfer) {
    struct machine *machine = disk->machine;
    struct disk_transfer *begun = malloc(sizeof *begun);
    CHECK(begun != NULL);
    *begun = (struct disk_transfer){
        .transfer = transfer, .disk = disk, .writes = writes, .buffer = buffer, .length = length, .offset = offset};
    transfer->driver = begun;
    if (writes) {
        begun->buffer = malloc(length);
        CHECK(begun->buffer != NULL);
        memcpy(begun->buffer, buffer, length);
    }
    pthread_mutex_lock(&machine->mutex);
    bool misses = random_below(&machine->random, 100) < machine->begin_misses;
    bool lands_at_once = machine->lands_at_once && random_below(&machine->random, 4) == 0;
    if (!misses) {
        begun->next = machine->transfers;
        machine->transfers = begun;
    }
    pthread_mutex_unlock(&machine->mutex);
    if (misses) {
        if (writes)
            free(begun->buffer);
        free(begun);
        return -EAGAIN;
    }
    if (lands_at_once)
        machine_land(machine);
    return 0;
}

static int disk_pread_begin(void *ctx, void *buffer, size_t length, uint64_t offset, struct ae_transfer *transfer) {
    return begin(ctx, false, buffer, length, offset, transfer);
}

static int disk_pwrite_begin(void *ctx, const void *buffer, size_t length, uint64_t offset,
                             struct ae_transfer *transfer) {
    return begin(ctx, true, (void *)(uintptr_t)buffer, length, offset, transfer);
}

bool machine_land(struct machine *machine) {
    pthread_mutex_lock(&machine->mutex);
    size_t count = 0;
    for (struct disk_transfer *each = machine->transfers; each != NULL; each = each->next)
        count++;
    struct disk_transfer **at = &machine->transfers;
    for (size_t skip = count > 0 ? random_below(&machine->random, count) : 0; skip > 0; skip--)
        at = &(*at)->next;
    struct disk_transfer *landing = *at;
    if (landing != NULL)
        *at = landing->next;
    bool is_lost = random_below(&machine->random, 100) < machine->begin_misses;
    bool is_done = random_below(&machine->random, 2) == 0;
    pthread_mutex_unlock(&machine->mutex);
    if (landing == NULL)
        return false;
    if (is_lost && !is_done)
        landing->result = -EAGAIN;
    else if (landing->writes)
        landing->result = disk_pwrite(landing->disk, landing->buffer, landing->length, landing->offset);
    else
        landing->result = disk_pread(landing->disk, landing->buffer, landing->length, landing->offset);
    if (is_lost)
        landing->result = -EAGAIN;
    landing->transfer->landed(landing->transfer);
    return true;
}

static int disk_settle(void *ctx, struct ae_transfer *transfer) {
    struct disk_transfer *landed = transfer->driver;
    CHECK(landed->disk == ctx);
    int result = landed->result;
    if (landed->writes)
        free(landed->buffer);
    free(landed);
    return result;
}

struct journey {
    struct ae_begun begun;
    atomic_bool landed;
};

static void note(struct ae_transfer *transfer) { atomic_store(&((struct journey *)transfer)->landed, true); }

/* Whoever waits for his own has others land: so what one thread begins lands on another. */
static ssize_t settle(struct machine *machine, struct journey *journey) {
    while (!atomic_load(&journey->landed))
        machine_land(machine);
    return ae_settle(&journey->begun);
}

ssize_t machine_read(struct machine *machine, struct ae_volume *volume, void *buffer, size_t length, uint64_t offset) {
    struct journey journey = {.begun.transfer.landed = note};
    ssize_t got = ae_read_begin(volume, buffer, length, offset, &journey.begun);
    if (got == 0)
        got = settle(machine, &journey);
    return got == -EAGAIN ? ae_read(volume, buffer, length, offset) : got;
}

ssize_t machine_write(struct machine *machine, struct ae_volume *volume, const void *buffer, size_t length,
                      uint64_t offset) {
    struct journey journey = {.begun.transfer.landed = note};
    ssize_t done = ae_write_begin(volume, buffer, length, offset, &journey.begun);
    if (done == 0)
        done = settle(machine, &journey);
    return done == -EAGAIN ? ae_write(volume, buffer, length, offset) : done;
}

static const struct ae_object_ops far_disk_ops = {
    .pread = disk_pread,
    .pread_begin = disk_pread_begin,
    .pwrite_begin = disk_pwrite_begin,
    .settle = disk_settle,
    .pwrite = disk_pwrite,
    .pwrite_each = disk_pwrite_each,
    .punch = disk_punch,
    .truncate = disk_truncate,
    .flush = disk_flush,
    .size = disk_size,
    .next_data = disk_next_data,
    .next_hole = disk_next_hole,
    .close = disk_close,
};

struct ae_object disk_object(struct disk *disk) {
    return (struct ae_object){
        .ops = disk->machine->disks_wait ? &far_disk_ops : &disk_ops,
        .ctx = disk,
        .waits = disk->machine->disks_wait,
        .first_write_bytes = disk->machine->disks_wait ? 0 : DISK_FIRST_WRITE_BYTES,
    };
}

void disk_init(struct disk *disk, struct machine *machine) { *disk = (struct disk){.machine = machine}; }

void disk_free(struct disk *disk) {
    for (size_t i = 0; i < disk->count; i++) {
        sector_settle(&disk->sectors[i], true);
        free(disk->sectors[i].now);
    }
    free(disk->sectors);
    disk_init(disk, disk->machine);
}

void disk_fail(struct disk *disk, enum disk_call call, unsigned in, int error) {
    disk->fail_in[call] = in;
    disk->fail_with[call] = error;
}

void disk_power_cut(struct disk *disk, uint64_t *random) {
    /* All, nothing, or each as it falls. */
    uint64_t mood = random_below(random, 4);
    for (size_t i = 0; i < disk->count; i++)
        if (disk->sectors[i].changed)
            sector_settle(&disk->sectors[i], mood == 0 ? false : mood == 1 ? true : random_below(random, 2) == 0);
    if (random_below(random, 2) == 0)
        disk->size_now = disk->size_safe;
    else
        disk->size_safe = disk->size_now;
    clear_range(disk, disk->size_now, UINT64_MAX);
    for (size_t i = 0; i < disk->count; i++)
        sector_settle(&disk->sectors[i], true);
}

void disk_copy_cut(const struct disk *disk, struct disk *copy, uint64_t *random) {
    disk_init(copy, disk->machine);
    for (size_t i = 0; i < disk->count; i++) {
        const struct disk_sector *from = &disk->sectors[i];
        struct disk_sector *to = sector_get(copy, from->number);
        if (from->safe != NULL)
            memcpy(sector_own(to), from->safe, SECTOR);
        sector_settle(to, true);
        if (from->changed) {
            sector_clear(to);
            if (from->now != NULL)
                memcpy(sector_own(to), from->now, SECTOR);
        }
    }
    copy->size_now = disk->size_now;
    copy->size_safe = disk->size_safe;
    disk_power_cut(copy, random);
}

/* Layers */

void stored_layer_init(struct stored_layer *stored, struct machine *machine, const char *directory, unsigned number) {
    memset(stored, 0, sizeof *stored);
    memcpy(stored->id, &number, sizeof number);
    disk_init(&stored->data, machine);
    disk_init(&stored->bitmap, machine);
    snprintf(stored->live_path, sizeof stored->live_path, "%s/live-%u", directory, number);
    CHECK_EQUAL(ae_bitmap_format(disk_object(&stored->bitmap), stored->id), 0);
}

void stored_layer_free(struct stored_layer *stored) {
    disk_free(&stored->data);
    disk_free(&stored->bitmap);
}

struct ae_layer *stored_layer_open(struct stored_layer *stored, bool head, bool live, const uint8_t boot_id[16]) {
    struct ae_layer_spec spec = {
        .data = disk_object(&stored->data),
        .bitmap = disk_object(&stored->bitmap),
        .parent_visible = stored->parent_visible,
        .live_path = live ? stored->live_path : NULL,
        .head = head,
    };
    memcpy(spec.id, stored->id, sizeof spec.id);
    memcpy(spec.boot_id, boot_id, sizeof spec.boot_id);
    struct ae_layer *layer = NULL;
    CHECK_EQUAL(ae_layer_open(&spec, &layer), 0);
    return layer;
}

/* Directories */

void directory_make(char path[128]) {
    const char *base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(path, 128, "%s/engine-test-XXXXXX", base);
    CHECK(mkdtemp(path) != NULL);
}

void directory_remove(const char *path) {
    DIR *directory = opendir(path);
    CHECK(directory != NULL);
    struct dirent *entry;
    while ((entry = readdir(directory)) != NULL)
        if (entry->d_name[0] != '.')
            CHECK(unlinkat(dirfd(directory), entry->d_name, 0) == 0);
    closedir(directory);
    CHECK(rmdir(path) == 0);
}
