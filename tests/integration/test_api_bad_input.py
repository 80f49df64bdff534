"""Whatever a client sends: the right status, OpenAI's error body, no traceback in the log, and the server goes on."""

import json
import logging

import pytest

from service.api.schemas import MAX_CHOICES, MAX_PROMPTS
from service.errors import ERROR_TYPES
from tests.support.api_server import live_server
from tests.support.fake_model import ByteTokenizer, FakeParts

JSON_TYPE = {"content-type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
COMPLETION = {"model": "fake", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

WRONG_VALUES = {
    "prompt": [
        *(None, "", [], [""], ["a", ""], [[]], 5, {}, [None], ["a", [1]], [1, "a"]),
        *([-1], [1.5], [True], [258], [2**70], [[1], [10**6]]),
        *(["a"] * (MAX_PROMPTS + 1), [[1]] * (MAX_PROMPTS + 1)),
    ],
    "max_tokens": [-1, 1.5, "5", True, 2**31, 10**30, []],
    "temperature": [-0.1, 2.1, "hot", 1e300, True],
    "top_p": [0, -1, 1.01, "x"],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [-0.1, 1.1],
    "seed": [1.5, 2**63, -(2**63) - 1, "x"],
    "n": [0, -1, MAX_CHOICES + 1, "2"],
    "stop": [5, [5], "", [""], ["a"] * 5, "x" * 65, {}],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, 5, {"continuous_usage_stats": 1}],
    "model": [5, "x" * 300],
    "ignore_eos": ["no"],
    "presence_penalty": [-2.1, 2.1, "x", True],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 0.009, 101],
    "min_tokens": [-1, 2**31, 1.5],
    "logprobs": [-1, 1025, 1.5, True, "3"],
    "echo": ["yes"],
    "logit_bias": [
        *([], {"a": 1}, {"-1": 1}, {"5": 101}, {"5": -100.5}, {"5": True}, {"5": "1"}, {"5.0": 1}),
        *({"²": 1}, {"9" * 11: 1}, {str(token): 1 for token in range(301)}),
    ],
    "stop_token_ids": [[-1], [1.5], ["5"], 5, [1] * 65],
    "allowed_token_ids": [[-1], ["5"], 5],
    "bad_words": [[""], ["x" * 65], ["a"] * 129, "a"],
    "truncate_prompt_tokens": [0, -1, "5"],
    "add_special_tokens": ["no"],
    "skip_special_tokens": [0],
    "include_stop_str_in_output": ["x"],
    "return_token_ids": [1],
}
UNSUPPORTED = {
    "/v1/completions": [
        *(("suffix", "end"), ("best_of", 2), ("use_beam_search", True), ("length_penalty", 0.5)),
        *(("prompt_logprobs", 1), ("spaces_between_special_tokens", False)),
    ],
    "/v1/chat/completions": [
        *(("modalities", ["audio"]), ("echo", True), ("chat_template", "{{ 1 }}")),
        *(("tools", [{"type": "function"}]), ("tool_choice", "required")),
    ],
}
ACCEPTED = {
    "/v1/completions": [
        *(("logprobs", None), ("echo", False), ("best_of", 1), ("suffix", None), ("suffix", "")),
        *(("logit_bias", {}), ("logit_bias", None), ("presence_penalty", 0.0), ("stop", None), ("top_k", -1)),
        *(("logit_bias", {str(token % 258): -100 for token in range(300)}), ("repetition_penalty", 0.01)),
        *(("presence_penalty", -2), ("frequency_penalty", 2), ("min_tokens", 2), ("logprobs", 20)),
        *(("stop_token_ids", []), ("allowed_token_ids", []), ("bad_words", ["x" * 64] * 128)),
    ],
    "/v1/chat/completions": [
        *(("logprobs", False), ("top_logprobs", None), ("tools", []), ("tool_choice", "none")),
        *(("response_format", {"type": "text"}), ("frequency_penalty", 0)),
        *(("user", "me"), ("metadata", {"a": "b"}), ("never_heard_of", [1])),
        *(("store", True), ("service_tier", "auto"), ("chat_template_kwargs", {})),
    ],
}


