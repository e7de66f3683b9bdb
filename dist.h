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
 * computes and what communicates. `single`, `dp` and `ddp` are here; a strategy says, unit by unit, which
 * part [lo, hi) of the parameters this rank updates and saves (dist_shard), and everything else is common
 * code: the exact gradient norm, clipping, the optimizer, evaluation, checkpoints.
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
    void (*observe)(void *observer, const dist_call *call); /* sees every call posted; or NULL */
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
 * must. */
typedef struct dist_transport {
    const char *name; /* "local" */
    void (*post)(dist_comm *comm, const dist_call *calls, size_t n);
} dist_transport;

/* The local transport: the ranks are threads of this process and meet in a hub. NULL: out of memory. The hub
 * must outlive the run of the world. */
typedef struct dist_hub dist_hub;
dist_hub *dist_hub_create(rt_world *world);
void dist_hub_free(dist_hub *hub);

/* This rank's communicator of all ranks of its world, through the hub. The device must be open. */
int dist_comm_open(dist_comm *comm, dist_hub *hub, rt_rank *rank, const vit_device *device);
/* What was posted through it must be complete, unless the world has failed. */
void dist_comm_close(dist_comm *comm);

/* --------------------------------------------------------------------------------------------- strategies */

typedef enum { DIST_ADAMW, DIST_SGD } dist_optimizer;
typedef enum { DIST_REDUCE_DEFAULT, DIST_REDUCE_LAST, DIST_REDUCE_EVERY } dist_reduction;

typedef struct dist_options {
    const char *strategy;
    size_t batch_size;        /* micro-batch of one rank */
    size_t accumulation;      /* micro-batches a step */
    double bucket_size_mb;    /* ddp: a bucket is full at this size (MiB) */
    dist_reduction reduction; /* sum over ranks after the last micro-batch of a step, or after every one */
    dist_optimizer optimizer;
    vit_adamw_options adamw;
    vit_sgd_options sgd;
    double gradient_clipping; /* 0: off */
    double layer_decay; /* unit u learns at layer_decay^(units - 1 - u) times the rate; 0 and 1: all alike */
    int inference;      /* dist_forward alone: no gradients, no optimizer state, no micro-batches */
    size_t counts;      /* dist_sum will be asked for so many numbers at most */
} dist_options;

/* The part of a unit that this rank saves, elements [lo, hi) of its parameters, and that it updates, [lo,
 * trained): the rest is frozen. `squares` is the part of the gradient that it adds to the norm: over all
 * ranks they cover the gradient once. */
typedef struct dist_shard {
    size_t lo, hi, trained;
    rt_block param, grad, squares, state[2]; /* of [lo, hi), [lo, trained), -, [lo, trained) */
} dist_shard;

/* A run of consecutive units whose gradients are reduced by one collective. */
typedef struct dist_bucket {
    size_t first, last, offset, count;
    rt_event ready, reduced;
} dist_bucket;

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
    size_t first_trained;       /* units before it are frozen: no backward, no gradient, no optimizer state */
    rt_block params;            /* all units, one track each */
    rt_block grads;             /* units from first_trained on, one track each */
    dist_shard *shard;          /* [units] */
    int saves;                  /* this rank writes its shards into checkpoints */
    dist_bucket *bucket;        /* in the order in which backward makes them ready: from the head down */
    size_t buckets, *bucket_of; /* [units] */
    rt_block slot[2];           /* gradients of a later micro-batch, before they are added */
    dist_bucket *owed[2];       /* whose reduced gradients still wait in the slot */
    rt_event slot_reduced[2];
    rt_block scalars, control, counts;
    rt_event control_ready, control_done, counts_ready, counts_done;
    size_t micro; /* micro-batch of the step, from 0 */

    rt_event stepped;  /* the parameters have changed: a step, or an import */
    size_t stale;      /* dp: the root has parameters of units from this one on that the others lack */
    rt_event *arrived; /* dp: [units] */
} dist;

/* A strategy: what happens around each unit. pre_forward gives the unit's parameters, pre_backward where its
 * gradient goes; both are ready for the compute stream when the hook returns. */
typedef struct dist_strategy {
    const char *name;
    dist_reduction reduction; /* the default */
    int (*open)(dist *d, error_text *e);
    rt_block (*pre_forward)(dist *d, size_t u);
    void (*post_forward)(dist *d, size_t u);
    rt_block (*pre_backward)(dist *d, size_t u);
    void (*post_backward)(dist *d, size_t u);
    void (*step)(dist *d);
} dist_strategy;

