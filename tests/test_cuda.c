/* test_cuda.c - vit_cuda in fp32, bf16 and fp16 against the naive device in double: attention, whose
 * 16-bit kernels are for heads of 64 and 80, and the gradients of a small model. Other operations:
 * tests/test_ops.c. Needs a GPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define VIT_IMPLEMENTATION
#include "vit.h"
#include "naive_device.h"
#include "staged_device.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const struct {
    const char *name;
    rt_type type;
    double operation,
        model; /* bars of NMSE: one rounding of a result is 2^-18 (bf16), 2^-24 (fp16) at most */
} types[] = {{"fp32", RT_FP32, 1e-10, 1e-10}, {"bf16", RT_BF16, 1e-5, 1e-3}, {"fp16", RT_FP16, 2e-7, 1e-5}};

/* x as the type holds it. */
static double rounded(double x, rt_type type) {
    float f = (float)x;
    uint16_t h;
    if (type == RT_FP32) return (double)f;
    rt_narrow(&h, &f, 1, type);
    rt_widen(&f, &h, 1, type);
    return (double)f;
}

static double get(rt_block b, size_t i) {
    float f;
    if (b.type == RT_FP64) return ((const double *)b.data)[i];
    if (b.type == RT_FP32) return (double)((const float *)b.data)[i];
    rt_widen(&f, (const uint16_t *)b.data + i, 1, b.type);
    return (double)f;
}

static void set(rt_block b, size_t i, double x) {
    float f = (float)x;
    if (b.type == RT_FP64)
        ((double *)b.data)[i] = x;
    else if (b.type == RT_FP32)
        ((float *)b.data)[i] = f;
    else
        rt_narrow((uint16_t *)b.data + i, &f, 1, b.type);
}

/* NaN in every element: what an operation fails to write shows. */
static rt_block block_new(rt_type type, size_t count) {
    rt_block b = {.data = malloc(count * rt_type_size(type)), .type = type, .count = count};
    assert_non_null(b.data);
    memset(b.data, 0xFF, count * rt_type_size(type));
    return b;
}

/* The same normal numbers, exact in the type, in two blocks. */
static void fill_normal(rt_block a, rt_block b, rt_type type, uint64_t seed) {
    for (size_t i = 0; i < a.count; i++) {
        double x = rounded(random_normal(random_key(seed, 0, 0, 0), i), type);
        set(a, i, x);
        set(b, i, x);
    }
}

/* Squared distance / squared size of elements [begin, end). */
static double nmse(rt_block got, rt_block expected, size_t begin, size_t end) {
    double distance = 0, size = 0;
    for (size_t i = begin; i < end; i++) {
        double d = get(got, i) - get(expected, i);
        distance += d * d;
        size += get(expected, i) * get(expected, i);
    }
    return distance == 0 ? 0 : distance / size;
}

/* Forward and backward of `run` on one device. */
typedef struct {
    rt_world world;
    const vit_device *device;
    rt_block qkv, out, saved, dout, dqkv;
} attention;

static void attention_open(attention *a, const vit_device *device, rt_type type, size_t B, size_t T, size_t Q,
                           size_t H, size_t hd) {
    error_text e;
    *a = (attention){.device = device};
    assert_int_equal(rt_world_init(&a->world, 1, 0), 0);
    if (device->open(&a->world.ranks[0], &e)) fail_msg("%s", e.text);
    a->qkv = block_new(type, B * T * 3 * H * hd);
    a->dqkv = block_new(type, B * T * 3 * H * hd);
    a->out = block_new(type, B * Q * H * hd);
    a->dout = block_new(type, B * Q * H * hd);
    a->saved = block_new(type == RT_FP64 ? RT_FP64 : RT_FP32, device->attention_saved(B, T, Q, H, hd));
}

static void attention_run(attention *a, size_t B, size_t T, size_t Q, size_t H, size_t hd) {
    rt_stream *s = &a->world.ranks[0].stream[RT_COMPUTE];
    a->device->attention_forward(s, a->out, a->saved, a->qkv, B, T, Q, H, hd);
    a->device->attention_backward(s, a->dqkv, a->dout, a->qkv, a->out, a->saved, B, T, Q, H, hd);
}

static void attention_close(attention *a) {
    rt_block blocks[] = {a->qkv, a->out, a->saved, a->dout, a->dqkv};
    a->device->close(&a->world.ranks[0]);
    rt_world_free(&a->world);
    for (size_t i = 0; i < COUNT(blocks); i++) free(blocks[i].data);
}

static void attention_agrees_with_the_naive_device(void **state) {
    static const size_t tokens[] = {16, 17, 64, 65, 129, 197, 257}, heads[] = {64, 80, 40};
    const vit_device staged = staged_device();
    double worst[COUNT(types)] = {0};
    (void)state;
    for (size_t k = 0; k < COUNT(types) * COUNT(tokens) * COUNT(heads) * 3; k++) {
        size_t type = k % COUNT(types), T = tokens[k / COUNT(types) % COUNT(tokens)], B = 2, H = 2;
        size_t hd = heads[k / COUNT(types) / COUNT(tokens) % COUNT(heads)];
        size_t left = k / COUNT(types) / COUNT(tokens) / COUNT(heads), Q = left == 0   ? T
                                                                           : left == 1 ? 1
                                                                                       : T / 2;
        attention a, b;
        attention_open(&a, &staged, types[type].type, B, T, Q, H, hd);
        attention_open(&b, &naive_fp64, RT_FP64, B, T, Q, H, hd);
        fill_normal(a.qkv, b.qkv, types[type].type, 1);
        fill_normal(a.dout, b.dout, types[type].type, 2);
        attention_run(&a, B, T, Q, H, hd);
        attention_run(&b, B, T, Q, H, hd);
        double forward = nmse(a.out, b.out, 0, b.out.count), backward = nmse(a.dqkv, b.dqkv, 0, b.dqkv.count);
        if (!(forward <= types[type].operation && backward <= types[type].operation))
            fail_msg("%s, %zu tokens, %zu queries, head %zu: NMSE %g forward, %g backward, allowed %g",
                     types[type].name, T, Q, hd, forward, backward, types[type].operation);
        for (size_t i = 0; i < B * T; i++) /* exactly, not nearly */
            for (size_t j = 0; j < H * hd && i % T >= Q; j++)
                assert_true(get(a.dqkv, i * 3 * H * hd + j) == 0);
        worst[type] = fmax(worst[type], fmax(forward, backward));
        attention_close(&a);
        attention_close(&b);
    }
    for (size_t i = 0; i < COUNT(types); i++)
        print_message("             %s: largest NMSE %.1e\n", types[i].name, worst[i]);
}

