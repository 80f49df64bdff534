"""Where a build's calibration tokens come from: nowhere, the model itself, a file, a dataset."""

import torch

from ..calibration.data import CalibrationTokens, cut_sequences, load_calibration_tokens
from ..calibration.generate import generate_tokens
from ..config import CalibrationConfig
from ..device import default_dtype
from ..llama.checkpoint import Checkpoint
from ..llama.tokenizer import Tokenizer
from .observer import BuildObserver


def calibration_tokens(
    checkpoint: Checkpoint, config: CalibrationConfig, device: torch.device, observer: BuildObserver
) -> CalibrationTokens:
    """The tokens that ``config.source`` stands for; none at all for source ``none``.

    Raises:
        CalibrationError: the source cannot be read or is too short.
    """
    if config.source == "none":
        empty = torch.empty(0, config.sequence_length, dtype=torch.int64)
        return CalibrationTokens(empty, empty)
    vocab_size = checkpoint.config.vocab_size
    if config.source == "self":
        num_sequences = config.num_sequences + config.num_holdout
        observer.phase("writing calibration text", num_sequences * config.sequence_length)
        tokens = generate_tokens(
            checkpoint,
            num_sequences,
            config.sequence_length,
            seed=config.seed,
            dtype=default_dtype(device),
            device=device,
            on_progress=lambda done, _total: observer.progress(done),
        )
        return cut_sequences(tokens.cpu(), config, vocab_size)
    observer.phase("reading calibration data", 1)
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files)
    return load_calibration_tokens(config, lambda text: tokenizer.encode(text, add_special_tokens=False), vocab_size)
