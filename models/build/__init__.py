"""The build: a checkpoint becomes an artifact, one decoder layer in memory at a time."""

from .build_report import BuildReport
from .observer import BuildObserver, SilentObserver
from .pipeline import build_artifact

__all__ = ["BuildObserver", "BuildReport", "SilentObserver", "build_artifact"]
