/* test_dist.c - strategies give the same bits, collectives, formulas, buckets.
 *
 * The numbers have independent sources: collectives are compared with plain sums, strategies with each other
 * (every bit) and with one rank on the whole batch, the buckets with PyTorch's rule. The schedule has a test
 * of its own (test_schedule.c), and so has the ledger (test_memory.c). */
#include "tests/world.h"
#include "tests/recording_device.h"

/* ----------------------------------------------------------------------------------------------- equality */

static void assert_close(const training *a, const training *b, double tolerance) {
    assert_false(a->failed || b->failed);
    for (size_t i = 0; i < a->steps; i++) {
        assert_true(fabs(a->losses[i] - b->losses[i]) <= tolerance);
        assert_true(fabs(a->norms[i] - b->norms[i]) <= tolerance * (1 + b->norms[i]));
    }
    for (size_t i = 0; i < a->count; i++)
        assert_true(fabsf(a->weights[i] - b->weights[i]) <= (float)tolerance);
}

/* What must give the same bits: (strategy, bucket size, units gathered ahead, kept from forward to backward,
 * activation checkpointing of every Nth block). */
static const struct {
    const char *strategy;
    double bucket_mb;
    size_t prefetch;
    int keep;
    size_t checkpoint_every;
} variants[] = {{"ddp", 25, 0, 0, 0},  {"ddp", 0, 0, 0, 0},   {"ddp", 0.004, 0, 0, 0}, {"ddp", 0.02, 0, 0, 0},
                {"dp", 0, 0, 0, 0},    {"dp", 0, 0, 0, 1},    {"ddp", 25, 0, 0, 1},    {"ddp", 0.02, 0, 0, 2},
                {"zero1", 0, 0, 0, 0}, {"zero1", 0, 0, 0, 2}, {"zero2", 0, 0, 0, 0},   {"zero2", 0, 0, 0, 1},
                {"zero3", 0, 0, 0, 0}, {"zero3", 0, 1, 0, 0}, {"zero3", 0, 2, 0, 2},   {"zero3", 0, 3, 0, 3},
                {"zero3", 0, 9, 0, 0}, {"zero3", 0, 0, 1, 0}, {"zero3", 0, 1, 1, 2},   {"zero3", 0, 2, 1, 0},
                {"zero3", 0, 3, 1, 0}, {"zero3", 0, 0, 0, 1}};
enum { VARIANTS = sizeof variants / sizeof *variants, THREADED_VARIANTS = 5 };

/* ThreadSanitizer runs ten times slower and looks for races, for which three ranks stand for all. Ten steps
 * are for the flavour that is fast, and so is every variant where each is run many times over. */
#ifdef __SANITIZE_THREAD__
enum { LEAST_RANKS = 3, LIMIT_RANKS = 3, EQUAL_STEPS = 2, STRIDE = 7 };
#elif defined __SANITIZE_ADDRESS__
enum { LEAST_RANKS = 1, LIMIT_RANKS = MOST_RANKS, EQUAL_STEPS = 3, STRIDE = 3 };
#else
enum { LEAST_RANKS = 1, LIMIT_RANKS = MOST_RANKS, EQUAL_STEPS = 10, STRIDE = 1 };
#endif

static training *variant_of(size_t k, int ranks, size_t batch, size_t accumulation,
                            dist_reduction reduction) {
    training *t = training_of(variants[k].strategy, ranks, batch, accumulation, reduction);
    t->bucket_mb = variants[k].bucket_mb;
    t->prefetch = variants[k].prefetch;
    t->keep_after_forward = variants[k].keep;
    t->checkpoint_every = variants[k].checkpoint_every;
    return t;
}

/* Every variant, and some with 2 threads: every bit. Single on the whole batch: within 1e-5. */
static void strategies_agree(void **state) {
    (void)state;
    for (int n = LEAST_RANKS; n <= LIMIT_RANKS; n++)
        for (size_t accumulation = 1; accumulation <= 3; accumulation += 2)
            for (dist_reduction reduction = DIST_REDUCE_LAST; reduction <= DIST_REDUCE_EVERY; reduction++) {
                training *reference = variant_of(0, n, 3, accumulation, reduction);
                training *whole = training_of("single", 1, 3 * (size_t)n, accumulation, reduction);
                reference->steps = whole->steps = EQUAL_STEPS;
                assert_close(trained(reference), trained(whole), 1e-5);
                for (int threads = 1; threads <= 2; threads++)
                    for (size_t k = 0; k < (threads == 1 ? VARIANTS : THREADED_VARIANTS); k++) {
                        training *t = variant_of(k, n, 3, accumulation, reduction);
                        t->steps = EQUAL_STEPS;
                        t->threads = threads;
                        assert_same_bits(trained(t), reference);
                        training_free(t);
                    }
                training_free(whole);
                training_free(reference);
            }
}

