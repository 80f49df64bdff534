"""``/tokenize`` and ``/detokenize``."""

import pytest

from tests.support.api_server import live_server
from tests.support.fake_model import EOS, ByteTokenizer, FakeParts

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with live_server() as live:
        yield live


def test_a_text_and_its_tokens_are_turned_into_each_other(server):
    text = "Grüße \N{GRINNING FACE}"
    answer = server.post("/tokenize", json={"model": "fake", "prompt": text}).json()
    assert answer == {"count": 12, "max_model_len": 256, "tokens": list(text.encode()), "token_strs": None}
    assert server.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_messages_are_counted_as_the_chat_endpoint_counts_them(server):
    chat = server.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1}).json()
    counted = server.post("/tokenize", json={"messages": MESSAGES}).json()
    assert counted["count"] == chat["usage"]["prompt_tokens"] == len("user: hi\nassistant:")


def test_strings_of_tokens_come_when_asked_for(server):
    answer = server.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["a", "b"]


def test_special_tokens_are_added_to_a_prompt_unless_told_otherwise():
    class Marked(ByteTokenizer):
        def encode(self, text, add_special_tokens=True):
            return [257] * add_special_tokens + super().encode(text)

    with live_server(FakeParts(tokenizer=Marked())) as server:
        counts = {}
        for value in (None, True, False):
            for name, given in (("prompt", "ab"), ("messages", MESSAGES)):
                body = {name: given, "add_special_tokens": value}
                counts[name, value] = server.post("/tokenize", json=body).json()["count"]
    assert [counts["prompt", value] for value in (None, True, False)] == [3, 3, 2]
    assert [counts["messages", value] for value in (None, True, False)] == [19, 20, 19]


def test_a_text_longer_than_the_context_is_counted_too(server):
    assert server.post("/tokenize", json={"prompt": "x" * 1000}).json()["count"] == 1000
    assert server.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    assert server.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [EOS + 2]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_bad_input_is_named(server, path, body, param):
    response = server.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert server.context.engine.is_idle


def test_tokenizing_has_a_seat_like_everything_else(server):
    admission = server.context.engine.admission
    held = admission.reserve(admission.capacity, 0)
    assert server.post("/tokenize", json={"prompt": "a"}).status_code == 429
    assert server.post("/detokenize", json={"tokens": [1]}).status_code == 429
    held.close()
    assert server.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_an_unknown_model(server):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert server.post(path, json={**body, "model": "other"}).status_code == 404
