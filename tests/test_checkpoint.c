/* test_checkpoint.c - models on disk: written by some ranks under one strategy, read by others under another.
 *
 * Weights follow a formula, and what was written is read back by the safetensors reader as well. timm_tiny
 * was saved by timm (golden/make_golden.py). Bad folders differ from a good one by one fault each. */
#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "checkpoint.h"

#include <cmocka.h>

#include "tests/files.h"

/* A rectangular image; 44 * (49 / 44) is less than 49 in floating point. */
static const vit_config odd_config = {.name = "vit_tiny_patch16_224",
                                      .image_height = 6,
                                      .image_width = 10,
                                      .channels = 3,
                                      .patch_size = 2,
                                      .embed_dim = 44,
                                      .depth = 2,
                                      .num_heads = 4,
                                      .num_classes = 3,
                                      .mlp_ratio = 1.12,
                                      .layer_norm_eps = 1e-5};

static char class_names[3][256] = {"cat", "dog", "a \"quoted\" \xC3\xA9"};
static const float card_mean[3] = {0.1f, -0.2f, 0.3f}, card_std[3] = {0.5f, 1.0f / 3, 0x1p-40f};
static const model_card card = {card_mean, card_std, class_names, 3, {0.875, 1, 0}};

/* ---------------------------------------------------------------------------------------- loading, saving */

/* What one world does: takes weights from a path or by a formula, and saves them. */
typedef struct {
    const char *strategy;
    int ranks;
    const char *from; /* a model on disk; NULL: odd_config with weights by formula from the seed */
    uint64_t seed;
    const char *to; /* a folder, or NULL */
    dist_optimizer optimizer;
    int frozen;         /* the backbone is */
    const char *resume; /* a step folder to be loaded over all that, or NULL */
    /* what came of it */
    vit_model model;
    float *weights;  /* all units, of the ranks that save */
    float *state[2]; /* the optimizer's, likewise */
    size_t count;
    error_text error;
    /* shared by the ranks */
    model_source source;
    dist_hub *hub;
} job;

/* Unit u's weights by formula; the padding is 0. */
static void formula(const vit_model *m, size_t u, uint64_t seed, float *values) {
    const vit_unit *unit = &m->unit[u];
    memset(values, 0, unit->count * sizeof *values);
    for (size_t k = 0; k < unit->tensors; k++)
        for (size_t i = unit->tensor[k].offset; i < unit->tensor[k].offset + unit->tensor[k].count; i++)
            values[i] = (float)random_normal(random_key(seed, 1, u, 0), i);
}

/* The optimizer's state i of unit u by formula; 0 where nothing is trained. */
static void state_formula(const vit_model *m, size_t u, uint64_t seed, int i, float *values) {
    const vit_unit *unit = &m->unit[u];
    formula(m, u, seed + 1000 + (uint64_t)i, values);
    memset(values + unit->trainable, 0, (unit->count - unit->trainable) * sizeof *values);
}

static checkpoint_state some_state(void) {
    return (checkpoint_state){.step = 7,
                              .epoch = 2,
                              .position = 40,
                              .global_batch = 8,
                              .batch_size = 2,
                              .accumulation = 2,
                              .ranks = 2,
                              .metrics_bytes = 12345678901,
                              .epoch_loss = 0x1.123456789abcdp+1,
                              .epoch_steps = 5,
                              .last_accuracy = 1. / 3,
                              .best_accuracy = 0x1.fffffffffffffp-2,
                              .best_saved = -1,
                              .evaluated = SIZE_MAX,
                              .best = "step-00000004",
                              .options = cJSON_Parse("{\"seed\":3,\"model\":null}")};
}

static int job_rank(rt_rank *rank, void *argument) {
    job *j = argument;
    error_text e = {{0}};
    dist_comm comm;
    dist d = {0};
    size_t offset = 0;
    if (vit_cpu.open(rank, &e)) return rt_fail(rank, "%s", e.text);
    if (dist_comm_open(&comm, j->hub, rank, &vit_cpu)) return -1;
    dist_options o = {
        .strategy = j->strategy, .batch_size = 1, .accumulation = 1, .optimizer = j->optimizer, .counts = 7};
    int failed = dist_open(&d, &comm, &j->model, &o, &e);
    if (!failed && j->from) failed = model_source_load(&j->source, &d, j->seed, &e);
    for (size_t u = 0; u < j->model.units && !failed && !j->from; u++) {
        float *values = malloc(j->model.unit[u].count * sizeof *values);
        formula(&j->model, u, j->seed, values);
        dist_import(&d, u, values);
        for (int i = 0; i < 2; i++) {
            state_formula(&j->model, u, j->seed, i, values);
            dist_import_state(&d, u, i, values);
        }
        free(values);
    }
    if (!failed && j->resume) failed = checkpoint_load(&d, j->resume, &e);
    if (!failed && j->to) {
        checkpoint_state s = some_state();
        failed = checkpoint_save(&d, j->to, &card, &s, &e);
        checkpoint_state_free(&s);
    }
    if (failed && *e.text) rt_fail(rank, "%s", e.text);
    for (size_t u = 0; u < j->model.units && d.saves && !failed; offset += j->model.unit[u++].count) {
        dist_export(&d, u, j->weights + offset);
        for (int i = 0; i < 2; i++) dist_export_state(&d, u, i, j->state[i] + offset);
    }
    dist_close(&d);
    dist_comm_close(&comm);
    vit_cpu.close(rank);
    return 0;
}

/* 0, or -1 with j->error. Free it with job_free. */
static int run(job *j) {
    vit_config config = {.layer_norm_eps = 1e-6, .num_heads = odd_config.num_heads};
    rt_world world;
    if (!j->from)
        config = odd_config, config.freeze_backbone = j->frozen;
    else if (model_source_open(&j->source, j->from, &j->error) ||
             model_source_config(&j->source, &config, &j->error))
        return -1;
    if (vit_model_init(&j->model, &config, RT_FP32, &j->error) ||
        (j->from && model_source_check(&j->source, &j->model, &j->error)))
        return -1;
    for (size_t u = 0; u < j->model.units; u++) j->count += j->model.unit[u].count;
    j->weights = calloc(j->count, sizeof *j->weights);
    for (int i = 0; i < 2; i++) j->state[i] = calloc(j->count, sizeof *j->weights);
    assert_int_equal(rt_world_init(&world, j->ranks, RT_CHECK), 0);
    j->hub = dist_hub_create(&world);
    int failed = rt_run(&world, job_rank, j);
    j->error = world.error;
    if (world.table) fail_msg("%s\n%s", world.error.text, world.table);
    dist_hub_free(j->hub);
    rt_world_free(&world);
    return failed;
}

static void job_free(job *j) {
    model_source_close(&j->source);
    vit_model_free(&j->model);
    free(j->weights);
    for (int i = 0; i < 2; i++) free(j->state[i]);
}

