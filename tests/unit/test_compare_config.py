"""Comparison files: what they expand to, what they refuse, and that the place of a mistake is named."""

import json
import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from models.compare.config import CompareConfig, EvaluationConfig, RecipeConfig
from models.compare.fingerprint import Fingerprints, _chosen
from models.compare.grid import GridConfig, automatic_name, expand
from models.compare.overlay import lookup, nested, overlay
from models.config import BuildConfig, CalibrationConfig, ReconstructConfig, TransformConfig
from models.errors import SchemeError
from models.scheme import ActivationScheme

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"path": "wiki.txt"}


def config(**values):
    return CompareConfig.from_dict({"checkpoint": "c", "evaluation": {"texts": [TEXT]}} | values)


def names(**values):
    return [recipe.name for recipe in config(**values).expanded()]


AXES = {
    "scheme.num_bits": st.integers(2, 8),
    "scheme.group_size": st.sampled_from([-1, 32, 64, 128]),
    "reconstruct.method": st.sampled_from(["none", "lqer", "qera-exact"]),
    "reconstruct.rank": st.integers(0, 64),
    "quantizer.use_clip_search": st.booleans(),
    "transform.flatten": st.one_of(st.none(), st.sampled_from([0.25, 0.5, 1.0])),
}
GRIDS = st.lists(st.sampled_from(sorted(AXES)), min_size=1, max_size=4, unique=True).flatmap(
    lambda chosen: st.fixed_dictionaries(
        {path: st.lists(AXES[path], min_size=1, max_size=3, unique=True) for path in chosen}
    )
)


@settings(deadline=None, max_examples=25)
@given(GRIDS)
def test_a_grid_is_every_combination_once_and_each_has_a_name_of_its_own(axes):
    recipes = config(grid=[{"axes": axes}]).expanded()
    combinations = list(product(*axes.values()))
    assert len(recipes) == len(combinations)
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    for recipe, combination in zip(recipes, combinations, strict=True):
        plain = recipe.build.to_dict()
        assert [lookup(plain, path, "test") for path in axes] == list(combination)
        rest = {path: lookup(BuildConfig().to_dict(), path, "test") for path in AXES if path not in axes}
        assert {path: lookup(plain, path, "test") for path in rest} == rest


@settings(deadline=None, max_examples=25)
@given(GRIDS)
def test_exclude_leaves_out_exactly_what_matches(axes):
    first = {path: values[0] for path, values in axes.items()}
    some_path = next(iter(axes))
    complete = [name for name, _ in expand(GridConfig(axes), {}, "test")]
    without = [name for name, _ in expand(GridConfig(axes, exclude=[first]), {}, "test")]
    assert without == complete[1:]
    kept = list(expand(GridConfig(axes, exclude=[{some_path: axes[some_path][0]}]), {}, "test"))
    assert len(kept) == len(complete) * (len(axes[some_path]) - 1) // len(axes[some_path])


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("scheme.num_bits", 4, "w4"),
        ("scheme.group_size", -1, "per-row"),
        ("scheme.group_size", 64, "g64"),
        ("reconstruct.rank", 16, "r16"),
        ("reconstruct.method", "qera-exact", "qera-exact"),
        ("reconstruct.method", "none", "no-reconstruct"),
        ("quantizer.use_clip_search", True, "clip-search"),
        ("quantizer.use_clip_search", False, "no-clip-search"),
        ("transform", {"rotation": "online", "rotation_block": 64}, "online-rotation-block64"),
        ("transform", {}, "transform-default"),
        ("transform.flatten", None, "no-flatten"),
        ("transform.flatten", 0.5, "flatten0.5"),
        ("activations", None, "no-activations"),
        ("activations", {"num_bits": 8}, "a8"),
        ("activations.clip_ratio", 0.9, "clip-ratio0.9"),
        ("attention", {"num_bits": 4}, "qkv4"),
        ("attention", None, "no-attention"),
        ("budget.target_bits", 3.5, "b3.5"),
        ("calibration.source", "data/wiki valid.txt", "data-wiki-valid.txt"),
    ],
)
def test_automatic_names_say_the_value(path, value, name):
    assert automatic_name(path, value) == name


