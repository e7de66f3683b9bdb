/* test_ops.c - the operations of the device table, the units made of them, and the whole chain.
 *
 * Three links hold the numbers:
 *     forward of the naive device in double is read off the formula;
 *     its backward is held against difference quotients of its forward: operations, units, chain;
 *     each fast device is held against the naive one, forward and backward, on many shapes.
 * What a formula does not say (exact bits, order of sums, Inf and NaN, large numbers) is tested case by case.
 *
 *     gcc -O2 -march=native -std=gnu11 -fopenmp -I. -DHAVE_OPENBLAS tests/test_ops.c vit_cpu.c \
 *         -lcmocka -lopenblas -lm -o test_ops && ./test_ops
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define VIT_IMPLEMENTATION
#include "vit.h"
#include "naive_device.h"
#ifdef HAVE_CUDA
#include "staged_device.h"
#endif
#include <float.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const rt_block none;

/* ------------------------------------------------------------------------------------------------ devices */

/* A device that is open, with the type of its numbers. */
typedef struct {
    char name[64];
    const vit_device *device; /* NULL: not built */
    rt_type type;
    rt_world world; /* of one rank */
} bench;

enum { NAIVE_FP64, NAIVE_FP32, OWN_1, OWN_2, OWN_3, OPENBLAS_1, OPENBLAS_2, OPENBLAS_3, CUDA, BENCHES };

static rt_stream *stream_of(const bench *b) { return &b->world.ranks[0].stream[RT_COMPUTE]; }

static void bench_open(bench *b, const char *name, const vit_device *device, rt_type type, int threads) {
    error_text e;
    *b = (bench){.device = device, .type = type};
    snprintf(b->name, sizeof b->name, "%s, threads: %d", name, threads);
    assert_int_equal(rt_world_init(&b->world, 1, 0), 0);
    b->world.ranks[0].threads = threads;
    if (device->open(&b->world.ranks[0], &e)) fail_msg("%s", e.text);
}

static void bench_close(bench *b) {
    if (b->device) b->device->close(&b->world.ranks[0]);
    rt_world_free(&b->world);
}

/* The state of all tests: bench[BENCHES]. */
static int open_devices(void **state) {
    bench *all = *state = calloc(BENCHES, sizeof *all);
    error_text e;
    bench_open(&all[NAIVE_FP64], "naive fp64", &naive_fp64, RT_FP64, 1);
    bench_open(&all[NAIVE_FP32], "naive fp32", &naive_fp32, RT_FP32, 1);
    for (int threads = 1; threads <= 3; threads++) {
        bench *own = &all[OWN_1 + threads - 1], *blas = &all[OPENBLAS_1 + threads - 1];
        bench_open(own, "vit_cpu with its own product", &vit_cpu, RT_FP32, threads);
        if (vit_cpu_matmul(&own->world.ranks[0], VIT_MATMUL_OWN, &e)) fail_msg("%s", e.text);
        bench_open(blas, "vit_cpu with OpenBLAS", &vit_cpu, RT_FP32, threads);
        if (vit_cpu_matmul(&blas->world.ranks[0], VIT_MATMUL_OPENBLAS, &e)) {
            bench_close(blas);
            *blas = (bench){0};
        }
    }
#ifdef HAVE_OPENBLAS
    assert_non_null(all[OPENBLAS_1].device);
#endif
#ifdef HAVE_CUDA
    static vit_device cuda;
    cuda = staged_device();
    bench_open(&all[CUDA], "vit_cuda", &cuda, RT_FP32, 1);
#endif
    return 0;
}

static int close_devices(void **state) {
    for (bench *b = *state; b < (bench *)*state + BENCHES; b++)
        if (b->device) bench_close(b);
    free(*state);
    return 0;
}

/* All of vit_cpu but the matrix product does the same as this. */
static const bench *with_one_thread(const bench *b, const bench *all) {
    return b->device == &vit_cpu ? &all[OWN_1] : b;
}

#define FOR_EACH_DEVICE(b, state)                                                                            \
    for (const bench *b = *(state); b < (const bench *)*(state) + BENCHES; b++)                              \
        if (b->device)

/* ------------------------------------------------------------------------------------------------- blocks */

static double get(rt_block b, size_t i) {
    float wide;
    if (b.type == RT_BF16 || b.type == RT_FP16) {
        rt_widen(&wide, (const uint16_t *)b.data + i, 1, b.type);
        return (double)wide;
    }
    return b.type == RT_FP64 ? ((const double *)b.data)[i] : (double)((const float *)b.data)[i];
}

static void set(rt_block b, size_t i, double value) {
    float wide = (float)value;
    if (b.type == RT_FP64)
        ((double *)b.data)[i] = value;
    else if (b.type != RT_FP32)
        rt_narrow((uint16_t *)b.data + i, &wide, 1, b.type);
    else
        ((float *)b.data)[i] = (float)value;
}

static size_t bytes_of(rt_block b) { return b.count * rt_type_size(b.type); }

/* NaN in every element (all bits set): what an operation fails to write, or should not read, shows. */
static void poison(rt_block b) { memset(b.data, 0xFF, bytes_of(b)); }

/* Exactly as long as it says, for AddressSanitizer; poisoned. */
static rt_block block_new(rt_type type, size_t count) {
    rt_block b = {.type = type, .count = count};
    assert_int_equal(posix_memalign(&b.data, 64, bytes_of(b)), 0);
    poison(b);
    return b;
}

static void release(const rt_block *list) {
    for (; list->tracks != RT_END; list++) free(list->data);
}

/* Standard normal numbers that are exact in float: all devices see the same. */
static void fill_normal(rt_block b, uint64_t seed) {
    for (size_t i = 0; i < b.count; i++) set(b, i, (float)random_normal(random_key(seed, 0, 0, 0), i));
}

static void fill(rt_block b, double value) {
    for (size_t i = 0; i < b.count; i++) set(b, i, value);
}

static rt_block block_of(rt_type type, const double *values, size_t count) {
    rt_block b = block_new(type, count);
    for (size_t i = 0; i < count; i++) set(b, i, values[i]);
    return b;
}

static void assert_same_bits(rt_block a, rt_block b) {
    assert_int_equal(bytes_of(a), bytes_of(b));
    assert_memory_equal(a.data, b.data, bytes_of(a));
}

/* ------------------------------------------------------------------------------------ operations as cases */

/* One operation with its sizes. `run` takes the tensors that it needs, in the same order every time, calls
 * forward, and backward if asked to: of the functional sum(output.gradient * output.value). */
typedef struct run run;
typedef struct {
    const char *name;
    void (*run)(run *);
    double rate; /* of drop-path, label smoothing, or what else the case says */
    size_t n[5];
} op_case;

enum { MOST_TENSORS = 12 };
enum { INPUT, OUTPUT, RESULT, SCRATCH }; /* RESULT: compared between devices, no part of the functional */
typedef struct {
    int kind;
    rt_block value, gradient;
} tensor;

struct run {
    const op_case *c;
    const vit_device *device;
    rt_stream *s;
    rt_type type, inputs; /* of its numbers; what those that it is given are rounded to */
    uint64_t draw;        /* seed of its random numbers */
    int backward;
    tensor tensor[MOST_TENSORS];
    size_t tensors, taken;
};

/* Every element = the nearest that the type has. */
static void round_to(rt_type type, rt_block b) {
    uint16_t x;
    rt_block one = {.data = &x, .type = type, .count = 1};
    for (size_t i = 0; (type == RT_BF16 || type == RT_FP16) && i < b.count; i++) {
        set(one, 0, get(b, i));
        set(b, i, get(one, 0));
    }
}

/* What is at least fp32. */
static rt_type statistic(const run *r) { return r->type == RT_FP64 ? RT_FP64 : RT_FP32; }

static tensor take(run *r, int kind, rt_type type, size_t count) {
    tensor *t = &r->tensor[r->taken++];
    assert_true(r->taken <= MOST_TENSORS);
    if (r->taken > r->tensors) {
        r->tensors = r->taken;
        *t = (tensor){.kind = kind, .value = block_new(type, count)};
        if (kind == INPUT || kind == OUTPUT) t->gradient = block_new(type, count);
        if (kind == INPUT) fill_normal(t->value, 16 * r->draw + r->taken);
        if (kind == OUTPUT) fill_normal(t->gradient, 16 * r->draw + r->taken);
        round_to(r->inputs, kind == INPUT ? t->value : kind == OUTPUT ? t->gradient : none);
    }
    if (kind == INPUT && r->backward) poison(t->gradient);
    if (kind != INPUT) poison(t->value);
    return *t;
}

/* Standard normal numbers divided by about sqrt(fan_in), by a power of two. */
static tensor weight(run *r, size_t count, size_t fan_in) {
    size_t known = r->tensors;
    tensor t = take(r, INPUT, r->type, count);
    for (size_t i = 0; r->taken > known && i < count; i++)
        set(t.value, i, ldexp(get(t.value, i), -ilogb((double)fan_in) / 2));
    return t;
}

static tensor input(run *r, size_t count) { return take(r, INPUT, r->type, count); }
static tensor output(run *r, size_t count) { return take(r, OUTPUT, r->type, count); }
static rt_block result(run *r, rt_type type, size_t count) { return take(r, RESULT, type, count).value; }
static rt_block scratch(run *r, rt_type type, size_t count) { return take(r, SCRATCH, type, count).value; }

static void run_open(run *r, const op_case *c, const bench *b, uint64_t draw) {
    *r = (run){
        .c = c, .device = b->device, .s = stream_of(b), .type = b->type, .inputs = b->type, .draw = draw};
}

static void run_once(run *r, int backward) {
    r->backward = backward;
    r->taken = 0;
    r->c->run(r);
}

static void run_close(run *r) {
    for (size_t i = 0; i < r->tensors; i++) { release(RT_BLOCKS(r->tensor[i].value, r->tensor[i].gradient)); }
}

/* "linear 13x1x48" */
static const char *case_text(const op_case *c, char text[96]) {
    int used = snprintf(text, 96, "%s", c->name);
    for (size_t i = 0; i < COUNT(c->n) && c->n[i]; i++)
        used += snprintf(text + used, 96 - (size_t)used, "%c%zu", i ? 'x' : ' ', c->n[i]);
    if (c->rate > 0) snprintf(text + used, 96 - (size_t)used, " rate %g", c->rate);
    return text;
}

/* rows, in, out */
static void linear_case(run *r) {
    size_t rows = r->c->n[0], in = r->c->n[1], out = r->c->n[2];
    tensor x = input(r, rows * in), w = input(r, out * in), b = input(r, out), y = output(r, rows * out);
    rt_block dw = result(r, r->type, out * in), db = result(r, r->type, out);
    r->device->linear_forward(r->s, y.value, none, x.value, w.value, b.value, rows, in, out, VIT_GELU_ERF);
    if (!r->backward) return;
    r->device->linear_backward(r->s, x.gradient, w.gradient, b.gradient, y.gradient, x.value, w.value, none,
                               rows, in, out, VIT_GELU_ERF);
    r->device->linear_backward(r->s, none, dw, db, y.gradient, x.value, w.value, none, rows, in, out,
                               VIT_GELU_ERF); /* as in the embedding: nobody wants dx */
}

/* rows, in, hidden, out, form of GELU: linear, gelu, linear. GELU goes with the first forward and the second
 * backward. */
