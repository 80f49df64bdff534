"""Build configurations: what is refused, and that files give back what was written."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import (
    BudgetConfig,
    BuildConfig,
    CalibrationConfig,
    LayerConfig,
    QuantizerConfig,
    ReconstructConfig,
    TransformConfig,
)
from models.errors import QerveError, SchemeError
from models.scheme import (
    ACTIVATION_GROUP_SIZES,
    GROUP_SIZES,
    PER_CHANNEL,
    ActivationScheme,
    QuantScheme,
)


def schemes_of(name: str) -> st.SearchStrategy[QuantScheme]:
    return st.builds(
        QuantScheme,
        num_bits=st.just(4) if name in ("mxfp4", "nf4") else st.integers(2, 8),
        group_size=st.sampled_from(GROUP_SIZES[name]),
        is_symmetric=st.booleans(),
        format=st.just(name),
        exponent=st.sampled_from(["floor", "ceil"]),
    )


def activation_schemes_of(name: str) -> st.SearchStrategy[ActivationScheme]:
    return st.builds(
        ActivationScheme,
        num_bits=st.just(4) if name == "mxfp4" else st.integers(2, 8),
        group_size=st.sampled_from(ACTIVATION_GROUP_SIZES[name]),
        is_symmetric=st.booleans(),
        format=st.just(name),
        clip_ratio=st.floats(0, 1, exclude_min=True) if name == "int" else st.just(1.0),
    )


schemes = st.one_of([schemes_of(name) for name in GROUP_SIZES])
activation_schemes = st.one_of([activation_schemes_of(name) for name in ACTIVATION_GROUP_SIZES])
# Any text a TOML and a JSON file can hold: no lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
configs = st.builds(
    BuildConfig,
    scheme=schemes,
    activations=st.none() | activation_schemes,
    attention=st.none() | activation_schemes,
    quantizer=st.builds(
        QuantizerConfig, method=st.just("gptq"), use_clip_search=st.booleans(), use_act_order=st.booleans()
    ),
    reconstruct=st.builds(
        ReconstructConfig,
        method=texts,
        rank=st.integers(0, 4096),
        factor_dtype=st.sampled_from(["bfloat16", "float16", "float32", "int8", "mxint4"]),
        refit=st.booleans(),
        options=st.dictionaries(st.sampled_from(["iterations", "split"]), st.booleans() | st.integers(0, 9) | texts),
    ),
    transform=st.builds(
        TransformConfig,
        flatten=st.none() | st.floats(0, 1),
        permute=st.booleans(),
        rotation=st.sampled_from(["none", "online"]),
        rotation_block=st.sampled_from([0, 16, 64]),
    ),
    objective=st.sampled_from(["weight", "output"]),
    budget=st.none() | st.builds(BudgetConfig, target_bits=st.floats(2, 8), max_rank=st.integers(0, 64)),
    layers=st.dictionaries(
        st.sampled_from(["model.layers.0.mlp.up_proj", "x"]),
        st.builds(LayerConfig, num_bits=st.none() | st.integers(2, 8), rank=st.none() | st.integers(0, 9)),
    ),
    calibration=st.builds(
        CalibrationConfig,
        source=texts,
        num_sequences=st.integers(1, 10**6),
        sequence_length=st.integers(2, 10**6),
        batch_size=st.integers(1, 10**4),
        num_holdout=st.integers(0, 10**4),
        inputs=st.sampled_from(["quantized", "sequential", "dense"]),
        seed=st.integers(-(2**31), 2**31),
    ),
)

keys = st.sampled_from(["scheme", "quantizer", "reconstruct", "calibration", "num_bits", "rank", "x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60)
@given(config=configs, suffix=st.sampled_from([".toml", ".json"]))
def test_file_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, config: BuildConfig, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("config") / f"build{suffix}"
    config.write(path)
    assert BuildConfig.read(path) == config


@given(config=configs)
def test_dict_gives_back_an_equal_configuration(config: BuildConfig) -> None:
    assert BuildConfig.from_dict(config.to_dict()) == config
    assert BuildConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_written_toml_is_sectioned_toml(tmp_path: Path) -> None:
    path = tmp_path / "build.toml"
    BuildConfig(scheme=QuantScheme(num_bits=3)).write(path)
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    assert values["scheme"]["num_bits"] == 3
    assert values["reconstruct"]["method"] == "qera-exact"


def test_partial_file_keeps_the_other_defaults(tmp_path: Path) -> None:
    path = tmp_path / "build.toml"
    path.write_text('[scheme]\nnum_bits = 3\n[reconstruct]\nmethod = "lqer"\n', encoding="utf-8")
    expected = BuildConfig(scheme=QuantScheme(num_bits=3), reconstruct=ReconstructConfig(method="lqer"))
    assert BuildConfig.read(path) == expected


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"scheme": {"num_bit": 4}}, "scheme.num_bit"),
        ({"colour": "red"}, "colour"),
        ({"calibration": {"sequence_length": "long"}}, "calibration.sequence_length"),
        ({"calibration": {"inputs": "both"}}, "calibration.inputs"),
        ({"reconstruct": {"factor_dtype": "int7"}}, "reconstruct.factor_dtype"),
        ({"quantizer": "gptq"}, "quantizer"),
        ({"activations": {"bits": 4}}, "activations.bits"),
        ({"activations": {"clip_ratio": "0.9"}}, "activations.clip_ratio"),
        ({"attention": {"bits": 4}}, "attention.bits"),
        ({"budget": {}}, "budget.target_bits"),
        ({"layers": {"x": {"num_bits": "4"}}}, "layers.x.num_bits"),
        ({"reconstruct": {"rank": 1.5}}, "reconstruct.rank"),
        ({"scheme": {"is_symmetric": "perhaps"}}, "scheme.is_symmetric"),
        ({"scheme": []}, "scheme"),
        ([], "top level"),
        (None, "top level"),
    ],
)
def test_wrong_shape_is_refused_with_its_place(values: object, place: str) -> None:
    with pytest.raises(SchemeError) as caught:
        BuildConfig.from_dict(values, "build.toml")
    assert str(caught.value).startswith("build.toml: ")
    assert place in str(caught.value)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("scheme", "num_bits", 1),
        ("scheme", "num_bits", 9),
        ("scheme", "group_size", 0),
        ("scheme", "group_size", 48),
        ("scheme", "group_size", -2),
        ("reconstruct", "rank", -1),
        ("calibration", "num_sequences", 0),
        ("calibration", "sequence_length", 1),
        ("calibration", "batch_size", 0),
        ("calibration", "num_holdout", -1),
    ],
)
def test_value_out_of_range_is_refused_by_name(section: str, name: str, value: int) -> None:
    with pytest.raises(SchemeError, match=rf"{name} is {value}; (for int )?choose"):
        BuildConfig.from_dict({section: {name: value}})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("build.toml", b"[scheme"),
        ("build.toml", b"\xff\xfe\x00"),
        ("build.json", b"{"),
        ("build.json", b"\xff\xfe\x00"),
        ("build.json", b""),
    ],
)
def test_file_that_is_not_well_formed_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SchemeError, match=name):
        BuildConfig.read(path)


def test_empty_toml_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "build.toml"
    path.touch()
    assert BuildConfig.read(path) == BuildConfig()


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"absent\.toml"):
        BuildConfig.read(tmp_path / "absent.toml")


@given(values=json_values)
def test_any_json_value_validates_or_is_a_scheme_error(values: object) -> None:
    try:
        assert isinstance(BuildConfig.from_dict(values), BuildConfig)
    except QerveError as error:
        assert isinstance(error, SchemeError)


@given(scheme=schemes, num_groups=st.integers(1, 6))
def test_stored_bits_are_those_of_a_row_counted_one_by_one(scheme: QuantScheme, num_groups: int) -> None:
    scale_bits = 8 if scheme.format in ("mxint", "mxfp4") else 16
    length = 96 if scheme.group_size == PER_CHANNEL else scheme.group_size
    in_features = length if scheme.group_size == PER_CHANNEL else length * num_groups
    scheme.check(in_features, "layer")
    total = 0
    for channel in range(in_features):
        total += scheme.num_bits  # its code
        if channel % length == 0:  # the first of a group brings a scale, and a zero point as wide as a code
            total += scale_bits + (0 if scheme.is_symmetric else scheme.num_bits)
    assert scheme.num_groups(in_features) == len(range(0, in_features, length))
    assert scheme.weight_bits(in_features) == pytest.approx(total / in_features, rel=1e-12)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_largest_code_fills_its_bits(num_bits: int) -> None:
    assert bin(QuantScheme(num_bits=num_bits).max_code) == "0b" + "1" * num_bits


def test_group_that_does_not_tile_a_row_names_the_layer_and_what_fits() -> None:
    with pytest.raises(SchemeError) as caught:
        QuantScheme(group_size=128).check(576, "model.layers.3.self_attn.q_proj")
    message = str(caught.value)
    assert message.startswith("model.layers.3.self_attn.q_proj: ")
    assert "[-1, 16, 32, 64, 96, 192]" in message


@given(scheme=schemes, in_features=st.integers(1, 1024))
def test_check_passes_exactly_when_groups_tile_the_row(scheme: QuantScheme, in_features: int) -> None:
    covered = set()
    length = scheme.group_length(in_features)
    for start in range(0, in_features, length):
        covered |= set(range(start, start + length))
    if covered == set(range(in_features)):
        scheme.check(in_features, "layer")
    else:
        with pytest.raises(SchemeError):
            scheme.check(in_features, "layer")


@pytest.mark.parametrize("name", ["mxint", "mxfp4", "nf4"])
def test_only_integer_formats_have_a_zero_point(name: str) -> None:
    assert QuantScheme(4, GROUP_SIZES[name][0], is_symmetric=False, format=name).is_symmetric
    assert not QuantScheme(4, 64).is_symmetric


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": {"format": "mxfp4", "num_bits": 3, "group_size": 32}}, "num_bits is 3, but mxfp4 has 4"),
        ({"scheme": {"format": "mxint", "group_size": 64}}, r"group_size is 64; for mxint choose one of \(16, 32\)"),
        ({"activations": {"num_bits": 9}}, "activation num_bits is 9; choose 2 to 8"),
        ({"activations": {"group_size": 100}}, "activation group_size is 100; for int choose"),
        ({"activations": {"format": "mxfp4", "num_bits": 8}}, "activation num_bits is 8, but mxfp4 has 4"),
        ({"activations": {"clip_ratio": 0.0}}, "activation clip_ratio is 0.0; choose above 0, up to 1"),
        ({"activations": {"clip_ratio": 1.01}}, "activation clip_ratio is 1.01; choose above 0, up to 1"),
        ({"activations": {"clip_ratio": float("nan")}}, "clip_ratio"),
        (
            {"attention": {"format": "mxint", "group_size": 32, "clip_ratio": 0.9}},
            "clip_ratio is 0.9, but a scale of mxint is a power of two: leave it out, or choose format int",
        ),
        ({"quantizer": {"damping": -0.1}}, "damping is -0.1; choose 0 to 1"),
        ({"quantizer": {"use_act_order": True}}, "use_act_order is an option of quantizer gptq"),
        ({"transform": {"flatten": 1.5}}, "flatten is 1.5; choose 0 to 1"),
        ({"transform": {"rotation_block": 48}}, "rotation_block is 48; choose a power of two"),
        ({"transform": {"rotation": "offline", "flatten": 1.0}}, "flatten with rotation offline"),
        ({"budget": {"target_bits": 4.0, "num_bits": [1]}}, r"budget num_bits are \[1\]"),
        ({"budget": {"target_bits": 4.0, "max_rank": -1}}, "budget max_rank is -1"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_choose(values: object, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        BuildConfig.from_dict(values)


def test_activation_groups_that_do_not_tile_name_the_layer_and_what_fits() -> None:
    with pytest.raises(
        SchemeError, match=r"^model\.layers\.0\.mlp\.up_proj: activation group_size 128.*\[-1, 32, 64, 96"
    ):
        ActivationScheme(group_size=128).check(576, "model.layers.0.mlp.up_proj")


def test_a_scheme_names_its_clip_ratio_only_where_it_clips() -> None:
    assert str(ActivationScheme(4, clip_ratio=1.0)) == "INT4 asymmetric, per token"
    assert str(ActivationScheme(4, 64, True, clip_ratio=0.875)) == "INT4 symmetric, group 64, clip ratio 0.875"


def test_what_was_written_before_clip_ratios_and_attention_is_still_read() -> None:
    values = BuildConfig(activations=ActivationScheme(4)).to_dict()
    del values["attention"], values["activations"]["clip_ratio"]
    assert BuildConfig.from_dict(values) == BuildConfig(activations=ActivationScheme(4), attention=None)
    assert BuildConfig().attention is None


def test_configurations_cannot_be_changed_after_validation() -> None:
    with pytest.raises(AttributeError):
        QuantScheme().num_bits = 9  # type: ignore[misc]


@pytest.mark.parametrize("value", ["4", 4.5, True, None])
def test_values_are_not_converted_into_what_they_are_not(value):
    with pytest.raises(SchemeError, match=r"recipe\.toml: scheme\.num_bits"):
        BuildConfig.from_dict({"scheme": {"num_bits": value}}, "recipe.toml")


def test_a_value_out_of_range_names_the_file():
    with pytest.raises(SchemeError, match=r"recipe\.toml: num_bits is 9"):
        BuildConfig.from_dict({"scheme": {"num_bits": 9}}, "recipe.toml")


def test_a_value_that_is_no_plain_data_is_refused():
    with pytest.raises(SchemeError, match="plain data"):
        BuildConfig.from_dict({"scheme": object()})
