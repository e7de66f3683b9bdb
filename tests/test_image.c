/* test_image.c - images: their files, their resizing, the transforms.
 *
 * Expected pixels come from Pillow, torchvision and timm, expected weights from PyTorch
 * (tests/golden/make_images.py). Bad files are good ones with one fault each. Compiled without HAVE_JPEG, the
 * test takes pixels of JPEGs that are near.
 */
#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <stdarg.h>
#include <sys/stat.h>

#include "data/decode.h"
#include "data/transform.h"

#include <cmocka.h>

#include "tests/files.h"

#define GOLDEN "tests/golden/images/"

static FILE *open_golden(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) fail_msg("%s cannot be opened; tests run from the root", path);
    return file;
}

/* The input of a case of resize.txt. */
static image random_image(size_t number, size_t width, size_t height, size_t channels) {
    image i;
    error_text e;
    assert_int_equal(image_new(&i, width, height, channels, &e), 0);
    uint64_t key = random_key(number, 4000, 0, 0);
    for (size_t p = 0; p < width * height * channels; p++) {
        uint8_t byte = random_bits(key, p) & 255;
        i.pixels[p] = number % 3 == 2 ? byte > 127 ? 255 : 0 : byte;
    }
    return i;
}

static unsigned long crc(const image *i) {
    return crc32(0, i->pixels, (unsigned)(i->width * i->height * i->channels));
}

/* ---- resizing ---- */

static void resized_images_are_those_of_pillow(void **state) {
    (void)state;
    FILE *file = open_golden(GOLDEN "resize.txt");
    size_t width, height, channels, to_width, to_height, cases = 0;
    unsigned filter;
    unsigned long expected;
    char begin[64], found[64];
    for (; fscanf(file, "%zu %zu %zu %zu %zu %u %lx %63s", &width, &height, &channels, &to_width, &to_height,
                  &filter, &expected, begin) == 8;
         cases++) {
        image in = random_image(cases, width, height, channels), out;
        error_text e;
        if (image_resize(&in, to_width, to_height, (resize_filter)filter, &out, &e)) fail_msg("%s", e.text);
        assert_int_equal(out.width, to_width);
        assert_int_equal(out.height, to_height);
        assert_int_equal(out.channels, channels);
        for (size_t i = 0; 2 * i < strlen(begin); i++) snprintf(found + 2 * i, 3, "%02x", out.pixels[i]);
        if (crc(&out) != expected)
            fail_msg(
                "case %zu: %zu x %zu x %zu to %zu x %zu, filter %u: found crc %08lx, bytes %s, expected crc "
                "%08lx, bytes %s",
                cases, width, height, channels, to_width, to_height, filter, crc(&out), found, expected,
                begin);
        image_free(&in);
        image_free(&out);
    }
    assert_true(feof(file));
    assert_int_equal(cases, 88);
    fclose(file);
}

static void a_part_is_what_cropping_before_and_after_gives(void **state) {
    (void)state;
    static const struct {
        image_area from;
        size_t width, height;
        image_area part;
    } cases[] = {{{0, 0, 90, 70}, 40, 30, {0, 0, 40, 30}},    {{0, 0, 90, 70}, 40, 30, {7, 5, 20, 19}},
                 {{11, 13, 50, 40}, 24, 24, {0, 0, 24, 24}},  {{11, 13, 50, 40}, 24, 24, {3, 20, 1, 4}},
                 {{89, 69, 1, 1}, 9, 9, {8, 8, 1, 1}},        {{0, 0, 90, 70}, 89, 10, {50, 2, 39, 7}},
                 {{0, 0, 90, 70}, 300, 200, {299, 0, 1, 200}}};
    for (size_t channels = 1; channels <= 3; channels += 2)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
            for (resize_filter filter = RESIZE_BILINEAR; filter <= RESIZE_BICUBIC; filter++) {
                image_area from = cases[i].from, part = cases[i].part;
                image in = random_image(i, 90, 70, channels), before, whole, expected, found;
                error_text e;
                assert_int_equal(image_crop(&in, (ptrdiff_t)from.left, (ptrdiff_t)from.top, from.width,
                                            from.height, &before, &e),
                                 0);
                assert_int_equal(image_resize(&before, cases[i].width, cases[i].height, filter, &whole, &e),
                                 0);
                assert_int_equal(image_crop(&whole, (ptrdiff_t)part.left, (ptrdiff_t)part.top, part.width,
                                            part.height, &expected, &e),
                                 0);
                assert_int_equal(
                    image_resize_area(&in, from, cases[i].width, cases[i].height, filter, part, &found, &e),
                    0);
                assert_int_equal(found.width, part.width);
                assert_int_equal(found.height, part.height);
                assert_memory_equal(found.pixels, expected.pixels, part.width * part.height * channels);
                image_free(&in), image_free(&before), image_free(&whole), image_free(&expected),
                    image_free(&found);
            }
}

