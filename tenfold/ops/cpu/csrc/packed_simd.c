/* Codes from numbers, numbers from codes, and attention over both; packed.h. */
#include "attention_tile.h"
#include "heads.h"
#include "packed.h"

/* ---- tables, one entry a byte ---- */

#define TF_4(f, b) f((b)), f((b) + 1), f((b) + 2), f((b) + 3)
#define TF_16(f, b) TF_4(f, (b)), TF_4(f, (b) + 4), TF_4(f, (b) + 8), TF_4(f, (b) + 12)
#define TF_64(f, b) TF_16(f, (b)), TF_16(f, (b) + 16), TF_16(f, (b) + 32), TF_16(f, (b) + 48)
#define TF_256(f) TF_64(f, 0), TF_64(f, 64), TF_64(f, 128), TF_64(f, 192)

/* e4m3 to float. The two codes for what is no number, which are never stored, count on. */
#define E4M3_MAGNITUDE(b) ((b) & 0x78 ? (8 + ((b) & 7)) * (float)(1 << ((b) >> 3 & 15)) : ((b) & 7) * 2.0f)
#define E4M3(b) (((b) & 0x80 ? -E4M3_MAGNITUDE(b) : E4M3_MAGNITUDE(b)) / 1024.0f)
static const float e4m3[256] = {TF_256(E4M3)};

/* Five codes of three levels, a byte each. */
#define TRIT(b, place) ((uint64_t)((b) / (place) % 3))
#define TRITS(b) (TRIT(b, 1) | TRIT(b, 3) << 8 | TRIT(b, 9) << 16 | TRIT(b, 27) << 24 | TRIT(b, 81) << 32)
static const uint64_t trits[256] = {TF_256(TRITS)};

/* ---- writing ---- */

static uint8_t e4m3_from_f32(float x) { /* to nearest, ties to even; |x| <= 448 */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint8_t sign = bits >> 24 & 0x80;
    bits &= 0x7fffffff;
    if (bits < 0x3c800000) { /* subnormal: the adder of floats does the rounding */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 16384.0f;
        memcpy(&bits, &magnitude, 4);
        return sign | (uint8_t)(bits - 0x46800000);
    }
    return sign | (uint8_t)((bits + 0x7ffff + (bits >> 20 & 1) - 0x3c000000) >> 20);
}

TF_INLINE float clamped(float x, float least, float most) { return x > least ? (x < most ? x : most) : least; }

/* Parameter i, rounded to the type that is stored; returns what it is then. */
static float store_parameter(int float16, void *parameters, int64_t i, float x) {
    if (float16) {
        uint16_t h = f16_from_f32(clamped(x, -65504.0f, 65504.0f));
        ((uint16_t *)parameters)[i] = h;
        return f32_from_f16(h);
    }
    uint8_t b = e4m3_from_f32(clamped(x, -448.0f, 448.0f));
    ((uint8_t *)parameters)[i] = b;
    return e4m3[b];
}

