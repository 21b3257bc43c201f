// y[tokens, rows] = x[tokens, cols] @ w[rows, cols]^T for up to 64 tokens and packed w (ops/formats.py): codes come
// through the tensor copy engine into a ring in shared memory, as in ring.cu, and become exact 16-bit numbers in the
// registers that wgmma takes its 64-row operand from. A group's sum is scaled in float32, a whole row's at the end.
//
// A lane of wgmma wants columns 2 t and 2 t + 1 of every 8 of a row (t: its place among four). Those four lanes read the
// same 16 bytes, which costs shared memory no more than one of them, and each takes its own out of them; x stays in the
// order in which it came. While a unit of columns is multiplied the next becomes numbers in another buffer.
//
// Many rows share a tile's tokens: of 4-bit codes 64 rows are fewer bytes than 64 tokens, and the L2 cache must deliver
// both. Sums are stored from registers; a lane has 8 rows between its two, or with a gate a row of each half.
//
// Compile-time: HALF, GATE, FLOAT32 as elsewhere · N tokens of the instruction: 8, 16, 32 or 64 · STAGES · BLOCKS of a
// multiprocessor · ROWS of a tile, a multiple of 64 up to 256 · SPLIT as in ring.cu · BITS, E4M3, SCALES, ZEROS, GROUP
// (a multiple of 128) as in codes.h.

#define CONSUMERS (ROWS * 2)  // a warpgroup for 64 rows
#define TRADE (ROWS > 128)  // the warp that brings codes has three idle ones beside it, which give their registers to the others
#define THREADS (CONSUMERS + (TRADE ? 128 : 32))
#define STEP_COLS (1024 / BITS)  // of a stage: 128 bytes of a row
#define FRAGMENTS (N == 64 && BITS == 8 || N == 32 && ROWS == 256 ? 2 : 4)  // of 16 columns in a unit, as registers allow
#define UNIT_COLS (FRAGMENTS * 16)
#define UNITS (STEP_COLS / UNIT_COLS)
#define SPANS (STEP_COLS / 128)  // of columns with one scale
#define PARTS (SPANS == 2 && N <= (ROWS == 256 ? 16 : 32) ? 2 : 1)  // sums of spans, in turn: the second need not wait for the first
#define W_BYTES (ROWS * 128)
#define X_BOX (N * 128)
#define STAGE_BYTES (W_BYTES + STEP_COLS / 64 * X_BOX)
#define LOWER (GATE ? ROWS * 64 : 1024)  // bytes between the codes of a lane's two rows

#include "fragments.h"
#include "hopper.h"
#include "codes.h"
#include "registers.h"
#include "deal.h"

// What a lane of place t takes of 8 columns: nibbles t and t + 4 of a word, or bytes 2 t and 2 t + 1 of two.
__device__ __forceinline__ u32 own_place(int t) {
#if BITS == 4
    return 4 * t;
#elif E4M3 && HALF
    return 2 * t | (2 * t + 1) << 4;
#else
    return 2 * t | 2 * t << 4 | (2 * t + 1) << 8 | (2 * t + 1) << 12;  // each byte at both ends of 16 bits
#endif
}

#if BITS == 4
__device__ __forceinline__ u32 pair(u32 word, u32 place, u32 zero) { return whole(word >> place, zero); }
#else
__device__ __forceinline__ u32 pair(u32 first, u32 second, u32 place, u32 zero) {
    const u32 own = __byte_perm(first, second, place);
#if E4M3 && HALF
    return eighths(own);
#elif E4M3
    return eighths(own, own >> 4);
#else
    return whole(own, zero);
#endif
}
#endif

// A unit of a lane's two rows. at: of its upper row in the stage, with the row's swizzle in the bits of a 16-byte
// piece; unit: which columns.
__device__ __forceinline__ void convert(Fragment (&a)[FRAGMENTS], u32 at, int unit, u32 place, u32 zero_upper, u32 zero_lower) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS * BITS / 8; i++) {
        const u32 piece = at ^ (unit * (FRAGMENTS * BITS / 8) + i) * 16;
        const uint4 u = piece_16(piece), l = piece_16(piece + LOWER);
#if BITS == 4
        Fragment &f = a[2 * i], &g = a[2 * i + 1];
        f[0] = pair(u.x, place, zero_upper), f[1] = pair(l.x, place, zero_lower), f[2] = pair(u.y, place, zero_upper), f[3] = pair(l.y, place, zero_lower);
        g[0] = pair(u.z, place, zero_upper), g[1] = pair(l.z, place, zero_lower), g[2] = pair(u.w, place, zero_upper), g[3] = pair(l.w, place, zero_lower);
#else
        Fragment &f = a[i];
        f[0] = pair(u.x, u.y, place, zero_upper), f[1] = pair(l.x, l.y, place, zero_lower);
        f[2] = pair(u.z, u.w, place, zero_upper), f[3] = pair(l.z, l.w, place, zero_lower);
#endif
    }
}

