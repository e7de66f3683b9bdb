/* test_imagefolder.c - which images a folder holds, in which order and class. The order is torchvision's:
 * expected[] is what torchvision.datasets.ImageFolder (0.30) lists for the same tree. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <sys/stat.h>

#include "data/dataset.h"

#include <cmocka.h>

#include "tests/files.h"

static const char *const tree[] = {"train/B/x.PNG",      "train/B/Y.png",        "train/a/z.jpg",
                                   "train/a/b-c/1.jpg",  "train/a/b/d/2.jpeg",   "train/a/b/1.webp",
                                   "train/a/readme.txt", "train/\xC3\xA9/1.bmp", "train/A b/\xC3\xBC.tif",
                                   "train/A b/u.TIFF",   "train/stray.jpg",      "train/a/10.ppm",
                                   "train/a/9.pgm"};
static const struct {
    const char *file;
    int32_t label;
} expected[] = {{"train/A b/u.TIFF", 0},      {"train/A b/\xC3\xBC.tif", 0}, {"train/B/Y.png", 1},
                {"train/B/x.PNG", 1},         {"train/a/10.ppm", 2},         {"train/a/9.pgm", 2},
                {"train/a/z.jpg", 2},         {"train/a/b/1.webp", 2},       {"train/a/b-c/1.jpg", 2},
                {"train/a/b/d/2.jpeg", 2},    {"train/link/10.ppm", 3},      {"train/link/9.pgm", 3},
                {"train/link/z.jpg", 3},      {"train/link/b/1.webp", 3},    {"train/link/b-c/1.jpg", 3},
                {"train/link/b/d/2.jpeg", 3}, {"train/\xC3\xA9/1.bmp", 4}};
enum { FILES = sizeof expected / sizeof *expected };

static int make_directory(void **state) {
    char template[] = "/tmp/test_imagefolder_XXXXXX";
    if (!mkdtemp(template)) return -1;
    *state = strdup(template);
    return 0;
}

static int remove_directory(void **state) {
    int failed = remove_tree(*state);
    free(*state);
    return failed;
}

/* Makes an empty file, and the folders on the way to it; of a path that ends with a slash the folders
 * alone. */
static void make_entry(const char *root, const char *path) {
    char whole[512];
    snprintf(whole, sizeof whole, "%s/%s", root, path);
    for (char *slash = whole + strlen(root); (slash = strchr(slash + 1, '/'));) {
        *slash = 0;
        mkdir(whole, 0777);
        *slash = '/';
    }
    if (path[strlen(path) - 1] == '/') return;
    FILE *file = fopen(whole, "wb");
    assert_non_null(file);
    fclose(file);
}

static void make_tree(const char *root) {
    char link[512];
    for (size_t i = 0; i < sizeof tree / sizeof *tree; i++) make_entry(root, tree[i]);
    snprintf(link, sizeof link, "%s/train/link", root);
    assert_int_equal(symlink("a", link), 0);
}

static void assert_lists(const dataset *d, const char *root, size_t count) {
    char path[512];
    assert_int_equal(d->count, count);
    assert_int_equal(d->classes, 5);
    for (size_t i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%s", root, expected[i].file);
        assert_string_equal(d->files[i], path);
        assert_int_equal(d->labels[i], expected[i].label);
    }
    assert_string_equal(d->label_names[0], "A b");
    assert_string_equal(d->label_names[3], "link");
    assert_string_equal(d->label_names[4], "\xC3\xA9");
}

static void images_are_listed_in_torchvisions_order(void **state) {
    const char *root = *state;
    dataset_kind kind;
    dataset d;
    error_text e;
    make_tree(root);
    assert_int_equal(dataset_detect(root, &kind, &e), 0);
    assert_int_equal(kind, DATASET_IMAGEFOLDER);
    if (dataset_load(&d, kind, root, 1, 0, &e)) fail_msg("%s", e.text);
    assert_lists(&d, root, FILES);
    dataset_free(&d);
    assert_int_equal(dataset_load(&d, kind, root, 1, 6, &e), 0); /* the first six; all classes stay */
    assert_lists(&d, root, 6);
    dataset_free(&d);
}

