/*
 * Claims: a shared lock of cls_lock on the object "claim/<key>", with the owner as tag and as cookie. The cluster notes
 * the address of whoever holds it; by that a later owner has this client shut out (blocklisted) before it takes over.
 *
 * A claim is given up in this order, so that no write of ours arrives after the lock is gone: no new calls; those under
 * way end; the lock goes. A write that librados gave up on (rados_osd_op_timeout) is another matter. It is not sent
 * again, but what was sent may lie in an OSD's queue and be carried out whenever that wakes up. So after such a write
 * the lock stays, and with it our address.
 */
#include "client.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOCK_NAME "archipfs"
#define PREFIX "claim/"

static void object_name(const char *key, char *name, size_t name_bytes) {
    snprintf(name, name_bytes, PREFIX "%s", key);
}

/* The latest of them. */
static struct ra_claim *find(struct ra_client *client, const char *key) {
    struct ra_claim *claim = client->claims;
    while (claim != NULL && strcmp(claim->key, key) != 0)
        claim = claim->next;
    return claim;
}

void ra_claim_forget(struct ra_client *client, struct ra_claim *claim) {
    if (claim->held || claim->uncertain || claim->references > 0 || claim->calls > 0)
        return;
    struct ra_claim **at = &client->claims;
    while (*at != claim)
        at = &(*at)->next;
    *at = claim->next;
    free(claim);
}

/*
 * With the mutex held. What was given up stays so for the objects that were opened under it: they are of an earlier
 * owner, and one of their writes may still be waiting.
 */
static int note_held(struct ra_client *client, const char *key, const char *owner, uint64_t number) {
    struct ra_claim *former = find(client, key), *claim = former;
    if (former == NULL || (!former->held && former->references > 0)) {
        claim = calloc(1, sizeof *claim);
        if (claim == NULL)
            return -ENOMEM;
        snprintf(claim->key, sizeof claim->key, "%s", key);
        claim->number = number;
        claim->next = client->claims;
        client->claims = claim;
    }
    if (former != NULL && former != claim) {
        claim->uncertain = former->uncertain && former->number == number;
        former->uncertain = false;
    }
    /* What a connection that was shut out has sent does not arrive any more. */
    if (claim->number != number)
        claim->uncertain = false;
    snprintf(claim->owner, sizeof claim->owner, "%s", owner);
    claim->number = number;
    claim->held = true;
    pthread_cond_broadcast(&client->changed);
    return 0;
}

int ra_claim(struct ra_client *client, const char *key, const char *owner) {
    char name[sizeof PREFIX + RA_KEY_BYTES_MAX];
    if (ra_check_length(key, RA_KEY_BYTES_MAX) < 0 || ra_check_length(owner, RA_OWNER_BYTES_MAX) < 0)
        return -EINVAL;
    object_name(key, name, sizeof name);
    for (;;) {
        struct ra_call call = {.client = client};
        int result = ra_call_begin(&call);
        if (result < 0)
            return result;
        struct ra_connection *connection = call.connection;
        uint64_t number = call.number;
        result = connection->library.lock_shared(connection->base, name, LOCK_NAME, owner, owner, "", NULL,
                                                 RA_LOCK_MAY_RENEW);
        bool current = true;
        if (result == 0) {
            pthread_mutex_lock(&client->mutex);
            current = number == client->number;
            if (client->closed)
                result = -EBADF;
            else if (current)
                result = note_held(client, key, owner, number);
            pthread_mutex_unlock(&client->mutex);
        }
        ra_call_again(&call, result);
        /* Adopted in between: the lock was taken by a connection that is not ours any more. */
        if (result < 0 || current)
            return result;
    }
}

int ra_disclaim(struct ra_client *client, const char *key, bool *kept) {
    char name[sizeof PREFIX + RA_KEY_BYTES_MAX], owner[RA_OWNER_BYTES_MAX + 1];
    *kept = false;
    if (ra_check_length(key, RA_KEY_BYTES_MAX) < 0)
        return -EINVAL;
    object_name(key, name, sizeof name);
    pthread_mutex_lock(&client->mutex);
    struct ra_claim *claim = find(client, key);
    bool ours = claim != NULL && claim->held && claim->number == client->number;
    if (claim != NULL) {
        claim->references++;
        claim->held = false;
        pthread_cond_broadcast(&client->changed);
        while (claim->calls > 0)
            pthread_cond_wait(&client->changed, &client->mutex);
        memcpy(owner, claim->owner, sizeof owner);
        *kept = claim->uncertain && claim->number == client->number;
        claim->references--;
        ra_claim_forget(client, claim);
    }
    pthread_mutex_unlock(&client->mutex);
    if (!ours || *kept)
        return 0;

    struct ra_call call = {.client = client};
    int result = ra_call_begin(&call);
    if (result == 0)
        result = call.connection->library.unlock(call.connection->base, name, LOCK_NAME, owner);
    ra_call_again(&call, result);
    return result == -ENOENT ? 0 : result;
}
