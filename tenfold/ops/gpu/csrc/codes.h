// Codes of packed weights (ops/formats.py) as 16-bit numbers. BITS 4 or 8 · E4M3 1: 8 bits are a float8 · SCALES type of
// scales and zeros: 0 bfloat16, 1 float16, 2 float32 · ZEROS 1 where groups have zeros · GROUP columns to a scale.

#define WHOLE_ROW (GROUP >= 1 << 30)
#if BITS == 4
#define BASE (HALF ? 1024.f : 128.f)  // added to a code by the bits above it
#define MAGIC (HALF ? 0x64006400u : 0x43004300u)  // a pair of BASE
#define MIDDLE (HALF ? 0x64086408u : 0x43084308u)  // and of BASE + 8
#define NOTHING (ZEROS ? 0u : 0x88888888u)  // codes of zero
#else
#define BASE (HALF ? 1152.f : 0.f)
#define MIDDLE (HALF ? 0x64806480u : 0u)
#define NOTHING 0u
#endif

#if SCALES == 2
typedef float Stored;
#else
typedef u16 Stored;
#endif

__device__ __forceinline__ float value(Stored stored) {
#if SCALES == 2
    return stored;
#elif SCALES == 1
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(stored));
    return f;
#else
    return __uint_as_float((u32)stored << 16);
#endif
}

__device__ __forceinline__ float number(const void *values, size_t at) { return value(__ldg((const Stored *)values + at)); }

__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 d;
#if HALF
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
    return d;
}

// Some bits of a word and others above them, in one instruction: left alone the compiler takes two.
__device__ __forceinline__ u32 pick(u32 word, u32 mask, u32 above) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(mask), "r"(above));
    return d;
}

#if BITS == 4
// Nibbles 0 and 4 of a word as exact numbers less their zero.
__device__ __forceinline__ u32 whole(u32 word, u32 zero) { return minus(pick(word, 0x000f000fu, MAGIC), zero); }
#elif E4M3 && HALF
// Bytes 0 and 1 of a word.
__device__ __forceinline__ u32 eighths(u32 word) {
    u32 d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"((u16)word));
    return d;
}
#elif E4M3
// Bytes 1 and 3 of `high`, whose low seven bits `seven` has four places lower: the sign, and seven bits at the low end of
// exponent and mantissa are the number times 2^-120, the smallest ones included.
__device__ __forceinline__ u32 eighths(u32 high, u32 seven) {
    u32 d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(high & 0x80008000u | seven & 0x07f007f0u), "r"(0x7b807b80u));
    return d;
}
#elif HALF
// Bytes 0 and 2 of a word: 1024 + 128 + code, less that and the zero.
__device__ __forceinline__ u32 whole(u32 word, u32 zero) { return minus(word & 0x00ff00ffu ^ 0x64806480u, zero); }
#else
// Bytes 0 and 2 of a word: 128 + the low seven bits, less 128, or less 256 where the sign bit makes it that.
__device__ __forceinline__ u32 whole(u32 word, u32 zero) {
    const u32 d = minus(pick(word, 0x007f007fu, 0x43004300u), pick(word, 0x00800080u, 0x43004300u));
    return ZEROS ? minus(d, zero) : d;
}
#endif
