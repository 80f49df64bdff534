"""Where the network takes its parameters from: the seam between the network and checkpoints, artifacts, fakes."""

from typing import Protocol

from torch import Tensor, nn


class WeightSource(Protocol):
    """Parameters by Hugging Face names. The network asks for each once, in order, while it is being built.

    Asking in order is what keeps loading lazy: a source may read, repack and release one layer at a time.
    """

    def tensor(self, name: str) -> Tensor:
        """A parameter used as it is, on its final device: ``model.embed_tokens.weight``, norm gains, the head.

        Raises:
            CheckpointError or ArtifactError: it is missing or has the wrong shape.
        """
        ...

    def linear(self, path: str) -> nn.Module:
        """A ready linear layer for module path ``model.layers.0.self_attn.q_proj``: (num_tokens, in) -> (.., out).

        Where the network's configuration lists them under ``vocabulary``, ``model.embed_tokens`` and ``lm_head`` are
        asked for here too: (vocab_size, hidden_size), and the former is a ``LowRankLinear`` that gives single rows. A
        head that is tied to a quantized embedding is asked for right after it.
        """
        ...
