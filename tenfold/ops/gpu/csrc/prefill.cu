// Attention of chunks of new tokens over the paged cache: causal, prefix included, keys and values read in place.
//
// A block stays on its multiprocessor and takes items from a queue: a tile of ROWS queries of one head of one request.
// One warp is the producer: it chooses items and lets the tensor copy engine bring queries, and tiles of TILE keys and
// values, page by page, into rings of stages in shared memory. WGS warpgroups of 64 queries each multiply. While a
// warpgroup computes weights of one tile of scores, the tensor cores multiply the scores of the tile after and the values
// of the tile before (OVERLAP), and with PING the warpgroups take turns, so that one multiplies while another weighs.
// Keys are walked from the last visible to the first, so what needs a mask comes first.
//
// A page of keys of 64 columns is a box: its rows of 128 bytes, swizzled, lie one after the other in shared memory, and
// pages one after the other are what wgmma wants of a tile (groups of 8 rows 1024 bytes apart). Values are the operand
// whose columns are contiguous ("N-major"): 16 tokens are 2048 bytes, the next 64 columns lie TILE * 128 bytes further.
// Scores leave the first product just as the second wants its left operand in registers.
//
// Items of a head group whose context fits into the L2 cache together follow each other, those that see most first.
//
// SOFTMAX 0 online: the running maximum is subtracted. 1 lazy: it is replaced only when it is exceeded by more than 2^8.
// 2 unified: phi of the head is subtracted whatever the scores are; where a row's sum leaves (least, most) or a result is
// not finite, its item goes back to the producer, which lets it be computed again, lazily. Scores are in log2 units.
//
// Compile-time: HALF · D head dimension 64 or 128 · PAGE tokens · TILE 64, 96, 128 or 160 · BOX tokens that are copied at
// once, a divisor of page and tile and a multiple of 16 · WGS 2 or 3 · STAGES · SOFTMAX · OVERLAP · PING (with OVERLAP) · WINDOW · CAP.

#include "fragments.h"
#include "hopper.h"

#define ROWS (WGS * 64)
#define THREADS (WGS * 128 + 128)
#define HALVES (D / 64)
#define BOXES (TILE / BOX)
#define Q_BYTES (ROWS * D * 2)
#define TILE_BYTES (TILE * D * 2)  // of keys, and of values
#define NONE __int_as_float(0xff800000)  // minus infinity
#define LOG2E 1.4426950408889634f
#define SLACK 8.f  // log2 units that a maximum may be stale by
#define HUGE 3.0e38f
#define ONLINE 0
#define LAZY 1
#define UNIFIED 2
#define L2_SHARE (32 << 20)  // bytes of keys and values that stay in the L2 cache while they are used
#define AGAIN 8  // entries of the ring of items to compute again; at most three are ever outstanding
#if WGS == 2
#define PRODUCER_REGISTERS 40
#define CONSUMER_REGISTERS 232
#else
#define PRODUCER_REGISTERS 32
#define CONSUMER_REGISTERS 160
#endif
#if HALF
#define KIND "f16.f16"
#else
#define KIND "bf16.bf16"
#endif

// What is asked of all blocks.
struct Task {
    const int *table, *starts, *lengths;
    const float *phi;
    u16 *out;
    float *lse;
    u64 *recomputed;
    int *queue;  // [0] items handed out beyond the first of each block, [1] blocks that have ended; zero between launches
    float scale, cap, least, most;
    int requests, columns, heads, group, pages, window;
};

// A tile of queries. kind: what a consumer is to do.
struct Item {
    int kind, request, head, tile, start, count, length, unused;

    __device__ __forceinline__ int place() const { return length - count + tile * ROWS; }  // of the first query
    __device__ __forceinline__ int end() const { return (min(place() + ROWS, length) + TILE - 1) / TILE; }  // tiles
    __device__ __forceinline__ int begin(int window) const { return WINDOW ? max(place() - window + 1, 0) / TILE : 0; }
};
enum { USUAL, LAZILY, LEAVE };

