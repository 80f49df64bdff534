"""``qerve serve`` whose weights a signal damages in memory, as a broken kernel or a flipped bit would; for fault runs.

SIGUSR1 turns the signs of one layer's gains: outputs stay finite and become wrong. SIGUSR2 makes one of them NaN.
The same signal again repairs it. The command line is that of ``qerve``.
"""

import signal
from types import FrameType
from typing import Any

from torch import Tensor, nn

from models.artifact.load import LoadedModel
from service import process
from service.cli import main


def gains_of(model: Any) -> Tensor:
    """The gains of the norm before the middle layer, as the network reads them."""
    if isinstance(model, nn.Module):
        norms = [tensor for name, tensor in model.named_parameters() if "norm" in name]
    else:
        norms = [layer.input_norm.weight for layer in model.weights.layers]
    return norms[len(norms) // 2].data


class Damage:
    """What was done to the gains, and how they were."""

    def __init__(self) -> None:
        self._gains: Tensor | None = None
        self._original: Tensor | None = None

    def watch(self, loaded: LoadedModel) -> LoadedModel:
        """Aim at the network of ``loaded``."""
        self._gains = gains_of(loaded.model)
        return loaded

    def turn_signs(self, *_: int | FrameType | None) -> None:
        """Handler of a signal."""
        self._change(lambda gains: gains.neg_())

    def make_nan(self, *_: int | FrameType | None) -> None:
        """Handler of a signal."""
        self._change(lambda gains: gains[:1].fill_(float("nan")))

    def _change(self, damage: Any) -> None:
        if self._gains is None:
            return
        if self._original is None:
            self._original = self._gains.clone()
            damage(self._gains)
        else:
            self._gains.copy_(self._original)
            self._original = None


def serve_with_damage() -> None:
    """Run the command line with the signals in place."""
    damage, load = Damage(), process.load_artifact
    process.load_artifact = lambda *values, **options: damage.watch(load(*values, **options))  # type: ignore[assignment]
    signal.signal(signal.SIGUSR1, damage.turn_signs)
    signal.signal(signal.SIGUSR2, damage.make_nan)
    main()


if __name__ == "__main__":
    serve_with_damage()
