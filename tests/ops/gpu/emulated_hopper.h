// What kernels that feed wgmma through the tensor copy engine use beyond emulated_copies.h: boxes of matrices, scattered in
// shared memory as the engine does it, and products of warpgroups, which find them by their descriptors.
//
// A product is under way until it is waited for: with even seeds it reads its operands as late as it may, and its sums are not
// there before; with odd ones it is computed at once. Its statements are a warp's: the last lane to arrive computes for all.

#define __grid_constant__

typedef unsigned long long u64;
// Of matrices: numbers and bytes between them from the last dimension on; of a box: rows, bytes of one, and of a number.
struct Map { const unsigned char *data; u64 sizes[4], strides[4], height, width, each; };

// 16 bytes of a row of 128 lie where the row's number sends them.
static u32 scattered(u32 at) { return at ^ (at >> 7 & 7) << 4; }

static void fetch_box(u32 to, const Map *map, const std::vector<int> &first, u32 barrier) {
    const Map m = *map;
    if (to % (m.width == 128 ? 1024 : 128)) fail("a box that does not lie at whole rows of the scatter");
    own_barrier(barrier), memset(at_address(to, m.height * m.width), 0xff, m.height * m.width);
    some_time([=] {
        std::vector<unsigned char> row(m.width);
        for (u64 r = 0; r < m.height; r++) {
            const unsigned char *from = m.data + first[0] * m.each;
            bool inside = first[1] + r < m.sizes[1];
            from += (first[1] + r) * m.strides[1];
            for (size_t i = 2; i < first.size(); i++) inside &= (u64)first[i] < m.sizes[i], from += first[i] * m.strides[i];
            for (u64 b = 0; b < m.width; b++) row[b] = inside && first[0] * m.each + b < m.sizes[0] * m.each ? from[b] : 0;
            for (u64 b = 0; b < m.width; b += 16) {
                const u32 at = to + r * m.width + b;
                memcpy(at_address(m.width == 128 ? scattered(at) : at, 16), &row[b], 16);
            }
        }
        count_bytes(barrier, (int)(m.height * m.width));
    });
}
static void fetch(u32 to, const Map *map, int col, int row, u32 barrier, u64) { fetch_box(to, map, {col, row}, barrier); }
static void fetch_for_all(u32 to, const Map *map, int col, int row, u32 barrier, u64) { fetch_box(to, map, {col, row}, barrier); }
static void fetch_queries(u32 to, const Map *map, int col, int row, u32 barrier) { fetch_box(to, map, {col, row}, barrier); }
static void fetch_page(u32 to, const Map *map, int col, int row, int head, int page, u32 barrier) { fetch_box(to, map, {col, row, head, page}, barrier); }
static void release_stage(u32 barrier) { if (current % 32 == 0) arrive(barrier); }

// Words and numbers, and matrices of 8 rows of 8 numbers whose columns lanes have, to the rows that lanes say.
static u32 word_at(u32 at) { return *(u32 *)at_address(at, 4); }
static void store_pair(u32 to, u32 first, u32 second) { *(uint2 *)at_address(to, 8) = {first, second}; }
static void store_number(u32 to, u16 v) { *(u16 *)at_address(to, 2) = v; }
static void store_matrices(u32 to, u32 first, u32 second) {
    Warp &w = warp_of(~0u);
    const u32 own[3] = {to, first, second};
    memcpy(w.in[current % 32], own, sizeof(own));
    collective(31, [](Warp &w) {
        for (int m = 0; m < (GATE ? 1 : 2); m++)
            for (int l = 0; l < 32; l++)
                for (int h = 0; h < 2; h++) ((u16 *)at_address(w.in[8 * m + l % 4 * 2 + h][0], 16))[l / 4] = (u16)(w.in[l][1 + m] >> 16 * h);
    });
}

// A product of 64 rows by `width` tokens. rows: registers, or null where they are in shared memory too, at descriptor left.
// across: columns of the right operand lie beside each other, not its rows.
struct Product { float *sums; const u32 *rows; u64 left, right; int add, width, bits; bool across; };
static std::vector<std::vector<std::vector<Product>>> products;  // of each thread, groups

static void numbers_at(double *to, const unsigned char *from, int bytes, int bits) {
    static double eighths_of[256];
    if (!eighths_of[1]) for (int b = 0; b < 256; b++) eighths_of[b] = e4m3(b);
    for (int i = 0; i < bytes * 8 / bits; i++) to[i] = bits == 8 ? eighths_of[from[i]] : to_float(((const u16 *)from)[i]);
}

// Numbers of an operand, 16 bytes of them: at a row and byte of a matrix whose groups of 8 rows a descriptor's second distance
// separates.
static void numbers_of_operand(double *to, u64 operand, int row, int byte, u64 further, int bits) {
    if (operand >> 62 != 1) fail("an operand that is not scattered");
    const u32 at = (u32)((operand & 0x3fff) + (operand >> 32 & 0x3fff) * (row / 8) + further) * 16 + row % 8 * 128 + byte;
    numbers_at(to, at_address(own_rank() << 24 | scattered(at), 16), 16, bits);
}

