/* jpeg_entropy.h - the entropy decoder of baseline JPEGs, where most of decoding's time goes, for
 * libjpeg-turbo to use instead of its own.
 *
 *     jpeg_entropy entropy;
 *     jpeg_start_decompress(&info);
 *     jpeg_entropy_install(&entropy, &info);       // before the first scan line; entropy must outlive info
 *
 * The file must lie in memory (jpeg_mem_src). libjpeg reads byte by byte, as any of them may begin a marker,
 * and looks up one code after the other. Here the data is copied without what marks its bytes 0xFF, so that
 * eight bytes are read at once, and a table tells from the next ten bits one or two coefficients. They are
 * the same as libjpeg's. Missing data and codes that do not exist are errors.
 * Left out, so that libjpeg's own decoder stays: progressive and arithmetic coding, several scans, restart
 * intervals, libraries other than libjpeg-turbo or without <jpegint.h>, which says how a decoder is called.
 */
#ifndef DATA_JPEG_ENTROPY_H
#define DATA_JPEG_ENTROPY_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#if defined(LIBJPEG_TURBO_VERSION_NUMBER) && __has_include(<jpegint.h>)
#define JPEG_INTERNALS
#include <jpegint.h>

/* --------------------------------------------------------------------------------------------------- bits */

enum {
    JPEG_PADDING = 1024
}; /* 0 bytes behind the data: a block has at most 64 x 31 bits, and 8 are read at once */

typedef struct {
    uint64_t bits; /* the next ones, from the top; those below `count` are 0 or true already */
    int count;
    const uint8_t *next, *end; /* without the padding */
} jpeg_bits;

/* Copies the data up to the next marker, which is where *in ends. 0xFF stands for itself where 0 follows,
 * otherwise it begins a marker; more of them may come before either. Returns the number of bytes. */
static inline size_t jpeg_bits_copy(const uint8_t **in, const uint8_t *end, uint8_t *out) {
    const uint8_t *next = *in, *after;
    uint8_t *to = out;
    while (next < end) {
        const uint8_t *mark = memchr(next, 0xFF, (size_t)(end - next));
        size_t plain = (size_t)((mark ? mark : end) - next);
        memcpy(to, next, plain);
        to += plain;
        next += plain;
        for (after = next; after < end && *after == 0xFF;) after++;
        if (after == end || *after != 0) break;
        *to++ = 0xFF;
        next = after + 1;
    }
    *in = next;
    return (size_t)(to - out);
}

