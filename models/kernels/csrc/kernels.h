// What every instruction set implements: one table of functions over rows, strips and attention tiles.
// Sources: linear.h, input.h, attention.h are written once over a `Simd` type (simd_*.h); isa_*.cpp instantiate them.
//
// Arithmetic is the same in all of them, operation by operation, so that results do not depend on the instruction set,
// on the number of rows in a call or on the number of threads: integer sums are exact, and float sums run in one order.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "qerve_cpu.h"

namespace qerve {

constexpr int kStripRows = QERVE_STRIP_ROWS;
constexpr int kRankBlock = 32;

// Blocks of `rank` components. Static, as are all functions here that units for several instruction sets compile.
static constexpr int rank_blocks_of(int rank) { return (rank + kRankBlock - 1) / kRankBlock; }
constexpr int kCacheBlock = QERVE_CACHE_BLOCK;
constexpr int kMaxHeadDim = 256;
constexpr int kLanes = 16;

// Rows of quantized activations. The value of channel c in row t is scale[at(t, c / block)] * code, and code is
// 256 * hi + lo (16-bit rows) or hi alone (lo == nullptr). Codes of 8-bit rows lie in -127..127.
struct Codes {
    int8_t* hi = nullptr;      // (num_rows, stride)
    int8_t* lo = nullptr;      // (num_rows, stride) or nullptr
    float* scale = nullptr;    // (num_blocks, row_stride)
    int32_t* sum = nullptr;    // (num_blocks, row_stride): codes of the block added up
    int64_t stride = 0;        // bytes between rows: in_features and some more
    int64_t row_stride = 0;    // num_rows or more: a tile reads the scales of its rows side by side
    int32_t num_blocks = 0;    // in_features / block
    int32_t block = 0;

    int64_t at(int64_t row, int64_t block_index) const { return block_index * row_stride + row; }
};

// Says when reduced rows that other threads compute are complete: `count` reaches `target`.
struct Progress {
    std::atomic<int32_t>* count = nullptr;  // nullptr: they are
    int32_t target = 0;
};

// Whether the codes of this grid need 16-bit rows (Codes::lo): they do not all lie in -127..127.
static inline bool needs_wide(const qerve_activation& activation) {
    if (activation.kind == QERVE_ACTIVATION_16) return true;
    return activation.kind == QERVE_ACTIVATION_INT && !activation.is_symmetric && activation.num_bits > 7;
}

// Rows row_begin..row_end of a linear operator's product with strips strip_begin..strip_end of one matrix.
struct LinearTask {
    const qerve_matrix* matrix;
    Codes input;       // of the main blocks
    Codes reduced;     // of the low-rank blocks: block 32; the reduced rows, or `input` itself for first channels
    int32_t rank;      // leading components of the low-rank term that are multiplied; in all rows the others are zero
    Progress progress; // of the reduced rows
    int32_t row_begin, row_end;
    int32_t strip_begin, strip_end;
    float* y;          // row row_begin, first column of strip_begin
    int64_t ldy;
    int32_t mode;      // STORE or ADD
    uint8_t* scratch;  // linear_scratch_bytes of this thread, 64-byte aligned
};

// One query tile of one sequence and one kv head.
struct AttentionTask {
    const qerve_attention_op* op;
    const int32_t* blocks;   // block table of the sequence
    int32_t row_begin, row_end;   // rows of the batch, all of this sequence
    int32_t position;        // context position of row_begin
    int32_t kv_head;
    uint8_t* scratch;        // attention_scratch_bytes of this thread
};

struct Kernels {
    const char* name;

    // Norm, divide, gather, rotate, quantize one row: x (in_features,) -> row `row` of `codes`. `scratch`: 2 * in_features
    // floats (64-byte aligned).
    void (*quantize_row)(const qerve_input& input, const float* x, int64_t row, const Codes& codes, float* scratch);

    // 16-bit codes of reduced[32 * block..32 * block + 32], one scale for all: block `block` of row `row` of the low-rank
    // term's input. `reduced` is the whole row (32 * num_blocks,), `codes` has blocks of 32.
    void (*quantize_reduced)(const float* reduced, int64_t row, int32_t block, const Codes& codes);

    void (*linear)(const LinearTask& task);
    int64_t (*linear_scratch_bytes)(const qerve_matrix& matrix);

    // out[row][i] = silu(gate[row][i]) * up[row][i], i below width; gate and up have rows of 32, out has rows of ld.
    void (*silu_multiply)(const float* gate, const float* up, int64_t num_rows, int64_t width, float* out, int64_t ld);

    // Only where op.has_quantized_qkv, once per row and before any `append` of it: rotate all queries and keys of `row`
    // in op.qkv, then round queries, keys and values to the grid. A group of channels may span heads.
    void (*quantize_qkv)(const qerve_attention_op& op, int64_t row, int32_t position);

    // Append key and value of `kv_head` at cache slot `slot`; unless `quantize_qkv` did it, rotate the key and the
    // queries of the heads that share `kv_head` before, in op.qkv.
    void (*append)(const qerve_attention_op& op, int64_t row, int32_t position, int64_t slot, int32_t kv_head);

    void (*attend)(const AttentionTask& task);
    int64_t (*attention_scratch_bytes)(const qerve_attention_op& op);

    // Rows of a query tile that `attend` likes best (it takes any number from 1 to this).
    int32_t attention_rows;

    // One embedding row to float32.
    void (*embed)(const qerve_embed_op& op, int32_t token, float* hidden);

    // For benches: something that depends on every byte of `memory`; integer multiply-adds done in `iterations` rounds.
    uint64_t (*read_all)(const uint8_t* memory, int64_t num_bytes);
    int64_t (*multiply_adds)(int64_t iterations);
};

// nullptr where the translation unit was not compiled in.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();

}  // namespace qerve