/* What --precision and --reduce-dtype make of the model's numbers and of the sums of gradients. */
static const rt_type precisions[][2] = {
    {RT_BF16, RT_BF16}, {RT_BF16, RT_FP32}, {RT_FP16, RT_FP16}, {RT_FP16, RT_FP32}, {RT_FP32, RT_BF16}};
enum { PRECISIONS = sizeof precisions / sizeof *precisions };

/* All strategies give the same bits in lower precision too, and they are near those of fp32, of which a
 * bf16 has 8. In fp16 the first steps may overflow: they are skipped, by all in the same way. */
static void strategies_agree_in_lower_precision(void **state) {
    (void)state;
    for (size_t p = 0; p < PRECISIONS; p++)
        for (int n = LEAST_RANKS; n <= LIMIT_RANKS && n <= 4; n++)
            for (size_t accumulation = 1; accumulation <= 3; accumulation += 2)
                for (dist_reduction reduction = DIST_REDUCE_LAST; reduction <= DIST_REDUCE_EVERY;
                     reduction++) {
                    training *reference = training_of("ddp", n, 3, accumulation, reduction);
                    training *exact = trained(training_of("ddp", n, 3, accumulation, reduction));
                    reference->type = precisions[p][0], reference->reduce_type = precisions[p][1];
                    trained(reference);
                    for (size_t k = 0; k < VARIANTS + (n == 1); k += STRIDE) {
                        training *t = training_of(k < VARIANTS ? variants[k].strategy : "single", n, 3,
                                                  accumulation, reduction);
                        t->type = precisions[p][0], t->reduce_type = precisions[p][1];
                        t->threads = 1 + (int)k % 2;
                        if (k < VARIANTS) {
                            t->prefetch = variants[k].prefetch;
                            t->keep_after_forward = variants[k].keep;
                            t->checkpoint_every = variants[k].checkpoint_every;
                        }
                        assert_same_bits(trained(t), reference);
                        training_free(t);
                    }
                    for (size_t i = 0; i < exact->steps && isfinite(reference->norms[i]); i++) {
                        assert_true(fabs(reference->losses[i] - exact->losses[i]) < 0.01);
                        assert_true(fabs(reference->norms[i] / exact->norms[i] - 1) < 0.02);
                    }
                    assert_memory_not_equal(reference->losses, exact->losses, sizeof(double) * exact->steps);
                    training_free(reference);
                    training_free(exact);
                }
}

/* Bytes of a precision: parameters of the model's type; gradients of that of the reduction; optimizer
 * state and master in fp32. */
static void lower_precision_takes_the_bytes_that_it_should(void **state) {
    (void)state;
    for (size_t p = 0; p < PRECISIONS; p++)
        for (int zero3 = 0; zero3 < 2; zero3++) {
            const size_t n = 2, type = precisions[p][0] == RT_FP32 ? 4 : 2;
            const size_t reduced = precisions[p][1] == RT_FP32 ? 4 : 2;
            training *t = training_of(zero3 ? "zero3" : "ddp", (int)n, 2, 1, DIST_REDUCE_EVERY);
            t->type = precisions[p][0], t->reduce_type = precisions[p][1];
            trained(t);
            size_t P = 0, largest = 0, head = padded(&t->model, t->model.units - 1, n);
            for (size_t u = 0; u < t->model.units; u++) {
                size_t count = padded(&t->model, u, n);
                P += count;
                if (largest < count) largest = count;
            }
            size_t owned = zero3 ? P / n : P;
            for (size_t r = 0; r < n; r++) {
                const size_t *bytes = t->ledger[r].bytes;
                const dist_traffic *traffic = t->traffic[r];
                assert_int_equal(bytes[RT_PARAMETERS], type * owned);
                assert_int_equal(bytes[RT_GRADIENTS], reduced * owned + (type != reduced) * type * largest);
                assert_int_equal(bytes[RT_OPTIMIZER], (type == 2 ? 12 : 8) * owned);
                if (zero3) { /* half of what passes through it goes over the wire of two ranks */
                    assert_true(traffic[DIST_REDUCE_SCATTER].wire_bytes == (double)(3 * reduced * P / 2));
                    assert_true(traffic[DIST_ALL_GATHER].wire_bytes ==
                                (double)(3 * type * (2 * P - head) / 2));
                } else {
                    assert_true(traffic[DIST_ALL_REDUCE].wire_bytes == (double)(3 * reduced * P));
                }
            }
            training_free(t);
        }
}

