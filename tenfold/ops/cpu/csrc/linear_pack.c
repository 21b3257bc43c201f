/* From GGUF blocks (and dense rows) to tiles and back to numbers. Layout: linear.h. */
#include "linear.h"

enum { SUPER_COLS = TF_BLOCK * TF_SUPER };

/* ---- what a file stores: bytes of a block, and columns in it ---- */

static const struct {
    int bytes, cols;
} raw_block[TF_FORMAT_COUNT] = {
    [TF_FORMAT_Q4_0] = {18, 32},  [TF_FORMAT_Q4_1] = {20, 32},  [TF_FORMAT_Q5_0] = {22, 32},  [TF_FORMAT_Q5_1] = {24, 32},
    [TF_FORMAT_Q8_0] = {34, 32},  [TF_FORMAT_Q2_K] = {84, 256}, [TF_FORMAT_Q3_K] = {110, 256}, [TF_FORMAT_Q4_K] = {144, 256},
    [TF_FORMAT_Q5_K] = {176, 256}, [TF_FORMAT_Q6_K] = {210, 256}, [TF_FORMAT_F32] = {4, 1},     [TF_FORMAT_F16] = {2, 1},
    [TF_FORMAT_BF16] = {2, 1},
};

TF_EXPORT int64_t tf_raw_row_bytes(int format, int cols) {
    return (int64_t)cols / raw_block[format].cols * raw_block[format].bytes;
}

TF_EXPORT int64_t tf_tile_bytes(int format, int cols) {
    if (format >= TF_QUANT_COUNT) return (int64_t)cols * TF_TILE * raw_block[format].bytes;
    return TF_CEIL(tf_block_offset(&tf_formats[format], cols / TF_BLOCK), TF_ALIGN) * TF_ALIGN;
}

/* A super-block in the order of its columns. */
typedef struct {
    uint8_t codes[SUPER_COLS];
    int8_t scale[16], min[16]; /* one for each scale group */
    uint16_t d, dmin;
} super_block;

static uint16_t load16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static uint32_t load32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static void decode_q2_k(const uint8_t *p, super_block *s) {
    const uint8_t *q = p + 16;
    for (int g = 0; g < 16; g++) {
        s->scale[g] = (int8_t)(p[g] & 15);
        s->min[g] = (int8_t)(p[g] >> 4);
    }
    for (int h = 0; h < 2; h++)
        for (int c = 0; c < 4; c++)
            for (int i = 0; i < 32; i++) s->codes[128 * h + 32 * c + i] = (q[32 * h + i] >> (2 * c)) & 3;
    s->d = load16(p + 80);
    s->dmin = load16(p + 82);
}

static void decode_q3_k(const uint8_t *p, super_block *s) {
    const uint8_t *high = p, *q = p + 32, *scales = p + 96;
    for (int g = 0; g < 16; g++) {
        const int low = g < 8 ? scales[g] & 15 : scales[g - 8] >> 4;
        s->scale[g] = (int8_t)((low | ((scales[8 + g % 4] >> (2 * (g / 4))) & 3) << 4) - 32);
    }
    for (int h = 0; h < 2; h++)
        for (int c = 0; c < 4; c++)
            for (int i = 0; i < 32; i++)
                s->codes[128 * h + 32 * c + i] = ((q[32 * h + i] >> (2 * c)) & 3) | ((high[i] >> (4 * h + c)) & 1) << 2;
    s->d = load16(p + 108);
}

static void decode_scales_q4_k(const uint8_t *p, super_block *s) {
    for (int g = 0; g < 8; g++) {
        if (g < 4) {
            s->scale[g] = (int8_t)(p[g] & 63);
            s->min[g] = (int8_t)(p[g + 4] & 63);
        } else {
            s->scale[g] = (int8_t)((p[g + 4] & 15) | (p[g - 4] >> 6) << 4);
            s->min[g] = (int8_t)((p[g + 4] >> 4) | (p[g] >> 6) << 4);
        }
    }
}

static void decode_nibbles(const uint8_t *q, uint8_t *codes) {
    for (int c = 0; c < 4; c++)
        for (int i = 0; i < 32; i++) {
            codes[64 * c + i] = q[32 * c + i] & 15;
            codes[64 * c + 32 + i] = q[32 * c + i] >> 4;
        }
}

static void decode_q4_k(const uint8_t *p, super_block *s) {
    s->d = load16(p);
    s->dmin = load16(p + 2);
    decode_scales_q4_k(p + 4, s);
    decode_nibbles(p + 16, s->codes);
}

static void decode_q5_k(const uint8_t *p, super_block *s) {
    const uint8_t *high = p + 16;
    s->d = load16(p);
    s->dmin = load16(p + 2);
    decode_scales_q4_k(p + 4, s);
    decode_nibbles(p + 48, s->codes);
    for (int b = 0; b < 8; b++)
        for (int i = 0; i < 32; i++) s->codes[32 * b + i] |= ((high[i] >> b) & 1) << 4;
}

