// What bulk.cu needs where CLUSTER blocks divide the columns of a product: who has which, and how their sums meet.
//
// Blocks of a cluster take the same tiles, each by its own share of the columns: it makes digits of, or stages, that part of
// x alone, and has a ring of its own. Its storing warp adds up what its warps leave of a tile and, where another block
// stores that tile, sends the sum there; blocks store tiles in turn, adding up shares in the order of the columns. Nobody
// but storing warps waits for another block. With a norm that comes after the sums, sums of squares go along.
//
// Shares are of whole UNITs, so that they begin where copies may, and may differ by one.

#define HOP (gridDim.x / CLUSTER)
#define FIRST_TILE ((int)blockIdx.x / CLUSTER)

#if CLUSTER == 1
#define WIDEST(cols) (cols)
#define SHARE_BARRIERS 0
__device__ __forceinline__ void take_share(const Shape &s, int cols) {}
#else
#define UNIT (CHUNKS * CHUNK_COLS * (BITS < 16 && CHUNKS % 2 ? 2 : 1))
#define WIDEST(cols) (((cols) / UNIT + CLUSTER - 1) / CLUSTER * UNIT)
#define PAIRS (TALL * NT * TILE)  // of 16 rows and a token, in a tile
#define LANE_SUMS (PAIRS / 2)     // a lane has of a tile: of one row of 16, every other pair
#define MESSAGE (PAIRS * 16 + (NORM_LATER ? NT * TILE : 0))  // numbers that a block sends of a tile
#define SHARE_BARRIERS 2

__device__ __forceinline__ void take_share(Shape &s, int cols) {
    const int rank = blockIdx.x % CLUSTER, units = cols / UNIT;
    s.first = rank * units / CLUSTER * UNIT, s.cols = (rank + 1) * units / CLUSTER * UNIT - s.first, s.stride = cols;
}

// Four bytes, which count at a barrier of the block that gets them.
__device__ __forceinline__ void send(u32 to, float v, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v), "r"(barrier) : "memory");
}

// As wait_for, for what other blocks did.
__device__ __forceinline__ void wait_for_others(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra wait;\ndone:\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

// What is added to a tile's sums, asked for before they are there: a lane's.
struct Added {
#if BITS < 16 && WHOLE_ROW
    float scale[TALL];
#endif
    float bias[TALL];
    u16 residual[LANE_SUMS];
};

// The storing warp. Barriers: left, taken of the parts of two tiles · got, of what others sent, in two turns.
//
// Nobody asks whether there is room for what it sends. Since the tile which the other block stored last, this block has
// stored one of its own, which it could not before the other had sent its part of that, and it takes tiles in order: so
// what was sent the turn before is read by now, and that of two turns ago, which lies in the same place, long since.
__device__ __forceinline__ void gather(const Room &room, const Weights &w, const Shape &s, u32 left, u32 taken, u32 got, void *out, const float *bias, const u16 *residual, float eps) {
    const int lane = threadIdx.x & 31, rank = blockIdx.x % CLUSTER, r = lane & 15;
    const int height = GATE ? 8 : 16, rows = GATE ? s.rows / 2 : s.rows;
    float *const parts = room.scales + NT * TILE;  // [turn][block][MESSAGE]
    int count = 0;
    for (int tile = FIRST_TILE; tile < s.tiles; tile += HOP, count++) {
        const int which = count & 1, storing = count % CLUSTER, turn = count / CLUSTER, slot = turn & 1;
        auto row_of = [&](int sub) { return (tile * TALL + sub) * height + r % height; };
        auto token_of = [&](int i) { return (2 * i + (lane >> 4)) % (NT * TILE); };
        auto stored = [&](int i) { return token_of(i) < s.tokens && row_of(2 * i / (NT * TILE)) < rows && r < height; };
        Added added;
        if (storing == rank) {
#pragma unroll
            for (int sub = 0; sub < TALL; sub++) {
                const int row = min(row_of(sub), rows - 1) + (r < height ? 0 : rows);
#if BITS < 16 && WHOLE_ROW
                added.scale[sub] = number(w.scales, row);
#endif
                added.bias[sub] = bias ? bias[row] : 0.f;
            }
#pragma unroll
            for (int i = 0; i < LANE_SUMS; i++) added.residual[i] = residual && stored(i) ? residual[(size_t)token_of(i) * rows + row_of(2 * i / (NT * TILE))] : 0;
        }
        wait_for(left + which * 8, count >> 1 & 1);
        float sums[LANE_SUMS];
        const float *p = room.partial + which * PARTIAL + (lane >> 4) * APART + r;
#pragma unroll
        for (int i = 0; i < LANE_SUMS; i++) {
            sums[i] = 0.f;
#pragma unroll
            for (int k = 0; k < WARPS; k++) sums[i] += p[k * (PARTIAL / WARPS) + 2 * i * APART];
        }
        float squares = room.scales[min(lane, NT * TILE - 1)];  // of a token
        __syncwarp();
        if (lane == 0) arrive(taken + which * 8);
        if (storing != rank) {
            const u32 to = there(shared_address(parts + (slot * CLUSTER + rank) * MESSAGE + lane), storing), barrier = there(got + slot * 8, storing);
#pragma unroll
            for (int i = 0; i < LANE_SUMS; i++) send(to + i * 128, sums[i], barrier);
            if (NORM_LATER && lane < NT * TILE) send(to + PAIRS * 64, squares, barrier);
            continue;
        }
        if (lane == 0) expect(got + slot * 8, (CLUSTER - 1) * MESSAGE * 4);
        wait_for_others(got + slot * 8, turn >> 1 & 1);
        const float *from = parts + slot * CLUSTER * MESSAGE + lane;
        auto all = [&](float own, int at) {
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < CLUSTER; k++) sum += k == rank ? own : from[k * MESSAGE + at];
            return sum;
        };
#pragma unroll
        for (int i = 0; i < LANE_SUMS; i++) sums[i] = all(sums[i], i * 32);
#if NORM_LATER
        if (lane < NT * TILE) squares = all(squares, PAIRS * 16);
        const float scale = rsqrtf(squares / s.stride + eps);
#endif
#pragma unroll
        for (int i = 0; i < LANE_SUMS; i++) {
            const int sub = 2 * i / (NT * TILE);
            float sum = sums[i];
#if BITS < 16 && WHOLE_ROW
            sum *= added.scale[sub];
#endif
#if NORM_LATER
            sum *= __shfl_sync(~0u, scale, token_of(i));
#endif
            if (bias) sum += added.bias[sub];
#if GATE
            const float up = __shfl_xor_sync(~0u, sum, 8);
            sum = round_trip(activate(round_trip(sum))) * round_trip(up);
#endif
            if (residual) sum = round_trip(sum) + to_float(added.residual[i]);
            if (stored(i)) store(out, (size_t)token_of(i) * rows + row_of(sub), sum);
        }
    }
}
#endif
