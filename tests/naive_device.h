/* naive_device.h - every operation of the device table in its plainest form, the oracle of the tests.
 *
 *     #include "vit.h"
 *     #include "naive_device.h"       // const vit_device naive_fp32, naive_fp64
 *     vit_open(&vit, &config, &naive_fp64, RT_FP64, 2, &e);
 *
 * The operations stand here once and are compiled twice, for float and for double: this file includes itself.
 * In naive_fp64 all that has the model's type, or "at least fp32", is RT_FP64: with rounding errors so small
 * backward can be held against difference quotients of forward, and fast devices against both.
 *
 * Every loop runs in the order in which the formula is read, on one thread; erf, exp and log are libm's, in
 * double. A backward quotes the forward line that it differentiates. A block is called x_, its elements x.
 */
#ifndef REAL

#include "vit.h"
#include <stdlib.h>
#include <string.h>

/* u of GELU's second form: sqrt(2 / pi) * (x + 0.044715 * x^3), and its derivative */
static double naive_u(double x) { return M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x); }
static double naive_u_derivative(double x) { return M_2_SQRTPI * M_SQRT1_2 * (1 + 3 * 0.044715 * x * x); }

/* gelu(x) = x * P(N(0, 1) <= x), or x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 * u)). erfc and exp keep the
 * lower tail, where 1 + erf and 1 + tanh would cancel. */
static double naive_gelu(vit_gelu form, double x) {
    if (form == VIT_GELU_TANH) return x / (1 + exp(-2 * naive_u(x)));
    return 0.5 * x * erfc(-x * M_SQRT1_2);
}

/* gelu'(x) = P(N(0, 1) <= x) + x * density(x), or (1 + tanh(u)) / 2 + x / 2 * u' / cosh(u)^2. */
static double naive_gelu_derivative(vit_gelu form, double x) {
    if (form == VIT_GELU_TANH) {
        double u = naive_u(x), c = cosh(u);
        return 1 / (1 + exp(-2 * u)) + 0.5 * x * naive_u_derivative(x) / (c * c);
    }
    return 0.5 * erfc(-x * M_SQRT1_2) + x * exp(-0.5 * x * x) * (0.5 * M_2_SQRTPI * M_SQRT1_2);
}

static void *naive_allocate(rt_rank *rank, size_t bytes) {
    (void)rank;
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    return memory ? memset(memory, 0, bytes) : NULL;
}

static void naive_release(rt_rank *rank, void *memory, size_t bytes) {
    (void)rank, (void)bytes;
    free(memory);
}

static int naive_open(rt_rank *rank, error_text *e) {
    (void)e;
    rank->allocate = naive_allocate;
    rank->release = naive_release;
    return 0;
}

static void naive_close(rt_rank *rank) { (void)rank; }

/* 1 without drop-path: then there may be no keys. */
static double naive_branch_factor(rt_block keys, size_t b, double rate, uint64_t salt) {
    return rate > 0 ? vit_drop_path_factor(((const uint64_t *)keys.data)[b], salt, rate) : 1.0;
}

static double naive_target(const int32_t *labels, size_t b, size_t v, size_t V, double smoothing) {
    return (1 - smoothing) * (labels[b] == (int32_t)v) + smoothing / (double)V;
}

#define REAL  float
#define NAIVE naive_fp32
#include "naive_device.h"
#define REAL  double
#define NAIVE naive_fp64
#include "naive_device.h"

#else /* ----------------------------------------------------------------------- once for each type of REAL */

#define NAIVE_PASTE(a, b) a##_##b
#define NAIVE_NAME(a, b)  NAIVE_PASTE(a, b)
#define NAIVE_OP(name)    NAIVE_NAME(NAIVE, name) /* naive_fp32_linear_forward */

static void NAIVE_OP(copy_in)(rt_stream *s, rt_block to, const void *from) {
    (void)s;
    memcpy(to.data, from, to.count * rt_type_size(to.type));
}

