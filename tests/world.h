/* world.h - what the tests of dist.h share: a small odd-sized model, data by formula, and one call that
 * trains it as N ranks and brings back everything that must be equal. */
#ifndef TEST_WORLD_H
#define TEST_WORLD_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "dist.h"

enum { MOST_RANKS = 5, MOST_CALLS = 4096 };

/* AdamW divides by |g| + eps: a gradient that is 0 but for rounding (that of the keys' bias, to which softmax
 * is blind) would be scaled up to the learning rate. This eps lies well above the rounding noise of 1e-9. */
#define ADAM_EPS 1e-6

/* What a rank did, as the observer saw it. */
typedef struct {
    char what[16], unit[32];
    size_t elements;
} seen_call;

typedef struct {
    /* what to run */
    const char *strategy;
    int ranks, threads, flags;
    size_t batch, accumulation, steps;
    double bucket_mb, clipping;
    dist_reduction reduction;
    rt_type type, reduce_type; /* 0: fp32; that of the model */
    dist_optimizer optimizer;
    size_t prefetch, checkpoint_every;
    int keep_after_forward;
    const vit_device *device;       /* NULL: vit_cpu */
    int graphs;                     /* a step is recorded and replayed */
    int offload;                    /* the optimizer in host memory */
    int evaluate;                   /* after every step: a forward pass and a sum over the ranks */
    int late;                       /* the result of a step is read when the next has ended */
    double poison;                  /* added to a pixel of rank 1's data ... */
    size_t poisoned;                /* ... at this step; 0: the last */
    const vit_scaler *scaler;       /* fp16: to begin with; NULL: the default */
    void (*inspect)(const dist *d); /* called by every rank after every step; it fails by rt_fail */
    /* what came of it */
    double *losses, *norms; /* [steps] of rank 0; the other ranks' are compared with them */
    float *weights;         /* all units, from the ranks that save them */
    vit_scaler scaled;      /* of rank 0, at the end */
    size_t count;
    int failed;
    error_text error;
    char *table;
    rt_ledger ledger[MOST_RANKS];
    dist_formula formula[MOST_RANKS];
    dist_traffic traffic[MOST_RANKS][DIST_OPS];
    seen_call call[MOST_RANKS][MOST_CALLS];
    size_t calls[MOST_RANKS];
    uint64_t waits[MOST_RANKS];
    size_t not_finite[MOST_RANKS];
    /* shared by the ranks */
    vit_model model;
    dist_hub *hub;
} training;

static const vit_config odd_config = {.image_height = 7,
                                      .image_width = 9,
                                      .channels = 3,
                                      .patch_size = 2,
                                      .embed_dim = 20,
                                      .depth = 3,
                                      .num_heads = 5,
                                      .num_classes = 7,
                                      .mlp_ratio = 2.3,
                                      .layer_norm_eps = 1e-6,
                                      .drop_path = 0.2,
                                      .label_smoothing = 0.1};

static void observe_call(void *observer, const char *what, const char *unit, size_t elements) {
    void **pair = observer;
    training *t = pair[0];
    size_t rank = (size_t)(uintptr_t)pair[1], i = t->calls[rank]++;
    if (i >= MOST_CALLS) return;
    seen_call *c = &t->call[rank][i];
    c->elements = elements;
    snprintf(c->what, sizeof c->what, "%s", what);
    snprintf(c->unit, sizeof c->unit, "%s", unit);
}

/* Sample number s of the data: pixels, label and key depend on s alone. */
static void make_sample(const vit_config *c, size_t s, float *image, int32_t *label, uint64_t *key) {
    size_t pixels = c->channels * c->image_height * c->image_width;
    uint64_t k = random_key(3, 77, s, 0);
    for (size_t i = 0; i < pixels; i++) image[i] = (float)random_normal(k, i);
    *label = (int32_t)random_below(k, 1000000, c->num_classes);
    *key = random_mix(k);
}

static dist_options options_of(const training *t) {
    return (dist_options){.strategy = t->strategy,
                          .batch_size = t->batch,
                          .accumulation = t->accumulation,
                          .bucket_size_mb = t->bucket_mb,
                          .reduction = t->reduction,
                          .reduce_type = t->reduce_type,
                          .optimizer = t->optimizer,
                          .prefetch = t->prefetch,
                          .keep_after_forward = t->keep_after_forward,
                          .checkpoint_every = t->checkpoint_every,
                          .gradient_clipping = t->clipping,
                          .adamw = {.9, .999, ADAM_EPS, 0.05},
                          .sgd = {.9, 0.05},
                          .graphs = t->graphs,
                          .offload = t->offload ? &vit_cpu : NULL,
                          .counts = 16};
}