/* An overflow of fp16 is no error: the step is skipped, and the second in a row halves the scale. */
static void an_overflow_skips_the_step(void **state) {
    (void)state;
    training *before = training_of("zero2", 3, 2, 1, 0), *t = training_of("zero2", 3, 2, 1, 0);
    before->type = t->type = RT_FP16;
    before->steps = 2;
    trained(before);
    t->poison = 1e6; /* which is infinite in fp16 */
    trained(t);
    assert_memory_equal(before->weights, t->weights, t->count * sizeof *t->weights);
    assert_false(isfinite(t->norms[2]));
    training_free(before);
    training_free(t);
}

/* The CPU's optimizer on memory of its own, behind copies: the same arithmetic. */
static void an_offloaded_optimizer_gives_the_same_bits(void **state) {
    static const rt_type types[] = {RT_FP32, RT_BF16, RT_FP16};
    (void)state;
    for (int n = 1; n <= 2; n++)
        for (size_t k = 0; k < VARIANTS; k += STRIDE)
            for (size_t i = 0; i < 6; i++) {
                training *t[2];
                for (int offload = 0; offload < 2; offload++) {
                    t[offload] = variant_of(k, n, 2, 2, DIST_REDUCE_EVERY);
                    t[offload]->type = types[i % 3];
                    t[offload]->reduce_type = types[(i + i / 3) % 3];
                    t[offload]->optimizer = (i + k) % 2 ? DIST_SGD : DIST_ADAMW;
                    t[offload]->late = offload;
                    t[offload]->offload = offload;
                    trained(t[offload]);
                }
                assert_same_bits(t[0], t[1]);
                for (int r = 0; r < n; r++) {
                    const rt_ledger *device = &t[0]->ledger[r], *split = &t[1]->ledger[r];
                    assert_true(!split->bytes[RT_OPTIMIZER] && !device->bytes[RT_HOST_MEMORY]);
                    assert_int_equal(split->total_bytes, device->total_bytes - device->bytes[RT_OPTIMIZER]);
                    assert_true(split->bytes[RT_HOST_MEMORY] > device->bytes[RT_OPTIMIZER]);
                    assert_true(t[1]->formula[r].bytes[RT_HOST_MEMORY] ==
                                (double)split->bytes[RT_HOST_MEMORY]);
                }
                training_free(t[0]);
                training_free(t[1]);
            }
}

/* A step that is replayed does what it did, in every strategy, with evaluations in between. */
static void a_recorded_step_gives_the_same_bits(void **state) {
    const vit_device device = recording_device();
    (void)state;
    for (size_t M = 1; M <= 2; M++)
        for (size_t k = 0; k < VARIANTS; k += STRIDE)
            for (int fp16 = 0; fp16 <= 1; fp16++) {
                training *t[2];
                recorded_replays = 0;
                for (int graphs = 0; graphs < 2; graphs++) {
                    t[graphs] = variant_of(k, 1, 2, M, DIST_REDUCE_EVERY);
                    t[graphs]->steps = 6;
                    t[graphs]->type = fp16 ? RT_FP16 : RT_FP32;
                    t[graphs]->optimizer = k % 2 ? DIST_SGD : DIST_ADAMW;
                    t[graphs]->evaluate = t[graphs]->late = 1;
                    t[graphs]->device = graphs ? &device : NULL;
                    t[graphs]->graphs = graphs;
                    trained(t[graphs]);
                }
                assert_same_bits(t[0], t[1]);
                assert_memory_equal(t[0]->traffic, t[1]->traffic, sizeof t[0]->traffic);
                assert_int_equal(recorded_replays, (t[0]->steps - 1) * (M + 1));
                training_free(t[0]);
                training_free(t[1]);
            }
}

static void recording_is_refused(const vit_device *device, int ranks, int offload, const char *why) {
    training *t = training_of("ddp", ranks, 2, 1, 0);
    t->device = device;
    t->graphs = 1;
    t->offload = offload;
    train_world(t, &odd_config);
    assert_true(t->failed);
    assert_non_null(strstr(t->error.text, why));
    training_free(t);
}

static void what_cannot_be_recorded_is_an_error(void **state) {
    const vit_device device = recording_device();
    (void)state;
    recording_is_refused(NULL, 1, 0, "device cpu cannot record a step");
    recording_is_refused(&device, 2, 0, "found 2 ranks over transport local, expected one, or nccl");
    recording_is_refused(&device, 1, 1, "found offload, expected its optimizer on the device");
}

