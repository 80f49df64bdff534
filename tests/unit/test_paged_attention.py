"""Attention over the paged cache, in Triton's interpreter and in torch, against a loop in float64."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kernels.paged import PagedAttention, TorchPagedAttention
from models.kernels.triton.environment import TritonEnvironment
from tests.support.paged_steps import PagedCase, paged_case

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    (reason := TritonEnvironment.read().why_not(CPU)) is not None or not TritonEnvironment.read().is_interpreting,
    reason=str(reason),
)


def triton_kernel(num_splits: int, min_split_tokens: int = 16) -> PagedAttention:
    from models.kernels.triton.paged import TritonPagedAttention

    return TritonPagedAttention(num_splits, min_split_tokens)


def wanted(case: PagedCase, window: int | None) -> Tensor:
    """Row by row and head by head in float64."""
    expected = torch.zeros(case.query.shape, dtype=torch.float64)
    group = case.query.shape[1] // case.layer.keys.shape[1]
    rows = case.rows
    starts, counts, contexts = (it.tolist() for it in (rows.row_starts, rows.num_rows, rows.context_lens))
    for start, count, context, (keys, values) in zip(starts, counts, contexts, case.dense, strict=True):
        for offset in range(count):
            last = context - count + offset
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(case.query.shape[1]):
                query = case.query[start + offset, head].double()
                scores = keys[first : last + 1, head // group] @ query / math.sqrt(len(query))
                expected[start + offset, head] = scores.softmax(0) @ values[first : last + 1, head // group]
    return expected


def bound(case: PagedCase, expected: Tensor) -> Tensor:
    """What rounding allows, with every error at its worst.

    Scores are float32 sums over channels; an error in them changes every weight by its exponential. Weights, 8-bit
    values and the result are rounded to the queries' type (Triton's interpreter cuts bfloat16 off instead); sums are
    float32.
    """
    unit, single = torch.finfo(case.query.dtype).eps, torch.finfo(SINGLE).eps
    channels = case.query.shape[2]
    longest_query = float(case.query.double().norm(dim=-1).max())
    longest_key = max(float(keys.norm(dim=-1).max()) for keys, _ in case.dense)
    largest_value = max(float(values.abs().max()) for _, values in case.dense)
    score_error = (channels + 8) * single * longest_query * longest_key / math.sqrt(channels)
    of_sums = (max(case.rows.context_lens.tolist()) + 64) * single
    return largest_value * (math.expm1(2 * score_error) + 2 * unit + of_sums) + unit * expected.abs()


def check(kernel: PagedAttention, case: PagedCase, window: int | None = None) -> None:
    output = torch.full_like(case.query, float("nan"))
    kernel(case.query, case.layer, case.rows, window, output)
    expected = wanted(case, window)
    error = (output.double() - expected).abs()
    assert bool((error <= bound(case, expected)).all()), float(error.max())


@needs_triton
@pytest.mark.parametrize(
    ("contexts", "options", "num_splits", "window"),
    [
        ((1, 17, 300), {"group": 3, "kv_heads": 2, "dtype": SINGLE}, 1, None),
        ((16, 129), {"group": 4, "kv_heads": 2, "dtype": BFLOAT, "head_dim": 128}, 2, None),
        ((1, 300), {"group": 8, "dtype": HALF}, 8, None),
        ((40, 33), {"group": 1, "kv_heads": 3, "dtype": SINGLE, "head_dim": 80}, 2, None),
        ((300, 5), {"group": 3, "dtype": HALF}, 8, 33),
        ((64, 200), {"group": 4, "dtype": SINGLE, "head_dim": 8}, 1, 1),
        ((1, 170), {"group": 3, "dtype": HALF, "is_int8": True, "spread": 1e-3}, 2, None),
        ((90, 16), {"group": 8, "dtype": BFLOAT, "is_int8": True}, 8, 50),
        ((77,), {"group": 1, "dtype": SINGLE, "is_int8": True, "head_dim": 128}, 1, None),
    ],
)
def test_the_kernel_computes_attention_within_what_rounding_allows(contexts, options, num_splits, window) -> None:
    check(triton_kernel(num_splits), paged_case(contexts, [1] * len(contexts), **options), window)


@needs_triton
@pytest.mark.parametrize(("num_splits", "window"), [(1, None), (4, 20)])
def test_the_rows_of_a_draft_each_see_what_is_before_them(num_splits, window) -> None:
    case = paged_case((4, 90, 31), (4, 1, 3), group=3)
    check(triton_kernel(num_splits), case, window)


@needs_triton
def test_what_a_sequence_gets_does_not_depend_on_company() -> None:
    """Bit for bit: how a context is cut follows from its own length."""
    case = paged_case((50, 120, 9), (1, 1, 1), group=2)
    together = torch.empty_like(case.query)
    kernel = triton_kernel(4)
    kernel(case.query, case.layer, case.rows, None, together)
    rows = case.rows
    alone = torch.empty_like(case.query)
    for index in range(3):
        of_one = slice(index, index + 1)
        lengths = (rows.row_starts[of_one], rows.num_rows[of_one], rows.context_lens[of_one])
        kernel(case.query, case.layer, type(rows)(*lengths, rows.block_tables[of_one], 1), None, alone)
    assert torch.equal(together, alone)


@needs_triton
def test_what_is_not_finite_in_a_context_shows() -> None:
    case = paged_case((40, 40), (1, 1))
    case.layer.keys[int(case.rows.block_tables[1, 0]) * 16, 0, 0] = float("nan")
    for num_splits in (1, 4):
        output = torch.zeros_like(case.query)
        triton_kernel(num_splits)(case.query, case.layer, case.rows, None, output)
        assert output[0].isfinite().all()
        assert output[1].isnan().all()


@needs_triton
def test_splits_are_as_many_as_keep_the_card_busy() -> None:
    from models.kernels.triton.paged import MAX_SPLITS, splits_for

    assert [splits_for(132, kv_heads) for kv_heads in (1, 8, 32, 128, 264)] == [MAX_SPLITS, MAX_SPLITS, 16, 4, 1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_specification_in_torch_computes_attention(data: st.DataObject) -> None:
    contexts = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    num_rows = [data.draw(st.integers(1, min(8, context))) for context in contexts]
    case = paged_case(
        contexts,
        num_rows,
        group=data.draw(st.sampled_from((1, 3))),
        kv_heads=data.draw(st.integers(1, 2)),
        head_dim=8,
        dtype=data.draw(st.sampled_from((SINGLE, HALF, BFLOAT))),
        is_int8=data.draw(st.booleans()),
    )
    check(TorchPagedAttention(), case, data.draw(st.none() | st.integers(1, 40)))


@needs_triton
def test_the_kernel_fits_an_h100_without_spills(tmp_path: Path) -> None:
    """One shape of heads; ``test_triton_compile`` has all of them for every card, among the slow tests."""
    from tests.unit.test_triton_compile import assert_fit, compiled

    found = compiled(90, "attention, 3 heads of 64", folder=tmp_path)
    assert len(found) == 1
    assert_fit(found, 90)
