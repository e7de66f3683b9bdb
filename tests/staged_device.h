/* staged_device.h - vit_cuda for tests whose blocks lie in host memory: every operation copies its blocks to
 * the device, runs there, and copies them back. What an operation writes beyond the end of a block is found.
 * */
#ifndef STAGED_DEVICE_H
#define STAGED_DEVICE_H

#include <stdlib.h>
#include <string.h>

#include "vit.h"

enum { STAGED_MOST = 32, STAGED_GUARD = 256 };

typedef struct {
    rt_stream *s;
    size_t n;
    struct {
        void *host;
        size_t bytes;
        rt_block device; /* [bytes + STAGED_GUARD] */
    } block[STAGED_MOST];
} stage;

/* The block in device memory; what an operation is given twice lies there once. */
static rt_block stage_in(stage *g, rt_block b) {
    size_t bytes = b.count * rt_type_size(b.type), i = 0;
    rt_rank *rank = g->s->rank;
    if (!b.data) return b;
    while (i < g->n && g->block[i].host != b.data) i++;
    assert_true(i < STAGED_MOST && (i == g->n || g->block[i].bytes == bytes));
    if (i == g->n) {
        rt_block device = {rank->allocate(rank, bytes + STAGED_GUARD), RT_U8, bytes + STAGED_GUARD, NULL, 0};
        char *copy = malloc(device.count);
        assert_true(device.data && copy);
        memcpy(copy, b.data, bytes);
        memset(copy + bytes, 0xA5, STAGED_GUARD);
        vit_cuda.copy_in(g->s, device, copy);
        free(copy);
        g->block[g->n].host = b.data;
        g->block[g->n].bytes = bytes;
        g->block[g->n++].device = device;
    }
    b.data = g->block[i].device.data;
    return b;
}

static void stage_out(stage *g) {
    rt_rank *rank = g->s->rank;
    for (size_t i = 0; i < g->n; i++) {
        size_t bytes = g->block[i].bytes;
        char *copy = malloc(bytes + STAGED_GUARD);
        assert_non_null(copy);
        vit_cuda.copy_out(g->s, copy, g->block[i].device);
        for (size_t k = 0; k < STAGED_GUARD; k++) assert_int_equal((unsigned char)copy[bytes + k], 0xA5);
        memcpy(g->block[i].host, copy, bytes);
        free(copy);
        rank->release(rank, g->block[i].device.data, bytes + STAGED_GUARD);
    }
    if (rt_failed(rank)) fail_msg("%s", rank->world->error.text);
}

#define STAGED(call)                                                                                         \
    do {                                                                                                     \
        stage g = {.s = s};                                                                                  \
        vit_cuda.call;                                                                                       \
        stage_out(&g);                                                                                       \
    } while (0)
#define IN(b) stage_in(&g, b)

