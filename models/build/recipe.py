"""From a build configuration to what each linear layer needs: number format, quantizer, reconstructor, statistics."""

from dataclasses import dataclass, replace

from ..calibration.collect import INPUT_OWNERS
from ..config import BuildConfig, ReconstructConfig
from ..llama.config import LlamaConfig
from ..quant.quantizers import Quantizer, get_quantizer
from ..reconstruct import get_reconstructor
from ..reconstruct.base import Reconstructor
from ..reconstruct.qer import Qer, default_merge
from ..reconstruct.regression import REQUIRES_REFIT
from ..scheme import QuantScheme
from ..transform.inputs import InputTransform
from ..types import Statistic

_TOKENS_TOGETHER = 2048


@dataclass(frozen=True, slots=True)
class LayerRecipe:
    """How one linear layer is built.

    rotation_block: of the Hadamard transform of its input; 0: none
    """

    scheme: QuantScheme
    quantizer: Quantizer
    reconstructor: Reconstructor
    rank: int
    rotation_block: int

    @classmethod
    def of(cls, config: BuildConfig, path: str, in_features: int) -> "LayerRecipe":
        """The recipe of the linear layer ``path``, with its exceptions from the build's settings.

        Raises:
            SchemeError: an unknown method, or an option that cannot be.
        """
        scheme, reconstruct = config.scheme, config.reconstruct
        own = config.layers.get(path)
        if own is not None:
            num_bits = scheme.num_bits if own.num_bits is None else own.num_bits
            group_size = scheme.group_size if own.group_size is None else own.group_size
            scheme = replace(scheme, num_bits=num_bits, group_size=group_size)
            reconstruct = reconstruct if own.rank is None else replace(reconstruct, rank=own.rank)
        return cls(
            scheme=scheme,
            quantizer=get_quantizer(config.quantizer, scheme),
            reconstructor=_reconstructor(config, reconstruct),
            rank=reconstruct.rank,
            rotation_block=rotation_block(config, path, in_features),
        )


def training_method(config: BuildConfig) -> Qer | None:
    """The method of ``config`` if it trains."""
    method = _reconstructor(config, config.reconstruct)
    return method if isinstance(method, Qer) else None


def _reconstructor(config: BuildConfig, reconstruct: ReconstructConfig) -> Reconstructor:
    """The method of ``reconstruct``; what suits the base quantizer is chosen here, where both are known."""
    if reconstruct.method == Qer.method and "merge" not in reconstruct.options:
        options = {"merge": default_merge(config.quantizer.method), **reconstruct.options}
        reconstruct = replace(reconstruct, options=options)
    return get_reconstructor(reconstruct)


def rotation_block(config: BuildConfig, path: str, in_features: int) -> int:
    """Width of the Hadamard blocks by which the input of ``path`` is rotated while serving; 0: it is not."""
    transform = config.transform
    is_rotated = transform.rotation == "online" or (transform.rotation == "offline" and path.endswith("down_proj"))
    return (transform.rotation_block or in_features) if is_rotated else 0


def required_statistics(config: BuildConfig) -> frozenset[Statistic]:
    """What calibration must accumulate for ``config``."""
    reconstructor = get_reconstructor(config.reconstruct)
    requires = reconstructor.requires | get_quantizer(config.quantizer, config.scheme).requires
    if config.objective == "output" or config.reconstruct.refit:
        requires |= REQUIRES_REFIT
    return requires


def collected_statistics(config: BuildConfig) -> frozenset[Statistic]:
    """What is accumulated on the way forth: inputs, not gradients.

    The reported output error is measured with the autocorrelation, whatever the method itself asks for.
    """
    inputs = {statistic for statistic in required_statistics(config) if not statistic.needs_gradients}
    return frozenset(inputs | {Statistic.AUTOCORRELATION})


def has_target_stream(config: BuildConfig) -> bool:
    """Whether the calibration set also goes through the dense network: to be compared with, or to learn from."""
    is_compared = Statistic.CROSS_CORRELATION in required_statistics(config)
    return (is_compared or training_method(config) is not None) and config.calibration.inputs != "dense"


def sequences_together(config: BuildConfig) -> int:
    """Calibration sequences that go through a layer at a time while nothing is trained.

    A batch of a build that does not train; otherwise as many whole batches as come to ``_TOKENS_TOGETHER``: a step of
    training takes few tokens, with which such a pass would take half as long again.
    """
    calibration = config.calibration
    if training_method(config) is None:
        return calibration.batch_size
    num_batches = _TOKENS_TOGETHER // (calibration.batch_size * calibration.sequence_length)
    return calibration.batch_size * max(1, num_batches)


def input_transforms(config: BuildConfig, layer_index: int, network: LlamaConfig) -> dict[str, InputTransform]:
    """What happens to the inputs of a decoder layer's linear layers while serving, by the child path of the owner."""
    shapes, prefix = network.linear_shapes(), f"model.layers.{layer_index}"
    paths = {owner: f"{prefix}.{owner}" for owner in INPUT_OWNERS}
    return {
        owner: InputTransform(rotation_block=rotation_block(config, path, shapes[path].in_features))
        for owner, path in paths.items()
    }
