/* test_data.c - data sets, sampler and augmentation.
 *
 * Expected numbers come from elsewhere: counts and sums from numpy reading the same data (scikit-learn's
 * load_digits, the original MNIST and CIFAR-10 files), normalised pixels from torchvision, crops from a naive
 * oracle that enumerates all of them. Bad files are written by hand, one fault each. Real MNIST and CIFAR-10
 * are read from mnist/ and cifar-10-batches-bin/ under the environment variable DATA_DIR, where it is set.
 */
#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <stdarg.h>
#include <sys/stat.h>

#include "data/dataset.h"

#include <cmocka.h>

#include "tests/files.h"

/* A directory of its own for each test, removed at its end with the files in it. */
static int make_directory(void **state) {
    char template[] = "/tmp/test_data_XXXXXX";
    if (!mkdtemp(template)) return -1;
    *state = strdup(template);
    return 0;
}

static int remove_directory(void **state) {
    int failed = remove_tree(*state);
    free(*state);
    return failed;
}

static void write_file(const char *directory, const char *name, const void *bytes, size_t size) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static void write_gzip(const char *directory, const char *name, const void *bytes, size_t size) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    gzFile file = gzopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(gzwrite(file, bytes, (unsigned)size), size);
    assert_int_equal(gzclose(file), Z_OK);
}

static void remove_file(const char *directory, const char *name) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    assert_int_equal(remove(path), 0);
}

static void assert_empty(const dataset *d) {
    static const dataset empty;
    assert_memory_equal(d, &empty, sizeof empty);
}

/* ---- digits ---- */

static void digits_are_those_of_scikit_learn(void **state) {
    (void)state;
    /* numpy, over load_digits().images[index % 5 == 4] and [index % 5 != 4]: bincount(target), the sum of all
     * pixels, the same weighted by 1, 2, .. along the image, then by 1, 2, .. along the images, and the
     * labels weighted likewise. */
    static const struct {
        size_t count, classes[10], sum, by_place, by_image, labels;
    } expected[2] = {
        {359, {27, 21, 34, 52, 34, 28, 31, 43, 47, 42}, 111414, 3612937, 20042065, 310763},
        {1438, {151, 161, 143, 131, 147, 154, 150, 136, 127, 138}, 450304, 14609434, 323180521, 4578398}};
    static const uint8_t first[64] = {0, 0, 5,  13, 9,  1,  0, 0, 0, 0, 13, 15, 10, 15, 5, 0,
                                      0, 3, 15, 2,  0,  11, 8, 0, 0, 4, 12, 0,  0,  8,  8, 0,
                                      0, 5, 8,  0,  0,  9,  8, 0, 0, 4, 11, 0,  1,  12, 7, 0,
                                      0, 2, 14, 5,  10, 12, 0, 0, 0, 0, 6,  13, 10, 0,  0, 0};
    for (int train = 0; train < 2; train++) {
        dataset d;
        error_text e;
        assert_int_equal(dataset_load(&d, DATASET_DIGITS, NULL, train, 0, &e), 0);
        assert_int_equal(d.count, expected[train].count);
        assert_int_equal(d.channels, 1);
        assert_int_equal(d.height, 8);
        assert_int_equal(d.width, 8);
        assert_int_equal(d.classes, 10);
        size_t classes[10] = {0}, sum = 0, by_place = 0, by_image = 0, labels = 0;
        double squares = 0;
        for (size_t i = 0; i < d.count; i++) {
            classes[d.labels[i]]++;
            labels += (size_t)d.labels[i] * (i + 1);
            for (size_t p = 0; p < 64; p++) {
                size_t pixel = d.pixels[i * 64 + p];
                assert_true(pixel <= 16);
                sum += pixel, by_place += pixel * (p + 1), by_image += pixel * (i + 1);
                squares += (double)(pixel * pixel) / 256;
            }
        }
        assert_memory_equal(classes, expected[train].classes, sizeof classes);
        assert_int_equal(sum, expected[train].sum);
        assert_int_equal(by_place, expected[train].by_place);
        assert_int_equal(by_image, expected[train].by_image);
        assert_int_equal(labels, expected[train].labels);
        assert_string_equal(d.label_names[7], "7");
        if (train) {
            double n = (double)d.count * 64, mean = (double)sum / 16 / n,
                   std = sqrt(squares / n - mean * mean);
            assert_memory_equal(d.pixels, first, sizeof first);
            for (int c = 0; c < 3; c++) {
                assert_float_equal(d.mean[c], mean, 1e-6);
                assert_float_equal(d.std[c], std, 1e-6);
            }
        }
        dataset_free(&d);
        assert_empty(&d);
    }
}

static void limit_keeps_the_first_images(void **state) {
    (void)state;
    dataset all, some;
    error_text e;
    assert_int_equal(dataset_load(&all, DATASET_DIGITS, NULL, 1, 0, &e), 0);
    assert_int_equal(dataset_load(&some, DATASET_DIGITS, NULL, 1, 100, &e), 0);
    assert_int_equal(some.count, 100);
    assert_memory_equal(some.pixels, all.pixels, 100 * 64);
    assert_memory_equal(some.labels, all.labels, 100 * sizeof(int32_t));
    dataset_free(&some);
    assert_int_equal(dataset_load(&some, DATASET_DIGITS, NULL, 1, 1000000, &e), 0);
    assert_int_equal(some.count, all.count);
    dataset_free(&some);
    dataset_free(&all);
}

/* ---- which data set ---- */

static void detection_tells_the_kind_by_file_names(void **state) {
    static const struct {
        const char *file;
        dataset_kind kind;
    } cases[] = {{"train-images-idx3-ubyte", DATASET_MNIST},
                 {"train-images-idx3-ubyte.gz", DATASET_MNIST},
                 {"train-images.idx3-ubyte", DATASET_MNIST},
                 {"t10k-images-idx3-ubyte.gz", DATASET_MNIST},
                 {"data_batch_1.bin", DATASET_CIFAR10},
                 {"data_batch_12.bin", DATASET_CIFAR10},
                 {"test_batch.bin", DATASET_CIFAR10},
                 {"train", DATASET_IMAGEFOLDER},
                 {"val", DATASET_IMAGEFOLDER}};
    dataset_kind kind;
    error_text e;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_file(*state, "README", "", 0);
        write_file(*state, cases[i].file, "", 0);
        assert_int_equal(dataset_detect(*state, &kind, &e), 0);
        assert_int_equal(kind, cases[i].kind);
        assert_int_equal(dataset_choose("auto", *state, &kind, &e), 0);
        assert_int_equal(kind, cases[i].kind);
        remove_file(*state, cases[i].file);
    }
    assert_int_equal(dataset_detect(NULL, &kind, &e), 0);
    assert_int_equal(kind, DATASET_DIGITS);
}

