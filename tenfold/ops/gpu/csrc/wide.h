// Products of few.h in 16-bit numbers: mma.m16n8k16, tiles of 8 tokens.
//
// Codes of up to 4 bits are not made whole numbers one by one. A code is left where it lies in the low bits of a 16-bit
// number whose upper ones are fixed: that is OFFSET + 2^e code, e how far up it lies, and as many codes as fit there cost
// a mask each and no shift. Columns of x are multiplied by 2^-e, and what OFFSET and zeros add to a sum is taken off again
// once in 128 columns: OFFSET times the sum of x 2^-e, and zero times the sum of x, which `stage` makes. In float16 OFFSET,
// 1024 there, would cost too many digits of the sum, so it goes from each pair of codes. 8-bit codes become exact
// numbers in registers.

#define SUMS (ZEROS ? 2 : 1)  // numbers of a token's 128 columns

#if IN_PLACE
#define CODES_SIDE_BY_SIDE ((HALF ? 10 : 7) / BITS)  // in the low bits of a number

// How far up pair p of a lane's 32 columns lies once its word is shifted as the ones before it are: 0 for the lowest.
__device__ __forceinline__ constexpr int place_of(int p) {
#if BITS == 4
    return p % 4 % CODES_SIDE_BY_SIDE * 4;
#elif BITS == 3
    return p < 15 ? p % 5 % CODES_SIDE_BY_SIDE * 3 : 0;
#else
    return p % 8 % CODES_SIDE_BY_SIDE * 2;
#endif
}

__device__ __forceinline__ u32 bare(u32 code) { return HALF ? minus(code, MAGIC) : code; }

// Pair i of a word, where it lies.
__device__ __forceinline__ u32 pair(u32 word, int i) {
    const int up = i % CODES_SIDE_BY_SIDE * BITS;
    return bare(pick(word >> i / CODES_SIDE_BY_SIDE * CODES_SIDE_BY_SIDE * BITS, ((1u << BITS) - 1) * 0x00010001u << up, MAGIC));
}
#elif BITS == 8
// Pair i of a word: columns i and i + 2 (but float8 in float16: 2 i and 2 i + 1).
__device__ __forceinline__ u32 pair(u32 word, int i, u32 zero) {
#if E4M3 && HALF
    return eighths(word >> 16 * i);
#elif E4M3
    return eighths(i ? word : word << 8, i ? word >> 4 : word << 4);
#else
    return whole(word >> 8 * i, zero);
#endif
}
#endif

#if BITS < 16
// The k-th 8 of a lane's 32 columns as four pairs.
__device__ __forceinline__ void expand(u32 (&f)[4], const Own &loads, int k, Zero zero) {
#if BITS == 4
    const u32 word = (&loads[0].x)[k];
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = pair(word, j);
#elif BITS == 3
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int p = k * 4 + j;  // the last pair has a bit in each word
        if (p < 15) f[j] = pair(loads[p / 5], p % 5);
        else f[j] = bare(pick(loads[2] >> 13, 0x00040004u, pick(loads[1] >> 14, 0x00020002u, pick(loads[0] >> 15, 0x00010001u, MAGIC))));
    }
#elif BITS == 2
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = pair(loads[k / 2], k % 2 * 4 + j);
#else
    const u32 *words = &loads[k >> 1].x + (k & 1) * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = pair(words[j >> 1], j & 1, zero);
#endif
}
#endif

// A chunk of `col` and on. offsets: what the sums of these columns hold too much of.
__device__ __forceinline__ void multiply(Sums &acc, const Piece (&pieces)[TALL], const u16 *xs, const float *offsets, const Shape &s, int col) {
    const int lane = threadIdx.x & 31;
    const u16 *from = xs + col + (lane & 3) * 8;
#if BITS < 16
#if WHOLE_ROW
    Sums &part = acc;
#else
    Sums part;
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int n = 0; n < NT; n++) part[t][n][0] = part[t][n][1] = part[t][n][2] = part[t][n][3] = 0.f;
#endif
    float half[4] = {0.f, 0.f, 0.f, 0.f};  // of a single tile's sums, so that no product waits for the one before it
#pragma unroll
    for (int k = 0; k < 4; k++) {
        u32 f[TALL][4], g[TALL][4];
#pragma unroll
        for (int t = 0; t < TALL; t++) {
#if ZEROS
            expand(f[t], pieces[t].first, k, pieces[t].zero_first);
            expand(g[t], pieces[t].second, k, pieces[t].zero_second);
#else
            expand(f[t], pieces[t].first, k, IN_PLACE ? 0 : MIDDLE);
            expand(g[t], pieces[t].second, k, IN_PLACE ? 0 : MIDDLE);
#endif
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int token = min(n * 8 + (lane >> 2), s.tokens - 1);  // columns of tokens that are not there are never stored
            const uint4 x = *(const uint4 *)(from + token * s.pitch + k * 32);  // in the order stage() left it
#pragma unroll
            for (int t = 0; t < TALL; t++) {
                mma(part[t][n], f[t][0], g[t][0], f[t][1], g[t][1], x.x, x.y);
                mma(NT * TALL == 1 ? half : part[t][n], f[t][2], g[t][2], f[t][3], g[t][3], x.z, x.w);
            }
        }
    }
    if (NT * TALL == 1)
