/* Kernels of the linear operation for one instruction set: preparing activations, one weight tile, and what follows it. */
#include "linear.h"
#include "simd.h"

#if defined(__clang__)
#define TF_UNROLL(n) _Pragma("unroll")
#else
#define TF_PRAGMA(x) _Pragma(#x)
#define TF_UNROLL(n) TF_PRAGMA(GCC unroll n)
#endif

/* Weights are read once, front to back; the processor's own prefetching alone leaves 10 to 25 % of the time at batch 2 to 16
 * (Zen 5, November 2026; 4096 and 16384 bytes ahead were worse than 8192). */
enum { AHEAD = 8192 };

TF_INLINE void fetch_ahead(const uint8_t *p, const int lines) {
    TF_UNROLL(9) for (int i = 0; i < lines; i++) __builtin_prefetch(p + 64 * i, 0, 3);
}

enum { PER_BLOCK = TF_BLOCK / TF_W }; /* vectors */

#if defined(__AVX512VNNI__)
#include "linear_avx512.h"
#elif defined(__AVX2__)
#include "linear_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "linear_neon.h"
#else
#include "linear_portable.h"
#endif

/* ---- activations ---- */

enum { LANES = 64 };

/* 1 / rms, from 64 partial sums (the same on every instruction set) added halves first. */
static float inverse_rms(const float *x, int n, float eps) {
    vf sum[LANES / TF_W] = {{0}};
    float last[LANES] = {0}, lane[LANES];
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int v = 0; v < LANES / TF_W; v++) {
            const vf y = vf_load(x + i + TF_W * v);
            sum[v] = vf_fma(y, y, sum[v]);
        }
    memcpy(last, x + i, 4 * (size_t)(n - i));
    for (int v = 0; v < LANES / TF_W; v++) {
        const vf y = vf_load(last + TF_W * v);
        vf_store(lane + TF_W * v, vf_fma(y, y, sum[v]));
    }
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    return 1.0f / sqrtf(lane[0] / (float)n + eps);
}

static void normalise(const float *x, int n, const float *norm_w, float eps, float *out) {
    const float inverse = inverse_rms(x, n, eps);
    int i = 0;
    for (; i + TF_W <= n; i += TF_W) vf_store(out + i, vf_load(x + i) * vf_set(inverse) * vf_load(norm_w + i));
    for (; i < n; i++) out[i] = x[i] * inverse * norm_w[i];
}

/* Codes of 32 numbers, rounded to the nearest (ties to even), and their sums by halves; returns d. */
TF_INLINE float quantise32(const float *x, int8_t *q, int32_t sums[2]) {
    vf y[PER_BLOCK], top = vf_set(0);
    for (int v = 0; v < PER_BLOCK; v++) {
        y[v] = vf_load(x + TF_W * v);
        top = vf_max(top, (vf)((vi)y[v] & 0x7fffffff));
    }
    const float largest = largest_lane(top), inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const vf magic = vf_set(12582912.0f); /* 1.5 * 2^23: adding it leaves the rounded integer in the low bits */
    vi codes[PER_BLOCK];
    for (int v = 0; v < PER_BLOCK; v++) codes[v] = (vi)(y[v] * vf_set(inverse) + magic) - (vi)magic;
    store_codes(codes, q, sums);
    return largest * (1.0f / 127.0f);
}

static void prepare(const float *x, int at, int R, int cols, const float *norm_w, float eps, float *tmp, uint8_t *xq,
                    uint8_t *xe, float *xf) {
    if (norm_w) {
        normalise(x, cols, norm_w, eps, tmp);
        x = tmp;
    }
    if (xf)
        for (int i = 0; i < cols; i++) xf[(size_t)i * R + at] = x[i];
    if (!xq) return;
    for (int i = 0; i < cols; i += TF_BLOCK, xq += TF_X_BYTES * R) {
        int32_t sums[2];
        float *d = (float *)(xq + TF_BLOCK * R) + at;
        d[0] = quantise32(x + i, (int8_t *)xq + TF_BLOCK * at, sums);
        d[R] = d[0] * (float)(sums[0] + sums[1]);
        ((int32_t *)d)[2 * R] = -(sums[0] + sums[1]);
        if (!xe) continue;
        for (int g = 0; g < 2; g++) {
            ((float *)xe)[g * R + at] = d[0] * (float)sums[g];
            ((int32_t *)xe)[(2 + g) * R + at] = -sums[g];
        }
        xe += TF_E_BYTES * R;
    }
}

/* ---- what follows a tile ---- */

TF_INLINE vf activate(vf x, const int act) {
    const vf u = act == TF_ACT_SILU ? x : vf_set(1.5957691216f) * vf_fma(vf_set(0.044715f) * x * x, x, x);
    /* gelu: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)); exp(88) is near the largest float */
    return x / (1.0f + vf_exp(-vf_max(u, vf_set(-88.0f))));
}