static void data_sets_are_chosen_by_name(void **state) {
    (void)state;
    static const char *const names[] = {"digits", "mnist", "cifar10", "imagefolder", "synthetic"};
    dataset_kind kind;
    error_text e;
    for (int i = 0; i < 5; i++) {
        assert_int_equal(dataset_choose(names[i], "/nowhere", &kind, &e), 0);
        assert_int_equal(kind, i);
        assert_string_equal(dataset_kind_names[kind], names[i]);
    }
    assert_int_equal(dataset_choose("imagenet", NULL, &kind, &e), -1);
    assert_message(&e, "imagenet", "expected", "cifar10", NULL);
}

static void detection_refuses_what_it_cannot_tell(void **state) {
    char missing[512], file[512];
    dataset_kind kind;
    error_text e;
    snprintf(missing, sizeof missing, "%s/missing", (char *)*state);
    assert_int_equal(dataset_detect(missing, &kind, &e), -1);
    assert_message(&e, missing, "No such file", "expected", NULL);
    assert_int_equal(dataset_detect(*state, &kind, &e), -1);
    assert_message(&e, *state, "empty directory", "expected", NULL);
    write_file(*state, "notes.txt", "x", 1);
    assert_int_equal(dataset_detect(*state, &kind, &e), -1);
    assert_message(&e, *state, "1 entries", "expected", NULL);
    snprintf(file, sizeof file, "%s/notes.txt", (char *)*state);
    assert_int_equal(dataset_detect(file, &kind, &e), -1);
    assert_message(&e, file, "Not a directory", NULL);
    write_file(*state, "test_batch.bin", "", 0);
    write_file(*state, "train-images-idx3-ubyte", "", 0);
    assert_int_equal(dataset_detect(*state, &kind, &e), -1);
    assert_message(&e, *state, "more than one", NULL);
}

static void unreadable_folders_are_refused(void **state) {
    if (geteuid() == 0) {
        print_message("running as root, whom no folder refuses\n");
        skip();
    }
    dataset_kind kind;
    dataset d;
    error_text e;
    assert_int_equal(chmod(*state, 0), 0);
    int detected = dataset_detect(*state, &kind, &e),
        loaded = dataset_load(&d, DATASET_MNIST, *state, 1, 0, &e);
    assert_int_equal(chmod(*state, 0700), 0);
    assert_int_equal(detected, -1);
    assert_int_equal(loaded, -1);
    assert_message(&e, *state, "Permission denied", NULL);
}

static void loading_refuses_bad_paths_and_kinds(void **state) {
    char missing[512], *long_path = malloc(5001);
    dataset d;
    error_text e;
    snprintf(missing, sizeof missing, "%s/missing", (char *)*state);
    memset(long_path, '/', 5000);
    long_path[5000] = 0;
    for (dataset_kind kind = DATASET_MNIST; kind <= DATASET_CIFAR10; kind++)
        for (int train = 0; train < 2; train++) {
            assert_int_equal(dataset_load(&d, kind, NULL, train, 0, &e), -1);
            assert_message(&e, dataset_kind_names[kind], "no data path", NULL);
            assert_int_equal(dataset_load(&d, kind, missing, train, 0, &e), -1);
            assert_message(&e, missing, "No such file", NULL);
            assert_int_equal(dataset_load(&d, kind, *state, train, 0, &e), -1);
            assert_message(&e, *state, "found no ", "expected", NULL);
            assert_int_equal(dataset_load(&d, kind, long_path, train, 0, &e), -1);
            assert_empty(&d);
        }
    assert_int_equal(dataset_load(&d, DATASET_IMAGEFOLDER, *state, 1, 0, &e), -1);
    assert_message(&e, *state, "train: cannot be read", NULL);
    assert_int_equal(dataset_load(&d, DATASET_SYNTHETIC, *state, 1, 0, &e), -1);
    assert_message(&e, "synthetic", NULL);
    free(long_path);
}

/* ---- MNIST ---- */

enum { MINI_COUNT = 5, MINI_HEIGHT = 3, MINI_WIDTH = 4 };

typedef struct {
    uint8_t images[16 + MINI_COUNT * MINI_HEIGHT * MINI_WIDTH], labels[8 + MINI_COUNT];
} mini_mnist;

static mini_mnist make_mnist(void) {
    mini_mnist m = {.images = {0, 0, 8, 3, 0, 0, 0, MINI_COUNT, 0, 0, 0, MINI_HEIGHT, 0, 0, 0, MINI_WIDTH},
                    .labels = {0, 0, 8, 1, 0, 0, 0, MINI_COUNT, 3, 1, 4, 1, 9}};
    for (size_t i = 16; i < sizeof m.images; i++) m.images[i] = (uint8_t)(i * 37);
    return m;
}

static void assert_mnist(const char *directory, int train) {
    mini_mnist m = make_mnist();
    for (size_t limit = 0; limit <= MINI_COUNT + 1; limit++) {
        size_t count = limit == 0 || limit > MINI_COUNT ? MINI_COUNT : limit;
        dataset d;
        error_text e;
        if (dataset_load(&d, DATASET_MNIST, directory, train, limit, &e)) fail_msg("%s", e.text);
        assert_int_equal(d.count, count);
        assert_int_equal(d.channels, 1);
        assert_int_equal(d.height, MINI_HEIGHT);
        assert_int_equal(d.width, MINI_WIDTH);
        assert_memory_equal(d.pixels, m.images + 16, count * MINI_HEIGHT * MINI_WIDTH);
        for (size_t i = 0; i < count; i++) assert_int_equal(d.labels[i], m.labels[8 + i]);
        assert_string_equal(d.label_names[9], "9");
        dataset_free(&d);
    }
}

