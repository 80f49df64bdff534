// Rows to integers against direct implementations: the transforms in float64, the codes by the definition of their grid.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "kernels_here.h"

using namespace qerve;
using qerve_test::runnable_kernels;

namespace {

// One quantized row, as integers and as numbers.
struct Row {
    std::vector<int32_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> sums;
    int32_t block = 0;

    double value(size_t i) const { return codes[i] * static_cast<double>(scales[i / static_cast<size_t>(block)]); }
};

struct Buffers {
    Buffers(int32_t n, int32_t block, bool is_wide)
        : hi(static_cast<size_t>(3 * (n + 64)), 99), lo(hi), scales(static_cast<size_t>(3 * (n / block)), -1.0f), sums(scales.size(), -1) {
        codes = {hi.data(), is_wide ? lo.data() : nullptr, scales.data(), sums.data(), n + 64, 3, n / block, block};
    }

    // Row 1 of three; the others must be as they were.
    Row row(int32_t n) const {
        Row result;
        result.block = codes.block;
        for (int64_t i = 0; i < n; ++i) {
            const auto at = static_cast<size_t>(codes.stride + i);
            result.codes.push_back(codes.lo ? 256 * hi[at] + lo[at] : hi[at]);
        }
        const auto blocks = static_cast<size_t>(codes.num_blocks);
        for (size_t i = 0; i < 3 * blocks; ++i) {
            const bool is_own = i % 3 == 1;
            if (is_own) result.scales.push_back(scales[i]), result.sums.push_back(sums[i]);
            else CHECK(scales[i] == -1.0f && sums[i] == -1);
        }
        for (size_t i = 0; i < hi.size(); ++i) {
            const auto at = static_cast<int64_t>(i);
            CHECK((at >= codes.stride && at < codes.stride + n) || (hi[i] == 99 && lo[i] == 99));
        }
        return result;
    }

