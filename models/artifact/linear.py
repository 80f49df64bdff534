"""Between ``LinearWeights`` and its stored tensors, with the values checked in both directions."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..quant import mx
from ..quant.packing import pack, unpack
from ..scheme import QuantScheme
from ..types import Correction, Factor, LinearWeights, QuantizedWeight
from .layout import TensorError
from .record import LinearRecord

Read = Callable[[str], Tensor]


def encode_linear(path: str, weights: LinearWeights) -> dict[str, Tensor]:
    """Tensors by name, as they are stored; ``decode_linear`` is the inverse.

    Raises:
        TensorError: a code or zero point that its bits cannot hold, or a value that ``check_values`` refuses.
    """
    check_values(path, weights)
    tensors = _encode_codes(f"{path}.weight", weights.quantized)
    correction = weights.correction
    if correction is not None and correction.rank > 0:
        tensors |= _encode_factor(f"{path}.lora_up", correction.lora_up)
        if correction.lora_down is not None:
            tensors |= _encode_factor(f"{path}.lora_down", correction.lora_down)
    rest = {"input_scale": weights.input_scale, "channel_order": weights.channel_order, "bias": weights.bias}
    return tensors | {f"{path}.{name}": tensor for name, tensor in rest.items() if tensor is not None}


def decode_linear(path: str, record: LinearRecord, read: Read) -> LinearWeights:
    """The linear layer ``path``; ``read`` gives a stored tensor, of the right shape and type, by its full name.

    Raises:
        TensorError: a value that ``check_values`` refuses.
    """
    factors: dict[str, Factor] = {}
    for name, factor in record.factors.items():
        where, scheme = f"{path}.{name}", factor.scheme
        stored = read(where) if scheme is None else _decode_codes(where, scheme, factor.rows, factor.columns, read)
        factors[name] = stored
    weights = LinearWeights(
        quantized=_decode_codes(f"{path}.weight", record.scheme, record.out_features, record.in_features, read),
        correction=Correction(factors["lora_up"], factors.get("lora_down")) if factors else None,
        input_scale=read(f"{path}.input_scale") if record.has_input_scale else None,
        channel_order=read(f"{path}.channel_order") if record.has_channel_order else None,
        rotation_block=record.rotation_block,
        activations=record.activations,
        bias=read(f"{path}.bias") if record.has_bias else None,
    )
    check_values(path, weights)
    return weights


def _encode_factor(name: str, factor: Factor) -> dict[str, Tensor]:
    return _encode_codes(name, factor) if isinstance(factor, QuantizedWeight) else {name: factor}


def _encode_codes(name: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    scheme, scale, zero_point = quantized.scheme, quantized.scale, quantized.zero_point
    tensors = {
        f"{name}_packed": _pack(f"{name}_packed", quantized.codes, scheme),
        f"{name}_scale": mx.to_exponents(scale) if scheme.has_exponent_scale else scale,
    }
    if zero_point is not None:
        tensors[f"{name}_zero_point"] = _pack(f"{name}_zero_point", zero_point.T.contiguous(), scheme)
    return tensors


def _pack(name: str, codes: Tensor, scheme: QuantScheme) -> Tensor:
    if codes.dtype != torch.uint8 or codes.dim() != 2 or int(codes.max()) > scheme.max_code:
        raise TensorError(name, f"not a uint8 matrix of values up to {scheme.max_code}")
    return pack(codes, scheme.num_bits)


def _decode_codes(name: str, scheme: QuantScheme, rows: int, columns: int, read: Read) -> QuantizedWeight:
    zero_point = None
    if not scheme.is_symmetric:
        zero_point = unpack(read(f"{name}_zero_point"), scheme.num_bits, rows).T.contiguous()
    scale = read(f"{name}_scale")
    return QuantizedWeight(
        codes=unpack(read(f"{name}_packed"), scheme.num_bits, columns),
        scale=mx.from_exponents(scale) if scheme.has_exponent_scale else scale,
        zero_point=zero_point,
        scheme=scheme,
    )


def check_values(path: str, weights: LinearWeights) -> None:
    """Check what shapes and types cannot show, and what would make the network silently wrong.

    Raises:
        TensorError: naming the tensor.
    """
    _check_scale(f"{path}.weight_scale", weights.quantized)
    if weights.correction is not None:
        _check_factor(f"{path}.lora_up", weights.correction.lora_up)
        _check_factor(f"{path}.lora_down", weights.correction.lora_down)
    check_finite(f"{path}.input_scale", weights.input_scale)
    if weights.input_scale is not None and bool((weights.input_scale == 0).any()):
        raise TensorError(f"{path}.input_scale", "a value is zero, and inputs are divided by it")
    check_finite(f"{path}.bias", weights.bias)
    order = weights.channel_order
    if order is not None:
        every_channel = torch.arange(len(order), dtype=order.dtype, device=order.device)
        if not torch.equal(order.sort().values, every_channel):
            raise TensorError(f"{path}.channel_order", "not a permutation of the input channels")


def _check_factor(name: str, factor: Factor | None) -> None:
    if isinstance(factor, QuantizedWeight):
        _check_scale(f"{name}_scale", factor)
    else:
        check_finite(name, factor)


def _check_scale(name: str, quantized: QuantizedWeight) -> None:
    scale = quantized.scale
    check_finite(name, scale)
    if not bool((scale > 0).all()):
        raise TensorError(name, "a scale is not positive")
    if not quantized.scheme.has_exponent_scale:
        return
    if scale.dtype != torch.bfloat16:
        raise TensorError(name, f"type {scale.dtype}, but scales that are powers of two come in bfloat16")
    if not torch.equal(mx.from_exponents(mx.to_exponents(scale)), scale):
        raise TensorError(name, "a scale is not a power of two from 2**-126 to 2**127")


def check_finite(name: str, tensor: Tensor | None) -> None:
    """Check that every value is a number.

    By its extremes, which one pass finds without a temporary: NaN spreads to them, infinities are them.

    Raises:
        TensorError: a value is infinite or not a number.
    """
    if tensor is None or tensor.numel() == 0:
        return
    if not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        raise TensorError(name, "a value is infinite or not a number")
