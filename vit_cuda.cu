/* vit_cuda.cu - the CUDA device: every operation of vit.h's table in fp32, bf16 and fp16, on one GPU a rank.
 *
 *     nvcc -O3 -std=c++20 -arch=sm_90 -c vit_cuda.cu          (-lcudart -ldl -lstdc++ for the linker)
 *
 * Contents: ranks, streams and memory; numbers and launches; the matrix product; sums of columns; linear;
 * layernorm; attention, fused and general; the other layers; loss; optimizers and gradient norm; vector
 * arithmetic; the table.
 *
 * Everything is launched on the rank's own streams, and nothing waits for it on the host but copy_out (and,
 * once per shape, the timing by which the matrix product chooses its algorithm). Arithmetic is fp32 (the
 * norm: double and integers), and every stored result is rounded once. fp32 products are true fp32, unless
 * vit_cuda_products asks for TF32, whose factors have 10 bits.
 * There are no atomics on floating-point numbers: where rows are summed up, the sums go through chunks of
 * rows that follow from the shape alone and are added in order. But the algorithm of a product, and with it
 * the last bits, is the one that was fastest when its shape first came, unless vit_cuda_products asks for the
 * first that works.
 *
 * What it leaves out: cuBLASLt's epilogue for GELU's derivative; graphs of ranks that are threads of
 * one process; fp64.
 */
#include <atomic>
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {
#include "vit.h"
}

typedef __nv_bfloat16 bf16;
typedef __half fp16;

/* ----------------------------------------------------------------------------- ranks, streams and memory */

#define CUBLASLT_STRING_(x) #x
#define CUBLASLT_STRING(x)  CUBLASLT_STRING_(x)

static const size_t EVENTS = 256, STAGES = 2, ALIGNMENT = 256;
static const size_t WORKSPACE = (size_t)32 << 20; /* of cuBLASLt, as NVIDIA advises for Hopper */
static const size_t SMALL_COPY = (size_t)64
                                 << 10; /* up to here the driver takes a copy of host memory at once */

/* cuBLASLt is loaded when a rank opens the device, and not with the program, whose every run on a CPU
 * would pay for its size in time and memory. NULL: there is no such library or function. */
static void *cublaslt_function(const char *name) {
    static void *const library =
        dlopen("libcublasLt.so." CUBLASLT_STRING(CUBLAS_VER_MAJOR), RTLD_NOW | RTLD_LOCAL);
    return library ? dlsym(library, name) : NULL;
}

