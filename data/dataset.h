/* dataset.h - data sets of images: which one lies in a folder, loading it, the order of its samples, and one
 * sample as the floats that a model reads.
 *
 *     dataset_kind kind;
 *     dataset d;
 *     if (dataset_choose("auto", path, &kind, &e) || dataset_load(&d, kind, path, 1, 0, &e)) ...
 *     sampler_order(seed, epoch, d.count, 1, order);
 *     sample_format format = {.channels = 3, .height = 224, .width = 224, .mean = ..., .std = ...};
 *     if (dataset_sample(&d, &format, order[i], epoch, out, &e)) ...        // float [3, 224, 224]
 *     dataset_free(&d);
 *
 * Order and augmentation are pure functions of seed, epoch and sample: whoever asks, whenever, gets the same.
 * After loading, nothing here writes to a dataset, so threads may share one.
 */
#ifndef DATA_DATASET_H
#define DATA_DATASET_H

#include "data/cifar10.h"
#include "data/decode.h"
#include "data/digits.h"
#include "data/imagefolder.h"
#include "data/mnist.h"
#include "data/transform.h"

/* Tells the kind by the names that lie in the directory; digits where path is NULL. A directory of nothing
 * but folders is an ImageFolder. Fails on a directory that is missing, unreadable, empty, of no known
 * kind, or of more than one. */
static inline int dataset_detect(const char *path, dataset_kind *kind, error_text *e) {
    static const char expected[] = "expected MNIST (train-images-idx3-ubyte, plain or .gz), CIFAR-10 "
                                   "(data_batch_*.bin) or an ImageFolder (train/ and val/)";
    *kind = DATASET_DIGITS;
    if (!path) return 0;
    DIR *directory = opendir(path);
    if (!directory) return error_set(e, "%s: cannot be read: %s, %s", path, strerror(errno), expected);
    size_t entries = 0, folders = 0;
    int mnist = 0, cifar10 = 0, split = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        const char *name = entry->d_name;
        struct stat status;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) continue;
        entries++;
        folders += fstatat(dirfd(directory), name, &status, 0) == 0 && S_ISDIR(status.st_mode);
        mnist |= fnmatch("*-images[-.]idx3-ubyte*", name, 0) == 0;
        cifar10 |= cifar10_is_training(entry) || cifar10_is_validation(entry);
        split |= strcmp(name, "train") == 0 || strcmp(name, "val") == 0;
    }
    closedir(directory);
    if (entries == 0) return error_set(e, "%s: found an empty directory, %s", path, expected);
    if (mnist + cifar10 + split > 1)
        return error_set(e, "%s: found more than one data set, expected one, or to be told which to take",
                         path);
    if (mnist + cifar10 + split == 0 && folders < entries)
        return error_set(e, "%s: found %zu entries, none of a known name, %s", path, entries, expected);
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

/* The train/ or val/ of an ImageFolder; a folder without either is itself a validation set. */
static inline int dataset_load_folder(dataset *d, const char *path, int train, size_t limit, error_text *e) {
    file_content f; /* for its path */
    if (file_path(&f, path, train ? "train" : "val", e)) return -1;
    int split = access(f.path, F_OK) == 0;
    if (!split && !train) { /* an ImageFolder of one part? */
        file_content other;
        if (file_path(&other, path, "train", e)) return -1;
        if (access(other.path, F_OK)) return imagefolder_load(d, path, limit, e);
    }
    return imagefolder_load(d, f.path, limit, e);
}

/* Loads the training (train = 1) or validation (train = 0) images, at most `limit` of them, in their own
 * order; 0 is all. path is not looked at for digits; synthetic data comes from dataset_synthetic. When it
 * fails, d is empty. */
