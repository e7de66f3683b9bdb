/* pretrained.h - models on disk, read: folders and files of timm and of Hugging Face, in their own names.
 *
 *     model_source s;
 *     vit_config config;
 *     if (model_source_open(&s, "vit-base-patch16-224", &e)) ...  // a file, a model or step folder, a run
 *     s.may_replace_head = 1;                                     // to be trained on other classes
 *     if (model_source_config(&s, &config, &e)) ...               // from config.json, or from the shapes
 *     config.num_classes = 10;                                    // and vit_model_init(&model, &config, ...)
 *     if (model_source_check(&s, &model, &e)) ...                 // each tensor is there, and no other
 *     puts(s.notes);                                              // what is adapted, in words
 *     if (model_source_load(&s, &d, seed, &e)) ...                // as every rank: this rank's part of them
 *     model_source_close(&s);
 *
 * Contents: opening, configurations, checking, loading.
 *
 * In which of the namings of model_names.h a file is, its tensors tell. Nothing is guessed: a tensor that is
 * missing, or that the naming does not have, is an error. Two things are adapted: a head of another size is
 * replaced by a fresh one, where the caller allows it, and the positions of another grid of patches are
 * resampled as timm does.
 *
 * A source is opened and checked by one thread; then ranks may share it, as loading only reads it. Left out:
 * files in several parts, pickles (the message says how to convert one), distilled and register tokens, layer
 * scale, pooling other than the class token.
 */
#ifndef PRETRAINED_H
#define PRETRAINED_H

#include <sys/stat.h>
#include <unistd.h>

#include "data/resize.h"
#include "dist.h"
#include "model_names.h"

enum { CHECKPOINT_PATH = 4096 };

/* ------------------------------------------------------------------------------------------------ opening */

/* How an image of another size becomes one of the model's: its shorter side is resized to the model's /
 * crop_pct, and the centre cut out. Squashed: both sides are, whatever the image's aspect. */
typedef struct model_transform {
    double crop_pct;
    int bilinear; /* else bicubic */
    int squash;
} model_transform;

typedef struct model_source {
    char path[CHECKPOINT_PATH]; /* of the safetensors file */
    safetensors file;
    model_naming naming;
    cJSON *config; /* config.json, or NULL */
    char config_path[CHECKPOINT_PATH];
    int hugging_face;      /* config.json is Hugging Face's */
    int has_normalisation; /* the files say what its images were normalised with */
    float mean[3], std[3];
    model_transform transform;
    cJSON *label_names;   /* array of strings, or NULL */
    size_t classes;       /* of its head, 0: it has none */
    size_t rows, columns; /* of patches that it has positions for, 0: not known yet */
    int may_replace_head; /* the caller's to set: a head that is missing or of another size gets replaced */
    /* decided by the check against a model */
    model_part *parts; /* [part_count] all tensors that are read */
    size_t part_count;
    int replaces_head;
    size_t to_rows, to_columns; /* the grid to which positions are resampled, 0: they are not */
    char notes[1024];           /* what is done to fit the model, "" if nothing is */
} model_source;

static inline void model_source_close(model_source *s) {
    safetensors_close(&s->file);
    cJSON_Delete(s->config);
    cJSON_Delete(s->label_names);
    free(s->parts);
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

static inline int source__exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
}

/* Is this what torch.save writes: a zip file around a pickle, or (before 2020) a pickle? */
static inline int source__is_pickle(const char *path) {
    unsigned char head[128] = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    ssize_t size = fd < 0 ? 0 : read(fd, head, sizeof head);
    if (fd >= 0) close(fd);
    if (size < 16 || head[8] == '{') return 0; /* the latter: safetensors, of a length that looks like one */
    if (head[0] == 0x80 && head[1] >= 2 && head[1] <= 5) return 1;
    size_t length = head[26] | (size_t)head[27] << 8; /* of the first file's name, at byte 30 */
    return !memcmp(head, "PK\3\4", 4) && length >= 8 && length <= sizeof head - 30 &&
           !memcmp(head + 30 + length - 8, "data.pkl", 8);
}

static inline int source__refuse_pickle(const char *path, error_text *e) {
    return error_set(
        e,
        "%s: found a pickle file, which can run any code, expected safetensors; convert it with: "
        "python3 -c \"import torch; from safetensors.torch import save_file; w = "
        "torch.load('%s', weights_only=True, map_location='cpu'); save_file({k: v.contiguous() "
        "for k, v in w.items()}, 'model.safetensors', {'format': 'pt'})\"",
        path, path);
}