#define LT(name)                                                                                             \
    ([] {                                                                                                    \
        static const auto function = (decltype(&name))cublaslt_function(#name);                              \
        return function;                                                                                     \
    }())

/* A stream, and events by which others wait for its end, used in turn. An event that has been recorded again
 * stands for a later point of the same stream, which lies in the past of the waiting call, too: who waits for
 * it waits for more than need be, and never for what comes later. */
typedef struct {
    cudaEvent_t event;
    unsigned capture; /* in which it was recorded last, 0: in none */
} cuda_event;

typedef struct {
    cudaStream_t stream;
    cuda_event event[EVENTS];
    std::atomic<unsigned> next;
} cuda_stream;

typedef struct matmul_plan matmul_plan;

typedef struct {
    int gpu;
    char description[320];
    cuda_stream stream[RT_STREAMS]; /* none for the host */
    unsigned capturing, captures;   /* the number of the capture under way, 0: none; made so far */
    cuda_event replayed;            /* the graph that was launched last */
    cublasLtHandle_t blas;
    cublasComputeType_t fp32_product;
    int first_algorithm; /* products take the first that works, and not the fastest */
    void *workspace;     /* of the matrix product [WORKSPACE] */
    matmul_plan *plan;
    size_t plans, plans_room;
    char *arena; /* what rank->allocate hands out; NULL: each piece comes from the driver */
    size_t arena_size, arena_used, pieces;
    void *scratch; /* of one operation of the compute stream, as large as the neediest so far */
    size_t scratch_size;
    struct {
        void *memory; /* page-locked, as large as the largest copy so far */
        size_t size;
        cudaEvent_t copied;
    } stage[STAGES];
    size_t next_stage;
} cuda_state;

static inline cuda_state *state_of(const rt_stream *s) { return (cuda_state *)s->rank->device; }
static inline cudaStream_t stream_of(const rt_stream *s) {
    return state_of(s)->stream[s - s->rank->stream].stream;
}
static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t divide_up(size_t n, size_t unit) { return (n + unit - 1) / unit; }
static inline size_t round_up(size_t n, size_t unit) { return divide_up(n, unit) * unit; }
static inline size_t bytes_of(rt_block b) { return b.count * rt_type_size(b.type); }

/* 0, or -1 and a failed world. */
static int check(rt_rank *rank, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return 0;
    cudaGetLastError(); /* or it would be found again by the next launch */
    return rt_fail(rank, "rank %d: CUDA: %s: %s", rank->rank, what, cudaGetErrorString(error));
}

static int check(rt_rank *rank, cublasStatus_t status, const char *what) {
    if (status == CUBLAS_STATUS_SUCCESS) return 0;
    return rt_fail(rank, "rank %d: cuBLASLt: %s: %s", rank->rank, what, LT(cublasLtGetStatusString)(status));
}

/* How many GPUs there are; -1: none, and why. */
static int count_devices(int *count, error_text *e) {
    int driver = 0, runtime = 0;
    *count = 0; /* a failing call leaves it as it is */
    cudaError_t error = cudaGetDeviceCount(count);
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (error == cudaErrorInsufficientDriver && driver)
        return error_set(e, "the CUDA driver is too old: found %d.%d, expected %d.%d or newer", driver / 1000,
                         driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (error == cudaErrorInsufficientDriver)
        return error_set(e, "no CUDA device: no driver is installed, expected one for CUDA %d.%d or newer",
                         runtime / 1000, runtime % 1000 / 10);
    if (error != cudaSuccess || *count < 1)
        return error_set(e, "no CUDA device: %s",
                         cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error));
    return 0;
}

static int cuda_list(FILE *out, error_text *e) {
    int count, driver = 0, runtime = 0;
    if (count_devices(&count, e)) return -1;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    fprintf(out, "CUDA               driver %d.%d, runtime %d.%d\n", driver / 1000, driver % 1000 / 10,
            runtime / 1000, runtime % 1000 / 10);
    for (int i = 0; i < count; i++) {
        cudaDeviceProp p;
        char id[32] = "";
        int can = 0, peers = 0;
        if (cudaGetDeviceProperties(&p, i) != cudaSuccess ||
            cudaDeviceGetPCIBusId(id, sizeof id, i) != cudaSuccess)
            return error_set(e, "CUDA device %d: %s", i, cudaGetErrorString(cudaGetLastError()));
        fprintf(out, "GPU %-14d %s, sm_%d%d, %.1f GB, bus %s, reaches", i, p.name, p.major, p.minor,
                1e-9 * (double)p.totalGlobalMem, id);
        for (int other = 0; other < count; other++)
            if (other != i && cudaDeviceCanAccessPeer(&can, i, other) == cudaSuccess && can)
                fprintf(out, " %d", other), peers++;
        fprintf(out, peers ? "\n" : " no other\n");
    }
    return 0;
}

static int cuda_memory(int first, int ranks, double *unused, double *total, error_text *e) {
    int count, current = 0;
    if (count_devices(&count, e)) return -1;
    if (first >= count)
        return error_set(
            e,
            "found %d CUDA devices, and a rank that is number %d of this host, expected a device "
            "for each (--backend local lets ranks share them)",
            count, first);
    cudaGetDevice(&current);
    *unused = *total = 0;
    for (int i = first; i < count && i < first + ranks; i++) {
        size_t left, all;
        cudaError_t error = cudaSetDevice(i);
        if (error == cudaSuccess) error = cudaMemGetInfo(&left, &all);
        if (error != cudaSuccess) return error_set(e, "CUDA device %d: %s", i, cudaGetErrorString(error));
        *unused += (double)left;
        *total += (double)all;
    }
    cudaSetDevice(current);
    return 0;
}

static void *allocate(rt_rank *rank, size_t bytes) {
    cuda_state *c = (cuda_state *)rank->device;
    cudaStream_t stream = c->stream[RT_COMPUTE].stream;
    void *memory = NULL;
    if (bytes > SIZE_MAX - ALIGNMENT) return NULL;
    bytes = round_up(bytes, ALIGNMENT);
    if (c->arena) {
        if (bytes > c->arena_size - c->arena_used) return NULL;
        memory = c->arena + c->arena_used;
        c->arena_used += bytes;
        c->pieces++;
    } else if (cudaMalloc(&memory, bytes) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    if (check(rank, cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync") ||
        check(rank, cudaStreamSynchronize(stream), "cudaStreamSynchronize"))
        return NULL;
    return memory;
}

static void release(rt_rank *rank, void *memory, size_t bytes) {
    cuda_state *c = (cuda_state *)rank->device;
    (void)bytes;
    if (!c->arena)
        check(rank, cudaFree(memory), "cudaFree");
    else if (--c->pieces == 0)
        c->arena_used = 0;
}

/* Page-locked, so that copies run beside the kernels; any GPU may use it. */
static void *allocate_host(rt_rank *rank, size_t bytes) {
    void *memory = NULL;
    (void)rank;
    if (cudaHostAlloc(&memory, bytes, cudaHostAllocPortable) == cudaSuccess) return memset(memory, 0, bytes);
    cudaGetLastError();
    return NULL;
}

static void release_host(rt_rank *rank, void *memory, size_t bytes) {
    (void)bytes;
    check(rank, cudaFreeHost(memory), "cudaFreeHost");
}

static int cuda_reserve(rt_rank *rank, const rt_ledger *ledger, error_text *e) {
    cuda_state *c = (cuda_state *)rank->device;
    size_t bytes = ledger->total_peak_bytes, slack = ledger->allocations * ALIGNMENT, left = 0, all = 0;
    if (bytes > SIZE_MAX - slack || cudaMalloc(&c->arena, bytes + slack) != cudaSuccess) {
        cudaGetLastError();
        cudaMemGetInfo(&left, &all);
        c->arena = NULL;
        return error_set(e,
                         "rank %d: out of memory: found %.3f GB free of the GPU's %.3f GB, expected %.3f GB",
                         rank->rank, 1e-9 * (double)left, 1e-9 * (double)all, 1e-9 * (double)bytes);
    }
    c->arena_size = rank->arena_size = bytes + slack;
    rank->arena = c->arena;
    return 0;
}

/* Scratch memory for one operation on the compute stream. It grows during the first step and then stays. NULL
 * and a failed world: there is no more memory. */
static void *scratch(rt_stream *s, size_t bytes) {
    cuda_state *c = state_of(s);
    if (bytes <= c->scratch_size) return c->scratch;
    if (c->captures) {
        rt_fail(s->rank,
                "rank %d: found an operation with %zu bytes of scratch, expected at most the %zu that a CUDA "
                "graph holds on to",
                s->rank->rank, bytes, c->scratch_size);
        return NULL;
    }
    if (c->scratch) check(s->rank, cudaFreeAsync(c->scratch, stream_of(s)), "cudaFreeAsync");
    c->scratch_size = 0;
    c->scratch = NULL;
    if (check(s->rank, cudaMallocAsync(&c->scratch, bytes, stream_of(s)), "cudaMallocAsync of scratch"))
        return c->scratch = NULL;
    c->scratch_size = bytes;
    return c->scratch;
}

/* Host memory may be reused when this returns: a large copy goes through page-locked memory. */
static void copy_in(rt_stream *s, rt_block to, const void *from) {
    cuda_state *c = state_of(s);
    size_t bytes = bytes_of(to);
    if (bytes > SMALL_COPY) {
        auto *stage = &c->stage[c->next_stage++ % STAGES];
        if (check(s->rank, cudaEventSynchronize(stage->copied), "cudaEventSynchronize")) return;
        if (stage->size < bytes) {
            if (stage->size) check(s->rank, cudaFreeHost(stage->memory), "cudaFreeHost");
            stage->size = 0;
            if (check(s->rank, cudaMallocHost(&stage->memory, bytes), "cudaMallocHost")) {
                stage->memory = NULL;
                return;
            }
            stage->size = bytes;
        }
        memcpy(stage->memory, from, bytes);
        check(s->rank, cudaMemcpyAsync(to.data, stage->memory, bytes, cudaMemcpyHostToDevice, stream_of(s)),
              "copy to the device");
        check(s->rank, cudaEventRecord(stage->copied, stream_of(s)), "cudaEventRecord");
    } else {
        check(s->rank, cudaMemcpyAsync(to.data, from, bytes, cudaMemcpyHostToDevice, stream_of(s)),
              "copy to the device");
    }
}

static void copy_out(rt_stream *s, void *to, rt_block from) {
    if (check(s->rank, cudaMemcpyAsync(to, from.data, bytes_of(from), cudaMemcpyDeviceToHost, stream_of(s)),
              "copy from the device"))
        return;
    check(s->rank, cudaStreamSynchronize(stream_of(s)), "copy from the device");
}

/* Within the device, or from or to page-locked host memory: their addresses tell. */
static void copy_inside(rt_stream *s, void *to, const void *from, size_t bytes) {
    check(s->rank, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(s)), "copy");
}

static void record_event(rt_stream *s, rt_event *event) {
    cuda_stream *cs = &state_of(s)->stream[s - s->rank->stream];
    event->device = NULL;
    if (!cs->stream) return; /* the host's */
    cuda_event *e = &cs->event[cs->next.fetch_add(1) % EVENTS];
    check(s->rank, cudaEventRecord(e->event, cs->stream), "cudaEventRecord");
    e->capture = state_of(s)->capturing;
    event->device = e;
}

/* No wait may cross the border of a capture (cudaErrorStreamCaptureIsolation, cudaErrorCapturedEvent), and
 * none need: what came before a graph is joined where the graph begins, and what was recorded in one has
 * happened when that graph has run. */
static void wait_for_event(rt_stream *s, rt_event *event) {
    cuda_state *c = state_of(s);
    cuda_event *e = (cuda_event *)event->device;
    cudaStream_t stream = stream_of(s);
    if (!e || (c->capturing && e->capture != c->capturing)) return;
    if (e->capture != c->capturing) e = &c->replayed;
    if (stream)
        check(s->rank, cudaStreamWaitEvent(stream, e->event, 0), "cudaStreamWaitEvent");
    else
        check(s->rank, cudaEventSynchronize(e->event), "cudaEventSynchronize");
}

/* What comes later on `stream` comes after all that the other stream holds now. */
static void join(rt_rank *rank, int stream, int other) {
    rt_event end = {};
    record_event(&rank->stream[other], &end);
    wait_for_event(&rank->stream[stream], &end);
}

/* Of the streams the copy stream alone takes no part in graphs. */
static void capture(rt_rank *rank) {
    cuda_state *c = (cuda_state *)rank->device;
    join(rank, RT_COMPUTE, RT_COMMUNICATION);
    check(rank, cudaStreamBeginCapture(c->stream[RT_COMPUTE].stream, cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture");
    c->capturing = ++c->captures;
    join(rank, RT_COMMUNICATION, RT_COMPUTE);
}

static void *captured(rt_rank *rank) {
    cuda_state *c = (cuda_state *)rank->device;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    join(rank, RT_COMPUTE, RT_COMMUNICATION);
    check(rank, cudaStreamEndCapture(c->stream[RT_COMPUTE].stream, &graph), "cudaStreamEndCapture");
    c->capturing = 0;
    if (!graph) return NULL;
    if (check(rank, cudaGraphInstantiateWithFlags(&executable, graph, 0), "cudaGraphInstantiate"))
        executable = NULL;
    cudaGraphDestroy(graph);
    return executable;
}

static void replay(rt_rank *rank, void *graph) {
    cuda_state *c = (cuda_state *)rank->device;
    cudaStream_t stream = c->stream[RT_COMPUTE].stream;
    join(rank, RT_COMPUTE, RT_COMMUNICATION);
    check(rank, cudaGraphLaunch((cudaGraphExec_t)graph, stream), "cudaGraphLaunch");
    check(rank, cudaEventRecord(c->replayed.event, stream), "cudaEventRecord");
    join(rank, RT_COMMUNICATION, RT_COMPUTE);
}

static void forget(rt_rank *rank, void *graph) {
    cuda_state *c = (cuda_state *)rank->device;
    check(rank, cudaStreamSynchronize(c->stream[RT_COMPUTE].stream), "cudaStreamSynchronize");
    check(rank, cudaGraphExecDestroy((cudaGraphExec_t)graph), "cudaGraphExecDestroy");
}

static const char *cuda_description(const rt_rank *rank) {
    return ((const cuda_state *)rank->device)->description;
}

/* ----------------------------------------------------------------------------------- numbers and launches */

/* Launches `kernel` on stream s with `shared` bytes of dynamic shared memory; no blocks: nothing to do. */
#define LAUNCH(kernel, blocks, threads, shared, s, ...)                                                      \
    do {                                                                                                     \
        auto kernel_ = kernel;                                                                               \
        if ((blocks) == 0) break;                                                                            \
        kernel_<<<(unsigned)(blocks), threads, shared, stream_of(s)>>>(__VA_ARGS__);                         \
        check((s)->rank, cudaGetLastError(), #kernel);                                                       \
    } while (0)

/* Calls f(T()) with the C++ type of `type`. */
template <class F> static void by_type(rt_type type, F f) {
    if (type == RT_FP32) f(float());
    if (type == RT_BF16) f(bf16());
    if (type == RT_FP16) f(fp16());
}

static const int THREADS = 256, WARP = 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }
__device__ inline void round_to(float *to, float x) { *to = x; }
__device__ inline void round_to(bf16 *to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void round_to(fp16 *to, float x) { *to = __float2half_rn(x); }

/* Most kernels give a thread 8 consecutive elements, which they move by vectors of 16 bytes. */
static const int VEC = 8;
typedef struct {
    float v[VEC];
} vec;

/* The first n of 8 elements at p, or all of them; 0 for the others. */
template <class T> __device__ inline vec load(const T *p, size_t n) {
    vec x;
    if (n >= VEC && (uintptr_t)p % 16 == 0) {
        uint4 raw[sizeof(T) / 2];
#pragma unroll
        for (int i = 0; i < (int)sizeof(T) / 2; i++) raw[i] = ((const uint4 *)p)[i];
#pragma unroll
        for (int i = 0; i < VEC; i++) x.v[i] = to_float(((const T *)raw)[i]);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) x.v[i] = (size_t)i < n ? to_float(p[i]) : 0;
    }
    return x;
}

template <class T> __device__ inline void store(T *p, size_t n, const vec &x) {
    if (n >= VEC && (uintptr_t)p % 16 == 0) {
        uint4 raw[sizeof(T) / 2];
#pragma unroll
        for (int i = 0; i < VEC; i++) round_to((T *)raw + i, x.v[i]);
#pragma unroll
        for (int i = 0; i < (int)sizeof(T) / 2; i++) ((uint4 *)p)[i] = raw[i];
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++)
            if ((size_t)i < n) round_to(p + i, x.v[i]);
    }
}

__device__ inline size_t thread_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
static size_t blocks_of(size_t threads) { return divide_up(threads, THREADS); }
static size_t vector_blocks(size_t count) { return blocks_of(divide_up(count, VEC)); }

__device__ inline float warp_sum(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

/* ------------------------------------------------------------------------------------- the matrix product */

/* Element (i, j) at at[i * ld + j]; transposed: at at[j * ld + i]. Of `batch` matrices the next begins
 * `stride` elements later. */
typedef struct {
    const void *at;
    rt_type type;
    size_t ld, stride;
    int transposed;
} matrix;

/* c [M, N] = alpha a [M, K] b [K, N], `batch` times; bias [N] is added, or sums [M] = sums of a's rows. */
typedef struct {
    size_t M, N, K, batch;
    matrix c, a, b;
    float alpha;
    cublasLtEpilogue_t epilogue;
    void *bias; /* of the epilogue, in c's type */
    void *aux;  /* [M, N], in c's type and with its ld: takes the epilogue's input; or NULL */
} product;

/* All that the choice of an algorithm depends on. cuBLASLt's matrices lie column by column, so that to it a
 * row major c is c^T [N, M] = b^T a^T: its A is our b, its B our a, its m our N, its n our M. */
typedef struct {
    uint64_t m, n, k, batch, lda, ldb, ldc, stride_a, stride_b, stride_c, align_aux;
    uint32_t type, type_c, transpose_a, transpose_b, epilogue, align_a, align_b, align_c;
} matmul_key;

struct matmul_plan {
    matmul_key key;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
    int usable;         /* there is one */
    float milliseconds; /* that it took */
};

static cudaDataType cuda_type(rt_type type) {
    return type == RT_BF16 ? CUDA_R_16BF : type == RT_FP16 ? CUDA_R_16F : CUDA_R_32F;
}

/* The largest power of two up to 256 that divides the address. */
static uint32_t alignment_of(const void *p) {
    uint32_t lowest = (uint32_t)((uintptr_t)p & -(uintptr_t)p);
    return lowest == 0 || lowest > 256 ? 256 : lowest;
}

static matmul_key key_of(const product *p) {
    matmul_key k;
    memset(&k, 0, sizeof k); /* keys are compared byte by byte */
    k.m = p->N, k.n = p->M, k.k = p->K, k.batch = p->batch;
    k.lda = p->b.ld, k.ldb = p->a.ld, k.ldc = p->c.ld;
    k.stride_a = p->b.stride, k.stride_b = p->a.stride, k.stride_c = p->c.stride;
    k.type = p->a.type, k.type_c = p->c.type;
    k.transpose_a = (uint32_t)p->b.transposed, k.transpose_b = (uint32_t)p->a.transposed;
    k.epilogue = p->epilogue;
    k.align_a = alignment_of(p->b.at), k.align_b = alignment_of(p->a.at), k.align_c = alignment_of(p->c.at);
    k.align_aux = alignment_of(p->aux);
    return k;
}

/* A column-major matrix of rows x columns, or, transposed, of columns x rows. */
static int create_layout(rt_rank *rank, cublasLtMatrixLayout_t *layout, rt_type type, int transposed,
                         size_t rows, size_t columns, size_t ld, size_t batch, size_t stride) {
    int32_t count = (int32_t)batch;
    int64_t offset = (int64_t)stride;
    uint64_t r = transposed ? columns : rows, c = transposed ? rows : columns;
    return check(rank, LT(cublasLtMatrixLayoutCreate)(layout, cuda_type(type), r, c, (int64_t)ld),
                 "layout") ||
           check(rank,
                 LT(cublasLtMatrixLayoutSetAttribute)(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                                      sizeof count),
                 "layout") ||
           check(rank,
                 LT(cublasLtMatrixLayoutSetAttribute)(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                      &offset, sizeof offset),
                 "layout");
}

static cublasStatus_t run_plan(rt_stream *s, const matmul_plan *plan, const product *p) {
    cuda_state *c = state_of(s);
    const float beta = 0;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    if (p->bias)
        status = LT(cublasLtMatmulDescSetAttribute)(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                    &p->bias, sizeof p->bias);
    if (p->aux && status == CUBLAS_STATUS_SUCCESS)
        status = LT(cublasLtMatmulDescSetAttribute)(
            plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p->aux, sizeof p->aux);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    void *to = (void *)p->c.at;
    return LT(cublasLtMatmul)(c->blas, plan->operation, &p->alpha, p->b.at, plan->a, p->a.at, plan->b, &beta,
                              to, plan->c, to, plan->c, &plan->algorithm, c->workspace, WORKSPACE,
                              stream_of(s));
}

/* Milliseconds that f() takes on the stream, the mean of a few times; INFINITY if it fails. */
template <class F> static float time_of(rt_stream *s, F f) {
    const int TIMES = 3;
    cudaEvent_t begin, end;
    float ms = INFINITY;
    if (check(s->rank, cudaEventCreate(&begin), "cudaEventCreate")) return ms;
    if (!check(s->rank, cudaEventCreate(&end), "cudaEventCreate")) {
        int works = f(); /* the first time it may load code */
        check(s->rank, cudaEventRecord(begin, stream_of(s)), "cudaEventRecord");
        for (int i = 0; i < TIMES && works; i++) works = f();
        check(s->rank, cudaEventRecord(end, stream_of(s)), "cudaEventRecord");
        check(s->rank, cudaEventSynchronize(end), "timing a product");
        if (works) check(s->rank, cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
        cudaEventDestroy(end);
    }
    cudaEventDestroy(begin);
    return ms / TIMES;
}

/* Fills in the plan: the fastest of what cuBLASLt proposes. Without INPLACE reductions, whose atomics add in
 * any order. -1: the world has failed. */
static int choose_algorithm(rt_stream *s, matmul_plan *plan, const product *p) {
    enum { MOST = 8 };
    cuda_state *c = state_of(s);
    rt_rank *rank = s->rank;
    const matmul_key *k = &plan->key;
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found[MOST];
    cublasOperation_t transpose_a = k->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t transpose_b = k->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_MASK & ~(uint32_t)CUBLASLT_REDUCTION_SCHEME_INPLACE;
    int64_t aux_ld = (int64_t)k->ldc;
    int count = 0;
    plan->milliseconds = INFINITY;
    cublasComputeType_t compute = p->a.type == RT_FP32 ? c->fp32_product : CUBLAS_COMPUTE_32F;
    if (check(rank, LT(cublasLtMatmulDescCreate)(&plan->operation, compute, CUDA_R_32F), "product") ||
        create_layout(rank, &plan->a, p->b.type, p->b.transposed, k->m, k->k, k->lda, k->batch,
                      k->stride_a) ||
        create_layout(rank, &plan->b, p->a.type, p->a.transposed, k->k, k->n, k->ldb, k->batch,
                      k->stride_b) ||
        create_layout(rank, &plan->c, p->c.type, 0, k->m, k->n, k->ldc, k->batch, k->stride_c) ||
        check(rank, LT(cublasLtMatmulPreferenceCreate)(&wish), "preference"))
        return -1;
    const struct {
        cublasLtMatmulDescAttributes_t name;
        const void *value;
        size_t size;
    } attributes[] = {{CUBLASLT_MATMUL_DESC_TRANSA, &transpose_a, sizeof transpose_a},
                      {CUBLASLT_MATMUL_DESC_TRANSB, &transpose_b, sizeof transpose_b},
                      {CUBLASLT_MATMUL_DESC_EPILOGUE, &p->epilogue, sizeof p->epilogue},
                      {CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias},
                      {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p->aux, sizeof p->aux},
                      {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_ld, sizeof aux_ld}};
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t size;
    } wishes[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE, sizeof WORKSPACE},
                  {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &k->align_a, sizeof k->align_a},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &k->align_b, sizeof k->align_b},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &k->align_c, sizeof k->align_c},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &k->align_c, sizeof k->align_c}};
    int failed = 0;
    for (size_t i = 0; i < (p->aux ? 6 : p->bias ? 4 : 3) && !failed; i++)
        failed = check(rank,
                       LT(cublasLtMatmulDescSetAttribute)(plan->operation, attributes[i].name,
                                                          attributes[i].value, attributes[i].size),
                       "product");
    for (size_t i = 0; i < sizeof wishes / sizeof *wishes && !failed; i++)
        failed = check(
            rank,
            LT(cublasLtMatmulPreferenceSetAttribute)(wish, wishes[i].name, wishes[i].value, wishes[i].size),
            "preference");
    /* a status other than success says that there is none: count is 0 then */
    if (!failed &&
        LT(cublasLtMatmulAlgoGetHeuristic)(c->blas, plan->operation, plan->a, plan->b, plan->c, plan->c, wish,
                                           MOST, found, &count) != CUBLAS_STATUS_SUCCESS)
        count = 0;
    cublasLtMatmulAlgo_t best;
    for (int i = 0; i < count && !failed; i++) {
        if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
        plan->algorithm = found[i].algo;
        float ms = time_of(s, [&] { return run_plan(s, plan, p) == CUBLAS_STATUS_SUCCESS; });
        if (!(ms < plan->milliseconds)) continue;
        plan->milliseconds = ms;
        plan->usable = 1;
        best = found[i].algo;
        if (c->first_algorithm) break;
    }
    if (plan->usable) plan->algorithm = best;
    LT(cublasLtMatmulPreferenceDestroy)(wish);
    return failed || rt_failed(rank) ? -1 : 0;
}

