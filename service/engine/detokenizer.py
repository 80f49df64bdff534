"""From tokens to text as they come: never half a character, never a stop string or the beginning of one.

A token's text depends on its neighbours: bytes of one character are spread over tokens, and a word's leading space is
shown only after another word. So the newest tokens are decoded together with a window of the tokens before them (at
first the prompt's last ones), and what the window's own text does not cover is new. Text that ends in the replacement
character may be an unfinished character: it is held until the next token decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

REPLACEMENT = "\ufffd"
NUM_CONTEXT_TOKENS = 6
"""Prompt tokens that the first output token is decoded after."""
MAX_PENDING_TOKENS = 64
"""Tokens without one finished character after which the text is taken as it is: far more than any character needs."""


class Decoder(Protocol):
    """What detokenization needs of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are no character become U+FFFD."""
        ...


class TokenTexts:
    """A decoder that remembers the texts of single tokens: the context of a token is nearly always the one before it.

    It may come to hold the whole vocabulary, some 100 bytes a token.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._texts: dict[int, str] = {}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See ``Decoder``."""
        if len(ids) != 1 or not skip_special_tokens:
            return self._decoder.decode(ids, skip_special_tokens)
        text = self._texts.get(ids[0])
        if text is None:
            text = self._texts[ids[0]] = self._decoder.decode(ids)
        return text


class Detokenizer:
    """Text of one sequence, piece by piece; control tokens leave none in it unless ``skip_special_tokens`` is False."""

    def __init__(self, decoder: Decoder, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        context = prompt_token_ids[-NUM_CONTEXT_TOKENS:]
        if self._decode(context).endswith(REPLACEMENT):  # the prompt ends inside a character: not ours to finish
            context = []
        self._begin(context)

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` makes certain; often empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(text) <= self._num_emitted or text.endswith(REPLACEMENT):
            return self._hold(text)
        new = text[self._num_emitted :]
        # The tokens that made this text become the context of the next.
        self._begin(self._window[self._num_window_tokens :])
        return new

    def _hold(self, text: str) -> str:
        """Nothing of what is not finished in ``text``, until too many tokens have piled up."""
        if len(self._window) - self._num_window_tokens <= MAX_PENDING_TOKENS:
            return ""
        new = text[self._num_emitted :]
        if new:
            self._begin([])
        else:
            del self._window[self._num_window_tokens :]
        return new

    def _begin(self, context: Sequence[int]) -> None:
        self._window = list(context)
        self._num_window_tokens = len(context)
        self._num_emitted = len(self._decode(context)) if context else 0

    def flush(self) -> str:
        """What is still held, when no token will follow."""
        text = self._decode(self._window)[self._num_emitted :]
        self._num_emitted += len(text)
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, self._skip_special_tokens)


class StopMatcher:
    """Lets text through up to the first stop string, holding back what may become one.

    ``includes_stop`` lets the stop string itself through as well.
    First means completed first, as if the text came character by character: how it is cut into tokens does not matter.
    """

    def __init__(self, stop: Sequence[str], includes_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._includes_stop = includes_stop
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to belong to the output and was not returned before."""
        if not self._stop:
            return text
        if self.is_stopped:
            return ""
        held = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            end, start = min(found)
            return held[: end if self._includes_stop else start]
        num_held = self._num_possible(held)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def flush(self) -> str:
        """What is held, when no text will follow: it did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _num_possible(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


@dataclass(slots=True)
class TextStream:
    """One request's text: detokenized, then matched against its stop strings."""

    detokenizer: Detokenizer
    stop: StopMatcher

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: nothing after it is text of the request."""
        return self.stop.is_stopped

    def push(self, token_id: int) -> str:
        """Text that may be shown after ``token_id``."""
        return self.stop.push(self.detokenizer.push(token_id))

    def flush(self) -> str:
        """The rest of the text, when no token will follow."""
        return self.stop.push(self.detokenizer.flush()) + self.stop.flush()
