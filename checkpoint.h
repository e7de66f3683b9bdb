/* checkpoint.h - models on disk, written: folders with config.json and model.safetensors, as timm or Hugging
 * Face's transformers open them. (pretrained.h reads them.)
 *
 *     model_card card = {mean, std, label_names, classes};
 *     if (checkpoint_save(&d, "runs/first/checkpoints/step-00000123", &card, &e)) ...   // as every rank
 *     if (model_source_export(&s, &model, "vit-hf", MODEL_HF, &card, &e)) ...   // of a checked source
 *
 * Both go through a model_writer. Files hold whole tensors in their logical shapes; each rank writes its own
 * elements of them in place, so that what one strategy wrote any other can read. A folder appears by one
 * rename, after all is on disk.
 */
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include <dirent.h>

#include "pretrained.h"

/* ----------------------------------------------------------------------------------------- configurations */

/* What a folder says of its model beside the weights. */
typedef struct model_card {
    const float *mean, *std;  /* [3] */
    char (*label_names)[256]; /* [labels] or NULL */
    size_t labels;
    model_transform transform; /* crop_pct 0: timm's default, 0.9, bicubic */
} model_card;

typedef enum { MODEL_TIMM, MODEL_HF } model_format;

/* The crop_pct in force. */
static inline double model_card_crop_pct(const model_card *card) {
    return card->transform.crop_pct > 0 ? card->transform.crop_pct : 0.9;
}

/* Mean or deviation of each channel. */
static inline cJSON *card__channels(const vit_config *c, const float values[3]) {
    cJSON *array = cJSON_CreateArray();
    for (size_t i = 0; i < c->channels && i < 3; i++)
        cJSON_AddItemToArray(array, json_number(json_float(values[i])));
    return array;
}

/* config.json in timm's hub layout. */
static inline cJSON *card__timm(const vit_config *c, const model_card *card) {
    int sizes[] = {(int)c->image_height, (int)c->image_width},
        input[] = {(int)c->channels, sizes[0], sizes[1]};
    cJSON *root = cJSON_CreateObject(), *args = cJSON_CreateObject(), *cfg = cJSON_CreateObject();
    cJSON *names = cJSON_CreateArray();
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
    cJSON_AddStringToObject(cfg, "interpolation", card->transform.bilinear ? "bilinear" : "bicubic");
    cJSON_AddItemToObject(cfg, "crop_pct", json_number(model_card_crop_pct(card)));
    cJSON_AddStringToObject(cfg, "crop_mode", card->transform.squash ? "squash" : "center");
    cJSON_AddItemToObject(cfg, "mean", card__channels(c, card->mean));
    cJSON_AddItemToObject(cfg, "std", card__channels(c, card->std));
    cJSON_AddNumberToObject(cfg, "num_classes", (double)c->num_classes);
    if (card->labels == c->num_classes)
        cJSON_AddItemToObject(cfg, "label_names", names);
    else
        cJSON_Delete(names);
    cJSON_AddStringToObject(cfg, "first_conv", "patch_embed.proj");
    cJSON_AddStringToObject(cfg, "classifier", "head");
    cJSON_AddItemToObject(root, "pretrained_cfg", cfg);
    return root;
}

