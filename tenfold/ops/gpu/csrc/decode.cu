// Attention of one new token a request over the paged cache, with everything between qkv and the attention output in
// one launch: norm of q and k heads, rotary embedding, the write of k and v into their page, split-KV attention, merge.
//
// A block takes one request, one KV head with all its query heads, and one part ("split") of the context; its warps take
// tiles of 16 tokens in turn, each DEPTH of its own at a time. Keys and values go from global memory straight into
// registers as operands of mma.m16n8k16: q.k adds over head dimensions in any order, so a thread loads 8 neighbouring ones of a token; v.p
// produces head dimensions in any order, so a thread loads 8 neighbouring ones of four tokens and pairs two tokens by
// byte permutation; and the weights p leave the first product just as the second wants them. The new token's k and v are read from shared memory, so nobody waits for their way through the cache.
//
// With a DEPTH above 2, tiles come by bulk copies into DEPTH stages of each warp in shared memory, from which the same
// pieces are read: more bytes are under way than registers would hold, and none of them waits for arithmetic.
//
// Splits of one request and head form a cluster and merge through each other's shared memory, each a share of the
// features (CLUSTER 1); or they meet in global memory, where the one that arrives last merges all of them (CLUSTER 0:
// any number of splits). Both add up in order of the splits, so results repeat bit for bit. EVEN: how many splits a
// request has depends on its length among the others', and even.cu says which block reads what; they meet in global memory.
//
// SOFTMAX 0 online: the running maximum is subtracted. 1 lazy: it is replaced only when it is exceeded by more than
// 2^8. 2 unified: phi of the head is subtracted whatever the scores are; where the denominator leaves (2^-100, 2^96), in float16 from 1 on,
// the merging block computes again, lazily. A sum of values can then only overflow if a value exceeds 2^31. 3 paper: as 2, and any score outside (low, high) around phi also counts
// as a failure (FlashDecoding++, section 3). Scores are in log2 units throughout.
//
// Compile-time: HALF, D head dimension (64 or 128), GROUP query heads of a KV head (1 to 8), WARPS, BLOCKS, DEPTH, SOFTMAX,
// CLUSTER, EVEN.

#include "fragments.h"
#if CLUSTER
#include "remote.h"
#endif
#include "hopper.h"

#define RING (DEPTH > 2)
#define THREADS (WARPS * 32)
#define TILE 16
#define KP (D / 32)
#define VP (D / 64)
#define PITCH (D + 8)
#define INFINITE __int_as_float(0x7f800000)
// A denominator below says that the weights vanished, or in float16 lost their digits.
#define LOWEST (HALF ? 1.f : 7.9e-31f)
#define LOG2E 1.4426950408889634f
#define LEAST (CLUSTER ? WARPS : 2 * WARPS)       // tiles of a split: fewer, and merging costs more than it saves
#define HEADS ((GROUP + 2 + WARPS - 1) / WARPS)  // of q, k and v that a warp prepares
#define PARTIAL (GROUP * D + (2 * GROUP + 3) / 4 * 4)  // floats a split leaves: sums, then maxima and denominators
#define QUADS (GROUP * D / 4)
#define PARTS (THREADS / QUADS > 1 ? THREADS / QUADS : 1)  // of the splits, when they are merged
#define AHEAD 25  // partial sums a merging thread has on their way
#define MOST_CLUSTER 8                            // splits that meet in a cluster
#define SHARE ((GROUP * D / 2 + THREADS - 1) / THREADS)  // features of a thread there, at most: of two splits

struct Args {
    const u16 *keys, *values;
    const int *table;
    int length, window, page_size, kv_heads, head;
    float scale, softcap;
};

struct State {
    // out[i][j][0] and [2]: dimensions i * 64 + lane / 4 * 8 + 2 * j and the next, query head lane % 4 * 2; [1], [3]: the next head
    float out[VP][4][4];
    float top, sum;  // of query head lane / 4; sum over the tokens of this lane only
};

struct Tile {
    uint4 k[2][KP], v[4][VP];
};

#define STAGE (2 * TILE * D * 2)  // bytes of a tile's keys and values