/* The plan of a product's shape, made when it first comes (*is_new). NULL: the world has failed. */
static matmul_plan *plan_of(rt_stream *s, const product *p, int *is_new) {
    cuda_state *c = state_of(s);
    matmul_key key = key_of(p);
    *is_new = 0;
    for (size_t i = 0; i < c->plans; i++)
        if (!memcmp(&c->plan[i].key, &key, sizeof key)) return &c->plan[i];
    if (c->capturing) {
        rt_fail(
            s->rank,
            "rank %d: found a new product, %zu x %zu x %zu, while a CUDA graph is captured, expected those "
            "of the step before",
            s->rank->rank, p->M, p->N, p->K);
        return NULL;
    }
    if (c->plans == c->plans_room) {
        size_t room = c->plans_room ? 2 * c->plans_room : 64;
        matmul_plan *larger = (matmul_plan *)realloc(c->plan, room * sizeof *larger);
        if (!larger) {
            rt_fail(s->rank, "rank %d: out of memory for a matrix product", s->rank->rank);
            return NULL;
        }
        c->plan = larger;
        c->plans_room = room;
    }
    matmul_plan *plan = &c->plan[c->plans++];
    memset(plan, 0, sizeof *plan);
    plan->key = key;
    *is_new = 1;
    return choose_algorithm(s, plan, p) ? NULL : plan;
}

static void multiply(rt_stream *s, const product *p) {
    int is_new;
    const matmul_plan *plan = plan_of(s, p, &is_new);
    if (plan && !plan->usable)
        rt_fail(s->rank, "rank %d: cuBLASLt has no algorithm for a product of %zu x %zu x %zu (%s)",
                s->rank->rank, p->M, p->N, p->K,
                p->a.type == RT_FP32   ? "fp32"
                : p->a.type == RT_BF16 ? "bf16"
                                       : "fp16");
    else if (plan)
        check(s->rank, run_plan(s, plan, p), "cublasLtMatmul");
}

/* A product whose epilogue does more, or the plain one and then rest(): whichever is faster when the shape
 * first comes; the former, if cuBLASLt has it, where the first algorithm is asked for. */
template <class F> static void multiply_fused(rt_stream *s, const product *p, const product *plain, F rest) {
    int is_new, ignored;
    matmul_plan *fused = plan_of(s, p, &is_new);
    if (fused && is_new && fused->usable) {
        float fused_ms = fused->milliseconds;
        size_t at = (size_t)(fused - state_of(s)->plan); /* the next plan may move this one */
        matmul_plan *alone = plan_of(s, plain, &ignored);
        if (!alone) return;
        float apart_ms = alone->milliseconds + time_of(s, [&] {
                             rest();
                             return !rt_failed(s->rank);
                         });
        fused = &state_of(s)->plan[at];
        fused->usable = fused_ms <= apart_ms || state_of(s)->first_algorithm;
    }
    if (!fused) return;
    if (fused->usable) {
        check(s->rank, run_plan(s, fused, p), "cublasLtMatmul");
    } else {
        multiply(s, plain);
        rest();
    }
}

/* ---------------------------------------------------------------------------------------- sums of columns */

/* Sums over rows go through chunks of rows, at most CHUNKS: first each chunk [cols], then the chunks. */
static const int CHUNKS = 1024, SUM_ROWS = 8;

/* partial [chunks, cols] = sums over each chunk of x [rows, cols]. A block has SUM_ROWS rows of 32 threads
 * with VEC columns each. */
template <class T>
__global__ void chunk_sums(float *partial, const T *x, size_t rows, size_t cols, size_t chunk) {
    __shared__ vec sums[SUM_ROWS][WARP];
    const size_t across = (cols + WARP * VEC - 1) / (WARP * VEC);
    const size_t j = (blockIdx.x % across * WARP + threadIdx.x) * VEC, i0 = blockIdx.x / across * chunk;
    const size_t end = i0 + chunk < rows ? i0 + chunk : rows;
    vec sum = {{0}};
    for (size_t i = i0 + threadIdx.y; i < end && j < cols; i += SUM_ROWS) {
        const vec add = load(x + i * cols + j, cols - j);
        for (int k = 0; k < VEC; k++) sum.v[k] += add.v[k];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || j >= cols) return;
    for (int row = 1; row < SUM_ROWS; row++)
        for (int k = 0; k < VEC; k++) sum.v[k] += sums[row][threadIdx.x].v[k];
    store(partial + blockIdx.x / across * cols + j, cols - j, sum);
}

/* first [n], second [cols - n] = the sums over the chunks of partial [chunks, cols]. Blocks of 32 x 32
 * threads. */
template <class T>
__global__ void sum_of_chunks(T *first, T *second, const float *partial, size_t chunks, size_t cols,
                              size_t n) {
    __shared__ float sums[WARP][WARP + 1];
    const size_t j = (size_t)blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    for (size_t i = threadIdx.y; i < chunks && j < cols; i += WARP) sum += partial[i * cols + j];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || j >= cols) return;
    for (int row = 1; row < WARP; row++) sum += sums[row][threadIdx.x];
    round_to(j < n ? first + j : second + (j - n), sum);
}

static void add_chunks(rt_stream *s, rt_block first, void *second, const float *partial, size_t chunks,
                       size_t cols, size_t n) {
    by_type(first.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(sum_of_chunks<T>, divide_up(cols, WARP), dim3(WARP, WARP), 0, s, (T *)first.data, (T *)second,
               partial, chunks, cols, n);
    });
}

/* sums [cols] = the sum over the rows of x [rows, cols] */
static void sum_rows(rt_stream *s, rt_block sums, rt_block x, size_t rows, size_t cols) {
    const size_t chunk = divide_up(rows, CHUNKS) < 64 ? 64 : divide_up(rows, CHUNKS);
    const size_t chunks = divide_up(rows, chunk);
    float *partial = (float *)scratch(s, chunks * cols * sizeof *partial);
    if (!partial) return;
    by_type(x.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(chunk_sums<T>, divide_up(cols, WARP * VEC) * chunks, dim3(WARP, SUM_ROWS), 0, s, partial,
               (const T *)x.data, rows, cols, chunk);
    });
    add_chunks(s, sums, NULL, partial, chunks, cols, cols);
}

/* ------------------------------------------------------------------------------------------------- linear */

/* x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, and its derivative Phi(x) + x exp(-x^2/2) / sqrt(2 pi). */
__device__ inline float gelu_erf(float x, float *derivative) {
    const float phi = normcdff(x);
    *derivative = phi + x * (expf(-0.5f * x * x) * 0.398942280f);
    return x * phi;
}

/* x S(u) = x (1 + tanh(u / 2)) / 2 with u = sqrt(8 / pi) (x + 0.044715 x^3) and S(u) = 1 / (1 + exp(-u)), and
 * its derivative S(u) + x u' S(u) S(-u). With e = exp(-|u|), S(|u|) = 1 / (1 + e), S(-|u|) = e / (1 + e). */
__device__ inline float gelu_tanh(float x, float *derivative) {
    const float t = fabsf(x) > 16 ? 16 : fabsf(x); /* e is 0 there; powers of t must not overflow */
    const float e = expf(-1.59576912f * (t + 0.044715f * t * t * t));
    const float above = 1 / (1 + e), below = e * above, s = x < 0 ? below : above;
    *derivative = s + x * (above * below) * (1.59576912f + 0.214064449f * t * t);
    return x * s;
}

/* y = gelu(pre) and, unless dx is NULL, dx *= gelu'(pre) */
template <class T> __global__ void gelu_kernel(T *y, T *dx, const T *pre, size_t count, vit_gelu form) {
    const size_t i = thread_index() * VEC;
    if (i >= count) return;
    vec x = load(pre + i, count - i), d;
    for (int k = 0; k < VEC; k++)
        x.v[k] = form == VIT_GELU_TANH ? gelu_tanh(x.v[k], &d.v[k]) : gelu_erf(x.v[k], &d.v[k]);
    store(y + i, count - i, x);
    if (!dx) return;
    const vec g = load(dx + i, count - i);
    for (int k = 0; k < VEC; k++) d.v[k] *= g.v[k];
    store(dx + i, count - i, d);
}

static void apply_gelu(rt_stream *s, rt_block y, rt_block dx, rt_block pre, vit_gelu form) {
    by_type(pre.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(gelu_kernel<T>, vector_blocks(pre.count), THREADS, 0, s, (T *)y.data, (T *)dx.data,
               (const T *)pre.data, pre.count, form);
    });
}

static matrix whole(rt_block b, size_t ld, int transposed) {
    return matrix{b.data, b.type, ld, 0, transposed};
}

/* y = x w^T + b, or pre = x w^T + b, y = gelu(pre). cuBLASLt's own GELU is the form by tanh; to write pre as
 * well it wants rows of a multiple of 8 numbers. fp32 does without it: how exact its tanh is, nobody says. */
static void linear_forward(rt_stream *s, rt_block y, rt_block pre, rt_block x, rt_block w, rt_block b,
                           size_t rows, size_t in, size_t out, vit_gelu form) {
    rt_block to = pre.data ? pre : y;
    const product p = {
        rows,   out, in, 1, whole(to, out, 0), whole(x, in, 0), whole(w, in, 1), 1, CUBLASLT_EPILOGUE_BIAS,
        b.data, NULL};
    auto activate = [&] {
        if (pre.data) apply_gelu(s, y, rt_block{}, rt_slice(pre, 0, rows * out), form);
    };
    if (pre.data && form == VIT_GELU_TANH && y.type != RT_FP32 && out % 8 == 0) {
        product fused = p;
        fused.c = whole(y, out, 0);
        fused.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
        fused.aux = pre.data;
        multiply_fused(s, &fused, &p, activate);
    } else {
        multiply(s, &p);
        activate();
    }
}

/* dw = dy^T x, db = sum over rows of dy: in one product if that is faster than in two passes over dy. */
static void weight_gradient(rt_stream *s, rt_block dw, rt_block db, rt_block dy, rt_block x, size_t rows,
                            size_t in, size_t out) {
    product p = {out,
                 in,
                 rows,
                 1,
                 whole(dw, in, 0),
                 whole(dy, out, 1),
                 whole(x, in, 0),
                 1,
                 CUBLASLT_EPILOGUE_BGRADB,
                 db.data,
                 NULL};
    product plain = p;
    plain.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    plain.bias = NULL;
    multiply_fused(s, &p, &plain, [&] { sum_rows(s, db, dy, rows, out); });
}