static void NAIVE_OP(copy_out)(rt_stream *s, void *to, rt_block from) {
    (void)s;
    memcpy(to, from.data, from.count * rt_type_size(from.type));
}

/* ------------------------------------------------------------------------------------------------- linear */

static void NAIVE_OP(linear_forward)(rt_stream *s, rt_block y_, rt_block pre_, rt_block x_, rt_block w_,
                                     rt_block b_, size_t rows, size_t in, size_t out, vit_gelu form) {
    (void)s;
    REAL *y = y_.data, *pre = pre_.data;
    const REAL *x = x_.data, *w = w_.data, *b = b_.data;
    for (size_t r = 0; r < rows; r++) {
        for (size_t o = 0; o < out; o++) {
            REAL sum = 0;
            for (size_t i = 0; i < in; i++) sum += x[r * in + i] * w[o * in + i];
            sum += b[o];
            if (pre) pre[r * out + o] = sum;
            y[r * out + o] = pre ? naive_gelu(form, sum) : sum;
        }
    }
}

static void NAIVE_OP(linear_backward)(rt_stream *s, rt_block dx_, rt_block dw_, rt_block db_, rt_block dy_,
                                      rt_block x_, rt_block w_, rt_block pre_, size_t rows, size_t in,
                                      size_t out, vit_gelu form) {
    (void)s;
    REAL *dx = dx_.data, *dw = dw_.data, *db = db_.data, *x = x_.data;
    const REAL *dy = dy_.data, *w = w_.data, *pre = pre_.data;
    /* y = sum over i of x[i] * w[i] + b; before it x = gelu(pre) */
    for (size_t i = 0; pre && i < rows * in; i++) x[i] = naive_gelu(form, pre[i]);
    for (size_t r = 0; dx && r < rows; r++) {
        for (size_t i = 0; i < in; i++) {
            REAL sum = 0;
            for (size_t o = 0; o < out; o++) sum += dy[r * out + o] * w[o * in + i];
            dx[r * in + i] = pre ? sum * naive_gelu_derivative(form, pre[r * in + i]) : sum;
        }
    }
    for (size_t o = 0; o < out; o++) {
        for (size_t i = 0; i < in; i++) {
            REAL sum = 0;
            for (size_t r = 0; r < rows; r++) sum += dy[r * out + o] * x[r * in + i];
            dw[o * in + i] = sum;
        }
        REAL sum = 0;
        for (size_t r = 0; r < rows; r++) sum += dy[r * out + o];
        db[o] = sum;
    }
}

/* ---------------------------------------------------------------------------------------------- layernorm */

static void NAIVE_OP(layernorm_forward)(rt_stream *s, rt_block y_, rt_block mean_, rt_block rstd_,
                                        rt_block x_, rt_block gamma_, rt_block beta_, size_t rows, size_t dim,
                                        double eps) {
    (void)s;
    REAL *mean = mean_.data, *rstd = rstd_.data;
    const REAL *gamma = gamma_.data, *beta = beta_.data;
    for (size_t r = 0; r < rows; r++) {
        REAL *y = (REAL *)y_.data + r * dim;
        const REAL *x = (const REAL *)x_.data + r * dim;
        REAL sum = 0, squares = 0;
        for (size_t i = 0; i < dim; i++) sum += x[i];
        mean[r] = sum / dim;
        for (size_t i = 0; i < dim; i++) squares += (x[i] - mean[r]) * (x[i] - mean[r]);
        rstd[r] = 1 / sqrt(squares / dim + eps);
        for (size_t i = 0; i < dim; i++) y[i] = (x[i] - mean[r]) * rstd[r] * gamma[i] + beta[i];
    }
}

