/* runtime.h - what stands below the operations: ranks, streams, events, clocks, the memory ledger and the
 * happens-before checker. It knows no model, no strategy and no device.
 *
 *     static int body(rt_rank *rank, void *argument) { ...; return 0; }
 *     ...
 *     rt_world world;
 *     rt_world_init(&world, 4, RT_CHECK);           // four ranks, checker on
 *     if (rt_run(&world, body, &argument)) fprintf(stderr, "%s\n%s", world.error.text, world.table);
 *     rt_world_free(&world);
 *
 * Contents: types and blocks, streams and events, ledger, ranks and worlds, operations.
 * In one source file: #define RUNTIME_IMPLEMENTATION before the include (vit.h does it for you).
 *
 * Ranks are threads of one process. A rank has a host (the thread itself) and streams, ordered queues of work
 * as in CUDA. On a CPU an operation has run when its call returns; only collectives complete later. Streams
 * still matter: they carry the virtual clocks that give a timeline (an operation starts at the latest of its
 * stream's end, the host's time and the events waited for), and the vector clocks by which the checker proves
 * that the program would be correct if streams ran side by side, as they do on a GPU.
 *
 * Threads: all of an rt_rank belongs to its own thread, except what the comments put under world->lock.
 */
#ifndef RUNTIME_H
#define RUNTIME_H

#include "base.h"
#include <pthread.h>
#ifdef __cplusplus /* vit_cuda.cu, which includes <atomic> first */
using std::atomic_int;
using std::atomic_load_explicit;
using std::memory_order_relaxed;
#else
#include <stdatomic.h>
#endif

/* --------------------------------------------------------------------------------------- types and blocks */

typedef enum { RT_U8, RT_I32, RT_I64, RT_U64, RT_FP16, RT_BF16, RT_FP32, RT_FP64 } rt_type;

/* Bytes of one element. */
size_t rt_type_size(rt_type type);

/* n numbers of type bf16 or fp16 as floats, and n floats rounded to that type: to nearest, ties to even,
 * what is too large to infinity; a NaN stays one. Subnormal numbers are as good as others. */
void rt_widen(float *to, const uint16_t *from, size_t n, rt_type type);
void rt_narrow(uint16_t *to, const float *from, size_t n, rt_type type);

/* Streams of a rank. The host counts as one: what it does happens before all that it launches later. */
enum { RT_HOST, RT_COMPUTE, RT_COMMUNICATION, RT_COPY, RT_STREAMS };

/* The checker's memory of one piece of memory: who wrote it last, and when each stream last read it. Times
 * are positions in the history of a stream. */
typedef struct {
    uint64_t write_time, read_time[RT_STREAMS];
    int writer;
    const char *write_op, *read_op[RT_STREAMS];
} rt_track;

/* A typed run of memory, or a part of one. `data` may be NULL: an absent optional argument. A block that
 * spans several tracked pieces (a bucket of units, say) names them all: track[0 .. tracks). */
typedef struct {
    void *data;
    rt_type type;
    size_t count; /* elements, not bytes */
    rt_track *track;
    size_t tracks;
} rt_block;

/* Elements [offset, offset + count) of a block. The checker takes the part for the whole. */
rt_block rt_slice(rt_block block, size_t offset, size_t count);

/* ------------------------------------------------------------------------------------- streams and events */

/* A point in a stream's history. A collective's event is pending until the last rank has posted its part. */
typedef struct rt_event {
    double time;                /* virtual seconds */
    uint64_t clock[RT_STREAMS]; /* what has happened before it */
    int recorded;               /* 0: never used; waiting for it is no wait */
    int done;                   /* under world->lock while a collective is to complete it */
    void *device;               /* the same point for a device that runs behind the host: its own event */
} rt_event;

typedef struct rt_stream {
    struct rt_rank *rank;
    double time; /* virtual seconds at which its last operation ends */
    uint64_t clock[RT_STREAMS];
    rt_event *tail; /* the last collective posted on it, if that may still be pending */
    void *device;   /* the device's own stream, or NULL */
} rt_stream;