static void mnist_is_read_plain_and_gzip_under_both_spellings(void **state) {
    mini_mnist m = make_mnist();
    static const char *const names[][2] = {{"train-images-idx3-ubyte", "train-labels-idx1-ubyte"},
                                           {"train-images.idx3-ubyte", "train-labels.idx1-ubyte"},
                                           {"t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"},
                                           {"t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"}};
    for (int i = 0; i < 4; i++)
        for (int gzip = 0; gzip < 4; gzip++) { /* of neither file, one, the other, both */
            char name[2][64];
            for (int k = 0; k < 2; k++) {
                snprintf(name[k], sizeof name[k], "%s%s", names[i][k], gzip >> k & 1 ? ".gz" : "");
                (gzip >> k & 1 ? write_gzip : write_file)(*state, name[k], k ? m.labels : m.images,
                                                          k ? sizeof m.labels : sizeof m.images);
            }
            assert_mnist(*state, i < 2);
            remove_file(*state, name[0]);
            remove_file(*state, name[1]);
        }
    /* gzip is told by the content, not by the name */
    write_gzip(*state, "train-images-idx3-ubyte", m.images, sizeof m.images);
    write_file(*state, "train-labels-idx1-ubyte.gz", m.labels, sizeof m.labels);
    assert_mnist(*state, 1);
}

static void mnist_refuses_each_bad_file(void **state) {
    const size_t images = sizeof make_mnist().images, labels = sizeof make_mnist().labels;
    /* Images (file 0) or labels (file 1) lose `cut` bytes at the end or gain some, then byte `at` is set. */
    static const struct {
        int file, cut;
        size_t at;
        uint8_t value;
        const char *found, *expected;
    } cases[] = {
        {0, 0, 2, 9, "0x00000903", "0x00000803"},         {0, 0, 3, 1, "0x00000801", "0x00000803"},
        {1, 0, 3, 3, "0x00000803", "0x00000801"},         {0, 0, 0, 1, "0x01000803", "0x00000803"},
        {0, 0, 7, 6, "found 60 bytes", "6 x 3 x 4"},      /* one image more than there is */
        {0, 0, 7, 4, "found 60 bytes", "4 x 3 x 4"},      /* one less: trailing bytes */
        {0, 0, 4, 255, "found 60 bytes", "4278190085 x"}, /* billions */
        {0, 0, 8, 255, "found 60 bytes", "x 4278190083"}, {0, 1, 0, 0, "found 59 bytes", "5 x 3 x 4"},
        {0, -1, 0, 0, "found 61 bytes", "5 x 3 x 4"},     {0, 60, 0, 0, "found 0 bytes", "5 x 3 x 4"},
        {0, 61, 0, 0, "found 15 bytes", "header of 16"},  {0, 76, 0, 0, "found 0 bytes", "header of 16"},
        {0, 60, 7, 0, "no values", "at least one"},       {1, 1, 7, 4, "found 4 labels", "expected 5"},
        {1, -1, 7, 6, "found 6 labels", "expected 5"},    {1, 1, 0, 0, "found 4 bytes", "5 x 1 x 1"},
        {1, -1, 0, 0, "found 6 bytes", "5 x 1 x 1"},      {1, 0, 4, 255, "found 5 bytes", "4278190085 x"},
        {1, 6, 0, 0, "found 7 bytes", "header of 8"},     {1, 0, 11, 10, "label 3 ", "0 to 9"},
        {1, 0, 12, 255, "found 255", "0 to 9"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int gzip = 0; gzip < 2; gzip++) {
            mini_mnist m = make_mnist();
            uint8_t bytes[2][128] = {{0}};
            size_t sizes[2] = {images, labels};
            char *suffix = gzip ? ".gz" : "", names[2][64];
            memcpy(bytes[0], m.images, images);
            memcpy(bytes[1], m.labels, labels);
            sizes[cases[i].file] -= (size_t)cases[i].cut;
            bytes[cases[i].file][cases[i].at] = cases[i].value;
            for (int k = 0; k < 2; k++) {
                snprintf(names[k], sizeof names[k], "train-%s-ubyte%s", k ? "labels-idx1" : "images-idx3",
                         suffix);
                (gzip ? write_gzip : write_file)(*state, names[k], bytes[k], sizes[k]);
            }
            dataset d;
            error_text e;
            if (dataset_load(&d, DATASET_MNIST, *state, 1, 1, &e) != -1)
                fail_msg("case %zu was accepted: %s, %s", i, cases[i].found, cases[i].expected);
            assert_message(&e, *state, names[cases[i].file], cases[i].found, cases[i].expected, NULL);
            assert_empty(&d);
            remove_file(*state, names[0]);
            remove_file(*state, names[1]);
        }
}

static void mnist_refuses_missing_files(void **state) {
    mini_mnist m = make_mnist();
    dataset d;
    error_text e;
    write_file(*state, "train-images-idx3-ubyte", m.images, sizeof m.images);
    assert_int_equal(dataset_load(&d, DATASET_MNIST, *state, 1, 0, &e), -1);
    assert_message(&e, *state, "found no train-labels-idx1-ubyte", NULL);
    assert_int_equal(dataset_load(&d, DATASET_MNIST, *state, 0, 0, &e), -1);
    assert_message(&e, *state, "found no t10k-images-idx3-ubyte", NULL);
    char path[512];
    snprintf(path, sizeof path, "%s/train-labels-idx1-ubyte", (char *)*state);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(dataset_load(&d, DATASET_MNIST, *state, 1, 0, &e), -1);
    assert_message(&e, path, "Is a directory", NULL);
}

static void damaged_gzip_is_refused(void **state) {
    mini_mnist m = make_mnist();
    char path[512];
    uint8_t whole[512];
    dataset d;
    error_text e;
    write_file(*state, "train-labels-idx1-ubyte", m.labels, sizeof m.labels);
    write_gzip(*state, "train-images-idx3-ubyte.gz", m.images, sizeof m.images);
    snprintf(path, sizeof path, "%s/train-images-idx3-ubyte.gz", (char *)*state);
    FILE *file = fopen(path, "rb");
    size_t size = fread(whole, 1, sizeof whole, file);
    fclose(file);
    assert_mnist(*state, 1);
    for (size_t length = 0; length < size; length++) { /* truncated at every byte */
        write_file(*state, "train-images-idx3-ubyte.gz", whole, length);
        assert_int_equal(dataset_load(&d, DATASET_MNIST, *state, 1, 0, &e), -1);
        assert_message(&e, path, length >= 2 ? "unexpected end of file" : "IDX header", "expected", NULL);
        assert_empty(&d);
    }
    for (size_t i = 0; i < size; i++) { /* one byte wrong; bytes 4 to 9 are time, flags and system */
        if (i >= 4 && i <= 9) continue;
        whole[i] ^= 0x55;
        write_file(*state, "train-images-idx3-ubyte.gz", whole, size);
        assert_int_equal(dataset_load(&d, DATASET_MNIST, *state, 1, 0, &e), -1);
        assert_message(&e, path, "expected", NULL);
        whole[i] ^= 0x55;
    }
    whole[size - 6] ^= 1; /* the check sum */
    write_file(*state, "train-images-idx3-ubyte.gz", whole, size);
    assert_int_equal(dataset_load(&d, DATASET_MNIST, *state, 1, 0, &e), -1);
    assert_message(&e, path, "incorrect data check", NULL);
}

static void headers_may_claim_more_than_memory_holds(void **state) {
    /* 2^60 bytes, which no allocator gives: a reader that believed the header would fail in another way. The
     * other product is 2^64, which in a size_t would be the 0 that follows. */
    static const struct {
        uint8_t bytes[17];
        size_t size;
        const char *found, *expected;
    } claims[] = {
        {{0, 0, 8, 3, 64, 0, 0, 0, 0, 1, 0, 0, 0, 0, 64, 0, 7}, 17, "found 1 bytes", "x 65536 x 16384"},
        {{0, 0, 8, 3, 64, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 16}, 16, "found 0 bytes", "x 1073741824 x 16"}};
    mini_mnist m = make_mnist();
    dataset d;
    error_text e;
    write_file(*state, "train-labels-idx1-ubyte", m.labels, sizeof m.labels);
    for (int i = 0; i < 2; i++)
        for (int gzip = 0; gzip < 2; gzip++) {
            (gzip ? write_gzip : write_file)(*state, "train-images-idx3-ubyte", claims[i].bytes,
                                             claims[i].size);
            assert_int_equal(dataset_load(&d, DATASET_MNIST, *state, 1, 0, &e), -1);
            assert_message(&e, claims[i].found, claims[i].expected, NULL);
            assert_empty(&d);
        }
}

static void a_train_set_and_another_shape_do_not_go_together(void **state) {
    (void)state;
    dataset a = {.channels = 1, .height = 28, .width = 28, .classes = 10}, b = a;
    error_text e;
    assert_int_equal(dataset_same_shape(&a, &b, &e), 0);
    size_t *sizes[] = {&b.channels, &b.height, &b.width, &b.classes};
    for (int i = 0; i < 4; i++) {
        *sizes[i] += 1;
        assert_int_equal(dataset_same_shape(&a, &b, &e), -1);
        assert_message(&e, "1 x 28 x 28 in 10", NULL);
        *sizes[i] -= 1;
    }
}

/* ---- CIFAR-10 ---- */

enum { RECORD = 3073 };

/* Records with label first, first + 1, ... modulo 10; their pixel p is label * 20 + p % 7 + p / 1024. */
static void make_records(uint8_t *bytes, size_t count, size_t first) {
    for (size_t i = 0; i < count; i++) {
        size_t label = (first + i) % 10;
        bytes[i * RECORD] = (uint8_t)label;
        for (size_t p = 0; p < 3072; p++)
            bytes[i * RECORD + 1 + p] = (uint8_t)(label * 20 + p % 7 + p / 1024);
    }
}

static void assert_records(const dataset *d, size_t count, const int32_t *labels) {
    assert_int_equal(d->count, count);
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(d->labels[i], labels[i]);
        for (size_t p = 0; p < 3072; p++)
            if (d->pixels[i * 3072 + p] != (uint8_t)((size_t)labels[i] * 20 + p % 7 + p / 1024))
                fail_msg("image %zu, pixel %zu", i, p);
    }
}

