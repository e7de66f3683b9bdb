/* recording_device.h - vit_cpu that can record what is launched and replay it, as CUDA graphs do: between
 * capture and captured an operation is not run but kept, with its arguments. For one rank. */
#ifndef RECORDING_DEVICE_H
#define RECORDING_DEVICE_H

#include <stdlib.h>

#include "vit.h"

typedef struct recorded_call {
    void (*run)(struct recorded_call *);
    rt_stream *s;
    struct recorded_call *next;
} recorded_call;

typedef struct {
    recorded_call *first, **end;
    size_t calls;
} recording;

static recording *recorder;     /* NULL: operations run */
static size_t recorded_replays; /* so far */

static void recorder_add(recorded_call *c) {
    *recorder->end = c;
    recorder->end = &c->next;
    recorder->calls++;
}

static void recording_capture(rt_rank *rank) {
    (void)rank;
    recorder = calloc(1, sizeof *recorder);
    recorder->end = &recorder->first;
}

static void *recording_captured(rt_rank *rank) {
    recording *r = recorder;
    (void)rank;
    recorder = NULL;
    return r;
}

static void recording_replay(rt_rank *rank, void *graph) {
    (void)rank;
    for (recorded_call *c = ((recording *)graph)->first; c; c = c->next) c->run(c);
    recorded_replays++;
}

static void recording_forget(rt_rank *rank, void *graph) {
    (void)rank;
    for (recorded_call *c = ((recording *)graph)->first, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    free(graph);
}

/* From the list of an operation's arguments: its parameters, fields, names, and fields of a. */
#define P(type, name) , type name
#define F(type, name) type name;
#define N(type, name) , name
#define A(type, name) , a->name

#define RECORDED(op, LIST)                                                                                   \
    typedef struct {                                                                                         \
        recorded_call call;                                                                                  \
        LIST(F)                                                                                              \
    } op##_call;                                                                                             \
    static void op##_run(recorded_call *call) {                                                              \
        op##_call *a = (op##_call *)call;                                                                    \
        vit_cpu.op(call->s LIST(A));                                                                         \
    }                                                                                                        \
    static void recording_##op(rt_stream *s LIST(P)) {                                                       \
        if (!recorder) {                                                                                     \
            vit_cpu.op(s LIST(N));                                                                           \
            return;                                                                                          \
        }                                                                                                    \
        op##_call *c = malloc(sizeof *c);                                                                    \
        *c = (op##_call){{op##_run, s, NULL} LIST(N)};                                                       \
        recorder_add(&c->call);                                                                              \
    }

// clang-format off
#define LINEAR_FORWARD(X) X(rt_block, y) X(rt_block, pre) X(rt_block, x) X(rt_block, w) X(rt_block, b) \
    X(size_t, rows) X(size_t, in) X(size_t, out) X(vit_gelu, form)
#define LINEAR_BACKWARD(X) X(rt_block, dx) X(rt_block, dw) X(rt_block, db) X(rt_block, dy) X(rt_block, x) \
    X(rt_block, w) X(rt_block, pre) X(size_t, rows) X(size_t, in) X(size_t, out) X(vit_gelu, form)
#define LAYERNORM_FORWARD(X) X(rt_block, y) X(rt_block, mean) X(rt_block, rstd) X(rt_block, x) \
    X(rt_block, gamma) X(rt_block, beta) X(size_t, rows) X(size_t, dim) X(double, eps)
#define LAYERNORM_BACKWARD(X) X(rt_block, dx) X(rt_block, dgamma) X(rt_block, dbeta) X(rt_block, residual) \
    X(rt_block, dy) X(rt_block, x) X(rt_block, mean) X(rt_block, rstd) X(rt_block, gamma) \
    X(size_t, B) X(size_t, T) X(size_t, Q) X(size_t, dim)
#define ATTENTION_FORWARD(X) X(rt_block, out) X(rt_block, saved) X(rt_block, qkv) \
    X(size_t, B) X(size_t, T) X(size_t, Q) X(size_t, H) X(size_t, head_dim)
