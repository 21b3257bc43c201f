// Which experts tokens go to, and the picks of all of them sorted by expert with the list of tiles that experts.cu takes:
// one launch of one block for what takes PyTorch a dozen. A warp takes a token, then an expert.
//
// Picks are numbered token * TOP + k, and those of an expert stay in that order. Experts come in the order of `turns`, where
// there is one. Compile-time: EXPERTS, up to 1024 · TOP of
// a token · SIGMOID scores, else softmax · NORMED weights of a token sum to 1 · GROUPS of experts of which the KEPT best
// take part, a group being as good as its BEST highest scores together · WIDTH picks of a tile at most · WARPS.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#if !EMULATED
__device__ __forceinline__ void start_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif

#define VALUES ((EXPERTS + 31) / 32)  // of a lane
#define NONE -3.0e38f
#define EACH (EXPERTS / GROUPS)
#define UNIT (WIDTH % 64 ? WIDTH : 64)  // picks that tiles are made of, as in ops/gemm/grouped.py

// A number that is the larger the larger v is.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = (u32)__float_as_int(v);
    return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}

// Where the largest of COUNT keys of all lanes stands, of equals the first; it is struck out. Key i of a lane stands at
// lane + 32 i.
template <int COUNT> __device__ __forceinline__ int strike_largest(u32 (&keys)[COUNT]) {
    const int lane = threadIdx.x & 31;
    u32 most = 0, at = ~0u;
#pragma unroll
    for (int i = 0; i < COUNT; i++) most = max(most, keys[i]);
    most = __reduce_max_sync(~0u, most);
#pragma unroll
    for (int i = COUNT - 1; i >= 0; i--)
        if (keys[i] == most) at = lane + 32 * i;
    at = __reduce_min_sync(~0u, at);
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (at == lane + 32 * i) keys[i] = 0;
    return at;
}

// How many there are before each lane, and of all lanes together.
__device__ __forceinline__ int before(int count, int &all) {
    const int lane = threadIdx.x & 31;
    int sum = count;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        const int other = __shfl_sync(~0u, sum, lane - d & 31);
        if (lane >= d) sum += other;
    }
    all = __shfl_sync(~0u, sum, 31);
    return sum - count;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
route(const float *logits, const float *bias, const int *turns, float *weights, int *order, int *list, int *listed, float scale, int tokens) {
    extern __shared__ __align__(16) u8 memory[];
    int *starts = (int *)memory;                   // [EXPERTS], of picks
    int *counts = starts + EXPERTS;                // [EXPERTS]
    int *tiles = counts + EXPERTS;                 // [EXPERTS], before each expert's
    float *choices = (float *)(tiles + EXPERTS);   // [WARPS][EXPERTS], with GROUPS
    u16 *picks = (u16 *)(choices + (GROUPS > 1 ? WARPS * EXPERTS : 0));  // [tokens * TOP]
    const int pieces = (tokens * TOP + 31) / 32;   // of 32 picks
    u16 *ahead = picks + pieces * 32;              // [pieces][EXPERTS], picks of an expert in a piece, then before it
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, count = tokens * TOP;
    float *own = choices + warp * EXPERTS;
    wait_for_kernel_before();
    start_dependents();

    for (int token = warp; token < tokens; token += WARPS) {
        float score[VALUES], choice[VALUES];
        float most = NONE;
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int e = lane + 32 * i;
            score[i] = e < EXPERTS ? logits[(size_t)token * EXPERTS + e] : NONE;
            most = fmaxf(most, score[i]);
        }
#if SIGMOID
#pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] = 1.f / (1.f + expf(-score[i]));
#else
        float sum = 0.f;
#pragma unroll
        for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
#pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] = lane + 32 * i < EXPERTS ? expf(score[i] - most) : 0.f, sum += score[i];
#pragma unroll
        for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
#pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] /= sum;
#endif
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int e = lane + 32 * i;
            choice[i] = e < EXPERTS ? score[i] + (bias ? bias[e] : 0.f) : NONE;
#if GROUPS > 1
            if (e < EXPERTS) own[e] = choice[i];
#endif
        }
