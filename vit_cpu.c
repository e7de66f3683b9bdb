/* vit_cpu.c - the CPU device: every operation of vit.h's table, on the threads of one rank. Models may be
 * of type fp32, bf16 or fp16; arithmetic is fp32.
 *
 *     cc -O3 -march=native -mprefer-vector-width=512 -std=gnu11 -fno-math-errno -fno-trapping-math -fopenmp \
 *        -c vit_cpu.c
 *
 * and with -DHAVE_OPENBLAS (-lopenblas for the linker) OpenBLAS's matrix product beside our own.
 *
 * Contents: ranks and memory; numbers of 16 bits; exp, softmax, GELU; the matrix product; linear; residual
 * and layernorm; attention; the other layers; loss; optimizers and gradient norm; vector arithmetic; the
 * table.
 *
 * Results do not depend on the number of threads (products by OpenBLAS excepted). Threads share out
 * elements, rows or tiles, each of which is computed in one way. Where rows are summed up (biases,
 * parameters of LayerNorm, positions), the sums go through chunks of rows that follow from the shape alone
 * and are added in order. Flat runs are cut into blocks of fixed length, lest a thread's boundary move
 * elements from a vectorised loop to its remainder.
 *
 * What it leaves out: models in fp64, instructions that multiply 16-bit numbers, several threads for one
 * image and head, placement of memory on sockets. It is correct without -fopenmp, on one thread. */
#define _GNU_SOURCE
#include "vit.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef HAVE_OPENBLAS
#include <cblas.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#pragma GCC diagnostic ignored "-Wunused-variable"
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif
#pragma GCC diagnostic ignored "-Wunused-parameter" /* an entry of the table takes what any device may need */

#define INLINE static inline __attribute__((always_inline))

/* --------------------------------------------------------------------------------------- ranks and memory */

typedef struct {
    vit_matmul matmul; /* VIT_MATMUL_OWN or VIT_MATMUL_OPENBLAS */
    char description[96];
    float *scratch; /* as large as the neediest operation so far */
    size_t scratch_count;
} cpu_state;

enum { BLOCK = 4096, ROWS = 64 }; /* elements of a flat run, and rows of a sum, that stay with one thread */

static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
static inline float *floats(rt_block block) { return block.data; }

/* Threads for an operation that takes one thread about so long: waking the others costs microseconds. */
static int team(const rt_rank *rank, double nanoseconds) { return nanoseconds < 20e3 ? 1 : rank->threads; }

static void *allocate(rt_rank *rank, size_t bytes) {
    const size_t huge_page = (size_t)2 << 20, alignment = bytes < 2 * huge_page ? 64 : huge_page;
    if (bytes > SIZE_MAX - huge_page) return NULL;
    void *memory = aligned_alloc(alignment, round_up(bytes, alignment));
    if (!memory) return NULL;
    if (alignment == huge_page) /* whole ones; where the advice is not taken, no harm is done */
        madvise(memory, bytes / huge_page * huge_page, MADV_HUGEPAGE);
    return memset(memory, 0, bytes);
}

static void release(rt_rank *rank, void *memory, size_t bytes) { free(memory); }

/* Scratch memory for one operation: `shared` floats and, behind them, `each` for every thread. It grows
 * during the first step and then stays. NULL and a failed world: there is no more memory. */
static float *scratch(rt_rank *rank, size_t shared, size_t each) {
    cpu_state *state = rank->device;
    const size_t count = shared + each * (size_t)rank->threads;
    if (count > state->scratch_count) {
        free(state->scratch);
        state->scratch = allocate(rank, count * sizeof(float));
        state->scratch_count = state->scratch ? count : 0;
        if (!state->scratch)
            rt_fail(rank, "rank %d: out of memory: %zu bytes of scratch", rank->rank, count * sizeof(float));
    }
    return state->scratch;
}

static void copy_in(rt_stream *s, rt_block to, const void *from) {
    memcpy(to.data, from, to.count * rt_type_size(to.type));
}

static void copy_out(rt_stream *s, void *to, rt_block from) {
    memcpy(to, from.data, from.count * rt_type_size(from.type));
}

/* ------------------------------------------------------------------------------------- numbers of 16 bits */

/* Operations work on floats. Those of an fp32 block are used in place; those of a bf16 or fp16 block are
 * widened into a buffer of the thread, a row or a run of elements at a time, and results rounded on their
 * way back. */

/* Elements [at, at + n) of a block: in place, or in the buffer [n]. */
INLINE const float *load(rt_block b, size_t at, size_t n, float *buffer) {
    if (b.type == RT_FP32) return floats(b) + at;
    rt_widen(buffer, (const uint16_t *)b.data + at, n, b.type);
    return buffer;
}

/* Where to compute elements from `at` on: in place, or in the buffer. */
INLINE float *room(rt_block b, size_t at, float *buffer) {
    return b.type == RT_FP32 ? floats(b) + at : buffer;
}

/* Elements [at, at + n) = x [n], which may have been computed in place. */
INLINE void store(rt_block b, size_t at, size_t n, const float *x) {
    if (b.type != RT_FP32)
        rt_narrow((uint16_t *)b.data + at, x, n, b.type);
    else if (x != floats(b) + at)
        memcpy(floats(b) + at, x, n * sizeof *x);
}

/* The same for n elements of each of `count` rows, `stride` apart: in place, or [count, n] in the buffer. */
typedef struct {
    float *at;
    size_t ld;
} float_rows;

static float_rows room_for_rows(rt_block b, size_t at, size_t stride, size_t n, float *buffer) {
    return b.type == RT_FP32 ? (float_rows){floats(b) + at, stride} : (float_rows){buffer, n};
}

static float_rows load_rows(rt_block b, size_t at, size_t stride, size_t count, size_t n, float *buffer) {
    for (size_t i = 0; b.type != RT_FP32 && i < count; i++) load(b, at + i * stride, n, buffer + i * n);
    return room_for_rows(b, at, stride, n, buffer);
}

static void store_rows(rt_block b, size_t at, size_t stride, size_t count, size_t n, float_rows x) {
    for (size_t i = 0; i < count; i++) store(b, at + i * stride, n, x.at + i * x.ld);
}

static inline rt_block float_block(float *x) { return (rt_block){.data = x, .type = RT_FP32}; }

/* ------------------------------------------------------------------------------------- exp, softmax, GELU */

/* Scalar functions without branches vectorise in `omp simd` loops. The polynomials are minimax fits. */

/* exp(x) for x <= 0, relative error below 9e-8; 0 below -87. x = n ln 2 + r with |r| <= ln 2 / 2, and a
 * polynomial for exp(r). Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits. */
INLINE float exp_negative(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first of few bits */
    float p = ((0.001381446246f * r + 0.008368780898f) * r + 0.04166839431f) * r + 0.166665201f;
    p = (p * r + 0.4999999341f) * (r * r) + r + 1;
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3F800000u; /* 2^n */
    memcpy(&power, &bits, sizeof power);
    return x < -87 ? 0 : p * power;
}

/* The largest of x [n], in lanes: compilers take no reduction by maximum where there may be NaNs. */
static float largest(const float *x, size_t n) {
    enum { LANES = 16 };
    float lane[LANES];
    for (size_t l = 0; l < LANES; l++) lane[l] = x[0];
    size_t j = 0;
    for (; j + LANES <= n; j += LANES)
#pragma omp simd
        for (size_t l = 0; l < LANES; l++) lane[l] = x[j + l] > lane[l] ? x[j + l] : lane[l];
    for (; j < n; j++) lane[0] = x[j] > lane[0] ? x[j] : lane[0];
    for (size_t l = 1; l < LANES; l++) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
    return lane[0];
}

/* x [n] = softmax(scale * x) = exp(scale * (x - largest)) / sum; returns that sum. (clang 14 does not
 * vectorise it where it is inlined.) */
static __attribute__((noinline)) float softmax(float *x, size_t n, float scale) {
    const float most = largest(x, n);
    float sum = 0;
#pragma omp simd
    for (size_t j = 0; j < n; j++) x[j] = exp_negative(scale * (x[j] - most));
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < n; j++) sum += x[j];
    const float factor = 1 / sum;
#pragma omp simd
    for (size_t j = 0; j < n; j++) x[j] *= factor;
    return sum;
}

/* The standard normal distribution function Phi(x), absolute error below 1.2e-7, and *e = exp(-x^2/2).
 * Phi(-t) = e R(t) for t >= 0, where R(t) = exp(t^2/2) erfc(t / sqrt 2) / 2 decays slowly; the polynomial for
 * R has the least error once it is multiplied by e, 1.7e-8. */
