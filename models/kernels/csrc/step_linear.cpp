// A linear operator: its input becomes codes, then rows of weights are multiplied, a few strips at a time.
#include "step_linear.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "step.h"

namespace qerve {

int num_strips(const qerve_matrix& matrix) { return (matrix.out_features + kStripRows - 1) / kStripRows; }

RankRange::RankRange(const qerve_step& step) {
    least = most = std::numeric_limits<int32_t>::max();
    if (step.ranks == nullptr) return;
    const auto [low, high] = std::minmax_element(step.ranks, step.ranks + step.num_tokens);
    least = *low;
    most = *high;
}

int rank_blocks(const qerve_matrix& matrix, const RankRange& ranks) {
    const int rank = std::min(matrix.rank, ranks.most);
    // Blocks that count as a whole in all rows, or up to zero weights, can be read where they are.
    const bool has_whole_blocks = rank == matrix.rank || rank % kRankBlock == 0;
    if (matrix.down == nullptr && ranks.least >= rank && has_whole_blocks) return 0;
    return rank_blocks_of(rank);
}

StripAt strip_at(const qerve_linear_op& op, int number) {
    int part = 0;
    while (number >= num_strips(*op.parts[part])) number -= num_strips(*op.parts[part++]);
    return {part, number};
}

int num_strips_in_all(const qerve_linear_op& op) {
    int total = num_strips(*op.parts[0]);
    if (op.mode == QERVE_OUTPUT_SWIGLU) return total;
    for (int p = 1; p < op.num_parts; ++p) total += num_strips(*op.parts[p]);
    return total;
}

int64_t reduced_float_bytes(int64_t num_rows, int num_blocks) { return aligned(num_rows * num_blocks * kRankBlock * 4); }

CodesLayout reduced_layout(const qerve_matrix& matrix, int64_t num_rows, int num_blocks, bool is_input_wide) {
    return {num_rows, num_blocks * kRankBlock, kRankBlock, matrix.down != nullptr || is_input_wide};
}

LinearMemory::LinearMemory(const qerve_linear_op& op, int num_rows, const RankRange& ranks, const Kernels& kernels)
    : input(num_rows, op.input.in_features, op.input.block, needs_wide(op.input.activation)),
      has_own_codes(num_rows <= kRowsRepeated), kernel_bytes(int64_t{8} * aligned(op.input.in_features)),
      shared_bytes(has_own_codes ? 0 : input.num_bytes()) {
    for (int p = 0; p < op.num_parts; ++p) {
        const qerve_matrix& matrix = *op.parts[p];
        kernel_bytes = std::max(kernel_bytes, aligned(kernels.linear_scratch_bytes(matrix)));
        const int num_blocks = rank_blocks(matrix, ranks);
        if (num_blocks == 0) continue;
        if (matrix.down != nullptr) {
            kernel_bytes = std::max(kernel_bytes, aligned(kernels.linear_scratch_bytes(*matrix.down)));
        }
        shared_bytes += reduced_float_bytes(num_rows, num_blocks) +
                        reduced_layout(matrix, num_rows, num_blocks, needs_wide(op.input.activation)).num_bytes();
    }
    own_bytes = (has_own_codes ? input.num_bytes() : 0) + kernel_bytes;
    if (op.mode == QERVE_OUTPUT_SWIGLU) own_bytes += int64_t{2} * std::min(num_rows, kRowsTogether) * kStripRows * 4;
}

namespace {

// One linear operator as one thread sees it.
class LinearWork {
public:
    LinearWork(const qerve_linear_op& op, const qerve_step& step, const RankRange& ranks, qerve_context& context, int thread)
        : op_(op), rows_(step.num_tokens), row_ranks_(step.ranks), ranks_(ranks), context_(context),
          kernels_(context.kernels), memory_(op, rows_, ranks, context.kernels) {
        uint8_t* shared = context.shared.reserve(0);
        uint8_t* own = context.scratch[static_cast<size_t>(thread)].reserve(0);
        uint8_t*& codes = memory_.has_own_codes ? own : shared;
        input_ = memory_.input.at(codes);
        codes += memory_.input.num_bytes();
        scratch_ = own;
        halves_ = reinterpret_cast<float*>(own + memory_.kernel_bytes);
        for (int p = 0; p < op.num_parts; ++p) shared = place_reduced(p, shared);
    }

    bool has_own_codes() const { return memory_.has_own_codes; }

    void quantize(int row_begin, int row_end) {
        for (int row = row_begin; row < row_end; ++row) {
            kernels_.quantize_row(op_.input, op_.x + row * op_.ldx, row, input_, reinterpret_cast<float*>(scratch_));
        }
    }

