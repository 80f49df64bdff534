"""The comparison of beginnings of fine-tuning, in miniature."""

import json
import math
import sys
from pathlib import Path

import pytest

from tests.support.tiny_checkpoints import CORPUS, write_checkpoint
from tools import finetune_init

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(CORPUS * 12), encoding="utf-8")
    arguments = [str(checkpoint), "--text", str(text), "--held-out", str(text), "--out", str(tmp_path / "out")]
    sizes = {"rank": 4, "group-size": 16, "steps": 2, "batch": 2, "length": 24, "num-held-out": 2, "bits": 2}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    chosen = ["--initialisations", "zero", "qera-exact", "--num-calibration", "8", "--evaluate-every", "1"]
    monkeypatch.setattr(sys, "argv", ["finetune_init", *arguments, *options, *chosen])
    finetune_init.main()
    zero, qera = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert (zero["initialisation"], qera["initialisation"]) == ("zero", "qera-exact")
    assert zero["held_out"].keys() == {"0", "1", "2"}
    assert all(math.isfinite(loss) for run in (zero, qera) for loss in run["losses"])
    assert zero["held_out"]["0"] != qera["held_out"]["0"]
    assert "| 2 | `qera-exact` |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "curves.html").stat().st_size > 1000
