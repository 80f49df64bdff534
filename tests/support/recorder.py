"""A graph device on the CPU with the rules of CUDA graphs: what ran is run again, on the same memory, without Python.

Every operator is noted with the very tensors it took and gave. A replay calls them again in order and puts results
where they were the first time, so that whatever was decided on the host while recording stays as it was decided.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")
"""Operators that wait for the device or whose result has a shape that depends on it: a capture on CUDA fails there."""


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func).startswith(_FORBIDDEN):
            raise RuntimeError(f"{func} cannot be captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(result)))
        return result


@dataclass
class TapeStep:
    """A recorded step; ``num_replays`` counts."""

    tape: _Tape
    output: Tensor
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, results in self.tape.calls:
            for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordingDevice:
    """A ``GraphDevice``; ``steps`` in the order of recording."""

    def __init__(self) -> None:
        self.steps: list[TapeStep] = []

    def record(self, run: Callable[[], Tensor]) -> TapeStep:
        run()
        with _Tape() as tape:
            output = run()
        step = TapeStep(tape, output)
        self.steps.append(step)
        return step

    @property
    def num_bytes(self) -> int:
        """What the recorded operators gave, each piece of memory once."""
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for step in self.steps
            for *_, results in step.tape.calls
            for tensor in results
        }
        return sum(storages.values())


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