def test_recipes_lie_over_the_base_and_grids_over_their_fixed_values():
    base = {"scheme": {"num_bits": 3, "group_size": 32}, "reconstruct": {"rank": 4}}
    made = config(
        base=base,
        recipes=[{"name": "one", "scheme": {"num_bits": 5}}],
        grid=[{"axes": {"reconstruct.rank": [8]}, "values": {"scheme": {"group_size": 128}}, "name_prefix": "wide"}],
    ).expanded()
    assert [
        (it.name, it.build.scheme.num_bits, it.build.scheme.group_size, it.build.reconstruct.rank) for it in made
    ] == [
        ("one", 5, 32, 4),
        ("wide-r8", 3, 128, 8),
    ]


def test_another_method_does_not_inherit_the_options_of_the_base():
    base = {"reconstruct": {"method": "loftq", "rank": 8, "options": {"iterations": 3}}}
    assert overlay(base, {"reconstruct": {"method": "lqer"}}) == {"reconstruct": {"method": "lqer", "rank": 8}}
    assert overlay(base, {"reconstruct": {"rank": 4}})["reconstruct"]["options"] == {"iterations": 3}
    again = overlay(base, {"reconstruct": {"method": "loftq", "options": {"x": 1}}})
    assert again["reconstruct"]["options"] == {"iterations": 3, "x": 1}
    assert base["reconstruct"]["method"] == "loftq"


