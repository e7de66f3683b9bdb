/* dist.h - distributed training of a chain of units: collectives, the training loop, and the strategies.
 *
 *     #define VIT_IMPLEMENTATION
 *     #define DIST_IMPLEMENTATION
 *     #include "dist.h"
 *     ...                                                     // as every rank of a world (runtime.h: rt_run)
 *     dist_comm comm;
 *     dist_comm_open(&comm, hub, rank, &vit_cpu);             // all ranks of the process share one hub
 *     dist d;
 *     dist_open(&d, &comm, &model, &(dist_options){.strategy = "ddp", .batch_size = 32, .accumulation = 1});
 *     for (size_t t = 1; t <= steps; t++) {
 *         dist_begin_step(&d, t, learning_rate);
 *         dist_micro_batch(&d, 0, images, labels, sample_keys);
 *         dist_end_step(&d, &result);                         // result.loss, result.gradient_norm
 *                                                             // or NULL, and dist_read_result a step later
 *     }
 *
 * Contents: the communicator, the local transport, strategies, the training loop.
 *
 * A collective is posted, never executed by its caller: it names a stream, the events to wait for, an event
 * to signal and element counts. The host runs on. In the local transport the last rank to arrive executes it
 * for all, adding the ranks' values in rank order, so that a sum has the same bits whatever the bucket or
 * shard it is part of.
 *
 * A strategy is five hooks around the units of one training step (dist_strategy). It does not know what
 * computes and what communicates. A strategy says, unit by unit, which part [lo, hi) of the parameters this
 * rank updates and saves (dist_shard), and everything else is common code: the exact gradient norm, clipping,
 * the optimizer, activation checkpointing, evaluation, checkpoints.
 *
 * With N ranks and equal --gradient-reduction all strategies give the same bits.
 *
 * Errors: a failure of any rank fails the world (rt_fail); then every call returns at once and does nothing,
 * and rt_run reports the first failure. Hooks and loops therefore need no error paths.
 */
#include "vit.h"

#ifndef DIST_H
#define DIST_H

/* --------------------------------------------------------------------------------------- the communicator */

typedef enum {
    DIST_ALL_REDUCE,     /* in [n] -> out [n] = sum over ranks, in rank order */
    DIST_REDUCE_SCATTER, /* in [N k] -> out [k] = rank's part of the sum */
    DIST_ALL_GATHER,     /* in [k] -> out [N k] */
    DIST_BROADCAST,      /* in [n] of the root -> out [n] of all */
    DIST_REDUCE,         /* in [n] -> out [n] of the root = sum */
    DIST_SEND,           /* in [n] -> peer's DIST_RECV */
    DIST_RECV,           /* out [n] */
    DIST_BARRIER,
    DIST_CONTROL, /* an all-reduce of int64: norm, loss and flags of a step, or counts of an evaluation */
    DIST_OPS
} dist_op;

/* "all_reduce", ..., "control". */
const char *dist_op_name(dist_op op);

/* One part of one rank in one collective. In and out may be the same memory (for scatter and gather: the
 * rank's own part of the larger one). */
typedef struct dist_call {
    dist_op op;
    rt_block in, out;
    int peer;         /* the root of broadcast and reduce, the other rank of send and recv */
    const char *unit; /* what it is for; ranks must agree on it; the text must outlive the run */
    int stream;       /* RT_COMMUNICATION */
    rt_event *wait;   /* what must have happened first, or NULL */
    rt_event *done;   /* signalled at the end, or NULL */
} dist_call;

/* What a rank sent: calls, elements of the full logical payload, and bytes on the wire (all-reduce 2 (N-1)/N
 * of the payload, scatter and gather (N-1)/N; the root of a broadcast sends N-1 times, the others of a reduce
 * once). */
typedef struct dist_traffic {
    uint64_t calls, elements;
    double wire_bytes;
} dist_traffic;

enum { DIST_GROUP = 8 }; /* most calls of one group */

typedef struct dist_comm {
    const char *name; /* "world" */
    rt_rank *rank;
    int index, size; /* this rank's number in the communicator, and how many there are */
    const struct dist_transport *transport;
    const vit_device *device;
    void *shared;
    uint64_t sequence,
        *pair_sequence; /* collectives posted; [2 * size] sends to and receives from each peer */
    dist_call group[DIST_GROUP];
    size_t grouped;
    int grouping;
    rt_event own_done; /* for calls that signal nothing */
    dist_traffic traffic[DIST_OPS];
    /* Told of what this rank does, in order: collectives as they are posted, and of a training step
     * "forward", "recompute", "backward", "free" and "step"; or NULL. */
    void (*observe)(void *observer, const char *what, const char *unit, size_t elements);
    void *observer;
    uint64_t waits; /* made so far: tests skip one of them */
} dist_comm;

/* Posts a call, or adds it to the open group. All ranks post the same collectives in the same order; ranks
 * that disagree fail the world with a table (rank, sequence number, operation, count, unit). */
void dist_post(dist_comm *comm, const dist_call *call);

/* The collectives posted in between (not send and recv) are launched as one. */
void dist_group_begin(dist_comm *comm);
void dist_group_end(dist_comm *comm);

/* A transport carries out what is posted. `post` gets n calls of one launch; it returns at once or when it
 * must. `open` and `close` may be NULL: they make what a communicator needs, once the device is open.
 * `replayed` is told that a recorded part of a step has been launched again, with its collectives; NULL:
 * these cannot be recorded. */
typedef struct dist_transport {
    const char *name; /* "local", "tcp" */
    void (*post)(dist_comm *comm, const dist_call *calls, size_t n);
    int (*open)(dist_comm *comm);
    void (*close)(dist_comm *comm);
    void (*replayed)(dist_comm *comm);
} dist_transport;

/* Where ranks meet. Each transport has its own, which begins with this and must outlive the run of the
 * world. */
typedef struct dist_hub {
    const dist_transport *transport;
    rt_world *world;
    int size; /* ranks that meet in it */
} dist_hub;

/* That of the local transport: all ranks are threads of this process. NULL: out of memory. */
dist_hub *dist_hub_create(rt_world *world);
void dist_hub_free(dist_hub *hub);

/* For transports. Elements of the full logical payload of a call, and their type. */
static inline size_t dist_elements(const dist_call *c) {
    return c->in.count > c->out.count ? c->in.count : c->out.count;
}
static inline rt_type dist_type(const dist_call *c) { return c->in.data ? c->in.type : c->out.type; }

/* This rank's communicator of all ranks of its world, through the hub. The device must be open. */
int dist_comm_open(dist_comm *comm, dist_hub *hub, rt_rank *rank, const vit_device *device);
/* What was posted through it must be complete, unless the world has failed. */
void dist_comm_close(dist_comm *comm);

/* --------------------------------------------------------------------------------------------- strategies */

typedef enum { DIST_ADAMW, DIST_SGD } dist_optimizer;
typedef enum { DIST_REDUCE_DEFAULT, DIST_REDUCE_LAST, DIST_REDUCE_EVERY } dist_reduction;

typedef struct dist_options {
    const char *strategy;
    size_t batch_size;     /* micro-batch of one rank */
    size_t accumulation;   /* micro-batches a step */
    double bucket_size_mb; /* ddp: a bucket is full at this size (MiB) */
    rt_type
        reduce_type; /* fp32, bf16 or fp16: in which ranks add gradients and keep the sums; 0: the model's */
    dist_reduction reduction; /* sum over ranks after the last micro-batch of a step, or after every one */
    size_t prefetch;          /* zero3: units gathered ahead of the one that computes */
    int keep_after_forward;   /* zero3: gathered parameters stay from forward to backward */
    size_t checkpoint_every;  /* activations of every Nth block are computed again in backward; 0: of none */
    dist_optimizer optimizer;
    vit_adamw_options adamw;
    vit_sgd_options sgd;
    double gradient_clipping; /* 0: off */
    double layer_decay; /* unit u learns at layer_decay^(units - 1 - u) times the rate; 0 and 1: all alike */
    const vit_device *offload; /* vit_cpu: optimizer state and master weights lie in host memory, and the
                                * update runs there; NULL: all on the device */
    int graphs;                /* where device and transport can: a step is recorded once and replayed */
    int inference;             /* dist_forward alone: no gradients, no optimizer state, no micro-batches */
    size_t counts;             /* dist_sum will be asked for so many numbers at most */
} dist_options;

/* The part of a unit that this rank saves, elements [lo, hi) of its padded parameters, and that it updates,
 * [lo, trained): the rest is frozen. `squares` is the part of the gradient that it adds to the norm: over all
 * ranks they cover the gradient once. */
typedef struct dist_shard {
    size_t lo, hi, trained;
    rt_block param, grad, squares, state[2]; /* of [lo, hi), [lo, trained), -, [lo, trained) */
    rt_block master; /* of [lo, trained), fp32: what the optimizer updates where param has 16 bits */
    rt_block host_param, host_grad; /* with offload: [lo, trained) in host memory */
    rt_event fetched;               /* host_grad is there */
} dist_shard;

/* A run of consecutive units whose gradients are reduced by one collective. */
typedef struct dist_bucket {
    size_t first, last, offset, count;
    rt_event ready, reduced;
} dist_bucket;

/* Memory that gradients pass through on their way to where they are kept. */
typedef struct dist_gradient_slot {
    rt_block block;
    const dist_bucket *bucket; /* whose gradient is being reduced in it, NULL: free */
    int adds;                  /* the sum is still to be added to that of earlier micro-batches */
    rt_event reduced;
} dist_gradient_slot;

/* Memory that a unit's gathered parameters stay in while they are used. */
typedef struct dist_parameter_slot {
    rt_block block;
    rt_event gathered, freed;
} dist_parameter_slot;

typedef struct dist_result {
    double loss;          /* mean over the global batch, before the update */
    double gradient_norm; /* of the mean loss, before clipping */
    size_t bad_losses;    /* samples whose loss is not finite */
    int overflow;         /* fp16: the norm is not finite, and the loss scale has been told */
    double loss_scale;    /* of this step */
    int stop;             /* a rank has asked for it */
    double ended;         /* rt_seconds() when the host knew that the step had ended */
} dist_result;

/* What a step came to, in device memory until the host reads it while the next step is under way. */
typedef struct dist_outcome {
    rt_block scalars, loss; /* [VIT_SCALARS]; int64 [3]: loss, bad losses, ranks that want to stop */
    rt_event ready, read;
    double ended; /* as dist_result's, of a device on which the host does not wait */
} dist_outcome;

/* A part of a step, of a micro-batch or the update, as the device has recorded it. */
typedef struct dist_graph {
    void *recorded; /* NULL: not yet */
    int runs;       /* before that */
    dist_traffic traffic[DIST_OPS];
} dist_graph;