struct Barriers {
    u64 q_full, q_empty, done, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

struct Shared {
    Barriers barriers;
    Item item;
    u64 again[AGAIN];  // items to compute again; 0: free
    float never;
    unsigned next, noted[2];  // where the next of them goes; the last item of each parity that was noted
};

__device__ __forceinline__ void fetch_queries(u32 to, const Map *map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ void fetch_page(u32 to, const Map *map, int column, int row, int head, int page, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
        :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(head), "r"(page), "r"(barrier) : "memory");
}

// Matrix descriptor of values, whose contiguous columns are the product's outer dimension, with the 128-byte swizzle.
__device__ __forceinline__ u64 outer(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(TILE * 8) << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// s (+)= a @ b^T of 16 columns, both from shared memory.
template <int ADD>
__device__ __forceinline__ void multiply_scores(float (&s)[TILE / 2], u64 a, u64 b) {
#if TILE == 64
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." KIND " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0;\n}"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31])
        : "l"(a), "l"(b), "n"(ADD));
#elif TILE == 96
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\nwgmma.mma_async.sync.aligned.m64n96k16.f32." KIND " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}, %48, %49, p, 1, 1, 0, 0;\n}"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
          "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
          "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47])
        : "l"(a), "l"(b), "n"(ADD));
#elif TILE == 128
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." KIND " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, 0;\n}"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
          "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
          "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
          "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]),
          "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]), "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63])
        : "l"(a), "l"(b), "n"(ADD));
#elif TILE == 160
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %82, 0;\nwgmma.mma_async.sync.aligned.m64n160k16.f32." KIND " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79}, %80, %81, p, 1, 1, 0, 0;\n}"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
          "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
          "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
          "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]),
          "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]), "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63]),
          "+f"(s[64]), "+f"(s[65]), "+f"(s[66]), "+f"(s[67]), "+f"(s[68]), "+f"(s[69]), "+f"(s[70]), "+f"(s[71]),
          "+f"(s[72]), "+f"(s[73]), "+f"(s[74]), "+f"(s[75]), "+f"(s[76]), "+f"(s[77]), "+f"(s[78]), "+f"(s[79])
        : "l"(a), "l"(b), "n"(ADD));
#endif
}

// o += a @ b of 16 tokens: weights from registers, values from shared memory.
__device__ __forceinline__ void multiply_values(float (&o)[D / 2], const u32 *a, u64 b) {
#if D == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]), "+f"(o[7]),
          "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]), "+f"(o[14]), "+f"(o[15]),
          "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]), "+f"(o[21]), "+f"(o[22]), "+f"(o[23]),
          "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]), "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]), "+f"(o[7]),
          "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]), "+f"(o[14]), "+f"(o[15]),
          "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]), "+f"(o[21]), "+f"(o[22]), "+f"(o[23]),
          "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]), "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31]),
          "+f"(o[32]), "+f"(o[33]), "+f"(o[34]), "+f"(o[35]), "+f"(o[36]), "+f"(o[37]), "+f"(o[38]), "+f"(o[39]),
          "+f"(o[40]), "+f"(o[41]), "+f"(o[42]), "+f"(o[43]), "+f"(o[44]), "+f"(o[45]), "+f"(o[46]), "+f"(o[47]),
          "+f"(o[48]), "+f"(o[49]), "+f"(o[50]), "+f"(o[51]), "+f"(o[52]), "+f"(o[53]), "+f"(o[54]), "+f"(o[55]),
          "+f"(o[56]), "+f"(o[57]), "+f"(o[58]), "+f"(o[59]), "+f"(o[60]), "+f"(o[61]), "+f"(o[62]), "+f"(o[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

// Nothing that uses these registers moves from one side of this to the other.
template <int COUNT>
__device__ __forceinline__ void hold(float (&r)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(r[i])::"memory");
}

// Weights are computed before what follows: the assembler would rather wait first and let tensor cores idle. It does not
// know that sums of exponentials are never negative, and keeps the order of memory operations.
struct Rows {
    float top[2], sum[2], factor[2];  // maximum or phi; this thread's part of the sum; what older sums must be multiplied by
};
__device__ __forceinline__ void settle(const Rows &rows, u32 never) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(rows.sum[0] + rows.sum[1]), "r"(never) : "memory");
}

