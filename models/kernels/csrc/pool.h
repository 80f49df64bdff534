// Threads of our own: they enter a job together and meet at barriers inside it.
//
// Replaces OpenMP, whose barriers spin: with another process on the same cores they become a hundred times slower.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "wait.h"

namespace qerve {

// A number that threads wait on: spin, yield, then sleep until somebody changes it.
class Signal {
public:
    uint32_t value() const { return word_.load(std::memory_order_acquire); }
    void advance();                   // by one; wakes whoever sleeps

    // Returns once the number is another one. `meanwhile` is called now and then, while that is expected soon.
    template <class Use>
    void wait_while(uint32_t value, Use&& meanwhile) {
        while (!spin_until([&] { return this->value() != value; }, meanwhile)) sleep_while(value);
    }

private:
    void sleep_while(uint32_t value);

    std::atomic<uint32_t> word_{0};
    std::atomic<uint32_t> num_sleepers_{0};
};

class Pool {
public:
    // `num_threads` counts the caller, which works too. Pinned: worker i stays on the i-th core that the process may use.
    Pool(int num_threads, bool is_pinned);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

    using Job = void (*)(void* state, int thread);
    // Every thread runs job(state, thread); returns when all are done. One caller at a time.
    void run(Job job, void* state);

    // Inside a job: returns when all threads are here; the last to come calls on_last() before anybody goes on. The
    // others call `meanwhile` now and then.
    template <class Last, class Use>
    void barrier(Last&& on_last, Use&& meanwhile) {
        const uint32_t seen = passed_.value();
        if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads()) {
            passed_.wait_while(seen, meanwhile);
            return;
        }
        on_last();
        num_arrived_.store(0, std::memory_order_relaxed);
        passed_.advance();
    }
    void barrier() {
        barrier([] {}, [] {});
    }

private:
    void work(int thread);

    std::vector<std::thread> workers_;
    Signal started_;
    Signal passed_;
    std::atomic<int> num_arrived_{0};
    Job job_ = nullptr;
    void* state_ = nullptr;
    bool is_stopping_ = false;
};

}  // namespace qerve
