/* image.h - an image in memory, as bytes.
 *
 *     image a, b;
 *     if (image_new(&a, 640, 480, 3, &e) || image_crop(&a, 208, 128, 224, 224, &b, &e)) ...
 *     image_free(&a);
 *     image_free(&b);
 *
 * data/decode.h reads one from a file, data/resize.h changes its size, data/transform.h makes it what a model
 * takes. Left out: more than 8 bits a channel, alpha, rows with padding.
 */
#ifndef DATA_IMAGE_H
#define DATA_IMAGE_H

#include <stdlib.h>
#include <string.h>

#include "base.h"

typedef struct image {
    size_t width, height, channels; /* 1 grey, 3 red green blue */
    uint8_t *pixels;                /* [height][width][channels] */
} image;

/* A rectangle of an image, in pixels. */
typedef struct {
    size_t left, top, width, height;
} image_area;

static inline void image_free(image *i) {
    free(i->pixels);
    *i = (image){0};
}

/* An image with pixels of any value. Fails, leaving it empty, when a size is 0, the bytes overflow, or memory
 * runs out. */
static inline int image_new(image *out, size_t width, size_t height, size_t channels, error_text *e) {
    size_t row, bytes;
    *out = (image){0};
    if (size_multiply(width, channels, &row) || size_multiply(row, height, &bytes) || bytes == 0)
        return error_set(e, "found an image of %zu x %zu pixels of %zu channels, expected 1 to 2^64 bytes",
                         width, height, channels);
    uint8_t *pixels = malloc(bytes);
    if (!pixels) return error_set(e, "out of memory for an image of %zu x %zu pixels", width, height);
    *out = (image){width, height, channels, pixels};
    return 0;
}

/* The rectangle of width x height pixels whose upper left corner is (left, top) of `in`; 0 where that lies
 * outside, as Pillow's Image.crop. Fails as image_new does. */
static inline int image_crop(const image *in, ptrdiff_t left, ptrdiff_t top, size_t width, size_t height,
                             image *out, error_text *e) {
    if (image_new(out, width, height, in->channels, e)) return -1;
    memset(out->pixels, 0, width * height * in->channels);
    /* Columns [begin, end) of the crop lie in the image, so do the rows that the loop does not skip. */
    ptrdiff_t begin = left < 0 ? -left : 0, end = (ptrdiff_t)in->width - left;
    if (end > (ptrdiff_t)width) end = (ptrdiff_t)width;
    for (ptrdiff_t y = 0; begin < end && y < (ptrdiff_t)height; y++) {
        if (y + top < 0 || y + top >= (ptrdiff_t)in->height) continue;
        memcpy(out->pixels + ((size_t)y * width + (size_t)begin) * in->channels,
               in->pixels + ((size_t)(y + top) * in->width + (size_t)(begin + left)) * in->channels,
               (size_t)(end - begin) * in->channels);
    }
    return 0;
}

#endif