static void cifar10_reads_any_batches_in_order_of_name(void **state) {
    static uint8_t bytes[8 * RECORD];
    static const int32_t labels[] = {7, 8, 9, 0, 3}; /* of data_batch_10 (3 records), _2 (1), _x (1) */
    dataset d;
    error_text e;
    make_records(bytes, 8, 3);
    write_file(*state, "data_batch_x.bin", bytes, RECORD);
    write_file(*state, "data_batch_10.bin", bytes + 4 * RECORD, 3 * RECORD);
    write_file(*state, "data_batch_2.bin", bytes + 7 * RECORD, RECORD);
    write_file(*state, "data_batch_2.bin.part", "x", 1);
    write_file(*state, "test_batch.bin", bytes, 2 * RECORD);
    for (size_t limit = 0; limit <= 6; limit++) {
        size_t count = limit == 0 || limit > 5 ? 5 : limit;
        assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 1, limit, &e), 0);
        assert_records(&d, count, labels);
        assert_string_equal(d.label_names[3], "3");
        dataset_free(&d);
    }
    assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 0, 0, &e), 0);
    assert_records(&d, 2, (int32_t[]){3, 4});
    dataset_free(&d);
    write_file(*state, "data_batch_y.bin", "short", 5); /* the limit is reached before this file is opened */
    assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 1, 5, &e), 0);
    dataset_free(&d);
    assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 1, 0, &e), -1);
    assert_message(&e, "data_batch_y.bin", NULL);
}