/* One number for each channel, or one for all, above `low`. */
static inline int source__triple(const char *path, const cJSON *array, const char *name, double low,
                                 float out[3], error_text *e) {
    int n = cJSON_GetArraySize(array), fine = cJSON_IsArray(array) && (n == 1 || n == 3);
    for (int i = 0; i < 3 && fine; i++) {
        const cJSON *item = cJSON_GetArrayItem(array, n == 1 ? 0 : i);
        out[i] = cJSON_IsNumber(item) ? (float)item->valuedouble : NAN;
        fine = isfinite(out[i]) && (double)out[i] > low;
    }
    if (fine) return 0;
    return error_set(e, "%s: %s: found %s, expected one number or three above %g", path, name,
                     cJSON_IsArray(array) ? "another array" : json_kind(array), low);
}

static inline int source__normalisation(model_source *s, const char *path, const cJSON *mean,
                                        const char *mean_name, const cJSON *std, const char *std_name,
                                        error_text *e) {
    s->has_normalisation = mean && std;
    if (!s->has_normalisation) return 0;
    return source__triple(path, mean, mean_name, -INFINITY, s->mean, e) ||
                   source__triple(path, std, std_name, 0, s->std, e)
               ? -1
               : 0;
}

/* A whole number >= 1 from JSON into *value; a missing one changes nothing. */
static inline int source__size(const char *path, const cJSON *item, const char *name, size_t *value,
                               error_text *e) {
    if (!item) return 0;
    if (!cJSON_IsNumber(item) || item->valuedouble < 1 || item->valuedouble > 1e9 ||
        floor(item->valuedouble) != item->valuedouble)
        return error_set(e, "%s: %s: found %s, expected a whole number from 1 up", path, name,
                         cJSON_IsNumber(item) ? "another number" : json_kind(item));
    *value = (size_t)item->valuedouble;
    return 0;
}

/* One number for both sides, or [height, width]. */
static inline int source__extent(const char *path, const cJSON *item, const char *name, size_t *height,
                                 size_t *width, error_text *e) {
    const cJSON *h = item, *w = item;
    if (cJSON_IsArray(item)) {
        if (cJSON_GetArraySize(item) != 2)
            return error_set(e, "%s: %s: found %d numbers, expected 2", path, name, cJSON_GetArraySize(item));
        h = item->child, w = item->child->next;
    }
    return source__size(path, h, name, height, e) || source__size(path, w, name, width, e) ? -1 : 0;
}

/* An item that must be one of some strings, the first where there is none: its index; -1 with a message. */
static inline int source__choice(const char *path, const cJSON *item, const char *name,
                                 const char *const choices[], size_t count, error_text *e) {
    char expected[128] = "";
    for (size_t i = 0; i < count; i++) {
        if (!item || (cJSON_IsString(item) && !strcmp(item->valuestring, choices[i]))) return (int)i;
        size_t used = strlen(expected);
        snprintf(expected + used, sizeof expected - used, i ? " or %s" : "%s", choices[i]);
    }
    return error_set(e, "%s: %s: found %s, expected %s", path, name,
                     cJSON_IsString(item) ? quote(item->valuestring, SIZE_MAX).text : json_kind(item),
                     expected);
}

/* pretrained_cfg of timm's config.json; its older files have everything on top. */
static inline int source__open_timm(model_source *s, error_text *e) {
    static const char *const interpolations[] = {"bicubic", "bilinear"}, *const modes[] = {"center",
                                                                                           "squash"};
    const cJSON *cfg = cJSON_GetObjectItemCaseSensitive(s->config, "pretrained_cfg");
    if (!cfg) cfg = s->config;
#define ITEM(name) cJSON_GetObjectItemCaseSensitive(cfg, name)
    if (source__normalisation(s, s->config_path, ITEM("mean"), "mean", ITEM("std"), "std", e)) return -1;
    const cJSON *crop = ITEM("crop_pct"), *names = ITEM("label_names");
    if (crop && !(cJSON_IsNumber(crop) && crop->valuedouble > 0 && crop->valuedouble <= 1))
        return error_set(e, "%s: crop_pct: found %s, expected a number in (0, 1]", s->config_path,
                         cJSON_IsNumber(crop) ? "another number" : json_kind(crop));
    if (crop) s->transform.crop_pct = crop->valuedouble;
    int bilinear =
        source__choice(s->config_path, ITEM("interpolation"), "interpolation", interpolations, 2, e);
    int squash = source__choice(s->config_path, ITEM("crop_mode"), "crop_mode", modes, 2, e);
    if (bilinear < 0 || squash < 0) return -1;
    s->transform.bilinear = bilinear;
    s->transform.squash = squash;
    const cJSON *above = cJSON_GetObjectItemCaseSensitive(s->config, "label_names"); /* wins, as in timm */
    if (above) names = above;
    if (cJSON_IsArray(names)) s->label_names = cJSON_Duplicate(names, 1);
#undef ITEM
    return 0;
}