static void NAIVE_OP(layernorm_backward)(rt_stream *s, rt_block dx_, rt_block dgamma_, rt_block dbeta_,
                                         rt_block residual_, rt_block dy_, rt_block x_, rt_block mean_,
                                         rt_block rstd_, rt_block gamma_, size_t B, size_t T, size_t Q,
                                         size_t dim) {
    (void)s;
    REAL *dgamma = dgamma_.data, *dbeta = dbeta_.data;
    const REAL *mean = mean_.data, *rstd = rstd_.data, *gamma = gamma_.data;
    for (size_t i = 0; i < dim; i++) dgamma[i] = dbeta[i] = 0;
    for (size_t r = 0; r < B * T; r++) {
        REAL *dx = (REAL *)dx_.data + r * dim;
        const REAL *residual =
            residual_.data && r % T < Q ? (const REAL *)residual_.data + (r / T * Q + r % T) * dim : NULL;
        const REAL *dy = (const REAL *)dy_.data + r * dim, *x = (const REAL *)x_.data + r * dim;
        REAL sum = 0, product = 0;
        for (size_t i = 0; i < dim; i++) {
            /* y = normal * gamma + beta */
            REAL normal = (x[i] - mean[r]) * rstd[r], dnormal = dy[i] * gamma[i];
            dgamma[i] += dy[i] * normal;
            dbeta[i] += dy[i];
            sum += dnormal;
            product += dnormal * normal;
        }
        for (size_t i = 0; i < dim; i++) {
            /* normal = (x - mean) * rstd: of a change of x the normalisation takes away what shifts the whole
             * row (mean) and what stretches it (rstd) */
            REAL normal = (x[i] - mean[r]) * rstd[r], dnormal = dy[i] * gamma[i];
            dx[i] = (residual ? residual[i] : 0) + (dnormal - sum / dim - normal * (product / dim)) * rstd[r];
        }
    }
}

/* ---------------------------------------------------------------------------------------------- attention */

/* The probabilities [B, H, Q, T]. */
static size_t NAIVE_OP(attention_saved)(size_t B, size_t T, size_t Q, size_t H, size_t head_dim) {
    (void)head_dim;
    return B * H * Q * T;
}

static void NAIVE_OP(attention_forward)(rt_stream *s, rt_block out_, rt_block saved_, rt_block qkv_, size_t B,
                                        size_t T, size_t Q, size_t H, size_t head_dim) {
    (void)s;
    size_t D = H * head_dim;
    double scale = 1 / sqrt(head_dim);
    for (size_t b = 0; b < B; b++) {
        for (size_t h = 0; h < H; h++) {
            const REAL *q = (const REAL *)qkv_.data + b * T * 3 * D + h * head_dim, *k = q + D, *v = k + D;
            REAL *out = (REAL *)out_.data + b * Q * D + h * head_dim;
            for (size_t t = 0; t < Q; t++) {
                REAL *p = (REAL *)saved_.data + ((b * H + h) * Q + t) * T, largest = -INFINITY, sum = 0;
                for (size_t u = 0; u < T; u++) {
                    REAL dot = 0;
                    for (size_t i = 0; i < head_dim; i++) dot += q[t * 3 * D + i] * k[u * 3 * D + i];
                    p[u] = dot * scale;
                    if (largest < p[u]) largest = p[u];
                }
                for (size_t u = 0; u < T; u++) sum += p[u] = exp(p[u] - largest);
                for (size_t u = 0; u < T; u++) p[u] /= sum;
                for (size_t i = 0; i < head_dim; i++) {
                    REAL mix = 0;
                    for (size_t u = 0; u < T; u++) mix += p[u] * v[u * 3 * D + i];
                    out[t * D + i] = mix;
                }
            }
        }
    }
}

