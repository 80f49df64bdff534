"""What serving an artifact would take on a card, from its manifest alone."""

from ..llama.device_memory import weight_bytes
from .reader import Description


def artifact_weight_bytes(description: Description) -> int:
    """Bytes of the parameters of an artifact on a card."""
    manifest = description.manifest
    records = manifest.linears.values()
    codes = [(record.out_features * record.in_features, record.scheme.num_bits) for record in records]
    return weight_bytes({str(name): size for name, size in manifest.component_bytes.items()}, codes)


def largest_rank(description: Description) -> int:
    """Components of the largest correction."""
    return max((record.rank for record in description.manifest.linears.values()), default=0)
