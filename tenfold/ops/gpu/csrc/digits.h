// Products of few.h in whole numbers: mma.m16n8k32 of bytes, tiles of 2 tokens. No code is moved or made another number.
//
// A byte of a word of codes, but for the bits of one code, is 2^e code, which a mask gives for four codes at once. Columns
// of x become whole numbers of 21 bits and a sign, the largest of 128 columns counting 2^20 or more, which is finer than
// 16-bit numbers are; times 2^(UP - e) they are written with four digits of base 256 from -128 to 127. Digits are what the
// instruction multiplies codes by, each a column of its own: sums are exact, and float32 adds them up with their weights,
// the group's scale among them. Of 3 bits the code in the middle of a half word lies in both its bytes, and one has a bit in
// each of three words: they are taken apart, with a power of two each.

#define REGISTERS (BITS == 3 ? 12 : 8)  // of four masked bytes a lane has of a chunk of a row
#define PARTS (REGISTERS / 4)           // two instructions each
#define UP (BITS == 8 ? 0 : BITS == 4 ? 4 : BITS == 3 ? 7 : 6)
#define SUMS 2  // numbers of a digit's 128 columns: what a product counts, and of the highest digit the sum of x
#define FINEST 20

// Register r of a lane, as instructions take it.
__device__ __forceinline__ u32 masked(const Own &own, int r) {
#if BITS == 8
    return (&own[r / 4].x)[r % 4];
#elif BITS == 4
    return (&own[0].x)[r / 2] & (r % 2 ? 0xf0f0f0f0u : 0x0f0f0f0fu);
#elif BITS == 3
    const u32 masks[4] = {0x0e070e07u, 0x70387038u, 0x01c001c0u, 0x80008000u};
    return own[r / 4] & masks[r % 4];
#else
    return own[r / 4] & 0x03030303u << r % 4 * 2;
#endif
}

// Which of a lane's 32 columns byte b of register r has.
__device__ __forceinline__ constexpr int column_of(int r, int b) {
#if BITS == 8
    return r * 4 + b;
#elif BITS == 4
    return r / 2 * 8 + b / 2 + b % 2 * 4 + r % 2 * 2;
#elif BITS == 3
    return (r % 4 == 3 ? 30 : (r / 4 * 5 + (r % 4 == 2 ? 2 : r % 4 + b % 2 * 3)) * 2) + b / 2;
#else
    return r / 4 * 16 + (b % 2 * 4 + r % 4) * 2 + b / 2;
#endif
}

// By which power of two its column is multiplied; below 0: the byte is empty.
__device__ __forceinline__ constexpr int power_of(int r, int b) {
#if BITS == 8
    return 0;
#elif BITS == 4
    return r % 2 ? 0 : 4;
#elif BITS == 3
    return r % 4 == 0 ? 7 - b % 2 : r % 4 == 1 ? 4 - b % 2 : r % 4 == 2 ? 1 + b % 2 * 8 : b % 2 ? r / 4 : -1;
#else
    return 6 - r % 4 * 2;
#endif
}

__device__ __forceinline__ void mma_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BITS == 8
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Where digits of four registers lie: [chunk][part][token][digit][lane of four].
__device__ __forceinline__ int digits_at(const Shape &s, int chunk, int part, int digit, int t) {
    return ((chunk * PARTS + part) * s.tokens * 4 + digit) * 4 + t;
}

__device__ __forceinline__ void multiply(Sums &acc, const Piece (&pieces)[TALL], const u16 *xs, const float *offsets, const Shape &s, int col) {
    const int lane = threadIdx.x & 31, chunk = col / 128;
    int c[TALL][NT][4];
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int n = 0; n < NT; n++) c[t][n][0] = c[t][n][1] = c[t][n][2] = c[t][n][3] = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int digit = n * 8 + (lane >> 2), most = s.tokens * 4;  // those of tokens that are not there are never stored
            const uint4 x = ((const uint4 *)xs)[digits_at(s, chunk, part, digit < most ? digit : digit & 3, lane & 3)];
#pragma unroll
            for (int t = 0; t < TALL; t++) {
                const Own &f = pieces[t].first, &g = pieces[t].second;
                mma_bytes(c[t][n], masked(f, part * 4), masked(g, part * 4), masked(f, part * 4 + 1), masked(g, part * 4 + 1), x.x, x.y);
                mma_bytes(c[t][n], masked(f, part * 4 + 2), masked(g, part * 4 + 2), masked(f, part * 4 + 3), masked(g, part * 4 + 3), x.z, x.w);
            }
        }
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float4 v = *(const float4 *)(offsets + (chunk * NT * 8 + n * 8 + (lane & 3) * 2) * SUMS);
#pragma unroll
        for (int t = 0; t < TALL; t++) {
#if ZEROS
            const float zero_first = pieces[t].zero_first, zero_second = pieces[t].zero_second;
#else
            const float zero_first = 1.f, zero_second = 1.f;
#endif
            const float a = v.x * c[t][n][0] - zero_first * v.y, b = v.z * c[t][n][1] - zero_first * v.w;
            const float d = v.x * c[t][n][2] - zero_second * v.y, e = v.z * c[t][n][3] - zero_second * v.w;
#if WHOLE_ROW
            acc[t][n][0] += a, acc[t][n][1] += b, acc[t][n][2] += d, acc[t][n][3] += e;
#else
            acc[t][n][0] += pieces[t].scale_first * a, acc[t][n][1] += pieces[t].scale_first * b;
            acc[t][n][2] += pieces[t].scale_second * d, acc[t][n][3] += pieces[t].scale_second * e;
#endif
        }
    }
}

__device__ __forceinline__ size_t staged_bytes(const Shape &s) { return (size_t)s.cols / 128 * REGISTERS * 64 * s.tokens; }

