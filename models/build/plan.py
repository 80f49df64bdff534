"""Everything that can be wrong with a build and is knowable before any weight is read."""

from ..config import BuildConfig
from ..errors import SchemeError
from ..llama.config import LlamaConfig
from ..reconstruct import get_reconstructor
from ..reconstruct.base import Reconstructor

QUANTIZERS = ("rtn",)


def check_build(config: BuildConfig, network: LlamaConfig) -> Reconstructor:
    """Check ``config`` against every linear layer of ``network``; returns the reconstructor it asks for.

    Raises:
        SchemeError: an unknown method or quantizer, groups that do not divide, a rank above a layer's smaller
            dimension, sequences longer than the context, or a method whose statistics would be missing.
    """
    if config.quantizer not in QUANTIZERS:
        raise SchemeError(f"quantizer {config.quantizer!r} is not known; choose one of {', '.join(QUANTIZERS)}")
    reconstructor = get_reconstructor(config.reconstruct)
    for path, shape in network.linear_shapes().items():
        config.scheme.check(shape.in_features, path)
        reconstructor.check(shape.out_features, shape.in_features, path)
    calibration = config.calibration
    if calibration.source == "none" and reconstructor.requires:
        needs = ", ".join(sorted(statistic.value for statistic in reconstructor.requires))
        raise SchemeError(
            f"method {config.reconstruct.method} needs calibration statistics ({needs}): give --calibration self or a "
            "file, or choose a method that needs none"
        )
    if calibration.source != "none" and calibration.sequence_length > network.max_position_embeddings:
        raise SchemeError(
            f"calibration sequences of {calibration.sequence_length} tokens exceed the checkpoint's context of "
            f"{network.max_position_embeddings}: choose --sequence-length {network.max_position_embeddings} or less"
        )
    return reconstructor
