// What kernels with bulk copies use beyond emulated.h: loads and stores of shared memory, barriers there that count arrivals
// and bytes, copies and stores to other blocks that arrive in any order, at once or late, clusters.
//
// An address of shared memory is a block of the cluster, above, and a place, below. Where a copy goes lies nothing until it
// has arrived. A block whose threads are all done has left, and nobody may write to it.

#include <map>

#define __ldg(p) (*(p))

extern "C" unsigned long long seed = 0;
static unsigned long long random_state;
static unsigned drawn() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)(random_state >> 33);
}

// With a seed that is no multiple of three one block, the first or the last, goes on as far as it can without the others.
static int ahead;
static unsigned ahead_mostly() {
    if (ahead < 0 || drawn() % 64 == 0) return drawn();
    return (unsigned)(ahead + (int)lanes.size() - current - 1);
}

struct Barrier { int count, pending, bytes; unsigned phase; };
static std::map<u32, Barrier> barriers;
static std::vector<std::function<void()>> late;  // what happens some time
static unsigned soon;                            // 0: when nobody can go on before, 1: some time, 2: at once
static void some_time(const std::function<void()> &one) {
    if (soon == 2 || soon && drawn() % 4 == 0) one();
    else late.push_back(one);
}

static std::vector<std::vector<std::function<void()>>> words;  // of each thread, copies that no barrier knows of yet
static int cluster_arrived;
static unsigned cluster_round;
static std::vector<unsigned> in_cluster;  // of each thread, the round at which it has arrived and not waited yet
static std::vector<bool> know;            // and whether it has waited for all blocks to be there

static void all_arrived() {
    if (!late.empty()) fail("a copy or a store that nobody waited for");
    for (unsigned round : in_cluster) if (round) fail("a thread that has left between arriving at the cluster's barrier and waiting");
}

#define BARRIER_BYTES 0xb5
static u32 own_rank() { return current / block_threads; }
static u32 shared_address(const void *p) { return own_rank() << 24 | (u32)((unsigned char *)p - emulated_memory); }
static unsigned char *at_address(u32 at, int bytes) {
    Block &b = blocks[at >> 24];
    if ((at & 0xffffff) + bytes > shared_bytes) fail("past the end of shared memory");
    if (!b.running) fail("a block that has left is spoken to");
    if ((at & 0xffffff) % min(bytes, 16)) fail("an address that is not aligned");
    return memory_of(b) + (at & 0xffffff);
}
static Barrier &barrier_at(u32 at) {
    if (!barriers.count(at)) fail("a barrier that has not begun");
    const unsigned char *there = at_address(at, 8);
    for (int i = 0; i < 8; i++) if (there[i] != BARRIER_BYTES) fail("a barrier that was written over");
    return barriers[at];
}
static Barrier &own_barrier(u32 at) {
    if (at >> 24 != own_rank()) fail("a barrier of another block");
    return barrier_at(at);
}
static void begin_barrier(u32 at, int count) {
    if (barriers.count(at)) fail("a barrier that has begun");
    memset(at_address(at, 8), BARRIER_BYTES, 8);
    barriers[at] = {count, count, 0, 0};
}
static void turn(Barrier &b) {
    if (b.pending < 0) fail("too many arrive at a barrier");
    if (!b.pending && !b.bytes) b.phase++, b.pending = b.count;
}
static void arrive_at(u32 at) { Barrier &b = barrier_at(at); b.pending--, turn(b); }
static void count_bytes(u32 at, int bytes) { Barrier &b = barrier_at(at); b.bytes -= bytes, turn(b); }
static void expect(u32 at, u32 bytes) { Barrier &b = own_barrier(at); b.bytes += bytes, b.pending--, turn(b); }
static void arrive(u32 at) { own_barrier(at), arrive_at(at); }
static void wait_for(u32 at, u32 parity) { Barrier &b = own_barrier(at); wait([&] { return (b.phase & 1) != parity; }); }
static void wait_for_others(u32 at, u32 parity) { wait_for(at, parity); }

