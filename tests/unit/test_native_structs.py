"""The ctypes structures are those of the C header, byte by byte."""

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from models.kernels.native import structs

HEADER = Path(structs.__file__).parents[1] / "csrc" / "qerve_cpu.h"
STRUCTS = {
    "qerve_activation": structs.Activation,
    "qerve_input": structs.Input,
    "qerve_matrix": structs.Matrix,
    "qerve_source": structs.Source,
    "qerve_linear_op": structs.LinearOp,
    "qerve_attention_op": structs.AttentionOp,
    "qerve_embed_op": structs.EmbedOp,
    "qerve_op": structs.Op,
    "qerve_step": structs.Step,
}
CONSTANTS = {
    "QERVE_ABI_VERSION": structs.ABI_VERSION,
    "QERVE_CACHE_BLOCK": structs.CACHE_BLOCK,
    **{f"QERVE_ACTIVATION_{name}": structs.ActivationKind[member]
       for name, member in (("8", "BITS_8"), ("16", "BITS_16"), ("INT", "INT"), ("MXINT", "MXINT"))},
    **{f"QERVE_OUTPUT_{mode.name}": mode for mode in structs.OutputMode},
    **{f"QERVE_CACHE_{kind.name}": kind for kind in structs.CacheType},
    **{f"QERVE_EMBED_{kind.name}": kind for kind in structs.EmbeddingType},
    **{f"QERVE_OP_{kind.name}": kind for kind in structs.OpKind},
}  # fmt: skip


def layout_in_c(directory: Path) -> dict[str, int]:
    """Sizes, offsets and constants, printed by a program that includes the header."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    numbers = {f"sizeof({name})": f"sizeof({name})" for name in STRUCTS}
    for name, struct in STRUCTS.items():
        numbers |= {f"{name}.{field[0]}": f"offsetof({name}, {field[0]})" for field in struct._fields_}
    numbers |= {name: name for name in CONSTANTS}
    lines = ",\\n".join(f'\\"{name}\\": %ld' for name in numbers)
    values = ", ".join(f"(long){expression}" for expression in numbers.values())
    source = directory / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n'
        f'int main(void) {{ printf("{{{lines}}}", {values}); return 0; }}\n'
    )
    subprocess.run([compiler, str(source), "-o", str(directory / "layout")], check=True)
    return json.loads(subprocess.run([directory / "layout"], check=True, capture_output=True).stdout)


def test_sizes_offsets_and_constants_are_those_of_the_header(tmp_path: Path) -> None:
    expected = {f"sizeof({name})": ctypes.sizeof(struct) for name, struct in STRUCTS.items()}
    for name, struct in STRUCTS.items():
        expected |= {f"{name}.{field[0]}": getattr(struct, field[0]).offset for field in struct._fields_}
    assert layout_in_c(tmp_path) == expected | {name: int(value) for name, value in CONSTANTS.items()}


def test_no_structure_of_the_header_is_left_out() -> None:
    # but the context, which is opaque
    assert set(re.findall(r"^typedef struct (qerve_\w+) \{", HEADER.read_text(), re.MULTILINE)) == set(STRUCTS)
