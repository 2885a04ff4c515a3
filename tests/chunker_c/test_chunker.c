/* The chunker at the edges of its buffers, which the sanitizers watch. What it cuts is tested from Python. */
#include "check.h"
#include "chunker.h"

#include <stdlib.h>
#include <string.h>

_Thread_local uint64_t check_seed;

/* Just as large as asked for, so that a byte beyond is noticed. */
static void *allocate(size_t bytes) {
    void *memory = malloc(bytes > 0 ? bytes : 1);
    CHECK(memory != NULL);
    return memory;
}

static uint8_t *sectors_of(size_t sectors, int fill) {
    uint8_t *data = allocate(sectors * AC_SECTOR_BYTES);
    memset(data, fill, sectors * AC_SECTOR_BYTES);
    return data;
}

static void test_zeros_of_any_length_and_alignment(void) {
    for (size_t bytes = 0; bytes < 40; bytes++) {
        uint8_t *data = allocate(bytes + 1);
        memset(data, 0, bytes + 1);
        for (size_t start = 0; start <= 1; start++)
            CHECK(ac_is_zero(data + start, bytes));
        for (size_t i = 0; i < bytes; i++) {
            data[i] = 1;
            CHECK(!ac_is_zero(data, bytes));
            CHECK(ac_is_zero(data, i));
            data[i] = 0;
        }
        free(data);
    }
}

static void test_as_many_pieces_as_sectors_fit(void) {
    for (size_t sectors = 0; sectors < 300; sectors++) {
        uint8_t *data = sectors_of(sectors, 'x');
        struct ac_piece *pieces = allocate(sectors * sizeof(*pieces));
        CHECK_EQUAL(ac_cut(data, sectors, 0, pieces), sectors);
        for (size_t i = 0; i < sectors; i++) {
            CHECK_EQUAL(pieces[i].first, i);
            CHECK_EQUAL(pieces[i].count, 1);
        }
        free(pieces);
        free(data);
    }
}

static void test_no_piece_is_longer_than_a_chunk(void) {
    for (size_t sectors = 1; sectors < 300; sectors++) {
        uint8_t *data = sectors_of(sectors, 'x');
        size_t count = (sectors + AC_CHUNK_SECTORS_MAX - 1) / AC_CHUNK_SECTORS_MAX;
        struct ac_piece *pieces = allocate(count * sizeof(*pieces));
        CHECK_EQUAL(ac_cut(data, sectors, UINT64_MAX, pieces), count);
        CHECK_EQUAL(pieces[count - 1].first + pieces[count - 1].count, sectors);
        free(pieces);
        free(data);
    }
}

static void test_zeros_are_in_no_piece(void) {
    uint8_t *data = sectors_of(3, 0);
    struct ac_piece *pieces = allocate(1 * sizeof(*pieces));
    CHECK_EQUAL(ac_cut(data, 3, 0, pieces), 0);
    data[2 * AC_SECTOR_BYTES - 1] = 1;
    CHECK_EQUAL(ac_cut(data, 3, UINT64_MAX, pieces), 1);
    CHECK_EQUAL(pieces[0].first, 1);
    CHECK_EQUAL(pieces[0].count, 1);
    free(pieces);
    free(data);
}

int main(void) {
    static const struct test tests[] = {
        {"zeros", test_zeros_of_any_length_and_alignment},
        {"single sectors", test_as_many_pieces_as_sectors_fit},
        {"long pieces", test_no_piece_is_longer_than_a_chunk},
        {"holes", test_zeros_are_in_no_piece},
    };
    return run_tests(tests, sizeof(tests) / sizeof(tests[0]));
}
