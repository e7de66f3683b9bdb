/* checkpoint.h - models on disk, written: folders with config.json and model.safetensors, as timm or Hugging
 * Face's transformers open them (pretrained.h reads them); and step folders, from which training goes on.
 *
 *     model_card card = {mean, std, label_names, classes};
 *     if (checkpoint_save(&d, "runs/first/checkpoints/step-00000123", &card, &state, &e)) ... // every rank
 *     if (model_source_export(&s, &model, "vit-hf", MODEL_HF, &card, &e)) ...   // of a checked source
 *
 *     if (checkpoint_newest("runs/first/checkpoints", &model, DIST_ADAMW, folder, say, arg, &e)) ...
 *     if (checkpoint_read_state(folder, &state, &e)) ...   // where it stood
 *     if (checkpoint_load(&d, folder, &e)) ...             // as every rank
 *
 * Contents: configurations, files of tensors, writing, the trainer's state, checking, loading, exporting,
 * pruning.
 *
 * All writing goes through a model_writer. Files hold whole tensors in their logical shapes; each rank writes
 * its own elements of them in place, so that what one strategy wrote any other can read. A folder appears by
 * one rename, after all is on disk.
 *
 * Names beside a step folder: "step-N.tmp" comes into being or is being deleted and is worth nothing;
 * "step-N.replaced" is whole, the former step-N while a new one takes its name. A folder whose name has no
 * dot is complete at every moment.
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
    if (c->gelu != VIT_GELU_ERF) cJSON_AddStringToObject(args, "act_layer", timm_gelu[c->gelu]);
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
    cJSON_AddStringToObject(root, "hidden_act", hugging_face_gelu[c->gelu]);
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

/* --------------------------------------------------------------------------------------- files of tensors */

/* All files that a folder may have; indices of model_files and model_writer.path. */
enum { FILE_MODEL, FILE_OPTIMIZER, FILE_CONFIG, FILE_PREPROCESSOR, FILE_STATE, MODEL_FILES };
static const char *const model_files[MODEL_FILES] = {"model.safetensors", "optimizer.safetensors",
                                                     "config.json", "preprocessor_config.json",
                                                     "trainer_state.json"};

/* What a tensor of a file holds: the weights or an optimizer state of a part of the model. */
typedef struct tensor_source {
    model_part part; /* with the name in the file */
    int state;       /* -1: weights; else as in dist_export_state */
    uint64_t sum;    /* of what this writer has written, see tensor_checksum */
} tensor_source;

/* One safetensors file of a folder, as it has to be: fp32, in logical shapes. */
typedef struct tensor_file {
    tensor_source *source; /* [count] in the chain's order */
    st_tensor *tensors;    /* [count] */
    size_t count;
    st_plan plan;
    int fd;
} tensor_file;

static inline void tensor_file_free(tensor_file *f) {
    if (f->fd >= 0) close(f->fd);
    safetensors_plan_free(&f->plan);
    free(f->tensors);
    free(f->source);
    *f = (tensor_file){.fd = -1};
}

/* Lists the tensors of a file: the weights, or (optimizer not NULL) its states of the trained tensors. */
static inline int tensor_file_init(tensor_file *f, const vit_model *m, model_naming naming,
                                   const dist_optimizer *optimizer, error_text *e) {
    static const char *const states[][2] = {
        [DIST_ADAMW] = {"exp_avg", "exp_avg_sq"}, [DIST_SGD] = {"momentum_buffer", NULL}};
    model_part *parts;
    size_t count;
    *f = (tensor_file){.fd = -1};
    if (model_parts(m, naming, &parts, &count, e)) return -1;
    f->source = calloc(2 * count, sizeof *f->source);
    f->tensors = calloc(2 * count, sizeof *f->tensors);
    for (size_t k = 0; k < count && f->source && f->tensors; k++) {
        if (!optimizer) f->source[f->count++] = (tensor_source){.part = parts[k], .state = -1};
        if (!optimizer || parts[k].offset >= m->unit[parts[k].unit].trainable) continue;
        for (int i = 0; i < 2 && states[*optimizer][i]; i++) {
            tensor_source *t = &f->source[f->count++];
            *t = (tensor_source){.part = parts[k], .state = i};
            snprintf(t->part.name, sizeof t->part.name, "%s.%.64s", states[*optimizer][i], parts[k].name);
        }
    }
    free(parts);
    if (!f->source || !f->tensors) return error_set(e, "out of memory for the names of %zu tensors", count);
    for (size_t k = 0; k < f->count; k++) {
        model_part *p = &f->source[k].part;
        f->tensors[k] = (st_tensor){
            .name = p->name, .dtype = ST_F32, .rank = p->dims, .shape = p->shape, .count = p->count};
    }
    return 0;
}

