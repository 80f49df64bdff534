"""Hidden states of the calibration set on their way through the network, between two decoder layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..calibration.data import CalibrationTokens
from ..config import CalibrationConfig
from ..llama.batch import Batch
from ..llama.checkpoint import Checkpoint
from ..llama.model import DecoderLayer, embed
from ..llama.rope import RotaryEmbedding


class HiddenStream:
    """Hidden states of equally long sequences, batch by batch, kept in one copy.

    hidden: list of (batch_size * sequence_length, hidden_size), updated in place by ``advance``
    """

    def __init__(self, batches: list[Batch], hidden: list[Tensor], rotary: RotaryEmbedding) -> None:
        self.batches = batches
        self.hidden = hidden
        self._rotary = rotary

    @classmethod
    def embed(cls, tokens: Tensor, embedding: Tensor, batch_size: int, rotary: RotaryEmbedding) -> Self:
        """The embedded ``tokens`` (num_sequences, sequence_length); ``embedding`` (vocab_size, hidden_size)."""
        chunks = [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]
        batches = [Batch.uncached(chunk, embedding.device) for chunk in chunks]
        return cls(batches, [embed(batch.token_ids, embedding, torch.float32) for batch in batches], rotary)

    def copy(self) -> Self:
        """A stream of the same hidden states that advances on its own."""
        return type(self)(self.batches, [hidden.clone() for hidden in self.hidden], self._rotary)

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return sum(hidden.numel() * hidden.element_size() for hidden in self.hidden)

    def visit(self, layer: DecoderLayer) -> None:
        """Run ``layer`` over the hidden states for the sake of whoever watches it; the stream stays where it is."""
        for _ in self._outputs(layer):
            pass

    def advance(self, layer: DecoderLayer) -> None:
        """Replace the hidden states by ``layer``'s outputs."""
        for index, output in enumerate(self._outputs(layer)):
            self.hidden[index] = output

    def _outputs(self, layer: DecoderLayer) -> Iterator[Tensor]:
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            with torch.inference_mode():
                output: Tensor = layer(hidden, batch, self._rotary(batch, hidden.dtype))
            yield output


@dataclass(frozen=True, slots=True)
class CalibrationStreams:
    """The three streams of one build.

    statistics:        what the layers' input statistics are taken from
    holdout_dense:     the holdout through the dense layers
    holdout_quantized: the holdout through the quantized layers
    """

    statistics: HiddenStream
    holdout_dense: HiddenStream
    holdout_quantized: HiddenStream
    uses_dense_inputs: bool

    @classmethod
    def start(
        cls, checkpoint: Checkpoint, tokens: CalibrationTokens, config: CalibrationConfig, device: torch.device
    ) -> Self:
        """Embed the calibration tokens, with the embedding as the artifact stores it; it is released afterwards."""
        embedding = checkpoint.tensor("model.embed_tokens.weight", narrow=True).to(device)
        rotary = RotaryEmbedding(checkpoint.config, device)
        statistics = HiddenStream.embed(tokens.statistics, embedding, config.batch_size, rotary)
        holdout = HiddenStream.embed(tokens.holdout, embedding, config.batch_size, rotary)
        return cls(statistics, holdout, holdout.copy(), config.inputs == "dense")

    def advance(self, dense: DecoderLayer, quantized: DecoderLayer) -> None:
        """Take every stream through one decoder layer, in its dense or its quantized form."""
        self.statistics.advance(dense if self.uses_dense_inputs else quantized)
        self.holdout_dense.advance(dense)
        self.holdout_quantized.advance(quantized)

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states."""
        return self.statistics.nbytes + self.holdout_dense.nbytes + self.holdout_quantized.nbytes

    @property
    def largest_batch(self) -> int:
        """Tokens of the largest batch."""
        return max((batch.num_tokens for batch in self.statistics.batches), default=0)