typedef struct dist {
    dist_comm *comm;
    rt_rank *rank;
    const vit_device *device;
    const vit_model *model;
    dist_options options;
    const struct dist_strategy *strategy;
    vit_context context;
    vit_activations activations;

    size_t *offset; /* [units + 1]: where each unit begins in the flat buffers; multiples of 16 x ranks */
    size_t first_trained; /* units before it are frozen: no backward, no gradient, no optimizer state */
    size_t params_cut, grads_cut; /* into so many shards, of which this rank holds one; 1: whole */
    rt_block params;              /* all units, or a shard of each; one track each */
    rt_block grads;               /* units from first_trained on, or a shard of each; one track each */
    dist_shard *shard;            /* [units] */
    int saves;                    /* this rank writes its shards into checkpoints */
    dist_bucket *bucket;          /* in the order in which backward makes them ready: from the head down */
    size_t buckets, *bucket_of;   /* [units] */
    dist_gradient_slot gradient_slot[2];
    rt_block backward_grads; /* of one unit, where they are kept in another type than backward gives */
    vit_scaler scaler; /* fp16: after the last step that has been read; a resumed run's, before the first */
    rt_block device_scaler; /* after the last step */
    rt_event *last_reduced; /* of the reduction that was posted last */
    vit_context update;     /* where the optimizer runs: the device's, or with offload the host's */
    rt_block scalars, control, counts;
    rt_block host_scalars; /* with offload */
    rt_event control_ready, control_done, counts_ready, counts_done;
    rt_event scalars_fetched, params_sent; /* with offload */
    size_t micro;                          /* micro-batch of the step, from 0 */
    int stop_requested;                    /* by this rank */
    dist_outcome outcome[2];               /* of the last two steps, in turn */
    dist_graph *graph;                     /* with graphs: [accumulation + 1] */
    int recording;                         /* one of them */
    size_t ended, known;                   /* steps that have ended; whose result has been read */

    rt_event stepped;  /* the parameters have changed: a step, or an import */
    rt_event *arrived; /* dp, zero1, zero2: [units] the new parameters are here */
    rt_block gathered; /* zero3: all parameter slots */
    dist_parameter_slot *parameter_slot, **slot_of; /* zero3: [slots]; [units] NULL: not gathered */
    size_t slots, next_slot;
} dist;

/* What backward needs of a unit: its parameters, and where its gradient goes. */
typedef struct dist_unit_blocks {
    rt_block params, grads;
} dist_unit_blocks;

/* A strategy: what happens around each unit. The blocks that the pre-hooks give are ready for the compute
 * stream when the hook returns. */
typedef struct dist_strategy {
    const char *name, *alias; /* alias: another name, or NULL */
    dist_reduction reduction; /* the default */
    int stage; /* of ZeRO: 1 cuts optimizer state into shards, 2 gradients too, 3 parameters too */
    dist_op reduce, refresh; /* gradients after backward, parameters after the step; DIST_OPS: nothing */
    int (*open)(dist *d, error_text *e);
    rt_block (*pre_forward)(dist *d, size_t u);
    void (*post_forward)(dist *d, size_t u);
    dist_unit_blocks (*pre_backward)(dist *d, size_t u);
    void (*post_backward)(dist *d, size_t u);
    void (*step)(dist *d);
} dist_strategy;

/* NULL: no such strategy. */
const dist_strategy *dist_strategy_named(const char *name);
/* The i-th of the table; NULL after the last. */
const dist_strategy *dist_strategy_at(size_t i);

/* -------------------------------------------------------------------------------------- the training loop */

/* Allocates all that the rank needs for training; nothing is allocated later. The model must outlive it. -1:
 * e says why (impossible options), or the world has failed (out of memory). */
int dist_open(dist *d, dist_comm *comm, const vit_model *model, const dist_options *options, error_text *e);
void dist_close(dist *d);

/* What an open dist should hold and send by the formulas of the papers (Rajbhandari et al. 2020, arXiv
 * 1910.02054; Zhao et al. 2023, arXiv 2304.11277), padding included: bytes by category, NAN where there is no
 * formula, and elements that pass through each collective in a step. */
typedef struct dist_formula {
    double bytes[RT_CATEGORIES], elements[DIST_OPS];
} dist_formula;
dist_formula dist_formula_of(const dist *d);

/* The ledger that rank `rank` of `ranks` would have after dist_open: a dry run, in which nothing is
 * allocated. A total_peak_bytes of SIZE_MAX: more than can be counted. -1: impossible options. */
int dist_estimate(const vit_device *device, const vit_model *model, const dist_options *options, int ranks,
                  int rank, rt_ledger *ledger, error_text *e);

/* Parameters of unit u, whole, without the padding between ranks, in host memory [unit->count]: takes what
 * this rank holds of them (every rank must be given the same); gives [lo, hi) of its shard, and leaves the
 * rest of `values` alone. */
void dist_import(dist *d, size_t u, const float *values);
void dist_export(dist *d, size_t u, float *values);

/* Optimizer state i of unit u (0: exp_avg or SGD's momentum, 1: exp_avg_sq), as with parameters: takes and
 * gives [lo, trained) of this rank's shard, without the padding between ranks, of `values` [unit->count]. */
void dist_import_state(dist *d, size_t u, int i, const float *values);
void dist_export_state(dist *d, size_t u, int i, float *values);

/* One optimizer step: begin (t from 1), `accumulation` micro-batches, end. Images [B, C, height, width] in
 * float, labels [B], keys [B] of the samples' own randomness. A step whose gradient norm is not finite
 * updates nothing; in fp32 and bf16 neither does any later one, until dist_forward has looked for the unit,
 * so that what the host reads a step late can still be explained. In fp16 that is an overflow, and the device
 * goes on with the loss scale that follows; when that cannot fall any more, no later step updates anything,
 * and reading the result fails the world.
 *
 * With a result the host waits for the step. Without one (NULL) it runs on, and dist_read_result gives the
 * result of the earliest step that has not been read, and waits for that step alone; at most two may be
 * unread. */
void dist_begin_step(dist *d, size_t t, double learning_rate);
void dist_micro_batch(dist *d, size_t micro, const void *images, const int32_t *labels, const uint64_t *keys);
void dist_end_step(dist *d, dist_result *result);
void dist_read_result(dist *d, dist_result *result);

/* This rank wants all to stop: they learn it, all at the same time, from the result of the next step to
 * end. */
void dist_request_stop(dist *d);

/* Forward alone, as in evaluation; every rank must call it. logits [B, V], losses [B] into host memory, or
 * NULL. With not_finite: the index of the first unit whose output has a NaN or an infinity, or the number of
 * units. */
void dist_forward(dist *d, const void *images, const int32_t *labels, float *logits, float *losses,
                  size_t *not_finite);

/* Sums n integers over all ranks, in place, modulo 2^64; every rank must call it. */
void dist_sum(dist *d, int64_t *values, size_t n);

#endif /* DIST_H */

/* ========================================================================================= implementation */
#ifdef DIST_IMPLEMENTATION
#undef DIST_IMPLEMENTATION

#include <stdlib.h>
#include <string.h>

/* --------------------------------------------------------------------------------------- the communicator */

const char *dist_op_name(dist_op op) {
    static const char *const names[] = {"all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce",
                                        "send",       "recv",           "barrier",    "control"};
    return names[op];
}

static double dist__wire_bytes(const dist_comm *comm, const dist_call *c) {
    double n = comm->size, bytes = (double)dist_elements(c) * (double)rt_type_size(dist_type(c));
    switch (c->op) {
    case DIST_ALL_REDUCE:
    case DIST_CONTROL: return 2 * (n - 1) / n * bytes;
    case DIST_REDUCE_SCATTER:
    case DIST_ALL_GATHER: return (n - 1) / n * bytes;
    case DIST_BROADCAST: return comm->index == c->peer ? (n - 1) * bytes : 0;
    case DIST_REDUCE: return comm->index == c->peer ? 0 : bytes;
    case DIST_SEND: return bytes;
    default: return 0;
    }
}

#ifdef DIST_TEST_SKIP_WAIT
extern int dist_test_skip_rank;      /* tests only: this rank ... */
extern uint64_t dist_test_skip_wait; /* ... leaves out its wait of this number */
#endif

/* Every wait of this file. */
static void dist__wait(dist_comm *comm, int stream, rt_event *event) {
    if (!event->recorded) return;
#ifdef DIST_TEST_SKIP_WAIT
    int orders = 0; /* or do earlier waits of the stream imply it? */
    for (int s = 0; s < RT_STREAMS; s++) orders |= event->clock[s] > comm->rank->stream[stream].clock[s];
    if (orders && comm->rank->rank == dist_test_skip_rank && comm->waits++ == dist_test_skip_wait) return;
#endif
    rt_wait(comm->rank, stream, event);
}

static void dist__launch(dist_comm *comm) {
    size_t n = comm->grouped;
    comm->grouped = 0;
    if (n && !rt_failed(comm->rank)) comm->transport->post(comm, comm->group, n);
}

void dist_post(dist_comm *comm, const dist_call *call) {
    rt_rank *rank = comm->rank;
    if (rt_failed(rank)) return;
    size_t n = (size_t)comm->size, whole = dist_elements(call);
    int scatters = call->op == DIST_REDUCE_SCATTER || call->op == DIST_ALL_GATHER;
    int pair = call->op == DIST_SEND || call->op == DIST_RECV;
    if (call->peer < 0 || call->peer >= comm->size ||
        (scatters && n * (call->in.count + call->out.count) != (n + 1) * whole) ||
        comm->grouped == DIST_GROUP || (pair && (comm->grouping || call->peer == comm->index))) {
        rt_fail(rank,
                "rank %d: impossible %s of %zu in and %zu out elements (%s) with peer %d of %d, %zu calls in "
                "the group",
                rank->rank, dist_op_name(call->op), call->in.count, call->out.count, call->unit, call->peer,
                comm->size, comm->grouped);
        return;
    }
    if (comm->observe) comm->observe(comm->observer, dist_op_name(call->op), call->unit, whole);
    if (call->wait) dist__wait(comm, call->stream, call->wait);
    if (!rt_access(rank, call->stream, dist_op_name(call->op), RT_BLOCKS(call->in), RT_BLOCKS(call->out)))
        return;
    dist_traffic *t = &comm->traffic[call->op];
    t->calls++;
    t->elements += whole;
    t->wire_bytes += dist__wire_bytes(comm, call);
    comm->group[comm->grouped++] = *call;
    if (!comm->grouping) dist__launch(comm);
}

void dist_group_begin(dist_comm *comm) { comm->grouping = 1; }

void dist_group_end(dist_comm *comm) {
    comm->grouping = 0;
    dist__launch(comm);
}

/* ------------------------------------------------------------------------------------ the local transport */

enum { DIST_RING = 16 }; /* launches of one communicator that may be under way; a rank further ahead blocks */

/* What one rank brought to a meeting. Its communicator may be closed by now. */
typedef struct {
    rt_rank *rank;
    dist_call call[DIST_GROUP];
    size_t calls;
    double ready;
    rt_event posted; /* on a device that runs behind the host: the stream's end when the rank posted */
    uint64_t sequence;
} dist__part;

/* One launch: all ranks of the communicator, or the two of a send and recv, meet in it. */
typedef struct {
    int open, pair; /* pair: of send and recv, from -> to */
    int from, to;
    uint64_t sequence;
    int arrived, first; /* how many; which rank was first */
    dist__part *part;   /* [size]; rank NULL: not there yet */
} dist__meeting;