/* The checksum of elements [from, from + count) of a tensor of fp32 numbers with bit patterns b_i: the sum of
 * b_i (2 i + 1) modulo 2^64. As the factors are odd, one element that differs always shows; as it is a sum,
 * that of a tensor is the sum of those of its parts. Sets *not_finite if there is a NaN or an infinity.
 * `elements` may be of any alignment. */
static inline uint64_t tensor_checksum(const void *elements, size_t from, size_t count, int *not_finite) {
    uint64_t sum = 0;
    uint32_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, (const char *)elements + i * sizeof bits, sizeof bits);
        sum += bits * (2 * (uint64_t)(from + i) + 1);
        bad |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    if (bad) *not_finite = 1;
    return sum;
}

/* ------------------------------------------------------------------------------------------------ writing */

/* A folder that comes into being. Everyone who writes plans it; one of them creates it, all write units, and
 * when all have closed it the one publishes it. */
typedef struct model_writer {
    const vit_model *model;
    model_format format;
    char folder[CHECKPOINT_PATH], aside[CHECKPOINT_PATH], path[MODEL_FILES][CHECKPOINT_PATH];
    tensor_file file[2]; /* FILE_MODEL, FILE_OPTIMIZER */
    size_t files;        /* 1 or 2 */
    int created;
} model_writer;

/* Deletes a folder and the files of model_files in it, half-written ones too. Anything else in it stays, and
 * so does the folder then. */
static inline void checkpoint__delete(const char *folder) {
    char path[CHECKPOINT_PATH + 1024];
    for (size_t i = 0; i < 2 * MODEL_FILES; i++)
        if (snprintf(path, sizeof path, "%s/%s%s", folder, model_files[i / 2], i % 2 ? ".tmp" : "") <
            (int)sizeof path)
            unlink(path);
    rmdir(folder);
}

/* Deletes a folder that is visible, which at once it is no more. */
static inline void checkpoint__discard(const char *folder) {
    char aside[CHECKPOINT_PATH + 1024];
    if (snprintf(aside, sizeof aside, "%s.tmp", folder) >= (int)sizeof aside) return;
    checkpoint__delete(aside); /* a leftover */
    if (rename(folder, aside) == 0) checkpoint__delete(aside);
}

/* Names and layout; touches no file. `folder` has no slash at its end. With an optimizer its states have a
 * file of their own. */
