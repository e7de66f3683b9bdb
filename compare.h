/* compare.h - the same training under several strategies: what must be equal, and what sets them apart.
 *
 *     compare c = {0};
 *     if (compare_choose(&c, "ddp,zero3", choices, &e)) ...     // c.count, c.result[i].strategy
 *     compare_open(&c, ranks, steps, &e);
 *     ... train under each; rank 0: compare_add_step, every rank: compare_add_rank
 *     compare_judge(&c, "runs/both", &e);                       // runs/both/ddp and runs/both/zero3
 *     compare_print_text(&c, stdout);
 *     compare_write(&c, "runs/both", &e);                       // compare.md and compare.svg
 *     compare_free(&c);
 *
 * Contents: results, the table, the picture.
 * MB are 10^6 bytes. A formula is dist_formula_of's: that of the papers, padding included.
 */
#ifndef COMPARE_H
#define COMPARE_H

#include "dist.h"
#include "io/file.h"
#include "io/options.h"

enum { COMPARE_MOST = 8 }; /* strategies; dist.h has fewer */

/* ------------------------------------------------------------------------------------------------ results */

/* What one rank held when the training ended, and what it sent in all steps. */
typedef struct compare_rank {
    rt_ledger ledger;
    dist_formula formula;
    dist_traffic traffic[DIST_OPS];
} compare_rank;

typedef struct compare_result {
    const char *strategy;
    size_t steps;                  /* made so far */
    double *loss, *norm, *seconds; /* [steps] of rank 0; one allocation */
    compare_rank *rank;            /* [ranks]; each rank writes its own */
    double accuracy;               /* of the last evaluation */
    double median_s;               /* of the steps */
    size_t differs_from; /* the first step whose loss or norm is not the first strategy's; 0: none */
    int other_weights;   /* the last model.safetensors is not the first strategy's */
} compare_result;

typedef struct compare {
    compare_result result[COMPARE_MOST];
    size_t count, ranks;
    char about[3][256]; /* the model; data, steps, batch and reduction; what compare_judge found */
} compare;

/* Takes the strategies of a list "ddp,zero1"; `choices` "single|dp|..." is for messages. -1: an unknown name,
 * an empty one, or the same strategy twice. */
static inline int compare_choose(compare *c, const char *list, const char *choices, error_text *e) {
    if (!*list) return error_set(e, "compare: found no --strategies, expected names such as ddp,zero3");
    for (const char *item = list, *next; item; item = next) {
        size_t length = strcspn(item, ",");
        quoted name = quote(item, length);
        next = item[length] ? item + length + 1 : NULL;
        if (!length)
            return error_set(e, "--strategies: found an empty name in '%s', expected names of %s",
                             quote(list, SIZE_MAX).text, choices);
        const dist_strategy *s = dist_strategy_named(name.text);
        if (!s) {
            option_nearest nearest = {.typed = name.text, .typed_length = strlen(name.text)};
            option_offer_choices(&nearest, choices);
            return error_set(e, "--strategies: found '%s', expected names of %s; did you mean %s", name.text,
                             choices, nearest.text);
        }
        for (size_t i = 0; i < c->count; i++)
            if (!strcmp(c->result[i].strategy, s->name))
                return error_set(e, "--strategies: found %s twice%s%s%s, expected each strategy once",
                                 s->name, s->alias ? " (" : "", s->alias ? s->alias : "",
                                 s->alias ? " is the same)" : "");
        if (c->count == COMPARE_MOST)
            return error_set(e, "--strategies: found more than %d strategies", COMPARE_MOST);
        c->result[c->count++].strategy = s->name;
    }
    return 0;
}

static inline void compare_free(compare *c) {
    for (size_t i = 0; i < c->count; i++) {
        free(c->result[i].loss);
        free(c->result[i].rank);
    }
}

/* Room for `steps` steps of `ranks` ranks under each strategy. */
static inline int compare_open(compare *c, size_t ranks, size_t steps, error_text *e) {
    size_t doubles;
    c->ranks = ranks;
    if (size_multiply(steps, 3, &doubles)) return error_set(e, "compare: out of memory for %zu steps", steps);
    for (size_t i = 0; i < c->count; i++) {
        compare_result *r = &c->result[i];
        r->loss = calloc(doubles, sizeof *r->loss);
        r->rank = calloc(ranks, sizeof *r->rank);
        if (!r->loss || !r->rank) return error_set(e, "compare: out of memory for %zu steps", steps);
        r->norm = r->loss + steps;
        r->seconds = r->norm + steps;
    }
    return 0;
}

