// What kernels that feed wgmma through the tensor copy engine use beyond emulated_copies.h: boxes of matrices, scattered in
// shared memory as the engine does it, and products of warpgroups, which find them by their descriptors.
//
// A product is under way until it is waited for: with even seeds it reads its operands as late as it may, and its sums are not
// there before; with odd ones it is computed at once. Its statements are a warp's: the last lane to arrive computes for all.

#define __grid_constant__

typedef unsigned long long u64;
// From the last dimension on, of matrices: numbers and bytes between them; of a box: numbers. each: bytes of a number.
struct Map { const unsigned char *data; u64 sizes[5], strides[5], box[5], each; };

// 16 bytes of a row of 128 lie where the row's number sends them.
static u32 scattered(u32 at) { return at ^ (at >> 7 & 7) << 4; }

static void place_box(u32 to, const Map &m, const std::vector<int> &first, u32 barrier) {
    const u64 width = m.box[0] * m.each, rows = m.box[1] * m.box[2] * m.box[3] * m.box[4];
    if (to % (width == 128 ? 1024 : 128)) fail("a box that does not lie at whole rows of the scatter");
    barrier_at(barrier), memset(at_address(to, rows * width), 0xff, rows * width);
    some_time([=] {
        std::vector<unsigned char> row(width);
        for (u64 r = 0; r < rows; r++) {
            const unsigned char *from = m.data + first[0] * m.each;
            bool inside = true;
            u64 left = r;
            for (size_t i = 1; i < first.size(); left /= m.box[i++]) {
                const u64 at = first[i] + left % m.box[i];
                inside &= at < m.sizes[i], from += at * m.strides[i];
            }
            for (u64 b = 0; b < width; b++) row[b] = inside && first[0] * m.each + b < m.sizes[0] * m.each ? from[b] : 0;
            for (u64 b = 0; b < width; b += 16) {
                const u32 at = to + r * width + b;
                memcpy(at_address(width == 128 ? scattered(at) : at, 16), &row[b], 16);
            }
        }
        count_bytes(barrier, (int)(rows * width));
    });
}
// For this block, or to the same place of some blocks: a bit for each.
static void fetch_box(u32 to, const Map *map, const std::vector<int> &first, u32 barrier, u32 ranks = 0) {
    own_barrier(barrier);
    if (!ranks) return place_box(to, *map, first, barrier);
    if (!know[current]) fail("another block may not be there yet");
    for (u32 rank = 0; rank < 32; rank++)
        if (ranks >> rank & 1) place_box(there(to, rank), *map, first, there(barrier, rank));
}

// Matrices of 8 rows of 8 numbers whose columns lanes have, to the rows that lanes say.
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
// across: columns of the right operand lie beside each other, not its rows. Products of bytes have whole sums.
enum Type { SIXTEEN, EIGHTHS, SIGNED, UNSIGNED };
struct Product { void *sums; const u32 *rows; u64 left, right; int add, width; Type type; bool across; };
static std::vector<std::vector<std::vector<Product>>> products;  // of each thread, groups

static void numbers_at(double *to, const unsigned char *from, int bytes, Type type) {
    static double eighths_of[256];
    if (!eighths_of[1]) for (int b = 0; b < 256; b++) eighths_of[b] = e4m3(b);
    for (int i = 0; i < (type == SIXTEEN ? bytes / 2 : bytes); i++)
        to[i] = type == SIXTEEN ? to_float(((const u16 *)from)[i]) : type == EIGHTHS ? eighths_of[from[i]] : type == SIGNED ? (signed char)from[i] : from[i];
}

// Numbers of an operand, 16 bytes of them: at a row and byte of a matrix whose groups of 8 rows a descriptor's second distance
// separates.
static void numbers_of_operand(double *to, u64 operand, int row, int byte, u64 further, Type type) {
    if (operand >> 62 != 1) fail("an operand that is not scattered");
    const u32 at = (u32)((operand & 0x3fff) + (operand >> 32 & 0x3fff) * (row / 8) + further) * 16 + row % 8 * 128 + byte;
    numbers_at(to, at_address(own_rank() << 24 | scattered(at), 16), 16, type);
}

