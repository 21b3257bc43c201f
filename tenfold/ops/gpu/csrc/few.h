// 16 rows of a weight, or twice 16, by up to 16 tokens: what stream.cu and bulk.cu share, which bring weights into registers
// each in its way.
//
// Weights are the wide operand of mma.sync. A dot product does not care in which order its columns are added, so a lane
// takes neighbouring columns of a row, as its loads bring them, and calls them whatever columns the instruction wants, the
// same ones in w and x. Warps of a block share rows and divide the columns; sums meet in shared memory in a fixed order.
// How they multiply is in wide.h or, where DIGITS is 1, in digits.h.
//
// Compile-time: HALF 0 bfloat16, 1 float16 · DIGITS · NT tiles of TILE tokens · TALL times 16 rows that share a step · WARPS
// that multiply · CHUNKS pieces of CHUNK_COLS columns a warp has of a step, per row · NORM 1: x is RMS-normed first · GATE 0
// none, 1 silu, 2 gelu_tanh: rows of w are gate then up and y = act(gate) * up · BITS of a weight: 16, or 8, 4, 3 or 2 in
// the layouts of ops/formats.py with GROUP columns (a multiple of 128; 2 and 3 bits no whole rows) to a scale, SCALES their
// type (0 bfloat16, 1 float16, 2 float32), ZEROS 1 where groups have zeros, and E4M3 1 where 8 bits are a float8. A group's
// sum is scaled in float32, a whole row's after its last column. CLUSTER blocks divide the columns (shares.h).

#include "fragments.h"

#ifndef CLUSTER
#define CLUSTER 1
#endif
#define MULTIPLIERS (WARPS * 32)
#define LOADS (BITS == 8 ? 2 : 1)  // of 16 bytes a lane has of a chunk of a row
#if BITS < 16
#undef LANE_COLS
#undef CHUNK_COLS
#define LANE_COLS 32
#define CHUNK_COLS 128
#include "codes.h"
#else
#define SCALES 0
#define WHOLE_ROW 0
#define ZEROS 0
#endif
#define IN_PLACE (BITS <= 4 || DIGITS)  // codes stay where they lie
#define TILE (DIGITS ? 2 : 8)  // tokens of a tile
#define NORM_LATER (NORM && (DIGITS || !HALF))  // sums are multiplied by the inverse root mean square
#define APART 20  // numbers between two tokens of a warp's sums, so that those of 8 rows hit all banks
#define PARTIAL (WARPS * TALL * NT * TILE * APART)  // numbers that warps leave of a tile
typedef float Sums[TALL][NT][4];

// What a lane holds of a chunk of a row: with 2 and 3 bits as many words, of 32 columns.
#if BITS < 4
typedef u32 Own[BITS];
#else
typedef uint4 Own[LOADS];
#endif

#if IN_PLACE
typedef float Zero;
#else
typedef u32 Zero;  // a pair of it
#endif

// And of a chunk of its two rows.
struct Piece {
    Own first, second;
#if BITS < 16
#if !WHOLE_ROW
    float scale_first, scale_second;
#endif
#if ZEROS
    Zero zero_first, zero_second;
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
    int tokens, rows, cols, tiles, pitch;  // cols: those of this block · pitch: elements between two tokens in shared memory
    int first, stride;                     // its first column, and all columns
};

// The multiplying warps wait for each other.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); }

// Rows a thread of quad `g` reads in a tile of 16: its first and, 8 further (or with a gate: of `up`), its second.
__device__ __forceinline__ void tile_rows(const Shape &s, int tile, int g, int &first, int &second) {
#if GATE
    first = min(tile * 8 + g, s.rows / 2 - 1);
    second = s.rows / 2 + first;
#else
    first = min(tile * 16 + g, s.rows - 1);
    second = min(tile * 16 + 8 + g, s.rows - 1);
#endif
}

#if DIGITS
#include "digits.h"
#else
#include "wide.h"
#endif

__device__ __forceinline__ void clear(Sums &acc) {
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int n = 0; n < NT; n++) acc[t][n][0] = acc[t][n][1] = acc[t][n][2] = acc[t][n][3] = 0.f;
}

// A warp's sums of a tile, which begin anew: partial[warp][16 rows of TALL][token][row].
__device__ __forceinline__ void leave(Sums &acc, float *partial) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float *p = partial + ((warp * TALL + t) * NT + n) * TILE * APART + (lane >> 2);
#if DIGITS
            float upper = acc[t][n][0] + acc[t][n][1], lower = acc[t][n][2] + acc[t][n][3];
            upper += __shfl_xor_sync(~0u, upper, 1), lower += __shfl_xor_sync(~0u, lower, 1);
            p += (lane >> 1 & 1) * APART;
            if (!(lane & 1)) p[0] = upper, p[8] = lower;
