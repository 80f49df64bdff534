"""What ``qerve bench`` is asked to do."""

from dataclasses import dataclass

from models.bench.llama import LlamaOptions
from models.bench.workload import Workload
from models.errors import QerveError

SECTIONS = ("kernels", "decode", "prefill", "batch", "http")
BATCH_SIZES = (8, 64)
STREAMS = 8


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """sections: of ``SECTIONS``; threads: of the kernels and of llama.cpp; llama: the other side, None: none."""

    sections: frozenset[str]
    repeats: int
    threads: int | None
    workload: Workload
    llama: LlamaOptions | None = None


def parse_sections(text: str | None) -> frozenset[str]:
    """``"decode,prefill"`` -> its sections; None: all.

    Raises:
        QerveError: an unknown section, or none at all.
    """
    if text is None:
        return frozenset(SECTIONS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise QerveError(f"--only: {', '.join(map(repr, unknown)) or 'nothing'}; choose of {', '.join(SECTIONS)}")
    return frozenset(names)
