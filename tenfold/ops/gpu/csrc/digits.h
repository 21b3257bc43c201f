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
#define SHARERS (BITS == 2 ? 8 : 16)    // threads that make digits of 128 columns; of 3 bits every fourth has nothing to do
#define WORDS (BITS == 2 ? 8 : BITS == 3 ? 6 : 4)  // pairs of columns that one of them has
#define MINE (BITS == 2 || BITS == 3 ? 4 : 2)      // registers that these are in
#define ROOM_AHEAD ((NORM ? 16 : 32) / (WORDS * NT * TILE))
#define AHEAD (ROOM_AHEAD > 1 ? ROOM_AHEAD : 1)  // times a thread asks for its columns before it waits for the first
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

// What a thread has of 128 columns: neighbouring ones, and of 3 bits a pair at the end that all parts share.
struct Columns {
    int lane, part, first;  // of four lanes, and where its registers begin in a part

    __device__ __forceinline__ explicit Columns(int sharer) {
#if BITS == 8
        lane = sharer % 8 / 2, part = sharer / 8, first = sharer % 2 * 2;
#elif BITS == 4
        lane = sharer / 4, part = sharer % 4 / 2, first = sharer % 2 * 2;
#elif BITS == 3
        lane = sharer / 4, part = sharer % 4, first = 0;
#else
        lane = sharer / 2, part = sharer % 2, first = 0;
#endif
    }
    __device__ __forceinline__ bool idle() const { return part == PARTS; }
    // The first of pair i of its columns.
    __device__ __forceinline__ int column(int sharer, int i) const {
        return BITS == 3 ? lane * 32 + (i < 5 ? min(part, 2) * 10 + i * 2 : 30) : (sharer * WORDS + i) * 2;
    }
    // Whether pair i is this part's to count, for some have more than one.
    __device__ __forceinline__ bool counts(int i) const { return BITS != 3 || (i < 5 ? part < 3 : part == 0); }
};

// Which of its columns byte b of a thread's register r has.
__device__ __forceinline__ constexpr int column_of(int r, int b) {
#if BITS == 8
    return r * 4 + b;
#elif BITS == 4
    return b / 2 + b % 2 * 4 + r * 2;
#elif BITS == 3
    return (r < 2 ? r * 2 + b % 2 * 6 : r == 2 ? 4 : 10) + b / 2;
#else
    return (b % 2 * 4 + r) * 2 + b / 2;
#endif
}

// By which power of two its column is multiplied; below 0: the byte is empty.
__device__ __forceinline__ constexpr int power_of(int r, int b, int part) {
#if BITS == 8
    return 0;
#elif BITS == 4
    return r % 2 ? 0 : 4;
#elif BITS == 3
    return r == 0 ? 7 - b % 2 : r == 1 ? 4 - b % 2 : r == 2 ? 1 + b % 2 * 8 : b % 2 ? part : -1;
#else
    return 6 - r * 2;
#endif
}

__device__ __forceinline__ void load_columns(u32 (&words)[WORDS], const u16 *x, const Columns &mine, int sharer) {
#if BITS == 3
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = *(const u32 *)(x + mine.column(sharer, i));
#else
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
        const uint4 four = *(const uint4 *)(x + mine.column(sharer, i));
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
#endif
}

// Digits of a thread's columns of a token, and what products with the 128 columns count. All threads of a warp come here.
__device__ __forceinline__ void put(uint4 *xs, float *offsets, const float (&v)[WORDS * 2], const Columns &mine, int sharer, int chunk, int m, const Shape &s, bool own) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < WORDS * 2; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
    for (int d = 1; d < SHARERS; d *= 2) most = max(most, __shfl_xor_sync(~0u, most, d));
    const int exponent = (int)max(most >> 23, 30u) - 127;  // below 2^-97 all is zero
    const float scale = __uint_as_float((u32)(127 + FINEST - exponent) << 23);
    int whole[WORDS * 2], sum = 0;
#pragma unroll
    for (int i = 0; i < WORDS * 2; i++) {
        whole[i] = __float2int_rn(v[i] * scale);
        if (mine.counts(i / 2)) sum += whole[i];
    }
    u32 digits[4][MINE];
#pragma unroll
    for (int r = 0; r < MINE; r++) {
        u32 d[4];
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const int power = power_of(r, b, mine.part);
            d[b] = power < 0 ? 0 : ((u32)whole[column_of(r, b)] << max(power, 0)) + 0x80808080u ^ 0x80808080u;
        }
        const u32 low = __byte_perm(d[0], d[1], 0x5140), lower = __byte_perm(d[2], d[3], 0x5140);
        const u32 high = __byte_perm(d[0], d[1], 0x7362), higher = __byte_perm(d[2], d[3], 0x7362);
        digits[0][r] = __byte_perm(low, lower, 0x5410), digits[1][r] = __byte_perm(low, lower, 0x7632);
        digits[2][r] = __byte_perm(high, higher, 0x5410), digits[3][r] = __byte_perm(high, higher, 0x7632);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        u32 *const to = (u32 *)(xs + digits_at(s, chunk, mine.part, m * 4 + k, mine.lane)) + mine.first;
        if (own && !mine.idle()) {
            if (MINE == 4) *(uint4 *)to = make_uint4(digits[k][0], digits[k][1], digits[k][MINE - 2], digits[k][MINE - 1]);
            else *(uint2 *)to = make_uint2(digits[k][0], digits[k][1]);
        }
    }
