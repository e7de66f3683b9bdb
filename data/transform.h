/* transform.h - from an image of any size to one of the model's, as torchvision and timm do it on Pillow's
 * images, byte for byte.
 *
 *     uint64_t key = random_key(seed, RANDOM_AUGMENTATION, epoch, index);
 *     transform_train(&photo, 224, 224, RESIZE_BILINEAR, key, &out, &e);
 *     transform_eval(&photo, 224, 224, 0.9, RESIZE_BICUBIC, &out, &e);
 *
 * Both leave the input as it is; the caller frees the result, and turns its bytes into normalised floats.
 * Sources: torchvision's RandomResizedCrop, RandomHorizontalFlip, Resize and CenterCrop; timm's
 * transforms_imagenet_eval and ResizeKeepRatio. Left out: timm's crop modes squash and border.
 */
#ifndef DATA_TRANSFORM_H
#define DATA_TRANSFORM_H

#include "data/resize.h"

/* The rectangle that RandomResizedCrop takes: 8 to 100 % of the area, width to height 3/4 to 4/3, the first
 * of ten draws that fits; if none does, the largest such rectangle in the middle. *drawn counts the numbers
 * of the stream `key` that were used. */
static inline image_area transform_random_area(size_t width, size_t height, uint64_t key, uint64_t *drawn) {
    const double least = 3.0 / 4, most = 4.0 / 3, area = (double)width * (double)height;
    for (int i = 0; i < 10; i++) {
        double target = area * (0.08 + (1 - 0.08) * random_uniform(key, (*drawn)++));
        double ratio = exp(log(least) + (log(most) - log(least)) * random_uniform(key, (*drawn)++));
        size_t w = (size_t)nearbyint(sqrt(target * ratio)), h = (size_t)nearbyint(sqrt(target / ratio));
        if (w == 0 || w > width || h == 0 || h > height) continue;
        size_t top = random_below(key, (*drawn)++, height - h + 1);
        return (image_area){random_below(key, (*drawn)++, width - w + 1), top, w, h};
    }
    double ratio = (double)width / (double)height;
    size_t w = width, h = height;
    if (ratio < least) h = (size_t)nearbyint((double)width / least);
    if (ratio > most) w = (size_t)nearbyint((double)height * most);
    return (image_area){(width - w) / 2, (height - h) / 2, w, h};
}

/* Exchanges left and right. */
static inline void transform_mirror(image *i) {
    const size_t c = i->channels, row = i->width * c;
    for (uint8_t *y = i->pixels; y < i->pixels + i->height * row; y += row)
        for (uint8_t *left = y, *right = y + row - c; left < right; left += c, right -= c)
            for (size_t k = 0; k < c; k++) {
                uint8_t pixel = left[k];
                left[k] = right[k];
                right[k] = pixel;
            }
}

/* A sample for training: a random rectangle, resized to width x height, mirrored with probability 1/2. A pure
 * function of image, sizes, filter and key. Fails when memory runs out or a size is 0; out is then empty. */
static inline int transform_train(const image *in, size_t width, size_t height, resize_filter filter,
                                  uint64_t key, image *out, error_text *e) {
    uint64_t drawn = 0;
    image_area from = transform_random_area(in->width, in->height, key, &drawn);
    if (image_resize_area(in, from, width, height, filter, (image_area){0, 0, width, height}, out, e))
        return -1;
    if (random_below(key, drawn, 2)) transform_mirror(out);
    return 0;
}

/* Where a centre crop of `size` begins in `have` pixels; before them, where it is larger. Python rounds
 * halves to even. */
static inline ptrdiff_t transform_centre(size_t have, size_t size) {
    if (size > have) return -(ptrdiff_t)((size - have) / 2);
    return (ptrdiff_t)nearbyint((double)(have - size) / 2);
}

/* An image for evaluation. One of width x height pixels is copied. Any other is resized, so that its shorter
 * side (of a model that is not square: the side that is shorter in proportion) becomes the model's /
 * crop_pct, then cropped in the middle; zeros fill what it lacks (crop_pct above 1). Fails on a crop_pct that
 * is not above 0, a size of 0, and when memory runs out; out is then empty. */
static inline int transform_eval(const image *in, size_t width, size_t height, double crop_pct,
                                 resize_filter filter, image *out, error_text *e) {
    *out = (image){0};
    if (in->width == width && in->height == height) return image_crop(in, 0, 0, width, height, out, e);
    if (!(crop_pct > 0)) return error_set(e, "found crop_pct %g, expected more than 0", crop_pct);
    const double across = floor((double)width / crop_pct), down = floor((double)height / crop_pct);
    const double in_width = (double)in->width, in_height = (double)in->height;
    double to_width = across, to_height = down;
    if (across != down) {
        double ratio = fmin(in_height / down, in_width / across);
        to_width = nearbyint(in_width / ratio), to_height = nearbyint(in_height / ratio);
    } else if (in_width <= in_height) {
        to_height = floor(down * in_height / in_width);
    } else {
        to_width = floor(across * in_width / in_height);
    }
    if (!(to_width >= 1 && to_width < 0x1p40 && to_height >= 1 && to_height < 0x1p40))
        return error_set(e, "found an image to be resized from %zu x %zu to %g x %g, expected 1 to 2^40",
                         in->width, in->height, to_width, to_height);
    const size_t w = (size_t)to_width, h = (size_t)to_height;
    const ptrdiff_t left = transform_centre(w, width), top = transform_centre(h, height);
    if (left >= 0 && top >= 0 && w >= width && h >= height)
        return image_resize_area(in, (image_area){0, 0, in->width, in->height}, w, h, filter,
                                 (image_area){(size_t)left, (size_t)top, width, height}, out, e);
    image whole;
    if (image_resize(in, w, h, filter, &whole, e)) return -1;
    int failed = image_crop(&whole, left, top, width, height, out, e);
    image_free(&whole);
    return failed;
}

#endif
