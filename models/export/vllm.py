"""``qerve export vllm``: a quantized base that vLLM loads as it is, and the correction as a LoRA adapter.

In vLLM a LoRA layer runs the quantized base on x and adds ``B(Ax)`` with the same, unquantized x: the very form of a
corrected layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.reader import ArtifactReader
from ..types import LinearWeights, QuantizedWeight
from .adapter import write_adapter
from .compressed_tensors import PACKED, SIGNED, packed_tensors, quantization_config, signed_tensors
from .files import staged, write_companions, write_shards
from .gptq import gptq_config, gptq_tensors
from .reread import Layout
from .source import EXPORT_DTYPES, ExportSource, cast, plain_codes
from .verify import Verification, prove
from .vllm_plan import DENSE_REMEDY, Format, Inputs, VllmPlan, plan_vllm
from .vllm_readme import vllm_readme


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Choices of an export for vLLM.

    layout: family of formats
    inputs: quantization of inputs: ``keep`` what the artifact has, ``drop`` it, or ``int8`` per token
    dtype:  of everything that is not codes; float16 holds the scales as they are
    name:   under which the corrected model is served; None: that of the directory
    """

    layout: Format = "compressed-tensors"
    inputs: Inputs = "keep"
    dtype: str = "float16"
    name: str | None = None


def export_vllm(artifact: Path, out: Path, options: VllmOptions, *, overwrite: bool = False) -> Verification:
    """Write the artifact for vLLM into directory ``out``, and prove it.

    Raises:
        ArtifactError: the artifact cannot be read.
        ExportError: vLLM has no format for it, or ``out`` is taken.
    """
    with ArtifactReader.open(artifact) as reader, staged(out, overwrite=overwrite) as directory:
        source = ExportSource(reader)
        plan = plan_vllm(source, options.layout, options.inputs)
        dtype = EXPORT_DTYPES[options.dtype]
        base = directory / "base"
        base.mkdir()
        shards = _shards(source, plan, dtype)
        write_shards(base, shards, source.config.num_hidden_layers + 1)
        config = source.hf_config(options.dtype) | {"quantization_config": _config(plan)}
        write_companions(base, source, config)
        name = options.name or out.name
        if plan.rank:
            write_adapter(directory / "adapter", source, plan.rank, dtype, f"{name}-uncorrected")
        (directory / "README.md").write_text(vllm_readme(name, options.dtype, plan), encoding="utf-8")
        layout = Layout("vllm", "base", "adapter" if plan.rank else None)
        return prove(directory, layout, source, list(plan.notes))


def _config(plan: VllmPlan) -> dict[str, object]:
    if plan.layout == "gptq":
        return gptq_config(plan.groups[0][0])
    return quantization_config(plan.groups, plan.layout, plan.activations)


def _shards(source: ExportSource, plan: VllmPlan, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    for index in (*range(source.config.num_hidden_layers), None):
        tensors = {name: cast(name, source.tensor(name), dtype) for name in source.dense_names(index)}
        for path in () if index is None else source.config.layer_linear_shapes(index):
            tensors |= _linear(path, source.reader.linear(path), plan, dtype)
        yield tensors


def _linear(path: str, weights: LinearWeights, plan: VllmPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    quantized = _integers(plain_codes(path, weights, DENSE_REMEDY), plan)
    writers = {PACKED: packed_tensors, SIGNED: signed_tensors}
    write = writers.get(plan.layout)
    tensors = gptq_tensors(path, quantized) if write is None else write(path, quantized, dtype)
    if weights.bias is not None:
        tensors[f"{path}.bias"] = cast(f"{path}.bias", weights.bias, dtype)
    return tensors


def _integers(quantized: QuantizedWeight, plan: VllmPlan) -> QuantizedWeight:
    """``quantized`` under the scheme that the plan calls it by."""
    scheme = replace(quantized.scheme, format="int", exponent="floor")
    assert any(scheme == it for it, _ in plan.groups)  # noqa: S101 - MXINT comes symmetric already
    return replace(quantized, scheme=scheme)
