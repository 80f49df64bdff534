"""Shrinkage of autocorrelations: by the formula, in the network's own coordinates whatever the inputs went through."""

import pytest
import torch
from torch import Tensor

from models.transform.hadamard import rotate
from models.transform.shrink import shrink


def samples(num_channels: int = 16) -> Tensor:
    return torch.randn(40, num_channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(
        torch.logspace(-1, 1, num_channels, dtype=torch.float64)
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_correlations_lose_the_share_and_energies_nothing(share: float) -> None:
    x = samples()
    autocorrelation = x.T @ x / len(x)
    shrunk = shrink(autocorrelation, share)
    for row in range(16):
        for column in range(16):
            kept = 1.0 if row == column else 1 - share
            assert float(shrunk[row, column]) == pytest.approx(kept * float(autocorrelation[row, column]), abs=1e-12)


@pytest.mark.parametrize("block", [4, 16])
def test_rotated_inputs_are_shrunk_as_if_before_the_rotation(block: int) -> None:
    x = samples()
    rotated = rotate(x, block)
    expected = rotate(rotate(shrink(x.T @ x, 0.3), block).T.contiguous(), block)
    given = rotated.T @ rotated
    before = given.clone()
    shrunk = shrink(given, 0.3, block)
    assert torch.allclose(shrunk, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(shrunk, shrunk.T)
    assert torch.equal(given, before)
    assert float(torch.linalg.eigvalsh(shrunk).min()) > 0
