// What a step needs before its first operator, and the way through them.
#include "step.h"

namespace qerve {

Step::Step(qerve_context& context, const qerve_op* ops, int num_ops, const qerve_step& step)
    : context_(context), kernels_(context.kernels), ops_(ops), num_ops_(num_ops), step_(step), ranks_(step) {
    has_only_decodes_ = step.num_tokens == step.num_sequences;
    for (int s = 0; s < step.num_sequences; ++s) {
        for (int row = step.starts[s]; row < step.starts[s + 1]; row += kernels_.attention_rows) {
            tiles_.push_back({s, row, std::min(row + kernels_.attention_rows, step.starts[s + 1])});
        }
    }
    // Late tiles of a long prompt see the most: they come first, so that no thread is left with one at the end.
    std::reverse(tiles_.begin(), tiles_.end());
    reserve();
}

void Step::run() {
    context_.next.store(0);
    context_.num_reduced.store(0);
    context_.pool.run([](void* self, int thread) { static_cast<Step*>(self)->work(thread); }, this);
}

void Step::work(int thread) {
    for (int i = 0; i < num_ops_; ++i) {
        switch (ops_[i].kind) {
            case QERVE_OP_EMBED: embed(*static_cast<const qerve_embed_op*>(ops_[i].args)); break;
            case QERVE_OP_LINEAR: linear(i, thread); break;
            default: attention(i, thread); break;
        }
        Fetcher ahead = weights_behind(i, thread);
        meet(ahead);
    }
}

void Step::embed(const qerve_embed_op& op) {
    share(step_.num_tokens, [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            kernels_.embed(op, step_.token_ids[row], op.hidden + int64_t{row} * op.hidden_size);
        }
    });
}

void Step::reserve() {
    int64_t shared = 64, own = 64;
    for (int i = 0; i < num_ops_; ++i) {
        if (ops_[i].kind == QERVE_OP_LINEAR) {
            const LinearMemory memory(*static_cast<const qerve_linear_op*>(ops_[i].args), step_.num_tokens, ranks_, kernels_);
            shared = std::max(shared, memory.shared_bytes);
            own = std::max(own, memory.own_bytes);
        } else if (ops_[i].kind == QERVE_OP_ATTENTION) {
            own = std::max(own, kernels_.attention_scratch_bytes(*static_cast<const qerve_attention_op*>(ops_[i].args)));
        }
    }
    context_.shared.reserve(shared);
    for (Arena& arena : context_.scratch) arena.reserve(own);
}

}  // namespace qerve
