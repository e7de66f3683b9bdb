/* test_safetensors.c - the safetensors reader and writer.
 *
 * golden/safetensors_reference.safetensors was written by the format's own package (make_safetensors.py): it
 * must be read to the values that stand here, and written to the same bytes. Bad files are written by hand,
 * one fault each; whether a file is bad follows the package too, but for five faults that it lets pass: keys
 * that occur twice, padding that is no space, a header that begins with a space, a 0 in a name, and shapes of
 * numbers above 2^53 beside a 0.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>

#include "io/safetensors.h"

#include <cmocka.h>

#define REFERENCE "tests/golden/safetensors_reference.safetensors"

/* ------------------------------------------------------------------------------------------ the reference */

static const float matrix[12] = {-0.75f, -0.625f, -0.5f, -0.375f, -0.25f, -0.125f,
                                 0.0f,   0.125f,  0.25f, 0.375f,  0.5f,   0.625f};
/* 0, -0, 1, -2.5, 65504 (the largest half), 2^-14 (the smallest normal half), 2^-24 and -1023 * 2^-24
 * (subnormal), infinity, NaN; in binary16, and rounded to bfloat16. */
static const uint16_t half[10] = {0, 0x8000, 0x3C00, 0xC100, 0x7BFF, 0x0400, 0x0001, 0x83FF, 0x7C00, 0x7E00};
static const uint16_t brain[10] = {0, 0x8000, 0x3F80, 0xC020, 0x4780, 0x3880, 0x3380, 0xB880, 0x7F80, 0x7FC0};

static void test_reads_the_reference_file(void **state) {
    (void)state;
    error_text e;
    safetensors f;
    if (safetensors_open(REFERENCE, &f, &e)) fail_msg("%s", e.text);
    assert_int_equal(f.count, 11);
    assert_string_equal(safetensors_metadata(&f, "format"), "pt");
    assert_null(safetensors_metadata(&f, "Format"));
    assert_null(safetensors_find(&f, "matri"));
    assert_null(safetensors_find(&f, "__metadata__"));
    for (size_t i = 1; i < f.count; i++) assert_true(strcmp(f.tensors[i - 1].name, f.tensors[i].name) < 0);

    const st_tensor *t = safetensors_find(&f, "matrix");
    assert_non_null(t);
    assert_int_equal(t->dtype, ST_F32);
    assert_int_equal(t->rank, 2);
    assert_int_equal(t->shape[0], 3);
    assert_int_equal(t->shape[1], 4);
    assert_int_equal(t->count, 12);
    assert_int_equal(t->size, 48);
    float out[12];
    assert_int_equal(safetensors_read_f32(&f, t, 0, 12, out, &e), 0);
    assert_memory_equal(out, matrix, sizeof matrix);
    assert_int_equal(safetensors_read_f32(&f, t, 5, 3, out, &e), 0);
    assert_memory_equal(out, matrix + 5, 3 * sizeof *out);

    t = safetensors_find(&f, "double"); /* matrix / 3, rounded once */
    assert_int_equal(safetensors_read_f32(&f, t, 0, 12, out, &e), 0);
    for (size_t i = 0; i < 12; i++) assert_true(out[i] == (float)((double)matrix[i] / 3.0));

    t = safetensors_find(&f, "scalar");
    assert_int_equal(t->rank, 0);
    assert_int_equal(t->count, 1);
    assert_int_equal(safetensors_read_f32(&f, t, 0, 1, out, &e), 0);
    assert_true(out[0] == 3.5f);

    t = safetensors_find(&f, "empty");
    assert_int_equal(t->rank, 2);
    assert_int_equal(t->count, 0);
    assert_int_equal(safetensors_read_f32(&f, t, 0, 0, out, &e), 0);
    assert_non_null(safetensors_find(&f, "quoted \"\\ \n \xC3\xBC"));
    safetensors_close(&f);
    safetensors_close(&f); /* twice does no harm */
}

