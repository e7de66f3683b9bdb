/* test_waits.c - every wait of dist.h is needed, and the checker notices when one is missing.
 *
 *     cc -DDIST_TEST_SKIP_WAIT ... tests/test_waits.c vit_cpu.c -lcmocka -lm -lpthread
 *
 * A training runs once to count the waits of a rank, then once for each of them, in which the rank leaves
 * out this one. (A wait that earlier waits of the same stream imply is none.) The run must stop as a race.
 * If it does not, the wait orders nothing and is needless, or the checker is blind. The numbers would not
 * tell: on a CPU an operation has run when its call returns. */
#include "tests/world.h"

#ifdef __SANITIZE_ADDRESS__ /* ten times as slow: the same code on fewer ranks */
enum { MOST = 2 };
#else
enum { MOST = 3 };
#endif

int dist_test_skip_rank;
uint64_t dist_test_skip_wait;

static const vit_config small_config = {.image_height = 4,
                                        .image_width = 4,
                                        .channels = 1,
                                        .patch_size = 2,
                                        .embed_dim = 16,
                                        .depth = 3,
                                        .num_heads = 2,
                                        .num_classes = 3,
                                        .mlp_ratio = 2,
                                        .layer_norm_eps = 1e-6};

typedef struct {
    const char *strategy;
    int ranks;
    size_t accumulation;
    dist_reduction reduction;
    double bucket_mb;
    size_t prefetch;
    int keep_after_forward;
} setting;

/* Two steps, each with an evaluation after it, in which `rank` leaves out its wait number `skip`. */
static training *trained_without(const setting *s, int rank, uint64_t skip) {
    training *t = training_of(s->strategy, s->ranks, 1, s->accumulation, s->reduction);
    t->steps = 2;
    t->evaluate = 1;
    t->bucket_mb = s->bucket_mb;
    t->prefetch = s->prefetch;
    t->keep_after_forward = s->keep_after_forward;
    dist_test_skip_rank = rank;
    dist_test_skip_wait = skip;
    train_world(t, &small_config);
    return t;
}

static void assert_every_wait_is_needed(const setting *s) {
    for (int rank = 0; rank < s->ranks; rank++) {
        char expected[32];
        training *complete = trained_without(s, rank, UINT64_MAX);
        uint64_t waits = complete->waits[rank];
        assert_string_equal(complete->error.text, "");
        assert_true(waits > 0);
        training_free(complete);
        snprintf(expected, sizeof expected, "race on rank %d: ", rank);
        for (uint64_t k = 0; k < waits; k++) {
            training *t = trained_without(s, rank, k);
            if (!t->failed || strncmp(t->error.text, expected, strlen(expected)))
                fail_msg(
                    "%s, %d ranks, accumulation %zu, reduction %s, buckets of %g MiB, prefetch %zu: without "
                    "wait %d of %d rank %d found %s",
                    s->strategy, s->ranks, s->accumulation,
                    s->reduction == DIST_REDUCE_LAST ? "last" : "every", s->bucket_mb, s->prefetch, (int)k,
                    (int)waits, rank, t->failed ? t->error.text : "no race");
            training_free(t);
        }
    }
}

static void assert_all_settings_need_every_wait(const char *strategy, double bucket_mb, size_t prefetch,
                                                int keep_after_forward) {
    for (int ranks = 2; ranks <= MOST; ranks++)
        for (size_t accumulation = 1; accumulation <= 3; accumulation++)
            for (dist_reduction reduction = DIST_REDUCE_LAST; reduction <= DIST_REDUCE_EVERY; reduction++)
                assert_every_wait_is_needed(&(setting){strategy, ranks, accumulation, reduction, bucket_mb,
                                                       prefetch, keep_after_forward});
}

static void every_wait_of_dp_is_needed(void **state) {
    (void)state;
    assert_all_settings_need_every_wait("dp", 0, 0, 0);
}

/* The model's five units (2, 9, 9, 9 and 1 KiB) in five, three, two and one buckets. */
static void every_wait_of_ddp_is_needed(void **state) {
    (void)state;
    const double bucket_kib[] = {0, 10, 20, 100};
    for (size_t i = 0; i < sizeof bucket_kib / sizeof *bucket_kib; i++)
        assert_all_settings_need_every_wait("ddp", bucket_kib[i] / 1024, 0, 0);
}

static void every_wait_of_zero1_is_needed(void **state) {
    (void)state;
    assert_all_settings_need_every_wait("zero1", 0, 0, 0);
}

static void every_wait_of_zero2_is_needed(void **state) {
    (void)state;
    assert_all_settings_need_every_wait("zero2", 0, 0, 0);
}

/* Fewer and more slots than units; parameters kept between forward and backward. */
static void every_wait_of_zero3_is_needed(void **state) {
    (void)state;
    for (size_t prefetch = 0; prefetch <= 3; prefetch++)
        assert_all_settings_need_every_wait("zero3", 0, prefetch, 0);
    assert_all_settings_need_every_wait("zero3", 0, 1, 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_wait_of_dp_is_needed),    cmocka_unit_test(every_wait_of_ddp_is_needed),
        cmocka_unit_test(every_wait_of_zero1_is_needed), cmocka_unit_test(every_wait_of_zero2_is_needed),
        cmocka_unit_test(every_wait_of_zero3_is_needed),
    };
    return cmocka_run_group_tests_name("waits", tests, NULL, NULL);
}
