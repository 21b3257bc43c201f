// How CLUSTER blocks speak to each other; with CLUSTER 1 all of it is what one block does by itself. hopper.h comes before.

#if CLUSTER == 1
__device__ __forceinline__ void enter_cluster() {}
__device__ __forceinline__ void know_cluster() {}
__device__ __forceinline__ void leave_cluster() {}
__device__ __forceinline__ void meet_cluster() {}
#else
// Each thread says that its block's barriers are there, waits for all others' word before it speaks to them, and when all
// is done waits again, so that no block leaves which others may still speak to. Relaxed: the barriers have a fence of their
// own, and at the end there is nothing left to see; a release would have every thread wait for what it stored.
__device__ __forceinline__ void enter_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void know_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void leave_cluster() { enter_cluster(), know_cluster(); }

// All threads of all blocks, which see what the others did before. So after `release_stage`: what this block told others
// has to be there before they leave.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    know_cluster();
}

// An address of this block's shared memory as block `rank` has it.
__device__ __forceinline__ u32 there(u32 here, int rank) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(here), "r"(rank));
    return address;
}

__device__ __forceinline__ float4 numbers_of(u32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}
#endif

// As `fetch`, to the same place in all blocks, and at the same barrier of each.
__device__ __forceinline__ void fetch_for_all(u32 to, const Map *map, int col, int row, u32 barrier, u64 policy) {
#if CLUSTER == 1
    fetch(to, map, col, row, barrier, policy);
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;"
        :: "r"(to), "l"(map), "r"(col), "r"(row), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)), "l"(policy) : "memory");
#endif
}

// A warp has read a stage: whoever may fill it is told, in all blocks that share it.
__device__ __forceinline__ void release_stage(u32 barrier) {
    const int lane = threadIdx.x & 31;
#if CLUSTER == 1
    if (lane == 0) arrive(barrier);
#else
    if (lane < CLUSTER) asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there(barrier, lane)) : "memory");
#endif
}
