"""The correction as a PEFT LoRA adapter.

Engines take one rank for all layers, from a list, and scale the product by ``lora_alpha / r``: every layer is padded
with zero components to the next rank of the list, and alpha is r, so that nothing is scaled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ..errors import ExportError
from .files import write_json
from .source import ExportSource, Factors, cast, plain_factors

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_rank(source: ExportSource, ranks: tuple[int, ...] | None) -> int:
    """The one rank that holds every layer's correction; 0: no layer has one.

    Args:
        source: the artifact.
        ranks: those to choose from, rising; None: any.

    Raises:
        ExportError: a correction is larger than all of ``ranks``.
    """
    largest = max(record.rank for record in source.manifest.linears.values())
    if largest == 0 or ranks is None:
        return largest
    fitting = [rank for rank in ranks if rank >= largest]
    if not fitting:
        path = next(path for path, record in source.manifest.linears.items() if record.rank == largest)
        raise ExportError(
            f"{path}: its correction has rank {largest}, above the largest an engine takes ({ranks[-1]}); rebuild with "
            f"--rank {ranks[-1]} or less, or use `qerve export dense`"
        )
    return fitting[0]


def padded(factors: Factors, rank: int) -> Factors:
    """``factors`` with zero components up to ``rank``."""
    missing = rank - factors.up.shape[1]
    return Factors(F.pad(factors.up, (0, missing)), F.pad(factors.down, (0, 0, 0, missing)))


def write_adapter(directory: Path, source: ExportSource, rank: int, dtype: torch.dtype, base: str) -> None:
    """Write the corrections of ``source`` as an adapter of ``rank`` for the model ``base``.

    Layers without a correction, where another layer of their kind has one, get zeros.
    """
    kinds = {path.rpartition(".")[2] for path, record in source.manifest.linears.items() if record.rank}
    tensors: dict[str, Tensor] = {}
    for path, weights in source.linears():
        if path.rpartition(".")[2] not in kinds:
            continue
        factors = plain_factors(weights)
        if factors is None:
            quantized = weights.quantized
            factors = Factors(torch.zeros(quantized.out_features, 0), torch.zeros(0, quantized.in_features))
        tensors |= adapter_tensors(path, padded(factors, rank), dtype)
    write_adapter_files(directory, tensors, adapter_config(rank, kinds, base))


def adapter_tensors(path: str, factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two tensors of one layer, as PEFT names them."""
    return {
        f"{PREFIX}{path}.lora_A.weight": cast(f"{path}.lora_A", factors.down, dtype),
        f"{PREFIX}{path}.lora_B.weight": cast(f"{path}.lora_B", factors.up, dtype),
    }


def write_adapter_files(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Both files of an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / TENSORS_NAME, metadata={"format": "pt"})
    write_json(directory / CONFIG_NAME, config)


def adapter_config(rank: int, kinds: set[str], base: str) -> dict[str, Any]:
    """``adapter_config.json``: nothing scaled, nothing but linear layers, no part that an engine refuses."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(kinds),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
