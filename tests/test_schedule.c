/* test_schedule.c - what each strategy does in a step: order, count and volume.
 *
 * Every rank's events (collectives as they are posted, forward, recompute, backward, free, step) are compared
 * with a plan, which is written here from the definitions and knows nothing of dist.h: one page of loops a
 * strategy. Sources: Li et al. 2020 (DDP) and PyTorch's bucket rule; Rajbhandari et al. 2020 (ZeRO 1 and 2);
 * PyTorch's FSDP (gather ahead in both directions, the last unit of forward stays, reshard before
 * reduce-scatter). Then two passes that do not need the order: what may never happen under ZeRO-3, and the
 * volumes of the papers. */
#include "tests/world.h"

enum { CONTROL = 3 + 2 * 640 + 1, STEPS = 2 }; /* loss and bad losses; two counters an exponent, one of NaN */

/* ----------------------------------------------------------------------------------------------- the plan */

/* What one rank is expected to do, filled in by the functions below. */
typedef struct {
    const training *t;
    const vit_model *m;
    size_t n, M, first; /* ranks, micro-batches, the first unit that is trained */
    int rank, every;
    seen_call call[MOST_CALLS];
    size_t calls;
} plan;

static void expect(plan *p, const char *what, const char *unit, size_t elements) {
    assert_true(p->calls < MOST_CALLS);
    seen_call *c = &p->call[p->calls++];
    snprintf(c->what, sizeof c->what, "%s", what);
    snprintf(c->unit, sizeof c->unit, "%s", unit);
    c->elements = elements;
}

static void expect_unit(plan *p, const char *what, size_t u) {
    expect(p, what, p->m->unit[u].name, padded(p->m, u, p->n));
}

/* Units are embedding, blocks, head: block number u of the chain is checkpointed if N divides u. */
static void expect_backward(plan *p, size_t u) {
    int block = u > 0 && u + 1 < p->m->units;
    if (block && p->t->checkpoint_every && u % p->t->checkpoint_every == 0) expect_unit(p, "recompute", u);
    expect_unit(p, "backward", u);
}

/* A gradient is reduced after every micro-batch, or after the last. */
static int reduces(const plan *p, size_t micro) { return p->every || micro + 1 == p->M; }

/* Elements of unit u that are trained: with a frozen backbone head.weight and head.bias, which come first. */
static size_t trained_elements(const plan *p, size_t u) {
    if (!p->m->config.freeze_backbone) return padded(p->m, u, p->n);
    size_t V = p->m->V, D = p->m->D;
    return u + 1 < p->m->units ? 0 : (V * D + 15) / 16 * 16 + (V + 15) / 16 * 16;
}

/* The control all-reduce, then the optimizer on what the rank owns: `cut` ranks own an equal part each, or
 * all of them (cut 1) everything. */
static void expect_update(plan *p, size_t cut) {
    size_t owned = 0;
    for (size_t u = 0; u < p->m->units; u++) {
        size_t part = padded(p->m, u, p->n) / cut, begin = cut > 1 ? part * (size_t)p->rank : 0;
        size_t end = trained_elements(p, u);
        owned += end <= begin ? 0 : end < begin + part ? end - begin : part;
    }
    expect(p, "control", "step", CONTROL);
    if (owned) expect(p, "step", "optimizer", owned);
}

static void plan_single(plan *p) {
    for (size_t k = 0; k < p->M; k++) {
        for (size_t u = 0; u < p->m->units; u++) expect_unit(p, "forward", u);
        for (size_t u = p->m->units; u-- > p->first;) expect_backward(p, u);
    }
    expect_update(p, 1);
}

/* Rank 0 gets every gradient, alone updates, and sends its parameters for the next forward pass. */
static void plan_dp(plan *p) {
    for (size_t k = 0; k < p->M; k++) {
        for (size_t u = 0; u < p->m->units; u++) expect_unit(p, "forward", u);
        for (size_t u = p->m->units; u-- > p->first;) {
            expect_backward(p, u);
            if (reduces(p, k)) expect_unit(p, "reduce", u);
        }
    }
    if (p->rank == 0) expect_update(p, 1);
    if (p->rank != 0) expect(p, "control", "step", CONTROL);
    for (size_t u = p->first; u < p->m->units; u++) expect_unit(p, "broadcast", u);
}

/* One all-reduce a bucket, as soon as the gradient of its last unit is there: a unit is added, then the
 * bucket closes if it holds bucket_size_mb (the first one: at most 1 MiB). */
