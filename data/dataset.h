/* dataset.h - data sets of images: which one lies in a folder, loading it, the order of its samples, and one
 * sample as the floats that a model reads.
 *
 *     dataset_kind kind;
 *     dataset d;
 *     if (dataset_choose("auto", path, &kind, &e) || dataset_load(&d, kind, path, 1, 0, &e)) ...
 *     sampler_order(seed, epoch, d.count, 1, order);
 *     dataset_sample(&d, order[i], AUGMENTATION_BASIC, seed, epoch, d.channels, out);
 *     dataset_free(&d);
 *
 * Order and augmentation are pure functions of seed, epoch and sample: whoever asks, whenever, gets the same.
 * After loading, nothing here writes to a dataset, so threads may share one. Left out: resizing, ImageFolder.
 */
#ifndef DATA_DATASET_H
#define DATA_DATASET_H

#include "data/cifar10.h"
#include "data/digits.h"
#include "data/mnist.h"

/* Tells the kind by the names that lie in the directory; digits where path is NULL. Fails on a directory that
 * is missing, unreadable, empty, of no known kind, or of more than one. */
static inline int dataset_detect(const char *path, dataset_kind *kind, error_text *e) {
    static const char expected[] = "expected MNIST (train-images-idx3-ubyte, plain or .gz), CIFAR-10 "
                                   "(data_batch_*.bin) or an ImageFolder (train/ and val/)";
    *kind = DATASET_DIGITS;
    if (!path) return 0;
    DIR *directory = opendir(path);
    if (!directory) return error_set(e, "%s: cannot be read: %s, %s", path, strerror(errno), expected);
    size_t entries = 0;
    int mnist = 0, cifar10 = 0, folder = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        const char *name = entry->d_name;
        entries += strcmp(name, ".") && strcmp(name, "..");
        mnist |= fnmatch("*-images[-.]idx3-ubyte*", name, 0) == 0;
        cifar10 |= cifar10_is_training(entry) || cifar10_is_validation(entry);
        folder |= strcmp(name, "train") == 0 || strcmp(name, "val") == 0;
    }
    closedir(directory);
    if (entries == 0) return error_set(e, "%s: found an empty directory, %s", path, expected);
    if (mnist + cifar10 + folder == 0)
        return error_set(e, "%s: found %zu entries, none of a known name, %s", path, entries, expected);
    if (mnist + cifar10 + folder > 1)
        return error_set(e, "%s: found more than one data set, expected one, or to be told which to take",
                         path);
    *kind = mnist ? DATASET_MNIST : cifar10 ? DATASET_CIFAR10 : DATASET_IMAGEFOLDER;
    return 0;
}

/* The kind by its name, one of dataset_kind_names, or by what lies in the directory where the name is
 * "auto". */
static inline int dataset_choose(const char *name, const char *path, dataset_kind *kind, error_text *e) {
    if (strcmp(name, "auto") == 0) return dataset_detect(path, kind, e);
    for (*kind = 0; *kind < DATASET_KINDS; (*kind)++)
        if (strcmp(name, dataset_kind_names[*kind]) == 0) return 0;
    return error_set(e, "found data set %s, expected auto, digits, mnist, cifar10, imagefolder or synthetic",
                     name);
}

/* Loads the training (train = 1) or validation (train = 0) images, at most `limit` of them, in their own
 * order; 0 is all. path is not looked at for digits; synthetic data comes from dataset_synthetic. When it
 * fails, d is empty. */
static inline int dataset_load(dataset *d, dataset_kind kind, const char *path, int train, size_t limit,
                               error_text *e) {
    int failed = -1;
    *d = (dataset){0};
    if (limit == 0) limit = SIZE_MAX;
    if (kind == DATASET_IMAGEFOLDER)
        error_set(e, "data set imagefolder is not built yet");
    else if (kind == DATASET_SYNTHETIC)
        error_set(e, "data set synthetic is made, not loaded");
    else if (kind == DATASET_DIGITS)
        failed = digits_load(d, train, limit, e);
    else if (!path)
        error_set(e, "data set %s: found no data path, expected its folder", dataset_kind_names[kind]);
    else if (access(path, R_OK | X_OK))
        error_set(e, "%s: cannot be read: %s", path, strerror(errno));
    else if (kind == DATASET_MNIST)
        failed = mnist_load(d, path, train, limit, e);
    else
        failed = cifar10_load(d, path, train, limit, e);
    if (!failed && !d->label_names) failed = dataset_number_labels(d, e);
    if (failed) dataset_free(d);
    return failed;
}

/* Makes `count` images of the given sizes (1 to 3 channels). Image i is of class i % classes: half the
 * class's own random picture, half noise, so that a model can learn it. Training and validation images share
 * the pictures and differ in the noise. A pixel is the mean of two uniform bytes: its mean is 1/2, its
 * variance (1/12 + 1/12) / 4. Sizes of 0 are refused. When it fails, d is empty. */