    std::vector<int8_t> hi, lo;
    std::vector<float> scales;
    std::vector<int32_t> sums;
    Codes codes;
};

Row quantize(const Kernels& kernels, const qerve_input& input, const std::vector<float>& x) {
    Buffers buffers(input.in_features, input.block, needs_wide(input.activation));
    std::vector<float> scratch(2 * x.size() + 16);
    float* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4 % 16;
    kernels.quantize_row(input, x.data(), 1, buffers.codes, aligned);
    return buffers.row(input.in_features);
}

qerve_input plain_input(int32_t n, int32_t block, const qerve_activation& activation) {
    qerve_input input = {};
    input.in_features = n;
    input.block = block;
    input.norm_eps = 1e-5f;
    input.activation = activation;
    return input;
}

qerve_activation internal(int32_t kind) { return {kind, 8, 0, 1, 0, 1.0f}; }

// The codes that models/quant/activation.py gives, one value at a time. std::nearbyint rounds halves to even.
std::vector<int32_t> expected_codes(const qerve_activation& a, int32_t block, const std::vector<float>& x, std::vector<float>& scales) {
    const auto n = x.size();
    const bool is_internal = a.kind == QERVE_ACTIVATION_8 || a.kind == QERVE_ACTIVATION_16;
    const size_t length = is_internal ? static_cast<size_t>(block) : a.group_size ? static_cast<size_t>(a.group_size) : n;
    std::vector<int32_t> codes;
    for (size_t start = 0; start < n; start += length) {
        float low = 0, high = 0;
        for (size_t i = start; i < start + length; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
        const float absmax = std::max(-low, high);
        float largest = a.kind == QERVE_ACTIVATION_16 ? 32512.0f : a.kind == QERVE_ACTIVATION_8 ? 127.0f : static_cast<float>((1 << (a.num_bits - 1)) - 1);
        float scale = absmax * a.clip_ratio / largest, first = -largest, last = largest;
        if (a.kind == QERVE_ACTIVATION_MXINT) {
            int exponent;
            const float mantissa = std::frexp(absmax, &exponent);
            exponent -= a.is_ceil ? (mantissa == 0.5f) + a.num_bits - 1 : a.num_bits - 1;
            scale = absmax == 0 ? 1.0f : std::ldexp(1.0f, std::clamp(exponent, -126, 127));
        } else if (a.kind == QERVE_ACTIVATION_INT && !a.is_symmetric) {
            const float max_code = static_cast<float>((1 << a.num_bits) - 1);
            scale = high * a.clip_ratio / max_code - low * a.clip_ratio / max_code;
            scale = std::max(scale, std::numeric_limits<float>::min());
            first = std::max(std::nearbyint(low * a.clip_ratio / scale), -max_code);
            last = first + max_code;
        }
        scale = std::max(scale, std::numeric_limits<float>::min());
        for (size_t i = start; i < start + length; ++i) {
            codes.push_back(static_cast<int32_t>(std::clamp(std::nearbyint(x[i] / scale), first, last)));
            if (i % static_cast<size_t>(block) == 0) scales.push_back(scale);
        }
    }
    return codes;
}

std::vector<qerve_activation> activations() {
    std::vector<qerve_activation> all = {internal(QERVE_ACTIVATION_8), internal(QERVE_ACTIVATION_16)};
    for (const int32_t bits : {2, 4, 7, 8}) {
        for (const int32_t group : {0, 64, 192}) {
            for (const float clip : {1.0f, 0.7f}) {
                all.push_back({QERVE_ACTIVATION_INT, bits, group, 1, 0, clip});
                all.push_back({QERVE_ACTIVATION_INT, bits, group, 0, 0, clip});
            }
        }
        for (const int32_t is_ceil : {0, 1}) all.push_back({QERVE_ACTIVATION_MXINT, bits, 32, 1, is_ceil, 1.0f});
    }
    return all;
}

std::vector<std::vector<float>> rows(int32_t n) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<std::vector<float>> all;
    for (const float size : {1.0f, 1e-30f, 1e-41f, 1e36f}) {
        std::vector<float> x(static_cast<size_t>(n));
        for (float& v : x) v = normal(random) * size;
        x[5] *= 30;  // an outlier
        std::fill(x.begin() + 64, x.begin() + 128, 0.0f);
        all.push_back(x);
        for (float& v : x) v = std::abs(v);
        all.push_back(x);
    }
    std::vector<float> halves(static_cast<size_t>(n));  // ties: the scale of symmetric 8 bits is 1
    for (float& v : halves) v = static_cast<float>(static_cast<int>(random() % 509) - 254) / 2;
    for (size_t i = 0; i < halves.size(); i += 32) halves[i] = 127;
    all.push_back(halves);
    all.push_back(std::vector<float>(static_cast<size_t>(n), 0.0f));
    return all;
}

std::vector<double> hadamard(const std::vector<double>& x, size_t block) {
    std::vector<double> out;
    for (size_t start = 0; start < x.size(); start += block) {
        for (size_t i = 0; i < block; ++i) {
            double sum = 0;
            for (size_t j = 0; j < block; ++j) sum += __builtin_parityll(i & j) ? -x[start + j] : x[start + j];
            out.push_back(sum / std::sqrt(static_cast<double>(block)));
        }
    }
    return out;
}

// silu(gate) * up over any number of values that rows of 32 hold.
void silu_multiply(const Kernels& kernels, std::vector<float>& gate, const std::vector<float>& up) {
    const auto num_rows = static_cast<int64_t>(gate.size() / 32);
    kernels.silu_multiply(gate.data(), up.data(), num_rows, 32, gate.data(), 32);
}

}  // namespace

QERVE_TEST(codes_are_those_of_the_grid) {
    constexpr int32_t n = 384;
    for (const Kernels* kernels : runnable_kernels()) {
        for (const qerve_activation& activation : activations()) {
            const int32_t block = activation.kind == QERVE_ACTIVATION_MXINT ? 32 : 64;
            for (const std::vector<float>& x : rows(n)) {
                const Row row = quantize(*kernels, plain_input(n, block, activation), x);
                std::vector<float> scales;
                CHECK(row.codes == expected_codes(activation, block, x, scales));
                CHECK(row.scales == scales);
                for (size_t b = 0; b < row.sums.size(); ++b) {
                    const auto first = row.codes.begin() + static_cast<int64_t>(b) * block;
                    CHECK_EQUAL(row.sums[b], std::accumulate(first, first + block, 0));
                }
                if (needs_wide(activation)) continue;
                for (const int32_t code : row.codes) CHECK(code >= -127 && code <= 127);
            }
        }
    }
}

