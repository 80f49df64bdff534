"""What is done to logits before drawing, against the definitions written out over the whole text."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.logits import LogitsProcessor
from service.engine.request import Request, SamplingParams
from service.engine.sampler import sample, sample_with_logprobs

VOCAB = 12
ENDS = frozenset({10, 11})
NAN = float("nan")
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=20)
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB)


def params(**values):
    return SamplingParams(**{"max_tokens": 100, **values})


def request(prompt=(1,), output=(), **values):
    chosen = params(**values)
    made = Request("r", list(prompt), chosen)
    made.output_token_ids.extend(output)
    if chosen.changes_logits:
        made.logits_processor = LogitsProcessor(chosen, prompt, ENDS)
    return made


def processed(made, logits):
    values = np.array(logits, dtype=np.float32)
    made.logits_processor.apply(values, made.output_token_ids)
    return values.tolist()


def penalized(logits, prompt, output, repetition, frequency, presence):
    """The definition, token by token, in double precision: everything counted from the beginning."""
    result = []
    for token, logit in enumerate(logits):
        is_repeated = token in prompt or token in output
        factor = 1.0 if not is_repeated else 1 / repetition if logit > 0 else repetition
        result.append(logit * factor - frequency * output.count(token) - presence * (token in output))
    return result


@settings(deadline=None)
@given(LOGITS, TOKENS, TOKENS, st.floats(0.2, 5), st.floats(-2, 2), st.floats(-2, 2), st.lists(st.integers(0, 20)))
def test_penalties_are_those_of_the_definition_however_the_output_came(
    logits, prompt, output, repetition, frequency, presence, stops
):
    made = request(
        prompt,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=((0, 0.0),),
    )
    for end in [*sorted(stops), len(output)]:
        made.output_token_ids[:] = output[:end]
        got = processed(made, logits)
        want = penalized(logits, prompt, output[:end], repetition, frequency, presence)
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_more_distinct_tokens_than_the_counts_first_have_room_for():
    tokens = list(range(500))
    made = request(tokens[:300], tokens[300:] * 2, repetition_penalty=2.0, frequency_penalty=0.25)
    logits = [3.0] * 500
    assert processed(made, logits) == penalized(logits, tokens[:300], tokens[300:] * 2, 2.0, 0.25, 0.0)


def test_a_bias_is_added_before_the_penalties():
    made = request(output=[3], logit_bias=((3, 5.0), (4, -2.0)), repetition_penalty=2.0)
    got = processed(made, [0.0] * VOCAB)
    assert got[3] == 2.5  # not 5, as it would be added after
    assert got[4] == -2.0
    assert got[5] == 0.0


def test_ends_are_masked_until_there_are_min_tokens():
    made = request(min_tokens=2)
    for num_tokens in range(4):
        made.output_token_ids[:] = [1] * num_tokens
        got = processed(made, range(VOCAB))
        assert [math.isinf(got[token]) for token in sorted(ENDS)] == [num_tokens < 2] * 2
        assert not any(math.isinf(value) for value in got[:10])


def test_only_allowed_tokens_are_left():
    got = processed(request(allowed_token_ids=(2, 5)), [1.0] * VOCAB)
    assert [token for token, value in enumerate(got) if value == 1.0] == [2, 5]


@settings(deadline=None)
@given(TOKENS, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_bad_word_is_never_completed_and_nothing_else_is_masked(output, words):
    made = request(output=output, bad_words=tuple(map(tuple, words)))
    got = processed(made, [0.0] * VOCAB)
    completes = [any([*output, token][-len(word) :] == word for word in words) for token in range(VOCAB)]
    assert [math.isinf(value) for value in got] == completes


def test_greedy_and_drawn_tokens_come_from_the_changed_logits():
    logits = torch.tensor([[5.0] + [0.0] * (VOCAB - 1)])
    for temperature in (0.0, 1.0):
        made = request(temperature=temperature, bad_words=((0,),), logit_bias=((7, 50.0),))
        assert sample(logits.clone(), [made]) == [7]


def test_where_every_token_is_masked_there_is_none_and_the_reason_is_kept():
    made = request(temperature=1.0, allowed_token_ids=(10,), min_tokens=1)
    assert sample(torch.zeros(1, VOCAB), [made]) == [None]
    assert "no token is left" in made.logits_processor.problem


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_what_is_not_finite_is_not_masked_away(value):
    made = request(allowed_token_ids=(1, 2))
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = value
    assert sample(logits, [made]) == [None]
    assert made.logits_processor.problem is None


def test_rows_of_plain_requests_are_not_written_over():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sample(logits, [request(temperature=0.0), request(presence_penalty=1.0, output=[3]), request(seed=1)])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert not torch.equal(logits[1], before[1])


COMPANY = st.lists(
    st.sampled_from(
        [
            {"temperature": 0.0},
            {"seed": 1},
            {"seed": 2, "top_p": 0.5},
            {"seed": 3, "presence_penalty": 2.0},
            {"seed": 4, "top_k": 3, "repetition_penalty": 3.0, "num_logprobs": 2},
            {"temperature": 0.0, "logit_bias": ((3, 1.0),)},
        ]
    ),
    max_size=5,
)


def generate(requests, num_tokens, make_logits):
    """Tokens of each of ``requests``, sampled together."""
    for _ in range(num_tokens):
        rows = torch.stack([make_logits(made) for made in requests])
        for made, sampled in zip(requests, sample_with_logprobs(rows, requests), strict=True):
            made.output_token_ids.append(sampled.token_id)
    return [made.output_token_ids for made in requests]


@settings(deadline=None, max_examples=40)
@given(COMPANY, st.integers(0, 5))
def test_a_seeded_request_gets_the_same_tokens_in_any_company(company, place):
    def make_logits(made):
        seed = hash(tuple(made.output_token_ids)) % 2**31
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))

    options = {"seed": 7, "top_p": 0.9, "frequency_penalty": 0.5, "num_logprobs": 1, "repetition_penalty": 1.3}
    (alone,) = generate([request(**options)], 10, make_logits)
    requests = [request(**values) for values in company]
    requests.insert(min(place, len(requests)), request(**options))
    together = generate(requests, 10, make_logits)
    assert together[min(place, len(requests) - 1)] == alone


def test_rows_of_one_request_draw_in_their_order():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    one_by_one, together = request(seed=5), request(seed=5)
    tokens = [sample(logits[row : row + 1].clone(), [one_by_one])[0] for row in range(4)]
    mixed = [request(seed=1, top_p=0.4), together, request(temperature=0.0), together, together, together]
    got = sample(logits[[0, 0, 0, 1, 2, 3]], mixed)
    assert [got[row] for row in (1, 3, 4, 5)] == tokens


@settings(deadline=None)
@given(LOGITS, st.integers(0, 5), st.floats(0, 2))
def test_logprobs_are_of_the_logits_before_anything_is_done_to_them(logits, num_top, temperature):
    rows = torch.tensor([logits, logits])
    want = torch.log_softmax(rows[0].double(), dim=-1).tolist()
    options = {"temperature": temperature, "seed": 0, "bad_words": ((0,),), "top_p": 0.9}
    made = request(num_logprobs=num_top, **options)
    sampled, plain = sample_with_logprobs(rows, [made, request(**options)])
    assert plain == (sampled.token_id, None)
    assert sampled.logprobs.token_id == sampled.token_id
    assert sampled.logprobs.logprob == pytest.approx(want[sampled.token_id], abs=1e-4)
    assert [value for _, value in sampled.logprobs.top] == pytest.approx(sorted(want, reverse=True)[:num_top], abs=1e-4)
    assert all(value == pytest.approx(want[token], abs=1e-4) for token, value in sampled.logprobs.top)


def test_each_request_gets_as_many_logprobs_as_it_asks_for_and_a_broken_row_gets_none():
    logits = torch.randn(3, VOCAB)
    logits[1, 2] = NAN
    requests = [request(num_logprobs=number, temperature=0.0) for number in (0, 3, 5)]
    first, broken, last = sample_with_logprobs(logits, requests)
    assert (len(first.logprobs.top), len(last.logprobs.top)) == (0, 5)
    assert broken == (None, None)