static void staged_copy_in(rt_stream *s, rt_block to, const void *from) { STAGED(copy_in(s, IN(to), from)); }
static void staged_copy_out(rt_stream *s, void *to, rt_block from) { STAGED(copy_out(s, to, IN(from))); }
static void staged_linear_forward(rt_stream *s, rt_block y, rt_block pre, rt_block x, rt_block w, rt_block b,
                                  size_t rows, size_t in, size_t out, vit_gelu form) {
    STAGED(linear_forward(s, IN(y), IN(pre), IN(x), IN(w), IN(b), rows, in, out, form));
}
static void staged_linear_backward(rt_stream *s, rt_block dx, rt_block dw, rt_block db, rt_block dy,
                                   rt_block x, rt_block w, rt_block pre, size_t rows, size_t in, size_t out,
                                   vit_gelu form) {
    STAGED(linear_backward(s, IN(dx), IN(dw), IN(db), IN(dy), IN(x), IN(w), IN(pre), rows, in, out, form));
}
static void staged_layernorm_forward(rt_stream *s, rt_block y, rt_block mean, rt_block rstd, rt_block x,
                                     rt_block gamma, rt_block beta, size_t rows, size_t dim, double eps) {
    STAGED(layernorm_forward(s, IN(y), IN(mean), IN(rstd), IN(x), IN(gamma), IN(beta), rows, dim, eps));
}
static void staged_layernorm_backward(rt_stream *s, rt_block dx, rt_block dgamma, rt_block dbeta,
                                      rt_block residual, rt_block dy, rt_block x, rt_block mean,
                                      rt_block rstd, rt_block gamma, size_t B, size_t T, size_t Q,
                                      size_t dim) {
    STAGED(layernorm_backward(s, IN(dx), IN(dgamma), IN(dbeta), IN(residual), IN(dy), IN(x), IN(mean),
                              IN(rstd), IN(gamma), B, T, Q, dim));
}
static void staged_attention_forward(rt_stream *s, rt_block out, rt_block saved, rt_block qkv, size_t B,
                                     size_t T, size_t Q, size_t H, size_t head_dim) {
    STAGED(attention_forward(s, IN(out), IN(saved), IN(qkv), B, T, Q, H, head_dim));
}
static void staged_attention_backward(rt_stream *s, rt_block dqkv, rt_block dout, rt_block qkv, rt_block out,
                                      rt_block saved, size_t B, size_t T, size_t Q, size_t H,
                                      size_t head_dim) {
    STAGED(attention_backward(s, IN(dqkv), IN(dout), IN(qkv), IN(out), IN(saved), B, T, Q, H, head_dim));
}
static void staged_residual_forward(rt_stream *s, rt_block out, rt_block x, rt_block branch, rt_block keys,
                                    size_t B, size_t count, size_t x_stride, double rate, uint64_t salt) {
    STAGED(residual_forward(s, IN(out), IN(x), IN(branch), IN(keys), B, count, x_stride, rate, salt));
}
static void staged_residual_layernorm_forward(rt_stream *s, rt_block y, rt_block mean, rt_block rstd,
                                              rt_block out, rt_block x, rt_block branch, rt_block keys,
                                              rt_block gamma, rt_block beta, size_t B, size_t Q,
                                              size_t x_stride, size_t dim, double eps, double rate,
                                              uint64_t salt) {
    STAGED(residual_layernorm_forward(s, IN(y), IN(mean), IN(rstd), IN(out), IN(x), IN(branch), IN(keys),
                                      IN(gamma), IN(beta), B, Q, x_stride, dim, eps, rate, salt));
}
static void staged_residual_backward(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B,
                                     size_t count, double rate, uint64_t salt) {
    STAGED(residual_backward(s, IN(dbranch), IN(dout), IN(keys), B, count, rate, salt));
}
static void staged_patchify_forward(rt_stream *s, rt_block patches, rt_block images, size_t B, size_t C,
                                    size_t height, size_t width, size_t P) {
    STAGED(patchify_forward(s, IN(patches), IN(images), B, C, height, width, P));
}
static void staged_embedding_forward(rt_stream *s, rt_block out, rt_block x, rt_block cls, rt_block pos,
                                     size_t B, size_t N, size_t D) {
    STAGED(embedding_forward(s, IN(out), IN(x), IN(cls), IN(pos), B, N, D));
}
static void staged_embedding_backward(rt_stream *s, rt_block dx, rt_block dcls, rt_block dpos, rt_block dout,
                                      size_t B, size_t N, size_t D) {
    STAGED(embedding_backward(s, IN(dx), IN(dcls), IN(dpos), IN(dout), B, N, D));
}
static void staged_cross_entropy_forward(rt_stream *s, rt_block losses, rt_block probabilities,
                                         rt_block logits, rt_block labels, size_t B, size_t V,
                                         double smoothing) {
    STAGED(cross_entropy_forward(s, IN(losses), IN(probabilities), IN(logits), IN(labels), B, V, smoothing));
}
static void staged_cross_entropy_backward(rt_stream *s, rt_block dlogits, rt_block probabilities,
                                          rt_block labels, rt_block scalars, size_t B, size_t V,
                                          double smoothing, double scale) {
    STAGED(cross_entropy_backward(s, IN(dlogits), IN(probabilities), IN(labels), IN(scalars), B, V, smoothing,
                                  scale));
}
static void staged_loss_accumulate(rt_stream *s, rt_block total, rt_block losses, size_t B) {
    STAGED(loss_accumulate(s, IN(total), IN(losses), B));
}
static void staged_adamw(rt_stream *s, rt_block param, rt_block master, rt_block exp_avg, rt_block exp_avg_sq,
                         rt_block grad, rt_block scalars, size_t decayed, double rate,
                         const vit_adamw_options *o) {
    STAGED(adamw(s, IN(param), IN(master), IN(exp_avg), IN(exp_avg_sq), IN(grad), IN(scalars), decayed, rate,
                 o));
}
static void staged_sgd(rt_stream *s, rt_block param, rt_block master, rt_block momentum, rt_block grad,
                       rt_block scalars, size_t decayed, double rate, const vit_sgd_options *o) {
    STAGED(sgd(s, IN(param), IN(master), IN(momentum), IN(grad), IN(scalars), decayed, rate, o));
}
static void staged_sum_of_squares(rt_stream *s, rt_block counters, rt_block x) {
    STAGED(sum_of_squares(s, IN(counters), IN(x)));
}
static void staged_decide_step(rt_stream *s, rt_block scalars, rt_block scaler, rt_block counters,
                               double divisor, double clip, const vit_adamw_options *o) {
    STAGED(decide_step(s, IN(scalars), IN(scaler), IN(counters), divisor, clip, o));
}
static void staged_fill(rt_stream *s, rt_block x, int byte) { STAGED(fill(s, IN(x), byte)); }
static void staged_cast(rt_stream *s, rt_block to, rt_block from) { STAGED(cast(s, IN(to), IN(from))); }
static void staged_add(rt_stream *s, rt_block x, rt_block y) { STAGED(add(s, IN(x), IN(y))); }
static void staged_sum_buffers(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from,
                               size_t n_from) {
    stage g = {.s = s};
    rt_block there[STAGED_MOST], here[STAGED_MOST];
    for (size_t i = 0; i < n_to; i++) there[i] = IN(to[i]);
    for (size_t i = 0; i < n_from; i++) here[i] = IN(from[i]);
    vit_cuda.sum_buffers(s, there, n_to, here, n_from);
    stage_out(&g);
}