/* x times the Hadamard matrix of `size` rows, a power of two. */
static void turn_group(float *x, int size) {
    for (int h = 1; h < size; h *= 2)
        for (int i = 0; i < size; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    const float by = 1.0f / sqrtf((float)size);
    for (int i = 0; i < size; i++) x[i] *= by;
}

static void turn_head(float *x, int head_dim, int size) {
    for (int i = 0; i < head_dim; i += size) turn_group(x + i, size);
}

/* Codes of a head to bytes, units of 5 codes a byte, or of 8 bits and more. */
static void pack_codes(int half_bits, const uint8_t *codes, int n, uint8_t *bytes) {
    if (half_bits == 16) {
        memcpy(bytes, codes, (size_t)n);
        return;
    }
    const int levels = half_bits == 3 ? 3 : 1 << half_bits / 2;
    const int count = half_bits == 3 ? 5 : half_bits == 6 ? 8 : 16 / half_bits, size = half_bits == 6 ? 3 : 1;
    for (int i = 0; i < n; i += count) {
        uint32_t number = 0;
        for (int k = TF_MIN(count, n - i) - 1; k >= 0; k--) number = number * levels + codes[i + k];
        for (int k = 0; k < size; k++) *bytes++ = number >> 8 * k;
    }
}

/* What `quantise_span` works with: of each group its least and largest number, later zero and scale. */
typedef struct {
    float *x, *low, *high; /* [span, channels], [groups], [groups] */
    uint8_t *codes;        /* [head_dim] */
} span_scratch;

/* Store x of one span of heads of one token; `at`: the token's page and offset. The sums and quotients are those of
 * quantize.py, one by one, so that a prompt's tokens and an answer's get the same codes. */
static void quantise_span(const tf_packed_layer *l, const tf_packed_side *side, int span, int64_t page, int64_t offset,
                          const span_scratch *s) {
    const int n = l->head_dim, channels = (int)tf_channels(l), groups = side->groups, first = span * l->span;
    const int32_t *group = side->group + (int64_t)first * channels;
    const float *shift = side->shift + (int64_t)first * channels, *unit = side->unit + span * groups;
    const float *clip = side->clip + span * groups;
    const int64_t row = ((page * (l->kv_heads / l->span) + span) * l->page_size + offset) * groups * side->numbers;
    for (int g = 0; g < groups; g++) {
        s->low[g] = INFINITY;
        s->high[g] = -INFINITY;
    }
    for (int h = 0; h < l->span; h++)
        for (int c = h * channels; c < h * channels + n; c++) {
            const float v = s->x[c] -= shift[c];
            const int g = group[c];
            if (v < s->low[g]) s->low[g] = v;
            if (v > s->high[g]) s->high[g] = v;
        }
    const int top = side->half_bits == 3 ? 2 : (1 << side->half_bits / 2) - 1;
    for (int g = 0; g < groups; g++) {
        if (side->numbers == 1) {
            const float magnitude = TF_MAX(s->high[g], -s->low[g]), scale = clip[g] * magnitude / 448.0f;
            s->high[g] = store_parameter(l->float16, side->parameters, row + g, TF_MAX(scale, 1e-5f) / unit[g]) * unit[g];
            continue;
        }
        const float low = clip[g] * s->low[g], scale = (clip[g] * s->high[g] - low) / (float)top;
        s->low[g] = low;
        s->high[g] = TF_MAX(scale, 1e-5f);
        store_parameter(l->float16, side->parameters, row + 2 * g, s->high[g] / unit[g]);
        store_parameter(l->float16, side->parameters, row + 2 * g + 1, low / unit[g]);
    }
    for (int h = 0; h < l->span; h++) {
        const float *x = s->x + h * channels;
        const int32_t *own = group + h * channels;
        for (int c = 0; c < n; c++) {
            if (side->numbers == 1) {
                const float ratio = x[c] / s->high[own[c]];
                s->codes[c] = ratio == ratio ? e4m3_from_f32(clamped(ratio, -448.0f, 448.0f)) : 0;
            } else { /* adding 1.5 * 2^23 rounds to a whole number, ties to even */
                const float code = clamped((x[c] - s->low[own[c]]) / s->high[own[c]], 0.0f, (float)top);
                s->codes[c] = (uint8_t)(int)((code + 12582912.0f) - 12582912.0f);
            }
        }
        const int64_t to = ((page * l->kv_heads + first + h) * l->page_size + offset) * side->code_bytes;
        pack_codes(side->half_bits, s->codes, n, side->codes + to);
    }
}

static int request_of(const tf_rope_write_packed_args *a, int token) {
    int low = 0, high = a->requests - 1; /* the last request that does not begin after the token */
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (a->query_start[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Where a head of the token at a position begins in rooms, in elements. */
TF_INLINE int64_t place_in_room(const tf_packed_layer *l, int room, int position, int kv_head) {
    const int page = position < l->sinks ? l->ring : position / l->page_size % l->ring;
    const int64_t at = (int64_t)room * (l->ring + 1) + page;
    return ((at * l->kv_heads + kv_head) * l->page_size + position % l->page_size) * l->head_dim;
}

TF_INLINE void widen_any(int type, const void *from, float *to, int n) {
    if (type == TF_F16)
        widen(TF_F16, from, to, n);
    else if (type == TF_BF16)
        widen(TF_BF16, from, to, n);
    else
        memcpy(to, from, (size_t)n * 4);
}

/* x as it is after it was kept exact. */
static void round_head(const tf_packed_layer *l, float *x) {
    if (l->type == TF_F32) return;
    uint16_t narrowed[LONGEST_HEAD];
    narrow_any(l->type, x, narrowed, l->head_dim);
    widen_any(l->type, narrowed, x, l->head_dim);
}

static int64_t write_floats(const tf_packed_layer *l) {
    const int64_t groups = TF_MAX(l->keys.groups, l->values.groups);
    return tf_padded(l->span * tf_channels(l), TF_W) + 2 * tf_padded(groups, TF_W) + tf_padded(l->head_dim, TF_W);
}

/* Keys, or values, of one span of a token: the exact ones to the room, at `room` unless that is -1, then the codes. */
static void write_span(const tf_rope_write_packed_args *a, int token, int span, int of_keys, int room, float *scratch) {
    const tf_packed_layer *l = a->layer;
    const tf_packed_side *side = of_keys ? &l->keys : &l->values;
    const int n = l->head_dim, half = of_keys ? a->rotary_dim / 2 : 0, position = a->positions[token];
    const int64_t channels = tf_channels(l), groups = tf_padded(TF_MAX(l->keys.groups, l->values.groups), TF_W);
    span_scratch s = {.x = scratch, .low = scratch + tf_padded(l->span * channels, TF_W)};
    s.high = s.low + groups;
    s.codes = (uint8_t *)(s.high + groups);
    const float *from = a->qkv + ((int64_t)token * (a->heads + 2 * l->kv_heads) + a->heads + (of_keys ? 0 : l->kv_heads)) * n;
    const float *cosines = half ? a->table + (int64_t)position * a->rotary_dim : NULL;
    const float *norm = of_keys ? a->k_norm : NULL;
    char *rooms = of_keys ? l->exact_keys : l->exact_values;
    for (int h = 0; h < l->span; h++) {
        const int head = span * l->span + h;
        float *x = s.x + h * channels, rotated[LONGEST_HEAD];
        rotate_head(from + head * n, norm, a->k_eps, cosines, half, n, rotated);
        if (room >= 0) narrow_any(l->type, rotated, rooms + place_in_room(l, room, position, head) * tf_type_size(l->type), n);
        if (l->before && half)
            rotate_head(from + head * n, norm, a->k_eps, NULL, 0, n, x);
        else
            memcpy(x, rotated, (size_t)n * 4);
        round_head(l, x);
        if (l->turned) turn_head(x, n, l->turned);
    }
    quantise_span(l, side, span, a->slots[token] / l->page_size, a->slots[token] % l->page_size, &s);
}

static void write_token(const tf_rope_write_packed_args *a, int token, float *scratch) {
    const tf_packed_layer *l = a->layer;
    const int n = l->head_dim, half = a->rotary_dim / 2, request = request_of(a, token);
    const float *q = a->qkv + (int64_t)token * (a->heads + 2 * l->kv_heads) * n;
    const float *cosines = half ? a->table + (int64_t)a->positions[token] * a->rotary_dim : NULL;
    float *out = a->out + (int64_t)token * a->heads * n;
    for (int h = 0; h < a->heads; h++) rotate_head(q + h * n, a->q_norm, a->q_eps, cosines, half, n, out + h * n);
    if (a->kv_lengths[request] <= 0 || a->slots[token] < 0) return;
    const int room = l->exact_keys ? a->rooms[request] : -1;
    for (int span = 0; span < l->kv_heads / l->span; span++) {
        write_span(a, token, span, 1, room, scratch);
        write_span(a, token, span, 0, room, scratch);
    }
}

/* ---- reading ---- */

/* Up to WIDENED tokens of one head, as they are stored; `wide` has a row for each. */
typedef struct {
    const uint8_t *codes[WIDENED];
    float *scale, *zero; /* [WIDENED][groups, filled up to whole vectors] */
    uint8_t *unpacked;   /* [WIDENED][channels + 8] codes of 1.5 bits, a byte each */
    int64_t groups;
} block;

TF_INLINE int64_t unpacked_bytes(const tf_packed_layer *l) { return tf_channels(l) + 8; }

static int64_t block_floats(const tf_packed_layer *l) {
    const int64_t groups = tf_padded(TF_MAX(l->keys.groups, l->values.groups), TF_W);
    return 2 * WIDENED * groups + tf_padded(WIDENED * unpacked_bytes(l) / 4, TF_W);
}

static block block_of(const tf_packed_layer *l, float *scratch) {
    block b = {.groups = tf_padded(TF_MAX(l->keys.groups, l->values.groups), TF_W)};
    b.scale = scratch;
    b.zero = b.scale + WIDENED * b.groups;
    b.unpacked = (uint8_t *)(b.zero + WIDENED * b.groups);
    return b;
}

/* table[index[lane]] of each lane; few: at most TF_W entries, which fit in a register. */
TF_INLINE vf vf_lookup(int few, const float *table, vi index) {
#if TF_W == 16
    if (few) return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
    return (vf)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif TF_W == 8
    if (few) return (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    return (vf)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    (void)few;
    return (vf){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
#endif
}

TF_INLINE vf vf_whole(vi x) {
#if TF_W == 16
    return (vf)_mm512_cvtepi32_ps((__m512i)x);
#elif TF_W == 8
    return (vf)_mm256_cvtepi32_ps((__m256i)x);
#elif defined(__x86_64__)
    return (vf)_mm_cvtepi32_ps((__m128i)x);
#elif defined(__aarch64__)
    return (vf)vcvtq_f32_s32((int32x4_t)x);
#else
    return (vf){(float)x[0], (float)x[1], (float)x[2], (float)x[3]};
#endif
}

/* 8 codes of `bits` each, in the lowest bits of a word. */
TF_INLINE uint32_t word_of(int bits, const uint8_t *p) {
    if (bits == 3) return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16;
    uint32_t word = 0;
    memcpy(&word, p, (size_t)bits);
    return word;
}

/* Codes i.. of a head of n channels, a multiple of 8, as numbers; i is a multiple of the vector. Beyond the last channel: 0. */
TF_INLINE vf whole_codes(int bits, const uint8_t *codes, int i, int n) {
    const uint32_t word = word_of(bits, codes + i / 8 * bits);
#if TF_W == 4
    (void)n;
    const uint32_t from = word >> i % 8 * bits;
    vi x = {(int32_t)from, (int32_t)(from >> bits), (int32_t)(from >> 2 * bits), (int32_t)(from >> 3 * bits)};
#else
    vi lanes;
    for (int l = 0; l < TF_W; l++) lanes[l] = l % 8 * bits;
#if TF_W == 16
    const uint32_t next = i + 8 < n ? word_of(bits, codes + (i / 8 + 1) * bits) : 0;
    vi x = (vi)_mm512_inserti32x8(_mm512_set1_epi32((int)word), _mm256_set1_epi32((int)next), 1);
    x = (vi)_mm512_srlv_epi32((__m512i)x, (__m512i)lanes);
#else
    (void)n;
    vi x = (vi)_mm256_srlv_epi32(_mm256_set1_epi32((int)word), (__m256i)lanes);
#endif
#endif
    return vf_whole(x & ((1 << bits) - 1));
}

/* Bytes i.. as numbers. */
TF_INLINE vf whole_bytes(const uint8_t *bytes, int i) {
#if TF_W == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(bytes + i))));
#elif TF_W == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + i))));
#else
    return vf_whole((vi){bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]});
#endif
}

/* e4m3 numbers i.. of n, a multiple of 8. Beyond the last: 0. */
TF_INLINE vf e4m3_numbers(const uint8_t *codes, int i, int n) {
#if TF_W >= 8 /* by way of float16: the same bits one place on, and an exponent 8 larger */
#if TF_W == 16
    const __m128i *p = (const __m128i *)(codes + i);
    __m256i h = _mm256_cvtepu8_epi16(i + 16 <= n ? _mm_loadu_si128(p) : _mm_loadl_epi64(p));
    h = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(h, _mm256_set1_epi16(0x7f)), 7),
                        _mm256_slli_epi16(_mm256_and_si256(h, _mm256_set1_epi16(0x80)), 8));
    return (vf)_mm512_cvtph_ps(h) * 256.0f;
#else
    (void)n;
    __m128i h = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(codes + i)));
    h = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(h, _mm_set1_epi16(0x7f)), 7),
                     _mm_slli_epi16(_mm_and_si128(h, _mm_set1_epi16(0x80)), 8));
    return (vf)_mm256_cvtph_ps(h) * 256.0f;
