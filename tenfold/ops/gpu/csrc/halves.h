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

// What a token with this largest number is multiplied by to be float8. As LEAST_TOKEN of formats.py: below it a token is
// zeros, for what makes its largest number 448 may be infinite, and zeros times that are no numbers.
__device__ __forceinline__ float to_largest(float largest) { return largest > 1e-35f ? __fdiv_rn(448.f, largest) : 0.f; }

// To the nearest e4m3 number, at most the largest one: lo in the low byte.
__device__ __forceinline__ u32 to_e4m3(float lo, float hi) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
    return r;
}
