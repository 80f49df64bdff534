// Quantized rows times packed strips, with the low-rank term as further blocks of the same sum.
//
// For a row t, an output o and a block b of input channels, with w the codes minus their zero points:
//     y[t][o] = sum over b of (sum over c in b of w[o][c] * x[t][c]) * (weight scale[o][b] * input scale[t][b])
// The inner sum is exact in int32. The outer one runs over the blocks in order, in float32, one fma each: whatever tile
// a row falls into, its result is the same. The low-rank blocks follow the main ones, then come bias and residual.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "wait.h"

namespace qerve {

// The sums of a tile live in registers only where the loops over its rows are inlined and unrolled.
#define QERVE_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define QERVE_UNROLL_ROWS _Pragma("unroll")
#else
#define QERVE_UNROLL_ROWS _Pragma("GCC unroll 16")
#endif

constexpr int kHalf = 16;  // output rows of half a strip: the lanes of one sum

// Weights are asked for this long before they are multiplied: the processor's own prefetcher starts anew in every page
// and strip. The bytes behind the last weight are never read, asking for them does no harm.
constexpr int kBytesAhead = 4096;

static inline int64_t header_bytes(bool has_zero_points) { return has_zero_points ? 128 : 64; }
static inline int64_t code_bytes(int storage_bits, int channels) { return int64_t{kStripRows} * channels * storage_bits / 8; }

// The blocks of one part of a strip: what the inner loop needs to know about them.
struct BlockRun {
    const uint8_t* data;
    int num_blocks;
    int block;
    int blocks_per_group;
    bool has_zero_points;
    int zero;
    float multiplier;
    Codes input;
};

static inline BlockRun main_run(const LinearTask& task, int strip) {
    const qerve_matrix& m = *task.matrix;
    return {m.strips + strip * m.strip_bytes, m.in_features / m.block, m.block, m.blocks_per_group,
            m.has_zero_points != 0, m.zero, m.multiplier, task.input};
}

// The low-rank blocks of a strip up to the task's rank; num_blocks is 0 where there are none. Those behind would add
// zero times a finite scale, which leaves every sum as it is: none is ever -0, since it starts at +0 and no term that
// is not zero is rounded to zero.
static inline BlockRun rank_run(const LinearTask& task, int strip) {
    const qerve_matrix& m = *task.matrix;
    const int64_t bytes = rank_blocks_of(m.rank) * (64 + code_bytes(8, kRankBlock));
    return {m.strips + (strip + 1) * m.strip_bytes - bytes, rank_blocks_of(task.rank), kRankBlock, 1, false, 128,
            m.up_multiplier, task.reduced};
}

// acc[t][h] += sums of kRows rows of x with one block of codes, h the half of the strip.
// One sum takes the latency of an instruction per line: few rows have several sums each, which add up to the same.
template <class S, int kBits, int kRows>
QERVE_INLINE void add_products(const uint8_t* codes, int block, const int8_t* x, int64_t stride, typename S::I (&acc)[kRows][2]) {
    constexpr int kFields = 8 / kBits;
    constexpr int kSums = S::kAccumulators >= 24 && kRows <= 2 ? 4 / kRows : 1;
    typename S::I more[kSums][kRows][2];
    for (int i = 1; i < kSums; ++i) {
        QERVE_UNROLL_ROWS
        for (int t = 0; t < kRows; ++t) more[i][t][0] = more[i][t][1] = S::zero_i();
    }
    const auto multiply = [&](auto number, typename S::B low, typename S::B high, int channel) {
        constexpr int kSum = decltype(number)::value % kSums;
        QERVE_UNROLL_ROWS
        for (int t = 0; t < kRows; ++t) {
            typename S::I(&sums)[2] = kSum == 0 ? acc[t] : more[kSum][t];
            sums[0] = S::dot(sums[0], low, x + t * stride + channel);
            sums[1] = S::dot(sums[1], high, x + t * stride + channel);
        }
    };
    // two lines of each half at a time, all fields of each
    const auto multiply_line = [&](auto line, int channel) {
        constexpr int kLine = decltype(line)::value;
        __builtin_prefetch(codes + kLine * 128 + kBytesAhead);
        __builtin_prefetch(codes + kLine * 128 + 64 + kBytesAhead);
        const typename S::B first = S::load_bytes(codes + kLine * 128);
        const typename S::B second = S::load_bytes(codes + kLine * 128 + 64);
        const auto field = [&](auto number) {
            constexpr int kField = decltype(number)::value;
            if constexpr (kBits == 8) {
                multiply(std::integral_constant<int, kLine>(), first, second, channel);
            } else if constexpr (kField < kFields) {
                multiply(std::integral_constant<int, kLine * kFields + kField>(),
                         S::template field<(kField * kBits) % 8, kBits>(first),
                         S::template field<(kField * kBits) % 8, kBits>(second), channel + 4 * kField);
            }
        };
        field(std::integral_constant<int, 0>());
        if constexpr (kBits < 8) field(std::integral_constant<int, 1>());
        if constexpr (kBits < 4) {
            field(std::integral_constant<int, 2>());
            field(std::integral_constant<int, 3>());
        }
    };
    for (int c = 0; c < block; c += 8 * kFields, codes += 256) {
        multiply_line(std::integral_constant<int, 0>(), c);
        multiply_line(std::integral_constant<int, 1>(), c + 4 * kFields);
    }
    for (int i = 1; i < kSums; ++i) {
        QERVE_UNROLL_ROWS
        for (int t = 0; t < kRows; ++t) {
            for (int h = 0; h < 2; ++h) acc[t][h] = S::add_i(acc[t][h], more[i][t][h]);
        }
    }
}

// Where a scale applies to several blocks, headers are further apart than blocks. An input whose blocks are wider than
// those of the run (first channels of a 64-channel input, read 32 at a time) shares its scale among them.
struct InputBlock {
    int64_t channel;
    int64_t index;  // of its scale
};

static inline InputBlock input_block(const BlockRun& run, int b) {
    const int64_t channel = int64_t{b} * run.block;
    return {channel, channel / run.input.block};
}

// Sum of the codes of one row over one block of the run.
static inline int32_t block_sum(const BlockRun& run, int64_t row, const InputBlock& at) {
    if (run.input.block == run.block) return run.input.sum[run.input.at(row, at.index)];
    int32_t sum = 0;
    const int64_t start = row * run.input.stride + at.channel;
    for (int c = 0; c < run.block; ++c) {
        sum += run.input.lo ? 256 * run.input.hi[start + c] + run.input.lo[start + c] : run.input.hi[start + c];
    }
    return sum;
}

// A group's header, read.
template <class S>
struct Header {
    typename S::F scale[2] = {S::zero(), S::zero()};
    typename S::I zero[2] = {S::zero_i(), S::zero_i()};