#endif
#else
    (void)n;
    return (vf){e4m3[codes[i]], e4m3[codes[i + 1]], e4m3[codes[i + 2]], e4m3[codes[i + 3]]};
#endif
}

/* code * scale + zero + shift of `count` tokens into rows of `wide`. */
TF_INLINE void dequantise_as(int half_bits, int few, const tf_packed_layer *l, const tf_packed_side *side, int kv_head, int count,
                             const block *b, float *wide, int padded) {
    const int n = l->head_dim;
    const int64_t first = kv_head * tf_channels(l), stride = unpacked_bytes(l);
    for (int i = 0; i < padded; i += TF_W) {
        vi index;
        memcpy(&index, side->group + first + i, sizeof index);
        const vf shift = vf_load(side->shift + first + i);
        for (int k = 0; k < count; k++) {
            const vf scale = vf_lookup(few, b->scale + k * b->groups, index);
            vf zero = shift, number;
            if (half_bits == 16) {
                number = e4m3_numbers(b->codes[k], i, n);
            } else {
                zero += vf_lookup(few, b->zero + k * b->groups, index);
                number = half_bits == 3 ? whole_bytes(b->unpacked + k * stride, i) : whole_codes(half_bits / 2, b->codes[k], i, n);
            }
            vf_store(wide + k * padded + i, vf_fma(number, scale, zero));
        }
    }
}

