/* Kernels of the linear operation for one instruction set: preparing activations, one weight tile, and what follows it. */
#include "linear.h"

#if defined(__clang__)
#define TF_UNROLL(n) _Pragma("unroll")
#else
#define TF_PRAGMA(x) _Pragma(#x)
#define TF_UNROLL(n) TF_PRAGMA(GCC unroll n)
#endif

#if defined(__AVX512VNNI__)
#include "linear_avx512.h"
#elif defined(__AVX2__)
#include "linear_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "linear_neon.h"
#else
#include "linear_portable.h"
#endif

#if defined(__FMA__) || defined(__aarch64__)
#define MADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MADD(a, b, c) ((a) * (b) + (c))
#endif

/* ---- activations ---- */

/* 1 / rms, from 16 partial sums added in a fixed order. */
static float inverse_rms(const float *x, int n, float eps) {
    float sum[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) sum[l] = MADD(x[i + l], x[i + l], sum[l]);
    for (int l = 0; i < n; i++, l++) sum[l] = MADD(x[i], x[i], sum[l]);
    for (int width = 8; width; width /= 2)
        for (int l = 0; l < width; l++) sum[l] += sum[l + width];
    return 1.0f / __builtin_sqrtf(sum[0] / (float)n + eps);
}

TF_INLINE uint32_t float_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

/* Largest |x| of 32, as bits: for floats of one sign the order of the numbers is the order of their bits. */
TF_INLINE float largest(const float *x) {
    uint32_t top[16];
    for (int i = 0; i < 16; i++) {
        const uint32_t a = float_bits(x[i]) & 0x7fffffff, b = float_bits(x[i + 16]) & 0x7fffffff;
        top[i] = a > b ? a : b;
    }
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) top[i] = top[i] > top[i + width] ? top[i] : top[i + width];
    float value;
    memcpy(&value, top, 4);
    return value;
}

/* Codes of 32 numbers, rounded to the nearest (ties to even); returns d. */
TF_INLINE float quantise32(const float *x, int8_t *q, int32_t sums[2]) {
    const float top = largest(x), inverse = top > 0 ? 127.0f / top : 0.0f;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the rounded integer in the low bits */
    int32_t codes[32];
    for (int i = 0; i < 32; i++) codes[i] = (int32_t)(float_bits(MADD(x[i], inverse, magic)) - 0x4b400000u);
    for (int i = 0; i < 32; i++) q[i] = (int8_t)codes[i];
    for (int g = 0; g < 2; g++) {
        int32_t sum = 0;
        for (int i = 0; i < 16; i++) sum += codes[16 * g + i];
        sums[g] = sum;
    }
    return top / 127.0f;
}

static void prepare(const float *x, int at, int R, int cols, const float *norm_w, float eps, float *tmp, uint8_t *xq,
                    uint8_t *xe, float *xf) {
    if (norm_w) {
        const float inverse = inverse_rms(x, cols, eps);
        for (int i = 0; i < cols; i++) tmp[i] = x[i] * inverse * norm_w[i];
        x = tmp;
    }
    if (xf)
        for (int i = 0; i < cols; i++) xf[(size_t)i * R + at] = x[i];
    if (!xq) return;
    for (int i = 0; i < cols; i += 32, xq += TF_X_BYTES * R) {
        int32_t sums[2];
        float *d = (float *)(xq + 32 * R) + at;
        d[0] = quantise32(x + i, (int8_t *)xq + 32 * at, sums);
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

/* 1 / (1 + exp(-x)), relative error below 3e-7. exp: Cody and Waite's reduction, minimax polynomial of degree 6 (Cephes). */
TF_INLINE float sigmoid(float x) {
    float t = -x;
    t = t < -87.0f ? -87.0f : t;
    t = t > 88.0f ? 88.0f : t;
    const float magic = 12582912.0f, shifted = MADD(t, 1.44269504f, magic), n = shifted - magic;
    const float r = MADD(n, 2.12194440e-4f, MADD(n, -0.693359375f, t));
    float p = MADD(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = MADD(p, r, 8.3334519073e-3f);
    p = MADD(p, r, 4.1665795894e-2f);
    p = MADD(p, r, 1.6666665459e-1f);
    p = MADD(p, r, 5.0000001201e-1f);
    p = MADD(p, r * r, r + 1.0f);
    const uint32_t bits = float_bits(p) + (float_bits(shifted) << 23);
    float e;
    memcpy(&e, &bits, 4);
    return 1.0f / (1.0f + e);
}

TF_INLINE float activate(float x, int act) {
    if (act == TF_ACT_SILU) return x * sigmoid(x);
    return x * sigmoid(1.5957691216f * MADD(0.044715f * x * x, x, x)); /* (1 + tanh(u)) / 2 = sigmoid(2u) */
}

static void finish(const float *v, const float *up, const float *bias, const float *up_bias, const float *residual, int act,
                   int count, float *out) {
    float y[16], add[16] = {0};
    memcpy(y, v, sizeof y);
    if (bias) {
        memcpy(add, bias, 4 * (size_t)count);
        for (int i = 0; i < 16; i++) y[i] += add[i];
    }
    if (act) {
        float u[16];
        memcpy(u, up, sizeof u);
        if (up_bias) {
            memcpy(add, up_bias, 4 * (size_t)count);
            for (int i = 0; i < 16; i++) u[i] += add[i];
        }
        if (act == TF_ACT_SILU)
            for (int i = 0; i < 16; i++) y[i] = activate(y[i], TF_ACT_SILU) * u[i];
        else
            for (int i = 0; i < 16; i++) y[i] = activate(y[i], TF_ACT_GELU_TANH) * u[i];
    }
    if (residual) {
        memcpy(add, residual, 4 * (size_t)count);
        for (int i = 0; i < 16; i++) y[i] += add[i];
    }
    memcpy(out, y, 4 * (size_t)count);
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
