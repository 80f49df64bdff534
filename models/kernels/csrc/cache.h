// Keys and values on their way into the cache: RoPE, the artifact's own rounding, 16- or 8-bit storage.
#pragma once

#include <cstdint>
#include <limits>

#include "grid.h"
#include "kernels.h"

namespace qerve {

template <class Simd>
struct Cache {
    using F = typename Simd::F;
    using I = typename Simd::I;

    // See Kernels::quantize_qkv.
    static void quantize_qkv(const qerve_attention_op& op, int64_t row, int32_t position) {
        float* const query = op.qkv + row * op.ld;
        float* const key = query + static_cast<int64_t>(op.num_heads) * op.head_dim;
        float* const value = key + static_cast<int64_t>(op.num_kv_heads) * op.head_dim;
        for (int32_t head = 0; head < op.num_heads + op.num_kv_heads; ++head) rotate(op, query, head, position);
        round_row(op, query, op.num_heads);
        round_row(op, key, op.num_kv_heads);
        round_row(op, value, op.num_kv_heads);
    }

    // See Kernels::append.
    static void append(const qerve_attention_op& op, int64_t row, int32_t position, int64_t slot, int32_t kv_head) {
        float* const query = op.qkv + row * op.ld;
        float* const key = query + static_cast<int64_t>(op.num_heads) * op.head_dim;
        const float* const value = key + static_cast<int64_t>(op.num_kv_heads + kv_head) * op.head_dim;
        if (!op.has_quantized_qkv) {
            const int32_t group = op.num_heads / op.num_kv_heads;
            for (int32_t i = 0; i < group; ++i) rotate(op, query, kv_head * group + i, position);
            rotate(op, key, kv_head, position);
        }
        const int64_t head_block = slot / kCacheBlock * op.num_kv_heads + kv_head;
        const int64_t lane = slot % kCacheBlock;
        const int64_t first_key = head_block * op.head_dim * kCacheBlock + lane;
        const int64_t first_value = (head_block * kCacheBlock + lane) * op.head_dim;
        const float* const own_key = key + static_cast<int64_t>(kv_head) * op.head_dim;
        if (op.cache_type == QERVE_CACHE_I8) {
            int8_t codes[kMaxHeadDim];
            op.key_scales[head_block * kCacheBlock + lane] = quantize(own_key, op.head_dim, codes);
            scatter(codes, op.head_dim, static_cast<int8_t*>(op.keys) + first_key);
            int8_t* const values = static_cast<int8_t*>(op.values) + first_value;
            op.value_scales[head_block * kCacheBlock + lane] = quantize(value, op.head_dim, values);
        } else {
            uint16_t halves[kMaxHeadDim];
            to_f16(own_key, op.head_dim, halves);
            scatter(halves, op.head_dim, static_cast<uint16_t*>(op.keys) + first_key);
            to_f16(value, op.head_dim, static_cast<uint16_t*>(op.values) + first_value);
        }
    }

private:
    // Channels i and i + head_dim / 2 of a head are one rotating pair. Without fma, as the reference rounds.
    static void rotate(const qerve_attention_op& op, float* heads, int32_t head, int32_t position) {
        const int32_t half = op.head_dim / 2;  // a multiple of 8
        const float* const cosines = op.cosines + static_cast<int64_t>(position) * half;
        const float* const sines = op.sines + static_cast<int64_t>(position) * half;
        float* const first = heads + static_cast<int64_t>(head) * op.head_dim;
        float* const second = first + half;
        int32_t i = 0;
        for (; i + kLanes <= half; i += kLanes) {
            const F a = Simd::load(first + i), b = Simd::load(second + i);
            const F cosine = Simd::load(cosines + i), sine = Simd::load(sines + i);
            Simd::store(first + i, Simd::sub(Simd::mul(a, cosine), Simd::mul(b, sine)));
            Simd::store(second + i, Simd::add(Simd::mul(b, cosine), Simd::mul(a, sine)));
        }
        for (; i < half; ++i) {
            const float a = first[i], b = second[i];
            first[i] = a * cosines[i] - b * sines[i];
            second[i] = b * cosines[i] + a * sines[i];
        }
    }

    // The numbers on the grid that the row's values are rounded to, in their place; groups span heads.
    static void round_row(const qerve_attention_op& op, float* x, int32_t num_heads) {
        const int64_t n = static_cast<int64_t>(num_heads) * op.head_dim;
        const int64_t length = op.activation.group_size ? op.activation.group_size : n;
        for (int64_t start = 0; start < n; start += length) {
            F poisoned = Simd::zero();
            const Grid grid = Grids<Simd>::choose(op.activation, x + start, length, poisoned);
            const bool is_poisoned = Grids<Simd>::is_poisoned(poisoned);
            const typename Grids<Simd>::Rounder rounder(grid);
            const F factor = Simd::set1(is_poisoned ? std::numeric_limits<float>::quiet_NaN() : grid.scale);
            for (int64_t i = start; i < start + length; i += kLanes) {
                const I code = rounder.round(Simd::load(x + i));
                Simd::store(x + i, Simd::mul(Simd::to_float(code), factor));
            }
        }
    }

    // Codes of n values; returns their scale.
    static float quantize(const float* x, int32_t n, int8_t* codes) {
        const qerve_activation activation = {QERVE_ACTIVATION_8, 8, 0, 1, 0, 1.0f};
        F poisoned = Simd::zero();
        const Grid grid = Grids<Simd>::choose(activation, x, n, poisoned);
        const typename Grids<Simd>::Rounder rounder(grid);
        for (int32_t i = 0; i < n; i += kLanes) Simd::store_i8(codes + i, rounder.round(Simd::load(x + i)));
        return Grids<Simd>::is_poisoned(poisoned) ? std::numeric_limits<float>::quiet_NaN() : grid.scale;
    }

    static void to_f16(const float* x, int32_t n, uint16_t* halves) {
        for (int32_t i = 0; i < n; i += kLanes) Simd::store_f16(halves + i, Simd::load(x + i));
    }

    // Keys lie channel by channel, sixteen tokens side by side.
    template <class T>
    static void scatter(const T* x, int32_t n, T* keys) {
        for (int32_t i = 0; i < n; ++i) keys[static_cast<int64_t>(i) * kCacheBlock] = x[i];
    }
};

}  // namespace qerve
