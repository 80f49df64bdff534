// Packed linear layers through qerve_run against a double loop over the codes, and against themselves on other
// instruction sets, threads and batches: those must agree bit for bit.
#include <array>

#include "linear_case.h"

using namespace linear_case;

QERVE_TEST(linear_layers_equal_a_double_loop_on_every_instruction_set) {
    for (const Isa isa : qerve_test::runnable_isas()) {
        ContextOf of(isa_name(isa), 2);
        std::mt19937 random(1);
        for (const Shape& shape : shapes()) {
            Layer layer(of.context, random, shape);
            const int rows = 37;
            const std::vector<float> x = random_rows(random, rows, shape.in_features);
            const std::vector<float> y = layer.run(of.context, x, rows);
            double error = 0, size = 0;
            for (int t : {0, 5, 36}) {
                const std::vector<double> wanted = layer.expected(x.data() + int64_t{t} * shape.in_features);
                for (size_t i = 0; i < wanted.size(); ++i) {
                    size = std::max(size, std::fabs(wanted[i]));
                    error = std::max(error, std::fabs(wanted[i] - y[static_cast<size_t>(t) * wanted.size() + i]));
                }
            }
            // float32 sums of a few hundred terms; a code that rounds the other way would be 1e-3 of a step
            if (error > 2e-4 * size) qerve_test::report_failure(__FILE__, __LINE__, describe(shape, isa_name(isa), rows));
        }
    }
}

QERVE_TEST(linear_layers_do_not_depend_on_instruction_set_threads_or_batch) {
    ContextOf reference("portable", 1);
    std::mt19937 random(2);
    for (const Shape& shape : shapes()) {
        Layer layer(reference.context, random, shape);
        const int most = 49;
        const std::vector<float> x = random_rows(random, most, shape.in_features);
        const std::vector<float> wanted = layer.run(reference.context, x, most);
        for (const Isa isa : qerve_test::runnable_isas()) {
            for (const int threads : {1, 3}) {
                ContextOf of(isa_name(isa), threads);
                for (const int rows : {1, 7, 49}) {
                    const std::vector<float> y = layer.run(of.context, x, rows);
                    if (std::memcmp(y.data(), wanted.data(), y.size() * sizeof(float)) != 0) {
                        qerve_test::report_failure(__FILE__, __LINE__, describe(shape, isa_name(isa), rows));
                    }
                }
            }
        }
    }
}

QERVE_TEST(values_that_are_no_numbers_come_out_as_such_in_their_row_only) {
    for (const Isa isa : qerve_test::runnable_isas()) {
        ContextOf of(isa_name(isa), 2);
        std::mt19937 random(3);
        Layer layer(of.context, random, {64, 128, 4, 64, 32, false, true, false, false, false});
        std::vector<float> x = random_rows(random, 40, 128);
        x[3 * 128 + 70] = std::nanf("");
        x[5 * 128 + 1] = INFINITY;
        const std::vector<float> y = layer.run(of.context, x, 40);
        for (int t = 0; t < 40; ++t) CHECK_EQUAL(is_row_finite(y, t, 64), t != 3 && t != 5);
    }
}

QERVE_TEST(weights_that_cannot_be_packed_are_refused_with_a_reason) {
    const uint8_t code = 0;
    const float scale = 1;
    qerve_source source{};
    source.codes = &code;
    source.scales = &scale;
    source.code_bits = 8;
    for (const auto& [rows, columns, group] : {std::array<int, 3>{0, 64, 64}, {32, 40, 40}, {32, 64, 48}, {32, 64, 16}}) {
        source.out_features = rows;
        source.in_features = columns;
        source.group_size = group;
        qerve_matrix matrix{};
        matrix.storage_bits = 4;
        char error[200] = "";
        CHECK_EQUAL(qerve_pack_plan(&source, &matrix, error, sizeof error), -1);
        CHECK(std::strlen(error) > 0);
    }
}

QERVE_TEST(heads_that_the_kernels_have_no_room_for_are_refused) {
    ContextOf of("portable", 1);
    for (const int32_t head_dim : {0, 8, 272}) {
        qerve_attention_op op{};
        op.num_heads = op.num_kv_heads = 1;
        op.head_dim = head_dim;
        const qerve_op ops[] = {{QERVE_OP_ATTENTION, &op}};
        const int32_t starts[] = {0};  // no sequence: an operator that is let through does nothing
        qerve_step step{};
        step.starts = starts;
        step.num_tokens = 1;
        char error[200] = "";
        CHECK_EQUAL(qerve_run(of.context, ops, 1, &step, error, sizeof error), -1);
        CHECK(std::string(error).find("channels") != std::string::npos);
    }
}

QERVE_TEST(tokens_outside_the_vocabulary_are_refused_and_nothing_is_written) {
    ContextOf of("portable", 1);
    const std::vector<float> table(2 * 16, 1.0f);
    std::vector<float> hidden(16, -1.0f);
    qerve_embed_op op{};
    op.table = table.data();
    op.hidden = hidden.data();
    op.hidden_size = 16;
    op.vocab_size = 2;
    const qerve_op ops[] = {{QERVE_OP_EMBED, &op}};
    const int32_t starts[] = {0};
    for (const int32_t token : {2, -1}) {
        qerve_step step{};
        step.token_ids = &token;
        step.starts = starts;
        step.num_tokens = 1;
        char error[200] = "";
        CHECK_EQUAL(qerve_run(of.context, ops, 1, &step, error, sizeof error), -1);
        CHECK(std::string(error).find("vocabulary") != std::string::npos);
        CHECK_EQUAL(hidden[0], -1.0f);
    }
}