static void save(const char *strategy, int ranks, uint64_t seed, const char *to) {
    job j = {.strategy = strategy, .ranks = ranks, .seed = seed, .to = to};
    if (run(&j)) fail_msg("%s", j.error.text);
    job_free(&j);
}

/* Loading the path must fail with a message that names it and has `expected` in it. */
static void assert_refused(const char *path, const char *expected) {
    job j = {.strategy = "single", .ranks = 1, .from = path};
    if (!run(&j)) fail_msg("%s was read, expected: %s", path, expected);
    if (!strstr(j.error.text, expected) || strchr(j.error.text, '\n'))
        fail_msg("found the message \"%s\", expected one line with \"%s\"", j.error.text, expected);
    job_free(&j);
}

/* The weights of a path, unit after unit, are the formula's. */
static void assert_holds(const char *path, uint64_t seed) {
    job j = {.strategy = "single", .ranks = 1, .from = path};
    if (run(&j)) fail_msg("%s", j.error.text);
    float *expected = malloc(j.count * sizeof *expected);
    for (size_t u = 0, offset = 0; u < j.model.units; offset += j.model.unit[u++].count)
        formula(&j.model, u, seed, expected + offset);
    assert_memory_equal(j.weights, expected, j.count * sizeof *expected);
    free(expected);
    job_free(&j);
}

/* ------------------------------------------------------------------------------------------------ folders */

/* Every test runs in an empty directory of its own; the goldens lie where it began. */
typedef struct {
    char start[2048], work[64];
} place;

static int enter(void **state) {
    place *p = calloc(1, sizeof *p);
    strcpy(p->work, "/tmp/test_checkpoint_XXXXXX");
    *state = p;
    return !getcwd(p->start, sizeof p->start) || !mkdtemp(p->work) || chdir(p->work) ? -1 : 0;
}

static int leave(void **state) {
    place *p = *state;
    int failed = chdir(p->start) || remove_tree(p->work);
    free(p);
    return failed;
}

static void write_text(const char *path, const char *text) {
    error_text e;
    if (file_write_atomic(path, text, strlen(text), &e)) fail_msg("%s", e.text);
}

static char *read_text(const char *path, size_t *size) {
    char *text;
    error_text e;
    if (file_read_whole(path, 1 << 24, &text, size, &e)) fail_msg("%s", e.text);
    return text;
}

static void make_directory(const char *path) {
    error_text e;
    if (directory_make(path, &e)) fail_msg("%s", e.text);
}

static int entries_of(const char *path) {
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, NULL);
    for (int i = 0; i < count; i++) free(entries[i]);
    free(entries);
    return count - 2;
}

static int exists(const char *path) { return access(path, F_OK) == 0; }

/* --------------------------------------------------------------------------------------- good checkpoints */

static const struct {
    const char *strategy;
    int ranks;
} worlds[] = {{"single", 1}, {"dp", 1},    {"ddp", 1},   {"dp", 2},    {"ddp", 2},  {"dp", 3},
              {"ddp", 3},    {"zero1", 2}, {"zero2", 3}, {"zero3", 2}, {"zero3", 5}};
enum { WORLDS = sizeof worlds / sizeof *worlds };

/* Whoever writes it, the file has the same bytes; whoever reads it gets the same weights. */
static void a_reloaded_model_is_bit_identical(void **state) {
    (void)state;
    size_t size, again;
    save("single", 1, 7, "first");
    char *bytes = read_text("first/model.safetensors", &size);
    for (int w = 1; w < WORLDS; w++) {
        save(worlds[w].strategy, worlds[w].ranks, 7, "other");
        char *other = read_text("other/model.safetensors", &again);
        assert_int_equal(size, again);
        assert_memory_equal(bytes, other, size);
        free(other);
        assert_int_equal(remove_tree("other"), 0);
    }
    job written = {.strategy = "single", .ranks = 1, .seed = 7};
    assert_int_equal(run(&written), 0);
    for (int w = 0; w < WORLDS; w++) {
        job j = {.strategy = worlds[w].strategy, .ranks = worlds[w].ranks, .from = "first"};
        if (run(&j)) fail_msg("%s", j.error.text);
        assert_int_equal(j.count, written.count);
        assert_memory_equal(j.weights, written.weights, j.count * sizeof *j.weights);
        job_free(&j);
    }
    job_free(&written);
    free(bytes);
}

/* Read by the safetensors reader alone: timm's names and logical shapes, the formula's values. */
static void a_file_holds_whole_tensors(void **state) {
    (void)state;
    static const struct {
        const char *name;
        size_t rank, shape[4];
    } some[] = {{"cls_token", 3, {1, 1, 44}},
                {"pos_embed", 3, {1, 16, 44}},
                {"patch_embed.proj.weight", 4, {44, 3, 2, 2}},
                {"blocks.1.attn.qkv.weight", 2, {132, 44}},
                {"blocks.0.mlp.fc1.bias", 1, {49}},
                {"blocks.1.mlp.fc2.weight", 2, {44, 49}},
                {"norm.weight", 1, {44}},
                {"head.weight", 2, {3, 44}}};
    safetensors f;
    vit_model m;
    error_text e;
    save("ddp", 3, 11, "model");
    if (safetensors_open("model/model.safetensors", &f, &e)) fail_msg("%s", e.text);
    assert_int_equal(f.count, 4 + 2 * 12 + 4);
    assert_string_equal(safetensors_metadata(&f, "format"), "pt");
    for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
        const st_tensor *t = safetensors_find(&f, some[i].name);
        assert_non_null(t);
        assert_int_equal(t->rank, some[i].rank);
        for (size_t k = 0; k < t->rank; k++) assert_int_equal(t->shape[k], some[i].shape[k]);
    }
    assert_int_equal(vit_model_init(&m, &odd_config, RT_FP32, &e), 0);
    for (size_t u = 0; u < m.units; u++) {
        float *expected = malloc(m.unit[u].count * sizeof *expected), *found = malloc(1 << 16);
        formula(&m, u, 11, expected);
        for (size_t k = 0; k < m.unit[u].tensors; k++) {
            const vit_tensor *t = &m.unit[u].tensor[k];
            const st_tensor *s = safetensors_find(&f, t->name);
            assert_non_null(s);
            assert_int_equal(s->dtype, ST_F32);
            assert_int_equal(s->count, t->count);
            assert_int_equal(safetensors_read_f32(&f, s, 0, s->count, found, &e), 0);
            assert_memory_equal(found, expected + t->offset, t->count * sizeof *found);
        }
        free(expected);
        free(found);
    }
    vit_model_free(&m);
    safetensors_close(&f);
}

