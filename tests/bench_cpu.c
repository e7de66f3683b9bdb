/* bench_cpu.c - how fast the operations of vit_cpu.c are, as fractions of what this machine can do. No test.
 *
 *     ./bench_cpu [threads [shape]]         shape: Ti/16, S/16, B/32, B/16 or CIFAR-10
 *
 * Every line is the median of ROUNDS rounds. In a round each side (own product, OpenBLAS) has its turn, and
 * just before and after each turn a probe measures the limit with as many threads: multiply-adds on registers
 * for what is arithmetic, a triad over memory for what is traffic. So the fractions mean something where the
 * speed of a machine wavers; GFLOP/s and GB/s do only on a quiet one. Operands that fit into a cache stay
 * there from one repetition to the next, which is why light operations exceed the triad.
 */
#define VIT_IMPLEMENTATION
#include "vit.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum { ROUNDS = 9, TRIAD = 8 << 20 };

#if defined(__AVX512F__)
enum { LANES = 16, CHAINS = 24 };
#elif defined(__AVX2__)
enum { LANES = 8, CHAINS = 12 };
#else
enum { LANES = 4, CHAINS = 12 };
#endif
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 24")
#endif

typedef struct {
    const char *name, *model; /* of timm, for the whole step; or NULL */
    size_t B, T, D, H;
} shape;

typedef struct {
    rt_world world;
    rt_stream *stream;
    shape shape;
    rt_block x, y, pre, dx, w, dw, vector, qkv, saved, counters, scalars, scaler, triad[3];
    vit_replica vit; /* for the whole step, with AdamW's state */
    rt_block exp_avg, exp_avg_sq;
    float *images;
    int32_t *labels;
} bench;

/* ------------------------------------------------------------------------------------------------- probes */

/* Seconds: of one thread's own time, which other processes cannot take; of the wall clock for several. */
static double now(int threads) {
    struct timespec t;
    if (threads > 1) return rt_seconds();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* FLOP/s of `threads` threads that do multiply-adds on registers. */
static double fma_peak(int threads) {
    enum { STEPS = 100000 };
    float sink = 0;
    double start = now(threads);
#pragma omp parallel num_threads(threads) reduction(+ : sink)
    {
        vec chain[CHAINS], factor = (vec){0} + 0.999f, term = (vec){0} + 1e-3f;
        for (int i = 0; i < CHAINS; i++) chain[i] = term * (float)i;
        for (int step = 0; step < STEPS; step++)
            UNROLL for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * factor + term;
        for (int i = 0; i < CHAINS; i++) sink += chain[i][0];
    }
    double seconds = now(threads) - start;
    return sink > 0 ? 2.0 * STEPS * CHAINS * LANES * threads / seconds : 0;
}

/* Bytes/s of a = b + c * factor, counted as three streams. */
static double triad_peak(bench *b, int threads) {
    float *to = b->triad[0].data;
    const float *x = b->triad[1].data, *y = b->triad[2].data;
    double start = now(threads);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (size_t i = 0; i < TRIAD; i++) to[i] = x[i] + 0.5f * y[i];
    return 3.0 * TRIAD * sizeof(float) / (now(threads) - start);
}

/* ---------------------------------------------------------------------------------------------- measuring */

typedef void operation(bench *b, size_t in, size_t out);

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values) {
    qsort(values, ROUNDS, sizeof *values, by_value);
    return values[ROUNDS / 2];
}

/* Work per second of one operation: repeated for 20 ms at least. */
static double turn(bench *b, operation *run, size_t in, size_t out, double work) {
    const int threads = b->world.ranks[0].threads;
    double start = now(threads), seconds;
    int repeats = 0;
    do {
        run(b, in, out);
        repeats++;
    } while ((seconds = now(threads) - start) < 0.02);
    return work * repeats / seconds;
}

