"""Between ``LinearWeights`` and its stored tensors, with the values checked in both directions."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..quant.packing import pack, unpack
from ..types import Correction, LinearWeights, QuantizedWeight
from .format import LinearRecord
from .layout import TensorError


def encode_linear(path: str, weights: LinearWeights) -> dict[str, Tensor]:
    """Tensors by name, as they are stored; ``decode_linear`` is the inverse.

    Raises:
        TensorError: a code or zero point that its bits cannot hold, or a value that ``check_values`` refuses.
    """
    quantized, correction = weights.quantized, weights.correction
    num_bits, max_code = quantized.scheme.num_bits, quantized.scheme.max_code
    tensors: dict[str, Tensor | None] = {
        "weight_packed": quantized.codes,
        "weight_scale": quantized.scale,
        "weight_zero_point": None if quantized.zero_point is None else quantized.zero_point.T.contiguous(),
        "input_scale": weights.input_scale,
        "channel_order": weights.channel_order,
        "bias": weights.bias,
    }
    for name in ("weight_packed", "weight_zero_point"):
        codes = tensors[name]
        if codes is not None:
            if codes.dtype != torch.uint8 or codes.dim() != 2 or int(codes.max()) > max_code:
                raise TensorError(f"{path}.{name}", f"not a uint8 matrix of values up to {max_code}")
            tensors[name] = pack(codes, num_bits)
    if correction is not None and correction.rank > 0:
        tensors |= {"lora_up": correction.lora_up, "lora_down": correction.lora_down}
    check_values(path, weights)
    return {f"{path}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}


def decode_linear(path: str, record: LinearRecord, read: Callable[[str], Tensor]) -> LinearWeights:
    """The linear layer ``path``; ``read`` gives a stored tensor, of the right shape and type, by its full name.

    Raises:
        TensorError: a value that ``check_values`` refuses.
    """
    scheme = record.scheme
    zero_point, correction = None, None
    if not scheme.is_symmetric:
        zero_point = unpack(read(f"{path}.weight_zero_point"), scheme.num_bits, record.out_features).T.contiguous()
    if record.lora_form != "none":
        lora_down = read(f"{path}.lora_down") if record.lora_form == "two-factor" else None
        correction = Correction(read(f"{path}.lora_up"), lora_down)
    weights = LinearWeights(
        quantized=QuantizedWeight(
            codes=unpack(read(f"{path}.weight_packed"), scheme.num_bits, record.in_features),
            scale=read(f"{path}.weight_scale"),
            zero_point=zero_point,
            scheme=scheme,
        ),
        correction=correction,
        input_scale=read(f"{path}.input_scale") if record.has_input_scale else None,
        channel_order=read(f"{path}.channel_order") if record.has_channel_order else None,
        bias=read(f"{path}.bias") if record.has_bias else None,
    )
    check_values(path, weights)
    return weights


def check_values(path: str, weights: LinearWeights) -> None:
    """Check what shapes and types cannot show, and what would make the network silently wrong.

    Raises:
        TensorError: naming the tensor.
    """
    scale, correction, order = weights.quantized.scale, weights.correction, weights.channel_order
    check_finite(f"{path}.weight_scale", scale)
    if not bool((scale > 0).all()):
        raise TensorError(f"{path}.weight_scale", "a scale is not positive")
    if correction is not None:
        check_finite(f"{path}.lora_up", correction.lora_up)
        check_finite(f"{path}.lora_down", correction.lora_down)
    check_finite(f"{path}.input_scale", weights.input_scale)
    if weights.input_scale is not None and bool((weights.input_scale == 0).any()):
        raise TensorError(f"{path}.input_scale", "a value is zero, and inputs are divided by it")
    check_finite(f"{path}.bias", weights.bias)
    if order is not None:
        every_channel = torch.arange(len(order), dtype=order.dtype, device=order.device)
        if not torch.equal(order.sort().values, every_channel):
            raise TensorError(f"{path}.channel_order", "not a permutation of the input channels")


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
