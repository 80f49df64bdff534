// A linear operator's memory, and how its work is cut.
#pragma once

#include "codes.h"
#include "kernels.h"

namespace qerve {

constexpr int kRowsTogether = 256;  // rows of a unit: their codes stay in the second-level cache
constexpr int kReducedRowsTogether = 64;
constexpr int kStripsTogether = 4;  // of a prompt, at most: the last ones to finish should not be waited for
constexpr int kRowsRepeated = 4;  // so few rows every thread prepares for itself: quicker than waiting for each other

int num_strips(const qerve_matrix& matrix);

// How many components of the low-rank terms count in the rows of a step: in the row with the fewest, and with the most.
struct RankRange {
    explicit RankRange(const qerve_step& step);

    int32_t least, most;
};

// Blocks of 32 components that are made before a low-rank term's product with lora_up: by a product of their own, or
// (without lora_down) as copies of the input's first channels where some of a block's do not count in some row.
// 0 where there is nothing to make.
int rank_blocks(const qerve_matrix& matrix, const RankRange& ranks);

// Which of a linear operator's strips a number stands for: its parts one after the other, a pair counted once.
struct StripAt {
    int part, strip;
};
StripAt strip_at(const qerve_linear_op& op, int number);
int num_strips_in_all(const qerve_linear_op& op);

// Memory for one linear operator: codes of its input and reduced rows, shared by the threads or (codes of few rows) each
// thread's own; what a thread needs for its kernels and for the two halves of a SwiGLU.
struct LinearMemory {
    LinearMemory(const qerve_linear_op& op, int num_rows, const RankRange& ranks, const Kernels& kernels);

    CodesLayout input;
    bool has_own_codes;
    int64_t kernel_bytes;  // of a thread's own memory, behind the codes
    int64_t shared_bytes, own_bytes;
};

// Reduced rows of one part: as they come out of the first product, float32, and behind them as codes.
int64_t reduced_float_bytes(int64_t num_rows, int num_blocks);
CodesLayout reduced_layout(const qerve_matrix& matrix, int64_t num_rows, int num_blocks, bool is_input_wide);

}  // namespace qerve