#if GROUPS > 1
        __syncwarp();
        u32 group[1] = {0};  // of lane g, how good group g is
        if (lane < GROUPS) {
            float best[BEST];
#pragma unroll
            for (int b = 0; b < BEST; b++) best[b] = NONE;
            for (int j = 0; j < EACH; j++) {
                float value = own[lane * EACH + j];
#pragma unroll
                for (int b = 0; b < BEST; b++)
                    if (value > best[b]) { const float less = best[b]; best[b] = value, value = less; }
            }
            float sum = 0.f;
#pragma unroll
            for (int b = 0; b < BEST; b++) sum += best[b];
            group[0] = ordered(sum);
        }
        u32 kept = 0;
        for (int k = 0; k < KEPT; k++) kept |= 1u << strike_largest(group);
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (!(kept >> min((lane + 32 * i) / EACH, 31) & 1)) choice[i] = NONE;
        __syncwarp();
#endif
        u32 keys[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) keys[i] = ordered(choice[i]);
        float weight = 0.f, whole = 0.f;  // of pick `lane`, and of all picks
        for (int k = 0; k < TOP; k++) {
            const int place = strike_largest(keys);
            float share = 0.f;
#pragma unroll
            for (int i = 0; i < VALUES; i++)
                if (place >> 5 == i) share = score[i];
            share = __shfl_sync(~0u, share, place & 31);
            whole += share;
            if (lane == k) weight = share;
            if (lane == 0) picks[token * TOP + k] = (u16)place;
        }
        if (NORMED) weight /= whole + 1e-20f;
        if (lane < TOP) weights[(size_t)token * TOP + lane] = weight * scale;
    }
    __syncthreads();

    // Which picks of a piece go where this lane's goes, a bit for each.
    auto alike = [&](int piece, int &expert) {
        const int at = piece * 32 + lane;
        expert = at < count ? picks[at] : EXPERTS;
        return __match_any_sync(~0u, expert);
    };
    for (int i = threadIdx.x; i < pieces * EXPERTS; i += WARPS * 32) ahead[i] = 0;
    __syncthreads();
    for (int piece = warp; piece < pieces; piece += WARPS) {
        int expert;
        const u32 same = alike(piece, expert);
        if (expert < EXPERTS && !(same & ((1u << lane) - 1))) ahead[piece * EXPERTS + expert] = __popc(same);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += WARPS * 32) {
        int sum = 0;
        for (int piece = 0; piece < pieces; piece++) {
            const int more = ahead[piece * EXPERTS + e];
            ahead[piece * EXPERTS + e] = sum;
            sum += more;
        }
        counts[e] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        int pick = 0, tile = 0;
        for (int first = 0; first < EXPERTS; first += 32) {
            const int turn = first + lane, e = turn < EXPERTS && turns ? turns[turn] : turn, n = turn < EXPERTS ? counts[e] : 0;
            int more, further;
            const int start = pick + before(n, more), slot = tile + before((n + WIDTH - 1) / WIDTH, further);
            if (turn < EXPERTS) starts[e] = start, tiles[e] = slot;
            pick += more, tile += further;
        }
        if (lane == 0) *listed = tile;
    }
    __syncthreads();
    for (int piece = warp; piece < pieces; piece += WARPS) {
        int expert;
        const u32 same = alike(piece, expert);
        if (expert < EXPERTS) order[starts[expert] + ahead[piece * EXPERTS + expert] + __popc(same & ((1u << lane) - 1))] = piece * 32 + lane;
    }
    for (int e = threadIdx.x; e < EXPERTS; e += WARPS * 32) {
        const int start = starts[e], end = start + counts[e];
        const int units = (counts[e] + UNIT - 1) / UNIT, parts = (counts[e] + WIDTH - 1) / WIDTH;
        int *tile = list + tiles[e] * 4;
        for (int i = 0; i < parts; i++, tile += 4) {
            tile[0] = e, tile[1] = start + i * units / parts * UNIT;
            tile[2] = min(start + (i + 1) * units / parts * UNIT, end), tile[3] = 0;
        }
    }
}
