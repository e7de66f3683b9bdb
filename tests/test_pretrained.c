/* test_pretrained.c - models of timm and Hugging Face: every spelling of their names, what their
 * configurations may say, what is adapted, and what a folder written for them holds.
 *
 * The models, and what PyTorch computes with them in double, were made by golden/make_pretrained.py. Faulty
 * ones are copies of them with some bytes replaced; in the header of a safetensors file by as many. */
#define _GNU_SOURCE /* nftw, memmem */
#include <setjmp.h>
#include <stdarg.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "checkpoint.h"

#include <cmocka.h>

#include "tests/files.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define HF           "golden/pretrained/"

/* ------------------------------------------------------------------------------------------------ folders */

/* Every test runs in a directory of its own, in which golden leads to tests/golden. */
typedef struct {
    char start[2048], work[64];
} place;

static int enter(void **state) {
    place *p = calloc(1, sizeof *p);
    char golden[4096];
    strcpy(p->work, "/tmp/test_pretrained_XXXXXX");
    *state = p;
    if (!getcwd(p->start, sizeof p->start) || !mkdtemp(p->work) || chdir(p->work)) return -1;
    snprintf(golden, sizeof golden, "%s/tests/golden", p->start);
    return symlink(golden, "golden");
}

static int leave(void **state) {
    place *p = *state;
    int failed = chdir(p->start) || remove_tree(p->work);
    free(p);
    return failed;
}

static char *read_bytes(const char *path, size_t *size) {
    char *bytes;
    error_text e;
    if (file_read_whole(path, 1 << 24, &bytes, size, &e)) fail_msg("%s", e.text);
    return bytes;
}

static void write_bytes(const char *path, const char *bytes, size_t size) {
    error_text e;
    if (file_write_atomic(path, bytes, size, &e)) fail_msg("%s", e.text);
}

/* A file with every `old` of another replaced by `new`; without an `old`, a copy. */
static void write_changed(const char *to, const char *from, const char *old, const char *new) {
    size_t size, used = 0;
    char *bytes = read_bytes(from, &size), *changed = malloc(2 * size + 4096);
    for (size_t i = 0; i < size;) {
        int here = old && i + strlen(old) <= size && !memcmp(bytes + i, old, strlen(old));
        if (here)
            memcpy(changed + used, new, strlen(new)), used += strlen(new), i += strlen(old);
        else
            changed[used++] = bytes[i++];
    }
    if (old && size == used && !memcmp(bytes, changed, size)) fail_msg("%s: found no %s", from, old);
    write_bytes(to, changed, used);
    free(changed);
    free(bytes);
}

/* The folder `model`, a copy of a golden one in which a file has `old` replaced by `new`. */
static void copy_model(const char *from, const char *file, const char *old, const char *new) {
    static const char *const files[] = {"config.json", "model.safetensors", "preprocessor_config.json"};
    error_text e;
    if (directory_make("model", &e)) fail_msg("%s", e.text);
    for (size_t i = 0; i < COUNT(files); i++) {
        char source[256], target[64];
        snprintf(source, sizeof source, HF "%s/%s", from, files[i]);
        snprintf(target, sizeof target, "model/%s", files[i]);
        if (!access(source, F_OK)) write_changed(target, source, strcmp(file, files[i]) ? NULL : old, new);
    }
}

static cJSON *read_json(const char *path) {
    size_t size;
    error_text e;
    char *text = read_bytes(path, &size);
    cJSON *root = json_parse(text, size, JSON_ANY_NUMBERS, path, &e);
    if (!root) fail_msg("%s", e.text);
    free(text);
    return root;
}

static const cJSON *item(const cJSON *object, const char *key) {
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(object, key);
    if (!found) fail_msg("found no '%s'", key);
    return found;
}
static double number(const cJSON *object, const char *key) { return item(object, key)->valuedouble; }
static double element(const cJSON *array, size_t i) { return cJSON_GetArrayItem(array, (int)i)->valuedouble; }

/* ------------------------------------------------------------------------------------------------- models */

/* A model of a path: what is asked of it, and what comes of it. */
typedef struct {
    const char *path;
    int adapts;     /* a head of another size may be replaced */
    size_t classes; /* other than the file's, or 0 */
    size_t height, width;
    model_source source;
    vit_model model;
    float *weights; /* all units, one after the other */
    size_t count;
    error_text error;
} subject;

