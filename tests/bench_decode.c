/* bench_decode.c - how many JPEGs a second one core decodes. No test.
 *
 *     ./bench_decode DIRECTORY [COUNT]   COUNT of the JPEGs in it or up to three levels below, evenly spaced
 *     ./bench_decode DIRECTORY COUNT -   prints their names, then a round's seconds for each line of input
 *
 * Files are in memory before. Prints the median of ROUNDS rounds, in the thread's own time, which other
 * processes cannot take. The second form is for tests/bench_decode.py, which lets others have their turn in
 * between.
 */
#include <glob.h>
#include <time.h>

#include "data/decode.h"

enum { ROUNDS = 9 };

typedef struct {
    char *path;
    uint8_t *bytes;
    size_t size;
} jpeg_file;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void stop(const char *message) {
    fprintf(stderr, "bench_decode: %s\n", message);
    exit(1);
}

/* The JPEGs that match a pattern, appended to files. */
static size_t read_jpegs(const char *pattern, jpeg_file **files, size_t count) {
    glob_t found;
    error_text e;
    if (glob(pattern, 0, NULL, &found)) return count;
    *files = realloc(*files, (count + found.gl_pathc) * sizeof **files);
    if (!*files) stop("out of memory");
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char *bytes;
        size_t size;
        if (file_read_whole(found.gl_pathv[i], 1 << 30, &bytes, &size, &e)) continue; /* a directory */
        if (size > 3 && memcmp(bytes, "\xFF\xD8\xFF", 3) == 0)
            (*files)[count++] = (jpeg_file){strdup(found.gl_pathv[i]), (uint8_t *)bytes, size};
        else
            free(bytes);
    }
    globfree(&found);
    return count;
}

/* Seconds for decoding every `step`th file. */
static double decode_all(const jpeg_file *files, size_t count, size_t step) {
    double start = now();
    for (size_t i = 0; i < count; i += step) {
        image out;
        error_text e;
        if (image_decode(&out, files[i].bytes, files[i].size, files[i].path, &e)) stop(e.text);
        image_free(&out);
    }
    return now() - start;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    jpeg_file *files = NULL;
    size_t count = 0;
    char pattern[4200];
    if (argc < 2) stop("usage: bench_decode DIRECTORY [COUNT [-]]");
    for (const char *below = "/*/*/*/*"; *below; below += 2) {
        snprintf(pattern, sizeof pattern, "%s%s.[jJ][pP]*[gG]", argv[1], below);
        count = read_jpegs(pattern, &files, count);
    }
    size_t wanted = argc > 2 ? strtoull(argv[2], NULL, 10) : count, step = wanted ? count / wanted : 0;
    if (count == 0) stop("found no JPEGs");
    if (step == 0) step = 1;
    size_t used = (count + step - 1) / step;
    if (argc > 3) {
        printf("%zu\n", used);
        for (size_t i = 0; i < count; i += step) puts(files[i].path);
        for (fflush(stdout); getchar() != EOF; fflush(stdout))
            printf("%.9f\n", decode_all(files, count, step));
    } else {
        double seconds[ROUNDS], bytes = 0;
        for (int i = 0; i < ROUNDS; i++) seconds[i] = decode_all(files, count, step);
        qsort(seconds, ROUNDS, sizeof *seconds, compare);
        for (size_t i = 0; i < count; i += step) bytes += (double)files[i].size;
        printf("decoding: %.0f images/s, %.1f MB/s of %zu JPEGs on one core\n",
               (double)used / seconds[ROUNDS / 2], 1e-6 * bytes / seconds[ROUNDS / 2], used);
    }
    for (size_t i = 0; i < count; i++) free(files[i].path), free(files[i].bytes);
    free(files);
    return 0;
}