typedef struct {
    dist_hub head;
    dist__meeting meeting[DIST_RING]; /* under world->lock, like all that follows */
    int *room;                        /* [size]: a meeting has closed since the rank found them all open */
    double last_end;                  /* virtual time at which the last launch ended */
} dist__local_hub;

static void dist__left(void *transport, rt_rank *rank);

static void dist__local_post(dist_comm *comm, const dist_call *calls, size_t n);
static const dist_transport dist__local = {"local", dist__local_post, NULL, NULL, NULL};

dist_hub *dist_hub_create(rt_world *world) {
    dist__local_hub *hub = calloc(1, sizeof *hub);
    if (!hub) return NULL;
    hub->head = (dist_hub){&dist__local, world, world->size};
    int failed = !(hub->room = calloc((size_t)world->size, sizeof *hub->room));
    for (int i = 0; i < DIST_RING; i++)
        failed |= !(hub->meeting[i].part = calloc((size_t)world->size, sizeof(dist__part)));
    if (failed) {
        dist_hub_free(&hub->head);
        return NULL;
    }
    world->transport = hub;
    world->on_leave = dist__left;
    return &hub->head;
}

void dist_hub_free(dist_hub *head) {
    dist__local_hub *hub = (dist__local_hub *)head;
    if (!hub) return;
    for (int i = 0; i < DIST_RING; i++) free(hub->meeting[i].part);
    free(hub->room);
    hub->head.world->transport = NULL;
    hub->head.world->on_leave = NULL;
    free(hub);
}

static int dist__expects(const dist__meeting *m, int rank) {
    return !m->pair || rank == m->from || rank == m->to;
}

static int dist__expected(const dist__local_hub *hub, const dist__meeting *m) {
    return m->pair ? 2 : hub->head.size;
}

/* A rank that has returned can no longer come to the meetings that wait for it. */
static void dist__check_left(const dist__meeting *m, rt_rank *rank) {
    if (!m->open || !dist__expects(m, rank->rank) || m->part[rank->rank].rank) return;
    const dist_call *c = &m->part[m->first].call[0];
    rt_fail_with_table(rank, "rank %d left while rank %d waits for it in %s %llu (%s)", rank->rank, m->first,
                       dist_op_name(c->op), (unsigned long long)m->sequence, c->unit);
}

static void dist__left(void *transport, rt_rank *rank) {
    dist__local_hub *hub = transport;
    for (int i = 0; i < DIST_RING; i++) dist__check_left(&hub->meeting[i], rank);
}

/* The meeting that this launch belongs to, opened if this rank is the first; NULL: the world has failed. */
static dist__meeting *dist__meet(dist__local_hub *hub, dist_comm *comm, const dist_call *c,
                                 uint64_t sequence) {
    int pair = c->op == DIST_SEND || c->op == DIST_RECV;
    int from = c->op == DIST_RECV ? c->peer : comm->index, to = c->op == DIST_RECV ? comm->index : c->peer;
    for (;;) {
        dist__meeting *unused = NULL;
        for (int i = 0; i < DIST_RING; i++) {
            dist__meeting *m = &hub->meeting[i];
            if (!m->open)
                unused = m;
            else if (m->sequence == sequence && m->pair == pair &&
                     (!pair || (m->from == from && m->to == to)))
                return m;
        }
        if (unused) {
            dist__part *part = unused->part;
            memset(part, 0, (size_t)hub->head.size * sizeof *part);
            *unused = (dist__meeting){.open = 1,
                                      .pair = pair,
                                      .from = from,
                                      .to = to,
                                      .sequence = sequence,
                                      .first = comm->index,
                                      .part = part};
            return unused;
        }
        hub->room[comm->index] = 0;
        if (rt_block_until(comm->rank, &hub->room[comm->index])) return NULL;
    }
}

static rt_note dist__note(const char *communicator, const dist__part *p, size_t call) {
    const dist_call *c = &p->call[call];
    return (rt_note){communicator, dist_op_name(c->op), c->unit, p->sequence, dist_elements(c)};
}

/* What two ranks disagree on, and in which call of the launch; NULL: they agree. */
static const char *dist__difference(const dist__meeting *m, const dist__part *a, const dist__part *b,
                                    size_t *call) {
    for (size_t i = 0; i < a->calls && i < b->calls; i++) {
        const dist_call *x = &a->call[i], *y = &b->call[i];
        *call = i;
        if (!m->pair && x->op != y->op) return "operation";
        if (strcmp(x->unit, y->unit)) return "unit";
        if (dist_elements(x) != dist_elements(y)) return "count";
        if (dist_type(x) != dist_type(y)) return "type";
        if (!m->pair && x->peer != y->peer) return "root";
    }
    return a->calls == b->calls ? NULL : "number of calls";
}

/* One call of a complete meeting, for all its ranks: everything is a sum of some blocks into some others. */
static void dist__execute(dist__local_hub *hub, dist__meeting *m, size_t i, const dist_comm *comm) {
    size_t n = (size_t)hub->head.size, n_from = 0, n_to = 0;
    rt_block from[n], to[n];
    const dist_call *c = &m->part[m->first].call[i];
    rt_stream *s = &comm->rank->stream[RT_COMMUNICATION];
    size_t k = dist_elements(c) / n;
    switch (c->op) {
    case DIST_SEND:
    case DIST_RECV:
        from[n_from++] = m->part[m->from].call[i].in;
        to[n_to++] = m->part[m->to].call[i].out;
        break;
    case DIST_BROADCAST:
        from[n_from++] = m->part[c->peer].call[i].in;
        for (size_t r = 0; r < n; r++)
            if (m->part[r].call[i].out.count)
                to[n_to++] = m->part[r].call[i].out; /* the root has it already */
        break;
    case DIST_REDUCE:
        to[n_to++] = m->part[c->peer].call[i].out;
        for (size_t r = 0; r < n; r++) from[n_from++] = m->part[r].call[i].in;
        break;
    case DIST_ALL_REDUCE:
    case DIST_CONTROL:
        for (size_t r = 0; r < n; r++)
            from[n_from++] = m->part[r].call[i].in, to[n_to++] = m->part[r].call[i].out;
        break;
    case DIST_REDUCE_SCATTER:
        for (size_t part = 0; part < n; part++) {
            for (size_t r = 0; r < n; r++) from[r] = rt_slice(m->part[r].call[i].in, part * k, k);
            comm->device->sum_buffers(s, &m->part[part].call[i].out, 1, from, n);
        }
        return;
    case DIST_ALL_GATHER:
        for (size_t part = 0; part < n; part++) {
            for (size_t r = 0; r < n; r++) to[r] = rt_slice(m->part[r].call[i].out, part * k, k);
            comm->device->sum_buffers(s, to, n, &m->part[part].call[i].in, 1);
        }
        return;
    default: return;
    }
    comm->device->sum_buffers(s, to, n_to, from, n_from);
}

/* Where operations run behind the host, the executing rank's stream waits for what the others' streams
 * held when they posted, and theirs wait for what it launches. So all this is no more than launched, too. */
static void dist__begin_on_device(const dist__local_hub *hub, dist__meeting *m, rt_stream *s) {
    for (int r = 0; r < hub->head.size && s->rank->wait; r++)
        if (m->part[r].rank && m->part[r].rank != s->rank) s->rank->wait(s, &m->part[r].posted);
}

static void dist__end_on_device(const dist__local_hub *hub, dist__meeting *m, rt_stream *s) {
    rt_event end;
    if (s->rank->record) s->rank->record(s, &end);
    for (int r = 0; r < hub->head.size && s->rank->record; r++) {
        rt_rank *rank = m->part[r].rank;
        rt_stream *theirs = rank ? &rank->stream[m->part[r].call[0].stream] : NULL;
        if (rank && rank != s->rank) rank->wait(theirs, &end);
        for (size_t i = 0; i < m->part[r].calls; i++) rank->record(theirs, m->part[r].call[i].done);
    }
}

static void dist__local_post(dist_comm *comm, const dist_call *calls, size_t n) {
    dist__local_hub *hub = comm->shared;
    rt_rank *rank = comm->rank;
    rt_stream *s = &rank->stream[calls[0].stream];
    int pair = calls[0].op == DIST_SEND || calls[0].op == DIST_RECV;
    uint64_t *counter =
        pair ? &comm->pair_sequence[2 * calls[0].peer + (calls[0].op == DIST_RECV)] : &comm->sequence;
    rt_event posted = {0};
    if (rank->record) rank->record(s, &posted); /* it may fail, and that takes the lock */
    pthread_mutex_lock(&rank->world->lock);
    dist__meeting *m = NULL;
    /* asked again under the lock: after a failure the others leave, and take along what they brought */
    int ready = !rt_failed(rank);
    for (size_t i = 0; ready && i < n; i++) { /* an event that is used again must have been signalled */
        rt_event *done = calls[i].done ? calls[i].done : &comm->own_done;
        ready = !done->recorded || done->done || !rt_block_until(rank, &done->done);
    }
    if (ready) m = dist__meet(hub, comm, &calls[0], *counter);
    if (!m) {
        pthread_mutex_unlock(&rank->world->lock);
        return;
    }
    dist__part *part = &m->part[comm->index];
    *part = (dist__part){.rank = rank, .calls = n, .posted = posted, .sequence = (*counter)++};
    part->ready = s->time > rank->stream[RT_HOST].time ? s->time : rank->stream[RT_HOST].time;
    for (size_t i = 0; i < n; i++) {
        part->call[i] = calls[i];
        if (!part->call[i].done) part->call[i].done = &comm->own_done;
        rt_event *done = part->call[i].done;
        memcpy(done->clock, s->clock, sizeof done->clock);
        done->recorded = 1;
        done->done = 0;
        s->tail = done;
    }
    rank->last = dist__note(comm->name, part, 0);
    const dist__part *first = &m->part[m->first];
    size_t at = 0;
    const char *difference = dist__difference(m, first, part, &at);
    if (difference) {
        for (int r = 0; r < hub->head.size;
             r++) /* show what each brought to this meeting, not what it posted since */
            if (m->part[r].rank) m->part[r].rank->last = dist__note(comm->name, &m->part[r], at);
        const dist_call *x = &first->call[at], *y = &calls[at];
        rt_fail_with_table(rank,
                           "ranks %d and %d disagree on the %s of launch %llu of communicator %s: %s of %zu "
                           "(%s) against %s of %zu (%s)",
                           m->first, comm->index, difference, (unsigned long long)m->sequence, comm->name,
                           dist_op_name(x->op), dist_elements(x), x->unit, dist_op_name(y->op),
                           dist_elements(y), y->unit);
    }
    for (int r = 0; r < hub->head.size; r++)
        if (hub->head.world->ranks[r].left) dist__check_left(m, &hub->head.world->ranks[r]);
    if (++m->arrived == dist__expected(hub, m) &&
        !rt_failed(rank)) { /* the last to arrive executes it for all */
        rank->world->executing++;
        pthread_mutex_unlock(&rank->world->lock);
        double start = rt_seconds();
        dist__begin_on_device(hub, m, s);
        for (size_t i = 0; i < n; i++) dist__execute(hub, m, i, comm);
        dist__end_on_device(hub, m, s);
        double seconds = rt_seconds() - start;
        rank->communication_s += seconds;
        pthread_mutex_lock(&rank->world->lock);
        rank->world->executing--;
        double begin = hub->last_end;
        for (int r = 0; r < hub->head.size; r++)
            if (m->part[r].rank && begin < m->part[r].ready) begin = m->part[r].ready;
        hub->last_end = begin + seconds;
        for (int r = 0; r < hub->head.size; r++)
            for (size_t i = 0; i < m->part[r].calls; i++) {
                m->part[r].call[i].done->time = hub->last_end;
                m->part[r].call[i].done->done = 1;
            }
        m->open = 0;
        for (int r = 0; r < hub->head.size; r++) hub->room[r] = 1;
        pthread_cond_broadcast(&rank->world->changed);
    }
    pthread_mutex_unlock(&rank->world->lock);
}

