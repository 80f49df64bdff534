// What happens to rows of float32 before matrices read them: norm, divide, gather, rotate, quantize.
// And the small row operations around it: embedding rows, SwiGLU. See kernels.h for the contracts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "functions.h"
#include "grid.h"
#include "kernels.h"

namespace qerve {

template <class Simd>
struct Input {
    using F = typename Simd::F;
    using I = typename Simd::I;

    static void quantize_row(const qerve_input& input, const float* x, int64_t row, const Codes& codes, float* scratch) {
        const float* values = transform(input, x, scratch);
        const int64_t n = input.in_features;
        const bool has_groups = input.activation.kind == QERVE_ACTIVATION_INT || input.activation.kind == QERVE_ACTIVATION_MXINT;
        const int64_t length = !has_groups ? codes.block : input.activation.group_size ? input.activation.group_size : n;
        F poisoned = Simd::zero();
        for (int64_t start = 0; start < n; start += length) {
            const Grid grid = Grids<Simd>::choose(input.activation, values + start, length, poisoned);
            for (int64_t i = start; i < start + length; i += codes.block) {
                round_block(grid, values + i, codes, row, i / codes.block);
            }
        }
        if (Grids<Simd>::is_poisoned(poisoned)) {
            for (int32_t block = 0; block < codes.num_blocks; ++block) poison_block(codes, row, block);
        }
    }

    static void quantize_reduced(const float* reduced, int64_t row, int32_t block, const Codes& codes) {
        const qerve_activation activation = {QERVE_ACTIVATION_16, 16, kRankBlock, 1, 0, 1.0f};
        const float* values = reduced + static_cast<int64_t>(block) * kRankBlock;
        F poisoned = Simd::zero();
        const Grid grid = Grids<Simd>::choose(activation, values, kRankBlock, poisoned);
        round_block(grid, values, codes, row, block);
        if (Grids<Simd>::is_poisoned(poisoned)) poison_block(codes, row, block);
    }

    static void silu_multiply(const float* gate, const float* up, int64_t num_rows, int64_t width, float* out, int64_t ld) {
        for (int64_t row = 0; row < num_rows; ++row, gate += kStripRows, up += kStripRows, out += ld) {
            for (int64_t i = 0; i < width; i += kLanes) {
                const F product = Simd::mul(Functions<Simd>::silu(Simd::load(gate + i)), Simd::load(up + i));
                if (i + kLanes <= width) {
                    Simd::store(out + i, product);
                } else {
                    float lanes[kLanes];
                    Simd::store(lanes, product);
                    std::memcpy(out + i, lanes, static_cast<size_t>(width - i) * sizeof(float));
                }
            }
        }
    }

    static void embed(const qerve_embed_op& op, int32_t token, float* hidden) {
        const int64_t n = op.hidden_size;
        const int64_t first = token * n;
        if (op.type == QERVE_EMBED_F32) {
            std::memcpy(hidden, static_cast<const float*>(op.table) + first, static_cast<size_t>(n) * sizeof(float));
        } else if (op.type == QERVE_EMBED_BF16) {
            const int16_t* row = static_cast<const int16_t*>(op.table) + first;
            for (int64_t i = 0; i < n; i += kLanes) {
                Simd::store(hidden + i, Simd::as_float(Simd::template shift_left<16>(Simd::load_i16(row + i))));
            }
        } else if (op.type == QERVE_EMBED_F16) {
            const uint16_t* row = static_cast<const uint16_t*>(op.table) + first;
            for (int64_t i = 0; i < n; i += kLanes) Simd::store(hidden + i, Simd::load_f16(row + i));
        } else {
            const int8_t* row = static_cast<const int8_t*>(op.table) + first;
            const float* scales = op.scales + first / op.group_size;
            for (int64_t i = 0; i < n; ++i) hidden[i] = static_cast<float>(row[i]) * scales[i / op.group_size];
        }
    }

    // x as the codes and factors of the layer expect it: x itself, or somewhere in `scratch` (2 * in_features).
    static const float* transform(const qerve_input& input, const float* x, float* scratch) {
        const int64_t n = input.in_features;
        if (input.norm_weight != nullptr || input.divisor != nullptr) {
            scale_channels(input, x, scratch);
            x = scratch;
        }
        if (input.channel_order != nullptr) {
            float* gathered = x == scratch ? scratch + n : scratch;
            for (int64_t i = 0; i < n; ++i) gathered[i] = x[input.channel_order[i]];
            x = gathered;
        }
        if (input.rotation_block > 1) {
            float* rotated = x == scratch + n ? scratch + n : scratch;
            rotate(x, rotated, n, input.rotation_block);
            x = rotated;
        }
        return x;
    }

private:
    static void scale_channels(const qerve_input& input, const float* x, float* out) {
        const int64_t n = input.in_features;
        F inverse = Simd::set1(1.0f);
        if (input.norm_weight != nullptr) inverse = Simd::set1(inverse_rms(x, n, input.norm_eps));
        for (int64_t i = 0; i < n; i += kLanes) {
            F v = Simd::load(x + i);
            if (input.norm_weight != nullptr) v = Simd::mul(Simd::mul(v, inverse), Simd::load(input.norm_weight + i));
            if (input.divisor != nullptr) v = Simd::div(v, Simd::load(input.divisor + i));
            Simd::store(out + i, v);
        }
    }

