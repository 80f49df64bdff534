// Creating and destroying what the kernels run in, and the speeds that bound them.
#include "context.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "cpu_features.h"

namespace qerve {

uint8_t* Arena::reserve(int64_t num_bytes) {
    if (num_bytes > capacity_) {
        release();
        capacity_ = aligned(num_bytes);
        memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(capacity_)));
        if (memory_ == nullptr) std::abort();  // a few megabytes: nothing goes on without them
    }
    return memory_;
}

void Arena::release() {
    std::free(memory_);
    memory_ = nullptr;
    capacity_ = 0;
}

const Kernels* table_of(Isa isa) {
    switch (isa) {
#ifdef QERVE_HAS_AMX
        case Isa::amx: return amx_kernels();
#endif
#ifdef QERVE_HAS_AVX512
        case Isa::avx512_vnni: return avx512_kernels();
#endif
#ifdef QERVE_HAS_AVXVNNI
        case Isa::avx_vnni: return avxvnni_kernels();
#endif
#ifdef QERVE_HAS_AVX2
        case Isa::avx2: return avx2_kernels();
#endif
#ifdef QERVE_HAS_NEON
        case Isa::neon_dotprod: return neon_kernels();
#endif
        default: return portable_kernels();
    }
}

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace
}  // namespace qerve

extern "C" {

qerve_context* qerve_context_create(const char* isa, int32_t num_threads, int32_t is_pinned, char* error,
                                    int32_t error_size) {
    const qerve::IsaChoice choice = qerve::choose_isa(isa);
    if (!choice.isa) {
        std::snprintf(error, static_cast<size_t>(error_size), "%s", choice.error.c_str());
        return nullptr;
    }
    if (num_threads < 1) {
        std::snprintf(error, static_cast<size_t>(error_size), "%d threads cannot compute anything", num_threads);
        return nullptr;
    }
    return new qerve_context(*qerve::table_of(*choice.isa), num_threads, is_pinned != 0);
}

void qerve_context_destroy(qerve_context* context) { delete context; }

const char* qerve_context_isa(const qerve_context* context) { return context->kernels.name; }

int32_t qerve_context_num_threads(const qerve_context* context) { return context->pool.num_threads(); }

double qerve_peak_read(qerve_context* context, const void* memory, int64_t num_bytes, int32_t repeats) {
    struct State {
        qerve_context* context;
        const uint8_t* memory;
        int64_t num_bytes;
        int32_t repeats;
        std::atomic<uint64_t> sink{0};
    } state{context, static_cast<const uint8_t*>(memory), num_bytes, repeats};
    const auto start = std::chrono::steady_clock::now();
    context->pool.run(
        [](void* pointer, int thread) {
            State& s = *static_cast<State*>(pointer);
            const int64_t share = s.num_bytes / s.context->pool.num_threads() / 64 * 64;
            for (int i = 0; i < s.repeats; ++i) s.sink += s.context->kernels.read_all(s.memory + thread * share, share);
        },
        &state);
    const int64_t share = num_bytes / context->pool.num_threads() / 64 * 64;
    return static_cast<double>(share * context->pool.num_threads()) * repeats / qerve::seconds_since(start);
}

double qerve_peak_int8(qerve_context* context, int64_t iterations) {
    struct State {
        qerve_context* context;
        int64_t iterations;
        std::atomic<int64_t> done{0};
    } state{context, iterations};
    const auto start = std::chrono::steady_clock::now();
    context->pool.run(
        [](void* pointer, int) {
            State& s = *static_cast<State*>(pointer);
            s.done += s.context->kernels.multiply_adds(s.iterations);
        },
        &state);
    return static_cast<double>(state.done.load()) / qerve::seconds_since(start);
}
}
