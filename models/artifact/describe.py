"""How an artifact was made, in a few words per part: for tables, and for whoever asks the server."""

from dataclasses import dataclass, replace

from ..config import BudgetConfig, BuildConfig, QuantizerConfig, ReconstructConfig, TransformConfig
from ..scheme import EMBEDDING, HEAD, ActivationScheme, QuantScheme, VocabularyScheme
from .format import Manifest
from .layout import DTYPES, StoredTensor


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """The embedding or the output head as it is stored.

    format:          ``INT4 symmetric, group 64``, or the type of its numbers, ``BF16``
    bits_per_weight: of codes and scales
    num_bytes:       of its own; 0 for a head that is the embedding's matrix
    """

    format: str
    bits_per_weight: float
    num_bytes: int


def describe_vocabulary(manifest: Manifest) -> dict[str, VocabularyPart]:
    """``embedding`` and ``head`` of an artifact."""
    embedding = _vocabulary_part(manifest, EMBEDDING)
    has_own_head = any(name.startswith(f"{HEAD}.") for name in manifest.tensors)
    head = _vocabulary_part(manifest, HEAD) if has_own_head else replace(embedding, num_bytes=0)
    return {"embedding": embedding, "head": head}


def vocabulary_rows(manifest: Manifest) -> dict[str, str]:
    """``embedding`` and ``output head`` with format, bits and size, for tables of name and value."""
    parts = describe_vocabulary(manifest)
    rows = {
        name: f"{part.format}, {part.bits_per_weight:.3g} bits per weight, {part.num_bytes / 2**20:.1f} MiB"
        for name, part in (("embedding", parts["embedding"]), ("output head", parts["head"]))
    }
    return rows if parts["head"].num_bytes else rows | {"output head": "the embedding"}


def _vocabulary_part(manifest: Manifest, path: str) -> VocabularyPart:
    records = [record for name, record in manifest.tensors.items() if name.startswith(f"{path}.")]
    tensors = [StoredTensor(record.dtype, record.shape) for record in records]
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    codes = manifest.vocabulary.get(path)
    if codes is None:
        return VocabularyPart(tensors[0].dtype, 8.0 * DTYPES[tensors[0].dtype].itemsize, num_bytes)
    return VocabularyPart(describe_scheme(codes.scheme), codes.effective_bits, num_bytes)


def describe_build(build: BuildConfig) -> dict[str, str]:
    """Name -> description of each part that the build uses, in the order in which they act on a layer."""
    calibration = build.calibration
    parts = {
        "weights": f"{describe_scheme(build.scheme)}, {describe_quantizer(build.quantizer)}",
        "activations": None if build.activations is None else describe_scheme(build.activations),
        "vocabulary": describe_vocabulary_scheme(build.vocabulary),
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


def describe_vocabulary_scheme(scheme: VocabularyScheme) -> str | None:
    """``head 4 bits, embedding 8 bits``; None: both at 16 bits."""
    bits = {"head": scheme.head_bits, "embedding": scheme.embedding_bits}
    return ", ".join(f"{name} {number} bits" for name, number in bits.items() if number < 16) or None


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
