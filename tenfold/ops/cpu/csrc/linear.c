/* The linear operation: y = act(norm(x) W^T + bias) + residual, over the thread pool.
 *
 * Activations are prepared (normalised, quantised) into groups of R rows; a unit of work is some weight tiles times some
 * rows. Arms differ in the largest R and in how units are cut and walked, never in the arithmetic of an output element:
 *   gemv   R up to 4; all rows of x against each tile
 *   flat   R up to 8: a tile is decoded once for 8 rows
 *   tiled  R up to 16; units cut in both directions, walked so that a group of rows stays in the first-level cache
 */
#include <stdlib.h>

#include "linear.h"

TF_VARIANTS(struct tf_linear_ops, tf_linear_ops)

enum {
    SMALL = 8192,        /* m * cols up to which every thread prepares all rows itself, instead of waiting for the others */
    UNIT_BYTES = 16384,  /* weights of a unit, at least, where there are units enough */
    UNITS_A_THREAD = 4,  /* at least, so that a slow thread can be helped */
    GROUP_BYTES = 262144, /* activations of a unit, at most: they stay in the second-level cache */
    GATED_TILES = 4, /* of gate, then of up: longer runs of memory than by turns, 10 % at batch 1 */
};

typedef struct {
    const tf_matrix *w;
    const struct tf_linear_ops *ops;
    const float *x, *norm_w;
    tf_epilogue after;
    float eps;
    int m, arm;
    int out_tiles;                           /* of the result; half the matrix where gated */
    int max_group;                           /* largest R */
    int unit_tiles, unit_rows, units_across; /* a unit, and how many of them cover the tiles */
    size_t xq_row, xe_row, xf_row;           /* bytes of a prepared row; 0: not needed */
    uint8_t *prepared;                       /* NULL: each thread prepares in its scratch */
    uint8_t ready[TF_MAX_THREADS];
} job;

static int group_at(const job *j, int row) {
    int R = j->max_group;
    while (R > j->m - row) R /= 2;
    return R;
}

static size_t prepared_bytes(const job *j) {
    const size_t rows = (size_t)j->m * (j->xq_row + j->xe_row + j->xf_row);
    return TF_CEIL(rows, TF_ALIGN) * TF_ALIGN;
}

static void prepare_group(const job *j, uint8_t *buffer, int row, int R, float *tmp) {
    const size_t m = (size_t)j->m, at = (size_t)row;
    uint8_t *xq = j->xq_row ? buffer + at * j->xq_row : NULL;
    uint8_t *xe = j->xe_row ? buffer + m * j->xq_row + at * j->xe_row : NULL;
    float *xf = j->xf_row ? (float *)(buffer + m * (j->xq_row + j->xe_row) + at * j->xf_row) : NULL;
    for (int r = 0; r < R; r++)
        j->ops->prepare(j->x + (at + r) * j->w->cols, r, R, j->w->cols, j->norm_w, j->eps, tmp, xq, xe, xf);
}

static void prepare_task(void *ctx, int tile, int thread) {
    const job *j = ctx;
    float *tmp = tf_scratch(thread, (size_t)j->w->cols * 4);
    const int row = tile * j->max_group, end = TF_MIN(row + j->max_group, j->m);
    for (int r = row, R; r < end; r += R) {
        R = group_at(j, r);
        prepare_group(j, j->prepared, r, R, tmp);
    }
}

/* The prepared rows, for a thread. */
static const uint8_t *prepared_rows(job *j, int thread) {
    if (j->prepared) return j->prepared;
    uint8_t *buffer = tf_scratch(thread, prepared_bytes(j) + (size_t)j->w->cols * 4);
    if (!j->ready[thread]) {
        float *tmp = (float *)(buffer + prepared_bytes(j));
        for (int row = 0, R; row < j->m; row += R) {
            R = group_at(j, row);
            prepare_group(j, buffer, row, R, tmp);
        }
        j->ready[thread] = 1;
    }
    return buffer;
}

static int log2_of(int R) { return __builtin_ctz((unsigned)R); }

