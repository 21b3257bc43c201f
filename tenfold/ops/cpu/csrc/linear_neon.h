/* One tile (16 rows) against a group of R activation rows, NEON with dot product: two passes of 8 rows, so that
 * accumulators, activations and codes of a pass fit 32 registers. */
#include <arm_neon.h>

enum { TF_MAX_GROUP = 4 };

TF_INLINE uint8x16_t bits_at(uint8x16_t v, int by, uint8_t mask) {
    if (by) v = vshlq_u8(v, vdupq_n_s8((int8_t)by));
    return vandq_u8(v, vdupq_n_u8(mask));
}

/* Vector j (columns 4j..4j+3 of 4 rows) of a block of codes; p: the codes, moved to these rows. */
TF_INLINE int8x16_t codes4(const uint8_t *p, const int bits, const int j) {
    uint8x16_t v;
    if (bits == 8) return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 64 * j), vdupq_n_u8(0x80)));
    if (bits <= 3) {
        v = bits_at(vld1q_u8(p + 64 * (j / 4)), -2 * (j % 4), 3);
        p += 128;
    } else {
        v = bits_at(vld1q_u8(p + 64 * (j % 4)), j < 4 ? 0 : -4, 15);
        p += 256;
    }
    if (bits == 3 || bits == 5) v = vorrq_u8(v, bits_at(vld1q_u8(p), bits - 1 - j, (uint8_t)(1 << (bits - 1))));
    if (bits == 6) v = vorrq_u8(v, bits_at(vld1q_u8(p + 64 * (j / 4)), 4 - 2 * (j % 4), 0x30));
    return vreinterpretq_s8_u8(v);
}