static void config_json_tells_the_model(void **state) {
    (void)state;
    model_source s;
    vit_config c = {.drop_path = 0.5};
    error_text e;
    save("single", 1, 1, "model");
    if (model_source_open(&s, "model", &e) || model_source_config(&s, &c, &e)) fail_msg("%s", e.text);
    assert_string_equal(c.name, odd_config.name);
    assert_int_equal(c.image_height, 6);
    assert_int_equal(c.image_width, 10);
    assert_int_equal(c.channels, 3);
    assert_int_equal(c.patch_size, 2);
    assert_int_equal(c.embed_dim, 44);
    assert_int_equal(c.depth, 2);
    assert_int_equal(c.num_heads, 4);
    assert_int_equal(c.num_classes, 3);
    assert_true(c.mlp_ratio == 1.12);
    assert_true(c.layer_norm_eps == 1e-5);
    assert_true(s.has_normalisation);
    assert_memory_equal(s.mean, card_mean, sizeof card_mean);
    assert_memory_equal(s.std, card_std, sizeof card_std);
    assert_int_equal(cJSON_GetArraySize(s.label_names), 3);
    for (int i = 0; i < 3; i++)
        assert_string_equal(cJSON_GetStringValue(cJSON_GetArrayItem(s.label_names, i)), class_names[i]);
    model_source_close(&s);
}

/* Everything but heads and a rectangle's sides; a square's side. */
static void the_shapes_of_a_bare_file_tell(void **state) {
    (void)state;
    model_source s;
    vit_config c = {.layer_norm_eps = 1e-6}, told = odd_config;
    vit_model m;
    error_text e;
    save("ddp", 2, 1, "model");
    if (model_source_open(&s, "model/model.safetensors", &e) || model_source_config(&s, &c, &e))
        fail_msg("%s", e.text);
    assert_int_equal(c.num_heads, 0);
    assert_int_equal(c.image_height, 0);
    assert_int_equal(c.image_width, 0);
    assert_false(s.has_normalisation);
    c.num_heads = 4;
    c.image_height = 6;
    c.image_width = 10;
    if (vit_model_init(&m, &c, RT_FP32, &e) || model_source_check(&s, &m, &e)) fail_msg("%s", e.text);
    assert_int_equal(c.channels, told.channels);
    assert_int_equal(m.F, 49);
    vit_model_free(&m);
    model_source_close(&s);
    remove("model/config.json"); /* a folder without it is as good as the file */
    if (model_source_open(&s, "model", &e) || model_source_config(&s, &c, &e)) fail_msg("%s", e.text);
    assert_int_equal(c.embed_dim, 44);
    model_source_close(&s);
}

static void a_file_of_timm_opens(void **state) {
    const place *p = *state;
    char path[4096];
    static const float mean[3] = {0.485f, 0.456f, 0.406f}, std[3] = {0.229f, 0.224f, 0.225f};
    snprintf(path, sizeof path, "%s/tests/golden/timm_tiny", p->start);
    job j = {.strategy = "ddp", .ranks = 2, .from = path};
    if (run(&j)) fail_msg("%s", j.error.text);
    const vit_config *c = &j.model.config;
    assert_int_equal(c->image_height, 16);
    assert_int_equal(c->image_width, 16);
    assert_int_equal(c->embed_dim, 32);
    assert_int_equal(c->num_heads, 2);
    assert_int_equal(c->num_classes, 5);
    assert_true(c->mlp_ratio == 4 && c->layer_norm_eps == 1e-6);
    assert_memory_equal(j.source.mean, mean, sizeof mean);
    assert_memory_equal(j.source.std, std, sizeof std);
    assert_string_equal(cJSON_GetStringValue(cJSON_GetArrayItem(j.source.label_names, 3)), "dog");
    for (size_t u = 0, offset = 0; u < j.model.units; offset += j.model.unit[u++].count)
        for (size_t k = 0; k < j.model.unit[u].tensors; k++) {
            const vit_tensor *t = &j.model.unit[u].tensor[k];
            const st_tensor *s = safetensors_find(&j.source.file, t->name);
            assert_memory_equal(j.weights + offset + t->offset, j.source.file.bytes + s->offset, s->size);
        }
    job_free(&j);
    snprintf(path, sizeof path, "%s/tests/golden/timm_tiny/model.safetensors", p->start);
    model_source s;
    vit_config bare = {0};
    if (model_source_open(&s, path, &j.error) || model_source_config(&s, &bare, &j.error))
        fail_msg("%s", j.error.text);
    assert_int_equal(bare.image_height, 16); /* 4 patches of 8 */
    assert_int_equal(bare.image_width, 16);
    model_source_close(&s);
}

static void an_output_directory_gives_its_best_else_its_latest(void **state) {
    (void)state;
    error_text e;
    model_source s;
    make_directory("run/checkpoints");
    save("single", 1, 1, "run/checkpoints/step-00000001");
    save("dp", 2, 2, "run/checkpoints/step-00000002");
    assert_int_equal(model_source_open(&s, "run", &e), -1);
    assert_non_null(strstr(e.text, "run: found neither model.safetensors nor checkpoints/latest"));
    write_text("run/checkpoints/latest", "step-00000002");
    assert_holds("run", 2);
    write_text("run/checkpoints/best", "step-00000001\n"); /* as an editor leaves it */
    assert_holds("run", 1);
    assert_holds("run/checkpoints/step-00000002", 2);
    write_text("run/checkpoints/best", "step-00000009");
    assert_refused("run", "run/checkpoints/step-00000009/model.safetensors: cannot be opened");
}

/* ---------------------------------------------------------------------------------------- bad checkpoints */

static void missing_paths_are_refused(void **state) {
    (void)state;
    make_directory("empty");
    assert_refused("nowhere", "nowhere: cannot be read: No such file or directory");
    assert_refused("empty", "empty: found neither model.safetensors");
    write_text("short", "1234567");
    assert_refused("short", "short: found a file of 7 bytes");
    save("single", 1, 1, "other");
    assert_int_equal(truncate("other/model.safetensors", 5000), 0);
    assert_refused("other", "other/model.safetensors: ");
}

/* Writes the tensors of odd_config, all values 1/4, but for one fault. */
static void write_faulty(const char *path, const char *drop, const char *add, const st_tensor *change,
                         float poison) {
    vit_model m;
    error_text e;
    size_t count, kept = 0;
    model_part *parts;
    st_plan plan;
    int fd = -1;
    assert_int_equal(vit_model_init(&m, &odd_config, RT_FP32, &e), 0);
    assert_int_equal(model_parts(&m, (model_naming){SPELLING_TIMM, ""}, &parts, &count, &e), 0);
    st_tensor *list = calloc(count + 1, sizeof *list);
    for (size_t i = 0; i < count; i++) {
        list[i] = (st_tensor){parts[i].name, ST_F32, parts[i].dims, parts[i].shape, 0, 0, 0};
        if (change && !strcmp(list[i].name, change->name)) list[i] = *change;
        if (!drop || strcmp(list[i].name, drop)) list[kept++] = list[i];
    }
    if (add) list[kept++] = (st_tensor){.name = add, .dtype = ST_F32};
    if (safetensors_plan(path, list, kept, NULL, 0, &plan, &e) || safetensors_create(path, &plan, &fd, &e))
        fail_msg("%s", e.text);
    float *values = calloc(1 << 14, sizeof *values);
    for (size_t i = 0; i < 1 << 14; i++) values[i] = 0.25f;
    for (size_t i = 0; i < kept; i++) {
        values[3] = strcmp(list[i].name, "blocks.1.norm2.bias") ? 0.25f : poison;
        assert_int_equal(safetensors_write(fd, path, &list[i], 0, list[i].count, values, &e), 0);
    }
    close(fd);
    free(values);
    free(list);
    free(parts);
    safetensors_plan_free(&plan);
    vit_model_free(&m);
}

