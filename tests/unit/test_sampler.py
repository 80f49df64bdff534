"""Sampling, checked against plain Python in double precision and by walking through the whole unit interval."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engine import sampler
from service.engine.request import Request, SamplingParams
from service.engine.sampler import Candidates, candidates, draw, sample


def params(**values):
    return SamplingParams(max_tokens=100, **values)


def request(name="r", **values):
    return Request(name, [1], params(**values))


def probabilities(logits, rows):
    """Distribution (n, vocab_size) that each row is drawn from."""
    token_ids, weights = candidates(logits, rows)
    whole = torch.zeros(logits.shape, dtype=torch.float64).scatter_add_(-1, token_ids, weights)
    return whole / whole.sum(-1, keepdim=True)


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution, written out token by token."""
    weights = [math.exp(value / temperature - max(logits) / temperature) for value in logits]
    probs = [weight / sum(weights) for weight in weights]
    ranked = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    kept = [token for token in ranked if probs[token] >= min_p * probs[ranked[0]]]
    kept = kept[:top_k] if top_k else kept
    total = sum(probs[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if top_p < 1.0 and mass >= top_p:
            break
        nucleus.append(token)
        mass += probs[token] / total
    total = sum(probs[token] for token in nucleus)
    return [probs[token] / total if token in nucleus else 0.0 for token in range(len(probs))]


@settings(deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    st.floats(0.1, 2.0),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
)
def test_probabilities_are_those_of_the_definition(tenths, temperature, top_k, top_p, min_p):
    logits = [value / 10 for value in tenths]
    chosen = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = probabilities(torch.tensor([logits], dtype=torch.float64), [chosen])[0].tolist()
    want = oracle(logits, temperature, top_k, top_p, min_p)
    # A token exactly on a threshold may fall on either side of it by rounding: only there may the two differ.
    assert got == pytest.approx(want, abs=1e-9) or is_on_a_threshold(logits, temperature, top_k, top_p, min_p)


def is_on_a_threshold(logits, temperature, top_k, top_p, min_p):
    lower, upper = (
        oracle(logits, temperature, top_k, min(max(top_p + sign * 1e-9, 0), 1), min(max(min_p - sign * 1e-9, 0), 1))
        for sign in (-1, 1)
    )
    return lower != pytest.approx(upper, abs=1e-6)


def filtered_by_sorting(logits, item):
    """One row's distribution (vocab_size,): all of it sorted, then cut."""
    probs = torch.softmax(logits.double() / item.temperature, dim=-1)
    ranked, order = probs.sort(descending=True, stable=True)
    ranked = ranked.where(ranked >= item.min_p * ranked[0], 0.0)
    ranked[item.top_k or len(ranked) :] = 0.0
    ranked = ranked / ranked.sum()
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.where((before < item.top_p) | torch.tensor(item.top_p == 1.0), 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked / ranked.sum())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([0.0, 0.02, 0.25]),
    st.lists(
        st.tuples(
            st.floats(0.2, 2.0),
            st.sampled_from([0, 1, 5, 50, 700, 3000]),
            st.sampled_from([0.03, 0.5, 0.9, 0.99, 0.999999, 1.0]),
            st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 1.0]),
        ),
        min_size=1,
        max_size=4,
    ),
)
@example(0, 4.0, 0.0, [(1.0, 700, 0.99, 0.0)])  # what top_k left holds more than the tokens around the nucleus
def test_large_vocabularies_are_filtered_and_drawn_from_as_if_all_of_them_was_sorted(seed, spread, grain, values):
    # coarse grains give many equal logits, so that a limit often falls among equals
    logits = torch.randn(len(values), 2000, generator=torch.Generator().manual_seed(seed)) * spread
    logits = (logits / grain).round() * grain if grain else logits
    rows = [params(temperature=t, top_k=k, top_p=p, min_p=m, seed=seed) for t, k, p, m in values]
    expected = torch.stack([filtered_by_sorting(row, item) for row, item in zip(logits, rows, strict=True)])
    torch.testing.assert_close(probabilities(logits, rows), expected, rtol=1e-9, atol=0.0)
    requests = [Request(str(index), [1], item) for index, item in enumerate(rows)]
    uniforms = [Request("again", [1], item).rng.random() for item in rows]
    assert sample(logits, requests) == draw(expected, uniforms).tolist()


