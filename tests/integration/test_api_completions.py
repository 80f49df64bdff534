"""Completions and chat completions over a real connection, against the fake model run without batch or cache."""

import concurrent.futures

import pytest

from tests.support.api_server import live_server
from tests.support.fake_model import ByteTokenizer, FakeModel, FakeParts, Faults

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def server():
    with live_server() as live:
        yield live


def greedy(prompt, num_tokens):
    return TOKENIZER.decode(FakeModel().continue_greedily(TOKENIZER.encode(prompt), num_tokens))


USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 12,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def complete(server, **body):
    response = server.post("/v1/completions", json={"model": "fake", "temperature": 0, "max_tokens": 12, **body})
    assert response.status_code == 200, response.text
    return response.json()


def chat(server, content="hi", **body):
    messages = [{"role": "user", "content": content}]
    body = {"model": "fake", "messages": messages, "temperature": 0, "max_tokens": 12, **body}
    response = server.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion_has_openais_shape_and_the_models_text(server):
    answer = complete(server, prompt="hello")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "fake"
    assert answer["system_fingerprint"] == server.context.info.fingerprint
    choice = {"index": 0, "text": greedy("hello", 12), "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    assert answer["usage"] == USAGE


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["one", "two"], ["one", "two"]),
        ([104, 105], ["hi"]),
        ([[104, 105], [111, 107]], ["hi", "ok"]),
        ("grüße €", ["grüße €"]),
    ],
)
def test_prompts_may_be_texts_or_token_ids_one_or_several(server, prompt, texts):
    answer = complete(server, prompt=prompt)
    assert [choice["text"] for choice in answer["choices"]] == [greedy(text, 12) for text in texts]
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == sum(len(text.encode()) for text in texts)


def test_without_max_tokens_a_completion_has_openais_16(server):
    assert complete(server, prompt="hello", max_tokens=None)["usage"]["completion_tokens"] == 16


def test_without_max_tokens_near_the_end_of_the_context_a_completion_gets_what_is_left(server):
    answer = complete(server, prompt="x" * 250, max_tokens=None)
    assert answer["usage"]["total_tokens"] == 256


def test_without_max_tokens_a_chat_may_use_the_whole_context(server):
    assert chat(server, max_tokens=None)["usage"]["total_tokens"] == 256


def test_a_prompt_that_fills_the_context_to_the_last_token_is_served(server):
    assert complete(server, prompt="x" * 255, max_tokens=1)["usage"]["total_tokens"] == 256


def test_n_choices_per_prompt_are_numbered_prompt_by_prompt(server):
    answer = complete(server, prompt=["one", "two"], n=2)
    assert [choice["text"] for choice in answer["choices"]] == [greedy(t, 12) for t in ("one", "one", "two", "two")]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 48


def test_a_seed_repeats_the_text_and_gives_every_choice_its_own(server):
    body = {"prompt": "hello", "temperature": 1.5, "n": 3}
    first, again = (complete(server, **body, seed=7)["choices"] for _ in range(2))
    other = complete(server, **body, seed=1000)["choices"]
    assert first == again != other
    assert len({choice["text"] for choice in first}) == 3


def test_top_k_of_one_is_greedy_at_any_temperature(server):
    answer = complete(server, prompt="hello", temperature=2.0, top_k=1)
    assert answer["choices"][0]["text"] == greedy("hello", 12)


