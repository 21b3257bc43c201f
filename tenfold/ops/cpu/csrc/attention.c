/* Who computes which part of an attention: units of rows that share keys, and items, the tiles of a unit one thread does in a row.
 * How the work is cut depends on the threads and on the batch; the result does not (attention.h). */
#include "attention.h"

TF_VARIANTS(struct tf_attention_ops, tf_attention_ops)

enum {
    ITEMS_PER_THREAD = 4,      /* so that the last items of a job end at about the same time */
    SMALL_PRODUCTS = 1 << 17,  /* less work than this is not worth waking a thread */
};

typedef struct {
    int32_t unit, begin, end;
} item;

typedef struct {
    const tf_attend_args *args;
    const tf_attend_plan *plan;
    tf_unit *units;
    item *items;
    int count;
} attend_job;

static int32_t first_key(const tf_attend_args *a, int32_t position) {
    return a->window > 0 ? TF_MAX(0, position - a->window + 1) : 0;
}

static int heads_per_unit(const tf_attend_args *a) { return TF_MIN(a->heads / a->kv_heads, TF_UNIT_ROWS); }

static int queries_per_unit(const attend_job *job) {
    return TF_MIN(TF_UNIT_ROWS / heads_per_unit(job->args), job->plan->queries);
}

static int64_t count_units(const attend_job *job) {
    const tf_attend_args *a = job->args;
    const int group = a->heads / a->kv_heads, heads = heads_per_unit(a), queries = queries_per_unit(job);
    int64_t units = 0;
    for (int r = 0; r < a->requests; r++)
        units += (int64_t)TF_CEIL(a->query_start[r + 1] - a->query_start[r], queries) * a->kv_heads * TF_CEIL(group, heads);
    return units;
}

static tf_unit *add_unit(const tf_attend_args *a, tf_unit *u, int request, int kv_head, int first, int count) {
    const int group = a->heads / a->kv_heads, heads = heads_per_unit(a);
    const int start = a->query_start[request], queries = a->query_start[request + 1] - start;
    const int position = a->kv_lengths[request] - queries + first, last = position + count - 1;
    for (int head = 0; head < group; head += heads, u++) {
        u->request = request;
        u->kv_head = kv_head;
        u->head = kv_head * group + head;
        u->heads = TF_MIN(heads, group - head);
        u->token = start + first;
        u->queries = count;
        u->position = position;
        u->first_tile = first_key(a, position) / TF_KV_TILE;
        u->tiles = last < 0 ? 0 : last / TF_KV_TILE - u->first_tile + 1;
        u->partials = NULL;
    }
    return u;
}

/* The last queries of a prompt see most keys; they come first, so that no long item is left for the end. */
static void list_units(const attend_job *job) {
    const tf_attend_args *a = job->args;
    const int block = queries_per_unit(job);
    tf_unit *u = job->units;
    for (int r = 0; r < a->requests; r++) {
        const int queries = a->query_start[r + 1] - a->query_start[r];
        for (int first = (queries - 1) / block * block; queries > 0 && first >= 0; first -= block)
            for (int h = 0; h < a->kv_heads; h++) u = add_unit(a, u, r, h, first, TF_MIN(block, queries - first));
    }
}

static void run_item(void *ctx, int tile, int thread) {
    const attend_job *job = ctx;
    const tf_attend_args *a = job->args;
    const struct tf_attention_ops *ops = job->plan->ops;
    const item *it = &job->items[tile];
    tf_unit *u = &job->units[it->unit];
    float *scratch = tf_scratch(thread, (size_t)job->plan->scratch_floats * sizeof(float));
    if (!u->partials) {
        ops->whole(a, u, scratch);
        return;
    }
    ops->part(a, u, it->begin, it->end, scratch);
    if (atomic_fetch_sub_explicit(&u->items_left, 1, memory_order_acq_rel) == 1) ops->fold(a, u, scratch);
}

