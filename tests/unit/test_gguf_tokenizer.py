"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizer that was converted."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from models.llama.config_fields import ConfigFields
from models.llama.gguf_tokenizer import build_tokenizer_files
from models.llama.tokenizer import Tokenizer
from tests.support.tiny_checkpoints import CHATML_TEMPLATE, CORPUS, SPECIAL_TOKENS, random_tensors, tiny_config
from tests.support.tiny_gguf import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    byte_level_metadata,
    gguf_tensors,
    model_metadata,
    write_gguf,
)

TEXTS = [
    *CORPUS,
    "",
    "2024 12345 1,234.56 x1y22 ½ ² Ⅷ",
    "I'M we'RE they've IT'S",
    "\n\n  \n\tx  \r\n\r\n y",
    "<|im_start|>user\nhi<|im_end|>\n",
    "e\u0301 e\u0301\u0323 \u1e9b\u0323",
]


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_files(build_tokenizer_files(ConfigFields(metadata, "m.gguf")))


def trained(pre_tokenizer: Any, normalizer: Any = None) -> Backend:
    """A byte-level tokenizer whose merges were learned under ``pre_tokenizer``."""
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text.replace(" ", "  ") for text in TEXTS * 2] + TEXTS * 3, trainer)
    return backend


def split_by(pattern: str) -> Any:
    """How published ``tokenizer.json`` files join a splitting pattern with the byte alphabet."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_splits_digits_before_words(text: str) -> None:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    original = trained(pre_tokenizers.Sequence(steps))
    ours = rebuilt(byte_level_metadata(original, "smollm"))
    ids = original.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken"])
def test_text_is_split_as_transformers_splits_it(pre: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    values = tiny_config(vocab_size=words.get_vocab_size())
    metadata = byte_level_metadata(words, pre) | {"tokenizer.ggml.add_bos_token": False}
    arrays = gguf_tensors(values, random_tensors(values))
    path = write_gguf(tmp_path / "m.gguf", model_metadata(values) | metadata, arrays)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = rebuilt(metadata)
    for text in TEXTS[:-1]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert any("1" in token and "2" in token for token in words.get_vocab()), "no merge that a digit split prevents"


def test_llama3_digits_go_by_threes_and_qwen2_digits_one_by_one() -> None:
    backend = trained(split_by(r"\p{N}{1,3}|[^\p{N}]+"))
    metadata = byte_level_metadata(backend)

    def pieces(pre: str) -> list[str]:
        files = build_tokenizer_files(ConfigFields(metadata | {"tokenizer.ggml.pre": pre}, "m.gguf"))
        splitter = Backend.from_buffer(files["tokenizer.json"]).pre_tokenizer
        return [piece for piece, _ in splitter.pre_tokenize_str("a 12345")]

    assert pieces("llama-bpe") == ["a", "Ġ", "123", "45"]
    assert pieces("qwen2") == ["a", "Ġ", "1", "2", "3", "4", "5"]
    assert pieces("smollm") == ["a", "Ġ", "1", "2", "3", "4", "5"]
    assert pieces("gpt-2") == ["a", "Ġ12345"]


def test_qwen2_composes_characters_first_and_others_do_not() -> None:
    metadata = byte_level_metadata()
    composed, apart = "\u00e9", "e\u0301"
    qwen = rebuilt(metadata | {"tokenizer.ggml.pre": "qwen2"})
    assert qwen.encode(apart) == qwen.encode(composed)
    other = rebuilt(metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})
    assert other.encode(apart) != other.encode(composed)


def test_llama3_takes_a_whole_word_from_the_vocabulary_even_if_no_merge_leads_there() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "ĠZyzzyva"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
    whole = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert rebuilt(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).encode("a Zyzzyva")[-1] == whole
    assert rebuilt(metadata | {"tokenizer.ggml.pre": "qwen2"}).encode("a Zyzzyva")[-1] != whole


@pytest.mark.parametrize(
    ("pre", "settings", "begin", "end"),
    [
        ("smollm", {}, [], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("smollm", {"add_bos_token": True}, [1], []),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_markers_follow_the_file_and_else_the_kind_of_tokenizer(
    pre: str, settings: dict[str, bool], begin: list[int], end: list[int]
) -> None:
    flags = {f"tokenizer.ggml.{name}": value for name, value in settings.items()}
    tokenizer = rebuilt(byte_level_metadata(pre=pre) | flags)
    plain = tokenizer.encode("river", add_special_tokens=False)
    assert tokenizer.encode("river") == [*begin, *plain, *end]


def test_control_tokens_are_special_and_user_defined_ones_are_plain() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>", "  two spaces"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED, USER_DEFINED]
    tokenizer = rebuilt(metadata)
    thinking, spaces = len(metadata["tokenizer.ggml.tokens"]) - 2, len(metadata["tokenizer.ggml.tokens"]) - 1
    ids = tokenizer.encode("x<think>y  two spaces<|im_end|>")
    assert ids.count(thinking) == ids.count(spaces) == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "x<think>y  two spaces"
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])


def test_settings_name_the_special_tokens_and_the_template() -> None:
    files = build_tokenizer_files(ConfigFields(byte_level_metadata(), "m.gguf"))
    written = json.loads(files["tokenizer_config.json"])
    assert written["bos_token"] == "<|im_start|>"
    assert written["eos_token"] == "<|im_end|>"
    assert written["chat_template"] == CHATML_TEMPLATE
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]).endswith("<|im_start|>assistant\n")


def sentencepiece_metadata(has_prefix: bool = True) -> dict[str, Any]:
    """A vocabulary as sentencepiece trains it: bytes, then pieces with falling scores, then single characters."""
    backend = Backend(BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=[], show_progress=False)
    backend.train_from_iterator(CORPUS[:3], trainer)
    model = json.loads(backend.to_str())["model"]
    merged = ["".join(merge) for merge in model["merges"]]
    characters = [token for token in model["vocab"] if token not in merged]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*merged, *characters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *byte_tokens, *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }


def sentencepiece_ids(text: str, metadata: dict[str, Any], has_prefix: bool) -> list[int]:
    """Sentencepiece's rule: join the neighbours whose union has the best score, until none is in the vocabulary."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    index = {token: i for i, token in enumerate(tokens)}
    symbols = list((("▁" if has_prefix else "") + text).replace(" ", "▁")) if text else []
    while True:
        unions = [left + right for left, right in pairwise(symbols)]
        known = [(scores[index[union]], -at) for at, union in enumerate(unions) if union in index]
        if not known:
            break
        at = -max(known)[1]
        symbols[at : at + 2] = [unions[at]]
    ids = []
    for symbol in symbols:
        ids += [index[symbol]] if symbol in index else [3 + byte for byte in symbol.encode()]
    return ids


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(alphabet="".join(sorted(set("".join(CORPUS[:3])))) + "日é", max_size=40), has_prefix=st.booleans())
@example(text=CORPUS[0], has_prefix=True)
@example(text=CORPUS[3], has_prefix=True)
@example(text="", has_prefix=True)
def test_sentencepiece_text_is_cut_by_scores_with_bytes_as_a_last_resort(text: str, has_prefix: bool) -> None:
    metadata = sentencepiece_metadata(has_prefix)
    tokenizer = rebuilt(metadata)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == sentencepiece_ids(text, metadata, has_prefix)
    assert tokenizer.encode(text) == [1, *ids]
    assert tokenizer.decode(ids) == text


def test_sentencepiece_special_tokens_have_their_usual_ids_when_the_file_is_silent() -> None:
    tokenizer = rebuilt(sentencepiece_metadata())
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]


def test_added_tokens_keep_their_place_in_the_vocabulary() -> None:
    metadata = byte_level_metadata()
    files = build_tokenizer_files(ConfigFields(metadata, "m.gguf"))
    backend = Backend.from_buffer(files["tokenizer.json"])
    for index, token in enumerate(metadata["tokenizer.ggml.tokens"]):
        assert backend.token_to_id(token) == index
        assert backend.id_to_token(index) == token
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    assert {index for index, token in added.items() if token.special} == {0, 1, 2}
