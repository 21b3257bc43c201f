// Which experts tokens go to, and the picks of all of them sorted by expert with the list of tiles that experts.cu takes:
// one launch for what takes PyTorch a dozen. A warp takes a token; the blocks are a cluster, whose first then sorts.
//
// Picks are numbered token * TOP + k, and those of an expert stay in that order. Experts come in the order of `turns`, where
// there is one. Compile-time: EXPERTS, up to 1024 · TOP of a token · SIGMOID scores, else softmax · NORMED weights of a token
// sum to 1 · GROUPS of experts of which the KEPT best take part, a group being as good as its BEST highest scores together ·
// WIDTH picks of a tile at most · WARPS of a block · CLUSTER 1: there are several blocks.

typedef unsigned int u32;
typedef unsigned char u8;

#if CLUSTER
#include "remote.h"
#endif

__device__ __forceinline__ void start_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#define VALUES ((EXPERTS + 31) / 32)  // of a lane
#define NONE -3.0e38f
#define EACH (EXPERTS / GROUPS)
#define UNIT (WIDTH % 64 ? WIDTH : 64)  // picks that tiles are made of, as in ops/gemm/grouped.py

// A number that is the larger the larger v is.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = (u32)__float_as_int(v);
    return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}

// Whether this lane has the largest of COUNT keys of all lanes, of equals the first; then where it stands, and it is struck
// out. Key i of a lane stands at lane + 32 i.
template <int COUNT> __device__ __forceinline__ bool strike_largest(u32 (&keys)[COUNT], int &at) {
    const int lane = threadIdx.x & 31;
    u32 most = 0, place = ~0u;
#pragma unroll
    for (int i = 0; i < COUNT; i++) most = max(most, keys[i]);
    most = __reduce_max_sync(~0u, most);
#pragma unroll
    for (int i = COUNT - 1; i >= 0; i--)
        if (keys[i] == most) place = lane + 32 * i;
    const u32 having = __ballot_sync(~0u, place != ~0u);
    if (having & having - 1 && __reduce_min_sync(~0u, place) != place) place = ~0u;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (place == lane + 32 * i) keys[i] = 0;
    at = (int)place;
    return place != ~0u;
}

// The sum of all lanes up to this one.
__device__ __forceinline__ int up_to(int sum) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        const int other = __shfl_sync(~0u, sum, lane - d & 31);
        if (lane >= d) sum += other;
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
route(const float *logits, const float *bias, const int *turns, float *weights, int *order, int *list, int *listed, float scale, int tokens) {
    extern __shared__ __align__(16) u8 memory[];
    const int count = tokens * TOP, words = (tokens + 31) / 32;
    int *starts = (int *)memory;                     // [EXPERTS], of picks
    int *counts = starts + EXPERTS;                  // [EXPERTS]
    int *tiles = counts + EXPERTS;                   // [EXPERTS], before each expert's
    int *sums = tiles + EXPERTS;                     // [WARPS]
    float *shares = (float *)(sums + WARPS);         // [WARPS][TOP]
    float *choices = shares + WARPS * TOP;           // [WARPS][EXPERTS], with GROUPS
    int *picks = (int *)(choices + (GROUPS > 1 ? WARPS * EXPERTS : 0));  // [count]
    u32 *seen = (u32 *)(picks + count);              // [words][EXPERTS], which of 32 tokens pick an expert
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int rank = CLUSTER ? blockIdx.x : 0, blocks = CLUSTER ? gridDim.x : 1;
    float *own = choices + warp * EXPERTS;
    if (rank == 0)
        for (int i = threadIdx.x; i < words * EXPERTS; i += WARPS * 32) seen[i] = 0;
    wait_for_kernel_before();
    start_dependents();

    for (int token = rank * WARPS + warp; token < tokens; token += blocks * WARPS) {
        float score[VALUES], choice[VALUES];
        float most = NONE;
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int e = lane + 32 * i;
            score[i] = e < EXPERTS ? logits[(size_t)token * EXPERTS + e] : NONE;
            most = fmaxf(most, score[i]);
        }
#if SIGMOID
#pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] = 1.f / (1.f + expf(-score[i]));
#else
        float sum = 0.f;
#pragma unroll
        for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
#pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] = lane + 32 * i < EXPERTS ? expf(score[i] - most) : 0.f, sum += score[i];
#pragma unroll
        for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
#pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] /= sum;
#endif
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int e = lane + 32 * i;
            choice[i] = e < EXPERTS ? score[i] + (bias ? bias[e] : 0.f) : NONE;
#if GROUPS > 1
            if (e < EXPERTS) own[e] = choice[i];
#endif
        }