static void NAIVE_OP(attention_backward)(rt_stream *s, rt_block dqkv_, rt_block dout_, rt_block qkv_,
                                         rt_block out_, rt_block saved_, size_t B, size_t T, size_t Q,
                                         size_t H, size_t head_dim) {
    (void)s;
    size_t D = H * head_dim;
    double scale = 1 / sqrt(head_dim);
    memset(dqkv_.data, 0, B * T * 3 * D * sizeof(REAL));
    for (size_t b = 0; b < B; b++) {
        for (size_t h = 0; h < H; h++) {
            const REAL *q = (const REAL *)qkv_.data + b * T * 3 * D + h * head_dim, *k = q + D, *v = k + D;
            REAL *dq = (REAL *)dqkv_.data + b * T * 3 * D + h * head_dim, *dk = dq + D, *dv = dk + D;
            const REAL *out = (const REAL *)out_.data + b * Q * D + h * head_dim;
            const REAL *dout = (const REAL *)dout_.data + b * Q * D + h * head_dim;
            for (size_t t = 0; t < Q; t++) {
                const REAL *p = (const REAL *)saved_.data + ((b * H + h) * Q + t) * T;
                /* p = softmax(score): dscore[u] = p[u] * (dp[u] - sum over w of p[w] * dp[w]), and that sum
                 * is dout * out, as out = sum over w of p[w] * v[w] */
                REAL mean_dp = 0;
                for (size_t i = 0; i < head_dim; i++) mean_dp += dout[t * D + i] * out[t * D + i];
                for (size_t u = 0; u < T; u++) {
                    /* out = sum over u of p[u] * v[u] */
                    REAL dp = 0;
                    for (size_t i = 0; i < head_dim; i++) {
                        dp += dout[t * D + i] * v[u * 3 * D + i];
                        dv[u * 3 * D + i] += dout[t * D + i] * p[u];
                    }
                    /* score[u] = q * k[u] * scale */
                    REAL ddot = p[u] * (dp - mean_dp) * scale;
                    for (size_t i = 0; i < head_dim; i++) {
                        dq[t * 3 * D + i] += ddot * k[u * 3 * D + i];
                        dk[u * 3 * D + i] += ddot * q[t * 3 * D + i];
                    }
                }
            }
        }
    }
}

/* ----------------------------------------------------------------------------------------------- residual */

static void NAIVE_OP(residual_forward)(rt_stream *s, rt_block out_, rt_block x_, rt_block branch_,
                                       rt_block keys, size_t B, size_t count, size_t x_stride, double rate,
                                       uint64_t salt) {
    (void)s;
    REAL *out = out_.data;
    const REAL *x = x_.data, *branch = branch_.data;
    for (size_t b = 0; b < B; b++) {
        double factor = naive_branch_factor(keys, b, rate, salt);
        for (size_t i = 0; i < count; i++)
            out[b * count + i] = x[b * x_stride + i] + factor * branch[b * count + i];
    }
}

static void NAIVE_OP(residual_backward)(rt_stream *s, rt_block dbranch_, rt_block dout_, rt_block keys,
                                        size_t B, size_t count, double rate, uint64_t salt) {
    (void)s;
    REAL *dbranch = dbranch_.data;
    const REAL *dout = dout_.data;
    for (size_t b = 0; b < B; b++) {
        double factor = naive_branch_factor(keys, b, rate, salt);
        /* out = x + factor * branch */
        for (size_t i = b * count; i < (b + 1) * count; i++) dbranch[i] = factor * dout[i];
    }
}

static void NAIVE_OP(residual_layernorm_forward)(rt_stream *s, rt_block y, rt_block mean, rt_block rstd,
                                                 rt_block out, rt_block x, rt_block branch, rt_block keys,
                                                 rt_block gamma, rt_block beta, size_t B, size_t Q,
                                                 size_t x_stride, size_t dim, double eps, double rate,
                                                 uint64_t salt) {
    NAIVE_OP(residual_forward)(s, out, x, branch, keys, B, Q * dim, x_stride, rate, salt);
    NAIVE_OP(layernorm_forward)(s, y, mean, rstd, out, gamma, beta, B * Q, dim, eps);
}

/* ---------------------------------------------------------------------------------------------- embedding */

static void NAIVE_OP(patchify_forward)(rt_stream *s, rt_block patches_, rt_block images_, size_t B, size_t C,
                                       size_t height, size_t width, size_t P) {
    (void)s;
    REAL *patch = patches_.data;
    const REAL *images = images_.data;
    for (size_t b = 0; b < B; b++)
        for (size_t row = 0; row < height / P; row++)
            for (size_t column = 0; column < width / P; column++)
                for (size_t c = 0; c < C; c++)
                    for (size_t y = row * P; y < (row + 1) * P; y++)
                        for (size_t x = column * P; x < (column + 1) * P; x++)
                            *patch++ = images[((b * C + c) * height + y) * width + x];
}