static void cifar10_takes_label_names_from_the_meta_file(void **state) {
    static uint8_t bytes[RECORD];
    static const char unix_names[] =
        "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n";
    static const char dos_names[] =
        "airplane\r\nautomobile\r\nbird\r\ncat\r\ndeer\r\ndog\r\nfrog\r\nhorse\r\nship\r\ntruck";
    dataset d;
    error_text e;
    write_file(*state, "test_batch.bin", bytes, RECORD);
    for (int dos = 0; dos < 2; dos++) {
        write_file(*state, "batches.meta.txt", dos ? dos_names : unix_names,
                   dos ? sizeof dos_names - 1 : sizeof unix_names - 1);
        assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 0, 0, &e), 0);
        assert_string_equal(d.label_names[0], "airplane");
        assert_string_equal(d.label_names[3], "cat");
        assert_string_equal(d.label_names[9], "truck");
        dataset_free(&d);
    }
    static const struct {
        size_t size;
        const char *found;
    } cases[] = {{0, "found 0 label names"}, {20, "found 2 label names"}, {300, "found 300 bytes"}};
    for (int i = 0; i < 3; i++) {
        char text[300];
        memset(text, 'x', sizeof text);
        write_file(*state, "batches.meta.txt", i == 2 ? text : unix_names, cases[i].size);
        assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 0, 0, &e), -1);
        assert_message(&e, "batches.meta.txt", cases[i].found, "expected", NULL);
        assert_empty(&d);
    }
    write_file(*state, "batches.meta.txt", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk\n", 22);
    assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 0, 0, &e), -1);
    assert_message(&e, "found 11 label names", "expected 10", NULL);
}

static void cifar10_refuses_each_bad_file(void **state) {
    static const struct {
        size_t size, at;
        uint8_t value;
        const char *record, *found, *expected;
    } cases[] = {{3 * RECORD - 1, 0, 0, "record 2 ", "found 3072 bytes", "3073"},
                 {2 * RECORD + 1, 0, 0, "record 2 ", "found 1 bytes", "3073"},
                 {RECORD - 1, 0, 0, "record 0 ", "found 3072 bytes", "3073"},
                 {0, 0, 0, "record 0 ", "found 0 bytes", "3073"},
                 {3 * RECORD, 0, 10, "record 0 ", "found label 10", "0 to 9"},
                 {3 * RECORD, 2 * RECORD, 255, "record 2 ", "found label 255", "0 to 9"}};
    static uint8_t bytes[3 * RECORD];
    dataset d;
    error_text e;
    for (int train = 0; train < 2; train++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            const char *name = train ? "data_batch_2.bin" : "test_batch.bin";
            make_records(bytes, 3, 0);
            write_file(*state, "data_batch_1.bin", bytes, RECORD); /* a good file before the bad one */
            bytes[cases[i].at] = cases[i].value;
            write_file(*state, name, bytes, cases[i].size);
            assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, train, 2, &e), -1);
            assert_message(&e, *state, name, cases[i].record, cases[i].found, cases[i].expected, NULL);
            assert_empty(&d);
        }
    char path[512];
    snprintf(path, sizeof path, "%s/data_batch_3.bin", (char *)*state);
    make_records(bytes, 3, 0);
    write_file(*state, "data_batch_2.bin", bytes, RECORD);
    assert_int_equal(symlink("nowhere", path), 0);
    assert_int_equal(dataset_load(&d, DATASET_CIFAR10, *state, 1, 0, &e), -1);
    assert_message(&e, path, "cannot be opened", "No such file", NULL);
}

/* ---- synthetic ---- */

static void synthetic_images_can_be_told_apart_and_repeat(void **state) {
    (void)state;
    enum { COUNT = 200, CLASSES = 7, SIZE = 3 * 5 * 11 };
    dataset train, again, validation, other_seed;
    error_text e;
    assert_int_equal(dataset_synthetic(&train, COUNT, 3, 5, 11, CLASSES, 1, 1, &e), 0);
    assert_int_equal(dataset_synthetic(&again, COUNT / 2, 3, 5, 11, CLASSES, 1, 1, &e), 0);
    assert_int_equal(dataset_synthetic(&validation, COUNT, 3, 5, 11, CLASSES, 1, 0, &e), 0);
    assert_int_equal(dataset_synthetic(&other_seed, COUNT, 3, 5, 11, CLASSES, 2, 1, &e), 0);
    assert_memory_equal(train.pixels, again.pixels, COUNT / 2 * SIZE);
    assert_memory_not_equal(train.pixels, validation.pixels, COUNT * SIZE);
    assert_memory_not_equal(train.pixels, other_seed.pixels, COUNT * SIZE);
    assert_int_equal(dataset_same_shape(&train, &validation, &e), 0);
    assert_string_equal(train.label_names[6], "6");

    /* The nearest class mean of the training images classifies the validation images. */
    static double means[CLASSES][SIZE];
    double sum = 0, squares = 0;
    size_t counts[CLASSES] = {0}, right = 0;
    for (size_t i = 0; i < COUNT; i++) {
        assert_int_equal(train.labels[i], i % CLASSES);
        counts[i % CLASSES]++;
        for (size_t p = 0; p < SIZE; p++) {
            double pixel = train.pixels[i * SIZE + p] / 255.0;
            means[i % CLASSES][p] += pixel;
            sum += pixel, squares += pixel * pixel;
        }
    }
    for (size_t i = 0; i < COUNT; i++) {
        int32_t nearest = 0;
        double least = INFINITY;
        for (int32_t k = 0; k < CLASSES; k++) {
            double distance = 0;
            for (size_t p = 0; p < SIZE; p++) {
                double difference = validation.pixels[i * SIZE + p] / 255.0 - means[k][p] / (double)counts[k];
                distance += difference * difference;
            }
            if (distance < least) least = distance, nearest = k;
        }
        right += nearest == validation.labels[i];
    }
    assert_int_equal(right, COUNT);
    double mean = sum / (COUNT * SIZE), std = sqrt(squares / (COUNT * SIZE) - mean * mean);
    assert_float_equal(mean, train.mean[0], 0.02);
    assert_float_equal(std, train.std[2], 0.02);
    dataset_free(&train);
    dataset_free(&again);
    dataset_free(&validation);
    dataset_free(&other_seed);
}

