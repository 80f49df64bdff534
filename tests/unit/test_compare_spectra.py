"""Singular values of quantization errors against numpy's, with and without a change of the input's coordinates."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.compare.spectra import NUM_VALUES, error_spectrum
from models.quant.grid import dequantize
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from models.transform.inputs import InputTransform
from models.types import Correction, LinearWeights

OUT, IN = 24, 64


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weighted_values(error, autocorrelation):
    values, vectors = np.linalg.eigh(autocorrelation.numpy())
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return np.linalg.svd(root @ error.T.numpy(), compute_uv=False)


@pytest.mark.parametrize("block", [0, 16])
def test_values_are_those_of_the_error_in_either_norm(block):
    weight, inputs = random(OUT, IN).float(), random(500, IN, seed=1) * torch.linspace(0.1, 3, IN)
    transform = InputTransform(rotation_block=block)
    codes = quantize_rtn(transform.weight(weight), QuantScheme(num_bits=3, group_size=32))
    autocorrelation = transform.apply(inputs).T @ transform.apply(inputs) / len(inputs)
    found = error_spectrum(weight, LinearWeights(codes, rotation_block=block), autocorrelation)
    error = transform.weight(weight).double() - dequantize(codes).double()
    np.testing.assert_allclose(found.plain, np.linalg.svd(error.numpy(), compute_uv=False), rtol=1e-4)
    np.testing.assert_allclose(found.weighted, weighted_values(error, autocorrelation), rtol=1e-4)
    assert found.plain_total == pytest.approx(float(error.square().sum()), rel=1e-5)
    # What all of them add up to is the mean square error of the outputs.
    outputs = transform.apply(inputs) @ error.T
    assert found.weighted_total == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-5)


def test_the_correction_is_left_aside_and_without_statistics_there_are_plain_values_only():
    weight = random(OUT, IN).float()
    weights = LinearWeights(quantize_rtn(weight, QuantScheme(group_size=32)))
    corrected = replace(weights, correction=Correction(random(OUT, 2).float(), random(2, IN).float()))
    found = error_spectrum(weight, corrected, None)
    assert found == error_spectrum(weight, weights, None)
    assert (found.weighted, found.weighted_total) == ((), 0.0)


def test_only_the_largest_values_are_listed():
    weight = random(NUM_VALUES + 40, 256).float()
    found = error_spectrum(weight, LinearWeights(quantize_rtn(weight, QuantScheme(num_bits=2, group_size=32))), None)
    assert len(found.plain) == NUM_VALUES
    assert list(found.plain) == sorted(found.plain, reverse=True)
    assert sum(value * value for value in found.plain) < found.plain_total