/* Marks the present end of a stream in the event. */
void rt_record(struct rt_rank *rank, int stream, rt_event *event);

/* What comes later on the stream happens after the event. Blocks the host while the event is pending. */
void rt_wait(struct rt_rank *rank, int stream, rt_event *event);

/* ------------------------------------------------------------------------------------------------- ledger */

typedef enum {
    RT_PARAMETERS,
    RT_GRADIENTS,
    RT_OPTIMIZER,
    RT_ACTIVATIONS,
    RT_COMMUNICATION_BUFFERS,
    RT_WORKSPACE,
    RT_HOST_MEMORY, /* not the device's, as all before it; the totals leave it out */
    RT_CATEGORIES
} rt_category;

/* "parameters", ..., "workspace", "host". */
const char *rt_category_name(rt_category category);

typedef struct {
    size_t bytes[RT_CATEGORIES], peak_bytes[RT_CATEGORIES], total_bytes, total_peak_bytes;
    size_t allocations; /* made so far: a device may round each one up */
} rt_ledger;

/* A zeroed block of device memory (RT_HOST_MEMORY: of host memory that both the host and the device's copies
 * reach) that the ledger counts, with `tracks` pieces for the checker (at least 1).
 * A block without data and a failed world, with the ledger as its table, when the device has no more. */
rt_block rt_alloc(struct rt_rank *rank, rt_category category, rt_type type, size_t count, size_t tracks);

/* Gives back what rt_alloc gave (the block itself, not a slice of it). No collective may be pending on it,
 * unless the world has failed. */
void rt_free(struct rt_rank *rank, rt_category category, rt_block *block);

/* --------------------------------------------------------------------------------------- ranks and worlds */

/* What a rank posted last; the table that explains a failure shows it for every rank. */
typedef struct {
    const char *communicator, *op, *unit;
    uint64_t sequence;
    size_t count;
} rt_note;

typedef struct rt_rank {
    int rank;       /* 0 .. world->size - 1 */
    int local_rank; /* among the ranks of this host: it chooses the device */
    struct rt_world *world;
    rt_stream stream[RT_STREAMS];
    rt_ledger ledger;
    int threads;  /* threads that this rank's operations may use */
    void *device; /* the device's own state of this rank */
    void *arena;  /* what the device has set aside for it, or NULL */
    size_t arena_size;
    void *(*allocate)(struct rt_rank *, size_t bytes); /* zeroed, 64-byte aligned; NULL: no more */
    void (*release)(struct rt_rank *, void *, size_t bytes);
    /* The same of host memory, where a device has its own; else NULL. */
    void *(*allocate_host)(struct rt_rank *, size_t bytes);
    void (*release_host)(struct rt_rank *, void *, size_t bytes);
    /* Where operations run behind the host: the same as rt_record and rt_wait on the device's own streams.
     * NULL: they have run when their call returns. record may be called by another rank's thread, too. */
    void (*record)(rt_stream *, rt_event *);
    void (*wait)(rt_stream *, rt_event *);
    double communication_s; /* wall-clock seconds spent in collectives or waiting for them */
    double flops, bytes;    /* done by its operations so far */
    double op_start;
    /* under world->lock */
    rt_note last;
    const int *waiting_for; /* blocked until this is non-zero; NULL: running */
    int left;               /* its function has returned */
} rt_rank;

/* RT_ELSEWHERE: the world has other ranks in other processes, so that no deadlock can be seen from here. */
enum { RT_CHECK = 1, RT_ELSEWHERE = 2 };

