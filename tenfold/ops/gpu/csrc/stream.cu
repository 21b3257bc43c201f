// y[tokens, rows] = x[tokens, cols] @ w[rows, cols]^T for a few tokens, at the speed of reading w once: few.h.
//
// Weights go from global memory straight into registers, of 16 bits and of 4 and 8 with 16-byte loads. Blocks are
// persistent: while one tile is multiplied the loads of the next step, maybe of the next tile, are under way.
//
// Programmatic dependent launch: weights never depend on the kernel before, so the first step is loaded before
// waiting for it.
//
// Compile-time: as in few.h · BLOCKS of one multiprocessor.

#define DIGITS 0
#define TALL 1
#include "few.h"

#if BITS < 4
// Lanes beside each other read neighbouring words, so the sectors of a row are fetched once and asked for again.
__device__ __forceinline__ void load_words(Own &words, const u16 *p) {
#if BITS == 2
    asm volatile("ld.global.nc.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
#else
#pragma unroll
    for (int k = 0; k < BITS; k++) asm volatile("ld.global.nc.L2::256B.u32 %0, [%1];" : "=r"(words[k]) : "l"(p + 2 * k));
#endif
}
#endif

__device__ __forceinline__ void load_step(Piece (&buffer)[CHUNKS][1], const Weights &w, const Shape &s, int tile, int step) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first, second;
    tile_rows(s, tile, lane >> 2, first, second);
    int chunk = (step * WARPS + warp) * CHUNKS, chunks = s.cols / CHUNK_COLS;
    const size_t stride = (size_t)s.cols * BITS / 16, lane_at = (lane & 3) * (BITS < 4 ? 2 * BITS : 8);  // in 16-bit units
    const u16 *p = w.codes + first * stride + lane_at, *q = w.codes + second * stride + lane_at;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        Piece &piece = buffer[i][0];
        if (chunk + i < chunks) {
#if BITS < 4
            load_words(piece.first, p + (size_t)(chunk + i) * 8 * BITS);
            load_words(piece.second, q + (size_t)(chunk + i) * 8 * BITS);
#else
#pragma unroll
            for (int k = 0; k < LOADS; k++) {
                piece.first[k] = load_weight(p + (size_t)((chunk + i) * LOADS + k) * 32);
                piece.second[k] = load_weight(q + (size_t)((chunk + i) * LOADS + k) * 32);
            }
#endif
#if BITS < 16 && (!WHOLE_ROW || ZEROS)
            const int groups = (s.cols - 1) / GROUP + 1, group = (chunk + i) * CHUNK_COLS / GROUP;
            const size_t at = (size_t)first * groups + group, below = (size_t)second * groups + group;
#if !WHOLE_ROW
            piece.scale_first = number(w.scales, at), piece.scale_second = number(w.scales, below);
#endif
#if ZEROS
#if IN_PLACE
            piece.zero_first = number(w.zeros, at), piece.zero_second = number(w.zeros, below);
#else
            const float zero = number(w.zeros, at), other = number(w.zeros, below);
            piece.zero_first = pack(zero, zero), piece.zero_second = pack(other, other);
#endif
#endif
#endif
        } else {
#if BITS < 16
            const u32 nothing = NOTHING;
#else
            const u32 nothing = 0;
#endif
#if BITS < 4
#pragma unroll
            for (int k = 0; k < BITS; k++) piece.first[k] = piece.second[k] = nothing;
#else
#pragma unroll
            for (int k = 0; k < LOADS; k++) piece.first[k] = piece.second[k] = make_uint4(nothing, nothing, nothing, nothing);
#endif
#if BITS < 16 && !WHOLE_ROW
            piece.scale_first = piece.scale_second = 0.f;
#endif
#if BITS < 16 && ZEROS
            piece.zero_first = piece.zero_second = 0;
#endif
        }
    }
}

extern "C" __global__ void __launch_bounds__(MULTIPLIERS, BLOCKS)
stream(const u16 *x, const u16 *codes, const void *scales_of, const void *zeros, void *out, const float *bias, const u16 *residual, const float *norm, float eps, int tokens, int rows, int cols) {
    extern __shared__ uint4 memory[];
#if BITS == 16
    const int before = 8 * NT * blockIdx.y, width = GATE ? rows / 2 : rows;  // of more tokens each layer of blocks has some
    x += (size_t)before * cols, out = (char *)out + (size_t)before * width * (FLOAT32 ? 4 : 2);
    if (residual) residual += (size_t)before * width;
    tokens = min(tokens - before, 8 * NT);
#endif
    const Shape s = shape_of(tokens, rows, cols);
    const Room room(memory, s);
    const int chunks = cols / CHUNK_COLS, steps = (chunks + WARPS * CHUNKS - 1) / (WARPS * CHUNKS);

    asm volatile("griddepcontrol.launch_dependents;");
    Weights w;
    w.codes = codes;
#if BITS < 16
    w.scales = scales_of, w.zeros = zeros;
#endif
    Piece even[CHUNKS][1], odd[CHUNKS][1];
    Sums acc;
    clear(acc);
    int tile = blockIdx.x, step = 0, turn = 0;
    Norms norms;
    norms.ask(norm, s);
    if (tile < s.tiles) load_step(even, w, s, tile, 0);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    stage(room.xs, room.offsets, room.squares, room.scales, x, norm, eps, s, norms);

    auto consume = [&](const Piece (&buffer)[CHUNKS][1], int tile, int step) {
        const int chunk = (step * WARPS + (threadIdx.x >> 5)) * CHUNKS;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) multiply(acc, buffer[i], room.xs, room.offsets, s, min(chunk + i, chunks - 1) * CHUNK_COLS);
        if (step == steps - 1) {
            float *partial = room.partial + turn * PARTIAL;
            Outputs<MULTIPLIERS> own = {(int)threadIdx.x};
            own.ask(tile, s, residual);
            leave(acc, partial);
            meet();
            finish(partial, room.scales, w, tile, s, out, bias, residual, own);
            turn ^= 1;
        }
    };
    auto advance = [&](int &tile, int &step) {
        if (++step == steps) step = 0, tile += gridDim.x;
    };
    while (tile < s.tiles) {
        int tile1 = tile, step1 = step;
        advance(tile1, step1);
        if (tile1 < s.tiles) load_step(odd, w, s, tile1, step1);
        consume(even, tile, step);
        if (tile1 >= s.tiles) break;
        tile = tile1, step = step1;
        advance(tile, step);
        if (tile < s.tiles) load_step(even, w, s, tile, step);
        consume(odd, tile1, step1);
    }
}