static void test_converts_half_and_bfloat_exactly(void **state) {
    (void)state;
    error_text e;
    safetensors f;
    if (safetensors_open(REFERENCE, &f, &e)) fail_msg("%s", e.text);
    const float expected[10] = {0.0f,     -0.0f, 1.0f, -2.5f, 65504.0f, 0x1p-14f, 0x1p-24f, -1023 * 0x1p-24f,
                                INFINITY, NAN};
    float out[10];
    const st_tensor *t = safetensors_find(&f, "half");
    assert_int_equal(safetensors_read_f32(&f, t, 0, 10, out, &e), 0);
    assert_memory_equal(out, expected, 9 * sizeof *out);
    assert_true(isnan(out[9]));
    t = safetensors_find(&f, "brain");
    assert_int_equal(safetensors_read_f32(&f, t, 0, 10, out, &e), 0);
    for (size_t i = 0; i < 10; i++) {
        uint32_t bits;
        memcpy(&bits, &out[i], 4);
        assert_int_equal(bits, (uint32_t)brain[i] << 16);
    }
    safetensors_close(&f);
}

/* Every half: the sign, exponent and significand taken apart with arithmetic instead of bits. */
static void test_converts_every_half(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        uint8_t bytes[2] = {h & 255, h >> 8};
        float found = st_read_f16(bytes), sign = h >= 32768 ? -1.0f : 1.0f;
        unsigned exponent = h % 32768 / 1024, significand = h % 1024;
        float expected = exponent ? ldexpf(1024.0f + (float)significand, (int)exponent - 25)
                                  : ldexpf((float)significand, -24);
        if (exponent == 31) expected = significand ? NAN : INFINITY;
        if (exponent == 31 && significand)
            assert_true(isnan(found));
        else
            assert_true(found == sign * expected && signbit(found) == signbit(sign));
    }
}

static void test_read_refuses_other_types_and_ranges(void **state) {
    (void)state;
    error_text e;
    safetensors f;
    float out[12];
    if (safetensors_open(REFERENCE, &f, &e)) fail_msg("%s", e.text);
    assert_int_equal(safetensors_read_f32(&f, safetensors_find(&f, "counters"), 0, 2, out, &e), -1);
    assert_string_equal(e.text,
                        REFERENCE ": tensor 'counters': found dtype I64, expected F32, BF16, F16 or F64");
    assert_int_equal(safetensors_read_f32(&f, safetensors_find(&f, "matrix"), 10, 3, out, &e), -1);
    assert_string_equal(e.text, REFERENCE ": tensor 'matrix': asked for 3 elements from 10 on, found 12");
    assert_int_equal(safetensors_read_f32(&f, safetensors_find(&f, "matrix"), 13, SIZE_MAX, out, &e), -1);
    safetensors_close(&f);
}

/* ------------------------------------------------------------------------------------------------ writing */

static int make_directory(void **state) {
    char template[] = "/tmp/test_safetensors_XXXXXX";
    if (!mkdtemp(template)) return -1;
    *state = strdup(template);
    return *state ? 0 : -1;
}

static int remove_directory(void **state) {
    char path[256];
    snprintf(path, sizeof path, "%s/model.safetensors", (char *)*state);
    unlink(path);
    int failed = rmdir(*state); /* fails where a test left another file behind */
    free(*state);
    return failed;
}

