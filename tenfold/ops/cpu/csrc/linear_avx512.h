/* One tile (16 rows) against a group of R activation rows, AVX-512 VNNI: a zmm register holds one number of each row. */
#include <immintrin.h>

enum { TF_MAX_GROUP = 16 };

TF_INLINE __m512i bcast32(const void *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

/* sum += c . the 4 bytes at p, in every row. As text because compilers spend a register on the broadcast otherwise. */
#define DOT(sum, c, p) __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(c), "m"(*(const int32_t *)(p)))

TF_INLINE __m512 half16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

TF_INLINE __m512 scale16(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* Bits of v moved by `by` (left if positive), then masked. */
TF_INLINE __m512i bits_at(__m512i v, int by, __m512i mask) {
    if (by > 0) v = _mm512_slli_epi16(v, (unsigned)by);
    if (by < 0) v = _mm512_srli_epi16(v, (unsigned)-by);
    return _mm512_and_si512(v, mask);
}

TF_INLINE void unpack512(const uint8_t *p, const int bits, __m512i w[8]) {
    const __m512i m2 = _mm512_set1_epi8(3), m4 = _mm512_set1_epi8(15);
    if (bits == 8) {
        TF_UNROLL(8) for (int j = 0; j < 8; j++) w[j] = _mm512_loadu_si512(p + 64 * j);
        return;
    }
    if (bits == 2 || bits == 3) {
        TF_UNROLL(8) for (int j = 0; j < 8; j++) w[j] = bits_at(_mm512_loadu_si512(p + 64 * (j / 4)), -2 * (j % 4), m2);
        p += 128;
    } else {
        TF_UNROLL(4) for (int j = 0; j < 4; j++) {
            const __m512i v = _mm512_loadu_si512(p + 64 * j);
            w[j] = _mm512_and_si512(v, m4);
            w[j + 4] = bits_at(v, -4, m4);
        }
        p += 256;
    }
    if (bits == 3 || bits == 5) {
        const int at = bits - 1;
        const __m512i one = _mm512_set1_epi8((char)(1 << at)), h = _mm512_loadu_si512(p);
        TF_UNROLL(8) for (int j = 0; j < 8; j++) w[j] = _mm512_or_si512(w[j], bits_at(h, at - j, one));
    }
    if (bits == 6) {
        const __m512i two = _mm512_set1_epi8(0x30);
        TF_UNROLL(8) for (int j = 0; j < 8; j++)
            w[j] = _mm512_or_si512(w[j], bits_at(_mm512_loadu_si512(p + 64 * (j / 4)), 4 - 2 * (j % 4), two));
    }
}

TF_INLINE __m512i start512(const int32_t *n, const int shift) {
    return shift < 0 ? _mm512_setzero_si512() : _mm512_slli_epi32(bcast32(n), (unsigned)shift);
}

TF_INLINE void quant_tile(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out, const int R,
                              const int bits, const int groups, const int k, const int has_min, const int shift) {
    __m512 acc[16], super_d = _mm512_setzero_ps(), super_m = super_d;
    TF_UNROLL(16) for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        __m512 d[2], m[2];
        __m512i c[8];
        fetch_ahead(w + AHEAD, bits + 1);
        if (k) {
            if (b % TF_SUPER == 0) {
                super_d = half16(w);
                if (has_min) super_m = half16(w + 32);
                w += has_min ? 64 : 32;
            }
            TF_UNROLL(2) for (int g = 0; g < groups; g++) {
                d[g] = _mm512_mul_ps(super_d, scale16(w + 16 * g));
                if (has_min) m[g] = _mm512_mul_ps(super_m, scale16(w + 16 * (groups + g)));
            }
            w += 16 * groups * (has_min ? 2 : 1);
        } else {
            d[0] = half16(w);
            if (has_min) m[0] = half16(w + 32);
            w += has_min ? 64 : 32;
        }
        unpack512(w, bits, c);
        w += 64 * bits;
        const float *xd = (const float *)(x + 32 * R), *xs = xd + R, *es = (const float *)e;
        const int32_t *xn = (const int32_t *)(xs + R), *en = (const int32_t *)(es + 2 * R);
        /* Four rows at a time, each half a block in its own chain: 8 chains hide the latency of vpdpbusd. */
        const int S = R < 4 ? R : 4;
        TF_UNROLL(4) for (int r = 0; r < R; r += S) {
            __m512i i[2][4];
            TF_UNROLL(4) for (int q = 0; q < S; q++) {
                i[0][q] = start512(groups == 1 ? xn + r + q : en + r + q, shift);
                i[1][q] = groups == 1 ? _mm512_setzero_si512() : start512(en + R + r + q, shift);
            }
            TF_UNROLL(4) for (int j = 0; j < 4; j++)
                TF_UNROLL(4) for (int q = 0; q < S; q++) {
                    const uint8_t *row = x + 32 * (r + q) + 4 * j;
                    DOT(i[0][q], c[j], row);
                    DOT(i[1][q], c[j + 4], row + 16);
                }
            TF_UNROLL(4) for (int q = 0; q < S; q++) {
                const __m512 dx = _mm512_set1_ps(xd[r + q]);
                if (groups == 1) i[0][q] = _mm512_add_epi32(i[0][q], i[1][q]);
                TF_UNROLL(2) for (int g = 0; g < groups; g++) {
                    __m512 *a = &acc[r + q];
                    *a = _mm512_fmadd_ps(_mm512_mul_ps(d[g], dx), _mm512_cvtepi32_ps(i[g][q]), *a);
                    if (!has_min) continue;
                    const __m512 sx = _mm512_set1_ps(groups == 1 ? xs[r + q] : es[g * R + r + q]);
                    *a = k ? _mm512_fnmadd_ps(m[g], sx, *a) : _mm512_fmadd_ps(m[g], sx, *a);
                }
            }
        }
        x += 44 * R;
        e += 16 * R;
    }
    TF_UNROLL(16) for (int r = 0; r < R; r++) _mm512_storeu_ps(out + 16 * r, acc[r]);
}

TF_INLINE __m512 dense16(const uint8_t *w, const int format) {
    if (format == TF_FORMAT_F32) return _mm512_loadu_ps((const float *)w);
    const __m256i v = _mm256_loadu_si256((const __m256i *)w);
    if (format == TF_FORMAT_F16) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

/* x: [cols][R] floats. Sums of TF_DENSE_CHUNK columns are added up: the error grows with their number, not with cols.
 * A few rows alone wait for each addition, so two chunks run side by side; each sum is still the same. */
TF_INLINE void dense_chunks(const uint8_t *w, int cols, const float *x, __m512 *total, const int R, const int chunks,
                            const int format) {
    const int bytes = format == TF_FORMAT_F32 ? 64 : 32;
    __m512 acc[2][16];
    TF_UNROLL(2) for (int c = 0; c < chunks; c++)
        TF_UNROLL(16) for (int r = 0; r < R; r++) acc[c][r] = _mm512_setzero_ps();
    for (int k = 0; k < cols; k++)
        TF_UNROLL(2) for (int c = 0; c < chunks; c++) {
            const uint8_t *p = w + (c * TF_DENSE_CHUNK + k) * bytes;
            const __m512 v = dense16(p, format);
            fetch_ahead(p + (chunks > 1 ? chunks * TF_DENSE_CHUNK * bytes : AHEAD), 1);
            const float *at = x + (c * TF_DENSE_CHUNK + k) * R;
            TF_UNROLL(16) for (int r = 0; r < R; r++) acc[c][r] = _mm512_fmadd_ps(v, _mm512_set1_ps(at[r]), acc[c][r]);
        }
    TF_UNROLL(2) for (int c = 0; c < chunks; c++)
        TF_UNROLL(16) for (int r = 0; r < R; r++) total[r] = _mm512_add_ps(total[r], acc[c][r]);
}

TF_INLINE void dense_tile(const uint8_t *w, int cols, const float *x, float *out, const int R, const int format) {
    const int bytes = format == TF_FORMAT_F32 ? 64 : 32, together = R <= 2 ? 2 : 1;
    __m512 total[16];
    TF_UNROLL(16) for (int r = 0; r < R; r++) total[r] = _mm512_setzero_ps();
    for (; cols >= together * TF_DENSE_CHUNK; cols -= together * TF_DENSE_CHUNK) {
        dense_chunks(w, TF_DENSE_CHUNK, x, total, R, together, format);
        w += together * TF_DENSE_CHUNK * bytes;
        x += together * TF_DENSE_CHUNK * R;
    }
    for (int n; (n = TF_MIN(cols, TF_DENSE_CHUNK)) > 0; cols -= n, w += n * bytes, x += n * R)
        dense_chunks(w, n, x, total, R, 1, format);
    TF_UNROLL(16) for (int r = 0; r < R; r++) _mm512_storeu_ps(out + 16 * r, total[r]);
}

TF_INLINE float largest_lane(vf x) { return _mm512_reduce_max_ps((__m512)x); }

/* The codes of a block as bytes, and the sums of its halves. */
TF_INLINE void store_codes(const vi *codes, int8_t *q, int32_t sums[2]) {
    const __m128i low = _mm512_cvtepi32_epi8((__m512i)codes[0]), high = _mm512_cvtepi32_epi8((__m512i)codes[1]);
    const __m256i both = _mm256_set_m128i(high, low);
    _mm256_storeu_si256((__m256i *)q, both);
    __m256i sum = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), both);
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
    sums[0] = _mm256_cvtsi256_si32(sum);
    sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
}
