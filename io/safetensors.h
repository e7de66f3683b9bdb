/* safetensors.h - named tensors in one file: 8 bytes N (little-endian), N bytes of JSON, then the data.
 * Format: https://github.com/huggingface/safetensors
 *
 * Reading. The file is mapped; the header is checked whole before the first tensor is handed out:
 *
 *     safetensors f;
 *     if (safetensors_open("model.safetensors", &f, &e)) ...
 *     const st_tensor *t = safetensors_find(&f, "blocks.0.mlp.fc1.weight");        // NULL: there is none
 *     if (safetensors_read_f32(&f, t, 0, t->count, values, &e)) ...
 *     safetensors_close(&f);
 *
 * Writing. First the layout of the whole file, then any range of elements by whoever has it, in any order and
 * from several processes at once (each with a descriptor of its own):
 *
 *     st_tensor t[] = {{.name = "norm.weight", .dtype = ST_F32, .rank = 1, .shape = (size_t[]){64}}, ...};
 *     st_plan plan;
 *     int fd;
 *     if (safetensors_plan(path, t, 2, pairs, 1, &plan, &e) || safetensors_create(path, &plan, &fd, &e)) ...
 *     safetensors_write(fd, path, &t[0], 0, 64, values, &e);
 *     file_close_synced(fd, path, &e);
 *     safetensors_plan_free(&plan);
 *
 * What the format's own reader refuses is refused, and so are duplicate keys, padding other than spaces and
 * names with a 0 in them, which it lets pass. Left out: files in several parts (*.safetensors.index.json),
 * conversion when writing, protection against somebody who shortens the file while it is mapped (SIGBUS).
 */
#ifndef IO_SAFETENSORS_H
#define IO_SAFETENSORS_H

#include <sys/mman.h>

#include "io/file.h"
#include "io/json.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors files are little-endian");

/* In the format's own order, of growing alignment: a writer puts the last type first. */
// clang-format off
typedef enum {
    ST_BOOL, ST_F4, ST_F6_E2M3, ST_F6_E3M2, ST_U8, ST_I8, ST_F8_E5M2, ST_F8_E4M3, ST_F8_E8M0, ST_F8_E4M3FNUZ,
    ST_F8_E5M2FNUZ, ST_I16, ST_U16, ST_F16, ST_BF16, ST_I32, ST_U32, ST_F32, ST_C64, ST_F64, ST_I64, ST_U64,
    ST_DTYPES
} st_dtype;
// clang-format on

static const struct {
    const char *name;
    size_t bits; /* of one element */
} st_dtypes[ST_DTYPES] = {
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
};

typedef struct {
    const char *name;
    st_dtype dtype;
    size_t rank;         /* 0: a scalar */
    const size_t *shape; /* [rank], row-major; any of them may be 0 */
    size_t count;        /* elements: the product of shape */
    size_t offset, size; /* bytes, from the beginning of the file */
} st_tensor;

typedef struct {
    st_tensor *tensors; /* [count], ordered by name (bytewise) */
    size_t count;
    const uint8_t *bytes; /* the whole file, [size] */
    size_t size;
    char *path;     /* for messages */
    cJSON *header;  /* owns the names */
    size_t *shapes; /* owns the shapes */
    bool mapped;
} safetensors;

/* Frees and unmaps; names and shapes of its tensors are gone. Fine on one that failed to open. */
static inline void safetensors_close(safetensors *f) {
    if (f->mapped) munmap((void *)f->bytes, f->size);
    cJSON_Delete(f->header);
    free(f->tensors);
    free(f->shapes);
    free(f->path);
    *f = (safetensors){0};
}

/* A whole number in [0, 2^53), the range that cJSON carries exactly. */
static inline bool st_whole(const cJSON *item, size_t *value) {
    double x = cJSON_IsNumber(item) ? item->valuedouble : -1.0;
    if (signbit(x) || x > (double)json_largest_whole) return false;
    *value = (size_t)x; /* JSON_WHOLE_NUMBERS: there is no fraction */
    return true;
}

/* error_set for what is wrong with one tensor. */
#define st_error(e, path, name, format, ...)                                                                 \
    error_set(e, "%s: tensor '%s': " format, path, quote(name, SIZE_MAX).text, __VA_ARGS__)

