// Items of experts_packed.cu in whole numbers, for few picks of an expert: wgmma of bytes, codes as they lie (bytes.h) by
// digits of x (spread.cu), four columns of the narrow operand for a pick. Sums of 128 columns are exact, and float32 adds them up.
//
// A lane's two neighbouring columns are the two low digits of a pick or, where it is odd, the two high ones: 256 times the
// one and the other is one whole number still. Lanes meet when an item is done.

#include "bytes.h"

#define COUNTS_AT (W_AT + ROWS / 64 * ROOM)  // of a stage: of each tile 16 bytes for each pick

// A step's 32 columns. add 0: d is overwritten.
#if N == 8
#define PRODUCT_OF_BYTES(NUMBERS) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %9, 0;\nwgmma.mma_async.sync.aligned.m64n8k32.s32." NUMBERS " {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p;\n}" \
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#elif N == 16
#define PRODUCT_OF_BYTES(NUMBERS) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\nwgmma.mma_async.sync.aligned.m64n16k32.s32." NUMBERS " {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p;\n}" \
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#else
#define PRODUCT_OF_BYTES(NUMBERS) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\nwgmma.mma_async.sync.aligned.m64n32k32.s32." NUMBERS " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p;\n}" \
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), \
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#endif

// at: the lower half of what `operand` makes, the upper one is always the same.
template <int BITS> __device__ __forceinline__ void multiply_bytes(int (&d)[N / 2], const Fragment &a, u32 at, int add) {
    const u64 b = (operand(0) & ~0xffffffffull) | at;
    if constexpr (BITS == 8) PRODUCT_OF_BYTES("s8.s8");
    else PRODUCT_OF_BYTES("u8.s8");
}

// What a tile's sums are multiplied by, of a lane's two rows, and less; and of its picks what digits count and sums of x.
template <class K> struct Numbers {
    float scale[2], zero[2];
    float2 counts[N / 8];

    __device__ __forceinline__ void clear() {
        scale[0] = scale[1] = zero[0] = zero[1] = 0.f;
#pragma unroll
        for (int n = 0; n < N / 8; n++) counts[n] = make_float2(0.f, 0.f);
    }
    // from: of the tile's counts.
    __device__ __forceinline__ void load(u32 tile, u32 from, int row, int lane) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            constexpr float excess[2] = {excess_of<K::BITS>(0), excess_of<K::BITS>(1)};
            scale[u] = K::number(tile + K::CODES + (row + u * 8) * K::NUMBER) * (1.f / excess[u]);
            if constexpr (K::ZEROS) zero[u] = K::number(tile + K::CODES + (64 + row + u * 8) * K::NUMBER) * excess[u];
            else zero[u] = K::MIDDLE * excess[u];
        }
#pragma unroll
        for (int n = 0; n < N / 8; n++)
            asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(counts[n].x), "=f"(counts[n].y) : "r"(from + (n * 2 + (lane >> 1 & 1)) * 16 + (lane & 1) * 8));
    }
    // A finished product.
    __device__ __forceinline__ void add(float (&d)[N / 4], const int (&part)[N / 2]) const {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            int low, high;
            asm volatile("mov.b32 %0, %1;" : "=r"(low) : "r"(part[i * 2]));  // not before the wait
            asm volatile("mov.b32 %0, %1;" : "=r"(high) : "r"(part[i * 2 + 1]));
            const float sum = (float)(high * 256 + low) * counts[i / 2].x - zero[i & 1] * counts[i / 2].y;
            d[i] += scale[i & 1] * sum;
        }
    }
};

// Sums of an item, as multiply_item in experts_packed.cu: d[2 n + lower row], of pick 2 n + lane / 2 % 2.
template <class K> __device__ __forceinline__ void multiply_item(float (&d)[N / 4], Ring &ring, int steps, int group, int warp, int lane) {
    constexpr int STEPS = Words<K::BITS>::STEPS, BOXES = K::BITS == 3 ? 2 : 1;
    const int upper = (warp * 16) + (lane >> 2), span = max(1, min(SPAN, LIMIT / K::BYTES));
    int part[N / 2];
    Numbers<K> numbers;
    Fragment a[2][4];
    u32 held = 0;
    numbers.clear();
#pragma unroll
    for (int i = 0; i < N / 2; i++) part[i] = 0;
#pragma unroll
    for (int k = 0; k < STEPS; k++) a[1][k][0] = a[1][k][1] = a[1][k][2] = a[1][k][3] = 0;
    for (int step = 0; step < steps;) {
        wait_for(ring.full + ring.slot * 8, ring.turn);
        const int end = min(step + span, steps);
        u32 tile = ring.stage() + W_AT + group * ROOM, counts = ring.stage() + COUNTS_AT, x_at = (u32)operand(ring.stage());
#pragma unroll 1
        for (; step < end; step++, tile += K::BYTES, counts += PICKS * 16, x_at += BOXES * X_BOX / 16) {
            Words<K::BITS> words;
            words.load(tile, 0, warp, lane);
            words.mask(a[0], 0);
            release_steps<STEPS>(a[0]);  // not after the fence
            FINISH(0);
            release_steps<STEPS>(a[1]);
            if (held) release_stage(held), held = 0;
            numbers.add(d, part);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < STEPS; k++) multiply_bytes<K::BITS>(part, a[0][k], x_at + k * 2, k);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            numbers.load(tile, counts, upper, lane);
            words.load(tile, 1, warp, lane);
            words.mask(a[1], 1);
            release_steps<STEPS>(a[1]);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < STEPS; k++) multiply_bytes<K::BITS>(part, a[1][k], x_at + (BOXES == 2 ? X_BOX / 16 : 4) + k * 2, 1);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            FINISH(1);
            release_steps<STEPS>(a[0]);
        }
        held = ring.empty + ring.slot * 8;
        ring.next();
    }
    FINISH(0);
    release_steps<STEPS>(a[1]);
    release_stage(held);
    numbers.add(d, part);
#pragma unroll
    for (int i = 0; i < N / 4; i++) d[i] += __shfl_xor_sync(~0u, d[i], 1);
}