typedef struct rt_world {
    int size;
    int flags;      /* RT_CHECK: the happens-before checker is on; RT_ELSEWHERE */
    rt_rank *ranks; /* [size] */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    atomic_int failed; /* once set every operation and wait of every rank returns at once */
    int failed_rank;
    error_text error;  /* the first failure, one line */
    char *table;       /* a table that explains it, several lines, or NULL */
    int out_of_memory; /* it was a failed allocation */
    int executing;     /* ranks that execute a collective on the memory of all, under the lock */
    void *transport;   /* told when a rank leaves, with the lock held */
    void (*on_leave)(void *transport, rt_rank *rank);
} rt_world;

/* A world of `size` ranks on which nothing runs yet. flags: RT_CHECK or 0. -1: out of memory. */
int rt_world_init(rt_world *world, int size, int flags);
void rt_world_free(rt_world *world);

/* Runs body(rank, argument) as every rank, each in a thread of its own (one rank: in the caller's), and
 * returns when all have returned: 0, or -1 with world->error set. */
int rt_run(rt_world *world, int (*body)(rt_rank *rank, void *argument), void *argument);

/* Records the first failure of the world (printf style) and wakes every rank. Always returns -1. */
__attribute__((format(printf, 2, 3))) int rt_fail(rt_rank *rank, const char *format, ...);

/* Like rt_fail, with the table of what every rank posted last. Call it with the lock held. */
__attribute__((format(printf, 2, 3))) int rt_fail_with_table(rt_rank *rank, const char *format, ...);

/* Has any rank of this world failed? */
static inline int rt_failed(const rt_rank *rank) {
    return atomic_load_explicit(&rank->world->failed, memory_order_relaxed);
}

/* Blocks until *done is non-zero, with the lock held. If no rank of the world can run any more, that is a
 * deadlock: the world fails with the table. Returns 0, or -1 when the world has failed. */
int rt_block_until(rt_rank *rank, const int *done);

/* After a failure: returns when no rank executes a collective, which might use memory and events of this
 * rank. None begins any more. */
void rt_drain(rt_rank *rank);

/* Seconds of a monotonic clock. */
double rt_seconds(void);

/* --------------------------------------------------------------------------------------------- operations */

#define RT_END         SIZE_MAX /* in `tracks`: the end of a list of blocks */
#define RT_BLOCKS(...) ((const rt_block[]){__VA_ARGS__, {.tracks = RT_END}})

/* Declares an operation on a stream: what it reads and what it writes. Absent blocks may be listed. An access
 * that no event orders after the other stream's access is a race: the world fails and names both operations.
 * Returns 1: go on; 0: the world has failed, do nothing. */
int rt_begin(rt_rank *rank, int stream, const char *op, const rt_block *reads, const rt_block *writes);

/* Ends what rt_begin began: the stream's clock advances by the measured time. flops and bytes are the
 * operation's arithmetic and the least memory traffic that it needs. */
void rt_end(rt_rank *rank, int stream, double flops, double bytes);

/* The checker's part of rt_begin alone, for a collective, which runs later. */
int rt_access(rt_rank *rank, int stream, const char *op, const rt_block *reads, const rt_block *writes);

#endif /* RUNTIME_H */

/* ========================================================================================= implementation */
#ifdef RUNTIME_IMPLEMENTATION
#undef RUNTIME_IMPLEMENTATION

#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char *const rt__stream_names[RT_STREAMS] = {"host", "compute", "communication", "copy"};

size_t rt_type_size(rt_type type) {
    static const size_t sizes[] = {[RT_U8] = 1,   [RT_I32] = 4,  [RT_I64] = 8,  [RT_U64] = 8,
                                   [RT_FP16] = 2, [RT_BF16] = 2, [RT_FP32] = 4, [RT_FP64] = 8};
    return sizes[type];
}

static inline float rt__float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t rt__bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* bf16 is the upper half of an fp32. */
static inline float rt__from_bf16(uint16_t h) { return rt__float((uint32_t)h << 16); }

static inline uint16_t rt__to_bf16(float x) {
    uint32_t u = rt__bits(x), rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7FFFFFFF) > 0x7F800000 ? u >> 16 | 0x40 : rounded);
}