static void plan_ddp(plan *p) {
    for (size_t k = 0; k < p->M; k++) {
        for (size_t u = 0; u < p->m->units; u++) expect_unit(p, "forward", u);
        double limit = p->t->bucket_mb > 1 ? 1 : p->t->bucket_mb;
        for (size_t u = p->m->units, bucket = 0; u-- > p->first;) {
            expect_backward(p, u);
            bucket += padded(p->m, u, p->n);
            if (u > p->first && (double)(4 * bucket) < limit * 1048576) continue;
            if (reduces(p, k)) expect(p, "all_reduce", p->m->unit[u].name, bucket);
            bucket = 0;
            limit = p->t->bucket_mb;
        }
    }
    expect_update(p, 1);
}

/* Stages 1 and 2: each unit's gradient is reduce-scattered, the new parameters are all-gathered. */
static void plan_zero(plan *p) {
    for (size_t k = 0; k < p->M; k++) {
        for (size_t u = 0; u < p->m->units; u++) expect_unit(p, "forward", u);
        for (size_t u = p->m->units; u-- > p->first;) {
            expect_backward(p, u);
            if (reduces(p, k)) expect_unit(p, "reduce_scatter", u);
        }
    }
    expect_update(p, p->n);
    for (size_t u = p->first; u < p->m->units; u++) expect_unit(p, "all_gather", u);
}

/* Stage 3. Forward: unit u and the next `prefetch` ones are gathered before u's forward, u is freed after it,
 * but for the last one, or with keep_after_forward for every one whose backward follows. Backward: the same
 * downwards to the first trained unit; u is freed, then its gradient is reduce-scattered. */
static void plan_zero3(plan *p) {
    size_t n = p->m->units, ahead = p->t->prefetch;
    for (size_t k = 0; k < p->M; k++) {
        size_t gathered = 0; /* units below have been */
        for (size_t u = 0; u < n; u++) {
            for (; gathered < n && gathered <= u + ahead; gathered++) expect_unit(p, "all_gather", gathered);
            expect_unit(p, "forward", u);
            if (u < p->first || (u + 1 < n && !p->t->keep_after_forward)) expect_unit(p, "free", u);
        }
        size_t missing =
            p->t->keep_after_forward ? p->first : n - 1; /* units below, from `first`, are to be */
        for (size_t u = n; u-- > p->first;) {
            for (; missing > p->first && missing - 1 + ahead >= u; missing--)
                expect_unit(p, "all_gather", missing - 1);
            expect_backward(p, u);
            expect_unit(p, "free", u);
            if (reduces(p, k)) expect_unit(p, "reduce_scatter", u);
        }
    }
    expect_update(p, p->n);
}

static void print_difference(const plan *p, size_t i) {
    const training *t = p->t;
    print_message("%s, rank %d of %zu, accumulation %zu, %s, buckets of %g MiB, prefetch %zu, keep %d, "
                  "checkpoint every %zu, frozen %d: %zu events, expected %zu; they differ at number %zu\n",
                  t->strategy, p->rank, p->n, p->M, p->every ? "every" : "last", t->bucket_mb, t->prefetch,
                  t->keep_after_forward, t->checkpoint_every, p->m->config.freeze_backbone, t->calls[p->rank],
                  p->calls, i);
    for (size_t k = i < 3 ? 0 : i - 3; k < i + 3; k++) {
        const seen_call *a = &t->call[p->rank][k], *b = &p->call[k];
        print_message("    %-14s %-10s %6zu   expected %-14s %-10s %6zu\n", a->what, a->unit, a->elements,
                      b->what, b->unit, b->elements);
    }
}

/* What every rank did in all steps, event by event, is what the plan of one step says, again and again. */
static void assert_planned(const training *t, void (*strategy)(plan *)) {
    for (int r = 0; r < t->ranks; r++) {
        plan *p = calloc(1, sizeof *p);
        const vit_model *m = &t->model;
        *p = (plan){.t = t, .m = m, .n = (size_t)t->ranks, .M = t->accumulation, .rank = r};
        p->every = t->reduction == DIST_REDUCE_EVERY;
        p->first = m->config.freeze_backbone ? m->units - 1 : 0;
        for (size_t step = 0; step < t->steps; step++) strategy(p);
        for (size_t i = 0; i < p->calls || i < t->calls[r]; i++) {
            const seen_call *a = &t->call[r][i], *b = &p->call[i];
            if (i < p->calls && i < t->calls[r] && !strcmp(a->what, b->what) && !strcmp(a->unit, b->unit) &&
                a->elements == b->elements)
                continue;
            print_difference(p, i);
            fail();
        }
        free(p);
    }
}

/* ------------------------------------------------------------------------------------- what never happens */

static size_t unit_of(const training *t, const char *name) {
    size_t u = 0;
    while (u < t->model.units && strcmp(t->model.unit[u].name, name)) u++;
    assert_true(u < t->model.units);
    return u;
}

