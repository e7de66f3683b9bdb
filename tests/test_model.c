/* test_model.c - the whole model against PyTorch and timm: logits, loss, gradients, training, names, files.
 * And what its configuration, initialisation and drop-path promise.
 *
 * The expected numbers lie in tests/golden beside the script that made them, whose docstring defines the
 * inputs (a formula) and the bars. Run from the root of the repository:
 *
 *     gcc -O2 -march=native -std=gnu11 -fopenmp -I. -DHAVE_OPENBLAS tests/test_model.c vit_cpu.c \
 *         -lcmocka -lcjson -lopenblas -lm -o test_model && ./test_model
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "dist.h"
#include "io/safetensors.h"
#include "tests/naive_device.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* AddressSanitizer asks this: too large an allocation fails, as without it, and does not end the program. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

static double number(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    if (!cJSON_IsNumber(item)) fail_msg("found %s as '%s', expected a number", json_kind(item), key);
    return item->valuedouble;
}

static size_t whole(const cJSON *object, const char *key) { return (size_t)number(object, key); }

static const char *string(const cJSON *object, const char *key) {
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, key)); /* NULL: none */
}

static const cJSON *list(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    if (!cJSON_IsArray(item)) fail_msg("found %s as '%s', expected an array", json_kind(item), key);
    return item;
}

static double element(const cJSON *array, size_t i) { return cJSON_GetArrayItem(array, (int)i)->valuedouble; }

static cJSON *read_json(const char *path) {
    error_text e;
    char *text;
    size_t length;
    if (file_read_whole(path, 1 << 20, &text, &length, &e)) fail_msg("%s", e.text);
    cJSON *root = json_parse(text, length, JSON_ANY_NUMBERS, path, &e);
    if (!root) fail_msg("%s", e.text);
    free(text);
    return root;
}

/* ---------------------------------------------------------------------------------- a model that computes */

/* What computes: vit_cpu with each of its matrix products, or the oracle in double. */
typedef struct {
    const char *name;
    const vit_device *device;
    rt_type type;
    vit_matmul matmul; /* of vit_cpu */
} machine;

static const machine naive = {"naive device in double", &naive_fp64, RT_FP64, VIT_MATMUL_AUTO};
static const machine own = {"own product", &vit_cpu, RT_FP32, VIT_MATMUL_OWN};
#ifdef HAVE_OPENBLAS
static const machine openblas = {"OpenBLAS", &vit_cpu, RT_FP32, VIT_MATMUL_OPENBLAS};
static const machine *const fast[] = {&own, &openblas};
#else
static const machine *const fast[] = {&own};
#endif

static void model_open(vit_replica *vit, const vit_config *config, const machine *m, size_t B) {
    error_text e;
    if (vit_open(vit, config, m->device, m->type, B, &e)) fail_msg("%s", e.text);
    if (m->device == &vit_cpu && vit_cpu_matmul(vit->context.rank, m->matmul, &e)) fail_msg("%s", e.text);
}

/* The values in the type of the model; the caller frees them. */
static void *typed(rt_type type, const double *values, size_t count) {
    void *out = malloc(count * rt_type_size(type));
    for (size_t i = 0; i < count; i++) {
        if (type == RT_FP64)
            ((double *)out)[i] = values[i];
        else
            ((float *)out)[i] = (float)values[i];
    }
    return out;
}

static void put(vit_replica *vit, rt_block to, const double *values) {
    void *numbers = typed(to.type, values, to.count);
    vit_copy_in(&vit->context, to, numbers);
    free(numbers);
}

/* A copy on the host, which the caller frees. */
static double *get(vit_replica *vit, rt_block from) {
    void *numbers = malloc(from.count * rt_type_size(from.type));
    double *values = malloc(from.count * sizeof *values);
    vit_copy_out(&vit->context, numbers, from);
    if (rt_failed(vit->context.rank)) fail_msg("%s", vit->world.error.text);
    for (size_t i = 0; i < from.count; i++)
        values[i] = from.type == RT_FP64 ? ((double *)numbers)[i] : ((float *)numbers)[i];
    free(numbers);
    return values;
}

static double *logits_of(vit_replica *vit) { return get(vit, vit->activations.out[vit->model.units - 1]); }

static double forward(vit_replica *vit, const double *images, const int32_t *labels) {
    void *pixels = typed(vit->model.type, images, vit->activations.batch.images.count);
    double loss = vit_forward(vit, pixels, labels);
    free(pixels);
    return loss;
}

/* The tensor of that name, and where it begins in the flat run of all parameters or gradients. */
static const vit_tensor *find_tensor(const vit_replica *vit, const char *name, size_t *offset) {
    for (size_t u = 0; u < vit->model.units; u++)
        for (const vit_tensor *t = vit->model.unit[u].tensor; t->dims; t++)
            if (strcmp(t->name, name) == 0) {
                *offset = vit->offset[u] + t->offset;
                return t;
            }
    fail_msg("found no tensor %s in the model, expected one", name);
    return NULL;
}

