"""The structures of ``csrc/qerve_cpu.h`` as ctypes sees them: the same fields, a test compares them.

Every pointer is an untyped address: whoever fills a structure in keeps alive what it points to.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any, TypeAlias

ABI_VERSION = 2
STRIP_ROWS = 32
CACHE_BLOCK = 16
ALIGNMENT = 64

Field: TypeAlias = tuple[str, Any]


class ActivationKind(IntEnum):
    """``qerve_activation_kind``."""

    BITS_8 = 0
    BITS_16 = 1
    INT = 2
    MXINT = 3


class OutputMode(IntEnum):
    """``qerve_output_mode``."""

    STORE = 0
    ADD = 1
    SWIGLU = 2


class CacheType(IntEnum):
    """``qerve_cache_type``."""

    F16 = 0
    I8 = 1


class EmbeddingType(IntEnum):
    """``qerve_embedding_type``."""

    F32 = 0
    BF16 = 1
    F16 = 2
    I8 = 3


class OpKind(IntEnum):
    """``qerve_op_kind``."""

    EMBED = 0
    LINEAR = 1
    ATTENTION = 2


class Activation(ctypes.Structure):
    """``qerve_activation``."""

    _fields_ = (
        ("kind", c_int32),
        ("num_bits", c_int32),
        ("group_size", c_int32),
        ("is_symmetric", c_int32),
        ("is_ceil", c_int32),
        ("clip_ratio", c_float),
    )


class Input(ctypes.Structure):
    """``qerve_input``."""

    _fields_ = (
        ("norm_weight", c_void_p),
        ("divisor", c_void_p),
        ("channel_order", c_void_p),
        ("in_features", c_int32),
        ("rotation_block", c_int32),
        ("block", c_int32),
        ("norm_eps", c_float),
        ("activation", Activation),
    )


class Matrix(ctypes.Structure):
    """``qerve_matrix``."""

    _fields_ = (
        ("strips", c_void_p),
        ("down", c_void_p),
        ("bias", c_void_p),
        ("strip_bytes", c_int64),
        ("out_features", c_int32),
        ("in_features", c_int32),
        ("storage_bits", c_int32),
        ("block", c_int32),
        ("blocks_per_group", c_int32),
        ("has_zero_points", c_int32),
        ("zero", c_int32),
        ("rank", c_int32),
        ("multiplier", c_float),
        ("up_multiplier", c_float),
    )


class Source(ctypes.Structure):
    """``qerve_source``."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zero_points", c_void_p),
        ("out_features", c_int32),
        ("in_features", c_int32),
        ("code_bits", c_int32),
        ("group_size", c_int32),
        ("up_codes", c_void_p),
        ("up_scales", c_void_p),
    )


class LinearOp(ctypes.Structure):
    """``qerve_linear_op``."""

    _fields_ = (
        ("input", Input),
        ("x", c_void_p),
        ("y", c_void_p),
        ("parts", c_void_p),
        ("columns", c_void_p),
        ("ldx", c_int64),
        ("ldy", c_int64),
        ("num_parts", c_int32),
        ("mode", c_int32),
    )


class AttentionOp(ctypes.Structure):
    """``qerve_attention_op``."""

    _fields_ = (
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("ld", c_int64),
        ("ldo", c_int64),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("cache_type", c_int32),
        ("softmax_scale", c_float),
        ("has_quantized_qkv", c_int32),
        ("activation", Activation),
    )


class EmbedOp(ctypes.Structure):
    """``qerve_embed_op``."""

    _fields_ = (
        ("table", c_void_p),
        ("scales", c_void_p),
        ("hidden", c_void_p),
        ("hidden_size", c_int32),
        ("vocab_size", c_int32),
        ("type", c_int32),
        ("group_size", c_int32),
    )


class Op(ctypes.Structure):
    """``qerve_op``."""

    _fields_ = (("kind", c_int32), ("args", c_void_p))


class Step(ctypes.Structure):
    """``qerve_step``."""

    _fields_ = (
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("ranks", c_void_p),
        ("num_tokens", c_int32),
        ("num_sequences", c_int32),
        ("table_stride", c_int32),
    )
