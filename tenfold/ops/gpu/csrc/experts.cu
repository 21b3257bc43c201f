// Products of experts, all in one launch: for a list of tiles of picks, which are sorted by expert,
//
//     out[place, features] = x[place, cols] @ w[expert, rows, cols]^T
//
// w comes through the tensor copy engine into a ring of stages in shared memory and is the 64-row operand of wgmma, the
// picks of a tile, up to N, whose rows of x lie one after the other, are its narrow side. A tile costs what it holds, in
// units of 64 picks: as many are fetched, and the instruction is as wide. Picks past the end of an expert are another
// expert's: they are multiplied too and not stored. One warp keeps the ring full, across items.
//
// Blocks take items in turn; those of a tile of picks follow each other. How many tiles there are is read from memory, so
// no host needs to know.
//
// With a gate the rows of w are gate, then up, and a slab of 16 rows in shared memory is 8 of gate and the same 8 of up:
// a thread of wgmma has rows r and r + 8 of a slab, so it has both of a feature. DOWN: the list of tiles is older than the
// kernel in front, so weights are asked for before that has ended.
//
// Compile-time: HALF, GATE, FLOAT32 as elsewhere · N 8 to 64, 128, 192 or 256, of picks · ROWS 64 or 128 · BOXES of 64 columns in a stage
// · STAGES · BLOCKS of a multiprocessor · CLUSTER, DOWN as in experts.h.

#include "fragments.h"
#include "hopper.h"
#define BITS 16
#include "narrow.h"

#define CONSUMERS (ROWS * 2)  // a warpgroup for 64 rows
#define W_BOX (ROWS * 128)    // bytes
#define X_BOX (N * 128)
#define STAGE_BYTES (BOXES * (W_BOX + X_BOX))
#define STEP_COLS (BOXES * 64)

#include "experts.h"

__device__ __forceinline__ void fetch_expert(u32 to, const Map *map, int col, int row, int expert, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;"
        :: "r"(to), "l"(map), "r"(col), "r"(row), "r"(expert), "r"(barrier), "l"(policy) : "memory");
}

// The ring as the warps that multiply see it: stages from `count` on.
struct Ring {
    u32 stages, full, empty;
    int count;
};

