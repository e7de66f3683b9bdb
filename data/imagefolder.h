/* imagefolder.h - a folder of images, one subfolder a class, as torchvision's ImageFolder reads it:
 *
 *     train/ant/1.jpg  train/ant/more/2.png  train/bee/3.jpg        classes: ant, bee
 *
 * Classes are the subfolders in the order of their names; of each, the files below it whose name ends like an
 * image's, folder by folder and name by name. Names are ordered by code point, which for UTF-8 is by byte.
 * Only names are read here: an image is decoded when it is drawn (data/dataset.h), and what its content is
 * decides how. Left out: folders on anything but a file system.
 */
#ifndef DATA_IMAGEFOLDER_H
#define DATA_IMAGEFOLDER_H

#include <dirent.h>
#include <strings.h>
#include <sys/stat.h>

#include "data/images.h"

/* Does the name end like those that torchvision takes for images (torchvision.datasets.folder)? */
static inline int imagefolder_is_image(const char *name) {
    static const char *const endings[] = {".jpg", ".jpeg", ".png",  ".ppm", ".bmp",
                                          ".pgm", ".tif",  ".tiff", ".webp"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t length = strlen(name), ending = strlen(endings[i]);
        if (length >= ending && strcasecmp(name + length - ending, endings[i]) == 0) return 1;
    }
    return 0;
}

/* A list of strings that grows. */
typedef struct {
    char **text; /* [count] */
    size_t count, room;
} text_list;

static inline void text_list_free(text_list *list) {
    for (size_t i = 0; i < list->count; i++) free(list->text[i]);
    free(list->text);
    *list = (text_list){0};
}

/* Adds a copy of "folder/name". */
static inline int text_list_add(text_list *list, const char *folder, const char *name, error_text *e) {
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        char **larger = realloc(list->text, room * sizeof *larger);
        if (!larger) return error_set(e, "%s: out of memory for %zu names", folder, room);
        list->text = larger;
        list->room = room;
    }
    char *path = malloc(strlen(folder) + strlen(name) + 2);
    if (!path) return error_set(e, "%s: out of memory for %zu names", folder, list->count);
    sprintf(path, "%s/%s", folder, name);
    list->text[list->count++] = path;
    return 0;
}

static inline int text_list_compare(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static inline void text_list_sort(text_list *list, size_t from) {
    if (list->count > from)
        qsort(list->text + from, list->count - from, sizeof *list->text, text_list_compare);
}

/* The folders (want_folders) or the other entries of a folder, unordered, behind what the list holds. */
static inline int imagefolder_entries(const char *folder, int want_folders, text_list *list, error_text *e) {
    DIR *directory = opendir(folder);
    if (!directory)
        return error_set(e, "%s: cannot be read: %s, expected a folder of images", folder, strerror(errno));
    int failed = 0;
    for (struct dirent *entry; !failed && (entry = readdir(directory));) {
        struct stat status;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        if (!want_folders && !imagefolder_is_image(entry->d_name)) continue;
        failed = text_list_add(list, folder, entry->d_name, e);
        if (failed) break;
        const char *path = list->text[list->count - 1];
        int missing = stat(path, &status); /* a link counts as what it leads to */
        if (missing && errno == ELOOP) failed = error_set(e, "%s: found links that lead in circles", path);
        int is_folder = !missing && S_ISDIR(status.st_mode);
        if (is_folder != want_folders) free(list->text[--list->count]);
    }
    closedir(directory);
    return failed;
}

/* Adds the images of a class: of its folder, and of all folders below in the order of their paths. */
static inline int imagefolder_class(const char *folder, text_list *files, error_text *e) {
    text_list folders = {0};
    size_t before = files->count;
    int failed = text_list_add(&folders, folder, "", e);
    if (!failed) folders.text[0][strlen(folder)] = 0; /* without the slash */
    for (size_t i = 0; i < folders.count && !failed; i++)
        failed = imagefolder_entries(folders.text[i], 1, &folders, e);
    text_list_sort(&folders, 0);
    for (size_t i = 0; i < folders.count && !failed; i++) {
        size_t first = files->count;
        failed = imagefolder_entries(folders.text[i], 0, files, e);
        text_list_sort(files, first);
    }
    text_list_free(&folders);
    if (!failed && files->count == before)
        failed = error_set(e, "%s: found no image in this class, expected at least one", folder);
    return failed;
}

/* Lists the images of a folder of classes into the empty d, the first `limit` of them. Fails on a folder
 * without classes and on a class without images. */
static inline int imagefolder_load(dataset *d, const char *folder, size_t limit, error_text *e) {
    text_list classes = {0}, files = {0};
    *d = (dataset){.kind = DATASET_IMAGEFOLDER,
                   .channels = 3,
                   .white = 255,
                   .mean = {0.5f, 0.5f, 0.5f},
                   .std = {0.5f, 0.5f, 0.5f}};
    int failed = imagefolder_entries(folder, 1, &classes, e);
    text_list_sort(&classes, 0);
    if (!failed && classes.count == 0)
        failed = error_set(e, "%s: found no folder in it, expected one for each class", folder);
    d->classes = classes.count;
    if (!failed) failed = dataset_number_labels(d, e);
    for (size_t k = 0; k < classes.count && !failed; k++) {
        const char *name = strrchr(classes.text[k], '/') + 1;
        size_t first = files.count, size;
        if (strlen(name) >= sizeof *d->label_names)
            failed = error_set(e, "%s: found a class name of %zu bytes, expected fewer than %zu", folder,
                               strlen(name), sizeof *d->label_names);
        if (failed) break;
        snprintf(d->label_names[k], sizeof *d->label_names, "%s", name);
        failed = imagefolder_class(classes.text[k], &files, e);
        int32_t *labels =
            failed || size_multiply(files.count, sizeof *labels, &size) ? NULL : realloc(d->labels, size);
        if (!failed && !labels)
            failed = error_set(e, "%s: out of memory for %zu labels", folder, files.count);
        if (labels) d->labels = labels;
        for (size_t i = first; i < files.count && !failed; i++) labels[i] = (int32_t)k;
    }
    text_list_free(&classes);
    for (; files.count > limit; files.count--) free(files.text[files.count - 1]);
    d->files = files.text;
    d->count = files.count;
    return failed;
}

#endif