static void test_writes_the_reference_file_byte_for_byte(void **state) {
    char path[256];
    snprintf(path, sizeof path, "%s/model.safetensors", (char *)*state);
    float another[12], scalar = 3.5f, quoted = 7.0f;
    double third[12];
    for (size_t i = 0; i < 12; i++) another[i] = 3 * matrix[i], third[i] = (double)matrix[i] / 3.0;
    const int64_t counters[2] = {-1, (int64_t)1 << 62};
    const uint8_t bytes[3] = {1, 2, 255}, flags[2] = {1, 0};
    st_tensor t[] = {
        {.name = "matrix", .dtype = ST_F32, .rank = 2, .shape = (size_t[]){3, 4}},
        {.name = "another.weight", .dtype = ST_F32, .rank = 3, .shape = (size_t[]){2, 1, 6}},
        {.name = "scalar", .dtype = ST_F32},
        {.name = "empty", .dtype = ST_F32, .rank = 2, .shape = (size_t[]){0, 5}},
        {.name = "double", .dtype = ST_F64, .rank = 1, .shape = (size_t[]){12}},
        {.name = "half", .dtype = ST_F16, .rank = 1, .shape = (size_t[]){10}},
        {.name = "brain", .dtype = ST_BF16, .rank = 1, .shape = (size_t[]){10}},
        {.name = "counters", .dtype = ST_I64, .rank = 1, .shape = (size_t[]){2}},
        {.name = "bytes", .dtype = ST_U8, .rank = 1, .shape = (size_t[]){3}},
        {.name = "flags", .dtype = ST_BOOL, .rank = 1, .shape = (size_t[]){2}},
        {.name = "quoted \"\\ \n \xC3\xBC", .dtype = ST_F32, .rank = 1, .shape = (size_t[]){1}},
    };
    const void *elements[] = {matrix, another,  &scalar, NULL,  third,  half,
                              brain,  counters, bytes,   flags, &quoted};
    const size_t count = sizeof t / sizeof *t;
    error_text e;
    st_plan plan;
    int fd;
    if (safetensors_plan(path, t, count, NULL, 0, &plan, &e)) fail_msg("%s", e.text);
    if (safetensors_create(path, &plan, &fd, &e)) fail_msg("%s", e.text);
    struct stat status;
    assert_int_equal(fstat(fd, &status), 0);
    assert_int_equal(status.st_size, plan.file_size); /* before any data */
    for (size_t i = count; i-- > 0;) {                /* in two parts, and backwards, as ranks may do */
        size_t first = t[i].count / 3, width = st_dtypes[t[i].dtype].bits / 8;
        const char *rest = elements[i] ? (const char *)elements[i] + first * width : NULL;
        if (safetensors_write(fd, path, &t[i], first, t[i].count - first, rest, &e)) fail_msg("%s", e.text);
        if (safetensors_write(fd, path, &t[i], 0, first, elements[i], &e)) fail_msg("%s", e.text);
    }
    assert_int_equal(file_close_synced(fd, path, &e), 0);
    safetensors_plan_free(&plan);

    char *found, *expected;
    size_t found_size, expected_size;
    if (file_read_whole(path, 1 << 20, &found, &found_size, &e)) fail_msg("%s", e.text);
    if (file_read_whole(REFERENCE, 1 << 20, &expected, &expected_size, &e)) fail_msg("%s", e.text);
    assert_int_equal(found_size, expected_size);
    assert_memory_equal(found, expected, expected_size);
    free(found);
    free(expected);
}

static void test_plans_offsets_and_metadata(void **state) {
    (void)state;
    st_tensor t[] = {{.name = "b", .dtype = ST_F16, .rank = 1, .shape = (size_t[]){3}},
                     {.name = "c", .dtype = ST_F32, .rank = 1, .shape = (size_t[]){2}},
                     {.name = "a", .dtype = ST_F32, .rank = 1, .shape = (size_t[]){1}}};
    const st_pair pairs[] = {{"step", "123"}};
    error_text e;
    st_plan plan;
    if (safetensors_plan("x", t, 3, pairs, 1, &plan, &e)) fail_msg("%s", e.text);
    const char *header = "{\"__metadata__\":{\"format\":\"pt\",\"step\":\"123\"},"
                         "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                         "\"c\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]},"
                         "\"b\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[12,18]}}";
    uint64_t length;
    memcpy(&length, plan.header, 8);
    assert_int_equal(plan.header_size, 8 + length);
    assert_int_equal(length % 8, 0);
    assert_true(length >= strlen(header) && length < strlen(header) + 8);
    assert_memory_equal(plan.header + 8, header, strlen(header));
    for (size_t i = strlen(header); i < length; i++) assert_int_equal(plan.header[8 + i], ' ');
    assert_int_equal(t[2].offset, plan.header_size);
    assert_int_equal(t[1].offset, plan.header_size + 4);
    assert_int_equal(t[0].offset, plan.header_size + 12);
    assert_int_equal(t[0].size, 6);
    assert_int_equal(plan.file_size, plan.header_size + 18);
    safetensors_plan_free(&plan);
}

