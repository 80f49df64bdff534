"""Text to token ids and back, and messages to a prompt: ``tokenizer.json`` and the settings next to it.

Everything comes from the ``tokenizers`` library and Jinja; transformers, which takes seconds to import, is not needed.
As in transformers 5, ``tokenizer.json`` alone decides which markers surround a text, not ``add_bos_token``.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from ..errors import CheckpointError
from .chat_template import ChatTemplate
from .config_fields import ConfigFields, parse_json_object, read_json_object
from .token_bytes import bytes_of_token
from .tokenizer_files import read_tokenizer_files

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer with its chat template.

    Args:
        backend: the parsed ``tokenizer.json``; changed in place.
        settings: content of ``tokenizer_config.json``; may be empty.
        chat_template: Jinja source, or None.
        eos_token_ids: ids that end a generation, next to the tokenizer's own ``eos_token``.
        where: names the tokenizer in messages.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
        where: str = "tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = _special_tokens(settings)
        own_eos = self._id_of("eos_token")
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_ids = frozenset(eos_token_ids) | ({own_eos} if own_eos is not None else set())
        self._template = None
        if chat_template is not None:
            self._template = ChatTemplate(chat_template, self._special_tokens, where)

    @classmethod
    def from_directory(cls, directory: Path | str) -> Self:
        """Read the tokenizer files, and the end-of-sequence ids of ``generation_config.json``.

        Raises:
            CheckpointError: there is no ``tokenizer.json``, or a file is damaged.
        """
        directory = Path(directory)
        files = read_tokenizer_files(directory)
        stops: Mapping[str, Any] = {}
        # As in transformers, config.json only counts where there is no generation_config.json.
        for name in ("generation_config.json", "config.json"):
            if (directory / name).exists():
                stops = read_json_object(directory / name)
                break
        return cls.from_files(files, stops, str(directory))

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        generation_config: Mapping[str, Any] | None = None,
        where: str = "tokenizer",
    ) -> Self:
        """Build from file name -> content, as in ``Checkpoint.tokenizer_files``.

        Args:
            files: must hold ``tokenizer.json``.
            generation_config: its ``eos_token_id`` (one or a list) joins ``eos_token_ids``.
            where: names the source in messages.

        Raises:
            CheckpointError: ``tokenizer.json`` is missing, or a file is damaged.
        """
        if "tokenizer.json" not in files:
            raise CheckpointError(f"{where}: there is no tokenizer.json")
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if name in files:
                settings.update(parse_json_object(files[name], f"{where}/{name}"))
        stops = ConfigFields(generation_config or {}, f"{where}/generation_config.json").integers("eos_token_id")
        return cls(_parse(files["tokenizer.json"], where), settings, _chat_template(files, settings), stops, where)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can be used."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the embedding may have more rows."""
        return self._backend.get_vocab_size()

    @cached_property
    def max_token_chars(self) -> int:
        """Most characters of text that one token stands for: n tokens never cover more than n times this."""
        return max((len(token) for token in self._backend.get_vocab()), default=0)

    def to_json(self) -> str:
        """The whole tokenizer as the content of a ``tokenizer.json``."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens``, between the markers that the model was trained with.

        Special tokens spelled out in ``text`` become their ids. A rendered chat prompt already has its markers:
        encode it with ``add_special_tokens=False``.

        Raises:
            ValueError: ``text`` holds a lone surrogate, which stands for no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}, "
                "which is not a character: replace it"
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, and ids without a token become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells each of ``ids``; an id without a token is spelled as nothing."""
        return [self._backend.id_to_token(token_id) or "" for token_id in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for, which need not be whole characters; none for an id without a token."""
        return bytes_of_token(self._backend.id_to_token(token_id) or "")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for ``messages``, each with ``role`` and ``content``; ``variables`` are the template's own.

        Raises:
            CheckpointError: there is no chat template, or it is not allowed to run.
            ValueError: the template rejects the messages.
        """
        if self._template is None:
            raise CheckpointError("the model has no chat template; send a plain prompt instead")
        return self._template.render(messages, add_generation_prompt, variables)

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _parse(content: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{where}/tokenizer.json: cannot be read: {error}; fetch the file again") from error


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text, whether the settings spell a token as text or as an object with its properties."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _chat_template(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    """The template file, else the one in the settings; of several named ones, ``default``."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", errors="replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None
