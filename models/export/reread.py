"""Exports read back as dense weights, by the unpackers of ``unpack`` and the libraries that define the formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ExportError
from ..layers.linear import DenseLinear
from ..llama.config import LlamaConfig
from ..llama.config_fields import read_json_object
from . import unpack
from .adapter import CONFIG_NAME, PREFIX, TENSORS_NAME
from .files import INDEX_FILE


@dataclass(frozen=True, slots=True)
class Layout:
    """Which files of an export make its network.

    target:  verb that wrote it
    base:    directory of the checkpoint, or file, relative to the export
    adapter: of the correction; None: it is in the base, or there is none
    """

    target: str
    base: str
    adapter: str | None = None


class Stored(Protocol):
    """A base as it is on disk."""

    config: LlamaConfig

    def tensor(self, name: str) -> Tensor:
        """A dense parameter by its Hugging Face name."""
        ...

    def weight(self, path: str) -> Tensor:
        """The base weight of a linear layer, (out_features, in_features) float64."""
        ...


class RereadWeights:
    """The ``WeightSource`` over an export: base and adapter added up in float64, then float32."""

    def __init__(self, base: Stored, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.config = base.config
        self._base = base
        self._adapter = adapter
        self._shapes = base.config.linear_shapes()

    def tensor(self, name: str) -> Tensor:
        """A dense parameter, float32."""
        return self._base.tensor(name).float()

    def weight(self, path: str) -> Tensor:
        """The weight with its correction, (out_features, in_features) float64."""
        weight = self._base.weight(path).double()
        if path in self._adapter:
            up, down = self._adapter[path]
            weight = weight + up.double() @ down.double()
        return weight

    def linear(self, path: str) -> nn.Module:
        """The linear layer at ``path`` as a dense one."""
        bias = self.tensor(f"{path}.bias") if self._shapes[path].has_bias else None
        return DenseLinear(self.weight(path).float(), bias)


def reread(directory: Path, layout: Layout) -> RereadWeights:
    """Open the export in ``directory``.

    Raises:
        ExportError: a file is missing or not what its format says.
    """
    base = directory / layout.base
    if base.suffix == ".gguf":
        from .gguf_reread import GgufBase, read_gguf_adapter

        adapter = {} if layout.adapter is None else read_gguf_adapter(directory / layout.adapter, base)
        return RereadWeights(GgufBase(base), adapter)
    adapter = {} if layout.adapter is None else read_adapter(directory / layout.adapter)
    return RereadWeights(SafetensorsBase(base), adapter)


def read_adapter(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (up, down) of a PEFT adapter, its scaling taken into up.

    Raises:
        ExportError: a tensor without its counterpart, or of a kind that is no plain LoRA.
    """
    config = read_json_object(directory / CONFIG_NAME)
    with safe_open(directory / TENSORS_NAME, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    factors = {}
    for name in [it for it in tensors if it.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        up = tensors.pop(f"{path}.lora_B.weight", None)
        down = tensors.pop(name)
        if up is None:
            raise ExportError(f"{directory}: tensor {name} has no lora_B beside it")
        if up.dim() != 2 or down.dim() != 2 or up.shape[1] != len(down) or not len(down):
            raise ExportError(f"{directory}: tensor {name} {tuple(down.shape)} does not fit lora_B {tuple(up.shape)}")
        module = path.removeprefix(PREFIX)
        factors[module] = (up.float() * scaling(config, module, len(down)), down.float())
    if tensors:
        raise ExportError(f"{directory}: tensor {min(tensors)} belongs to no plain LoRA layer")
    return factors


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies the product of a layer's two matrices with."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


class SafetensorsBase:
    """A Hugging Face directory whose linear layers are dense, or in a format of compressed-tensors, GPTQ or NF4."""

    def __init__(self, directory: Path) -> None:
        values = read_json_object(directory / "config.json")
        self._quantization: Mapping[str, Any] = values.pop("quantization_config", None) or {}
        self.config = LlamaConfig.from_hf(values, str(directory / "config.json"))
        index = read_json_object(directory / INDEX_FILE)
        self._files = {name: directory / file for name, file in index["weight_map"].items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            ExportError: there is none of that name.
        """
        if name not in self._files:
            raise ExportError(f"{next(iter(self._files.values())).parent}: holds no tensor {name}")
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def weight(self, path: str) -> Tensor:
        """The weight of a linear layer, unpacked: (out_features, in_features) float64."""
        kind = self._quantization.get("quant_method")
        if kind is None:
            return self.tensor(f"{path}.weight").double()
        tensors = {
            name.removeprefix(f"{path}."): self.tensor(name)
            for name in self._files
            if name.startswith(f"{path}.") and name != f"{path}.bias"
        }
        if kind == "gptq":
            return unpack.gptq_weight(tensors, self._quantization["bits"])
        if kind == "bitsandbytes":
            return unpack.nf4_weight(tensors)
        return self._compressed(path, tensors)

    def _compressed(self, path: str, tensors: dict[str, Tensor]) -> Tensor:
        groups = self._quantization["config_groups"].values()
        fitting = [it for it in groups if path in it["targets"] or "Linear" in it["targets"]]
        if len(fitting) != 1:
            raise ExportError(f"{path}: {len(fitting)} groups of quantization_config speak of it, not one")
        if fitting[0]["format"] == "int-quantized":
            return unpack.signed_weight(tensors)
        return unpack.compressed_weight(tensors, fitting[0]["weights"]["num_bits"])


def relative_error(reference: Tensor, weight: Tensor) -> float:
    """``|reference - weight| / |reference|`` in the Frobenius norm; 0 where both are zero."""
    error, size = float(torch.linalg.norm(reference - weight)), float(torch.linalg.norm(reference))
    return error / size if size > 0 else error
