// 64 rows in registers times N tokens in shared memory, 8 to 192: what kernels share whose weights become numbers on the
// way. HALF as elsewhere.

// Four registers of a warp's 16 rows and 16 columns: upper row, lower row, and both 8 columns further. Of 8-bit numbers
// 32 columns: four neighbouring ones a register, and both rows 16 columns further.
typedef u32 Fragment[4];

#include "sums.h"

// The numbers of operands a, b and add follow the sums.
#define PRODUCT(WIDTH, SUMS, A0, A1, A2, A3, B, ADD, NUMBERS, MAJOR) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #WIDTH NUMBERS " {" NAMES_##SUMS "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1" MAJOR ";\n}" \
        : SUMS_##SUMS(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#define PRODUCTS(NUMBERS, MAJOR) \
    if constexpr (SIZE == 4) PRODUCT(8, 4, 4, 5, 6, 7, 8, 9, NUMBERS, MAJOR); \
    else if constexpr (SIZE == 8) PRODUCT(16, 8, 8, 9, 10, 11, 12, 13, NUMBERS, MAJOR); \
    else if constexpr (SIZE == 16) PRODUCT(32, 16, 16, 17, 18, 19, 20, 21, NUMBERS, MAJOR); \
    else if constexpr (SIZE == 32) PRODUCT(64, 32, 32, 33, 34, 35, 36, 37, NUMBERS, MAJOR); \
    else if constexpr (SIZE == 64) PRODUCT(128, 64, 64, 65, 66, 67, 68, 69, NUMBERS, MAJOR); \
    else if constexpr (SIZE == 96) PRODUCT(192, 96, 96, 97, 98, 99, 100, 101, NUMBERS, MAJOR);

// A fragment's columns, times twice SIZE tokens. add 0: d is overwritten.
template <int SIZE> __device__ __forceinline__ void multiply(float (&d)[SIZE], const Fragment &a, u64 b, int add) {
#if HALF
    PRODUCTS("k16.f32.f16.f16", ", 0")
#else
    PRODUCTS("k16.f32.bf16.bf16", ", 0")
#endif
}

// The same of float8 e4m3.
template <int SIZE> __device__ __forceinline__ void multiply_8(float (&d)[SIZE], const Fragment &a, u64 b, int add) {
    PRODUCTS("k32.f32.e4m3.e4m3", "")
}
#undef PRODUCTS
#undef PRODUCT

// Until at most so many units are under way.
#define FINISH(units) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(units) : "memory")

// Holds the registers of a finished unit until here: wgmma reads them while it is under way.
template <int COUNT> __device__ __forceinline__ void release(Fragment (&a)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}

// The same of the first so many.
template <int COUNT, int ALL> __device__ __forceinline__ void release_steps(Fragment (&a)[ALL]) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}

// Adds a finished product.
__device__ __forceinline__ void add_part(float (&sums)[N / 2], float (&part)[N / 2], float upper, float lower) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float sum;
        asm volatile("mov.f32 %0, %1;" : "=f"(sum) : "f"(part[i]));  // not before the wait
        sums[i] += sum * (i & 2 ? lower : upper);
    }
}