INLINE float normal_distribution(float x, float *e) {
    float t = fabsf(x);
    t = t > 16 ? 16 : t; /* e is 0 there; powers of t must not overflow */
    *e = exp_negative(-0.5f * x * x);
    float r = ((-3.155434740e-7f * t + 7.708787052e-6f) * t - 8.477106167e-5f) * t + 5.636530695e-4f;
    r = (((r * t - 2.590091433e-3f) * t + 9.003849700e-3f) * t - 0.02547181956f) * t + 0.06192393228f;
    r = (((r * t - 0.1328057796f) * t + 0.2499725670f) * t - 0.3989405930f) * t + 0.4999999702f;
    const float tail = *e * r;
    return x < 0 ? tail : 1 - tail;
}

/* x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, and its derivative Phi(x) + x exp(-x^2/2) / sqrt(2 pi). */
INLINE float gelu_erf(float x, float *derivative) {
    float e;
    const float phi = normal_distribution(x, &e);
    *derivative = phi + x * e * 0.398942280f;
    return x * phi;
}

/* x S(u) = x (1 + tanh(u / 2)) / 2 with u = sqrt(8 / pi) (x + 0.044715 x^3) and S(u) = 1 / (1 + exp(-u)), and
 * its derivative S(u) + x u' S(u) S(-u). With e = exp(-|u|), S(|u|) = 1 / (1 + e), S(-|u|) = e / (1 + e). */
INLINE float gelu_tanh(float x, float *derivative) {
    float t = fabsf(x);
    t = t > 16 ? 16 : t; /* e is 0 there; powers of t must not overflow */
    const float e = exp_negative(-1.59576912f * (t + 0.044715f * t * t * t));
    const float above = 1 / (1 + e), below = e * above, s = x < 0 ? below : above;
    *derivative = s + x * (above * below) * (1.59576912f + 0.214064449f * t * t);
    return x * s;
}

/* The form is known when compiled. */
INLINE float gelu(const vit_gelu form, float x, float *derivative) {
    return form == VIT_GELU_TANH ? gelu_tanh(x, derivative) : gelu_erf(x, derivative);
}

/* ------------------------------------------------------------------------------------- the matrix product */

/* C [M, N] = A [M, K] B [K, N], of which either operand may lie transposed, so that one function serves the
 * forward pass (x w^T), the gradient of its input (dy w) and that of its weights (dy^T x). The method is
 * Goto's (K. Goto, R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008): B is packed
 * into panels of a few columns, and a kernel keeps a tile of C in registers while it runs along K. Each
 * element of C is one chain of additions over a block of K, and the blocks, which depend on K alone, are
 * added in order. */

/* VL floats a vector; a tile of C has MR rows of NV vectors. LOW and HIGH interleave two vectors' halves. */
#if defined(__AVX512F__)
enum { VL = 16, MR = 14, NV = 2, OWN_IS_FASTEST = 1 };
#define LOW      0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define OWN_NAME "own product, AVX-512 14x32"
#elif defined(__AVX2__) && defined(__FMA__)
enum { VL = 8, MR = 6, NV = 2, OWN_IS_FASTEST = 0 };
#define LOW      0, 8, 1, 9, 2, 10, 3, 11
#define HIGH     4, 12, 5, 13, 6, 14, 7, 15
#define OWN_NAME "own product, AVX2 6x16"
#else
enum { VL = 4, MR = 6, NV = 2, OWN_IS_FASTEST = 0 };
#define LOW      0, 4, 1, 5
#define HIGH     2, 6, 3, 7
#define OWN_NAME "own product, vectors of 4, 6x8"
#endif
enum { NR = NV * VL, MR_HALF = MR / 2 };

typedef float vec __attribute__((vector_size(VL * sizeof(float)), aligned(4), may_alias));

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int vec_index __attribute__((vector_size(VL * sizeof(int))));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_index){__VA_ARGS__})
#endif
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Element (i, j) at at[i * ld + j]; transposed: at at[j * ld + i]. */
typedef struct {
    const float *at;
    size_t ld;
    int transposed;
} matrix;

/* The matrix that begins at element (i, j). */
INLINE matrix part(matrix m, size_t i, size_t j) {
    m.at += m.transposed ? j * m.ld + i : i * m.ld + j;
    return m;
}

/* c [rows, vecs * VL] (+)= a [rows, K] b [K, vecs * VL], with rows, vecs and a.transposed known when
 * compiled. An x86 address reaches one or two strides beyond a pointer: every third row of a has its own. */
INLINE void kernel(const size_t rows, const size_t vecs, size_t K, matrix a, const float *b, float *c,
                   size_t ldc, int accumulate) {
    const size_t down = a.transposed ? 1 : a.ld, along = a.transposed ? a.ld : 1;
    const float *row[(MR + 2) / 3];
    vec sum[MR][NV];
    UNROLL for (size_t i = 0; i < rows; i++) UNROLL for (size_t v = 0; v < vecs; v++) sum[i][v] = (vec){0};
    UNROLL for (size_t i = 0; i < rows; i += 3) row[i / 3] = a.at + i * down;
    for (size_t k = 0; k < K; k++, b += vecs * VL) {
        vec bk[NV];
        UNROLL for (size_t v = 0; v < vecs; v++) bk[v] = *(const vec *)(b + v * VL);
        UNROLL for (size_t i = 0; i < rows; i++) {
            const float aik = row[i / 3][i % 3 * down];
            UNROLL for (size_t v = 0; v < vecs; v++) sum[i][v] += aik * bk[v];
        }
        UNROLL for (size_t i = 0; i < rows; i += 3) row[i / 3] += along;
    }
    UNROLL for (size_t i = 0; i < rows; i++) UNROLL for (size_t v = 0; v < vecs; v++) {
        vec *to = (vec *)(c + i * ldc + v * VL);
        if (accumulate) sum[i][v] += *to;
        *to = sum[i][v];
    }
}

#define KERNEL(rows)                                                                                         \
    static void kernel_##rows(size_t vecs, size_t K, matrix a, const float *b, float *c, size_t ldc,         \
                              int accumulate) {                                                              \
        const matrix n = {a.at, a.ld, 0}, t = {a.at, a.ld, 1};                                               \
        if (vecs == 1 && a.transposed) kernel(rows, 1, K, t, b, c, ldc, accumulate);                         \
        if (vecs == 1 && !a.transposed) kernel(rows, 1, K, n, b, c, ldc, accumulate);                        \
        if (vecs == NV && a.transposed) kernel(rows, NV, K, t, b, c, ldc, accumulate);                       \
        if (vecs == NV && !a.transposed) kernel(rows, NV, K, n, b, c, ldc, accumulate);                      \
    }
KERNEL(MR)
KERNEL(MR_HALF)
KERNEL(1)

/* Columns in which a panel of `cols` columns of B is packed. */
static inline size_t panel_width(size_t cols) { return cols > VL ? NR : VL; }

/* c [rows <= MR, cols <= NR] (+)= a [rows, K] times a packed panel: by whole or half tile and single rows. */
static void tile(size_t rows, size_t cols, size_t K, matrix a, const float *b, float *c, size_t ldc,
                 int accumulate) {
    const size_t width = panel_width(cols), vecs = width / VL;
    float edge[MR * NR], *to = cols == width ? c : edge; /* what is not a whole tile is computed aside */
    const size_t ld = cols == width ? ldc : width;
    if (to == edge && accumulate)
        for (size_t i = 0; i < rows; i++) memcpy(edge + i * width, c + i * ldc, cols * sizeof *c);
    size_t i = 0;
    if (rows == MR) kernel_MR(vecs, K, a, b, to, ld, accumulate), i = MR;
    if (rows - i >= MR_HALF) kernel_MR_HALF(vecs, K, a, b, to, ld, accumulate), i = MR_HALF;
    for (; i < rows; i++) kernel_1(vecs, K, part(a, i, 0), b, to + i * ld, ld, accumulate);
    if (to == edge)
        for (i = 0; i < rows; i++) memcpy(c + i * ldc, edge + i * width, cols * sizeof *c);
}

/* c [M, N] (+)= a [M, K] times packed panels; row i of a, a multiple of MR, begins at a.at + i * step. */
static void multiply_panels(float *c, size_t ldc, matrix a, size_t step, const float *panels, size_t M,
                            size_t N, size_t K, int accumulate) {
    const float *first = a.at;
    for (size_t j = 0; j < N; j += NR)
        for (size_t i = 0; i < M; i += MR) {
            a.at = first + i * step;
            tile(min_size(MR, M - i), min_size(NR, N - j), K, a, panels + j * K, c + i * ldc + j, ldc,
                 accumulate);
        }
}

/* Transposes VL vectors in log2(VL) rounds, in each of which the two halves interleave. */
INLINE void transpose(vec r[VL]) {
    UNROLL for (size_t round = 1; round < VL; round *= 2) {
        vec t[VL];
        UNROLL for (size_t i = 0; i < VL; i++) t[i] = r[i];
        UNROLL for (size_t i = 0; i < VL / 2; i++) {
            r[2 * i] = SHUFFLE(t[i], t[i + VL / 2], LOW);
            r[2 * i + 1] = SHUFFLE(t[i], t[i + VL / 2], HIGH);
        }
    }
}

