/* decode.h - JPEG, PNG and BMP files as images of 3 channels, with the pixels that Pillow's
 * Image.open(path).convert("RGB") gives.
 *
 *     image photo;
 *     if (image_read(&photo, "photo.jpg", &e)) ...
 *     image_free(&photo);
 *
 * What a file holds is told by its content, not by its name. Grey is repeated three times, palettes are
 * looked up, alpha is dropped, 16 bits become 8 (grey ones clamp, as Pillow's do), CMYK is taken for Adobe's
 * inverted one. An image that is damaged or ends early is an error, never a picture that is grey from some
 * row on.
 *
 * JPEG is read by libjpeg-turbo with HAVE_JPEG, else by stb_image, whose pixels differ by a level here and
 * there; PNG by stb_image once its chunks have been checked; BMP here. Nothing here keeps state: threads may
 * decode at once.
 * Left out: other types (GIF, TIFF, WebP, ... are refused by name), BMP of 16 bits or compressed, EXIF's
 * orientation, colour profiles.
 */
#ifndef DATA_DECODE_H
#define DATA_DECODE_H

#include <limits.h>
#include <setjmp.h>
#include <zlib.h>

#include "data/image.h"
#include "io/file.h"

#ifdef HAVE_JPEG
#include "data/jpeg_entropy.h"
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#define STB_IMAGE_IMPLEMENTATION
#define STBIDEF __attribute__((weak)) /* not static: gcc warns of those that stb declares only */
#define STBI_NO_STDIO
#define STBI_ONLY_PNG
#ifndef HAVE_JPEG
#define STBI_ONLY_JPEG
#endif
#define STBI_FAILURE_USERMSG
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

enum { DECODE_LARGEST_FILE = 1 << 30, DECODE_MOST_SCANS = 500 };

/* Twice the pixels from which Pillow warns of a decompression bomb, where it refuses. */
#ifndef DECODE_MOST_PIXELS
#define DECODE_MOST_PIXELS (2 * (size_t)89478485)
#endif

/* Fails on sizes that no image has or that memory should not be asked for. */
static inline int decode_check_size(size_t width, size_t height, const char *path, error_text *e) {
    size_t pixels;
    if (width && height && !size_multiply(width, height, &pixels) && pixels <= DECODE_MOST_PIXELS) return 0;
    return error_set(e, "%s: found an image of %zu x %zu pixels, expected 1 to %zu pixels", path, width,
                     height, DECODE_MOST_PIXELS);
}

static inline int decode_damaged(const char *type, const char *reason, const char *path, error_text *e) {
    return error_set(e, "%s: found a damaged or truncated %s image (%s), expected a whole one", path, type,
                     reason);
}

/* ------------------------------------------------------------------------------------------ libjpeg-turbo */

#ifdef HAVE_JPEG

typedef struct {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    jmp_buf escape; /* where libjpeg goes instead of exit */
    image *out;
    jpeg_entropy entropy;
    uint8_t *inks; /* the rows of a CMYK image on their way */
    size_t scans;
    const char *path;
    error_text *e;
} decode_jpeg_state;

/* libjpeg calls this when it cannot go on. */
static inline void decode_jpeg_fail(j_common_ptr info) {
    decode_jpeg_state *s = info->client_data;
    char reason[JMSG_LENGTH_MAX];
    info->err->format_message(info, reason);
    decode_damaged("JPEG", reason, s->path, s->e);
    longjmp(s->escape, 1);
}

/* libjpeg calls this where it has a way to go on (level -1) and for its log. Pixels made up for missing data
 * are an error; harmless oddities, such as bytes between segments, are not. The log tells of each scan: a
 * small file can hold so many that a large image takes hours. */
static inline void decode_jpeg_warn(j_common_ptr info, int level) {
    decode_jpeg_state *s = info->client_data;
    int code = info->err->msg_code;
    if (level < 0 && (code == JWRN_HIT_MARKER || code == JWRN_JPEG_EOF || code == JWRN_HUFF_BAD_CODE ||
                      code == JWRN_ARITH_BAD_CODE || code == JWRN_MUST_RESYNC))
        decode_jpeg_fail(info);
    if (level >= 0 && code == JTRC_SOS && ++s->scans > DECODE_MOST_SCANS) {
        decode_damaged("JPEG", "more than 500 scans", s->path, s->e);
        longjmp(s->escape, 1);
    }
}