__device__ __forceinline__ int page_of(const Args &a, int tile, int last) {
    return tile < last ? a.table[tile * TILE / a.page_size] : 0;
}

// Where keys and values of a tile begin, whose tokens lie in one page.
__device__ __forceinline__ size_t place_of(const Args &a, int tile, int page) {
    return (((size_t)page * a.kv_heads + a.head) * a.page_size + tile * TILE % a.page_size) * D;
}

__device__ __forceinline__ void load_keys(Tile &t, const Args &a, int tile, int page, const u16 *fresh) {
    const int lane = threadIdx.x & 31;
    const u16 *rows = a.keys + place_of(a, tile, page);
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int own = n * 8 + (lane >> 2);
        // The new token, and past the end: anything finite.
        const u16 *row = (tile * TILE + own >= a.length - 1 ? fresh : rows + own * D) + (lane & 3) * 8;
#pragma unroll
        for (int i = 0; i < KP; i++) t.k[n][i] = *(const uint4 *)(row + i * 32);
    }
}

__device__ __forceinline__ void load_values(Tile &t, const Args &a, int tile, int page, const u16 *fresh) {
    const int lane = threadIdx.x & 31;
    const u16 *rows = a.values + place_of(a, tile, page);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int own = (lane & 3) * 2 + (n & 1) + (n >> 1) * 8;
        const u16 *row = (tile * TILE + own >= a.length - 1 ? fresh : rows + own * D) + (lane >> 2) * 8;
#pragma unroll
        for (int i = 0; i < VP; i++) t.v[n][i] = *(const uint4 *)(row + i * 64);
    }
}

// The new token's rows of a tile that was loaded before they were known.
__device__ __forceinline__ void renew(Tile &t, const Args &a, int tile, const u16 *k, const u16 *v) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < 2; n++)
        if (tile * TILE + n * 8 + (lane >> 2) >= a.length - 1)
#pragma unroll
            for (int i = 0; i < KP; i++) t.k[n][i] = *(const uint4 *)(k + i * 32 + (lane & 3) * 8);
#pragma unroll
    for (int n = 0; n < 4; n++)
        if (tile * TILE + (lane & 3) * 2 + (n & 1) + (n >> 1) * 8 >= a.length - 1)
#pragma unroll
            for (int i = 0; i < VP; i++) t.v[n][i] = *(const uint4 *)(v + i * 64 + (lane >> 2) * 8);
}

__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// Scores of 16 tokens in log2 units: s[n][j] is token tile * 16 + n * 8 + (lane % 4) * 2 + j, query head lane / 4.
__device__ __forceinline__ void score(float (&s)[2][2], const Tile &t, const uint4 (&q)[KP], const Args &a, int tile) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < KP; i++) {
            mma(c, q[i].x, 0, q[i].y, 0, t.k[n][i].x, t.k[n][i].y);
            mma(c, q[i].z, 0, q[i].w, 0, t.k[n][i].z, t.k[n][i].w);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float v = c[j] * a.scale;
            if (a.softcap > 0.f) v = a.softcap * tanhf(v / a.softcap);
            int token = tile * TILE + n * 8 + (lane & 3) * 2 + j;
            bool seen = token < a.length && (a.window == 0 || token > a.length - 1 - a.window);
            s[n][j] = seen ? v * LOG2E : -INFINITE;
        }
    }
}

__device__ __forceinline__ void accumulate(State &state, const float (&p)[2][2], const Tile &t) {
    u32 first = pack(p[0][0], p[0][1]), second = pack(p[1][0], p[1][1]);
#pragma unroll
    for (int i = 0; i < VP; i++) {
        const u32 *a = &t.v[0][i].x, *b = &t.v[1][i].x, *c = &t.v[2][i].x, *d = &t.v[3][i].x;
#pragma unroll
        for (int j = 0; j < 4; j++)
            mma(state.out[i][j], low_halves(a[j], b[j]), high_halves(a[j], b[j]), low_halves(c[j], d[j]), high_halves(c[j], d[j]), first, second);
    }
}