static void NAIVE_OP(embedding_forward)(rt_stream *s, rt_block out_, rt_block x_, rt_block cls_,
                                        rt_block pos_, size_t B, size_t N, size_t D) {
    (void)s;
    REAL *out = out_.data;
    const REAL *x = x_.data, *cls = cls_.data, *pos = pos_.data;
    for (size_t b = 0; b < B; b++)
        for (size_t t = 0; t <= N; t++)
            for (size_t i = 0; i < D; i++)
                out[(b * (N + 1) + t) * D + i] =
                    (t == 0 ? cls[i] : x[(b * N + t - 1) * D + i]) + pos[t * D + i];
}

static void NAIVE_OP(embedding_backward)(rt_stream *s, rt_block dx_, rt_block dcls_, rt_block dpos_,
                                         rt_block dout_, size_t B, size_t N, size_t D) {
    (void)s;
    REAL *dx = dx_.data, *dcls = dcls_.data, *dpos = dpos_.data;
    const REAL *dout = dout_.data;
    for (size_t t = 0; t <= N; t++) {
        for (size_t i = 0; i < D; i++) {
            REAL sum = 0;
            for (size_t b = 0; b < B; b++) {
                /* out = (t == 0 ? cls : x[t - 1]) + pos[t] */
                REAL d = dout[(b * (N + 1) + t) * D + i];
                if (t > 0) dx[(b * N + t - 1) * D + i] = d;
                sum += d;
            }
            dpos[t * D + i] = sum;
            if (t == 0) dcls[i] = sum;
        }
    }
}

/* --------------------------------------------------------------------------------------------------- loss */

static void NAIVE_OP(cross_entropy_forward)(rt_stream *s, rt_block losses_, rt_block probabilities_,
                                            rt_block logits_, rt_block labels_, size_t B, size_t V,
                                            double smoothing) {
    (void)s;
    REAL *losses = losses_.data;
    const int32_t *labels = labels_.data;
    for (size_t b = 0; b < B; b++) {
        REAL *p = (REAL *)probabilities_.data + b * V, largest = -INFINITY, sum = 0, loss = 0;
        const REAL *logits = (const REAL *)logits_.data + b * V;
        for (size_t v = 0; v < V; v++)
            if (largest < logits[v]) largest = logits[v];
        for (size_t v = 0; v < V; v++) sum += p[v] = exp(logits[v] - largest);
        for (size_t v = 0; v < V; v++) p[v] /= sum;
        /* log p is taken of the logits: p itself may have underflowed */
        for (size_t v = 0; v < V; v++)
            loss -= naive_target(labels, b, v, V, smoothing) * (logits[v] - largest - log(sum));
        losses[b] = loss;
    }
}

static void NAIVE_OP(cross_entropy_backward)(rt_stream *s, rt_block dlogits_, rt_block probabilities_,
                                             rt_block labels_, rt_block scalars, size_t B, size_t V,
                                             double smoothing, double scale) {
    (void)s;
    if (scalars.data) scale *= ((const double *)scalars.data)[VIT_LOSS_SCALE];
    REAL *dlogits = dlogits_.data;
    const REAL *p = probabilities_.data;
    /* loss = sum over v of target[v] * (log(sum over w of exp(logits[w])) - logits[v]); sum of target = 1 */
    for (size_t b = 0; b < B; b++)
        for (size_t v = 0; v < V; v++)
            dlogits[b * V + v] = scale * (p[b * V + v] - naive_target(labels_.data, b, v, V, smoothing));
}

static void NAIVE_OP(loss_accumulate)(rt_stream *s, rt_block total_, rt_block losses_, size_t B) {
    (void)s;
    int64_t *total = total_.data;
    const REAL *losses = losses_.data;
    for (size_t b = 0; b < B; b++) {
        if (isfinite(losses[b]))
            total[0] += llround(losses[b] / B / VIT_LOSS_UNIT);
        else
            total[1]++;
    }
}

