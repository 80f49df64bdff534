"""The directions of dependency and the size limits of the source tree, checked on its syntax trees.

Every rule is also shown an offending snippet: a rule that cannot fail is worth nothing.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
PICKLE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
# The layers of `models`, lowest first, as far as a rule below names "everything above".
COMMAND_LINE = (
    "models.cli", "models.cli_options", "models.cli_output", "models.cli_eval", "models.cli_plan", "models.cli_compare"
)  # fmt: skip
ABOVE_ARTIFACT = (
    "models.calibration", "models.evaluate", "models.build", "models.compare", "models.report", "models.export",
    "models.bench", *COMMAND_LINE,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the repository root, text and syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> list[str]:
        return self.path.split("/")[:-1]


Rule = Callable[[Source], Iterator[str]]


def parse(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))


def sources() -> list[Source]:
    files = [file for top in ("models", "service") for file in sorted((ROOT / top).rglob("*.py"))]
    return [parse(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def imports(source: Source) -> Iterator[str]:
    """Every dotted name an import could bind: ``from ..a import b`` in package ``p.q`` gives ``p.a`` and ``p.a.b``."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = source.package[: len(source.package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "__import__",
            "import_module",
            "importlib.import_module",
        }:
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def forbid(where: str, *packages: str, unless: str = "") -> Rule:
    """Files that match ``where`` (and not ``unless``) import none of ``packages``."""

    def rule(source: Source) -> Iterator[str]:
        if fnmatch(source.path, where) and not (unless and fnmatch(source.path, unless)):
            for name in dict.fromkeys(imports(source)):
                if any(is_within(name, package) for package in packages):
                    yield f"{source.path} imports {name}"

    return rule


def own_package_is_imported_relatively(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        yield from (f"{source.path} imports {name} absolutely" for name in names if is_within(name, source.package[0]))


def nothing_is_unpickled(source: Source) -> Iterator[str]:
    for name in imports(source):
        if any(is_within(name, banned) for banned in (*PICKLE_MODULES, "torch.load")):
            yield f"{source.path} imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.serialization.load"}:
            yield f"{source.path}:{node.lineno} calls torch.load"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"{source.path}:{node.value.lineno} sets allow_pickle"


def no_remote_code(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "value")]
        if "trust_remote_code" in [name for name in names if isinstance(name, str)]:
            yield f"{source.path} mentions trust_remote_code"


def files_are_short(source: Source) -> Iterator[str]:
    if (num_lines := len(source.text.splitlines())) > MAX_FILE_LINES:
        yield f"{source.path} has {num_lines} lines, more than {MAX_FILE_LINES}"


