// Attention of one token a request over a packed KV cache: what is old as codes, sinks and the last tokens exact.
//
// A block takes one request, one KV head with up to HEADS of its query heads, and one split of the context; its warps
// take turns at units: 16 exact tokens, or a tile of TOKENS packed ones. Tiles come as raw bytes into a ring of each
// warp's own in shared memory. Codes are never made into numbers one by one: a masked word is a pair of float16, for
// bits in the mantissa of a subnormal number are a whole number, and products with subnormals are exact in the tensor
// cores. Only three levels and float8 need arithmetic.
//
// Scores: A = codes of 16 tokens times 16 channels, B = queries, a column for each query head and group (COLUMNS, at
// most 8) that is zero where a channel belongs to another group. So scales and zeros are applied to sums over whole
// groups, whatever channels these have: score = sum of scale * column + zero * (the same query summed over the group).
// Keys stored before rotary embedding (PRE) take codes times cosine and codes times sine of the token's place within 64
// tokens, a table in shared memory, against the query turned back by the first place of these 64 and the same with its
// halves exchanged; the zeros' part is the product of that table with the query. One group a head: pairs of codes are
// turned before the product, which halves it.
//
// Values: A = codes of 16 channels times 16 tokens (words of two tokens are merged), B = weights times scales, again a
// column for each head and group; a channel later reads the column of its group. Three levels, x = sum of c_k 3^k: the
// nearest whole numbers r_k of (x - 121) / 3^k, by adding and taking off 1536 in float16, give c_k = r_k - 3 r_(k+1) + 1,
// and a difference of sums is a sum of differences, so the r_k go into the product as they are.
//
// 16 tokens of a head of 128 cost a warp about 165 instructions for keys of 2 bits before rotary embedding and 65 after
// it, 40 for the query's turn, 115 for values of three levels and 55 of 2 bits, 45 for weights and copies: per token and
// head 23, 16 and 13 instructions for k2v1.5g64, k2v1.5g128-post and k2v2g64-post. While an H100 reads the 66, 62 and 72
// bytes of these, a multiprocessor issues about 20, 18 and 22.
//
// Splits meet in global memory, where the one that comes last merges all in their order. EVEN: how many a request has
// depends on its length among the others', as even.cu says. Scores are in log2 units.
//
// Compile-time: packed.h; HALF type of queries, results and exact tokens; HEADS; TOKENS (16, 32 or 64), STAGES of the
// ring, WARPS, BLOCKS; PRE; EXACT: there are exact tokens; TURN: channels that the Hadamard matrix turns together, or 0;
// SHIFT: keys have something taken off; CAP: scores have a soft cap; EVEN.

#include "fragments.h"
#include "packed.h"

#define THREADS (WARPS * 32)
#define COLUMNS (HEADS * GROUPS)
#define SUBS (TOKENS / 16)
#define MERGED (KEY_BITS == 2 && D == 64)  // a register holds both channels of a rotation's pair
#define PAIRS (MERGED ? 8 : D / 16)        // registers of a lane for half of a token's keys; MERGED: for all
#define ROTATED (PRE && GROUPS == 1 && !MERGED)
#define KINDS (PRE ? (ROTATED || MERGED ? 2 : 4) : (MERGED ? 1 : 2))  // of registers of B for a pair of A
#define ZEROS (KEY_COUNT == 2)
#define SCORES (GROUPS == 1 ? 2 : 1)  // query heads of a lane's two columns
#define PLACES 64                     // tokens of the table
#define BASE_BYTES (PRE ? 32 * PAIRS : 0)
#define TABLE_BYTES (PRE ? PLACES * 32 * PAIRS : 0)
#define VALUES_AT (TOKENS * KEY_BYTES)
#define KEY_NUMBERS_AT (VALUES_AT + TOKENS * VALUE_BYTES)
#define VALUE_NUMBERS_AT (KEY_NUMBERS_AT + TOKENS * KEY_NUMBERS)
#define BASE_AT (VALUE_NUMBERS_AT + TOKENS * VALUE_NUMBERS)
#define STAGE (BASE_AT + BASE_BYTES)
#define WHOLE (VALUE_BYTES / 32)  // rounds of 32 pieces of 16 bytes that only values fill, of 16 tokens
#define REST (VALUE_BYTES % 32 + KEY_NUMBERS + VALUE_NUMBERS)
#define MIXED ((REST + 31) / 32)
#define PITCH (D + 8)
#define PARTIAL (HEADS * D + (2 * HEADS + 3) / 4 * 4)  // floats a split leaves
#define LEAST (2 * WARPS)  // tiles of a split, or as many bytes
#define MOST_AHEAD 32   // tokens at a context's end that this step may write
#define CALM 7.f        // how far scores may rise above the base of exponents before it moves
#define LIFT 3.f        // the base lies so far below the largest score
#define KP (D / 32)
#define VP (D / 64)

struct Args {
    const u8 *key_codes, *key_numbers, *value_codes, *value_numbers, *bases;
    const u16 *exact_keys, *exact_values;
    const int *table;
    int length, window, sinks, page_size, kv_heads, head, span, room, ring;
    float scale, softcap;
};

struct Shared {
    u16 q[8][PITCH];
    float plain[HEADS][D];           // queries, turned where keys are
    float lift[HEADS];               // what the queries in `x` and `y` are multiplied by to be themselves
    float shifted[HEADS];            // query times shift
    float sums[HEADS][GROUPS];       // query summed over a group
    uint4 x[HEADS][4][PAIRS / 4], y[HEADS][4][PAIRS / 4];
    uint4 own[GROUPS][4][PAIRS / 4], other[GROUPS][4][PAIRS / 4];  // the group's unit, or 0 for other groups' channels, in x and in y
    uint4 shift_own[4][PAIRS / 4], shift_other[4][PAIRS / 4];
    float out[WARPS][HEADS][D];
    float top[WARPS][HEADS], sum[WARPS][HEADS];
    float base[WARPS][HEADS], total[WARPS][HEADS], zero[WARPS][8], one[WARPS][8];
    int flag;
};

// The channel in a half of register i of lane q of a quad; in the second half of the registers, its partner.
__device__ __forceinline__ int channel_of(int q, int i, int half) {
#if MERGED
    return half * 32 + 8 * q + i;
#elif KEY_BITS == 2
    return 16 * q + i + 8 * half;
#elif KEY_BITS == 4
    return D / 8 * q + i / 4 * 8 + i % 4 + 4 * half;
#else
    return D / 8 * q + 2 * i + half;
#endif
}

__device__ __forceinline__ int partner_of(int channel) { return channel < D / 2 ? channel + D / 2 : channel - D / 2; }

// What the code in field i of a word is multiplied by, beside 2^-24.
__host__ __device__ constexpr int level(int bits, int i) {
    return bits == 2 ? 1 << 2 * (i < 5 ? i : i - 5) : bits == 4 ? (i & 1 ? 16 : 1) : 1;
}

// Fields of a word of two runs of codes, as subnormal float16.
__device__ __forceinline__ u32 field_2(u32 word, int i) {
    return i < 5 ? word & 0x00030003u << 2 * i : word >> 10 & 0x00030003u << 2 * (i - 5);
}