/* NULL: no such strategy. */
const dist_strategy *dist_strategy_named(const char *name);

/* -------------------------------------------------------------------------------------- the training loop */

/* Allocates all that the rank needs for training; nothing is allocated later. The model must outlive it. -1:
 * e says why (impossible options), or the world has failed (out of memory). */
int dist_open(dist *d, dist_comm *comm, const vit_model *model, const dist_options *options, error_text *e);
void dist_close(dist *d);

/* Parameters of unit u, whole, without the padding between ranks, in host memory [unit->count]: takes this
 * rank's part of them; gives it (and leaves the rest of `values` alone). */
void dist_import(dist *d, size_t u, const float *values);
void dist_export(dist *d, size_t u, float *values);

typedef struct dist_result {
    double loss;          /* mean over the global batch, before the update */
    double gradient_norm; /* of the mean loss, before clipping */
    size_t
        bad_losses; /* samples whose loss is not finite; then, and if the norm is not, nothing was updated */
} dist_result;

/* One optimizer step: begin (t from 1), `accumulation` micro-batches, end. Images [B, C, height, width] in
 * the model's type, labels [B], keys [B] of the samples' own randomness. */
void dist_begin_step(dist *d, size_t t, double learning_rate);
void dist_micro_batch(dist *d, size_t micro, const void *images, const int32_t *labels, const uint64_t *keys);
void dist_end_step(dist *d, dist_result *result);

/* Forward alone, as in evaluation; every rank must call it. logits [B, V], losses [B] into host memory, or
 * NULL. With not_finite: the index of the first unit whose output has a NaN or an infinity, or the number of
 * units. */
void dist_forward(dist *d, const void *images, const int32_t *labels, float *logits, float *losses,
                  size_t *not_finite);

/* Sums n integers over all ranks, in place; every rank must call it. */
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

/* Elements of the full logical payload. */
static size_t dist__elements(const dist_call *c) {
    return c->in.count > c->out.count ? c->in.count : c->out.count;
}

static rt_type dist__type(const dist_call *c) { return c->in.data ? c->in.type : c->out.type; }

