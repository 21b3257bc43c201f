/* One tile (16 rows) against a group of R activation rows, plain C: the meaning of the other variants. */

enum { TF_MAX_GROUP = 4 };

TF_INLINE float half_float(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return tf_half_to_float(h);
}

/* Codes of one block of a tile: [8 vectors][16 rows][4 columns]. */
TF_INLINE void unpack_block(const uint8_t *p, const int bits, uint8_t c[512]) {
    if (bits == 8) {
        memcpy(c, p, 512);
        return;
    }
    const int low = bits <= 3 ? 2 : 4;
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 64; i++)
            c[64 * j + i] = low == 2 ? (p[64 * (j / 4) + i] >> (2 * (j % 4))) & 3 : (p[64 * (j % 4) + i] >> (j < 4 ? 0 : 4)) & 15;
    p += 64 * low;
    if (bits == low) return;
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 64; i++)
            c[64 * j + i] |= (bits == 6 ? (p[64 * (j / 4) + i] >> (2 * (j % 4))) & 3 : (p[i] >> j) & 1) << low;
}

TF_INLINE void quant_tile(const uint8_t *w, int blocks, const uint8_t *x, const uint8_t *e, float *out, const int R,
                              const int bits, const int groups, const int k, const int has_min, const int shift) {
    float acc[4][16] = {{0}}, super_d[16] = {0}, super_m[16] = {0};
    for (int b = 0; b < blocks; b++) {
        if (k && b % TF_SUPER == 0) {
            for (int i = 0; i < 16; i++) super_d[i] = half_float(w + 2 * i);
            for (int i = 0; has_min && i < 16; i++) super_m[i] = half_float(w + 32 + 2 * i);
            w += has_min ? 64 : 32;
        }
        float d[2][16], m[2][16];
        fetch_ahead(w + AHEAD, bits + 1);
        for (int g = 0; g < groups; g++)
            for (int i = 0; i < 16; i++) {
                d[g][i] = k ? super_d[i] * (float)(int8_t)w[16 * g + i] : half_float(w + 2 * i);
                m[g][i] = !has_min ? 0 : k ? -super_m[i] * (float)(int8_t)w[16 * (groups + g) + i] : half_float(w + 32 + 2 * i);
            }
        w += (k ? 16 * groups : 32) * (has_min ? 2 : 1);
        uint8_t c[512];
        unpack_block(w, bits, c);
        w += 64 * bits;
        const float *xd = (const float *)(x + 32 * R), *xs = xd + R, *es = (const float *)e;
        const int32_t *xn = (const int32_t *)(xs + R), *en = (const int32_t *)(es + 2 * R);
        for (int r = 0; r < R; r++)
            for (int g = 0; g < groups; g++) {
                const int32_t n = groups == 1 ? xn[r] : en[g * R + r];
                const float s = groups == 1 ? xs[r] : es[g * R + r];
                int32_t sum[16];
                for (int i = 0; i < 16; i++) sum[i] = shift < 0 ? 0 : n * (1 << shift);
                for (int j = 8 / groups * g; j < 8 / groups * (g + 1); j++) {
                    const int8_t *q = (const int8_t *)x + 32 * r + 4 * j;
                    for (int i = 0; i < 16; i++)
                        for (int t = 0; t < 4; t++) sum[i] += c[64 * j + 4 * i + t] * q[t];
                }
                for (int i = 0; i < 16; i++) acc[r][i] += d[g][i] * xd[r] * (float)sum[i];
                for (int i = 0; has_min && i < 16; i++) acc[r][i] += m[g][i] * s;
            }
        x += 44 * R;
        e += 16 * R;
    }
    for (int r = 0; r < R; r++) memcpy(out + 16 * r, acc[r], sizeof acc[r]);
}

TF_INLINE void dense_tile(const uint8_t *w, int cols, const float *x, float *out, const int R, const int format) {
    float total[4][16] = {{0}};
    for (int k0 = 0; k0 < cols; k0 += TF_DENSE_CHUNK) {
        const int k1 = cols - k0 < TF_DENSE_CHUNK ? cols : k0 + TF_DENSE_CHUNK;
        float acc[4][16] = {{0}};
        for (int k = k0; k < k1; k++) {
            float v[16];
            for (int i = 0; i < 16; i++) v[i] = tf_dense_value(w, i, format);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < 16; i++) acc[r][i] += v[i] * x[r];
            w += format == TF_FORMAT_F32 ? 64 : 32;
            x += R;
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 16; i++) total[r][i] += acc[r][i];
    }
    for (int r = 0; r < R; r++) memcpy(out + 16 * r, total[r], sizeof total[r]);
}

TF_INLINE float largest_lane(vf x) { return vf_largest(x); }

/* The codes of a block as bytes, and the sums of its halves. */
TF_INLINE void store_codes(const vi *codes, int8_t *q, int32_t sums[2]) {
    int32_t c[TF_BLOCK];
    memcpy(c, codes, sizeof c);
    sums[0] = sums[1] = 0;
    for (int i = 0; i < TF_BLOCK; i++) {
        q[i] = (int8_t)c[i];
        sums[i / 16] += c[i];
    }
}