/* ZeRO-3: a unit is used only while it is gathered; it is gathered only when it is not, and freed as
 * often; no more than prefetch + 1 are gathered at once (all, where they stay); between a recomputation
 * and its backward nothing happens, so that both share one gather; between steps nothing is gathered. */
static void assert_gathered_when_used(const training *t) {
    for (int r = 0; r < t->ranks; r++) {
        int here[16] = {0};
        size_t now = 0, most = t->keep_after_forward ? t->model.units : t->prefetch + 1;
        for (size_t i = 0; i < t->calls[r]; i++) {
            const seen_call *c = &t->call[r][i];
            if (!strcmp(c->what, "step")) assert_int_equal(now, 0);
            if (!strcmp(c->what, "step") || !strcmp(c->what, "control") || !strcmp(c->what, "reduce_scatter"))
                continue;
            size_t u = unit_of(t, c->unit);
            if (!strcmp(c->what, "all_gather")) {
                assert_false(here[u]);
                here[u] = 1;
                assert_true(++now <= most);
                continue;
            }
            assert_true(here[u]); /* forward, recompute, backward, free */
            if (!strcmp(c->what, "free")) here[u] = 0, now--;
            if (!strcmp(c->what, "recompute")) {
                assert_true(i + 1 < t->calls[r]);
                assert_string_equal(c[1].what, "backward");
                assert_string_equal(c[1].unit, c->unit);
            }
        }
        assert_int_equal(now, 0);
    }
}

/* ------------------------------------------------------------------------------------------------ volumes */

/* Elements and bytes on the wire of each collective in all steps, from the papers: P elements, padding
 * included, of which `trained` have gradients; F forward and R reductions a step. */
static void assert_volumes(const training *t) {
    const vit_model *m = &t->model;
    size_t n = (size_t)t->ranks, F = t->accumulation, R = t->reduction == DIST_REDUCE_EVERY ? F : 1;
    size_t P = 0, kept = padded(m, m->units - 1, n);
    for (size_t u = 0; u < m->units; u++) P += padded(m, u, n);
    size_t trained = m->config.freeze_backbone ? kept : P, expected[DIST_OPS] = {0};
    if (!strcmp(t->strategy, "ddp")) expected[DIST_ALL_REDUCE] = R * trained;
    if (!strcmp(t->strategy, "dp")) expected[DIST_REDUCE] = R * trained, expected[DIST_BROADCAST] = trained;
    if (!strncmp(t->strategy, "zero", 4)) {
        expected[DIST_REDUCE_SCATTER] = R * trained;
        expected[DIST_ALL_GATHER] = trained;
    }
    if (!strcmp(t->strategy, "zero3")) /* once for forward, once for backward, but for the unit that stays */
        expected[DIST_ALL_GATHER] = F * (P + (t->keep_after_forward ? 0 : trained - kept));
    for (int r = 0; r < t->ranks; r++)
        for (int op = 0; op < DIST_OPS; op++) {
            if (op == DIST_CONTROL) continue;
            double bytes = 4 * (double)(expected[op] * t->steps), N = (double)n;
            double wire = op == DIST_ALL_REDUCE                                ? 2 * (N - 1) / N * bytes
                          : op == DIST_REDUCE_SCATTER || op == DIST_ALL_GATHER ? (N - 1) / N * bytes
                          : op == DIST_REDUCE                                  ? (r ? bytes : 0)
                                                                               : (r ? 0 : (N - 1) * bytes);
            assert_int_equal(t->traffic[r][op].elements, expected[op] * t->steps);
            assert_true(fabs(t->traffic[r][op].wire_bytes - wire) <= 1e-9 * bytes);
        }
}

/* ----------------------------------------------------------------------------------------------- settings */

typedef struct {
    const char *strategy;
    void (*plan)(plan *);
    double bucket_mb;
    size_t prefetch;
    int keep_after_forward;
} setting;

/* A setting with every number of ranks and micro-batches, either reduction, activation checkpointing of
 * no, every and every second block, a frozen backbone or none. */
static void check(const setting *s, int least, int most) {
    for (int n = least; n <= most; n++)
        for (size_t M = 1; M <= 3; M++)
            for (int k = 0; k < 12; k++) {
                vit_config config = odd_config;
                training *t = training_of(s->strategy, n, 1, M, k % 2 ? DIST_REDUCE_EVERY : DIST_REDUCE_LAST);
                config.freeze_backbone = k / 6;
                t->checkpoint_every = (size_t)(k / 2 % 3);
                t->steps = STEPS;
                t->bucket_mb = s->bucket_mb;
                t->prefetch = s->prefetch;
                t->keep_after_forward = s->keep_after_forward;
                trained_as(t, &config);
                assert_planned(t, s->plan);
                if (s->plan == plan_zero3) assert_gathered_when_used(t);
                assert_volumes(t);
                training_free(t);
            }
}