/* Normalised mean square error; infinite where a number is not. */
static double nmse(const double *values, const double *expected, size_t count) {
    double error = 0, size = 0;
    for (size_t i = 0; i < count; i++) {
        error += (values[i] - expected[i]) * (values[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    return error == 0 ? 0 : error / size < INFINITY ? error / size : INFINITY;
}

/* ------------------------------------------------------------------------------------- goldens: one batch */

/* A configuration of golden.json, and the formula of its inputs. */
typedef struct {
    const cJSON *entry;
    vit_config config;
    size_t batch;
    uint64_t seed;
} golden;

static golden golden_of(const cJSON *entry) {
    return (golden){.entry = entry,
                    .config = {.image_height = whole(entry, "height"),
                               .image_width = whole(entry, "width"),
                               .channels = whole(entry, "channels"),
                               .patch_size = whole(entry, "patch"),
                               .embed_dim = whole(entry, "dim"),
                               .depth = whole(entry, "depth"),
                               .num_heads = whole(entry, "heads"),
                               .num_classes = whole(entry, "classes"),
                               .mlp_ratio = number(entry, "mlp_ratio"),
                               .layer_norm_eps = number(entry, "eps"),
                               .label_smoothing = number(entry, "label_smoothing")},
                    .batch = whole(entry, "batch"),
                    .seed = whole(entry, "seed")};
}

static double formula(uint64_t key, size_t i, int bits, double scale) {
    return (floor(ldexp(random_uniform(key, i), bits)) / ldexp(1, bits) - 0.5) * scale;
}

static size_t pixels_of(const vit_config *c) { return c->channels * c->image_height * c->image_width; }

/* Sample b of the batch of a step. */
static void golden_sample(uint64_t seed, const vit_config *c, size_t step, size_t b, double *image,
                          int32_t *label) {
    size_t pixels = pixels_of(c);
    uint64_t key = random_key(seed, 2000, step, 0);
    for (size_t i = 0; i < pixels; i++) image[i] = formula(key, b * pixels + i, 12, 4);
    *label = (int32_t)random_below(random_key(seed, 3000, step, 0), b, c->num_classes);
}

/* The parameters of one unit, padding 0; the number of a tensor is its place in the list of the golden. */
static void golden_unit(const golden *g, const vit_unit *unit, double *values) {
    memset(values, 0, unit->count * sizeof *values);
    for (const vit_tensor *t = unit->tensor; t < unit->tensor + unit->tensors; t++) {
        size_t index = 0;
        const cJSON *name = list(g->entry, "parameters")->child;
        for (; name && strcmp(name->valuestring, t->name); name = name->next) index++;
        if (!name) fail_msg("found a tensor %s that timm does not have", t->name);
        int positions = !strcmp(t->name, "cls_token") || !strcmp(t->name, "pos_embed");
        int scale = strstr(t->name, "norm") && strstr(t->name, "weight");
        for (size_t i = 0; i < t->count; i++)
            values[t->offset + i] =
                scale + formula(random_key(g->seed, 1000 + index, 0, 0), i, 20, positions ? 0.5 : 0.25);
    }
}

/* Gives the replica the golden's weights and checks them by their sum, which is exact. */
static void put_golden_weights(vit_replica *vit, const golden *g) {
    double *weights = malloc(vit->parameters.count * sizeof *weights), sum = 0;
    size_t tensors = 0;
    for (size_t u = 0; u < vit->model.units; u++) {
        golden_unit(g, &vit->model.unit[u], weights + vit->offset[u]);
        tensors += vit->model.unit[u].tensors;
    }
    for (size_t i = 0; i < vit->parameters.count; i++) sum += weights[i];
    assert_int_equal(tensors, cJSON_GetArraySize(list(g->entry, "parameters")));
    assert_true(sum == number(g->entry, "weights_sum"));
    put(vit, vit->parameters, weights);
    free(weights);
}

/* The double values of a tensor of a golden's file, which the caller frees. */
static double *golden_tensor(const safetensors *file, const char *name, size_t count) {
    const st_tensor *t = safetensors_find(file, name);
    if (!t || t->dtype != ST_F64 || t->count != count)
        fail_msg("%s: expected %zu doubles of name %s", file->path, count, name);
    double *values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = st_read_f64(file->bytes + t->offset + 8 * i);
    return values;
}

/* Keeps the largest of the distances, each in units of what is allowed, and says which it was. */
static void keep_worst(double *worst, error_text *which, double distance, const char *who, const char *where,
                       const char *what, double found, double allowed) {
    if (!(distance > *worst) && !isnan(distance)) return;
    *worst = isnan(distance) ? INFINITY : distance;
    error_set(which, "%s, %s, %s: found an error of %.3g, allowed %.3g", who, where, what, found, allowed);
}

/* How far the machine is from the golden: the largest NMSE of a tensor, or error of the loss, in units of its
 * bar; up to 1 they agree. With bar > 0 that is the bar of every tensor, and its root that of the loss. */
static double distance_to_golden(const golden *g, const machine *m, double bar, error_text *which) {
    const char *name = string(g->entry, "name");
    size_t B = g->batch, pixels = pixels_of(&g->config);
    vit_replica vit;
    model_open(&vit, &g->config, m, B);
    put_golden_weights(&vit, g);

    double *images = malloc(B * pixels * sizeof *images), sum = 0, worst = 0;
    int32_t *labels = malloc(B * sizeof *labels);
    for (size_t b = 0; b < B; b++) {
        golden_sample(g->seed, &g->config, 0, b, images + b * pixels, &labels[b]);
        assert_true(labels[b] == element(list(g->entry, "labels"), b));
    }
    for (size_t i = 0; i < B * pixels; i++) sum += images[i];
    assert_true(sum == number(g->entry, "images_sum"));
    double loss = forward(&vit, images, labels);
    vit_backward(&vit);

    double error = fabs(loss - number(g->entry, "loss"));
    double tolerance = bar > 0 ? sqrt(bar) : number(g->entry, "loss_tolerance");
    keep_worst(&worst, which, error / tolerance, m->name, name, "loss", error, tolerance);

    char path[256];
    snprintf(path, sizeof path, "tests/golden/%s", string(g->entry, "file"));
    safetensors file;
    if (safetensors_open(path, &file, which)) fail_msg("%s", which->text);
    double *logits = logits_of(&vit), *gradients = get(&vit, vit.gradients);
    const cJSON *item;
    cJSON_ArrayForEach(item, list(g->entry, "tensors")) {
        const char *tensor = string(item, "name");
        double *found = logits, allowed = bar > 0 ? bar : number(item, "bar");
        size_t count = B * vit.model.V, offset;
        if (strcmp(tensor, "logits")) {
            const vit_tensor *t = find_tensor(&vit, tensor + strlen("grad."), &offset);
            found = gradients + offset;
            count = t->count;
        }
        double *expected = golden_tensor(&file, tensor, count);
        error = nmse(found, expected, count);
        keep_worst(&worst, which, error / allowed, m->name, name, tensor, error, allowed);
        free(expected);
    }
    safetensors_close(&file);
    free(logits);
    free(gradients);
    free(images);
    free(labels);
    vit_close(&vit);
    return worst;
}

static void logits_loss_and_every_gradient_are_pytorchs(void **state) {
    (void)state;
    cJSON *file = read_json("tests/golden/golden.json");
    const cJSON *entry;
    error_text which;
    size_t configurations = 0;
    cJSON_ArrayForEach(entry, list(file, "goldens")) {
        if (string(entry, "wrong")) continue;
        golden g = golden_of(entry);
        configurations++;
        assert_int_equal(cJSON_GetArraySize(list(entry, "tensors")),
                         cJSON_GetArraySize(list(entry, "parameters")) + 1);
        if (distance_to_golden(&g, &naive, 1e-20, &which) > 1) fail_msg("%s", which.text);
        for (size_t i = 0; i < COUNT(fast); i++) {
            double distance = distance_to_golden(&g, fast[i], 0, &which);
            if (distance > 1) fail_msg("%s", which.text);
            print_message("             at worst %.2f of the bar: %s\n", distance, which.text);
        }
    }
    assert_true(configurations >= 4);
    cJSON_Delete(file);
}

/* The same comparison, with goldens that were computed with another eps or GELU than they declare. */
static void goldens_of_a_wrong_model_are_rejected(void **state) {
    (void)state;
    cJSON *file = read_json("tests/golden/golden.json");
    const cJSON *entry;
    error_text which;
    size_t wrong = 0;
    cJSON_ArrayForEach(entry, list(file, "goldens")) {
        if (!string(entry, "wrong")) continue;
        golden g = golden_of(entry);
        wrong++;
        assert_true(distance_to_golden(&g, &naive, 1e-20, &which) > 1);
        for (size_t i = 0; i < COUNT(fast); i++) assert_true(distance_to_golden(&g, fast[i], 0, &which) > 1);
        /* that is all that is wrong: with the other one the model agrees */
        if (!strcmp(string(entry, "wrong"), "eps"))
            g.config.layer_norm_eps = g.config.layer_norm_eps == 1e-12 ? 1e-6 : 1e-5;
        else
            g.config.gelu = VIT_GELU_TANH;
        if (distance_to_golden(&g, &naive, 1e-20, &which) > 1) fail_msg("%s", which.text);
        for (size_t i = 0; i < COUNT(fast); i++)
            if (distance_to_golden(&g, fast[i], 0, &which) > 1) fail_msg("%s", which.text);
    }
    assert_int_equal(wrong, 3);
    cJSON_Delete(file);
}

/* -------------------------------------------------------------------------------------- goldens: 24 steps */

enum { STEPS = 24 };

/* One entry of trajectories.json, trained by a strategy. Ranks only read it; rank 0 writes what it saw. */
typedef struct {
    const char *name, *strategy;
    golden g;
    vit_model model;
    float *weights; /* all units, one after the other */
    dist_options options;
    double learning_rate[STEPS];
    int ranks;
    vit_matmul matmul;
    dist_hub *hub;
    double loss[STEPS], norm[STEPS];
} trajectory;

/* Rank r of N takes the samples (b M + m) N + r of the global batch, b of micro-batch m of M. */
static void train_steps(trajectory *t, dist *d) {
    const vit_config *c = &t->g.config;
    size_t B = t->options.batch_size, M = t->options.accumulation, N = (size_t)t->ranks;
    size_t r = (size_t)d->rank->rank, pixels = pixels_of(c);
    double *images = malloc(B * pixels * sizeof *images);
    int32_t *labels = malloc(B * sizeof *labels);
    const float *weights = t->weights;
    for (size_t u = 0; u < t->model.units; weights += t->model.unit[u++].count) dist_import(d, u, weights);
    for (size_t step = 0; step < STEPS; step++) {
        dist_result result;
        dist_begin_step(d, step + 1, t->learning_rate[step]);
        for (size_t m = 0; m < M; m++) {
            for (size_t b = 0; b < B; b++)
                golden_sample(t->g.seed, c, step, (b * M + m) * N + r, images + b * pixels, &labels[b]);
            float *batch = typed(RT_FP32, images, B * pixels);
            dist_micro_batch(d, m, batch, labels, NULL);
            free(batch);
        }
        dist_end_step(d, &result);
        if (r == 0) t->loss[step] = result.loss, t->norm[step] = result.gradient_norm;
    }
    free(images);
    free(labels);
}

static int train_rank(rt_rank *rank, void *argument) {
    trajectory *t = argument;
    error_text e = {{0}};
    dist_comm comm;
    dist d = {0};
    if (vit_cpu.open(rank, &e) || vit_cpu_matmul(rank, t->matmul, &e)) return rt_fail(rank, "%s", e.text);
    if (dist_comm_open(&comm, t->hub, rank, &vit_cpu)) return -1;
    if (dist_open(&d, &comm, &t->model, &t->options, &e) == 0)
        train_steps(t, &d);
    else if (!rt_failed(rank))
        rt_fail(rank, "%s", e.text);
    dist_close(&d);
    dist_comm_close(&comm);
    vit_cpu.close(rank);
    return 0;
}

static void train(trajectory *t) {
    error_text e;
    rt_world world;
    if (vit_model_init(&t->model, &t->g.config, RT_FP32, &e)) fail_msg("%s", e.text);
    size_t count = 0;
    for (size_t u = 0; u < t->model.units; u++) count += t->model.unit[u].count;
    double *weights = malloc(count * sizeof *weights), *unit = weights;
    for (size_t u = 0; u < t->model.units; unit += t->model.unit[u++].count)
        golden_unit(&t->g, &t->model.unit[u], unit);
    t->weights = typed(RT_FP32, weights, count);
    assert_int_equal(rt_world_init(&world, t->ranks, RT_CHECK), 0);
    t->hub = dist_hub_create(&world);
    if (rt_run(&world, train_rank, t))
        fail_msg("%s, %s: %s\n%s", t->name, t->strategy, world.error.text, world.table ? world.table : "");
    dist_hub_free(t->hub);
    rt_world_free(&world);
    vit_model_free(&t->model);
    free(weights);
    free(t->weights);
}

static trajectory trajectory_of(const cJSON *run, const cJSON *goldens) {
    const cJSON *g = goldens->child;
    while (strcmp(string(g, "name"), string(run, "configuration"))) g = g->next;
    int adamw = !strcmp(string(run, "optimizer"), "adamw");
    trajectory t = {.name = string(run, "name"),
                    .g = golden_of(g),
                    .options = {.gradient_clipping = number(run, "gradient_clipping"),
                                .layer_decay = number(run, "layer_decay"),
                                .bucket_size_mb = 0.05}};
    t.g.config.freeze_backbone = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(run, "freeze_backbone"));
    if (adamw) {
        t.options.optimizer = DIST_ADAMW;
        t.options.adamw = (vit_adamw_options){number(run, "beta1"), number(run, "beta2"),
                                              number(run, "adam_eps"), number(run, "weight_decay")};
    } else {
        t.options.optimizer = DIST_SGD;
        t.options.sgd = (vit_sgd_options){number(run, "momentum"), number(run, "weight_decay")};
    }
    assert_int_equal(whole(run, "steps"), STEPS);
    for (size_t i = 0; i < STEPS; i++) t.learning_rate[i] = element(list(run, "learning_rates"), i);
    return t;
}

/* How far losses and gradient norms are from those of the run in double: the largest error of a step in units
 * of 3 x the drift of PyTorch's own fp32 run up to that step + 1e-6 (loss) or + 1e-6 x norm (norm). */
static double distance_to_trajectory(const trajectory *t, const cJSON *run, error_text *which) {
    double worst = 0;
    char who[128], what[64];
    snprintf(who, sizeof who, "%s on %d ranks x %zu micro-batches", t->strategy, t->ranks,
             t->options.accumulation);
    for (size_t i = 0; i < STEPS; i++) {
        double loss = fabs(t->loss[i] - element(list(run, "loss"), i));
        double norm = fabs(t->norm[i] - element(list(run, "grad_norm"), i));
        double loss_allowed = 3 * element(list(run, "loss_drift"), i) + 1e-6;
        double norm_allowed =
            3 * element(list(run, "grad_norm_drift"), i) + 1e-6 * element(list(run, "grad_norm"), i);
        snprintf(what, sizeof what, "loss of step %zu", i);
        keep_worst(&worst, which, loss / loss_allowed, t->name, who, what, loss, loss_allowed);
        snprintf(what, sizeof what, "gradient norm of step %zu", i);
        keep_worst(&worst, which, norm / norm_allowed, t->name, who, what, norm, norm_allowed);
    }
    return worst;
}

static void training_follows_pytorch_in_double(void **state) {
    (void)state;
    cJSON *file = read_json("tests/golden/trajectories.json"), *other = read_json("tests/golden/golden.json");
    const cJSON *run;
    error_text which;
    size_t right = 0, wrong = 0;
    cJSON_ArrayForEach(run, list(file, "trajectories")) {
        trajectory t = trajectory_of(run, list(other, "goldens"));
        size_t batch = t.g.batch, part = batch % 2 ? batch : 2; /* a number of equal parts of the batch */
        const struct {
            const char *strategy;
            size_t ranks, accumulation;
        } ways[] = {{"single", 1, 1}, {"single", 1, part}, {"ddp", part, 1}, {"dp", part, 1}};
        assert_int_equal(batch % part, 0);
        for (size_t k = 0; k < COUNT(ways) * COUNT(fast); k++) {
            size_t way = k % COUNT(ways);
            t.strategy = t.options.strategy = ways[way].strategy;
            t.ranks = (int)ways[way].ranks;
            t.options.accumulation = ways[way].accumulation;
            t.options.batch_size = batch / ways[way].ranks / ways[way].accumulation;
            t.matmul = fast[k / COUNT(ways)]->matmul;
            train(&t);
            double distance = distance_to_trajectory(&t, run, &which);
            if (string(run, "wrong")) /* decay on biases: the same comparison rejects it */
                assert_true(distance > 1);
            else if (distance > 1)
                fail_msg("%s", which.text);
            else
                print_message("             at worst %.2f of the bar: %s\n", distance, which.text);
        }
        if (string(run, "wrong"))
            wrong++;
        else
            right++;
    }
    assert_int_equal(right, 5);
    assert_int_equal(wrong, 1);
    cJSON_Delete(file);
    cJSON_Delete(other);
}

/* ---------------------------------------------------------------------------------------- names and sizes */

static void built_in_models_have_timms_sizes(void **state) {
    (void)state;
    cJSON *file = read_json("tests/golden/parameters.json");
    const cJSON *entry;
    size_t known = 0;
    error_text e;
    while (vit_config_name(known)) known++;
    assert_int_equal(cJSON_GetArraySize(list(file, "models")), known);
    cJSON_ArrayForEach(entry, list(file, "models")) {
        vit_config c;
        vit_model m;
        if (vit_config_named(&c, string(entry, "name"), &e) || vit_model_init(&m, &c, RT_FP32, &e))
            fail_msg("%s", e.text);
        assert_string_equal(c.name, string(entry, "name"));
        assert_int_equal(c.image_height, whole(entry, "image_size"));
        assert_int_equal(c.image_width, whole(entry, "image_size"));
        assert_int_equal(c.channels, 3);
        assert_int_equal(c.patch_size, whole(entry, "patch_size"));
        assert_int_equal(c.embed_dim, whole(entry, "embed_dim"));
        assert_int_equal(c.depth, whole(entry, "depth"));
        assert_int_equal(c.num_heads, whole(entry, "num_heads"));
        assert_int_equal(c.num_classes, 1000);
        assert_true(c.layer_norm_eps == number(entry, "eps"));
        assert_int_equal(m.F, whole(entry, "mlp_hidden"));
        assert_int_equal(m.parameters, whole(entry, "parameters"));
        vit_model_free(&m);
    }
    assert_int_equal(vit_config_named(&(vit_config){0}, "vit_tiny_patch16_225", &e), -1);
    assert_non_null(strstr(e.text, "vit_tiny_patch16_225"));
    cJSON_Delete(file);
}

static void names_and_shapes_are_timms(void **state) {
    (void)state;
    cJSON *file = read_json("tests/golden/parameters.json");
    const cJSON *entry, *shapes = list(file, "vit_base_patch16_224");
    vit_config c;
    vit_model m;
    error_text e;
    size_t tensors = 0;
    assert_int_equal(vit_config_named(&c, "vit_base_patch16_224", &e), 0);
    assert_int_equal(vit_model_init(&m, &c, RT_FP32, &e), 0);
    for (size_t u = 0; u < m.units; u++)
        for (size_t k = 0; k < m.unit[u].tensors; k++, tensors++) {
            const vit_tensor *t = &m.unit[u].tensor[k];
            for (entry = shapes->child; entry && strcmp(string(entry, "name"), t->name);) entry = entry->next;
            if (!entry) fail_msg("found a tensor %s that timm does not have", t->name);
            assert_int_equal(t->dims, cJSON_GetArraySize(list(entry, "shape")));
            for (size_t i = 0; i < t->dims; i++)
                assert_int_equal(t->shape[i], (size_t)element(list(entry, "shape"), i));
            /* timm decays what has two dimensions or more, but for the embeddings */
            int decays = t->dims > 1 && strcmp(t->name, "cls_token") && strcmp(t->name, "pos_embed");
            assert_int_equal(t->kind, decays ? VIT_DECAY : VIT_NO_DECAY);
            assert_int_equal(t->offset + t->count <= m.unit[u].decayed, decays);
            assert_int_equal(t->offset % VIT_ALIGNMENT, 0);
        }
    assert_int_equal(tensors, cJSON_GetArraySize(shapes));
    vit_model_free(&m);
    cJSON_Delete(file);
}

static void drop_path_rates_are_timms(void **state) {
    (void)state;
    cJSON *file = read_json("tests/golden/parameters.json");
    const cJSON *rates = list(file, "drop_path_rates_of_0_1_at_depth_12");
    vit_config c;
    vit_model m;
    error_text e;
    assert_int_equal(vit_config_named(&c, "vit_base_patch16_224", &e), 0);
    c.drop_path = 0.1;
    assert_int_equal(vit_model_init(&m, &c, RT_FP32, &e), 0);
    assert_int_equal(cJSON_GetArraySize(rates), c.depth);
    for (size_t i = 0; i < c.depth; i++)
        assert_true(fabs(m.unit[i + 1].drop_path - element(rates, i)) < 1e-7);
    assert_true(m.unit[0].drop_path == 0 && m.unit[c.depth + 1].drop_path == 0);
    vit_model_free(&m);
    c.depth = 1; /* the first block's rate is 0, though it is the last */
    assert_int_equal(vit_model_init(&m, &c, RT_FP32, &e), 0);
    assert_true(m.unit[1].drop_path == 0);
    vit_model_free(&m);
    cJSON_Delete(file);
}

/* A folder as timm saves it for the hub: config.json and model.safetensors. */
static void timms_own_file_gives_timms_logits(void **state) {
    (void)state;
    cJSON *saved = read_json("tests/golden/timm_tiny/config.json");
    cJSON *expected = read_json("tests/golden/timm_tiny/expected.json");
    const cJSON *arguments = cJSON_GetObjectItemCaseSensitive(saved, "model_args");
    vit_config c;
    error_text e;
    safetensors file;
    if (vit_config_named(&c, string(saved, "architecture"), &e)) fail_msg("%s", e.text);
    if (safetensors_open("tests/golden/timm_tiny/model.safetensors", &file, &e)) fail_msg("%s", e.text);
    c.image_height = (size_t)element(list(arguments, "img_size"), 0);
    c.image_width = (size_t)element(list(arguments, "img_size"), 1);
    c.patch_size = whole(arguments, "patch_size");
    c.embed_dim = whole(arguments, "embed_dim");
    c.depth = whole(arguments, "depth");
    c.num_heads = whole(arguments, "num_heads");
    c.num_classes = whole(arguments, "num_classes");

    size_t B = whole(expected, "batch"), pixels = pixels_of(&c), V = c.num_classes;
    double *images = malloc(B * pixels * sizeof *images), *logits = malloc(B * V * sizeof *logits);
    int32_t *labels = malloc(B * sizeof *labels);
    for (size_t b = 0; b < B; b++) {
        golden_sample(whole(expected, "seed"), &c, 0, b, images + b * pixels, &labels[b]);
        for (size_t v = 0; v < V; v++)
            logits[b * V + v] = element(cJSON_GetArrayItem(list(expected, "logits"), (int)b), v);
    }
    for (size_t i = 0; i <= COUNT(fast); i++) {
        vit_replica vit;
        model_open(&vit, &c, i < COUNT(fast) ? fast[i] : &naive, B);
        double *weights = calloc(vit.parameters.count, sizeof *weights);
        for (size_t k = 0; k < file.count; k++) {
            size_t offset;
            const vit_tensor *t = find_tensor(&vit, file.tensors[k].name, &offset);
            assert_int_equal(t->count, file.tensors[k].count);
            float *values = malloc(t->count * sizeof *values);
            if (safetensors_read_f32(&file, &file.tensors[k], 0, t->count, values, &e))
                fail_msg("%s", e.text);
            for (size_t j = 0; j < t->count; j++) weights[offset + j] = values[j];
            free(values);
        }
        put(&vit, vit.parameters, weights);
        forward(&vit, images, labels);
        double *found = logits_of(&vit);
        assert_true(nmse(found, logits, B * V) <= (i < COUNT(fast) ? 1e-11 : 1e-20));
        free(found);
        free(weights);
        vit_close(&vit);
    }
    free(images);
    free(logits);
    free(labels);
    safetensors_close(&file);
    cJSON_Delete(saved);
    cJSON_Delete(expected);
}

/* ----------------------------------------------------------------------------------------- initialisation */

static const vit_config small = {.image_height = 20,
                                 .image_width = 12,
                                 .channels = 3,
                                 .patch_size = 4,
                                 .embed_dim = 44,
                                 .depth = 2,
                                 .num_heads = 4,
                                 .num_classes = 5,
                                 .mlp_ratio = 2.5,
                                 .layer_norm_eps = 1e-6};

/* A unit by vit_unit_initialise, over memory that held something else. The caller frees it. */
static float *initial(const vit_unit *unit, uint64_t seed) {
    float *values = malloc(unit->count * sizeof *values);
    memset(values, 0x5A, unit->count * sizeof *values);
    vit_unit_initialise(unit, seed, values);
    return values;
}

/* Are these n values independent draws of one distribution? By their mean, mean square, share within a
 * deviation, and product of neighbours; each within 5 deviations of its sampling error. */
static void assert_distribution(const char *name, const float *values, size_t n, double deviation,
                                double kurtosis, double share) {
    double mean = 0, square = 0, within = 0, product = 0, N = (double)n;
    for (size_t i = 0; i < n; i++) {
        double x = (double)values[i] / deviation;
        mean += x / N;
        square += x * x / N;
        within += (fabs(x) < 1) / N;
        product += x * (double)values[(i + 1) % n] / deviation / N;
    }
    if (!(fabs(mean) < 5 / sqrt(N)) || !(fabs(square - 1) < 5 * sqrt((kurtosis - 1) / N)) ||
        !(fabs(within - share) < 5 * sqrt(share * (1 - share) / N)) || !(fabs(product) < 5 / sqrt(N)))
        fail_msg("%s: in units of its deviation found mean %g, mean square %g, share %g, product %g", name,
                 mean, square, within, product);
}

/* timm's: normal with deviation 0.02, cls_token 1e-6; patch projection uniform within 1 / sqrt(fan in). */
static void weights_begin_with_timms_distributions(void **state) {
    (void)state;
    vit_model m;
    error_text e;
    assert_int_equal(vit_model_init(&m, &small, RT_FP32, &e), 0);
    double bound = 1 / sqrt(3. * 4 * 4);
    for (size_t u = 0; u < m.units; u++) {
        float *values = initial(&m.unit[u], 7);
        size_t used = 0;
        for (const vit_tensor *t = m.unit[u].tensor; t < m.unit[u].tensor + m.unit[u].tensors; t++) {
            const float *x = values + t->offset;
            for (; used < t->offset; used++) assert_true(values[used] == 0); /* padding */
            used = t->offset + t->count;
            if (strstr(t->name, "patch_embed")) {
                for (size_t i = 0; i < t->count; i++) assert_true(fabs((double)x[i]) <= bound);
                assert_distribution(t->name, x, t->count, bound / sqrt(3), 9. / 5, 1 / sqrt(3));
            } else if (!strcmp(t->name, "cls_token")) {
                assert_distribution(t->name, x, t->count, 1e-6, 3, erf(M_SQRT1_2));
            } else if (t->dims > 1) {
                assert_distribution(t->name, x, t->count, 0.02, 3, erf(M_SQRT1_2));
            } else {
                float constant = strstr(t->name, "norm") && strstr(t->name, "weight");
                for (size_t i = 0; i < t->count; i++) assert_true(x[i] == constant);
            }
        }
        for (; used < m.unit[u].count; used++) assert_true(values[used] == 0);
        free(values);
    }
    vit_model_free(&m);
}

/* Element i of a tensor depends on (seed, tensor, i) alone: not on earlier draws or other sizes. */
static void weights_do_not_depend_on_order_or_on_other_sizes(void **state) {
    (void)state;
    vit_model m, other;
    vit_config deeper = small;
    vit_replica vit;
    error_text e;
    deeper.depth = 5;
    deeper.mlp_ratio = 4;
    deeper.num_classes = 9;
    assert_int_equal(vit_model_init(&m, &small, RT_FP32, &e), 0);
    assert_int_equal(vit_model_init(&other, &deeper, RT_FP32, &e), 0);
    model_open(&vit, &small, &own, 1); /* which draws all units, with seed 0 */
    double *whole_model = get(&vit, vit.parameters);
    for (size_t u = m.units; u-- > 0;) {
        float *values = initial(&m.unit[u], 0);
        for (size_t i = 0; i < m.unit[u].count; i++) assert_true(values[i] == whole_model[vit.offset[u] + i]);
        free(values);
    }
    for (size_t u = 0; u <= small.depth; u++) {
        float *values = initial(&m.unit[u], 3), *others = initial(&other.unit[u], 3);
        for (size_t k = 0; k < m.unit[u].tensors; k++) {
            const vit_tensor *t = &m.unit[u].tensor[k], *o = &other.unit[u].tensor[k];
            assert_memory_equal(values + t->offset, others + o->offset, t->count * sizeof *values);
        }
        free(values);
        free(others);
    }
    free(whole_model);
    vit_close(&vit);
    vit_model_free(&m);
    vit_model_free(&other);
}

/* Random tensors of two seeds, and any two of one seed, have no element in common at the same place. */
static void weights_differ_by_seed_and_by_tensor(void **state) {
    enum { FIRST = 44, MOST = 64 }; /* elements compared, tensors */
    (void)state;
    vit_model m;
    error_text e;
    double drawn[MOST][FIRST];
    size_t n = 0;
    assert_int_equal(vit_model_init(&m, &small, RT_FP32, &e), 0);
    for (uint64_t seed = 0; seed < 3; seed++)
        for (size_t u = 0; u < m.units; u++) {
            float *values = initial(&m.unit[u], seed);
            for (size_t k = 0; k < m.unit[u].tensors; k++) {
                const vit_tensor *t = &m.unit[u].tensor[k];
                if (t->initialiser == VIT_ZERO || t->initialiser == VIT_ONE) continue;
                assert_true(n < MOST && t->count >= FIRST);
                for (size_t i = 0; i < FIRST; i++)
                    drawn[n][i] = (float)((double)values[t->offset + i] / t->scale);
                n++;
            }
            free(values);
        }
    assert_int_equal(n, 3 * 13); /* of 4 tensors of the embedding, 4 of each block, 1 of the head */
    for (size_t a = 0; a < n; a++)
        for (size_t b = 0; b < a; b++)
            for (size_t i = 0; i < FIRST; i++) assert_true(fabs(drawn[a][i] - drawn[b][i]) > 1e-9);
    vit_model_free(&m);
}

/* ---------------------------------------------------------------------- impossible and odd configurations */

/* One line that names the fault; and nothing is left behind (LeakSanitizer). */
static void assert_impossible(const vit_config *config, const char *says) {
    vit_model m;
    vit_replica vit;
    error_text e = {{0}}, f = {{0}};
    assert_int_equal(vit_model_init(&m, config, RT_FP32, &e), -1);
    vit_model_free(&m);
    assert_int_equal(vit_open(&vit, config, &vit_cpu, RT_FP32, 2, &f), -1);
    vit_close(&vit);
    assert_string_equal(e.text, f.text);
    if (strncmp(e.text, "impossible model: ", 18) || !strstr(e.text, says) || strchr(e.text, '\n'))
        fail_msg("found the message '%s', expected one line about '%s'", e.text, says);
}

static void impossible_models_are_refused_with_a_reason(void **state) {
    static const struct {
        size_t field;
        const char *name;
    } sizes[] = {{offsetof(vit_config, image_height), "image height"},
                 {offsetof(vit_config, image_width), "image width"},
                 {offsetof(vit_config, channels), "channels"},
                 {offsetof(vit_config, patch_size), "patch size"},
                 {offsetof(vit_config, embed_dim), "embed dim"},
                 {offsetof(vit_config, depth), "depth"},
                 {offsetof(vit_config, num_heads), "heads"},
                 {offsetof(vit_config, num_classes), "classes"}};
    static const size_t bad_sizes[] = {0, SIZE_MAX, SIZE_MAX / 2 + 1, (size_t)1 << 32};
    static const struct {
        size_t field;
        double value;
        const char *says;
    } reals[] = {{offsetof(vit_config, mlp_ratio), 0, "mlp ratio 0"},
                 {offsetof(vit_config, mlp_ratio), -4, "mlp ratio -4"},
                 {offsetof(vit_config, mlp_ratio), 0.02, "mlp ratio 0.02"},
                 {offsetof(vit_config, mlp_ratio), 1e300, "mlp ratio 1e+300"},
                 {offsetof(vit_config, mlp_ratio), INFINITY, "mlp ratio inf"},
                 {offsetof(vit_config, mlp_ratio), NAN, "mlp ratio"},
                 {offsetof(vit_config, layer_norm_eps), -1e-6, "eps -1e-06"},
                 {offsetof(vit_config, layer_norm_eps), NAN, "eps"},
                 {offsetof(vit_config, drop_path), 1, "drop path 1"},
                 {offsetof(vit_config, drop_path), -0.1, "drop path -0.1"},
                 {offsetof(vit_config, drop_path), NAN, "drop path"},
                 {offsetof(vit_config, label_smoothing), 1.5, "smoothing 1.5"},
                 {offsetof(vit_config, label_smoothing), -0.1, "smoothing -0.1"},
                 {offsetof(vit_config, label_smoothing), NAN, "smoothing"}};
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t k = 0; k < COUNT(bad_sizes); k++) {
            vit_config c = small;
            char says[64];
            memcpy((char *)&c + sizes[i].field, &bad_sizes[k], sizeof(size_t));
            snprintf(says, sizeof says, "%s %zu", sizes[i].name, bad_sizes[k]);
            assert_impossible(&c, says);
        }
    for (size_t i = 0; i < COUNT(reals); i++) {
        vit_config c = small;
        memcpy((char *)&c + reals[i].field, &reals[i].value, sizeof(double));
        assert_impossible(&c, reals[i].says);
    }
    vit_config heads = small, low = small, narrow = small;
    heads.num_heads = 5;
    low.patch_size = low.image_height + 1;
    low.image_width = 100;
    narrow.patch_size = narrow.image_width + 1;
    assert_impossible(&heads, "embed dim 44 is not a multiple of 5 heads");
    assert_impossible(&low, "patch size 21 is larger than the image, 20x100");
    assert_impossible(&narrow, "patch size 13 is larger than the image, 20x12");
}

/* No image; buffers that size_t or the address space has no room for; and a model of that size. */
static void impossible_batches_are_refused(void **state) {
    static const struct {
        size_t batch, embed_dim, depth;
        const char *says;
    } bad[] = {
        {0, 44, 2, "batch of 0"},
        {SIZE_MAX, 44, 2, "out of memory"},
        {SIZE_MAX / 2, 44, 2, "out of memory"},
        {SIZE_MAX / 720, 44, 2, "out of memory"}, /* of its 720 pixels an image, as bytes and as floats */
        {SIZE_MAX / 2880, 44, 2, "out of memory"},
        {(size_t)1 << 44, 44, 2, "out of memory"},
        {1, 1 << 17, 1 << 12, "out of memory"}};
    (void)state;
    for (size_t i = 0; i < COUNT(bad); i++) {
        vit_config c = small;
        vit_replica vit;
        error_text e = {{0}};
        c.embed_dim = bad[i].embed_dim;
        c.depth = bad[i].depth;
        assert_int_equal(vit_open(&vit, &c, &vit_cpu, RT_FP32, bad[i].batch, &e), -1);
        if (!strstr(e.text, bad[i].says)) fail_msg("found '%s', expected '%s'", e.text, bad[i].says);
        vit_close(&vit);
    }

    /* 4 bytes short of 2^64 each: a rounding up must not make them small */
    vit_model m;
    error_text e;
    vit_config least = {"", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1e-6, 0, 0, 0, 0};
    assert_int_equal(vit_model_init(&m, &least, RT_FP32, &e), 0);
    for (size_t u = 1; u < m.units; u++) /* the embedding saves nothing */
        assert_true(vit_unit_saved_bytes(&m, &vit_cpu, &m.unit[u], SIZE_MAX / 4) > SIZE_MAX / 4);
    assert_true(vit_workspace_bytes(&m, SIZE_MAX / 4) > SIZE_MAX / 4);
    vit_model_free(&m);
}

/* Random parameters and images, exact in float, as doubles. */
static double *normals(uint64_t seed, size_t count, double scale) {
    double *values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++)
        values[i] = (float)(scale * random_normal(random_key(seed, 0, 0, 0), i));
    return values;
}

