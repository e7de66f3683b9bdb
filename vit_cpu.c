/* vit_cpu.c - the CPU device: every operation of vit.h's table, in fp32, on the threads of one rank.
 *
 *     cc -O3 -march=native -mprefer-vector-width=512 -std=gnu11 -fno-math-errno -fno-trapping-math -fopenmp \
 *        -c vit_cpu.c                       add -DHAVE_OPENBLAS, and -lopenblas when linking, to offer OpenBLAS
 *
 * Contents: ranks and memory, exp, softmax and GELU, the matrix product, linear, layernorm, attention, the other layers, loss,
 * optimizers and gradient norm, vector arithmetic, the table.
 *
 * Results do not depend on the number of threads (matrix products by OpenBLAS excepted): threads share out elements,
 * rows or tiles, each of which is computed in one way; where rows are summed up (biases, LayerNorm's parameters,
 * positions), the sum goes through chunks of rows that depend on the shape alone, added in order. So no reduction
 * over threads, and no loop whose vectorised part and remainder a thread boundary could shift.
 *
 * What it leaves out: other types than fp32, NUMA placement, head by head parallelism below one image and head.
 * Without -fopenmp it is correct on one thread.
 */
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

/* ---------------------------------------------------------------------------------------------- ranks and memory */

typedef struct {
    vit_matmul matmul; /* VIT_MATMUL_OWN or VIT_MATMUL_OPENBLAS */
    char description[96];
    float *scratch; /* as large as the neediest operation so far */
    size_t scratch_count;
} cpu_state;

enum { ROWS = 64, BLOCK = 4096 }; /* rows or elements that are never split between threads */

static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

/* Threads for an operation that takes one thread about so long: waking the others costs microseconds. */
static int team(const rt_rank *rank, double nanoseconds) { return nanoseconds < 20e3 ? 1 : rank->threads; }

static void *allocate(rt_rank *rank, size_t bytes) {
    const size_t page = (size_t)2 << 20, alignment = bytes < 2 * page ? 64 : page;
    if (bytes > SIZE_MAX - page) return NULL;
    bytes = round_up(bytes, alignment);
    void *memory = aligned_alloc(alignment, bytes);
    if (!memory) return NULL;
    if (alignment == page) madvise(memory, bytes, MADV_HUGEPAGE); /* advice: no harm where it is not taken */
    return memset(memory, 0, bytes);
}

static void release(rt_rank *rank, void *memory, size_t bytes) { free(memory); }

/* Scratch memory for one operation: `shared` floats and, behind them, `each` for every thread. It grows during the
 * first step and then stays. NULL and a failed world: no more memory. */
