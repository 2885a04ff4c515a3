/* Requests as the kernel sends them, for tests. */
#ifndef ARCHIPFS_TEST_MESSAGE_H
#define ARCHIPFS_TEST_MESSAGE_H

#include <linux/fuse.h>
#include <stddef.h>
#include <string.h>

struct message {
    _Alignas(8) char bytes[8192];
    size_t length;
};

static inline void message_end(struct message *message) {
    struct fuse_in_header header;
    memcpy(&header, message->bytes, sizeof header);
    header.len = (uint32_t)message->length;
    memcpy(message->bytes, &header, sizeof header);
}

static inline void message_add(struct message *message, const void *bytes, size_t length) {
    memcpy(message->bytes + message->length, bytes, length);
    message->length += length;
    message_end(message);
}

static inline struct message message_make(uint32_t opcode, uint64_t unique, uint64_t node, const void *body,
                                          size_t length) {
    struct message message = {.length = 0};
    struct fuse_in_header header = {.opcode = opcode, .unique = unique, .nodeid = node};
    message_add(&message, &header, sizeof header);
    if (length > 0)
        message_add(&message, body, length);
    return message;
}

#endif
