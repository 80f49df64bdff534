"""Accidents: flipped bits; truncated, grown, missing and foreign files. Always an ArtifactError that names them."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from models.artifact.reader import ArtifactReader
from models.errors import ArtifactError
from tests.support.artifact_builder import LinearKind, content, mixed_model, refusal, split_shard, write_artifact

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "quantization.json",
    "report.html",
    "tokenizer.json",
)
SHARDS = tuple(name for name in FILES if name.endswith(".safetensors"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("damage") / "art"
    write_artifact(directory, mixed_model(LinearKind()), report=lambda _manifest: b"<html>how it went</html>")
    assert sorted(file.name for file in directory.iterdir()) == list(FILES)
    return directory


def tensor_at(shard: Path, position: int) -> str | None:
    """The tensor that owns a byte of the file; None: the header."""
    header, data = split_shard(shard)
    offset = position - (shard.stat().st_size - len(data))
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] <= offset < entry["data_offsets"][1]:
            return str(name)
    return None


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_the_file_and_tensor_are_named(
    artifact: Path, name: str, where: float, bit: int
) -> None:
    file = artifact / name
    data = bytearray(file.read_bytes())
    position = int(where * len(data))
    tensor = tensor_at(file, position) if name in SHARDS else None
    data[position] ^= 1 << bit
    with content(file, bytes(data)):
        message = refusal(artifact)
    assert str(file) in message
    assert tensor is None or f"tensor {tensor}:" in message


@pytest.mark.parametrize("name", SHARDS)
def test_every_byte_of_a_shards_header_matters(artifact: Path, name: str) -> None:
    file = artifact / name
    data = file.read_bytes()
    header_bytes = len(data) - len(split_shard(file)[1])
    for position in range(0, header_bytes, 31):
        flipped = bytearray(data)
        flipped[position] ^= 1
        with content(file, bytes(flipped)):
            assert str(file) in refusal(artifact)


def test_a_flipped_bit_in_each_tensor_names_that_tensor(artifact: Path) -> None:
    for name in SHARDS:
        file = artifact / name
        header, data = split_shard(file)
        base = file.stat().st_size - len(data)
        with safe_open(file, "pt") as library:
            tensors = list(library.keys())
        for tensor in tensors:
            flipped = bytearray(file.read_bytes())
            flipped[base + header[tensor]["data_offsets"][1] - 1] ^= 0x80
            with content(file, bytes(flipped)):
                assert f"{file}: tensor {tensor}: its bytes do not match" in refusal(artifact)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True))
def test_a_file_truncated_anywhere_is_named(artifact: Path, name: str, where: float) -> None:
    file = artifact / name
    data = file.read_bytes()
    with content(file, data[: int(where * len(data))]):
        message = refusal(artifact)
    assert str(file) in message
    assert name == "quantization.json" or f"but {len(data)} were written" in message


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(FILES), tail=st.binary(min_size=1, max_size=20))
def test_a_file_that_grew_is_named(artifact: Path, name: str, tail: bytes) -> None:
    file = artifact / name
    num_bytes = file.stat().st_size
    with content(file, file.read_bytes() + tail):
        message = refusal(artifact)
    assert str(file) in message
    assert name == "quantization.json" or f"but {num_bytes} were written" in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(artifact: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    (tmp_path / "art" / name).unlink()
    assert str(tmp_path / "art" / name) in refusal(tmp_path / "art")


@pytest.mark.parametrize("name", FILES)
def test_a_directory_or_a_pipe_in_a_files_place_is_refused_without_blocking(
    artifact: Path, tmp_path: Path, name: str
) -> None:
    for make in (Path.mkdir, os.mkfifo):
        copy = tmp_path / make.__name__
        shutil.copytree(artifact, copy)
        (copy / name).unlink()
        make(copy / name)
        assert str(copy / name) in refusal(copy)


def test_two_shards_swapped_are_noticed(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    first, second = (tmp_path / "art" / name for name in SHARDS[:2])
    first.rename(tmp_path / "held")
    second.rename(first)
    (tmp_path / "held").rename(second)
    assert str(first) in refusal(tmp_path / "art")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.PTH", "x.pkl", "x.pickle", "x.ckpt"])
def test_pickled_data_is_refused_by_name(artifact: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    (tmp_path / "art" / name).write_bytes(b"")
    message = refusal(tmp_path / "art")
    assert str(tmp_path / "art" / name) in message
    assert "remove it" in message


def test_a_shard_that_nothing_vouches_for_is_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    shutil.copy(tmp_path / "art" / SHARDS[0], tmp_path / "art" / "extra.safetensors")
    assert "extra.safetensors: nothing vouches for this file" in refusal(tmp_path / "art")


def test_other_files_beside_the_artifact_are_left_alone(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    (tmp_path / "art" / "README.md").write_text("about this model")
    (tmp_path / "art" / ".git").mkdir()
    (tmp_path / "art" / "dangling").symlink_to(tmp_path / "art" / "nowhere")
    (tmp_path / "art" / "loop").symlink_to("loop")
    with ArtifactReader.open(tmp_path / "art") as reader:
        assert "README.md" not in reader.tokenizer_files


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_directory_is_refused_even_to_the_same_content(
    artifact: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    (tmp_path / "art" / name).unlink()
    (tmp_path / "art" / name).symlink_to(artifact / name)
    message = refusal(tmp_path / "art")
    assert f"{tmp_path / 'art' / name}: links to outside" in message


def test_links_inside_the_directory_and_to_it_are_followed(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    (tmp_path / "art" / "tokenizer.json").rename(tmp_path / "art" / "blob")
    (tmp_path / "art" / "tokenizer.json").symlink_to("blob")
    (tmp_path / "link").symlink_to(tmp_path / "art")
    ArtifactReader.open(tmp_path / "link").close()


def test_what_is_no_artifact_at_all_is_said_to_be_none(artifact: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "is a file" in refusal(artifact / "config.json")
    assert "not an artifact" in refusal(tmp_path)


def test_structure_only_leaves_the_tensors_unread_but_not_the_headers(artifact: Path) -> None:
    file = artifact / SHARDS[0]
    data = file.read_bytes()
    with content(file, data[:-1] + bytes([data[-1] ^ 1])):
        ArtifactReader.open(artifact, verify="structure").close()
        refusal(artifact)
    with content(file, data[:8] + b"[" + data[9:]), pytest.raises(ArtifactError, match=SHARDS[0]):
        ArtifactReader.open(artifact, verify="structure")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission_is_named(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "art")
    (tmp_path / "art" / SHARDS[1]).chmod(0)
    assert str(tmp_path / "art" / SHARDS[1]) in refusal(tmp_path / "art")
