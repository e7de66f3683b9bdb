/* checkpoint.h - models on disk: folders with config.json (timm's hub layout) and model.safetensors (timm's
 * names).
 *
 *     model_source s;
 *     vit_config config;
 *     if (model_source_open(&s, "runs/first", &e)) ...     // a file, a model or step folder, a whole run
 *     if (model_source_config(&s, &config, &e)) ...        // from config.json; a bare file: from its shapes
 *     if (model_source_load(&s, &d, &e)) ...               // as every rank: this rank's part of the weights
 *     model_source_close(&s);
 *
 * Files hold whole tensors in their logical shapes; each rank reads and writes its own elements of them in
 * place, so that what one strategy wrote any other can read. A step folder appears by one rename, after all
 * is on disk.
 */
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dist.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"

enum { CHECKPOINT_PATH = 4096 };

typedef struct model_source {
    char path[CHECKPOINT_PATH]; /* of the safetensors file */
    safetensors file;
    cJSON *config; /* config.json, or NULL */
    char config_path[CHECKPOINT_PATH];
    int has_normalisation; /* the file says what its images were normalised with */
    float mean[3], std[3];
    const cJSON *label_names; /* array of strings, or NULL */
} model_source;

/* ------------------------------------------------------------------------------------------------ reading */

static inline void model_source_close(model_source *s) {
    safetensors_close(&s->file);
    cJSON_Delete(s->config);
    *s = (model_source){0};
}

static inline int checkpoint__join(char path[CHECKPOINT_PATH], const char *folder, const char *name,
                                   error_text *e) {
    if (snprintf(path, CHECKPOINT_PATH, "%s/%s", folder, name) < CHECKPOINT_PATH) return 0;
    return error_set(e, "%.200s...: found a path of %d bytes or more", folder, CHECKPOINT_PATH);
}

/* The folder that a pointer file (latest, best) of an output directory names; -1: there is no such file. */
static inline int checkpoint__follow(char path[CHECKPOINT_PATH], const char *output, const char *pointer,
                                     error_text *e) {
    char *text = NULL, name[256];
    size_t length;
    error_text unused;
    snprintf(name, sizeof name, "checkpoints/%s", pointer);
    if (checkpoint__join(path, output, name, e) || file_read_whole(path, 255, &text, &length, &unused))
        return -1;
    text[strcspn(text, "\r\n")] = 0;
    snprintf(name, sizeof name, "checkpoints/%.200s", text);
    free(text);
    return checkpoint__join(path, output, name, e);
}

/* One number for each channel, or one for all, above `low`. */
static inline int checkpoint__triple(const model_source *s, const cJSON *array, const char *name, double low,
                                     float out[3], error_text *e) {
    int n = cJSON_GetArraySize(array), fine = cJSON_IsArray(array) && (n == 1 || n == 3);
    for (int i = 0; i < 3 && fine; i++) {
        const cJSON *item = cJSON_GetArrayItem(array, n == 1 ? 0 : i);
        out[i] = cJSON_IsNumber(item) ? (float)item->valuedouble : NAN;
        fine = isfinite(out[i]) && (double)out[i] > low;
    }
    if (fine) return 0;
    return error_set(e, "%s: %s: found %s, expected one number or three above %g", s->config_path, name,
                     cJSON_IsArray(array) ? "another array" : json_kind(array), low);
}

/* Opens the model that a path stands for: a safetensors file, a folder with one, or an output directory (its
 * best checkpoint, else its latest), and checks the file's structure. */
