/* test_runtime.c - what stands below the operations: blocks, the ledger, streams and their clocks, the
 * happens-before checker, and how ranks fail.
 *
 * The checker is held against planted races and against an oracle that computes happens-before on random
 * programs as reachability in a graph. Times are compared with what the definition gives for clocks that were
 * set by hand, 100 virtual seconds apart: what the operations really take is lost in that. A hang ends in
 * SIGALRM. */
#include <float.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "dist.h"

/* --------------------------------------------------------------------------------------- worlds for tests */

enum { MOST_RANKS = 5 };

/* What a rank does here, with its device and communicator open. */
typedef int (*rank_body)(dist_comm *comm, void *argument);

typedef struct {
    dist_hub *hub;
    const vit_device *device;
    rank_body body;
    void *argument;
} stage;

static int on_stage(rt_rank *rank, void *pointer) {
    stage *s = pointer;
    dist_comm *comm = calloc(1, sizeof *comm); /* on the heap: sanitizers see who uses it afterwards */
    error_text e;
    assert_non_null(comm);
    assert_int_equal(s->device->open(rank, &e), 0);
    assert_int_equal(dist_comm_open(comm, s->hub, rank, s->device), 0);
    int status = s->body(comm, s->argument);
    dist_comm_close(comm);
    s->device->close(rank);
    free(comm);
    return status;
}

/* How the world ended: an empty message if it did not fail. */
typedef struct {
    char message[2048], table[2048];
    int rank; /* that failed first */
} ending;

static ending run_on(const vit_device *device, int ranks, rank_body body, void *argument) {
    rt_world world;
    ending end = {.rank = -1};
    assert_int_equal(rt_world_init(&world, ranks, RT_CHECK), 0);
    stage s = {dist_hub_create(&world), device, body, argument};
    assert_non_null(s.hub);
    int failed = rt_run(&world, on_stage, &s);
    assert_int_equal(failed, atomic_load(&world.failed) ? -1 : 0);
    if (failed) {
        memcpy(end.message, world.error.text, sizeof end.message);
        end.rank = world.failed_rank;
        assert_true(end.message[0] && !strchr(end.message, '\n')); /* one line */
    }
    if (world.table) snprintf(end.table, sizeof end.table, "%s", world.table);
    dist_hub_free(s.hub);
    rt_world_free(&world);
    return end;
}

static ending run(int ranks, rank_body body, void *argument) {
    return run_on(&vit_cpu, ranks, body, argument);
}

static void assert_begins(const char *text, const char *beginning) {
    char head[2048];
    snprintf(head, sizeof head, "%.*s", (int)strlen(beginning), text);
    assert_string_equal(head, beginning);
}

static void post(dist_comm *comm, dist_op op, rt_block in, rt_block out, int peer, const char *unit,
                 rt_event *wait, rt_event *done) {
    dist_post(comm, &(dist_call){.op = op,
                                 .in = in,
                                 .out = out,
                                 .peer = peer,
                                 .unit = unit,
                                 .stream = RT_COMMUNICATION,
                                 .wait = wait,
                                 .done = done});
}

static void post_barrier(dist_comm *comm, rt_event *wait, rt_event *done) {
    post(comm, DIST_BARRIER, (rt_block){0}, (rt_block){0}, 0, "barrier", wait, done);
}

static rt_block floats(dist_comm *comm, size_t count) {
    return rt_alloc(comm->rank, RT_WORKSPACE, RT_FP32, count, 1);
}

/* --------------------------------------------------------------------------------------- types and slices */

