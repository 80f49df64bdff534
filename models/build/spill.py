"""Hidden states of the calibration set on disk, for sets that do not fit in memory.

A file per stream and decoder layer holds the states before that layer, batch after batch, and is mapped: its pages
come when they are read, and the system takes them back when it needs them. A file that is there is whole. Those of the
layer before stay until the next ones are complete, so a build that is killed at any moment goes on from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.files import atomic_file
from ..errors import CalibrationError


class HiddenFiles:
    """The files of one build, in ``directory``, which is made here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, stream: str, position: int, states: Iterable[Tensor]) -> list[Tensor]:
        """Write ``states`` (num_tokens, hidden_size) float32 on the CPU one after the other, and map them.

        Args:
            stream: whose they are.
            position: decoder layer that takes them.
            states: may be read from the files of an earlier position while they are written.

        Raises:
            CalibrationError: the disk is full, or cannot be written.
        """
        path, shapes = self._path(stream, position), []
        try:
            with atomic_file(path) as file:
                for state in states:
                    file.write(state.contiguous().numpy().data)
                    shapes.append(state.shape)
        except OSError as error:
            raise CalibrationError(
                f"{path}: {error}; hidden states of the calibration set do not fit there: make room, or choose fewer "
                "or shorter sequences; the same build goes on after its last finished layer"
            ) from error
        return _mapped(path, shapes)

    def read(self, stream: str, position: int, shapes: Sequence[torch.Size]) -> list[Tensor] | None:
        """What ``write`` wrote, mapped; None: there is none, or not of these ``shapes``."""
        return (
            _mapped(self._path(stream, position), shapes)
            if self._has(stream, position, sum(it.numel() for it in shapes))
            else None
        )

    def last_position(self, num_values: Mapping[str, int], most: int, step: int) -> int:
        """The last position up to ``most`` for which all streams have their files; 0: none.

        Args:
            num_values: of each stream, by its name.
            most: decoder layers that are finished.
            step: only multiples of it count.
        """

        def is_whole(position: int) -> bool:
            return all(self._has(stream, position, number) for stream, number in num_values.items())

        return next(filter(is_whole, range(most - most % step, 0, -step)), 0)

    def keep_only(self, position: int) -> None:
        """Remove the files of every other position. What is mapped stays readable."""
        for path in self.directory.iterdir():
            if not path.name.endswith(_suffix(position)):
                path.unlink()

    def _has(self, stream: str, position: int, num_values: int) -> bool:
        path = self._path(stream, position)
        return path.is_file() and path.stat().st_size == num_values * torch.float32.itemsize

    def _path(self, stream: str, position: int) -> Path:
        return self.directory / f"{stream}{_suffix(position)}"


@dataclass(slots=True)
class StreamFiles:
    """The files of one stream, and the decoder layer that it has come to."""

    files: HiddenFiles
    stream: str
    position: int

    def start(self, states: Iterable[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        """The states before the layer ``position``: those on disk, else, before the first one, ``states``.

        Raises:
            CalibrationError: those before a later layer are not there.
        """
        found = self.files.read(self.stream, self.position, shapes)
        if found is None and self.position > 0:
            raise CalibrationError(
                f"{self.files.directory}: the states of {self.stream} before layer {self.position} "
                "are gone; remove the directory and start the build again"
            )
        return self.files.write(self.stream, self.position, states) if found is None else found

    def advance(self, states: Iterable[Tensor]) -> list[Tensor]:
        """Write what came out of the layer."""
        self.position += 1
        return self.files.write(self.stream, self.position, states)


def _suffix(position: int) -> str:
    return f"-{position:05d}.bin"


def _mapped(path: Path, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The parts of the file, of ``shapes``. Private pages: nothing is written back."""
    sizes = [shape.numel() for shape in shapes]
    if not sum(sizes):
        return [torch.empty(shape) for shape in shapes]
    whole = torch.from_file(str(path), shared=False, size=sum(sizes), dtype=torch.float32)
    return [part.view(shape) for part, shape in zip(torch.split(whole, sizes), shapes, strict=True)]