#pragma unroll
        for (int i = 0; i < 4; i++) part[0][0][i] += half[i];
#if IN_PLACE
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float *o = offsets + (col / 128 * NT * 8 + n * 8 + (lane & 3) * 2) * SUMS;
#if ZEROS
        const float4 v = *(const float4 *)o;
#pragma unroll
        for (int t = 0; t < TALL; t++) {
            const float first = pieces[t].zero_first, second = pieces[t].zero_second;
            part[t][n][0] -= v.x + first * v.y, part[t][n][1] -= v.z + first * v.w;
            part[t][n][2] -= v.x + second * v.y, part[t][n][3] -= v.z + second * v.w;
        }
#else
        const float2 v = *(const float2 *)o;
#pragma unroll
        for (int t = 0; t < TALL; t++) part[t][n][0] -= v.x, part[t][n][1] -= v.y, part[t][n][2] -= v.x, part[t][n][3] -= v.y;
#endif
    }
#endif
#if !WHOLE_ROW
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float first = pieces[t].scale_first, second = pieces[t].scale_second;
            acc[t][n][0] += first * part[t][n][0], acc[t][n][1] += first * part[t][n][1];
            acc[t][n][2] += second * part[t][n][2], acc[t][n][3] += second * part[t][n][3];
        }
#endif
#else
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int token = min(n * 8 + (lane >> 2), s.tokens - 1);
        const uint4 x = *(const uint4 *)(from + token * s.pitch);
#pragma unroll
        for (int t = 0; t < TALL; t++) {
            const uint4 &a = pieces[t].first[0], &b = pieces[t].second[0];
            mma(acc[t][n], a.x, b.x, a.y, b.y, x.x, x.y);
            mma(acc[t][n], a.z, b.z, a.w, b.w, x.z, x.w);
        }
    }
#endif
}

// Where 8 columns lie in shared memory. A lane takes 32 neighbouring columns of up to 4 bits in four loads, twice 16 of
// 8-bit ones in two each; lanes that load together then find theirs side by side.
__device__ __forceinline__ int vector_at(int v) {
#if BITS <= 4
    return (v & ~15) | (v & 3) << 2 | (v >> 2 & 3);
#elif BITS == 8
    return (v & ~7) | (v & 1) << 2 | (v >> 1 & 3);
#else
    return v;
#endif
}

#if IN_PLACE
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 d;
#if HALF
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
    return d;
}

// 2^-e as a pair of 16-bit numbers.
__device__ __forceinline__ u32 inverse_power(int e) { return (HALF ? (15 - e) << 10 : (127 - e) << 7) * 0x00010001u; }
#endif

// 8 columns, vector v of token m, as multiply() wants them; with codes in place also sums of their 128 columns, which 16
// neighbouring lanes have.
__device__ __forceinline__ void put(u16 *xs, float *offsets, int v, int m, uint4 a, const Shape &s) {
#if IN_PLACE
    u32 *each = &a.x;
    float shifted = 0.f, sum = 0.f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int e = place_of((v & 3) * 4 + j);
        each[j] = times(each[j], inverse_power(e));
        const float own = to_float(each[j] & 0xffff) + to_float(each[j] >> 16);
        shifted += own, sum += own * (1 << e);
    }
    const u32 mask = 0xffffu << (threadIdx.x & 16);
#pragma unroll
    for (int d = 8; d; d >>= 1) shifted += __shfl_xor_sync(mask, shifted, d), sum += __shfl_xor_sync(mask, sum, d);
    if ((v & 15) == 0) {
        float *o = offsets + (v / 16 * NT * 8 + m) * SUMS;
        const float more = HALF ? 0.f : OFFSET * shifted;
#if ZEROS
        o[0] = more, o[1] = sum;
#else
        o[0] = more + (1 << (BITS - 1)) * sum;
#endif
    }
#elif BITS == 8 && !(E4M3 && HALF)
    a = make_uint4(__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.x, a.y, 0x7632), __byte_perm(a.z, a.w, 0x5410), __byte_perm(a.z, a.w, 0x7632));
#endif
    *(uint4 *)(xs + m * s.pitch + vector_at(v) * 8) = a;
}

