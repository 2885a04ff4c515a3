/* The parser: whole requests, cut short at every byte, with something trailing, with fields that cannot be. */
#include "wire.h"

#include "check.h"
#include "message.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <unistd.h>

_Thread_local uint64_t check_seed;

#define DATA_MAX (1u << 20)

/* In memory of its own size, so that a sanitizer sees every byte read beyond it. */
static int parse(const struct message *message, size_t length, struct af_request *request) {
    char *copy = malloc(length > 0 ? length : 1);
    CHECK(copy != NULL);
    memcpy(copy, message->bytes, length);
    if (length >= sizeof(uint32_t))
        memcpy(copy, &(uint32_t){(uint32_t)length}, sizeof(uint32_t)); /* fuse_in_header.len */
    int result = af_parse(copy, length, DATA_MAX, request);
    if (result == 0 && request->kind == AF_WRITE)
        CHECK((const char *)request->data >= copy && (const char *)request->data + request->length <= copy + length);
    free(copy);
    return result;
}

/* A request of which all of `needed` is needed: nothing shorter is taken, and what comes after it does not matter. */
static void check_borders(struct message message, size_t needed, enum af_kind kind) {
    struct af_request request;
    for (size_t length = 0; length < message.length; length++) {
        int result = parse(&message, length, &request);
        if (length < sizeof(struct fuse_in_header))
            CHECK(result == -EBADMSG);
        else if (length < needed)
            CHECK(result == -EINVAL && request.unique == 7 && request.answered);
    }
    CHECK(parse(&message, message.length, &request) == 0);
    CHECK(request.kind == kind && request.unique == 7 && request.node == 42 && request.answered);
    message_add(&message, "trailing", 8);
    CHECK(parse(&message, message.length, &request) == 0);
    CHECK(request.kind == kind);
}

static void check_whole(uint32_t opcode, const void *body, size_t length, enum af_kind kind) {
    struct message message = message_make(opcode, 7, 42, body, length);
    check_borders(message, message.length, kind);
}

static int parse_body(uint32_t opcode, const void *body, size_t length, struct af_request *request) {
    struct message message = message_make(opcode, 7, 42, body, length);
    return parse(&message, message.length, request);
}

static void test_read(void) {
    struct fuse_read_in in = {.offset = 123456789, .size = 4096};
    struct af_request request;
    check_whole(FUSE_READ, &in, sizeof in, AF_READ);
    CHECK(parse_body(FUSE_READ, &in, sizeof in, &request) == 0);
    CHECK(request.offset == 123456789 && request.length == 4096);
    in.size = DATA_MAX + 1;
    CHECK(parse_body(FUSE_READ, &in, sizeof in, &request) == -EINVAL);
    in.size = DATA_MAX;
    CHECK(parse_body(FUSE_READ, &in, sizeof in, &request) == 0);
    in.offset = INT64_MAX;
    CHECK(parse_body(FUSE_READ, &in, sizeof in, &request) == -EFBIG);
    in.offset = UINT64_MAX;
    CHECK(parse_body(FUSE_READ, &in, sizeof in, &request) == -EINVAL);
}

static void test_write(void) {
    struct fuse_write_in in = {.offset = 5, .size = 9};
    struct message message = message_make(FUSE_WRITE, 7, 42, &in, sizeof in);
    message_add(&message, "nine byte", 9);
    check_borders(message, message.length, AF_WRITE);
    struct af_request request;
    CHECK(af_parse(message.bytes, message.length, DATA_MAX, &request) == 0);
    CHECK(request.offset == 5 && request.length == 9 && memcmp(request.data, "nine byte", 9) == 0);
    in.size = 10; /* more than there is */
    memcpy(message.bytes + sizeof(struct fuse_in_header), &in, sizeof in);
    CHECK(parse(&message, message.length, &request) == -EINVAL);
    in.size = UINT32_MAX;
    memcpy(message.bytes + sizeof(struct fuse_in_header), &in, sizeof in);
    CHECK(parse(&message, message.length, &request) == -EINVAL);
    in = (struct fuse_write_in){.offset = INT64_MAX - 8, .size = 9};
    memcpy(message.bytes + sizeof(struct fuse_in_header), &in, sizeof in);
    CHECK(parse(&message, message.length, &request) == -EFBIG);
}

