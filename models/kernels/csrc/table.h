// The function table of one instruction set, from the sources that are written over its `Simd` type.
#pragma once

#include "attention.h"
#include "cache.h"
#include "input.h"
#include "linear.h"

namespace qerve {

template <class S>
uint64_t read_all(const uint8_t* memory, int64_t num_bytes) {
    typename S::I sums[8];
    for (auto& sum : sums) sum = S::zero_i();
    int64_t at = 0;
    for (; at + 512 <= num_bytes; at += 512) {
        for (int i = 0; i < 8; ++i) {
            sums[i] = S::add_i(sums[i], S::load_i(reinterpret_cast<const int32_t*>(memory + at) + 16 * i));
        }
    }
    uint64_t total = 0;
    for (const auto& sum : sums) total += static_cast<uint32_t>(S::reduce_add_i(sum));
    return total;
}

template <class S>
int64_t multiply_adds(int64_t iterations) {
    alignas(64) uint8_t weights[64];
    alignas(64) int8_t x[4] = {1, -2, 3, -4};
    for (int i = 0; i < 64; ++i) weights[i] = static_cast<uint8_t>(i);
    const auto w = S::load_bytes(weights);
    constexpr int kSums = S::kAccumulators / 2;  // enough to hide the latency of one
    typename S::I acc[kSums];
    for (auto& a : acc) a = S::zero_i();
    for (int64_t i = 0; i < iterations; ++i) {
        for (auto& a : acc) a = S::dot(a, w, x);
    }
    int32_t sink = 0;
    for (const auto& a : acc) sink += S::reduce_add_i(a);
    return iterations * kSums * 64 + (sink == 12345 ? 1 : 0);
}

template <class S>
Kernels kernels_of(const char* name) {
    Kernels table{};
    table.name = name;
    table.quantize_row = Input<S>::quantize_row;
    table.quantize_reduced = Input<S>::quantize_reduced;
    table.linear = linear<S>;
    table.linear_scratch_bytes = no_scratch<S>;
    table.silu_multiply = Input<S>::silu_multiply;
    table.quantize_qkv = Cache<S>::quantize_qkv;
    table.append = Cache<S>::append;
    table.attend = Attention<S>::attend;
    table.attention_scratch_bytes = Attention<S>::scratch_bytes;
    table.attention_rows = Attention<S>::kTokens;
    table.embed = Input<S>::embed;
    table.read_all = read_all<S>;
    table.multiply_adds = multiply_adds<S>;
    return table;
}

}  // namespace qerve