#undef STAGED
#undef IN

/* The same table with these entries in place of vit_cuda's. */
static vit_device staged_device(void) {
    vit_device d = vit_cuda;
    d.copy_in = staged_copy_in;
    d.copy_out = staged_copy_out;
    d.linear_forward = staged_linear_forward;
    d.linear_backward = staged_linear_backward;
    d.layernorm_forward = staged_layernorm_forward;
    d.layernorm_backward = staged_layernorm_backward;
    d.attention_forward = staged_attention_forward;
    d.attention_backward = staged_attention_backward;
    d.residual_forward = staged_residual_forward;
    d.residual_layernorm_forward = staged_residual_layernorm_forward;
    d.residual_backward = staged_residual_backward;
    d.patchify_forward = staged_patchify_forward;
    d.embedding_forward = staged_embedding_forward;
    d.embedding_backward = staged_embedding_backward;
    d.cross_entropy_forward = staged_cross_entropy_forward;
    d.cross_entropy_backward = staged_cross_entropy_backward;
    d.loss_accumulate = staged_loss_accumulate;
    d.adamw = staged_adamw;
    d.sgd = staged_sgd;
    d.sum_of_squares = staged_sum_of_squares;
    d.decide_step = staged_decide_step;
    d.fill = staged_fill;
    d.cast = staged_cast;
    d.add = staged_add;
    d.sum_buffers = staged_sum_buffers;
    return d;
}

#endif
