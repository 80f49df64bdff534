"""The operators of a network one by one: time, bytes and multiply-adds of each over all layers.

An operator alone would keep its weights in the processor's caches, where they are not when the others run in between.
So a buffer as large as all weights is read before each repetition, outside the measured time. Each operator makes its
own integers of its input rows; what that costs is measured again by itself, over one strip of weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels.native.factors import RANK_BLOCK
from ..kernels.native.pack import PackedMatrix
from ..kernels.native.program import LinearCall, Program, StepInputs
from ..kernels.native.structs import CACHE_BLOCK, OutputMode
from ..llama.batch import Batch, SequenceSpan
from ..llama.native import NativeLlama
from ..llama.native_cache import NativeKVCache
from ..llama.native_layers import LinearGroup, NativeLayer
from ..llama.native_programs import NativeWeights, attention_shape, buffer_widths, rotary_tables
from ..llama.native_steps import num_blocks_for, steps_of
from .probe import SECONDS, Probe
from .strips import first_strip, matrices_of

OPERATORS = ("qkv", "attention", "o", "gate_up", "down", "head")
INPUTS = "norm + round"
"""What all operators but attention do to their input rows; part of their times."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A step of ``num_sequences`` sequences with ``num_new`` new tokens each, ``context_len`` tokens long after it."""

    name: str
    num_sequences: int
    num_new: int
    context_len: int
    iterations: int

    @property
    def num_rows(self) -> int:
        """New tokens in all."""
        return self.num_sequences * self.num_new


