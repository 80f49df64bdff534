"""Hidden states on disk: what is read is what was written, and only whole sets count."""

import pytest
import torch

from models.build import spill
from models.build.spill import HiddenFiles, StreamFiles
from models.errors import CalibrationError


def states(seed: int, *rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(number, 3, generator=generator) for number in rows]


def shapes(of: list[torch.Tensor]) -> list[torch.Size]:
    return [state.shape for state in of]


def same(ours: list[torch.Tensor] | None, theirs: list[torch.Tensor]) -> bool:
    return ours is not None and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rows", [(4, 4, 2), (1,), ()])
def test_what_is_read_is_what_was_written_and_stays_so_when_the_file_goes(tmp_path, rows) -> None:
    files, written = HiddenFiles(tmp_path / "hidden"), states(0, *rows)
    assert same(files.write("a", 3, iter(written)), written)
    mapped = HiddenFiles(tmp_path / "hidden").read("a", 3, shapes(written))
    files.keep_only(4)
    assert same(mapped, written)
    assert files.read("a", 3, shapes(written)) is None


def test_states_of_a_later_position_may_come_from_those_of_an_earlier_one(tmp_path) -> None:
    files, first = StreamFiles(HiddenFiles(tmp_path), "a", 0), states(0, 2, 2)
    hidden = files.start(iter(first), shapes(first))
    assert same(files.advance(2 * state for state in hidden), [2 * state for state in first])


def test_only_positions_count_at_which_every_stream_is_whole(tmp_path) -> None:
    files, sizes = HiddenFiles(tmp_path), {"a": 6, "b": 3}
    for position, streams in ((2, "ab"), (4, "ab"), (5, "ab"), (6, "a")):
        for stream in streams:
            files.write(stream, position, states(0, sizes[stream] // 3))
    assert files.last_position(sizes, 9, 1) == 5
    assert files.last_position(sizes, 9, 2) == 4
    assert files.last_position(sizes, 3, 1) == 2
    assert files.last_position({"a": 7, "b": 3}, 9, 1) == 0
    files.keep_only(4)
    assert files.last_position(sizes, 9, 1) == 4


def test_a_write_that_breaks_off_leaves_nothing(tmp_path) -> None:
    files = HiddenFiles(tmp_path)

    def breaks_off():
        yield torch.zeros(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write("a", 1, breaks_off())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_with_what_to_do(tmp_path, monkeypatch) -> None:
    def full(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "atomic_file", full)
    with pytest.raises(CalibrationError, match=r"No space left.*make room, or choose fewer or shorter sequences"):
        HiddenFiles(tmp_path).write("a", 1, [])


def test_a_stream_does_not_begin_in_the_middle_without_its_states(tmp_path) -> None:
    with pytest.raises(CalibrationError, match="before layer 2 are gone"):
        StreamFiles(HiddenFiles(tmp_path), "a", 2).start(iter(()), [torch.Size((2, 3))])