// Sums of an item, W picks wide: a warpgroup's 64 rows, which begin `rows_at` bytes into a box.
template <int W> __device__ __forceinline__ void multiply_item(float (&d)[N / 2], Ring &ring, int steps, int rows_at) {
    int open = -1;  // the stage of a product that may not have ended
    for (int step = 0; step < steps; step++, ring.count++) {
        const u32 stage = ring.stages + ring.count % STAGES * STAGE_BYTES;
        wait_for(ring.full + ring.count % STAGES * 8, ring.count / STAGES & 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int b = 0; b < BOXES; b++) {
#pragma unroll
            for (int k = 0; k < 4; k++)
                multiply<W>(d, operand(stage + b * W_BOX + rows_at + k * 32), operand(stage + BOXES * W_BOX + b * X_BOX + k * 32), 1);
        }
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (open >= 0) release_stage(ring.empty + open * 8);
        open = ring.count % STAGES;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (open >= 0) release_stage(ring.empty + open * 8);
#pragma unroll
    for (int i = 0; i < W / 2; i++) asm volatile("" : "+f"(d[i]) :: "memory");  // not before the wait
}

// The same for a width that is known as it runs, up to W.
template <int W> __device__ __forceinline__ void multiply_up_to(float (&d)[N / 2], int width, Ring &ring, int steps, int rows_at) {
    if constexpr (W > UNIT)
        if (width < W) return multiply_up_to<W - UNIT>(d, width, ring, steps, rows_at);
    multiply_item<W>(d, ring, steps, rows_at);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, BLOCKS)
experts(const __grid_constant__ Map w_map, const __grid_constant__ Map x_map, void *out, const Tile *list, const int *listed, const int *order, const float *shares, int rows, int cols) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    const u32 store_at = shared_address(memory + STAGES * STAGE_BYTES);
    u64 *barriers = (u64 *)(memory + STAGES * STAGE_BYTES + ROWS / 64 * STORE_BYTES);
    const u32 full = shared_address(barriers), empty = full + STAGES * 8, stage0 = shared_address(memory);
    const int outputs = GATE ? rows / 2 : rows, height = GATE ? ROWS / 2 : ROWS;
    const int steps = (cols + STEP_COLS - 1) / STEP_COLS, deep = (outputs + height - 1) / height;

    if (threadIdx.x == CONSUMERS) {
        for (int s = 0; s < STAGES; s++) {
            begin_barrier(full + s * 8, 1);
            begin_barrier(empty + s * 8, CLUSTER * CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    meet();
#if !DOWN
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const Items items(*(volatile const int *)listed, deep);
    const int mine = items.first() < items.count ? ((items.count - 1 - items.first()) / items.hop() + 1) * steps : 0;
    auto item_of = [&](int at) { return items.first() + at / steps * items.hop(); };
    auto step_of = [&](int at) { return at % steps; };

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            u64 once, kept;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
            const u64 policy = N <= 64 ? once : kept;  // large tiles read an expert's weights again
            int count = 0, known = -1;
            Tile tile = {};
            auto look = [&](int at) {
                const int item = item_of(at);
                if (items.tile(item) != known) known = items.tile(item), tile = list[known];
                return items.row(item);
            };
            auto weights = [&](int at) {
                const int row = look(at), step = step_of(at);
                const u32 to = stage0 + at % STAGES * STAGE_BYTES, barrier = full + at % STAGES * 8;
                expect(barrier, BOXES * (W_BOX + tile.width() * 128));
#pragma unroll
                for (int b = 0; b < BOXES; b++) {
                    const int col = step * STEP_COLS + b * 64;
#if GATE
#pragma unroll
                    for (int slab = 0; slab < ROWS / 16; slab++) {
                        fetch_expert(to + b * W_BOX + slab * 2048, &w_map, col, row + slab * 8, tile.expert, barrier, policy);
                        fetch_expert(to + b * W_BOX + slab * 2048 + 1024, &w_map, col, outputs + row + slab * 8, tile.expert, barrier, policy);
                    }
#else
                    fetch_expert(to + b * W_BOX, &w_map, col, row, tile.expert, barrier, policy);
#endif
                }
            };
            auto inputs = [&](int at) {
                look(at);
                const u32 to = stage0 + at % STAGES * STAGE_BYTES + BOXES * W_BOX, barrier = full + at % STAGES * 8;
#pragma unroll
                for (int b = 0; b < BOXES; b++) fetch_picks(to + b * X_BOX, &x_map, step_of(at) * STEP_COLS + b * 64, tile, items.rank, barrier, kept);
            };
#if DOWN
            for (; count < mine && count < STAGES; count++) weights(count);
            asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
            for (int at = 0; at < count; at++) inputs(at);
#else
            asm volatile("fence.proxy.async;" ::: "memory");
#endif
            for (; count < mine; count++) {
                if (count >= STAGES) wait_for(empty + count % STAGES * 8, (count / STAGES - 1) & 1);
                weights(count);
                inputs(count);
            }
        }
        return;
    }

#if DOWN
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const int group = threadIdx.x >> 7, rows_at = group * 64 * 128;  // bytes in a box
    Ring ring = {stage0, full, empty, 0};
    Tile next = {};
    if (mine) next = list[items.tile(items.first())];
    while (ring.count < mine) {
        const int item = item_of(ring.count);
        const Tile tile = next;
        Homes homes;
        homes.load(tile, order, shares);
        float d[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] = 0.f;
        multiply_up_to<N>(d, tile.width(), ring, steps, rows_at);
        if (ring.count < mine) next = list[items.tile(item + items.hop())];
        store_sums(d, out, tile, homes, store_at + group * STORE_BYTES, items.row(item) + group * ROW_FEATURES, outputs);
    }
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");  // others may still write here
#endif
}