__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ void scores(float (&s)[TILE / 2], u64 q, u64 k) {
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u64 a = q + half * (64 * 128 / 16) + i * 2, b = k + half * (TILE * 128 / 16) + i * 2;
            if (half + i == 0) multiply_scores<0>(s, a, b);
            else multiply_scores<1>(s, a, b);
        }
    commit();
}

__device__ __forceinline__ void weighted(float (&o)[D / 2], const u32 (&p)[TILE / 4], u64 v) {
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) multiply_values(o, p + 4 * i, v + i * (16 * 128 / 16));
    commit();
}

// ---- the producer ----

// Items in the order they are handed out, without their kind. Requests follow each other; a caller's numbers only grow.
struct Order {
    int request, before;  // items of the requests in front

    __device__ __forceinline__ bool find(Item &item, int number, const Task &t) {
        for (; request < t.requests; request++) {
            item.start = t.starts[request];
            item.count = t.starts[request + 1] - item.start;
            const int tiles = (item.count + ROWS - 1) / ROWS;
            if (number - before >= tiles * t.heads) {
                before += tiles * t.heads;
                continue;
            }
            item.request = request;
            item.length = t.lengths[request];
            const int fitting = L2_SHARE / (D * 4) / max(item.length, 1), section = max(1, min(fitting, t.heads / t.group)) * t.group;
            const int local = number - before, first = local / (tiles * section) * section;
            const int rest = local - first * tiles, side = min(section, t.heads - first);
            item.tile = tiles - 1 - rest / side;
            item.head = first + rest % side;
            return true;
        }
        return false;
    }
};

// A lane's box of a tile, lane = half * BOXES + box: page and row of its first token; past the context a page that does
// not exist, which is read as zeros.
struct Place {
    int page, row;
};
__device__ __forceinline__ Place place_of(const Task &t, const Item &item, int tile, int lane) {
    const int token = tile * TILE + lane % BOXES * BOX;
    if (tile < 0 || token >= item.length) return {t.pages, 0};
    return {t.table[(size_t)item.request * t.columns + token / PAGE], token % PAGE};
}

__device__ __forceinline__ void fetch_tile(const Map *map, u32 stages, u32 full, u32 empty, int at, Place place, int head, int lane) {
    const u32 stage = at % STAGES, to = stages + stage * TILE_BYTES;
    if (at >= STAGES) wait_for(empty + stage * 8, (at / STAGES - 1) & 1);
    if (lane == 0) expect(full + stage * 8, TILE_BYTES);
    __syncwarp();
    if (lane < BOXES * HALVES) {
        const int half = lane / BOXES, box = lane % BOXES;
        fetch_page(to + half * (TILE * 128) + box * (BOX * 128), map, half * 64, place.row, head, place.page, full + stage * 8);
    }
}