// Scales and zeros of a lane's two rows for 128 columns, as they are stored.
struct Span {
#if !WHOLE_ROW
    Stored upper, lower;
#endif
#if ZEROS
    Stored zero_upper, zero_lower;
#endif

    // above, below: the rows' first numbers.
    __device__ __forceinline__ void load(const void *scales, const void *zeros, int above, int below, int at, int groups) {
        const int group = min(at / (GROUP / 128), groups - 1);
        above += group, below += group;
#if !WHOLE_ROW
        upper = __ldg((const Stored *)scales + above), lower = __ldg((const Stored *)scales + below);
#endif
#if ZEROS
        zero_upper = __ldg((const Stored *)zeros + above), zero_lower = __ldg((const Stored *)zeros + below);
#endif
    }
};

#if ZEROS
__device__ __forceinline__ u32 zero_pair(Stored zero) {
    const float f = value(zero);
    return pack(f, f);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
ring_packed(const __grid_constant__ Map w_map, const __grid_constant__ Map x_map, const void *scales, const void *zeros, void *out, const float *bias, const u16 *residual, float4 *slots, int *counters, int tokens, int rows, int cols) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    const int steps = (cols + STEP_COLS - 1) / STEP_COLS;
    u64 *barriers = (u64 *)(memory + STAGES * STAGE_BYTES);
    const u32 full = shared_address(barriers), empty = full + STAGES * 8, stage0 = shared_address(memory);
#if GATE
    const int height = ROWS / 2, outputs = rows / 2;
#else
    const int height = ROWS, outputs = rows;
#endif
    const int tiles = (outputs + height - 1) / height;
#if SPLIT
    int *last = (int *)(barriers + 2 * STAGES);
    const Deal deal = {steps, tiles * steps};
    const int first = deal.begin(blockIdx.x), mine = deal.begin(blockIdx.x + 1) - first;
    const int first_tile = first / steps, first_step = first % steps, hop = 1;
#else
    const int mine = blockIdx.x < tiles ? ((tiles - 1 - blockIdx.x) / gridDim.x + 1) * steps : 0;
    const int first_tile = blockIdx.x, first_step = 0, hop = gridDim.x;
#endif

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == CONSUMERS) know_map(&w_map), know_map(&x_map), begin_ring(full, empty, STAGES, CONSUMERS / 32);
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
#if TRADE
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
        if (threadIdx.x == CONSUMERS) {
            u64 once, kept;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
            auto step_of = [&](int at) { return (first_step + at) % steps; };
            auto weights = [&](int at) {
                const int byte = step_of(at) * 128, row = (first_tile + (first_step + at) / steps * hop) * height;
                const u32 to = stage0 + at % STAGES * STAGE_BYTES, barrier = full + at % STAGES * 8;
                expect(barrier, STAGE_BYTES);
                fetch(to, &w_map, byte, row, barrier, once);
#if GATE
                fetch(to + W_BYTES / 2, &w_map, byte, outputs + row, barrier, once);
#endif
            };
            auto inputs = [&](int at) {
                const u32 to = stage0 + at % STAGES * STAGE_BYTES + W_BYTES, barrier = full + at % STAGES * 8;
#pragma unroll
                for (int u = 0; u < STEP_COLS / 64; u++) fetch(to + u * X_BOX, &x_map, step_of(at) * STEP_COLS + u * 64, 0, barrier, kept);
            };
            int count = 0;
            for (; count < mine && count < STAGES; count++) weights(count);
            asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
            for (int at = 0; at < count; at++) inputs(at);
#pragma unroll 1
            for (; count < mine; count++) {
                wait_for(empty + count % STAGES * 8, (count / STAGES - 1) & 1);
                weights(count);
                inputs(count);
            }
        }
        return;
    }

#if TRADE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ROWS == 192 ? 160 : 112));
#endif
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2;
    const int groups = WHOLE_ROW ? 1 : (cols - 1) / GROUP + 1;
#if GATE
    const int own = warp * 8 + g;  // a lane's upper row of a tile, and what it is the output of
#else
    const int own = warp * 16 + g;
#endif
    auto upper_row = [&](int tile) { return min(tile * height + own, outputs - 1); };
    auto lower_row = [&](int tile) { return GATE ? outputs + min(tile * height + own, outputs - 1) : min(tile * height + own + 8, rows - 1); };
    const u32 codes_at = own * 128 + g * 16, place = own_place(lane & 3);

    int tile = first_tile, step = first_step, slot = 0, turn = 0;
    Span next;
#if ZEROS
    u32 zero_upper, zero_lower;
#else
    const u32 zero_upper = MIDDLE, zero_lower = MIDDLE;
#endif
    int above = upper_row(tile) * groups, below = lower_row(tile) * groups;
    next.load(scales, zeros, above, below, step * SPANS, groups);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Fragment a[2][FRAGMENTS];
