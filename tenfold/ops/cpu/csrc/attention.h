/* Attention over pages: units, tiles and partial results, shared by attention.c (who does what) and the sources of the arithmetic,
 * attention_simd.c and packed_simd.c, which have attention_tile.h in common.
 *
 * Keys are cut into tiles of TF_KV_TILE at fixed positions of the sequence. A tile gives each query row its own partial result
 * (maximum m, sum l of exp(s - m), the sum of exp(s - m) v); partial results are folded together from the first tile to the last.
 * Within a tile, sums run over keys in order. So the bits of a row depend on its query, its keys and its place in the
 * sequence only: not on the rows beside it, on how the prompt was cut into steps, or on which thread did which tile.
 */
#ifndef TENFOLD_ATTENTION_H
#define TENFOLD_ATTENTION_H

#include <stdatomic.h>

#include "ops.h"

enum {
    TF_KV_TILE = 64,  /* keys */
    TF_UNIT_ROWS = 48, /* query rows of a unit at most; a row is one head of one query */
};

/* Queries of one request times query heads that share one kv head: the rows that read the same keys. Row = query * heads + head. */
typedef struct {
    int32_t request, kv_head, head, heads;
    int32_t token, queries;     /* first query as a token of the step */
    int32_t position;           /* place of the first query in the sequence */
    int32_t first_tile, tiles;  /* tiles that any row sees */
    float *partials;            /* [tiles][rows][tf_partial_floats] when the unit is shared between items, else NULL */
    _Atomic int32_t items_left; /* of a shared unit; who finishes the last one folds */
} tf_unit;

struct tf_attention_ops {
    int32_t width; /* floats of a vector */
    /* All tiles of a unit, to the end. */
    void (*whole)(const tf_attend_args *args, const tf_unit *unit, float *scratch);
    /* Tiles begin..end-1 (counted from first_tile) into unit->partials, and the fold of all of them. */
    void (*part)(const tf_attend_args *args, const tf_unit *unit, int begin, int end, float *scratch);
    void (*fold)(const tf_attend_args *args, const tf_unit *unit, float *scratch);
};

/* Who does the arithmetic of an attention. */
typedef struct {
    const struct tf_attention_ops *ops;
    int32_t queries;        /* of a unit at most */
    int64_t scratch_floats; /* of a thread */
} tf_attend_plan;

/* All units of an attention, over the threads. */
void tf_attend_units(const tf_attend_args *args, const tf_attend_plan *plan);

TF_INLINE int64_t tf_padded(int64_t n, int64_t width) { return (n + width - 1) / width * width; }
/* A row of partials: the sum over keys [head_dim padded to the vector], then m and l. */
TF_INLINE int64_t tf_partial_floats(const tf_attend_args *a, int width) { return tf_padded(a->head_dim, width) + width; }
/* queries, sums of a tile, sums in all: [rows][padded head_dim]; scores [rows][tile]; widened keys or values [16][padded]; m, l, M, L, and two factors. */
TF_INLINE int64_t tf_attend_scratch_floats(const tf_attend_args *a, int width) {
    return tf_padded(a->head_dim, width) * (3 * TF_UNIT_ROWS + 16) + TF_UNIT_ROWS * (TF_KV_TILE + 6) + 16 * width;
}

#endif