template <int MODE>
__device__ __forceinline__ void clear(State &state, float phi) {
#pragma unroll
    for (int i = 0; i < VP; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) state.out[i][j][0] = state.out[i][j][1] = state.out[i][j][2] = state.out[i][j][3] = 0.f;
    state.top = MODE >= 2 ? phi : -INFINITE;
    state.sum = 0.f;
}

// Weights of one tile's scores; moves the state to a new maximum where the mode wants it. Returns whether a score lies
// outside the guard (mode 3).
template <int MODE>
__device__ __forceinline__ bool weigh(State &state, float (&s)[2][2], float low, float high) {
    bool outside = false;
    if (MODE < 2) {
        float top = fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        // The first finite maximum is always taken: minus infinity plus 8 is below it.
        bool move = MODE == 0 ? top > state.top : top > state.top + 8.f;
        if (__any_sync(~0u, move)) {
            float next = move ? top : state.top;
            float factor = state.top == next ? 1.f : exp2f(state.top - next);
            state.top = next;
            state.sum *= factor;
            int lane = threadIdx.x & 31;
            float even = __shfl_sync(~0u, factor, (lane & 3) * 8), odd = __shfl_sync(~0u, factor, (lane & 3) * 8 + 4);
#pragma unroll
            for (int i = 0; i < VP; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    state.out[i][j][0] *= even, state.out[i][j][2] *= even;
                    state.out[i][j][1] *= odd, state.out[i][j][3] *= odd;
                }
        }
    }
    if (MODE == 3) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                outside |= s[n][j] != -INFINITE && !(s[n][j] - state.top > low && s[n][j] - state.top < high);
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // Before the first finite maximum every score is minus infinity, and their difference would be NaN.
            s[n][j] = s[n][j] == -INFINITE ? 0.f : exp2f(s[n][j] - state.top);
#if HALF
            s[n][j] = round_trip(s[n][j]);  // what the values are weighed with: an overflow must show in the sum
#endif
            state.sum += s[n][j];
        }
    return outside;
}

struct Shared {
    u16 q[8][PITCH], k[PITCH], v[PITCH];
    float raw[WARPS][D];
    float out[WARPS][GROUP][D];
    float top[WARPS][GROUP], sum[WARPS][GROUP];
#if !CLUSTER
    float4 merged[PARTS][QUADS];
#endif
    int flag;
};

#if RING
// Tiles of this warp under way. The lanes know the pages of 32 of its tiles between them, and those of the next 32.
struct Tiles {
    u32 stages, barriers;  // of this warp
    int slot, parity;      // of the tile that is read next
    int pages, more;       // of tile from + lane * WARPS, and of the one 32 * WARPS later
    int from;
};

// Ask for a tile, which goes to a slot. Every lane comes here.
__device__ __forceinline__ void ask(Tiles &t, const Args &a, int tile, int slot, int last) {
    const int lane = threadIdx.x & 31, turn = (tile - t.from) / WARPS;
    const int page = __shfl_sync(~0u, t.pages, turn);
    if (lane == 0) {
        const size_t at = place_of(a, tile, page);
        const u32 stage = t.stages + slot * STAGE, barrier = t.barriers + slot * 8;
        u64 once;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
        expect(barrier, STAGE);
        copy_row(stage, a.keys + at, STAGE / 2, barrier, once);
        copy_row(stage + STAGE / 2, a.values + at, STAGE / 2, barrier, once);
    }
    if (turn == 31) {
        t.from += 32 * WARPS;
        t.pages = t.more;
        t.more = page_of(a, t.from + (32 + lane) * WARPS, last);
    }
}

// This warp's first tiles under way: first, first + WARPS, ... below last. No other is.
__device__ __forceinline__ void begin(Tiles &t, const Args &a, int first, int last, const Shared &) {
    const int lane = threadIdx.x & 31;
    t.from = first;
    t.pages = page_of(a, first + lane * WARPS, last), t.more = page_of(a, first + (32 + lane) * WARPS, last);
    int slot = t.slot;
    for (int i = 0; i < DEPTH && first + i * WARPS < last; i++) {
        ask(t, a, first + i * WARPS, slot, last);
        if (++slot == DEPTH) slot = 0;
    }
}

