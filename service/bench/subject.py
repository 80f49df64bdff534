"""What is measured: an artifact, or a network of random weights, over kernels with a stopwatch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from models.artifact.execution import RunOptions
from models.artifact.load import LoadedModel, load_artifact
from models.bench.metered import MeteredRuntime
from models.bench.random_model import SHAPES, check_memory, random_weights, weight_bytes
from models.bench.strips import has_low_rank, weights_without_low_rank
from models.errors import KernelError, QerveError
from models.kernels.native.runtime import default_runtime
from models.llama.native import NativeLlama
from models.llama.network import Network

from ..engine.engine import EngineTokenizer
from .engine import PlainTexts

_COPIES = 2
"""Of the weights in memory: as they are, and at rank 0."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A network ready to run.

    meter:   the kernels that it runs on; None: others than the native ones
    bare:    the same at rank 0; None: it has no low-rank terms, or they are not the native kernels'
    loaded:  the artifact over the metered kernels; None: random weights
    unmeasured: why the native kernels are not measured; None: they are
    """

    name: str
    network: Network
    tokenizer: EngineTokenizer
    meter: MeteredRuntime | None
    bare: NativeLlama | None
    loaded: LoadedModel | None
    unmeasured: str | None = None


def artifact_subject(path: Path, options: RunOptions, threads: int | None) -> Subject:
    """The artifact in ``path``; on the native kernels where they can run all of it.

    Raises:
        ArtifactError: it is damaged.
    """
    if not path.is_dir():
        raise QerveError(f"{path}: there is no such directory; make an artifact with `qerve build`")
    loaded = load_artifact(path, options=options)
    name = path.resolve().name
    if not isinstance(loaded.model, NativeLlama):
        reason = loaded.execution.unfused or "it does not run on the native kernels"
        return Subject(name, loaded.model, loaded.tokenizer, None, None, loaded, reason)
    meter = _meter(threads)
    network = NativeLlama(loaded.model.weights, meter, loaded.model.cache_dtype)
    return Subject(name, network, loaded.tokenizer, meter, _bare(network, meter), replace(loaded, model=network))


def random_subject(
    shape: str, rank: int, options: RunOptions, threads: int | None, progress: Callable[[int, int], None]
) -> Subject:
    """A network of the shape named ``shape``, with low-rank terms of ``rank``.

    Raises:
        QerveError: no such shape, or it does not fit into memory.
        KernelError: there are no native kernels here.
    """
    if shape not in SHAPES:
        raise QerveError(f"--random {shape}: choose of {', '.join(SHAPES)}")
    config = SHAPES[shape]
    check_memory(_COPIES * weight_bytes(config, rank), f"{shape} at rank {rank}")
    meter = _meter(threads)
    weights = random_weights(config, rank, options.activation_bits, meter, progress)
    network = NativeLlama(weights, meter, options.native_cache_dtype)
    name = f"{shape}, random weights, W4 group 64, rank {rank}"
    return Subject(name, network, PlainTexts(), meter, _bare(network, meter), None)


def _bare(network: NativeLlama, meter: MeteredRuntime) -> NativeLlama | None:
    if not has_low_rank(network.weights):
        return None
    return NativeLlama(weights_without_low_rank(network.weights), meter, network.cache_dtype)


def _meter(threads: int | None) -> MeteredRuntime:
    runtime = default_runtime()
    if isinstance(runtime, str):
        raise KernelError(runtime)
    choice = runtime.threads if threads is None else replace(runtime.threads, num_threads=threads, reason="--threads")
    return MeteredRuntime(runtime.library, choice)