// A part of the digits of the 32 columns of a lane of four, and with the first part what their products count.
template <int PART> __device__ __forceinline__ void put(uint4 *xs, float *offsets, const float (&v)[32], int chunk, int t, int m, const Shape &s, bool own) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
    for (int d = 1; d < 4; d *= 2) most = max(most, __shfl_xor_sync(~0u, most, d));
    const int exponent = (int)max(most >> 23, 30u) - 127;  // below 2^-97 all is zero
    const float scale = __uint_as_float((u32)(127 + FINEST - exponent) << 23);
    int whole[32], sum = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) whole[i] = __float2int_rn(v[i] * scale), sum += whole[i];
    u32 digits[4][4];  // of a digit, four registers
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 d[4];
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const int power = power_of(PART * 4 + i, b);
            d[b] = power < 0 ? 0 : ((u32)whole[column_of(PART * 4 + i, b)] << max(power, 0)) + 0x80808080u ^ 0x80808080u;
        }
        const u32 low = __byte_perm(d[0], d[1], 0x5140), lower = __byte_perm(d[2], d[3], 0x5140);
        const u32 high = __byte_perm(d[0], d[1], 0x7362), higher = __byte_perm(d[2], d[3], 0x7362);
        digits[0][i] = __byte_perm(low, lower, 0x5410), digits[1][i] = __byte_perm(low, lower, 0x7632);
        digits[2][i] = __byte_perm(high, higher, 0x5410), digits[3][i] = __byte_perm(high, higher, 0x7632);
    }
#pragma unroll
    for (int k = 0; k < 4 && own; k++) xs[digits_at(s, chunk, PART, m * 4 + k, t)] = make_uint4(digits[k][0], digits[k][1], digits[k][2], digits[k][3]);
    if (PART == 0) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        // Lane t writes what digit t counts. Numbers that are none make the sums none.
        const float unit = most < 0x7f800000u ? __uint_as_float((u32)(127 - FINEST + exponent) << 23) : __uint_as_float(0x7fffffffu);
        const float zero = ZEROS ? 1.f : BITS == 8 ? 0.f : 1 << (BITS - 1);
        const float2 counts = {unit * __uint_as_float((u32)(127 + 8 * t - UP) << 23), t == 3 ? unit * sum * zero : 0.f};
        if (own) *(float2 *)(offsets + (chunk * NT * 8 + m * 4 + t) * SUMS) = counts;
    }
}

// x, times the norm's weight where there is one, as digits in shared memory; scales[token] is what its sums are multiplied
// by: the inverse root mean square, or where blocks divide the columns the sum of squares of this block's.
template <int PART> __device__ __forceinline__ void stage_part(uint4 *xs, float *offsets, float *squares, const u16 *x, const float *norm, const Shape &s, int first, int threads) {
    const int quads = s.cols / 32, warp = threadIdx.x >> 5;
    x += s.first, norm += s.first;
    for (int m = 0; m < s.tokens; m++) {
        float square = 0.f;
        for (int q = first; q < (quads + 31) / 32 * 32; q += threads) {
            const int at = min(q, quads - 1), chunk = at >> 2, t = at & 3;  // lanes past the end stay for their warp's sake
            float v[32];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int col = chunk * 128 + (BITS == 8 ? t * 16 + half * 64 : t * 32 + half * 16);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint4 a = *(const uint4 *)(x + (size_t)m * s.stride + col + i * 8);
                    const u32 *words = &a.x;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        v[half * 16 + i * 8 + j * 2] = to_float(words[j] & 0xffff);
                        v[half * 16 + i * 8 + j * 2 + 1] = to_float(words[j] >> 16);
                    }
#if NORM
                    const float4 w0 = *(const float4 *)(norm + col + i * 8), w1 = *(const float4 *)(norm + col + i * 8 + 4);
                    float *const f = v + half * 16 + i * 8;
                    if (PART == 0 && q < quads)
#pragma unroll
                        for (int j = 0; j < 8; j++) square += f[j] * f[j];
                    f[0] *= w0.x, f[1] *= w0.y, f[2] *= w0.z, f[3] *= w0.w, f[4] *= w1.x, f[5] *= w1.y, f[6] *= w1.z, f[7] *= w1.w;
#endif
                }
            }
            put<PART>(xs, offsets, v, chunk, t, m, s, q < quads);
        }
#if NORM
        if (PART == 0) {
#pragma unroll
            for (int d = 16; d; d >>= 1) square += __shfl_xor_sync(~0u, square, d);
            if ((threadIdx.x & 31) == 0) squares[m * WARPS + warp] = square;
        }
#endif
    }
}

__device__ __forceinline__ void stage(u16 *xs, float *offsets, float *squares, float *scales, const u16 *x, const float *norm, float eps, const Shape &s) {
    // Warps divide the parts of digits among them; the first has the warps that are left over.
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, each = WARPS / PARTS, rest = WARPS - each * (PARTS - 1);
    uint4 *to = (uint4 *)xs;
    if (warp < rest) stage_part<0>(to, offsets, squares, x, norm, s, warp * 32 + lane, rest * 32);
    else if (warp < rest + each) stage_part<1>(to, offsets, squares, x, norm, s, (warp - rest) * 32 + lane, each * 32);
#if PARTS == 3
    else stage_part<2>(to, offsets, squares, x, norm, s, (warp - rest - each) * 32 + lane, each * 32);
#endif
    meet();
#if NORM
    for (int m = warp; m < s.tokens; m += WARPS) {
        float total = lane < rest ? squares[m * WARPS + lane] : 0.f;
#pragma unroll
        for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
        if (lane == 0) scales[m] = CLUSTER > 1 ? total : rsqrtf(total / s.stride + eps);  // read when all warps have left their sums
    }
#endif
}
