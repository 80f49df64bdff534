"""llama.cpp as the other side of a comparison: a worker process in the environment that has llama-cpp-python."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .probe import TOKENS_PER_SECOND, Probe
from .worker import Worker, WorkerError
from .workload import Workload

LLAMA = "llama.cpp"
_SCRIPT = Path(__file__).with_name("llama_worker.py")
# Set for our own threads; llama.cpp gets the way of waiting that it has by default.
_OWN_VARIABLES = ("OMP_WAIT_POLICY", "PYTHONPATH")


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """gguf: the model's file; python: interpreter that has llama-cpp-python; has_repacking: see ``use_extra_bufts``."""

    gguf: Path
    python: str
    has_repacking: bool = True


def llama_metric(metric: str) -> str:
    """Metric of llama.cpp for the same work as ``metric``."""
    return f"{metric}, {LLAMA}"


class LlamaBench:
    """llama.cpp with ``options.gguf`` loaded.

    Raises:
        WorkerError: it cannot be started, or not load the file.
    """

    def __init__(self, options: LlamaOptions, workload: Workload, threads: int, num_sequences: int) -> None:
        self._workload = workload
        self._is_repacked = options.has_repacking
        self.worker = Worker(LLAMA, [options.python, str(_SCRIPT)], without=_OWN_VARIABLES)
        try:
            answer = self.worker.ask(
                what="open",
                path=str(options.gguf),
                threads=threads,
                num_sequences=num_sequences,
                context_len=workload.longest,
                has_repacking=options.has_repacking,
            )
        except BaseException:
            self.worker.close()
            raise
        self.description = f"{answer['version']}, {options.gguf.name}, {answer['system'].strip()}"

    def decode_probe(self, num_sequences: int) -> Probe:
        """Decoding ``num_sequences`` at a time."""
        work = self._workload
        request = {"num_sequences": num_sequences, "prompt_len": work.prompt_len, "num_steps": work.num_steps}
        return self._probe(work.decode(num_sequences), {"what": "decode", **request})

    def prefill_probe(self) -> Probe:
        """One long prompt."""
        return self._probe(self._workload.prefill, {"what": "prefill", "num_tokens": self._workload.prefill_len})

    def _probe(self, metric: str, request: Mapping[str, Any]) -> Probe:
        return Probe((llama_metric(metric),), TOKENS_PER_SECOND, self._run(request))

    def _run(self, request: Mapping[str, Any]) -> Callable[[], tuple[float]]:
        def run() -> tuple[float]:
            try:
                value = float(self.worker.ask(**request)["value"])
            except WorkerError as error:
                hint = "; --llama-no-repack does without its kernels for this processor" if self._is_repacked else ""
                raise WorkerError(f"{error}{hint}") from error
            self.worker.wait_until_idle()
            return (value,)

        return run