/* Opens, checks and loads; 0, or -1 with the error. Close it in both cases. */
static int load(subject *s) {
    vit_config c = {.num_heads = 3, .layer_norm_eps = 1e-12, .name = "vit_tiny_patch16_224"};
    if (model_source_open(&s->source, s->path, &s->error)) return -1;
    s->source.may_replace_head = s->adapts;
    if (model_source_config(&s->source, &c, &s->error)) return -1;
    if (s->classes) c.num_classes = s->classes;
    if (s->height) c.image_height = s->height, c.image_width = s->width;
    if (vit_model_init(&s->model, &c, RT_FP32, &s->error) ||
        model_source_check(&s->source, &s->model, &s->error))
        return -1;
    for (size_t u = 0; u < s->model.units; u++) s->count += s->model.unit[u].count;
    s->weights = calloc(s->count, sizeof *s->weights);
    float *values = s->weights;
    for (size_t u = 0; u < s->model.units; values += s->model.unit[u++].count)
        if (model_source_unit(&s->source, &s->model, u, 5, values, &s->error)) return -1;
    return 0;
}

static void close_subject(subject *s) {
    model_source_close(&s->source);
    vit_model_free(&s->model);
    free(s->weights);
}

static void load_well(subject *s) {
    if (load(s)) fail_msg("%s", s->error.text);
}

static void assert_refused(subject s, const char *expected) {
    if (!load(&s)) fail_msg("%s was read, expected: %s", s.path, expected);
    if (!strstr(s.error.text, expected) || strchr(s.error.text, '\n'))
        fail_msg("found the message \"%s\", expected one line with \"%s\"", s.error.text, expected);
    close_subject(&s);
}

/* The elements of a tensor of the model among the weights. */
static float *tensor_of(const subject *s, const char *name, size_t *count) {
    float *values = s->weights;
    *count = 0;
    for (size_t u = 0; u < s->model.units; values += s->model.unit[u++].count)
        for (size_t k = 0; k < s->model.unit[u].tensors; k++)
            if (!strcmp(s->model.unit[u].tensor[k].name, name)) {
                *count = s->model.unit[u].tensor[k].count;
                return values + s->model.unit[u].tensor[k].offset;
            }
    fail_msg("found no tensor %s", name);
    return NULL;
}

/* Both have the same weights, or all but those of the head. */
static void assert_same_weights(const subject *a, const subject *b, int heads_too) {
    for (size_t u = 0; u < a->model.units; u++)
        for (size_t k = 0; k < a->model.unit[u].tensors; k++) {
            const char *name = a->model.unit[u].tensor[k].name;
            size_t count, other;
            if (!heads_too && !strncmp(name, "head.", 5)) continue;
            float *x = tensor_of(a, name, &count), *y = tensor_of(b, name, &other);
            assert_int_equal(count, other);
            if (memcmp(x, y, count * sizeof *x)) fail_msg("%s: %s and %s differ", name, a->path, b->path);
        }
}

static void every_spelling_gives_the_same_weights(void **state) {
    (void)state;
    subject first = {.path = HF "hf4"};
    static const struct {
        const char *path, *notes;
        int whole;
    } others[] = {
        {HF "hf4/model.safetensors", "Hugging Face names", 1},
        {HF "hf5", "Hugging Face names", 1},
        {HF "hf5_base.safetensors", "Hugging Face names", 1},
        {HF "hf_base",
         "Hugging Face names; new head of 3 classes (file: none); "
         "ignored pooler.dense.bias, pooler.dense.weight",
         0},
    };
    load_well(&first);
    assert_string_equal(first.source.notes, "Hugging Face names");
    for (size_t i = 0; i < COUNT(others); i++) {
        subject s = {.path = others[i].path, .adapts = 1, .classes = 3, .height = 12, .width = 16};
        load_well(&s);
        assert_string_equal(s.source.notes, others[i].notes);
        assert_same_weights(&first, &s, others[i].whole);
        close_subject(&s);
    }
    close_subject(&first);
}

/* ---------------------------------------------------------------------------------------- against PyTorch */

/* What one rank computes with a subject: the logits of images, or steps of training. */
typedef struct {
    subject *s;
    size_t batch, steps;
    const float *images;   /* [batch, pixels], for the logits */
    float *logits;         /* [batch, classes] */
    const cJSON *training; /* or this */
    double *loss, *norm;   /* [steps] */
    vit_matmul matmul;
    dist_hub *hub;
} computation;