/* One step, of rank 0. */
static inline void compare_add_step(compare_result *r, const dist_result *step, double seconds) {
    r->loss[r->steps] = step->loss;
    r->norm[r->steps] = step->gradient_norm;
    r->seconds[r->steps++] = seconds;
}

/* What a rank holds after the last step, and what it has sent. */
static inline void compare_add_rank(compare_result *r, const dist *d, const dist_traffic traffic[DIST_OPS]) {
    compare_rank *own = &r->rank[d->rank->rank];
    own->ledger = d->rank->ledger;
    own->formula = dist_formula_of(d);
    memcpy(own->traffic, traffic, sizeof own->traffic);
}

/* Do two files have the same bytes? */
static inline int compare__files(const char *a, const char *b, int *same, error_text *e) {
    const char *path[] = {a, b};
    char block[2][1 << 14];
    size_t got[2] = {1, 1};
    FILE *file[2] = {fopen(a, "rb"), fopen(b, "rb")};
    int failed = 0;
    *same = 1;
    for (int i = 0; i < 2; i++)
        if (!file[i]) failed = error_set(e, "%s: cannot be opened: %s", path[i], strerror(errno));
    while (!failed && *same && got[0]) {
        for (int i = 0; i < 2; i++) {
            got[i] = fread(block[i], 1, sizeof block[i], file[i]);
            if (ferror(file[i])) failed = error_set(e, "%s: cannot be read: %s", path[i], strerror(errno));
        }
        *same = got[0] == got[1] && !memcmp(block[0], block[1], got[0]);
    }
    for (int i = 0; i < 2; i++)
        if (file[i]) fclose(file[i]);
    return failed;
}

static inline int compare__weights(const compare *c, size_t i, const char *directory, char path[4096],
                                   error_text *e) {
    int length = snprintf(path, 4096, "%s/%s/checkpoints/step-%08zu/model.safetensors", directory,
                          c->result[i].strategy, c->result[i].steps);
    return length < 4096 ? 0 : error_set(e, "%.200s...: found too long a path", directory);
}