@pytest.fixture(scope="module")
def server():
    with live_server(max_queue=30, max_body_bytes=64 << 10) as live:
        yield live


@pytest.fixture(autouse=True)
def nothing_is_logged_and_the_server_goes_on(server, caplog):
    caplog.set_level(logging.WARNING)
    yield
    assert server.post("/v1/completions", json=COMPLETION).status_code == 200
    assert server.context.engine.is_idle
    noisy = [r.getMessage() for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]
    assert noisy == []


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert (error["code"], error["type"]) == (status, ERROR_TYPES[status])
    assert error["message"]
    return error


def refuse(server, path, body, status=400):
    return error_of(server.post(path, content=json.dumps(body), headers=JSON_TYPE), status)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nonsense", b'{"prompt": "a",}', b"'single'", b'{"a": 01}', b"\xef\xbb\xbf{}", b'{"prompt": "a"} x'],
)
def test_malformed_json(server, content):
    assert (
        "not valid JSON" in error_of(server.post("/v1/completions", content=content, headers=JSON_TYPE), 400)["message"]
    )


@pytest.mark.parametrize(
    "content", [b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xc3"}', b"\x80", b'{"prompt": "\xed\xa0\x80"}']
)
def test_invalid_utf8(server, content):
    assert "UTF-8" in error_of(server.post("/v1/completions", content=content, headers=JSON_TYPE), 400)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/perplexity"])
@pytest.mark.parametrize("body", [[], "text", 5, None, True])
def test_a_body_that_is_no_object(server, path, body):
    refuse(server, path, body)


@pytest.mark.parametrize(
    "text",
    ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000],
    ids=["nan", "inf", "-inf", "1e999", "-1e999", "digits"],
)
def test_numbers_that_are_not_finite(server, text):
    content = b'{"prompt": "a", "temperature": %s}' % text.encode()
    error_of(server.post("/v1/completions", content=content, headers=JSON_TYPE), 400)


def test_json_nested_to_the_limit_is_read_and_one_level_more_is_refused(server):
    def nested(depth):
        return b'{"prompt": "a", "max_tokens": 1, "x": %s}' % (b"[" * (depth - 1) + b"]" * (depth - 1))

    assert server.post("/v1/completions", content=nested(32), headers=JSON_TYPE).status_code == 200
    for depth in (33, 20_000):
        error = error_of(server.post("/v1/completions", content=nested(depth), headers=JSON_TYPE), 400)
        assert "deeper than 32" in error["message"]


@pytest.mark.parametrize("escaped", [r"\ud800", r"a\udfffb", r"\udc00\ud800"])
def test_half_surrogates_in_any_text(server, escaped):
    for template in ('{"prompt": "%s"}', '{"prompt": "a", "stop": ["%s"]}', '{"prompt": "a", "%s": 1}'):
        content = (template % escaped).encode()
        assert (
            "surrogate" in error_of(server.post("/v1/completions", content=content, headers=JSON_TYPE), 400)["message"]
        )


def test_a_whole_surrogate_pair_is_a_character(server):
    content = rb'{"prompt": "\ud83d\ude00", "max_tokens": 1}'
    assert server.post("/v1/completions", content=content, headers=JSON_TYPE).json()["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG_VALUES.items() for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_every_field_of_a_completion_has_a_type_and_bounds(server, field, value):
    assert refuse(server, "/v1/completions", {**COMPLETION, field: value})["param"] == field


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", [5], [{}], [{"role": "user"}], [{"content": "hi"}], [{"role": "wizard", "content": "hi"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        [{"role": "assistant", "content": "the template wants the user last"}],
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_messages_must_be_messages(server, messages):
    assert refuse(server, "/v1/chat/completions", {**CHAT, "messages": messages})["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, field, value) for path, fields in UNSUPPORTED.items() for field, value in fields],
)
def test_parameters_that_are_not_carried_out_are_refused_by_name(server, path, field, value):
    body = COMPLETION if path == "/v1/completions" else CHAT
    error = refuse(server, path, {**body, field: value})
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, field, value) for path, fields in ACCEPTED.items() for field, value in fields],
)
def test_neutral_values_and_unknown_fields_are_accepted(server, path, field, value):
    body = COMPLETION if path == "/v1/completions" else CHAT
    assert server.post(path, json={**body, field: value}).status_code == 200