// For a warp, whose lanes each have one like it.
static void multiply_now(const Product *(&lanes_of)[32]) {
    static double rows[16][32], tokens[256][32];
    const Product &p = *lanes_of[0];
    const int each = p.type == SIXTEEN ? 2 : 1, cols = 32 / each, piece = cols / 2, first = current % block_threads / 32 % 4 * 16;
    const bool whole = p.type >= SIGNED;
    const Type right = whole ? SIGNED : p.type;
    for (int r = 0; r < 16; r++)
        for (int half = 0; half < 2; half++) {
            double *to = rows[r] + half * piece;
            if (!p.rows) numbers_of_operand(to, p.left, first + r, half * 16, 0, p.type);
            else for (int t = 0; t < 4; t++) numbers_at(to + t * piece / 4, (const unsigned char *)&lanes_of[r % 8 * 4 + t]->rows[r / 8 + half * 2], 4, p.type);
        }
    for (int n = 0; n < p.width; n += p.across ? 8 : 1)
        for (int k = 0; k < cols; k += p.across ? 1 : piece) {
            if (!p.across) { numbers_of_operand(tokens[n] + k, p.right, n, k * each, 0, right); continue; }
            double beside[8];
            numbers_of_operand(beside, p.right, k, n % 64 * 2, (p.right >> 16 & 0x3fff) * (n / 64), right);
            for (int i = 0; i < 8; i++) tokens[n + i][k] = beside[i];
        }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < p.width / 2; i++) {
            const double *a = rows[l / 4 + (i & 2) * 4], *b = tokens[i / 4 * 8 + l % 4 * 2 + (i & 1)];
            float &number = ((float *)lanes_of[l]->sums)[i];
            int &count = ((int *)lanes_of[l]->sums)[i];
            double sum = !p.add ? 0 : whole ? count : number;
            for (int k = 0; k < cols; k++) sum += a[k] * b[k];
            if (!whole) number = (float)sum;
            else if (sum != (count = (int)sum)) fail("a whole sum that is too large");
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

static void begin_product(const Product &one) { products[current].back().push_back(one); }

// narrow.h
template <int W = 0, int SIZE> static void multiply(float (&d)[SIZE], u64 a, u64 b, int add) {
#if BITS == 8
    const Type type = EIGHTHS;
#else
    const Type type = SIXTEEN;
#endif
    begin_product({d, nullptr, a, b, add, W ? W : 2 * SIZE, type, false});
}
// registers.h
template <int SIZE> static void multiply(float (&d)[SIZE], const u32 (&a)[4], u64 b, int add) { begin_product({d, a, 0, b, add, 2 * SIZE, SIXTEEN, false}); }
template <int SIZE> static void multiply_8(float (&d)[SIZE], const u32 (&a)[4], u64 b, int add) { begin_product({d, a, 0, b, add, 2 * SIZE, EIGHTHS, false}); }

// experts_digits.h
template <int CODE, int SIZE> static void multiply_bytes(int (&d)[SIZE], const u32 (&a)[4], u32 at, int add) {
    begin_product({d, a, 0, (u64)1 << 62 | (u64)64 << 32 | at, add, 2 * SIZE, CODE == 8 ? SIGNED : UNSIGNED, false});
}

// prefill.cu
template <int ADD, int SIZE> static void multiply_scores(float (&s)[SIZE], u64 a, u64 b) { begin_product({s, nullptr, a, b, ADD, 2 * SIZE, SIXTEEN, false}); }
template <int SIZE> static void multiply_values(float (&o)[SIZE], const u32 *a, u64 b) { begin_product({o, a, 0, b, 1, 2 * SIZE, SIXTEEN, true}); }
template <class T> static void settle(const T &, u32) {}

#if CLUSTER > 1
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
