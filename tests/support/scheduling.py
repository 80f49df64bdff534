"""A scheduler and requests without an engine: steps are as good as computed when they are scheduled."""

import zlib

from service.engine.block_manager import BlockManager
from service.engine.request import Request, SamplingParams
from service.engine.scheduler import Scheduler


def make_request(name, num_prompt_tokens=4, max_tokens=4):
    """Its tokens are its own: no other request begins like it."""
    return request_of(name, [f"{name}{index}" for index in range(num_prompt_tokens)], max_tokens)


def request_of(name, tokens, max_tokens=4):
    token_ids = [zlib.crc32(str(token).encode()) for token in tokens]
    return Request(name, token_ids, SamplingParams(max_tokens=max_tokens))


def make_scheduler(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=100, has_prefix_cache=True):
    blocks = BlockManager(num_blocks, block_size, has_prefix_cache=has_prefix_cache)
    return Scheduler(blocks, max_num_seqs, max_num_batched_tokens)


def add_prompts(scheduler, **num_prompt_tokens):
    for name, length in num_prompt_tokens.items():
        scheduler.add(make_request(name, length))


def compute(scheduler, step):
    """What the engine does with a step: every scheduled token is computed, and who has no more gets a token."""
    for request, num_tokens, gets_token, _ in step:
        request.scheduled_seconds = request.scheduled_seconds or 1.0
        scheduler.advance(request, num_tokens)
        if gets_token:
            assert request.num_computed_tokens == request.num_tokens
            request.output_token_ids.append(1000 + request.num_output_tokens)


def run_step(scheduler):
    step = scheduler.schedule()
    compute(scheduler, step)
    return plan_of(step)


def plan_of(step):
    return [(item.request.request_id, item.num_tokens) for item in step]


def plans_of(scheduler, num_steps):
    return [run_step(scheduler) for _ in range(num_steps)]
