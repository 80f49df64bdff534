"""``qerve export compose-adapter``: two LoRA adapters as one, for engines that take one per request.

A = [A1; A2],  B = [s1 B1, s2 B2]:   B A x = s1 B1 A1 x + s2 B2 A2 x
"""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ExportError
from ..llama.config_fields import read_json_object
from .adapter import CONFIG_NAME, TENSORS_NAME, VLLM_RANKS, adapter_config, adapter_tensors, padded, write_adapter_files
from .reread import read_adapter
from .source import Factors

_UNKNOWN = {"use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
"""Parts of an adapter that two matrices cannot say, and what stands for their absence."""


def compose_adapters(export: Path, adapter: Path, out: Path) -> int:
    """Join the adapter in ``export`` with ``adapter`` into directory ``out``, padded to a rank that vLLM takes.

    Returns:
        That rank.

    Raises:
        ExportError: one of them is no plain LoRA adapter, they do not fit together, their ranks add up to more than
            vLLM takes, or ``out`` exists.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; choose another directory")
    nested = export / "adapter"
    own_directory = nested if (nested / CONFIG_NAME).is_file() else export
    own, user = _read(own_directory), _read(adapter)
    _check_shapes(own, user, own_directory, adapter)
    ranks = [max(len(down) for _, down in it.values()) for it in (own, user)]
    fitting = [rank for rank in VLLM_RANKS if rank >= sum(ranks)]
    if not fitting:
        raise ExportError(
            f"{adapter}: ranks {ranks[0]} and {ranks[1]} add up to more than vLLM takes ({VLLM_RANKS[-1]})"
        )
    rank = fitting[0]
    dtype = torch.float32
    tensors: dict[str, Tensor] = {}
    for path in sorted(own.keys() | user.keys()):
        parts = [it[path] for it in (own, user) if path in it]
        joined = Factors(torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts]))
        tensors |= adapter_tensors(path, padded(joined, rank), dtype)
    base = read_json_object(own_directory / CONFIG_NAME).get("base_model_name_or_path")
    kinds = {path.rpartition(".")[2] for path in own.keys() | user.keys()}
    write_adapter_files(out, tensors, adapter_config(rank, kinds, str(base)))
    return rank


def _read(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not (directory / name).is_file():
            raise ExportError(f"{directory / name}: is missing; an adapter has it, in safetensors")
    try:
        config = read_json_object(directory / CONFIG_NAME)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{directory}: an adapter of type {config.get('peft_type')}; only LORA can be joined")
    for name, absent in _UNKNOWN.items():
        if (config.get(name) or absent) != absent:
            raise ExportError(f"{directory}: has {name} = {config[name]!r}, which a joined adapter cannot hold")
    factors = read_adapter(directory)
    if not factors:
        raise ExportError(f"{directory}: holds no LoRA layers")
    return factors


def _check_shapes(
    own: dict[str, tuple[Tensor, Tensor]], user: dict[str, tuple[Tensor, Tensor]], first: Path, second: Path
) -> None:
    for path in sorted(own.keys() & user.keys()):
        shapes = [(len(up), down.shape[1]) for up, down in (own[path], user[path])]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{path}: {shapes[0]} in {first}, {shapes[1]} in {second}: not of the same network")