/* flops: against the multiply-add probe, with both products if is_product; else bytes against the triad. */
static void line(bench *b, const char *name, operation *run, size_t in, size_t out, double flops,
                 double bytes, int is_product) {
    const vit_matmul sides[] = {VIT_MATMUL_OWN, VIT_MATMUL_OPENBLAS};
    const int threads = b->world.ranks[0].threads;
    double speed[2][ROUNDS], fraction[2][ROUNDS], ratio[ROUNDS];
    error_text e;
    int n = is_product && vit_cpu_matmul(&b->world.ranks[0], VIT_MATMUL_OPENBLAS, &e) == 0 ? 2 : 1;
    run(b, in, out);
    for (int round = 0; round < ROUNDS; round++) {
        for (int side = 0; side < n; side++) {
            vit_cpu_matmul(&b->world.ranks[0], sides[side], &e);
            double before = flops > 0 ? fma_peak(threads) : triad_peak(b, threads);
            speed[side][round] = turn(b, run, in, out, flops > 0 ? flops : bytes);
            double after = flops > 0 ? fma_peak(threads) : triad_peak(b, threads);
            fraction[side][round] = 2 * speed[side][round] / (before + after);
        }
        if (n == 2) ratio[round] = fraction[0][round] / fraction[1][round];
    }
    printf("  %-26s %8.1f %-7s %5.2f", name, 1e-9 * median(speed[0]), flops > 0 ? "GFLOP/s" : "GB/s",
           median(fraction[0]));
    if (n == 2)
        printf("   OpenBLAS %8.1f GFLOP/s %5.2f   own / OpenBLAS %.2f", 1e-9 * median(speed[1]),
               median(fraction[1]), median(ratio));
    printf("\n");
}

/* --------------------------------------------------------------------------------------------- operations */

static const rt_block none;

static size_t rows_of(const bench *b) { return b->shape.B * b->shape.T; }

static void linear(bench *b, size_t in, size_t out) {
    vit_cpu.linear_forward(b->stream, b->y, none, b->x, b->w, b->vector, rows_of(b), in, out, VIT_GELU_ERF);
}
static void linear_gelu(bench *b, size_t in, size_t out) {
    vit_cpu.linear_forward(b->stream, b->y, b->pre, b->x, b->w, b->vector, rows_of(b), in, out, VIT_GELU_ERF);
}
static void linear_dw(bench *b, size_t in, size_t out) {
    vit_cpu.linear_backward(b->stream, none, b->dw, b->vector, b->y, b->x, b->w, none, rows_of(b), in, out,
                            VIT_GELU_ERF);
}
static void linear_dw_dx(bench *b, size_t in, size_t out) {
    vit_cpu.linear_backward(b->stream, b->dx, b->dw, b->vector, b->y, b->x, b->w, none, rows_of(b), in, out,
                            VIT_GELU_ERF);
}
static void linear_dw_dx_gelu(bench *b, size_t in, size_t out) {
    vit_cpu.linear_backward(b->stream, b->dx, b->dw, b->vector, b->y, b->x, b->w, b->pre, rows_of(b), in, out,
                            VIT_GELU_ERF);
}
static void attention(bench *b, size_t in, size_t out) {
    const shape *s = &b->shape;
    vit_cpu.attention_forward(b->stream, b->y, b->saved, b->qkv, s->B, s->T, s->T, in, out);
}
static void attention_dqkv(bench *b, size_t in, size_t out) {
    const shape *s = &b->shape;
    vit_cpu.attention_backward(b->stream, b->dx, b->y, b->qkv, b->y, b->saved, s->B, s->T, s->T, in, out);
}
static void layernorm(bench *b, size_t in, size_t out) {
    vit_cpu.layernorm_forward(b->stream, b->y, b->saved, rt_slice(b->saved, out, out), b->x, b->vector,
                              b->vector, out, in, 1e-6);
}
static void layernorm_dx(bench *b, size_t in, size_t out) {
    vit_cpu.layernorm_backward(b->stream, b->dx, b->dw, rt_slice(b->dw, in, in), b->qkv, b->y, b->x, b->saved,
                               rt_slice(b->saved, out, out), b->vector, 1, out, out, in);
}
static void residual(bench *b, size_t in, size_t out) {
    vit_cpu.residual_forward(b->stream, b->y, b->y, b->x, none, 1, in * out, 0, 0, 0);
}
static void adamw(bench *b, size_t in, size_t out) {
    const vit_adamw_options o = {0.9, 0.999, 1e-8, 0.05};
    vit_cpu.adamw(b->stream, rt_slice(b->w, 0, in * out), (rt_block){0}, b->dw, b->pre, b->x, b->scalars,
                  in * out / 2, 1, &o);
}
static void norm(bench *b, size_t in, size_t out) {
    vit_cpu.sum_of_squares(b->stream, b->counters, rt_slice(b->x, 0, in * out));
}

