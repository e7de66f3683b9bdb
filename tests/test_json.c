/* test_json.c - JSON from outside: what is refused although cJSON would take it, and numbers that survive.
 *
 * Which texts are JSON and which are not follows RFC 8259; Python's json agrees on all of them but for a key
 * that occurs twice and a 0 in a string, which are JSON, and refused here.
 */
#include <setjmp.h>
#include <stdarg.h>

#include "io/json.h"

#include <cmocka.h>

static const double interesting[] = {
    0.0,  -0.5,          0.1,     0.1 + 0.2,    1.0 / 3, 1e-8,   1e22,
    1e15, 1e16 / 3,      0x1p-53, 0x1p53 - 1.0, 0x1p60,  5e-324, 1.7976931348623157e308,
    -7.0, 123456789.125, 2e-5,    0.999,        1e100,   -1e-300};

static void test_refuses_what_is_no_json(void **state) {
    (void)state;
    const struct {
        const char *text, *message;
    } cases[] = {
        {"", "f: found invalid or truncated JSON near byte 0 of 0"},
        {" ", "f: found invalid or truncated JSON near byte"},
        {"{\"a\":1", "f: found invalid or truncated JSON near byte 6 of 6"},
        {"[1,2", "f: found invalid or truncated JSON near byte 4 of 4"},
        {"[1,]", "f: found invalid or truncated JSON near byte"},
        {"{\"a\":1}}", "f: found invalid or truncated JSON near byte 7 of 8"},
        {"[1] 2", "f: found invalid or truncated JSON near byte 4 of 5"},
        {"nul", "f: found invalid or truncated JSON near byte 0 of 3"},
        {"[NaN]", "f: found invalid or truncated JSON near byte 1 of 5"},
        {"[+1]", "f: found invalid or truncated JSON near byte 1 of 4"},
        {"[.5]", "f: found invalid or truncated JSON near byte 1 of 4"},
        {"[0x10]", "f: found invalid or truncated JSON near byte 2 of 6"},
        {"[-]", "f: found a malformed number at byte 1 of 3, expected valid JSON"},
        {"[-.5]", "f: found a malformed number at byte 1 of 5, expected valid JSON"},
        {"[01]", "f: found a malformed number at byte 1 of 4, expected valid JSON"},
        {"[-012]", "f: found a malformed number at byte 1 of 6, expected valid JSON"},
        {"[1.]", "f: found a malformed number at byte 1 of 4, expected valid JSON"},
        {"[1.e5]", "f: found a malformed number at byte 1 of 6, expected valid JSON"},
        {"[1e]", "f: found a malformed number at byte 1 of 4, expected valid JSON"},
        {"[1e+]", "f: found a malformed number at byte 1 of 5, expected valid JSON"},
        {"\"a\nb\"", "f: found a control character at byte 2 of 5, expected valid JSON"},
        {"[1,\v2]", "f: found a control character at byte 3 of 6, expected valid JSON"},
        {"\"\\u00g0\"", "f: found a malformed escape at byte 1 of 8, expected valid JSON"},
        {"\"\\u12\"", "f: found a malformed escape at byte 1 of 6, expected valid JSON"},
        {"\"\\x\"", "f: found invalid or truncated JSON near byte"},
        {"\"\\ud800\"", "f: found invalid or truncated JSON near byte"},
        {"\"\\udc00\\ud800\"", "f: found invalid or truncated JSON near byte"},
        {"\"a\\u0000b\"", "f: found a 0 in a string at byte 2 of 10, expected valid JSON"},
        {"\"\x80\"", "f: found bytes that are not UTF-8 at byte 1 of 3"},
        {"\"\xC1\xBF\"", "f: found bytes that are not UTF-8 at byte 1 of 4"},         /* a long form of 7F */
        {"\"\xE0\x9F\xBF\"", "f: found bytes that are not UTF-8 at byte 1 of 5"},     /* of 7FF */
        {"\"\xF0\x8F\xBF\xBF\"", "f: found bytes that are not UTF-8 at byte 1 of 6"}, /* of FFFF */
        {"\"\xED\xA0\x80\"", "f: found bytes that are not UTF-8 at byte 1 of 5"},     /* a surrogate */
        {"\"\xF4\x90\x80\x80\"", "f: found bytes that are not UTF-8 at byte 1 of 6"}, /* above 10FFFF */
        {"\"\xE2\x82\"", "f: found bytes that are not UTF-8 at byte 1 of 4"},         /* cut */
        {"{\"a\":1,\"b\":2,\"a\":3}", "f: found the key 'a' twice, expected it once"},
        {"[{\"b\":{\"x\":[],\"x\":[]}}]", "f: found the key 'x' twice, expected it once"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error_text e = {"accepted"};
        size_t length = strlen(cases[i].text);
        char *exact =
            malloc(length + !length); /* no 0 at its end, so that a sanitizer sees any byte too many */
        memcpy(exact, cases[i].text, length);
        assert_null(json_parse(exact, length, JSON_ANY_NUMBERS, "f", &e));
        free(exact);
        if (strncmp(e.text, cases[i].message, strlen(cases[i].message)) != 0)
            fail_msg("%s\nfound    %s\nexpected %s", cases[i].text, e.text, cases[i].message);
    }
    error_text e;
    assert_null(json_parse("[1]\0[2]", 7, JSON_ANY_NUMBERS, "f", &e));
    assert_string_equal(e.text, "f: found a control character at byte 3 of 7, expected valid JSON");
}

static void test_takes_json(void **state) {
    (void)state;
    const char *texts[] = {"0",
                           "-0",
                           "[ ]",
                           "{ }",
                           "\t[\r\n1 , 2.5e-3]\n",
                           "{\"a\":{\"a\":1},\"A\":2}",
                           "[\"\\\\u0000\"]",
                           "\"\\ud83d\\ude00 \xF0\x9F\x98\x80 \xEF\xBF\xBF \xC2\x80\"",
                           "[1E5, 1e+5, -1.0e-5, 0.0]",
                           "\"\x7F\""};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        error_text e;
        cJSON *root = json_parse(texts[i], strlen(texts[i]), JSON_ANY_NUMBERS, "f", &e);
        if (!root) fail_msg("%s: %s", texts[i], e.text);
        cJSON_Delete(root);
    }
}

