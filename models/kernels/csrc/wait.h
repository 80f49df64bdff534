// Waiting for another thread: spin for a few microseconds, then offer the processor to others, then (where a wake-up is
// sure to come) sleep. Spinning alone would stop everything for a time slice when another process has the other thread's
// core; sleeping at once costs a tenth of a millisecond of waking up, twice a token.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace qerve {

constexpr int kSpins = 256;
constexpr std::chrono::microseconds kPatience{5000};  // what a server does between two steps is shorter than this

static inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True once `is_done`; false when patience is over. `meanwhile` is called now and then, a few instructions of use.
template <class Condition, class Use>
inline bool spin_until(Condition&& is_done, Use&& meanwhile) {
    for (int i = 0; i < kSpins; ++i) {
        if (is_done()) return true;
        meanwhile();
        relax();
    }
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!is_done()) {
        if (std::chrono::steady_clock::now() > end) return is_done();
        std::this_thread::yield();
    }
    return true;
}

// The threads that work on what is waited for were running when they took it: they need no wake-up.
static inline void wait_for(const Progress& progress) {
    if (progress.count == nullptr) return;
    while (!spin_until([&] { return progress.count->load(std::memory_order_acquire) >= progress.target; }, [] {})) {
    }
}

}  // namespace qerve
