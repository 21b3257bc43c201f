// Codes in tiles (ops/tiles.py) as bytes for products in whole numbers. BITS 2, 3, 4 or 8 of a code. Fragment, piece_16 and
// piece_8 are the includer's.
//
// A byte of a word of codes, but for the bits of one code, is a power of two times the code, and a mask leaves four codes
// of one row at once: no code is moved. Where the power depends on the column x makes up for it (spread.h), where it depends
// on the row, upper or lower, the row's scale does. The third bit of 3 lies apart: it is a code of its own, of as many
// columns again; the lower row's other two are moved by a place, so that both parts are of the same power.
//
// A step of the instruction takes 32 columns in four registers: upper and lower row of the first 16, then of the others.

// By what products of an upper or lower row are too large.
template <int BITS> __device__ __forceinline__ constexpr float excess_of(int lower) {
    return BITS == 8 ? 1.f : BITS == 4 ? (lower ? 16.f : 1.f) : BITS == 3 ? (lower ? 32.f : 16.f) : lower ? 64.f : 16.f;
}

// A lane's words of a tile, of which steps come in two halves; those of 8 bits are loaded half by half. warp: of four.
template <int BITS> struct Words {
    static constexpr int STEPS = BITS == 3 ? 4 : 2;  // of a half
    u32 words[BITS <= 3 ? 2 * BITS : 8];

    __device__ __forceinline__ void piece(int at, u32 from) {
        const uint4 v = piece_16(from);
        words[at] = v.x, words[at + 1] = v.y, words[at + 2] = v.z, words[at + 3] = v.w;
    }

    __device__ __forceinline__ void load(u32 tile, int half, int warp, int lane) {
        if constexpr (BITS == 8) {
            const u32 from = tile + (warp * 4 + half * 2) * 512 + lane * 16;
            piece(0, from), piece(4, from + 512);
        } else if (half == 0) {
            const u32 from = tile + warp * (BITS == 4 ? 1024 : 512) + lane * 16;
            piece(0, from);
            if constexpr (BITS == 4) piece(4, from + 512);
            if constexpr (BITS == 3) {
                const uint2 v = piece_8(tile + 2048 + warp * 256 + lane * 8);
                words[4] = v.x, words[5] = v.y;
            }
        }
    }

    // Register r of a step of a half.
    __device__ __forceinline__ u32 masked(int half, int step, int r) const {
        const u32 lower = r & 1;
        if constexpr (BITS == 8) return words[step * 4 + r];
        else if constexpr (BITS == 4) return words[half * 4 + step * 2 + r / 2] & (lower ? 0xf0f0f0f0u : 0x0f0f0f0fu);
        else if constexpr (BITS == 2) return words[half * 2 + step] & 0x03030303u << 2 * r;
        else if (half == 0) return (lower ? words[step] >> 1 : words[step]) & 0x03030303u << (r / 2 * 4 + lower);
        else return words[4 + step / 2] & 0x01010101u << ((step & 1) * 4 + r);
    }

    __device__ __forceinline__ void mask(Fragment (&a)[4], int half) const {
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int r = 0; r < 4; r++) a[s][r] = masked(half, s, r);
    }
};
