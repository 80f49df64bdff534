"""Compile kernels ahead of time, for cards that need not be there: registers, shared memory and spills of each binary.

Triton comes with ``ptxas``, NVIDIA's assembler, which says how many registers a kernel takes, and how much it had to
keep in memory because they ran out (spills). Kernels are compiled in a process without ``TRITON_INTERPRET``.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...errors import KernelError
from . import variants16, variants_attention
from .environment import TritonEnvironment
from .launch16 import OPTIONS
from .tiles import SHARED_MEMORY
from .variant import Variant

ALIGNMENT = [["tt.divisibility", 16]]
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one binary takes.

    num_registers: per thread, at most 255
    spill_bytes:   per thread, stored and loaded because registers ran out
    shared_bytes:  per block, static and dynamic
    """

    num_registers: int
    spill_bytes: int
    shared_bytes: int

    def obstacle(self, arch: int) -> str | None:
        """Why this is not a binary to choose for ``arch``; None: it may be."""
        limit = SHARED_MEMORY[arch]
        if self.shared_bytes > limit * 1024:
            return f"takes {self.shared_bytes / 1024:.0f} KiB of shared memory, sm_{arch} has {limit} for a block"
        return f"spills {self.spill_bytes} bytes" if self.spill_bytes else None


def all_variants(arch: int) -> Iterator[Variant]:
    """Those of every module with kernels, for compute capability ``arch``."""
    yield from variants16.variants(arch)
    yield from variants_attention.variants(arch)


def compile_variant(variant: Variant) -> Resources:
    """Compile for the variant's architecture.

    Raises:
        KernelError: the kernels are being interpreted, or the assembler refuses the kernel.
    """
    if TritonEnvironment.read().is_interpreting:
        raise KernelError("kernels cannot be compiled while TRITON_INTERPRET=1: start a process without it")
    names = list(variant.kernel.arg_names)
    source = ASTSource(
        variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={
            (index,): ALIGNMENT
            for index, name in enumerate(names)
            if name in variant.types and name not in variant.unaligned
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)
    registers, spills = _assembled(compiled.asm["ptx"], variant.arch)
    return Resources(registers, spills, compiled.metadata.shared)


def _assembled(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and bytes of spills that ``ptxas`` reports for the only kernel of ``ptx``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        target = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)
        if target is None:
            raise KernelError("the compiled kernel names no target")
        name = target.group(1).rstrip(",")
        command = [_assembler(arch), "-v", f"--gpu-name={name}", str(file), "-o", str(file.with_suffix(".cubin"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    registers, spills = _REGISTERS.search(result.stderr), _SPILLS.search(result.stderr)
    if result.returncode or registers is None or spills is None:
        raise KernelError(f"ptxas refuses a kernel for sm_{arch}: {result.stderr.strip()}")
    return int(registers.group(1)), max(map(int, spills.groups()))


def _assembler(arch: int) -> str:
    """Triton's own ``ptxas``, the newer one where it has two and the architecture needs it."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = tools / "ptxas-blackwell"
    return str(newer if arch >= 90 and newer.is_file() else tools / "ptxas")
