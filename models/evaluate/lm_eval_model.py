"""The model ``qerve`` of lm-evaluation-harness: its tasks and prompts over our network and our scoring.

Importing this module registers it, and needs the extra ``eval``. Everything that decides a number is shared with
``qerve eval``: encoding, batches, log-likelihoods, rolling windows.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from ..artifact.execution import Activations, CacheDtype, RunOptions
from ..errors import EvaluationError
from .encoding import encode_text, prefix_token
from .generate import generate_greedily
from .load import Evaluated, load_for_evaluation
from .scoring import MAX_BATCH_TOKENS, Request, context_length, score_requests
from .word_level import rolling_windows

MAX_NEW_TOKENS = 256
NUM_TOKEN_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("qerve")
class QerveLM(TemplateLM):  # type: ignore[misc] # the harness is not typed
    """An artifact or dense checkpoint as the harness sees it: ``--model qerve --model_args path=...,dtype=float32``.

    Args:
        path: artifact directory, or any checkpoint that ``qerve eval`` takes.
        device: ``cpu``, ``cuda``, ``cuda:N``; None: cpu. Where its user names no device, the harness
            asks for ``cuda:0``; without CUDA that becomes cpu.
        dtype: type of the activations.
        backend, activations, kv_cache_dtype: as ``qerve eval`` takes them.
        max_length: tokens of a request; None: the model's context length.
        max_batch_tokens: tokens of one forward pass. It takes the place of the harness's batch sizes.
        batch_size, max_batch_size: accepted because the harness passes them; not used.
        loaded: a network that is loaded already, in place of ``path``.

    Raises:
        EvaluationError, ArtifactError, CheckpointError: it cannot be loaded.
    """

    def __init__(
        self,
        path: str = "",
        *,
        device: str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        activations: str = "auto",
        kv_cache_dtype: str = "auto",
        max_length: int | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        loaded: Evaluated | None = None,
    ) -> None:
        super().__init__()
        if loaded is None and not path:
            raise EvaluationError("which model? Give --model_args path=ARTIFACT_OR_CHECKPOINT")
        # The harness reads "16" as a number.
        options = RunOptions(backend, cast(Activations, str(activations)), cast(CacheDtype, kv_cache_dtype))
        self._loaded = loaded or load_for_evaluation(str(path), _usable(device), dtype, options)
        self._name = Path(path).name or "qerve"
        self._max_batch_tokens = max_batch_tokens
        self.max_length = context_length(self._loaded.model, max_length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        tokenizer = self._loaded.tokenizer
        return min(tokenizer.eos_token_ids) if tokenizer.eos_token_ids else prefix_token(tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return prefix_token(self._loaded.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness caches requests."""
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of ``string``, with the markers that the model was trained with unless told otherwise."""
        if add_special_tokens is None:
            return encode_text(self._loaded.tokenizer, string)
        return self._loaded.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Names the template that ``apply_chat_template`` uses: the tokenizer's own, if it is used at all."""
        return "tokenizer's own" if chat_template and self._loaded.tokenizer.has_chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for ``chat_history``.

        Raises:
            CheckpointError: there is no chat template.
        """
        return self._loaded.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text."""
        texts = [request.args[0] for request in requests]
        windows = [
            list(rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)) for text in texts
        ]
        scores = iter(self._score([window for each in windows for window in each]))
        totals = [sum(next(scores)[0] for _ in each) for each in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its stop texts.

        Raises:
            EvaluationError: a task asks for sampling.
        """
        answers = []
        for request in requests:
            context, options = request.args
            answers.append(self._generate(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) != 0:
            raise EvaluationError("the model qerve generates greedily: pass --gen_kwargs do_sample=False")
        limits = [options[name] for name in NUM_TOKEN_OPTIONS if options.get(name) is not None]
        num_new = int(limits[0]) if limits else MAX_NEW_TOKENS
        if num_new >= self.max_length:
            raise EvaluationError(f"{num_new} new tokens leave no room for the prompt in {self.max_length} tokens")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        prompt = self.tok_encode(context)[num_new - self.max_length :] or [self.prefix_token_id]
        tokenizer = self._loaded.tokenizer

        def is_finished(tokens: list[int]) -> bool:
            return tokens[-1] in tokenizer.eos_token_ids or any(stop in tokenizer.decode(tokens) for stop in stops)

        text = tokenizer.decode(generate_greedily(self._loaded.model, prompt, num_new, is_finished))
        for stop in stops:
            text = text.partition(stop)[0]
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        answers = self._score([Request(tuple(context), tuple(continuation)) for _, context, continuation in requests])
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        with tqdm(total=len(requests), desc="qerve: log-likelihoods") as bar:
            scores = score_requests(
                self._loaded.model,
                requests,
                self.max_length,
                max_batch_tokens=self._max_batch_tokens,
                on_progress=lambda done, _: bar.update(done - bar.n),
            )
        return [(score.log_likelihood, score.is_greedy) for score in scores]


def _usable(device: str | None) -> str:
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("no CUDA here: %s becomes cpu", device)
        return "cpu"
    return device or "cpu"
