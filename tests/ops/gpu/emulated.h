// CUDA C++ of one kernel as C++: threads are fibers, a warp's collectives wait for all its lanes, clusters of blocks run one
// after the other, blocks of a cluster at the same time. Instructions are those that the packed kernels use, with the
// layouts of fragments that PTX documents.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static

struct __align__(8) int2 { int x, y; };
struct __align__(8) uint2 { u32 x, y; };
struct __align__(16) uint4 { u32 x, y, z, w; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }
template <class T> static T max(T a, T b) { return a > b ? a : b; }

struct Index { int x, y, z; };
struct Fiber {
    ucontext_t context;  // where it begins
    jmp_buf at;          // where it goes on, once it has begun: without a call of the system
    bool begun;
    Index place, block;
    bool done;
    const std::function<bool()> *ready;  // what it waits for, if anything
};
struct Block {
    std::vector<unsigned char> memory, own;
    int running, at_barrier = 0;
    unsigned barrier_round = 0;
    int any[2] = {};  // what threads at the barrier brought along, of this round and of the next
};
struct Warp {
    int arrived = 0, what = 0;
    unsigned round = 0;
    u32 in[32][8], out[32][4];
};

static std::vector<Fiber> lanes;
static std::vector<std::unique_ptr<char[]>> stacks;  // of as many lanes as there ever were
static std::vector<Block> blocks;  // of a cluster
static std::vector<Warp> warps;    // and of each its halves, which may have collectives of their own
static int current, block_threads, shared_bytes;
static Index gridDim;
static ucontext_t host;
static std::function<void()> body;

#define threadIdx (lanes[current].place)
#define blockIdx (lanes[current].block)
#define STACK (1 << 16)
#define PAST 1024  // bytes behind shared memory that are looked at
#define own_block (blocks[current / block_threads])
#define emulated_memory (memory_of(own_block))

#define ALIGNED 1024  // bytes, that shared memory begins at a multiple of in every block
static unsigned char *aligned(std::vector<unsigned char> &memory) { return (unsigned char *)(((uintptr_t)memory.data() + ALIGNED - 1) / ALIGNED * ALIGNED); }
static unsigned char *memory_of(Block &b) { return aligned(b.memory); }
// What a block has beside its dynamic memory.
static unsigned char *emulated_static(size_t bytes) {
    auto &own = own_block.own;
    if (own.empty()) own.assign(bytes + ALIGNED, 0xff);
    return aligned(own);
}

[[noreturn]] static void fail(const char *why) {
    fprintf(stderr, "emulated kernel: %s (block %d %d %d, thread %d)\n", why, blockIdx.x, blockIdx.y, blockIdx.z, current);
    abort();
}

// What may happen when threads take turns, and what must when none can go on; false: nothing can.
static std::function<bool(bool stuck)> happens;
static unsigned (*chance)();  // which thread is next; without it they take turns

static int next_lane() {
    const int count = (int)lanes.size();
    for (;;) {
        if (happens) happens(false);
        const int first = current + 1 + (chance ? chance() % count : 0);
        for (int i = 0; i < count; i++) {
            Fiber &l = lanes[(first + i) % count];
            if (!l.done && (!l.ready || (*l.ready)())) return (first + i) % count;
        }
        if (!happens || !happens(true)) fail("a collective that not all threads reach");
    }
}

static void go_on() {
    Fiber &l = lanes[current];
    if (l.begun) _longjmp(l.at, 1);
    l.begun = true;
    setcontext(&l.context);
}

static void wait(const std::function<bool()> &ready) {
    if (ready()) return;
    const int from = current;
    lanes[from].ready = &ready;
    current = next_lane();
    if (current != from && !_setjmp(lanes[from].at)) go_on();
    lanes[current].ready = nullptr;
}

static Warp &warp_of(u32 mask) {
    const int each = (block_threads + 31) / 32, thread = current % block_threads;
    return warps[3 * (current / block_threads * each + thread / 32) + (mask == ~0u ? 0 : mask & 1 ? 1 : 2)];
}

// `compute` once all lanes of the warp, or of its half, are here.
template <class F> static void collective(int what, F compute, u32 mask = ~0u) {
    Warp &w = warp_of(mask);
    if (w.arrived && w.what != what) fail("lanes of a warp are at different collectives");
    w.what = what;
    const unsigned round = w.round;
    if (++w.arrived == __builtin_popcount(mask)) compute(w), w.arrived = 0, w.round++;
    else wait([&] { return w.round != round; });
}

