"""Conventions of the papers over texts, articles, word counts, rolling windows, each against its definition."""

import gzip
import json
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import EvaluationError
from models.evaluate.corpora import C4_DOCUMENTS, C4_WINDOWS, CONVENTIONS, Corpus, load_corpus, read_corpus
from models.evaluate.perplexity import plan_windows
from models.evaluate.texts import DEFAULT_WINDOW, TextSettings, score_text
from models.evaluate.wikitext import detokenize, split_articles
from models.evaluate.word_level import rolling_windows, word_perplexity
from tests.support.byte_model import ByteModel, ByteTokenizer

WIKITEXT = """ \n = First = \n \n A film @-@ like " thing " , of 1 @,@ 000 . \n = = Part = = \n More ( text ) . \n \n
 = Second One = \n The cat 's end . \n"""


def encode(text):
    return list(text.encode())


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_plain_is_the_file_as_it_is(tmp_path):
    text = " a \n\nb  é\n"
    assert read_corpus(write(tmp_path / "a.txt", text)).tokens(encode, 4) == encode(text)


def test_wikitext2_joins_the_rows_of_the_dataset_by_blank_lines(tmp_path):
    corpus = read_corpus(write(tmp_path / "wiki.raw", " \n = A = \n\n b c \n"), "wikitext2")
    rows = ["", " = A = \n", "", " b c \n"]
    assert corpus.tokens(encode, 1) == encode("\n\n".join(rows))


def test_wikitext2_from_the_hub_is_the_same_corpus_as_from_the_file(tmp_path):
    local = read_corpus(write(tmp_path / "wiki.raw", " \n = A = \n \n b c \n"), "wikitext2")
    rows = [{"text": text} for text in ("", " = A = \n", "", " b c \n")]
    loaded = load_corpus("wikitext2", lambda *_, **__: rows)
    assert loaded.texts == local.texts


def test_ptb_joins_stripped_sentences_by_spaces(tmp_path):
    local = read_corpus(write(tmp_path / "ptb.txt", " no it was n't \n a <unk> \n"), "ptb")
    loaded = load_corpus("ptb", lambda *_, **__: [{"sentence": "no it was n't"}, {"sentence": "a <unk>"}])
    for corpus in (local, loaded):
        assert corpus.tokens(encode, 1) == encode("no it was n't a <unk>")


def test_c4_joins_its_first_documents_and_stops_at_256_windows(tmp_path):
    texts = [f"doc {number}" for number in range(C4_DOCUMENTS + 5)]
    lines = "\n".join(json.dumps({"text": text, "url": "x"}) for text in texts)
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(lines.encode()))
    stream = encode(" ".join(texts[:C4_DOCUMENTS]))
    local = read_corpus(tmp_path / "c4.json.gz", "c4")
    loaded = load_corpus("c4", lambda *_, **__: [{"text": text} for text in texts])
    for corpus in (local, loaded):
        assert corpus.tokens(encode, 7) == stream[: 7 * C4_WINDOWS]
        assert len(corpus.tokens(encode, 3000)) == len(stream) // 3000 * 3000


def test_c4_samples_are_drawn_as_gptq_draws_them():
    texts = tuple("".join(chr(97 + (n + i) % 26) for i in range(5 + 3 * n)) for n in range(20))
    window = 12
    random.seed(0)
    wanted = []
    for _ in range(256):
        while True:
            document = encode(texts[random.randint(0, len(texts) - 1)])
            if len(document) > window:
                break
        start = random.randint(0, len(document) - window - 1)
        wanted += document[start : start + window]
    assert Corpus("c4", "c4-samples", texts).tokens(encode, window) == wanted
    with pytest.raises(EvaluationError, match="smaller window"):
        Corpus("c4", "c4-samples", texts).tokens(encode, 500)


@pytest.mark.parametrize("convention", ["wikitext2", "ptb"])
def test_conventions_of_papers_drop_the_incomplete_window_but_keep_a_short_text(convention):
    corpus = Corpus("x", convention, ("abcdefghij",))
    whole = len(corpus.tokens(encode, 1))
    assert len(corpus.tokens(encode, 4)) == whole // 4 * 4
    assert len(corpus.tokens(encode, 100)) == whole


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_file_without_text_is_refused(tmp_path, content):
    with pytest.raises(EvaluationError, match="no text"):
        read_corpus(write(tmp_path / "empty.txt", content))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    write(tmp_path / "c4.json", '{"text": "a"}\n{"url": "b"}\n')
    write(tmp_path / "number.json", '{"text": 3}\n')
    for name, convention, message in (
        ("absent.txt", "plain", "absent.txt: cannot be read"),
        ("latin.txt", "plain", "UTF-8"),
        ("broken.gz", "c4", "cannot be read"),
        ("c4.json", "c4", "c4.json:2"),
        ("number.json", "c4-samples", "number.json:1"),
    ):
        with pytest.raises(EvaluationError, match=message):
            read_corpus(tmp_path / name, convention)


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name != "plain"])
def test_a_dataset_that_cannot_be_reached_names_the_local_file(name):
    def offline(*_, **__):
        raise OSError("offline")

    with pytest.raises(EvaluationError, match=rf"Offline\? Give .* with --text FILE --convention {name}"):
        load_corpus(name, offline)


