"""Headers that lie, every hash made right again: what is left to notice is that the parts contradict each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.artifact.shard import MAX_HEADER_BYTES
from tests.support.artifact_builder import (
    LinearKind,
    join_shard,
    refusal,
    sign_again,
    split_shard,
    tiny_model,
    write_artifact,
)

SHARD = "model-00001-of-00003.safetensors"
PATH = "model.layers.0.self_attn.q_proj"
UP, PACKED = f"{PATH}.lora_up", f"{PATH}.weight_packed"
Values = dict[str, Any]
KIND = LinearKind(has_input_scale=True, has_channel_order=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lies") / "art"
    write_artifact(directory, tiny_model(KIND))
    return directory


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "art"))


def entry(**changes: object) -> Callable[[Values], None]:
    """Change the header's entry of ``UP``."""
    return lambda header: header[UP].update(changes)


def move(by: int) -> Callable[[Values], None]:
    """Move ``UP`` in the data without changing its size."""
    return lambda header: header[UP].update(data_offsets=[offset + by for offset in header[UP]["data_offsets"]])


def move_boundary(header: Values) -> None:
    """Give the first bytes of the tensor after ``UP`` to ``UP``: still no gap, no overlap."""
    end = header[UP]["data_offsets"][1]
    follower = next(name for name in header if name != "__metadata__" and header[name]["data_offsets"][0] == end)
    header[UP]["data_offsets"][1] = header[follower]["data_offsets"][0] = end + 2


HEADER_LIES: dict[str, Callable[[Values], object]] = {
    "another shape of the same size": entry(shape=[4, 32]),
    "a shape of more dimensions": entry(shape=[32, 4, 1]),
    "a shape of another size": entry(shape=[32, 5]),
    "a shape whose product overflows 64 bits": entry(shape=[1 << 62, 1 << 62]),
    "a shape with a number beyond 64 bits": entry(shape=[1 << 70, 0]),
    "a negative shape": entry(shape=[-32, -4]),
    "a fractional shape": entry(shape=[32.0, 4]),
    "a boolean shape": entry(shape=[True, 4]),
    "a shape that is no list": entry(shape="32,4"),
    "no elements": entry(shape=[0, 4], data_offsets=[0, 0]),
    "another type of the same size": entry(dtype="F16"),
    "a type of another size": entry(dtype="F32"),
    "an unknown type": entry(dtype="F8_E4M3"),
    "a type that is no text": entry(dtype=["BF16"]),
    "overlapping offsets": move(-2),
    "a gap": move(2),
    "offsets beyond the file": move(1 << 40),
    "a boundary between two tensors moved": move_boundary,
    "negative offsets": move(-(1 << 20)),
    "offsets in reverse": entry(data_offsets=[256, 0]),
    "one offset": entry(data_offsets=[0]),
    "three offsets": entry(data_offsets=[0, 256, 512]),
    "offsets that are no numbers": entry(data_offsets=[None, "256"]),
    "an unknown key": entry(stride=[1]),
    "an entry that is no object": lambda header: header.update({UP: [1, 2]}),
    "an entry without a shape": lambda header: header[UP].pop("shape"),
    "a missing tensor": lambda header: header.pop(UP),
    "two tensors exchanged": lambda header: header.update({UP: header[PACKED], PACKED: header[UP]}),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_lie_in_a_header_names_the_file_and_the_tensor(artifact: Path, lie: str) -> None:
    header, data = split_shard(artifact / SHARD)
    HEADER_LIES[lie](header)
    join_shard(artifact / SHARD, header, data)
    sign_again(artifact)
    message = refusal(artifact)
    assert str(artifact / SHARD) in message
    names = [UP, PACKED] if lie == "two tensors exchanged" else [UP]
    if lie in {"overlapping offsets", "a gap", "no elements", "a missing tensor"}:
        assert "tensor " in message  # the tensor that begins where another should end is as good a culprit
    else:
        assert any(f"tensor {name}:" in message or f"tensor '{name}':" in message for name in names)


def test_a_tensor_too_many_is_named(artifact: Path) -> None:
    header, data = split_shard(artifact / SHARD)
    header["model.layers.0.extra"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    join_shard(artifact / SHARD, header, data + b"abc")
    sign_again(artifact)
    assert "'model.layers.0.extra'" in refusal(artifact)


def test_bytes_after_the_last_tensor_are_refused(artifact: Path) -> None:
    (artifact / SHARD).write_bytes((artifact / SHARD).read_bytes() + b"tail")
    sign_again(artifact)
    assert f"{artifact / SHARD}: the tensors end at byte" in refusal(artifact)


def test_a_header_longer_than_any_real_one_is_not_parsed(artifact: Path) -> None:
    header, data = split_shard(artifact / SHARD)
    join_shard(artifact / SHARD, json.dumps(header).encode().ljust(MAX_HEADER_BYTES + 8), data)
    sign_again(artifact)
    assert f"{artifact / SHARD}: the header claims" in refusal(artifact)


BROKEN_HEADERS = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[1, 2]",
    "invalid UTF-8": b'{"\xff": 1}',
    "a name that occurs twice": b'{"a": {}, "a": {}}',
    "NaN": b'{"a": NaN}',
    "a number beyond float64": b'{"a": 1e999}',
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nested too deep": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nothing but metadata": b'{"__metadata__": {}}',
    "a lone surrogate": b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
}


@pytest.mark.parametrize("kind", BROKEN_HEADERS)
def test_a_broken_header_names_the_file(artifact: Path, kind: str) -> None:
    join_shard(artifact / SHARD, BROKEN_HEADERS[kind], split_shard(artifact / SHARD)[1])
    sign_again(artifact)
    assert str(artifact / SHARD) in refusal(artifact)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_false_header_length_names_the_file(artifact: Path, length: int) -> None:
    data = (artifact / SHARD).read_bytes()
    (artifact / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
    sign_again(artifact)
    assert str(artifact / SHARD) in refusal(artifact)
