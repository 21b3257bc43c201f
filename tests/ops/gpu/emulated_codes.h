// Codes of packed weights and their numbers: what numbers.h and codes.h have in assembler.

static float number_of(u32 bits) { return to_float(bits & 0xffff); }
static u32 times(u32 a, u32 b) { return pack(number_of(a) * number_of(b), number_of(a >> 16) * number_of(b >> 16)); }
static u32 minus(u32 a, u32 b) { return pack(number_of(a) - number_of(b), number_of(a >> 16) - number_of(b >> 16)); }
static u32 pick(u32 word, u32 mask, u32 above) { return word & mask | above; }
#if HALF
static u32 eighths(u32 word) { return e4m3_to_halves(word); }
#else
static u32 eighths(u32 high, u32 seven) { return times(high & 0x80008000u | seven & 0x07f007f0u, 0x7b807b80u); }
#endif
#ifdef SCALES
#if SCALES == 2
static float value(float stored) { return stored; }
#else
static float value(u16 stored) { return SCALES == 1 ? half_to_float(stored) : float_of((u32)stored << 16); }
#endif
#endif