/* y = x w^T + b:  dw = dy^T x, db = sum over rows of dy, dx = dy w; where x = gelu(pre), which is computed
 * again, dx is that times gelu'(pre) */
static void linear_backward(rt_stream *s, rt_block dx, rt_block dw, rt_block db, rt_block dy, rt_block x,
                            rt_block w, rt_block pre, size_t rows, size_t in, size_t out, vit_gelu form) {
    const product input = {
        rows, in,  out, 1, whole(dx, in, 0), whole(dy, out, 0), whole(w, in, 0), 1, CUBLASLT_EPILOGUE_DEFAULT,
        NULL, NULL};
    if (dx.data) multiply(s, &input);
    if (pre.data) apply_gelu(s, x, dx, rt_slice(pre, 0, rows * in), form);
    weight_gradient(s, dw, db, dy, x, rows, in, out);
}

/* ---------------------------------------------------------------------------------------------- layernorm */

/* A row is the work of one warp; lane l has columns 8 l .. 8 l + 7, and again 256 further on. */
static const int STRIDE = WARP * VEC;

/* What is added to x before: out = x + k_b branch; no branch: nothing. */
template <class T> struct residual {
    T *out;
    const T *branch;
    const uint64_t *keys;
    size_t Q, x_stride; /* rows an image; elements from one image of x to the next */
    double rate;
    uint64_t salt;
};

template <class T>
__global__ void layernorm_forward_kernel(T *y_, float *mean, float *rstd, const T *x_, const T *gamma,
                                         const T *beta, size_t rows, size_t dim, float eps, residual<T> add) {
    const size_t row = thread_index() / WARP, first = threadIdx.x % WARP * VEC;
    if (row >= rows) return;
    const T *x = x_ + row * dim;
    if (add.branch) {
        const size_t b = row / add.Q;
        const float k = add.rate > 0 ? (float)vit_drop_path_factor(add.keys[b], add.salt, add.rate) : 1;
        x = x_ + b * add.x_stride + row % add.Q * dim;
        for (size_t j = first; j < dim; j += STRIDE) {
            const vec from = load(add.branch + row * dim + j, dim - j);
            vec to = load(x + j, dim - j);
            for (int i = 0; i < VEC; i++) to.v[i] += k * from.v[i];
            store(add.out + row * dim + j, dim - j, to);
        }
        x = add.out + row * dim; /* rounded; each lane reads again what it has written */
    }
    float sum = 0, squares = 0;
    for (size_t j = first; j < dim; j += STRIDE) {
        const vec v = load(x + j, dim - j);
        for (int k = 0; k < VEC; k++) sum += v.v[k];
    }
    const float m = warp_sum(sum) / (float)dim;
    for (size_t j = first; j < dim; j += STRIDE) {
        const vec v = load(x + j, dim - j);
        for (int k = 0; k < VEC; k++)
            if (j + k < dim) squares += (v.v[k] - m) * (v.v[k] - m);
    }
    const float r = 1 / sqrtf(warp_sum(squares) / (float)dim + eps);
    for (size_t j = first; j < dim; j += STRIDE) {
        vec v = load(x + j, dim - j);
        const vec g = load(gamma + j, dim - j), b = load(beta + j, dim - j);
        for (int k = 0; k < VEC; k++) v.v[k] = (v.v[k] - m) * r * g.v[k] + b.v[k];
        store(y_ + row * dim + j, dim - j, v);
    }
    if (threadIdx.x % WARP) return;
    mean[row] = m;
    rstd[row] = r;
}

static void residual_layernorm_forward(rt_stream *s, rt_block y, rt_block mean, rt_block rstd, rt_block out,
                                       rt_block x, rt_block branch, rt_block keys, rt_block gamma,
                                       rt_block beta, size_t B, size_t Q, size_t x_stride, size_t dim,
                                       double eps, double rate, uint64_t salt) {
    by_type(x.type, [&](auto zero) {
        using T = decltype(zero);
        const residual<T> add = {
            (T *)out.data, (const T *)branch.data, (const uint64_t *)keys.data, Q, x_stride, rate, salt};
        LAUNCH(layernorm_forward_kernel<T>, blocks_of(B * Q * WARP), THREADS, 0, s, (T *)y.data,
               (float *)mean.data, (float *)rstd.data, (const T *)x.data, (const T *)gamma.data,
               (const T *)beta.data, B * Q, dim, (float)eps, add);
    });
}

static void layernorm_forward(rt_stream *s, rt_block y, rt_block mean, rt_block rstd, rt_block x,
                              rt_block gamma, rt_block beta, size_t rows, size_t dim, double eps) {
    const rt_block none = {};
    residual_layernorm_forward(s, y, mean, rstd, none, x, none, none, gamma, beta, 1, rows, 0, dim, eps, 0,
                               0);
}

/* n = (x - mean) rstd, y = n gamma + beta, with g = dy gamma:
 *     dx = rstd (g - mean(g) - n mean(g n)),  dgamma = sum over rows of dy n,  dbeta = sum over rows of dy
 * A block has a chunk of rows, of which its warps take every W-th. Each warp adds up dgamma and dbeta in
 * memory of its own, sums [blocks, W, 2, dim] or, where that is NULL, in shared memory; then the block adds
 * up those, into partial [blocks, 2, dim]. */
template <class T>
__global__ void layernorm_backward_kernel(T *dx, float *partial, float *sums, const T *residual, const T *dy_,
                                          const T *x_, const float *mean, const float *rstd, const T *gamma,
                                          size_t rows, size_t chunk, size_t tokens, size_t Q, size_t dim) {
    extern __shared__ float shared[];
    const size_t warp = threadIdx.x / WARP, warps = blockDim.x / WARP, first = threadIdx.x % WARP * VEC;
    float *all = sums ? sums + blockIdx.x * warps * 2 * dim : shared;
    float *dgamma = all + warp * 2 * dim, *dbeta = dgamma + dim;
    for (size_t j = first; j < dim; j += STRIDE)
        for (size_t k = j; k < j + VEC && k < dim; k++) dgamma[k] = dbeta[k] = 0;
    const size_t begin = blockIdx.x * chunk, end = begin + chunk < rows ? begin + chunk : rows;
    for (size_t i = begin + warp; i < end; i += warps) {
        const T *dy = dy_ + i * dim, *x = x_ + i * dim;
        const float m = mean[i], r = rstd[i];
        float sum_g = 0, sum_gn = 0;
        for (size_t j = first; j < dim; j += STRIDE) {
            const vec d = load(dy + j, dim - j), v = load(x + j, dim - j), g = load(gamma + j, dim - j);
            for (int k = 0; k < VEC && j + k < dim; k++) {
                const float n = (v.v[k] - m) * r;
                sum_g += d.v[k] * g.v[k];
                sum_gn += d.v[k] * g.v[k] * n;
                dgamma[j + k] += d.v[k] * n;
                dbeta[j + k] += d.v[k];
            }
        }
        const float mean_g = warp_sum(sum_g) / (float)dim, mean_gn = warp_sum(sum_gn) / (float)dim;
        const size_t token = i % tokens;
        const T *add = residual && token < Q ? residual + (i / tokens * Q + token) * dim : NULL;
        for (size_t j = first; j < dim; j += STRIDE) {
            const vec d = load(dy + j, dim - j), v = load(x + j, dim - j), g = load(gamma + j, dim - j);
            vec to = add ? load(add + j, dim - j) : vec{{0}};
            for (int k = 0; k < VEC; k++)
                to.v[k] += r * (d.v[k] * g.v[k] - mean_g - (v.v[k] - m) * r * mean_gn);
            store(dx + i * dim + j, dim - j, to);
        }
    }
    __syncthreads();
    for (size_t j = threadIdx.x; j < 2 * dim; j += blockDim.x) {
        float sum = all[j];
        for (size_t w = 1; w < warps; w++) sum += all[w * 2 * dim + j];
        partial[blockIdx.x * 2 * dim + j] = sum;
    }
}

static void layernorm_backward(rt_stream *s, rt_block dx, rt_block dgamma, rt_block dbeta, rt_block residual,
                               rt_block dy, rt_block x, rt_block mean, rt_block rstd, rt_block gamma,
                               size_t B, size_t T_, size_t Q, size_t dim) {
    const size_t WARPS = 4, SHARED = 48 << 10;
    const size_t rows = B * T_, chunk = divide_up(rows, CHUNKS) < 16 ? 16 : divide_up(rows, CHUNKS);
    const size_t blocks = divide_up(rows, chunk), bytes = WARPS * 2 * dim * sizeof(float);
    const int fits = bytes <= SHARED;
    float *partial = (float *)scratch(s, (blocks * 2 * dim) * sizeof(float) + (fits ? 0 : blocks * bytes));
    if (!partial) return;
    by_type(x.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(layernorm_backward_kernel<T>, blocks, WARPS * WARP, fits ? bytes : 0, s, (T *)dx.data, partial,
               fits ? NULL : partial + blocks * 2 * dim, (const T *)residual.data, (const T *)dy.data,
               (const T *)x.data, (const float *)mean.data, (const float *)rstd.data, (const T *)gamma.data,
               rows, chunk, T_, Q, dim);
    });
    add_chunks(s, dgamma, dbeta.data, partial, blocks, 2 * dim, dim);
}

/* ------------------------------------------------------------------------------------------ tensor cores */

/* One warp's D [16, 8] += A [16, 16] B [16, 8] in fp32 of 16-bit operands (PTX ISA: mma.m16n8k16). With g =
 * lane / 4 and t = 2 (lane % 4), a lane holds
 *     a[0], a[2]: row g, columns t, t + 1 and those 8 further on;  a[1], a[3]: the same of row g + 8
 *     b[0], b[1]: rows t, t + 1 and those 8 further on, of column g
 *     d[0], d[1]: row g, columns t, t + 1;  d[2], d[3]: row g + 8 */
__device__ inline void mma(float d[4], const uint32_t a[4], const uint32_t b[2], bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma(float d[4], const uint32_t a[4], const uint32_t b[2], fp16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8 x 8 matrices of 16-bit numbers in shared memory: lane l gives the address of row l % 8 of matrix l /
 * 8, and gets of each matrix row g, columns t, t + 1; transposed: rows t, t + 1 of column g. */
__device__ inline void load_matrices(uint32_t x[4], const void *row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t x[4], const void *row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

/* --------------------------------------------------------------------------------------- attention, fused */

/* FlashAttention (Dao 2023, arXiv 2307.08691) for 16-bit types and heads of 64 and 80. A block of four warps
 * has 64 rows (queries, or keys in the last kernel) of one image and head, 16 a warp, in registers, and runs
 * along the columns (keys, or queries) in tiles of 64 in shared memory. Saved are of each query the largest
 * score and 1 / the sum of exp(score - largest), [B, H, Q] pairs: their logarithm in one number would lose
 * the digits of large scores. Backward computes the scores again, once for dq and once for dk and
 * dv: two fifths more arithmetic than in one pass, but no sum over blocks, hence the same bits every time. */
static const int ROWS = 64, WARP_ROWS = 16, FUSED_THREADS = 128, TILES = ROWS / 8;

/* A row of a tile is this much longer than HD: an odd number of 16 bytes, so that 8 rows lie in 8 banks. */
static const int PAD = 8;

__device__ inline uint32_t pack(float low, float high, bf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
__device__ inline uint32_t pack(float low, float high, fp16) {
    const __half2 x = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* tile [64, HD] = the first n rows at `from`, `ld` elements apart, then zeros. By all threads. */
template <class T, int HD> __device__ void load_tile(T *tile, const T *from, size_t ld, size_t n) {
    for (int i = threadIdx.x; i < ROWS * HD / VEC; i += FUSED_THREADS) {
        const int row = i / (HD / VEC), column = i % (HD / VEC) * VEC;
        uint4 x = {0, 0, 0, 0};
        if ((size_t)row < n) x = *(const uint4 *)(from + row * ld + column);
        *(uint4 *)(tile + row * (HD + PAD) + column) = x;
    }
}

/* a [HD / 16] = the warp's 16 rows at `from`, of which n exist, as left operands. */
template <class T, int HD>
__device__ void load_rows(uint32_t a[HD / 16][4], const T *from, size_t ld, size_t n) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < HD / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = g + i % 2 * 8, column = 16 * k + i / 2 * 8 + t;
            a[k][i] = (size_t)row < n ? *(const uint32_t *)(from + row * ld + column) : 0;
        }
}

/* s [16, 64] = a [16, HD] tile^T */
template <class T, int HD>
__device__ void times_transposed(float s[TILES][4], const uint32_t a[HD / 16][4], const T *tile) {
    const int lane = threadIdx.x % WARP, matrix_ = lane / 8;
    const T *row = tile + (matrix_ / 2 * 8 + lane % 8) * (HD + PAD) + matrix_ % 2 * 8;
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] = s[j + 1][i] = 0;
#pragma unroll
        for (int k = 0; k < HD / 16; k++) {
            uint32_t b[4]; /* rows j * 8 .. of the tile, columns 16 k .. and 8 further on; the next 8 rows */
            load_matrices(b, row + j * 8 * (HD + PAD) + 16 * k);
            mma(s[j], a[k], b, T());
            mma(s[j + 1], a[k], b + 2, T());
        }
    }
}

/* o [16, HD] += p [16, 64] tile, with p rounded */
template <class T, int HD>
__device__ void add_product(float o[HD / 8][4], const float p[TILES][4], const T *tile) {
    const int lane = threadIdx.x % WARP, matrix_ = lane / 8;
    const T *row = tile + (matrix_ % 2 * 8 + lane % 8) * (HD + PAD) + matrix_ / 2 * 8;
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++) {
        const float *left = p[2 * k], *right = p[2 * k + 1];
        const uint32_t a[4] = {pack(left[0], left[1], T()), pack(left[2], left[3], T()),
                               pack(right[0], right[1], T()), pack(right[2], right[3], T())};
#pragma unroll
        for (int j = 0; j < HD / 8; j += 2) {
            uint32_t b[4]; /* rows 16 k .. and 8 further on of columns 8 j ..; the next 8 columns */
            load_matrices_transposed(b, row + 16 * k * (HD + PAD) + 8 * j);
            mma(o[j], a, b, T());
            mma(o[j + 1], a, b + 2, T());
        }
    }
}

