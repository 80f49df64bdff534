"""The official client, unchanged, against the server."""

import openai
import pytest

from tests.support.api_server import live_server
from tests.support.fake_model import ByteTokenizer, FakeModel, FakeParts, Faults

TOKENIZER = ByteTokenizer()
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
PROMPT = "system: be brief\nuser: hi\nassistant:"


@pytest.fixture(scope="module")
def server():
    with live_server(api_key="key", max_num_seqs=1, max_queue=0) as live:
        yield live


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:
        yield client


def greedy(prompt, num_tokens):
    return TOKENIZER.decode(FakeModel().continue_greedily(TOKENIZER.encode(prompt), num_tokens))


def test_models_are_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "qerve"


def test_a_chat(client):
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0, max_completion_tokens=8)
    assert answer.choices[0].message.content == greedy(PROMPT, 8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.system_fingerprint.startswith("qerve-")


def test_a_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == greedy(PROMPT, 8)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 8
    assert not chunks[-1].choices


def test_the_clients_stream_helper_accumulates_the_message(client):
    whole = greedy(PROMPT, 8)
    options = {"temperature": 0, "max_tokens": 20, "stop": whole[6:8]}
    with client.chat.completions.stream(model="fake", messages=MESSAGES, **options) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole[: whole.index(whole[6:8])]
    assert final.choices[0].finish_reason == "stop"


def test_a_completion_and_its_stream(client):
    answer = client.completions.create(model="fake", prompt="hello", temperature=0, max_tokens=8, stop=["\n"], seed=1)
    assert answer.choices[0].text == greedy("hello", 8)
    stream = client.completions.create(model="fake", prompt="hello", temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == greedy("hello", 8)


async def test_the_asynchronous_client(server):
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="key") as client:
        stream = await client.completions.create(model="fake", prompt="hello", temperature=0, max_tokens=8, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == greedy("hello", 8)


def test_errors_become_the_clients_exceptions(server, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x" * 300)
    assert caught.value.param == "prompt"
    assert caught.value.body["n_ctx"] == 256
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="fake", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_a_full_queue_is_a_rate_limit_error(server, client):
    seat = server.context.engine.admission.reserve(1, 0)
    try:
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="fake", prompt="x")
    finally:
        seat.close()


def test_an_error_in_the_middle_of_a_stream_is_raised():
    parts = FakeParts(model=FakeModel(faults=Faults(fails_on=ord("#"))))
    with (
        live_server(parts) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
        pytest.raises(openai.APIError, match="Generation failed"),
    ):
        list(client.completions.create(model="fake", prompt="#", stream=True))
