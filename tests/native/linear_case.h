// A packed linear layer of random codes, run through qerve_run, and what a double loop over the codes makes of its input.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels_here.h"

namespace linear_case {

using namespace qerve;

struct Shape {
    int32_t out_features, in_features, num_bits, group_size, rank;
    bool has_zero_points, has_down, is_wide, has_bias, is_added;
};

struct ContextOf {
    ContextOf(const char* isa, int threads) {
        char error[200] = "";
        context = qerve_context_create(isa, threads, 0, error, sizeof error);
        CHECK(context != nullptr);
    }
    ~ContextOf() { qerve_context_destroy(context); }
    ContextOf(const ContextOf&) = delete;
    qerve_context* context;
};

struct Aligned {
    explicit Aligned(int64_t size) : bytes(static_cast<size_t>(size) + 64) {}
    uint8_t* data() { return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64; }
    std::vector<uint8_t> bytes;
};

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix of 8-bit or narrower codes: values, and the same packed.
struct Weight {
    Weight(qerve_context* context, std::mt19937& random, int rows, int columns, int bits, int group, bool has_zeros, int rank)
        : num_rows(rows), num_columns(columns), group_size(group), padded_rank(round_up(rank, 32)),
          codes(static_cast<size_t>(rows) * columns), scales(static_cast<size_t>(rows) * (columns / group)),
          zeros(scales.size()), up(static_cast<size_t>(rows) * padded_rank, 128), up_scales(up.size() / 32),
          has_zero_points(has_zeros) {
        std::uniform_int_distribution<int> code(0, (1 << bits) - 1), byte(1, 255);
        std::uniform_int_distribution<int> step(32, 64);  // of 2**-11: float16 holds them
        for (uint8_t& c : codes) c = static_cast<uint8_t>(code(random));
        for (uint8_t& z : zeros) z = static_cast<uint8_t>(has_zeros ? code(random) : 1 << (bits - 1));
        for (float& s : scales) s = static_cast<float>(step(random)) / 2048.0f;
        for (float& s : up_scales) s = static_cast<float>(step(random)) / 2048.0f;
        for (int r = 0; r < rows; ++r) {
            for (int i = 0; i < rank; ++i) up[static_cast<size_t>(r) * padded_rank + i] = static_cast<uint8_t>(byte(random));
        }
        matrix.storage_bits = bits == 2 ? 2 : bits <= 4 ? 4 : 8;
        matrix.zero = 1 << (bits - 1);
        matrix.rank = rank;
        pack(context);
    }

    void pack(qerve_context* context) {
        qerve_source source{};
        source.codes = codes.data();
        source.scales = scales.data();
        source.zero_points = has_zero_points ? zeros.data() : nullptr;
        source.out_features = num_rows;
        source.in_features = num_columns;
        source.code_bits = 8;
        source.group_size = group_size;
        source.up_codes = matrix.rank > 0 ? up.data() : nullptr;
        source.up_scales = matrix.rank > 0 ? up_scales.data() : nullptr;
        char error[200] = "";
        const int64_t size = qerve_pack_plan(&source, &matrix, error, sizeof error);
        CHECK(size > 0);
        strips = Aligned(size);
        matrix.strips = strips.data();
        qerve_pack(context, &source, &matrix);
    }

    double value(int row, int column) const {
        const size_t at = static_cast<size_t>(row) * num_columns + column;
        const size_t group = static_cast<size_t>(row) * (num_columns / group_size) + column / group_size;
        return (double{codes[at] * 1.0} - zeros[group]) * scales[group];
    }
    double up_value(int row, int component) const {
        const size_t at = static_cast<size_t>(row) * padded_rank + component;
        return (up[at] - 128.0) * up_scales[at / 32];
    }

    int num_rows, num_columns, group_size, padded_rank;
    std::vector<uint8_t> codes;
    std::vector<float> scales;
    std::vector<uint8_t> zeros, up;
    std::vector<float> up_scales;
    bool has_zero_points;
    Aligned strips{0};
    qerve_matrix matrix{};
};

// The values that 8- or 16-bit codes of a row stand for.
inline std::vector<double> rounded(const float* x, int n, int block, bool is_wide) {
    std::vector<double> values;
    for (int start = 0; start < n; start += block) {
        float absmax = 0;
        for (int i = 0; i < block; ++i) absmax = std::max(absmax, std::fabs(x[start + i]));
        const double step = absmax / (is_wide ? 32512.0 : 127.0);
        for (int i = 0; i < block; ++i) values.push_back(step == 0 ? 0 : std::nearbyint(x[start + i] / step) * step);
    }
    return values;
}

inline bool is_row_finite(const std::vector<float>& y, int row, int width) {
    const auto begin = y.begin() + int64_t{row} * width;
    return std::all_of(begin, begin + width, [](float value) { return std::isfinite(value); });
}

struct Layer {
    Layer(qerve_context* context, std::mt19937& random, const Shape& s)
        : shape(s), weight(context, random, s.out_features, s.in_features, s.num_bits, s.group_size, s.has_zero_points, s.rank),
          block(s.group_size % 64 == 0 ? 64 : 32),
          down(context, random, std::max(32, round_up(s.rank, 32)), s.in_features, 8, block, false, 0),
          bias(static_cast<size_t>(s.out_features), 0.5f) {
        if (s.has_bias) weight.matrix.bias = bias.data();
        if (s.rank > 0 && s.has_down) weight.matrix.down = &down.matrix;
    }

