/* The C interface of the CPU kernels: plain structures and pointers, so that ctypes can drive it.
 *
 * A network is a list of fused operators (qerve_op), made once by Python. One call of qerve_run takes a batch of tokens
 * through all of them: the worker threads enter once per step and meet at barriers between operators.
 * Hidden states are float32 rows. Every linear operator quantizes its input rows to integers by itself.
 * Nothing here allocates what it returns: weights, caches and buffers belong to the caller and outlive the calls.
 */
#ifndef QERVE_CPU_H
#define QERVE_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define QERVE_EXPORT __declspec(dllexport)
#else
#define QERVE_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define QERVE_ABI_VERSION 2
#define QERVE_STRIP_ROWS 32
#define QERVE_CACHE_BLOCK 16

/* How rows become integers. */
enum qerve_activation_kind {
    QERVE_ACTIVATION_8 = 0,  /* 8 bits, symmetric, one scale per block of the matrix that reads them */
    QERVE_ACTIVATION_16 = 1, /* 16 bits, likewise: two 8-bit products per weight */
    QERVE_ACTIVATION_INT = 2,   /* the artifact's own integer grid */
    QERVE_ACTIVATION_MXINT = 3, /* the artifact's own grid, with a power of two for a scale */
};

typedef struct qerve_activation {
    int32_t kind;
    int32_t num_bits;     /* of INT and MXINT */
    int32_t group_size;   /* channels per scale, 0: the whole row; of INT and MXINT */
    int32_t is_symmetric; /* of INT */
    int32_t is_ceil;      /* of MXINT: the exponent is rounded up, not down */
    float clip_ratio;     /* of INT */
} qerve_activation;

/* From a float32 row to the integers that a matrix multiplies: norm, divide, gather, rotate, quantize. */
typedef struct qerve_input {
    const float* norm_weight;     /* (in_features,) RMSNorm gain, NULL: no norm */
    const float* divisor;         /* (in_features,), NULL: no division */
    const int32_t* channel_order; /* (in_features,), NULL: as they come */
    int32_t in_features;
    int32_t rotation_block; /* width of the normalized Hadamard blocks, 0: not rotated */
    int32_t block;          /* 32 or 64: channels per integer sum, as in the matrices */
    float norm_eps;
    qerve_activation activation;
} qerve_input;

/* One packed weight. Strips of 32 output rows lie one after the other; the last one is filled up with zero weights.
 * A strip is a sequence of blocks of `block` input channels, and behind them its share of the low-rank term:
 *   header, before every `blocks_per_group`-th block: 32 float16 scales, then 32 int16 zero points if has_zero_points
 *   codes: lines of 64 bytes, alternating between rows 0..15 and 16..31 of the strip; byte 4 * row + j of a line holds
 *     8 bits: channel 4k + j;  4 bits: 8k + j, and 8k + 4 + j in the high half;  2 bits: 16k + 4i + j at bit 2i
 *   low-rank blocks: for 32 components each, a header of 32 float16 scales and 8-bit codes as above (zero is 128)
 */
typedef struct qerve_matrix {
    const uint8_t* strips;
    const struct qerve_matrix* down; /* (rank up to a multiple of 32, in_features) 8 bits; NULL: see rank */
    const float* bias;               /* (out_features,), NULL: none */
    int64_t strip_bytes;
    int32_t out_features;
    int32_t in_features;
    int32_t storage_bits; /* 2, 4 or 8 */
    int32_t block;        /* 32 or 64 */
    int32_t blocks_per_group;
    int32_t has_zero_points;
    int32_t zero;     /* the code of zero where there are no zero points */
    int32_t rank;     /* 0: no low-rank term; without `down` it reads the input's first `rank` channels */
    float multiplier; /* on all scales of the codes: 1 unless they need more range than float16 has */
    float up_multiplier; /* likewise, of the low-rank blocks */
} qerve_matrix;

/* Where a weight comes from, to be packed. */
typedef struct qerve_source {
    const uint8_t* codes; /* (out_features, in_features * code_bits / 8): lowest channel in the lowest bits */
    const float* scales;  /* (out_features, in_features / group_size) */
    const uint8_t* zero_points; /* (out_features, in_features / group_size), NULL: symmetric */
    int32_t out_features;
    int32_t in_features;
    int32_t code_bits;  /* 8 for codes that lie in bytes, whatever their range */
    int32_t group_size; /* channels per scale */
    const uint8_t* up_codes; /* (out_features, rank up to a multiple of 32) bytes, zero is 128; NULL: none */
    const float* up_scales;  /* (out_features, rank up to a multiple of 32 / 32) */
} qerve_source;

enum qerve_output_mode {
    QERVE_OUTPUT_STORE = 0,
    QERVE_OUTPUT_ADD = 1,    /* onto what is there: the residual */
    QERVE_OUTPUT_SWIGLU = 2, /* parts are gate and up of equal shape: silu(gate) * up is stored */
};