static inline int model_writer_plan(model_writer *w, const vit_model *m, const char *folder,
                                    model_format format, const dist_optimizer *optimizer, error_text *e) {
    static const model_naming namings[] = {
        [MODEL_TIMM] = {SPELLING_TIMM, ""}, [MODEL_HF] = {SPELLING_HF4, "vit."} /* 5.x writes and reads it */
    };
    *w = (model_writer){.model = m, .format = format, .file = {{.fd = -1}, {.fd = -1}}};
    if (snprintf(w->folder, sizeof w->folder, "%s", folder) >= CHECKPOINT_PATH ||
        snprintf(w->aside, sizeof w->aside, "%s.tmp", folder) >= CHECKPOINT_PATH)
        return error_set(e, "%.200s...: found too long a path", folder);
    for (size_t i = 0; i < MODEL_FILES; i++)
        if (checkpoint__join(w->path[i], w->aside, model_files[i], e)) return -1;
    w->files = optimizer ? 2 : 1;
    for (size_t i = 0; i < w->files; i++) {
        tensor_file *f = &w->file[i];
        if (tensor_file_init(f, m, namings[format], i ? optimizer : NULL, e) ||
            safetensors_plan(w->path[i], f->tensors, f->count, NULL, 0, &f->plan, e))
            return -1;
    }
    return 0;
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

/* Makes the folder aside, with its configuration and with room for all tensors. */
static inline int model_writer_create(model_writer *w, const model_card *card, error_text *e) {
    const vit_config *c = &w->model->config;
    checkpoint__delete(w->aside); /* of a run that was killed */
    if (directory_make(w->aside, e)) return -1;
    w->created = 1;
    for (size_t i = 0; i < w->files; i++)
        if (safetensors_create(w->path[i], &w->file[i].plan, &w->file[i].fd, e)) return -1;
    if (w->format == MODEL_TIMM) return model_writer__json(w->path[FILE_CONFIG], card__timm(c, card), e);
    return model_writer__json(w->path[FILE_CONFIG], card__hugging_face(c, card), e) ||
                   model_writer__json(w->path[FILE_PREPROCESSOR], card__preprocessor(c, card), e)
               ? -1
               : 0;
}

/* Writes elements [lo, hi) of a unit's weights (state -1) or of one of its optimizer states, whose values are
 * [unit->count], in the folder that somebody created. */
static inline int model_writer_unit(model_writer *w, size_t u, int state, const float *values, size_t lo,
                                    size_t hi, error_text *e) {
    size_t i = state < 0 ? FILE_MODEL : FILE_OPTIMIZER;
    tensor_file *f = &w->file[i];
    int unused = 0;
    if (f->fd < 0 && (f->fd = open(w->path[i], O_WRONLY | O_CLOEXEC)) < 0)
        return error_set(e, "%s: cannot be written: %s", w->path[i], strerror(errno));
    for (size_t k = 0; k < f->count; k++) {
        tensor_source *t = &f->source[k];
        size_t begin = t->part.offset, end = begin + t->part.count;
        size_t from = begin > lo ? begin : lo, to = end < hi ? end : hi;
        if (t->part.unit != u || t->state != state || from >= to) continue;
        t->sum += tensor_checksum(values + from, from - begin, to - from, &unused);
        if (safetensors_write(f->fd, w->path[i], &f->tensors[k], from - begin, to - from, values + from, e))
            return -1;
    }
    return 0;
}

/* What this writer has written is on disk, or an error. */
static inline int model_writer_close(model_writer *w, error_text *e) {
    int failed = 0;
    for (size_t i = 0; i < w->files; i++) {
        int fd = w->file[i].fd;
        w->file[i].fd = -1;
        if (fd >= 0 && !failed)
            failed = file_close_synced(fd, w->path[i], e);
        else if (fd >= 0)
            close(fd);
    }
    return failed;
}

/* The folder appears under its name. `replaces`: what is there under this name is deleted, but not before. */
static inline int model_writer_publish(model_writer *w, int replaces, error_text *e) {
    char former[CHECKPOINT_PATH + 16];
    int moved = 0;
    if (directory_sync(w->aside, e)) return -1;
    snprintf(former, sizeof former, "%s.replaced", w->folder);
    if (replaces && source__exists(w->folder)) {
        checkpoint__discard(former); /* a leftover, which step-N has outlived */
        if (rename(w->folder, former))
            return error_set(e, "%s: cannot be renamed to %s: %s", w->folder, former, strerror(errno));
        moved = 1;
    }
    if (rename(w->aside, w->folder)) {
        error_set(e, "%s: cannot be renamed to %s: %s", w->aside, w->folder, strerror(errno));
        if (moved && rename(former, w->folder))
            return error_set(e, "%s: cannot be renamed to %s: %s", former, w->folder, strerror(errno));
        return -1;
    }
    w->created = 0;
    if (directory_sync_parent(w->folder, e)) return -1;
    if (moved) checkpoint__discard(former);
    return 0;
}

/* Frees; a folder that was created and not published is removed. */
static inline void model_writer_free(model_writer *w) {
    for (size_t i = 0; i < w->files; i++) tensor_file_free(&w->file[i]);
    if (w->created) checkpoint__delete(w->aside);
}

/* ------------------------------------------------------------------------------------ the trainer's state */

/* Where training stands: trainer_state.json. */
typedef struct checkpoint_state {
    size_t step;            /* optimizer steps done */
    size_t epoch, position; /* samples of that epoch's order that are used up; behind a whole epoch: the next
                               one, 0 */
    size_t global_batch, batch_size, accumulation, ranks;
    size_t metrics_bytes; /* length of metrics.jsonl */
    double epoch_loss;    /* sum of the losses of the epoch's steps so far */
    size_t epoch_steps;   /* how many */
    double last_accuracy, best_accuracy, best_saved;
    size_t evaluated;  /* the step of the last evaluation, SIZE_MAX: there was none */
    double loss_scale; /* with what follows, vit_scaler's; told of fp16 alone */
    size_t scaler_step, scaler_overflow, scaler_left, scaler_skipped; /* overflow: 1 + its step, 0: none */
    char best[32];  /* the folder that checkpoints/best names, "": none */
    cJSON *options; /* every option, as in config.json's "options" */
} checkpoint_state;

/* The file's keys. A count is a whole number from `least` to 2^53 - 1; null stands for SIZE_MAX where that is
 * allowed. A value is a double, bit for bit; null stands for what JSON cannot say, and is read as NaN. */
static const struct {
    const char *key;
    size_t offset, least;
    int optional;
} state_counts[] = {
#define COUNT(name, least, optional)                                                                         \
    { #name, offsetof(checkpoint_state, name), least, optional }
    COUNT(step, 0, 0),         COUNT(epoch, 0, 0),          COUNT(position, 0, 0),
    COUNT(global_batch, 1, 0), COUNT(batch_size, 1, 0),     COUNT(accumulation, 1, 0),
    COUNT(ranks, 1, 0),        COUNT(metrics_bytes, 0, 0),  COUNT(epoch_steps, 0, 0),
    COUNT(evaluated, 0, 1),    COUNT(scaler_step, 0, 0),    COUNT(scaler_overflow, 0, 0),
    COUNT(scaler_left, 0, 0),  COUNT(scaler_skipped, 0, 0),
#undef COUNT
};
static const struct {
    const char *key;
    size_t offset;
} state_values[] = {
#define VALUE(name)                                                                                          \
    { #name, offsetof(checkpoint_state, name) }
    VALUE(epoch_loss), VALUE(last_accuracy), VALUE(best_accuracy), VALUE(best_saved), VALUE(loss_scale),
#undef VALUE
};
enum {
    STATE_COUNTS = sizeof state_counts / sizeof *state_counts,
    STATE_VALUES = sizeof state_values / sizeof *state_values
};

static inline void checkpoint_state_free(checkpoint_state *s) {
    cJSON_Delete(s->options);
    *s = (checkpoint_state){0};
}

/* trainer_state.json, with the checksums that a writer's files have; NULL: out of memory. */
static inline cJSON *checkpoint__state_json(const checkpoint_state *s, const model_writer *w) {
    cJSON *root = cJSON_CreateObject();
    int fine = 1;
    for (size_t i = 0; i < STATE_COUNTS; i++) {
        size_t x = *(const size_t *)((const char *)s + state_counts[i].offset);
        fine &= cJSON_AddItemToObject(root, state_counts[i].key,
                                      x == SIZE_MAX ? cJSON_CreateNull() : json_number((double)x));
    }
    for (size_t i = 0; i < STATE_VALUES; i++) {
        double x = *(const double *)((const char *)s + state_values[i].offset);
        fine &= cJSON_AddItemToObject(root, state_values[i].key,
                                      isfinite(x) ? json_number(x) : cJSON_CreateNull());
    }
    fine &= cJSON_AddStringToObject(root, "best", s->best) != NULL;
    fine &= cJSON_AddItemReferenceToObject(root, "options", s->options);
    cJSON *checksums = cJSON_AddObjectToObject(root, "checksums");
    for (size_t i = 0; i < w->files; i++) {
        cJSON *sums = cJSON_AddObjectToObject(checksums, model_files[i]);
        for (size_t k = 0; k < w->file[i].count; k++) {
            const tensor_source *t = &w->file[i].source[k];
            char text[17];
            snprintf(text, sizeof text, "%016llx", (unsigned long long)t->sum);
            fine &= cJSON_AddStringToObject(sums, t->part.name, text) != NULL;
        }
    }
    if (fine) return root;
    cJSON_Delete(root);
    return NULL;
}

/* A name that `checkpoints` may have for a step folder. */
static inline int checkpoint__is_step(const char *name) {
    size_t digits = strlen(name) < 5 ? 0 : strspn(name + 5, "0123456789");
    return !strncmp(name, "step-", 5) && digits > 0 && digits < 20 && name[5 + digits] == 0;
}

/* Fills in *s (for checkpoint_state_free) from the tree of a file. */
static inline int checkpoint__parse_state(const cJSON *root, const char *path, checkpoint_state *s,
                                          error_text *e) {
    *s = (checkpoint_state){0};
    if (!cJSON_IsObject(root)) return error_set(e, "%s: found %s, expected an object", path, json_kind(root));
    for (size_t i = 0; i < STATE_COUNTS; i++) {
        const char *key = state_counts[i].key;
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, key);
        size_t *x = (size_t *)((char *)s + state_counts[i].offset), least = state_counts[i].least;
        if (state_counts[i].optional && cJSON_IsNull(item))
            *x = SIZE_MAX;
        else if (!st_whole(item, x) || (double)*x != item->valuedouble || *x < least)
            return error_set(e, "%s: %s: found %s, expected a whole number in [%zu, 2^53)", path, key,
                             cJSON_IsNumber(item) ? "another number" : json_kind(item), least);
    }
    for (size_t i = 0; i < STATE_VALUES; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, state_values[i].key);
        int fine = cJSON_IsNull(item) || (cJSON_IsNumber(item) && isfinite(item->valuedouble));
        if (!fine)
            return error_set(e, "%s: %s: found %s, expected a finite number or null", path,
                             state_values[i].key, cJSON_IsNumber(item) ? "another number" : json_kind(item));
        *(double *)((char *)s + state_values[i].offset) = cJSON_IsNull(item) ? NAN : item->valuedouble;
    }
    const cJSON *best = cJSON_GetObjectItemCaseSensitive(root, "best"),
                *options = cJSON_GetObjectItemCaseSensitive(root, "options");
    if (!cJSON_IsString(best) || (*best->valuestring && !checkpoint__is_step(best->valuestring)))
        return error_set(e, "%s: best: found %s, expected the name of a step folder or \"\"", path,
                         cJSON_IsString(best) ? quote(best->valuestring, SIZE_MAX).text : json_kind(best));
    snprintf(s->best, sizeof s->best, "%s", best->valuestring);
    if (!cJSON_IsObject(options))
        return error_set(e, "%s: options: found %s, expected an object", path, json_kind(options));
    if (!(s->options = cJSON_Duplicate(options, 1))) return error_set(e, "%s: out of memory", path);
    return 0;
}

/* The tree of a folder's trainer_state.json, which the caller deletes, and what it says; NULL on failure. */
static inline cJSON *checkpoint__open_state(const char *folder, checkpoint_state *s, error_text *e) {
    char path[CHECKPOINT_PATH];
    *s = (checkpoint_state){0};
    if (checkpoint__join(path, folder, model_files[FILE_STATE], e)) return NULL;
    cJSON *root = source__read_json(path, e);
    if (root && checkpoint__parse_state(root, path, s, e)) {
        cJSON_Delete(root);
        root = NULL;
    }
    return root;
}

/* Reads where a step folder's training stood; on success *s is the caller's to free. */
static inline int checkpoint_read_state(const char *folder, checkpoint_state *s, error_text *e) {
    cJSON *root = checkpoint__open_state(folder, s, e);
    cJSON_Delete(root);
    return root ? 0 : -1;
}

/* ------------------------------------------------------------------------------------------------- saving */

/* Did any rank fail? Every rank learns it; only the one that failed has a message. */
static inline int checkpoint__agree(dist *d, int failed) {
    int64_t failures = failed != 0;
    dist_sum(d, &failures, 1);
    return failures || rt_failed(d->rank) ? -1 : 0;
}

/* Writes this rank's elements of every unit: weights, then optimizer states. */
static inline int checkpoint__write_shards(dist *d, model_writer *w, error_text *e) {
    for (size_t u = 0; u < d->model->units; u++) {
        const dist_shard *s = &d->shard[u];
        float *values = calloc(d->model->unit[u].count, sizeof *values);
        if (!values) return error_set(e, "out of memory for %zu weights", d->model->unit[u].count);
        dist_export(d, u, values);
        int failed = model_writer_unit(w, u, -1, values, s->lo, s->hi, e);
        for (int i = 0; i < 2 && !failed; i++) {
            if (!s->state[i].count) continue;
            dist_export_state(d, u, i, values);
            failed = model_writer_unit(w, u, i, values, s->lo, s->trained, e);
        }
        free(values);
        if (failed) return -1;
    }
    return 0;
}

/* Adds up what the ranks' parts contribute to the checksums. */
static inline int checkpoint__sum(dist *d, model_writer *w, error_text *e) {
    size_t count = w->file[0].count + w->file[1].count, k = 0;
    int64_t *sums = malloc(count * sizeof *sums);
    int failed = checkpoint__agree(d, sums ? 0 : error_set(e, "out of memory for %zu checksums", count));
    for (size_t i = 0; i < w->files && !failed; i++)
        for (size_t j = 0; j < w->file[i].count; j++) sums[k++] = (int64_t)w->file[i].source[j].sum;
    for (size_t i = 0, n; i < count && !failed; i += n) {
        n = count - i < d->options.counts ? count - i : d->options.counts;
        dist_sum(d, sums + i, n);
    }
    k = 0;
    for (size_t i = 0; i < w->files && !failed; i++)
        for (size_t j = 0; j < w->file[i].count; j++) w->file[i].source[j].sum = (uint64_t)sums[k++];
    free(sums);
    return failed;
}

/* Writes all that is needed to go on: the weights, in timm's format, the optimizer's states and where
 * training stands. Every rank must call it; *s is rank 0's. A folder of that name is replaced. On failure
 * nothing is left of the new one, and the ranks that did not cause it find e->text empty. */
static inline int checkpoint_save(dist *d, const char *folder, const model_card *card,
                                  const checkpoint_state *s, error_text *e) {
    model_writer w = {0};
    int first = d->comm->index == 0;
    e->text[0] = 0;
    int failed = model_writer_plan(&w, d->model, folder, MODEL_TIMM, &d->options.optimizer, e) ||
                 (first && model_writer_create(&w, card, e));
    failed = checkpoint__agree(d, failed); /* the files are there, or nobody writes */
    if (!failed && d->saves) failed = checkpoint__write_shards(d, &w, e);
    error_text closing;
    if (model_writer_close(&w, &closing) && !failed) failed = error_set(e, "%s", closing.text);
    failed = checkpoint__agree(d, failed) || checkpoint__sum(d, &w, e);
    if (!failed && first) {
        cJSON *state = checkpoint__state_json(s, &w);
        failed = state ? model_writer__json(w.path[FILE_STATE], state, e)
                       : error_set(e, "%s: out of memory", w.path[FILE_STATE]);
        failed = failed || model_writer_publish(&w, 1, e);
    }
    model_writer_free(&w);
    return checkpoint__agree(d, failed);
}

/* ----------------------------------------------------------------------------------------------- checking */

/* Does a file hold what its checksums say? Names the first tensor that is damaged or not finite. */
static inline int checkpoint__check_sums(const safetensors *f, const cJSON *sums, const char *state_path,
                                         error_text *e) {
    for (size_t k = 0; k < f->count; k++) {
        const st_tensor *t = &f->tensors[k];
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(sums, t->name);
        char text[17];
        int not_finite = 0;
        if (!cJSON_IsString(item))
            return st_error(e, f->path, t->name,
                            "found %s as its checksum in %s, expected 16 hexadecimal digits", json_kind(item),
                            state_path);
        if (t->dtype != ST_F32)
            return st_error(e, f->path, t->name, "found dtype %s, expected F32", st_dtypes[t->dtype].name);
        uint64_t sum = tensor_checksum(f->bytes + t->offset, 0, t->count, &not_finite);
        snprintf(text, sizeof text, "%016llx", (unsigned long long)sum);
        if (strcmp(text, item->valuestring))
            return st_error(e, f->path, t->name, "found checksum %s, expected %s: it is damaged", text,
                            quote(item->valuestring, SIZE_MAX).text);
        if (not_finite)
            return st_error(e, f->path, t->name,
                            "found a NaN or an infinity in %zu elements, expected finite numbers", t->count);
    }
    if (f->count == (size_t)cJSON_GetArraySize(sums)) return 0;
    return error_set(e, "%s: found %zu tensors, expected %d by %s", f->path, f->count,
                     cJSON_GetArraySize(sums), state_path);
}

/* Has a file exactly the tensors that it has to have? Names the first that differs. */
static inline int checkpoint__compare(const safetensors *f, const tensor_file *expected, error_text *e) {
    char has[128], wants[128];
    for (size_t k = 0; k < expected->count; k++) {
        const st_tensor *wanted = &expected->tensors[k], *t = safetensors_find(f, wanted->name);
        source__shape_text(wants, sizeof wants, wanted->rank, wanted->shape);
        if (t)
            source__shape_text(has, sizeof has, t->rank, t->shape);
        else
            *has = 0;
        if (!t || strcmp(has, wants))
            return error_set(e, "%s: tensor %s: found %s%s, expected shape %s", f->path, wanted->name,
                             t ? "shape " : "none", has, wants);
    }
    for (size_t k = 0; k < f->count && f->count > expected->count; k++) {
        size_t i = 0;
        while (i < expected->count && strcmp(f->tensors[k].name, expected->tensors[i].name)) i++;
        if (i == expected->count)
            return error_set(e, "%s: found tensor %s, expected none of this name", f->path,
                             quote(f->tensors[k].name, SIZE_MAX).text);
    }
    return 0;
}

/* What the tensors do not tell: is the model that config.json describes this one? */
static inline int checkpoint__compare_config(const char *path, const vit_config *found, const vit_config *c,
                                             error_text *e) {
    const struct {
        const char *name;
        double found, expected;
    } values[] = {{"num_heads", (double)found->num_heads, (double)c->num_heads},
                  {"img_size (height)", (double)found->image_height, (double)c->image_height},
                  {"img_size (width)", (double)found->image_width, (double)c->image_width},
                  {"layer_norm_eps", found->layer_norm_eps, c->layer_norm_eps}};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (values[i].found != values[i].expected)
            return error_set(e, "%s: %s: found %.17g, expected %.17g", path, values[i].name, values[i].found,
                             values[i].expected);
    if (found->gelu != c->gelu)
        return error_set(e, "%s: act_layer: found %s, expected %s (--gelu)", path, timm_gelu[found->gelu],
                         timm_gelu[c->gelu]);
    return 0;
}

/* The two files of tensors of a step folder, open. */
static inline int checkpoint__open(const char *folder, safetensors file[2], error_text *e) {
    char path[CHECKPOINT_PATH];
    file[0] = file[1] = (safetensors){0};
    for (size_t i = 0; i < 2; i++)
        if (checkpoint__join(path, folder, model_files[i], e) || safetensors_open(path, &file[i], e)) {
            safetensors_close(&file[0]);
            return -1;
        }
    return 0;
}

/* checkpoint_check of two open files; *other: they are whole, but not of this model. */
static inline int checkpoint__check_files(const char *folder, const safetensors file[2], const vit_model *m,
                                          dist_optimizer optimizer, int *other, error_text *e) {
    const model_naming timm = {SPELLING_TIMM, ""};
    char path[CHECKPOINT_PATH];
    checkpoint_state s;
    if (checkpoint__join(path, folder, model_files[FILE_STATE], e)) return -1;
    cJSON *root = checkpoint__open_state(folder, &s, e);
    const cJSON *checksums = cJSON_GetObjectItemCaseSensitive(root, "checksums");
    int failed = !root;
    for (size_t i = 0; i < 2 && !failed; i++)
        failed = checkpoint__check_sums(&file[i], cJSON_GetObjectItemCaseSensitive(checksums, model_files[i]),
                                        path, e);
    checkpoint_state_free(&s);
    cJSON_Delete(root);

    model_source source = {0};
    vit_config config = {.layer_norm_eps = 1e-6};
    failed = failed || model_source_open(&source, folder, e) || model_source_config(&source, &config, e);
    for (size_t i = 0; i < 2 && !failed; i++) {
        tensor_file expected;
        failed = tensor_file_init(&expected, m, timm, i ? &optimizer : NULL, e);
        if (!failed) failed = *other = checkpoint__compare(&file[i], &expected, e);
        tensor_file_free(&expected);
    }
    if (!failed) failed = *other = checkpoint__compare_config(source.config_path, &config, &m->config, e);
    model_source_close(&source);
    return failed ? -1 : 0;
}

static inline int checkpoint__check(const char *folder, const vit_model *m, dist_optimizer optimizer,
                                    int *other, error_text *e) {
    static const size_t needed[] = {FILE_MODEL, FILE_OPTIMIZER, FILE_CONFIG, FILE_STATE};
    char path[CHECKPOINT_PATH];
    safetensors file[2];
    *other = 0;
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        if (checkpoint__join(path, folder, model_files[needed[i]], e)) return -1;
        if (!source__exists(path))
            return error_set(e, "%s: found no %s, expected a step folder to resume from", folder,
                             model_files[needed[i]]);
    }
    if (checkpoint__open(folder, file, e)) return -1;
    int failed = checkpoint__check_files(folder, file, m, optimizer, other, e);
    for (size_t i = 0; i < 2; i++) safetensors_close(&file[i]);
    return failed;
}