/* fp16 has 5 bits of exponent, biased by 15 (fp32: 8 bits, by 127), and 10 of significand. Without
 * branches, so that loops vectorise. Subnormal: a multiple of 2^-24, which subtraction of 2^-14 leaves. */
static inline float rt__from_fp16(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x7FFF) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t normal = u + (112u << 23), special = u | 0x7F800000;
    uint32_t subnormal = rt__bits(rt__float(u + (113u << 23)) - 0x1p-14f);
    uint32_t bits = u < 1u << 23 ? subnormal : normal;
    return rt__float((u >= 31u << 23 ? special : bits) | sign);
}

/* Subnormal: the sum with 0.5, whose last bit is 2^-24, rounds. */
static inline uint16_t rt__to_fp16(float x) {
    uint32_t u = rt__bits(x), a = u & 0x7FFFFFFF, sign = u >> 16 & 0x8000;
    uint32_t normal = (a - (112u << 23) + 0xFFF + (a >> 13 & 1)) >> 13;
    uint32_t subnormal = rt__bits(rt__float(a) + 0.5f) - 0x3F000000;
    uint32_t special = a > 0x7F800000 ? 0x7E00 | (a >> 13 & 0x3FF) : 0x7C00;
    uint32_t bits = a < 113u << 23 ? subnormal : normal;
    return (uint16_t)((a >= 143u << 23 ? special : bits) | sign);
}

#define RT__EACH(convert)                                                                                    \
    for (size_t i = 0; i < n; i++) to[i] = convert(from[i])
void rt_widen(float *restrict to, const uint16_t *restrict from, size_t n, rt_type type) {
    if (type == RT_BF16)
        RT__EACH(rt__from_bf16);
    else
        RT__EACH(rt__from_fp16);
}

void rt_narrow(uint16_t *restrict to, const float *restrict from, size_t n, rt_type type) {
    if (type == RT_BF16)
        RT__EACH(rt__to_bf16);
    else
        RT__EACH(rt__to_fp16);
}
#undef RT__EACH

rt_block rt_slice(rt_block block, size_t offset, size_t count) {
    if (block.data) block.data = (char *)block.data + offset * rt_type_size(block.type);
    block.count = count;
    return block;
}

double rt_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ----------------------------------------------------------------------------------------------- failures */

static int rt__fail(rt_rank *rank, const char *format, va_list arguments) { /* lock held */
    rt_world *w = rank->world;
    if (!atomic_load(&w->failed)) {
        vsnprintf(w->error.text, sizeof w->error.text, format, arguments);
        w->failed_rank = rank->rank;
        atomic_store(&w->failed, 1);
        pthread_cond_broadcast(&w->changed);
    }
    return -1;
}

int rt_fail(rt_rank *rank, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&rank->world->lock);
    rt__fail(rank, format, arguments);
    pthread_mutex_unlock(&rank->world->lock);
    va_end(arguments);
    return -1;
}

int rt_fail_with_table(rt_rank *rank, const char *format, ...) {
    rt_world *w = rank->world;
    size_t size = 128 * ((size_t)w->size + 1), used = 0;
    if (!atomic_load(&w->failed) && (w->table = malloc(size))) {
        used = (size_t)snprintf(w->table, size, "%6s %-8s %-14s %8s %-15s %12s  %s\n", "rank", "state",
                                "communicator", "sequence", "operation", "elements", "unit");
        for (int i = 0; i < w->size; i++) {
            const rt_rank *r = &w->ranks[i];
            const char *state = r->left ? "left" : r->waiting_for && !*r->waiting_for ? "waiting" : "running";
            if (r->last.op)
                used += (size_t)snprintf(w->table + used, size - used,
                                         "%6d %-8s %-14.14s %8llu %-15.15s %12zu  %.20s\n", r->rank, state,
                                         r->last.communicator, (unsigned long long)r->last.sequence,
                                         r->last.op, r->last.count, r->last.unit);
            else
                used += (size_t)snprintf(w->table + used, size - used, "%6d %-8s nothing posted\n", r->rank,
                                         state);
        }
    }
    va_list arguments;
    va_start(arguments, format);
    rt__fail(rank, format, arguments);
    va_end(arguments);
    return -1;
}

