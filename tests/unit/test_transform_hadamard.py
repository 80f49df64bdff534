"""Hadamard matrices against their textbook definitions, in integers, and rotations against the whole matrix."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.errors import SchemeError
from models.transform.hadamard import check_rotation, hadamard_matrix, is_known, rotate, unrotate

MODEL_WIDTHS = [
    576, 896, 1536, 2048, 3072, 3584, 4096, 4864, 5120, 5632, 8192, 8960, 11008, 13824, 14336, 17920, 18944, 28672,
    29568,
]  # fmt: skip
SMALL_ORDERS = [n for n in range(1, 257) if is_known(n)]
PRIME_ORDERS_1 = {12: 11, 20: 19, 44: 43, 60: 59, 108: 107, 140: 139}
PRIME_ORDERS_2 = {36: 17, 76: 37, 148: 73}
FIELD_ORDERS = {28: (3, 3), 52: (5, 2), 244: (3, 5)}


def signs(size: int) -> Tensor:
    """The matrix times sqrt(size), checked to hold nothing but +-1 up to rounding."""
    matrix = hadamard_matrix(size, torch.float64) * math.sqrt(size)
    assert torch.allclose(matrix.abs(), torch.ones_like(matrix), rtol=0, atol=1e-12)
    return matrix.round().long()


def legendre(number: int, prime: int) -> int:
    """By Euler's criterion."""
    power = pow(number % prime, (prime - 1) // 2, prime)
    return -1 if power == prime - 1 else power


def paley_first(chi: list[list[int]]) -> Tensor:
    """I + [[0, 1], [-1, Q]] for Q = ``chi``."""
    size = len(chi) + 1
    rows = [[1] * size]
    rows += [[-1, *(chi[a][b] + (a == b) for b in range(size - 1))] for a in range(size - 1)]
    return torch.tensor(rows)


def paley_second(chi: list[list[int]]) -> Tensor:
    """Blocks of two: [[1, -1], [-1, -1]] on the diagonal, C[i, j] * [[1, 1], [1, -1]] elsewhere."""
    size = len(chi) + 1
    conference = [[int(b > 0) for b in range(size)]] + [[1, *row] for row in chi]
    matrix = torch.zeros(2 * size, 2 * size, dtype=torch.long)
    for a, b, i, j in itertools.product(range(size), range(size), range(2), range(2)):
        diagonal = (1, -1, -1, -1)[2 * i + j]
        matrix[2 * a + i, 2 * b + j] = diagonal if a == b else conference[a][b] * (1, 1, 1, -1)[2 * i + j]
    return matrix


def field_character(prime: int, degree: int) -> list[list[int]]:
    """chi(a - b) by squaring every element, modulo the first polynomial that makes x generate the field."""
    elements = [tuple(n // prime**place % prime for place in range(degree)) for n in range(prime**degree)]

    def times(a: tuple[int, ...], b: tuple[int, ...], tail: tuple[int, ...]) -> tuple[int, ...]:
        long = [0] * (2 * degree - 1)
        for (i, u), (j, v) in itertools.product(enumerate(a), enumerate(b)):
            long[i + j] += u * v
        for place in range(2 * degree - 2, degree - 1, -1):
            for low, coefficient in enumerate(tail):
                long[place - degree + low] += long[place] * coefficient
        return tuple(value % prime for value in long[:degree])

    def reached(tail: tuple[int, ...]) -> int:
        x, element, seen = elements[prime], elements[1], set[tuple[int, ...]]()
        while element not in seen:
            seen.add(element)
            element = times(element, x, tail)
        return len(seen)

    tail = next(
        it for it in itertools.product(range(prime), repeat=degree) if reached(it) == len(elements) - 1 and it[0]
    )
    squares = {times(a, a, tail) for a in elements[1:]}
    minus = [[tuple((u - v) % prime for u, v in zip(a, b, strict=True)) for b in elements] for a in elements]
    return [[0 if not any(d) else 1 if d in squares else -1 for d in row] for row in minus]


@pytest.mark.parametrize("size", SMALL_ORDERS)
def test_rows_are_orthogonal_in_integers(size: int) -> None:
    matrix = signs(size)
    assert matrix.shape == (size, size)
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.long))


@pytest.mark.parametrize("size", [344, 576, 924, 1536, 1792])
def test_rows_are_orthogonal_in_integers_at_the_orders_of_real_networks(size: int) -> None:
    matrix = signs(size).double()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256])
def test_power_of_two_is_the_parity_of_common_bits(size: int) -> None:
    expected = torch.tensor([[(-1) ** (row & column).bit_count() for column in range(size)] for row in range(size)])
    assert torch.equal(signs(size), expected)


@pytest.mark.parametrize(("size", "prime"), PRIME_ORDERS_1.items())
def test_first_construction_is_that_of_the_legendre_symbol(size: int, prime: int) -> None:
    expected = paley_first([[legendre(a - b, prime) for b in range(prime)] for a in range(prime)])
    assert torch.equal(signs(size), expected)


@pytest.mark.parametrize(("size", "prime"), PRIME_ORDERS_2.items())
def test_second_construction_is_that_of_the_legendre_symbol(size: int, prime: int) -> None:
    expected = paley_second([[legendre(a - b, prime) for b in range(prime)] for a in range(prime)])
    assert torch.equal(signs(size), expected)


@pytest.mark.parametrize(("size", "field"), FIELD_ORDERS.items())
def test_prime_powers_take_the_squares_of_their_field(size: int, field: tuple[int, int]) -> None:
    chi = field_character(*field)
    assert torch.equal(signs(size), paley_first(chi) if len(chi) % 4 == 3 else paley_second(chi))


