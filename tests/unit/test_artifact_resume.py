"""Building an artifact: interrupted and resumed, replaced, refused; a name is given to what is whole, and only then."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.artifact.reader import ArtifactReader
from models.errors import ArtifactError
from tests.support.artifact_builder import (
    TinyModel,
    finish,
    open_writer,
    tiny_model,
    write_artifact,
    write_layer,
)

NUM_LAYERS = 4
PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model() -> TinyModel:
    return tiny_model(num_hidden_layers=NUM_LAYERS)


def interrupted(directory: Path, model: TinyModel, num_layers: int, fingerprint: str = "build") -> Path:
    """A build that ended after ``num_layers`` layers; its partial directory."""
    writer = open_writer(directory, model, fingerprint)
    for layer_index in range(num_layers):
        write_layer(writer, model, layer_index)
    return directory.with_name(f"{directory.name}.partial")


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("num_layers", range(NUM_LAYERS + 1))
def test_a_build_goes_on_after_its_last_finished_layer_and_ends_with_the_same_bytes(
    tmp_path: Path, model: TinyModel, num_layers: int
) -> None:
    write_artifact(tmp_path / "whole", model)
    interrupted(tmp_path / "art", model, num_layers)
    assert not (tmp_path / "art").exists()
    writer = open_writer(tmp_path / "art", model)
    assert writer.finished_layers() == num_layers
    for layer_index in range(num_layers):
        for path, weights in writer.read_layer(layer_index).items():
            assert torch.equal(weights.quantized.codes, model.linears[path].quantized.codes)
    for layer_index in range(num_layers, NUM_LAYERS):
        write_layer(writer, model, layer_index)
    finish(writer, model)
    assert files_of(tmp_path / "art") == files_of(tmp_path / "whole")
    assert not (tmp_path / "art.partial").exists()


def test_a_build_that_only_lacked_its_end_can_be_finished_without_reading_layers(
    tmp_path: Path, model: TinyModel
) -> None:
    interrupted(tmp_path / "art", model, NUM_LAYERS)
    finish(open_writer(tmp_path / "art", model), model)
    ArtifactReader.open(tmp_path / "art").close()


def test_another_build_starts_anew(tmp_path: Path, model: TinyModel) -> None:
    interrupted(tmp_path / "art", model, 2, fingerprint="rank 32")
    assert open_writer(tmp_path / "art", model, "rank 64").finished_layers() == 0
    assert open_writer(tmp_path / "art", model, "rank 32").finished_layers() == 0


def test_another_version_of_the_tool_starts_anew(tmp_path: Path, model: TinyModel) -> None:
    identity = interrupted(tmp_path / "art", model, 2) / "progress" / "build.json"
    values = json.loads(identity.read_bytes())
    identity.write_text(json.dumps({**values, "qerve_version": "0.0.0"}))
    assert open_writer(tmp_path / "art", model).finished_layers() == 0


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


SHARD, PROGRESS = "artifact/model-00002-of-00005.safetensors", "progress/layer-00001.json"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda partial: flip(partial / SHARD),
    "a truncated shard": lambda partial: os.truncate(partial / SHARD, 100),
    "a missing shard": lambda partial: (partial / SHARD).unlink(),
    "a missing record": lambda partial: (partial / PROGRESS).unlink(),
    "a truncated record": lambda partial: os.truncate(partial / PROGRESS, 100),
    "an empty record": lambda partial: os.truncate(partial / PROGRESS, 0),
    "a record that is no record": lambda partial: (partial / PROGRESS).write_text('{"file": 1}'),
    "another layer's record": lambda partial: shutil.copy(partial / "progress/layer-00000.json", partial / PROGRESS),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_finished_layer_that_was_damaged_is_built_again(tmp_path: Path, model: TinyModel, damage: str) -> None:
    write_artifact(tmp_path / "whole", model)
    DAMAGE[damage](interrupted(tmp_path / "art", model, 3))
    writer = open_writer(tmp_path / "art", model)
    assert writer.finished_layers() == 1
    with pytest.raises(ArtifactError, match="decoder layer 1 is not finished"):
        writer.read_layer(1)
    for layer_index in range(1, NUM_LAYERS):
        write_layer(writer, model, layer_index)
    finish(writer, model)
    assert files_of(tmp_path / "art") == files_of(tmp_path / "whole")


def test_what_an_interrupted_write_left_does_not_end_up_in_the_artifact(tmp_path: Path, model: TinyModel) -> None:
    partial = interrupted(tmp_path / "art", model, NUM_LAYERS)
    (partial / "artifact" / ".model-00002-of-00005.safetensors.tmp").write_bytes(b"half")
    finish(open_writer(tmp_path / "art", model), model)
    assert not list((tmp_path / "art").glob(".*"))


def test_a_full_disk_leaves_a_build_that_can_be_resumed(
    tmp_path: Path, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "art", model, 2)
    writer = open_writer(tmp_path / "art", model)

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(ArtifactError, match=r"decoder layer 2: .*No space left.*start the same build again"):
            write_layer(writer, model, 2)
    assert not list((tmp_path / "art.partial" / "artifact").glob(".*"))
    again = open_writer(tmp_path / "art", model)
    assert again.finished_layers() == 2
    for layer_index in range(2, NUM_LAYERS):
        write_layer(again, model, layer_index)
    finish(again, model)
    ArtifactReader.open(tmp_path / "art").close()


def test_an_existing_artifact_is_refused_before_any_work(tmp_path: Path, model: TinyModel) -> None:
    write_artifact(tmp_path / "art", model)
    with pytest.raises(ArtifactError, match="exists already"):
        open_writer(tmp_path / "art", model)
    assert not (tmp_path / "art.partial").exists()


def test_an_artifact_that_appeared_meanwhile_is_not_replaced(tmp_path: Path, model: TinyModel) -> None:
    writer = open_writer(tmp_path / "art", model)
    for layer_index in range(NUM_LAYERS):
        write_layer(writer, model, layer_index)
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "precious").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        finish(writer, model)
    assert files_of(tmp_path / "art") == {"precious": b"mine"}


def test_overwriting_keeps_the_old_artifact_whole_until_the_new_one_is_finished(
    tmp_path: Path, model: TinyModel
) -> None:
    write_artifact(tmp_path / "art", tiny_model(seed=1))
    before = files_of(tmp_path / "art")
    writer = open_writer(tmp_path / "art", model, overwrite=True)
    for layer_index in range(NUM_LAYERS):
        write_layer(writer, model, layer_index)
        assert files_of(tmp_path / "art") == before
    finish(writer, model)
    with ArtifactReader.open(tmp_path / "art") as reader:
        assert reader.config.num_hidden_layers == NUM_LAYERS
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["art"]


def test_an_open_artifact_stays_readable_while_it_is_replaced(tmp_path: Path, model: TinyModel) -> None:
    old = tiny_model(seed=1)
    write_artifact(tmp_path / "art", old)
    with ArtifactReader.open(tmp_path / "art") as reader:
        writer = open_writer(tmp_path / "art", model, overwrite=True)
        for layer_index in range(NUM_LAYERS):
            write_layer(writer, model, layer_index)
        finish(writer, model)
        assert torch.equal(reader.linear(PATH).quantized.codes, old.linears[PATH].quantized.codes)


def test_only_an_artifact_is_ever_overwritten(tmp_path: Path, model: TinyModel) -> None:
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "precious").write_text("mine")
    with pytest.raises(ArtifactError, match="not an artifact"):
        open_writer(tmp_path / "art", model, overwrite=True)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious").write_text("mine")
    with pytest.raises(ArtifactError, match="in the way"):
        open_writer(tmp_path / "other", model)
    assert files_of(tmp_path / "art") == files_of(tmp_path / "other.partial") == {"precious": b"mine"}


def test_an_empty_directory_is_no_obstacle(tmp_path: Path, model: TinyModel) -> None:
    (tmp_path / "art").mkdir()
    write_artifact(tmp_path / "art", model)
    ArtifactReader.open(tmp_path / "art").close()


def test_folders_above_the_artifact_are_made(tmp_path: Path, model: TinyModel) -> None:
    write_artifact(tmp_path / "artifacts" / "new" / "art", model)
    ArtifactReader.open(tmp_path / "artifacts" / "new" / "art").close()


def test_a_replacement_cut_off_between_its_two_renames_gives_the_old_artifact_back(
    tmp_path: Path, model: TinyModel
) -> None:
    write_artifact(tmp_path / "art", model)
    before = files_of(tmp_path / "art")
    partial = interrupted(tmp_path / "next", model, 1).rename(tmp_path / "art.partial")
    (tmp_path / "art").rename(partial / "replaced")
    writer = open_writer(tmp_path / "art", model, overwrite=True)
    assert files_of(tmp_path / "art") == before
    assert writer.finished_layers() == 1


def test_a_half_built_artifact_is_called_unfinished_not_damaged(tmp_path: Path, model: TinyModel) -> None:
    partial = interrupted(tmp_path / "art", model, 2)
    for directory in (tmp_path / "art", partial, partial / "artifact"):
        with pytest.raises(ArtifactError, match="the build is not finished"):
            ArtifactReader.open(directory)
