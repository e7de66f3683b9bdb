/* fuzz_image.c - libFuzzer target: any bytes as an image file, then through the transforms.
 *
 *     clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -DHAVE_JPEG -I. tests/fuzz_image.c \
 *         -o fuzz_image -ljpeg -lz -lm
 *     ./fuzz_image --make-corpus DIR      copies the golden images, to begin from; runs from the root
 *     ./fuzz_image -max_total_time=600 DIR
 *
 * An accepted image must have pixels of the size that it says; a rejected one must give one line of reason
 * and nothing to free. Checksums of PNGs are set right first, as otherwise hardly any would get further.
 * Images may be smaller than in earnest, which bounds memory. Prints at its end how many inputs were accepted
 * and rejected.
 */
#include <assert.h>
#include <sys/stat.h>

#define DECODE_MOST_PIXELS ((size_t)1 << 20)
#include "data/decode.h"
#include "data/transform.h"

static size_t accepted, rejected;

__attribute__((destructor)) static void print_counts(void) {
    if (accepted + rejected) fprintf(stderr, "fuzz_image: %zu accepted, %zu rejected\n", accepted, rejected);
}

static void mend_checksums(uint8_t *bytes, size_t size) {
    size_t length;
    for (size_t at = 8; size >= 20 && at <= size - 12; at += 12 + length) {
        length = decode_big_endian(bytes + at);
        if (length > size - at - 12) return;
        unsigned long checksum = crc32(0, bytes + at + 4, (unsigned)length + 4);
        for (size_t i = 0; i < 4; i++) bytes[at + 8 + length + i] = (uint8_t)(checksum >> (24 - 8 * i));
    }
}

static void transform(const image *in) {
    image out;
    error_text e = {""};
    uint64_t key = random_key(in->pixels[0], RANDOM_AUGMENTATION, in->width, in->height);
    assert(transform_train(in, 9, 7, (resize_filter)(key & 1), key, &out, &e) == 0);
    assert(out.width == 9 && out.height == 7 && out.channels == 3);
    image_free(&out);
    assert(transform_eval(in, 8, 8, 0.9, (resize_filter)(key & 1), &out, &e) == 0);
    assert(out.width == 8 && out.height == 8 && out.channels == 3);
    image_free(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    image out;
    error_text e = {""};
    uint8_t *copy = malloc(size + 1);
    memcpy(copy, bytes, size);
    if (size >= 8 && memcmp(copy, "\x89PNG", 4) == 0) mend_checksums(copy, size);
    if (image_decode(&out, copy, size, "fuzz", &e) == 0) {
        accepted++;
        assert(out.channels == 3 && out.width > 0 && out.height > 0);
        assert(out.width <= DECODE_MOST_PIXELS / out.height);
        size_t sum = 0; /* reads every pixel */
        for (size_t i = 0; i < out.width * out.height * 3; i++) sum += out.pixels[i];
        assert(sum <= out.width * out.height * 3 * 255);
        transform(&out);
        image_free(&out);
    } else {
        rejected++;
        assert(!out.pixels && !strncmp(e.text, "fuzz: ", 6) && strlen(e.text) < sizeof e.text - 1);
        assert(!strchr(e.text, '\n'));
    }
    free(copy);
    return 0;
}

static int make_corpus(const char *directory) {
    char name[256], from[512], to[4200], *bytes;
    size_t size;
    error_text e;
    FILE *list = fopen("tests/golden/images/decode.txt", "r");
    int failed = !list;
    mkdir(directory, 0777);
    while (!failed && fscanf(list, "%255s %*u %*u %*x", name) == 1) {
        snprintf(from, sizeof from, "tests/golden/images/%s", name);
        snprintf(to, sizeof to, "%s/%s", directory, name);
        failed = file_read_whole(from, 1 << 20, &bytes, &size, &e);
        FILE *file = failed ? NULL : fopen(to, "wb");
        failed |= !file || fwrite(bytes, 1, size, file) != size;
        if (file) failed |= fclose(file) != 0;
        free(bytes);
    }
    if (list) fclose(list);
    if (failed) fprintf(stderr, "fuzz_image: cannot copy tests/golden/images to %s\n", directory);
    return failed ? 1 : 0;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    if (*argc == 3 && strcmp((*argv)[1], "--make-corpus") == 0) exit(make_corpus((*argv)[2]));
    return 0;
}
