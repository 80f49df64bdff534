"""Greedy decoding of one sequence with the key-value cache: what generative tasks of lm-evaluation-harness need."""

from collections.abc import Callable, Sequence

import torch

from ..llama.batch import Batch, SequenceSpan
from ..llama.network import Network

BLOCK_SIZE = 16


@torch.inference_mode()
def generate_greedily(
    model: Network, prompt: Sequence[int], max_new_tokens: int, is_finished: Callable[[list[int]], bool]
) -> list[int]:
    """The most likely token, again and again.

    Args:
        model: the network.
        prompt: token ids, at least one.
        max_new_tokens: stop after as many.
        is_finished: called with the tokens written so far; stop when it is true.

    Returns:
        The new token ids, the one that ended the generation included.
    """
    num_slots = len(prompt) + max_new_tokens
    cache = model.new_cache(-(-num_slots // BLOCK_SIZE))
    slots = torch.arange(num_slots, device=model.device)
    new: list[int] = []
    fed = list(prompt)
    context_len = 0
    while len(new) < max_new_tokens:
        context_len += len(fed)
        span = SequenceSpan(0, len(fed), context_len, slots[:context_len], range(cache.num_blocks))
        tokens = torch.tensor(fed, device=model.device)
        hidden = model(Batch(tokens, slots[context_len - len(fed) : context_len], (span,)), cache)
        fed = [int(model.logits(hidden[-1:]).argmax())]
        new += fed
        if is_finished(new):
            break
    return new
