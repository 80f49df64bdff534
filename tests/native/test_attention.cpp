// Attention and the cache against float64, and against themselves in other tiles and steps and instruction sets.
#include <cmath>
#include <cstring>

#include "attention_case.h"
#include "kernels_here.h"

using namespace qerve;
using qerve_test::runnable_kernels;

namespace {

std::vector<AttentionShape> shapes() {
    std::vector<AttentionShape> all;
    for (const int32_t cache : {QERVE_CACHE_F16, QERVE_CACHE_I8}) {
        for (const int32_t window : {0, 1, 7, 40, 100}) {
            all.push_back({9, 3, 64, window, cache, 150});
            all.push_back({4, 4, 80, window, cache, 97});  // half a head is no multiple of 16
            all.push_back({8, 1, 16, window, cache, 130});
        }
        all.push_back({2, 1, 256, 0, cache, 70});
        all.push_back({4, 2, 128, 65, cache, 200});
        all.push_back({14, 2, 48, 0, cache, 64});
    }
    return all;
}

std::string describe(const Kernels& kernels, const AttentionShape& s) {
    std::ostringstream text;
    text << kernels.name << ", " << s.num_heads << "/" << s.num_kv_heads << " heads of " << s.head_dim << ", window "
         << s.window << ", cache type " << s.cache_type << ", " << s.num_tokens << " tokens";
    return text.str();
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

double largest_difference(const std::vector<float>& a, const std::vector<double>& b) {
    double largest = 0;
    for (size_t i = 0; i < b.size(); ++i) {
        const double difference = std::abs(static_cast<double>(a[i]) - b[i]);
        if (!(difference <= largest)) largest = difference;  // NaN too
    }
    return largest;
}

qerve_activation grid(int32_t kind, int32_t num_bits, int32_t group_size, bool is_symmetric) {
    return {kind, num_bits, group_size, is_symmetric, 0, 1.0f};
}

}  // namespace

QERVE_TEST(attention_is_a_softmax_over_the_cache) {
    for (const Kernels* kernels : runnable_kernels()) {
        for (const AttentionShape& shape : shapes()) {
            AttentionCase attention(shape);
            const std::vector<float> outputs = attention.run(*kernels, {shape.num_tokens}, kernels->attention_rows);
            const double error = largest_difference(outputs, attention.expected());
            if (!(error < 4e-6)) CHECK_EQUAL(describe(*kernels, shape) + ": error " + std::to_string(error), "small");
        }
    }
}

QERVE_TEST(a_token_attends_alone_as_among_others) {
    for (const Kernels* kernels : runnable_kernels()) {
        for (const AttentionShape& shape : shapes()) {
            const std::vector<float> whole = AttentionCase(shape).run(*kernels, {shape.num_tokens}, kernels->attention_rows);
            const std::vector<int32_t> ones(static_cast<size_t>(shape.num_tokens), 1);
            const bool is_same_alone = same_bits(AttentionCase(shape).run(*kernels, ones, 1), whole);
            std::vector<int32_t> chunks;
            for (int32_t left = shape.num_tokens, size = 1; left > 0; left -= chunks.back(), size = size * 3 % 29 + 1) {
                chunks.push_back(std::min(left, size));
            }
            const bool is_same_in_chunks = same_bits(AttentionCase(shape).run(*kernels, chunks, 5), whole);
            if (!is_same_alone || !is_same_in_chunks) CHECK_EQUAL(describe(*kernels, shape), "the same bits");
        }
    }
}

QERVE_TEST(attention_has_the_same_bits_on_all_instruction_sets) {
    for (const AttentionShape& shape : shapes()) {
        const std::vector<float> expected = AttentionCase(shape).run(*portable_kernels(), {shape.num_tokens}, 7);
        for (const Kernels* kernels : runnable_kernels()) {
            const std::vector<float> outputs = AttentionCase(shape).run(*kernels, {shape.num_tokens}, kernels->attention_rows);
            if (!same_bits(outputs, expected)) CHECK_EQUAL(describe(*kernels, shape), "the portable bits");
        }
    }
}

QERVE_TEST(large_scores_overflow_nothing) {
    for (const Kernels* kernels : runnable_kernels()) {
        const AttentionShape shape = {2, 1, 64, 0, QERVE_CACHE_F16, 140};
        AttentionCase attention(shape);
        for (float& x : attention.rows()) x *= 40.0f;  // scores of some ten thousands: one key takes all of the weight
        const std::vector<float> outputs = attention.run(*kernels, {shape.num_tokens}, kernels->attention_rows);
        CHECK(largest_difference(outputs, attention.expected()) < 0.5);
        for (const float x : outputs) CHECK(std::isfinite(x));
    }
}

QERVE_TEST(not_a_number_in_one_row_stays_where_it_is_seen) {
    for (const Kernels* kernels : runnable_kernels()) {
        for (const int32_t cache : {QERVE_CACHE_F16, QERVE_CACHE_I8}) {
            const AttentionShape shape = {2, 1, 32, 0, cache, 90};
            for (const int32_t offset : {0, 2 * 32, 3 * 32}) {  // in a query, a key, a value
                AttentionCase attention(shape);
                attention.rows()[static_cast<size_t>(80 * attention.ld() + offset)] = std::nanf("");
                const std::vector<int32_t> ones(90, 1);
                const std::vector<float> outputs = attention.run(*kernels, ones, 1);
                const auto ldo = static_cast<size_t>(attention.ldo());
                for (size_t i = 0; i < 80 * ldo; ++i) CHECK(std::isfinite(outputs[i]));
                CHECK(std::isnan(outputs[80 * ldo]));
                CHECK_EQUAL(std::isnan(outputs[89 * ldo]), offset > 0);
            }
        }
    }
}

QERVE_TEST(rotation_turns_pairs_of_channels) {
    for (const Kernels* kernels : runnable_kernels()) {
        for (const int32_t head_dim : {16, 64, 80}) {
            const AttentionShape shape = {4, 2, head_dim, 0, QERVE_CACHE_F16, 33};
            AttentionCase attention(shape);
            attention.run(*kernels, {33}, kernels->attention_rows);
            const int32_t half = head_dim / 2;
            for (int32_t token = 0; token < 33; ++token) {
                for (int32_t head = 0; head < 8; ++head) {  // queries, keys, values
                    const auto first = static_cast<size_t>(token * attention.ld() + head * head_dim);
                    for (int32_t i = 0; i < half; ++i) {
                        const auto c = static_cast<size_t>(i), h = static_cast<size_t>(half);
                        const double a = attention.rows()[first + c], b = attention.rows()[first + h + c];
                        const double cosine = attention.cosines()[static_cast<size_t>(token) * h + c];
                        const double sine = attention.sines()[static_cast<size_t>(token) * h + c];
                        const bool is_value = head >= 6;
                        const double x = is_value ? a : a * cosine - b * sine, y = is_value ? b : b * cosine + a * sine;
                        CHECK(std::abs(attention.rotated()[first + c] - x) < 1e-6);
                        CHECK(std::abs(attention.rotated()[first + h + c] - y) < 1e-6);
                    }
                }
            }
        }
    }
}

QERVE_TEST(the_cache_holds_what_was_appended) {
    for (const Kernels* kernels : runnable_kernels()) {
        for (const int32_t cache : {QERVE_CACHE_F16, QERVE_CACHE_I8}) {
            const AttentionShape shape = {2, 2, 48, 0, cache, 50};
            AttentionCase attention(shape);
            attention.run(*kernels, {50}, kernels->attention_rows);
            for (int32_t token = 0; token < 50; ++token) {
                for (int32_t head = 0; head < 2; ++head) {
                    const float* row = attention.rotated().data() + token * attention.ld() + (2 + head) * 48;
                    float largest = 0;
                    for (int32_t i = 0; i < 48; ++i) largest = std::max(largest, std::abs(row[i]));
                    for (int32_t i = 0; i < 48; ++i) {
                        const double x = static_cast<double>(row[i]);
                        const double half_step = cache == QERVE_CACHE_I8 ? largest / 254.0 : std::abs(x) / 2048 + 1e-7;
                        CHECK(std::abs(attention.key(token, head, i) - x) <= half_step * 1.0001);
                        CHECK(std::abs(attention.value(token, head, i) - row[2 * 48 + i]) < 0.02);
                    }
                }
            }
        }
    }
}

QERVE_TEST(quantized_queries_keys_and_values_lie_on_their_grids) {
    for (const Kernels* kernels : runnable_kernels()) {
        const AttentionShape shape = {4, 2, 32, 0, QERVE_CACHE_F16, 20};
        for (const qerve_activation& activation :
             {grid(QERVE_ACTIVATION_INT, 8, 0, true), grid(QERVE_ACTIVATION_INT, 4, 64, false), grid(QERVE_ACTIVATION_MXINT, 6, 16, true)}) {
            AttentionCase plain(shape), quantized(shape);
            plain.run(*kernels, {20}, kernels->attention_rows);
            std::vector<float> rows = quantized.rows(), outputs(static_cast<size_t>(20 * quantized.ldo()));
            qerve_attention_op op = quantized.make_op(rows, outputs);
            op.has_quantized_qkv = 1;
            op.activation = activation;
            for (int32_t row = 0; row < 20; ++row) kernels->quantize_qkv(op, row, row);
            const std::vector<float> before = rows;
            for (int32_t row = 0; row < 20; ++row) quantized.append(*kernels, op, row);
            CHECK(same_bits(rows, before));  // not rotated twice
            for (int32_t row = 0; row < 20; ++row) {
                for (const auto& [begin, size] : {std::pair{0, 128}, std::pair{128, 64}, std::pair{192, 64}}) {
                    const int32_t length = activation.group_size ? activation.group_size : size;
                    for (int32_t start = begin; start < begin + size; start += length) {
                        const auto at = static_cast<size_t>(row * quantized.ld() + start);
                        double low = 0, high = 0;
                        for (size_t i = at; i < at + static_cast<size_t>(length); ++i) {
                            low = std::min(low, static_cast<double>(plain.rotated()[i]));
                            high = std::max(high, static_cast<double>(plain.rotated()[i]));
                        }
                        const double largest = std::max(-low, high);
                        const int32_t bits = activation.num_bits;
                        const double step = activation.kind == QERVE_ACTIVATION_MXINT ? std::exp2(std::floor(std::log2(largest)) - (bits - 2))
                                            : activation.is_symmetric ? largest / ((1 << (bits - 1)) - 1)
                                                                      : (high - low) / ((1 << bits) - 1);
                        for (size_t i = at; i < at + static_cast<size_t>(length); ++i) {
                            const double code = rows[i] / step;
                            CHECK(std::abs(code - std::round(code)) < 1e-3);
                            CHECK(std::abs(rows[i] - plain.rotated()[i]) <= step * 1.0001);
                        }
                    }
                }
            }
        }
    }
}