def functions_are_short(source: Source) -> Iterator[str]:
    if fnmatch(source.path, "models/kernels/*"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield f"{source.path}:{node.lineno} {node.name} has {num_lines} lines, more than {MAX_FUNCTION_LINES}"


def public_names_are_documented(source: Source) -> Iterator[str]:
    if not is_within(source.package[0], "models"):
        return
    for node in source.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{source.path}:{node.lineno} {node.name} has no docstring"


def numerics(part: str, unless: str = "") -> Rule:
    return forbid(
        f"models/{part}/*",
        "transformers", "models.kernels", "models.llama", "models.layers", "models.artifact", *ABOVE_ARTIFACT,
        unless=unless,
    )  # fmt: skip


RULES: dict[str, Rule] = {
    "models knows nothing of serving": forbid(
        "models/*", "service", "fastapi", "prometheus_client", "uvicorn", "starlette"
    ),
    "reconstruct is pure": numerics("reconstruct"),
    "quant is pure": numerics("quant"),
    "transform is pure": numerics("transform"),
    "quant is below reconstruct": forbid("models/quant/*", "models.reconstruct", "models.transform"),
    "kernels are below the network": forbid(
        "models/kernels/*", "models.llama", "models.layers", "models.artifact", *ABOVE_ARTIFACT
    ),
    "layers are below the network": forbid("models/layers/*", "models.llama", "models.artifact", *ABOVE_ARTIFACT),
    "llama is below the artifact": forbid(
        "models/llama/*", "models.artifact", "models.reconstruct", *ABOVE_ARTIFACT
    ),
    "artifact is below the pipeline": forbid("models/artifact/*", *ABOVE_ARTIFACT),
    "budget is pure": numerics("budget", unless="models/budget/cost.py"),
    "calibration is below the pipeline": forbid(
        "models/calibration/*", "models.build", "models.compare", "models.report", *COMMAND_LINE
    ),
    "evaluate is beside the pipeline": forbid(
        "models/evaluate/*", "models.build", "models.compare", "models.report", *COMMAND_LINE
    ),
    "the pipeline knows nothing of comparisons": forbid("models/build/*", "models.compare", *COMMAND_LINE),
    "comparisons know nothing of the command line": forbid("models/compare/*", *COMMAND_LINE),
    "reports compute nothing": forbid(
        "models/report/*", "torch", "models.build", "models.compare", "models.evaluate", "models.calibration",
        "models.llama", "models.kernels", "models.layers", *COMMAND_LINE,
    ),
    "benches measure what is loaded": forbid(
        "models/bench/*", "models.calibration", "models.evaluate", "models.build", "models.compare", "models.report",
        *COMMAND_LINE,
    ),
    "OpenTelemetry stays in its module": forbid("*", "opentelemetry", unless="service/otlp.py"),
    "llama.cpp stays in its worker": forbid("*", "llama_cpp", unless="models/bench/llama_worker.py"),
    "the worker of llama.cpp runs without this package": forbid(
        "models/bench/llama_worker.py", "models", "service", "torch", "numpy", "psutil"
    ),
    "plotly stays in the report": forbid("*", "plotly", unless="models/report/*.py"),
    "the harness stays in its adapter": forbid("*", "lm_eval", unless="models/*[_]eval*.py"),
    "request holds no tensors": forbid("service/engine/request.py", "torch"),
    "block manager holds no tensors": forbid("service/engine/block_manager.py", "torch"),
    "scheduler holds no tensors": forbid("service/engine/scheduler.py", "torch"),
    "triton stays in its kernels": forbid("*", "triton", unless="models/kernels/triton_*.py"),
    "native kernels are called in one place": forbid("models/kernels/*", "ctypes", unless="models/kernels/native/*"),
    "own package is imported relatively": own_package_is_imported_relatively,
    "nothing is unpickled": nothing_is_unpickled,
    "no remote code": no_remote_code,
    "files are short": files_are_short,
    "functions are short": functions_are_short,
    "public names are documented": public_names_are_documented,
}  # fmt: skip

LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
# (rule, path, source that breaks it)
OFFENDERS = [
    ("models knows nothing of serving", "models/llama/model.py", "import service"),
    ("models knows nothing of serving", "models/cli.py", "from service.engine import scheduler"),
    ("models knows nothing of serving", "models/errors.py", "def f():\n    from fastapi import FastAPI"),
    ("models knows nothing of serving", "models/a/b.py", "import prometheus_client.core"),
    ("models knows nothing of serving", "models/a/b.py", "import uvicorn as server"),
    ("models knows nothing of serving", "models/a/b.py", "import starlette"),
    ("reconstruct is pure", "models/reconstruct/qera.py", "from transformers import AutoModel"),
    ("reconstruct is pure", "models/reconstruct/qera.py", "from ..kernels.base import Selection"),
    ("reconstruct is pure", "models/reconstruct/qera.py", "from ..calibration.statistics import Statistic"),
    ("quant is pure", "models/quant/rtn.py", "from ..layers.linear import LowRankLinear"),
    ("quant is pure", "models/quant/rtn.py", "from .. import llama"),
    ("quant is pure", "models/quant/rtn.py", "import importlib\nimportlib.import_module('transformers')"),
    ("transform is pure", "models/transform/permute.py", "from ..artifact import reader"),
    ("quant is below reconstruct", "models/quant/gptq.py", "from ..reconstruct import linalg"),
    ("kernels are below the network", "models/kernels/cpu.py", "from ..llama.kv_cache import PagedKVCache"),
    ("kernels are below the network", "models/kernels/cpu.py", "from ..calibration import collect"),
    ("kernels are below the network", "models/kernels/cpu.py", "from ..artifact.load import load_artifact"),
    ("layers are below the network", "models/layers/linear.py", "from ..llama.config import LlamaConfig"),
    ("llama is below the artifact", "models/llama/model.py", "from ..artifact import reader"),
    ("llama is below the artifact", "models/llama/model.py", "from ..reconstruct.base import Reconstructor"),
    ("llama is below the artifact", "models/llama/model.py", "from .. import build"),
    ("artifact is below the pipeline", "models/artifact/load.py", "from ..evaluate.perplexity import score_window"),
    ("artifact is below the pipeline", "models/artifact/load.py", "from .. import cli"),
    ("calibration is below the pipeline", "models/calibration/data.py", "from ..build import pipeline"),
    ("evaluate is beside the pipeline", "models/evaluate/load.py", "from ..cli import make_cli"),
    ("budget is pure", "models/budget/spectra.py", "from ..llama.model import DecoderLayer"),
    ("the pipeline knows nothing of comparisons", "models/build/pipeline.py", "from ..compare.run import compare"),
    ("comparisons know nothing of the command line", "models/compare/run.py", "from ..cli_output import RichObserver"),
    ("reports compute nothing", "models/report/figures.py", "import torch"),
    ("benches measure what is loaded", "models/bench/peaks.py", "from ..cli_output import progress_bar"),
    ("OpenTelemetry stays in its module", "service/middleware.py", "from opentelemetry import trace"),
    ("llama.cpp stays in its worker", "models/bench/llama.py", "import llama_cpp"),
    ("the worker of llama.cpp runs without this package", "models/bench/llama_worker.py", "from .probe import Probe"),
    ("plotly stays in the report", "models/compare/output.py", "import plotly.graph_objects as go"),
    ("the harness stays in its adapter", "models/evaluate/tasks.py", "import lm_eval"),
    ("request holds no tensors", "service/engine/request.py", "import torch"),
    ("block manager holds no tensors", "service/engine/block_manager.py", "from torch import Tensor"),
    ("scheduler holds no tensors", "service/engine/scheduler.py", "import torch.nn as nn"),
    ("triton stays in its kernels", "models/kernels/cpu.py", "import triton.language as tl"),
    ("triton stays in its kernels", "service/app.py", "import triton"),
    ("native kernels are called in one place", "models/kernels/cpu.py", "from ctypes import CDLL"),
    ("own package is imported relatively", "models/quant/rtn.py", "from models.types import QuantizedWeight"),
    ("own package is imported relatively", "service/app.py", "import service.settings"),
    ("nothing is unpickled", "models/a.py", "import pickle"),
    ("nothing is unpickled", "models/a.py", "import torch\ntorch.load('weights.pt', weights_only=True)"),
    ("nothing is unpickled", "models/a.py", "from torch import load"),
    ("nothing is unpickled", "service/a.py", "import numpy\nnumpy.load('x.npy', allow_pickle=True)"),
    ("no remote code", "models/a.py", "f(trust_remote_code=False)"),
    ("no remote code", "models/a.py", "def f(trust_remote_code): ..."),
    ("no remote code", "models/a.py", "options['trust_remote_code'] = True"),
    ("files are short", "service/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    ("functions are short", "service/a.py", LONG_FUNCTION),
    ("functions are short", "models/a.py", "class A:\n    async " + LONG_FUNCTION.replace("\n", "\n    ")),
    ("public names are documented", "models/a.py", "def f():\n    return 1"),
    ("public names are documented", "models/a/b.py", "class A:\n    x = 1"),
]
# (rule, path, source it must let through)
INNOCENT = [
    ("models knows nothing of serving", "service/app.py", "from fastapi import FastAPI"),
    ("models knows nothing of serving", "models/a.py", "import serviceability"),
    ("quant is pure", "models/quant/rtn.py", "from ..types import QuantizedWeight\nfrom . import affine"),
    ("reconstruct is pure", "models/reconstruct/qera.py", "from ..quant.rtn import quantize_rtn\nimport torch"),
    ("llama is below the artifact", "models/llama/model.py", "from ..layers.linear import DenseLinear"),
    ("triton stays in its kernels", "models/kernels/triton_linear.py", "import triton"),
    ("native kernels are called in one place", "models/kernels/native/library.py", "import ctypes"),
    ("own package is imported relatively", "service/app.py", "from models.errors import QerveError"),
    ("own package is imported relatively", "models/a/b.py", "from ..types import Correction"),
    (
        "nothing is unpickled",
        "models/a.py",
        '"""torch.load is never called."""\nfrom safetensors.torch import load_file',
    ),
    ("files are short", "service/a.py", "x = 1\n" * MAX_FILE_LINES),
    ("functions are short", "service/a.py", LONG_FUNCTION[: -len("    x = 1\n")]),
    ("functions are short", "models/kernels/reference.py", LONG_FUNCTION),
    ("public names are documented", "models/a.py", 'def f():\n    """What it does."""\n\ndef _g(): ...'),
    ("public names are documented", "service/a.py", "def f(): ..."),
]


@pytest.mark.parametrize("name", RULES)
def test_source_tree_keeps_the_rule(name: str) -> None:
    assert [violation for source in sources() for violation in RULES[name](source)] == []


@pytest.mark.parametrize(("name", "path", "text"), OFFENDERS)
def test_rule_catches_an_offender(name: str, path: str, text: str) -> None:
    assert list(RULES[name](parse(path, text)))


@pytest.mark.parametrize(("name", "path", "text"), INNOCENT)
def test_rule_lets_the_innocent_pass(name: str, path: str, text: str) -> None:
    assert list(RULES[name](parse(path, text))) == []


def test_every_rule_is_shown_an_offender() -> None:
    assert {name for name, _, _ in OFFENDERS} == set(RULES)


def test_both_packages_are_looked_at() -> None:
    assert {source.package[0] for source in sources()} == {"models", "service"}
