/* Decode attention over a packed cache: what a layer is made of, in memory. The meaning is ops/kv (layer.py: where things
 * lie, packing.py: codes in bytes, quantize.py: numbers from codes); packed_kv.py writes these structs.
 *
 * A token at position p of a sequence sees the tokens after p - window and the sinks as they were computed, from the
 * sequence's room, and all others as they are stored. Everything of a step is written before anything is read.
 */
#ifndef TENFOLD_PACKED_H
#define TENFOLD_PACKED_H

#include "attention.h"

enum { TF_CHANNELS_ALIGN = 16 }; /* floats: the channels of a head take a multiple of it in `group` and `shift` */

/* The keys, or the values. Groups are counted within a span of heads: `groups` of each. */
typedef struct {
    uint8_t *codes;       /* [pages, kv_heads, page_size, code_bytes] */
    void *parameters;     /* [pages, spans, page_size, groups, numbers], e4m3 or float16 */
    const int32_t *group; /* [kv_heads, channels] of a channel, within its span; `channels`: head_dim, filled up */
    const float *shift;   /* [kv_heads, channels]; 0 in what is filled up */
    const float *unit, *clip; /* [spans, groups] */
    int32_t half_bits;    /* twice the bits of a code: 3, 4, 6, 8, or 16 for e4m3 */
    int32_t code_bytes;   /* of a head of a token */
    int32_t groups, numbers; /* numbers: 2, scale and zero, or 1 */
} tf_packed_side;

typedef struct {
    tf_packed_side keys, values;
    void *exact_keys, *exact_values; /* [rooms * (ring + 1), kv_heads, page_size, head_dim] of `type`, or NULL: nothing is exact */
    int32_t page_size, type, window, sinks;
    int32_t ring;      /* pages of a room that recent tokens go around in; the page after them has the sinks */
    int32_t span;      /* heads that groups are shared between */
    int32_t before;    /* whether keys are stored before rotary embedding */
    int32_t turned;    /* channels that a Hadamard matrix mixes, 0 for none */
    int32_t float16;   /* whether parameters are */
    int32_t kv_heads, head_dim;
} tf_packed_layer;

typedef struct {
    const tf_packed_layer *layer;
    const float *qkv, *table;         /* [T, (heads + 2 kv_heads) * head_dim], [P, rotary_dim] */
    const int32_t *positions, *slots; /* [T] */
    const int32_t *query_start, *kv_lengths, *rooms; /* [requests + 1], [requests], [requests] or NULL */
    const float *q_norm, *k_norm;     /* [head_dim] or NULL */
    float *out;                       /* [T, heads * head_dim] */
    int32_t tokens, requests, heads, rotary_dim;
    float q_eps, k_eps;
} tf_rope_write_packed_args;

typedef struct {
    tf_attend_args base; /* keys and values: of the rooms; window 0 */
    const tf_packed_layer *layer;
    const float *table;  /* [P, rotary_dim] */
    const int32_t *rooms;
    int32_t rotary_dim;
} tf_attend_packed_args;

/* Tokens of one request that may stand in a step: with more, the ring would lose what the first of them sees. The caller
 * sees to it that there are no more. A request of length 0 is idle: nothing is written, its result is 0. */
TF_EXPORT void tf_rope_write_packed(const tf_rope_write_packed_args *args);
TF_EXPORT void tf_attend_packed(const tf_attend_packed_args *args);

struct tf_packed_ops {
    struct tf_attention_ops attention;
    int64_t (*write_floats)(const tf_packed_layer *layer); /* scratch of write_token */
    int64_t (*attend_floats)(const tf_attend_packed_args *args);
    void (*write_token)(const tf_rope_write_packed_args *args, int token, float *scratch);
};

TF_INLINE int64_t tf_channels(const tf_packed_layer *l) { return tf_padded(l->head_dim, TF_CHANNELS_ALIGN); }

#endif