static u32 bits_of(float v) { u32 b; memcpy(&b, &v, 4); return b; }
static float float_of(u32 b) { float v; memcpy(&v, &b, 4); return v; }

static u32 shuffled(u32 v, int other, int what, u32 mask = ~0u) {
    const int lane = current % 32;
    Warp &w = warp_of(mask);
    w.in[lane][0] = v, w.in[lane][1] = other;
    collective(what, [](Warp &w) { for (int l = 0; l < 32; l++) w.out[l][0] = w.in[w.in[l][1] & 31][0]; }, mask);
    return w.out[lane][0];
}
static float __shfl_xor_sync(u32 mask, float v, int d) { return float_of(shuffled(bits_of(v), current % 32 ^ d, 1, mask)); }
static u32 __shfl_xor_sync(u32 mask, u32 v, int d) { return shuffled(v, current % 32 ^ d, 13, mask); }
static int __shfl_xor_sync(u32 mask, int v, int d) { return (int)shuffled((u32)v, current % 32 ^ d, 14, mask); }
static unsigned long long __shfl_sync(u32, unsigned long long v, int l) {
    const unsigned long long high = shuffled((u32)(v >> 32), l, 16);
    return high << 32 | shuffled((u32)v, l, 17);
}
static unsigned long long __shfl_xor_sync(u32, unsigned long long v, int d) { return __shfl_sync(~0u, v, current % 32 ^ d); }
static float __shfl_sync(u32, float v, int l) { return float_of(shuffled(bits_of(v), l, 2)); }
static int __shfl_sync(u32, int v, int l) { return (int)shuffled((u32)v, l, 3); }
static bool __any_sync(u32, bool v) {
    Warp &w = warp_of(~0u);
    w.in[current % 32][0] = v;
    collective(4, [](Warp &w) {
        u32 any = 0;
        for (int l = 0; l < 32; l++) any |= w.in[l][0];
        for (int l = 0; l < 32; l++) w.out[l][0] = any;
    });
    return w.out[current % 32][0];
}
static u32 __ballot_sync(u32, bool v) {
    Warp &w = warp_of(~0u);
    w.in[current % 32][0] = v;
    collective(9, [](Warp &w) {
        u32 all = 0;
        for (int l = 0; l < 32; l++) all |= (w.in[l][0] & 1) << l;
        for (int l = 0; l < 32; l++) w.out[l][0] = all;
    });
    return w.out[current % 32][0];
}
template <class F> static u32 reduced(u32 v, F less) {
    Warp &w = warp_of(~0u);
    w.in[current % 32][0] = v;
    collective(11, [less](Warp &w) {
        u32 best = w.in[0][0];
        for (int l = 1; l < 32; l++)
            if (less(w.in[l][0], best)) best = w.in[l][0];
        for (int l = 0; l < 32; l++) w.out[l][0] = best;
    });
    return w.out[current % 32][0];
}
static u32 __reduce_min_sync(u32, u32 v) { return reduced(v, [](u32 a, u32 b) { return a < b; }); }
static u32 __reduce_max_sync(u32, u32 v) { return reduced(v, [](u32 a, u32 b) { return a > b; }); }
static int __reduce_add_sync(u32, int v) {
    Warp &w = warp_of(~0u);
    w.in[current % 32][0] = (u32)v;
    collective(15, [](Warp &w) {
        u32 sum = 0;
        for (int l = 0; l < 32; l++) sum += w.in[l][0];
        for (int l = 0; l < 32; l++) w.out[l][0] = sum;
    });
    return (int)w.out[current % 32][0];
}
static u32 __match_any_sync(u32, u32 v) {
    Warp &w = warp_of(~0u);
    w.in[current % 32][0] = v;
    collective(12, [](Warp &w) {
        for (int l = 0; l < 32; l++) {
            w.out[l][0] = 0;
            for (int m = 0; m < 32; m++) w.out[l][0] |= (u32)(w.in[m][0] == w.in[l][0]) << m;
        }
    });
    return w.out[current % 32][0];
}
static u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((uint64_t)high << 32 | low) >> (by & 31)); }
static int __popc(u32 v) { return __builtin_popcount(v); }
static void __syncwarp() { collective(5, [](Warp &) {}); }
static void open(Block &b) { b.at_barrier = 0, b.any[++b.barrier_round & 1] = 0; }
static void __syncthreads() {
    Block &b = own_block;
    const unsigned round = b.barrier_round;
    if (++b.at_barrier == b.running) open(b);
    else wait([&] { return b.barrier_round != round; });
}
static int __syncthreads_or(int v) {
    int &any = own_block.any[own_block.barrier_round & 1];
    any |= v != 0;
    __syncthreads();
    return any;
}
static void __threadfence() {}
static u32 atomicOr(u32 *p, u32 v) { u32 old = *p; *p |= v; return old; }
template <class T, class V> static T atomicAdd(T *p, V v) { T old = *p; *p += v; return old; }
template <class T> static T atomicMax(T *p, T v) { T old = *p; *p = max(old, v); return old; }
template <class T, class V> static T atomicExch(T *p, V v) { T old = *p; *p = v; return old; }
template <class T> static T __ldcg(const T *p) { return *p; }
template <class T> static T __ldcs(const T *p) { return *p; }
template <class T> static void __stcg(T *p, T v) { *p = v; }
static float __int_as_float(int v) { return float_of((u32)v); }
static int __float_as_int(float v) { return (int)bits_of(v); }
static float __uint_as_float(u32 v) { return float_of(v); }
static u32 __float_as_uint(float v) { return bits_of(v); }
static int __float2int_rn(float v) { return std::isnan(v) ? 0 : (int)fminf(fmaxf(rintf(v), -2147483648.f), 2147483520.f); }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fdividef(float a, float b) { return a / b; }
static float rsqrtf(float v) { return 1.f / sqrtf(v); }
static u32 __byte_perm(u32 a, u32 b, u32 s) {
    const uint64_t both = (uint64_t)b << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) r |= (u32)(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
    return r;
}

