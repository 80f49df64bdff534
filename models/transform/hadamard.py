"""Hadamard rotations: spread a few large input channels over all of their block (QuaRot, arXiv 2404.00456).

An orthonormal H with entries +-1 / sqrt(n) leaves a linear layer as it is when it is applied on both sides,
``(x H) (W H)^T = x W^T``, and turns one outlier of size a into n values of size a / sqrt(n).

Orders: ``n = 2**k * m``. The power of two is Sylvester's Kronecker power of [[1, 1], [1, -1]]; m is Paley's, built from
the quadratic character chi of the finite field with q elements (Paley 1933):
    I:  q = 3 mod 4, m = q + 1:      H = I + [[0, 1], [-1, Q]],                            Q[a, b] = chi(a - b)
    II: q = 1 mod 4, m = 2 (q + 1):  H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],   C = [[0, 1], [1, Q]]
for any prime power q: 28 = 27 + 1, 36 = 2 (17 + 1), 344 = 7**3 + 1 (the 11008 = 32 * 344 channels of LLaMA-2-7B).

``rotate`` never forms the whole matrix: ``x (A kron B)`` is two small products, so that a width of 4096 = 64 * 64 takes
128 multiplications a value instead of 4096. Cost of serving with it: n (a + b + ..) multiplications a token for
n = a * b * .. against the layer's n * out_features.
"""

import math
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

from ..errors import SchemeError

MAX_FACTOR = 128
"""Widest Sylvester matrix that is applied at once."""


def is_known(size: int) -> bool:
    """Whether ``hadamard_matrix`` can build this order; takes microseconds."""
    return _paley_order(size) is not None