def test_filtering_all_tokens_as_on_other_devices_gives_the_same(monkeypatch):
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(5)).mul(8).round() / 4
    rows = [params(top_k=k, top_p=p, min_p=m) for k in (0, 40) for p, m in ((0.9, 0.0), (1.0, 0.01), (0.7, 0.001))]
    expected = probabilities(logits, rows)

    def everything(weights, whole, params):
        return Candidates(torch.arange(weights.shape[-1]).expand_as(weights), weights)

    monkeypatch.setattr(sampler, "_shortlist", everything)
    torch.testing.assert_close(probabilities(logits, rows), expected, rtol=1e-12, atol=0.0)


def test_each_filter_alone_on_a_distribution_of_halves():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log()
    assert probabilities(logits, [params(top_k=2)])[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits, [params(top_p=0.6)])[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits, [params(min_p=0.4)])[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits, [params(top_k=3)])[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert probabilities(logits, [params(top_p=0.1)])[0].tolist() == pytest.approx([1, 0, 0, 0])


def test_top_p_acts_on_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double().log()
    # Of the two that top_k keeps, the first holds 4/7 of the probability: enough for 0.55, though not of the whole.
    assert probabilities(logits, [params(top_k=2, top_p=0.55)])[0].tolist() == pytest.approx([1, 0, 0, 0])


def test_a_token_is_dropped_when_those_before_it_hold_exactly_top_p():
    assert probabilities(torch.zeros(1, 4), [params(top_p=0.5)])[0].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_among_equals_top_k_keeps_the_lowest_ids_and_no_more_than_k():
    kept = probabilities(torch.zeros(1, 5000), [params(top_k=3)])[0].nonzero().flatten()
    assert kept.tolist() == [0, 1, 2]


def test_rows_of_one_batch_keep_their_own_parameters():
    logits = torch.randn(5, 20)
    rows = [params(), params(top_k=3), params(temperature=0.3), params(top_p=0.5), params(min_p=0.2, temperature=1.7)]
    together = probabilities(logits, rows)
    for index, row in enumerate(rows):
        assert torch.equal(together[index], probabilities(logits[index : index + 1], [row])[0])


def test_drawing_gives_every_token_exactly_its_share_of_the_unit_interval():
    shares = torch.tensor([[0.0, 3.0, 0.0, 1.0, 4.0, 0.0]], dtype=torch.float64) / 8
    uniforms = [(step + 0.5) / 800 for step in range(800)]
    tokens = draw(shares.expand(800, -1), uniforms).tolist()
    assert [tokens.count(token) for token in range(6)] == [0, 300, 0, 100, 400, 0]


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_interval_never_give_a_token_of_probability_zero(uniform):
    probs = torch.tensor([[0.0, 0.1, 0.2, 0.7, 0.0, 0.0]], dtype=torch.float64) * 0.999
    token = draw(probs, [uniform]).item()
    assert token == (1 if uniform == 0.0 else 3)


def test_temperature_zero_takes_the_most_likely_token_and_draws_nothing():
    greedy = request(temperature=0.0, seed=1)
    state = greedy.rng.getstate()
    assert sample(torch.tensor([[0.1, 5.0, 4.9]]), [greedy]) == [1]
    assert greedy.rng.getstate() == state


def test_a_seeded_request_draws_the_same_tokens_alone_and_in_any_batch():
    logits = torch.randn(8, 50)
    alone = request(seed=11, temperature=0.8, top_p=0.9)
    expected = [sample(logits[i : i + 1], [alone])[0] for i in range(8)]
    seeded = request(seed=11, temperature=0.8, top_p=0.9)
    others = [request(seed=3), request(temperature=0.0), request(top_k=5)]
    got = []
    for i in range(8):
        rows = torch.cat([torch.randn(i % 3, 50), logits[i : i + 1], torch.randn(3 - i % 3, 50)])
        batch = [*others[: i % 3], seeded, *others[i % 3 :]]
        got.append(sample(rows, batch)[i % 3])
    assert got == expected
    assert len(set(expected)) > 1


def test_requests_without_a_seed_differ():
    logits = torch.zeros(1, 1000)
    drawn = {sample(logits, [request()])[0] for _ in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_spoils_no_other(bad):
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, bad, 0.0], [0.0, 0.0, 9.0]])
    for temperature in (0.0, 0.01):
        requests = [request(temperature=temperature, top_p=0.9) for _ in range(3)]
        assert sample(logits, requests) == [1, None, 2]


def test_extreme_logits_and_the_lowest_temperature_stay_finite():
    logits = torch.tensor([[1e30, -1e30, 0.0]])
    assert probabilities(logits, [params(temperature=1e-5)])[0].tolist() == [1.0, 0.0, 0.0]
