/* json.h - JSON that comes from outside, read strictly, and numbers written so that they survive.
 *
 *     cJSON *root = json_parse(text, length, JSON_ANY_NUMBERS, "config.json", &e);
 *     if (!root) ...                                                // e names the file and the byte
 *     ... cJSON_GetObjectItemCaseSensitive(root, "depth") ...
 *     cJSON_Delete(root);
 *
 * cJSON does the parsing. It lets pass, or alters in silence, some texts that are no JSON or that its result
 * cannot hold: bytes that are not UTF-8, control characters, escapes with a wrong digit, a 0 in a string, 01
 * and 1. and -.5 for numbers, a key that occurs twice. They are refused here, before or after it.
 */
#ifndef IO_JSON_H
#define IO_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"

/* JSON numbers are doubles: whole numbers are exact up to this one. */
static const size_t json_largest_whole = ((size_t)1 << 53) - 1;

/* Text from outside, fit to be shown in a message of one line: quote(name, SIZE_MAX).text */
typedef struct {
    char text[72];
} quoted;

/* The first `length` bytes of a string or all of it; what is long is cut, control characters become '?'. */
static inline quoted quote(const char *string, size_t length) {
    quoted q;
    size_t n = 0, cut = sizeof q.text - sizeof "...";
    for (; n < length && string[n] && n < cut; n++)
        q.text[n] = (unsigned char)string[n] < 0x20 || string[n] == 0x7F ? '?' : string[n];
    bool whole = n == length || string[n] == 0;
    while (!whole && n > 0 && ((unsigned char)string[n] & 0xC0) == 0x80) n--; /* no half character */
    strcpy(q.text + n, whole ? "" : "...");
    return q;
}

/* Bytes of the UTF-8 character at s (Unicode 15, table 3-7); 0 where there is none. s ends with a 0. */
static inline size_t json_character_size(const char *s) {
    const unsigned char *c = (const unsigned char *)s;
    if (c[0] < 0x80) return 1;
    size_t size = c[0] < 0xC2 ? 0 : c[0] < 0xE0 ? 2 : c[0] < 0xF0 ? 3 : c[0] < 0xF5 ? 4 : 0;
    unsigned low = c[0] == 0xE0 ? 0xA0 : c[0] == 0xF0 ? 0x90 : 0x80;  /* no second spelling of a character */
    unsigned high = c[0] == 0xED ? 0x9F : c[0] == 0xF4 ? 0x8F : 0xBF; /* no surrogates, none above 10FFFF */
    if (size == 0 || c[1] < low || c[1] > high) return 0;
    for (size_t i = 2; i < size; i++)
        if ((c[i] & 0xC0) != 0x80) return 0;
    return size;
}

/* Bytes of the number at s by JSON's grammar; 0 where it breaks the grammar. s ends with a 0. */
static inline size_t json_number_size(const char *s) {
    const char digits[] = "0123456789", *p = s + (*s == '-');
    size_t whole = strspn(p, digits);
    if (whole == 0 || (whole > 1 && *p == '0')) return 0;
    p += whole;
    if (*p == '.') {
        size_t fraction = strspn(p + 1, digits);
        if (fraction == 0) return 0;
        p += 1 + fraction;
    }
    if (*p == 'e' || *p == 'E') {
        p += 1 + (p[1] == '+' || p[1] == '-');
        size_t exponent = strspn(p, digits);
        if (exponent == 0) return 0;
        p += exponent;
    }
    return (size_t)(p - s);
}

typedef enum { JSON_ANY_NUMBERS, JSON_WHOLE_NUMBERS } json_numbers;

/* What cJSON does not check. text[length] is 0. */
static inline int json_check_text(const char *text, size_t length, json_numbers numbers, const char *file,
                                  error_text *e) {
    bool in_string = false;
    for (size_t i = 0, size; i < length; i += size) {
        const char *s = text + i;
        const char *wrong = NULL, *expected = "valid JSON";
        size = 1;
        if ((unsigned char)*s < 0x20 && (in_string || !strchr("\t\n\r", *s) || *s == 0)) {
            wrong = "a control character";
        } else if (*s == '"') {
            in_string = !in_string;
        } else if (in_string && *s == '\\') {
            if (s[1] == 'u' && strspn(s + 2, "0123456789abcdefABCDEF") < 4) wrong = "a malformed escape";
            if (strncmp(s, "\\u0000", 6) == 0) wrong = "a 0 in a string";
            size = 2;
        } else if (!in_string && (*s == '-' || (*s >= '0' && *s <= '9'))) {
            size = json_number_size(s);
            if (size == 0) wrong = "a malformed number";
            if (numbers == JSON_WHOLE_NUMBERS && strcspn(s, ".eE") < size) {
                wrong = "a number with a point or an exponent";
                expected = "whole numbers";
            }
        } else {
            size = json_character_size(s);
            if (size == 0) wrong = "bytes that are not UTF-8";
        }
        if (wrong)
            return error_set(e, "%s: found %s at byte %zu of %zu, expected %s", file, wrong, i, length,
                             expected);
    }
    return 0;
}

