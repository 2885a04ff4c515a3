/* What libfuse has, compared with a plain array of it. */
#include "pending.h"

#include "check.h"

_Thread_local uint64_t check_seed;

#define REQUESTS 3000u
#define STEPS 100000u

struct noted {
    uint32_t tag; /* 0: not there */
    enum af_kind kind;
};

static void add(struct af_pending *pending, struct noted *noted, uint64_t unique, enum af_kind kind) {
    CHECK(af_pending_add(pending, unique, kind, &noted->tag) == 0);
    CHECK(noted->tag > 0 && noted->tag <= REQUESTS); /* places are used again */
    noted->kind = kind;
}

/* Numbers of which many fall into one bucket, with and without the mark of a repetition. */
static uint64_t unique_of(uint64_t index) {
    return 2 * (index + 1) * (index % 3 == 0 ? AF_PENDING_BUCKETS : 1) | (index % 2 ? AF_UNIQUE_RESEND : 0);
}

static void test_any_order(void) {
    static struct noted noted[REQUESTS];
    struct af_pending pending;
    CHECK(af_pending_init(&pending) == 0);
    uint64_t random = random_seed(1);
    for (uint32_t step = 0; step < STEPS; step++) {
        /* Filling up first, emptying in the end. */
        bool fills = random_below(&random, STEPS) >= step;
        uint64_t index = random_below(&random, REQUESTS);
        struct noted *one = &noted[index];
        uint64_t unique = unique_of(index);
        if (one->tag != 0)
            CHECK(af_pending_unique(&pending, one->tag) == unique);
        if (fills && one->tag == 0) {
            add(&pending, one, unique, step % 2 ? AF_OPEN : AF_INIT);
        } else if (!fills) {
            enum af_kind kind = one->tag != 0 ? one->kind : AF_OTHER;
            CHECK(af_pending_take(&pending, unique) == kind);
            *one = (struct noted){0};
        }
    }
    for (uint64_t index = 0; index < REQUESTS; index++)
        if (noted[index].tag != 0)
            CHECK(af_pending_take(&pending, unique_of(index)) == noted[index].kind);
    for (uint32_t tag = 0; tag <= REQUESTS + 1; tag++)
        CHECK(af_pending_unique(&pending, tag) == 0);
    af_pending_destroy(&pending);
}

int main(void) {
    static const struct test tests[] = {{"added and taken in any order", test_any_order}};
    return run_tests(tests, sizeof tests / sizeof tests[0]);
}
