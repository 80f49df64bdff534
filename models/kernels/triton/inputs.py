"""The input side of a linear layer on the GPU: what ``quantize.input_kernel`` needs of a layer, and its launches."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ...quant.activation import quantize_activations
from ...scheme import ActivationScheme
from ...transform.inputs import InputTransform
from ...types import LinearWeights
from .factors import pack_factors
from .hadamard import MAX_INNER, can_rotate
from .integer import has_offset, input_group, rounding_obstacle
from .launch16 import OPTIONS, SMALL_STAGES, cdiv
from .quantize import input_kernel

CODE_MULTIPLE = 128
"""Channels to whose multiple rows of codes are padded, with zeros: the longest step of the product."""
MAX_WHOLE = 16384
"""Channels of a token that a program can hold in registers; what rotates them takes as many again."""
MAX_WHOLE_ROTATED = 4096
FEW_TOKENS = 64
"""Tokens up to which each is a program of its own: ``lora_down`` is then read once a token, from the cache."""
_FEW_COMPONENTS = 8
_MANY_TOKENS_TILE = (16, 128)
_MAX_COMPONENTS = 64


class IntegerInput(NamedTuple):
    """Rows of codes and what belongs to them; ``scale[g, t] * codes[t, k] + offset[g, t]`` is the quantized input.

    codes:   (num_tokens, padded_features) int8; zeros beyond in_features
    scale:   (num_groups, num_tokens) float32
    offset:  (num_groups, num_tokens) float32; None: zero
    sums:    (padded_features / segment, num_tokens) int32, of the codes; None: not asked for
    reduced: (num_tokens, rank) in the layer's type, the low-rank term's input; None: no such term
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    sums: Tensor | None
    reduced: Tensor | None


class _GridOut(NamedTuple):
    scale: Tensor | None = None
    offset: Tensor | None = None
    sums: Tensor | None = None


class InputTile(NamedTuple):
    """block_m tokens and block_k channels at a time; chunk: components of lora_down for each program, 0: no lora_down

    is_whole: block_k holds all channels of a token
    """

    block_m: int
    block_k: int
    chunk: int
    is_whole: bool
    num_warps: int