static void sgd_agrees_too(void **state) {
    (void)state;
    for (dist_reduction reduction = DIST_REDUCE_LAST; reduction <= DIST_REDUCE_EVERY; reduction++) {
        training *reference = variant_of(0, 3, 2, 2, reduction);
        training *whole = training_of("single", 1, 6, 2, reduction);
        reference->optimizer = whole->optimizer = DIST_SGD;
        assert_close(trained(reference), trained(whole), 1e-5);
        for (size_t k = 1; k < VARIANTS; k++) {
            training *t = variant_of(k, 3, 2, 2, reduction);
            t->optimizer = DIST_SGD;
            assert_same_bits(trained(t), reference);
            training_free(t);
        }
        training_free(whole);
        training_free(reference);
    }
}

/* With a frozen backbone all but head.weight and head.bias stays as it was, no rank has optimizer state or
 * gradients of anything else, and only the head's unit is reduced. All variants agree in every bit, with an
 * evaluation after every step or without. */
static void a_frozen_backbone_stays(void **state) {
    vit_config config = odd_config;
    size_t classifier = 160; /* [7, 20] and [7], each rounded up to a multiple of 16: 144 + 16 */
    (void)state;
    config.freeze_backbone = 1;
    for (int n = LEAST_RANKS; n <= 3; n++)
        for (size_t M = 1; M <= 2; M++) {
            training *ddp = trained_as(variant_of(0, n, 2, M, DIST_REDUCE_EVERY), &config);
            for (size_t k = 1; k < VARIANTS; k++) {
                training *t = variant_of(k, n, 2, M, DIST_REDUCE_EVERY);
                size_t states = 0; /* of all ranks */
                t->evaluate = k % 2;
                assert_same_bits(trained_as(t, &config), ddp);
                for (int r = 0; r < n; r++) states += t->ledger[r].bytes[RT_OPTIMIZER];
                assert_int_equal(states, 8 * classifier * (strcmp(t->strategy, "ddp") ? 1 : (size_t)n));
                training_free(t);
            }
            size_t head = ddp->model.units - 1, offset = 0;
            for (size_t u = 0; u <= head; offset += ddp->model.unit[u++].count) {
                const vit_unit *unit = &ddp->model.unit[u];
                float *initial = calloc(unit->count, sizeof *initial);
                vit_unit_initialise(unit, 5, initial);
                size_t moved = u == head ? classifier : 0;
                if (moved) assert_memory_not_equal(initial, ddp->weights + offset, moved * sizeof *initial);
                assert_memory_equal(initial + moved, ddp->weights + offset + moved,
                                    (unit->count - moved) * sizeof *initial);
                free(initial);
            }
            for (int r = 0; r < n; r++) {
                size_t padded_head = padded(&ddp->model, head, (size_t)n);
                assert_int_equal(ddp->ledger[r].bytes[RT_OPTIMIZER], 8 * classifier);
                assert_int_equal(ddp->ledger[r].bytes[RT_GRADIENTS], 4 * padded_head);
                assert_int_equal(ddp->traffic[r][DIST_ALL_REDUCE].elements, ddp->steps * M * padded_head);
            }
            training_free(ddp);
        }
}

static void evaluation_between_steps_changes_nothing(void **state) {
    (void)state;
    for (size_t k = 0; k < VARIANTS; k++) {
        training *plain = trained(variant_of(k, 3, 2, 2, DIST_REDUCE_DEFAULT)),
                 *t = variant_of(k, 3, 2, 2, DIST_REDUCE_DEFAULT);
        t->evaluate = 1;
        assert_same_bits(trained(t), plain);
        for (int r = 0; r < 3; r++)
            assert_memory_equal(t->traffic[r], plain->traffic[r], sizeof plain->traffic[r]);
        assert_int_equal(t->not_finite[1], plain->model.units);
        training_free(plain);
        training_free(t);
    }
}

/* One that halves the scale at every overflow. */
static vit_scaler scaler_of(double scale) {
    return (vit_scaler){
        .scale = scale, .least = 1, .window = 1000, .last_overflow = -1, .hysteresis = 1, .left = 1};
}

/* As a GPU is driven: the host reads the result of a step when it has launched the next. That its loss scale
 * is another, and AdamW's count, the device must know by itself. */