static void types_have_their_sizes(void **state) {
    (void)state;
    const struct {
        rt_type type;
        size_t bytes;
    } expected[] = {{RT_U8, 1},   {RT_I32, 4},  {RT_I64, 8},  {RT_U64, 8},
                    {RT_FP16, 2}, {RT_BF16, 2}, {RT_FP32, 4}, {RT_FP64, 8}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        assert_int_equal(rt_type_size(expected[i].type), expected[i].bytes);
}

static void slices_count_elements_and_share_the_track(void **state) {
    (void)state;
    char memory[256];
    rt_track track[2] = {{0}};
    for (rt_type type = RT_U8; type <= RT_FP64; type++) {
        rt_block whole = {memory, type, 32, track, 2}, part = rt_slice(whole, 10, 5);
        assert_ptr_equal(part.data, memory + 10 * rt_type_size(type));
        assert_int_equal(part.type, type);
        assert_int_equal(part.count, 5);
        assert_ptr_equal(part.track, track);
        assert_int_equal(part.tracks, 2);
    }
    assert_null(rt_slice((rt_block){.count = 32}, 10, 5).data); /* an absent block stays absent */
}

/* ------------------------------------------------------------------------------------------------- ledger */

static int ledger_body(dist_comm *comm, void *argument) {
    (void)argument;
    rt_rank *rank = comm->rank;
    const rt_ledger *l = &rank->ledger;
    rt_block a = rt_alloc(rank, RT_PARAMETERS, RT_FP32, 1000, 3),
             b = rt_alloc(rank, RT_GRADIENTS, RT_U8, 500, 1),
             empty = rt_alloc(rank, RT_OPTIMIZER, RT_FP64, 0, 1);
    assert_int_equal(a.count, 1000);
    assert_int_equal(a.type, RT_FP32);
    assert_int_equal(a.tracks, 3);
    assert_int_equal((uintptr_t)a.data % 64, 0);
    for (size_t i = 0; i < a.count; i++) assert_true(((float *)a.data)[i] == 0);
    assert_int_equal(l->bytes[RT_PARAMETERS], 4000);
    assert_int_equal(l->bytes[RT_GRADIENTS], 500);
    assert_int_equal(l->bytes[RT_OPTIMIZER], 0);
    assert_non_null(empty.data);
    rt_free(rank, RT_PARAMETERS, &a);
    assert_null(a.data);
    rt_free(rank, RT_PARAMETERS, &a); /* nothing to give back any more */
    rt_block c = rt_alloc(rank, RT_GRADIENTS, RT_FP16, 600, 1);
    assert_int_equal(l->bytes[RT_PARAMETERS], 0);
    assert_int_equal(l->peak_bytes[RT_PARAMETERS], 4000);
    assert_int_equal(l->bytes[RT_GRADIENTS], 1700);
    assert_int_equal(l->peak_bytes[RT_GRADIENTS], 1700);
    assert_int_equal(l->total_bytes, 1700);
    assert_int_equal(l->total_peak_bytes, 4500); /* not the sum of the peaks: they came at different times */
    rt_free(rank, RT_GRADIENTS, &b);
    rt_free(rank, RT_GRADIENTS, &c);
    rt_free(rank, RT_OPTIMIZER, &empty);
    assert_int_equal(l->total_bytes, 0);
    assert_int_equal(l->total_peak_bytes, 4500);
    return 0;
}

static void ledger_counts_bytes_and_peaks(void **state) {
    (void)state;
    assert_string_equal(run(1, ledger_body, NULL).message, "");
    static const char *const names[RT_CATEGORIES] = {"parameters",    "gradients", "optimizer", "activations",
                                                     "communication", "workspace", "host"};
    for (int c = 0; c < RT_CATEGORIES; c++) assert_string_equal(rt_category_name(c), names[c]);
}

static int too_much_body(dist_comm *comm, void *argument) {
    (void)argument;
    rt_rank *rank = comm->rank;
    rt_block small = rt_alloc(rank, RT_PARAMETERS, RT_I32, 25, 1);
    rt_block huge =
        rt_alloc(rank, RT_ACTIVATIONS, RT_FP64, SIZE_MAX / 8 + 2, 1); /* 8 times that wraps to 8 */
    assert_null(huge.data);
    assert_int_equal(huge.tracks, 0);
    assert_int_equal(rank->ledger.total_bytes, 100);
    rt_free(rank, RT_ACTIVATIONS, &huge);
    rt_free(rank, RT_PARAMETERS, &small);
    return 0;
}

static void a_size_that_wraps_around_is_out_of_memory(void **state) {
    (void)state;
    ending end = run(1, too_much_body, NULL);
    assert_begins(end.message, "rank 0: out of memory: ");
    assert_non_null(strstr(end.message, " bytes more for activations, 100 in use"));
}

/* A device whose memory refuses one allocation of one rank. */
static struct {
    int rank;
    size_t at, calls; /* calls of that rank so far */
    atomic_long live; /* pieces of all ranks that were not given back */
} refusal;

static void *refusing_allocate(rt_rank *rank, size_t bytes) {
    if (rank->rank == refusal.rank && refusal.calls++ == refusal.at) return NULL;
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    atomic_fetch_add(&refusal.live, 1);
    return memset(memory, 0, bytes);
}

static void refusing_release(rt_rank *rank, void *memory, size_t bytes) {
    (void)rank, (void)bytes;
    atomic_fetch_sub(&refusal.live, 1);
    free(memory);
}

static int refusing_open(rt_rank *rank, error_text *e) {
    if (vit_cpu.open(rank, e)) return -1;
    rank->allocate = refusing_allocate;
    rank->release = refusing_release;
    return 0;
}

static const vit_config tiny_config = {.image_height = 4,
                                       .image_width = 4,
                                       .channels = 1,
                                       .patch_size = 2,
                                       .embed_dim = 16,
                                       .depth = 2,
                                       .num_heads = 2,
                                       .num_classes = 3,
                                       .mlp_ratio = 2,
                                       .layer_norm_eps = 1e-6};

/* Two steps of two micro-batches, an evaluation, and everything is given back. */
static int tiny_training_body(dist_comm *comm, void *argument) {
    const vit_model *m = argument;
    float images[2 * 4 * 4] = {1, 2, 3}, logits[2 * 3];
    int32_t labels[2] = {0, 2};
    uint64_t keys[2] = {1, 2};
    int64_t count = 1;
    error_text e = {{0}};
    dist d;
    dist_options o = {.strategy = "ddp",
                      .batch_size = 2,
                      .accumulation = 2,
                      .reduction = DIST_REDUCE_EVERY,
                      .adamw = {.9, .999, 1e-8, 0},
                      .counts = 1};
    if (dist_open(&d, comm, m, &o, &e)) {
        if (e.text[0]) rt_fail(comm->rank, "%s", e.text);
    } else {
        for (size_t t = 1; t <= 2; t++) {
            dist_result result;
            dist_begin_step(&d, t, 1e-3);
            for (size_t micro = 0; micro < 2; micro++) dist_micro_batch(&d, micro, images, labels, keys);
            dist_end_step(&d, &result);
        }
        dist_forward(&d, images, labels, logits, NULL, NULL);
        dist_sum(&d, &count, 1);
        if (!rt_failed(comm->rank)) assert_int_equal(count, comm->size);
    }
    dist_close(&d);
    assert_int_equal(comm->rank->ledger.total_bytes, 0);
    return 0;
}

/* Wherever memory runs out: one message, the other ranks end too, and nothing is lost. */
static void every_refused_allocation_is_one_error(void **state) {
    (void)state;
    vit_device device = vit_cpu;
    vit_model model;
    error_text e;
    device.open = refusing_open;
    assert_int_equal(vit_model_init(&model, &tiny_config, RT_FP32, &e), 0);
    for (int rank = 0; rank < 2; rank++) {
        char expected[64], message[2048];
        snprintf(expected, sizeof expected, "rank %d: out of memory: ", rank);
        refusal.rank = rank;
        for (refusal.at = 0;; refusal.at++) {
            refusal.calls = 0;
            ending end = run_on(&device, 2, tiny_training_body, &model);
            memcpy(message, end.message, sizeof message);
            assert_int_equal(atomic_load(&refusal.live), 0);
            if (!message[0]) break; /* it asks no more often than this */
            assert_begins(message, expected);
            assert_int_equal(end.rank, rank);
        }
        assert_int_equal(refusal.calls, refusal.at);
        assert_true(refusal.at > 10);
    }
    vit_model_free(&model);
}

/* ------------------------------------------------------------------------------------------------- clocks */

static void operate(rt_rank *rank, int stream, int milliseconds) {
    if (!rt_begin(rank, stream, "operation", RT_BLOCKS({0}), RT_BLOCKS({0}))) return;
    usleep((useconds_t)milliseconds * 1000);
    rt_end(rank, stream, 0, 0);
}

/* Lets a stream's clock show at least `time`. */
static void pass_time(rt_rank *rank, int stream, double time) {
    rt_event event = {.time = time, .recorded = 1, .done = 1};
    rt_wait(rank, stream, &event);
}

#define ASSERT_SOON_AFTER(time, expected) assert_true((time) >= (expected) && (time) < (expected) + 50)

static int clocks_body(dist_comm *comm, void *argument) {
    (void)argument;
    rt_rank *rank = comm->rank;
    const rt_stream *compute = &rank->stream[RT_COMPUTE], *other = &rank->stream[RT_COMMUNICATION];
    rt_event event = {0};
    rt_wait(rank, RT_COMPUTE, &event); /* never recorded: no wait */
    operate(rank, RT_COMPUTE, 5);
    assert_true(compute->time >= 0.005 && compute->time < 50); /* measured */
    assert_true(other->time == 0);                             /* the streams run side by side */
    pass_time(rank, RT_COMPUTE, 100);
    operate(rank, RT_COMPUTE, 5);
    assert_true(compute->time >= 100.005);
    ASSERT_SOON_AFTER(compute->time, 100.0); /* the stream's own end is the latest */
    pass_time(rank, RT_HOST, 200);
    assert_true(compute->time < 200); /* only what is launched later is late */
    operate(rank, RT_COMPUTE, 0);
    ASSERT_SOON_AFTER(compute->time, 200.0); /* the host is the latest */
    pass_time(rank, RT_COMPUTE, 300);
    rt_record(rank, RT_COMPUTE, &event);
    pass_time(rank, RT_COMPUTE, 400);
    rt_wait(rank, RT_COMMUNICATION, &event);
    operate(rank, RT_COMMUNICATION, 0);
    ASSERT_SOON_AFTER(other->time, 300.0); /* the event is the latest, as it was when it was recorded */
    rt_wait(rank, RT_HOST, &event);
    assert_true(rank->stream[RT_HOST].time == event.time);
    return 0;
}

static void operations_start_at_the_latest_of_stream_host_and_events(void **state) {
    (void)state;
    assert_string_equal(run(1, clocks_body, NULL).message, "");
}

/* Rank r's input is ready at 100 (r + 1). */
static int collective_clock_body(dist_comm *comm, void *argument) {
    double *ends = argument;
    rt_rank *rank = comm->rank;
    const rt_stream *s = &rank->stream[RT_COMMUNICATION];
    rt_event ready = {0}, first = {0}, second = {0};
    pass_time(rank, RT_COMPUTE, 100.0 * (rank->rank + 1));
    rt_record(rank, RT_COMPUTE, &ready);
    post_barrier(comm, &ready, &first);
    post_barrier(comm, NULL, &second);
    assert_true(rank->stream[RT_HOST].time == 0); /* the host runs on */
    rt_wait(rank, RT_HOST, &first);
    ASSERT_SOON_AFTER(first.time, 100.0 * comm->size);
    assert_true(rank->stream[RT_HOST].time == first.time);
    operate(rank, RT_COMMUNICATION, 0); /* comes after the second, which nobody has waited for */
    assert_true(second.time >= first.time && s->time >= second.time);
    ends[rank->rank] = second.time;
    pass_time(rank, RT_HOST, 1000.0 * (rank->rank + 1)); /* a late host launches late */
    post_barrier(comm, NULL, &first);
    rt_wait(rank, RT_COMPUTE, &first);
    ASSERT_SOON_AFTER(rank->stream[RT_COMPUTE].time, 1000.0 * comm->size);
    return 0;
}

static void a_collective_starts_when_it_is_ready_on_all_ranks(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= MOST_RANKS; ranks++) {
        double ends[MOST_RANKS];
        assert_string_equal(run(ranks, collective_clock_body, ends).message, "");
        for (int r = 1; r < ranks; r++) assert_true(ends[r] == ends[0]);
    }
}