typedef struct qerve_linear_op {
    qerve_input input;
    const float* x; /* (num_tokens, ldx) */
    float* y;       /* (num_tokens, ldy), apart from x */
    const qerve_matrix* const* parts;
    const int32_t* columns; /* first output column of each part */
    int64_t ldx;
    int64_t ldy;
    int32_t num_parts;
    int32_t mode;
} qerve_linear_op;

enum qerve_cache_type { QERVE_CACHE_F16 = 0, QERVE_CACHE_I8 = 1 };

/* RoPE, append to the cache, attention. Cache, by block of 16 tokens and kv head:
 *   keys   [num_blocks][num_kv_heads][head_dim][16],  values [num_blocks][num_kv_heads][16][head_dim]
 *   scales of 8-bit caches: [num_blocks][num_kv_heads][16] float32, one per token and head
 */
typedef struct qerve_attention_op {
    float* qkv; /* (num_tokens, ld): queries, keys, values; rotated in place */
    float* out; /* (num_tokens, ldo) */
    const float* cosines; /* (max_positions, head_dim / 2) */
    const float* sines;
    void* keys;
    void* values;
    float* key_scales;
    float* value_scales;
    int64_t ld;
    int64_t ldo;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t window; /* tokens that a query sees, itself included; 0: all */
    int32_t cache_type;
    float softmax_scale;
    int32_t has_quantized_qkv; /* queries, keys, values go through `activation` before the products */
    qerve_activation activation;
} qerve_attention_op;

enum qerve_embedding_type { QERVE_EMBED_F32 = 0, QERVE_EMBED_BF16 = 1, QERVE_EMBED_F16 = 2, QERVE_EMBED_I8 = 3 };

typedef struct qerve_embed_op {
    const void* table;    /* (vocab_size, hidden_size) */
    const float* scales;  /* (vocab_size, hidden_size / group_size), of I8 */
    float* hidden;        /* (num_tokens, hidden_size) */
    int32_t hidden_size;
    int32_t vocab_size;
    int32_t type;
    int32_t group_size;
} qerve_embed_op;

enum qerve_op_kind { QERVE_OP_EMBED = 0, QERVE_OP_LINEAR = 1, QERVE_OP_ATTENTION = 2 };

typedef struct qerve_op {
    int32_t kind;
    const void* args; /* qerve_embed_op, qerve_linear_op, qerve_attention_op */
} qerve_op;

/* One batch: consecutive rows of tokens, one run of rows per sequence. */
typedef struct qerve_step {
    const int32_t* token_ids;    /* (num_tokens,) */
    const int32_t* positions;    /* (num_tokens,) */
    const int32_t* starts;       /* (num_sequences + 1,) first row of each sequence */
    const int32_t* context_lens; /* (num_sequences,) tokens in the cache when this step is done */
    const int32_t* block_tables; /* (num_sequences, table_stride) */
    const int32_t* ranks; /* (num_tokens,) leading components of every low-rank term that count in a row, from 0; what is
                           * more than a term has stands for all of it. NULL: all, in every row */
    int32_t num_tokens;
    int32_t num_sequences;
    int32_t table_stride;
} qerve_step;

typedef struct qerve_context qerve_context; /* worker threads, scratch memory, the chosen instruction set */

/* Grows with every change that a caller of an older library would notice. */
QERVE_EXPORT int32_t qerve_abi_version(void);

/* Threads and the best instruction set, or the one named by `isa` (not NULL). NULL with a text in `error` on failure. */
QERVE_EXPORT qerve_context* qerve_context_create(const char* isa, int32_t num_threads, int32_t is_pinned, char* error,
                                                 int32_t error_size);
QERVE_EXPORT void qerve_context_destroy(qerve_context* context);
QERVE_EXPORT const char* qerve_context_isa(const qerve_context* context);
QERVE_EXPORT int32_t qerve_context_num_threads(const qerve_context* context);

/* Fill in `matrix`, whose storage_bits, zero and rank the caller has set, all but strips, down and bias; return the bytes
 * that its strips take, or -1 with a text in `error`. */
QERVE_EXPORT int64_t qerve_pack_plan(const qerve_source* source, qerve_matrix* matrix, char* error, int32_t error_size);
/* Write the strips of a planned matrix to matrix->strips (64-byte aligned). */
QERVE_EXPORT void qerve_pack(qerve_context* context, const qerve_source* source, const qerve_matrix* matrix);

/* Take a batch through the operators; 0, or -1 with a text in `error` and nothing written. */
QERVE_EXPORT int32_t qerve_run(qerve_context* context, const qerve_op* ops, int32_t num_ops, const qerve_step* step,
                               char* error, int32_t error_size);

/* Speeds that nothing can exceed, for benches: bytes per second of reading `num_bytes`, integer multiply-adds per second. */
QERVE_EXPORT double qerve_peak_read(qerve_context* context, const void* memory, int64_t num_bytes, int32_t repeats);
QERVE_EXPORT double qerve_peak_int8(qerve_context* context, int64_t iterations);

#ifdef __cplusplus
}
#endif
#endif
