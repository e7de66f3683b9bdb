/* fuzz_cifar.c - libFuzzer target: any bytes as a CIFAR-10 batch, and as its file of label names.
 *
 *     clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz_cifar.c -o fuzz_cifar -lz
 *     ./fuzz_cifar --make-corpus DIR        writes valid files to begin from
 *     ./fuzz_cifar -max_total_time=600 -max_len=20000 DIR
 *
 * A batch is accepted if, and only if, it consists of whole records with labels up to 9. Prints at its end
 * how many inputs were accepted (as a batch or as names) and rejected.
 */
#include <assert.h>
#include <sys/stat.h>

#include "data/cifar10.h"

static size_t accepted, rejected;

__attribute__((destructor)) static void print_counts(void) {
    if (accepted + rejected) fprintf(stderr, "fuzz_cifar: %zu accepted, %zu rejected\n", accepted, rejected);
}

static void assert_reason(const error_text *e) {
    assert(e->text[0] && strlen(e->text) < sizeof e->text - 1 && !strchr(e->text, '\n'));
}

static int parse_batch(const file_content *f) {
    dataset d = cifar10_empty();
    error_text e = {""};
    const size_t records = f->size / 3073, limit = 3;
    int valid = records > 0 && f->size % 3073 == 0;
    for (size_t i = 0; i < records; i++) valid &= f->bytes[i * 3073] < 10;
    int failed = cifar10_parse(&d, f, limit, &e);
    assert(failed == !valid * -1);
    if (failed) {
        assert_reason(&e);
        assert(d.count == 0);
    } else {
        size_t first = d.count;
        assert(first == (records < limit ? records : limit));
        if (first < limit) assert(cifar10_parse(&d, f, limit, &e) == 0); /* append it to itself */
        for (size_t i = 0; i < d.count; i++) {
            const uint8_t *record = f->bytes + (i < first ? i : i - first) * 3073;
            assert(d.labels[i] == record[0] && memcmp(d.pixels + i * 3072, record + 1, 3072) == 0);
        }
    }
    dataset_free(&d);
    return !failed;
}

static int parse_names(const file_content *f) {
    dataset d = cifar10_empty();
    error_text e = {""};
    int failed = cifar10_parse_names(&d, f, &e);
    if (failed) assert_reason(&e);
    for (size_t i = 0; i < d.classes; i++) {
        size_t length = strnlen(d.label_names[i], sizeof d.label_names[i]);
        assert(length < sizeof d.label_names[i] && !memchr(d.label_names[i], '\n', length));
    }
    dataset_free(&d);
    return !failed;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    file_content f = {"input", malloc(size + !size),
                      size}; /* a copy, so that every byte beyond it is caught */
    if (size) memcpy(f.bytes, bytes, size);
    if (parse_batch(&f) | parse_names(&f))
        accepted++;
    else
        rejected++;
    free(f.bytes);
    return 0;
}

static int write_bytes(const char *directory, const char *name, const void *bytes, size_t size) {
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    int failed = !file || fwrite(bytes, 1, size, file) != size;
    if (file) failed |= fclose(file) != 0;
    if (failed) fprintf(stderr, "fuzz_cifar: cannot write %s\n", path);
    return failed;
}

static int make_corpus(const char *directory) {
    static const char names[] = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n";
    static uint8_t batch[5 * CIFAR10_RECORD];
    int failed = 0;
    mkdir(directory, 0777);
    for (size_t i = 0; i < sizeof batch; i++) batch[i] = (uint8_t)(i / 100);
    for (size_t i = 0; i < 5; i++) batch[i * CIFAR10_RECORD] = (uint8_t)(9 - i);
    for (size_t records = 1; records <= 5; records++) {
        char name[32];
        snprintf(name, sizeof name, "batch-%zu", records);
        failed |= write_bytes(directory, name, batch, records * CIFAR10_RECORD);
    }
    return failed | write_bytes(directory, "names", names, sizeof names - 1);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    if (*argc == 3 && strcmp((*argv)[1], "--make-corpus") == 0) exit(make_corpus((*argv)[2]));
    return 0;
}