#pragma unroll
    for (int k = 0; k < FRAGMENTS; k++) a[1][k][0] = a[1][k][1] = a[1][k][2] = a[1][k][3] = 0;
    for (int count = 0; count < mine; tile += hop, step = 0) {
        const int end = min(mine, count + steps - step);
        float d[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] = 0.f;
#if WHOLE_ROW
        float (&part)[1][N / 2] = *(float (*)[1][N / 2])d;
        const float row_upper = number(scales, upper_row(tile)), row_lower = number(scales, lower_row(tile));
#else
        float part[PARTS][N / 2], scale_upper = 0.f, scale_lower = 0.f, following_upper, following_lower;  // of the group under way, and after
#pragma unroll
        for (int i = 0; i < N / 2; i++) part[PARTS - 1][i] = 0.f;
#endif
        u32 held = 0;  // barrier of the stage that is still read
        for (; count < end; count++, step++) {
            const u32 stage = stage0 + slot * STAGE_BYTES;
            const u64 x_at = operand(stage + W_BYTES);  // counts in 16 bytes
            wait_for(full + slot * 8, turn);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const bool begins = u * UNIT_COLS % 128 == 0;
                const int now = WHOLE_ROW ? 0 : u * UNIT_COLS / 128 % PARTS;
                if (begins) {
#if !WHOLE_ROW
                    following_upper = value(next.upper), following_lower = value(next.lower);
#endif
#if ZEROS
                    zero_upper = zero_pair(next.zero_upper), zero_lower = zero_pair(next.zero_lower);
#endif
                    int at = step * SPANS + u * UNIT_COLS / 128 + 1;
                    if (u + 128 / UNIT_COLS == UNITS && step + 1 == steps) at = 0, above = upper_row(tile + hop) * groups, below = lower_row(tile + hop) * groups;
                    next.load(scales, zeros, above, below, at, groups);
                }
                convert(a[u & 1], stage + codes_at, u, place, zero_upper, zero_lower);
#if !WHOLE_ROW
                if (begins && (PARTS == 1 || u == 0)) {
                    FINISH(0);
                    add_part(d, part[PARTS - 1], scale_upper, scale_lower);
                }
#endif
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int k = 0; k < FRAGMENTS; k++) {
                    const int col = u * UNIT_COLS + k * 16;
                    multiply(part[now], a[u & 1][k], x_at + (col / 64 * X_BOX + col % 64 * 2) / 16, WHOLE_ROW || col % 128);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                FINISH(1);
                release(a[~u & 1]);
#if !WHOLE_ROW
                if (begins) {
                    if (PARTS == 2 && u) add_part(d, part[0], scale_upper, scale_lower);
                    scale_upper = following_upper, scale_lower = following_lower;
                }
#endif
                if (u == 0 && held && lane == 0) arrive(held);
            }
            held = empty + slot * 8;
            if (++slot == STAGES) slot = 0, turn ^= 1;
        }
        FINISH(0);
        release(a[1]);
        if (lane == 0) arrive(held);
#if WHOLE_ROW
#pragma unroll
        for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(d[i])::"memory");
#else
        add_part(d, part[PARTS - 1], scale_upper, scale_lower);
#endif
#if SPLIT
        if (!meet(d, deal, tile, slots, counters, last)) continue;
#endif
#if WHOLE_ROW
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] *= i & 2 ? row_lower : row_upper;
#endif
        if (bias) {
            const float upper = bias[upper_row(tile)], lower = bias[lower_row(tile)];
#pragma unroll
            for (int i = 0; i < N / 2; i++) d[i] += i & 2 ? lower : upper;
        }
        // Sum i is of a token and of the lane's upper row, or of its lower one where i & 2.
        int token = (lane & 3) * 2, row = tile * height + own;
        asm volatile("" : "+r"(token), "+r"(row));  // else all addresses are kept in registers while tiles are multiplied
        auto stored = [&](int i) { return i / 4 * 8 + token + (i & 1) < tokens && row + (i & 2) * 4 < outputs; };
        auto place_of = [&](int i) { return (size_t)(i / 4 * 8 + token + (i & 1)) * outputs + row + (i & 2) * 4; };
#if GATE
#pragma unroll
        for (int i = 0; i < N / 2; i += i & 1 ? 3 : 1) d[i] = round_trip(activate(round_trip(d[i]))) * round_trip(d[i + 2]);
#endif
        if (residual) {
            u16 added[N / 2];  // all are under way before the first is used
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                if (!(GATE && i & 2)) added[i] = stored(i) ? residual[place_of(i)] : 0;
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                if (!(GATE && i & 2)) d[i] = round_trip(d[i]) + to_float(added[i]);
        }
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            if (!(GATE && i & 2) && stored(i)) store(out, place_of(i), d[i]);
    }
}
