// y[tokens, rows] = x[tokens, cols] @ w[rows, cols]^T for a few tokens, at the speed of reading w once.
//
// Weights go from global memory straight into registers as the wide operand of mma.m16n8k16 (16 rows of w, 8 tokens).
// A dot product does not care in which order its columns are added, so a thread takes 8 neighbouring columns of a row
// with one 16-byte load and calls them whatever columns the instruction wants, the same ones in w and x.
// The warps of a block share 16 rows and divide the columns; partial sums meet in shared memory in a fixed order.
// Blocks are persistent: while one tile is multiplied the loads of the next step, maybe of the next tile, are under way.
//
// Programmatic dependent launch: weights never depend on the kernel before, so the first step is loaded before
// waiting for it.
//
// Compile-time: HALF 0 bfloat16, 1 float16 · NT token tiles of 8 · WARPS · CHUNKS 32-column pieces a warp has under way
// per row · BLOCKS of one multiprocessor · NORM 1: x is RMS-normed first · GATE 0 none, 1 silu, 2 gelu_tanh: rows of w
// are gate then up and y = act(gate) * up · BITS of a weight: 16, or 8, 4, 3 or 2 in the layouts of ops/formats.py with GROUP
// columns (a multiple of 128; 2 and 3 bits no whole rows) to a scale, SCALES their type (0 bfloat16, 1 float16, 2 float32), ZEROS 1 where groups have
// zeros, and E4M3 1 where 8 bits are a float8. Codes become exact numbers in registers; a group's sum is scaled in
// float32, a whole row's after its last column.

#include "fragments.h"

#define THREADS (WARPS * 32)
#define LOADS (BITS == 8 ? 2 : 1)  // of 16 bytes a lane has of a chunk of a row
#if BITS < 16
#undef LANE_COLS
#undef CHUNK_COLS
#define LANE_COLS 32
#define CHUNK_COLS 128
#include "codes.h"
#endif

// What a lane holds of a chunk of a row: with 2 and 3 bits as many words, of 32 columns.
#if BITS < 4
typedef u32 Own[BITS];
#else
typedef uint4 Own[LOADS];
#endif

// And of a chunk of its two rows.
struct Piece {
    Own first, second;
#if BITS < 16
#if !WHOLE_ROW
    float scale_first, scale_second;
#endif
#if ZEROS
    u32 zero_first, zero_second;  // a pair of BASE + zero
#endif
#endif
};

struct Weights {
    const u16 *codes;
#if BITS < 16
    const void *scales, *zeros;
#endif
};

struct Shape {
    int tokens, rows, cols, tiles, pitch;  // pitch: elements between two tokens in shared memory
};

// Rows a thread of quad `g` reads in a tile: its first and, 8 further (or with a gate: of `up`), its second.
__device__ __forceinline__ void tile_rows(const Shape &s, int tile, int g, int &first, int &second) {
#if GATE
    first = min(tile * 8 + g, s.rows / 2 - 1);
    second = s.rows / 2 + first;
#else
    first = min(tile * 16 + g, s.rows - 1);
    second = min(tile * 16 + 8 + g, s.rows - 1);
#endif
}

#if BITS < 16
// Pair i of a word: columns 2 i and 2 i + 1, with 8 bits i and i + 2 (but float8 in float16: 2 i and 2 i + 1).
__device__ __forceinline__ u32 pair(u32 word, int i, u32 zero) {
#if E4M3 && HALF
    return eighths(word >> 16 * i);
#elif E4M3
    return eighths(i ? word : word << 8, i ? word >> 4 : word << 4);
#else
    return whole(word >> BITS * i, zero);
#endif
}

// The k-th 8 of a lane's 32 columns as four pairs.
__device__ __forceinline__ void expand(u32 (&f)[4], const Own &loads, int k, u32 zero) {
#if BITS == 4
    const u32 word = (&loads[0].x)[k];
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = pair(word, j, zero);
#elif BITS == 3
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int p = k * 4 + j;  // the last pair has a bit in each word
        if (p < 15) f[j] = pair(loads[p / 5], p % 5, zero);
        else f[j] = whole(loads[0] >> 15 & 0x00010001u | loads[1] >> 14 & 0x00020002u | loads[2] >> 13 & 0x00040004u, zero);
    }
#elif BITS == 2
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = pair(loads[k / 2], k % 2 * 4 + j, zero);
#else
    const u32 *words = &loads[k >> 1].x + (k & 1) * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = pair(words[j >> 1], j & 1, zero);
#endif
}
#endif

