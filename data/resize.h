/* resize.h - images of another size, byte for byte as Pillow's Image.resize makes them; and the weights
 * alone, for whatever else is to be resampled.
 *
 *     image small;
 *     if (image_resize(&photo, 224, 224, RESIZE_BICUBIC, &small, &e)) ...
 *
 * A pixel of the result is a weighted mean of the pixels around its place in the input. Where an image
 * shrinks, the filter is stretched by as much, so that every input pixel counts (antialiasing). Columns and
 * rows are done one after the other, with a rounding to bytes in between; weights are multiples of 2^-22.
 * Pillow documents the filters (https://pillow.readthedocs.io/en/stable/handbook/concepts.html#filters);
 * order, precision and rounding were learnt from its Resample.c.
 *
 * All arithmetic is done by one function, on 16 bytes at once. For rows those are neighbours; for columns
 * they are the same byte of 16 rows, which are transposed before and after.
 * Left out: other filters, alpha, several threads (the samples of a batch are many images).
 */
#ifndef DATA_RESIZE_H
#define DATA_RESIZE_H

#include "data/image.h"

typedef enum { RESIZE_BILINEAR, RESIZE_BICUBIC } resize_filter;

/* ---------------------------------------------------------------------------------------------- weights */

/* Output i is the sum of weight[i][k] * input[first[i] + k] over k < count[i]. */
typedef struct resize_weights {
    size_t out, most, *first, *count; /* most: no count is larger */
    double *weight;                   /* [out][most], the sum of each row 1 */
} resize_weights;

static inline void resize_weights_free(resize_weights *w) {
    free(w->first);
    free(w->weight);
    *w = (resize_weights){0};
}

/* The filter at distance x >= 0 from its middle: a triangle of radius 1, or the cubic convolution of radius 2
 * (Keys 1981) with a = -1/2. */
