/* images.h - labelled images in memory: the struct that all formats load into, and the reading of whole
 * files.
 *
 * A format's loader fills in the sizes, then adds images, in one go or file by file:
 *
 *     *d = (dataset){.kind = DATASET_MNIST, .channels = 1, .height = 28, .width = 28, .classes = 10, ...};
 *     if (dataset_grow(d, count, e)) return -1;     // room for count more pixels and labels
 *
 * Programs include dataset.h, which knows all formats. Pixels stay bytes until a sample is drawn: the whole
 * of CIFAR-10 is 180 MB. Of an ImageFolder only the names are held, and the sizes differ.
 */
#ifndef DATA_IMAGES_H
#define DATA_IMAGES_H

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "base.h"

typedef enum {
    DATASET_DIGITS,
    DATASET_MNIST,
    DATASET_CIFAR10,
    DATASET_IMAGEFOLDER,
    DATASET_SYNTHETIC,
    DATASET_KINDS
} dataset_kind;

static const char *const dataset_kind_names[DATASET_KINDS] = {"digits", "mnist", "cifar10", "imagefolder",
                                                              "synthetic"};

typedef struct {
    dataset_kind kind;
    size_t count, channels, height, width, classes; /* height and width 0: each image has its own */
    uint8_t *pixels;                                /* [count][channels][height][width], or NULL */
    char **files;             /* [count] of an ImageFolder: where the images are, or NULL */
    int32_t *labels;          /* [count], each in [0, classes) */
    char (*label_names)[256]; /* [classes] */
    float white;              /* the pixel value that stands for 1 */
    float mean[3], std[3];    /* of pixel / white for each channel of the model's input; all alike for grey */
} dataset;

static inline void dataset_free(dataset *d) {
    for (size_t i = 0; d->files && i < d->count; i++) free(d->files[i]);
    free(d->files);
    free(d->pixels);
    free(d->labels);
    free(d->label_names);
    *d = (dataset){0};
}

/* Bytes of one image, channels x height x width. */
static inline size_t dataset_image_size(const dataset *d) { return d->channels * d->height * d->width; }

/* Makes room for `more` images behind those that are there and counts them in; their pixels and labels are
 * the caller's to write. Fails, leaving d as it was, when the size overflows or memory runs out. */
static inline int dataset_grow(dataset *d, size_t more, error_text *e) {
    size_t count = d->count + more, image, bytes, label_bytes;
    if (count < more || size_multiply(d->channels, d->height, &image) ||
        size_multiply(image, d->width, &image) || size_multiply(image, count, &bytes) ||
        size_multiply(count, sizeof *d->labels, &label_bytes))
        return error_set(e, "%s: found %zu images of %zu x %zu x %zu, expected fewer than 2^64 bytes",
                         dataset_kind_names[d->kind], count, d->channels, d->height, d->width);
    uint8_t *pixels = realloc(d->pixels, bytes);
    if (pixels) d->pixels = pixels;
    int32_t *labels = realloc(d->labels, label_bytes);
    if (labels) d->labels = labels;
    if (!pixels || !labels)
        return error_set(e, "%s: out of memory for %zu images (%zu bytes)", dataset_kind_names[d->kind],
                         count, bytes);
    d->count = count;
    return 0;
}

/* Allocates label_names and calls each class by its number. */
static inline int dataset_number_labels(dataset *d, error_text *e) {
    d->label_names = calloc(d->classes, sizeof *d->label_names);
    if (!d->label_names) return error_set(e, "out of memory for %zu label names", d->classes);
    for (size_t i = 0; i < d->classes; i++) snprintf(d->label_names[i], sizeof d->label_names[i], "%zu", i);
    return 0;
}

/* A whole file. Parsers take it instead of a path, so that tests and fuzzers can feed them memory. */
typedef struct {
    char path[4096];
    uint8_t *bytes; /* the caller frees it */
    size_t size;
} file_content;

/* An empty content with the path directory/name. */
static inline int file_path(file_content *f, const char *directory, const char *name, error_text *e) {
    f->bytes = NULL;
    f->size = 0;
    if (snprintf(f->path, sizeof f->path, "%s/%s", directory, name) < (int)sizeof f->path) return 0;
    return error_set(e, "%s: found a path of %zu bytes or more", name, sizeof f->path);
}

/* Reads the file at f->path whole, gzip or plain (told by its content, by zlib). Memory grows as data
 * arrives, whatever a header may claim. Fails on what cannot be opened or read, and on truncated or corrupt
 * gzip data; bytes is then NULL. Bytes behind a complete gzip stream are passed over, as gzip does. */
static inline int file_read(file_content *f, error_text *e) {
    errno = 0;
    gzFile file = gzopen(f->path, "rb");
    if (!file)
        return error_set(e, "%s: cannot be opened: %s", f->path, errno ? strerror(errno) : "out of memory");
    size_t room = 0;
    int got, status;
    do {
        if (f->size == room) {
            room = room ? 2 * room : 1 << 16;
            uint8_t *larger = realloc(f->bytes, room);
            if (!larger) {
                got = -1;
                break;
            }
            f->bytes = larger;
        }
        size_t wanted = room - f->size < 1 << 30 ? room - f->size : 1 << 30; /* gzread counts in int */
        got = gzread(file, f->bytes + f->size, (unsigned)wanted);
        if (got > 0) f->size += (size_t)got;
    } while (got > 0);
    const char *message = gzerror(file, &status); /* begins with the path; tells of a truncated file too */
    int failed = 0;
    if (status != Z_OK)
        failed = error_set(e, "%s, expected a whole file, plain or gzip", message);
    else if (got < 0)
        failed = error_set(e, "%s: out of memory after %zu bytes", f->path, f->size);
    if (failed) {
        free(f->bytes);
        f->bytes = NULL;
        f->size = 0;
    }
    gzclose(file);
    return failed;
}

#endif
