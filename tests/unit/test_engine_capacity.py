"""The size of the key-value cache: from what is asked for, the model and the memory there is."""

import sys

import psutil
import pytest
import torch

from models.errors import QerveError
from models.llama.kv_cache import PagedKVCache
from service.engine.capacity import CacheLimits, plan_cache, step_tokens
from tests.support.fake_model import fake_config

GIB = 1 << 30
CONFIG = fake_config(context=256)  # 16 blocks of 128 bytes for one full sequence


def plan(limits, available=GIB, device="cpu", dtype=torch.float32):
    return plan_cache(CONFIG, PagedKVCache.bytes_per_block(CONFIG, dtype=dtype), device, available, limits)


def test_with_plenty_of_memory_every_seat_can_hold_a_full_sequence():
    assert plan(CacheLimits(max_num_seqs=4)).num_blocks == 4 * 16
    assert plan(CacheLimits(max_num_seqs=4)).max_model_len == 256


def test_a_shorter_maximum_length_needs_fewer_blocks():
    got = plan(CacheLimits(max_num_seqs=4, max_model_len=100))
    assert (got.num_blocks, got.max_model_len) == (4 * 7, 100)


def test_the_memory_asked_for_is_not_exceeded():
    got = plan(CacheLimits(max_num_seqs=100, memory_bytes=5000))
    cache = PagedKVCache(CONFIG, got.num_blocks)
    assert 5000 - 128 < cache.nbytes <= 5000


def test_memory_asked_for_beyond_what_can_be_used_is_not_taken():
    assert plan(CacheLimits(max_num_seqs=2, memory_bytes=GIB)).num_blocks == 32


def test_by_default_only_a_share_of_the_free_memory_is_taken():
    got = plan(CacheLimits(max_num_seqs=1000), available=100_000)
    assert got.num_blocks * 128 <= 100_000 * 0.3


def test_too_little_memory_shortens_the_sequences_when_the_length_was_left_open():
    got = plan(CacheLimits(max_num_seqs=4, memory_bytes=1000))
    assert (got.num_blocks, got.max_model_len) == (7, 112)


def test_too_little_memory_for_a_length_that_was_asked_for_is_an_error_that_says_what_to_change():
    with pytest.raises(QerveError, match="raise kv_cache_memory or lower max_model_len"):
        plan(CacheLimits(max_num_seqs=4, max_model_len=200, memory_bytes=1000))


def test_memory_for_not_even_one_block_is_an_error():
    with pytest.raises(QerveError, match="hold 0 tokens"):
        plan(CacheLimits(max_num_seqs=4, memory_bytes=100))


def test_a_length_beyond_the_models_context_is_an_error():
    with pytest.raises(QerveError, match="more than the model's context of 256"):
        plan(CacheLimits(max_num_seqs=4, max_model_len=257))


@pytest.mark.skipif(sys.platform != "linux", reason="depends on how the system hands out memory")
def test_the_cache_takes_memory_only_as_it_is_used():
    process = psutil.Process()
    before = process.memory_info().rss
    cache = PagedKVCache(CONFIG, num_blocks=2_000_000)
    assert cache.nbytes == 256_000_000
    assert process.memory_info().rss - before < 64_000_000


def test_half_precision_holds_twice_as_many_tokens():
    limits = CacheLimits(max_num_seqs=100, memory_bytes=6400)
    assert plan(limits, dtype=torch.bfloat16).num_blocks == 2 * plan(limits).num_blocks


@pytest.mark.parametrize(
    ("device", "max_num_seqs", "asked", "tokens"),
    [
        ("cpu", 8, None, 512),
        ("cuda", 8, None, 2048),
        ("cpu", 1000, None, 1016),
        ("cpu", 8, 24, 24),
        ("cuda", 8, 64, 64),
    ],
)
def test_a_step_has_room_for_every_decode_and_a_block_of_a_prompt(device, max_num_seqs, asked, tokens):
    assert step_tokens(device, max_num_seqs, asked) == tokens


def test_a_step_in_which_prompts_could_starve_is_an_error_that_says_what_to_change():
    with pytest.raises(QerveError, match="23 leaves no room for a prompt beside 8 decodes: make it at least 24"):
        step_tokens("cpu", 8, 23)
