// A small paged cache with shuffled blocks, random rows, and attention over them in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels.h"
#include "simd_portable.h"

namespace qerve {

struct AttentionShape {
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t window;
    int32_t cache_type;
    int32_t num_tokens;  // of the whole sequence
};

class AttentionCase {
public:
    explicit AttentionCase(const AttentionShape& shape, uint32_t seed = 1) : shape_(shape) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        const int32_t blocks = (shape.num_tokens + kCacheBlock - 1) / kCacheBlock + 3;
        table_.resize(static_cast<size_t>(blocks));
        for (int32_t i = 0; i < blocks; ++i) table_[static_cast<size_t>(i)] = i;
        std::shuffle(table_.begin(), table_.end(), random);
        const auto slots = static_cast<size_t>(blocks * kCacheBlock * shape.num_kv_heads);
        const size_t elements = slots * static_cast<size_t>(shape.head_dim);
        // 0xff is NaN in float16 and in the scales: a slot that was never written must not be seen.
        keys_.assign(elements * (shape.cache_type == QERVE_CACHE_I8 ? 1 : 2), 0xff);
        values_ = keys_;
        key_scales_.assign(slots, std::numeric_limits<float>::quiet_NaN());
        value_scales_ = key_scales_;
        rows_.resize(static_cast<size_t>(shape.num_tokens * ld()));
        for (float& x : rows_) x = normal(random);
        const auto half = static_cast<size_t>(shape.head_dim / 2);
        for (int32_t position = 0; position < shape.num_tokens; ++position) {
            for (size_t i = 0; i < half; ++i) {
                const double angle = position * std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
                cosines_.push_back(static_cast<float>(std::cos(angle)));
                sines_.push_back(static_cast<float>(std::sin(angle)));
            }
        }
    }

    int32_t ld() const { return (shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim; }
    int32_t ldo() const { return shape_.num_heads * shape_.head_dim; }

    // The sequence in steps of the given numbers of tokens, query tiles of `tile` rows: outputs (num_tokens, ldo).
    std::vector<float> run(const Kernels& kernels, const std::vector<int32_t>& steps, int32_t tile) {
        std::vector<float> rows = rows_;
        std::vector<float> outputs(static_cast<size_t>(shape_.num_tokens * ldo()));
        qerve_attention_op op = make_op(rows, outputs);
        scratch_.assign(static_cast<size_t>(kernels.attention_scratch_bytes(op)) + 64, 0xff);
        int32_t begin = 0;
        for (const int32_t step : steps) {
            for (int32_t row = begin; row < begin + step; ++row) append(kernels, op, row);
            for (int32_t row = begin; row < begin + step; row += tile) {
                for (int32_t head = 0; head < shape_.num_kv_heads; ++head) {
                    attend(kernels, op, row, std::min(row + tile, begin + step), head);
                }
            }
            begin += step;
        }
        rotated_ = rows;
        return outputs;
    }

    // What `run` computes, from its rotated rows and the numbers that the cache holds, in float64.
    std::vector<double> expected() const {
        std::vector<double> outputs;
        const int32_t group = shape_.num_heads / shape_.num_kv_heads;
        for (int32_t row = 0; row < shape_.num_tokens; ++row) {
            for (int32_t head = 0; head < shape_.num_heads; ++head) attend_exactly(row, head, head / group, outputs);
        }
        return outputs;
    }

    const std::vector<float>& rotated() const { return rotated_; }
    std::vector<float>& rows() { return rows_; }
    const std::vector<float>& cosines() const { return cosines_; }
    const std::vector<float>& sines() const { return sines_; }

    double key(int32_t token, int32_t head, int32_t channel) const {
        const int64_t block = head_block(token, head);
        const int64_t lane = token % kCacheBlock;
        return read(keys_, (block * shape_.head_dim + channel) * kCacheBlock + lane, key_scales_, block, lane);
    }
    double value(int32_t token, int32_t head, int32_t channel) const {
        const int64_t block = head_block(token, head);
        const int64_t lane = token % kCacheBlock;
        return read(values_, (block * kCacheBlock + lane) * shape_.head_dim + channel, value_scales_, block, lane);
    }

    float softmax_scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }

