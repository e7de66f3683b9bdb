/* vit.h - the Vision Transformer of timm as a chain of units, in C.
 *
 * Use in ten lines, from any program (complete: tests/example.c):
 *
 *     #define VIT_IMPLEMENTATION
 *     #include "vit.h"
 *     ...
 *     vit_config config;
 *     vit_replica vit;
 *     vit_config_named(&config, "vit_tiny_patch16_224", &e);
 *     config.num_classes = 10;
 *     vit_open(&vit, &config, &vit_cpu, RT_FP32, 8, &e);      // batches of 8 images, random weights
 *     double loss = vit_forward(&vit, images, labels);        // float [8, 3, 224, 224], int32 [8]
 *     vit_backward(&vit);                                     // gradients of that loss in vit.gradients
 *     vit_close(&vit);
 *
 * Contents: configurations, the device table, tensors and units, the context, activations, one replica,
 * operations.
 *
 * A model is a chain of units: embedding, block 0 .. depth-1, head. A unit owns a contiguous flat run of
 * parameters and maps one activation to the next. It is the grain of everything that distributes training:
 * what ZeRO-3 gathers, what a pipeline stage is cut from, what activation checkpointing recomputes. This file
 * knows no rank but its own and no strategy; dist.h runs the same units.
 *
 * The architecture is timm's VisionTransformer (Dosovitskiy et al. 2020, arXiv 2010.11929): pre-LN blocks,
 * GELU (exact, or by tanh), qkv with bias packed q | k | v, each head by head, a class token, learned
 * positions, drop-path (stochastic depth), a final LayerNorm, a linear head. The head reads the class token
 * alone, so the last block computes, beyond keys and values of all tokens, only what that token needs.
 * Letters in shapes: B images of a micro-batch, C channels, P patch side, N patches, T = N + 1 tokens, Q of
 * them that go on, D embedding size, H heads, F hidden size of the MLP, V classes. Everything is row-major.
 *
 * What it leaves out: dropout other than drop-path, pooling other than the class token, dynamic image sizes.
 *
 * Threads and lifetime: a vit_model is read-only after vit_model_init and may be shared by ranks; everything
 * else belongs to one rank. Nothing here prints or exits.
 */
#ifdef VIT_IMPLEMENTATION
#define RUNTIME_IMPLEMENTATION
#endif
#include "runtime.h"

#ifndef VIT_H
#define VIT_H

/* ----------------------------------------------------------------------------------------- configurations */

/* GELU(x) = x (1 + erf(x / sqrt 2)) / 2, or x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which is off
 * by up to 5e-4 (Hendrycks and Gimpel 2016, arXiv 1606.08415). */
typedef enum { VIT_GELU_ERF, VIT_GELU_TANH } vit_gelu;

typedef struct vit_config {
    char name[64]; /* the timm name that it began as */
    size_t image_height, image_width, channels, patch_size;
    size_t embed_dim, depth, num_heads, num_classes;
    double mlp_ratio;       /* F = (size_t)(embed_dim * mlp_ratio), as timm's int() */
    double layer_norm_eps;  /* timm 1e-6, Hugging Face 1e-12 */
    vit_gelu gelu;          /* of the MLP */
    double drop_path;       /* rate of the last block; it grows linearly from 0 in the first */
    double label_smoothing; /* of the loss */
    int freeze_backbone;    /* only head.weight and head.bias are optimised */
} vit_config;

/* The configuration of a timm model (3 channels, 1000 classes, eps 1e-6, exact GELU). -1: no such name. */
int vit_config_named(vit_config *config, const char *name, error_text *e);

/* Names of the built-in configurations, in order of size; NULL after the last. */
const char *vit_config_name(size_t i);

/* --------------------------------------------------------------------------------------- the device table */

/* What changes at every step lives in device memory as one block of doubles, so that a step can be launched
 * before the last one has ended, and a recorded one be replayed: the host writes the first two before every
 * step, the device all others (vit_step_rule). */
enum {
    VIT_LEARNING_RATE,
    VIT_STEP,             /* from 1, skipped ones included */
    VIT_LOSS_SCALE,       /* gradients are those of so many times the loss: fp16 would lose small ones */
    VIT_BIAS_CORRECTION1, /* 1 - beta1^t, t: updates with this one */
    VIT_BIAS_CORRECTION2, /* 1 - beta2^t */
    VIT_GRADIENT_FACTOR,  /* average, unscaling and clipping in one; 0: skip this step's update */
    VIT_GRADIENT_NORM,    /* of the averaged gradient, unscaled, before clipping */
    VIT_USED_SCALE,       /* the loss scale of this step, when VIT_LOSS_SCALE is the next one's */
    VIT_HALTED,           /* 1: an overflow was one too many, and nothing is updated any more */
    VIT_SCALARS
};

/* The dynamic loss scale of fp16, whose smallest number is 2^-24: gradients are those of `scale` times the
 * loss. It is DeepSpeed's rule (runtime/fp16/loss_scaler.py, after Megatron): an overflow skips the step;
 * as long as there is hysteresis left it costs one of it, else it halves the scale; `window` steps without
 * one double it. */
typedef struct vit_scaler {
    double scale, least;
    int64_t window, step,     /* window 0: the scale is fixed; step: of which the next update is told */
        last_overflow;        /* -1 for none */
    int64_t hysteresis, left; /* overflows that it takes to halve the scale; that it takes now */
    int64_t skipped;          /* steps so far */
} vit_scaler;

/* A scale of 2^16, of at least 1, a window of 1000 and a hysteresis of 2. */
vit_scaler vit_scaler_default(void);

/* Counters of the exact sum of squares: two per binary exponent of a granule's sum, and one for Inf and NaN.
 * The squares of fp32 numbers, and sums of 16 of them, have exponents -298 .. 260. */
enum { VIT_GRANULE = 16, VIT_NORM_MIN_EXPONENT = -320, VIT_NORM_EXPONENTS = 640 };
enum { VIT_NORM_NOT_FINITE = 2 * VIT_NORM_EXPONENTS, VIT_NORM_COUNTERS };

typedef struct vit_adamw_options {
    double beta1, beta2, eps, weight_decay;
} vit_adamw_options;
typedef struct vit_sgd_options {
    double momentum, weight_decay;
} vit_sgd_options;

/* The operations of a device. Shapes are those of the blocks' contents; blocks of the model's type unless
 * it says otherwise: where that is bf16 or fp16, "at least fp32" is fp32 (and in fp64 it is fp64).
 * Arithmetic inside an operation is at least fp32, and what it stores is rounded once, to nearest even.
 * `forward` entries write their first blocks, `backward` entries overwrite gradients of parameters. An
 * absent optional block has no data. The table is the whole of what a device must offer. */
