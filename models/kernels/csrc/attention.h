// Causal attention of a tile of query rows over the paged cache, with the softmax taken online in float32.
//
// Keys come in tiles of 64 tokens that begin at multiples of 64 from position 0, and every row goes through the same
// operations on them whichever rows share its call: row by row the result is that of the row alone, bit for bit. So a
// token decoded alone, prefilled in one go or in chunks gives the same logits. Keys that a row does not see count as
// -infinity; they add exact zeros, which leave sums as they are. What no row sees is neither read nor multiplied.
//
// Rows are the tokens of the tile times the query heads that share the kv head. They are handled kTileRows at a time, in
// registers: with AVX-512 the scores of 6 rows x 64 keys, then the outputs of 6 rows x 64 channels. Where there are more
// rows than that, keys and values are converted to float32 once per tile, else as they are multiplied.
//
// Scores are in bits, not in nats: the scale of the queries takes in log2(e), and the softmax is one of powers of two.
#pragma once

#include <cfloat>
#include <cstdint>
#include <limits>

#include "functions.h"
#include "kernels.h"

#if defined(__clang__)
#define QERVE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define QERVE_UNROLL _Pragma("GCC unroll 8")
#endif
// Register tiles are functions of their own: inlined, their pointers push each other out of the registers.
#define QERVE_NOINLINE __attribute__((noinline))

namespace qerve {

template <class Simd>
struct Attention {
    using F = typename Simd::F;

    static constexpr int kTokens = 32;  // of a query tile
    static constexpr int kRows = Simd::kTileRows;
    static constexpr int kKeys = 64;    // per key tile
    static constexpr int kVectors = kKeys / kLanes;

    static int64_t scratch_bytes(const qerve_attention_op& op) {
        return num_floats(op) * static_cast<int64_t>(sizeof(float));
    }

    static void attend(const AttentionTask& task) {
        const qerve_attention_op& op = *task.op;
        const Tile tile = make_tile(task);
        load_queries(task, tile);
        const int32_t first = first_seen(op, task.position);
        const int32_t last = task.position + (task.row_end - task.row_begin) - 1;
        if (op.cache_type == QERVE_CACHE_I8) attend_to<int8_t>(task, tile, first, last);
        else attend_to<uint16_t>(task, tile, first, last);
        store_outputs(task, tile);
    }

private:
    // The rows of a task, and where their intermediates lie.
    struct Tile {
        const AttentionTask* task;
        int32_t head_dim;
        int32_t group;     // query heads per kv head
        int32_t num_rows;  // row i is query head i % group of token i / group
        float* queries;    // (num_rows, head_dim), scaled
        float* outputs;    // (num_rows, head_dim), to be divided by the sums
        float* sums;       // (num_rows, 16): parts of the softmax denominators
        float* maxima;     // (num_rows up to a multiple of 16)
        float* scores;     // (kRows, 64)
        float* keys;       // (head_dim, 64)
        float* values;     // (64, head_dim)
    };

    static int64_t max_rows(const qerve_attention_op& op) {
        const int64_t rows = static_cast<int64_t>(kTokens) * (op.num_heads / op.num_kv_heads);
        return (rows + kLanes - 1) / kLanes * kLanes;
    }

    static int64_t num_floats(const qerve_attention_op& op) {
        return max_rows(op) * (2 * op.head_dim + kLanes + 2) + kRows * kKeys + 2 * kKeys * op.head_dim;
    }

    static Tile make_tile(const AttentionTask& task) {
        const qerve_attention_op& op = *task.op;
        const int64_t rows = max_rows(op);
        Tile tile;
        tile.task = &task;
        tile.head_dim = op.head_dim;
        tile.group = op.num_heads / op.num_kv_heads;
        tile.num_rows = (task.row_end - task.row_begin) * tile.group;
        tile.queries = reinterpret_cast<float*>(task.scratch);
        tile.outputs = tile.queries + rows * op.head_dim;
        tile.sums = tile.outputs + rows * op.head_dim;
        tile.maxima = tile.sums + rows * kLanes;
        tile.scores = tile.maxima + 2 * rows;  // sixteen maxima are loaded from any row on
        tile.keys = tile.scores + kRows * kKeys;
        tile.values = tile.keys + kKeys * op.head_dim;
        return tile;
    }