static void mlp_case(run *r) {
    const vit_gelu form = (vit_gelu)r->c->n[4];
    size_t rows = r->c->n[0], in = r->c->n[1], hidden = r->c->n[2], out = r->c->n[3];
    tensor x = input(r, rows * in), w1 = weight(r, hidden * in, in), b1 = input(r, hidden);
    tensor w2 = input(r, out * hidden), b2 = input(r, out), y = output(r, rows * out);
    rt_block pre = result(r, r->type, rows * hidden), h = result(r, r->type, rows * hidden),
             dpre = scratch(r, r->type, rows * hidden);
    r->device->linear_forward(r->s, h, pre, x.value, w1.value, b1.value, rows, in, hidden, form);
    r->device->linear_forward(r->s, y.value, none, h, w2.value, b2.value, rows, hidden, out, form);
    if (!r->backward) return;
    r->device->linear_backward(r->s, dpre, w2.gradient, b2.gradient, y.gradient, h, w2.value, pre, rows,
                               hidden, out, form);
    r->device->linear_backward(r->s, x.gradient, w1.gradient, b1.gradient, dpre, x.value, w1.value, none,
                               rows, in, hidden, form);
}

/* B, T, dim, Q: 0 without a residual, else of the first Q of T rows, whose sum is then an output too. */
static void layernorm_case(run *r) {
    size_t B = r->c->n[0], T = r->c->n[1], dim = r->c->n[2], Q = r->c->n[3], rows = B * T;
    tensor x = input(r, rows * dim), gamma = input(r, dim), beta = input(r, dim), y = output(r, rows * dim);
    rt_block mean = result(r, statistic(r), rows), rstd = result(r, statistic(r), rows);
    tensor skip = Q ? output(r, B * Q * dim) : (tensor){0};
    for (size_t i = 0; i < skip.value.count; i++)
        set(skip.value, i, get(x.value, i / (Q * dim) * T * dim + i % (Q * dim)));
    r->device->layernorm_forward(r->s, y.value, mean, rstd, x.value, gamma.value, beta.value, rows, dim,
                                 1e-6);
    if (!r->backward) return;
    r->device->layernorm_backward(r->s, x.gradient, gamma.gradient, beta.gradient, skip.gradient, y.gradient,
                                  x.value, mean, rstd, gamma.value, B, T, Q, dim);
}

/* B, T, H, head_dim, T - Q. A rate: qkv are small multiples of it, whose products are large, yet exact in
 * fp32. */
static void attention_case(run *r) {
    size_t B = r->c->n[0], T = r->c->n[1], H = r->c->n[2], head_dim = r->c->n[3], D = H * head_dim;
    size_t Q = T - r->c->n[4];
    tensor qkv = input(r, B * T * 3 * D), out = output(r, B * Q * D);
    rt_block saved = scratch(r, statistic(r), r->device->attention_saved(B, T, Q, H, head_dim));
    for (size_t i = 0; r->c->rate > 0 && i < qkv.value.count; i++)
        set(qkv.value, i, r->c->rate * ((double)random_below(1, i, 5) - 2));
    r->device->attention_forward(r->s, out.value, saved, qkv.value, B, T, Q, H, head_dim);
    if (!r->backward) return;
    r->device->attention_backward(r->s, qkv.gradient, out.gradient, qkv.value, out.value, saved, B, T, Q, H,
                                  head_dim);
}

static rt_block sample_keys(run *r, size_t B) {
    rt_block keys = scratch(r, RT_U64, B);
    for (size_t b = 0; b < B; b++) ((uint64_t *)keys.data)[b] = random_key(3, RANDOM_DROP_PATH, b, 0);
    return keys;
}

/* B, count, elements between those of two images of x; drop-path of this rate. The sum goes where the branch
 * was, as in a block. */
static void residual_case(run *r) {
    size_t B = r->c->n[0], count = r->c->n[1], stride = count + r->c->n[2];
    tensor x = input(r, B * stride), branch = input(r, B * count), out = output(r, B * count);
    rt_block keys = r->c->rate > 0 ? sample_keys(r, B) : none;
    memcpy(out.value.data, branch.value.data, bytes_of(out.value));
    r->device->residual_forward(r->s, out.value, x.value, out.value, keys, B, count, stride, r->c->rate, 7);
    if (!r->backward) return;
    fill(x.gradient, 0);
    for (size_t i = 0; i < B * count; i++)
        set(x.gradient, i / count * stride + i % count, get(out.gradient, i));
    r->device->residual_backward(r->s, branch.gradient, out.gradient, keys, B, count, r->c->rate, 7);
}

/* B, Q, dim, rows between those of two images of x: out = x + k branch, y = LayerNorm of out; both are
 * outputs, as in a block. The sum goes where the branch was. */
static void residual_layernorm_case(run *r) {
    size_t B = r->c->n[0], Q = r->c->n[1], dim = r->c->n[2], count = Q * dim,
           stride = count + r->c->n[3] * dim;
    tensor x = input(r, B * stride), branch = input(r, B * count), gamma = input(r, dim),
           beta = input(r, dim);
    tensor out = output(r, B * count), y = output(r, B * count);
    rt_block mean = result(r, statistic(r), B * Q), rstd = result(r, statistic(r), B * Q);
    rt_block keys = r->c->rate > 0 ? sample_keys(r, B) : none;
    memcpy(out.value.data, branch.value.data, bytes_of(out.value));
    r->device->residual_layernorm_forward(r->s, y.value, mean, rstd, out.value, x.value, out.value, keys,
                                          gamma.value, beta.value, B, Q, stride, dim, 1e-6, r->c->rate, 7);
    if (!r->backward) return;
    rt_block dout = scratch(r, r->type, B * count);
    r->device->layernorm_backward(r->s, dout, gamma.gradient, beta.gradient, out.gradient, y.gradient,
                                  out.value, mean, rstd, gamma.value, B, Q, Q, dim);
    fill(x.gradient, 0);
    for (size_t i = 0; i < B * count; i++) set(x.gradient, i / count * stride + i % count, get(dout, i));
    r->device->residual_backward(r->s, branch.gradient, dout, keys, B, count, r->c->rate, 7);
}

/* B, N, D */
static void embedding_case(run *r) {
    size_t B = r->c->n[0], N = r->c->n[1], D = r->c->n[2];
    tensor x = input(r, B * N * D), cls = input(r, D), pos = input(r, (N + 1) * D),
           out = output(r, B * (N + 1) * D);
    r->device->embedding_forward(r->s, out.value, x.value, cls.value, pos.value, B, N, D);
    if (!r->backward) return;
    r->device->embedding_backward(r->s, x.gradient, cls.gradient, pos.gradient, out.gradient, B, N, D);
}

/* B, V; label smoothing. Backward has one scale for all samples: the functional is that times the sum. */
static void cross_entropy_case(run *r) {
    size_t B = r->c->n[0], V = r->c->n[1];
    double scale = 0.75;
    tensor logits = input(r, B * V), losses = take(r, OUTPUT, statistic(r), B);
    rt_block probabilities = result(r, statistic(r), B * V), labels = scratch(r, RT_I32, B);
    fill(losses.gradient, scale);
    for (size_t b = 0; b < B; b++) ((int32_t *)labels.data)[b] = (int32_t)(b * 7 % V);
    r->device->cross_entropy_forward(r->s, losses.value, probabilities, logits.value, labels, B, V,
                                     r->c->rate);
    if (!r->backward) return;
    r->device->cross_entropy_backward(r->s, logits.gradient, probabilities, labels, none, B, V, r->c->rate,
                                      scale);
}

/* B, C, height, width, P */
static void patchify_case(run *r) {
    const size_t *n = r->c->n;
    tensor images = take(r, INPUT, statistic(r), n[0] * n[1] * n[2] * n[3]);
    rt_block patches = result(r, r->type, n[0] * (n[2] / n[4]) * (n[3] / n[4]) * n[1] * n[4] * n[4]);
    r->device->patchify_forward(r->s, patches, images.value, n[0], n[1], n[2], n[3], n[4]);
    if (r->backward) fill(images.gradient, 0); /* pictures are not trained */
}

/* ----------------------------------------------------------------------------------- difference quotients */

/* The bar for |analytic - numeric| / max(|analytic|, |numeric|, floor). */
#define GRADIENT_BAR 1e-6

/* A function of numbers that lie somewhere in memory; adds up the magnitudes of the terms that it sums. */
typedef double (*functional)(void *argument, double *magnitude);

/* The gradient of f with respect to x [count] by central differences with steps h and h / 2, extrapolated so
 * that their errors of order h^2 cancel (Richardson); what remains is of order h^4, a relative 3e-10 here.
 * Returns the floor. f is a sum, rounded by a few DBL_EPSILON * magnitude: take 16. The quotient is off by
 * that / h, so that a gradient below that / h / GRADIENT_BAR cannot be measured to GRADIENT_BAR. */
static double numeric_gradient(functional f, void *argument, double *x, size_t count, double *gradient) {
    const double h = 0x1p-8;
    double magnitude = 0, ignored = 0;
    f(argument, &magnitude);
    for (size_t i = 0; i < count; i++) {
        double at = x[i], slope[2];
        for (int half = 0; half < 2; half++) {
            double step = half ? h / 2 : h;
            x[i] = at + step;
            double above = f(argument, &ignored);
            x[i] = at - step;
            slope[half] = (above - f(argument, &ignored)) / (2 * step);
        }
        x[i] = at;
        gradient[i] = (4 * slope[1] - slope[0]) / 3;
    }
    return 16 * DBL_EPSILON * magnitude / h / GRADIENT_BAR;
}

static double largest_error(const double *analytic, const double *numeric, size_t count, double floor) {
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        double size = fmax(fmax(fabs(analytic[i]), fabs(numeric[i])), floor);
        double error = fabs(analytic[i] - numeric[i]) / size;
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    return worst;
}

/* Largest error of `analytic`. To be sure that the comparison can fail, it is made again with the largest
 * element wrong by a factor of 1 + 1e-5: it must. */
static double gradient_error(functional f, void *argument, double *x, double *analytic, size_t count) {
    double *numeric = calloc(count, sizeof *numeric);
    double floor = numeric_gradient(f, argument, x, count, numeric);
    double worst = largest_error(analytic, numeric, count, floor);
    size_t largest = 0;
    for (size_t i = 0; i < count; i++)
        if (fabs(analytic[i]) > fabs(analytic[largest])) largest = i;
    double kept = analytic[largest];
    analytic[largest] *= 1 + 10 * GRADIENT_BAR;
    assert_true(largest_error(analytic, numeric, count, floor) > GRADIENT_BAR);
    analytic[largest] = kept;
    free(numeric);
    return worst;
}

static double case_functional(void *argument, double *magnitude) {
    run *r = argument;
    double sum = 0;
    run_once(r, 0);
    for (size_t k = 0; k < r->tensors; k++) {
        const tensor *t = &r->tensor[k];
        for (size_t i = 0; t->kind == OUTPUT && i < t->value.count; i++) {
            double term = get(t->value, i) * get(t->gradient, i);
            sum += term;
            *magnitude += fabs(term);
        }
    }
    return sum;
}

/* The largest error of the gradients of all inputs of a case. */
static double case_error(const op_case *c, const bench *b, const vit_device *device) {
    run r;
    double worst = 0;
    run_open(&r, c, b, 0);
    r.device = device;
    run_once(&r, 1);
    for (size_t k = 0; k < r.tensors; k++) {
        tensor *t = &r.tensor[k];
        if (t->kind != INPUT) continue;
        double error = gradient_error(case_functional, &r, t->value.data, t->gradient.data, t->value.count);
        if (worst < error) worst = error;
    }
    run_close(&r);
    return worst;
}

