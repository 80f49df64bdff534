"""The fields of a body that say how tokens are chosen: types and bounds of every one, both sides."""

from typing import Annotated

from pydantic import BaseModel, Field, PlainValidator

MAX_BIASES = 300
MAX_STOP_TOKENS = 64
MAX_ALLOWED_TOKENS = 1 << 20
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 64
MAX_TOP_LOGPROBS = 20
MAX_LOGPROBS = 1024
"""The most that an operator can allow."""
MAX_INT32 = 2**31 - 1


def _parse_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Token id, which JSON spells as a text, -> bias."""
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"give an object of at most {MAX_BIASES} token ids")
    return tuple((_parse_bias_id(token_id), _parse_bias(bias)) for token_id, bias in value.items())


def _parse_bias_id(value: object) -> int:
    if not isinstance(value, str) or not (value.isascii() and value.isdecimal()) or not len(value) <= 10:
        raise ValueError("token ids must be integers from 0 on")
    return int(value)


def _parse_bias(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
        raise ValueError("a bias must be a number from -100 to 100")
    return float(value)


BiasField = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_parse_logit_bias, json_schema_input_type=dict[str, float] | None),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]


class SamplingFields(BaseModel):
    """How the next token is chosen, when the output may end, and what is told of its tokens."""

    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_INT32)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_INT32)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, allow_inf_nan=False)
    logit_bias: BiasField = ()
    allowed_token_ids: Annotated[list[TokenId], Field(max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
