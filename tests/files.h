/* files.h - what tests of files share: a directory that is removed with all that is in it, and messages.
 * Include it behind <cmocka.h>; the file that does defines _GNU_SOURCE. */
#ifndef TEST_FILES_H
#define TEST_FILES_H

#include <ftw.h>
#include <string.h>

#include "base.h"

static inline int remove_entry(const char *path, const struct stat *status, int type, struct FTW *walk) {
    (void)status, (void)type, (void)walk;
    return remove(path);
}

/* Removes a directory and all below it, links as links. */
static inline int remove_tree(const char *path) { return nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

/* Asserts one line that holds each of the fragments; the last one is NULL. */
static inline void assert_message(const error_text *e, ...) {
    va_list fragments;
    va_start(fragments, e);
    for (const char *fragment; (fragment = va_arg(fragments, const char *));)
        if (!strstr(e->text, fragment)) fail_msg("\"%s\" does not say \"%s\"", e->text, fragment);
    va_end(fragments);
    assert_null(strchr(e->text, '\n'));
}

#endif