static inline int compare__ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median; sorts the values. */
static inline double compare__median(double *values, size_t n) {
    qsort(values, n, sizeof *values, compare__ascending);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

/* After compare_judge. -1: a strategy did not give the first one's numbers, e says which. */
static inline int compare_verdict(const compare *c, error_text *e) {
    for (size_t i = 1; i < c->count; i++) {
        const compare_result *r = &c->result[i];
        char from[80] = "";
        if (r->differs_from)
            snprintf(from, sizeof from, "in losses or gradient norms from step %zu on%s", r->differs_from,
                     r->other_weights ? ", and " : "");
        if (r->differs_from || r->other_weights)
            return error_set(e, "compare: %s differs from %s %s%s, expected the same bits", r->strategy,
                             c->result[0].strategy, from, r->other_weights ? "in the final weights" : "");
    }
    return 0;
}

/* When all have been trained: holds every strategy's losses, norms and final weights against the first one's.
 * The runs lie in directory/STRATEGY. -1: a file cannot be read. */
static inline int compare_judge(compare *c, const char *directory, error_text *e) {
    const compare_result *first = &c->result[0];
    char path[2][4096];
    for (size_t i = 0; i < c->count; i++) {
        compare_result *r = &c->result[i];
        int same;
        r->median_s = compare__median(r->seconds, r->steps);
        for (size_t t = first->steps; t-- > 0;)
            if (memcmp(&r->loss[t], &first->loss[t], sizeof *r->loss) ||
                memcmp(&r->norm[t], &first->norm[t], sizeof *r->norm))
                r->differs_from = t + 1;
        if (compare__weights(c, 0, directory, path[0], e) || compare__weights(c, i, directory, path[1], e) ||
            compare__files(path[0], path[1], &same, e))
            return -1;
        r->other_weights = !same;
    }
    error_text difference;
    const char *outcome = c->count > 1 ? "all losses, gradient norms and final weights are equal, bit for bit"
                                       : "one strategy: nothing to compare it with";
    if (compare_verdict(c, &difference)) outcome = difference.text;
    snprintf(c->about[2], sizeof c->about[2], "%.250s", outcome);
    return 0;
}

/* The rank that held most. */
static inline const compare_rank *compare_fullest(const compare *c, size_t i) {
    const compare_rank *rank = c->result[i].rank, *most = rank;
    for (size_t k = 1; k < c->ranks; k++)
        if (rank[k].ledger.total_peak_bytes > most->ledger.total_peak_bytes) most = &rank[k];
    return most;
}

/* Bytes that a rank sends in a step through one collective, or through all (DIST_OPS): the mean of the ranks,
 * and the most that one of them sends. */
static inline double compare_sent(const compare *c, size_t i, int op, double *most) {
    double sum = 0;
    *most = 0;
    for (size_t k = 0; k < c->ranks; k++) {
        double own = 0;
        for (int o = 0; o < DIST_OPS; o++)
            if (op == DIST_OPS || o == op) own += c->result[i].rank[k].traffic[o].wire_bytes;
        sum += own;
        if (own > *most) *most = own;
    }
    *most /= (double)c->result[i].steps;
    return sum / (double)c->ranks / (double)c->result[i].steps;
}

/* ---------------------------------------------------------------------------------------------- the table */

enum { COMPARE_ROWS = 64, COMPARE_CELL = 64 };

typedef char compare_cell[COMPARE_CELL];

/* A row: its name, then a cell for each strategy. A heading begins a table, and names the strategies. */
typedef struct compare_row {
    int heading;
    compare_cell cell[1 + COMPARE_MOST];
} compare_row;

typedef struct compare_table {
    compare_row row[COMPARE_ROWS];
    size_t rows;
} compare_table;

/* A new row; the cells of the strategies. */
static inline compare_cell *compare__row(compare_table *t, const char *name) {
    compare_row *row = &t->row[t->rows++];
    row->heading = 0;
    snprintf(row->cell[0], COMPARE_CELL, "%s", name);
    return row->cell + 1;
}

static inline void compare__heading(const compare *c, compare_table *t, const char *name) {
    compare_cell *cell = compare__row(t, name);
    t->row[t->rows - 1].heading = 1;
    for (size_t i = 0; i < c->count; i++) snprintf(cell[i], COMPARE_CELL, "%s", c->result[i].strategy);
}

/* A formula beside what was measured: "= 0.405", or the difference "(+128 B) 0.405". */
static inline void compare__formula(compare_cell cell, double measured, double formula, double scale,
                                    int decimals, const char *unit) {
    char difference[32] = "=";
    if (measured != formula) snprintf(difference, sizeof difference, "(%+.10g%s)", measured - formula, unit);
    if (isnan(formula))
        snprintf(cell, COMPARE_CELL, "-");
    else
        snprintf(cell, COMPARE_CELL, "%s %.*f", difference, decimals, scale * formula);
}

static inline void compare__numbers(const compare *c, compare_table *t) {
    compare__heading(c, t, "numbers");
    compare_cell *equal = compare__row(t, "losses and norms");
    compare_cell *weights = compare__row(t, "final weights");
    compare_cell *loss = compare__row(t, "last loss");
    compare_cell *accuracy = compare__row(t, "validation accuracy");
    for (size_t i = 0; i < c->count; i++) {
        const compare_result *r = &c->result[i];
        snprintf(equal[i], COMPARE_CELL, i ? "equal" : "reference");
        if (r->differs_from) snprintf(equal[i], COMPARE_CELL, "DIFFER from step %zu", r->differs_from);
        snprintf(weights[i], COMPARE_CELL, !i ? "reference" : r->other_weights ? "DIFFER" : "equal");
        snprintf(loss[i], COMPARE_CELL, "%.6f", r->loss[r->steps - 1]);
        snprintf(accuracy[i], COMPARE_CELL, "%.4f", r->accuracy);
    }
}

static inline void compare__memory(const compare *c, compare_table *t) {
    compare__heading(c, t, "memory at rest, MB");
    for (int k = 0; k < RT_HOST_MEMORY; k++) {
        compare_cell *used = compare__row(t, rt_category_name((rt_category)k));
        compare_cell *formula = compare__row(t, "  formula");
        for (size_t i = 0; i < c->count; i++) {
            const compare_rank *r = compare_fullest(c, i);
            double bytes = (double)r->ledger.bytes[k];
            snprintf(used[i], COMPARE_CELL, "%.3f", 1e-6 * bytes);
            compare__formula(formula[i], bytes, r->formula.bytes[k], 1e-6, 3, " B");
        }
    }
    compare_cell *total = compare__row(t, "total");
    compare_cell *peak = compare__row(t, "total, peak");
    for (size_t i = 0; i < c->count; i++) {
        const compare_rank *r = compare_fullest(c, i);
        snprintf(total[i], COMPARE_CELL, "%.3f", 1e-6 * (double)r->ledger.total_bytes);
        snprintf(peak[i], COMPARE_CELL, "%.3f", 1e-6 * (double)r->ledger.total_peak_bytes);
    }
}

/* Does any strategy send through this collective? */
static inline int compare__uses(const compare *c, int op) {
    for (size_t i = 0; i < c->count; i++)
        if (c->result[i].rank[0].traffic[op].calls || c->result[i].rank[0].formula.elements[op] > 0) return 1;
    return 0;
}

static inline void compare__traffic(const compare *c, compare_table *t) {
    double most;
    compare__heading(c, t, "traffic of a step, elements");
    for (int op = 0; op < DIST_OPS; op++) {
        if (!compare__uses(c, op)) continue;
        compare_cell *elements = compare__row(t, dist_op_name((dist_op)op));
        compare_cell *formula = compare__row(t, "  formula");
        compare_cell *sent = compare__row(t, "  sent by a rank, MB");
        for (size_t i = 0; i < c->count; i++) {
            const compare_rank *r = compare_fullest(c, i);
            double n = (double)r->traffic[op].elements / (double)c->result[i].steps;
            if (!r->traffic[op].calls && r->formula.elements[op] == 0) { /* as it should be */
                snprintf(elements[i], COMPARE_CELL, "-");
                snprintf(formula[i], COMPARE_CELL, "-");
                snprintf(sent[i], COMPARE_CELL, "-");
                continue;
            }
            snprintf(elements[i], COMPARE_CELL, "%.12g", n);
            compare__formula(formula[i], n, r->formula.elements[op], 1, 0, "");
            snprintf(sent[i], COMPARE_CELL, "%.3f", 1e-6 * compare_sent(c, i, op, &most));
        }
    }
    compare_cell *sent = compare__row(t, "total sent, MB");
    compare_cell *by_one = compare__row(t, "  most by one rank");
    for (size_t i = 0; i < c->count; i++) {
        snprintf(sent[i], COMPARE_CELL, "%.3f", 1e-6 * compare_sent(c, i, DIST_OPS, &most));
        snprintf(by_one[i], COMPARE_CELL, "%.3f", 1e-6 * most);
    }
}

static inline void compare__time(const compare *c, compare_table *t) {
    compare__heading(c, t, "time of a step, ms");
    compare_cell *time = compare__row(t, "median");
    compare_cell name;
    snprintf(name, sizeof name, "  relative to %s", c->result[0].strategy);
    compare_cell *ratio = compare__row(t, name);
    for (size_t i = 0; i < c->count; i++) {
        const compare_result *r = &c->result[i];
        snprintf(time[i], COMPARE_CELL, "%.2f", 1e3 * r->median_s);
        snprintf(ratio[i], COMPARE_CELL, "%.2f", r->median_s / c->result[0].median_s);
    }
}

static inline void compare__tabulate(const compare *c, compare_table *t) {
    t->rows = 0;
    compare__numbers(c, t);
    compare__memory(c, t);
    compare__traffic(c, t);
    compare__time(c, t);
}

static const char *const compare__notes =
    "Memory and elements are those of the rank that holds most; what a rank sends is the mean of the ranks.\n"
    "A formula behind = is met in every byte or element; else the difference stands before it.\n"
    "MB are 10^6 bytes. Times are those of this machine.\n";

/* The table as text: columns as wide as they need be. */
static inline void compare_print_text(const compare *c, FILE *out) {
    compare_table t;
    int width[1 + COMPARE_MOST] = {0};
    compare__tabulate(c, &t);
    for (size_t k = 0; k < t.rows; k++)
        for (size_t i = 0; i <= c->count; i++) {
            int length = (int)strlen(t.row[k].cell[i]);
            if (length > width[i]) width[i] = length;
        }
    for (int i = 0; i < 3; i++) fprintf(out, "%s\n", c->about[i]);
    for (size_t k = 0; k < t.rows; k++) {
        fprintf(out, "%s%-*s", t.row[k].heading ? "\n" : "", width[0], t.row[k].cell[0]);
        for (size_t i = 1; i <= c->count; i++) fprintf(out, "  %*s", width[i], t.row[k].cell[i]);
        fprintf(out, "\n");
    }
    fprintf(out, "\n%s", compare__notes);
}

/* The same in Markdown, a table a heading. */
static inline void compare_print_markdown(const compare *c, FILE *out) {
    compare_table t;
    compare__tabulate(c, &t);
    fprintf(out, "# The same training under %zu %s\n\n%s  \n%s  \n%s\n", c->count,
            c->count > 1 ? "strategies" : "strategy", c->about[0], c->about[1], c->about[2]);
    for (size_t k = 0; k < t.rows; k++) {
        const compare_row *row = &t.row[k];
        if (row->heading) fprintf(out, "\n");
        for (size_t i = 0; i <= c->count; i++)
            fprintf(out, "| %s ", row->cell[i] + strspn(row->cell[i], " "));
        fprintf(out, "|\n");
        for (size_t i = 0; row->heading && i <= c->count; i++) fprintf(out, i ? "|---:" : "|:---");
        if (row->heading) fprintf(out, "|\n");
    }
    fprintf(out, "\n%s\n![memory, traffic and time of a step](compare.svg)\n", compare__notes);
}

/* -------------------------------------------------------------------------------------------- the picture */

/* Stacked bars, one a strategy, all to one scale. */
typedef struct compare_bars {
    const char *title, *unit;
    int parts;
    const char *part[DIST_OPS], *colour[DIST_OPS];
    double value[COMPARE_MOST][DIST_OPS];
    compare_cell note[COMPARE_MOST]; /* right of the bar */
} compare_bars;

/* In pixels; a character of the text is at most CHARACTER wide. */
enum {
    COMPARE_WIDTH = 1000,
    COMPARE_LEFT = 80,
    COMPARE_LONGEST = 540,
    COMPARE_BAR = 20,
    COMPARE_STEP = 27,
    COMPARE_CHARACTER = 8
};

/* For a number of three digits. */
static inline int compare__decimals(double value) {
    return value < 1 ? 3 : value < 10 ? 2 : value < 100 ? 1 : 0;
}

/* Draws from height y down and returns the height below. */
static inline int compare__draw(const compare *c, const compare_bars *b, int y, FILE *out) {
    double longest = 0;
    int used[DIST_OPS] = {0}, x = COMPARE_LEFT;
    for (size_t i = 0; i < c->count; i++) {
        double sum = 0;
        for (int p = 0; p < b->parts; p++) {
            sum += b->value[i][p];
            used[p] |= b->value[i][p] > 0;
        }
        if (sum > longest) longest = sum;
    }
    fprintf(out, "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text>\n", COMPARE_LEFT, y += 30, b->title);
    if (b->parts > 1) y += 22;
    for (int p = 0; p < b->parts && b->parts > 1; p++) {
        if (!used[p]) continue;
        fprintf(out, "<rect x=\"%d\" y=\"%d\" width=\"12\" height=\"12\" fill=\"%s\"/>", x, y - 11,
                b->colour[p]);
        fprintf(out, "<text x=\"%d\" y=\"%d\">%s</text>\n", x + 17, y, b->part[p]);
        x += 17 + COMPARE_CHARACTER * (int)strlen(b->part[p]) + 16;
    }
    y += 12;
    for (size_t i = 0; i < c->count; i++, y += COMPARE_STEP) {
        double at = COMPARE_LEFT;
        fprintf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>\n", COMPARE_LEFT - 8, y + 15,
                c->result[i].strategy);
        for (int p = 0; p < b->parts; p++) {
            char number[32];
            double value = b->value[i][p], width = longest > 0 ? COMPARE_LONGEST * value / longest : 0;
            if (!(value > 0)) continue;
            int length = snprintf(number, sizeof number, "%.*f", compare__decimals(value), value);
            fprintf(out,
                    "<rect x=\"%.3f\" y=\"%d\" width=\"%.3f\" height=\"%d\" fill=\"%s\">"
                    "<title>%s %s: %.6f %s</title></rect>\n",
                    at, y, width, COMPARE_BAR, b->colour[p], c->result[i].strategy, b->part[p], value,
                    b->unit);
            if (b->parts > 1 && width > COMPARE_CHARACTER * length + 4)
                fprintf(out, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", at + width / 2,
                        y + 15, number);
            at += width;
        }
        fprintf(out, "<text x=\"%.1f\" y=\"%d\">%s</text>\n", at + 8, y + 15, b->note[i]);
    }
    return y;
}

