"""Results on disk: one JSON file per row, written as soon as the row is measured."""

import json
from pathlib import Path

from ..artifact.files import write_bytes
from ..errors import QerveError
from ..plain import finite, from_plain
from ..report.result import RecipeResult


class ResultDirectory:
    """``path/results``; what is in it that cannot be read is as good as absent."""

    def __init__(self, path: Path) -> None:
        self._path = path / "results"

    def read(self, name: str) -> RecipeResult | None:
        """The result of row ``name``; None: there is none that can be used."""
        try:
            values = json.loads(self._file(name).read_text(encoding="utf-8"))
            return from_plain(RecipeResult, values, str(self._file(name)))
        except (OSError, ValueError, QerveError):
            return None

    def write(self, result: RecipeResult) -> None:
        """Keep ``result``, complete or not at all.

        Raises:
            QerveError: it cannot be written.
        """
        write_json(self._file(result.name), result.to_dict())

    def _file(self, name: str) -> Path:
        return self._path / f"{name}.json"


def write_json(path: Path, values: object) -> None:
    """Write ``values`` to ``path``; numbers that JSON cannot hold become null.

    Raises:
        QerveError: it cannot be written.
    """
    write_file(path, (json.dumps(finite(values), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whose directory is made, complete or not at all.

    Raises:
        QerveError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise QerveError(f"{path}: cannot be written: {error}; make room or give access, and start again") from error