int rt_block_until(rt_rank *rank, const int *done) {
    rt_world *w = rank->world;
    double start = rt_seconds();
    rank->waiting_for = done;
    while (!*done && !atomic_load(&w->failed)) {
        int can_run = w->flags & RT_ELSEWHERE;
        for (int i = 0; i < w->size; i++) {
            const rt_rank *r = &w->ranks[i];
            can_run |= !r->left && (!r->waiting_for || *r->waiting_for);
        }
        if (!can_run)
            rt_fail_with_table(
                rank, "deadlock: every rank that is left waits for a collective that cannot complete");
        else
            pthread_cond_wait(&w->changed, &w->lock);
    }
    rank->waiting_for = NULL;
    rank->communication_s += rt_seconds() - start;
    return atomic_load(&w->failed) ? -1 : 0;
}

void rt_drain(rt_rank *rank) {
    rt_world *w = rank->world;
    if (!rt_failed(rank)) return;
    pthread_mutex_lock(&w->lock);
    while (w->executing) pthread_cond_wait(&w->changed, &w->lock);
    pthread_mutex_unlock(&w->lock);
}

/* ------------------------------------------------------------------------------------- streams and events */

static void rt__merge(uint64_t clock[RT_STREAMS], const uint64_t other[RT_STREAMS]) {
    for (int s = 0; s < RT_STREAMS; s++)
        if (clock[s] < other[s]) clock[s] = other[s];
}

/* Waits for a collective's event; the others are done when they are recorded. */
static int rt__complete(rt_rank *rank, rt_event *event) {
    pthread_mutex_lock(&rank->world->lock);
    int status = event->done ? 0 : rt_block_until(rank, &event->done);
    pthread_mutex_unlock(&rank->world->lock);
    return status;
}

/* The stream's time is known only when the last collective on it is complete. */
static int rt__settle(rt_stream *s) {
    if (!s->tail) return 0;
    if (rt__complete(s->rank, s->tail)) return -1;
    if (s->time < s->tail->time) s->time = s->tail->time;
    s->tail = NULL;
    return 0;
}

void rt_record(rt_rank *rank, int stream, rt_event *event) {
    rt_stream *s = &rank->stream[stream];
    if (rt__settle(s)) return;
    event->time = s->time;
    memcpy(event->clock, s->clock, sizeof event->clock);
    event->recorded = event->done = 1;
    if (rank->record) rank->record(s, event);
}

void rt_wait(rt_rank *rank, int stream, rt_event *event) {
    rt_stream *s = &rank->stream[stream];
    if (!event->recorded || rt__complete(rank, event)) return;
    if (s->time < event->time) s->time = event->time;
    rt__merge(s->clock, event->clock);
    if (rank->wait) rank->wait(s, event);
}

/* --------------------------------------------------------------------------------------------- operations */

static int rt__race(rt_rank *rank, int stream, const char *op, int writes, const char *other,
                    int other_stream, int other_wrote) {
    return rt_fail(
        rank, "race on rank %d: %s on the %s stream %s what %s on the %s stream %s, and no event orders them",
        rank->rank, op, rt__stream_names[stream], writes ? "writes" : "reads", other,
        rt__stream_names[other_stream], other_wrote ? "wrote" : "read");
}