static void a_folder_of_classes_is_a_validation_set(void **state) {
    char path[512];
    dataset_kind kind;
    dataset d;
    error_text e;
    make_entry(*state, "one/cat/1.jpg");
    make_entry(*state, "one/dog/1.jpg");
    snprintf(path, sizeof path, "%s/one", (char *)*state);
    assert_int_equal(dataset_detect(path, &kind, &e), 0);
    assert_int_equal(kind, DATASET_IMAGEFOLDER);
    assert_int_equal(dataset_load(&d, kind, path, 0, 0, &e), 0);
    assert_int_equal(d.count, 2);
    dataset_free(&d);
    assert_int_equal(dataset_load(&d, kind, path, 1, 0, &e), -1); /* nothing to train on */
    assert_non_null(strstr(e.text, "one/train: cannot be read"));
    make_entry(path, "train/cat/1.jpg");
    assert_int_equal(dataset_load(&d, kind, path, 0, 0, &e), -1); /* half of a data set */
    assert_non_null(strstr(e.text, "one/val: cannot be read"));
}

static void assert_refused(const char *root, int train, const char *fragment) {
    dataset d;
    error_text e;
    assert_int_equal(dataset_load(&d, DATASET_IMAGEFOLDER, root, train, 0, &e), -1);
    assert_message(&e, fragment, NULL);
    assert_true(!d.files && !d.labels && !d.label_names);
}

static void classes_without_images_are_refused(void **state) {
    const char *root = *state;
    make_entry(root, "train/");
    make_entry(root, "train/picture.jpg");
    assert_refused(root, 1, "train: found no folder in it, expected one for each class");
    make_entry(root, "train/cat/1.jpg");
    make_entry(root, "train/dog/notes.txt");
    make_entry(root, "train/dog/more/");
    assert_refused(root, 1, "train/dog: found no image in this class");
    char name[300] = "train/", path[600];
    memset(name + 6, 'x', 250);
    strcpy(name + 256 - 2, "/1.jpg"); /* 248 bytes of name: fine */
    make_entry(root, "train/dog/1.jpg");
    make_entry(root, name);
    dataset d;
    error_text e;
    assert_int_equal(dataset_load(&d, DATASET_IMAGEFOLDER, root, 1, 0, &e), 0);
    assert_int_equal(strlen(d.label_names[2]), 248);
    dataset_free(&d);
    snprintf(path, sizeof path, "%s/train/loop", root);
    assert_int_equal(symlink(".", path), 0);
    assert_refused(root, 1, "found links that lead in circles");
}

static void train_and_val_must_have_the_same_classes(void **state) {
    const char *root = *state;
    dataset train, val;
    error_text e;
    make_entry(root, "train/cat/1.jpg");
    make_entry(root, "train/dog/1.jpg");
    make_entry(root, "val/cat/1.jpg");
    static const char *const more[] = {"val/cow/1.jpg", "val/dog/1.jpg"};
    static const char *const messages[] = {"found class cow in val/, expected dog as in train/",
                                           "found class cow in val/, expected dog as in train/"};
    assert_int_equal(dataset_load(&train, DATASET_IMAGEFOLDER, root, 1, 0, &e), 0);
    assert_int_equal(dataset_load(&val, DATASET_IMAGEFOLDER, root, 0, 0, &e), 0);
    assert_int_equal(dataset_same_shape(&train, &val, &e), -1);
    assert_non_null(strstr(e.text, "found 1 classes in val/, expected 2 as in train/ (dog"));
    dataset_free(&val);
    for (int i = 0; i < 2; i++) {
        make_entry(root, more[i]);
        assert_int_equal(dataset_load(&val, DATASET_IMAGEFOLDER, root, 0, 0, &e), 0);
        assert_int_equal(dataset_same_shape(&train, &val, &e), -1);
        assert_non_null(strstr(e.text, messages[i]));
        dataset_free(&val);
    }
    dataset_free(&train);
}

#define IN_DIRECTORY(test) cmocka_unit_test_setup_teardown(test, make_directory, remove_directory)

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_DIRECTORY(images_are_listed_in_torchvisions_order),
        IN_DIRECTORY(a_folder_of_classes_is_a_validation_set),
        IN_DIRECTORY(classes_without_images_are_refused),
        IN_DIRECTORY(train_and_val_must_have_the_same_classes),
    };
    return cmocka_run_group_tests_name("imagefolder", tests, NULL, NULL);
}
