// What decode.cu uses beyond emulated_copies.h, and its grid: blocks in any order, some of them at the same time.

#include <algorithm>
#include <numeric>

#define MOST_TOGETHER 3

// Others see a store some time, and before its thread leaves a fence.
static std::map<int, int> unseen;  // of each thread
template <class T> static void store_some_time(T *to, T v) {
    const int thread = current;
    unseen[thread]++, some_time([=] { *to = v, unseen[thread]--; });
}
static void fence() {
    const int thread = current;
    wait([=] { return !unseen[thread]; });
}
#define __stcg store_some_time
#define __threadfence fence

static void launch_in_any_order(int x, int y, int z, int threads, int shared) {
    random_state = ~seed;
    order.resize(x * y * z);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[drawn() % i]);
    launch(x, y, z, threads, shared, 1 + drawn() % MOST_TOGETHER);
}