/* Image and label b of a step, as make_golden.py's make_batch. */
static void training_sample(const cJSON *t, const vit_config *c, size_t step, size_t b, float *image,
                            int32_t *label) {
    size_t pixels = c->channels * c->image_height * c->image_width;
    uint64_t seed = (uint64_t)number(t, "seed"), key = random_key(seed, 2000, step, 0);
    for (size_t i = 0; i < pixels; i++)
        image[i] = (float)((floor(random_uniform(key, b * pixels + i) * 4096) / 4096 - 0.5) * 4);
    *label = (int32_t)random_below(random_key(seed, 3000, step, 0), b, c->num_classes);
}

static void train_steps(computation *w, dist *d) {
    const vit_config *c = &w->s->model.config;
    size_t pixels = c->channels * c->image_height * c->image_width;
    float *images = malloc(w->batch * pixels * sizeof *images);
    int32_t *labels = malloc(w->batch * sizeof *labels);
    for (size_t step = 0; step < w->steps; step++) {
        dist_result result;
        for (size_t b = 0; b < w->batch; b++)
            training_sample(w->training, c, step, b, images + b * pixels, &labels[b]);
        dist_begin_step(d, step + 1, element(item(w->training, "learning_rates"), step));
        dist_micro_batch(d, 0, images, labels, NULL);
        dist_end_step(d, &result);
        w->loss[step] = result.loss;
        w->norm[step] = result.gradient_norm;
    }
    free(images);
    free(labels);
}

static int compute_rank(rt_rank *rank, void *argument) {
    computation *w = argument;
    error_text e = {{0}};
    dist_comm comm;
    dist d = {0};
    if (vit_cpu.open(rank, &e) || vit_cpu_matmul(rank, w->matmul, &e)) return rt_fail(rank, "%s", e.text);
    if (dist_comm_open(&comm, w->hub, rank, &vit_cpu)) return -1;
    dist_options o = {.strategy = "single", .batch_size = w->batch, .accumulation = 1, .counts = 1};
    if (w->training)
        o.adamw = (vit_adamw_options){number(w->training, "beta1"), number(w->training, "beta2"),
                                      number(w->training, "adam_eps"), number(w->training, "weight_decay")};
    if (dist_open(&d, &comm, &w->s->model, &o, &e) || model_source_load(&w->s->source, &d, 5, &e)) {
        rt_fail(rank, "%s", e.text);
    } else if (w->training) {
        train_steps(w, &d);
    } else {
        int32_t *labels = calloc(w->batch, sizeof *labels);
        dist_forward(&d, w->images, labels, w->logits, NULL, NULL);
        free(labels);
    }
    dist_close(&d);
    dist_comm_close(&comm);
    vit_cpu.close(rank);
    return 0;
}

static void compute(computation *w) {
    rt_world world;
    assert_int_equal(rt_world_init(&world, 1, RT_CHECK), 0);
    w->hub = dist_hub_create(&world);
    if (rt_run(&world, compute_rank, w)) fail_msg("%s: %s", w->s->path, world.error.text);
    dist_hub_free(w->hub);
    rt_world_free(&world);
}

static const vit_matmul products[] = {
    VIT_MATMUL_OWN,
#ifdef HAVE_OPENBLAS
    VIT_MATMUL_OPENBLAS,
#endif
};

/* NMSE of the logits of a model for its golden images. */
static double distance_to_logits(subject *s, const cJSON *golden, uint64_t seed, vit_matmul matmul) {
    const vit_config *c = &s->model.config;
    size_t images = (size_t)cJSON_GetArraySize(golden), plane = c->image_height * c->image_width;
    float *x = malloc(images * 3 * plane * sizeof *x),
          *logits = calloc(images, c->num_classes * sizeof *logits);
    double error = 0, norm = 0;
    for (size_t i = 0; i < images * 3 * plane; i++) { /* [images, 3, plane] of bytes in [plane, 3] */
        size_t n = i / (3 * plane), channel = i / plane % 3, byte = i % plane * 3 + channel;
        double pixel = (double)random_below(random_key(seed, 2000, n, 0), byte, 256) / 255;
        x[i] = (float)((pixel - (double)s->source.mean[channel]) / (double)s->source.std[channel]);
    }
    compute(&(computation){.s = s, .batch = images, .images = x, .logits = logits, .matmul = matmul});
    for (size_t i = 0; i < images * c->num_classes; i++) {
        double expected = element(cJSON_GetArrayItem(golden, (int)(i / c->num_classes)), i % c->num_classes);
        error += (logits[i] - expected) * (logits[i] - expected);
        norm += expected * expected;
    }
    free(x);
    free(logits);
    return error / norm;
}

