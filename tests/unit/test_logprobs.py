"""Log-probabilities against torch's own log_softmax in double precision."""

import pytest
import torch

from service.engine.logprobs import logprobs_of, score_rows


@pytest.mark.parametrize("num_top", [0, 1, 20, 100])
def test_tokens_and_the_likeliest_ones_have_the_values_of_the_softmax(num_top):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 4
    token_ids = [0, 39, 7, 7, 21]
    want = logits.double().log_softmax(-1)
    scores = logprobs_of(logits, token_ids, num_top)
    assert [score.token_id for score in scores] == token_ids
    for row, score in zip(want, scores, strict=True):
        assert score.logprob == pytest.approx(row[score.token_id].item(), abs=1e-5)
        likeliest = row.argsort(descending=True)[:num_top].tolist()
        assert [token for token, _ in score.top] == likeliest
        assert [value for _, value in score.top] == pytest.approx(row[likeliest].tolist(), abs=1e-5)


def test_rows_are_scored_in_pieces_with_few_logits_at_a_time():
    weight = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    heights = []

    def logits(rows):
        heights.append(len(rows))
        return rows @ weight.T

    token_ids = [index % 30 for index in range(200)]
    scores = score_rows(logits, hidden, token_ids, 0)
    want = (hidden @ weight.T).log_softmax(-1)[torch.arange(200), token_ids]
    assert [score.logprob for score in scores] == pytest.approx(want.tolist(), abs=1e-5)
    assert max(heights) <= 64
    assert logprobs_of(weight[:0], [], 3) == []