#pragma unroll
    for (int d = 1; d < SHARERS; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    // The first four threads write what a digit counts, each of one. Numbers that are none make the sums none.
    const float unit = most < 0x7f800000u ? __uint_as_float((u32)(127 - FINEST + exponent) << 23) : __uint_as_float(0x7fffffffu);
    const float zero = ZEROS ? 1.f : BITS == 8 ? 0.f : 1 << (BITS - 1);
    if (own && sharer < 4) *(float2 *)(offsets + (chunk * NT * 8 + m * 4 + sharer) * SUMS) = make_float2(unit * __uint_as_float((u32)(127 + 8 * sharer - UP) << 23), sharer == 3 ? unit * sum * zero : 0.f);
}

// The norm's weights of a thread's columns; of the first, asked for before the kernel in front has ended.
struct Norms {
    float2 coming[AHEAD][WORDS];

    __device__ __forceinline__ static void load(float2 (&to)[WORDS], const float *norm, int unit) {
        const int sharer = unit % SHARERS;
        const Columns mine(sharer);
#pragma unroll
        for (int i = 0; i < WORDS; i++) to[i] = *(const float2 *)(norm + unit / SHARERS * 128 + mine.column(sharer, i));
    }
    __device__ __forceinline__ void ask(const float *norm, const Shape &s) {
#if NORM
#pragma unroll
        for (int i = 0; i < AHEAD; i++) load(coming[i], norm + s.first, min((int)threadIdx.x + i * MULTIPLIERS, s.cols / 128 * SHARERS - 1));
#endif
    }
};

// x, times the norm's weight where there is one, as digits in shared memory; scales[token] is what its sums are multiplied
// by: the inverse root mean square, or where blocks divide the columns the sum of squares of this block's.
__device__ __forceinline__ void stage(u16 *xs, float *offsets, float *squares, float *scales, const u16 *x, const float *norm, float eps, const Shape &s, Norms &norms) {
    const int units = s.cols / 128 * SHARERS, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sharer = lane % SHARERS;
    const Columns mine(sharer);
    float square[NT * TILE];
#pragma unroll
    for (int m = 0; m < NT * TILE; m++) square[m] = 0.f;
    x += s.first, norm += s.first;
    for (int begin = 0; begin < units; begin += AHEAD * MULTIPLIERS) {
        u32 words[AHEAD][NT * TILE][WORDS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int m = 0; m < NT * TILE; m++)
                if (m < s.tokens) load_columns(words[i][m], x + (size_t)m * s.stride + min(begin + i * MULTIPLIERS + (int)threadIdx.x, units - 1) / SHARERS * 128, mine, sharer);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int unit = begin + i * MULTIPLIERS + threadIdx.x;  // those past the end stay for their warp's sake
            if (unit - lane >= units) continue;
#if NORM
            if (begin) Norms::load(norms.coming[i], norm, min(unit, units - 1));
#endif
#pragma unroll
            for (int m = 0; m < NT * TILE; m++) {
                if (m >= s.tokens) continue;
                float v[WORDS * 2];
#pragma unroll
                for (int k = 0; k < WORDS; k++) {
                    v[k * 2] = to_float(words[i][m][k] & 0xffff), v[k * 2 + 1] = to_float(words[i][m][k] >> 16);
#if NORM
                    if (unit < units && mine.counts(k)) square[m] += v[k * 2] * v[k * 2] + v[k * 2 + 1] * v[k * 2 + 1];
                    v[k * 2] *= norms.coming[i][k].x, v[k * 2 + 1] *= norms.coming[i][k].y;
#endif
                }
                put((uint4 *)xs, offsets, v, mine, sharer, unit / SHARERS, m, s, unit < units);
            }
        }
    }
#if NORM
#pragma unroll
    for (int m = 0; m < NT * TILE; m++) {
        if (m >= s.tokens) continue;
#pragma unroll
        for (int d = 16; d; d >>= 1) square[m] += __shfl_xor_sync(~0u, square[m], d);
        if (lane == 0) squares[m * WARPS + warp] = square[m];
    }
#endif
    meet();
#if NORM
    for (int m = warp; m < s.tokens; m += WARPS) {
        float total = lane < WARPS ? squares[m * WARPS + lane] : 0.f;
#pragma unroll
        for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
        if (lane == 0) scales[m] = CLUSTER > 1 ? total : rsqrtf(total / s.stride + eps);  // read when all warps have left their sums
    }
#endif
}
