// One step: every thread walks through the operators, takes shares of each, and meets the others in between.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "context.h"
#include "kernels.h"
#include "step_linear.h"

namespace qerve {

constexpr int kMaxParts = 8;  // weights of a linear operator
constexpr int kLinesWhileWaiting = 4;

// Asks for memory that is needed soon, a few cache lines at a time: more at once than the processor can wait for would
// stop it.
class Fetcher {
public:
    Fetcher() = default;
    Fetcher(const uint8_t* memory, int64_t num_bytes) : next_(memory), end_(memory + num_bytes) {}

    void fetch(int num_lines) {
        for (; num_lines > 0 && next_ < end_; --num_lines, next_ += 64) __builtin_prefetch(next_, 0, 2);
    }

private:
    const uint8_t* next_ = nullptr;
    const uint8_t* end_ = nullptr;
};

class Step {
public:
    Step(qerve_context& context, const qerve_op* ops, int num_ops, const qerve_step& step);

    void run();

private:
    // Consecutive rows of one sequence that attend together.
    struct Tile {
        int32_t sequence, row_begin, row_end;
    };

    void work(int thread);
    void embed(const qerve_embed_op& op);
    void linear(int index, int thread);
    void attention(int index, int thread);

    void reserve();

    // The next units below `limit` that nobody has taken, at most `size` of them; false when there are none left.
    bool take(int limit, int size, int& begin, int& end) {
        begin = context_.next.load(std::memory_order_relaxed);
        while (begin < limit) {
            end = std::min(limit, begin + size);
            if (context_.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return true;
        }
        return false;
    }

    // Units 0..num_units go to threads as they ask, large shares first, of `largest` at most.
    template <class Body>
    void share(int num_units, Body&& body, int largest = 1 << 30) {
        share_rest(0, num_units, body, largest);
    }

    // Units 0..num_units of equal cost. Most belong to a thread from the start, side by side, so that it reads weights in
    // one stream and knows before the operator starts where; who is done early takes from the rest. The first `num_taken`
    // numbers of the counter are somebody else's.
    template <class Body>
    void share_evenly(int thread, int num_taken, int num_units, Body&& body) {
        const int own = own_units(num_units);
        if (own > 0) body(thread * own, (thread + 1) * own);
        const int first = own * context_.pool.num_threads();
        const auto rest = [&](int begin, int end) { body(first + begin, first + end); };
        share_rest(num_taken, num_units - first, rest, 1 << 30);
    }

    template <class Body>
    void share_rest(int num_taken, int num_units, Body&& body, int largest) {
        const int num_threads = context_.pool.num_threads();
        int left = num_taken + num_units - context_.next.load(std::memory_order_relaxed);
        for (int begin, end; take(num_taken + num_units, std::clamp(left / (2 * num_threads), 1, largest), begin, end);) {
            body(begin - num_taken, end - num_taken);
            left = num_taken + num_units - end;
        }
    }

    int own_units(int num_units) const { return 7 * num_units / (8 * context_.pool.num_threads()); }

    // All threads are here, and what was shared can be shared anew. Who waits fetches a little of what is ahead.
    void meet(Fetcher& ahead) {
        const auto on_last = [this] {
            context_.next.store(0, std::memory_order_relaxed);
            context_.num_reduced.store(0, std::memory_order_relaxed);
        };
        context_.pool.barrier(on_last, [&] { ahead.fetch(kLinesWhileWaiting); });
    }
    void meet() {
        Fetcher nothing;
        meet(nothing);
    }

    // The first weights of this thread's share of the first linear operator behind `index`.
    Fetcher weights_behind(int index, int thread) const;

    qerve_context& context_;
    const Kernels& kernels_;
    const qerve_op* ops_;
    int num_ops_;
    const qerve_step& step_;
    const RankRange ranks_;
    std::vector<Tile> tiles_;
    bool has_only_decodes_ = false;
};

}  // namespace qerve