/* Elements and bytes of t by its shape and dtype. */
static inline int st_measure(st_tensor *t, const char *path, error_text *e) {
    const char *dtype = st_dtypes[t->dtype].name;
    size_t bits = 0;
    bool overflow = false;
    t->count = 1;
    for (size_t i = 0; i < t->rank; i++) overflow |= size_multiply(t->count, t->shape[i], &t->count) != 0;
    if (overflow || size_multiply(t->count, st_dtypes[t->dtype].bits, &bits))
        return st_error(e, path, t->name, "found a shape of 2^64 bits of %s or more", dtype);
    t->size = bits / 8;
    if (bits % 8 == 0) return 0;
    return st_error(e, path, t->name, "found %zu elements of %s, expected whole bytes", t->count, dtype);
}

/* One entry of the header. Its shape goes to *shapes, which moves on; the data begin at byte `data`. */
static inline int st_parse_tensor(const cJSON *entry, const char *path, size_t data, size_t **shapes,
                                  st_tensor *t, error_text *e) {
    const char *name = entry->string;
    if (!cJSON_IsObject(entry))
        return st_error(e, path, name, "found %s, expected an object", json_kind(entry));
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets"), *item;
    *t = (st_tensor){.name = name, .shape = *shapes};

    if (!cJSON_IsString(dtype))
        return st_error(e, path, name, "found %s as dtype, expected a string", json_kind(dtype));
    while (t->dtype < ST_DTYPES && strcmp(dtype->valuestring, st_dtypes[t->dtype].name) != 0) t->dtype++;
    if (t->dtype == ST_DTYPES)
        return st_error(e, path, name, "found dtype '%s', expected one of the format's, such as F32",
                        quote(dtype->valuestring, SIZE_MAX).text);

    if (!cJSON_IsArray(shape))
        return st_error(e, path, name, "found %s as shape, expected an array", json_kind(shape));
    cJSON_ArrayForEach(item, shape) {
        if (!st_whole(item, (*shapes)++))
            return st_error(e, path, name, "found %s in shape, expected whole numbers in [0, 2^53)",
                            cJSON_IsNumber(item) ? "another number" : json_kind(item));
        t->rank++;
    }
    if (st_measure(t, path, e)) return -1;

    size_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 || !st_whole(offsets->child, &begin) ||
        !st_whole(offsets->child->next, &end) || begin > end)
        return st_error(e, path, name, "found %s as data_offsets, expected [begin, end] in [0, 2^53)",
                        cJSON_IsArray(offsets) ? "another array" : json_kind(offsets));
    if (end - begin != t->size)
        return st_error(e, path, name, "found %zu bytes by data_offsets, expected %zu (%zu elements of %s)",
                        end - begin, t->size, t->count, st_dtypes[t->dtype].name);
    t->offset = data + begin;
    return 0;
}

static inline int st_by_offset(const void *a, const void *b) {
    const st_tensor *s = a, *t = b;
    if (s->offset != t->offset) return s->offset < t->offset ? -1 : 1;
    return (s->size > t->size) - (s->size < t->size); /* an empty one before that which begins with it */
}

static inline int st_by_name(const void *a, const void *b) {
    return strcmp(((const st_tensor *)a)->name, ((const st_tensor *)b)->name);
}

/* The entries of f->header: tensors, in its order, to f->tensors, which has room for `count` of them. */
static inline int st_parse_entries(safetensors *f, size_t count, size_t dimensions, size_t data,
                                   error_text *e) {
    f->tensors = malloc((count + 1) * sizeof *f->tensors);
    f->shapes = malloc((dimensions + 1) * sizeof *f->shapes);
    if (!f->tensors || !f->shapes) return error_set(e, "%s: out of memory for %zu tensors", f->path, count);
    size_t *shapes = f->shapes;
    const cJSON *entry, *pair;
    cJSON_ArrayForEach(entry, f->header) {
        if (strcmp(entry->string, "__metadata__") != 0) {
            if (st_parse_tensor(entry, f->path, data, &shapes, &f->tensors[f->count++], e)) return -1;
            continue;
        }
        if (!cJSON_IsObject(entry))
            return error_set(e, "%s: found %s as __metadata__, expected an object", f->path,
                             json_kind(entry));
        cJSON_ArrayForEach(pair, entry) {
            if (!cJSON_IsString(pair))
                return error_set(e, "%s: found %s as '%s' of __metadata__, expected a string", f->path,
                                 json_kind(pair), quote(pair->string, SIZE_MAX).text);
        }
    }
    return 0;
}

