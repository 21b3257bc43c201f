// Tokens to float8 e4m3, RMS-normed first or not: codes[t] = x[t] / scales[t], where the largest of a token becomes 448. A
// block takes a token. The kernel behind may begin at once and fetch weights meanwhile (programmatic dependent launch).
//
// TILES 1: columns as experts_packed.cu wants them, of every 16 number 4 t + 2 c + h is column 2 t + 8 h + c; and where
// there is an order of picks, each is its token.
// TILES 2: as w4a8.cu wants them, of every 128 number 32 j + 16 h + 4 t + i is column 32 t + 8 j + 2 h + (0, 4, 1, 5)[i],
// filled up with zeros; scales[t] is a pair then, behind the scale stands the sum of a token's codes.
//
// Compile-time: HALF 0 bfloat16, 1 float16 · NORM · VECTORS of 8 columns of a thread · TILES · TOP picks of a token.

#define GATE 0
#include "fragments.h"
#include "halves.h"

#define THREADS 256
#define WARPS (THREADS / 32)

extern "C" __global__ void __launch_bounds__(THREADS)
quantize(const u16 *x, const float *weight, uint2 *codes, float *scales, const int *order, float eps, int cols) {
    __shared__ float squares[WARPS], largests[WARPS];
    const int vectors = cols / 8, tid = threadIdx.x;
    asm volatile("griddepcontrol.launch_dependents;");
#if NORM
    float weights[VECTORS][8];  // they depend on no kernel
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int v = min(tid + i * THREADS, vectors - 1);
        const float4 a = ((const float4 *)weight)[v * 2], b = ((const float4 *)weight)[v * 2 + 1];
        weights[i][0] = a.x, weights[i][1] = a.y, weights[i][2] = a.z, weights[i][3] = a.w;
        weights[i][4] = b.x, weights[i][5] = b.y, weights[i][6] = b.z, weights[i][7] = b.w;
    }
#endif
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const size_t row = (size_t)blockIdx.x * vectors, from = TILES == 1 && order ? (size_t)(order[blockIdx.x] / TOP) * vectors : row;
    float values[VECTORS][8], square = 0.f, largest = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int v = tid + i * THREADS;
        const uint4 a = v < vectors ? ((const uint4 *)x)[from + v] : make_uint4(0, 0, 0, 0);
        const u32 *p = &a.x;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float e = to_float(p[j >> 1] >> 16 * (j & 1) & 0xffff);
#if NORM
            square += e * e;
            e *= weights[i][j];
#endif
            values[i][j] = e;
            largest = fmaxf(largest, fabsf(e));
        }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        square += __shfl_xor_sync(~0u, square, d);
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
    }
    if ((tid & 31) == 0) squares[tid >> 5] = square, largests[tid >> 5] = largest;
    __syncthreads();
    square = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) square += squares[w], largest = fmaxf(largest, largests[w]);
    const float inverse = to_largest(largest);
    float scale = __fdiv_rn(largest, 448.f), sum = 0.f;
#if NORM
    scale *= rsqrtf(square / cols + eps);
#endif
    if (TILES < 2 && tid == 0) scales[blockIdx.x] = scale;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int v = tid + i * THREADS;
        if (!TILES && v >= vectors) break;
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            pairs[j] = to_e4m3(values[i][j * 2] * inverse, values[i][j * 2 + 1] * inverse);
#if TILES == 2
            const u32 both = e4m3_to_halves(pairs[j]);
            sum += half_to_float(both) + half_to_float(both >> 16);
#endif
        }
        u32 first = pairs[0] | pairs[1] << 16, second = pairs[2] | pairs[3] << 16;
#if TILES == 1
        const bool odd = tid & 1;  // eight columns further
        const u32 own = odd ? second : first, other = __shfl_xor_sync(~0u, odd ? first : second, 1);
        const u32 even = odd ? other : own, further = odd ? own : other;
        first = __byte_perm(even, further, 0x5140), second = __byte_perm(even, further, 0x7362);
        if (v >= vectors) break;
#endif
#if TILES == 2
        const int whole = (vectors + 15) / 16 * 16;
        if (v >= whole) break;
        u32 *to = (u32 *)codes + (size_t)blockIdx.x * whole * 2 + v / 16 * 32 + v % 4 * 8 + v / 4 % 4;
        to[0] = __byte_perm(first, second, 0x5140), to[4] = __byte_perm(first, second, 0x7362);
#else
        codes[row + v] = make_uint2(first, second);
#endif
    }
#if TILES == 2
#pragma unroll
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    __syncthreads();
    if ((tid & 31) == 0) squares[tid >> 5] = sum;
    __syncthreads();
    if (tid == 0) {
        sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += squares[w];
        ((float2 *)scales)[blockIdx.x] = make_float2(scale, sum);
    }
#endif
}
