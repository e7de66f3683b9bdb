/* test_compare.c - compare.h on results made by hand: which differences it sees and what it says of them,
 * formulas, and a picture of long numbers. (test_compare.sh holds real runs against what they wrote.) */
#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <stdarg.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "compare.h"

#include <cmocka.h>

#include "tests/files.h"

enum { STEPS = 4, RANKS = 2 };

static char directory[] = "/tmp/test_compare_XXXXXX";

static void write_weights(const char *strategy, const char *bytes, size_t size) {
    char path[256];
    error_text e;
    snprintf(path, sizeof path, "%s/%s/checkpoints/step-%08d", directory, strategy, STEPS);
    assert_int_equal(directory_make(path, &e), 0);
    strcat(path, "/model.safetensors");
    assert_int_equal(file_write_atomic(path, bytes, size, &e), 0);
}

/* The same numbers and weights under each strategy of the list. */
static void open_equal(compare *c, const char *list, char weights[40000]) {
    const double loss[STEPS] = {2.5, 2.25, 2, 1.75}, seconds[STEPS] = {0.4, 0.1, 0.2, 0.3};
    error_text e;
    *c = (compare){.about = {"a model", "a run"}};
    assert_int_equal(compare_choose(c, list, "ddp|zero1|zero2", &e), 0);
    assert_int_equal(compare_open(c, RANKS, STEPS, &e), 0);
    for (int i = 0; i < 40000; i++) weights[i] = (char)(i % 251);
    for (size_t i = 0; i < c->count; i++) {
        for (int t = 0; t < STEPS; t++)
            compare_add_step(&c->result[i], &(dist_result){.loss = loss[t], .gradient_norm = 0.1 * loss[t]},
                             seconds[t]);
        write_weights(c->result[i].strategy, weights, 40000);
    }
}

static char printed[1 << 17];

static const char *text_of(const compare *c, void (*print)(const compare *, FILE *)) {
    FILE *out = fmemopen(printed, sizeof printed, "w");
    assert_non_null(out);
    print(c, out);
    assert_int_equal(fclose(out), 0);
    return printed;
}

static void test_equal_strategies(void **state) {
    (void)state;
    static char weights[40000];
    compare c;
    error_text e;
    open_equal(&c, "ddp,zero1,zero2", weights);
    assert_int_equal(compare_judge(&c, directory, &e), 0);
    assert_int_equal(compare_verdict(&c, &e), 0);
    assert_true(c.result[1].median_s == 0.25); /* of 0.1, 0.2, 0.3 and 0.4 */
    assert_null(strstr(text_of(&c, compare_print_text), "DIFFER"));
    assert_non_null(strstr(printed, "all losses, gradient norms and final weights are equal, bit for bit\n"));
    compare_free(&c);
}

/* The least difference there is, in one value. */
static void test_differences(void **state) {
    (void)state;
    static const struct {
        int norm, step, weights; /* where; -1: nowhere */
        const char *message, *cell;
    } cases[] = {
        {0, 2, -1,
         "zero1 differs from ddp in losses or gradient norms from step 3 on, expected the same bits",
         "DIFFER from step 3 "},
        {1, 0, -1, "zero1 differs from ddp in losses or gradient norms from step 1 on, expected", "step 1 "},
        {0, -1, 0, "zero1 differs from ddp in the final weights, expected", " DIFFER "},
        {0, -1, 39999, "zero1 differs from ddp in the final weights, expected", " DIFFER "},
        {1, 3, 20000, "in losses or gradient norms from step 4 on, and in the final weights, expected",
         "step 4 "},
    };
    static char weights[40000];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        compare c;
        error_text e = {{0}};
        open_equal(&c, "ddp,zero1,zero2", weights);
        double *values = cases[i].norm ? c.result[1].norm : c.result[1].loss;
        if (cases[i].step >= 0) values[cases[i].step] = nextafter(values[cases[i].step], 9);
        if (cases[i].weights >= 0) weights[cases[i].weights] ^= 1;
        write_weights("zero1", weights, sizeof weights);
        assert_int_equal(compare_judge(&c, directory, &e), 0);
        assert_int_equal(compare_verdict(&c, &e), -1);
        assert_message(&e, cases[i].message, NULL);
        assert_non_null(strstr(text_of(&c, compare_print_text), cases[i].cell));
        assert_non_null(strstr(text_of(&c, compare_print_svg), cases[i].message));
        compare_free(&c);
    }
}

