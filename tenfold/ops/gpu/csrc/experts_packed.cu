// Products of experts whose weights lie in tiles of packed formats (ops/tiles.py), each expert's in its own, all in one
// launch: as experts.cu, with a micro-kernel for each kind of tile, chosen item by item.
//
// Tiles of one row of tiles follow each other in memory, codes and scales together, so plain copies keep the ring full,
// several tiles a stage where they are small. Codes become exact 16-bit numbers in the registers that wgmma takes its
// 64-row operand from; a tile's sum is scaled in float32. While 64 columns are multiplied the next become numbers.
//
// Kinds with ACTS8 take float8 codes, or signs and magnitudes of 4 bits, which a mask makes the smallest numbers of float8,
// and picks as float8 with a scale each, whose columns lie
// as the codes of a lane do: of every 16, number 4 t + 2 c + h is column 2 t + 8 h + c.
//
// The warp that fills the ring tells the others with each stage of what kind it is.
//
// DIGITS: a pick is four rows of digits, and products are those of experts_digits.h, for kinds of whole numbers without
// acts8. The kernel in front lets this one begin when all before it is done, so weights come while that still runs.
//
// Compile-time: HALF, GATE, FLOAT32, N (8 to 64, 128, 192), ROWS (64 to 256), STAGES, BLOCKS, CLUSTER, DOWN as in experts.cu
// · SPAN tiles at most in a stage, of LIMIT bytes where there are several · ROOM bytes for a warpgroup's tiles in a stage ·
// X_BOXES that a tile takes at most: 1 where all kinds have acts8, or digits of one order, else 2 · KINDS kinds, K0 to K7:
// name + 7 zeros + 14 scales + 42 acts8, as ops/tiles.py counts them · ACTS8S: a bit for each kind with acts8 · DIGITS, then
// N 8 to 32, CLUSTER 1, and PAIRS: a bit for each kind that takes digits in the order of pairs, THIRDS: and the one behind
// it, too · WITH_BYTES: there is an order before those (spread.h).

#ifndef DIGITS
#define DIGITS 0
#endif
#include "fragments.h"
#include "halves.h"
#include "hopper.h"
#include "numbers.h"
#include "registers.h"
#include "experts.h"

#define CONSUMERS (ROWS * 2)  // a warpgroup for 64 rows
#define TRADE (N >= 64 && BLOCKS == 1)  // the warp that brings tiles has three idle ones beside it, which give their registers to the others
#define THREADS (CONSUMERS + (TRADE ? 128 : 32))
#define X_BOX (N * 128)  // of 64 columns, or 128 in 8 bits
#define W_AT (SPAN * X_BOXES * X_BOX)  // where a stage's tiles begin
#define COUNTS_BYTES (DIGITS ? SPAN * PICKS * 16 : 0)
#define STAGE_BYTES ((W_AT + ROWS / 64 * ROOM + COUNTS_BYTES + 1023) / 1024 * 1024)
#define EARLY (DOWN || DIGITS)  // weights may come before the kernel in front has ended

struct Source { u64 address; int kind, bytes; };  // of an expert: its first tile, which of KINDS, and bytes of a tile
struct Stage { int kind, unused; };  // what the others must know

__device__ __forceinline__ int span_of(int bytes) { return max(1, min(SPAN, LIMIT / bytes)); }

__device__ __forceinline__ uint2 piece_8(u32 at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}

