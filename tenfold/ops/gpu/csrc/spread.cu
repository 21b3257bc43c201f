// x as whole numbers in base 256, for products of few picks of experts (experts_digits.h): a warp takes 128 columns of a
// pick, a lane four of them at a time.
//
// Columns count in steps of 2^-FINEST of the largest of their 128, a power of two of it, and are written with four digits
// from -128 to 127. digits [places * 4, orders, chunks * 128]: of a pick its digits, the lowest first, in each order of
// columns that the kinds need (spread.h). counts [chunks, room, 4]: what the two low digits' products count; 0; what the
// two high ones' do; the sum of x. Of numbers that are none nothing is a number.
//
// Compile-time: HALF as elsewhere · WITH_BYTES, WITH_PAIRS, WITH_THIRDS: which orders there are, thirds only with pairs · TOP:
// picks of a token, which are taken in `order`; 0: x lies by place, and the kernel behind may begin before it is there.

#define GATE 0
#define FLOAT32 0
#include "fragments.h"
#include "spread.h"

__device__ __forceinline__ void start_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#define FINEST 20
#define WARPS 4
#define ORDERS (WITH_BYTES + WITH_PAIRS + WITH_THIRDS)

// Four columns of a chunk as a word of digits has them, zero where there are none.
__device__ __forceinline__ void load(float (&v)[4], const u16 *row, int order, int chunk, int cols) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int z = 0; z < 2; z++) {
        const int col = chunk * 128 + column_of(order, lane) + z * apart(order);
        const u32 pair = col < cols ? *(const u32 *)(row + col) : 0;
        v[z] = to_float(pair & 0xffff), v[2 + z] = to_float(pair >> 16);
    }
}

// Four whole numbers as a word of each digit.
__device__ __forceinline__ void put(u32 *to, size_t pitch, const int (&whole)[4], int power) {
    u32 d[4];
#pragma unroll
    for (int b = 0; b < 4; b++) d[b] = ((u32)whole[b] << power) + 0x80808080u ^ 0x80808080u;
    const u32 low = __byte_perm(d[0], d[1], 0x5140), lower = __byte_perm(d[2], d[3], 0x5140);
    const u32 high = __byte_perm(d[0], d[1], 0x7362), higher = __byte_perm(d[2], d[3], 0x7362);
    to[0] = __byte_perm(low, lower, 0x5410), to[pitch] = __byte_perm(low, lower, 0x7632);
    to[2 * pitch] = __byte_perm(high, higher, 0x5410), to[3 * pitch] = __byte_perm(high, higher, 0x7632);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
spread(const u16 *x, const int *order, u32 *digits, float4 *counts, int places, int cols, int room) {
    const int lane = threadIdx.x & 31, chunks = (cols + 127) / 128;
    const int own = blockIdx.x * WARPS + (threadIdx.x >> 5), place = own / chunks, chunk = own % chunks;
#if TOP
    // The kernel behind may rely on all that came before this one.
    wait_for_kernel_before();
    start_dependents();
#else
    start_dependents();
    wait_for_kernel_before();
#endif
    if (place >= places) return;
#if TOP
    const u16 *row = x + (size_t)(order[place] / TOP) * cols;
#else
    const u16 *row = x + (size_t)place * cols;
#endif
    const size_t pitch = (size_t)ORDERS * chunks * 32;
    u32 *to = digits + (size_t)place * 4 * pitch + chunk * 32 + lane;
    const int order_of[3] = {WITH_BYTES ? BY_BYTE : BY_PAIR, WITH_BYTES ? BY_PAIR : BY_THIRD, BY_THIRD};
    float v[ORDERS][4];
#pragma unroll
    for (int i = 0; i < ORDERS; i++) load(v[i], row, order_of[i], chunk, cols);
    u32 most = 0;
#pragma unroll
    for (int b = 0; b < 4; b++) most = max(most, __float_as_uint(v[0][b]) & 0x7fffffffu);
    most = __reduce_max_sync(~0u, most);
    const int exponent = (int)max(most >> 23, 30u) - 127;  // below 2^-97 all is zero
    const float scale = __uint_as_float((u32)(127 + FINEST - exponent) << 23);
    int sum;
#pragma unroll
    for (int i = 0; i < ORDERS; i++) {
        int whole[4];
#pragma unroll
        for (int b = 0; b < 4; b++) whole[b] = __float2int_rn(v[i][b] * scale);
        if (i == 0) sum = whole[0] + whole[1] + whole[2] + whole[3];
        put(to + i * chunks * 32, pitch, whole, power_of(order_of[i], lane));
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) {
        const float unit = most < 0x7f800000u ? __uint_as_float((u32)(127 - FINEST + exponent) << 23) : __uint_as_float(0x7fffffffu);
        float4 count;
        count.x = unit, count.y = 0.f, count.z = unit * 65536.f, count.w = unit * (float)sum;
        counts[(size_t)chunk * room + place] = count;
    }
}