/* A tile against a group of R rows -> v [R][16]. */
static void multiply(const job *j, const tf_segment *s, int tile, const uint8_t *buffer, int row, int R, float *v) {
    const uint8_t *w = s->data + (int64_t)tile * s->tile_bytes;
    const size_t m = (size_t)j->m, at = (size_t)row;
    const int i = log2_of(R);
    if (s->format < TF_QUANT_COUNT) {
        j->ops->quant[s->format][i](w, j->w->cols / TF_BLOCK, buffer + at * j->xq_row,
                                    buffer + m * j->xq_row + at * j->xe_row, v);
    } else {
        const uint8_t *xf = buffer + m * (j->xq_row + j->xe_row) + at * j->xf_row;
        j->ops->dense[s->format - TF_QUANT_COUNT][i](w, j->w->cols, (const float *)xf, v);
    }
}

static void output_tile(const job *j, const tf_segment *s, int t, const uint8_t *buffer, int row, int R) {
    float v[TF_TILE * 16];
    const int tile = t - s->tile0, left = s->rows - TF_TILE * tile;
    multiply(j, s, tile, buffer, row, R, v);
    j->ops->finish(v, NULL, R, &j->after, row, s->row0 + TF_TILE * tile, TF_MIN(TF_TILE, left));
}

/* Tiles t..end-1 of a gated result: all of the gate, then all of up, which lies at the same places of its half. Memory
 * is read in longer runs than by turns. */
static void gated_tiles(const job *j, int t, int end, const uint8_t *buffer, int row, int R) {
    float v[GATED_TILES][TF_TILE * 16], up[TF_TILE * 16];
    const tf_segment *gate = j->w->segment, *other = j->w->segments == 1 ? gate : gate + 1;
    const int up_tile = j->w->segments == 1 ? j->out_tiles : 0;
    for (int i = t; i < end; i++) multiply(j, gate, i, buffer, row, R, v[i - t]);
    for (int i = t; i < end; i++) {
        multiply(j, other, up_tile + i, buffer, row, R, up);
        j->ops->finish(v[i - t], up, R, &j->after, row, TF_TILE * i, TF_MIN(TF_TILE, j->after.cols - TF_TILE * i));
    }
}

static const tf_segment *segment_of(const tf_matrix *w, int tile) {
    const tf_segment *s = w->segment;
    while (tile >= s->tile0 + s->tiles) s++;
    return s;
}

/* Tiles t..end-1 of the result for a group of rows. */
static void output_tiles(const job *j, int t, int end, const uint8_t *buffer, int row, int R) {
    if (j->after.act)
        for (; t < end; t += GATED_TILES) gated_tiles(j, t, TF_MIN(t + GATED_TILES, end), buffer, row, R);
    else
        for (; t < end; t++) output_tile(j, segment_of(j->w, t), t, buffer, row, R);
}

static void unit_task(void *ctx, int unit, int thread) {
    job *j = ctx;
    const uint8_t *buffer = prepared_rows(j, thread);
    const int tile = unit % j->units_across * j->unit_tiles, tile_end = TF_MIN(tile + j->unit_tiles, j->out_tiles);
    const int row = unit / j->units_across * j->unit_rows, row_end = TF_MIN(row + j->unit_rows, j->m);
    const int together = j->arm == TF_ARM_TILED ? tile_end - tile : j->after.act ? GATED_TILES : 1;
    for (int t = tile; t < tile_end; t += together)
        for (int r = row, R; r < row_end; r += R) {
            R = group_at(j, r);
            output_tiles(j, t, TF_MIN(t + together, tile_end), buffer, r, R);
        }
}

/* Units large enough to be worth claiming, and enough of them for every thread to get several. */
static void cut_units(job *j) {
    const int wanted = UNITS_A_THREAD * tf_threads();
    const int64_t tile_bytes = j->w->segment[0].tile_bytes * (j->after.act ? 2 : 1);
    int tiles = (int)TF_MAX(j->after.act ? GATED_TILES : 1, UNIT_BYTES / tile_bytes), rows = j->m;
    if (j->arm == TF_ARM_TILED) {
        const int64_t row_bytes = (int64_t)(j->xq_row + j->xe_row + j->xf_row);
        rows = (int)TF_MAX(1, GROUP_BYTES / row_bytes / j->max_group) * j->max_group;
        rows = TF_MIN(rows, 8 * j->max_group);
    }
    rows = TF_MIN(rows, j->m);
    const int64_t across = TF_CEIL(j->m, rows);
    tiles = (int)TF_MIN(tiles, TF_MAX(1, j->out_tiles * across / wanted));
    j->unit_tiles = tiles;
    j->unit_rows = rows;
    j->units_across = TF_CEIL(j->out_tiles, tiles);
}

