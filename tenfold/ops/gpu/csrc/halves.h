// Pairs of float16 and of float8 e4m3, whatever type a kernel computes in.

__device__ __forceinline__ u32 halves(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

__device__ __forceinline__ float half_to_float(u32 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
    return f;
}

// Two e4m3 numbers of the low 16 bits.
__device__ __forceinline__ u32 e4m3_to_halves(u32 bits) {
    u32 r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((u16)bits));
    return r;
}

// A token whose largest number is less is zeros in float8: what makes that 448 may be infinite, and zeros times it are no
// numbers.
#define LEAST_TOKEN 1e-35f

// To the nearest e4m3 number, at most the largest one: lo in the low byte.
__device__ __forceinline__ u32 to_e4m3(float lo, float hi) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
    return r;
}