/* id2label of Hugging Face's config.json, {"0": "tench", "1": ...}, as an array. */
static inline int source__open_labels(model_source *s, error_text *e) {
    const cJSON *labels = cJSON_GetObjectItemCaseSensitive(s->config, "id2label");
    if (!labels || cJSON_IsNull(labels)) return 0;
    int count = cJSON_GetArraySize(labels);
    if (!cJSON_IsObject(labels))
        return error_set(e, "%s: id2label: found %s, expected an object", s->config_path, json_kind(labels));
    s->label_names = cJSON_CreateArray();
    for (int i = 0; i < count; i++) {
        char key[16];
        snprintf(key, sizeof key, "%d", i);
        const cJSON *name = cJSON_GetObjectItemCaseSensitive(labels, key);
        if (!cJSON_IsString(name))
            return error_set(e, "%s: id2label: found %s for \"%d\", expected a string for 0 to %d",
                             s->config_path, json_kind(name), i, count - 1);
        cJSON_AddItemToArray(s->label_names, cJSON_CreateString(name->valuestring));
    }
    return 0;
}

/* The crop_pct with the fewest digits by which timm resizes to `edge` before it cuts out `size` pixels. */
static inline double source__crop_pct(size_t size, size_t edge) {
    double unit = 10;
    while (unit < 1e9) {
        double pct = round((double)size / (double)edge * unit) / unit;
        if (pct > 0 && pct <= 1 && (size_t)floor((double)size / pct) == edge) return pct;
        unit *= 10;
    }
    return (double)size / (double)edge;
}

/* preprocessor_config.json, which lies beside Hugging Face's config.json. */
static inline int source__open_preprocessor(model_source *s, const char *path, const cJSON *root,
                                            error_text *e) {
#define ITEM(name) cJSON_GetObjectItemCaseSensitive(root, name)
    const cJSON *resample = ITEM("resample"), *size = ITEM("size"), *crop = ITEM("crop_size");
    if (cJSON_IsFalse(ITEM("do_rescale")))
        return error_set(e, "%s: do_rescale: found false, expected pixels to be scaled to 0..1", path);
    if (cJSON_IsFalse(ITEM("do_normalize"))) {
        s->has_normalisation = 1;
        for (int i = 0; i < 3; i++) s->mean[i] = 0, s->std[i] = 1;
    } else if (source__normalisation(s, path, ITEM("image_mean"), "image_mean", ITEM("image_std"),
                                     "image_std", e)) {
        return -1;
    }
    if (resample && !(cJSON_IsNumber(resample) && (resample->valueint == 2 || resample->valueint == 3)))
        return error_set(e, "%s: resample: found %s, expected 2 (bilinear) or 3 (bicubic)", path,
                         cJSON_IsNumber(resample) ? "another number" : json_kind(resample));
    if (resample) s->transform.bilinear = resample->valueint == 2;
    size_t edge = 0, cut = 0;
    const cJSON *shortest =
        cJSON_IsObject(size) ? cJSON_GetObjectItemCaseSensitive(size, "shortest_edge") : NULL;
    const cJSON *height = cJSON_IsObject(crop) ? cJSON_GetObjectItemCaseSensitive(crop, "height") : crop;
    if (!cJSON_IsTrue(ITEM("do_center_crop")) || !shortest) return 0;
    if (source__size(path, shortest, "size", &edge, e) || source__size(path, height, "crop_size", &cut, e))
        return -1;
    if (!cut || cut > edge)
        return error_set(e, "%s: crop_size: found %zu, expected 1 to %zu (size)", path, cut, edge);
    s->transform.squash = 0;
    s->transform.crop_pct = source__crop_pct(cut, edge);
#undef ITEM
    return 0;
}

static inline cJSON *source__read_json(const char *path, error_text *e) {
    char *text;
    size_t length;
    if (file_read_whole(path, 16 << 20, &text, &length, e)) return NULL;
    cJSON *root = json_parse(text, length, JSON_ANY_NUMBERS, path, e);
    free(text);
    return root;
}

/* What stands beside the weights: config.json of either kind. */
static inline int source__open_config(model_source *s, const char *folder, error_text *e) {
    char path[CHECKPOINT_PATH];
    if (checkpoint__join(s->config_path, folder, "config.json", e)) return -1;
    if (!source__exists(s->config_path)) return 0; /* as good as a bare file */
    if (!(s->config = source__read_json(s->config_path, e))) return -1;
    s->hugging_face =
        !cJSON_HasObjectItem(s->config, "architecture") &&
        (cJSON_HasObjectItem(s->config, "model_type") || cJSON_HasObjectItem(s->config, "hidden_size"));
    if (!s->hugging_face) return source__open_timm(s, e);
    s->transform = (model_transform){1, 1, 1}; /* ViTImageProcessor's, if nothing else is said */
    if (source__open_labels(s, e) || checkpoint__join(path, folder, "preprocessor_config.json", e)) return -1;
    if (!source__exists(path)) return 0;
    cJSON *root = source__read_json(path, e);
    int failed = !root || source__open_preprocessor(s, path, root, e);
    cJSON_Delete(root);
    return failed ? -1 : 0;
}