__device__ __forceinline__ void produce(const Map *q_map, const Map *k_map, const Map *v_map, const Task &t, Shared *sh, u32 q, u32 k, u32 v) {
    const int lane = threadIdx.x & 31;
    const u32 q_full = shared_address(&sh->barriers.q_full), q_empty = shared_address(&sh->barriers.q_empty);
    const u32 k_full = shared_address(sh->barriers.k_full), k_empty = shared_address(sh->barriers.k_empty);
    const u32 v_full = shared_address(sh->barriers.v_full), v_empty = shared_address(sh->barriers.v_empty);
    Order order = {0, 0};
    int at = 0, next = blockIdx.x;
    bool left = true;  // items in the queue
#if SOFTMAX == UNIFIED
    int again = 0;
#endif
    for (int number = 0;; number++) {
        Item item;
        item.kind = USUAL;
#if SOFTMAX == UNIFIED
        const int slot = again % AGAIN;
        u64 wrong = ((volatile u64 *)sh->again)[slot];
        if (!__shfl_sync(~0u, wrong != 0, 0)) {
            next = __shfl_sync(~0u, next, 0);
            left = left && order.find(item, next, t);
            if (!left && number > 0) {  // wait for what the last items turn out to be
                wait_for(q_empty, (number - 1) & 1);
                wait_for(shared_address(&sh->barriers.done), (number - 1) & 1);
            }
            wrong = left ? 0 : ((volatile u64 *)sh->again)[slot];
        }
        wrong = __shfl_sync(~0u, wrong, 0);
        if (wrong) {
            __syncwarp();
            if (lane == 0) ((volatile u64 *)sh->again)[slot] = 0;
            again++;
            item.kind = LAZILY;
            item.request = (int)(wrong >> 40 & 0x7fffff), item.tile = (int)(wrong >> 16 & 0xffffff), item.head = (int)(wrong & 0xffff);
            item.start = t.starts[item.request];
            item.count = t.starts[item.request + 1] - item.start;
            item.length = t.lengths[item.request];
        } else if (!left) item.kind = LEAVE;
#else
        next = __shfl_sync(~0u, next, 0);
        left = order.find(item, next, t);
        if (!left) item.kind = LEAVE;
#endif
        const int begin = item.kind == LEAVE ? 0 : item.begin(t.window), end = item.kind == LEAVE ? 0 : item.end();
        const int kv_head = item.kind == LEAVE ? 0 : item.head / t.group;
        Place place = {0, 0};
        if (item.kind != LEAVE) {
            place = place_of(t, item, end - 1, lane);
            fetch_tile(k_map, k, k_full, k_empty, at, place, kv_head, lane);
        }
        if (number > 0) wait_for(q_empty, (number - 1) & 1);
        __syncwarp();  // a lane that has not looked yet would miss this phase once consumers have ended the next
        if (lane == 0) {
            sh->item = item;
            if (item.kind == LEAVE) arrive(q_full);
            else {
                expect(q_full, Q_BYTES);
#pragma unroll
                for (int w = 0; w < WGS; w++)
#pragma unroll
                    for (int half = 0; half < HALVES; half++)
                        fetch_queries(q + (w * HALVES + half) * (64 * 128), q_map, item.head * D + half * 64, item.start + item.tile * ROWS + w * 64, q_full);
            }
        }
        if (item.kind == LEAVE) break;
        if (item.kind == USUAL && lane == 0) next = gridDim.x + atomicAdd(t.queue, 1);
        Place ahead = place_of(t, item, end - 2, lane);
#pragma unroll 1
        for (int tile = end - 1; tile >= begin; tile--, at++) {
            const Place own = place;
            place = ahead;
            if (tile > begin) {
                ahead = place_of(t, item, tile - 2, lane);
                fetch_tile(k_map, k, k_full, k_empty, at + 1, place, kv_head, lane);
            }
            fetch_tile(v_map, v, v_full, v_empty, at, own, kv_head, lane);
        }
    }
    if (lane == 0) {
        __threadfence();
        if (atomicAdd(t.queue + 1, 1) == gridDim.x - 1) t.queue[0] = 0, t.queue[1] = 0;
    }
}

// ---- the consumers ----

// How a thread sees the scores of a tile: rows lane / 4 and lane / 4 + 8 of its warp's 16, columns lane % 4 * 2 and the
// next of every 8. place: of its first row; window: what it sees back from there.
__device__ __forceinline__ void mask(float (&s)[TILE / 2], int tile, int place, int window) {
    const int last = place - tile * TILE - (threadIdx.x & 3) * 2, first = last - window;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = n * 8 + (e & 1) - (e >> 1) * 8;
            if (column > last || (WINDOW && column <= first)) s[n * 4 + e] = NONE;
        }
}