/* Packs b [K, cols <= NR] into a panel [K, panel_width(cols)], filled up with zeros. */
static void pack_panel(float *to, matrix b, size_t K, size_t cols) {
    const size_t width = panel_width(cols), ld = b.ld;
    size_t k = 0;
    if (!b.transposed && cols == NR)
        for (; k < K; k++) memcpy(to + k * NR, b.at + k * ld, NR * sizeof *to);
    if (b.transposed)
        for (; k + VL <= K; k += VL)
            for (size_t j = 0; j < width; j += VL) {
                const float *from = b.at + j * ld + k;
                vec r[VL];
                UNROLL for (size_t i = 0; i < VL; i++) {
                    r[i] = j + i < cols ? *(vec *)(from + i * ld) : (vec){0};
                }
                transpose(r);
                UNROLL for (size_t i = 0; i < VL; i++) memcpy(to + (k + i) * width + j, &r[i], sizeof r[i]);
            }
    for (; k < K; k++)
        for (size_t j = 0; j < width; j++) to[k * width + j] = j < cols ? *part(b, k, j).at : 0;
}

/* Packs b [K, N] into panels of NR columns, the last perhaps narrower: panel j / NR at to + j * K. Of n
 * threads that do it together this is number `thread`. */
static void pack_panels(float *to, matrix b, size_t K, size_t N, size_t thread, size_t n) {
    for (size_t j = thread * NR; j < N; j += n * NR)
        pack_panel(to + j * K, part(b, 0, j), K, min_size(NR, N - j));
}

/* An operand of a product as it lies in memory: element (i, j) at i * ld + j; transposed: at j * ld + i. */
typedef struct {
    rt_block block;
    size_t ld;
    int transposed;
} operand;

static size_t position(const operand *o, size_t i, size_t j) {
    return o->transposed ? j * o->ld + i : i * o->ld + j;
}

/* Of an fp32 operand: the matrix that begins at element (i, j). */
static matrix in_place(const operand *o, size_t i, size_t j) {
    return (matrix){floats(o->block) + position(o, i, j), o->ld, o->transposed};
}

/* Blocks: K at most; rows of packed A; and floats of packed B, which all threads share and which are to
 * stay in the L3 cache. A is packed only where it is transposed, or where its rows lie a multiple of
 * ALIASED floats apart, in the same few places of an L1 cache. */
enum { KC = 1024, MC = 10 * MR, PANELS = 1 << 20, ALIASED = 1024 };

/* Packs [M <= MC, K] of A from element (i0, k0) on: transposed into slivers [K, MR], else as rows of
 * another stride, since rows some KB apart would compete for the same cache lines. Transposed it also adds
 * up each row, if sums [M] are asked for. */
static matrix pack_rows(float *to, const operand *a, size_t i0, size_t k0, size_t M, size_t K, float *sums) {
    for (size_t i = 0; !a->transposed && i < M; i++) {
        float *row = to + i * (K + VL);
        const float *from = load(a->block, position(a, i0 + i, k0), K, row);
        if (from != row) memcpy(row, from, K * sizeof *to);
    }
    if (!a->transposed) return (matrix){to, K + VL, 0};
    float wide[MC];
    for (size_t k = 0; k < K; k++) {
        const float *from = load(a->block, position(a, i0, k0 + k), M, wide);
        size_t i = 0;
        for (; i + MR <= M; i += MR) memcpy(to + i * K + k * MR, from + i, MR * sizeof *to);
        memcpy(to + i * K + k * MR, from + i, (M - i) * sizeof *to);
        if (sums)
#pragma omp simd
            for (i = 0; i < M; i++) sums[i] += from[i];
    }
    return (matrix){to, MR, 1};
}

/* A product, and what is done with each part of C when it is complete and still in cache. */
typedef struct product {
    size_t M, N, K;
    operand a, b;
    rt_block c; /* [M, N] */
    /* of [rows, cols] of C from (i, j) on, which lie as floats at c */
    void (*epilogue)(const struct product *p, float *c, size_t ldc, size_t i, size_t j, size_t rows,
                     size_t cols);
    rt_block bias; /* [N] */
    rt_block pre;  /* [M, N] */
    rt_block y;    /* [M, N] */
    rt_block sums; /* [M] = the sums of a's rows, if asked for; a is then transposed */
    vit_gelu form; /* of the epilogue */
} product;

/* Tiles of the busiest thread if `down` x `across` threads share them. */
static inline size_t busiest(size_t tiles_down, size_t tiles_across, size_t down, size_t across) {
    return (tiles_down + down - 1) / down * ((tiles_across + across - 1) / across);
}

static void multiply_own(rt_rank *rank, const product *p, int threads) {
    const size_t blocks = (p->K + KC - 1) / KC, kc = (p->K + blocks - 1) / blocks;
    const int unpacked = !p->a.transposed && p->a.ld % ALIASED;
    float *const c = p->c.data, *const all_sums = p->sums.data;
    const size_t nc = min_size(round_up(p->N, NR), PANELS / kc / NR * NR + NR);
    const size_t mc = unpacked ? MR : MC, a_count = unpacked ? 0 : MC * (kc + VL);
    const size_t tiles = (p->M + MR - 1) / MR;
    float *memory = scratch(rank, 2 * nc * kc, a_count);
    if (!memory) return;

#pragma omp parallel num_threads(threads)
    {
        const size_t thread = (size_t)omp_get_thread_num(), n = (size_t)omp_get_num_threads();
        size_t across = 1; /* of the threads stand side by side, so that the busiest has the fewest tiles */
        for (size_t c = 2; n % c == 0; c *= 2)
            if (busiest(tiles, nc / NR, n / c, c) < busiest(tiles, nc / NR, n / across, across)) across = c;
        const size_t down = n / across, my_row = thread / across, my_column = thread % across;
        const size_t i_begin = tiles * my_row / down * MR;
        const size_t i_end = min_size(tiles * (my_row + 1) / down * MR, p->M);
        float *packed = memory + 2 * nc * kc + thread * a_count;
        for (size_t block = 0, turn = 0; block < blocks; block++) {
            const size_t k = p->K * block / blocks, K = p->K * (block + 1) / blocks - k;
            for (size_t j0 = 0; j0 < p->N; j0 += nc, turn ^= 1) {
                /* Two buffers in turn: who packs the next one cannot overtake those who still read this. */
                float *panels = memory + turn * nc * kc;
                const size_t N = min_size(nc, p->N - j0), tiles_across = (N + NR - 1) / NR;
                const size_t j = tiles_across * my_column / across * NR;
                const size_t cols = min_size(tiles_across * (my_column + 1) / across * NR, N) - j;
                pack_panels(panels, in_place(&p->b, k, j0), K, N, thread, n);
#pragma omp barrier
                for (size_t i = i_begin; i < i_end; i += mc) {
                    const size_t rows = min_size(mc, i_end - i);
                    float *sums = all_sums && j0 == 0 && my_column == 0 ? all_sums + i : NULL;
                    if (sums && block == 0) memset(sums, 0, rows * sizeof *sums);
                    const matrix a =
                        unpacked ? in_place(&p->a, i, k) : pack_rows(packed, &p->a, i, k, rows, K, sums);
                    multiply_panels(c + i * p->N + j0 + j, p->N, a, a.transposed ? K : a.ld, panels + j * K,
                                    rows, cols, K, block > 0);
                    if (p->epilogue && block + 1 == blocks)
                        p->epilogue(p, c + i * p->N + j0 + j, p->N, i, j0 + j, rows, cols);
                }
            }
        }
    }
}

enum { STRIP = 64, NC = 256 }; /* of K, and columns of C, at a time, where operands have 16 bits */

/* Packs [K, cols <= NR] of a 16-bit B from element (k0, j0) on, as pack_panel does. */
static void widen_panel(float *to, const operand *b, size_t k0, size_t j0, size_t K, size_t cols) {
    const size_t width = panel_width(cols);
    float strip[NR * STRIP];
    for (size_t k = 0; !b->transposed && k < K; k++, to += width) {
        load(b->block, position(b, k0 + k, j0), cols, to);
        memset(to + cols, 0, (width - cols) * sizeof *to);
    }
    for (size_t k = 0; b->transposed && k < K; k += STRIP) {
        const size_t n = min_size(STRIP, K - k);
        for (size_t j = 0; j < cols; j++) load(b->block, position(b, k0 + k, j0 + j), n, strip + j * STRIP);
        pack_panel(to + k * width, (matrix){strip, STRIP, 1}, n, cols);
    }
}

