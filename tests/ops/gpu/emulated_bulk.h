// What bulk.cu and stream.cu use beyond emulated_copies.h: loads, products of bytes.

#define LANE_COLS 8
#define CHUNK_COLS 32

static uint4 load_weight(const u16 *p) {
    if ((uintptr_t)p % 16) fail("a load that is not aligned");
    return *(const uint4 *)p;
}
template <int COUNT> static void load_words(u32 (&own)[COUNT], const u16 *p) { memcpy(own, p, sizeof(own)); }

// Tensor cores' products of bytes, signed or not in the first operand: A [16, 32], B [32, 8] by columns, C [16, 8].
static void mma_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Warp &w = warp_of(~0u);
    const int lane = current % 32;
    const u32 r[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(w.in[lane], r, sizeof(r));
    collective(20, [](Warp &w) {
        int a[16][32], b[32][8];
        for (int l = 0; l < 32; l++)
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) {
                    const int byte = w.in[l][n] >> 8 * i & 255;
                    a[l / 4 + 8 * (n & 1)][l % 4 * 4 + i + 16 * (n >> 1)] = BITS == 8 ? (signed char)byte : byte;
                    if (n < 2) b[l % 4 * 4 + i + 16 * n][l / 4] = (signed char)(w.in[l][4 + n] >> 8 * i & 255);
                }
        for (int l = 0; l < 32; l++)
            for (int n = 0; n < 4; n++) {
                int sum = 0;
                for (int k = 0; k < 32; k++) sum += a[l / 4 + 8 * (n >> 1)][k] * b[k][l % 4 * 2 + (n & 1)];
                w.out[l][n] = (u32)sum;
            }
    });
    for (int n = 0; n < 4; n++) c[n] += (int)w.out[lane][n];
}
