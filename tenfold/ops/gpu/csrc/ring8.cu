// y[tokens, rows] = x[tokens, cols] @ w[rows, cols]^T for up to 64 tokens. Both in 16 bits; or both in float8 e4m3, with a
// scale for each token, and for each row of w or 128 columns of it.
//
// Blocks of a cluster share tiles of 64 rows and divide the columns. Each holds its columns of all tokens in shared memory
// from beginning to end, so x is read once, and w streams past it through a ring that one warp keeps full: before the
// kernel in front has ended, and across tiles. Then the blocks read each other's sums of a tile, each a part of its rows,
// in a fixed order.
//
// Tensor cores add float8 in about 14 bits; sums of 128 columns meet in float32.
//
// Compile-time: BITS 8 or 16 · HALF, GATE as elsewhere · N tokens of the instruction: 8, 16, 32 or 64 · STAGES of 256
// bytes of columns · SLICES of the columns, the blocks of a cluster: 1, 2, 4 or 8 · GROUPED 1: scales of 128 columns.

#include "fragments.h"
#include "hopper.h"

#define CONSUMERS 128
#define BOX_COLS (1024 / BITS)
#define W_BOX 8192  // bytes: 64 rows of 128 bytes
#define X_BOX (N * 128)
#define STAGE_BYTES (2 * W_BOX)
#define PITCH 68  // floats between tokens of the finished tile

#if BITS == 8
#define NUMBERS "k32.f32.e4m3.e4m3"
#define MAJOR ""
#elif HALF
#define NUMBERS "k16.f32.f16.f16"
#define MAJOR ", 0, 0"
#else
#define NUMBERS "k16.f32.bf16.bf16"
#define MAJOR ", 0, 0"
#endif
__device__ __forceinline__ void multiply(float (&d)[N / 2], u64 a, u64 b, int add) {
#if N == 8
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\nwgmma.mma_async.sync.aligned.m64n8" NUMBERS " {%0,%1,%2,%3}, %4, %5, p, 1, 1" MAJOR ";\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b), "r"(add));
#elif N == 16
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\nwgmma.mma_async.sync.aligned.m64n16" NUMBERS " {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1" MAJOR ";\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "l"(a), "l"(b), "r"(add));
#elif N == 32
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32" NUMBERS " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1" MAJOR ";\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) : "l"(a), "l"(b), "r"(add));
#else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64" NUMBERS " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1" MAJOR ";\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) : "l"(a), "l"(b), "r"(add));
#endif
}

#define CONSUMER_BARRIER() asm volatile("bar.sync 1, 128;" ::: "memory")