/* The file, and where there is one the folder, that a path stands for. */
static inline int source__resolve(model_source *s, const char *path, char folder[CHECKPOINT_PATH],
                                  error_text *e) {
    struct stat st;
    *folder = 0;
    if (stat(path, &st)) return error_set(e, "%s: cannot be read: %s", path, strerror(errno));
    if (!S_ISDIR(st.st_mode)) {
        snprintf(s->path, sizeof s->path, "%s", path);
        return 0;
    }
    snprintf(folder, CHECKPOINT_PATH, "%s", path);
    if (checkpoint__join(s->path, folder, "model.safetensors", e)) return -1;
    if (source__exists(s->path)) return 0;
    if (checkpoint__join(s->path, folder, "pytorch_model.bin", e)) return -1;
    if (source__exists(s->path)) return source__refuse_pickle(s->path, e);
    if (checkpoint__follow(folder, path, "best", e) && checkpoint__follow(folder, path, "latest", e))
        return error_set(
            e,
            "%s: found neither model.safetensors nor checkpoints/latest, expected a model folder "
            "or an output directory",
            path);
    return checkpoint__join(s->path, folder, "model.safetensors", e);
}

/* Opens the model that a path stands for: a safetensors file, a folder with one, or an output directory (its
 * best checkpoint, else its latest), and checks the structure of the files. */
static inline int model_source_open(model_source *s, const char *path, error_text *e) {
    char folder[CHECKPOINT_PATH];
    *s = (model_source){.transform = {.crop_pct = 0.9}};
    if (source__resolve(s, path, folder, e)) return -1;
    if (source__is_pickle(s->path)) return source__refuse_pickle(s->path, e);
    if (safetensors_open(s->path, &s->file, e)) return -1;
    s->naming = model_naming_of(&s->file);
    const st_tensor *head = model_name_find(&s->file, s->naming, "head.weight");
    s->classes = head && head->rank == 2 ? head->shape[0] : 0;
    if (!*folder || !source__open_config(s, folder, e)) return 0;
    model_source_close(s);
    return -1;
}

/* ----------------------------------------------------------------------------------------- configurations */

/* What the shapes of the tensors say; 0: nothing. */
typedef struct source_shapes {
    size_t embed_dim, channels, patch_size, hidden, positions, depth;
} source_shapes;

static inline size_t source__dimension(const model_source *s, const char *name, size_t rank, size_t i) {
    const st_tensor *t = model_name_find(&s->file, s->naming, name);
    return t && t->rank == rank ? t->shape[i] : 0;
}

static inline source_shapes source__shapes(const model_source *s) {
    source_shapes x = {.embed_dim = source__dimension(s, "patch_embed.proj.weight", 4, 0),
                       .channels = source__dimension(s, "patch_embed.proj.weight", 4, 1),
                       .patch_size = source__dimension(s, "patch_embed.proj.weight", 4, 2),
                       .hidden = source__dimension(s, "blocks.0.mlp.fc1.weight", 2, 0),
                       .positions = source__dimension(s, "pos_embed", 3, 1)};
    for (size_t i = 0; i < s->file.count; i++) { /* the largest number of a block */
        const char *name = s->file.tensors[i].name;
        size_t prefix = strlen(s->naming.prefix), block = 0;
        if (strncmp(name, s->naming.prefix, prefix)) continue;
        for (size_t k = 0; k < MODEL_NAMES; k++) {
            char number[16] = "";
            if (model_name__behind(model_names[k][s->naming.spelling], name + prefix, number) && *number)
                block = strtoul(number, NULL, 10) + 1;
        }
        if (block > x.depth) x.depth = block;
    }
    return x;
}

/* The ratio of which the model makes this hidden size: (size_t)(embed_dim * ratio). */
static inline double source__mlp_ratio(size_t embed_dim, size_t hidden) {
    double ratio = (double)hidden / (double)embed_dim;
    return (double)embed_dim * ratio < (double)hidden ? nextafter(ratio, INFINITY) : ratio;
}