@pytest.mark.parametrize("size", [24, 72, 56, 104])
def test_other_orders_are_kronecker_products_with_the_smallest_known_one(size: int) -> None:
    base = {24: 12, 72: 36, 56: 28, 104: 52}[size]
    expected = torch.kron(signs(size // base), signs(base))
    assert torch.equal(signs(size), expected)


def test_widths_of_released_networks_are_known() -> None:
    assert [width for width in MODEL_WIDTHS if not is_known(width)] == []


def test_widths_without_a_construction_are_not_known() -> None:
    assert [size for size in (-4, 0, 3, 6, 9, 18, 92, 172, 428, 13696) if is_known(size)] == []


@pytest.mark.parametrize("build", [hadamard_matrix, lambda size: rotate(torch.zeros(1, size), size)])
def test_unknown_order_names_the_block_to_take(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SchemeError, match=r"order 13696 .* rotation_block 128, the largest power of two that divides"):
        build(13696)


def test_check_gives_the_width_of_the_blocks() -> None:
    assert check_rotation(576, 0, "layer") == 576
    assert check_rotation(576, 64, "layer") == 64
    assert check_rotation(13696, 128, "layer") == 128


@pytest.mark.parametrize(
    ("in_features", "block", "message"),
    [
        (576, 128, r"^model\.q_proj: rotation_block 128 does not divide 576 channels; choose rotation_block 64, "),
        (13696, 0, r"^model\.q_proj: no Hadamard matrix of order 13696 .* rotation_block 128"),
        (576, 48 * 3, None),
        (576, 96, None),
        (576, 288, None),
        (576, 18, r"order 18 .* rotation_block 2"),
        (63, 0, r"order 63 .* odd width"),
        (64, -1, "rotation_block -1"),
    ],
)
def test_check_names_the_layer_and_the_fix(in_features: int, block: int, message: str | None) -> None:
    if message is None:
        assert check_rotation(in_features, block, "model.q_proj") == block
        return
    with pytest.raises(SchemeError, match=message):
        check_rotation(in_features, block, "model.q_proj")


@pytest.mark.parametrize("block", [0, -64, 48, 128])
def test_rotate_refuses_a_block_that_does_not_divide(block: int) -> None:
    with pytest.raises(SchemeError, match=f"rotation_block {block or -1} does not divide 64"):
        rotate(torch.zeros(2, 64), block)


@pytest.mark.parametrize("block", [1, 2, 12, 64, 128, 256, 344, 512, 576, 896, 3584, 4096])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_rotate_is_a_product_with_the_whole_matrix(block: int, num_blocks: int) -> None:
    x = torch.randn(2, 3, num_blocks * block, dtype=torch.float64, generator=torch.Generator().manual_seed(block))
    expected = (x.unflatten(-1, (num_blocks, block)) @ hadamard_matrix(block, torch.float64)).flatten(-2)
    assert torch.allclose(rotate(x, block), expected, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SMALL_ORDERS), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2**31))
def test_layer_output_and_norms_are_unchanged_and_the_rotation_can_be_undone(
    block: int, num_blocks: int, num_tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randn(rows, num_blocks * block, dtype=torch.float64, generator=generator) for rows in (num_tokens, 5)
    )
    rotated = rotate(x, block)
    assert torch.allclose(rotated @ rotate(weight, block).T, x @ weight.T, rtol=0, atol=1e-10)
    assert torch.allclose(rotated.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert torch.allclose(unrotate(rotated, block), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [64, 576, 4096])
def test_result_has_the_dtype_of_the_input_and_is_rounded_once(dtype: torch.dtype, block: int) -> None:
    x = torch.randn(4, 4096 // block * block, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = x.clone()
    rotated = rotate(x, block)
    exact = rotate(x.double(), block)
    assert rotated.dtype == dtype
    assert torch.equal(x, before)
    eps = torch.finfo(dtype).eps
    sums = 20 * max(torch.finfo(torch.float32).eps if dtype != torch.float64 else eps, 0.0)
    assert ((rotated.double() - exact).abs() <= 0.5 * eps * exact.abs() + sums).all()


def test_float16_does_not_overflow_before_the_division() -> None:
    x = torch.full((1, 4096), 4000.0)
    x[0, torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:2048]] *= -1
    assert float(rotate(x, 4096).abs().max()) * math.sqrt(4096) > torch.finfo(torch.float16).max
    assert rotate(x.half(), 4096).isfinite().all()


def test_one_outlier_is_spread_evenly() -> None:
    x = torch.zeros(1, 576)
    x[0, 17] = 24.0
    assert torch.allclose(rotate(x, 576).abs(), torch.ones(1, 576))


def test_views_and_empty_batches_are_rotated() -> None:
    x = torch.randn(64, 6)
    assert torch.equal(rotate(x.T, 64), rotate(x.T.contiguous(), 64))
    assert rotate(torch.zeros(0, 128), 64).shape == (0, 128)
    assert rotate(torch.randn(64), 64).shape == (64,)


def test_gradients_flow_after_a_first_use_in_inference_mode() -> None:
    with torch.inference_mode():
        rotate(torch.randn(2, 216, dtype=torch.float64), 216)
    x = torch.randn(2, 216, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 216, dtype=torch.float64)
    (rotate(x, 216) * weights).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, unrotate(weights, 216), rtol=0, atol=1e-12)
