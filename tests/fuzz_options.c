/* fuzz_options.c - libFuzzer target: any bytes as a configuration file or, behind a first byte 'C', as a
 * command line with a word on every line.
 *
 *     clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz_options.c -o fuzz \
 *         -lcjson -lm
 *     ./fuzz --make-corpus DIR            writes valid files and command lines to begin from
 *     ./fuzz -max_total_time=600 DIR
 *
 * What is accepted must survive being written down and read again; what is rejected must give one line of
 * reason. Prints at its end how many inputs were accepted and rejected.
 */
#include <assert.h>

#include "train_options.h"

static size_t accepted, rejected;

__attribute__((destructor)) static void print_counts(void) {
    if (accepted + rejected)
        fprintf(stderr, "fuzz_options: %zu accepted, %zu rejected\n", accepted, rejected);
}

static char *write_down(const train_options *o) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddItemToObject(root, "options", options_to_json(&train_table, o));
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    assert(text);
    return text;
}

static void check_reason(const error_text *e) {
    assert(e->text[0] && strlen(e->text) < 500 && !strchr(e->text, '\n'));
}

static int parse_command_line(char *words, train_options *o, error_text *e) {
    char *argv[64] = {"./train"};
    int argc = 1;
    for (char *word = words; word && argc < 63; argc++) {
        argv[argc] = word;
        word = strchr(word, '\n');
        if (word) *word++ = 0;
    }
    for (int i = 1; i < argc; i++)
        if (strncmp(argv[i], "--config", 8) == 0)
            argv[i] = "--quiet"; /* not to read whatever file it names */
    int failed = options_parse(&train_table, argc, argv, o, e);
    if (!failed && o->state.argument_count) {
        assert(o->state.command == COMMAND_HELP &&
               o->state.arguments + o->state.argument_count <= argv + argc);
        FILE *nowhere = fopen("/dev/null", "w");
        assert(nowhere);
        if (options_help(&train_table, o->state.arguments[0], nowhere, e)) check_reason(e);
        fclose(nowhere);
    }
    return failed;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static train_options o, again;
    error_text e = {""};
    int failed = options_defaults(&train_table, &o, &e);
    assert(!failed);
    if (size && bytes[0] == 'C') {
        char *words = strndup((const char *)bytes + 1, size - 1);
        failed = parse_command_line(words, &o, &e);
        free(words);
    } else {
        failed = options_parse_json(&train_table, (const char *)bytes, size, "fuzzed", &o, &e);
    }
    if (failed) {
        rejected++;
        check_reason(&e);
        return 0;
    }
    accepted++;
    char *first = write_down(&o);
    assert(options_defaults(&train_table, &again, &e) == 0);
    assert(options_parse_json(&train_table, first, strlen(first), "written", &again, &e) == 0);
    memcpy(again.output_dir, o.output_dir, sizeof o.output_dir); /* it is not taken over */
    char *second = write_down(&again);
    assert(strcmp(first, second) == 0);
    free(first);
    free(second);
    return 0;
}

static int make_corpus(const char *directory) {
    static const char *const texts[] = {
        "{}",
        "{\"epochs\": 3, \"learning-rate\": 1e-3, \"shuffle\": false, \"dataset\": \"mnist\", \"depth\": "
        "null}",
        "{\"mean\": [0.1, 0.2, 0.3], \"std\": 0.5, \"image-size\": \"28x32\", \"model\": \"\\u00fc\"}",
        "{\"options\": {\"seed\": 9007199254740991, \"image-size\": 224, \"output-dir\": \"runs/a\"}, "
        "\"run\": {}}",
        "{\"mixup\": 0, \"prefetch\": 1, \"trace\": false, \"strategy\": \"ddp\", \"gradient-reduction\": "
        "\"last\"}",
        "Ctrain\n--epochs\n3\n--learning-rate=1e-3\n--no-shuffle\n--mean=0.1,0.2,0.3\n--image-size\n32x48",
        "Ceval\n--checkpoint\nruns/a\n--quiet\n--limit-val=100\n--std\n0.5",
        "Chelp\nmodel",
        "C--strategy=dp\n--nproc-per-node\n4\n--seed=7\n--optimizer\nsgd\n--output-dir\nruns/b",
    };
    error_text e;
    train_options *o = malloc(sizeof *o);
    char path[4096], *every = NULL;
    int failed = !o || options_defaults(&train_table, o, &e) || directory_make(directory, &e);
    if (!failed) every = write_down(o);
    for (size_t i = 0; !failed && i <= sizeof texts / sizeof *texts; i++) {
        const char *text = i < sizeof texts / sizeof *texts ? texts[i] : every;
        snprintf(path, sizeof path, "%s/made-%zu", directory, i);
        failed = file_write_atomic(path, text, strlen(text), &e);
    }
    if (failed) fprintf(stderr, "fuzz_options: %s\n", o ? e.text : "out of memory");
    free(every);
    free(o);
    return failed ? 1 : 0;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    if (*argc == 3 && strcmp((*argv)[1], "--make-corpus") == 0) exit(make_corpus((*argv)[2]));
    return 0;
}