/* ------------------------------------------------------------------------------------------------ checker */

/* Programs of one rank, a word a step: a stream (H host, C compute, X communication), then r or w and what
 * the operation reads or writes, or ! or ? and an event that the stream records or waits for. "Cwa C!1 X?1
 * Xra": compute writes a and records event 1, for which communication waits before it reads a. The blocks: a,
 * s a slice of a, b, and u, which spans a and b. */
enum { MOST_STEPS = 20, WORD = 4 };

typedef struct {
    const char *text;
    int steps, stopped_at; /* the step at which the checker stopped it; `steps` if none */
} program;

static int stream_of(char letter) {
    return letter == 'H' ? RT_HOST : letter == 'C' ? RT_COMPUTE : RT_COMMUNICATION;
}

static int program_body(dist_comm *comm, void *argument) {
    program *p = argument;
    rt_rank *rank = comm->rank;
    char word[MOST_STEPS][WORD];
    rt_event event[10] = {{0}};
    rt_block u = rt_alloc(rank, RT_WORKSPACE, RT_FP32, 32, 2), a = rt_slice(u, 0, 16),
             b = rt_slice(u, 16, 16);
    a.tracks = b.tracks = 1;
    b.track = u.track + 1;
    p->steps = (int)((strlen(p->text) + 1) / WORD);
    p->stopped_at = p->steps;
    for (int i = 0; i < p->steps && p->stopped_at == p->steps; i++) {
        memcpy(word[i], p->text + i * WORD, WORD);
        word[i][WORD - 1] = 0; /* it is the operation's name */
        int stream = stream_of(word[i][0]);
        char action = word[i][1], object = word[i][2];
        rt_block block = object == 'a' ? a : object == 's' ? rt_slice(a, 4, 4) : object == 'b' ? b : u;
        rt_block none = {0};
        if (action == '!')
            rt_record(rank, stream, &event[object - '0']);
        else if (action == '?')
            rt_wait(rank, stream, &event[object - '0']);
        else if (!rt_begin(rank, stream, word[i], RT_BLOCKS(action == 'r' ? block : none),
                           RT_BLOCKS(action == 'w' ? block : none)))
            p->stopped_at = i;
        else
            rt_end(rank, stream, 0, 0);
    }
    rt_free(rank, RT_WORKSPACE, &u);
    return 0;
}

