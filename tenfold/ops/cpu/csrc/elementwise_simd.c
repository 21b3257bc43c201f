/* Norm, embedding rows, rotary positions with the write into the pages, argmax: one row or token a call. */
#include "heads.h"

#include "ops.h"

static void norm_row(const tf_norm_args *a, int64_t row) {
    const float *x = a->x + row * a->cols;
    const float *add = a->add ? a->add + row * a->cols : NULL;
    scale_row(x, a->weight, add, inverse_rms(x, a->cols, a->eps), a->out + row * a->cols, a->cols);
}

static void gather_row(const tf_gather_args *a, int64_t row) {
    float *out = a->out + row * a->cols;
    const char *from = (const char *)a->table + a->ids[row] * a->cols * tf_type_size(a->type);
    if (a->type == TF_F16)
        widen(TF_F16, from, out, a->cols);
    else if (a->type == TF_BF16)
        widen(TF_BF16, from, out, a->cols);
    else
        widen(TF_F32, from, out, a->cols);
    if (a->scale != 1.0f)
        for (int64_t i = 0; i < a->cols; i++) out[i] *= a->scale;
}

static void rope_write_token(const tf_rope_write_args *a, int token) {
    const int n = a->head_dim, half = a->rotary_dim / 2;
    const float *q = a->qkv + (int64_t)token * (a->heads + 2 * a->kv_heads) * n;
    const float *k = q + (int64_t)a->heads * n, *v = k + (int64_t)a->kv_heads * n;
    const float *cosines = half ? a->table + (int64_t)a->positions[token] * a->rotary_dim : NULL;
    float *out = a->out + (int64_t)token * a->heads * n;
    for (int h = 0; h < a->heads; h++) rotate_head(q + h * n, a->q_norm, a->q_eps, cosines, half, n, out + h * n);
    if (a->slots[token] < 0) return;
    const int64_t page = a->slots[token] / a->page_size, offset = a->slots[token] % a->page_size;
    const size_t size = tf_type_size(a->type);
    float rotated[LONGEST_HEAD];
    for (int h = 0; h < a->kv_heads; h++) {
        size_t at = (size_t)((page * a->kv_heads + h) * a->page_size + offset) * n * size;
        rotate_head(k + h * n, a->k_norm, a->k_eps, cosines, half, n, rotated);
        narrow_any(a->type, rotated, (char *)a->keys + at, n);
        narrow_any(a->type, v + h * n, (char *)a->values + at, n);
    }
}

static int64_t argmax(const float *x, int64_t n) {
    vf best[4];
    for (int k = 0; k < 4; k++) best[k] = vf_set(-INFINITY);
    int64_t i = 0;
    for (; i + 4 * TF_W <= n; i += 4 * TF_W)
        for (int k = 0; k < 4; k++) best[k] = vf_max(best[k], vf_load(x + i + k * TF_W));
    float largest = vf_largest(vf_max(vf_max(best[0], best[1]), vf_max(best[2], best[3])));
    for (; i < n; i++)
        if (x[i] > largest) largest = x[i];
    for (i = 0; i + TF_W <= n; i += TF_W) { /* whole vectors that do not hold it are passed over */
        vi equal = vf_load(x + i) == largest;
        int32_t any = 0;
        for (int l = 0; l < TF_W; l++) any |= equal[l];
        if (any) break;
    }
    for (; i < n; i++)
        if (x[i] == largest) return i;
    return 0;
}

static void map(const tf_map_args *a) {
    for (int64_t i = 0; i < a->count; i += TF_W) {
        vf x = {0};
        size_t bytes = (size_t)TF_MIN(TF_W, a->count - i) * 4;
        memcpy(&x, a->x + i, bytes);
        x = a->function == 0 ? vf_exp(x) : vf_tanh(x);
        memcpy(a->out + i, &x, bytes);
    }
}

const struct tf_elementwise_ops TF_NAME(tf_elementwise_ops) = {norm_row, gather_row, rope_write_token, argmax, map};