static void test_fallocate(void) {
    static const struct {
        uint32_t mode;
        int result;
        enum af_kind kind;
        bool keeps_size;
    } modes[] = {
        {0, 0, AF_ALLOCATE, false},
        {FALLOC_FL_KEEP_SIZE, 0, AF_ALLOCATE, true},
        {FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, AF_PUNCH, true},
        {FALLOC_FL_ZERO_RANGE, 0, AF_ZERO, false},
        {FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, AF_ZERO, true},
        {FALLOC_FL_PUNCH_HOLE, -EOPNOTSUPP, AF_OTHER, false},
        {FALLOC_FL_COLLAPSE_RANGE, -EOPNOTSUPP, AF_OTHER, false},
        {FALLOC_FL_INSERT_RANGE, -EOPNOTSUPP, AF_OTHER, false},
        {FALLOC_FL_UNSHARE_RANGE, -EOPNOTSUPP, AF_OTHER, false},
        {UINT32_MAX, -EOPNOTSUPP, AF_OTHER, false},
    };
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        struct fuse_fallocate_in in = {.offset = 1, .length = 2, .mode = modes[i].mode};
        struct af_request request;
        CHECK(parse_body(FUSE_FALLOCATE, &in, sizeof in, &request) == modes[i].result);
        if (modes[i].result == 0)
            CHECK(request.kind == modes[i].kind && request.keeps_size == modes[i].keeps_size);
    }
    struct fuse_fallocate_in in = {.offset = 4096, .length = 8192};
    struct af_request request;
    check_whole(FUSE_FALLOCATE, &in, sizeof in, AF_ALLOCATE);
    in.length = 0;
    CHECK(parse_body(FUSE_FALLOCATE, &in, sizeof in, &request) == -EINVAL);
    in.length = UINT64_MAX;
    CHECK(parse_body(FUSE_FALLOCATE, &in, sizeof in, &request) == -EFBIG);
    in.length = INT64_MAX - 4096;
    CHECK(parse_body(FUSE_FALLOCATE, &in, sizeof in, &request) == 0);
    in.offset = UINT64_MAX;
    CHECK(parse_body(FUSE_FALLOCATE, &in, sizeof in, &request) == -EINVAL);
}

static void test_lseek(void) {
    struct fuse_lseek_in in = {.offset = 99, .whence = SEEK_DATA};
    struct af_request request;
    check_whole(FUSE_LSEEK, &in, sizeof in, AF_SEEK_DATA);
    in.whence = SEEK_HOLE;
    check_whole(FUSE_LSEEK, &in, sizeof in, AF_SEEK_HOLE);
    in.whence = SEEK_END;
    CHECK(parse_body(FUSE_LSEEK, &in, sizeof in, &request) == -EINVAL);
    in = (struct fuse_lseek_in){.offset = UINT64_MAX, .whence = SEEK_DATA};
    CHECK(parse_body(FUSE_LSEEK, &in, sizeof in, &request) == -ENXIO);
}

static void test_fsync(void) {
    struct fuse_fsync_in in = {.fh = 3};
    check_whole(FUSE_FSYNC, &in, sizeof in, AF_SYNC);
    in.fsync_flags = FUSE_FSYNC_FDATASYNC;
    check_whole(FUSE_FSYNC, &in, sizeof in, AF_SYNC);
}

static void test_open(void) {
    struct fuse_open_in open_in = {.flags = O_RDWR | O_DIRECT};
    struct fuse_create_in create_in = {.flags = O_RDWR};
    struct af_request request;
    check_whole(FUSE_OPEN, &open_in, sizeof open_in, AF_OPEN);
    CHECK(parse_body(FUSE_OPEN, &open_in, sizeof open_in, &request) == 0 && request.direct);
    check_whole(FUSE_CREATE, &create_in, sizeof create_in, AF_CREATE);
    CHECK(parse_body(FUSE_CREATE, &create_in, sizeof create_in, &request) == 0 && !request.direct);
}

