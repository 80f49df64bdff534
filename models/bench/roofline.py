"""Bytes and operations of one quantized linear layer with a low-rank term, fused and not, and the time they need.

    y = x Wq^T + (x A^T) B^T        x (M, K), Wq (N, K) codes, A (R, K), B (N, R)

Fused is two kernels: the first quantizes x where the scheme says so and forms x A^T on its way, the second adds the
term before it writes y. Unfused are the plain product, two thin ones and a sum, each of which reads its operands from
memory and writes its result there: x and y cross the memory again. Caches are not modelled but for this: a kernel reads
each operand once. A kernel takes as long as the scarcer of memory and tensor cores; launches are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .cards import Card

BATCH_SIZES = (1, 8, 16, 64, 512, 4096)
RANK = 32
_SCALE_BITS = 16
_HALF = 2
"""Bytes of an activation."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear layer of a network: ``name`` as in ``network``; weight (out_features, in_features).

    num_parts: layers that it joins because they share an input; each has low-rank factors of its own
    """

    network: str
    name: str
    out_features: int
    in_features: int
    num_parts: int = 1


@dataclass(frozen=True, slots=True)
class Scheme:
    """Bits of a code, codes that share a scale (0: there are none), bits of an activation inside the product."""

    weight_bits: int
    group_size: int
    activation_bits: int

    @property
    def name(self) -> str:
        """As the field writes it: W4A16."""
        return f"W{self.weight_bits}A{self.activation_bits}"


W4A16, W4A8, W8A8 = Scheme(4, 64, 16), Scheme(4, 64, 8), Scheme(8, 64, 8)
SCHEMES = (W4A16, W4A8, W8A8)


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes moved, and operations of the tensor cores in 16 and in 8 bits; a multiply-add is two."""

    num_bytes: float
    operations16: float = 0.0
    operations8: float = 0.0

    @property
    def operations(self) -> float:
        """Of both kinds."""
        return self.operations16 + self.operations8

    def seconds(self, card: Card) -> float:
        """The least time on ``card``."""
        return max(self.num_bytes / card.bandwidth, self.operations16 / card.bf16 + self.operations8 / card.int8)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer on ``num_rows`` inputs; ``rank`` 0: no low-rank term.

    factor_bits: 16, or 8 with one 16-bit scale per component
    """

    shape: Shape
    scheme: Scheme
    num_rows: int
    rank: int = RANK
    factor_bits: int = 16

    @property
    def weight_bytes(self) -> float:
        """Codes and scales: the bytes of the quantized layer."""
        scheme = self.scheme
        bits = scheme.weight_bits + (_SCALE_BITS / scheme.group_size if scheme.group_size else 0)
        return self.shape.out_features * self.shape.in_features * bits / 8

    @property
    def factor_bytes(self) -> float:
        """Both factors."""
        return self._up_bytes + self._down_bytes

    @property
    def factor_share(self) -> float:
        """Factors, as a share of the quantized layer: what fusing leaves of the term's cost for few inputs."""
        return self.factor_bytes / self.weight_bytes

    @property
    def plain(self) -> list[Cost]:
        """The kernels without the low-rank term."""
        m, n, k = self.num_rows, self.shape.out_features, self.shape.in_features
        is_integer = self.scheme.activation_bits < 16
        operations = 2.0 * m * n * k
        width = 1 if is_integer else _HALF
        product = Cost(
            self.weight_bytes + m * k * width + m * n * _HALF,
            0.0 if is_integer else operations,
            operations if is_integer else 0.0,
        )
        rounding = Cost(m * k * (_HALF + 1) + m * 4)
        return [rounding, product] if is_integer else [product]

    @property
    def fused(self) -> list[Cost]:
        """The kernels with the term inside them: factors, x A^T written and read, and the operations come on top."""
        if not self.rank:
            return self.plain
        m, n, k = self.num_rows, self.shape.out_features, self.shape.in_features
        reduced = m * self._num_components * _HALF
        down = Cost(self._down_bytes + reduced, 2.0 * m * self._num_components * k)
        up = Cost(self._up_bytes + reduced, 2.0 * m * self.rank * n)
        *first, product = self.plain
        if first:
            return [_together(first[0], down), _together(product, up)]
        return [_together(_together(product, down), up)]

    @property
    def unfused(self) -> list[Cost]:
        """The plain kernels, two thin products and a sum."""
        if not self.rank:
            return self.plain
        m, n, k = self.num_rows, self.shape.out_features, self.shape.in_features
        reduced = m * self._num_components * _HALF
        down = Cost(self._down_bytes + m * k * _HALF + reduced, 2.0 * m * self._num_components * k)
        up = Cost(self._up_bytes + reduced + m * n * _HALF, 2.0 * m * self.rank * n)
        total = Cost(3.0 * m * n * _HALF)
        return [*self.plain, down, up, total]

    @property
    def _num_components(self) -> int:
        """Of all parts together."""
        return self.rank * self.shape.num_parts

    @property
    def _down_bytes(self) -> float:
        return self._num_components * (self.shape.in_features * self.factor_bits + self._component_bits) / 8

    @property
    def _up_bytes(self) -> float:
        return (
            self.rank * self.shape.out_features * self.factor_bits + self._num_components * self._component_bits
        ) / 8

    @property
    def _component_bits(self) -> int:
        """Of the scale that the components of 8-bit factors have."""
        return _SCALE_BITS if self.factor_bits < 16 else 0


def seconds(kernels: list[Cost], card: Card) -> float:
    """The least time of ``kernels`` one after the other."""
    return sum(kernel.seconds(card) for kernel in kernels)


def num_bytes(kernels: list[Cost]) -> float:
    """Of all ``kernels``."""
    return sum(kernel.num_bytes for kernel in kernels)


def operations(kernels: list[Cost]) -> float:
    """Of all ``kernels``."""
    return sum(kernel.operations for kernel in kernels)


def _together(first: Cost, second: Cost) -> Cost:
    return Cost(
        first.num_bytes + second.num_bytes,
        first.operations16 + second.operations16,
        first.operations8 + second.operations8,
    )


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Widths of a published network."""

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128

    def shapes(self) -> Iterator[Shape]:
        """Linear layers of a decoder layer one by one, then those that share an input as one matrix."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, queries),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "qkv": (queries + 2 * keys, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
        }
        for name, (rows, columns) in sizes.items():
            yield Shape(self.name, name, rows, columns, {"qkv": 3, "gate_up": 2}.get(name, 1))


NETWORKS = (
    NetworkShape("LLaMA-2-7B", 4096, 11008, 32, 32),
    NetworkShape("LLaMA-3-8B", 4096, 14336, 32, 8),
    NetworkShape("LLaMA-3-70B", 8192, 28672, 64, 8),
)
JOINED = ("qkv", "o", "gate_up", "down")
"""The layers as they are served: those that share an input are one matrix."""


def network_shapes(names: tuple[str, ...] | None = None) -> list[Shape]:
    """Layers of all ``NETWORKS``; ``names``: only these."""
    shapes = (shape for network in NETWORKS for shape in network.shapes())
    return [shape for shape in shapes if names is None or shape.name in names]
