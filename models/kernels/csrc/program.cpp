// One step: every thread walks through the operators, takes shares of each, and meets the others in between.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "context.h"
#include "grid.h"
#include "wait.h"

namespace qerve {
namespace {

constexpr int kRowsTogether = 256;  // rows of a linear unit: their codes stay in the second-level cache
constexpr int kReducedRowsTogether = 64;
constexpr int kMaxParts = 8;  // weights of a linear operator

struct Tile {
    int32_t sequence, row_begin, row_end;
};

// Codes of all rows, placed one after the other in memory that somebody else owns.
class CodesLayout {
public:
    CodesLayout(int64_t num_rows, int32_t channels, int32_t block, bool is_wide)
        : num_rows_(num_rows), block_(block), num_blocks_(channels / block), is_wide_(is_wide),
          // Not a power of two between rows: they would all compete for the same cache lines.
          stride_(aligned(channels) + 64) {}

    int64_t num_bytes() const {
        return aligned(num_rows_ * stride_) * (is_wide_ ? 2 : 1) + 2 * aligned(row_stride() * num_blocks_ * 4);
    }

    Codes at(uint8_t* memory) const {
        Codes codes;
        codes.stride = stride_;
        codes.block = block_;
        codes.row_stride = row_stride();
        codes.num_blocks = num_blocks_;
        const int64_t bytes = aligned(num_rows_ * stride_), of_numbers = aligned(row_stride() * num_blocks_ * 4);
        codes.hi = reinterpret_cast<int8_t*>(memory);
        if (is_wide_) codes.lo = reinterpret_cast<int8_t*>(memory + bytes);
        memory += is_wide_ ? 2 * bytes : bytes;
        codes.scale = reinterpret_cast<float*>(memory);
        codes.sum = reinterpret_cast<int32_t*>(memory + of_numbers);
        return codes;
    }

private:
    int64_t row_stride() const { return (num_rows_ + kLanes - 1) / kLanes * kLanes; }

    int64_t num_rows_;
    int32_t block_, num_blocks_;
    bool is_wide_;
    int64_t stride_;
};

int num_strips(const qerve_matrix& matrix) { return (matrix.out_features + kStripRows - 1) / kStripRows; }

// Codes of the input of one linear operator.
CodesLayout input_layout(const qerve_linear_op& op, int64_t num_rows) {
    return {num_rows, op.input.in_features, op.input.block, needs_wide(op.input.activation)};
}

// Of the first product of a low-rank term: 32 components each; 0 where the input's first channels are taken as they are.
int rank_blocks(const qerve_matrix& matrix) { return matrix.down == nullptr ? 0 : num_strips(*matrix.down); }

class Step {
public:
    Step(qerve_context& context, const qerve_op* ops, int num_ops, const qerve_step& step)
        : context_(context), kernels_(context.kernels), ops_(ops), num_ops_(num_ops), step_(step) {
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

    void run() {
        context_.next.store(0);
        context_.num_reduced.store(0);
        context_.pool.run([](void* self, int thread) { static_cast<Step*>(self)->work(thread); }, this);
    }

private:
    void work(int thread) {
        for (int i = 0; i < num_ops_; ++i) {
            const void* args = ops_[i].args;
            switch (ops_[i].kind) {
                case QERVE_OP_EMBED: embed(*static_cast<const qerve_embed_op*>(args)); break;
                case QERVE_OP_LINEAR: linear(*static_cast<const qerve_linear_op*>(args), thread); break;
                default: attention(*static_cast<const qerve_attention_op*>(args), thread); break;
            }
        }
    }

    // Shares of 0..num_units go to threads as they ask, large ones first; then all meet.
    template <class Body>
    void share(int num_units, Body&& body, int largest = 1 << 30) {
        std::atomic<int32_t>& next = context_.next;
        const int num_threads = context_.pool.num_threads();
        int begin = next.load(std::memory_order_relaxed);
        while (begin < num_units) {
            const int size = std::min(largest, std::max(1, (num_units - begin) / (2 * num_threads)));
            if (next.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed)) {
                body(begin, begin + size);
                begin = next.load(std::memory_order_relaxed);
            }
        }
        meet();
    }

    void meet() {
        context_.pool.barrier(
            [](void* context) {
                static_cast<qerve_context*>(context)->next.store(0, std::memory_order_relaxed);
                static_cast<qerve_context*>(context)->num_reduced.store(0, std::memory_order_relaxed);
            },
            &context_);
    }

    void embed(const qerve_embed_op& op) {
        share(step_.num_tokens, [&](int begin, int end) {
            for (int row = begin; row < end; ++row) {
                kernels_.embed(op, step_.token_ids[row], op.hidden + int64_t{row} * op.hidden_size);
            }
        });
    }

    void linear(const qerve_linear_op& op, int thread);
    void attention(const qerve_attention_op& op, int thread);
    void reserve();