static void results_may_be_read_a_step_late(void **state) {
    const vit_scaler scaler = scaler_of(1024);
    (void)state;
    for (int n = 1; n <= 2; n++)
        for (size_t k = 0; k < VARIANTS; k += STRIDE)
            for (int fp16 = 0; fp16 <= 1; fp16++) {
                training *t[2];
                for (int late = 0; late < 2; late++) {
                    t[late] = variant_of(k, n, 2, 2, DIST_REDUCE_EVERY);
                    t[late]->steps = 5;
                    t[late]->late = late;
                    t[late]->type = fp16 ? RT_FP16 : RT_FP32;
                    t[late]->scaler = &scaler;
                    t[late]->poison = fp16 ? 1e6 : 0; /* which is infinite in fp16 */
                    t[late]->poisoned = 2;
                    trained(t[late]);
                    const vit_scaler *s = &t[late]->scaled;
                    if (fp16)
                        assert_true(s->scale == 512 && s->step == 5 && s->last_overflow == 1 &&
                                    s->skipped == 1);
                    assert_int_equal(isnan(t[late]->norms[1]), fp16);
                }
                assert_same_bits(t[0], t[1]);
                training_free(t[0]);
                training_free(t[1]);
            }
}

/* Until the host has read that a step came to nothing, none of the later ones may change the weights. */
static void nothing_changes_after_a_step_that_is_not_finite(void **state) {
    (void)state;
    for (size_t k = 0; k < VARIANTS; k += STRIDE) {
        training *before = variant_of(k, 2, 2, 1, DIST_REDUCE_EVERY);
        training *t = variant_of(k, 2, 2, 1, DIST_REDUCE_EVERY);
        before->steps = 1;
        t->steps = 3;
        t->late = 1;
        t->poison = (double)INFINITY;
        t->poisoned = 2;
        trained(before);
        trained(t);
        assert_true(isnan(t->norms[1]) && isfinite(t->losses[2]));
        assert_memory_equal(t->weights, before->weights, t->count * sizeof *t->weights);
        training_free(before);
        training_free(t);
    }
}

static const float *weights_before; /* the overflow that is one too many */
static _Atomic int looked_at;       /* so many times */

/* The master weights, which the update has changed if it has changed anything. */
static void assert_weights_as_before(const dist *d) {
    const float *expected = weights_before;
    for (size_t u = 0; u < d->model->units; expected += d->model->unit[u++].count)
        if (memcmp(d->shard[u].master.data, expected, d->model->unit[u].count * sizeof *expected))
            rt_fail(d->rank, "after %zu steps: found unit %zu changed", d->ended, u);
    looked_at++;
}

/* An overflow at the least scale is an error, which the host reads when the next step has already ended: that
 * one, whose gradient is finite, must have changed nothing. */
static void an_overflow_at_the_least_scale_ends_training(void **state) {
    const vit_scaler scaler = scaler_of(1);
    (void)state;
    training *before = training_of("ddp", 2, 2, 1, 0), *t = training_of("ddp", 2, 2, 1, 0);
    before->type = t->type = RT_FP16;
    before->scaler = t->scaler = &scaler;
    before->steps = 1;
    trained(before);
    weights_before = before->weights;
    looked_at = 0;
    t->late = 1;
    t->poison = 1e6;
    t->poisoned = 2;
    t->inspect = assert_weights_as_before;
    train_world(t, &odd_config);
    assert_true(t->failed);
    assert_string_equal(t->error.text,
                        "fp16: a gradient overflows though the loss scale is 1, expected no less "
                        "(--precision bf16)");
    assert_true(looked_at >= 2 + 2 + 1); /* after step 3 perhaps only the rank that was the first to read */
    training_free(before);
    training_free(t);
}

/* A loss that is not finite: reported by step's result, nothing updated, and the unit is found. */
static void not_finite_is_noticed(void **state) {
    (void)state;
    training *before = training_of("ddp", 3, 2, 1, 0), *t = training_of("ddp", 3, 2, 1, 0);
    before->steps = 2;
    trained(before);
    t->poison = (double)INFINITY;
    t->evaluate = 1;
    trained(t);
    assert_memory_equal(before->weights, t->weights, t->count * sizeof *t->weights);
    assert_false(isfinite(t->norms[2]));
    assert_int_equal(t->not_finite[1], 0);              /* rank 1's embedding */
    assert_int_equal(t->not_finite[0], t->model.units); /* rank 0 saw nothing */
    training_free(before);
    training_free(t);
}

/* -------------------------------------------------------------------------------------------- collectives */

typedef struct {
    dist_hub *hub;
    int ranks;
} hub_argument;

enum { ROUNDS = 40 };

static float value_of(size_t rank, size_t i, int round) {
    return (float)random_normal(random_key(1, rank, (uint64_t)round, 0), i);
}