static inline int model_source_open(model_source *s, const char *path, error_text *e) {
    *s = (model_source){0};
    struct stat st;
    char folder[CHECKPOINT_PATH], *text;
    size_t length;
    if (stat(path, &st)) return error_set(e, "%s: cannot be read: %s", path, strerror(errno));
    if (!S_ISDIR(st.st_mode)) {
        snprintf(s->path, sizeof s->path, "%s", path);
        return safetensors_open(s->path, &s->file, e);
    }
    snprintf(folder, sizeof folder, "%s", path);
    if (checkpoint__join(s->path, folder, "model.safetensors", e)) return -1;
    if (stat(s->path, &st)) { /* no model here: an output directory? */
        if (checkpoint__follow(folder, path, "best", e) && checkpoint__follow(folder, path, "latest", e))
            return error_set(
                e,
                "%s: found neither model.safetensors nor checkpoints/latest, expected a model folder "
                "or an output directory",
                path);
        if (checkpoint__join(s->path, folder, "model.safetensors", e)) return -1;
    }
    if (checkpoint__join(s->config_path, folder, "config.json", e) || safetensors_open(s->path, &s->file, e))
        return -1;
    if (stat(s->config_path, &st)) return 0; /* as good as a bare file */
    if (!file_read_whole(s->config_path, 16 << 20, &text, &length, e)) {
        s->config = json_parse(text, length, JSON_ANY_NUMBERS, s->config_path, e);
        free(text);
    }
    if (!s->config) {
        model_source_close(s);
        return -1;
    }
    const cJSON *cfg = cJSON_GetObjectItemCaseSensitive(s->config, "pretrained_cfg");
    if (!cfg) cfg = s->config; /* timm's older files have everything on top */
    const cJSON *mean = cJSON_GetObjectItemCaseSensitive(cfg, "mean"),
                *std = cJSON_GetObjectItemCaseSensitive(cfg, "std");
    s->has_normalisation = mean && std;
    if (s->has_normalisation && (checkpoint__triple(s, mean, "mean", -INFINITY, s->mean, e) ||
                                 checkpoint__triple(s, std, "std", 0, s->std, e))) {
        model_source_close(s);
        return -1;
    }
    s->label_names = cJSON_GetObjectItemCaseSensitive(cfg, "label_names");
    if (!cJSON_IsArray(s->label_names)) s->label_names = NULL;
    return 0;
}

/* A whole number >= 1 from JSON into *value; a missing one changes nothing. */
static inline int checkpoint__size(const model_source *s, const cJSON *item, const char *name, size_t *value,
                                   error_text *e) {
    if (!item) return 0;
    if (!cJSON_IsNumber(item) || item->valuedouble < 1 || item->valuedouble > 1e9 ||
        floor(item->valuedouble) != item->valuedouble)
        return error_set(e, "%s: %s: found %s, expected a whole number from 1 up", s->config_path, name,
                         cJSON_IsNumber(item) ? "another number" : json_kind(item));
    *value = (size_t)item->valuedouble;
    return 0;
}

/* timm's model_args. What the model cannot do is refused, not passed over. */
static inline int checkpoint__model_args(const model_source *s, const cJSON *args, vit_config *c,
                                         error_text *e) {
    const cJSON *a;
    if (args && !cJSON_IsObject(args))
        return error_set(e, "%s: model_args: found %s, expected an object", s->config_path, json_kind(args));
    cJSON_ArrayForEach(a, args) {
        const struct {
            const char *name;
            size_t *value;
        } sizes[] = {
            {"patch_size", &c->patch_size}, {"in_chans", &c->channels}, {"num_classes", &c->num_classes},
            {"embed_dim", &c->embed_dim},   {"depth", &c->depth},       {"num_heads", &c->num_heads}};
        int known = 0;
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes && !known; i++)
            if (!strcmp(a->string, sizes[i].name)) {
                if (checkpoint__size(s, a, a->string, sizes[i].value, e)) return -1;
                known = 1;
            }
        if (known) continue;
        if (!strcmp(a->string, "img_size")) {
            const cJSON *h = cJSON_IsArray(a) ? cJSON_GetArrayItem(a, 0) : a,
                        *w = cJSON_IsArray(a) ? cJSON_GetArrayItem(a, 1) : a;
            if (!h || !w)
                return error_set(e, "%s: img_size: found %d numbers, expected 2", s->config_path,
                                 cJSON_GetArraySize(a));
            if (checkpoint__size(s, h, "img_size", &c->image_height, e) ||
                checkpoint__size(s, w, "img_size", &c->image_width, e))
                return -1;
        } else if (!strcmp(a->string, "mlp_ratio") && cJSON_IsNumber(a)) {
            c->mlp_ratio = a->valuedouble;
        } else if (!((!strcmp(a->string, "global_pool") && cJSON_IsString(a) &&
                      !strcmp(a->valuestring, "token")) ||
                     ((!strcmp(a->string, "qkv_bias") || !strcmp(a->string, "class_token")) &&
                      cJSON_IsTrue(a)))) {
            return error_set(e, "%s: model_args: found %s, which this model does not have", s->config_path,
                             quote(a->string, SIZE_MAX).text);
        }
    }
    return 0;
}