static void single_schedule(void **state) {
    (void)state;
    check(&(setting){"single", plan_single, 0, 0, 0}, 1, 1);
}

static void dp_schedule(void **state) {
    (void)state;
    check(&(setting){"dp", plan_dp, 0, 0, 0}, 1, MOST_RANKS);
}

/* A bucket for each unit; the head with a block, two blocks, the embedding; all but the embedding; one. */
static void ddp_schedule(void **state) {
    static const double buckets[] = {0, 0.015, 0.04, 25};
    (void)state;
    for (size_t i = 0; i < sizeof buckets / sizeof *buckets; i++)
        check(&(setting){"ddp", plan_ddp, buckets[i], 0, 0}, 1, i == 1 ? MOST_RANKS : 4);
}

static void zero1_schedule(void **state) {
    (void)state;
    check(&(setting){"zero1", plan_zero, 0, 0, 0}, 1, MOST_RANKS);
}

static void zero2_schedule(void **state) {
    (void)state;
    check(&(setting){"zero2", plan_zero, 0, 0, 0}, 1, MOST_RANKS);
}

static void zero3_schedule(void **state) {
    (void)state;
    for (size_t prefetch = 0; prefetch <= 3; prefetch++)
        check(&(setting){"zero3", plan_zero3, 0, prefetch, 0}, 1, prefetch == 1 ? MOST_RANKS : 4);
    check(&(setting){"zero3", plan_zero3, 0, 9, 0}, 1, 2); /* more than there are units */
}

static void zero3_without_resharding_schedule(void **state) {
    (void)state;
    for (size_t prefetch = 0; prefetch <= 3; prefetch++)
        check(&(setting){"zero3", plan_zero3, 0, prefetch, 1}, 1, prefetch == 1 ? 4 : 3);
    check(&(setting){"zero3", plan_zero3, 0, 9, 1}, 1, 2);
}

/* Evaluation between steps gathers and frees every unit as forward does, the last one and those that stay
 * included; its traffic is not counted. */
static void zero3_evaluation(void **state) {
    (void)state;
    for (int n = 1; n <= 3; n++)
        for (size_t prefetch = 0; prefetch <= 3; prefetch++)
            for (int keep = 0; keep < 2; keep++) {
                training *t = training_of("zero3", n, 1, 2, DIST_REDUCE_EVERY);
                t->evaluate = 1;
                t->prefetch = prefetch;
                t->keep_after_forward = keep;
                trained(t);
                assert_gathered_when_used(t);
                assert_volumes(t);
                training_free(t);
            }
}

/* fsdp is another name for zero3: the same events, the same bits. */
static void fsdp_is_zero3(void **state) {
    (void)state;
    training *t[2];
    for (int i = 0; i < 2; i++)
        t[i] = trained(training_of(i ? "fsdp" : "zero3", 3, 2, 2, DIST_REDUCE_DEFAULT));
    assert_same_bits(t[0], t[1]);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(t[0]->calls[r], t[1]->calls[r]);
        assert_memory_equal(t[0]->call[r], t[1]->call[r], sizeof t[0]->call[r]);
    }
    for (int i = 0; i < 2; i++) training_free(t[i]);
}

/* Without --gradient-reduction single, dp, ddp and zero1 reduce at the last micro-batch, zero2 and zero3
 * at every one. (With single both are the same.) */
static void defaults_of_the_reduction(void **state) {
    static const setting settings[] = {{"dp", plan_dp, 0, 0, 0},
                                       {"ddp", plan_ddp, 0, 0, 0},
                                       {"zero1", plan_zero, 0, 0, 0},
                                       {"zero2", plan_zero, 0, 0, 0},
                                       {"zero3", plan_zero3, 0, 0, 0}};
    (void)state;
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        training *t = training_of(settings[i].strategy, 2, 1, 3, DIST_REDUCE_DEFAULT);
        t->bucket_mb = 0;
        trained(t);
        t->reduction = i < 3 ? DIST_REDUCE_LAST : DIST_REDUCE_EVERY;
        assert_planned(t, settings[i].plan);
        assert_volumes(t);
        training_free(t);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(single_schedule),
        cmocka_unit_test(dp_schedule),
        cmocka_unit_test(ddp_schedule),
        cmocka_unit_test(zero1_schedule),
        cmocka_unit_test(zero2_schedule),
        cmocka_unit_test(zero3_schedule),
        cmocka_unit_test(zero3_without_resharding_schedule),
        cmocka_unit_test(zero3_evaluation),
        cmocka_unit_test(fsdp_is_zero3),
        cmocka_unit_test(defaults_of_the_reduction),
    };
    return cmocka_run_group_tests_name("schedule", tests, NULL, NULL);
}