/* Every collective, on sizes that do not divide, in place and not, running ahead of the slower ranks. */
static int collectives_body(rt_rank *rank, void *argument) {
    hub_argument *h = argument;
    size_t n = (size_t)h->ranks, me = (size_t)rank->rank, k = 37;
    error_text e;
    dist_comm comm;
    if (vit_cpu.open(rank, &e) || dist_comm_open(&comm, h->hub, rank, &vit_cpu)) return -1;
    for (int round = 0; round < ROUNDS; round++) {
        size_t root = (size_t)round % n;
        rt_block in = rt_alloc(rank, RT_WORKSPACE, RT_FP32, n * k, 1),
                 out = rt_alloc(rank, RT_WORKSPACE, RT_FP32, n * k, 1);
        rt_block whole = rt_alloc(rank, RT_WORKSPACE, RT_FP32, n * k, 1),
                 whole2 = rt_alloc(rank, RT_WORKSPACE, RT_FP32, n * k, 1);
        rt_block integers = rt_alloc(rank, RT_WORKSPACE, RT_I64, k, 1),
                 got = rt_alloc(rank, RT_WORKSPACE, RT_FP32, k, 1);
        float *x = in.data, *y = out.data, *z = whole.data, *z2 = whole2.data, *g = got.data;
        int64_t *c = integers.data;
        for (size_t i = 0; i < n * k; i++) x[i] = value_of(me, i, round);
        for (size_t i = 0; i < k; i++) c[i] = (int64_t)(me * 1000 + i);
        memcpy(z, x, n * k * sizeof *z);
        memcpy(z2, x, n * k * sizeof *z2);
        rt_event done = {0}, sent = {0};
        dist_call call = {.unit = "test", .stream = RT_COMMUNICATION, .done = &done, .peer = (int)root};
#define POST(o, i, t) (call.op = (o), call.in = (i), call.out = (t), dist_post(&comm, &call))
        POST(DIST_ALL_REDUCE, whole, whole);
        POST(DIST_REDUCE, in, me == root ? out : (rt_block){0});
        POST(DIST_CONTROL, integers, integers);
        POST(DIST_REDUCE_SCATTER, whole2, rt_slice(whole2, me * k, k)); /* in place */
        POST(DIST_BARRIER, (rt_block){0}, (rt_block){0});
        rt_wait(rank, RT_HOST, &done);
        for (size_t i = 0; i < n * k; i++) {
            float sum = value_of(0, i, round);
            for (size_t r = 1; r < n; r++) sum += value_of(r, i, round); /* in rank order */
            assert_true(z[i] == sum);
            if (me == root) assert_true(y[i] == sum);
            if (i / k == me) assert_true(z2[i] == sum);
        }
        for (size_t i = 0; i < k; i++) assert_true(c[i] == (int64_t)(n * i + 500 * n * (n - 1)));
        dist_group_begin(&comm);
        POST(DIST_ALL_GATHER, rt_slice(in, me * k, k), in); /* in place */
        POST(DIST_BROADCAST, me == root ? whole2 : (rt_block){0}, me == root ? (rt_block){0} : whole);
        dist_group_end(&comm);
        if (n > 1) { /* to the right, from the left */
            call.done = &sent;
            call.peer = (int)((me + 1) % n);
            POST(DIST_SEND, rt_slice(whole2, me * k, k), (rt_block){0});
            call.done = &done;
            call.peer = (int)((me + n - 1) % n);
            POST(DIST_RECV, (rt_block){0}, got);
            rt_wait(rank, RT_HOST, &sent);
        }
        rt_wait(rank, RT_HOST, &done);
        for (size_t i = 0; i < n * k; i++) assert_true(x[i] == value_of(i / k, i, round));
        if (me != root)
            for (size_t i = 0; i < n * k; i++) {
                float sum = value_of(0, i, round);
                for (size_t r = 1; r < n; r++) sum += value_of(r, i, round);
                assert_true(z[i] == (i / k == root ? sum : value_of(root, i, round)));
            }
        size_t left = (me + n - 1) % n;
        for (size_t i = 0; i < k && n > 1; i++) {
            float sum = value_of(0, left * k + i, round);
            for (size_t r = 1; r < n; r++) sum += value_of(r, left * k + i, round);
            assert_true(g[i] == sum);
        }
        rt_block *blocks[] = {&in, &out, &whole, &whole2, &integers, &got};
        for (size_t i = 0; i < 6; i++) rt_free(rank, RT_WORKSPACE, blocks[i]);
    }
    double bytes = (double)(n * k * 4 * ROUNDS), share = (double)(n - 1) / (double)n;
    assert_true(fabs(comm.traffic[DIST_ALL_REDUCE].wire_bytes - 2 * share * bytes) < 1);
    assert_true(fabs(comm.traffic[DIST_REDUCE_SCATTER].wire_bytes - share * bytes) < 1);
    assert_true(fabs(comm.traffic[DIST_ALL_GATHER].wire_bytes - share * bytes) < 1);
    assert_int_equal(comm.traffic[DIST_ALL_GATHER].calls, ROUNDS);
    assert_int_equal(comm.traffic[DIST_ALL_GATHER].elements, n * k * ROUNDS);
    size_t mine = 0;
    for (size_t i = 0; i < ROUNDS; i++) mine += i % n == me;
    assert_true(fabs(comm.traffic[DIST_BROADCAST].wire_bytes - (double)(mine * (n - 1) * n * k * 4)) < 1);
    assert_true(fabs(comm.traffic[DIST_REDUCE].wire_bytes - (double)((ROUNDS - mine) * n * k * 4)) < 1);
    dist_comm_close(&comm);
    vit_cpu.close(rank);
    return 0;
}