/* Sizes that the tensors tell: everything but the number of heads, and a square image's side. */
static inline int checkpoint__shapes(const model_source *s, vit_config *c, error_text *e) {
    const st_tensor *patch = safetensors_find(&s->file, "patch_embed.proj.weight"),
                    *head = safetensors_find(&s->file, "head.weight");
    const st_tensor *fc1 = safetensors_find(&s->file, "blocks.0.mlp.fc1.weight"),
                    *pos = safetensors_find(&s->file, "pos_embed");
    if (!patch || patch->rank != 4 || !head || head->rank != 2 || !fc1 || fc1->rank != 2 || !pos ||
        pos->rank != 3 || !fc1->shape[1])
        return error_set(
            e,
            "%s: found no Vision Transformer in timm's names (patch_embed.proj.weight [D, C, P, P], "
            "pos_embed [1, T, D], blocks.0.mlp.fc1.weight [F, D], head.weight [V, D])",
            s->path);
    char name[64] = "";
    c->embed_dim = patch->shape[0];
    c->channels = patch->shape[1];
    c->patch_size = patch->shape[2];
    c->num_classes = head->shape[0];
    c->mlp_ratio = (double)fc1->shape[0] / (double)fc1->shape[1];
    if ((double)c->embed_dim * c->mlp_ratio < (double)fc1->shape[0]) /* rounded to less than F */
        c->mlp_ratio = nextafter(c->mlp_ratio, INFINITY);
    for (c->depth = 0; c->depth < 4096; c->depth++) {
        snprintf(name, sizeof name, "blocks.%zu.norm1.weight", c->depth);
        if (!safetensors_find(&s->file, name)) break;
    }
    size_t side = (size_t)sqrt((double)pos->shape[1]);
    if (side * side + 1 == pos->shape[1]) c->image_height = c->image_width = side * c->patch_size;
    return 0;
}

/* The configuration of the model. On entry *config is what is assumed where nothing tells (heads, image size,
 * eps); a field that stays 0 was told by nobody. */
static inline int model_source_config(const model_source *s, vit_config *config, error_text *e) {
    if (!s->config) return checkpoint__shapes(s, config, e);
    const cJSON *architecture = cJSON_GetObjectItemCaseSensitive(s->config, "architecture");
    const cJSON *pool = cJSON_GetObjectItemCaseSensitive(s->config, "global_pool");
    const cJSON *eps = cJSON_GetObjectItemCaseSensitive(s->config, "layer_norm_eps");
    if (!cJSON_IsString(architecture))
        return error_set(e, "%s: architecture: found %s, expected a timm name", s->config_path,
                         architecture ? json_kind(architecture) : "nothing");
    if (vit_config_named(config, architecture->valuestring, e)) {
        return error_set(e,
                         "%s: architecture: found %s, expected a Vision Transformer (help model lists them)",
                         s->config_path, quote(architecture->valuestring, SIZE_MAX).text);
    }
    if (cJSON_IsString(pool) && strcmp(pool->valuestring, "token"))
        return error_set(e, "%s: global_pool: found %s, expected token", s->config_path,
                         quote(pool->valuestring, SIZE_MAX).text);
    if (eps && !cJSON_IsNumber(eps))
        return error_set(e, "%s: layer_norm_eps: found %s, expected a number", s->config_path,
                         json_kind(eps));
    if (eps) config->layer_norm_eps = eps->valuedouble;
    if (checkpoint__size(s, cJSON_GetObjectItemCaseSensitive(s->config, "num_classes"), "num_classes",
                         &config->num_classes, e))
        return -1;
    return checkpoint__model_args(s, cJSON_GetObjectItemCaseSensitive(s->config, "model_args"), config, e);
}

