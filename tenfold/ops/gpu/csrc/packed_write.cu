// New tokens of a packed KV cache, one launch a layer: norm of q and k heads, rotary embedding, exact keys and values to
// their rooms, codes and numbers to their pages.
//
// A warp takes one query head, or the keys, or the values, of one span of heads of a token; lane l has channels l + 32 i.
// Every operation is rounded by itself, as `quantize` does it; only the norm's mean and the Hadamard matrix are added up
// in another order, which can move a number that lies between two codes.
//
// Compile-time: packed.h, KEY_BITS may be 1 too; HALF; SPAN heads whose channels share groups; PRE: keys are stored before
// rotary embedding; TURN: channels that the Hadamard matrix turns together, or 0; EXACT: there are rooms; WARPS.

#include "fragments.h"
#include "packed.h"

#define THREADS (WARPS * 32)
#define EACH (D / 32)        // channels of a lane in a head
#define ALL (SPAN * EACH)    // in a span
#define LEAST_SCALE 1e-5f
#define TOP(bits) ((bits) == 1 ? 2 : (1 << (bits)) - 1)

// A grouping of `quantize.Grouping`, from a span's first channel and group on.
struct Grouping {
    const u8 *groups;
    const float *clips, *units, *shifts;
};

// Where a token's codes and numbers go: of the span's first head, and bytes from head to head.
struct Target {
    u8 *codes;
    size_t stride;
    u8 *numbers;
};

__device__ __forceinline__ u32 number_bits(float first, float second) {
#if NUMBER == 1
    return to_e4m3(first, second);
#else
    return halves(fminf(fmaxf(first, -65504.f), 65504.f), fminf(fmaxf(second, -65504.f), 65504.f));
#endif
}

// A scale as it is read back.
__device__ __forceinline__ float as_stored(u32 bits) { return half_to_float(NUMBER == 1 ? e4m3_to_halves(bits & 0xff) & 0xffff : bits & 0xffff); }

template <int BITS>
__device__ __forceinline__ void quantise(float (&x)[ALL], const Grouping &by, const Target &target, u8 *codes) {
    const int lane = threadIdx.x & 31;
#if TURN
    turn<TURN>(x);
#endif
    int group[ALL];
    float scale[ALL], lowest[ALL];
#pragma unroll
    for (int i = 0; i < ALL; i++) {
        group[i] = by.groups[lane + 32 * i];
        x[i] = __fsub_rn(x[i], by.shifts[lane + 32 * i]);
        scale[i] = 1.f, lowest[i] = 0.f;
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        float lo = INFINITE, hi = -INFINITE;
#pragma unroll
        for (int i = 0; i < ALL; i++)
            if (group[i] == g) {
                const float v = BITS == 8 ? fabsf(x[i]) : x[i];
                lo = fminf(lo, v), hi = fmaxf(hi, v);
            }
#pragma unroll
        for (int d = 16; d; d >>= 1) lo = fminf(lo, __shfl_xor_sync(~0u, lo, d)), hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, d));
        const float clip = by.clips[g], unit = by.units[g];
        lo = __fmul_rn(clip, lo), hi = __fmul_rn(clip, hi);
        float step;
        u32 bits;
        if (BITS == 8) {
            bits = number_bits(__fdiv_rn(fmaxf(__fdiv_rn(hi, 448.f), LEAST_SCALE), unit), 0.f);
            step = __fmul_rn(as_stored(bits), unit), lo = 0.f;
        } else {
            step = fmaxf(__fdiv_rn(__fsub_rn(hi, lo), (float)TOP(BITS)), LEAST_SCALE);
            bits = number_bits(__fdiv_rn(step, unit), __fdiv_rn(lo, unit));
        }
        if (lane == g) {
            const int size = (BITS == 8 ? 1 : 2) * NUMBER;
            if (size == 1) target.numbers[g] = (u8)bits;
            if (size == 2) ((u16 *)target.numbers)[g] = (u16)bits;
            if (size == 4) ((u32 *)target.numbers)[g] = bits;
        }
#pragma unroll
        for (int i = 0; i < ALL; i++)
            if (group[i] == g) scale[i] = step, lowest[i] = lo;
    }
    const float most = BITS == 8 ? 448.f : (float)TOP(BITS), least = BITS == 8 ? -448.f : 0.f;
#pragma unroll
    for (int i = 0; i < ALL; i++) {
        const float v = fminf(fmaxf(__fdiv_rn(__fsub_rn(x[i], lowest[i]), scale[i]), least), most);
        codes[lane + 32 * i] = BITS == 8 ? (u8)to_e4m3(v, 0.f) : (u8)rintf(v);
    }
    __syncwarp();
    for (int e = lane; e < SPAN * CODE_BYTES(BITS); e += 32) {
        const int head = e / CODE_BYTES(BITS), at = e % CODE_BYTES(BITS);
        const u8 *c = codes + head * D;
        u32 byte;
        if (BITS == 1) {
            byte = 0;
#pragma unroll
            for (int k = 4; k >= 0; k--) byte = byte * 3 + (at * 5 + k < D ? c[at * 5 + k] : 0);
        } else if (BITS == 2) byte = c[at * 4] | c[at * 4 + 1] << 2 | c[at * 4 + 2] << 4 | c[at * 4 + 3] << 6;
        else if (BITS == 4) byte = c[at * 2] | c[at * 2 + 1] << 4;
        else byte = c[at];
        target.codes[head * target.stride + at] = (u8)byte;
    }
}