    void read(const BlockRun& run, const uint8_t* data) {
        const auto* scales = reinterpret_cast<const uint16_t*>(data);
        const auto multiplier = S::set1(run.multiplier);
        for (int h = 0; h < 2; ++h) scale[h] = S::mul(S::load_f16(scales + kHalf * h), multiplier);
        if (!run.has_zero_points) return;
        const auto* zeros = reinterpret_cast<const int16_t*>(data + 64);
        for (int h = 0; h < 2; ++h) zero[h] = S::load_i16(zeros + kHalf * h);
    }
};

// One block: exact integer sums, then one fma per row and half. Wide: rows of 16-bit codes, one byte after the other.
template <class S, int kBits, int kRows, bool kIsWide, bool kHasZeros>
QERVE_INLINE void add_block(const BlockRun& run, const uint8_t* codes, const Header<S>& header, const InputBlock& at, int64_t row,
                      typename S::F (&total)[kRows][2]) {
    const Codes& x = run.input;
    const int64_t from = row * x.stride + at.channel;
    int32_t sums[kRows];
    QERVE_UNROLL_ROWS
    for (int t = 0; t < kRows; ++t) sums[t] = block_sum(run, row + t, at);
    typename S::I acc[kRows][2];
    QERVE_UNROLL_ROWS
    for (int t = 0; t < kRows; ++t) {
        // the zero point costs nothing where it is the same for all
        acc[t][0] = acc[t][1] = kIsWide || kHasZeros ? S::zero_i() : S::set1_i(-run.zero * sums[t]);
    }
    add_products<S, kBits, kRows>(codes, run.block, x.hi + from, x.stride, acc);
    if constexpr (kIsWide) {
        QERVE_UNROLL_ROWS
        for (int t = 0; t < kRows; ++t) {
            for (int h = 0; h < 2; ++h) acc[t][h] = S::template shift_left<8>(acc[t][h]);
        }
        add_products<S, kBits, kRows>(codes, run.block, x.lo + from, x.stride, acc);
    }
    const float* input_scales = x.scale + x.at(row, at.index);
    QERVE_UNROLL_ROWS
    for (int t = 0; t < kRows; ++t) {
        const auto input_scale = S::set1(input_scales[t]);
        for (int h = 0; h < 2; ++h) {
            typename S::I sum = acc[t][h];
            if constexpr (kHasZeros) sum = S::sub_i(sum, S::mul_i(header.zero[h], S::set1_i(sums[t])));
            else if constexpr (kIsWide) sum = S::sub_i(sum, S::set1_i(run.zero * sums[t]));
            total[t][h] = S::fma(S::to_float(sum), S::mul(header.scale[h], input_scale), total[t][h]);
        }
    }
}

template <class S, int kBits, int kRows, bool kIsWide, bool kHasZeros>
inline void add_blocks(const BlockRun& run, int64_t row, typename S::F (&total)[kRows][2]) {
    const uint8_t* data = run.data;
    Header<S> header;
    for (int b = 0, left = 0; b < run.num_blocks; ++b, --left) {
        if (left == 0) {
            header.read(run, data);
            __builtin_prefetch(data + kBytesAhead);
            data += header_bytes(kHasZeros);
            left = run.blocks_per_group;
        }
        add_block<S, kBits, kRows, kIsWide, kHasZeros>(run, data, header, input_block(run, b), row, total);
        data += code_bytes(kBits, run.block);
    }
}

// Rows of 16-bit codes and grids with zero points are multiplied four rows at a time, not in tiles of every size: the
// same sums, for a fraction of the code.
template <class S, int kBits, int kRows>
inline void add_run(const BlockRun& run, int64_t row, typename S::F (&total)[kRows][2]) {
    const bool is_wide = run.input.lo != nullptr;
    if (!is_wide && !run.has_zero_points) return add_blocks<S, kBits, kRows, false, false>(run, row, total);
    if constexpr (kRows > 4) {
        add_run<S, kBits, 4>(run, row, reinterpret_cast<typename S::F(&)[4][2]>(total));
        add_run<S, kBits, kRows - 4>(run, row + 4, reinterpret_cast<typename S::F(&)[kRows - 4][2]>(total[4]));
    } else if (run.has_zero_points) {
        if (is_wide) add_blocks<S, kBits, kRows, true, true>(run, row, total);
        else add_blocks<S, kBits, kRows, false, true>(run, row, total);
    } else {
        add_blocks<S, kBits, kRows, true, false>(run, row, total);
    }
}

// Bias, then the residual, then the store; the last strip may stick out over the last output.
template <class S>
inline void finish(const LinearTask& task, int strip, int half, int64_t row, typename S::F value) {
    const qerve_matrix& m = *task.matrix;
    const int column = strip * kStripRows + half * kHalf;
    const int width = m.out_features - column;
    if (width <= 0) return;
    float* y = task.y + (row - task.row_begin) * task.ldy + column - task.strip_begin * kStripRows;
    if (width >= kHalf) {
        if (m.bias != nullptr) value = S::add(value, S::load(m.bias + column));
        if (task.mode == QERVE_OUTPUT_ADD) value = S::add(S::load(y), value);
        S::store(y, value);
        return;
    }
    float lanes[kHalf];
    S::store(lanes, value);
    for (int i = 0; i < width; ++i) {
        const float biased = m.bias != nullptr ? lanes[i] + m.bias[column + i] : lanes[i];
        y[i] = task.mode == QERVE_OUTPUT_ADD ? y[i] + biased : biased;
    }
}

template <class S, int kRows>
inline void multiply_rows(const LinearTask& task, int strip, int64_t row) {
    typename S::F total[kRows][2];
    QERVE_UNROLL_ROWS
    for (int t = 0; t < kRows; ++t) total[t][0] = total[t][1] = S::zero();
    const BlockRun main = main_run(task, strip);
    switch (task.matrix->storage_bits) {
        case 2: add_run<S, 2, kRows>(main, row, total); break;
        case 4: add_run<S, 4, kRows>(main, row, total); break;
        default: add_run<S, 8, kRows>(main, row, total); break;
    }
    if (task.rank > 0) {
        wait_for(task.progress);
        add_run<S, 8, kRows>(rank_run(task, strip), row, total);
    }
    QERVE_UNROLL_ROWS
    for (int t = 0; t < kRows; ++t) {
        for (int h = 0; h < 2; ++h) finish<S>(task, strip, h, row + t, total[t][h]);
    }
}

// Rows of a tile: with two sums each they stay in registers next to the weights.
template <class S>
constexpr int kMaxRows = S::kAccumulators >= 24 ? 8 : 2;

// Rows row_begin..row_end with one strip.
template <class S>
inline void multiply_strip(const LinearTask& task, int strip, int row_begin, int row_end) {
    for (int row = row_begin; row < row_end;) {
        const int left = row_end - row;
        if (kMaxRows<S> >= 8 && left >= 8) {
            multiply_rows<S, kMaxRows<S> >= 8 ? 8 : 1>(task, strip, row);
            row += 8;
        } else if (kMaxRows<S> >= 4 && left >= 4) {
            multiply_rows<S, kMaxRows<S> >= 4 ? 4 : 1>(task, strip, row);
            row += 4;
        } else if (left >= 2) {
            multiply_rows<S, 2>(task, strip, row);
            row += 2;
        } else {
            multiply_rows<S, 1>(task, strip, row);
            row += 1;
        }
    }
}

template <class S>
int64_t no_scratch(const qerve_matrix&) { return 0; }

template <class S>
void linear(const LinearTask& task) {
    for (int strip = task.strip_begin; strip < task.strip_end; ++strip) {
        multiply_strip<S>(task, strip, task.row_begin, task.row_end);
    }
}

}  // namespace qerve