// Scores become weights; true: a row of this warp moved to a new maximum, and the results so far must follow.
template <int MODE>
__device__ __forceinline__ bool weigh(float (&s)[TILE / 2], Rows &rows, float unit) {
    float shift[2] = {rows.top[0], rows.top[1]};
    bool moved = false;
    if (MODE != UNIFIED) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float even = s[2 * h], odd = s[2 * h + 1];
#pragma unroll
            for (int n = 1; n < TILE / 8; n++) even = fmaxf(even, s[n * 4 + 2 * h]), odd = fmaxf(odd, s[n * 4 + 2 * h + 1]);
            float top = fmaxf(even, odd);
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            // The first finite maximum is always taken: minus infinity plus 8 is below it.
            const bool move = MODE == LAZY ? top * unit > rows.top[h] * unit + SLACK : top > rows.top[h];
            const float next = move ? top : rows.top[h];
            rows.factor[h] = move ? exp2f((rows.top[h] - next) * unit) : 1.f;
            rows.sum[h] *= rows.factor[h];
            rows.top[h] = next;
            shift[h] = next == NONE ? 0.f : next * unit;
            moved |= move;
        }
        moved = __any_sync(~0u, moved);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float &a = s[n * 4 + 2 * h], &b = s[n * 4 + 2 * h + 1];
            a = exp2f(a * unit - shift[h]), b = exp2f(b * unit - shift[h]);
            if (HALF && MODE == UNIFIED) a = round_trip(a), b = round_trip(b);  // what vanishes or overflows must show in the sum
            even += a, odd += b;
        }
        rows.sum[h] += even + odd;
    }
    return moved;
}

// Weights as the left operand of the product with values: 16 tokens are four registers.
__device__ __forceinline__ void operand(u32 (&p)[TILE / 4], const float (&s)[TILE / 2]) {
#pragma unroll
    for (int i = 0; i < TILE / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void rescale(float (&o)[D / 2], const Rows &rows) {
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] *= rows.factor[i >> 1 & 1];
}

// Values of the context's last page past its end become zeros: their weight is zero, and so must be the product.
__device__ __forceinline__ void blank(unsigned char *v, int from, int warpgroup) {
    const int rows = (from + BOX - 1) / BOX * BOX - from;
#pragma unroll 1
    for (int e = threadIdx.x & 127; e < rows * HALVES * 8; e += 128) {
        const int chunk = e & 7, row = from + (e >> 3) % rows, half = (e >> 3) / rows;
        *(uint4 *)(v + half * (TILE * 128) + row * 128 + chunk * 16) = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + WGS + warpgroup) : "memory");
}

// The rows of one thread into memory: lanes of a quad exchange what they have of 32 columns, so that each has 8
// neighbouring ones to write.
__device__ __forceinline__ void write(const float (&o)[D / 2], const float (&scale)[2], u16 *out, size_t stride, int left) {
    const int lane = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int g = 0; g < D / 32; g++) {
            u32 c[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int i = (g * 4 + j) * 4 + 2 * h;
                c[j] = pack(o[i] * scale[h], o[i + 1] * scale[h]);
            }
#pragma unroll
            for (int step = 1; step < 4; step *= 2)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (!(j & step)) {
                        const bool upper = lane & step;
                        const u32 got = __shfl_xor_sync(~0u, upper ? c[j] : c[j + step], step);
                        if (upper) c[j] = got;
                        else c[j + step] = got;
                    }
            if (h * 8 < left) *(uint4 *)(out + h * 8 * stride + g * 32 + lane * 8) = make_uint4(c[0], c[1], c[2], c[3]);
        }
}