/* The tensors must follow each other from byte `data` to the end of the file. */
static inline int st_check_layout(safetensors *f, size_t data, error_text *e) {
    qsort(f->tensors, f->count, sizeof *f->tensors, st_by_offset);
    for (size_t i = 0; i < f->count; data += f->tensors[i++].size) {
        const st_tensor *t = &f->tensors[i];
        if (t->offset != data)
            return st_error(e, f->path, t->name, "found its data at byte %zu of the file, expected %zu (%s)",
                            t->offset, data,
                            t->offset > data ? "there is a hole" : "it overlaps another tensor");
    }
    if (data == f->size) return 0;
    size_t i = 0; /* the first tensor that the file does not hold whole */
    while (i < f->count && f->tensors[i].offset + f->tensors[i].size <= f->size) i++;
    return error_set(e, "%s: found a file of %zu bytes, expected %zu by its header%s%s%s", f->path, f->size,
                     data, i < f->count ? ": tensor '" : "",
                     i < f->count ? quote(f->tensors[i].name, SIZE_MAX).text : "",
                     i < f->count ? "' is not whole" : "");
}

static inline int st_too_short(const char *path, size_t size, error_text *e) {
    return error_set(e, "%s: found a file of %zu bytes, expected at least 8", path, size);
}

static inline int st_parse_header(safetensors *f, error_text *e) {
    if (!f->path) return error_set(e, "out of memory");
    if (f->size < 8) return st_too_short(f->path, f->size, e);
    const char *text = (const char *)f->bytes + 8;
    uint64_t length;
    memcpy(&length, f->bytes, 8);
    if (length > 100000000 || length > f->size - 8)
        return error_set(e, "%s: found a header of %llu bytes, expected at most 100000000 and %zu (file)",
                         f->path, (unsigned long long)length, f->size - 8);
    size_t used = (size_t)length, count = 0, dimensions = 0;
    while (used > 0 && text[used - 1] == ' ') used--;
    if (used < 2 || text[0] != '{' || text[used - 1] != '}')
        return error_set(e, "%s: found a header that is not {...} with nothing but spaces behind", f->path);
    f->header = json_parse(text, used, JSON_WHOLE_NUMBERS, f->path, e);
    if (!f->header) return -1;

    const cJSON *entry;
    cJSON_ArrayForEach(entry, f->header) {
        count++;
        dimensions += (size_t)cJSON_GetArraySize(cJSON_GetObjectItemCaseSensitive(entry, "shape"));
    }
    size_t data = 8 + (size_t)length;
    if (st_parse_entries(f, count, dimensions, data, e) || st_check_layout(f, data, e)) return -1;
    qsort(f->tensors, f->count, sizeof *f->tensors, st_by_name);
    return 0;
}

/* Checks the header of the file that `bytes` holds, and its size; reads no data. Fills in *f, for the caller
 * to close; the bytes must outlive it. `path` is for messages. On failure *f is empty. */
static inline int safetensors_parse(const uint8_t *bytes, size_t size, const char *path, safetensors *f,
                                    error_text *e) {
    *f = (safetensors){.bytes = bytes, .size = size, .path = strdup(path)};
    int failed = st_parse_header(f, e);
    if (failed) safetensors_close(f);
    return failed;
}

/* Maps a file and checks it as safetensors_parse does. */
static inline int safetensors_open(const char *path, safetensors *f, error_text *e) {
    *f = (safetensors){0};
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not block before fstat */
    if (fd < 0) return error_set(e, "%s: cannot be opened: %s", path, strerror(errno));
    int failed = fstat(fd, &status) ? error_set(e, "%s: cannot be read: %s", path, strerror(errno)) : 0;
    if (!failed && !S_ISREG(status.st_mode))
        failed = error_set(e, "%s: found no regular file, expected one", path);
    if (!failed && status.st_size < 8) /* an empty file cannot be mapped */
        failed = st_too_short(path, (size_t)status.st_size, e);
    void *bytes = failed ? MAP_FAILED : mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (!failed && bytes == MAP_FAILED)
        failed = error_set(e, "%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    if (failed) return -1;
    if (safetensors_parse(bytes, (size_t)status.st_size, path, f, e)) {
        munmap(bytes, (size_t)status.st_size);
        return -1;
    }
    f->mapped = true;
    return 0;
}

/* The tensor of that name, or NULL; binary search. */
static inline const st_tensor *safetensors_find(const safetensors *f, const char *name) {
    return bsearch(&(st_tensor){.name = name}, f->tensors, f->count, sizeof *f->tensors, st_by_name);
}

/* A value of __metadata__, or NULL. */
static inline const char *safetensors_metadata(const safetensors *f, const char *key) {
    const cJSON *metadata = cJSON_GetObjectItemCaseSensitive(f->header, "__metadata__");
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(metadata, key));
}