static void collectives_are_sums_in_rank_order(void **state) {
    (void)state;
    for (int n = 1; n <= MOST_RANKS; n++) {
        rt_world world;
        assert_int_equal(rt_world_init(&world, n, RT_CHECK), 0);
        hub_argument h = {dist_hub_create(&world), n};
        int failed = rt_run(&world, collectives_body, &h);
        if (failed) print_message("%s\n%s", world.error.text, world.table ? world.table : "");
        assert_false(failed);
        dist_hub_free(h.hub);
        rt_world_free(&world);
    }
}

/* Ranks may be DIST_RING launches apart, and no further. */
static int far_ahead_body(rt_rank *rank, void *argument) {
    error_text e;
    dist_comm comm;
    if (vit_cpu.open(rank, &e) || dist_comm_open(&comm, argument, rank, &vit_cpu)) return -1;
    rt_block x = rt_alloc(rank, RT_WORKSPACE, RT_I64, 1, 1);
    rt_event done[60] = {{0}};
    *(int64_t *)x.data = rank->rank;
    for (int i = 0; i < 60; i++)
        dist_post(&comm, &(dist_call){.op = DIST_CONTROL,
                                      .in = x,
                                      .out = x,
                                      .unit = "x",
                                      .stream = RT_COMMUNICATION,
                                      .done = &done[i]});
    rt_wait(rank, RT_HOST, &done[59]);
    assert_true(*(int64_t *)x.data == (int64_t)1 << 59); /* 0 + 1, then doubled 59 times */
    rt_free(rank, RT_WORKSPACE, &x);
    dist_comm_close(&comm);
    vit_cpu.close(rank);
    return 0;
}

static void ranks_may_run_ahead(void **state) {
    (void)state;
    rt_world world;
    assert_int_equal(rt_world_init(&world, 2, RT_CHECK), 0);
    dist_hub *hub = dist_hub_create(&world);
    assert_false(rt_run(&world, far_ahead_body, hub));
    dist_hub_free(hub);
    rt_world_free(&world);
}

/* ----------------------------------------------------------------------------------- formulas and options */

/* What the program prints beside the measured numbers is right: memory, traffic and the estimate without
 * memory, for every variant. */
static void formulas_match_what_is_measured(void **state) {
    (void)state;
    for (int frozen = 0; frozen < 2; frozen++)
        for (int n = LEAST_RANKS; n <= LIMIT_RANKS; n++)
            for (size_t M = 1; M <= 2; M++)
                for (dist_reduction reduction = DIST_REDUCE_LAST; reduction <= DIST_REDUCE_EVERY; reduction++)
                    for (size_t k = 0; k < VARIANTS; k++) {
                        vit_config config = odd_config;
                        config.freeze_backbone = frozen;
                        training *t = variant_of(k, n, 2, M, reduction);
                        t->steps = 2;
                        t->optimizer = k % 2 ? DIST_SGD : DIST_ADAMW;
                        trained_as(t, &config);
                        for (int r = 0; r < n; r++) {
                            const dist_formula *f = &t->formula[r];
                            dist_options o = options_of(t);
                            rt_ledger estimate;
                            assert_int_equal(
                                dist_estimate(&vit_cpu, &t->model, &o, n, r, &estimate, &t->error), 0);
                            assert_memory_equal(&estimate, &t->ledger[r], sizeof estimate);
                            double states =
                                0; /* of all ranks: where a unit is frozen in part, shares differ */
                            for (int q = 0; q < n; q++) states += (double)t->ledger[q].bytes[RT_OPTIMIZER];
                            for (int c = 0; c < RT_CATEGORIES; c++)
                                if (!isnan(f->bytes[c]) && (c != RT_OPTIMIZER || !frozen))
                                    assert_true(f->bytes[c] == (double)t->ledger[r].bytes[c]);
                            if (!strncmp(t->strategy, "zero", 4))
                                assert_true(f->bytes[RT_OPTIMIZER] * n == states);
                            for (int op = 0; op < DIST_OPS; op++)
                                assert_true(f->elements[op] * (double)t->steps ==
                                            (double)t->traffic[r][op].elements);
                        }
                        training_free(t);
                    }
}