static inline void checkpoint__shape_text(char *text, size_t size, size_t rank, const size_t *shape) {
    size_t used = (size_t)snprintf(text, size, "[");
    for (size_t i = 0; i < rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, i ? ", %zu" : "%zu", shape[i]);
    if (used < size) snprintf(text + used, size - used, "]");
}

/* Does the file have exactly this model's tensors? Names what differs. */
static inline int model_source_check(const model_source *s, const vit_model *m, error_text *e) {
    size_t found = 0;
    for (size_t u = 0; u < m->units; u++)
        for (size_t k = 0; k < m->unit[u].tensors; k++) {
            const vit_tensor *want = &m->unit[u].tensor[k];
            const st_tensor *t = safetensors_find(&s->file, want->name);
            char has[128], wants[128];
            if (!t) return error_set(e, "%s: found no tensor %s, which the model has", s->path, want->name);
            checkpoint__shape_text(has, sizeof has, t->rank, t->shape);
            checkpoint__shape_text(wants, sizeof wants, want->dims, want->shape);
            if (strcmp(has, wants))
                return error_set(
                    e,
                    "%s: tensor %s: found shape %s, expected %s (another head or image size is not adapted: "
                    "not built yet)",
                    s->path, want->name, has, wants);
            found++;
        }
    for (size_t i = 0; i < s->file.count && found < s->file.count; i++) {
        int known = 0;
        for (size_t u = 0; u < m->units; u++)
            for (size_t k = 0; k < m->unit[u].tensors; k++)
                known |= !strcmp(s->file.tensors[i].name, m->unit[u].tensor[k].name);
        if (!known)
            return error_set(e, "%s: found tensor %s, which the model does not have", s->path,
                             quote(s->file.tensors[i].name, SIZE_MAX).text);
    }
    return 0;
}

