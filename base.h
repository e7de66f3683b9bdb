/* base.h - the two things that every part shares: one way to report a failure, and random numbers that depend
 * on what they are for and never on who draws them or when.
 *
 * Errors. A function that can fail returns 0, or -1 after writing one line into an error_text:
 *
 *     if (count == 0) return error_set(e, "%s: found no record, expected at least one", path);
 *
 * Libraries neither print nor exit; only train.c turns an error_text into "train: error: ...".
 *
 * Random numbers are counter-based: random_key(seed, what, a, b) names a stream, and its i-th value is a pure
 * function of (key, i). Initialisation, shuffling, augmentation and drop-path therefore do not depend on the
 * number of ranks, workers or threads, and a resumed run draws what the uninterrupted run would have drawn.
 */
#ifndef BASE_H
#define BASE_H

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
    char text[2048];
} error_text;

/* Writes the message (printf style, no newline at its end) and returns -1, so that `return error_set(...)`
 * fails. */
__attribute__((format(printf, 2, 3))) static inline int error_set(error_text *e, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(e->text, sizeof e->text, format, arguments);
    va_end(arguments);
    return -1;
}

/* a * b into *product; -1 on overflow. For sizes that come from files. */
static inline int size_multiply(size_t a, size_t b, size_t *product) {
    return __builtin_mul_overflow(a, b, product) ? -1 : 0;
}

/* What the kernels of vit_cuda.cu call too. */
#ifdef __CUDACC__
#define BASE_INLINE static inline __host__ __device__
#else
#define BASE_INLINE static inline
#endif

/* What a random stream is for: the second word of its key. */
enum { RANDOM_INITIALISATION = 1, RANDOM_SHUFFLE, RANDOM_AUGMENTATION, RANDOM_DROP_PATH, RANDOM_SYNTHETIC };

/* A bijection of 64 bits in which every input bit flips about half of the output bits (SplitMix64's
 * finaliser, Steele, Lea and Flood 2014, with Stafford's "Mix13" constants). */
BASE_INLINE uint64_t random_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static inline uint64_t random_key(uint64_t seed, uint64_t what, uint64_t a, uint64_t b) {
    uint64_t k = random_mix(seed + 0x9E3779B97F4A7C15u);
    k = random_mix(k ^ (what + 0x9E3779B97F4A7C15u));
    k = random_mix(k ^ (a + 0x9E3779B97F4A7C15u));
    return random_mix(k ^ (b + 0x9E3779B97F4A7C15u));
}

/* The i-th 64 random bits of a stream. */
BASE_INLINE uint64_t random_bits(uint64_t key, uint64_t i) {
    return random_mix(key + (i + 1) * 0x9E3779B97F4A7C15u);
}

/* Uniform in [0, 1), a multiple of 2^-53. */
BASE_INLINE double random_uniform(uint64_t key, uint64_t i) {
    return (double)(random_bits(key, i) >> 11) * 0x1p-53;
}

/* Uniform integer in [0, n), n < 2^32 (Lemire's multiplication; a bias of n / 2^64 is of no account). */
static inline uint64_t random_below(uint64_t key, uint64_t i, uint64_t n) {
    return (uint64_t)(((unsigned __int128)random_bits(key, i) * n) >> 64);
}

/* Standard normal: Box and Muller's transform of two uniform values of 32 bits each. */
static inline double random_normal(uint64_t key, uint64_t i) {
    uint64_t bits = random_bits(key, i);
    double u = ((double)(bits >> 32) + 0.5) * 0x1p-32, v = (double)(bits & 0xFFFFFFFFu) * 0x1p-32;
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

#endif