def test_stop_strings_end_the_text_and_are_left_out(server):
    whole = greedy("hello", 12)
    for stop in (whole[5:7], [whole[8:11], whole[5:7]]):
        choice = complete(server, prompt="hello", stop=stop)["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == whole[: whole.index(whole[5:7])]


def test_streamed_deltas_join_to_the_text_and_usage_comes_last(server):
    body = {"model": "fake", "prompt": "hello", "temperature": 0, "max_tokens": 12}
    events = server.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    *deltas, usage = events
    assert "".join(event["choices"][0]["text"] for event in deltas) == greedy("hello", 12)
    assert [event["choices"][0]["finish_reason"] for event in deltas] == [None] * 11 + ["length"]
    assert all(event["usage"] is None for event in deltas)
    assert usage["choices"] == []
    assert usage["usage"] == USAGE
    assert len({event["id"] for event in events}) == 1


def test_a_stream_without_include_usage_carries_none(server):
    events = server.events("/v1/completions", {"model": "fake", "prompt": "hello", "max_tokens": 2})
    assert all("usage" not in event and event["choices"] for event in events)


def test_a_stream_of_several_choices_keeps_them_apart(server):
    body = {"model": "fake", "prompt": ["one", "two"], "temperature": 0, "max_tokens": 9}
    texts = {0: "", 1: ""}
    for event in server.events("/v1/completions", body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: greedy("one", 9), 1: greedy("two", 9)}


def test_a_chat_completion_has_openais_shape(server):
    answer = chat(server, "hi")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": greedy("user: hi\nassistant:", 12), "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(server):
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 5}
    events = server.events("/v1/chat/completions", body)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    content = "".join(choice["delta"]["content"] for choice in choices[1:-1])
    assert content == greedy("user: hi\nassistant:", 5)
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "length")
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_messages_may_be_text_parts_and_developer_means_system(server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    body = {"model": "fake", "messages": messages, "temperature": 0, "max_completion_tokens": 4, "max_tokens": 9}
    answer = server.post("/v1/chat/completions", json=body).json()
    expected = greedy("system: be kind\nuser: ab\nassistant:", 4)
    assert answer["choices"][0]["message"]["content"] == expected


def test_requests_at_the_same_time_share_steps_and_get_their_own_text():
    model = FakeModel(faults=Faults(step_seconds=0.005))
    prompts = ["one", "two", "three", "four", "five", "six"]
    with live_server(FakeParts(model=model)) as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt=prompt), prompts))
    assert [answer["choices"][0]["text"] for answer in answers] == [greedy(prompt, 12) for prompt in prompts]
    assert 1 < max(model.batch_sizes) <= 4


def test_a_silent_stream_is_kept_open_by_comments():
    parts = FakeParts(model=FakeModel(faults=Faults(step_seconds=0.1)))
    with live_server(parts, sse_heartbeat_seconds=0.02) as server:
        response = server.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3, "stream": True})
        lines = response.text.split("\n\n")
    assert lines.count(": waiting") >= 3
    assert sum(line.startswith("data: {") for line in lines) == 3


def test_usage_and_metrics_tell_which_prompt_tokens_the_cache_had():
    with live_server() as server:
        prompt = "the same beginning of two blocks, and a bit"  # 43 tokens: 32 of them in full blocks
        usages = [complete(server, prompt=[prompt, "other"], n=2, max_tokens=2)["usage"] for _ in range(2)]
        assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 32]
        assert server.metric("qerve_prefix_cache_queries_total") == 4 * (43 + 5)
        assert server.metric("qerve_prefix_cache_hits_total") == 3 * 32  # all choices but the very first
        assert server.metric("qerve_prompt_tokens_cached_total") == 3 * 32
        held = {kind: server.metric("qerve_kv_cache_bytes", kind=kind) for kind in ("capacity", "used", "cached")}
        assert (held["used"], held["cached"]) == (0, 2 * FakeModel.cache_block_bytes)
    with live_server(prefix_caching=False) as server:
        answers = [complete(server, prompt=prompt)["usage"]["prompt_tokens_details"] for _ in range(2)]
        assert answers == [{"cached_tokens": 0}] * 2


def test_speculative_decoding_gives_the_same_text_and_is_counted():
    with live_server(speculative_tokens=4, ngram_max=2) as server:
        prompts = ["hello hello hello", "and so on and so on"]
        answer = complete(server, prompt=prompts, max_tokens=100)
        assert [choice["text"] for choice in answer["choices"]] == [greedy(prompt, 100) for prompt in prompts]
        drafted = server.metric("qerve_spec_decode_num_draft_tokens_total")
        assert drafted >= server.metric("qerve_spec_decode_num_drafts_total") > 0
        assert drafted > server.metric("qerve_spec_decode_num_accepted_tokens_total") > 0
