// Rows that get the first components of a low-rank term only: those of a layer whose other components are zero, bit for
// bit, whatever the other rows of the batch get, and so whether or not blocks of the term are skipped.
#include <limits>

#include "linear_case.h"

using namespace linear_case;

namespace {

constexpr int kAll = std::numeric_limits<int32_t>::max();

// Shapes with every form of the term, some with more than one block of components.
std::vector<Shape> corrected_shapes() {
    std::vector<Shape> all;
    for (const int rank : {1, 32, 40, 96}) {
        for (const bool has_down : {true, false}) {
            for (const bool is_wide : {true, false}) {
                all.push_back({50, 192, rank == 40 ? 8 : 4, rank == 32 ? 96 : 64, rank, rank == 96, has_down, is_wide, is_wide, is_wide});
            }
        }
    }
    return all;
}

// Ordinary values, and rows that are hard on signs and roundings: zeros, the smallest floats, opposites.
std::vector<float> awkward_rows(std::mt19937& random, int rows, int columns) {
    std::vector<float> x = random_rows(random, rows, columns);
    for (int i = 0; i < columns; ++i) {
        x[static_cast<size_t>(i)] = 0.0f;
        x[static_cast<size_t>(columns + i)] *= 1e-42f;
        x[static_cast<size_t>(2 * columns + i)] = i % 2 ? 1e-30f : -1e-30f;
        x[static_cast<size_t>(3 * columns + i)] *= 1e30f;
    }
    return x;
}

// Outputs of all rows of the layer with its components from `rank` on set to zero.
std::vector<float> truncated(qerve_context* context, const Shape& shape, int rank, const std::vector<float>& x, int rows) {
    std::mt19937 random(11);
    Layer layer(context, random, shape);
    layer.truncate(context, std::min(rank, shape.rank));
    return layer.run(context, x, rows);
}

bool are_rows_equal(const std::vector<float>& a, const std::vector<float>& b, int row_a, int row_b, int width) {
    return std::memcmp(a.data() + int64_t{row_a} * width, b.data() + int64_t{row_b} * width, static_cast<size_t>(width) * 4) == 0;
}

}  // namespace

QERVE_TEST(rows_of_any_rank_are_those_of_truncated_factors_in_any_batch) {
    ContextOf portable("portable", 1);
    std::mt19937 random(5);
    for (const Shape& shape : corrected_shapes()) {
        const int rows = 75;  // more than one portion of reduced rows, and of an AMX tile
        const std::vector<float> x = awkward_rows(random, rows, shape.in_features);
        const std::vector<int32_t> choices = {0, 1, 8, 31, 32, 33, 64, 95, kAll};
        std::vector<std::vector<float>> wanted;
        for (const int rank : choices) wanted.push_back(truncated(portable.context, shape, rank, x, rows));
        for (const Isa isa : qerve_test::runnable_isas()) {
            ContextOf of(isa_name(isa), 3);
            std::mt19937 same(11);
            Layer layer(of.context, same, shape);
            layer.truncate(of.context, shape.rank);  // what fills the last block up
            std::vector<int32_t> ranks;
            for (int row = 0; row < rows; ++row) ranks.push_back(choices[static_cast<size_t>(row) * 7 % choices.size()]);
            const std::vector<float> mixed = layer.run(of.context, x, rows, ranks.data());
            for (int row = 0; row < rows; ++row) {
                const size_t choice = static_cast<size_t>(row) * 7 % choices.size();
                if (!are_rows_equal(mixed, wanted[choice], row, row, shape.out_features)) {
                    qerve_test::report_failure(__FILE__, __LINE__, describe(shape, isa_name(isa), rows) + ", mixed");
                }
            }
            for (size_t choice = 0; choice < choices.size(); ++choice) {
                for (const int count : {1, 3, rows}) {
                    const std::vector<int32_t> alike(static_cast<size_t>(count), choices[choice]);
                    const std::vector<float> y = layer.run(of.context, x, count, alike.data());
                    if (std::memcmp(y.data(), wanted[choice].data(), y.size() * 4) != 0) {
                        qerve_test::report_failure(__FILE__, __LINE__, describe(shape, isa_name(isa), count) + ", all alike");
                    }
                }
            }
        }
    }
}

QERVE_TEST(prompts_of_one_rank_beside_rows_of_another_are_as_alone) {
    for (const Isa isa : qerve_test::runnable_isas()) {
        ContextOf of(isa_name(isa), 2);
        std::mt19937 random(6);
        Layer layer(of.context, random, {32, 64, 4, 64, 40, false, true, false, false, false});
        const int rows = 600;
        const std::vector<float> x = random_rows(random, rows, 64);
        std::vector<int32_t> ranks(static_cast<size_t>(rows), 0);
        ranks[0] = kAll;
        ranks[300] = 33;
        const std::vector<float> all = layer.run(of.context, x, rows), some = layer.run(of.context, x, rows, ranks.data());
        const std::vector<int32_t> none(static_cast<size_t>(rows), 0);
        const std::vector<float> without = layer.run(of.context, x, rows, none.data());
        for (int row = 0; row < rows; ++row) {
            if (row != 300) CHECK(are_rows_equal(some, row == 0 ? all : without, row, row, 32));
        }
        const std::vector<float> alone = layer.run(of.context, {x.begin() + 300 * 64, x.begin() + 301 * 64}, 1, &ranks[300]);
        CHECK(are_rows_equal(some, alone, 300, 0, 32));
        CHECK(!are_rows_equal(some, without, 300, 300, 32) && !are_rows_equal(some, all, 300, 300, 32));
    }
}

QERVE_TEST(values_that_are_no_numbers_come_out_as_such_at_rank_zero_too) {
    for (const Isa isa : qerve_test::runnable_isas()) {
        ContextOf of(isa_name(isa), 2);
        std::mt19937 random(3);
        Layer layer(of.context, random, {64, 128, 4, 64, 32, false, true, false, false, false});
        std::vector<float> x = random_rows(random, 40, 128);
        x[3 * 128 + 70] = std::nanf("");
        std::vector<int32_t> ranks(40, 0);
        ranks[7] = 5;
        const std::vector<float> y = layer.run(of.context, x, 40, ranks.data());
        for (int t = 0; t < 40; ++t) CHECK_EQUAL(is_row_finite(y, t, 64), t != 3);
    }
}

QERVE_TEST(negative_ranks_are_refused_and_nothing_is_written) {
    ContextOf of("portable", 1);
    std::vector<float> hidden(16, -1.0f);
    const std::vector<float> table(16, 1.0f);
    qerve_embed_op op{};
    op.table = table.data();
    op.hidden = hidden.data();
    op.hidden_size = 16;
    op.vocab_size = 1;
    const qerve_op ops[] = {{QERVE_OP_EMBED, &op}};
    const int32_t starts[] = {0}, token = 0, rank = -1;
    qerve_step step{};
    step.token_ids = &token;
    step.starts = starts;
    step.ranks = &rank;
    step.num_tokens = 1;
    char error[200] = "";
    CHECK_EQUAL(qerve_run(of.context, ops, 1, &step, error, sizeof error), -1);
    CHECK(std::string(error).find("rank -1 in row 0") != std::string::npos);
    CHECK_EQUAL(hidden[0], -1.0f);
}
