"""Perplexity of the holdout, dense and quantized, from the hidden states that both leave the last layer with."""

import torch

from ..evaluate.perplexity import PerplexityResult, score_hidden, summarize
from ..llama.checkpoint import Checkpoint
from ..llama.model import RMSNorm, head_logits
from .stream import CalibrationStreams, HiddenStream


def holdout_evaluation(checkpoint: Checkpoint, streams: CalibrationStreams) -> dict[str, int | float]:
    """What the artifact records about its quality; empty without a holdout.

    Both are scored with the head as the artifact stores it, at 16 bits; 16-bit checkpoints lose nothing by it.

    Returns:
        dense_perplexity and quantized_perplexity over the holdout's num_tokens predictions.
    """
    if not streams.holdout_dense.hidden:
        return {}
    network, device = checkpoint.config, streams.holdout_dense.batches[0].token_ids.device
    norm = RMSNorm(checkpoint.tensor("model.norm.weight").to(device, torch.float32), network.rms_norm_eps)
    head = checkpoint.tensor(network.head_name, narrow=True).to(device)
    dense = _score(streams.holdout_dense, norm, head)
    quantized = _score(streams.holdout_quantized, norm, head)
    return {
        "dense_perplexity": dense.perplexity,
        "quantized_perplexity": quantized.perplexity,
        "num_tokens": dense.num_tokens,
    }


@torch.inference_mode()
def _score(stream: HiddenStream, norm: RMSNorm, head: torch.Tensor) -> PerplexityResult:
    nlls = []
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        for span in batch.spans:
            rows = slice(span.start, span.start + span.num_tokens - 1)
            targets = batch.token_ids[span.start + 1 : span.start + span.num_tokens]
            states = norm(hidden[rows].to(head.device))
            nlls.append(score_hidden(lambda part: head_logits(part, head), states, targets))
    return summarize(nlls)
