/* test_image.c - images in memory: their resizing.
 *
 * Expected pixels come from Pillow, expected weights from PyTorch (tests/golden/make_images.py).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <zlib.h>

#include "data/resize.h"

#include <cmocka.h>

#define GOLDEN "tests/golden/images/"

/* Asserts one line that holds each of the fragments; the last one is NULL. */
static void assert_message(const error_text *e, ...) {
    va_list fragments;
    va_start(fragments, e);
    for (const char *fragment; (fragment = va_arg(fragments, const char *));)
        if (!strstr(e->text, fragment)) fail_msg("\"%s\" does not say \"%s\"", e->text, fragment);
    va_end(fragments);
    assert_null(strchr(e->text, '\n'));
}

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resized_images_are_those_of_pillow),
        cmocka_unit_test(a_part_is_what_cropping_before_and_after_gives),
        cmocka_unit_test(crops_are_padded_with_zeros),
        cmocka_unit_test(impossible_sizes_are_refused),
        cmocka_unit_test(weights_are_those_of_pytorch),
    };
    return cmocka_run_group_tests_name("image", tests, NULL, NULL);
}
