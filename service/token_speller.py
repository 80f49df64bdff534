"""How single tokens are spelled: as text, and in bytes."""

from typing import Protocol

from .engine.detokenizer import REPLACEMENT, Decoder

ANCHOR = "a"
"""Text before a token that is spelled alone: some tokenizers drop the space at the beginning of a text."""


class SpellingTokenizer(Decoder, Protocol):
    """What spelling single tokens needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for, which need not be whole characters."""
        ...


class TokenSpeller:
    """Texts and bytes of single tokens, remembered: it may come to hold the whole vocabulary."""

    def __init__(self, tokenizer: SpellingTokenizer) -> None:
        self.tokenizer = tokenizer
        self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
        self._texts: dict[int, str] = {}

    def text_of(self, token_id: int) -> str:
        """Text of a token between others; control tokens are spelled out."""
        text = self._texts.get(token_id)
        if text is None:
            before = self.tokenizer.decode(self._anchor, False)
            text = self.tokenizer.decode([*self._anchor, token_id], False)[len(before) :]
            self._texts[token_id] = text
        return text

    def bytes_of(self, token_id: int) -> list[int]:
        """Bytes of a token."""
        text = self.text_of(token_id)
        return list(self.tokenizer.token_bytes(token_id) if REPLACEMENT in text else text.encode())