__device__ __forceinline__ u32 field_4(u32 word, int i) {
    return i < 2 ? word & 0x000f000fu << 4 * i : word >> 8 & 0x000f000fu << 4 * (i - 2);
}

// The place in 16 tokens of row r of a fragment of scores: so that transposed weights lie as values want them.
__device__ __forceinline__ int place_of(int r) { return (r >> 1) + (r & 1) * 4; }

// Where byte `at` of a token's values lies: chunks of 16 bytes trade places, so that tokens do not meet in a bank.
__device__ __forceinline__ int placed(int token, int at) {
#if VALUE_BITS == 1
    return at;
#else
    return VALUE_BYTES == 128 ? at ^ (token & 3) * 32 : VALUE_BYTES == 64 ? at ^ (token >> 1 & 1) * 32 : at;
#endif
}

// What a lane copies of 16 tokens beside whole rounds of keys and values.
struct Feed {
    const u8 *from[MIXED];
    u32 page[MIXED], sub[MIXED], to[MIXED];  // bytes of a page, of 16 tokens; place in a stage
};

__device__ __forceinline__ Feed feed_of(const Args &a) {
    Feed f;
    const int lane = threadIdx.x & 31, spans = a.kv_heads / a.span, rest = VALUE_BYTES % 32;
#pragma unroll
    for (int j = 0; j < MIXED; j++) {
        int p = lane + 32 * j;
        if (p < rest) {
            const int at = (WHOLE * 32 + p) * 16;
            f.from[j] = a.value_codes + (size_t)a.head * a.page_size * VALUE_BYTES + at;
            f.page[j] = a.kv_heads * a.page_size * VALUE_BYTES, f.sub[j] = 16 * VALUE_BYTES;
            f.to[j] = VALUES_AT + at / VALUE_BYTES * VALUE_BYTES + placed(at / VALUE_BYTES, at % VALUE_BYTES);
        } else if (p < rest + KEY_NUMBERS) {
            p -= rest;
            f.from[j] = a.key_numbers + (size_t)(a.head / a.span) * a.page_size * KEY_NUMBERS + p * 16;
            f.page[j] = spans * a.page_size * KEY_NUMBERS, f.sub[j] = 16 * KEY_NUMBERS;
            f.to[j] = KEY_NUMBERS_AT + p * 16;
        } else {
            p -= rest + KEY_NUMBERS;
            f.from[j] = a.value_numbers + (size_t)(a.head / a.span) * a.page_size * VALUE_NUMBERS + p * 16;
            f.page[j] = spans * a.page_size * VALUE_NUMBERS, f.sub[j] = 16 * VALUE_NUMBERS;
            f.to[j] = p < VALUE_NUMBERS ? VALUE_NUMBERS_AT + p * 16 : ~0u;
        }
    }
    return f;
}

// This lane's 16 tokens of a tile: their page, and their place in it in steps of 16 tokens.
__device__ __forceinline__ int2 locate(const Args &a, int tile, int last) {
    const int each = a.page_size / 16, at = min(tile * SUBS + (int)(threadIdx.x & 31) % SUBS, last);
    return make_int2(a.table[at / each], at % each);
}

__device__ __forceinline__ void start_copies(const Args &a, const Feed &f, u8 *stage, int tile, int2 where) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < SUBS; m++) {
        const int page = __shfl_sync(~0u, where.x, m), sub = __shfl_sync(~0u, where.y, m);
        const size_t heads = (size_t)page * a.kv_heads + a.head;
        const u8 *keys = a.key_codes + (heads * a.page_size + sub * 16) * KEY_BYTES;
#pragma unroll
        for (int i = 0; i < (KEY_BYTES + 31) / 32; i++) {
            const int at = (lane + 32 * i) * 16, token = at / KEY_BYTES;
            const int within = KEY_BYTES == 16 ? 0 : at % KEY_BYTES ^ (token >> 2 & 1) * (KEY_BYTES / 2);
            if (lane + 32 * i < KEY_BYTES) copy_16(stage + (m * 16 + token) * KEY_BYTES + within, keys + at);
        }
        const u8 *values = a.value_codes + (heads * a.page_size + sub * 16) * VALUE_BYTES;
#pragma unroll
        for (int i = 0; i < WHOLE; i++) {
            const int at = (lane + 32 * i) * 16, token = at / VALUE_BYTES;
            copy_16(stage + VALUES_AT + (m * 16 + token) * VALUE_BYTES + placed(token, at % VALUE_BYTES), values + at);
        }
#pragma unroll
        for (int j = 0; j < MIXED; j++)
            if (f.to[j] != ~0u) copy_16(stage + f.to[j] + m * f.sub[j], f.from[j] + (size_t)page * f.page[j] + sub * f.sub[j]);
    }
    if (PRE && lane < BASE_BYTES / 16) copy_16(stage + BASE_AT + lane * 16, a.bases + (size_t)(tile * TOKENS / PLACES) * BASE_BYTES + lane * 16);
}

// Scales and zeros of a token for this lane's two columns.
template <int COUNT>
__device__ __forceinline__ void numbers_of(float (&scale)[2], float (&zero)[2], const u8 *token) {
    const u8 *at = token + (threadIdx.x & 3) * 2 % GROUPS * COUNT * NUMBER;
    u32 first, second;  // halves: scale, then zero
#if NUMBER == 1
    if (COUNT == 2 && GROUPS == 1) first = second = e4m3_to_halves(*(const u16 *)at);
    else if (COUNT == 2) {
        const u32 word = *(const u32 *)at;
        first = e4m3_to_halves(word & 0xffff), second = e4m3_to_halves(word >> 16);
    } else if (GROUPS == 1) first = second = e4m3_to_halves(*at);
    else first = e4m3_to_halves(*(const u16 *)at), second = first >> 16;
#else
    if (COUNT == 2 && GROUPS == 1) first = second = *(const u32 *)at;
    else if (COUNT == 2) {
        const uint2 words = *(const uint2 *)at;
        first = words.x, second = words.y;
    } else if (GROUPS == 1) first = second = *(const u16 *)at;
    else first = *(const u32 *)at, second = first >> 16;
#endif
    scale[0] = half_to_float(first & 0xffff), scale[1] = half_to_float(second & 0xffff);
    zero[0] = COUNT == 2 ? half_to_float(first >> 16) : 0.f, zero[1] = COUNT == 2 ? half_to_float(second >> 16) : 0.f;
}

// Words of a token's keys that this lane has: the first half of the channels, then their partners.
struct Words {
    u32 own[PAIRS * KEY_BITS / 16 > 1 ? PAIRS * KEY_BITS / 16 : 1], other[PAIRS * KEY_BITS / 16 > 1 ? PAIRS * KEY_BITS / 16 : 1];
};