template <int ID> struct Kind {
    static constexpr int NAME = ID % 7, ZEROS = ID / 7 % 2, SCALES = ID / 14 % 3, ACTS8 = ID / 42, SIGNS = NAME == 6;
    static constexpr int BITS = NAME == 0 ? 16 : NAME <= 3 ? NAME + 1 : SIGNS ? 4 : 8;
    static constexpr int CODES = 64 * 128 / 8 * BITS, NUMBER = SCALES == 2 ? 4 : 2;  // bytes
    static constexpr int BYTES = CODES + (NAME ? 64 * NUMBER * (1 + ZEROS) : 0);
    static constexpr int MIDDLE = NAME == 1 ? 2 : NAME == 2 ? 4 : NAME == 3 ? 8 : 0;

    static __device__ __forceinline__ float number(u32 at) {
        float f;
        if constexpr (SCALES == 2) {
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(at));
        } else {
            u16 stored;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(stored) : "r"(at));
            f = SCALES == 1 ? half_to_float(stored) : __uint_as_float((u32)stored << 16);
        }
        return f;
    }

    // A row's scale, and its zero. Magnitudes as float8 are 512 times too small.
    static __device__ __forceinline__ float scale(u32 tile, int row) {
        if constexpr (NAME == 0) return 1.f;
        return number(tile + CODES + row * NUMBER) * (ACTS8 && BITS == 4 ? 512.f : 1.f);
    }
    static __device__ __forceinline__ u32 zero(u32 tile, int row) {
        if constexpr (ZEROS) {
            const float f = number(tile + CODES + (64 + row) * NUMBER);
            return pack(f, f);
        }
        return pack(OFFSET + MIDDLE, OFFSET + MIDDLE);
    }
};

// A lane's codes of a tile, and its 64 columns `unit` as numbers. warp: of the warpgroup.
template <class K> struct Codes {
    u32 words[K::BITS <= 3 ? 2 * K::BITS : 1];

    __device__ __forceinline__ void load(u32 tile, int warp, int lane) {
        if constexpr (K::BITS <= 3) {
            const uint4 v = piece_16(tile + warp * 512 + lane * 16);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
            if constexpr (K::BITS == 3) {
                const uint2 u = piece_8(tile + 2048 + warp * 256 + lane * 8);
                words[4] = u.x, words[5] = u.y;
            }
        }
    }

    __device__ __forceinline__ void convert(Fragment (&a)[4], u32 tile, int unit, int warp, int lane, u32 zero_upper, u32 zero_lower) {
        if constexpr (K::BITS <= 3) {
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    u32 number = pick(words[unit * 2 + k / 2] >> ((k & 1) * 4 + r) * 2, 0x00030003u, MAGIC);
                    if constexpr (K::BITS == 3) {
                        const int at = k * 4 + r;
                        const u32 high = words[4 + unit];
                        number = pick(at < 2 ? high << (2 - at) : high >> (at - 2), 0x00040004u, number);
                    }
                    a[k][r] = less(number, r & 1 ? zero_lower : zero_upper);
                }
        } else if constexpr (K::SIGNS) {
            const uint4 v = piece_16(tile + (warp * 2 + unit) * 512 + lane * 16);
            const u32 each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const u32 word = r & 1 ? __funnelshift_r(each[k], each[k], 4) : each[k];
                    const u32 magnitude = minus(pick(word >> (r & 2) * 4, 0x00070007u, MAGIC), MAGIC);
                    a[k][r] = (r & 2 ? word : word << 8) & 0x80008000u ^ magnitude;
                }
        } else if constexpr (K::BITS == 4) {
            const uint4 v = piece_16(tile + (warp * 2 + unit) * 512 + lane * 16);
            const u32 each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int r = 0; r < 4; r++) a[k][r] = less(pick(each[k] >> 4 * r, 0x000f000fu, MAGIC), r & 1 ? zero_lower : zero_upper);
        } else if constexpr (K::BITS == 8) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 v = piece_16(tile + (warp * 4 + unit * 2 + i) * 512 + lane * 16);
                const u32 each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 2; k++)
#pragma unroll
                    for (int r = 0; r < 4; r++) a[i * 2 + k][r] = pair(each[k * 2 + (r & 1)], r >> 1, r & 1 ? zero_lower : zero_upper);
            }
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const uint4 v = piece_16(tile + (warp * 8 + unit * 4 + k) * 512 + lane * 16);
                a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
            }
        }
    }

    // Codes behind OFFSET, less that and their zero, which is a fraction where groups have one.
    static __device__ __forceinline__ u32 less(u32 number, u32 zero) {
        return K::ZEROS ? minus(minus(number, MAGIC), zero) : minus(number, zero);
    }

    // Bytes `half` and half + 2 of a word of 8-bit codes.
    static __device__ __forceinline__ u32 pair(u32 word, int half, u32 zero) {
        if constexpr (K::NAME == 5) {
#if HALF
            return eighths(__byte_perm(word, 0, half ? 0x31 : 0x20));
#else
            const u32 high = half ? word : word << 8;
            return eighths(high, high >> 4);
#endif
        } else {
            return signed_bytes<K::ZEROS>(half ? word >> 8 : word, zero);
        }
    }

    // All of a tile's columns as float8, whose smallest numbers are three bits and a sign.
    static __device__ __forceinline__ void convert_8(Fragment (&a)[4], u32 tile, int warp, int lane) {
        if constexpr (K::BITS == 8) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 v = piece_16(tile + (warp * 4 + i) * 512 + lane * 16);
                a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 v = piece_16(tile + (warp * 2 + i) * 512 + lane * 16);
                const u32 each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    a[i * 2 + k / 2][k % 2 * 2] = each[k] & 0x87878787u;
                    a[i * 2 + k / 2][k % 2 * 2 + 1] = __funnelshift_r(each[k], each[k], 4) & 0x87878787u;
                }
            }
        }
    }
};

