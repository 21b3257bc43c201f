// What kernels share that feed wgmma through the tensor copy engine: barriers, copies, descriptors of operands.

typedef unsigned long long u64;
struct __align__(64) Map { u64 bytes[16]; };

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void begin_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Barriers of a ring: whoever fills a stage arrives at `full` with its bytes, so many warps at `empty` when they have read it.
__device__ __forceinline__ void begin_ring(u32 full, u32 empty, int stages, int warps) {
    for (int s = 0; s < stages; s++) {
        begin_barrier(full + s * 8, 1);
        begin_barrier(empty + s * 8, warps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

// One arrival, and so many bytes to come by copies.
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra wait;\ndone:\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

// The engine reads a map from memory before its first box; so early nobody waits for that.
__device__ __forceinline__ void know_map(const Map *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// A box of a matrix into shared memory, its first column and row; bytes past the matrix are zero.
__device__ __forceinline__ void fetch(u32 to, const Map *map, int col, int row, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
        :: "r"(to), "l"(map), "r"(col), "r"(row), "r"(barrier), "l"(policy) : "memory");
}

// Bytes that lie in a row, a multiple of 16, into shared memory.
__device__ __forceinline__ void copy_row(u32 to, const void *from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

__device__ __forceinline__ uint4 piece_16(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

// Matrix descriptor of a K-major operand with the 128-byte swizzle: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 operand(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
