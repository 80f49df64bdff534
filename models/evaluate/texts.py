"""Everything ``qerve eval`` says about one text: token perplexity, and per word and byte on request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import EvaluationError
from .corpora import Corpus
from .encoding import TextTokenizer, encode_text
from .perplexity import PerplexityResult, perplexity
from .scoring import MAX_BATCH_TOKENS, ContextModel, context_length
from .word_level import WordPerplexity, word_perplexity

DEFAULT_WINDOW = 1024
"""Tokens; the papers use 2048. A model with a shorter context has windows of that length."""


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How texts are scored.

    window:           tokens per window; None: ``DEFAULT_WINDOW`` or the model's context, whichever is shorter
    stride:           tokens between windows; None: the window
    max_windows:      score the first windows only
    is_word_level:    also perplexity per word and byte
    max_documents:    of these, score the first only
    max_length:       context of the word-level measure; None: the model's
    max_batch_tokens: tokens of one forward pass of the word-level measure
    """

    window: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    is_word_level: bool = False
    max_documents: int | None = None
    max_length: int | None = None
    max_batch_tokens: int = MAX_BATCH_TOKENS

    def check(self) -> None:
        """Raise an EvaluationError for a stride that skips tokens; needs no model."""
        if self.stride is not None and self.stride > (self.window or DEFAULT_WINDOW):
            raise EvaluationError(
                f"stride {self.stride} skips tokens: it must not exceed the window of {self.window or DEFAULT_WINDOW}"
            )


@dataclass(frozen=True, slots=True)
class TextResult:
    """Token perplexity of one text, and the word-level measure if it was asked for."""

    text: str
    convention: str
    window: int
    stride: int
    by_token: PerplexityResult
    by_word: WordPerplexity | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat, for JSON; what is per token and what is per word or byte has names of its own."""
        values: dict[str, Any] = {
            "text": self.text,
            "convention": self.convention,
            "perplexity": self.by_token.perplexity,
            "nll": self.by_token.nll,
            "num_tokens": self.by_token.num_tokens,
            "num_windows": self.by_token.num_windows,
            "window": self.window,
            "stride": self.stride,
        }
        if self.by_word is not None:
            values |= {
                "word_perplexity": self.by_word.word_perplexity,
                "byte_perplexity": self.by_word.byte_perplexity,
                "bits_per_byte": self.by_word.bits_per_byte,
                "num_words": self.by_word.num_words,
                "num_bytes": self.by_word.num_bytes,
                "num_documents": self.by_word.num_documents,
            }
        return values


def score_text(
    model: ContextModel,
    tokenizer: TextTokenizer,
    corpus: Corpus,
    settings: TextSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> TextResult:
    """Score ``corpus``; ``on_progress`` is called with (windows done, all windows), once through for each measure.

    Raises:
        EvaluationError: the text is too short, the window does not fit the model, or the logits are not finite.
    """
    context_length(model, settings.max_length)
    window = context_length(model, settings.window, "window")
    if settings.window is None:
        window = min(DEFAULT_WINDOW, window)
    stride = settings.stride or window
    tokens = corpus.tokens(lambda text: encode_text(tokenizer, text), window)
    by_token = perplexity(
        model, tokens, window=window, stride=stride, max_windows=settings.max_windows, on_window=on_progress
    )
    by_word = None
    if settings.is_word_level:
        by_word = word_perplexity(
            model,
            tokenizer,
            corpus.documents()[: settings.max_documents],
            max_length=settings.max_length,
            max_batch_tokens=settings.max_batch_tokens,
            on_progress=on_progress,
        )
    return TextResult(corpus.name, corpus.convention, window, stride, by_token, by_word)