int dist_comm_open(dist_comm *comm, dist_hub *hub, rt_rank *rank, const vit_device *device) {
    *comm = (dist_comm){.name = "world",
                        .rank = rank,
                        .index = rank->rank,
                        .size = hub->size,
                        .transport = hub->transport,
                        .device = device,
                        .shared = hub};
    comm->pair_sequence = calloc(2 * (size_t)hub->size, sizeof *comm->pair_sequence);
    if (!comm->pair_sequence) return rt_fail(rank, "rank %d: out of memory", rank->rank);
    if (!comm->transport->open || !comm->transport->open(comm)) return 0;
    dist_comm_close(comm);
    return -1;
}

void dist_comm_close(dist_comm *comm) {
    if (comm->rank) rt_drain(comm->rank);
    if (comm->rank && comm->transport->close) comm->transport->close(comm);
    free(comm->pair_sequence);
    *comm = (dist_comm){0};
}

/* ---------------------------------------------------------------------------- what strategies are made of */

/* Units first .. last, or a shard of each, of a flat buffer that begins with unit `base`, as one block. */
static rt_block dist__units(const dist *d, rt_block flat, size_t cut, size_t base, size_t first,
                            size_t last) {
    rt_block b = rt_slice(flat, (d->offset[first] - d->offset[base]) / cut,
                          (d->offset[last + 1] - d->offset[first]) / cut);
    b.track = flat.track + (first - base);
    b.tracks = last - first + 1;
    return b;
}

static rt_block dist__params(const dist *d, size_t u) {
    return dist__units(d, d->params, d->params_cut, 0, u, u);
}

static rt_block dist__grads(const dist *d, size_t first, size_t last) {
    return dist__units(d, d->grads, d->grads_cut, d->first_trained, first, last);
}

static size_t dist__padded(const dist *d, size_t u) { return d->offset[u + 1] - d->offset[u]; }

static size_t dist__largest_unit(const dist *d, size_t first) {
    size_t largest = 0;
    for (size_t u = first; u < d->model->units; u++)
        if (largest < dist__padded(d, u)) largest = dist__padded(d, u);
    return largest;
}

static size_t dist__largest_bucket(const dist *d) {
    size_t largest = 0;
    for (size_t b = 0; b < d->buckets; b++)
        if (largest < d->bucket[b].count) largest = d->bucket[b].count;
    return largest;
}

static void dist__observe(const dist *d, const char *what, size_t u) {
    if (d->comm->observe)
        d->comm->observe(d->comm->observer, what, d->model->unit[u].name, dist__padded(d, u));
}

/* In which ranks add up gradients, and keep the sums. */
static rt_type dist__reduce_type(const dist *d) {
    return d->options.reduce_type ? d->options.reduce_type : d->model->type;
}

/* Fills freed memory with NaN in debug builds, so that who still reads it is found out. */
static void dist__poison(const dist *d, rt_block b) {
#ifdef DIST_DEBUG
    vit_fill(&d->context, b, 0xFF);
#else
    (void)d, (void)b;
#endif
}

/* Posts a collective from root 0 on the communication stream. */
static void dist__collective(dist *d, dist_op op, rt_block in, rt_block out, const char *unit, rt_event *wait,
                             rt_event *done) {
    dist_post(d->comm, &(dist_call){op, in, out, 0, unit, RT_COMMUNICATION, wait, done});
}

/* Cuts the chain into buckets, from the head down, as backward makes gradients ready. PyTorch's rule: a unit
 * is added first, then the bucket closes if it has reached the limit; the first bucket closes at 1 MiB, so
 * that communication begins early (torch/csrc/distributed/c10d/reducer.cpp). */
static int dist__cut_buckets(dist *d, double limit_mb) {
    size_t n = d->model->units;
    d->bucket = calloc(n, sizeof *d->bucket);
    d->bucket_of = calloc(n, sizeof *d->bucket_of);
    if (!d->bucket || !d->bucket_of) return rt_fail(d->rank, "rank %d: out of memory", d->rank->rank);
    for (size_t u = n, last = n - 1; u-- > d->first_trained;) {
        double limit = d->buckets == 0 && limit_mb > 1 ? 1 : limit_mb;
        size_t count = d->offset[last + 1] - d->offset[u];
        d->bucket_of[u] = d->buckets;
        d->bucket[d->buckets] =
            (dist_bucket){.first = u, .last = last, .offset = d->offset[u], .count = count};
        if (u > d->first_trained && (double)(count * rt_type_size(dist__reduce_type(d))) < limit * (1 << 20))
            continue;
        d->buckets++;
        last = u - 1;
    }
    return 0;
}

/* Do gradients pass through slots on their way to the sum over ranks? Whole ones of a first micro-batch
 * lie in place; where only shards are kept, nothing else would hold them. */
static int dist__reduces_in_slots(const dist *d) {
    return d->grads_cut > 1 || (d->options.reduction == DIST_REDUCE_EVERY && d->options.accumulation > 1);
}

/* Gradients of later micro-batches need a place of their own: backward overwrites. Summed over ranks at the
 * last micro-batch: one slot of the largest unit. At every one, or into shards: two of the largest bucket,
 * used in turn. */
static int dist__alloc_gradient_slots(dist *d) {
    int reduces = dist__reduces_in_slots(d);
    size_t count = reduces ? dist__largest_bucket(d) : dist__largest_unit(d, d->first_trained);
    if (!reduces && d->options.accumulation < 2) return 0;
    for (int i = 0; i <= reduces; i++)
        d->gradient_slot[i].block = rt_alloc(d->rank, reduces ? RT_COMMUNICATION_BUFFERS : RT_GRADIENTS,
                                             dist__reduce_type(d), count, 1);
    return rt_failed(d->rank) ? -1 : 0;
}

/* The slots are used in turn throughout a step: the one that is used again is always the older one. */
static dist_gradient_slot *dist__gradient_slot(dist *d, size_t bucket) {
    return &d->gradient_slot[(d->micro * d->buckets + bucket) % 2];
}

/* The part of a bucket's gradient of which this rank gets the sum. */
static rt_block dist__share(const dist *d, const dist_bucket *b, rt_block whole) {
    const dist_shard *s = &d->shard[b->first]; /* buckets of a reduce-scatter have one unit */
    if (d->strategy->reduce == DIST_REDUCE_SCATTER) return rt_slice(whole, s->lo, s->hi - s->lo);
    return d->strategy->reduce == DIST_REDUCE && d->comm->index ? (rt_block){0} : whole;
}

/* Where the sums of all micro-batches are kept. */
static rt_block dist__kept(const dist *d, const dist_bucket *b) {
    rt_block g = dist__grads(d, b->first, b->last);
    return d->grads_cut > 1 ? g : dist__share(d, b, g);
}

/* The gradient in the slot has been reduced: the slot is free. */
static void dist__collect(dist *d, dist_gradient_slot *slot) {
    const dist_bucket *b = slot->bucket;
    if (!b) return;
    rt_block sum = dist__kept(d, b), whole = rt_slice(slot->block, 0, b->count);
    dist__wait(d->comm, RT_COMPUTE, &slot->reduced);
    if (slot->adds && sum.count) vit_add(&d->context, sum, dist__share(d, b, whole));
    dist__poison(d, slot->block);
    slot->bucket = NULL;
}

/* Zeroes what another unit may have written where unit u's gradient has padding. */
static void dist__clear_padding(dist *d, size_t u, rt_block grads) {
    const vit_unit *unit = &d->model->unit[u];
    for (size_t t = 0; t < unit->tensors; t++) {
        size_t end = unit->tensor[t].offset + unit->tensor[t].count;
        size_t next = t + 1 < unit->tensors ? unit->tensor[t + 1].offset : grads.count;
        if (end < next) vit_fill(&d->context, rt_slice(grads, end, next - end), 0);
    }
}

/* Where unit u's backward writes its gradient: of the first micro-batch, if it is kept whole, into the
 * gradient itself, else into a slot. */
static rt_block dist__gradient_target(dist *d, size_t u) {
    const dist_bucket *b = &d->bucket[d->bucket_of[u]];
    size_t count = dist__padded(d, u);
    if (d->micro == 0 && d->grads_cut == 1) return dist__grads(d, u, u);
    rt_block target = rt_slice(d->gradient_slot[0].block, 0, count);
    if (dist__reduces_in_slots(d)) {
        dist_gradient_slot *slot = dist__gradient_slot(d, d->bucket_of[u]);
        if (u == b->last) dist__collect(d, slot);
        target = rt_slice(slot->block, d->offset[u] - b->offset, count);
    }
    dist__clear_padding(d, u, target);
    return target;
}

/* Adds to unit u's gradient that of a later micro-batch, which no rank has summed yet. */
static void dist__accumulate(dist *d, size_t u) {
    rt_block g = dist__grads(d, u, u);
    vit_add(&d->context, g, rt_slice(d->gradient_slot[0].block, 0, g.count));
}

/* Unit u's gradient is there: adds it to those of earlier micro-batches and, when its bucket is full, lets
 * the ranks sum it. */
static void dist__reduce_gradient(dist *d, size_t u) {
    dist_bucket *b = &d->bucket[d->bucket_of[u]];
    int every = d->options.reduction == DIST_REDUCE_EVERY, later = d->micro > 0;
    if (later && !every) dist__accumulate(d, u);
    if (u != b->first || (!every && d->micro + 1 < d->options.accumulation)) return;
    rt_block whole, part;
    if (d->grads_cut > 1 || (later && every)) {
        dist_gradient_slot *slot = dist__gradient_slot(d, d->bucket_of[u]);
        slot->bucket = b;
        slot->adds = later;
        whole = rt_slice(slot->block, 0, b->count);
        part = later ? dist__share(d, b, whole) : dist__kept(d, b);
        d->last_reduced = &slot->reduced;
    } else {
        whole = dist__grads(d, b->first, b->last);
        part = dist__share(d, b, whole);
        d->last_reduced = &b->reduced;
    }
    rt_record(d->rank, RT_COMPUTE, &b->ready);
    dist__collective(d, d->strategy->reduce, whole, part, d->model->unit[u].name, &b->ready, d->last_reduced);
}

