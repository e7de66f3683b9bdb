/* cuda_on_cpu.h - the language of CUDA for a C++ compiler, so that vit_cuda.cu runs where there is no GPU:
 * the threads of a block are fibers of one thread, which meet at barriers and in the exchanges of a warp.
 * The runtime and cuBLASLt are tests/cuda_on_cpu.cpp. Three things the Makefile changes in the source: a
 * launch becomes a call of cuda_launch; `extern __shared__` loses the second word; the section on tensor
 * cores, which is PTX, is left out for the functions below, written from the PTX manual ("Warp-level matrix
 * instructions").
 *
 * It shows whether indices, barriers, streams and graphs are right; not whether the hardware does as the
 * manuals say, nor any time. Besides, it finds: threads that wait for each other, exchanges with lanes that
 * have left, host code that touches device memory, operations that rely on other streams without waiting
 * for them (environment variables in cuda_on_cpu.cpp), what may not be done in a capture. */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include <dlfcn.h>
#include <math.h>
#include <string.h>

#include <functional>
#include <tuple>

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static /* one block runs at a time */
#define __launch_bounds__(n)
extern float shared[]; /* whose size the launch gives */

void *cuda_on_cpu_cublaslt(const char *name);
#define dlopen(name, flags)  ((void *)1)
#define dlsym(library, name) cuda_on_cpu_cublaslt(name)

struct cuda_thread {
    uint3 thread, block;
    dim3 threads, blocks;
};
extern cuda_thread *cuda_self;
#define threadIdx (cuda_self->thread)
#define blockIdx  (cuda_self->block)
#define blockDim  (cuda_self->threads)
#define gridDim   (cuda_self->blocks)

void __syncthreads(void);
/* All lanes of the warp give `bytes`, up to 32, of their own: lane i's are then 32 i bytes further on. Valid
 * until the exchange after the next. */
const char *cuda_exchange(const void *mine, size_t bytes);
[[noreturn]] void cuda_wrong(const char *what);
template <class X> struct cuda_lanes {
    const char *all;
    const X &operator[](size_t lane) const { return *(const X *)(all + lane * 32); }
};
template <class X> cuda_lanes<X> cuda_all(const X &mine) { return {cuda_exchange(&mine, sizeof mine)}; }
inline unsigned cuda_lane() { return threadIdx.x % 32; } /* blockDim.x is a multiple of 32 */

inline float __shfl_xor_sync(unsigned, float x, int lanes) {
    return cuda_all(x)[cuda_lane() ^ (unsigned)lanes];
}
inline unsigned __match_any_sync(unsigned, int x) {
    const auto all = cuda_all(x);
    unsigned same = 0;
    for (unsigned i = 0; i < 32; i++) same |= (unsigned)(all[i] == x) << i;
    return same;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
    const auto all = cuda_all(x);
    unsigned sum = 0;
    for (unsigned i = 0; i < 32; i++) sum += mask >> i & 1 ? all[i] : 0;
    return sum;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline long long __double_as_longlong(double x) {
    long long bits;
    return memcpy(&bits, &x, sizeof bits), bits;
}
inline float normcdff(float x) { return (float)(0.5 * erfc(-(double)x * M_SQRT1_2)); }
inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long x) {
    const unsigned long long old = *at;
    return *at = old + x, old;
}

/* D [16, 8] += A [16, 16] B [16, 8]: where the lanes hold what stands beside mma in vit_cuda.cu */
struct cuda_fragments {
    uint32_t a[4], b[2];
};
template <class T> void mma(float d[4], const uint32_t a[4], const uint32_t b[2], T) {
    const unsigned g = cuda_lane() / 4, t = cuda_lane() % 4 * 2;
    const auto all = cuda_all(cuda_fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    const auto half = [](const uint32_t &pair, unsigned i) {
        return (double)(float)((const T *)&pair)[i % 2];
    };
    double sum[4] = {d[0], d[1], d[2], d[3]};
    for (unsigned k = 0; k < 16; k++)
        for (unsigned i = 0; i < 4; i++) {
            const unsigned lane_a = g * 4 + k % 8 / 2, lane_b = (t + i % 2) * 4 + k % 8 / 2;
            sum[i] += half(all[lane_a].a[i / 2 + k / 8 * 2], k) * half(all[lane_b].b[k / 8], k);
        }
    for (unsigned i = 0; i < 4; i++) d[i] = (float)sum[i];
}
inline void load_matrices(uint32_t x[4], const void *row, bool transposed = false) {
    const auto rows = cuda_all((const uint16_t *)row);
    const unsigned g = cuda_lane() / 4, t = cuda_lane() % 4 * 2;
    if ((uintptr_t)row % 16) cuda_wrong("a row of a matrix is not aligned to 16 bytes");
    for (unsigned i = 0; i < 4; i++) {
        const uint16_t low = transposed ? rows[8 * i + t][g] : rows[8 * i + g][t];
        const uint16_t high = transposed ? rows[8 * i + t + 1][g] : rows[8 * i + g][t + 1];
        x[i] = low | (uint32_t)high << 16;
    }
}
inline void load_matrices_transposed(uint32_t x[4], const void *row) { load_matrices(x, row, true); }

/* body() once for every thread of every block, on the stream. */
void cuda_enqueue_blocks(cudaStream_t s, dim3 blocks, dim3 threads, size_t shared,
                         std::function<void()> body);
template <class... P, class... A>
void cuda_launch(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared, cudaStream_t s,
                 A... arguments) {
    const std::tuple<P...> copies((P)arguments...);
    cuda_enqueue_blocks(s, blocks, threads, shared, [=] { std::apply(kernel, copies); });
}

#endif