static void test_upcalls(void) {
    struct fuse_ioctl_in ioctl_in = {.cmd = 3};
    struct fuse_copy_file_range_in copy_in = {.len = 4096};
    check_whole(FUSE_IOCTL, &ioctl_in, sizeof ioctl_in, AF_UPCALL);
    check_whole(FUSE_COPY_FILE_RANGE, &copy_in, sizeof copy_in, AF_UPCALL);
    check_whole(AF_COPY_FILE_RANGE_64, &copy_in, sizeof copy_in, AF_UPCALL);
    ioctl_in.in_size = 9;
    struct message message = message_make(FUSE_IOCTL, 7, 42, &ioctl_in, sizeof ioctl_in);
    message_add(&message, "nine byte", 9);
    check_borders(message, message.length, AF_UPCALL);
}

static void test_tags(void) {
    struct message message = message_make(FUSE_GETATTR, 7, 42, "body", 4);
    struct fuse_in_header header;
    af_set_tag(message.bytes, 1234567890);
    memcpy(&header, message.bytes, sizeof header);
    CHECK(header.pid == 1234567890 && header.unique == 7 && header.nodeid == 42);
    CHECK(memcmp(message.bytes + sizeof header, "body", 4) == 0);
}

static int parse_getxattr(const char *name) {
    char body[sizeof(struct fuse_getxattr_in) + 64] = {0};
    struct af_request request;
    size_t length = strlen(name) + 1;
    memcpy(body + sizeof(struct fuse_getxattr_in), name, length);
    return parse_body(FUSE_GETXATTR, body, sizeof(struct fuse_getxattr_in) + length, &request);
}

static void test_getxattr(void) {
    struct af_request request;
    CHECK(parse_getxattr("user.archip.info") == 0);
    CHECK(parse_getxattr("user.") == 0);
    CHECK(parse_getxattr("system.posix_acl_access") == -ENODATA);
    CHECK(parse_getxattr("security.capability") == -ENODATA);
    CHECK(parse_getxattr("user") == -ENODATA);
    CHECK(parse_getxattr("") == -ENODATA);
    CHECK(parse_body(FUSE_GETXATTR, "", 0, &request) == -EINVAL);
}

static void test_others(void) {
    struct af_request request;
    CHECK(parse_body(FUSE_GETATTR, "", 0, &request) == 0 && request.kind == AF_OTHER && request.answered);
    CHECK(parse_body(FUSE_FORGET, "", 0, &request) == 0 && request.kind == AF_OTHER && !request.answered);
    CHECK(parse_body(FUSE_BATCH_FORGET, "", 0, &request) == 0 && !request.answered);
    CHECK(parse_body(FUSE_NOTIFY_REPLY, "", 0, &request) == 0 && !request.answered);
    CHECK(parse_body(FUSE_INTERRUPT, "", 0, &request) == 0 && request.kind == AF_INTERRUPT && !request.answered);
    CHECK(parse_body(UINT32_MAX, "", 0, &request) == 0 && request.kind == AF_OTHER);
    struct message message = message_make(FUSE_GETATTR, 7, 42, "", 0);
    CHECK(af_parse(message.bytes, message.length + 1, DATA_MAX, &request) == -EBADMSG); /* not as long as it says */
}

/* Adjusting */

struct answer {
    struct fuse_out_header header;
    char body[512];
};

static struct af_offer offered(uint64_t flags) { return (struct af_offer){.flags = flags, .whole = true}; }

static void test_init_request(void) {
    struct fuse_init_in in = {
        .major = 7, .minor = 40, .flags = FUSE_SPLICE_READ | FUSE_ASYNC_DIO | FUSE_INIT_EXT, .flags2 = 1u << 4};
    struct message message = message_make(FUSE_INIT, 7, 0, &in, sizeof in);
    struct af_offer offer = {0};
    for (size_t length = 0; length < sizeof(struct fuse_in_header) + 16; length++)
        CHECK(!af_adjust_init_request(message.bytes, length, &offer) && !offer.whole);
    CHECK(af_adjust_init_request(message.bytes, message.length, &offer));
    CHECK(offer.flags == (FUSE_SPLICE_READ | FUSE_ASYNC_DIO | FUSE_INIT_EXT | UINT64_C(1) << 36));
    memcpy(&in, message.bytes + sizeof(struct fuse_in_header), sizeof in);
    CHECK(in.flags == (FUSE_ASYNC_DIO | FUSE_INIT_EXT) && in.flags2 == 1u << 4);
    /* Before 7.36 the body was shorter. */
    CHECK(af_adjust_init_request(message.bytes, sizeof(struct fuse_in_header) + 16, &offer));
}