/* What passed through the slots has been reduced, and nothing is to be added. */
static void dist__free_gradient_slots(dist *d) {
    for (int i = 0; i < 2; i++) {
        if (d->gradient_slot[i].bucket) dist__poison(d, d->gradient_slot[i].block);
        d->gradient_slot[i].bucket = NULL;
    }
}

/* After the last micro-batch: the gradient is complete for the compute stream. */
static void dist__finish_gradient(dist *d) {
    if (d->options.accumulation > 1 && dist__reduces_in_slots(d)) {
        dist__collect(d, dist__gradient_slot(d, d->buckets)); /* the older of the last two buckets */
        dist__collect(d, dist__gradient_slot(d, d->buckets + 1));
    } else {
        dist__wait(d->comm, RT_COMPUTE, d->last_reduced); /* the stream's last: it implies the others */
        dist__free_gradient_slots(d);
    }
}

enum { DIST__LOSS, DIST__BAD_LOSSES, DIST__STOP, DIST__NORM, DIST__CONTROL = DIST__NORM + VIT_NORM_COUNTERS };

/* Updates what this rank owns of elements [begin, end) of a unit, at the learning rate of a layer: with layer
 * decay that of the layers below falls geometrically (timm's param_groups_layer_decay, after BEiT). */
static void dist__optimize(dist *d, const vit_unit *unit, size_t begin, size_t end, size_t layer) {
    dist_shard *s = &d->shard[unit->index];
    size_t from = begin > s->lo ? begin : s->lo, to = end < s->trained ? end : s->trained;
    if (from >= to) return;
    size_t at = from - s->lo, n = to - from, decayed = unit->decayed;
    double rate = pow(d->options.layer_decay, (double)(d->model->units - 1 - layer));
    int host = d->options.offload != NULL;
    rt_block param = rt_slice(host ? s->host_param : s->param, at, n);
    rt_block grad = rt_slice(host ? s->host_grad : s->grad, at, n);
    rt_block scalars = host ? d->host_scalars : d->scalars;
    rt_block state0 = rt_slice(s->state[0], at, n), master = rt_slice(s->master, at, n);
    decayed = decayed < from ? 0 : decayed < to ? decayed - from : n;
    if (d->options.optimizer == DIST_ADAMW)
        vit_adamw(&d->update, param, master, state0, rt_slice(s->state[1], at, n), grad, scalars, decayed,
                  rate, &d->options.adamw);
    else
        vit_sgd(&d->update, param, master, state0, grad, scalars, decayed, rate, &d->options.sgd);
}

static void dist__optimize_unit(dist *d, size_t u) {
    const vit_unit *unit = &d->model->unit[u];
    dist__optimize(d, unit, 0, unit->classifier, u);
    dist__optimize(d, unit, unit->classifier, SIZE_MAX, unit->classifier ? u - 1 : u);
}

static vit_context dist__copying(const dist *d) {
    vit_context copy = d->context;
    copy.stream = RT_COPY;
    return copy;
}

/* Offload: sends what is updated of the gradients to host memory, while the ranks join their norms. */
static void dist__fetch_gradients(dist *d) {
    vit_context copy = dist__copying(d);
    dist__wait(d->comm, RT_COPY, &d->control_ready);
    for (size_t u = 0; u < d->model->units; u++) {
        dist_shard *s = &d->shard[u];
        if (!s->host_grad.count) continue;
        vit_cast(&copy, s->host_grad, s->grad);
        rt_record(d->rank, RT_COPY, &s->fetched);
    }
}

/* Offload: the host updates unit after unit, while gradients still arrive and new parameters leave. */
static void dist__update_on_host(dist *d) {
    vit_context copy = dist__copying(d);
    vit_cast(&d->context, d->host_scalars, d->scalars);
    rt_record(d->rank, RT_COMPUTE, &d->scalars_fetched);
    dist__wait(d->comm, RT_HOST, &d->scalars_fetched);
    for (size_t u = 0; u < d->model->units; u++) {
        dist_shard *s = &d->shard[u];
        if (!s->host_param.count) continue;
        dist__wait(d->comm, RT_HOST, &s->fetched);
        dist__optimize_unit(d, u);
        vit_cast(&copy, rt_slice(s->param, 0, s->host_param.count), s->host_param);
    }
    rt_record(d->rank, RT_COPY, &d->params_sent);
    dist__wait(d->comm, RT_COMPUTE, &d->params_sent);
}

/* The update, common to all: the exact norm of what this rank owns, one small all-reduce that joins the
 * ranks' norms and losses, one factor for average, unscaling and clipping, the optimizer on the shards. */
static void dist__update(dist *d) {
    const vit_context *c = &d->context;
    rt_block counters = rt_slice(d->control, DIST__NORM, VIT_NORM_COUNTERS);
    double divisor = (double)d->comm->size * (double)d->options.accumulation;
    size_t owned = 0; /* elements that this rank updates */
    for (size_t u = 0; u < d->model->units; u++) {
        owned += d->shard[u].trained - d->shard[u].lo;
        if (d->shard[u].squares.count) vit_sum_of_squares(c, counters, d->shard[u].squares);
    }
    rt_record(d->rank, RT_COMPUTE, &d->control_ready);
    dist__collective(d, DIST_CONTROL, d->control, d->control, "step", &d->control_ready, &d->control_done);
    if (d->options.offload) dist__fetch_gradients(d);
    dist__wait(d->comm, RT_COMPUTE, &d->control_done);
    vit_decide_step(c, d->scalars, d->device_scaler, counters, divisor, d->options.gradient_clipping,
                    &d->options.adamw);
    if (owned && d->comm->observe) d->comm->observe(d->comm->observer, "step", "optimizer", owned);
    if (d->options.offload)
        dist__update_on_host(d);
    else
        for (size_t u = 0; u < d->model->units; u++) dist__optimize_unit(d, u);
}

/* Memory for parameters and gradients, cut as d says, and for gradients on their way. */
static int dist__alloc(dist *d, double bucket_size_mb) {
    size_t n = d->model->units, first = d->first_trained;
    d->params = rt_alloc(d->rank, RT_PARAMETERS, d->model->type, d->offset[n] / d->params_cut, n);
    d->grads = rt_alloc(d->rank, RT_GRADIENTS, dist__reduce_type(d),
                        (d->offset[n] - d->offset[first]) / d->grads_cut, n - first);
    if (dist__reduce_type(d) != d->model->type && first < n)
        d->backward_grads = rt_alloc(d->rank, RT_GRADIENTS, d->model->type, dist__largest_unit(d, first), 1);
    if (d->strategy->refresh != DIST_OPS && !(d->arrived = calloc(n, sizeof *d->arrived)))
        return rt_fail(d->rank, "rank %d: out of memory", d->rank->rank);
    return rt_failed(d->rank) || dist__cut_buckets(d, bucket_size_mb) || dist__alloc_gradient_slots(d) ? -1
                                                                                                       : 0;
}

/* Full parameters and gradients on every rank, of which `owners` ranks, from 0 up, own the whole of every
 * unit: they share the work of the norm. */
static int dist__replicate(dist *d, size_t owners, double bucket_size_mb) {
    size_t me = (size_t)d->comm->index, first = d->first_trained;
    if (dist__alloc(d, bucket_size_mb)) return -1;
    d->saves = me == 0;
    for (size_t u = 0; u < d->model->units && me < owners; u++) {
        const vit_unit *unit = &d->model->unit[u];
        dist_shard *s = &d->shard[u];
        *s = (dist_shard){.hi = dist__padded(d, u), .param = dist__params(d, u)};
        if (u < first) continue;
        s->trained = unit->trainable < unit->count ? unit->trainable : s->hi;
        size_t granules = s->trained / VIT_GRANULE, begin = granules * me / owners,
               end = granules * (me + 1) / owners;
        s->grad = rt_slice(dist__grads(d, u, u), 0, s->trained);
        s->squares = rt_slice(s->grad, begin * VIT_GRANULE, (end - begin) * VIT_GRANULE);
    }
    return 0;
}

/* Every rank owns an equal part of every unit's padded parameters: elements [k r, k (r + 1)) on rank r. */
static int dist__partition(dist *d) {
    size_t N = (size_t)d->comm->size, me = (size_t)d->comm->index;
    int keeps_whole = d->strategy->stage < 2 || /* or adds up whole gradients, as FSDP under no_sync */
                      (d->options.reduction == DIST_REDUCE_LAST && d->options.accumulation > 1);
    d->params_cut = d->strategy->stage < 3 ? 1 : N;
    d->grads_cut = keeps_whole ? 1 : N;
    if (dist__alloc(d, 0)) return -1;
    d->saves = 1;
    for (size_t u = 0; u < d->model->units; u++) {
        const vit_unit *unit = &d->model->unit[u];
        dist_shard *s = &d->shard[u];
        size_t k = dist__padded(d, u) / N;
        *s = (dist_shard){.lo = k * me, .hi = k * (me + 1), .param = dist__params(d, u)};
        if (d->params_cut == 1) s->param = rt_slice(s->param, s->lo, k);
        s->trained = s->lo;
        if (u < d->first_trained) continue;
        size_t end = unit->trainable < unit->count ? unit->trainable : s->hi;
        if (end > s->lo) s->trained = end < s->hi ? end : s->hi;
        s->grad = s->squares = rt_slice(dist__grads(d, u, u), keeps_whole ? s->lo : 0, s->trained - s->lo);
    }
    return 0;
}

static rt_block dist__resident(dist *d, size_t u) { return dist__params(d, u); }

static dist_unit_blocks dist__resident_backward(dist *d, size_t u) {
    return (dist_unit_blocks){dist__params(d, u), dist__gradient_target(d, u)};
}

static void dist__nothing(dist *d, size_t u) { (void)d, (void)u; }

/* After a step, which changed only what each rank owns: sends the new parameters to all, unit by unit, so
 * that the first arrive while the last still travel. */
static void dist__refresh(dist *d) {
    int gathers = d->strategy->refresh == DIST_ALL_GATHER, root = d->comm->index == 0;
    rt_record(d->rank, RT_COMPUTE, &d->stepped);
    for (size_t u = d->first_trained; u < d->model->units; u++) {
        rt_block p = dist__params(d, u), none = {0};
        rt_block from = gathers ? d->shard[u].param : root ? p : none, to = gathers || !root ? p : none;
        dist__collective(d, d->strategy->refresh, from, to, d->model->unit[u].name,
                         from.count ? &d->stepped : NULL, &d->arrived[u]);
    }
}

/* The parameters of unit u, once they have arrived. */
static rt_block dist__arriving(dist *d, size_t u) {
    dist__wait(d->comm, RT_COMPUTE, &d->arrived[u]);
    d->arrived[u].recorded = 0; /* waited for once */
    return dist__params(d, u);
}

/* --------------------------------------------------------------------------------------- strategy: single */

