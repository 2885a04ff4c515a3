/*
 * The native client of a RADOS cluster: data objects, packs and claims, for the engine (as struct ae_object) and for
 * Python (data.py). Calls may block, and may come from several threads at once. Results: 0 when it worked, a negative
 * errno when it did not. -ESHUTDOWN: this client has been shut out.
 */
#ifndef ARCHIPFS_RADOS_NATIVE_H
#define ARCHIPFS_RADOS_NATIVE_H

#include "object.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ra_client;
struct ra_data;
struct ra_pack;

#define RA_KEY_BYTES_MAX 200
#define RA_OWNER_BYTES_MAX 200
#define RA_STRIPE_BYTES 4194304
#define RA_DATA_BYTES_MAX 70368744177664

struct ra_settings {
    /* What dlopen finds librados by. */
    const char *library;
    const char *conf;
    /* Without "client." */
    const char *user;
    /* NULL: where the conf file says. */
    const char *keyring;
    const char *pool;
    /* The backend's; that of data objects is this and ".data", that of packs this and ".packs". */
    const char *space;
    /* Of connecting, in seconds; not 0. */
    unsigned timeout_s;
    /* Of each operation on an object, and of waiting for a claim; 0: for ever. */
    unsigned operation_timeout_s;
};

/* Connect. When it fails, `problem` says at what, in a line. */
int ra_client_open(const struct ra_settings *settings, struct ra_client **client, char *problem, size_t problem_bytes);

/* Nothing can be opened any more, and all claims are forgotten, not given up. What is open goes on. */
void ra_client_close(struct ra_client *client);

/* Whether something that was sent came back with -ESHUTDOWN. */
bool ra_client_is_shut_out(struct ra_client *client);

/* Under which addresses the cluster knows this client, as rados_getaddrs gives them; -ERANGE: longer than that. */
int ra_client_addresses(struct ra_client *client, char *addresses, size_t addresses_bytes);

/*
 * Wait until this client has the cluster's newest map. OSDs that get anything from it later do not look at that before
 * they have the same map: so whoever another client has put on the blocklist by then is refused before us.
 */
int ra_client_wait_for_latest_map(struct ra_client *client);

/*
 * Go on by the connection of `successor`, which goes on too. What was opened under a claim waits until that is made
 * again.
 */
void ra_client_adopt(struct ra_client *client, struct ra_client *successor);

/* -EBUSY: another owner has it claimed. A claim that is there is kept. */
int ra_claim(struct ra_client *client, const char *key, const char *owner);

/*
 * Give a claim up; there may be none. Whoever waits for it fails with -EIO, and what is under way is waited for.
 * `*kept`: a write under it was given up after its time, and may still arrive. Then the claim is left in the store, so
 * that the next one who claims it shuts this client out first. Objects that were opened under it stay without one, also
 * when it is claimed again. After an error it is given up, but the lock may still be there.
 */
int ra_disclaim(struct ra_client *client, const char *key, bool *kept);

/* An empty data object, for writing. -EEXIST: there is one. */
int ra_data_create(struct ra_client *client, const char *key, struct ra_data **data);

/* `claim`: the key of the claim under which it is used, or NULL. -ENOENT; -EUCLEAN: its header is damaged. */
int ra_data_open(struct ra_client *client, const char *key, bool writable, const char *claim, struct ra_data **data);

/* Remove it with all its stripes. There may be none. */
int ra_data_delete(struct ra_client *client, const char *key);

/* 0, or -ENOENT. One that is half removed is there. */
int ra_data_exists(struct ra_client *client, const char *key);

/* One more that must be closed. */
void ra_data_share(struct ra_data *data, struct ae_object *object);
void ra_data_close(struct ra_data *data);

/* As those of struct ae_object_ops, but with the errno as it came. */
int ra_data_read(struct ra_data *data, void *buffer, size_t length, uint64_t offset);
int ra_data_write(struct ra_data *data, const void *buffer, size_t length, uint64_t offset);
/* As so many writes, none of them empty, on their way at once. */
int ra_data_write_each(struct ra_data *data, const struct ae_write *writes, size_t count);
int ra_data_punch(struct ra_data *data, uint64_t offset, uint64_t length);
int ra_data_truncate(struct ra_data *data, uint64_t size);
int ra_data_size(struct ra_data *data, uint64_t *size);
int ra_data_allocated(struct ra_data *data, uint64_t *bytes);
int ra_data_next_data(struct ra_data *data, uint64_t offset, uint64_t *found);
int ra_data_next_hole(struct ra_data *data, uint64_t offset, uint64_t *found);

/* A pack, which is one RADOS object and never changes. -ENOENT, here and when it was deleted meanwhile. */
int ra_pack_open(struct ra_client *client, const char *key, struct ra_pack **pack);
void ra_pack_share(struct ra_pack *pack, struct ae_object *object);
void ra_pack_close(struct ra_pack *pack);
int ra_pack_read(struct ra_pack *pack, void *buffer, size_t length, uint64_t offset);
uint64_t ra_pack_bytes(const struct ra_pack *pack);

#endif
