/* What a tile of keys does to the rows of a unit, wherever the keys come from; for sources of variants. attention.h says in
 * which order things are added. */
#ifndef TENFOLD_ATTENTION_TILE_H
#define TENFOLD_ATTENTION_TILE_H

#include "simd.h"

#include "attention.h"

#if defined(__AVX512F__) || defined(__aarch64__)
enum { ROWS = 4 }; /* 32 registers */
#else
enum { ROWS = 2 };
#endif
enum {
    KEYS = 4,     /* scored together */
    CHUNKS = 4,   /* vectors of a sum held in registers */
    WIDENED = 16, /* values widened at a time */
    FEW = 8,      /* rows up to which keys and values are read once, where they lie, and waiting for memory is what counts */
};

typedef struct {
    const tf_attend_args *a;
    const tf_unit *u;
    int rows, padded;  /* padded: head_dim in whole vectors, as floats */
    int direct;        /* keys and values are read where they lie, not through `wide` */
    int fetch;         /* ask for keys and values ahead of their use */
    float *q, *sum, *total, *scores, *wide;
    float *m, *l, *all_m, *all_l, *keep, *add;
} unit_state;

static inline unit_state state_of(const tf_attend_args *a, const tf_unit *u, float *scratch) {
    unit_state s = {.a = a, .u = u, .rows = u->queries * u->heads, .padded = (int)tf_padded(a->head_dim, TF_W)};
    s.direct = s.padded == a->head_dim && (a->type == TF_F32 || s.rows <= FEW);
    s.fetch = s.direct && s.rows > 1 && s.rows <= FEW; /* for one row the processor is quick enough by itself */
    const int64_t block = (int64_t)s.padded * TF_UNIT_ROWS;
    s.q = scratch;
    s.sum = s.q + block;
    s.total = s.sum + block;
    s.wide = s.total + block;
    s.scores = s.wide + (int64_t)s.padded * WIDENED;
    s.m = s.scores + TF_UNIT_ROWS * TF_KV_TILE;
    s.l = s.m + TF_UNIT_ROWS;
    s.all_m = s.l + TF_UNIT_ROWS;
    s.all_l = s.all_m + TF_UNIT_ROWS;
    s.keep = s.all_l + TF_UNIT_ROWS;
    s.add = s.keep + TF_UNIT_ROWS;
    return s;
}

/* Rows that fill the last group of ROWS repeat the last one; what comes of them is not used. */
static inline void load_queries(const unit_state *s) {
    const int n = s->a->head_dim, filled = (int)tf_padded(s->rows, ROWS);
    for (int row = 0; row < filled; row++) {
        int r = TF_MIN(row, s->rows - 1), query = r / s->u->heads, head = s->u->head + r % s->u->heads;
        float *to = s->q + row * s->padded;
        memcpy(to, s->a->q + ((int64_t)(s->u->token + query) * s->a->heads + head) * n, (size_t)n * 4);
        for (int i = n; i < s->padded; i++) to[i] = 0.0f;
    }
}

/* Keys first..last of a tile that begins at position `start` are seen by some row of the unit; at[j]: where key j and its value
 * begin in keys and values, in elements. */
typedef struct {
    int start, first, last;
    int64_t at[TF_KV_TILE];
} tile_keys;

/* One row of keys or values as padded floats. */
TF_INLINE void widen_row(const unit_state *s, const void *rows, int64_t at, float *to) {
    const int n = s->a->head_dim, type = s->a->type;
    const char *from = (const char *)rows + at * tf_type_size(type);
    if (type == TF_F16)
        widen(TF_F16, from, to, n);
    else if (type == TF_BF16)
        widen(TF_BF16, from, to, n);
    else
        widen(TF_F32, from, to, n);
    for (int i = n; i < s->padded; i++) to[i] = 0.0f;
}

