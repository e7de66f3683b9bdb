/* fuzz_safetensors.c - libFuzzer target: any bytes as a safetensors file.
 *
 *     clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz_safetensors.c \
 *         -o fuzz -lcjson -lm
 *     ./fuzz --make-corpus DIR            writes valid files to begin from
 *     ./fuzz -max_total_time=600 DIR
 *
 * An accepted file must have its tensors in order, side by side and found by name; every element that can
 * be read is; and the writer must plan a file with the same tensors, which the reader accepts. A rejected one
 * must give one line of reason. Prints at its end how many inputs were accepted and rejected.
 */
#include <assert.h>

#include "io/safetensors.h"

static size_t accepted, rejected;

__attribute__((destructor)) static void print_counts(void) {
    if (accepted + rejected)
        fprintf(stderr, "fuzz_safetensors: %zu accepted, %zu rejected\n", accepted, rejected);
}

static void read_tensors(const safetensors *f) {
    error_text e = {""};
    size_t sum = 0;
    for (size_t i = 0; i < f->count; i++) {
        const st_tensor *t = &f->tensors[i];
        assert(i == 0 || strcmp(f->tensors[i - 1].name, t->name) < 0);
        assert(safetensors_find(f, t->name) == t);
        assert(t->size <= f->size && t->offset <= f->size - t->size);
        assert(t->count * st_dtypes[t->dtype].bits == t->size * 8);
        sum += t->size;
        float *values = malloc(t->count * sizeof *values + 1);
        bool readable = t->dtype == ST_F32 || t->dtype == ST_F64 || t->dtype == ST_F16 || t->dtype == ST_BF16;
        assert(values && safetensors_read_f32(f, t, 0, t->count, values, &e) == (readable ? 0 : -1));
        free(values);
    }
    uint64_t header;
    memcpy(&header, f->bytes, 8);
    assert(8 + header + sum == f->size);
}

static void write_again(const safetensors *f) {
    error_text e = {""};
    st_plan plan;
    safetensors again;
    st_tensor *t = calloc(f->count + 1, sizeof *t);
    assert(t);
    for (size_t i = 0; i < f->count; i++)
        t[i] = (st_tensor){.name = f->tensors[i].name,
                           .dtype = f->tensors[i].dtype,
                           .rank = f->tensors[i].rank,
                           .shape = f->tensors[i].shape};
    assert(safetensors_plan("planned", t, f->count, NULL, 0, &plan, &e) == 0);
    assert(safetensors_parse(plan.header, plan.file_size, "planned", &again, &e) == 0);
    assert(again.count == f->count);
    for (size_t i = 0; i < f->count; i++) {
        const st_tensor *a = &f->tensors[i], *b = &again.tensors[i];
        assert(strcmp(a->name, b->name) == 0 && a->dtype == b->dtype && a->rank == b->rank &&
               a->size == b->size);
        assert(a->rank == 0 || memcmp(a->shape, b->shape, a->rank * sizeof *a->shape) == 0);
        assert(b->offset == t[i].offset);
    }
    safetensors_close(&again);
    safetensors_plan_free(&plan);
    free(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    safetensors f;
    error_text e = {""};
    if (safetensors_parse(bytes, size, "fuzzed", &f, &e)) {
        rejected++;
        assert(strncmp(e.text, "fuzzed: ", 8) == 0 && strlen(e.text) < 500 && !strchr(e.text, '\n'));
        return 0;
    }
    accepted++;
    read_tensors(&f);
    write_again(&f);
    safetensors_metadata(&f, "format");
    safetensors_close(&f);
    return 0;
}

/* Headers with zeros as data, as the fuzzer best takes them apart; the data need no variety. */
static int make_corpus(const char *directory) {
    static const struct {
        const char *header;
        size_t data;
    } files[] = {
        {"{}", 0},
        {"{\"__metadata__\":{\"format\":\"pt\"}}    ", 0},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}", 24},
        {"{\"a\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[0,2]},"
         "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[2,8]}}",
         8},
        {"{\"__metadata__\":{\"format\":\"pt\",\"x\":\"\\u00fc\\\"\"},"
         "\"b\":{\"dtype\":\"F64\",\"shape\":[1,1,1],\"data_offsets\":[0,8]},"
         "\"empty\":{\"dtype\":\"I8\",\"shape\":[0,7],\"data_offsets\":[8,8]},"
         "\"c\":{\"dtype\":\"F6_E2M3\",\"shape\":[4],\"data_offsets\":[8,11]}}  ",
         11},
        {"{\"blocks.0.norm1.weight\":{\"shape\":[4],\"data_offsets\":[16,32],\"dtype\":\"F32\"},"
         "\"blocks.0.norm1.bias\":{\"data_offsets\":[0,16],\"dtype\":\"F32\",\"shape\":[4]}}",
         32},
    };
    error_text e;
    if (directory_make(directory, &e)) goto fail;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        uint8_t bytes[1024] = {0};
        char path[4096];
        uint64_t length = strlen(files[i].header);
        memcpy(bytes, &length, 8);
        memcpy(bytes + 8, files[i].header, length);
        snprintf(path, sizeof path, "%s/made-%zu", directory, i);
        if (file_write_atomic(path, bytes, 8 + length + files[i].data, &e)) goto fail;
    }
    return 0;
fail:
    fprintf(stderr, "fuzz_safetensors: %s\n", e.text);
    return 1;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    if (*argc == 3 && strcmp((*argv)[1], "--make-corpus") == 0) exit(make_corpus((*argv)[2]));
    return 0;
}
