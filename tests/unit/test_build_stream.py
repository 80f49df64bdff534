"""Streams of hidden states: how many sequences pass at a time changes nothing but the time."""

import pytest
import torch
from torch import Tensor

from models.build.recipe import sequences_together
from models.build.stream import HiddenStream
from models.build.weights import StreamedLinear, linear_module
from models.config import BuildConfig, CalibrationConfig, ReconstructConfig
from models.layers.linear import DenseLinear
from models.llama.config import LlamaConfig
from models.llama.rope import RotaryEmbedding
from models.quant.rtn import quantize_rtn
from models.scheme import ActivationScheme, QuantScheme
from models.types import LinearWeights
from tests.support.tiny_checkpoints import tiny_config

CPU = torch.device("cpu")
LENGTH, WIDTH, VOCAB = 6, 8, 20
TRAINING = ReconstructConfig("qer", 4)


def stream_of(num_sequences: int, num_together: int) -> HiddenStream:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (num_sequences, LENGTH), generator=generator)
    embedding = torch.randn(VOCAB, WIDTH, generator=generator)
    config = LlamaConfig.from_hf(tiny_config(), "tiny")
    return HiddenStream.embed(tokens, embedding, num_together, RotaryEmbedding(config))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("num_sequences", [1, 4, 7])
def test_a_stream_that_is_split_is_the_stream_of_smaller_batches(num_sequences: int, batch_size: int) -> None:
    found, wanted = stream_of(num_sequences, 4).split(batch_size), stream_of(num_sequences, batch_size)
    assert len(found.hidden) == len(wanted.hidden) == -(-num_sequences // batch_size)
    for ours, theirs in zip(found.hidden, wanted.hidden, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.batches, wanted.batches, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.positions, theirs.positions)
        assert ours.spans == theirs.spans


def test_splitting_copies_no_hidden_state() -> None:
    whole = stream_of(4, 4)
    parts = whole.split(1)
    assert [part.data_ptr() for part in parts.hidden] == [row.data_ptr() for row in whole.hidden[0].split(LENGTH)]


@pytest.mark.parametrize(
    ("batch_size", "length", "together"),
    [(1, 512, 4), (3, 512, 3), (1, 300, 6), (2, 300, 6), (1, 4096, 1), (4, 2048, 4)],
)
def test_whole_batches_pass_together_up_to_2048_tokens(batch_size: int, length: int, together: int) -> None:
    calibration = CalibrationConfig(batch_size=batch_size, sequence_length=length)
    assert sequences_together(BuildConfig(reconstruct=TRAINING, calibration=calibration)) == together
    assert sequences_together(BuildConfig(calibration=calibration)) == batch_size


def quantized_linear(*, has_bias: bool) -> LinearWeights:
    quantized = quantize_rtn(torch.randn(24, 64), QuantScheme(4, 32))
    bias = torch.randn(24) if has_bias else None
    return LinearWeights(quantized, rotation_block=16, activations=ActivationScheme(4, 32), bias=bias)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_quantized_layer_streams_as_the_reference_runs_it(has_bias: bool) -> None:
    weights, x = quantized_linear(has_bias=has_bias), torch.randn(5, 64)
    wanted: Tensor = linear_module("it", weights, CPU)(x)
    assert torch.equal(StreamedLinear.of_quantized(weights, CPU, torch.float32)(x), wanted)
    narrow: Tensor = StreamedLinear.of_quantized(weights, CPU, torch.bfloat16)(x)
    assert narrow.dtype == torch.float32 and not torch.equal(narrow, wanted)
    assert float((narrow - wanted).norm() / wanted.norm()) < 2**-7


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_dense_layer_streams_in_the_precision_of_products(has_bias: bool) -> None:
    dense, x = DenseLinear(torch.randn(24, 64), torch.randn(24) if has_bias else None), torch.randn(5, 64)
    wanted: Tensor = dense(x)
    assert torch.allclose(StreamedLinear.of_dense(dense, torch.float32)(x), wanted, rtol=1e-5, atol=1e-5)
    narrow: Tensor = StreamedLinear.of_dense(dense, torch.bfloat16)(x)
    assert narrow.dtype == torch.float32
    assert 0 < float((narrow - wanted).norm() / wanted.norm()) < 2**-7
