"""Recorded decode steps, on a device that replays operators as CUDA graphs do: the logits of the step as it is."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kernels.paged import TorchPagedAttention
from models.llama.attention_choice import AttentionChoice
from models.llama.batch import SequenceSpan, TokenBatch
from models.llama.decode_graphs import graph_sizes
from models.llama.kv_cache import PagedKVCache
from models.llama.model import LlamaForCausalLM
from models.llama.paged_network import PagedLlama
from models.llama.prefill import SdpaPrefill
from service.bench.engine import PlainTexts
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine, EngineObserver
from service.engine.ngram import Drafter
from service.engine.request import Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from tests.support.llama_variants import uncached_logits
from tests.support.native_network import network_of, save
from tests.support.paged_steps import PagedSequence, fill_with_nan, next_tokens, scattered
from tests.support.recorder import RecordingDevice
from tests.unit.test_paged_network import NUM_BLOCKS, TOLERANCE, build, texts

MAX_CONTEXT = 64


def recorded(
    model: PagedLlama, sizes: tuple[int, ...], *, has_ranks: bool = False
) -> tuple[PagedKVCache, RecordingDevice]:
    cache, device = model.new_cache(NUM_BLOCKS), RecordingDevice()
    fill_with_nan(cache)
    model.record_decodes(cache, sizes, MAX_CONTEXT, device, has_ranks=has_ranks)
    return cache, device


def replays(device: RecordingDevice) -> list[int]:
    """Rows of each recorded step that ran, and how often."""
    return [len(step.output) for step in device.steps for _ in range(step.num_replays)]


@pytest.mark.parametrize(
    ("max_num_seqs", "asked", "sizes"),
    [
        (1, (), (1,)),
        (8, (), (1, 2, 4, 8)),
        (100, (), (1, 2, 4, 8, 16, 32, 64, 100)),
        (8, (4, 2, 64), (2, 4, 8)),
        (3, (1,), (1,)),
    ],
)
def test_sizes_double_up_to_the_most_sequences(max_num_seqs, asked, sizes) -> None:
    assert graph_sizes(max_num_seqs, asked) == sizes


@settings(max_examples=12, deadline=None)
@given(st.data(), st.sampled_from(["llama_grouped_tied", "mistral_window", "qwen2_layer_types"]))
def test_any_batch_of_decodes_gives_the_logits_of_the_eager_network(data: st.DataObject, variant: str) -> None:
    """Two engines' worth of the same steps: one replays, one runs kernel by kernel, whatever comes and goes."""
    replaying, eager = build(variant), build(variant)
    cache, device = recorded(replaying, (1, 2, 4))
    other_cache = eager.new_cache(NUM_BLOCKS)
    pairs = [scattered(texts(*[28] * 5), NUM_BLOCKS, seed=3) for _ in range(2)]
    for _ in range(data.draw(st.integers(1, 6))):
        decoding = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
        if not all(pairs[0][index].num_left for index in decoding):
            break
        is_prompt = data.draw(st.sampled_from((False, False, True)))
        steps = []
        for sequences in pairs:
            counts = [
                min(9 if is_prompt and index == decoding[0] else 1, sequences[index].num_left) for index in decoding
            ]
            steps.append(next_tokens([(sequences[i], count) for i, count in zip(decoding, counts, strict=True)]))
        before = sum(step.num_replays for step in device.steps)
        logits, wanted = replaying.step(steps[0], cache), eager.step(steps[1], other_cache)
        assert logits is not None
        assert wanted is not None
        torch.testing.assert_close(logits, wanted, rtol=0, atol=TOLERANCE)
        is_replayed = max(counts) == 1 and len(decoding) <= 4
        assert sum(step.num_replays for step in device.steps) - before == is_replayed


def decode_alone(model: PagedLlama, cache: PagedKVCache, sequence: PagedSequence) -> Tensor:
    rows = []
    while sequence.num_left:
        logits = model.step(next_tokens([(sequence, 1)]), cache)
        assert logits is not None
        rows.append(logits.clone())
    return torch.cat(rows)


def test_a_replay_is_of_the_next_larger_size_and_gives_what_running_it_gives_bit_for_bit() -> None:
    model = build("llama_grouped_tied")
    cache, device = recorded(model, (2, 4))
    (sequence,) = scattered(texts(20), NUM_BLOCKS)
    logits = decode_alone(model, cache, sequence)
    assert replays(device) == [2] * 20
    torch.testing.assert_close(logits, uncached_logits(model.layers, sequence.tokens), rtol=0, atol=TOLERANCE)
    graphs = model._graphs
    assert graphs is not None
    assert torch.equal(graphs._run(2, False)[0], logits[-1])  # the buffers still hold the last step


def test_rows_that_fill_up_touch_no_block_of_a_request() -> None:
    model = build("llama_grouped_tied")
    cache, _ = recorded(model, (8,))
    first, second = scattered(texts(17, 30), NUM_BLOCKS)
    model.step(next_tokens([(second, 30)]), cache)
    held = [cache.layer(index).keys[: cache.num_slots].clone() for index in range(3)]
    model.step(next_tokens([(first, 1)]), cache)
    slot = first.block_table[0] * 16
    for index, before in enumerate(held):
        after = cache.layer(index).keys[: cache.num_slots]
        changed = (~torch.isclose(before, after, equal_nan=True)).flatten(1).any(1).nonzero().flatten()
        assert changed.tolist() == [slot]