@dataclass(frozen=True, slots=True)
class Work:
    """What an operator does in one step: bytes of weights or cache that it reads, and multiply-adds."""

    num_bytes: int
    multiply_adds: int

    def least_seconds(self, bytes_per_second: float, multiply_adds_per_second: float) -> float:
        """The time it takes where the scarcer of both runs at its peak."""
        return max(self.num_bytes / bytes_per_second, self.multiply_adds / multiply_adds_per_second)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Rows between operators, as wide as each needs them; ``result`` takes what nobody reads."""

    hidden: Tensor
    qkv: Tensor
    attended: Tensor
    inner: Tensor
    result: Tensor


class OperatorBench:
    """The operators of ``network`` in the steps of ``phase``; ``evict`` (n,) uint8 is read in between."""

    def __init__(self, network: NativeLlama, phase: Phase, evict: Tensor) -> None:
        self.phase = phase
        self._network = network
        self._evict = evict
        blocks_each = num_blocks_for(phase.context_len)
        self._tables = [range(i * blocks_each, (i + 1) * blocks_each) for i in range(phase.num_sequences)]
        self._cache = network.new_cache(blocks_each * phase.num_sequences)
        self._rotary = rotary_tables(network.config, phase.context_len)
        self._buffers = self._random_buffers()
        network(self._batch(phase.context_len), self._cache)  # keys and values that are numbers
        self._step = self._step_inputs()

    def probes(self) -> Iterator[Probe]:
        """One per operator."""
        for operator in (*OPERATORS, INPUTS):
            call = self._head_call() if operator == "head" else partial(self._program(operator).run, self._step)
            yield Probe((self.metric(operator),), SECONDS, partial(self._time, call))

    def metric(self, operator: str) -> str:
        """Name of the metric of ``operator``: seconds per step."""
        return f"{self.phase.name}, {operator}"

    def work(self, operator: str) -> Work | None:
        """Of one step; None: nothing that could be compared with a peak."""
        if operator == INPUTS:
            return None
        if operator == "attention":
            return self._attention_work()
        if operator == "head":
            return _linear_work([self._network.weights.head.weight], self.phase.num_sequences)
        layers = self._network.weights.layers
        matrices = [matrix for layer in layers for group in _groups(layer, operator) for matrix in group.matrices]
        return _linear_work(matrices, self.phase.num_rows)

    def _time(self, call: Callable[[], object]) -> tuple[float]:
        """Seconds of one ``call``."""
        seconds = 0.0
        for _ in range(self.phase.iterations):
            self._network.runtime.peak_read(self._evict)
            started = time.perf_counter()
            call()
            seconds += time.perf_counter() - started
        return (seconds / self.phase.iterations,)

    def _head_call(self) -> Callable[[], object]:
        head = self._network.weights.head
        rows = self._buffers.hidden[: self.phase.num_sequences]
        return partial(LinearCall(self._network.runtime, head.weight, head.inputs, head.norm), rows)

    def _program(self, operator: str) -> Program:
        program = Program(self._network.runtime)
        for index, layer in enumerate(self._network.weights.layers):
            if operator == "attention":
                self._add_attention(program, index)
            elif operator == INPUTS:
                self._add_inputs(program, layer)
            else:
                self._add_linear(program, operator, layer)
        return program

    def _add_linear(self, program: Program, operator: str, layer: NativeLayer) -> None:
        b = self._buffers
        x, y = {"qkv": (b.hidden, b.qkv), "o": (b.attended, b.result), "gate_up": (b.hidden, b.inner)}.get(
            operator, (b.inner, b.result)
        )
        norm = {"qkv": layer.input_norm, "gate_up": layer.mlp_norm}.get(operator)
        mode = {"qkv": OutputMode.STORE, "gate_up": OutputMode.SWIGLU}.get(operator, OutputMode.ADD)
        for group in _groups(layer, operator):
            program.linear(group.matrices, group.inputs, x, y, columns=group.columns, norm=norm, mode=mode)

    def _add_attention(self, program: Program, index: int) -> None:
        shape, b = attention_shape(self._network.config, index), self._buffers
        program.attention(shape, self._rotary, self._cache.layer(index), qkv=b.qkv, out=b.attended)

    def _add_inputs(self, program: Program, layer: NativeLayer) -> None:
        b = self._buffers
        for operator, x, norm in (
            ("qkv", b.hidden, layer.input_norm),
            ("o", b.attended, None),
            ("gate_up", b.hidden, layer.mlp_norm),
            ("down", b.inner, None),
        ):
            for group in _groups(layer, operator):
                program.linear([first_strip(group.matrices[0])], group.inputs, x, b.result, norm=norm)

    def _attention_work(self) -> Work:
        config, phase = self._network.config, self.phase
        num_seen = 0
        for index in range(config.num_hidden_layers):
            window = config.window(index) or phase.context_len
            first = phase.context_len - phase.num_new + 1
            num_seen += sum(min(length, window) for length in range(first, phase.context_len + 1))
        pair = 2 * config.num_attention_heads * config.head_dim
        block_bytes = NativeKVCache.bytes_per_block(config, self._network.cache_dtype)
        return Work(
            phase.num_sequences * phase.context_len * block_bytes // CACHE_BLOCK, phase.num_sequences * num_seen * pair
        )

    def _random_buffers(self) -> _Buffers:
        config, num_rows = self._network.config, self.phase.num_rows
        generator = torch.Generator().manual_seed(0)
        widths = (*buffer_widths(config), config.hidden_size)
        return _Buffers(*(torch.randn(num_rows, width, generator=generator) for width in widths))

    def _batch(self, num_new: int) -> Batch:
        phase, config = self.phase, self._network.config
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (phase.num_sequences * num_new,), generator=generator)
        positions = torch.arange(phase.context_len - num_new, phase.context_len).repeat(phase.num_sequences)
        spans = tuple(
            SequenceSpan(i * num_new, num_new, phase.context_len, block_table=table)
            for i, table in enumerate(self._tables)
        )
        return Batch(tokens, positions, spans)

    def _step_inputs(self) -> StepInputs:
        batch = self._batch(self.phase.num_new)
        (step,) = steps_of(batch.token_ids.tolist(), batch.spans, self._tables, batch.num_tokens)
        return step


def step_work(weights: NativeWeights, num_rows: int, num_logits: int) -> Work:
    """What a step of ``num_rows`` tokens, logits for ``num_logits`` of them, does with all weights."""
    *layers, head = matrices_of(weights)
    linears, logits = _linear_work(layers, num_rows), _linear_work([head], num_logits)
    return Work(linears.num_bytes + logits.num_bytes, linears.multiply_adds + logits.multiply_adds)


def _groups(layer: NativeLayer, operator: str) -> Sequence[LinearGroup]:
    return {
        "qkv": layer.qkv,
        "o": (layer.o_proj,),
        "gate_up": (layer.gate_up,),
        "down": (layer.down_proj,),
    }[operator]


def _linear_work(matrices: Sequence[PackedMatrix], num_rows: int) -> Work:
    products = 0
    for matrix in matrices:
        rank = matrix.num_rank_blocks * RANK_BLOCK
        down = rank * matrix.in_features if matrix.down is not None else 0
        products += matrix.out_features * (matrix.in_features + rank) + down
    return Work(sum(matrix.nbytes for matrix in matrices), num_rows * products)
