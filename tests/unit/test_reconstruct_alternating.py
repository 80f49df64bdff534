"""LoftQ and LQ-LoRA against the loops of their papers, written out with plain SVDs and explicit scales."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.quant.grid import dequantize
from models.reconstruct.loss import stored_weight
from tests.support.reconstruct_cases import (
    CASES,
    Case,
    build,
    config_of,
    make_case,
    quantize,
    remaining_error,
)


def truncated_svd(matrix: Tensor, rank: int) -> Tensor:
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * sizes[:rank] @ right[:rank]


def output_error(case: Case, error: Tensor) -> float:
    return float(torch.trace(error @ case.statistics.autocorrelation @ error.T))


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("name", ["healthy", "tall", "constant column"])
def test_loftq_is_the_loop_of_the_paper(name: str, iterations: int) -> None:
    case = make_case(name)
    product = torch.zeros(case.weight.shape, dtype=torch.float64)
    for _ in range(iterations):
        codes = quantize((case.weight.double() - product).float())
        product = truncated_svd(case.weight.double() - dequantize(codes).double(), 8)
    weights, _ = build(case, config_of("loftq", iterations=iterations))
    assert torch.equal(weights.quantized.codes, codes.codes)
    expected = dequantize(codes).double() + product
    assert torch.allclose(stored_weight(weights), expected, atol=1e-6)


def test_one_iteration_of_loftq_is_zeroquants_correction() -> None:
    case = make_case("healthy")
    assert torch.equal(remaining_error(case, config_of("loftq")), remaining_error(case, config_of("zeroquant-v2")))


def test_iterations_of_loftq_lower_the_weight_error() -> None:
    case = make_case("healthy")
    errors = [float(remaining_error(case, config_of("loftq", iterations=count)).norm()) for count in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("name", CASES)
def test_more_iterations_of_the_activation_aware_loop_never_raise_the_output_error(name: str) -> None:
    case = make_case(name)
    errors = [
        output_error(case, remaining_error(case, config_of("loftq", iterations=count, is_activation_aware=True)))
        for count in range(1, 7)
    ]
    scale = output_error(case, case.base_error)
    assert all(after <= before + 1e-9 * scale for before, after in pairwise(errors))


def test_the_activation_aware_loop_improves_on_qera_exact_where_the_plain_one_does_not() -> None:
    case = make_case("healthy")
    exact = output_error(case, remaining_error(case, config_of("qera-exact")))
    aware = output_error(case, remaining_error(case, config_of("loftq", iterations=8, is_activation_aware=True)))
    plain = output_error(case, remaining_error(case, config_of("loftq", iterations=8)))
    assert aware < exact < plain


def lqlora_loop(case: Case, rows: Tensor, columns: Tensor, max_iterations: int) -> tuple[Tensor, int]:
    """Restored weight and iterations taken: D_row (W - Q) D_col, its SVD scaled back, then the codes of the rest."""
    weight = case.weight.double()
    kept, least, codes = None, float("inf"), torch.zeros_like(weight)
    for iteration in range(max_iterations):
        scaled = rows.sqrt()[:, None] * (weight - codes) * columns.sqrt()
        product = truncated_svd(scaled, 8) / rows.sqrt()[:, None] / columns.sqrt()
        codes = dequantize(quantize((weight - product).float())).double()
        error = float((rows.sqrt()[:, None] * (weight - codes - product) * columns.sqrt()).norm())
        if error >= least:
            return kept, iteration
        kept, least = codes + product, error
    return kept, max_iterations


@pytest.mark.parametrize("max_iterations", [1, 2, 20])
@pytest.mark.parametrize("name", ["healthy", "tall"])
@pytest.mark.parametrize("use_fisher", [True, False])
def test_lqlora_is_the_loop_of_the_paper(name: str, max_iterations: int, use_fisher: bool) -> None:
    case = make_case(name)
    rows, columns = case.statistics.fisher_rows, case.statistics.fisher_columns
    if not use_fisher:
        rows, columns = torch.ones_like(rows), torch.ones_like(columns)
    expected, _ = lqlora_loop(case, rows, columns, max_iterations)
    weights, _ = build(case, config_of("lq-lora", max_iterations=max_iterations, use_fisher=use_fisher))
    assert torch.allclose(stored_weight(weights), expected, atol=1e-5)


def test_lqlora_stops_at_the_first_rise_and_keeps_the_iterate_before() -> None:
    case = make_case("healthy")
    _, taken = lqlora_loop(case, case.statistics.fisher_rows, case.statistics.fisher_columns, 50)
    assert 1 < taken < 50
    limited, free = (remaining_error(case, config_of("lq-lora", max_iterations=count)) for count in (taken, 50))
    assert torch.equal(limited, free)


def test_lqlora_follows_the_gradients() -> None:
    """Rows and columns with large gradients end with smaller errors, relative to what they have without them."""
    case = make_case("healthy")
    case.statistics.fisher_rows.copy_(torch.logspace(0, -4, 48))
    case.statistics.fisher_columns.copy_(torch.logspace(0, -4, 64))
    plain, aimed = (remaining_error(case, config_of("lq-lora", use_fisher=given)) for given in (False, True))
    assert aimed[:12, :16].norm() < plain[:12, :16].norm()
    assert aimed[-12:, -16:].norm() > plain[-12:, -16:].norm()


def test_lqlora_without_any_gradient_signal_is_finite() -> None:
    case = make_case("healthy")
    case.statistics.fisher_rows.zero_()
    case.statistics.fisher_columns.zero_()
    assert remaining_error(case, config_of("lq-lora")).isfinite().all()