enum { ODD_BATCH = 3 };
static const int32_t odd_labels[ODD_BATCH]; /* class 0: the only one that every model has */
static const uint64_t odd_keys[ODD_BATCH] = {11, 22, 33};

/* Forward and backward with the given parameters; the gradient, which the caller frees. */
static double *odd_gradient(vit_replica *vit, const double *parameters, const double *images, double *loss) {
    put(vit, vit->parameters, parameters);
    vit_copy_in(&vit->context, vit->activations.batch.sample_keys, odd_keys);
    *loss = forward(vit, images, odd_labels);
    vit_backward(vit);
    return get(vit, vit->gradients);
}

static void odd_models_work(void **state) {
    static const struct {
        const char *name;
        /* height, width, channels, patch, dim, depth, heads, classes, mlp ratio, eps, gelu, drop-path,
         * smoothing, frozen backbone */
        vit_config config;
    } odd[] = {{"the smallest of all", {"", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1e-6, 0, 0, 0, 0}},
               {"one class", {"", 12, 8, 3, 4, 12, 2, 3, 1, 2, 1e-6, 0, 0, 0, 0}},
               /* of one number LayerNorm has no variance, and multiplies rounding errors by 1 / sqrt(eps) */
               {"one head of size 1", {"", 12, 8, 3, 4, 1, 2, 1, 4, 5, 1e-3, 0, 0, 0.1, 0}},
               {"heads of size 1", {"", 12, 8, 3, 4, 7, 2, 7, 4, 2, 1e-6, 0, 0, 0, 0}},
               {"patches of one pixel", {"", 5, 3, 2, 1, 10, 2, 2, 4, 2, 1e-6, 0, 0, 0, 0}},
               {"one patch", {"", 6, 6, 3, 6, 10, 2, 2, 4, 2, 1e-6, 0, 0, 0, 0}},
               {"pixels beyond the last patch", {"", 11, 14, 3, 4, 10, 2, 2, 4, 2, 1e-6, 0, 0, 0, 0}},
               {"one block, with drop-path", {"", 8, 8, 3, 4, 10, 1, 2, 4, 2, 1e-6, 0, 0.9, 0, 0}},
               {"an MLP narrower than the model", {"", 8, 8, 3, 4, 10, 2, 2, 4, 0.3, 1e-6, 0, 0, 0, 0}},
               {"a hidden layer of one", {"", 8, 8, 3, 4, 10, 2, 2, 4, 0.1, 1e-6, 0, 0, 0, 0}},
               {"labels smoothed away", {"", 8, 8, 3, 4, 10, 2, 2, 4, 2, 1e-6, 0, 0, 1, 0}},
               {"eps 0", {"", 8, 8, 3, 4, 10, 2, 2, 4, 2, 0, 0, 0, 0, 0}},
               {"a large eps", {"", 8, 8, 3, 4, 10, 2, 2, 4, 2, 0.5, 0, 0, 0, 0}},
               {"drop-path", {"", 8, 8, 3, 4, 10, 4, 2, 4, 2, 1e-6, 0, 0.7, 0, 0}},
               {"GELU by tanh", {"", 8, 8, 3, 4, 10, 2, 2, 4, 2, 1e-6, VIT_GELU_TANH, 0, 0, 0}},
               {"many classes", {"", 8, 8, 1, 4, 10, 1, 1, 1003, 2, 1e-6, 0, 0, 0.1, 0}}};
    (void)state;
    for (size_t i = 0; i < COUNT(odd); i++) {
        const vit_config *c = &odd[i].config;
        vit_replica oracle;
        model_open(&oracle, c, &naive, ODD_BATCH);
        size_t n = oracle.parameters.count;
        double *images = normals(1, ODD_BATCH * pixels_of(c), 1), *at = normals(2, n, 0.5), loss;
        double *expected = odd_gradient(&oracle, at, images, &loss);
        assert_true(isfinite(loss));

        /* the derivative along a random direction of length 1, by a central difference */
        double *direction = normals(3, n, 1), *moved = malloc(n * sizeof *moved), size = 0, slope = 0;
        double difference = 0, step = 1e-5;
        for (size_t k = 0; k < n; k++) size += direction[k] * direction[k];
        for (size_t k = 0; k < n; k++) slope += expected[k] * direction[k] / sqrt(size);
        for (int sign = -1; sign <= 1; sign += 2) {
            for (size_t k = 0; k < n; k++) moved[k] = at[k] + sign * step * direction[k] / sqrt(size);
            put(&oracle, oracle.parameters, moved);
            difference += sign * forward(&oracle, images, odd_labels) / (2 * step);
        }
        if (!(fabs(difference - slope) <= 1e-6 * fabs(slope)))
            fail_msg("%s: found a slope of %.12g, expected %.12g", odd[i].name, slope, difference);

        for (size_t k = 0; k < COUNT(fast); k++) {
            vit_replica vit;
            double fast_loss;
            model_open(&vit, c, fast[k], ODD_BATCH);
            double *gradient = odd_gradient(&vit, at, images, &fast_loss);
            double error = nmse(gradient, expected, n);
            if (!(error < 1e-10 && fabs(fast_loss - loss) < 1e-5 * (1 + loss)))
                fail_msg("%s, %s: found a gradient off by an NMSE of %g, a loss of %g, expected %g",
                         odd[i].name, fast[k]->name, error, fast_loss, loss);
            free(gradient);
            vit_close(&vit);
        }
        free(images);
        free(at);
        free(expected);
        free(direction);
        free(moved);
        vit_close(&oracle);
    }
}

