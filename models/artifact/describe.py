"""How an artifact was made, in a few words per part: for tables, and for whoever asks the server."""

from ..config import BudgetConfig, BuildConfig, QuantizerConfig, ReconstructConfig, TransformConfig
from ..scheme import ActivationScheme, QuantScheme


def describe_build(build: BuildConfig) -> dict[str, str]:
    """Name -> description of each part that the build uses, in the order in which they act on a layer."""
    calibration = build.calibration
    parts = {
        "weights": f"{describe_scheme(build.scheme)}, {describe_quantizer(build.quantizer)}",
        "activations": None if build.activations is None else describe_scheme(build.activations),
        "attention inputs": None if build.attention is None else describe_scheme(build.attention),
        "transform": describe_transform(build.transform),
        "objective": None if build.objective == "weight" else build.objective,
        "correction": describe_correction(build.reconstruct),
        "budget": None if build.budget is None else describe_budget(build.budget),
        "exceptions": f"{len(build.layers)} linear layers" if build.layers else None,
        "calibration": f"{calibration.source}, {calibration.num_sequences} x {calibration.sequence_length} tokens, "
        f"{calibration.inputs} inputs",
    }
    return {name: part for name, part in parts.items() if part is not None}


def describe_scheme(scheme: QuantScheme | ActivationScheme) -> str:
    """``MXINT4, group 32, ceil exponents``: its name in tables, with what that leaves out."""
    is_ceil = scheme.format == "mxint" and scheme.exponent == "ceil"
    return f"{scheme}, ceil exponents" if is_ceil else str(scheme)


def describe_quantizer(quantizer: QuantizerConfig) -> str:
    """``gptq, clip search, act order, damping 0.05``: options as far as they are not the defaults."""
    parts: list[str] = [quantizer.method]
    if quantizer.use_clip_search:
        parts.append("clip search")
    if quantizer.use_act_order:
        parts.append("act order")
    if quantizer.method == "gptq" and quantizer.damping != QuantizerConfig().damping:
        parts.append(f"damping {quantizer.damping:g}")
    return ", ".join(parts)


def describe_correction(reconstruct: ReconstructConfig) -> str:
    """``srr, rank 32, int8, refit, split 8``."""
    parts = [reconstruct.method, f"rank {reconstruct.rank}", reconstruct.factor_dtype]
    if reconstruct.refit:
        parts.append("refit")
    parts += [f"{name} {value}" for name, value in sorted(reconstruct.options.items())]
    return ", ".join(parts)


def describe_transform(transform: TransformConfig) -> str | None:
    """``flatten 1, permute, rotation online in blocks of 64``; None: the network is taken as it is."""
    parts = []
    if transform.flatten is not None:
        parts.append(f"flatten {transform.flatten:g}")
    if transform.permute:
        parts.append("permute")
    if transform.rotation != "none":
        width = f"in blocks of {transform.rotation_block}" if transform.rotation_block else "over the whole width"
        parts.append(f"rotation {transform.rotation} {width}")
    return ", ".join(parts) or None


def describe_budget(budget: BudgetConfig) -> str:
    """``4.25 bits per weight from widths 2, 3, 4, rank up to 64``."""
    widths = ", ".join(map(str, budget.num_bits))
    rank = f"rank up to {budget.max_rank}" if budget.max_rank else "no correction"
    return f"{budget.target_bits:g} bits per weight from widths {widths}, {rank}"