static double dist__wire_bytes(const dist_comm *comm, const dist_call *c) {
    double n = comm->size, bytes = (double)dist__elements(c) * (double)rt_type_size(dist__type(c));
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
    if (comm->rank->rank == dist_test_skip_rank && comm->waits++ == dist_test_skip_wait) return;
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
    size_t n = (size_t)comm->size, whole = dist__elements(call);
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
    if (comm->observe) comm->observe(comm->observer, call);
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

struct dist_hub {
    rt_world *world;
    int size;
    dist__meeting meeting[DIST_RING]; /* under world->lock, like all that follows */
    int *room;                        /* [size]: a meeting has closed since the rank found them all open */
    double last_end;                  /* virtual time at which the last launch ended */
};

static void dist__left(void *transport, rt_rank *rank);

dist_hub *dist_hub_create(rt_world *world) {
    dist_hub *hub = calloc(1, sizeof *hub);
    if (!hub) return NULL;
    *hub = (dist_hub){.world = world, .size = world->size};
    int failed = !(hub->room = calloc((size_t)world->size, sizeof *hub->room));
    for (int i = 0; i < DIST_RING; i++)
        failed |= !(hub->meeting[i].part = calloc((size_t)world->size, sizeof(dist__part)));
    if (failed) {
        dist_hub_free(hub);
        return NULL;
    }
    world->transport = hub;
    world->on_leave = dist__left;
    return hub;
}

void dist_hub_free(dist_hub *hub) {
    if (!hub) return;
    for (int i = 0; i < DIST_RING; i++) free(hub->meeting[i].part);
    free(hub->room);
    hub->world->transport = NULL;
    hub->world->on_leave = NULL;
    free(hub);
}

static int dist__expects(const dist__meeting *m, int rank) {
    return !m->pair || rank == m->from || rank == m->to;
}

static int dist__expected(const dist_hub *hub, const dist__meeting *m) { return m->pair ? 2 : hub->size; }

/* A rank that has returned can no longer come to the meetings that wait for it. */
static void dist__check_left(const dist__meeting *m, rt_rank *rank) {
    if (!m->open || !dist__expects(m, rank->rank) || m->part[rank->rank].rank) return;
    const dist_call *c = &m->part[m->first].call[0];
    rt_fail_with_table(rank, "rank %d left while rank %d waits for it in %s %llu (%s)", rank->rank, m->first,
                       dist_op_name(c->op), (unsigned long long)m->sequence, c->unit);
}

static void dist__left(void *transport, rt_rank *rank) {
    dist_hub *hub = transport;
    for (int i = 0; i < DIST_RING; i++) dist__check_left(&hub->meeting[i], rank);
}

/* The meeting that this launch belongs to, opened if this rank is the first; NULL: the world has failed. */
static dist__meeting *dist__meet(dist_hub *hub, dist_comm *comm, const dist_call *c, uint64_t sequence) {
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
            memset(part, 0, (size_t)hub->size * sizeof *part);
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
    return (rt_note){communicator, dist_op_name(c->op), c->unit, p->sequence, dist__elements(c)};
}

/* What two ranks disagree on, and in which call of the launch; NULL: they agree. */
static const char *dist__difference(const dist__meeting *m, const dist__part *a, const dist__part *b,
                                    size_t *call) {
    for (size_t i = 0; i < a->calls && i < b->calls; i++) {
        const dist_call *x = &a->call[i], *y = &b->call[i];
        *call = i;
        if (!m->pair && x->op != y->op) return "operation";
        if (strcmp(x->unit, y->unit)) return "unit";
        if (dist__elements(x) != dist__elements(y)) return "count";
        if (dist__type(x) != dist__type(y)) return "type";
        if (!m->pair && x->peer != y->peer) return "root";
    }
    return a->calls == b->calls ? NULL : "number of calls";
}

/* One call of a complete meeting, for all its ranks: everything is a sum of some blocks into some others. */
static void dist__execute(dist_hub *hub, dist__meeting *m, size_t i, const dist_comm *comm) {
    size_t n = (size_t)hub->size, n_from = 0, n_to = 0;
    rt_block from[n], to[n];
    const dist_call *c = &m->part[m->first].call[i];
    rt_stream *s = &comm->rank->stream[RT_COMMUNICATION];
    size_t k = dist__elements(c) / n;
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

static void dist__local_post(dist_comm *comm, const dist_call *calls, size_t n) {
    dist_hub *hub = comm->shared;
    rt_rank *rank = comm->rank;
    rt_stream *s = &rank->stream[calls[0].stream];
    int pair = calls[0].op == DIST_SEND || calls[0].op == DIST_RECV;
    uint64_t *counter =
        pair ? &comm->pair_sequence[2 * calls[0].peer + (calls[0].op == DIST_RECV)] : &comm->sequence;
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
    *part = (dist__part){.rank = rank, .calls = n, .sequence = (*counter)++};
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
        for (int r = 0; r < hub->size;
             r++) /* show what each brought to this meeting, not what it posted since */
            if (m->part[r].rank) m->part[r].rank->last = dist__note(comm->name, &m->part[r], at);
        const dist_call *x = &first->call[at], *y = &calls[at];
        rt_fail_with_table(rank,
                           "ranks %d and %d disagree on the %s of launch %llu of communicator %s: %s of %zu "
                           "(%s) against %s of %zu (%s)",
                           m->first, comm->index, difference, (unsigned long long)m->sequence, comm->name,
                           dist_op_name(x->op), dist__elements(x), x->unit, dist_op_name(y->op),
                           dist__elements(y), y->unit);
    }
    for (int r = 0; r < hub->size; r++)
        if (hub->world->ranks[r].left) dist__check_left(m, &hub->world->ranks[r]);
    if (++m->arrived == dist__expected(hub, m) &&
        !rt_failed(rank)) { /* the last to arrive executes it for all */
        rank->world->executing++;
        pthread_mutex_unlock(&rank->world->lock);
        double start = rt_seconds();
        for (size_t i = 0; i < n; i++) dist__execute(hub, m, i, comm);
        double seconds = rt_seconds() - start;
        rank->communication_s += seconds;
        pthread_mutex_lock(&rank->world->lock);
        rank->world->executing--;
        double begin = hub->last_end;
        for (int r = 0; r < hub->size; r++)
            if (m->part[r].rank && begin < m->part[r].ready) begin = m->part[r].ready;
        hub->last_end = begin + seconds;
        for (int r = 0; r < hub->size; r++)
            for (size_t i = 0; i < m->part[r].calls; i++) {
                m->part[r].call[i].done->time = hub->last_end;
                m->part[r].call[i].done->done = 1;
            }
        m->open = 0;
        for (int r = 0; r < hub->size; r++) hub->room[r] = 1;
        pthread_cond_broadcast(&rank->world->changed);
    }
    pthread_mutex_unlock(&rank->world->lock);
}

static const dist_transport dist__local = {"local", dist__local_post};

int dist_comm_open(dist_comm *comm, dist_hub *hub, rt_rank *rank, const vit_device *device) {
    *comm = (dist_comm){.name = "world",
                        .rank = rank,
                        .index = rank->rank,
                        .size = hub->size,
                        .transport = &dist__local,
                        .device = device,
                        .shared = hub};
    comm->pair_sequence = calloc(2 * (size_t)hub->size, sizeof *comm->pair_sequence);
    return comm->pair_sequence ? 0 : rt_fail(rank, "rank %d: out of memory", rank->rank);
}

void dist_comm_close(dist_comm *comm) {
    if (comm->rank) rt_drain(comm->rank);
    free(comm->pair_sequence);
    *comm = (dist_comm){0};
}

/* ---------------------------------------------------------------------------- what strategies are made of */

/* Units first .. last of a flat buffer that begins with unit `base`, as one block. */
static rt_block dist__units(const dist *d, rt_block flat, size_t base, size_t first, size_t last) {
    rt_block b = rt_slice(flat, d->offset[first] - d->offset[base], d->offset[last + 1] - d->offset[first]);
    b.track = flat.track + (first - base);
    b.tracks = last - first + 1;
    return b;
}

static rt_block dist__params(const dist *d, size_t u) { return dist__units(d, d->params, 0, u, u); }

static rt_block dist__grads(const dist *d, size_t first, size_t last) {
    return dist__units(d, d->grads, d->first_trained, first, last);
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
        if (u > d->first_trained && (double)(count * rt_type_size(d->model->type)) < limit * (1 << 20))
            continue;
        d->buckets++;
        last = u - 1;
    }
    return 0;
}