/* --------------------------------------------------------------------------------------------- optimizers */

static void NAIVE_OP(adamw)(rt_stream *s, rt_block param_, rt_block master, rt_block exp_avg_,
                            rt_block exp_avg_sq_, rt_block grad_, rt_block scalars_, size_t decayed,
                            double rate, const vit_adamw_options *o) {
    (void)s, (void)master;
    REAL *param = param_.data, *exp_avg = exp_avg_.data, *exp_avg_sq = exp_avg_sq_.data;
    const REAL *grad = grad_.data;
    const double *scalars = scalars_.data, learning_rate = rate * scalars[VIT_LEARNING_RATE];
    if (scalars[VIT_GRADIENT_FACTOR] == 0) return;
    for (size_t i = 0; i < param_.count; i++) {
        double g = grad[i] * scalars[VIT_GRADIENT_FACTOR];
        if (i < decayed) param[i] -= learning_rate * o->weight_decay * param[i];
        exp_avg[i] = o->beta1 * exp_avg[i] + (1 - o->beta1) * g;
        exp_avg_sq[i] = o->beta2 * exp_avg_sq[i] + (1 - o->beta2) * g * g;
        double m = exp_avg[i] / scalars[VIT_BIAS_CORRECTION1],
               v = exp_avg_sq[i] / scalars[VIT_BIAS_CORRECTION2];
        param[i] -= learning_rate * m / (sqrt(v) + o->eps);
    }
}

static void NAIVE_OP(sgd)(rt_stream *s, rt_block param_, rt_block master, rt_block momentum_, rt_block grad_,
                          rt_block scalars_, size_t decayed, double rate, const vit_sgd_options *o) {
    (void)s, (void)master;
    REAL *param = param_.data, *momentum = momentum_.data;
    const REAL *grad = grad_.data;
    const double *scalars = scalars_.data;
    if (scalars[VIT_GRADIENT_FACTOR] == 0) return;
    for (size_t i = 0; i < param_.count; i++) {
        double g = grad[i] * scalars[VIT_GRADIENT_FACTOR];
        if (i < decayed) g += o->weight_decay * param[i];
        momentum[i] = o->momentum * momentum[i] + g;
        param[i] -= rate * scalars[VIT_LEARNING_RATE] * momentum[i];
    }
}

/* ------------------------------------------------------------------------------------------ gradient norm */

/* A granule's sum is significand * 2^(exponent - 53) with an integer significand below 2^53, whose upper 26
 * and lower 27 bits go to two counters: 2^36 granules fit. */
static void NAIVE_OP(sum_of_squares)(rt_stream *s, rt_block counters_, rt_block x_) {
    (void)s;
    int64_t *counters = counters_.data;
    const REAL *x = x_.data;
    for (size_t granule = 0; granule < x_.count; granule += VIT_GRANULE) {
        double sum = 0;
        for (size_t i = granule; i < granule + VIT_GRANULE && i < x_.count; i++) sum += (double)x[i] * x[i];
        int exponent;
        int64_t significand = (int64_t)ldexp(frexp(isfinite(sum) ? sum : 0, &exponent), 53);
        int64_t *pair = counters + 2 * (exponent - VIT_NORM_MIN_EXPONENT);
        if (!isfinite(sum) || exponent >= VIT_NORM_MIN_EXPONENT + VIT_NORM_EXPONENTS)
            counters[VIT_NORM_NOT_FINITE]++;
        else if (exponent >=
                 VIT_NORM_MIN_EXPONENT) /* what is smaller can only come from doubles, and is nothing */
            pair[0] += significand >> 27, pair[1] += significand & 0x7FFFFFF;
    }
}