static int train_rank(rt_rank *rank, void *argument) {
    training *t = argument;
    const vit_model *m = &t->model;
    const vit_config *c = &m->config;
    size_t pixels = c->channels * c->image_height * c->image_width, B = t->batch, N = (size_t)t->ranks;
    size_t M = t->accumulation, r = (size_t)rank->rank, read = 0;
    float *images = calloc(B * pixels, sizeof *images);
    int32_t *labels = calloc(B, sizeof *labels);
    uint64_t *keys = calloc(B, sizeof *keys);
    error_text e = {{0}};
    dist_comm comm;
    dist d = {0};
    void *observer[2] = {t, (void *)(uintptr_t)r};
    rank->threads = t->threads;
    if (vit_cpu.open(rank, &e) || vit_cpu_matmul(rank, VIT_MATMUL_OWN, &e))
        return rt_fail(rank, "%s", e.text);
    if (dist_comm_open(&comm, t->hub, rank, t->device ? t->device : &vit_cpu)) return -1;
    comm.observe = observe_call;
    comm.observer = observer;
    dist_options o = options_of(t);
    if (dist_open(&d, &comm, m, &o, &e)) {
        if (!rt_failed(rank)) rt_fail(rank, "%s", e.text);
    } else {
        t->formula[r] = dist_formula_of(&d);
        if (t->scaler) d.scaler = *t->scaler;
        for (size_t u = 0; u < m->units; u++) {
            float *values = calloc(m->unit[u].count, sizeof *values);
            vit_unit_initialise(&m->unit[u], 5, values);
            dist_import(&d, u, values);
            free(values);
        }
        for (size_t step = 1; step <= t->steps; step++) {
            dist_result result = {0};
            dist_begin_step(&d, step, 3e-3 / (double)step);
            for (size_t k = 0; k < M; k++) {
                for (size_t b = 0; b < B; b++)
                    make_sample(c, (step - 1) * N * M * B + (b * M + k) * N + r, images + b * pixels,
                                &labels[b], &keys[b]);
                if (t->poison != 0 && step == (t->poisoned ? t->poisoned : t->steps) && r == 1 % N)
                    images[0] += (float)t->poison;
                dist_micro_batch(&d, k, images, labels, keys);
            }
            dist_end_step(&d, t->late ? NULL : &result);
            if (t->inspect && !rt_failed(rank)) t->inspect(&d);
            for (; read + (t->late && step < t->steps) < step; read++) {
                if (t->late) dist_read_result(&d, &result);
                if (r == 0 && t->losses) t->losses[read] = result.loss, t->norms[read] = result.gradient_norm;
            }
            if (t->evaluate) {
                float *logits = calloc(B * m->V, sizeof *logits);
                int64_t counts[3] = {(int64_t)r, 1, -5};
                dist_forward(&d, images, labels, logits, NULL, &t->not_finite[r]);
                dist_sum(&d, counts, 3);
                if (!rt_failed(rank))
                    assert_true(counts[0] == (int64_t)(N * (N - 1) / 2) && counts[1] == (int64_t)N &&
                                counts[2] == -5 * (int64_t)N);
                free(logits);
            }
        }
        size_t offset = 0;
        for (size_t u = 0; u < m->units && d.saves && t->weights; offset += m->unit[u++].count)
            dist_export(&d, u, t->weights + offset);
    }
    if (r == 0) t->scaled = d.scaler;
    memcpy(t->traffic[r], comm.traffic, sizeof comm.traffic);
    t->waits[r] = comm.waits;
    t->ledger[r] = rank->ledger;
    dist_close(&d);
    if (!rt_failed(rank) && rank->ledger.total_bytes)
        rt_fail(rank, "%zu bytes were not given back", rank->ledger.total_bytes);
    dist_comm_close(&comm);
    vit_cpu.close(rank);
    free(images);
    free(labels);
    free(keys);
    return 0;
}

/* Trains; fills in what came of it. Free it with training_free. */
static void train_world(training *t, const vit_config *config) {
    rt_world world;
    error_text e;
    assert_int_equal(vit_model_init(&t->model, config, t->type ? t->type : RT_FP32, &e), 0);
    t->count = 0;
    for (size_t u = 0; u < t->model.units; u++) t->count += t->model.unit[u].count;
    t->weights = calloc(t->count, sizeof *t->weights);
    t->losses = calloc(t->steps + 1, sizeof *t->losses);
    t->norms = calloc(t->steps + 1, sizeof *t->norms);
    assert_int_equal(rt_world_init(&world, t->ranks, t->flags), 0);
    t->hub = dist_hub_create(&world);
    t->failed = rt_run(&world, train_rank, t);
    t->error = world.error;
    t->table = world.table ? strdup(world.table) : NULL;
    dist_hub_free(t->hub);
    rt_world_free(&world);
}

static void training_free(training *t) {
    vit_model_free(&t->model);
    free(t->weights);
    free(t->losses);
    free(t->norms);
    free(t->table);
    free(t);
}

static training *training_of(const char *strategy, int ranks, size_t batch, size_t accumulation,
                             dist_reduction reduction) {
    training *t = calloc(1, sizeof *t);
    t->strategy = strategy;
    t->ranks = ranks;
    t->threads = 1;
    t->flags = RT_CHECK;
    t->batch = batch;
    t->accumulation = accumulation;
    t->steps = 3;
    t->bucket_mb = 25;
    t->reduction = reduction;
    t->clipping = 0.5;
    return t;
}

static inline training *trained_as(training *t, const vit_config *config) {
    train_world(t, config);
    if (t->failed)
        print_message("%s x %d: %s\n%s", t->strategy, t->ranks, t->error.text, t->table ? t->table : "");
    assert_false(t->failed);
    return t;
}

static inline training *trained(training *t) { return trained_as(t, &odd_config); }

static inline void assert_same_bits(const training *a, const training *b) {
    assert_false(a->failed || b->failed);
    assert_memory_equal(a->losses, b->losses, a->steps * sizeof *a->losses);
    assert_memory_equal(a->norms, b->norms, a->steps * sizeof *a->norms);
    assert_memory_equal(a->weights, b->weights, a->count * sizeof *a->weights);
}

/* Elements of unit u on n ranks as DESIGN pads them: every tensor to a multiple of 16, the unit to one of
 * 16 n. */
static inline size_t padded(const vit_model *m, size_t u, size_t n) {
    size_t count = 0;
    for (size_t t = 0; t < m->unit[u].tensors; t++) {
        size_t elements = 1;
        for (size_t i = 0; i < m->unit[u].tensor[t].dims; i++) elements *= m->unit[u].tensor[t].shape[i];
        count += (elements + 15) / 16 * 16;
    }
    return (count + 16 * n - 1) / (16 * n) * (16 * n);
}

#endif