def test_what_is_no_plain_decode_runs_as_it_is() -> None:
    model = build("llama_grouped_tied")
    cache, device = recorded(model, (1, 2))
    first, second, third = scattered(texts(40, 40, 40), NUM_BLOCKS)
    model.step(next_tokens([(first, 10)]), cache)  # a prompt
    model.step(next_tokens([(first, 1), (second, 12)]), cache)  # beside a prompt
    model.step(next_tokens([(first, 3)]), cache)  # a draft
    model.step(next_tokens([(first, 1)])._replace(logit_rows=[]), cache)  # no logits
    model.step(next_tokens([(first, 1), (second, 1), (third, 1)]), cache)  # too many
    model.step(next_tokens([(third, 1)]), model.new_cache(NUM_BLOCKS))  # another cache
    long = PagedSequence([1] * (MAX_CONTEXT + 2), list(range(5)), MAX_CONTEXT)
    model.step(next_tokens([(long, 1)]), cache)  # longer than was recorded
    assert replays(device) == []
    model.step(next_tokens([(first, 1)]), cache)
    assert replays(device) == [1]


@pytest.mark.parametrize("table", [None, [], [NUM_BLOCKS], [-1]])
def test_a_block_table_that_cannot_be_is_refused(table: list[int] | None) -> None:
    model = build("llama_grouped_tied")
    cache, _ = recorded(model, (1,))
    with pytest.raises(ValueError, match="block"):
        model.step(TokenBatch([1], [SequenceSpan(0, 1, 5, None, table)], [0]), cache)


def test_a_cache_without_scratch_is_refused() -> None:
    model = build("llama_grouped_tied")
    cache = PagedKVCache(model.config, 2, has_block_tables=True)
    with pytest.raises(ValueError, match="scratch"):
        model.record_decodes(cache, (1,), MAX_CONTEXT, RecordingDevice(), has_ranks=False)


def test_what_keeps_steps_from_being_recorded_is_said() -> None:
    assert build("llama_grouped_tied").graphs_obstacle is None
    assert "dynamic" in str(build("llama_dynamic_rope").graphs_obstacle)


def test_largest_sizes_are_recorded_first_and_hold_memory() -> None:
    _, device = recorded(build("llama_grouped_tied"), (1, 2, 4))
    assert [len(step.output) for step in device.steps] == [4, 2, 1]
    assert device.num_bytes > 0


def test_ranks_are_read_when_a_step_is_replayed(tmp_path: Path) -> None:
    layers = save(tmp_path / "art", network_of()).reference()
    assert isinstance(layers, LlamaForCausalLM)
    model = PagedLlama(layers, AttentionChoice(TorchPagedAttention(), SdpaPrefill()))
    cache, device = recorded(model, (2,), has_ranks=True)
    assert len(device.steps) == 2
    logits = {}
    for rank in (None, 0, 3):
        first, second = scattered(texts(4, 4), NUM_BLOCKS)
        second.rank = rank
        for _ in range(4):
            logits[rank] = model.step(next_tokens([(first, 1), (second, 1)]), cache).clone()
    for rank, rows in logits.items():
        first, second = scattered(texts(4, 4), NUM_BLOCKS)
        second.rank = rank
        plain = PagedLlama(layers, model.attention)
        eager = plain.step(next_tokens([(first, 4), (second, 4)], all_rows=False), plain.new_cache(NUM_BLOCKS))
        torch.testing.assert_close(rows, eager, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(logits[0][1], logits[None][1], atol=1e-3)


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_written_by_no_operator_cannot_be_recorded(reads: bool) -> None:
    def run() -> Tensor:
        output = torch.empty(2)
        torch.from_dlpack(output).numpy()[:] = 1
        return output.view(2, 1) + 1 if reads else output

    with pytest.raises(RuntimeError, match="no operator wrote"):
        RecordingDevice().record(run)


def test_what_is_only_allocated_is_undefined_in_every_replay() -> None:
    def run() -> Tensor:
        return torch.empty(2).index_fill_(0, torch.tensor([1]), 3.0)

    step = RecordingDevice().record(run)
    step.output.fill_(5.0)
    step.replay()
    torch.testing.assert_close(step.output, torch.tensor([float("nan"), 3.0]), equal_nan=True)


def generated(model: PagedLlama, cache: PagedKVCache, num_drafted: int = 0) -> list[list[int]]:
    """What an engine makes of prompts that come while others decode; the cache is too small for all of them at once."""
    blocks = BlockManager(cache.num_blocks, has_prefix_cache=True)
    drafter = Drafter(num_drafted, 2) if num_drafted else None
    engine = Engine(Runner(model, cache), Scheduler(blocks, 4, 32, drafter), PlainTexts(), EngineObserver())
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [[7, 8] * (length // 2) for length in (20, 40, 6, 30, 20)]
    requests = [Request(str(index), prompt, params) for index, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
        engine.step()
    while engine.has_work:
        assert not [output.error for output in engine.step() if output.error]
    return [list(request.output_token_ids) for request in requests]


@pytest.mark.parametrize("num_drafted", [0, 3])
def test_an_engine_generates_the_same_with_and_without_recorded_steps(num_drafted: int) -> None:
    model, plain = build("llama_grouped_tied"), build("llama_grouped_tied")
    cache, device = model.new_cache(9), RecordingDevice()
    model.record_decodes(cache, (1, 2, 4), MAX_CONTEXT, device, has_ranks=False)
    assert generated(model, cache, num_drafted) == generated(plain, plain.new_cache(9))
    assert num_drafted or len(replays(device)) > 10
