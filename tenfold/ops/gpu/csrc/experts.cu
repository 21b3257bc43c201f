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
// a thread of wgmma has rows r and r + 8 of a slab, so it has both of a feature. One copy brings all slabs of a box: its
// map has w as [experts, slabs, 2, 8, cols]. DOWN: the list of tiles is older than the
// kernel in front, so weights are asked for before that has ended.
//
// Compile-time: HALF, GATE, FLOAT32 as elsewhere · N 8 to 64, 128, 192 or 256, of picks · ROWS 64 to 256 · BOXES of 64 columns in a stage
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

// A box of ROWS rows of an expert's weights, `row` the first of its outputs.
__device__ __forceinline__ void fetch_expert(u32 to, const Map *map, int col, int row, int expert, u32 barrier, u64 policy) {
#if GATE
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %3, %4, %5}], [%6], %7;"
        :: "r"(to), "l"(map), "r"(col), "r"(0), "r"(row / 8), "r"(expert), "r"(barrier), "l"(policy) : "memory");
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;"
        :: "r"(to), "l"(map), "r"(col), "r"(row), "r"(expert), "r"(barrier), "l"(policy) : "memory");
#endif
}

// The ring as the warps that multiply see it.
struct Ring {
    u32 full, empty, stages;
    int slot, turn;

    __device__ __forceinline__ u32 stage() const { return stages + slot * STAGE_BYTES; }
    __device__ __forceinline__ void next() { if (++slot == STAGES) slot = 0, turn ^= 1; }
};

// Sums of an item, W picks wide: a warpgroup's 64 rows, which begin `rows_at` bytes into a box.
template <int W> __device__ __forceinline__ void multiply_item(float (&d)[N / 2], Ring &ring, int steps, int rows_at) {
    u32 held = 0;  // the stage of a product that may not have ended
#pragma unroll 1
    for (int step = 0; step < steps; step++, ring.next()) {
        wait_for(ring.full + ring.slot * 8, ring.turn);
        const u64 w_at = operand(ring.stage() + rows_at), x_at = operand(ring.stage() + BOXES * W_BOX);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int b = 0; b < BOXES; b++) {
#pragma unroll
            for (int k = 0; k < 4; k++) multiply<W>(d, w_at + b * (W_BOX / 16) + k * 2, x_at + b * (X_BOX / 16) + k * 2, 1);
        }
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (held) release_stage(held);
        held = ring.empty + ring.slot * 8;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (held) release_stage(held);
#pragma unroll
    for (int i = 0; i < W / 2; i++) asm volatile("" : "+f"(d[i]) :: "memory");  // not before the wait
}

// The same for a width that is known as it runs, up to W.
template <int W> __device__ __forceinline__ void multiply_up_to(float (&d)[N / 2], int width, Ring &ring, int steps, int rows_at) {
    if constexpr (W > UNIT)
        if (width < W) return multiply_up_to<W - UNIT>(d, width, ring, steps, rows_at);
    multiply_item<W>(d, ring, steps, rows_at);
}

// Where the warp that fills the ring is: a step of an item, item after item, and the stage it goes to. It is one thread
// that all others wait for, so it counts and does not divide, and asks for a tile an item ahead.
struct Walk {
    const Tile *list;
    const Items &items;
    int steps, item, step, row, slot, turn;
    Tile tile, ahead;

    __device__ __forceinline__ Walk(const Tile *list, const Items &items, int steps) : list(list), items(items), steps(steps), item(items.first()), slot(0), turn(0) { ahead = look(item), begin(); }
    __device__ __forceinline__ bool more() const { return item < items.count; }
    __device__ __forceinline__ Tile look(int at) const { return at < items.count ? list[items.tile(at)] : Tile(); }
    __device__ __forceinline__ void begin() { step = 0, tile = ahead, row = items.row(item), ahead = look(item + items.hop()); }
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, turn ^= 1;
        if (++step == steps) item += items.hop(), begin();
    }
};

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, BLOCKS)
experts(const __grid_constant__ Map w_map, const __grid_constant__ Map x_map, void *out, const Tile *list, const int *listed, const int *order, const float *shares, int rows, int cols) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    const u32 store_at = shared_address(memory + STAGES * STAGE_BYTES);
    u64 *barriers = (u64 *)(memory + STAGES * STAGE_BYTES + ROWS / 64 * STORE_BYTES);
    const u32 full = shared_address(barriers), empty = full + STAGES * 8, stage0 = shared_address(memory);
    const int outputs = GATE ? rows / 2 : rows, height = GATE ? ROWS / 2 : ROWS;
    const int steps = (cols + STEP_COLS - 1) / STEP_COLS, deep = (outputs + height - 1) / height;

    if (threadIdx.x == CONSUMERS) know_map(&w_map), know_map(&x_map), begin_ring(full, empty, STAGES, CLUSTER * CONSUMERS / 32);
    meet();
#if !DOWN
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const Items items(*(volatile const int *)listed, deep);

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            u64 once, kept;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
            const u64 policy = N <= 64 ? once : kept;  // large tiles read an expert's weights again
            auto weights = [&](const Walk &at) {
                const u32 to = stage0 + at.slot * STAGE_BYTES, barrier = full + at.slot * 8;
                expect(barrier, BOXES * (W_BOX + at.tile.width() * 128));
#pragma unroll
                for (int b = 0; b < BOXES; b++) fetch_expert(to + b * W_BOX, &w_map, at.step * STEP_COLS + b * 64, at.row, at.tile.expert, barrier, policy);
            };
            auto inputs = [&](const Walk &at) {
                const u32 to = stage0 + at.slot * STAGE_BYTES + BOXES * W_BOX, barrier = full + at.slot * 8;
#pragma unroll
                for (int b = 0; b < BOXES; b++) fetch_picks(to + b * X_BOX, &x_map, at.step * STEP_COLS + b * 64, at.tile, items.rank, barrier, kept);
            };
            Walk at(list, items, steps);
#if DOWN
            Walk behind = at;
            int count = 0;
            for (; count < STAGES && at.more(); count++, at.next()) weights(at);
            asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
            for (; count; count--, behind.next()) inputs(behind);
#else
            asm volatile("fence.proxy.async;" ::: "memory");
#endif
            for (; at.more(); at.next()) {
                wait_for(empty + at.slot * 8, at.turn ^ 1);  // which a stage that nothing has filled yet passes
                weights(at);
                inputs(at);
            }
        }
        return;
    }

#if DOWN
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const int group = threadIdx.x >> 7, rows_at = group * 64 * 128;  // bytes in a box
    Ring ring = {full, empty, stage0, 0, 0};
    Tile tile = {};
    Homes homes = {};
    if (items.first() < items.count) tile = list[items.tile(items.first())], homes.find(tile, order), homes.weigh(shares);
    for (int item = items.first(); item < items.count; item += items.hop()) {
        Tile ahead = tile;  // of the next item, so that no one waits for it
        if (item + items.hop() < items.count) ahead = list[items.tile(item + items.hop())];
        float d[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] = 0.f;
        multiply_up_to<N>(d, tile.width(), ring, steps, rows_at);
        Homes next = {};
        next.find(ahead, order);
        store_sums(d, out, tile, homes, store_at + group * STORE_BYTES, items.row(item) + group * ROW_FEATURES, outputs);
        next.weigh(shares);
        tile = ahead, homes = next;
    }
    meet_cluster();
}