    static float inverse_rms(const float* x, int64_t n, float eps) {
        F even = Simd::zero(), odd = Simd::zero();  // two chains of additions hide their latency
        for (int64_t i = 0; i < n; i += 2 * kLanes) {
            const F a = Simd::load(x + i), b = Simd::load(x + i + kLanes);
            even = Simd::fma(a, a, even);
            odd = Simd::fma(b, b, odd);
        }
        const float mean = Simd::reduce_add(Simd::add(even, odd)) / static_cast<float>(n);
        return 1.0f / std::sqrt(mean + eps);
    }

    // Every block of `block` channels (a power of two) times Sylvester's matrix over sqrt(block). The matrix is a
    // Kronecker power of [[1, 1], [1, -1]]: one butterfly per bit of the channel number, in any order.
    static void rotate(const float* x, float* out, int64_t n, int64_t block) {
        const F scale = Simd::set1(1.0f / std::sqrt(static_cast<float>(block)));
        for (int64_t i = 0; i < n; i += kLanes) {
            F v = Simd::mul(Simd::load(x + i), scale);
            v = butterfly<1>(v);
            if (block > 2) v = butterfly<2>(v);
            if (block > 4) v = butterfly<4>(v);
            if (block > 8) v = butterfly<8>(v);
            Simd::store(out + i, v);
        }
        int64_t stride = kLanes;
        for (; 4 * stride <= block; stride *= 4) {
            for (int64_t start = 0; start < n; start += 4 * stride) four_butterflies(out + start, stride);
        }
        if (2 * stride > block) return;
        for (int64_t start = 0; start < n; start += 2 * stride) {
            for (int64_t i = start; i < start + stride; i += kLanes) {
                const F a = Simd::load(out + i), b = Simd::load(out + i + stride);
                Simd::store(out + i, Simd::add(a, b));
                Simd::store(out + i + stride, Simd::sub(a, b));
            }
        }
    }

    // Two levels at once: half the loads and stores.
    static void four_butterflies(float* x, int64_t stride) {
        for (int64_t i = 0; i < stride; i += kLanes) {
            float* p = x + i;
            const F a = Simd::load(p), b = Simd::load(p + stride);
            const F c = Simd::load(p + 2 * stride), d = Simd::load(p + 3 * stride);
            const F ab = Simd::add(a, b), cd = Simd::add(c, d), ab_minus = Simd::sub(a, b), cd_minus = Simd::sub(c, d);
            Simd::store(p, Simd::add(ab, cd));
            Simd::store(p + stride, Simd::add(ab_minus, cd_minus));
            Simd::store(p + 2 * stride, Simd::sub(ab, cd));
            Simd::store(p + 3 * stride, Simd::sub(ab_minus, cd_minus));
        }
    }

    // Lanes i and i ^ distance become their sum and difference.
    template <int distance>
    static F butterfly(F a) {
        float signs[kLanes];
        for (int i = 0; i < kLanes; ++i) signs[i] = (i & distance) ? -1.0f : 1.0f;
        return Simd::fma(a, Simd::load(signs), Simd::template swap<distance>(a));
    }

    static void round_block(const Grid& grid, const float* x, const Codes& codes, int64_t row, int64_t block) {
        const int64_t start = row * codes.stride + block * codes.block;
        const typename Grids<Simd>::Rounder rounder(grid);
        I sum = Simd::zero_i();
        for (int32_t i = 0; i < codes.block; i += kLanes) {
            const I code = rounder.round(Simd::load(x + i));
            sum = Simd::add_i(sum, code);
            if (codes.lo == nullptr) {
                Simd::store_i8(codes.hi + start + i, code);
            } else {
                const I hi = Simd::template shift_right<8>(Simd::add_i(code, Simd::set1_i(128)));
                Simd::store_i8(codes.hi + start + i, hi);
                Simd::store_i8(codes.lo + start + i, Simd::sub_i(code, Simd::template shift_left<8>(hi)));
            }
        }
        codes.scale[codes.at(row, block)] = grid.scale;
        codes.sum[codes.at(row, block)] = Simd::reduce_add_i(sum);
    }

    static void poison_block(const Codes& codes, int64_t row, int64_t block) {
        const int64_t start = row * codes.stride + block * codes.block;
        std::memset(codes.hi + start, 0, static_cast<size_t>(codes.block));
        if (codes.lo != nullptr) std::memset(codes.lo + start, 0, static_cast<size_t>(codes.block));
        codes.scale[codes.at(row, block)] = std::numeric_limits<float>::quiet_NaN();
        codes.sum[codes.at(row, block)] = 0;
    }
};

}  // namespace qerve