/* scores[r][k] = q[r] . key[k] for R rows and 4 keys. */
TF_INLINE void score_block(int R, int type, const float *q, const void *const key[KEYS], int padded, float *scores) {
    vf sums[4][KEYS];
    for (int r = 0; r < R; r++)
        for (int k = 0; k < KEYS; k++) sums[r][k] = vf_set(0.0f);
    for (int i = 0; i < padded; i += TF_W) {
        vf k0 = vf_load_type(type, key[0], i), k1 = vf_load_type(type, key[1], i);
        vf k2 = vf_load_type(type, key[2], i), k3 = vf_load_type(type, key[3], i);
        for (int r = 0; r < R; r++) {
            vf x = vf_load(q + r * padded + i);
            sums[r][0] = vf_fma(x, k0, sums[r][0]);
            sums[r][1] = vf_fma(x, k1, sums[r][1]);
            sums[r][2] = vf_fma(x, k2, sums[r][2]);
            sums[r][3] = vf_fma(x, k3, sums[r][3]);
        }
    }
    if (R == 4)
        vf_sum_4x4((const vf(*)[KEYS])sums, scores, TF_KV_TILE);
    else
        for (int r = 0; r < R; r++) vf_sum_4(sums[r], scores + r * TF_KV_TILE);
}

TF_INLINE void score_rows(const unit_state *s, int type, const void *const key[KEYS], int j) {
    int row = 0;
    if (s->rows < ROWS) {
        if (s->rows == 1) score_block(1, type, s->q, key, s->padded, s->scores + j);
        if (ROWS > 2 && s->rows == 2) score_block(2, type, s->q, key, s->padded, s->scores + j);
        if (ROWS > 2 && s->rows == 3) score_block(3, type, s->q, key, s->padded, s->scores + j);
        return;
    }
    for (; row < s->rows; row += ROWS)
        score_block(ROWS, type, s->q + row * s->padded, key, s->padded, s->scores + row * TF_KV_TILE + j);
}

/* Scaled and capped scores of one row, in whole vectors begin..end-1, and their maximum. Keys outside from..to count as -infinity. */
TF_INLINE float scale_scores(const tf_attend_args *a, float *x, int begin, int end, int masked, int from, int to) {
    vf largest = vf_set(-INFINITY);
    const vf inverse_cap = vf_set(a->softcap > 0 ? 1.0f / a->softcap : 0.0f);
    vi lanes;
    for (int i = 0; i < TF_W; i++) lanes[i] = i;
    for (int j = begin; j < end; j += TF_W) {
        vf v = vf_load(x + j) * a->scale;
        if (a->softcap > 0) v = vf_tanh(v * inverse_cap) * a->softcap;
        if (masked) v = vf_select((lanes + j >= from) & (lanes + j <= to), v, vf_set(-INFINITY));
        largest = vf_max(largest, v);
        vf_store(x + j, v);
    }
    return vf_largest(largest);
}

/* Scores to exp(s - m), with m and l of each row. A row sees keys from..to of the tile; outside, up to whole vectors, it gets 0. */
static inline void soften(const unit_state *s, const tile_keys *tile) {
    const tf_attend_args *a = s->a;
    const int start = tile->start, first = tile->first, last = tile->last;
    const int begin = first / TF_W * TF_W, end = (int)tf_padded(last + 1, TF_W);
    for (int row = 0; row < s->rows; row++) {
        const int position = s->u->position + row / s->u->heads, to = TF_MIN(last, position - start);
        const int from = a->window > 0 ? TF_MAX(first, position - a->window + 1 - start) : first;
        float *x = s->scores + row * TF_KV_TILE;
        const float m = from <= begin && to >= end - 1 ? scale_scores(a, x, begin, end, 0, 0, 0)
                                                       : scale_scores(a, x, begin, end, 1, from, to);
        const vf shift = vf_set(m == -INFINITY ? 0.0f : m);
        vf sum = vf_set(0.0f);
        for (int j = begin; j < end; j += TF_W) {
            vf p = vf_exp(vf_load(x + j) - shift);
            sum += p;
            vf_store(x + j, p);
        }
        s->m[row] = m;
        s->l[row] = vf_sum(sum);
    }
}

