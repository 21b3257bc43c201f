// Tokens rounded to float8 as quantize.cu does it, by the blocks of the product that reads them, a few each, while weights
// are on their way already. `ready` are two counters, zero between launches: of rounded tokens, and of blocks that saw all.
//
// Blocks below `rounders` round, as many as run at the same time, and all wait for these: so the others may begin when the
// first have ended.
//
// Compile-time: NORM · TOKEN_VECTORS of 8 columns of a thread · CONSUMERS threads.

#include "halves.h"

#define CONSUMER_WARPS (CONSUMERS / 32)

// Rows blockIdx.x, blockIdx.x + rounders, ... of x; waits for the kernel in front. scratch: 2 * CONSUMER_WARPS floats.
__device__ __forceinline__ void round_tokens(const u16 *x, const float *weight, uint2 *codes, float *scales, int *ready, float eps, int rounders, int tokens, int cols, float *scratch) {
    const int vectors = cols / 8, tid = threadIdx.x, first = blockIdx.x < rounders ? blockIdx.x : tokens;
    float *squares = scratch, *largests = scratch + CONSUMER_WARPS;
#if NORM
    if (first < tokens)
        for (int v = tid; v < vectors; v += CONSUMERS) asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + v * 8));
#endif
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int token = first; token < tokens; token += rounders) {
        const uint4 *from = (const uint4 *)x + (size_t)token * vectors;
        uint4 values[TOKEN_VECTORS];
#pragma unroll
        for (int i = 0; i < TOKEN_VECTORS; i++) {
            const int v = tid + i * CONSUMERS;
            values[i] = v < vectors ? from[v] : make_uint4(0, 0, 0, 0);
        }
        // Numbers of a vector, times their weights.
        auto unpack = [&](float(&e)[8], int i, float &square) {
            const u32 *p = &values[i].x;
#pragma unroll
            for (int j = 0; j < 8; j++) e[j] = to_float(p[j >> 1] >> 16 * (j & 1) & 0xffff);
#if NORM
            const int v = min(tid + i * CONSUMERS, vectors - 1);
            const float4 a = ((const float4 *)weight)[v * 2], b = ((const float4 *)weight)[v * 2 + 1];
            const float own[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 8; j++) square += e[j] * e[j], e[j] *= own[j];
#endif
        };
        float square = 0.f, largest = 0.f;
#pragma unroll
        for (int i = 0; i < TOKEN_VECTORS; i++) {
            float e[8];
            unpack(e, i, square);
#pragma unroll
            for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(e[j]));
        }
#pragma unroll
        for (int d = 16; d; d >>= 1) {
            square += __shfl_xor_sync(~0u, square, d);
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
        }
        if ((tid & 31) == 0) squares[tid >> 5] = square, largests[tid >> 5] = largest;
        CONSUMER_BARRIER();
        square = 0.f;
#pragma unroll
        for (int w = 0; w < CONSUMER_WARPS; w++) square += squares[w], largest = fmaxf(largest, largests[w]);
        const float inverse = to_largest(largest);
#pragma unroll
        for (int i = 0; i < TOKEN_VECTORS; i++) {
            const int v = tid + i * CONSUMERS;
            if (v >= vectors) break;
            float e[8], unused = 0.f;
            unpack(e, i, unused);
#pragma unroll
            for (int j = 0; j < 8; j++) e[j] *= inverse;
            codes[(size_t)token * vectors + v] = make_uint2(to_e4m3(e[0], e[1]) | to_e4m3(e[2], e[3]) << 16, to_e4m3(e[4], e[5]) | to_e4m3(e[6], e[7]) << 16);
        }
        if (tid == 0) {
            float scale = __fdiv_rn(largest, 448.f);
#if NORM
            scale *= rsqrtf(square / cols + eps);
#endif
            scales[token] = scale;
        }
        asm volatile("fence.proxy.async;" ::: "memory");  // the copy engines of others read them
        CONSUMER_BARRIER();
        if (tid == 0) __threadfence(), atomicAdd(ready, 1);  // for all: a fence counts for what a barrier ordered before it
    }
}

__device__ __forceinline__ int acquired(const int *at) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

// Until all tokens are rounded, in one thread of each block. The last that sees it leaves the counters as they were.
__device__ __forceinline__ void wait_for_tokens(int *ready, int tokens) {
    while (acquired(ready) < tokens) __nanosleep(20);
    if (atomicAdd(ready + 1, 1) == (int)gridDim.x - 1) ready[0] = ready[1] = 0;
}
