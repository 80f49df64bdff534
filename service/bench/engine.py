"""The engine as it serves, without HTTP: scheduler, runner, greedy sampler and detokenizer around the network."""

import time
from collections.abc import Callable, Sequence
from itertools import count

import torch

from models.bench.metered import MeteredRuntime
from models.bench.probe import TOKENS_PER_SECOND, Probe, ProbeError
from models.bench.report import KERNELS_ONLY
from models.bench.workload import Workload
from models.llama.network import KVCache, Network

from ..engine.block_manager import BLOCK_SIZE, BlockManager
from ..engine.capacity import step_tokens
from ..engine.engine import Engine, EngineObserver, EngineTokenizer
from ..engine.request import Request, SamplingParams
from ..engine.runner import Runner
from ..engine.scheduler import Scheduler

MIXED_SEQUENCES = 8


class PlainTexts:
    """A tokenizer for networks without one: every token is its number."""

    eos_token_ids: frozenset[int] = frozenset()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Numbers after spaces."""
        return "".join(f" {token}" for token in ids)


def num_blocks_for(workload: Workload, num_sequences: int) -> int:
    """Cache blocks that probes of up to ``num_sequences`` sequences need.

    A prompt starts when there is one more for each sequence that runs, so that all start in the same step.
    """
    decoding = -(-(workload.prompt_len + workload.num_steps + 1) // BLOCK_SIZE)
    return num_sequences * (decoding + 1) + -(-workload.longest // BLOCK_SIZE)


class EngineBench:
    """Engines over one network and cache, a new one for each measurement.

    meter: adds up the seconds inside the native kernels; None: the network does not run on them
    label: behind the names of all metrics, to tell networks apart
    """

    def __init__(
        self,
        network: Network,
        cache: KVCache,
        tokenizer: EngineTokenizer,
        workload: Workload,
        *,
        meter: MeteredRuntime | None,
        label: str = "",
    ) -> None:
        self._network = network
        self._cache = cache
        self._tokenizer = tokenizer
        self._workload = workload
        self._meter = meter
        self._label = f", {label}" if label else ""
        self._ids = count()

    def decode_probe(self, num_sequences: int) -> Probe:
        """Steps of ``num_sequences`` that all decode."""
        name = self._workload.decode(num_sequences)
        return self._probe(name, lambda: self._decode(num_sequences))

    def prefill_probe(self) -> Probe:
        """One long prompt up to its first new token."""
        return self._probe(self._workload.prefill, self._prefill)

    def mixed_probe(self) -> Probe:
        """Seven sequences decode when a long prompt comes in for one new token; all tokens count, its own too."""
        return self._probe("mixed", self._mixed)

    def whole_probe(self, num_sequences: int, name: str) -> Probe:
        """Short prompts from their arrival to their last token: what an HTTP client waits for; new tokens count."""
        return Probe((name + self._label,), TOKENS_PER_SECOND, lambda: (self._whole(num_sequences),))

    def _probe(self, name: str, run: Callable[[], tuple[float, ...]]) -> Probe:
        metric = f"{name}{self._label}"
        metrics = (metric,) if self._meter is None else (metric, f"{metric}, {KERNELS_ONLY}")
        return Probe(metrics, TOKENS_PER_SECOND, run)

    def _decode(self, num_sequences: int) -> tuple[float, ...]:
        engine, work = self._engine(num_sequences), self._workload
        requests = [self._request(engine, work.prompt_len, work.num_steps + 1) for _ in range(num_sequences)]
        while not all(request.output_token_ids for request in requests):
            _step(engine)
        for request in requests:
            if request.num_output_tokens > 1:
                raise ProbeError(f"{num_sequences} prompts do not fit into one step")
        return self._timed(engine, num_sequences * work.num_steps)

    def _prefill(self) -> tuple[float, ...]:
        engine = self._engine(1)
        self._request(engine, self._workload.prefill_len, 1)
        return self._timed(engine, self._workload.prefill_len)

    def _mixed(self) -> tuple[float, ...]:
        engine, work = self._engine(MIXED_SEQUENCES), self._workload
        others = [self._request(engine, work.prompt_len, work.num_steps + 1) for _ in range(MIXED_SEQUENCES - 1)]
        while not all(request.output_token_ids for request in others):
            _step(engine)
        num_before = sum(request.num_output_tokens for request in others)
        self._request(engine, work.prefill_len, 1)
        num_decoded = sum(request.params.max_tokens for request in others) - num_before
        return self._timed(engine, work.prefill_len + num_decoded)

    def _whole(self, num_sequences: int) -> float:
        engine, work = self._engine(num_sequences), self._workload
        started = time.perf_counter()
        for _ in range(num_sequences):
            self._request(engine, work.prompt_len, work.num_steps)
        while engine.has_work:
            _step(engine)
        return num_sequences * work.num_steps / (time.perf_counter() - started)

    def _timed(self, engine: Engine, num_tokens: int) -> tuple[float, ...]:
        """Run ``engine`` to its end: tokens per second, and per second inside the kernels."""
        before = 0.0 if self._meter is None else self._meter.seconds
        started = time.perf_counter()
        while engine.has_work:
            _step(engine)
        rate = num_tokens / (time.perf_counter() - started)
        return (rate,) if self._meter is None else (rate, num_tokens / (self._meter.seconds - before))

    def _engine(self, num_sequences: int) -> Engine:
        # Every prompt is computed, also one that was computed before.
        blocks = BlockManager(self._cache.num_blocks, has_prefix_cache=False)
        budget = max(
            step_tokens("cpu", num_sequences, None), self._workload.longest, num_sequences * self._workload.prompt_len
        )
        scheduler = Scheduler(blocks, num_sequences, budget)
        return Engine(Runner(self._network, self._cache), scheduler, self._tokenizer, EngineObserver())

    def _request(self, engine: Engine, prompt_len: int, max_tokens: int) -> Request:
        number = next(self._ids)
        generator = torch.Generator().manual_seed(number)
        prompt = torch.randint(self._network.config.vocab_size, (prompt_len,), generator=generator).tolist()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"bench-{number}", prompt, params)
        engine.add(request)
        return request


def _step(engine: Engine) -> None:
    for output in engine.step():
        if output.error is not None:
            raise ProbeError(output.error)