static void faulty_tensors_are_refused(void **state) {
    (void)state;
    const char *file = "model/model.safetensors";
    save("single", 1, 1, "model");
    write_faulty(file, NULL, NULL, NULL, 0.25f);
    job j = {.strategy = "dp", .ranks = 2, .from = "model"};
    if (run(&j)) fail_msg("%s", j.error.text);
    job_free(&j);
    write_faulty(file, "blocks.1.attn.proj.bias", NULL, NULL, 0.25f);
    assert_refused("model", "model/model.safetensors: found no tensor blocks.1.attn.proj.bias");
    write_faulty(file, NULL, "fc_norm.weight", NULL, 0.25f);
    assert_refused("model", "found tensor fc_norm.weight, which the model does not have");
    write_faulty(file, NULL, NULL,
                 &(st_tensor){.name = "head.bias", .dtype = ST_F32, .rank = 1, .shape = (size_t[]){4}},
                 0.25f);
    assert_refused("model", "tensor head.bias: found shape [4], expected [3]");
    write_faulty(file, NULL, NULL,
                 &(st_tensor){.name = "cls_token", .dtype = ST_F32, .rank = 2, .shape = (size_t[]){1, 44}},
                 0.25f);
    assert_refused("model", "tensor cls_token: found shape [1, 44], expected [1, 1, 44]");
    write_faulty(file, NULL, NULL,
                 &(st_tensor){.name = "head.bias", .dtype = ST_I32, .rank = 1, .shape = (size_t[]){3}},
                 0.25f);
    assert_refused("model", "tensor 'head.bias': found dtype I32, expected F32, BF16, F16 or F64");
    write_faulty(file, NULL, NULL, NULL, NAN);
    assert_refused("model", "tensor blocks.1.norm2.bias: found nan at element 3, expected finite weights");
    write_faulty(file, NULL, NULL, NULL, -INFINITY);
    assert_refused("model", "tensor blocks.1.norm2.bias: found -inf at element 3");
    write_faulty(file, "pos_embed", NULL, NULL, 0.25f);
    assert_refused(file, "found no Vision Transformer in the names of timm");
    for (int ranks = 2; ranks <= 3; ranks++) { /* on several ranks too */
        write_faulty(file, NULL, NULL, NULL, NAN);
        job k = {.strategy = "ddp", .ranks = ranks, .from = "model"};
        assert_int_equal(run(&k), -1);
        assert_non_null(strstr(k.error.text, "found nan at element 3"));
        job_free(&k);
    }
}

/* Half precision in a file is as good as single. */
static void other_floating_types_are_read(void **state) {
    (void)state;
    save("single", 1, 1, "model");
    write_faulty("model/model.safetensors", NULL, NULL,
                 &(st_tensor){.name = "norm.bias", .dtype = ST_F64, .rank = 1, .shape = (size_t[]){44}},
                 0.25f);
    job j = {.strategy = "single", .ranks = 1, .from = "model"};
    if (run(&j)) fail_msg("%s", j.error.text);
    job_free(&j);
}

#define ARGS                                                                                                 \
    "\"img_size\":[6,10],\"patch_size\":2,\"embed_dim\":44,\"depth\":2,\"num_heads\":4,\"mlp_ratio\":1.12"
#define CONFIG(more, args)                                                                                   \
    "{\"architecture\":\"vit_tiny_patch16_224\",\"num_classes\":3" more ",\"model_args\":{" ARGS args "}}"

static void faulty_configurations_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *text, *expected; /* NULL: it is read */
    } cases[] = {
        {CONFIG("", ""), NULL},
        {CONFIG(",\"mean\":[0.5,0.5,0.5],\"std\":[1]", ""), NULL}, /* as timm's older files have it */
        {CONFIG(",\"global_pool\":\"token\"", ",\"class_token\":true,\"qkv_bias\":true"), NULL},
        {"", "model/config.json: "},
        {"{\"architecture\":", "invalid or truncated JSON"},
        {"[]", "architecture: found nothing, expected a timm name"},
        {"[1]", "architecture: found nothing, expected a timm name"},
        {"{}", "architecture: found nothing, expected a timm name"},
        {"{\"architecture\":3}", "architecture: found a number, expected a timm name"},
        {"{\"architecture\":\"resnet50\"}", "architecture: found resnet50, expected a Vision Transformer"},
        {"{\"architecture\":\"vit\",\"architecture\":\"vit\"}", "found the key 'architecture' twice"},
        {"{\"architecture\":\"vit_tiny_patch16_224\"}", "tensor patch_embed.proj.weight: found shape"},
        {CONFIG(",\"global_pool\":\"avg\"", ""), "global_pool: found avg, expected token"},
        {CONFIG("", ",\"global_pool\":\"avg\""), "model_args: found global_pool"},
        {CONFIG("", ",\"class_token\":false"), "model_args: found class_token"},
        {CONFIG("", ",\"qkv_bias\":false"), "model_args: found qkv_bias"},
        {CONFIG("", ",\"init_values\":0.1"), "model_args: found init_values"},
        {CONFIG("", ",\"act_layer\":\"gelu_tanh\""), NULL},
        {CONFIG("", ",\"act_layer\":\"quick_gelu\""),
         "act_layer: found quick_gelu, expected gelu or gelu_tanh"},
        {CONFIG("", ",\"act_layer\":null"), "act_layer: found null, expected gelu or gelu_tanh"},
        {CONFIG("", ",\"embed_dim\":44"), "found the key 'embed_dim' twice"},
        {CONFIG("", ",\"in_chans\":0"), "in_chans: found another number, expected a whole number"},
        {CONFIG("", ",\"in_chans\":-3"), "in_chans: found another number"},
        {CONFIG("", ",\"in_chans\":1.5"), "in_chans: found another number"},
        {CONFIG("", ",\"in_chans\":1e300"), "in_chans: found another number"},
        {CONFIG("", ",\"in_chans\":\"3\""), "in_chans: found a string"},
        {CONFIG("", ",\"in_chans\":null"), "in_chans: found null"},
        {CONFIG("", ",\"in_chans\":1"), "tensor patch_embed.proj.weight: found shape [44, 3, 2, 2]"},
        {CONFIG("", ",\"num_classes\":4"), "tensor head.weight: found shape [3, 44], expected [4, 44]"},
        {CONFIG(",\"layer_norm_eps\":\"1e-5\"", ""), "layer_norm_eps: found a string"},
        {CONFIG(",\"layer_norm_eps\":-1", ""), "impossible model"},
        {CONFIG(",\"mean\":[0.5,0.5],\"std\":[1]", ""), "mean: found another array"},
        {CONFIG(",\"mean\":\"0.5\",\"std\":[1]", ""), "mean: found a string"},
        {CONFIG(",\"mean\":[0.5],\"std\":[1,1,0]", ""), "std: found another array, expected one number or"},
        {CONFIG(",\"mean\":[0.5],\"std\":[1e-300]", ""), "std: found another array"}, /* 0 as a float */
        {CONFIG(",\"pretrained_cfg\":{\"mean\":[1e39],\"std\":[1]}", ""), "mean: found another array"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"model_args\":[1]}", "model_args: found an array"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"model_args\":7}", "model_args: found a number"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"model_args\":{\"img_size\":[6]}}",
         "img_size: found 1 numbers, expected 2"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"model_args\":{\"img_size\":[6,\"x\"]}}",
         "img_size: found a string"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"model_args\":{\"mlp_ratio\":\"4\"}}",
         "model_args: found mlp_ratio"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"model_args\":{\"mlp_ratio\":-4}}", "impossible model"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"model_args\":{\"num_heads\":5}}", "impossible model"},
        {"{\"architecture\":\"vit_tiny_patch16_224\",\"num_classes\":0}",
         "num_classes: found another number"},
    };
    save("single", 1, 1, "model");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text("model/config.json", cases[i].text);
        if (cases[i].expected)
            assert_refused("model", cases[i].expected);
        else
            assert_holds("model", 1);
    }
}