/* The warp's 16 rows at `to`, of which n exist, = o, row by row times factor[0] (row g) and factor[1] (g +
 * 8). */
template <class T, int HD>
__device__ void store_rows(T *to, size_t ld, size_t n, const float o[HD / 8][4], const float factor[2]) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < HD / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            if ((size_t)(g + half * 8) < n)
                *(uint32_t *)(to + (g + half * 8) * ld + 8 * j + t) =
                    pack(o[j][2 * half] * factor[half], o[j][2 * half + 1] * factor[half], T());
}

/* The four lanes that share a row. */
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* Where a block works: `first` is its first row, `mine` the warp's. q, k and v of its image and head begin at
 * qkv + at, D and 2 D further on, and have rows of 3 D elements; out's begin at `out`, rows of D. */
typedef struct {
    size_t pair, first, mine, at, out, D;
} place;

__device__ inline place place_of(size_t rows, size_t tokens, size_t Q, size_t H, size_t HD) {
    const size_t tiles = (rows + ROWS - 1) / ROWS, pair = blockIdx.x / tiles, D = H * HD;
    const size_t first = blockIdx.x % tiles * ROWS, b = pair / H, h = pair % H;
    return place{
        pair, first, first + threadIdx.x / WARP * WARP_ROWS, b * tokens * 3 * D + h * HD, b * Q * D + h * HD,
        D};
}

__device__ inline size_t left_of(size_t end, size_t at) { return at < end ? end - at : 0; }

/* s = q k^T, p = softmax(scale s), out = p v; scale2 = scale / ln 2 */
template <class T, int HD>
__global__ void __launch_bounds__(FUSED_THREADS)
    attention_forward_kernel(T *out, float2 *saved, const T *qkv, size_t tokens, size_t Q, size_t H,
                             float scale2) {
    __shared__ __align__(16) T k[ROWS * (HD + PAD)], v[ROWS * (HD + PAD)];
    const place here = place_of(Q, tokens, Q, H, HD);
    const size_t ld = 3 * here.D, n = left_of(Q, here.mine);
    const int t = threadIdx.x % 4 * 2, g = threadIdx.x % WARP / 4;
    const T *qs = qkv + here.at, *ks = qs + here.D, *vs = ks + here.D;
    uint32_t q[HD / 16][4];
    float o[HD / 8][4] = {{0}}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    load_rows<T, HD>(q, qs + here.mine * ld, ld, n);
    for (size_t key = 0; key < tokens; key += ROWS) {
        __syncthreads();
        load_tile<T, HD>(k, ks + key * ld, ld, tokens - key);
        load_tile<T, HD>(v, vs + key * ld, ld, tokens - key);
        __syncthreads();
        if (n == 0) continue;
        float p[TILES][4], now[2] = {most[0], most[1]};
        times_transposed<T, HD>(p, q, k);
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (key + 8 * j + t + i % 2 >= tokens) p[j][i] = -INFINITY;
                now[i / 2] = fmaxf(now[i / 2], p[j][i]);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) { /* what has been added up so far was relative to a smaller maximum */
            now[r] = quad_max(now[r]);
            const float factor = exp2f((most[r] - now[r]) * scale2);
            most[r] = now[r];
            sum[r] *= factor;
#pragma unroll
            for (int j = 0; j < HD / 8; j++) {
                o[j][2 * r] *= factor;
                o[j][2 * r + 1] *= factor;
            }
        }
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[j][i] = exp2f((p[j][i] - most[i / 2]) * scale2);
                sum[i / 2] += p[j][i];
            }
        add_product<T, HD>(o, p, v);
    }
    if (n == 0) return;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = quad_sum(sum[r]);
        factor[r] = 1 / sum[r];
        if (t == 0 && (size_t)(g + 8 * r) < n)
            saved[here.pair * Q + here.mine + g + 8 * r] = make_float2(most[r], factor[r]);
    }
    store_rows<T, HD>(out + here.out + here.mine * here.D, here.D, n, o, factor);
}

/* out = p v:  dp = dout v^T;  p = softmax(scale s):  ds = p (dp - delta) scale, with delta [B, H, Q] = the
 * sums over rows of dout out;  s = q k^T:  dq = ds k */
template <class T, int HD>
__global__ void __launch_bounds__(FUSED_THREADS)
    attention_dq_kernel(T *dqkv, const T *dout, const T *qkv, const float2 *saved, const float *delta,
                        size_t tokens, size_t Q, size_t H, float scale, float scale2) {
    __shared__ __align__(16) T k[ROWS * (HD + PAD)], v[ROWS * (HD + PAD)];
    const place here = place_of(tokens, tokens, Q, H, HD);
    const size_t ld = 3 * here.D, n = left_of(Q, here.mine);
    const int t = threadIdx.x % 4 * 2, g = threadIdx.x % WARP / 4;
    const T *qs = qkv + here.at, *ks = qs + here.D, *vs = ks + here.D;
    uint32_t q[HD / 16][4], d[HD / 16][4];
    float dq[HD / 8][4] = {{0}}, most[2] = {0, 0}, factor[2] = {0, 0}, sum[2] = {0, 0};
    load_rows<T, HD>(q, qs + here.mine * ld, ld, n);
    load_rows<T, HD>(d, dout + here.out + here.mine * here.D, here.D, n);
    for (int r = 0; r < 2; r++)
        if ((size_t)(g + 8 * r) < n) {
            const float2 l = saved[here.pair * Q + here.mine + g + 8 * r];
            most[r] = l.x;
            factor[r] = l.y;
            sum[r] = delta[here.pair * Q + here.mine + g + 8 * r];
        }
    for (size_t key = 0; key < tokens && here.first < Q; key += ROWS) {
        __syncthreads();
        load_tile<T, HD>(k, ks + key * ld, ld, tokens - key);
        load_tile<T, HD>(v, vs + key * ld, ld, tokens - key);
        __syncthreads();
        if (n == 0) continue;
        float p[TILES][4], dp[TILES][4];
        times_transposed<T, HD>(p, q, k);
        times_transposed<T, HD>(dp, d, v);
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float e = exp2f((p[j][i] - most[i / 2]) * scale2) * factor[i / 2];
                const int exists = key + 8 * j + t + i % 2 < tokens;
                p[j][i] = exists ? e * (dp[j][i] - sum[i / 2]) * scale : 0;
            }
        add_product<T, HD>(dq, p, k);
    }
    const float one[2] = {1, 1}; /* queries from Q on have the gradient 0 */
    store_rows<T, HD>(dqkv + here.at + here.mine * ld, ld, left_of(tokens, here.mine), dq, one);
}

/* ... dv = p^T dout, dk = ds^T q: here the rows are keys and the columns queries. */
template <class T, int HD>
__global__ void __launch_bounds__(FUSED_THREADS)
    attention_dkv_kernel(T *dqkv, const T *dout, const T *qkv, const float2 *saved, const float *delta,
                         size_t tokens, size_t Q, size_t H, float scale, float scale2) {
    __shared__ __align__(16) T q[ROWS * (HD + PAD)], d[ROWS * (HD + PAD)];
    __shared__ float2 l[ROWS];
    __shared__ float sum[ROWS];
    const place here = place_of(tokens, tokens, Q, H, HD);
    const size_t ld = 3 * here.D, n = left_of(tokens, here.mine);
    const int t = threadIdx.x % 4 * 2;
    const T *qs = qkv + here.at, *ks = qs + here.D, *vs = ks + here.D;
    uint32_t k[HD / 16][4], v[HD / 16][4];
    float dk[HD / 8][4] = {{0}}, dv[HD / 8][4] = {{0}};
    load_rows<T, HD>(k, ks + here.mine * ld, ld, n);
    load_rows<T, HD>(v, vs + here.mine * ld, ld, n);
    for (size_t query = 0; query < Q; query += ROWS) {
        __syncthreads();
        load_tile<T, HD>(q, qs + query * ld, ld, Q - query);
        load_tile<T, HD>(d, dout + here.out + query * here.D, here.D, Q - query);
        if (threadIdx.x < ROWS) {
            const int exists = query + threadIdx.x < Q;
            l[threadIdx.x] = exists ? saved[here.pair * Q + query + threadIdx.x] : make_float2(0, 0);
            sum[threadIdx.x] = exists ? delta[here.pair * Q + query + threadIdx.x] : 0;
        }
        __syncthreads();
        if (n == 0) continue;
        float p[TILES][4], dp[TILES][4];
        times_transposed<T, HD>(p, k, q);
        times_transposed<T, HD>(dp, v, d);
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = 8 * j + t + i % 2, exists = query + column < Q;
                p[j][i] = exists ? exp2f((p[j][i] - l[column].x) * scale2) * l[column].y : 0;
                dp[j][i] = exists ? p[j][i] * (dp[j][i] - sum[column]) * scale : 0;
            }
        add_product<T, HD>(dv, p, d);
        add_product<T, HD>(dk, dp, q);
    }
    const float one[2] = {1, 1};
    T *to = dqkv + here.at + here.D + here.mine * ld;
    store_rows<T, HD>(to, ld, n, dk, one);
    store_rows<T, HD>(to + here.D, ld, n, dv, one);
}

/* ------------------------------------------------------------------------------------- attention, general */

/* Any type, any head, any number of tokens: head by head, batched products over a group of images, and
 * kernels that go along the rows of the scores, whose rows are padded to `ld`. Saved is the same, of scaled
 * scores. */
static const size_t GROUP_BYTES = (size_t)64 << 20;

