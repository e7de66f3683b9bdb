/* mismatch.c - ranks that disagree about collectives, or leave early: one planted fault a run.
 *
 *     mismatch 0 | wrong_operation | wrong_count | ...        0: nobody errs
 *
 * Ends as the program does: a failure is one line "train: error: ..." and a table on stderr, and exit
 * status 1. Says on stdout how long the run took, from its start, which is before the fault, to the
 * report. */
#include <stdlib.h>
#include <string.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "dist.h"

enum { RANKS = 3, ERRING = 1, MOST_CALLS = 6, MOST_ELEMENTS = 256 };

/* --------------------------------------------------------------------------------------- plans and faults */

typedef struct {
    dist_op op;
    rt_type type;
    size_t count;
    int peer;
    const char *unit;
} planned_call;

/* What a rank posts, waiting for each call before the next. */
typedef struct {
    planned_call call[MOST_CALLS];
    size_t calls, grouped; /* the first so many are one launch */
    const char *failure;   /* at its end the rank fails and says this */
} plan;

/* Two gradients for all as one launch, an activation from rank 1 to rank 2, a parameter and a sum for all. */
static plan agreed_plan(int rank) {
    plan p = {{{DIST_ALL_REDUCE, RT_FP32, 96, 0, "head"}, {DIST_ALL_REDUCE, RT_FP32, 192, 0, "block 0"}},
              2,
              2,
              NULL};
    if (rank == 1) p.call[p.calls++] = (planned_call){DIST_SEND, RT_FP32, 64, 2, "activation"};
    if (rank == 2) p.call[p.calls++] = (planned_call){DIST_RECV, RT_FP32, 64, 1, "activation"};
    p.call[p.calls++] = (planned_call){DIST_BROADCAST, RT_FP32, 48, 0, "embedding"};
    p.call[p.calls++] = (planned_call){DIST_CONTROL, RT_I64, 8, 0, "step"};
    return p;
}

enum { HEAD, BLOCK, SEND, BROADCAST, CONTROL }; /* the calls of rank 1, which errs */

static void no_fault(plan *p) { (void)p; }
static void wrong_operation(plan *p) { p->call[BROADCAST].op = DIST_REDUCE; }
static void wrong_count(plan *p) { p->call[BLOCK].count = 176; }
static void wrong_type(plan *p) { p->call[BROADCAST].type = RT_I64; }
static void wrong_root(plan *p) { p->call[BROADCAST].peer = 1; }
static void wrong_unit(plan *p) { p->call[BLOCK].unit = "block 1"; }
static void other_group(plan *p) { p->grouped = 1; }
static void send_of_other_count(plan *p) { p->call[SEND].count = 32; }
static void returns_early(plan *p) { p->calls = SEND; }

static void swapped_order(plan *p) {
    planned_call first = p->call[HEAD];
    p->call[HEAD] = p->call[BLOCK];
    p->call[BLOCK] = first;
}

static void skips_one(plan *p) {
    p->call[BROADCAST] = p->call[CONTROL];
    p->calls--;
}

static void one_call_more(plan *p) {
    p->call[p->calls++] = (planned_call){DIST_BARRIER, RT_FP32, 0, 0, "epoch"};
}

/* To rank 0, which waits for the broadcast. */
static void send_without_recv(plan *p) { p->call[SEND].peer = 0; }

static void fails(plan *p) {
    p->calls = SEND;
    p->failure = "rank 1: the images cannot be read";
}

static void post(dist_comm *comm, const planned_call *c, rt_block memory, rt_event *done) {
    rt_block whole = rt_slice(memory, 0, c->count), none = {0};
    int root = c->peer == comm->index;
    int takes = c->op != DIST_RECV && (c->op != DIST_BROADCAST || root);
    int gives = c->op != DIST_SEND && (c->op != DIST_BROADCAST || !root) && (c->op != DIST_REDUCE || root);
    dist_post(comm, &(dist_call){.op = c->op,
                                 .in = takes ? whole : none,
                                 .out = gives ? whole : none,
                                 .peer = c->peer,
                                 .unit = c->unit,
                                 .stream = RT_COMMUNICATION,
                                 .done = done});
}

static void follow(dist_comm *comm, const plan *p) {
    rt_rank *rank = comm->rank;
    rt_event done[MOST_CALLS] = {{0}};
    rt_block floats = rt_alloc(rank, RT_WORKSPACE, RT_FP32, MOST_ELEMENTS, 1),
             integers = rt_alloc(rank, RT_WORKSPACE, RT_I64, MOST_ELEMENTS, 1);
    dist_group_begin(comm);
    for (size_t i = 0; i < p->calls; i++) {
        post(comm, &p->call[i], p->call[i].type == RT_I64 ? integers : floats, &done[i]);
        if (i + 1 == p->grouped) dist_group_end(comm);
        if (i + 1 >= p->grouped) rt_wait(rank, RT_HOST, &done[i]);
    }
    if (p->failure && !rt_failed(rank)) rt_fail(rank, "%s", p->failure);
    rt_free(rank, RT_WORKSPACE, &floats);
    rt_free(rank, RT_WORKSPACE, &integers);
}

