/* What all CPU kernels share: the thread pool, scratch memory, and how one source becomes several instruction-set variants.
 *
 * Sources. `x.c` is compiled once. `x_simd.c` is compiled once per instruction set, with -DTF_ISA=<name> and that set's
 * -m flags; everything it defines with external linkage is named TF_NAME(fn), which appends the set's name. It ends in one
 * table, `const struct tf_x_ops TF_NAME(tf_x_ops) = {...}`, and `x.c` reaches the variant in use with
 *
 *     TF_VARIANTS(struct tf_x_ops, tf_x_ops)        at file scope
 *     TF_PICK(tf_x_ops)->some_kernel(...)           anywhere
 *
 * Floating point. Everything is compiled with -ffp-contract=off, so a product and a sum are fused only where the source
 * says so (tf_fma in simd.h, or an intrinsic). A row of a result must not depend on which rows are computed beside it,
 * nor on the number of threads: kernels keep one order of accumulation per output.
 */
#ifndef TENFOLD_H
#define TENFOLD_H

#include <stddef.h>
#include <stdint.h>

#define TF_EXPORT __attribute__((visibility("default")))
#define TF_INLINE static inline __attribute__((always_inline))
#define TF_LIKELY(x) __builtin_expect(!!(x), 1)
#define TF_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define TF_MIN(a, b) ((a) < (b) ? (a) : (b))
#define TF_MAX(a, b) ((a) > (b) ? (a) : (b))
#define TF_CEIL(a, b) (((a) + (b)-1) / (b))
#define TF_ALIGN 64 /* bytes; scratch memory starts at a multiple of it */
#define TF_MAX_THREADS 256

/* ---- instruction sets; build.py passes -DTF_HAVE_<NAME>=1 for each one that is in the library ---- */

enum tf_isa_id { TF_ISA_PORTABLE, TF_ISA_AVX2, TF_ISA_AVX512, TF_ISA_NEON, TF_ISA_COUNT };

TF_EXPORT extern int tf_isa_index; /* the variant in use; set by tf_init */

#ifdef TF_ISA
#define TF_CONCAT_(a, b) a##_##b
#define TF_CONCAT(a, b) TF_CONCAT_(a, b)
#define TF_NAME(fn) TF_CONCAT(fn, TF_ISA)
#endif

#ifdef TF_HAVE_PORTABLE
#define TF_IF_PORTABLE(...) __VA_ARGS__
#else
#define TF_IF_PORTABLE(...)
#endif
#ifdef TF_HAVE_AVX2
#define TF_IF_AVX2(...) __VA_ARGS__
#else
#define TF_IF_AVX2(...)
#endif
#ifdef TF_HAVE_AVX512
#define TF_IF_AVX512(...) __VA_ARGS__
#else
#define TF_IF_AVX512(...)
#endif
#ifdef TF_HAVE_NEON
#define TF_IF_NEON(...) __VA_ARGS__
#else
#define TF_IF_NEON(...)
#endif

#define TF_VARIANTS(type, name)                                                                          \
    TF_IF_PORTABLE(extern const type name##_portable;)                                                   \
    TF_IF_AVX2(extern const type name##_avx2;)                                                           \
    TF_IF_AVX512(extern const type name##_avx512;)                                                       \
    TF_IF_NEON(extern const type name##_neon;)                                                           \
    static const type *const name##_variants[TF_ISA_COUNT] = {                                           \
        TF_IF_PORTABLE([TF_ISA_PORTABLE] = &name##_portable, ) TF_IF_AVX2([TF_ISA_AVX2] = &name##_avx2, ) \
            TF_IF_AVX512([TF_ISA_AVX512] = &name##_avx512, ) TF_IF_NEON([TF_ISA_NEON] = &name##_neon, )};
#define TF_PICK(name) (name##_variants[tf_isa_index])

/* Bit i is set when instruction set i is in the library and this processor has it. */
TF_EXPORT unsigned tf_isa_available(void);
/* Use an instruction set, by enum tf_isa_id, or -1 for the best there is. Returns the one in use, -1 when it is not available.
 * Not to be called while a kernel runs. Data packed for one instruction set may have another layout than the next one's. */
TF_EXPORT int tf_init(int isa);

/* ---- thread pool (pool.c) ----
 *
 * tf_parallel runs fn(ctx, tile, thread) for every tile in 0..tiles-1 and returns when all are done. Thread t first works through its
 * own contiguous share of the tiles, then takes tiles left over in the shares of others, so a thread that the system
 * holds off the processor delays a job by the one tile it is in at most. `thread` is in 0..tf_threads()-1, for tf_scratch.
 * The caller is thread 0. One tile, or one thread: runs in the caller, nobody is woken.
 * A tile must not call tf_begin, tf_shared or tf_scratch of another thread; a nested tf_parallel runs inline as `thread` of the caller.
 */
typedef void (*tf_task)(void *ctx, int tile, int thread);

TF_EXPORT void tf_parallel(int tiles, tf_task fn, void *ctx);
TF_EXPORT int tf_threads(void);
/* Sets the number of threads, the caller's included (1 to TF_MAX_THREADS). Workers start at the next job. */
TF_EXPORT void tf_pool_start(int threads);
TF_EXPORT void tf_pool_stop(void);

/* Why a worker may be sent to sleep for a while (pool.c): it ran on the caller's processor, it was held off its own in the middle of a tile.
 * Both are in use unless this says otherwise, for tests and measurements. */
enum { TF_BENCH_CROWDED = 1, TF_BENCH_STALLED = 2 };
TF_EXPORT void tf_pool_bench(int reasons);

/* An operation that uses the shared scratch holds the pool from tf_begin to tf_end (they nest; other callers wait).
 * tf_parallel takes and returns the pool by itself when the operation did not. */
TF_EXPORT void tf_begin(void);
TF_EXPORT void tf_end(void);

/* At least `bytes` of memory of this thread, aligned to TF_ALIGN, contents undefined. Valid inside the tile until the next call
 * for the same thread. Never NULL: the process ends with a message when the system has no memory. */
void *tf_scratch(int thread, size_t bytes);
/* The same for the whole operation: to be called between tf_begin and tf_end, outside of tiles; valid until tf_end or the next call. */
void *tf_shared(size_t bytes);

/* ---- calls as data ----
 *
 * Every operation Python calls takes the address of one flat struct, so that a list of calls can be run without Python in between. */
typedef void (*tf_op)(const void *args);
typedef struct {
    tf_op op;
    const void *args;
} tf_call;
TF_EXPORT void tf_run(const tf_call *calls, int64_t count);

#endif
