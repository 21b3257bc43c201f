/* One tile (16 rows) against a group of R activation rows, AVX2 (AVX-VNNI where the compiler is allowed to): two passes
 * of 8 rows, so that accumulators, codes and constants of a pass fit 16 registers. */
#include <immintrin.h>

enum { TF_MAX_GROUP = 4 };

TF_INLINE __m256i bcast32(const void *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

TF_INLINE __m256i load256(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

TF_INLINE __m256 half8(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

TF_INLINE __m256 scale8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

TF_INLINE __m256i bits_at(__m256i v, int by, __m256i mask) {
    if (by > 0) v = _mm256_slli_epi16(v, by);
    if (by < 0) v = _mm256_srli_epi16(v, -by);
    return _mm256_and_si256(v, mask);
}

/* Vector j (columns 4j..4j+3 of 8 rows) of a block of codes at p. */
TF_INLINE __m256i codes8(const uint8_t *p, const int bits, const int j) {
    __m256i v;
    if (bits == 8) return load256(p + 64 * j);
    if (bits <= 3) {
        v = bits_at(load256(p + 64 * (j / 4)), -2 * (j % 4), _mm256_set1_epi8(3));
        p += 128;
    } else {
        v = bits_at(load256(p + 64 * (j % 4)), j < 4 ? 0 : -4, _mm256_set1_epi8(15));
        p += 256;
    }
    if (bits == 3 || bits == 5)
        v = _mm256_or_si256(v, bits_at(load256(p), bits - 1 - j, _mm256_set1_epi8((char)(1 << (bits - 1)))));
    if (bits == 6) v = _mm256_or_si256(v, bits_at(load256(p + 64 * (j / 4)), 4 - 2 * (j % 4), _mm256_set1_epi8(0x30)));
    return v;
}

/* Stops the compiler from re-ordering a chain of integer sums into a tree, which takes more registers than there are. */
#define KEEP(v) __asm__("" : "+x"(v))

/* sums[r] += dot of vectors from..to of the block with row r of x, exact in int32.
 * Products of codes below 2^bits and int8 are gathered in int16 as long as they fit: 4-bit codes 8 vectors, 5-bit 4, 6-bit 2. */
TF_INLINE void dot8(const uint8_t *p, const int bits, const int from, const int to, const uint8_t *x, const int R,
                        __m256i sums[4]) {
#ifdef __AVXVNNI__
    TF_UNROLL(8) for (int j = from; j < to; j++) {
        const __m256i c = codes8(p, bits, j);
        TF_UNROLL(4) for (int r = 0; r < R; r++) sums[r] = _mm256_dpbusd_avx_epi32(sums[r], c, bcast32(x + 32 * r + 4 * j));
    }
#else
    const __m256i ones = _mm256_set1_epi16(1);
    if (bits == 8) { /* |code - 128| and x with its sign: both fit maddubs without saturation */
        TF_UNROLL(8) for (int j = from; j < to; j++) {
            const __m256i c = _mm256_xor_si256(codes8(p, bits, j), _mm256_set1_epi8((char)0x80)), a = _mm256_abs_epi8(c);
            TF_UNROLL(4) for (int r = 0; r < R; r++) {
                const __m256i t = _mm256_maddubs_epi16(a, _mm256_sign_epi8(bcast32(x + 32 * r + 4 * j), c));
                sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(t, ones));
                KEEP(sums[r]);
            }
        }
        return;
    }
    const int run = bits <= 4 ? 8 : bits == 5 ? 4 : 2;
    __m256i part[4];
    TF_UNROLL(8) for (int j = from; j < to; j++) {
        /* 4-bit vectors in the order 0, 4, 1, 5, ...: each load gives two of them */
        const int v = bits == 4 && to - from == 8 ? (j / 2) + 4 * (j % 2) : j;
        const __m256i c = codes8(p, bits, v);
        const int first = (j - from) % run == 0, last = (j - from) % run == run - 1 || j == to - 1;
        TF_UNROLL(4) for (int r = 0; r < R; r++) {
            const __m256i t = _mm256_maddubs_epi16(c, bcast32(x + 32 * r + 4 * v));
            part[r] = first ? t : _mm256_add_epi16(part[r], t);
            KEEP(part[r]);
            if (last) sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(part[r], ones));
        }
    }
#endif
}

TF_INLINE __m256i start256(const int32_t *n, const int shift, const int bits) {
#ifndef __AVXVNNI__
    if (bits == 8) return _mm256_setzero_si256(); /* dot8 already took the offset off */
#endif
    (void)bits;
    return shift < 0 ? _mm256_setzero_si256() : _mm256_slli_epi32(bcast32(n), shift);
}

TF_INLINE void quant_half(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out, const int R,
                              const int bits, const int groups, const int k, const int has_min, const int shift,
                              const int half) {
    __m256 acc[4], super_d = _mm256_setzero_ps(), super_m = super_d;
    TF_UNROLL(4) for (int r = 0; r < R; r++) acc[r] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        if (k && b % TF_SUPER == 0) {
            super_d = half8(w + 16 * half);
            if (has_min) super_m = half8(w + 32 + 16 * half);
            w += has_min ? 64 : 32;
        }
        const uint8_t *scales = w;
        if (half == 0) fetch_ahead(w + AHEAD, bits + 1);
        w += (k ? 16 * groups : 32) * (has_min ? 2 : 1);
        const float *xd = (const float *)(x + 32 * R), *xs = xd + R, *es = (const float *)e;
        const int32_t *xn = (const int32_t *)(xs + R), *en = (const int32_t *)(es + 2 * R);
        TF_UNROLL(2) for (int g = 0; g < groups; g++) {
            __m256i sums[4];
            TF_UNROLL(4) for (int r = 0; r < R; r++) sums[r] = start256(groups == 1 ? xn + r : en + g * R + r, shift, bits);
            dot8(w + 32 * half, bits, 4 * g, groups == 1 ? 8 : 4 * g + 4, x, R, sums);
            const __m256 d = k ? _mm256_mul_ps(super_d, scale8(scales + 16 * g + 8 * half)) : half8(scales + 16 * half);
            TF_UNROLL(4) for (int r = 0; r < R; r++)
                acc[r] = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(xd[r])), _mm256_cvtepi32_ps(sums[r]), acc[r]);
            if (!has_min) continue;
            const __m256 m =
                k ? _mm256_mul_ps(super_m, scale8(scales + 16 * (groups + g) + 8 * half)) : half8(scales + 32 + 16 * half);
            TF_UNROLL(4) for (int r = 0; r < R; r++) {
                const __m256 s = _mm256_set1_ps(groups == 1 ? xs[r] : es[g * R + r]);
                acc[r] = k ? _mm256_fnmadd_ps(m, s, acc[r]) : _mm256_fmadd_ps(m, s, acc[r]);
            }
        }
        w += 64 * bits;
        x += 44 * R;
        e += 16 * R;
    }
    TF_UNROLL(4) for (int r = 0; r < R; r++) _mm256_storeu_ps(out + 16 * r + 8 * half, acc[r]);
}