TF_INLINE float parameter(int float16, const void *from, int i) {
    return float16 ? f32_from_f16(((const uint16_t *)from)[i]) : e4m3[((const uint8_t *)from)[i]];
}

/* Scales, and zeros, of one token's groups, in the units they are stored in. */
TF_INLINE void load_parameters(int float16, const tf_packed_side *side, const float *unit, const void *from, float *scale, float *zero) {
    if (side->numbers == 1) {
        for (int g = 0; g < side->groups; g++) scale[g] = parameter(float16, from, g) * unit[g];
        return;
    }
    for (int g = 0; g < side->groups; g++) {
        scale[g] = parameter(float16, from, 2 * g) * unit[g];
        zero[g] = parameter(float16, from, 2 * g + 1) * unit[g];
    }
}

static void unpack_trits(const uint8_t *bytes, int count, uint8_t *codes) {
    for (int i = 0; i < count; i++) memcpy(codes + 5 * i, &trits[bytes[i]], 8);
}

/* What a unit has beside its unit_state. */
typedef struct {
    const tf_packed_layer *layer;
    const tf_attend_packed_args *args;
    block block;
    float *turned_q; /* the queries, turned; or the queries */
    float *spare;    /* scores that would reach beyond their row: [rows][tile] */
} packed_state;