TF_INLINE float32x4_t half4(const uint8_t *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

TF_INLINE float32x4_t scale4(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

TF_INLINE int32x4_t start4(const int32_t *n, const int shift, const int bits) {
    if (shift < 0 || bits == 8) return vdupq_n_s32(0); /* 8-bit codes are signed here */
    return vdupq_n_s32(*n * (1 << shift));
}

/* Columns 4j..4j+3 of all rows of the pass and of x. The lane must be a literal. */
#define DOT_COLUMNS(h, lane)                                                                          \
    {                                                                                                 \
        const int8x16_t c0 = codes4(p, bits, 4 * (h) + (lane)), c1 = codes4(p + 16, bits, 4 * (h) + (lane)); \
        TF_UNROLL(4) for (int r = 0; r < R; r++) {                                                    \
            sums[r][0] = vdotq_laneq_s32(sums[r][0], c0, x[r], lane);                                 \
            sums[r][1] = vdotq_laneq_s32(sums[r][1], c1, x[r], lane);                                 \
        }                                                                                             \
    }

/* sums += dot of half a block (16 columns, half h) with R rows. */
TF_INLINE void dot_half(const uint8_t *p, const int bits, const int h, const uint8_t *q, const int R, int32x4_t sums[4][2]) {
    int8x16_t x[4];
    TF_UNROLL(4) for (int r = 0; r < R; r++) x[r] = vld1q_s8((const int8_t *)q + 32 * r + 16 * h);
    DOT_COLUMNS(h, 0)
    DOT_COLUMNS(h, 1)
    DOT_COLUMNS(h, 2)
    DOT_COLUMNS(h, 3)
}

TF_INLINE void quant_pass(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out, const int R,
                          const int bits, const int groups, const int k, const int has_min, const int shift,
                          const int pass) {
    float32x4_t acc[4][2], super_d[2], super_m[2];
    TF_UNROLL(2) for (int v = 0; v < 2; v++) {
        super_d[v] = super_m[v] = vdupq_n_f32(0);
        TF_UNROLL(4) for (int r = 0; r < R; r++) acc[r][v] = vdupq_n_f32(0);
    }
    for (int b = 0; b < blocks; b++) {
        if (k && b % TF_SUPER == 0) {
            TF_UNROLL(2) for (int v = 0; v < 2; v++) {
                super_d[v] = half4(w + 16 * pass + 8 * v);
                if (has_min) super_m[v] = half4(w + 32 + 16 * pass + 8 * v);
            }
            w += has_min ? 64 : 32;
        }
        const uint8_t *scales = w;
        if (pass == 0) fetch_ahead(w + AHEAD, bits + 1);
        w += (k ? 16 * groups : 32) * (has_min ? 2 : 1);
        const float *xd = (const float *)(x + 32 * R), *xs = xd + R, *es = (const float *)e;
        const int32_t *xn = (const int32_t *)(xs + R), *en = (const int32_t *)(es + 2 * R);
        TF_UNROLL(2) for (int g = 0; g < groups; g++) {
            int32x4_t sums[4][2];
            TF_UNROLL(4) for (int r = 0; r < R; r++)
                sums[r][0] = sums[r][1] = start4(groups == 1 ? xn + r : en + g * R + r, shift, bits);
            if (groups == 1 || g == 0) dot_half(w + 32 * pass, bits, 0, x, R, sums);
            if (groups == 1 || g == 1) dot_half(w + 32 * pass, bits, 1, x, R, sums);
            TF_UNROLL(2) for (int v = 0; v < 2; v++) {
                const uint8_t *at = scales + 8 * pass + 4 * v, *at16 = scales + 16 * pass + 8 * v;
                const float32x4_t d = k ? vmulq_f32(super_d[v], scale4(at + 16 * g)) : half4(at16);
                TF_UNROLL(4) for (int r = 0; r < R; r++)
                    acc[r][v] = vfmaq_f32(acc[r][v], vmulq_n_f32(d, xd[r]), vcvtq_f32_s32(sums[r][v]));
                if (!has_min) continue;
                const float32x4_t m = k ? vmulq_f32(super_m[v], scale4(at + 16 * (groups + g))) : half4(at16 + 32);
                TF_UNROLL(4) for (int r = 0; r < R; r++) {
                    const float32x4_t s = vdupq_n_f32(groups == 1 ? xs[r] : es[g * R + r]);
                    acc[r][v] = k ? vfmsq_f32(acc[r][v], m, s) : vfmaq_f32(acc[r][v], m, s);
                }
            }
        }
        w += 64 * bits;
        x += 44 * R;
        e += 16 * R;
    }
    TF_UNROLL(4) for (int r = 0; r < R; r++)
        TF_UNROLL(2) for (int v = 0; v < 2; v++) vst1q_f32(out + 16 * r + 8 * pass + 4 * v, acc[r][v]);
}

TF_INLINE void quant_tile(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out, const int R,
                          const int bits, const int groups, const int k, const int has_min, const int shift) {
    for (int pass = 0; pass < 2; pass++) quant_pass(w, blocks, x, e, out, R, bits, groups, k, has_min, shift, pass);
}

TF_INLINE float32x4_t dense4(const uint8_t *w, const int format) {
    if (format == TF_FORMAT_F32) return vreinterpretq_f32_u8(vld1q_u8(w));
    const uint16x4_t v = vreinterpret_u16_u8(vld1_u8(w));
    if (format == TF_FORMAT_F16) return vcvt_f32_f16(vreinterpret_f16_u16(v));
    return vreinterpretq_f32_u32(vshll_n_u16(v, 16));
}

/* x: [cols][R] floats. Sums of TF_DENSE_CHUNK columns are added up: the error grows with their number, not with cols. */
TF_INLINE void dense_tile(const uint8_t *w, int cols, const float *x, float *out, const int R, const int format) {
    const int bytes = format == TF_FORMAT_F32 ? 16 : 8; /* of 4 rows */
    float32x4_t total[4][4];
    TF_UNROLL(4) for (int r = 0; r < R; r++) TF_UNROLL(4) for (int v = 0; v < 4; v++) total[r][v] = vdupq_n_f32(0);
    for (int n; (n = TF_MIN(cols, TF_DENSE_CHUNK)) > 0; cols -= n) {
        float32x4_t acc[4][4];
        TF_UNROLL(4) for (int r = 0; r < R; r++) TF_UNROLL(4) for (int v = 0; v < 4; v++) acc[r][v] = vdupq_n_f32(0);
        for (int k = 0; k < n; k++, w += 4 * bytes, x += R)
            TF_UNROLL(4) for (int v = 0; v < 4; v++) {
                const float32x4_t value = dense4(w + v * bytes, format);
                TF_UNROLL(4) for (int r = 0; r < R; r++) acc[r][v] = vfmaq_n_f32(acc[r][v], value, x[r]);
            }
        TF_UNROLL(4) for (int r = 0; r < R; r++)
            TF_UNROLL(4) for (int v = 0; v < 4; v++) total[r][v] = vaddq_f32(total[r][v], acc[r][v]);
    }
    TF_UNROLL(4) for (int r = 0; r < R; r++)
        TF_UNROLL(4) for (int v = 0; v < 4; v++) vst1q_f32(out + 16 * r + 4 * v, total[r][v]);
}

TF_INLINE float largest_lane(vf x) { return vmaxvq_f32((float32x4_t)x); }

/* The codes of a block as bytes, and the sums of its halves. */
TF_INLINE void store_codes(const vi *codes, int8_t *q, int32_t sums[2]) {
    TF_UNROLL(2) for (int h = 0; h < 2; h++) {
        const vi *c = codes + 4 * h;
        const int16x8_t low = vcombine_s16(vmovn_s32((int32x4_t)c[0]), vmovn_s32((int32x4_t)c[1]));
        const int16x8_t high = vcombine_s16(vmovn_s32((int32x4_t)c[2]), vmovn_s32((int32x4_t)c[3]));
        vst1q_s8(q + 16 * h, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
        sums[h] = vaddlvq_s16(vaddq_s16(low, high));
    }
}
