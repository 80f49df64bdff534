"""Elastic rank over HTTP: what a request asks for reaches the model, and pressure sheds only what nobody asked for."""

import concurrent.futures
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import torch

from models.errors import QerveError
from service.app import create_app
from service.settings import Settings
from tests.support.api_server import LiveServer, live_server, wait_until
from tests.support.fake_model import ByteTokenizer, FakeModel, FakeParts, Faults, ranked, state_of

RANK = 32
PROMPT = "Once upon a time"
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
    "/v1/perplexity": {"text": PROMPT},
}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(FakeParts(rank=RANK, method="lqer")) as live:
        yield live


def greedy(server: LiveServer, **body: Any) -> httpx.Response:
    return server.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **body})


def expected_text(rank: int | None) -> str:
    tokenizer = ByteTokenizer()
    return tokenizer.decode(FakeModel().continue_greedily(tokenizer.encode(PROMPT), 12, rank))


def nll_of(context: list[int], token: int, rank: int | None) -> float:
    """-log p(token | context), from the definition."""
    hidden = torch.tensor([[float(ranked(state_of(context), rank))]])
    logits = FakeModel().logits(hidden)[0].double()
    return float(logits.logsumexp(0) - logits[token])


@pytest.mark.parametrize("rank", [0, 7, 31])
def test_a_completion_is_made_with_the_rank_it_asks_for(rank: int, server: LiveServer) -> None:
    response = greedy(server, rank=rank)
    assert response.json()["choices"][0]["text"] == expected_text(rank)
    assert response.headers["x-qerve-rank"] == str(rank)


@pytest.mark.parametrize("body", [{}, {"rank": None}, {"rank": RANK}])
def test_all_of_the_correction_is_what_one_gets_by_default(body: dict[str, Any], server: LiveServer) -> None:
    response = greedy(server, **body)
    assert response.json()["choices"][0]["text"] == expected_text(None)
    assert response.headers["x-qerve-rank"] == str(RANK)


def test_a_prompt_shares_its_step_and_its_past_with_other_ranks(server: LiveServer) -> None:
    ranks = [0, 7, 31, None] * 3
    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
        answers = list(pool.map(lambda rank: greedy(server, rank=rank), ranks))
    for rank, answer in zip(ranks, answers, strict=True):
        assert answer.json()["choices"][0]["text"] == expected_text(rank)


def test_prefixes_are_shared_by_requests_of_one_rank_only(server: LiveServer) -> None:
    def num_cached(rank: int | None) -> int:
        usage = server.post("/v1/completions", json={"prompt": "p" * 40, "max_tokens": 1, "rank": rank}).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [num_cached(rank) for rank in (11, 12, None)] == [0, 0, 0]
    assert [num_cached(rank) for rank in (11, 12, None, RANK)] == [32, 32, 32, 32]


def test_a_perplexity_is_that_of_the_rank(server: LiveServer) -> None:
    tokens = ByteTokenizer().encode(PROMPT)
    perplexities = {}
    for rank in (0, 5, None):
        response = server.post("/v1/perplexity", json={"text": PROMPT, "rank": rank})
        assert response.headers["x-qerve-rank"] == str(RANK if rank is None else rank)
        nll = sum(nll_of(tokens[:at], tokens[at], rank) for at in range(1, len(tokens))) / (len(tokens) - 1)
        assert response.json()["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
        perplexities[rank] = response.json()["perplexity"]
    assert len(set(perplexities.values())) == len(perplexities)


def test_chats_and_streams_say_their_rank_too(server: LiveServer) -> None:
    chat = ENDPOINTS["/v1/chat/completions"]
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", ENDPOINTS["/v1/completions"])):
        for stream in (False, True):
            response = server.post(path, json={**body, "rank": 3, "stream": stream})
            assert (response.status_code, response.headers["x-qerve-rank"]) == (200, "3")


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("rank", [RANK + 1, -1, 2**40, 1.5, True, "8", [1]])
def test_a_rank_that_the_model_does_not_have_is_refused(path: str, rank: object, server: LiveServer) -> None:
    response = server.post(path, json={**ENDPOINTS[path], "rank": rank})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "rank"


def test_a_model_without_correction_has_rank_zero_only() -> None:
    with live_server() as plain:
        assert greedy(plain, rank=0).headers["x-qerve-rank"] == "0"
        response = greedy(plain, rank=1)
        assert response.status_code == 400
        assert "no low-rank correction" in response.json()["error"]["message"]


def test_the_model_card_tells_the_ranks(server: LiveServer) -> None:
    artifact = server.get("/v1/models/fake").json()["artifact"]
    assert (artifact["rank"], artifact["ranks"]) == (RANK, [{"rank": RANK, "num_layers": 1}])


@contextmanager
def crowded_server(**settings: Any) -> Iterator[LiveServer]:
    """One seat, taken, and two requests that wait for it; all three asked for a rank."""
    parts = FakeParts(FakeModel(faults=Faults(step_seconds=0.02)), rank=RANK, method="lqer")
    body = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "rank": RANK, "stream": True}
    with live_server(parts, max_num_seqs=1, **settings) as live, ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(live.client.stream("POST", "/v1/completions", json=body))
        wait_until(lambda: live.context.engine.num_waiting == 2)
        yield live