def test_a_prompt_longer_than_the_context_says_both_numbers(server):
    error = refuse(server, "/v1/completions", {**COMPLETION, "prompt": [1] * 300})
    assert (error["n_prompt_tokens"], error["n_ctx"], error["param"]) == (300, 256, "prompt")
    error = refuse(server, "/v1/completions", {**COMPLETION, "prompt": "x" * 250, "max_tokens": 7})
    assert (error["n_prompt_tokens"], error["n_ctx"], error["param"]) == (250, 256, "max_tokens")
    for number in ("250", "7", "257", "256"):
        assert number in error["message"]


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized():
    class Untouched(ByteTokenizer):
        def encode(self, text, add_special_tokens=True):
            raise AssertionError("tokenized")

    with live_server(FakeParts(tokenizer=Untouched())) as server:
        error = refuse(server, "/v1/completions", {**COMPLETION, "prompt": "x" * 257})
        assert error["n_ctx"] == 256
        refuse(server, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * 300}]})


def test_more_sequences_than_the_server_takes_at_all(server):
    assert "takes 34" in refuse(server, "/v1/completions", {**COMPLETION, "prompt": ["a"] * 32, "n": 2})["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/perplexity"])
def test_an_unknown_model(server, path):
    bodies = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/v1/perplexity": {"text": "hello"}}
    error = refuse(server, path, {**bodies[path], "model": "gpt-9"}, 404)
    assert "'gpt-9'" in error["message"]
    assert error["param"] == "model"


def test_unknown_routes_methods_and_content_types(server):
    error_of(server.get("/v1/nothing"), 404)
    error_of(server.get("/v1/models/unknown"), 404)
    error_of(server.get("/" + "x" * 5000), 404)
    error_of(server.get("/v1/completions"), 405)
    error_of(server.post("/health/live"), 405)
    error_of(server.post("/v1/completions", data={"prompt": "a"}), 415)
    error_of(server.post("/v1/completions", content=b"\x00", headers={"content-type": "text/plain"}), 415)


def test_a_body_of_the_largest_size_is_read_and_a_larger_one_refused(server):
    body = json.dumps({**COMPLETION, "ignored": ""}).encode()
    padded = body[:-2] + b"x" * ((64 << 10) - len(body)) + b'"}'
    assert server.post("/v1/completions", content=padded, headers=JSON_TYPE).status_code == 200
    error = error_of(server.post("/v1/completions", content=padded + b" ", headers=JSON_TYPE), 413)
    assert "65536 bytes" in error["message"]


def test_a_large_body_in_chunks_and_one_that_only_claims_to_be_huge(server):
    chunks = (b" " * 10_000 for _ in range(20))
    error_of(server.post("/v1/completions", content=chunks, headers=JSON_TYPE), 413)
    assert server.raw(HEAD % 99999999999).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x00\xa5\x01\x00", b"GET\r\n\r\n", b"\xff" * 200 + b"\r\n\r\n"],
    ids=["tls", "no path", "garbage"],
)
def test_what_is_no_http_at_all(server, data):
    assert server.raw(data).startswith(b"HTTP/1.1 400")


def test_a_connection_closed_in_the_middle_of_a_body(server):
    server.raw(HEAD % 500 + b'{"prompt": "he', close_writing=True)


def test_a_half_closed_connection_after_a_whole_request(server):
    body = json.dumps(COMPLETION).encode()
    server.raw(HEAD % len(body) + body, close_writing=True)


def test_a_model_without_a_chat_template():
    with live_server(FakeParts(tokenizer=ByteTokenizer(has_chat_template=False))) as server:
        assert "/v1/completions" in refuse(server, "/v1/chat/completions", CHAT)["message"]
