// Loops that threads share, and a team of them that stays together for many loops.
//
// A loop of OpenMP ends when all its threads have come to its end. If another program has the core of one of them, the others
// wait until it gets it back: milliseconds, for a loop of microseconds, and a token is hundreds of loops. Here a loop is in
// parts, and who is there takes the next one; who is not is waited for only where the team parts, once a token.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

constexpr int64_t SMALL = 1 << 15;  // numbers that one thread has done before a second has begun
constexpr int64_t PARTS = 4;        // of a loop for each thread: few, for what fetches memory ahead does not stop at their ends
constexpr int64_t MANY_PARTS = 16;  // where it is arithmetic that takes the time, or parts differ

class Team {
    // Of the loop at hand: parts << 32 | the next one. Who counts it up by one has that part, and reads the rest only then: the
    // loop does not end before the part is done.
    std::atomic<uint64_t> turn{0};
    std::atomic<int64_t> done{0};  // parts
    std::atomic<bool> over{false};
    void (*body)(const void* function, int64_t first, int64_t last) = nullptr;
    const void* function = nullptr;
    int64_t count = 0;

    static int64_t parts(uint64_t turn) { return int64_t(turn >> 32); }
    static int64_t next(uint64_t turn) { return int64_t(turn & 0xffffffff); }

    static void wait(int64_t& idle) {
        if (++idle < 4096) _mm_pause();
        else sched_yield();
    }

    // Parts of the loop at hand until none is left.
    void work() {
        for (uint64_t now = turn.load(std::memory_order_acquire); next(now) < parts(now);) {
            if (!turn.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            int64_t part = next(now), all = parts(now);
            body(function, count * part / all, count * (part + 1) / all);
            done.fetch_add(1, std::memory_order_release);
            now = turn.load(std::memory_order_acquire);
        }
    }

   public:
    // f(first, last) for `all` from 0 on, in so many pieces. The first thread calls it, the others are at `help`.
    template <typename F>
    void share(int64_t all, int64_t pieces, const F& f) {
        body = [](const void* of, int64_t first, int64_t last) { (*static_cast<const F*>(of))(first, last); };
        function = &f, count = all;
        done.store(0, std::memory_order_relaxed);
        turn.store(uint64_t(pieces) << 32, std::memory_order_release);
        work();
        for (int64_t idle = 0; done.load(std::memory_order_acquire) < pieces;) wait(idle);
    }

    void help() {
        for (int64_t idle = 0; !over.load(std::memory_order_acquire); wait(idle)) {
            uint64_t now = turn.load(std::memory_order_acquire);
            if (next(now) < parts(now)) work(), idle = 0;
        }
    }

    void disband() { over.store(true, std::memory_order_release); }
};

thread_local Team* team = nullptr;  // of which this thread is the first

// f() on this thread, while OpenMP's others, which are PyTorch's too, take their parts of its loops.
template <typename F>
void together(const F& f) {
    Team here;
#pragma omp parallel
    if (omp_get_thread_num() == 0) {
        team = &here;
        f();
        team = nullptr;
        here.disband();
    } else {
        here.help();
    }
}

// f(first, last) for all of 0 .. count, shared among threads if the loop is over more than SMALL `numbers`.
template <typename F>
void share(int64_t count, int64_t numbers, const F& f, int64_t parts = PARTS) {
    int64_t threads = omp_get_max_threads(), pieces = std::min(count, parts * threads);
    if (numbers <= SMALL || threads < 2 || pieces < 2) f(0, count);
    else if (team) team->share(count, pieces, f);
    else together([&] { team->share(count, pieces, f); });
}

}  // namespace
