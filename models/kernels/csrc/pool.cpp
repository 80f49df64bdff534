#include "pool.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <chrono>
#endif

namespace qerve {
namespace {

#if defined(__linux__)
void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
void pin_to_nth_core(int n) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (CPU_ISSET(core, &allowed) && n-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(core, &one);
            pthread_setaffinity_np(pthread_self(), sizeof one, &one);
            return;
        }
    }
}
#else
void sleep_on(std::atomic<uint32_t>&, uint32_t) { std::this_thread::sleep_for(std::chrono::microseconds(50)); }
void wake_all(std::atomic<uint32_t>&) {}
void pin_to_nth_core(int) {}
#endif

}  // namespace

// Sequentially consistent on both sides: either the sleeper sees the new number, or the other side sees the sleeper.
void Signal::advance() {
    word_.fetch_add(1);
    if (num_sleepers_.load() > 0) wake_all(word_);
}

void Signal::sleep_while(uint32_t value) {
    num_sleepers_.fetch_add(1);
    if (word_.load() == value) sleep_on(word_, value);
    num_sleepers_.fetch_sub(1);
}

Pool::Pool(int num_threads, bool is_pinned) {
    for (int thread = 1; thread < num_threads; ++thread) {
        workers_.emplace_back([this, thread, is_pinned] {
            if (is_pinned) pin_to_nth_core(thread);
            work(thread);
        });
    }
}

Pool::~Pool() {
    is_stopping_ = true;
    started_.advance();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Job job, void* state) {
    job_ = job;
    state_ = state;
    started_.advance();
    job(state, 0);
    barrier();
}

void Pool::work(int thread) {
    for (uint32_t seen = 0;; ++seen) {
        started_.wait_while(seen, [] {});
        if (is_stopping_) return;
        job_(state_, thread);
        barrier();
    }
}

}  // namespace qerve
