"""Perplexity of the holdout, dense and quantized, from the hidden states that both leave the last layer with."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..evaluate.perplexity import PerplexityResult, score_hidden, summarize
from ..llama.checkpoint import Checkpoint
from ..llama.model import RMSNorm, head_logits
from ..scheme import EMBEDDING, HEAD
from ..types import LinearWeights
from .stream import CalibrationStreams, HiddenStream
from .weights import linear_module

_Logits = Callable[[Tensor], Tensor]


def holdout_evaluation(
    checkpoint: Checkpoint, streams: CalibrationStreams, vocabulary: Mapping[str, LinearWeights]
) -> dict[str, int | float]:
    """What the artifact records about its quality; empty without a holdout.

    Embedding and head are taken as the artifact stores them: dense ones at 16 bits, by which 16-bit checkpoints lose
    nothing.

    Args:
        checkpoint: the dense network.
        streams: behind the last decoder layer.
        vocabulary: embedding and head by module path, as far as they are quantized.

    Returns:
        dense_perplexity and quantized_perplexity over the holdout's num_tokens predictions; where embedding or head are
        quantized also dense_vocabulary_perplexity, of the quantized layers between dense ones.
    """
    if not streams.holdout_dense.hidden:
        return {}
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
    found["quantized_perplexity"] = _score(streams.holdout_quantized, norm, logits).perplexity
    return found


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
