"""Texts to measure perplexity on, under the conventions of the papers.

One number called "WikiText-2 perplexity" hides several: how rows are joined, where a window ends, what is divided by.
Each convention states both of its readings:

| convention | token perplexity: one stream of tokens, cut into windows | word-level: documents |
|---|---|---|
| plain | the file as it is, the last window shorter (llama.cpp) | the file |
| wikitext2 | rows joined by blank lines (GPTQ and its followers) | articles, detokenized (lm-evaluation-harness) |
| c4 | the first 1100 documents joined by spaces, at most 256 windows (SparseGPT, Wanda) | these, detokenized |
| c4-samples | 256 windows, each at random from a random document that is longer (GPTQ) | as c4 |
| ptb | sentences joined by spaces | the same, one document |

The papers' conventions drop the incomplete window at the end; ``plain`` scores it.
"""

import gzip
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import EvaluationError
from .hub import HubSource, LoadDataset, load_rows
from .wikitext import detokenize, split_articles

Convention = Literal["plain", "wikitext2", "c4", "c4-samples", "ptb"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

C4_DOCUMENTS = 1100
C4_WINDOWS = 256
C4_SEED = 0
C4_FILE = "en/c4-validation.00000-of-00008.json.gz"


@dataclass(frozen=True, slots=True)
class Document:
    """A text to score, and what its likelihood is divided by: words and bytes of the original, markup included."""

    text: str
    num_words: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """texts: the documents of C4; one text for every other convention, line ends as in the original file."""

    name: str
    convention: Convention
    texts: tuple[str, ...]

    def tokens(self, encode: Callable[[str], list[int]], window: int) -> list[int]:
        """The stream of token ids that is cut into windows.

        Args:
            encode: text -> token ids, special tokens included.
            window: tokens per window.

        Raises:
            EvaluationError: no document of C4 is as long as a window.
        """
        if self.convention == "plain":
            return encode(self.texts[0])
        if self.convention == "c4-samples":
            return _sample_windows(self.texts, encode, window, self.name)
        tokens = encode(self._stream())
        if self.convention == "c4":
            tokens = tokens[: C4_WINDOWS * window]
        return tokens[: len(tokens) // window * window] if len(tokens) > window else tokens

    def documents(self) -> list[Document]:
        """What word-level perplexity scores, each from its own beginning."""
        if self.convention == "wikitext2":
            return [_document(article, detokenize(article)) for article in split_articles(self.texts[0])]
        if self.convention in ("c4", "c4-samples"):
            return [_document(text, detokenize(text)) for text in self.texts[:C4_DOCUMENTS]]
        text = self._stream() if self.convention == "ptb" else self.texts[0]
        return [_document(text, text)]

    def _stream(self) -> str:
        if self.convention == "c4":
            return " ".join(self.texts[:C4_DOCUMENTS])
        rows = self.texts[0].removesuffix("\n").split("\n")
        if self.convention == "ptb":
            return " ".join(row.strip() for row in rows)
        # The rows of the dataset: lines with their ends, empty where there is nothing but space.
        return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)


def read_corpus(path: Path, convention: Convention = "plain") -> Corpus:
    """The text file ``path``, UTF-8; ``c4`` takes json lines with the key ``text``. A name ending in .gz is unpacked.

    Raises:
        EvaluationError: it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise EvaluationError(f"{path}: there is no text in it")
    texts = _json_texts(text, path) if convention in ("c4", "c4-samples") else (text,)
    return Corpus(str(path), convention, texts)


def load_corpus(name: str, load_dataset: LoadDataset | None = None) -> Corpus:
    """The dataset that is scored under the convention ``name``, from the Hugging Face Hub.

    Raises:
        EvaluationError: it cannot be loaded; the message names the local file to give in its place.
    """
    convention = next((known for known in CONVENTIONS if known == name and known in HUB_CORPORA), None)
    if convention is None:
        raise EvaluationError(f"{name}: not a dataset known here; choose from {', '.join(HUB_CORPORA)}, or give --text")
    source, key, local = HUB_CORPORA[convention]
    alternative = f"give {local} with --text FILE --convention {convention}"
    rows = [str(row[key]) for row in load_rows(source, f"dataset {convention}", alternative, load_dataset)]
    if convention == "wikitext2":
        # The dataset stores a line without text as nothing; in the file it is a space.
        return Corpus(convention, convention, ("".join(row or " \n" for row in rows),))
    return Corpus(convention, convention, ("\n".join(rows),) if convention == "ptb" else tuple(rows))


def _sample_windows(texts: Sequence[str], encode: Callable[[str], list[int]], window: int, name: str) -> list[int]:
    """``C4_WINDOWS`` windows, drawn as in GPTQ's code: a document at random until one is long enough, then a place."""
    generator = random.Random(C4_SEED)  # noqa: S311 no secret
    tokens: list[int] = []
    for _ in range(C4_WINDOWS):
        for _ in range(100 * len(texts)):
            document = encode(texts[generator.randint(0, len(texts) - 1)])
            if len(document) > window:
                break
        else:
            raise EvaluationError(f"{name}: no document is longer than {window} tokens: choose a smaller window")
        start = generator.randint(0, len(document) - window - 1)
        tokens += document[start : start + window]
    return tokens


def _json_texts(text: str, path: Path) -> tuple[str, ...]:
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f'{path}:{number}: the c4 conventions take json lines {{"text": ...}}, as in {C4_FILE}'
            ) from error
        if not isinstance(texts[-1], str):
            raise EvaluationError(f'{path}:{number}: "text" must be a text, not {texts[-1]!r}')
    return tuple(texts)


def _document(original: str, text: str) -> Document:
    # As the harness counts: white space at either end adds an empty word.
    return Document(text, len(re.split(r"\s+", original)), len(original.encode("utf-8")))


_C4 = HubSource(
    "allenai/c4", None, "validation", {"data_files": {"validation": C4_FILE}, "verification_mode": "no_checks"}
)
# Datasets that exist as a loading script only are read from the copy that the Hub converts to parquet.
_PTB_FILES = "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/test/*.parquet"
HUB_CORPORA: dict[Convention, tuple[HubSource, str, str]] = {
    "wikitext2": (HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), "text", "wiki.test.raw"),
    "c4": (_C4, "text", C4_FILE.partition("/")[2]),
    "c4-samples": (_C4, "text", C4_FILE.partition("/")[2]),
    "ptb": (HubSource("parquet", None, "test", {"data_files": {"test": _PTB_FILES}}), "sentence", "ptb.test.txt"),
}
"""Convention -> dataset, its column of text, and the file that holds the same text."""
