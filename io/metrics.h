/* metrics.h - what a run reports: the scores of a classifier, and metrics.jsonl.
 *
 *     metrics_file log;
 *     if (metrics_open(&log, "runs/a/metrics.jsonl", &e)) ...
 *     cJSON *line = metrics_line("step");
 *     metrics_add(line, "train_loss", loss);      // 9 significant digits: a float survives the round trip
 *     if (metrics_write(&log, line, &e)) ...      // one line, flushed; frees it
 *     metrics_close(&log);
 */
#ifndef IO_METRICS_H
#define IO_METRICS_H

#include <errno.h>

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
    FILE *file;
    char path[4096];
} metrics_file;

/* Makes the file, or appends to it. */
static inline int metrics_open(metrics_file *m, const char *path, error_text *e) {
    snprintf(m->path, sizeof m->path, "%s", path);
    m->file = fopen(path, "a");
    return m->file ? 0 : error_set(e, "%s: cannot be written: %s", path, strerror(errno));
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

/* Writes the object as one line, whole or not at all for a reader that waits for line ends, and frees it. */
static inline int metrics_write(metrics_file *m, cJSON *line, error_text *e) {
    char *text = cJSON_PrintUnformatted(line);
    cJSON_Delete(line);
    int failed = !text || fprintf(m->file, "%s\n", text) < 0 || fflush(m->file);
    free(text);
    return failed ? error_set(e, "%s: cannot be written: %s", m->path, strerror(errno)) : 0;
}

static inline void metrics_close(metrics_file *m) {
    if (m->file) fclose(m->file);
    m->file = NULL;
}

#endif
