/* Packed weights (tf_matrix) and the kernels that multiply with them.
 *
 * A matrix is a list of segments, one for each tensor stacked into it, so that tensors of different formats
 * stack without conversion. A segment is cut into tiles of 16 rows; the rows that pad the last tile are zero.
 * A tile is one contiguous stream of blocks of 32 columns:
 *
 *   [super-block header, once for 256 columns: fp16 d[16], fp16 dmin[16]]   K formats only
 *   scales:  fp16 d[16], fp16 m[16]    or, K formats,  int8 scale[groups][16], int8 min[groups][16]
 *   codes:   planes of 64 bytes; byte 4*row + c of plane vector j belongs to column 4*j + c of the block
 *
 * so that one 64-byte vector holds 4 consecutive columns of 16 rows: what vpdpbusd, vpmaddubsw and sdot eat.
 * Codes of 4 bits pack vectors j (low) and j + 4 (high) in vector j (the order of GGUF's own nibbles). A 2-bit plane packs
 * vectors 4i..4i+3 in vector i, lowest bits first, and a 1-bit plane all 8 vectors in one. Codes of 2, 3, 5 and 6 bits
 * are the planes 2, 2+1, 4+1, 4+2; 8-bit codes are 8 plain vectors. Codes are unsigned: value = d * (code - offset), or
 * d * code + m. Nothing is requantised: the values are exactly those of the file, and a weight takes the bits it takes there
 * (2- to 6-bit K formats up to 0.1 more: their 6-bit scales are widened to 8).
 *
 * Dense segments (f32, f16, bf16) hold for each column the 16 rows of the tile.
 *
 * Invariant: an output element is the same bits whatever the batch, the arm, the thread count and its place in
 * them. It has one float accumulator, updated block after block by the same operations in every arm.
 */
#ifndef TENFOLD_LINEAR_H
#define TENFOLD_LINEAR_H

#include <string.h>

#include "tenfold.h"

/* format, bits, groups of scales in a block of 32, K (two-level scales), has minimum, log2 of the offset (-1: none) */
#define TF_QUANT_FORMATS(X)      \
    X(Q4_0, 4, 1, 0, 0, 3)       \
    X(Q4_1, 4, 1, 0, 1, -1)      \
    X(Q5_0, 5, 1, 0, 0, 4)       \
    X(Q5_1, 5, 1, 0, 1, -1)      \
    X(Q8_0, 8, 1, 0, 0, 7)       \
    X(Q2_K, 2, 2, 1, 1, -1)      \
    X(Q3_K, 3, 2, 1, 0, 2)       \
    X(Q4_K, 4, 1, 1, 1, -1)      \
    X(Q5_K, 5, 1, 1, 1, -1)      \
    X(Q6_K, 6, 2, 1, 0, 5)

typedef enum {
#define TF_ENUM(name, ...) TF_FORMAT_##name,
    TF_QUANT_FORMATS(TF_ENUM)
#undef TF_ENUM
        TF_QUANT_COUNT,
    TF_FORMAT_F32 = TF_QUANT_COUNT,
    TF_FORMAT_F16,
    TF_FORMAT_BF16,
    TF_FORMAT_COUNT
} tf_format;

typedef struct {
    int32_t bits, groups, k, has_min, shift;
} tf_format_info;

__attribute__((unused)) static const tf_format_info tf_formats[TF_QUANT_COUNT] = {
#define TF_INFO(name, bits, groups, k, has_min, shift) {bits, groups, k, has_min, shift},
    TF_QUANT_FORMATS(TF_INFO)
#undef TF_INFO
};

enum { TF_TILE = 16, TF_BLOCK = 32, TF_SUPER = 8 /* blocks */, TF_DENSE_CHUNK = 256 /* columns */ };

typedef struct {
    int32_t format;     /* tf_format */
    int32_t row0, rows; /* rows of the matrix this segment holds */
    int32_t tile0, tiles;
    int32_t reserved;
    int64_t tile_bytes;
    const uint8_t *data;
} tf_segment;

/* Plain numbers only, so that Python can write it. segment: `segments` of them, by ascending row. */
typedef struct {
    int32_t rows, cols, tiles, segments;
    const tf_segment *segment;
} tf_matrix;

