/* The arithmetic of attention over pages; attention.h says in which order things are added. */
#include "attention_tile.h"

/* Tile number `tile` of the unit; past the last one it has no keys. */
static void locate(const unit_state *s, int tile, tile_keys *keys) {
    const tf_attend_args *a = s->a;
    const int32_t *pages = a->page_table + (int64_t)s->u->request * a->table_width;
    const int start = (s->u->first_tile + tile) * TF_KV_TILE;
    keys->start = start;
    keys->first = a->window > 0 ? TF_MAX(0, s->u->position - a->window + 1 - start) : 0;
    keys->last = tile < s->u->tiles ? TF_MIN(TF_KV_TILE - 1, s->u->position + s->u->queries - 1 - start) : -1;
    for (int j = keys->first; j <= keys->last;) {
        int page = (start + j) / a->page_size, offset = (start + j) % a->page_size;
        int64_t place = (((int64_t)pages[page] * a->kv_heads + s->u->kv_head) * a->page_size + offset) * a->head_dim;
        int end = TF_MIN(keys->last, j + a->page_size - 1 - offset);
        for (; j <= end; j++, place += a->head_dim) keys->at[j] = place;
    }
}

/* Ask for one row of keys or values before it is needed: pages lie scattered, so the processor cannot guess the next one. */
TF_INLINE void prefetch_row(const char *row, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

TF_INLINE void score_direct(const unit_state *s, int type, const tile_keys *tile) {
    const char *keys = s->a->keys, *values = s->a->values;
    const size_t size = tf_type_size(type);
    for (int j = tile->first; j <= tile->last; j += KEYS) {
        const void *key[KEYS];
        for (int k = 0; k < KEYS; k++) {
            const int64_t place = tile->at[TF_MIN(j + k, tile->last)];
            key[k] = keys + place * size;
            if (s->fetch) prefetch_row(values + place * size, s->a->head_dim * size);
        }
        score_rows(s, type, key, j);
    }
}

/* Scores of all rows against the keys of a tile; up to 3 scores after the last are written too. */
static void score_tile(const unit_state *s, const tile_keys *tile) {
    if (s->direct) {
        if (s->a->type == TF_F32)
            score_direct(s, TF_F32, tile);
        else if (s->a->type == TF_F16)
            score_direct(s, TF_F16, tile);
        else
            score_direct(s, TF_BF16, tile);
        return;
    }
    const void *key[KEYS];
    for (int k = 0; k < KEYS; k++) key[k] = s->wide + k * s->padded;
    for (int j = tile->first; j <= tile->last; j += KEYS) {
        for (int k = 0; k < KEYS; k++)
            widen_row(s, s->a->keys, tile->at[TF_MIN(j + k, tile->last)], s->wide + k * s->padded);
        score_rows(s, TF_F32, key, j);
    }
}

TF_INLINE void value_direct(const unit_state *s, int type, const tile_keys *tile, const tile_keys *next) {
    const void *value[TF_KV_TILE];
    const char *keys = s->a->keys, *values = s->a->values;
    const size_t size = tf_type_size(type);
    const int step = s->fetch || s->rows > FEW ? WIDENED : TF_KV_TILE; /* sums stay in registers for a step */
    int fetched = next->first;
    for (int j = tile->first; j <= tile->last; j++) value[j] = values + tile->at[j] * size;
    for (int j = tile->first; j <= tile->last; j += step) {
        if (s->fetch)
            for (int k = 0; k < WIDENED && fetched <= next->last; k++, fetched++)
                prefetch_row(keys + next->at[fetched] * size, s->a->head_dim * size);
        value_rows(s, type, value + j, j, TF_MIN(step, tile->last + 1 - j));
    }
}

static void sum_values(const unit_state *s, const tile_keys *tile, const tile_keys *next) {
    memset(s->sum, 0, (size_t)tf_padded(s->rows, ROWS) * s->padded * 4);
    if (s->direct) {
        if (s->a->type == TF_F32)
            value_direct(s, TF_F32, tile, next);
        else if (s->a->type == TF_F16)
            value_direct(s, TF_F16, tile, next);
        else
            value_direct(s, TF_BF16, tile, next);
        return;
    }
    const void *value[WIDENED];
    for (int k = 0; k < WIDENED; k++) value[k] = s->wide + k * s->padded;
    for (int j = tile->first; j <= tile->last; j += WIDENED) {
        const int count = TF_MIN(WIDENED, tile->last + 1 - j);
        for (int k = 0; k < count; k++) widen_row(s, s->a->values, tile->at[j + k], s->wide + k * s->padded);
        value_rows(s, TF_F32, value, j, count);
    }
}

/* m, l and sum of one tile, for all rows. keys: this tile's, already located, and room to locate the next one's. */
static void run_tile(const unit_state *s, int tile, tile_keys *keys, tile_keys *next) {
    score_tile(s, keys);
    locate(s, tile + 1, next);
    soften(s, keys);
    sum_values(s, keys, next);
}

static void whole(const tf_attend_args *a, const tf_unit *u, float *scratch) {
    const unit_state s = state_of(a, u, scratch);
    tile_keys keys[2];
    load_queries(&s);
    clear_total(&s);
    locate(&s, 0, &keys[0]);
    for (int tile = 0; tile < u->tiles; tile++) {
        run_tile(&s, tile, &keys[tile & 1], &keys[~tile & 1]);
        fold_tile(&s, s.sum, s.padded);
    }
    write_out(&s);
}

static void part(const tf_attend_args *a, const tf_unit *u, int begin, int end, float *scratch) {
    const unit_state s = state_of(a, u, scratch);
    tile_keys keys[2];
    load_queries(&s);
    locate(&s, begin, &keys[begin & 1]);
    for (int tile = begin; tile < end; tile++) {
        run_tile(&s, tile, &keys[tile & 1], &keys[~tile & 1]);
        save_partial(&s, tile);
    }
}

static void fold(const tf_attend_args *a, const tf_unit *u, float *scratch) {
    const unit_state s = state_of(a, u, scratch);
    fold_partials(&s);
    write_out(&s);
}

const struct tf_attention_ops TF_NAME(tf_attention_ops) = {TF_W, whole, part, fold};
