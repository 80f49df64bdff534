"""Request bodies: types and bounds of every field, both sides.

Fields that OpenAI or vLLM define and this server does not carry out yet are accepted at their neutral value and refused
otherwise, by name: a client that depends on one must not get text that ignores it. Fields that nobody defines are
ignored, as vLLM does.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from ..errors import bad_request
from .sampling_fields import MAX_LOGPROBS, MAX_TOP_LOGPROBS, SamplingFields
from .structured import StructuredFields

MAX_PROMPTS = 32
MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_MESSAGES = 4096
MAX_TEMPLATE_VARIABLES = 64
MAX_INT32 = 2**31 - 1

Prompt = str | list[int]

_COMMON_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "best_of": (None, 1),
    "guided_decoding_backend": (None,),
    "prompt_logprobs": (None, False),
    "spaces_between_special_tokens": (None, True),
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
RankField = Annotated[int | None, Field(ge=0, le=MAX_INT32)]
"""Components of the corrections to use; None: all of them, or what the server gives under pressure."""


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
    continuous_usage_stats: bool | None = None


class GenerationBody(Body, SamplingFields, StructuredFields):
    """What completions and chat completions have in common."""

    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    stop: StopField = ()
    rank: RankField = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)

    @property
    def include_usage(self) -> bool:
        """A stream ends with an event that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_in_every_event(self) -> bool:
        """So does every other event of it."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def requested_tokens(self) -> int | None:
        """Output tokens that the client asks for."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to tell of with each output token; None: nothing is to be told of any."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same with each token of the prompt."""
        return None

    def check(self) -> None:
        """Raise 400 for what single fields cannot show."""
        self.refuse_unsupported()
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options may only be given with stream: true.", "stream_options")
        if self.requested_tokens is not None and (self.min_tokens or 0) > self.requested_tokens:
            raise bad_request(
                f"min_tokens {self.min_tokens} is more than the {self.requested_tokens} of max_tokens.", "min_tokens"
            )


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    unsupported = {
        **_COMMON_UNSUPPORTED,
        "suffix": (None, ""),
        "prompt_embeds": (None,),
    }

    prompt: PromptsField
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT32)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """See ``GenerationBody``; at 0, the log-probabilities of the tokens themselves."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See ``GenerationBody``."""
        return self.logprobs if self.echo else None


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
        "documents": (None, []),
        "chat_template": (None,),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See ``GenerationBody``."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """See ``GenerationBody``."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs may only be given with logprobs: true.", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message goes on with the last message, add_generation_prompt begins one: give one.",
                "continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise bad_request("continue_final_message: the last message is not the assistant's.", "messages")

    @property
    def requested_tokens(self) -> int | None:
        """Output tokens that the client asks for, under the new name or the old one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class PerplexityBody(Body):
    """``POST /v1/perplexity``: ``text``, ``token_ids`` or ``probe``.

    probe:  score the text that the artifact's build scored, dense and quantized, to compare with it
    window: tokens of one forward pass; default 1024 or the context, whichever is less
    stride: tokens between two windows; default: the window, so that they do not overlap
    return_tokens: every token's text with its nll, those that begin a window without one
    """

    model: ModelName | None = None
    text: str | None = None
    token_ids: TokenIdsField | None = None
    probe: Literal[True] | None = None
    window: int | None = Field(default=None, ge=2, le=MAX_INT32)
    stride: int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_windows: int | None = Field(default=None, ge=1, le=MAX_INT32)
    rank: RankField = None
    return_token_nlls: bool = False
    return_tokens: bool = False

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