static float *scratch(rt_rank *rank, size_t shared, size_t each) {
    cpu_state *state = rank->device;
    size_t count = shared + each * (size_t)rank->threads;
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

/* ------------------------------------------------------------------------------------------------- exp, softmax, GELU */

/* Scalar functions without branches, which vectorise in `omp simd` loops. */

/* exp(x) for x <= 0, relative error below 1.3e-7; 0 below -87. x = n ln 2 + r, |r| <= ln 2 / 2; the polynomial is a
 * minimax fit of relative error 3e-9. Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. */
INLINE float exp_negative(float x) {
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 0.001381446246f;
    p = p * r + 0.008368780898f;
    p = p * r + 0.04166839431f;
    p = p * r + 0.166665201f;
    p = p * r + 0.4999999341f;
    p = p * (r * r) + r + 1;
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3F800000u; /* 2^n */
    memcpy(&power, &bits, sizeof power);
    return x < -87 ? 0 : p * power;
}

/* The standard normal distribution function Phi(x), absolute error below 7.5e-8, and *e = exp(-x^2/2). Where |x| < 1: x
 * times a polynomial in x^2. Outside: Phi(-t) = e R(t), where R(t) = exp(t^2/2) erfc(t / sqrt 2) / 2 decays slowly and is
 * well met by a rational function. Minimax fits: 1e-10 absolute, and 6e-8 relative for R as far as e is not 0. */
INLINE float normal_distribution(float x, float *e) {
    float t = fabsf(x), x2 = x * x;
    t = t > 16 ? 16 : t; /* the tail is 0 there; t^3 must not overflow */
    *e = exp_negative(-0.5f * x2);
    float a = -7.530324406e-6f;
    a = a * x2 + 1.131436991e-4f;
    a = a * x2 - 1.185984754e-3f;
    a = a * x2 + 9.973170956e-3f;
    a = a * x2 - 0.06649033235f;
    a = a * x2 + 0.3989422787f;
    float p = 0.02219589782f;
    p = p * t + 0.136755331f;
    p = p * t + 0.3891186407f;
    p = p * t + 0.499891735f;
    float q = 0.05563928779f;
    q = q * t + 0.3426875073f;
    q = q * t + 1.03301269f;
    q = q * t + 1.574962418f;
    q = q * t + 1;
    float tail = *e * (p / q), near = x * a + 0.5f, far = x < 0 ? tail : 1 - tail;
    return t < 1 ? near : far;
}

/* x Phi(x) = x (1 + erf(x / sqrt 2)) / 2 */
INLINE float gelu(float x) {
    float e;
    return x * normal_distribution(x, &e);
}

/* Phi(x) + x exp(-x^2/2) / sqrt(2 pi) */
INLINE float gelu_derivative(float x) {
    float e, phi = normal_distribution(x, &e);
    return phi + x * e * 0.398942280f;
}

/* The largest of x [n], in lanes: compilers take no reduction by maximum where there may be NaNs. */
static float largest(const float *x, size_t n) {
    enum { LANES = 16 };
    float lane[LANES];
    size_t j = 0;
    for (size_t l = 0; l < LANES; l++) lane[l] = x[0];
    for (; j + LANES <= n; j += LANES)
#pragma omp simd
        for (size_t l = 0; l < LANES; l++) lane[l] = x[j + l] > lane[l] ? x[j + l] : lane[l];
    for (; j < n; j++) lane[0] = x[j] > lane[0] ? x[j] : lane[0];
    for (size_t l = 1; l < LANES; l++) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
    return lane[0];
}

/* x [n] = softmax(scale * x) = exp(scale * (x - largest)) / sum; returns that sum. */
static float softmax(float *x, size_t n, float scale) {
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

/* -------------------------------------------------------------------------------------------- the matrix product */

/* C [M, N] = A [M, K] B [K, N], of which either operand may lie transposed, so that one function serves the forward
 * pass (x w^T), the gradient of its input (dy w) and that of its weights (dy^T x). The method is Goto's (K. Goto, R. van
 * de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008): B is packed into panels of a few columns, and a
 * micro-kernel keeps a tile of C in registers while it runs along K. Each element of C is one chain of additions over a
 * block of K, the blocks being added in order; the blocks depend on K alone. */

/* VL floats a vector; a tile of C has MR rows and NV vectors. LOW and HIGH interleave the halves of two vectors. */
#if defined(__AVX512F__)
enum { VL = 16, MR = 14, NV = 2 };
#define LOW      0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define OWN_NAME "own product, AVX-512 14x32"
#elif defined(__AVX2__) && defined(__FMA__)
enum { VL = 8, MR = 6, NV = 2 };
#define LOW      0, 8, 1, 9, 2, 10, 3, 11
#define HIGH     4, 12, 5, 13, 6, 14, 7, 15
#define OWN_NAME "own product, AVX2 6x16"
#else
enum { VL = 4, MR = 6, NV = 2 };
#define LOW      0, 4, 1, 5
#define HIGH     2, 6, 3, 7
#define OWN_NAME "own product, vectors of 4, 6x8"
#endif
enum { NR = NV * VL, MC = 10 * MR }; /* rows of A that are packed at a time */

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

/* c [rows, vecs * VL] (+)= a [rows, K] b [K, vecs * VL], with rows, vecs and a.transposed known when compiled. */
INLINE void kernel(const size_t rows, const size_t vecs, size_t K, matrix a, const float *b, float *c,
                   size_t ldc, int accumulate) {
    vec sum[MR][NV];
    const float
        *base[(MR + 2) / 3]; /* every third row: an address of x86 reaches one or two strides further */
    UNROLL for (size_t i = 0; i < rows; i++) UNROLL for (size_t v = 0; v < vecs; v++) sum[i][v] = (vec){0};
    UNROLL for (size_t i = 0; i < (rows + 2) / 3; i++) base[i] = a.at + 3 * i * (a.transposed ? 1 : a.ld);
    for (size_t k = 0; k < K; k++, b += vecs * VL) {
        vec bk[NV];
        UNROLL for (size_t v = 0; v < vecs; v++) bk[v] = *(const vec *)(b + v * VL);
        UNROLL for (size_t i = 0; i < rows; i++) {
            const float aik = base[i / 3][i % 3 * (a.transposed ? 1 : a.ld)];
            UNROLL for (size_t v = 0; v < vecs; v++) sum[i][v] += aik * bk[v];
        }
        UNROLL for (size_t i = 0; i < (rows + 2) / 3; i++) base[i] += a.transposed ? a.ld : 1;
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
enum { MR_HALF = MR / 2 };
KERNEL(MR_HALF)
KERNEL(1)

/* Columns in which a panel of `cols` columns of B is packed. */
static inline size_t panel_width(size_t cols) { return cols > VL ? NR : VL; }

/* c [rows <= MR, cols <= NR] (+)= a [rows, K] times a packed panel: by a whole tile, half a tile and single rows. */
static void tile(size_t rows, size_t cols, size_t K, matrix a, const float *b, float *c, size_t ldc,
                 int accumulate) {
    const size_t width = panel_width(cols), vecs = width / VL;
    float edge[MR * NR];
    float *to = cols == width ? c : edge;
    size_t ld = cols == width ? ldc : width;
    if (to == edge && accumulate)
        for (size_t i = 0; i < rows; i++) memcpy(edge + i * width, c + i * ldc, cols * sizeof *c);
    size_t i = 0;
    if (rows == MR) kernel_MR(vecs, K, a, b, to, ld, accumulate), i = MR;
    if (rows - i >= MR_HALF) kernel_MR_HALF(vecs, K, a, b, to, ld, accumulate), i += MR_HALF;
    for (; i < rows; i++) kernel_1(vecs, K, part(a, i, 0), b, to + i * ld, ld, accumulate);
    if (to == edge)
        for (i = 0; i < rows; i++) memcpy(c + i * ldc, edge + i * width, cols * sizeof *c);
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
    if (!b.transposed && cols == NR) {
        for (; k < K; k++) memcpy(to + k * NR, b.at + k * ld, NR * sizeof(float));
        return;
    }
    if (b.transposed)
        for (; k + VL <= K; k += VL)
            for (size_t j = 0; j < width; j += VL) {
                vec r[VL];
                UNROLL for (size_t i = 0; i < VL; i++) r[i] =
                    j + i < cols ? *(const vec *)(b.at + (j + i) * ld + k) : (vec){0};
                transpose(r);
                UNROLL for (size_t i = 0; i < VL; i++) * (vec *)(to + (k + i) * width + j) = r[i];
            }
    for (; k < K; k++)
        for (size_t j = 0; j < width; j++) to[k * width + j] = j < cols ? *part(b, k, j).at : 0;
}

/* Packs b [K, N] into panels of NR columns, the last perhaps narrower, one after the other. */
static void pack_panels(float *to, matrix b, size_t K, size_t N) {
    for (size_t j = 0; j < N; j += NR) pack_panel(to + j * K, part(b, 0, j), K, min_size(NR, N - j));
}

/* Packs a [rows, K]: transposed into slivers [K, MR], else as rows of another stride, since rows some KB apart would
 * compete for the same cache lines. Rows [i, i + MR) are then packed_rows(to, a, K, i). */
static void pack_rows(float *to, matrix a, size_t rows, size_t K) {
    if (!a.transposed)
        for (size_t i = 0; i < rows; i++) memcpy(to + i * (K + VL), a.at + i * a.ld, K * sizeof *to);
    else
        for (size_t k = 0; k < K; k++) {
            const float *from = a.at + k * a.ld;
            size_t i = 0;
            for (; i + MR <= rows; i += MR) memcpy(to + i * K + k * MR, from + i, MR * sizeof *to);
            for (size_t r = i; r < rows; r++) to[i * K + k * MR + r - i] = from[r];
        }
}

static inline matrix packed_rows(const float *packed, matrix a, size_t K, size_t i) {
    return a.transposed ? (matrix){packed + i * K, MR, 1} : (matrix){packed + i * (K + VL), K + VL, 0};
}

/* A product and what is done with each tile of C when it is complete and still in cache. */
typedef struct product {
    size_t M, N, K;
    matrix a, b;
    float *c; /* [M, N] */
    void (*epilogue)(const struct product *p, size_t i, size_t j, size_t rows, size_t cols);
    const float *bias; /* [N] */
    const float *pre;  /* [M, N] */
    float *y;          /* [M, N] */
} product;

/* Blocks of K: short ones where the packing of A transposes. K of one block needs no packing of A if it is short. */
enum { KC = 768, KC_TRANSPOSED = 384, K_UNPACKED = 400, PANELS_IN_L2 = 100 << 10, PANELS = 1 << 20 };

static void multiply_own(rt_rank *rank, const product *p) {
    const size_t kc_most = p->a.transposed ? KC_TRANSPOSED : KC, blocks = (p->K + kc_most - 1) / kc_most;
    const size_t kc = (p->K + blocks - 1) / blocks;
    const int unpacked = !p->a.transposed && p->K <= K_UNPACKED;
    const size_t nc = min_size(round_up(p->N, NR), (unpacked ? PANELS_IN_L2 : PANELS) / kc / NR * NR + NR);
    const size_t mc = unpacked ? MR : MC, row_panels = (p->M + MR - 1) / MR;
    const int threads = team(rank, (double)p->M * (double)p->N * (double)p->K / 40);
    float *memory = scratch(rank, 2 * nc * kc, unpacked ? 0 : MC * (kc + VL));
    if (!memory) return;

#pragma omp parallel num_threads(threads)
    {
        const size_t thread = (size_t)omp_get_thread_num(), n = (size_t)omp_get_num_threads();
        size_t across = 1; /* threads side by side in a row of tiles: more than one only where rows are few */
        while (n % (2 * across) == 0 && row_panels < 4 * (n / across)) across *= 2;
        const size_t down = n / across, my_row = thread / across, my_column = thread % across;
        const size_t i_begin = row_panels * my_row / down * MR;
        const size_t i_end = min_size(row_panels * (my_row + 1) / down * MR, p->M);
        float *packed_a = memory + 2 * nc * kc + thread * MC * (kc + VL);
        size_t step = 0;
        for (size_t block = 0; block < blocks; block++) {
            const size_t k = p->K * block / blocks, K = p->K * (block + 1) / blocks - k;
            for (size_t n0 = 0; n0 < p->N; n0 += nc, step++) {
                /* Two buffers take turns: who packs the next one cannot overtake who still reads this one. */
                float *packed_b = memory + step % 2 * nc * kc;
                const size_t N = min_size(nc, p->N - n0), panels = (N + NR - 1) / NR;
                for (size_t j = thread * NR; j < N; j += n * NR)
                    pack_panel(packed_b + j * K, part(p->b, k, n0 + j), K, min_size(NR, N - j));
#pragma omp barrier
                const size_t j_begin = panels * my_column / across * NR;
                const size_t j_end = min_size(panels * (my_column + 1) / across * NR, N);
                for (size_t i0 = i_begin; i0 < i_end; i0 += mc) {
                    const size_t M = min_size(mc, i_end - i0);
                    if (!unpacked) pack_rows(packed_a, part(p->a, i0, k), M, K);
                    for (size_t j = j_begin; j < j_end; j += NR)
                        for (size_t i = 0; i < M; i += MR) {
                            const size_t rows = min_size(MR, M - i), cols = min_size(NR, N - j);
                            const matrix a =
                                unpacked ? part(p->a, i0 + i, k) : packed_rows(packed_a, p->a, K, i);
                            tile(rows, cols, K, a, packed_b + j * K, p->c + (i0 + i) * p->N + n0 + j, p->N,
                                 block > 0);
                        }
                    if (p->epilogue && block + 1 == blocks)
                        p->epilogue(p, i0, n0 + j_begin, M, j_end - j_begin);
                }
            }
        }
    }
}

#ifdef HAVE_OPENBLAS
/* Each thread multiplies its own rows: OpenBLAS itself stays on one thread, whatever other ranks do. */
static void multiply_openblas(rt_rank *rank, const product *p) {
    const int threads = team(rank, (double)p->M * (double)p->N * (double)p->K / 40);
#pragma omp parallel num_threads(threads)
    {
        const size_t thread = (size_t)omp_get_thread_num(), n = (size_t)omp_get_num_threads();
        const size_t i = p->M * thread / n, rows = p->M * (thread + 1) / n - i;
        if (rows) {
            cblas_sgemm(CblasRowMajor, p->a.transposed ? CblasTrans : CblasNoTrans,
                        p->b.transposed ? CblasTrans : CblasNoTrans, (blasint)rows, (blasint)p->N,
                        (blasint)p->K, 1, part(p->a, i, 0).at, (blasint)p->a.ld, p->b.at, (blasint)p->b.ld, 0,
                        p->c + i * p->N, (blasint)p->N);
            if (p->epilogue) p->epilogue(p, i, 0, rows, p->N);
        }
    }
}
#else
#define multiply_openblas multiply_own /* vit_cpu_matmul does not let it come to this */
#endif

static void multiply(rt_rank *rank, const product *p) {
    if (((cpu_state *)rank->device)->matmul == VIT_MATMUL_OPENBLAS)
        multiply_openblas(rank, p);
    else
        multiply_own(rank, p);
}

/* ------------------------------------------------------------------------------------------------------- linear */

static void add_bias(const product *p, size_t i0, size_t j0, size_t rows, size_t cols) {
    const float *bias = p->bias + j0;
    for (size_t i = i0; i < i0 + rows; i++) {
        float *c = p->c + i * p->N + j0;
#pragma omp simd
        for (size_t j = 0; j < cols; j++) c[j] += bias[j];
    }
}

static void add_bias_then_gelu(const product *p, size_t i0, size_t j0, size_t rows, size_t cols) {
    const float *bias = p->bias + j0;
    for (size_t i = i0; i < i0 + rows; i++) {
        float *pre = p->c + i * p->N + j0, *y = p->y + i * p->N + j0;
#pragma omp simd
        for (size_t j = 0; j < cols; j++) {
            pre[j] += bias[j];
            y[j] = gelu(pre[j]);
        }
    }
}

static void times_gelu_derivative(const product *p, size_t i0, size_t j0, size_t rows, size_t cols) {
    for (size_t i = i0; i < i0 + rows; i++) {
        float *c = p->c + i * p->N + j0;
        const float *pre = p->pre + i * p->N + j0;
#pragma omp simd
        for (size_t j = 0; j < cols; j++) c[j] *= gelu_derivative(pre[j]);
    }
}

static void linear_forward(rt_stream *s, rt_block y, rt_block pre, rt_block x, rt_block w, rt_block b,
                           size_t rows, size_t in, size_t out) {
    product p = {.M = rows, .N = out, .K = in, .a = {x.data, in, 0}, .b = {w.data, in, 1}, .bias = b.data};
    p.c = pre.data ? pre.data : y.data;
    p.y = y.data;
    p.epilogue = pre.data ? add_bias_then_gelu : add_bias;
    multiply(s->rank, &p); /* y = x w^T + b */
}

/* sums [cols] = the sum over the rows of x [rows, cols], ROWS of them at a time. */
static void sum_rows(rt_rank *rank, float *sums, const float *x, size_t rows, size_t cols) {
    enum { COLS = 512 };
#pragma omp parallel for num_threads(team(rank, 0.2 * (double)rows * (double)cols)) schedule(static)
    for (size_t j0 = 0; j0 < cols; j0 += COLS) {
        const size_t n = min_size(COLS, cols - j0);
        memset(sums + j0, 0, n * sizeof *sums);
        for (size_t i0 = 0; i0 < rows; i0 += ROWS) {
            float chunk[COLS] = {0};
            for (size_t i = i0; i < min_size(i0 + ROWS, rows); i++)
#pragma omp simd
                for (size_t j = 0; j < n; j++) chunk[j] += x[i * cols + j0 + j];
#pragma omp simd
            for (size_t j = 0; j < n; j++) sums[j0 + j] += chunk[j];
        }
    }
}

/* y = x w^T + b:  dw = dy^T x, db = sum over rows of dy, dx = dy w (times gelu'(pre) where x = gelu(pre)) */
static void linear_backward(rt_stream *s, rt_block dx, rt_block dw, rt_block db, rt_block dy, rt_block x,
                            rt_block w, rt_block pre, size_t rows, size_t in, size_t out) {
    product weights = {.M = out, .N = in, .K = rows, .a = {dy.data, out, 1}, .b = {x.data, in, 0}};
    weights.c = dw.data;
    multiply(s->rank, &weights);
    sum_rows(s->rank, db.data, dy.data, rows, out);
    if (!dx.data) return;
    product input = {.M = rows, .N = in, .K = out, .a = {dy.data, out, 0}, .b = {w.data, in, 0}};
    input.c = dx.data;
    input.pre = pre.data;
    input.epilogue = pre.data ? times_gelu_derivative : NULL;
    multiply(s->rank, &input);
}

/* ---------------------------------------------------------------------------------------------------- layernorm */

static void layernorm_forward(rt_stream *s, rt_block y_block, rt_block mean, rt_block rstd, rt_block x_block,
                              rt_block gamma_block, rt_block beta_block, size_t rows, size_t dim,
                              size_t x_stride, double eps) {
    const float *gamma = gamma_block.data, *beta = beta_block.data;
#pragma omp parallel for num_threads(team(s->rank, 0.4 * (double)rows * (double)dim)) schedule(static)
    for (size_t i = 0; i < rows; i++) {
        const float *x = (const float *)x_block.data + i * x_stride;
        float *y = (float *)y_block.data + i * dim, sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t j = 0; j < dim; j++) sum += x[j];
        const float m = sum / (float)dim;
#pragma omp simd reduction(+ : squares)
        for (size_t j = 0; j < dim; j++) squares += (x[j] - m) * (x[j] - m);
        const float r = 1 / sqrtf(squares / (float)dim + (float)eps);
#pragma omp simd
        for (size_t j = 0; j < dim; j++) y[j] = (x[j] - m) * r * gamma[j] + beta[j];
        ((float *)mean.data)[i] = m;
        ((float *)rstd.data)[i] = r;
    }
}

/* n = (x - mean) rstd, y = n gamma + beta, with g = dy gamma:
 *     dx = rstd (g - mean(g) - n mean(g n)),  dgamma = sum over rows of dy n,  dbeta = sum over rows of dy
 * The rows are cut into up to CHUNKS chunks, whose sums are added in order. */
static void layernorm_backward(rt_stream *s, rt_block dx_block, rt_block dgamma_block, rt_block dbeta_block,
                               rt_block residual_block, rt_block dy_block, rt_block x_block, rt_block mean,
                               rt_block rstd, rt_block gamma_block, size_t rows, size_t dim,
                               size_t x_stride) {
    enum { CHUNKS = 64 };
    const size_t chunk = rows < ROWS * CHUNKS ? ROWS : (rows + CHUNKS - 1) / CHUNKS;
    const float *gamma = gamma_block.data;
    float *sums = scratch(s->rank, 2 * dim * CHUNKS, 0); /* [chunk][dgamma, dbeta][dim] */
    if (!sums) return;
#pragma omp parallel for num_threads(team(s->rank, 0.5 * (double)rows * (double)dim)) schedule(static)
    for (size_t i0 = 0; i0 < rows; i0 += chunk) {
        float *dgamma = sums + i0 / chunk * 2 * dim, *dbeta = dgamma + dim;
        memset(dgamma, 0, 2 * dim * sizeof *dgamma);
        for (size_t i = i0; i < min_size(i0 + chunk, rows); i++) {
            const float *dy = (const float *)dy_block.data + i * dim;
            const float *x = (const float *)x_block.data + i * x_stride;
            const float *residual =
                residual_block.data ? (const float *)residual_block.data + i * x_stride : NULL;
            const float m = ((const float *)mean.data)[i], r = ((const float *)rstd.data)[i];
            float *dx = (float *)dx_block.data + i * x_stride, sum_g = 0, sum_gn = 0;
#pragma omp simd reduction(+ : sum_g, sum_gn)
            for (size_t j = 0; j < dim; j++) {
                const float n = (x[j] - m) * r, g = dy[j] * gamma[j];
                sum_g += g;
                sum_gn += g * n;
                dgamma[j] += dy[j] * n;
                dbeta[j] += dy[j];
            }
            const float mean_g = sum_g / (float)dim, mean_gn = sum_gn / (float)dim;
            if (!residual) residual = memset(dx, 0, dim * sizeof *dx);
#pragma omp simd
            for (size_t j = 0; j < dim; j++)
                dx[j] = residual[j] + r * (dy[j] * gamma[j] - mean_g - (x[j] - m) * r * mean_gn);
        }
    }
    float *dgamma = dgamma_block.data, *dbeta = dbeta_block.data;
    memset(dgamma, 0, dim * sizeof *dgamma);
    memset(dbeta, 0, dim * sizeof *dbeta);
    for (size_t i0 = 0; i0 < rows; i0 += chunk, sums += 2 * dim)
#pragma omp simd
        for (size_t j = 0; j < dim; j++) {
            dgamma[j] += sums[j];
            dbeta[j] += sums[dim + j];
        }
}

/* ---------------------------------------------------------------------------------------------------- attention */

/* Each pair of an image and a head is the work of one thread, from start to end in its cache. What is saved are the
 * probabilities p [B, H, T, ld], whose rows are padded to whole vectors. */
static size_t attention_ld(size_t T) { return round_up(T, VL); }

static size_t attention_saved(size_t B, size_t T, size_t H, size_t head_dim) {
    return B * H * T * attention_ld(T);
}

/* c [rows <= MR, N] = a [rows, K] times packed panels. */
static void multiply_panels(float *c, size_t ldc, matrix a, const float *panels, size_t rows, size_t K,
                            size_t N) {
    for (size_t j = 0; j < N; j += NR) tile(rows, min_size(NR, N - j), K, a, panels + j * K, c + j, ldc, 0);
}

/* s = q k^T / sqrt(hd), p = softmax(s), out = p v */
static void attention_forward(rt_stream *s, rt_block out, rt_block saved, rt_block qkv, size_t B, size_t T,
                              size_t H, size_t hd) {
    const size_t D = H * hd, ld = attention_ld(T), each = hd * ld + T * round_up(hd, VL);
    const float scale = 1 / sqrtf((float)hd);
    float *memory = scratch(s->rank, 0, each);
    if (!memory) return;
#pragma omp parallel for num_threads(team(s->rank, (double)(B * T * T) * (double)D / 15)) schedule(static)
    for (size_t pair = 0; pair < B * H; pair++) {
        const size_t b = pair / H, h = pair % H;
        const float *q = (const float *)qkv.data + b * T * 3 * D + h * hd, *k = q + D, *v = k + D;
        float *p = (float *)saved.data + pair * T * ld, *o = (float *)out.data + b * T * D + h * hd;
        float *kt_panels = memory + (size_t)omp_get_thread_num() * each, *v_panels = kt_panels + hd * ld;
        pack_panels(kt_panels, (matrix){k, 3 * D, 1}, hd, T);
        pack_panels(v_panels, (matrix){v, 3 * D, 0}, T, hd);
        for (size_t i = 0; i < T; i += MR) {
            const size_t rows = min_size(MR, T - i);
            float *pi = p + i * ld;
            multiply_panels(pi, ld, (matrix){q + i * 3 * D, 3 * D, 0}, kt_panels, rows, hd, ld);
            for (size_t r = 0; r < rows; r++) softmax(pi + r * ld, T, scale);
            multiply_panels(o + i * D, D, (matrix){pi, ld, 0}, v_panels, rows, T, hd);
        }
    }
}

/* out = p v:           dv = p^T dout, dp = dout v^T
 * p = softmax(s):      ds = p (dp - sum over the row of p dp)
 * s = q k^T / sqrt(hd): dq = ds k / sqrt(hd), dk = ds^T q / sqrt(hd) */
static void attention_backward(rt_stream *s, rt_block dqkv, rt_block dout, rt_block qkv, rt_block out,
                               rt_block saved, size_t B, size_t T, size_t H, size_t hd) {
    const size_t D = H * hd, ld = attention_ld(T), panels = T * round_up(hd, VL);
    const size_t each = T * ld + hd * ld + 3 * panels;
    const float scale = 1 / sqrtf((float)hd);
    float *memory = scratch(s->rank, 0, each);
    if (!memory) return;
#pragma omp parallel for num_threads(team(s->rank, (double)(B * T * T) * (double)D / 6)) schedule(static)
    for (size_t pair = 0; pair < B * H; pair++) {
        const size_t b = pair / H, h = pair % H, at = b * T * D + h * hd;
        const float *q = (const float *)qkv.data + b * T * 3 * D + h * hd, *k = q + D, *v = k + D;
        const float *d_o = (const float *)dout.data + at;
        const float *p = (const float *)saved.data + pair * T * ld;
        float *dq = (float *)dqkv.data + b * T * 3 * D + h * hd, *dk = dq + D, *dv = dk + D;
        float *ds = memory + (size_t)omp_get_thread_num() * each, *vt_panels = ds + T * ld;
        float *k_panels = vt_panels + hd * ld, *q_panels = k_panels + panels, *do_panels = q_panels + panels;
        pack_panels(vt_panels, (matrix){v, 3 * D, 1}, hd, T);
        pack_panels(k_panels, (matrix){k, 3 * D, 0}, T, hd);
        pack_panels(q_panels, (matrix){q, 3 * D, 0}, T, hd);
        pack_panels(do_panels, (matrix){d_o, D, 0}, T, hd);
        for (size_t i = 0; i < T; i += MR) {
            const size_t rows = min_size(MR, T - i);
            multiply_panels(ds + i * ld, ld, (matrix){d_o + i * D, D, 0}, vt_panels, rows, hd, ld); /* dp */
            for (size_t r = i; r < i + rows; r++) {
                float *dsr = ds + r * ld, sum = 0;
                const float *pr = p + r * ld;
#pragma omp simd reduction(+ : sum)
                for (size_t j = 0; j < T; j++) sum += pr[j] * dsr[j];
#pragma omp simd
                for (size_t j = 0; j < T; j++) dsr[j] = pr[j] * (dsr[j] - sum) * scale;
            }
            multiply_panels(dq + i * 3 * D, 3 * D, (matrix){ds + i * ld, ld, 0}, k_panels, rows, T, hd);
        }
        for (size_t i = 0; i < T; i += MR) {
            const size_t rows = min_size(MR, T - i);
            multiply_panels(dv + i * 3 * D, 3 * D, (matrix){p + i, ld, 1}, do_panels, rows, T, hd);
            multiply_panels(dk + i * 3 * D, 3 * D, (matrix){ds + i, ld, 1}, q_panels, rows, T, hd);
        }
    }
}

/* ---------------------------------------------------------------------------------------------- the other layers */

static void residual_forward(rt_stream *s, rt_block out, rt_block x, rt_block branch, rt_block keys, size_t B,
                             size_t count, double rate, uint64_t salt) {
    const size_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(team(s->rank, 0.3 * (double)B * (double)count)) schedule(static)
    for (size_t block = 0; block < B * blocks; block++) {
        const size_t b = block / blocks, i0 = block % blocks * BLOCK, at = b * count + i0;
        const size_t n = min_size(BLOCK, count - i0);
        const double factor = rate > 0 ? vit_drop_path_factor(((uint64_t *)keys.data)[b], salt, rate) : 1;
        const float *from = (const float *)branch.data + at, k = (float)factor;
        float *to = (float *)out.data + at;
        if (!x.data) {
#pragma omp simd
            for (size_t i = 0; i < n; i++) to[i] = k * from[i];
        } else {
            const float *input = (const float *)x.data + at;
#pragma omp simd
            for (size_t i = 0; i < n; i++) to[i] = input[i] + k * from[i];
        }
    }
}

/* out = x + k_b branch:  dbranch = k_b dout, which is the same without an x */
static void residual_backward(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B,
                              size_t count, double rate, uint64_t salt) {
    residual_forward(s, dbranch, (rt_block){0}, dout, keys, B, count, rate, salt);
}

static void patchify_forward(rt_stream *s, rt_block patches, rt_block images, size_t B, size_t C,
                             size_t height, size_t width, size_t P) {
    const size_t down = height / P, across = width / P, rows = B * down;
#pragma omp parallel for num_threads(team(s->rank, 0.5 * (double)patches.count)) schedule(static)
    for (size_t row = 0; row < rows; row++) {
        const size_t b = row / down, top = row % down * P;
        float *to = (float *)patches.data + row * across * C * P * P;
        for (size_t patch = 0; patch < across; patch++)
            for (size_t c = 0; c < C; c++)
                for (size_t y = 0; y < P; y++, to += P) {
                    const size_t line = (b * C + c) * height + top + y;
                    memcpy(to, (const float *)images.data + line * width + patch * P, P * sizeof *to);
                }
    }
}

static void embedding_forward(rt_stream *s, rt_block out, rt_block x, rt_block cls, rt_block pos, size_t B,
                              size_t N, size_t D) {
#pragma omp parallel for num_threads(team(s->rank, 0.3 * (double)out.count)) schedule(static)
    for (size_t row = 0; row < B * (N + 1); row++) {
        const size_t b = row / (N + 1), t = row % (N + 1);
        const float *from = t ? (const float *)x.data + (b * N + t - 1) * D : cls.data;
        const float *p = (const float *)pos.data + t * D;
        float *to = (float *)out.data + row * D;
#pragma omp simd
        for (size_t j = 0; j < D; j++) to[j] = from[j] + p[j];
    }
}

/* out = (cls | x) + pos:  dpos = sum over images of dout, dcls = dpos of the first token, dx = dout of the others */
static void embedding_backward(rt_stream *s, rt_block dx, rt_block dcls, rt_block dpos, rt_block dout,
                               size_t B, size_t N, size_t D) {
#pragma omp parallel for num_threads(team(s->rank, 0.4 * (double)dout.count)) schedule(static)
    for (size_t t = 0; t < N + 1; t++) {
        float *sum = (float *)dpos.data + t * D;
        memset(sum, 0, D * sizeof *sum);
        for (size_t b = 0; b < B; b++) {
            const float *from = (const float *)dout.data + (b * (N + 1) + t) * D;
#pragma omp simd
            for (size_t j = 0; j < D; j++) sum[j] += from[j];
            if (t) memcpy((float *)dx.data + (b * N + t - 1) * D, from, D * sizeof *from);
        }
        if (t == 0) memcpy(dcls.data, sum, D * sizeof *sum);
    }
}

/* --------------------------------------------------------------------------------------------------------- loss */

/* loss = sum over classes of target (log(sum of exp(logits)) - logit), where the targets' sum is 1 */
static void cross_entropy_forward(rt_stream *s, rt_block losses, rt_block probabilities, rt_block logits,
                                  rt_block labels, size_t B, size_t V, double smoothing) {
#pragma omp parallel for num_threads(team(s->rank, (double)B *(double)V)) schedule(static)
    for (size_t b = 0; b < B; b++) {
        const float *x = (const float *)logits.data + b * V;
        const float most = largest(x, V);
        float *p = (float *)probabilities.data + b * V;
        const double log_sum = log((double)softmax(memcpy(p, x, V * sizeof *p), V, 1));
        const double own = (double)(x[((const int32_t *)labels.data)[b]] - most);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t j = 0; j < V; j++) sum += (double)(x[j] - most);
        ((float *)losses.data)[b] = (float)(log_sum - (1 - smoothing) * own - smoothing * sum / (double)V);
    }
}

/* p = softmax(logits), loss as above:  dlogits = p - target, times the scale */
static void cross_entropy_backward(rt_stream *s, rt_block dlogits, rt_block probabilities, rt_block labels,
                                   size_t B, size_t V, double smoothing, double scale) {
    const float everywhere = (float)(smoothing / (double)V), factor = (float)scale;
#pragma omp parallel for num_threads(team(s->rank, 0.3 * (double)B * (double)V)) schedule(static)
    for (size_t b = 0; b < B; b++) {
        const float *p = (const float *)probabilities.data + b * V;
        const size_t label = (size_t)((const int32_t *)labels.data)[b];
        float *d = (float *)dlogits.data + b * V;
#pragma omp simd
        for (size_t j = 0; j < V; j++) d[j] = factor * (p[j] - everywhere);
        d[label] = (float)(scale * ((double)p[label] - smoothing / (double)V - (1 - smoothing)));
    }
}

static void loss_accumulate(rt_stream *s, rt_block total_block, rt_block losses, size_t B) {
    int64_t *total = total_block.data;
    double sum = 0;
    for (size_t b = 0; b < B; b++) {
        const double share = (double)((const float *)losses.data)[b] / (double)B;
        if (fabs(share) < 0x1p20) /* not NaN either */
            sum += share;
        else
            total[1]++;
    }
    if (fabs(sum) < 0x1p20)
        total[0] += llround(sum / VIT_LOSS_UNIT);
    else
        total[1]++;
}

/* ----------------------------------------------------------------------------------- optimizers and gradient norm */

typedef struct {
    float factor, keep; /* of the gradient; of the parameter: decoupled weight decay */
    float decay;        /* weight decay added to the gradient */
    float beta2, rest1, rest2, root_correction2, eps, step, momentum;
} optimizer_constants;

/* Updates n elements, a multiple of VIT_ALIGNMENT, in vectors alone. */
typedef void optimizer_update(float *p, float *m, float *v, const float *grad, size_t n,
                              const optimizer_constants *c);

static void adamw_update(float *restrict p, float *restrict m, float *restrict v, const float *restrict grad,
                         size_t n, const optimizer_constants *c) {
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

static void sgd_update(float *restrict p, float *restrict m, float *restrict v, const float *restrict grad,
                       size_t n, const optimizer_constants *c) {
    const optimizer_constants o = *c;
    for (size_t i = 0; i < n; i += VIT_ALIGNMENT)
#pragma omp simd
        for (size_t j = i; j < i + VIT_ALIGNMENT; j++) {
            m[j] = m[j] * o.momentum + (grad[j] * o.factor + o.decay * p[j]);
            p[j] -= o.step * m[j];
        }
}

/* Updates elements [first, last). What is left of the last vector is updated in a copy, so that the element's
 * arithmetic never depends on where a shard ends. */
static void optimize(rt_rank *rank, float *p, float *m, float *v, const float *grad, size_t first,
                     size_t last, optimizer_update *update, const optimizer_constants *c) {
    const size_t tail = (last - first) % VIT_ALIGNMENT, whole = last - tail;
#pragma omp parallel for num_threads(team(rank, 1.0 * (double)(last - first))) schedule(static)
    for (size_t i = first; i < whole; i += BLOCK)
        update(p + i, m + i, v ? v + i : NULL, grad + i, min_size(BLOCK, whole - i), c);
    if (!tail) return;
    float copy[4][VIT_ALIGNMENT] = {0};
    float *const from[4] = {p, m, v, (float *)grad};
    for (int k = 0; k < 4; k++)
        if (from[k]) memcpy(copy[k], from[k] + whole, tail * sizeof(float));
    update(copy[0], copy[1], copy[2], copy[3], VIT_ALIGNMENT, c);
    for (int k = 0; k < 3; k++)
        if (from[k]) memcpy(from[k] + whole, copy[k], tail * sizeof(float));
}

static void adamw(rt_stream *s, rt_block param, rt_block exp_avg, rt_block exp_avg_sq, rt_block grad,
                  rt_block scalars, size_t decayed, const vit_adamw_options *o) {
    const double *d = scalars.data, lr = d[VIT_LEARNING_RATE];
    optimizer_constants c = {.factor = (float)d[VIT_GRADIENT_FACTOR],
                             .keep = (float)(1 - lr * o->weight_decay),
                             .beta2 = (float)o->beta2,
                             .rest1 = (float)(1 - o->beta1),
                             .rest2 = (float)(1 - o->beta2),
                             .root_correction2 = (float)sqrt(d[VIT_BIAS_CORRECTION2]),
                             .eps = (float)o->eps,
                             .step = (float)(lr / d[VIT_BIAS_CORRECTION1])};
    if (d[VIT_GRADIENT_FACTOR] == 0) return;
    optimize(s->rank, param.data, exp_avg.data, exp_avg_sq.data, grad.data, 0, decayed, adamw_update, &c);
    c.keep = 1;
    optimize(s->rank, param.data, exp_avg.data, exp_avg_sq.data, grad.data, decayed, param.count,
             adamw_update, &c);
}

static void sgd(rt_stream *s, rt_block param, rt_block momentum, rt_block grad, rt_block scalars,
                size_t decayed, const vit_sgd_options *o) {
    const double *d = scalars.data;
    optimizer_constants c = {.factor = (float)d[VIT_GRADIENT_FACTOR],
                             .decay = (float)o->weight_decay,
                             .momentum = (float)o->momentum,
                             .step = (float)d[VIT_LEARNING_RATE]};
    if (d[VIT_GRADIENT_FACTOR] == 0) return;
    optimize(s->rank, param.data, momentum.data, NULL, grad.data, 0, decayed, sgd_update, &c);
    c.decay = 0;
    optimize(s->rank, param.data, momentum.data, NULL, grad.data, decayed, param.count, sgd_update, &c);
}

/* Adds the squares of up to VIT_GRANULE floats, each of which is exact in double, to the counters. */
static inline void count_granule(int64_t *counters, const float *x) {
    double sum[VIT_GRANULE];
    for (int i = 0; i < VIT_GRANULE; i++) sum[i] = (double)x[i] * (double)x[i];
    for (int half = VIT_GRANULE / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    uint64_t bits;
    memcpy(&bits, sum, sizeof bits);
    if (bits == 0) return;
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

static void sum_of_squares(rt_stream *s, rt_block counters, rt_block x_block) {
    const float *x = x_block.data;
    const size_t each = VIT_NORM_COUNTERS * sizeof(int64_t) / sizeof(float), count = x_block.count;
    const int threads = team(s->rank, 0.8 * (double)count);
    float *memory = scratch(s->rank, 0, round_up(each, 16));
    if (!memory) return;
    memset(memory, 0, (size_t)threads * round_up(each, 16) * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        int64_t *mine = (int64_t *)(memory + (size_t)omp_get_thread_num() * round_up(each, 16));
#pragma omp for schedule(static)
        for (size_t i = 0; i < count / VIT_GRANULE * VIT_GRANULE; i += VIT_GRANULE)
            count_granule(mine, x + i);
    }
    float tail[VIT_GRANULE] = {0};
    memcpy(tail, x + count / VIT_GRANULE * VIT_GRANULE, count % VIT_GRANULE * sizeof *tail);
    count_granule(counters.data, tail);
    for (int t = 0; t < threads; t++)
        for (size_t i = 0; i < VIT_NORM_COUNTERS; i++)
            ((int64_t *)counters.data)[i] += ((int64_t *)(memory + (size_t)t * round_up(each, 16)))[i];
}

static void gradient_factor(rt_stream *s, rt_block scalars_block, rt_block counters_block, double divisor,
                            double clip) {
    const int64_t *counters = counters_block.data;
    double *scalars = scalars_block.data, sum = 0;
    for (int i = 0; i < VIT_NORM_EXPONENTS; i++) {
        const double significands = (double)counters[2 * i] + 0x1p26 * (double)counters[2 * i + 1];
        sum += ldexp(significands, i + VIT_NORM_MIN_EXPONENT - 52);
    }
    const int finite = counters[VIT_NORM_NOT_FINITE] == 0;
    const double norm = finite ? sqrt(sum) / divisor : (double)NAN;
    const double clipping = clip > 0 ? fmin(1, clip / (norm + 1e-6)) : 1;
    scalars[VIT_GRADIENT_NORM] = norm;
    scalars[VIT_GRADIENT_FACTOR] = finite ? clipping / divisor : 0;
}

/* --------------------------------------------------------------------------------------------- vector arithmetic */

static void fill_zero(rt_stream *s, rt_block x) { memset(x.data, 0, x.count * rt_type_size(x.type)); }

static void add(rt_stream *s, rt_block x, rt_block y) {
    float *to = x.data;
    const float *from = y.data;
#pragma omp parallel for num_threads(team(s->rank, 0.4 * (double)x.count)) schedule(static)
    for (size_t i = 0; i < x.count; i += BLOCK)
#pragma omp simd
        for (size_t j = i; j < min_size(i + BLOCK, x.count); j++) to[j] += from[j];
}

/* Sums block by block: each is complete before any `to` is written, which may be one of `from`. */
static void sum_buffers(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from, size_t n_from) {
    const size_t size = rt_type_size(from->type), bytes = from->count * size;
    const double work = (double)(n_to + n_from) * (double)from->count * 0.2;
#pragma omp parallel for num_threads(team(s->rank, work)) schedule(static)
    for (size_t at = 0; at < bytes; at += BLOCK) {
        union {
            float f[BLOCK / sizeof(float)];
            int64_t i[BLOCK / sizeof(int64_t)];
        } sum;
        const size_t n = min_size(BLOCK, bytes - at);
        memcpy(&sum, (const char *)from->data + at, n);
        for (size_t k = 1; k < n_from; k++) {
            const char *x = (const char *)from[k].data + at;
            if (from->type == RT_FP32)
#pragma omp simd
                for (size_t j = 0; j < n / sizeof(float); j++) sum.f[j] += ((const float *)x)[j];
            else
#pragma omp simd
                for (size_t j = 0; j < n / sizeof(int64_t); j++) sum.i[j] += ((const int64_t *)x)[j];
        }
        for (size_t k = 0; k < n_to; k++) memcpy((char *)to[k].data + at, &sum, n);
    }
}

/* ---------------------------------------------------------------------------------------------------- the table */

int vit_cpu_matmul(rt_rank *rank, vit_matmul choice, error_text *e) {
    cpu_state *state = rank->device;
#ifdef HAVE_OPENBLAS
    const int has_openblas = 1;
#else
    const int has_openblas = 0;
#endif
#ifdef __AVX512F__
    const int own_is_fast = 1;
#else
    const int own_is_fast = 0;
#endif
    if (choice == VIT_MATMUL_OPENBLAS && !has_openblas)
        return error_set(e, "matrix product by OpenBLAS: this program was built without it");
    if (choice == VIT_MATMUL_AUTO)
        choice = has_openblas && !own_is_fast ? VIT_MATMUL_OPENBLAS : VIT_MATMUL_OWN;
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
    openblas_set_num_threads(1); /* of the calls from this thread: the device has its own team */
#endif
    return vit_cpu_matmul(rank, VIT_MATMUL_AUTO, e);
}

static void cpu_close(rt_rank *rank) {
    cpu_state *state = rank->device;
    if (!state) return;
    free(state->scratch);
    free(state);
    rank->device = NULL;
}

const vit_device vit_cpu = {.name = "cpu",
                            .types = 1u << RT_FP32,
                            .open = cpu_open,
                            .close = cpu_close,
                            .copy_in = copy_in,
                            .copy_out = copy_out,
                            .attention_saved = attention_saved,
                            .linear_forward = linear_forward,
                            .linear_backward = linear_backward,
                            .layernorm_forward = layernorm_forward,
                            .layernorm_backward = layernorm_backward,
                            .attention_forward = attention_forward,
                            .attention_backward = attention_backward,
                            .residual_forward = residual_forward,
                            .residual_backward = residual_backward,
                            .patchify_forward = patchify_forward,
                            .embedding_forward = embedding_forward,
                            .embedding_backward = embedding_backward,
                            .cross_entropy_forward = cross_entropy_forward,
                            .cross_entropy_backward = cross_entropy_backward,
                            .loss_accumulate = loss_accumulate,
                            .adamw = adamw,
                            .sgd = sgd,
                            .sum_of_squares = sum_of_squares,
                            .gradient_factor = gradient_factor,
                            .fill_zero = fill_zero,
                            .add = add,
                            .sum_buffers = sum_buffers};