QERVE_TEST(a_row_is_normed_divided_gathered_and_rotated) {
    constexpr int32_t n = 768;
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    std::vector<float> x(n), gain(n), divisor(n);
    std::vector<int32_t> order(n);
    for (float& v : x) v = 3 * normal(random);
    for (float& v : gain) v = 1 + normal(random) / 4;
    for (float& v : divisor) v = std::exp(normal(random));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (const Kernels* kernels : runnable_kernels()) {
        for (int steps = 0; steps < 8; ++steps) {
            for (const int32_t rotation : {0, 2, 4, 8, 16, 32, 64, 128, 256}) {
                qerve_input input = plain_input(n, 64, internal(QERVE_ACTIVATION_16));
                input.norm_weight = steps & 1 ? gain.data() : nullptr;
                input.divisor = steps & 2 ? divisor.data() : nullptr;
                input.channel_order = steps & 4 ? order.data() : nullptr;
                input.rotation_block = rotation;
                double mean = 0;
                for (const float v : x) mean += static_cast<double>(v) * static_cast<double>(v) / n;
                std::vector<double> scaled(x.begin(), x.end());
                for (size_t i = 0; i < scaled.size(); ++i) {
                    if (steps & 1) scaled[i] *= static_cast<double>(gain[i]) / std::sqrt(mean + 1e-5);
                    if (steps & 2) scaled[i] /= static_cast<double>(divisor[i]);
                }
                std::vector<double> expected = scaled;
                if (steps & 4) for (size_t i = 0; i < scaled.size(); ++i) expected[i] = scaled[static_cast<size_t>(order[i])];
                if (rotation) expected = hadamard(expected, static_cast<size_t>(rotation));
                const Row row = quantize(*kernels, input, x);
                for (size_t i = 0; i < expected.size(); ++i) {
                    const double step = static_cast<double>(row.scales[i / 64]);
                    CHECK(std::abs(row.value(i) - expected[i]) < 0.52 * step);
                }
            }
        }
    }
}

QERVE_TEST(input_kernels_have_the_same_bits_on_all_instruction_sets) {
    constexpr int32_t n = 576;
    std::mt19937 random(8);
    std::normal_distribution<float> normal;
    std::vector<float> gain(n), gate(n), up(n);
    for (float& v : gain) v = normal(random);
    for (float& v : gate) v = 20 * normal(random);
    for (float& v : up) v = normal(random);
    std::vector<float> expected_products = gate;
    silu_multiply(*portable_kernels(), expected_products, up);
    for (const Kernels* kernels : runnable_kernels()) {
        for (const std::vector<float>& x : rows(n)) {
            for (const int32_t rotation : {0, 64}) {
                qerve_input input = plain_input(n, 64, internal(QERVE_ACTIVATION_8));
                input.norm_weight = gain.data();
                input.rotation_block = rotation;
                const Row row = quantize(*kernels, input, x), expected = quantize(*portable_kernels(), input, x);
                CHECK(row.codes == expected.codes && row.scales == expected.scales && row.sums == expected.sums);
            }
        }
        std::vector<float> products = gate;
        silu_multiply(*kernels, products, up);
        CHECK(std::memcmp(products.data(), expected_products.data(), n * sizeof(float)) == 0);
    }
}

QERVE_TEST(what_is_not_a_number_makes_the_scales_of_its_row_not_numbers) {
    for (const Kernels* kernels : runnable_kernels()) {
        for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
            for (const size_t at : {size_t{0}, size_t{17}, size_t{383}}) {
                for (const qerve_activation& activation : activations()) {
                    const int32_t block = activation.kind == QERVE_ACTIVATION_MXINT ? 32 : 64;
                    std::vector<float> x(384, 0.5f);
                    x[at] = bad;
                    const Row row = quantize(*kernels, plain_input(384, block, activation), x);
                    for (const float scale : row.scales) CHECK(std::isnan(scale));
                    for (const int32_t code : row.codes) CHECK_EQUAL(code, 0);
                }
            }
        }
    }
}

QERVE_TEST(reduced_rows_are_quantized_block_by_block) {
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    std::vector<float> x(96);
    for (float& v : x) v = normal(random);
    for (const Kernels* kernels : runnable_kernels()) {
        Buffers buffers(96, 32, true);
        for (const int32_t block : {2, 0, 1}) kernels->quantize_reduced(x.data(), 1, block, buffers.codes);
        const Row row = buffers.row(96);
        std::vector<float> scales;
        CHECK(row.codes == expected_codes(internal(QERVE_ACTIVATION_16), 32, x, scales));
        CHECK(row.scales == scales);
        x[40] = std::nanf("");
        kernels->quantize_reduced(x.data(), 1, 1, buffers.codes);
        CHECK(std::isnan(buffers.row(96).scales[1]));
        CHECK(!std::isnan(buffers.row(96).scales[0]));
        x[40] = 1.0f;
    }
}

