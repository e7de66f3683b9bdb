/* cifar10.h - CIFAR-10, binary version:
 *
 *     data_batch_*.bin    training images: any of them, of any number of records each; in order of name
 *     test_batch.bin      validation images
 *     batches.meta.txt    the ten label names, one a line; may be missing
 *
 * A record is one byte of label, 0 to 9, and 3072 of pixels: 32 x 32 red, then green, then blue, each row by
 * row. Format: A. Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html. Left out: CIFAR-100 (two labels a
 * record).
 */
#ifndef DATA_CIFAR10_H
#define DATA_CIFAR10_H

#include <dirent.h>
#include <fnmatch.h>
#include <unistd.h>

#include "data/images.h"

#define CIFAR10_PIXELS 3072
#define CIFAR10_RECORD (1 + CIFAR10_PIXELS)

/* Mean and standard deviation of the 50,000 training images. */
static inline dataset cifar10_empty(void) {
    return (dataset){.kind = DATASET_CIFAR10,
                     .channels = 3,
                     .height = 32,
                     .width = 32,
                     .classes = 10,
                     .white = 255,
                     .mean = {0.49140f, 0.48216f, 0.44653f},
                     .std = {0.24703f, 0.24349f, 0.26159f}};
}

/* Appends a file's records to d until it holds `limit` images. Fails, with d as it was, on an empty file, a
 * short record, or a label above 9 (also in a record beyond the limit). */
static inline int cifar10_parse(dataset *d, const file_content *f, size_t limit, error_text *e) {
    size_t records = f->size / CIFAR10_RECORD, rest = f->size % CIFAR10_RECORD;
    if (rest || records == 0)
        return error_set(e, "%s: record %zu (counted from 0): found %zu bytes, expected %d", f->path, records,
                         rest, CIFAR10_RECORD);
    for (size_t i = 0; i < records; i++)
        if (f->bytes[i * CIFAR10_RECORD] > 9)
            return error_set(e, "%s: record %zu (counted from 0): found label %u, expected 0 to 9", f->path,
                             i, f->bytes[i * CIFAR10_RECORD]);
    size_t first = d->count, room = limit - first;
    if (dataset_grow(d, records < room ? records : room, e)) return -1;
    for (size_t i = first; i < d->count; i++) {
        const uint8_t *record = f->bytes + (i - first) * CIFAR10_RECORD;
        d->labels[i] = record[0];
        memcpy(d->pixels + i * CIFAR10_PIXELS, record + 1, CIFAR10_PIXELS);
    }
    return 0;
}

/* Takes the label names from the lines of batches.meta.txt; empty lines do not count. */
static inline int cifar10_parse_names(dataset *d, const file_content *f, error_text *e) {
    size_t names = 0;
    if (dataset_number_labels(d, e)) return -1;
    for (size_t begin = 0, end; begin < f->size; begin = end + 1) {
        for (end = begin; end < f->size && f->bytes[end] != '\n'; end++) {}
        size_t length = end - begin - (end > begin && f->bytes[end - 1] == '\r');
        if (length == 0) continue;
        if (length >= sizeof d->label_names[0])
            return error_set(e, "%s: label name %zu: found %zu bytes, expected less than %zu", f->path, names,
                             length, sizeof d->label_names[0]);
        if (names < d->classes) {
            memcpy(d->label_names[names], f->bytes + begin, length);
            d->label_names[names][length] = 0;
        }
        names++;
    }
    if (names != d->classes)
        return error_set(e, "%s: found %zu label names, expected %zu", f->path, names, d->classes);
    return 0;
}

static inline int cifar10_is_training(const struct dirent *entry) {
    return fnmatch("data_batch_*.bin", entry->d_name, 0) == 0;
}

static inline int cifar10_is_validation(const struct dirent *entry) {
    return strcmp(entry->d_name, "test_batch.bin") == 0;
}

static inline int cifar10_by_name(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* The first `limit` images; files beyond the limit are not opened. */
static inline int cifar10_load(dataset *d, const char *directory, int train, size_t limit, error_text *e) {
    struct dirent **entries;
    file_content f;
    int failed = 0;
    int (*wanted)(const struct dirent *) = train ? cifar10_is_training : cifar10_is_validation;
    int files = scandir(directory, &entries, wanted, cifar10_by_name);
    if (files < 0) return error_set(e, "%s: cannot be read: %s", directory, strerror(errno));
    *d = cifar10_empty();
    for (int i = 0; i < files; i++) {
        if (!failed && d->count < limit) {
            failed = file_path(&f, directory, entries[i]->d_name, e) || file_read(&f, e) ||
                     cifar10_parse(d, &f, limit, e);
            free(f.bytes);
        }
        free(entries[i]);
    }
    free(entries);
    if (failed) return -1;
    if (files == 0)
        return error_set(e, "%s: found no %s, expected at least one", directory,
                         train ? "data_batch_*.bin" : "test_batch.bin");
    if (file_path(&f, directory, "batches.meta.txt", e)) return -1;
    if (access(f.path, F_OK)) return 0;
    failed = file_read(&f, e) || cifar10_parse_names(d, &f, e);
    free(f.bytes);
    return failed ? -1 : 0;
}

#endif
