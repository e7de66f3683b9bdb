/* metrics.h - what a run reports: the scores of a classifier, and metrics.jsonl.
 *
 *     metrics_file log;
 *     if (metrics_open(&log, "runs/a/metrics.jsonl", SIZE_MAX, NULL, &e)) ...
 *     cJSON *line = metrics_line("step");
 *     metrics_add(line, "train_loss", loss);      // 9 significant digits: a float survives the round trip
 *     if (metrics_write(&log, line, &e)) ...      // one line, flushed; frees it
 *     metrics_close(&log);
 */
#ifndef IO_METRICS_H
#define IO_METRICS_H

#include "io/file.h"
#include "io/json.h"

/* ------------------------------------------------------------------------------------------------- scores */

/* What an evaluation counts. Integers, so that sums over ranks do not depend on their order. */
typedef struct score_counts {
    int64_t images, correct, correct_top5;
    int64_t *hit, *predicted, *actual; /* [classes] predicted and right; predicted; labelled so */
} score_counts;

/* One image: where its logits [classes] put the label. Of equal logits the lower class comes first. */
static inline void score_count(score_counts *s, const float *logits, size_t classes, size_t label) {
    size_t before = 0, best = 0;
    for (size_t c = 0; c < classes; c++) {
        before += logits[c] > logits[label] || (logits[c] == logits[label] && c < label);
        if (logits[c] > logits[best]) best = c;
    }
    s->images++;
    s->correct += before == 0;
    s->correct_top5 += before < 5;
    s->hit[label] += best == label;
    s->predicted[best]++;
    s->actual[label]++;
}

typedef struct scores {
    double accuracy, top5_accuracy, precision, recall, f1; /* fractions; the last three macro averages */
} scores;

/* Precision, recall and F1 = 2 p r / (p + r) of each class, averaged over the classes that occur among the
 * labels or the predictions; 0 where nothing can be divided (scikit-learn's average="macro",
 * zero_division=0). */
static inline scores score_result(const score_counts *s, size_t classes) {
    scores r = {0};
    double present = 0, images = s->images ? (double)s->images : 1;
    for (size_t c = 0; c < classes; c++) {
        double hit = (double)s->hit[c], predicted = (double)s->predicted[c], actual = (double)s->actual[c];
        if (predicted + actual == 0) continue;
        present++;
        r.precision += predicted > 0 ? hit / predicted : 0;
        r.recall += actual > 0 ? hit / actual : 0;
        r.f1 += 2 * hit / (predicted + actual);
    }
    if (present > 0) r.precision /= present, r.recall /= present, r.f1 /= present;
    r.accuracy = (double)s->correct / images;
    r.top5_accuracy = (double)s->correct_top5 / images;
    return r;
}

/* ------------------------------------------------------------------------------------------ metrics.jsonl */

typedef struct metrics_file {
    int fd;        /* -1: closed */
    size_t length; /* of its whole lines */
    char path[4096];
} metrics_file;

/* Makes the file, or appends to it behind `length` bytes; what follows those is cut off, all but a line that
 * begins with `kept` (or NULL). SIZE_MAX: behind all of it. */
static inline int metrics_open(metrics_file *m, const char *path, size_t length, const char *kept,
                               error_text *e) {
    char line[1024] = {0};
    struct stat status;
    snprintf(m->path, sizeof m->path, "%s", path);
    m->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (m->fd < 0 || fstat(m->fd, &status))
        return error_set(e, "%s: cannot be written: %s", path, strerror(errno));
    m->length = length < SIZE_MAX ? length : (size_t)status.st_size;
    if (m->length > (size_t)status.st_size)
        return error_set(e, "%s: found %lld bytes, expected the %zu that the checkpoint tells of", path,
                         (long long)status.st_size, length);
    ssize_t got = pread(m->fd, line, sizeof line - 1, (off_t)m->length);
    char *end = got > 0 ? strchr(line, '\n') : NULL;
    if (kept && end && !strncmp(line, kept, strlen(kept))) m->length += (size_t)(end - line) + 1;
    if ((size_t)status.st_size > m->length && ftruncate(m->fd, (off_t)m->length))
        return error_set(e, "%s: cannot be cut: %s", path, strerror(errno));
    return 0;
}

static inline cJSON *metrics_line(const char *event) {
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "event", event);
    return line;
}

/* A floating-point value; null where it is not finite, which JSON cannot say. */
static inline cJSON *metrics_number(double value) {
    char text[32];
    snprintf(text, sizeof text, isfinite(value) ? "%.9g" : "null", value);
    return cJSON_CreateRaw(text);
}

static inline void metrics_add(cJSON *line, const char *key, double value) {
    cJSON_AddItemToObject(line, key, metrics_number(value));
}

static inline void metrics_add_count(cJSON *line, const char *key, uint64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)value);
    cJSON_AddRawToObject(line, key, text);
}

/* Writes the object as one line, whole or not at all, and frees it: a line that the disk has no room for
 * is cut off again. */
static inline int metrics_write(metrics_file *m, cJSON *line, error_text *e) {
    char *text = cJSON_PrintUnformatted(line);
    cJSON_Delete(line);
    size_t size = text ? strlen(text) + 1 : 0;
    if (text) text[size - 1] = '\n';
    int failed = text ? file_write_at(m->fd, text, size, m->length, m->path, e)
                      : error_set(e, "%s: out of memory", m->path);
    free(text);
    if (failed && ftruncate(m->fd, (off_t)m->length)) m->length = (size_t)lseek(m->fd, 0, SEEK_END);
    if (!failed) m->length += size;
    return failed;
}

static inline void metrics_close(metrics_file *m) {
    if (m->fd >= 0) close(m->fd);
    m->fd = -1;
}

#endif
