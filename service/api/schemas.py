"""Request bodies: types and bounds of every field, both sides.

Fields that OpenAI or vLLM define and this server does not carry out yet are accepted at their neutral value and refused
otherwise, by name: a client that depends on one must not get text that ignores it. Fields that nobody defines are
ignored, as vLLM does.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from ..errors import bad_request

MAX_PROMPTS = 32
MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_MESSAGES = 4096
MAX_INT32 = 2**31 - 1

Prompt = str | list[int]

_COMMON_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "best_of": (None, 1),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "min_tokens": (None, 0),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "prompt_logprobs": (None, False),
    "truncate_prompt_tokens": (None,),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "return_tokens_as_token_ids": (None, False),
    "return_token_ids": (None, False),
}


def _is_same(given: Any, neutral: Any) -> bool:
    """Equal as JSON values: true is not 1."""
    return isinstance(given, bool) == isinstance(neutral, bool) and bool(given == neutral)


def _parse_prompts(value: object) -> list[Prompt]:
    """One prompt or several, each text or token ids."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        prompts = [value]
    elif isinstance(value, list):
        prompts = value
    else:
        raise ValueError("give a text, a list of texts, a list of token ids or a list of such lists")
    if not prompts:
        raise ValueError("the list of prompts is empty")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts in one request; at most {MAX_PROMPTS}")
    if not (all(isinstance(item, str) for item in prompts) or all(isinstance(item, list) for item in prompts)):
        raise ValueError("give texts or lists of token ids, not a mixture and nothing else")
    if not all(prompts):
        raise ValueError("a prompt is empty")
    return [item if isinstance(item, str) else _parse_token_ids(item) for item in prompts]


def _parse_token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MAX_INT32 for item in value):
        raise ValueError("token ids must be integers from 0 on")
    return value


def _parse_stop(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise ValueError("give a text or a list of texts")
    if len(stops) > MAX_STOPS or not all(1 <= len(item) <= MAX_STOP_CHARS for item in stops):
        raise ValueError(f"give at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _parse_content(value: object) -> str:
    """A message's text: a string, or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("give a text or a list of text parts")
    return "".join(_parse_part(part) for part in value)


def _parse_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise ValueError("only text parts are supported: {'type': 'text', 'text': ...}")
    return str(part["text"])


PromptsField = Annotated[
    list[Prompt],
    PlainValidator(_parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
TokenIdsField = Annotated[list[int], PlainValidator(_parse_token_ids, json_schema_input_type=list[int])]
StopField = Annotated[tuple[str, ...], PlainValidator(_parse_stop, json_schema_input_type=str | list[str] | None)]
ContentField = Annotated[str, PlainValidator(_parse_content, json_schema_input_type=str | list[dict[str, str]])]
ModelName = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    """Base of all request bodies: no conversions between types; unknown fields are kept apart."""

    model_config = ConfigDict(strict=True, extra="allow")
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def refuse_unsupported(self) -> None:
        """Raise 400, naming the parameter, when one that is not carried out has more than its neutral value."""
        for name, value in (self.model_extra or {}).items():
            neutral_values = self.unsupported.get(name)
            if neutral_values is not None and not any(_is_same(value, neutral) for neutral in neutral_values):
                raise bad_request(f"{name} is not supported by this server; leave it out.", name)


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class GenerationBody(Body):
    """What completions and chat completions have in common."""

    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_INT32)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: StopField = ()
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        """A stream ends with an event that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        """Raise 400 for what single fields cannot show."""
        self.refuse_unsupported()
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options may only be given with stream: true.", "stream_options")


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    unsupported = {
        **_COMMON_UNSUPPORTED,
        "echo": (None, False),
        "suffix": (None, ""),
        "add_special_tokens": (None, True),
        "prompt_embeds": (None,),
        # Asks for the log-probability of the chosen tokens even at 0.
        "logprobs": (None,),
    }

    prompt: PromptsField


class ChatMessage(BaseModel):
    """One message; other fields, such as ``name``, are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: ContentField
    tool_calls: Annotated[list[Any] | None, Field(max_length=0)] = None


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    unsupported = {
        **_COMMON_UNSUPPORTED,
        "top_logprobs": (None, 0),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "web_search_options": (None,),
        "reasoning_effort": (None, "none"),
        "echo": (None, False),
        "add_generation_prompt": (None, True),
        "continue_final_message": (None, False),
        "add_special_tokens": (None, False),
        "documents": (None, []),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)

    @property
    def requested_tokens(self) -> int | None:
        """Output tokens that the client asks for, under the new name or the old one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class PerplexityBody(Body):
    """``POST /v1/perplexity``: ``text``, ``token_ids`` or ``probe``.

    probe:  score the text that the artifact's build scored, dense and quantized, to compare with it
    window: tokens of one forward pass; default 1024 or the context, whichever is less
    stride: tokens between two windows; default: the window, so that they do not overlap
    """

    model: ModelName | None = None
    text: str | None = None
    token_ids: TokenIdsField | None = None
    probe: Literal[True] | None = None
    window: int | None = Field(default=None, ge=2, le=MAX_INT32)
    stride: int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_windows: int | None = Field(default=None, ge=1, le=MAX_INT32)
    return_token_nlls: bool = False

    def check(self) -> None:
        """Raise 400 unless exactly one of ``text``, ``token_ids`` and ``probe`` is given and not empty."""
        self.refuse_unsupported()
        sources = {"text": self.text, "token_ids": self.token_ids, "probe": self.probe}
        given = {name: value for name, value in sources.items() if value is not None}
        if len(given) != 1:
            raise bad_request("Give one of text, token_ids and probe.", next(iter(given), "text"))
        ((name, value),) = given.items()
        if not value:
            raise bad_request("The text is empty.", name)
