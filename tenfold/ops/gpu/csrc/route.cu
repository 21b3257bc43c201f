// Which experts tokens go to, and the picks of all of them sorted by expert with the list of tiles that experts.cu takes:
// one launch of one block for what takes PyTorch a dozen. A warp takes a token, then an expert.
//
// Picks are numbered token * TOP + k, and those of an expert stay in that order. Experts come in the order of `turns`, where
// there is one. Compile-time: EXPERTS, up to 1024 · TOP of
// a token · SIGMOID scores, else softmax · NORMED weights of a token sum to 1 · GROUPS of experts of which the KEPT best
// take part, a group being as good as its BEST highest scores together · WIDTH picks of a tile · WARPS.

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

// The largest of all lanes' values and where it stands, of equals the first.
__device__ __forceinline__ void largest(float &value, int &place) {
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const float other = __shfl_xor_sync(~0u, value, d);
        const int there = __shfl_sync(~0u, place, (threadIdx.x & 31) ^ d);
        if (other > value || (other == value && there < place)) value = other, place = there;
    }
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
    float *choices = (float *)memory;                  // [WARPS][EXPERTS]
    int *starts = (int *)(choices + WARPS * EXPERTS);  // [EXPERTS], of picks
    int *counts = starts + EXPERTS;                    // [EXPERTS]
    int *tiles = counts + EXPERTS;                     // [EXPERTS], before each expert's
    u16 *picks = (u16 *)(tiles + EXPERTS);             // [tokens * TOP]
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
        float group = NONE;  // of lane g, how good group g is
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
            group = 0.f;
#pragma unroll
            for (int b = 0; b < BEST; b++) group += best[b];
        }
        u32 kept = 0;
        for (int k = 0; k < KEPT; k++) {
            float value = group;
            int place = lane;
            largest(value, place);
            kept |= 1u << place;
            if (lane == place) group = NONE;
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (!(kept >> min((lane + 32 * i) / EACH, 31) & 1)) choice[i] = NONE;
        __syncwarp();
#endif
        float weight = 0.f, whole = 0.f;  // of pick `lane`, and of all picks
        for (int k = 0; k < TOP; k++) {
            float value = NONE, share = 0.f;
            int place = 1 << 30;
#pragma unroll
            for (int i = 0; i < VALUES; i++)
                if (choice[i] > value) value = choice[i], place = lane + 32 * i;
            largest(value, place);
#pragma unroll
            for (int i = 0; i < VALUES; i++)
                if (place == lane + 32 * i) share = score[i], choice[i] = NONE;
            share = __shfl_sync(~0u, share, place & 31);
            whole += share;
            if (lane == k) weight = share;
            if (lane == 0) picks[token * TOP + k] = (u16)place;
        }
        if (NORMED) weight /= whole + 1e-20f;
        if (lane < TOP) weights[(size_t)token * TOP + lane] = weight * scale;
    }
    __syncthreads();

    // Picks [at, at + 32) that go to expert e, a bit for each.
    auto going = [&](int at, int e) { return __ballot_sync(~0u, at + lane < count && picks[min(at + lane, count - 1)] == e); };
    for (int e = warp; e < EXPERTS; e += WARPS) {
        int sum = 0;
        for (int at = 0; at < count; at += 32) sum += __popc(going(at, e));
        if (lane == 0) counts[e] = sum;
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
    for (int e = warp; e < EXPERTS; e += WARPS) {
        const int end = starts[e] + counts[e];
        int next = starts[e];
        for (int j = lane; j * WIDTH < end - next; j += 32) {
            int *tile = list + (tiles[e] + j) * 4;
            tile[0] = e, tile[1] = next + j * WIDTH, tile[2] = min(next + (j + 1) * WIDTH, end), tile[3] = 0;
        }
        for (int at = 0; at < count && next < end; at += 32) {
            const u32 mine = going(at, e);
            if (mine >> lane & 1) order[next + __popc(mine & ((1u << lane) - 1))] = at + lane;
            next += __popc(mine);
        }
    }
}
