// The same product as stream.cu for more tokens (up to 64), or where x does not fit into shared memory: a block owns one
// slice of the columns for good, and so loads its part of x once; its warps walk over row tiles on their own.
//
// A tile's slices meet in global memory: whoever arrives last adds them up in order of the slices, so results repeat
// bit for bit, and leaves the counter at zero for the next launch.
//
// NORM 1: y = (x * norm) @ w^T * inverse_rms, with x * norm rounded once; sums of squares travel with the slices.
// Compile-time as in stream.cu, and ROWS: 16-row pieces a warp multiplies with the same tokens.

#include "fragments.h"

#define THREADS (WARPS * 32)
#define OUT_ROWS (GATE ? 8 : 16)

struct Shape {
    int tokens, rows, cols, tiles, pitch, first, chunks;  // this block's slice: 32-column pieces from `first` on
};

__device__ __forceinline__ void load_step(uint4 (&buffer)[CHUNKS][ROWS][2], const u16 *w, const Shape &s, int tile, int step) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#if GATE
        int first = min((tile * ROWS + r) * 8 + (lane >> 2), s.rows / 2 - 1), second = s.rows / 2 + first;
#else
        int first = min((tile * ROWS + r) * 16 + (lane >> 2), s.rows - 1);
        int second = min((tile * ROWS + r) * 16 + 8 + (lane >> 2), s.rows - 1);
#endif
        size_t col = (size_t)(s.first + step * CHUNKS) * CHUNK_COLS + (lane & 3) * LANE_COLS;
        const u16 *p = w + (size_t)first * s.cols + col, *q = w + (size_t)second * s.cols + col;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (step * CHUNKS + i < s.chunks) {
                buffer[i][r][0] = load_weight(p + i * CHUNK_COLS);
                buffer[i][r][1] = load_weight(q + i * CHUNK_COLS);
            } else {
                buffer[i][r][0] = buffer[i][r][1] = make_uint4(0, 0, 0, 0);
            }
        }
    }
}

__device__ __forceinline__ void multiply(float (&acc)[ROWS][NT][4], const uint4 (&buffer)[CHUNKS][ROWS][2], const u16 *xs, const Shape &s, int step) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        int col = min(step * CHUNKS + i, s.chunks - 1) * CHUNK_COLS + (lane & 3) * LANE_COLS;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int token = min(n * 8 + (lane >> 2), s.tokens - 1);
            uint4 x = *(const uint4 *)(xs + token * s.pitch + col);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const uint4 &a = buffer[i][r][0], &b = buffer[i][r][1];
                mma(acc[r][n], a.x, b.x, a.y, b.y, x.x, x.y);
                mma(acc[r][n], a.z, b.z, a.w, b.w, x.z, x.w);
            }
        }
    }
}

// The slice of x, times the norm's weight where there is one, into shared memory; sums of squares into `squares`.
__device__ __forceinline__ void stage(u16 *xs, const u16 *x, const float *norm, float *squares, const Shape &s) {
    int vectors = s.chunks * 4, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int m = warp; m < s.tokens; m += WARPS) {
        const u16 *from = x + (size_t)m * s.cols + s.first * CHUNK_COLS;
#if NORM
        float total = 0.f;
#endif
#pragma unroll 4
        for (int v = lane; v < vectors; v += 32) {
            uint4 a = *(const uint4 *)(from + v * 8);
#if NORM
            const float4 *w = (const float4 *)(norm + s.first * CHUNK_COLS) + v * 2;
            float4 w0 = w[0], w1 = w[1];
            float e0 = to_float(a.x & 0xffff), e1 = to_float(a.x >> 16), e2 = to_float(a.y & 0xffff), e3 = to_float(a.y >> 16);
            float e4 = to_float(a.z & 0xffff), e5 = to_float(a.z >> 16), e6 = to_float(a.w & 0xffff), e7 = to_float(a.w >> 16);
            total += e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3 + e4 * e4 + e5 * e5 + e6 * e6 + e7 * e7;
            a = make_uint4(pack(e0 * w0.x, e1 * w0.y), pack(e2 * w0.z, e3 * w0.w), pack(e4 * w1.x, e5 * w1.y), pack(e6 * w1.z, e7 * w1.w));
#endif
            *(uint4 *)(xs + m * s.pitch + v * 8) = a;
        }
#if NORM
#pragma unroll
        for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
        if (lane == 0) squares[m] = total;  // every block of this slice writes the same number
#endif
    }
    __threadfence();
    __syncthreads();
}