static int single_open(dist *d, error_text *e) {
    if (d->comm->size > 1)
        return error_set(e, "strategy single runs on one rank, found %d; choose another for more",
                         d->comm->size);
    d->options.reduction = DIST_REDUCE_LAST; /* nobody to sum with: both are the same */
    return dist__replicate(d, 1, 0);
}

static void single_post_backward(dist *d, size_t u) {
    if (d->micro > 0) dist__accumulate(d, u);
}

/* ------------------------------------------------------------------------------------------- strategy: dp */

/* Data parallel with a parameter server, as PyTorch's DataParallel: rank 0 alone has optimizer state. It gets
 * the sum of the gradients after the backward pass, and sends its parameters to all before the next forward
 * pass. (Each rank loads its own samples, so that inputs and outputs need not be scattered and gathered.) */
static int dp_open(dist *d, error_text *e) {
    (void)e;
    return dist__replicate(d, 1, 0);
}

static rt_block dp_pre_forward(dist *d, size_t u) {
    return d->comm->index == 0 ? dist__params(d, u) : dist__arriving(d, u);
}

static void dp_step(dist *d) {
    int root = d->comm->index == 0;
    if (root) dist__finish_gradient(d);
    dist__update(d);
    if (!root) dist__free_gradient_slots(d); /* the update's collective came after theirs */
    dist__refresh(d);
}

/* ------------------------------------------------------------------------------------------ strategy: ddp */

/* Distributed data parallel (Li et al. 2020, arXiv 2006.15704): every rank has everything; the gradients of a
 * bucket of units are all-reduced while backward goes on with the units before it. */
static int ddp_open(dist *d, error_text *e) {
    (void)e;
    return dist__replicate(d, (size_t)d->comm->size, d->options.bucket_size_mb);
}

static void ddp_step(dist *d) {
    dist__finish_gradient(d);
    dist__update(d);
}

/* ---------------------------------------------------------------------------- strategies: zero1 and zero2 */

/* ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). Stage 1: an all-reduce is a reduce-scatter and an
 * all-gather, and between the two each rank needs optimizer state only for its own part. Stage 2: after the
 * reduce-scatter it needs gradients only of its own part, too. */
static int zero_open(dist *d, error_text *e) {
    (void)e;
    return dist__partition(d);
}

static void zero_step(dist *d) {
    dist__finish_gradient(d);
    dist__update(d);
    dist__refresh(d);
}

/* ---------------------------------------------------------------------------------------- strategy: zero3 */

/* ZeRO stage 3, or fully sharded data parallel (Zhao et al. 2023, arXiv 2304.11277): each rank keeps its part
 * of the parameters, too. A unit's are gathered into a slot before they are used, `prefetch` units ahead, and
 * freed after. Slots are handed on in the order in which units are gathered, which is that in which they are
 * freed; who gathers into one waits until the unit before has been used: that limits how far communication
 * runs ahead, as limit_all_gathers does in PyTorch's FSDP. */
static int zero3_open(dist *d, error_text *e) {
    size_t n = d->model->units, size = dist__largest_unit(d, 0), keep = (size_t)d->options.keep_after_forward;
    (void)e;
    d->slots = keep || d->options.prefetch >= n ? n : d->options.prefetch + 1;
    d->gathered = rt_alloc(d->rank, RT_COMMUNICATION_BUFFERS, d->model->type,
                           keep ? d->offset[n] : d->slots * size, d->slots);
    d->parameter_slot = calloc(d->slots, sizeof *d->parameter_slot);
    d->slot_of = calloc(n, sizeof *d->slot_of);
    if (!d->parameter_slot || !d->slot_of) return rt_fail(d->rank, "rank %d: out of memory", d->rank->rank);
    if (rt_failed(d->rank)) return -1;
    for (size_t i = 0; i < d->slots; i++) { /* of units that stay: each has its own */
        rt_block *b = &d->parameter_slot[i].block;
        *b = rt_slice(d->gathered, keep ? d->offset[i] : i * size, keep ? dist__padded(d, i) : size);
        b->track += i;
        b->tracks = 1;
    }
    return dist__partition(d);
}

static void zero3_gather(dist *d, size_t u) {
    if (d->slot_of[u]) return;
    dist_parameter_slot *s =
        &d->parameter_slot[d->options.keep_after_forward ? u : d->next_slot++ % d->slots];
    d->slot_of[u] = s;
    dist__wait(d->comm, RT_COMMUNICATION, &d->stepped);
    dist__collective(d, DIST_ALL_GATHER, dist__params(d, u), rt_slice(s->block, 0, dist__padded(d, u)),
                     d->model->unit[u].name, &s->freed, &s->gathered);
}

static void zero3_free(dist *d, size_t u) {
    dist_parameter_slot *s = d->slot_of[u];
    dist__observe(d, "free", u);
    dist__poison(d, s->block);
    rt_record(d->rank, RT_COMPUTE, &s->freed);
    d->slot_of[u] = NULL;
}

/* Gathers unit u, if that has not been done ahead, and the next ones on the way to the `last`. */
static void zero3_gather_ahead(dist *d, size_t u, size_t last) {
    zero3_gather(d, u);
    for (size_t v = u, ahead = 0; v != last && ahead < d->options.prefetch; ahead++)
        zero3_gather(d, v = u < last ? v + 1 : v - 1);
}

static rt_block zero3_gathered(dist *d, size_t u) {
    dist__wait(d->comm, RT_COMPUTE, &d->slot_of[u]->gathered);
    return rt_slice(d->slot_of[u]->block, 0, dist__padded(d, u));
}

static rt_block zero3_pre_forward(dist *d, size_t u) {
    zero3_gather_ahead(d, u, d->model->units - 1);
    return zero3_gathered(d, u);
}

/* Backward begins with the unit that forward ends with: that one stays. */
static void zero3_post_forward(dist *d, size_t u) {
    int stays = d->options.keep_after_forward || u + 1 == d->model->units;
    if (!stays || !d->context.training || u < d->first_trained) zero3_free(d, u);
}

static dist_unit_blocks zero3_pre_backward(dist *d, size_t u) {
    zero3_gather_ahead(d, u, d->first_trained);
    rt_block grads = dist__gradient_target(d, u);
    return (dist_unit_blocks){zero3_gathered(d, u), grads};
}

static void zero3_post_backward(dist *d, size_t u) {
    zero3_free(d, u);
    dist__reduce_gradient(d, u);
}

static void zero3_step(dist *d) {
    dist__finish_gradient(d);
    dist__update(d);
    rt_record(d->rank, RT_COMPUTE, &d->stepped);
}

/* ------------------------------------------------------------------------------------ table of strategies */

// clang-format off
static const dist_strategy dist__strategies[] = {
    {"single", NULL, DIST_REDUCE_LAST, 0, DIST_OPS, DIST_OPS, single_open,
     dist__resident, dist__nothing, dist__resident_backward, single_post_backward, dist__update},
    {"dp", NULL, DIST_REDUCE_LAST, 0, DIST_REDUCE, DIST_BROADCAST, dp_open,
     dp_pre_forward, dist__nothing, dist__resident_backward, dist__reduce_gradient, dp_step},
    {"ddp", NULL, DIST_REDUCE_LAST, 0, DIST_ALL_REDUCE, DIST_OPS, ddp_open,
     dist__resident, dist__nothing, dist__resident_backward, dist__reduce_gradient, ddp_step},
    {"zero1", NULL, DIST_REDUCE_LAST, 1, DIST_REDUCE_SCATTER, DIST_ALL_GATHER, zero_open,
     dist__arriving, dist__nothing, dist__resident_backward, dist__reduce_gradient, zero_step},
    {"zero2", NULL, DIST_REDUCE_EVERY, 2, DIST_REDUCE_SCATTER, DIST_ALL_GATHER, zero_open,
     dist__arriving, dist__nothing, dist__resident_backward, dist__reduce_gradient, zero_step},
    {"zero3", "fsdp", DIST_REDUCE_EVERY, 3, DIST_REDUCE_SCATTER, DIST_OPS, zero3_open,
     zero3_pre_forward, zero3_post_forward, zero3_pre_backward, zero3_post_backward, zero3_step},
};
// clang-format on

const dist_strategy *dist_strategy_at(size_t i) {
    return i < sizeof dist__strategies / sizeof *dist__strategies ? &dist__strategies[i] : NULL;
}

const dist_strategy *dist_strategy_named(const char *name) {
    const dist_strategy *s;
    for (size_t i = 0; (s = dist_strategy_at(i)); i++)
        if (!strcmp(name, s->name) || (s->alias && !strcmp(name, s->alias))) return s;
    return NULL;
}

/* -------------------------------------------------------------------------------------- the training loop */

static rt_category dist__optimizer_memory(const dist *d) {
    return d->options.offload ? RT_HOST_MEMORY : RT_OPTIMIZER;
}

int dist_open(dist *d, dist_comm *comm, const vit_model *model, const dist_options *options, error_text *e) {
    rt_rank *rank = comm->rank;
    size_t n = model->units, unit = VIT_ALIGNMENT * (size_t)comm->size;
    *d = (dist){.comm = comm, .rank = rank, .device = comm->device, .model = model, .options = *options};
    d->strategy = dist_strategy_named(options->strategy);
    if (!d->strategy) return error_set(e, "no strategy is named %s", options->strategy);
    if (!(d->device->types & 1u << model->type))
        return error_set(e, "device %s does not compute in this type", d->device->name);
    if (d->options.layer_decay == 0) d->options.layer_decay = 1;
    if (d->options.reduction == DIST_REDUCE_DEFAULT) d->options.reduction = d->strategy->reduction;
    d->offset = calloc(n + 1, sizeof *d->offset);
    d->shard = calloc(n, sizeof *d->shard);
    if (!d->offset || !d->shard) return rt_fail(rank, "rank %d: out of memory", rank->rank);
    for (size_t u = 0; u < n; u++)
        d->offset[u + 1] = d->offset[u] + (model->unit[u].count + unit - 1) / unit * unit;
    d->params_cut = d->grads_cut = 1;
    if (options->inference) d->first_trained = n;
    while (d->first_trained < n && model->unit[d->first_trained].trainable == 0) d->first_trained++;
    if (options->graphs && !d->device->capture)
        return error_set(e, "device %s cannot record a step, expected cuda", d->device->name);
    if (options->graphs && options->offload)
        return error_set(
            e, "a step that is to be recorded: found offload, expected its optimizer on the device");
    if (options->graphs && comm->size > 1 && comm->transport && !comm->transport->replayed) /* no estimate */
        return error_set(
            e, "a step that is to be recorded: found %d ranks over transport %s, expected one, or nccl",
            comm->size, comm->transport->name);
    if (options->graphs && !(d->graph = calloc(options->accumulation + 1, sizeof *d->graph)))
        return rt_fail(rank, "rank %d: out of memory", rank->rank);
    if (d->strategy->open(d, e)) return -1;
    for (size_t u = 0; u < n; u++) {
        dist_shard *s = &d->shard[u];
        size_t count = s->trained - s->lo;
        for (int i = 0; count && i < (options->optimizer == DIST_ADAMW ? 2 : 1); i++)
            s->state[i] = rt_alloc(rank, dist__optimizer_memory(d), RT_FP32, count, 1);
        if (count && model->type != RT_FP32)
            s->master = rt_alloc(rank, dist__optimizer_memory(d), RT_FP32, count, 1);
        if (!count || !options->offload) continue;
        s->host_param = rt_alloc(rank, RT_HOST_MEMORY, model->type, count, 1);
        s->host_grad = rt_alloc(rank, RT_HOST_MEMORY, s->grad.type, count, 1);
    }
    if (options->offload) d->host_scalars = rt_alloc(rank, RT_HOST_MEMORY, RT_FP64, VIT_SCALARS, 1);
    d->scaler = vit_scaler_default();
    d->device_scaler = rt_alloc(rank, RT_WORKSPACE, RT_U8, sizeof(vit_scaler), 1);
    d->scalars = rt_alloc(rank, RT_WORKSPACE, RT_FP64, VIT_SCALARS, 1);
    d->control = rt_alloc(rank, RT_COMMUNICATION_BUFFERS, RT_I64, DIST__CONTROL, 1);
    d->counts = rt_alloc(rank, RT_COMMUNICATION_BUFFERS, RT_I64, options->counts, 1);
    for (int i = 0; i < 2; i++) {
        d->outcome[i].scalars = rt_alloc(rank, RT_WORKSPACE, RT_FP64, VIT_SCALARS, 1);
        d->outcome[i].loss = rt_alloc(rank, RT_WORKSPACE, RT_I64, DIST__NORM - DIST__LOSS, 1);
    }
    if (rt_failed(rank) || vit_activations_init(&d->activations, rank, d->device, model, options->batch_size,
                                                options->inference, options->checkpoint_every))
        return -1;
    d->context = (vit_context){.rank = rank,
                               .stream = RT_COMPUTE,
                               .device = d->device,
                               .model = model,
                               .batch = &d->activations.batch,
                               .B = options->batch_size,
                               .scalars = d->scalars,
                               .losses = d->activations.losses,
                               .workspace = d->activations.workspace};
    d->update = d->context;
    if (options->offload) d->update.device = options->offload, d->update.stream = RT_HOST;
    return 0;
}

