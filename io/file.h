/* file.h - files: reading one whole, writing so that a reader sees the old content or the new one and never
 * half of it, and the directories around them.
 *
 *     file_read_whole("config.json", 1 << 20, &text, &length, &e);     // free(text) afterwards
 *     directory_make("runs/first/checkpoints", &e);
 *     file_write_atomic("runs/first/checkpoints/latest", name, strlen(name), &e);
 *
 * What has been written stays written when the machine stops: data and directory entries are synced.
 * One writer a path: the name beside it is fixed, "PATH.tmp". Left out: anything that needs a lock.
 */
#ifndef IO_FILE_H
#define IO_FILE_H

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base.h"

/* The content of a file of at most `limit` bytes, which the caller frees; a 0 that is not counted follows it.
 * Fails on what cannot be opened or read (directories too), and on a longer file, a device without end
 * included. */
static inline int file_read_whole(const char *path, size_t limit, char **bytes, size_t *size, error_text *e) {
    *bytes = NULL;
    *size = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return error_set(e, "%s: cannot be opened: %s", path, strerror(errno));
    int failed = 0;
    size_t room = 0;
    while (!failed) {
        if (*size == room) { /* always room for the 0 behind the content */
            room = room ? 2 * room : 4096;
            char *larger = realloc(*bytes, room + 1);
            if (!larger) {
                failed = error_set(e, "%s: out of memory after %zu bytes", path, *size);
                break;
            }
            *bytes = larger;
        }
        ssize_t got = read(fd, *bytes + *size, room - *size);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) failed = error_set(e, "%s: cannot be read: %s", path, strerror(errno));
        if (got <= 0) break;
        *size += (size_t)got;
        if (*size > limit)
            failed = error_set(e, "%s: found more than %zu bytes, expected no more", path, limit);
    }
    close(fd);
    if (failed) {
        free(*bytes);
        *bytes = NULL;
        return -1;
    }
    (*bytes)[*size] = 0;
    return 0;
}

/* Writes all `size` bytes at `offset`; path is for the message. */
static inline int file_write_at(int fd, const void *bytes, size_t size, size_t offset, const char *path,
                                error_text *e) {
    for (size_t done = 0; done < size;) {
        ssize_t n = pwrite(fd, (const char *)bytes + done, size - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return error_set(e, "%s: cannot write %zu bytes at offset %zu: %s", path, size - done,
                             offset + done, n ? strerror(errno) : "nothing was written");
        done += (size_t)n;
    }
    return 0;
}

/* Closes a file that was written, once its content is on disk: some errors come no earlier. */
static inline int file_close_synced(int fd, const char *path, error_text *e) {
    int failed = fsync(fd) ? error_set(e, "%s: cannot be written: %s", path, strerror(errno)) : 0;
    if (close(fd) && !failed) failed = error_set(e, "%s: cannot be closed: %s", path, strerror(errno));
    return failed;
}

/* Puts the entries of a directory (creations, renames) on disk; EINVAL: the file system has no such thing. */
static inline int directory_sync(const char *path, error_text *e) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return error_set(e, "%s: cannot be opened: %s", path, strerror(errno));
    int failed = fsync(fd) && errno != EINVAL;
    if (failed) error_set(e, "%s: cannot be synced: %s", path, strerror(errno));
    close(fd);
    return failed ? -1 : 0;
}

/* Puts the entry of a path in its directory on disk. */
static inline int directory_sync_parent(const char *path, error_text *e) {
    char directory[4096];
    if (snprintf(directory, sizeof directory, "%s", path) >= (int)sizeof directory)
        return error_set(e, "%.64s: found a path of %zu bytes, expected fewer than %zu", path, strlen(path),
                         sizeof directory);
    char *slash = strrchr(directory, '/');
    if (slash) slash[slash == directory] = 0; /* "/" stays "/" */
    return directory_sync(slash ? directory : ".", e);
}

/* Makes a directory and those above it, as mkdir -p does; one that is there already is fine. */
static inline int directory_make(const char *path, error_text *e) {
    char part[4096];
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof part)
        return error_set(e, "%.64s: found a path of %zu bytes, expected 1 to %zu", path, length,
                         sizeof part - 1);
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != 0) continue;
        memcpy(part, path, i);
        part[i] = 0;
        struct stat status;
        if (mkdir(part, 0777) == 0) {
            if (directory_sync_parent(part, e)) return -1;
            continue;
        }
        if (errno == EEXIST && stat(part, &status) == 0 && S_ISDIR(status.st_mode)) continue;
        return error_set(e, "%s: cannot be made a directory: %s", part, strerror(errno));
    }
    return 0;
}

/* Replaces the content of a file, or makes the file: all of it or, on failure, nothing. */
static inline int file_write_atomic(const char *path, const void *bytes, size_t size, error_text *e) {
    char beside[4096];
    if (snprintf(beside, sizeof beside, "%s.tmp", path) >= (int)sizeof beside)
        return error_set(e, "%.64s: found a path of %zu bytes, expected fewer than %zu", path, strlen(path),
                         sizeof beside - 4);
    int fd = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return error_set(e, "%s: cannot be created: %s", beside, strerror(errno));
    int failed = file_write_at(fd, bytes, size, 0, beside, e);
    if (failed)
        close(fd);
    else
        failed = file_close_synced(fd, beside, e);
    if (!failed && rename(beside, path))
        failed = error_set(e, "%s: cannot be renamed to %s: %s", beside, path, strerror(errno));
    if (failed) {
        unlink(beside);
        return -1;
    }
    return directory_sync_parent(path, e);
}

#endif
