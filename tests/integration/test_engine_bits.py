"""A real network behind the engine: company, cuts, cached prefixes and preemption change no bit of a request's logits.

On the native kernels every row is computed the same way whatever is beside it, so logits are compared bit by bit. The
reference backend leaves its matrix products to PyTorch, which sums in another order for another number of rows: there
the tokens are compared, and logits to rounding.
"""

import pytest
import torch

from models.artifact.execution import RunOptions
from models.artifact.load import load_artifact
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine, EngineObserver
from service.engine.request import Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from tests.support.artifact_builder import tiny_model, write_artifact
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

BEGINNING = [int(token) for token in torch.randint(VOCAB_SIZE, (37,), generator=torch.Generator().manual_seed(1))]
PROMPTS = [[*BEGINNING, 7 * n, 3] for n in range(3)] + [[5, 9, 11], BEGINNING[:32], [4] * 30]
NUM_TOKENS = 20


RUNS = [("auto", "fp16"), ("auto", "int8"), ("reference", "auto"), ("reference", "fp16"), ("reference", "int8")]


@pytest.fixture(scope="module", params=RUNS, ids=" ".join)
def loaded(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("artifacts") / "tiny"
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    write_artifact(directory, model, tokenizer_files=tokenizer_files())
    backend, kv_cache_dtype = request.param
    options = RunOptions(backend, kv_cache_dtype=kv_cache_dtype)
    return load_artifact(directory, dtype=torch.float32, options=options)


@pytest.fixture(scope="module")
def alone(loaded):
    """Tokens and logits of each prompt that has the engine to itself, all of it in one step."""
    return [run(loaded, [prompt], has_prefix_cache=False)[0][0] for prompt in PROMPTS]


class RecordingRunner(Runner):
    """Keeps the logits of every request."""

    def __init__(self, model, kv_cache):
        super().__init__(model, kv_cache)
        self.logits = {}

    def run(self, scheduled):
        result = super().run(scheduled)
        requests = [item.request for item in scheduled if item.gets_token]
        for row, request in enumerate(requests):
            self.logits.setdefault(request.request_id, []).append(result.logits[row].clone())
        return result


class Recorder(EngineObserver):
    def __init__(self):
        self.num_cached, self.num_preempted = 0, 0

    def request_started(self, request):
        self.num_cached += request.num_cached_tokens

    def request_preempted(self, request):
        self.num_preempted += 1


def run(loaded, prompts, num_blocks=40, max_num_seqs=8, budget=512, has_prefix_cache=True, rounds=1):
    """((tokens, logits (num_tokens, vocab_size)) of every prompt of the last round, what was observed)."""
    recorder = Recorder()
    runner = RecordingRunner(loaded.model, loaded.model.new_cache(num_blocks))
    scheduler = Scheduler(BlockManager(num_blocks, has_prefix_cache=has_prefix_cache), max_num_seqs, budget)
    engine = Engine(runner, scheduler, loaded.tokenizer, recorder)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for number in range(rounds):
        requests = [Request(f"{number} {index}", list(prompt), params) for index, prompt in enumerate(prompts)]
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
    outputs = [(request.output_token_ids, torch.stack(runner.logits[request.request_id])) for request in requests]
    return outputs, recorder


def assert_same(loaded, outputs, alone):
    is_native = type(loaded.model).__name__ == "NativeLlama"
    for (tokens, logits), (want_tokens, want_logits) in zip(outputs, alone, strict=True):
        assert tokens == want_tokens
        if is_native:
            assert torch.equal(logits, want_logits)
        else:
            torch.testing.assert_close(logits, want_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_num_seqs", [2, 8])
@pytest.mark.parametrize("budget", [24, 512])
def test_company_and_chunks_change_nothing(loaded, alone, max_num_seqs, budget):
    outputs, recorder = run(loaded, PROMPTS, max_num_seqs=max_num_seqs, budget=budget, has_prefix_cache=False)
    assert_same(loaded, outputs, alone)
    assert recorder.num_cached == 0


@pytest.mark.parametrize("budget", [24, 512])
def test_a_cached_prefix_changes_nothing(loaded, alone, budget):
    outputs, recorder = run(loaded, PROMPTS, budget=budget, rounds=2)
    assert_same(loaded, outputs, alone)
    assert recorder.num_cached >= 3 * 32 + 4 * 16  # two blocks of each prompt but the short one, in the second round


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_preemption_changes_nothing(loaded, alone, has_prefix_cache):
    outputs, recorder = run(loaded, PROMPTS, num_blocks=8, budget=40, has_prefix_cache=has_prefix_cache)
    assert_same(loaded, outputs, alone)
    assert recorder.num_preempted > 0