/* With 16-bit operands and results. Sums stay in fp32 until they are complete: panels reach through all of
 * K, and each thread adds up MC x nc elements of C at a time in a buffer of its own. */
static void multiply_16(rt_rank *rank, const product *p, int threads) {
    const size_t blocks = (p->K + KC - 1) / KC, kc = (p->K + blocks - 1) / blocks;
    const size_t nc = min_size(min_size(round_up(p->N, NR), NC), PANELS / p->K / NR * NR + NR);
    const size_t tiles = (p->M + MR - 1) / MR, a_count = MC * (kc + VL), each = a_count + MC * (nc + 1);
    float *memory = scratch(rank, 2 * nc * p->K, each);
    if (!memory) return;

#pragma omp parallel num_threads(threads)
    {
        const size_t thread = (size_t)omp_get_thread_num(), n = (size_t)omp_get_num_threads();
        const size_t i_begin = tiles * thread / n * MR;
        const size_t i_end = min_size(tiles * (thread + 1) / n * MR, p->M);
        float *packed = memory + 2 * nc * p->K + thread * each, *c = packed + a_count, *sums = c + MC * nc;
        for (size_t j = 0, turn = 0; j < p->N; j += nc, turn ^= 1) {
            float *panels = memory + turn * nc * p->K; /* two in turn, as above */
            const size_t cols = min_size(nc, p->N - j);
            for (size_t block = 0; block < blocks; block++) {
                const size_t k = p->K * block / blocks, K = p->K * (block + 1) / blocks - k;
                for (size_t q = thread * NR; q < cols; q += n * NR)
                    widen_panel(panels + k * nc + q * K, &p->b, k, j + q, K, min_size(NR, cols - q));
            }
#pragma omp barrier
            for (size_t i = i_begin; i < i_end; i += MC) {
                const size_t rows = min_size(MC, i_end - i);
                const int adds_up = p->sums.data && j == 0;
                memset(sums, 0, rows * sizeof *sums);
                for (size_t block = 0; block < blocks; block++) {
                    const size_t k = p->K * block / blocks, K = p->K * (block + 1) / blocks - k;
                    const matrix a = pack_rows(packed, &p->a, i, k, rows, K, adds_up ? sums : NULL);
                    multiply_panels(c, nc, a, a.transposed ? K : a.ld, panels + k * nc, rows, cols, K,
                                    block > 0);
                }
                if (p->epilogue) p->epilogue(p, c, nc, i, j, rows, cols);
                store_rows(p->c, i * p->N + j, p->N, rows, cols, (float_rows){c, nc});
                if (adds_up) store(p->sums, i, rows, sums);
            }
        }
    }
}

#ifdef HAVE_OPENBLAS
enum { HAS_OPENBLAS = 1 };
/* Each thread multiplies its own rows: OpenBLAS itself stays on one thread, whatever other ranks do. */
static void multiply_openblas(const product *p, int threads) {
    const int a_transposed = p->a.transposed ? CblasTrans : CblasNoTrans;
    const int b_transposed = p->b.transposed ? CblasTrans : CblasNoTrans;
    const blasint N = (blasint)p->N, K = (blasint)p->K, lda = (blasint)p->a.ld, ldb = (blasint)p->b.ld;
#pragma omp parallel num_threads(threads)
    {
        const size_t thread = (size_t)omp_get_thread_num(), n = (size_t)omp_get_num_threads();
        const size_t i = p->M * thread / n, rows = p->M * (thread + 1) / n - i;
        if (rows) {
            cblas_sgemm(CblasRowMajor, a_transposed, b_transposed, (blasint)rows, N, K, 1,
                        in_place(&p->a, i, 0).at, lda, floats(p->b.block), ldb, 0, floats(p->c) + i * p->N,
                        N);
            if (p->epilogue) p->epilogue(p, floats(p->c) + i * p->N, p->N, i, 0, rows, p->N);
        }
    }
}
#else
enum { HAS_OPENBLAS = 0 }; /* and vit_cpu_matmul sees to it that nobody asks for it */
static void multiply_openblas(const product *p, int threads) {}
#endif

/* sums [cols] = the sum over the rows of x [rows, cols] */
static void sum_rows(rt_rank *rank, rt_block sums, rt_block x, size_t rows, size_t cols) {
    enum { COLS = 512 };
#pragma omp parallel for num_threads(team(rank, 0.2 * rows * cols)) schedule(static)
    for (size_t j0 = 0; j0 < cols; j0 += COLS) {
        const size_t n = min_size(COLS, cols - j0);
        float wide_sum[COLS], wide[COLS], *sum = room(sums, j0, wide_sum);
        memset(sum, 0, n * sizeof *sum);
        for (size_t i0 = 0; i0 < rows; i0 += ROWS) {
            float chunk[COLS] = {0};
            for (size_t i = i0; i < min_size(i0 + ROWS, rows); i++) {
                const float *row = load(x, i * cols + j0, n, wide);
#pragma omp simd
                for (size_t j = 0; j < n; j++) chunk[j] += row[j];
            }
#pragma omp simd
            for (size_t j = 0; j < n; j++) sum[j] += chunk[j];
        }
        store(sums, j0, n, sum);
    }
}

/* 16-bit operands are for our own product: OpenBLAS has none for them. */
static void multiply(rt_rank *rank, const product *p) {
    const int threads = team(rank, (double)p->M * (double)p->N * (double)p->K / 40);
    if (p->c.type != RT_FP32) {
        multiply_16(rank, p, threads);
    } else if (((cpu_state *)rank->device)->matmul == VIT_MATMUL_OWN) {
        multiply_own(rank, p, threads);
    } else {
        multiply_openblas(p, threads);
        if (p->sums.data) sum_rows(rank, p->sums, p->a.block, p->K, p->M);
    }
}

/* ------------------------------------------------------------------------------------------------- linear */

/* Buffers of NC floats are for 16-bit blocks, of which there are never more columns at once. */
static void add_bias(const product *p, float *c, size_t ldc, size_t i0, size_t j0, size_t rows, size_t cols) {
    float wide[NC];
    const float *bias = load(p->bias, j0, cols, wide);
    for (size_t i = 0; i < rows; i++, c += ldc) {
#pragma omp simd
        for (size_t j = 0; j < cols; j++) c[j] += bias[j];
    }
}

INLINE void bias_then_gelu(const vit_gelu form, const product *p, float *pre, size_t ldc, size_t i0,
                           size_t j0, size_t rows, size_t cols) {
    float wide[NC], wide_y[NC];
    const float *bias = load(p->bias, j0, cols, wide);
    for (size_t i = i0; i < i0 + rows; i++, pre += ldc) {
        float *y = room(p->y, i * p->N + j0, wide_y);
#pragma omp simd
        for (size_t j = 0; j < cols; j++) {
            pre[j] += bias[j];
            float derivative;
            y[j] = gelu(form, pre[j], &derivative);
        }
        store(p->y, i * p->N + j0, cols, y);
    }
}

static void add_bias_then_gelu(const product *p, float *pre, size_t ldc, size_t i0, size_t j0, size_t rows,
                               size_t cols) {
    if (p->form == VIT_GELU_ERF)
        bias_then_gelu(VIT_GELU_ERF, p, pre, ldc, i0, j0, rows, cols);
    else
        bias_then_gelu(VIT_GELU_TANH, p, pre, ldc, i0, j0, rows, cols);
}

/* ... and y = gelu(pre) once more, which costs little beside its derivative. */
INLINE void times_derivative(const vit_gelu form, const product *p, float *c, size_t ldc, size_t i0,
                             size_t j0, size_t rows, size_t cols) {
    float wide[NC], wide_y[NC];
    for (size_t i = i0; i < i0 + rows; i++, c += ldc) {
        const float *pre = load(p->pre, i * p->N + j0, cols, wide);
        float *y = room(p->y, i * p->N + j0, wide_y);
#pragma omp simd
        for (size_t j = 0; j < cols; j++) {
            float derivative;
            y[j] = gelu(form, pre[j], &derivative);
            c[j] *= derivative;
        }
        store(p->y, i * p->N + j0, cols, y);
    }
}

static void times_gelu_derivative(const product *p, float *c, size_t ldc, size_t i0, size_t j0, size_t rows,
                                  size_t cols) {
    if (p->form == VIT_GELU_ERF)
        times_derivative(VIT_GELU_ERF, p, c, ldc, i0, j0, rows, cols);
    else
        times_derivative(VIT_GELU_TANH, p, c, ldc, i0, j0, rows, cols);
}

/* y = x w^T + b, or pre = x w^T + b, y = gelu(pre) */
static void linear_forward(rt_stream *s, rt_block y, rt_block pre, rt_block x, rt_block w, rt_block b,
                           size_t rows, size_t in, size_t out, vit_gelu form) {
    product p = {rows,      out,         in, {x, in, 0}, {w, in, 1}, .c = y, .epilogue = add_bias,
                 .bias = b, .form = form};
    if (pre.data) p.c = pre, p.y = y, p.epilogue = add_bias_then_gelu;
    multiply(s->rank, &p);
}

