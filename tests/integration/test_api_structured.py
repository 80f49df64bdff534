"""Structured output over a real connection: what is answered parses and validates, whatever the model would say."""

import json
import re

import jsonschema
import openai
import pytest

from tests.support.api_server import live_server
from tests.support.fake_model import FakeParts, RandomModel
from tests.support.grammars import hold_grammar

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with live_server(FakeParts(model=RandomModel()), kv_cache_memory="64KiB") as live:
        yield live


def post(server, **body):
    return server.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 150, **body})


def choices(server, **body):
    response = post(server, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_is_kept_to_by_every_choice(server, seed):
    for choice in choices(server, response_format=FORMAT, seed=seed, n=3, logprobs=True):
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert "".join(item["token"] for item in choice["logprobs"]["content"]) == choice["message"]["content"]


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"guided_regex": "(foo|bar)+"}, "(foo|bar)+"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "<" /[a-c]{2}/ ">"'}, "<[a-c]{2}>"),
        ({"guided_json": {"const": 5}}, "5"),
        ({"structured_outputs": {"regex": "[0-4]{3}"}}, "[0-4]{3}"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "[ab]"),
        ({"structured_outputs": {"grammar": 'start: "g"'}}, "g"),
        ({"structured_outputs": {"json": {"const": None}}}, "null"),
        ({"response_format": {"type": "json_object", "schema": {"type": "object", "maxProperties": 0}}}, r"\{\s*\}"),
        ({"response_format": {"type": "text"}, "allowed_token_ids": [97]}, "a+"),
    ],
)
def test_every_way_to_ask_for_a_grammar(server, body, pattern):
    (choice,) = choices(server, **body, temperature=1.0, logit_bias={"256": 2})
    assert re.fullmatch(pattern, choice["message"]["content"])


@pytest.mark.parametrize(
    "body", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_any_object(server, body):
    bias = {str(ord("}")): 30, str(ord('"')): 8}
    finished = [choice for seed in range(6) for choice in choices(server, **body, seed=seed, logit_bias=bias)]
    finished = [choice["message"]["content"] for choice in finished if choice["finish_reason"] == "stop"]
    assert finished
    assert all(isinstance(json.loads(text), dict) for text in finished)


def test_a_stream_keeps_to_it_and_so_does_a_completion(server):
    body = {"messages": MESSAGES, "response_format": FORMAT, "max_tokens": 150, "seed": 1}
    events = server.events("/v1/chat/completions", body)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    jsonschema.validate(json.loads(text), SCHEMA)
    answer = server.post("/v1/completions", json={"prompt": "x", "guided_json": SCHEMA, "max_tokens": 150}).json()
    jsonschema.validate(json.loads(answer["choices"][0]["text"]), SCHEMA)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "Invalid type"),
        ({"guided_json": {"$ref": "http://169.254.169.254/"}}, "guided_json", "outside the schema"),
        ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json", "bytes; at most"),
        ({"guided_json": "text"}, "guided_json", "dictionary"),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_regex": ""}, "guided_regex", "at least 1"),
        ({"guided_regex": "a" * 70_000}, "guided_regex", "at most"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_grammar": "nonsense"}, "guided_grammar", "cannot be used"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs", "not permitted"),
        ({"guided_regex": "a", "response_format": FORMAT}, "guided_regex", "More than one"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "More than one"),
    ],
)
def test_a_bad_grammar_is_a_400_that_says_what_is_wrong(server, body, param, words):
    response = post(server, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert server.context.engine.is_idle


def test_bad_grammars_are_counted(server):
    name, labels = "qerve_requests_rejected_total", {"reason": "bad_grammar"}
    before = server.metric(name, **labels) or 0
    post(server, guided_regex="(")
    assert server.metric(name, **labels) == before + 1


def test_a_grammar_that_compiles_for_ever_is_refused_and_others_are_served_meanwhile(server, monkeypatch):
    release = hold_grammar(monkeypatch, "slow")
    monkeypatch.setattr(server.context.grammars, "_seconds", 0.3)
    try:
        assert "not compiled within" in post(server, guided_regex="slow").json()["error"]["message"]
        assert choices(server, max_tokens=3)[0]["finish_reason"] == "length"
        assert choices(server, guided_regex="quick")[0]["message"]["content"] == "quick"
    finally:
        release.set()


def test_a_grammar_that_becomes_too_complex_ends_its_request_alone(server):
    ambiguous = 'start: e\ne: e e e | e e | "a" | "b" | "c"'
    response = post(server, guided_grammar=ambiguous, bad_words=["\u0100"], logit_bias={"256": -100})
    assert response.status_code == 400
    assert "cannot go on" in response.json()["error"]["message"]
    assert choices(server, guided_regex="fine")[0]["message"]["content"] == "fine"


def test_the_openai_client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        options = {"model": "fake", "messages": MESSAGES, "seed": 2, "max_tokens": 150}
        answer = client.chat.completions.create(
            **options,
            response_format=FORMAT,
            logprobs=True,
            top_logprobs=2,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
        )
        text = answer.choices[0].message.content
        jsonschema.validate(json.loads(text), SCHEMA)
        content = answer.choices[0].logprobs.content
        assert "".join(item.token for item in content) == text
        assert bytes(byte for item in content for byte in item.bytes).decode() == text
        assert [len(item.top_logprobs) for item in content] == [2] * len(content)
        completion = client.completions.create(
            model="fake", prompt="hi", logprobs=3, echo=True, max_tokens=4, logit_bias={"97": 100}, temperature=0
        )
        assert completion.choices[0].text == "hiaaaa"
        assert completion.choices[0].logprobs.tokens == list("hiaaaa")
        with pytest.raises(openai.BadRequestError, match="Invalid type"):
            client.chat.completions.create(
                **options,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}},
            )