    // Units of what is made before the low-rank terms' products with lora_up: a block of components and some rows each.
    int num_reduced() const { return num_reduced_; }

    void reduce(int unit) {
        int p = 0;
        while (unit >= parts_[p].num_blocks * reduced_chunks()) unit -= parts_[p++].num_blocks * reduced_chunks();
        const Part& part = parts_[p];
        const int block = unit % part.num_blocks, row_begin = unit / part.num_blocks * kReducedRowsTogether;
        const int row_end = std::min(rows_, row_begin + kReducedRowsTogether);
        const qerve_matrix* down = op_.parts[p]->down;
        if (down != nullptr) multiply_down(*down, part, block, row_begin, row_end);
        else copy_channels(part.reduced, block, row_begin, row_end);
        context_.num_reduced.fetch_add(1, std::memory_order_release);
    }

    // Units: strips times rows.
    int num_units() const { return chunks() * num_strips_in_all(op_); }

    void multiply(int begin, int end) {
        const int num_strips_of_all = num_strips_in_all(op_);
        while (begin < end) {
            const StripAt at = strip_at(op_, begin % num_strips_of_all);
            const int count = std::min(end - begin, num_strips(*op_.parts[at.part]) - at.strip);
            multiply_strips(begin / num_strips_of_all, at.part, at.strip, at.strip + count);
            begin += count;
        }
    }

private:
    struct Part {
        Codes reduced;
        float* rows = nullptr;
        int num_blocks = 0;
    };

    int reduced_chunks() const { return (rows_ + kReducedRowsTogether - 1) / kReducedRowsTogether; }
    int chunks() const { return (rows_ + kRowsTogether - 1) / kRowsTogether; }

    // Components that count in the row with the most of rows row_begin..row_end.
    int most_components(int row_begin, int row_end) const {
        if (ranks_.least == ranks_.most) return ranks_.most;
        return *std::max_element(row_ranks_ + row_begin, row_ranks_ + row_end);
    }

    // How many of a block's 32 components count in a row.
    int components_in(int row, int block) const {
        if (row_ranks_ == nullptr) return kRankBlock;
        return std::clamp(row_ranks_[row] - block * kRankBlock, 0, kRankBlock);
    }

    // One block of the first product. Components that do not count in a row are zero before the row is quantized.
    void multiply_down(const qerve_matrix& down, const Part& part, int block, int row_begin, int row_end) {
        LinearTask task{};
        task.matrix = &down;
        task.input = task.reduced = input_;
        task.row_begin = row_begin;
        task.row_end = row_end;
        task.strip_begin = block;
        task.strip_end = block + 1;
        task.ldy = int64_t{part.num_blocks} * kRankBlock;
        task.y = part.rows + row_begin * task.ldy + block * kRankBlock;
        task.scratch = scratch_;
        if (most_components(row_begin, row_end) > block * kRankBlock) kernels_.linear(task);
        for (int row = row_begin; row < row_end; ++row) {
            float* values = part.rows + row * task.ldy;
            const int count = components_in(row, block);
            std::fill(values + block * kRankBlock + count, values + (block + 1) * kRankBlock, 0.0f);
            kernels_.quantize_reduced(values, row, block, part.reduced);
        }
    }

    // A block of the input's first channels with zeros where they do not count in a row; the scales are the input's.
    void copy_channels(const Codes& to, int block, int row_begin, int row_end) {
        const int channel = block * kRankBlock;
        const auto copy = [](const int8_t* from, int8_t* target, int count) {
            std::memcpy(target, from, static_cast<size_t>(count));
            std::memset(target + count, 0, static_cast<size_t>(kRankBlock - count));
        };
        for (int row = row_begin; row < row_end; ++row) {
            const int64_t from = row * input_.stride + channel, target = row * to.stride + channel;
            const int count = components_in(row, block);
            copy(input_.hi + from, to.hi + target, count);
            if (to.lo != nullptr) copy(input_.lo + from, to.lo + target, count);
            int32_t sum = 0;
            for (int i = 0; i < count; ++i) {
                sum += to.lo != nullptr ? 256 * to.hi[target + i] + to.lo[target + i] : to.hi[target + i];
            }
            to.scale[to.at(row, block)] = input_.scale[input_.at(row, channel / input_.block)];
            to.sum[to.at(row, block)] = sum;
        }
    }