def headers_of(live: LiveServer, **body: Any) -> httpx.Headers:
    """Those of a stream, which come before its text; the client then leaves."""
    values = {"prompt": PROMPT, "max_tokens": 4, "stream": True, **body}
    with live.client.stream("POST", "/v1/completions", json=values) as response:
        return response.headers


def test_pressure_sheds_the_rank_of_those_who_leave_it_open() -> None:
    with crowded_server(shed_rank_queue=2, shed_rank_floor=8) as live:
        assert live.metric("qerve_elastic_rank") == 8
        assert headers_of(live, n=2)["x-qerve-rank"] == "8"
        assert headers_of(live, rank=RANK)["x-qerve-rank"] == str(RANK)
        assert headers_of(live, rank=3)["x-qerve-rank"] == "3"
        assert live.metric("qerve_rank_shed_requests_total") == 2  # both choices


def test_a_shed_rank_is_what_the_text_is_made_with() -> None:
    with crowded_server(shed_rank_queue=1, shed_rank_floor=8) as live:
        response = greedy(live)
        assert response.headers["x-qerve-rank"] == "8"
        assert response.json()["choices"][0]["text"] == expected_text(8)


def test_what_measures_the_model_is_never_shed() -> None:
    with crowded_server(shed_rank_queue=1) as live:
        assert live.post("/v1/perplexity", json={"text": PROMPT}).headers["x-qerve-rank"] == str(RANK)
        scored = greedy(live, max_tokens=1, echo=True, logprobs=1)
        assert scored.headers["x-qerve-rank"] == str(RANK)
        assert live.metric("qerve_rank_shed_requests_total") == 0


def test_the_rank_comes_back_when_the_queue_is_short_again() -> None:
    with crowded_server(shed_rank_queue=2) as live:
        assert headers_of(live)["x-qerve-rank"] == "0"
        wait_until(lambda: live.context.engine.num_waiting <= 1)
        assert live.metric("qerve_elastic_rank") == RANK
        assert headers_of(live)["x-qerve-rank"] == str(RANK)


def test_without_the_option_nothing_is_shed() -> None:
    with crowded_server() as live:
        assert headers_of(live)["x-qerve-rank"] == str(RANK)
        assert live.metric("qerve_elastic_rank") == RANK


def test_a_floor_above_the_rank_is_refused_at_start() -> None:
    with pytest.raises(QerveError, match=r"shed_rank_floor 33 .* rank of 32"):
        create_app(FakeParts(rank=RANK).loaded(), Settings(shed_rank_floor=33))


@pytest.mark.parametrize(
    ("method", "is_warned"), [("lqer", False), ("qera-exact", False), ("serq", True), ("srr", True)]
)
def test_a_method_whose_codes_need_its_correction_is_warned_about(
    method: str, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        create_app(FakeParts(rank=RANK, method=method).loaded(), Settings(shed_rank_queue=4, kv_cache_memory="16KiB"))
    assert (method in caplog.text) == is_warned