def check_rotation(in_features: int, block: int, where: str) -> int:
    """Width of the blocks that ``in_features`` channels are rotated in; builds nothing.

    Args:
        block: 0 for the whole width.
        where: the layer, for the message.

    Raises:
        SchemeError: the block does not divide, or no Hadamard matrix of its order can be built here.
    """
    if block < 0 or (block and in_features % block):
        raise SchemeError(
            f"{where}: rotation_block {block} does not divide {in_features} channels; {_advice(in_features)}"
        )
    width = block or in_features
    if not is_known(width):
        raise SchemeError(f"{where}: no Hadamard matrix of order {width} can be built; {_advice(width)}")
    return width


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthonormal Hadamard matrix, (size, size), entries +-1 / sqrt(size).

    Raises:
        SchemeError: no Hadamard matrix of this order can be built.
    """
    check_rotation(size, 0, "hadamard_matrix")
    order = _paley_order(size) or 1
    signs: Tensor = torch.kron(_sylvester(size // order), _paley(order))
    return signs.to(dtype) / math.sqrt(size)


def rotate(x: Tensor, block: int) -> Tensor:
    """``x`` (..., n) with each block of ``block`` channels multiplied by ``hadamard_matrix(block)``.

    Same shape, dtype and device. 16-bit inputs are rotated in float32 and rounded once: products in their own dtype
    would round after every factor, and float16 could overflow before the division by sqrt(block).

    Raises:
        SchemeError: the block does not divide n, or no Hadamard matrix of its order can be built.
    """
    return _multiply(x, block, is_inverse=False)


def unrotate(x: Tensor, block: int) -> Tensor:
    """What ``rotate`` turns into ``x`` (..., n); otherwise as ``rotate``."""
    return _multiply(x, block, is_inverse=True)


def _multiply(x: Tensor, block: int, is_inverse: bool) -> Tensor:
    if block < 1 or x.shape[-1] % block:
        check_rotation(x.shape[-1], block or -1, "rotate")
    dtype = torch.promote_types(x.dtype, torch.float32)
    rotated = x.to(dtype)
    inner = 1
    for factor in _factors(block, dtype, x.device):
        matrix = factor.T if is_inverse else factor
        is_innermost = inner == 1
        values = rotated.reshape(-1, len(matrix)) if is_innermost else rotated.reshape(-1, len(matrix), inner)
        rotated = values @ matrix if is_innermost else matrix.T @ values
        inner *= len(matrix)
    return rotated.reshape(x.shape).to(x.dtype)


# A cache of a pure function, not state: the same arguments always give equal tensors, and nobody writes to them.
@lru_cache(maxsize=64)
def _factors(block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Matrices whose Kronecker product, last one leftmost, is ``hadamard_matrix(block)``; all but the last are +-1."""
    check_rotation(block, 0, "rotate")
    order = _paley_order(block) or 1
    exponent = (block // order).bit_length() - 1
    num_parts = -(-exponent // (MAX_FACTOR.bit_length() - 1))
    ends = [exponent * part // max(num_parts, 1) for part in range(num_parts + 1)]
    # Made while serving, they would otherwise be refused by a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        factors = [_paley(order)] if order > 1 or not num_parts else []
        factors += [_sylvester(1 << (end - start)) for start, end in pairwise(ends)]
        scaled = [factor.to(device, dtype) for factor in factors]
        scaled[-1] = scaled[-1] / math.sqrt(block)
    return tuple(scaled)


def _advice(size: int) -> str:
    largest = size & -size
    if largest == 1:
        return "an odd width cannot be rotated in blocks: switch rotation off"
    return f"choose rotation_block {largest}, the largest power of two that divides {size}, or a smaller one"


def _paley_order(size: int) -> int | None:
    """The smallest m with ``size = 2**k * m`` that Paley's constructions reach, 1 for a power of two; None: none."""
    if size < 1:
        return None
    odd = size // (size & -size)
    if odd == 1:
        return 1
    order = 4 * odd
    while order <= size:
        if _paley_field(order) is not None:
            return order
        order *= 2
    return None


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) such that the field with ``p**k`` elements gives a matrix of this order by construction I or II."""
    for size, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        field = _prime_power(size) if size % 4 == remainder else None
        if field is not None:
            return field
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with ``p**k == number``, for an odd number; None if it is not a prime power."""
    prime = next((divisor for divisor in range(3, math.isqrt(number) + 1, 2) if number % divisor == 0), number)
    exponent = 0
    while prime > 1 and number % prime == 0:
        number //= prime
        exponent += 1
    return (prime, exponent) if exponent and number == 1 else None


def _sylvester(size: int) -> Tensor:
    """(size, size) of +-1, int8, for a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    step = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(matrix) < size:
        matrix = torch.kron(matrix, step)
    return matrix


def _paley(order: int) -> Tensor:
    """(order, order) of +-1, int8, for 1 and for an order with a Paley field."""
    field = _paley_field(order)
    if order == 1 or field is None:
        return torch.ones(1, 1, dtype=torch.int8)
    character = _character_matrix(*field)
    size = len(character)
    core = torch.zeros(size + 1, size + 1, dtype=torch.int8)
    core[0, 1:] = 1
    core[1:, 0] = -1 if size % 4 == 3 else 1
    core[1:, 1:] = character
    identity = torch.eye(size + 1, dtype=torch.int8)
    if size % 4 == 3:
        return core + identity
    first = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    second = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, first) + torch.kron(identity, second)


def _character_matrix(prime: int, degree: int) -> Tensor:
    """Q[a, b] = chi(a - b) over the field with ``prime**degree`` elements: 0, 1 for a square, -1 otherwise; int8."""
    size = prime**degree
    chi = torch.zeros(size, dtype=torch.int8)
    for exponent, element in enumerate(_powers_of_generator(prime, degree)):
        chi[_number(element, prime)] = 1 - 2 * (exponent % 2)
    numbers = torch.arange(size)
    difference = torch.zeros(size, size, dtype=torch.int64)
    for place in range(degree):
        digit = numbers // prime**place % prime
        difference += (digit[:, None] - digit) % prime * prime**place
    return chi[difference]


def _powers_of_generator(prime: int, degree: int) -> list[tuple[int, ...]]:
    """1, x, x^2, .., all elements but 0, as coefficients of polynomials in x modulo a primitive polynomial.

    A monic polynomial that makes x go through all ``prime**degree - 1`` of them is primitive. Even powers are squares.
    """
    one = (1,) + (0,) * (degree - 1)
    for tail in product(range(prime), repeat=degree):
        powers, element = [one], _times_x(one, tail, prime)
        # A bijection returns to where it began; without a constant term multiplying by x is none.
        while tail[0] and element != one:
            powers.append(element)
            element = _times_x(element, tail, prime)
        if len(powers) == prime**degree - 1:
            return powers
    raise AssertionError(f"the field with {prime}**{degree} elements has a generator")


def _times_x(element: tuple[int, ...], tail: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """``element * x`` where ``x**degree = tail`` as polynomials, coefficients lowest first."""
    shifted = (0, *element[:-1])
    return tuple((low + element[-1] * high) % prime for low, high in zip(shifted, tail, strict=True))


def _number(element: tuple[int, ...], prime: int) -> int:
    return sum(digit * prime**place for place, digit in enumerate(element))