typedef struct vit_device {
    const char *name; /* "cpu" */
    unsigned types;   /* bit 1 << t: it computes models of rt_type t */

    /* Prepares rank->device, rank->allocate and rank->release for a rank; close undoes it. */
    int (*open)(rt_rank *rank, error_text *e);
    void (*close)(rt_rank *rank);

    /* Host memory to device memory and back: whole blocks. After copy_out the host may read. */
    void (*copy_in)(rt_stream *s, rt_block to, const void *from);
    void (*copy_out)(rt_stream *s, void *to, rt_block from);

    /* Number of elements (at least fp32) that attention_forward saves for attention_backward, for B
     * images. */
    size_t (*attention_saved)(size_t B, size_t T, size_t Q, size_t H, size_t head_dim);

    /* y [rows, out] = x [rows, in] w [out, in]^T + b [out]. With pre [rows, out]: pre takes that, y =
     * gelu(pre) in the form asked for. */
    void (*linear_forward)(rt_stream *s, rt_block y, rt_block pre, rt_block x, rt_block w, rt_block b,
                           size_t rows, size_t in, size_t out, vit_gelu form);
    /* dw [out, in] = dy^T x, db [out] = column sums of dy, dx [rows, in] (optional) = dy w. With pre
     * [rows, in], of which x was gelu(pre) and need not have been kept: x = gelu(pre), dx (then not
     * optional) = (dy w) * gelu'(pre). */
    void (*linear_backward)(rt_stream *s, rt_block dx, rt_block dw, rt_block db, rt_block dy, rt_block x,
                            rt_block w, rt_block pre, size_t rows, size_t in, size_t out, vit_gelu form);

    /* y [rows, dim] = (x - mean) * rstd * gamma + beta, rstd = 1 / sqrt(variance + eps); mean and rstd [rows]
     * (at least fp32) are kept for backward. */
    void (*layernorm_forward)(rt_stream *s, rt_block y, rt_block mean, rt_block rstd, rt_block x,
                              rt_block gamma, rt_block beta, size_t rows, size_t dim, double eps);
    /* dx [B, T, dim] = d LayerNorm / dx; to the first Q of every T rows is added residual [B, Q, dim]
     * (optional). */
    void (*layernorm_backward)(rt_stream *s, rt_block dx, rt_block dgamma, rt_block dbeta, rt_block residual,
                               rt_block dy, rt_block x, rt_block mean, rt_block rstd, rt_block gamma,
                               size_t B, size_t T, size_t Q, size_t dim);

    /* out [B, Q, D] = softmax(q k^T / sqrt(head_dim)) v, image by image and head by head, for the queries of
     * the first Q tokens; qkv [B, T, 3, H, head_dim]. The gradient of the other queries is 0. */
    void (*attention_forward)(rt_stream *s, rt_block out, rt_block saved, rt_block qkv, size_t B, size_t T,
                              size_t Q, size_t H, size_t head_dim);
    void (*attention_backward)(rt_stream *s, rt_block dqkv, rt_block dout, rt_block qkv, rt_block out,
                               rt_block saved, size_t B, size_t T, size_t Q, size_t H, size_t head_dim);

    /* out [B, count] = x + k_b branch (branch may be out itself), where image b of x begins at b * x_stride.
     * k_b = 0 with probability rate, else 1 / (1 - rate), drawn by vit_drop_path_factor(keys [B] (uint64)[b],
     * salt, rate). */
    void (*residual_forward)(rt_stream *s, rt_block out, rt_block x, rt_block branch, rt_block keys, size_t B,
                             size_t count, size_t x_stride, double rate, uint64_t salt);
    /* Both at once: out [B, Q, dim] = x + k_b branch, y [B, Q, dim] and statistics [B, Q] from out. */
    void (*residual_layernorm_forward)(rt_stream *s, rt_block y, rt_block mean, rt_block rstd, rt_block out,
                                       rt_block x, rt_block branch, rt_block keys, rt_block gamma,
                                       rt_block beta, size_t B, size_t Q, size_t x_stride, size_t dim,
                                       double eps, double rate, uint64_t salt);
    /* dbranch [B, count] = k_b dout. */
    void (*residual_backward)(rt_stream *s, rt_block dbranch, rt_block dout, rt_block keys, size_t B,
                              size_t count, double rate, uint64_t salt);

    /* patches [B, N, C * P * P] of images [B, C, height, width] (at least fp32); pixels beyond the last
     * whole patch are left out. */
    void (*patchify_forward)(rt_stream *s, rt_block patches, rt_block images, size_t B, size_t C,
                             size_t height, size_t width, size_t P);
    /* out [B, N + 1, D] = (cls [D] | x [B, N, D]) + pos [N + 1, D]. */
    void (*embedding_forward)(rt_stream *s, rt_block out, rt_block x, rt_block cls, rt_block pos, size_t B,
                              size_t N, size_t D);
    void (*embedding_backward)(rt_stream *s, rt_block dx, rt_block dcls, rt_block dpos, rt_block dout,
                               size_t B, size_t N, size_t D);

    /* probabilities [B, V] = softmax(logits), losses [B] (both at least fp32) = cross entropy with the
     * labels [B] (int32), smoothed: target = (1 - smoothing) one_hot + smoothing / V. */
    void (*cross_entropy_forward)(rt_stream *s, rt_block losses, rt_block probabilities, rt_block logits,
                                  rt_block labels, size_t B, size_t V, double smoothing);
    /* dlogits = scale * scalars[VIT_LOSS_SCALE] * (probabilities - target); without scalars, scale *
     * (...). */
    void (*cross_entropy_backward)(rt_stream *s, rt_block dlogits, rt_block probabilities, rt_block labels,
                                   rt_block scalars, size_t B, size_t V, double smoothing, double scale);
    /* total (int64) [0] += sum over b of losses[b] / B in units of VIT_LOSS_UNIT, [1] += number that are not
     * finite. */
    void (*loss_accumulate)(rt_stream *s, rt_block total, rt_block losses, size_t B);

    /* Optimizers as PyTorch defines them, on a flat run of which the first `decayed` elements decay. The
     * learning rate is rate * scalars[VIT_LEARNING_RATE]. The gradient is first multiplied by
     * scalars[VIT_GRADIENT_FACTOR]; if that is 0 nothing changes. Optimizer state is at least fp32; grad
     * of the model's type or of another of fp32, bf16, fp16. With a master [like param] (fp32), that is
     * updated, and param = the rounded master; without, param is its own master. */
    void (*adamw)(rt_stream *s, rt_block param, rt_block master, rt_block exp_avg, rt_block exp_avg_sq,
                  rt_block grad, rt_block scalars, size_t decayed, double rate, const vit_adamw_options *o);
    void (*sgd)(rt_stream *s, rt_block param, rt_block master, rt_block momentum, rt_block grad,
                rt_block scalars, size_t decayed, double rate, const vit_sgd_options *o);

    /* The exact sum of squares. counters (int64) [VIT_NORM_COUNTERS] += the squares of x (any type), whose
     * start is a multiple of 16 elements: the sum of each granule of 16 is formed in double, in a fixed
     * order, then its significand is added as two integers to the counters of its exponent. Integer sums
     * do not depend on their order. */
    void (*sum_of_squares)(rt_stream *s, rt_block counters, rt_block x);
    /* vit_step_rule with the sum of squares that the counters of the whole gradient (a sum of `divisor`
     * gradients) give; scaler holds one vit_scaler (RT_U8 [sizeof]). */
    void (*decide_step)(rt_stream *s, rt_block scalars, rt_block scaler, rt_block counters, double divisor,
                        double clip, const vit_adamw_options *o);

    void (*fill)(rt_stream *s, rt_block x, int byte); /* every byte of x = byte */
    /* Any of fp32, bf16 and fp16 to any, and any type to itself; [n] both. */
    void (*cast)(rt_stream *s, rt_block to, rt_block from);
    void (*add)(rt_stream *s, rt_block x, rt_block y); /* x += y; y may be of another type, as in cast */
    /* The arithmetic of every collective: each of `to` = from[0] + from[1] + ... in this order, element by
     * element (fp32, bf16, fp16 or int64, which wraps; of 16-bit numbers the sum is formed in fp32 and
     * rounded once). A `to` may be one of `from`. Called by the rank that executes, on memory of all
     * ranks. */
    void (*sum_buffers)(rt_stream *s, const rt_block *to, size_t n_to, const rt_block *from, size_t n_from);

    /* What computes for an open rank, for the user to read: "own product, AVX-512 14x32". */
    const char *(*description)(const rt_rank *rank);

    /* Only of devices with memory of their own, else NULL. Bytes of it that are free, and that there are,
     * where ranks first .. first + ranks - 1 of this host would compute; -1: they cannot, and why. */
    int (*memory)(int first, int ranks, double *unused, double *total, error_text *e);
    /* One line for each device that this machine has, after one on the driver. -1: none can be used, and
     * why. */
    int (*list)(FILE *out, error_text *e);
    /* Sets aside, at once, the memory that rt_alloc will hand out from now on: that of this ledger (from
     * dist_estimate). -1: there is not so much. */
    int (*reserve)(rt_rank *rank, const rt_ledger *ledger, error_text *e);
    /* The PCI address of a rank's GPU, "0000:17:00.0". -1: e says why it is not known. */
    int (*address)(const rt_rank *rank, char address[32], error_text *e);

    /* Only of devices that can record what is launched, else NULL. Between capture and captured the
     * operations on the compute and the communication stream are not run but become a graph, which replay
     * runs, any number of times, on the same blocks. No copy from or to the host may be among them, and none
     * of a new shape. captured: NULL and a failed world if that cannot be had. */
    void (*capture)(rt_rank *rank);
    void *(*captured)(rt_rank *rank);
    void (*replay)(rt_rank *rank, void *graph);
    void (*forget)(rt_rank *rank, void *graph);
} vit_device;

#define VIT_LOSS_UNIT 0x1p-36 /* losses are summed over samples and ranks as integers of this unit */

/* The factor of one branch of one sample: 0 or 1 / (1 - rate). Shared by all devices. */
BASE_INLINE double vit_drop_path_factor(uint64_t sample_key, uint64_t salt, double rate) {
    return random_uniform(sample_key, salt) < rate ? 0.0 : 1.0 / (1.0 - rate);
}

/* After a step, with or without overflow. -1: an overflow when the scale cannot fall any more. Shared by the
 * host and all devices. */
BASE_INLINE int vit_scaler_update(vit_scaler *s, int overflow) {
    int64_t stable = s->step - s->last_overflow - 1;
    if (s->window == 0) return 0;
    if (overflow && s->left > 1) {
        s->left--;
    } else if (overflow) {
        if (s->scale == s->least) return -1;
        s->scale = fmax(s->scale / 2, s->least);
    } else if (stable > 0 && stable % s->window == 0) {
        s->left = s->hysteresis;
        s->scale *= 2;
    }
    if (overflow) s->last_overflow = s->step;
    s->skipped += overflow;
    s->step++;
    return 0;
}

/* All that follows from the sum of squares of a step's gradient, which is the sum of n = divisor * loss
 * scale gradients: norm = sqrt(sum) / n, factor = min(1, clip / (norm + 1e-6)) / n (clip 0: off; 0 if the
 * sum is not finite), AdamW's corrections, which count updates, and the next step's loss scale. s
 * [VIT_SCALARS]. Shared by all devices. */
BASE_INLINE void vit_step_rule(double *s, vit_scaler *scaler, double sum_of_squares, int finite,
                               double divisor, double clip, const vit_adamw_options *o) {
    double n = divisor * s[VIT_LOSS_SCALE], t = s[VIT_STEP] - (double)scaler->skipped;
    double norm = finite ? sqrt(sum_of_squares) / n : (double)NAN;
    double clipping = clip > 0 ? fmin(1., clip / (norm + 1e-6)) : 1;
    if (vit_scaler_update(scaler, !finite)) s[VIT_HALTED] = 1;
    s[VIT_BIAS_CORRECTION1] = 1 - pow(o->beta1, t);
    s[VIT_BIAS_CORRECTION2] = 1 - pow(o->beta2, t);
    s[VIT_GRADIENT_NORM] = norm;
    s[VIT_GRADIENT_FACTOR] = finite && s[VIT_HALTED] == 0 ? clipping / n : 0;
    s[VIT_USED_SCALE] = s[VIT_LOSS_SCALE];
    s[VIT_LOSS_SCALE] = scaler->scale;
}

extern const vit_device vit_cpu;  /* vit_cpu.c */
extern const vit_device vit_cuda; /* vit_cuda.cu; only where nvcc was found */

/* How a CPU rank multiplies matrices; with how many threads, rt_rank.threads says. */
typedef enum { VIT_MATMUL_AUTO, VIT_MATMUL_OWN, VIT_MATMUL_OPENBLAS } vit_matmul;
int vit_cpu_matmul(rt_rank *rank, vit_matmul choice, error_text *e); /* after open; -1: not built with it */
const char *vit_cpu_description(const rt_rank *rank);                /* "own product, AVX-512 14x32" */
/* How a CUDA rank multiplies matrices from now on; after open, before the first product. tf32: fp32
 * products round their factors to TF32. first_algorithm: not the fastest for a shape, which is a matter of
 * timing, but the first that works, so that all runs give the same bits. */