#define RACE(op, stream, does, other, other_stream, did)                                                     \
    "race on rank 0: " op " on the " stream " stream " does " what " other " on the " other_stream           \
    " stream " did ", and no event orders them"

static void planted_races_are_named_and_correct_orders_are_silent(void **state) {
    (void)state;
    const struct {
        const char *program, *message;
    } cases[] = {
        /* every kind between the streams, both directions */
        {"Cwa Xwa", RACE("Xwa", "communication", "writes", "Cwa", "compute", "wrote")},
        {"Cwa Xra", RACE("Xra", "communication", "reads", "Cwa", "compute", "wrote")},
        {"Cra Xwa", RACE("Xwa", "communication", "writes", "Cra", "compute", "read")},
        {"Xwa Cwa", RACE("Cwa", "compute", "writes", "Xwa", "communication", "wrote")},
        {"Xwa Cra", RACE("Cra", "compute", "reads", "Xwa", "communication", "wrote")},
        {"Xra Cwa", RACE("Cwa", "compute", "writes", "Xra", "communication", "read")},
        {"Cwa Hwa", RACE("Hwa", "host", "writes", "Cwa", "compute", "wrote")},
        {"Cwa Hra", RACE("Hra", "host", "reads", "Cwa", "compute", "wrote")},
        {"Xra Hwa", RACE("Hwa", "host", "writes", "Xra", "communication", "read")},
        {"Cra Xra Hra", ""},
        {"Cwa Cwa Cra Cwa", ""}, /* a stream is in order */
        {"Hwa Cra Hra Xra", ""}, /* what the host did comes before what it launches */
        {"Hra Cwa", ""},
        /* events */
        {"Cwa C!1 X?1 Xra", ""},
        {"Cra C!1 X?1 Xwa", ""},
        {"Cwa C!1 H?1 Hra", ""},
        {"Cwa C!1 H?1 Xra", ""}, /* the host has waited, so all that it launches comes after */
        {"C!1 Cwa X?1 Xra", RACE("Xra", "communication", "reads", "Cwa", "compute", "wrote")}, /* too early */
        {"Cwa X?1 C!1 Xra",
         RACE("Xra", "communication", "reads", "Cwa", "compute", "wrote")}, /* no wait yet */
        {"Cwa C!1 Cwa X?1 Xra", RACE("Xra", "communication", "reads", "Cwa", "compute", "wrote")},
        {"Cwa C!1 Cwa C!1 X?1 Xra", ""}, /* recorded again */
        {"Cwa X!1 X?1 Xra",
         RACE("Xra", "communication", "reads", "Cwa", "compute", "wrote")}, /* its own event */
        /* the last of several readers or writers, and those before it */
        {"Cra Hra Xwa", RACE("Xwa", "communication", "writes", "Cra", "compute", "read")},
        {"Cwa C!1 X?1 Xra X!2 Cwa", RACE("Cwa", "compute", "writes", "Xra", "communication", "read")},
        {"Cwa C!1 X?1 Xra X!2 C?2 Cwa", ""},
        {"Cwa C!1 X?1 Xwa Hra", RACE("Hra", "host", "reads", "Xwa", "communication", "wrote")},
        /* through a third stream */
        {"Cwa C!1 X?1 Xrb X!2 H?2 Hra", ""},
        {"Cwa C!1 H?1 H!2 X?2 Xra", ""},
        {"Cwa C!1 Cwa X?1 Xrb X!2 H?2 Hra", RACE("Hra", "host", "reads", "Cwa", "compute", "wrote")},
        /* slices and blocks of several tracks */
        {"Cws Xra", RACE("Xra", "communication", "reads", "Cws", "compute", "wrote")},
        {"Cwa Xrs", RACE("Xrs", "communication", "reads", "Cwa", "compute", "wrote")},
        {"Cwa Xwb Cra", ""},
        {"Cwb Xru", RACE("Xru", "communication", "reads", "Cwb", "compute", "wrote")},
        {"Cwu Xwb", RACE("Xwb", "communication", "writes", "Cwu", "compute", "wrote")},
        {"Cwa C!1 Cwb X?1 Xra", ""},
        {"Cwa C!1 Cwb X?1 Xwu", RACE("Xwu", "communication", "writes", "Cwb", "compute", "wrote")},
        {"Cwa Cwb C!1 X?1 Xwu", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        program p = {.text = cases[i].program};
        ending end = run(1, program_body, &p);
        if (strcmp(end.message, cases[i].message)) print_message("%s\n", cases[i].program);
        assert_string_equal(end.message, cases[i].message);
    }
}

/* The first step of a program that races, or their number. before[i] is the set of steps that happen before
 * step i: those before the last one of its stream, before the host's last one, and, for a wait, before the
 * event's record. */
static int oracle(const char *text, int steps) {
    uint32_t before[MOST_STEPS], last_of_stream[RT_STREAMS] = {0}, recorded[10] = {0};
    for (int i = 0; i < steps; i++) {
        const char *word = text + i * WORD;
        int stream = stream_of(word[0]), event = word[2] - '0';
        before[i] = last_of_stream[stream] | last_of_stream[RT_HOST];
        if (word[1] == '?') before[i] |= recorded[event];
        for (int j = 0; j < i; j++) {
            const char *other = text + j * WORD;
            int accesses = strchr("rw", word[1]) && strchr("rw", other[1]),
                writes = word[1] == 'w' || other[1] == 'w';
            int disjoint =
                (strchr("as", word[2]) && other[2] == 'b') || (strchr("as", other[2]) && word[2] == 'b');
            if (accesses && writes && !disjoint && !(before[i] >> j & 1)) return i;
        }
        last_of_stream[stream] = before[i] | (uint32_t)1 << i;
        if (word[1] == '!') recorded[event] = last_of_stream[stream];
    }
    return steps;
}

static void random_programs_agree_with_reachability_in_a_graph(void **state) {
    (void)state;
    enum { PROGRAMS = 4000 };
    size_t silent = 0;
    for (uint64_t n = 0; n < PROGRAMS; n++) {
        char text[MOST_STEPS * WORD];
        uint64_t key = random_key(1, 2, n, 0), draw = 0;
        for (int i = 0; i < MOST_STEPS; i++) {
            char *word = text + i * WORD;
            int action = (int)random_below(key, draw++, 6);
            word[0] = "HCX"[random_below(key, draw++, 3)];
            word[1] = "rw!!??"[action];
            word[2] = action < 2 ? "asbu"[random_below(key, draw++, 4)] : "12"[random_below(key, draw++, 2)];
            word[3] = ' ';
        }
        text[MOST_STEPS * WORD - 1] = 0;
        program p = {.text = text};
        ending end = run(1, program_body, &p);
        int expected = oracle(text, MOST_STEPS);
        if (p.stopped_at != expected) print_message("%s\n", text);
        assert_int_equal(p.stopped_at, expected);
        assert_int_equal(end.message[0] != 0, expected < MOST_STEPS);
        silent += expected == MOST_STEPS;
    }
    assert_true(silent > PROGRAMS / 20 && silent < PROGRAMS / 20 * 19); /* both kinds are there */
}

/* A collective takes part as an operation of its stream. which: the wait that is left out, 0: none. */
static int collective_race_body(dist_comm *comm, void *argument) {
    int which = *(int *)argument;
    rt_rank *rank = comm->rank;
    rt_block x = floats(comm, 4);
    rt_event ready = {0}, done = {0};
    vit_context c = {.rank = rank, .stream = RT_COMPUTE, .device = comm->device};
    float values[4] = {0};
    vit_copy_in(&c, x, values);
    rt_record(rank, RT_COMPUTE, &ready);
    post(comm, DIST_ALL_REDUCE, x, x, 0, "x", which == 1 ? NULL : &ready, &done);
    if (which != 2) rt_wait(rank, RT_COMPUTE, &done);
    vit_copy_out(&c, values, x);
    if (which == 2) rt_wait(rank, RT_HOST, &done); /* the others may still be reading */
    rt_free(rank, RT_WORKSPACE, &x);
    return 0;
}

static void a_collective_races_like_an_operation(void **state) {
    (void)state;
    static const char *const expected[] = {"",
                                           "race on rank 0: all_reduce on the communication stream reads "
                                           "what copy_in on the compute stream wrote",
                                           "race on rank 0: copy_out on the compute stream reads what "
                                           "all_reduce on the communication stream wrote"};
    for (int which = 0; which < 3; which++)
        assert_begins(run(1, collective_race_body, &which).message, expected[which]);
}

static int unchecked_body(rt_rank *rank, void *argument) {
    rt_track track = {0};
    rt_block x = {argument, RT_I32, 1, &track, 1};
    for (int stream = 0; stream < RT_STREAMS; stream++)
        assert_true(rt_access(rank, stream, "write", RT_BLOCKS({0}), RT_BLOCKS(x)));
    return 0;
}

static void without_the_flag_nothing_is_checked(void **state) {
    (void)state;
    rt_world world;
    int value = 0;
    assert_int_equal(rt_world_init(&world, 1, 0), 0);
    assert_int_equal(rt_run(&world, unchecked_body, &value), 0);
    rt_world_free(&world);
}

/* ----------------------------------------------------------------------------------------------- failures */

static int second_failure_body(dist_comm *comm, void *argument) {
    (void)argument;
    if (comm->index != 1)
        while (!rt_failed(comm->rank)) usleep(100);
    return rt_fail(comm->rank, "rank %d says no", comm->index);
}

static void the_first_failure_wins(void **state) {
    (void)state;
    ending end = run(3, second_failure_body, NULL);
    assert_string_equal(end.message, "rank 1 says no");
    assert_int_equal(end.rank, 1);
    assert_string_equal(end.table, ""); /* what one rank suffers is no matter of collectives */
}

/* After a failure every call returns at once and does nothing. */
static int after_failure_body(dist_comm *comm, void *argument) {
    (void)argument;
    rt_rank *rank = comm->rank;
    rt_event done = {0}, never = {.recorded = 1};
    if (comm->index == 0) {
        post_barrier(comm, NULL, &done);
        rt_wait(rank, RT_HOST, &done); /* for a rank that does not come */
        assert_false(done.done);
    } else {
        rt_fail(rank, "that is all");
    }
    assert_true(rt_failed(rank));
    rt_wait(rank, RT_COMPUTE, &never);
    post_barrier(comm, NULL, &done);
    assert_false(rt_begin(rank, RT_COMPUTE, "operation", RT_BLOCKS({0}), RT_BLOCKS({0})));
    return 0;
}

static void after_a_failure_nothing_blocks(void **state) {
    (void)state;
    assert_string_equal(run(2, after_failure_body, NULL).message, "that is all");
}

static int mute_failure_body(dist_comm *comm, void *argument) {
    (void)argument;
    rt_event done = {0};
    if (comm->index == 1) return -1;
    post_barrier(comm, NULL, &done);
    rt_wait(comm->rank, RT_HOST, &done);
    return 0;
}

static void a_rank_that_returns_an_error_fails_the_world(void **state) {
    (void)state;
    ending end = run(3, mute_failure_body, NULL);
    assert_string_equal(end.message, "rank 1 failed without saying why");
}

/* Each receives before it sends. */
static int deadlock_body(dist_comm *comm, void *argument) {
    (void)argument;
    rt_block x = floats(comm, 8);
    rt_event received = {0};
    post(comm, DIST_RECV, (rt_block){0}, x, (comm->index + 1) % comm->size, "activations", NULL, &received);
    rt_wait(comm->rank, RT_HOST, &received);
    post(comm, DIST_SEND, x, (rt_block){0}, (comm->index + 1) % comm->size, "activations", NULL, NULL);
    rt_free(comm->rank, RT_WORKSPACE, &x);
    return 0;
}

static void a_deadlock_is_found_and_shown(void **state) {
    (void)state;
    for (int ranks = 2; ranks <= MOST_RANKS; ranks++) {
        ending end = run(ranks, deadlock_body, NULL);
        const char *line = end.table;
        assert_begins(end.message, "deadlock: ");
        assert_begins(line, "  rank state    communicator   sequence operation           elements  unit\n");
        for (int r = 0; r < ranks; r++) {
            char expected[128];
            snprintf(expected, sizeof expected,
                     "%6d waiting  world                 0 recv                       8  activations\n", r);
            line = strchr(line, '\n') + 1;
            assert_begins(line, expected);
        }
        assert_string_equal(strchr(line, '\n'), "\n"); /* a line for each rank, no more */
    }
}

/* Rank 1 returns without a collective that the others post, before or after they do. */
static int early_body(dist_comm *comm, void *argument) {
    int late = *(int *)argument;
    rt_event done = {0};
    post_barrier(comm, NULL, &done);
    rt_wait(comm->rank, RT_HOST, &done);
    if (late == (comm->index == 1)) usleep(20000);
    if (comm->index == 1) return 0;
    post_barrier(comm, NULL, &done);
    rt_wait(comm->rank, RT_HOST, &done);
    return 0;
}

static void a_rank_that_leaves_early_is_named(void **state) {
    (void)state;
    for (int late = 0; late < 2; late++) {
        ending end = run(2, early_body, &late);
        assert_string_equal(end.message, "rank 1 left while rank 0 waits for it in barrier 1 (barrier)");
        assert_non_null(strstr(end.table, "     1 left     world                 0 barrier "));
        assert_non_null(strstr(end.table, "world                 1 barrier "));
    }
}

/* A transport on which rank 2 is held up until the others have failed and left. */
static void held_post(dist_comm *comm, const dist_call *calls, size_t n) {
    rt_world *world = comm->rank->world;
    for (int left = 0; comm->index == 2 && left < 2; usleep(100)) {
        pthread_mutex_lock(&world->lock);
        left = world->ranks[0].left + world->ranks[1].left;
        pthread_mutex_unlock(&world->lock);
    }
    dist__local_post(comm, calls, n);
}

static const dist_transport held = {.name = "held", .post = held_post};

static int late_post_body(dist_comm *comm, void *argument) {
    static const char *const units[] = {"a", "b", "c"};
    (void)argument;
    rt_event done = {0};
    comm->transport = &held;
    post(comm, DIST_BARRIER, (rt_block){0}, (rt_block){0}, 0, units[comm->index], NULL, &done);
    rt_wait(comm->rank, RT_HOST, &done);
    return 0;
}

static void a_post_that_comes_after_the_failure_finds_nobody(void **state) {
    (void)state;
    ending end = run(3, late_post_body, NULL);
    assert_non_null(
        strstr(end.message, " disagree on the unit of launch 0 of communicator world: barrier of 0"));
    assert_non_null(strstr(end.table, "     2 running  nothing posted\n"));
}

/* A collective that goes on for a while after the world has failed. */
static struct { atomic_int posted, inside; /* ranks that wait for it; is it being executed? */ } slow;

static void slow_sum_buffers(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from,
                             size_t n_from) {
    atomic_store(&slow.inside, 1);
    while (!rt_failed(s->rank)) usleep(100);
    usleep(20000);
    vit_cpu.sum_buffers(s, to, n_to, from, n_from);
    atomic_store(&slow.inside, 0);
}

/* While rank 1 executes it on the memory of all, rank 2 fails, and rank 0 wants to leave. */
static int failure_inside_body(dist_comm *comm, void *argument) {
    rt_event *done = argument;
    rt_block x = floats(comm, 1000);
    while (comm->index == 1 && atomic_load(&slow.posted) < 2) usleep(100); /* the last to arrive executes */
    post(comm, DIST_ALL_REDUCE, x, x, 0, "x", NULL, &done[comm->index]);
    atomic_fetch_add(&slow.posted, 1);
    if (comm->index == 2) {
        while (!atomic_load(&slow.inside)) usleep(100);
        rt_fail(comm->rank, "rank 2 fails meanwhile");
    }
    rt_wait(comm->rank, RT_HOST, &done[comm->index]);
    rt_free(comm->rank, RT_WORKSPACE, &x);
    assert_int_equal(atomic_load(&slow.inside), 0);
    return 0;
}

static void memory_outlives_the_collective_that_works_on_it(void **state) {
    (void)state;
    vit_device device = vit_cpu;
    device.sum_buffers = slow_sum_buffers;
    rt_event done[3] = {{0}};
    assert_string_equal(run_on(&device, 3, failure_inside_body, done).message, "rank 2 fails meanwhile");
}

typedef struct {
    vit_model model;
    float logits[MOST_RANKS][3];
} late_evaluation;

/* The root of dp has posted its parameters, has nothing to wait for, and closes; the others come later. */
static int late_evaluation_body(dist_comm *comm, void *argument) {
    late_evaluation *l = argument;
    float images[4 * 4] = {1, 2, 3}, values[4096];
    int32_t label = 0;
    error_text e;
    dist d;
    dist_options o = {.strategy = "dp", .batch_size = 1, .accumulation = 1, .counts = 1};
    assert_int_equal(dist_open(&d, comm, &l->model, &o, &e), 0);
    for (size_t u = 0; u < l->model.units; u++) {
        assert_true(l->model.unit[u].count <= 4096);
        vit_unit_initialise(&l->model.unit[u], 7, values);
        dist_import(&d, u, values);
    }
    if (comm->index) usleep(20000);
    dist_forward(&d, images, &label, l->logits[comm->index], NULL, NULL);
    dist_close(&d);
    return 0;
}

static void closing_waits_for_slower_ranks(void **state) {
    (void)state;
    late_evaluation l;
    error_text e;
    assert_int_equal(vit_model_init(&l.model, &tiny_config, RT_FP32, &e), 0);
    assert_string_equal(run(3, late_evaluation_body, &l).message, "");
    for (int r = 1; r < 3; r++) assert_memory_equal(l.logits[r], l.logits[0], sizeof l.logits[0]);
    vit_model_free(&l.model);
}

/* ------------------------------------------------------------------------------------------------- worlds */

static int sum_body(dist_comm *comm, void *argument) {
    pthread_t *caller = argument;
    rt_block x = rt_alloc(comm->rank, RT_WORKSPACE, RT_I64, 3, 1);
    int64_t *value = x.data, n = comm->size;
    rt_event done = {0};
    for (int i = 0; i < 3; i++) value[i] = comm->index + i;
    post(comm, DIST_ALL_REDUCE, x, x, 0, "x", NULL, &done);
    rt_wait(comm->rank, RT_HOST, &done);
    for (int i = 0; i < 3; i++) assert_int_equal(value[i], n * (n - 1) / 2 + n * i);
    assert_int_equal(pthread_equal(pthread_self(), *caller) != 0, comm->index == 0);
    rt_free(comm->rank, RT_WORKSPACE, &x);
    return 0;
}

/* The world of one rank runs in the caller's thread. */
static void worlds_of_all_sizes_come_one_after_another(void **state) {
    (void)state;
    pthread_t caller = pthread_self();
    for (int i = 0; i < 300; i++) assert_string_equal(run(1 + i % MOST_RANKS, sum_body, &caller).message, "");
}

/* ------------------------------------------------------------------------------------- numbers of 16 bits */

static uint16_t narrowed(double x, rt_type type) {
    float from = (float)x;
    uint16_t to;
    rt_narrow(&to, &from, 1, type);
    return to;
}

/* Every pattern of both types is the number that IEEE 754 says, in IEEE's words: (-1)^s 2^(e - bias) (1 +
 * m / 2^bits), or 2^(1 - bias) m / 2^bits where e is 0. It is rounded to itself; between it and its
 * neighbour the nearer one wins, and halfway the even one; from halfway beyond the largest number on it is
 * infinity. */
static void sixteen_bit_numbers_follow_ieee_754(void **state) {
    static const struct {
        rt_type type;
        int bits, bias;
    } types[] = {{RT_BF16, 7, 127}, {RT_FP16, 10, 15}};
    (void)state;
    for (int t = 0; t < 2; t++) {
        rt_type type = types[t].type;
        int bits = types[t].bits, bias = types[t].bias;
        uint16_t special = (uint16_t)((2 * bias + 1) << bits);
        for (uint32_t h = 0; h < 65536; h++) {
            uint16_t pattern = (uint16_t)h, magnitude = pattern & 0x7FFF;
            int e = magnitude >> bits, m = magnitude & ((1 << bits) - 1);
            double sign = h & 0x8000 ? -1 : 1;
            double x = ldexp(e ? m + (1 << bits) : m, (e ? e : 1) - bias - bits);
            double next = ldexp((e ? m + (1 << bits) : m) + 1, (e ? e : 1) - bias - bits);
            float wide;
            rt_widen(&wide, &pattern, 1, type);
            if (magnitude > special) {
                assert_true(isnan(wide));
                uint16_t again = narrowed((double)wide, type);
                assert_true((again & 0x7FFF) > special && (again & 0x8000) == (pattern & 0x8000));
                continue;
            }
            if (magnitude == special) x = (double)INFINITY;
            assert_true((double)wide == sign * x && !signbit(wide) == (sign > 0));
            assert_int_equal(narrowed((double)wide, type), pattern);
            if (magnitude == special) continue;
            float half = (float)((x + next) / 2), below = nextafterf(half, 0),
                  above = nextafterf(half, INFINITY);
            assert_true((double)half == (x + next) / 2);
            assert_int_equal(narrowed(sign * (double)half, type), pattern + (pattern & 1));
            assert_int_equal(narrowed(sign * (double)below, type), pattern);
            assert_int_equal(narrowed(sign * (double)above, type), pattern + 1);
        }
        assert_int_equal(narrowed((double)FLT_MAX, type), special);
        assert_int_equal(narrowed(-(double)INFINITY, type), special | 0x8000);
        assert_int_equal(narrowed((double)FLT_MIN / 4, RT_FP16), 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(types_have_their_sizes),
        cmocka_unit_test(slices_count_elements_and_share_the_track),
        cmocka_unit_test(ledger_counts_bytes_and_peaks),
        cmocka_unit_test(a_size_that_wraps_around_is_out_of_memory),
        cmocka_unit_test(every_refused_allocation_is_one_error),
        cmocka_unit_test(operations_start_at_the_latest_of_stream_host_and_events),
        cmocka_unit_test(a_collective_starts_when_it_is_ready_on_all_ranks),
        cmocka_unit_test(planted_races_are_named_and_correct_orders_are_silent),
        cmocka_unit_test(random_programs_agree_with_reachability_in_a_graph),
        cmocka_unit_test(a_collective_races_like_an_operation),
        cmocka_unit_test(without_the_flag_nothing_is_checked),
        cmocka_unit_test(the_first_failure_wins),
        cmocka_unit_test(after_a_failure_nothing_blocks),
        cmocka_unit_test(a_rank_that_returns_an_error_fails_the_world),
        cmocka_unit_test(a_deadlock_is_found_and_shown),
        cmocka_unit_test(a_rank_that_leaves_early_is_named),
        cmocka_unit_test(a_post_that_comes_after_the_failure_finds_nobody),
        cmocka_unit_test(memory_outlives_the_collective_that_works_on_it),
        cmocka_unit_test(closing_waits_for_slower_ranks),
        cmocka_unit_test(worlds_of_all_sizes_come_one_after_another),
        cmocka_unit_test(sixteen_bit_numbers_follow_ieee_754),
    };
    alarm(120);
    return cmocka_run_group_tests_name("runtime", tests, NULL, NULL);
}