/* Can training of this model with this optimizer go on from a step folder? Its files must be whole, agree
 * with their checksums, be finite, and be of exactly this model. The message names the first file and tensor
 * that is damaged, or else the first tensor of the chain's order that differs. For one thread; reads all. */
static inline int checkpoint_check(const char *folder, const vit_model *m, dist_optimizer optimizer,
                                   error_text *e) {
    int other;
    return checkpoint__check(folder, m, optimizer, &other, e);
}

static inline int checkpoint__only_steps(const struct dirent *entry) {
    return checkpoint__is_step(entry->d_name);
}

/* Lowest first. */
static inline int checkpoint__by_step(const struct dirent **a, const struct dirent **b) {
    unsigned long long s = strtoull((*a)->d_name + 5, NULL, 10), t = strtoull((*b)->d_name + 5, NULL, 10);
    return (s > t) - (s < t);
}

/* Deletes what a killed run has left beside the step folders; a former one that was to be replaced, and was
 * not, gets its name back. Only while nobody saves. */
static inline void checkpoint__tidy(const char *checkpoints) {
    struct dirent **entries;
    int n = scandir(checkpoints, &entries, NULL, alphasort);
    for (int i = 0; i < n; free(entries[i++])) {
        const char *name = entries[i]->d_name, *dot = strchr(name, '.');
        char path[CHECKPOINT_PATH + 600], step[CHECKPOINT_PATH + 600];
        if (strncmp(name, "step-", 5) || !dot) continue;
        snprintf(path, sizeof path, "%s/%s", checkpoints, name);
        snprintf(step, sizeof step, "%.*s", (int)(strlen(path) - strlen(dot)), path);
        if (!strcmp(dot, ".replaced") && rename(path, step))
            checkpoint__discard(path); /* not empty: it is there */
        if (!strcmp(dot, ".tmp") || !strcmp(dot, ".replaced.tmp")) checkpoint__delete(path);
    }
    if (n >= 0) free(entries);
}