// All of this warp's tiles, the first of which `begin` asked for.
template <int MODE>
__device__ __forceinline__ bool walk(State &state, Tiles &t, const uint4 (&q)[KP], const Args &a, int first, int last, const Shared &sh, float low, float high) {
    const int lane = threadIdx.x & 31;
    bool outside = false;
    for (int at = first; at < last; at += WARPS) {
        const u32 key = t.stages + t.slot * STAGE + (lane >> 2) * D * 2 + (lane & 3) * 16;
        const u32 value = t.stages + t.slot * STAGE + STAGE / 2 + (lane & 3) * D * 4 + (lane >> 2) * 16;
        Tile tile;
        wait_for(t.barriers + t.slot * 8, t.parity);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < KP; i++) tile.k[n][i] = piece_16(key + n * 8 * D * 2 + i * 64);
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < VP; i++) tile.v[n][i] = piece_16(value + ((n & 1) + (n >> 1) * 8) * D * 2 + i * 128);
        if ((at + 1) * TILE >= a.length) renew(tile, a, at, sh.k, sh.v);
        __syncwarp();  // all lanes have what they need of the stage
        if (at + DEPTH * WARPS < last) ask(t, a, at + DEPTH * WARPS, t.slot, last);
        if (++t.slot == DEPTH) t.slot = 0, t.parity ^= 1;
        float s[2][2];
        score(s, tile, q, a, at);
        outside |= weigh<MODE>(state, s, low, high);
        accumulate(state, s, tile);
    }
    return outside;
}
#else
// Tiles of this warp under way, and the page of the one that comes after each: nobody waits for a table's entry.
struct Tiles {
    Tile own[DEPTH];
    int page[DEPTH];
};

// This warp's first tiles under way: first, first + WARPS, ... below last.
__device__ __forceinline__ void begin(Tiles &tiles, const Args &a, int first, int last, const Shared &sh) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) tiles.page[i] = page_of(a, first + i * WARPS, last);
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        if (first + i * WARPS < last) {
            load_keys(tiles.own[i], a, first + i * WARPS, tiles.page[i], sh.k);
            load_values(tiles.own[i], a, first + i * WARPS, tiles.page[i], sh.v);
            tiles.page[i] = page_of(a, first + (i + DEPTH) * WARPS, last);
        }
}

// All of this warp's tiles, the first of which `begin` asked for.
template <int MODE>
__device__ __forceinline__ bool walk(State &state, Tiles &tiles, const uint4 (&q)[KP], const Args &a, int first, int last, const Shared &sh, float low, float high) {
    bool outside = false;
    for (int from = first; from < last; from += DEPTH * WARPS) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const int at = from + i * WARPS, next = at + DEPTH * WARPS;
            if (at >= last) break;
            float s[2][2];
            score(s, tiles.own[i], q, a, at);
            if (next < last) load_keys(tiles.own[i], a, next, tiles.page[i], sh.k);
            outside |= weigh<MODE>(state, s, low, high);
            accumulate(state, s, tiles.own[i]);
            if (next < last) {
                load_values(tiles.own[i], a, next, tiles.page[i], sh.v);
                tiles.page[i] = page_of(a, next + DEPTH * WARPS, last);
            }
        }
    }
    return outside;
}
#endif

// Add up what the warps have, into shared memory of warp 0: sums, maximum and denominator of each query head.
template <int MODE>
__device__ __forceinline__ void join(State &state, Shared &sh) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = lane >> 2;
    state.sum += __shfl_xor_sync(~0u, state.sum, 1);
    state.sum += __shfl_xor_sync(~0u, state.sum, 2);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int of = (lane & 3) * 2 + h;
        if (of >= GROUP) continue;