/* Makes count at least 56. */
static inline void jpeg_bits_fill(jpeg_bits *b) {
    uint64_t word;
    memcpy(&word, b->next, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    b->bits |= word >> b->count;
    b->next += (63 - b->count) >> 3;
    b->count |= 56;
}

static inline void jpeg_bits_drop(jpeg_bits *b, unsigned n) {
    b->bits <<= n;
    b->count -= (int)n;
}

/* Whether more bits were dropped than there are. */
static inline int jpeg_bits_overrun(const jpeg_bits *b) { return (b->next - b->end) * 8 > b->count; }

/* -------------------------------------------------------------------------------------------------- codes */

/* Coefficients in the order of the zigzag: a symbol says how many 0 to skip before the next one, and how many
 * bits of value follow. The end of a block is a skip of JPEG_END. */
enum { JPEG_LOOK = 10, JPEG_END = 64, JPEG_LONGEST_SKIP = 15 };

/* What the next JPEG_LOOK bits hold. Most often one coefficient, and perhaps another one behind it; where
 * there is not, both are the same. If only a code fits, size[1] is 0 and value[0] the number of bits behind
 * it; if not even that, size[0] is 0 too. */
typedef struct {
    int16_t value[2];
    uint8_t at[2];   /* how many coefficients further on they lie */
    uint8_t size[2]; /* in bits, of the first, of both */
} jpeg_look;

typedef struct {
    jpeg_look look[1 << JPEG_LOOK];
    uint32_t limit[17]; /* the first 16 bits that are too high for a code of each length */
    int offset[17];     /* from a code of each length to the place of its symbol */
    const uint8_t *symbols;
} jpeg_codes;

/* The value that `size` bits stand for: the upper half of their range is positive, the lower negative. */
static inline int jpeg_value(unsigned bits, unsigned size) {
    return (int)bits - (bits < 1u << size >> 1 ? (1 << size) - 1 : 0);
}

/* The coefficients that an AC symbol skips. */
static inline uint8_t jpeg_skip(unsigned symbol) {
    return symbol & 15 || symbol == 0xF0 ? (uint8_t)(symbol >> 4) : JPEG_END;
}

/* Adds to each entry of one coefficient, but the end of a block, the next one, where that fits too. */
static inline void jpeg_codes_pair(jpeg_codes *c) {
    for (unsigned i = 0; i < 1 << JPEG_LOOK;) {
        const jpeg_look *one = c->look + i;
        unsigned size = one->size[1], same = 1u << (JPEG_LOOK - one->size[0]);
        if (size > 0 && one->at[0] != JPEG_END)
            for (unsigned k = 0; k < same; k++) { /* what lies behind: k, then zeros */
                const jpeg_look *next = c->look + (k << size);
                if (next->size[1] == 0 || size + next->size[0] > JPEG_LOOK) continue;
                c->look[i + k].value[1] = next->value[0];
                c->look[i + k].at[1] = (uint8_t)(one->at[0] + 1 + next->at[0]);
                c->look[i + k].size[1] = (uint8_t)(size + next->size[0]);
            }
        i += same;
    }
}

/* The codes of a table that libjpeg has found to be valid: they count up, and double from one length to the
 * next. */
static inline void jpeg_codes_init(jpeg_codes *c, const JHUFF_TBL *table, int is_dc) {
    unsigned code = 0;
    int place = 0;
    memset(c->look, 0, sizeof c->look);
    c->symbols = table->huffval;
    for (unsigned length = 1; length <= 16; length++, code *= 2) {
        c->offset[length] = place - (int)code;
        for (int i = 0; i < table->bits[length]; i++, code++, place++) {
            unsigned symbol = table->huffval[place], bits = symbol & 15, size = length + bits;
            uint8_t skip = is_dc ? 0 : jpeg_skip(symbol);
            if (length > JPEG_LOOK) continue;
            jpeg_look *entry = c->look + (code << (JPEG_LOOK - length));
            if (size > JPEG_LOOK) {
                jpeg_look one = {{(int16_t)bits, 0}, {skip, 0}, {(uint8_t)length, 0}};
                for (unsigned same = 1u << (JPEG_LOOK - length); same > 0; same--) *entry++ = one;
            } else {
                for (unsigned b = 0; b < 1u << bits; b++) {
                    int16_t value = (int16_t)jpeg_value(b, bits);
                    jpeg_look one = {{value, value}, {skip, skip}, {(uint8_t)size, (uint8_t)size}};
                    for (unsigned same = 1u << (JPEG_LOOK - size); same > 0; same--) *entry++ = one;
                }
            }
        }
        c->limit[length] = code << (16 - length);
    }
    if (!is_dc) jpeg_codes_pair(c);
}

/* One coefficient, whose code `look` may hold: what is to be skipped before it and its value. */
static inline unsigned jpeg_bits_one(jpeg_bits *b, const jpeg_codes *c, jpeg_look look, int *value) {
    unsigned skip = look.at[0], size = (unsigned)look.value[0], length = look.size[0];
    if (look.size[1]) {
        jpeg_bits_drop(b, length);
        *value = look.value[0];
        return skip;
    }
    if (length == 0) {
        unsigned top = (unsigned)(b->bits >> 48);
        for (length = JPEG_LOOK + 1; length <= 16 && top >= c->limit[length];) length++;
        if (length > 16) { /* no code: no data that one could go on from */
            b->next = b->end + JPEG_PADDING / 2;
            *value = 0;
            return JPEG_END;
        }
        unsigned symbol = c->symbols[(int)(top >> (16 - length)) + c->offset[length]];
        skip = jpeg_skip(symbol);
        size = symbol & 15;
    }
    jpeg_bits_drop(b, length);
    *value = jpeg_value((unsigned)(b->bits >> 1 >> (63 - size)), size);
    jpeg_bits_drop(b, size);
    return skip;
}

static inline jpeg_look jpeg_bits_look(const jpeg_bits *b, const jpeg_codes *c) {
    return c->look[b->bits >> (64 - JPEG_LOOK)];
}

/* ------------------------------------------------------------------------------------------------- blocks */

typedef struct {
    struct jpeg_entropy_decoder public; /* what libjpeg knows of a decoder; must come first */
    jpeg_bits bits;
    jpeg_codes dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
    uint32_t last_dc[MAX_COMPS_IN_SCAN];
} jpeg_entropy;

/* The coefficients of a block but for the first. */
static inline void jpeg_bits_block(jpeg_bits *b, const jpeg_codes *c, JCOEF *block) {
    /* Where coefficient k of the zigzag lies; those behind the end go to the last, as they do in libjpeg. */
    static const uint8_t place[64 + 2 * JPEG_END] = {
        0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
        12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
        35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
        58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, [63 ... 191] = 63};
    const unsigned most =
        64 - 1 - JPEG_LONGEST_SKIP; /* from here on, one coefficient may be all there is room for */
    for (unsigned k = 1; k < 64;) {
        jpeg_bits_fill(b); /* enough for two looks and then the longest code with its value, 16 + 15 bits */
        for (int i = 0; i < 3 && k < 64; i++) {
            jpeg_look look = jpeg_bits_look(b, c);
            if (look.size[1] == 0 || k >= most) {
                int value;
                k += jpeg_bits_one(b, c, look, &value);
                block[place[k++]] = (JCOEF)value;
                break;
            }
            jpeg_bits_drop(b, look.size[1]);
            block[place[k + look.at[1]]] = look.value[1]; /* comes first: an end is a 0 in the last place */
            block[place[k + look.at[0]]] = look.value[0];
            k += look.at[1] + 1u;
        }
    }
}

/* Decodes the blocks of one MCU, which libjpeg has filled with 0. */
static inline boolean jpeg_entropy_decode(j_decompress_ptr info, JBLOCKROW *blocks) {
    jpeg_entropy *s = (jpeg_entropy *)info->entropy;
    jpeg_bits bits = s->bits;
    for (int i = 0; i < info->blocks_in_MCU; i++) {
        const int component = info->MCU_membership[i];
        const jpeg_component_info *tables = info->cur_comp_info[component];
        const jpeg_codes *dc = s->dc + tables->dc_tbl_no;
        int difference;
        jpeg_bits_fill(&bits);
        jpeg_bits_one(&bits, dc, jpeg_bits_look(&bits, dc), &difference);
        s->last_dc[component] += (uint32_t)difference;
        blocks[i][0][0] = (JCOEF)s->last_dc[component];
        jpeg_bits_block(&bits, s->ac + tables->ac_tbl_no, blocks[i][0]);
        if (jpeg_bits_overrun(&bits)) ERREXIT(info, JWRN_HIT_MARKER);
    }
    s->bits = bits;
    return TRUE;
}

static inline void jpeg_entropy_install(jpeg_entropy *s, j_decompress_ptr info) {
    if (info->progressive_mode || info->arith_code || info->restart_interval || info->data_precision != 8 ||
        info->inputctl->has_multiple_scans)
        return;
    s->public = *info->entropy;
    s->public.decode_mcu = jpeg_entropy_decode;
    const uint8_t *in = info->src->next_input_byte, *end = in + info->src->bytes_in_buffer;
    uint8_t *data =
        info->mem->alloc_large((j_common_ptr)info, JPOOL_IMAGE, (size_t)(end - in) + JPEG_PADDING);
    size_t size = jpeg_bits_copy(&in, end, data);
    memset(data + size, 0, JPEG_PADDING);
    s->bits = (jpeg_bits){.next = data, .end = data + size};
    info->src->next_input_byte = in; /* where libjpeg goes on */
    info->src->bytes_in_buffer = (size_t)(end - in);
    memset(s->last_dc, 0, sizeof s->last_dc);
    for (int i = 0, dc = 0, ac = 0; i < info->comps_in_scan; i++) {
        int d = info->cur_comp_info[i]->dc_tbl_no, a = info->cur_comp_info[i]->ac_tbl_no;
        if (!(dc >> d & 1)) jpeg_codes_init(s->dc + d, info->dc_huff_tbl_ptrs[d], 1);
        if (!(ac >> a & 1)) jpeg_codes_init(s->ac + a, info->ac_huff_tbl_ptrs[a], 0);
        dc |= 1 << d, ac |= 1 << a;
    }
    info->entropy = &s->public;
}

#else

typedef struct {
    int unused;
} jpeg_entropy;

static inline void jpeg_entropy_install(jpeg_entropy *s, j_decompress_ptr info) { (void)s, (void)info; }

#endif
#endif