static void decode_q6_k(const uint8_t *p, super_block *s) {
    for (int h = 0; h < 2; h++) {
        const uint8_t *low = p + 64 * h, *high = p + 128 + 32 * h;
        uint8_t *c = s->codes + 128 * h;
        for (int i = 0; i < 32; i++) {
            c[i] = (low[i] & 15) | ((high[i] >> 0) & 3) << 4;
            c[i + 32] = (low[i + 32] & 15) | ((high[i] >> 2) & 3) << 4;
            c[i + 64] = (low[i] >> 4) | ((high[i] >> 4) & 3) << 4;
            c[i + 96] = (low[i + 32] >> 4) | ((high[i] >> 6) & 3) << 4;
        }
    }
    memcpy(s->scale, p + 192, 16);
    s->d = load16(p + 208);
}

static void decode_super(int format, const uint8_t *p, super_block *s) {
    switch (format) {
        case TF_FORMAT_Q2_K: decode_q2_k(p, s); break;
        case TF_FORMAT_Q3_K: decode_q3_k(p, s); break;
        case TF_FORMAT_Q4_K: decode_q4_k(p, s); break;
        case TF_FORMAT_Q5_K: decode_q5_k(p, s); break;
        default: decode_q6_k(p, s);
    }
}

/* ---- packing: row r (0..15) of a tile ---- */

static void put16(uint8_t *p, int r, uint16_t v) { memcpy(p + 2 * r, &v, 2); }
static void put32(uint8_t *p, int vector, int r, uint32_t v) { memcpy(p + 64 * vector + 4 * r, &v, 4); }

/* 4 columns are one 32-bit word: w[j] holds the codes of columns 4j..4j+3. */
static void pack_words(uint8_t *out, int r, const uint32_t w[8], int bits) {
    if (bits == 8) {
        for (int j = 0; j < 8; j++) put32(out, j, r, w[j]);
        return;
    }
    int low = 4;
    if (bits >= 4) {
        for (int j = 0; j < 4; j++) put32(out, j, r, (w[j] & 0x0f0f0f0fu) | (w[j + 4] & 0x0f0f0f0fu) << 4);
        out += 256;
        bits -= 4;
    } else {
        low = 0;
    }
    if (bits >= 2) {
        for (int i = 0; i < 2; i++) {
            uint32_t plane = 0;
            for (int j = 0; j < 4; j++) plane |= ((w[4 * i + j] >> low) & 0x03030303u) << (2 * j);
            put32(out, i, r, plane);
        }
        out += 128;
        low += 2;
        bits -= 2;
    }
    if (bits == 1) {
        uint32_t plane = 0;
        for (int j = 0; j < 8; j++) plane |= ((w[j] >> low) & 0x01010101u) << j;
        put32(out, 0, r, plane);
    }
}

/* Bits 4j..4j+3 of v as the lowest bits of the 4 bytes of a word. */
static uint32_t spread(uint32_t v, int j) {
    v = v >> (4 * j) & 15;
    return (v | v << 7 | v << 14 | v << 21) & 0x01010101u;
}

static void pack_row_32(int format, const uint8_t *p, int blocks, int r, uint8_t *out) {
    const tf_format_info *f = &tf_formats[format];
    const int step = (f->has_min ? 64 : 32) + 64 * f->bits;
    for (int b = 0; b < blocks; b++, out += step) {
        uint8_t *codes = out + (f->has_min ? 64 : 32);
        put16(out, r, load16(p));
        p += 2;
        if (f->has_min) {
            put16(out + 32, r, load16(p));
            p += 2;
        }
        if (f->bits == 8) {
            for (int j = 0; j < 8; j++) put32(codes, j, r, load32(p + 4 * j) ^ 0x80808080u);
            p += 32;
        } else {
            if (f->bits == 5) {
                const uint32_t high = load32(p);
                uint32_t plane = 0;
                for (int j = 0; j < 8; j++) plane |= spread(high, j) << j;
                put32(codes + 256, 0, r, plane);
                p += 4;
            }
            for (int j = 0; j < 4; j++) put32(codes, j, r, load32(p + 4 * j));
            p += 16;
        }
    }
}

static void pack_row_k(int format, const uint8_t *p, int blocks, int r, uint8_t *out) {
    const tf_format_info *f = &tf_formats[format];
    for (int b = 0; b < blocks; b += TF_SUPER, p += raw_block[format].bytes) {
        super_block s;
        uint32_t words[SUPER_COLS / 4];
        decode_super(format, p, &s);
        memcpy(words, s.codes, sizeof words);
        put16(out, r, s.d);
        out += 32;
        if (f->has_min) {
            put16(out, r, s.dmin);
            out += 32;
        }
        for (int i = 0; i < TF_SUPER; i++) {
            for (int g = 0; g < f->groups; g++, out += 16) out[r] = (uint8_t)s.scale[i * f->groups + g];
            for (int g = 0; f->has_min && g < f->groups; g++, out += 16) out[r] = (uint8_t)s.min[i * f->groups + g];
            pack_words(out, r, words + 8 * i, f->bits);
            out += 64 * f->bits;
        }
    }
}

