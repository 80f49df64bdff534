// Quantized rows times packed strips in AMX tiles: 16 rows x 16 outputs x 64 channels in one instruction.
//
// The integer sums are those of linear.h, and so are the float operations on them, in the same order: a row's result is
// the same whether it went through a tile or not. Codes are unpacked to signed bytes once per strip, in the order in
// which a tile wants them, which is that of the lines: four channels of sixteen outputs.
#pragma once

#include <immintrin.h>

#include "linear.h"

namespace qerve {

constexpr int kTileRows = 16;
constexpr int kFewestTileRows = 4;  // fewer rows are faster without tiles

// Tiles: sums, rows of 64 channels, weights of 64 channels, each for full and for remaining rows, and of 32 channels.
// Macros, because the compiler pastes the numbers into instructions as they are written.
#define QERVE_SUMS 0
#define QERVE_ROWS_64 1
#define QERVE_WEIGHTS_64 2
#define QERVE_REST_SUMS 3
#define QERVE_REST_ROWS_64 4
#define QERVE_ROWS_32 5
#define QERVE_WEIGHTS_32 6
#define QERVE_REST_ROWS_32 7

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int num_rows, int num_bytes) {
        rows[tile] = static_cast<uint8_t>(num_rows);
        row_bytes[tile] = static_cast<uint16_t>(num_bytes);
    }
};

inline void load(const TileConfig& config) {
    // The intrinsic tells the compiler of its first eight bytes only: the others would be left out as never read.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

inline void configure_tiles(int remaining_rows) {
    const int rest = remaining_rows > 0 ? remaining_rows : 1;
    TileConfig config;
    config.set(QERVE_SUMS, kTileRows, 64);
    config.set(QERVE_ROWS_64, kTileRows, 64);
    config.set(QERVE_WEIGHTS_64, 16, 64);
    config.set(QERVE_REST_SUMS, rest, 64);
    config.set(QERVE_REST_ROWS_64, rest, 64);
    config.set(QERVE_ROWS_32, kTileRows, 32);
    config.set(QERVE_WEIGHTS_32, 8, 64);
    config.set(QERVE_REST_ROWS_32, rest, 32);
    load(config);
}

// Signed codes of one run of one strip: per half, per block, lines of 64 bytes (four channels of sixteen outputs).
// 8-bit codes with zero points stay as they are less 128; what is missing then comes from the rows' sums.
struct Unpacked {
    const int8_t* weights;
    const float* scales;   // (2 halves, blocks, 16)
    const int32_t* shifts; // (2 halves, blocks, 16): what is left to subtract per unit of a row's sum; nullptr: nothing
};

inline int64_t run_weights_bytes(const BlockRun& run) { return int64_t{kStripRows} * run.num_blocks * run.block; }
inline int64_t run_bytes(const BlockRun& run) {
    return run_weights_bytes(run) + int64_t{2} * run.num_blocks * kHalf * (run.has_zero_points ? 8 : 4);
}

template <int kBits>
inline Unpacked unpack(const BlockRun& run, uint8_t* out) {
    constexpr int kFields = 8 / kBits;
    auto* weights = reinterpret_cast<int8_t*>(out);
    auto* scales = reinterpret_cast<float*>(out + run_weights_bytes(run));
    int32_t* shifts = nullptr;
    // u8 - zero point needs nine bits
    const bool has_shifts = run.has_zero_points && kBits == 8;
    if (has_shifts) shifts = reinterpret_cast<int32_t*>(scales + 2 * run.num_blocks * kHalf);
    const int64_t half_bytes = int64_t{kHalf} * run.num_blocks * run.block;
    const uint8_t* data = run.data;
    __m512 scale[2];
    __m512i zero[2], zero_bytes[2];
    for (int h = 0; h < 2; ++h) {
        zero[h] = _mm512_set1_epi32(run.zero);
        zero_bytes[h] = _mm512_set1_epi8(static_cast<char>(has_shifts ? 128 : run.zero));
    }
    for (int b = 0; b < run.num_blocks; ++b) {
        if (b % run.blocks_per_group == 0) {
            for (int h = 0; h < 2; ++h) {
                const auto* halves = reinterpret_cast<const __m256i*>(data + 32 * h);
                scale[h] = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(halves)), _mm512_set1_ps(run.multiplier));
                if (!run.has_zero_points) continue;
                const auto* zeros = reinterpret_cast<const __m256i*>(data + 64 + 32 * h);
                zero[h] = _mm512_cvtepi16_epi32(_mm256_loadu_si256(zeros));
                // the low byte of each lane four times
                if (!has_shifts) zero_bytes[h] = _mm512_mullo_epi32(zero[h], _mm512_set1_epi32(0x01010101));
            }
            data += header_bytes(run.has_zero_points);
        }
        for (int h = 0; h < 2; ++h) {
            const int64_t at = (int64_t{h} * run.num_blocks + b) * kHalf;
            _mm512_storeu_ps(scales + at, scale[h]);
            if (has_shifts) _mm512_storeu_si512(shifts + at, _mm512_sub_epi32(zero[h], _mm512_set1_epi32(128)));
        }
        for (int c = 0; c < run.block; c += 4 * kFields) {
            for (int h = 0; h < 2; ++h, data += 64) {
                const __m512i line = _mm512_loadu_si512(data);
                int8_t* to = weights + h * half_bytes + (int64_t{b} * run.block + c) * kHalf;
                for (int f = 0; f < kFields; ++f) {
                    const __m512i codes = kBits == 8 ? line : _mm512_and_si512(_mm512_srli_epi16(line, kBits * f), _mm512_set1_epi8((1 << kBits) - 1));
                    _mm512_storeu_si512(to + 64 * f, _mm512_sub_epi8(codes, zero_bytes[h]));
                }
            }
        }
    }
    return {weights, scales, shifts};
}