/* The depth of a configuration and that of the file must agree. */
static void another_depth_is_refused(void **state) {
    (void)state;
    save("single", 1, 1, "model");
    size_t size;
    char *text = read_text("model/config.json", &size), *depth = strstr(text, "\"depth\":\t2");
    assert_non_null(depth);
    depth[strlen("\"depth\":\t")] = '3';
    write_text("model/config.json", text);
    assert_refused("model", "found no tensor blocks.2.");
    depth[strlen("\"depth\":\t")] = '1';
    write_text("model/config.json", text);
    assert_refused("model", "found tensor blocks.1.");
    free(text);
}

/* ------------------------------------------------------------------------------------------ failed saving */

/* Saving to `to` fails on 1, 2 and 3 ranks with the reason of the rank that found it. */
static void assert_not_saved(const char *to, const char *expected) {
    for (int w = 0; w < WORLDS; w++)
        for (int repeat = 0; repeat < 5; repeat++) {
            job j = {.strategy = worlds[w].strategy, .ranks = worlds[w].ranks, .seed = 3, .to = to};
            if (!run(&j)) fail_msg("%s was written, expected: %s", to, expected);
            if (!strstr(j.error.text, expected))
                fail_msg("%d ranks: found \"%s\", expected \"%s\"", j.ranks, j.error.text, expected);
            job_free(&j);
        }
}

/* A file may not grow beyond 4000 bytes, as on a disk that is almost full. */
static void nothing_is_left_when_there_is_no_room(void **state) {
    (void)state;
    struct rlimit before, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = before;
    small.rlim_cur = 4000;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_not_saved("step-00000001", "step-00000001.tmp/model.safetensors: no room for ");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(entries_of("."), 0);
}

static void nothing_is_left_below_a_file(void **state) {
    (void)state;
    write_text("file", "text");
    assert_not_saved("file/step-00000001", "file: cannot be made a directory");
    assert_int_equal(entries_of("."), 1);
}

static void nothing_is_left_in_a_folder_that_cannot_be_written(void **state) {
    (void)state;
    if (geteuid() == 0) {
        print_message("skipped: root may write to every folder\n");
        skip();
    }
    make_directory("locked");
    assert_int_equal(chmod("locked", 0555), 0);
    assert_not_saved("locked/step-00000001", "locked/step-00000001.tmp: cannot be made a directory");
    assert_int_equal(entries_of("locked"), 0);
    assert_int_equal(chmod("locked", 0755), 0);
}

/* A run that was resumed further back comes by again; and what killed runs left is in nobody's way. */
static void an_existing_checkpoint_is_replaced(void **state) {
    (void)state;
    save("single", 1, 1, "step-00000001");
    make_directory("step-00000001.tmp");
    write_text("step-00000001.tmp/trainer_state.json.tmp", "half a");
    write_text("step-00000001.tmp/preprocessor_config.json", "left");
    make_directory("step-00000001.replaced");
    write_text("step-00000001.replaced/model.safetensors", "left");
    save("ddp", 2, 2, "step-00000001");
    assert_holds("step-00000001", 2);
    assert_int_equal(entries_of("."), 1);
    assert_int_equal(entries_of("step-00000001"), 4);
}

/* ----------------------------------------------------------------------------------------------- resuming */

/* Weights and states are the formula's, however they were written. */
static void assert_resumes(const char *folder, const char *strategy, int ranks, dist_optimizer optimizer,
                           int frozen, uint64_t seed) {
    job j = {.strategy = strategy,
             .ranks = ranks,
             .optimizer = optimizer,
             .frozen = frozen,
             .seed = seed + 1,
             .resume = folder};
    if (run(&j)) fail_msg("%s", j.error.text);
    float *expected = malloc(j.count * sizeof *expected);
    for (int i = -1; i < 2; i++) {
        for (size_t u = 0, offset = 0; u < j.model.units; offset += j.model.unit[u++].count)
            if (i < 0)
                formula(&j.model, u, seed, expected + offset);
            else
                state_formula(&j.model, u, seed, i, expected + offset);
        if (optimizer == DIST_SGD && i == 1) memset(expected, 0, j.count * sizeof *expected);
        assert_memory_equal(i < 0 ? j.weights : j.state[i], expected, j.count * sizeof *expected);
    }
    free(expected);
    job_free(&j);
}

static void any_world_resumes_what_any_other_wrote(void **state) {
    (void)state;
    for (int kind = 0; kind < 4; kind++)
        for (int w = 0; w < WORLDS; w++) {
            dist_optimizer optimizer = kind % 2 ? DIST_SGD : DIST_ADAMW;
            job j = {.strategy = worlds[w].strategy,
                     .ranks = worlds[w].ranks,
                     .seed = 5,
                     .to = "step-1",
                     .optimizer = optimizer,
                     .frozen = kind / 2};
            size_t size;
            if (run(&j)) fail_msg("%s", j.error.text);
            char *text = read_text("step-1/trainer_state.json", &size);
            if (w == 0) write_text("first.json", text); /* the same whoever writes, checksums included */
            char *first = read_text("first.json", &size);
            assert_string_equal(text, first);
            assert_int_equal(checkpoint_check("step-1", &j.model, optimizer, &j.error), 0);
            int other = (w + 1 + kind) % WORLDS;
            assert_resumes("step-1", worlds[other].strategy, worlds[other].ranks, optimizer, kind / 2, 5);
            free(first);
            free(text);
            job_free(&j);
        }
}