// The ring as the warps that multiply see it.
struct Ring {
    u32 full, empty, stages;
    int slot, turn;

    __device__ __forceinline__ u32 stage() const { return stages + slot * STAGE_BYTES; }
    __device__ __forceinline__ void next() { if (++slot == STAGES) slot = 0, turn ^= 1; }
};

// Sums of an item: a warpgroup's 64 rows, of which `group` counts. steps: tiles of a row.
#if DIGITS
#include "experts_digits.h"
#else
template <class K> __device__ __forceinline__ void multiply_item(float (&d)[N / 2], Ring &ring, int steps, int group, int warp, int lane) {
    const int upper = (warp * 16) + (lane >> 2), span = max(1, min(SPAN, LIMIT / K::BYTES));
    float part[N / 2], scale_upper = 0.f, scale_lower = 0.f;
    Fragment a[2][4];
    u32 held = 0;
    int step = 0, b = 0, count = 0;  // of tiles of a row, and within a stage
#pragma unroll
    for (int i = 0; i < N / 2; i++) part[i] = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++) a[1][k][0] = a[1][k][1] = a[1][k][2] = a[1][k][3] = 0;

    constexpr int TWICE = N < 192;  // registers for the next tile in 8 bits while the one before is multiplied

    // Where the next tile lies, once it is there.
    auto enter = [&] {
        if (b == 0) {
            wait_for(ring.full + ring.slot * 8, ring.turn);
            count = min(span, steps - step);
        }
        return ring.stage() + W_AT + group * ROOM + b * K::BYTES;
    };
    // The product of the tile before, which read `before`, is waited for and added up.
    auto take = [&](Fragment (&before)[4]) {
        FINISH(0);
        release(before);
        if (held) release_stage(held), held = 0;
        add_part(d, part, scale_upper, scale_lower);
    };
    // Whether there is a further tile.
    auto leave = [&](float next_upper, float next_lower) {
        scale_upper = next_upper, scale_lower = next_lower;
        if (++b == count) {
            held = ring.empty + ring.slot * 8;
            ring.next();
            b = 0;
        }
        return ++step < steps;
    };
    auto eight = [&](Fragment (&now)[4], Fragment (&before)[4]) {
        const u32 tile = enter();
        const float next_upper = K::scale(tile, upper), next_lower = K::scale(tile, upper + 8);
        const u64 x_at = operand(ring.stage() + b * X_BOX);
        if constexpr (TWICE) Codes<K>::convert_8(now, tile, warp, lane);
        take(before);
        if constexpr (!TWICE) Codes<K>::convert_8(now, tile, warp, lane);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; k++) multiply_8(part, now[k], x_at + k * 2, k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        return leave(next_upper, next_lower);
    };
    auto sixteen = [&] {
        const u32 tile = enter();
        const float next_upper = K::scale(tile, upper), next_lower = K::scale(tile, upper + 8);
        const u32 zero_upper = K::zero(tile, upper), zero_lower = K::zero(tile, upper + 8);
        const u64 x_at = operand(ring.stage() + b * 2 * X_BOX);
        Codes<K> codes;
        codes.load(tile, warp, lane);
        codes.convert(a[0], tile, 0, warp, lane, zero_upper, zero_lower);
        take(a[1]);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; k++) multiply(part, a[0][k], x_at + k * 2, k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        codes.convert(a[1], tile, 1, warp, lane, zero_upper, zero_lower);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; k++) multiply(part, a[1][k], x_at + X_BOX / 16 + k * 2, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        FINISH(1);
        release(a[0]);
        return leave(next_upper, next_lower);
    };

    if constexpr (K::ACTS8) {
        while (eight(a[0], a[TWICE]) && eight(a[TWICE], a[0])) {}
    } else {
#pragma unroll 1
        while (sixteen()) {}
    }
    FINISH(0);
    release(a[0]);
    release(a[1]);
    release_stage(held);
    add_part(d, part, scale_upper, scale_lower);
}
#endif

