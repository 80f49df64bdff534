"""From an artifact to a network that runs: read, repack and release one layer at a time."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..device import default_dtype
from ..errors import ArtifactError, CheckpointError
from ..kernels import get_backends
from ..kernels.base import KernelBackend, Selection
from ..layers.linear import LowRankLinear
from ..llama.model import LlamaForCausalLM
from ..llama.network import Network
from ..llama.tokenizer import Tokenizer
from ..memory import return_freed_memory
from ..scheme import EMBEDDING, HEAD
from ..types import LinearWeights, QuantizedWeight
from .execution import Execution, RunOptions, resident_bytes, run_natively, warn_if_missing
from .format import Manifest
from .reader import ArtifactReader, Verify

_FREED_AT_ONCE = 1 << 24  # bytes: asking after every layer takes a tenth of a small network's load


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network ready to run, with what an operator wants to know about it.

    selections:     per linear layer, a quantized head included: the backend that runs it, and why others do not
    weight_bytes:   bytes as stored, by component (``Manifest.component_bytes``)
    resident_bytes: bytes in memory, by the backend's name; ``embedding`` for a quantized one of its own,
        ``unquantized`` for everything else. Of a network that runs as one list of operators: by component
    execution:      which kernels run it, and how
    load_seconds:   from the first file opened to the network built, verification included
    """

    model: Network
    tokenizer: Tokenizer
    manifest: Manifest
    selections: dict[str, Selection]
    weight_bytes: dict[str, int]
    resident_bytes: dict[str, int]
    load_seconds: float
    execution: Execution


class ArtifactWeights:
    """The ``WeightSource`` over an open artifact.

    Norms come in ``dtype``; so do the embedding and the head unless they are stored narrower: the network widens them
    row by row. Bytes are read onto the device as they are stored, and unpacked and repacked there, layer by layer.
    """

    def __init__(
        self, reader: ArtifactReader, backends: Sequence[KernelBackend], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.selections: dict[str, Selection] = {}
        self.resident_bytes: Counter[str] = Counter()
        self._reader = reader
        self._backends = backends
        self._device = device
        self._dtype = dtype
        self._shared_head: LowRankLinear | None = None
        self._freed_bytes = 0

    def tensor(self, name: str) -> Tensor:
        """An unquantized parameter on its device.

        Raises:
            ArtifactError: there is none of that name, or a value is not finite.
        """
        tensor = self._reader.tensor(name, self._device)
        is_kept = tensor.dim() > 1 and tensor.dtype.itemsize < self._dtype.itemsize
        tensor = tensor.to(self._device, tensor.dtype if is_kept else self._dtype)
        self.resident_bytes["unquantized"] += tensor.nbytes
        return tensor

    def linear(self, path: str) -> nn.Module:
        """The quantized linear layer at ``path``, repacked by the backend that was selected for it.

        A quantized embedding goes to the reference backend, which gives single rows; one that is the head too goes to
        the head's, and is kept once more by the reference backend only if that one does not give single rows.

        Raises:
            ArtifactError: there is none, or a value is one that no network can run with.
            KernelError: no backend can run it.
        """
        if path == HEAD and self._shared_head is not None:
            return self._shared_head
        weights = self._reader.linear(path, self._device)
        layer = self._embedding(weights) if path == EMBEDDING else self._layer(path, weights, self._backends)
        self._freed_bytes += weights.quantized.codes.nbytes
        del weights
        if self._freed_bytes >= _FREED_AT_ONCE:
            return_freed_memory()
            self._freed_bytes = 0
        return layer

    def _embedding(self, weights: LinearWeights) -> LowRankLinear:
        if HEAD not in self._reader.config.vocabulary and self._reader.config.is_head_quantized:
            self._shared_head = self._layer(HEAD, weights, self._backends)
            if self._shared_head.has_rows:
                return self._shared_head
        return self._layer(EMBEDDING, weights, get_backends("reference"))

    def _layer(self, path: str, weights: LinearWeights, backends: Sequence[KernelBackend]) -> LowRankLinear:
        layer = LowRankLinear.of(weights, backends, device=self._device, dtype=self._dtype, where=path)
        if path != EMBEDDING:  # its rows are looked up, nothing is multiplied
            self.selections[path] = layer.selection
        self.resident_bytes["embedding" if path == EMBEDDING else layer.selection.backend.name] += layer.nbytes
        return layer


def load_artifact(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
    verify: Verify = "full",
    options: RunOptions | None = None,
) -> LoadedModel:
    """Load the artifact in directory ``path``.

    Args:
        path: the directory.
        device: where the network runs.
        dtype: type of the activations; None: what suits the device (``default_dtype``).
        backend: ``auto``, or the name of the kernel backend to run every layer.
        verify: ``full`` compares every byte with its hash first; ``structure`` trusts the tensors' bytes.
        options: further choices; None: ``RunOptions(backend)``.

    Raises:
        ArtifactError: the artifact is damaged, inconsistent or of another format version.
        KernelError: no backend of that name, none that can run a layer, or not the cache that was asked for.
    """
    started = time.perf_counter()
    target = torch.device(device)
    options = options or RunOptions(backend)
    backends = get_backends(options.backend, options.activation_bits)
    warn_if_missing(backends, target)
    with ArtifactReader.open(path, verify) as reader:
        weights = ArtifactWeights(reader, backends, target, dtype or default_dtype(target))
        layers = LlamaForCausalLM(reader.config, weights)
        model, execution = run_natively(layers, _embedding(reader, layers), backends, options)
        tokenizer = _tokenizer(reader)
    del layers
    return_freed_memory()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        manifest=reader.manifest,
        selections=weights.selections,
        weight_bytes={str(name): size for name, size in reader.manifest.component_bytes.items()},
        resident_bytes=resident_bytes(model, dict(weights.resident_bytes)),
        load_seconds=time.perf_counter() - started,
        execution=execution,
    )


def _embedding(reader: ArtifactReader, model: LlamaForCausalLM) -> Tensor | QuantizedWeight:
    table = model.embed_tokens
    return table if isinstance(table, Tensor) else reader.linear(EMBEDDING).quantized


def _tokenizer(reader: ArtifactReader) -> Tokenizer:
    try:
        # End tokens may be listed there only; as in transformers, config.json counts where there is nothing better.
        return Tokenizer.from_files(reader.tokenizer_files, reader.generation_config or reader.hf_config)
    except CheckpointError as error:
        raise ArtifactError(
            f"{reader.path}: {error}; rebuild the artifact from a checkpoint with a tokenizer"
        ) from error