// The norm's weights, asked for before the kernel in front has ended.
struct Norms {
    __device__ __forceinline__ void ask(const float *norm, const Shape &s) const {
#if NORM
        for (int i = threadIdx.x; i * 32 < s.cols; i += MULTIPLIERS) touch(norm + s.first + i * 32);
#endif
    }
};

// x, times the norm's weight where there is one, into shared memory; scales[token] is what its sums are multiplied by, or
// where blocks divide the columns the sum of squares of this block's.
// In bfloat16, whose range is float32's, x * weight is rounded and the inverse root mean square follows after the sum:
// one pass, and nobody waits for the mean. In float16 that product might overflow, so x is normed first, in two passes.
__device__ __forceinline__ void stage(u16 *xs, float *offsets, float *sums, float *scales, const u16 *x, const float *norm, float eps, const Shape &s, const Norms &) {
    int vectors = s.cols / 8, tid = threadIdx.x;
    const bool every = CLUSTER > 1 && NORM && HALF;  // the mean is wanted first, so each block adds up all squares
    const int begin = every ? -s.first / 8 : 0, end = every ? begin + s.stride / 8 : vectors;
#if NORM
    float squares[NT * 8];
#pragma unroll
    for (int m = 0; m < NT * 8; m++) squares[m] = 0.f;
#endif
    norm += s.first, x += s.first;
    for (int v = begin + tid; v < end; v += MULTIPLIERS) {
#if NORM
        float4 w0 = ((const float4 *)norm)[v * 2], w1 = ((const float4 *)norm)[v * 2 + 1];
#endif
#pragma unroll
        for (int m = 0; m < NT * 8; m++) {
            if (m < s.tokens) {
                uint4 a = *(const uint4 *)(x + (size_t)m * s.stride + v * 8);
#if NORM
                float e0 = to_float(a.x & 0xffff), e1 = to_float(a.x >> 16), e2 = to_float(a.y & 0xffff), e3 = to_float(a.y >> 16);
                float e4 = to_float(a.z & 0xffff), e5 = to_float(a.z >> 16), e6 = to_float(a.w & 0xffff), e7 = to_float(a.w >> 16);
                squares[m] += e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3 + e4 * e4 + e5 * e5 + e6 * e6 + e7 * e7;
#if !HALF
                a = make_uint4(pack(e0 * w0.x, e1 * w0.y), pack(e2 * w0.z, e3 * w0.w), pack(e4 * w1.x, e5 * w1.y), pack(e6 * w1.z, e7 * w1.w));
#endif
#endif
                if (NORM && HALF) {
                    if (!every || (v >= 0 && v < vectors)) *(uint4 *)(xs + m * s.pitch + vector_at(v) * 8) = a;
                } else put(xs, offsets, v, m, a, s);
            }
        }
    }
#if NORM
#pragma unroll
    for (int m = 0; m < NT * 8; m++) {
        if (m < s.tokens) {
#pragma unroll
            for (int d = 16; d; d >>= 1) squares[m] += __shfl_xor_sync(~0u, squares[m], d);
            if ((tid & 31) == 0) sums[m * WARPS + (tid >> 5)] = squares[m];
        }
    }
    meet();
    // One warp a token: were every thread to add up all sums, shared memory would be the bottleneck.
    for (int m = tid >> 5; m < s.tokens; m += WARPS) {
        float total = (tid & 31) < WARPS ? sums[m * WARPS + (tid & 31)] : 0.f;
#pragma unroll
        for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
        if ((tid & 31) == 0) scales[m] = CLUSTER > 1 && !HALF ? total : rsqrtf(total / s.stride + eps);  // read when all warps have left their sums
    }
#if HALF
    meet();
    for (int v = tid; v < vectors; v += MULTIPLIERS) {
        float4 w0 = ((const float4 *)norm)[v * 2], w1 = ((const float4 *)norm)[v * 2 + 1];
        for (int m = 0; m < s.tokens; m++) {
            uint4 a = *(const uint4 *)(xs + m * s.pitch + vector_at(v) * 8);
            float k = scales[m];
            a.x = pack(to_float(a.x & 0xffff) * k * w0.x, to_float(a.x >> 16) * k * w0.y);
            a.y = pack(to_float(a.y & 0xffff) * k * w0.z, to_float(a.y >> 16) * k * w0.w);
            a.z = pack(to_float(a.z & 0xffff) * k * w1.x, to_float(a.z >> 16) * k * w1.y);
            a.w = pack(to_float(a.w & 0xffff) * k * w1.z, to_float(a.w >> 16) * k * w1.w);
            put(xs, offsets, v, m, a, s);
        }
    }
    meet();
#endif
#else
    meet();
#endif
}

__device__ __forceinline__ size_t staged_bytes(const Shape &s) { return (size_t)s.tokens * s.pitch * 2; }
