/* The thread pool. Claiming a tile is one atomic addition on a word that holds both the next tile and the end of a share, so
 * a successful claim proves that the job it belongs to is not finished: a worker that wakes late can never run a tile of a past job.
 *
 * Other programs use the processors too. The system may take a worker off its processor for milliseconds in the middle of a tile,
 * and the job waits; or run a worker on the caller's own processor, where its spinning keeps the caller from going on. A worker
 * that this happens to often is benched for a while: it sleeps, the others run its share, and it comes back later for another try. So a
 * step on a busy machine runs about as fast as with the processors that are free. A short burst of other work now and then, such as a
 * server's after every step, costs less than going without the worker, and is borne. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tenfold.h"

enum {
    IDLE_NS = 100000,       /* how long an idle worker stays awake: longer than the gap between two operations of a step */
    WAIT_NS = 100000,       /* how long the caller waits for the last tiles before it sleeps */
    STALL_NS = 500000,      /* a wait of this length, and longer than the job took until then: a worker was off its processor */
    DEBT_NS = 4000000,      /* a worker is benched when it has been waited for so long, */
    DEBT_SHARE = 4,         /* beyond one part in so many of all time */
    BENCH_NS = 2000000,     /* the first time on the bench; doubled, if it has to go back soon after, up to ... */
    BENCH_MAX_NS = 320000000,
    BENCH_SOON = 3,         /* times as long after the beginning of the last time on the bench */
    CROWDED_WAKES = 3,      /* in a row on the caller's processor, until a worker is benched */
    NAP_NS = 10000000,      /* how often a benched worker looks whether the pool stops */
    PAUSES = 16,            /* pauses between two looks at the clock */
};

typedef struct {
    _Alignas(TF_ALIGN) _Atomic uint64_t word; /* end << 32 | next */
} share;

typedef struct {
    _Alignas(TF_ALIGN) _Atomic int busy; /* may have a tile */
    _Atomic uint64_t benched_until;      /* 0: not benched */
    _Atomic uint64_t bench_ns, benched_last;
    _Atomic uint64_t debt_ns, waited_last; /* how long it was waited for, beyond what is borne; when last */
} seat;

typedef struct {
    _Alignas(TF_ALIGN) void *data;
    size_t bytes;
} scratch;

static struct {
    int threads; /* wanted, the caller's included */
    int started; /* workers running + 1; 0: none started */
    pthread_t workers[TF_MAX_THREADS];
    /* the job */
    tf_task fn;
    void *ctx;
    share shares[TF_MAX_THREADS];
    seat seats[TF_MAX_THREADS];
    _Alignas(TF_ALIGN) _Atomic uint32_t epoch; /* counts jobs */
    _Alignas(TF_ALIGN) _Atomic uint32_t done;  /* tiles finished and reported */
    _Alignas(TF_ALIGN) _Atomic int sleepers;
    _Atomic int waiting; /* the caller sleeps until `done` is complete */
    _Atomic int stop;
    _Atomic int bench_reasons;
    _Atomic int caller_cpu; /* where the caller published the job; -1: not known */
    scratch scratches[TF_MAX_THREADS];
    scratch shared;
} pool = {.threads = 1, .caller_cpu = -1, .bench_reasons = TF_BENCH_CROWDED | TF_BENCH_STALLED};

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* held by the operation that uses the pool */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_ready = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_done = PTHREAD_COND_INITIALIZER;

static _Thread_local int depth;           /* nesting of tf_begin in this thread */
static _Thread_local int tile_thread = -1; /* the pool index while inside a tile */