/* 5 x 7 patches; the last block has one query. */
static const vit_config config = {.image_height = 20,
                                  .image_width = 28,
                                  .channels = 3,
                                  .patch_size = 4,
                                  .embed_dim = 128,
                                  .depth = 3,
                                  .num_heads = 2,
                                  .num_classes = 7,
                                  .mlp_ratio = 2,
                                  .layer_norm_eps = 1e-6,
                                  .drop_path = 0.3,
                                  .label_smoothing = 0.1};
enum { BATCH = 3, PIXELS = BATCH * 3 * 20 * 28 };

static void compare_gradients_of_a_model(vit_gelu form) {
    static const int32_t labels[BATCH] = {1, 5, 3};
    static const uint64_t keys[BATCH] = {11, 22, 33};
    vit_config c = config;
    c.gelu = form;
    for (size_t k = 0; k < COUNT(types); k++) {
        rt_type type = types[k].type;
        vit_replica gpu, naive;
        error_text e;
        if (vit_open(&gpu, &c, &vit_cuda, type, BATCH, &e)) fail_msg("%s", e.text);
        if (vit_open(&naive, &c, &naive_fp64, RT_FP64, BATCH, &e)) fail_msg("%s", e.text);
        const vit_model *m = &naive.model;
        rt_block weights = block_new(type, naive.parameters.count),
                 gradients = block_new(type, weights.count);
        for (size_t u = 0; u < m->units; u++) {
            float *values = malloc(m->unit[u].count * sizeof *values);
            vit_unit_initialise(&m->unit[u], 3, values);
            for (size_t i = 0; i < m->unit[u].count; i++) {
                double x =
                    rounded(2 * (double)values[i], type); /* larger, for attention to have an opinion */
                set(weights, naive.offset[u] + i, x);
                set(naive.parameters, naive.offset[u] + i, x);
            }
            free(values);
        }
        vit_copy_in(&gpu.context, gpu.parameters, weights.data);
        float *images = malloc(PIXELS * sizeof *images);
        double *exact = malloc(PIXELS * sizeof *exact), worst = 0;
        for (size_t i = 0; i < PIXELS; i++)
            images[i] = (float)(exact[i] = rounded(random_normal(random_key(9, 0, 0, 0), i), type));
        vit_copy_in(&gpu.context, gpu.activations.batch.sample_keys, keys);
        vit_copy_in(&naive.context, naive.activations.batch.sample_keys, keys);
        double loss = vit_forward(&gpu, images, labels), expected = vit_forward(&naive, exact, labels);
        vit_backward(&gpu);
        vit_backward(&naive);
        vit_copy_out(&gpu.context, gradients.data, gpu.gradients);
        if (rt_failed(gpu.context.rank)) fail_msg("%s", gpu.world.error.text);
        assert_true(fabs(loss - expected) <= 10 * sqrt(types[k].operation) * expected);
        for (size_t u = 0; u < m->units; u++)
            for (size_t t = 0; t < m->unit[u].tensors; t++) {
                const vit_tensor *x = &m->unit[u].tensor[t];
                size_t begin = naive.offset[u] + x->offset;
                double error = nmse(gradients, naive.gradients, begin, begin + x->count);
                if (!(error <= types[k].model))
                    fail_msg("%s, gradient of %s: NMSE %g, allowed %g", types[k].name, x->name, error,
                             types[k].model);
                worst = fmax(worst, error);
            }
        print_message("             %s: largest NMSE of a gradient %.1e\n", types[k].name, worst);
        free(images);
        free(exact);
        free(weights.data);
        free(gradients.data);
        vit_close(&gpu);
        vit_close(&naive);
    }
}

static void gradients_of_a_model_are_those_of_the_naive_device(void **state) {
    (void)state;
    compare_gradients_of_a_model(VIT_GELU_ERF);
}

static void gradients_of_a_model_with_gelu_by_tanh_are_those_of_the_naive_device(void **state) {
    (void)state;
    compare_gradients_of_a_model(VIT_GELU_TANH);
}

static void no_device(void **state) {
    (void)state;
    skip();
}

int main(void) {
    const struct CMUnitTest skipped[] = {cmocka_unit_test(no_device)};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_agrees_with_the_naive_device),
        cmocka_unit_test(gradients_of_a_model_are_those_of_the_naive_device),
        cmocka_unit_test(gradients_of_a_model_with_gelu_by_tanh_are_those_of_the_naive_device),
    };
    double unused, total;
    error_text e;
    if (!vit_cuda.memory(0, 1, &unused, &total, &e)) return cmocka_run_group_tests(tests, NULL, NULL);
    print_message("skipped: vit_cuda in 16 bits: %s\n", e.text);
    return cmocka_run_group_tests(skipped, NULL, NULL);
}