/* Gradients of later micro-batches need a place of their own: backward overwrites. Summed over ranks at the
 * last micro-batch: one slot of the largest unit. At every one: two of the largest bucket, used in turn. */
static int dist__alloc_slots(dist *d) {
    size_t largest = 0, every = d->options.reduction == DIST_REDUCE_EVERY;
    if (d->options.accumulation < 2) return 0;
    for (size_t b = 0; every && b < d->buckets; b++)
        if (largest < d->bucket[b].count) largest = d->bucket[b].count;
    for (size_t u = d->first_trained; !every && u < d->model->units; u++)
        if (largest < d->offset[u + 1] - d->offset[u]) largest = d->offset[u + 1] - d->offset[u];
    for (size_t i = 0; i <= every; i++)
        d->slot[i] =
            rt_alloc(d->rank, every ? RT_COMMUNICATION_BUFFERS : RT_GRADIENTS, d->model->type, largest, 1);
    return rt_failed(d->rank) ? -1 : 0;
}

/* The slots are used in turn throughout a step: the one that is used again is always the older one. */
static size_t dist__slot(const dist *d, size_t bucket) { return (d->micro * d->buckets + bucket) % 2; }

/* Adds to the gradient what the ranks have summed in a slot. (A rank that gets no sum only waits for its
 * slot.) */
static void dist__collect(dist *d, size_t slot) {
    dist_bucket *b = d->owed[slot];
    if (!b) return;
    dist__wait(d->comm, RT_COMPUTE, &d->slot_reduced[slot]);
    if (d->shard[b->first].hi > 0)
        vit_add(&d->context, dist__grads(d, b->first, b->last), rt_slice(d->slot[slot], 0, b->count));
    d->owed[slot] = NULL;
}

/* Where unit u's backward writes its gradient: of the first micro-batch into the gradient itself, else into a
 * slot. */
static rt_block dist__gradient_target(dist *d, size_t u) {
    const dist_bucket *b = &d->bucket[d->bucket_of[u]];
    const vit_unit *unit = &d->model->unit[u];
    size_t count = d->offset[u + 1] - d->offset[u];
    if (d->micro == 0) return dist__grads(d, u, u);
    rt_block target = rt_slice(d->slot[0], 0, count);
    if (d->options.reduction == DIST_REDUCE_EVERY) {
        size_t slot = dist__slot(d, d->bucket_of[u]);
        if (u == b->last) dist__collect(d, slot);
        target = rt_slice(d->slot[slot], d->offset[u] - b->offset, count);
    }
    for (size_t t = 0; t < unit->tensors; t++) { /* padding that another unit may have written */
        size_t end = unit->tensor[t].offset + unit->tensor[t].count;
        size_t next = t + 1 < unit->tensors ? unit->tensor[t + 1].offset : count;
        if (end < next) vit_fill_zero(&d->context, rt_slice(target, end, next - end));
    }
    return target;
}

