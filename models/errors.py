"""The exception tree: one base class per "who can fix it".

    QerveError
    ├── CheckpointError    the input checkpoint or its tokenizer: missing file, unsupported architecture, pickle format
    ├── CalibrationError   the calibration data or the statistics taken from it
    ├── SchemeError        a requested scheme, method or option that cannot be carried out
    ├── ArtifactError      an artifact on disk: damaged, truncated, inconsistent, of another format version
    ├── KernelError        no kernel backend can run a layer on this device
    ├── EvaluationError    the text or token ids to evaluate
    └── ExportError        the target format cannot express the artifact

A message says what is wrong, where (layer, file, tensor), and what to do about it.
"""


class QerveError(Exception):
    """Base of every error that qerve raises on purpose; the CLI prints its message without a traceback."""


class CheckpointError(QerveError):
    """The input checkpoint cannot be used."""


class CalibrationError(QerveError):
    """The calibration data or a statistic taken from it cannot be used."""


class SchemeError(QerveError):
    """A quantization scheme, method or option cannot be carried out."""


class ArtifactError(QerveError):
    """An artifact on disk is damaged, inconsistent or of another version."""


class KernelError(QerveError):
    """No kernel backend can run a layer."""


class EvaluationError(QerveError):
    """The text or the token ids to evaluate cannot be used."""


class ExportError(QerveError):
    """The target format cannot express the artifact."""
