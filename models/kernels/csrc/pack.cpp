// From the artifact's codes to strips; see qerve_cpu.h for both layouts.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "context.h"
#include "linear.h"
#include "simd_portable.h"

namespace qerve {
namespace {

constexpr float kLargestHalf = 65504.0f;

int rank_of(const qerve_source& source, const qerve_matrix& matrix) { return source.up_codes == nullptr ? 0 : matrix.rank; }

// A power of two that brings `largest` into the range of float16, as high as it goes: small scales keep their bits.
float multiplier_for(const float* scales, int64_t count) {
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, scales[i]);
    if (largest <= 1.0f) {
        // Scales that float16 holds exactly are left alone: those of integer formats come from it.
        bool is_exact = true;
        for (int64_t i = 0; i < count && is_exact; ++i) {
            is_exact = SimdPortable::half_to_float(SimdPortable::float_to_half(scales[i])) == scales[i];
        }
        if (is_exact) return 1.0f;
    } else if (largest <= kLargestHalf) {
        return 1.0f;
    }
    int exponent = 0;
    std::frexp(largest, &exponent);
    return std::ldexp(1.0f, std::clamp(exponent - 15, -120, 120));
}

// Codes of `count` channels of one row from `first` on, one per byte.
void read_codes(const qerve_source& source, int64_t row, int64_t first, int count, uint8_t* out) {
    const int bits = source.code_bits;
    const uint8_t* data = source.codes + row * (int64_t{source.in_features} * bits / 8);
    if (bits == 8) {
        std::memcpy(out, data + first, static_cast<size_t>(count));
    } else if (bits == 4) {
        data += first / 2;
        for (int i = 0; i < count / 2; ++i) {
            out[2 * i] = data[i] & 15;
            out[2 * i + 1] = data[i] >> 4;
        }
    } else {
        for (int i = 0; i < count; ++i) {
            const int64_t bit = (first + i) * bits;
            const int64_t last = (int64_t{source.in_features} * bits - 1) / 8;
            unsigned word = data[bit / 8];
            if (bit / 8 < last) word |= static_cast<unsigned>(data[bit / 8 + 1]) << 8;
            out[i] = static_cast<uint8_t>((word >> (bit % 8)) & ((1u << bits) - 1));
        }
    }
}

// `codes`: (32 rows, block) bytes -> lines.
uint8_t* write_lines(const uint8_t* codes, int block, int bits, uint8_t* out) {
    const int fields = 8 / bits, channels = 4 * fields;
    for (int c = 0; c < block; c += channels) {
        for (int half = 0; half < 2; ++half, out += 64) {
            for (int row = 0; row < kHalf; ++row) {
                const uint8_t* from = codes + (half * kHalf + row) * block + c;
                for (int j = 0; j < 4; ++j) {
                    unsigned byte = 0;
                    for (int f = 0; f < fields; ++f) byte |= static_cast<unsigned>(from[4 * f + j]) << (bits * f);
                    out[4 * row + j] = static_cast<uint8_t>(byte);
                }
            }
        }
    }
    return out;
}

void pack_strip(const qerve_source& source, const qerve_matrix& matrix, int strip) {
    const int block = matrix.block, num_blocks = matrix.in_features / block;
    const int num_groups = matrix.in_features / source.group_size;
    const int first = strip * kStripRows, rows = std::min(kStripRows, matrix.out_features - first);
    uint8_t* out = const_cast<uint8_t*>(matrix.strips) + strip * matrix.strip_bytes;
    uint8_t codes[kStripRows * 64];
    for (int b = 0; b < num_blocks; ++b) {
        if (b % matrix.blocks_per_group == 0) {
            const int group = b / matrix.blocks_per_group;
            auto* scales = reinterpret_cast<uint16_t*>(out);
            auto* zeros = reinterpret_cast<int16_t*>(out + 64);
            for (int r = 0; r < kStripRows; ++r) {
                const int64_t at = int64_t{first + std::min(r, rows - 1)} * num_groups + group;
                scales[r] = r < rows ? SimdPortable::float_to_half(source.scales[at] / matrix.multiplier) : 0;
                if (matrix.has_zero_points) zeros[r] = r < rows ? source.zero_points[at] : 0;
            }
            out += header_bytes(matrix.has_zero_points != 0);
        }
        std::memset(codes, 0, sizeof codes);
        for (int r = 0; r < rows; ++r) read_codes(source, first + r, int64_t{b} * block, block, codes + r * block);
        out = write_lines(codes, block, matrix.storage_bits, out);
    }
    const int rank_blocks = rank_blocks_of(rank_of(source, matrix));
    for (int b = 0; b < rank_blocks; ++b) {
        auto* scales = reinterpret_cast<uint16_t*>(out);
        std::memset(codes, 128, sizeof codes);
        for (int r = 0; r < kStripRows; ++r) {
            const int64_t at = int64_t{first + std::min(r, rows - 1)} * rank_blocks + b;
            scales[r] = r < rows ? SimdPortable::float_to_half(source.up_scales[at] / matrix.up_multiplier) : 0;
            if (r < rows) std::memcpy(codes + r * kRankBlock, source.up_codes + at * kRankBlock, kRankBlock);
        }
        out = write_lines(codes, kRankBlock, 8, out + 64);
    }
}

const char* find_obstacle(const qerve_source& source) {
    if (source.in_features <= 0 || source.out_features <= 0) return "a weight without rows or columns";
    if (source.in_features % 32 != 0) return "in_features must be a multiple of 32";
    if (source.code_bits < 1 || source.code_bits > 8) return "codes must have 1 to 8 bits";
    if (source.group_size < 32 || source.group_size % 32 != 0 || source.in_features % source.group_size != 0) {
        return "groups must be a multiple of 32 channels, and tile the row";
    }
    return nullptr;
}

}  // namespace
}  // namespace qerve