/* Adds to unit u's gradient that of a later micro-batch, which no rank has summed yet. */
static void dist__accumulate(dist *d, size_t u) {
    rt_block g = dist__grads(d, u, u);
    vit_add(&d->context, g, rt_slice(d->slot[0], 0, g.count));
}

/* Unit u's gradient is there: adds it to those of earlier micro-batches and, when its bucket is full, lets
 * the ranks sum it (op: all-reduce, or reduce to rank 0). */
static void dist__reduce_gradient(dist *d, size_t u, dist_op op) {
    size_t index = d->bucket_of[u], slot = dist__slot(d, index);
    dist_bucket *b = &d->bucket[index];
    int every = d->options.reduction == DIST_REDUCE_EVERY, later = d->micro > 0;
    if (later && !every) dist__accumulate(d, u);
    if (u != b->first || (!every && d->micro + 1 < d->options.accumulation)) return;
    rt_block g = dist__grads(d, b->first, b->last);
    rt_event *reduced = &b->reduced;
    if (later && every) {
        g = rt_slice(d->slot[slot], 0, b->count);
        d->owed[slot] = b;
        reduced = &d->slot_reduced[slot];
    }
    rt_record(d->rank, RT_COMPUTE, &b->ready);
    rt_block out = op == DIST_REDUCE && d->comm->index ? (rt_block){0} : g;
    dist__collective(d, op, g, out, d->model->unit[u].name, &b->ready, reduced);
}

/* After the last micro-batch: the gradient is complete for the compute stream. */
static void dist__finish_gradient(dist *d) {
    if (d->options.reduction == DIST_REDUCE_EVERY && d->options.accumulation > 1) {
        dist__collect(d, dist__slot(d, d->buckets)); /* the older of the last two buckets */
        dist__collect(d, dist__slot(d, d->buckets + 1));
    } else {
        dist__wait(d->comm, RT_COMPUTE,
                   &d->bucket[d->buckets - 1].reduced); /* the stream's last: it implies the others */
    }
}

enum { DIST__LOSS, DIST__BAD_LOSSES, DIST__NORM = 2, DIST__CONTROL = DIST__NORM + VIT_NORM_COUNTERS };

/* Updates what this rank owns of elements [begin, end) of a unit, at the learning rate of a layer: with layer
 * decay that of the layers below falls geometrically (timm's param_groups_layer_decay, after BEiT). */
static void dist__optimize(dist *d, const vit_unit *unit, size_t begin, size_t end, size_t layer) {
    dist_shard *s = &d->shard[unit->index];
    size_t from = begin > s->lo ? begin : s->lo, to = end < s->trained ? end : s->trained;
    if (from >= to) return;
    size_t at = from - s->lo, n = to - from, decayed = unit->decayed;
    double rate = pow(d->options.layer_decay, (double)(d->model->units - 1 - layer));
    rt_block param = rt_slice(s->param, at, n), grad = rt_slice(s->grad, at, n);
    rt_block state0 = rt_slice(s->state[0], at, n);
    decayed = decayed < from ? 0 : decayed < to ? decayed - from : n;
    if (d->options.optimizer == DIST_ADAMW)
        vit_adamw(&d->context, param, state0, rt_slice(s->state[1], at, n), grad, d->scalars, decayed, rate,
                  &d->options.adamw);
    else
        vit_sgd(&d->context, param, state0, grad, d->scalars, decayed, rate, &d->options.sgd);
}

/* The update, common to all: the exact norm of what this rank owns, one small all-reduce that joins the
 * ranks' norms and losses, one factor for average, unscaling and clipping, the optimizer on the shards. */
