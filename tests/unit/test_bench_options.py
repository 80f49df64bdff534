"""What a bench refuses to start with, and what it reads of the machine, of answers and of its options."""

import pytest

from models.bench.machine import MAX_LOAD, NoiseMeter, check_quiet, processor_name
from models.bench.peaks import SAMPLE_SECONDS, enough_iterations
from models.bench.random_model import SHAPES, check_memory, weight_bytes
from models.errors import QerveError
from service.bench.http_client import num_tokens_of
from service.bench.options import SECTIONS, parse_sections

STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    b'1d\r\ndata: {"choices": [{"text": " a"}]}\n\n\r\n'
    b'2f\r\ndata: {"choices": [], "usage": {"completion_tokens": 7}}\n\n\r\n'
    b"10\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)


def test_sections_are_named_or_all():
    assert parse_sections(None) == set(SECTIONS)
    assert parse_sections(" http,decode") == {"http", "decode"}


@pytest.mark.parametrize("text", ["", ",", "decode,speed"])
def test_other_sections_are_refused_with_those_there_are(text):
    with pytest.raises(QerveError, match="kernels, decode, prefill, batch, http"):
        parse_sections(text)


def test_a_busy_machine_is_not_measured_unless_that_is_wanted():
    check_quiet(MAX_LOAD, allow_noise=False)
    check_quiet(64.0, allow_noise=True)
    with pytest.raises(QerveError, match=r"load average is 0\.42.*--allow-noise"):
        check_quiet(0.42, allow_noise=False)


def test_noise_is_a_number_of_processors():
    noise = NoiseMeter().read()
    assert noise.others >= 0
    assert noise.stolen >= 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: Abacus: 9000\nflags\t\t: a b\n", "Abacus: 9000"),
        ("flags : x\n", None),
        (None, None),
    ],
)
def test_the_processor_is_named(tmp_path, text, name):
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(text)
    assert processor_name(tmp_path) == name if name else processor_name(tmp_path)


@pytest.mark.parametrize("seconds_each", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_sample_is_long_enough_whatever_the_instruction_set(seconds_each):
    wake_up, now = SAMPLE_SECONDS / 10, 0.0

    def run(iterations):
        nonlocal now
        now += wake_up + iterations * seconds_each

    iterations = enough_iterations(run, clock=lambda: now)
    assert iterations * seconds_each >= 0.9 * SAMPLE_SECONDS * (1 - 1e-9)
    assert iterations == 10_000 or iterations * seconds_each < 4 * SAMPLE_SECONDS


@pytest.mark.parametrize(("shape", "billions"), [("tinyllama-1.1b", 1.10), ("llama-2-7b", 6.74)])
def test_shapes_are_those_of_the_published_networks(shape, billions):
    assert SHAPES[shape].num_parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_what_does_not_fit_says_how_much_is_missing():
    num_bytes = weight_bytes(SHAPES["llama-2-7b"], 32)
    check_memory(num_bytes, "it", available=num_bytes)
    with pytest.raises(QerveError, match=r"it takes about 3\.\d GiB, 1\.0 GiB are free"):
        check_memory(num_bytes, "it", available=1 << 30)


def test_tokens_are_those_that_the_server_counts():
    assert num_tokens_of(STREAM) == 7


def test_an_error_is_passed_on():
    with pytest.raises(ValueError, match=r"HTTP/1.1 400 Bad Request: too long"):
        num_tokens_of(b"HTTP/1.1 400 Bad Request\r\n\r\ntoo long")


def test_half_a_stream_is_an_error():
    with pytest.raises(ValueError, match="cut off"):
        num_tokens_of(STREAM[: STREAM.index(b"data: [DONE]")])
