"""The directory in which an artifact grows before it bears its name."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArtifactError
from .files import sync_directory, write_bytes
from .format import MANIFEST_FILE
from .layout import TensorError


class PartialDirectory:
    """``NAME.partial`` beside ``NAME``: kept when its identity is ``identity``, else emptied.

    Raises:
        ArtifactError: ``NAME`` is taken, either is something that this tool did not make, or cannot be written.
    """

    def __init__(self, directory: Path, identity: bytes, overwrite: bool) -> None:
        self.directory = directory.resolve()
        self.path = self.directory.with_name(f"{self.directory.name}.partial")
        self.artifact = self.path / "artifact"
        self.progress = self.path / "progress"
        self._replaced = self.path / "replaced"
        self._overwrite = overwrite
        with self.blaming("partial build"):
            self._recover()
        check_target(self.directory, self._overwrite)
        identity_file = self.progress / "build.json"
        with self.blaming("partial build"):
            if not identity_file.is_file() or identity_file.read_bytes() != identity:
                self._clear()
                self.progress.mkdir(parents=True)
                write_bytes(identity_file, identity)
            self.artifact.mkdir(exist_ok=True)

    @contextmanager
    def blaming(self, part: str) -> Iterator[None]:
        """Turn what fails while ``part`` is read or written into an ArtifactError that says what to do."""
        try:
            yield
        except TensorError as problem:
            raise ArtifactError(f"{self.path}: {part}: {problem}; nothing was written for it") from problem
        except OSError as error:
            raise ArtifactError(
                f"{self.path}: {part}: {error}; make room or give access, and start the same build again: "
                "it goes on after the last finished layer"
            ) from error

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every file of the artifact that is not in ``names``: what an interrupted write left."""
        with self.blaming("left-over files"):
            for entry in self.artifact.iterdir():
                if entry.name not in names:
                    entry.unlink()

    def publish(self) -> None:
        """Give the artifact its name. What bore it stays whole until the moment it is replaced.

        Raises:
            ArtifactError: the name was taken meanwhile, or the rename failed; the partial build is kept.
        """
        check_target(self.directory, self._overwrite)
        with self.blaming("giving the artifact its name"):
            sync_directory(self.artifact)
            if self.directory.exists():
                self.directory.rename(self._replaced)
            try:
                self.artifact.rename(self.directory)
            except OSError:
                self._recover()
                raise
            sync_directory(self.directory.parent)
            shutil.rmtree(self.path)

    def _recover(self) -> None:
        """After a replacement that did not come to its end: the former artifact gets its name back, or goes."""
        if self._replaced.exists():
            if self.directory.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.directory)

    def _clear(self) -> None:
        if self.path.exists():
            ours = {self.artifact.name, self.progress.name}
            if not self.path.is_dir() or not {entry.name for entry in self.path.iterdir()} <= ours:
                raise ArtifactError(f"{self.path}: is in the way, and not a partial build; move it elsewhere")
            shutil.rmtree(self.path)


def check_target(directory: Path, overwrite: bool) -> None:
    """Raise ArtifactError when ``directory`` is taken by something that a build may not replace."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not overwrite:
        raise ArtifactError(f"{directory}: exists already; choose another name, or give --overwrite to replace it")
    if not (directory / MANIFEST_FILE).is_file():
        raise ArtifactError(f"{directory}: is not an artifact and will not be replaced; choose another name")