static void logits_are_pytorchs_in_double(void **state) {
    (void)state;
    static const struct {
        const char *path, *golden;
    } models[] = {{HF "hf4", "hf4"},
                  {HF "hf5", "hf4"},
                  {HF "hf4_bf16", "hf4_bf16"},
                  {HF "hf4_f16", "hf4_f16"},
                  {"golden/timm_tiny", "timm_tiny"}};
    cJSON *expected = read_json(HF "expected.json");
    const cJSON *all = item(expected, "logits");
    uint64_t seed = (uint64_t)number(expected, "seed");
    for (size_t i = 0; i < COUNT(models) * COUNT(products); i++) {
        size_t k = i / COUNT(products);
        subject s = {.path = models[k].path};
        load_well(&s);
        double nmse =
            distance_to_logits(&s, item(all, models[k].golden), seed, products[i % COUNT(products)]);
        print_message("             %s: NMSE %.2g\n", s.path, nmse);
        assert_true(nmse <= 1e-11);
        if (k == 0) /* and the comparison tells models apart: those of bf16 are not those of fp32 */
            assert_true(distance_to_logits(&s, item(all, "hf4_bf16"), seed, products[0]) > 1e-11);
        close_subject(&s);
    }
    cJSON_Delete(expected);
}

/* Within 3 x the drift of PyTorch's own fp32 run + 1e-6, as the trajectories of test_model.c. */
static void ten_steps_are_pytorchs_in_double(void **state) {
    (void)state;
    cJSON *expected = read_json(HF "expected.json");
    const cJSON *t = item(expected, "training");
    double loss[10], norm[10], worst = 0;
    assert_int_equal(number(t, "steps"), COUNT(loss));
    for (size_t p = 0; p < COUNT(products); p++) {
        subject s = {.path = HF "hf4"};
        load_well(&s);
        compute(&(computation){.s = &s,
                               .batch = (size_t)number(t, "batch"),
                               .steps = COUNT(loss),
                               .training = t,
                               .loss = loss,
                               .norm = norm,
                               .matmul = products[p]});
        for (size_t i = 0; i < COUNT(loss); i++) {
            double wanted = element(item(t, "grad_norm"), i);
            double by_loss =
                fabs(loss[i] - element(item(t, "loss"), i)) / (3 * element(item(t, "loss_drift"), i) + 1e-6);
            double by_norm =
                fabs(norm[i] - wanted) / (3 * element(item(t, "grad_norm_drift"), i) + 1e-6 * wanted);
            worst = fmax(worst, fmax(by_loss, by_norm));
        }
        close_subject(&s);
    }
    print_message("             at worst %.2f of the bar\n", worst);
    assert_true(worst <= 1);
    cJSON_Delete(expected);
}

static void positions_are_resampled_as_timm_does(void **state) {
    (void)state;
    safetensors golden;
    error_text e;
    subject own = {.path = HF "hf4"};
    double worst = 0;
    load_well(&own);
    if (safetensors_open(HF "positions.safetensors", &golden, &e)) fail_msg("%s", e.text);
    assert_int_equal(golden.count, 6);
    for (size_t i = 0; i < golden.count; i++) {
        const st_tensor *t = &golden.tensors[i];
        size_t rows, columns, count;
        char note[128];
        assert_int_equal(sscanf(t->name, "%zux%zu", &rows, &columns), 2);
        subject s = {.path = HF "hf4", .height = 4 * rows, .width = 4 * columns + 3}; /* 3: in no patch */
        load_well(&s);
        snprintf(note, sizeof note, "Hugging Face names; positions resampled from 3x4 to %s", t->name);
        assert_string_equal(s.source.notes, note);
        float *expected = malloc(t->size), *found = tensor_of(&s, "pos_embed", &count);
        assert_int_equal(count, t->count);
        assert_int_equal(safetensors_read_f32(&golden, t, 0, count, expected, &e), 0);
        assert_memory_equal(found, expected, s.model.D * sizeof *found); /* the class token's */
        for (size_t k = 0; k < count; k++) worst = fmax(worst, fabs((double)found[k] - (double)expected[k]));
        free(expected);
        size_t other;
        float *a = tensor_of(&own, "blocks.1.attn.qkv.weight", &count),
              *b = tensor_of(&s, "blocks.1.attn.qkv.weight", &other);
        assert_memory_equal(a, b, count * sizeof *a); /* the rest is as it was */
        close_subject(&s);
    }
    print_message("             largest difference %.2g\n", worst);
    assert_true(worst <= 1e-6);
    safetensors_close(&golden);
    close_subject(&own);
}