static inline double resize_filter_at(resize_filter filter, double x) {
    if (filter == RESIZE_BILINEAR) return x < 1 ? 1 - x : 0;
    const double a = -0.5;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/* The weights of outputs [begin, begin + count) of those that resize_weights_init makes. */
static inline int resize_weights_part(resize_weights *w, size_t in, size_t out, size_t begin, size_t count,
                                      resize_filter filter, error_text *e) {
    *w = (resize_weights){0};
    if (in == 0 || begin > out || count > out - begin || count == 0)
        return error_set(e, "resize: found sizes %zu to %zu, expected 1 or more", in, out);
    const double scale = (double)in / (double)out, stretch = scale > 1 ? scale : 1;
    const double radius = (filter == RESIZE_BICUBIC ? 2 : 1) * stretch;
    size_t most = (size_t)ceil(radius) * 2 + 1, weights, bytes, index_bytes;
    if (most > in) most = in;
    if (size_multiply(count, most, &weights) || size_multiply(weights, sizeof *w->weight, &bytes) ||
        size_multiply(count, 2 * sizeof *w->first, &index_bytes))
        return error_set(e, "resize: found sizes %zu to %zu, expected fewer than 2^64 bytes of weights", in,
                         out);
    *w = (resize_weights){
        .out = count, .most = most, .first = malloc(index_bytes), .weight = calloc(1, bytes)};
    if (!w->first || !w->weight) {
        resize_weights_free(w);
        return error_set(e, "resize: out of memory for %zu weights", weights);
    }
    w->count = w->first + count;
    for (size_t i = 0; i < count; i++) {
        double middle = ((double)(begin + i) + 0.5) * scale, sum = 0, *weight = w->weight + i * most;
        double low = middle - radius + 0.5, high = middle + radius + 0.5;
        size_t first = low > 0 ? (size_t)low : 0, end = high < (double)in ? (size_t)high : in;
        w->first[i] = first;
        w->count[i] = end - first;
        for (size_t k = 0; k < end - first; k++) {
            weight[k] = resize_filter_at(filter, fabs(((double)(first + k) - middle + 0.5) * (1 / stretch)));
            sum += weight[k];
        }
        for (size_t k = 0; k < end - first; k++) weight[k] /= sum;
    }
    return 0;
}

/* The weights that take `in` samples to `out` samples: those of Pillow's resize and of PyTorch's
 * interpolate(antialias=True, align_corners=False). Fails on a size of 0 and when memory runs out; w is then
 * empty. */
static inline int resize_weights_init(resize_weights *w, size_t in, size_t out, resize_filter filter,
                                      error_text *e) {
    return resize_weights_part(w, in, out, 0, out, filter, e);
}

/* ----------------------------------------------------------------------------------------------- pixels */

enum { RESIZE_LANES = 16, RESIZE_TILE = RESIZE_LANES * RESIZE_LANES, RESIZE_BITS = 22 };
typedef uint8_t resize_bytes __attribute__((vector_size(RESIZE_LANES)));
typedef uint16_t resize_words __attribute__((vector_size(2 * RESIZE_LANES)));
typedef int32_t resize_sums __attribute__((vector_size(4 * RESIZE_LANES)));

/* The weights as integers, nearest multiples of 2^-22 and halves away from 0; NULL when memory runs out. A
 * sum with bytes fits 32 bits, as a filter's positive weights add up to less than 2. */
static inline int32_t *resize_integers(const resize_weights *w) {
    int32_t *integers = malloc(w->out * w->most * sizeof *integers);
    for (size_t i = 0; integers && i < w->out * w->most; i++) {
        double scaled = w->weight[i] * (1 << RESIZE_BITS);
        integers[i] = (int32_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    return integers;
}

/* out[n] = the sum over k < count of weight[k] * in[k * stride .. + n], rounded and clamped to bytes; n is at
 * most 16. Conversions go by way of 16 bits, each step of which compilers turn into one instruction. */
static inline void resize_sum(const uint8_t *in, size_t stride, const int32_t *weight, size_t count,
                              uint8_t *out, size_t n) {
    resize_bytes bytes = {0};
    resize_sums sum = {0};
    sum += 1 << (RESIZE_BITS - 1);
    for (size_t k = 0; k < count; k++) {
        memcpy(&bytes, in + k * stride, n);
        sum += __builtin_convertvector(__builtin_convertvector(bytes, resize_words), resize_sums) * weight[k];
    }
    sum >>= RESIZE_BITS;
    sum = (sum | (sum > 255)) & ~(sum < 0); /* a comparison is -1 where true: its low byte is 255 */
    bytes = __builtin_convertvector(__builtin_convertvector(sum, resize_words), resize_bytes);
    memcpy(out, &bytes, n);
}

/* Transposes 16 x 16 bytes. A perfect shuffle of 256 bytes rotates the eight bits of their index by one; four
 * of them exchange row and column. */
static inline void resize_transpose(const uint8_t *in, uint8_t *out) {
    uint8_t tiles[3][RESIZE_TILE];
    for (int i = 0; i < 4; i++) {
        const uint8_t *from = i == 0 ? in : tiles[i - 1];
        uint8_t *to = i == 3 ? out : tiles[i];
        for (int k = 0; k < RESIZE_TILE / 2; k++) {
            to[2 * k] = from[k];
            to[2 * k + 1] = from[k + RESIZE_TILE / 2];
        }
    }
}

/* Copies n <= 16 bytes: a constant size, which needs no call, wherever possible. */
static inline void resize_copy(uint8_t *to, const uint8_t *from, size_t n) {
    if (n >= RESIZE_LANES)
        memcpy(to, from, RESIZE_LANES);
    else
        memcpy(to, from, n);
}

/* How many inputs the weights reach, from first[0] on. */
static inline size_t resize_reach(const resize_weights *w) {
    return w->first[w->out - 1] + w->count[w->out - 1] - w->first[0];
}

/* Bytes of the scratch that resize_columns takes: 16 rows of its input and of its output, transposed. */
static inline size_t resize_scratch(const resize_weights *w, size_t channels) {
    return ((resize_reach(w) + w->out) * channels + 2 * RESIZE_LANES) * RESIZE_LANES;
}

/* out[rows][w->out][channels] from rows that begin in_row bytes apart, at the first column that w reaches. */
static inline void resize_columns(const uint8_t *in, size_t in_row, size_t rows, size_t channels,
                                  const resize_weights *w, const int32_t *weight, uint8_t *scratch,
                                  uint8_t *out) {
    const size_t reach = resize_reach(w) * channels, out_row = w->out * channels;
    uint8_t tile[RESIZE_TILE] = {0};
    uint8_t *sums = scratch + (reach + RESIZE_LANES - 1) / RESIZE_LANES * RESIZE_TILE;
    for (size_t y = 0; y < rows; y += RESIZE_LANES) {
        size_t lanes = rows - y < RESIZE_LANES ? rows - y : RESIZE_LANES;
        for (size_t x = 0; x < reach; x += RESIZE_LANES) {
            for (size_t r = 0; r < lanes; r++)
                resize_copy(tile + r * RESIZE_LANES, in + (y + r) * in_row + x, reach - x);
            resize_transpose(tile, scratch + x * RESIZE_LANES);
        }
        for (size_t x = 0; x < w->out; x++)
            for (size_t c = 0; c < channels; c++)
                resize_sum(scratch + ((w->first[x] - w->first[0]) * channels + c) * RESIZE_LANES,
                           channels * RESIZE_LANES, weight + x * w->most, w->count[x],
                           sums + (x * channels + c) * RESIZE_LANES, RESIZE_LANES);
        for (size_t x = 0; x < out_row; x += RESIZE_LANES) {
            resize_transpose(sums + x * RESIZE_LANES, tile);
            for (size_t r = 0; r < lanes; r++)
                resize_copy(out + (y + r) * out_row + x, tile + r * RESIZE_LANES, out_row - x);
        }
    }
}

/* out[w->out][size] from rows of `size` bytes, in_row bytes apart, the first of which w reaches. */
static inline void resize_rows(const uint8_t *in, size_t in_row, size_t size, const resize_weights *w,
                               const int32_t *weight, uint8_t *out) {
    for (size_t y = 0; y < w->out; y++, out += size, weight += w->most) {
        const uint8_t *row = in + (w->first[y] - w->first[0]) * in_row;
        size_t x = 0;
        for (; x + RESIZE_LANES <= size; x += RESIZE_LANES)
            resize_sum(row + x, in_row, weight, w->count[y], out + x, RESIZE_LANES);
        if (x < size) resize_sum(row + x, in_row, weight, w->count[y], out + x, size - x);
    }
}

/* Which comes first makes a difference of a level in some pixels. Pillow 13 takes rows first where there are
 * fewer rows and the height loses more than twice the pixels that the width loses; earlier versions always
 * take columns first. */
static inline int resize_rows_first(size_t width, size_t height, size_t to_width, size_t to_height) {
    ptrdiff_t width_lost = (ptrdiff_t)(width - to_width), height_lost = (ptrdiff_t)(height - to_height);
    return height_lost > 0 && height_lost > 2 * width_lost;
}

/* Resizes the rectangle `from` of an image to width x height pixels, but makes only the rectangle `part` of
 * the result, which is all that out holds. What surrounds `from` has no influence, as though it had been
 * cropped before. Fails when a rectangle is empty or not inside its image, and when memory runs out; out is
 * then empty. */
static inline int image_resize_area(const image *in, image_area from, size_t width, size_t height,
                                    resize_filter filter, image_area part, image *out, error_text *e) {
    const size_t channels = in->channels;
    resize_weights across, down = {0};
    *out = (image){0};
    if (from.left > in->width || from.width > in->width - from.left || from.top > in->height ||
        from.height > in->height - from.top)
        return error_set(e, "resize: found a rectangle outside an image of %zu x %zu", in->width, in->height);
    int failed = resize_weights_part(&across, from.width, width, part.left, part.width, filter, e) ||
                         resize_weights_part(&down, from.height, height, part.top, part.height, filter, e) ||
                         image_new(out, part.width, part.height, channels, e)
                     ? -1
                     : 0;
    if (!failed) {
        const int rows_first = resize_rows_first(from.width, from.height, width, height);
        const size_t row = in->width * channels, columns = resize_reach(&across), rows = resize_reach(&down);
        const uint8_t *first =
            in->pixels + (from.top + down.first[0]) * row + (from.left + across.first[0]) * channels;
        int32_t *across_weight = resize_integers(&across), *down_weight = resize_integers(&down);
        uint8_t *scratch = malloc(resize_scratch(&across, channels));
        image middle;
        failed = image_new(&middle, rows_first ? columns : part.width, rows_first ? part.height : rows,
                           channels, e);
        if (!failed && (!across_weight || !down_weight || !scratch))
            failed = error_set(e, "resize: out of memory for an image of %zu x %zu pixels", width, height);
        if (!failed && rows_first) {
            resize_rows(first, row, columns * channels, &down, down_weight, middle.pixels);
            resize_columns(middle.pixels, columns * channels, part.height, channels, &across, across_weight,
                           scratch, out->pixels);
        } else if (!failed) {
            resize_columns(first, row, rows, channels, &across, across_weight, scratch, middle.pixels);
            resize_rows(middle.pixels, part.width * channels, part.width * channels, &down, down_weight,
                        out->pixels);
        }
        image_free(&middle);
        free(scratch);
        free(down_weight);
        free(across_weight);
    }
    if (failed) image_free(out);
    resize_weights_free(&down);
    resize_weights_free(&across);
    return failed;
}

/* The whole image at another size. */
static inline int image_resize(const image *in, size_t width, size_t height, resize_filter filter, image *out,
                               error_text *e) {
    return image_resize_area(in, (image_area){0, 0, in->width, in->height}, width, height, filter,
                             (image_area){0, 0, width, height}, out, e);
}

#endif