/* ---------------------------------------------------------------------------------------------- drop-path */

enum { SAMPLES = 1024, BRANCHES = 4 }; /* two of each block */

static const vit_config tiny = {.image_height = 4,
                                .image_width = 4,
                                .channels = 1,
                                .patch_size = 4,
                                .embed_dim = 8,
                                .depth = 2,
                                .num_heads = 2,
                                .num_classes = 3,
                                .mlp_ratio = 2,
                                .layer_norm_eps = 1e-6};

typedef struct {
    double *images;
    int32_t labels[SAMPLES];
    uint64_t keys[SAMPLES];
} samples;

static samples samples_make(void) {
    samples s = {.images = normals(4, SAMPLES * pixels_of(&tiny), 1)};
    for (size_t b = 0; b < SAMPLES; b++) {
        s.labels[b] = (int32_t)(b % tiny.num_classes);
        s.keys[b] = random_key(6, RANDOM_DROP_PATH, b, 0);
    }
    return s;
}

/* Runs `tiny` on vit_cpu's own product, to be compared bit by bit: with drop-path at `rate` in both blocks,
 * and with each branch multiplied, in its last weights, by its factor. Returns the logits [SAMPLES, V] and,
 * if asked, the gradient and its length; the caller frees them. */
static double *tiny_logits(double rate, int training, const double factor[BRANCHES], const samples *s,
                           double **gradient, size_t *count) {
    vit_replica vit;
    model_open(&vit, &tiny, &own, SAMPLES);
    vit.model.unit[1].drop_path = vit.model.unit[2].drop_path = rate;
    double *values = normals(5, vit.parameters.count, 0.3);
    for (size_t k = 0; k < 2 * BRANCHES; k++) {
        char name[48];
        size_t offset, branch = k / 2;
        snprintf(name, sizeof name, "blocks.%zu.%s.%s", branch / 2, branch % 2 ? "mlp.fc2" : "attn.proj",
                 k % 2 ? "bias" : "weight");
        const vit_tensor *t = find_tensor(&vit, name, &offset);
        for (size_t i = 0; i < t->count; i++) values[offset + i] *= factor[branch];
    }
    put(&vit, vit.parameters, values);
    vit_copy_in(&vit.context, vit.activations.batch.sample_keys, s->keys);
    vit.context.training = training;
    forward(&vit, s->images, s->labels);
    double *logits = logits_of(&vit);
    if (gradient) {
        vit_backward(&vit);
        *gradient = get(&vit, vit.gradients);
        *count = vit.gradients.count;
    }
    free(values);
    vit_close(&vit);
    return logits;
}