/* delta [B, H, Q] = the sums over each head's columns of dout out [B, Q, H, hd]. A warp a sum. */
template <class T>
__global__ void delta_kernel(float *delta, const T *dout, const T *out, size_t B, size_t Q, size_t H,
                             size_t hd) {
    const size_t row = thread_index() / WARP; /* (b, q, h) */
    if (row >= B * Q * H) return;
    float sum = 0;
    for (size_t j = threadIdx.x % WARP; j < hd; j += WARP)
        sum += to_float(dout[row * hd + j]) * to_float(out[row * hd + j]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[(row / H / Q * H + row % H) * Q + row / H % Q] = sum;
}

__device__ inline float warp_max(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
}

/* p = softmax(s) of rows (b, q) of one head; what is saved of them at saved[b * stride + q] */
template <class T>
__global__ void softmax_kernel(T *p, float2 *saved, const float *s, size_t rows, size_t tokens, size_t ld,
                               size_t Q, size_t stride) {
    const size_t row = thread_index() / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float *x = s + row * ld;
    float most = -INFINITY, sum = 0;
    for (size_t j = lane; j < tokens; j += WARP) most = fmaxf(most, x[j]);
    most = warp_max(most);
    for (size_t j = lane; j < tokens; j += WARP) sum += expf(x[j] - most);
    sum = warp_sum(sum);
    const float factor = 1 / sum;
    for (size_t j = lane; j < tokens; j += WARP) round_to(p + row * ld + j, expf(x[j] - most) * factor);
    if (lane == 0) saved[row / Q * stride + row % Q] = make_float2(most, factor);
}

/* p = exp(s - largest) / sum, ds = p (dp - delta) scale */
template <class T>
__global__ void softmax_backward_kernel(T *p, T *ds, const float *s, const float *dp, const float2 *saved,
                                        const float *delta, size_t rows, size_t tokens, size_t ld, size_t Q,
                                        size_t stride, float scale) {
    const size_t row = thread_index() / WARP;
    if (row >= rows) return;
    const size_t at = row / Q * stride + row % Q;
    for (size_t j = threadIdx.x % WARP; j < tokens; j += WARP) {
        const float e = expf(s[row * ld + j] - saved[at].x) * saved[at].y;
        round_to(p + row * ld + j, e);
        round_to(ds + row * ld + j, e * (dp[row * ld + j] - delta[at]) * scale);
    }
}

static matrix batched(const void *at, rt_type type, size_t ld, size_t stride, int transposed) {
    return matrix{at, type, ld, stride, transposed};
}

static const char *element(rt_block b, size_t i) { return (const char *)b.data + i * rt_type_size(b.type); }

static void multiply_batch(rt_stream *s, size_t batch, size_t M, size_t N, size_t K, matrix c, float alpha,
                           matrix a, matrix b) {
    const product p = {M, N, K, batch, c, a, b, alpha, CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL};
    multiply(s, &p);
}

static void attention_general(rt_stream *s, rt_block out, float2 *saved, rt_block qkv, size_t B,
                              size_t tokens, size_t Q, size_t H, size_t hd) {
    const rt_type type = qkv.type;
    const size_t D = H * hd, ld = round_up(tokens, VEC), each = Q * ld, size = rt_type_size(type);
    const size_t group = min_size(B, GROUP_BYTES / (each * 4) + 1), image = tokens * 3 * D;
    float *score = (float *)scratch(s, group * each * (sizeof *score + size));
    if (!score) return;
    void *p = score + group * each;
    for (size_t h = 0; h < H; h++)
        for (size_t b = 0; b < B; b += group) {
            const size_t n = min_size(group, B - b), q = b * image + h * hd;
            multiply_batch(s, n, Q, tokens, hd, batched(score, RT_FP32, ld, each, 0), 1 / sqrtf((float)hd),
                           batched(element(qkv, q), type, 3 * D, image, 0),
                           batched(element(qkv, q + D), type, 3 * D, image, 1));
            by_type(type, [&](auto zero) {
                using T = decltype(zero);
                LAUNCH(softmax_kernel<T>, blocks_of(n * Q * WARP), THREADS, 0, s, (T *)p,
                       saved + (b * H + h) * Q, score, n * Q, tokens, ld, Q, H * Q);
            });
            multiply_batch(s, n, Q, hd, tokens, batched(element(out, b * Q * D + h * hd), type, D, Q * D, 0),
                           1, batched(p, type, ld, each, 0),
                           batched(element(qkv, q + 2 * D), type, 3 * D, image, 0));
        }
}

static void attention_general_backward(rt_stream *s, rt_block dqkv, rt_block dout, rt_block qkv,
                                       const float2 *saved, const float *delta, float *memory, size_t group,
                                       size_t B, size_t tokens, size_t Q, size_t H, size_t hd) {
    const rt_type type = qkv.type;
    const size_t D = H * hd, ld = round_up(tokens, VEC), each = Q * ld, image = tokens * 3 * D;
    const float scale = 1 / sqrtf((float)hd);
    float *score = memory, *dscore = score + group * each;
    char *p = (char *)(dscore + group * each), *ds = p + group * each * rt_type_size(type);
    if (Q < tokens)
        check(s->rank, cudaMemsetAsync(dqkv.data, 0, bytes_of(dqkv), stream_of(s)), "cudaMemsetAsync");
    for (size_t h = 0; h < H; h++)
        for (size_t b = 0; b < B; b += group) {
            const size_t n = min_size(group, B - b), q = b * image + h * hd;
            const matrix qs = batched(element(qkv, q), type, 3 * D, image, 0);
            const matrix ks = batched(element(qkv, q + D), type, 3 * D, image, 0);
            const matrix dos = batched(element(dout, b * Q * D + h * hd), type, D, Q * D, 0);
            multiply_batch(s, n, Q, tokens, hd, batched(score, RT_FP32, ld, each, 0), scale, qs,
                           batched(element(qkv, q + D), type, 3 * D, image, 1));
            multiply_batch(s, n, Q, tokens, hd, batched(dscore, RT_FP32, ld, each, 0), 1, dos,
                           batched(element(qkv, q + 2 * D), type, 3 * D, image, 1));
            by_type(type, [&](auto zero) {
                using T = decltype(zero);
                LAUNCH(softmax_backward_kernel<T>, blocks_of(n * Q * WARP), THREADS, 0, s, (T *)p, (T *)ds,
                       score, dscore, saved + (b * H + h) * Q, delta + (b * H + h) * Q, n * Q, tokens, ld, Q,
                       H * Q, scale);
            });
            multiply_batch(s, n, Q, hd, tokens, batched(element(dqkv, q), type, 3 * D, image, 0), 1,
                           batched(ds, type, ld, each, 0), ks);
            multiply_batch(s, n, tokens, hd, Q, batched(element(dqkv, q + D), type, 3 * D, image, 0), 1,
                           batched(ds, type, ld, each, 1), qs);
            multiply_batch(s, n, tokens, hd, Q, batched(element(dqkv, q + 2 * D), type, 3 * D, image, 0), 1,
                           batched(p, type, ld, each, 1), dos);
        }
}

/* ---------------------------------------------------------------------------------------------- attention */

static size_t attention_saved(size_t B, size_t T, size_t Q, size_t H, size_t hd) {
    (void)T, (void)hd;
    return 2 * B * H * Q;
}

/* Vectors of 16 bytes need D and the blocks to be aligned so. */
static int is_fused(rt_block qkv, rt_block out, size_t hd) {
    return rt_type_size(qkv.type) == 2 && (hd == 64 || hd == 80) && (uintptr_t)qkv.data % 16 == 0 &&
           (uintptr_t)out.data % 16 == 0;
}

/* Calls f(T(), head size) for what is_fused. */
template <class F> static void by_head(rt_type type, size_t hd, F f) {
    using heads64 = std::integral_constant<int, 64>;
    using heads80 = std::integral_constant<int, 80>;
    if (type == RT_BF16 && hd == 64) f(bf16(), heads64());
    if (type == RT_BF16 && hd == 80) f(bf16(), heads80());
    if (type == RT_FP16 && hd == 64) f(fp16(), heads64());
    if (type == RT_FP16 && hd == 80) f(fp16(), heads80());
}

static void attention_forward(rt_stream *s, rt_block out, rt_block saved, rt_block qkv, size_t B, size_t T_,
                              size_t Q, size_t H, size_t hd) {
    const float scale2 = (float)(1 / sqrt((double)hd) / M_LN2);
    if (!is_fused(qkv, out, hd)) {
        attention_general(s, out, (float2 *)saved.data, qkv, B, T_, Q, H, hd);
        return;
    }
    by_head(qkv.type, hd, [&](auto zero, auto head) {
        using T = decltype(zero);
        constexpr int HD = decltype(head)::value;
        LAUNCH((attention_forward_kernel<T, HD>), B * H * divide_up(Q, ROWS), FUSED_THREADS, 0, s,
               (T *)out.data, (float2 *)saved.data, (const T *)qkv.data, T_, Q, H, scale2);
    });
}

static void attention_backward(rt_stream *s, rt_block dqkv, rt_block dout, rt_block qkv, rt_block out,
                               rt_block saved, size_t B, size_t T_, size_t Q, size_t H, size_t hd) {
    const float scale = 1 / sqrtf((float)hd), scale2 = (float)(1 / sqrt((double)hd) / M_LN2);
    const int fused = is_fused(qkv, out, hd) && is_fused(dqkv, dout, hd);
    const size_t each = Q * round_up(T_, VEC), size = rt_type_size(qkv.type), sums = round_up(B * H * Q, 64);
    const size_t group = fused ? 0 : min_size(B, GROUP_BYTES / (each * (8 + 2 * size)) + 1);
    float *delta = (float *)scratch(s, sums * sizeof *delta + group * each * (2 * sizeof *delta + 2 * size));
    if (!delta) return;
    by_type(qkv.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(delta_kernel<T>, blocks_of(B * Q * H * WARP), THREADS, 0, s, delta, (const T *)dout.data,
               (const T *)out.data, B, Q, H, hd);
    });
    if (!fused) {
        attention_general_backward(s, dqkv, dout, qkv, (const float2 *)saved.data, delta, delta + sums, group,
                                   B, T_, Q, H, hd);
        return;
    }
    by_head(qkv.type, hd, [&](auto zero, auto head) {
        using T = decltype(zero);
        constexpr int HD = decltype(head)::value;
        const size_t blocks = B * H * divide_up(T_, ROWS);
        LAUNCH((attention_dq_kernel<T, HD>), blocks, FUSED_THREADS, 0, s, (T *)dqkv.data,
               (const T *)dout.data, (const T *)qkv.data, (const float2 *)saved.data, delta, T_, Q, H, scale,
               scale2);
        LAUNCH((attention_dkv_kernel<T, HD>), blocks, FUSED_THREADS, 0, s, (T *)dqkv.data,
               (const T *)dout.data, (const T *)qkv.data, (const float2 *)saved.data, delta, T_, Q, H, scale,
               scale2);
    });
}

/* --------------------------------------------------------------------------------------- the other layers */

/* out [B, count] = x + k_b branch, or without an x k_b branch; `vectors` a row. */
template <class T>
__global__ void residual_kernel(T *out, const T *x, const T *branch, const uint64_t *keys, size_t B,
                                size_t count, size_t x_stride, size_t vectors, double rate, uint64_t salt) {
    const size_t b = thread_index() / vectors, i = thread_index() % vectors * VEC, left = count - i;
    if (b >= B) return;
    const float k = rate > 0 ? (float)vit_drop_path_factor(keys[b], salt, rate) : 1;
    vec to = load(branch + b * count + i, left);
    const vec add = x ? load(x + b * x_stride + i, left) : vec{{0}};
    for (int j = 0; j < VEC; j++) to.v[j] = x ? add.v[j] + k * to.v[j] : k * to.v[j];
    store(out + b * count + i, left, to);
}

static void residual_forward(rt_stream *s, rt_block out, rt_block x, rt_block branch, rt_block keys, size_t B,
                             size_t count, size_t x_stride, double rate, uint64_t salt) {
    const size_t vectors = divide_up(count, VEC);
    by_type(out.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(residual_kernel<T>, blocks_of(B * vectors), THREADS, 0, s, (T *)out.data, (const T *)x.data,
               (const T *)branch.data, (const uint64_t *)keys.data, B, count, x_stride, vectors, rate, salt);
    });
}

/* out = x + k_b branch:  dbranch = k_b dout, which is the same without an x */
static void residual_backward(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B,
                              size_t count, double rate, uint64_t salt) {
    residual_forward(s, dbranch, rt_block{}, dout, keys, B, count, 0, rate, salt);
}

template <class T>
__global__ void patchify_kernel(T *patches, const float *images, size_t count, size_t C, size_t height,
                                size_t width, size_t P) {
    const size_t i = thread_index(), down = height / P, across = width / P;
    if (i >= count) return;
    const size_t x = i % P, y = i / P % P, c = i / P / P % C, patch = i / P / P / C;
    const size_t b = patch / (down * across), row = patch / across % down * P + y,
                 column = patch % across * P + x;
    round_to(patches + i, images[((b * C + c) * height + row) * width + column]);
}

static void patchify_forward(rt_stream *s, rt_block patches, rt_block images, size_t B, size_t C,
                             size_t height, size_t width, size_t P) {
    const size_t count = B * (height / P) * (width / P) * C * P * P;
    by_type(patches.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(patchify_kernel<T>, blocks_of(count), THREADS, 0, s, (T *)patches.data,
               (const float *)images.data, count, C, height, width, P);
    });
}

/* `vectors` a token */
template <class T>
__global__ void embedding_kernel(T *out, const T *x, const T *cls, const T *pos, size_t B, size_t N, size_t D,
                                 size_t vectors) {
    const size_t row = thread_index() / vectors, j = thread_index() % vectors * VEC, left = D - j;
    const size_t b = row / (N + 1), t = row % (N + 1);
    if (b >= B) return;
    vec to = load(t ? x + (b * N + t - 1) * D + j : cls + j, left);
    const vec p = load(pos + t * D + j, left);
    for (int k = 0; k < VEC; k++) to.v[k] += p.v[k];
    store(out + row * D + j, left, to);
}

static void embedding_forward(rt_stream *s, rt_block out, rt_block x, rt_block cls, rt_block pos, size_t B,
                              size_t N, size_t D) {
    const size_t vectors = divide_up(D, VEC);
    by_type(out.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(embedding_kernel<T>, blocks_of(B * (N + 1) * vectors), THREADS, 0, s, (T *)out.data,
               (const T *)x.data, (const T *)cls.data, (const T *)pos.data, B, N, D, vectors);
    });
}

