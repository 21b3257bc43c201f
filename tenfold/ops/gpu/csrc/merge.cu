// Two attentions of the same queries over different tokens become one over all of them, by their log-sum-exp. A warp takes
// one head of a row of `older`; rows says which row of `out` that is.
//
// Compile-time: HALF 0 bfloat16, 1 float16 · D channels of a head, a multiple of 64 · WARPS.

#define GATE 0
#include "fragments.h"

#define PAIRS (D / 64)  // of channels of a lane

extern "C" __global__ void __launch_bounds__(WARPS * 32)
merge(const u32 *older, const float *older_sums, const float *sums, const long long *rows, u32 *out, int count, int heads) {
    const int lane = threadIdx.x & 31;
    const long long task = (long long)blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (task >= (long long)count * heads) return;
    const int head = task % heads;
    const long long row = rows[task / heads];
    const float a = sums[row * heads + head], b = older_sums[task], top = fmaxf(a, b);
    const float first = expf(a - top), second = expf(b - top), total = first + second;
    u32 *own = out + (row * heads + head) * (D / 2);
    const u32 *other = older + task * (D / 2);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const u32 x = own[lane + 32 * i], y = other[lane + 32 * i];
        const float low = (to_float(x & 0xffff) * first + to_float(y & 0xffff) * second) / total;
        own[lane + 32 * i] = pack(low, (to_float(x >> 16) * first + to_float(y >> 16) * second) / total);
    }
}