/* The values that begin at `bytes`, which may be of any alignment. */
static inline float st_read_bf16(const uint8_t *bytes) {
    uint32_t bits = (uint32_t)bytes[0] << 16 | (uint32_t)bytes[1] << 24;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* IEEE 754 binary16: sign, 5 bits of exponent (bias 15), 10 of significand. */
static inline float st_read_f16(const uint8_t *bytes) {
    uint32_t half = bytes[0] | (uint32_t)bytes[1] << 8;
    uint32_t exponent = (half >> 10) & 31, significand = half & 0x3FF;
    if (exponent == 0) return (half & 0x8000 ? -0x1p-24f : 0x1p-24f) * (float)significand;
    exponent = exponent == 31 ? 255 : exponent + 127 - 15;
    uint32_t bits = (half & 0x8000) << 16 | exponent << 23 | significand << 13;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline double st_read_f64(const uint8_t *bytes) {
    double value;
    memcpy(&value, bytes, 8);
    return value;
}

/* Elements [from, from + count) of t to out[count]. F32 bit for bit; BF16 and F16 exactly; F64 rounded to
 * nearest. Fails on other types and outside of t. */
static inline int safetensors_read_f32(const safetensors *f, const st_tensor *t, size_t from, size_t count,
                                       float *out, error_text *e) {
    if (from > t->count || count > t->count - from)
        return st_error(e, f->path, t->name, "asked for %zu elements from %zu on, found %zu", count, from,
                        t->count);
    size_t width = st_dtypes[t->dtype].bits / 8;
    const uint8_t *bytes = f->bytes + t->offset + from * width;
    switch (t->dtype) {
    case ST_F32:
        if (count) memcpy(out, bytes, count * width);
        return 0;
    case ST_BF16:
        for (size_t i = 0; i < count; i++) out[i] = st_read_bf16(bytes + i * width);
        return 0;
    case ST_F16:
        for (size_t i = 0; i < count; i++) out[i] = st_read_f16(bytes + i * width);
        return 0;
    case ST_F64:
        for (size_t i = 0; i < count; i++) out[i] = (float)st_read_f64(bytes + i * width);
        return 0;
    default:
        return st_error(e, f->path, t->name, "found dtype %s, expected F32, BF16, F16 or F64",
                        st_dtypes[t->dtype].name);
    }
}

typedef struct {
    const char *key, *value;
} st_pair;

typedef struct {
    uint8_t *header; /* [header_size]: the 8 bytes and the padded JSON */
    size_t header_size, file_size;
} st_plan;

static inline void safetensors_plan_free(st_plan *plan) {
    free(plan->header);
    *plan = (st_plan){0};
}

static inline int st_by_layout(const void *a, const void *b) {
    const st_tensor *s = *(const st_tensor *const *)a, *t = *(const st_tensor *const *)b;
    return s->dtype != t->dtype ? (s->dtype < t->dtype ? 1 : -1) : strcmp(s->name, t->name);
}

/* The header's JSON, with offsets from the beginning of the data; sets those of the tensors too. */
static inline char *st_header_text(st_tensor *const *order, size_t count, const st_pair *pairs,
                                   size_t pair_count, size_t *data_size) {
    cJSON *header = cJSON_CreateObject(), *metadata = cJSON_AddObjectToObject(header, "__metadata__");
    bool fine = cJSON_AddStringToObject(metadata, "format", "pt");
    for (size_t i = 0; i < pair_count; i++)
        fine &= cJSON_AddStringToObject(metadata, pairs[i].key, pairs[i].value) != NULL;
    *data_size = 0;
    for (size_t i = 0; i < count; i++) {
        st_tensor *t = order[i];
        cJSON *entry = cJSON_AddObjectToObject(header, t->name);
        fine &= cJSON_AddStringToObject(entry, "dtype", st_dtypes[t->dtype].name) != NULL;
        cJSON *shape = cJSON_AddArrayToObject(entry, "shape");
        for (size_t d = 0; d < t->rank; d++)
            fine &= cJSON_AddItemToArray(shape, json_number((double)t->shape[d]));
        t->offset = *data_size;
        *data_size += t->size;
        cJSON *offsets = cJSON_AddArrayToObject(entry, "data_offsets");
        fine &= cJSON_AddItemToArray(offsets, json_number((double)t->offset)) &&
                cJSON_AddItemToArray(offsets, json_number((double)*data_size));
    }
    char *text = fine ? cJSON_PrintUnformatted(header) : NULL;
    cJSON_Delete(header);
    return text;
}

/* The layout of a file. Given are name, dtype, rank and shape of each tensor, and metadata beside {"format":
 * "pt"}, without which transformers refuses a file; count, offset and size of each tensor are filled in. The
 * order in the file, by dtype and name, is that of the format's own writer, whatever the order of the array.
 * `path` is for messages. Fails on what the reader would refuse, and frees the plan then. */
static inline int safetensors_plan(const char *path, st_tensor *tensors, size_t count, const st_pair *pairs,
                                   size_t pair_count, st_plan *plan, error_text *e) {
    *plan = (st_plan){0};
    for (size_t i = 0; i < count; i++)
        if (st_measure(&tensors[i], path, e)) return -1;
    size_t data_size = 0;
    st_tensor **order = malloc((count + 1) * sizeof *order);
    for (size_t i = 0; order && i < count; i++) order[i] = &tensors[i];
    if (order) qsort(order, count, sizeof *order, st_by_layout);
    char *text = order ? st_header_text(order, count, pairs, pair_count, &data_size) : NULL;
    free(order);
    size_t length = text ? strlen(text) : 0;
    uint64_t padded = (length + 7) / 8 * 8;
    plan->header = text ? malloc(8 + padded) : NULL;
    if (!plan->header) {
        free(text);
        return error_set(e, "%s: out of memory for the header of %zu tensors", path, count);
    }
    memcpy(plan->header, &padded, 8);
    memset(plan->header + 8, ' ', padded);
    memcpy(plan->header + 8, text, length);
    free(text);
    plan->header_size = 8 + padded;
    plan->file_size = plan->header_size + data_size;
    for (size_t i = 0; i < count; i++) tensors[i].offset += plan->header_size;

    safetensors check; /* reads no data, so the header will do */
    if (safetensors_parse(plan->header, plan->file_size, path, &check, e)) {
        safetensors_plan_free(plan);
        return -1;
    }
    safetensors_close(&check);
    return 0;
}

/* Makes the file at its final size, so that a full disk shows now, and writes the header. *fd is the caller's
 * to write to and to close; other writers open the path themselves. On failure nothing is left of it. */
static inline int safetensors_create(const char *path, const st_plan *plan, int *fd, error_text *e) {
    *fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (*fd < 0) return error_set(e, "%s: cannot be created: %s", path, strerror(errno));
    int reason;
    do reason = posix_fallocate(*fd, 0, (off_t)plan->file_size);
    while (reason == EINTR);
    int failed = 0;
    if (reason)
        failed = error_set(e, "%s: no room for %zu bytes: %s", path, plan->file_size, strerror(reason));
    if (!failed) failed = file_write_at(*fd, plan->header, plan->header_size, 0, path, e);
    if (failed) {
        close(*fd);
        unlink(path);
        *fd = -1;
    }
    return failed;
}

/* Writes elements [from, from + count) of a planned tensor, in the type of the file. */
static inline int safetensors_write(int fd, const char *path, const st_tensor *t, size_t from, size_t count,
                                    const void *elements, error_text *e) {
    size_t bits = st_dtypes[t->dtype].bits;
    if (from > t->count || count > t->count - from || from * bits % 8 || count * bits % 8)
        return st_error(e, path, t->name, "asked to write %zu elements from %zu on, found %zu of %zu bits",
                        count, from, t->count, bits);
    return file_write_at(fd, elements, count * bits / 8, t->offset + from * bits / 8, path, e);
}

#endif