/* A bare file: everything but the number of heads, and a square image's side. */
static inline int source__config_of_shapes(const model_source *s, vit_config *c, error_text *e) {
    source_shapes x = source__shapes(s);
    if (!x.embed_dim || !x.hidden || !x.positions)
        return error_set(
            e,
            "%s: found no Vision Transformer in the names of timm (patch_embed.proj.weight [D, C, "
            "P, P], pos_embed [1, T, D], blocks.0.mlp.fc1.weight [F, D], ...) or Hugging Face",
            s->path);
    c->embed_dim = x.embed_dim;
    c->channels = x.channels;
    c->patch_size = x.patch_size;
    c->depth = x.depth;
    c->num_classes = s->classes;
    c->mlp_ratio = source__mlp_ratio(x.embed_dim, x.hidden);
    size_t side = (size_t)sqrt((double)x.positions);
    if (side * side + 1 == x.positions) c->image_height = c->image_width = side * c->patch_size;
    return 0;
}

/* What the forms of vit_gelu are called by timm (act_layer) and by Hugging Face (hidden_act); the names that
 * follow mean the last form, too. */
static const char *const timm_gelu[] = {"gelu", "gelu_tanh"};
static const char *const hugging_face_gelu[] = {"gelu", "gelu_pytorch_tanh", "gelu_new"};

