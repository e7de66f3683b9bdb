/* report.h - what a run says of itself in tables: the schedule of a step, memory and traffic beside formulas,
 * and what would have fitted when memory ran out.
 *
 *     schedule s = {0};
 *     comm.observe = schedule_observe, comm.observer = &s;      // of one rank, during one step
 *     schedule_print(stdout, schedules, ranks);                 // ranks that did the same stand together
 *     report_memory(stderr, &rank->ledger, &formula);
 *     report_advice(stderr, &vit_cpu, &model, &options, ranks, report_available_bytes());
 */
#ifndef REPORT_H
#define REPORT_H

#include <sys/resource.h>

#include "dist.h"

/* ----------------------------------------------------------------------------------------------- schedule */

typedef struct {
    const char *what, *unit;
    size_t elements;
} schedule_entry;

typedef struct {
    schedule_entry *entry; /* [count] */
    size_t count, room;
    int incomplete; /* memory ran out */
} schedule;

/* An observer of a dist_comm: notes what the rank does. The texts must outlive the schedule. */
static inline void schedule_observe(void *observer, const char *what, const char *unit, size_t elements) {
    schedule *s = observer;
    if (s->count == s->room) {
        size_t room = s->room ? 2 * s->room : 256;
        schedule_entry *larger = realloc(s->entry, room * sizeof *larger);
        if (!larger) {
            s->incomplete = 1;
            return;
        }
        s->entry = larger;
        s->room = room;
    }
    s->entry[s->count++] = (schedule_entry){what, unit, elements};
}

static inline int schedule_equal(const schedule *a, const schedule *b) {
    if (a->count != b->count) return 0;
    for (size_t i = 0; i < a->count; i++)
        if (strcmp(a->entry[i].what, b->entry[i].what) || strcmp(a->entry[i].unit, b->entry[i].unit) ||
            a->entry[i].elements != b->entry[i].elements)
            return 0;
    return 1;
}

/* Is it work of the compute stream? */
static inline int schedule_computes(const schedule_entry *e) {
    static const char *const computations[] = {"forward", "recompute", "backward", "free", "step"};
    for (size_t i = 0; i < sizeof computations / sizeof *computations; i++)
        if (!strcmp(e->what, computations[i])) return 1;
    return 0;
}

/* Two columns, what is posted to the communication stream and what the compute stream does, in the order in
 * which the host launched it; one table for all ranks that did the same. */
static inline void schedule_print(FILE *out, const schedule *s, size_t ranks) {
    for (size_t r = 0; r < ranks; r++) {
        size_t first = 0;
        while (!schedule_equal(&s[first], &s[r])) first++;
        if (first < r) continue; /* printed already */
        fprintf(out, "schedule of a step, rank %zu", r);
        for (size_t other = r + 1; other < ranks; other++)
            if (schedule_equal(&s[r], &s[other])) fprintf(out, ", %zu", other);
        fprintf(out, "%s\n%5s  %-38s  %s\n", s[r].incomplete ? " (incomplete: out of memory)" : "", "",
                "communication", "compute");
        for (size_t i = 0; i < s[r].count; i++) {
            const schedule_entry *e = &s[r].entry[i];
            if (!strcmp(e->what, "step"))
                fprintf(out, "%5zu  %-38s  %-10s %-10s %11zu\n", i + 1, "", e->what, e->unit, e->elements);
            else if (schedule_computes(e))
                fprintf(out, "%5zu  %-38s  %-10s %s\n", i + 1, "", e->what, e->unit);
            else
                fprintf(out, "%5zu  %-15s %-10s %11zu\n", i + 1, e->what, e->unit, e->elements);
        }
    }
}

/* ----------------------------------------------------------------------------------------------- memory */

/* Bytes by category: in use now, by the formula ("-": there is none), and at most so far. */
static inline void report_memory(FILE *out, const rt_ledger *l, const dist_formula *f) {
    fprintf(out, "%-16s %14s %14s %14s\n", "memory, bytes", "in use", "formula", "peak");
    for (int c = 0; c < RT_CATEGORIES; c++) {
        char formula[32] = "-";
        if (c == RT_HOST_MEMORY)
            fprintf(out, "%-16s %14zu %14s %14zu\n", "total", l->total_bytes, "", l->total_peak_bytes);
        if (c == RT_HOST_MEMORY && !l->peak_bytes[c]) continue;
        if (!isnan(f->bytes[c])) snprintf(formula, sizeof formula, "%.0f", f->bytes[c]);
        fprintf(out, "%-16s %14zu %14s %14zu\n", rt_category_name((rt_category)c), l->bytes[c], formula,
                l->peak_bytes[c]);
    }
}