/* A grid of as many patches, but of another shape, is another grid. A bare file's is that of the image. */
static void grids_are_told_apart_by_their_sides(void **state) {
    (void)state;
    subject turned = {.path = HF "hf4", .height = 16, .width = 12};
    subject bare = {.path = HF "hf4/model.safetensors", .height = 16, .width = 12};
    load_well(&turned);
    assert_string_equal(turned.source.notes, "Hugging Face names; positions resampled from 3x4 to 4x3");
    load_well(&bare);
    assert_string_equal(bare.source.notes, "Hugging Face names");
    close_subject(&turned);
    close_subject(&bare);
    assert_refused(
        (subject){.path = HF "hf4/model.safetensors", .height = 16, .width = 16},
        "tensor vit.embeddings.position_embeddings: found shape [1, 13, 24], expected [1, 17, 24]");
}

/* --------------------------------------------------------------------------------------------- adaptation */

static void a_head_of_another_size_is_replaced(void **state) {
    (void)state;
    subject own = {.path = HF "hf4"}, other = {.path = HF "hf4", .adapts = 1, .classes = 7};
    subject same = {.path = HF "hf4", .adapts = 1, .classes = 3};
    size_t count;
    load_well(&own);
    load_well(&other);
    load_well(&same);
    assert_string_equal(other.source.notes, "Hugging Face names; new head of 7 classes (file: 3)");
    assert_same_weights(&own, &other, 0); /* the final norm is the file's */
    assert_same_weights(&own, &same, 1);
    const vit_unit *unit = &other.model.unit[other.model.units - 1];
    float *fresh = malloc(unit->count * sizeof *fresh);
    vit_unit_initialise(unit, 5, fresh);
    for (size_t k = 0; k < unit->tensors; k++)
        if (!strncmp(unit->tensor[k].name, "head.", 5)) {
            float *found = tensor_of(&other, unit->tensor[k].name, &count);
            assert_memory_equal(found, fresh + unit->tensor[k].offset, count * sizeof *found);
        }
    free(fresh);
    close_subject(&own);
    close_subject(&other);
    close_subject(&same);
    assert_refused((subject){.path = HF "hf4", .classes = 7}, /* to be evaluated: the head is what counts */
                   "tensor classifier.weight: found shape [3, 24], expected [7, 24]");
    assert_refused(
        (subject){.path = HF "hf_base"},
        "hf_base/model.safetensors: found no tensor classifier.weight, expected a model with a head");
    copy_model("hf4", "model.safetensors", "classifier.weight", "classifier.veight");
    assert_refused((subject){.path = "model", .adapts = 1, .classes = 3}, /* half a head is none */
                   "found tensor classifier.bias, classifier.veight, which the model does not have");
}

/* ----------------------------------------------------------------------------------------- configurations */

static void a_configuration_of_hugging_face_is_read(void **state) {
    (void)state;
    static const float mean[3] = {0.485f, 0.456f, 0.406f}, std[3] = {0.229f, 0.224f, 0.225f};
    subject s = {.path = HF "hf4"};
    load_well(&s);
    const vit_config *c = &s.model.config;
    assert_true(c->image_height == 12 && c->image_width == 16 && c->channels == 3 && c->patch_size == 4);
    assert_true(c->embed_dim == 24 && c->depth == 2 && c->num_heads == 3 && c->num_classes == 3);
    assert_true(s.model.F == 40 && c->layer_norm_eps == 1e-12);
    assert_true(s.source.has_normalisation && s.source.classes == 3);
    assert_memory_equal(s.source.mean, mean, sizeof mean);
    assert_memory_equal(s.source.std, std, sizeof std);
    assert_true(s.source.transform.crop_pct == 1 && s.source.transform.bilinear && s.source.transform.squash);
    assert_int_equal(cJSON_GetArraySize(s.source.label_names), 3);
    assert_string_equal(cJSON_GetStringValue(cJSON_GetArrayItem(s.source.label_names, 2)), "cat");
    close_subject(&s);
    copy_model("hf4", "", NULL, NULL); /* without a processor: nothing is known of the images */
    remove("model/preprocessor_config.json");
    subject bare = {.path = "model"};
    load_well(&bare);
    assert_false(bare.source.has_normalisation);
    close_subject(&bare);
}