__device__ __forceinline__ void load_words(Words &w, const u8 *token, int row) {
    const int q = threadIdx.x & 3;
#if MERGED
    w.own[0] = *(const u16 *)(token + 2 * q) | (u32) * (const u16 *)(token + 8 + 2 * q) << 16;
    w.other[0] = 0;
#else
    const int at = q * (KEY_BYTES / 8) ^ (row & 1) * (KEY_BYTES / 2);  // `row & 1` of a place is bit 2 of its token
    const u8 *own = token + at, *other = token + (at ^ KEY_BYTES / 2);
#if KEY_BYTES == 32
    w.own[0] = *(const u32 *)own, w.other[0] = *(const u32 *)other;
#elif KEY_BYTES == 64
    *(uint2 *)w.own = *(const uint2 *)own, *(uint2 *)w.other = *(const uint2 *)other;
#else
    *(uint4 *)w.own = *(const uint4 *)own, *(uint4 *)w.other = *(const uint4 *)other;
#endif
#endif
}

__device__ __forceinline__ u32 key_field(const u32 *words, int i) {
#if KEY_BITS == 2
    return field_2(words[0], i);
#elif KEY_BITS == 4
    return field_4(words[i / 4], i % 4);
#else
    return e4m3_to_halves(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffff);
#endif
}

// B of the scores: of the query heads and groups, a column each.
struct Query {
    u32 b[KINDS][PAIRS];
    u32 zero[2][PRE && ZEROS ? PAIRS : 1], shift[2][PRE && SHIFT ? PAIRS : 1];
};

// The query head of a column; columns beyond the last one repeat others, and nobody reads what comes of them.
__device__ __forceinline__ int head_of(int column) { return min(column / GROUPS, HEADS - 1); }

__device__ __forceinline__ u32 pick(const uint4 &v, int e) { return e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w; }

#if GROUPS > 1
#define GROUP_OF(x, unit) half_mul(x, unit)
#else
#define GROUP_OF(x, unit) (x)
#endif

// base: cosines, then sines, of the first place; nothing where keys are stored after rotary embedding.
__device__ __forceinline__ void make_query(Query &query, const Shared &sh, const u8 *base) {
    const int lane = threadIdx.x & 31, q = lane & 3, column = lane >> 2, head = head_of(column), group = column % GROUPS;
#pragma unroll
    for (int j = 0; j < PAIRS / 4; j++) {
        const uint4 xs = sh.x[head][q][j], ys = sh.y[head][q][j];
#if GROUPS > 1
        const uint4 owns = sh.own[group][q][j], others = sh.other[group][q][j];
#endif
#if PRE
        const uint4 cosines = *(const uint4 *)(base + (j * 4 + q) * 16), sines = *(const uint4 *)(base + ((PAIRS / 4 + j) * 4 + q) * 16);
#endif
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = j * 4 + e;
            u32 x = pick(xs, e), y = pick(ys, e);
#if GROUPS > 1
            const u32 own = pick(owns, e), other = pick(others, e);
#endif
#if PRE
            const u32 c = pick(cosines, e), s = pick(sines, e), turned = half_fma(x, c, half_mul(y, s));
            y = half_fnma(x, s, half_mul(y, c)), x = turned;
#if SHIFT || ZEROS
            // The table has cosines times 2^15 / level for codes of less than 8 bits; this makes it 2^5.
            const float factor = ZEROS ? level(KEY_BITS, i) / 1024.f : 32.f;
            const u32 scaled = halves(factor, factor);
#endif
#if SHIFT
            const u32 sx = group ? 0 : pick(sh.shift_own[q][j], e), sy = group ? 0 : pick(sh.shift_other[q][j], e);
#if MERGED
            query.shift[0][i] = half_mul(half_mul(x, scaled), sx), query.shift[1][i] = half_mul(half_mul(y, scaled), sx);
#else
            query.shift[0][i] = half_fma(half_mul(x, scaled), sx, half_mul(half_mul(y, scaled), sy));
            query.shift[1][i] = half_fnma(half_mul(x, scaled), sy, half_mul(half_mul(y, scaled), sx));
#endif
#endif
#if ROTATED
            query.b[0][i] = x, query.b[1][i] = y;
#if ZEROS
            query.zero[0][i] = half_fma(x, scaled, half_mul(y, scaled)), query.zero[1][i] = half_fnma(x, scaled, half_mul(y, scaled));
#endif
#elif MERGED
            query.b[0][i] = GROUP_OF(x, own), query.b[1][i] = GROUP_OF(y, own);
#if ZEROS
            query.zero[0][i] = half_mul(query.b[0][i], scaled), query.zero[1][i] = half_mul(query.b[1][i], scaled);
#endif
#else
            query.b[0][i] = GROUP_OF(x, own), query.b[1][i] = GROUP_OF(y, own);
            query.b[2][i] = GROUP_OF(y, other), query.b[3][i] = GROUP_OF(x ^ 0x80008000u, other);
#if ZEROS
            query.zero[0][i] = half_fma(query.b[0][i], scaled, half_mul(query.b[2][i], scaled));
            query.zero[1][i] = half_fma(query.b[1][i], scaled, half_mul(query.b[3][i], scaled));
#endif
#endif
#else
            query.b[0][i] = GROUP_OF(x, own);
#if !MERGED
            query.b[1][i] = GROUP_OF(y, other);
#endif
#endif
        }
    }
}

// Codes of 16 tokens times the query: c; the table times the query: z; times the shift: s. Rows place_of(lane / 4) and
// 8 more, columns lane % 4 * 2 and the next. table: of these tokens' places.
__device__ __forceinline__ void multiply_keys(float (&c)[4], float (&z)[4], float (&s)[4], const u8 *tokens, const u8 *table, const Query &query) {
    const int lane = threadIdx.x & 31, row = lane >> 2;
    const u8 *first_token = tokens + place_of(row) * KEY_BYTES;
    Words first, second;
    load_words(first, first_token, row);
    load_words(second, first_token + 8 * KEY_BYTES, row);
    float more[4], more_z[4], more_s[4];  // two chains of products each
#pragma unroll
    for (int i = 0; i < PAIRS; i += 2) {
        u32 own[4], other[4];  // as A wants them: first row, second row, first row, second row
#pragma unroll
        for (int n = 0; n < 4; n++) {
            own[n] = key_field(n & 1 ? second.own : first.own, i + (n >> 1));
            if (!MERGED) other[n] = key_field(n & 1 ? second.other : first.other, i + (n >> 1));
        }
#if PRE
        const uint4 cosine = *(const uint4 *)(table + (i / 2 * (PLACES / 16) * 32 + lane) * 16);
        const uint4 sine = *(const uint4 *)(table + ((PAIRS / 2 + i / 2) * (PLACES / 16) * 32 + lane) * 16);
        u32 a[4], b[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            a[n] = half_mul(own[n], pick(cosine, n)), b[n] = half_mul(own[n], pick(sine, n));
#if ROTATED
            a[n] = half_fnma(other[n], pick(sine, n), a[n]), b[n] = half_fma(other[n], pick(cosine, n), b[n]);
#endif
        }
        mma_next(i == 0, c, a[0], a[1], a[2], a[3], query.b[0][i], query.b[0][i + 1]);
        mma_next(i == 0, more, b[0], b[1], b[2], b[3], query.b[1][i], query.b[1][i + 1]);
#if !ROTATED && !MERGED
#pragma unroll
        for (int n = 0; n < 4; n++) a[n] = half_mul(other[n], pick(cosine, n)), b[n] = half_mul(other[n], pick(sine, n));
        mma_half(c, a[0], a[1], a[2], a[3], query.b[2][i], query.b[2][i + 1]);
        mma_half(more, b[0], b[1], b[2], b[3], query.b[3][i], query.b[3][i + 1]);
#endif
#if ZEROS
        mma_next(i == 0, z, cosine.x, cosine.y, cosine.z, cosine.w, query.zero[0][i], query.zero[0][i + 1]);
        mma_next(i == 0, more_z, sine.x, sine.y, sine.z, sine.w, query.zero[1][i], query.zero[1][i + 1]);
#endif
#if SHIFT
        mma_next(i == 0, s, cosine.x, cosine.y, cosine.z, cosine.w, query.shift[0][i], query.shift[0][i + 1]);
        mma_next(i == 0, more_s, sine.x, sine.y, sine.z, sine.w, query.shift[1][i], query.shift[1][i + 1]);
#endif
#elif MERGED
        mma_next(i < 4, i & 2 ? more : c, own[0], own[1], own[2], own[3], query.b[0][i], query.b[0][i + 1]);
#else
        mma_next(i == 0, c, own[0], own[1], own[2], own[3], query.b[0][i], query.b[0][i + 1]);
        mma_next(i == 0, more, other[0], other[1], other[2], other[3], query.b[1][i], query.b[1][i + 1]);
#endif
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        c[n] += more[n];
        if (PRE && ZEROS) z[n] += more_z[n];
        if (PRE && SHIFT) s[n] += more_s[n];
    }
}