#pragma unroll
        for (int i = 0; i < VP; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                *(float2 *)&sh.out[warp][of][i * 64 + (lane >> 2) * 8 + 2 * j] = make_float2(state.out[i][j][h], state.out[i][j][2 + h]);
    }
    if ((lane & 3) == 0 && head < GROUP) sh.top[warp][head] = state.top, sh.sum[warp][head] = state.sum;
    __syncthreads();
    for (int e = threadIdx.x; e < GROUP * D; e += THREADS) {
        int h = e / D, d = e % D;
        float top = sh.top[0][h];
        if (MODE < 2)
#pragma unroll
            for (int w = 1; w < WARPS; w++) top = fmaxf(top, sh.top[w][h]);
        float out = 0.f, sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = MODE >= 2 ? 1.f : sh.top[w][h] == -INFINITE ? 0.f : exp2f(sh.top[w][h] - top);
            out += factor * sh.out[w][h][d];
            sum += factor * sh.sum[w][h];
        }
        sh.out[0][h][d] = out;
        if (d == 0) sh.raw[0][h] = top, sh.raw[0][GROUP + h] = sum;
    }
    __syncthreads();
}

#if !CLUSTER
// Add up what `active` splits left at `all`, `stride` floats from one to the next, as `join` does for warps. All latencies overlap: the first partial sums are
// under way while maxima and denominators come, which lie in memory of the other warps' sums (plan() bounds the number
// of splits accordingly), and where there are more threads than features each group of them takes some of the splits.
__device__ __forceinline__ void merge(const float *all, size_t stride, int active, Shared &sh) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = QUADS <= THREADS ? threadIdx.x / QUADS : 0;
    float *weights = &sh.out[1][0][0], *sums = weights + active * GROUP;
    int quad = QUADS <= THREADS ? threadIdx.x % QUADS : threadIdx.x;
    float4 values[AHEAD];
    auto load = [&](int from) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int k = from + i * PARTS;
            values[i] = k < active ? __ldcg((const float4 *)(all + k * stride) + quad) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    };
    if (part < PARTS) load(part);
    for (int e = threadIdx.x; e < active * GROUP; e += THREADS) {
        const float *own = all + (e / GROUP) * stride + GROUP * D;
        weights[e] = __ldcg(own + e % GROUP), sums[e] = __ldcg(own + GROUP + e % GROUP);
    }
    __syncthreads();
    for (int h = warp; h < GROUP; h += WARPS) {
        float top = -INFINITE, sum = 0.f;
        for (int k = lane; k < active; k += 32) top = fmaxf(top, weights[k * GROUP + h]);
#pragma unroll
        for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        for (int k = lane; k < active; k += 32) {
            const float own = weights[k * GROUP + h], factor = SOFTMAX >= 2 ? 1.f : own == -INFINITE ? 0.f : exp2f(own - top);
            weights[k * GROUP + h] = factor;
            sum += factor * sums[k * GROUP + h];
        }
#pragma unroll
        for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0) sh.raw[0][h] = top, sh.raw[0][GROUP + h] = sum;
    }
    __syncthreads();
    while (quad < QUADS && part < PARTS) {
        const int h = quad * 4 / D;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int from = part;;) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int k = from + i * PARTS;
                const float factor = k < active ? weights[k * GROUP + h] : 0.f;
                sum.x += factor * values[i].x, sum.y += factor * values[i].y, sum.z += factor * values[i].z, sum.w += factor * values[i].w;
            }
            from += AHEAD * PARTS;
            if (from >= active) break;
            load(from);
        }
        sh.merged[part][quad] = sum;
        quad += THREADS;
        if (quad < QUADS) load(part);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < QUADS; e += THREADS) {
        float4 sum = sh.merged[0][e];
#pragma unroll
        for (int p = 1; p < PARTS; p++) {
            const float4 more = sh.merged[p][e];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        ((float4 *)&sh.out[0][0][0])[e] = sum;
    }
    __syncthreads();
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
decode(const u16 *qkv, const float *rope, const int *positions, const int *slots, u16 *keys, u16 *values, const int *tables, const int *lengths, const float *q_norm, const float *k_norm, const float *phis, u16 *result, float *lse, float *workspace, int *counters, const uint4 *items, unsigned long long *recomputed, float eps, float scale, float softcap, float low, float high, int kv_heads, int page_size, int columns, int rotary, int window) {
    __shared__ __align__(16) Shared sh;
#if EVEN
    const uint4 item = items[blockIdx.y];
    const int head = blockIdx.x, request = (int)item.x;
    if (request < 0) return;
#else
    const int split = blockIdx.x, splits = gridDim.x, head = blockIdx.y, request = blockIdx.z;
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Args a;
    // Nothing of this depends on the kernel before. Loads whose results nobody needs yet go first, so that they overlap.
    const int slot = slots[request], position = positions[request];
    a.keys = keys, a.values = values, a.table = tables + (size_t)request * columns, a.length = lengths[request];
    a.window = window, a.page_size = page_size, a.kv_heads = kv_heads, a.head = head, a.scale = scale, a.softcap = softcap;
    const int start = window ? max(0, a.length - window) / TILE : 0, end = (a.length + TILE - 1) / TILE;
#if EVEN
    const int first = (int)item.y, last = (int)item.z;
#else
    const int each = max(LEAST, (end - start + splits - 1) / splits), active = max(1, (end - start + each - 1) / each);
    const int first = start + split * each, last = min(end, first + each);
#endif

    asm volatile("griddepcontrol.launch_dependents;");
    Tiles tiles;
#if RING
    extern __shared__ uint4 memory[];
    tiles.stages = shared_address(memory) + warp * DEPTH * STAGE;
    tiles.barriers = shared_address(memory) + WARPS * DEPTH * STAGE + warp * DEPTH * 8;
    tiles.slot = tiles.parity = 0;
    if (lane == 0) {
        for (int i = 0; i < DEPTH; i++) begin_barrier(tiles.barriers + i * 8, 1);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    __syncwarp();
#endif
    // The rotation of this lane's features, lane + 32 i: v * turn[i] + v[partner[i]] * side[i].
    const int half = rotary / 2;
    const float *angles = rope + (size_t)position * rotary;
    float turn[D / 32], side[D / 32];
    int partner[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        int e = lane + 32 * i;
        bool low = e < half, turns = e < rotary;
        partner[i] = low ? e + half : turns ? e - half : e;
        turn[i] = turns ? angles[low ? e : e - half] : 1.f;
        side[i] = turns ? low ? -angles[half + e] : angles[e] : 0.f;
    }
    if (warp == 0 && lane < D / 32) {
        if (q_norm) touch(q_norm + lane * 32);
        if (k_norm) touch(k_norm + lane * 32);
    }
    // What earlier steps wrote; the new token is not read yet.
    begin(tiles, a, first + warp, last, sh);
    asm volatile("griddepcontrol.wait;" ::: "memory");
#if !EVEN
    if (split >= active && !CLUSTER) return;
#endif
    const int heads = kv_heads * GROUP, total = heads + 2 * kv_heads;
    if (a.length == 0) {  // the whole cluster leaves
#if !EVEN
        if (split > 0) return;
#endif
        for (int e = threadIdx.x; e < GROUP * D; e += THREADS) result[((size_t)request * heads + head * GROUP) * D + e] = 0;
        if (lse)
            for (int h = threadIdx.x; h < GROUP; h += THREADS) lse[(size_t)request * heads + head * GROUP + h] = -INFINITE;
        return;
    }

    // q heads, k and v of the new token: norm, rotation, into shared memory. All loads first, so that their latencies overlap.
    u16 fresh[HEADS][D / 32];
#pragma unroll
    for (int n = 0; n < HEADS; n++) {
        int r = warp + n * WARPS, source = r < GROUP ? head * GROUP + r : heads + (r - GROUP) * kv_heads + head;
        const u16 *from = qkv + ((size_t)request * total + source) * D;
#pragma unroll
        for (int i = 0; i < D / 32; i++)
            if (r < GROUP + 2) fresh[n][i] = from[lane + 32 * i];
    }
#pragma unroll
    for (int n = 0; n < HEADS; n++) {
        int r = warp + n * WARPS;
        if (r == GROUP + 1)
#pragma unroll
            for (int i = 0; i < D / 32; i++) sh.v[lane + 32 * i] = fresh[n][i];
        if (r > GROUP) continue;
        float v[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; i++) v[i] = to_float(fresh[n][i]);
        const float *norm = r < GROUP ? q_norm : k_norm;
        if (norm) {
            float squares = 0.f;
#pragma unroll
            for (int i = 0; i < D / 32; i++) squares += v[i] * v[i];
#pragma unroll
            for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
            float scale_of = rsqrtf(squares / D + eps);
#pragma unroll
            for (int i = 0; i < D / 32; i++) v[i] = round_trip(v[i] * scale_of * norm[lane + 32 * i]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / 32; i++) sh.raw[warp][lane + 32 * i] = v[i];
        __syncwarp();
        u16 *to = r < GROUP ? sh.q[r] : sh.k;
#pragma unroll
        for (int i = 0; i < D / 32; i++)
            // Each product rounded, as the oracle does: what lies in the cache must not depend on who wrote it.
            to[lane + 32 * i] = (u16)(pack(__fadd_rn(__fmul_rn(v[i], turn[i]), __fmul_rn(sh.raw[warp][partner[i]], side[i])), 0.f) & 0xffff);
    }
    __syncthreads();
    const bool owner = (a.length - 1) / TILE >= first && (a.length - 1) / TILE < last;
    if (owner && slot >= 0) {
        size_t at = (((size_t)(slot / page_size) * kv_heads + head) * page_size + slot % page_size) * D;
        for (int e = threadIdx.x; e < D; e += THREADS) keys[at + e] = sh.k[e], values[at + e] = sh.v[e];
    }
    uint4 q[KP];
#pragma unroll
    for (int i = 0; i < KP; i++)
        q[i] = (lane >> 2) < GROUP ? *(const uint4 *)&sh.q[lane >> 2][i * 32 + (lane & 3) * 8] : make_uint4(0, 0, 0, 0);
#if !RING
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        const int at = first + warp + i * WARPS;
        if (at < last && (at + 1) * TILE >= a.length) renew(tiles.own[i], a, at, sh.k, sh.v);
    }
#endif

    State state;
    const float phi = phis && (lane >> 2) < GROUP ? phis[head * GROUP + (lane >> 2)] * LOG2E : 0.f;
    clear<SOFTMAX>(state, phi);
    bool outside = walk<SOFTMAX>(state, tiles, q, a, first + warp, last, sh, low, high);
    int bad = SOFTMAX == 3 ? __syncthreads_or(outside) : 0;
    join<SOFTMAX>(state, sh);

#if CLUSTER
    // Merge the splits: this block its share of the features, from the shared memory of all.
    const int share = splits;
    if (splits > 1) {
        if (threadIdx.x == 0) sh.flag = bad;
        cluster_barrier();
        float *tops = &sh.out[1][0][0], *sums = tops + active * GROUP;
        const int mine = GROUP * D / splits;
        float parts[SHARE][MOST_CLUSTER];  // under way while maxima and denominators come
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int at = threadIdx.x + i * THREADS, e = split * mine + at;
#pragma unroll
            for (int k = 0; k < MOST_CLUSTER; k++) parts[i][k] = at < mine && k < active ? remote(&sh.out[0][e / D][e % D], k) : 0.f;
        }
        bad = 0;
        for (int e = threadIdx.x; e < active * GROUP; e += THREADS) {
            tops[e] = remote(&sh.raw[0][e % GROUP], e / GROUP), sums[e] = remote(&sh.raw[0][GROUP + e % GROUP], e / GROUP);
            if (SOFTMAX == 3) bad |= __float_as_int(remote((const float *)&sh.flag, e / GROUP));
        }
        if (SOFTMAX == 3) bad = __syncthreads_or(bad);
        else __syncthreads();
        float own[SHARE], total[SHARE], top[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int e = split * mine + threadIdx.x + i * THREADS, h = min(e / D, GROUP - 1);
            top[i] = tops[h], own[i] = total[i] = 0.f;
            if (SOFTMAX < 2)
                for (int k = 1; k < active; k++) top[i] = fmaxf(top[i], tops[k * GROUP + h]);
#pragma unroll
            for (int k = 0; k < MOST_CLUSTER; k++) {
                if (k == active) break;
                const float one = tops[k * GROUP + h], factor = SOFTMAX >= 2 ? 1.f : one == -INFINITE ? 0.f : exp2f(one - top[i]);
                own[i] += factor * parts[i][k], total[i] += factor * sums[k * GROUP + h];
            }
#if SOFTMAX < 2
            if (threadIdx.x + i * THREADS >= mine) continue;
            result[((size_t)request * heads + head * GROUP) * D + e] = (u16)(pack(own[i] / total[i], 0.f) & 0xffff);
            if (lse && e % D == 0) lse[(size_t)request * heads + head * GROUP + h] = (top[i] + log2f(total[i])) / LOG2E;
#endif
        }
        cluster_barrier();  // all have read what they need of each other
#if SOFTMAX < 2
        return;
#else
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int at = threadIdx.x + i * THREADS, e = split * mine + at;
            if (at < mine) sh.out[0][e / D][e % D] = own[i];
        }
        for (int g = threadIdx.x; g < GROUP; g += THREADS) {
            float sum = 0.f;
            for (int k = 0; k < active; k++) sum += sums[k * GROUP + g];
            sh.raw[0][g] = tops[g], sh.raw[0][GROUP + g] = sum;
        }
        __syncthreads();
#endif
    }
#else
    const int share = 1;
#if EVEN
    const u32 part = __ldcg(&items[blockIdx.y].w);  // read late: registers are scarce before
    const int split = part & 0xffff, active = part >> 16;
#endif
    // Merge the splits: whoever arrives last.
    const size_t pair = (size_t)request * kv_heads + head;
    if (active > 1) {
#if EVEN
        const size_t stride = (size_t)kv_heads * PARTIAL;
        float *all = workspace + ((size_t)(blockIdx.y - split) * kv_heads + head) * PARTIAL;
#else
        const size_t stride = PARTIAL;
        float *all = workspace + pair * splits * PARTIAL;
#endif
        float *mine = all + split * stride;
        for (int e = threadIdx.x; e < QUADS; e += THREADS) __stcg((float4 *)mine + e, ((const float4 *)&sh.out[0][0][0])[e]);
        for (int e = threadIdx.x; e < 2 * GROUP; e += THREADS) __stcg(mine + GROUP * D + e, sh.raw[0][e]);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();  // for all: a fence counts for what a barrier ordered before it
            // The upper half of a counter says whether any split found a score outside its guard.
            int before = atomicAdd(counters + pair, 1 + (bad ? 1 << 16 : 0)) + (bad ? 1 << 16 : 0);
            sh.flag = (before & 0xffff) == active - 1 ? 1 + (before >> 16) : 0;
            if (sh.flag) counters[pair] = 0;
            __threadfence();
        }
        __syncthreads();
        if (!sh.flag) return;
        bad = sh.flag > 1;
        merge(all, stride, active, sh);
    }
