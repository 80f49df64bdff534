"""Guesses at the next tokens by looking up where the last ones came before: prompt look-up decoding.

What a text repeats (a quoted passage, code that is edited, a name) is often repeated further. The last n tokens, for
the largest n up to some limit that has come before, are found where they came last, and the tokens that followed there
are the draft. The network then computes the draft's rows in one step with the newest token's, and each sampled token
that agrees with the draft makes the next row valid as well: whatever the draft, the text is that without it.
"""

from collections.abc import Sequence

from .request import Request


class NgramIndex:
    """Where each n-gram of a growing text came last, for n = 1 .. ``max_ngram``. O(max_ngram) per token and look-up.

    Every n-gram leads to the token that followed it, so the end of the text, which nothing follows yet, is found only
    if it came before.
    """

    def __init__(self, token_ids: Sequence[int], max_ngram: int) -> None:
        if max_ngram < 1:
            raise ValueError(f"n-grams of up to {max_ngram} tokens cannot be looked up")
        self._tokens: list[int] = []
        self._followers: list[dict[tuple[int, ...], int]] = [{} for _ in range(max_ngram)]
        self.extend(token_ids)

    def __len__(self) -> int:
        """Tokens of the text."""
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the text."""
        tokens = self._tokens
        for token in token_ids:
            position = len(tokens)
            for n, followers in enumerate(self._followers[:position], 1):
                followers[tuple(tokens[-n:])] = position
            tokens.append(token)

    def propose(self, max_tokens: int) -> list[int]:
        """Up to ``max_tokens`` tokens that may follow; none where not even the last token came before.

        What came before may reach to the end of the text: it then repeats itself, and the draft goes on with that.
        """
        tokens = self._tokens
        for n in range(min(len(self._followers), len(tokens)), 0, -1):
            start = self._followers[n - 1].get(tuple(tokens[-n:]))
            if start is not None:
                draft = tokens[start : start + max_tokens]
                period = len(tokens) - start
                while len(draft) < max_tokens:
                    draft.append(draft[len(draft) - period])
                return draft
        return []


class Drafter:
    """Drafts for requests, each from its own prompt and output.

    max_tokens: of one draft
    max_ngram:  how many of the last tokens are looked up together, at most
    """

    def __init__(self, max_tokens: int, max_ngram: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"a draft of {max_tokens} tokens is none")
        self._max_tokens = max_tokens
        self._max_ngram = max_ngram
        self._indexes: dict[Request, NgramIndex] = {}

    def draft(self, request: Request, room: int) -> list[int]:
        """Up to ``room`` tokens that may follow on those of ``request``, none that it may not have any more."""
        num_wanted = min(self._max_tokens, room, request.params.max_tokens - request.num_output_tokens - 1)
        if num_wanted < 1 or not request.can_speculate:
            return []
        index = self._indexes.get(request)
        if index is None:
            index = self._indexes[request] = NgramIndex([], self._max_ngram)
        index.extend(request.tokens_between(len(index), request.num_tokens))
        return index.propose(num_wanted)

    def forget(self, request: Request) -> None:
        """``request`` is done."""
        self._indexes.pop(request, None)
