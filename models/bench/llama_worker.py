"""Measures llama.cpp when asked, in the environment that has llama-cpp-python: a program of its own, for any Python.

Reads one JSON object per line and answers each with one line, see ``main``. It imports nothing of this package, and
whatever llama.cpp prints goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp


class Measured:
    """A model with one context, kept for all measurements.

    threads:        that compute
    num_sequences:  the most that are decoded together
    context_len:    tokens of each
    has_repacking:  weights may be laid out anew for the processor
    """

    def __init__(self, path: str, threads: int, num_sequences: int, context_len: int, has_repacking: bool) -> None:
        model_params = llama_cpp.llama_model_default_params()
        if not has_repacking:
            model_params.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"{path} cannot be loaded")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_sequences * context_len
        params.n_batch = params.n_ubatch = max(512, context_len)
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = num_sequences
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("there is no memory for the context")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        # Any tokens will do; always the same, far from the special ones at the beginning.
        self._tokens = [10 + (7919 * i) % (vocabulary - 20) for i in range(2 * context_len + num_sequences)]

    def prefill(self, num_tokens: int) -> float:
        """Tokens per second of one prompt, logits of its last token only."""
        self._forget()
        started = time.perf_counter()
        self._run(self._tokens[:num_tokens], range(num_tokens), [0] * num_tokens, every_logit=False)
        return num_tokens / (time.perf_counter() - started)

    def decode(self, num_sequences: int, prompt_len: int, num_steps: int) -> float:
        """Tokens per second of all sequences together, after prompts of ``prompt_len`` tokens."""
        self._forget()
        for sequence in range(num_sequences):
            self._run(self._tokens[:prompt_len], range(prompt_len), [sequence] * prompt_len, every_logit=False)
        started = time.perf_counter()
        for step in range(num_steps):
            tokens = self._tokens[step : step + num_sequences]
            self._run(tokens, [prompt_len + step] * num_sequences, range(num_sequences), every_logit=True)
        return num_steps * num_sequences / (time.perf_counter() - started)

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _run(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], every_logit: bool
    ) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = every_logit or i == len(tokens) - 1
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_synchronize(self._context)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gives {status}")


class Answers:
    """What is asked first opens the model: ``open``; then ``prefill`` and ``decode`` with the arguments of those."""

    def __init__(self) -> None:
        self._measured: Measured | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request; every failure is one too."""
        what = request.pop("what")
        try:
            if what == "open":
                self._measured = Measured(**request)
                system = llama_cpp.llama_print_system_info().decode()
                return {"version": llama_cpp.__version__, "system": system}
            return {"value": getattr(self._measured, what)(**request)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until standard input ends."""
    answers = Answers()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C code prints is no answer
    for line in sys.stdin:
        out.write(json.dumps(answers.answer(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
