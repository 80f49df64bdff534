"""POST /v1/perplexity against a plain loop over the fake model in double precision."""

import concurrent.futures
import dataclasses
import math

import pytest
import torch

from tests.support.api_server import live_loaded_server, live_server
from tests.support.fake_model import BrokenModel, ByteTokenizer, FakeModel, FakeParts, Faults, state_of

TEXT = "the quick brown fox jumps over the lazy dog, again and again. "

WRONG_BODIES = {
    "text": [{}, {"text": "a", "token_ids": [1, 2]}, {"text": ""}, {"text": "a"}, {"text": 5}, {"text": ["a", "b"]}],
    "token_ids": [{"token_ids": ids} for ids in ([], [1], [1, 258], [1, -1], "1 2")],
    "probe": [{"probe": False}, {"probe": "yes"}],
    "window": [{"text": "ab", "window": window} for window in (1, 257, 10**20, "8")],
    "stride": [{"text": "ab", "stride": 0}, {"text": "ab", "window": 8, "stride": 9}],
    "max_windows": [{"text": "ab", "max_windows": 0}],
    "return_token_nlls": [{"text": "ab", "return_token_nlls": 1}],
}


@pytest.fixture(scope="module")
def server():
    with live_server() as live:
        yield live


def score(server, **body):
    response = server.post("/v1/perplexity", json={"model": "fake", **body})
    assert response.status_code == 200, response.text
    return response.json()


def refuse(server, **body):
    response = server.post("/v1/perplexity", json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def nll_of(context, token):
    """-log p(token | context), from the definition."""
    logits = FakeModel().logits(torch.tensor([[float(state_of(context))]]))[0].double()
    return (logits.logsumexp(0) - logits[token]).item()


def oracle(tokens, window, stride):
    """nll of every token that some window scores, each once, in order."""
    nlls, scored = [], 0
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        nlls += [nll_of(tokens[start:at], tokens[at]) for at in range(max(start + 1, scored), end)]
        scored = max(scored, end)
        if end == len(tokens):
            return nlls
    return nlls


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, None), (16, 16), (16, 5), (16, 1), (200, 7)])
def test_every_value_is_that_of_the_definition(server, window, stride):
    tokens = list(TEXT.encode())
    want = oracle(tokens, window or 256, stride or window or 256)
    got = score(server, text=TEXT, window=window, stride=stride, return_token_nlls=True)
    assert got["token_nlls"] == pytest.approx(want, rel=1e-5)
    assert got["num_tokens"] == len(want)
    assert got["nll"] == pytest.approx(sum(want) / len(want), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["nll"]))
    assert (got["object"], got["model"]) == ("perplexity", "fake")


def test_token_ids_score_as_their_text_and_values_are_left_out_unless_asked_for(server):
    by_text, by_ids = score(server, text=TEXT), score(server, token_ids=list(TEXT.encode()))
    assert by_text == by_ids
    assert "token_nlls" not in by_text


def test_the_probe_is_compared_with_what_the_build_measured_on_it(server):
    tokens = list(b"a probe of the fake model")
    got = score(server, probe=True)
    assert got["nll"] == pytest.approx(sum(oracle(tokens, 256, 256)) / (len(tokens) - 1), rel=1e-5)
    assert got["probe"] == {
        "dense_perplexity": pytest.approx(math.exp(3.0)),
        "quantized_perplexity": pytest.approx(got["perplexity"], rel=1e-4),  # what the fake's manifest says of it
        "delta_to_dense": pytest.approx(got["perplexity"] - math.exp(3.0)),
        "ratio_to_dense": pytest.approx(got["perplexity"] / math.exp(3.0)),
    }
    assert "probe" not in score(server, text=TEXT)


def test_without_a_probe_in_the_artifact_asking_for_it_is_refused():
    parts = FakeParts()
    loaded = parts.loaded()
    bare = dataclasses.replace(loaded, manifest=loaded.manifest.model_copy(update={"probe": None}))
    with live_loaded_server(bare, model_name="fake", kv_cache_memory="16KiB") as server:
        assert refuse(server, probe=True)["param"] == "probe"


def test_max_windows_scores_the_beginning(server):
    whole = score(server, text=TEXT, window=16, return_token_nlls=True)
    start = score(server, text=TEXT, window=16, max_windows=2, return_token_nlls=True)
    assert start["num_windows"] == 2
    assert start["token_nlls"] == whole["token_nlls"][:30]


def test_a_text_longer_than_the_context_is_scored_in_windows(server):
    got = score(server, text=TEXT * 20)
    assert got["num_windows"] == math.ceil(len(TEXT) * 20 / 256)


@pytest.mark.parametrize(
    ("param", "body"),
    [(param, body) for param, bodies in WRONG_BODIES.items() for body in bodies],
    ids=lambda value: repr(value)[:50],
)
def test_bad_requests_name_the_field(server, param, body):
    assert refuse(server, **body)["param"] == param


def test_too_many_windows_are_refused_before_they_are_made():
    with live_server(max_perplexity_windows=10) as server:
        assert "at most 10" in refuse(server, text=TEXT, window=16, stride=1)["message"]
        assert score(server, text=TEXT, window=16, stride=1, max_windows=10)["num_windows"] == 10
        assert score(server, text="x" * 25, window=16, stride=1)["num_windows"] == 10
        refuse(server, text="x" * 26, window=16, stride=1)


def test_requests_and_tokens_are_counted(server):
    before = server.metric("qerve_perplexity_tokens_total"), server.metric("qerve_perplexity_requests_total")
    num_tokens = score(server, text=TEXT)["num_tokens"]
    after = server.metric("qerve_perplexity_tokens_total"), server.metric("qerve_perplexity_requests_total")
    assert after == (before[0] + num_tokens, before[1] + 1)


def test_generation_goes_on_while_a_long_text_is_scored():
    parts = FakeParts(model=FakeModel(faults=Faults(step_seconds=0.003)))
    with live_server(parts) as server, concurrent.futures.ThreadPoolExecutor(3) as pool:
        scoring = [pool.submit(score, server, text=TEXT * 4, window=16, stride=4) for _ in range(2)]
        generating = pool.submit(server.post, "/v1/completions", json={"prompt": "hello", "max_tokens": 20})
        assert generating.result().status_code == 200
        assert not any(job.done() for job in scoring)  # 60 windows each; 20 tokens did not wait for them
        first, second = (job.result() for job in scoring)
    assert first == second


def test_a_model_that_gives_no_numbers_is_an_error_of_the_server():
    parts = FakeParts(model=BrokenModel(faults=Faults(nan_on=ord("#"))))
    with live_server(parts) as server:
        response = server.post("/v1/perplexity", json={"text": "ab#cd"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "InternalServerError"
        assert score(server, text="abcd")["num_tokens"] == 3


def test_a_forward_pass_that_fails_is_a_500_and_the_server_goes_on(caplog):
    parts = FakeParts(model=FakeModel(faults=Faults(fails_on=ord("#"))))
    with live_server(parts) as server:
        assert server.post("/v1/perplexity", json={"text": "ab#cd"}).status_code == 500
        assert score(server, text="abcd")["num_tokens"] == 3
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_special_tokens_are_added_as_the_tokenizer_does_by_default():
    class WithStart(ByteTokenizer):
        def encode(self, text, add_special_tokens=True):
            return [257] * add_special_tokens + super().encode(text)

    with live_server(FakeParts(tokenizer=WithStart())) as server:
        got = score(server, text="abc", return_token_nlls=True)
    assert got["token_nlls"] == pytest.approx(oracle([257, 97, 98, 99], 256, 256), rel=1e-5)