/* sum[r] += p[r][j] * value[j], j in order, for R rows and C vectors. */
TF_INLINE void value_block(int R, int C, int type, const float *p, const void *const *value, int64_t column, int count,
                           float *sum, int padded) {
    vf sums[4][CHUNKS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = vf_load(sum + r * padded + c * TF_W);
    for (int j = 0; j < count; j++) {
        vf v[CHUNKS];
        for (int c = 0; c < C; c++) v[c] = vf_load_type(type, value[j], column + c * TF_W);
        for (int r = 0; r < R; r++) {
            vf x = vf_set(p[r * TF_KV_TILE + j]);
            for (int c = 0; c < C; c++) sums[r][c] = vf_fma(x, v[c], sums[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) vf_store(sum + r * padded + c * TF_W, sums[r][c]);
}

TF_INLINE void value_columns(int R, int type, const float *p, const void *const *value, int count, float *sum, int padded) {
    int i = 0;
    for (; i + CHUNKS * TF_W <= padded; i += CHUNKS * TF_W) value_block(R, CHUNKS, type, p, value, i, count, sum + i, padded);
    for (; i < padded; i += TF_W) value_block(R, 1, type, p, value, i, count, sum + i, padded);
}

TF_INLINE void value_rows(const unit_state *s, int type, const void *const *value, int j, int count) {
    const float *p = s->scores + j;
    if (s->rows < ROWS) {
        if (s->rows == 1) value_columns(1, type, p, value, count, s->sum, s->padded);
        if (ROWS > 2 && s->rows == 2) value_columns(2, type, p, value, count, s->sum, s->padded);
        if (ROWS > 2 && s->rows == 3) value_columns(3, type, p, value, count, s->sum, s->padded);
        return;
    }
    for (int row = 0; row < s->rows; row += ROWS)
        value_columns(ROWS, type, p + row * TF_KV_TILE, value, count, s->sum + row * s->padded, s->padded);
}

static inline void clear_total(const unit_state *s) {
    memset(s->total, 0, (size_t)s->rows * s->padded * 4);
    for (int row = 0; row < TF_UNIT_ROWS; row++) {
        s->all_m[row] = s->m[row] = -INFINITY;
        s->all_l[row] = s->l[row] = 0.0f;
    }
}

/* Add the partial result (m, l, and rows of sums `stride` floats apart) to the total. A row that saw no key in the tile keeps its bits. */
static inline void fold_tile(const unit_state *s, const float *sum, int64_t stride) {
    for (int row = 0; row < s->rows; row += TF_W) {
        vf old = vf_load(s->all_m + row), m = vf_load(s->m + row), both = vf_max(old, m);
        vf keep = vf_select(m == -INFINITY, vf_set(1.0f), vf_exp(old - both));
        vf add = vf_select(m == -INFINITY, vf_set(0.0f), vf_exp(m - both));
        vf_store(s->keep + row, keep);
        vf_store(s->add + row, add);
        vf_store(s->all_m + row, both);
        vf_store(s->all_l + row, vf_fma(vf_load(s->l + row), add, vf_load(s->all_l + row) * keep));
    }
    for (int row = 0; row < s->rows; row++) {
        float *total = s->total + row * s->padded;
        const float *from = sum + row * stride;
        vf keep = vf_set(s->keep[row]), add = vf_set(s->add[row]);
        for (int i = 0; i < s->padded; i += TF_W) vf_store(total + i, vf_fma(vf_load(from + i), add, vf_load(total + i) * keep));
    }
}

static inline void write_out(const unit_state *s) {
    const tf_attend_args *a = s->a;
    for (int row = 0; row < s->rows; row++) {
        int64_t at = (int64_t)(s->u->token + row / s->u->heads) * a->heads + s->u->head + row % s->u->heads;
        const float *total = s->total + row * s->padded, l = s->all_l[row], by = l > 0.0f ? 1.0f / l : 0.0f;
        float *out = a->out + at * a->head_dim;
        for (int i = 0; i < a->head_dim; i++) out[i] = total[i] * by;
        if (a->lse) a->lse[at] = l > 0.0f ? s->all_m[row] + logf(l) : -INFINITY;
    }
}

/* m, l and sum of one tile, for all rows, to the unit's partial results. */
static inline void save_partial(const unit_state *s, int tile) {
    const int64_t stride = tf_partial_floats(s->a, TF_W);
    for (int row = 0; row < s->rows; row++) {
        float *to = s->u->partials + ((int64_t)tile * s->rows + row) * stride;
        memcpy(to, s->sum + row * s->padded, (size_t)s->padded * 4);
        to[s->padded] = s->m[row];
        to[s->padded + 1] = s->l[row];
    }
}

/* The total of all tiles, from the unit's partial results. */
static inline void fold_partials(const unit_state *s) {
    const int64_t stride = tf_partial_floats(s->a, TF_W);
    clear_total(s);
    for (int tile = 0; tile < s->u->tiles; tile++) {
        const float *from = s->u->partials + (int64_t)tile * s->rows * stride;
        for (int row = 0; row < s->rows; row++) {
            s->m[row] = from[row * stride + s->padded];
            s->l[row] = from[row * stride + s->padded + 1];
        }
        fold_tile(s, from, stride);
    }
}

#endif
