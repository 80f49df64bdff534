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
constexpr int kFewestRows = 32;  // fewer are faster without tiles: unpacking a strip takes as long as 8 rows

// Tiles: sums, rows of 64 channels, weights of 64 channels, each for full and for remaining rows, and of 32 channels.
// Tiles: sums of the two halves of a strip, rows, weights, all of them twice: what loads one does not wait for the other.
// Numbers are literal because the compiler pastes them into instructions as they are written.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Sums in tiles 0 to 3, rows in 4 and 5, weights in 6 and 7.
inline void configure_tiles() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = kTileRows;
        config.row_bytes[tile] = 64;
    }
    // The intrinsic tells the compiler of its first eight bytes only: the others would be left out as never read.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// Signed codes of one run of one strip: per block and half a tile of 16 lines of 64 bytes (four channels of sixteen
// outputs). Blocks of 32 channels fill half a tile; zeros in the other half meet whatever follows in the rows.
// 8-bit codes with zero points stay as they are less 128; what is missing then comes from the rows' sums.
struct Unpacked {
    const int8_t* weights;  // (blocks, 2 halves, 1024)
    const float* scales;    // (blocks, 2 halves, 16)
    const int32_t* shifts;  // (blocks, 2 halves, 16): left to subtract per unit of a row's sum; nullptr: nothing
};

constexpr int kTileBytes = 1024;
inline int64_t run_bytes(int num_blocks) { return int64_t{2} * num_blocks * (kTileBytes + kHalf * 8); }

template <int kBits>
inline Unpacked unpack(const BlockRun& run, uint8_t* out) {
    constexpr int kFields = 8 / kBits;
    auto* weights = reinterpret_cast<int8_t*>(out);
    auto* scales = reinterpret_cast<float*>(out + int64_t{2} * run.num_blocks * kTileBytes);
    int32_t* shifts = nullptr;
    // u8 - zero point needs nine bits
    const bool has_shifts = run.has_zero_points && kBits == 8;
    if (has_shifts) shifts = reinterpret_cast<int32_t*>(scales + 2 * run.num_blocks * kHalf);
    const uint8_t* data = run.data;
    __m512 scale[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
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
            const int64_t at = (int64_t{2} * b + h) * kHalf;
            _mm512_storeu_ps(scales + at, scale[h]);
            if (has_shifts) _mm512_storeu_si512(shifts + at, _mm512_sub_epi32(zero[h], _mm512_set1_epi32(128)));
        }
        for (int c = 0; c < run.block; c += 4 * kFields) {
            for (int h = 0; h < 2; ++h, data += 64) {
                const __m512i line = _mm512_loadu_si512(data);
                int8_t* to = weights + (int64_t{2} * b + h) * kTileBytes + c * kHalf;
                for (int f = 0; f < kFields; ++f) {
                    const __m512i codes = kBits == 8 ? line : _mm512_and_si512(_mm512_srli_epi16(line, kBits * f), _mm512_set1_epi8((1 << kBits) - 1));
                    _mm512_storeu_si512(to + 64 * f, _mm512_sub_epi8(codes, zero_bytes[h]));
                }
            }
        }
        for (int h = 0; h < 2; ++h) {
            for (int c = run.block; c < 64; c += 4) {
                _mm512_storeu_si512(weights + (int64_t{2} * b + h) * kTileBytes + c * kHalf, _mm512_setzero_si512());
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

// Integer sums of a group of rows with up to kBlocksTogether blocks: (blocks, 2 halves, 16 rows, 16 outputs).
// All tiles of these blocks come before the first float operation on their sums: each tile product takes 52 cycles.
constexpr int kBlocksTogether = 8;
constexpr int64_t kSumsInts = int64_t{kBlocksTogether} * 2 * kTileRows * kHalf;

// Both halves of a block, in the tiles of these numbers: sums of either, rows, weights.
#define QERVE_BLOCK_IN_TILES(FIRST, SECOND, ROWS, WEIGHTS)     \
    do {                                                       \
        _tile_loadd(ROWS, rows, stride);                       \
        _tile_loadd(WEIGHTS, tile, 64);                        \
        _tile_zero(FIRST);                                     \
        _tile_dpbssd(FIRST, ROWS, WEIGHTS);                    \
        _tile_loadd(WEIGHTS, tile + kTileBytes, 64);           \
        _tile_zero(SECOND);                                    \
        _tile_dpbssd(SECOND, ROWS, WEIGHTS);                   \
        _tile_stored(FIRST, to, 64);                           \
        _tile_stored(SECOND, to + kTileRows * kHalf, 64);      \
    } while (false)

inline void tile_sums(const BlockRun& run, const int8_t* x, const int8_t* weights, int first, int count, int32_t* sums) {
    const int64_t stride = run.input.stride;
    for (int i = 0; i < count; ++i) {
        const int8_t* rows = x + int64_t{first + i} * run.block;
        const int8_t* tile = weights + int64_t{2} * (first + i) * kTileBytes;
        int32_t* to = sums + int64_t{i} * 2 * kTileRows * kHalf;
        if (i & 1) {
            QERVE_BLOCK_IN_TILES(2, 3, 5, 7);
        } else {
            QERVE_BLOCK_IN_TILES(0, 1, 4, 6);
        }
    }
}
#undef QERVE_BLOCK_IN_TILES

template <bool kIsWide>
inline void scale_sums(const BlockRun& run, const Unpacked& unpacked, int half, int first, int count, int64_t row,
                       const int32_t* sums, float* totals) {
    const Codes& x = run.input;
    __m512 total[kTileRows];
#pragma GCC unroll 16
    for (int t = 0; t < kTileRows; ++t) total[t] = _mm512_load_ps(totals + t * kHalf);
    for (int i = 0; i < count; ++i) {
        const InputBlock at = input_block(run, first + i);
        const int64_t header = (int64_t{2} * (first + i) + half) * kHalf;
        const int32_t* high = sums + (int64_t{2} * i + half) * kTileRows * kHalf;
        const float* input_scales = x.scale + x.at(row, at.index);
        const __m512 scale = _mm512_loadu_ps(unpacked.scales + header);
#pragma GCC unroll 16
        for (int t = 0; t < kTileRows; ++t) {
            __m512i sum = _mm512_load_si512(high + t * kHalf);
            if constexpr (kIsWide) {
                sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(high + kSumsInts + t * kHalf));
            }
            if (unpacked.shifts != nullptr) {
                const __m512i codes = _mm512_set1_epi32(block_sum(run, row + t, at));
                sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_loadu_si512(unpacked.shifts + header), codes));
            }
            const __m512 input_scale = _mm512_set1_ps(input_scales[t]);
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, input_scale), total[t]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTileRows; ++t) _mm512_store_ps(totals + t * kHalf, total[t]);
}