    qerve_context& context_;
    const Kernels& kernels_;
    const qerve_op* ops_;
    int num_ops_;
    const qerve_step& step_;
    std::vector<Tile> tiles_;
    bool has_only_decodes_ = false;
};

// Bytes of the reduced rows of one part: as they come out of the first product, then as codes.
int64_t reduced_bytes(int64_t num_rows, int num_blocks) {
    if (num_blocks == 0) return 0;
    return aligned(num_rows * num_blocks * kRankBlock * 4) +
           CodesLayout(num_rows, num_blocks * kRankBlock, kRankBlock, true).num_bytes();
}

int64_t unit_bytes(const qerve_linear_op& op, int num_rows) {
    return op.mode == QERVE_OUTPUT_SWIGLU ? 2 * int64_t{std::min(num_rows, kRowsTogether)} * kStripRows * 4 : 0;
}

void Step::reserve() {
    int64_t shared = 64, own = 64;
    for (int i = 0; i < num_ops_; ++i) {
        if (ops_[i].kind == QERVE_OP_LINEAR) {
            const auto& op = *static_cast<const qerve_linear_op*>(ops_[i].args);
            const int rows = step_.num_tokens;
            int64_t bytes = input_layout(op, rows).num_bytes(), kernel = 0;
            for (int p = 0; p < op.num_parts; ++p) {
                bytes += reduced_bytes(rows, rank_blocks(*op.parts[p]));
                kernel = std::max(kernel, kernels_.linear_scratch_bytes(*op.parts[p]));
                if (op.parts[p]->down) kernel = std::max(kernel, kernels_.linear_scratch_bytes(*op.parts[p]->down));
            }
            shared = std::max(shared, bytes);
            own = std::max({own, aligned(kernel) + unit_bytes(op, rows), int64_t{8} * aligned(op.input.in_features)});
        } else if (ops_[i].kind == QERVE_OP_ATTENTION) {
            own = std::max(own, kernels_.attention_scratch_bytes(*static_cast<const qerve_attention_op*>(ops_[i].args)));
        }
    }
    context_.shared.reserve(shared);
    for (Arena& arena : context_.scratch) arena.reserve(own);
}

void Step::linear(const qerve_linear_op& op, int thread) {
    const int rows = step_.num_tokens;
    const CodesLayout layout = input_layout(op, rows);
    uint8_t* memory = context_.shared.reserve(0);
    uint8_t* scratch = context_.scratch[static_cast<size_t>(thread)].reserve(0);
    const Codes input = layout.at(memory);
    memory += layout.num_bytes();

    share(rows, [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            kernels_.quantize_row(op.input, op.x + row * op.ldx, row, input, reinterpret_cast<float*>(scratch));
        }
    });

    // Units: first the low-rank terms' first products, a rank block and some rows each, then strips times rows.
    struct Part {
        Codes reduced;
        float* rows = nullptr;
        int num_blocks = 0, strips = 0;
    };
    Part parts[kMaxParts];
    const int reduced_chunks = (rows + kReducedRowsTogether - 1) / kReducedRowsTogether;
    const int chunks = (rows + kRowsTogether - 1) / kRowsTogether;
    const bool is_pair = op.mode == QERVE_OUTPUT_SWIGLU;
    int num_reduced = 0, num_strips_in_all = 0;
    for (int p = 0; p < op.num_parts; ++p) {
        Part& part = parts[p];
        part.strips = num_strips(*op.parts[p]);
        part.reduced = input;
        part.num_blocks = rank_blocks(*op.parts[p]);
        if (part.num_blocks > 0) {
            part.rows = reinterpret_cast<float*>(memory);
            const int64_t floats = aligned(int64_t{rows} * part.num_blocks * kRankBlock * 4);
            part.reduced = CodesLayout(rows, part.num_blocks * kRankBlock, kRankBlock, true).at(memory + floats);
            memory += reduced_bytes(rows, part.num_blocks);
            num_reduced += part.num_blocks * reduced_chunks;
        }
        if (!is_pair || p == 0) num_strips_in_all += part.strips;
    }

    const auto reduce = [&](int unit) {
        int p = 0;
        while (unit >= parts[p].num_blocks * reduced_chunks) unit -= parts[p++].num_blocks * reduced_chunks;
        const Part& part = parts[p];
        const int block = unit % part.num_blocks, chunk = unit / part.num_blocks;
        LinearTask task{};
        task.matrix = op.parts[p]->down;
        task.input = task.reduced = input;
        task.row_begin = chunk * kReducedRowsTogether;
        task.row_end = std::min(rows, task.row_begin + kReducedRowsTogether);
        task.strip_begin = block;
        task.strip_end = block + 1;
        task.ldy = int64_t{part.num_blocks} * kRankBlock;
        task.y = part.rows + task.row_begin * task.ldy + block * kRankBlock;
        task.scratch = scratch;
        kernels_.linear(task);
        for (int row = task.row_begin; row < task.row_end; ++row) {
            kernels_.quantize_reduced(part.rows + row * task.ldy, row, block, part.reduced);
        }
        context_.num_reduced.fetch_add(1, std::memory_order_release);
    };

