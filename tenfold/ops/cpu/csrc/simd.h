/* Vectors of floats for *_simd.c sources: written once with the compiler's vector extensions, TF_W floats wide, with an
 * intrinsic only where an instruction has no operator. Including this outside of a *_simd.c source is an error. */
#ifndef TENFOLD_SIMD_H
#define TENFOLD_SIMD_H

#include <math.h>
#include <string.h>

#include "tenfold.h"

#ifndef TF_ISA
#error "simd.h is for *_simd.c sources"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define TF_W 16
#elif defined(__AVX2__)
#define TF_W 8
#else
#define TF_W 4
#endif

typedef float vf __attribute__((vector_size(4 * TF_W)));
typedef int32_t vi __attribute__((vector_size(4 * TF_W)));
typedef float vf_memory __attribute__((vector_size(4 * TF_W), aligned(4), may_alias));

TF_INLINE vf vf_load(const float *p) { return *(const vf_memory *)p; }
TF_INLINE void vf_store(float *p, vf x) { *(vf_memory *)p = x; }
TF_INLINE vf vf_set(float x) { return x - (vf){0}; }
TF_INLINE vf vf_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* a * b + c, rounded once where the processor can. */
TF_INLINE vf vf_fma(vf a, vf b, vf c) {
#if TF_W == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif TF_W == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

TF_INLINE vf vf_max(vf a, vf b) {
#if TF_W == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif TF_W == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return vf_select(a > b, a, b);
#endif
}

/* Sum of all lanes: halves, then quarters, ... */
TF_INLINE float vf_sum(vf x) {
#if TF_W == 4
    return (x[0] + x[2]) + (x[1] + x[3]);
#else
#if TF_W == 16
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#else
    __m256 h = (__m256)x;
#endif
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#endif
}

/* The largest lane. */
TF_INLINE float vf_largest(vf x) {
#if TF_W == 4
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
#else
#if TF_W == 16
    __m256 h = _mm256_max_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#else
    __m256 h = (__m256)x;
#endif
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
#endif
}

/* out[k] = sum of the lanes of x[k], k < 4, always added as ((l + l+W/2) + (l+W/4 ...)) ...: halves first. */
TF_INLINE void vf_sum_4(const vf *x, float *out) {
#if TF_W == 16
    __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
#elif TF_W == 8
    __m256 a = (__m256)x[0], b = (__m256)x[1], c = (__m256)x[2], d = (__m256)x[3];
    __m256 ac = _mm256_add_ps(_mm256_permute2f128_ps(a, c, 0x20), _mm256_permute2f128_ps(a, c, 0x31));
    __m256 bd = _mm256_add_ps(_mm256_permute2f128_ps(b, d, 0x20), _mm256_permute2f128_ps(b, d, 0x31));
    __m256 s = _mm256_add_ps(_mm256_unpacklo_ps(ac, bd), _mm256_unpackhi_ps(ac, bd)); /* per lane: a02 b02 a13 b13 */
    __m128 low = _mm256_castps256_ps128(s), high = _mm256_extractf128_ps(s, 1);
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low)));
#elif defined(__x86_64__)
    __m128 a = (__m128)x[0], b = (__m128)x[1], c = (__m128)x[2], d = (__m128)x[3];
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
#elif defined(__aarch64__)
    float32x4_t a = (float32x4_t)x[0], b = (float32x4_t)x[1], c = (float32x4_t)x[2], d = (float32x4_t)x[3];
    float32x4_t ab = vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b));
    float32x4_t cd = vaddq_f32(vzip1q_f32(c, d), vzip2q_f32(c, d));
    float64x2_t low = vreinterpretq_f64_f32(ab), high = vreinterpretq_f64_f32(cd);
    vst1q_f32(out, vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(low, high)), vreinterpretq_f32_f64(vzip2q_f64(low, high))));
#else
    for (int k = 0; k < 4; k++) out[k] = vf_sum(x[k]);
#endif
}

/* out[r][k] = sum of the lanes of x[r][k] for 4 rows of 4, the same sums as vf_sum_4. */
TF_INLINE void vf_sum_4x4(const vf x[4][4], float *out, size_t stride) {
#if TF_W == 16
    __m512 k[4]; /* one for each k; 128-bit part r holds the four partial sums of row r */
    for (int i = 0; i < 4; i++) {
        __m512 a = (__m512)x[0][i], b = (__m512)x[1][i], c = (__m512)x[2][i], d = (__m512)x[3][i];
        __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
        k[i] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    }
    __m512 k01 = _mm512_add_ps(_mm512_unpacklo_ps(k[0], k[1]), _mm512_unpackhi_ps(k[0], k[1]));
    __m512 k23 = _mm512_add_ps(_mm512_unpacklo_ps(k[2], k[3]), _mm512_unpackhi_ps(k[2], k[3]));
    __m512 s = _mm512_add_ps(_mm512_shuffle_ps(k01, k23, 0x44), _mm512_shuffle_ps(k01, k23, 0xee));
    _mm_storeu_ps(out, _mm512_castps512_ps128(s));
    _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(s, 1));
    _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(s, 2));
    _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(s, 3));
#else
    for (int r = 0; r < 4; r++) vf_sum_4(x[r], out + r * stride);
