// What stands around products of experts: tokens copied side by side in the order of picks, and parts of a token added up.
// Picks are numbered token * TOP + k. A block takes a pick, or a token. Compile-time: HALF as elsewhere · TOP.

#define GATE 0
#define FLOAT32 0
#include "fragments.h"

// pieces: of 16 bytes, of a row.
extern "C" __global__ void __launch_bounds__(256) gather(const uint4 *x, const int *order, uint4 *out, int pieces) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    const uint4 *from = x + (size_t)(order[blockIdx.x] / TOP) * pieces;
    uint4 *to = out + (size_t)blockIdx.x * pieces;
    for (int i = threadIdx.x; i < pieces; i += 256) to[i] = from[i];
}

// In float32, in the order of picks, the residual last. It is older than the kernel in front.
extern "C" __global__ void __launch_bounds__(256) add_up(const uint4 *parts, const uint4 *residual, uint4 *out, int pieces) {
    asm volatile("griddepcontrol.launch_dependents;");
    const size_t own = (size_t)blockIdx.x * pieces;
    uint4 last = make_uint4(0, 0, 0, 0);
    if (residual && threadIdx.x < pieces) last = residual[own + threadIdx.x];
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = threadIdx.x; i < pieces; i += 256) {
        uint4 each[TOP];
#pragma unroll
        for (int k = 0; k < TOP; k++) each[k] = __ldcs(parts + (own * TOP + (size_t)k * pieces) + i);
        if (residual && i >= 256) last = residual[own + i];
        float sum[8] = {};
#pragma unroll
        for (int k = 0; k <= TOP; k++) {
            const uint4 v = k < TOP ? each[min(k, TOP - 1)] : last;
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += to_float(words[j / 2] >> 16 * (j & 1) & 0xffff);
        }
        out[own + i] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
    }
}
