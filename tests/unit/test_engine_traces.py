"""Requests that come, share, crowd each other out and leave at random: each gets the text that it gets alone.

The fake model reads every token before the present one back from the cache: a block with other tokens in it, or one
that is not computed yet, gives another text.
"""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.kv_cache import PagedKVCache
from service.engine.block_keys import block_key, root_key
from service.engine.block_manager import BLOCK_SIZE, BlockManager
from service.engine.engine import Engine, EngineObserver
from service.engine.ngram import Drafter
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from tests.support.fake_model import ByteTokenizer, RepetitiveModel

TOKENIZER = ByteTokenizer()
BEGINNINGS = ["", "b" * 16, "The same words before every question. ", "The same words before every answer, "]
NUM_BLOCKS = 8
MAX_DRAFT = 6
CALLS = st.fixed_dictionaries(
    {
        "prompt": st.builds(str.__add__, st.sampled_from(BEGINNINGS), st.text("ab ", min_size=1, max_size=40)),
        "max_tokens": st.integers(1, 40),
        "seed": st.none() | st.integers(0, 3),
        "salt": st.sampled_from(["", "", "other"]),
        "gap": st.integers(0, 4),
        "steps_to_abort": st.none() | st.none() | st.integers(0, 25),
    }
)


class Recorder(EngineObserver):
    """Counts what the engine computes and takes from the cache."""

    def __init__(self):
        self.num_computed, self.num_cached, self.num_preempted, self.started = 0, 0, 0, []
        self.num_drafted, self.num_accepted = 0, 0

    def draft_checked(self, num_tokens, num_accepted):
        assert 0 <= num_accepted <= num_tokens <= MAX_DRAFT
        self.num_drafted += num_tokens
        self.num_accepted += num_accepted

    def step_ran(self, num_tokens):
        self.num_computed += num_tokens

    def request_started(self, request):
        self.started.append(request.request_id)
        self.num_cached += request.num_cached_tokens

    def request_preempted(self, request):
        self.num_preempted += 1


def make_engine(num_blocks, max_num_seqs=4, budget=512, has_prefix_cache=True, observer=None, num_drafted=0):
    model = RepetitiveModel()
    blocks = BlockManager(num_blocks, has_prefix_cache=has_prefix_cache)
    scheduler = Scheduler(blocks, max_num_seqs, budget, Drafter(num_drafted, 3) if num_drafted else None)
    return Engine(Runner(model, PagedKVCache(model.config, num_blocks)), scheduler, TOKENIZER, observer or Recorder())


def make_request(name, call):
    temperature = 0.0 if call["seed"] is None else 1.5
    params = SamplingParams(call["max_tokens"], temperature, seed=call["seed"])
    return Request(name, TOKENIZER.encode(call["prompt"]), params, cache_salt=call["salt"])


def text_alone(call):
    engine = make_engine(64, has_prefix_cache=False)
    engine.add(make_request("alone", call))
    texts = []
    while engine.has_work:
        texts += [output.text for output in engine.step()]
    return "".join(texts)


def check_blocks(scheduler):
    """Held as often as tables have it; what several hold is full, computed, and the same text under the same salt."""
    blocks, requests = scheduler.blocks, [*scheduler.running, *scheduler.waiting]
    held = Counter(block for request in requests for block in request.block_table)
    assert blocks._num_holders == [held[block] for block in range(blocks.num_blocks)]
    assert sorted([*blocks._free, *blocks._kept, *held]) == list(range(blocks.num_blocks))
    assert {blocks._keys[block]: block for block in range(blocks.num_blocks) if blocks._keys[block]} == blocks._found
    texts = {}
    for request in requests:
        assert len(set(request.block_table)) == len(request.block_table)
        assert (len(request.block_table) - 1) * BLOCK_SIZE < request.num_tokens + MAX_DRAFT
        key = root_key(request.cache_salt)
        for index, block in enumerate(request.block_table):
            end = (index + 1) * BLOCK_SIZE
            is_full = end <= request.num_computed_tokens
            if is_full:
                key = block_key(key, request.tokens_between(end - BLOCK_SIZE, end))
                assert blocks._keys[block] in {key, None}
            text = (request.cache_salt, tuple(request.tokens_between(0, end)))
            assert texts.setdefault(block, text) == text
            assert held[block] == 1 or is_full


def check_order(scheduler, arrival, step):
    """Everybody who runs came before everybody who waits; decodes all run, prompts in order and at most one is cut."""
    order = [arrival[request.request_id] for request in [*scheduler.running, *scheduler.waiting]]
    assert order == sorted(order)
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert sum(item.num_tokens for item in step) <= scheduler.max_num_batched_tokens
    assert len({item.request for item in step}) == len(step)
    assert {item.request for item in step} <= set(scheduler.running)
    for request in scheduler.running:
        if request.is_decoding:
            assert any(item.request is request for item in step)
    chunks = [item for item in step if not item.gets_token]
    assert chunks == step[len(step) - len(chunks) :] and len(chunks) <= 1
    for request, num_tokens, *_ in chunks:
        assert num_tokens > 0 and (request.num_computed_tokens + num_tokens) % BLOCK_SIZE == 0