static void crops_are_padded_with_zeros(void **state) {
    (void)state;
    image in = random_image(0, 5, 4, 3), out;
    error_text e;
    for (ptrdiff_t left = -7; left <= 7; left++)
        for (ptrdiff_t top = -6; top <= 6; top++)
            for (size_t width = 1; width <= 12; width += 3)
                for (size_t height = 1; height <= 12; height += 5) {
                    assert_int_equal(image_crop(&in, left, top, width, height, &out, &e), 0);
                    for (ptrdiff_t y = 0; y < (ptrdiff_t)height; y++)
                        for (ptrdiff_t x = 0; x < (ptrdiff_t)width; x++)
                            for (ptrdiff_t c = 0; c < 3; c++) {
                                ptrdiff_t u = x + left, v = y + top;
                                uint8_t expected =
                                    u < 0 || u > 4 || v < 0 || v > 3 ? 0 : in.pixels[(v * 5 + u) * 3 + c];
                                assert_int_equal(out.pixels[(y * (ptrdiff_t)width + x) * 3 + c], expected);
                            }
                    image_free(&out);
                }
    image_free(&in);
}

static void impossible_sizes_are_refused(void **state) {
    (void)state;
    image in = random_image(0, 5, 4, 3), out;
    resize_weights w;
    error_text e;
    assert_int_equal(image_new(&out, 0, 4, 3, &e), -1);
    assert_message(&e, "0 x 4", "expected", NULL);
    assert_int_equal(image_new(&out, SIZE_MAX / 2, SIZE_MAX / 2, 3, &e), -1);
    assert_int_equal(image_resize(&in, 0, 4, RESIZE_BICUBIC, &out, &e), -1);
    assert_message(&e, "5 to 0", "expected", NULL);
    assert_int_equal(image_resize(&in, 4, 0, RESIZE_BICUBIC, &out, &e), -1);
    assert_null(out.pixels);
    assert_int_equal(image_resize_area(&in, (image_area){1, 0, 5, 4}, 2, 2, RESIZE_BILINEAR,
                                       (image_area){0, 0, 2, 2}, &out, &e),
                     -1);
    assert_message(&e, "outside", "5 x 4", NULL);
    assert_int_equal(image_resize_area(&in, (image_area){0, 0, 5, 4}, 2, 2, RESIZE_BILINEAR,
                                       (image_area){1, 0, 2, 2}, &out, &e),
                     -1);
    assert_int_equal(resize_weights_init(&w, 0, 4, RESIZE_BICUBIC, &e), -1);
    assert_null(w.first);
    image_free(&in);
}

