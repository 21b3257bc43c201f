// y[tokens, rows] = x[tokens, cols] @ w[rows, cols]^T for a few tokens, at the speed of reading w once: few.h.
//
// Rows of a tile come by bulk copies into a ring in shared memory, which one warp keeps full: as many bytes are under way
// as fit there, whatever registers hold, and the ring fills before the kernel in front has ended. Another warp adds up and
// stores what the multiplying ones leave of a tile, so that these wait for nobody. Rows lie so far apart that lanes which
// load together hit all banks. Numbers of groups come beside the codes, in 4-byte copies.
//
// Compile-time: as in few.h · STAGES of the ring · BLOCKS of one multiprocessor, that registers must allow. Groups are of
// 128 columns, cols then a multiple of 256 and WARPS * CHUNKS even, or whole rows without zeros; cols are a multiple of
// CHUNKS chunks. CLUSTER blocks divide them (shares.h).

#include "few.h"
#include "hopper.h"
#include "cluster.h"
#include "shares.h"

#define THREADS (MULTIPLIERS + 64)
#define STEP_COLS (WARPS * CHUNKS * CHUNK_COLS)
#define BYTES_OF(cols) ((cols) * BITS / 8)
#define TOGETHER (BITS == 2 ? 32 : BITS == 3 ? 48 : 64)  // bytes of a row that four lanes load at once
#define PITCH ((BYTES_OF(STEP_COLS) - TOGETHER + 127) / 128 * 128 + TOGETHER)
#define ROWS (16 * TALL)
#define CODES_BYTES (ROWS * PITCH)
#define GROUPED (BITS < 16 && !WHOLE_ROW)
#define IN_A_WORD (SCALES == 2 ? 1 : 2)
#define WORD_COLS (128 * IN_A_WORD)
#define NUMBERS_BYTES (GROUPED ? STEP_COLS / WORD_COLS * ROWS * 4 : 0)  // a word of each row, then the next
#define STAGE_BYTES (CODES_BYTES + NUMBERS_BYTES * (1 + (GROUPED && ZEROS)))

__device__ __forceinline__ void copy_word(u32 to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Steps of a block's tiles, in order, and the stage of the ring each goes through.
struct Turn {
    int tile, step, slot, parity;

    __device__ __forceinline__ void next(int steps) {
        if (++step == steps) step = 0, tile += HOP;
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// The warp that brings weights. full, empty: barriers of the first stage.
__device__ __forceinline__ void bring(const Weights &w, const Shape &s, int steps, u32 stages, u32 full, u32 empty) {
    const int lane = threadIdx.x & 31, row = lane % ROWS, chunks = s.stride / CHUNK_COLS;
    const size_t row_bytes = BYTES_OF((size_t)s.stride), first_byte = BYTES_OF((size_t)s.first);
    u64 once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    int count = 0;
    for (Turn at = {FIRST_TILE, 0, 0, 1}; at.tile < s.tiles; at.next(steps), count++) {
        const u32 stage = stages + at.slot * STAGE_BYTES, barrier = full + at.slot * 8;
        if (count >= STAGES) wait_for(empty + at.slot * 8, at.parity);
        const int cols = min(STEP_COLS, s.cols - at.step * STEP_COLS);
        int first, second;
        tile_rows(s, at.tile * TALL + row / 16, row & 7, first, second);
        const int own = row & 8 ? second : first;
        if (lane == 0) expect(barrier, ROWS * BYTES_OF(cols));
        __syncwarp();
        if (lane < ROWS) copy_row(stage + row * PITCH, (const char *)w.codes + own * row_bytes + first_byte + BYTES_OF((size_t)at.step * STEP_COLS), BYTES_OF(cols), barrier, once);
#if GROUPED
        const size_t from = (size_t)own * chunks + s.first / 128 + at.step * (STEP_COLS / 128);
        for (int word = lane / ROWS; word < cols / WORD_COLS; word += 32 / ROWS) {
            const u32 to = stage + CODES_BYTES + (word * ROWS + row) * 4;
            copy_word(to, (const Stored *)w.scales + from + word * IN_A_WORD);
            if (ZEROS) copy_word(to + NUMBERS_BYTES, (const Stored *)w.zeros + from + word * IN_A_WORD);
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
    }
}

__device__ __forceinline__ void load_own(Own &own, u32 at) {
#if BITS == 2
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(own[0]), "=r"(own[1]) : "r"(at));
#elif BITS == 3
#pragma unroll
    for (int k = 0; k < 3; k++) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(own[k]) : "r"(at + 4 * k));
#else
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        uint4 &v = own[k];
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at + 64 * k));
    }
#endif
}

#if GROUPED
__device__ __forceinline__ float number_at(u32 at) {
#if SCALES == 2
    float stored;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(stored) : "r"(at));
#else
    u16 stored;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(stored) : "r"(at));
#endif
    return value(stored);
}
#endif

