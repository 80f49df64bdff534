"""Perplexity of the holdout, dense and quantized, from the hidden states that both leave the last layer with."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..artifact.format import Probe
from ..evaluate.perplexity import PerplexityResult, score_hidden, summarize
from ..llama.checkpoint import Checkpoint
from ..llama.model import RMSNorm, head_logits
from ..scheme import EMBEDDING, HEAD
from ..types import LinearWeights
from .stream import CalibrationStreams, HiddenStream
from .weights import linear_module

PROBE_TOKENS = 256
"""A fraction of a second of computing, whatever serves it."""

_Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class HoldoutEvaluation:
    """What the artifact records about its quality; nothing without a holdout.

    values: dense_perplexity and quantized_perplexity over the holdout's num_tokens predictions; where embedding or head
        are quantized also dense_vocabulary_perplexity, of the quantized layers between dense ones
    probe:  the beginning of the first holdout sequence, with both networks' nll on it
    """

    values: dict[str, int | float] = field(default_factory=dict)
    probe: Probe | None = None


def evaluate_holdout(
    checkpoint: Checkpoint, streams: CalibrationStreams, vocabulary: Mapping[str, LinearWeights]
) -> HoldoutEvaluation:
    """Score the holdout.

    Embedding and head are taken as the artifact stores them: dense ones at 16 bits, by which 16-bit checkpoints lose
    nothing.

    Args:
        checkpoint: the dense network.
        streams: behind the last decoder layer.
        vocabulary: embedding and head by module path, as far as they are quantized.
    """
    if not streams.holdout_dense.hidden:
        return HoldoutEvaluation()
    network, device = checkpoint.config, streams.holdout_dense.batches[0].token_ids.device
    norm = RMSNorm(checkpoint.tensor("model.norm.weight").to(device, torch.float32), network.rms_norm_eps)
    head = checkpoint.tensor(network.head_name, narrow=True).to(device)
    by_dense_head = partial(head_logits, weight=head)
    dense = _score(streams.holdout_dense, norm, by_dense_head)
    found: dict[str, int | float] = {"dense_perplexity": dense.perplexity, "num_tokens": dense.num_tokens}
    if vocabulary:
        between = streams.holdout_dense_embedding or streams.holdout_quantized
        found["dense_vocabulary_perplexity"] = _score(between, norm, by_dense_head).perplexity
    is_tied = network.tie_word_embeddings
    path = HEAD if HEAD in vocabulary else EMBEDDING if is_tied and EMBEDDING in vocabulary else None
    logits = by_dense_head if path is None else linear_module(HEAD, vocabulary[path], device)
    quantized = _score(streams.holdout_quantized, norm, logits)
    found["quantized_perplexity"] = quantized.perplexity
    return HoldoutEvaluation(found, _probe(streams.holdout_dense, dense, quantized))


def _probe(stream: HiddenStream, dense: PerplexityResult, quantized: PerplexityResult) -> Probe | None:
    """The first tokens of ``stream``, whose scores come first in both results; None where they are not finite."""
    batch = stream.batches[0]
    num_tokens = min(PROBE_TOKENS, batch.spans[0].num_tokens)
    nlls = [result.token_nlls[: num_tokens - 1].double().mean().item() for result in (dense, quantized)]
    if not all(map(math.isfinite, nlls)):
        return None
    return Probe(token_ids=tuple(batch.token_ids[:num_tokens].tolist()), dense_nll=nlls[0], quantized_nll=nlls[1])


@torch.inference_mode()
def _score(stream: HiddenStream, norm: RMSNorm, logits: _Logits) -> PerplexityResult:
    nlls = []
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        for span in batch.spans:
            rows = slice(span.start, span.start + span.num_tokens - 1)
            targets = batch.token_ids[span.start + 1 : span.start + span.num_tokens]
            states = norm(hidden[rows].to(targets.device))
            nlls.append(score_hidden(logits, states, targets))
    return summarize(nlls)