/* Loads this rank's part of the weights of a checked file. Weights that are not finite are an error. */
static inline int model_source_load(const model_source *s, dist *d, error_text *e) {
    for (size_t u = 0; u < d->model->units; u++) {
        const vit_unit *unit = &d->model->unit[u];
        float *values = calloc(unit->count, sizeof *values);
        if (!values) return error_set(e, "out of memory for %zu weights", unit->count);
        int failed = 0;
        for (size_t k = 0; k < unit->tensors && !failed; k++) {
            const vit_tensor *want = &unit->tensor[k];
            const st_tensor *t = safetensors_find(&s->file, want->name);
            float *x = values + want->offset;
            failed = safetensors_read_f32(&s->file, t, 0, want->count, x, e);
            for (size_t i = 0; i < want->count && !failed; i++)
                if (!isfinite(x[i]))
                    failed = error_set(e, "%s: tensor %s: found %g at element %zu, expected finite weights",
                                       s->path, want->name, (double)x[i], i);
        }
        if (!failed) dist_import(d, u, values);
        free(values);
        if (failed) return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ writing */

/* What a folder says of its model beside the weights. */
typedef struct model_card {
    const float *mean, *std;  /* [3] */
    char (*label_names)[256]; /* [num_classes] or NULL */
    size_t labels;
} model_card;

/* config.json in timm's hub layout; the caller frees the text. */
static inline char *checkpoint__config_text(const vit_config *c, const model_card *card) {
    int sizes[] = {(int)c->image_height, (int)c->image_width},
        input[] = {(int)c->channels, sizes[0], sizes[1]};
    cJSON *root = cJSON_CreateObject(), *args = cJSON_CreateObject(), *cfg = cJSON_CreateObject();
    cJSON *mean = cJSON_CreateArray(), *std = cJSON_CreateArray(), *names = cJSON_CreateArray();
    for (size_t i = 0; i < c->channels && i < 3; i++) {
        cJSON_AddItemToArray(mean, json_number(json_float(card->mean[i])));
        cJSON_AddItemToArray(std, json_number(json_float(card->std[i])));
    }
    for (size_t i = 0; i < card->labels; i++)
        cJSON_AddItemToArray(names, cJSON_CreateString(card->label_names[i]));
    cJSON_AddStringToObject(root, "architecture", c->name);
    cJSON_AddNumberToObject(root, "num_classes", (double)c->num_classes);
    cJSON_AddNumberToObject(root, "num_features", (double)c->embed_dim);
    cJSON_AddStringToObject(root, "global_pool", "token");
    cJSON_AddItemToObject(root, "layer_norm_eps", json_number(c->layer_norm_eps));
    cJSON_AddItemToObject(args, "img_size", cJSON_CreateIntArray(sizes, 2));
    cJSON_AddNumberToObject(args, "patch_size", (double)c->patch_size);
    cJSON_AddNumberToObject(args, "in_chans", (double)c->channels);
    cJSON_AddNumberToObject(args, "num_classes", (double)c->num_classes);
    cJSON_AddNumberToObject(args, "embed_dim", (double)c->embed_dim);
    cJSON_AddNumberToObject(args, "depth", (double)c->depth);
    cJSON_AddNumberToObject(args, "num_heads", (double)c->num_heads);
    cJSON_AddItemToObject(args, "mlp_ratio", json_number(c->mlp_ratio));
    cJSON_AddItemToObject(root, "model_args", args);
    cJSON_AddItemToObject(cfg, "input_size", cJSON_CreateIntArray(input, 3));
    cJSON_AddTrueToObject(cfg, "fixed_input_size");
    cJSON_AddStringToObject(cfg, "interpolation", "bicubic");
    cJSON_AddNumberToObject(cfg, "crop_pct", 0.9);
    cJSON_AddItemToObject(cfg, "mean", mean);
    cJSON_AddItemToObject(cfg, "std", std);
    cJSON_AddNumberToObject(cfg, "num_classes", (double)c->num_classes);
    if (card->labels == c->num_classes)
        cJSON_AddItemToObject(cfg, "label_names", names);
    else
        cJSON_Delete(names);
    cJSON_AddStringToObject(cfg, "first_conv", "patch_embed.proj");
    cJSON_AddStringToObject(cfg, "classifier", "head");
    cJSON_AddItemToObject(root, "pretrained_cfg", cfg);
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    return text;
}

/* The tensors of a model for the writer; the names and shapes are the model's own. */
static inline st_tensor *checkpoint__tensors(const vit_model *m, size_t *count) {
    st_tensor *list;
    *count = 0;
    for (size_t u = 0; u < m->units; u++) *count += m->unit[u].tensors;
    if (!(list = calloc(*count, sizeof *list))) return NULL;
    for (size_t u = 0, i = 0; u < m->units; u++)
        for (size_t k = 0; k < m->unit[u].tensors; k++, i++) {
            const vit_tensor *t = &m->unit[u].tensor[k];
            list[i] = (st_tensor){.name = t->name, .dtype = ST_F32, .rank = t->dims, .shape = t->shape};
        }
    return list;
}

/* Writes this rank's elements of every tensor into the file. */
static inline int checkpoint__write_shards(dist *d, const st_tensor *list, int fd, const char *path,
                                           error_text *e) {
    for (size_t u = 0, i = 0; u < d->model->units; i += d->model->unit[u++].tensors) {
        const vit_unit *unit = &d->model->unit[u];
        size_t lo = d->shard[u].lo, hi = d->shard[u].hi;
        float *values = calloc(unit->count, sizeof *values);
        if (!values) return error_set(e, "out of memory for %zu weights", unit->count);
        int failed = 0;
        dist_export(d, u, values);
        for (size_t k = 0; k < unit->tensors && !failed; k++) {
            size_t begin = unit->tensor[k].offset, end = begin + unit->tensor[k].count;
            size_t from = begin > lo ? begin : lo, to = end < hi ? end : hi;
            if (from < to)
                failed = safetensors_write(fd, path, &list[i + k], from - begin, to - from, values + from, e);
        }
        free(values);
        if (failed) return -1;
    }
    return 0;
}

/* Did any rank fail? Every rank learns it; only the one that failed has a message. */
static inline int checkpoint__agree(dist *d, int failed) {
    int64_t failures = failed != 0;
    dist_sum(d, &failures, 1);
    return failures || rt_failed(d->rank) ? -1 : 0;
}

/* Writes `folder` (a path without a slash at its end) with model.safetensors and config.json; every rank must
 * call it. The folder appears by one rename, when all of it is on disk; on failure nothing is left of it, and
 * the ranks that did not cause it find e->text empty. */
static inline int checkpoint_save(dist *d, const char *folder, const model_card *card, error_text *e) {
    char aside[CHECKPOINT_PATH], path[CHECKPOINT_PATH] = "", config[CHECKPOINT_PATH] = "", *text = NULL;
    size_t count;
    int fd = -1, failed = 0, first = d->comm->index == 0;
    st_plan plan = {0};
    e->text[0] = 0;
    st_tensor *list = checkpoint__tensors(d->model, &count);
    if (!list) failed = error_set(e, "out of memory for the names of %zu tensors", count);
    if (snprintf(aside, sizeof aside, "%s.tmp", folder) >= CHECKPOINT_PATH)
        failed = error_set(e, "%.200s...: found too long a path", folder);
    failed = failed || checkpoint__join(path, aside, "model.safetensors", e) ||
             checkpoint__join(config, aside, "config.json", e) ||
             safetensors_plan(path, list, count, NULL, 0, &plan, e);
    if (first && !failed) {
        failed = directory_make(aside, e) || safetensors_create(path, &plan, &fd, e);
        if (!failed && !(text = checkpoint__config_text(&d->model->config, card)))
            failed = error_set(e, "%s: out of memory", config);
        if (!failed) failed = file_write_atomic(config, text, strlen(text), e);
        free(text);
    }
    failed = checkpoint__agree(d, failed); /* the file is there, or nobody writes */
    if (!failed && d->saves) {
        if (fd < 0 && (fd = open(path, O_WRONLY)) < 0)
            failed = error_set(e, "%s: cannot be written: %s", path, strerror(errno));
        if (!failed) failed = checkpoint__write_shards(d, list, fd, path, e);
        error_text closing;
        if (fd >= 0 && file_close_synced(fd, path, &closing) && !failed)
            failed = error_set(e, "%s", closing.text);
        fd = -1;
    }
    if (fd >= 0) close(fd);
    failed = checkpoint__agree(d, failed);
    if (first && !failed) {
        failed = directory_sync(aside, e);
        if (!failed && rename(aside, folder))
            failed = error_set(e, "%s: cannot be renamed to %s: %s", aside, folder, strerror(errno));
    }
    if (first && failed && *config) {
        unlink(path);
        unlink(config);
        rmdir(aside);
    }
    safetensors_plan_free(&plan);
    free(list);
    return checkpoint__agree(d, failed);
}

/* Deletes the oldest step folders under `checkpoints` until `keep` are left, never those that `best` and
 * `latest` name. */
static inline void checkpoint_prune(const char *checkpoints, size_t keep, const char *best,
                                    const char *latest) {
    struct dirent **entries;
    int n = scandir(checkpoints, &entries, NULL, alphasort);
    size_t steps = 0;
    for (int i = 0; i < n; i++)
        steps += !strncmp(entries[i]->d_name, "step-", 5) && !strchr(entries[i]->d_name, '.');
    for (int i = 0; i < n; free(entries[i++])) {
        const char *name = entries[i]->d_name, *files[] = {"config.json", "model.safetensors"};
        char path[CHECKPOINT_PATH + 600];
        if (steps <= keep || strncmp(name, "step-", 5) || strchr(name, '.') || !strcmp(name, best) ||
            !strcmp(name, latest))
            continue;
        for (size_t k = 0; k < 2; k++) {
            snprintf(path, sizeof path, "%s/%s/%s", checkpoints, name, files[k]);
            unlink(path);
        }
        snprintf(path, sizeof path, "%s/%s", checkpoints, name);
        rmdir(path);
        steps--;
    }
    if (n >= 0) free(entries);
}

#endif
