// Rotary embedding, append to the cache, attention: shared by query tiles and key-value heads.
#include "step.h"

namespace qerve {

void Step::attention(int index, int thread) {
    const auto& op = *static_cast<const qerve_attention_op*>(ops_[index].args);
    const auto slot_of = [&](int sequence, int position) {
        const int32_t* table = step_.block_tables + int64_t{sequence} * step_.table_stride;
        return int64_t{table[position / kCacheBlock]} * kCacheBlock + position % kCacheBlock;
    };
    const auto append = [&](const Tile& tile, int kv_head) {
        for (int row = tile.row_begin; row < tile.row_end; ++row) {
            const int position = step_.positions[row];
            kernels_.append(op, row, position, slot_of(tile.sequence, position), kv_head);
        }
    };
    const int num_units = static_cast<int>(tiles_.size()) * op.num_kv_heads;
    const auto each = [&](auto&& body) {
        return [&, body](int begin, int end) {
            for (int unit = begin; unit < end; ++unit) {
                body(tiles_[static_cast<size_t>(unit / op.num_kv_heads)], unit % op.num_kv_heads);
            }
        };
    };
    if (op.has_quantized_qkv) {
        share(step_.num_tokens, [&](int begin, int end) {
            for (int row = begin; row < end; ++row) kernels_.quantize_qkv(op, row, step_.positions[row]);
        });
        meet();
    }
    // A decoded token waits for no other row of its step.
    if (!has_only_decodes_) {
        share(num_units, each(append));
        meet();
    }
    uint8_t* scratch = context_.scratch[static_cast<size_t>(thread)].reserve(0);
    share(
        num_units, each([&](const Tile& tile, int kv_head) {
            if (has_only_decodes_) append(tile, kv_head);
            AttentionTask task{};
            task.op = &op;
            task.blocks = step_.block_tables + int64_t{tile.sequence} * step_.table_stride;
            task.row_begin = tile.row_begin;
            task.row_end = tile.row_end;
            task.position = step_.positions[tile.row_begin];
            task.kv_head = kv_head;
            task.scratch = scratch;
            kernels_.attend(task);
        }),
        has_only_decodes_ ? 1 << 30 : 1);
}

}  // namespace qerve