static void synthetic_refuses_impossible_sizes(void **state) {
    (void)state;
    static const size_t cases[][5] = {{0, 1, 1, 1, 1},
                                      {1, 0, 1, 1, 1},
                                      {1, 1, 0, 1, 1},
                                      {1, 1, 1, 0, 1},
                                      {1, 1, 1, 1, 0},
                                      {1, 4, 1, 1, 1},
                                      {SIZE_MAX, 3, 1, 1, 1},
                                      {1, 3, SIZE_MAX / 2, 1, 1},
                                      {1, 1, 1ull << 32, 1ull << 32, 1},
                                      {1ull << 40, 1, 1 << 20, 16, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        dataset d;
        error_text e;
        const size_t *c = cases[i];
        assert_int_equal(dataset_synthetic(&d, c[0], c[1], c[2], c[3], c[4], 0, 1, &e), -1);
        assert_message(&e, "synthetic: found", "expected", NULL);
        assert_empty(&d);
    }
    dataset full = {.kind = DATASET_SYNTHETIC, .count = 2, .channels = 1, .height = 1, .width = 1};
    error_text e;
    assert_int_equal(dataset_grow(&full, SIZE_MAX, &e), -1);
}

/* ---- sampler ---- */

static void every_epoch_is_another_permutation(void **state) {
    (void)state;
    enum { COUNT = 1000, ORDERS = 6 };
    static uint32_t orders[ORDERS][COUNT], again[COUNT];
    static const uint64_t keys[ORDERS][2] = {{0, 0}, {0, 1},          {1, 0},
                                             {1, 1}, {0, 1ull << 40}, {1ull << 63, 0}};
    for (int i = 0; i < ORDERS; i++) {
        sampler_order(keys[i][0], keys[i][1], COUNT, 1, orders[i]);
        int seen[COUNT] = {0};
        for (size_t k = 0; k < COUNT; k++) {
            assert_true(orders[i][k] < COUNT);
            assert_int_equal(seen[orders[i][k]]++, 0);
        }
        for (int j = 0; j < i; j++) {
            size_t equal = 0;
            for (size_t k = 0; k < COUNT; k++) equal += orders[i][k] == orders[j][k];
            assert_true(equal < 10); /* of two random permutations one place agrees on average */
        }
    }
    for (int i = ORDERS; i-- > 0;) { /* called in another order */
        sampler_order(keys[i][0], keys[i][1], COUNT, 1, again);
        assert_memory_equal(again, orders[i], sizeof again);
    }
    sampler_order(5, 7, COUNT, 0, again);
    for (uint32_t k = 0; k < COUNT; k++) assert_int_equal(again[k], k);
    sampler_order(5, 7, 1, 1, again);
    assert_int_equal(again[0], 0);
    sampler_order(5, 7, 0, 1, again);
}

static void permutations_are_uniform(void **state) {
    (void)state;
    enum { EPOCHS = 24000 };
    size_t seen[256] = {0}; /* indexed by the four elements in base 4 */
    double chi_squared = 0;
    for (uint64_t epoch = 0; epoch < EPOCHS; epoch++) {
        uint32_t order[4];
        sampler_order(3, epoch, 4, 1, order);
        seen[order[0] * 64 + order[1] * 16 + order[2] * 4 + order[3]]++;
    }
    int permutations = 0;
    for (int i = 0; i < 256; i++)
        if (seen[i]) permutations++, chi_squared += pow((double)seen[i] - EPOCHS / 24., 2) / (EPOCHS / 24.);
    assert_int_equal(permutations, 24);
    assert_true(chi_squared < 49.7); /* 23 degrees of freedom: exceeded with probability 0.001 */
}

static void a_global_batch_holds_each_sample_once(void **state) {
    (void)state;
    for (size_t ranks = 1; ranks <= 5; ranks++)
        for (size_t micro_batches = 1; micro_batches <= 4; micro_batches++)
            for (size_t batch = 1; batch <= 7; batch++) {
                int seen[5 * 4 * 7] = {0};
                for (size_t r = 0; r < ranks; r++)
                    for (size_t m = 0; m < micro_batches; m++)
                        for (size_t b = 0; b < batch; b++) {
                            size_t number = sampler_number(b, m, micro_batches, r, ranks);
                            assert_true(number < ranks * micro_batches * batch);
                            assert_int_equal(seen[number]++, 0);
                        }
            }
    /* (b * M + m) * N + r with b = 2, m = 1, M = 3, r = 1, N = 4 */
    assert_int_equal(sampler_number(2, 1, 3, 1, 4), 29);
}

/* ---- samples ---- */

/* Sample `index` by dataset_sample, in the data set's own size and with its own mean and deviation. */
static void draw(const dataset *d, size_t index, augmentation how, uint64_t seed, uint64_t epoch,
                 size_t channels, float *out) {
    sample_format f = {
        .channels = channels, .height = d->height, .width = d->width, .how = how, .seed = seed};
    error_text e;
    memcpy(f.mean, d->mean, sizeof f.mean);
    memcpy(f.std, d->std, sizeof f.std);
    assert_int_equal(dataset_sample(d, &f, index, epoch, out, &e), 0);
}

/* A CIFAR-10 data set of random pixels in memory. */
static dataset random_cifar10(size_t count) {
    dataset d = cifar10_empty();
    error_text e;
    assert_int_equal(dataset_grow(&d, count, &e), 0);
    for (size_t i = 0; i < count * 3072; i++) d.pixels[i] = (uint8_t)random_bits(99, i);
    for (size_t i = 0; i < count; i++) d.labels[i] = 0;
    return d;
}

static void pixels_are_normalised_as_torchvision_does(void **state) {
    (void)state;
    /* torchvision 0.29: Compose([ToTensor(), Normalize(mean, std)]), bit for bit. */
    static const uint8_t pixels[6] = {0, 1, 77, 128, 254, 255};
    static const float cifar10[3][6] = {
        {-0x1.fd3e5p+0f, -0x1.f92dfp+0f, -0x1.88a2d2p-1f, 0x1.5e379cp-5f, 0x1.058082p+1f, 0x1.0788b2p+1f},
        {-0x1.faeebp+0f, -0x1.f6cf3p+0f, -0x1.7aea38p-1f, 0x1.4d1716p-4f, 0x1.0e2946p+1f, 0x1.103908p+1f},
        {-0x1.b4fcecp+0f, -0x1.b12674p+0f, -0x1.1af5b2p-1f, 0x1.b1f862p-3f, 0x1.0ce708p+1f, 0x1.0ed244p+1f}};
    static const float mnist[6] = {-0x1.b264e2p-2f, -0x1.a55c4p-2f, 0x1.1c99d2p-1f,
                                   0x1.347af4p+0f,  0x1.678566p+1f, 0x1.69267ap+1f};
    dataset d = random_cifar10(2);
    float out[3072];
    for (size_t c = 0; c < 3; c++) memcpy(d.pixels + 3072 + c * 1024, pixels, 6);
    draw(&d, 1, AUGMENTATION_NONE, 0, 0, 3, out);
    for (size_t c = 0; c < 3; c++) assert_memory_equal(out + c * 1024, cifar10[c], sizeof cifar10[c]);
    dataset_free(&d);

    uint8_t image_bytes[16 + 6] = {0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3};
    uint8_t label_bytes[9] = {0, 0, 8, 1, 0, 0, 0, 1, 5};
    file_content images = {"images", image_bytes, sizeof image_bytes}, labels = {"labels", label_bytes, 9};
    error_text e;
    memcpy(image_bytes + 16, pixels, 6);
    assert_int_equal(mnist_parse(&d, &images, &labels, SIZE_MAX, &e), 0);
    draw(&d, 0, AUGMENTATION_NONE, 0, 0, 1, out);
    assert_memory_equal(out, mnist, sizeof mnist);
    draw(&d, 0, AUGMENTATION_NONE, 0, 0, 3, out); /* grey as three channels */
    for (size_t c = 0; c < 3; c++) assert_memory_equal(out + c * 6, mnist, sizeof mnist);
    d.mean[1] = 0, d.std[1] = 1; /* each with its own mean and deviation */
    draw(&d, 0, AUGMENTATION_NONE, 0, 0, 3, out);
    assert_memory_equal(out + 12, mnist, sizeof mnist);
    for (size_t p = 0; p < 6; p++) assert_true(out[6 + p] == (float)pixels[p] / 255);
    dataset_free(&d);
}

static void normalised_training_digits_have_mean_0_and_deviation_1(void **state) {
    (void)state;
    dataset d;
    error_text e;
    float out[64];
    double sum = 0, squares = 0;
    assert_int_equal(dataset_load(&d, DATASET_DIGITS, NULL, 1, 0, &e), 0);
    for (size_t i = 0; i < d.count; i++) {
        draw(&d, i, AUGMENTATION_BASIC, 0, 0, 1, out);
        for (int p = 0; p < 64; p++) sum += out[p], squares += out[p] * out[p];
    }
    assert_float_equal(sum / ((double)d.count * 64), 0, 1e-5);
    assert_float_equal(squares / ((double)d.count * 64), 1, 1e-5);
    dataset_free(&d);
}

static void grey_data_sets_are_not_augmented(void **state) {
    (void)state;
    dataset d;
    error_text e;
    float plain[64], basic[64];
    assert_int_equal(dataset_load(&d, DATASET_DIGITS, NULL, 1, 0, &e), 0);
    for (int kind = 0; kind < 2; kind++) {
        d.kind = kind ? DATASET_MNIST : DATASET_DIGITS;
        for (size_t i = 0; i < 100; i++) {
            draw(&d, i, AUGMENTATION_NONE, 1, 2, 1, plain);
            draw(&d, i, AUGMENTATION_BASIC, 1, 2, 1, basic);
            assert_memory_equal(plain, basic, sizeof plain);
        }
    }
    dataset_free(&d);
}

/* The crop at (down, right), each 0 to 8, of the image in a frame of four zero pixels; perhaps mirrored. */
static void naive_crop(const dataset *d, size_t index, int down, int right, int mirror, float *out) {
    static uint8_t framed[3][40][40];
    memset(framed, 0, sizeof framed);
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < 32; y++)
            memcpy(&framed[c][y + 4][4], d->pixels + index * 3072 + c * 1024 + y * 32, 32);
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < 32; y++)
            for (int x = 0; x < 32; x++) {
                float pixel = framed[c][down + y][right + (mirror ? 31 - x : x)];
                out[c * 1024 + y * 32 + x] = (pixel / 255 - d->mean[c]) / d->std[c];
            }
}

