"""The bench on a GPU, run on the CPU: tiny layers, a clock that counts, contenders that are plain products."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from models.artifact.execution import RunOptions
from models.bench import contenders as made_by
from models.bench.aims import aims
from models.bench.cards import card_of
from models.bench.contenders import CUBLAS, LIBRARIES, Contender, contenders, made, ours
from models.bench.device_clock import CudaClock
from models.bench.gpu_peaks import BF16, COPY, INT8, PeakSizes, card_here
from models.bench.layer_times import LayerBench, LayerTime, distinct_shapes
from models.bench.probe import ProbeError, Samples
from models.bench.random_network import random_network, step_bytes
from models.bench.report import aim_cells, layer_cells
from models.bench.roofline import W4A8, W4A16, LayerCost, Shape, seconds
from models.bench.workload import Workload
from models.cli import make_cli
from models.errors import QerveError
from models.kernels.triton.environment import TritonEnvironment
from models.layers.linear import LowRankLinear
from models.llama.attention_choice import choose_attention
from models.llama.config import LlamaConfig
from models.llama.paged_network import PagedLlama
from service.bench.engine import PlainTexts
from service.bench.gpu import GpuBench, GpuPlace, GpuSubject, cuda_device, gpu_subject
from service.bench.options import BenchOptions
from service.bench.output import print_report
from service.cli_bench import bench
from tests.support.native import needs_native
from tests.support.recorder import RecordingDevice
from tests.support.tiny_checkpoints import tiny_config

CPU = torch.device("cpu")
SHAPE = Shape("tiny", "q", 64, 128)
PROPERTIES = SimpleNamespace(total_memory=8e9, L2_cache_size=1 << 20)
H100 = "NVIDIA H100 80GB HBM3"


class FakeClock:
    """Every call is run once; it takes as many microseconds as were asked before it."""

    def __init__(self) -> None:
        self.num_calls = 0

    def seconds(self, call) -> float:
        call()
        self.num_calls += 1
        return self.num_calls * 1e-6


class FixedClock:
    """Every call takes as long as ``taken`` has for the name it was made under."""

    def seconds(self, call) -> float:
        return float(call())


def timed(name, scheme, rank, taken, is_fused=True):
    return Contender(name, scheme, rank, is_fused, lambda shape, device: lambda x: taken)


def plain(name: str) -> Contender:
    def make(shape, device):
        weight = torch.ones(shape.out_features, shape.in_features, dtype=torch.bfloat16)
        return lambda x: torch.nn.functional.linear(x, weight)

    return Contender(name, None, 0, True, make)


class FakeCuda:
    """What ``CudaClock`` asks of ``torch.cuda``: events on a clock of its own, which work moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def get_device_properties(self, device):
        return PROPERTIES

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self, device):
        self.log.append("synchronize")


class FakeEvent:
    def __init__(self, cuda) -> None:
        self._cuda = cuda
        self.at = None

    def record(self) -> None:
        self.at = self._cuda.now
        self._cuda.log.append("event")

    def elapsed_time(self, end) -> float:
        assert "synchronize" in self._cuda.log
        return end.at - self.at


def test_the_clock_gives_the_median_of_events_around_each_call():
    cuda = FakeCuda()
    clock = CudaClock(CPU, cuda, repeats=5)
    durations = iter([100.0, 100.0, 100.0, 7.0, 1.0, 3.0, 9.0, 5.0])

    def call() -> None:
        cuda.log.append("call")
        cuda.now += next(durations)

    assert clock.seconds(call) == pytest.approx(5e-3)
    assert cuda.log == ["call"] * 3 + ["event", "call", "event"] * 5 + ["synchronize"]
    assert clock._flushed.nbytes > PROPERTIES.L2_cache_size


