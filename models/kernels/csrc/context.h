// What lives as long as a loaded model: threads, their scratch memory, the chosen instruction set.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu_features.h"
#include "kernels.h"
#include "pool.h"

namespace qerve {

// The kernels of an instruction set that is compiled in.
const Kernels* table_of(Isa isa);

// Memory that only grows, 64-byte aligned.
class Arena {
public:
    ~Arena() { release(); }
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    // At least `num_bytes`, contents undefined; what was handed out before is gone.
    uint8_t* reserve(int64_t num_bytes);

private:
    void release();
    uint8_t* memory_ = nullptr;
    int64_t capacity_ = 0;
};

inline int64_t aligned(int64_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

}  // namespace qerve

struct qerve_context {
    qerve_context(const qerve::Kernels& table, int num_threads, bool is_pinned)
        : kernels(table), pool(num_threads, is_pinned), scratch(static_cast<size_t>(num_threads)) {}

    const qerve::Kernels& kernels;
    qerve::Pool pool;
    qerve::Arena shared;                 // activations of one operator
    std::vector<qerve::Arena> scratch;   // one per thread
    alignas(64) std::atomic<int32_t> next{0};      // unit of work that nobody has taken yet
    alignas(64) std::atomic<int32_t> num_reduced{0};  // finished units of a low-rank term's first product
};