TF_INLINE void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int current_cpu(void) {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

/* Whether this worker runs where the caller should. */
static int crowded(void) {
    const int caller = atomic_load_explicit(&pool.caller_cpu, memory_order_relaxed);
    return caller >= 0 && current_cpu() == caller && (atomic_load(&pool.bench_reasons) & TF_BENCH_CROWDED);
}

/* Waits until *word != value, at most `ns`. Returns whether it changed. */
static int spin_while(_Atomic uint32_t *word, uint32_t value, uint64_t ns) {
    for (uint64_t end = 0;;) {
        for (int i = 0; i < PAUSES; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
            pause_cpu();
        }
        uint64_t now = now_ns();
        if (!end) end = now + ns;
        if (now >= end) return 0;
    }
}

/* Runs tiles until none is left to claim: the own share, then those of the threads after it. */
static void work(int thread, int threads) {
    uint32_t ran = 0;
    tile_thread = thread;
    atomic_store(&pool.seats[thread].busy, 1);
    for (int i = 0; i < threads; i++) {
        int victim = thread + i < threads ? thread + i : thread + i - threads;
        _Atomic uint64_t *word = &pool.shares[victim].word;
        for (;;) {
            uint64_t seen = atomic_load_explicit(word, memory_order_relaxed);
            if ((uint32_t)seen >= (uint32_t)(seen >> 32)) break;
            seen = atomic_fetch_add_explicit(word, 1, memory_order_acquire);
            if ((uint32_t)seen >= (uint32_t)(seen >> 32)) break;
            pool.fn(pool.ctx, (int)(uint32_t)seen, thread);
            ran++;
        }
    }
    tile_thread = -1;
    if (ran) atomic_fetch_add(&pool.done, ran);
    atomic_store(&pool.seats[thread].busy, 0);
    if (!ran) return;
    if (atomic_load(&pool.waiting)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_signal(&work_done);
        pthread_mutex_unlock(&sleep_lock);
    }
}

static void bench(seat *s, uint64_t now) {
    uint64_t before = atomic_load(&s->bench_ns), again = now - atomic_load(&s->benched_last) < BENCH_SOON * before;
    uint64_t ns = before && again ? TF_MIN(2 * before, (uint64_t)BENCH_MAX_NS) : BENCH_NS;
    atomic_store(&s->bench_ns, ns);
    atomic_store(&s->benched_last, now);
    atomic_store(&s->benched_until, now + ns);
}

/* A worker was waited for. */
static void owe(seat *s, uint64_t now, uint64_t waited) {
    uint64_t debt = atomic_load(&s->debt_ns), borne = (now - atomic_load(&s->waited_last)) / DEBT_SHARE;
    debt = (debt > borne ? debt - borne : 0) + waited;
    atomic_store(&s->waited_last, now);
    atomic_store(&s->debt_ns, debt);
    if (debt > DEBT_NS) bench(s, now);
}

static void sit_out(seat *s) {
    uint64_t until = atomic_load(&s->benched_until), now;
    while ((now = now_ns()) < until && !atomic_load(&pool.stop)) {
        struct timespec nap = {0, (long)TF_MIN(until - now, (uint64_t)NAP_NS)};
        nanosleep(&nap, NULL);
    }
    atomic_store(&s->benched_until, 0);
}

typedef struct {
    int thread, threads;
    uint32_t epoch;
} worker_start;

static void sleep_while_epoch(uint32_t seen) {
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&pool.sleepers, 1);
    while (atomic_load(&pool.epoch) == seen) pthread_cond_wait(&work_ready, &sleep_lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void *worker_main(void *arg) {
    worker_start start = *(worker_start *)arg;
    seat *own = &pool.seats[start.thread];
    free(arg);
    uint32_t seen = start.epoch;
    for (int in_the_way = 0;;) {
        if (crowded() || !spin_while(&pool.epoch, seen, IDLE_NS)) sleep_while_epoch(seen);
        seen = atomic_load(&pool.epoch); /* before the look at `stop`, which is set before its epoch */
        if (atomic_load(&pool.stop)) return NULL;
        in_the_way = crowded() ? in_the_way + 1 : 0;
        if (in_the_way >= CROWDED_WAKES) {
            bench(own, now_ns());
            in_the_way = 0;
        }
        if (atomic_load(&own->benched_until))
            sit_out(own);
        else if (!in_the_way)
            work(start.thread, start.threads);
    }
}

/* Tells the workers that `epoch` has something new for them. */
static void wake(void) {
    atomic_fetch_add(&pool.epoch, 1);
    if (atomic_load(&pool.sleepers) == 0) return;
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&work_ready);
    pthread_mutex_unlock(&sleep_lock);
}

static void stop_workers(void) {
    if (pool.started > 1) {
        atomic_store(&pool.stop, 1);
        wake();
        for (int t = 1; t < pool.started; t++) pthread_join(pool.workers[t], NULL);
        atomic_store(&pool.stop, 0);
    }
    pool.started = 0;
}

static int start_worker(int thread, int threads) {
    worker_start *start = malloc(sizeof *start);
    if (!start) return 0;
    *start = (worker_start){thread, threads, atomic_load(&pool.epoch)};
    if (pthread_create(&pool.workers[thread], NULL, worker_main, start) == 0) return 1;
    free(start);
    return 0;
}

/* Signals stay with the threads of the host program. Where the system refuses a thread, its share is taken by the others. */
static void start_workers(void) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int threads = pool.threads, t = 1;
    while (t < threads && start_worker(t, threads)) t++;
    pool.started = t;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* In the child of a fork there are no workers, and locks may be held by threads that do not exist. */
static void after_fork(void) {
    static const pthread_mutex_t unlocked = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t idle = PTHREAD_COND_INITIALIZER;
    owner = sleep_lock = unlocked;
    work_ready = work_done = idle;
    depth = 0;
    tile_thread = -1;
    pool.started = 0;
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.waiting, 0);
    atomic_store(&pool.stop, 0);
    for (int t = 0; t < TF_MAX_THREADS; t++) {
        atomic_store(&pool.shares[t].word, 0);
        atomic_store(&pool.seats[t].busy, 0);
        atomic_store(&pool.seats[t].benched_until, 0);
    }
}

