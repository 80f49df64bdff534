"""Building decoder layers without a build around them."""

import torch

from models.build.recipe import sequences_together
from models.build.stream import CalibrationStreams, HiddenStream
from models.config import BuildConfig
from models.llama.checkpoint import Checkpoint
from models.llama.rope import RotaryEmbedding


class NoWriter:
    """Takes finished layers and keeps nothing."""

    def write_layer(self, *_written: object) -> None:
        pass


def streams_of(checkpoint: Checkpoint, config: BuildConfig, *, has_target: bool) -> CalibrationStreams:
    """Two sequences of random tokens before the first layer, and no holdout."""
    tokens = torch.randint(checkpoint.config.vocab_size, (2, config.calibration.sequence_length))
    embedding = checkpoint.tensor("model.embed_tokens.weight").float()
    rotary = RotaryEmbedding(checkpoint.config, "cpu")
    stream, none = (
        HiddenStream.embed(ids, embedding, sequences_together(config), rotary) for ids in (tokens, tokens[:0])
    )
    target = stream.copy() if has_target else None
    return CalibrationStreams(stream, target, none, none.copy(), uses_dense_inputs=False)