/* out = (cls | x) + pos:  dpos = sum over images of dout, dcls = its first token, dx = dout of the others */
static void embedding_backward(rt_stream *s, rt_block dx, rt_block dcls, rt_block dpos, rt_block dout,
                               size_t B, size_t N, size_t D) {
    const size_t token = D * rt_type_size(dout.type);
    sum_rows(s, dpos, dout, B, (N + 1) * D);
    copy_inside(s, dcls.data, dpos.data, D * rt_type_size(dpos.type));
    check(s->rank,
          cudaMemcpy2DAsync(dx.data, N * token, (const char *)dout.data + token, (N + 1) * token, N * token,
                            B, cudaMemcpyDeviceToDevice, stream_of(s)),
          "cudaMemcpy2DAsync");
}

/* --------------------------------------------------------------------------------------------------- loss */

static const int LOSS_THREADS = 128;

/* The sum, or with MAX the largest, of x over the threads of a block of LOSS_THREADS. */
template <int MAX> __device__ double block_reduce(double x) {
    __shared__ double all[LOSS_THREADS];
    __syncthreads();
    all[threadIdx.x] = x;
    for (int n = LOSS_THREADS / 2; n > 0; n /= 2) {
        __syncthreads();
        if (threadIdx.x < n) {
            const double other = all[threadIdx.x + n], mine = all[threadIdx.x];
            all[threadIdx.x] = MAX ? fmax(mine, other) : mine + other;
        }
    }
    __syncthreads();
    return all[0];
}

/* loss = sum over classes of target (log(sum of exp(logits)) - logit), where the targets add up to 1. A block
 * a sample. */
template <class T>
__global__ void cross_entropy_kernel(float *losses, float *probabilities, const T *logits,
                                     const int32_t *labels, size_t V, double smoothing) {
    const T *x = logits + blockIdx.x * V;
    double most = -INFINITY, sum = 0, sum_logits = 0;
    for (size_t j = threadIdx.x; j < V; j += LOSS_THREADS) most = fmax(most, (double)to_float(x[j]));
    most = block_reduce<1>(most);
    for (size_t j = threadIdx.x; j < V; j += LOSS_THREADS) {
        const double logit = (double)to_float(x[j]) - most;
        sum += (double)expf((float)logit);
        sum_logits += logit;
    }
    sum = block_reduce<0>(sum);
    sum_logits = block_reduce<0>(sum_logits);
    for (size_t j = threadIdx.x; j < V; j += LOSS_THREADS)
        probabilities[blockIdx.x * V + j] =
            (float)((double)expf((float)((double)to_float(x[j]) - most)) / sum);
    if (threadIdx.x) return;
    const double own = (double)to_float(x[labels[blockIdx.x]]) - most;
    losses[blockIdx.x] = (float)(log(sum) - (1 - smoothing) * own - smoothing * sum_logits / (double)V);
}

static void cross_entropy_forward(rt_stream *s, rt_block losses, rt_block probabilities, rt_block logits,
                                  rt_block labels, size_t B, size_t V, double smoothing) {
    by_type(logits.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(cross_entropy_kernel<T>, B, LOSS_THREADS, 0, s, (float *)losses.data,
               (float *)probabilities.data, (const T *)logits.data, (const int32_t *)labels.data, V,
               smoothing);
    });
}

/* p = softmax(logits), loss as above:  dlogits = p - target, times the scale */
template <class T>
__global__ void cross_entropy_backward_kernel(T *dlogits, const float *probabilities, const int32_t *labels,
                                              const double *scalars, size_t B, size_t V, double smoothing,
                                              double scale) {
    const size_t i = thread_index();
    if (i >= B * V) return;
    const double target = smoothing / (double)V + (i % V == (size_t)labels[i / V] ? 1 - smoothing : 0);
    const double loss_scale = scalars ? scalars[VIT_LOSS_SCALE] : 1;
    round_to(dlogits + i, (float)(scale * loss_scale * ((double)probabilities[i] - target)));
}

static void cross_entropy_backward(rt_stream *s, rt_block dlogits, rt_block probabilities, rt_block labels,
                                   rt_block scalars, size_t B, size_t V, double smoothing, double scale) {
    by_type(dlogits.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(cross_entropy_backward_kernel<T>, blocks_of(B * V), THREADS, 0, s, (T *)dlogits.data,
               (const float *)probabilities.data, (const int32_t *)labels.data, (const double *)scalars.data,
               B, V, smoothing, scale);
    });
}

/* One block; the first thread adds up in order. */
__global__ void loss_accumulate_kernel(int64_t *total, const float *losses, size_t B) {
    __shared__ double share[THREADS];
    const double most = 0x1p20; /* what is larger, or not a number, counts as not finite */
    double sum = 0;
    int64_t bad = 0;
    for (size_t b = 0; b < B; b += THREADS) {
        if (b + threadIdx.x < B) share[threadIdx.x] = (double)losses[b + threadIdx.x] / (double)B;
        __syncthreads();
        for (size_t i = 0; threadIdx.x == 0 && i < THREADS && b + i < B; i++) {
            if (fabs(share[i]) < most)
                sum += share[i];
            else
                bad++;
        }
        __syncthreads();
    }
    if (threadIdx.x) return;
    if (fabs(sum) < most)
        total[0] += llround(sum / VIT_LOSS_UNIT);
    else
        bad++;
    total[1] += bad;
}

static void loss_accumulate(rt_stream *s, rt_block total, rt_block losses, size_t B) {
    LAUNCH(loss_accumulate_kernel, 1, THREADS, 0, s, (int64_t *)total.data, (const float *)losses.data, B);
}

/* --------------------------------------------------------------------------- optimizers and gradient norm */

typedef struct {
    float factor, step, keep, decay, momentum, beta2, rest1, rest2, root_correction2, eps;
} optimizer_constants; /* as in vit_cpu.c */

/* P: the parameters' type, G: the gradient's. master NULL: the parameters are their own. */
template <class P, class G>
__global__ void adamw_kernel(P *param, float *master, float *exp_avg, float *exp_avg_sq, const G *grad,
                             const double *scalars, size_t count, size_t decayed, double rate,
                             vit_adamw_options o) {
    __shared__ optimizer_constants c;
    if (threadIdx.x == 0) {
        const double lr = rate * scalars[VIT_LEARNING_RATE];
        c.factor = (float)scalars[VIT_GRADIENT_FACTOR];
        c.step = (float)(lr / scalars[VIT_BIAS_CORRECTION1]);
        c.keep = (float)(1 - lr * o.weight_decay);
        c.beta2 = (float)o.beta2;
        c.rest1 = (float)(1 - o.beta1);
        c.rest2 = (float)(1 - o.beta2);
        c.root_correction2 = (float)sqrt(scalars[VIT_BIAS_CORRECTION2]);
        c.eps = (float)o.eps;
    }
    __syncthreads();
    const size_t i = thread_index() * VEC, left = count - i;
    if (i >= count || c.factor == 0) return;
    vec p = master ? load(master + i, left) : load(param + i, left);
    vec m = load(exp_avg + i, left), v = load(exp_avg_sq + i, left), g = load(grad + i, left);
    for (int k = 0; k < VEC; k++) {
        g.v[k] *= c.factor;
        m.v[k] += (g.v[k] - m.v[k]) * c.rest1;
        v.v[k] = v.v[k] * c.beta2 + g.v[k] * g.v[k] * c.rest2;
        p.v[k] = p.v[k] * (i + k < decayed ? c.keep : 1) -
                 c.step * (m.v[k] / (sqrtf(v.v[k]) / c.root_correction2 + c.eps));
    }
    store(exp_avg + i, left, m);
    store(exp_avg_sq + i, left, v);
    if (master) store(master + i, left, p);
    store(param + i, left, p);
}

template <class P, class G>
__global__ void sgd_kernel(P *param, float *master, float *momentum, const G *grad, const double *scalars,
                           size_t count, size_t decayed, double rate, vit_sgd_options o) {
    const float factor = (float)scalars[VIT_GRADIENT_FACTOR], keep = (float)o.momentum;
    const float step = (float)(rate * scalars[VIT_LEARNING_RATE]);
    const size_t i = thread_index() * VEC, left = count - i;
    if (i >= count || factor == 0) return;
    vec p = master ? load(master + i, left) : load(param + i, left);
    vec m = load(momentum + i, left);
    const vec g = load(grad + i, left);
    for (int k = 0; k < VEC; k++) {
        const float decay = i + k < decayed ? (float)o.weight_decay : 0;
        m.v[k] = m.v[k] * keep + (g.v[k] * factor + decay * p.v[k]);
        p.v[k] -= step * m.v[k];
    }
    store(momentum + i, left, m);
    if (master) store(master + i, left, p);
    store(param + i, left, p);
}

static void adamw(rt_stream *s, rt_block param, rt_block master, rt_block exp_avg, rt_block exp_avg_sq,
                  rt_block grad, rt_block scalars, size_t decayed, double rate, const vit_adamw_options *o) {
    by_type(param.type, [&](auto zero) {
        using P = decltype(zero);
        by_type(grad.type, [&](auto also_zero) {
            using G = decltype(also_zero);
            LAUNCH((adamw_kernel<P, G>), vector_blocks(param.count), THREADS, 0, s, (P *)param.data,
                   (float *)master.data, (float *)exp_avg.data, (float *)exp_avg_sq.data,
                   (const G *)grad.data, (const double *)scalars.data, param.count, decayed, rate, *o);
        });
    });
}

static void sgd(rt_stream *s, rt_block param, rt_block master, rt_block momentum, rt_block grad,
                rt_block scalars, size_t decayed, double rate, const vit_sgd_options *o) {
    by_type(param.type, [&](auto zero) {
        using P = decltype(zero);
        by_type(grad.type, [&](auto also_zero) {
            using G = decltype(also_zero);
            LAUNCH((sgd_kernel<P, G>), vector_blocks(param.count), THREADS, 0, s, (P *)param.data,
                   (float *)master.data, (float *)momentum.data, (const G *)grad.data,
                   (const double *)scalars.data, param.count, decayed, rate, *o);
        });
    });
}

typedef unsigned long long counter; /* what CUDA's atomics take; two's complement, as int64 */

/* Adds the squares of granules of VIT_GRANULE numbers, each of which is exact in double, to the counters, in
 * the order of vit_cpu.c. The lanes of a warp whose sums have the same exponent join their significands (of
 * which 32 fit into 32 bits), then blocks count in shared memory, lest all wait for the same few counters. */
template <class T> __global__ void sum_of_squares_kernel(counter *counters, const T *x, size_t count) {
    __shared__ counter mine[VIT_NORM_COUNTERS];
    for (size_t i = threadIdx.x; i < VIT_NORM_COUNTERS; i += THREADS) mine[i] = 0;
    __syncthreads();
    const size_t granules = (count + VIT_GRANULE - 1) / VIT_GRANULE, stride = (size_t)gridDim.x * THREADS;
    for (size_t first = (size_t)blockIdx.x * THREADS; first < granules; first += stride) {
        const size_t at = (first + threadIdx.x) * VIT_GRANULE, left = at < count ? count - at : 0;
        const vec low = load(x + at, left), high = load(x + at + VEC, left > VEC ? left - VEC : 0);
        double sum[VIT_GRANULE];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            sum[i] = (double)low.v[i] * (double)low.v[i];
            sum[i + VEC] = (double)high.v[i] * (double)high.v[i];
        }
        for (int i = 0; i < 8; i++) sum[i] += sum[i + 8]; /* written out, lest they live in memory */
        for (int i = 0; i < 4; i++) sum[i] += sum[i + 4];
        for (int i = 0; i < 2; i++) sum[i] += sum[i + 2];
        sum[0] += sum[1];
        const uint64_t bits = (uint64_t)__double_as_longlong(sum[0]);
        const uint64_t significand = (bits & (((uint64_t)1 << 52) - 1)) | (uint64_t)1 << 52;
        const int exponent =
            sum[0] == 0 ? INT32_MIN : (int)(bits >> 52 & 0x7FF) - 1023; /* without the sign of a NaN */
        const unsigned same = __match_any_sync(~0u, exponent);
        const unsigned low_sum = __reduce_add_sync(same, (unsigned)(significand & ((1 << 26) - 1)));
        const unsigned high_sum = __reduce_add_sync(same, (unsigned)(significand >> 26));
        if (sum[0] == 0 || threadIdx.x % WARP != (unsigned)__ffs((int)same) - 1) continue;
        if (exponent == 1024) {
            atomicAdd(&mine[VIT_NORM_NOT_FINITE], (counter)__popc(same));
            continue;
        }
        counter *to = mine + 2 * (exponent - VIT_NORM_MIN_EXPONENT);
        atomicAdd(to, (counter)low_sum);
        atomicAdd(to + 1, (counter)high_sum);
    }
    __syncthreads();
    for (size_t i = threadIdx.x; i < VIT_NORM_COUNTERS; i += THREADS)
        if (mine[i]) atomicAdd(&counters[i], mine[i]);
}

static void sum_of_squares(rt_stream *s, rt_block counters, rt_block x) {
    const size_t MOST_BLOCKS = 1024;
    const size_t blocks = min_size(blocks_of(divide_up(x.count, VIT_GRANULE)), MOST_BLOCKS);
    by_type(x.type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(sum_of_squares_kernel<T>, blocks, THREADS, 0, s, (counter *)counters.data, (const T *)x.data,
               x.count);
    });
}