    const auto multiply_strips = [&](int chunk, int p, int strip_begin, int strip_end) {
        LinearTask task{};
        task.row_begin = chunk * kRowsTogether;
        task.row_end = std::min(rows, task.row_begin + kRowsTogether);
        task.input = input;
        if (num_reduced > 0) task.progress = {&context_.num_reduced, num_reduced};
        task.scratch = scratch;
        const auto run = [&](int which, int begin, int end, float* y, int64_t ldy, int mode) {
            task.matrix = op.parts[which];
            task.reduced = parts[which].reduced;
            task.strip_begin = begin;
            task.strip_end = end;
            task.y = y;
            task.ldy = ldy;
            task.mode = mode;
            kernels_.linear(task);
        };
        if (!is_pair) {
            float* y = op.y + task.row_begin * op.ldy + op.columns[p] + strip_begin * kStripRows;
            run(p, strip_begin, strip_end, y, op.ldy, op.mode);
            return;
        }
        const int height = task.row_end - task.row_begin;
        const int64_t kernel = aligned(std::max(kernels_.linear_scratch_bytes(*op.parts[0]),
                                                kernels_.linear_scratch_bytes(*op.parts[1])));
        auto* gate = reinterpret_cast<float*>(scratch + kernel);
        float* up = gate + int64_t{height} * kStripRows;
        for (int strip = strip_begin; strip < strip_end; ++strip) {
            const int width = std::min(kStripRows, op.parts[0]->out_features - strip * kStripRows);
            if (width < kStripRows) std::fill(gate, up + int64_t{height} * kStripRows, 0.0f);
            run(0, strip, strip + 1, gate, kStripRows, QERVE_OUTPUT_STORE);
            run(1, strip, strip + 1, up, kStripRows, QERVE_OUTPUT_STORE);
            float* y = op.y + task.row_begin * op.ldy + op.columns[0] + strip * kStripRows;
            kernels_.silu_multiply(gate, up, height, width, y, op.ldy);
        }
    };

    const int largest = rows > kRowsTogether ? 4 : 1 << 30;
    share(
        num_reduced + chunks * num_strips_in_all,
        [&](int begin, int end) {
            for (; begin < end && begin < num_reduced; ++begin) reduce(begin);
            while (begin < end) {
                const int unit = begin - num_reduced;
                const int chunk = unit / num_strips_in_all;
                int p = 0, strip = unit % num_strips_in_all;
                while (strip >= parts[p].strips) strip -= parts[p++].strips;
                const int count = std::min(end - begin, parts[p].strips - strip);
                multiply_strips(chunk, p, strip, strip + count);
                begin += count;
            }
        },
        largest);
}

void Step::attention(const qerve_attention_op& op, int thread) {
    const auto slot_of = [&](int sequence, int position) {
        const int32_t* table = step_.block_tables + int64_t{sequence} * step_.table_stride;
        return int64_t{table[position / kCacheBlock]} * kCacheBlock + position % kCacheBlock;
    };
    const auto append = [&](const Tile& tile, int kv_head) {
        for (int row = tile.row_begin; row < tile.row_end; ++row) {
            const int position = step_.positions[row];
            kernels_.append(op, row, position, slot_of(tile.sequence, position), kv_head);
        }
    };
    const int num_units = static_cast<int>(tiles_.size()) * op.num_kv_heads;
    const auto each = [&](auto&& body) {
        return [&, body](int begin, int end) {
            for (int unit = begin; unit < end; ++unit) {
                body(tiles_[static_cast<size_t>(unit / op.num_kv_heads)], unit % op.num_kv_heads);
            }
        };
    };
    if (op.has_quantized_qkv) {
        share(step_.num_tokens, [&](int begin, int end) {
            for (int row = begin; row < end; ++row) kernels_.quantize_qkv(op, row, step_.positions[row]);
        });
    }
    // A decoded token waits for no other row of its step.
    if (!has_only_decodes_) share(num_units, each(append));
    uint8_t* scratch = context_.scratch[static_cast<size_t>(thread)].reserve(0);
    share(
        num_units, each([&](const Tile& tile, int kv_head) {
            if (has_only_decodes_) append(tile, kv_head);
            AttentionTask task{};
            task.op = &op;
            task.blocks = step_.block_tables + int64_t{tile.sequence} * step_.table_stride;
            task.row_begin = tile.row_begin;
            task.row_end = tile.row_end;
            task.position = step_.positions[tile.row_begin];
            task.kv_head = kv_head;
            task.scratch = scratch;
            kernels_.attend(task);
        }),
        has_only_decodes_ ? 1 << 30 : 1);
}

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

std::string find_problem(const qerve_op* ops, int num_ops, const qerve_step& step) {
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