// Where the warp that fills the ring is: the tiles of a stage, item after item, and the stage they go to. It is one thread
// that all others wait for, so it counts, and asks for a tile of picks an item ahead.
struct Walk {
    const Tile *list;
    const Source *sources;
    const Items &items;
    int steps, down, item, step, count, slot, turn;  // down: rows of tiles that an expert has
    Tile tile, ahead;
    Source source;
    u64 from;           // what the first warpgroup's tiles of the stage are copied from
    int own, due;       // warpgroups that have tiles; bytes of a tile of all of them, and of its picks

    __device__ __forceinline__ Walk(const Tile *list, const Source *sources, const Items &items, int steps, int down) : list(list), sources(sources), items(items), steps(steps), down(down), item(items.first()), slot(0), turn(0) { ahead = look(item), begin(); }
    __device__ __forceinline__ bool more() const { return item < items.count; }
    __device__ __forceinline__ Tile look(int at) const { return at < items.count ? list[items.tile(at)] : Tile(); }
    __device__ __forceinline__ bool acts8() const { return ACTS8S >> source.kind & 1; }
#if DIGITS
    __device__ __forceinline__ int boxes() const { return THIRDS >> source.kind & 1 ? 2 : 1; }
#else
    __device__ __forceinline__ int boxes() const { return acts8() ? 1 : 2; }
#endif
    __device__ __forceinline__ void begin() {
        tile = ahead, source = sources[tile.expert], ahead = look(item + items.hop());
        const int first = items.row(item) / ROW_FEATURES;
        step = 0, count = SPAN == 1 ? 1 : min(span_of(source.bytes), steps);
        own = max(0, min(ROWS / 64, down - first)), from = source.address + (u64)(first * steps) * source.bytes;
        due = own * source.bytes + boxes() * tile.width() * 128 + (DIGITS ? PICKS * 16 : 0);
    }
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, turn ^= 1;
        step += count, from += count * source.bytes;
        if (step == steps) item += items.hop(), begin();
        else if (SPAN > 1) count = min(count, steps - step);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
experts_packed(const __grid_constant__ Map x_map, const __grid_constant__ Map x8_map, const float *x8_scales, const Source *sources, void *out, const Tile *list, const int *listed, const int *order, const float *shares, int rows, int cols
#if DIGITS
    , const float4 *counts, int room
#endif
) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    const u32 store_at = shared_address(memory + STAGES * STAGE_BYTES);
    u64 *barriers = (u64 *)(memory + STAGES * STAGE_BYTES + ROWS / 64 * STORE_BYTES);
    volatile Stage *told = (volatile Stage *)(barriers + 2 * STAGES);
    const u32 full = shared_address(barriers), empty = full + STAGES * 8, stage0 = shared_address(memory);
    const int outputs = GATE ? rows / 2 : rows, height = GATE ? ROWS / 2 : ROWS;
    const int steps = (cols + 127) / 128, deep = (outputs + height - 1) / height, down = (outputs * (GATE ? 2 : 1) + 63) / 64;

    if (threadIdx.x == CONSUMERS) begin_ring(full, empty, STAGES, CLUSTER * CONSUMERS / 32);
    meet();
#if !EARLY
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const Items items(*(volatile const int *)listed, deep);