def test_layers_are_compared_within_rounds_and_with_the_card():
    card = card_of(H100)
    least = seconds(LayerCost(SHAPE, W4A16, 8, 0).plain, card)
    run = [
        timed(CUBLAS, None, 0, 8 * least),
        timed("ours", W4A16, 0, 2 * least),
        timed("ours fused", W4A16, 32, 2.1 * least),
    ]
    layers = LayerBench(run, [SHAPE], [8], CPU, FixedClock())
    cublas, ours_bare, fused = layers.times(layers.run(3), card)
    assert ours_bare.limit_share == pytest.approx(0.5)
    assert ours_bare.of_cublas == pytest.approx(4)
    assert ours_bare.rank_share is None
    assert fused.rank_share == pytest.approx(0.05)
    assert cublas.of_cublas == 1
    assert cublas.limit_share == pytest.approx(
        2 * (8 * 128 + 8 * 64 + 64 * 128) / card.bandwidth / (8 * least)
    )  # 16-bit operands and result


def test_what_fails_is_reported_and_the_others_go_on():
    def explode(x):
        raise RuntimeError("no kernel image\nmore")

    broken = Contender("broken", W4A16, 0, True, lambda shape, device: explode)
    layers = LayerBench([plain("plain"), broken], [SHAPE], [1, 2], CPU, FakeClock())
    samples = layers.run(2)
    assert samples.failed["64 x 128, M 2, broken"] == "RuntimeError: no kernel image"
    assert {it.contender for it in layers.times(samples, card_of(H100))} == {"plain"}


@pytest.mark.parametrize("name", ["gemlite W4A16", "Marlin W4A16 (vLLM)"])
def test_a_library_that_is_not_installed_is_named(name):
    with pytest.raises(ProbeError, match=r"(gemlite|vllm) cannot be used: No module named"):
        made(LIBRARIES[name], SHAPE, CPU)


def test_our_kernels_say_why_they_do_not_run_here(monkeypatch):
    monkeypatch.setattr(made_by, "BACKEND", "torch-int8")
    with pytest.raises(ProbeError, match="torch-int8"):
        made(ours(W4A16, 0), SHAPE, CPU)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_our_layers_compute_the_same_fused_or_not(monkeypatch, is_fused, backend):
    monkeypatch.setattr(made_by, "BACKEND", backend)
    torch.manual_seed(1)
    run = made(ours(W4A16, 32, is_fused=is_fused), SHAPE, CPU)
    torch.manual_seed(1)
    bare = made(ours(W4A16, 0), SHAPE, CPU)
    x = torch.ones(3, 128, dtype=torch.bfloat16)
    term = 128 * made_by.FACTOR * 32 * made_by.FACTOR
    assert (run(x).float() - bare(x).float()).mean() == pytest.approx(term, rel=0.1)


def test_every_scheme_is_measured_bare_fused_and_unfused_beside_all_libraries():
    names = [contender.name for contender in contenders(32)]
    assert names[0] == CUBLAS
    assert set(LIBRARIES) < set(names)
    for scheme in ("W4A16", "W4A8", "W8A8"):
        for form in ("", " rank 32", " rank 32 unfused"):
            assert f"qerve {scheme}{form}" in names
    sizes = {(it.out_features, it.in_features) for it in distinct_shapes()}
    assert {(4096, 4096), (11008, 4096), (1024, 8192), (8192, 28672)} <= sizes
    assert len(sizes) == len(distinct_shapes())


def layer_time(contender, *, of_cublas=None, rank_share=None, num_rows=4096) -> LayerTime:
    return LayerTime(SHAPE, num_rows, contender.name, 1e-3, 0.5, of_cublas, rank_share)