static void weights_are_those_of_pytorch(void **state) {
    (void)state;
    FILE *file = open_golden(GOLDEN "weights.txt");
    size_t in, to, cases = 0;
    unsigned filter;
    for (; fscanf(file, "%zu %zu %u", &in, &to, &filter) == 3; cases++) {
        resize_weights w;
        error_text e;
        assert_int_equal(resize_weights_init(&w, in, to, (resize_filter)filter, &e), 0);
        assert_int_equal(w.out, to);
        for (size_t i = 0; i < to; i++)
            for (size_t k = 0; k < in; k++) {
                double expected, found = 0;
                assert_int_equal(fscanf(file, "%lf", &expected), 1);
                if (k >= w.first[i] && k < w.first[i] + w.count[i])
                    found = w.weight[i * w.most + k - w.first[i]];
                assert_float_equal(found, expected, 1e-15);
            }
        resize_weights_free(&w);
    }
    assert_int_equal(cases, 8);
    fclose(file);
}

/* ---- files ---- */

static char *golden_path(const char *name) {
    static char path[512];
    snprintf(path, sizeof path, "%s%s", GOLDEN, name);
    return path;
}

static uint8_t *read_golden(const char *name, size_t *size) {
    char *bytes;
    error_text e;
    if (file_read_whole(golden_path(name), 1 << 20, &bytes, size, &e)) fail_msg("%s", e.text);
    return (uint8_t *)bytes;
}

/* How far the pixels of two images are from each other, at most and on average. */
static double difference(const image *a, const image *b, int *most) {
    size_t count = a->width * a->height * a->channels;
    double sum = 0;
    *most = 0;
    for (size_t i = 0; i < count; i++) {
        int d = abs(a->pixels[i] - b->pixels[i]);
        sum += d;
        if (d > *most) *most = d;
    }
    return sum / (double)count;
}

static void decoded_images_are_those_of_pillow(void **state) {
    (void)state;
    FILE *file = open_golden(GOLDEN "decode.txt");
    char name[256];
    size_t width, height, cases = 0;
    unsigned long expected;
    for (; fscanf(file, "%255s %zu %zu %lx", name, &width, &height, &expected) == 4; cases++) {
        image found, pixels;
        error_text e;
        if (image_read(&found, golden_path(name), &e)) fail_msg("%s", e.text);
        assert_int_equal(found.width, width);
        assert_int_equal(found.height, height);
        assert_int_equal(found.channels, 3);
        if (strstr(name, ".jpg") && crc(&found) != expected) {
            int most;
            strcat(name, ".png");
            if (image_read(&pixels, golden_path(name), &e)) fail_msg("%s", e.text);
            double mean = difference(&found, &pixels, &most);
#ifdef HAVE_JPEG
            fail_msg("%s: differs by at most %d levels, on average %g", name, most, mean);
#endif
            if (mean > 1) fail_msg("%s: differs by at most %d levels, on average %g", name, most, mean);
            image_free(&pixels);
        } else if (crc(&found) != expected)
            fail_msg("%s: found crc %08lx, expected %08lx", name, crc(&found), expected);
        image_free(&found);
    }
    assert_true(feof(file));
    assert_int_equal(cases, 41);
    fclose(file);
}

static void every_truncated_image_is_refused(void **state) {
    (void)state;
    FILE *file = open_golden(GOLDEN "decode.txt");
    char name[256];
    while (fscanf(file, "%255s %*u %*u %*x", name) == 1) {
        size_t size;
        uint8_t *bytes = read_golden(name, &size);
        for (size_t cut = 0; cut < size; cut += cut < 100 || size - cut < 100 ? 1 : 7) {
            uint8_t *head = malloc(cut + 1); /* of its own, so that a sanitizer sees its end */
            memcpy(head, bytes, cut);
            image out;
            error_text e = {""};
            if (image_decode(&out, head, cut, name, &e) == 0)
                fail_msg("%s: %zu of %zu bytes were accepted", name, cut, size);
            assert_message(&e, name, "expected", NULL);
            assert_null(out.pixels);
            free(head);
        }
        free(bytes);
    }
    fclose(file);
}