static const char *const compare__colours[DIST_OPS] = {"#7eb6e6", "#fdb97d", "#8fd19e", "#d4d4d4", "#f4998d",
                                                       "#c5b3e0", "#f2d16b", "#a8ddd9", "#e8b6d4"};

/* What the rank that holds most holds: all, or only what strategies shard or need for it. Activations, which
 * all have alike, may dwarf that. */
static inline compare_bars compare__memory_bars(const compare *c, int all) {
    compare_bars b = {.title = all ? "memory of a rank at rest, MB (the rank that holds most)"
                                   : "the same without activations and workspace",
                      .unit = "MB",
                      .parts = RT_HOST_MEMORY};
    for (int k = 0; k < RT_HOST_MEMORY; k++) {
        b.part[k] = rt_category_name((rt_category)k);
        b.colour[k] = compare__colours[k];
    }
    for (size_t i = 0; i < c->count; i++) {
        double total = 0;
        for (int k = 0; k < RT_HOST_MEMORY; k++) {
            if (!all && (k == RT_ACTIVATIONS || k == RT_WORKSPACE)) continue;
            b.value[i][k] = 1e-6 * (double)compare_fullest(c, i)->ledger.bytes[k];
            total += b.value[i][k];
        }
        snprintf(b.note[i], COMPARE_CELL, "%.3f MB", total);
    }
    return b;
}