// Chunk i of a step's, of a lane's two rows among 16.
__device__ __forceinline__ void load_piece(Piece &piece, u32 stage, int sub, int i) {
    const int lane = threadIdx.x & 31, g = sub * 16 + (lane >> 2);
    const u32 at = stage + g * PITCH + i * BYTES_OF(CHUNK_COLS) + (lane & 3) * (TOGETHER / 4);
    load_own(piece.first, at);
    load_own(piece.second, at + 8 * PITCH);
#if GROUPED
    const u32 numbers = stage + CODES_BYTES + (i / IN_A_WORD * ROWS + g) * 4 + i % IN_A_WORD * 2;
    piece.scale_first = number_at(numbers), piece.scale_second = number_at(numbers + 32);
#if ZEROS
    const float first = number_at(numbers + NUMBERS_BYTES), second = number_at(numbers + NUMBERS_BYTES + 32);
#if IN_PLACE
    piece.zero_first = first, piece.zero_second = second;
#else
    piece.zero_first = pack(first, first), piece.zero_second = pack(second, second);
#endif
#endif
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
bulk(const u16 *x, const u16 *codes, const void *scales_of, const void *zeros, void *out, const float *bias, const u16 *residual, const float *norm, float eps, int tokens, int rows, int cols) {
    extern __shared__ uint4 memory[];
    Shape s = shape_of(tokens, rows, WIDEST(cols));
    u64 *barriers = (u64 *)((char *)memory + STAGES * STAGE_BYTES);
    const u32 stages = shared_address(memory), full = shared_address(barriers), empty = full + STAGES * 8;
    const u32 left = empty + STAGES * 8, taken = left + 16;  // of the parts of two tiles
    const Room room(barriers + 2 * STAGES + 4 + SHARE_BARRIERS, s);
    take_share(s, cols);
    const int chunks = s.cols / CHUNK_COLS, steps = (s.cols + STEP_COLS - 1) / STEP_COLS;

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == MULTIPLIERS) {
        for (int i = 0; i < STAGES; i++) {
            begin_barrier(full + i * 8, GROUPED ? 33 : 1);
            begin_barrier(empty + i * 8, WARPS);
        }
        for (int i = 0; i < 2; i++) {
            begin_barrier(left + i * 8, WARPS);
            begin_barrier(taken + i * 8, 1);
        }
        for (int i = 0; i < SHARE_BARRIERS; i++) begin_barrier(taken + 16 + i * 8, 1);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    enter_cluster();
    __syncthreads();
    Weights w;
    w.codes = codes;
#if BITS < 16
    w.scales = scales_of, w.zeros = zeros;
#endif
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp == WARPS) {
        bring(w, s, steps, stages, full, empty);
        know_cluster();
        leave_cluster();
        return;
    }
    if (warp > WARPS) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
#if CLUSTER > 1
        know_cluster();
        gather(room, w, s, left, taken, taken + 16, out, bias, residual, eps);
        leave_cluster();
#else
        Outputs<32> own = {lane};
        for (int tile = blockIdx.x, count = 0; tile < s.tiles; tile += gridDim.x, count++) {
            const int which = count & 1;
            own.ask(tile, s, residual);
            wait_for(left + which * 8, count >> 1 & 1);
            finish(room.partial + which * PARTIAL, room.scales, w, tile, s, out, bias, residual, own);
            __syncwarp();
            if (lane == 0) arrive(taken + which * 8);
        }
#endif
        return;
    }

    Sums acc;
    clear(acc);
    Norms norms;
    norms.ask(norm, s);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    stage(room.xs, room.offsets, room.squares, room.scales, x, norm, eps, s, norms);
    int count = 0;  // of tiles
    for (Turn at = {FIRST_TILE, 0, 0, 0}; at.tile < s.tiles; at.next(steps)) {
        const int chunk = (at.step * WARPS + warp) * CHUNKS;
        wait_for(full + at.slot * 8, at.parity);
        if (chunk < chunks) {
            Piece pieces[CHUNKS][TALL];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++)
#pragma unroll
                for (int t = 0; t < TALL; t++) load_piece(pieces[i][t], stages + at.slot * STAGE_BYTES, t, warp * CHUNKS + i);
            __syncwarp();
            if (lane == 0) arrive(empty + at.slot * 8);
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) multiply(acc, pieces[i], room.xs, room.offsets, s, (chunk + i) * CHUNK_COLS);
        } else {
            __syncwarp();  // all lanes know that the stage was full
            if (lane == 0) arrive(empty + at.slot * 8);
        }
        if (at.step == steps - 1) {
            const int which = count & 1;
            if (count >= 2) wait_for(taken + which * 8, (count >> 1 & 1) ^ 1);
            leave(acc, room.partial + which * PARTIAL);
            __syncwarp();
            if (lane == 0) arrive(left + which * 8);
            count++;
        }
    }
    know_cluster();
    leave_cluster();
}
