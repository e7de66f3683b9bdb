/* test_metrics.c - scores of a classifier against scikit-learn's, and the lines of metrics.jsonl.
 *
 * golden/metrics.json was computed by golden/make_golden.py, which has the formula of the labels, scores and
 * predictions; the small cases are counted by hand. */
#include <signal.h>
#include <sys/resource.h>
#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include "io/file.h"
#include "io/metrics.h"

#include <cmocka.h>

/* ------------------------------------------------------------------------------------------------- scores */

enum { MOST_CLASSES = 8 };

typedef struct {
    score_counts s;
    int64_t counts[3 * MOST_CLASSES];
} counted;

static counted *count_nothing(void) {
    counted *c = calloc(1, sizeof *c);
    assert_non_null(c);
    c->s.hit = c->counts;
    c->s.predicted = c->counts + MOST_CLASSES;
    c->s.actual = c->counts + 2 * MOST_CLASSES;
    return c;
}

static void assert_near(double found, double expected) { assert_true(fabs(found - expected) <= 1e-15); }

static double number(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    if (!cJSON_IsNumber(item)) fail_msg("found no number %s", key);
    return item->valuedouble;
}

static void scores_agree_with_scikit_learn(void **state) {
    (void)state;
    char *text;
    size_t length, cases = 0;
    error_text e;
    if (file_read_whole("tests/golden/metrics.json", 1 << 20, &text, &length, &e)) fail_msg("%s", e.text);
    cJSON *root = json_parse(text, length, JSON_ANY_NUMBERS, "metrics.json", &e);
    free(text);
    assert_non_null(root);
    uint64_t label_key = random_key(9, 4001, 0, 0), guess_key = random_key(9, 4000, 0, 0),
             score_key = random_key(9, 4002, 0, 0);
    const cJSON *golden;
    cJSON_ArrayForEach(golden, cJSON_GetObjectItemCaseSensitive(root, "cases")) {
        const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(golden, "name"));
        size_t samples = (size_t)number(golden, "samples"), classes = (size_t)number(golden, "classes");
        size_t guesses = classes - !strcmp(name, "last_class_never_predicted");
        counted *c = count_nothing();
        assert_true(classes <= MOST_CLASSES);
        for (size_t i = 0; i < samples; i++) {
            float logits[MOST_CLASSES] = {0};
            size_t label = random_below(label_key, i, classes);
            if (!strcmp(name, "scores"))
                for (size_t k = 0; k < classes; k++)
                    logits[k] = (float)random_uniform(score_key, classes * i + k);
            else
                logits[random_below(guess_key, i, guesses)] = 1;
            score_count(&c->s, logits, classes, label);
        }
        scores r = score_result(&c->s, classes);
        assert_int_equal(c->s.images, samples);
        assert_near(r.accuracy, number(golden, "accuracy"));
        assert_near(r.precision, number(golden, "precision"));
        assert_near(r.recall, number(golden, "recall"));
        assert_near(r.f1, number(golden, "f1"));
        if (!strcmp(name, "scores")) assert_near(r.top5_accuracy, number(golden, "top5_accuracy"));
        free(c);
        cases++;
    }
    assert_int_equal(cases, 3);
    cJSON_Delete(root);
}

/* Of equal logits the lower class comes first: a constant model is right for class 0 alone. */
static void ties_go_to_the_lower_class(void **state) {
    (void)state;
    counted *c = count_nothing();
    const float all_equal[7] = {0}, two_equal[7] = {0, 0, 3, 0, 0, 3, 0};
    for (size_t label = 0; label < 7; label++) score_count(&c->s, all_equal, 7, label);
    assert_int_equal(c->s.correct, 1);
    assert_int_equal(c->s.correct_top5, 5);
    assert_int_equal(c->s.predicted[0], 7);
    assert_int_equal(c->s.hit[0], 1);
    free(c);
    c = count_nothing();
    score_count(&c->s, two_equal, 7, 5);
    assert_int_equal(c->s.correct, 0);
    assert_int_equal(c->s.correct_top5, 1);
    assert_int_equal(c->s.predicted[2], 1);
    score_count(&c->s, two_equal, 7, 2);
    assert_int_equal(c->s.correct, 1);
    free(c);
}

static void fewer_than_five_classes_are_always_in_the_top_five(void **state) {
    (void)state;
    counted *c = count_nothing();
    for (size_t classes = 1; classes < 5; classes++)
        for (size_t label = 0; label < classes; label++) {
            float logits[4] = {4, 3, 2, 1};
            score_count(&c->s, logits, classes, label);
        }
    scores r = score_result(&c->s, 4);
    assert_true(r.top5_accuracy == 1);
    assert_true(r.accuracy == 4. / 10); /* once for each number of classes: label 0 */
    free(c);
}