static void test_whole_numbers_only(void **state) {
    (void)state;
    error_text e;
    cJSON *root = json_parse("[0, 12, -3, \"1.5\"]", 18, JSON_WHOLE_NUMBERS, "f", &e);
    assert_non_null(root);
    cJSON_Delete(root);
    const char *texts[] = {"[1.0]", "[1e0]", "[1E2]"};
    for (size_t i = 0; i < 3; i++) {
        assert_null(json_parse(texts[i], 5, JSON_WHOLE_NUMBERS, "f", &e));
        assert_string_equal(
            e.text, "f: found a number with a point or an exponent at byte 1 of 5, expected whole numbers");
    }
}

static void test_refuses_depth_without_end(void **state) {
    (void)state;
    enum { DEPTH = 1000000 };
    char *text = malloc(DEPTH);
    error_text e;
    memset(text, '[', DEPTH);
    assert_null(json_parse(text, DEPTH, JSON_ANY_NUMBERS, "f", &e));
    for (size_t i = 0; i + 5 <= DEPTH; i += 5) memcpy(text + i, "{\"a\":", 5);
    assert_null(json_parse(text, DEPTH, JSON_ANY_NUMBERS, "f", &e));
    free(text);
}

static void test_numbers_survive_printing(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof interesting / sizeof *interesting; i++) {
        cJSON *number = json_number(interesting[i]);
        char *text = cJSON_PrintUnformatted(number);
        error_text e;
        cJSON *back = json_parse(text, strlen(text), JSON_ANY_NUMBERS, "f", &e);
        assert_non_null(back);
        if (back->valuedouble != interesting[i]) fail_msg("%s is not %.17g", text, interesting[i]);
        cJSON_Delete(back);
        cJSON_Delete(number);
        free(text);
    }
    const struct {
        double x;
        const char *text;
    } cases[] = {{0.1, "0.1"},
                 {1e6, "1000000"},
                 {1e15, "1000000000000000"},
                 {-3.0, "-3"},
                 {9007199254740991.0, "9007199254740991"},
                 {0.1 + 0.2, "0.30000000000000004"},
                 {1.0 / 3, "0.3333333333333333"},
                 {2.5e-7, "2.5e-07"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[32];
        json_format(text, cases[i].x);
        assert_string_equal(text, cases[i].text);
    }
}

static void test_quote_makes_one_short_line(void **state) {
    (void)state;
    assert_string_equal(quote("plain", SIZE_MAX).text, "plain");
    assert_string_equal(quote("plain", 3).text, "pla");
    assert_string_equal(quote("a\nb\x1B[31m\x7F", SIZE_MAX).text, "a?b?[31m?");
    char text[200];
    for (size_t length = 60; length < 80; length++) {
        memset(text, 'x', length);
        text[length] = 0;
        quoted q = quote(text, SIZE_MAX);
        if (length <= 68)
            assert_string_equal(q.text, text);
        else
            assert_true(strlen(q.text) == 71 && strcmp(q.text + 68, "...") == 0);
    }
    for (size_t i = 0; i < 100; i += 2) memcpy(text + i, "\xC3\xBC", 2);
    text[100] = 0;
    for (size_t begin = 0; begin < 2; begin++) { /* cut between characters, wherever they begin */
        text[0] = begin ? 'x' : '\xC3';
        quoted q = quote(text + begin, SIZE_MAX);
        size_t length = strlen(q.text);
        assert_string_equal(q.text + length - 3, "...");
        assert_int_equal((unsigned char)q.text[length - 4], 0xBC);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refuses_what_is_no_json),  cmocka_unit_test(test_takes_json),
        cmocka_unit_test(test_whole_numbers_only),       cmocka_unit_test(test_refuses_depth_without_end),
        cmocka_unit_test(test_numbers_survive_printing), cmocka_unit_test(test_quote_makes_one_short_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