static inline int dataset_load(dataset *d, dataset_kind kind, const char *path, int train, size_t limit,
                               error_text *e) {
    int failed = -1;
    *d = (dataset){0};
    if (limit == 0) limit = SIZE_MAX;
    if (kind == DATASET_SYNTHETIC)
        error_set(e, "data set synthetic is made, not loaded");
    else if (kind == DATASET_DIGITS)
        failed = digits_load(d, train, limit, e);
    else if (!path)
        error_set(e, "data set %s: found no data path, expected its folder", dataset_kind_names[kind]);
    else if (access(path, R_OK | X_OK))
        error_set(e, "%s: cannot be read: %s", path, strerror(errno));
    else if (kind == DATASET_IMAGEFOLDER)
        failed = dataset_load_folder(d, path, train, limit, e);
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
    for (size_t i = 0; t->files && i < t->classes && i < v->classes; i++)
        if (strcmp(t->label_names[i], v->label_names[i]))
            return error_set(e, "imagefolder: found class %s in val/, expected %s as in train/",
                             v->label_names[i], t->label_names[i]);
    if (t->files && t->classes != v->classes)
        return error_set(
            e, "imagefolder: found %zu classes in val/, expected %zu as in train/ (%s is in one)", v->classes,
            t->classes, t->classes > v->classes ? t->label_names[v->classes] : v->label_names[t->classes]);
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

/* ------------------------------------------------------------------------------------------------ samples */

typedef enum { AUGMENTATION_NONE, AUGMENTATION_BASIC } augmentation;

/* What a model reads, and what happens to an image on its way there. */
typedef struct sample_format {
    size_t channels, height, width;
    float mean[3], std[3]; /* of pixel / white for each channel */
    double crop_pct; /* without augmentation: images are made 1 / crop_pct times as large, then cropped */
    resize_filter filter; /* without augmentation */
    int squash;           /* without augmentation: images are resized as a whole, whatever their aspect */
    augmentation how;
    uint64_t seed;
} sample_format;

/* One channel: out [count] = (pixel / white - mean) / std, the operations of torchvision's ToTensor and
 * Normalize in their order. Pixels are `step` bytes apart. */
static inline void normalise_channel(const uint8_t *pixels, size_t step, size_t count, float white,
                                     float mean, float std, float *out) {
    float value[256];
    for (int v = 0; v < 256; v++) value[v] = ((float)v / white - mean) / std;
    for (size_t i = 0; i < count; i++) out[i] = value[pixels[i * step]];
}

/* out [channels][height][width] of an image of the format's size. Grey is repeated for a model of three
 * channels; for a model of one, colours become grey in place as Pillow makes them (ITU-R 601-2, in 16-bit
 * fixed point). */
static inline void sample_normalise(image *from, const sample_format *f, float white, float *out) {
    const size_t count = f->height * f->width, step = from->channels;
    for (size_t i = 0; step == 3 && f->channels == 1 && i < count; i++) {
        uint8_t *p = from->pixels + 3 * i;
        p[0] = (uint8_t)((p[0] * 19595u + p[1] * 38470u + p[2] * 7471u + 0x8000u) >> 16);
    }
    for (size_t c = 0; c < f->channels; c++)
        normalise_channel(from->pixels + (step > 1 ? c : 0), step, count, white, f->mean[c], f->std[c],
                          out + c * count);
}

/* An image as the model of `f` reads it in evaluation: timm's transform (data/transform.h), normalised. */
static inline int sample_of_image(const image *from, const sample_format *f, float *out, error_text *e) {
    image ready = {0};
    if (f->squash ? image_resize(from, f->width, f->height, f->filter, &ready, e)
                  : transform_eval(from, f->width, f->height, f->crop_pct, f->filter, &ready, e))
        return -1;
    sample_normalise(&ready, f, 255, out);
    image_free(&ready);
    return 0;
}

/* Does the augmentation change an image in memory? Of CIFAR-10 alone (a mirrored 2 is no 2). */
static inline int dataset_augments(const dataset *d, augmentation how) {
    return how == AUGMENTATION_BASIC && d->kind == DATASET_CIFAR10;
}

/* Image `index` of a data set in memory. With augmentation: padded with 4 zero pixels on every side,
 * cropped to its size, and mirrored with probability 1/2. */
static inline int dataset_image(const dataset *d, size_t index, augmentation how, uint64_t key, image *out,
                                error_text *e) {
    const ptrdiff_t height = (ptrdiff_t)d->height, width = (ptrdiff_t)d->width, padding = 4;
    ptrdiff_t down = 0, right = 0; /* where the crop lies in the image */
    int mirror = 0;
    if (dataset_augments(d, how)) {
        down = (ptrdiff_t)random_below(key, 0, 2 * padding + 1) - padding;
        right = (ptrdiff_t)random_below(key, 1, 2 * padding + 1) - padding;
        mirror = (int)random_below(key, 2, 2);
    }
    if (image_new(out, d->width, d->height, d->channels, e)) return -1;
    memset(out->pixels, 0, dataset_image_size(d));
    for (size_t c = 0; c < d->channels; c++) {
        const uint8_t *plane = d->pixels + (index * d->channels + c) * d->height * d->width;
        for (ptrdiff_t y = 0; y < height; y++) {
            if (y + down < 0 || y + down >= height) continue;
            const uint8_t *row = plane + (y + down) * width;
            uint8_t *to = out->pixels + (size_t)(y * width) * d->channels + c;
            for (ptrdiff_t x = 0; x < width; x++, to += d->channels) {
                ptrdiff_t from = right + (mirror ? width - 1 - x : x);
                if (from >= 0 && from < width) *to = row[from];
            }
        }
    }
    return 0;
}

/* Sample `index` as the model reads it, float out [channels][height][width]. An image from a file is decoded;
 * with augmentation it is cropped at random and perhaps mirrored, without it goes through the evaluation
 * transform. An image in memory is resized to the model's size as it is, after its augmentation. Fails on a
 * file that is no image; e names it. */
static inline int dataset_sample(const dataset *d, const sample_format *f, size_t index, uint64_t epoch,
                                 float *out, error_text *e) {
    uint64_t key = random_key(f->seed, RANDOM_AUGMENTATION, epoch, index);
    image raw = {0}, ready = {0};
    int failed;
    if (d->files) {
        failed = image_read(&raw, d->files[index], e);
        if (!failed && f->how == AUGMENTATION_NONE) failed = sample_of_image(&raw, f, out, e);
        if (!failed && f->how == AUGMENTATION_BASIC) {
            failed = transform_train(&raw, f->width, f->height, RESIZE_BILINEAR, key, &ready, e);
            if (!failed) sample_normalise(&ready, f, 255, out);
        }
    } else if (d->height == f->height && d->width == f->width && !dataset_augments(d, f->how)) {
        size_t count = d->height * d->width; /* straight from memory: the most frequent case */
        const uint8_t *pixels = d->pixels + index * dataset_image_size(d);
        for (size_t c = 0; c < f->channels; c++)
            normalise_channel(pixels + (d->channels > 1 ? c * count : 0), 1, count, d->white, f->mean[c],
                              f->std[c], out + c * count);
        return 0;
    } else {
        float white = d->white;
        failed = dataset_image(d, index, f->how, key, &raw, e);
        if (!failed && (d->height != f->height || d->width != f->width)) {
            for (size_t i = 0; white != 255 && i < dataset_image_size(d); i++) /* all that a byte can hold */
                raw.pixels[i] = (uint8_t)lrintf((float)raw.pixels[i] * 255 / white);
            white = 255;
            failed = image_resize(&raw, f->width, f->height, f->filter, &ready, e);
        }
        if (!failed) sample_normalise(ready.pixels ? &ready : &raw, f, white, out);
    }
    image_free(&raw);
    image_free(&ready);
    return failed;
}

#endif
