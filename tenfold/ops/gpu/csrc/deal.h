// How the tiles of a ring are dealt out to blocks, and how the parts of a tile meet: N tokens, CONSUMERS threads that
// multiply, SPLIT 1 where several blocks may have a share of a tile.

#define CONSUMER_BARRIER() asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory")

// How the steps of all tiles are dealt out: `begin(block)` is the first of a block.
struct Deal {
    int steps, units;

    __device__ __forceinline__ int begin(int block) const { return (int)((long long)block * units / gridDim.x); }
    __device__ __forceinline__ int owner(int unit) const { return (int)(((long long)(unit + 1) * gridDim.x - 1) / units); }
};

#if SPLIT
// Adds up what all contributors of a tile have of it; false: others still compute, and the last of them will.
// d: a thread's sums of its own segment, then of all. Slots hold registers as they are, [register quad][thread]; a block
// has two: of the tile it begins within, and of another.
__device__ __forceinline__ bool meet(float (&d)[N / 2], const Deal &deal, int tile, float4 *slots, int *counters, int *last) {
    const int first_unit = tile * deal.steps, from = deal.owner(first_unit), to = deal.owner(first_unit + deal.steps - 1);
    if (from == to) return true;
    auto slot = [&](int block) { return slots + (size_t)(2 * block + (deal.begin(block) < first_unit)) * (N / 8) * CONSUMERS; };
    float4 *own = slot(blockIdx.x);
#pragma unroll
    for (int i = 0; i < N / 8; i++) own[i * CONSUMERS + threadIdx.x] = make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]);
    CONSUMER_BARRIER();
    if (threadIdx.x == 0) {
        __threadfence();  // for all: a fence counts for what a barrier ordered before it
        *last = atomicAdd(counters + tile, 1) == to - from;
        if (*last) counters[tile] = 0;
        __threadfence();
    }
    CONSUMER_BARRIER();
    if (!*last) return false;
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[i] = 0.f;
    for (int block = from; block <= to; block++) {
        float4 part[N / 8];
        const float4 *theirs = slot(block);
#pragma unroll
        for (int i = 0; i < N / 8; i++) part[i] = __ldcg(theirs + i * CONSUMERS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < N / 8; i++) sum[4 * i] += part[i].x, sum[4 * i + 1] += part[i].y, sum[4 * i + 2] += part[i].z, sum[4 * i + 3] += part[i].w;
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] = sum[i];
    return true;
}
#endif
