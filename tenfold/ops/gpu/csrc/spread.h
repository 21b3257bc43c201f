// In what order digits of x have their 128 columns, so that they meet the codes that bytes.h takes from tiles; lane, j, h, c
// and t as ops/tiles.py names them. Codes of 2 and 3 bits come times powers of two that depend on the column, which these
// columns make up for: all are 2^UP in the end.

#define UP 4
#define BY_BYTE 0   // of codes of 4 and 8 bits,
#define BY_PAIR 1   // of 2 bits, and of the low two of 3,
#define BY_THIRD 2  // and of the third bit

// Of 32 words: the column of byte 0. Byte 2 has the next one, 1 and 3 have those `apart` further.
__device__ __forceinline__ constexpr int column_of(int order, int word) {
    const int t = word & 3, h = word >> 2 & 1;
    return order == BY_BYTE ? (word >> 2) * 16 + t * 2 : order == BY_PAIR ? (word >> 3) * 32 + h * 8 + t * 2 : (word >> 4) * 64 + (word >> 3 & 1) * 16 + h * 8 + t * 2;
}
__device__ __forceinline__ constexpr int apart(int order) { return 8 << order; }

// By which power of two a word's columns are multiplied.
__device__ __forceinline__ constexpr int power_of(int order, int word) {
    const int h = word >> 2 & 1;
    return order == BY_BYTE ? 0 : order == BY_PAIR ? UP - 4 * h : UP + 2 - 4 * (word >> 3 & 1) - 2 * h;
}