void dist_close(dist *d) {
    rt_event end = {0};
    if (d->rank) rt_record(d->rank, RT_COMMUNICATION, &end); /* slower ranks may need what this one posted */
    for (size_t u = 0; d->shard && u < d->model->units; u++) {
        dist_shard *s = &d->shard[u];
        for (int i = 0; i < 3; i++)
            rt_free(d->rank, dist__optimizer_memory(d), i < 2 ? &s->state[i] : &s->master);
        rt_free(d->rank, RT_HOST_MEMORY, &s->host_param);
        rt_free(d->rank, RT_HOST_MEMORY, &s->host_grad);
    }
    rt_free(d->rank, RT_HOST_MEMORY, &d->host_scalars);
    for (size_t k = 0; d->graph && k <= d->options.accumulation; k++)
        if (d->graph[k].recorded) d->device->forget(d->rank, d->graph[k].recorded);
    free(d->graph);
    rt_category slots = dist__reduces_in_slots(d) ? RT_COMMUNICATION_BUFFERS : RT_GRADIENTS;
    for (int i = 0; i < 2; i++) rt_free(d->rank, slots, &d->gradient_slot[i].block);
    rt_free(d->rank, RT_COMMUNICATION_BUFFERS, &d->gathered);
    rt_free(d->rank, RT_PARAMETERS, &d->params);
    rt_free(d->rank, RT_GRADIENTS, &d->grads);
    rt_free(d->rank, RT_GRADIENTS, &d->backward_grads);
    rt_free(d->rank, RT_WORKSPACE, &d->device_scaler);
    rt_free(d->rank, RT_WORKSPACE, &d->scalars);
    for (int i = 0; i < 2; i++) {
        rt_free(d->rank, RT_WORKSPACE, &d->outcome[i].scalars);
        rt_free(d->rank, RT_WORKSPACE, &d->outcome[i].loss);
    }
    rt_free(d->rank, RT_COMMUNICATION_BUFFERS, &d->control);
    rt_free(d->rank, RT_COMMUNICATION_BUFFERS, &d->counts);
    if (d->activations.out) vit_activations_free(&d->activations, d->rank, d->model);
    free(d->offset);
    free(d->shard);
    free(d->bucket);
    free(d->bucket_of);
    free(d->arrived);
    free(d->parameter_slot);
    free(d->slot_of);
    *d = (dist){0};
}

dist_formula dist_formula_of(const dist *d) {
    const dist_strategy *s = d->strategy;
    const dist_options *o = &d->options;
    size_t n = d->model->units;
    double type = (double)rt_type_size(d->model->type),
           kept_type = (double)rt_type_size(dist__reduce_type(d));
    int master = d->model->type != RT_FP32;
    int N = d->comm->size, every = o->reduction == DIST_REDUCE_EVERY, M = (int)o->accumulation;
    int whole_gradients = N == 1 || s->stage < 2 || (!every && M > 1); /* the last: FSDP's no_sync */
    double P = (double)d->offset[n], trained = P - (double)d->offset[d->first_trained], optimised = trained;
    double largest = (double)dist__largest_unit(d, 0), kept = (double)dist__padded(d, n - 1);
    const vit_unit *last = &d->model->unit[n - 1]; /* the only one that may be frozen in part */
    if (last->trainable < last->count && trained > 0)
        optimised -= (double)(dist__padded(d, n - 1) - last->trainable);
    double states = o->optimizer == DIST_ADAMW ? 2 : 1, reductions = every ? M : 1;
    dist_formula f = {.bytes = {[RT_ACTIVATIONS] = NAN, [RT_WORKSPACE] = NAN}};
    f.bytes[RT_PARAMETERS] = type * P / (s->stage >= 3 ? N : 1);
    f.bytes[RT_GRADIENTS] = kept_type * trained / (whole_gradients ? 1 : N);
    f.bytes[RT_OPTIMIZER] = 4 * (states + master) * optimised / (s->stage >= 1 ? N : 1);
    if (o->offload) { /* the update's parameters and gradients, too */
        f.bytes[RT_HOST_MEMORY] =
            f.bytes[RT_OPTIMIZER] + (type + kept_type) * optimised / (s->stage >= 1 ? N : 1);
        f.bytes[RT_OPTIMIZER] = 0;
    }
    if (s->reduce == DIST_REDUCE && d->comm->index) /* the root has it all */
        f.bytes[RT_OPTIMIZER] = f.bytes[RT_HOST_MEMORY] = 0;
    if (o->offload) f.bytes[RT_HOST_MEMORY] += 8 * VIT_SCALARS;
    if (!every && M > 1) f.bytes[RT_GRADIENTS] += kept_type * (double)dist__largest_unit(d, d->first_trained);
    if (d->backward_grads.count)
        f.bytes[RT_GRADIENTS] += type * (double)dist__largest_unit(d, d->first_trained);
    if ((every && M > 1) || !whole_gradients)
        f.bytes[RT_COMMUNICATION_BUFFERS] += kept_type * 2 * (double)dist__largest_bucket(d);
    if (s->stage >= 3)
        f.bytes[RT_COMMUNICATION_BUFFERS] += type * (o->keep_after_forward ? P : (double)d->slots * largest);
    f.bytes[RT_COMMUNICATION_BUFFERS] += 8 * (double)(d->control.count + d->counts.count);
    f.elements[DIST_CONTROL] = (double)d->control.count;
    if (s->reduce != DIST_OPS) f.elements[s->reduce] += reductions * trained;
    if (s->refresh != DIST_OPS) f.elements[s->refresh] += trained;
    if (s->stage >= 3) f.elements[DIST_ALL_GATHER] += M * (P + (o->keep_after_forward ? 0 : trained - kept));
    return f;
}

static void *dist__pretend(rt_rank *rank, size_t bytes) {
    (void)bytes;
    return rank; /* never written to, nor read */
}

static void dist__forget(rt_rank *rank, void *memory, size_t bytes) { (void)rank, (void)memory, (void)bytes; }

int dist_estimate(const vit_device *device, const vit_model *model, const dist_options *options, int ranks,
                  int index, rt_ledger *ledger, error_text *e) {
    rt_world world;
    dist d;
    if (rt_world_init(&world, 1, 0)) return error_set(e, "out of memory");
    rt_rank *rank = &world.ranks[0];
    rank->allocate = dist__pretend;
    rank->release = dist__forget;
    dist_comm comm = {.name = "world", .rank = rank, .index = index, .size = ranks, .device = device};
    int failed = dist_open(&d, &comm, model, options, e);
    *ledger = rank->ledger;
    if (world.out_of_memory) ledger->total_peak_bytes = SIZE_MAX;
    if (world.out_of_memory) failed = 0;
    if (failed && world.failed) *e = world.error;
    dist_close(&d);
    rt_world_free(&world);
    return failed;
}

/* The part of the unit's own elements (without padding between ranks) that the shard holds. */
static size_t dist__held(const dist *d, size_t u) {
    size_t lo = d->shard[u].lo, hi = d->shard[u].hi, count = d->model->unit[u].count;
    return hi < count ? hi - lo : count > lo ? count - lo : 0;
}

/* Floats of host memory into a block of any type, rounded, and back. */
static void dist__copy_in(dist *d, rt_block to, const float *values) {
    if (to.type == RT_FP32) {
        vit_copy_in(&d->context, to, values);
        return;
    }
    uint16_t *rounded = malloc(to.count * sizeof *rounded);
    if (!rounded) {
        rt_fail(d->rank, "rank %d: out of memory", d->rank->rank);
        return;
    }
    rt_narrow(rounded, values, to.count, to.type);
    vit_copy_in(&d->context, to, rounded);
    free(rounded);
}

static void dist__copy_out(dist *d, float *values, rt_block from) {
    if (from.type == RT_FP32) {
        vit_copy_out(&d->context, values, from);
        return;
    }
    uint16_t *narrow = calloc(from.count, sizeof *narrow);
    if (!narrow) {
        rt_fail(d->rank, "rank %d: out of memory", d->rank->rank);
        return;
    }
    vit_copy_out(&d->context, narrow, from);
    rt_widen(values, narrow, from.count, from.type);
    free(narrow);
}

/* The part of a unit's master weights, or of optimizer state, that stands for the unit's own elements. */
static rt_block dist__own(const dist *d, size_t u, rt_block of_shard) {
    size_t held = dist__held(d, u);
    return rt_slice(of_shard, 0, of_shard.count < held ? of_shard.count : held);
}

void dist_import(dist *d, size_t u, const float *values) {
    size_t held = dist__held(d, u);
    rt_block master = dist__own(d, u, d->shard[u].master);
    if (d->params_cut == 1)
        dist__copy_in(d, rt_slice(dist__params(d, u), 0, d->model->unit[u].count), values);
    else if (held)
        dist__copy_in(d, rt_slice(d->shard[u].param, 0, held), values + d->shard[u].lo);
    if (master.count) vit_copy_in(&d->update, master, values + d->shard[u].lo);
    rt_block host_param = d->shard[u].host_param;
    if (host_param.count) vit_cast(&d->context, host_param, rt_slice(d->shard[u].param, 0, host_param.count));
    rt_record(d->rank, RT_COMPUTE, &d->stepped);
}