__device__ __forceinline__ void store(float (&acc)[ROWS][NT][4], int tile, const Shape &s, u16 *out, const float *bias, const u16 *residual, const float *squares, int slices, float eps) {
    int lane = threadIdx.x & 31, rows = GATE ? s.rows / 2 : s.rows;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int token = n * 8 + (lane & 3) * 2 + j;
            if (token >= s.tokens) continue;
            float scale = 1.f;
#if NORM
            float total = 0.f;
            for (int k = 0; k < slices; k++) total += __ldcg(squares + k * NT * 8 + token);
            scale = rsqrtf(total / s.cols + eps);
#endif
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float v[2] = {acc[r][n][j] * scale, acc[r][n][2 + j] * scale};
                int row = (tile * ROWS + r) * OUT_ROWS + (lane >> 2);
#if GATE
                if (row >= rows) continue;
                if (bias) v[0] += bias[row], v[1] += bias[rows + row];
                v[0] = round_trip(activate(round_trip(v[0]))) * round_trip(v[1]);
                const int count = 1;
#else
                const int count = 2;
#endif
#pragma unroll
                for (int h = 0; h < count; h++, row += 8) {
                    if (row >= rows) continue;
                    float y = v[h];
#if !GATE
                    if (bias) y += bias[row];
#endif
                    if (residual) y = round_trip(y) + to_float(residual[(size_t)token * rows + row]);
                    out[(size_t)token * rows + row] = (u16)(pack(y, 0.f) & 0xffff);
                }
            }
        }
    }
}

// workspace: per tile and slice the accumulators as the lanes hold them, then sums of squares [slices][NT * 8];
// counters [tiles] zero.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wide(const u16 *x, const u16 *w, u16 *out, const float *bias, const u16 *residual, const float *norm, float *workspace, int *counters, float eps, int tokens, int rows, int cols, int slices) {
    extern __shared__ uint4 memory[];
    u16 *xs = (u16 *)memory;
    const int slice = blockIdx.x % slices, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, all = cols / CHUNK_COLS;
    Shape s;
    s.tokens = tokens;
    s.rows = rows;
    s.cols = cols;
    s.tiles = ((GATE ? rows / 2 : rows) + OUT_ROWS * ROWS - 1) / (OUT_ROWS * ROWS);
    s.first = (int)((long long)all * slice / slices);
    s.chunks = (int)((long long)all * (slice + 1) / slices) - s.first;
    int widest = (all + slices - 1) / slices;
    s.pitch = (widest | 1) * CHUNK_COLS;
    const int steps = (s.chunks + CHUNKS - 1) / CHUNKS, stride = gridDim.x / slices * WARPS;
    const size_t piece = (size_t)ROWS * NT * 128;
    float *squares = workspace + piece * s.tiles * slices;

    asm volatile("griddepcontrol.launch_dependents;");
    uint4 even[CHUNKS][ROWS][2], odd[CHUNKS][ROWS][2];
    float acc[ROWS][NT][4];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int n = 0; n < NT; n++) acc[r][n][0] = acc[r][n][1] = acc[r][n][2] = acc[r][n][3] = 0.f;
    int tile = blockIdx.x / slices * WARPS + warp, step = 0;
    if (tile < s.tiles) load_step(even, w, s, tile, 0);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    stage(xs, x, norm, squares + slice * NT * 8, s);

    auto finish = [&](int at) {
        if (slices > 1) {
            float4 *mine = (float4 *)(workspace + piece * ((size_t)at * slices + slice));
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int n = 0; n < NT; n++) __stcg(mine + (r * NT + n) * 32 + lane, make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]));
            __threadfence();
            __syncwarp();
            int before = 0;
            if (lane == 0) before = atomicAdd(counters + at, 1);
            before = __shfl_sync(~0u, before, 0);
            if (before == slices - 1) {
                __threadfence();
                const float4 *all_of = (const float4 *)(workspace + piece * (size_t)at * slices);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
                        for (int k = 0; k < slices; k++) {
                            float4 part = __ldcg(all_of + k * (piece / 4) + (r * NT + n) * 32 + lane);
                            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
                        }
                        acc[r][n][0] = sum.x, acc[r][n][1] = sum.y, acc[r][n][2] = sum.z, acc[r][n][3] = sum.w;
                    }
                store(acc, at, s, out, bias, residual, squares, slices, eps);
                if (lane == 0) counters[at] = 0;
            }
        } else {
            store(acc, at, s, out, bias, residual, squares, slices, eps);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int n = 0; n < NT; n++) acc[r][n][0] = acc[r][n][1] = acc[r][n][2] = acc[r][n][3] = 0.f;
    };
#define ADVANCE(tile_in, step_in, tile_out, step_out) \
    int step_out = step_in + 1, tile_out = tile_in;   \
    if (step_out == steps) step_out = 0, tile_out += stride;
    while (tile < s.tiles) {
        ADVANCE(tile, step, tile1, step1)
        if (tile1 < s.tiles) load_step(odd, w, s, tile1, step1);
        multiply(acc, even, xs, s, step);
        if (step == steps - 1) finish(tile);
        if (tile1 >= s.tiles) break;
        ADVANCE(tile1, step1, tile2, step2)
        if (tile2 < s.tiles) load_step(even, w, s, tile2, step2);
        multiply(acc, odd, xs, s, step1);
        if (step1 == steps - 1) finish(tile1);
        tile = tile2;
        step = step2;
    }
}