static void cifar10_is_cropped_and_mirrored_uniformly(void **state) {
    (void)state;
    enum { EPOCHS = 8100, VARIANTS = 9 * 9 * 2 };
    static float variants[VARIANTS][3072], out[3072];
    dataset d = random_cifar10(1);
    size_t seen[VARIANTS] = {0};
    for (int v = 0; v < VARIANTS; v++) naive_crop(&d, 0, v / 18, v / 2 % 9, v % 2, variants[v]);
    for (uint64_t epoch = 0; epoch < EPOCHS; epoch++) {
        int v = 0;
        draw(&d, 0, AUGMENTATION_BASIC, 0, epoch, 3, out);
        while (v < VARIANTS && memcmp(out, variants[v], sizeof out)) v++;
        assert_true(v < VARIANTS); /* exactly one of the crops that there can be */
        seen[v]++;
    }
    double chi_squared = 0;
    for (int v = 0; v < VARIANTS; v++) {
        double expected = (double)EPOCHS / VARIANTS;
        chi_squared += pow((double)seen[v] - expected, 2) / expected;
    }
    assert_true(chi_squared < 222.0); /* 161 degrees of freedom: exceeded with probability 0.001 */
    dataset_free(&d);
}

static void augmentation_depends_on_seed_epoch_and_sample_alone(void **state) {
    (void)state;
    enum { COUNT = 64 };
    static float first[COUNT][3072], out[3072];
    dataset d = random_cifar10(COUNT);
    /* The same picture many times: what differs is the augmentation. */
    for (size_t i = 1; i < COUNT; i++) memcpy(d.pixels + i * 3072, d.pixels, 3072);
    size_t same_as_neighbour = 0, same_in_epoch = 0, same_in_seed = 0;
    for (size_t i = 0; i < COUNT; i++) draw(&d, i, AUGMENTATION_BASIC, 5, 6, 3, first[i]);
    for (size_t i = COUNT; i-- > 0;) { /* in another order */
        draw(&d, i, AUGMENTATION_BASIC, 5, 6, 3, out);
        assert_memory_equal(out, first[i], sizeof out);
        if (i) same_as_neighbour += !memcmp(first[i], first[i - 1], sizeof out);
        draw(&d, i, AUGMENTATION_BASIC, 5, 7, 3, out);
        same_in_epoch += !memcmp(out, first[i], sizeof out);
        draw(&d, i, AUGMENTATION_BASIC, 6, 6, 3, out);
        same_in_seed += !memcmp(out, first[i], sizeof out);
    }
    assert_true(same_as_neighbour < 6 && same_in_epoch < 6 && same_in_seed < 6); /* 0.4 on average */
    dataset_free(&d);
}