void vit_cuda_products(rt_rank *rank, int tf32, int first_algorithm);

/* -------------------------------------------------------------------------------------- tensors and units */

enum { VIT_ALIGNMENT = 16 }; /* every tensor begins at a multiple of 16 elements of its unit */

typedef enum { VIT_DECAY, VIT_NO_DECAY, VIT_FROZEN } vit_kind;
typedef enum { VIT_ZERO, VIT_ONE, VIT_NORMAL, VIT_UNIFORM } vit_initialiser;

typedef struct vit_tensor {
    char name[48]; /* timm's: "blocks.3.attn.qkv.weight" */
    size_t dims, shape[4];
    size_t offset, count; /* elements; offset within the unit */
    vit_kind kind;        /* no weight decay of biases, norms, cls_token and pos_embed; frozen: no update */
    vit_initialiser initialiser;
    double scale; /* standard deviation of VIT_NORMAL, bound of VIT_UNIFORM */
} vit_tensor;

typedef struct vit_unit {
    char name[32];         /* "embedding", "block 3", "head" */
    size_t index;          /* position in the chain */
    vit_tensor tensor[12]; /* decayed first, frozen last, so that AdamW on any part has one boundary */
    size_t tensors;
    size_t tokens;     /* of each image, the first ones, in its output: T, but 1 in the last block */
    size_t count;      /* elements of its parameters, padding included: a multiple of 16 */
    size_t decayed;    /* elements [0, decayed) decay */
    size_t classifier; /* elements [0, classifier) are head.weight and head.bias, the others the backbone's */
    size_t trainable;  /* elements [0, trainable) are optimised */
    double drop_path;  /* rate of this block */
    const struct vit_unit_type *type;
} vit_unit;

typedef struct vit_model {
    vit_config config;
    rt_type type;                            /* of parameters, activations and gradients */
    size_t N, T, D, H, head_dim, F, V, C, P; /* sizes, see the letters above */
    size_t units;                            /* depth + 2 */
    vit_unit *unit;                          /* [units] */
    size_t parameters;                       /* elements without padding */
} vit_model;

/* Checks the configuration and lays out its units. -1 with a message for what is impossible. */
int vit_model_init(vit_model *model, const vit_config *config, rt_type type, error_text *e);
void vit_model_free(vit_model *model);

/* Fills one unit's parameters (host memory, [unit->count], padding 0) as timm initialises them: weights of
 * linear layers and pos_embed normal with deviation 0.02, cls_token 1e-6, the patch projection uniform as
 * PyTorch's Conv2d, biases 0, norms 1 and 0. Element i of a tensor depends on (seed, tensor, i) alone. */
void vit_unit_initialise(const vit_unit *unit, uint64_t seed, float *parameters);

/* -------------------------------------------------------------------------------------------- the context */

/* The data of one micro-batch in device memory, readable by every unit. */
typedef struct vit_batch {
    rt_block images;      /* [B, C, height, width]; fp32 also where the model's type is narrower */
    rt_block labels;      /* int32 [B] */
    rt_block sample_keys; /* uint64 [B]: what the sample's own randomness (drop-path) is keyed by */
} vit_batch;

/* What a unit runs in. */
typedef struct vit_context {
    rt_rank *rank;
    int stream;
    const vit_device *device;
    const vit_model *model;
    const vit_batch *batch;
    size_t B;
    int training;       /* drop-path on */
    rt_block scalars;   /* [VIT_SCALARS], of which backward needs the loss scale; absent: that is 1 */
    rt_block losses;    /* [B]: written by the head */
    rt_block workspace; /* scratch of one unit, [vit_workspace_bytes] */
} vit_context;

/* in [B, T, D] -> out [B, T, D]; the embedding has no in, the last block's out and the head's in are
 * [B, 1, D], the head's out is the logits [B, V]. A block without out (no data) computes only what its
 * backward needs. */
void vit_unit_forward(const vit_context *c, const vit_unit *unit, rt_block params, rt_block in, rt_block out,
                      rt_block saved);
/* Overwrites grads (padding excepted) and din; dout may be din's other name only where a unit has no din.
 * Without din (no data: no unit below is trained) the head leaves out the gradients of its norm too. */
void vit_unit_backward(const vit_context *c, const vit_unit *unit, rt_block params, rt_block grads,
                       rt_block in, rt_block saved, rt_block dout, rt_block din);

/* Elements of a unit's output, bytes of what it saves for backward, bytes of scratch of the neediest unit.
 * SIZE_MAX where that does not fit into size_t. */
size_t vit_unit_output(const vit_model *model, const vit_unit *unit, size_t B);
size_t vit_unit_saved_bytes(const vit_model *model, const vit_device *device, const vit_unit *unit, size_t B);
size_t vit_workspace_bytes(const vit_model *model, size_t B);

/* -------------------------------------------------------------------------------------------- activations */

/* The activations of one micro-batch of B images: what forward leaves for backward, and the batch itself.
 * For inference, without a backward to follow, two outputs in turn and one `saved` serve all units. With
 * activation checkpointing (Chen et al. 2016, arXiv 1604.06174) blocks N, 2 N, ... of the chain share one
 * `saved`: only their inputs stay, and the loop runs their forward again before their backward. (The
 * embedding saves nothing, and the head's backward follows its forward at once.) */
typedef struct vit_activations {
    size_t B;
    int inference;
    size_t checkpoint_every; /* N; 0: no block */
    vit_batch batch;
    rt_block *out;        /* [units] output of each unit */
    rt_block *saved;      /* [units] */
    rt_block gradient[2]; /* [B, T, D]: gradients of outputs, in turn */
    rt_block losses;      /* [B] */
    rt_block workspace;
} vit_activations;

int vit_activations_init(vit_activations *a, rt_rank *rank, const vit_device *device, const vit_model *model,
                         size_t B, int inference, size_t checkpoint_every);
int vit_is_checkpointed(const vit_activations *a, const vit_unit *unit);
void vit_activations_free(vit_activations *a, rt_rank *rank, const vit_model *model);

/* -------------------------------------------------------------------------------------------- one replica */

/* A model with all that one process needs to run it alone; dist.h has the training loop of many. */
typedef struct vit_replica {
    rt_world world; /* of one rank */
    const vit_device *device;
    vit_model model;
    rt_block parameters, gradients; /* all units, one after the other */
    size_t *offset;                 /* [units]: where each begins */
    vit_activations activations;
    vit_context context;
} vit_replica;

/* Allocates, and initialises the weights with seed 0 (fp32; in double they begin as 0). -1 with a message,
 * and nothing to close. It computes on one thread until vit->world.ranks[0].threads says more. */
int vit_open(vit_replica *vit, const vit_config *config, const vit_device *device, rt_type type, size_t B,
             error_text *e);
void vit_close(vit_replica *vit);

/* images [B, C, height, width] in float (fp64: double), labels int32 [B]; the mean loss (NaN if the world has
 * failed). With drop-path, copy the samples' keys into activations.batch.sample_keys before each call
 * (vit_copy_in). */
double vit_forward(vit_replica *vit, const void *images, const int32_t *labels);
/* Gradients of that loss with respect to all parameters, into vit->gradients. */
void vit_backward(vit_replica *vit);
/* Logits [B, V] of the last forward, in the model's type. */
void vit_logits(vit_replica *vit, void *logits);

/* --------------------------------------------------------------------------------------------- operations */

/* The front ends of the operations: each declares what it reads and writes, calls the device, and advances
 * the stream's clock. Units use those of the layers (private, below); dist.h uses these. */
void vit_copy_in(const vit_context *c, rt_block to, const void *from);
void vit_copy_out(const vit_context *c, void *to, rt_block from);
void vit_fill(const vit_context *c, rt_block x, int byte);
void vit_cast(const vit_context *c, rt_block to, rt_block from);
void vit_add(const vit_context *c, rt_block x, rt_block y);
void vit_loss_accumulate(const vit_context *c, rt_block total);
void vit_sum_of_squares(const vit_context *c, rt_block counters, rt_block x);
void vit_decide_step(const vit_context *c, rt_block scalars, rt_block scaler, rt_block counters,
                     double divisor, double clip, const vit_adamw_options *o);
void vit_adamw(const vit_context *c, rt_block param, rt_block master, rt_block exp_avg, rt_block exp_avg_sq,
               rt_block grad, rt_block scalars, size_t decayed, double rate, const vit_adamw_options *o);
void vit_sgd(const vit_context *c, rt_block param, rt_block master, rt_block momentum, rt_block grad,
             rt_block scalars, size_t decayed, double rate, const vit_sgd_options *o);

#endif /* VIT_H */

/* ========================================================================================= implementation */
#ifdef VIT_IMPLEMENTATION
#undef VIT_IMPLEMENTATION

#include <stdlib.h>
#include <string.h>

/* a * b * c, or SIZE_MAX, which no allocation survives. */
static size_t vit__count(size_t a, size_t b, size_t c) {
    size_t ab, abc;
    return size_multiply(a, b, &ab) || size_multiply(ab, c, &abc) ? SIZE_MAX : abc;
}

/* ----------------------------------------------------------------------------------------- configurations */