int tf_linear_rule(int m) { return m <= 4 ? TF_ARM_GEMV : m <= 8 ? TF_ARM_FLAT : TF_ARM_TILED; }

static void plan(job *j) {
    static const int group_of_arm[TF_ARM_COUNT] = {4, 8, 16};
    int quant = 0, two_scales = 0, dense = 0;
    for (int i = 0; i < j->w->segments; i++) {
        const int format = j->w->segment[i].format;
        if (format >= TF_QUANT_COUNT) dense = 1;
        else {
            quant = 1;
            two_scales |= tf_formats[format].groups == 2;
        }
    }
    const size_t cols = (size_t)j->w->cols;
    j->xq_row = quant ? cols / TF_BLOCK * TF_X_BYTES : 0;
    j->xe_row = two_scales ? cols / TF_BLOCK * TF_E_BYTES : 0;
    j->xf_row = dense ? cols * 4 : 0;
    if (j->arm < 0 || j->arm >= TF_ARM_COUNT) j->arm = tf_linear_rule(j->m);
    j->max_group = TF_MIN(group_of_arm[j->arm], j->ops->max_group);
    cut_units(j);
}

/* Whether the tiles of gate and up lie side by side: two segments of equal height, or one cut at a tile's edge. */
static int gate_matches_up(const tf_matrix *w) {
    const int half = w->rows / 2;
    if (w->segments == 2) return w->segment[0].rows == half;
    return w->segments == 1 && half % TF_TILE == 0;
}

static void run(job *j) {
    plan(j);
    if ((int64_t)j->m * j->w->cols > SMALL) {
        j->prepared = tf_shared(prepared_bytes(j));
        tf_parallel(TF_CEIL(j->m, j->max_group), prepare_task, j);
    }
    tf_parallel(j->units_across * TF_CEIL(j->m, j->unit_rows), unit_task, j);
}

typedef struct {
    const float *both;
    tf_epilogue after;
    const struct tf_linear_ops *ops;
} gate_job;

static void gate_task(void *ctx, int row, int thread) {
    const gate_job *g = ctx;
    (void)thread;
    const int half = g->after.cols;
    const float *gate = g->both + (size_t)row * 2 * half, *up = gate + half;
    float v[TF_TILE] = {0}, u[TF_TILE] = {0};
    for (int i = 0; i < half; i += TF_TILE) {
        const int count = TF_MIN(TF_TILE, half - i);
        memcpy(v, gate + i, 4 * (size_t)count);
        memcpy(u, up + i, 4 * (size_t)count);
        g->ops->finish(v, u, 1, &g->after, row, i, count);
    }
}

/* Gate and up whose tiles do not match: all sums first, then the gate. */
static void run_gate_apart(job *j) {
    const int half = j->w->rows / 2;
    float *both = malloc((size_t)j->m * j->w->rows * sizeof *both);
    if (!both) abort();
    gate_job g = {both, j->after, j->ops};
    g.after.bias = NULL;
    g.after.cols = half;
    j->after.act = TF_ACT_NONE;
    j->after.residual = NULL;
    j->after.out = both;
    run(j);
    tf_parallel(j->m, gate_task, &g);
    free(both);
}

void tf_linear(const tf_matrix *w, const float *x, int m, const float *norm_w, float norm_eps, const float *bias,
               const float *residual, int act, int arm, float *out) {
    if (m <= 0 || w->rows <= 0) return;
    job j = {.w = w, .ops = TF_PICK(tf_linear_ops), .x = x, .norm_w = norm_w, .eps = norm_eps, .m = m, .arm = arm,
             .out_tiles = w->tiles, .after = {out, bias, NULL, residual, w->rows, act}};
    tf_begin();
    if (act && !gate_matches_up(w)) {
        run_gate_apart(&j);
    } else {
        if (act) {
            j.after.cols = w->rows / 2;
            j.after.up_bias = bias ? bias + w->rows / 2 : NULL;
            j.out_tiles = w->segments == 2 ? w->segment[0].tiles : w->tiles / 2;
        }
        run(&j);
    }
    tf_end();
}