/* A training step of one rank: forward, backward, norm, AdamW. */
static void step(bench *b, size_t in, size_t out) {
    const vit_adamw_options o = {0.9, 0.999, 1e-8, 0.05};
    const vit_context *c = &b->vit.context;
    (void)in, (void)out;
    vit_forward(&b->vit, b->images, b->labels);
    vit_backward(&b->vit);
    vit_fill(c, b->counters, 0);
    vit_sum_of_squares(c, b->counters, b->vit.gradients);
    vit_decide_step(c, b->scalars, b->scaler, b->counters, 1, 1, &o);
    vit_adamw(c, b->vit.parameters, (rt_block){0}, b->exp_avg, b->exp_avg_sq, b->vit.gradients, b->scalars, 0,
              1, &o);
}

/* Products and attention alone: a forward pass, and twice that for backward, which needs no gradient of the
 * images. The last block does for one token what the others do for all. */
static double step_flops(const vit_model *m, double B) {
    double T = (double)m->T, D = (double)m->D, F = (double)m->F, embedding, forward;
    forward = embedding = 2 * B * (double)(m->N * m->C * m->P * m->P) * D;
    for (size_t u = 1; u + 1 < m->units; u++) {
        double Q = (double)m->unit[u].tokens;
        forward += 2 * B * D * (3 * T * D + Q * (D + 2 * F + 2 * T));
    }
    forward += 2 * B * D * (double)m->V;
    return 3 * forward - embedding;
}

static int bench_step(bench *b, shape s) {
    vit_config config;
    error_text e;
    if (vit_config_named(&config, s.model, &e) || vit_open(&b->vit, &config, &vit_cpu, RT_FP32, s.B, &e))
        return fprintf(stderr, "%s\n", e.text), -1;
    rt_rank *rank = &b->vit.world.ranks[0];
    const vit_model *m = &b->vit.model;
    const size_t pixels = s.B * m->C * config.image_height * config.image_width;
    rank->threads = b->world.ranks[0].threads;
    b->exp_avg = rt_alloc(rank, RT_OPTIMIZER, RT_FP32, b->vit.parameters.count, 1);
    b->exp_avg_sq = rt_alloc(rank, RT_OPTIMIZER, RT_FP32, b->vit.parameters.count, 1);
    b->images = malloc(pixels * sizeof *b->images);
    b->labels = calloc(s.B, sizeof *b->labels);
    for (size_t i = 0; i < pixels; i++) b->images[i] = (float)random_normal(1, i);
    const double flops = step_flops(m, (double)s.B);
    char name[40];
    snprintf(name, sizeof name, "step of %.1f GFLOP", 1e-9 * flops);
    line(b, name, step, 0, 0, flops, 0, 0);
    free(b->images);
    free(b->labels);
    rt_free(rank, RT_OPTIMIZER, &b->exp_avg);
    rt_free(rank, RT_OPTIMIZER, &b->exp_avg_sq);
    vit_close(&b->vit);
    return 0;
}

static rt_block random_block(bench *b, size_t count, float scale) {
    rt_block x = rt_alloc(&b->world.ranks[0], RT_WORKSPACE, RT_FP32, count, 1);
    for (size_t i = 0; i < count; i++) ((float *)x.data)[i] = scale * (float)random_normal(count, i);
    return x;
}