#if VALUE_BITS == 1
#define OWN (VALUE_BYTES / 8)      // bytes of a token that a lane takes all five codes of
#define SPARE (D / 8 - 5 * OWN)    // codes of other bytes that it takes

// Constants of a lane for its spare codes: place of their byte, 3^-k and its power.
struct Spare {
    int at[SPARE];
    u32 factor[SPARE];
};

__device__ __forceinline__ u32 third(int k) { return k == 0 ? 0x3c003c00u : k == 1 ? 0x35553555u : k == 2 ? 0x2f1c2f1cu : k == 3 ? 0x28be28beu : 0x22522252u; }

__device__ __forceinline__ Spare spare_of(int lane) {
    Spare s;
#pragma unroll
    for (int i = 0; i < SPARE; i++) {
        const int code = (lane >> 2) + 8 * i;
        s.at[i] = 8 * OWN + code / 5, s.factor[i] = third(code % 5);
    }
    return s;
}

// x - 121 of two bytes with 1024 in front, and the nearest whole numbers of it divided by 3^k.
__device__ __forceinline__ u32 centred(u32 x) { return half_fma(x, 0x3c003c00u, 0xe479e479u); }
__device__ __forceinline__ u32 nearest(u32 x, u32 factor) { return half_fma(half_fma(x, factor, 0x66006600u), 0x3c003c00u, 0xe600e600u); }
#else
struct Spare {};
__device__ __forceinline__ Spare spare_of(int) { return Spare(); }
#endif

// 16 tokens' values times the weights of fragment (b0, b1). Row lane / 4 of out[i], and the 8th after it, are codes
// i and D / 16 + i of lane / 4's D / 8 channels; three levels: its whole bytes' five codes each, then its spare ones.
__device__ __forceinline__ void multiply_values(float (&out)[D / 16][4], const u8 *stage, int m, u32 b0, u32 b1, const Spare &spare) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const u8 *tokens = stage + VALUES_AT + (m * 16 + q) * VALUE_BYTES;
#if VALUE_BITS == 1
    u32 rows[2][D / 8];  // of the first two tokens, and of the others
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const u8 *a = tokens + t * 8 * VALUE_BYTES, *b = a + 4 * VALUE_BYTES;
        u32 bytes[OWN];
#if D == 128
        const u32 low = *(const u16 *)(a + 2 * g) | 0x64640000u, high = *(const u16 *)(b + 2 * g);
        bytes[0] = __byte_perm(low, high, 0x2420), bytes[1] = __byte_perm(low, high, 0x2521);
        bytes[2] = (a[16 + g] | (u32)b[16 + g] << 16) | 0x64006400u;
#else
        bytes[0] = (a[g] | (u32)b[g] << 16) | 0x64006400u;
#endif
#pragma unroll
        for (int n = 0; n < OWN; n++) {
            const u32 x = centred(bytes[n]);
            rows[t][n * 5] = x;
#pragma unroll
            for (int k = 1; k < 5; k++) rows[t][n * 5 + k] = nearest(x, third(k));
        }
#pragma unroll
        for (int i = 0; i < SPARE; i++)
            rows[t][OWN * 5 + i] = nearest(centred((a[spare.at[i]] | (u32)b[spare.at[i]] << 16) | 0x64006400u), spare.factor[i]);
    }
#pragma unroll
    for (int i = 0; i < D / 16; i++) mma_half(out[i], rows[0][2 * i], rows[0][2 * i + 1], rows[1][2 * i], rows[1][2 * i + 1], b0, b1);
#else
    const int at = placed(q, g * (VALUE_BYTES / 8));  // the same for 4 tokens on, which differ in bit 2 and above
    u32 pairs[2][D / 8 * VALUE_BITS / 16 > 1 ? D / 8 * VALUE_BITS / 16 : 1];  // of two tokens each
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const u8 *a = tokens + t * 8 * VALUE_BYTES + at, *b = a + 4 * VALUE_BYTES;
#if VALUE_BYTES == 16
        pairs[t][0] = *(const u16 *)a | (u32) * (const u16 *)b << 16;
#elif VALUE_BYTES == 32
        const u32 x = *(const u32 *)a, y = *(const u32 *)b;
#if VALUE_BITS == 8
#error "a head has at least 64 channels"
#endif
        pairs[t][0] = __byte_perm(x, y, 0x5410), pairs[t][1] = __byte_perm(x, y, 0x7632);
#elif VALUE_BITS == 4
        const uint2 x = *(const uint2 *)a, y = *(const uint2 *)b;
        pairs[t][0] = __byte_perm(x.x, y.x, 0x5410), pairs[t][1] = __byte_perm(x.x, y.x, 0x7632);
        pairs[t][2] = __byte_perm(x.y, y.y, 0x5410), pairs[t][3] = __byte_perm(x.y, y.y, 0x7632);
#else
#pragma unroll
        for (int n = 0; n < VALUE_BYTES / 32; n++) {
            const u32 x = ((const u32 *)a)[n], y = ((const u32 *)b)[n];
            pairs[t][2 * n] = __byte_perm(x, y, 0x5140), pairs[t][2 * n + 1] = __byte_perm(x, y, 0x7362);
        }
#endif
    }
    auto code = [&](int t, int i) -> u32 {
#if VALUE_BITS == 2
        return field_2(pairs[t][i / 8], i % 8);
#elif VALUE_BITS == 4
        return field_4(pairs[t][i / 4], i % 4);
#else
        return e4m3_to_halves(i & 1 ? pairs[t][i / 2] >> 16 : pairs[t][i / 2] & 0xffff);
#endif
    };