static void backward_of_every_operation_is_the_derivative_of_forward(void **state) {
    static const op_case cases[] = {
        {"linear", linear_case, 0, {5, 7, 3}},
        {"linear", linear_case, 0, {1, 1, 1}},
        {"linear, gelu, linear", mlp_case, 0, {4, 3, 6, 5, VIT_GELU_ERF}},
        {"linear, gelu, linear", mlp_case, 0, {4, 3, 6, 5, VIT_GELU_TANH}},
        {"layernorm", layernorm_case, 0, {1, 3, 7}},
        {"layernorm", layernorm_case, 0, {1, 3, 7, 3}},
        {"layernorm", layernorm_case, 0, {2, 3, 6, 1}},
        {"layernorm", layernorm_case, 0, {2, 3, 6, 2}},
        {"attention", attention_case, 0, {2, 5, 2, 3}},
        {"attention", attention_case, 0, {2, 5, 2, 3, 4}},
        {"attention", attention_case, 0, {2, 5, 2, 3, 2}},
        {"attention", attention_case, 0, {1, 7, 1, 24}},
        {"residual", residual_case, 0, {6, 5}},
        {"residual", residual_case, 0.3, {6, 5}},
        {"residual", residual_case, 0.3, {6, 5, 4}},
        {"residual, layernorm", residual_layernorm_case, 0.3, {6, 2, 5, 1}},
        {"embedding", embedding_case, 0, {3, 4, 5}},
        {"cross entropy", cross_entropy_case, 0, {4, 5}},
        {"cross entropy", cross_entropy_case, 0.1, {4, 5}},
    };
    char text[96];
    double worst = 0;
    for (size_t i = 0; i < COUNT(cases); i++) {
        double error = case_error(&cases[i], (bench *)*state + NAIVE_FP64, &naive_fp64);
        if (!(error <= GRADIENT_BAR)) fail_msg("%s: relative error %g", case_text(&cases[i], text), error);
        worst = fmax(worst, error);
    }
    print_message("             largest relative error %.1e\n", worst);
}

/* Backwards that lack one term each. */
static void no_gelu(rt_stream *s, rt_block dx, rt_block dw, rt_block db, rt_block dy, rt_block x, rt_block w,
                    rt_block pre, size_t rows, size_t in, size_t out, vit_gelu form) {
    (void)pre;
    naive_fp64.linear_backward(s, dx, dw, db, dy, x, w, none, rows, in, out, form);
}

static void other_gelu(rt_stream *s, rt_block dx, rt_block dw, rt_block db, rt_block dy, rt_block x,
                       rt_block w, rt_block pre, size_t rows, size_t in, size_t out, vit_gelu form) {
    form = form == VIT_GELU_ERF ? VIT_GELU_TANH : VIT_GELU_ERF;
    naive_fp64.linear_backward(s, dx, dw, db, dy, x, w, pre, rows, in, out, form);
}

static void no_residual(rt_stream *s, rt_block dx, rt_block dgamma, rt_block dbeta, rt_block residual,
                        rt_block dy, rt_block x, rt_block mean, rt_block rstd, rt_block gamma, size_t B,
                        size_t T, size_t Q, size_t dim) {
    (void)residual;
    naive_fp64.layernorm_backward(s, dx, dgamma, dbeta, none, dy, x, mean, rstd, gamma, B, T, Q, dim);
}

/* Without a scaled row's own direction: rstd taken for a constant. */
static void rstd_constant(rt_stream *s, rt_block dx, rt_block dgamma, rt_block dbeta, rt_block residual,
                          rt_block dy, rt_block x, rt_block mean, rt_block rstd, rt_block gamma, size_t B,
                          size_t T, size_t Q, size_t dim) {
    naive_fp64.layernorm_backward(s, dx, dgamma, dbeta, residual, dy, x, mean, rstd, gamma, B, T, Q, dim);
    for (size_t r = 0; r < B * T; r++) {
        double product = 0;
        for (size_t i = r * dim; i < (r + 1) * dim; i++)
            product += get(dy, i) * get(gamma, i % dim) * (get(x, i) - get(mean, r)) * get(rstd, r);
        for (size_t i = r * dim; i < (r + 1) * dim; i++) {
            double normal = (get(x, i) - get(mean, r)) * get(rstd, r);
            set(dx, i, get(dx, i) + normal * product / (double)dim * get(rstd, r));
        }
    }
}

static void no_softmax_mean(rt_stream *s, rt_block dqkv, rt_block dout, rt_block qkv, rt_block out,
                            rt_block saved, size_t B, size_t T, size_t Q, size_t H, size_t head_dim) {
    rt_block zero = block_new(RT_FP64, out.count);
    fill(zero, 0);
    naive_fp64.attention_backward(s, dqkv, dout, qkv, zero, saved, B, T, Q, H, head_dim);
    release(RT_BLOCKS(zero));
}

static void no_drop_path(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B, size_t count,
                         double rate, uint64_t salt) {
    (void)rate;
    naive_fp64.residual_backward(s, dbranch, dout, keys, B, count, 0, salt);
}

static void no_class_token(rt_stream *s, rt_block dx, rt_block dcls, rt_block dpos, rt_block dout, size_t B,
                           size_t N, size_t D) {
    naive_fp64.embedding_backward(s, dx, dcls, dpos, dout, B, N, D);
    fill(dcls, 0);
}

static void no_smoothing(rt_stream *s, rt_block dlogits, rt_block probabilities, rt_block labels,
                         rt_block scalars, size_t B, size_t V, double smoothing, double scale) {
    (void)smoothing;
    naive_fp64.cross_entropy_backward(s, dlogits, probabilities, labels, scalars, B, V, 0, scale);
}

static void a_backward_that_lacks_a_term_is_caught(void **state) {
    static const op_case mlp = {"mlp", mlp_case, 0, {4, 3, 6, 5}},
                         layernorm = {"", layernorm_case, 0, {1, 3, 7, 3}},
                         attention = {"", attention_case, 0, {2, 5, 2, 3}},
                         residual = {"", residual_case, 0.3, {6, 5}},
                         embedding = {"", embedding_case, 0, {3, 4, 5}},
                         loss = {"", cross_entropy_case, 0.1, {4, 5}};
    const bench *b = (bench *)*state + NAIVE_FP64;
    vit_device wrong[8];
    for (int i = 0; i < 8; i++) wrong[i] = naive_fp64;
    wrong[0].linear_backward = no_gelu;
    wrong[1].layernorm_backward = no_residual;
    wrong[2].layernorm_backward = rstd_constant;
    wrong[3].attention_backward = no_softmax_mean;
    wrong[4].residual_backward = no_drop_path;
    wrong[5].embedding_backward = no_class_token;
    wrong[6].cross_entropy_backward = no_smoothing;
    wrong[7].linear_backward = other_gelu;
    const op_case *cases[8] = {&mlp, &layernorm, &layernorm, &attention, &residual, &embedding, &loss, &mlp};
    for (int i = 0; i < 8; i++) assert_true(case_error(cases[i], b, &wrong[i]) > 1000 * GRADIENT_BAR);
}

/* ---------------------------------------------------------------------------------------- units and chain */

/* 2 x 3 patches, and pixels left over; heads of 3; the second block's branches dropped half of the time. */
enum { SMALL_BATCH = 3 };
static const vit_config small_config = {.name = "small",
                                        .image_height = 7,
                                        .image_width = 11,
                                        .channels = 2,
                                        .patch_size = 3,
                                        .embed_dim = 6,
                                        .depth = 2,
                                        .num_heads = 2,
                                        .num_classes = 5,
                                        .mlp_ratio = 2.5,
                                        .layer_norm_eps = 1e-6,
                                        .drop_path = 0.5,
                                        .label_smoothing = 0.1};

/* In double, with random weights of size 0.5: those of an untrained model would hide what they multiply. */
static void open_small_model(vit_replica *vit) {
    error_text e;
    if (vit_open(vit, &small_config, &naive_fp64, RT_FP64, SMALL_BATCH, &e)) fail_msg("%s", e.text);
    fill_normal(vit->parameters, 1);
    for (size_t i = 0; i < vit->parameters.count; i++) set(vit->parameters, i, 0.5 * get(vit->parameters, i));
    poison(vit->gradients);
    vit_activations *a = &vit->activations;
    fill_normal(a->batch.images, 2);
    for (size_t b = 0; b < SMALL_BATCH; b++) {
        ((int32_t *)a->batch.labels.data)[b] = (int32_t)b;
        ((uint64_t *)a->batch.sample_keys.data)[b] = random_key(0, RANDOM_DROP_PATH, b, 0);
    }
}

static rt_block unit_part(const vit_replica *vit, rt_block flat, size_t unit) {
    return rt_slice(flat, vit->offset[unit], vit->model.unit[unit].count);
}

typedef struct {
    vit_replica *vit;
    size_t unit;
    rt_block weights; /* of the functional; absent: the loss */
} unit_run;

enum { LOSS_SCALE = 8 };

