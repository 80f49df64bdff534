"""The choice per layer, against exhaustive search and against the Lagrangian bound."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.budget import Option, allocate
from models.errors import CalibrationError, SchemeError

layers_of_options = st.lists(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 200)).map(lambda pair: Option(4, 0, float(pair[0]), pair[1] / 8)),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=4,
).map(lambda layers: {f"layer{index}": options for index, options in enumerate(layers)})


def totals(chosen):
    return sum(it.stored_bits for it in chosen.values()), sum(it.loss for it in chosen.values())


def cheapest(options):
    return sum(min(it.stored_bits for it in offered) for offered in options.values())


def best_by_exhaustion(options, budget):
    combinations = itertools.product(*options.values())
    fitting = [combo for combo in combinations if sum(it.stored_bits for it in combo) <= budget]
    return min(sum(it.loss for it in combo) for combo in fitting)


def largest_step(options):
    """The most that any one move between two options of a layer removes."""
    return max(max(it.loss for it in offered) - min(it.loss for it in offered) for offered in options.values())


@given(layers_of_options, st.integers(0, 80))
def test_the_choice_fits_and_is_within_one_step_of_the_best(options, extra):
    budget = cheapest(options) + extra
    bits, loss = totals(allocate(options, budget))
    best = best_by_exhaustion(options, budget)
    assert bits <= budget
    assert best <= loss <= best + largest_step(options)


@given(layers_of_options, st.integers(0, 400))
def test_where_a_price_per_bit_gives_the_budget_nothing_is_better(options, price):
    """Minimising loss + price * bits layer by layer is optimal for the bits that it comes to: so must the choice be."""
    price /= 64
    lagrangian = [
        min(offered, key=lambda it: (it.loss + price * it.stored_bits, it.stored_bits)) for offered in options.values()
    ]
    budget = sum(it.stored_bits for it in lagrangian)
    _, loss = totals(allocate(options, budget))
    assert loss == pytest.approx(best_by_exhaustion(options, budget), abs=1e-9)
    assert loss == pytest.approx(sum(it.loss for it in lagrangian), abs=1e-9)


@given(layers_of_options, st.integers(0, 60), st.integers(0, 30))
def test_a_larger_budget_never_loses_more(options, extra, more):
    least = cheapest(options)
    assert totals(allocate(options, least + extra + more))[1] <= totals(allocate(options, least + extra))[1] + 1e-9


@given(layers_of_options)
def test_with_bits_to_spare_every_layer_loses_least(options):
    chosen = allocate(options, 1e6)
    assert all(chosen[layer].loss == min(it.loss for it in offered) for layer, offered in options.items())


@given(layers_of_options, st.integers(0, 80), st.randoms())
def test_the_order_in_which_options_are_listed_does_not_matter(options, extra, random):
    budget = cheapest(options) + extra
    shuffled = {layer: random.sample(offered, len(offered)) for layer, offered in options.items()}
    assert allocate(options, budget) == allocate(shuffled, budget)


def test_equal_layers_are_served_in_the_order_of_their_names():
    offered = [Option(2, 0, 10.0, 4.0), Option(4, 0, 20.0, 1.0)]
    chosen = allocate({"b": offered, "a": offered}, 30.0)
    assert (chosen["a"].num_bits, chosen["b"].num_bits) == (4, 2)


def test_a_budget_that_is_met_exactly_is_met_whatever_the_order_of_summation():
    sizes = [0.1 * index for index in range(1, 40)]
    options = {f"{index:02}": [Option(4, 0, size, 1.0)] for index, size in enumerate(sizes)}
    assert len(allocate(options, sum(reversed(sizes)))) == len(sizes)


def test_a_budget_below_the_cheapest_options_is_refused():
    with pytest.raises(SchemeError, match="raise target_bits"):
        allocate({"a": [Option(2, 0, 10.0, 1.0)]}, 9.0)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_layer(loss):
    with pytest.raises(CalibrationError, match="middle"):
        allocate({"first": [Option(2, 0, 1.0, 1.0)], "middle": [Option(2, 0, 1.0, loss)]}, 10.0)
