"""Everything that can be wrong with a build and is knowable before any weight is read."""

from ..budget import check_budget
from ..config import BuildConfig
from ..errors import SchemeError
from ..llama.config import LlamaConfig
from ..reconstruct.qer import Qer
from ..transform.hadamard import check_rotation
from .recipe import LayerRecipe, required_statistics, training_method


def check_build(config: BuildConfig, network: LlamaConfig) -> None:
    """Check ``config`` against every linear layer of ``network``.

    Raises:
        SchemeError: an unknown method, quantizer or option, groups that do not divide, a rank above a layer's smaller
            dimension, a rotation that does not exist, bits out of reach, an exception for a layer that is not there,
            sequences longer than the context, or statistics that would be missing.
    """
    shapes = network.linear_shapes()
    for path in config.layers:
        if path not in shapes:
            raise SchemeError(
                f"layers: {path!r} is not a linear layer of the network; the first is {next(iter(shapes))}"
            )
    for path, shape in shapes.items():
        if config.transform.rotation != "none":
            check_rotation(shape.in_features, config.transform.rotation_block, path)
        recipe = LayerRecipe.of(config, path, shape.in_features)
        recipe.scheme.check(shape.in_features, path)
        recipe.quantizer.check(shape.in_features, path)
        recipe.reconstructor.check(shape.out_features, shape.in_features, path)
        if isinstance(recipe.reconstructor, Qer):
            recipe.reconstructor.check_scheme(recipe.scheme, path)
        if config.activations is not None:
            config.activations.check(shape.in_features, path)
    network.with_attention(config.attention)  # raises where its groups do not tile the heads
    is_tied = network.tie_word_embeddings and config.transform.rotation != "offline"  # which unties the head
    config.vocabulary.quantized(is_tied=is_tied)  # raises where it makes no sense
    if config.budget is not None:
        check_budget(config, network)
    _check_calibration(config, network)
    _check_training(config)


def _check_calibration(config: BuildConfig, network: LlamaConfig) -> None:
    calibration = config.calibration
    if calibration.source != "none":
        if calibration.sequence_length > network.max_position_embeddings:
            raise SchemeError(
                f"calibration sequences of {calibration.sequence_length} tokens exceed the checkpoint's context of "
                f"{network.max_position_embeddings}: choose --sequence-length {network.max_position_embeddings} or less"
            )
        return
    needs = sorted(statistic.value for statistic in required_statistics(config))
    uses = [f"statistics ({', '.join(needs)}) for {_described(config)}"] if needs else []
    uses += ["activations for flatten or permute"] if _is_rewritten_from_data(config) else []
    uses += ["statistics for target bits"] if config.budget is not None else []
    if uses:
        raise SchemeError(
            f"calibration is none, but this build needs {' and '.join(uses)}: give --calibration self or a file, or "
            "choose what looks at no data"
        )


def _check_training(config: BuildConfig) -> None:
    if training_method(config) is not None and config.calibration.inputs == "dense":
        raise SchemeError(
            "method qer trains on the inputs that quantized layers give: choose calibration inputs quantized or "
            "sequential, not dense"
        )


def _is_rewritten_from_data(config: BuildConfig) -> bool:
    return config.transform.flatten is not None or config.transform.permute


def _described(config: BuildConfig) -> str:
    parts = [f"method {config.reconstruct.method}", f"quantizer {config.quantizer.method}"]
    parts += ["clip search"] if config.quantizer.use_clip_search else []
    parts += ["refit"] if config.reconstruct.refit else []
    parts += ["objective output"] if config.objective == "output" else []
    return ", ".join(parts)