inline Unpacked unpack_run(const BlockRun& run, int bits, uint8_t* out) {
    switch (bits) {
        case 2: return unpack<2>(run, out);
        case 4: return unpack<4>(run, out);
        default: return unpack<8>(run, out);
    }
}

// sums (kRows, 16) = kRows rows of x with one block of one half.
template <bool kIsRest>
inline void tile_sums(const int8_t* x, int64_t stride, const int8_t* weights, int block, int32_t* sums) {
    if (block == 64) {
        if constexpr (kIsRest) {
            _tile_zero(QERVE_REST_SUMS);
            _tile_loadd(QERVE_REST_ROWS_64, x, stride);
            _tile_loadd(QERVE_WEIGHTS_64, weights, 64);
            _tile_dpbssd(QERVE_REST_SUMS, QERVE_REST_ROWS_64, QERVE_WEIGHTS_64);
            _tile_stored(QERVE_REST_SUMS, sums, 64);
        } else {
            _tile_zero(QERVE_SUMS);
            _tile_loadd(QERVE_ROWS_64, x, stride);
            _tile_loadd(QERVE_WEIGHTS_64, weights, 64);
            _tile_dpbssd(QERVE_SUMS, QERVE_ROWS_64, QERVE_WEIGHTS_64);
            _tile_stored(QERVE_SUMS, sums, 64);
        }
    } else {
        if constexpr (kIsRest) {
            _tile_zero(QERVE_REST_SUMS);
            _tile_loadd(QERVE_REST_ROWS_32, x, stride);
            _tile_loadd(QERVE_WEIGHTS_32, weights, 64);
            _tile_dpbssd(QERVE_REST_SUMS, QERVE_REST_ROWS_32, QERVE_WEIGHTS_32);
            _tile_stored(QERVE_REST_SUMS, sums, 64);
        } else {
            _tile_zero(QERVE_SUMS);
            _tile_loadd(QERVE_ROWS_32, x, stride);
            _tile_loadd(QERVE_WEIGHTS_32, weights, 64);
            _tile_dpbssd(QERVE_SUMS, QERVE_ROWS_32, QERVE_WEIGHTS_32);
            _tile_stored(QERVE_SUMS, sums, 64);
        }
    }
}