// Memory of one thread: sums of both bytes of the rows' codes, totals of both halves, unpacked weights.
struct TileScratch {
    explicit TileScratch(uint8_t* memory)
        : sums(reinterpret_cast<int32_t*>(memory)), totals(reinterpret_cast<float*>(sums + 2 * kSumsInts)),
          weights(reinterpret_cast<uint8_t*>(totals + 2 * kTileRows * kHalf)) {}
    int32_t* sums;
    float* totals;
    uint8_t* weights;
};

inline int64_t tile_scratch_bytes(const qerve_matrix& m) {
    const int num_blocks = m.in_features / m.block + rank_blocks_of(m.rank);
    return 2 * kSumsInts * 4 + 2 * kTileRows * kHalf * 4 + run_bytes(num_blocks);
}

inline void add_run_in_tiles(const BlockRun& run, const Unpacked& unpacked, int64_t row, const TileScratch& scratch) {
    const Codes& x = run.input;
    for (int first = 0; first < run.num_blocks; first += kBlocksTogether) {
        const int count = run.num_blocks - first < kBlocksTogether ? run.num_blocks - first : kBlocksTogether;
        tile_sums(run, x.hi + row * x.stride, unpacked.weights, first, count, scratch.sums);
        const bool is_wide = x.lo != nullptr;
        if (is_wide) tile_sums(run, x.lo + row * x.stride, unpacked.weights, first, count, scratch.sums + kSumsInts);
        for (int h = 0; h < 2; ++h) {
            float* totals = scratch.totals + h * kTileRows * kHalf;
            if (is_wide) scale_sums<true>(run, unpacked, h, first, count, row, scratch.sums, totals);
            else scale_sums<false>(run, unpacked, h, first, count, row, scratch.sums, totals);
        }
    }
}

struct StripInTiles {
    const LinearTask& task;
    int strip;
    TileScratch scratch;
    BlockRun main, rank;
    Unpacked main_weights, rank_weights;

    StripInTiles(const LinearTask& of, int number)
        : task(of), strip(number), scratch(of.scratch), main(main_run(of, number)), rank(rank_run(of, number)) {
        main_weights = unpack_run(main, task.matrix->storage_bits, scratch.weights);
        if (rank.num_blocks == 0) return;
        rank_weights = unpack_run(rank, 8, scratch.weights + run_bytes(main.num_blocks));
        wait_for(task.progress);
    }

    template <class S>
    void rows(int64_t row) const {
        for (int i = 0; i < 2 * kTileRows; ++i) _mm512_store_ps(scratch.totals + i * kHalf, _mm512_setzero_ps());
        add_run_in_tiles(main, main_weights, row, scratch);
        if (rank.num_blocks > 0) add_run_in_tiles(rank, rank_weights, row, scratch);
        for (int h = 0; h < 2; ++h) {
            for (int t = 0; t < kTileRows; ++t) {
                finish<S>(task, strip, h, row + t, _mm512_load_ps(scratch.totals + (h * kTileRows + t) * kHalf));
            }
        }
    }
};

template <class S>
void linear_in_tiles(const LinearTask& task) {
    const int num_rows = task.row_end - task.row_begin;
    if (num_rows < kFewestRows) return linear<S>(task);
    const int rest = task.row_end - num_rows % kTileRows;
    configure_tiles();
    for (int strip = task.strip_begin; strip < task.strip_end; ++strip) {
        const StripInTiles tiles(task, strip);
        for (int row = task.row_begin; row < rest; row += kTileRows) tiles.template rows<S>(row);
        multiply_strip<S>(task, strip, rest, task.row_end);
    }
    _tile_release();
}

// For benches: the tile product alone, in enough sums at a time to hide its latency.
inline int64_t tile_multiply_adds(int64_t iterations) {
    configure_tiles();
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
