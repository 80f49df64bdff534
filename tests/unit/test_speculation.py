"""Guesses by looking up the last tokens, and that no guess ever changes what a request gets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.kv_cache import PagedKVCache
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine, EngineObserver
from service.engine.ngram import Drafter, NgramIndex
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from tests.support.fake_model import LETTERS, BrokenModel, ByteTokenizer, FakeModel, Faults, RepetitiveModel

TOKENIZER = ByteTokenizer()


def looked_up(tokens, max_ngram, max_tokens):
    """The definition, by search: where the longest end that came before came last, and what followed there."""
    for n in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                text = list(tokens)
                for index in range(max_tokens):  # beyond the end of the text, the draft itself is what follows
                    text.append(text[start + n + index])
                return text[len(tokens) :]
    return []


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 6))
def test_the_index_finds_what_a_search_finds_however_the_text_grew(pieces, max_ngram, max_tokens):
    index, tokens = NgramIndex([], max_ngram), []
    for piece in pieces:
        index.extend(piece)
        tokens += piece
        assert index.propose(max_tokens) == looked_up(tokens, max_ngram, max_tokens)
        assert len(index) == len(tokens)


def test_a_text_that_repeats_itself_is_expected_to_go_on_like_that():
    assert NgramIndex([9, 1, 2, 3, 1, 2, 3, 1], 3).propose(7) == [2, 3, 1, 2, 3, 1, 2]
    assert NgramIndex([1, 2, 3], 3).propose(4) == []


def test_an_index_without_ngrams_and_a_draft_without_tokens_are_refused():
    with pytest.raises(ValueError, match="up to 0 tokens"):
        NgramIndex([1], 0)
    with pytest.raises(ValueError, match="0 tokens is none"):
        Drafter(0, 3)


class Recorder(EngineObserver):
    def __init__(self):
        self.drafts, self.steps, self.num_nonfinite = [], [], 0

    def step_ran(self, num_tokens):
        self.steps.append(num_tokens)

    def draft_checked(self, num_tokens, num_accepted):
        self.drafts.append((num_tokens, num_accepted))

    def logits_not_finite(self):
        self.num_nonfinite += 1


def make_engine(num_drafted, model=None, budget=512, eos=None, num_blocks=64):
    model = model or RepetitiveModel()
    tokenizer = ByteTokenizer()
    if eos is not None:
        tokenizer.eos_token_ids = frozenset({eos})
    recorder = Recorder()
    drafter = Drafter(num_drafted, 3) if num_drafted else None
    scheduler = Scheduler(BlockManager(num_blocks), 4, budget, drafter)
    return Engine(Runner(model, PagedKVCache(model.config, num_blocks)), scheduler, tokenizer, recorder), recorder


def make_request(name, prompt="hello", **params):
    return Request(name, TOKENIZER.encode(prompt), SamplingParams(**{"max_tokens": 60, "temperature": 0.0, **params}))


def results_of(engine, requests):
    """Text, reason, tokens and, where all tokens were wanted, the state of the generator, of each request."""
    texts, errors = dict.fromkeys([request.request_id for request in requests], ""), {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.text
            errors[output.request_id] = output.error
    assert engine.scheduler.blocks.num_used_blocks == 0
    return [
        (
            texts[request.request_id],
            request.finish_reason,
            request.output_token_ids,
            errors[request.request_id],
            request.rng.random() if request.finish_reason is FinishReason.LENGTH and request.params.seed else None,
        )
        for request in requests
    ]


CALLS = st.fixed_dictionaries(
    {
        "prompt": st.text("abc ", min_size=1, max_size=60),
        "max_tokens": st.integers(1, 60),
        "temperature": st.sampled_from([0.0, 0.3, 1.0]),
        "seed": st.integers(1, 3),
        "top_k": st.sampled_from([0, 3]),
        "stop": st.lists(st.text("abcdefghij", min_size=1, max_size=2), max_size=2).map(tuple),
    }
)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(CALLS, min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(20, 60),
    st.sampled_from([8, 64]),
    st.none() | st.sampled_from(list(b"abcdefgh")),
)
def test_with_and_without_drafts_every_request_gets_the_same(calls, num_drafted, budget, num_blocks, eos):
    results = []
    for number in (0, num_drafted):
        engine, recorder = make_engine(number, budget=budget, eos=eos, num_blocks=num_blocks)
        results.append(results_of(engine, [make_request(str(index), **call) for index, call in enumerate(calls)]))
        assert all(0 <= num_accepted <= num_tokens <= number for num_tokens, num_accepted in recorder.drafts)
    assert results[0] == results[1]


def test_a_repetitive_text_takes_fewer_steps():
    whole, num_steps = [], []
    for number in (0, 4):
        engine, recorder = make_engine(number)
        whole.append(results_of(engine, [make_request("a")]))
        num_steps.append(len(recorder.steps))
    assert whole[0] == whole[1]
    assert num_steps[1] < 0.6 * num_steps[0]
    assert num_steps[0] == 60 == num_steps[1] + sum(num_accepted for _, num_accepted in recorder.drafts)


def test_generation_ends_inside_a_draft_that_is_right():
    (whole, *_), *_ = results_of(make_engine(0)[0], [make_request("a")])
    circle = whole[30:33]
    assert whole.count(circle) > 3  # by then it goes in circles, and drafts are right
    for stop in (whole[31:36], whole[33]):
        without, with_drafts = (
            results_of(make_engine(number)[0], [make_request("a", stop=(stop,))]) for number in (0, 6)
        )
        assert without == with_drafts
        assert without[0][:2] == (whole[: whole.index(stop)], FinishReason.STOP)


def test_drafts_leave_room_for_a_block_of_a_prompt_and_end_where_the_request_ends():
    engine, recorder = make_engine(8, budget=22)
    for name in ("a", "b"):
        engine.add(make_request(name, "ab" * 5, max_tokens=9))
    while engine.has_work:
        engine.step()
    assert recorder.steps[0] == 20
    assert max(recorder.steps[1:]) == 22 - 16
    assert recorder.drafts


def test_drafts_take_no_block_that_others_could_soon_need():
    engine, _ = make_engine(8, num_blocks=2)
    request = make_request("a", "ab" * 7, max_tokens=10)
    engine.add(request)
    engine.step()
    engine.scheduler.blocks.allocate(1)  # somebody else's: 2 tokens of the present block are left
    engine.step()
    assert request.num_output_tokens <= 3
    assert len(request.block_table) == 1


def test_scored_requests_have_no_drafts():
    engine, recorder = make_engine(4)
    scored = results_of(engine, [make_request("a", "ab" * 10, num_prompt_logprobs=0)])
    assert recorder.drafts == []
    assert scored == results_of(make_engine(0)[0], [make_request("a", "ab" * 10)])


def test_logits_that_are_not_finite_fail_the_request_when_its_text_gets_there_and_not_for_a_wrong_draft():
    class Broken(BrokenModel, RepetitiveModel):
        pass

    (whole, *_), *_ = results_of(make_engine(0)[0], [make_request("a")])
    nan_on = ord(whole[40])
    results = []
    for number in (0, 6):
        engine, recorder = make_engine(number, Broken(faults=Faults(nan_on=nan_on)))
        results.append(results_of(engine, [make_request("a")]))
        assert recorder.num_nonfinite == 1
    assert results[0] == results[1]
    assert results[0][0][1] is FinishReason.ERROR
    engine, recorder = make_engine(4, Broken(faults=Faults(nan_on=ord("#"))))
    after_letters = (
        "".join(letter + "#" for letter in LETTERS.decode()) + "a"
    )  # every draft of the beginning is poisonous
    assert results_of(engine, [make_request("b", after_letters)])[0][1] is FinishReason.LENGTH
    assert recorder.drafts[0][1] == recorder.num_nonfinite == 0


def test_the_fake_models_disagree_with_their_drafts_now_and_then():
    for model in (RepetitiveModel(), FakeModel()):
        engine, recorder = make_engine(4, model)
        results_of(engine, [make_request("a", "hello hello hello", max_tokens=200)])
        assert any(num_accepted < num_tokens for num_tokens, num_accepted in recorder.drafts)


def test_drafts_grow_while_they_are_right_and_shrink_to_what_was_right_of_them():
    request, drafter = make_request("a", "ab" * 20, max_tokens=1000), Drafter(8, 3)

    def next_length(num_right):
        """Length of the draft after the last one was right so far."""
        nonlocal draft
        request.output_token_ids += draft[:num_right]
        request.output_token_ids.append(draft[num_right] if num_right < len(draft) else ord("b"))
        draft = drafter.draft(request, room=20)
        return len(draft)

    draft = drafter.draft(request, room=20)
    assert len(draft) == 8
    assert [next_length(number) for number in (2, 3, 4, 8, 0, 0, 1, 2, 4)] == [3, 6, 5, 8, 1, 1, 2, 4, 8]
