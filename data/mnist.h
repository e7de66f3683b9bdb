/* mnist.h - MNIST and its drop-in replacements in IDX files, plain or gzip:
 *
 *     {train,t10k}-images-idx3-ubyte[.gz]   u32 0x00000803, count, height, width (big-endian); the pixels
 *     {train,t10k}-labels-idx1-ubyte[.gz]   u32 0x00000801, count; the labels, 0 to 9
 *
 * The spelling train-images.idx3-ubyte is accepted too. Format: Y. LeCun, C. Cortes, C. Burges, "The MNIST
 * database of handwritten digits". Left out: IDX files of other element types or ranks.
 */
#ifndef DATA_MNIST_H
#define DATA_MNIST_H

#include <unistd.h>

#include "data/images.h"

typedef struct {
    size_t count, height, width; /* labels: height and width are 1 */
    const uint8_t *values;       /* [count][height][width], inside the file's bytes */
} idx_array;

/* Reads an IDX file of bytes with `rank` dimensions, 1 or 3. Fails on a short header, another magic number, a
 * dimension of 0, and on any number of bytes but the one that the header announces. */
static inline int idx_parse(const file_content *f, unsigned rank, idx_array *array, error_text *e) {
    size_t header = 4 + 4 * rank;
    uint32_t words[4] = {0, 1, 1, 1}; /* the magic number and the shape */
    if (f->size < header)
        return error_set(e, "%s: found %zu bytes, expected an IDX header of %zu", f->path, f->size, header);
    for (size_t i = 0; i < header; i++) words[i / 4] = words[i / 4] << 8 | f->bytes[i];
    if (words[0] != (0x800 | rank))
        return error_set(e, "%s: found magic number 0x%08x, expected 0x%08x", f->path, words[0],
                         0x800 | rank);
    size_t total, found = f->size - header;
    *array = (idx_array){words[1], words[2], words[3], f->bytes + header};
    if (size_multiply(array->count, array->height, &total) || size_multiply(total, array->width, &total) ||
        total != found)
        return error_set(e, "%s: found %zu bytes after the header, expected %zu x %zu x %zu as it says",
                         f->path, found, array->count, array->height, array->width);
    if (total == 0) return error_set(e, "%s: found no values, expected at least one", f->path);
    return 0;
}

/* Puts the first `limit` images and labels into the empty d. All labels are checked, also those beyond. */
static inline int mnist_parse(dataset *d, const file_content *image_file, const file_content *label_file,
                              size_t limit, error_text *e) {
    idx_array images = {0}, labels = {0};
    if (idx_parse(image_file, 3, &images, e) || idx_parse(label_file, 1, &labels, e)) return -1;
    if (images.count != labels.count)
        return error_set(e, "%s: found %zu labels, expected %zu as %s has images", label_file->path,
                         labels.count, images.count, image_file->path);
    for (size_t i = 0; i < labels.count; i++)
        if (labels.values[i] > 9)
            return error_set(e, "%s: label %zu (counted from 0): found %u, expected 0 to 9", label_file->path,
                             i, labels.values[i]);
    *d = (dataset){.kind = DATASET_MNIST,
                   .channels = 1,
                   .height = images.height,
                   .width = images.width,
                   .classes = 10,
                   .white = 255,
                   .mean = {0.1307f, 0.1307f, 0.1307f},
                   .std = {0.3081f, 0.3081f, 0.3081f}};
    if (dataset_grow(d, images.count < limit ? images.count : limit, e)) return -1;
    memcpy(d->pixels, images.values, d->count * dataset_image_size(d));
    for (size_t i = 0; i < d->count; i++) d->labels[i] = labels.values[i];
    return 0;
}

/* Reads "images" (rank 3) or "labels" (rank 1) of a split, "train" or "t10k", under whichever name it has. */
static inline int mnist_read(file_content *f, const char *directory, const char *split, const char *what,
                             int rank, error_text *e) {
    for (int k = 0; k < 4; k++) {
        const char separator = "-."[k & 1], *suffix = k & 2 ? ".gz" : "";
        char name[64];
        snprintf(name, sizeof name, "%s-%s%cidx%d-ubyte%s", split, what, separator, rank, suffix);
        if (file_path(f, directory, name, e)) return -1;
        if (access(f->path, F_OK) == 0) return file_read(f, e);
    }
    return error_set(e, "%s: found no %s-%s-idx%d-ubyte, plain or .gz, expected one", directory, split, what,
                     rank);
}

static inline int mnist_load(dataset *d, const char *directory, int train, size_t limit, error_text *e) {
    const char *split = train ? "train" : "t10k";
    file_content images = {0}, labels = {0};
    int failed = mnist_read(&images, directory, split, "images", 3, e) ||
                 mnist_read(&labels, directory, split, "labels", 1, e) ||
                 mnist_parse(d, &images, &labels, limit, e);
    free(images.bytes);
    free(labels.bytes);
    return failed ? -1 : 0;
}

#endif