/* config.json as ViTForImageClassification reads it. Classes without a name get Hugging Face's. */
static inline cJSON *card__hugging_face(const vit_config *c, const model_card *card) {
    const char *architecture = "ViTForImageClassification";
    int sizes[] = {(int)c->image_height, (int)c->image_width};
    cJSON *root = cJSON_CreateObject(), *names = cJSON_CreateObject(), *ids = cJSON_CreateObject();
    for (size_t i = 0; i < c->num_classes; i++) {
        char id[24], name[32];
        snprintf(id, sizeof id, "%zu", i);
        snprintf(name, sizeof name, "LABEL_%zu", i);
        const char *label = i < card->labels ? card->label_names[i] : name;
        cJSON_AddStringToObject(names, id, label);
        if (!cJSON_HasObjectItem(ids, label)) cJSON_AddNumberToObject(ids, label, (double)i);
    }
    cJSON_AddItemToObject(root, "architectures", cJSON_CreateStringArray(&architecture, 1));
    cJSON_AddStringToObject(root, "model_type", "vit");
    cJSON_AddNumberToObject(root, "hidden_size", (double)c->embed_dim);
    cJSON_AddNumberToObject(root, "num_hidden_layers", (double)c->depth);
    cJSON_AddNumberToObject(root, "num_attention_heads", (double)c->num_heads);
    cJSON_AddNumberToObject(root, "intermediate_size", floor((double)c->embed_dim * c->mlp_ratio));
    cJSON_AddStringToObject(root, "hidden_act", "gelu");
    cJSON_AddNumberToObject(root, "hidden_dropout_prob", 0);
    cJSON_AddNumberToObject(root, "attention_probs_dropout_prob", 0);
    cJSON_AddItemToObject(root, "layer_norm_eps", json_number(c->layer_norm_eps));
    cJSON_AddItemToObject(root, "image_size",
                          sizes[0] == sizes[1] ? cJSON_CreateNumber(sizes[0])
                                               : cJSON_CreateIntArray(sizes, 2));
    cJSON_AddNumberToObject(root, "patch_size", (double)c->patch_size);
    cJSON_AddNumberToObject(root, "num_channels", (double)c->channels);
    cJSON_AddTrueToObject(root, "qkv_bias");
    cJSON_AddItemToObject(root, "id2label", names);
    cJSON_AddItemToObject(root, "label2id", ids);
    return root;
}

/* Hugging Face's preprocessor_config.json. ViTImageProcessor resizes to the model's size whatever the aspect;
 * the centre is cut out by CLIPImageProcessor, which knows but one size for both sides. */
static inline cJSON *card__preprocessor(const vit_config *c, const model_card *card) {
    int centre = !card->transform.squash && c->image_height == c->image_width;
    cJSON *root = cJSON_CreateObject(), *size = cJSON_CreateObject(), *crop = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "image_processor_type",
                            centre ? "CLIPImageProcessor" : "ViTImageProcessor");
    cJSON_AddTrueToObject(root, "do_resize");
    if (centre) {
        cJSON_AddNumberToObject(size, "shortest_edge",
                                floor((double)c->image_height / model_card_crop_pct(card)));
    } else {
        cJSON_AddNumberToObject(size, "height", (double)c->image_height);
        cJSON_AddNumberToObject(size, "width", (double)c->image_width);
    }
    cJSON_AddItemToObject(root, "size", size);
    cJSON_AddNumberToObject(root, "resample", card->transform.bilinear ? 2 : 3);
    cJSON_AddBoolToObject(root, "do_center_crop", centre);
    cJSON_AddNumberToObject(crop, "height", (double)c->image_height);
    cJSON_AddNumberToObject(crop, "width", (double)c->image_width);
    cJSON_AddItemToObject(root, "crop_size", crop);
    cJSON_AddTrueToObject(root, "do_rescale");
    cJSON_AddItemToObject(root, "rescale_factor", json_number(1. / 255));
    cJSON_AddTrueToObject(root, "do_normalize");
    cJSON_AddItemToObject(root, "image_mean", card__channels(c, card->mean));
    cJSON_AddItemToObject(root, "image_std", card__channels(c, card->std));
    cJSON_AddBoolToObject(root, "do_convert_rgb", c->channels == 3);
    return root;
}

/* ------------------------------------------------------------------------------------------------ writing */

/* The files of a folder, in the order of model_writer.path. */
static const char *const model_files[] = {"model.safetensors", "config.json", "preprocessor_config.json"};
enum { MODEL_FILES = sizeof model_files / sizeof *model_files };

/* A folder that comes into being. Everyone who writes plans it; one of them creates it, all write units, and
 * when all have closed it the one publishes it. */
typedef struct model_writer {
    const vit_model *model;
    model_format format;
    char folder[CHECKPOINT_PATH], aside[CHECKPOINT_PATH], path[MODEL_FILES][CHECKPOINT_PATH];
    model_part *parts;
    st_tensor *tensors; /* of the parts */
    size_t count;
    st_plan plan;
    int fd, created;
} model_writer;

