// Contexts of a decode step in parts of about one size, whatever their lengths: what each block of decode.cu reads.
//
// One block. Its warps weigh two numbers of parts each for the longest context, and so a size of parts for all: how many
// tiles one after the other there are in the end, if `room` blocks run at a time and whoever is done takes the next part,
// and `enough` of them (a share of `room`) are together as fast as all. A part takes as long as its tiles and `beside` more.
// Contexts then have as many parts of that size as they need, and parts come in order of their size, the largest first,
// which leaves the smallest to fill the gaps in the end.
//
// Compile-time: WARPS.
//
// items [capacity]: request (-1: none), first tile, tile after the last, which part and << 16 of how many.

#define THREADS (WARPS * 32)
#define TILE 16
#define LEVELS 8
#define EACH_PART .1f  // tiles that one more part of the longest context costs when they are merged

__device__ __forceinline__ int over(int a, int b) { return (a + b - 1) / b; }

// Parts of at most `most` tiles that a context is cut into, and what each has.
struct Cut {
    int parts, each;
};

__device__ __forceinline__ Cut cut(int tiles, int most) {
    if (!tiles) return {1, 0};
    const int each = over(tiles, over(tiles, most));
    return {over(tiles, each), each};
}

// How long so many rounds of blocks last, the last of which may be short of blocks.
__device__ __forceinline__ float lasting(float rounds, float enough) {
    const float last = rounds - floorf(rounds);
    return last > 0.f ? floorf(rounds) + fmaxf(last, enough) : rounds;
}

extern "C" __global__ void __launch_bounds__(THREADS)
even(const int *lengths, uint4 *items, int requests, int capacity, int pairs, int room, int window, int least, float enough, float merge, float beside) {
    __shared__ int tiles[THREADS], begin[THREADS], parts[THREADS], each[THREADS];
    __shared__ float cost[2 * WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, own = threadIdx.x;
    for (int i = own; i < capacity; i += THREADS) items[i] = make_uint4(~0u, 0, 0, 1 << 16);
    int start = 0, count = 0;
    if (own < requests) {
        const int length = lengths[own];
        start = window ? max(0, length - window) / TILE : 0;
        count = (length + TILE - 1) / TILE - start;
        tiles[own] = count;
    }
    __syncthreads();
    int longest = 0, all = 0;
    for (int r = lane; r < requests; r += 32) longest = max(longest, tiles[r]), all += tiles[r];
    longest = (int)__reduce_max_sync(~0u, (unsigned)longest), all = __reduce_add_sync(~0u, all);
    auto most_of = [&](int at) { return max(least, over(longest, at + 1)); };  // tiles of a part
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = i * WARPS + warp, most = most_of(at);
        int blocks = 0, in_large = 0, above[LEVELS] = {};  // parts larger than 1 / LEVELS of `most`, 2 / LEVELS, ...
        for (int r = lane; r < requests; r += 32) {
            const Cut c = cut(tiles[r], most);
            blocks += c.parts;
#pragma unroll
            for (int l = 1; l < LEVELS; l++)
                if (LEVELS * c.each > l * most) above[l] += c.parts;
            if (2 * c.each > most) in_large += tiles[r];
        }
        blocks = __reduce_add_sync(~0u, blocks), in_large = __reduce_add_sync(~0u, in_large);
        // In the end some blocks are busy, with parts of about the mean size, half done.
        const float each_round = (float)pairs / room, rounds = blocks * each_round, load = all * each_round + beside * rounds;
        float took = load + .5f * load / rounds * (lasting(rounds, enough) - rounds);
#pragma unroll
        for (int l = 1; l < LEVELS; l++) {
            const float many = __reduce_add_sync(~0u, above[l]) * each_round;
            took = fmaxf(took, lasting(many, enough) * (beside + (float)l / LEVELS * most));
            if (l != LEVELS / 2 || many >= 1.f) continue;
            // Large parts take as many rounds of blocks; then small ones are done, and large ones go on alone.
            const float fewer = all - in_large + beside * (blocks - many / each_round);
            const float small = fewer * each_round / (1.f - many), rest = beside + min(most, longest) - small;
            if (rest > 0.f) took = fmaxf(took, small + rest * fmaxf(many, enough));
        }
        if (most < longest) took += merge + EACH_PART * at;
        if (lane == 0) cost[at] = blocks <= capacity ? took : 3e38f;
    }
    __syncthreads();
    int best = 0;
    for (int i = 1; i < 2 * WARPS; i++)
        if (cost[i] < cost[best]) best = i;
    if (own < requests) {
        const Cut c = cut(count, most_of(best));
        parts[own] = c.parts, each[own] = c.each;
    }
    __syncthreads();
    if (own < requests) {
        int first = 0;  // of its items
        const int mine = each[own];
        for (int r = 0; r < requests; r++)
            if (each[r] > mine || (each[r] == mine && r < own)) first += parts[r];
        begin[own] = first;
        tiles[own] = start;
    }
    __syncthreads();
    for (int r = warp; r < requests; r += WARPS) {
        const int from = tiles[r], end = (lengths[r] + TILE - 1) / TILE;
        for (int k = lane; k < parts[r]; k += 32)
            items[begin[r] + k] = make_uint4(r, from + k * each[r], min(end, from + (k + 1) * each[r]), k | parts[r] << 16);
    }
}
