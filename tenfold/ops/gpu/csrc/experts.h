// What products of experts share: the list of tiles of picks, who computes what, and how sums are stored.
//
// An item is ROWS rows of one expert's weights for one tile of picks; with CLUSTER 2 two blocks take two that follow each
// other and share the picks, of which each fetches half for both: the L2 cache cannot feed large tiles otherwise.
// N, GATE, ROWS as in experts.cu · DOWN: results are multiplied by the weight of the pick and stored by pick, else by place ·
// DIGITS: four columns of N are a pick (experts_digits.h).

#include "cluster.h"

#if DIGITS
#define PICKS (N / 4)  // of a tile
#define SUMS (N / 4)   // of a thread
#else
#define PICKS N
#define SUMS (N / 2)
#endif

#define UNIT (N < 64 ? N : 64)  // picks: what is fetched and multiplied of a tile is whole units

struct Tile {
    int expert, first, end, unused;  // places first to end of picks of one expert

    __device__ __forceinline__ int width() const { return N > UNIT ? (end - first + UNIT - 1) / UNIT * UNIT : N; }
};

// Which items a block takes: so many tiles of picks, so many items for each.
struct Items {
    int deep, pairs, rank, count;

    __device__ __forceinline__ Items(int tiles, int deep) : deep(deep), pairs((deep + CLUSTER - 1) / CLUSTER), rank(blockIdx.x % CLUSTER) { count = tiles * pairs; }
    __device__ __forceinline__ int first() const { return blockIdx.x / CLUSTER; }
    __device__ __forceinline__ int hop() const { return gridDim.x / CLUSTER; }
    __device__ __forceinline__ int tile(int item) const { return item / pairs; }
    __device__ __forceinline__ int row(int item) const { return (item % pairs * CLUSTER + rank) * (GATE ? ROWS / 2 : ROWS); }  // of outputs
};

// All blocks that share picks wait for each other.
__device__ __forceinline__ void meet() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// A tile's picks, its width by 128 bytes, in boxes of UNIT rows: this block's part of each, for all that share it.
__device__ __forceinline__ void fetch_picks(u32 to, const Map *map, int col, const Tile &tile, int rank, u32 barrier, u64 policy) {
#pragma unroll
    for (int at = 0; at < N; at += UNIT) {
        const int begin = at + rank * (UNIT / CLUSTER);
        if (at >= tile.width()) break;
        fetch_for_all(to + begin * 128, map, col, tile.first + begin, barrier, policy);
    }
}

#define HOMES ((PICKS + 127) / 128)     // of a thread
#define TURN (PICKS < 32 ? PICKS : 32)  // picks that are stored in turn
#define ROW_FEATURES (GATE ? 32 : 64)  // of a warpgroup
#define PITCH (ROW_FEATURES * 2 + 16)  // bytes between picks in shared memory
#define STORE_BYTES (PICKS * 8 + TURN * PITCH)  // of a warpgroup

#define GROUP_BARRIER(group) asm volatile("bar.sync %0, 128;" ::"r"((group) + 1) : "memory")

// Where a tile's picks go: a thread of a warpgroup has each 128th. Both are asked for long before they are needed, and so
// that neither waits for the other: where, while the tile before is stored, and its weight when that has been.
struct Homes {
    int at[HOMES];
    float share[HOMES];

    __device__ __forceinline__ void find(const Tile &tile, const int *order) {
#if DOWN
#pragma unroll
        for (int i = 0; i < HOMES; i++) at[i] = __ldg(order + min(tile.first + (int)(threadIdx.x & 127) + i * 128, tile.end - 1));
#endif
    }
    __device__ __forceinline__ void weigh(const float *shares) {
#if DOWN
#pragma unroll
        for (int i = 0; i < HOMES; i++) share[i] = __ldg(shares + at[i]);
#endif
    }
};

// Of two pairs of 16-bit numbers.
__device__ __forceinline__ u32 sum_of(u32 a, u32 b) {
    return pack(to_float(a & 0xffff) + to_float(b & 0xffff), to_float(a >> 16) + to_float(b >> 16));
}

// Words and numbers of shared memory.
__device__ __forceinline__ u32 word_at(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ void store_pair(u32 to, u32 first, u32 second) { asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory"); }
__device__ __forceinline__ void store_number(u32 to, u16 v) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v) : "memory"); }