@dataclass(frozen=True, slots=True, eq=False)
class FusedInput:
    """What happens to a layer's input before its codes meet it.

    divisor:        (in_features,) float32, in the order that the channels are gathered in, or None
    channel_order:  (in_features,) int32, or None
    rotation_block: width of the Hadamard blocks, 0: not rotated
    activations:    how the input is quantized, or None
    lora_down:      (rank, in_features) in the layer's type or int8, or None: the first ``rank`` channels
    component_scale: (rank,) float32, what the product with ``lora_down`` is multiplied with; None: it is not int8
    rank:           components of the low-rank term, 0: there is none
    """

    in_features: int
    divisor: Tensor | None
    channel_order: Tensor | None
    rotation_block: int
    activations: ActivationScheme | None
    lora_down: Tensor | None
    component_scale: Tensor | None
    rank: int

    @classmethod
    def of(cls, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> "FusedInput":
        """The input of ``weights`` with its tensors on ``device``, ``lora_down`` in ``dtype`` or INT8."""
        correction, order, divisor = weights.correction, weights.channel_order, weights.input_scale
        factors = pack_factors(correction, device, dtype)
        if divisor is not None and order is not None:
            divisor = divisor[order.long()]
        return cls(
            in_features=weights.quantized.in_features,
            divisor=None if divisor is None else divisor.to(device, torch.float32).contiguous(),
            channel_order=None if order is None else order.to(device, torch.int32).contiguous(),
            rotation_block=weights.rotation_block,
            activations=weights.activations,
            lora_down=None if factors is None else factors.lora_down,
            component_scale=None if factors is None else factors.component_scale,
            rank=0 if correction is None else correction.rank,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps resident."""
        tensors = (self.divisor, self.channel_order, self.lora_down, self.component_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def prepare_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` (num_tokens, in_features) divided, gathered, rotated, quantized, and the low-rank term's input.

        For products in the input's own type. An input that nothing happens to comes back as it is.

        Returns:
            x_c (num_tokens, in_features) in x's type, with what its codes stand for where the layer quantizes; reduced
            (num_tokens, rank), or None without a low-rank term.
        """
        has_transform = self.divisor is not None or self.channel_order is not None or self.rotation_block
        if self.activations is not None and rounding_obstacle(self.activations) is not None:
            return self._prepare_in_torch(x)
        if not has_transform and self.activations is None and (not self.rank or self.lora_down is None):
            return x, x[:, : self.rank] if self.rank else None
        prepared = x.new_empty(len(x), self.in_features)
        reduced = x.new_empty(len(x), self.rank) if self.rank else None
        self._launch(x, prepared, reduced, _GridOut(), segment=0)
        return prepared, reduced

    def quantize_input(self, x: Tensor, segment: int = 0) -> IntegerInput:
        """``x`` (num_tokens, in_features) as codes, with sums of each ``segment`` channels (a power of two, or 0).

        There must be ``activations``, a scheme that ``rounding_obstacle`` has nothing against.

        Raises:
            KernelError: the layer's inputs are not quantized.
        """
        scheme, num_tokens = self.activations, len(x)
        if scheme is None:
            raise KernelError("a layer whose inputs are not quantized has no codes: prepare_input is for it")
        num_groups = self.in_features // (input_group(scheme) or self.in_features)
        padded = -(-self.in_features // CODE_MULTIPLE) * CODE_MULTIPLE
        codes = x.new_empty(num_tokens, padded, dtype=torch.int8)
        scale = x.new_empty(num_groups, num_tokens, dtype=torch.float32)
        offset = torch.empty_like(scale) if has_offset(scheme) else None
        sums = x.new_empty(padded // segment, num_tokens, dtype=torch.int32) if segment else None
        reduced = x.new_empty(num_tokens, self.rank) if self.rank else None
        self._launch(x, codes, reduced, _GridOut(scale, offset, sums), segment)
        return IntegerInput(codes, scale, offset, sums, reduced)

    def _launch(self, x: Tensor, out: Tensor, reduced: Tensor | None, grid_out: _GridOut, segment: int) -> None:
        num_tokens, scheme = len(x), self.activations
        if not num_tokens:
            return
        divisor, order, rotation = self.divisor, self.channel_order, self.rotation_block
        tile = self._tile(num_tokens)
        if rotation and not (can_rotate(rotation) and rotation <= tile.block_k):
            x = self._transform().apply(x)
            divisor, order, rotation = None, None, 0
        x = x if x.stride(1) == 1 else x.contiguous()
        grid = (cdiv(num_tokens, tile.block_m), cdiv(self.rank, tile.chunk) if tile.chunk else 1)
        input_kernel[grid](
            x, divisor, order, self.lora_down, self.component_scale, out, *grid_out, reduced,
            num_tokens, x.stride(0), out.shape[1], self.in_features, self.rank,
            1.0 if scheme is None else scheme.clip_ratio,
            **input_constants(scheme, rotation, tile, segment, is_integer=out.dtype == torch.int8),
            num_warps=tile.num_warps,
            num_stages=SMALL_STAGES,
            **OPTIONS,
        )  # fmt: skip

    def _tile(self, num_tokens: int) -> InputTile:
        return input_tile(
            num_tokens,
            self.in_features,
            self.rotation_block if can_rotate(self.rotation_block) else 0,
            input_group(self.activations),
            0 if self.lora_down is None else self.rank,
        )

    def _transform(self) -> InputTransform:
        """The same in torch; the divisor, which is kept in gathered order, in the order of the input."""
        divisor, order = self.divisor, self.channel_order
        if divisor is not None and order is not None:
            divisor = torch.empty_like(divisor).index_copy_(0, order.long(), divisor)
        return InputTransform(divisor, order, self.rotation_block)

    def _prepare_in_torch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self._transform().apply(x)
        x = x if self.activations is None else quantize_activations(x, self.activations)
        if self.lora_down is None:
            return x, x[:, : self.rank] if self.rank else None
        if self.component_scale is None:
            return x, F.linear(x, self.lora_down)
        return x, (F.linear(x.float(), self.lora_down.float()) * self.component_scale).to(x.dtype)


def input_tile(num_tokens: int, in_features: int, rotation: int, group: int, down_rank: int) -> InputTile:
    """Whole tokens where there are few, where nothing is shared between them, or where blocks are too wide.

    Args:
        num_tokens: rows of the input.
        in_features: its channels.
        rotation: width of the Hadamard blocks that the kernel applies, or 0.
        group: channels that share a scale, or 0.
        down_rank: rows of ``lora_down``, or 0.
    """
    whole = max(CODE_MULTIPLE, _power_of_two_from(in_features))
    block_m, block_k = _MANY_TOKENS_TILE
    fits = whole <= (MAX_WHOLE_ROTATED if rotation else MAX_WHOLE)
    if fits and (num_tokens <= FEW_TOKENS or not down_rank or rotation > block_k):
        chunk = min(_FEW_COMPONENTS, _power_of_two_from(down_rank)) if down_rank else 0
        return InputTile(1, whole, chunk, True, min(16, max(4, whole // 512)))
    chunk = min(_MAX_COMPONENTS, max(16, _power_of_two_from(down_rank))) if down_rank else 0
    return InputTile(block_m, max(block_k, group), chunk, False, 4)


def input_constants(
    scheme: ActivationScheme | None, rotation: int, tile: InputTile, segment: int, *, is_integer: bool
) -> dict[str, object]:
    """What ``input_kernel`` is compiled for."""
    return {
        "ROTATION": rotation,
        "INNER": min(rotation, MAX_INNER),
        "FORMAT": "none" if scheme is None else scheme.format,
        "NUM_BITS": 8 if scheme is None else scheme.num_bits,
        "IS_SYMMETRIC": scheme is None or scheme.is_symmetric,
        "IS_CEIL": scheme is not None and scheme.exponent == "ceil",
        "GROUP": input_group(scheme),
        "SEGMENT": segment,
        "IS_INTEGER": is_integer,
        "CHUNK": tile.chunk,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "IS_WHOLE": tile.is_whole,
    }


def _power_of_two_from(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
