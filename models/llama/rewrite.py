"""Checkpoints that compute the same function from parameters which are easier to quantize.

Each wraps another checkpoint and rewrites parameters as they are asked for, one at a time; they can be stacked. What is
computed comes in float32 (with ``narrow``, in 16 bits), since the product of two 16-bit numbers does not fit in 16.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from ..transform.fold import divide_rows, scale_columns
from ..transform.hadamard import check_rotation, is_known, rotate
from .checkpoint import NARROW_NAMES, Checkpoint
from .config import LinearShape, LlamaConfig
from .rewritten import RewrittenCheckpoint

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INPUTS = {
    "self_attn.q_proj": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "self_attn.o_proj": ("self_attn.v_proj", ("self_attn.o_proj",)),
    "mlp.gate_proj": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.down_proj": ("mlp.up_proj", ("mlp.down_proj",)),
}
"""The first of the layers that share an input -> what sets the size of its channels, and all that read it."""

NORM_OF = {reader: writer for writer, readers in INPUTS.values() if writer.endswith("norm") for reader in readers}
CHUNK_ELEMENTS = 1 << 22
"""Embedding weights in float32 at a time: 16 MiB."""


class FlattenedCheckpoint(RewrittenCheckpoint):
    """Inputs of linear layers divided by a scale per channel; the parameters before and after make up for it.

    Folded into the norm before q, k, v and before gate, up; into v_proj before o_proj; into up_proj before down_proj.
    """

    def __init__(self, base: Checkpoint, scales: Mapping[str, Tensor]) -> None:
        """Wrap ``base``.

        Args:
            scales: module path of q_proj (for k_proj and v_proj too), o_proj, gate_proj (for up_proj too) or down_proj
                -> (in_features,), positive. A path that is left out is not flattened. That of o_proj is equal for
                all query heads of a key-value head.

        Raises:
            SchemeError: a path, a shape or a value is not as said.
        """
        super().__init__(base, {"scales": _digests(scales)})
        self._divisors: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        shapes = base.config.linear_shapes()
        for path, scale in scales.items():
            layer, part = _check_channels(shapes, path, scale, INPUTS)
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise SchemeError(f"{path}: flattening scales must be positive and finite")
            writer, readers = INPUTS[part]
            self._factors |= {f"{layer}.{reader}": scale for reader in readers}
            is_of_heads = part == "self_attn.o_proj"
            self._divisors[f"{layer}.{writer}"] = _per_value_channel(base.config, path, scale) if is_of_heads else scale

    def _rewrite(self, path: str, kind: str, stored: Tensor) -> Tensor:
        if path in self._divisors:
            stored = divide_rows(stored, self._divisors[path])
        return scale_columns(stored, self._factors[path]) if path in self._factors and kind == "weight" else stored


class PermutedCheckpoint(RewrittenCheckpoint):
    """Hidden channels of MLPs in another order."""

    def __init__(self, base: Checkpoint, orders: Mapping[str, Tensor]) -> None:
        """Wrap ``base``.

        Args:
            orders: module path of down_proj -> (in_features,), its input channels in their new order.

        Raises:
            SchemeError: a path or a shape is not as said, or an order does not name each channel once.
        """
        super().__init__(base, {"orders": _digests(orders)})
        self._rows: dict[str, Tensor] = {}
        self._columns = dict(orders)
        shapes = base.config.linear_shapes()
        for path, order in orders.items():
            layer, _part = _check_channels(shapes, path, order, ("mlp.down_proj",))
            if not order.sort().values.equal(torch.arange(len(order), dtype=order.dtype, device=order.device)):
                raise SchemeError(f"{path}: the channel order does not name each channel once")
            self._rows |= {f"{layer}.{part}": order for part in ("mlp.gate_proj", "mlp.up_proj")}

    def _rewrite(self, path: str, kind: str, stored: Tensor) -> Tensor:
        if path in self._rows:
            return stored.index_select(0, self._rows[path].to(stored.device))
        is_read = path in self._columns and kind == "weight"
        return stored.index_select(1, self._columns[path].to(stored.device)) if is_read else stored


class RotatedCheckpoint(RewrittenCheckpoint):
    """The residual stream and the value heads in rotated coordinates (QuaRot, arXiv 2404.00456, its stages 1a and 1b).

    The residual stream is multiplied with Q = diag(random signs) H, folded into the embedding, the head and all layers
    that read or write it. RMSNorm commutes with Q once its gain is one, so gains move into the layers that read the
    norm, and a tied head, whose gain the embedding does not have, is untied. Value heads are multiplied with H of
    head_dim, where there is one. Queries and keys stay as they are: rotary positions are in between.
    """

    def __init__(self, base: Checkpoint, block: int = 0, seed: int = 0) -> None:
        """Wrap ``base``.

        Args:
            block: width of the blocks of H that the residual stream is rotated in; 0: the whole of hidden_size.
            seed: of the random signs.

        Raises:
            SchemeError: the block does not divide hidden_size, or no Hadamard matrix of its order can be built.
        """
        config = base.config
        self.block = check_rotation(config.hidden_size, block, "the residual stream")
        self.head_block = config.head_dim if is_known(config.head_dim) else 0
        super().__init__(base, {"block": self.block, "head_block": self.head_block, "seed": seed})
        generator = torch.Generator().manual_seed(seed)
        self._signs = 1.0 - 2.0 * torch.randint(2, (config.hidden_size,), generator=generator)

    @property
    def config(self) -> LlamaConfig:
        """The network's shape; the head is its own."""
        return replace(self.base.config, tie_word_embeddings=False)

    @property
    def hf_config(self) -> dict[str, Any]:
        """Content for ``config.json``; the head is its own."""
        return self.base.hf_config | {"tie_word_embeddings": False}

    def tensor(self, name: str, narrow: bool = False) -> Tensor:
        """The rewritten parameter ``name`` on the CPU; see ``Checkpoint``."""
        if name not in NARROW_NAMES:
            return super().tensor(name, narrow)
        is_tied = self.base.config.tie_word_embeddings
        stored = self.base.tensor(EMBEDDING if is_tied else name, narrow)
        gain = self.base.tensor(FINAL_NORM) if name == HEAD else None
        dtype = stored.dtype if narrow else _computed_in(stored)
        rotated = torch.empty(stored.shape, dtype=dtype)
        num_rows = max(1, CHUNK_ELEMENTS // stored.shape[1])
        for rows, target in zip(torch.split(stored, num_rows), torch.split(rotated, num_rows), strict=True):
            target.copy_(self._read_side(rows, gain))
        return rotated

    def _rewrite(self, path: str, kind: str, stored: Tensor) -> Tensor:
        if path.endswith("norm"):
            return torch.ones_like(stored)
        layer, part = _split(path)
        if kind == "weight" and part in NORM_OF:
            stored = self._read_side(stored, self.base.tensor(f"{layer}.{NORM_OF[part]}.weight"))
        if part == "self_attn.v_proj":
            return self._heads(stored.t()).t()
        if part == "self_attn.o_proj" and kind == "weight":
            stored = self._heads(stored)
        return self._write_side(stored) if part in ("self_attn.o_proj", "mlp.down_proj") else stored

    def _read_side(self, weight: Tensor, gain: Tensor | None) -> Tensor:
        """A weight (out_features, hidden_size) that reads the residual stream, behind a norm with ``gain``."""
        signs = self._signs if gain is None else self._signs * gain.to(_computed_in(gain))
        return rotate(scale_columns(weight, signs), self.block)

    def _write_side(self, tensor: Tensor) -> Tensor:
        """A weight (hidden_size, in_features) or a bias (hidden_size,) that writes to the residual stream."""
        return rotate(scale_columns(tensor.t(), self._signs), self.block).t()

    def _heads(self, tensor: Tensor) -> Tensor:
        """(..., num_heads * head_dim), each head rotated."""
        return rotate(tensor.to(_computed_in(tensor)), self.head_block) if self.head_block else tensor


def _computed_in(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _split(path: str) -> tuple[str, str]:
    """``model.layers.0.mlp.up_proj`` -> ``model.layers.0``, ``mlp.up_proj``."""
    words = path.split(".")
    return ".".join(words[:3]), ".".join(words[3:])


def _check_channels(
    shapes: Mapping[str, LinearShape], path: str, channels: Tensor, parts: Collection[str]
) -> tuple[str, str]:
    """``_split(path)`` if it is one of ``parts`` of a layer with as many input ``channels``."""
    layer, part = _split(path)
    if path not in shapes or part not in parts:
        raise SchemeError(f"{path}: is not the {' or '.join(parts)} of a layer of this network")
    if channels.shape != (expected := (shapes[path].in_features,)):
        raise SchemeError(f"{path}: the rewrite is for inputs of shape {tuple(channels.shape)}, not {expected}")
    return layer, part


def _per_value_channel(config: LlamaConfig, path: str, scale: Tensor) -> Tensor:
    """(num_kv_heads * head_dim,) of (num_heads * head_dim,), which is equal for the query heads of a value head."""
    heads = scale.view(config.num_key_value_heads, -1, config.head_dim)
    if not heads.equal(heads[:, :1].expand_as(heads)):
        raise SchemeError(f"{path}: the flattening scales differ between query heads of one key-value head")
    return heads[:, 0].flatten()


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> sha256 of the values."""
    values = {name: tensor.detach().cpu().double().numpy().tobytes() for name, tensor in tensors.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in values.items()}
