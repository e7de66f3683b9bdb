/* options.h - command lines and configuration files by one table, which also gives the help and the JSON.
 *
 *     static const option list[] = {{"data", "limit-train", OPTION_SIZE, offsetof(values, limit), ...}, ...};
 *     static const option_table table = {.options = list, .count = 12, .size = sizeof(values), ...};
 *     values v;                                               // its first member is an option_state
 *     if (options_parse(&table, argc, argv, &v, &e)) ...      // v.limit, options_given(&table, &v, &v.limit)
 *
 * Names, types, defaults and limits stand in the table and nowhere else; this file knows none by name.
 * An option is "--name value" or "--name=value", a switch "--name" or "--no-name", an interval a switch that
 * may have a number; the last of several wins.
 * The same names are the keys of a JSON object; null there means "not given". An option without a default is
 * unset until somebody gives or derives its value: "", -1 for a choice, SIZE_MAX, NAN, count 0, height 0.
 * Whole numbers are below 2^53, so that JSON carries them exactly. Left out: short names, abbreviations.
 */
#ifndef IO_OPTIONS_H
#define IO_OPTIONS_H

#include "io/file.h"
#include "io/json.h"

enum { OPTIONS_MAX = 128, OPTION_TEXT_SIZE = 4096, OPTIONS_WIDTH = 110, OPTIONS_INDENT = 36 };

/* What fields of the values are made of, beside int, size_t, double and bool. */
typedef char option_text[OPTION_TEXT_SIZE];
typedef struct {
    size_t count; /* 1 or 3 */
    double values[3];
} option_numbers;
typedef struct {
    size_t height, width;
} option_extent;

typedef enum {
    OPTION_TEXT,     /* option_text: UTF-8 */
    OPTION_CHOICE,   /* int: which of the choices */
    OPTION_SIZE,     /* size_t */
    OPTION_NUMBER,   /* double, finite */
    OPTION_SWITCH,   /* bool */
    OPTION_INTERVAL, /* size_t: of every Nth of something; "true" is 1, "false" 0 */
    OPTION_NUMBERS,  /* option_numbers: "a" or "a,b,c" */
    OPTION_EXTENT    /* option_extent: "N" or "HxW" */
} option_type;

typedef struct {
    const char *group, *name;
    option_type type;
    size_t offset;          /* of the field in the values */
    const char *preset;     /* the default, as it would be typed; NULL: none, or derived later */
    const char *note;       /* on the default, for the help */
    const char *range;      /* of numbers, as an interval: "[0, 1)", "(0, inf)"; never with inf in it */
    const char *choices;    /* "adamw|sgd" */
    const char *later;      /* those of the choices that are not built yet */
    const char *value_name; /* what stands for the value in the help: "DIR" */
    const char *help;       /* what it is, with its unit */
    bool not_built_yet;
    bool of_one_run;  /* not taken over from what another run wrote */
    bool of_training; /* stays what it is when a training is resumed */
    bool is_config;   /* names the file to read further options from */
} option;

typedef struct {
    const char *name, *usage, *help;
    const char *groups; /* of the options that it heeds: "data|model" */
    const char *also;   /* other spellings: "-h|--help" */
    bool takes_arguments, not_built_yet;
} option_command;

typedef struct {
    const char *program;
    const option *options;
    size_t count; /* <= OPTIONS_MAX */
    const option_command *commands;
    size_t command_count; /* the first command is meant where none is given */
    const char *topics;   /* what else the help can be asked about: "model" */
    size_t size;          /* of the values */
} option_table;

enum { OPTION_PRESET, OPTION_FROM_FILE, OPTION_FROM_COMMAND_LINE };

/* The first member of the values. */
typedef struct {
    size_t command;                    /* index into the commands */
    char **arguments;                  /* what is no option, in argv */
    size_t argument_count;             /* 0 for commands that take none */
    unsigned char source[OPTIONS_MAX]; /* OPTION_PRESET, ..., for each option */
} option_state;

/* -------------------------------------------------------------------------------------- choices and names */

/* Steps through "a|b|c": the next piece and its length, NULL after the last; *list moves on. */
static inline const char *option_next_choice(const char **list, size_t *length) {
    const char *piece = *list;
    if (!piece || !*piece) return NULL;
    *length = strcspn(piece, "|");
    *list = piece + *length + (piece[*length] == '|');
    return piece;
}

