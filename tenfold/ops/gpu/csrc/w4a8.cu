// Weights of 4 bits, a scale a row, by many tokens in float8, a scale a token (quantize.cu):
//
//     y[t, r] = scale[r] * scale_of[t] * (sum over c of code[r, c] * x8[t, c] - 8 * sum over c of x8[t, c])
//
// Codes 0 to 15 in a byte are float8 e4m3 as they lie, times 2^-9: a mask is all that makes operands of them. Rows come in
// boxes of 128 columns, 64 bytes, through the tensor copy engine, x beside them with its columns in the order in which a
// lane has codes: a lane reads 16 bytes of a row, word j of which are columns 32 t + 8 j to 32 t + 8 j + 7, and its even and
// odd nibbles are two registers of wgmma. Sums of 128 columns are added up in float32. Blocks stay and take tiles of ROWS
// rows by N tokens, those of the same rows one after the other.
//
// Compile-time: HALF, GATE as in fragments.h · N tokens of a tile, 64, 128 or 192 · ROWS 128, half of them of the gate where
// there is one · STAGES · those of codes.h.

#define CLUSTER 1
#define DIGITS 0
#define DOWN 0
#define FLOAT32 0
#include "fragments.h"
#include "hopper.h"
#include "codes.h"
#include "registers.h"
#include "experts.h"

#define CONSUMERS (ROWS * 2)
#define THREADS (CONSUMERS + 128)  // a warpgroup brings tiles, and gives its registers to the others
#define X_BYTES (N * 128)
#define CODE_BYTES 4096  // of a warpgroup's 64 rows and 128 columns
#define STAGE_BYTES (X_BYTES + ROWS / 64 * CODE_BYTES)
#define HEIGHT (GATE ? 32 : 64)  // of a box of codes, and outputs of a warpgroup
#define OUTPUTS (ROWS / 64 * HEIGHT)

__device__ __forceinline__ void split(Fragment (&a)[4], u32 upper, u32 lower) {
    const uint4 above = piece_16(upper), below = piece_16(lower);
    const u32 high[4] = {above.x, above.y, above.z, above.w}, low[4] = {below.x, below.y, below.z, below.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        a[j][0] = high[j] & 0x0f0f0f0fu, a[j][2] = high[j] >> 4 & 0x0f0f0f0fu;
        a[j][1] = low[j] & 0x0f0f0f0fu, a[j][3] = low[j] >> 4 & 0x0f0f0f0fu;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
w4a8(const __grid_constant__ Map x_map, const __grid_constant__ Map w_map, const float2 *tokens_scales, const void *scales, const float *bias, const u16 *residual, void *out, int tokens, int outputs, int cols) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    u64 *barriers = (u64 *)(memory + STAGES * STAGE_BYTES + ROWS / 64 * STORE_BYTES);
    const u32 store_at = shared_address(memory + STAGES * STAGE_BYTES);
    const u32 full = shared_address(barriers), empty = full + STAGES * 8, stage0 = shared_address(memory);
    const int steps = (cols + 127) / 128, across = (tokens + N - 1) / N, items = (outputs + OUTPUTS - 1) / OUTPUTS * across;

    if (threadIdx.x == CONSUMERS) know_map(&x_map), know_map(&w_map), begin_ring(full, empty, STAGES, CONSUMERS / 32);
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;");

    if (threadIdx.x >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == CONSUMERS) {
            u64 once, kept;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
            const u64 policy = across == 1 ? once : kept;
            struct Walk {
                int item, step, slot, turn;
                __device__ __forceinline__ void next(int steps) {
                    if (++slot == STAGES) slot = 0, turn ^= 1;
                    if (++step == steps) step = 0, item += gridDim.x;
                }
            };
            auto weights = [&](const Walk &at) {
                const u32 to = stage0 + at.slot * STAGE_BYTES + X_BYTES, barrier = full + at.slot * 8;
                const int row = at.item / across * OUTPUTS;
                expect(barrier, STAGE_BYTES);
#pragma unroll
                for (int group = 0; group < ROWS / 64; group++) {
                    fetch(to + group * CODE_BYTES, &w_map, at.step * 64, row + group * HEIGHT, barrier, policy);
                    if (GATE) fetch(to + group * CODE_BYTES + CODE_BYTES / 2, &w_map, at.step * 64, outputs + row + group * HEIGHT, barrier, policy);
                }
            };
            auto inputs = [&](const Walk &at) {
                fetch(stage0 + at.slot * STAGE_BYTES, &x_map, at.step * 128, at.item % across * N, full + at.slot * 8, kept);
            };
            Walk at = {(int)blockIdx.x, 0, 0, 0}, behind = at;
            int count = 0;
            for (; count < STAGES && at.item < items; count++, at.next(steps)) weights(at);
            asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
            for (; count; count--, behind.next(steps)) inputs(behind);
            for (; at.item < items; at.next(steps)) {
                wait_for(empty + at.slot * 8, at.turn ^ 1);
                weights(at);
                inputs(at);
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, group = threadIdx.x >> 7, t = lane & 3;
    const int upper = GATE ? warp * 8 + (lane >> 2) : warp * 16 + (lane >> 2), lower = upper + (GATE ? 32 : 8);  // rows of the group's box
    int slot = 0, turn = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int row = item / across * OUTPUTS + group * HEIGHT;
        Tile tile = {};
        tile.first = item % across * N, tile.end = min(tokens, tile.first + N);
        float d[N / 2], part[N / 2];
        Fragment a[2][4];
        u32 held = 0;
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] = part[i] = 0.f;
#pragma unroll
        for (int k = 0; k < 4; k++) a[1][k][0] = a[1][k][1] = a[1][k][2] = a[1][k][3] = 0;
        int step = 0;
        auto one = [&](Fragment (&now)[4], Fragment (&before)[4]) {
            wait_for(full + slot * 8, turn);
            const u32 stage = stage0 + slot * STAGE_BYTES, codes = stage + X_BYTES + group * CODE_BYTES + t * 16;
            split(now, codes + upper * 64, codes + lower * 64);
            release(now);  // not after the fence
            FINISH(0);
            release(before);
            if (held) release_stage(held);
            add_part(d, part, 1.f, 1.f);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            const u64 x_at = operand(stage);
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_8(part, now[k], x_at + k * 2, k);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            held = empty + slot * 8;
            if (++slot == STAGES) slot = 0, turn ^= 1;
            return ++step < steps;
        };
        while (one(a[0], a[1]) && one(a[1], a[0])) {}
        FINISH(0);
        release(a[0]);
        release(a[1]);
        release_stage(held);
        add_part(d, part, 1.f, 1.f);

        const int first = min(row + upper, outputs - 1), second = GATE ? outputs + first : min(row + lower, outputs - 1);
        const float scale_upper = number(scales, first), scale_lower = number(scales, second);
        const float bias_upper = bias ? bias[first] : 0.f, bias_lower = bias ? bias[second] : 0.f;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 own = tokens_scales[min(tile.first + n * 8 + t * 2 + i, tokens - 1)];
                d[n * 4 + i] = (d[n * 4 + i] * 512.f - 8.f * own.y) * own.x * scale_upper + bias_upper;
                d[n * 4 + 2 + i] = (d[n * 4 + 2 + i] * 512.f - 8.f * own.y) * own.x * scale_lower + bias_lower;
            }
        store_sums(d, out, tile, Homes(), store_at + group * STORE_BYTES, row, outputs, residual);
    }
}
