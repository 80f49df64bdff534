"""The weighted low-rank problem against textbook solutions: full SVD in float64 with an explicit root of R."""

import pytest
import torch
from torch import Tensor

from models.reconstruct import linalg
from models.reconstruct.linalg import balance, weigh, weighted_low_rank


def inputs(num_tokens: int, num_channels: int, decades: float = 2.0) -> Tensor:
    """Correlated tokens whose principal components fall off over ``decades`` orders of magnitude."""
    sizes = torch.logspace(0, -decades, num_channels, dtype=torch.float64)
    rotation, _triangle = torch.linalg.qr(torch.randn(num_channels, num_channels, dtype=torch.float64))
    return torch.randn(num_tokens, num_channels, dtype=torch.float64) * sizes @ rotation


def autocorrelation(x: Tensor) -> Tensor:
    return x.T @ x / x.shape[0]


def loss(error: Tensor, weighting: Tensor | None) -> float:
    return float((weigh(error, weighting) * error).sum())


def textbook(error: Tensor, root: Tensor, rank: int) -> Tensor:
    """``S^-1 SVD_k(S E)`` of the papers (E input-major), returned output-major."""
    left, sizes, right = torch.linalg.svd(root @ error.T.double(), full_matrices=False)
    truncated = left[:, :rank] * sizes[:rank] @ right[:rank]
    return torch.linalg.solve(root, truncated).T


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_solution_is_the_textbook_one_for_either_root_of_a_full_weighting(
    shape: tuple[int, int], rank: int
) -> None:
    error = torch.randn(shape)
    weighting = autocorrelation(inputs(200, shape[1]))
    lora_up, lora_down = weighted_low_rank(error, weighting, rank)
    for root in (symmetric_root(weighting), torch.linalg.cholesky(weighting).T):
        expected = textbook(error, root, rank)
        assert torch.allclose(lora_up @ lora_down, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_solution_is_the_textbook_one_for_a_diagonal_weighting(shape: tuple[int, int]) -> None:
    error = torch.randn(shape)
    scales = torch.rand(shape[1], dtype=torch.float64) + 0.1
    lora_up, lora_down = weighted_low_rank(error, scales.square(), 6)
    assert torch.allclose(lora_up @ lora_down, textbook(error, scales.diag(), 6), atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_without_a_weighting_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    error = torch.randn(shape)
    left, sizes, right = torch.linalg.svd(error.double(), full_matrices=False)
    lora_up, lora_down = weighted_low_rank(error, None, 7)
    assert torch.allclose(lora_up @ lora_down, left[:, :7] * sizes[:7] @ right[:7], atol=1e-9)


@pytest.mark.parametrize("num_tokens", [10, 200])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rank", [1, 4, 12, 24])
def test_what_remains_on_the_tokens_is_the_sum_of_the_trailing_squared_singular_values(
    num_tokens: int, shape: tuple[int, int], rank: int
) -> None:
    error = torch.randn(shape)
    x = inputs(num_tokens, shape[1])
    x[:, 3] = 0
    lora_up, lora_down = weighted_low_rank(error, autocorrelation(x), rank)
    outputs = x @ error.double().T
    remaining = (outputs - x @ (lora_up @ lora_down).T).square().sum()
    trailing = torch.linalg.svdvals(outputs).square()[rank:].sum()
    assert float(remaining) == pytest.approx(float(trailing), rel=1e-9, abs=1e-12 * float(outputs.square().sum()))


@pytest.fixture
def only_small_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send problems of a few hundred channels down the path that is meant for thousands."""
    monkeypatch.setattr(linalg, "_EXACT_SIZE", 0)


@pytest.mark.usefixtures("only_small_is_exact")
@pytest.mark.parametrize("shape", [(260, 320), (320, 260)])
@pytest.mark.parametrize("is_full", [True, False])
def test_large_problems_come_within_a_thousandth_of_the_optimum(shape: tuple[int, int], is_full: bool) -> None:
    """Round-off noise as error, and inputs whose autocorrelation has condition 1e8, as trained networks have them."""
    error = torch.rand(shape) - 0.5
    weighting = autocorrelation(inputs(2 * shape[1], shape[1], decades=3.5)).float().double()
    weighting = weighting if is_full else weighting.diagonal() * torch.logspace(0, -4, shape[1])
    lora_up, lora_down = weighted_low_rank(error, weighting, 8)
    gram = weigh(error.double(), weighting) @ error.double().T
    optimum = float(gram.trace() - torch.linalg.eigvalsh(gram)[-8:].sum())
    achieved = loss(error.double() - lora_up @ lora_down, weighting)
    assert optimum * (1 - 1e-9) <= achieved <= optimum * 1.001
    assert torch.allclose(lora_up.T @ lora_up, torch.eye(8, dtype=torch.float64), atol=1e-12)


@pytest.mark.usefixtures("only_small_is_exact")
def test_a_flat_spectrum_is_no_worse_than_other_large_problems() -> None:
    error = torch.randn(260, 320)
    lora_up, lora_down = weighted_low_rank(error, None, 8)
    optimum = float(torch.linalg.svdvals(error.double())[8:].square().sum())
    assert loss(error.double() - lora_up @ lora_down, None) <= optimum * 1.001


@pytest.mark.usefixtures("only_small_is_exact")
def test_a_large_problem_with_hardly_any_tokens_is_solved_completely() -> None:
    error = torch.randn(260, 300)
    x = torch.randn(12, 300, dtype=torch.float64)
    lora_up, lora_down = weighted_low_rank(error, autocorrelation(x), 12)
    outputs = x @ error.double().T
    assert float((outputs - x @ (lora_up @ lora_down).T).norm()) < 1e-9 * float(outputs.norm())


def test_a_really_large_problem_comes_within_a_thousandth_of_the_optimum() -> None:
    error = torch.rand(1040, 1030) - 0.5
    weighting = torch.logspace(2, -6, 1030, dtype=torch.float64)
    lora_up, lora_down = weighted_low_rank(error, weighting, 8)
    squares = torch.linalg.svdvals(error.double() * weighting.sqrt()).square()
    optimum = float(squares[8:].sum())
    assert optimum * (1 - 1e-9) <= loss(error.double() - lora_up @ lora_down, weighting) <= optimum * 1.001


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1030, 1030)])
def test_no_error_needs_no_correction(shape: tuple[int, int]) -> None:
    lora_up, lora_down = weighted_low_rank(torch.zeros(shape), torch.ones(shape[1]), 4)
    assert lora_up.isfinite().all()
    assert not lora_down.any()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_rank_reproduces_the_error(shape: tuple[int, int]) -> None:
    error = torch.randn(shape)
    lora_up, lora_down = weighted_low_rank(error, autocorrelation(inputs(200, shape[1])), 24)
    assert torch.allclose(lora_up @ lora_down, error.double(), atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 40), (1030, 1030)])
def test_the_same_problem_has_the_same_solution_to_the_last_bit(shape: tuple[int, int]) -> None:
    error, weighting = torch.randn(shape), torch.rand(shape[1], dtype=torch.float64)
    first = weighted_low_rank(error, weighting, 4)
    torch.randn(10)  # the global generator must play no part
    second = weighted_low_rank(error, weighting, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_leading_part_of_the_factors_is_the_solution_of_lower_rank() -> None:
    error, weighting = torch.randn(24, 40), autocorrelation(inputs(200, 40))
    lora_up, lora_down = weighted_low_rank(error, weighting, 10)
    smaller = weighted_low_rank(error, weighting, 3)
    assert torch.allclose(lora_up[:, :3] @ lora_down[:3], smaller[0] @ smaller[1], atol=1e-9)


def test_balancing_keeps_the_product_and_evens_out_the_factors() -> None:
    lora_up, lora_down = weighted_low_rank(torch.randn(24, 40), None, 6)
    even_up, even_down = balance(lora_up, lora_down)
    assert torch.allclose(even_up @ even_down, lora_up @ lora_down, atol=1e-12)
    assert torch.allclose(even_up.norm(dim=0), even_down.norm(dim=1))


def test_balancing_a_correction_of_nothing_gives_no_nan() -> None:
    even_up, even_down = balance(*weighted_low_rank(torch.zeros(24, 40), None, 6))
    assert even_up.isfinite().all()
    assert not (even_up @ even_down).any()