#pragma unroll
    for (int i = 0; i < D / 16; i++) mma_half(out[i], code(0, i), code(0, D / 16 + i), code(1, i), code(1, D / 16 + i), b0, b1);
#endif
}

// Where the sum over code `k` (three levels: number r_k) of a channel lies: the row of its fragment.
__device__ __forceinline__ int row_of_code(int index, int lane_group) { return index / 2 * 16 + index % 2 * 8 + lane_group; }

// The sum of weights times code of a channel, in its column; ones: the sum of weights, rounded as they were.
__device__ __forceinline__ float gathered(const float (*raw)[8], int channel, int column, float ones) {
#if VALUE_BITS == 1
    auto row = [](int byte, int k) {
        if (byte >= 8 * OWN) {
            const int code = (byte - 8 * OWN) * 5 + k;
            return row_of_code(OWN * 5 + code / 8, code % 8);
        }
        return D == 128 ? (byte < 16 ? row_of_code(byte % 2 * 5 + k, byte / 2) : row_of_code(10 + k, byte - 16)) : row_of_code(k, byte);
    };
    const int byte = channel / 5, k = channel % 5;
    // The last byte's codes past the head are 0: their r is what so many -1 give.
    const float after = channel + 1 < D ? raw[row(byte, k + 1)][column] : D == 128 ? -4.f * ones : -ones;
    return raw[row(byte, k)][column] + ones - (k < 4 ? 3.f * after : 0.f);
#else
    const int each = D / 8, i = channel % each, field = VALUE_BITS == 2 ? i % 8 : VALUE_BITS == 4 ? i % 4 : 0;
    const float unit = VALUE_BITS == 8 ? 1.f : 16777216.f / level(VALUE_BITS, field);
    return raw[i % (D / 16) * 16 + i / (D / 16) * 8 + channel / each][column] * unit;
#endif
}

// Exact tokens of a room, as csrc/decode.cu reads them: results of query head lane % 4 * 2 and the next.
struct Exact {
    float out[VP][4][4];
    float top, sum;  // of query head lane / 4
};

__device__ __forceinline__ const u16 *exact_row(const u16 *store, const Args &a, int position) {
    const int page = position < a.sinks ? a.ring : position / a.page_size % a.ring;
    return store + ((((size_t)a.room * (a.ring + 1) + page) * a.kv_heads + a.head) * a.page_size + position % a.page_size) * D;
}

// 16 tokens from `begin` on, of which from `from` on and before `to` are seen.
__device__ __forceinline__ void add_exact(Exact &e, const Args &a, const u16 (*queries)[PITCH], int begin, int from, int to) {
    const int lane = threadIdx.x & 31;
    uint4 k[2][KP], v[4][VP];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const u16 *row = exact_row(a.exact_keys, a, min(max(begin + n * 8 + (lane >> 2), from), to - 1)) + (lane & 3) * 8;
#pragma unroll
        for (int i = 0; i < KP; i++) k[n][i] = *(const uint4 *)(row + i * 32);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int token = begin + (lane & 3) * 2 + (n & 1) + (n >> 1) * 8;
        const u16 *row = exact_row(a.exact_values, a, min(max(token, from), to - 1)) + (lane >> 2) * 8;
#pragma unroll
        for (int i = 0; i < VP; i++) v[n][i] = *(const uint4 *)(row + i * 64);
    }
    float s[2][2];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < KP; i++) {
            const uint4 q = *(const uint4 *)&queries[lane >> 2][i * 32 + (lane & 3) * 8];
            mma(c, q.x, 0, q.y, 0, k[n][i].x, k[n][i].y);
            mma(c, q.z, 0, q.w, 0, k[n][i].z, k[n][i].w);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float x = c[j] * a.scale;
            if (a.softcap > 0.f) x = a.softcap * tanhf(x / a.softcap);
            const int token = begin + n * 8 + (lane & 3) * 2 + j;
            s[n][j] = token >= from && token < to ? x * LOG2E : -INFINITE;
        }
    }
    float top = fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(fmaxf(top, __shfl_xor_sync(~0u, top, 2)), e.top);
    const float factor = e.top == top ? 1.f : exp2f(e.top - top);  // some token is seen: the maximum is finite
    e.top = top, e.sum *= factor;
    const float even = __shfl_sync(~0u, factor, (lane & 3) * 8), odd = __shfl_sync(~0u, factor, (lane & 3) * 8 + 4);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) s[n][j] = exp2f(s[n][j] - top), e.sum += s[n][j];
    const u32 first = pack(s[0][0], s[0][1]), second = pack(s[1][0], s[1][1]);
#pragma unroll
    for (int i = 0; i < VP; i++) {
        const u32 *w = &v[0][i].x, *x = &v[1][i].x, *y = &v[2][i].x, *z = &v[3][i].x;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float *o = e.out[i][j];
            o[0] *= even, o[2] *= even, o[1] *= odd, o[3] *= odd;
            mma(o, __byte_perm(w[j], x[j], 0x5410), __byte_perm(w[j], x[j], 0x7632), __byte_perm(y[j], z[j], 0x5410), __byte_perm(y[j], z[j], 0x7632), first, second);
        }
    }
}

// Tokens of a tile that are not seen, before `from` and from `to` on, may hold anything: make it numbers, and such that
// weights do not count.
__device__ __forceinline__ void hide(u8 *stage, int from, int to) {
    for (int t = threadIdx.x & 31; t < TOKENS; t += 32) {
        if (t >= from && t < to) continue;
        for (int e = 0; e < KEY_NUMBERS; e++) stage[KEY_NUMBERS_AT + t * KEY_NUMBERS + e] = 0;
        for (int e = 0; e < VALUE_NUMBERS; e++) stage[VALUE_NUMBERS_AT + t * VALUE_NUMBERS + e] = 0;
        if (VALUE_BITS == 8)
            for (int e = 0; e < VALUE_BYTES; e += 16) *(uint4 *)(stage + VALUES_AT + t * VALUE_BYTES + e) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
}

// Queries of this block into shared memory, and what follows from them for all tokens.
__device__ __forceinline__ void prepare(Shared &sh, const Args &a, const u16 *queries, int heads, const u8 *groups, const float *units, const float *shifts) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int h = warp; h < HEADS; h += WARPS) {
        float v[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const u16 bits = h < heads ? queries[h * D + lane + 32 * i] : (u16)0;
            if (EXACT) sh.q[h][lane + 32 * i] = bits;
            v[i] = to_float(bits);
        }
#if TURN
        turn<TURN>(v);
#endif
        float most = 0.f, shifted = 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            most = fmaxf(most, fabsf(v[i]));
            if (SHIFT && !PRE) shifted += v[i] * shifts[lane + 32 * i];
            sh.plain[h][lane + 32 * i] = v[i];
        }
