"""The weighted low-rank problem against textbook solutions: full SVD in float64 with an explicit root of R."""

import pytest
import torch
from torch import Tensor

from models.quant.weighting import weigh
from models.reconstruct import linalg
from models.reconstruct.linalg import component_losses, weighted_low_rank


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


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_components_remove_the_eigenvalues_of_the_weighted_gram_matrix(shape: tuple[int, int]) -> None:
    error, weighting = torch.randn(shape), autocorrelation(inputs(200, shape[1]))
    _, lora_down = weighted_low_rank(error, weighting, 10)
    squares = torch.linalg.svdvals(error.double() @ symmetric_root(weighting)).square()
    assert torch.allclose(component_losses(lora_down, weighting), squares[:10], rtol=1e-9)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_weights_on_both_sides_give_the_textbook_solution_of_the_scaled_error(
    shape: tuple[int, int], rank: int
) -> None:
    error, weighting = torch.randn(shape), autocorrelation(inputs(200, shape[1]))
    sizes = torch.logspace(1, -1, shape[0], dtype=torch.float64)
    lora_up, lora_down = weighted_low_rank(error, weighting, rank, sizes.square())
    expected = textbook(sizes[:, None] * error, symmetric_root(weighting), rank) / sizes[:, None]
    assert torch.allclose(lora_up @ lora_down, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
    scaled = sizes[:, None] * lora_up
    assert torch.allclose(scaled.T @ scaled, torch.eye(rank, dtype=torch.float64), atol=1e-9)


def test_equal_output_weights_change_nothing() -> None:
    error, weighting = torch.randn(24, 40), autocorrelation(inputs(200, 40))
    plain, equal = (weighted_low_rank(error, weighting, 5, given) for given in (None, torch.full((24,), 7.0)))
    assert torch.allclose(plain[0] @ plain[1], equal[0] @ equal[1], atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_an_output_of_no_weight_gets_its_best_combination_of_the_components(shape: tuple[int, int]) -> None:
    """It must not divide by zero, nor take part in the choice of components; then it is a regression on those."""
    error, weighting = torch.randn(shape).double(), autocorrelation(inputs(200, shape[1]))
    sizes = torch.rand(shape[0], dtype=torch.float64) + 0.5
    sizes[3] = 0
    lora_up, lora_down = weighted_low_rank(error, weighting, 5, sizes)
    others = torch.arange(shape[0]) != 3
    expected = weighted_low_rank(error[others], weighting, 5, sizes[others])
    assert torch.allclose((lora_up @ lora_down)[others], expected[0] @ expected[1], atol=1e-4)
    root = symmetric_root(weighting)
    regression = torch.linalg.lstsq(root @ lora_down.T, root @ error[3]).solution
    assert torch.allclose(lora_up[3], regression, rtol=1e-4, atol=1e-4)


def test_outputs_that_have_no_weight_at_all_are_taken_as_equal() -> None:
    error = torch.randn(24, 40)
    plain, nothing = (weighted_low_rank(error, None, 5, given) for given in (None, torch.zeros(24)))
    assert torch.equal(plain[0] @ plain[1], nothing[0] @ nothing[1])


@pytest.mark.usefixtures("only_small_is_exact")
def test_large_problems_with_output_weights_come_within_a_thousandth_of_the_optimum() -> None:
    error, weighting = torch.rand(260, 320) - 0.5, autocorrelation(inputs(640, 320, decades=3.5))
    sizes = torch.logspace(0, -2, 260, dtype=torch.float64)
    lora_up, lora_down = weighted_low_rank(error, weighting, 8, sizes.square())
    scaled = sizes[:, None] * error
    eigenvalues = torch.linalg.eigvalsh(weigh(scaled, weighting) @ scaled.T)
    optimum = float(eigenvalues[:-8].sum())
    achieved = loss(scaled - sizes[:, None] * (lora_up @ lora_down), weighting)
    assert optimum * (1 - 1e-9) <= achieved <= optimum * 1.001