// One item of one warpgroup. at: tiles of keys this block has used before.
template <int MODE>
__device__ __forceinline__ void consume(const Item &item, const Task &t, Shared *sh, u32 q, u32 k, unsigned char *v, int &at, int number) {
    const int warpgroup = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const u32 k_full = shared_address(sh->barriers.k_full), k_empty = shared_address(sh->barriers.k_empty);
    const u32 v_full = shared_address(sh->barriers.v_full), v_empty = shared_address(sh->barriers.v_empty);
    const u32 q_empty = shared_address(&sh->barriers.q_empty);
    const u64 queries = operand(q + warpgroup * (HALVES * 64 * 128)), keys = operand(k), values = outer(shared_address(v));
    const int begin = item.begin(t.window), end = item.end();
    const int above = item.place() + warpgroup * 64, place = above + warp * 16 + (lane >> 2);  // first row: of all, of this thread
    const int ragged = (end * TILE > item.length && item.length % BOX) ? item.length - (end - 1) * TILE : -1;
#if CAP
    const float unit = 1.f, inside = 2.f * LOG2E * t.scale / t.cap, outside = t.cap * LOG2E;
#else
    const float unit = t.scale * LOG2E;
#endif
    float s[TILE / 2], o[D / 2];
    u32 p[TILE / 4];
    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        rows.top[h] = MODE == UNIFIED ? t.phi[item.head] * LOG2E : NONE;
        rows.sum[h] = 0.f, rows.factor[h] = 1.f;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.f;

    auto multiply_keys = [&]() {
        open_products();
        scores(s, queries, keys + (u64)(at % STAGES * (TILE_BYTES / 16)));
    };
    auto multiply_weights = [&](int i) { weighted(o, p, values + (u64)(i % STAGES * (TILE_BYTES / 16))); };
    auto finish_scores = [&](int tile) {
#if CAP
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) s[i] = outside * (1.f - __fdividef(2.f, 1.f + exp2f(s[i] * inside)));
#endif
        if ((tile + 1) * TILE > above + 1 || (WINDOW && tile * TILE <= above + 63 - t.window)) mask(s, tile, place, t.window);
    };
    auto free_keys = [&](bool last) {
        if (lane == 0) {
            arrive(k_empty + at % STAGES * 8);
            if (last) arrive(q_empty);
        }
    };

    wait_for(k_full + at % STAGES * 8, at / STAGES & 1);
    multiply_keys();
    wait_products<0>();
    hold(s);
    free_keys(end - 1 == begin);
    finish_scores(end - 1);
    weigh<MODE>(s, rows, unit);
    operand(p, s);
    for (int tile = end - 2; tile >= begin; tile--) {
        const int older = at++;
        wait_for(k_full + at % STAGES * 8, at / STAGES & 1);
#if OVERLAP
#if PING
        asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory");
#endif
        multiply_keys();
        wait_for(v_full + older % STAGES * 8, older / STAGES & 1);
        if (tile == end - 2 && ragged >= 0) blank(v + older % STAGES * TILE_BYTES, ragged, warpgroup);
        open_products();
        multiply_weights(older);
#if PING
        asm volatile("bar.arrive %0, 256;" ::"r"(1 + (warpgroup + 1) % WGS) : "memory");
#endif
        wait_products<1>();
        hold(s);
        free_keys(tile == begin);
        finish_scores(tile);
        const bool moved = weigh<MODE>(s, rows, unit);
        settle(rows, shared_address(&sh->never));
        wait_products<0>();
        hold(o);
        if (lane == 0) arrive(v_empty + older % STAGES * 8);
#else
        wait_for(v_full + older % STAGES * 8, older / STAGES & 1);
        if (tile == end - 2 && ragged >= 0) blank(v + older % STAGES * TILE_BYTES, ragged, warpgroup);
        open_products();
        multiply_weights(older);
        wait_products<0>();
        hold(o);
        if (lane == 0) arrive(v_empty + older % STAGES * 8);
        multiply_keys();
        wait_products<0>();
        hold(s);
        free_keys(tile == begin);
        finish_scores(tile);
        const bool moved = weigh<MODE>(s, rows, unit);
#endif
        if (MODE == ONLINE || (MODE == LAZY && moved)) rescale(o, rows);
        operand(p, s);
    }
    wait_for(v_full + at % STAGES * 8, at / STAGES & 1);
    if (end - 1 == begin && ragged >= 0) blank(v + at % STAGES * TILE_BYTES, ragged, warpgroup);
    open_products();
    multiply_weights(at);
    wait_products<0>();
    hold(o);
    if (lane == 0) arrive(v_empty + at % STAGES * 8);
    at++;

    const int own = item.tile * ROWS + warpgroup * 64 + warp * 16 + (lane >> 2), left = item.count - own;
    float scale[2];
    int wrong = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        rows.sum[h] += __shfl_xor_sync(~0u, rows.sum[h], 1);
        rows.sum[h] += __shfl_xor_sync(~0u, rows.sum[h], 2);
        scale[h] = rows.sum[h] == 0.f ? 0.f : 1.f / rows.sum[h];
        if (MODE == UNIFIED) {
            bool bad = !(rows.sum[h] > t.least && rows.sum[h] < t.most);
#pragma unroll
            for (int i = 0; i < D / 4; i++) bad |= !(fabsf(o[(i >> 1) * 4 + 2 * h + (i & 1)]) < HUGE);
            const u32 votes = __ballot_sync(~0u, bad && h * 8 < left);
            wrong += __popc((votes | votes >> 1 | votes >> 2 | votes >> 3) & 0x11111111);  // a quad has a row
        }
    }
    const size_t token = item.start + own, stride = (size_t)t.heads * D;
    write(o, scale, t.out + token * stride + item.head * D, stride, left);
    if (t.lse && (lane & 3) == 0)
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (h * 8 < left)
                t.lse[(token + h * 8) * t.heads + item.head] =
                    rows.sum[h] == 0.f ? NONE : (rows.top[h] * (MODE == UNIFIED ? 1.f : unit) + log2f(rows.sum[h])) / LOG2E;
    if (MODE == UNIFIED && lane == 0 && wrong) {
        atomicAdd(t.recomputed, (u64)wrong);
        if (atomicExch(&sh->noted[number & 1], number + 1) != number + 1)
            ((volatile u64 *)sh->again)[atomicAdd(&sh->next, 1) % AGAIN] = (u64)1 << 63 | (u64)item.request << 40 | (u64)item.tile << 16 | item.head;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
prefill(const __grid_constant__ Map q_map, const __grid_constant__ Map k_map, const __grid_constant__ Map v_map, const int *table, const int *starts, const int *lengths, const float *phi, u16 *out, float *lse, u64 *recomputed, int *queue, float scale, float cap, float least, float most, int requests, int columns, int heads, int group, int pages, int window) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = (unsigned char *)(((size_t)raw + 1023) & ~(size_t)1023);
    unsigned char *k = memory + Q_BYTES, *v = k + STAGES * TILE_BYTES;
    Shared *sh = (Shared *)(v + STAGES * TILE_BYTES);
    const Task t = {table, starts, lengths, phi, out, lse, recomputed, queue, scale, cap, least, most, requests, columns, heads, group, pages, window};

    if (threadIdx.x == 0) {
        auto create = [](u64 &barrier, int count) { begin_barrier(shared_address(&barrier), count); };
        create(sh->barriers.q_full, 1), create(sh->barriers.q_empty, WGS * 4), create(sh->barriers.done, WGS * 4);
        for (int i = 0; i < STAGES; i++) {
            create(sh->barriers.k_full[i], 1), create(sh->barriers.k_empty[i], WGS * 4);
            create(sh->barriers.v_full[i], 1), create(sh->barriers.v_empty[i], WGS * 4);
        }
        for (int i = 0; i < AGAIN; i++) sh->again[i] = 0;
        sh->next = sh->noted[0] = sh->noted[1] = 0;
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    __syncthreads();

    const u32 q = shared_address(memory);
    if (threadIdx.x >= WGS * 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x < WGS * 128 + 32) produce(&q_map, &k_map, &v_map, t, sh, q, shared_address(k), shared_address(v));
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#if PING
    if (threadIdx.x >= (WGS - 1) * 128) asm volatile("bar.arrive 1, 256;" ::: "memory");  // the first turn
#endif
    int at = 0;
    for (int number = 0;; number++) {
        wait_for(shared_address(&sh->barriers.q_full), number & 1);
        const Item item = sh->item;
        if (item.kind == LEAVE) break;
#if SOFTMAX == UNIFIED
        if (item.kind == LAZILY) consume<LAZY>(item, t, sh, q, shared_address(k), v, at, number);
        else consume<UNIFIED>(item, t, sh, q, shared_address(k), v, at, number);
        __syncwarp();
        if ((threadIdx.x & 31) == 0) arrive(shared_address(&sh->barriers.done));
#else
        consume<SOFTMAX>(item, t, sh, q, shared_address(k), v, at, number);
#endif
    }
}
