/*
 * One mutex, held for a few instructions and never while anybody waits for anything else. An entry is freed by whoever
 * removes it, when its last user has left.
 */
#include "table.h"

#include <errno.h>
#include <stdlib.h>

/* Node numbers are random bits of the volumes' ids. */
static struct af_entry **bucket_of(struct af_table *table, uint64_t node) { return &table->buckets[node % AF_BUCKETS]; }

static struct af_entry **find(struct af_table *table, uint64_t node) {
    struct af_entry **at = bucket_of(table, node);
    while (*at != NULL && (*at)->node != node)
        at = &(*at)->next;
    return at;
}

int af_table_init(struct af_table *table) {
    *table = (struct af_table){0};
    pthread_mutexattr_t attributes;
    if (pthread_mutexattr_init(&attributes) != 0)
        return -ENOMEM;
    /* To spin for it is cheaper than to sleep. */
    int result = pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);
    if (result == 0)
        result = pthread_mutex_init(&table->mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    if (result != 0)
        return -result;
    result = pthread_cond_init(&table->left, NULL);
    if (result != 0)
        pthread_mutex_destroy(&table->mutex);
    return -result;
}

void af_table_destroy(struct af_table *table) {
    for (size_t i = 0; i < AF_BUCKETS; i++) {
        struct af_entry *entry = table->buckets[i];
        while (entry != NULL) {
            struct af_entry *next = entry->next;
            free(entry);
            entry = next;
        }
    }
    pthread_cond_destroy(&table->left);
    pthread_mutex_destroy(&table->mutex);
}

int af_table_add(struct af_table *table, uint64_t node, struct ae_volume *volume, uint64_t size_max) {
    struct af_entry *entry = calloc(1, sizeof *entry);
    if (entry == NULL)
        return -ENOMEM;
    *entry = (struct af_entry){.node = node, .volume = volume, .size_max = size_max};
    pthread_mutex_lock(&table->mutex);
    struct af_entry **at = find(table, node);
    bool taken = *at != NULL;
    if (!taken) {
        *at = entry;
        table->count++;
    }
    pthread_mutex_unlock(&table->mutex);
    if (taken)
        free(entry);
    return taken ? -EEXIST : 0;
}

void af_table_remove(struct af_table *table, uint64_t node) {
    pthread_mutex_lock(&table->mutex);
    struct af_entry *entry = *find(table, node);
    if (entry != NULL && !entry->leaving) {
        entry->leaving = true;
        while (entry->users > 0)
            pthread_cond_wait(&table->left, &table->mutex);
        *find(table, node) = entry->next;
        table->count--;
    } else {
        entry = NULL;
    }
    pthread_mutex_unlock(&table->mutex);
    free(entry);
}

struct af_entry *af_table_enter(struct af_table *table, uint64_t node) {
    pthread_mutex_lock(&table->mutex);
    struct af_entry *entry = *find(table, node);
    if (entry != NULL && entry->leaving)
        entry = NULL;
    if (entry != NULL)
        entry->users++;
    pthread_mutex_unlock(&table->mutex);
    return entry;
}

void af_table_leave(struct af_table *table, struct af_entry *entry) {
    pthread_mutex_lock(&table->mutex);
    if (--entry->users == 0 && entry->leaving)
        pthread_cond_broadcast(&table->left);
    pthread_mutex_unlock(&table->mutex);
}

uint64_t af_table_count(struct af_table *table) {
    pthread_mutex_lock(&table->mutex);
    uint64_t count = table->count;
    pthread_mutex_unlock(&table->mutex);
    return count;
}