/* What a rank sent and gathered in a step, of `steps`, beside the formula. */
static inline void report_traffic(FILE *out, const dist_traffic traffic[DIST_OPS], size_t steps,
                                  const dist_formula *f) {
    double n = (double)(steps ? steps : 1);
    fprintf(out, "%-16s %14s %14s %14s %14s\n", "a step sends", "calls", "elements", "formula", "bytes sent");
    for (int op = 0; op < DIST_OPS; op++)
        if (traffic[op].calls || f->elements[op] > 0)
            fprintf(out, "%-16s %14.6g %14.10g %14.10g %14.10g\n", dist_op_name((dist_op)op),
                    (double)traffic[op].calls / n, (double)traffic[op].elements / n, f->elements[op],
                    traffic[op].wire_bytes / n);
}

/* The most bytes of the machine's memory that this process, with all its ranks, has had. */
static inline uint64_t report_resident_peak_bytes(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return 1024 * (uint64_t)usage.ru_maxrss;
}

/* Bytes that this process may have: the machine's memory, or less where a limit is set (ulimit -v, or the
 * control group of a container). */
static inline double report_available_bytes(void) {
    double bytes = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE), of_group;
    struct rlimit limit;
    if (!getrlimit(RLIMIT_AS, &limit) && limit.rlim_cur != RLIM_INFINITY && (double)limit.rlim_cur < bytes)
        bytes = (double)limit.rlim_cur;
    FILE *group = fopen("/sys/fs/cgroup/memory.max", "r");
    if (group && fscanf(group, "%lf", &of_group) == 1 && of_group < bytes) bytes = of_group;
    if (group) fclose(group);
    return bytes;
}

/* Bytes that all ranks of this process would need at most: dry runs of dist_open. The program itself and the
 * data come on top. -1: impossible options. */
static inline int report_needed_bytes(const vit_device *device, const vit_model *m, const dist_options *o,
                                      int ranks, double *bytes, error_text *e) {
    *bytes = 0;
    for (int r = 0; r < ranks; r++) {
        rt_ledger l = {0};
        if (dist_estimate(device, m, o, ranks, r, &l, e)) return -1;
        *bytes += (double)l.total_peak_bytes;
    }
    return 0;
}

static inline int report__option(FILE *out, const char *text, const vit_device *device, const vit_model *m,
                                 const dist_options *o, int ranks, double available) {
    double bytes;
    error_text e;
    if (report_needed_bytes(device, m, o, ranks, &bytes, &e)) return 0;
    fprintf(out, "  %-66s %12.3f GB%s\n", text, 1e-9 * bytes, bytes <= available ? "  fits" : "");
    return bytes <= available;
}

/* For who has run out of memory: what this run needs, and which options would change that. */
static inline void report_advice(FILE *out, const vit_device *device, const vit_model *m,
                                 const dist_options *options, int ranks, double available) {
    dist_options o = *options;
    char text[160], strategy[40] = "";
    o.reduction = DIST_REDUCE_DEFAULT;
    fprintf(out, "needed by %d rank%s of this process, which may have %.3f GB:\n", ranks,
            ranks > 1 ? "s" : "", 1e-9 * available);
    report__option(out, "as asked for", device, m, options, ranks, available);
    const dist_strategy *s;
    for (size_t i = 0; ranks > 1 && (s = dist_strategy_at(i)); i++) {
        if (s->stage <= dist_strategy_named(options->strategy)->stage) continue;
        o.strategy = s->name;
        snprintf(strategy, sizeof strategy, "--strategy %s ", s->name);
        report__option(out, strategy, device, m, &o, ranks, available);
    }
    if (o.inference) return;
    o.checkpoint_every = 1; /* and the strategy that shards most */
    snprintf(text, sizeof text, "%s--activation-checkpointing", strategy);
    int fits = report__option(out, text, device, m, &o, ranks, available);
    while (!fits && o.batch_size > 1) {
        o.batch_size /= 2;
        o.accumulation *= 2;
        snprintf(text, sizeof text, "%s--activation-checkpointing --batch-size %zu", strategy, o.batch_size);
        fits = report__option(out, text, device, m, &o, ranks, available);
    }
}

#endif