/* y = x w^T + b:  dw = dy^T x, db = sum over rows of dy, dx = dy w; where x = gelu(pre), which that product
 * computes again, dx is that times gelu'(pre) */
static void linear_backward(rt_stream *s, rt_block dx, rt_block dw, rt_block db, rt_block dy, rt_block x,
                            rt_block w, rt_block pre, size_t rows, size_t in, size_t out, vit_gelu form) {
    const product weights = {out, in, rows, {dy, out, 1}, {x, in, 0}, .c = dw, .sums = db};
    product input = {rows, in, out, {dy, out, 0}, {w, in, 0}, .c = dx, .form = form};
    if (pre.data) input.pre = pre, input.y = x, input.epilogue = times_gelu_derivative;
    if (dx.data) multiply(s->rank, &input);
    multiply(s->rank, &weights);
}

/* --------------------------------------------------------------------------------- residual and layernorm */

static float branch_factor(rt_block keys, size_t b, double rate, uint64_t salt) {
    return rate > 0 ? (float)vit_drop_path_factor(((uint64_t *)keys.data)[b], salt, rate) : 1;
}

/* n elements: out = x + k branch from `at` on, of x from x_at on; without an x, k branch. */
static void add_branch(rt_block out, rt_block x, rt_block branch, size_t at, size_t x_at, size_t n, float k) {
    float wide[3][BLOCK];
    for (size_t i0 = 0; i0 < n; i0 += BLOCK) {
        const size_t m = min_size(BLOCK, n - i0);
        const float *from = load(branch, at + i0, m, wide[0]);
        const float *input = x.data ? load(x, x_at + i0, m, wide[1]) : NULL;
        float *to = room(out, at + i0, wide[2]);
        if (input) {
#pragma omp simd
            for (size_t i = 0; i < m; i++) to[i] = input[i] + k * from[i];
        } else {
#pragma omp simd
            for (size_t i = 0; i < m; i++) to[i] = k * from[i];
        }
        store(out, at + i0, m, to);
    }
}

static void residual_forward(rt_stream *s, rt_block out, rt_block x, rt_block branch, rt_block keys, size_t B,
                             size_t count, size_t x_stride, double rate, uint64_t salt) {
    const size_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(team(s->rank, 0.3 * B * count)) schedule(static)
    for (size_t block = 0; block < B * blocks; block++) {
        const size_t b = block / blocks, i0 = block % blocks * BLOCK;
        add_branch(out, x, branch, b * count + i0, b * x_stride + i0, min_size(BLOCK, count - i0),
                   branch_factor(keys, b, rate, salt));
    }
}

/* out = x + k_b branch:  dbranch = k_b dout, which is the same without an x */
static void residual_backward(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B,
                              size_t count, double rate, uint64_t salt) {
    residual_forward(s, dbranch, (rt_block){0}, dout, keys, B, count, 0, rate, salt);
}

/* Row by row; without a branch, LayerNorm of x. */
static void residual_layernorm_forward(rt_stream *s, rt_block y_, rt_block mean, rt_block rstd, rt_block out,
                                       rt_block x_, rt_block branch, rt_block keys, rt_block gamma_,
                                       rt_block beta_, size_t B, size_t Q, size_t x_stride, size_t dim,
                                       double eps, double rate, uint64_t salt) {
    float *memory = scratch(s->rank, 2 * dim, 2 * dim);
    if (!memory) return;
    const float *gamma = load(gamma_, 0, dim, memory), *beta = load(beta_, 0, dim, memory + dim);
#pragma omp parallel for num_threads(team(s->rank, 0.4 * B * Q * dim)) schedule(static)
    for (size_t i = 0; i < B * Q; i++) {
        float *wide = memory + 2 * dim * (1 + (size_t)omp_get_thread_num());
        if (branch.data)
            add_branch(out, x_, branch, i * dim, i / Q * x_stride + i % Q * dim, dim,
                       branch_factor(keys, i / Q, rate, salt));
        const float *x = load(branch.data ? out : x_, i * dim, dim, wide);
        float *y = room(y_, i * dim, wide + dim), sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t j = 0; j < dim; j++) sum += x[j];
        const float m = sum / (float)dim;
#pragma omp simd reduction(+ : squares)
        for (size_t j = 0; j < dim; j++) squares += (x[j] - m) * (x[j] - m);
        const float r = 1 / sqrtf(squares / (float)dim + (float)eps);
#pragma omp simd
        for (size_t j = 0; j < dim; j++) y[j] = (x[j] - m) * r * gamma[j] + beta[j];
        store(y_, i * dim, dim, y);
        floats(mean)[i] = m;
        floats(rstd)[i] = r;
    }
}

static void layernorm_forward(rt_stream *s, rt_block y, rt_block mean, rt_block rstd, rt_block x,
                              rt_block gamma, rt_block beta, size_t rows, size_t dim, double eps) {
    const rt_block none = {0};
    residual_layernorm_forward(s, y, mean, rstd, none, x, none, none, gamma, beta, 1, rows, 0, dim, eps, 0,
                               0);
}

/* n = (x - mean) rstd, y = n gamma + beta, with g = dy gamma:
 *     dx = rstd (g - mean(g) - n mean(g n)),  dgamma = sum over rows of dy n,  dbeta = sum over rows of dy
 * The rows are cut into up to CHUNKS chunks, whose sums are added in order. */
static void layernorm_backward(rt_stream *s, rt_block dx_, rt_block dgamma_, rt_block dbeta_,
                               rt_block residual_, rt_block dy_, rt_block x_, rt_block mean, rt_block rstd,
                               rt_block gamma_, size_t B, size_t T, size_t Q, size_t dim) {
    enum { CHUNKS = 64 };
    const size_t rows = B * T, chunk = rows < ROWS * CHUNKS ? ROWS : (rows + CHUNKS - 1) / CHUNKS;
    /* [chunk][dgamma, dbeta][dim], their sum, gamma; of each thread dy, x, dx, residual */
    float *sums = scratch(s->rank, dim * (2 * CHUNKS + 3), 4 * dim);
    if (!sums) return;
    float *total = sums + 2 * dim * CHUNKS, *threads = total + 3 * dim;
    const float *gamma = load(gamma_, 0, dim, total + 2 * dim);
#pragma omp parallel for num_threads(team(s->rank, 0.5 * rows * dim)) schedule(static)
    for (size_t i0 = 0; i0 < rows; i0 += chunk) {
        float *dgamma = sums + i0 / chunk * 2 * dim, *dbeta = dgamma + dim;
        memset(dgamma, 0, 2 * dim * sizeof *dgamma);
        for (size_t i = i0; i < min_size(i0 + chunk, rows); i++) {
            float *wide = threads + 4 * dim * (size_t)omp_get_thread_num();
            const float *dy = load(dy_, i * dim, dim, wide), *x = load(x_, i * dim, dim, wide + dim);
            const float m = floats(mean)[i], r = floats(rstd)[i];
            float *dx = room(dx_, i * dim, wide + 2 * dim), sum_g = 0, sum_gn = 0;
#pragma omp simd reduction(+ : sum_g, sum_gn)
            for (size_t j = 0; j < dim; j++) {
                const float n = (x[j] - m) * r, g = dy[j] * gamma[j];
                sum_g += g;
                sum_gn += g * n;
                dgamma[j] += dy[j] * n;
                dbeta[j] += dy[j];
            }
            const float mean_g = sum_g / (float)dim, mean_gn = sum_gn / (float)dim;
            if (residual_.data && i % T < Q)
                memcpy(dx, load(residual_, (i / T * Q + i % T) * dim, dim, wide + 3 * dim), dim * sizeof *dx);
            else
                memset(dx, 0, dim * sizeof *dx);
#pragma omp simd
            for (size_t j = 0; j < dim; j++)
                dx[j] += r * (dy[j] * gamma[j] - mean_g - (x[j] - m) * r * mean_gn);
            store(dx_, i * dim, dim, dx);
        }
    }
    sum_rows(s->rank, float_block(total), float_block(sums), (rows + chunk - 1) / chunk, 2 * dim);
    store(dgamma_, 0, dim, total);
    store(dbeta_, 0, dim, total + dim);
}

/* ---------------------------------------------------------------------------------------------- attention */

/* Each pair of an image and a head is the work of one thread, from start to end in its cache, by the tiles
 * of our own product. Saved are the probabilities p [B, H, Q, ld], rows padded to whole vectors with 0. */
static size_t attention_ld(size_t T) { return round_up(T, VL); }

static size_t attention_saved(size_t B, size_t T, size_t Q, size_t H, size_t hd) {
    return B * H * Q * attention_ld(T);
}

