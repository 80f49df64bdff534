"""The tokenizer in a GGUF file's metadata, written as ``tokenizer.json`` and ``tokenizer_config.json``.

A GGUF file keeps vocabulary, merges or scores, and token types, but names the text splitting only by an identifier
(``tokenizer.ggml.pre``); the regular expressions below are those of the models' own ``tokenizer.json``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..errors import CheckpointError
from .config_fields import ConfigFields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Values of ``tokenizer.ggml.token_type``."""

END_OF_TURN = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>"}
)
"""Control tokens that end a generation, whether or not the file names them as such; as llama.cpp has it."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """split: None for GPT-2's own; adds_bos: what holds when the file does not say."""

    split: str | None = None
    splits_digits: bool = False
    ignores_merges: bool = False
    normalizes_nfc: bool = False
    adds_bos: bool = False

    def build(self) -> Any:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.split is None)
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.splits_digits else []
        if self.split is not None:
            steps.append(pre_tokenizers.Split(Regex(self.split), behavior="isolated"))
        return pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level


_GPT2 = _PreTokenizer()
_DIGITS = _PreTokenizer(splits_digits=True)
_LLAMA3 = _PreTokenizer(_LLAMA3_SPLIT, ignores_merges=True, adds_bos=True)
_LLAMA3_MERGED = _PreTokenizer(_LLAMA3_SPLIT)
_QWEN2 = _PreTokenizer(_QWEN2_SPLIT, normalizes_nfc=True)

PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _LLAMA3_MERGED,
    "smaug-bpe": _LLAMA3_MERGED,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _PreTokenizer(_QWEN2_SPLIT),
    "tekken": _PreTokenizer(_TEKKEN_SPLIT, ignores_merges=True, adds_bos=True),
}
"""``tokenizer.ggml.pre`` -> how text is cut before merging. An unknown one is refused: its tokens would be wrong."""


def build_tokenizer_files(fields: ConfigFields) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json`` for the metadata in ``fields``.

    Raises:
        CheckpointError: the tokenizer is of an unsupported kind, or its tables do not fit together.
    """
    tokens = _list_of(fields, "tokens", str)
    types = _list_of(fields, "token_type", int) if "tokenizer.ggml.token_type" in fields else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{fields.where}: {len(tokens)} tokens but {len(types)} token types")
    model = fields.get("tokenizer.ggml.model")
    is_sentencepiece = model == "llama"
    if model == "gpt2":
        pre = _pre_tokenizer(fields)
        tokenizer, adds_bos = _byte_level(fields, tokens, pre), pre.adds_bos
    elif is_sentencepiece:
        tokenizer, adds_bos = _sentencepiece(fields, tokens, types), True
    else:
        raise CheckpointError(f"{fields.where}: tokenizer model {model!r} is not supported; gpt2 and llama are")
    marked = [(AddedToken(token, normalized=False), kind) for token, kind in zip(tokens, types, strict=True)]
    tokenizer.add_special_tokens([token for token, kind in marked if kind in (CONTROL, UNKNOWN)])
    tokenizer.add_tokens([token for token, kind in marked if kind == USER_DEFINED])
    settings = _settings(fields, tokens, adds_bos, is_sentencepiece)
    bos, eos = (settings.get(f"{name}_token") if settings[f"add_{name}_token"] else None for name in ("bos", "eos"))
    if bos or eos:
        _surround_with_markers(tokenizer, bos, eos)
    content = json.dumps(settings, indent=2, ensure_ascii=False)
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": content.encode()}


def special_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a generation: those the file names, and control tokens known to end a turn."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    known = []
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        known = [index for index, (token, kind) in pairs if kind == CONTROL and token in END_OF_TURN]
    return sorted({token for token in [*named, *known] if isinstance(token, int)})


def _byte_level(fields: ConfigFields, tokens: list[str], pre: _PreTokenizer) -> Tokenizer:
    """Byte-level BPE, as GPT-2, LLaMA 3 and Qwen2 have it."""
    merges = [tuple(merge.split(" ")) for merge in _list_of(fields, "merges", str)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise CheckpointError(
                f"{fields.where}: merge {' '.join(merge)!r} names a token that is not in the vocabulary"
            )
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre.ignores_merges))
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    if pre.normalizes_nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(fields: ConfigFields, tokens: list[str], types: list[int]) -> Tokenizer:
    """Sentencepiece BPE with byte fallback, as LLaMA 1-2 and Mistral have it."""
    scores = _list_of(fields, "scores", float)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{fields.where}: {len(tokens)} tokens but {len(scores)} scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = sorted(
        (-score, index, token)
        for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
        if kind == NORMAL
    )
    merges = []
    for _, _, token in ranked:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        fitting = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        merges.extend(sorted(fitting, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]])))
    unknown = tokens[_token_id(fields, "unknown", len(tokens), default=0) or 0]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types))
    has_prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _settings(fields: ConfigFields, tokens: list[str], adds_bos: bool, is_sentencepiece: bool) -> dict[str, Any]:
    """Content for ``tokenizer_config.json``."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if is_sentencepiece else {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = _token_id(fields, name, len(tokens), defaults.get(name))
        if token_id is not None:
            settings[f"{key}_token"] = tokens[token_id]
    settings["add_bos_token"] = fields.flag("tokenizer.ggml.add_bos_token", adds_bos)
    settings["add_eos_token"] = fields.flag("tokenizer.ggml.add_eos_token", False)
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return settings


def _surround_with_markers(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make ``backend`` put ``bos`` before and ``eos`` after each text; None, or a token it lacks: nothing there."""
    begin, end = ([token] if token and backend.token_to_id(token) is not None else [] for token in (bos, eos))
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*begin, *end])],
    )


def _pre_tokenizer(fields: ConfigFields) -> _PreTokenizer:
    name = fields.get("tokenizer.ggml.pre")
    if name not in tuple(PRE_TOKENIZERS):
        raise CheckpointError(
            f"{fields.where}: tokenizer.ggml.pre is {name!r}, so how text is split is not known; supported are "
            f"{', '.join(PRE_TOKENIZERS)}. Convert the model again with a current llama.cpp, or use its safetensors"
        )
    return PRE_TOKENIZERS[str(name)]


def _token_id(fields: ConfigFields, name: str, num_tokens: int, default: int | None) -> int | None:
    token_id = fields.optional_integer(f"tokenizer.ggml.{name}_token_id")
    if token_id is not None and token_id >= num_tokens:
        raise CheckpointError(f"{fields.where}: the {name} token is {token_id} of {num_tokens} tokens")
    if token_id is None and default is not None and default < num_tokens:
        return default
    return token_id


def _list_of(fields: ConfigFields, name: str, kind: type) -> list[Any]:
    values = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"{fields.where}: tokenizer.ggml.{name} is missing or of the wrong type")
    return values
