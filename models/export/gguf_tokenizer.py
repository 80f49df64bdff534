"""A ``tokenizer.json`` as the metadata of a GGUF file: the way back from ``models.llama.gguf_tokenizer``."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from ..errors import ExportError
from ..llama.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED
from ..llama.tokenizer import SPECIAL_TOKENS

UNUSED = 5
"""Type of an id that has no token."""

_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_UNPRINTED = 1e6


def tokenizer_metadata(files: Mapping[str, bytes], vocab_size: int, pre: str | None, where: str) -> dict[str, Any]:
    """Metadata for the tokenizer in ``files``, ``tokenizer.ggml.*`` and the chat template.

    Args:
        files: ``tokenizer.json`` and its companions.
        vocab_size: rows of the embedding; ids beyond the vocabulary get placeholders.
        pre: ``tokenizer.ggml.pre``; None: recognised by how the tokenizer cuts text.
        where: names the tokenizer in messages.

    Raises:
        ExportError: llama.cpp has no such tokenizer, or ``pre`` is needed.
    """
    content = json.loads(files["tokenizer.json"])
    model = content["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"{where}: a tokenizer of type {model.get('type')}; GGUF is written for BPE alone")
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(content, vocab_size)
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if model.get("byte_fallback"):
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        metadata["tokenizer.ggml.scores"] = _scores(tokens, merges)
        metadata["tokenizer.ggml.add_space_prefix"] = "Prepend" in json.dumps(content.get("normalizer"))
    else:
        metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or _recognised(content, where)}
        metadata["tokenizer.ggml.merges"] = merges
    metadata |= _special_ids(settings, {token: index for index, token in enumerate(tokens)})
    metadata |= _markers(files["tokenizer.json"], metadata)
    template = _chat_template(files, settings)
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in content["model"]["vocab"].items():
        is_byte = bool(content["model"].get("byte_fallback")) and token.startswith("<0x") and len(token) == 6
        tokens[index], types[index] = token, BYTE if is_byte else NORMAL
    for added in content.get("added_tokens") or []:
        kind = CONTROL if added["special"] else USER_DEFINED
        if added["content"] == content["model"].get("unk_token"):
            kind = UNKNOWN
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores that make sentencepiece merge in the order of ``merges``: the earlier, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, _UNPRINTED)) for token in tokens]


def _recognised(content: Mapping[str, Any], where: str) -> str:
    """The name under which llama.cpp knows this way of cutting text."""
    found = _steps(content.get("pre_tokenizer"))
    ignores_merges = bool(content["model"].get("ignore_merges", False))
    for name, known in PRE_TOKENIZERS.items():
        example = tokenizers.Tokenizer(tokenizers.models.BPE())
        example.pre_tokenizer = known.build()
        if _steps(json.loads(example.to_str())["pre_tokenizer"]) == found and known.ignores_merges == ignores_merges:
            return name
    raise ExportError(
        f"{where}: how its tokenizer cuts text is none of {', '.join(PRE_TOKENIZERS)}; if llama.cpp knows it by "
        "another name (tokenizer.ggml.pre), give it with --pre-tokenizer"
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[tuple[object, ...]]:
    """What decides where text is cut, step by step."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    keys = ("type", "pattern", "behavior", "invert", "individual_digits", "use_regex", "add_prefix_space")
    return [tuple(json.dumps(pre_tokenizer.get(key)) for key in keys)]


def _special_ids(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name in SPECIAL_TOKENS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if name in _NAMES and text in ids:
            found[f"tokenizer.ggml.{_NAMES[name]}_token_id"] = ids[str(text)]
    return found


def _markers(tokenizer_json: bytes, metadata: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer puts markers around a text: found by having it do so."""
    backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    ids = backend.encode("a").ids
    first, last = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    return {
        "tokenizer.ggml.add_bos_token": first is not None and ids[:1] == [first],
        "tokenizer.ggml.add_eos_token": last is not None and ids[-1:] == [last],
    }


def _chat_template(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
