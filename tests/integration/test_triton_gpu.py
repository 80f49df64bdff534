"""What only a GPU proves of the Triton layers: real sizes, the same bits on every run, calls in a CUDA graph."""

from itertools import product

import pytest
import torch

from models.kernels import get_backends
from models.kernels.base import LinearSpec, select_backend
from models.kernels.triton.environment import TritonEnvironment
from models.scheme import QuantScheme
from models.types import RowRanks
from tests.support.linear_oracle import random_layer
from tests.support.triton_oracle import assert_bounded, bounded_output

CUDA = torch.device("cuda")
OBSTACLE = TritonEnvironment.read().why_not(CUDA)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(OBSTACLE is not None, reason=f"triton {OBSTACLE}")]
SCHEMES = (
    *(QuantScheme(num_bits, size, symmetric)
      for num_bits, size, symmetric in product((2, 3, 4, 8), (-1, 64, 128), (False, True))),
    QuantScheme(5, 64),
    QuantScheme(4, 96),
    QuantScheme(4, 16, format="mxint"),
    QuantScheme(4, 32, format="mxfp4"),
    QuantScheme(4, 64, format="nf4"),
)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_scheme_in_every_regime(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weights = random_layer(scheme, (1032, 1344), 32, "scale order", has_bias=True)
    (backend,) = get_backends("triton")
    layer = backend.prepare(weights, CUDA, dtype)
    for num_rows in (1, 3, 16, 33, 130, 700):
        x = torch.randn(num_rows, 1344).to(dtype)
        assert_bounded(layer(x.to(CUDA)), bounded_output(weights, x), dtype)


@pytest.mark.parametrize(("variant", "rank"), [("", 0), ("", 8), ("", 64), ("", 256), ("serq", 64)])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336), (4097, 4096)])
def test_layers_of_an_8b_network(shape: tuple[int, int], variant: str, rank: int) -> None:
    weights = random_layer(QuantScheme(4, 64), shape, rank, variant)
    (backend,) = get_backends("triton")
    layer = backend.prepare(weights, CUDA, torch.bfloat16)
    for num_rows in (1, 8, 64, 257):
        x = torch.randn(num_rows, shape[1]).bfloat16()
        ranks = RowRanks(torch.arange(num_rows) % (rank + 1), rank)
        found, again = (layer(x.to(CUDA), RowRanks(ranks.per_row.to(CUDA), rank)) for _ in range(2))
        assert_bounded(found, bounded_output(weights, x, ranks), torch.bfloat16)
        assert torch.equal(found, again)


@pytest.mark.parametrize("num_rows", [1, 16, 300])
def test_a_call_in_a_cuda_graph_reads_what_its_buffers_hold_then(num_rows: int) -> None:
    weights = random_layer(QuantScheme(4, 64), (1024, 1024), 32, "scale order", has_bias=True)
    (backend,) = get_backends("triton")
    layer = backend.prepare(weights, CUDA, torch.bfloat16)
    x = torch.randn(num_rows, 1024, device=CUDA).bfloat16()
    ranks = RowRanks(torch.full((num_rows,), 32, device=CUDA), 32)
    layer(x, ranks)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(x, ranks)
    other = torch.randn_like(x)
    x.copy_(other)
    ranks.per_row.fill_(5)
    graph.replay()
    assert torch.equal(output, layer(other, ranks))


def test_the_backend_is_the_first_choice_on_a_gpu() -> None:
    weights = random_layer(QuantScheme(4, 64), (64, 128), 8)
    selection = select_backend(LinearSpec.of(weights, CUDA, torch.bfloat16), get_backends(), "here")
    assert selection.backend.name == "triton"
    assert [name for name, _ in selection.passed_over] == ["native"]