static void dist__update(dist *d) {
    const vit_context *c = &d->context;
    rt_block counters = rt_slice(d->control, DIST__NORM, VIT_NORM_COUNTERS);
    double divisor = (double)d->comm->size * (double)d->options.accumulation * c->loss_scale;
    rt_event *ready = NULL; /* stays so without squares: the loss was there before the last gradients went */
    for (size_t u = 0; u < d->model->units; u++)
        if (d->shard[u].squares.count) {
            vit_sum_of_squares(c, counters, d->shard[u].squares);
            ready = &d->control_ready;
        }
    if (ready) rt_record(d->rank, RT_COMPUTE, ready);
    dist__collective(d, DIST_CONTROL, d->control, d->control, "step", ready, &d->control_done);
    dist__wait(d->comm, RT_COMPUTE, &d->control_done);
    vit_gradient_factor(c, d->scalars, counters, divisor, d->options.gradient_clipping);
    for (size_t u = 0; u < d->model->units; u++) {
        const vit_unit *unit = &d->model->unit[u];
        dist__optimize(d, unit, 0, unit->classifier, u);
        dist__optimize(d, unit, unit->classifier, SIZE_MAX, unit->classifier ? u - 1 : u);
    }
}

/* Full parameters and gradients on every rank, of which `owners` ranks, from 0 up, own the whole of every
 * unit: they share the work of the norm. */
static int dist__replicate(dist *d, size_t owners, double bucket_size_mb) {
    size_t n = d->model->units, me = (size_t)d->comm->index, first = d->first_trained;
    d->params = rt_alloc(d->rank, RT_PARAMETERS, d->model->type, d->offset[n], n);
    d->grads = rt_alloc(d->rank, RT_GRADIENTS, d->model->type, d->offset[n] - d->offset[first], n - first);
    d->saves = me == 0;
    for (size_t u = 0; u < n && me < owners && !rt_failed(d->rank); u++) {
        const vit_unit *unit = &d->model->unit[u];
        dist_shard *s = &d->shard[u];
        *s = (dist_shard){.hi = d->offset[u + 1] - d->offset[u], .param = dist__params(d, u)};
        if (u < first) continue;
        s->trained = unit->trainable < unit->count ? unit->trainable : s->hi;
        size_t granules = s->trained / VIT_GRANULE, begin = granules * me / owners,
               end = granules * (me + 1) / owners;
        s->grad = rt_slice(dist__grads(d, u, u), 0, s->trained);
        s->squares = rt_slice(s->grad, begin * VIT_GRANULE, (end - begin) * VIT_GRANULE);
    }
    return rt_failed(d->rank) || dist__cut_buckets(d, bucket_size_mb) || dist__alloc_slots(d) ? -1 : 0;
}

static rt_block dist__resident(dist *d, size_t u) { return dist__params(d, u); }

static void dist__nothing(dist *d, size_t u) { (void)d, (void)u; }

/* --------------------------------------------------------------------------------------- strategy: single */

static int single_open(dist *d, error_text *e) {
    if (d->comm->size > 1)
        return error_set(e, "strategy single runs on one rank, found %d; choose dp or ddp for more",
                         d->comm->size);
    d->options.reduction = DIST_REDUCE_LAST; /* nobody to sum with: both are the same */
    return dist__replicate(d, 1, 0);
}

static void single_post_backward(dist *d, size_t u) {
    if (d->micro > 0) dist__accumulate(d, u);
}

/* ------------------------------------------------------------------------------------------- strategy: dp */

/* Data parallel with a parameter server, as PyTorch's DataParallel: rank 0 alone has optimizer state. It
 * sends the parameters to all before the forward pass and gets the sum of the gradients after the backward
 * pass. (Each rank loads its own samples, so that inputs and outputs need not be scattered and gathered.) */
static int dp_open(dist *d, error_text *e) {
    (void)e;
    d->arrived = calloc(d->model->units, sizeof *d->arrived);
    if (!d->arrived) return rt_fail(d->rank, "rank %d: out of memory", d->rank->rank);
    return dist__replicate(d, 1, 0);
}

static rt_block dp_pre_forward(dist *d, size_t u) {
    int root = d->comm->index == 0;
    if (u == d->stale) { /* all at once: the later ones travel while units run */
        if (root) dist__wait(d->comm, RT_COMMUNICATION, &d->stepped);
        for (size_t v = u; v < d->model->units; v++) {
            rt_block p = dist__params(d, v), none = {0};
            dist__collective(d, DIST_BROADCAST, root ? p : none, root ? none : p, d->model->unit[v].name,
                             NULL, &d->arrived[v]);
        }
    }
    if (u >= d->stale && !root) dist__wait(d->comm, RT_COMPUTE, &d->arrived[u]);
    if (u + 1 == d->model->units) d->stale = d->model->units;
    return dist__params(d, u);
}

static void dp_post_backward(dist *d, size_t u) { dist__reduce_gradient(d, u, DIST_REDUCE); }

