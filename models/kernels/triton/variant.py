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
    tile:      row of the table of tiles; its architecture is what the variant is compiled for
    types:     argument -> ``*bf16``, ``*i32``, ``i32``, ``fp32``; pointers and integers are taken to be multiples of 16,
        as those of all layers of LLaMA are
    constants: argument -> value; None for what a layer does not have
    unaligned: arguments of ``types`` that may have any value
    """

    kernel: Any
    title: str
    tile: Tile
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    unaligned: frozenset[str] = frozenset({"num_rows"})