static inline int json_compare_keys(const void *a, const void *b) {
    return strcmp((*(const cJSON *const *)a)->string, (*(const cJSON *const *)b)->string);
}

/* Refuses an object, at any depth, with two members of one name. cJSON has bounded the depth. */
static inline int json_check_keys(const cJSON *parent, const char *file, error_text *e) {
    size_t count = 0;
    const cJSON *child;
    cJSON_ArrayForEach(child, parent) {
        count++;
        if (child->child && json_check_keys(child, file, e)) return -1;
    }
    if (!cJSON_IsObject(parent) || count < 2) return 0;
    const cJSON **members = malloc(count * sizeof *members);
    if (!members) return error_set(e, "%s: out of memory for %zu keys", file, count);
    count = 0;
    cJSON_ArrayForEach(child, parent) members[count++] = child;
    qsort(members, count, sizeof *members, json_compare_keys);
    int failed = 0;
    for (size_t i = 1; i < count && !failed; i++)
        if (strcmp(members[i]->string, members[i - 1]->string) == 0)
            failed = error_set(e, "%s: found the key '%s' twice, expected it once", file,
                               quote(members[i]->string, SIZE_MAX).text);
    free(members);
    return failed;
}

/* The JSON value that `length` bytes hold, which the caller deletes; NULL on failure. The text needs no 0 at
 * its end. JSON_WHOLE_NUMBERS: neither points nor exponents. */
static inline cJSON *json_parse(const char *text, size_t length, json_numbers numbers, const char *file,
                                error_text *e) {
    char *copy = malloc(length + 1); /* cJSON 1.7.15 reads beyond some texts that do not end with a 0 */
    if (!copy) {
        error_set(e, "%s: out of memory for %zu bytes", file, length);
        return NULL;
    }
    if (length) memcpy(copy, text, length);
    copy[length] = 0;
    cJSON *root = NULL;
    if (json_check_text(copy, length, numbers, file, e) == 0) {
        const char *stop = copy;
        root = cJSON_ParseWithLengthOpts(copy, length + 1, &stop, true);
        if (!root)
            error_set(e, "%s: found invalid or truncated JSON near byte %zu of %zu", file,
                      (size_t)(stop - copy), length);
    }
    free(copy);
    if (root && json_check_keys(root, file, e)) {
        cJSON_Delete(root);
        root = NULL;
    }
    return root;
}

/* The kind of a value, for messages. */
static inline const char *json_kind(const cJSON *value) {
    return cJSON_IsObject(value)   ? "an object"
           : cJSON_IsArray(value)  ? "an array"
           : cJSON_IsString(value) ? "a string"
           : cJSON_IsNumber(value) ? "a number"
           : cJSON_IsBool(value)   ? "true or false"
           : cJSON_IsNull(value)   ? "null"
                                   : "nothing";
}

/* Shortest text of up to 17 digits that reads back as the same finite double; whole numbers without exponent
 * or point. (cJSON's own printing is up to one part in 2^52 off.) */
static inline void json_format(char text[32], double x) {
    if (fabs(x) <= (double)json_largest_whole && x == floor(x)) {
        snprintf(text, 32, "%.0f", x);
        return;
    }
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, 32, "%.*g", digits, x);
        if (strtod(text, NULL) == x) return;
    }
}

/* The double with the fewest decimal digits that rounds to this float: 0.1307f becomes 0.1307. */
static inline double json_float(float x) {
    char text[32];
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if (strtof(text, NULL) == x) break;
    }
    return strtod(text, NULL);
}

/* A finite number for a cJSON tree that will be printed; NULL when memory runs out, as all cJSON_Create... */
static inline cJSON *json_number(double x) {
    char text[32];
    json_format(text, x);
    return cJSON_CreateRaw(text);
}

#endif