static const struct {
    const char *name;
    size_t patch, image, dim, depth, heads;
    double mlp_ratio;
} vit__configs[] = {
    {"vit_tiny_patch16_224", 16, 224, 192, 12, 3, 4},
    {"vit_tiny_patch16_384", 16, 384, 192, 12, 3, 4},
    {"vit_small_patch32_224", 32, 224, 384, 12, 6, 4},
    {"vit_small_patch32_384", 32, 384, 384, 12, 6, 4},
    {"vit_small_patch16_224", 16, 224, 384, 12, 6, 4},
    {"vit_small_patch16_384", 16, 384, 384, 12, 6, 4},
    {"vit_base_patch32_224", 32, 224, 768, 12, 12, 4},
    {"vit_base_patch32_384", 32, 384, 768, 12, 12, 4},
    {"vit_base_patch16_224", 16, 224, 768, 12, 12, 4},
    {"vit_base_patch16_384", 16, 384, 768, 12, 12, 4},
    {"vit_large_patch32_224", 32, 224, 1024, 24, 16, 4},
    {"vit_large_patch32_384", 32, 384, 1024, 24, 16, 4},
    {"vit_large_patch16_224", 16, 224, 1024, 24, 16, 4},
    {"vit_large_patch16_384", 16, 384, 1024, 24, 16, 4},
    {"vit_huge_patch14_224", 14, 224, 1280, 32, 16, 4},
    {"vit_giant_patch14_224", 14, 224, 1408, 40, 16, 48. / 11},
};

const char *vit_config_name(size_t i) {
    return i < sizeof vit__configs / sizeof *vit__configs ? vit__configs[i].name : NULL;
}

int vit_config_named(vit_config *config, const char *name, error_text *e) {
    for (size_t i = 0; vit_config_name(i); i++) {
        if (strcmp(name, vit__configs[i].name)) continue;
        *config = (vit_config){.image_height = vit__configs[i].image,
                               .image_width = vit__configs[i].image,
                               .channels = 3,
                               .patch_size = vit__configs[i].patch,
                               .embed_dim = vit__configs[i].dim,
                               .depth = vit__configs[i].depth,
                               .num_heads = vit__configs[i].heads,
                               .num_classes = 1000,
                               .mlp_ratio = vit__configs[i].mlp_ratio,
                               .layer_norm_eps = 1e-6};
        snprintf(config->name, sizeof config->name, "%s", name);
        return 0;
    }
    return error_set(e, "no model is named %s", name);
}

/* -------------------------------------------------------------------------------------- tensors and units */

/* Appends a tensor to the unit. Call it for the decayed ones first. */
static void vit__tensor(vit_unit *u, const char *prefix, const char *name, vit_kind kind,
                        vit_initialiser initialiser, double scale, size_t dims, const size_t *shape) {
    vit_tensor *t = &u->tensor[u->tensors++];
    *t = (vit_tensor){.dims = dims,
                      .offset = u->count,
                      .count = 1,
                      .kind = kind,
                      .initialiser = initialiser,
                      .scale = scale};
    snprintf(t->name, sizeof t->name, "%s%s", prefix, name);
    for (size_t i = 0; i < dims; i++) t->count *= t->shape[i] = shape[i];
    u->count += (t->count + VIT_ALIGNMENT - 1) / VIT_ALIGNMENT * VIT_ALIGNMENT;
    if (kind == VIT_DECAY) u->decayed = u->count;
}

#define VIT__SHAPE(...)                                                                                      \
    sizeof((size_t[]){__VA_ARGS__}) / sizeof(size_t), (size_t[]) { __VA_ARGS__ }

/* The tensors of each type of unit, in the order in which they lie in memory. */
enum { EMBED_WEIGHT, EMBED_BIAS, EMBED_CLS, EMBED_POS };
enum {
    QKV_WEIGHT,
    PROJ_WEIGHT,
    FC1_WEIGHT,
    FC2_WEIGHT,
    NORM1_WEIGHT,
    NORM1_BIAS,
    QKV_BIAS,
    PROJ_BIAS,
    NORM2_WEIGHT,
    NORM2_BIAS,
    FC1_BIAS,
    FC2_BIAS
};
enum { HEAD_WEIGHT, HEAD_BIAS, HEAD_NORM_WEIGHT, HEAD_NORM_BIAS };

static void vit__embedding_tensors(vit_unit *u, const vit_model *m) {
    double bound =
        1 / sqrt((double)(m->C * m->P * m->P)); /* kaiming_uniform with a = sqrt(5): 1 / sqrt(fan_in) */
    vit__tensor(u, "patch_embed.proj.", "weight", VIT_DECAY, VIT_UNIFORM, bound,
                VIT__SHAPE(m->D, m->C, m->P, m->P));
    vit__tensor(u, "patch_embed.proj.", "bias", VIT_NO_DECAY, VIT_UNIFORM, bound, VIT__SHAPE(m->D));
    vit__tensor(u, "", "cls_token", VIT_NO_DECAY, VIT_NORMAL, 1e-6, VIT__SHAPE(1, 1, m->D));
    vit__tensor(u, "", "pos_embed", VIT_NO_DECAY, VIT_NORMAL, 0.02, VIT__SHAPE(1, m->T, m->D));
}

