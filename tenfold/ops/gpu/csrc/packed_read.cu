// Old tokens of a packed KV cache back to numbers of 16 bits in scratch pages, for chunks of prompts to attend to.
//
// A warp takes the keys, or the values, of one head of a token; lane l has channels l + 32 i. Every operation is rounded by
// itself, as `dequantize` does it; keys that are stored before rotary embedding are turned here.
//
// Compile-time: packed.h, KEY_BITS may be 1 too; HALF; SPAN; PRE; TURN, as in packed_write.cu; WARPS.

#include "fragments.h"
#include "packed.h"

#define EACH (D / 32)  // channels of a lane

// A grouping of `quantize.Grouping`, from a head's first channel and its span's first group on.
struct Grouping {
    const u8 *groups;
    const float *units, *shifts;
};

template <int BITS>
__device__ __forceinline__ u32 code_of(const u8 *codes, int channel) {
    if (BITS == 8) return codes[channel];
    if (BITS == 4) return codes[channel / 2] >> 4 * (channel & 1) & 15;
    if (BITS == 2) return codes[channel / 4] >> 2 * (channel & 3) & 3;
    u32 byte = codes[channel / 5];
    for (int k = channel % 5; k; k--) byte /= 3;
    return byte % 3;
}

__device__ __forceinline__ float number_at(const u8 *numbers, int i) {
#if NUMBER == 1
    return half_to_float(e4m3_to_halves(numbers[i]) & 0xffff);
#else
    return half_to_float(((const u16 *)numbers)[i]);
#endif
}

template <int BITS, int COUNT>
__device__ __forceinline__ void read(float (&x)[EACH], const Grouping &by, const u8 *codes, const u8 *numbers) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int channel = lane + 32 * i, group = by.groups[channel];
        const u32 code = code_of<BITS>(codes, channel);
        const float unit = by.units[group], scale = __fmul_rn(number_at(numbers, group * COUNT), unit);
        if (BITS == 8) x[i] = __fmul_rn(half_to_float(e4m3_to_halves(code) & 0xffff), scale);
        else x[i] = __fadd_rn(__fmul_rn((float)code, scale), __fmul_rn(number_at(numbers, group * COUNT + COUNT - 1), unit));
        x[i] = __fadd_rn(x[i], by.shifts[channel]);
    }
#if TURN
    turn<TURN>(x);
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
packed_read(const u8 *key_codes, const u8 *key_numbers, const u8 *value_codes, const u8 *value_numbers, const u8 *key_groups, const float *key_units, const float *key_shifts, const u8 *value_groups, const float *value_units, const float *value_shifts, const float *rope, const long long *source, const long long *target, const long long *positions, u16 *keys, u16 *values, int count, int kv_heads, int page_size) {
    const int lane = threadIdx.x & 31, sides = 2 * kv_heads;
    const long long task = (long long)blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (task >= (long long)count * sides) return;
    const int token = task / sides, head = task % sides % kv_heads, span = head / SPAN, spans = kv_heads / SPAN;
    const bool key = task % sides < kv_heads;
    const long long from = source[token], to = target[token];
    const size_t page = from / page_size, offset = from % page_size;
    const Grouping by = {(key ? key_groups : value_groups) + head * D, (key ? key_units : value_units) + span * GROUPS, (key ? key_shifts : value_shifts) + head * D};
    const size_t codes_at = (page * kv_heads + head) * page_size + offset, numbers_at = (page * spans + span) * page_size + offset;
    float x[EACH];
    if (key) read<KEY_BITS, KEY_COUNT>(x, by, key_codes + codes_at * KEY_BYTES, key_numbers + numbers_at * KEY_NUMBERS);
    else read<VALUE_BITS, VALUE_COUNT>(x, by, value_codes + codes_at * VALUE_BYTES, value_numbers + numbers_at * VALUE_NUMBERS);
#if PRE
    if (key) {
        const float *angles = rope + (size_t)positions[token] * D;
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            const float c = angles[lane + 32 * i], s = angles[D / 2 + lane + 32 * i], low = x[i], high = x[i + EACH / 2];
            x[i] = __fsub_rn(__fmul_rn(low, c), __fmul_rn(high, s));
            x[i + EACH / 2] = __fadd_rn(__fmul_rn(high, c), __fmul_rn(low, s));
        }
    }
#endif
    u16 *out = (key ? keys : values) + (((size_t)(to / page_size) * kv_heads + head) * page_size + to % page_size) * D;
#pragma unroll
    for (int i = 0; i < EACH; i++) out[lane + 32 * i] = (u16)(pack(x[i], 0.f) & 0xffff);
}
