/* digits.h - the embedded data set: UCI optical digits, so that a fresh clone has something real to learn.
 *
 * Grey images of 8 x 8 pixels with values 0 to 16, ten classes. Every fifth image is for validation. Source,
 * licence (CC BY 4.0) and attribution stand in digits_images.h, beside the data.
 */
#ifndef DATA_DIGITS_H
#define DATA_DIGITS_H

#include "data/digits_images.h"
#include "data/images.h"

/* The first `limit` of the 1,438 training or the 359 validation images. */
static inline int digits_load(dataset *d, int train, size_t limit, error_text *e) {
    *d = (dataset){.kind = DATASET_DIGITS,
                   .channels = 1,
                   .height = 8,
                   .width = 8,
                   .classes = 10,
                   .white = 16,
                   .mean = {DIGITS_MEAN, DIGITS_MEAN, DIGITS_MEAN},
                   .std = {DIGITS_STD, DIGITS_STD, DIGITS_STD}};
    for (size_t i = 0; i < DIGITS_COUNT && d->count < limit; i++) {
        int validation = i % 5 == 4;
        if (validation == !!train) continue;
        if (dataset_grow(d, 1, e)) return -1;
        const char *text = digits_images[i];
        uint8_t *pixels = d->pixels + (d->count - 1) * 64;
        for (size_t p = 0; p < 64; p++)
            pixels[p] = (uint8_t)(text[p] <= '9' ? text[p] - '0' : text[p] - 'a' + 10);
        d->labels[d->count - 1] = text[64] - '0';
    }
    return 0;
}

#endif
