"""Calibration tokens from a text file, a jsonl file, a token file, or a dataset of the Hugging Face Hub.

Text is tokenized as one stream and cut into sequences of equal length, first come first served: the first sequences
are for the statistics, the ones right after them are the holdout.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import CalibrationConfig
from ..errors import CalibrationError

CHARACTERS_PER_TOKEN = 6
CUT_MARGIN = 64
TEXT_FIELDS = ("text", "content", "prompt")


@dataclass(frozen=True, slots=True)
class CalibrationTokens:
    """Token ids of the calibration set.

    statistics: (num_sequences, sequence_length) int64, what the statistics are taken from
    holdout:    (num_holdout, sequence_length) int64, kept apart for perplexity
    """

    statistics: Tensor
    holdout: Tensor

    @property
    def fingerprint(self) -> str:
        """sha256 over shapes and token ids: two builds with the same one saw the same tokens."""
        digest = hashlib.sha256()
        for part in (self.statistics, self.holdout):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_calibration_tokens(
    config: CalibrationConfig, encode: Callable[[str], list[int]], vocab_size: int
) -> CalibrationTokens:
    """Read ``config.source`` (anything but ``self``) and cut it into sequences.

    Args:
        config: source, number and length of sequences, holdout.
        encode: text -> token ids, without special tokens.
        vocab_size: token ids must be below it.

    Raises:
        CalibrationError: the source cannot be read, is too short, or holds ids outside the vocabulary.
    """
    needed = (config.num_sequences + config.num_holdout) * config.sequence_length
    if config.source.startswith("hf:"):
        tokens = torch.tensor(_tokens_of_documents(_hub_documents(config.source), encode, needed), dtype=torch.int64)
    else:
        tokens = _read_file(Path(config.source), lambda text: encode_beginning(text, encode, needed))
    return cut_sequences(tokens, config, vocab_size)


def cut_sequences(tokens: Tensor, config: CalibrationConfig, vocab_size: int) -> CalibrationTokens:
    """Cut ``tokens`` (num_tokens,) into the sequences that ``config`` asks for.

    Raises:
        CalibrationError: too few tokens, or ids outside ``0 .. vocab_size - 1``.
    """
    count = config.num_sequences + config.num_holdout
    needed = count * config.sequence_length
    if tokens.numel() < needed:
        fits = tokens.numel() // config.sequence_length
        raise CalibrationError(
            f"{config.source}: {tokens.numel()} tokens, but {config.num_sequences} + {config.num_holdout} holdout "
            f"sequences of {config.sequence_length} need {needed}. Give a longer text, or fewer or shorter sequences "
            f"(it holds {fits} of this length)"
        )
    used = tokens[:needed]
    if int(used.min()) < 0 or int(used.max()) >= vocab_size:
        bad = int(used.min()) if int(used.min()) < 0 else int(used.max())
        raise CalibrationError(f"{config.source}: token id {bad} is outside the vocabulary of {vocab_size} tokens")
    sequences = used.view(count, config.sequence_length)
    return CalibrationTokens(sequences[: config.num_sequences], sequences[config.num_sequences :])


def encode_beginning(text: str, encode: Callable[[str], list[int]], needed: int) -> list[int]:
    """The first ``needed`` tokens of ``text``, or all of them if there are fewer, without encoding much more than that.

    The beginning of a text has the tokens that it has within the whole, but for a few at its end: ``CUT_MARGIN`` of
    them are dropped.
    """
    num_characters = needed * CHARACTERS_PER_TOKEN
    while num_characters < len(text):
        tokens = encode(text[:num_characters])
        if len(tokens) >= needed + CUT_MARGIN:
            return tokens[:needed]
        num_characters *= 2
    return encode(text)


def _read_file(path: Path, encode: Callable[[str], list[int]]) -> Tensor:
    if not path.is_file():
        raise CalibrationError(
            f"{path}: no such file. Give a .txt, .jsonl, .json (token ids) or .safetensors (token_ids) file, "
            "hf:DATASET, or self"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tokens: Tensor = file.get_tensor("token_ids")
            return tokens.to(torch.int64).flatten()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return torch.tensor(json.loads(text), dtype=torch.int64).flatten()
        if path.suffix == ".jsonl":
            text = "\n\n".join(_jsonl_texts(path, text))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CalibrationError(f"{path}: cannot be read as calibration data: {error}") from error
    return torch.tensor(encode(text), dtype=torch.int64)


def _jsonl_texts(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        field = next((name for name in TEXT_FIELDS if isinstance(row, dict) and isinstance(row.get(name), str)), None)
        if field is None:
            raise CalibrationError(f"{path}, line {number}: no text under any of the keys {', '.join(TEXT_FIELDS)}")
        yield row[field]


def _hub_documents(source: str) -> Iterator[str]:
    """Documents of ``hf:DATASET[:CONFIG][:SPLIT]``, streamed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(f"{source}: needs the package datasets: pip install 'qerve[data]'") from error
    name, *rest = source.removeprefix("hf:").split(":")
    config = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    try:
        for row in load_dataset(name, config, split=split, streaming=True):
            field = next((key for key in TEXT_FIELDS if isinstance(row.get(key), str)), None)
            if field is None:
                raise CalibrationError(f"{source}: rows have no text under any of the keys {', '.join(TEXT_FIELDS)}")
            yield row[field]
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{source}: cannot be loaded: {error}. Offline? Give a local file") from error


def _tokens_of_documents(documents: Iterator[str], encode: Callable[[str], list[int]], needed: int) -> list[int]:
    """Tokens of whole documents, joined by blank lines, until ``needed`` are there."""
    tokens: list[int] = []
    for document in documents:
        tokens += encode(document + "\n\n")
        if len(tokens) >= needed:
            break
    return tokens