def test_aims_are_decided_by_the_worst_shape():
    rows = [
        layer_time(ours(W4A16, 0), of_cublas=0.9),
        layer_time(ours(W4A16, 0), of_cublas=0.79),
        layer_time(ours(W4A16, 0), of_cublas=0.1, num_rows=64),
        layer_time(ours(W4A8, 0), of_cublas=1.2),
        layer_time(ours(W4A16, 32), rank_share=0.02),
        layer_time(ours(W4A8, 32), rank_share=0.049, num_rows=1),
        layer_time(ours(W4A8, 32, is_fused=False), rank_share=0.5),
    ]
    decode, wide, integer, extra = aims(rows, 0.85)
    assert (decode.is_met, wide.value, wide.is_met) == (True, 0.79, False)
    assert (integer.value, integer.is_met) == (1.2, True)
    assert (extra.value, extra.is_met) == (0.049, True)
    assert not aims([layer_time(ours(W4A8, 0), of_cublas=1.0)], None)[2].is_met
    assert [aim.is_met for aim in aims([], None)] == [None] * 4
    assert [cells[-1] for cells in aim_cells(aims(rows, None))] == ["not measured", "no", "yes", "yes"]
    assert layer_cells(rows)[0] == ["64 x 128", "4096", "qerve W4A16", "1000.0", "50%", "0.90x", "-"]


def test_an_unknown_card_has_the_limits_that_were_measured():
    samples = Samples(values={COPY: [5e11], BF16: [1e14]})
    card = card_here("NVIDIA Something", samples, PROPERTIES)
    assert (card.bandwidth, card.bf16, card.int8) == (5e11, 1e14, 1e14)
    assert card.memory == 8e9
    assert card_here(H100, samples, PROPERTIES) is card_of(H100)


def tiny_network(backend="auto", dtype=torch.bfloat16):
    config = LlamaConfig.from_hf(
        tiny_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=False, max_position_embeddings=256),
        "tiny",
    )
    return random_network(config, 8, CPU, dtype, backend=backend)


def test_a_decode_step_reads_every_layer_and_the_head():
    network = tiny_network()
    linears = [module for module in network.modules() if isinstance(module, LowRankLinear)]
    assert len(linears) == 14
    assert step_bytes(network) == sum(it.nbytes for it in linears) + network.lm_head.nbytes


def place(**changes) -> GpuPlace:
    values = GpuPlace(
        CPU, FakeClock(), H100, PROPERTIES, [SHAPE], [1, 8], [plain(CUBLAS), timed("x", W4A16, 0, 1)], PeakSizes(64, 32)
    )
    return replace(values, **changes)


def options(sections) -> BenchOptions:
    return BenchOptions(frozenset(sections), 2, None, Workload(4, 3, 20))


def test_the_whole_bench_gives_shares_of_the_card_and_one_report(capsys):
    subject = GpuSubject("llama-2-7b, tiny", tiny_network(), PlainTexts())
    report = GpuBench(place(), subject, options({"kernels", "decode", "prefill"})).run()
    values = json.loads(json.dumps(report.to_dict()))
    assert {COPY, BF16, INT8, "decode 1", "prefill 20", f"64 x 128, M 8, {CUBLAS}"} <= values["metrics"].keys()
    assert len(values["metrics"]["decode 1"]["values"]) == 2
    limit = step_bytes(subject.network) / card_of(H100).bandwidth
    assert values["limits"]["decode 1"] == pytest.approx(1 / limit)
    assert values["aims"][0]["value"] == pytest.approx(values["metrics"]["decode 1"]["median"] * limit)
    assert len(values["layers"]) == 4
    assert values["not_measured"] == {}
    print_report(report)
    out = capsys.readouterr().out
    for text in ("of the limit", "cuBLAS bf16", "memory copy", "not measured", H100):
        assert text in out


class NotedTexts(PlainTexts):
    """Notes the tokens that it is to decode: what an engine generated."""

    def __init__(self) -> None:
        self.noted: list[list[int]] = []

    def decode(self, ids, skip_special_tokens=True) -> str:
        self.noted.append(list(ids))
        return super().decode(ids, skip_special_tokens)