static int64_t attend_floats(const tf_attend_packed_args *a) {
    const int64_t turned = a->layer->turned ? tf_padded(a->base.head_dim, TF_W) * TF_UNIT_ROWS : 0;
    return tf_attend_scratch_floats(&a->base, TF_W) + turned + TF_UNIT_ROWS * TF_KV_TILE + block_floats(a->layer);
}

static packed_state packed_state_of(const unit_state *s, float *scratch) {
    const tf_attend_packed_args *a = (const tf_attend_packed_args *)s->a;
    packed_state p = {.layer = a->layer, .args = a, .turned_q = s->q};
    p.spare = scratch + tf_attend_scratch_floats(s->a, TF_W);
    p.block = block_of(a->layer, p.spare + TF_UNIT_ROWS * TF_KV_TILE);
    if (a->layer->turned) p.turned_q = p.spare + TF_UNIT_ROWS * TF_KV_TILE + block_floats(a->layer);
    return p;
}

static void load_turned(const unit_state *s, const packed_state *p) {
    load_queries(s);
    if (!p->layer->turned) return;
    const int filled = (int)tf_padded(s->rows, ROWS);
    memcpy(p->turned_q, s->q, (size_t)filled * s->padded * 4);
    for (int row = 0; row < filled; row++) turn_head(p->turned_q + row * s->padded, s->a->head_dim, p->layer->turned);
}

