/* test_poison.c - freed slots hold NaN in debug builds, and nobody reads them.
 *
 *     cc -DDIST_DEBUG ... tests/test_poison.c vit_cpu.c -lcmocka -lm -lpthread
 *
 * After a step every slot has been freed: of gathered parameters under ZeRO-3, of gradients on their way
 * wherever they pass through slots. A training whose slots are filled with NaN ends in the same bits as one
 * that has no slots and therefore nothing to fill (ddp, reduced in place). */
#ifndef DIST_DEBUG
#error "this test is about DIST_DEBUG: the Makefile sets it in every flavour"
#endif
#include "tests/world.h"

static size_t numbers_in(rt_block b) {
    const float *x = b.data;
    size_t numbers = 0;
    for (size_t i = 0; x && i < b.count; i++) numbers += !isnan(x[i]);
    return numbers;
}

static void assert_poisoned(const dist *d) {
    for (size_t i = 0; i < d->slots; i++) {
        size_t numbers = numbers_in(d->parameter_slot[i].block);
        if (numbers)
            rt_fail(d->rank, "rank %d: %zu numbers in parameter slot %zu, expected NaN", d->rank->rank,
                    numbers, i);
    }
    for (int i = 0; i < 2 && dist__reduces_in_slots(d); i++) {
        size_t numbers = numbers_in(d->gradient_slot[i].block);
        if (numbers)
            rt_fail(d->rank, "rank %d: %zu numbers in gradient slot %d, expected NaN", d->rank->rank, numbers,
                    i);
    }
}

static void check(const char *strategy, double bucket_mb, size_t prefetch, int keep_after_forward) {
    for (int n = 1; n <= 3; n++)
        for (size_t M = 1; M <= 3; M++)
            for (dist_reduction reduction = DIST_REDUCE_LAST; reduction <= DIST_REDUCE_EVERY; reduction++) {
                training *t = training_of(strategy, n, 2, M, reduction);
                t->bucket_mb = bucket_mb;
                t->prefetch = prefetch;
                t->keep_after_forward = keep_after_forward;
                t->checkpoint_every = M % 2;
                t->inspect = assert_poisoned;
                trained(t);
                for (size_t i = 0; i < t->count; i++) assert_true(isfinite(t->weights[i]));
                if (M == 1) { /* nothing of this ddp is ever filled */
                    training *plain = trained(training_of("ddp", n, 2, 1, reduction));
                    assert_same_bits(t, plain);
                    training_free(plain);
                }
                training_free(t);
            }
}

static void slots_of_gradients(void **state) {
    (void)state;
    check("dp", 0, 0, 0);
    check("ddp", 0, 0, 0);
    check("ddp", 0.015, 0, 0);
    check("zero1", 0, 0, 0);
    check("zero2", 0, 0, 0);
}

static void slots_of_parameters(void **state) {
    (void)state;
    for (size_t prefetch = 0; prefetch <= 3; prefetch++) check("zero3", 0, prefetch, 0);
    check("zero3", 0, 9, 0);
    check("zero3", 0, 1, 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(slots_of_gradients),
        cmocka_unit_test(slots_of_parameters),
    };
    return cmocka_run_group_tests_name("poison", tests, NULL, NULL);
}