enum { TF_ACT_NONE = 0, TF_ACT_SILU = 1, TF_ACT_GELU_TANH = 2 };

/* Ways to walk the same arithmetic; see linear.c. */
enum { TF_ARM_RULE = -1, TF_ARM_GEMV = 0, TF_ARM_FLAT = 1, TF_ARM_TILED = 2, TF_ARM_COUNT = 3 };

/* Activations as kernels read them: groups of R rows, R a power of two. Quantised: for each block of 32 columns
 *     int8 q[R][32]; float d[R]; float s[R] (d * sum of q); int32 n[R] (minus the sum of q)          TF_X_BYTES * R
 * with q = round(x / d), d = max|x| / 127. For formats with two scale groups in a block also, in an array of its own,
 *     float s[2][R]; int32 n[2][R]                                                                  TF_E_BYTES * R
 * Dense: float [cols][R]. */
enum { TF_X_BYTES = 44, TF_E_BYTES = 16, TF_GROUPS = 5 /* R = 1, 2, 4, 8, 16 */ };

typedef void (*tf_quant_tile)(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out);
typedef void (*tf_dense_tile)(const uint8_t *w, int cols, const float *x, float *out);

/* What follows the sums. cols: of the result. */
typedef struct {
    float *out;
    const float *bias, *up_bias, *residual;
    int cols, act;
} tf_epilogue;

struct tf_linear_ops {
    int max_group; /* the largest R there is a kernel for */
    /* Row `at` of a group of R: normalise (norm_w not NULL) and write where not NULL. tmp: cols floats. */
    void (*prepare)(const float *x, int at, int R, int cols, const float *norm_w, float eps, float *tmp, uint8_t *xq,
                    uint8_t *xe, float *xf);
    /* From the sums of a tile, v (and up) [R][16], to `count` columns of the rows row..row+R-1 of the result. */
    void (*finish)(const float *v, const float *up, int R, const tf_epilogue *e, int row, int col, int count);
    tf_quant_tile quant[TF_QUANT_COUNT][TF_GROUPS]; /* out: [R][16] */
    tf_dense_tile dense[TF_FORMAT_COUNT - TF_QUANT_COUNT][TF_GROUPS];
};

TF_INLINE float tf_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, f = h & 0x3ff;
    uint32_t bits;
    float value;
    if (e == 31) bits = sign | 0x7f800000 | f << 13;
    else if (e) bits = sign | (e + 112) << 23 | f << 13;
    else {
        value = (float)f * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    memcpy(&value, &bits, 4);
    return value;
}

/* Number i at w of a dense format. */
TF_INLINE float tf_dense_value(const uint8_t *w, int i, int format) {
    float value;
    uint16_t half;
    if (format == TF_FORMAT_F32) {
        memcpy(&value, w + 4 * i, 4);
        return value;
    }
    memcpy(&half, w + 2 * i, 2);
    if (format == TF_FORMAT_F16) return tf_half_to_float(half);
    const uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

/* Bytes of a tile's stream before its block b. */
TF_INLINE int64_t tf_block_offset(const tf_format_info *f, int b) {
    const int mins = f->has_min ? 2 : 1, block = (f->k ? 16 * f->groups : 32) * mins + 64 * f->bits;
    const int supers = f->k ? TF_CEIL(b, TF_SUPER) : 0;
    return (int64_t)b * block + (int64_t)supers * 32 * mins;
}

/* y [m][rows] (rows / 2 with act) = act(norm(x) W^T + bias) + residual; x [m][cols]. norm_w, bias, residual may be NULL.
 * act: the rows of W are gate then up, y = act(gate) * up. arm: TF_ARM_RULE or the one to use. */
TF_EXPORT void tf_linear(const tf_matrix *w, const float *x, int m, const float *norm_w, float norm_eps, const float *bias,
                         const float *residual, int act, int arm, float *out);
/* The arm for m rows of x where nothing was measured. */
TF_EXPORT int tf_linear_rule(int m);
/* out[i] = scale * row ids[i] of W, [n][cols]. Every id must be in 0..rows-1. */
TF_EXPORT void tf_matrix_rows(const tf_matrix *w, const int64_t *ids, int n, float scale, float *out);

#endif
