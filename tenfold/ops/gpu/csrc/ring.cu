// y[tokens, rows] = x[tokens, cols] @ w[rows, cols]^T for up to 64 tokens: weights come through the tensor copy engine
// into a ring of stages in shared memory and are the 64-row operand of wgmma, tokens its narrow side.
//
// One warp keeps the ring full, across tiles and without ever waiting for arithmetic; four multiply. The ring is filled
// before the kernel in front has ended (weights do not depend on it), and is small enough that the next kernel's block
// fits beside this one on a multiprocessor and does the same.
//
// A tile is ROWS rows of w. Without SPLIT a block takes whole tiles. With it the steps of all tiles are dealt out in one
// row, equally many to every block ("stream-K"), whatever the number of tiles: a tile then has several contributors. Each
// leaves its sums in global memory, and whoever arrives last adds them up in the order of their steps. With CLUSTER above 1
// blocks of a cluster have a tile, each a part of the columns, and then add up and store a part of the rows each, from each
// other's shared memory: for few rows and many tokens, where sums in global memory are most of the way.
//
// Weights are far, tokens are in the L2 cache: they may have fewer stages (X_STAGES), so that with many of them too the next
// kernel's block fits beside this one.
//
// Compile-time: HALF, GATE, FLOAT32 as elsewhere · N tokens of the instruction: 8, 16, 32 or 64 · STAGES · X_STAGES · BLOCKS of a
// multiprocessor · ROWS 64, 128 or 256 · SPLIT · CLUSTER, then no SPLIT · BITS of numbers: 16, or 8, float8 e4m3 with a scale
// for each token, and for each row of w or, with GROUPED 1, for 128 columns of it. Tensor cores add float8 in about 14 bits, so sums of 128
// columns meet in float32.

#include "fragments.h"
#include "hopper.h"
#include "cluster.h"
#include "narrow.h"

#define CONSUMERS (ROWS * 2)  // a warpgroup for 64 rows
#define BOX_COLS (1024 / BITS)
#define BOXES (ROWS == 256 ? 1 : 2)  // of a stage
#define STEP_COLS (BOXES * BOX_COLS)
#define W_BOX (ROWS * 128)  // bytes
#define X_BOX (N * 128)
#define W_STAGE (BOXES * W_BOX)
#define X_STAGE (BOXES * X_BOX)
#define PITCH (ROWS + 4)  // floats between tokens of the finished tile
#define TURN ((ROWS == 256 || X_STAGES < STAGES) && N == 64 && CLUSTER == 1 ? N / 2 : N)  // tokens of it that are stored at a time

#include "deal.h"

#define PART (ROWS / (GATE ? 2 : 1) / CLUSTER)  // of a tile's outputs, a block stores
#define VECTOR 8                                // of them, a thread stores together
#define VECTORS ((TURN * PART / VECTOR + CONSUMERS - 1) / CONSUMERS)
static_assert(PART % VECTOR == 0 && (TURN == N || TURN * PART / VECTOR % CONSUMERS == 0), "threads store whole vectors of the turn");

// Numbers of neighbouring rows, of all blocks of a cluster added up.
__device__ __forceinline__ void together(float (&y)[VECTOR], const float *own) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) y[i] = 0.f;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++)
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) {
#if CLUSTER > 1
            const float4 v = numbers_of(there(shared_address(own + i), rank));
#else
            const float4 v = *(const float4 *)(own + i);
#endif
            y[i] += v.x, y[i + 1] += v.y, y[i + 2] += v.z, y[i + 3] += v.w;
        }
}