/* s = q k^T / sqrt(hd), p = softmax(s), out = p v */
static void attention_forward(rt_stream *s, rt_block out, rt_block saved, rt_block qkv, size_t B, size_t T,
                              size_t Q, size_t H, size_t hd) {
    const size_t D = H * hd, ld = attention_ld(T), each = hd * ld + T * round_up(hd, VL) + 4 * T * hd;
    const float scale = 1 / sqrtf((float)hd);
    float *memory = scratch(s->rank, 0, each);
    if (!memory) return;
#pragma omp parallel for num_threads(team(s->rank, 0.07 * B * T * Q * D)) schedule(static)
    for (size_t pair = 0; pair < B * H; pair++) {
        const size_t b = pair / H, h = pair % H;
        const size_t at = b * T * 3 * D + h * hd, out_at = b * Q * D + h * hd;
        float *kt_panels = memory + (size_t)omp_get_thread_num() * each, *v_panels = kt_panels + hd * ld;
        float *wide = v_panels + T * round_up(hd, VL); /* q, k, v, out, where they have 16 bits */
        const float_rows q = load_rows(qkv, at, 3 * D, Q, hd, wide);
        const float_rows k = load_rows(qkv, at + D, 3 * D, T, hd, wide + T * hd);
        const float_rows v = load_rows(qkv, at + 2 * D, 3 * D, T, hd, wide + 2 * T * hd);
        const float_rows o = room_for_rows(out, out_at, D, hd, wide + 3 * T * hd);
        pack_panels(kt_panels, (matrix){k.at, k.ld, 1}, hd, T, 0, 1);
        pack_panels(v_panels, (matrix){v.at, v.ld, 0}, T, hd, 0, 1);
        for (size_t i = 0; i < Q; i += MR) {
            const size_t rows = min_size(MR, Q - i);
            float *p = floats(saved) + (pair * Q + i) * ld;
            multiply_panels(p, ld, (matrix){q.at + i * q.ld, q.ld, 0}, 0, kt_panels, rows, ld, hd, 0);
            for (size_t r = 0; r < rows; r++) softmax(p + r * ld, T, scale);
            multiply_panels(o.at + i * o.ld, o.ld, (matrix){p, ld, 0}, 0, v_panels, rows, hd, T, 0);
        }
        store_rows(out, out_at, D, Q, hd, o);
    }
}

/* out = p v:             dv = p^T dout, dp = dout v^T
 * p = softmax(s):        ds = p (dp - sum over the row of p dp)
 * s = q k^T / sqrt(hd):  dq = ds k / sqrt(hd), dk = ds^T q / sqrt(hd) */
static void attention_backward(rt_stream *s, rt_block dqkv, rt_block dout, rt_block qkv, rt_block out,
                               rt_block saved, size_t B, size_t T, size_t Q, size_t H, size_t hd) {
    const size_t D = H * hd, ld = attention_ld(T), panels = T * round_up(hd, VL);
    const size_t each = Q * ld + hd * ld + 3 * panels + 7 * T * hd;
    const float scale = 1 / sqrtf((float)hd);
    float *memory = scratch(s->rank, 0, each);
    if (!memory) return;
#pragma omp parallel for num_threads(team(s->rank, 0.14 * B * T * Q * D)) schedule(static)
    for (size_t pair = 0; pair < B * H; pair++) {
        const size_t b = pair / H, h = pair % H;
        const size_t at = b * T * 3 * D + h * hd;
        const float *p = floats(saved) + pair * Q * ld;
        float *ds = memory + (size_t)omp_get_thread_num() * each, *vt_panels = ds + Q * ld;
        float *k_panels = vt_panels + hd * ld, *q_panels = k_panels + panels, *do_panels = q_panels + panels;
        float *wide = do_panels + panels; /* what follows, [T, hd] each, where it has 16 bits */
        const float_rows q = load_rows(qkv, at, 3 * D, Q, hd, wide);
        const float_rows k = load_rows(qkv, at + D, 3 * D, T, hd, wide + T * hd);
        const float_rows v = load_rows(qkv, at + 2 * D, 3 * D, T, hd, wide + 2 * T * hd);
        const float_rows d_o = load_rows(dout, b * Q * D + h * hd, D, Q, hd, wide + 3 * T * hd);
        const float_rows dq = room_for_rows(dqkv, at, 3 * D, hd, wide + 4 * T * hd);
        const float_rows dk = room_for_rows(dqkv, at + D, 3 * D, hd, wide + 5 * T * hd);
        const float_rows dv = room_for_rows(dqkv, at + 2 * D, 3 * D, hd, wide + 6 * T * hd);
        pack_panels(vt_panels, (matrix){v.at, v.ld, 1}, hd, T, 0, 1);
        pack_panels(k_panels, (matrix){k.at, k.ld, 0}, T, hd, 0, 1);
        pack_panels(q_panels, (matrix){q.at, q.ld, 0}, Q, hd, 0, 1);
        pack_panels(do_panels, (matrix){d_o.at, d_o.ld, 0}, Q, hd, 0, 1);
        for (size_t i = Q; i < T; i++) memset(dq.at + i * dq.ld, 0, hd * sizeof(float));
        for (size_t i = 0; i < Q; i += MR) {
            const size_t rows = min_size(MR, Q - i);
            multiply_panels(ds + i * ld, ld, (matrix){d_o.at + i * d_o.ld, d_o.ld, 0}, 0, vt_panels, rows, ld,
                            hd, 0); /* dp */
            for (size_t r = i; r < i + rows; r++) {
                const float *pr = p + r * ld;
                float *dsr = ds + r * ld, sum = 0;
#pragma omp simd reduction(+ : sum)
                for (size_t j = 0; j < ld; j++) sum += pr[j] * dsr[j];
#pragma omp simd
                for (size_t j = 0; j < ld; j++) dsr[j] = pr[j] * (dsr[j] - sum) * scale;
            }
            multiply_panels(dq.at + i * dq.ld, dq.ld, (matrix){ds + i * ld, ld, 0}, 0, k_panels, rows, hd, T,
                            0);
        }
        multiply_panels(dv.at, dv.ld, (matrix){p, ld, 1}, 1, do_panels, T, hd, Q, 0);
        multiply_panels(dk.at, dk.ld, (matrix){ds, ld, 1}, 1, q_panels, T, hd, Q, 0);
        store_rows(dqkv, at, 3 * D, T, hd, dq);
        store_rows(dqkv, at + D, 3 * D, T, hd, dk);
        store_rows(dqkv, at + 2 * D, 3 * D, T, hd, dv);
    }
}

/* --------------------------------------------------------------------------------------- the other layers */

static void patchify_forward(rt_stream *s, rt_block patches, rt_block images, size_t B, size_t C,
                             size_t height, size_t width, size_t P) {
    const size_t down = height / P, across = width / P;
#pragma omp parallel for num_threads(team(s->rank, 0.5 * patches.count)) schedule(static)
    for (size_t row = 0; row < B * down; row++) {
        const size_t b = row / down, top = row % down * P;
        size_t to = row * across * C * P * P;
        for (size_t patch = 0; patch < across; patch++)
            for (size_t c = 0; c < C; c++)
                for (size_t y = top; y < top + P; y++, to += P)
                    store(patches, to, P, floats(images) + ((b * C + c) * height + y) * width + patch * P);
    }
}

static void embedding_forward(rt_stream *s, rt_block out, rt_block x, rt_block cls, rt_block pos, size_t B,
                              size_t N, size_t D) {
    float *memory = scratch(s->rank, 0, 3 * D);
    if (!memory) return;
#pragma omp parallel for num_threads(team(s->rank, 0.3 * out.count)) schedule(static)
    for (size_t row = 0; row < B * (N + 1); row++) {
        const size_t b = row / (N + 1), t = row % (N + 1);
        float *wide = memory + 3 * D * (size_t)omp_get_thread_num();
        const float *from = t ? load(x, (b * N + t - 1) * D, D, wide) : load(cls, 0, D, wide);
        const float *p = load(pos, t * D, D, wide + D);
        float *to = room(out, row * D, wide + 2 * D);
#pragma omp simd
        for (size_t j = 0; j < D; j++) to[j] = from[j] + p[j];
        store(out, row * D, D, to);
    }
}

/* out = (cls | x) + pos:  dpos = sum over images of dout, dcls = its first token, dx = dout of the others */
static void embedding_backward(rt_stream *s, rt_block dx, rt_block dcls, rt_block dpos, rt_block dout,
                               size_t B, size_t N, size_t D) {
    const size_t row = D * rt_type_size(dout.type);
    sum_rows(s->rank, dpos, dout, B, (N + 1) * D);
    memcpy(dcls.data, dpos.data, row);
    for (size_t b = 0; b < B; b++)
        memcpy((char *)dx.data + b * N * row, (char *)dout.data + (b * (N + 1) + 1) * row, N * row);
}