template <int kRows, bool kIsRest>
inline void add_run_in_tiles(const BlockRun& run, const Unpacked& unpacked, int half, int64_t row, int32_t* sums,
                             __m512 (&total)[kRows]) {
    const Codes& x = run.input;
    const int8_t* weights = unpacked.weights + int64_t{half} * kHalf * run.num_blocks * run.block;
    const float* scales = unpacked.scales + int64_t{half} * run.num_blocks * kHalf;
    for (int b = 0; b < run.num_blocks; ++b) {
        const InputBlock at = input_block(run, b);
        int32_t* high = sums + (b & 1) * 2 * kTileRows * kHalf;  // the next block's tiles do not wait for these loads
        int32_t* low = high + kTileRows * kHalf;
        const int64_t from = row * x.stride + at.channel;
        tile_sums<kIsRest>(x.hi + from, x.stride, weights, run.block, high);
        if (x.lo != nullptr) tile_sums<kIsRest>(x.lo + from, x.stride, weights, run.block, low);
        weights += kHalf * run.block;
        const __m512 scale = _mm512_loadu_ps(scales + b * kHalf);
        for (int t = 0; t < kRows; ++t) {
            __m512i sum = _mm512_loadu_si512(high + t * kHalf);
            if (x.lo != nullptr) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_loadu_si512(low + t * kHalf));
            if (unpacked.shifts != nullptr) {
                const __m512i shift = _mm512_loadu_si512(unpacked.shifts + (int64_t{half} * run.num_blocks + b) * kHalf);
                sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(shift, _mm512_set1_epi32(block_sum(run, row + t, at))));
            }
            const __m512 input_scale = _mm512_set1_ps(x.scale[(row + t) * x.num_blocks + at.index]);
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, input_scale), total[t]);
        }
    }
}

struct StripInTiles {
    const LinearTask& task;
    int strip;
    BlockRun main, rank;
    Unpacked main_weights, rank_weights;
    int32_t* sums;

    template <class S, int kRows, bool kIsRest>
    void rows(int64_t row) const {
        for (int h = 0; h < 2; ++h) {
            __m512 total[kRows];
            for (int t = 0; t < kRows; ++t) total[t] = _mm512_setzero_ps();
            add_run_in_tiles<kRows, kIsRest>(main, main_weights, h, row, sums, total);
            if (rank.num_blocks > 0) add_run_in_tiles<kRows, kIsRest>(rank, rank_weights, h, row, sums, total);
            for (int t = 0; t < kRows; ++t) finish<S>(task, strip, h, row + t, total[t]);
        }
    }

    template <class S, int kRows = kTileRows - 1>
    void rest(int num_rows, int64_t row) const {
        if constexpr (kRows >= kFewestTileRows) {
            if (num_rows == kRows) return rows<S, kRows, true>(row);
            rest<S, kRows - 1>(num_rows, row);
        }
    }
};

constexpr int64_t kSumsBytes = 4 * kTileRows * kHalf * 4;

inline int64_t tile_scratch_bytes(const qerve_matrix& m) {
    const int64_t channels = m.in_features + (m.rank + kRankBlock - 1) / kRankBlock * kRankBlock;
    return kSumsBytes + kStripRows * channels + kStripRows * channels / 32 * 8 + 256;
}

template <class S>
void linear_in_tiles(const LinearTask& task) {
    const int num_rows = task.row_end - task.row_begin;
    const int full = num_rows / kTileRows * kTileRows, rest = num_rows - full;
    if (num_rows < kFewestTileRows) return linear<S>(task);
    configure_tiles(rest);
    for (int strip = task.strip_begin; strip < task.strip_end; ++strip) {
        StripInTiles tiles{task, strip, main_run(task, strip), rank_run(task, strip), {}, {}, reinterpret_cast<int32_t*>(task.scratch)};
        uint8_t* scratch = task.scratch + kSumsBytes;
        tiles.main_weights = unpack_run(tiles.main, task.matrix->storage_bits, scratch);
        if (tiles.rank.num_blocks > 0) {
            tiles.rank_weights = unpack_run(tiles.rank, 8, scratch + (run_bytes(tiles.main) + 63) / 64 * 64);
            wait_for(task.progress);
        }
        for (int row = 0; row < full; row += kTileRows) tiles.rows<S, kTileRows, false>(task.row_begin + row);
        if (rest >= kFewestTileRows) tiles.rest<S>(rest, task.row_begin + full);
        else if (rest > 0) multiply_strip<S>(task, strip, task.row_begin + full, task.row_end);
    }
    _tile_release();
}

// For benches: the tile product alone, in enough sums at a time to hide its latency.
inline int64_t tile_multiply_adds(int64_t iterations) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.set(tile, kTileRows, 64);
    load(config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < iterations; ++i) {
        _tile_dpbssd(0, 6, 7);
        _tile_dpbssd(1, 6, 7);
        _tile_dpbssd(2, 6, 7);
        _tile_dpbssd(3, 6, 7);
    }
    _tile_release();
    return iterations * 4 * kTileRows * kHalf * 64;
}

}  // namespace qerve