    static int32_t first_seen(const qerve_attention_op& op, int32_t position) {
        return op.window > 0 && position >= op.window ? position - op.window + 1 : 0;
    }

    static float* head_of(const AttentionTask& task, const Tile& tile, int32_t i, float* rows, int64_t ld) {
        const int32_t head = task.kv_head * tile.group + i % tile.group;
        return rows + (task.row_begin + i / tile.group) * ld + static_cast<int64_t>(head) * tile.head_dim;
    }

    static void load_queries(const AttentionTask& task, const Tile& tile) {
        const F scale = Simd::set1(task.op->softmax_scale * 1.44269504f);
        for (int32_t i = 0; i < tile.num_rows; ++i) {
            const float* query = head_of(task, tile, i, task.op->qkv, task.op->ld);
            for (int32_t d = 0; d < tile.head_dim; d += kLanes) {
                Simd::store(tile.queries + i * tile.head_dim + d, Simd::mul(Simd::load(query + d), scale));
                Simd::store(tile.outputs + i * tile.head_dim + d, Simd::zero());
            }
            Simd::store(tile.sums + i * kLanes, Simd::zero());
        }
        // Finite, so that a row that sees nothing of a tile keeps what it has: exp2(max - max) is 1.
        for (int32_t i = 0; i < tile.num_rows + kLanes; i += kLanes) Simd::store(tile.maxima + i, Simd::set1(-FLT_MAX));
    }

    static void store_outputs(const AttentionTask& task, const Tile& tile) {
        for (int32_t i = 0; i < tile.num_rows; ++i) {
            const F inverse = Simd::set1(1.0f / Simd::reduce_add(Simd::load(tile.sums + i * kLanes)));
            float* out = head_of(task, tile, i, task.op->out, task.op->ldo);
            for (int32_t d = 0; d < tile.head_dim; d += kLanes) {
                // Plus zero: whether -0 met the zeros of unseen keys must not show.
                Simd::store(out + d, Simd::fma(Simd::load(tile.outputs + i * tile.head_dim + d), inverse, Simd::zero()));
            }
        }
    }

    // -- where the register tiles read keys and values

    static F widen(const float* p) { return Simd::load(p); }
    static F widen(const uint16_t* p) { return Simd::load_f16(p); }
    static F widen(const int8_t* p) { return Simd::to_float(Simd::load_i8(p)); }

    // Of four blocks of 8-bit keys and values.
    struct Scales {
        bool are_used;
        const float* keys[kVectors];
        const float* values[kVectors];
    };

    // Four cache blocks, those in vector_begin..vector_end of the tile.
    template <class T>
    struct Cached {
        const T* keys[kVectors];
        const T* values[kVectors];
        Scales scales;
        int32_t vector_begin, vector_end;

        F key(int v, int d) const { return widen(keys[v] + d * kLanes); }
        const T* value_rows(int v) const { return values[v]; }
    };

    // The same four blocks in float32, side by side.
    struct Staged {
        const float* keys;
        const float* values;
        int32_t head_dim;

        F key(int v, int d) const { return widen(keys + (d * kVectors + v) * kLanes); }
        const float* value_rows(int v) const { return values + v * kLanes * head_dim; }
    };

    template <class T>
    static Cached<T> cached(const AttentionTask& task, int32_t start, int32_t first, int32_t last) {
        const qerve_attention_op& op = *task.op;
        Cached<T> source = {};
        source.scales.are_used = op.cache_type == QERVE_CACHE_I8;
        source.vector_begin = first > start ? (first - start) / kLanes : 0;
        source.vector_end = last - start >= kKeys ? kVectors : (last - start) / kLanes + 1;
        for (int32_t v = source.vector_begin; v < source.vector_end; ++v) {
            const int64_t block = task.blocks[start / kCacheBlock + v];
            const int64_t head_block = (block * op.num_kv_heads + task.kv_head) * kCacheBlock;
            source.keys[v] = static_cast<const T*>(op.keys) + head_block * op.head_dim;
            source.values[v] = static_cast<const T*>(op.values) + head_block * op.head_dim;
            if (!source.scales.are_used) continue;
            source.scales.keys[v] = op.key_scales + head_block;
            source.scales.values[v] = op.value_scales + head_block;
        }
        return source;
    }