/* The step folder of the highest number under `checkpoints` that passes checkpoint_check; "": there is none.
 * Why a newer one was passed over, say(arg, why) hears. One that is whole but of another model is an error.
 * For one thread, while nobody saves. */
static inline int checkpoint_newest(const char *checkpoints, const vit_model *m, dist_optimizer optimizer,
                                    char folder[CHECKPOINT_PATH], void (*say)(void *, const char *why),
                                    void *arg, error_text *e) {
    struct dirent **entries;
    int failed = 0, found = 0;
    *folder = 0;
    if (!source__exists(checkpoints)) return 0;
    checkpoint__tidy(checkpoints);
    int n = scandir(checkpoints, &entries, checkpoint__only_steps, checkpoint__by_step);
    if (n < 0) return error_set(e, "%s: cannot be read: %s", checkpoints, strerror(errno));
    for (int i = n; i-- > 0; free(entries[i])) {
        int other = 0;
        if (found || failed) continue;
        failed = checkpoint__join(folder, checkpoints, entries[i]->d_name, e);
        if (failed) continue;
        if (checkpoint__check(folder, m, optimizer, &other, e) == 0)
            found = 1;
        else if (other)
            failed = -1;
        else
            say(arg, e->text);
    }
    free(entries);
    if (!found) *folder = 0;
    return failed;
}

