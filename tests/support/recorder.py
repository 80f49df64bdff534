"""A graph device on the CPU with the rules of CUDA graphs: what ran is run again, on the same memory, without Python.

Every operator is noted with the very tensors it took and gave. A replay calls them again in order and puts results
where they were the first time, so that whatever was decided on the host while recording stays as it was decided.
Memory that is only allocated holds not-a-number in every replay.

Kernels that are no operators, like the native ones and Triton's interpreter, write behind its back: a replay would not
run them. Memory that is read though no operator wrote it fails the recording.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")
"""Operators that wait for the device or whose result has a shape that depends on it: a capture on CUDA fails there."""
_ALLOCATIONS = ("aten.empty", "aten.new_empty")
"""What these give has no values yet."""


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._unwritten: set[int] = set()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func).startswith(_FORBIDDEN):
            raise RuntimeError(f"{func} cannot be captured")
        result = func(*args, **(kwargs or {}))
        self._follow(func, args, kwargs or {}, _tensors(result))
        self.calls.append((func, args, kwargs or {}, _tensors(result)))
        return result

    def check(self, tensor: Tensor, reader: object) -> None:
        """Raises RuntimeError: the memory of ``tensor``, which ``reader`` reads, was never written."""
        if _memory(tensor) in self._unwritten:
            raise RuntimeError(f"{reader} reads what no operator wrote: a replay would not write it again")

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
        """Keep account of memory without values; ``calls`` keeps all of it alive."""
        if _is_allocation(func):
            self._unwritten |= {_memory(tensor) for tensor in results}
            return
        arguments = {argument.name: argument for argument in func._schema.arguments}
        given = dict(zip(arguments, args, strict=False)) | kwargs
        written = [name for name in given if (alias := arguments[name].alias_info) is not None and alias.is_write]
        self._unwritten -= {_memory(tensor) for name in written for tensor in _tensors(given[name])}
        views = {_memory(tensor) for tensor in results}
        for tensor in _tensors([value for name, value in given.items() if name not in written]):
            if _memory(tensor) not in views:
                self.check(tensor, func)


@dataclass
class TapeStep:
    """A recorded step; ``num_replays`` counts."""

    tape: _Tape
    output: Tensor
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, results in self.tape.calls:
            if _is_allocation(func):
                for tensor in results:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
                continue
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
        tape.check(output, "the caller")
        step = TapeStep(tape, output)
        self.steps.append(step)
        return step

    @property
    def num_bytes(self) -> int:
        """What the recorded operators gave, each piece of memory once."""
        storages = {
            _memory(tensor): tensor.untyped_storage().nbytes()
            for step in self.steps
            for *_, results in step.tape.calls
            for tensor in results
        }
        return sum(storages.values())


def _is_allocation(func: object) -> bool:
    return str(func).startswith(_ALLOCATIONS)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