/* Index of `name` in "a|b|c", or -1. */
static inline int option_choice_index(const char *list, const char *name) {
    size_t length;
    const char *piece;
    for (int i = 0; (piece = option_next_choice(&list, &length)); i++)
        if (strlen(name) == length && memcmp(piece, name, length) == 0) return i;
    return -1;
}

/* Which of many names is nearest to the one that was typed, by Levenshtein's distance (insertions, deletions
 * and substitutions of one character); the first of equals. */
typedef struct {
    const char *typed;
    size_t typed_length, distance;
    char text[64]; /* "" before the first offer */
} option_nearest;

static inline void option_offer(option_nearest *n, const char *prefix, const char *name, size_t length) {
    size_t row[64]; /* row[j]: distance of the typed name, as far as read, to name's first j characters */
    size_t typed_length = n->typed_length < 64 ? n->typed_length : 64; /* no name is longer */
    if (length > 63) length = 63;
    for (size_t j = 0; j <= length; j++) row[j] = j;
    for (size_t i = 0; i < typed_length; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 1; j <= length; j++) {
            size_t best = diagonal + (n->typed[i] != name[j - 1]);
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (row[j] + 1 < best) best = row[j] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    if (n->text[0] && row[length] >= n->distance) return;
    n->distance = row[length];
    snprintf(n->text, sizeof n->text, "%s%.*s", prefix, (int)length, name);
}

static inline void option_offer_choices(option_nearest *n, const char *list) {
    size_t length;
    for (const char *piece; (piece = option_next_choice(&list, &length));) option_offer(n, "", piece, length);
}

static inline void options_offer_commands(const option_table *table, option_nearest *n) {
    for (size_t i = 0; i < table->command_count; i++)
        option_offer(n, "", table->commands[i].name, strlen(table->commands[i].name));
}

static inline const option *options_find(const option_table *table, const char *name, size_t length) {
    for (size_t i = 0; i < table->count; i++)
        if (strlen(table->options[i].name) == length && memcmp(table->options[i].name, name, length) == 0)
            return &table->options[i];
    return NULL;
}

static inline const option_command *options_find_command(const option_table *table, const char *name) {
    for (size_t i = 0; i < table->command_count; i++)
        if (strcmp(table->commands[i].name, name) == 0 ||
            option_choice_index(table->commands[i].also, name) >= 0)
            return &table->commands[i];
    return NULL;
}

/* The option that a field of the values belongs to; there must be one. */
static inline const option *options_of_field(const option_table *table, const void *values,
                                             const void *field) {
    const option *o = table->options;
    while ((const char *)values + o->offset != (const char *)field) o++;
    return o;
}

/* Whether the user gave the option of this field: options_given(&table, &v, &v.depth). */
static inline bool options_given(const option_table *table, const void *values, const void *field) {
    const option *o = options_of_field(table, values, field);
    return ((const option_state *)values)->source[o - table->options] != OPTION_PRESET;
}

/* The name of the choice that a field holds: options_choice(&table, &v, &v.strategy).text; "" while unset. */
static inline quoted options_choice(const option_table *table, const void *values, const int *field) {
    const char *list = options_of_field(table, values, field)->choices, *piece = "";
    size_t length = 0;
    for (int i = 0; i <= *field && piece; i++) piece = option_next_choice(&list, &length);
    return quote(piece ? piece : "", length);
}

/* ------------------------------------------------------------------------------------------------- values */

/* What a value must look like, for messages. */
static inline void option_expected(const option *o, char text[256]) {
    static const char *const forms[] = {[OPTION_TEXT] = "1 to 4095 bytes of UTF-8",
                                        [OPTION_CHOICE] = "one of ",
                                        [OPTION_SIZE] = "a whole number in ",
                                        [OPTION_NUMBER] = "a number in ",
                                        [OPTION_SWITCH] = "true or false",
                                        [OPTION_INTERVAL] = "none, or a whole number in ",
                                        [OPTION_NUMBERS] = "one number or three (a,b,c) in ",
                                        [OPTION_EXTENT] = "N or HxW, whole numbers in "};
    snprintf(text, 256, "%s%s", forms[o->type], o->choices ? o->choices : o->range ? o->range : "");
}

static inline bool option_in_range(const char *range, double x) {
    char left, right;
    double low, high;
    return sscanf(range, "%c%lf,%lf%c", &left, &low, &high, &right) == 4 &&
           (left == '[' ? x >= low : x > low) && (right == ']' ? x <= high : x < high);
}

/* Both return what follows the number in the text, or NULL where there is none that will do. */
static inline const char *option_read_size(const char *text, const char *range, size_t *value) {
    size_t digits = strspn(text, "0123456789");
    unsigned long long x = strtoull(text, NULL, 10); /* ULLONG_MAX on overflow */
    *value = (size_t)x;
    return digits && x <= json_largest_whole && option_in_range(range, (double)x) ? text + digits : NULL;
}

static inline const char *option_read_number(const char *text, const char *range, double *value) {
    size_t length = strspn(text, "+-.0123456789eE"); /* no nan, inf (but 1e999), hexadecimal, blanks */
    char *end;
    *value = strtod(text, &end);
    return length && end == text + length && option_in_range(range, *value) ? end : NULL;
}

/* Reads a value from text into its field. `prefix` stands before the option's name in messages. */
static inline int option_read(const option *o, const char *prefix, const char *text, void *field,
                              error_text *e) {
    const char *end = NULL; /* of what could be read; the whole text must be */
    size_t length = strlen(text);
    option_numbers *list = field;
    option_extent *extent = field;
    switch (o->type) {
    case OPTION_TEXT:
        end = text;
        for (size_t size = 1; size && *end; end += size) size = json_character_size(end);
        if (length == 0 || length >= OPTION_TEXT_SIZE) end = NULL;
        if (end == text + length) memcpy(field, text, length + 1);
        break;
    case OPTION_CHOICE:
        if (option_choice_index(o->later, text) >= 0)
            return error_set(e, "%s%s %s is not built yet", prefix, o->name, text);
        *(int *)field = option_choice_index(o->choices, text);
        if (*(int *)field >= 0) end = text + length;
        break;
    case OPTION_SIZE: end = option_read_size(text, o->range, field); break;
    case OPTION_NUMBER: end = option_read_number(text, o->range, field); break;
    case OPTION_SWITCH:
        *(bool *)field = strcmp(text, "true") == 0;
        if (*(bool *)field || strcmp(text, "false") == 0) end = text + length;
        break;
    case OPTION_INTERVAL:
        *(size_t *)field = strcmp(text, "true") == 0;
        if (*(size_t *)field || strcmp(text, "false") == 0)
            end = text + length;
        else
            end = option_read_size(text, o->range, field);
        break;
    case OPTION_NUMBERS:
        end = option_read_number(text, o->range, &list->values[0]);
        for (list->count = 1; end && *end == ',' && list->count < 3; list->count++)
            end = option_read_number(end + 1, o->range, &list->values[list->count]);
        if (list->count == 2) end = NULL;
        break;
    case OPTION_EXTENT:
        end = option_read_size(text, o->range, &extent->height);
        extent->width = extent->height;
        if (end && *end == 'x') end = option_read_size(end + 1, o->range, &extent->width);
        break;
    }
    if (end == text + length) return 0;
    char expected[256];
    option_nearest nearest = {.typed = text, .typed_length = length};
    option_expected(o, expected);
    option_offer_choices(&nearest, o->choices);
    return error_set(e, "%s%s: found '%s', expected %s%s%s", prefix, o->name, quote(text, SIZE_MAX).text,
                     expected, nearest.text[0] ? "; did you mean " : "", nearest.text);
}

/* Every field to its default, or unset. Fails only on a default that the table itself does not allow. */
static inline int options_defaults(const option_table *table, void *values, error_text *e) {
    memset(values, 0, table->size);
    for (const option *o = table->options; o < table->options + table->count; o++) {
        void *field = (char *)values + o->offset;
        if (o->type == OPTION_CHOICE) *(int *)field = -1;
        if (o->type == OPTION_SIZE) *(size_t *)field = SIZE_MAX;
        if (o->type == OPTION_NUMBER) *(double *)field = NAN;
        if (o->preset && option_read(o, "", o->preset, field, e)) return -1;
    }
    return 0;
}

/* The value of one option for JSON; null while it is unset. */
static inline cJSON *option_to_json(const option_table *table, const option *o, const void *values) {
    const void *field = (const char *)values + o->offset;
    const option_numbers *list = field;
    const option_extent *extent = field;
    char text[64];
    switch (o->type) {
    case OPTION_TEXT: return *(const char *)field ? cJSON_CreateString(field) : cJSON_CreateNull();
    case OPTION_CHOICE:
        if (*(const int *)field < 0) return cJSON_CreateNull();
        return cJSON_CreateString(options_choice(table, values, field).text);
    case OPTION_SIZE:
        if (*(const size_t *)field == SIZE_MAX) return cJSON_CreateNull();
        return json_number((double)*(const size_t *)field);
    case OPTION_NUMBER:
        return isfinite(*(const double *)field) ? json_number(*(const double *)field) : cJSON_CreateNull();
    case OPTION_SWITCH: return cJSON_CreateBool(*(const bool *)field);
    case OPTION_INTERVAL:
        if (*(const size_t *)field < 2) return cJSON_CreateBool(*(const size_t *)field == 1);
        return json_number((double)*(const size_t *)field);
    case OPTION_NUMBERS:
        if (list->count == 0) return cJSON_CreateNull();
        cJSON *array = cJSON_CreateArray();
        for (size_t i = 0; i < list->count; i++) cJSON_AddItemToArray(array, json_number(list->values[i]));
        return array;
    case OPTION_EXTENT:
        if (extent->height == 0) return cJSON_CreateNull();
        if (extent->height == extent->width) return json_number((double)extent->height);
        snprintf(text, sizeof text, "%zux%zu", extent->height, extent->width);
        return cJSON_CreateString(text);
    }
    return NULL;
}

/* An object with every option of the table and its value, which the caller deletes: what a run writes down,
 * and what options_parse_json reads. NULL when memory runs out. */
static inline cJSON *options_to_json(const option_table *table, const void *values) {
    cJSON *object = cJSON_CreateObject();
    bool fine = object != NULL;
    for (const option *o = table->options; o < table->options + table->count; o++)
        fine &= cJSON_AddItemToObject(object, o->name, option_to_json(table, o, values));
    if (fine) return object;
    cJSON_Delete(object);
    return NULL;
}

/* Is every option that a training keeps what a run wrote down as `written`, in the file `path`? The first
 * that differs is an error. An option that the file does not have is passed over. */
static inline int options_same_training(const option_table *table, const void *values, const cJSON *written,
                                        const char *path, error_text *e) {
    for (const option *o = table->options; o < table->options + table->count; o++) {
        const cJSON *has = cJSON_GetObjectItemCaseSensitive(written, o->name);
        if (!o->of_training || !has) continue;
        cJSON *json = option_to_json(table, o, values);
        char *text = cJSON_PrintUnformatted(json), *found = cJSON_PrintUnformatted(has);
        cJSON *wants = text ? cJSON_Parse(text) : NULL;
        int same = wants && cJSON_Compare(wants, has, 1);
        if (!same)
            error_set(e, "%s: found %s %s, asked for is %s: a training that is resumed keeps its --%s", path,
                      o->name, found ? quote(found, SIZE_MAX).text : "", text ? text : "", o->name);
        cJSON_Delete(json);
        cJSON_Delete(wants);
        free(text);
        free(found);
        if (!same) return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ reading */

/* Fails for a name that no option has. `where` stands before the message, `typed` is what was typed, `name`
 * the part of it that is compared, `dashes` what belongs before a name. */
static inline int options_unknown(const option_table *table, const char *where, quoted typed,
                                  const char *dashes, const char *name, size_t length, error_text *e) {
    option_nearest nearest = {.typed = name, .typed_length = length};
    for (const option *o = table->options; o < table->options + table->count; o++)
        if (strcmp(dashes, "--no-") != 0 || o->type == OPTION_SWITCH || o->type == OPTION_INTERVAL)
            option_offer(&nearest, dashes, o->name, strlen(o->name));
    if (*dashes) options_offer_commands(table, &nearest); /* somebody types --help */
    return error_set(e, "%sunknown option %s, did you mean %s?", where, typed.text, nearest.text);
}

/* A JSON value as it would be typed on a command line, at its own place or in the buffer; NULL: a value of
 * another kind than the option's. */
static inline const char *option_text_of_json(const option *o, const cJSON *value, char buffer[128]) {
    bool text = o->type == OPTION_TEXT || o->type == OPTION_CHOICE || o->type == OPTION_EXTENT;
    if (cJSON_IsString(value) && text) return value->valuestring;
    bool on_or_off = o->type == OPTION_SWITCH || o->type == OPTION_INTERVAL;
    if (cJSON_IsBool(value) && on_or_off) return cJSON_IsTrue(value) ? "true" : "false";
    if (cJSON_IsNumber(value) && o->type >= OPTION_SIZE && o->type != OPTION_SWITCH) {
        json_format(buffer, value->valuedouble);
        return buffer;
    }
    if (!cJSON_IsArray(value) || o->type != OPTION_NUMBERS) return NULL;
    buffer[0] = 0;
    size_t length = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, value) {
        char number[32];
        if (!cJSON_IsNumber(item)) return NULL;
        json_format(number, item->valuedouble);
        length += (size_t)snprintf(buffer + length, 128 - length, "%s%s", length ? "," : "", number);
        if (length > 90) break; /* four numbers at least: too many already */
    }
    return buffer;
}

/* One member of a configuration file; of_run: one that a run wrote. */
static inline int option_from_json(const option_table *table, const cJSON *member, const char *where,
                                   bool of_run, void *values, error_text *e) {
    static const size_t sizes[] = {[OPTION_TEXT] = sizeof(option_text),
                                   [OPTION_CHOICE] = sizeof(int),
                                   [OPTION_SIZE] = sizeof(size_t),
                                   [OPTION_NUMBER] = sizeof(double),
                                   [OPTION_SWITCH] = sizeof(bool),
                                   [OPTION_INTERVAL] = sizeof(size_t),
                                   [OPTION_NUMBERS] = sizeof(option_numbers),
                                   [OPTION_EXTENT] = sizeof(option_extent)};
    const char *name = member->string;
    const option *o = options_find(table, name, strlen(name));
    if (!o) return options_unknown(table, where, quote(name, SIZE_MAX), "", name, strlen(name), e);
    if ((of_run && o->of_one_run) || cJSON_IsNull(member)) return 0;
    if (o->is_config) return error_set(e, "%sfound %s, expected no further file to read", where, name);

    union {
        option_text text;
        option_numbers numbers;
        option_extent extent;
    } read; /* large and aligned enough for any of them */
    memset(&read, 0, sizeof read);
    char buffer[128], expected[256];
    option_expected(o, expected);
    const char *text = option_text_of_json(o, member, buffer);
    int failed = text ? option_read(o, where, text, &read, e)
                      : error_set(e, "%s%s: found %s, expected %s", where, name, json_kind(member), expected);
    void *field = (char *)values + o->offset;
    if (o->not_built_yet && (failed || memcmp(field, &read, sizes[o->type]) != 0))
        return error_set(e, "%s%s is not built yet", where, name); /* its default would change nothing */
    unsigned char *source = &((option_state *)values)->source[o - table->options];
    if (failed || *source == OPTION_FROM_COMMAND_LINE) return failed;
    memcpy(field, &read, sizes[o->type]);
    *source = OPTION_FROM_FILE;
    return 0;
}

/* Takes options from the text of a configuration file: an object of names and values, or one with such an
 * object as "options", which a run wrote; what belongs to that run alone is passed over. What the command
 * line gave stays. Fails on unknown names and on values of a wrong kind or range, having read some. */
static inline int options_parse_json(const option_table *table, const char *text, size_t length,
                                     const char *file, void *values, error_text *e) {
    cJSON *root = json_parse(text, length, JSON_ANY_NUMBERS, file, e);
    if (!root) return -1;
    char where[512];
    snprintf(where, sizeof where, "%.500s: ", file);
    const cJSON *options = cJSON_GetObjectItemCaseSensitive(root, "options"), *member;
    bool of_run = cJSON_IsObject(options);
    if (!of_run) options = root;
    int failed = 0;
    if (!cJSON_IsObject(options))
        failed = error_set(e, "%sfound %s, expected an object of options", where, json_kind(options));
    cJSON_ArrayForEach(member, options) {
        if (!failed) failed = option_from_json(table, member, where, of_run, values, e);
    }
    cJSON_Delete(root);
    return failed;
}

/* The option at argv[*i], and its value, which may be argv[*i + 1]. */
static inline int option_from_arguments(const option_table *table, int argc, char **argv, int *i,
                                        void *values, error_text *e) {
    const char *typed = argv[*i], *name = typed + strspn(typed, "-");
    bool dashes = name == typed + 2;
    size_t length = strcspn(name, "=");
    const char *text = name[length] ? name + length + 1 : NULL, *prefix = "--",
               *next = *i + 1 < argc ? argv[*i + 1] : NULL;
    quoted shown = quote(typed, (size_t)(name - typed) + length);
    const option *o = dashes ? options_find(table, name, length) : NULL;
    if (!o && strncmp(name, "no-", 3) == 0) {
        prefix = "--no-";
        name += 3;
        length -= 3;
        o = dashes ? options_find(table, name, length) : NULL;
    }
    if (!o) return options_unknown(table, "", shown, prefix, name, length, e);
    if (o->not_built_yet) return error_set(e, "%s is not built yet", shown.text);
    if (o->type == OPTION_INTERVAL && (!text || strcmp(prefix, "--") == 0)) {
        int off = strcmp(prefix, "--no-") == 0, number = !off && next && *next >= '0' && *next <= '9';
        if (!text) text = off ? "false" : number ? argv[++*i] : "true";
    } else if (o->type == OPTION_SWITCH || o->type == OPTION_INTERVAL) {
        if (text)
            return error_set(e, "%s: found the value '%s', expected none: --%s or --no-%s", shown.text,
                             quote(text, SIZE_MAX).text, o->name, o->name);
        text = strcmp(prefix, "--") == 0 ? "true" : "false";
    } else if (strcmp(prefix, "--") != 0) {
        return error_set(e, "%s: found --no- before an option with a value, expected --%s", shown.text,
                         o->name);
    } else if (!text && next && strncmp(next, "--", 2) != 0) {
        text = argv[++*i];
    } else if (!text) {
        char expected[256];
        option_expected(o, expected);
        return error_set(e, "--%s: found no value, expected %s", o->name, expected);
    }
    if (option_read(o, "--", text, (char *)values + o->offset, e)) return -1;
    ((option_state *)values)->source[o - table->options] = OPTION_FROM_COMMAND_LINE;
    return 0;
}

/* Defaults, then the command line, [COMMAND] [options and arguments], then the file that it names for what it
 * does not give. Arguments that are no options are moved to the front of argv, in their order. */
static inline int options_parse(const option_table *table, int argc, char **argv, void *values,
                                error_text *e) {
    option_state *state = values;
    if (options_defaults(table, values, e)) return -1;
    const option_command *command = argc > 1 ? options_find_command(table, argv[1]) : NULL;
    int i = command ? 2 : 1;
    if (!command && argc > 1 && argv[1][0] != '-') {
        option_nearest nearest = {.typed = argv[1], .typed_length = strlen(argv[1])};
        options_offer_commands(table, &nearest);
        return error_set(e, "unknown command '%s', did you mean %s?", quote(argv[1], SIZE_MAX).text,
                         nearest.text);
    }
    if (!command) command = table->commands;
    if (command->not_built_yet) return error_set(e, "%s is not built yet", command->name);
    state->command = (size_t)(command - table->commands);
    for (state->arguments = argv + i; i < argc; i++) {
        const option_command *other = argv[i][0] == '-' ? options_find_command(table, argv[i]) : NULL;
        if (other) { /* COMMAND ... --help: as "help COMMAND" */
            state->command = (size_t)(other - table->commands);
            state->arguments = argv + 1;
            state->argument_count = command != other && options_find_command(table, argv[1]) == command;
            return 0;
        }
        if (argv[i][0] == '-') {
            if (option_from_arguments(table, argc, argv, &i, values, e)) return -1;
        } else if (command->takes_arguments) {
            state->arguments[state->argument_count++] = argv[i];
        } else {
            return error_set(e, "found the argument '%s', expected an option (a command comes first)",
                             quote(argv[i], SIZE_MAX).text);
        }
    }
    for (const option *o = table->options; o < table->options + table->count; o++) {
        const char *path = (const char *)values + o->offset;
        char *text;
        size_t length;
        if (!o->is_config || !*path) continue;
        if (file_read_whole(path, 1 << 20, &text, &length, e)) return -1;
        int failed = options_parse_json(table, text, length, path, values, e);
        free(text);
        if (failed) return -1;
    }
    return 0;
}

/* --------------------------------------------------------------------------------------------------- help */

/* Prints words from column OPTIONS_INDENT to OPTIONS_WIDTH, on as many lines as they need, behind `column`
 * characters that stand there already. */
static inline void options_print_words(FILE *out, size_t column, const char *words) {
    for (bool first = true; *words; first = false) {
        size_t length = strcspn(words, " ");
        if (first ? column >= OPTIONS_INDENT : column + 1 + length > OPTIONS_WIDTH) {
            fputc('\n', out);
            column = 0;
            first = true;
        }
        int blanks = first ? (int)(OPTIONS_INDENT - column) : 1;
        column += (size_t)fprintf(out, "%*s%.*s", blanks, "", (int)length, words);
        words += length + (words[length] == ' ');
    }
    fputc('\n', out);
}

static inline void option_print(FILE *out, const option *o) {
    static const char *const value_names[] = {
        [OPTION_TEXT] = "TEXT", [OPTION_CHOICE] = "NAME",   [OPTION_SIZE] = "N",
        [OPTION_NUMBER] = "X",  [OPTION_NUMBERS] = "A,B,C", [OPTION_EXTENT] = "N|HxW"};
    const char *value = o->value_name ? o->value_name : value_names[o->type];
    char preset[256] = "", later[128] = "", words[1024];
    if (o->preset || o->note)
        snprintf(preset, sizeof preset, " (default: %s%s%s)", o->preset ? o->preset : "",
                 o->preset && o->note ? "; " : "", o->note ? o->note : "");
    if (o->later) snprintf(later, sizeof later, " (not built yet: %s)", o->later);
    snprintf(words, sizeof words, "%s%s%s%s%s%s", o->help, o->choices ? ": " : "",
             o->choices ? o->choices : "", preset, later, o->not_built_yet ? " (not built yet)" : "");
    int column = o->type == OPTION_SWITCH     ? fprintf(out, "  --[no-]%s", o->name)
                 : o->type == OPTION_INTERVAL ? fprintf(out, "  --[no-]%s[=N]", o->name)
                                              : fprintf(out, "  --%s %s", o->name, value);
    options_print_words(out, (size_t)column, words);
}

/* Prints the commands and all options, or, where topic is not NULL, that command and the options it heeds.
 * Fails for a topic that is no command; topics of the table are the caller's to print, and only suggested. */
static inline int options_help(const option_table *table, const char *topic, FILE *out, error_text *e) {
    const option_command *command = topic ? options_find_command(table, topic) : NULL;
    if (topic && !command) {
        option_nearest nearest = {.typed = topic, .typed_length = strlen(topic)};
        options_offer_commands(table, &nearest);
        option_offer_choices(&nearest, table->topics);
        return error_set(e, "unknown topic '%s', did you mean help %s?", quote(topic, SIZE_MAX).text,
                         nearest.text);
    }
    fprintf(out, "usage: %s %s\n\n", table->program, command ? command->usage : "[COMMAND] [options]");
    for (const option_command *c = table->commands; c < table->commands + table->command_count; c++) {
        if (command && c != command) continue;
        char words[256];
        snprintf(words, sizeof words, "%s%s", c->help, c->not_built_yet ? " (not built yet)" : "");
        options_print_words(out, (size_t)fprintf(out, "  %s", c->usage), words);
    }
    const char *group = "";
    for (const option *o = table->options; o < table->options + table->count; o++) {
        if (command && option_choice_index(command->groups, o->group) < 0) continue;
        if (strcmp(group, o->group) != 0) fprintf(out, "\n%s:\n", o->group);
        group = o->group;
        option_print(out, o);
    }
    return 0;
}

#endif