/* ------------------------------------------------------------------------------------------------ loading */

/* Hands one unit's weights or one of its states, whole, to the rank. */
static inline int checkpoint__load_unit(dist *d, const safetensors *f, const tensor_file *list, size_t u,
                                        int state, float *values, error_text *e) {
    memset(values, 0, d->model->unit[u].count * sizeof *values);
    for (size_t k = 0; k < list->count; k++) {
        const tensor_source *t = &list->source[k];
        if (t->part.unit == u && t->state == state &&
            safetensors_read_f32(f, safetensors_find(f, t->part.name), 0, t->part.count,
                                 values + t->part.offset, e))
            return -1;
    }
    if (state < 0)
        dist_import(d, u, values);
    else
        dist_import_state(d, u, state, values);
    return 0;
}

/* Takes this rank's part of the weights and optimizer states of a step folder. Any strategy on any number of
 * ranks reads what any other wrote. Every rank must call it; the ranks that did not cause a failure find
 * e->text empty. It compares names and shapes, but reads no checksums: checkpoint_check does. */
static inline int checkpoint_load(dist *d, const char *folder, error_text *e) {
    const model_naming timm = {SPELLING_TIMM, ""};
    safetensors file[2];
    tensor_file list[2] = {{.fd = -1}, {.fd = -1}};
    e->text[0] = 0;
    int failed = checkpoint__open(folder, file, e);
    for (size_t i = 0; i < 2 && !failed; i++)
        failed = tensor_file_init(&list[i], d->model, timm, i ? &d->options.optimizer : NULL, e) ||
                 checkpoint__compare(&file[i], &list[i], e);
    for (size_t u = 0; u < d->model->units && !failed; u++) {
        float *values = malloc(d->model->unit[u].count * sizeof *values);
        if (!values) failed = error_set(e, "out of memory for %zu weights", d->model->unit[u].count);
        for (int state = -1; state < 2 && !failed; state++)
            failed = checkpoint__load_unit(d, &file[state >= 0], &list[state >= 0], u, state, values, e);
        free(values);
    }
    for (size_t i = 0; i < 2; i++) {
        tensor_file_free(&list[i]);
        safetensors_close(&file[i]);
    }
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
    model_writer w = {0};
    int failed = model_format_check(m, format, e) || model_writer_plan(&w, m, folder, format, NULL, e) ||
                 model_writer_create(&w, card, e);
    for (size_t u = 0; u < m->units && !failed; u++) {
        float *values = malloc(m->unit[u].count * sizeof *values);
        if (!values) failed = error_set(e, "out of memory for %zu weights", m->unit[u].count);
        failed = failed || model_source_unit(s, m, u, 0, values, e) ||
                 model_writer_unit(&w, u, -1, values, 0, m->unit[u].count, e);
        free(values);
    }
    failed = failed || model_writer_close(&w, e) || model_writer_publish(&w, 0, e);
    model_writer_free(&w);
    return failed ? -1 : 0;
}