QERVE_TEST(silu_writes_rows_of_any_width_where_they_belong) {
    for (const Kernels* kernels : runnable_kernels()) {
        const std::vector<float> gate(3 * 32, 2.0f), up(3 * 32, 0.5f);
        for (const int64_t width : {1, 15, 16, 17, 32}) {
            std::vector<float> out(3 * 40, -1.0f);
            kernels->silu_multiply(gate.data(), up.data(), 3, width, out.data(), 40);
            for (size_t i = 0; i < out.size(); ++i) {
                const bool is_written = static_cast<int64_t>(i % 40) < width;
                CHECK(std::abs(static_cast<double>(out[i]) - (is_written ? 1 / (1 + std::exp(-2.0)) : -1.0)) < 1e-6);
            }
        }
    }
}

QERVE_TEST(silu_is_accurate_over_the_whole_range) {
    std::mt19937 random(10);
    for (const Kernels* kernels : runnable_kernels()) {
        std::vector<float> gate;
        for (int i = 0; i < 16000; ++i) gate.push_back(std::uniform_real_distribution<float>(-87.0f, 100.0f)(random));
        for (int i = 0; i < 16000; ++i) gate.push_back(std::ldexp(std::uniform_real_distribution<float>(-1.0f, 1.0f)(random), -static_cast<int>(random() % 100)));
        std::vector<float> products = gate;
        const std::vector<float> up(gate.size(), 1.0f);
        silu_multiply(*kernels, products, up);
        double worst = 0;
        for (size_t i = 0; i < gate.size(); ++i) {
            const double x = static_cast<double>(gate[i]), expected = x / (1 + std::exp(-x));
            worst = std::max(worst, std::abs(static_cast<double>(products[i]) - expected) / std::abs(expected));
        }
        CHECK(worst < 3e-7);
        const float far[16] = {-88.0f, -89.0f, -1e3f, -1e30f, -3e38f, 3e38f, 1e30f, 200.0f, 0.0f, -0.0f, 1e-40f, -1e-40f,
                               std::numeric_limits<float>::infinity(), std::nanf(""), 1.0f, 1.0f};
        float results[16];
        std::copy(far, far + 16, results);
        kernels->silu_multiply(results, up.data(), 1, 16, results, 16);
        for (int i = 0; i < 5; ++i) CHECK(results[i] <= 0.0f && results[i] > -1e-36f);
        for (int i = 5; i < 8; ++i) CHECK_EQUAL(results[i], far[i]);
        for (int i = 8; i < 12; ++i) CHECK(std::abs(results[i]) <= 1e-40f);
        CHECK_EQUAL(results[12], far[12]);
        CHECK(std::isnan(results[13]));
    }
}

QERVE_TEST(embedding_rows_become_float32) {
    constexpr int32_t n = 64;
    std::vector<float> f32(3 * n), scales(3 * n / 32);
    std::vector<uint16_t> bf16(3 * n), f16(3 * n);
    std::vector<int8_t> i8(3 * n);
    for (size_t i = 0; i < f32.size(); ++i) {
        f32[i] = static_cast<float>(i) - 50.5f;  // exact in all of them
        uint32_t bits;
        std::memcpy(&bits, &f32[i], 4);
        bf16[i] = static_cast<uint16_t>(bits >> 16);
        const float magnitude = std::abs(f32[i]);
        int exponent;
        const float mantissa = std::frexp(magnitude, &exponent);
        f16[i] = static_cast<uint16_t>((f32[i] < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | (static_cast<int>(mantissa * 2048) & 1023));
        i8[i] = static_cast<int8_t>(static_cast<int>(i % 255) - 127);
    }
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = 0.5f + static_cast<float>(i);
    const void* tables[] = {f32.data(), bf16.data(), f16.data(), i8.data()};
    for (const Kernels* kernels : runnable_kernels()) {
        for (const int32_t type : {QERVE_EMBED_F32, QERVE_EMBED_BF16, QERVE_EMBED_F16, QERVE_EMBED_I8}) {
            std::vector<float> hidden(n + 16, 7.0f);
            qerve_embed_op op = {tables[type], scales.data(), hidden.data(), n, 3, type, 32};
            kernels->embed(op, 2, hidden.data());
            for (size_t i = 0; i < n; ++i) {
                const size_t at = 2 * n + i;
                float bf;  // bfloat16 keeps 8 bits of the mantissa
                const uint32_t bits = static_cast<uint32_t>(bf16[at]) << 16;
                std::memcpy(&bf, &bits, 4);
                const float expected = type == QERVE_EMBED_BF16 ? bf : type == QERVE_EMBED_I8 ? i8[at] * scales[at / 32] : f32[at];
                CHECK_EQUAL(hidden[i], expected);
            }
            CHECK_EQUAL(hidden[n], 7.0f);
        }
    }
}
