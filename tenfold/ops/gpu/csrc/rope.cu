// New tokens of a 16-bit KV cache: norm of q and k heads, rotary embedding, keys and values to their pages. A block takes a
// token, a warp one head at a time: a lane has EACH neighbouring channels, and those they rotate with are in another lane.
//
// Compile-time: HALF 0 bfloat16, 1 float16 · D channels of a head, 64, 128 or 256.

#define GATE 0
#include "fragments.h"

#define WARPS 8
#define EACH (D / 32)
#define PAIRS (EACH / 2)

#if EACH == 2
typedef u32 Lane;
#elif EACH == 4
typedef uint2 Lane;
#else
typedef uint4 Lane;
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32)
rope_write(const u16 *qkv, const float *rope, const int *positions, const int *slots, u16 *keys, u16 *values, u16 *queries, const float *q_norm, const float *k_norm, float q_eps, float k_eps, int heads, int kv_heads, int page_size, int page_stride, int rotary) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.x, all = heads + 2 * kv_heads;
    const int position = positions[token], slot = slots[token], half = rotary / 2, channel = lane * EACH;
    const bool turns = channel < rotary, low = channel < half;
    const int partner = !turns ? lane : low ? lane + half / EACH : lane - half / EACH;
    const float *angles = rope + (size_t)position * rotary + (low ? channel : channel - half);
    float along[EACH], side[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        along[i] = turns ? angles[i] : 1.f;
        side[i] = turns ? low ? -angles[half + i] : angles[half + i] : 0.f;
    }
    const size_t place = slot < 0 ? 0 : (size_t)(slot / page_size) * page_stride + (size_t)(slot % page_size) * D + channel;
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int head = warp; head < all; head += WARPS) {
        const bool query = head < heads, value = head >= heads + kv_heads;
        if (!query && slot < 0) return;
        const Lane given = *(const Lane *)(qkv + ((size_t)token * all + head) * D + channel);
        u16 *to = query ? queries + ((size_t)token * heads + head) * D + channel
                        : (value ? values : keys) + place + (size_t)(value ? head - heads - kv_heads : head - heads) * page_size * D;
        if (value) {
            *(Lane *)to = given;
            continue;
        }
        float x[EACH];
        const u32 *words = (const u32 *)&given;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) x[2 * i] = to_float(words[i] & 0xffff), x[2 * i + 1] = to_float(words[i] >> 16);
        const float *norm = query ? q_norm : k_norm;
        if (norm) {
            float squares = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) squares += x[i] * x[i];
#pragma unroll
            for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
            const float scale = rsqrtf(squares / D + (query ? q_eps : k_eps));
#pragma unroll
            for (int i = 0; i < EACH; i++) x[i] = round_trip(x[i] * scale * norm[channel + i]);
        }
        u32 turned[PAIRS];
        float y[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            // Each product rounded, as the oracle does: what lies in the cache must not depend on who wrote it.
            y[i] = __fadd_rn(__fmul_rn(x[i], along[i]), __fmul_rn(__shfl_sync(~0u, x[i], partner), side[i]));
#pragma unroll
        for (int i = 0; i < PAIRS; i++) turned[i] = pack(y[2 * i], y[2 * i + 1]);
        *(Lane *)to = *(const Lane *)turned;
    }
}