/* Read by the safetensors reader alone; checksums by the formula, one element after the other. */
static void the_optimizer_has_a_file_of_its_own(void **state) {
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        dist_optimizer optimizer = kind % 2 ? DIST_SGD : DIST_ADAMW;
        job j = {.strategy = "zero3",
                 .ranks = 3,
                 .seed = 5,
                 .to = "step-1",
                 .optimizer = optimizer,
                 .frozen = kind / 2};
        safetensors f, model;
        error_text e;
        size_t size;
        if (run(&j)) fail_msg("%s", j.error.text);
        if (safetensors_open("step-1/optimizer.safetensors", &f, &e) ||
            safetensors_open("step-1/model.safetensors", &model, &e))
            fail_msg("%s", e.text);
        char *text = read_text("step-1/trainer_state.json", &size);
        cJSON *root = cJSON_Parse(text);
        const cJSON *sums =
            cJSON_GetObjectItem(cJSON_GetObjectItem(root, "checksums"), "optimizer.safetensors");
        assert_int_equal(f.count, (kind / 2 ? 2 : 32) * (optimizer == DIST_SGD ? 1 : 2));
        assert_int_equal(f.count, cJSON_GetArraySize(sums));
        for (size_t u = 0; u < j.model.units; u++)
            for (size_t k = 0; k < j.model.unit[u].tensors; k++)
                for (int i = 0; i < (optimizer == DIST_SGD ? 1 : 2); i++) {
                    const vit_tensor *t = &j.model.unit[u].tensor[k];
                    const st_tensor *weights = safetensors_find(&model, t->name);
                    char name[128], sum[17];
                    uint64_t expected = 0;
                    snprintf(name, sizeof name, "%s.%s",
                             optimizer == DIST_SGD ? "momentum_buffer"
                             : i                   ? "exp_avg_sq"
                                                   : "exp_avg",
                             t->name);
                    const st_tensor *s = safetensors_find(&f, name);
                    if (kind / 2 && strncmp(t->name, "head.", 5)) {
                        assert_null(s);
                        continue;
                    }
                    assert_non_null(s);
                    assert_int_equal(s->dtype, ST_F32);
                    assert_int_equal(s->rank, weights->rank);
                    assert_memory_equal(s->shape, weights->shape, s->rank * sizeof *s->shape);
                    float *values = malloc(j.model.unit[u].count * sizeof *values);
                    state_formula(&j.model, u, 5, i, values);
                    assert_memory_equal(f.bytes + s->offset, values + t->offset, s->size);
                    for (size_t x = 0; x < t->count; x++) {
                        uint32_t bits;
                        memcpy(&bits, &values[t->offset + x], 4);
                        for (size_t times = 0; times < 2 * x + 1; times++) expected += bits;
                    }
                    snprintf(sum, sizeof sum, "%016llx", (unsigned long long)expected);
                    assert_string_equal(cJSON_GetStringValue(cJSON_GetObjectItem(sums, name)), sum);
                    free(values);
                }
        cJSON_Delete(root);
        free(text);
        safetensors_close(&f);
        safetensors_close(&model);
        job_free(&j);
    }
}

static void the_state_survives_bit_for_bit(void **state) {
    (void)state;
    checkpoint_state s, t = some_state();
    error_text e;
    save("zero2", 3, 1, "step-1");
    if (checkpoint_read_state("step-1", &s, &e)) fail_msg("%s", e.text);
    assert_true(cJSON_Compare(s.options, t.options, 1));
    cJSON_Delete(t.options);
    t.options = s.options;
    assert_string_equal(s.best, t.best);
    assert_memory_equal(&s.step, &t.step, offsetof(checkpoint_state, best));
    checkpoint_state_free(&s);
    checkpoint_state_free(&s); /* harmless */
}

static void a_faulty_state_is_refused(void **state) {
    (void)state;
    static const struct {
        const char *find, *replace, *expected;
    } cases[] = {
        {"{", "", "trainer_state.json: found "},
        {"\"step\":\t7", "\"step\":\t-7", "step: found another number, expected a whole number in [0, 2^53)"},
        {"\"step\":\t7", "\"step\":\t7.5", "step: found another number"},
        {"\"step\":\t7", "\"step\":\t1e300", "step: found another number"},
        {"\"step\":\t7", "\"step\":\t9007199254740992", "step: found another number"},
        {"\"step\":\t7", "\"step\":\t1e999", "step: found another number"},
        {"\"step\":\t7", "\"step\":\t\"7\"", "step: found a string"},
        {"\"step\":\t7", "\"step\":\tnull", "step: found null"},
        {"\"step\":\t7", "\"stop\":\t7", "step: found nothing"},
        {"\"step\":\t7", "\"step\":\t7,\"step\":\t7", "found the key 'step' twice"},
        {"\"global_batch\":\t8", "\"global_batch\":\t0", "global_batch: found another number"},
        {"\"ranks\":\t2", "\"ranks\":\t[2]", "ranks: found an array"},
        {"\"evaluated\":\tnull", "\"evaluated\":\ttrue", "evaluated: found true or false"},
        {"\"best_saved\":\t-1", "\"best_saved\":\t\"x\"", "best_saved: found a string, expected a finite"},
        {"\"best_saved\":\t-1", "\"best_saved\":\t1e999", "best_saved: found another number"},
        {"\"best\":\t\"step-00000004\"", "\"best\":\t\"../step-4\"",
         "best: found ../step-4, expected the name"},
        {"\"best\":\t\"step-00000004\"", "\"best\":\t\"step-00000000000000000000004\"", "best: found step-0"},
        {"\"best\":\t\"step-00000004\"", "\"best\":\t4", "best: found a number"},
        {"\"options\":\t{", "\"options\":\t7,\"more\":\t{", "options: found a number"},
        {"\"cls_token\":\t\"", "\"cls_token\":\t\"0", "tensor 'cls_token': found checksum "},
        {"\"cls_token\":\t\"", "\"cls_taken\":\t\"", "tensor 'cls_token': found nothing as its checksum in "},
        {"\"cls_token\":\t\"", "\"x\":\t\"\",\"cls_token\":\t\"", "found 32 tensors, expected 33 by "},
    };
    save("single", 1, 1, "step-1");
    vit_model m;
    error_text e;
    size_t size;
    char *good;
    assert_int_equal(file_read_whole("step-1/trainer_state.json", 1 << 20, &good, &size, &e), 0);
    assert_int_equal(vit_model_init(&m, &odd_config, RT_FP32, &e), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *bad = malloc(size + 100);
        assert_non_null(strstr(good, cases[i].find));
        size_t at = (size_t)(strstr(good, cases[i].find) - good);
        sprintf(bad, "%.*s%s%s", (int)at, good, cases[i].replace, good + at + strlen(cases[i].find));
        write_text("step-1/trainer_state.json", bad);
        assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
        assert_message(&e, "step-1/", cases[i].expected, NULL);
        free(bad);
    }
    for (size_t length = 0; length + 1 < size; length += 7) {
        write_text("step-1/trainer_state.json", good);
        assert_int_equal(truncate("step-1/trainer_state.json", (off_t)length), 0);
        assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
        assert_message(&e, "step-1/trainer_state.json: ", NULL);
    }
    free(good);
    vit_model_free(&m);
}