    uint8_t* place_reduced(int p, uint8_t* memory) {
        Part& part = parts_[p];
        part.reduced = input_;
        part.num_blocks = rank_blocks(*op_.parts[p], ranks_);
        if (part.num_blocks == 0) return memory;
        num_reduced_ += part.num_blocks * reduced_chunks();
        const CodesLayout layout = reduced_layout(*op_.parts[p], rows_, part.num_blocks, input_.lo != nullptr);
        part.rows = reinterpret_cast<float*>(memory);
        memory += reduced_float_bytes(rows_, part.num_blocks);
        part.reduced = layout.at(memory);
        return memory + layout.num_bytes();
    }

    void multiply_strips(int chunk, int p, int strip_begin, int strip_end) {
        LinearTask task{};
        task.row_begin = chunk * kRowsTogether;
        task.row_end = std::min(rows_, task.row_begin + kRowsTogether);
        task.input = input_;
        if (num_reduced_ > 0) task.progress = {&context_.num_reduced, num_reduced_};
        task.scratch = scratch_;
        if (op_.mode == QERVE_OUTPUT_SWIGLU) {
            for (int strip = strip_begin; strip < strip_end; ++strip) multiply_pair(task, strip);
            return;
        }
        float* y = op_.y + task.row_begin * op_.ldy + op_.columns[p] + strip_begin * kStripRows;
        run(task, p, strip_begin, strip_end, y, op_.ldy, op_.mode);
    }

    void multiply_pair(LinearTask& task, int strip) {
        const int height = task.row_end - task.row_begin;
        float* gate = halves_;
        float* up = gate + int64_t{height} * kStripRows;
        const int width = std::min(kStripRows, op_.parts[0]->out_features - strip * kStripRows);
        if (width < kStripRows) std::fill(gate, up + int64_t{height} * kStripRows, 0.0f);
        run(task, 0, strip, strip + 1, gate, kStripRows, QERVE_OUTPUT_STORE);
        run(task, 1, strip, strip + 1, up, kStripRows, QERVE_OUTPUT_STORE);
        float* y = op_.y + task.row_begin * op_.ldy + op_.columns[0] + strip * kStripRows;
        kernels_.silu_multiply(gate, up, height, width, y, op_.ldy);
    }

    void run(LinearTask& task, int p, int strip_begin, int strip_end, float* y, int64_t ldy, int mode) {
        task.matrix = op_.parts[p];
        task.rank = std::min(op_.parts[p]->rank, most_components(task.row_begin, task.row_end));
        task.reduced = parts_[p].reduced;
        task.strip_begin = strip_begin;
        task.strip_end = strip_end;
        task.y = y;
        task.ldy = ldy;
        task.mode = mode;
        kernels_.linear(task);
    }

    const qerve_linear_op& op_;
    const int rows_;
    const int32_t* row_ranks_;  // nullptr: all components count in all rows
    const RankRange ranks_;
    qerve_context& context_;
    const Kernels& kernels_;
    const LinearMemory memory_;
    Codes input_;
    uint8_t* scratch_;
    float* halves_;  // of a SwiGLU: gate, then up
    Part parts_[kMaxParts];
    int num_reduced_ = 0;
};

constexpr int64_t kMostFetched = 16384;

}  // namespace

void Step::linear(int index, int thread) {
    LinearWork work(*static_cast<const qerve_linear_op*>(ops_[index].args), step_, ranks_, context_, thread);
    if (work.has_own_codes()) {
        work.quantize(0, step_.num_tokens);
    } else {
        share(step_.num_tokens, [&](int begin, int end) { work.quantize(begin, end); });
        meet();
    }
    for (int begin, end; take(work.num_reduced(), 1, begin, end);) work.reduce(begin);
    const auto multiply = [&](int begin, int end) { work.multiply(begin, end); };
    if (step_.num_tokens <= kRowsTogether) share_evenly(thread, work.num_reduced(), work.num_units(), multiply);
    else share_rest(work.num_reduced(), work.num_units(), multiply, kStripsTogether);
}

Fetcher Step::weights_behind(int index, int thread) const {
    if (step_.num_tokens > kRowsTogether) return {};
    for (int i = index + 1; i < num_ops_; ++i) {
        if (ops_[i].kind != QERVE_OP_LINEAR) continue;
        const auto& op = *static_cast<const qerve_linear_op*>(ops_[i].args);
        const StripAt at = strip_at(op, thread * own_units(num_strips_in_all(op)));
        const qerve_matrix& matrix = *op.parts[at.part];
        const int64_t left = (num_strips(matrix) - at.strip) * matrix.strip_bytes;
        return {matrix.strips + at.strip * matrix.strip_bytes, std::min(kMostFetched, left)};
    }
    return {};
}

}  // namespace qerve