    template <class T>
    static Staged stage(const Tile& tile, const Cached<T>& source) {
        for (int32_t d = 0; d < tile.head_dim; ++d) {
            for (int32_t v = source.vector_begin; v < source.vector_end; ++v) {
                Simd::store(tile.keys + (d * kVectors + v) * kLanes, source.key(v, d));
            }
        }
        for (int32_t v = source.vector_begin; v < source.vector_end; ++v) {
            float* values = tile.values + v * kLanes * tile.head_dim;
            for (int32_t i = 0; i < kLanes * tile.head_dim; i += kLanes) {
                Simd::store(values + i, widen(source.values[v] + i));
            }
        }
        return {tile.keys, tile.values, tile.head_dim};
    }

    // -- one key tile

    template <class T>
    static void attend_to(const AttentionTask& task, const Tile& tile, int32_t first, int32_t last) {
        Cached<T> source = cached<T>(task, first / kKeys * kKeys, first, last);
        for (int32_t start = first / kKeys * kKeys; start <= last; start += kKeys) {
            Cached<T> following = {};
            if (start + kKeys <= last) {
                following = cached<T>(task, start + kKeys, first, last);
                if (tile.num_rows <= kRows) fetch(following, tile.head_dim);
            }
            attend_keys(tile, source, start);
            source = following;
        }
    }

    // Blocks of the cache are short and lie anywhere: the processor's own prefetcher has no time to notice them. Where
    // many rows share a tile, there is time enough.
    template <class T>
    static void fetch(const Cached<T>& source, int32_t head_dim) {
        const int64_t bytes = int64_t{kLanes} * head_dim * static_cast<int64_t>(sizeof(T));
        for (int32_t v = source.vector_begin; v < source.vector_end; ++v) {
            for (int64_t at = 0; at < bytes; at += 64) {
                __builtin_prefetch(reinterpret_cast<const uint8_t*>(source.keys[v]) + at);
                __builtin_prefetch(reinterpret_cast<const uint8_t*>(source.values[v]) + at);
            }
        }
    }

    template <class T>
    static void attend_keys(const Tile& tile, const Cached<T>& source, int32_t start) {
        if (tile.num_rows <= kRows) {
            attend_up_to<kRows>(tile, source, source.scales, start, 0);
            return;
        }
        const Staged staged = stage(tile, source);
        for (int32_t row = 0; row < tile.num_rows; row += kRows) attend_up_to<kRows>(tile, staged, source.scales, start, row);
    }

    template <int most, class Source>
    static void attend_up_to(const Tile& tile, const Source& source, const Scales& scales, int32_t start, int32_t row) {
        if (tile.num_rows - row >= most) return attend_rows<most>(tile, source, scales, start, row);
        if constexpr (most > 1) attend_up_to<most - 1>(tile, source, scales, start, row);
    }

    // Keys of the tile that some of the rows see: vectors begin..end, of the last of them `end_key` counts in all.
    struct Seen {
        int32_t vector_begin, vector_end, end_key;
    };