    if (threadIdx.x >= CONSUMERS) {
#if TRADE
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
        if (threadIdx.x == CONSUMERS) {
            u64 once, kept;
            asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
            asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
            const u64 policy = N <= 64 ? once : kept;  // large tiles read an expert's weights again
            auto weights = [&](const Walk &at) {
                const u32 to = stage0 + at.slot * STAGE_BYTES + W_AT, barrier = full + at.slot * 8;
                told[at.slot].kind = at.source.kind;
                expect(barrier, at.count * at.due);
#pragma unroll
                for (int group = 0; group < ROWS / 64; group++)
                    if (group < at.own) copy_row(to + group * ROOM, (const void *)(at.from + (u64)group * (steps * at.source.bytes)), at.count * at.source.bytes, barrier, policy);
            };
            auto inputs = [&](const Walk &at) {
                const u32 to = stage0 + at.slot * STAGE_BYTES, barrier = full + at.slot * 8;
#if DIGITS
                const int order = PAIRS >> at.source.kind & 1 ? WITH_BYTES : 0, boxes = at.boxes();
                for (int b = 0; b < at.count; b++) {
                    const int step = at.step + b;
                    for (int i = 0; i < boxes; i++) fetch(to + (b * boxes + i) * X_BOX, &x_map, ((order + i) * steps + step) * 128, at.tile.first * 4, barrier, kept);
                    copy_row(to + COUNTS_AT + b * PICKS * 16, counts + (size_t)step * room + at.tile.first, PICKS * 16, barrier, kept);
                }
#else
                if (at.acts8()) {
                    for (int b = 0; b < at.count; b++) fetch_picks(to + b * X_BOX, &x8_map, (at.step + b) * 128, at.tile, items.rank, barrier, kept);
                } else {
                    for (int b = 0; b < 2 * at.count; b++) fetch_picks(to + b * X_BOX, &x_map, at.step * 128 + b * 64, at.tile, items.rank, barrier, kept);
                }
#endif
            };
            Walk at(list, sources, items, steps, down);
#if EARLY
            Walk behind = at;
            int count = 0;
            for (; count < STAGES && at.more(); count++, at.next()) weights(at);
            asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
            for (; count; count--, behind.next()) inputs(behind);
#else
            asm volatile("fence.proxy.async;" ::: "memory");
#endif
            for (; at.more(); at.next()) {
                wait_for(empty + at.slot * 8, at.turn ^ 1);  // which a stage that nothing has filled yet passes
                weights(at);
                inputs(at);
            }
        }
        return;
    }

#if TRADE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ROWS <= 128 ? 240 : ROWS == 192 ? 160 : 112));
#endif
#if EARLY
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2;
    Ring ring = {full, empty, stage0, 0, 0};
    Tile tile = {};
    Homes homes = {};
    if (items.first() < items.count) tile = list[items.tile(items.first())], homes.find(tile, order), homes.weigh(shares);
    for (int item = items.first(); item < items.count; item += items.hop()) {
        Tile ahead = tile;  // of the next item, so that no one waits for it
        if (item + items.hop() < items.count) ahead = list[items.tile(item + items.hop())];
        float d[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; i++) d[i] = 0.f;
        wait_for(full + ring.slot * 8, ring.turn);
        const int kind = told[ring.slot].kind;
        switch (kind) {
#define CASE(I, ID) case I: multiply_item<Kind<ID>>(d, ring, steps, group, warp & 3, lane); break;
            CASE(0, K0)
#if KINDS > 1
            CASE(1, K1)
#endif
#if KINDS > 2
            CASE(2, K2)
#endif
#if KINDS > 3
            CASE(3, K3)
#endif
#if KINDS > 4
            CASE(4, K4)
#endif
#if KINDS > 5
            CASE(5, K5)
#endif
#if KINDS > 6
            CASE(6, K6)
#endif
#if KINDS > 7
            CASE(7, K7)
#endif
        }
#if !DIGITS
        if (ACTS8S >> kind & 1) {
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                const int at = tile.first + n * 8 + (lane & 3) * 2;
                const float first = x8_scales[min(at, tile.end - 1)], second = x8_scales[min(at + 1, tile.end - 1)];
                d[n * 4] *= first, d[n * 4 + 1] *= second, d[n * 4 + 2] *= first, d[n * 4 + 3] *= second;
            }
        }
#endif
        Homes next = {};
        next.find(ahead, order);
        store_sums(d, out, tile, homes, store_at + group * STORE_BYTES, items.row(item) + group * ROW_FEATURES, outputs);
        next.weigh(shares);
        tile = ahead, homes = next;
    }
    meet_cluster();
}