static void test_kept_init(void) {
    struct fuse_init_in in = {.major = 7, .minor = 45};
    struct message message = message_make(FUSE_INIT, 7, 0, &in, sizeof in);
    CHECK(af_init_length("", 0) == 0);
    CHECK(af_init_length((char[4096]){0}, 4096) == 0);
    CHECK(af_init_length(message.bytes, sizeof message.bytes) == (ssize_t)message.length);
    for (size_t room = sizeof(uint32_t); room < message.length; room++)
        CHECK(af_init_length(message.bytes, room) == -EBADMSG);
    CHECK(af_init_length(message.bytes, message.length) == (ssize_t)message.length);
    for (uint32_t length = 1; length < sizeof(struct fuse_in_header) + 16; length++) {
        memcpy(message.bytes, &length, sizeof length);
        CHECK(af_init_length(message.bytes, sizeof message.bytes) == -EBADMSG);
    }
    message = message_make(FUSE_GETATTR, 7, 0, &in, sizeof in);
    CHECK(af_init_length(message.bytes, sizeof message.bytes) == -EBADMSG);
}

static void test_init_answer(void) {
    struct answer answer = {.header = {.unique = 7}};
    struct fuse_init_out out = {.major = 7, .flags = FUSE_BIG_WRITES | FUSE_AUTO_INVAL_DATA, .max_write = 4096};
    memcpy(answer.body, &out, sizeof out);
    size_t whole = sizeof answer.header + sizeof out;
    struct af_offer offer = offered(FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_INIT_EXT | UINT64_C(1) << 36);
    for (size_t length = 0; length < whole; length++)
        CHECK(!af_adjust_init_answer(&answer, length, &offer, DATA_MAX));
    CHECK(!af_adjust_init_answer(&answer, whole, &(struct af_offer){0}, DATA_MAX));
    CHECK(af_adjust_init_answer(&answer, whole, &offer, DATA_MAX));
    memcpy(&out, answer.body, sizeof out);
    /* Nothing unoffered, and the kernel drops its cache only when it is told to. */
    CHECK(out.flags == (FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_INIT_EXT));
    CHECK(out.flags2 == 1u << 4 && out.max_write == DATA_MAX && out.max_pages == DATA_MAX / 4096);
    answer.header.error = -EPROTO;
    CHECK(!af_adjust_init_answer(&answer, whole, &offer, DATA_MAX));
}

static void test_open_answer(void) {
    for (int create = 0; create < 2; create++) {
        size_t at = create ? sizeof(struct fuse_entry_out) : 0;
        size_t whole = sizeof(struct fuse_out_header) + at + sizeof(struct fuse_open_out);
        struct answer answer = {.header = {.unique = 7}};
        struct fuse_open_out out = {.fh = 3};
        memcpy(answer.body + at, &out, sizeof out);
        struct af_offer offer = offered(UINT64_C(1) << 36);
        for (size_t length = 0; length < whole; length++)
            CHECK(!af_adjust_open_answer(&answer, length, create, &offer));
        CHECK(!af_adjust_open_answer(&answer, whole, create, &(struct af_offer){.whole = true}));
        CHECK(af_adjust_open_answer(&answer, whole, create, &offer));
        memcpy(&out, answer.body + at, sizeof out);
        CHECK(out.fh == 3 && out.open_flags == (FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES));
        answer.header.error = -ENOENT;
        CHECK(!af_adjust_open_answer(&answer, whole, create, &offer));
    }
}

int main(void) {
    static const struct test tests[] = {
        {"READ", test_read},
        {"WRITE", test_write},
        {"FALLOCATE", test_fallocate},
        {"LSEEK", test_lseek},
        {"FSYNC", test_fsync},
        {"OPEN and CREATE", test_open},
        {"IOCTL and COPY_FILE_RANGE", test_upcalls},
        {"attributes that nobody keeps", test_getxattr},
        {"other requests", test_others},
        {"the tag of a request", test_tags},
        {"INIT as it is kept", test_kept_init},
        {"INIT on its way to libfuse", test_init_request},
        {"the answer to INIT", test_init_answer},
        {"the answer to OPEN and CREATE", test_open_answer},
    };
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