    qerve_attention_op make_op(std::vector<float>& rows, std::vector<float>& outputs) {
        qerve_attention_op op = {};
        op.qkv = rows.data();
        op.out = outputs.data();
        op.cosines = cosines_.data();
        op.sines = sines_.data();
        op.keys = keys_.data();
        op.values = values_.data();
        op.key_scales = key_scales_.data();
        op.value_scales = value_scales_.data();
        op.ld = ld();
        op.ldo = ldo();
        op.num_heads = shape_.num_heads;
        op.num_kv_heads = shape_.num_kv_heads;
        op.head_dim = shape_.head_dim;
        op.window = shape_.window;
        op.cache_type = shape_.cache_type;
        op.softmax_scale = softmax_scale();
        return op;
    }

    void append(const Kernels& kernels, const qerve_attention_op& op, int32_t row) {
        const int64_t slot = static_cast<int64_t>(table_[static_cast<size_t>(row / kCacheBlock)]) * kCacheBlock + row % kCacheBlock;
        for (int32_t head = 0; head < shape_.num_kv_heads; ++head) kernels.append(op, row, row, slot, head);
    }

    void attend(const Kernels& kernels, const qerve_attention_op& op, int32_t begin, int32_t end, int32_t head) {
        if (scratch_.empty()) scratch_.resize(static_cast<size_t>(kernels.attention_scratch_bytes(op)) + 64);
        uint8_t* const aligned = scratch_.data() + (64 - reinterpret_cast<uintptr_t>(scratch_.data()) % 64) % 64;
        kernels.attend({&op, table_.data(), begin, end, begin, head, aligned});
    }

private:
    int64_t head_block(int32_t token, int32_t head) const {
        return static_cast<int64_t>(table_[static_cast<size_t>(token / kCacheBlock)]) * shape_.num_kv_heads + head;
    }

    double read(const std::vector<uint8_t>& cache, int64_t index, const std::vector<float>& scales, int64_t block,
                int64_t lane) const {
        if (shape_.cache_type == QERVE_CACHE_I8) {
            const double scale = static_cast<double>(scales[static_cast<size_t>(block * kCacheBlock + lane)]);
            return static_cast<int8_t>(cache[static_cast<size_t>(index)]) * scale;
        }
        uint16_t half;
        std::memcpy(&half, cache.data() + 2 * index, 2);
        return static_cast<double>(SimdPortable::half_to_float(half));
    }

    void attend_exactly(int32_t row, int32_t head, int32_t kv_head, std::vector<double>& outputs) const {
        const int32_t first = shape_.window ? std::max(0, row - shape_.window + 1) : 0;
        const float* query = rotated_.data() + static_cast<size_t>(row * ld() + head * shape_.head_dim);
        std::vector<double> weights;
        double largest = -std::numeric_limits<double>::infinity(), total = 0;
        for (int32_t token = first; token <= row; ++token) {
            double score = 0;
            for (int32_t i = 0; i < shape_.head_dim; ++i) score += static_cast<double>(query[i]) * key(token, kv_head, i);
            weights.push_back(score * static_cast<double>(softmax_scale()));
            largest = std::max(largest, weights.back());
        }
        for (double& weight : weights) total += weight = std::exp(weight - largest);
        for (int32_t i = 0; i < shape_.head_dim; ++i) {
            double sum = 0;
            for (int32_t token = first; token <= row; ++token) sum += weights[static_cast<size_t>(token - first)] * value(token, kv_head, i);
            outputs.push_back(sum / total);
        }
    }

    AttentionShape shape_;
    std::vector<int32_t> table_;
    std::vector<uint8_t> keys_, values_;
    std::vector<float> key_scales_, value_scales_, rows_, rotated_, cosines_, sines_;
    std::vector<uint8_t> scratch_;
};

}  // namespace qerve