static void test_plan_refuses_what_the_reader_would(void **state) {
    (void)state;
    const size_t huge[] = {(size_t)1 << 40, (size_t)1 << 40};
    const struct {
        st_tensor tensors[2];
        size_t count, pair_count;
        const char *message;
    } cases[] = {
        {{{.name = "a", .dtype = ST_F32}, {.name = "a", .dtype = ST_F16}},
         2,
         0,
         "x: found the key 'a' twice, expected it once"},
        {{{.name = "__metadata__", .dtype = ST_F32}},
         1,
         0,
         "x: found the key '__metadata__' twice, expected it once"},
        {{{.name = "a", .dtype = ST_F32}}, 1, 1, "x: found the key 'format' twice, expected it once"},
        {{{.name = "\xFF", .dtype = ST_F32}},
         1,
         0,
         "x: found bytes that are not UTF-8 at byte 33 of 84, expected valid JSON"},
        {{{.name = "a", .dtype = ST_F32, .rank = 2, .shape = huge}},
         1,
         0,
         "x: tensor 'a': found a shape of 2^64 bits of F32 or more"},
        {{{.name = "a", .dtype = ST_U64, .rank = 1, .shape = huge}, {.name = "b", .dtype = ST_F4}},
         2,
         0,
         "x: tensor 'b': found 1 elements of F4, expected whole bytes"},
    };
    const st_pair pairs[] = {{"format", "np"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        st_tensor t[2] = {cases[i].tensors[0], cases[i].tensors[1]};
        error_text e = {""};
        st_plan plan;
        assert_int_equal(safetensors_plan("x", t, cases[i].count, pairs, cases[i].pair_count, &plan, &e), -1);
        assert_string_equal(e.text, cases[i].message);
        assert_null(plan.header);
    }
}

static void test_write_refuses_ranges_outside(void **state) {
    (void)state;
    st_tensor t = {.name = "a", .dtype = ST_F32, .rank = 1, .shape = (size_t[]){4}};
    const float values[4] = {0};
    error_text e;
    st_plan plan;
    assert_int_equal(safetensors_plan("x", &t, 1, NULL, 0, &plan, &e), 0);
    assert_int_equal(safetensors_write(-1, "x", &t, 3, 2, values, &e), -1);
    assert_string_equal(e.text, "x: tensor 'a': asked to write 2 elements from 3 on, found 4 of 32 bits");
    assert_int_equal(safetensors_write(-1, "x", &t, 5, 0, values, &e), -1);
    assert_int_equal(safetensors_write(-1, "x", &t, 1, 2, values, &e), -1); /* a closed file */
    assert_non_null(strstr(e.text, "x: cannot write 8 bytes at offset "));
    safetensors_plan_free(&plan);
}

/* A file size limit stands for a full disk: nothing of the file is left, and the message names it. */
static void test_create_notices_a_full_disk(void **state) {
    char path[256];
    snprintf(path, sizeof path, "%s/model.safetensors", (char *)*state);
    st_tensor t = {.name = "a", .dtype = ST_F32, .rank = 1, .shape = (size_t[]){1 << 20}};
    error_text e;
    st_plan plan;
    int fd;
    assert_int_equal(safetensors_plan(path, &t, 1, NULL, 0, &plan, &e), 0);
    struct rlimit before, limit;
    getrlimit(RLIMIT_FSIZE, &before);
    limit = before;
    limit.rlim_cur = 1 << 20;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    int failed = safetensors_create(path, &plan, &fd, &e);
    setrlimit(RLIMIT_FSIZE, &before);
    assert_int_equal(failed, -1);
    assert_non_null(strstr(e.text, "model.safetensors: no room for 4194"));
    assert_int_equal(access(path, F_OK), -1);

    assert_int_equal(safetensors_create("/nowhere/model.safetensors", &plan, &fd, &e), -1);
    assert_string_equal(e.text, "/nowhere/model.safetensors: cannot be created: No such file or directory");
    safetensors_plan_free(&plan);
}

/* ------------------------------------------------------------------------------------------ malformations */

/* Parses header and data, of exactly their size so that a sanitizer sees any byte read too many. */
static int parse(const char *header, size_t header_length, uint64_t claimed, size_t data, error_text *e) {
    size_t size = 8 + header_length + data;
    uint8_t *bytes = calloc(size, 1);
    assert_non_null(bytes);
    memcpy(bytes, &claimed, 8);
    memcpy(bytes + 8, header, header_length);
    safetensors f;
    int failed = safetensors_parse(bytes, size, "m", &f, e);
    if (failed) assert_null(f.tensors);
    if (!failed) safetensors_close(&f);
    free(bytes);
    return failed;
}

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}"
#define TENSOR(dtype, shape, offsets)                                                                        \
    "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void test_names_every_malformation(void **state) {
    (void)state;
    const struct {
        const char *header;
        size_t data;
        const char *message;
    } cases[] = {
        {"", 0, "m: found a header that is not {...} with nothing but spaces behind"},
        {"[]", 0, "m: found a header that is not {...} with nothing but spaces behind"},
        {" {" A "}", 4, "m: found a header that is not {...} with nothing but spaces behind"},
        {"{" A "}\n", 4, "m: found a header that is not {...} with nothing but spaces behind"},
        {"{" A "", 4, "m: found invalid or truncated JSON near byte 53 of 53"},
        {"{" A "}}", 4, "m: found invalid or truncated JSON near byte 54 of 55"},
        {"{" A ",}", 4, "m: found invalid or truncated JSON near byte 55 of 55"},
        {"{'a':1}", 0, "m: found invalid or truncated JSON near byte 2 of 7"},
        {"{\"\xC0\xAF\":1}", 0, "m: found bytes that are not UTF-8 at byte 2 of 8, expected valid JSON"},
        {"{\"a\tb\":1}", 0, "m: found a control character at byte 3 of 9, expected valid JSON"},
        {"{\"a\\u0000b\":1}", 0, "m: found a 0 in a string at byte 3 of 14, expected valid JSON"},
        {"{" A "," A "}", 4, "m: found the key 'a' twice, expected it once"},
        {"{" A ",\"\\u0061\":1}", 4, "m: found the key 'a' twice, expected it once"},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 0,
         "m: found the key 'dtype' twice, expected it once"},
        {"{\"__metadata__\":[]," A "}", 4, "m: found an array as __metadata__, expected an object"},
        {"{\"__metadata__\":{\"step\":3}," A "}", 4,
         "m: found a number as 'step' of __metadata__, expected a string"},
        {"{\"a\":3}", 0, "m: tensor 'a': found a number, expected an object"},
        {"{\"a\":{}}", 0, "m: tensor 'a': found nothing as dtype, expected a string"},
        {TENSOR("32", "[1]", "[0,4]"), 4, "m: tensor 'a': found a number as dtype, expected a string"},
        {TENSOR("\"F33\"", "[1]", "[0,4]"), 4,
         "m: tensor 'a': found dtype 'F33', expected one of the format's, such as F32"},
        {"{\"a\":{\"dtype\":\"F32\"}}", 0, "m: tensor 'a': found nothing as shape, expected an array"},
        {TENSOR("\"F32\"", "1", "[0,4]"), 4, "m: tensor 'a': found a number as shape, expected an array"},
        {TENSOR("\"F32\"", "[-1]", "[0,4]"), 4,
         "m: tensor 'a': found another number in shape, expected whole numbers in [0, 2^53)"},
        {TENSOR("\"F32\"", "[-0]", "[0,0]"), 0,
         "m: tensor 'a': found another number in shape, expected whole numbers in [0, 2^53)"},
        {TENSOR("\"F32\"", "[9007199254740992]", "[0,4]"), 4,
         "m: tensor 'a': found another number in shape, expected whole numbers in [0, 2^53)"},
        {TENSOR("\"F32\"", "[\"1\"]", "[0,4]"), 4,
         "m: tensor 'a': found a string in shape, expected whole numbers in [0, 2^53)"},
        {TENSOR("\"F32\"", "[1.5]", "[0,4]"), 4,
         "m: found a number with a point or an exponent at byte 29 of 56, expected whole numbers"},
        {TENSOR("\"F32\"", "[1e0]", "[0,4]"), 4,
         "m: found a number with a point or an exponent at byte 29 of 56, expected whole numbers"},
        {TENSOR("\"F32\"", "[01]", "[0,4]"), 4,
         "m: found a malformed number at byte 29 of 55, expected valid JSON"},
        {TENSOR("\"F32\"", "[4294967296,4294967296]", "[0,4]"), 4,
         "m: tensor 'a': found a shape of 2^64 bits of F32 or more"},
        {TENSOR("\"F32\"", "[4294967296,134217728]", "[0,4]"), 4, /* 2^59 elements: only the bits overflow */
         "m: tensor 'a': found a shape of 2^64 bits of F32 or more"},
        {TENSOR("\"F4\"", "[3]", "[0,2]"), 2, "m: tensor 'a': found 3 elements of F4, expected whole bytes"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4,
         "m: tensor 'a': found nothing as data_offsets, expected [begin, end] in [0, 2^53)"},
        {TENSOR("\"F32\"", "[1]", "[4]"), 4,
         "m: tensor 'a': found another array as data_offsets, expected [begin, end] in [0, 2^53)"},
        {TENSOR("\"F32\"", "[1]", "[0,4,4]"), 4,
         "m: tensor 'a': found another array as data_offsets, expected [begin, end] in [0, 2^53)"},
        {TENSOR("\"F32\"", "[1]", "[4,0]"), 4,
         "m: tensor 'a': found another array as data_offsets, expected [begin, end] in [0, 2^53)"},
        {TENSOR("\"F32\"", "[1]", "[0,18446744073709551620]"), 4,
         "m: tensor 'a': found another array as data_offsets, expected [begin, end] in [0, 2^53)"},
        {TENSOR("\"F32\"", "[1]", "[0,8]"), 8,
         "m: tensor 'a': found 8 bytes by data_offsets, expected 4 (1 elements of F32)"},
        {TENSOR("\"F32\"", "[1]", "[4,8]"), 8,
         "m: tensor 'a': found its data at byte 66 of the file, expected 62 (there is a hole)"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}", 6,
         "m: tensor 'b': found its data at byte 117 of the file, expected 119 (it overlaps another tensor)"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
         "(it overlaps another tensor)"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[2,2]}}", 4,
         "(it overlaps another tensor)"},
        {"{" A "}", 3, "m: found a file of 65 bytes, expected 66 by its header"},
        {"{" A "}", 5, "m: found a file of 67 bytes, expected 66 by its header"},
        {"{}", 1, "m: found a file of 11 bytes, expected 10 by its header"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error_text e = {"accepted"};
        size_t length = strlen(cases[i].header);
        int failed = parse(cases[i].header, length, length, cases[i].data, &e);
        if (failed != -1 || !strstr(e.text, cases[i].message) || strchr(e.text, '\n'))
            fail_msg("%s\nfound    %s\nexpected %s", cases[i].header, e.text, cases[i].message);
    }
}