/* Ask for the codes and parameters of `count` tokens at position.. before they are needed: pages lie scattered, so the
 * processor cannot guess the next one. */
static void fetch(const unit_state *s, const packed_state *p, const tf_packed_side *side, int position, int count) {
    const tf_packed_layer *l = p->layer;
    const int32_t *pages = s->a->page_table + (int64_t)s->u->request * s->a->table_width;
    const int span = s->u->kv_head / l->span, spans = l->kv_heads / l->span, size = l->page_size;
    const int64_t row_bytes = (int64_t)side->groups * side->numbers * (l->float16 ? 2 : 1);
    for (const int end = position + count; position < end;) {
        const int offset = position % size, run = TF_MIN(end - position, size - offset);
        const int64_t at = pages[position / size];
        const uint8_t *codes = side->codes + ((at * l->kv_heads + s->u->kv_head) * size + offset) * side->code_bytes;
        const char *numbers = (const char *)side->parameters + ((at * spans + span) * size + offset) * row_bytes;
        for (int i = 0; i < run * side->code_bytes; i += 64) __builtin_prefetch(codes + i);
        for (int i = 0; i < run * row_bytes; i += 64) __builtin_prefetch(numbers + i);
        position += run;
    }
}

/* Tokens at position.. of one head as they are stored, into rows of s->wide. */
static void dequantise(const unit_state *s, const packed_state *p, const tf_packed_side *side, int position, int count) {
    const tf_packed_layer *l = p->layer;
    const tf_attend_args *a = s->a;
    const int32_t *pages = a->page_table + (int64_t)s->u->request * a->table_width;
    const int span = s->u->kv_head / l->span, spans = l->kv_heads / l->span, size = l->page_size;
    const int64_t row_bytes = (int64_t)side->groups * side->numbers * (l->float16 ? 2 : 1);
    const float *unit = side->unit + span * side->groups;
    block b = p->block;
    int page = position / size, offset = position % size;
    for (int k = 0; k < count; k++, offset++) {
        if (offset == size) {
            offset = 0;
            page++;
        }
        const int64_t at = pages[page];
        b.codes[k] = side->codes + ((at * l->kv_heads + s->u->kv_head) * size + offset) * side->code_bytes;
        const char *numbers = (const char *)side->parameters + ((at * spans + span) * size + offset) * row_bytes;
        float *scale = b.scale + k * b.groups, *zero = b.zero + k * b.groups;
        if (l->float16)
            load_parameters(1, side, unit, numbers, scale, zero);
        else
            load_parameters(0, side, unit, numbers, scale, zero);
        if (side->half_bits == 3) unpack_trits(b.codes[k], side->code_bytes, b.unpacked + k * unpacked_bytes(l));
    }
    const int head = s->u->kv_head, few = side->groups <= TF_W;
#define TF_AS(bits)                                                                         \
    if (few)                                                                                \
        dequantise_as(bits, 1, l, side, head, count, &b, s->wide, s->padded);               \
    else                                                                                    \
        dequantise_as(bits, 0, l, side, head, count, &b, s->wide, s->padded);               \
    break
    switch (side->half_bits) {
    case 3: TF_AS(3);
    case 4: TF_AS(4);
    case 6: TF_AS(6);
    case 8: TF_AS(8);
    default: TF_AS(16);
    }
#undef TF_AS
}