#ifdef HAVE_JPEG
/* Data that ends in the middle, though the end's marker is there: more than stb_image notices. */
static void a_jpeg_without_its_lower_half_is_refused(void **state) {
    (void)state;
    static const char *const names[] = {"420.jpg", "420-progressive.jpg", "restarts.jpg", "grey.jpg",
                                        "cmyk.jpg"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t size;
        uint8_t *bytes = read_golden(names[i], &size);
        image out;
        error_text e;
        memcpy(bytes + size * 3 / 4, "\xFF\xD9", 2);
        assert_int_equal(image_decode(&out, bytes, size * 3 / 4 + 2, names[i], &e), -1);
        assert_message(&e, names[i], "damaged or truncated JPEG", NULL);
        assert_null(out.pixels);
        free(bytes);
    }
}
#endif

static void assert_refused(const void *bytes, size_t size, const char *found, const char *expected) {
    image out;
    error_text e;
    assert_int_equal(image_decode(&out, bytes, size, "photo.jpg", &e), -1);
    assert_message(&e, "photo.jpg: ", found, expected, NULL);
    assert_null(out.pixels);
}

static void other_files_are_refused_by_their_type(void **state) {
    (void)state;
    static const char expected[] = "expected a JPEG, PNG or BMP image";
    assert_refused("", 0, "empty file", expected);
    assert_refused("This is a text.\n", 16, "another type", expected);
    assert_refused("GIF89a........", 14, "GIF", expected);
    assert_refused("II*\0....", 8, "TIFF", expected);
    assert_refused("MM\0*....", 8, "TIFF", expected);
    assert_refused("RIFF....WEBPVP8 ", 16, "WebP", expected);
    assert_refused("P6\n1 1\n255\nabc", 14, "PPM", expected);
    assert_refused("P5\n1 1\n255\na", 12, "PGM", expected);
    assert_refused("\xFF\xD8", 2, "another type", expected);
    assert_refused("\x89PNG", 4, "another type", expected);
    assert_refused("B", 1, "another type", expected);
}

/* Writes 60,000 into two fields of a golden file, in the order of bytes that its type has. */
static void claims_of_60000_pixels_a_side_are_refused(void **state) {
    (void)state;
    static const char found[] = "found an image of 60000 x 60000 pixels", expected[] = "178956970 pixels";
    size_t size;
    uint8_t *bytes = read_golden("420.jpg", &size);
    for (size_t i = 0; i + 9 < size; i++)
        if (bytes[i] == 0xFF && bytes[i + 1] == 0xC0) memcpy(bytes + i + 5, "\xEA\x60\xEA\x60", 4);
    assert_refused(bytes, size, found, expected);
    free(bytes);
    bytes = read_golden("420-progressive.jpg", &size);
    for (size_t i = 0; i + 9 < size; i++)
        if (bytes[i] == 0xFF && bytes[i + 1] == 0xC2) memcpy(bytes + i + 5, "\xEA\x60\xEA\x60", 4);
    assert_refused(bytes, size, found, expected);
    free(bytes);
    bytes = read_golden("8bit-rgb.png", &size);
    memcpy(bytes + 16, "\0\0\xEA\x60\0\0\xEA\x60", 8);
    unsigned long checksum = crc32(0, bytes + 12, 17);
    for (int i = 0; i < 4; i++) bytes[29 + i] = (uint8_t)(checksum >> (24 - 8 * i));
    assert_refused(bytes, size, found, expected);
    free(bytes);
    bytes = read_golden("rgb.bmp", &size);
    memcpy(bytes + 18, "\x60\xEA\0\0\x60\xEA\0\0", 8);
    assert_refused(bytes, size, found, expected);
    free(bytes);
}