static int rt__check(rt_rank *rank, int stream, const char *op, const rt_block *list, int writes) {
    const uint64_t *now = rank->stream[stream].clock;
    for (; list->tracks != RT_END; list++) {
        for (size_t i = 0; i < list->tracks; i++) {
            rt_track *t = &list->track[i];
            if (t->write_time > now[t->writer])
                return rt__race(rank, stream, op, writes, t->write_op, t->writer, 1);
            if (!writes) {
                t->read_time[stream] = now[stream];
                t->read_op[stream] = op;
                continue;
            }
            for (int s = 0; s < RT_STREAMS; s++)
                if (t->read_time[s] > now[s]) return rt__race(rank, stream, op, 1, t->read_op[s], s, 0);
            t->writer = stream;
            t->write_time = now[stream];
            t->write_op = op;
        }
    }
    return 0;
}

int rt_access(rt_rank *rank, int stream, const char *op, const rt_block *reads, const rt_block *writes) {
    if (rt_failed(rank)) return 0;
    rt_stream *s = &rank->stream[stream], *host = &rank->stream[RT_HOST];
    if (!(rank->world->flags & RT_CHECK)) return 1;
    rt__merge(s->clock, host->clock); /* what the host did before a launch happened before the operation */
    s->clock[stream]++;
    return !rt__check(rank, stream, op, reads, 0) && !rt__check(rank, stream, op, writes, 1);
}

int rt_begin(rt_rank *rank, int stream, const char *op, const rt_block *reads, const rt_block *writes) {
    if (rt__settle(&rank->stream[stream]) || !rt_access(rank, stream, op, reads, writes)) return 0;
    rank->op_start = rt_seconds();
    return 1;
}

void rt_end(rt_rank *rank, int stream, double flops, double bytes) {
    rt_stream *s = &rank->stream[stream], *host = &rank->stream[RT_HOST];
    if (s->time < host->time) s->time = host->time;
    s->time += rt_seconds() - rank->op_start;
    rank->flops += flops;
    rank->bytes += bytes;
}

/* ------------------------------------------------------------------------------------------------- ledger */

const char *rt_category_name(rt_category category) {
    static const char *const names[] = {"parameters",    "gradients", "optimizer", "activations",
                                        "communication", "workspace", "host"};
    return names[category];
}

/* The first failure of the world is that this rank gets no more memory. */
static void rt__out_of_memory(rt_rank *rank, rt_category category, size_t bytes) {
    rt_world *w = rank->world;
    const rt_ledger *l = &rank->ledger;
    pthread_mutex_lock(&w->lock);
    size_t size = 64 * (RT_CATEGORIES + 2), used = 0;
    if (!atomic_load(&w->failed) && (w->table = malloc(size))) {
        w->out_of_memory = 1;
        used = (size_t)snprintf(w->table, size, "%-16s %14s\n", "memory, bytes", "in use");
        for (int c = 0; c < RT_CATEGORIES; c++)
            used += (size_t)snprintf(w->table + used, size - used, "%-16s %14zu\n",
                                     rt_category_name((rt_category)c), l->bytes[c]);
        snprintf(w->table + used, size - used, "%-16s %14zu\n", "total", l->total_bytes);
    }
    pthread_mutex_unlock(&w->lock);
    rt_fail(rank, "rank %d: out of memory: %zu bytes more for %s, %zu in use", rank->rank, bytes,
            rt_category_name(category), l->total_bytes);
}

static void *rt__allocate(rt_rank *rank, rt_category category, size_t bytes) {
    int host = category == RT_HOST_MEMORY && rank->allocate_host;
    return (host ? rank->allocate_host : rank->allocate)(rank, bytes);
}

static void rt__release(rt_rank *rank, rt_category category, void *memory, size_t bytes) {
    int host = category == RT_HOST_MEMORY && rank->release_host;
    (host ? rank->release_host : rank->release)(rank, memory, bytes);
}