extern "C" int64_t qerve_pack_plan(const qerve_source* source, qerve_matrix* matrix, char* error, int32_t error_size) {
    using namespace qerve;
    if (const char* obstacle = find_obstacle(*source)) {
        std::snprintf(error, static_cast<size_t>(error_size), "%s", obstacle);
        return -1;
    }
    matrix->out_features = source->out_features;
    matrix->in_features = source->in_features;
    matrix->block = source->group_size % 64 == 0 ? 64 : 32;
    matrix->blocks_per_group = source->group_size / matrix->block;
    matrix->has_zero_points = source->zero_points != nullptr;
    const int64_t groups = int64_t{source->out_features} * (source->in_features / source->group_size);
    matrix->multiplier = multiplier_for(source->scales, groups);
    const int rank_blocks = source->up_codes == nullptr ? 0 : rank_blocks_of(matrix->rank);
    matrix->up_multiplier = rank_blocks == 0 ? 1.0f : multiplier_for(source->up_scales, int64_t{source->out_features} * rank_blocks);
    const int64_t headers = (source->in_features / source->group_size) * header_bytes(matrix->has_zero_points != 0);
    matrix->strip_bytes = headers + code_bytes(matrix->storage_bits, source->in_features) +
                          rank_blocks * (64 + code_bytes(8, kRankBlock));
    return matrix->strip_bytes * ((source->out_features + kStripRows - 1) / kStripRows);
}

extern "C" void qerve_pack(qerve_context* context, const qerve_source* source, const qerve_matrix* matrix) {
    struct State {
        qerve_context* context;
        const qerve_source* source;
        const qerve_matrix* matrix;
    } state{context, source, matrix};
    context->next.store(0);
    context->pool.run(
        [](void* pointer, int) {
            State& s = *static_cast<State*>(pointer);
            const int num_strips = (s.matrix->out_features + qerve::kStripRows - 1) / qerve::kStripRows;
            for (int strip; (strip = s.context->next.fetch_add(1)) < num_strips;) {
                qerve::pack_strip(*s.source, *s.matrix, strip);
            }
        },
        &state);
}
