"""Builds whose hidden states are on disk: the same bytes, also after a kill at any moment."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from models.build import SilentObserver, build_artifact, pipeline
from models.build.ceiling import MemoryNeed
from models.build.layer import LayerBuilder
from models.build.spill import HiddenFiles
from models.config import BuildConfig, CalibrationConfig, ReconstructConfig, TrainingConfig
from models.errors import SchemeError
from models.llama.checkpoint import open_checkpoint
from models.scheme import QuantScheme, VocabularyScheme
from tests.support.builds import digests, write_tokens
from tests.support.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LENGTH, NUM_SEQUENCES, NUM_HOLDOUT, NUM_LAYERS = 24, 6, 2, 4


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    values = tiny_config(num_hidden_layers=NUM_LAYERS, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, random_tensors(values))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    count = (NUM_SEQUENCES + NUM_HOLDOUT) * LENGTH
    path = write_tokens(tmp_path_factory.mktemp("tokens"), count)
    return BuildConfig(
        scheme=QuantScheme(num_bits=3, group_size=32),
        reconstruct=ReconstructConfig("qera-exact", 8),
        calibration=CalibrationConfig(
            source=str(path), num_sequences=NUM_SEQUENCES, sequence_length=LENGTH, batch_size=4, num_holdout=NUM_HOLDOUT
        ),
    )  # fmt: skip


@pytest.fixture
def configs(base):
    trained = replace(
        base, reconstruct=ReconstructConfig("qer", 4), training=TrainingConfig(num_blocks=2, end_to_end_epochs=1)
    )
    return {
        "plain": base,
        "no text": replace(base, reconstruct=ReconstructConfig("none"), calibration=CalibrationConfig("none")),
        "quantized embedding": replace(base, vocabulary=VocabularyScheme(8, 8)),
        "trained, two layers a step": trained,
    }


@pytest.mark.parametrize("name", ["plain", "no text", "quantized embedding", "trained, two layers a step"])
def test_states_on_disk_change_no_byte_and_are_gone_afterwards(checkpoint_dir, configs, tmp_path, name):
    checkpoint = open_checkpoint(str(checkpoint_dir))
    build_artifact(checkpoint, tmp_path / "memory", configs[name])
    build_artifact(checkpoint, tmp_path / "disk", configs[name], spills=True)
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "memory"]


class Interrupted(Exception):
    pass


class InterruptingObserver(SilentObserver):
    def progress(self, done, note=""):
        if done == 2:
            raise Interrupted


@pytest.mark.parametrize("name", ["plain", "trained, two layers a step"])
def test_a_build_goes_on_without_going_through_the_finished_layers(
    checkpoint_dir, configs, tmp_path, monkeypatch, name
):
    checkpoint, real, seen = open_checkpoint(str(checkpoint_dir)), LayerBuilder.step, []
    build_artifact(checkpoint, tmp_path / "whole", configs[name])
    with pytest.raises(Interrupted):
        build_artifact(checkpoint, tmp_path / "a", configs[name], spills=True, observer=InterruptingObserver())

    def counting(self, indices, *args, **options):
        seen.extend(indices)
        return real(self, indices, *args, **options)

    monkeypatch.setattr(LayerBuilder, "step", counting)
    report = build_artifact(checkpoint, tmp_path / "a", configs[name], spills=True)
    assert seen == [2, 3]
    assert report.num_resumed_layers == 2
    assert digests(tmp_path / "whole") == digests(tmp_path / "a")


def test_a_build_whose_states_were_in_memory_goes_on_with_them_on_disk(checkpoint_dir, base, tmp_path):
    checkpoint = open_checkpoint(str(checkpoint_dir))
    build_artifact(checkpoint, tmp_path / "whole", base)
    with pytest.raises(Interrupted):
        build_artifact(checkpoint, tmp_path / "a", base, observer=InterruptingObserver())
    build_artifact(checkpoint, tmp_path / "a", base, spills=True)
    assert digests(tmp_path / "whole") == digests(tmp_path / "a")


def test_too_little_memory_is_refused_before_anything_is_read(checkpoint_dir, base, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(checkpoint_dir))
    monkeypatch.setattr(type(checkpoint), "tensor", None)
    with pytest.raises(SchemeError, match=r"max_memory 0\.01 GiB: this build takes about"):
        build_artifact(checkpoint, tmp_path / "a", base, max_memory=10 << 20)
    assert list(tmp_path.iterdir()) == []


def test_a_ceiling_that_the_hidden_states_would_break_puts_them_on_disk(checkpoint_dir, base, tmp_path, monkeypatch):
    needs, written = MemoryNeed(100, "quantizing", 50, 25, None), []
    monkeypatch.setattr(pipeline, "memory_need", lambda *_: needs)
    monkeypatch.setattr(HiddenFiles, "keep_only", lambda _self, position: written.append(position))
    build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / "a", base, max_memory=174)
    assert written == [1, 2, 3, 4]
    written.clear()
    build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / "b", base, max_memory=175)
    assert written == []
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5, 0.9])
def test_a_build_that_is_killed_goes_on_to_the_same_bytes(checkpoint_dir, base, tmp_path, seconds):
    """SIGKILL, so many seconds after the first hidden states are there."""
    checkpoint = open_checkpoint(str(checkpoint_dir))
    build_artifact(checkpoint, tmp_path / "whole", base)
    base.write(tmp_path / "config.toml")
    code = (
        "import sys; from models.build import build_artifact; from models.config import BuildConfig;"
        "from models.llama.checkpoint import open_checkpoint; from pathlib import Path;"
        "build_artifact(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), BuildConfig.read(Path(sys.argv[3])),"
        " spills=True)"
    )
    command = [sys.executable, "-c", code, str(checkpoint_dir), str(tmp_path / "a"), str(tmp_path / "config.toml")]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None and not (tmp_path / "a.partial" / "progress" / "hidden").is_dir():
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    if not (tmp_path / "a").exists():
        build_artifact(checkpoint, tmp_path / "a", base, spills=True)
    assert digests(tmp_path / "whole") == digests(tmp_path / "a")
