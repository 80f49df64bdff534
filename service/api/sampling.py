"""From a checked body to how its choices are sampled."""

import asyncio
from collections.abc import Iterable

from ..deps import Context
from ..engine.request import SamplingParams
from ..errors import bad_request
from .generation import check_vocabulary
from .schemas import GenerationBody
from .structured import grammar_for


async def sampling_of(context: Context, body: GenerationBody) -> SamplingParams:
    """How every choice of ``body`` is sampled, but for ``max_tokens`` and the seed, which each has of its own.

    Raises:
        ApiError: 400, a token id outside the vocabulary, too many log-probabilities, a grammar that cannot be used.
    """
    check_vocabulary(context, (token_id for token_id, _ in body.logit_bias), "logit_bias")
    check_vocabulary(context, body.stop_token_ids or (), "stop_token_ids")
    check_vocabulary(context, body.allowed_token_ids or (), "allowed_token_ids")
    most = context.settings.max_logprobs
    if (body.num_logprobs or 0) > most:
        raise bad_request(f"{body.num_logprobs} log-probabilities per token; this server gives {most}.", "logprobs")
    return SamplingParams(
        max_tokens=0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=body.seed,
        stop=body.stop,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        includes_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=body.logit_bias,
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=await asyncio.to_thread(_bad_words, context, body.bad_words) if body.bad_words else (),
        grammar=await grammar_for(context, body),
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        skips_special_tokens=body.skip_special_tokens is not False,
    )


def _bad_words(context: Context, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens as they are at the beginning of a text, and after a space."""
    encode = context.loaded.tokenizer.encode
    spelled = (encode(prefix + word.lstrip(), add_special_tokens=False) for word in words for prefix in ("", " "))
    return tuple(dict.fromkeys(tuple(token_ids) for token_ids in spelled if token_ids))