class Trace:
    """One run of the engine over calls that come when their time is there; checks everything in every step."""

    def __init__(self, engine):
        self.engine = engine
        self.texts, self.reasons, self.arrival = {}, {}, {}
        schedule = engine.scheduler.schedule

        def checked():
            step = schedule()
            check_order(engine.scheduler, self.arrival, step)
            check_blocks(engine.scheduler)
            return step

        engine.scheduler.schedule = checked

    def run(self, calls):
        pending = [(str(index), call) for index, call in enumerate(calls)]
        aborts, num_steps, wait = {}, 0, 0
        while pending or self.engine.has_work:
            num_steps += 1
            assert num_steps < 3000
            while pending and wait == 0:
                name, call = pending.pop(0)
                self.arrival[name] = len(self.arrival)
                self.texts[name] = ""
                self.engine.add(make_request(name, call))
                if call["steps_to_abort"] is not None:
                    aborts[name] = num_steps + call["steps_to_abort"]
                wait = call["gap"]
            wait = max(0, wait - 1)
            self._step()
            gone = [name for name, step in aborts.items() if step == num_steps and name not in self.reasons]
            self.engine.abort(gone)
            self.reasons.update(dict.fromkeys(gone, FinishReason.ABORT))
            check_blocks(self.engine.scheduler)

    def _step(self):
        for output in self.engine.step():
            assert output.request_id not in self.reasons
            self.texts[output.request_id] += output.text
            if output.finish_reason:
                self.reasons[output.request_id] = output.finish_reason


@settings(deadline=None, max_examples=150)
@given(
    st.lists(CALLS, min_size=1, max_size=10),
    st.integers(NUM_BLOCKS, 16),
    st.integers(1, 6),
    st.integers(22, 90),
    st.booleans(),
    st.integers(0, MAX_DRAFT),
)
def test_whoever_shares_crowds_or_leaves_each_request_gets_the_text_it_gets_alone(
    calls, num_blocks, max_num_seqs, budget, has_prefix_cache, num_drafted
):
    observer = Recorder()
    engine = make_engine(num_blocks, max_num_seqs, budget, has_prefix_cache, observer, num_drafted)
    trace = Trace(engine)
    trace.run(calls)
    for index, call in enumerate(calls):
        whole, name = text_alone(call), str(index)
        if trace.reasons[name] is FinishReason.ABORT:
            assert whole.startswith(trace.texts[name])
        else:
            assert (trace.texts[name], trace.reasons[name]) == (whole, FinishReason.LENGTH)
    blocks = engine.scheduler.blocks
    assert (blocks.num_used_blocks, blocks.num_free_blocks) == (0, num_blocks)
    assert observer.started == sorted(observer.started, key=int)  # in the order in which they came
    if not has_prefix_cache:
        assert observer.num_cached == blocks.num_cached_blocks == 0
    if not any(trace.reasons[name] is FinishReason.ABORT for name in trace.reasons) and not observer.num_preempted:
        num_rejected = observer.num_drafted - observer.num_accepted
        # Every token is computed once or found: prompts, and all that is generated but the last token of each.
        num_known = sum(len(call["prompt"]) + call["max_tokens"] - 1 for call in calls)
        assert observer.num_computed + observer.num_cached == num_known + num_rejected


def call_of(prompt, max_tokens=40, seed=None):
    return {
        "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "salt": "", "gap": 0, "steps_to_abort": None,
    }  # fmt: skip


def test_crowded_seeded_requests_are_preempted_and_repeat_or_lose_nothing():
    calls = [call_of("x" * (10 + index), seed=index) for index in range(6)]
    observer = Recorder()
    trace = Trace(make_engine(NUM_BLOCKS, 6, observer=observer))
    trace.run(calls)
    assert observer.num_preempted >= 2
    assert trace.texts == {str(index): text_alone(call) for index, call in enumerate(calls)}


def test_a_burst_with_one_beginning_computes_it_once():
    beginning = BEGINNINGS[2]  # two full blocks and a bit
    observer = Recorder()
    trace = Trace(make_engine(64, 8, observer=observer))
    trace.run([call_of(beginning + letter, max_tokens=2) for letter in "abcdefgh"])
    assert observer.num_cached == 7 * 32
    assert observer.num_computed == len(beginning) + 1 + 7 * (len(beginning) + 1 - 32) + 8


def test_the_same_text_generated_twice_is_kept_once():
    engine = make_engine(64)
    engine.add(make_request("a", call_of("x" * 20)))
    engine.add(make_request("b", call_of("x" * 20)))
    for _ in range(36):
        engine.step()
    first, second = engine.scheduler.running
    assert first.num_computed_tokens > second.num_computed_tokens >= 48
    assert first.block_table[:3] == second.block_table[:3]
    assert engine.scheduler.blocks.num_used_blocks == 5
