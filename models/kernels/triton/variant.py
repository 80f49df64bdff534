"""One binary of a kernel: what decides how it is compiled. Every module with kernels lists its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .tiles import Tile


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with the types of its arguments and the values it is compiled for.

    kernel:    the ``triton.jit`` function
    title:     what it computes, for a table: ``W4 group 64 asymmetric, rank 32``
    arch:      compute capability as one number
    tile:      row of the table of tiles that it belongs to; None: it is the same beside all of them
    num_warps, num_stages: as it is launched
    types:     argument -> ``*bf16``, ``*i32``, ``i32``, ``fp32``; pointers and integers are taken to be multiples of
        16, as those of all layers of LLaMA are
    constants: argument -> value; None for what a layer does not have
    unaligned: arguments of ``types`` that may have any value
    """

    kernel: Any
    title: str
    arch: int
    tile: Tile | None
    num_warps: int
    num_stages: int
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    unaligned: frozenset[str] = frozenset({"num_rows", "num_parts"})
