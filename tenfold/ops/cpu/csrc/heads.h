/* Norm, rotation and storage of one head, or row; for sources of variants. */
#ifndef TENFOLD_HEADS_H
#define TENFOLD_HEADS_H

#include "simd.h"

enum { LONGEST_HEAD = 1024 };

/* 1 / sqrt(mean(x^2) + eps); the order of the sum depends on n only. */
TF_INLINE float inverse_rms(const float *x, int64_t n, float eps) {
    vf sums[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * TF_W <= n; i += 4 * TF_W)
        for (int k = 0; k < 4; k++) {
            vf v = vf_load(x + i + k * TF_W);
            sums[k] = vf_fma(v, v, sums[k]);
        }
    for (; i + TF_W <= n; i += TF_W) {
        vf v = vf_load(x + i);
        sums[0] = vf_fma(v, v, sums[0]);
    }
    float sum = vf_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / (float)n + eps);
}

TF_INLINE void scale_row(const float *x, const float *weight, const float *add, float by, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + TF_W <= n; i += TF_W) {
        vf y = vf_load(x + i) * by * vf_load(weight + i);
        vf_store(out + i, add ? vf_load(add + i) + y : y);
    }
    for (; i < n; i++) {
        float y = x[i] * by * weight[i];
        out[i] = add ? add[i] + y : y;
    }
}

/* One head of q or k: norm, rotation of the first 2 * half features, copy of the others. */
TF_INLINE void rotate_head(const float *x, const float *norm, float eps, const float *cosines, int half, int n, float *out) {
    const float *sines = cosines + half;
    if (norm) {
        scale_row(x, norm, NULL, inverse_rms(x, n, eps), out, n);
        x = out;
    }
    int i = 0;
    for (; i + TF_W <= half; i += TF_W) {
        vf a = vf_load(x + i), b = vf_load(x + half + i), c = vf_load(cosines + i), s = vf_load(sines + i);
        vf_store(out + i, a * c - b * s);
        vf_store(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        out[i] = a * cosines[i] - b * sines[i];
        out[half + i] = b * cosines[i] + a * sines[i];
    }
    if (x != out) memcpy(out + 2 * half, x + 2 * half, (size_t)(n - 2 * half) * 4);
}

TF_INLINE void narrow_any(int type, const float *from, void *to, int n) {
    if (type == TF_F16)
        narrow(TF_F16, from, to, n);
    else if (type == TF_BF16)
        narrow(TF_BF16, from, to, n);
    else
        memcpy(to, from, (size_t)n * 4);
}

#endif