static inline compare_bars compare__traffic_bars(const compare *c) {
    compare_bars b = {
        .title = "sent by a rank in a step, MB (mean of the ranks)", .unit = "MB", .parts = DIST_OPS};
    for (size_t i = 0; i < c->count; i++) {
        double most, sent;
        for (int op = 0; op < DIST_OPS; op++) {
            b.part[op] = dist_op_name((dist_op)op);
            b.colour[op] = compare__colours[op];
            b.value[i][op] = 1e-6 * compare_sent(c, i, op, &most);
        }
        sent = compare_sent(c, i, DIST_OPS, &most);
        snprintf(b.note[i], COMPARE_CELL, "%.3f MB", 1e-6 * sent);
        if (most > sent)
            snprintf(b.note[i], COMPARE_CELL, "%.3f MB (%.3f by one rank)", 1e-6 * sent, 1e-6 * most);
    }
    return b;
}

static inline compare_bars compare__time_bars(const compare *c) {
    compare_bars b = {.title = "time of a step, ms (median, on this machine)",
                      .unit = "ms",
                      .parts = 1,
                      .part = {"step"},
                      .colour = {compare__colours[0]}};
    for (size_t i = 0; i < c->count; i++) {
        double seconds = c->result[i].median_s;
        b.value[i][0] = 1e3 * seconds;
        snprintf(b.note[i], COMPARE_CELL, "%.2f ms (%.2f of %s)", 1e3 * seconds,
                 seconds / c->result[0].median_s, c->result[0].strategy);
    }
    return b;
}