/* Of timm's names test_checkpoint.c has the others. */
static void the_form_of_gelu_is_read(void **state) {
    (void)state;
    static const struct {
        const char *text;
        vit_gelu form;
    } cases[] = {{"\"hidden_act\": \"gelu_new\",", VIT_GELU_TANH},
                 {"\"hidden_act\": \"gelu_pytorch_tanh\",", VIT_GELU_TANH},
                 {"", VIT_GELU_ERF}};
    subject exact = {.path = HF "hf4"};
    load_well(&exact);
    assert_int_equal(exact.model.config.gelu, VIT_GELU_ERF);
    close_subject(&exact);
    for (size_t i = 0; i < COUNT(cases); i++) {
        copy_model("hf4", "config.json", "\"hidden_act\": \"gelu\",", cases[i].text);
        subject s = {.path = "model"};
        load_well(&s);
        assert_int_equal(s.model.config.gelu, cases[i].form);
        close_subject(&s);
    }
}

static void contradicting_configurations_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *old, *new, *expected; /* NULL: it is read */
    } cases[] = {
        {"\"hidden_size\": 24", "\"hidden_size\": 48",
         "model/config.json: hidden_size: found 48, expected 24 by the tensors of model/model.safetensors"},
        {"\"hidden_size\": 24,", "", "hidden_size: found 768, expected 24"},
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "num_hidden_layers: found 3, expected 2"},
        {"\"intermediate_size\": 40", "\"intermediate_size\": 96",
         "intermediate_size: found 96, expected 40"},
        {"\"num_channels\": 3", "\"num_channels\": 1", "num_channels: found 1, expected 3"},
        {"\"patch_size\": 4", "\"patch_size\": 8", "patch_size: found 8, expected 4"},
        {"\"patch_size\": 4", "\"patch_size\": [4, 8]", "patch_size: found 4 x 8, expected square patches"},
        {"\"patch_size\": 4", "\"patch_size\": [4, 4]", NULL},
        {"\"patch_size\": 4", "\"patch_size\": \"4\"", "patch_size: found a string, expected a whole number"},
        {"    16\n", "    20\n", "image_size: found 12x20 (16 positions), expected 13 by the tensors"},
        {"    16\n", "    16, 3\n", "image_size: found 3 numbers, expected 2"},
        {"\"2\": \"cat\"", "\"2\": \"cat\", \"3\": \"dog\"", "id2label: found 4, expected 3 by the tensors"},
        {"\"2\": \"cat\"", "\"4\": \"cat\"",
         "id2label: found nothing for \"2\", expected a string for 0 to 2"},
        {"\"num_attention_heads\": 3", "\"num_attention_heads\": 5", "is not a multiple of 5 heads"},
        {"\"gelu\"", "\"gelu_fast\"",
         "hidden_act: found gelu_fast, expected gelu or gelu_pytorch_tanh or gelu_new"},
        {"\"qkv_bias\": true", "\"qkv_bias\": false", "qkv_bias: found false, expected true"},
        {"\"qkv_bias\": true,", "", NULL},
        {"\"model_type\": \"vit\"", "\"model_type\": \"deit\"", "model_type: found deit, expected vit"},
        {"1e-12", "\"1e-12\"", "layer_norm_eps: found a string, expected a number"},
        {"\"hidden_dropout_prob\": 0.0", "\"hidden_dropout_prob\": 0.1", NULL},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        copy_model("hf4", "config.json", cases[i].old, cases[i].new);
        subject s = {.path = "model"};
        if (cases[i].expected) {
            assert_refused(s, cases[i].expected);
            continue;
        }
        load_well(&s);
        assert_int_equal(strstr(s.source.notes, "ignored hidden_dropout_prob 0.1") != NULL,
                         strstr(cases[i].old, "dropout") != NULL);
        close_subject(&s);
    }
}

static void processors_tell_the_transform(void **state) {
    (void)state;
    static const struct {
        const char *text, *expected; /* NULL: it is read, and tells this: */
        model_transform transform;
    } cases[] = {
        {"{}", NULL, {1, 1, 1}},
        {"{\"resample\": 3, \"size\": 224}", NULL, {1, 0, 1}},
        {"{\"size\": {\"shortest_edge\": 248}, \"crop_size\": {\"height\": 224, \"width\": 224},"
         " \"do_center_crop\": true, \"resample\": 3}",
         NULL,
         {0.9, 0, 0}},
        {"{\"size\": {\"shortest_edge\": 256}, \"crop_size\": 224, \"do_center_crop\": true}",
         NULL,
         {0.875, 1, 0}},
        {"{\"size\": {\"shortest_edge\": 224}, \"crop_size\": 256, \"do_center_crop\": true}",
         "crop_size: found 256, expected 1 to 224",
         {1, 0, 0}},
        {"{\"resample\": 1}",
         "resample: found another number, expected 2 (bilinear) or 3 (bicubic)",
         {1, 0, 0}},
        {"{\"do_rescale\": false}", "do_rescale: found false, expected pixels to be scaled", {1, 0, 0}},
        {"{\"image_mean\": [1, 2], \"image_std\": [1]}", "image_mean: found another array", {1, 0, 0}},
        {"{\"image_mean\": [0], \"image_std\": [0]}", "image_std: found another array", {1, 0, 0}},
        {"[", "preprocessor_config.json: found invalid or truncated JSON", {1, 0, 0}},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        copy_model("hf4", "", NULL, NULL);
        write_bytes("model/preprocessor_config.json", cases[i].text, strlen(cases[i].text));
        subject s = {.path = "model"};
        if (cases[i].expected) {
            assert_refused(s, cases[i].expected);
            continue;
        }
        load_well(&s);
        assert_true(s.source.transform.crop_pct == cases[i].transform.crop_pct);
        assert_int_equal(s.source.transform.bilinear, cases[i].transform.bilinear);
        assert_int_equal(s.source.transform.squash, cases[i].transform.squash);
        close_subject(&s);
    }
}

