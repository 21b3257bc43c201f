// 64 rows of weights times W tokens in one instruction, both operands in shared memory: BITS 16, HALF as elsewhere, or 8,
// float8 e4m3. W is N or less: then sums of the first W tokens are made, in the first registers. add 0: d is overwritten.

#include "sums.h"

#if BITS == 8
#define NUMBERS "k32.f32.e4m3.e4m3"
#define MAJOR ""
#elif HALF
#define NUMBERS "k16.f32.f16.f16"
#define MAJOR ", 0, 0"
#else
#define NUMBERS "k16.f32.bf16.bf16"
#define MAJOR ", 0, 0"
#endif
// The numbers of operands a, b and add follow the sums.
#define PRODUCT(W, SUMS, A, B, ADD) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #W NUMBERS " {" NAMES_##SUMS "}, %" #A ", %" #B ", p, 1, 1" MAJOR ";\n}" \
        : SUMS_##SUMS(0) : "l"(a), "l"(b), "r"(add))
template <int W = N> __device__ __forceinline__ void multiply(float (&d)[N / 2], u64 a, u64 b, int add) {
    static_assert(W <= N);
    if constexpr (W == 8) PRODUCT(8, 4, 4, 5, 6);
    else if constexpr (W == 16) PRODUCT(16, 8, 8, 9, 10);
    else if constexpr (W == 32) PRODUCT(32, 16, 16, 17, 18);
    else if constexpr (W == 64) PRODUCT(64, 32, 32, 33, 34);
    else if constexpr (W == 128) PRODUCT(128, 64, 64, 65, 66);
    else if constexpr (W == 192) PRODUCT(192, 96, 96, 97, 98);
    else if constexpr (W == 256) PRODUCT(256, 128, 128, 129, 130);
    else static_assert(W == 8, "no instruction of this width");
}
#undef PRODUCT