static void test_accepts_unusual_but_valid_headers(void **state) {
    (void)state;
    const struct {
        const char *header;
        size_t data;
    } cases[] = {
        {"{}", 0},
        {"{}      ", 0},
        {"{ \"__metadata__\" : {} }", 0},
        {"{" A "}", 4},
        {"{\"\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4],\"more\":[{}]}}", 4},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}",
         4}, /* an empty one, anywhere */
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[9,0],\"data_offsets\":[4,4]}}", 4},
        {TENSOR("\"F6_E2M3\"", "[4]", "[0,3]"), 3},
        {TENSOR("\"F32\"", "[0,9007199254740991,9007199254740991]", "[0,0]"), 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error_text e = {""};
        size_t length = strlen(cases[i].header);
        if (parse(cases[i].header, length, length, cases[i].data, &e)) fail_msg("%s", e.text);
    }
}

static void test_refuses_impossible_header_lengths(void **state) {
    (void)state;
    error_text e;
    safetensors f;
    const uint8_t seven[7] = {0};
    assert_int_equal(safetensors_parse(seven, 7, "m", &f, &e), -1);
    assert_string_equal(e.text, "m: found a file of 7 bytes, expected at least 8");
    assert_int_equal(parse("{}", 2, 3, 0, &e), -1);
    assert_string_equal(e.text, "m: found a header of 3 bytes, expected at most 100000000 and 2 (file)");
    assert_int_equal(parse("{}", 2, UINT64_MAX, 0, &e), -1);
    assert_string_equal(
        e.text, "m: found a header of 18446744073709551615 bytes, expected at most 100000000 and 2 (file)");
    assert_int_equal(parse("{}", 2, 100000001, 100000001, &e), -1); /* there, but too long */
    assert_non_null(strstr(e.text, "m: found a header of 100000001 bytes, expected at most 100000000"));
    assert_int_equal(parse("{}\0", 3, 3, 0, &e), -1);
}