#endif
#if SOFTMAX >= 2
    bool wrong = bad;
    for (int h = threadIdx.x; h < GROUP; h += THREADS) wrong |= !(sh.raw[0][GROUP + h] > LOWEST && sh.raw[0][GROUP + h] < 7.9e28f);
    if (__syncthreads_or(wrong)) {
        if (threadIdx.x == 0 && (!CLUSTER || split == 0)) atomicAdd(recomputed, (unsigned long long)GROUP);
        clear<1>(state, 0.f);
        begin(tiles, a, start + warp, end, sh);
        walk<1>(state, tiles, q, a, start + warp, end, sh, 0.f, 0.f);
        __syncthreads();
        join<1>(state, sh);
    }
#endif
    const int first_out = share > 1 ? split * (GROUP * D / share) : 0;
    for (int e = first_out + threadIdx.x; e < first_out + GROUP * D / share; e += THREADS) {
        float y = sh.out[0][e / D][e % D] / sh.raw[0][GROUP + e / D];
        result[((size_t)request * heads + head * GROUP) * D + e] = (u16)(pack(y, 0.f) & 0xffff);
    }
    if (lse && (share == 1 || split == 0))
        for (int h = threadIdx.x; h < GROUP; h += THREADS)
            lse[(size_t)request * heads + head * GROUP + h] = (sh.raw[0][h] + log2f(sh.raw[0][GROUP + h])) / LOG2E;
}