/* --------------------------------------------------------------------------------------------------- loss */

/* loss = sum over classes of target (log(sum of exp(logits)) - logit), where the targets add up to 1 */
static void cross_entropy_forward(rt_stream *s, rt_block losses, rt_block probabilities, rt_block logits,
                                  rt_block labels, size_t B, size_t V, double smoothing) {
    float *wide = scratch(s->rank, 0, V);
    if (!wide) return;
#pragma omp parallel for num_threads(team(s->rank, 1.0 * B * V)) schedule(static)
    for (size_t b = 0; b < B; b++) {
        const float *x = load(logits, b * V, V, wide + V * (size_t)omp_get_thread_num()),
                    most = largest(x, V);
        const double own = (double)(x[((const int32_t *)labels.data)[b]] - most);
        const double log_sum =
            log((double)softmax(memcpy(floats(probabilities) + b * V, x, V * sizeof *x), V, 1));
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t j = 0; j < V; j++) sum += (double)(x[j] - most);
        floats(losses)[b] = (float)(log_sum - (1 - smoothing) * own - smoothing * sum / (double)V);
    }
}

/* p = softmax(logits), loss as above:  dlogits = p - target, times the scale */
static void cross_entropy_backward(rt_stream *s, rt_block dlogits, rt_block probabilities, rt_block labels,
                                   rt_block scalars, size_t B, size_t V, double smoothing, double scale) {
    if (scalars.data) scale *= ((const double *)scalars.data)[VIT_LOSS_SCALE];
    const double everywhere = smoothing / (double)V;
    float *wide = scratch(s->rank, 0, V);
    if (!wide) return;
#pragma omp parallel for num_threads(team(s->rank, 0.3 * B * V)) schedule(static)
    for (size_t b = 0; b < B; b++) {
        const float *p = floats(probabilities) + b * V;
        const int32_t label = ((const int32_t *)labels.data)[b];
        float *d = room(dlogits, b * V, wide + V * (size_t)omp_get_thread_num());
#pragma omp simd
        for (size_t j = 0; j < V; j++) d[j] = (float)scale * (p[j] - (float)everywhere);
        d[label] = (float)(scale * ((double)p[label] - everywhere - (1 - smoothing)));
        store(dlogits, b * V, V, d);
    }
}

static void loss_accumulate(rt_stream *s, rt_block total_, rt_block losses, size_t B) {
    const double most = 0x1p20; /* what is larger, or not a number, counts as not finite */
    int64_t *total = total_.data;
    double sum = 0;
    for (size_t b = 0; b < B; b++) {
        const double share = (double)floats(losses)[b] / (double)B;
        if (fabs(share) < most)
            sum += share;
        else
            total[1]++;
    }
    if (fabs(sum) < most)
        total[0] += llround(sum / VIT_LOSS_UNIT);
    else
        total[1]++;
}

/* --------------------------------------------------------------------------- optimizers and gradient norm */

typedef struct {
    float factor, step; /* of the gradient; of what is subtracted */
    float keep,
        decay; /* weight decay: factor of the parameter (AdamW), or multiple added to the gradient (SGD) */
    float momentum, beta2, rest1, rest2, root_correction2, eps; /* rest: 1 - beta */
} optimizer_constants;

/* Updates n elements, a multiple of VIT_ALIGNMENT, by vectors alone: no element is ever in a loop's
 * remainder. x: parameters (their master), then the optimizer's state, then gradients. */
typedef void optimizer_update(float *const *x, size_t n, const optimizer_constants *c);

static void adamw_update(float *const *x, size_t n, const optimizer_constants *c) {
    float *p = x[0], *m = x[1], *v = x[2], *grad = x[3];
    const optimizer_constants o = *c;
    for (size_t i = 0; i < n; i += VIT_ALIGNMENT)
#pragma omp simd
        for (size_t j = i; j < i + VIT_ALIGNMENT; j++) {
            const float g = grad[j] * o.factor;
            m[j] += (g - m[j]) * o.rest1;
            v[j] = v[j] * o.beta2 + g * g * o.rest2;
            p[j] = p[j] * o.keep - o.step * (m[j] / (sqrtf(v[j]) / o.root_correction2 + o.eps));
        }
}

static void sgd_update(float *const *x, size_t n, const optimizer_constants *c) {
    float *p = x[0], *m = x[1], *grad = x[2];
    const optimizer_constants o = *c;
    for (size_t i = 0; i < n; i += VIT_ALIGNMENT)
#pragma omp simd
        for (size_t j = i; j < i + VIT_ALIGNMENT; j++) {
            m[j] = m[j] * o.momentum + (grad[j] * o.factor + o.decay * p[j]);
            p[j] -= o.step * m[j];
        }
}

/* Updates elements [first, last): x[0] of the parameters, x[1 .. k - 2] of the optimizer's state. What
 * does not fill a vector at the end, in copies that do. */
static void optimize(rt_rank *rank, rt_block param, float *const *x, size_t k, rt_block grad, size_t first,
                     size_t last, optimizer_update *update, const optimizer_constants *c) {
    const size_t whole = last - (last - first) % VIT_ALIGNMENT;
#pragma omp parallel for num_threads(team(rank, 1.0 * (last - first))) schedule(static)
    for (size_t i = first; i < whole; i += BLOCK) {
        const size_t n = min_size(BLOCK, whole - i);
        float *at[4], wide[BLOCK];
        for (size_t a = 0; a < k - 1; a++) at[a] = x[a] + i;
        at[k - 1] = (float *)load(grad, i, n, wide);
        update(at, n, c);
        store(param, i, n, at[0]);
    }
    float wide[VIT_ALIGNMENT], copy[4][VIT_ALIGNMENT] = {{0}};
    float *const copies[4] = {copy[0], copy[1], copy[2], copy[3]};
    const size_t rest = last - whole;
    for (size_t a = 0; a < k - 1; a++) memcpy(copy[a], x[a] + whole, rest * sizeof(float));
    memcpy(copy[k - 1], load(grad, whole, rest, wide), rest * sizeof(float));
    update(copies, VIT_ALIGNMENT, c);
    for (size_t a = 0; a < k - 1; a++) memcpy(x[a] + whole, copy[a], rest * sizeof(float));
    store(param, whole, rest, copy[0]);
}

static void adamw(rt_stream *s, rt_block param, rt_block master, rt_block exp_avg, rt_block exp_avg_sq,
                  rt_block grad, rt_block scalars, size_t decayed, double rate, const vit_adamw_options *o) {
    const double *d = scalars.data, lr = rate * d[VIT_LEARNING_RATE];
    float *const x[] = {master.data ? master.data : param.data, exp_avg.data, exp_avg_sq.data};
    optimizer_constants c = {.factor = (float)d[VIT_GRADIENT_FACTOR],
                             .step = (float)(lr / d[VIT_BIAS_CORRECTION1]),
                             .keep = (float)(1 - lr * o->weight_decay),
                             .beta2 = (float)o->beta2,
                             .rest1 = (float)(1 - o->beta1),
                             .rest2 = (float)(1 - o->beta2),
                             .root_correction2 = (float)sqrt(d[VIT_BIAS_CORRECTION2]),
                             .eps = (float)o->eps};
    if (d[VIT_GRADIENT_FACTOR] == 0) return;
    optimize(s->rank, param, x, 4, grad, 0, decayed, adamw_update, &c);
    c.keep = 1;
    optimize(s->rank, param, x, 4, grad, decayed, param.count, adamw_update, &c);
}

static void sgd(rt_stream *s, rt_block param, rt_block master, rt_block momentum, rt_block grad,
                rt_block scalars, size_t decayed, double rate, const vit_sgd_options *o) {
    const double *d = scalars.data;
    float *const x[] = {master.data ? master.data : param.data, momentum.data};
    optimizer_constants c = {.factor = (float)d[VIT_GRADIENT_FACTOR],
                             .step = (float)(rate * d[VIT_LEARNING_RATE]),
                             .decay = (float)o->weight_decay,
                             .momentum = (float)o->momentum};
    if (d[VIT_GRADIENT_FACTOR] == 0) return;
    optimize(s->rank, param, x, 3, grad, 0, decayed, sgd_update, &c);
    c.decay = 0;
    optimize(s->rank, param, x, 3, grad, decayed, param.count, sgd_update, &c);
}

