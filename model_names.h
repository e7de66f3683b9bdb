/* model_names.h - how timm and Hugging Face name the tensors of a Vision Transformer in a file.
 *
 *     model_naming n = model_naming_of(&file);                       // by what is in it
 *     const st_tensor *t = model_name_find(&file, n, "norm.weight"); // by timm's name, which is the model's
 *     model_part *parts;
 *     size_t count;
 *     if (model_parts(&model, n, &parts, &count, &e)) ...            // all that a file with this model has
 *
 * One table has all names; reading (pretrained.h) and writing (checkpoint.h) go through it. transformers 5.x
 * renamed the tensors of 4.x in memory, but reads and writes files in the names of 4.x; files in those of 5.x
 * come from programs that save a state_dict themselves. Both occur with the prefix "vit." and, where a
 * backbone alone was saved, without.
 */
#ifndef MODEL_NAMES_H
#define MODEL_NAMES_H

#include "io/safetensors.h"
#include "vit.h"

enum { MODEL_NAME = 128 };

typedef enum { SPELLING_TIMM, SPELLING_HF4, SPELLING_HF5, SPELLINGS } model_spelling;

typedef struct model_naming {
    model_spelling spelling;
    const char *prefix; /* of every name but the head's */
} model_naming;

/* How each part of the model is spelled; # is the number of a block, and "weight" or "bias" follows a point.
 * Three rows for one of timm: it stores q, k and v as one tensor, one below the other in this order. */
static const char *const model_names[][SPELLINGS] = {
    /* timm, transformers 4.x, transformers 5.x */
    {"cls_token", "embeddings.cls_token", "embeddings.cls_token"},
    {"pos_embed", "embeddings.position_embeddings", "embeddings.position_embeddings"},
    {"patch_embed.proj.", "embeddings.patch_embeddings.projection.",
     "embeddings.patch_embeddings.projection."},
    {"blocks.#.norm1.", "encoder.layer.#.layernorm_before.", "layers.#.layernorm_before."},
    {"blocks.#.attn.qkv.", "encoder.layer.#.attention.attention.query.", "layers.#.attention.q_proj."},
    {"blocks.#.attn.qkv.", "encoder.layer.#.attention.attention.key.", "layers.#.attention.k_proj."},
    {"blocks.#.attn.qkv.", "encoder.layer.#.attention.attention.value.", "layers.#.attention.v_proj."},
    {"blocks.#.attn.proj.", "encoder.layer.#.attention.output.dense.", "layers.#.attention.o_proj."},
    {"blocks.#.norm2.", "encoder.layer.#.layernorm_after.", "layers.#.layernorm_after."},
    {"blocks.#.mlp.fc1.", "encoder.layer.#.intermediate.dense.", "layers.#.mlp.fc1."},
    {"blocks.#.mlp.fc2.", "encoder.layer.#.output.dense.", "layers.#.mlp.fc2."},
    {"norm.", "layernorm.", "layernorm."},
    {"head.", "classifier.", "classifier."},
};
enum { MODEL_NAMES = sizeof model_names / sizeof *model_names };

/* What Hugging Face's files hold beside the model that classifies: of no use here, so it is left aside. */
static const char *const model_names_ignored[] = {"pooler.dense.weight", "pooler.dense.bias",
                                                  "embeddings.mask_token", "embeddings.position_ids"};

/* What follows in `name` behind the pattern, or NULL where they differ; the number of the block as text. */
static inline const char *model_name__behind(const char *pattern, const char *name, char block[16]) {
    for (; *pattern; pattern++) {
        size_t digits = strspn(name, "0123456789");
        if (*pattern == '#' ? digits == 0 || digits > 15 : *pattern != *name) return NULL;
        if (*pattern == '#') snprintf(block, 16, "%.*s", (int)digits, name);
        name += *pattern == '#' ? digits : 1;
    }
    return name;
}

/* The names in a file of one of the model's tensors, which has timm's name: one, or three that hold a third
 * of it each. */
static inline size_t model_name_parts(model_naming n, const char *name, char parts[3][MODEL_NAME]) {
    size_t count = 0;
    for (size_t i = 0; i < MODEL_NAMES && (n.spelling != SPELLING_TIMM || count == 0); i++) {
        char block[16] = "";
        const char *rest = model_name__behind(model_names[i][SPELLING_TIMM], name, block);
        const char *pattern = model_names[i][n.spelling], *number = strchr(pattern, '#');
        if (!rest) continue;
        snprintf(parts[count++], MODEL_NAME, "%s%.*s%s%s%s", strncmp(name, "head.", 5) ? n.prefix : "",
                 (int)(number ? number - pattern : (ptrdiff_t)strlen(pattern)), pattern, block,
                 number ? number + 1 : "", rest);
    }
    return count;
}

/* The tensor of a file that has timm's name (its first part), or NULL. */
static inline const st_tensor *model_name_find(const safetensors *f, model_naming n, const char *name) {
    char parts[3][MODEL_NAME];
    return model_name_parts(n, name, parts) ? safetensors_find(f, parts[0]) : NULL;
}

/* The naming of a file: the one of which it has most names in its first block and outside of the blocks. */
static inline model_naming model_naming_of(const safetensors *f) {
    static const model_naming all[] = {{SPELLING_TIMM, ""},
                                       {SPELLING_HF4, "vit."},
                                       {SPELLING_HF5, "vit."},
                                       {SPELLING_HF4, ""},
                                       {SPELLING_HF5, ""}};
    size_t best = 0, most = 0;
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) {
        size_t found = 0;
        for (size_t i = 0; i < MODEL_NAMES; i++) {
            char name[64], *number;
            snprintf(name, sizeof name, "%s", model_names[i][SPELLING_TIMM]);
            if ((number = strchr(name, '#'))) *number = '0';
            if (name[strlen(name) - 1] == '.') strcat(name, "weight");
            found += model_name_find(f, all[k], name) != NULL;
        }
        if (found > most) most = found, best = k;
    }
    return all[best];
}

/* One tensor of a file, and where its elements lie in the flat run of its unit. */
typedef struct model_part {
    char name[MODEL_NAME];
    size_t dims, shape[4], count;
    size_t unit, tensor, offset; /* index of the unit, of its tensor; of the first element in the unit */
} model_part;

/* All tensors that a file with this model has, unit by unit; the caller frees *parts. */
static inline int model_parts(const vit_model *m, model_naming n, model_part **parts, size_t *count,
                              error_text *e) {
    size_t most = 0;
    for (size_t u = 0; u < m->units; u++) most += 3 * m->unit[u].tensors;
    *count = 0;
    *parts = calloc(most, sizeof **parts);
    if (!*parts) return error_set(e, "out of memory for the names of %zu tensors", most);
    for (size_t u = 0; u < m->units; u++)
        for (size_t k = 0; k < m->unit[u].tensors; k++) {
            const vit_tensor *t = &m->unit[u].tensor[k];
            char names[3][MODEL_NAME];
            size_t thirds = model_name_parts(n, t->name, names);
            for (size_t i = 0; i < thirds; i++) {
                model_part *p = &(*parts)[(*count)++];
                memcpy(p->name, names[i], MODEL_NAME);
                memcpy(p->shape, t->shape, sizeof p->shape);
                p->shape[0] /= thirds;
                p->dims = t->dims;
                p->count = t->count / thirds;
                p->unit = u;
                p->tensor = k;
                p->offset = t->offset + i * p->count;
            }
        }
    return 0;
}

#endif
