// The largest of each row of logits, the first of equals: blocks share a row, and meet in one 64-bit maximum of
// (ordered value, complement of the index). The last block to arrive writes the row's token and clears the meeting place.

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u64 key(float v, u32 index) {
    u32 bits = __float_as_uint(v);
    bits = v != v ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // NaN counts as the largest, as in PyTorch
    return (u64)bits << 32 | (u32)~index;
}

extern "C" __global__ void __launch_bounds__(256)
argmax(const float *logits, long long *tokens, u64 *best, int *arrived, int width, int stride) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const float *row = logits + (size_t)blockIdx.y * stride;
    int each = (width + gridDim.x - 1) / gridDim.x, first = blockIdx.x * each, last = min(width, first + each);
    u64 own = 0;
#pragma unroll 8
    for (int i = first + threadIdx.x; i < last; i += 256) {
        u64 k = key(row[i], i);
        own = k > own ? k : own;
    }
    for (int d = 16; d; d >>= 1) {
        u64 other = __shfl_xor_sync(~0u, own, d);
        own = other > own ? other : own;
    }
    __shared__ u64 warps[8];
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = own;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < 8; w++) own = warps[w] > own ? warps[w] : own;
    atomicMax(best + blockIdx.y, own);
    __threadfence();
    if (atomicAdd(arrived + blockIdx.y, 1) == gridDim.x - 1) {
        tokens[blockIdx.y] = (u32)~(u32)atomicExch(best + blockIdx.y, 0ull);
        arrived[blockIdx.y] = 0;
    }
}