#if BITS < 4
// Lanes beside each other read neighbouring words, so the sectors of a row are fetched once and asked for again.
__device__ __forceinline__ void load_words(Own &words, const u16 *p) {
#if BITS == 2
    asm volatile("ld.global.nc.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
#else
#pragma unroll
    for (int k = 0; k < BITS; k++) asm volatile("ld.global.nc.L2::256B.u32 %0, [%1];" : "=r"(words[k]) : "l"(p + 2 * k));
#endif
}
#endif

__device__ __forceinline__ void load_step(Piece (&buffer)[CHUNKS], const Weights &w, const Shape &s, int tile, int step) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first, second;
    tile_rows(s, tile, lane >> 2, first, second);
    int chunk = (step * WARPS + warp) * CHUNKS, chunks = s.cols / CHUNK_COLS;
    const size_t stride = (size_t)s.cols * BITS / 16, lane_at = (lane & 3) * (BITS < 4 ? 2 * BITS : 8);  // in 16-bit units
    const u16 *p = w.codes + first * stride + lane_at, *q = w.codes + second * stride + lane_at;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        if (chunk + i < chunks) {
#if BITS < 4
            load_words(buffer[i].first, p + (size_t)(chunk + i) * 8 * BITS);
            load_words(buffer[i].second, q + (size_t)(chunk + i) * 8 * BITS);
#else
#pragma unroll
            for (int k = 0; k < LOADS; k++) {
                buffer[i].first[k] = load_weight(p + (size_t)((chunk + i) * LOADS + k) * 32);
                buffer[i].second[k] = load_weight(q + (size_t)((chunk + i) * LOADS + k) * 32);
            }
#endif
#if BITS < 16 && (!WHOLE_ROW || ZEROS)
            const int groups = (s.cols - 1) / GROUP + 1, group = (chunk + i) * CHUNK_COLS / GROUP;
            const size_t at = (size_t)first * groups + group, below = (size_t)second * groups + group;
#if !WHOLE_ROW
            buffer[i].scale_first = number(w.scales, at), buffer[i].scale_second = number(w.scales, below);
#endif
#if ZEROS
            float zero = BASE + number(w.zeros, at), other = BASE + number(w.zeros, below);
            buffer[i].zero_first = pack(zero, zero), buffer[i].zero_second = pack(other, other);
#endif
#endif
        } else {
#if BITS < 16
            const u32 nothing = NOTHING;
#else
            const u32 nothing = 0;
#endif
#if BITS < 4
#pragma unroll
            for (int k = 0; k < BITS; k++) buffer[i].first[k] = buffer[i].second[k] = nothing;
#else
#pragma unroll
            for (int k = 0; k < LOADS; k++) buffer[i].first[k] = buffer[i].second[k] = make_uint4(nothing, nothing, nothing, nothing);
#endif
#if BITS < 16 && !WHOLE_ROW
            buffer[i].scale_first = buffer[i].scale_second = 0.f;
#endif
#if BITS < 16 && ZEROS
            buffer[i].zero_first = buffer[i].zero_second = pack(BASE, BASE);
#endif
        }
    }
}

__device__ __forceinline__ void multiply(float (&acc)[NT][4], const Piece (&buffer)[CHUNKS], const u16 *xs, const Shape &s, int step) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int chunk = (step * WARPS + warp) * CHUNKS, last = s.cols / CHUNK_COLS - 1;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        int col = min(chunk + i, last) * CHUNK_COLS + (lane & 3) * 8;
#if BITS < 16
#if ZEROS
        const u32 zero_first = buffer[i].zero_first, zero_second = buffer[i].zero_second;
#else
        const u32 zero_first = MIDDLE, zero_second = MIDDLE;
#endif
#if WHOLE_ROW
        float (&part)[NT][4] = acc;
#else
        float part[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.f;
#endif
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 f[4], g[4];
            expand(f, buffer[i].first, k, zero_first);
            expand(g, buffer[i].second, k, zero_second);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                int token = min(n * 8 + (lane >> 2), s.tokens - 1);
                uint4 x = *(const uint4 *)(xs + token * s.pitch + col + k * 32);  // in the order stage() left it
                mma(part[n], f[0], g[0], f[1], g[1], x.x, x.y);
                mma(part[n], f[2], g[2], f[3], g[3], x.z, x.w);
            }
        }
#if !WHOLE_ROW
#pragma unroll
        for (int n = 0; n < NT; n++) {
            acc[n][0] += buffer[i].scale_first * part[n][0], acc[n][1] += buffer[i].scale_first * part[n][1];
            acc[n][2] += buffer[i].scale_second * part[n][2], acc[n][3] += buffer[i].scale_second * part[n][3];
        }