static void damaged_png_and_bmp_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *name;
        size_t at;
        uint8_t value;
        const char *found;
    } cases[] = {{"8bit-rgb.png", 60, 1, "checksum"},
                 {"8bit-rgb.png", 12, 'J', "checksum"},
                 {"8bit-rgb.png", 8, 0x7F, "within a chunk"},
                 {"rgb.bmp", 18, 22, "shorter"},
                 {"rgb.bmp", 28, 16, "16 bits"},
                 {"rgb.bmp", 30, 1, "compression 1"},
                 {"rgb.bmp", 18, 0, "0 x 13"},
                 {"rgb.bmp", 14, 39, "header of 39"},
                 {"rgb.bmp", 17, 0x7F, "shorter"},
                 {"palette.bmp", 46, 3, "no colour"},
                 {"palette.bmp", 10, 200, "shorter"},
                 {"downwards.bmp", 25, 0x80, "expected 1 to"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t size;
        uint8_t *bytes = read_golden(cases[i].name, &size);
        assert_true(bytes[cases[i].at] != cases[i].value);
        bytes[cases[i].at] = cases[i].value;
        assert_refused(bytes, size, cases[i].found, "expected");
        free(bytes);
    }
}

static void files_that_cannot_be_read_are_refused(void **state) {
    (void)state;
    char path[] = "/tmp/test_image_XXXXXX";
    image out;
    error_text e;
    assert_int_equal(image_read(&out, "/nowhere/photo.jpg", &e), -1);
    assert_message(&e, "/nowhere/photo.jpg: ", "No such file", NULL);
    assert_int_equal(image_read(&out, "/tmp", &e), -1);
    assert_message(&e, "/tmp: ", "Is a directory", NULL);
    int file = mkstemp(path);
    assert_true(file >= 0);
    close(file);
    int empty = image_read(&out, path, &e);
    assert_message(&e, path, "empty file", NULL);
    chmod(path, 0);
    int forbidden = image_read(&out, path, &e);
    remove(path);
    assert_int_equal(empty, -1);
    assert_int_equal(forbidden, -1);
    if (geteuid()) assert_message(&e, path, "Permission denied", NULL);
    assert_null(out.pixels);
}

/* ---- transforms ---- */

static void evaluation_is_that_of_timm(void **state) {
    (void)state;
    FILE *file = open_golden(GOLDEN "eval.txt");
    size_t in_width, in_height, width, height, cases = 0;
    unsigned filter;
    double crop_pct;
    unsigned long expected;
    for (; fscanf(file, "%zu %zu %zu %zu %lf %u %lx", &in_width, &in_height, &width, &height, &crop_pct,
                  &filter, &expected) == 7;
         cases++) {
        image in = random_image(cases, in_width, in_height, 3), out;
        error_text e;
        if (transform_eval(&in, width, height, crop_pct, (resize_filter)filter, &out, &e))
            fail_msg("%s", e.text);
        assert_int_equal(out.width, width);
        assert_int_equal(out.height, height);
        if (crc(&out) != expected)
            fail_msg(
                "case %zu: %zu x %zu to %zu x %zu, crop_pct %g, filter %u: found crc %08lx, expected %08lx",
                cases, in_width, in_height, width, height, crop_pct, filter, crc(&out), expected);
        image_free(&in);
        image_free(&out);
    }
    assert_true(feof(file));
    assert_int_equal(cases, 32);
    fclose(file);
}

static void random_crops_are_those_of_torchvision(void **state) {
    (void)state;
    FILE *file = open_golden(GOLDEN "train.txt");
    size_t in_width, in_height, width, height, mirrored, cases = 0;
    image_area expected;
    unsigned filter;
    unsigned long long key;
    unsigned long expected_crc;
    for (; fscanf(file, "%zu %zu %zu %zu %u %llu %zu %zu %zu %zu %zu %lx", &in_width, &in_height, &width,
                  &height, &filter, &key, &expected.left, &expected.top, &expected.width, &expected.height,
                  &mirrored, &expected_crc) == 12;
         cases++) {
        image in = random_image(cases, in_width, in_height, 3), out;
        error_text e;
        uint64_t drawn = 0;
        image_area found = transform_random_area(in_width, in_height, key, &drawn);
        assert_memory_equal(&found, &expected, sizeof found);
        assert_int_equal(random_below(key, drawn, 2), mirrored);
        if (transform_train(&in, width, height, (resize_filter)filter, key, &out, &e)) fail_msg("%s", e.text);
        if (crc(&out) != expected_crc)
            fail_msg("case %zu: found crc %08lx, expected %08lx", cases, crc(&out), expected_crc);
        image_free(&in);
        image_free(&out);
    }
    assert_true(feof(file));
    assert_int_equal(cases, 48);
    fclose(file);
}