/* RGB of n pixels of inverted CMYK: the inks' complement, darkened by black, rounded as Pillow does. */
static inline void decode_inks(const uint8_t *inks, size_t n, uint8_t *rgb) {
    for (size_t i = 0; i < n; i++)
        for (size_t c = 0; c < 3; c++) {
            unsigned light = inks[4 * i + 3], t = (255u - inks[4 * i + c]) * light + 128;
            rgb[3 * i + c] = (uint8_t)(light - ((t >> 8) + t) / 256);
        }
}

/* All of the decoding that libjpeg may leave by way of decode_jpeg_fail. */
static inline int decode_jpeg_rows(decode_jpeg_state *s, const uint8_t *bytes, size_t size) {
    enum { ROWS = 16 };
    struct jpeg_decompress_struct *info = &s->info;
    jpeg_create_decompress(info);
    jpeg_mem_src(info, bytes, size);
    jpeg_read_header(info, TRUE);
    const size_t width = info->image_width, height = info->image_height;
    if (decode_check_size(width, height, s->path, s->e)) return -1;
    const int inks = info->num_components == 4;
    info->out_color_space = inks ? JCS_CMYK : JCS_RGB;
    if (image_new(s->out, width, height, 3, s->e)) return -1;
    if (inks && !(s->inks = malloc(ROWS * width * 4)))
        return error_set(s->e, "%s: out of memory for %d rows", s->path, ROWS);
    jpeg_start_decompress(info);
    jpeg_entropy_install(&s->entropy, info);
    while (info->output_scanline < info->output_height) {
        JSAMPROW rows[ROWS];
        uint8_t *to = s->out->pixels + info->output_scanline * width * 3;
        size_t left = height - info->output_scanline;
        for (size_t i = 0; i < ROWS && i < left; i++)
            rows[i] = inks ? s->inks + i * width * 4 : to + i * width * 3;
        size_t got = jpeg_read_scanlines(info, rows, left < ROWS ? (JDIMENSION)left : ROWS);
        if (inks) decode_inks(s->inks, got * width, to);
    }
    jpeg_finish_decompress(info);
    return 0;
}

static inline int decode_jpeg(image *out, const uint8_t *bytes, size_t size, const char *path,
                              error_text *e) {
    decode_jpeg_state s;
    s.out = out, s.inks = NULL, s.scans = 0, s.path = path, s.e = e;
    volatile int failed = -1; /* libjpeg may jump back to setjmp */
    s.info.err = jpeg_std_error(&s.errors);
    s.info.client_data = &s;
    s.errors.error_exit = decode_jpeg_fail;
    s.errors.emit_message = decode_jpeg_warn;
    if (!setjmp(s.escape)) failed = decode_jpeg_rows(&s, bytes, size);
    jpeg_destroy_decompress(&s.info);
    free(s.inks);
    return failed;
}

#endif

/* ------------------------------------------------------------------------------------------------- others */

/* What stb_image reads, once the caller has checked what it does not. */
static inline int decode_stb(image *out, const uint8_t *bytes, size_t size, const char *type,
                             const char *path, error_text *e) {
    int width, height, channels;
    if (!stbi_info_from_memory(bytes, (int)size, &width, &height, &channels))
        return decode_damaged(type, stbi_failure_reason(), path, e);
    if (decode_check_size((size_t)width, (size_t)height, path, e)) return -1;
    uint8_t *pixels = stbi_load_from_memory(bytes, (int)size, &width, &height, &channels, 3);
    if (!pixels) return decode_damaged(type, stbi_failure_reason(), path, e);
    *out = (image){(size_t)width, (size_t)height, 3, pixels};
    return 0;
}

#ifndef HAVE_JPEG
/* stb_image takes what is missing at the end for zeros. The end's marker must follow the first scan, whose
 * own bytes cannot be taken for it; thumbnails, which have one too, lie in segments before. */
