"""Perplexity per word and per byte, as lm-evaluation-harness reports it and QERA's tables quote it.

Every document is scored from its own beginning, each token once, after as much context as fits the model; the sum is
divided by the words or bytes of the original text. Unlike token perplexity, it can be compared across tokenizers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import EvaluationError
from .corpora import Document
from .encoding import TextTokenizer, encode_text, prefix_token
from .scoring import MAX_BATCH_TOKENS, ContextModel, Request, context_length, score_requests


@dataclass(frozen=True, slots=True)
class WordPerplexity:
    """nll: nats, summed over all tokens of all documents; words and bytes are those of the original text."""

    nll: float
    num_tokens: int
    num_words: int
    num_bytes: int
    num_documents: int

    @property
    def word_perplexity(self) -> float:
        """``exp(nll / num_words)``; infinite when that does not fit a float."""
        try:
            return math.exp(self.nll / self.num_words)
        except OverflowError:
            return math.inf

    @property
    def byte_perplexity(self) -> float:
        """``exp(nll / num_bytes)``."""
        return math.exp(self.nll / self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        """``nll / num_bytes / ln 2``."""
        return self.nll / self.num_bytes / math.log(2)


def word_perplexity(
    model: ContextModel,
    tokenizer: TextTokenizer,
    documents: Sequence[Document],
    *,
    max_length: int | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> WordPerplexity:
    """Score ``documents``.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        documents: as ``Corpus.documents`` gives them.
        max_length: tokens per window; None: the model's context length.
        max_batch_tokens: tokens of one forward pass.
        on_progress: called with (windows done, all windows).

    Raises:
        EvaluationError: there is nothing to score, or the model's logits are not finite.
    """
    length = context_length(model, max_length)
    prefix = prefix_token(tokenizer)
    requests = [
        request
        for document in documents
        for request in rolling_windows(encode_text(tokenizer, document.text), prefix, length)
    ]
    if not requests:
        raise EvaluationError("word-level perplexity: the documents hold no text")
    scores = score_requests(model, requests, length, max_batch_tokens=max_batch_tokens, on_progress=on_progress)
    return WordPerplexity(
        nll=-math.fsum(score.log_likelihood for score in scores),
        num_tokens=sum(len(request.continuation) for request in requests),
        num_words=sum(document.num_words for document in documents),
        num_bytes=sum(document.num_bytes for document in documents),
        num_documents=len(documents),
    )


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[Request]:
    """Requests that score each of ``tokens`` once, in windows of ``max_length``.

    The first window follows ``prefix``. Every other one takes the next ``max_length`` tokens; the last is moved back to
    be as long as the others, and scores only what is new in it.
    """
    done = min(max_length, len(tokens))
    if done:
        yield Request((prefix,), tuple(tokens[:done]))
    while done < len(tokens):
        end = min(done + max_length, len(tokens))
        yield Request(tuple(tokens[end - max_length - 1 : done]), tuple(tokens[done:end]))
        done = end