static double unit_functional(void *argument, double *magnitude) {
    const unit_run *r = argument;
    vit_replica *vit = r->vit;
    vit_activations *a = &vit->activations;
    rt_block out = a->out[r->unit];
    double sum = 0;
    poison(out);
    vit_unit_forward(&vit->context, &vit->model.unit[r->unit], unit_part(vit, vit->parameters, r->unit),
                     r->unit ? a->out[r->unit - 1] : none, out, a->saved[r->unit]);
    for (size_t i = 0; r->weights.data && i < out.count; i++) {
        sum += get(out, i) * get(r->weights, i);
        *magnitude += fabs(get(out, i) * get(r->weights, i));
    }
    for (size_t b = 0; !r->weights.data && b < SMALL_BATCH; b++) {
        double term = (vit->context.scalars.data ? LOSS_SCALE : 1) * get(a->losses, b) / SMALL_BATCH;
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}

/* The largest error of the gradients of a unit's parameters. Padding must have been left alone. */
static double parameters_error(vit_replica *vit, size_t unit, functional f, void *argument) {
    const vit_unit *u = &vit->model.unit[unit];
    double worst = 0, *values = unit_part(vit, vit->parameters, unit).data;
    double *gradients = unit_part(vit, vit->gradients, unit).data;
    size_t end = 0;
    for (size_t k = 0; k < u->tensors; k++) {
        const vit_tensor *t = &u->tensor[k];
        for (; end < t->offset; end++) assert_true(isnan(gradients[end]));
        end = t->offset + t->count;
        double error = gradient_error(f, argument, values + t->offset, gradients + t->offset, t->count);
        if (!(error <= GRADIENT_BAR)) fail_msg("%s, %s: relative error %g", u->name, t->name, error);
        worst = fmax(worst, error);
    }
    for (; end < u->count; end++) assert_true(isnan(gradients[end]));
    return worst;
}

static void backward_of_every_unit_is_the_derivative_of_forward(void **state) {
    (void)state;
    vit_replica vit;
    double worst = 0;
    rt_block scalars = block_new(RT_FP64, VIT_SCALARS);
    set(scalars, VIT_LOSS_SCALE, LOSS_SCALE);
    open_small_model(&vit);
    for (int training = 0; training < 2; training++) {
        for (size_t unit = 0; unit < vit.model.units; unit++) {
            vit_activations *a = &vit.activations;
            rt_block in = unit ? a->out[unit - 1] : none, dout = a->gradient[0], din = a->gradient[1];
            int head = unit + 1 == vit.model.units;
            unit_run r = {&vit, unit, head ? none : dout};
            double ignored;
            vit.context.training = training;
            vit.context.scalars = head ? scalars : none;
            if (unit) fill_normal(in, 10 + unit);
            fill_normal(dout, 20 + unit);
            poison(unit_part(&vit, vit.gradients, unit));
            poison(din);
            poison(a->workspace);
            unit_functional(&r, &ignored);
            vit_unit_backward(&vit.context, &vit.model.unit[unit], unit_part(&vit, vit.parameters, unit),
                              unit_part(&vit, vit.gradients, unit), in, a->saved[unit], dout, din);
            worst = fmax(worst, parameters_error(&vit, unit, unit_functional, &r));
            if (unit == 0) continue;
            double error = gradient_error(unit_functional, &r, in.data, din.data, in.count);
            if (!(error <= GRADIENT_BAR)) fail_msg("input of %s: error %g", vit.model.unit[unit].name, error);
            worst = fmax(worst, error);
        }
    }
    assert_false(rt_failed(vit.context.rank));
    vit_close(&vit);
    release(RT_BLOCKS(scalars));
    print_message("             largest relative error %.1e\n", worst);
}

typedef struct {
    vit_replica vit;
    double images[SMALL_BATCH * 2 * 7 * 11];
    int32_t labels[SMALL_BATCH];
} chain;

static double chain_functional(void *argument, double *magnitude) {
    chain *c = argument;
    double loss = vit_forward(&c->vit, c->images, c->labels);
    *magnitude += fabs(loss);
    return loss;
}

static void gradients_of_the_whole_chain_are_those_of_the_loss(void **state) {
    (void)state;
    chain c;
    open_small_model(&c.vit);
    memcpy(c.images, c.vit.activations.batch.images.data, sizeof c.images);
    memcpy(c.labels, c.vit.activations.batch.labels.data, sizeof c.labels);
    c.vit.context.training = 0;
    double whole = vit_forward(&c.vit, c.images, c.labels), worst = 0;
    c.vit.context.training = 1;
    double dropped = vit_forward(&c.vit, c.images, c.labels);
    assert_true(fabs(dropped - whole) > 1e-3); /* drop-path did drop something */
    vit_backward(&c.vit);
    for (size_t unit = 0; unit < c.vit.model.units; unit++)
        worst = fmax(worst, parameters_error(&c.vit, unit, chain_functional, &c));
    assert_false(rt_failed(c.vit.context.rank));
    vit_close(&c.vit);
    print_message("             largest relative error %.1e\n", worst);
}

/* -------------------------------------------------------------------------- devices against the naive one */

/* What a tensor of a case has to compare: forward's values or backward's gradients; nothing for scratch. */
static rt_block compared(const tensor *t) {
    return t->kind == SCRATCH ? none : t->kind == INPUT ? t->gradient : t->value;
}

static double squared_distance(rt_block a, rt_block b) {
    double sum = 0;
    for (size_t i = 0; i < b.count; i++) sum += (get(a, i) - get(b, i)) * (get(a, i) - get(b, i));
    return sum;
}

static double squared_size(rt_block a) {
    double sum = 0;
    for (size_t i = 0; i < a.count; i++) sum += get(a, i) * get(a, i);
    return sum;
}

/* How far a device may be from the naive one in double, as NMSE = squared distance / squared size: 10 times
 * as far as the naive one in fp32, plus 1e-14, two roundings of every value. */
static double nmse_bar(double naive) { return 10 * naive + 1e-14; }

typedef struct {
    size_t comparisons;
    double worst, worst_of_bar; /* largest NMSE, and the largest part of its bar that any took */
    char failure[512];          /* the first one */
} comparison;

__attribute__((format(printf, 3, 4))) static void differs(comparison *result, const op_case *c,
                                                          const char *format, ...) {
    if (result->failure[0]) return;
    va_list arguments;
    va_start(arguments, format);
    char text[96], what[256];
    vsnprintf(what, sizeof what, format, arguments);
    snprintf(result->failure, sizeof result->failure, "%s, %s", case_text(c, text), what);
    va_end(arguments);
}

/* Compares all devices on one case. The NMSE of a few numbers is a gamble, as they may be small by
 * cancellation: the case is drawn again until every tensor has shown 32 numbers. With its own product vit_cpu
 * must give the same bits on any number of threads. */
static void compare_devices(const bench *benches, const op_case *c, comparison *result) {
    double distance[BENCHES][MOST_TENSORS] = {{0}}, size[MOST_TENSORS] = {0};
    size_t fewest = SIZE_MAX, numbers[MOST_TENSORS] = {0};
    for (uint64_t draw = 0; draw == 0 || draw * fewest < 32; draw++) {
        run r[BENCHES];
        for (int k = 0; k < BENCHES; k++) {
            if (!benches[k].device) continue;
            run_open(&r[k], c, &benches[k], draw);
            run_once(&r[k], 1);
            for (size_t i = 0; i < r[k].tensors; i++) {
                rt_block got = compared(&r[k].tensor[i]), expected = compared(&r[NAIVE_FP64].tensor[i]);
                if (!got.data) continue;
                if (fewest > got.count) fewest = got.count;
                numbers[i] = got.count;
                distance[k][i] += squared_distance(got, expected);
                if (k == NAIVE_FP64) size[i] += squared_size(got);
                if (k != OWN_2 && k != OWN_3) continue;
                if (memcmp(got.data, compared(&r[OWN_1].tensor[i]).data, bytes_of(got)))
                    differs(result, c, "tensor %zu: %s has other bits than one thread", i, benches[k].name);
            }
        }
        for (int k = 0; k < BENCHES; k++)
            if (benches[k].device) run_close(&r[k]);
    }
    for (int k = OWN_1; k < BENCHES; k++)
        for (size_t i = 0; i < MOST_TENSORS; i++) {
            if (!benches[k].device || !numbers[i]) continue;
            double nmse = distance[k][i] / fmax(size[i], DBL_MIN);
            double bar = nmse_bar(distance[NAIVE_FP32][i] / fmax(size[i], DBL_MIN));
            if (k == CUDA) bar = 1e-10;       /* sums in another order, and scores computed twice */
            if (!(nmse <= bar && bar < 1e-9)) /* a higher one would be none */
                differs(result, c, "tensor %zu: %s has NMSE %g, allowed %g", i, benches[k].name, nmse, bar);
            result->comparisons++;
            result->worst = fmax(result->worst, nmse);
            result->worst_of_bar = fmax(result->worst_of_bar, nmse / bar);
        }
}

static void assert_equal_devices(const comparison *c) {
    if (c->failure[0]) fail_msg("%s", c->failure);
    print_message("             %zu comparisons, largest NMSE %.1e, at most %.0f %% of its bar\n",
                  c->comparisons, c->worst, 100 * c->worst_of_bar);
}

static void wrong_by_1e5(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B, size_t count,
                         double rate, uint64_t salt) {
    naive_fp32.residual_backward(s, dbranch, dout, keys, B, count, rate, salt);
    set(dbranch, count / 2, get(dbranch, count / 2) + 1e-5);
}

static void wrong_by_a_bit(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B,
                           size_t count, double rate, uint64_t salt) {
    naive_fp32.residual_backward(s, dbranch, dout, keys, B, count, rate, salt);
    ((uint32_t *)dbranch.data)[count / 2] ^= 1;
}

static void the_comparison_of_devices_can_fail(void **state) {
    static const op_case c = {"residual", residual_case, 0.3, {4, 16}};
    vit_device wrong = naive_fp32;
    bench some[BENCHES];
    memcpy(some, *state, sizeof some);
    wrong.residual_backward = wrong_by_1e5;
    for (int k = OWN_1; k <= OWN_3; k++) some[k].device = &wrong;
    comparison inexact = {0}, not_the_same = {0};
    compare_devices(some, &c, &inexact);
    assert_non_null(strstr(inexact.failure, "NMSE"));
    memcpy(some, *state, sizeof some);
    wrong.residual_backward = wrong_by_a_bit;
    some[OWN_3].device = &wrong;
    compare_devices(some, &c, &not_the_same);
    assert_non_null(strstr(not_the_same.failure, "other bits"));
}

static void linear_agrees_with_the_naive_device(void **state) {
    static const size_t sizes[] = {1, 2, 13, 14, 15, 31, 32, 33, 47, 48, 49}, n = COUNT(sizes);
    static const size_t more[][3] = {{197, 192, 576}, {394, 64, 256}, {394, 256, 64}, {101, 103, 107},
                                     {1, 768, 10},    {64, 1, 300},   {8, 1000, 96},  {300, 27, 5},
                                     {2, 1000, 500},  {30, 2000, 40}, {1000, 3, 300}};
    comparison result = {0};
    for (size_t i = 0; i < n * n * n; i++) {
        size_t rows = sizes[i / n / n], in = sizes[i / n % n], out = sizes[i % n];
        if ((i / n / n + i / n + i) % 3) continue; /* a third of them, every pair of sizes among them */
        compare_devices(*state, &(op_case){"linear", linear_case, 0, {rows, in, out}}, &result);
    }
    for (size_t i = 0; i < COUNT(more); i++)
        compare_devices(*state, &(op_case){"linear", linear_case, 0, {more[i][0], more[i][1], more[i][2]}},
                        &result);
    assert_equal_devices(&result);
}

static void linear_with_gelu_agrees_with_the_naive_device(void **state) {
    static const size_t sizes[] = {1, 14, 17, 32, 49}, n = COUNT(sizes);
    comparison result = {0};
    for (size_t i = 0; i < n * n * n; i++) {
        size_t rows = sizes[i / n / n], in = sizes[i / n % n], hidden = sizes[i % n];
        for (size_t form = VIT_GELU_ERF; form <= VIT_GELU_TANH; form++)
            compare_devices(*state, &(op_case){"mlp", mlp_case, 0, {rows, in, hidden, in, form}}, &result);
    }
    for (size_t form = VIT_GELU_ERF; form <= VIT_GELU_TANH; form++)
        compare_devices(*state, &(op_case){"mlp", mlp_case, 0, {394, 64, 256, 64, form}}, &result);
    assert_equal_devices(&result);
}

/* From 3 numbers a row: where normalisation leaves 1 or 2 no freedom, dx is 0 but for rounding. */
static void layernorm_agrees_with_the_naive_device(void **state) {
    static const size_t rows[] = {1, 13, 65, 300}, dims[] = {3, 8, 15, 16, 17, 33, 64, 192};
    comparison result = {0};
    for (size_t i = 0; i < COUNT(rows); i++)
        for (size_t k = 0; k < COUNT(dims); k++) {
            const size_t cases[][4] = {{1, rows[i], dims[k]},
                                       {1, rows[i], dims[k], rows[i]},
                                       {3, rows[i], dims[k], 1},
                                       {2, rows[i], dims[k], (rows[i] + 1) / 2}};
            for (size_t j = 0; j < COUNT(cases); j++) {
                op_case c = {"layernorm", layernorm_case, 0, {0}};
                memcpy(c.n, cases[j], sizeof cases[j]);
                compare_devices(*state, &c, &result);
            }
        }
    assert_equal_devices(&result);
}

static void attention_agrees_with_the_naive_device(void **state) {
    static const size_t tokens[] = {1, 2, 17, 65}, head_dims[] = {1, 3, 16, 21, 24, 64, 80};
    comparison result = {0};
    for (size_t i = 0; i < COUNT(tokens); i++)
        for (size_t k = 0; k < COUNT(head_dims); k++) {
            compare_devices(
                *state, &(op_case){"attention", attention_case, 0, {1, tokens[i], 1, head_dims[k]}}, &result);
            compare_devices(
                *state, &(op_case){"attention", attention_case, 0, {2, tokens[i], 3, head_dims[k]}}, &result);
            for (size_t left = 1; left < tokens[i]; left += (tokens[i] - 1) / 2 + 1) {
                op_case c = {"attention", attention_case, 0, {2, tokens[i], 2, head_dims[k], left}};
                compare_devices(*state, &c, &result);
            }
            op_case one = {"attention", attention_case, 0, {2, tokens[i], 3, head_dims[k], tokens[i] - 1}};
            compare_devices(*state, &one, &result);
        }
    compare_devices(*state, &(op_case){"attention", attention_case, 0, {1, 197, 3, 64}}, &result);
    compare_devices(*state, &(op_case){"attention", attention_case, 0, {1, 257, 1, 80}}, &result);
    assert_equal_devices(&result);
}

static void other_operations_agree_with_the_naive_device(void **state) {
    static const op_case cases[] = {
        {"residual", residual_case, 0, {1, 1}},
        {"residual", residual_case, 0, {3, 33}},
        {"residual", residual_case, 0.3, {3, 33}},
        {"residual", residual_case, 0.3, {64, 8009}},
        {"residual", residual_case, 0, {8, 192, 9001}},
        {"residual, layernorm", residual_layernorm_case, 0, {1, 1, 8}},
        {"residual, layernorm", residual_layernorm_case, 0.3, {5, 3, 33, 2}},
        {"residual, layernorm", residual_layernorm_case, 0.3, {8, 17, 192}},
        {"residual, layernorm", residual_layernorm_case, 0, {3, 1, 5003, 4}},
        {"embedding", embedding_case, 0, {1, 1, 1}},
        {"embedding", embedding_case, 0, {3, 4, 17}},
        {"embedding", embedding_case, 0, {9, 196, 192}},
        {"cross entropy", cross_entropy_case, 0, {1, 1}},
        {"cross entropy", cross_entropy_case, 0, {1, 2}},
        {"cross entropy", cross_entropy_case, 0, {17, 10}},
        {"cross entropy", cross_entropy_case, 0.1, {17, 10}},
        {"cross entropy", cross_entropy_case, 0, {33, 1000}},
        {"cross entropy", cross_entropy_case, 0.1, {130, 1000}},
        {"patchify", patchify_case, 0, {1, 1, 1, 1, 1}},
        {"patchify", patchify_case, 0, {2, 3, 11, 14, 4}},
        {"patchify", patchify_case, 0, {8, 3, 130, 128, 16}},
    };
    comparison result = {0};
    for (size_t i = 0; i < COUNT(cases); i++) compare_devices(*state, &cases[i], &result);
    assert_equal_devices(&result);
}

/* vit_cpu and vit_cuda in 16 bits against double, on inputs that 16 bits can hold; and on 3 threads: the
 * same bits. Of a bf16 a rounding alone is an NMSE of about 1e-6, of an fp16 64 times less. */
static void compare_16_bits(const bench *benches, const op_case *c, comparison *result) {
    static const struct {
        rt_type type;
        double bar;
    } types[] = {{RT_BF16, 1e-5}, {RT_FP16, 2e-7}};
    for (size_t t = 0; t < COUNT(types); t++) {
        run r[4];
        const int bench_of[] = {NAIVE_FP64, OWN_1, OWN_3, CUDA}, runs = benches[CUDA].device ? 4 : 3;
        for (int k = 0; k < runs; k++) {
            run_open(&r[k], c, &benches[bench_of[k]], 0);
            r[k].inputs = types[t].type;
            if (k) r[k].type = types[t].type;
            run_once(&r[k], 1);
        }
        for (size_t i = 0; i < r[0].tensors; i++) {
            rt_block expected = compared(&r[0].tensor[i]), got = compared(&r[1].tensor[i]);
            if (!got.data) continue;
            double nmse = squared_distance(got, expected) / fmax(squared_size(expected), DBL_MIN);
            if (!(nmse <= types[t].bar))
                differs(result, c, "tensor %zu: type %d has NMSE %g, allowed %g", i, types[t].type, nmse,
                        types[t].bar);
            double cuda = runs < 4 ? 0
                                   : squared_distance(compared(&r[3].tensor[i]), expected) /
                                         fmax(squared_size(expected), DBL_MIN);
            if (!(cuda <= types[t].bar))
                differs(result, c, "tensor %zu: type %d has NMSE %g on the GPU, allowed %g", i, types[t].type,
                        cuda, types[t].bar);
            if (memcmp(got.data, compared(&r[2].tensor[i]).data, bytes_of(got)))
                differs(result, c, "tensor %zu: type %d has other bits on 3 threads", i, types[t].type);
            result->comparisons++;
            result->worst = fmax(result->worst, nmse);
            result->worst_of_bar = fmax(result->worst_of_bar, nmse / types[t].bar);
        }
        for (int k = 0; k < runs; k++) run_close(&r[k]);
    }
}

static void sixteen_bits_agree_with_double(void **state) {
    static const op_case cases[] = {
        {"linear", linear_case, 0, {13, 48, 31}},
        {"linear", linear_case, 0, {197, 192, 576}},
        {"linear", linear_case, 0, {101, 103, 107}},
        {"linear", linear_case, 0, {64, 1, 300}},
        {"linear", linear_case, 0, {30, 2500, 40}},
        {"linear", linear_case, 0, {2500, 33, 300}},
        {"mlp", mlp_case, 0, {394, 64, 256, 64, VIT_GELU_ERF}},
        {"mlp", mlp_case, 0, {394, 64, 256, 64, VIT_GELU_TANH}},
        {"mlp", mlp_case, 0, {50, 49, 301, 33, VIT_GELU_ERF}},
        {"mlp", mlp_case, 0, {50, 49, 301, 33, VIT_GELU_TANH}},
        {"layernorm", layernorm_case, 0, {1, 65, 192}},
        {"layernorm", layernorm_case, 0, {3, 65, 33, 1}},
        {"layernorm", layernorm_case, 0, {2, 300, 64, 300}},
        {"attention", attention_case, 0, {2, 65, 3, 64}},
        {"attention", attention_case, 0, {2, 17, 3, 21, 5}},
        {"attention", attention_case, 0, {2, 65, 2, 24, 64}},
        {"attention", attention_case, 0, {1, 197, 1, 80}},
        {"residual", residual_case, 0.3, {8, 8009}},
        {"residual", residual_case, 0, {8, 192, 9001}},
        {"residual, layernorm", residual_layernorm_case, 0.3, {5, 3, 33, 2}},
        {"residual, layernorm", residual_layernorm_case, 0, {8, 17, 192}},
        {"residual, layernorm", residual_layernorm_case, 0, {3, 1, 5003, 4}},
        {"embedding", embedding_case, 0, {9, 196, 192}},
        {"embedding", embedding_case, 0, {5, 4, 17}},
        {"cross entropy", cross_entropy_case, 0, {33, 100}},
        {"cross entropy", cross_entropy_case, 0.1, {130, 1000}},
        {"patchify", patchify_case, 0, {2, 3, 11, 14, 4}},
    };
    comparison result = {0};
    for (size_t i = 0; i < COUNT(cases); i++) compare_16_bits(*state, &cases[i], &result);
    assert_equal_devices(&result);
}

/* Casts between all pairs, x += y and sums over ranks of mixed and of 16-bit types: one rounding each. */
static void casts_and_sums_round_once(void **state) {
    enum { N = 10007 };
    static const rt_type types[] = {RT_FP32, RT_BF16, RT_FP16};
    FOR_EACH_DEVICE(b, state) {
        if (b < (const bench *)*state + OWN_1) continue; /* the naive ones have one type */
        for (size_t i = 0; i < 9; i++) {
            rt_type to = types[i / 3], from = types[i % 3];
            rt_block x = block_new(from, N), y = block_new(to, N), z = block_new(to, N);
            rt_block sum = block_new(to, N),
                     terms[3] = {block_new(to, N), block_new(to, N), block_new(to, N)};
            fill_normal(x, 1);
            b->device->cast(stream_of(b), y, x);
            for (size_t k = 0; k < N; k++) set(z, k, get(x, k));
            assert_same_bits(y, z);
            b->device->add(stream_of(b), y, x);
            for (size_t k = 0; k < N; k++) set(z, k, (double)((float)get(z, k) + (float)get(x, k)));
            assert_same_bits(y, z);
            for (uint64_t k = 0; k < 3; k++) fill_normal(terms[k], 2 + k);
            b->device->sum_buffers(stream_of(b), &sum, 1, terms, 3);
            for (size_t k = 0; k < N; k++)
                set(z, k,
                    (double)((float)get(terms[0], k) + (float)get(terms[1], k) + (float)get(terms[2], k)));
            assert_same_bits(sum, z);
            release(RT_BLOCKS(x, y, z, sum, terms[0], terms[1], terms[2]));
        }
    }
}

/* ----------------------------------------------------------------------------------------- extreme values */

/* gelu and gelu' of x through the linear operations: one column, weight 1, bias 0. */
static void gelu_of(const bench *b, vit_gelu form, rt_block y, rt_block dx, rt_block x) {
    rt_block one = block_of(b->type, (double[]){1}, 1), zero = block_of(b->type, (double[]){0}, 1);
    rt_block pre = block_new(b->type, x.count), dy = block_new(b->type, x.count), dw = block_new(b->type, 1);
    rt_block db = block_new(b->type, 1);
    fill(dy, 1);
    b->device->linear_forward(stream_of(b), y, pre, x, one, zero, x.count, 1, 1, form);
    b->device->linear_backward(stream_of(b), dx, dw, db, dy, y, one, pre, x.count, 1, 1, form);
    release(RT_BLOCKS(one, zero, pre, dy, dw, db));
}

/* The definitions, in long double. */
static long double exact_gelu(vit_gelu form, long double x, long double *derivative) {
    const long double pi = 3.14159265358979323846264338327950288L;
    if (form == VIT_GELU_TANH) {
        long double t = tanhl(sqrtl(2 / pi) * (x + 0.044715L * x * x * x));
        *derivative = (1 + t) / 2 + x / 2 * (1 - t * t) * sqrtl(2 / pi) * (1 + 3 * 0.044715L * x * x);
        return x / 2 * (1 + t);
    }
    long double normal = erfcl(-x / sqrtl(2)) / 2;
    *derivative = normal + x * expl(-x * x / 2) / sqrtl(2 * pi);
    return x * normal;
}

/* Within two and four epsilon. By tanh, too: with u off by some 1.5 epsilon u, 1 / (1 + exp(-u)) is off by at
 * most 0.34 of one beside its own roundings, and x u' / (1 + exp(u)) / (1 + exp(-u)) by less than 2. */
static void gelu_is_exact_everywhere(void **state, vit_gelu form) {
    enum { GRID = 24001 };
    static const double extreme[] = {0,   -0.0, 1e-30, -1e-30, 1e-38, -1e-38, 5,    -5,   10,
                                     -10, 13.5, -13.5, 40,     -40,   1e4,    -1e4, 3e38, -3e38};
    double worst_value = 0, worst_derivative = 0;
    FOR_EACH_DEVICE(b, state) {
        rt_block x = block_new(b->type, GRID + COUNT(extreme) + 1);
        rt_block y = block_new(b->type, x.count), dx = block_new(b->type, x.count);
        double unit = b->type == RT_FP64 ? DBL_EPSILON : FLT_EPSILON;
        for (size_t i = 0; i < GRID; i++) set(x, i, ((double)i - GRID / 2) * 1e-3);
        for (size_t i = 0; i < COUNT(extreme); i++) set(x, GRID + i, extreme[i]);
        set(x, x.count - 1, NAN);
        gelu_of(b, form, y, dx, x);
        for (size_t i = 0; i + 1 < x.count; i++) {
            long double at = get(x, i), slope, exact = exact_gelu(form, at, &slope);
            double value = fabs((double)(get(y, i) - exact)) / fmax(1, fabs((double)at)) / unit;
            double derivative = fabs((double)(get(dx, i) - slope)) / unit;
            if (!(value <= 2 && derivative <= 4))
                fail_msg("%s: at %g gelu is %.9g and gelu' %.9g, off by %g and %g epsilon", b->name,
                         (double)at, get(y, i), get(dx, i), value, derivative);
            worst_value = fmax(worst_value, value);
            worst_derivative = fmax(worst_derivative, derivative);
        }
        assert_true(isnan(get(y, x.count - 1)) && isnan(get(dx, x.count - 1))); /* NaN is not swallowed */
        release(RT_BLOCKS(x, y, dx));
    }
    print_message("             off by at most %.2f and %.2f epsilon\n", worst_value, worst_derivative);
}

static void gelu_and_its_derivative_are_exact_everywhere(void **state) {
    gelu_is_exact_everywhere(state, VIT_GELU_ERF);
}

static void gelu_by_tanh_and_its_derivative_are_exact_everywhere(void **state) {
    gelu_is_exact_everywhere(state, VIT_GELU_TANH);
}

/* Scores of up to +-64,000 among which softmax chooses the largest, with ties. */
static void attention_survives_large_scores(void **state) {
    comparison result = {0};
    compare_devices(*state, &(op_case){"attention", attention_case, 64, {1, 9, 1, 4}}, &result);
    compare_devices(*state, &(op_case){"attention", attention_case, 64, {2, 65, 2, 16}}, &result);
    assert_equal_devices(&result);
}

static void cross_entropy_survives_large_logits_and_vanishing_probabilities(void **state) {
    enum { V = 4 };
    static const struct {
        double logits[V], smoothing, loss, gradient[V]; /* of label 1, scale 1 */
    } cases[] = {
        {{1e4, -1e4, 0, 0}, 0, 2e4, {1, -1, 0, 0}}, /* the probability is 0, the loss is not infinite */
        {{1e4, -1e4, 0, 0}, 0.5, 0.625 * 2e4 + 0.25 * 1e4, {0.875, -0.625, -0.125, -0.125}},
        {{-1e4, 1e4, 0, 0}, 0, 0, {0, 0, 0, 0}},
        {{1e38, 1e38, -1e38, 0}, 0, 0.69314718055994531, {0.5, -0.5, 0, 0}},
        {{-3e37, -3e37, -3e37, -3e37}, 0, 1.3862943611198906, {0.25, -0.75, 0.25, 0.25}},
        {{200, 0, 0, 0}, 0, 200, {1, -1, 0, 0}},
    };
    FOR_EACH_DEVICE(b, state) {
        int32_t label = 1;
        rt_block labels = {.data = &label, .type = RT_I32, .count = 1};
        rt_block loss = block_new(b->type, 1), p = block_new(b->type, V), d = block_new(b->type, V);
        for (size_t k = 0; k < COUNT(cases); k++) {
            rt_block logits = block_of(b->type, cases[k].logits, V);
            b->device->cross_entropy_forward(stream_of(b), loss, p, logits, labels, 1, V, cases[k].smoothing);
            b->device->cross_entropy_backward(stream_of(b), d, p, labels, none, 1, V, cases[k].smoothing, 1);
            if (!(fabs(get(loss, 0) - cases[k].loss) <= 1e-6 * fmax(1, cases[k].loss)))
                fail_msg("%s, case %zu: loss %.9g, expected %.9g", b->name, k, get(loss, 0), cases[k].loss);
            for (size_t v = 0; v < V; v++) assert_true(fabs(get(d, v) - cases[k].gradient[v]) <= 1e-6);
            release(RT_BLOCKS(logits));
        }
        rt_block lost = block_of(b->type, (double[]){0, NAN, 1, 2}, V);
        b->device->cross_entropy_forward(stream_of(b), loss, p, lost, labels, 1, V, 0);
        assert_true(isnan(get(loss, 0)));
        release(RT_BLOCKS(loss, p, d, lost));
    }
}

/* --------------------------------------------------------------------------------------------- optimizers */

/* The updates of torch.optim.AdamW and SGD, of one number in double. */
typedef struct {
    double param, exp_avg, exp_avg_sq, momentum;
} optimizer_state;

static void adamw_reference(optimizer_state *s, double grad, double lr, double weight_decay,
                            const vit_adamw_options *o, int step) {
    s->param *= 1 - lr * weight_decay;
    s->exp_avg += (1 - o->beta1) * (grad - s->exp_avg);
    s->exp_avg_sq = s->exp_avg_sq * o->beta2 + (1 - o->beta2) * grad * grad;
    double step_size = lr / (1 - pow(o->beta1, step)), bias_correction2 = 1 - pow(o->beta2, step);
    double denominator = sqrt(s->exp_avg_sq) / sqrt(bias_correction2) + o->eps;
    s->param -= step_size * s->exp_avg / denominator;
}

static void sgd_reference(optimizer_state *s, double grad, double lr, double weight_decay,
                          const vit_sgd_options *o, int step) {
    grad += weight_decay * s->param;
    s->momentum = step == 1 ? grad : o->momentum * s->momentum + grad;
    s->param -= lr * s->momentum;
}

static const vit_adamw_options adamw_options = {
    .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1};
static const vit_sgd_options sgd_options = {.momentum = 0.9, .weight_decay = 0.1};

/* A flat run of parameters with all that the optimizers keep. */
typedef struct {
    rt_block param, state[2], grad, scalars;
} flat;

static flat flat_new(rt_type type, size_t count) {
    flat f = {block_new(type, count),
              {block_new(type, count), block_new(type, count)},
              block_new(type, count),
              block_new(RT_FP64, VIT_SCALARS)};
    fill_normal(f.param, 1);
    fill(f.state[0], 0);
    fill(f.state[1], 0);
    return f;
}

static void flat_free(flat *f) {
    release(RT_BLOCKS(f->param, f->state[0], f->state[1], f->grad, f->scalars));
}

/* Gradients of many sizes: at 1e-8 it matters where eps stands. */
static void next_gradient(flat *f, int step) {
    fill_normal(f->grad, 100 + (uint64_t)step);
    for (size_t i = 0; i < f->grad.count; i++) set(f->grad, i, get(f->grad, i) * pow(10, -(double)(i % 9)));
    set(f->scalars, VIT_LEARNING_RATE, 0.02 * step); /* half of which the calls ask for */
    set(f->scalars, VIT_BIAS_CORRECTION1, 1 - pow(adamw_options.beta1, step));
    set(f->scalars, VIT_BIAS_CORRECTION2, 1 - pow(adamw_options.beta2, step));
    set(f->scalars, VIT_GRADIENT_FACTOR, 0.25);
}

/* Elements [begin, end) of the run, of which [0, decayed) decay. */
static void update(const bench *b, const flat *f, int adamw, size_t begin, size_t end, size_t decayed) {
    size_t n = end - begin, decays = decayed < begin ? 0 : decayed - begin < n ? decayed - begin : n;
    rt_block param = rt_slice(f->param, begin, n), grad = rt_slice(f->grad, begin, n);
    rt_block state0 = rt_slice(f->state[0], begin, n), state1 = rt_slice(f->state[1], begin, n);
    if (adamw)
        b->device->adamw(stream_of(b), param, none, state0, state1, grad, f->scalars, decays, 0.5,
                         &adamw_options);
    else
        b->device->sgd(stream_of(b), param, none, state0, grad, f->scalars, decays, 0.5, &sgd_options);
}

/* With 16-bit parameters the master goes the way that fp32 parameters go, and the parameters are it,
 * rounded. */
static void optimizers_update_the_master(void **state) {
    enum { N = 16 * 300 + 5 };
    const bench *b = (bench *)*state + OWN_2;
    for (int adamw = 0; adamw < 2; adamw++)
        for (int narrow = 0; narrow < 2; narrow++) { /* the gradient too */
            flat f = flat_new(RT_FP32, N);
            rt_block param = block_new(RT_BF16, N), grad = block_new(narrow ? RT_BF16 : RT_FP32, N);
            rt_block master = block_new(RT_FP32, N), rounded = block_new(RT_BF16, N);
            rt_block m = block_new(RT_FP32, N), v = block_new(RT_FP32, N);
            fill_normal(master, 1);
            fill(m, 0);
            fill(v, 0);
            for (int step = 1; step <= 3; step++) {
                next_gradient(&f, step);
                round_to(grad.type, f.grad);
                for (size_t i = 0; i < N; i++) set(grad, i, get(f.grad, i));
                update(b, &f, adamw, 0, N, 1600);
                if (adamw)
                    b->device->adamw(stream_of(b), param, master, m, v, grad, f.scalars, 1600, 0.5,
                                     &adamw_options);
                else
                    b->device->sgd(stream_of(b), param, master, m, grad, f.scalars, 1600, 0.5, &sgd_options);
            }
            assert_same_bits(master, f.param);
            for (size_t i = 0; i < N; i++) set(rounded, i, get(master, i));
            assert_same_bits(param, rounded);
            flat_free(&f);
            release(RT_BLOCKS(param, grad, master, rounded, m, v));
        }
}

static void optimizers_follow_pytorch(void **state) {
    enum { N = 144, DECAYED = 61, STEPS = 8 };
    FOR_EACH_DEVICE(b, state) {
        for (int adamw = 0; adamw < 2; adamw++) {
            flat f = flat_new(b->type, N);
            optimizer_state expected[N] = {{0}};
            /* a step rounds the parameter and, relative to its size, an update of at most about 0.1 */
            double bar = STEPS * (b->type == RT_FP64 ? DBL_EPSILON : FLT_EPSILON), worst = 0;
            for (size_t i = 0; i < N; i++) expected[i].param = get(f.param, i);
            for (int step = 1; step <= STEPS; step++) {
                next_gradient(&f, step);
                update(b, &f, adamw, 0, N, DECAYED);
                for (size_t i = 0; i < N; i++) {
                    double decay = i < DECAYED ? 0.1 : 0, grad = 0.25 * get(f.grad, i);
                    if (adamw)
                        adamw_reference(&expected[i], grad, 0.01 * step, decay, &adamw_options, step);
                    else
                        sgd_reference(&expected[i], grad, 0.01 * step, decay, &sgd_options, step);
                    double error = fabs(get(f.param, i) - expected[i].param);
                    worst = fmax(worst, error / fmax(1, fabs(expected[i].param)));
                }
            }
            if (!(worst <= bar)) fail_msg("%s, %s: error %g", b->name, adamw ? "adamw" : "sgd", worst);
            flat_free(&f);
        }
    }
}

static void optimizers_do_not_depend_on_shards_or_threads(void **state) {
    enum { N = 16 * 3203, DECAYED = 16 * 1777 };
    static const size_t cut[] = {0, 16, 48, 16 * 400, 16 * 1777, 16 * 1778, 16 * 3201, N};
    FOR_EACH_DEVICE(b, state) {
        const bench *one_thread = with_one_thread(b, *state);
        for (int adamw = 0; adamw < 2; adamw++) {
            flat whole = flat_new(b->type, N), parts = flat_new(b->type, N);
            for (int step = 1; step <= 3; step++) {
                next_gradient(&whole, step);
                next_gradient(&parts, step);
                update(one_thread, &whole, adamw, 0, N, DECAYED);
                for (size_t i = 0; i + 1 < COUNT(cut); i++)
                    update(b, &parts, adamw, cut[i], cut[i + 1], DECAYED);
            }
            assert_same_bits(whole.param, parts.param);
            assert_same_bits(whole.state[0], parts.state[0]);
            if (adamw) assert_same_bits(whole.state[1], parts.state[1]);
            flat_free(&whole);
            flat_free(&parts);
        }
    }
}

static void a_gradient_factor_of_zero_changes_nothing(void **state) {
    FOR_EACH_DEVICE(b, state) {
        for (int adamw = 0; adamw < 2; adamw++) {
            flat f = flat_new(b->type, 64), before = flat_new(b->type, 64);
            next_gradient(&f, 1);
            next_gradient(&before, 1);
            update(b, &f, adamw, 0, 64, 32); /* so that the state is not all zero */
            update(b, &before, adamw, 0, 64, 32);
            poison(f.grad); /* the reason for such a step: 0 * NaN would be NaN */
            set(f.scalars, VIT_GRADIENT_FACTOR, 0);
            update(b, &f, adamw, 0, 64, 32);
            assert_same_bits(f.param, before.param);
            assert_same_bits(f.state[0], before.state[0]);
            assert_same_bits(f.state[1], before.state[1]);
            flat_free(&f);
            flat_free(&before);
        }
    }
}

/* ------------------------------------------------------------------------------------------ gradient norm */

typedef struct {
    double norm, factor;
} norm_result;

static rt_block scalars_of(double *scalars) {
    return (rt_block){.data = scalars, .type = RT_FP64, .count = VIT_SCALARS};
}

static rt_block scaler_of(vit_scaler *scaler) {
    return (rt_block){.data = scaler, .type = RT_U8, .count = sizeof *scaler};
}

static norm_result norm_of(const bench *b, rt_block counters, double divisor, double scale, double clip) {
    double scalars[VIT_SCALARS] = {[VIT_LEARNING_RATE] = 5, [VIT_STEP] = 3, [VIT_LOSS_SCALE] = scale};
    vit_scaler scaler = {.scale = 7}; /* that later steps have, for good */
    vit_adamw_options o = {.beta1 = 0.5, .beta2 = 0.25};
    b->device->decide_step(stream_of(b), scalars_of(scalars), scaler_of(&scaler), counters, divisor, clip,
                           &o);
    assert_true(scalars[VIT_LEARNING_RATE] == 5 && scalars[VIT_STEP] == 3); /* the host's part */
    assert_true(scalars[VIT_USED_SCALE] == scale && scalars[VIT_LOSS_SCALE] == 7);
    assert_true(scalars[VIT_BIAS_CORRECTION1] == 0.875);    /* 1 - 0.5^3 */
    assert_true(scalars[VIT_BIAS_CORRECTION2] == 0.984375); /* 1 - 0.25^3 */
    assert_true(scalars[VIT_HALTED] == 0 && scaler.scale == 7 && scaler.skipped == 0);
    return (norm_result){scalars[VIT_GRADIENT_NORM], scalars[VIT_GRADIENT_FACTOR]};
}

static rt_block counters_new(void) {
    rt_block counters = block_new(RT_I64, VIT_NORM_COUNTERS);
    memset(counters.data, 0, bytes_of(counters));
    return counters;
}

static norm_result norm_of_values(const bench *b, rt_block x, double divisor, double scale, double clip) {
    rt_block counters = counters_new();
    b->device->sum_of_squares(stream_of(b), counters, x);
    norm_result n = norm_of(b, counters, divisor, scale, clip);
    release(RT_BLOCKS(counters));
    return n;
}

/* Numbers of 60 binary orders of magnitude. */
static void fill_wide(rt_block x, uint64_t seed) {
    fill_normal(x, seed);
    for (size_t i = 0; i < x.count; i++)
        set(x, i, ldexp(get(x, i), (int)random_below(random_key(seed, 1, 0, 0), i, 60) - 50));
}

static void sum_of_squares_does_not_depend_on_parts_order_or_threads(void **state) {
    enum { GRANULES = 6007, MOST_PARTS = 20 };
    FOR_EACH_DEVICE(b, state) {
        const bench *one_thread = with_one_thread(b, *state);
        rt_block x = block_new(b->type, 16 * GRANULES), whole = counters_new();
        fill_wide(x, 5);
        one_thread->device->sum_of_squares(stream_of(one_thread), whole, x);
        for (uint64_t trial = 0; trial < 8; trial++) {
            uint64_t key = random_key(trial, 0, 0, 0);
            size_t parts = 1 + random_below(key, 0, MOST_PARTS), cut[MOST_PARTS + 1] = {0};
            rt_block counters = counters_new();
            for (size_t i = 1; i <= parts; i++)
                cut[i] =
                    i == parts ? GRANULES : cut[i - 1] + random_below(key, i, (GRANULES - cut[i - 1]) / 4);
            for (size_t i = 0; i < parts; i++) {
                size_t k = trial % 2 ? i : parts - 1 - i;
                rt_block part = rt_slice(x, 16 * cut[k], 16 * (cut[k + 1] - cut[k]));
                b->device->sum_of_squares(stream_of(b), counters, part);
            }
            assert_same_bits(counters, whole);
            release(RT_BLOCKS(counters));
        }
        release(RT_BLOCKS(x, whole));
    }
}

static void gradient_norm_is_the_square_root_of_the_sum(void **state) {
    static const size_t counts[] = {16, 32, 16 * 101, 16 * 6007};
    double worst = 0;
    FOR_EACH_DEVICE(b, state) {
        for (size_t k = 0; k < COUNT(counts); k++) {
            rt_block x = block_new(b->type, counts[k]);
            long double sum = 0;
            fill_wide(x, k);
            for (size_t i = 0; i < x.count; i++) sum += (long double)get(x, i) * get(x, i);
            double expected = (double)sqrtl(sum), norm = norm_of_values(b, x, 1, 1, 0).norm;
            assert_true(fabs(norm - expected) <= 1e-14 * expected);
            worst = fmax(worst, fabs(norm - expected) / expected);
            release(RT_BLOCKS(x));
        }
    }
    print_message("             largest relative error %.1e\n", worst);
}

static void gradient_norm_has_the_range_of_the_numbers(void **state) {
    static const double sizes[] = {0x1p-149, 0x1p-140, 1e-38, 1e-30, 1, 1e19, 1e30, 1e38, FLT_MAX, 0};
    FOR_EACH_DEVICE(b, state) {
        for (size_t k = 0; k < COUNT(sizes); k++) {
            rt_block x = block_new(b->type, 64);
            fill(x, sizes[k]);
            double expected = 8 * get(x, 0);
            norm_result n = norm_of_values(b, x, 1, 1, 0);
            assert_true(fabs(n.norm - expected) <= 1e-14 * expected);
            assert_true(n.factor == 1);
            for (size_t bad = 0; bad < 4; bad++) { /* what x86 makes of 0 * Inf is -NaN */
                set(x, 37, (double[]){NAN, -NAN, INFINITY, -INFINITY}[bad]);
                n = norm_of_values(b, x, 1, 1, 1);
                assert_false(isfinite(n.norm));
                assert_true(n.factor == 0);
            }
            release(RT_BLOCKS(x));
        }
    }
}

/* 16 numbers 3 have the norm 12; as the sum of 4 gradients, or of 4 times the loss, their average has the
 * norm 3. */
static void gradient_factor_averages_and_clips(void **state) {
    static const struct {
        double divisor, scale, clip, norm, factor;
    } cases[] = {
        {1, 1, 0, 12, 1},
        {4, 1, 0, 3, 0.25},
        {1, 1, 100, 12, 1},
        {1, 1, 6, 12, 6 / (12 + 1e-6)},
        {4, 1, 3.5, 3, 0.25},
        {4, 1, 2, 3, 2 / (3 + 1e-6) / 4},
        {4, 1, 1e-5, 3, 1e-5 / (3 + 1e-6) / 4},
        {1, 4, 0, 3, 0.25},
        {2, 8, 0.5, 0.75, 0.5 / (0.75 + 1e-6) / 16},
    };
    FOR_EACH_DEVICE(b, state) {
        rt_block x = block_new(b->type, 16);
        fill(x, 3);
        for (size_t k = 0; k < COUNT(cases); k++) {
            norm_result n = norm_of_values(b, x, cases[k].divisor, cases[k].scale, cases[k].clip);
            assert_true(fabs(n.norm - cases[k].norm) <= 1e-15 * cases[k].norm);
            assert_true(fabs(n.factor - cases[k].factor) <= 1e-15 * cases[k].factor);
        }
        fill(x, 0);
        assert_true(norm_of_values(b, x, 4, 1, 1).factor == 0.25); /* no gradient: nothing to clip */
        release(RT_BLOCKS(x));
    }
}

/* Steps of loss scalers by DeepSpeed's rules: a file that tests/loss_scale.py made. */
typedef struct {
    FILE *file;
    vit_scaler scaler;    /* as it begins */
    int overflow, raises; /* of this step, */
    double scale;         /* after it, */
    long step, skipped;   /* so far */
} scaler_steps;

static scaler_steps scaler_steps_open(void) {
    scaler_steps s = {.file = fopen("tests/golden/loss_scale.txt", "r")};
    assert_non_null(s.file);
    return s;
}

/* 0: there are no more. Step 0 is the beginning of another scaler. */
static int scaler_steps_next(scaler_steps *s) {
    char first[8];
    double scale = 0, least = 0;
    long window = 0, hysteresis = 0;
    if (fscanf(s->file, "%7s", first) != 1) return 0;
    if (!strcmp(first, "new")) {
        assert_int_equal(fscanf(s->file, "%lf%lf%ld%ld", &scale, &least, &window, &hysteresis), 4);
        s->scaler = (vit_scaler){.scale = scale,
                                 .least = least,
                                 .window = window,
                                 .last_overflow = -1,
                                 .hysteresis = hysteresis,
                                 .left = hysteresis};
        s->step = s->skipped = 0;
        return 1;
    }
    s->overflow = !strcmp(first, "over");
    s->step++;
    assert_int_equal(fscanf(s->file, "%lf%d%ld", &s->scale, &s->raises, &s->skipped), 3);
    return 1;
}

static void the_loss_scale_follows_deepspeed(void **state) {
    scaler_steps golden = scaler_steps_open();
    vit_scaler s = {0};
    size_t lines = 0;
    (void)state;
    for (; scaler_steps_next(&golden); lines++) {
        if (golden.step == 0) {
            s = golden.scaler;
            continue;
        }
        assert_int_equal(vit_scaler_update(&s, golden.overflow), golden.raises ? -1 : 0);
        assert_true(s.scale == golden.scale);
        if (!golden.raises) assert_int_equal(s.skipped, golden.skipped);
    }
    assert_true(lines > 2800);
    fclose(golden.file);
    s = vit_scaler_default();
    assert_true(s.scale == 65536 && s.least == 1 && s.window == 1000 && s.hysteresis == 2 && s.left == 2);
}

/* Every device decides by itself what these rules say: the next scale, whether a step is made, the number of
 * updates that AdamW corrects for; and once they raise, no step is made. */
static void decide_step_follows_deepspeed(void **state) {
    enum { MOST_STEPS = 100 }; /* of a scaler: those of a long window are all alike */
    FOR_EACH_DEVICE(b, state) {
        scaler_steps golden = scaler_steps_open();
        rt_block counters = counters_new(), x = block_new(b->type, 16);
        int64_t *counter = counters.data;
        double scalars[VIT_SCALARS] = {0};
        vit_scaler scaler = {0};
        long halts = 0, skipped = 0; /* skipped: before the step */
        fill(x, 0.25);               /* the norm is 1 */
        b->device->sum_of_squares(stream_of(b), counters, x);
        for (; scaler_steps_next(&golden); skipped = golden.skipped) {
            if (golden.step == 0) {
                scaler = golden.scaler;
                memset(scalars, 0, sizeof scalars);
                scalars[VIT_LOSS_SCALE] = scaler.scale;
            }
            if (golden.step == 0 || golden.step > MOST_STEPS) continue;
            double used = scalars[VIT_LOSS_SCALE], t = (double)(golden.step - skipped);
            scalars[VIT_STEP] = (double)golden.step;
            counter[VIT_NORM_NOT_FINITE] = golden.overflow;
            b->device->decide_step(stream_of(b), scalars_of(scalars), scaler_of(&scaler), counters, 2, 0,
                                   &adamw_options);
            assert_true(scalars[VIT_USED_SCALE] == used && scalars[VIT_LOSS_SCALE] == golden.scale);
            assert_true(scalars[VIT_GRADIENT_FACTOR] == (golden.overflow ? 0 : 1 / (2 * used)));
            assert_true(golden.overflow ? isnan(scalars[VIT_GRADIENT_NORM])
                                        : scalars[VIT_GRADIENT_NORM] == 1 / (2 * used));
            for (int i = 0; i < 2; i++) {
                double beta = i ? adamw_options.beta2 : adamw_options.beta1, expected = -expm1(t * log(beta));
                assert_true(fabs(scalars[VIT_BIAS_CORRECTION1 + i] - expected) <= 1e-12 * expected);
            }
            assert_true(scalars[VIT_HALTED] == golden.raises);
            if (!golden.raises) continue;
            halts++;
            counter[VIT_NORM_NOT_FINITE] = 0;
            b->device->decide_step(stream_of(b), scalars_of(scalars), scaler_of(&scaler), counters, 2, 0,
                                   &adamw_options);
            assert_true(scalars[VIT_GRADIENT_FACTOR] == 0 && scalars[VIT_HALTED] == 1);
        }
        assert_true(halts > 0);
        fclose(golden.file);
        release(RT_BLOCKS(counters, x));
    }
}

/* -------------------------------------------------------------------------------------- sums and the rest */

static void sum_buffers_adds_in_rank_order(void **state) {
    enum { RANKS = 5, N = 20011 };
    FOR_EACH_DEVICE(b, state) {
        for (size_t ranks = 1; ranks <= RANKS; ranks++) {
            rt_block from[RANKS], to[2] = {block_new(b->type, N), block_new(b->type, N)};
            rt_block sum = block_new(b->type, N), other_order = block_new(b->type, N);
            for (size_t r = 0; r < ranks; r++) {
                fill_normal(from[r] = block_new(b->type, N), r);
                for (size_t i = 0; i < N; i++) set(from[r], i, get(from[r], i) / 3); /* no bits are 0 */
            }
            for (size_t i = 0; i < N; i++) {
                set(sum, i, get(from[0], i));
                for (size_t r = 1; r < ranks; r++) set(sum, i, get(sum, i) + get(from[r], i));
                set(other_order, i, get(from[ranks - 1], i));
                for (size_t r = ranks - 1; r-- > 0;)
                    set(other_order, i, get(other_order, i) + get(from[r], i));
            }
            if (ranks > 2) assert_memory_not_equal(sum.data, other_order.data, bytes_of(sum));
            b->device->sum_buffers(stream_of(b), to, 2, from, ranks);
            assert_same_bits(to[0], sum);
            assert_same_bits(to[1], sum);
            b->device->sum_buffers(stream_of(b), from, ranks, from, ranks); /* in place, as all-reduce does */
            for (size_t r = 0; r < ranks; r++) assert_same_bits(from[r], sum);
            for (size_t r = 0; r < ranks; r++) release(RT_BLOCKS(from[r]));
            release(RT_BLOCKS(to[0], to[1], sum, other_order));
        }
    }
}

static void sum_buffers_writes_into_one_of_its_sources(void **state) {
    FOR_EACH_DEVICE(b, state) {
        for (size_t into = 0; into < 3; into++) {
            rt_block x[3], sum = block_new(b->type, 77);
            for (size_t r = 0; r < 3; r++) fill_wide(x[r] = block_new(b->type, 77), r);
            b->device->sum_buffers(stream_of(b), &sum, 1, x, 3);
            b->device->sum_buffers(stream_of(b), &x[into], 1, x, 3);
            assert_same_bits(x[into], sum);
            release(RT_BLOCKS(x[0], x[1], x[2], sum));
        }
    }
}

static void sum_buffers_adds_integers(void **state) {
    FOR_EACH_DEVICE(b, state) {
        int64_t x[3][2] = {{1, INT64_MAX - 1}, {20, -INT64_MAX}, {300, 1 - (INT64_C(1) << 53)}};
        rt_block from[3], to;
        for (size_t r = 0; r < 3; r++) from[r] = (rt_block){.data = x[r], .type = RT_I64, .count = 2};
        to = from[1];
        b->device->sum_buffers(stream_of(b), &to, 1, from, 3);
        assert_true(x[1][0] == 321 && x[1][1] == -(INT64_C(1) << 53));
        assert_true(x[0][0] == 1 && x[2][0] == 300);
    }
}

static void copies_zero_and_add_do_what_they_say(void **state) {
    enum { N = 100003 };
    FOR_EACH_DEVICE(b, state) {
        rt_block x = block_new(b->type, N), y = block_new(b->type, N), host = block_new(b->type, N);
        fill_wide(x, 1);
        fill_wide(y, 2);
        b->device->copy_out(stream_of(b), host.data, x);
        assert_same_bits(host, x);
        b->device->add(stream_of(b), x, y);
        for (size_t i = 0; i < N; i++) set(host, i, get(host, i) + get(y, i));
        assert_same_bits(x, host);
        b->device->copy_in(stream_of(b), y, host.data);
        assert_same_bits(y, host);
        b->device->fill(stream_of(b), x, 0);
        fill(host, 0);
        assert_same_bits(x, host);
        release(RT_BLOCKS(x, y, host));
    }
}

static void every_device_offers_every_operation(void **state) {
    FOR_EACH_DEVICE(b, state) {
        void *entries[offsetof(vit_device, memory) / sizeof(void *)]; /* what follows is optional */
        memcpy(entries, b->device, sizeof entries);
        for (size_t i = 0; i < COUNT(entries); i++) assert_non_null(entries[i]);
    }
}

static void loss_accumulate_adds_finite_losses_and_counts_the_others(void **state) {
    FOR_EACH_DEVICE(b, state) {
        rt_block losses = block_of(b->type, (double[]){1.5, NAN, INFINITY, 0.25}, 4);
        int64_t total[2] = {1000, 5};
        rt_block block = {.data = total, .type = RT_I64, .count = 2};
        b->device->loss_accumulate(stream_of(b), block, losses, 4);
        assert_true(total[0] == 1000 + (int64_t)(1.75 / 4 / VIT_LOSS_UNIT));
        assert_true(total[1] == 5 + 2);
        set(losses, 0, -INFINITY);
        set(losses, 2, 0);
        b->device->loss_accumulate(stream_of(b), block, losses, 4);
        assert_true(total[0] == 1000 + (int64_t)(2. / 4 / VIT_LOSS_UNIT));
        assert_true(total[1] == 5 + 2 + 2);
        release(RT_BLOCKS(losses));
        losses =
            block_of(b->type, (double[]){0.1, 2.3, 0.7}, 3); /* of which no third is a multiple of the unit */
        total[0] = 0;
        b->device->loss_accumulate(stream_of(b), block, losses, 3);
        assert_true(fabs((double)total[0] * VIT_LOSS_UNIT - 3.1 / 3) < 2 * VIT_LOSS_UNIT + 1e-7);
        release(RT_BLOCKS(losses));
    }
}

/* Every pixel carries its own number; patches of 4 of 11 x 14 images leave out 3 rows and 2 columns. */
static void patchify_cuts_whole_patches_in_row_major_order(void **state) {
    enum { B = 2, C = 3, HEIGHT = 11, WIDTH = 14, P = 4, ROWS = 2, COLUMNS = 3 };
    FOR_EACH_DEVICE(b, state) {
        rt_block images = block_new(b->type, B * C * HEIGHT * WIDTH);
        rt_block patches = block_new(b->type, B * ROWS * COLUMNS * C * P * P);
        for (size_t i = 0; i < images.count; i++) set(images, i, (double)i);
        b->device->patchify_forward(stream_of(b), patches, images, B, C, HEIGHT, WIDTH, P);
        for (size_t i = 0; i < patches.count; i++) {
            size_t x = i % P, y = i / P % P, c = i / P / P % C, patch = i / P / P / C % (ROWS * COLUMNS);
            size_t image = i / P / P / C / (ROWS * COLUMNS);
            size_t row = patch / COLUMNS * P + y, column = patch % COLUMNS * P + x;
            assert_true(get(patches, i) == (double)(((image * C + c) * HEIGHT + row) * WIDTH + column));
        }
        release(RT_BLOCKS(images, patches));
    }
}

/* Bars of five standard deviations. */
static void drop_path_keeps_the_right_share_and_the_mean(void **state) {
    enum { N = 200000 };
    static const double rates[] = {0.05, 0.3, 0.5, 0.9};
    (void)state;
    for (size_t k = 0; k < COUNT(rates); k++) {
        double rate = rates[k], sum = 0, deviation = sqrt(rate * (1 - rate) / N);
        size_t kept = 0, both = 0;
        for (uint64_t i = 0; i < N; i++) {
            uint64_t key = random_key(0, RANDOM_DROP_PATH, i, 0);
            double factor = vit_drop_path_factor(key, 4, rate), other = vit_drop_path_factor(key, 5, rate);
            assert_true(factor == 0 || factor == 1 / (1 - rate));
            sum += factor;
            kept += factor > 0;
            both += factor > 0 && other > 0;
        }
        double share = (1 - rate) * (1 - rate); /* two branches of one sample are drawn independently */
        assert_true(fabs((double)kept / N - (1 - rate)) < 5 * deviation);
        assert_true(fabs(sum / N - 1) < 5 * deviation / (1 - rate));
        assert_true(fabs((double)both / N - share) < 5 * sqrt(share * (1 - share) / N));
    }
    for (uint64_t i = 0; i < 100; i++) assert_true(vit_drop_path_factor(i, i, 0) == 1);
}

#ifdef HAVE_CUDA
static void no_device(void **state) {
    (void)state;
    skip();
}
#endif

int main(void) {
#ifdef HAVE_CUDA
    const struct CMUnitTest skipped[] = {cmocka_unit_test(no_device)};
    double unused, total;
    error_text e;
    if (vit_cuda.memory(0, 1, &unused, &total, &e)) {
        print_message("skipped: operations of vit_cuda: %s\n", e.text);
        return cmocka_run_group_tests(skipped, NULL, NULL);
    }
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_device_offers_every_operation),
        cmocka_unit_test(backward_of_every_operation_is_the_derivative_of_forward),
        cmocka_unit_test(a_backward_that_lacks_a_term_is_caught),
        cmocka_unit_test(backward_of_every_unit_is_the_derivative_of_forward),
        cmocka_unit_test(gradients_of_the_whole_chain_are_those_of_the_loss),
        cmocka_unit_test(the_comparison_of_devices_can_fail),
        cmocka_unit_test(linear_agrees_with_the_naive_device),
        cmocka_unit_test(linear_with_gelu_agrees_with_the_naive_device),
        cmocka_unit_test(layernorm_agrees_with_the_naive_device),
        cmocka_unit_test(attention_agrees_with_the_naive_device),
        cmocka_unit_test(other_operations_agree_with_the_naive_device),
        cmocka_unit_test(sixteen_bits_agree_with_double),
        cmocka_unit_test(casts_and_sums_round_once),
        cmocka_unit_test(optimizers_update_the_master),
        cmocka_unit_test(gelu_and_its_derivative_are_exact_everywhere),
        cmocka_unit_test(gelu_by_tanh_and_its_derivative_are_exact_everywhere),
        cmocka_unit_test(attention_survives_large_scores),
        cmocka_unit_test(cross_entropy_survives_large_logits_and_vanishing_probabilities),
        cmocka_unit_test(optimizers_follow_pytorch),
        cmocka_unit_test(optimizers_do_not_depend_on_shards_or_threads),
        cmocka_unit_test(a_gradient_factor_of_zero_changes_nothing),
        cmocka_unit_test(sum_of_squares_does_not_depend_on_parts_order_or_threads),
        cmocka_unit_test(gradient_norm_is_the_square_root_of_the_sum),
        cmocka_unit_test(gradient_norm_has_the_range_of_the_numbers),
        cmocka_unit_test(gradient_factor_averages_and_clips),
        cmocka_unit_test(the_loss_scale_follows_deepspeed),
        cmocka_unit_test(decide_step_follows_deepspeed),
        cmocka_unit_test(sum_buffers_adds_in_rank_order),
        cmocka_unit_test(sum_buffers_writes_into_one_of_its_sources),
        cmocka_unit_test(sum_buffers_adds_integers),
        cmocka_unit_test(copies_zero_and_add_do_what_they_say),
        cmocka_unit_test(loss_accumulate_adds_finite_losses_and_counts_the_others),
        cmocka_unit_test(patchify_cuts_whole_patches_in_row_major_order),
        cmocka_unit_test(drop_path_keeps_the_right_share_and_the_mean),
    };
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