static void vit__block_tensors(vit_unit *u, const vit_model *m) {
    char prefix[32];
    snprintf(prefix, sizeof prefix, "blocks.%zu.", u->index - 1);
    vit__tensor(u, prefix, "attn.qkv.weight", VIT_DECAY, VIT_NORMAL, 0.02, VIT__SHAPE(3 * m->D, m->D));
    vit__tensor(u, prefix, "attn.proj.weight", VIT_DECAY, VIT_NORMAL, 0.02, VIT__SHAPE(m->D, m->D));
    vit__tensor(u, prefix, "mlp.fc1.weight", VIT_DECAY, VIT_NORMAL, 0.02, VIT__SHAPE(m->F, m->D));
    vit__tensor(u, prefix, "mlp.fc2.weight", VIT_DECAY, VIT_NORMAL, 0.02, VIT__SHAPE(m->D, m->F));
    vit__tensor(u, prefix, "norm1.weight", VIT_NO_DECAY, VIT_ONE, 0, VIT__SHAPE(m->D));
    vit__tensor(u, prefix, "norm1.bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(m->D));
    vit__tensor(u, prefix, "attn.qkv.bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(3 * m->D));
    vit__tensor(u, prefix, "attn.proj.bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(m->D));
    vit__tensor(u, prefix, "norm2.weight", VIT_NO_DECAY, VIT_ONE, 0, VIT__SHAPE(m->D));
    vit__tensor(u, prefix, "norm2.bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(m->D));
    vit__tensor(u, prefix, "mlp.fc1.bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(m->F));
    vit__tensor(u, prefix, "mlp.fc2.bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(m->D));
}

static void vit__head_tensors(vit_unit *u, const vit_model *m) {
    vit__tensor(u, "head.", "weight", VIT_DECAY, VIT_NORMAL, 0.02, VIT__SHAPE(m->V, m->D));
    vit__tensor(u, "head.", "bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(m->V));
    u->classifier = u->count;
    vit__tensor(u, "norm.", "weight", VIT_NO_DECAY, VIT_ONE, 0, VIT__SHAPE(m->D));
    vit__tensor(u, "norm.", "bias", VIT_NO_DECAY, VIT_ZERO, 0, VIT__SHAPE(m->D));
}

void vit_unit_initialise(const vit_unit *unit, uint64_t seed, float *parameters) {
    memset(parameters, 0, unit->count * sizeof *parameters);
    for (size_t k = 0; k < unit->tensors; k++) {
        const vit_tensor *t = &unit->tensor[k];
        uint64_t key = random_key(seed, RANDOM_INITIALISATION, unit->index, k);
        for (size_t i = 0; i < t->count; i++) {
            double value = 0;
            switch (t->initialiser) {
            case VIT_ZERO: break;
            case VIT_ONE: value = 1; break;
            case VIT_NORMAL: value = t->scale * random_normal(key, i); break;
            case VIT_UNIFORM: value = t->scale * (2 * random_uniform(key, i) - 1); break;
            }
            parameters[t->offset + i] = (float)value;
        }
    }
}

/* A typed run of memory that a unit carves up; without data it only measures. */
typedef struct {
    rt_block block; /* bytes */
    size_t used;
} vit__carver;

static rt_block vit__take(vit__carver *c, rt_type type, size_t count) {
    size_t bytes, end;
    if (size_multiply(count, rt_type_size(type), &bytes) || bytes > SIZE_MAX / 4 || c->used > SIZE_MAX / 4) {
        c->used = SIZE_MAX; /* out of memory, whatever follows */
        return (rt_block){0};
    }
    end = c->used + (bytes + 63) / 64 * 64;
    rt_block b = {.type = type, .count = count, .track = c->block.track, .tracks = c->block.tracks};
    if (c->block.data) b.data = (char *)c->block.data + c->used;
    c->used = end;
    return b;
}

static rt_block vit__parameter(const vit_unit *u, rt_block flat, int tensor) {
    return rt_slice(flat, u->tensor[tensor].offset, u->tensor[tensor].count);
}

/* LayerNorm statistics and losses stay in fp32 in any lower precision. */
static rt_type vit__statistic(const vit_model *m) { return m->type == RT_FP64 ? RT_FP64 : RT_FP32; }

vit_scaler vit_scaler_default(void) {
    return (vit_scaler){
        .scale = 65536, .least = 1, .window = 1000, .last_overflow = -1, .hysteresis = 2, .left = 2};
}

/* --------------------------------------------------------------------------------- operations, front ends */

/* Declares the accesses, calls the device's entry, and accounts for the work: the whole front end of an
 * operation. Usage: VIT__RUN(c, add, RT_BLOCKS(x, y), RT_BLOCKS(x), flops, bytes, arguments of the entry). */
#define VIT__RUN(c, entry, reads, writes, flops, bytes, ...)                                                 \
    do {                                                                                                     \
        if (!rt_begin((c)->rank, (c)->stream, #entry, reads, writes)) break;                                 \
        (c)->device->entry(&(c)->rank->stream[(c)->stream], __VA_ARGS__);                                    \
        rt_end((c)->rank, (c)->stream, flops, bytes);                                                        \
    } while (0)

static double vit__bytes(rt_block b) { return b.data ? (double)b.count * (double)rt_type_size(b.type) : 0; }

void vit_copy_in(const vit_context *c, rt_block to, const void *from) {
    VIT__RUN(c, copy_in, RT_BLOCKS({0}), RT_BLOCKS(to), 0, vit__bytes(to), to, from);
}

void vit_copy_out(const vit_context *c, void *to, rt_block from) {
    VIT__RUN(c, copy_out, RT_BLOCKS(from), RT_BLOCKS({0}), 0, vit__bytes(from), to, from);
}

void vit_fill(const vit_context *c, rt_block x, int byte) {
    VIT__RUN(c, fill, RT_BLOCKS({0}), RT_BLOCKS(x), 0, vit__bytes(x), x, byte);
}

void vit_cast(const vit_context *c, rt_block to, rt_block from) {
    VIT__RUN(c, cast, RT_BLOCKS(from), RT_BLOCKS(to), 0, vit__bytes(from) + vit__bytes(to), to, from);
}

void vit_add(const vit_context *c, rt_block x, rt_block y) {
    VIT__RUN(c, add, RT_BLOCKS(x, y), RT_BLOCKS(x), (double)x.count, 2 * vit__bytes(x) + vit__bytes(y), x, y);
}

void vit_loss_accumulate(const vit_context *c, rt_block total) {
    VIT__RUN(c, loss_accumulate, RT_BLOCKS(total, c->losses), RT_BLOCKS(total), (double)c->B,
             vit__bytes(c->losses), total, c->losses, c->B);
}

void vit_sum_of_squares(const vit_context *c, rt_block counters, rt_block x) {
    VIT__RUN(c, sum_of_squares, RT_BLOCKS(counters, x), RT_BLOCKS(counters), 2 * (double)x.count,
             vit__bytes(x), counters, x);
}

void vit_decide_step(const vit_context *c, rt_block scalars, rt_block scaler, rt_block counters,
                     double divisor, double clip, const vit_adamw_options *o) {
    VIT__RUN(c, decide_step, RT_BLOCKS(scalars, scaler, counters), RT_BLOCKS(scalars, scaler),
             (double)counters.count, vit__bytes(counters), scalars, scaler, counters, divisor, clip, o);
}

/* Bytes of parameters and gradient in an update: the master, or param itself, is read and written. */
static double vit__update_bytes(rt_block param, rt_block master, rt_block grad) {
    return (master.data ? 1 : 2) * vit__bytes(param) + 2 * vit__bytes(master) + vit__bytes(grad);
}

void vit_adamw(const vit_context *c, rt_block param, rt_block master, rt_block exp_avg, rt_block exp_avg_sq,
               rt_block grad, rt_block scalars, size_t decayed, double rate, const vit_adamw_options *o) {
    VIT__RUN(c, adamw, RT_BLOCKS(param, master, exp_avg, exp_avg_sq, grad, scalars),
             RT_BLOCKS(param, master, exp_avg, exp_avg_sq), 14 * (double)param.count,
             vit__update_bytes(param, master, grad) + 4 * vit__bytes(exp_avg), param, master, exp_avg,
             exp_avg_sq, grad, scalars, decayed, rate, o);
}

void vit_sgd(const vit_context *c, rt_block param, rt_block master, rt_block momentum, rt_block grad,
             rt_block scalars, size_t decayed, double rate, const vit_sgd_options *o) {
    VIT__RUN(c, sgd, RT_BLOCKS(param, master, momentum, grad, scalars), RT_BLOCKS(param, master, momentum),
             6 * (double)param.count, vit__update_bytes(param, master, grad) + 2 * vit__bytes(momentum),
             param, master, momentum, grad, scalars, decayed, rate, o);
}

static void vit__linear_forward(const vit_context *c, rt_block y, rt_block pre, rt_block x, rt_block w,
                                rt_block b, size_t rows, size_t in, size_t out) {
    VIT__RUN(c, linear_forward, RT_BLOCKS(x, w, b), RT_BLOCKS(y, pre),
             2. * (double)rows * (double)in * (double)out,
             vit__bytes(x) + vit__bytes(w) + vit__bytes(y) + vit__bytes(pre), y, pre, x, w, b, rows, in, out,
             c->model->config.gelu);
}

static void vit__linear_backward(const vit_context *c, rt_block dx, rt_block dw, rt_block db, rt_block dy,
                                 rt_block x, rt_block w, rt_block pre, size_t rows, size_t in, size_t out) {
    VIT__RUN(c, linear_backward, RT_BLOCKS(dy, pre.data ? pre : x, w),
             RT_BLOCKS(dx, dw, db, pre.data ? x : (rt_block){0}),
             (dx.data ? 4. : 2.) * (double)rows * (double)in * (double)out,
             2 * vit__bytes(dy) + vit__bytes(x) + vit__bytes(w) + vit__bytes(dw) + vit__bytes(dx) +
                 vit__bytes(pre),
             dx, dw, db, dy, x, w, pre, rows, in, out, c->model->config.gelu);
}

static void vit__layernorm_forward(const vit_context *c, rt_block y, rt_block mean, rt_block rstd, rt_block x,
                                   rt_block gamma, rt_block beta, size_t rows) {
    size_t dim = c->model->D;
    VIT__RUN(c, layernorm_forward, RT_BLOCKS(x, gamma, beta), RT_BLOCKS(y, mean, rstd),
             8 * (double)(rows * dim), 2 * vit__bytes(y), y, mean, rstd, x, gamma, beta, rows, dim,
             c->model->config.layer_norm_eps);
}

static void vit__layernorm_backward(const vit_context *c, rt_block dx, rt_block dgamma, rt_block dbeta,
                                    rt_block residual, rt_block dy, rt_block x, rt_block mean, rt_block rstd,
                                    rt_block gamma, size_t T, size_t Q) {
    size_t dim = c->model->D;
    VIT__RUN(c, layernorm_backward, RT_BLOCKS(residual, dy, x, mean, rstd, gamma),
             RT_BLOCKS(dx, dgamma, dbeta), 16 * (double)(c->B * T * dim),
             3 * vit__bytes(dy) + vit__bytes(residual), dx, dgamma, dbeta, residual, dy, x, mean, rstd, gamma,
             c->B, T, Q, dim);
}

static void vit__attention_forward(const vit_context *c, rt_block out, rt_block saved, rt_block qkv,
                                   size_t Q) {
    const vit_model *m = c->model;
    VIT__RUN(c, attention_forward, RT_BLOCKS(qkv), RT_BLOCKS(out, saved),
             4. * (double)(c->B * m->T * Q * m->D), vit__bytes(qkv) + vit__bytes(saved) + vit__bytes(out),
             out, saved, qkv, c->B, m->T, Q, m->H, m->head_dim);
}

static void vit__attention_backward(const vit_context *c, rt_block dqkv, rt_block dout, rt_block qkv,
                                    rt_block out, rt_block saved, size_t Q) {
    const vit_model *m = c->model;
    VIT__RUN(c, attention_backward, RT_BLOCKS(dout, qkv, out, saved), RT_BLOCKS(dqkv),
             8. * (double)(c->B * m->T * Q * m->D),
             2 * vit__bytes(qkv) + vit__bytes(saved) + 2 * vit__bytes(out), dqkv, dout, qkv, out, saved, c->B,
             m->T, Q, m->H, m->head_dim);
}

/* out [B, Q, D] = x + k branch, for the first Q of the x_tokens tokens of x's images. */
static void vit__residual_forward(const vit_context *c, rt_block out, rt_block x, rt_block branch,
                                  size_t x_tokens, double rate, uint64_t salt) {
    rt_block keys = c->batch->sample_keys;
    VIT__RUN(c, residual_forward, RT_BLOCKS(x, branch, keys), RT_BLOCKS(out), 2 * (double)out.count,
             3 * vit__bytes(out), out, x, branch, keys, c->B, out.count / c->B, x_tokens * c->model->D,
             c->training ? rate : 0, salt);
}

/* And y [B, Q, D] = LayerNorm of out. */
static void vit__residual_layernorm_forward(const vit_context *c, rt_block y, rt_block mean, rt_block rstd,
                                            rt_block out, rt_block x, rt_block branch, rt_block gamma,
                                            rt_block beta, size_t x_tokens, double rate, uint64_t salt) {
    rt_block keys = c->batch->sample_keys;
    size_t dim = c->model->D;
    VIT__RUN(c, residual_layernorm_forward, RT_BLOCKS(x, branch, keys, gamma, beta),
             RT_BLOCKS(out, y, mean, rstd), 10 * (double)out.count, 4 * vit__bytes(out), y, mean, rstd, out,
             x, branch, keys, gamma, beta, c->B, out.count / c->B / dim, x_tokens * dim, dim,
             c->model->config.layer_norm_eps, c->training ? rate : 0, salt);
}

/* dbranch of out = x + k branch: dout itself where nothing is ever dropped. */
static rt_block vit__residual_backward(const vit_context *c, rt_block dbranch, rt_block dout, double rate,
                                       uint64_t salt) {
    rt_block keys = c->batch->sample_keys;
    if (rate == 0 || !c->training) return dout;
    VIT__RUN(c, residual_backward, RT_BLOCKS(dout, keys), RT_BLOCKS(dbranch), (double)dout.count,
             2 * vit__bytes(dout), dbranch, dout, keys, c->B, dout.count / c->B, rate, salt);
    return dbranch;
}

/* ---------------------------------------------------------------------------------------- unit: embedding */

/* Nothing is saved: patches are the images in another order, so backward makes them again. */
typedef struct {
    rt_block patches, x; /* [B, N, C * P * P], [B, N, D] */
} vit__embedding_workspace;

static vit__embedding_workspace vit__carve_embedding_workspace(vit__carver *w, const vit_model *m, size_t B) {
    size_t rows = vit__count(B, m->N, 1);
    vit__embedding_workspace s;
    s.patches = vit__take(w, m->type, vit__count(rows, m->C, m->P * m->P));
    s.x = vit__take(w, m->type, vit__count(rows, m->D, 1));
    return s;
}

static void vit__patchify_forward(const vit_context *c, rt_block patches) {
    const vit_model *m = c->model;
    rt_block images = c->batch->images;
    VIT__RUN(c, patchify_forward, RT_BLOCKS(images), RT_BLOCKS(patches), 0, 2 * vit__bytes(images), patches,
             images, c->B, m->C, m->config.image_height, m->config.image_width, m->P);
}

static void vit__embedding_forward(const vit_context *c, const vit_unit *u, rt_block params, rt_block in,
                                   rt_block out, rt_block saved_bytes) {
    const vit_model *m = c->model;
    vit__embedding_workspace s = vit__carve_embedding_workspace(&(vit__carver){c->workspace, 0}, m, c->B);
    rt_block cls = vit__parameter(u, params, EMBED_CLS), pos = vit__parameter(u, params, EMBED_POS);
    (void)in, (void)saved_bytes;
    vit__patchify_forward(c, s.patches);
    vit__linear_forward(c, s.x, (rt_block){0}, s.patches, vit__parameter(u, params, EMBED_WEIGHT),
                        vit__parameter(u, params, EMBED_BIAS), c->B * m->N, m->C * m->P * m->P, m->D);
    VIT__RUN(c, embedding_forward, RT_BLOCKS(s.x, cls, pos), RT_BLOCKS(out), (double)out.count,
             2 * vit__bytes(out), out, s.x, cls, pos, c->B, m->N, m->D);
}

static void vit__embedding_backward(const vit_context *c, const vit_unit *u, rt_block params, rt_block grads,
                                    rt_block in, rt_block saved_bytes, rt_block dout, rt_block din) {
    const vit_model *m = c->model;
    vit__embedding_workspace s = vit__carve_embedding_workspace(&(vit__carver){c->workspace, 0}, m, c->B);
    rt_block dcls = vit__parameter(u, grads, EMBED_CLS), dpos = vit__parameter(u, grads, EMBED_POS);
    (void)in, (void)saved_bytes, (void)din;
    VIT__RUN(c, embedding_backward, RT_BLOCKS(dout), RT_BLOCKS(s.x, dcls, dpos), (double)dout.count,
             2 * vit__bytes(dout), s.x, dcls, dpos, dout, c->B, m->N, m->D);
    vit__patchify_forward(c, s.patches);
    vit__linear_backward(c, (rt_block){0}, vit__parameter(u, grads, EMBED_WEIGHT),
                         vit__parameter(u, grads, EMBED_BIAS), s.x, s.patches,
                         vit__parameter(u, params, EMBED_WEIGHT), (rt_block){0}, c->B * m->N,
                         m->C * m->P * m->P, m->D);
}

static size_t vit__embedding_workspace_bytes(const vit_model *m, size_t B) {
    vit__carver w = {0};
    vit__carve_embedding_workspace(&w, m, B);
    return w.used;
}

/* -------------------------------------------------------------------------------------------- unit: block */

/* Q tokens of each image go on behind the keys and values: all, or in the last block the class token. */
typedef struct {
    rt_block mean1, rstd1; /* [B, T] */
    rt_block qkv, softmax; /* [B, T, 3, H, head_dim], as the device likes */
    rt_block attention;    /* [B, Q, D] */
    rt_block middle;       /* [B, Q, D]: the residual stream between the two branches */
    rt_block mean2, rstd2; /* [B, Q] */
    rt_block pre;          /* [B, Q, F]: before GELU */
} vit__block_saved;

static vit__block_saved vit__carve_block(vit__carver *s, const vit_model *m, const vit_unit *u,
                                         const vit_device *device, size_t B) {
    size_t all = vit__count(B, m->T, 1), rows = vit__count(B, u->tokens, 1);
    rt_type statistic = vit__statistic(m);
    vit__block_saved v;
    v.mean1 = vit__take(s, statistic, all);
    v.rstd1 = vit__take(s, statistic, all);
    v.qkv = vit__take(s, m->type, vit__count(all, m->D, 3));
    v.softmax = vit__take(s, statistic,
                          vit__count(all, m->T, m->H) == SIZE_MAX
                              ? SIZE_MAX
                              : device->attention_saved(B, m->T, u->tokens, m->H, m->head_dim));
    v.attention = vit__take(s, m->type, vit__count(rows, m->D, 1));
    v.middle = vit__take(s, m->type, vit__count(rows, m->D, 1));
    v.mean2 = vit__take(s, statistic, rows);
    v.rstd2 = vit__take(s, statistic, rows);
    v.pre = vit__take(s, m->type, vit__count(rows, m->F, 1));
    return v;
}

/* What the two LayerNorms and GELU give is cheap to compute again: it is not saved, and stays in the cache
 * where one block after the other uses the same memory. */
typedef struct {
    rt_block norm, hidden;                  /* [B, T, D], [B, T, F]: their outputs */
    rt_block dmiddle, dbranch, dnorm, wide; /* [B, T, D] three times, [B, T, max(3 D, F)] */
} vit__block_workspace;

static vit__block_workspace vit__carve_block_workspace(vit__carver *w, const vit_model *m, size_t B) {
    size_t rows = vit__count(B, m->T, 1), wide = m->F > 3 * m->D ? m->F : 3 * m->D;
    vit__block_workspace s;
    s.norm = vit__take(w, m->type, vit__count(rows, m->D, 1));
    s.hidden = vit__take(w, m->type, vit__count(rows, m->F, 1));
    s.dmiddle = vit__take(w, m->type, vit__count(rows, m->D, 1));
    s.dbranch = vit__take(w, m->type, vit__count(rows, m->D, 1));
    s.dnorm = vit__take(w, m->type, vit__count(rows, m->D, 1));
    s.wide = vit__take(w, m->type, vit__count(rows, wide, 1));
    return s;
}

/* The random numbers of drop-path: one per sample, block and branch. */
static uint64_t vit__salt(const vit_unit *u, int branch) { return 2 * u->index + (uint64_t)branch; }

static void vit__block_forward(const vit_context *c, const vit_unit *u, rt_block params, rt_block in,
                               rt_block out, rt_block saved_bytes) {
    const vit_model *m = c->model;
    size_t T = m->T, Q = u->tokens, D = m->D, rows = c->B * Q;
    rt_block none = {0};
    vit__block_saved v = vit__carve_block(&(vit__carver){saved_bytes, 0}, m, u, c->device, c->B);
    vit__block_workspace s = vit__carve_block_workspace(&(vit__carver){c->workspace, 0}, m, c->B);
#define P(tensor) vit__parameter(u, params, tensor)
    vit__layernorm_forward(c, s.norm, v.mean1, v.rstd1, in, P(NORM1_WEIGHT), P(NORM1_BIAS), c->B * T);
    vit__linear_forward(c, v.qkv, none, s.norm, P(QKV_WEIGHT), P(QKV_BIAS), c->B * T, D, 3 * D);
    vit__attention_forward(c, v.attention, v.softmax, v.qkv, Q);
    vit__linear_forward(c, v.middle, none, v.attention, P(PROJ_WEIGHT), P(PROJ_BIAS), rows, D, D);
    vit__residual_layernorm_forward(c, rt_slice(s.norm, 0, rows * D), v.mean2, v.rstd2, v.middle, in,
                                    v.middle, P(NORM2_WEIGHT), P(NORM2_BIAS), T, u->drop_path,
                                    vit__salt(u, 0));
    vit__linear_forward(c, s.hidden, v.pre, s.norm, P(FC1_WEIGHT), P(FC1_BIAS), rows, D, m->F);
    if (!out.data) return;
    vit__linear_forward(c, out, none, s.hidden, P(FC2_WEIGHT), P(FC2_BIAS), rows, m->F, D);
    vit__residual_forward(c, out, v.middle, out, Q, u->drop_path, vit__salt(u, 1));
}

static void vit__block_backward(const vit_context *c, const vit_unit *u, rt_block params, rt_block grads,
                                rt_block in, rt_block saved_bytes, rt_block dout, rt_block din) {
    const vit_model *m = c->model;
    size_t T = m->T, Q = u->tokens, D = m->D, F = m->F, rows = c->B * Q;
    rt_block none = {0};
    vit__block_saved v = vit__carve_block(&(vit__carver){saved_bytes, 0}, m, u, c->device, c->B);
    vit__block_workspace s = vit__carve_block_workspace(&(vit__carver){c->workspace, 0}, m, c->B);
    rt_block dhidden = rt_slice(s.wide, 0, rows * F), dqkv = rt_slice(s.wide, 0, c->B * T * 3 * D);
    rt_block dattention = rt_slice(s.dnorm, 0, rows * D), dmiddle = rt_slice(s.dmiddle, 0, rows * D);
    dout = rt_slice(dout, 0, rows * D);
#define G(tensor) vit__parameter(u, grads, tensor)
    /* out = middle + k fc2(gelu(fc1(norm2(middle)))) */
    rt_block dbranch = vit__residual_backward(c, s.dbranch, dout, u->drop_path, vit__salt(u, 1));
    vit__linear_backward(c, dhidden, G(FC2_WEIGHT), G(FC2_BIAS), dbranch, s.hidden, P(FC2_WEIGHT), v.pre,
                         rows, F, D);
    vit__layernorm_forward(c, s.norm, v.mean2, v.rstd2, v.middle, P(NORM2_WEIGHT), P(NORM2_BIAS), rows);
    vit__linear_backward(c, s.dnorm, G(FC1_WEIGHT), G(FC1_BIAS), dhidden, s.norm, P(FC1_WEIGHT), none, rows,
                         D, F);
    vit__layernorm_backward(c, dmiddle, G(NORM2_WEIGHT), G(NORM2_BIAS), dout, s.dnorm, v.middle, v.mean2,
                            v.rstd2, P(NORM2_WEIGHT), Q, Q);

    /* middle = in + k proj(attention(qkv(norm1(in)))) */
    dbranch = vit__residual_backward(c, s.dbranch, dmiddle, u->drop_path, vit__salt(u, 0));
    vit__linear_backward(c, dattention, G(PROJ_WEIGHT), G(PROJ_BIAS), dbranch, v.attention, P(PROJ_WEIGHT),
                         none, rows, D, D);
    vit__attention_backward(c, dqkv, dattention, v.qkv, v.attention, v.softmax, Q);
    vit__layernorm_forward(c, s.norm, v.mean1, v.rstd1, in, P(NORM1_WEIGHT), P(NORM1_BIAS), c->B * T);
    vit__linear_backward(c, s.dnorm, G(QKV_WEIGHT), G(QKV_BIAS), dqkv, s.norm, P(QKV_WEIGHT), none, c->B * T,
                         D, 3 * D);
    vit__layernorm_backward(c, din, G(NORM1_WEIGHT), G(NORM1_BIAS), dmiddle, s.dnorm, in, v.mean1, v.rstd1,
                            P(NORM1_WEIGHT), T, Q);
#undef P
#undef G
}

static size_t vit__block_workspace_bytes(const vit_model *m, size_t B) {
    vit__carver w = {0};
    vit__carve_block_workspace(&w, m, B);
    return w.used;
}

/* --------------------------------------------------------------------------------------------- unit: head */

typedef struct {
    rt_block norm, mean, rstd, probabilities;
} vit__head_saved; /* [B, D], [B], [B], [B, V] */

static vit__head_saved vit__carve_head(vit__carver *s, const vit_model *m, size_t B) {
    vit__head_saved v;
    v.norm = vit__take(s, m->type, vit__count(B, m->D, 1));
    v.mean = vit__take(s, vit__statistic(m), B);
    v.rstd = vit__take(s, vit__statistic(m), B);
    v.probabilities = vit__take(s, vit__statistic(m), vit__count(B, m->V, 1));
    return v;
}

static void vit__head_forward(const vit_context *c, const vit_unit *u, rt_block params, rt_block in,
                              rt_block out, rt_block saved_bytes) {
    const vit_model *m = c->model;
    vit__head_saved v = vit__carve_head(&(vit__carver){saved_bytes, 0}, m, c->B);
    rt_block labels = c->batch->labels;
    vit__layernorm_forward(c, v.norm, v.mean, v.rstd, in, vit__parameter(u, params, HEAD_NORM_WEIGHT),
                           vit__parameter(u, params, HEAD_NORM_BIAS), c->B);
    vit__linear_forward(c, out, (rt_block){0}, v.norm, vit__parameter(u, params, HEAD_WEIGHT),
                        vit__parameter(u, params, HEAD_BIAS), c->B, m->D, m->V);
    VIT__RUN(c, cross_entropy_forward, RT_BLOCKS(out, labels), RT_BLOCKS(c->losses, v.probabilities),
             5 * (double)out.count, 2 * vit__bytes(out), c->losses, v.probabilities, out, labels, c->B, m->V,
             m->config.label_smoothing);
}

static void vit__head_backward(const vit_context *c, const vit_unit *u, rt_block params, rt_block grads,
                               rt_block in, rt_block saved_bytes, rt_block dout, rt_block din) {
    const vit_model *m = c->model;
    vit__head_saved v = vit__carve_head(&(vit__carver){saved_bytes, 0}, m, c->B);
    vit__carver w = {c->workspace, 0};
    rt_block labels = c->batch->labels;
    rt_block dlogits = vit__take(&w, m->type, c->B * m->V), dnorm = vit__take(&w, m->type, c->B * m->D);
    if (!din.data) dnorm = (rt_block){0};
    (void)dout;
    VIT__RUN(c, cross_entropy_backward, RT_BLOCKS(v.probabilities, labels, c->scalars), RT_BLOCKS(dlogits),
             2 * (double)dlogits.count, 2 * vit__bytes(dlogits), dlogits, v.probabilities, labels, c->scalars,
             c->B, m->V, m->config.label_smoothing, 1 / (double)c->B);
    vit__linear_backward(c, dnorm, vit__parameter(u, grads, HEAD_WEIGHT), vit__parameter(u, grads, HEAD_BIAS),
                         dlogits, v.norm, vit__parameter(u, params, HEAD_WEIGHT), (rt_block){0}, c->B, m->D,
                         m->V);
    if (!din.data) return;
    vit__layernorm_backward(c, din, vit__parameter(u, grads, HEAD_NORM_WEIGHT),
                            vit__parameter(u, grads, HEAD_NORM_BIAS), (rt_block){0}, dnorm, in, v.mean,
                            v.rstd, vit__parameter(u, params, HEAD_NORM_WEIGHT), 1, 1);
}

static size_t vit__head_workspace(const vit_model *m, size_t B) {
    vit__carver w = {0};
    vit__take(&w, m->type, vit__count(B, m->V, 1));
    vit__take(&w, m->type, vit__count(B, m->D, 1));
    return w.used;
}

/* ------------------------------------------------------------------------------------------------- models */

/* What the three types of unit differ in. */
typedef struct vit_unit_type {
    void (*tensors)(vit_unit *, const vit_model *);
    void (*forward)(const vit_context *, const vit_unit *, rt_block params, rt_block in, rt_block out,
                    rt_block saved);
    void (*backward)(const vit_context *, const vit_unit *, rt_block params, rt_block grads, rt_block in,
                     rt_block saved, rt_block dout, rt_block din);
    size_t (*workspace)(const vit_model *, size_t B);
} vit_unit_type;

static const vit_unit_type vit__embedding = {vit__embedding_tensors, vit__embedding_forward,
                                             vit__embedding_backward, vit__embedding_workspace_bytes};
static const vit_unit_type vit__block = {vit__block_tensors, vit__block_forward, vit__block_backward,
                                         vit__block_workspace_bytes};
static const vit_unit_type vit__head = {vit__head_tensors, vit__head_forward, vit__head_backward,
                                        vit__head_workspace};

void vit_unit_forward(const vit_context *c, const vit_unit *unit, rt_block params, rt_block in, rt_block out,
                      rt_block saved) {
    unit->type->forward(c, unit, params, in, out, saved);
}

void vit_unit_backward(const vit_context *c, const vit_unit *unit, rt_block params, rt_block grads,
                       rt_block in, rt_block saved, rt_block dout, rt_block din) {
    unit->type->backward(c, unit, params, grads, in, saved, dout, din);
}

size_t vit_unit_output(const vit_model *m, const vit_unit *unit, size_t B) {
    return unit->type == &vit__head ? vit__count(B, m->V, 1) : vit__count(B, unit->tokens, m->D);
}

size_t vit_unit_saved_bytes(const vit_model *m, const vit_device *device, const vit_unit *unit, size_t B) {
    vit__carver s = {0};
    if (unit->type == &vit__block) vit__carve_block(&s, m, unit, device, B);
    if (unit->type == &vit__head) vit__carve_head(&s, m, B);
    return s.used;
}

size_t vit_workspace_bytes(const vit_model *m, size_t B) {
    size_t most = 0;
    for (size_t u = 0; u < m->units; u++) {
        size_t bytes = m->unit[u].type->workspace(m, B);
        if (most < bytes) most = bytes;
    }
    return most;
}

/* All but head.weight and head.bias is frozen: a linear probe. */
static void vit__freeze_backbone(vit_unit *u) {
    for (size_t t = 0; t < u->tensors; t++)
        if (u->tensor[t].offset >= u->classifier) u->tensor[t].kind = VIT_FROZEN;
    u->trainable = u->classifier;
    if (u->decayed > u->trainable) u->decayed = u->trainable;
}

int vit_model_init(vit_model *m, const vit_config *config, rt_type type, error_text *e) {
    const vit_config *c = config;
    *m = (vit_model){.config = *c, .type = type};
    const struct {
        const char *name;
        size_t value, most;
    } sizes[] = {
        {"image height", c->image_height, 1 << 16},   {"image width", c->image_width, 1 << 16},
        {"number of channels", c->channels, 1 << 10}, {"patch size", c->patch_size, 1 << 12},
        {"embed dim", c->embed_dim, 1 << 17},         {"depth", c->depth, 1 << 12},
        {"number of heads", c->num_heads, 1 << 17},   {"number of classes", c->num_classes, 1 << 24}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            return error_set(e, "impossible model: %s %zu, expected 1 to %zu", sizes[i].name, sizes[i].value,
                             sizes[i].most);
    if (c->embed_dim % c->num_heads)
        return error_set(e, "impossible model: embed dim %zu is not a multiple of %zu heads", c->embed_dim,
                         c->num_heads);
    if (c->patch_size > c->image_height || c->patch_size > c->image_width)
        return error_set(e, "impossible model: patch size %zu is larger than the image, %zux%zu",
                         c->patch_size, c->image_height, c->image_width);
    double hidden = (double)c->embed_dim * c->mlp_ratio;
    if (!(hidden >= 1 && hidden <= 1 << 20))
        return error_set(e,
                         "impossible model: mlp ratio %g of embed dim %zu, expected a hidden size of 1 to %d",
                         c->mlp_ratio, c->embed_dim, 1 << 20);
    if (!(c->layer_norm_eps >= 0 && c->layer_norm_eps < 1) || !(c->drop_path >= 0 && c->drop_path < 1) ||
        !(c->label_smoothing >= 0 && c->label_smoothing <= 1))
        return error_set(
            e, "impossible model: layer norm eps %g, drop path %g or label smoothing %g out of range",
            c->layer_norm_eps, c->drop_path, c->label_smoothing);
    m->C = c->channels;
    m->P = c->patch_size;
    m->N = (c->image_height / m->P) * (c->image_width / m->P);
    m->T = m->N + 1;
    m->D = c->embed_dim;
    m->H = c->num_heads;
    m->head_dim = m->D / m->H;
    m->F = (size_t)hidden;
    m->V = c->num_classes;
    m->units = c->depth + 2;
    m->unit = calloc(m->units, sizeof *m->unit);
    if (!m->unit) return error_set(e, "out of memory for %zu units", m->units);
    for (size_t i = 0; i < m->units; i++) {
        vit_unit *u = &m->unit[i];
        u->index = i;
        u->type = i == 0 ? &vit__embedding : i <= c->depth ? &vit__block : &vit__head;
        u->tokens = i < c->depth ? m->T : 1;
        if (u->type == &vit__block) {
            snprintf(u->name, sizeof u->name, "block %zu", i - 1);
            if (c->depth > 1) u->drop_path = c->drop_path * (double)(i - 1) / (double)(c->depth - 1);
        } else {
            snprintf(u->name, sizeof u->name, i == 0 ? "embedding" : "head");
        }
        u->type->tensors(u, m);
        u->trainable = u->count;
        if (c->freeze_backbone) vit__freeze_backbone(u);
        for (size_t t = 0; t < u->tensors; t++) m->parameters += u->tensor[t].count;
    }
    return 0;
}

void vit_model_free(vit_model *m) {
    free(m->unit);
    *m = (vit_model){0};
}

/* -------------------------------------------------------------------------------------------- activations */

int vit_is_checkpointed(const vit_activations *a, const vit_unit *unit) {
    return !a->inference && a->checkpoint_every && unit->type == &vit__block &&
           unit->index % a->checkpoint_every == 0;
}

/* Unit u's output, and what it saves, may lie where those of an earlier unit lay: which one's? u: nobody's.
 * The head's output is of another shape. */
static size_t vit__output_of(const vit_activations *a, const vit_model *m, size_t u) {
    return a->inference && u >= 2 && u + 1 < m->units ? u - 2 : u;
}

static size_t vit__saved_of(const vit_activations *a, const vit_model *m, size_t u) {
    if (a->inference) return 0;
    return vit_is_checkpointed(a, &m->unit[u]) ? a->checkpoint_every : u;
}

int vit_activations_init(vit_activations *a, rt_rank *rank, const vit_device *device, const vit_model *m,
                         size_t B, int inference, size_t checkpoint_every) {
    *a = (vit_activations){.B = B,
                           .inference = inference,
                           .checkpoint_every = checkpoint_every,
                           .out = calloc(m->units, sizeof(rt_block)),
                           .saved = calloc(m->units, sizeof(rt_block))};
    if (!a->out || !a->saved) {
        free(a->out);
        free(a->saved);
        *a = (vit_activations){0};
        return rt_fail(rank, "rank %d: out of memory", rank->rank);
    }
    if (B < 1) return rt_fail(rank, "rank %d: impossible batch of 0 images", rank->rank);
    size_t pixels = vit__count(m->C, m->config.image_height, m->config.image_width);
    a->batch.images = rt_alloc(rank, RT_ACTIVATIONS, vit__statistic(m), vit__count(B, pixels, 1), 1);
    a->batch.labels = rt_alloc(rank, RT_ACTIVATIONS, RT_I32, B, 1);
    a->batch.sample_keys = rt_alloc(rank, RT_ACTIVATIONS, RT_U64, B, 1);
    for (size_t u = 0; u < m->units; u++) { /* room for the neediest of those that share it */
        size_t bytes = vit_unit_saved_bytes(m, device, &m->unit[u], B);
        rt_block *saved = &a->saved[vit__saved_of(a, m, u)];
        if (saved->count < bytes) saved->count = bytes;
    }
    for (size_t u = 0; u < m->units && !rt_failed(rank); u++) {
        size_t count = vit_unit_output(m, &m->unit[u], B);
        size_t output = vit__output_of(a, m, u), saved = vit__saved_of(a, m, u);
        a->out[u] = output < u ? rt_slice(a->out[output], 0, count)
                               : rt_alloc(rank, RT_ACTIVATIONS, m->type, count, 1);
        a->saved[u] =
            saved < u ? a->saved[saved] : rt_alloc(rank, RT_ACTIVATIONS, RT_U8, a->saved[u].count, 1);
    }
    for (int i = 0; i < 2 && !inference; i++)
        a->gradient[i] = rt_alloc(rank, RT_ACTIVATIONS, m->type, vit__count(B, m->T, m->D), 1);
    a->losses = rt_alloc(rank, RT_ACTIVATIONS, vit__statistic(m), B, 1);
    a->workspace = rt_alloc(rank, RT_WORKSPACE, RT_U8, vit_workspace_bytes(m, B), 1);
    return rt_failed(rank) ? -1 : 0;
}

void vit_activations_free(vit_activations *a, rt_rank *rank, const vit_model *m) {
    for (size_t u = 0; u < m->units; u++) {
        if (a->out && vit__output_of(a, m, u) == u) rt_free(rank, RT_ACTIVATIONS, &a->out[u]);
        if (a->saved && vit__saved_of(a, m, u) == u) rt_free(rank, RT_ACTIVATIONS, &a->saved[u]);
    }
    rt_block *blocks[] = {&a->batch.images, &a->batch.labels, &a->batch.sample_keys,
                          &a->gradient[0],  &a->gradient[1],  &a->losses};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) rt_free(rank, RT_ACTIVATIONS, blocks[i]);
    rt_free(rank, RT_WORKSPACE, &a->workspace);
    free(a->out);
    free(a->saved);
    *a = (vit_activations){0};
}

/* -------------------------------------------------------------------------------------------- one replica */

static rt_block vit__replica_unit(const vit_replica *vit, rt_block flat, size_t u) {
    return rt_slice(flat, vit->offset[u], vit->model.unit[u].count);
}

static int vit__open(vit_replica *vit, const vit_config *config, const vit_device *device, rt_type type,
                     size_t B, error_text *e) {
    *vit = (vit_replica){.device = device};
    if (!(device->types & 1u << type))
        return error_set(e, "device %s does not compute in this type", device->name);
    if (vit_model_init(&vit->model, config, type, e)) return -1;
    const vit_model *m = &vit->model;
    vit->offset = calloc(m->units + 1, sizeof *vit->offset);
    if (!vit->offset || rt_world_init(&vit->world, 1, RT_CHECK)) return error_set(e, "out of memory");
    rt_rank *rank = &vit->world.ranks[0];
    if (device->open(rank, e)) return -1;
    for (size_t u = 0; u < m->units; u++) vit->offset[u + 1] = vit->offset[u] + m->unit[u].count;
    vit->parameters = rt_alloc(rank, RT_PARAMETERS, type, vit->offset[m->units], 1);
    vit->gradients = rt_alloc(rank, RT_GRADIENTS, type, vit->offset[m->units], 1);
    if (rt_failed(rank) || vit_activations_init(&vit->activations, rank, device, m, B, 0, 0))
        return error_set(e, "%s", vit->world.error.text);
    vit->context = (vit_context){.rank = rank,
                                 .stream = RT_COMPUTE,
                                 .device = device,
                                 .model = m,
                                 .batch = &vit->activations.batch,
                                 .B = B,
                                 .training = 1,
                                 .losses = vit->activations.losses,
                                 .workspace = vit->activations.workspace};
    if (type != RT_FP32) return 0; /* the tests' double precision brings its own weights */
    for (size_t u = 0; u < m->units; u++) {
        float *values = malloc(m->unit[u].count * sizeof *values);
        if (!values) return error_set(e, "out of memory");
        vit_unit_initialise(&m->unit[u], 0, values);
        vit_copy_in(&vit->context, vit__replica_unit(vit, vit->parameters, u), values);
        free(values);
    }
    return 0;
}

void vit_close(vit_replica *vit) {
    rt_rank *rank = vit->world.ranks;
    if (rank && rank->release) {
        vit_activations_free(&vit->activations, rank, &vit->model);
        rt_free(rank, RT_PARAMETERS, &vit->parameters);
        rt_free(rank, RT_GRADIENTS, &vit->gradients);
        vit->device->close(rank);
    }
    if (rank) rt_world_free(&vit->world);
    free(vit->offset);
    vit_model_free(&vit->model);
    *vit = (vit_replica){0};
}

int vit_open(vit_replica *vit, const vit_config *config, const vit_device *device, rt_type type, size_t B,
             error_text *e) {
    int failed = vit__open(vit, config, device, type, B, e);
    if (failed) vit_close(vit);
    return failed;
}

double vit_forward(vit_replica *vit, const void *images, const int32_t *labels) {
    const vit_context *c = &vit->context;
    vit_activations *a = &vit->activations;
    vit_copy_in(c, a->batch.images, images);
    vit_copy_in(c, a->batch.labels, labels);
    for (size_t u = 0; u < vit->model.units; u++)
        vit_unit_forward(c, &vit->model.unit[u], vit__replica_unit(vit, vit->parameters, u),
                         u ? a->out[u - 1] : (rt_block){0}, a->out[u], a->saved[u]);
    double loss = 0;
    void *losses = malloc(a->B * rt_type_size(a->losses.type));
    if (!losses || rt_failed(c->rank))
        loss = NAN;
    else
        vit_copy_out(c, losses, a->losses);
    for (size_t b = 0; b < a->B && !isnan(loss); b++)
        loss += (a->losses.type == RT_FP64 ? ((double *)losses)[b] : ((float *)losses)[b]) / (double)a->B;
    free(losses);
    return loss;
}

void vit_backward(vit_replica *vit) {
    vit_activations *a = &vit->activations;
    for (size_t u = vit->model.units; u-- > 0;)
        vit_unit_backward(&vit->context, &vit->model.unit[u], vit__replica_unit(vit, vit->parameters, u),
                          vit__replica_unit(vit, vit->gradients, u), u ? a->out[u - 1] : (rt_block){0},
                          a->saved[u], a->gradient[(u + 1) % 2], a->gradient[u % 2]);
}

void vit_logits(vit_replica *vit, void *logits) {
    vit_copy_out(&vit->context, logits, vit->activations.out[vit->model.units - 1]);
}

#endif /* VIT_IMPLEMENTATION */