#define ATTENTION_BACKWARD(X) X(rt_block, dqkv) X(rt_block, dout) X(rt_block, qkv) X(rt_block, out) \
    X(rt_block, saved) X(size_t, B) X(size_t, T) X(size_t, Q) X(size_t, H) X(size_t, head_dim)
#define RESIDUAL_FORWARD(X) X(rt_block, out) X(rt_block, x) X(rt_block, branch) X(rt_block, keys) \
    X(size_t, B) \
    X(size_t, count) X(size_t, x_stride) X(double, rate) X(uint64_t, salt)
#define RESIDUAL_BACKWARD(X) X(rt_block, dbranch) X(rt_block, dout) X(rt_block, keys) X(size_t, B) \
    X(size_t, count) X(double, rate) X(uint64_t, salt)
#define RESIDUAL_LAYERNORM_FORWARD(X) X(rt_block, y) X(rt_block, mean) X(rt_block, rstd) X(rt_block, out) \
    X(rt_block, x) X(rt_block, branch) X(rt_block, keys) X(rt_block, gamma) X(rt_block, beta) X(size_t, B) \
    X(size_t, Q) X(size_t, x_stride) X(size_t, dim) X(double, eps) X(double, rate) X(uint64_t, salt)
#define PATCHIFY_FORWARD(X) X(rt_block, patches) X(rt_block, images) X(size_t, B) X(size_t, C) \
    X(size_t, height) X(size_t, width) X(size_t, patch)
#define EMBEDDING_FORWARD(X) X(rt_block, out) X(rt_block, x) X(rt_block, cls) X(rt_block, pos) \
    X(size_t, B) X(size_t, N_) X(size_t, D)
#define EMBEDDING_BACKWARD(X) X(rt_block, dx) X(rt_block, dcls) X(rt_block, dpos) X(rt_block, dout) \
    X(size_t, B) X(size_t, N_) X(size_t, D)
#define CROSS_ENTROPY_FORWARD(X) X(rt_block, losses) X(rt_block, probabilities) X(rt_block, logits) \
    X(rt_block, labels) X(size_t, B) X(size_t, V) X(double, smoothing)
#define CROSS_ENTROPY_BACKWARD(X) X(rt_block, dlogits) X(rt_block, probabilities) X(rt_block, labels) \
    X(rt_block, scalars) X(size_t, B) X(size_t, V) X(double, smoothing) X(double, scale)
#define LOSS_ACCUMULATE(X) X(rt_block, total) X(rt_block, losses) X(size_t, B)
#define ADAMW(X) X(rt_block, param) X(rt_block, master) X(rt_block, exp_avg) X(rt_block, exp_avg_sq) \
    X(rt_block, grad) X(rt_block, scalars) X(size_t, decayed) X(double, rate) X(const vit_adamw_options *, o)
#define SGD(X) X(rt_block, param) X(rt_block, master) X(rt_block, momentum) X(rt_block, grad) \
    X(rt_block, scalars) X(size_t, decayed) X(double, rate) X(const vit_sgd_options *, o)
#define SUM_OF_SQUARES(X) X(rt_block, counters) X(rt_block, x)
#define DECIDE_STEP(X) X(rt_block, scalars) X(rt_block, scaler) X(rt_block, counters) X(double, divisor) \
    X(double, clip) X(const vit_adamw_options *, o)
