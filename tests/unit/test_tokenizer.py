"""The tokenizer and its chat templates, against transformers on a small tokenizer trained here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from models.errors import CheckpointError
from models.llama.tokenizer import Tokenizer
from tests.support.tiny_checkpoints import CHATML_TEMPLATE, CORPUS, VOCAB_SIZE, tokenizer_files, train_tokenizer

LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Tools: " + (tools | tojson(indent=4)) }}{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception("only user and assistant may speak, not " ~ message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONTROL_FLOW_TEMPLATE = """{% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
{{ ns.count }}:{{ message | tojson }}{{ eos_token }}
    {% if message.role == 'assistant' %}
        {% generation %}{{ message.content | upper }}{% endgeneration %}
        {% break %}
    {% endif %}
{% endfor %}
{{ strftime_now('%Y') | length }}{{ documents is none }}{{ range(3) | list }}"""

TEMPLATES = {
    "llama3": LLAMA3_TEMPLATE,
    "smollm2": SMOLLM2_TEMPLATE,
    "qwen2": CHATML_TEMPLATE,
    "control_flow": CONTROL_FLOW_TEMPLATE,
}
CONVERSATIONS = [
    [{"role": "user", "content": 'Hello <b>there</b> & "you" 日本'}],
    [{"role": "system", "content": "  Be kind. "}, {"role": "user", "content": "Hi\n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "3"},
    ],
]


def write_tokenizer(directory: Path, change: Callable[[Backend], object] = lambda _: None, **extra: Any) -> Path:
    """A tokenizer directory: ``change`` edits the backend, ``extra`` joins tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = train_tokenizer()
    change(backend)
    config = json.loads(tokenizer_files()["tokenizer_config.json"]) | extra
    (directory / "tokenizer.json").write_text(backend.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def with_bos(backend: Backend) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )


def transformers_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    directory = write_tokenizer(tmp_path_factory.mktemp("pair"), with_bos)
    return Tokenizer.from_directory(directory), transformers_tokenizer(directory)


@pytest.mark.parametrize("text", [*CORPUS, "", " ", "<|im_end|> x<|im_start|>y", "a\x00b", "🙂" * 3])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encode_and_decode_agree_with_transformers(
    text: str, add_special_tokens: bool, pair: tuple[Tokenizer, Any]
) -> None:
    ours, theirs = pair
    ids = ours.encode(text, add_special_tokens)
    assert ids == theirs(text, add_special_tokens=add_special_tokens).input_ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer = SHARED
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(text) <= len(ids) * tokenizer.max_token_chars


SHARED = Tokenizer.from_files(tokenizer_files())


@given(st.lists(st.integers(0, 400)))
def test_any_ids_decode_to_text(ids: list[int]) -> None:
    SHARED.decode(ids).encode("utf-8")


@pytest.mark.parametrize("setting", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("has_bos", [True, False])
def test_markers_are_those_of_tokenizer_json_as_in_transformers(
    setting: dict[str, bool], has_bos: bool, tmp_path: Path
) -> None:
    directory = write_tokenizer(tmp_path, with_bos if has_bos else lambda _: None, **setting)
    ours = Tokenizer.from_directory(directory)
    ids = ours.encode("boats")
    assert ids == [1] * has_bos + ours.encode("boats", add_special_tokens=False)
    assert ids == transformers_tokenizer(directory)("boats").input_ids


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    def limit(backend: Backend) -> None:
        backend.enable_truncation(4)
        backend.enable_padding(length=64)

    assert len(Tokenizer.from_directory(write_tokenizer(tmp_path, limit)).encode("river mill " * 5)) > 4
    assert len(Tokenizer.from_directory(tmp_path).encode("river")) < 64


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "🙂\udc00"])
def test_lone_surrogates_are_a_clear_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D[0-9A-F]{3} at character \d"):
        SHARED.encode(text)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_templates_render_as_in_transformers(
    name: str, conversation: list[dict[str, str]], add_generation_prompt: bool, pair: tuple[Tokenizer, Any]
) -> None:
    files = tokenizer_files() | {"chat_template.jinja": TEMPLATES[name].encode()}
    ours = Tokenizer.from_files(files).apply_chat_template(conversation, add_generation_prompt)
    expected = pair[1].apply_chat_template(
        conversation, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours == expected
    assert "<|" in ours


def test_rendering_leaves_the_messages_alone() -> None:
    messages = [{"role": "user", "content": "x"}]
    SHARED.apply_chat_template(messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", [], "roles must alternate"),
        (LLAMA3_TEMPLATE, [{"role": "tool", "content": "x"}], "only user and assistant may speak, not tool"),
        (CHATML_TEMPLATE, [{"role": "user"}], "content"),
        (CHATML_TEMPLATE, [{"role": "user", "content": None}], "NoneType"),
        (CHATML_TEMPLATE, ["just text"], "rejects these messages"),
        ("{{ messages[3].content.x }}", [], "rejects these messages"),
        ("{{ 1 // 0 }}", [], "zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [], "recursion"),
    ],
)
def test_what_a_template_rejects_is_a_value_error_with_its_words(
    template: str, messages: list[Any], words: str
) -> None:
    tokenizer = Tokenizer.from_files(tokenizer_files() | {"chat_template.jinja": template.encode()})
    with pytest.raises(ValueError, match="rejects these messages") as caught:
        tokenizer.apply_chat_template(messages)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str) -> None:
    tokenizer = Tokenizer.from_files(tokenizer_files() | {"chat_template.jinja": template.encode()})
    with pytest.raises(CheckpointError, match="not allowed"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_broken_template_is_refused_when_the_tokenizer_is_read() -> None:
    files = tokenizer_files() | {"chat_template.jinja": b"{% for message in messages %}\n{{ message"}
    with pytest.raises(CheckpointError, match="chat template is not valid"):
        Tokenizer.from_files(files, where="here")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("A{{ bos_token }}", "A<|im_start|>"),
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "rag", "template": "R"}], "R"),
    ],
)
def test_templates_in_the_settings_may_be_one_or_several(setting: object, expected: str, tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, chat_template=setting)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template([]) == expected
    (directory / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(directory).apply_chat_template([]) == "file"


def test_without_a_template_there_is_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_end_tokens_come_from_every_place_that_names_them(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    (directory / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_directory(directory).eos_token_ids == {2, 7}
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Tokenizer.from_directory(directory).eos_token_ids == {2, 5, 6}
    assert Tokenizer.from_files(tokenizer_files(), {"eos_token_id": 9}).eos_token_ids == {2, 9}
    assert Tokenizer.from_files(tokenizer_files(), {}).eos_token_ids == {2}


def test_special_tokens_may_be_objects_or_live_in_the_older_file(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, bos_token={"content": "<|im_start|>", "lstrip": False}, eos_token=None)
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}')
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.bos_token_id == 1


def test_sizes_follow_the_vocabulary() -> None:
    assert SHARED.vocab_size == VOCAB_SIZE
    assert SHARED.max_token_chars == len("<|endoftext|>")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json: cannot be read"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json: cannot be read"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json"),
        ({"special_tokens_map.json": b"{"}, "special_tokens_map.json"),
    ],
)
def test_damaged_files_are_named(files: dict[str, bytes], words: str) -> None:
    base = tokenizer_files() if "tokenizer.json" not in files and files else {}
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_files(base | files, where="artifacts/x")
    assert "artifacts/x" in str(caught.value)
    assert words in str(caught.value)


def test_only_a_sentencepiece_model_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(CheckpointError, match="AutoTokenizer"):
        Tokenizer.from_directory(tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(position=st.integers(0, 5000), value=st.integers(0, 255))
def test_a_changed_byte_in_tokenizer_json_is_read_or_refused(position: int, value: int) -> None:
    files = tokenizer_files()
    content = bytearray(files["tokenizer.json"])
    content[position % len(content)] = value
    try:
        Tokenizer.from_files(files | {"tokenizer.json": bytes(content)}).encode("The river")
    except CheckpointError as error:
        assert "tokenizer.json" in str(error)