/* PyTorch's default rule (1 MiB first, then 25 MiB, append before the test) on ViT-B/16: the head is 3.1 MB,
 * a block 28.4 MB, so every unit closes its bucket. On Ti/16 a block is 1.78 MB: 15 of them pass 25 MiB. */
static int buckets_body(rt_rank *rank, void *argument) {
    vit_model *m = argument;
    dist d = {.rank = rank, .model = m, .offset = calloc(m->units + 1, sizeof(size_t))};
    for (size_t u = 0; u < m->units; u++) d.offset[u + 1] = d.offset[u] + m->unit[u].count;
    assert_int_equal(dist__cut_buckets(&d, 25), 0);
    if (m->D == 768) assert_int_equal(d.buckets, 14);
    if (m->D == 192)
        assert_int_equal(d.buckets, 2); /* 0.77 MB of head and a block; 11 blocks and the embedding */
    if (m->D == 192) assert_int_equal(d.bucket[0].first, 12);
    free(d.offset);
    free(d.bucket);
    free(d.bucket_of);
    return 0;
}

static void buckets_follow_pytorch(void **state) {
    (void)state;
    const char *names[] = {"vit_base_patch16_224", "vit_tiny_patch16_224"};
    for (int i = 0; i < 2; i++) {
        vit_config config;
        vit_model m;
        rt_world world;
        error_text e;
        assert_int_equal(vit_config_named(&config, names[i], &e), 0);
        assert_int_equal(vit_model_init(&m, &config, RT_FP32, &e), 0);
        assert_int_equal(rt_world_init(&world, 1, 0), 0);
        assert_int_equal(rt_run(&world, buckets_body, &m), 0);
        rt_world_free(&world);
        vit_model_free(&m);
    }
}

static void impossible_options_are_errors(void **state) {
    (void)state;
    training *t = training_of("single", 2, 2, 1, 0);
    train_world(t, &odd_config);
    assert_true(t->failed);
    assert_non_null(strstr(t->error.text, "single runs on one rank"));
    training_free(t);
    t = training_of("magic", 1, 2, 1, 0);
    train_world(t, &odd_config);
    assert_true(t->failed);
    assert_non_null(strstr(t->error.text, "magic"));
    training_free(t);
    t = training_of("ddp", 2, (size_t)1 << 60, 1, 0); /* a batch that no memory holds */
    t->steps = 0;
    vit_config config = odd_config;
    assert_int_equal(vit_model_init(&t->model, &config, RT_FP32, &t->error), 0);
    assert_true(vit_unit_saved_bytes(&t->model, &vit_cpu, &t->model.unit[1], (size_t)1 << 60) > (size_t)1
                                                                                                    << 60);
    training_free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(strategies_agree),
        cmocka_unit_test(strategies_agree_in_lower_precision),
        cmocka_unit_test(lower_precision_takes_the_bytes_that_it_should),
        cmocka_unit_test(an_overflow_skips_the_step),
        cmocka_unit_test(sgd_agrees_too),
        cmocka_unit_test(a_recorded_step_gives_the_same_bits),
        cmocka_unit_test(what_cannot_be_recorded_is_an_error),
        cmocka_unit_test(an_offloaded_optimizer_gives_the_same_bits),
        cmocka_unit_test(evaluation_between_steps_changes_nothing),
        cmocka_unit_test(results_may_be_read_a_step_late),
        cmocka_unit_test(nothing_changes_after_a_step_that_is_not_finite),
        cmocka_unit_test(an_overflow_at_the_least_scale_ends_training),
        cmocka_unit_test(not_finite_is_noticed),
        cmocka_unit_test(collectives_are_sums_in_rank_order),
        cmocka_unit_test(ranks_may_run_ahead),
        cmocka_unit_test(a_frozen_backbone_stays),
        cmocka_unit_test(formulas_match_what_is_measured),
        cmocka_unit_test(buckets_follow_pytorch),
        cmocka_unit_test(impossible_options_are_errors),
    };
    return cmocka_run_group_tests_name("dist", tests, NULL, NULL);
}