static const double unchanged[BRANCHES] = {1, 1, 1, 1};

/* With rate 1/2 a branch is multiplied by 0 or by 2, which no rounding disturbs: a sample's logits are those
 * of one of 16 models without drop-path, and each of the 16 has its share (5 deviations). */
static void drop_path_drops_branches_independently(void **state) {
    enum { MODELS = 1 << BRANCHES };
    (void)state;
    samples s = samples_make();
    size_t V = tiny.num_classes, seen[MODELS] = {0}, matches = 0;
    double *logits = tiny_logits(0.5, 1, unchanged, &s, NULL, NULL);
    for (int k = 0; k < MODELS; k++) {
        double factor[BRANCHES];
        for (int branch = 0; branch < BRANCHES; branch++) factor[branch] = k >> branch & 1 ? 2 : 0;
        double *fixed = tiny_logits(0, 1, factor, &s, NULL, NULL);
        for (size_t b = 0; b < SAMPLES; b++)
            seen[k] += memcmp(logits + b * V, fixed + b * V, V * sizeof *logits) == 0;
        double share = 1. / MODELS;
        assert_true(fabs((double)seen[k] - SAMPLES * share) < 5 * sqrt(SAMPLES * share * (1 - share)));
        matches += seen[k];
        free(fixed);
    }
    assert_int_equal(matches, SAMPLES);
    free(logits);
    free(s.images);
}

