"""Windows, nlls and pooling, against a double loop over every token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import EvaluationError
from models.evaluate.perplexity import LOGIT_ROWS, perplexity, plan_windows, score_window, summarize
from models.llama.batch import Batch

VOCAB = 11


class BigramModel:
    """Logits depend on the current token and on how far it is from its window's start, so context matters."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.largest_rows = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        return torch.stack([batch.token_ids, batch.positions], dim=1).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.largest_rows = max(self.largest_rows, len(hidden))
        return self.table[hidden[:, 0].long()] * (1 + hidden[:, 1:2] / 10)

    def nll(self, current: int, position: int, target: int) -> float:
        row = [float(value) * (1 + position / 10) for value in self.table[current]]
        return math.log(sum(map(math.exp, row))) - row[target]


def tokens_of(count: int) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_every_token_but_the_first_is_scored_once_when_windows_overlap(num_tokens, window, data):
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for item in plan_windows(num_tokens, window, stride):
        assert item.end - item.start <= window
        assert item.num_scored < item.end - item.start
        scored += range(item.end - item.num_scored, item.end)
    assert scored == list(range(1, num_tokens))


@given(st.integers(2, 300), st.integers(2, 64))
def test_disjoint_windows_score_all_but_their_first_token(num_tokens, window):
    scored = [
        t for item in plan_windows(num_tokens, window, window) for t in range(item.end - item.num_scored, item.end)
    ]
    assert scored == [t for t in range(num_tokens) if t % window]


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (200, 200), (7, 1)])
def test_perplexity_equals_a_double_loop_over_tokens(window, stride):
    model, tokens = BigramModel(), tokens_of(100)
    result = perplexity(model, tokens, window=window, stride=stride)
    expected = [
        model.nll(tokens[target - 1], target - 1 - item.start, tokens[target])
        for item in plan_windows(len(tokens), window, stride)
        for target in range(item.end - item.num_scored, item.end)
    ]
    assert result.num_tokens == len(expected)
    assert result.token_nlls.tolist() == pytest.approx(expected, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


def test_first_windows_only():
    result = perplexity(BigramModel(), tokens_of(100), window=10, max_windows=3)
    assert (result.num_windows, result.num_tokens) == (3, 27)


def test_logits_are_never_computed_for_more_rows_than_the_bound():
    model = BigramModel()
    score_window(model, torch.tensor(tokens_of(5 * LOGIT_ROWS + 3)), 5 * LOGIT_ROWS + 2)
    assert model.largest_rows == LOGIT_ROWS


def test_progress_reaches_the_total():
    seen = []
    perplexity(BigramModel(), tokens_of(50), window=10, on_window=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


@pytest.mark.parametrize(("num_tokens", "window", "stride"), [(1, 4, 4), (0, 4, 4), (9, 1, 1), (9, 4, 5), (9, 4, 0)])
def test_sizes_that_make_no_sense_are_refused(num_tokens, window, stride):
    with pytest.raises(EvaluationError, match=r"tokens|window"):
        plan_windows(num_tokens, window, stride)


def test_a_mean_nll_beyond_float_range_is_an_infinite_perplexity():
    assert summarize([torch.tensor([1e4, 1e4])]).perplexity == math.inf