/* Memory twice, traffic and time of a step, each as bars. */
static inline void compare_print_svg(const compare *c, FILE *out) {
    const compare_bars bars[] = {compare__memory_bars(c, 1), compare__memory_bars(c, 0),
                                 compare__traffic_bars(c), compare__time_bars(c)};
    int height = 20 + 3 * 18 + 4 * (42 + COMPARE_STEP * (int)c->count) + 3 * 22 + 20, y = 20;
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
            "role=\"img\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222222\">\n"
            "<title>The same training under several strategies</title>\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"#ffffff\"/>\n",
            COMPARE_WIDTH, height, COMPARE_WIDTH, height, COMPARE_WIDTH, height);
    for (int i = 0; i < 3; i++, y += 18)
        fprintf(out, "<text x=\"16\" y=\"%d\">%s</text>\n", y + 6, c->about[i]);
    for (int i = 0; i < 4; i++) y = compare__draw(c, &bars[i], y, out);
    fprintf(out, "</svg>\n");
}

/* Writes directory/compare.md and directory/compare.svg. */
static inline int compare_write(const compare *c, const char *directory, error_text *e) {
    static const struct {
        const char *name;
        void (*print)(const compare *, FILE *);
    } files[] = {{"compare.md", compare_print_markdown}, {"compare.svg", compare_print_svg}};
    int failed = 0;
    for (size_t i = 0; i < 2 && !failed; i++) {
        char path[4096], *text = NULL;
        size_t length = 0;
        FILE *memory = open_memstream(&text, &length);
        if (memory) files[i].print(c, memory);
        if (!memory || fclose(memory))
            failed = error_set(e, "%s: out of memory", files[i].name);
        else if (snprintf(path, sizeof path, "%s/%s", directory, files[i].name) >= (int)sizeof path)
            failed = error_set(e, "%.200s...: found too long a path", directory);
        else
            failed = file_write_atomic(path, text, length, e);
        free(text);
    }
    return failed;
}

#endif
