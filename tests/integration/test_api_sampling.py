"""Sampling parameters, log-probabilities and echo over a real connection, against the fake model run by itself."""

import json

import pytest
import torch

from tests.support.api_server import live_server
from tests.support.fake_model import EOS, ByteTokenizer, FakeModel, FakeParts, RandomModel, state_of

TOKENIZER = ByteTokenizer()
MODEL = FakeModel()
CHAT_PROMPT = "user: hi\nassistant:"


@pytest.fixture(scope="module")
def server():
    with live_server() as live:
        yield live


@pytest.fixture(scope="module")
def random_server():
    """Its model writes any byte: most characters are spread over several tokens, and many are none."""
    with live_server(FakeParts(model=RandomModel())) as live:
        yield live


def complete(server, **body):
    response = server.post("/v1/completions", json={"prompt": "hello", "temperature": 0, "max_tokens": 12, **body})
    assert response.status_code == 200, response.text
    return response.json()


def chat(server, **body):
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 12, **body}
    response = server.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(server, path="/v1/completions", **body):
    what = {"prompt": "hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    response = server.post(path, json={**what, "max_tokens": 4, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def logprobs_after(token_ids, model=MODEL):
    """Oracle: the log-probabilities of all tokens after ``token_ids``."""
    logits = model.logits(torch.tensor([[float(state_of(token_ids))]]))[0]
    return torch.log_softmax(logits.double(), dim=-1)


def greedy(prompt, num_tokens, change=lambda logits, output: logits):
    """Oracle: greedy text with the logits changed by ``change`` before each choice."""
    tokens, output = TOKENIZER.encode(prompt), []
    for _ in range(num_tokens):
        logits = MODEL.logits(torch.tensor([[float(state_of(tokens + output))]]))[0].double()
        output.append(int(change(logits, output).argmax()))
    return TOKENIZER.decode(output)


def test_penalties_are_vllms(server):
    def change(logits, output):
        for token in set(output) | set(TOKENIZER.encode("hello")):
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        for token in set(output):
            logits[token] -= 0.4 * output.count(token) + 0.7
        return logits

    body = {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.7, "max_tokens": 40}
    assert complete(server, **body)["choices"][0]["text"] == greedy("hello", 40, change) != greedy("hello", 40)


def test_logit_bias_and_allowed_tokens(server):
    def change(logits, output):
        logits[ord("z")] += 3.5
        return logits

    biased = complete(server, logit_bias={str(ord("z")): 3.5})["choices"][0]["text"]
    assert biased == greedy("hello", 12, change) != greedy("hello", 12)
    allowed = complete(server, allowed_token_ids=[ord("a"), ord("b")])["choices"][0]["text"]
    assert set(allowed) <= {"a", "b"}
    banned = complete(server, logit_bias={str(ord(letter)): -100 for letter in "aeiou"})["choices"][0]["text"]
    assert not set(banned) & set("aeiou")


def test_bad_words_never_appear(server):
    word = greedy("hello", 12)[4:7]
    text = complete(server, bad_words=[word])["choices"][0]["text"]
    assert word.strip() not in text


def test_stop_tokens_end_the_text_and_are_part_of_it_only_if_asked_for(server):
    whole = greedy("hello", 12)
    stop = ord(whole[4])
    end = whole.index(whole[4])
    for body, text in [({}, whole[:end]), ({"include_stop_str_in_output": True}, whole[: end + 1])]:
        answer = complete(server, stop_token_ids=[stop], **body)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (text, "stop")
        assert answer["usage"]["completion_tokens"] == end + 1


def test_a_stop_string_is_part_of_the_output_if_asked_for(server):
    whole = greedy("hello", 12)
    end = whole.index(whole[5:7]) + 2
    answer = complete(server, stop=whole[5:7], include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == whole[:end]


def test_min_tokens_keeps_stop_tokens_and_the_end_away(server):
    body = {"logit_bias": {str(EOS): 100}, "max_tokens": 20}
    assert complete(server, **body)["usage"]["completion_tokens"] == 1
    answer = complete(server, **body, min_tokens=6)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (7, "stop")
    assert answer["choices"][0]["text"] == greedy("hello", 6)
    assert complete(server, **body, ignore_eos=True)["usage"]["completion_tokens"] == 20


def test_a_seeded_request_with_penalties_repeats_beside_others(server):
    body = {"temperature": 1.2, "seed": 3, "presence_penalty": 1.0, "n": 3, "max_tokens": 30}
    alone = complete(server, **body)
    assert len({choice["text"] for choice in alone["choices"]}) == 3
    assert complete(server, **body, prompt=["other", "hello"])["choices"][3:] == [
        {**choice, "index": choice["index"] + 3} for choice in alone["choices"]
    ]


def check_logprobs(logprobs, prompt, output, num_top, model=MODEL):
    """Against the oracle, place by place; the first token of a prompt has none."""
    token_ids = prompt + output
    start = len(token_ids) - len(logprobs["tokens"])
    for place, token in enumerate(token_ids[start:], start):
        at = place - start
        if place == 0:
            assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
            continue
        want = logprobs_after(token_ids[:place], model)
        assert logprobs["token_logprobs"][at] == pytest.approx(want[token].item(), abs=1e-4)
        top = logprobs["top_logprobs"][at]
        assert num_top <= len(top) <= num_top + 1
        assert top[logprobs["tokens"][at]] == logprobs["token_logprobs"][at]
        assert max(top.values()) == pytest.approx(want.max().item(), abs=1e-4) or not num_top


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("echo", [False, True])
def test_a_completions_logprobs_are_the_models_and_its_tokens_join_to_the_text(server, num_top, echo):
    choice = complete(server, logprobs=num_top, echo=echo, temperature=0.7, seed=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert choice["text"].startswith("hello") or not echo
    offsets = [len("".join(logprobs["tokens"][:place])) for place in range(len(logprobs["tokens"]))]
    assert logprobs["text_offset"] == offsets
    output = TOKENIZER.encode(choice["text"].removeprefix("hello"))
    check_logprobs(logprobs, TOKENIZER.encode("hello"), output, num_top)


@pytest.mark.parametrize("seed", range(8))
def test_tokens_join_to_the_text_where_characters_are_spread_over_tokens(random_server, seed):
    body = {"temperature": 1.0, "seed": seed, "logprobs": 2, "max_tokens": 60, "echo": True, "prompt": "grüß €"}
    choice = complete(random_server, **body)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert all(
        choice["text"].startswith(token, offset)
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_chats_tokens_join_to_the_text_and_their_bytes_to_its_bytes(random_server, seed):
    answer = chat(random_server, temperature=1.0, seed=seed, logprobs=True, top_logprobs=3, return_token_ids=True)
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(item["token"] for item in content) == choice["message"]["content"]
    raw = bytes(byte for item in content for byte in item["bytes"])
    assert raw == bytes(token for token in choice["token_ids"] if token < EOS)
    assert answer["prompt_token_ids"] == TOKENIZER.encode(CHAT_PROMPT)
    for place, item in enumerate(content):
        want = logprobs_after(answer["prompt_token_ids"] + choice["token_ids"][:place], RandomModel())
        assert item["logprob"] == pytest.approx(want[choice["token_ids"][place]].item(), abs=1e-4)
        got = [top["logprob"] for top in item["top_logprobs"]]
        assert got == pytest.approx(want.topk(3).values.tolist(), abs=1e-4)


def test_a_chat_without_top_logprobs_tells_of_the_tokens_alone(server):
    content = chat(server, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    assert all(item["top_logprobs"] == [] for item in content)


def test_a_stop_string_is_cut_out_of_the_text_and_not_of_its_tokens(server):
    whole = greedy("hello", 12)
    choice = complete(server, stop=whole[5:7], logprobs=0)["choices"][0]
    end = whole.index(whole[5:7])
    assert choice["text"] == whole[:end]
    assert "".join(choice["logprobs"]["tokens"]) == whole[: end + 2]


def test_a_token_that_ended_the_text_is_told_of_and_adds_nothing(server):
    choice = complete(server, logit_bias={str(EOS): 100}, min_tokens=3, logprobs=1)["choices"][0]
    assert choice["logprobs"]["tokens"] == [*choice["text"], ""]
    content = chat(server, logit_bias={str(EOS): 100}, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [(item["token"], item["bytes"]) for item in content] == [("", [])]


def test_tokens_may_be_told_by_their_ids(server):
    body = {"logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 3}
    choice = complete(server, **body)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["token_ids"] == TOKENIZER.encode(choice["text"])
    assert choice["prompt_token_ids"] == TOKENIZER.encode("hello")
    body = {"return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": 1, "max_tokens": 1}
    (item,) = chat(server, **body)["choices"][0]["logprobs"]["content"]
    assert item["token"] == item["top_logprobs"][0]["token"] == f"token_id:{ord(greedy(CHAT_PROMPT, 1))}"


def test_a_prompt_is_scored_without_generating_anything(server):
    answer = complete(server, max_tokens=0, echo=True, logprobs=2, prompt=["hello", "hi"])
    for choice, prompt in zip(answer["choices"], ["hello", "hi"], strict=True):
        assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
        assert len(choice["logprobs"]["tokens"]) == len(prompt)
        check_logprobs(choice["logprobs"], TOKENIZER.encode(prompt), [], 2)
    assert answer["usage"]["completion_tokens"] == 0
    assert complete(server, max_tokens=0)["choices"][0]["text"] == ""


def test_echo_without_logprobs_shows_the_prompt_first_for_every_choice(server):
    answer = complete(server, prompt=["one", "two"], echo=True, n=2)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [prompt + greedy(prompt, 12) for prompt in ("one", "one", "two", "two")]
    assert answer["choices"][0]["logprobs"] is None


def join(events):
    """Choices as a stream gave them piece by piece."""
    choices = {}
    for event in events:
        for piece in event["choices"]:
            whole = choices.setdefault(piece["index"], {"text": "", "token_ids": [], "logprobs": None})
            whole["text"] += piece["text"]
            whole["token_ids"] += piece.get("token_ids", [])
            whole["finish_reason"] = piece["finish_reason"]
            if piece["logprobs"]:
                parts = whole["logprobs"] or {name: [] for name in piece["logprobs"]}
                whole["logprobs"] = {name: parts[name] + piece["logprobs"][name] for name in parts}
    return choices


@pytest.mark.parametrize(
    "body",
    [
        {"echo": True},
        {"logprobs": 3},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "logprobs": 2, "stop": " "},
    ],
)
def test_a_stream_gives_what_the_answer_would_in_pieces(random_server, body):
    common = {"prompt": ["hello", "€"], "temperature": 1.0, "seed": 5, "n": 2, "max_tokens": 30}
    body = {**common, "return_token_ids": True, **body}
    whole = complete(random_server, **body)["choices"]
    pieces = join(random_server.events("/v1/completions", body))
    for choice in whole:
        wanted = {name: choice[name] for name in ("text", "token_ids", "logprobs", "finish_reason")}
        assert pieces[choice["index"]] == wanted


def test_a_long_prompt_is_scored_in_chunks_and_told_of_once(random_server):
    with live_server(max_num_batched_tokens=32) as server:
        body = {"prompt": "word " * 30, "logprobs": 1, "echo": True, "max_tokens": 3, "temperature": 0}
        whole = complete(server, **body)["choices"][0]
        (pieces,) = join(server.events("/v1/completions", body)).values()
    assert len(whole["logprobs"]["tokens"]) == 153
    assert pieces["logprobs"] == whole["logprobs"]
    check_logprobs(whole["logprobs"], TOKENIZER.encode("word " * 30), TOKENIZER.encode(whole["text"][150:]), 1)


def test_a_chat_stream_gives_the_same_logprobs(random_server):
    body = {"logprobs": True, "top_logprobs": 2, "temperature": 1.0, "seed": 9, "max_tokens": 30}
    whole = chat(random_server, **body)["choices"][0]
    messages = [{"role": "user", "content": "hi"}]
    events = random_server.events("/v1/chat/completions", {"messages": messages, **body})
    content = [item for event in events for item in (event["choices"][0]["logprobs"] or {}).get("content", [])]
    assert content == whole["logprobs"]["content"]


def test_usage_in_every_event_counts_up(server):
    body = {"prompt": "hello", "max_tokens": 5, "temperature": 0}
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.events("/v1/completions", {**body, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5, 5]
    messages = [{"role": "user", "content": "hi"}]
    events = server.events("/v1/chat/completions", {"messages": messages, "max_tokens": 2, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 2, 2]


def test_a_prompt_is_cut_to_its_last_tokens(server):
    answer = complete(server, prompt="x" * 400 + "hello", truncate_prompt_tokens=5, echo=True)
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["choices"][0]["text"] == "hello" + greedy("hello", 12)
    assert complete(server, prompt="hello", truncate_prompt_tokens=50)["usage"]["prompt_tokens"] == 5
    assert complete(server, prompt=[1, 2, 3], truncate_prompt_tokens=2)["usage"]["prompt_tokens"] == 2


def test_a_chat_may_go_on_with_its_last_message(server):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}]
    answer = chat(server, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert answer["choices"][0]["message"]["content"] == greedy("user: hi\nassistant: well", 12)
    answer = chat(server, add_generation_prompt=False)
    assert answer["choices"][0]["message"]["content"] == greedy("user: hi\n", 12)
    answer = chat(server, chat_template_kwargs={"prefix": ">"})
    assert answer["choices"][0]["message"]["content"] == greedy(">" + CHAT_PROMPT, 12)


CHAT_PATH = "/v1/chat/completions"


def test_what_contradicts_itself_or_the_server_is_refused_by_name(server):
    assert refused(server, min_tokens=5)["param"] == "min_tokens"
    assert refused(server, logprobs=21)["param"] == "logprobs"
    assert refused(server, CHAT_PATH, top_logprobs=2)["param"] == "top_logprobs"
    assert refused(server, CHAT_PATH, continue_final_message=True)["param"] == "messages"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refused(server, CHAT_PATH, **both)["param"] == "continue_final_message"
    for name, value in [("stop_token_ids", [258]), ("allowed_token_ids", [258]), ("logit_bias", {"258": 1})]:
        error = refused(server, **{name: value})
        assert (error["param"], "258" in error["message"]) == (name, True)


def test_an_operator_may_allow_more_or_fewer_logprobs():
    with live_server(max_logprobs=50) as server:
        assert len(complete(server, logprobs=50, max_tokens=1)["choices"][0]["logprobs"]["top_logprobs"][0]) >= 50
    with live_server(max_logprobs=2) as server:
        assert "gives 2" in refused(server, CHAT_PATH, logprobs=True, top_logprobs=3)["message"]


def test_masks_that_leave_no_token_end_the_request_with_a_400(server):
    error = refused(server, allowed_token_ids=[EOS], min_tokens=2)
    assert "no token is left" in error["message"]
    body = {"prompt": "a", "allowed_token_ids": [EOS], "min_tokens": 2, "max_tokens": 4, "stream": True}
    lines = server.post("/v1/completions", json=body).text.split("\n\n")
    assert json.loads(lines[0].removeprefix("data: "))["error"]["code"] == 400


def test_fields_of_openai_that_change_nothing_are_taken(server):
    body = {"store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto"}
    assert complete(server, **body) | {"id": 0, "created": 0} == complete(server) | {"id": 0, "created": 0}
