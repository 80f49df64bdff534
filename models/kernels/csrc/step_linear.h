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

// Of the first product of a low-rank term: 32 components each; 0 where the input's first channels are taken as they are.
int rank_blocks(const qerve_matrix& matrix);

// Which of a linear operator's strips a number stands for: its parts one after the other, a pair counted once.
struct StripAt {
    int part, strip;
};
StripAt strip_at(const qerve_linear_op& op, int number);
int num_strips_in_all(const qerve_linear_op& op);

// Memory for one linear operator: codes of its input and reduced rows, shared by the threads or (codes of few rows) each
// thread's own; what a thread needs for its kernels and for the two halves of a SwiGLU.
struct LinearMemory {
    LinearMemory(const qerve_linear_op& op, int num_rows, const Kernels& kernels);

    CodesLayout input;
    bool has_own_codes;
    int64_t kernel_bytes;  // of a thread's own memory, behind the codes
    int64_t shared_bytes, own_bytes;
};

// Reduced rows of one part: as they come out of the first product, float32, and behind them as codes.
int64_t reduced_float_bytes(int64_t num_rows, int num_blocks);
CodesLayout reduced_layout(int64_t num_rows, int num_blocks);

}  // namespace qerve
