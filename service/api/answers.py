"""The shapes of answers, for the OpenAPI document; the endpoints build the answers themselves."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReasonName = Literal["stop", "length"]


class Answer(BaseModel):
    """Base of all answers: more fields may come with later versions."""

    model_config = ConfigDict(extra="allow")


class Usage(Answer):
    """Token counts of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(Answer):
    """One continuation of one prompt."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReasonName


class CompletionAnswer(Answer):
    """``POST /v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: str | None


class ChatChoice(Answer):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReasonName


class ChatAnswer(Answer):
    """``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ScoredToken(Answer):
    """A token of a scored text: what it adds to the text, and its nll; null where no window predicts it."""

    text: str
    nll: float | None


class PerplexityAnswer(Answer):
    """``POST /v1/perplexity``: ``perplexity`` is null where it is more than a number can hold."""

    object: Literal["perplexity"]
    model: str
    system_fingerprint: str
    nll: float
    perplexity: float | None
    num_tokens: int
    num_windows: int
    token_nlls: list[float] | None = None
    tokens: list[ScoredToken] | None = None


class TokenizeAnswer(Answer):
    """``POST /tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Answer):
    """``POST /detokenize``."""

    prompt: str


class ModelAnswer(Answer):
    """A model that is served; asked for by its name, also how it was made and how it is run."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelsAnswer(Answer):
    """``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelAnswer]


class HealthAnswer(Answer):
    """``GET /health/*``."""

    status: Literal["ok"]


class ErrorObject(Answer):
    """What went wrong: ``param`` names the field at fault, ``code`` repeats the status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(Answer):
    """Every answer that is not a success."""

    error: ErrorObject