def test_articles_start_at_titles_of_the_first_level_and_lose_nothing_but_blank_lines_before_the_first():
    first, second = split_articles(WIKITEXT)
    assert first.startswith(" = First = \n")
    assert "= = Part = =" in first
    assert second == " = Second One = \n The cat 's end . \n"
    assert f" \n{first}\n{second}" == WIKITEXT


def test_text_before_the_first_title_is_an_article():
    assert split_articles("intro\n = T = \nx") == ["intro", " = T = \nx"]


def test_markup_of_the_file_becomes_running_text():
    assert detokenize(' A film @-@ like " thing " , of 1 @,@ 000 . \n = = Part = = \n ( text ) N') == (
        ' A film-like "thing", of 1,000. \n == Part ==\n(text) N'.replace(". \n ==", ".\n==")
    )


def test_words_and_bytes_are_counted_before_the_markup_is_undone(tmp_path):
    documents = read_corpus(write(tmp_path / "wiki.raw", WIKITEXT), "wikitext2").documents()
    for document, article in zip(documents, split_articles(WIKITEXT), strict=True):
        assert document.num_words == len(re.split(r"\s+", article))
        assert document.num_bytes == len(article.encode())
        assert len(document.text) < len(article)
    plain = read_corpus(tmp_path / "wiki.raw").documents()
    assert [document.text for document in plain] == [WIKITEXT]
    ptb = Corpus("p", "ptb", (" a b \n c\n",)).documents()
    assert [(document.text, document.num_words) for document in ptb] == [("a b c", 3)]
    c4 = Corpus("c", "c4", ("a , b", "c")).documents()
    assert [(document.text, document.num_words, document.num_bytes) for document in c4] == [("a, b", 3, 5), ("c", 1, 1)]


@given(st.lists(st.integers(2, 99), max_size=60), st.integers(1, 17))
def test_rolling_windows_score_each_token_once_after_as_much_context_as_fits(tokens, max_length):
    requests = list(rolling_windows(tokens, 0, max_length))
    assert [token for request in requests for token in request.continuation] == tokens
    stream, end = [0, *tokens], 1
    for request in requests:
        end += len(request.continuation)
        fed = request.inputs(max_length)
        assert not request.is_truncated(max_length)
        assert list(fed) == stream[max(0, end - 1 - max_length) : end - 1]


@pytest.mark.parametrize("max_length", [5, 9, None])
def test_word_perplexity_equals_a_loop_over_bytes(max_length):
    model, corpus = ByteModel(), Corpus("w", "wikitext2", (WIKITEXT,))
    result = word_perplexity(model, ByteTokenizer(), corpus.documents(), max_length=max_length)
    nll = -sum(model.log_likelihood("\0", document.text) for document in corpus.documents())
    num_words = sum(document.num_words for document in corpus.documents())
    num_bytes = sum(document.num_bytes for document in corpus.documents())
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.word_perplexity == pytest.approx(math.exp(nll / num_words), rel=1e-3)
    assert result.byte_perplexity == pytest.approx(math.exp(nll / num_bytes), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(result.byte_perplexity), rel=1e-5)
    assert (result.num_documents, result.num_words, result.num_bytes) == (2, num_words, num_bytes)


def test_a_text_result_tells_token_from_word_level():
    corpus = Corpus("w", "plain", (WIKITEXT,))
    settings_ = TextSettings(window=16, stride=8, is_word_level=True)
    seen = []
    result = score_text(ByteModel(), ByteTokenizer(), corpus, settings_, lambda done, total: seen.append((done, total)))
    values = result.to_dict()
    num_windows = len(plan_windows(len(encode(WIKITEXT)), 16, 8))
    assert values["num_windows"] == num_windows
    assert (num_windows, num_windows) in seen
    assert seen[-1][0] == seen[-1][1]
    assert values["perplexity"] == pytest.approx(math.exp(values["nll"]))
    assert values["word_perplexity"] > values["perplexity"]
    assert "word_perplexity" not in score_text(ByteModel(), ByteTokenizer(), corpus, TextSettings()).to_dict()


def test_the_window_follows_the_models_context_and_cannot_exceed_it():
    corpus = Corpus("w", "plain", (WIKITEXT,))
    assert score_text(ByteModel(), ByteTokenizer(), corpus, TextSettings()).window == 64
    for wrong in (TextSettings(window=65), TextSettings(max_length=65)):
        with pytest.raises(EvaluationError, match="65 is more than the model's context of 64"):
            score_text(ByteModel(), ByteTokenizer(), corpus, wrong)
    with pytest.raises(EvaluationError, match="skips tokens"):
        TextSettings(stride=DEFAULT_WINDOW + 1).check()
    with pytest.raises(EvaluationError, match="window of 8"):
        TextSettings(window=8, stride=9).check()


@pytest.mark.parametrize(
    "text", ["s ' a", " , . ! b", '" a " b "', "= = = = x", "a ° b \n c", "{ a } [ b ]", " N 's N "]
)
def test_detokenizing_agrees_with_the_harness(harness_detokenizer, text):
    assert detokenize(text) == harness_detokenizer({"page": text})


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=" .,;:!?@-s'\"()[]{}=°N\na1/", max_size=40))
def test_detokenizing_any_text_agrees_with_the_harness(harness_detokenizer, text):
    assert detokenize(text) == harness_detokenizer({"page": text})


@pytest.fixture(scope="module")
def harness_detokenizer():
    module = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-evaluation-harness is not installed"
    )
    return module.wikitext_detokenizer