/* Labels 0 0 1 1 1 of 5 classes, predicted 0 1 1 1 3. Class 0: p 1, r 1/2, F1 2/3; class 1: p 2/3, r 2/3,
 * F1 2/3; class 3 was predicted: 0, 0, 0; classes 2 and 4 occur nowhere and do not count. */
static void averages_are_over_the_classes_that_occur(void **state) {
    (void)state;
    const size_t labels[5] = {0, 0, 1, 1, 1}, predicted[5] = {0, 1, 1, 1, 3};
    counted *c = count_nothing();
    for (size_t i = 0; i < 5; i++) {
        float logits[5] = {0};
        logits[predicted[i]] = 1;
        score_count(&c->s, logits, 5, labels[i]);
    }
    scores r = score_result(&c->s, 5);
    assert_near(r.accuracy, 3. / 5);
    assert_near(r.precision, (1 + 2. / 3) / 3);
    assert_near(r.recall, (1. / 2 + 2. / 3) / 3);
    assert_near(r.f1, (2. / 3 + 2. / 3) / 3);
    free(c);
}

static void nothing_counted_gives_zeros(void **state) {
    (void)state;
    counted *c = count_nothing();
    scores r = score_result(&c->s, MOST_CLASSES), zeros = {0};
    assert_memory_equal(&r, &zeros, sizeof r);
    free(c);
}

/* ------------------------------------------------------------------------------------------ metrics.jsonl */

/* The line as it would be written; the caller frees the text. */
static char *line_text(cJSON *line) {
    char *text = cJSON_PrintUnformatted(line);
    assert_non_null(text);
    cJSON_Delete(line);
    return text;
}

static void numbers_have_nine_digits(void **state) {
    (void)state;
    cJSON *line = metrics_line("step");
    metrics_add_count(line, "step", 12);
    metrics_add_count(line, "large", UINT64_MAX);
    metrics_add(line, "third", 1. / 3);
    metrics_add(line, "whole", 2);
    metrics_add(line, "small", -1.25e-30);
    metrics_add(line, "nan", NAN);
    metrics_add(line, "infinite", -INFINITY);
    char *text = line_text(line);
    assert_string_equal(text, "{\"event\":\"step\",\"step\":12,\"large\":18446744073709551615,"
                              "\"third\":0.333333333,\"whole\":2,\"small\":-1.25e-30,\"nan\":null,"
                              "\"infinite\":null}");
    free(text);
}

/* Random bit patterns: normal, subnormal and negative numbers of every size. */
static void a_float_survives(void **state) {
    (void)state;
    size_t finite = 0;
    error_text e;
    for (uint64_t i = 0; i < 20000; i++) {
        uint32_t bits = (uint32_t)random_bits(77, i);
        float value, back;
        memcpy(&value, &bits, sizeof value);
        if (!isfinite(value)) continue;
        cJSON *line = metrics_line("step");
        metrics_add(line, "x", (double)value);
        char *text = line_text(line);
        cJSON *root = json_parse(text, strlen(text), JSON_ANY_NUMBERS, "line", &e);
        if (!root) fail_msg("%s: %s", text, e.text);
        back = (float)number(root, "x");
        assert_memory_equal(&back, &value, sizeof value);
        cJSON_Delete(root);
        free(text);
        finite++;
    }
    assert_true(finite > 19000);
}

/* Each line can be read as soon as it was written, and an existing file is continued. */
static void lines_are_appended_at_once(void **state) {
    (void)state;
    char path[] = "/tmp/test_metrics_XXXXXX", *text;
    size_t length;
    error_text e;
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    for (int part = 0; part < 2; part++) {
        metrics_file log;
        if (metrics_open(&log, path, SIZE_MAX, NULL, &e)) fail_msg("%s", e.text);
        cJSON *line = metrics_line("end");
        metrics_add_count(line, "steps", (uint64_t)part);
        if (metrics_write(&log, line, &e)) fail_msg("%s", e.text);
        if (file_read_whole(path, 1000, &text, &length, &e)) fail_msg("%s", e.text); /* before it is closed */
        assert_string_equal(text, part ? "{\"event\":\"end\",\"steps\":0}\n{\"event\":\"end\",\"steps\":1}\n"
                                       : "{\"event\":\"end\",\"steps\":0}\n");
        free(text);
        metrics_close(&log);
    }
    unlink(path);
}

/* A resumed run goes on behind the lines that its checkpoint knows of, and the line of the checkpoint
 * itself. */