// For a warp, whose lanes each have one like it.
static void multiply_now(const Product *(&lanes_of)[32]) {
    static double rows[16][32], tokens[256][32];
    const Product &p = *lanes_of[0];
    const int cols = 256 / p.bits, piece = 128 / p.bits, first = current % block_threads / 32 % 4 * 16;
    for (int r = 0; r < 16; r++)
        for (int half = 0; half < 2; half++) {
            double *to = rows[r] + half * piece;
            if (!p.rows) numbers_of_operand(to, p.left, first + r, half * 16, 0, p.bits);
            else for (int t = 0; t < 4; t++) numbers_at(to + t * piece / 4, (const unsigned char *)&lanes_of[r % 8 * 4 + t]->rows[r / 8 + half * 2], 4, p.bits);
        }
    for (int n = 0; n < p.width; n += p.across ? 8 : 1)
        for (int k = 0; k < cols; k += p.across ? 1 : piece) {
            if (!p.across) { numbers_of_operand(tokens[n] + k, p.right, n, k * p.bits / 8, 0, p.bits); continue; }
            double beside[8];
            numbers_of_operand(beside, p.right, k, n % 64 * 2, (p.right >> 16 & 0x3fff) * (n / 64), p.bits);
            for (int i = 0; i < 8; i++) tokens[n + i][k] = beside[i];
        }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < p.width / 2; i++) {
            const double *a = rows[l / 4 + (i & 2) * 4], *b = tokens[i / 4 * 8 + l % 4 * 2 + (i & 1)];
            double sum = p.add ? lanes_of[l]->sums[i] : 0.f;
            for (int k = 0; k < cols; k++) sum += a[k] * b[k];
            lanes_of[l]->sums[i] = (float)sum;
        }
}

// All groups but so many, and the one that is still open.
static void finish_products(int left) {
    if ((int)products[current].size() <= left + 1) return;
    collective(30, [left](Warp &) {
        auto *own = &products[current - current % 32];
        for (; (int)own[0].size() > left + 1; ) {
            for (size_t at = 0; at < own[0].front().size(); at++) {
                const Product *each[32];
                for (int l = 0; l < 32; l++) {
                    if (own[l].front().size() != own[0].front().size()) fail("lanes of a warp have other products under way");
                    each[l] = &own[l].front()[at];
                }
                multiply_now(each);
            }
            for (int l = 0; l < 32; l++) own[l].erase(own[l].begin());
        }
    });
}
static void commit_products() {
    products[current].emplace_back();
    if (seed % 2) finish_products(0);
}

// narrow.h
template <int W = 0, int SIZE> static void multiply(float (&d)[SIZE], u64 a, u64 b, int add) {
#if BITS == 8
    const int bits = 8;
#else
    const int bits = 16;
#endif
    products[current].back().push_back({d, nullptr, a, b, add, W ? W : 2 * SIZE, bits, false});
}
// registers.h
template <int SIZE> static void multiply(float (&d)[SIZE], const u32 (&a)[4], u64 b, int add) { products[current].back().push_back({d, a, 0, b, add, 2 * SIZE, 16, false}); }
template <int SIZE> static void multiply_8(float (&d)[SIZE], const u32 (&a)[4], u64 b, int add) { products[current].back().push_back({d, a, 0, b, add, 2 * SIZE, 8, false}); }

// prefill.cu
template <int ADD, int SIZE> static void multiply_scores(float (&s)[SIZE], u64 a, u64 b) { products[current].back().push_back({s, nullptr, a, b, ADD, 2 * SIZE, 16, false}); }
template <int SIZE> static void multiply_values(float (&o)[SIZE], const u32 *a, u64 b) { products[current].back().push_back({o, a, 0, b, 1, 2 * SIZE, 16, true}); }
template <class T> static void settle(const T &, u32) {}

#if CLUSTER > 1
static void meet_cluster() { enter_cluster(), know_cluster(); }
static float4 numbers_of(u32 at) {
    if (!know[current]) fail("another block may not be there yet");
    return *(float4 *)at_address(at, 16);
}
#endif

static void launch_hopper(int x, int y, int z, int threads, int shared, int together) {
    random_state = seed;
    emulate(x, y, z, threads, shared, together, [] {
        begin_cluster(), soon = (soon + seed / 2) % 3;  // else the first blocks of many seeds would have it alike
        for (auto &own : products) if (own.size() > 1 || !own[0].empty()) fail("a product that nobody waited for");
        products.assign(lanes.size(), std::vector<std::vector<Product>>(1));
    });
    all_arrived();
}
