"""Hidden states of the calibration set on their way through the network, between two decoder layers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from ..calibration.data import CalibrationTokens
from ..config import CalibrationConfig
from ..llama.batch import Batch
from ..llama.checkpoint import Checkpoint
from ..llama.model import embed
from ..llama.rope import RotaryEmbedding
from ..types import QuantizedWeight
from .spill import HiddenFiles, StreamFiles


class HiddenStream:
    """Hidden states of equally long sequences, batch by batch, kept in one copy.

    hidden: list of (batch_size * sequence_length, hidden_size) in the host's memory or in mapped files, replaced by
        ``advance``: only the batch that is inside a layer takes memory of the device
    """

    def __init__(
        self, batches: list[Batch], hidden: list[Tensor], rotary: RotaryEmbedding, files: StreamFiles | None = None
    ) -> None:
        self.batches = batches
        self.hidden = hidden
        self._rotary = rotary
        self._files = files

    @classmethod
    def embed(
        cls,
        tokens: Tensor,
        embedding: Tensor | QuantizedWeight,
        batch_size: int,
        rotary: RotaryEmbedding,
        files: StreamFiles | None = None,
    ) -> Self:
        """The embedded ``tokens`` (num_sequences, sequence_length); ``embedding`` (vocab_size, hidden_size).

        files: where the hidden states are kept, and may be already; None: in memory
        """
        chunks = [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]
        table = embedding.codes if isinstance(embedding, QuantizedWeight) else embedding
        batches = [Batch.uncached(chunk, table.device) for chunk in chunks]
        hidden = (embed(batch.token_ids, embedding, torch.float32).cpu() for batch in batches)
        if files is None:
            return cls(batches, list(hidden), rotary)
        shapes = [torch.Size((batch.num_tokens, table.shape[1])) for batch in batches]
        return cls(batches, files.start(hidden, shapes), rotary, files)

    def copy(self) -> Self:
        """A stream of the same hidden states that advances on its own, in memory."""
        return type(self)(self.batches, self.hidden.copy(), self._rotary)

    def split(self, batch_size: int) -> "HiddenStream":
        """The same hidden states, ``batch_size`` sequences at a time; shares their memory until either advances."""
        batches: list[Batch] = []
        hidden: list[Tensor] = []
        for batch, states in zip(self.batches, self.hidden, strict=True):
            length = batch.spans[0].num_tokens
            for tokens, rows in zip(
                torch.split(batch.token_ids.view(-1, length), batch_size),
                torch.split(states, batch_size * length),
                strict=True,
            ):
                batches.append(Batch.uncached(tokens, tokens.device))
                hidden.append(rows)
        return HiddenStream(batches, hidden, self._rotary)

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return sum(hidden.numel() * hidden.element_size() for hidden in self.hidden)

    @property
    def runs(self) -> list[Callable[[nn.Module], Tensor]]:
        """Per batch: run a decoder layer on the hidden states as they are; the stream stays where it is."""
        return [partial(self._run, index) for index in range(len(self.batches))]

    @property
    def passes(self) -> list[Callable[[nn.Module, Tensor], Tensor]]:
        """Per batch: run a decoder layer on given hidden states (num_tokens, hidden_size), gradients included."""
        return [partial(self._pass, index) for index in range(len(self.batches))]

    def advance(self, layer: nn.Module) -> None:
        """Replace the hidden states by ``layer``'s outputs."""
        outputs = (self._run(index, layer).cpu() for index in range(len(self.batches)))
        if self._files is not None:
            self.hidden = self._files.advance(outputs)
            return
        for index, output in enumerate(outputs):
            self.hidden[index] = output

    @torch.inference_mode()
    def _run(self, index: int, layer: nn.Module) -> Tensor:
        return self._pass(index, layer, self.hidden[index])

    def _pass(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        batch = self.batches[index]
        output: Tensor = layer(hidden.to(batch.token_ids.device), batch, self._rotary(batch, hidden.dtype))
        return output


@dataclass(frozen=True, slots=True)
class CalibrationStreams:
    """The streams of one build.

    statistics:        what the layers' input statistics are taken from, through quantized or dense layers
    target:            the same tokens through the dense layers, where the two are compared; else None
    holdout_dense:     the holdout through the dense layers
    holdout_quantized: the holdout through the quantized layers
    holdout_dense_embedding: the same from the dense embedding; None where the embedding is not quantized
    """

    statistics: HiddenStream
    target: HiddenStream | None
    holdout_dense: HiddenStream
    holdout_quantized: HiddenStream
    uses_dense_inputs: bool
    holdout_dense_embedding: HiddenStream | None = None

    @staticmethod
    def num_values(
        tokens: CalibrationTokens, hidden_size: int, *, has_target: bool, has_quantized_embedding: bool
    ) -> dict[str, int]:
        """Of each stream that ``start`` makes, by the name that its files bear."""
        inputs, holdout = (part.numel() * hidden_size for part in (tokens.statistics, tokens.holdout))
        sizes = {"statistics": inputs, "holdout-dense": holdout, "holdout-quantized": holdout}
        sizes |= {"target": inputs} if has_target else {}
        return sizes | ({"holdout-between": holdout} if has_quantized_embedding else {})

    @classmethod
    def start(
        cls,
        checkpoint: Checkpoint,
        tokens: CalibrationTokens,
        config: CalibrationConfig,
        device: torch.device,
        *,
        has_target: bool = False,
        num_together: int = 0,
        quantized: QuantizedWeight | None = None,
        files: HiddenFiles | None = None,
        position: int = 0,
    ) -> Self:
        """Embed the calibration tokens; the embedding is released afterwards.

        Args:
            checkpoint: the dense network.
            tokens: the calibration set.
            config: of the calibration.
            device: where to compute.
            has_target: the dense layers' outputs are needed.
            num_together: sequences that go through a layer at a time; 0: a batch of ``config``.
            quantized: the embedding as the artifact stores it, on the device; None: like the dense one, at 16 bits.
            files: where the hidden states are kept; None: in memory.
            position: decoder layer from which to go on, where ``files`` have what comes before it.
        """
        dense = checkpoint.tensor("model.embed_tokens.weight", narrow=True).to(device)
        served = dense if quantized is None else quantized
        rotary = RotaryEmbedding(checkpoint.config, device)

        def embedded(name: str, token_ids: Tensor, table: Tensor | QuantizedWeight) -> HiddenStream:
            kept = None if files is None else StreamFiles(files, name, position)
            return HiddenStream.embed(token_ids, table, num_together or config.batch_size, rotary, kept)

        has_dense_inputs = config.inputs == "dense"
        return cls(
            statistics=embedded("statistics", tokens.statistics, dense if has_dense_inputs else served),
            target=embedded("target", tokens.statistics, dense) if has_target else None,
            holdout_dense=embedded("holdout-dense", tokens.holdout, dense),
            holdout_quantized=embedded("holdout-quantized", tokens.holdout, served),
            uses_dense_inputs=has_dense_inputs,
            holdout_dense_embedding=None if quantized is None else embedded("holdout-between", tokens.holdout, dense),
        )

    def advance_target(self, dense: nn.Module) -> None:
        """Take the target through one dense decoder layer: first, since training compares with what comes out."""
        if self.target is not None:
            self.target.advance(dense)

    def advance(self, dense: nn.Module, quantized: nn.Module) -> None:
        """Take every other stream through one decoder layer, in its dense or its quantized form."""
        self.statistics.advance(dense if self.uses_dense_inputs else quantized)
        self.holdout_dense.advance(dense)
        self.holdout_quantized.advance(quantized)
        if self.holdout_dense_embedding is not None:
            self.holdout_dense_embedding.advance(quantized)

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states."""
        holdouts = (self.holdout_dense, self.holdout_quantized, self.holdout_dense_embedding)
        streams = (self.statistics, self.target, *holdouts)
        return sum(stream.nbytes for stream in streams if stream is not None)

    @property
    def largest_batch(self) -> int:
        """Tokens of the largest batch."""
        return max((batch.num_tokens for batch in self.statistics.batches), default=0)
