// What the kernels of a packed KV cache share: how its codes lie, small instructions.
//
// D channels of a head (64 or 128) · KEY_BITS, VALUE_BITS of a code: 2, 4, 8 (float8 e4m3), or 1 for three levels, five
// codes a byte · GROUPS groups of a span of heads · NUMBER bytes of a scale or a zero: 1 (e4m3) or 2 (float16).

#include "halves.h"

typedef unsigned char u8;

#define CODE_BYTES(bits) ((bits) == 1 ? (D + 4) / 5 : D * (bits) / 8)
#define KEY_BYTES CODE_BYTES(KEY_BITS)
#define VALUE_BYTES CODE_BYTES(VALUE_BITS)
#define KEY_COUNT (KEY_BITS == 8 ? 1 : 2)  // numbers of a group: a scale, and a zero
#define VALUE_COUNT (VALUE_BITS == 8 ? 1 : 2)
#define KEY_NUMBERS (GROUPS * KEY_COUNT * NUMBER)  // bytes of a token's
#define VALUE_NUMBERS (GROUPS * VALUE_COUNT * NUMBER)
#define INFINITE __int_as_float(0x7f800000)
#define LOG2E 1.4426950408889634f

__device__ __forceinline__ void start_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ u32 half_mul(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ __forceinline__ u32 half_fma(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// c - a b
__device__ __forceinline__ u32 half_fnma(u32 a, u32 b, u32 c) {
    u32 r;
    asm("{\n.reg .b32 n;\nneg.f16x2 n, %1;\nfma.rn.f16x2 %0, n, %2, %3;\n}" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// As `mma` of fragments.h, in float16 whatever the compute type.
__device__ __forceinline__ void mma_half(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same, to zeros: what a chain of products begins with.
__device__ __forceinline__ void mma_first(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}

// A matrix of 8 rows of 8 halves, lane l has numbers l % 4 * 2 and the next of row l / 4: its transpose likewise.
__device__ __forceinline__ u32 transposed(u32 a) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}

// 16 bytes from global to shared memory, asynchronously.
__device__ __forceinline__ void copy_16(u8 *to, const u8 *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of the groups of copies of this thread are under way.
template <int N>
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

__device__ __forceinline__ void mma_next(bool first, float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (first) mma_first(c, a0, a1, a2, a3, b0, b1);
    else mma_half(c, a0, a1, a2, a3, b0, b1);
}

// Groups of SIZE neighbouring channels times the Hadamard matrix; lane l of a warp has channels l + 32 i.
template <int SIZE, int N>
__device__ __forceinline__ void turn(float (&v)[N]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int step = 1; step < SIZE && step < 32; step *= 2)
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float other = __shfl_xor_sync(~0u, v[i], step);
            v[i] = lane & step ? other - v[i] : v[i] + other;
        }
#pragma unroll
    for (int step = 32; step < SIZE; step *= 2)
#pragma unroll
        for (int i = 0; i < N; i++)
            if (!(i & step / 32) && i + step / 32 < N) {
                const float a = v[i], b = v[i + step / 32];
                v[i] = a + b, v[i + step / 32] = a - b;
            }
    const float scale = SIZE == 16 ? 0.25f : SIZE == 32 ? 0.17677669529663687f : SIZE == 64 ? 0.125f : 0.08838834764831845f;
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= scale;
}