static void pack_row_dense(int bytes, const uint8_t *p, int cols, int r, uint8_t *out) {
    if (bytes == 4)
        for (int k = 0; k < cols; k++) memcpy(out + 4 * (TF_TILE * k + r), p + 4 * k, 4);
    else
        for (int k = 0; k < cols; k++) memcpy(out + 2 * (TF_TILE * k + r), p + 2 * k, 2);
}

typedef struct {
    const uint8_t *raw;
    uint8_t *out;
    int64_t row_stride, tile_bytes;
    int format, rows, cols;
} pack_job;

static void pack_tile(void *ctx, int tile, int thread) {
    const pack_job *j = ctx;
    (void)thread;
    uint8_t *out = j->out + tile * j->tile_bytes;
    if ((tile + 1) * TF_TILE > j->rows) memset(out, 0, (size_t)j->tile_bytes);
    for (int r = 0; r < TF_TILE && tile * TF_TILE + r < j->rows; r++) {
        const uint8_t *p = j->raw + (tile * TF_TILE + r) * j->row_stride;
        if (j->format >= TF_QUANT_COUNT) pack_row_dense(raw_block[j->format].bytes, p, j->cols, r, out);
        else if (tf_formats[j->format].k) pack_row_k(j->format, p, j->cols / TF_BLOCK, r, out);
        else pack_row_32(j->format, p, j->cols / TF_BLOCK, r, out);
    }
}

/* rows x cols numbers as the file stores them, row_stride bytes apart -> ceil(rows / 16) tiles at out. */
TF_EXPORT void tf_pack(int format, const uint8_t *raw, int64_t row_stride, int rows, int cols, uint8_t *out) {
    pack_job j = {raw, out, row_stride, tf_tile_bytes(format, cols), format, rows, cols};
    tf_parallel(TF_CEIL(rows, TF_TILE), pack_tile, &j);
}

/* ---- back to numbers ---- */

static int code_at(const uint8_t *p, int bits, int r, int k) {
    const int j = k / 4, byte = 4 * r + k % 4;
    if (bits == 8) return p[64 * j + byte];
    int code, low = bits <= 3 ? 2 : 4;
    if (low == 2) code = (p[64 * (j / 4) + byte] >> (2 * (j % 4))) & 3;
    else code = (p[64 * (j % 4) + byte] >> (j < 4 ? 0 : 4)) & 15;
    p += 64 * low;
    if (bits == 6) code |= ((p[64 * (j / 4) + byte] >> (2 * (j % 4))) & 3) << 4;
    else if (bits != low) code |= ((p[byte] >> j) & 1) << low;
    return code;
}

static void unpack_row_quant(int format, const uint8_t *tile, int cols, int r, float *out) {
    const tf_format_info *f = &tf_formats[format];
    const int offset = f->shift < 0 ? 0 : 1 << f->shift, mins = f->has_min ? 2 : 1, width = TF_BLOCK / f->groups;
    for (int b = 0; b < cols / TF_BLOCK; b++) {
        const uint8_t *p = tile + tf_block_offset(f, b), *super = p;
        if (f->k) {
            super = tile + tf_block_offset(f, b / TF_SUPER * TF_SUPER);
            if (b % TF_SUPER == 0) p += 32 * mins;
        }
        const uint8_t *codes = p + (f->k ? 16 * f->groups : 32) * mins;
        const float d = tf_half_to_float(load16(super + 2 * r)), m = f->has_min ? tf_half_to_float(load16(super + 32 + 2 * r)) : 0;
        for (int g = 0; g < f->groups; g++) {
            const float dg = f->k ? d * (float)(int8_t)p[16 * g + r] : d;
            const float mg = f->k && f->has_min ? -m * (float)(int8_t)p[16 * (f->groups + g) + r] : m;
            for (int k = width * g; k < width * (g + 1); k++)
                out[TF_BLOCK * b + k] = dg * (float)(code_at(codes, f->bits, r, k) - offset) + mg;
        }
    }
}

typedef struct {
    const tf_matrix *w;
    const int64_t *ids;
    float scale;
    float *out;
} rows_job;

static void rows_task(void *ctx, int i, int thread) {
    const rows_job *j = ctx;
    (void)thread;
    const tf_segment *s = j->w->segment;
    const int64_t id = j->ids[i];
    while (id >= s->row0 + s->rows) s++;
    const int row = (int)(id - s->row0), r = row % TF_TILE, cols = j->w->cols;
    const uint8_t *tile = s->data + row / TF_TILE * s->tile_bytes;
    float *out = j->out + (size_t)i * cols;
    if (s->format < TF_QUANT_COUNT) unpack_row_quant(s->format, tile, cols, r, out);
    else
        for (int k = 0; k < cols; k++) out[k] = tf_dense_value(tile, TF_TILE * k + r, s->format);
    if (j->scale != 1.0f)
        for (int k = 0; k < cols; k++) out[k] *= j->scale;
}

void tf_matrix_rows(const tf_matrix *w, const int64_t *ids, int n, float scale, float *out) {
    rows_job j = {w, ids, scale, out};
    tf_parallel(n, rows_task, &j);
}
