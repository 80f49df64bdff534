// Where the codes of a linear operator's input lie: rows of integers with a scale and a sum per block of channels.
#pragma once

#include <cstdint>

#include "context.h"
#include "kernels.h"

namespace qerve {

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

}  // namespace qerve
