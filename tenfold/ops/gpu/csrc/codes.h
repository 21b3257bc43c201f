// Codes of packed weights where a kernel reads one kind of them. BITS 2 to 4 or 8 · E4M3 1: 8 bits are a float8 · SCALES type
// of scales and zeros: 0 bfloat16, 1 float16, 2 float32 · ZEROS 1 where groups have zeros · GROUP columns to a scale.

#include "numbers.h"

#define WHOLE_ROW (GROUP >= 1 << 30)
#if BITS <= 4
#define MIDDLE (MAGIC + (1u << (BITS - 1)) * 0x00010001u)  // a pair of OFFSET + half of all codes
#define NOTHING (ZEROS || BITS < 4 ? 0u : 0x88888888u)  // codes of zero; fewer bits have a scale of zero there
#else
#define MIDDLE 0u
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

// zero: a pair of a group's, or MIDDLE.
__device__ __forceinline__ u32 whole(u32 word, u32 zero) {
#if BITS <= 4 && ZEROS
    return minus(few_bits<BITS>(word, MAGIC), zero);
#elif BITS <= 4
    return few_bits<BITS>(word, zero);
#else
    return signed_bytes<ZEROS>(word, zero);
#endif
}
