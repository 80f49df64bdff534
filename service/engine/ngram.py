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


class _Drafted:
    """A request's index, and its last draft.

    limit:             most tokens of the next draft
    num_tokens:        of the last draft
    num_output_tokens: what the request had when that was made
    """

    def __init__(self, index: NgramIndex, limit: int) -> None:
        self.index = index
        self.limit = limit
        self.num_tokens = 0
        self.num_output_tokens = 0


class Drafter:
    """Drafts for requests, each from its own prompt and output.

    A draft that was right makes the next one up to twice as long, and one that was wrong cuts it to what was right of
    it and one more: where a text does not repeat itself, a step has one row too many, not ``max_tokens``.

    max_tokens: of one draft
    max_ngram:  how many of the last tokens are looked up together, at most
    """

    def __init__(self, max_tokens: int, max_ngram: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"a draft of {max_tokens} tokens is none")
        self._max_tokens = max_tokens
        self._max_ngram = max_ngram
        self._drafted: dict[Request, _Drafted] = {}

    def draft(self, request: Request, room: int) -> list[int]:
        """Up to ``room`` tokens that may follow on those of ``request``, none that it may not have any more."""
        if not request.can_speculate:
            return []
        last = self._drafted.get(request)
        if last is None:
            last = self._drafted[request] = _Drafted(NgramIndex([], self._max_ngram), self._max_tokens)
        last.index.extend(request.tokens_between(len(last.index), request.num_tokens))
        if last.num_tokens:
            num_right = max(0, request.num_output_tokens - last.num_output_tokens - 1)
            last.limit = min(self._max_tokens, 2 * last.limit if num_right == last.num_tokens else num_right + 1)
        num_left = request.params.max_tokens - request.num_output_tokens - 1
        draft = last.index.propose(max(0, min(last.limit, room, num_left)))
        last.num_tokens, last.num_output_tokens = len(draft), request.num_output_tokens
        return draft

    def forget(self, request: Request) -> None:
        """``request`` is done."""
        self._drafted.pop(request, None)