static int bench_shape(bench *b, shape s) {
    rt_rank *rank = &b->world.ranks[0];
    const size_t D = s.D, rows = s.B * s.T, hd = D / s.H, parameters = 12 * D * D;
    const double n = (double)rows, d = (double)D, t = (double)s.T;
    const size_t most = rows * 4 * D > parameters ? rows * 4 * D : parameters;
    rt_block *const blocks[] = {&b->x, &b->y, &b->pre, &b->dx, &b->w, &b->dw, &b->vector, &b->qkv, &b->saved};
    const size_t saved = vit_cpu.attention_saved(s.B, s.T, s.T, s.H, hd);
    const size_t counts[] = {most,  most,         most,
                             most,  parameters,   parameters,
                             4 * D, rows * 3 * D, saved > 2 * rows ? saved : 2 * rows};
    b->shape = s;
    for (size_t i = 0; i < 9; i++) *blocks[i] = random_block(b, counts[i], i == 4 ? 0.05f : 1);
    printf("%s: B = %zu, T = %zu, D = %zu, %zu heads of %zu\n", s.name, s.B, s.T, D, s.H, hd);
    line(b, "qkv forward", linear, D, 3 * D, 6 * n * d * d, 0, 1);
    line(b, "qkv dW, db", linear_dw, D, 3 * D, 6 * n * d * d, 0, 1);
    line(b, "qkv dW, db, dX", linear_dw_dx, D, 3 * D, 12 * n * d * d, 0, 1);
    line(b, "proj forward", linear, D, D, 2 * n * d * d, 0, 1);
    line(b, "proj dW, db, dX", linear_dw_dx, D, D, 4 * n * d * d, 0, 1);
    line(b, "fc1 forward, no GELU", linear, D, 4 * D, 8 * n * d * d, 0, 1);
    line(b, "fc1 forward, GELU", linear_gelu, D, 4 * D, 8 * n * d * d, 0, 1);
    line(b, "fc1 dW, db", linear_dw, D, 4 * D, 8 * n * d * d, 0, 1);
    line(b, "fc1 dW, db, dX", linear_dw_dx, D, 4 * D, 16 * n * d * d, 0, 1);
    line(b, "fc2 forward", linear, 4 * D, D, 8 * n * d * d, 0, 1);
    line(b, "fc2 dW, db", linear_dw, 4 * D, D, 8 * n * d * d, 0, 1);
    line(b, "fc2 dW, db, dX, no GELU", linear_dw_dx, 4 * D, D, 16 * n * d * d, 0, 1);
    line(b, "fc2 dW, db, dX, GELU", linear_dw_dx_gelu, 4 * D, D, 16 * n * d * d, 0, 1);
    line(b, "attention forward", attention, s.H, hd, 4 * n * t * d, 0, 0);
    line(b, "attention backward", attention_dqkv, s.H, hd, 8 * n * t * d, 0, 0);
    line(b, "layernorm forward", layernorm, D, rows, 0, 8 * n * d, 0);
    line(b, "layernorm backward", layernorm_dx, D, rows, 0, 16 * n * d, 0);
    line(b, "residual forward", residual, D, rows, 0, 12 * n * d, 0);
    line(b, "AdamW", adamw, 12, D * D, 0, 28.0 * 12 * d * d, 0);
    line(b, "sum of squares", norm, 12, D * D, 0, 4.0 * 12 * d * d, 0);
    for (size_t i = 0; i < 9; i++) rt_free(rank, RT_WORKSPACE, blocks[i]);
    return s.model ? bench_step(b, s) : 0;
}

int main(int argc, char **argv) {
    static const shape shapes[] = {{"Ti/16", "vit_tiny_patch16_224", 8, 197, 192, 3},
                                   {"S/16", "vit_small_patch16_224", 8, 197, 384, 6},
                                   {"B/32", "vit_base_patch32_224", 16, 50, 768, 12},
                                   {"B/16", "vit_base_patch16_224", 4, 197, 768, 12},
                                   {"CIFAR-10", NULL, 64, 65, 64, 4}};
    const char *only = argc > 2 ? argv[2] : NULL;
    bench b = {0};
    error_text e;
    if (rt_world_init(&b.world, 1, 0)) return 1;
    b.stream = &b.world.ranks[0].stream[RT_COMPUTE];
    b.world.ranks[0].threads = argc > 1 ? atoi(argv[1]) : 1;
    if (vit_cpu.open(&b.world.ranks[0], &e)) return fprintf(stderr, "%s\n", e.text), 1;
    b.counters = rt_alloc(&b.world.ranks[0], RT_WORKSPACE, RT_I64, VIT_NORM_COUNTERS, 1);
    b.scalars = rt_alloc(&b.world.ranks[0], RT_WORKSPACE, RT_FP64, VIT_SCALARS, 1);
    b.scaler = rt_alloc(&b.world.ranks[0], RT_WORKSPACE, RT_U8, sizeof(vit_scaler), 1);
    ((vit_scaler *)b.scaler.data)->scale = 1e-3;
    for (int i = 0; i < VIT_HALTED; i++) ((double *)b.scalars.data)[i] = 1e-3;
    for (int i = 0; i < 3; i++) b.triad[i] = random_block(&b, TRIAD, 1);
    printf("%s, %d threads; limits now: %.0f GFLOP/s, %.1f GB/s\n", vit_cpu_description(&b.world.ranks[0]),
           b.world.ranks[0].threads, 1e-9 * fma_peak(b.world.ranks[0].threads),
           1e-9 * triad_peak(&b, b.world.ranks[0].threads));
    int known = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (!only || !strcmp(only, shapes[i].name)) {
            if (bench_shape(&b, shapes[i])) return 1;
            known = 1;
        }
    return known ? 0
                 : (fprintf(stderr, "unknown shape %s, expected Ti/16, S/16, B/32, B/16 or CIFAR-10\n", only),
                    2);
}
