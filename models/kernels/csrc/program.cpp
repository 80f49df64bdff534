// The entry point: operators are looked through for what would lead outside of the caller's memory, then the step runs.
#include <cstdio>
#include <string>

#include "step.h"

namespace qerve {
namespace {

// What would lead outside of the caller's memory, as far as the operators tell; "" where nothing would.
std::string problem_with(const qerve_embed_op& op, const qerve_step& step) {
    for (int row = 0; row < step.num_tokens; ++row) {
        const int32_t token = step.token_ids[row];
        if (token >= 0 && token < op.vocab_size) continue;
        return "token id " + std::to_string(token) + " in row " + std::to_string(row) + " is not one of the " +
               std::to_string(op.vocab_size) + " in the vocabulary";
    }
    return "";
}

std::string problem_with(const qerve_linear_op& op) {
    if (op.num_parts < 1 || op.num_parts > kMaxParts) return "a linear operator takes 1 to 8 weights";
    if (op.mode == QERVE_OUTPUT_SWIGLU && op.num_parts != 2) return "a SwiGLU takes two weights";
    for (int p = 0; p < op.num_parts; ++p) {
        if (op.parts[p]->in_features != op.input.in_features || op.parts[p]->block != op.input.block) {
            return "the weights of a linear operator do not fit its input";
        }
    }
    return "";
}

std::string problem_with(const qerve_attention_op& op) {
    if (op.head_dim < kLanes || op.head_dim % kLanes != 0 || op.head_dim > kMaxHeadDim) {
        return "heads must have a multiple of 16 channels, at most " + std::to_string(kMaxHeadDim);
    }
    return op.num_heads % op.num_kv_heads != 0 ? "query heads must be a multiple of the key and value heads" : "";
}

std::string problem_with(const qerve_step& step) {
    for (int row = 0; step.ranks != nullptr && row < step.num_tokens; ++row) {
        if (step.ranks[row] >= 0) continue;
        return "rank " + std::to_string(step.ranks[row]) + " in row " + std::to_string(row) + " is negative";
    }
    return "";
}

std::string find_problem(const qerve_op* ops, int num_ops, const qerve_step& step) {
    if (std::string problem = problem_with(step); !problem.empty()) return problem;
    for (int i = 0; i < num_ops; ++i) {
        const void* args = ops[i].args;
        std::string problem;
        switch (ops[i].kind) {
            case QERVE_OP_EMBED: problem = problem_with(*static_cast<const qerve_embed_op*>(args), step); break;
            case QERVE_OP_LINEAR: problem = problem_with(*static_cast<const qerve_linear_op*>(args)); break;
            case QERVE_OP_ATTENTION: problem = problem_with(*static_cast<const qerve_attention_op*>(args)); break;
            default: problem = "there is no operator of kind " + std::to_string(ops[i].kind);
        }
        if (!problem.empty()) return problem;
    }
    return "";
}

}  // namespace
}  // namespace qerve

extern "C" int32_t qerve_run(qerve_context* context, const qerve_op* ops, int32_t num_ops, const qerve_step* step,
                             char* error, int32_t error_size) {
    if (step->num_tokens == 0) return 0;
    const std::string problem = qerve::find_problem(ops, num_ops, *step);
    if (!problem.empty()) {
        std::snprintf(error, static_cast<size_t>(error_size), "%s", problem.c_str());
        return -1;
    }
    qerve::Step(*context, ops, num_ops, *step).run();
    return 0;
}