__device__ __forceinline__ void store_matrices(u32 to, u32 first, u32 second) {
#if GATE
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(first) : "memory");
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
#endif
}

// A warpgroup's sums of its 64 rows and of a tile's picks, as wgmma leaves them, by way of `memory` of STORE_BYTES. feature:
// its first. With a gate the upper eight of a warp's rows are gate and the lower eight up of the same features.
// With digits two lanes have the sums of a pick, and without a gate each stores one row of them. residual: by place, or null.
__device__ __forceinline__ void store_sums(const float (&d)[SUMS], void *out, const Tile &tile, const Homes &homes, u32 memory, int feature, int outputs, const u16 *residual = nullptr) {
    const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, group = threadIdx.x >> 7;
    const u32 rows = memory + PICKS * 8;
#if DOWN
    GROUP_BARRIER(group);  // those of the tile before are still read
#pragma unroll
    for (int i = 0; i < HOMES; i++)
        if (thread + i * 128 < PICKS) store_pair(memory + (thread + i * 128) * 8, (u32)homes.at[i], __float_as_uint(homes.share[i]));
#endif
#pragma unroll
    for (int turn = 0; turn < PICKS / TURN; turn++) {
        if (turn * TURN >= tile.end - tile.first) break;
        GROUP_BARRIER(group);
#if DIGITS
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            const int pick = n * 2 + (lane >> 1 & 1), lower = lane & 1;
#if GATE
            const float y = round_trip(activate(round_trip(d[n * 2]))) * round_trip(d[n * 2 + 1]);
            const int row = warp * 8 + (lane >> 2);
#else
            float y = lower ? d[n * 2 + 1] : d[n * 2];
            const int row = warp * 16 + lower * 8 + (lane >> 2);
#if DOWN
            y = round_trip(y) * __uint_as_float(word_at(memory + pick * 8 + 4));
#endif
#endif
            if (!GATE || !lower) store_number(rows + pick * PITCH + row * 2, (u16)pack(y, 0.f));
        }
#else
#pragma unroll
        for (int n = 0; n < TURN / 8; n++) {
            const float *own = d + (turn * TURN / 8 + n) * 4;
            const u32 to = rows + (n * 8 + (lane & 7)) * PITCH + (GATE ? warp * 16 : warp * 32 + (lane >> 3 & 1) * 16);
#if GATE
            float y[2];
#pragma unroll
            for (int t = 0; t < 2; t++) y[t] = round_trip(activate(round_trip(own[t]))) * round_trip(own[2 + t]);
            store_matrices(to, pack(y[0], y[1]), 0);
#elif DOWN
            const u32 own_shares = memory + (turn * TURN + n * 8 + (lane & 3) * 2) * 8 + 4;  // of a lane's two picks
            const float first = __uint_as_float(word_at(own_shares)), second = __uint_as_float(word_at(own_shares + 8));
            store_matrices(to, pack(round_trip(own[0]) * first, round_trip(own[1]) * second), pack(round_trip(own[2]) * first, round_trip(own[3]) * second));
#else
            store_matrices(to, pack(own[0], own[1]), pack(own[2], own[3]));
#endif
        }
#endif
        GROUP_BARRIER(group);
        const int pieces = ROW_FEATURES / 8;  // of 16 bytes, of a pick
#pragma unroll
        for (int i = 0; i < TURN * pieces; i += 128) {
            const int pick = (thread + i) / pieces, piece = (thread + i) % pieces, place = tile.first + turn * TURN + pick;
            if (pick >= TURN || place >= tile.end || feature + piece * 8 >= outputs) continue;
            uint4 v = piece_16(rows + pick * PITCH + piece * 16);
            int at = place;
#if DOWN
            at = (int)word_at(memory + (turn * TURN + pick) * 8);
#endif
            const size_t there = (size_t)at * outputs + feature + piece * 8;
            if (residual) {
                const uint4 r = *(const uint4 *)(residual + there);
                v.x = sum_of(v.x, r.x), v.y = sum_of(v.y, r.y), v.z = sum_of(v.z, r.z), v.w = sum_of(v.w, r.w);
            }
            *(uint4 *)((u16 *)out + there) = v;
        }
    }
}