// A head's norm, rounded as its result is; the products' roundings are those of `norm`.
__device__ __forceinline__ void normalise(float *v, const float *weight, float eps) {
    const int lane = threadIdx.x & 31;
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) squares += v[i] * v[i];
#pragma unroll
    for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
    const float scale = rsqrtf(squares / D + eps);
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] = round_trip(v[i] * scale * weight[lane + 32 * i]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
packed_write(const u16 *qkv, const float *rope, const int *positions, const int *slots, const int *rooms, const int *room_slots, const float *q_norm, const float *k_norm, u16 *queries, u8 *key_codes, u8 *key_numbers, u8 *value_codes, u8 *value_numbers, u16 *exact_keys, u16 *exact_values, const u8 *key_groups, const float *key_clips, const float *key_units, const float *key_shifts, const u8 *value_groups, const float *value_clips, const float *value_units, const float *value_shifts, float eps, int heads, int kv_heads, int page_size, int rotary, int sinks, int ring) {
    __shared__ float raw[WARPS][SPAN * D];
    __shared__ u8 codes[WARPS][SPAN * D];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.x, task = blockIdx.y * WARPS + warp;
    const int spans = kv_heads / SPAN, position = positions[token], slot = slots[token], half = rotary / 2;
    start_dependents();
    // The rotation of a head's channels lane + 32 i: v * turn[i] + v[partner[i]] * side[i].
    const float *angles = rope + (size_t)position * rotary;
    float along[EACH], side[EACH];
    int partner[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int e = lane + 32 * i;
        const bool low = e < half, turns = e < rotary;
        partner[i] = low ? e + half : turns ? e - half : e;
        along[i] = turns ? angles[low ? e : e - half] : 1.f;
        side[i] = turns ? low ? -angles[half + e] : angles[e] : 0.f;
    }
    wait_for_kernel_before();
    if (task >= heads + 2 * spans) return;
    const bool query = task < heads, key = !query && task < heads + spans;
    const int span = query ? 0 : key ? task - heads : task - heads - spans, count = query ? 1 : SPAN;
    const int source = query ? task : heads + (key ? 0 : kv_heads) + span * SPAN;
    const u16 *from = qkv + ((size_t)token * (heads + 2 * kv_heads) + source) * D;
    if (!query && slot < 0 && !(room_slots && room_slots[token] >= 0)) return;
    float x[ALL], turned[ALL];
#pragma unroll
    for (int n = 0; n < SPAN; n++) {
#pragma unroll
        for (int i = 0; i < EACH; i++) x[n * EACH + i] = n < count ? to_float(from[n * D + lane + 32 * i]) : 0.f;
        const float *norm = query ? q_norm : key ? k_norm : nullptr;
        if (norm) normalise(x + n * EACH, norm, eps);
    }
    if (query || key) {
#pragma unroll
        for (int i = 0; i < ALL; i++) raw[warp][lane + 32 * i] = x[i];
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < ALL; i++) {
        turned[i] = x[i];
        // Each product rounded, as the oracle does: what lies in the cache must not depend on who wrote it.
        if (query || key) turned[i] = round_trip(__fadd_rn(__fmul_rn(x[i], along[i % EACH]), __fmul_rn(raw[warp][i / EACH * D + partner[i % EACH]], side[i % EACH])));
    }
    if (query) {
#pragma unroll
        for (int i = 0; i < EACH; i++) queries[((size_t)token * heads + task) * D + lane + 32 * i] = (u16)(pack(turned[i], 0.f) & 0xffff);
        return;
    }
#if EXACT
    const int page = position < sinks ? ring : position / page_size % ring;
    const int room = room_slots ? room_slots[token] : slot < 0 ? -1 : (rooms[token] * (ring + 1) + page) * page_size + position % page_size;
    if (room >= 0) {
        u16 *to = (key ? exact_keys : exact_values) + (((size_t)(room / page_size) * kv_heads + span * SPAN) * page_size + room % page_size) * D;
#pragma unroll
        for (int i = 0; i < ALL; i++) to[(size_t)(i / EACH) * page_size * D + lane + 32 * (i % EACH)] = (u16)(pack(turned[i], 0.f) & 0xffff);
    }
#endif
    if (slot < 0) return;
    const Grouping by = {(key ? key_groups : value_groups) + span * SPAN * D, (key ? key_clips : value_clips) + span * GROUPS, (key ? key_units : value_units) + span * GROUPS, (key ? key_shifts : value_shifts) + span * SPAN * D};
    const size_t page_of = slot / page_size, offset = slot % page_size, bytes = key ? KEY_BYTES : VALUE_BYTES, numbers = key ? KEY_NUMBERS : VALUE_NUMBERS;
    const Target target = {(key ? key_codes : value_codes) + ((page_of * kv_heads + span * SPAN) * page_size + offset) * bytes, page_size * bytes, (key ? key_numbers : value_numbers) + ((page_of * spans + span) * page_size + offset) * numbers};
    if (key) quantise<KEY_BITS>(PRE ? x : turned, by, target, codes[warp]);
    else quantise<VALUE_BITS>(x, by, target, codes[warp]);
}