/* Tokens begin..end-1 of a tile come from one place; sinks, codes, recent ones. */
typedef struct {
    int begin, end, stored;
} piece;

/* Past the last token that is read as it is stored. */
TF_INLINE int stored_end(const unit_state *s, const tf_packed_layer *l) { return s->u->position + 1 - l->window; }

/* The pieces of a tile that begins at position `start`, in order; returns how many. */
static int pieces_of(const unit_state *s, const tf_packed_layer *l, int start, piece *out) {
    const int last = s->u->position + 1, sinks = TF_MIN(l->sinks, last), recent = TF_MAX(sinks, stored_end(s, l));
    const int edges[4] = {0, sinks, recent, last}, stop = TF_MIN(last, start + TF_KV_TILE);
    int count = 0;
    for (int i = 0; i < 3; i++) {
        const int begin = TF_MAX(edges[i], start), end = TF_MIN(edges[i + 1], stop);
        if (begin < end) out[count++] = (piece){begin - start, end - start, i == 1};
    }
    return count;
}

/* Tokens at position.. as they were computed, into rows of s->wide. */
static void recall(const unit_state *s, const packed_state *p, const void *rooms, int position, int count) {
    const int room = p->args->rooms[s->u->request];
    for (int k = 0; k < count; k++)
        widen_row(s, rooms, place_in_room(p->layer, room, position + k, s->u->kv_head), s->wide + k * s->padded);
}

/* Rotate the keys at position.. that lie in rows of s->wide. */
static void rotate_keys(const unit_state *s, const packed_state *p, int position, int count) {
    const int dim = p->args->rotary_dim;
    for (int k = 0; k < count; k++) {
        float *x = s->wide + k * s->padded;
        rotate_head(x, NULL, 0.0f, p->args->table + (int64_t)(position + k) * dim, dim / 2, s->a->head_dim, x);
    }
}

/* Scores of `count` keys in rows of s->wide, the first of them key j of the tile. */
static void score_wide(const unit_state *s, const packed_state *p, int j, int count) {
    unit_state apart = *s;
    apart.scores = p->spare;
    for (int i = 0; i < count; i += KEYS) {
        const void *key[KEYS];
        for (int k = 0; k < KEYS; k++) key[k] = s->wide + TF_MIN(i + k, count - 1) * s->padded;
        if (j + i + KEYS <= TF_KV_TILE) {
            score_rows(s, TF_F32, key, j + i);
            continue;
        }
        score_rows(&apart, TF_F32, key, 0);
        for (int row = 0; row < s->rows; row++)
            memcpy(s->scores + row * TF_KV_TILE + j + i, p->spare + row * TF_KV_TILE, (size_t)(count - i) * 4);
    }
}