static void drop_path_depends_on_the_sample_key_alone(void **state) {
    (void)state;
    samples s = samples_make(), moved = samples_make(), other = s;
    size_t V = tiny.num_classes, pixels = pixels_of(&tiny), place[SAMPLES], changed = 0;
    for (size_t b = 0; b < SAMPLES; b++) {
        place[b] = (b * 27 + 5) % SAMPLES; /* 27 is odd: a permutation */
        memcpy(moved.images + b * pixels, s.images + place[b] * pixels, pixels * sizeof *s.images);
        moved.labels[b] = s.labels[place[b]];
        other.keys[b] = moved.keys[b] = s.keys[place[b]];
    }
    double *logits = tiny_logits(0.3, 1, unchanged, &s, NULL, NULL);
    double *permuted = tiny_logits(0.3, 1, unchanged, &moved, NULL, NULL);
    double *other_keys = tiny_logits(0.3, 1, unchanged, &other, NULL, NULL);
    for (size_t b = 0; b < SAMPLES; b++) {
        assert_memory_equal(permuted + b * V, logits + place[b] * V, V * sizeof *logits);
        changed += memcmp(other_keys + b * V, logits + b * V, V * sizeof *logits) != 0;
    }
    assert_true(changed > SAMPLES / 2); /* 1 - (0.7^2 + 0.3^2)^4 = 89 % are to be expected */
    free(logits);
    free(permuted);
    free(other_keys);
    free(s.images);
    free(moved.images);
}