/* ---- the real files ---- */

static const char *real_data(const char *folder, char path[512]) {
    const char *root = getenv("DATA_DIR");
    if (root) snprintf(path, 512, "%s/%s", root, folder);
    if (root && access(path, R_OK) == 0) return path;
    print_message("DATA_DIR names no folder with %s\n", folder);
    skip();
    return NULL;
}

typedef struct {
    size_t count, classes[10], sum;
    int32_t labels[5];
} summary;

static void assert_summary(dataset_kind kind, const char *path, int train, const summary *expected) {
    dataset d;
    error_text e;
    summary s = {0};
    if (dataset_load(&d, kind, path, train, 0, &e)) fail_msg("%s", e.text);
    s.count = d.count;
    for (size_t i = 0; i < d.count; i++) s.classes[d.labels[i]]++;
    for (size_t i = 0; i < d.count * dataset_image_size(&d); i++) s.sum += d.pixels[i];
    for (int i = 0; i < 5; i++) s.labels[i] = d.labels[i];
    assert_memory_equal(&s, expected, offsetof(summary, labels));
    assert_memory_equal(s.labels, expected->labels, sizeof s.labels);
    if (kind == DATASET_CIFAR10) assert_string_equal(d.label_names[9], "truck");
    dataset_free(&d);
}

static void real_mnist_has_the_known_counts(void **state) {
    (void)state;
    static const summary train = {
        60000, {5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949}, 1567298545, {5, 0, 4, 1, 9}};
    static const summary validation = {
        10000, {980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009}, 264923200, {7, 2, 1, 0, 4}};
    char buffer[512];
    const char *path = real_data("mnist", buffer);
    dataset_kind kind;
    error_text e;
    assert_int_equal(dataset_detect(path, &kind, &e), 0);
    assert_int_equal(kind, DATASET_MNIST);
    assert_summary(kind, path, 1, &train);
    assert_summary(kind, path, 0, &validation);
}

static void real_cifar10_has_a_thousand_of_each_class(void **state) {
    (void)state;
    static const summary validation = {
        10000, {1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000}, 3733375634, {3, 8, 8, 0, 6}};
    char buffer[512];
    const char *path = real_data("cifar-10-batches-bin", buffer);
    dataset_kind kind;
    dataset d;
    error_text e;
    assert_int_equal(dataset_detect(path, &kind, &e), 0);
    assert_int_equal(kind, DATASET_CIFAR10);
    assert_summary(kind, path, 0, &validation);
    assert_int_equal(dataset_load(&d, kind, path, 1, 10000, &e), 0); /* data_batch_1.bin */
    size_t sums[3] = {0};
    for (size_t i = 0; i < d.count * 3072; i++) sums[i / 1024 % 3] += d.pixels[i];
    assert_int_equal(d.count, 10000);
    assert_int_equal(sums[0], 1288517123);
    assert_int_equal(sums[1], 1262189222);
    assert_int_equal(sums[2], 1167674233);
    dataset_free(&d);
}

#define IN_DIRECTORY(test) cmocka_unit_test_setup_teardown(test, make_directory, remove_directory)

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(digits_are_those_of_scikit_learn),
        cmocka_unit_test(limit_keeps_the_first_images),
        IN_DIRECTORY(detection_tells_the_kind_by_file_names),
        cmocka_unit_test(data_sets_are_chosen_by_name),
        IN_DIRECTORY(detection_refuses_what_it_cannot_tell),
        IN_DIRECTORY(unreadable_folders_are_refused),
        IN_DIRECTORY(loading_refuses_bad_paths_and_kinds),
        IN_DIRECTORY(mnist_is_read_plain_and_gzip_under_both_spellings),
        IN_DIRECTORY(mnist_refuses_each_bad_file),
        IN_DIRECTORY(mnist_refuses_missing_files),
        IN_DIRECTORY(damaged_gzip_is_refused),
        IN_DIRECTORY(headers_may_claim_more_than_memory_holds),
        cmocka_unit_test(a_train_set_and_another_shape_do_not_go_together),
        IN_DIRECTORY(cifar10_reads_any_batches_in_order_of_name),
        IN_DIRECTORY(cifar10_takes_label_names_from_the_meta_file),
        IN_DIRECTORY(cifar10_refuses_each_bad_file),
        cmocka_unit_test(synthetic_images_can_be_told_apart_and_repeat),
        cmocka_unit_test(synthetic_refuses_impossible_sizes),
        cmocka_unit_test(every_epoch_is_another_permutation),
        cmocka_unit_test(permutations_are_uniform),
        cmocka_unit_test(a_global_batch_holds_each_sample_once),
        cmocka_unit_test(pixels_are_normalised_as_torchvision_does),
        cmocka_unit_test(normalised_training_digits_have_mean_0_and_deviation_1),
        cmocka_unit_test(grey_data_sets_are_not_augmented),
        cmocka_unit_test(cifar10_is_cropped_and_mirrored_uniformly),
        cmocka_unit_test(augmentation_depends_on_seed_epoch_and_sample_alone),
        cmocka_unit_test(real_mnist_has_the_known_counts),
        cmocka_unit_test(real_cifar10_has_a_thousand_of_each_class),
    };
    return cmocka_run_group_tests_name("data", tests, NULL, NULL);
}