/* Names out of a file may hold anything: messages stay one short line. */
static void test_messages_stay_one_line(void **state) {
    (void)state;
    char header[1200] = "{\"a\\nb\\u001b", *end = header + strlen(header);
    memset(end, 'x', 1000);
    strcpy(end + 1000, "\":1}");
    error_text e;
    assert_int_equal(parse(header, strlen(header), strlen(header), 0, &e), -1);
    assert_non_null(strstr(e.text, "m: tensor 'a?b?xxx"));
    assert_non_null(strstr(e.text, "xxx...': found a number, expected an object"));
    assert_true(strlen(e.text) < 150);
}

static void test_cut_anywhere_the_file_is_refused(void **state) {
    (void)state;
    error_text e;
    char *bytes;
    size_t size;
    if (file_read_whole(REFERENCE, 1 << 20, &bytes, &size, &e)) fail_msg("%s", e.text);
    for (size_t cut = 0; cut < size; cut++) {
        uint8_t *part = malloc(cut + !cut);
        memcpy(part, bytes, cut);
        safetensors f;
        assert_int_equal(safetensors_parse(part, cut, "m", &f, &e), -1);
        free(part);
    }
    free(bytes);
}

static void test_open_names_missing_and_wrong_files(void **state) {
    error_text e;
    safetensors f;
    char path[256];
    assert_int_equal(safetensors_open("/nowhere/model.safetensors", &f, &e), -1);
    assert_string_equal(e.text, "/nowhere/model.safetensors: cannot be opened: No such file or directory");
    assert_int_equal(safetensors_open("/tmp", &f, &e), -1);
    assert_string_equal(e.text, "/tmp: found no regular file, expected one");
    assert_int_equal(safetensors_open("/dev/zero", &f, &e), -1);
    assert_string_equal(e.text, "/dev/zero: found no regular file, expected one");
    snprintf(path, sizeof path, "%s/model.safetensors", (char *)*state);
    assert_int_equal(file_write_atomic(path, "", 0, &e), 0);
    assert_int_equal(safetensors_open(path, &f, &e), -1);
    assert_non_null(strstr(e.text, "found a file of 0 bytes, expected at least 8"));
    assert_int_equal(file_write_atomic(path, "\2\0\0\0\0\0\0\0[]", 10, &e), 0);
    assert_int_equal(safetensors_open(path, &f, &e), -1);
    safetensors_close(&f);
}