/* Names and layout; touches no file. `folder` has no slash at its end. */
static inline int model_writer_plan(model_writer *w, const vit_model *m, const char *folder,
                                    model_format format, error_text *e) {
    static const model_naming namings[] = {
        [MODEL_TIMM] = {SPELLING_TIMM, ""}, [MODEL_HF] = {SPELLING_HF4, "vit."} /* 5.x writes and reads it */
    };
    *w = (model_writer){.model = m, .format = format, .fd = -1};
    if (snprintf(w->folder, sizeof w->folder, "%s", folder) >= CHECKPOINT_PATH ||
        snprintf(w->aside, sizeof w->aside, "%s.tmp", folder) >= CHECKPOINT_PATH)
        return error_set(e, "%.200s...: found too long a path", folder);
    for (size_t i = 0; i < MODEL_FILES; i++)
        if (checkpoint__join(w->path[i], w->aside, model_files[i], e)) return -1;
    if (model_parts(m, namings[format], &w->parts, &w->count, e)) return -1;
    if (!(w->tensors = calloc(w->count, sizeof *w->tensors)))
        return error_set(e, "out of memory for %zu tensors", w->count);
    for (size_t i = 0; i < w->count; i++)
        w->tensors[i] = (st_tensor){
            .name = w->parts[i].name, .dtype = ST_F32, .rank = w->parts[i].dims, .shape = w->parts[i].shape};
    return safetensors_plan(w->path[0], w->tensors, w->count, NULL, 0, &w->plan, e);
}

/* Writes a JSON tree, which it deletes. */
static inline int model_writer__json(const char *path, cJSON *root, error_text *e) {
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    if (!text) return error_set(e, "%s: out of memory", path);
    int failed = file_write_atomic(path, text, strlen(text), e);
    free(text);
    return failed;
}

/* Makes the folder aside, with its configuration and with room for all weights. */
static inline int model_writer_create(model_writer *w, const model_card *card, error_text *e) {
    const vit_config *c = &w->model->config;
    if (directory_make(w->aside, e)) return -1;
    w->created = 1;
    if (safetensors_create(w->path[0], &w->plan, &w->fd, e)) return -1;
    if (w->format == MODEL_TIMM) return model_writer__json(w->path[1], card__timm(c, card), e);
    return model_writer__json(w->path[1], card__hugging_face(c, card), e) ||
                   model_writer__json(w->path[2], card__preprocessor(c, card), e)
               ? -1
               : 0;
}

/* Writes elements [lo, hi) of a unit, whose values are [unit->count], in the folder that somebody created. */
static inline int model_writer_unit(model_writer *w, size_t u, const float *values, size_t lo, size_t hi,
                                    error_text *e) {
    if (w->fd < 0 && (w->fd = open(w->path[0], O_WRONLY | O_CLOEXEC)) < 0)
        return error_set(e, "%s: cannot be written: %s", w->path[0], strerror(errno));
    for (size_t i = 0; i < w->count; i++) {
        const model_part *p = &w->parts[i];
        size_t begin = p->offset, end = begin + p->count;
        size_t from = begin > lo ? begin : lo, to = end < hi ? end : hi;
        if (p->unit == u && from < to &&
            safetensors_write(w->fd, w->path[0], &w->tensors[i], from - begin, to - from, values + from, e))
            return -1;
    }
    return 0;
}

/* What this writer has written is on disk, or an error. */
static inline int model_writer_close(model_writer *w, error_text *e) {
    int fd = w->fd;
    w->fd = -1;
    return fd < 0 ? 0 : file_close_synced(fd, w->path[0], e);
}

/* The folder appears under its name. */
static inline int model_writer_publish(model_writer *w, error_text *e) {
    if (directory_sync(w->aside, e)) return -1;
    if (rename(w->aside, w->folder))
        return error_set(e, "%s: cannot be renamed to %s: %s", w->aside, w->folder, strerror(errno));
    w->created = 0;
    return 0;
}

/* Frees; a folder that was created and not published is removed. */
static inline void model_writer_free(model_writer *w) {
    if (w->fd >= 0) close(w->fd);
    for (size_t i = 0; i < MODEL_FILES && w->created; i++) unlink(w->path[i]);
    if (w->created) rmdir(w->aside);
    safetensors_plan_free(&w->plan);
    free(w->tensors);
    free(w->parts);
}

/* Did any rank fail? Every rank learns it; only the one that failed has a message. */
static inline int checkpoint__agree(dist *d, int failed) {
    int64_t failures = failed != 0;
    dist_sum(d, &failures, 1);
    return failures || rt_failed(d->rank) ? -1 : 0;
}

