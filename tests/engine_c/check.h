/* A test is a function; a check that fails says where and ends the program. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Said when a check fails: what to give the test to see it again. */
extern _Thread_local uint64_t check_seed;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: seed %llu: not so: %s\n", __FILE__, __LINE__, (unsigned long long)check_seed,      \
                    #condition);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define CHECK_EQUAL(left, right)                                                                                       \
    do {                                                                                                               \
        long long left_value = (long long)(left), right_value = (long long)(right);                                    \
        if (left_value != right_value) {                                                                               \
            fprintf(stderr, "%s:%d: seed %llu: %s is %lld, not %s = %lld\n", __FILE__, __LINE__,                       \
                    (unsigned long long)check_seed, #left, left_value, #right, right_value);                           \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

struct test {
    const char *name;
    void (*run)(void);
};

static inline int run_tests(const struct test *tests, size_t count) {
    for (size_t i = 0; i < count; i++) {
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        tests[i].run();
        clock_gettime(CLOCK_MONOTONIC, &end);
        double seconds = (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9;
        printf("ok %-50s %6.2f s\n", tests[i].name, seconds);
        fflush(stdout);
    }
    printf("%zu passed, 0 failed\n", count);
    return 0;
}

/* xorshift64*: the same numbers for the same seed, everywhere. */
static inline uint64_t random_next(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline uint64_t random_below(uint64_t *state, uint64_t bound) { return (random_next(state) >> 11) % bound; }

static inline uint64_t random_seed(uint64_t number) { return (number + 1) * UINT64_C(0x9e3779b97f4a7c15); }

#endif