static void NAIVE_OP(decide_step)(rt_stream *s, rt_block scalars, rt_block scaler, rt_block counters_,
                                  double divisor, double clip, const vit_adamw_options *o) {
    (void)s;
    double sum = 0;
    const int64_t *counters = counters_.data;
    for (int i = 0; i < VIT_NORM_EXPONENTS; i++)
        sum += ldexp((double)counters[2 * i] * 0x1p27 + (double)counters[2 * i + 1],
                     i + VIT_NORM_MIN_EXPONENT - 53);
    vit_step_rule(scalars.data, scaler.data, sum, counters[VIT_NORM_NOT_FINITE] == 0, divisor, clip, o);
}

/* --------------------------------------------------------------------------------------------------- sums */

static void NAIVE_OP(fill)(rt_stream *s, rt_block x, int byte) {
    (void)s;
    memset(x.data, byte, x.count * rt_type_size(x.type));
}

static void NAIVE_OP(cast)(rt_stream *s, rt_block to, rt_block from) {
    (void)s;
    memcpy(to.data, from.data, to.count * sizeof(REAL));
}

static void NAIVE_OP(add)(rt_stream *s, rt_block x_, rt_block y_) {
    (void)s;
    REAL *x = x_.data;
    const REAL *y = y_.data;
    for (size_t i = 0; i < x_.count; i++) x[i] += y[i];
}

static void NAIVE_OP(sum_buffers)(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from,
                                  size_t n_from) {
    (void)s;
    for (size_t i = 0; i < from[0].count; i++) {
        if (from[0].type == RT_I64) {
            uint64_t sum = ((const uint64_t *)from[0].data)[i];
            for (size_t k = 1; k < n_from; k++) sum += ((const uint64_t *)from[k].data)[i];
            for (size_t k = 0; k < n_to; k++) ((uint64_t *)to[k].data)[i] = sum;
        } else {
            REAL sum = ((const REAL *)from[0].data)[i];
            for (size_t k = 1; k < n_from; k++) sum += ((const REAL *)from[k].data)[i];
            for (size_t k = 0; k < n_to; k++) ((REAL *)to[k].data)[i] = sum;
        }
    }
}

static const char *NAIVE_OP(description)(const rt_rank *rank) {
    (void)rank;
    return "naive";
}

static const vit_device NAIVE = {
    .name = "naive",
    .types = 1u << (sizeof(REAL) == 8 ? RT_FP64 : RT_FP32),
    .open = naive_open,
    .close = naive_close,
    .copy_in = NAIVE_OP(copy_in),
    .copy_out = NAIVE_OP(copy_out),
    .attention_saved = NAIVE_OP(attention_saved),
    .linear_forward = NAIVE_OP(linear_forward),
    .linear_backward = NAIVE_OP(linear_backward),
    .layernorm_forward = NAIVE_OP(layernorm_forward),
    .layernorm_backward = NAIVE_OP(layernorm_backward),
    .attention_forward = NAIVE_OP(attention_forward),
    .attention_backward = NAIVE_OP(attention_backward),
    .residual_forward = NAIVE_OP(residual_forward),
    .residual_layernorm_forward = NAIVE_OP(residual_layernorm_forward),
    .residual_backward = NAIVE_OP(residual_backward),
    .patchify_forward = NAIVE_OP(patchify_forward),
    .embedding_forward = NAIVE_OP(embedding_forward),
    .embedding_backward = NAIVE_OP(embedding_backward),
    .cross_entropy_forward = NAIVE_OP(cross_entropy_forward),
    .cross_entropy_backward = NAIVE_OP(cross_entropy_backward),
    .loss_accumulate = NAIVE_OP(loss_accumulate),
    .adamw = NAIVE_OP(adamw),
    .sgd = NAIVE_OP(sgd),
    .sum_of_squares = NAIVE_OP(sum_of_squares),
    .decide_step = NAIVE_OP(decide_step),
    .fill = NAIVE_OP(fill),
    .cast = NAIVE_OP(cast),
    .add = NAIVE_OP(add),
    .sum_buffers = NAIVE_OP(sum_buffers),
    .description = NAIVE_OP(description),
};

#undef NAIVE_PASTE
#undef NAIVE_NAME
#undef NAIVE_OP
#undef NAIVE
#undef REAL

#endif