/* One bit of one tensor of either file. */
static void a_flipped_bit_is_found(void **state) {
    (void)state;
    vit_model m;
    error_text e;
    assert_int_equal(vit_model_init(&m, &odd_config, RT_FP32, &e), 0);
    save("zero1", 2, 1, "step-1");
    for (int file = 0; file < 2; file++) {
        safetensors f;
        char path[64], name[128];
        snprintf(path, sizeof path, "step-1/%s", file ? "optimizer.safetensors" : "model.safetensors");
        assert_int_equal(safetensors_open(path, &f, &e), 0);
        int fd = open(path, O_RDWR);
        for (size_t k = 0; k < f.count; k++) {
            off_t at = (off_t)(f.tensors[k].offset + f.tensors[k].size / 2 + k % 4);
            uint8_t byte;
            assert_int_equal(pread(fd, &byte, 1, at), 1);
            byte ^= (uint8_t)(1 << k % 8);
            assert_int_equal(pwrite(fd, &byte, 1, at), 1);
            assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
            snprintf(name, sizeof name, "tensor '%s': found checksum ", f.tensors[k].name);
            assert_message(&e, path, name, "it is damaged", NULL);
            byte ^= (uint8_t)(1 << k % 8);
            assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        }
        close(fd);
        safetensors_close(&f);
        assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), 0);
    }
    vit_model_free(&m);
}

/* With a checksum that says so. */
static void numbers_that_are_not_finite_are_refused(void **state) {
    (void)state;
    vit_model m;
    error_text e;
    safetensors f;
    size_t size;
    float infinite = -INFINITY;
    assert_int_equal(vit_model_init(&m, &odd_config, RT_FP32, &e), 0);
    save("single", 1, 1, "step-1");
    assert_int_equal(safetensors_open("step-1/optimizer.safetensors", &f, &e), 0);
    const st_tensor *t = safetensors_find(&f, "exp_avg.norm.bias");
    int fd = open("step-1/optimizer.safetensors", O_RDWR);
    assert_int_equal(pwrite(fd, &infinite, 4, (off_t)t->offset + 8), 4);
    close(fd);
    assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
    assert_message(&e, "tensor 'exp_avg.norm.bias': found checksum ", NULL);
    char *text = read_text("step-1/trainer_state.json", &size);
    char expected[17];
    snprintf(expected, sizeof expected, "%s", strstr(e.text, "expected ") + 9);
    char *at = strstr(text, expected);
    assert_non_null(at);
    memcpy(at, strstr(e.text, "found checksum ") + 15, 16);
    write_text("step-1/trainer_state.json", text);
    assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
    assert_message(&e, "tensor 'exp_avg.norm.bias': found a NaN or an infinity", NULL);
    free(text);
    safetensors_close(&f);
    vit_model_free(&m);
}

/* A copy that stopped: inside of each tensor in turn, and in the header. */
static void a_half_copied_file_is_found(void **state) {
    (void)state;
    vit_model m;
    error_text e;
    assert_int_equal(vit_model_init(&m, &odd_config, RT_FP32, &e), 0);
    for (int file = 0; file < 2; file++) {
        safetensors f;
        char path[64], name[128];
        save("single", 1, 1, "step-1");
        snprintf(path, sizeof path, "step-1/%s", file ? "optimizer.safetensors" : "model.safetensors");
        assert_int_equal(safetensors_open(path, &f, &e), 0);
        for (size_t k = f.count; k-- > 0;) { /* in the file's order, as all are of one type */
            assert_int_equal(truncate(path, (off_t)(f.tensors[k].offset + f.tensors[k].size - 1 - k % 4)), 0);
            assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
            snprintf(name, sizeof name, "tensor '%s' is not whole", f.tensors[k].name);
            assert_message(&e, path, name, NULL);
        }
        for (size_t length = f.tensors[0].offset - 1; length > 7; length /= 3) {
            assert_int_equal(truncate(path, (off_t)length), 0);
            assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
            assert_message(&e, path, "found a header of ", NULL);
        }
        safetensors_close(&f);
        assert_int_equal(unlink(path), 0);
        assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
        assert_message(&e, "step-1: found no ", path + 7, NULL);
    }
    save("single", 1, 1, "step-1");
    assert_int_equal(unlink("step-1/trainer_state.json"), 0);
    assert_int_equal(checkpoint_check("step-1", &m, DIST_ADAMW, &e), -1);
    assert_message(&e, "step-1: found no trainer_state.json", NULL);
    vit_model_free(&m);
}

/* What differs is named: a tensor, or what no tensor shows. */
static void another_model_is_told_from_damage(void **state) {
    (void)state;
    vit_config c[9];
    for (int i = 0; i < 9; i++) c[i] = odd_config;
    c[0].depth = 3;
    c[1].depth = 1;
    c[2].embed_dim = 48;
    c[3].num_classes = 4;
    c[4].num_heads = 2;
    c[5].layer_norm_eps = 1e-6;
    c[6].image_height = 10, c[6].image_width = 6;
    c[7].freeze_backbone = 1;
    c[8].gelu = VIT_GELU_TANH;
    static const char *const expected[] = {
        "model.safetensors: tensor blocks.2.attn.qkv.weight: found none, expected shape [132, 44]",
        "model.safetensors: found tensor blocks.1.attn.proj.bias, expected none",
        "found shape [44, 3, 2, 2], expected shape [48, 3, 2, 2]",
        "model.safetensors: tensor head.weight: found shape [3, 44], expected shape [4, 44]",
        "config.json: num_heads: found 4, expected 2",
        "config.json: layer_norm_eps: found 1.0000000000000001e-05, expected 9.9999999999999995e-07",
        "config.json: img_size (height): found 6, expected 10",
        "optimizer.safetensors: found tensor exp_avg.blocks.0.attn.proj.bias, expected none",
        "config.json: act_layer: found gelu, expected gelu_tanh (--gelu)",
    };
    make_directory("run");
    save("zero3", 2, 1, "run/step-00000001");
    for (int i = 0; i < 10; i++) {
        vit_model m;
        error_text e;
        char folder[CHECKPOINT_PATH];
        assert_int_equal(vit_model_init(&m, i < 9 ? &c[i] : &odd_config, RT_FP32, &e), 0);
        dist_optimizer optimizer = i < 9 ? DIST_ADAMW : DIST_SGD;
        assert_int_equal(checkpoint_check("run/step-00000001", &m, optimizer, &e), -1);
        assert_message(&e, "run/step-00000001/",
                       i < 9 ? expected[i] : "momentum_buffer.patch_embed.proj.weight: found none", NULL);
        assert_int_equal(checkpoint_newest("run", &m, optimizer, folder, NULL, NULL, &e), -1);
        assert_string_equal(folder, "");
        vit_model_free(&m);
    }
}