/* ------------------------------------------------------------------------------------------------ pruning */

/* Deletes the oldest step folders under `checkpoints` until `keep` are left, never those that `best` and
 * `latest` name, and what killed runs have left. Only while nobody saves. */
static inline void checkpoint_prune(const char *checkpoints, size_t keep, const char *best,
                                    const char *latest) {
    struct dirent **entries;
    checkpoint__tidy(checkpoints);
    int n = scandir(checkpoints, &entries, checkpoint__only_steps, checkpoint__by_step), left = n;
    for (int i = 0; i < n; free(entries[i++])) {
        const char *name = entries[i]->d_name;
        char path[CHECKPOINT_PATH + 600];
        if ((size_t)left <= keep || !strcmp(name, best) || !strcmp(name, latest)) continue;
        snprintf(path, sizeof path, "%s/%s", checkpoints, name);
        checkpoint__discard(path);
        left--;
    }
    if (n >= 0) free(entries);
}

/* Deletes the step folders behind a step, where a training goes on from it; how many there were. */
static inline size_t checkpoint_cut(const char *checkpoints, size_t step) {
    struct dirent **entries;
    int n = scandir(checkpoints, &entries, checkpoint__only_steps, checkpoint__by_step);
    size_t cut = 0;
    for (int i = 0; i < n; free(entries[i++])) {
        char path[CHECKPOINT_PATH + 600];
        if (strtoull(entries[i]->d_name + 5, NULL, 10) <= step) continue;
        snprintf(path, sizeof path, "%s/%s", checkpoints, entries[i]->d_name);
        checkpoint__discard(path);
        cut++;
    }
    if (n >= 0) free(entries);
    return cut;
}

#endif
