"""Log-probabilities as OpenAI's two endpoints write them, and the text that each token has in them.

A token's text is what it adds to the output: those of one output, joined, are its text (up to a stop string, which is
cut out of the text and not out of its tokens). So a token that holds a part of a character has no text, and the one
that completes it has the whole; ``bytes`` has each token's own.
Other tokens, which might have come instead, are spelled as they are alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..engine.detokenizer import REPLACEMENT, Detokenizer
from ..engine.engine import RequestOutput
from ..engine.logprobs import TokenLogprobs
from ..engine.request import Request
from ..token_speller import TokenSpeller

LEAST_LOGPROB = -9999.0
"""For tokens of no probability: JSON has no infinity. OpenAI's value."""


class TokenEntry(NamedTuple):
    """A token of a prompt or an output.

    text:     what it adds
    offset:   characters before it
    is_shown: False: it ended the output and left nothing in it
    logprob:  None for the first token of a prompt, which has nothing to follow from
    """

    token_id: int
    text: str
    offset: int
    is_shown: bool
    logprob: float | None
    top: Sequence[tuple[int, float]]


class ChoiceTokens:
    """Entries of one choice's tokens, as its outputs come.

    echoes: the prompt's tokens come first
    """

    def __init__(self, speller: TokenSpeller, request: Request, echoes: bool) -> None:
        self._request = request
        params = request.params
        self._texts = self._prompt_texts = None
        if params.num_logprobs is not None:
            self._texts = Detokenizer(speller.tokenizer, request.prompt_token_ids, params.skips_special_tokens)
            self._prompt_texts = Detokenizer(speller.tokenizer, (), skip_special_tokens=False) if echoes else None
        self._offset = 0
        self._new: list[TokenEntry] = []

    def add(self, output: RequestOutput) -> None:
        """Take what a step gave."""
        if self._texts is None:  # none are wanted
            return
        for score in output.prompt_logprobs:
            self._add_prompt_token(score)
        if output.token_ids or output.finish_reason:
            self._end_prompt()
        for score in output.logprobs:
            is_shown = not self._request.is_hidden(score.token_id)
            text = self._texts.push(score.token_id) if is_shown else ""
            self._append(score, text, is_shown)
        if output.finish_reason and self._new:
            self._extend_last(self._texts.flush())

    @property
    def has_new(self) -> bool:
        """There are entries since the last ``take``."""
        return bool(self._new)

    def take(self) -> list[TokenEntry]:
        """Entries since the last call."""
        entries, self._new = self._new, []
        return entries

    def _add_prompt_token(self, score: TokenLogprobs) -> None:
        if self._prompt_texts is not None:
            self._begin_prompt(self._prompt_texts)
            self._append(score, self._prompt_texts.push(score.token_id), True)

    def _begin_prompt(self, texts: Detokenizer) -> None:
        if not self._offset and not self._new:
            first = self._request.prompt_token_ids[0]
            self._append(TokenLogprobs(first, 0.0), texts.push(first), True)
            self._new[-1] = self._new[-1]._replace(logprob=None)

    def _end_prompt(self) -> None:
        """The rest of the prompt's text, before the first token that was generated."""
        if self._prompt_texts is not None:
            self._begin_prompt(self._prompt_texts)
            self._extend_last(self._prompt_texts.flush())
            self._prompt_texts = None

    def _append(self, score: TokenLogprobs, text: str, is_shown: bool) -> None:
        self._new.append(TokenEntry(score.token_id, text, self._offset, is_shown, score.logprob, score.top))
        self._offset += len(text)

    def _extend_last(self, text: str) -> None:
        self._new[-1] = self._new[-1]._replace(text=self._new[-1].text + text)
        self._offset += len(text)


def completion_logprobs(speller: TokenSpeller, entries: Iterable[TokenEntry], as_ids: bool) -> dict[str, Any]:
    """``logprobs`` of a completion: parallel lists. A place's ``top_logprobs`` hold its own token as well."""
    entries = list(entries)
    return {
        "tokens": [f"token_id:{item.token_id}" if as_ids else item.text for item in entries],
        "token_logprobs": [None if item.logprob is None else max(item.logprob, LEAST_LOGPROB) for item in entries],
        "top_logprobs": [None if item.logprob is None else _top_by_text(speller, item, as_ids) for item in entries],
        "text_offset": [item.offset for item in entries],
    }


def chat_logprobs(speller: TokenSpeller, entries: Iterable[TokenEntry], as_ids: bool) -> dict[str, Any]:
    """``logprobs`` of a chat's choice: one object per token."""

    def token(token_id: int, text: str, logprob: float, num_bytes: list[int]) -> dict[str, Any]:
        name = f"token_id:{token_id}" if as_ids else text
        return {"token": name, "logprob": max(logprob, LEAST_LOGPROB), "bytes": num_bytes}

    content = [
        {
            **token(item.token_id, item.text, item.logprob or 0.0, speller.bytes_of(item.token_id) * item.is_shown),
            "top_logprobs": [
                token(other, speller.text_of(other), logprob, speller.bytes_of(other)) for other, logprob in item.top
            ],
        }
        for item in entries
    ]
    return {"content": content, "refusal": None}


def _top_by_text(speller: TokenSpeller, entry: TokenEntry, as_ids: bool) -> dict[str, float]:
    """Text -> log-probability, the token itself first; of other tokens that share a text, each goes by its id."""
    own = f"token_id:{entry.token_id}" if as_ids else entry.text
    tops = {own: max(entry.logprob or 0.0, LEAST_LOGPROB)}
    for token_id, logprob in entry.top:
        if token_id == entry.token_id:
            continue
        text = speller.text_of(token_id)
        is_taken = as_ids or text in tops or REPLACEMENT in text
        tops[f"token_id:{token_id}" if is_taken else text] = max(logprob, LEAST_LOGPROB)
    return tops