static void test_files(void **state) {
    (void)state;
    static char weights[40000];
    compare c;
    error_text e;
    open_equal(&c, "ddp,zero1", weights);
    write_weights("zero1", weights, 39999); /* cut short: another file */
    assert_int_equal(compare_judge(&c, directory, &e), 0);
    assert_int_equal(c.result[1].other_weights, 1);
    char path[256];
    snprintf(path, sizeof path, "%s/zero1/checkpoints/step-%08d/model.safetensors", directory, STEPS);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(compare_judge(&c, directory, &e), -1);
    assert_message(&e, "zero1/checkpoints/step-00000004/model.safetensors: cannot be opened: No such", NULL);
    compare_free(&c);
}

/* What differs from its formula is shown with the difference; what has none, with a dash. */
static void test_formulas(void **state) {
    (void)state;
    compare_cell cell;
    compare__formula(cell, 1000000, 1000000, 1e-6, 3, " B");
    assert_string_equal(cell, "= 1.000");
    compare__formula(cell, 1000004, 1000000, 1e-6, 3, " B");
    assert_string_equal(cell, "(+4 B) 1.000");
    compare__formula(cell, 1234, 1300, 1, 0, "");
    assert_string_equal(cell, "(-66) 1300");
    compare__formula(cell, 1234, NAN, 1e-6, 3, " B");
    assert_string_equal(cell, "-");
}

/* All texts of a line of the picture, from left to right: none begins before the one before it has ended, and
 * all stay inside. In a font of 13 pixels a character is 7.5 wide on average (DejaVu Sans, a wide one). */
static void check_texts(const char *svg) {
    int texts = 0;
    static double end[4000]; /* by height: where the last text ended */
    memset(end, 0, sizeof end);
    for (const char *at = svg; (at = strstr(at, "<text x=\"")); texts++) {
        double x, y, width = 0;
        at += strlen("<text ");
        assert_int_equal(sscanf(at, "x=\"%lf\" y=\"%lf\"", &x, &y), 2);
        const char *text = strchr(at, '>') + 1;
        width = 7.5 * (double)strcspn(text, "<");
        const char *anchor = strstr(at, "text-anchor=\"");
        if (anchor && anchor < text) x -= !strncmp(anchor + 13, "middle", 6) ? width / 2 : width;
        assert_true(y >= 0 && y < 4000);
        if (x < end[(int)y] - 0.01 || x + width > COMPARE_WIDTH)
            fail_msg("'%.60s' begins at %g, expected it between %g and %d", text, x, end[(int)y],
                     COMPARE_WIDTH);
        end[(int)y] = x + width;
    }
    assert_true(texts > 20);
}

static void test_picture_of_long_numbers(void **state) {
    (void)state;
    for (int few = 0; few < 2; few++) {
        static char weights[40000];
        compare c;
        error_text e;
        open_equal(&c, few ? "zero2" : "single,dp,ddp,zero1,zero2,zero3", weights);
        for (size_t i = 0; i < c.count; i++)
            for (int k = 0; k < RANKS; k++) {
                compare_rank *r = &c.result[i].rank[k];
                for (int m = 0; m < RT_CATEGORIES; m++) {
                    r->ledger.bytes[m] = (size_t)1e11 >> 2 * ((m + (int)i) % 6);
                    r->ledger.total_bytes += r->ledger.bytes[m];
                    r->ledger.total_peak_bytes = r->ledger.total_bytes;
                }
                for (int op = 0; op < DIST_OPS; op++)
                    r->traffic[op] = (dist_traffic){STEPS, 123456789012, (k + 1) * 123456789012.};
            }
        for (int t = 0; t < STEPS; t++) c.result[0].seconds[t] = 12345.6789;
        assert_int_equal(compare_judge(&c, directory, &e), 0);
        const char *svg = text_of(&c, compare_print_svg);
        check_texts(svg);
        const char *size = strstr(svg, " height=\"");
        assert_non_null(size);
        int height = atoi(size + strlen(" height=\""));
        for (const char *at = svg; (at = strstr(at, " y=\"")); at++)
            assert_in_range(atoi(at + 4), 1, height - 1);
        compare_free(&c);
    }
}

static int setup(void **state) {
    (void)state;
    return !mkdtemp(directory);
}

static int teardown(void **state) {
    (void)state;
    return remove_tree(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equal_strategies),
        cmocka_unit_test(test_differences),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_formulas),
        cmocka_unit_test(test_picture_of_long_numbers),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