void dist_export(dist *d, size_t u, float *values) {
    size_t held = dist__held(d, u);
    rt_event posted = {0}; /* new parameters may still be on their way */
    rt_record(d->rank, RT_COMMUNICATION, &posted);
    rt_wait(d->rank, RT_COMPUTE, &posted);
    rt_block master = dist__own(d, u, d->shard[u].master);
    if (held) dist__copy_out(d, values + d->shard[u].lo, rt_slice(d->shard[u].param, 0, held));
    if (master.count) vit_copy_out(&d->update, values + d->shard[u].lo, master);
}

void dist_import_state(dist *d, size_t u, int i, const float *values) {
    rt_block state = dist__own(d, u, d->shard[u].state[i]);
    if (state.count) vit_copy_in(&d->update, state, values + d->shard[u].lo);
}

void dist_export_state(dist *d, size_t u, int i, float *values) {
    rt_block state = dist__own(d, u, d->shard[u].state[i]);
    if (state.count) vit_copy_out(&d->update, values + d->shard[u].lo, state);
}

static void dist__load_batch(dist *d, const void *images, const int32_t *labels, const uint64_t *keys) {
    vit_copy_in(&d->context, d->activations.batch.images, images);
    vit_copy_in(&d->context, d->activations.batch.labels, labels);
    if (keys) vit_copy_in(&d->context, d->activations.batch.sample_keys, keys);
}

static void dist__forward_unit(dist *d, size_t u) {
    vit_activations *a = &d->activations;
    rt_block params = d->strategy->pre_forward(d, u);
    dist__observe(d, "forward", u);
    vit_unit_forward(&d->context, &d->model->unit[u], params, u ? a->out[u - 1] : (rt_block){0}, a->out[u],
                     a->saved[u]);
    d->strategy->post_forward(d, u);
}

static void dist__backward_unit(dist *d, size_t u) {
    vit_activations *a = &d->activations;
    const vit_unit *unit = &d->model->unit[u];
    rt_block in = u ? a->out[u - 1] : (rt_block){0};
    dist_unit_blocks b = d->strategy->pre_backward(d, u);
    rt_block grads = b.grads;
    if (d->backward_grads.count) {
        grads = rt_slice(d->backward_grads, 0, b.grads.count);
        dist__clear_padding(d, u, grads);
    }
    if (vit_is_checkpointed(a, unit)) {
        dist__observe(d, "recompute", u);
        vit_unit_forward(&d->context, unit, b.params, in, (rt_block){0}, a->saved[u]);
    }
    dist__observe(d, "backward", u);
    vit_unit_backward(&d->context, unit, b.params, grads, in, a->saved[u], a->gradient[(u + 1) % 2],
                      u > d->first_trained ? a->gradient[u % 2] : (rt_block){0});
    if (d->backward_grads.count) vit_cast(&d->context, b.grads, grads);
    d->strategy->post_backward(d, u);
}

static void dist__replay(dist *d, const dist_graph *g) {
    d->device->replay(d->rank, g->recorded);
    if (d->comm->transport->replayed) d->comm->transport->replayed(d->comm);
}

/* Part k of a step begins. With graphs it runs as it is the first time, when the device still chooses and
 * allocates, is recorded the second time, and replayed from then on; what hooks and events leave behind is
 * the same after every step. 1: it has been replayed, and is over. */
static int dist__replayed(dist *d, size_t k) {
    dist_graph *g = d->graph ? &d->graph[k] : NULL;
    if (!g || rt_failed(d->rank)) return 0;
    if (g->recorded) {
        dist__replay(d, g);
        for (int op = 0; op < DIST_OPS; op++) {
            d->comm->traffic[op].calls += g->traffic[op].calls;
            d->comm->traffic[op].elements += g->traffic[op].elements;
            d->comm->traffic[op].wire_bytes += g->traffic[op].wire_bytes;
        }
        return 1;
    }
    if (!g->runs++) return 0;
    d->recording = 1;
    memcpy(g->traffic, d->comm->traffic, sizeof g->traffic);
    d->device->capture(d->rank);
    return 0;
}

/* Part k has been launched; if that was to record it, it runs now. */
static void dist__launched(dist *d, size_t k) {
    if (!d->recording) return;
    dist_graph *g = &d->graph[k];
    d->recording = 0;
    g->recorded = d->device->captured(d->rank);
    if (!g->recorded) return;
    for (int op = 0; op < DIST_OPS; op++) {
        const dist_traffic *now = &d->comm->traffic[op], before = g->traffic[op];
        g->traffic[op] = (dist_traffic){now->calls - before.calls, now->elements - before.elements,
                                        now->wire_bytes - before.wire_bytes};
    }
    dist__replay(d, g);
}

void dist_begin_step(dist *d, size_t t, double learning_rate) {
    int fp16 = d->model->type == RT_FP16;
    double scalars[VIT_SCALARS] = {[VIT_LEARNING_RATE] = learning_rate, [VIT_STEP] = (double)t};
    size_t told = VIT_STEP + 1;
    if (d->ended == 0) { /* all that the device will go on from */
        vit_scaler scaler = fp16 ? d->scaler : (vit_scaler){.scale = 1};
        vit_copy_in(&d->context, d->device_scaler, &scaler);
        scalars[VIT_LOSS_SCALE] = scaler.scale;
        told = VIT_SCALARS;
    }
    vit_copy_in(&d->context, rt_slice(d->scalars, 0, told), scalars);
    /* the counter of what is not finite stays, but in fp16, where an overflow is no failure */
    if (d->graph) d->next_slot = 0; /* the same slots in every step */
    size_t cleared = fp16 ? d->control.count : DIST__NORM + VIT_NORM_NOT_FINITE;
    vit_fill(&d->context, rt_slice(d->control, 0, cleared), 0);
}

void dist_request_stop(dist *d) { d->stop_requested = 1; }

void dist_micro_batch(dist *d, size_t micro, const void *images, const int32_t *labels,
                      const uint64_t *keys) {
    d->micro = micro;
    d->context.training = 1;
    dist__load_batch(d, images, labels, keys);
    if (dist__replayed(d, micro)) return;
    for (size_t u = 0; u < d->model->units; u++) dist__forward_unit(d, u);
    vit_loss_accumulate(&d->context, rt_slice(d->control, DIST__LOSS, 2));
    for (size_t u = d->model->units; u-- > d->first_trained;) dist__backward_unit(d, u);
    dist__launched(d, micro);
}

void dist_end_step(dist *d, dist_result *result) {
    dist_outcome *o = &d->outcome[d->ended++ % 2];
    int64_t stop = d->stop_requested;
    if (d->ended > d->known + 2)
        rt_fail(d->rank, "rank %d: found two steps whose results have not been read, expected one at most",
                d->rank->rank);
    vit_copy_in(&d->context, rt_slice(d->control, DIST__STOP, 1), &stop);
    if (!dist__replayed(d, d->options.accumulation)) {
        d->strategy->step(d);
        dist__launched(d, d->options.accumulation);
    }
    dist__wait(d->comm, RT_COMPUTE, &o->read);
    vit_cast(&d->context, o->scalars, d->scalars);
    vit_cast(&d->context, o->loss, rt_slice(d->control, DIST__LOSS, DIST__NORM - DIST__LOSS));
    rt_record(d->rank, RT_COMPUTE, &o->ready);
    o->ended = rt_seconds();
    while (result && d->known < d->ended) dist_read_result(d, result);
}

void dist_read_result(dist *d, dist_result *result) {
    dist_outcome *o = &d->outcome[d->known++ % 2];
    vit_context copy = dist__copying(d); /* the copy stream does not wait for later steps */
    double scalars[VIT_SCALARS] = {0};
    int64_t loss[DIST__NORM] = {0};
    dist__wait(d->comm, RT_COPY, &o->ready);
    vit_copy_out(&copy, scalars, o->scalars);
    vit_copy_out(&copy, loss, o->loss);
    rt_record(d->rank, RT_COPY, &o->read);
    *result = (dist_result){.loss = (double)loss[DIST__LOSS] * VIT_LOSS_UNIT /
                                    ((double)d->comm->size * (double)d->options.accumulation),
                            .gradient_norm = scalars[VIT_GRADIENT_NORM],
                            .bad_losses = (size_t)loss[DIST__BAD_LOSSES],
                            .loss_scale = scalars[VIT_USED_SCALE],
                            .stop = loss[DIST__STOP] != 0,
                            .ended = d->rank->wait ? rt_seconds() : o->ended};
    if (d->model->type != RT_FP16 || rt_failed(d->rank)) return;
    result->overflow = !isfinite(result->gradient_norm);
    if (vit_scaler_update(&d->scaler, result->overflow))
        rt_fail(d->rank,
                "fp16: a gradient overflows though the loss scale is %g, expected no less (--precision bf16)",
                d->scaler.scale);
}

void dist_forward(dist *d, const void *images, const int32_t *labels, float *logits, float *losses,
                  size_t *not_finite) {
    dist_traffic traffic[DIST_OPS]; /* only training is counted */
    memcpy(traffic, d->comm->traffic, sizeof traffic);
    d->context.training = 0;
    dist__load_batch(d, images, labels, NULL);
    if (not_finite) *not_finite = d->model->units;
    for (size_t u = 0; u < d->model->units; u++) {
        int64_t bad = 0;
        dist__forward_unit(d, u);
        if (!not_finite || *not_finite < d->model->units) continue;
        vit_fill(&d->context, d->control, 0);
        vit_sum_of_squares(&d->context, rt_slice(d->control, DIST__NORM, VIT_NORM_COUNTERS),
                           d->activations.out[u]);
        vit_copy_out(&d->context, &bad, rt_slice(d->control, DIST__NORM + VIT_NORM_NOT_FINITE, 1));
        if (bad) *not_finite = u;
    }
    if (not_finite) vit_fill(&d->context, d->control, 0);
    if (logits) dist__copy_out(d, logits, d->activations.out[d->model->units - 1]);
    if (losses) vit_copy_out(&d->context, losses, d->activations.losses);
    memcpy(d->comm->traffic, traffic, sizeof traffic);
}

void dist_sum(dist *d, int64_t *values, size_t n) {
    dist_traffic traffic = d->comm->traffic[DIST_CONTROL];
    rt_block block = rt_slice(d->counts, 0, n);
    vit_copy_in(&d->context, block, values);
    rt_record(d->rank, RT_COMPUTE, &d->counts_ready);
    dist__collective(d, DIST_CONTROL, block, block, "counts", &d->counts_ready, &d->counts_done);
    dist__wait(d->comm, RT_COMPUTE, &d->counts_done);
    vit_copy_out(&d->context, values, block);
    d->comm->traffic[DIST_CONTROL] = traffic;
}

#endif /* DIST_IMPLEMENTATION */