def test_templates_name_recipes_by_any_setting():
    grid = {
        "axes": {"reconstruct.rank": [4, 8]},
        "name_template": "{reconstruct.method}-{scheme.num_bits}bit-{reconstruct.rank}",
    }
    assert names(grid=[grid]) == ["qera-exact-4bit-4", "qera-exact-4bit-8"]
    grouped = {"axes": {"scheme.group_size": [64, -1]}, "name_template": "g{scheme.group_size}"}
    assert names(grid=[grouped]) == ["g64", "g-1"]
    with pytest.raises(SchemeError, match=r"name_template: there is no 'scheme\.bits'"):
        names(grid=[grid | {"name_template": "{scheme.bits}"}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipes": [{"name": "a", "scheme": {"num_bits": 9}}]}, "recipe a: num_bits is 9"),
        ({"recipes": [{"name": "a", "schema": {}}]}, "recipe a: .*schema"),
        ({"recipes": [{"name": "a"}, {"name": "a", "scheme": {"num_bits": 3}}]}, "two recipes are called 'a'"),
        ({"recipes": [{"name": "a"}, {"name": "b"}]}, "recipes a and b are the same"),
        ({"recipes": [{"scheme": {"num_bits": 3}}]}, "recipe 1 has no name"),
        ({"recipes": [{"name": "dense"}]}, "cannot be called 'dense'"),
        ({"recipes": [{"name": "../a"}]}, "cannot be called '../a'"),
        ({"recipes": []}, "nothing to build"),
        ({"grid": [{"axes": {}}]}, "a grid needs axes"),
        ({"grid": [{"axes": {"scheme.num_bits": []}}]}, "'scheme.num_bits' has no values"),
        ({"grid": [{"axes": {"scheme.bits": [3]}}]}, "bits"),
        ({"grid": [{"axes": {"scheme.num_bits": [3]}, "exclude": [{"reconstruct.rank": 3}]}]}, "which are no axes"),
        ({"recipes": [{"name": "a"}], "evaluation": {}}, "nothing to measure"),
        ({"recipes": [{"name": "a"}], "evaluation": {"texts": [TEXT, TEXT]}}, "two texts are called 'wiki.txt'"),
        ({"recipes": [{"name": "a"}], "evaluation": {"texts": [{}]}}, "a text needs a path"),
        ({"recipes": [{"name": "a"}], "evaluation": {"texts": [TEXT | {"window": 1}]}}, "window 2 or more"),
        ({"recipes": [{"name": "a"}], "evaluation": {"tasks": [{"task": "piqa", "max_rows": 0}]}}, "max_rows 1"),
        ({"recipes": [{"name": "a"}], "outputs": "x"}, "outputs"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs_and_named(values, message):
    with pytest.raises(SchemeError, match=message):
        config(**values)


def test_external_rows_say_where_they_are_from():
    row = {"name": "Q4_0", "effective_bits": 4.5, "perplexity": 38.1}
    values = {"recipes": [{"name": "a"}]}
    made = config(**values, external=[row | {"source": "a paper"}, row | {"command": "llama-perplexity -m x"}])
    assert [item.mark for item in made.external_results()] == [
        "quoted from a paper",
        "measured with llama-perplexity -m x",
    ]
    assert {item.text for item in made.external_results()} == {"wiki.txt"}
    for wrong, message in (
        (row, "either source"),
        (row | {"source": "a", "command": "b"}, "either source"),
        (row | {"source": "a", "perplexity": 0.5}, "out of range"),
        (row | {"source": "a", "text": "c4"}, "no text is called 'c4'"),
    ):
        with pytest.raises(SchemeError, match=message):
            config(**values, external=[wrong])


def test_toml_and_json_say_the_same(tmp_path):
    values = {
        "checkpoint": "c",
        "evaluation": {"texts": [{"path": "a.txt", "max_windows": 3}], "tasks": [{"task": "piqa"}]},
        "grid": [{"axes": {"scheme.num_bits": [3, 4]}}],
    }
    (tmp_path / "c.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps(values), encoding="utf-8")
    read = [CompareConfig.read(tmp_path / name) for name in ("c.toml", "c.json")]
    assert read[0] == read[1]
    assert [recipe.name for recipe in read[0].expanded()] == ["w3", "w4"]
    with pytest.raises(SchemeError, match=re.escape(str(tmp_path / "none.toml"))):
        CompareConfig.read(tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("compare*.toml")), ids=lambda path: path.name)
def test_examples_are_valid(path):
    assert len(CompareConfig.read(path).expanded()) > 1


def test_nested_and_lookup_are_inverse():
    assert lookup(nested("a.b.c", 3), "a.b.c", "test") == 3
    with pytest.raises(SchemeError, match=r"there is no 'a\.x'"):
        lookup(nested("a.b", 1), "a.x", "test")


def test_statistics_are_shared_unless_activations_are_quantized_for_them() -> None:
    prints = Fingerprints("checkpoint", EvaluationConfig(), "cpu")
    plain = BuildConfig(reconstruct=ReconstructConfig("lqer", 4), calibration=CalibrationConfig(inputs="dense"))
    quantized = replace(plain, activations=ActivationScheme(num_bits=4))
    assert prints.statistics(plain) == prints.statistics(quantized)
    shrunk = replace(plain, calibration=replace(plain.calibration, shrinkage=0.5))
    assert prints.statistics(plain) == prints.statistics(shrunk)
    assert prints.recipe(RecipeConfig("a", plain)) != prints.recipe(RecipeConfig("a", shrunk))
    paired = replace(plain, objective="output"), replace(quantized, objective="output")
    assert prints.statistics(paired[0]) != prints.statistics(paired[1])
    rotated = replace(plain, transform=TransformConfig(rotation="online"))
    assert prints.statistics(plain) != prints.statistics(rotated)


def test_a_recipe_is_what_it_says_however_much_of_it_is_the_default() -> None:
    prints = Fingerprints("checkpoint", EvaluationConfig(), "cpu")
    # A setting that a later version adds to activations has its default in every earlier recipe.
    known = {"num_bits": 4, "group_size": 64}
    assert _chosen(asdict(ActivationScheme(**known)), asdict(ActivationScheme())) == known
    for name in ("activations", "attention"):
        given = [
            None,
            ActivationScheme(),
            ActivationScheme(4),
            ActivationScheme(4, 64),
            ActivationScheme(4, clip_ratio=0.9),
        ]
        recipes = [RecipeConfig("a", replace(BuildConfig(), **{name: it})) for it in given]
        assert len({prints.recipe(recipe) for recipe in recipes}) == len(given)
    chosen = _chosen(replace(BuildConfig(), activations=ActivationScheme(4, 64)).to_dict(), BuildConfig().to_dict())
    assert chosen == {"activations": known}
    assert _chosen(replace(BuildConfig(), activations=ActivationScheme()).to_dict(), BuildConfig().to_dict()) == {
        "activations": {}
    }