    template <int rows, class Source>
    static void attend_rows(const Tile& tile, const Source& source, const Scales& scales, int32_t start, int32_t row) {
        const int32_t low = first_seen(*tile.task->op, tile.task->position + row / tile.group) - start;
        const int32_t end = tile.task->position + (row + rows - 1) / tile.group + 1 - start;
        if (low >= kKeys || end <= 0) return;
        const int32_t end_key = end < kKeys ? end : kKeys;
        const Seen seen = {low > 0 ? low / kLanes : 0, (end_key + kLanes - 1) / kLanes, end_key};
        int32_t v = seen.vector_begin;
        // As many keys, then channels at once as registers allow; how many does not show in the results.
        constexpr int most = Simd::kAccumulators / rows >= 4 ? 4 : Simd::kAccumulators / rows >= 2 ? 2 : 1;
        for (; v + most <= seen.vector_end; v += most) score<rows, most>(tile, source, row, v);
        if constexpr (most > 2) {
            for (; v + 2 <= seen.vector_end; v += 2) score<rows, 2>(tile, source, row, v);
        }
        for (; v < seen.vector_end; ++v) score<rows, 1>(tile, source, row, v);

        if (scales.are_used) scale_scores(tile, rows, scales.keys, seen);
        const int32_t end_of_first = tile.task->position + row / tile.group + 1 - start;
        const int32_t low_of_last = first_seen(*tile.task->op, tile.task->position + (row + rows - 1) / tile.group) - start;
        if (end_of_first < kKeys || low_of_last > 0) mask(tile, rows, seen, start, row);
        float rescale[kLanes];
        softmax<rows>(tile, row, rescale);
        if (scales.are_used) scale_weights(tile, rows, scales.values, seen);

        int32_t d = 0;
        for (; d + most * kLanes <= tile.head_dim; d += most * kLanes) {
            accumulate<rows, most>(tile, source, seen, rescale, row, d);
        }
        for (; d < tile.head_dim; d += kLanes) accumulate<rows, 1>(tile, source, seen, rescale, row, d);
    }

    // scores[r][v..v + vectors] = queries . keys
    template <int rows, int vectors, class Source>
    QERVE_NOINLINE static void score(const Tile& tile, const Source& source, int32_t row, int32_t v) {
        const int32_t head_dim = tile.head_dim;
        const float* const queries = tile.queries + row * head_dim;
        F sums[rows][vectors];
        QERVE_UNROLL
        for (int r = 0; r < rows; ++r) {
            QERVE_UNROLL
            for (int i = 0; i < vectors; ++i) sums[r][i] = Simd::zero();
        }
        for (int32_t d = 0; d < head_dim; ++d) {
            F keys[vectors];
            QERVE_UNROLL
            for (int i = 0; i < vectors; ++i) keys[i] = source.key(v + i, d);
            QERVE_UNROLL
            for (int r = 0; r < rows; ++r) {
                const F query = Simd::set1(queries[r * head_dim + d]);
                QERVE_UNROLL
                for (int i = 0; i < vectors; ++i) sums[r][i] = Simd::fma(query, keys[i], sums[r][i]);
            }
        }
        QERVE_UNROLL
        for (int r = 0; r < rows; ++r) {
            QERVE_UNROLL
            for (int i = 0; i < vectors; ++i) Simd::store(tile.scores + r * kKeys + (v + i) * kLanes, sums[r][i]);
        }
    }

    // Scores of keys that a row does not see become -infinity. Slots not yet written may hold anything, even NaN.
    static void mask(const Tile& tile, int rows, const Seen& seen, int32_t start, int32_t row) {
        const F unseen = Simd::set1(-std::numeric_limits<float>::infinity());
        for (int r = 0; r < rows; ++r) {
            const int32_t position = tile.task->position + (row + r) / tile.group;
            const int32_t low = first_seen(*tile.task->op, position) - start, end = position + 1 - start;
            for (int v = 0; v < kVectors; ++v) {
                float* const scores = tile.scores + r * kKeys + v * kLanes;
                F score = unseen;
                if (v >= seen.vector_begin && v < seen.vector_end) {
                    score = Simd::blend(end - v * kLanes, Simd::load(scores), unseen);
                    score = Simd::blend(low - v * kLanes, unseen, score);
                }
                Simd::store(scores, score);
            }
        }
    }

