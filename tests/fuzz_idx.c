/* fuzz_idx.c - libFuzzer target: any bytes as an MNIST file, plain or gzip, through the reader that programs
 * use.
 *
 *     clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz_idx.c -o fuzz_idx -lz
 *     ./fuzz_idx --make-corpus DIR        writes valid files to begin from
 *     ./fuzz_idx -max_total_time=600 DIR
 *
 * An accepted file must have the size that its header says and give valid images; a rejected one must give
 * one line of reason. Prints at its end how many inputs were accepted and rejected.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "data/mnist.h"

static size_t accepted, rejected;

__attribute__((destructor)) static void print_counts(void) {
    if (accepted + rejected) fprintf(stderr, "fuzz_idx: %zu accepted, %zu rejected\n", accepted, rejected);
}

/* A file of the given shape with n values behind its header. */
static file_content make_idx(unsigned rank, const size_t shape[3], size_t n) {
    file_content f = {"made", calloc(1, 4 + 4 * rank + n), 4 + 4 * rank + n};
    f.bytes[2] = 8;
    f.bytes[3] = (uint8_t)rank;
    for (unsigned i = 0; i < 4 * rank; i++) f.bytes[4 + i] = (uint8_t)(shape[i / 4] >> (24 - 8 * (i % 4)));
    for (size_t i = 0; i < n; i++) f.bytes[4 + 4 * rank + i] = (uint8_t)(i % 10);
    return f;
}

static void assert_reason(const error_text *e) {
    assert(e->text[0] && strlen(e->text) < sizeof e->text - 1 && !strchr(e->text, '\n'));
}

/* Completes the file with labels, or images, that fit it, and loads the two. */
static void load(const file_content *f, unsigned rank, const idx_array *array) {
    file_content other = rank == 3 ? make_idx(1, (size_t[]){array->count}, array->count)
                                   : make_idx(3, (size_t[]){array->count, 1, 1}, array->count);
    dataset d = {0};
    error_text e = {""};
    if (mnist_parse(&d, rank == 3 ? f : &other, rank == 3 ? &other : f, 1000, &e) == 0) {
        accepted++;
        assert(d.count == (array->count < 1000 ? array->count : 1000));
        assert(rank == 1 || f->size == 16 + array->count * d.height * d.width);
        for (size_t i = 0; i < d.count; i++) assert(d.labels[i] >= 0 && d.labels[i] < 10);
        if (rank == 3) assert(memcmp(d.pixels, array->values, d.count * d.height * d.width) == 0);
    } else {
        rejected++;
        assert(rank == 1); /* a label above 9 is all that can be wrong now */
        assert_reason(&e);
    }
    dataset_free(&d);
    free(other.bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    file_content f = {0};
    idx_array array;
    error_text e = {""};
    int descriptor = memfd_create("fuzz_idx", 0);
    assert(descriptor >= 0 && write(descriptor, bytes, size) == (ssize_t)size);
    snprintf(f.path, sizeof f.path, "/proc/self/fd/%d", descriptor);
    if (file_read(&f, &e) == 0 && idx_parse(&f, 3, &array, &e) == 0) {
        load(&f, 3, &array);
    } else if (f.bytes && idx_parse(&f, 1, &array, &e) == 0) {
        load(&f, 1, &array);
    } else {
        rejected++;
        assert_reason(&e);
    }
    free(f.bytes);
    close(descriptor);
    return 0;
}

/* Images and labels of several sizes, each plain and gzip. */
static int make_corpus(const char *directory) {
    static const size_t shapes[][3] = {{1, 1, 1}, {3, 2, 5}, {10, 8, 8}, {2, 28, 28}, {40, 3, 3}};
    mkdir(directory, 0777);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (unsigned kind = 0; kind < 4; kind++) {
            unsigned rank = kind & 1 ? 3 : 1;
            file_content f =
                make_idx(rank, shapes[i], shapes[i][0] * (rank == 3 ? shapes[i][1] * shapes[i][2] : 1));
            char path[4200];
            snprintf(path, sizeof path, "%s/idx%u-%zu%s", directory, rank, i, kind & 2 ? ".gz" : "");
            gzFile file = gzopen(path, kind & 2 ? "wb" : "wbT"); /* T: as it is */
            int failed = !file || gzwrite(file, f.bytes, (unsigned)f.size) != (int)f.size;
            if (file) failed |= gzclose(file) != Z_OK;
            free(f.bytes);
            if (failed) {
                fprintf(stderr, "fuzz_idx: cannot write %s\n", path);
                return 1;
            }
        }
    return 0;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    if (*argc == 3 && strcmp((*argv)[1], "--make-corpus") == 0) exit(make_corpus((*argv)[2]));
    return 0;
}