/* ---------------------------------------------------------------------------------------------- bad files */

/* Names in the header of a file are exchanged for others as long. */
static void missing_and_unknown_tensors_are_listed(void **state) {
    (void)state;
    static const struct {
        const char *folder, *old, *new, *expected;
    } cases[] = {
        {"hf4", "vit.layernorm.bias", "vit.layernorm.bios",
         "found no tensor vit.layernorm.bias, which the model has, and tensor vit.layernorm.bios, which it "
         "has not"},
        {"hf4", "layernorm_after", "layernorm_aftre",
         "found no tensor vit.encoder.layer.0.layernorm_after.weight, "
         "vit.encoder.layer.0.layernorm_after.bias, "
         "vit.encoder.layer.1."},
        {"hf4", ".attention.", ".ottention.", /* 16 of them */
         "vit.encoder.layer.0.attention.attention.value.weight, "
         "vit.encoder.layer.0.attention.output.dense.weight, "
         "vit.encoder.layer.0.attention.attention.query.bias, "
         "vit.encoder.layer.0.attention.attention.key.bias and 10 more, which the model has, and tensor "},
        {"hf_base", "pooler.dense.weight", "pooler.dense.veight",
         "found tensor pooler.dense.veight, which the model does not have"},
        {"hf5", "vit.layers.0.attention.q_proj.bias", "vit.layers.0.attention.qkv....bias",
         "found no tensor vit.layers.0.attention.q_proj.bias, which the model has, and tensor "
         "vit.layers.0.attention.qkv....bias"},
        {"hf4", "vit.encoder.layer.0.layernorm_before.weight", "vit.layers.0.layernorm_before.weight.......",
         "found no tensor vit.encoder.layer.0.layernorm_before.weight, which the model has, and tensor "
         "vit.layers.0.layernorm_before.weight......."}, /* two spellings in one file */
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        copy_model(cases[i].folder, "model.safetensors", cases[i].old, cases[i].new);
        subject s = {.path = "model/model.safetensors", .adapts = 1, .classes = 3, .height = 12, .width = 16};
        if (i % 2) s.path = "model"; /* with its config.json, or without */
        assert_refused(s, cases[i].expected);
    }
}

static void pickles_are_refused_with_advice(void **state) {
    (void)state;
    static const char zip[64] =
        "PK\3\4\0\0\x08\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\0\0archive/data.pkl";
    static const char pickle[64] = "\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19.";
    static const char advice[] =
        ": found a pickle file, which can run any code, expected safetensors; convert it "
        "with: python3 -c \"import torch; ";
    char expected[256];
    error_text e;
    const char *const names[] = {"weights.pth", "model.safetensors", "folder/pytorch_model.bin"};
    if (directory_make("folder", &e)) fail_msg("%s", e.text);
    for (size_t i = 0; i < COUNT(names); i++) {
        write_bytes(names[i], i == 1 ? pickle : zip, 64);
        snprintf(expected, sizeof expected, "%s%s", names[i], advice);
        assert_refused((subject){.path = i == 2 ? "folder" : names[i]}, expected);
    }
    static const char npz[64] = "PK\3\4\0\0\x08\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\5\0\0\0a.npy";
    write_bytes("other.zip", npz, sizeof npz);
    assert_refused((subject){.path = "other.zip"}, "other.zip: found a header of");
}

/* --------------------------------------------------------------------------------------------- exporting */

