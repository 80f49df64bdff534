// One step: every thread walks through the operators, takes shares of each, and meets the others in between.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "context.h"
#include "kernels.h"

namespace qerve {

constexpr int kMaxParts = 8;  // weights of a linear operator

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

    // All threads are here, and what was shared can be shared anew.
    void meet() {
        context_.pool.barrier(
            [](void* context) {
                static_cast<qerve_context*>(context)->next.store(0, std::memory_order_relaxed);
                static_cast<qerve_context*>(context)->num_reduced.store(0, std::memory_order_relaxed);
            },
            &context_);
    }

    // Ask for the first weights of this thread's share of the first linear operator behind `index`: they come while the
    // others finish, and while its input is prepared.
    void fetch_ahead(int index, int thread) const;

    qerve_context& context_;
    const Kernels& kernels_;
    const qerve_op* ops_;
    int num_ops_;
    const qerve_step& step_;
    std::vector<Tile> tiles_;
    bool has_only_decodes_ = false;
};

}  // namespace qerve
