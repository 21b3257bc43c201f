// What kernels that stream weights through mma.m16n8k16 share: conversions, loads, the instruction, activations.
// HALF 0 bfloat16, 1 float16 · GATE 0 none, 1 silu, 2 gelu_tanh · FLOAT32 1: results are not rounded to 16 bits.

typedef unsigned int u32;
typedef unsigned short u16;

#define LANE_COLS 8
#define CHUNK_COLS 32

__device__ __forceinline__ float to_float(u32 bits) {
#if HALF
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
    return f;
#else
    return __uint_as_float(bits << 16);
#endif
}

__device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 r;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#endif
    return r;
}

__device__ __forceinline__ void store(void *out, size_t at, float y) {
#if FLOAT32
    ((float *)out)[at] = y;
#else
    ((u16 *)out)[at] = (u16)(pack(y, 0.f) & 0xffff);
#endif
}

// Have 128 bytes brought into the L2 cache. A norm's weights were read a step ago, and all other weights since.
__device__ __forceinline__ void touch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ float round_trip(float v) { return to_float(pack(v, 0.f) & 0xffff); }

__device__ __forceinline__ uint4 load_weight(const u16 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#if GATE
__device__ __forceinline__ float activate(float v) {
#if GATE == 1
    return v / (1.f + __expf(-v));
#else
    return 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
#endif
}
#endif