// ROWS rows times one box of columns, under way afterwards.
__device__ __forceinline__ void multiply_box(float (&d)[N / 2], u32 w, u32 x, int add) {
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(d, operand(w + k * 32), operand(x + k * 32), add | k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#if BITS == 8
// Scales of two boxes for this thread's rows, lane / 4 and lane / 4 + 8 of a warp's 16; 1 where the epilogue scales rows.
struct Scales {
    float upper[BOXES], lower[BOXES];

    __device__ __forceinline__ Scales(const float *scales, int first, int outputs, int rows, int box, int boxes) {
#pragma unroll
        for (int b = 0; b < BOXES; b++) upper[b] = lower[b] = 1.f;
#if GROUPED
        const int r = (threadIdx.x >> 5) * 16 + (threadIdx.x >> 2 & 7);
#pragma unroll
        for (int b = 0; b < BOXES; b++) {
            const int at = min(box + b, boxes - 1);
            upper[b] = __ldg(scales + (size_t)row(first, r, outputs, rows) * boxes + at);
            lower[b] = __ldg(scales + (size_t)row(first, r + 8, outputs, rows) * boxes + at);
        }
#endif
    }

    // Of w, where row r of a tile lies.
    __device__ __forceinline__ static int row(int first, int r, int outputs, int rows) {
#if GATE
        return (r >= ROWS / 2 ? outputs : 0) + min(first + r % (ROWS / 2), outputs - 1);
#else
        return min(first + r, rows - 1);
#endif
    }
};

// Adds a finished product.
__device__ __forceinline__ void add_box(float (&sums)[N / 2], float (&d)[N / 2], float upper, float lower) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        asm volatile("" : "+f"(d[i]) :: "memory");  // not before the wait
        sums[i] += d[i] * (i & 2 ? lower : upper);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, BLOCKS)
ring(const __grid_constant__ Map w_map, const __grid_constant__ Map x_map, const float *row_scales, const float *token_scales, void *out, const float *bias, const u16 *residual, float4 *slots, int *counters, int tokens, int rows, int cols) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    const int steps = (cols + STEP_COLS - 1) / STEP_COLS;
#if CLUSTER > 1
    float *tile = (float *)memory;  // where stages were
    u64 *barriers = (u64 *)(memory + STAGES * W_STAGE + X_STAGES * X_STAGE);
#else
    float *tile = (float *)(memory + STAGES * W_STAGE + X_STAGES * X_STAGE);
    u64 *barriers = (u64 *)(tile + TURN * PITCH);
#endif
    const u32 full = shared_address(barriers), empty = full + STAGES * 8, stage0 = shared_address(memory), inputs0 = stage0 + STAGES * W_STAGE;
#if GATE
    const int height = ROWS / 2, outputs = rows / 2;
#else
    const int height = ROWS, outputs = rows;
#endif
    const int tiles = (outputs + height - 1) / height, boxes = (cols + BOX_COLS - 1) / BOX_COLS;
    const int rank = blockIdx.x % CLUSTER;
    const bool aligned = outputs % VECTOR == 0;  // what threads store is whole and aligned
#if CLUSTER > 1
    const int from = rank * steps / CLUSTER, mine = (rank + 1) * steps / CLUSTER - from;
    auto tile_of = [&](int) { return (int)blockIdx.x / CLUSTER; };
    auto step_of = [&](int at) { return from + at; };
#elif SPLIT
    int *last = (int *)(barriers + 2 * STAGES);
    const Deal deal = {steps, tiles * steps};
    const int first = deal.begin(blockIdx.x), mine = deal.begin(blockIdx.x + 1) - first;
    auto tile_of = [&](int at) { return (first + at) / steps; };
    auto step_of = [&](int at) { return (first + at) % steps; };
#else
    const int mine = blockIdx.x < tiles ? ((tiles - 1 - blockIdx.x) / gridDim.x + 1) * steps : 0;
    auto tile_of = [&](int at) { return blockIdx.x + at / steps * gridDim.x; };
    auto step_of = [&](int at) { return at % steps; };
#endif

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == CONSUMERS) know_map(&w_map), know_map(&x_map), begin_ring(full, empty, STAGES, CONSUMERS / 32);
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            u64 once, kept;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
            auto weights = [&](int at) {
                int step = step_of(at), row = tile_of(at) * height;
                u32 to = stage0 + at % STAGES * W_STAGE, barrier = full + at % STAGES * 8;
                expect(barrier, W_STAGE + X_STAGE);
#pragma unroll
                for (int b = 0; b < BOXES; b++) {
                    fetch(to + b * W_BOX, &w_map, step * STEP_COLS + b * BOX_COLS, row, barrier, once);
#if GATE
                    fetch(to + b * W_BOX + W_BOX / 2, &w_map, step * STEP_COLS + b * BOX_COLS, outputs + row, barrier, once);
#endif
                }
            };
            auto inputs = [&](int at) {
                u32 to = inputs0 + at % X_STAGES * X_STAGE, barrier = full + at % STAGES * 8;
#pragma unroll
                for (int b = 0; b < BOXES; b++) fetch(to + b * X_BOX, &x_map, step_of(at) * STEP_COLS + b * BOX_COLS, 0, barrier, kept);
            };
            for (int at = 0; at < min(mine, STAGES); at++) weights(at);
            asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
            for (int at = 0; at < min(mine, X_STAGES); at++) inputs(at);
            for (int done = 0; done + X_STAGES < mine; done++) {  // steps, each of which leaves room for two others
                wait_for(empty + done % STAGES * 8, done / STAGES & 1);
                if (done + STAGES < mine) weights(done + STAGES);
                inputs(done + X_STAGES);
            }
        }
        __syncwarp();
        meet_cluster(), meet_cluster();
        return;
    }

    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, rows_at = (warp >> 2) * 64 * 128;  // bytes in a box
    for (int count = 0; count < mine;) {
        const int at = tile_of(count);
        float d[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] = 0.f;
        for (int step = step_of(count); step < steps && count < mine; step++, count++) {
            const u32 stage = stage0 + count % STAGES * W_STAGE, tokens_at = inputs0 + count % X_STAGES * X_STAGE;
            wait_for(full + count % STAGES * 8, count / STAGES & 1);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#if BITS == 16
#pragma unroll
            for (int b = 0; b < BOXES; b++) multiply_box(d, stage + b * W_BOX + rows_at, tokens_at + b * X_BOX, 1);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (lane == 0) arrive(empty + count % STAGES * 8);
#else
            float even[N / 2];
            const Scales scales_of(row_scales, at * height, outputs, rows, BOXES * step, boxes);
            multiply_box(even, stage + rows_at, tokens_at, 0);
#if BOXES == 2
            float odd[N / 2];
            multiply_box(odd, stage + W_BOX + rows_at, tokens_at + X_BOX, 0);
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            add_box(d, even, scales_of.upper[0], scales_of.lower[0]);
#endif
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (lane == 0) arrive(empty + count % STAGES * 8);
#if BOXES == 2
            add_box(d, odd, scales_of.upper[1], scales_of.lower[1]);
#else
            add_box(d, even, scales_of.upper[0], scales_of.lower[0]);
#endif
#endif
        }
#if SPLIT
        if (!meet(d, deal, at, slots, counters, last)) continue;
#endif
#pragma unroll
        for (int first_token = 0; first_token < N; first_token += TURN) {
            auto token_of = [&](int v) { return first_token + (threadIdx.x + v * CONSUMERS) / (PART / VECTOR); };
            auto row_of = [&](int v) { return rank * PART + (threadIdx.x + v * CONSUMERS) % (PART / VECTOR) * VECTOR; };
            auto stored = [&](int v) { return token_of(v) < tokens && at * height + row_of(v) < outputs; };
            uint4 added[VECTORS];  // all are under way before the first is used, and while sums go through shared memory
            if (residual)
#pragma unroll
                for (int v = 0; v < VECTORS; v++) {
                    added[v] = make_uint4(0, 0, 0, 0);
                    if (!stored(v)) continue;
                    const int row = at * height + row_of(v);
                    const u16 *from = residual + (size_t)token_of(v) * outputs + row;
                    if (aligned) added[v] = *(const uint4 *)from;
                    else
#pragma unroll
                        for (int i = 0; i < VECTOR; i++)
                            if (row + i < outputs) (&added[v].x)[i / 2] |= (u32)from[i] << i % 2 * 16;
                }
            if (CLUSTER > 1) CONSUMER_BARRIER();  // all have read the last stages
#pragma unroll
            for (int n = 0; n < TURN / 8; n++) {
                float *p = tile + (n * 8 + (lane & 3) * 2) * PITCH + warp * 16 + (lane >> 2), *own = d + (first_token / 8 + n) * 4;
                p[0] = own[0], p[PITCH] = own[1], p[8] = own[2], p[PITCH + 8] = own[3];
            }
            if (CLUSTER > 1) meet_cluster();
            else CONSUMER_BARRIER();
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                const int token = token_of(v), r = row_of(v), row = at * height + r;
                if (!stored(v)) continue;
                const float *here = tile + (token - first_token) * PITCH + r;
                float y[VECTOR];
                together(y, here);
#if GATE
                float up[VECTOR];
                together(up, here + height);
#endif
#pragma unroll
                for (int i = 0; i < VECTOR; i++) {
                    const int own = min(row + i, outputs - 1);
#if BITS == 8
                    const float scale = token_scales[token];
                    y[i] *= GROUPED ? scale : scale * row_scales[own];
#endif
                    if (bias) y[i] += bias[own];
#if GATE
#if BITS == 8
                    up[i] *= GROUPED ? scale : scale * row_scales[outputs + own];
#endif
                    if (bias) up[i] += bias[outputs + own];
                    y[i] = round_trip(activate(round_trip(y[i]))) * round_trip(up[i]);
#endif
                    if (residual) y[i] = round_trip(y[i]) + to_float((&added[v].x)[i / 2] >> i % 2 * 16 & 0xffff);
                }
                const size_t to = (size_t)token * outputs + row;
                if (!aligned) {
                    for (int i = 0; i < VECTOR && row + i < outputs; i++) store(out, to + i, y[i]);
                } else {
#if FLOAT32
                    *(float4 *)((float *)out + to) = make_float4(y[0], y[1], y[2], y[3]);
                    *(float4 *)((float *)out + to + 4) = make_float4(y[4], y[5], y[6], y[7]);
#else
                    *(uint4 *)((u16 *)out + to) = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
#endif
                }
            }
            CONSUMER_BARRIER();
        }
    }
    meet_cluster();  // nobody leaves whose sums others read
}
