"""Fixtures shared by every test: determinism, and the optional inputs that a checkout may lack."""

import os

# Triton decides when it is imported whether kernels run in its interpreter, and torch or transformers may import it.
# Tests of a GPU are run with TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.gpu import why_no_gpu

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_THREADS = 2


def pytest_configure() -> None:
    """Small matrices gain nothing from more threads, and results stay independent of the machine's core count."""
    torch.set_num_threads(min(NUM_THREADS, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of what only a GPU can show are collected everywhere, and say why they do not run."""
    reason = why_no_gpu()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def deterministic_seeds() -> int:
    """Every test starts from the same state of every global generator, whatever ran before it."""
    seed = 0
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real checkpoint of the demo: ``QERVE_DEMO_MODEL``, or the file that `make model` fetches."""
    path = Path(os.environ.get("QERVE_DEMO_MODEL") or DEMO_MODEL)
    if not path.is_file():
        pytest.skip(f"{path.name} is not here: run `make model`, or set QERVE_DEMO_MODEL")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Evaluation texts kept outside the repository: ``QERVE_SHARED_DATA``, or ``../shared/data``."""
    path = Path(os.environ.get("QERVE_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip("the evaluation data is not here: set QERVE_SHARED_DATA to its folder")
    return path