__attribute__((constructor)) static void on_load(void) { pthread_atfork(NULL, NULL, after_fork); }

void tf_begin(void) {
    if (depth++ == 0) pthread_mutex_lock(&owner);
}

void tf_end(void) {
    if (--depth == 0) pthread_mutex_unlock(&owner);
}

int tf_threads(void) { return pool.threads; }

void tf_pool_start(int threads) {
    tf_begin();
    threads = TF_MAX(1, TF_MIN(threads, TF_MAX_THREADS));
    if (threads != pool.threads) stop_workers();
    pool.threads = threads;
    tf_end();
}

void tf_pool_bench(int reasons) { atomic_store(&pool.bench_reasons, reasons); }

void tf_pool_stop(void) {
    tf_begin();
    stop_workers();
    tf_end();
}

static void sleep_until_done(uint32_t tiles) {
    pthread_mutex_lock(&sleep_lock);
    atomic_store(&pool.waiting, 1);
    while (atomic_load(&pool.done) != tiles) pthread_cond_wait(&work_done, &sleep_lock);
    atomic_store(&pool.waiting, 0);
    pthread_mutex_unlock(&sleep_lock);
}

/* Waits for tiles that workers have started; everything else the caller has already run itself. */
static void await_done(uint32_t tiles, uint64_t job_start) {
    uint32_t done;
    uint64_t wait_start = now_ns();
    while ((done = atomic_load(&pool.done)) != tiles) {
        if (spin_while(&pool.done, done, WAIT_NS)) continue;
        uint8_t late[TF_MAX_THREADS];
        for (int t = 1; t < pool.started; t++) late[t] = (uint8_t)atomic_load(&pool.seats[t].busy);
        sleep_until_done(tiles);
        uint64_t now = now_ns(), waited = now - wait_start;
        if (!(atomic_load(&pool.bench_reasons) & TF_BENCH_STALLED) || waited < STALL_NS || waited < wait_start - job_start) return;
        for (int t = 1; t < pool.started; t++)
            if (late[t]) owe(&pool.seats[t], now, waited);
    }
}

static void publish(int tiles, int threads) {
    atomic_store(&pool.done, 0);
    atomic_store_explicit(&pool.caller_cpu, current_cpu(), memory_order_relaxed);
    for (int t = 0; t < threads; t++) {
        uint64_t first = (uint64_t)tiles * t / threads, end = (uint64_t)tiles * (t + 1) / threads;
        atomic_store_explicit(&pool.shares[t].word, end << 32 | first, memory_order_release);
    }
    wake();
}

static void run_inline(int tiles, tf_task fn, void *ctx, int thread) {
    int before = tile_thread;
    tile_thread = thread;
    for (int tile = 0; tile < tiles; tile++) fn(ctx, tile, thread);
    tile_thread = before;
}

void tf_parallel(int tiles, tf_task fn, void *ctx) {
    if (tiles <= 0) return;
    if (tile_thread >= 0) {
        run_inline(tiles, fn, ctx, tile_thread);
        return;
    }
    tf_begin();
    if (tiles > 1 && pool.threads > 1 && pool.started == 0) start_workers();
    if (tiles == 1 || pool.started <= 1) {
        run_inline(tiles, fn, ctx, 0);
    } else {
        uint64_t start = now_ns();
        pool.fn = fn;
        pool.ctx = ctx;
        publish(tiles, pool.threads);
        work(0, pool.threads);
        await_done((uint32_t)tiles, start);
    }
    tf_end();
}

static void *grow(scratch *s, size_t bytes) {
    if (TF_LIKELY(bytes <= s->bytes)) return s->data;
    free(s->data);
    bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    if (posix_memalign(&s->data, 4096, bytes) != 0) {
        fprintf(stderr, "tenfold: no memory for %zu bytes of kernel workspace\n", bytes);
        abort();
    }
    s->bytes = bytes;
    return s->data;
}

void *tf_scratch(int thread, size_t bytes) { return grow(&pool.scratches[thread], bytes); }

void *tf_shared(size_t bytes) { return grow(&pool.shared, bytes); }

void tf_run(const tf_call *calls, int64_t count) {
    tf_begin();
    for (int64_t i = 0; i < count; i++) calls[i].op(calls[i].args);
    tf_end();
}