#endif
#else
        const uint4 &a = buffer[i].first[0], &b = buffer[i].second[0];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int token = min(n * 8 + (lane >> 2), s.tokens - 1);  // columns of tokens that are not there are never stored
            uint4 x = *(const uint4 *)(xs + token * s.pitch + col);
            mma(acc[n], a.x, b.x, a.y, b.y, x.x, x.y);
            mma(acc[n], a.z, b.z, a.w, b.w, x.z, x.w);
        }
#endif
    }
}

// Where 8 columns lie in shared memory. A lane takes 32 neighbouring columns of up to 4 bits in four loads, twice 16 of
// 8-bit ones in two each; lanes that load together then find theirs side by side.
__device__ __forceinline__ int vector_at(int v) {
#if BITS <= 4
    return (v & ~15) | (v & 3) << 2 | (v >> 2 & 3);
#elif BITS == 8
    return (v & ~7) | (v & 1) << 2 | (v >> 1 & 3);
#else
    return v;
#endif
}

// 8 columns in the order in which pair() gives those of w.
__device__ __forceinline__ uint4 ordered(uint4 a) {
#if BITS == 8 && !(E4M3 && HALF)
    return make_uint4(__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.x, a.y, 0x7632), __byte_perm(a.z, a.w, 0x5410), __byte_perm(a.z, a.w, 0x7632));
#else
    return a;
#endif
}

// x, times the norm's weight where there is one, into shared memory; scales[token] is what its sums are multiplied by.
// In bfloat16, whose range is float32's, x * weight is rounded and the inverse root mean square follows after the sum:
// one pass, and nobody waits for the mean. In float16 that product might overflow, so x is normed first, in two passes.
__device__ __forceinline__ void stage(u16 *xs, float *sums, float *scales, const u16 *x, const float *norm, float eps, const Shape &s) {
    int vectors = s.cols / 8, tid = threadIdx.x;
#if NORM
    float squares[NT * 8];
#pragma unroll
    for (int m = 0; m < NT * 8; m++) squares[m] = 0.f;
#endif
    for (int v = tid; v < vectors; v += THREADS) {
#if NORM
        float4 w0 = ((const float4 *)norm)[v * 2], w1 = ((const float4 *)norm)[v * 2 + 1];
#endif
#pragma unroll
        for (int m = 0; m < NT * 8; m++) {
            if (m < s.tokens) {
                uint4 a = *(const uint4 *)(x + (size_t)m * s.cols + v * 8);
#if NORM
                float e0 = to_float(a.x & 0xffff), e1 = to_float(a.x >> 16), e2 = to_float(a.y & 0xffff), e3 = to_float(a.y >> 16);
                float e4 = to_float(a.z & 0xffff), e5 = to_float(a.z >> 16), e6 = to_float(a.w & 0xffff), e7 = to_float(a.w >> 16);
                squares[m] += e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3 + e4 * e4 + e5 * e5 + e6 * e6 + e7 * e7;
#if !HALF
                a = make_uint4(pack(e0 * w0.x, e1 * w0.y), pack(e2 * w0.z, e3 * w0.w), pack(e4 * w1.x, e5 * w1.y), pack(e6 * w1.z, e7 * w1.w));
#endif
#endif
                *(uint4 *)(xs + m * s.pitch + vector_at(v) * 8) = NORM && HALF ? a : ordered(a);
            }
        }
    }
#if NORM
#pragma unroll
    for (int m = 0; m < NT * 8; m++) {
        if (m < s.tokens) {
#pragma unroll
            for (int d = 16; d; d >>= 1) squares[m] += __shfl_xor_sync(~0u, squares[m], d);
            if ((tid & 31) == 0) sums[m * WARPS + (tid >> 5)] = squares[m];
        }
    }
    __syncthreads();
    // One warp a token: were every thread to add up all sums, shared memory would be the bottleneck.
    for (int m = tid >> 5; m < s.tokens; m += WARPS) {
        float total = (tid & 31) < WARPS ? sums[m * WARPS + (tid & 31)] : 0.f;
#pragma unroll
        for (int d = WARPS / 2; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
        if ((tid & 31) == 0) scales[m] = rsqrtf(total / s.cols + eps);  // read after the barrier of finish()
    }
#if HALF
    __syncthreads();
    for (int v = tid; v < vectors; v += THREADS) {
        float4 w0 = ((const float4 *)norm)[v * 2], w1 = ((const float4 *)norm)[v * 2 + 1];
        for (int m = 0; m < s.tokens; m++) {
            uint4 *p = (uint4 *)(xs + m * s.pitch + vector_at(v) * 8);
            uint4 a = *p;
            float k = scales[m];
            a.x = pack(to_float(a.x & 0xffff) * k * w0.x, to_float(a.x >> 16) * k * w0.y);
            a.y = pack(to_float(a.y & 0xffff) * k * w0.z, to_float(a.y >> 16) * k * w0.w);
            a.z = pack(to_float(a.z & 0xffff) * k * w1.x, to_float(a.z >> 16) * k * w1.y);
            a.w = pack(to_float(a.w & 0xffff) * k * w1.z, to_float(a.w >> 16) * k * w1.w);
            *p = ordered(a);
        }
    }
    __syncthreads();
#endif
#else
    __syncthreads();
#endif
}

// Sum the warps' parts of a tile in order, and store it.
__device__ __forceinline__ void finish(float (&acc)[NT][4], float *partial, const float *scales, const Weights &w, int tile, const Shape &s, void *out, const float *bias, const u16 *residual) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // partial[warp][token][16 rows]
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float *p = partial + (warp * NT + n) * 128 + (lane & 3) * 32 + (lane >> 2);
        p[0] = acc[n][0];
        p[16] = acc[n][1];
        p[8] = acc[n][2];
        p[24] = acc[n][3];
        acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
    }
    __syncthreads();