rt_block rt_alloc(rt_rank *rank, rt_category category, rt_type type, size_t count, size_t tracks) {
    rt_ledger *l = &rank->ledger;
    size_t bytes;
    if (size_multiply(count, rt_type_size(type), &bytes)) bytes = SIZE_MAX;
    rt_block b = {.type = type, .count = count, .tracks = tracks};
    b.data = bytes == SIZE_MAX ? NULL : rt__allocate(rank, category, bytes ? bytes : 1);
    b.track = calloc(tracks, sizeof *b.track);
    if (!b.data || !b.track) {
        if (b.data) rt__release(rank, category, b.data, bytes);
        free(b.track);
        rt__out_of_memory(rank, category, bytes);
        return (rt_block){.type = type};
    }
    l->bytes[category] += bytes;
    if (l->peak_bytes[category] < l->bytes[category]) l->peak_bytes[category] = l->bytes[category];
    if (category == RT_HOST_MEMORY) return b;
    l->allocations++;
    l->total_bytes += bytes;
    if (l->total_peak_bytes < l->total_bytes) l->total_peak_bytes = l->total_bytes;
    return b;
}

void rt_free(rt_rank *rank, rt_category category, rt_block *block) {
    if (!block->data) return;
    rt_drain(rank);
    size_t bytes = block->count * rt_type_size(block->type);
    rt__release(rank, category, block->data, bytes);
    free(block->track);
    rank->ledger.bytes[category] -= bytes;
    if (category != RT_HOST_MEMORY) rank->ledger.total_bytes -= bytes;
    *block = (rt_block){0};
}

/* --------------------------------------------------------------------------------------- ranks and worlds */

int rt_world_init(rt_world *world, int size, int flags) {
    *world = (rt_world){.size = size, .flags = flags, .ranks = calloc((size_t)size, sizeof(rt_rank))};
    if (!world->ranks) return -1;
    pthread_mutex_init(&world->lock, NULL);
    pthread_cond_init(&world->changed, NULL);
    for (int r = 0; r < size; r++) {
        rt_rank *rank = &world->ranks[r];
        *rank = (rt_rank){.rank = r, .local_rank = r, .world = world, .threads = 1};
        for (int s = 0; s < RT_STREAMS; s++) rank->stream[s].rank = rank;
    }
    return 0;
}

void rt_world_free(rt_world *world) {
    pthread_mutex_destroy(&world->lock);
    pthread_cond_destroy(&world->changed);
    free(world->ranks);
    free(world->table);
    *world = (rt_world){0};
}

typedef struct {
    rt_rank *rank;
    int (*body)(rt_rank *, void *);
    void *argument;
} rt__start;

static void *rt__thread(void *pointer) {
    rt__start *start = pointer;
    rt_rank *rank = start->rank;
    if (start->body(rank, start->argument)) rt_fail(rank, "rank %d failed without saying why", rank->rank);
    pthread_mutex_lock(&rank->world->lock);
    rank->left = 1;
    if (rank->world->on_leave) rank->world->on_leave(rank->world->transport, rank);
    pthread_cond_broadcast(&rank->world->changed); /* the ranks that wait look again whether anyone can run */
    pthread_mutex_unlock(&rank->world->lock);
    return NULL;
}

int rt_run(rt_world *world, int (*body)(rt_rank *, void *), void *argument) {
    rt__start *starts = calloc((size_t)world->size, sizeof *starts);
    pthread_t *threads = calloc((size_t)world->size, sizeof *threads);
    int started = 0;
    if (!starts || !threads) {
        rt_fail(&world->ranks[0], "out of memory for %d ranks", world->size);
    } else {
        for (int r = 0; r < world->size; r++) starts[r] = (rt__start){&world->ranks[r], body, argument};
        for (int r = 1; r < world->size; r++, started++)
            if (pthread_create(&threads[r], NULL, rt__thread, &starts[r])) {
                rt_fail(&world->ranks[r], "cannot start a thread for rank %d of %d", r, world->size);
                break;
            }
        rt__thread(&starts[0]); /* rank 0 is the caller's thread */
        for (int r = 1; r <= started; r++) pthread_join(threads[r], NULL);
    }
    free(starts);
    free(threads);
    return atomic_load(&world->failed) ? -1 : 0;
}

#endif /* RUNTIME_IMPLEMENTATION */