TF_INLINE vf finish_vector(vf y, vf u, vf bias, vf up_bias, int has_bias, const int act) {
    if (has_bias) y += bias;
    if (act == TF_ACT_NONE) return y;
    return activate(y, act) * (has_bias ? u + up_bias : u);
}

TF_INLINE void finish_rows(const float *v, const float *up, int R, const tf_epilogue *e, size_t at, int col, const int act) {
    for (int i = 0; i < TF_TILE; i += TF_W) {
        const vf bias = e->bias ? vf_load(e->bias + col + i) : vf_set(0);
        const vf up_bias = act && e->up_bias ? vf_load(e->up_bias + col + i) : vf_set(0);
        for (int r = 0; r < R; r++) {
            const size_t place = at + (size_t)r * e->cols + i;
            const vf u = act ? vf_load(up + TF_TILE * r + i) : bias;
            vf y = finish_vector(vf_load(v + TF_TILE * r + i), u, bias, up_bias, e->bias != NULL, act);
            if (e->residual) y += vf_load(e->residual + place);
            vf_store(e->out + place, y);
        }
    }
}

/* The last tile of a segment: the same on padded copies, so that nothing beyond a row is touched. */
static void finish_few(const float *v, const float *up, int R, const tf_epilogue *e, size_t at, int col, int count) {
    const size_t bytes = 4 * (size_t)count;
    for (int r = 0; r < R; r++) {
        float bias[TF_TILE] = {0}, up_bias[TF_TILE] = {0}, residual[TF_TILE] = {0}, out[TF_TILE];
        const size_t place = at + (size_t)r * e->cols;
        tf_epilogue one = {out, NULL, NULL, NULL, TF_TILE, e->act};
        if (e->bias) one.bias = memcpy(bias, e->bias + col, bytes);
        if (e->up_bias) one.up_bias = memcpy(up_bias, e->up_bias + col, bytes);
        if (e->residual) one.residual = memcpy(residual, e->residual + place, bytes);
        if (e->act == TF_ACT_NONE) finish_rows(v + TF_TILE * r, up, 1, &one, 0, 0, TF_ACT_NONE);
        else if (e->act == TF_ACT_SILU) finish_rows(v + TF_TILE * r, up + TF_TILE * r, 1, &one, 0, 0, TF_ACT_SILU);
        else finish_rows(v + TF_TILE * r, up + TF_TILE * r, 1, &one, 0, 0, TF_ACT_GELU_TANH);
        memcpy(e->out + place, out, bytes);
    }
}

static void finish(const float *v, const float *up, int R, const tf_epilogue *e, int row, int col, int count) {
    const size_t at = (size_t)row * e->cols + col;
    if (count < TF_TILE) finish_few(v, up, R, e, at, col, count);
    else if (e->act == TF_ACT_NONE) finish_rows(v, up, R, e, at, col, TF_ACT_NONE);
    else if (e->act == TF_ACT_SILU) finish_rows(v, up, R, e, at, col, TF_ACT_SILU);
    else finish_rows(v, up, R, e, at, col, TF_ACT_GELU_TANH);
}

/* ---- the table ---- */

#define QUANT_KERNEL(name, R, bits, groups, k, has_min, shift)                                                          \
    static void name##_##R(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out) {              \
        quant_tile(w, blocks, x, e, out, R, bits, groups, k, has_min, shift);                                           \
    }
#define DENSE_KERNEL(name, R)                                                               \
    static void name##_##R(const uint8_t *w, int cols, const float *x, float *out) {        \
        dense_tile(w, cols, x, out, R, TF_FORMAT_##name);                                   \
    }
#if defined(__AVX512VNNI__)
#define WIDE(...) __VA_ARGS__
#else
#define WIDE(...)
#endif
#define QUANT_KERNELS(name, ...)                                                                       \
    QUANT_KERNEL(name, 1, __VA_ARGS__)                                                                 \
    QUANT_KERNEL(name, 2, __VA_ARGS__)                                                                 \
    QUANT_KERNEL(name, 4, __VA_ARGS__)                                                                 \
    WIDE(QUANT_KERNEL(name, 8, __VA_ARGS__) QUANT_KERNEL(name, 16, __VA_ARGS__))
#define DENSE_KERNELS(name) \
    DENSE_KERNEL(name, 1) DENSE_KERNEL(name, 2) DENSE_KERNEL(name, 4) WIDE(DENSE_KERNEL(name, 8) DENSE_KERNEL(name, 16))
#define KERNEL_ROW(name, ...) {name##_1, name##_2, name##_4, WIDE(name##_8, name##_16)},

TF_QUANT_FORMATS(QUANT_KERNELS)
DENSE_KERNELS(F32)
DENSE_KERNELS(F16)
DENSE_KERNELS(BF16)

const struct tf_linear_ops TF_NAME(tf_linear_ops) = {
    .max_group = TF_MAX_GROUP,
    .prepare = prepare,
    .finish = finish,
    .quant = {TF_QUANT_FORMATS(KERNEL_ROW)},
    .dense = {KERNEL_ROW(F32) KERNEL_ROW(F16) KERNEL_ROW(BF16)},
};
