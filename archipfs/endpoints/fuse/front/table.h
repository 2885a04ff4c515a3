/* Which node is which open volume, and who is inside it. */
#ifndef ARCHIPFS_FRONT_TABLE_H
#define ARCHIPFS_FRONT_TABLE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct ae_volume;

struct af_entry {
    struct af_entry *next;
    uint64_t node;
    struct ae_volume *volume;
    uint64_t size_max;
    uint64_t users; /* requests inside */
    bool leaving;   /* nobody is let in any more */
};

#define AF_BUCKETS 256u

struct af_table {
    pthread_mutex_t mutex;
    pthread_cond_t left;
    uint64_t count;
    struct af_entry *buckets[AF_BUCKETS];
};

int af_table_init(struct af_table *table);
/* Whatever is still in it is forgotten; nobody may be inside. */
void af_table_destroy(struct af_table *table);
/* -EEXIST, -ENOMEM */
int af_table_add(struct af_table *table, uint64_t node, struct ae_volume *volume, uint64_t size_max);
/* Lets nobody in any more, and waits until those inside have left. */
void af_table_remove(struct af_table *table, uint64_t node);
/* NULL: not here. Every other result is given back by af_table_leave. */
struct af_entry *af_table_enter(struct af_table *table, uint64_t node);
void af_table_leave(struct af_table *table, struct af_entry *entry);
uint64_t af_table_count(struct af_table *table);

#endif