/* One block of VIT_NORM_EXPONENTS threads; the first adds up in order. */
__global__ void decide_step_kernel(double *scalars, vit_scaler *scaler, const int64_t *counters,
                                   double divisor, double clip, vit_adamw_options o) {
    __shared__ double terms[VIT_NORM_EXPONENTS];
    const int i = threadIdx.x;
    const double significands = (double)counters[2 * i] + 0x1p26 * (double)counters[2 * i + 1];
    terms[i] = ldexp(significands, i + VIT_NORM_MIN_EXPONENT - 52);
    __syncthreads();
    if (i) return;
    double sum = 0;
    for (int k = 0; k < VIT_NORM_EXPONENTS; k++) sum += terms[k];
    vit_step_rule(scalars, scaler, sum, counters[VIT_NORM_NOT_FINITE] == 0, divisor, clip, &o);
}

static void decide_step(rt_stream *s, rt_block scalars, rt_block scaler, rt_block counters, double divisor,
                        double clip, const vit_adamw_options *o) {
    LAUNCH(decide_step_kernel, 1, VIT_NORM_EXPONENTS, 0, s, (double *)scalars.data, (vit_scaler *)scaler.data,
           (const int64_t *)counters.data, divisor, clip, *o);
}

/* -------------------------------------------------------------------------------------- vector arithmetic */

static void fill(rt_stream *s, rt_block x, int byte) {
    check(s->rank, cudaMemsetAsync(x.data, byte, bytes_of(x), stream_of(s)), "cudaMemsetAsync");
}

/* x = y or, with ADD, x += y */
template <int ADD, class X, class Y> __global__ void convert_kernel(X *x, const Y *y, size_t count) {
    const size_t i = thread_index() * VEC, left = count - i;
    if (i >= count) return;
    vec to = load(y + i, left);
    const vec old = ADD ? load(x + i, left) : vec{{0}};
    if (ADD)
        for (int k = 0; k < VEC; k++) to.v[k] = old.v[k] + to.v[k];
    store(x + i, left, to);
}

template <int ADD> static void convert(rt_stream *s, rt_block x, rt_block y) {
    by_type(x.type, [&](auto zero) {
        using X = decltype(zero);
        by_type(y.type, [&](auto also_zero) {
            using Y = decltype(also_zero);
            LAUNCH((convert_kernel<ADD, X, Y>), vector_blocks(x.count), THREADS, 0, s, (X *)x.data,
                   (const Y *)y.data, x.count);
        });
    });
}

static void add(rt_stream *s, rt_block x, rt_block y) { convert<1>(s, x, y); }

static void cast(rt_stream *s, rt_block to, rt_block from) {
    if (to.type == from.type)
        copy_inside(s, to.data, from.data, bytes_of(from));
    else
        convert<0>(s, to, from);
}

static const size_t MOST_BUFFERS = 64;
typedef struct {
    void *to[MOST_BUFFERS];
    const void *from[MOST_BUFFERS];
    int to_count, from_count;
} buffers;

__device__ inline int64_t sum_of(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
__device__ inline float sum_of(float a, float b) { return a + b; }
__device__ inline int64_t wide(int64_t x) { return x; }
template <class T> __device__ inline float wide(T x) { return to_float(x); }
__device__ inline void round_to(int64_t *to, int64_t x) { *to = x; }

/* A thread has read its element of all sources before it writes to any, which may be one of them. */
template <class T> __global__ void sum_buffers_kernel(buffers b, size_t count) {
    const size_t i = thread_index();
    if (i >= count) return;
    auto sum = wide(((const T *)b.from[0])[i]);
    for (int k = 1; k < b.from_count; k++) sum = sum_of(sum, wide(((const T *)b.from[k])[i]));
    for (int k = 0; k < b.to_count; k++) round_to((T *)b.to[k] + i, sum);
}

static void sum_buffers(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from, size_t n_from) {
    buffers b = {};
    if (n_to > MOST_BUFFERS || n_from > MOST_BUFFERS) {
        rt_fail(s->rank, "rank %d: found %zu ranks of one process, CUDA adds up to %zu", s->rank->rank,
                n_to > n_from ? n_to : n_from, MOST_BUFFERS);
        return;
    }
    for (size_t k = 0; k < n_to; k++) b.to[b.to_count++] = to[k].data;
    for (size_t k = 0; k < n_from; k++) b.from[b.from_count++] = from[k].data;
    if (from->type == RT_I64)
        LAUNCH(sum_buffers_kernel<int64_t>, blocks_of(from->count), THREADS, 0, s, b, from->count);
    by_type(from->type, [&](auto zero) {
        using T = decltype(zero);
        LAUNCH(sum_buffers_kernel<T>, blocks_of(from->count), THREADS, 0, s, b, from->count);
    });
}

/* ---------------------------------------------------------------------------------------------- the table */

static void cuda_close(rt_rank *rank) {
    cuda_state *c = (cuda_state *)rank->device;
    if (!c) return;
    for (int i = 0; i < RT_STREAMS; i++)
        if (c->stream[i].stream) cudaStreamSynchronize(c->stream[i].stream);
    for (size_t i = 0; i < c->plans; i++) {
        LT(cublasLtMatrixLayoutDestroy)(c->plan[i].a);
        LT(cublasLtMatrixLayoutDestroy)(c->plan[i].b);
        LT(cublasLtMatrixLayoutDestroy)(c->plan[i].c);
        LT(cublasLtMatmulDescDestroy)(c->plan[i].operation);
    }
    free(c->plan);
    if (c->blas) LT(cublasLtDestroy)(c->blas);
    cudaFree(c->workspace);
    if (c->scratch) cudaFree(c->scratch);
    cudaFree(c->arena);
    for (size_t i = 0; i < STAGES; i++) {
        if (c->stage[i].memory) cudaFreeHost(c->stage[i].memory);
        if (c->stage[i].copied) cudaEventDestroy(c->stage[i].copied);
    }
    if (c->replayed.event) cudaEventDestroy(c->replayed.event);
    for (int i = 0; i < RT_STREAMS; i++) {
        for (size_t k = 0; k < EVENTS; k++)
            if (c->stream[i].event[k].event) cudaEventDestroy(c->stream[i].event[k].event);
        if (c->stream[i].stream) cudaStreamDestroy(c->stream[i].stream);
    }
    free(c);
    rank->device = NULL;
    rank->record = NULL;
    rank->wait = NULL;
}

/* Streams, events and cuBLASLt of an open device. -1: the world has failed. */
static int open_streams(rt_rank *rank, cuda_state *c) {
    int least, greatest;
    if (check(rank, cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities")) return -1;
    for (int i = RT_COMPUTE; i < RT_STREAMS; i++) {
        cuda_stream *cs = &c->stream[i];
        if (check(rank,
                  cudaStreamCreateWithPriority(&cs->stream, cudaStreamNonBlocking,
                                               i == RT_COMMUNICATION ? greatest : least),
                  "cudaStreamCreate"))
            return -1;
        rank->stream[i].device = cs->stream;
        for (size_t k = 0; k < EVENTS; k++)
            if (check(rank, cudaEventCreateWithFlags(&cs->event[k].event, cudaEventDisableTiming),
                      "cudaEventCreate"))
                return -1;
    }
    for (size_t i = 0; i < STAGES; i++)
        if (check(rank, cudaEventCreateWithFlags(&c->stage[i].copied, cudaEventDisableTiming),
                  "cudaEventCreate"))
            return -1;
    return check(rank, cudaEventCreateWithFlags(&c->replayed.event, cudaEventDisableTiming),
                 "cudaEventCreate") ||
                   check(rank, cudaMalloc(&c->workspace, WORKSPACE), "cuBLASLt's workspace") ||
                   check(rank, LT(cublasLtCreate)(&c->blas), "cublasLtCreate")
               ? -1
               : 0;
}

/* The r-th rank of this host computes on GPU r % count. Ranks on several GPUs of one process read each
 * other's memory in sum_buffers. */
static int cuda_open(rt_rank *rank, error_text *e) {
    int count, runtime = 0;
    if (count_devices(&count, e)) return -1;
    if (!cublaslt_function("cublasLtCreate")) return error_set(e, "cuBLASLt cannot be loaded: %s", dlerror());
    if ((rank->world->flags & RT_ELSEWHERE) && rank->local_rank >= count)
        return error_set(e, "rank %d: found %d CUDA devices, expected number %d", rank->rank, count,
                         rank->local_rank);
    const int gpu = rank->local_rank % count;
    cudaDeviceProp properties;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(gpu);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, gpu);
    if (error != cudaSuccess) return error_set(e, "CUDA device %d: %s", gpu, cudaGetErrorString(error));
    error = cudaFuncGetAttributes(&attributes, (const void *)loss_accumulate_kernel);
    if (error != cudaSuccess)
        return error_set(e,
                         "CUDA device %d: found %s (sm_%d%d), for which this program was not built: %s "
                         "(make CUDA_ARCHS=%d%d)",
                         gpu, properties.name, properties.major, properties.minor, cudaGetErrorString(error),
                         properties.major, properties.minor);
    for (int other = 0; other < count && other < rank->world->size && rank->world->size > 1; other++) {
        int can = 0;
        if (other == gpu) continue;
        if (cudaDeviceCanAccessPeer(&can, gpu, other) != cudaSuccess || !can)
            return error_set(
                e,
                "CUDA device %d cannot read the memory of device %d: expected one rank, or ranks "
                "on one device (CUDA_VISIBLE_DEVICES)",
                gpu, other);
        error = cudaDeviceEnablePeerAccess(other, 0);
        cudaGetLastError();
        if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled)
            return error_set(e, "CUDA device %d: %s", gpu, cudaGetErrorString(error));
    }
    cuda_state *c = (cuda_state *)calloc(1, sizeof *c);
    if (!c) return error_set(e, "rank %d: out of memory", rank->rank);
    c->gpu = gpu;
    c->fp32_product = CUBLAS_COMPUTE_32F;
    cudaRuntimeGetVersion(&runtime);
    snprintf(c->description, sizeof c->description, "%s, sm_%d%d, CUDA %d.%d, cuBLASLt %zu", properties.name,
             properties.major, properties.minor, runtime / 1000, runtime % 1000 / 10,
             LT(cublasLtGetVersion)());
    rank->device = c;
    rank->allocate = allocate;
    rank->release = release;
    rank->allocate_host = allocate_host;
    rank->release_host = release_host;
    rank->record = record_event;
    rank->wait = wait_for_event;
    if (open_streams(rank, c)) {
        cuda_close(rank);
        return error_set(e, "%s", rank->world->error.text);
    }
    return 0;
}

void vit_cuda_products(rt_rank *rank, int tf32, int first_algorithm) {
    cuda_state *c = (cuda_state *)rank->device;
    size_t used = strlen(c->description);
    c->first_algorithm = first_algorithm;
    if (!tf32) return;
    c->fp32_product = CUBLAS_COMPUTE_32F_FAST_TF32;
    snprintf(c->description + used, sizeof c->description - used, ", TF32");
}

static int cuda_address(const rt_rank *rank, char address[32], error_text *e) {
    int gpu = ((const cuda_state *)rank->device)->gpu;
    cudaError_t error = cudaDeviceGetPCIBusId(address, 32, gpu);
    return error == cudaSuccess ? 0 : error_set(e, "CUDA device %d: %s", gpu, cudaGetErrorString(error));
}

/* clang-format off */
extern "C" const vit_device vit_cuda = {
    .name = "cuda", .types = 1u << RT_FP32 | 1u << RT_BF16 | 1u << RT_FP16,
    .open = cuda_open, .close = cuda_close,
    .copy_in = copy_in, .copy_out = copy_out, .attention_saved = attention_saved,
    .linear_forward = linear_forward,               .linear_backward = linear_backward,
    .layernorm_forward = layernorm_forward,         .layernorm_backward = layernorm_backward,
    .attention_forward = attention_forward,         .attention_backward = attention_backward,
    .residual_forward = residual_forward,           .residual_layernorm_forward = residual_layernorm_forward,
    .residual_backward = residual_backward,
    .patchify_forward = patchify_forward,
    .embedding_forward = embedding_forward,         .embedding_backward = embedding_backward,
    .cross_entropy_forward = cross_entropy_forward, .cross_entropy_backward = cross_entropy_backward,
    .loss_accumulate = loss_accumulate, .adamw = adamw, .sgd = sgd,
    .sum_of_squares = sum_of_squares, .decide_step = decide_step,
    .fill = fill, .cast = cast, .add = add, .sum_buffers = sum_buffers,
    .description = cuda_description, .memory = cuda_memory, .list = cuda_list, .reserve = cuda_reserve,
    .address = cuda_address,
    .capture = capture, .captured = captured, .replay = replay, .forget = forget,
};