/* timm's model_args. What the model cannot do is refused, not passed over. */
static inline int source__model_args(const model_source *s, const cJSON *args, vit_config *c, error_text *e) {
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
                if (source__size(s->config_path, a, a->string, sizes[i].value, e)) return -1;
                known = 1;
            }
        if (known) continue;
        if (!strcmp(a->string, "img_size")) {
            if (source__extent(s->config_path, a, "img_size", &c->image_height, &c->image_width, e))
                return -1;
        } else if (!strcmp(a->string, "mlp_ratio") && cJSON_IsNumber(a)) {
            c->mlp_ratio = a->valuedouble;
        } else if (!strcmp(a->string, "act_layer")) {
            int form = source__choice(s->config_path, a, "act_layer", timm_gelu, 2, e);
            if (form < 0) return -1;
            c->gelu = (vit_gelu)form;
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

static inline int source__config_of_timm(const model_source *s, vit_config *config, error_text *e) {
#define ITEM(name) cJSON_GetObjectItemCaseSensitive(s->config, name)
    const cJSON *architecture = ITEM("architecture"), *pool = ITEM("global_pool"),
                *eps = ITEM("layer_norm_eps"), *classes = ITEM("num_classes");
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
    if (!s->classes && cJSON_IsNumber(classes) && classes->valuedouble == 0) /* a model without a head */
        config->num_classes = 0;
    else if (source__size(s->config_path, classes, "num_classes", &config->num_classes, e))
        return -1;
    return source__model_args(s, ITEM("model_args"), config, e);
#undef ITEM
}

/* The built-in model that has these sizes gives its name, for timm to know it by. */
static inline void source__name(vit_config *c) {
    vit_config named;
    error_text unused;
    int found = 0;
    for (size_t i = 0; vit_config_name(i); i++) {
        vit_config_named(&named, vit_config_name(i), &unused);
        int same_image = named.image_height == c->image_height && named.image_width == c->image_width;
        if (named.embed_dim != c->embed_dim || named.depth != c->depth || named.num_heads != c->num_heads ||
            named.patch_size != c->patch_size || (found && !same_image))
            continue;
        memcpy(c->name, named.name, sizeof c->name);
        found = 1;
    }
}

/* Hugging Face's ViTConfig. It must not contradict the tensors: one of both would be the wrong file. */
static inline int source__config_of_hugging_face(const model_source *s, vit_config *c, error_text *e) {
    static const char *const type[] = {"vit"};
    const char *path = s->config_path;
    source_shapes x = source__shapes(s);
    size_t hidden = 3072, patch_width = 16, labels = (size_t)cJSON_GetArraySize(s->label_names);
#define ITEM(name) cJSON_GetObjectItemCaseSensitive(s->config, name)
    const cJSON *eps = ITEM("layer_norm_eps"), *bias = ITEM("qkv_bias");
    c->embed_dim = 768, c->depth = c->num_heads = 12, c->channels = 3; /* ViTConfig's defaults */
    c->image_height = c->image_width = 224, c->patch_size = 16, c->layer_norm_eps = 1e-12;
    int form;
    if (source__choice(path, ITEM("model_type"), "model_type", type, 1, e) < 0 ||
        (form = source__choice(path, ITEM("hidden_act"), "hidden_act", hugging_face_gelu, 3, e)) < 0 ||
        source__size(path, ITEM("hidden_size"), "hidden_size", &c->embed_dim, e) ||
        source__size(path, ITEM("num_hidden_layers"), "num_hidden_layers", &c->depth, e) ||
        source__size(path, ITEM("num_attention_heads"), "num_attention_heads", &c->num_heads, e) ||
        source__size(path, ITEM("intermediate_size"), "intermediate_size", &hidden, e) ||
        source__size(path, ITEM("num_channels"), "num_channels", &c->channels, e) ||
        source__extent(path, ITEM("patch_size"), "patch_size", &c->patch_size, &patch_width, e) ||
        source__extent(path, ITEM("image_size"), "image_size", &c->image_height, &c->image_width, e))
        return -1;
    c->gelu = form ? VIT_GELU_TANH : VIT_GELU_ERF;
    if (ITEM("patch_size") && patch_width != c->patch_size)
        return error_set(e, "%s: patch_size: found %zu x %zu, expected square patches", path, c->patch_size,
                         patch_width);
    if (bias && !cJSON_IsTrue(bias))
        return error_set(e, "%s: qkv_bias: found %s, expected true", path,
                         cJSON_IsFalse(bias) ? "false" : json_kind(bias));
    if (eps && !cJSON_IsNumber(eps))
        return error_set(e, "%s: layer_norm_eps: found %s, expected a number", path, json_kind(eps));
    if (eps) c->layer_norm_eps = eps->valuedouble;
#undef ITEM
    size_t positions = c->image_height / c->patch_size * (c->image_width / c->patch_size) + 1;
    const struct {
        const char *name;
        size_t found, expected; /* expected 0: the tensors do not tell */
    } claims[] = {{"hidden_size", c->embed_dim, x.embed_dim},
                  {"num_hidden_layers", c->depth, x.depth},
                  {"intermediate_size", hidden, x.hidden},
                  {"num_channels", c->channels, x.channels},
                  {"patch_size", c->patch_size, x.patch_size},
                  {"id2label", s->label_names ? labels : s->classes, s->classes}};
    for (size_t i = 0; i < sizeof claims / sizeof *claims; i++)
        if (claims[i].expected && claims[i].found != claims[i].expected)
            return error_set(e, "%s: %s: found %zu, expected %zu by the tensors of %s", path, claims[i].name,
                             claims[i].found, claims[i].expected, s->path);
    if (x.positions && positions != x.positions)
        return error_set(e,
                         "%s: image_size: found %zux%zu (%zu positions), expected %zu by the tensors of %s",
                         path, c->image_height, c->image_width, positions, x.positions, s->path);
    c->mlp_ratio = source__mlp_ratio(c->embed_dim, hidden);
    c->num_classes = s->classes;
    source__name(c);
    return 0;
}

/* The configuration of the model. On entry *config is what is assumed where nothing tells (heads, image size,
 * eps); a field that stays 0 was told by nobody, or in the case of num_classes: there is no head. */
static inline int model_source_config(model_source *s, vit_config *config, error_text *e) {
    if (!s->config        ? source__config_of_shapes(s, config, e)
        : s->hugging_face ? source__config_of_hugging_face(s, config, e)
                          : source__config_of_timm(s, config, e))
        return -1;
    if (!s->classes && !s->may_replace_head) {
        char name[3][MODEL_NAME];
        model_name_parts(s->naming, "head.weight", name);
        return error_set(e,
                         "%s: found no tensor %s, expected a model with a head (without, it can only be "
                         "--pretrained)",
                         s->path, name[0]);
    }
    if (!config->patch_size || !config->image_height) return 0;
    s->rows = config->image_height / config->patch_size;
    s->columns = config->image_width / config->patch_size;
    return 0;
}

/* ----------------------------------------------------------------------------------------------- checking */

/* Names for a message: the first of them, and how many more there are. */
typedef struct source_list {
    size_t count;
    char text[600], more[32];
} source_list;

static inline void source__list(source_list *l, const char *name) {
    enum { SHOWN = 6 };
    size_t used = strlen(l->text);
    if (l->count++ < SHOWN)
        snprintf(l->text + used, sizeof l->text - used, used ? ", %s" : "%s", quote(name, SIZE_MAX).text);
    else
        snprintf(l->more, sizeof l->more, " and %zu more", l->count - SHOWN);
}

__attribute__((format(printf, 2, 3))) static inline void source__note(model_source *s, const char *format,
                                                                      ...) {
    size_t used = strlen(s->notes);
    va_list arguments;
    if (used) used += (size_t)snprintf(s->notes + used, sizeof s->notes - used, "; ");
    if (used >= sizeof s->notes) return;
    va_start(arguments, format);
    vsnprintf(s->notes + used, sizeof s->notes - used, format, arguments);
    va_end(arguments);
}

static inline void source__shape_text(char *text, size_t size, size_t rank, const size_t *shape) {
    size_t used = (size_t)snprintf(text, size, "[");
    for (size_t i = 0; i < rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, i ? ", %zu" : "%zu", shape[i]);
    if (used < size) snprintf(text + used, size - used, "]");
}

static inline const vit_tensor *source__tensor(const vit_model *m, const model_part *p) {
    return &m->unit[p->unit].tensor[p->tensor];
}

static inline int source__is_head(const vit_model *m, const model_part *p) {
    return !strncmp(source__tensor(m, p)->name, "head.", 5);
}

static inline int source__is_positions(const vit_model *m, const model_part *p) {
    return !strcmp(source__tensor(m, p)->name, "pos_embed");
}

/* Has a tensor of the file the shape of its part? Positions: that of the file's own grid. */
static inline int source__check_shape(const model_source *s, const vit_model *m, const model_part *p,
                                      const st_tensor *t, error_text *e) {
    size_t shape[4];
    char has[128], wants[128];
    memcpy(shape, p->shape, sizeof shape);
    if (source__is_positions(m, p)) shape[1] = s->rows * s->columns + 1;
    source__shape_text(has, sizeof has, t->rank, t->shape);
    source__shape_text(wants, sizeof wants, p->dims, shape);
    if (!strcmp(has, wants)) return 0;
    return error_set(e, "%s: tensor %s: found shape %s, expected %s", s->path, p->name, has, wants);
}

/* Is a tensor that the model does not have one of those that are left aside? */
static inline int source__is_ignored(const model_source *s, const char *name) {
    size_t prefix = strlen(s->naming.prefix);
    if (s->naming.spelling == SPELLING_TIMM || strncmp(name, s->naming.prefix, prefix)) return 0;
    for (size_t i = 0; i < sizeof model_names_ignored / sizeof *model_names_ignored; i++)
        if (!strcmp(name + prefix, model_names_ignored[i])) return 1;
    return 0;
}

/* Goes through the tensors of the file: which does the model not have? */
static inline int source__check_names(model_source *s, const source_list *missing, const char *seen,
                                      source_list *ignored, error_text *e) {
    source_list unknown = {0};
    for (size_t i = 0; i < s->file.count; i++)
        if (!seen[i])
            source__list(source__is_ignored(s, s->file.tensors[i].name) ? ignored : &unknown,
                         s->file.tensors[i].name);
    if (missing->count && unknown.count)
        return error_set(e,
                         "%s: found no tensor %s%s, which the model has, and tensor %s%s, which it has not",
                         s->path, missing->text, missing->more, unknown.text, unknown.more);
    if (missing->count)
        return error_set(e, "%s: found no tensor %s%s, which the model has", s->path, missing->text,
                         missing->more);
    if (unknown.count)
        return error_set(e, "%s: found tensor %s%s, which the model does not have", s->path, unknown.text,
                         unknown.more);
    return 0;
}

/* Puts into words what loading will do beside reading. */
static inline void source__write_notes(model_source *s, const vit_model *m, const source_list *ignored) {
    static const char *const dropouts[] = {"hidden_dropout_prob", "attention_probs_dropout_prob"};
    *s->notes = 0;
    if (s->naming.spelling != SPELLING_TIMM) source__note(s, "Hugging Face names");
    for (size_t i = 0; i < s->file.count; i++)
        if (s->file.tensors[i].dtype != ST_F32) {
            source__note(s, "weights in %s", st_dtypes[s->file.tensors[i].dtype].name);
            break;
        }
    if (s->replaces_head && s->classes)
        source__note(s, "new head of %zu classes (file: %zu)", m->V, s->classes);
    else if (s->replaces_head)
        source__note(s, "new head of %zu classes (file: none)", m->V);
    if (s->to_rows)
        source__note(s, "positions resampled from %zux%zu to %zux%zu", s->rows, s->columns, s->to_rows,
                     s->to_columns);
    for (size_t i = 0; i < 2 && s->hugging_face; i++) {
        const cJSON *rate = cJSON_GetObjectItemCaseSensitive(s->config, dropouts[i]);
        if (cJSON_IsNumber(rate) && rate->valuedouble != 0)
            source__note(s, "ignored %s %g", dropouts[i], rate->valuedouble);
    }
    if (ignored->count) source__note(s, "ignored %s%s", ignored->text, ignored->more);
}

/* Does the file have exactly this model's tensors, but for what can be adapted? Names what differs, and
 * decides what loading will do. */
static inline int model_source_check(model_source *s, const vit_model *m, error_text *e) {
    size_t rows = m->config.image_height / m->P, columns = m->config.image_width / m->P;
    source_list missing = {0}, ignored = {0};
    free(s->parts);
    if (model_parts(m, s->naming, &s->parts, &s->part_count, e)) return -1;
    char *seen = calloc(s->file.count + 1, sizeof *seen);
    if (!seen) return error_set(e, "%s: out of memory for %zu tensors", s->path, s->file.count);
    if (!s->rows) s->rows = rows, s->columns = columns; /* a bare file's positions are those of the image */
    int resamples = s->rows != rows || s->columns != columns, failed = 0;
    s->to_rows = resamples ? rows : 0;
    s->to_columns = resamples ? columns : 0;
    s->replaces_head = s->may_replace_head && s->classes != m->V;
    for (size_t i = 0; i < s->part_count && !failed; i++) {
        const model_part *p = &s->parts[i];
        const st_tensor *t = safetensors_find(&s->file, p->name);
        int replaced = s->replaces_head && source__is_head(m, p);
        if (t && (!replaced || s->classes)) seen[t - s->file.tensors] = 1;
        if (!t && !replaced) source__list(&missing, p->name);
        if (t && !replaced) failed = source__check_shape(s, m, p, t, e);
    }
    failed = failed || source__check_names(s, &missing, seen, &ignored, e);
    if (!failed) source__write_notes(s, m, &ignored);
    free(seen);
    return failed ? -1 : 0;
}

/* ------------------------------------------------------------------------------------------------ loading */

/* to[w->out][size] = the weighted sums of from[in][size]. */
static inline void source__resample_rows(const resize_weights *w, const double *from, size_t size,
                                         double *to) {
    for (size_t i = 0; i < w->out; i++)
        for (size_t k = 0; k < w->count[i]; k++)
            for (size_t d = 0; d < size; d++)
                to[i * size + d] += w->weight[i * w->most + k] * from[(w->first[i] + k) * size + d];
}

/* The positions [1, rows * columns + 1, D] of the file on another grid, as timm's resample_abs_pos_embed:
 * that of the class token stays, the others are resized like an image of D channels, bicubic and antialiased.
 * */
static inline int source__resample(const model_source *s, const st_tensor *t, size_t D, float *out,
                                   error_text *e) {
    size_t columns = s->to_columns, row = columns * D, count = s->to_rows * row;
    resize_weights across = {0}, down = {0};
    float *in = malloc(t->count * sizeof *in);
    double *grid = malloc(t->count * sizeof *grid);
    double *middle = calloc(s->rows * row, sizeof *middle), *result = calloc(count, sizeof *result);
    int failed = -1;
    if (!in || !grid || !middle || !result)
        error_set(e, "%s: tensor %s: out of memory for its resampling", s->path, t->name);
    else
        failed = resize_weights_init(&across, s->columns, columns, RESIZE_BICUBIC, e) ||
                 resize_weights_init(&down, s->rows, s->to_rows, RESIZE_BICUBIC, e) ||
                 safetensors_read_f32(&s->file, t, 0, t->count, in, e);
    if (!failed) {
        for (size_t i = D; i < t->count; i++) grid[i - D] = (double)in[i];
        for (size_t r = 0; r < s->rows; r++)
            source__resample_rows(&across, grid + r * s->columns * D, D, middle + r * row);
        source__resample_rows(&down, middle, row, result);
        memcpy(out, in, D * sizeof *out);
        for (size_t i = 0; i < count; i++) out[D + i] = (float)result[i];
    }
    resize_weights_free(&across);
    resize_weights_free(&down);
    void *buffers[] = {in, grid, middle, result};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    return failed ? -1 : 0;
}

/* The weights of one unit, whole [unit->count], of a checked file; those of a new head are drawn by the seed.
 * Weights that are not finite are an error. */
static inline int model_source_unit(const model_source *s, const vit_model *m, size_t u, uint64_t seed,
                                    float *values, error_text *e) {
    memset(values, 0, m->unit[u].count * sizeof *values);
    if (s->replaces_head && u + 1 == m->units) vit_unit_initialise(&m->unit[u], seed, values);
    for (size_t i = 0; i < s->part_count; i++) {
        const model_part *p = &s->parts[i];
        if (p->unit != u || (s->replaces_head && source__is_head(m, p))) continue;
        const st_tensor *t = safetensors_find(&s->file, p->name);
        float *x = values + p->offset;
        if (s->to_rows && source__is_positions(m, p) ? source__resample(s, t, m->D, x, e)
                                                     : safetensors_read_f32(&s->file, t, 0, p->count, x, e))
            return -1;
        for (size_t k = 0; k < p->count; k++)
            if (!isfinite(x[k]))
                return error_set(e, "%s: tensor %s: found %g at element %zu, expected finite weights",
                                 s->path, p->name, (double)x[k], k);
    }
    return 0;
}

/* Loads this rank's part of the weights of a checked file. */
static inline int model_source_load(const model_source *s, dist *d, uint64_t seed, error_text *e) {
    for (size_t u = 0; u < d->model->units; u++) {
        size_t count = d->model->unit[u].count;
        float *values = malloc(count * sizeof *values);
        if (!values) return error_set(e, "out of memory for %zu weights", count);
        int failed = model_source_unit(s, d->model, u, seed, values, e);
        if (!failed) dist_import(d, u, values);
        free(values);
        if (failed) return -1;
    }
    return 0;
}

#endif