    // Scores become weights of the values; `rescale` is what the rows' outputs so far are to be multiplied by.
    template <int rows>
    QERVE_NOINLINE static void softmax(const Tile& tile, int32_t row, float* rescale) {
        const F old_maxima = Simd::load(tile.maxima + row);
        float maxima[kLanes];
        Simd::store(maxima, old_maxima);
        QERVE_UNROLL
        for (int r = 0; r < rows; ++r) {
            const float* const scores = tile.scores + r * kKeys;
            const F low = Simd::max(Simd::load(scores), Simd::load(scores + kLanes));
            const F high = Simd::max(Simd::load(scores + 2 * kLanes), Simd::load(scores + 3 * kLanes));
            const float in_tile = Simd::reduce_max(Simd::max(low, high));
            maxima[r] = in_tile > maxima[r] ? in_tile : maxima[r];
        }
        Simd::store(rescale, Functions<Simd>::exp2_negative(Simd::sub(old_maxima, Simd::load(maxima))));
        for (int r = 0; r < rows; ++r) {
            float* const scores = tile.scores + r * kKeys;
            tile.maxima[row + r] = maxima[r];
            const F largest = Simd::set1(maxima[r]);
            F weights[kVectors];
            QERVE_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                weights[v] = Functions<Simd>::exp2_negative(Simd::sub(Simd::load(scores + v * kLanes), largest));
                Simd::store(scores + v * kLanes, weights[v]);
            }
            const F in_tile = Simd::add(Simd::add(weights[0], weights[1]), Simd::add(weights[2], weights[3]));
            float* const sums = tile.sums + (row + r) * kLanes;
            Simd::store(sums, Simd::fma(Simd::load(sums), Simd::set1(rescale[r]), in_tile));
        }
    }

    // Scores times the scales of 8-bit keys.
    static void scale_scores(const Tile& tile, int rows, const float* const* scales, const Seen& seen) {
        for (int32_t v = seen.vector_begin; v < seen.vector_end; ++v) {
            const F scale = Simd::load(scales[v]);
            for (int r = 0; r < rows; ++r) {
                float* const scores = tile.scores + r * kKeys + v * kLanes;
                Simd::store(scores, Simd::mul(Simd::load(scores), scale));
            }
        }
    }

    // Weights times the scales of 8-bit values, of the keys up to the last that any of the rows sees.
    static void scale_weights(const Tile& tile, int rows, const float* const* scales, const Seen& seen) {
        for (int32_t v = seen.vector_begin; v < seen.vector_end; ++v) {
            const F scale = Simd::blend(seen.end_key - v * kLanes, Simd::load(scales[v]), Simd::zero());
            for (int r = 0; r < rows; ++r) {
                float* const weights = tile.scores + r * kKeys + v * kLanes;
                Simd::store(weights, Simd::mul(Simd::load(weights), scale));
            }
        }
    }

    // outputs[r][d..d + 16 * vectors] = outputs * rescale + weights . values
    template <int rows, int vectors, class Source>
    QERVE_NOINLINE static void accumulate(const Tile& tile, const Source& source, const Seen& seen, const float* rescale, int32_t row,
                           int32_t d) {
        const int32_t head_dim = tile.head_dim;
        float* const outputs = tile.outputs + row * head_dim + d;
        F sums[rows][vectors];
        QERVE_UNROLL
        for (int r = 0; r < rows; ++r) {
            const F factor = Simd::set1(rescale[r]);
            QERVE_UNROLL
            for (int i = 0; i < vectors; ++i) sums[r][i] = Simd::mul(Simd::load(outputs + r * head_dim + i * kLanes), factor);
        }
        for (int32_t v = seen.vector_begin; v < seen.vector_end; ++v) {
            const auto* const values = source.value_rows(v) + d;
            const float* const weights = tile.scores + v * kLanes;
            const int32_t end = seen.end_key - v * kLanes < kLanes ? seen.end_key - v * kLanes : kLanes;
            for (int32_t k = 0; k < end; ++k) {
                F row_values[vectors];
                QERVE_UNROLL
                for (int i = 0; i < vectors; ++i) row_values[i] = widen(values + k * head_dim + i * kLanes);
                QERVE_UNROLL
                for (int r = 0; r < rows; ++r) {
                    const F weight = Simd::set1(weights[r * kKeys + k]);
                    QERVE_UNROLL
                    for (int i = 0; i < vectors; ++i) sums[r][i] = Simd::fma(weight, row_values[i], sums[r][i]);
                }
            }
        }
        QERVE_UNROLL
        for (int r = 0; r < rows; ++r) {
            QERVE_UNROLL
            for (int i = 0; i < vectors; ++i) Simd::store(outputs + r * head_dim + i * kLanes, sums[r][i]);
        }
    }
};

}  // namespace qerve