/* Adds the squares of VIT_GRANULE floats, each of which is exact in double, to the counters. */
static inline void count_granule(int64_t *counters, const float *x) {
    double sum[VIT_GRANULE];
    for (int i = 0; i < VIT_GRANULE; i++) sum[i] = (double)x[i] * (double)x[i];
    for (int half = VIT_GRANULE / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    if (sum[0] == 0) return;
    uint64_t bits;
    memcpy(&bits, sum, sizeof bits);
    const int exponent = (int)(bits >> 52 & 0x7FF) - 1023; /* without the sign, which a NaN may have */
    if (exponent == 1024) {
        counters[VIT_NORM_NOT_FINITE]++;
        return;
    }
    const uint64_t significand = (bits & (((uint64_t)1 << 52) - 1)) | (uint64_t)1 << 52;
    int64_t *at = counters + 2 * (exponent - VIT_NORM_MIN_EXPONENT);
    at[0] += (int64_t)(significand & ((1 << 26) - 1));
    at[1] += (int64_t)(significand >> 26);
}

static void sum_of_squares(rt_stream *s, rt_block counters, rt_block x) {
    const size_t whole = x.count / VIT_GRANULE * VIT_GRANULE;
    float rest[VIT_GRANULE] = {0}, wide_rest[VIT_GRANULE];
    memcpy(rest, load(x, whole, x.count - whole, wide_rest), (x.count - whole) * sizeof *rest);
    count_granule(counters.data, rest);
#pragma omp parallel num_threads(team(s->rank, 0.5 * x.count))
    {
        int64_t mine[VIT_NORM_COUNTERS] = {0};
        float wide[BLOCK];
#pragma omp for schedule(static)
        for (size_t i = 0; i < whole; i += BLOCK) {
            const size_t n = min_size(BLOCK, whole - i);
            const float *from = load(x, i, n, wide);
            for (size_t j = 0; j < n; j += VIT_GRANULE) count_granule(mine, from + j);
        }
        for (size_t i = 0; i < VIT_NORM_COUNTERS; i++)
            if (mine[i]) {
#pragma omp atomic
                ((int64_t *)counters.data)[i] += mine[i];
            }
    }
}

static void decide_step(rt_stream *s, rt_block scalars, rt_block scaler, rt_block counters_, double divisor,
                        double clip, const vit_adamw_options *o) {
    const int64_t *counters = counters_.data;
    double sum = 0;
    for (int i = 0; i < VIT_NORM_EXPONENTS; i++) {
        const double significands = (double)counters[2 * i] + 0x1p26 * (double)counters[2 * i + 1];
        sum += ldexp(significands, i + VIT_NORM_MIN_EXPONENT - 52);
    }
    vit_step_rule(scalars.data, scaler.data, sum, counters[VIT_NORM_NOT_FINITE] == 0, divisor, clip, o);
}

/* -------------------------------------------------------------------------------------- vector arithmetic */

static void fill(rt_stream *s, rt_block x, int byte) { memset(x.data, byte, x.count * rt_type_size(x.type)); }

static void cast(rt_stream *s, rt_block to, rt_block from) {
    const size_t size = rt_type_size(to.type);
    if (size > sizeof(float)) { /* a copy */
        memcpy(to.data, from.data, to.count * size);
        return;
    }
#pragma omp parallel for num_threads(team(s->rank, 0.4 * to.count)) schedule(static)
    for (size_t i = 0; i < to.count; i += BLOCK) {
        const size_t n = min_size(BLOCK, to.count - i);
        float wide[BLOCK];
        store(to, i, n, load(from, i, n, wide));
    }
}

static void add(rt_stream *s, rt_block x, rt_block y) {
#pragma omp parallel for num_threads(team(s->rank, 0.4 * x.count)) schedule(static)
    for (size_t i = 0; i < x.count; i += BLOCK) {
        const size_t n = min_size(BLOCK, x.count - i);
        float wide_x[BLOCK], wide_y[BLOCK], *to = (float *)load(x, i, n, wide_x);
        const float *from = load(y, i, n, wide_y);
#pragma omp simd
        for (size_t j = 0; j < n; j++) to[j] += from[j];
        store(x, i, n, to);
    }
}

/* 16-bit numbers, several of which are added up in fp32. */
static void sum_buffers_16(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from,
                           size_t n_from) {
#pragma omp parallel for num_threads(team(s->rank, 0.1 * from->count * (n_to + n_from))) schedule(static)
    for (size_t at = 0; at < from->count; at += BLOCK) {
        float sum[BLOCK], wide[BLOCK];
        const size_t n = min_size(BLOCK, from->count - at);
        load(from[0], at, n, sum);
        for (size_t k = 1; k < n_from; k++) {
            const float *x = load(from[k], at, n, wide);
#pragma omp simd
            for (size_t j = 0; j < n; j++) sum[j] += x[j];
        }
        for (size_t k = 0; k < n_to; k++) store(to[k], at, n, sum);
    }
}

/* Sums block by block: each is complete before any `to` is written, which may be one of `from`. */
static void sum_buffers(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from, size_t n_from) {
    const size_t bytes = from->count * rt_type_size(from->type);
    if (n_from > 1 && rt_type_size(from->type) == 2) {
        sum_buffers_16(s, to, n_to, from, n_from);
        return;
    }
#pragma omp parallel for num_threads(team(s->rank, 0.05 * bytes * (n_to + n_from))) schedule(static)
    for (size_t at = 0; at < bytes; at += BLOCK) {
        union {
            float f[BLOCK / sizeof(float)];
            uint64_t i[BLOCK / sizeof(uint64_t)]; /* sums wrap */
        } sum;
        const size_t n = min_size(BLOCK, bytes - at);
        memcpy(&sum, (char *)from->data + at, n);
        for (size_t k = 1; k < n_from; k++) {
            const void *x = (char *)from[k].data + at;
            if (from->type == RT_FP32)
#pragma omp simd
                for (size_t j = 0; j < n / sizeof(float); j++) sum.f[j] += ((const float *)x)[j];
            else
#pragma omp simd
                for (size_t j = 0; j < n / sizeof(uint64_t); j++) sum.i[j] += ((const uint64_t *)x)[j];
        }
        for (size_t k = 0; k < n_to; k++) memcpy((char *)to[k].data + at, &sum, n);
    }
}

/* ---------------------------------------------------------------------------------------------- the table */

int vit_cpu_matmul(rt_rank *rank, vit_matmul choice, error_text *e) {
    cpu_state *state = rank->device;
    if (choice == VIT_MATMUL_OPENBLAS && !HAS_OPENBLAS)
        return error_set(e, "matrix product by OpenBLAS: this program was built without it");
    if (choice == VIT_MATMUL_AUTO)
        choice = HAS_OPENBLAS && !OWN_IS_FASTEST ? VIT_MATMUL_OPENBLAS : VIT_MATMUL_OWN;
    state->matmul = choice;
    snprintf(state->description, sizeof state->description, "%s", OWN_NAME);
#ifdef HAVE_OPENBLAS
    if (choice == VIT_MATMUL_OPENBLAS)
        snprintf(state->description, sizeof state->description, "OpenBLAS, %s", openblas_get_corename());
#endif
    return 0;
}

const char *vit_cpu_description(const rt_rank *rank) {
    return ((const cpu_state *)rank->device)->description;
}

static int cpu_open(rt_rank *rank, error_text *e) {
    rank->device = calloc(1, sizeof(cpu_state));
    if (!rank->device) return error_set(e, "rank %d: out of memory", rank->rank);
    rank->allocate = allocate;
    rank->release = release;
#ifdef HAVE_OPENBLAS
    openblas_set_num_threads(1); /* for calls from this thread: the device brings its own team */
#endif
    return vit_cpu_matmul(rank, VIT_MATMUL_AUTO, e);
}

static void cpu_close(rt_rank *rank) {
    cpu_state *state = rank->device;
    if (state) free(state->scratch);
    free(state);
    rank->device = NULL;
}

/* clang-format off */
const vit_device vit_cpu = {
    .name = "cpu", .types = 1u << RT_FP32 | 1u << RT_BF16 | 1u << RT_FP16,
    .open = cpu_open, .close = cpu_close,
    .copy_in = copy_in, .copy_out = copy_out,
    .linear_forward = linear_forward,               .linear_backward = linear_backward,
    .layernorm_forward = layernorm_forward,         .layernorm_backward = layernorm_backward,
    .attention_saved = attention_saved,
    .attention_forward = attention_forward,         .attention_backward = attention_backward,
    .residual_forward = residual_forward,           .residual_layernorm_forward = residual_layernorm_forward,
    .residual_backward = residual_backward,
    .patchify_forward = patchify_forward,
    .embedding_forward = embedding_forward,         .embedding_backward = embedding_backward,
    .cross_entropy_forward = cross_entropy_forward, .cross_entropy_backward = cross_entropy_backward,
    .loss_accumulate = loss_accumulate, .adamw = adamw, .sgd = sgd,
    .sum_of_squares = sum_of_squares, .decide_step = decide_step,
    .fill = fill, .cast = cast, .add = add, .sum_buffers = sum_buffers, .description = vit_cpu_description,
};
