/* test_memory.c - the ledger against the papers' table, category by category, to the byte.
 *
 * Rajbhandari et al. 2020 (arXiv 1910.02054) in fp32, bytes at rest on each of N ranks for P parameters:
 *
 *              parameters   gradients   AdamW's moments
 *     ddp          4 P         4 P          8 P             dp: the moments on rank 0 alone
 *     zero1        4 P         4 P          8 P / N
 *     zero2        4 P         4 P / N      8 P / N         4 P of gradients where only the last micro-batch
 *     zero3        4 P / N     4 P / N      8 P / N         of several is reduced (FSDP's no_sync)
 *
 * P counts padding: a tensor begins at a multiple of 16 elements and a unit at one of 16 N, which adds less
 * than 16 elements a tensor and 16 N a unit. On top come slots, allocated once, as nothing is in a step:
 *
 *     gradients       one slot of the largest unit, where whole gradients of several micro-batches add up;
 *     communication   two slots of the largest unit (ddp: bucket), where gradients are reduced into shards,
 *                     or at every one of several micro-batches; under zero3 prefetch + 1 slots of the largest
 *                     unit (P, where all stay from forward to backward); the control block of a step.
 *
 * Activations and workspace are counted here from the shapes that vit.h states. On one rank there are no
 * shards: zero2 and zero3 hold what ddp holds. */
#include "tests/world.h"

/* -------------------------------------------------------------------------- activations from their shapes */

/* Bytes of count elements of 4 bytes within what a unit saves or works in: they begin at multiples of 64. */
static size_t part(size_t count) { return (4 * count + 63) / 64 * 64; }

/* What block number u of the chain saves; Q tokens go on: all, or in the last block the class token. Mean
 * and 1 / deviation of two norms, q k v, what the device keeps of the softmax, the output of attention,
 * the stream between the branches, the MLP before GELU. */
static size_t block_saves(const vit_model *m, size_t u, size_t B) {
    size_t T = m->T, D = m->D, Q = u + 2 < m->units ? T : 1;
    size_t softmax = vit_cpu.attention_saved(B, T, Q, m->H, D / m->H);
    assert_true(softmax >= B * m->H * Q * T && softmax < B * m->H * Q * (T + 64)); /* rows are padded */
    return 2 * part(B * T) + part(3 * B * T * D) + part(softmax) + 2 * part(B * Q * D) + 2 * part(B * Q) +
           part(B * Q * m->F);
}

/* Images, labels and keys; every unit's output; what units save: blocks whose number N divides share the
 * room of the neediest of them; two gradients of outputs; losses. */
static size_t activation_bytes(const vit_model *m, size_t B, size_t N) {
    size_t T = m->T, D = m->D, V = m->V, shared = 0;
    size_t bytes = 4 * B * m->C * m->config.image_height * m->config.image_width + 4 * B + 8 * B;
    bytes += 4 * B * ((m->units - 2) * T * D + D + V); /* embedding and blocks, the last block, head */
    for (size_t u = 1; u + 1 < m->units; u++) {
        size_t saves = block_saves(m, u, B);
        if (N == 0 || u % N)
            bytes += saves;
        else if (shared < saves)
            shared = saves;
    }
    bytes += part(B * D) + 2 * part(B) + part(B * V); /* head: norm, mean, 1 / deviation, probabilities */
    return bytes + shared + 2 * 4 * B * T * D + 4 * B;
}

/* Scratch of the neediest unit, a block (norm, hidden, three of the stream, the widest gradient) or the
 * embedding (patches, their projection), nine doubles of a step (rate, number, two loss scales, two
 * corrections, factor, norm, whether it has halted) and eight of the loss scaler. Of each of two steps that
 * are over: the nine, the loss, bad losses and the stop flag. */