static void note(void *arg, const char *why) {
    char *said = arg;
    snprintf(said + strlen(said), 1000 - strlen(said), "%.400s\n", why);
}

static void the_newest_whole_checkpoint_is_found(void **state) {
    (void)state;
    vit_model m;
    error_text e;
    char folder[CHECKPOINT_PATH], said[1000] = "";
    assert_int_equal(vit_model_init(&m, &odd_config, RT_FP32, &e), 0);
    assert_int_equal(checkpoint_newest("run", &m, DIST_ADAMW, folder, note, said, &e), 0);
    assert_string_equal(folder, "");
    make_directory("run/step-00000020.tmp");
    assert_int_equal(checkpoint_newest("run", &m, DIST_ADAMW, folder, note, said, &e), 0);
    assert_string_equal(folder, "");
    save("single", 1, 1, "run/step-00000009");
    save("single", 1, 1, "run/step-100000000"); /* nine digits */
    save("single", 1, 1, "run/step-00000010");
    assert_int_equal(checkpoint_newest("run", &m, DIST_ADAMW, folder, note, said, &e), 0);
    assert_string_equal(folder, "run/step-100000000");
    assert_string_equal(said, "");
    assert_int_equal(truncate("run/step-100000000/optimizer.safetensors", 5000), 0);
    assert_int_equal(unlink("run/step-00000010/trainer_state.json"), 0);
    assert_int_equal(checkpoint_newest("run", &m, DIST_ADAMW, folder, note, said, &e), 0);
    assert_string_equal(folder, "run/step-00000009");
    assert_non_null(strstr(said, "run/step-100000000/optimizer.safetensors: found a "));
    assert_non_null(strstr(said, "\nrun/step-00000010: found no trainer_state.json"));
    /* killed between the two renames of a replacement */
    assert_int_equal(rename("run/step-00000009", "run/step-00000009.replaced"), 0);
    assert_int_equal(checkpoint_newest("run", &m, DIST_ADAMW, folder, note, said, &e), 0);
    assert_string_equal(folder, "run/step-00000009");
    vit_model_free(&m);
}

/* The file of weights has room, that of the optimizer has not: the former checkpoint of that name stays. */
static void a_full_disk_leaves_the_former_checkpoint(void **state) {
    (void)state;
    struct rlimit before, small;
    struct stat size;
    save("single", 1, 1, "step-1");
    assert_int_equal(stat("step-1/model.safetensors", &size), 0);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = before;
    small.rlim_cur = (rlim_t)size.st_size;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_not_saved("step-1", "step-1.tmp/optimizer.safetensors: no room for ");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(entries_of("."), 1);
    assert_resumes("step-1", "zero3", 2, DIST_ADAMW, 0, 1);
}

/* ------------------------------------------------------------------------------------------------ pruning */

static void make_steps(int count) {
    for (int i = 1; i <= count; i++) {
        char path[64];
        snprintf(path, sizeof path, "run/step-%08d", i);
        make_directory(path);
        snprintf(path, sizeof path, "run/step-%08d/config.json", i);
        write_text(path, "{}");
        snprintf(path, sizeof path, "run/step-%08d/model.safetensors", i);
        write_text(path, "x");
        snprintf(path, sizeof path, "run/step-%08d/optimizer.safetensors", i);
        write_text(path, "x");
        snprintf(path, sizeof path, "run/step-%08d/trainer_state.json", i);
        write_text(path, "{}");
    }
}

/* "1 4 5": the steps whose folders are there. */
static void assert_steps(const char *expected) {
    char found[64] = "";
    for (int i = 1; i <= 9; i++) {
        char path[64];
        snprintf(path, sizeof path, "run/step-%08d", i);
        if (!exists(path)) continue;
        snprintf(found + strlen(found), sizeof found - strlen(found), *found ? " %d" : "%d", i);
    }
    assert_string_equal(found, expected);
}

static void pruning_keeps_best_and_latest(void **state) {
    (void)state;
    make_steps(5);
    write_text("run/latest", "step-00000005");
    write_text("run/other", "not a step");
    make_directory("run/step-00000000.tmp");
    make_directory("run/step-00000006.replaced"); /* killed before the new one had taken the name */
    write_text("run/step-00000006.replaced/model.safetensors", "x");
    make_directory("run/step-00000005.replaced"); /* and after */
    write_text("run/step-00000005.replaced/model.safetensors", "x");
    checkpoint_prune("run", 9, "step-00000001", "step-00000005");
    assert_steps("1 2 3 4 5 6");
    assert_true(exists("run/step-00000006/model.safetensors"));
    assert_int_equal(remove_tree("run/step-00000006"), 0);
    checkpoint_prune("run", 4, "", "step-00000005"); /* no evaluation yet: no best */
    assert_steps("2 3 4 5");
    checkpoint_prune("run", 3, "step-00000002", "step-00000005");
    assert_steps("2 4 5");
    checkpoint_prune("run", 1, "step-00000002", "step-00000005");
    assert_steps("2 5");
    checkpoint_prune("run", 1, "step-00000005", "step-00000005");
    assert_steps("5");
    assert_true(exists("run/latest") && exists("run/other"));
    assert_int_equal(entries_of("run"), 3);
    checkpoint_prune("nowhere", 1, "", "");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(a_reloaded_model_is_bit_identical),
        TEST(a_file_holds_whole_tensors),
        TEST(config_json_tells_the_model),
        TEST(the_shapes_of_a_bare_file_tell),
        TEST(a_file_of_timm_opens),
        TEST(an_output_directory_gives_its_best_else_its_latest),
        TEST(missing_paths_are_refused),
        TEST(faulty_tensors_are_refused),
        TEST(other_floating_types_are_read),
        TEST(faulty_configurations_are_refused),
        TEST(another_depth_is_refused),
        TEST(nothing_is_left_when_there_is_no_room),
        TEST(nothing_is_left_below_a_file),
        TEST(nothing_is_left_in_a_folder_that_cannot_be_written),
        TEST(an_existing_checkpoint_is_replaced),
        TEST(any_world_resumes_what_any_other_wrote),
        TEST(the_optimizer_has_a_file_of_its_own),
        TEST(the_state_survives_bit_for_bit),
        TEST(a_faulty_state_is_refused),
        TEST(a_flipped_bit_is_found),
        TEST(numbers_that_are_not_finite_are_refused),
        TEST(a_half_copied_file_is_found),
        TEST(another_model_is_told_from_damage),
        TEST(the_newest_whole_checkpoint_is_found),
        TEST(a_full_disk_leaves_the_former_checkpoint),
        TEST(pruning_keeps_best_and_latest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