static inline int dataset_synthetic(dataset *d, size_t count, size_t channels, size_t height, size_t width,
                                    size_t classes, uint64_t seed, int train, error_text *e) {
    const float std = 0.20412415f;
    *d = (dataset){.kind = DATASET_SYNTHETIC,
                   .channels = channels,
                   .height = height,
                   .width = width,
                   .classes = classes,
                   .white = 255,
                   .mean = {0.5f, 0.5f, 0.5f},
                   .std = {std, std, std}};
    int failed = -1;
    if (!count || !channels || channels > 3 || !height || !width || !classes)
        error_set(e,
                  "synthetic: found %zu images of %zu x %zu x %zu in %zu classes, expected 1 to 3 channels",
                  count, channels, height, width, classes);
    else
        failed = dataset_grow(d, count, e) || dataset_number_labels(d, e) ? -1 : 0;
    if (failed) {
        dataset_free(d);
        return -1;
    }
    size_t size = dataset_image_size(d);
    for (size_t i = 0; i < count; i++) {
        uint8_t *pixels = d->pixels + i * size;
        d->labels[i] = (int32_t)(i % classes);
        uint64_t picture = random_key(seed, RANDOM_SYNTHETIC, 0, i % classes);
        uint64_t noise = random_key(seed, RANDOM_SYNTHETIC, train ? 1 : 2, i);
        for (size_t p = 0; p < size; p += 8) {
            uint64_t a = random_bits(picture, p / 8), b = random_bits(noise, p / 8);
            for (size_t k = 0; k < 8 && p + k < size; k++, a >>= 8, b >>= 8)
                pixels[p + k] = (uint8_t)(((a & 255) + (b & 255)) / 2);
        }
    }
    return 0;
}

/* Fails unless a model of the one set's images and classes can be evaluated on the other. */
static inline int dataset_same_shape(const dataset *train, const dataset *validation, error_text *e) {
    const dataset *t = train, *v = validation;
    if (t->channels == v->channels && t->height == v->height && t->width == v->width &&
        t->classes == v->classes)
        return 0;
    return error_set(
        e, "%s: found %zu x %zu x %zu in %zu classes, expected %zu x %zu x %zu in %zu as trained on",
        dataset_kind_names[v->kind], v->channels, v->height, v->width, v->classes, t->channels, t->height,
        t->width, t->classes);
}

/* The order in which an epoch visits its `count` < 2^32 samples: a permutation drawn by Fisher and Yates's
 * method (Durstenfeld 1964; inside out), or 0, 1, 2, ... without shuffling. */
static inline void sampler_order(uint64_t seed, uint64_t epoch, size_t count, int shuffle, uint32_t *order) {
    uint64_t key = random_key(seed, RANDOM_SHUFFLE, epoch, 0);
    for (size_t i = 0; i < count; i++) {
        size_t j = shuffle ? random_below(key, i, i + 1) : i;
        order[i] = order[j];
        order[j] = (uint32_t)i;
    }
}

/* Which sample of its global batch is sample b of micro-batch m on a rank. Neighbouring samples go to
 * neighbouring ranks, so that a global batch is the same set however it is divided. */
static inline size_t sampler_number(size_t b, size_t m, size_t micro_batches, size_t rank, size_t ranks) {
    return (b * micro_batches + m) * ranks + rank;
}

typedef enum { AUGMENTATION_NONE, AUGMENTATION_BASIC } augmentation;

/* Sample `index` as the model reads it, out[channels][height][width] = (pixel / white - mean) / std (the
 * operations of torchvision's ToTensor and Normalize, in their order). channels is d->channels, or 3 for grey
 * data, which is then repeated. AUGMENTATION_BASIC, for CIFAR-10: crop the size of the image out of the image
 * padded with 4 zero pixels on every side, then mirror it with probability 1/2; for other data sets nothing
 * (a mirrored 2 is no 2). */
static inline void dataset_sample(const dataset *d, size_t index, augmentation how, uint64_t seed,
                                  uint64_t epoch, size_t channels, float *out) {
    const ptrdiff_t height = (ptrdiff_t)d->height, width = (ptrdiff_t)d->width, padding = 4;
    ptrdiff_t down = 0, right = 0; /* where the crop lies in the image */
    int mirror = 0;
    if (how == AUGMENTATION_BASIC && d->kind == DATASET_CIFAR10) {
        uint64_t key = random_key(seed, RANDOM_AUGMENTATION, epoch, index);
        down = (ptrdiff_t)random_below(key, 0, 2 * padding + 1) - padding;
        right = (ptrdiff_t)random_below(key, 1, 2 * padding + 1) - padding;
        mirror = (int)random_below(key, 2, 2);
    }
    for (size_t c = 0; c < channels; c++) {
        const uint8_t *plane = d->pixels + index * dataset_image_size(d);
        if (d->channels > 1) plane += c * d->height * d->width;
        const float white = d->white, mean = d->mean[c], std = d->std[c], black = (0 - mean) / std;
        for (ptrdiff_t y = 0; y < height; y++, out += width) {
            /* Columns [begin, end) of the crop show row `source` of the image, the others padding. */
            ptrdiff_t source = y + down;
            ptrdiff_t begin = right < 0 ? -right : 0, end = right > 0 ? width - right : width;
            if (source < 0 || source >= height) source = begin = end = 0;
            const uint8_t *row = plane + source * width;
            for (ptrdiff_t x = 0; x < begin; x++) out[x] = black;
            for (ptrdiff_t x = begin; x < end; x++) out[x] = ((float)row[x + right] / white - mean) / std;
            for (ptrdiff_t x = end; x < width; x++) out[x] = black;
            for (ptrdiff_t x = 0; mirror && x < width / 2; x++) {
                float left = out[x];
                out[x] = out[width - 1 - x];
                out[width - 1 - x] = left;
            }
        }
    }
}

#endif