def paged_subject(backend="reference", dtype=torch.float32) -> GpuSubject:
    """On kernels that are PyTorch operators, unless asked otherwise: a recorder on the CPU sees no others."""
    torch.manual_seed(5)
    layers = tiny_network(backend, dtype)
    choice = choose_attention(layers.config, CPU, layers.dtype, TritonEnvironment(None, is_interpreting=False))
    return GpuSubject("llama-2-7b, paged", PagedLlama(layers, choice), NotedTexts())


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float32), ("torch-int4", torch.bfloat16)])
def test_recorded_decode_steps_generate_the_tokens_of_unrecorded_ones(backend, dtype):
    def fail(device):
        raise RuntimeError("not recorded")

    recorder = RecordingDevice()
    recorded, plain = paged_subject(backend, dtype), paged_subject(backend, dtype)
    report = GpuBench(place(recorder=lambda device: recorder), recorded, options({"decode"})).run()
    GpuBench(place(recorder=fail), plain, options({"decode"})).run()
    (step,) = recorder.steps
    assert step.num_replays == 3 * 3  # rounds, of which one warms up, of three steps
    assert (report.missing, report.samples.failed) == ({}, {})
    assert recorded.tokenizer.noted == plain.tokenizer.noted
    assert len({token for ids in plain.tokenizer.noted for token in ids}) > 2


@needs_native
def test_what_a_recorder_cannot_see_is_not_replayed():
    here = place(recorder=lambda device: RecordingDevice())
    report = GpuBench(here, paged_subject("native"), options({"decode"})).run()
    assert "no operator wrote" in report.missing["decode graphs"]
    assert not report.samples.failed


def test_without_recorded_steps_decoding_is_measured_all_the_same():
    def recorder(device):
        raise RuntimeError("capture failed\nbecause")

    report = GpuBench(place(recorder=recorder), paged_subject(), options({"decode"})).run()
    assert report.missing == {"decode graphs": "capture failed"}
    assert report.samples.median("decode 1") > 0


def test_without_a_network_layers_alone_are_measured():
    report = GpuBench(place(), None, options({"kernels", "decode"})).run()
    assert "--random" in report.missing["decode, prefill"]
    assert report.aims[0].value is None
    assert report.layers


def test_another_network_says_nothing_of_the_aim_of_decoding():
    subject = GpuSubject("other", tiny_network(), PlainTexts())
    report = GpuBench(place(), subject, options({"decode"})).run()
    assert report.limit_share("decode 1") > 0
    assert report.aims[0].value is None
    assert not report.layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [(), ("--random", "llama-2-7b"), ("--only", "kernels")])
def test_without_cuda_the_verb_says_so_at_once(arguments):
    cli = make_cli()
    cli.command("bench")(bench)
    result = CliRunner().invoke(cli, ["bench", "--device", "cuda", *arguments])
    assert isinstance(result.exception, QerveError)
    assert "--device cuda" in str(result.exception)
    assert "CUDA" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here", "--random", "llama-2-7b"), "what is to be measured"),
        (("here", "--against", "llama.cpp"), "on the CPU only"),
        (("--device", "nonsense"), "choose cpu, cuda or cuda:N"),
    ],
)
def test_what_makes_no_sense_on_a_gpu_is_refused(arguments, message):
    cli = make_cli()
    cli.command("bench")(bench)
    result = CliRunner().invoke(cli, ["bench", "--device", "cuda", *arguments])
    assert isinstance(result.exception, QerveError)
    assert message in str(result.exception)


def test_subjects_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(QerveError, match="no such directory"):
        gpu_subject(tmp_path / "nothing", None, 0, RunOptions(), CPU)
    with pytest.raises(QerveError, match="choose of"):
        gpu_subject(None, "gpt-2", 0, RunOptions(), CPU)
    assert gpu_subject(None, None, 0, RunOptions(), CPU) is None


def test_a_device_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(QerveError, match="there are 1 GPUs"):
        cuda_device("cuda:1")
    assert cuda_device("cuda") == torch.device("cuda:0")


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_timed():
    device = cuda_device("cuda")
    here = replace(GpuPlace.of(device, 32), shapes=[Shape("tiny", "q", 1024, 1024)], batch_sizes=[1, 16, 64])
    report = GpuBench(here, None, options({"kernels"})).run()
    measured = {row.contender for row in report.layers}
    assert {CUBLAS, "qerve W4A16", "qerve W4A16 rank 32", "qerve W4A16 rank 32 unfused"} <= measured
    assert all(row.seconds > 0 for row in report.layers)
