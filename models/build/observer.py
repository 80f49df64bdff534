"""What a build tells whoever watches it: phases, and progress within a phase."""

from typing import Protocol


class BuildObserver(Protocol):
    """Receives the progress of one build; the command line draws bars from it."""

    def phase(self, name: str, total: int) -> None:
        """A phase of ``total`` steps begins; the one before it is over."""
        ...

    def progress(self, done: int, note: str = "") -> None:
        """``done`` steps of the current phase are finished."""
        ...


class SilentObserver:
    """Watches and says nothing."""

    def phase(self, name: str, total: int) -> None:
        """Ignore the phase."""

    def progress(self, done: int, note: str = "") -> None:
        """Ignore the progress."""