// 64 rows times one box of columns, under way afterwards.
__device__ __forceinline__ void multiply_box(float (&d)[N / 2], u32 w, u32 x) {
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(d, operand(w + k * 32), operand(x + k * 32), k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Adds a finished product; upper and lower: scales of rows lane / 4 and lane / 4 + 8 of a warp's 16.
__device__ __forceinline__ void add_box(float (&sums)[N / 2], float (&d)[N / 2], float upper, float lower) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        asm volatile("" : "+f"(d[i]) :: "memory");  // not before the wait
#if GROUPED
        sums[i] += d[i] * (i & 2 ? lower : upper);
#else
        sums[i] += d[i];
#endif
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1)
ring8(const __grid_constant__ Map w_map, const __grid_constant__ Map x_map, const float *scales, const float *token_scales, u16 *out, const float *bias, const u16 *residual, int tokens, int rows, int cols) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    const int boxes = (cols + BOX_COLS - 1) / BOX_COLS, each = (boxes + SLICES - 1) / SLICES, steps = (each + 1) / 2;
    const int rank = blockIdx.x % SLICES, begin = rank * each, mine = max(0, min(each, boxes - begin));
    float *tile = (float *)(memory + STAGES * STAGE_BYTES + steps * 2 * X_BOX);
    const u32 stage0 = shared_address(memory), x0 = stage0 + STAGES * STAGE_BYTES, tile0 = shared_address(tile);
    const u32 full = tile0 + N * PITCH * 4, empty = full + STAGES * 8, held = empty + STAGES * 8;
    const u32 ready = held + 8, taken = ready + 8;  // sums of a tile are there, and have been read, in all blocks
#if GATE
    const int height = 32, outputs = rows / 2;
#else
    const int height = 64, outputs = rows;
#endif
    const int tiles = (outputs + height - 1) / height, clusters = gridDim.x / SLICES, first = blockIdx.x / SLICES;

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == CONSUMERS) {
        for (int s = 0; s < STAGES; s++) begin_barrier(full + s * 8, 1), begin_barrier(empty + s * 8, 4);
        begin_barrier(held, 1), begin_barrier(ready, SLICES), begin_barrier(taken, SLICES);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
#if SLICES > 1
    cluster_barrier();
#else
    __syncthreads();
#endif

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            u64 once, kept;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
            const int count = first < tiles ? ((tiles - 1 - first) / clusters + 1) * steps : 0;
            // A box of this block, or one past all columns, of zeros.
            auto column = [&](int box) { return (box < mine ? begin + box : boxes) * BOX_COLS; };
            auto weights = [&](int at) {
                const int step = at % steps, row = (first + at / steps * clusters) * height;
                const u32 to = stage0 + at % STAGES * STAGE_BYTES, barrier = full + at % STAGES * 8;
                expect(barrier, STAGE_BYTES);
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    fetch(to + b * W_BOX, &w_map, column(step * 2 + b), row, barrier, once);
#if GATE
                    fetch(to + b * W_BOX + W_BOX / 2, &w_map, column(step * 2 + b), outputs + row, barrier, once);
#endif
                }
            };
            int at = 0;
            for (; at < count && at < STAGES; at++) weights(at);
            asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
            if (count) {
                expect(held, steps * 2 * X_BOX);
                for (int b = 0; b < steps * 2; b++) fetch(x0 + b * X_BOX, &x_map, column(b), 0, held, kept);
            }
            for (; at < count; at++) {
                wait_for(empty + at % STAGES * 8, (at / STAGES - 1) & 1);
                weights(at);
            }
        }
        __syncwarp();
    } else {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        float sums[N / 2], even[N / 2], odd[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) even[i] = odd[i] = 0.f;
        if (first < tiles) wait_for(held, 0);
        int count = 0, turn = 0;
        for (int at = first; at < tiles; at += clusters, turn++) {
#pragma unroll
            for (int i = 0; i < N / 2; i++) sums[i] = 0.f;
#if GROUPED
            const int r = warp * 16 + (lane >> 2);
#if GATE
            const int row = (warp & 2 ? outputs : 0) + min(at * 32 + (r & 31), outputs - 1), below = (warp & 2 ? outputs : 0) + min(at * 32 + (r & 31) + 8, outputs - 1);
#else
            const int row = min(at * 64 + r, rows - 1), below = min(at * 64 + r + 8, rows - 1);
#endif
            const float *above_scales = scales + (size_t)row * boxes, *below_scales = scales + (size_t)below * boxes;
#endif
            for (int step = 0; step < steps; step++, count++) {
                float u0 = 1.f, u1 = 1.f, l0 = 1.f, l1 = 1.f;
#if GROUPED
                const int box = min(begin + step * 2, boxes - 1), next = min(begin + step * 2 + 1, boxes - 1);
                u0 = __ldg(above_scales + box), u1 = __ldg(above_scales + next), l0 = __ldg(below_scales + box), l1 = __ldg(below_scales + next);
#endif
                const u32 stage = stage0 + count % STAGES * STAGE_BYTES, x = x0 + step * 2 * X_BOX;
                wait_for(full + count % STAGES * 8, count / STAGES & 1);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                multiply_box(even, stage, x);
                multiply_box(odd, stage + W_BOX, x + X_BOX);
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                add_box(sums, even, u0, l0);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                if (lane == 0) arrive(empty + count % STAGES * 8);
                add_box(sums, odd, u1, l1);
            }
#if SLICES > 1
            if (turn) wait_for_cluster(taken, (turn - 1) & 1);
#else
            if (turn) CONSUMER_BARRIER();
#endif
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                float *p = tile + (n * 8 + (lane & 3) * 2) * PITCH + warp * 16 + (lane >> 2);
                p[0] = sums[n * 4], p[PITCH] = sums[n * 4 + 1], p[8] = sums[n * 4 + 2], p[PITCH + 8] = sums[n * 4 + 3];
            }
#if SLICES > 1
            asm volatile("fence.acq_rel.cluster;" ::: "memory");
            CONSUMER_BARRIER();
            if (threadIdx.x < SLICES) arrive_there(ready, threadIdx.x);
            wait_for_cluster(ready, turn & 1);
#else
            CONSUMER_BARRIER();
#endif
            const int part = height / SLICES, quads = part / 4;
            for (int i = threadIdx.x; i < tokens * quads; i += CONSUMERS) {
                const int token = i / quads, r = rank * part + i % quads * 4;
                float y[4] = {0.f, 0.f, 0.f, 0.f};
#if GATE
                float up[4] = {0.f, 0.f, 0.f, 0.f};
#endif
#pragma unroll
                for (int s = 0; s < SLICES; s++) {
                    const u32 from = there(tile0 + (token * PITCH + r) * 4, s);
                    const float4 v = load_there(from);
                    y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
#if GATE
                    const float4 u = load_there(from + 32 * 4);
                    up[0] += u.x, up[1] += u.y, up[2] += u.z, up[3] += u.w;
#endif
                }
#if BITS == 8
                const float scale = token_scales[token];
#endif
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = at * height + r + e;
                    if (row >= outputs) break;
#if BITS == 16
                    float v = y[e];
#elif GROUPED
                    float v = y[e] * scale;
#else
                    float v = y[e] * scale * scales[row];
#endif
                    if (bias) v += bias[row];
#if GATE
#if BITS == 16
                    float u = up[e];
#elif GROUPED
                    float u = up[e] * scale;
#else
                    float u = up[e] * scale * scales[outputs + row];
#endif
                    if (bias) u += bias[outputs + row];
                    v = round_trip(activate(round_trip(v))) * round_trip(u);
#endif
                    if (residual) v = round_trip(v) + to_float(residual[(size_t)token * outputs + row]);
                    out[(size_t)token * outputs + row] = (u16)(pack(v, 0.f) & 0xffff);
                }
            }
#if SLICES > 1
            CONSUMER_BARRIER();
            if (threadIdx.x < SLICES) arrive_there(taken, threadIdx.x);
#endif
        }
    }
#if SLICES > 1
    cluster_barrier();  // nobody leaves while another block reads its sums
#endif
}
