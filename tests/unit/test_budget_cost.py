"""What bits and ranks cost, against the tensors that are really stored; budgets out of reach."""

import pytest
import torch

from models.budget import check_budget, layer_choices, network_choices, stored_bits
from models.config import BudgetConfig, BuildConfig, LayerConfig, ReconstructConfig
from models.errors import SchemeError
from models.llama.config import LinearShape, LlamaConfig
from models.quant.factors import store_factors
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from models.types import LinearWeights
from tests.support.tiny_checkpoints import tiny_config

SCHEMES = [
    QuantScheme(3, 64),
    QuantScheme(4, -1, is_symmetric=True),
    QuantScheme(5, 32, format="mxint"),
    QuantScheme(4, 32, format="mxfp4"),
    QuantScheme(4, 64, format="nf4"),
]
FACTOR_DTYPES = ["bfloat16", "float32", "int8", "int4", "mxint8", "mxint6", "mxint4"]
SHAPE = LinearShape(96, 192, has_bias=False)
NETWORK = LlamaConfig.from_hf(tiny_config(hidden_size=64, intermediate_size=96), "config.json")
PATH = "model.layers.0.mlp.down_proj"


def weights(scheme, rank, factor_dtype, has_single_factor):
    generator = torch.Generator().manual_seed(0)
    codes = quantize_rtn(torch.randn(SHAPE.out_features, SHAPE.in_features, generator=generator), scheme)
    if rank == 0:
        return LinearWeights(codes)
    down = None if has_single_factor else torch.randn(rank, SHAPE.in_features, generator=generator)
    return LinearWeights(codes, store_factors(torch.randn(SHAPE.out_features, rank), down, factor_dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize("has_single_factor", [False, True])
@pytest.mark.parametrize("rank", [0, 32])
def test_the_price_is_that_of_the_stored_layer(scheme, factor_dtype, has_single_factor, rank):
    price = stored_bits(scheme, SHAPE, rank, factor_dtype, has_single_factor=has_single_factor)
    stored = weights(scheme, rank, factor_dtype, has_single_factor)
    assert price == pytest.approx(stored.effective_bits * SHAPE.out_features * SHAPE.in_features, rel=1e-12)


def budget_config(target, **changes):
    budget = BudgetConfig(target, **{name: changes.pop(name) for name in ("num_bits", "max_rank") if name in changes})
    return BuildConfig(scheme=changes.pop("scheme", QuantScheme(4, 32)), budget=budget, **changes)


def offered(config, path=PATH):
    shape = NETWORK.linear_shapes()[path]
    return {(it.scheme.num_bits, it.rank) for it in layer_choices(config, path, shape)}


def test_every_width_is_offered_with_every_rank():
    ranks = {0, 4, 8, 12, 16, 24, 32}
    assert offered(budget_config(4.0, num_bits=(3, 4), max_rank=32)) == {(w, r) for w in (3, 4) for r in ranks}


def test_a_largest_rank_that_is_no_multiple_is_offered_too():
    assert offered(budget_config(4.0, num_bits=(4,), max_rank=6)) == {(4, 0), (4, 4), (4, 6)}


def test_ranks_above_the_smaller_dimension_are_left_out():
    assert max(rank for _, rank in offered(budget_config(4.0, max_rank=512))) == 64


@pytest.mark.parametrize("method", ["none", "rtn"])
def test_a_method_without_correction_is_offered_widths_only(method):
    config = budget_config(4.0, num_bits=(3, 4), reconstruct=ReconstructConfig(method=method))
    assert offered(config) == {(3, 0), (4, 0)}


def test_exceptions_of_a_layer_stay_as_they_are():
    own = {PATH: LayerConfig(num_bits=8, rank=5), "model.layers.1.mlp.up_proj": LayerConfig(group_size=64)}
    config = budget_config(5.0, num_bits=(3, 4), max_rank=4, layers=own)
    assert offered(config) == {(8, 5)}
    other = "model.layers.1.mlp.up_proj"
    schemes = [it.scheme for it in layer_choices(config, other, NETWORK.linear_shapes()[other])]
    assert {scheme.group_size for scheme in schemes} == {64}


def test_without_a_budget_there_is_one_choice():
    config = BuildConfig(scheme=QuantScheme(3, 32), reconstruct=ReconstructConfig(rank=7))
    assert offered(config) == {(3, 7)}


@pytest.mark.parametrize("name", ["mxfp4", "nf4"])
def test_a_format_of_one_width_keeps_it(name):
    config = budget_config(5.0, scheme=QuantScheme(4, 32, format=name), max_rank=8)
    assert offered(config) == {(4, 0), (4, 4), (4, 8)}


def test_a_format_whose_width_is_not_offered_is_refused():
    config = budget_config(5.0, scheme=QuantScheme(4, 32, format="nf4"), num_bits=(3, 5))
    with pytest.raises(SchemeError, match="nf4 has 4 bits"):
        check_budget(config, NETWORK)


def test_the_ends_of_the_reachable_range_are_accepted_and_what_lies_beyond_is_refused():
    """Widths 2 and 3 without a correction on groups of 32: 2 + 18/32 and 3 + 19/32 bits everywhere."""
    for target in (2.5625, 3.0, 3.59375):
        check_budget(budget_config(target, num_bits=(2, 3), max_rank=0), NETWORK)
    with pytest.raises(SchemeError, match=r"2\.5 is out of reach.*2\.562 to 3\.594.*choose more"):
        check_budget(budget_config(2.5, num_bits=(2, 3), max_rank=0), NETWORK)
    with pytest.raises(SchemeError, match=r"3\.6 is out of reach.*2\.562 to 3\.594.*choose less"):
        check_budget(budget_config(3.6, num_bits=(2, 3), max_rank=0), NETWORK)


def test_the_range_is_that_of_the_costliest_choices():
    config = budget_config(100.0, num_bits=(2, 8), max_rank=16)
    shapes = NETWORK.linear_shapes()
    most = sum(weights_bits(QuantScheme(8, 32), shape, rank=16) for shape in shapes.values()) / sum(
        shape.out_features * shape.in_features for shape in shapes.values()
    )
    with pytest.raises(SchemeError, match=f"to {most:.3f}"):
        check_budget(config, NETWORK)


def weights_bits(scheme, shape, rank):
    """By hand: codes, scale and zero point per group, bfloat16 factors."""
    per_group = scheme.num_bits * 32 + 16 + scheme.num_bits
    return shape.out_features * shape.in_features // 32 * per_group + 16 * rank * (
        shape.out_features + shape.in_features
    )


def test_layers_of_one_kind_are_worked_out_once():
    own = {PATH: LayerConfig(rank=8)}
    choices = network_choices(budget_config(4.5, layers=own), NETWORK)
    assert list(choices) == list(NETWORK.linear_shapes())
    assert len({id(offered) for offered in choices.values()}) < len(choices)
    for path, shape in NETWORK.linear_shapes().items():
        assert choices[path] == layer_choices(budget_config(4.5, layers=own), path, shape)