// Numbers of 16 and 8 bits.
static float half_to_float(u32 b) { _Float16 h; u16 s = (u16)b; memcpy(&h, &s, 2); return (float)h; }
static u16 to_half(double v) { _Float16 h = (_Float16)v; u16 s; memcpy(&s, &h, 2); return s; }
static u32 halves(float lo, float hi) { return to_half(lo) | (u32)to_half(hi) << 16; }
template <class F> static u32 each_half(F f) { return to_half(f(0)) | (u32)to_half(f(16)) << 16; }
static u32 half_mul(u32 a, u32 b) { return each_half([=](int s) { return (double)half_to_float(a >> s) * half_to_float(b >> s); }); }
static u32 half_fma(u32 a, u32 b, u32 c) { return each_half([=](int s) { return (double)half_to_float(a >> s) * half_to_float(b >> s) + half_to_float(c >> s); }); }
static u32 half_fnma(u32 a, u32 b, u32 c) { return half_fma(a ^ 0x80008000u, b, c); }
static float e4m3(u32 b) {
    const int e = b >> 3 & 15, m = b & 7;
    const float v = e == 15 && m == 7 ? NAN : e ? ldexpf(1.f + m / 8.f, e - 7) : ldexpf(m / 8.f, -6);
    return b & 128 ? -v : v;
}
static u32 e4m3_to_halves(u32 b) { return halves(e4m3(b & 255), e4m3(b >> 8 & 255)); }
static u32 one_e4m3(float v) {
    const float a = fminf(fabsf(v), 448.f);
    int e;
    frexpf(a, &e);
    const float step = ldexpf(1.f, max(e - 1, -6) - 3), r = rintf(a / step) * step;
    u32 best = 0;
    for (u32 b = 0; b < 127; b++) if (e4m3(b) == r) best = b;
    return best | (std::signbit(v) ? 128 : 0);
}
static u32 to_e4m3(float lo, float hi) { return one_e4m3(lo) | one_e4m3(hi) << 8; }
static u16 to_bfloat(float v) { u32 b = bits_of(v); return std::isnan(v) ? 0x7fff : (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16); }
#if HALF
static float to_float(u32 b) { return half_to_float(b); }
static u32 pack(float lo, float hi) { return halves(lo, hi); }
#else
static float to_float(u32 b) { return float_of(b << 16); }
static u32 pack(float lo, float hi) { return to_bfloat(lo) | (u32)to_bfloat(hi) << 16; }
#endif
static void touch(const void *) {}
static float round_trip(float v) { return to_float(pack(v, 0.f) & 0xffff); }