static void what_a_checkpoint_does_not_know_is_cut(void **state) {
    static const char before[] = "{\"step\":1}\n{\"step\":2}\n",
                      own[] = "{\"event\":\"checkpoint\",\"step\":2,\"x\":1}\n",
                      after[] = "{\"step\":3}\n{\"st";
    static const struct {
        const char *kept;
        size_t length, expected;
    } cases[] = {{NULL, sizeof before - 1, sizeof before - 1},
                 {"{\"event\":\"checkpoint\",\"step\":2,", sizeof before - 1, sizeof before + sizeof own - 2},
                 {"{\"event\":\"checkpoint\",\"step\":1,", sizeof before - 1, sizeof before - 1},
                 {"{\"event\":\"checkpoint\",\"step\":2,", 0, 0},
                 {NULL, SIZE_MAX, sizeof before + sizeof own + sizeof after - 3}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[] = "/tmp/test_metrics_XXXXXX", whole[256], *text;
        metrics_file log;
        error_text e;
        size_t length, expected = cases[i].expected;
        int fd = mkstemp(path);
        snprintf(whole, sizeof whole, "%s%s%s", before, own, after);
        assert_int_equal(write(fd, whole, strlen(whole)), strlen(whole));
        close(fd);
        if (metrics_open(&log, path, cases[i].length, cases[i].kept, &e)) fail_msg("%s", e.text);
        if (metrics_write(&log, metrics_line("end"), &e)) fail_msg("%s", e.text);
        metrics_close(&log);
        if (file_read_whole(path, 1000, &text, &length, &e)) fail_msg("%s", e.text);
        assert_int_equal(length, expected + strlen("{\"event\":\"end\"}\n"));
        assert_memory_equal(text, whole, expected);
        assert_string_equal(text + expected, "{\"event\":\"end\"}\n");
        free(text);
        assert_int_equal(metrics_open(&log, path, 1000, NULL, &e), -1);
        assert_non_null(strstr(e.text, "bytes, expected the 1000 that the checkpoint tells of"));
        metrics_close(&log);
        unlink(path);
    }
}

/* A line for which there is no room leaves the file as it was, and later lines go on behind the last whole
 * one. */
static void a_line_that_does_not_fit_is_cut_off(void **state) {
    char path[] = "/tmp/test_metrics_XXXXXX", *text;
    const char *expected = "{\"event\":\"a\"}\n{\"event\":\"c\"}\n";
    struct rlimit limit, small;
    metrics_file log;
    error_text e;
    size_t length;
    (void)state;
    close(mkstemp(path));
    if (metrics_open(&log, path, SIZE_MAX, NULL, &e)) fail_msg("%s", e.text);
    assert_int_equal(metrics_write(&log, metrics_line("a"), &e), 0);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    small = limit;
    small.rlim_cur = 20; /* within the second line */
    setrlimit(RLIMIT_FSIZE, &small);
    int failed = metrics_write(&log, metrics_line("b"), &e);
    setrlimit(RLIMIT_FSIZE, &limit);
    assert_int_equal(failed, -1);
    assert_int_equal(metrics_write(&log, metrics_line("c"), &e), 0);
    metrics_close(&log);
    if (file_read_whole(path, 1000, &text, &length, &e)) fail_msg("%s", e.text);
    assert_string_equal(text, expected);
    free(text);
    unlink(path);
}

static void a_full_disk_is_an_error(void **state) {
    (void)state;
    metrics_file log;
    error_text e;
    if (access("/dev/full", W_OK)) {
        print_message("skipped: there is no /dev/full\n");
        skip();
    }
    if (metrics_open(&log, "/dev/full", SIZE_MAX, NULL, &e)) fail_msg("%s", e.text);
    assert_int_equal(metrics_write(&log, metrics_line("end"), &e), -1);
    assert_non_null(strstr(e.text, "/dev/full: cannot write 16 bytes at offset 0: No space left on device"));
    metrics_close(&log);
}

static void a_missing_folder_is_an_error(void **state) {
    (void)state;
    metrics_file log;
    error_text e;
    assert_int_equal(metrics_open(&log, "/nonexistent/metrics.jsonl", SIZE_MAX, NULL, &e), -1);
    assert_string_equal(e.text, "/nonexistent/metrics.jsonl: cannot be written: No such file or directory");
    metrics_close(&log);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scores_agree_with_scikit_learn),
        cmocka_unit_test(ties_go_to_the_lower_class),
        cmocka_unit_test(fewer_than_five_classes_are_always_in_the_top_five),
        cmocka_unit_test(averages_are_over_the_classes_that_occur),
        cmocka_unit_test(nothing_counted_gives_zeros),
        cmocka_unit_test(numbers_have_nine_digits),
        cmocka_unit_test(a_float_survives),
        cmocka_unit_test(lines_are_appended_at_once),
        cmocka_unit_test(what_a_checkpoint_does_not_know_is_cut),
        cmocka_unit_test(a_line_that_does_not_fit_is_cut_off),
        cmocka_unit_test(a_full_disk_is_an_error),
        cmocka_unit_test(a_missing_folder_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
