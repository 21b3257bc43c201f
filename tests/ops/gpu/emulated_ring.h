// What ring.cu uses beyond emulated_copies.h: boxes of matrices that come through the tensor copy engine, and products of
// warpgroups. Rows of a box lie one after the other, for nobody else sees how the engine scatters them.

#define __grid_constant__

typedef unsigned long long u64;
struct Map { u64 data, rows, row_bytes, box_rows; };

static void begin_ring(u32 full, u32 empty, int stages, int warps) {
    for (int s = 0; s < stages; s++) begin_barrier(full + s * 8, 1), begin_barrier(empty + s * 8, warps);
}

static void know_map(const Map *) {}
static void fetch(u32 to, const Map *map, int col, int row, u32 barrier, u64) {
    const Map m = *map;
    if (to % 1024) fail("a box that does not lie at whole 1024 bytes");
    own_barrier(barrier), memset(at_address(to, 16), 0xff, m.box_rows * 128);
    some_time([=] {
        at_address(to + m.box_rows * 128 - 16, 16);
        for (u64 r = 0; r < m.box_rows; r++)
            for (int b = 0; b < 128; b++) {
                const u64 at = (u64)col * BITS / 8 + b;
                const bool inside = row + r < m.rows && at < m.row_bytes;
                at_address(to, 16)[r * 128 + b] = inside ? ((const unsigned char *)m.data)[(row + r) * m.row_bytes + at] : 0;
            }
        count_bytes(barrier, (int)m.box_rows * 128);
    });
}

static float number_in(const unsigned char *row, int i) {
#if BITS == 8
    return e4m3(row[i]);
#else
    return to_float(((const u16 *)row)[i]);
#endif
}

// A thread's part of 64 rows by N tokens, of a box's columns.
static void multiply_box(float (&d)[N / 2], u32 w, u32 x, int add) {
    const int lane = current % 32, warp = current % block_threads / 32 % 4;
    const unsigned char *rows = at_address(w, 16), *tokens = at_address(x, 16);
    for (int i = 0; i < N / 2; i++) {
        const unsigned char *a = rows + (warp * 16 + lane / 4 + (i & 2) * 4) * 128;
        const unsigned char *b = tokens + (i / 4 * 8 + lane % 4 * 2 + (i & 1)) * 128;
        double sum = add ? d[i] : 0.f;
        for (int k = 0; k < 1024 / BITS; k++) sum += (double)number_in(a, k) * number_in(b, k);
        d[i] = (float)sum;
    }
    __syncwarp();  // lanes of a warp do it together
}

static void add_box(float (&sums)[N / 2], float (&d)[N / 2], float upper, float lower) {
    for (int i = 0; i < N / 2; i++) sums[i] += d[i] * (i & 2 ? lower : upper);
}

#if CLUSTER > 1
static void meet_cluster() { enter_cluster(), know_cluster(); }
static float4 numbers_of(u32 at) {
    if (!know[current]) fail("another block may not be there yet");
    return *(float4 *)at_address(at, 16);
}
#endif
