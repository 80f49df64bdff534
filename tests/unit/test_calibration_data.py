"""Calibration tokens: every source, how they are cut, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from models.calibration.data import CalibrationTokens, cut_sequences, encode_beginning, load_calibration_tokens
from models.config import CalibrationConfig
from models.errors import CalibrationError
from tests.support.tiny_checkpoints import CORPUS, train_tokenizer


def encode(text):
    return list(text.encode())


def config(source, num_sequences=2, sequence_length=4, num_holdout=1):
    return CalibrationConfig(
        source=str(source), num_sequences=num_sequences, sequence_length=sequence_length, num_holdout=num_holdout
    )


def load(source, vocab_size=256, **options):
    return load_calibration_tokens(config(source, **options), encode, vocab_size)


def test_text_is_cut_in_order_and_the_holdout_follows_the_statistics(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnop", encoding="utf-8")
    tokens = load(path)
    assert bytes(tokens.statistics.flatten().tolist()) == b"abcdefgh"
    assert bytes(tokens.holdout.flatten().tolist()) == b"ijkl"
    assert tokens.statistics.shape == (2, 4)


def test_jsonl_rows_are_joined_by_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"id": 1, "text": text}) for text in ("abc", "défg", "hijk")), encoding="utf-8"
    )
    tokens = load(path)
    assert (
        bytes(torch.cat([tokens.statistics, tokens.holdout]).flatten().tolist()) == "abc\n\ndéfg\n\nhijk".encode()[:12]
    )


def test_token_files_are_taken_as_they_are(tmp_path):
    ids = list(range(12))
    (tmp_path / "nested.json").write_text(json.dumps([ids[:6], ids[6:]]), encoding="utf-8")
    save_file({"token_ids": torch.tensor(ids, dtype=torch.int32).view(3, 4)}, tmp_path / "ids.safetensors")
    for name in ("nested.json", "ids.safetensors"):
        tokens = load(tmp_path / name)
        assert tokens.statistics.flatten().tolist() + tokens.holdout.flatten().tolist() == ids
        assert tokens.statistics.dtype == torch.int64


@pytest.mark.parametrize("needed", [1, 100, 900, 10**6])
def test_encoding_the_beginning_gives_the_tokens_of_the_whole(needed):
    tokenizer, text, lengths = train_tokenizer(), "\n".join(CORPUS) * 20, []

    def watched(part):
        lengths.append(len(part))
        return tokenizer.encode(part).ids

    tokens = encode_beginning(text, watched, needed)
    whole = tokenizer.encode(text).ids
    assert tokens[:needed] == whole[:needed]
    assert len(tokens) == min(needed, len(whole))
    assert needed > len(whole) or max(lengths) < len(text)


def test_the_fingerprint_changes_with_any_token_and_with_the_split():
    ids = torch.arange(12).view(3, 4)
    base = CalibrationTokens(ids[:2], ids[2:]).fingerprint
    changed = ids.clone()
    changed[2, 3] += 1
    assert CalibrationTokens(ids[:2], ids[2:]).fingerprint == base
    assert CalibrationTokens(changed[:2], changed[2:]).fingerprint != base
    assert CalibrationTokens(ids[:1], ids[1:]).fingerprint != base


def test_a_source_that_is_too_short_says_how_much_there_is(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdefghij", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"10 tokens.*need 12.*holds 2"):
        load(path)


@pytest.mark.parametrize("bad", [-1, 300])
def test_ids_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(CalibrationError, match=rf"token id {bad} .*256"):
        cut_sequences(torch.tensor([*range(11), bad]), config("ids"), 256)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("latin.txt", b"caf\xe9 au lait", "cannot be read"),
        ("broken.json", b"[1, 2", "cannot be read"),
        ("ragged.json", b"[[1, 2], [3]]", "cannot be read"),
        ("words.json", b'["a", "b"]', "cannot be read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read"),
        ("fieldless.jsonl", b'{"text": "a"}\n{"words": "b"}', "line 2: no text"),
        ("list.jsonl", b"[1]\n", "line 1: no text"),
        ("garbage.safetensors", b"not a safetensors file", "cannot be read"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load(path)
    assert name in str(caught.value)


def test_a_token_file_without_token_ids_is_named(tmp_path):
    save_file({"words": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CalibrationError, match="token_ids"):
        load(tmp_path / "other.safetensors")