#define FILL(X) X(rt_block, x) X(int, byte)
#define CAST(X) X(rt_block, to) X(rt_block, from)
#define ADD(X) X(rt_block, x) X(rt_block, y)
RECORDED(linear_forward, LINEAR_FORWARD)
RECORDED(linear_backward, LINEAR_BACKWARD)
RECORDED(layernorm_forward, LAYERNORM_FORWARD)
RECORDED(layernorm_backward, LAYERNORM_BACKWARD)
RECORDED(attention_forward, ATTENTION_FORWARD)
RECORDED(attention_backward, ATTENTION_BACKWARD)
RECORDED(residual_forward, RESIDUAL_FORWARD)
RECORDED(residual_layernorm_forward, RESIDUAL_LAYERNORM_FORWARD)
RECORDED(residual_backward, RESIDUAL_BACKWARD)
RECORDED(patchify_forward, PATCHIFY_FORWARD)
RECORDED(embedding_forward, EMBEDDING_FORWARD)
RECORDED(embedding_backward, EMBEDDING_BACKWARD)
RECORDED(cross_entropy_forward, CROSS_ENTROPY_FORWARD)
RECORDED(cross_entropy_backward, CROSS_ENTROPY_BACKWARD)
RECORDED(loss_accumulate, LOSS_ACCUMULATE)
RECORDED(adamw, ADAMW)
RECORDED(sgd, SGD)
RECORDED(sum_of_squares, SUM_OF_SQUARES)
RECORDED(decide_step, DECIDE_STEP)
RECORDED(fill, FILL)
RECORDED(cast, CAST)
RECORDED(add, ADD)
// clang-format on

/* Of one rank: one block to one, or to none. */
typedef struct {
    recorded_call call;
    rt_block to, from;
    size_t n_to;
} sum_buffers_call;

static void sum_buffers_run(recorded_call *call) {
    sum_buffers_call *a = (sum_buffers_call *)call;
    vit_cpu.sum_buffers(call->s, &a->to, a->n_to, &a->from, 1);
}

static void recording_sum_buffers(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from,
                                  size_t n_from) {
    if (!recorder) {
        vit_cpu.sum_buffers(s, to, n_to, from, n_from);
        return;
    }
    sum_buffers_call *c = malloc(sizeof *c);
    *c = (sum_buffers_call){{sum_buffers_run, s, NULL}, n_to ? *to : (rt_block){0}, *from, n_to};
    recorder_add(&c->call);
}

/* Copies from and to the host cannot be recorded. */
static void recording_copy_in(rt_stream *s, rt_block to, const void *from) {
    if (recorder) rt_fail(s->rank, "a copy from the host in a recording");
    vit_cpu.copy_in(s, to, from);
}

static void recording_copy_out(rt_stream *s, void *to, rt_block from) {
    if (recorder) rt_fail(s->rank, "a copy to the host in a recording");
    vit_cpu.copy_out(s, to, from);
}

#undef P
#undef F
#undef N
#undef A

static vit_device recording_device(void) {
    vit_device d = vit_cpu;
    d.copy_in = recording_copy_in;
    d.copy_out = recording_copy_out;
    d.linear_forward = recording_linear_forward;
    d.linear_backward = recording_linear_backward;
    d.layernorm_forward = recording_layernorm_forward;
    d.layernorm_backward = recording_layernorm_backward;
    d.attention_forward = recording_attention_forward;
    d.attention_backward = recording_attention_backward;
    d.residual_forward = recording_residual_forward;
    d.residual_layernorm_forward = recording_residual_layernorm_forward;
    d.residual_backward = recording_residual_backward;
    d.patchify_forward = recording_patchify_forward;
    d.embedding_forward = recording_embedding_forward;
    d.embedding_backward = recording_embedding_backward;
    d.cross_entropy_forward = recording_cross_entropy_forward;
    d.cross_entropy_backward = recording_cross_entropy_backward;
    d.loss_accumulate = recording_loss_accumulate;
    d.adamw = recording_adamw;
    d.sgd = recording_sgd;
    d.sum_of_squares = recording_sum_of_squares;
    d.decide_step = recording_decide_step;
    d.fill = recording_fill;
    d.cast = recording_cast;
    d.add = recording_add;
    d.sum_buffers = recording_sum_buffers;
    d.capture = recording_capture;
    d.captured = recording_captured;
    d.replay = recording_replay;
    d.forget = recording_forget;
    return d;
}

#endif
