/*
 * A stand-in for librados, built as a library that the native client loads: one cluster in memory, which outlives its
 * clients. It keeps the order of what one client sends to one object and no other, and does what no real cluster does
 * when asked: answers late or never, carries things out long after that, is full, stops in the middle.
 */
#ifndef FAKE_H
#define FAKE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* An empty cluster that works. There are no clients. */
void fake_reset(void);

/* Each operation takes up to this long; 0: none waits. */
void fake_delay_us(unsigned most);

/* The next `count` operations on objects whose name has `part` in it do nothing but fail; reads only, or changes only.
 */
void fake_fail(const char *part, bool changes, int result, unsigned count);

/* Changes of objects whose name has `part` in it are answered with ETIMEDOUT, and carried out by fake_arrive. NULL: no
 * more are. */
void fake_hold(const char *part);
void fake_arrive(void);

/* Operations on objects whose name has `part` in it wait until NULL is given. */
void fake_stop(const char *part);
/* How many wait. */
unsigned fake_stopped(void);

/* Calls that begin something do not return, although that is carried out, until it is over. */
void fake_keep(bool keep);

/* As with ms_client_mode = secure: an asynchronous read fails (ERANGE) that finds no multiple of 16 bytes. */
void fake_encrypt(void);

/* After this many more changes, none takes effect any more (EIO); -1: all do. */
void fake_crash_after(long changes);
/* How many took effect since the last fake_reset or fake_crash_after. */
long fake_changes(void);

/* No more room: what makes anything larger is refused. */
void fake_full(bool full);

/* By the address that the client is known by. Its locks are broken. */
void fake_blocklist(const char *address);

/* Whether there is such an object, and how long it is. */
bool fake_has(const char *space, const char *oid, uint64_t *size);
/* One byte of it; 0 where there is none. */
unsigned char fake_byte(const char *space, const char *oid, uint64_t offset);
size_t fake_objects(void);
/* How many hold the lock of an object. */
unsigned fake_lockers(const char *space, const char *oid);
/* Clients that are connected. */
unsigned fake_clients(void);

#endif