static void dp_step(dist *d) {
    if (d->comm->index == 0)
        dist__finish_gradient(d);
    else
        d->owed[0] = d->owed[1] = NULL; /* dist__update's collective comes after theirs: the slots are free */
    dist__update(d);
    rt_record(d->rank, RT_COMPUTE, &d->stepped);
    d->stale = d->first_trained;
}

/* ------------------------------------------------------------------------------------------ strategy: ddp */

/* Distributed data parallel (Li et al. 2020, arXiv 2006.15704): every rank has everything; the gradients of a
 * bucket of units are all-reduced while backward goes on with the units before it. */
static int ddp_open(dist *d, error_text *e) {
    (void)e;
    return dist__replicate(d, (size_t)d->comm->size, d->options.bucket_size_mb);
}

static void ddp_post_backward(dist *d, size_t u) { dist__reduce_gradient(d, u, DIST_ALL_REDUCE); }

static void ddp_step(dist *d) {
    dist__finish_gradient(d);
    dist__update(d);
}

/* ------------------------------------------------------------------------------------ table of strategies */

static const dist_strategy dist__strategies[] = {
    {"single", DIST_REDUCE_LAST, single_open, dist__resident, dist__nothing, dist__gradient_target,
     single_post_backward, dist__update},
    {"dp", DIST_REDUCE_LAST, dp_open, dp_pre_forward, dist__nothing, dist__gradient_target, dp_post_backward,
     dp_step},
    {"ddp", DIST_REDUCE_LAST, ddp_open, dist__resident, dist__nothing, dist__gradient_target,
     ddp_post_backward, ddp_step},
};

const dist_strategy *dist_strategy_named(const char *name) {
    for (size_t i = 0; i < sizeof dist__strategies / sizeof *dist__strategies; i++)
        if (!strcmp(name, dist__strategies[i].name)) return &dist__strategies[i];
    return NULL;
}

/* -------------------------------------------------------------------------------------- the training loop */

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
    if (options->inference) d->first_trained = n;
    while (d->first_trained < n && model->unit[d->first_trained].trainable == 0) d->first_trained++;
    if (d->strategy->open(d, e)) return -1;
    for (size_t u = 0; u < n; u++)
        for (int i = 0; i < (options->optimizer == DIST_ADAMW ? 2 : 1); i++)
            if (d->shard[u].lo < d->shard[u].trained)
                d->shard[u].state[i] =
                    rt_alloc(rank, RT_OPTIMIZER, model->type, d->shard[u].trained - d->shard[u].lo, 1);
    d->scalars = rt_alloc(rank, RT_WORKSPACE, RT_FP64, VIT_SCALARS, 1);
    d->control = rt_alloc(rank, RT_COMMUNICATION_BUFFERS, RT_I64, DIST__CONTROL, 1);
    d->counts = rt_alloc(rank, RT_COMMUNICATION_BUFFERS, RT_I64, options->counts, 1);
    if (rt_failed(rank) || vit_activations_init(&d->activations, rank, d->device, model, options->batch_size,
                                                options->inference))
        return -1;
    d->context = (vit_context){.rank = rank,
                               .stream = RT_COMPUTE,
                               .device = d->device,
                               .model = model,
                               .batch = &d->activations.batch,
                               .B = options->batch_size,
                               .loss_scale = 1,
                               .losses = d->activations.losses,
                               .workspace = d->activations.workspace};
    return 0;
}

void dist_close(dist *d) {
    rt_event end;
    if (d->rank) rt_record(d->rank, RT_COMMUNICATION, &end); /* slower ranks may need what this one posted */
    for (size_t u = 0; d->shard && u < d->model->units; u++)
        for (int i = 0; i < 2; i++) rt_free(d->rank, RT_OPTIMIZER, &d->shard[u].state[i]);
    rt_category slots = d->options.reduction == DIST_REDUCE_EVERY ? RT_COMMUNICATION_BUFFERS : RT_GRADIENTS;
    for (int i = 0; i < 2; i++) rt_free(d->rank, slots, &d->slot[i]);
    rt_free(d->rank, RT_PARAMETERS, &d->params);
    rt_free(d->rank, RT_GRADIENTS, &d->grads);
    rt_free(d->rank, RT_WORKSPACE, &d->scalars);
    rt_free(d->rank, RT_COMMUNICATION_BUFFERS, &d->control);
    rt_free(d->rank, RT_COMMUNICATION_BUFFERS, &d->counts);
    if (d->activations.out) vit_activations_free(&d->activations, d->rank, d->model);
    free(d->offset);
    free(d->shard);
    free(d->bucket);
    free(d->bucket_of);
    free(d->arrived);
    *d = (dist){0};
}