static void random_rectangles_lie_inside_and_have_their_shape(void **state) {
    (void)state;
    enum { DRAWS = 20000 };
    double area = 0, mirrored = 0;
    for (size_t i = 0; i < DRAWS; i++) {
        uint64_t drawn = 0, key = random_key(5, RANDOM_AUGMENTATION, 0, i);
        image_area a = transform_random_area(400, 400, key, &drawn);
        assert_true(a.left + a.width <= 400 && a.top + a.height <= 400);
        double ratio = (double)a.width / (double)a.height;
        assert_true(ratio > 0.74 && ratio < 1.35);
        area += (double)(a.width * a.height) / 160000 / DRAWS;
        mirrored += (double)random_below(key, drawn, 2) / DRAWS;
    }
    /* A uniform area from 0.08 to 1 has the mean 0.54; large ones of long shapes do not fit: drawn again. */
    assert_true(area > 0.45 && area < 0.54);
    assert_float_equal(mirrored, 0.5, 0.015);
}

static void impossible_transforms_are_refused(void **state) {
    (void)state;
    image in = random_image(0, 30, 1, 3), out;
    error_text e;
    assert_int_equal(transform_eval(&in, 8, 8, 0, RESIZE_BICUBIC, &out, &e), -1);
    assert_message(&e, "crop_pct 0", "expected", NULL);
    assert_int_equal(transform_eval(&in, 8, 8, NAN, RESIZE_BICUBIC, &out, &e), -1);
    assert_int_equal(transform_eval(&in, 8, 8, 100, RESIZE_BICUBIC, &out, &e), -1);
    assert_message(&e, "30 x 1 to ", "expected", NULL);
    assert_int_equal(transform_eval(&in, 0, 8, 0.9, RESIZE_BICUBIC, &out, &e), -1);
    assert_int_equal(transform_train(&in, 0, 8, RESIZE_BICUBIC, 1, &out, &e), -1);
    assert_null(out.pixels);
    image_free(&in);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resized_images_are_those_of_pillow),
        cmocka_unit_test(a_part_is_what_cropping_before_and_after_gives),
        cmocka_unit_test(crops_are_padded_with_zeros),
        cmocka_unit_test(impossible_sizes_are_refused),
        cmocka_unit_test(weights_are_those_of_pytorch),
        cmocka_unit_test(decoded_images_are_those_of_pillow),
        cmocka_unit_test(every_truncated_image_is_refused),
#ifdef HAVE_JPEG
        cmocka_unit_test(a_jpeg_without_its_lower_half_is_refused),
#endif
        cmocka_unit_test(other_files_are_refused_by_their_type),
        cmocka_unit_test(claims_of_60000_pixels_a_side_are_refused),
        cmocka_unit_test(damaged_png_and_bmp_are_refused),
        cmocka_unit_test(files_that_cannot_be_read_are_refused),
        cmocka_unit_test(evaluation_is_that_of_timm),
        cmocka_unit_test(random_crops_are_those_of_torchvision),
        cmocka_unit_test(random_rectangles_lie_inside_and_have_their_shape),
        cmocka_unit_test(impossible_transforms_are_refused),
    };
    return cmocka_run_group_tests_name("image", tests, NULL, NULL);
}
