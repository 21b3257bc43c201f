/* The flat arguments of every operation but the packing of weights. native.py writes them with `struct`; the order and the
 * widths of the fields are the interface. All tensors are contiguous; a type is an enum tf_type (0 float32, 1 float16, 2 bfloat16). */
#ifndef TENFOLD_OPS_H
#define TENFOLD_OPS_H

#include "linear.h"

typedef struct {
    const float *x, *weight, *add; /* add, where not NULL: out = add + norm(x) */
    float *out;
    int64_t rows, cols;
    float eps;
} tf_norm_args;

typedef struct {
    const void *table; /* [.., cols] of `type` */
    const int64_t *ids;
    float *out;
    int64_t rows, cols;
    int32_t type;
    float scale;
} tf_gather_args;

typedef struct {
    const tf_matrix *matrix;
    const int64_t *ids;
    float *out;
    int32_t rows;
    float scale;
} tf_rows_args;

typedef struct {
    const tf_matrix *w;
    const float *x, *norm_weight, *bias, *residual;
    float *out;
    int32_t rows;
    float eps;
    int32_t act, arm;
} tf_linear_args;

typedef struct {
    const float *qkv, *table;           /* [T, (heads + 2 kv_heads) * head_dim], [P, rotary_dim] */
    const int32_t *positions, *slots;   /* a negative slot is not written */
    void *keys, *values;                /* [pages, kv_heads, page_size, head_dim] of `type` */
    const float *q_norm, *k_norm;       /* [head_dim] or NULL */
    float *out;                         /* [T, heads * head_dim] */
    int32_t tokens, heads, kv_heads, head_dim, rotary_dim, page_size, type;
    float q_eps, k_eps;
} tf_rope_write_args;

typedef struct {
    const float *q;                     /* [T, heads * head_dim] */
    const void *keys, *values;          /* [pages, kv_heads, page_size, head_dim] of `type` */
    const int32_t *page_table;          /* [requests, table_width] */
    const int32_t *query_start, *kv_lengths; /* [requests + 1], [requests] */
    float *out, *lse;                   /* [T, heads * head_dim]; [T, heads] or NULL */
    int32_t requests, table_width, heads, kv_heads, head_dim, page_size, type, window;
    float scale, softcap;
} tf_attend_args;

typedef struct {
    const float *logits; /* [rows, cols] */
    int64_t *out;
    int64_t rows, cols;
} tf_argmax_args;

typedef struct {
    const float *x;
    float *out;
    int64_t count;
    int32_t function; /* 0 exp, 1 tanh */
} tf_map_args;

TF_EXPORT void tf_norm(const tf_norm_args *args);
TF_EXPORT void tf_gather(const tf_gather_args *args);
TF_EXPORT void tf_rows(const tf_rows_args *args);
TF_EXPORT void tf_linear_call(const tf_linear_args *args);
TF_EXPORT void tf_rope_write(const tf_rope_write_args *args);
TF_EXPORT void tf_attend(const tf_attend_args *args);
TF_EXPORT void tf_argmax(const tf_argmax_args *args);
TF_EXPORT void tf_map(const tf_map_args *args); /* the functions kernels are made of, for tests of their accuracy */

/* One row, token or piece of each; elementwise_simd.c. */
struct tf_elementwise_ops {
    void (*norm_row)(const tf_norm_args *args, int64_t row);
    void (*gather_row)(const tf_gather_args *args, int64_t row);
    void (*rope_write_token)(const tf_rope_write_args *args, int token);
    int64_t (*argmax)(const float *x, int64_t n); /* the first of the largest */
    void (*map)(const tf_map_args *args);
};

#endif
