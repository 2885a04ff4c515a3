/* Any bytes at all: nothing is read beyond them, and what is taken for a request keeps the promises of wire.h. */
#include "wire.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>

#define DATA_MAX 2048u

static void expect(bool holds) {
    if (!holds)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void parse(const char *copy, size_t size) {
    struct af_request request;
    int result = af_parse(copy, size, DATA_MAX, &request);
    if (result == -EBADMSG)
        return;
    expect(result <= 0);
    if (result == 0 && (request.kind == AF_READ || request.kind == AF_WRITE))
        expect(request.length <= DATA_MAX);
    if (result == 0 && request.kind <= AF_ZERO)
        expect(request.offset <= INT64_MAX && request.length <= INT64_MAX - request.offset);
    if (result == 0 && (request.kind == AF_SYNC || request.kind == AF_UPCALL))
        expect(size >= sizeof(struct fuse_in_header) + sizeof(struct fuse_fsync_in));
    if (result == 0 && request.kind == AF_WRITE)
        expect((const char *)request.data >= copy && (const char *)request.data + request.length <= copy + size);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    char *copy = malloc(size + 1);
    if (copy == NULL)
        return 0;
    memcpy(copy, bytes, size);
    parse(copy, size);
    /* And as the length field has it in all that come from the kernel. */
    if (size >= sizeof(uint32_t)) {
        memcpy(copy, &(uint32_t){(uint32_t)size}, sizeof(uint32_t));
        char *exact = malloc(size);
        if (exact != NULL) {
            memcpy(exact, copy, size);
            parse(exact, size);
            ssize_t init = af_init_length(exact, size);
            expect(init <= (ssize_t)size && (init >= 0 || init == -EBADMSG));
            struct af_offer offer = {0};
            (void)af_adjust_init_request(exact, size, &offer);
            (void)af_adjust_init_answer(exact, size, &offer, DATA_MAX);
            (void)af_adjust_open_answer(exact, size, size % 2, &offer);
            free(exact);
        }
    }
    free(copy);
    return 0;
}