/* ---------------------------------------------------------------------------- training with other options */

static void other_bucket_size(dist_options *o) { o->bucket_size_mb = 0; }
static void fewer_micro_batches(dist_options *o) { o->accumulation = 1; }

/* Two steps of ddp, in which the hosts run ahead of the collectives. */
static void train(dist_comm *comm, const vit_model *m, void (*err)(dist_options *)) {
    enum { B = 2, MICRO_BATCHES = 3 };
    float images[B * 8 * 8] = {1, 2, 3};
    int32_t labels[B] = {0, 1};
    uint64_t keys[B] = {1, 2};
    error_text e = {{0}};
    dist d;
    dist_options o = {.strategy = "ddp",
                      .batch_size = B,
                      .accumulation = MICRO_BATCHES,
                      .bucket_size_mb = 25,
                      .reduction = DIST_REDUCE_EVERY,
                      .adamw = {.9, .999, 1e-8, 0},
                      .counts = 1};
    if (comm->index == ERRING) err(&o);
    if (dist_open(&d, comm, m, &o, &e) == 0)
        for (size_t step = 1; step <= 2; step++) {
            dist_result result;
            dist_begin_step(&d, step, 1e-3);
            for (size_t micro = 0; micro < o.accumulation; micro++)
                dist_micro_batch(&d, micro, images, labels, keys);
            dist_end_step(&d, &result);
        }
    else if (e.text[0])
        rt_fail(comm->rank, "%s", e.text);
    dist_close(&d);
}

/* ------------------------------------------------------------------------------------------------ program */

typedef struct {
    const char *name;
    void (*err_in_plan)(plan *);
    void (*err_in_options)(dist_options *);
} fault;

static const fault faults[] = {
    {"0", no_fault, NULL},
    {"wrong_operation", wrong_operation, NULL},
    {"wrong_count", wrong_count, NULL},
    {"wrong_type", wrong_type, NULL},
    {"wrong_root", wrong_root, NULL},
    {"wrong_unit", wrong_unit, NULL},
    {"swapped_order", swapped_order, NULL},
    {"skips_one", skips_one, NULL},
    {"one_call_more", one_call_more, NULL},
    {"other_group", other_group, NULL},
    {"returns_early", returns_early, NULL},
    {"fails", fails, NULL},
    {"send_without_recv", send_without_recv, NULL},
    {"send_of_other_count", send_of_other_count, NULL},
    {"other_bucket_size", NULL, other_bucket_size},
    {"fewer_micro_batches", NULL, fewer_micro_batches},
};

typedef struct {
    const fault *fault;
    dist_hub *hub;
    vit_model model;
} run;

static int rank_body(rt_rank *rank, void *argument) {
    const run *r = argument;
    error_text e;
    dist_comm comm;
    if (vit_cpu.open(rank, &e)) return rt_fail(rank, "%s", e.text);
    if (dist_comm_open(&comm, r->hub, rank, &vit_cpu) == 0) {
        plan p = agreed_plan(rank->rank);
        if (rank->rank == ERRING && r->fault->err_in_plan) r->fault->err_in_plan(&p);
        if (r->fault->err_in_plan)
            follow(&comm, &p);
        else
            train(&comm, &r->model, r->fault->err_in_options);
        dist_comm_close(&comm);
    }
    vit_cpu.close(rank);
    return 0;
}

int main(int argc, char **argv) {
    const vit_config config = {.image_height = 8,
                               .image_width = 8,
                               .channels = 1,
                               .patch_size = 4,
                               .embed_dim = 16,
                               .depth = 2,
                               .num_heads = 2,
                               .num_classes = 3,
                               .mlp_ratio = 2,
                               .layer_norm_eps = 1e-6};
    run r = {0};
    rt_world world;
    error_text e;
    for (size_t i = 0; argc == 2 && i < sizeof faults / sizeof *faults; i++)
        if (!strcmp(argv[1], faults[i].name)) r.fault = &faults[i];
    if (!r.fault || vit_model_init(&r.model, &config, RT_FP32, &e) ||
        rt_world_init(&world, RANKS, RT_CHECK) || !(r.hub = dist_hub_create(&world))) {
        fprintf(stderr, "usage: mismatch CASE, see the table of faults in mismatch.c\n");
        return 2;
    }
    double start = rt_seconds();
    int failed = rt_run(&world, rank_body, &r);
    printf("%.3f s\n", rt_seconds() - start);
    if (failed) fprintf(stderr, "train: error: %s\n%s", world.error.text, world.table ? world.table : "");
    dist_hub_free(r.hub);
    rt_world_free(&world);
    vit_model_free(&r.model);
    return failed ? 1 : 0;
}