/* 20,000 tensors: found by name, and a header of 1.5 MB in a time that shows that nothing is quadratic. */
static void test_finds_among_many_tensors(void **state) {
    (void)state;
    enum { COUNT = 20000 };
    st_tensor *t = calloc(COUNT, sizeof *t);
    char(*names)[32] = calloc(COUNT, sizeof *names);
    assert_true(t && names);
    const size_t shape[1] = {2};
    for (size_t i = 0; i < COUNT; i++) {
        snprintf(names[i], sizeof *names, "blocks.%zu.weight", i);
        t[i] = (st_tensor){.name = names[i], .dtype = ST_F32, .rank = 1, .shape = shape};
    }
    error_text e;
    st_plan plan;
    safetensors f;
    if (safetensors_plan("x", t, COUNT, NULL, 0, &plan, &e)) fail_msg("%s", e.text);
    if (safetensors_parse(plan.header, plan.file_size, "x", &f, &e)) fail_msg("%s", e.text);
    for (size_t i = 0; i < COUNT; i++) {
        const st_tensor *found = safetensors_find(&f, names[i]);
        assert_non_null(found);
        assert_int_equal(found->offset, t[i].offset);
    }
    assert_null(safetensors_find(&f, "blocks.20000.weight"));
    safetensors_close(&f);
    safetensors_plan_free(&plan);
    free(names);
    free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads_the_reference_file),
        cmocka_unit_test(test_converts_half_and_bfloat_exactly),
        cmocka_unit_test(test_converts_every_half),
        cmocka_unit_test(test_read_refuses_other_types_and_ranges),
        cmocka_unit_test_setup_teardown(test_writes_the_reference_file_byte_for_byte, make_directory,
                                        remove_directory),
        cmocka_unit_test(test_plans_offsets_and_metadata),
        cmocka_unit_test(test_plan_refuses_what_the_reader_would),
        cmocka_unit_test(test_write_refuses_ranges_outside),
        cmocka_unit_test_setup_teardown(test_create_notices_a_full_disk, make_directory, remove_directory),
        cmocka_unit_test(test_names_every_malformation),
        cmocka_unit_test(test_accepts_unusual_but_valid_headers),
        cmocka_unit_test(test_refuses_impossible_header_lengths),
        cmocka_unit_test(test_messages_stay_one_line),
        cmocka_unit_test(test_cut_anywhere_the_file_is_refused),
        cmocka_unit_test_setup_teardown(test_open_names_missing_and_wrong_files, make_directory,
                                        remove_directory),
        cmocka_unit_test(test_finds_among_many_tensors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