TF_INLINE void quant_tile(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out, const int R,
                              const int bits, const int groups, const int k, const int has_min, const int shift) {
    for (int half = 0; half < 2; half++)
        quant_half(w, blocks, x, e, out, R, bits, groups, k, has_min, shift, half);
}

TF_INLINE __m256 dense8(const uint8_t *w, const int format) {
    if (format == TF_FORMAT_F32) return _mm256_loadu_ps((const float *)w);
    const __m128i v = _mm_loadu_si128((const __m128i *)w);
    if (format == TF_FORMAT_F16) return _mm256_cvtph_ps(v);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

/* x: [cols][R] floats. Sums of TF_DENSE_CHUNK columns are added up: the error grows with their number, not with cols.
 * A few rows alone wait for each addition, so two chunks run side by side; each sum is still the same. */
TF_INLINE void dense_chunks(const uint8_t *w, int cols, const float *x, __m256 *total, const int R, const int chunks,
                            const int format) {
    const int bytes = format == TF_FORMAT_F32 ? 64 : 32;
    __m256 acc[2][8];
    TF_UNROLL(2) for (int c = 0; c < chunks; c++)
        TF_UNROLL(8) for (int i = 0; i < 2 * R; i++) acc[c][i] = _mm256_setzero_ps();
    for (int k = 0; k < cols; k++)
        TF_UNROLL(2) for (int c = 0; c < chunks; c++) {
            const uint8_t *p = w + (c * TF_DENSE_CHUNK + k) * bytes;
            fetch_ahead(p + (chunks > 1 ? chunks * TF_DENSE_CHUNK * bytes : AHEAD), 1);
            const __m256 v0 = dense8(p, format), v1 = dense8(p + bytes / 2, format);
            const float *at = x + (c * TF_DENSE_CHUNK + k) * R;
            TF_UNROLL(4) for (int r = 0; r < R; r++) {
                const __m256 b = _mm256_set1_ps(at[r]);
                acc[c][2 * r] = _mm256_fmadd_ps(v0, b, acc[c][2 * r]);
                acc[c][2 * r + 1] = _mm256_fmadd_ps(v1, b, acc[c][2 * r + 1]);
            }
        }
    TF_UNROLL(2) for (int c = 0; c < chunks; c++)
        TF_UNROLL(8) for (int i = 0; i < 2 * R; i++) total[i] = _mm256_add_ps(total[i], acc[c][i]);
}

TF_INLINE void dense_tile(const uint8_t *w, int cols, const float *x, float *out, const int R, const int format) {
    const int bytes = format == TF_FORMAT_F32 ? 64 : 32, together = R <= 2 ? 2 : 1;
    __m256 total[8];
    TF_UNROLL(8) for (int i = 0; i < 2 * R; i++) total[i] = _mm256_setzero_ps();
    for (; cols >= together * TF_DENSE_CHUNK; cols -= together * TF_DENSE_CHUNK) {
        dense_chunks(w, TF_DENSE_CHUNK, x, total, R, together, format);
        w += together * TF_DENSE_CHUNK * bytes;
        x += together * TF_DENSE_CHUNK * R;
    }
    for (int n; (n = TF_MIN(cols, TF_DENSE_CHUNK)) > 0; cols -= n, w += n * bytes, x += n * R)
        dense_chunks(w, n, x, total, R, 1, format);
    TF_UNROLL(8) for (int i = 0; i < 2 * R; i++) _mm256_storeu_ps(out + 8 * i, total[i]);
}

TF_INLINE float largest_lane(vf x) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

/* The codes of a block as bytes, and the sums of its halves. */
TF_INLINE void store_codes(const vi *codes, int8_t *q, int32_t sums[2]) {
    const __m256i low = _mm256_packs_epi32((__m256i)codes[0], (__m256i)codes[1]);  /* 0-3 8-11 | 4-7 12-15 */
    const __m256i high = _mm256_packs_epi32((__m256i)codes[2], (__m256i)codes[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i both = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((__m256i *)q, both);
    __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), both), _mm256_set1_epi16(1));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
    sums[0] = _mm256_cvtsi256_si32(sum);
    sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
}
