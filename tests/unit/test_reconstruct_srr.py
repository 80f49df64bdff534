"""SRR: both ends of the split are other methods, and the split is the paper's criterion with an explicit root."""

import pytest
import torch
from torch import Tensor

from models.quant.grid import dequantize
from models.reconstruct import srr
from models.reconstruct.linalg import weighted_low_rank
from models.reconstruct.loss import stored_weight
from tests.support.reconstruct_cases import (
    CASES,
    Case,
    all_statistics,
    build,
    config_of,
    correlated_inputs,
    make_case,
    quantize,
    remaining_error,
    symmetric_root,
)  # fmt: skip


def output_error(case: Case, error: Tensor) -> float:
    return float(torch.trace(error @ case.statistics.autocorrelation @ error.T))


def best_low_rank(matrix: Tensor, case: Case, rank: int) -> Tensor:
    """S^-1 SVD_k(S M) of the paper."""
    root = symmetric_root(case.statistics.autocorrelation)
    left, sizes, right = torch.linalg.svd(root @ matrix.double().T, full_matrices=False)
    return torch.linalg.solve(root, left[:, :rank] * sizes[:rank] @ right[:rank]).T


def low_rank_case(rank: int) -> Case:
    """A weight that is almost of rank ``rank``: what the codes have to hold is small once that part is out."""
    weight = torch.randn(48, rank) @ torch.randn(rank, 64) + 0.05 * torch.randn(48, 64)
    return Case(weight, all_statistics(correlated_inputs(400), torch.randn(400, 48, dtype=torch.float64)))


@pytest.mark.parametrize("name", CASES)
def test_without_preserved_components_it_is_qera_exact(name: str) -> None:
    case = make_case(name)
    (ours, _), (exact, _) = build(case, config_of("srr", split=0)), build(case, config_of("qera-exact"))
    assert torch.equal(ours.quantized.codes, exact.quantized.codes)
    assert torch.allclose(stored_weight(ours), stored_weight(exact), atol=1e-6)


@pytest.mark.parametrize("split", [0, 3, 8])
@pytest.mark.parametrize("name", ["healthy", "tall", "constant column"])
def test_a_fixed_split_is_the_three_steps_of_the_paper(name: str, split: int) -> None:
    case = make_case(name)
    preserved = best_low_rank(case.weight, case, split)
    codes = quantize((case.weight - preserved).float())
    correcting = best_low_rank(case.weight - preserved - dequantize(codes), case, 8 - split)
    weights, _ = build(case, config_of("srr", split=split))
    assert torch.equal(weights.quantized.codes, codes.codes)
    expected = dequantize(codes) + preserved + correcting
    assert torch.allclose(stored_weight(weights), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def chosen_by_definition(case: Case, rank: int) -> int:
    """argmin rho_k(S W) rho_{r-k}(S N) from the singular values of explicitly rooted matrices, for the seeded N."""
    generator = torch.Generator().manual_seed(srr._SEED)
    noise = torch.rand(case.weight.shape, generator=generator).double() * 2 - 1
    root = symmetric_root(case.statistics.autocorrelation)
    of_weight, of_noise = (torch.linalg.svdvals(root @ m.double().T).square() for m in (case.weight, noise))
    losses = [
        float(of_weight[k:].sum() / of_weight.sum() * of_noise[rank - k :].sum() / of_noise.sum())
        for k in range(rank + 1)
    ]
    return losses.index(min(losses))


@pytest.mark.parametrize("name", ["healthy", "tall", "dead channel", "rank 1", "rank 3", "rank 8"])
def test_the_split_is_the_criterion_of_the_paper(name: str) -> None:
    case = low_rank_case(int(name[-1])) if name.startswith("rank") else make_case(name)
    autocorrelation = case.statistics.autocorrelation
    _, lora_down = weighted_low_rank(case.weight, autocorrelation, 8)
    assert srr.choose_split(case.weight, lora_down, autocorrelation) == chosen_by_definition(case, 8)


def test_a_weight_with_a_strong_low_rank_part_keeps_it_and_a_weight_of_noise_does_not() -> None:
    strong, noise = low_rank_case(3), make_case("healthy")
    uniform = Case(torch.rand(48, 64) * 2 - 1, noise.statistics)
    splits = []
    for case in (strong, uniform):
        _, lora_down = weighted_low_rank(case.weight, case.statistics.autocorrelation, 8)
        splits.append(srr.choose_split(case.weight, lora_down, case.statistics.autocorrelation))
    assert splits[0] >= 3
    assert splits[0] > splits[1]
    ours, exact = (output_error(strong, remaining_error(strong, config_of(m))) for m in ("srr", "qera-exact"))
    assert ours < 0.1 * exact


def test_a_weight_of_nothing_preserves_nothing() -> None:
    case = make_case("no error")
    down = torch.zeros(8, 64, dtype=torch.float64)
    assert srr.choose_split(case.weight, down, case.statistics.autocorrelation) == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", [-1, 0, 4, 8])
def test_fitting_all_components_together_never_raises_the_output_error(name: str, split: int) -> None:
    case = make_case(name)
    joint, apart = (
        output_error(case, remaining_error(case, config_of("srr", split=split, is_joint=given)))
        for given in (True, False)
    )
    assert joint <= apart * (1 + 1e-6) + 1e-9 * output_error(case, case.base_error)