static size_t workspace_bytes(const vit_model *m, size_t B) {
    size_t rows = B * m->T, D = m->D, wide = m->F > 3 * D ? m->F : 3 * D;
    size_t block = 4 * part(rows * D) + part(rows * m->F) + part(rows * wide);
    size_t embedding = part(B * m->N * m->C * m->P * m->P) + part(B * m->N * D);
    return (block > embedding ? block : embedding) + (9 + 8) * 8 + 2 * (9 + 3) * 8;
}

/* ---------------------------------------------------------------------------------------------- the table */

typedef struct {
    const char *strategy;
    double bucket_mb;
    size_t prefetch;
    int keep_after_forward;
    size_t checkpoint_every;
} setting;

static void assert_ledger(const training *t, const setting *s) {
    const vit_model *m = &t->model;
    size_t N = (size_t)t->ranks, P = 0, unpadded = 0, tensors = 0, largest = 0, largest_bucket = 0;
    int stage = strncmp(s->strategy, "zero", 4) ? 0 : s->strategy[4] - '0';
    int several = t->accumulation > 1, every = t->reduction == DIST_REDUCE_EVERY;
    int shards = stage >= 2 && N > 1 && (every || !several); /* of gradients */
    for (size_t u = m->units, bucket = 0; u-- > 0;) {
        size_t count = padded(m, u, N);
        P += count;
        tensors += m->unit[u].tensors;
        for (size_t i = 0; i < m->unit[u].tensors; i++) unpadded += m->unit[u].tensor[i].count;
        if (largest < count) largest = count;
        bucket += count;
        if (largest_bucket < bucket) largest_bucket = bucket;
        if (strcmp(s->strategy, "ddp") || (double)(4 * bucket) >= s->bucket_mb * 1048576) bucket = 0;
    }
    assert_true(P >= unpadded && P < unpadded + 16 * tensors + 16 * N * m->units);
    size_t expected[RT_CATEGORIES] = {[RT_PARAMETERS] = stage == 3 ? 4 * P / N : 4 * P,
                                      [RT_GRADIENTS] = shards ? 4 * P / N : 4 * P,
                                      [RT_OPTIMIZER] = stage >= 1 ? 8 * P / N : 8 * P,
                                      [RT_ACTIVATIONS] = activation_bytes(m, t->batch, s->checkpoint_every),
                                      [RT_WORKSPACE] = workspace_bytes(m, t->batch)};
    if (several && !every) expected[RT_GRADIENTS] += 4 * largest;
    if (shards || (several && every && strcmp(s->strategy, "single")))
        expected[RT_COMMUNICATION_BUFFERS] += 2 * 4 * largest_bucket;
    if (stage == 3 && s->keep_after_forward) expected[RT_COMMUNICATION_BUFFERS] += 4 * P;
    if (stage == 3 && !s->keep_after_forward)
        expected[RT_COMMUNICATION_BUFFERS] += (s->prefetch + 1) * 4 * largest;
    /* loss, bad losses, the counters of the exact norm, and those that evaluation asks for */
    expected[RT_COMMUNICATION_BUFFERS] += 8 * (3 + 2 * 640 + 1) + 8 * 16;
    for (int r = 0; r < t->ranks; r++) {
        const rt_ledger *l = &t->ledger[r];
        size_t total = 0;
        if (!strcmp(s->strategy, "dp") && r) expected[RT_OPTIMIZER] = 0;
        for (int c = 0; c < RT_CATEGORIES; c++) {
            if (l->bytes[c] != expected[c] || l->peak_bytes[c] != expected[c])
                fail_msg("%s, rank %d of %zu, accumulation %zu, %s, prefetch %zu, keep %d, checkpoint every "
                         "%zu: %s %zu bytes, peak %zu, expected %zu",
                         s->strategy, r, N, t->accumulation, every ? "every" : "last", s->prefetch,
                         s->keep_after_forward, s->checkpoint_every, rt_category_name((rt_category)c),
                         l->bytes[c], l->peak_bytes[c], expected[c]);
            total += expected[c];
        }
        assert_int_equal(l->total_bytes, total);
        assert_int_equal(l->total_peak_bytes, total);
    }
}