static void drop_path_is_off_outside_of_training(void **state) {
    (void)state;
    samples s = samples_make();
    size_t bytes = SAMPLES * tiny.num_classes * sizeof(double), n;
    double *gradient[3], *logits[3];
    logits[0] = tiny_logits(0.5, 0, unchanged, &s, &gradient[0], &n);
    logits[1] = tiny_logits(0, 1, unchanged, &s, &gradient[1], &n);
    logits[2] = tiny_logits(0.5, 1, unchanged, &s, &gradient[2], &n);
    assert_memory_equal(logits[0], logits[1], bytes);
    assert_memory_not_equal(logits[0], logits[2], bytes);
    assert_memory_equal(gradient[0], gradient[1], n * sizeof(double));
    assert_memory_not_equal(gradient[0], gradient[2], n * sizeof(double));
    for (int i = 0; i < 3; i++) free(logits[i]), free(gradient[i]);
    free(s.images);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_loss_and_every_gradient_are_pytorchs),
        cmocka_unit_test(goldens_of_a_wrong_model_are_rejected),
        cmocka_unit_test(training_follows_pytorch_in_double),
        cmocka_unit_test(built_in_models_have_timms_sizes),
        cmocka_unit_test(names_and_shapes_are_timms),
        cmocka_unit_test(drop_path_rates_are_timms),
        cmocka_unit_test(timms_own_file_gives_timms_logits),
        cmocka_unit_test(weights_begin_with_timms_distributions),
        cmocka_unit_test(weights_do_not_depend_on_order_or_on_other_sizes),
        cmocka_unit_test(weights_differ_by_seed_and_by_tensor),
        cmocka_unit_test(impossible_models_are_refused_with_a_reason),
        cmocka_unit_test(impossible_batches_are_refused),
        cmocka_unit_test(odd_models_work),
        cmocka_unit_test(drop_path_drops_branches_independently),
        cmocka_unit_test(drop_path_depends_on_the_sample_key_alone),
        cmocka_unit_test(drop_path_is_off_outside_of_training),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