#else
            p += (lane & 3) * 2 * APART;
            p[0] = acc[t][n][0], p[APART] = acc[t][n][1];
            p[8] = acc[t][n][2], p[APART + 8] = acc[t][n][3];
#endif
        }
    clear(acc);
}

#define HEIGHT (GATE ? 8 : 16)  // outputs of 16 rows
#define OUTPUTS (TALL * NT * TILE * HEIGHT)

// What one of OF threads stores of a tile, and the residual of that, which may be asked for before the sums are there.
template <int OF> struct Outputs {
    static constexpr int COUNT = (OUTPUTS + OF - 1) / OF;
    int thread;
    u16 residual[COUNT];

    __device__ __forceinline__ int token(int i) const { return (thread + i * OF) / HEIGHT % (NT * TILE); }
    __device__ __forceinline__ int sub(int i) const { return (thread + i * OF) / (NT * TILE * HEIGHT); }
    __device__ __forceinline__ int row(int i, int tile) const { return (tile * TALL + sub(i)) * HEIGHT + thread % HEIGHT; }
    __device__ __forceinline__ bool is(int i, int tile, const Shape &s) const {
        return thread + i * OF < OUTPUTS && token(i) < s.tokens && row(i, tile) < s.rows / (GATE ? 2 : 1);
    }
    __device__ __forceinline__ void ask(int tile, const Shape &s, const u16 *from) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (from && is(i, tile, s)) residual[i] = from[(size_t)token(i) * (s.rows / (GATE ? 2 : 1)) + row(i, tile)];
    }
};

// What all warps left of a tile, summed in order and stored.
template <int OF>
__device__ __forceinline__ void finish(const float *partial, const float *scales, const Weights &w, int tile, const Shape &s, void *out, const float *bias, bool adds, const Outputs<OF> &own) {
    const int rows = s.rows / (GATE ? 2 : 1);
#pragma unroll
    for (int i = 0; i < own.COUNT; i++) {
        const int token = own.token(i), row = own.row(i, tile);
        if (!own.is(i, tile, s)) continue;
        float sum = 0.f;
        const float *p = partial + (own.sub(i) * NT * TILE + token) * APART + own.thread % HEIGHT;
#pragma unroll
        for (int k = 0; k < WARPS; k++) sum += p[k * (PARTIAL / WARPS)];
#if BITS < 16 && WHOLE_ROW
        sum *= number(w.scales, row);
#endif
#if NORM_LATER
        const float scale = scales[token];
        sum *= scale;
#endif
        if (bias) sum += bias[row];
#if GATE
        float up = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) up += p[k * (PARTIAL / WARPS) + 8];
#if BITS < 16 && WHOLE_ROW
        up *= number(w.scales, rows + row);
#endif
#if NORM_LATER
        up *= scale;
#endif
        if (bias) up += bias[rows + row];
        sum = round_trip(activate(round_trip(sum))) * round_trip(up);
#endif
        if (adds) sum = round_trip(sum) + to_float(own.residual[i]);
        store(out, (size_t)token * rows + row, sum);
    }
}

__device__ __forceinline__ Shape shape_of(int tokens, int rows, int cols) {
    Shape s;
    s.tokens = tokens, s.rows = rows, s.cols = cols, s.first = 0, s.stride = cols;
    s.pitch = cols + ((cols / 32) % 2 ? 0 : 32);  // an odd number of 64-byte pieces: quads of a load hit all banks
#if GATE
    s.tiles = (rows / 2 + 8 * TALL - 1) / (8 * TALL);
#else
    s.tiles = (rows + 16 * TALL - 1) / (16 * TALL);
#endif
    return s;
}

// Shared memory of the multiplying warps: tokens, sums of their columns, parts of two tiles in turn, sums of squares of
// each warp, scales of tokens.
struct Room {
    u16 *xs;
    float *offsets, *partial, *squares, *scales;

    __device__ __forceinline__ Room(void *at, const Shape &s) {
        xs = (u16 *)at;
        offsets = (float *)((char *)at + staged_bytes(s));
        partial = offsets + (IN_PLACE ? s.cols / 128 * NT * 8 * SUMS : 0);
        squares = partial + 2 * PARTIAL;
        scales = squares + WARPS * NT * TILE;
    }
};