#pragma unroll
        for (int d = 16; d; d >>= 1) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
            if (SHIFT && !PRE) shifted += __shfl_xor_sync(~0u, shifted, d);
        }
        // A power of two that brings the largest number to 8 up to 16.
        const int exponent = most > 0.f ? min(max((__float_as_int(most) >> 23) - 127, -90), 90) : 0;
        if (lane == 0) sh.lift[h] = __int_as_float((127 + exponent - 3) << 23), sh.shifted[h] = shifted;
        if (!PRE && ZEROS)
            for (int g = 0; g < GROUPS; g++) {
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < D / 32; i++) sum += groups[lane + 32 * i] == g ? v[i] : 0.f;
#pragma unroll
                for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
                if (lane == 0) sh.sums[h][g] = sum;
            }
    }
    if (EXACT)
        for (int e = threadIdx.x; e < (8 - HEADS) * D; e += THREADS) sh.q[HEADS + e / D][e % D] = 0;
    __syncthreads();
    for (int e = threadIdx.x; e < HEADS * 4 * PAIRS; e += THREADS) {
        const int h = e / (4 * PAIRS), q = e / PAIRS % 4, i = e % PAIRS, one = channel_of(q, i, 0), two = channel_of(q, i, 1);
        const float factor = 1.f / (sh.lift[h] * (PRE ? 1 : level(KEY_BITS, i)));
        ((u32 *)sh.x[h][q])[i] = halves(sh.plain[h][one] * factor, sh.plain[h][two] * factor);
        ((u32 *)sh.y[h][q])[i] = halves(sh.plain[h][partner_of(one)] * factor, sh.plain[h][partner_of(two)] * factor);
    }
    for (int e = threadIdx.x; e < GROUPS * 4 * PAIRS; e += THREADS) {
        const int g = e / (4 * PAIRS), q = e / PAIRS % 4, i = e % PAIRS, one = channel_of(q, i, 0), two = channel_of(q, i, 1);
        float most = units[0];
#pragma unroll
        for (int k = 1; k < GROUPS; k++) most = fmaxf(most, units[k]);
        const float unit = units[g] / most;  // units are powers of two
        ((u32 *)sh.own[g][q])[i] = halves(groups[one] == g ? unit : 0.f, groups[two] == g ? unit : 0.f);
        ((u32 *)sh.other[g][q])[i] = halves(groups[partner_of(one)] == g ? unit : 0.f, groups[partner_of(two)] == g ? unit : 0.f);
        if (PRE && SHIFT && g == 0) {
            ((u32 *)sh.shift_own[q])[i] = halves(shifts[one], shifts[two]);
            ((u32 *)sh.shift_other[q])[i] = halves(shifts[partner_of(one)], shifts[partner_of(two)]);
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
packed_decode(const u16 *queries, const u8 *turns, const u8 *bases, const u8 *key_codes, const u8 *key_numbers, const u8 *value_codes, const u8 *value_numbers, const u16 *exact_keys, const u16 *exact_values, const int *tables, const int *lengths, const int *rooms, const u8 *key_groups, const float *key_units, const float *key_shifts, const u8 *value_groups, const float *value_units, const float *value_shifts, u16 *result, float *lse, float *workspace, int *counters, const uint4 *items, float scale, float softcap, int kv_heads, int group, int parts, int span, int page_size, int columns, int window, int sinks, int ring) {
    extern __shared__ __align__(16) u8 memory[];
    __shared__ __align__(16) Shared sh;
#if EVEN
    const uint4 item = items[blockIdx.y];
    const int head = blockIdx.x / parts, part = blockIdx.x % parts, request = (int)item.x, split = item.w & 0xffff, active = item.w >> 16;
    if (request < 0) return;
#else
    const int split = blockIdx.x, splits = gridDim.x, head = blockIdx.y / parts, part = blockIdx.y % parts, request = blockIdx.z;
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3;
    Args a;
    a.key_codes = key_codes, a.key_numbers = key_numbers, a.value_codes = value_codes, a.value_numbers = value_numbers, a.bases = bases;
    a.exact_keys = exact_keys, a.exact_values = exact_values, a.table = tables + (size_t)request * columns, a.length = lengths[request];
    a.window = window, a.sinks = sinks, a.page_size = page_size, a.kv_heads = kv_heads, a.head = head, a.span = span, a.ring = ring;
    a.room = EXACT ? rooms[request] : 0, a.scale = scale, a.softcap = softcap;

    // 16 sinks or 16 recent tokens are a unit, and a tile of packed ones. Every split has its part of both.
    const int begin = EXACT ? min(sinks, a.length) : 0, end = EXACT ? max(begin, a.length - window) : a.length;
    const int sink_units = (begin + 15) / 16, exact_units = sink_units + (end < a.length ? (a.length + 15) / 16 - end / 16 : 0);
    const int skipped = begin / TOKENS, tiles = end > begin ? (end + TOKENS - 1) / TOKENS - skipped : 0, last_piece = (end - 1) / 16;
#if !EVEN
    const int active = min(splits, max(1, (2 * exact_units + tiles + LEAST - 1) / LEAST));  // an exact unit is as many bytes as two tiles
#endif
    auto part_of = [&](int count, int n) { return (int)((long long)count * n / active); };
    const int exact_first = part_of(exact_units, split), exact_last = part_of(exact_units, split + 1);
    const int tile_first = part_of(tiles, split), tile_last = part_of(tiles, split + 1);
    // Warps take turns, first at exact units.
    const int turn_at = (warp + WARPS - (exact_last - exact_first) % WARPS) % WARPS;
    const int packed = tile_first + turn_at < tile_last ? (tile_last - 1 - tile_first - turn_at) / WARPS + 1 : 0;
    const int start = skipped + tile_first + turn_at;
    const bool exacts = exact_first + warp < exact_last;

    start_dependents();
    u8 *ring_of_stages = memory + TABLE_BYTES + warp * (STAGES * STAGE);
    const Feed feed = feed_of(a);
    if (PRE)
        for (int e = threadIdx.x; e < TABLE_BYTES / 16; e += THREADS) copy_16(memory + e * 16, turns + e * 16);
    int2 where = packed ? locate(a, start, last_piece) : make_int2(0, 0);
    int begun = 0;  // tiles whose copies have begun
    auto begin_next = [&]() {
        if (begun < packed) {
            const int tile = start + begun * WARPS;
            start_copies(a, feed, ring_of_stages + begun % STAGES * STAGE, tile, where);
            if (begun + 1 < packed) where = locate(a, tile + WARPS, last_piece);
        }
        end_copies();
        begun++;
    };
    // What earlier steps wrote does not depend on the kernel before.
    while (begun < STAGES - 1 && (begun >= packed || window >= MOST_AHEAD || (start + begun * WARPS + 1) * TOKENS + MOST_AHEAD <= a.length)) begin_next();
    wait_for_kernel_before();
    if (split >= active) {
        wait_for_copies<0>();
        return;
    }
    const int heads = min(HEADS, group - part * HEADS);
    const size_t at_query = ((size_t)request * kv_heads + head) * group + part * HEADS;
    if (a.length == 0) {
        for (int e = threadIdx.x; e < heads * D; e += THREADS) result[at_query * D + e] = 0;
        if (lse)
            for (int h = threadIdx.x; h < heads; h += THREADS) lse[at_query + h] = -INFINITE;
        wait_for_copies<0>();
        return;
    }
    while (begun < STAGES - 1) begin_next();
    prepare(sh, a, queries + at_query * D, heads, key_groups + head * D, key_units + head / span * GROUPS, key_shifts + head * D);

    if (EXACT && exacts) {
        Exact e;
#pragma unroll
        for (int i = 0; i < VP; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) e.out[i][j][0] = e.out[i][j][1] = e.out[i][j][2] = e.out[i][j][3] = 0.f;
        e.top = -INFINITE, e.sum = 0.f;
        for (int unit = exact_first + warp; unit < exact_last; unit += WARPS) {
            if (unit < sink_units) add_exact(e, a, sh.q, unit * 16, 0, begin);
            else add_exact(e, a, sh.q, (end / 16 + unit - sink_units) * 16, end, a.length);
        }
        e.sum += __shfl_xor_sync(~0u, e.sum, 1);
        e.sum += __shfl_xor_sync(~0u, e.sum, 2);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int of = q * 2 + h;
            if (of >= HEADS) continue;
#pragma unroll
            for (int i = 0; i < VP; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    *(float2 *)&sh.out[warp][of][i * 64 + (lane >> 2) * 8 + 2 * j] = make_float2(e.out[i][j][h], e.out[i][j][2 + h]);
        }
        if (q == 0 && (lane >> 2) < HEADS) sh.top[warp][lane >> 2] = e.top, sh.sum[warp][lane >> 2] = e.sum;
    }

    // Scores of this lane's two columns: (scale * code sum + zero * (zero sum * zero_factor) + shift sum * shift_factor) *
    // factor, in log2 units, or with a cap in natural ones.
    float factor[SCORES], zero_factor[2], shift_factor[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int column = q * 2 + j, h = head_of(column), g = column % GROUPS;
        const float *units = key_units + head / span * GROUPS;
        float most = units[0];
#pragma unroll
        for (int k = 1; k < GROUPS; k++) most = fmaxf(most, units[k]);
        const float code = KEY_BITS == 8 ? 1.f : PRE ? 512.f : 16777216.f, lift = sh.lift[h];
        if (j < SCORES) factor[j] = scale * (CAP ? 1.f : LOG2E) * lift * most * code;
        zero_factor[j] = !ZEROS ? 0.f : PRE ? 1.f / (32.f * code) : sh.sums[h][g] * (units[g] / most) / (lift * code);
        shift_factor[j] = !SHIFT || g ? 0.f : (PRE ? 1.f / 32.f : sh.shifted[h] / lift) / (most * code);
    }
    Query query;
    if (!PRE) make_query(query, sh, memory);
    const Spare spare = spare_of(lane);
    float out[D / 16][4], zeros[2] = {0.f, 0.f}, ones[4] = {0.f, 0.f, 0.f, 0.f}, base[SCORES], sum[SCORES];
#pragma unroll
    for (int i = 0; i < D / 16; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
#pragma unroll
    for (int k = 0; k < SCORES; k++) base[k] = -INFINITE, sum[k] = 0.f;
    if (PRE) {  // the table is there for all
        wait_for_copies<0>();
        __syncthreads();
    }

    for (int n = 0; n < packed; n++) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();
        begin_next();
        const int tile = start + n * WARPS, from = begin - tile * TOKENS, to = end - tile * TOKENS;
        u8 *stage = ring_of_stages + n % STAGES * STAGE;
        const bool edge = from > 0 || to < TOKENS;
        if (edge) hide(stage, from, to);
        if (PRE) make_query(query, sh, stage + BASE_AT);
        float scores[SUBS][2][SCORES];
#pragma unroll
        for (int m = 0; m < SUBS; m++) {
            float c[4], z[4], s[4];
            multiply_keys(c, z, s, stage + m * 16 * KEY_BYTES, memory + (tile * SUBS % (PLACES / 16) + m) * 512, query);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int token = m * 16 + place_of(lane >> 2) + r * 8;
                float scales[2], offsets[2], x[2];
                numbers_of<KEY_COUNT>(scales, offsets, stage + KEY_NUMBERS_AT + token * KEY_NUMBERS);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    x[j] = scales[j] * c[2 * r + j];
                    if (ZEROS && !PRE) x[j] += offsets[j] * zero_factor[j];
                    if (SHIFT) x[j] += PRE ? s[2 * r + j] * shift_factor[j] : shift_factor[j];
                }
#if GROUPS == 1
                if (ZEROS && PRE) x[0] += offsets[0] * z[2 * r] * zero_factor[0], x[1] += offsets[1] * z[2 * r + 1] * zero_factor[1];
                scores[m][r][0] = x[0], scores[m][r][SCORES - 1] = x[1];
#else
                float v = x[0] + x[1];
                if (ZEROS && PRE) v += (offsets[0] * z[2 * r] + offsets[1] * z[2 * r + 1]) * zero_factor[0];
                if (GROUPS >= 4) v += __shfl_xor_sync(~0u, v, 1);
                if (GROUPS >= 8) v += __shfl_xor_sync(~0u, v, 2);
                scores[m][r][0] = v;
#endif
#if CAP
#pragma unroll
                for (int k = 0; k < SCORES; k++) scores[m][r][k] = softcap * LOG2E * tanhf(scores[m][r][k] * factor[k] / softcap);
#endif
            }
        }
        if (edge)
#pragma unroll
            for (int m = 0; m < SUBS; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int token = m * 16 + place_of(lane >> 2) + r * 8;
#pragma unroll
                    for (int k = 0; k < SCORES; k++)
                        if (token < from || token >= to) scores[m][r][k] = -INFINITE;
                }
#pragma unroll
        for (int k = 0; k < SCORES; k++) {
            float top = -INFINITE;
#pragma unroll
            for (int m = 0; m < SUBS; m++) top = fmaxf(top, fmaxf(scores[m][0][k], scores[m][1][k]));
#pragma unroll
            for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
            if (!CAP) top *= factor[k];
            const bool move = top > base[k] + CALM;  // the first score always does
            if (__any_sync(~0u, move)) {
                const float next = move ? top - LIFT : base[k], shrink = next == base[k] ? 1.f : exp2f(base[k] - next);
                base[k] = next, sum[k] *= shrink;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    if (SCORES == 2 && j != k) continue;
                    zeros[j] *= shrink, ones[j] *= shrink;
#pragma unroll
                    for (int i = 0; i < D / 16; i++) out[i][j] *= shrink, out[i][2 + j] *= shrink;
                }
            }
        }
#pragma unroll
        for (int m = 0; m < SUBS; m++) {
            u32 b[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int token = m * 16 + place_of(lane >> 2) + r * 8;
                float scales[2], offsets[2], w[2];
                numbers_of<VALUE_COUNT>(scales, offsets, stage + VALUE_NUMBERS_AT + token * VALUE_NUMBERS);
#pragma unroll
                for (int k = 0; k < SCORES; k++) {
                    scores[m][r][k] = exp2f(CAP ? scores[m][r][k] - base[k] : fmaf(scores[m][r][k], factor[k], -base[k]));
                    sum[k] += scores[m][r][k];
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float p = scores[m][r][SCORES == 2 ? j : 0];
                    w[j] = p * scales[j];
                    if (NUMBER == 2) w[j] = fminf(w[j], 65504.f);
                    if (VALUE_COUNT == 2) zeros[j] += p * offsets[j];
                }
                b[r] = transposed(halves(w[0], w[1]));
            }
            if (VALUE_BITS == 1) mma_half(ones, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u, b[0], b[1]);
            multiply_values(out, stage, m, b[0], b[1], spare);
        }
    }

    // This warp's sums, by channel, to those of its exact tokens.
    wait_for_copies<0>();
    __syncwarp();
    float(*raw)[8] = (float(*)[8])ring_of_stages;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        *(float2 *)&raw[i * 16 + (lane >> 2)][2 * q] = make_float2(out[i][0], out[i][1]);
        *(float2 *)&raw[i * 16 + 8 + (lane >> 2)][2 * q] = make_float2(out[i][2], out[i][3]);
    }
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
        zeros[0] += __shfl_xor_sync(~0u, zeros[0], d), zeros[1] += __shfl_xor_sync(~0u, zeros[1], d);