/* The part of the unit's own elements (without padding between ranks) that the shard holds. */
static size_t dist__held(const dist *d, size_t u) {
    size_t lo = d->shard[u].lo, hi = d->shard[u].hi, count = d->model->unit[u].count;
    return hi < count ? hi - lo : count > lo ? count - lo : 0;
}

void dist_import(dist *d, size_t u, const float *values) {
    size_t held = dist__held(d, u);
    if (held) vit_copy_in(&d->context, rt_slice(d->shard[u].param, 0, held), values + d->shard[u].lo);
    rt_record(d->rank, RT_COMPUTE, &d->stepped);
    d->stale = 0;
}

void dist_export(dist *d, size_t u, float *values) {
    size_t held = dist__held(d, u);
    if (held) vit_copy_out(&d->context, values + d->shard[u].lo, rt_slice(d->shard[u].param, 0, held));
}

static void dist__load_batch(dist *d, const void *images, const int32_t *labels, const uint64_t *keys) {
    vit_copy_in(&d->context, d->activations.batch.images, images);
    vit_copy_in(&d->context, d->activations.batch.labels, labels);
    if (keys) vit_copy_in(&d->context, d->activations.batch.sample_keys, keys);
}

static void dist__forward_unit(dist *d, size_t u) {
    vit_activations *a = &d->activations;
    rt_block params = d->strategy->pre_forward(d, u);
    vit_unit_forward(&d->context, &d->model->unit[u], params, u ? a->out[u - 1] : (rt_block){0}, a->out[u],
                     a->saved[u]);
    d->strategy->post_forward(d, u);
}

static void dist__backward_unit(dist *d, size_t u) {
    vit_activations *a = &d->activations;
    rt_block grads = d->strategy->pre_backward(d, u);
    vit_unit_backward(&d->context, &d->model->unit[u], dist__params(d, u), grads,
                      u ? a->out[u - 1] : (rt_block){0}, a->saved[u], a->gradient[(u + 1) % 2],
                      u > d->first_trained ? a->gradient[u % 2] : (rt_block){0});
    d->strategy->post_backward(d, u);
}

void dist_begin_step(dist *d, size_t t, double learning_rate) {
    const vit_adamw_options *o = &d->options.adamw;
    double scalars[VIT_SCALARS] = {[VIT_LEARNING_RATE] = learning_rate,
                                   [VIT_BIAS_CORRECTION1] = 1 - pow(o->beta1, (double)t),
                                   [VIT_BIAS_CORRECTION2] = 1 - pow(o->beta2, (double)t)};
    vit_copy_in(&d->context, d->scalars, scalars);
    vit_fill_zero(&d->context, d->control);
}

void dist_micro_batch(dist *d, size_t micro, const void *images, const int32_t *labels,
                      const uint64_t *keys) {
    d->micro = micro;
    d->context.training = 1;
    dist__load_batch(d, images, labels, keys);
    for (size_t u = 0; u < d->model->units; u++) dist__forward_unit(d, u);
    vit_loss_accumulate(&d->context, rt_slice(d->control, DIST__LOSS, 2));
    for (size_t u = d->model->units; u-- > d->first_trained;) dist__backward_unit(d, u);
}

void dist_end_step(dist *d, dist_result *result) {
    double scalars[VIT_SCALARS] = {0};
    int64_t loss[2] = {0};
    d->strategy->step(d);
    vit_copy_out(&d->context, scalars, d->scalars);
    vit_copy_out(&d->context, loss, rt_slice(d->control, DIST__LOSS, 2));
    *result = (dist_result){(double)loss[0] * VIT_LOSS_UNIT /
                                ((double)d->comm->size * (double)d->options.accumulation),
                            scalars[VIT_GRADIENT_NORM], (size_t)loss[1]};
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
        vit_fill_zero(&d->context, d->control);
        vit_sum_of_squares(&d->context, rt_slice(d->control, DIST__NORM, VIT_NORM_COUNTERS),
                           d->activations.out[u]);
        vit_copy_out(&d->context, &bad, rt_slice(d->control, DIST__NORM + VIT_NORM_NOT_FINITE, 1));
        if (bad) *not_finite = u;
    }
    if (logits) vit_copy_out(&d->context, logits, d->activations.out[d->model->units - 1]);
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