/* Writes this rank's elements of every unit. */
static inline int checkpoint__write_shards(dist *d, model_writer *w, error_text *e) {
    for (size_t u = 0; u < d->model->units; u++) {
        float *values = calloc(d->model->unit[u].count, sizeof *values);
        if (!values) return error_set(e, "out of memory for %zu weights", d->model->unit[u].count);
        dist_export(d, u, values);
        int failed = model_writer_unit(w, u, values, d->shard[u].lo, d->shard[u].hi, e);
        free(values);
        if (failed) return -1;
    }
    return 0;
}

/* Writes the weights that the ranks train, in timm's format; every rank must call it. On failure nothing is
 * left of the folder, and the ranks that did not cause it find e->text empty. */
static inline int checkpoint_save(dist *d, const char *folder, const model_card *card, error_text *e) {
    model_writer w = {.fd = -1};
    int first = d->comm->index == 0;
    e->text[0] = 0;
    int failed =
        model_writer_plan(&w, d->model, folder, MODEL_TIMM, e) || (first && model_writer_create(&w, card, e));
    failed = checkpoint__agree(d, failed); /* the file is there, or nobody writes */
    if (!failed && d->saves) failed = checkpoint__write_shards(d, &w, e);
    error_text closing;
    if (model_writer_close(&w, &closing) && !failed) failed = error_set(e, "%s", closing.text);
    failed = checkpoint__agree(d, failed);
    if (!failed && first) failed = model_writer_publish(&w, e);
    model_writer_free(&w);
    return checkpoint__agree(d, failed);
}

/* ---------------------------------------------------------------------------------------------- exporting */

/* The class names of a source for a model_card, [*count]; the caller frees them. NULL and 0: it has none. */
static inline int model_source_labels(const model_source *s, char (**names)[256], size_t *count,
                                      error_text *e) {
    int n = cJSON_GetArraySize(s->label_names);
    *count = 0;
    *names = n ? calloc((size_t)n, sizeof **names) : NULL;
    if (n && !*names) return error_set(e, "out of memory for %d class names", n);
    for (int i = 0; i < n; i++) {
        const char *name = cJSON_GetStringValue(cJSON_GetArrayItem(s->label_names, i));
        if (name && (size_t)snprintf((*names)[i], sizeof **names, "%s", name) < sizeof **names) continue;
        free(*names);
        *names = NULL;
        return error_set(e, "%s: class name %d: found %s, expected fewer than 256 bytes", s->config_path, i,
                         name ? "more" : "no string");
    }
    *count = (size_t)n;
    return 0;
}

/* Can the format say what the model is? */
static inline int model_format_check(const vit_model *m, model_format format, error_text *e) {
    if (format == MODEL_TIMM && m->config.layer_norm_eps != 1e-6)
        return error_set(
            e,
            "timm's config.json cannot say a LayerNorm eps of %g, timm takes 1e-6: export to hf, "
            "or with --layer-norm-eps 1e-6",
            m->config.layer_norm_eps);
    return 0;
}

/* Writes a checked source as a new folder in a format. One that holds a model already is refused. */
static inline int model_source_export(const model_source *s, const vit_model *m, const char *folder,
                                      model_format format, const model_card *card, error_text *e) {
    char path[CHECKPOINT_PATH];
    for (size_t i = 0; i < MODEL_FILES; i++) {
        if (checkpoint__join(path, folder, model_files[i], e)) return -1;
        if (source__exists(path))
            return error_set(e, "%s: found %s, so it already holds a model, expected a new folder", folder,
                             model_files[i]);
    }
    model_writer w = {.fd = -1};
    int failed = model_format_check(m, format, e) || model_writer_plan(&w, m, folder, format, e) ||
                 model_writer_create(&w, card, e);
    for (size_t u = 0; u < m->units && !failed; u++) {
        float *values = malloc(m->unit[u].count * sizeof *values);
        if (!values) failed = error_set(e, "out of memory for %zu weights", m->unit[u].count);
        failed = failed || model_source_unit(s, m, u, 0, values, e) ||
                 model_writer_unit(&w, u, values, 0, m->unit[u].count, e);
        free(values);
    }
    failed = failed || model_writer_close(&w, e) || model_writer_publish(&w, e);
    model_writer_free(&w);
    return failed ? -1 : 0;
}

/* ------------------------------------------------------------------------------------------------ pruning */

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