#if GATE
    const int outputs = NT * 64, height = 8, rows = s.rows / 2;
#else
    const int outputs = NT * 128, height = 16, rows = s.rows;
#endif
    for (int i = threadIdx.x; i < outputs; i += THREADS) {
        int token = i / height, r = i % height, row = tile * height + r;
        if (token >= s.tokens || row >= rows) continue;
        float sum = 0.f;
        const float *p = partial + token * 16 + r;
#pragma unroll
        for (int k = 0; k < WARPS; k++) sum += p[k * NT * 128];
#if BITS < 16 && WHOLE_ROW
        sum *= number(w.scales, row);
#endif
#if NORM && !HALF
        const float scale = scales[token];
        sum *= scale;
#endif
        if (bias) sum += bias[row];
#if GATE
        float up = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) up += p[k * NT * 128 + 8];
#if BITS < 16 && WHOLE_ROW
        up *= number(w.scales, rows + row);
#endif
#if NORM && !HALF
        up *= scale;
#endif
        if (bias) up += bias[rows + row];
        sum = round_trip(activate(round_trip(sum))) * round_trip(up);
#endif
        if (residual) sum = round_trip(sum) + to_float(residual[(size_t)token * rows + row]);
        store(out, (size_t)token * rows + row, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
stream(const u16 *x, const u16 *codes, const void *scales_of, const void *zeros, void *out, const float *bias, const u16 *residual, const float *norm, float eps, int tokens, int rows, int cols) {
    extern __shared__ uint4 memory[];
    Shape s;
    s.tokens = tokens;
    s.rows = rows;
    s.cols = cols;
    s.pitch = cols + ((cols / 32) % 2 ? 0 : 32);  // an odd number of 64-byte pieces: quads of a load hit all banks
#if GATE
    s.tiles = (rows / 2 + 7) / 8;
#else
    s.tiles = (rows + 15) / 16;
#endif
    u16 *xs = (u16 *)memory;
    float *partial = (float *)(xs + (size_t)tokens * s.pitch);  // two, used in turn
    float *scales = partial + 2 * WARPS * NT * 128;
    const int steps = (cols / CHUNK_COLS + WARPS * CHUNKS - 1) / (WARPS * CHUNKS);

    asm volatile("griddepcontrol.launch_dependents;");
    Weights w;
    w.codes = codes;
#if BITS < 16
    w.scales = scales_of, w.zeros = zeros;
#endif
    Piece even[CHUNKS], odd[CHUNKS];
    float acc[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
    int tile = blockIdx.x, step = 0, turn = 0;
    if (tile < s.tiles) load_step(even, w, s, tile, 0);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    stage(xs, partial + WARPS * NT * 128, scales, x, norm, eps, s);

#define ADVANCE(tile_in, step_in, tile_out, step_out)                   \
    int step_out = step_in + 1, tile_out = tile_in;                     \
    if (step_out == steps) step_out = 0, tile_out += gridDim.x;
#define CONSUME(buffer, tile_in, step_in)                               \
    multiply(acc, buffer, xs, s, step_in);                              \
    if (step_in == steps - 1) {                                         \
        finish(acc, partial + turn * WARPS * NT * 128, scales, w, tile_in, s, out, bias, residual); \
        turn ^= 1;                                                      \
    }
    while (tile < s.tiles) {
        ADVANCE(tile, step, tile1, step1)
        if (tile1 < s.tiles) load_step(odd, w, s, tile1, step1);
        CONSUME(even, tile, step)
        if (tile1 >= s.tiles) break;
        ADVANCE(tile1, step1, tile2, step2)
        if (tile2 < s.tiles) load_step(even, w, s, tile2, step2);
        CONSUME(odd, tile1, step1)
        tile = tile2;
        step = step2;
    }
}
