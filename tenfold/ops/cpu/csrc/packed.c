/* Packed caches: tokens are written one a tile; attention is cut as over ordinary pages, with one query a unit, because each
 * has a window of its own. */
#include "packed.h"

TF_VARIANTS(struct tf_packed_ops, tf_packed_ops)

static void write_tile(void *ctx, int tile, int thread) {
    const tf_rope_write_packed_args *a = ctx;
    const struct tf_packed_ops *ops = TF_PICK(tf_packed_ops);
    ops->write_token(a, tile, tf_scratch(thread, (size_t)ops->write_floats(a->layer) * sizeof(float)));
}

void tf_rope_write_packed(const tf_rope_write_packed_args *a) { tf_parallel(a->tokens, write_tile, (void *)a); }

void tf_attend_packed(const tf_attend_packed_args *a) {
    const struct tf_packed_ops *ops = TF_PICK(tf_packed_ops);
    const tf_attend_plan plan = {&ops->attention, 1, ops->attend_floats(a)};
    tf_attend_units(&a->base, &plan);
}