static training *trained_with(const setting *s, int n, size_t batch, size_t accumulation,
                              dist_reduction reduction) {
    training *t = training_of(s->strategy, n, batch, accumulation, reduction);
    t->steps = 1;
    t->evaluate = 1;
    t->bucket_mb = s->bucket_mb;
    t->prefetch = s->prefetch;
    t->keep_after_forward = s->keep_after_forward;
    t->checkpoint_every = s->checkpoint_every;
    return trained(t);
}

/* A setting on N = 1..5 ranks, accumulation 1 and 3, either reduction. After a step and an evaluation every
 * category holds what it held at the beginning, and never held more. */
static void check(const setting *s) {
    for (int n = 1; n <= (strcmp(s->strategy, "single") ? MOST_RANKS : 1); n++)
        for (size_t M = 1; M <= 3; M += 2)
            for (dist_reduction reduction = DIST_REDUCE_LAST; reduction <= DIST_REDUCE_EVERY; reduction++) {
                if (reduction == DIST_REDUCE_EVERY && !strcmp(s->strategy, "single")) continue;
                training *t = trained_with(s, n, 1 + (size_t)n % 3, M, reduction);
                assert_ledger(t, s);
                training_free(t);
            }
}

static void replicated(void **state) {
    (void)state;
    check(&(setting){.strategy = "single"});
    check(&(setting){.strategy = "dp"});
    check(&(setting){.strategy = "ddp"});
    check(&(setting){.strategy = "ddp", .bucket_mb = 0.015}); /* two units each */
    check(&(setting){.strategy = "ddp", .bucket_mb = 1});     /* one bucket */
}

static void sharded(void **state) {
    (void)state;
    check(&(setting){.strategy = "zero1"});
    check(&(setting){.strategy = "zero2"});
    for (size_t prefetch = 0; prefetch <= 3; prefetch++)
        check(&(setting){.strategy = "zero3", .prefetch = prefetch});
    check(&(setting){.strategy = "zero3", .prefetch = 1, .keep_after_forward = 1});
}

/* With activation checkpointing of every Nth block, 1, 2, 3 and more than there are. */
static void checkpointed(void **state) {
    (void)state;
    for (size_t N = 1; N <= 4; N++) {
        check(&(setting){.strategy = "ddp", .checkpoint_every = N});
        check(&(setting){.strategy = "zero3", .prefetch = 1, .checkpoint_every = N});
    }
}

/* The sentence about the peak of zero3, N > 1, in one line: shards + (prefetch + 1) slots of
 * parameters and 2 of gradients of the largest unit + activations + workspace (+ the control block: 10
 * KB). */
static void peak_of_zero3(void **state) {
    (void)state;
    for (int n = 2; n <= 4; n++)
        for (size_t prefetch = 0; prefetch <= 2; prefetch++) {
            setting s = {.strategy = "zero3", .prefetch = prefetch, .checkpoint_every = 1};
            training *t = trained_with(&s, n, 2, 3, DIST_REDUCE_EVERY);
            const vit_model *m = &t->model;
            size_t shards = 0, largest = 0;
            for (size_t u = 0; u < m->units; u++) {
                size_t count = padded(m, u, (size_t)n);
                shards += (4 + 4 + 8) * count / (size_t)n;
                if (largest < 4 * count) largest = 4 * count;
            }
            for (int r = 0; r < n; r++)
                assert_int_equal(t->ledger[r].total_peak_bytes,
                                 shards + (prefetch + 1 + 2) * largest + activation_bytes(m, 2, 1) +
                                     workspace_bytes(m, 2) + 8 * (3 + 2 * 640 + 1 + 16));
            training_free(t);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(replicated),
        cmocka_unit_test(sharded),
        cmocka_unit_test(checkpointed),
        cmocka_unit_test(peak_of_zero3),
    };
    return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}