#pragma unroll
        for (int k = 0; k < SCORES; k++) sum[k] += __shfl_xor_sync(~0u, sum[k], d);
    }
    if (lane < 4)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int column = 2 * q + j, h = column / GROUPS;
            if (column >= COLUMNS) continue;
            sh.zero[warp][column] = zeros[j], sh.one[warp][column] = ones[j];
            if (column % GROUPS == 0) sh.base[warp][h] = base[SCORES == 2 ? j : 0], sh.total[warp][h] = sum[SCORES == 2 ? j : 0];
        }
    __syncwarp();
    for (int e = lane; e < HEADS * D; e += 32) {
        const int h = e / D, c = e % D, g = value_groups[head * D + c], column = h * GROUPS + g;
        const float old = EXACT && exacts ? sh.top[warp][h] : -INFINITE, now = sh.base[warp][h], top = fmaxf(old, now);
        const float keep = old == -INFINITE ? 0.f : exp2f(old - top), add = now == -INFINITE ? 0.f : exp2f(now - top);
        const float packed_sum = (gathered(raw, c, column, sh.one[warp][column]) + sh.zero[warp][column]) * value_units[head / span * GROUPS + g];
        const float x = (packed_sum + value_shifts[head * D + c] * sh.total[warp][h]) * add;
        sh.out[warp][h][c] = keep > 0.f ? sh.out[warp][h][c] * keep + x : x;
    }
    __syncwarp();
    if (lane < HEADS) {
        const float old = EXACT && exacts ? sh.top[warp][lane] : -INFINITE, now = sh.base[warp][lane], top = fmaxf(old, now);
        const float keep = old == -INFINITE ? 0.f : exp2f(old - top), add = now == -INFINITE ? 0.f : exp2f(now - top);
        sh.sum[warp][lane] = (keep > 0.f ? sh.sum[warp][lane] * keep : 0.f) + sh.total[warp][lane] * add;
        sh.top[warp][lane] = top;
    }
    __syncthreads();

    // Of all warps.
    for (int e = threadIdx.x; e < HEADS * D; e += THREADS) {
        const int h = e / D, c = e % D;
        float top = sh.top[0][h], x = 0.f, total = 0.f;
#pragma unroll
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, sh.top[w][h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = sh.top[w][h] == -INFINITE ? 0.f : exp2f(sh.top[w][h] - top);
            x += factor * sh.out[w][h][c], total += factor * sh.sum[w][h];
        }
        sh.out[0][h][c] = x;
        if (c == 0) sh.base[0][h] = top, sh.total[0][h] = total;
    }
    __syncthreads();

    // Of all splits: whoever arrives last.
    if (active > 1) {
#if EVEN
        const size_t pair = (size_t)request * gridDim.x + blockIdx.x, stride = (size_t)gridDim.x * PARTIAL;
        float *all = workspace + ((size_t)(blockIdx.y - split) * gridDim.x + blockIdx.x) * PARTIAL;
#else
        const size_t pair = (size_t)request * gridDim.y + blockIdx.y, stride = PARTIAL;
        float *all = workspace + pair * splits * PARTIAL;
#endif
        float *own = all + split * stride;
        for (int e = threadIdx.x; e < HEADS * D / 4; e += THREADS) __stcg((float4 *)own + e, ((const float4 *)&sh.out[0][0][0])[e]);
        for (int h = threadIdx.x; h < HEADS; h += THREADS) __stcg(own + HEADS * D + h, sh.base[0][h]), __stcg(own + HEADS * D + HEADS + h, sh.total[0][h]);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();  // for all: a fence counts for what a barrier ordered before it
            sh.flag = atomicAdd(counters + pair, 1) == active - 1;
            if (sh.flag) counters[pair] = 0;
            __threadfence();
        }
        __syncthreads();
        if (!sh.flag) return;
        float *weights = (float *)memory, *totals = weights + active * HEADS;
        for (int e = threadIdx.x; e < active * HEADS; e += THREADS) {
            const float *from = all + (e / HEADS) * stride + HEADS * D + e % HEADS;
            weights[e] = __ldcg(from), totals[e] = __ldcg(from + HEADS);
        }
        __syncthreads();
        for (int h = warp; h < HEADS; h += WARPS) {
            float top = -INFINITE, total = 0.f;
            for (int k = lane; k < active; k += 32) top = fmaxf(top, weights[k * HEADS + h]);
#pragma unroll
            for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
            for (int k = lane; k < active; k += 32) {
                const float factor = weights[k * HEADS + h] == -INFINITE ? 0.f : exp2f(weights[k * HEADS + h] - top);
                weights[k * HEADS + h] = factor, total += factor * totals[k * HEADS + h];
            }
#pragma unroll
            for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
            if (lane == 0) sh.base[0][h] = top, sh.total[0][h] = total;
        }
        __syncthreads();
        for (int e = threadIdx.x; e < HEADS * D / 4; e += THREADS) {
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
            for (int k = 0; k < active; k += 8) {
                float4 v[8];
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] = k + i < active ? __ldcg((const float4 *)(all + (k + i) * stride) + e) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float factor = k + i < active ? weights[(k + i) * HEADS + e * 4 / D] : 0.f;
                    x.x += factor * v[i].x, x.y += factor * v[i].y, x.z += factor * v[i].z, x.w += factor * v[i].w;
                }
            }
            ((float4 *)&sh.out[0][0][0])[e] = x;
        }
        __syncthreads();
    }
    for (int h = warp; h < heads; h += WARPS) {
        float v[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; i++) v[i] = sh.out[0][h][lane + 32 * i] / sh.total[0][h];
#if TURN
        turn<TURN>(v);
#endif
#pragma unroll
        for (int i = 0; i < D / 32; i++) result[(at_query + h) * D + lane + 32 * i] = (u16)(pack(v[i], 0.f) & 0xffff);
        if (lse && lane == 0) lse[at_query + h] = (sh.base[0][h] + log2f(sh.total[0][h])) / LOG2E;
    }
}