static void run_all(void *ctx, int tile, int thread) {
    const attend_job *job = ctx;
    (void)tile;
    for (int i = 0; i < job->count; i++) run_item(ctx, i, thread);
}

static int pieces(const tf_unit *u, int64_t tiles_per_item) { return (int)TF_MAX(1, TF_CEIL(u->tiles, tiles_per_item)); }

/* Cuts long units into items of about `tiles` tiles; returns the floats of partial results that needs. */
static int64_t plan_items(attend_job *job, int64_t units, int64_t tiles, int64_t partial_floats) {
    int64_t floats = 0;
    int count = 0;
    for (int64_t i = 0; i < units; i++) {
        tf_unit *u = &job->units[i];
        const int n = pieces(u, tiles);
        atomic_store_explicit(&u->items_left, n, memory_order_relaxed);
        for (int p = 0; p < n; p++, count++) {
            if (!job->items) continue;
            job->items[count] = (item){(int32_t)i, (int32_t)((int64_t)u->tiles * p / n), (int32_t)((int64_t)u->tiles * (p + 1) / n)};
        }
        if (n > 1) floats += (int64_t)u->tiles * u->queries * u->heads * partial_floats;
    }
    job->count = count;
    return floats;
}

static void assign_partials(attend_job *job, int64_t units, int64_t tiles, int64_t partial_floats, float *partials) {
    for (int64_t i = 0; i < units; i++) {
        tf_unit *u = &job->units[i];
        if (pieces(u, tiles) == 1) continue;
        u->partials = partials;
        partials += (int64_t)u->tiles * u->queries * u->heads * partial_floats;
    }
}

typedef struct {
    int64_t tiles, products;
} work;

static work work_of(const tf_attend_args *a, const tf_unit *units, int64_t count) {
    work w = {0, 0};
    for (int64_t i = 0; i < count; i++) {
        w.tiles += units[i].tiles;
        w.products += (int64_t)units[i].tiles * TF_KV_TILE * 2 * a->head_dim * units[i].queries * units[i].heads;
    }
    return w;
}

void tf_attend_units(const tf_attend_args *a, const tf_attend_plan *plan) {
    attend_job job = {a, plan, NULL, NULL, 0};
    const int64_t units = count_units(&job), partial_floats = tf_partial_floats(a, plan->ops->width);
    if (units == 0) return;
    tf_begin();
    const int64_t most_items = units + tf_threads() * ITEMS_PER_THREAD * 2;
    const size_t unit_bytes = (size_t)tf_padded(units * (int64_t)sizeof(tf_unit), TF_ALIGN);
    const size_t item_bytes = (size_t)tf_padded(most_items * (int64_t)sizeof(item), TF_ALIGN);
    job.units = tf_shared(unit_bytes);
    list_units(&job);
    const work w = work_of(a, job.units, units);
    const int alone = tf_threads() == 1 || w.products < SMALL_PRODUCTS;
    const int64_t tiles = alone ? w.tiles + 1 : TF_CEIL(w.tiles, (int64_t)tf_threads() * ITEMS_PER_THREAD);
    const int64_t floats = plan_items(&job, units, TF_MAX(1, tiles), partial_floats);
    char *memory = tf_shared(unit_bytes + item_bytes + (size_t)floats * sizeof(float)); /* may move */
    job.units = (tf_unit *)memory;
    list_units(&job);
    job.items = (item *)(memory + unit_bytes);
    plan_items(&job, units, TF_MAX(1, tiles), partial_floats);
    assign_partials(&job, units, TF_MAX(1, tiles), partial_floats, (float *)(memory + unit_bytes + item_bytes));
    if (alone)
        tf_parallel(1, run_all, &job);
    else
        tf_parallel(job.count, run_item, &job);
    tf_end();
}

void tf_attend(const tf_attend_args *a) {
    const struct tf_attention_ops *ops = TF_PICK(tf_attention_ops);
    const tf_attend_plan plan = {ops, TF_UNIT_ROWS, tf_attend_scratch_floats(a, ops->width)};
    tf_attend_units(a, &plan);
}
