/* Operations on single rows, spread over the threads where there is enough to do. */
#include "ops.h"

TF_VARIANTS(struct tf_elementwise_ops, tf_elementwise_ops)

enum {
    TILE_FLOATS = 8192,   /* what one tile should touch: a few microseconds of work, far more than claiming it costs */
    ARGMAX_CHUNK = 16384, /* floats of one argmax tile */
};

typedef struct {
    const void *args;
    int64_t rows, rows_per_tile;
    int64_t *partial;
} row_job;

static row_job job_of(const void *args, int64_t rows, int64_t floats_per_row) {
    int64_t per_tile = TF_MAX(1, TILE_FLOATS / TF_MAX(1, floats_per_row));
    return (row_job){args, rows, per_tile, NULL};
}

static void run(row_job *job, tf_task task) { tf_parallel((int)TF_CEIL(job->rows, job->rows_per_tile), task, job); }

#define TF_ROW_TASK(name, kernel)                                                 \
    static void name(void *ctx, int tile, int thread) {                           \
        const row_job *job = ctx;                                                 \
        (void)thread;                                                             \
        int64_t end = TF_MIN(job->rows, (tile + 1) * job->rows_per_tile);         \
        for (int64_t row = tile * job->rows_per_tile; row < end; row++)           \
            TF_PICK(tf_elementwise_ops)->kernel(job->args, row);                  \
    }

TF_ROW_TASK(norm_tile, norm_row)
TF_ROW_TASK(gather_tile, gather_row)
TF_ROW_TASK(rope_write_tile, rope_write_token)

void tf_norm(const tf_norm_args *a) {
    row_job job = job_of(a, a->rows, a->cols);
    run(&job, norm_tile);
}

void tf_gather(const tf_gather_args *a) {
    row_job job = job_of(a, a->rows, a->cols);
    run(&job, gather_tile);
}

void tf_rope_write(const tf_rope_write_args *a) {
    row_job job = job_of(a, a->tokens, (int64_t)(a->heads + 2 * a->kv_heads) * a->head_dim * 2);
    run(&job, rope_write_tile);
}

void tf_rows(const tf_rows_args *a) { tf_matrix_rows(a->matrix, a->ids, a->rows, a->scale, a->out); }

void tf_linear_call(const tf_linear_args *a) {
    tf_linear(a->w, a->x, a->rows, a->norm_weight, a->eps, a->bias, a->residual, a->act, a->arm, a->out);
}

static void argmax_tile(void *ctx, int tile, int thread) {
    const row_job *job = ctx;
    const tf_argmax_args *a = job->args;
    (void)thread;
    int64_t chunks = job->rows_per_tile, row = tile / chunks, first = tile % chunks * ARGMAX_CHUNK;
    const float *x = a->logits + row * a->cols + first;
    job->partial[tile] = first + TF_PICK(tf_elementwise_ops)->argmax(x, TF_MIN(ARGMAX_CHUNK, a->cols - first));
}

void tf_argmax(const tf_argmax_args *a) {
    int64_t chunks = TF_CEIL(a->cols, ARGMAX_CHUNK);
    if (a->rows <= 0) return;
    tf_begin();
    row_job job = {a, a->rows, chunks, tf_shared((size_t)(a->rows * chunks) * sizeof(int64_t))};
    tf_parallel((int)(a->rows * chunks), argmax_tile, &job);
    for (int64_t row = 0; row < a->rows; row++) {
        const float *x = a->logits + row * a->cols;
        const int64_t *found = job.partial + row * chunks;
        int64_t best = found[0];
        for (int64_t c = 1; c < chunks; c++)
            if (x[found[c]] > x[best]) best = found[c];
        a->out[row] = best;
    }
    tf_end();
}

void tf_map(const tf_map_args *a) { TF_PICK(tf_elementwise_ops)->map(a); }