static inline int decode_jpeg(image *out, const uint8_t *bytes, size_t size, const char *path,
                              error_text *e) {
    size_t at = 2;
    while (at + 4 <= size && bytes[at] == 0xFF && bytes[at + 1] != 0xDA)
        at += bytes[at + 1] == 0xFF ? 1 : 2 + ((size_t)bytes[at + 2] << 8 | bytes[at + 3]);
    while (at + 1 < size && (bytes[at] != 0xFF || bytes[at + 1] != 0xD9)) at++;
    if (at + 1 >= size) return decode_damaged("JPEG", "no end marker", path, e);
    return decode_stb(out, bytes, size, "JPEG", path, e);
}
#endif

static inline size_t decode_big_endian(const uint8_t *p) {
    return (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
}

/* Grey of 16 bits: values above 255 are white. */
static inline int decode_png_grey16(image *out, const uint8_t *bytes, size_t size, const char *path,
                                    error_text *e) {
    int width, height, channels;
    uint16_t *grey = stbi_load_16_from_memory(bytes, (int)size, &width, &height, &channels, 1);
    if (!grey) return decode_damaged("PNG", stbi_failure_reason(), path, e);
    int failed = image_new(out, (size_t)width, (size_t)height, 3, e);
    for (size_t i = 0; !failed && i < out->width * out->height; i++)
        memset(out->pixels + 3 * i, grey[i] < 255 ? grey[i] : 255, 3);
    free(grey);
    return failed;
}

/* A PNG file is a signature and chunks of length, type, data and checksum, from IHDR to IEND. stb_image does
 * not look at checksums and takes some of what is missing for zeros. */
static inline int decode_png(image *out, const uint8_t *bytes, size_t size, const char *path, error_text *e) {
    int grey16 = 0;
    for (size_t at = 8, length, chunks = 0;; at += 12 + length, chunks++) {
        const uint8_t *chunk = bytes + at;
        if (size - at < 12 || (length = decode_big_endian(chunk)) > size - at - 12)
            return decode_damaged("PNG", "the file ends within a chunk", path, e);
        if (crc32(0, chunk + 4, (unsigned)length + 4) != decode_big_endian(chunk + 8 + length))
            return decode_damaged("PNG", "wrong checksum of a chunk", path, e);
        if (memcmp(chunk + 4, "IEND", 4) == 0) break;
        if (chunks > 0 && !(chunk[4] & 32) && memcmp(chunk + 4, "PLTE", 4) && memcmp(chunk + 4, "IDAT", 4))
            return decode_damaged("PNG", "an unknown chunk that must not be passed over", path, e);
        if (chunks > 0) continue;
        if (memcmp(chunk + 4, "IHDR", 4) || length != 13)
            return decode_damaged("PNG", "the first chunk is no header", path, e);
        if (decode_check_size(decode_big_endian(chunk + 8), decode_big_endian(chunk + 12), path, e))
            return -1;
        grey16 = chunk[16] == 16 && chunk[17] == 0;
    }
    if (grey16) return decode_png_grey16(out, bytes, size, path, e);
    return decode_stb(out, bytes, size, "PNG", path, e);
}

static inline size_t decode_little_endian(const uint8_t *p, int count) {
    size_t value = 0;
    while (count-- > 0) value = value << 8 | p[count];
    return value;
}

/* BMP: a header of 14 bytes, another one that begins with its size, a palette of blue, green, red (and, but
 * in headers of 12 bytes, an unused byte), then rows padded to 4 bytes, the lowest first unless the height is
 * negative. */
static inline int decode_bmp(image *out, const uint8_t *bytes, size_t size, const char *path, error_text *e) {
    if (size < 54) return decode_damaged("BMP", "the file ends within its header", path, e);
    const size_t start = decode_little_endian(bytes + 10, 4), header = decode_little_endian(bytes + 14, 4);
    const int old = header == 12, field = old ? 2 : 4, entry = old ? 3 : 4;
    const size_t width = decode_little_endian(bytes + 18, field);
    int64_t height = (int64_t)decode_little_endian(bytes + 18 + field, field);
    const int upside_down = old || height <= INT32_MAX;
    if (!upside_down) height = ((int64_t)1 << 32) - height;
    const size_t bits = decode_little_endian(bytes + 20 + 2 * field, 2);
    const size_t compression = old ? 0 : decode_little_endian(bytes + 30, 4);
    size_t colours = old ? 0 : decode_little_endian(bytes + 46, 4);
    if (!(bits == 1 || bits == 4 || bits == 8 || bits == 24 || bits == 32) || compression ||
        (!old && header < 40))
        return error_set(e,
                         "%s: found a BMP image of %zu bits, compression %zu and a header of %zu bytes, "
                         "expected 1, 4, 8, 24 or 32 bits, not compressed",
                         path, bits, compression, header);
    if (decode_check_size(width, (size_t)height, path, e)) return -1;
    const size_t row = (width * bits + 31) / 32 * 4, rows = (size_t)height;
    const uint8_t *palette = bytes + 14 + header;
    if (bits > 8)
        colours = 0;
    else if (colours == 0 || colours > (size_t)1 << bits)
        colours = (size_t)1 << bits;
    if (header > size || 14 + header + colours * (size_t)entry > start || start > size ||
        row * rows > size - start)
        return decode_damaged("BMP", "the file is shorter than its header says", path, e);
    if (image_new(out, width, rows, 3, e)) return -1;
    for (size_t y = 0; y < rows; y++) {
        const uint8_t *in = bytes + start + (upside_down ? rows - 1 - y : y) * row, *colour;
        uint8_t *rgb = out->pixels + y * width * 3;
        for (size_t x = 0; x < width; x++, rgb += 3) {
            if (bits > 8)
                colour = in + x * bits / 8;
            else {
                size_t index = in[x * bits / 8] >> (8 - bits - x * bits % 8) & ((1u << bits) - 1);
                if (index >= colours) return decode_damaged("BMP", "a pixel of no colour", path, e);
                colour = palette + index * (size_t)entry;
            }
            rgb[0] = colour[2], rgb[1] = colour[1], rgb[2] = colour[0];
        }
    }
    return 0;
}

/* -------------------------------------------------------------------------------------------------- files */

/* The image in the bytes of a file; path is for messages. Fails on what the file's comment says is left out,
 * on damaged and truncated images, on more than DECODE_MOST_PIXELS (before memory is asked for), and when
 * memory runs out; out is then empty. */
static inline int image_decode(image *out, const uint8_t *bytes, size_t size, const char *path,
                               error_text *e) {
    static const struct {
        size_t size;
        const char *begin, *type;
    } refused[] = {{4, "GIF8", "a GIF image"},      {4, "II*", "a TIFF image"}, {4, "MM\0*", "a TIFF image"},
                   {4, "RIFF", "a WebP image"},     {3, "P5\n", "a PGM image"}, {3, "P6\n", "a PPM image"},
                   {4, "8BPS", "a Photoshop image"}};
    static const char expected[] = "expected a JPEG, PNG or BMP image";
    int failed = -1;
    *out = (image){0};
    if (size == 0) return error_set(e, "%s: found an empty file, %s", path, expected);
    if (size > INT_MAX)
        return error_set(e, "%s: found %zu bytes, %s of at most %d", path, size, expected, INT_MAX);
    if (size >= 3 && memcmp(bytes, "\xFF\xD8\xFF", 3) == 0)
        failed = decode_jpeg(out, bytes, size, path, e);
    else if (size >= 8 && memcmp(bytes, "\x89PNG\r\n\x1A\n", 8) == 0)
        failed = decode_png(out, bytes, size, path, e);
    else if (size >= 2 && memcmp(bytes, "BM", 2) == 0)
        failed = decode_bmp(out, bytes, size, path, e);
    else {
        const char *type = "a file of another type";
        for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
            if (size >= refused[i].size && memcmp(bytes, refused[i].begin, refused[i].size) == 0)
                type = refused[i].type;
        error_set(e, "%s: found %s, %s", path, type, expected);
    }
    if (failed) image_free(out);
    return failed;
}

/* The image in a file. Fails on what cannot be read, and as image_decode does. */
static inline int image_read(image *out, const char *path, error_text *e) {
    char *bytes;
    size_t size;
    *out = (image){0};
    if (file_read_whole(path, DECODE_LARGEST_FILE, &bytes, &size, e)) return -1;
    int failed = image_decode(out, (const uint8_t *)bytes, size, path, e);
    free(bytes);
    return failed;
}

#endif