#if GROUPS > 1
        __syncwarp();
        u32 group[1] = {0};  // of lane g, how good group g is
        if (lane < GROUPS) {
            float best[BEST];
#pragma unroll
            for (int b = 0; b < BEST; b++) best[b] = NONE;
            for (int j = 0; j < EACH; j++) {
                float value = own[lane * EACH + j];
#pragma unroll
                for (int b = 0; b < BEST; b++)
                    if (value > best[b]) { const float less = best[b]; best[b] = value, value = less; }
            }
            float sum = 0.f;
#pragma unroll
            for (int b = 0; b < BEST; b++) sum += best[b];
            group[0] = ordered(sum);
        }
        bool stays = false;
        for (int k = 0, at; k < KEPT; k++) stays |= strike_largest(group, at);
        const u32 kept = __ballot_sync(~0u, stays);
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (!(kept >> min((lane + 32 * i) / EACH, 31) & 1)) choice[i] = NONE;
        __syncwarp();
#endif
        u32 keys[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) keys[i] = ordered(choice[i]);
#pragma unroll
        for (int k = 0, at; k < TOP; k++)
            if (strike_largest(keys, at)) {
#pragma unroll
                for (int i = 0; i < VALUES; i++)
                    if (at >> 5 == i) shares[warp * TOP + k] = score[i];
                picks[token * TOP + k] = at;
            }
        __syncwarp();
        float whole = 0.f;
        for (int k = 0; k < TOP; k++) whole += shares[warp * TOP + k];
        if (lane < TOP) weights[(size_t)token * TOP + lane] = shares[warp * TOP + lane] / (NORMED ? whole + 1e-20f : 1.f) * scale;
        __syncwarp();
    }
#if CLUSTER
    cluster_barrier();
    if (rank == 0)
        for (int i = threadIdx.x; i < count; i += WARPS * 32) {
            const int of = i / TOP / WARPS % blocks;
            if (of) picks[i] = __float_as_int(remote((const float *)(picks + i), of));
        }
    cluster_barrier();  // the others stay until they have been read
    if (rank) return;
#else
    __syncthreads();
#endif

    for (int i = threadIdx.x; i < count; i += WARPS * 32) atomicOr(&seen[i / TOP / 32 * EXPERTS + picks[i]], 1u << (i / TOP & 31));
    __syncthreads();
    int begun = 0;  // picks, and tiles << 16, of experts whose turn was before
    for (int first = 0; first < EXPERTS; first += WARPS * 32) {
        const int turn = first + threadIdx.x, e = turn < EXPERTS && turns ? turns[turn] : turn;
        int n = 0;
        if (turn < EXPERTS)
            for (int w = 0; w < words; w++) n += __popc(seen[w * EXPERTS + e]);
        const int mine = n | (n + WIDTH - 1) / WIDTH << 16, sum = up_to(mine);
        if (lane == 31) sums[warp] = sum;
        __syncthreads();
        int before = begun + sum - mine;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) before += sums[w];
            begun += sums[w];
        }
        if (turn < EXPERTS) counts[e] = n, starts[e] = before & 0xffff, tiles[e] = before >> 16;
        __syncthreads();
    }
    if (threadIdx.x == 0) *listed = begun >> 16;
    for (int i = threadIdx.x; i < count; i += WARPS * 32) {
        const int e = picks[i], token = i / TOP;
        int to = starts[e] + __popc(seen[token / 32 * EXPERTS + e] & (1u << (token & 31)) - 1);
        for (int w = 0; w < token / 32; w++) to += __popc(seen[w * EXPERTS + e]);
        order[to] = i;
    }
    for (int e = threadIdx.x; e < EXPERTS; e += WARPS * 32) {
        const int start = starts[e], end = start + counts[e];
        const int units = (counts[e] + UNIT - 1) / UNIT, parts = (counts[e] + WIDTH - 1) / WIDTH;
        int *tile = list + tiles[e] * 4;
        for (int i = 0; i < parts; i++, tile += 4) {
            tile[0] = e, tile[1] = start + i * units / parts * UNIT;
            tile[2] = min(start + (i + 1) * units / parts * UNIT, end), tile[3] = 0;
        }
    }
}