static void copy_row(u32 to, const void *from, u32 bytes, u32 barrier, unsigned long long policy) {
    if (to % 16 || (uintptr_t)from % 16 || bytes % 16) fail("a copy that is not aligned");
    own_barrier(barrier), memset(at_address(to, bytes), 0xff, bytes);
    some_time([=] { memcpy(at_address(to, bytes), from, bytes), count_bytes(barrier, bytes); });
}
static unsigned char *own_address(u32 at, int bytes) {
    if (at >> 24 != own_rank()) fail("shared memory of another block");
    return at_address(at, bytes);
}
template <class T, class... Each> static void load_shared(u32 at, T &first, Each &...others) {
    const unsigned char *from = own_address(at, sizeof(T) * (1 + sizeof...(others)));
    memcpy(&first, from, sizeof(T));
    ((memcpy(&others, from += sizeof(T), sizeof(T))), ...);
}
template <class T, class... Each> static void store_shared(u32 at, T first, Each... others) {
    const T each[] = {first, others...};
    memcpy(own_address(at, sizeof(each)), each, sizeof(each));
}
static void copy_word(u32 to, const void *from) {
    if ((uintptr_t)from % 4) fail("a copy that is not aligned");
    memset(at_address(to, 4), 0xff, 4);
    words[current].push_back([=] { memcpy(at_address(to, 4), from, 4); });
}
static void arrive_after_words(u32 barrier) {
    const auto own = words[current];
    words[current].clear();
    own_barrier(barrier);
    some_time([=] { for (auto &copy : own) copy(); arrive_at(barrier); });
}
static u32 there(u32 at, int rank) {
    if (at >> 24 != own_rank() || rank < 0 || rank >= (int)blocks.size()) fail("no block of the cluster");
    return (u32)rank << 24 | at & 0xffffff;
}
static void send(u32 to, float v, u32 barrier) {
    if (!know[current]) fail("another block may not be there yet");
    if (to >> 24 != barrier >> 24) fail("a store that counts at another block's barrier");
    some_time([=] { memcpy(at_address(to, 4), &v, 4), count_bytes(barrier, 4); });
}

static void arrive_at_cluster() {
    if (in_cluster[current]) fail("a thread that arrives at the cluster's barrier twice");
    in_cluster[current] = cluster_round + 1, cluster_arrived++;
}
// Threads that have left are not waited for.
static bool cluster_has_met(unsigned round) {
    int running = 0;
    for (const Block &b : blocks) running += b.running;
    if (cluster_arrived && cluster_arrived >= running) cluster_arrived = 0, cluster_round++;
    return cluster_round >= round;
}
static void wait_for_cluster() {
    const unsigned wanted = in_cluster[current];
    if (!wanted) fail("a thread that waits at the cluster's barrier without having arrived");
    wait([=] { return cluster_has_met(wanted); });
    in_cluster[current] = 0, know[current] = true;
}

// Barriers of some threads of a block, by block and number.
struct Meeting { int arrived; unsigned round; };
static std::map<std::pair<u32, int>, Meeting> meetings;
static Meeting &bar_arrive(int number, int threads) {
    Meeting &m = meetings[{own_rank(), number}];
    if (++m.arrived == threads) m.arrived = 0, m.round++;
    return m;
}
static void bar_sync(int number, int threads) {
    const unsigned round = meetings[{own_rank(), number}].round;
    const Meeting &m = bar_arrive(number, threads);
    wait([&] { return m.round != round; });
}

// Where everybody stands when nobody can go on.
static void tell() {
    for (auto &[at, b] : barriers) fprintf(stderr, "block %u, barrier at %u: %d of %d to come, %d bytes, phase %u\n", at >> 24, at & 0xffffff, b.pending, b.count, b.bytes, b.phase);
    for (size_t i = 0; i < warps.size(); i++)
        if (warps[i].arrived) fprintf(stderr, "warp %zu: %d lanes at collective %d\n", i / 3, warps[i].arrived, warps[i].what);
    for (size_t b = 0; b < blocks.size(); b++) fprintf(stderr, "block %zu: %d threads\n", b, blocks[b].running);
    for (auto &[at, m] : meetings) fprintf(stderr, "block %u, barrier %d: %d have arrived\n", at.first, at.second, m.arrived);
}

static void begin_cluster() {
    all_arrived(), barriers.clear(), words.assign(lanes.size(), {});
    cluster_arrived = 0, cluster_round = 0, in_cluster.assign(lanes.size(), 0), know.assign(lanes.size(), false);
    meetings.clear();
    ahead = seed % 3 == 0 ? -1 : seed % 3 == 1 ? 0 : (int)lanes.size() - block_threads;
    chance = ahead_mostly, soon = drawn() % 3;
    happens = [](bool stuck) {
        if (late.empty() && stuck) tell();
        if (late.empty() || !(stuck || soon && drawn() % 4 == 0)) return false;
        std::swap(late[drawn() % late.size()], late.back());
        const auto one = late.back();
        late.pop_back(), one();
        return true;
    };
}

static void launch(int x, int y, int z, int threads, int shared, int together) {
    random_state = seed;
    emulate(x, y, z, threads, shared, together, begin_cluster);
    all_arrived();
}

static void store(void *out, size_t at, float y) {
#if FLOAT32
    ((float *)out)[at] = y;
#else
    ((u16 *)out)[at] = (u16)(pack(y, 0.f) & 0xffff);
#endif
}
#ifndef GATE
#define GATE 0
#endif
static float activate(float v) {
    return GATE == 1 ? v / (1.f + expf(-v)) : 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}
