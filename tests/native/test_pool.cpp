// The threads: everybody works in every job, nobody passes a barrier early, idle threads wake up again.
#include <chrono>
#include <numeric>

#include "pool.h"
#include "test.h"

using namespace qerve;

namespace {

struct Rounds {
    explicit Rounds(Pool& threads) : pool(threads), counts(static_cast<size_t>(threads.num_threads())) {}
    Pool& pool;
    std::vector<int> counts;  // one per thread, written without any lock
    int total = 0;            // written by the last thread at a barrier
    bool is_consistent = true;
};

constexpr int kRounds = 200;

// Every thread counts on; whoever comes last adds up what all have written, which is only right if all are there.
void count_together(void* pointer, int thread) {
    auto& rounds = *static_cast<Rounds*>(pointer);
    for (int i = 0; i < kRounds; ++i) {
        ++rounds.counts[static_cast<size_t>(thread)];
        rounds.pool.barrier([&] { rounds.total = std::accumulate(rounds.counts.begin(), rounds.counts.end(), 0); },
                            [] {});
        if (rounds.total % rounds.pool.num_threads() != 0) rounds.is_consistent = false;
        rounds.pool.barrier();
    }
}

}  // namespace

QERVE_TEST(nobody_passes_a_barrier_before_the_last_one_is_there) {
    for (const int num_threads : {1, 2, 3, 5}) {
        Pool pool(num_threads, false);
        for (int job = 1; job <= 5; ++job) {
            Rounds rounds(pool);
            pool.run(count_together, &rounds);
            CHECK(rounds.is_consistent);
            CHECK_EQUAL(rounds.total, kRounds * num_threads);
        }
    }
}

QERVE_TEST(threads_that_fell_asleep_take_part_in_the_next_job) {
    Pool pool(3, false);
    for (int job = 0; job < 3; ++job) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        std::atomic<int> count{0};
        pool.run([](void* state, int) { ++*static_cast<std::atomic<int>*>(state); }, &count);
        CHECK_EQUAL(count.load(), 3);
    }
}

QERVE_TEST(a_pinned_pool_works_like_any_other) {
    Pool pool(2, true);
    std::atomic<int> count{0};
    pool.run([](void* state, int) { ++*static_cast<std::atomic<int>*>(state); }, &count);
    CHECK_EQUAL(count.load(), 2);
}
