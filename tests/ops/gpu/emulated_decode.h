// What decode.cu uses beyond emulated_copies.h, and its grid: blocks in any order, some of them at the same time, or
// clusters of the blocks beside each other in any order.

#include <algorithm>
#include <numeric>

#define MOST_TOGETHER 3
#ifndef CLUSTER
#define CLUSTER 0
#endif

// Others see a store some time, and before any thread of its block leaves a fence: one that fences for all of them has
// had a barrier behind their stores.
static std::map<int, int> unseen;  // of each block
template <class T> static void store_some_time(T *to, T v) {
    const int block = current / block_threads;
    unseen[block]++, some_time([=] { *to = v, unseen[block]--; });
}
static void fence() {
    const int block = current / block_threads;
    wait([=] { return !unseen[block]; });
}
#define __stcg store_some_time
#define __threadfence fence

#if CLUSTER
static float remote(const float *p, int rank) {
    if (!know[current]) fail("another block may not be there yet");
    if (rank < 0 || rank >= (int)blocks.size() || !blocks[rank].running) fail("a block that is not there is read");
    auto inside = [&](std::vector<unsigned char> Block::*kind) {  // dynamic memory, or what stands beside it
        auto &own = own_block.*kind;
        return (unsigned char *)p >= own.data() && (unsigned char *)p + 4 <= own.data() + own.size();
    };
    const auto kind = inside(&Block::memory) ? &Block::memory : &Block::own;
    if (!inside(kind)) fail("past the end of shared memory");
    return *(float *)(aligned(blocks[rank].*kind) + ((unsigned char *)p - aligned(own_block.*kind)));
}
#endif

static void launch_in_any_order(int x, int y, int z, int threads, int shared) {
    random_state = ~seed;
    const int each = CLUSTER ? x : 1;
    std::vector<int> first(x * y * z / each);
    std::iota(first.begin(), first.end(), 0);
    for (size_t i = first.size(); i > 1; i--) std::swap(first[i - 1], first[drawn() % i]);
    order.clear();
    for (int one : first)
        for (int i = 0; i < each; i++) order.push_back(one * each + i);
    launch(x, y, z, threads, shared, CLUSTER ? x : 1 + drawn() % MOST_TOGETHER);
}
