// RMS norm of each token's row: y = x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once. A block takes
// a token. The kernel behind may begin at once and fetch weights meanwhile (programmatic dependent launch).
//
// Compile-time: HALF 0 bfloat16, 1 float16 · VECTORS of 8 columns of a thread.

#define GATE 0
#include "fragments.h"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const u16 *x, const float *weight, u16 *out, float eps, int cols) {
    __shared__ float sums[THREADS / 32];
    const int vectors = cols / 8, tid = threadIdx.x;
    const size_t row = (size_t)blockIdx.x * cols;
    asm volatile("griddepcontrol.launch_dependents;");
    float4 factors[VECTORS][2];  // under way before the kernel in front has ended: no cache has them any more
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int v = min(tid + i * THREADS, vectors - 1);
        factors[i][0] = ((const float4 *)weight)[v * 2], factors[i][1] = ((const float4 *)weight)[v * 2 + 1];
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    uint4 values[VECTORS];
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int v = tid + i * THREADS;
        values[i] = v < vectors ? *(const uint4 *)(x + row + v * 8) : make_uint4(0, 0, 0, 0);
        const u32 *p = &values[i].x;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float a = to_float(p[j] & 0xffff), b = to_float(p[j] >> 16);
            total += a * a + b * b;
        }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
    if ((tid & 31) == 0) sums[tid >> 5] = total;
    __syncthreads();
    total = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) total += sums[w];
    const float scale = rsqrtf(total / cols + eps);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int v = tid + i * THREADS;
        if (v >= vectors) break;
        const float *own = &factors[i][0].x;
        const u32 *p = &values[i].x;
        u32 y[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            y[j] = pack(to_float(p[j] & 0xffff) * scale * own[2 * j], to_float(p[j] >> 16) * scale * own[2 * j + 1]);
        *(uint4 *)(out + row + v * 8) = make_uint4(y[0], y[1], y[2], y[3]);
    }
}
