/*
 * The table of resolved regions: bounded, shared by all sealed layers of a process, with at most one resolve of a
 * region under way.
 */
#ifndef ARCHIPFS_ENGINE_TABLE_H
#define ARCHIPFS_ENGINE_TABLE_H

#include "region.h"

/* Somebody is resolving this region. It lies on his stack, and others find it in the table. */
struct ae_ticket {
    struct ae_region_key key;
    uint64_t generation; /* of the table, when it began */
    struct ae_ticket *next;
    struct ae_waiter *waiters;
};

void ae_table_retain(struct ae_table *table);

/* The region, if the table has it (with a reference for the caller), or NULL. Waits for nothing. */
struct ae_region *ae_table_find(struct ae_table *table, const uint8_t layer[16], uint64_t number);

/*
 * The region; it waits for whoever is resolving it. Returns 1 if nobody is: then the caller has to resolve it and to
 * call ae_table_settle. A negative errno is what the other one got.
 */
int ae_table_take(struct ae_table *table, const uint8_t layer[16], uint64_t number, struct ae_ticket *ticket,
                  struct ae_region **region);
/* What came of it, to all who wait: `result` and, if that is 0, the region, whose reference stays the caller's. */
void ae_table_settle(struct ae_table *table, struct ae_ticket *ticket, int result, struct ae_region *region);

/* Resolve past the table, because what it has is of no use: between these two the caller resolves. */
void ae_table_renew_begin(struct ae_table *table, const uint8_t layer[16], uint64_t number, struct ae_ticket *ticket);
void ae_table_renew_end(struct ae_table *table, const struct ae_ticket *ticket, struct ae_region *region);

#endif
