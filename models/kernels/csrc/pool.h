// Threads of our own: they enter a job together and meet at barriers inside it.
//
// Replaces OpenMP, whose barriers spin: with another process on the same cores they become a hundred times slower.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace qerve {

// A number that threads wait on: spin, yield, then sleep until somebody changes it.
class Signal {
public:
    uint32_t value() const { return word_.load(std::memory_order_acquire); }
    void advance();                   // by one; wakes whoever sleeps
    void wait_while(uint32_t value);  // returns once the number is another one

private:
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

    // Inside a job: returns when all threads are here; the last to come calls on_last(state) before anybody goes on.
    void barrier(void (*on_last)(void*), void* state);

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