static void score_piece(const unit_state *s, const packed_state *p, int start, piece piece) {
    const tf_packed_layer *l = p->layer;
    unit_state own = *s;
    if (piece.stored) own.q = p->turned_q;
    for (int j = piece.begin; j < piece.end; j += WIDENED) {
        const int count = TF_MIN(WIDENED, piece.end - j);
        if (piece.stored) {
            fetch(s, p, &l->keys, start + j + count, TF_MAX(0, TF_MIN(WIDENED, stored_end(s, l) - start - j - count)));
            fetch(s, p, &l->values, start + j, count);
            dequantise(s, p, &l->keys, start + j, count);
        } else {
            recall(s, p, l->exact_keys, start + j, count);
        }
        if (piece.stored && l->before && p->args->rotary_dim) rotate_keys(s, p, start + j, count);
        score_wide(&own, p, j, count);
    }
}

static void sum_piece(const unit_state *s, const packed_state *p, int start, piece piece) {
    const void *value[WIDENED];
    for (int k = 0; k < WIDENED; k++) value[k] = s->wide + k * s->padded;
    for (int j = piece.begin; j < piece.end; j += WIDENED) {
        const int count = TF_MIN(WIDENED, piece.end - j);
        if (piece.stored)
            dequantise(s, p, &p->layer->values, start + j, count);
        else
            recall(s, p, p->layer->exact_values, start + j, count);
        value_rows(s, TF_F32, value, j, count);
    }
}

static void turn_rows(const unit_state *s, const packed_state *p, float *rows) {
    if (!p->layer->turned) return;
    for (int row = 0; row < s->rows; row++) turn_head(rows + row * s->padded, s->a->head_dim, p->layer->turned);
}

/* m, l and sum of one tile, for all rows. Sums are turned, if anything is: first comes what was kept exact, which is not. */
static void run_tile(const unit_state *s, const packed_state *p, int tile) {
    tile_keys keys;
    piece pieces[3];
    keys.start = tile * TF_KV_TILE;
    keys.first = 0;
    keys.last = TF_MIN(TF_KV_TILE - 1, s->u->position - keys.start);
    const int count = pieces_of(s, p->layer, keys.start, pieces);
    for (int i = 0; i < count; i++) score_piece(s, p, keys.start, pieces[i]);
    soften(s, &keys);
    memset(s->sum, 0, (size_t)tf_padded(s->rows, ROWS) * s->padded * 4);
    int exact = 0;
    for (int i = 0; i < count; i++)
        if (!pieces[i].stored) {
            sum_piece(s, p, keys.start, pieces[i]);
            exact = 1;
        }
    if (exact) turn_rows(s, p, s->sum);
    for (int i = 0; i < count; i++)
        if (pieces[i].stored) sum_piece(s, p, keys.start, pieces[i]);
}

static void finish(const unit_state *s, const packed_state *p) {
    turn_rows(s, p, s->total);
    write_out(s);
}

static void whole(const tf_attend_args *a, const tf_unit *u, float *scratch) {
    const unit_state s = state_of(a, u, scratch);
    const packed_state p = packed_state_of(&s, scratch);
    load_turned(&s, &p);
    clear_total(&s);
    for (int tile = 0; tile < u->tiles; tile++) {
        run_tile(&s, &p, tile);
        fold_tile(&s, s.sum, s.padded);
    }
    finish(&s, &p);
}

static void part(const tf_attend_args *a, const tf_unit *u, int begin, int end, float *scratch) {
    const unit_state s = state_of(a, u, scratch);
    const packed_state p = packed_state_of(&s, scratch);
    load_turned(&s, &p);
    for (int tile = begin; tile < end; tile++) {
        run_tile(&s, &p, tile);
        save_partial(&s, tile);
    }
}

static void fold(const tf_attend_args *a, const tf_unit *u, float *scratch) {
    const unit_state s = state_of(a, u, scratch);
    const packed_state p = packed_state_of(&s, scratch);
    fold_partials(&s);
    finish(&s, &p);
}

const struct tf_packed_ops TF_NAME(tf_packed_ops) = {{TF_W, whole, part, fold}, write_floats, attend_floats, write_token};
