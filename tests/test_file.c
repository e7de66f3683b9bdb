/* test_file.c - whole files, files that appear whole or not at all, directories. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>

#include "io/file.h"

#include <cmocka.h>

static int make_directory(void **state) {
    char template[] = "/tmp/test_file_XXXXXX";
    if (!mkdtemp(template) || chdir(template)) return -1;
    *state = strdup(template);
    return *state ? 0 : -1;
}

static int remove_directory(void **state) {
    unlink("f");
    rmdir("a/b/c");
    rmdir("a/b");
    rmdir("a");
    int failed = chdir("/") || rmdir(*state); /* fails where a test left another file behind */
    free(*state);
    return failed;
}

static void test_reads_back_what_it_wrote(void **state) {
    (void)state;
    const size_t sizes[] = {0, 1, 4095, 4096, 4097, 100000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *bytes = malloc(sizes[i] + 1), *found;
        for (size_t k = 0; k < sizes[i]; k++) bytes[k] = (char)(k * 7);
        size_t size;
        error_text e;
        if (file_write_atomic("f", bytes, sizes[i], &e)) fail_msg("%s", e.text);
        if (file_read_whole("f", sizes[i], &found, &size, &e)) fail_msg("%s", e.text);
        assert_int_equal(size, sizes[i]);
        assert_memory_equal(found, bytes, size);
        assert_int_equal(found[size], 0);
        assert_int_equal(access("f.tmp", F_OK), -1);
        free(found);
        free(bytes);
    }
}

static void test_read_fails_in_one_line(void **state) {
    (void)state;
    char *bytes;
    size_t size;
    error_text e;
    assert_int_equal(file_read_whole("missing", 100, &bytes, &size, &e), -1);
    assert_string_equal(e.text, "missing: cannot be opened: No such file or directory");
    assert_null(bytes);
    assert_int_equal(file_read_whole("/tmp", 100, &bytes, &size, &e), -1);
    assert_string_equal(e.text, "/tmp: cannot be read: Is a directory");
    assert_int_equal(file_write_atomic("f", "12345", 5, &e), 0);
    assert_int_equal(file_read_whole("f", 4, &bytes, &size, &e), -1);
    assert_string_equal(e.text, "f: found more than 4 bytes, expected no more");
    assert_int_equal(file_read_whole("/dev/zero", 1 << 20, &bytes, &size, &e), -1);
    assert_string_equal(e.text, "/dev/zero: found more than 1048576 bytes, expected no more");
    assert_null(bytes);
}

/* A file size limit stands for a full disk. */
static void test_failed_write_leaves_the_old_content(void **state) {
    (void)state;
    char *large = calloc(1, 100000), *found;
    size_t size;
    error_text e;
    assert_int_equal(file_write_atomic("f", "old", 3, &e), 0);
    struct rlimit before, limit;
    getrlimit(RLIMIT_FSIZE, &before);
    limit = before;
    limit.rlim_cur = 50000;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    int failed = file_write_atomic("f", large, 100000, &e);
    setrlimit(RLIMIT_FSIZE, &before);
    assert_int_equal(failed, -1);
    assert_string_equal(e.text, "f.tmp: cannot write 50000 bytes at offset 50000: File too large");
    assert_int_equal(access("f.tmp", F_OK), -1);
    assert_int_equal(file_read_whole("f", 100, &found, &size, &e), 0);
    assert_string_equal(found, "old");
    free(found);
    free(large);
}

static void test_write_fails_in_one_line(void **state) {
    (void)state;
    error_text e;
    assert_int_equal(file_write_atomic("missing/f", "", 0, &e), -1);
    assert_string_equal(e.text, "missing/f.tmp: cannot be created: No such file or directory");
    assert_int_equal(directory_make("a", &e), 0);
    assert_int_equal(file_write_atomic("a", "x", 1, &e), -1);
    assert_string_equal(e.text, "a.tmp: cannot be renamed to a: Is a directory");
    assert_int_equal(access("a.tmp", F_OK), -1);
    int fd = open("/dev/full", O_WRONLY);
    assert_true(fd >= 0);
    assert_int_equal(file_write_at(fd, "12345", 5, 7, "/dev/full", &e), -1);
    assert_string_equal(e.text, "/dev/full: cannot write 5 bytes at offset 7: No space left on device");
    close(fd);
    assert_int_equal(file_close_synced(-1, "f", &e), -1);
    assert_string_equal(e.text, "f: cannot be written: Bad file descriptor");
}

static void test_makes_directories(void **state) {
    error_text e;
    char path[300];
    assert_int_equal(directory_make("a/b/c", &e), 0);
    assert_int_equal(directory_make("a//b/c/", &e), 0); /* there already */
    assert_int_equal(directory_make(".", &e), 0);
    assert_int_equal(directory_make("/", &e), 0);
    snprintf(path, sizeof path, "%s/a/b", (char *)*state);
    assert_int_equal(directory_make(path, &e), 0);
    assert_int_equal(access("a/b/c", F_OK), 0);
    assert_int_equal(directory_sync("a", &e), 0);

    assert_int_equal(file_write_atomic("f", "", 0, &e), 0);
    assert_int_equal(directory_make("f", &e), -1);
    assert_string_equal(e.text, "f: cannot be made a directory: File exists");
    assert_int_equal(directory_make("f/d", &e), -1);
    assert_string_equal(e.text, "f: cannot be made a directory: File exists");
    assert_int_equal(directory_make("", &e), -1);
    assert_int_equal(directory_sync("missing", &e), -1);
    assert_string_equal(e.text, "missing: cannot be opened: No such file or directory");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_reads_back_what_it_wrote, make_directory, remove_directory),
        cmocka_unit_test_setup_teardown(test_read_fails_in_one_line, make_directory, remove_directory),
        cmocka_unit_test_setup_teardown(test_failed_write_leaves_the_old_content, make_directory,
                                        remove_directory),
        cmocka_unit_test_setup_teardown(test_write_fails_in_one_line, make_directory, remove_directory),
        cmocka_unit_test_setup_teardown(test_makes_directories, make_directory, remove_directory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