#endif
}

/* e^x within 2 units in the last place, for x up to 88; 0 where that is not a normal number (x < -87.33). */
TF_INLINE vf vf_exp(vf x) {
    const vf magic = vf_set(12582912.0f), least = vf_set(-87.33f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vf z = vf_fma(x, vf_set(1.44269504088896341f), magic);
    vf n = z - magic;
    vf r = vf_fma(n, vf_set(-0.693145751953125f), x); /* ln 2 in two pieces */
    r = vf_fma(n, vf_set(-1.42860682030941723e-6f), r);
    vf p = vf_set(1.392621347e-3f); /* (e^r - 1 - r) / r^2 at Chebyshev nodes, |r| <= ln 2 / 2 */
    p = vf_fma(p, r, vf_set(8.363202972e-3f));
    p = vf_fma(p, r, vf_set(4.166655444e-2f));
    p = vf_fma(p, r, vf_set(1.666657685e-1f));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
#if TF_W == 16
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    vi power = ((vi)z - (vi)magic + 127) << 23;
    return (vf)((vi)(p * (vf)power) & ~(x < least));
#endif
}

/* tanh: a polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere. */
TF_INLINE vf vf_tanh(vf x) {
    vf z = x * x, p = vf_set(-5.70498872745e-3f);
    p = vf_fma(p, z, vf_set(2.06390887954e-2f));
    p = vf_fma(p, z, vf_set(-5.37397155531e-2f));
    p = vf_fma(p, z, vf_set(1.33314422036e-1f));
    p = vf_fma(p, z, vf_set(-3.33332819422e-1f));
    vf small = vf_fma(p * z, x, x);
    vf bounded = vf_select(x > 10.0f, vf_set(10.0f), vf_select(x < -10.0f, vf_set(-10.0f), x));
    vf large = 1.0f - 2.0f / (vf_exp(bounded + bounded) + 1.0f);
    return vf_select((x < 0.625f) & (x > -0.625f), small, large);
}

/* ---- storage types ---- */

enum tf_type { TF_F32, TF_F16, TF_BF16 }; /* as native.py numbers them */

TF_INLINE size_t tf_type_size(int type) { return type == TF_F32 ? 4 : 2; }

TF_INLINE float f32_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13, bits;
    float magnitude, rebias = 0x1p112f; /* moves the exponent from bias 15 to 127, subnormals included */
    memcpy(&magnitude, &rest, 4);
    magnitude *= rebias;
    memcpy(&bits, &magnitude, 4);
    bits = sign | ((h & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : bits);
    memcpy(&magnitude, &bits, 4);
    return magnitude;
}

TF_INLINE uint16_t f16_from_f32(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) { /* subnormal: the adder of floats does the rounding */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

TF_INLINE float f32_from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

TF_INLINE uint16_t bf16_from_f32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Element i.. of an array of `type`, as TF_W floats. */
TF_INLINE vf vf_load_type(int type, const void *p, size_t i) {
    if (type == TF_F32) return vf_load((const float *)p + i);
    const uint16_t *h = (const uint16_t *)p + i;
#if TF_W == 16
    __m256i bits = _mm256_loadu_si256((const __m256i *)h);
    if (type == TF_F16) return (vf)_mm512_cvtph_ps(bits);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif TF_W == 8
    __m128i bits = _mm_loadu_si128((const __m128i *)h);
    if (type == TF_F16) return (vf)_mm256_cvtph_ps(bits);
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#elif defined(__aarch64__)
    uint16x4_t bits = vld1_u16(h);
    if (type == TF_F16) return (vf)vcvt_f32_f16(vreinterpret_f16_u16(bits));
    return (vf)vshll_n_u16(bits, 16);
#else
    vf x;
    for (int l = 0; l < TF_W; l++) x[l] = type == TF_F16 ? f32_from_f16(h[l]) : f32_from_bf16(h[l]);
    return x;
#endif
}

TF_INLINE float load_type(int type, const void *p, size_t i) {
    if (type == TF_F32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return type == TF_F16 ? f32_from_f16(h) : f32_from_bf16(h);
}

TF_INLINE void store_type(int type, void *p, size_t i, float x) {
    if (type == TF_F32)
        ((float *)p)[i] = x;
    else
        ((uint16_t *)p)[i] = type == TF_F16 ? f16_from_f32(x) : bf16_from_f32(x);
}

/* n elements of `type` to floats, and back (to nearest, ties to even). */
TF_INLINE void widen(int type, const void *from, float *to, int n) {
    int i = 0;
    for (; i + TF_W <= n; i += TF_W) vf_store(to + i, vf_load_type(type, from, i));
    for (; i < n; i++) to[i] = load_type(type, from, i);
}

TF_INLINE void narrow(int type, const float *from, void *to, int n) {
    int i = 0;
    if (type == TF_F32) {
        memcpy(to, from, (size_t)n * 4);
        return;
    }
#if TF_W >= 8
    if (type == TF_F16)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)((uint16_t *)to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    if (type == TF_F16)
        for (; i + 4 <= n; i += 4) vst1_u16((uint16_t *)to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
#endif
    for (; i < n; i++) store_type(type, to, i, from[i]);
}

#endif