// mma.m16n8k16: A row-major [16, 16], B [16, 8] by columns, C [16, 8].
template <class F> static void product(float *c, const u32 (&r)[6], int what, F number) {
    Warp &w = warp_of(~0u);
    const int lane = current % 32;
    memcpy(w.in[lane], r, sizeof(r));
    collective(what, [&](Warp &w) {
        float a[16][16], b[16][8];
        for (int l = 0; l < 32; l++)
            for (int n = 0; n < 4; n++)
                for (int h = 0; h < 2; h++) {
                    a[l / 4 + 8 * (n & 1)][l % 4 * 2 + h + 8 * (n >> 1)] = number(w.in[l][n] >> 16 * h & 0xffff);
                    if (n < 2) b[l % 4 * 2 + h + 8 * n][l / 4] = number(w.in[l][4 + n] >> 16 * h & 0xffff);
                }
        for (int l = 0; l < 32; l++)
            for (int n = 0; n < 4; n++) {
                double sum = 0;
                for (int k = 0; k < 16; k++) sum += (double)a[l / 4 + 8 * (n >> 1)][k] * b[k][l % 4 * 2 + (n & 1)];
                w.out[l][n] = bits_of((float)sum);
            }
    });
    for (int n = 0; n < 4; n++) c[n] += float_of(w.out[lane][n]);
}
static void mma_half(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    product(c, {a0, a1, a2, a3, b0, b1}, 6, [](u32 b) { return half_to_float(b); });
}
static void mma_first(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
    mma_half(c, a0, a1, a2, a3, b0, b1);
}
static void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    product(c, {a0, a1, a2, a3, b0, b1}, 7, [](u32 b) { return to_float(b); });
}
static u32 transposed(u32 v) {
    Warp &w = warp_of(~0u);
    w.in[current % 32][0] = v;
    collective(8, [](Warp &w) {
        for (int l = 0; l < 32; l++) {
            u32 r = 0;
            for (int h = 0; h < 2; h++) {
                const int row = l % 4 * 2 + h, column = l / 4;
                r |= (w.in[row * 4 + column / 2][0] >> 16 * (column & 1) & 0xffff) << 16 * h;
            }
            w.out[l][0] = r;
        }
    });
    return w.out[current % 32][0];
}

// Copies arrive when they are waited for, as late as they may.
struct Copy { unsigned char *to; const unsigned char *from; };
static std::vector<std::vector<std::vector<Copy>>> copies;  // by thread, groups
static void copy_16(unsigned char *to, const unsigned char *from) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fail("a copy that is not aligned");
    copies[current].back().push_back({to, from});
    memset(to, 0xff, 16);
}
static void end_copies() { copies[current].emplace_back(); }
template <int LEFT> static void wait_for_copies() {
    auto &own = copies[current];
    for (int i = 0; i + 1 + LEFT < (int)own.size(); i++) {
        for (auto &c : own[i]) memcpy(c.to, c.from, 16);
        own[i].clear();
    }
    if (LEFT == 0) {
        for (auto &c : own.back()) memcpy(c.to, c.from, 16);
        own.back().clear();
    }
}

static void enter() {
    body();
    lanes[current].done = true;
    Block &b = own_block;
    b.running--;
    if (b.at_barrier && b.at_barrier == b.running) open(b);
    for (auto &l : lanes)
        if (!l.done) {
            current = next_lane();
            go_on();
        }
    setcontext(&host);
}

static std::vector<int> order;  // in which blocks run, if not as they are counted

static void emulate(int x, int y, int z, int threads, int shared, int cluster = 1, const std::function<void()> &begin = {}) {
    gridDim = {x, y, z};
    block_threads = threads, shared_bytes = shared;
    for (int first = 0; first < x * y * z; first += cluster) {
        const int count = min(cluster, x * y * z - first);
        lanes.resize(threads * count);
        blocks.assign(count, Block());
        for (auto &b : blocks) b.memory.assign(shared + ALIGNED + PAST, 0xff), b.running = threads;
        warps.assign(3 * count * ((threads + 31) / 32), Warp());
        copies.assign(threads * count, std::vector<std::vector<Copy>>(1));
        for (int t = 0; t < threads * count; t++) {
            Fiber &l = lanes[t];
            const int n = first + t / threads, b = order.empty() ? n : order[n];
            l.place = {t % threads, 0, 0}, l.block = {b % x, b / x % y, b / x / y}, l.done = l.begun = false, l.ready = nullptr;
            if (t == (int)stacks.size()) stacks.emplace_back(new char[STACK]);
            getcontext(&l.context);
            l.context.uc_stack.ss_sp = stacks[t].get(), l.context.uc_stack.ss_size = STACK, l.context.uc_link = nullptr;
            makecontext(&l.context, ::enter, 0);
        }
        current = 0;
        if (begin) begin();
        lanes[0].begun = true;
        swapcontext(&host, &lanes[0].context);
        for (auto &b : blocks)
            for (int i = 0; i < PAST; i++)
                if (memory_of(b)[shared + i] != 0xff) fail("shared memory was written past its end");
    }
}
