// Codes of packed weights (ops/formats.py) as pairs of exact 16-bit numbers, HALF as elsewhere. A code lies in the low bits
// of a number whose upper ones are fixed, so it is taken out by a mask, and what those add goes with the zero where that is
// the middle of all codes. Zeros of groups may be fractions, which such a number has no digits for: they are subtracted
// from the code itself.

#define OFFSET (HALF ? 1024.f : 128.f)  // added to codes of 2 to 4 bits
#define MAGIC (HALF ? 0x64006400u : 0x43004300u)  // a pair of it

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

// The pair of so many bits at the low ends of both halves of a word as exact numbers, less `zero`, a pair of OFFSET and more.
template <int COUNT> __device__ __forceinline__ u32 few_bits(u32 word, u32 zero) { return minus(pick(word, ((1u << COUNT) - 1) * 0x00010001u, MAGIC), zero); }

// Bytes 0 and 2 of a word, signed: HALF 1024 + 128 + code, less that; else 128 + the low seven bits, less 128, or less 256
// where the sign bit makes it that; and less a zero where there are some.
template <bool ZEROS_> __device__ __forceinline__ u32 signed_bytes(u32 word, u32 zero) {
#if HALF
    const u32 d = minus(word & 0x00ff00ffu ^ 0x64806480u, 0x64806480u);
#else
    const u32 d = minus(pick(word, 0x007f007fu, 0x43004300u), pick(word, 0x00800080u, 0x43004300u));
#endif
    return ZEROS_ ? minus(d, zero) : d;
}

#if HALF
// Bytes 0 and 1 of a word, float8 e4m3.
__device__ __forceinline__ u32 eighths(u32 word) {
    u32 d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"((u16)word));
    return d;
}
#else
// Bytes 1 and 3 of `high`, float8 e4m3, whose low seven bits `seven` has four places lower: the sign, and seven bits at the
// low end of exponent and mantissa are the number times 2^-120, the smallest ones included.
__device__ __forceinline__ u32 eighths(u32 high, u32 seven) {
    u32 d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(high & 0x80008000u | seven & 0x07f007f0u), "r"(0x7b807b80u));
    return d;
}
#endif