    // The same layer with zeros for all components of its low-rank term from `rank` on; scales stay as they are.
    void truncate(qerve_context* context, int rank) {
        for (int r = 0; r < weight.num_rows; ++r) {
            for (int i = rank; i < weight.padded_rank; ++i) weight.up[static_cast<size_t>(r) * weight.padded_rank + i] = 128;
        }
        for (int r = rank; r < down.num_rows; ++r) {
            std::fill_n(down.codes.begin() + int64_t{r} * down.num_columns, down.num_columns, uint8_t{128});
        }
        weight.pack(context);
        down.pack(context);
    }

    std::vector<float> run(qerve_context* context, const std::vector<float>& x, int num_rows, const int32_t* ranks = nullptr) {
        std::vector<float> y(static_cast<size_t>(num_rows) * shape.out_features, shape.is_added ? 1.0f : -9.0f);
        const qerve_matrix* parts[] = {&weight.matrix};
        const int32_t columns[] = {0}, starts[] = {0};
        qerve_linear_op op{};
        op.input.in_features = shape.in_features;
        op.input.block = block;
        op.input.activation.kind = shape.is_wide ? QERVE_ACTIVATION_16 : QERVE_ACTIVATION_8;
        op.x = x.data();
        op.y = y.data();
        op.parts = parts;
        op.columns = columns;
        op.ldx = shape.in_features;
        op.ldy = shape.out_features;
        op.num_parts = 1;
        op.mode = shape.is_added ? QERVE_OUTPUT_ADD : QERVE_OUTPUT_STORE;
        const qerve_op ops[] = {{QERVE_OP_LINEAR, &op}};
        qerve_step step{};
        step.starts = starts;
        step.num_tokens = num_rows;
        step.ranks = ranks;
        char error[200] = "";
        CHECK_EQUAL(qerve_run(context, ops, 1, &step, error, sizeof error), 0);
        return y;
    }

    std::vector<double> expected(const float* x) const {
        const std::vector<double> codes = rounded(x, shape.in_features, block, shape.is_wide);
        std::vector<double> reduced(codes.begin(), codes.begin() + std::min(shape.rank, shape.in_features));
        for (int i = 0; shape.has_down && i < shape.rank; ++i) {
            reduced[static_cast<size_t>(i)] = 0;
            for (int c = 0; c < shape.in_features; ++c) reduced[static_cast<size_t>(i)] += codes[static_cast<size_t>(c)] * down.value(i, c);
        }
        std::vector<double> outputs;
        for (int row = 0; row < shape.out_features; ++row) {
            double sum = (shape.is_added ? 1.0 : 0.0) + (shape.has_bias ? 0.5 : 0.0);
            for (int c = 0; c < shape.in_features; ++c) sum += codes[static_cast<size_t>(c)] * weight.value(row, c);
            for (int i = 0; i < shape.rank; ++i) sum += reduced[static_cast<size_t>(i)] * weight.up_value(row, i);
            outputs.push_back(sum);
        }
        return outputs;
    }

    Shape shape;
    Weight weight;
    int block;
    Weight down;
    std::vector<float> bias;
};

inline std::vector<Shape> shapes() {
    std::vector<Shape> all;
    std::mt19937 random(7);
    const auto pick = [&](std::initializer_list<int> from) {
        return *(from.begin() + std::uniform_int_distribution<size_t>(0, from.size() - 1)(random));
    };
    for (int i = 0; i < 24; ++i) {
        Shape s{};
        s.in_features = pick({64, 96, 192, 384});
        s.group_size = pick({32, 64, 96, 192, 0});
        if (s.group_size == 0 || s.in_features % s.group_size != 0) s.group_size = s.in_features;
        s.out_features = pick({1, 15, 32, 50, 96});
        s.num_bits = pick({2, 3, 4, 5, 8});
        s.rank = pick({0, 1, 32, 40});
        s.has_zero_points = pick({0, 1});
        s.has_down = pick({0, 1});
        s.is_wide = pick({0, 1});
        s.has_bias = pick({0, 1});
        s.is_added = pick({0, 1});
        all.push_back(s);
    }
    return all;
}

inline std::string describe(const Shape& s, const char* isa, int rows) {
    std::ostringstream text;
    text << isa << ": " << s.out_features << " x " << s.in_features << ", " << s.num_bits << " bits, groups of " << s.group_size
         << ", rank " << s.rank << (s.has_down ? "" : " of first channels") << (s.is_wide ? ", wide" : "") << ", " << rows
         << " rows";
    return text.str();
}

inline std::vector<float> random_rows(std::mt19937& random, int rows, int columns) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(rows) * columns);
    for (float& value : x) value = normal(random);
    return x;
}

}  // namespace linear_case
