// What products of experts share: the list of tiles of picks, and how a thread's sums are stored. GATE, N, as in
// experts.cu, DOWN.

struct Tile { int expert, first, end, unused; };  // places first to end of picks of one expert

// Sums of a warp's 16 rows from `row` on and of a tile's picks, as wgmma leaves them. With a gate the upper eight rows are
// gate and the lower eight up of the same features, row / 2 and so on. DOWN: results are multiplied by the weight of the
// pick and stored by pick, else by place.
__device__ __forceinline__ void store_sums(const float (&d)[N / 2], void *out, const Tile &tile, int row, int outputs, const int *order, const float *shares) {
    const int lane = threadIdx.x & 31, quad = lane >> 2;
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const int place = tile.first + n * 8 + (lane & 3) * 2 + t;
            if (place >= tile.end) continue;
#if DOWN
            const int at = order[place];
            const float share = shares[at];
#else
            const int at = place;
#endif
#if GATE
            const int feature = row / 2 + quad;
            const float y = round_trip(activate(round_trip(d[n * 4 + t]))) * round_trip(d[n * 4 + 2 + t]);
            if (feature < outputs) store(out, (size_t)at * outputs + feature, y);
#else
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int feature = row + half * 8 + quad;
                float y = d[n * 4 + half * 2 + t];
#if DOWN
                y = round_trip(y) * share;
#endif
                if (feature < outputs) store(out, (size_t)at * outputs + feature, y);
            }
#endif
        }
    }
}