/* Exports a loaded subject to the folder `to`. */
static int export(subject *s, model_format format, const char *to) {
    model_card card = {s->source.mean, s->source.std, NULL, 0, s->source.transform};
    if (model_source_labels(&s->source, &card.label_names, &card.labels, &s->error)) return -1;
    int failed = model_source_export(&s->source, &s->model, to, format, &card, &s->error);
    free(card.label_names);
    return failed;
}

/* What is exported and read again is the same model, and says the same of itself. */
static void an_exported_model_is_the_same_model(void **state) {
    (void)state;
    static const struct {
        const char *path;
        model_format format;
        size_t height, width;
        vit_gelu gelu;
        const char *notes;
    } cases[] = {{HF "hf4", MODEL_HF, 0, 0, VIT_GELU_ERF, "Hugging Face names"},
                 {HF "hf5", MODEL_HF, 20, 8, VIT_GELU_TANH, "Hugging Face names"},
                 {"golden/timm_tiny", MODEL_HF, 0, 0, VIT_GELU_ERF, "Hugging Face names"},
                 {"golden/timm_tiny", MODEL_TIMM, 0, 0, VIT_GELU_ERF, ""},
                 {"golden/timm_tiny", MODEL_TIMM, 24, 8, VIT_GELU_TANH, ""}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        char folder[32];
        snprintf(folder, sizeof folder, "deep/out%zu", i);
        subject s = {.path = cases[i].path, .height = cases[i].height, .width = cases[i].width};
        subject again = {.path = folder};
        load_well(&s);
        s.model.config.gelu = cases[i].gelu;
        if (export(&s, cases[i].format, folder)) fail_msg("%s", s.error.text);
        load_well(&again);
        assert_string_equal(again.source.notes, cases[i].notes);
        assert_same_weights(&s, &again, 1);
        assert_string_equal(safetensors_metadata(&again.source.file, "format"), "pt");
        vit_config *a = &s.model.config, *b = &again.model.config;
        assert_true(a->image_height == b->image_height && a->image_width == b->image_width);
        assert_true(a->num_heads == b->num_heads && a->layer_norm_eps == b->layer_norm_eps);
        assert_int_equal(s.model.F, again.model.F);
        assert_int_equal(b->gelu, cases[i].gelu);
        assert_memory_equal(s.source.mean, again.source.mean, sizeof s.source.mean);
        assert_memory_equal(s.source.std, again.source.std, sizeof s.source.std);
        assert_true(cJSON_Compare(s.source.label_names, again.source.label_names, 1));
        const model_transform *t = &s.source.transform, *u = &again.source.transform;
        assert_int_equal(t->bilinear, u->bilinear);
        if (a->image_height == a->image_width) /* 16 / 0.9 = 17.8: 17 pixels, of which 0.92 is no other */
            assert_true(floor(16 / t->crop_pct) == floor(16 / u->crop_pct));
        assert_int_equal(access("deep/out0.tmp", F_OK), -1);
        close_subject(&s);
        close_subject(&again);
    }
}

static void what_cannot_be_exported_is_refused(void **state) {
    (void)state;
    subject s = {.path = HF "hf4"};
    load_well(&s);
    assert_int_equal(export(&s, MODEL_TIMM, "out"), -1);
    assert_non_null(strstr(s.error.text, "cannot say a LayerNorm eps of 1e-12"));
    assert_int_equal(export(&s, MODEL_HF, "out"), 0);
    assert_int_equal(export(&s, MODEL_HF, "out"), -1);
    assert_non_null(strstr(s.error.text, "out: found model.safetensors, so it already holds a model"));
    write_bytes("file", "text", 4);
    assert_int_equal(export(&s, MODEL_HF, "file"), -1);
    assert_non_null(strstr(s.error.text, "cannot be renamed to file"));
    assert_int_equal(export(&s, MODEL_HF, "file/out"), -1);
    assert_non_null(strstr(s.error.text, "cannot be made a directory"));
    assert_int_equal(access("file.tmp", F_OK), -1); /* nothing is left */
    close_subject(&s);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_spelling_gives_the_same_weights),    TEST(logits_are_pytorchs_in_double),
        TEST(ten_steps_are_pytorchs_in_double),         TEST(positions_are_resampled_as_timm_does),
        TEST(grids_are_told_apart_by_their_sides),      TEST(a_head_of_another_size_is_replaced),
        TEST(a_configuration_of_hugging_face_is_read),  TEST(the_form_of_gelu_is_read),
        TEST(contradicting_configurations_are_refused), TEST(processors_tell_the_transform),
        TEST(missing_and_unknown_tensors_are_listed),   TEST(pickles_are_refused_with_advice),
        TEST(an_exported_model_is_the_same_model),      TEST(what_cannot_be_exported_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
