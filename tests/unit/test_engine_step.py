"""The engine's step over the fake model, whose every token depends on all tokens before it as the cache holds them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.kv_cache import PagedKVCache
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine, EngineObserver
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from tests.support.fake_model import BrokenModel, ByteTokenizer, FakeModel, Faults, state_of

TOKENIZER = ByteTokenizer()


class Recorder(EngineObserver):
    """Remembers what it is told."""

    def __init__(self):
        self.steps, self.gaps, self.finished, self.num_nonfinite = [], [], [], 0

    def step_ran(self, num_tokens):
        self.steps.append(num_tokens)

    def token_generated(self, request, previous_seconds):
        self.gaps.append((request.request_id, previous_seconds))

    def request_finished(self, request):
        self.finished.append((request.request_id, request.finish_reason))

    def logits_not_finite(self):
        self.num_nonfinite += 1


def make_engine(
    model=None, num_blocks=64, max_num_seqs=4, observer=None, max_num_batched_tokens=512, tokenizer=TOKENIZER
):
    model = model or FakeModel()
    runner = Runner(model, PagedKVCache(model.config, num_blocks))
    scheduler = Scheduler(BlockManager(num_blocks), max_num_seqs, max_num_batched_tokens)
    return Engine(runner, scheduler, tokenizer, observer or Recorder())


def make_request(name, prompt="hello", **params):
    values = {"max_tokens": 20, "temperature": 0.0, **params}
    return Request(name, TOKENIZER.encode(prompt), SamplingParams(**values))


def run(engine, requests):
    """Text and reason of every request, once all are finished."""
    for request in requests:
        engine.add(request)
    texts = dict.fromkeys([request.request_id for request in requests], "")
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.text
            reasons.setdefault(output.request_id, output.finish_reason) if output.finish_reason else None
    return texts, reasons


def greedy_text(prompt, num_tokens=20):
    return TOKENIZER.decode(FakeModel().continue_greedily(TOKENIZER.encode(prompt), num_tokens))


CALLS = st.tuples(st.text("abc ", min_size=1, max_size=70), st.integers(1, 30), st.integers(0, 6))


@settings(deadline=None, max_examples=40)
@given(st.lists(CALLS, min_size=1, max_size=8), st.integers(1, 4), st.integers(16, 80))
def test_whenever_it_comes_and_however_it_is_cut_each_request_gets_the_text_it_gets_alone(calls, max_num_seqs, budget):
    observer = Recorder()
    engine = make_engine(num_blocks=12, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, observer=observer)
    pending = [(make_request(str(i), text, max_tokens=length), gap) for i, (text, length, gap) in enumerate(calls)]
    texts, reasons = {request.request_id: "" for request, _ in pending}, {}
    num_steps = 0
    while pending or engine.has_work:
        num_steps += 1
        if pending and num_steps % (1 + pending[0][1]) == 0:
            engine.add(pending.pop(0)[0])
        for output in engine.step():
            texts[output.request_id] += output.text
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
    assert texts == {str(i): greedy_text(prompt, length) for i, (prompt, length, _) in enumerate(calls)}
    assert set(reasons.values()) == {FinishReason.LENGTH}
    assert engine.scheduler.blocks.num_used_blocks == 0
    assert max(observer.steps) <= budget
    first_tokens = [name for name, previous in observer.gaps if previous is None]
    assert first_tokens == [str(index) for index in range(len(calls))]


def test_a_request_inside_its_prompt_gives_no_output_and_no_logits():
    class Counting(FakeModel):
        num_rows = ()

        def logits(self, hidden):
            self.num_rows += (len(hidden),)
            return super().logits(hidden)

    model, observer = Counting(), Recorder()
    engine = make_engine(model, max_num_batched_tokens=16, observer=observer)
    engine.add(make_request("long", "x" * 40, max_tokens=2))
    assert [len(engine.step()) for _ in range(4)] == [0, 0, 1, 1]
    assert observer.steps == [16, 16, 8, 1]
    assert model.num_rows == (1, 1)


def test_a_running_request_gets_a_token_in_every_step_of_a_long_prompt():
    engine = make_engine(max_num_batched_tokens=32)
    engine.add(make_request("short"))
    engine.step()
    engine.add(make_request("long", "x" * 100))
    names = [[output.request_id for output in engine.step()] for _ in range(8)]
    assert names == [["short"]] * 5 + [["short", "long"]] * 3


def test_a_request_aborted_inside_its_prompt_frees_its_blocks_and_the_next_one_starts():
    engine = make_engine(max_num_batched_tokens=16)
    engine.add(make_request("long", "x" * 100))
    engine.add(make_request("next"))
    engine.step()
    engine.abort(["long"])
    assert [output.request_id for output in engine.step()] == ["next"]
    while engine.has_work:
        engine.step()
    assert engine.scheduler.blocks.num_used_blocks == 0


def test_a_step_that_fails_inside_a_prompt_fails_that_request(caplog):
    engine = make_engine(FakeModel(faults=Faults(fails_on=ord("#"))), max_num_batched_tokens=16)
    _, reasons = run(engine, [make_request("bad", "x" * 20 + "#" + "x" * 20)])
    assert reasons == {"bad": FinishReason.ERROR}
    assert engine.scheduler.blocks.num_used_blocks == 0
    assert len(caplog.records) == 1


def test_requests_are_batched_prefill_and_decode_together():
    model = FakeModel()
    engine = make_engine(model)
    engine.add(make_request("a"))
    engine.step()
    engine.add(make_request("b"))
    engine.add(make_request("c"))
    outputs = engine.step()
    assert [output.request_id for output in outputs] == ["a", "b", "c"]
    assert model.batch_sizes == [1, 3]


def test_sampled_requests_with_a_seed_repeat_in_any_company():
    prompt, params = "once", {"temperature": 1.3, "seed": 5, "top_p": 0.95}
    alone, _ = run(make_engine(), [make_request("x", prompt, **params)])
    company = [make_request("y", "upon", temperature=1.0), make_request("x", prompt, **params), make_request("z", "a")]
    together, _ = run(make_engine(), company)
    other, _ = run(make_engine(), [make_request("x", prompt, **{**params, "seed": 6})])
    assert together["x"] == alone["x"] != other["x"]


def test_a_stop_string_ends_the_request_and_is_not_part_of_the_text():
    whole = greedy_text("hello")
    stop = whole[7:10]
    texts, reasons = run(make_engine(), [make_request("a", stop=(stop,))])
    assert texts["a"] == whole[: whole.index(stop)]
    assert reasons["a"] is FinishReason.STOP


def test_a_stop_string_completed_by_the_last_allowed_token_counts_as_a_stop():
    whole = greedy_text("hello")
    _, reasons = run(make_engine(), [make_request("a", stop=(whole[-3:],))])
    assert reasons["a"] is FinishReason.STOP


def test_a_stop_string_completed_by_the_text_held_to_the_end_counts_as_a_stop():
    class Halves(ByteTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            return bytes([0xE2] * len(ids)).decode("utf-8", errors="replace")

    texts, reasons = run(make_engine(tokenizer=Halves()), [make_request("a", max_tokens=1, stop=("\ufffd",))])
    assert (texts["a"], reasons["a"]) == ("", FinishReason.STOP)


def test_text_held_for_a_stop_string_that_never_came_is_shown_at_the_end():
    whole = greedy_text("hello")
    texts, reasons = run(make_engine(), [make_request("a", stop=(whole[-2:] + "never",))])
    assert texts["a"] == whole
    assert reasons["a"] is FinishReason.LENGTH


def eos_engine():
    """The letter that comes first after "hello" ends the text."""
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_ids = frozenset({FakeModel().next_token(TOKENIZER.encode("hello"))})
    return make_engine(tokenizer=tokenizer)


def test_the_end_of_text_token_stops_and_shows_nothing():
    engine = eos_engine()
    engine.add(make_request("a"))
    (output,) = engine.step()
    assert (output.text, output.finish_reason, output.num_output_tokens) == ("", FinishReason.STOP, 1)


def test_ignore_eos_goes_on_past_it():
    texts, reasons = run(eos_engine(), [make_request("a", ignore_eos=True)])
    assert texts["a"] == greedy_text("hello")
    assert reasons["a"] is FinishReason.LENGTH


def test_a_failing_step_fails_its_requests_only_and_the_engine_goes_on(caplog):
    engine = make_engine(FakeModel(faults=Faults(fails_on=ord("#"))), max_num_seqs=2)
    texts, reasons = run(engine, [make_request("a"), make_request("bad", "#"), make_request("later")])
    assert reasons == {"a": FinishReason.ERROR, "bad": FinishReason.ERROR, "later": FinishReason.LENGTH}
    assert texts["later"] == greedy_text("hello")
    assert engine.scheduler.blocks.num_used_blocks == 0
    assert len(caplog.records) == 1


def test_logits_that_are_not_finite_fail_one_request_and_are_counted():
    observer = Recorder()
    engine = make_engine(BrokenModel(faults=Faults(nan_on=ord("#"))), observer=observer)
    texts, reasons = run(engine, [make_request("good"), make_request("bad", "a#")])
    assert reasons == {"good": FinishReason.LENGTH, "bad": FinishReason.ERROR}
    assert texts["good"] == greedy_text("hello")
    assert observer.num_nonfinite == 1


def test_a_tokenizer_that_fails_on_a_token_fails_that_request_only(caplog):
    class Picky(ByteTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            if ids and ids[0] == ord("#") and len(ids) > 2:
                raise RuntimeError("cannot decode")
            return super().decode(ids, skip_special_tokens)

    texts, reasons = run(make_engine(tokenizer=Picky()), [make_request("good"), make_request("bad", "#x")])
    assert reasons == {"good": FinishReason.LENGTH, "bad": FinishReason.ERROR}
    assert texts["good"] == greedy_text("hello")
    assert "cannot be turned into text" in caplog.text


def test_aborting_frees_the_blocks_in_the_queue_and_while_running():
    observer = Recorder()
    engine = make_engine(max_num_seqs=1, observer=observer)
    engine.add(make_request("running"))
    engine.add(make_request("waiting"))
    engine.step()
    assert engine.scheduler.blocks.num_used_blocks > 0
    engine.abort(["waiting", "running", "unknown"])
    assert not engine.has_work
    assert engine.scheduler.blocks.num_used_blocks == 0
    assert observer.finished == [("waiting", FinishReason.ABORT), ("running", FinishReason.ABORT)]


def test_the_observer_sees_steps_tokens_and_times():
    observer = Recorder()
    engine = make_engine(observer=observer)
    request = make_request("a", "hello", max_tokens=3)
    run(engine, [request])
    assert observer.steps == [5, 1, 1]
    first, second, third = (previous for _, previous in observer.gaps)
    assert first is None
    assert request.first_token_seconds == second <= third <= request.last_token_seconds <= request.finished_seconds


def test_a_step_without_requests_does_nothing():
    assert make_engine().step() == []


def test_a_request_larger_than_the_cache_is_refused_when_added():
    with pytest.raises(ValueError, match="the cache holds 32"):
        make_engine(num_blocks=2).add(make_request("a", "x" * 20))


def nlls_of(tokens):
    """-log p of every token but the first after those before it, from the definition."""
    logits = [FakeModel().logits(torch.tensor([[float(state_of(tokens[:end]))]]))[0] for end in range(1, len(tokens))]
    return [-row.double().log_softmax(0)[token].item() for row, token in zip(logits, tokens[1:], strict=True)]


def scores_of(engine, request):
    """All log-probabilities that a request gets, and its outputs."""
    engine.add(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return [score for output in outputs for score in output.prompt_logprobs], outputs


@given(st.text("abc ", min_size=2, max_size=70), st.integers(1, 70), st.integers(16, 80), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_prompts_are_scored_from_where_it_is_asked_for_however_they_are_cut(text, score_from, budget, num_generated):
    engine = make_engine(max_num_batched_tokens=budget)
    request = make_request("a", text, max_tokens=num_generated, num_prompt_logprobs=2)
    request.score_from = first = min(score_from, len(text) - 1)
    scores, outputs = scores_of(engine, request)
    tokens = TOKENIZER.encode(text)
    assert [score.token_id for score in scores] == tokens[first:]
    want = nlls_of(tokens)[first - 1 :]
    assert [-score.logprob for score in scores] == pytest.approx(want, rel=1e-5)
    for score in scores:
        (best, highest), (_, second) = score.top
        assert highest >= second >= score.logprob or best == score.token_id
    assert "".join(output.text for output in outputs) == (greedy_text(text, num_generated) if num_generated else "")
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert engine.scheduler.blocks.num_used_blocks == 0


def test_a_request_for_no_tokens_computes_its_prompt_and_ends():
    observer = Recorder()
    engine = make_engine(observer=observer)
    engine.add(make_request("a", "hello", max_tokens=0))
    (output,) = engine.step()
    assert (output.text, output.finish_reason, output.num_output_tokens) == ("", FinishReason.LENGTH, 0)
    assert (observer.steps, observer.gaps) == ([5], [])


def test_scores_that_are_not_finite_fail_the_request_that_also_generates():
    observer = Recorder()
    engine = make_engine(BrokenModel(faults=Faults(nan_on=ord("#"))), observer=observer)
    good = make_request("good")
    engine.add(good)
    _, outputs = scores_of(engine, make_request("bad", "a#b", num_prompt_logprobs=0))
    assert {output.request_id: output.finish_reason for output in outputs if output.finish_reason} == {
        "good": FinishReason.LENGTH,
        "bad": FinishReason.ERROR,
    }
    assert observer.num_nonfinite == 1


def test_what_scores_depend_on_is_not_left_to_a_cache_of_prompts():
    plain, scored = make_request("a", "hello"), make_request("b", "hello", num_prompt_logprobs=0)
    scored.score_from = 3
    assert (plain.num_cacheable_tokens, scored.num_cacheable_tokens) == (4, 2)
