"""What a build finds out about the whole network first: rewrites, gradients, a plan for the budget."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.collect import INPUT_OWNERS, Measurement, collect_statistics
from ..calibration.data import CalibrationTokens
from ..calibration.store import StatisticsStore
from ..config import BuildConfig, TransformConfig
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.config import LlamaConfig
from ..llama.model import DecoderLayer
from ..llama.rewrite import FlattenedCheckpoint, PermutedCheckpoint, RotatedCheckpoint
from ..transform.flatten import column_absmax, flatten_scale, share_over_query_heads
from ..transform.permute import descending_order
from ..types import Statistic
from .gradients import network_gradients
from .layer import Foreknowledge
from .observer import BuildObserver
from .predict import plan_layers
from .recipe import collected_statistics, required_statistics
from .stream import CalibrationStreams


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the layers are built from.

    checkpoint: rewritten, computing the same function
    config:     with the budget spent: every layer's bits and rank in ``layers``
    """

    checkpoint: Checkpoint
    config: BuildConfig
    known: Foreknowledge

    @property
    def has_all_statistics(self) -> bool:
        """Nothing has to be collected: the store has it."""
        store = self.known.store
        num_layers = self.checkpoint.config.num_hidden_layers
        requires = collected_statistics(self.config)
        return store is not None and all(store.has(index, requires) for index in range(num_layers))


def prepare(
    checkpoint: Checkpoint,
    config: BuildConfig,
    tokens: CalibrationTokens,
    device: torch.device,
    observer: BuildObserver,
    *,
    store: StatisticsStore | None = None,
) -> Prepared:
    """Carry out everything that needs the whole network.

    Raises:
        SchemeError, CalibrationError, CheckpointError: as ``build_artifact``.
    """
    checkpoint, flattening = _rewrite(checkpoint, config, tokens, device, observer)
    requires = required_statistics(config)
    gradients = network_gradients(checkpoint, config, tokens, device, observer, requires=requires, store=store)
    if config.budget is not None:
        plan = plan_layers(checkpoint, tokens, config, device, observer, flattening=flattening, store=store)
        config = replace(config, layers=config.layers | plan.layers)
    is_storable = config.calibration.inputs == "dense"
    return Prepared(checkpoint, config, Foreknowledge(gradients, flattening, store if is_storable else None))


def _rewrite(
    checkpoint: Checkpoint,
    config: BuildConfig,
    tokens: CalibrationTokens,
    device: torch.device,
    observer: BuildObserver,
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The checkpoint with the offline transforms folded in, and what flattening divided each owner's input by."""
    transform = config.transform
    if transform.rotation == "offline":
        return RotatedCheckpoint(checkpoint, transform.rotation_block, config.calibration.seed), {}
    if transform.flatten is None and not transform.permute:
        return checkpoint, {}
    observer.phase("measuring input channels", checkpoint.config.num_hidden_layers)
    absmax: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for done, (layer_absmax, layer_columns) in enumerate(_magnitudes(checkpoint, tokens, config, device), start=1):
        absmax |= layer_absmax
        columns |= layer_columns
        observer.progress(done)
    scales = _scales(absmax, columns, transform, checkpoint.config)
    if transform.permute:
        orders = {path: descending_order(sizes, path) for path, sizes in absmax.items() if path.endswith("down_proj")}
        checkpoint = PermutedCheckpoint(checkpoint, orders)
        scales = {path: scale[orders[path]] if path in orders else scale for path, scale in scales.items()}
    return (FlattenedCheckpoint(checkpoint, scales) if scales else checkpoint), scales


def _scales(
    absmax: dict[str, Tensor], columns: dict[str, Tensor], transform: TransformConfig, network: LlamaConfig
) -> dict[str, Tensor]:
    """What each owner's input channels are divided by; empty without flattening."""
    if transform.flatten is None:
        return {}
    scales = {}
    for path, sizes in absmax.items():
        weights = columns[path]
        if path.endswith("o_proj"):
            heads = (network.num_key_value_heads, network.head_dim)
            scales[path] = flatten_scale(
                share_over_query_heads(sizes, *heads), share_over_query_heads(weights, *heads), transform.flatten, path
            )
        else:
            scales[path] = flatten_scale(sizes, weights, transform.flatten, path)
    return scales


@torch.inference_mode()
def _magnitudes(
    checkpoint: Checkpoint, tokens: CalibrationTokens, config: BuildConfig, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Per decoder layer of the dense network, by owner: absmax of its input channels, and of the columns they meet."""
    only_statistics = replace(tokens, holdout=tokens.holdout[:0])
    stream = CalibrationStreams.start(checkpoint, only_statistics, config.calibration, device).statistics
    dense = DenseWeights(checkpoint, torch.float32, device)
    for index in range(checkpoint.config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        layer = DecoderLayer(checkpoint.config, index, dense)
        measurement = Measurement(frozenset({Statistic.ABSMAX}))
        statistics = collect_statistics(layer, stream.runs, measurement, prefix)
        absmax: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for owner, children in INPUT_OWNERS.items():
            measured = statistics[owner].absmax
            assert measured is not None  # noqa: S101 - it was asked for
            absmax[f"{prefix}.{owner}"] = measured
            columns[f"{prefix}.{owner}"] = column_absmax([layer.get_parameter(f"{it}.weight") for it in children])
        yield absmax, columns
        stream.advance(layer)
