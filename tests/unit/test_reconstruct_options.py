"""Options of the methods are checked when the method is made: before any weight is read."""

import pytest

from models.config import Option, ReconstructConfig
from models.errors import SchemeError
from models.reconstruct import RECONSTRUCTORS, get_reconstructor

OPTIONS: dict[str, dict[str, Option]] = {
    "qera-exact": {"use_output_gradient": True},
    "loftq": {"iterations": 5, "is_activation_aware": True},
    "lq-lora": {"max_iterations": 3, "use_fisher": False},
    "srr": {"split": 4, "is_joint": True},
    "serq": {"saliency": "output-error"},
    "qer": {
        "merge": "shift", "shift": 5, "fraction_bits": 3, "factor_bits": 8, "threshold": 0.5,
        "initialization": "qera", "use_scales": False, "use_clips": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("method", OPTIONS)
def test_every_option_can_be_set_and_left_out(method: str) -> None:
    get_reconstructor(ReconstructConfig(method, options=OPTIONS[method]))
    get_reconstructor(ReconstructConfig(method))


@pytest.mark.parametrize("method", RECONSTRUCTORS)
def test_an_unknown_option_is_refused_with_those_that_there_are(method: str) -> None:
    known = f"choose from {', '.join(OPTIONS[method])}" if method in OPTIONS else "it takes no options"
    with pytest.raises(SchemeError, match=f"^method {method} has no option 'split_rank'; {known}$"):
        get_reconstructor(ReconstructConfig(method, options={"split_rank": 4}))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("loftq", {"iterations": 0}, "options of method loftq: iterations is 0; choose 1 or more"),
        ("loftq", {"iterations": True}, "options of method loftq: iterations: .*valid integer"),
        ("loftq", {"iterations": 2.5}, "options of method loftq: iterations: .*valid integer"),
        ("loftq", {"is_activation_aware": 1}, "options of method loftq: is_activation_aware: .*valid boolean"),
        ("loftq", {"is_activation_aware": "yes"}, "options of method loftq: is_activation_aware: .*valid boolean"),
        ("lq-lora", {"max_iterations": -1}, "options of method lq-lora: max_iterations is -1; choose 1 or more"),
        ("srr", {"split": -2}, "options of method srr: split is -2; choose 0 to the rank, or -1"),
        ("srr", {"split": float("nan")}, "options of method srr: split: "),
        ("serq", {"saliency": "absmax"}, "options of method serq: saliency: .*'scale' or 'output-error'"),
        ("qera-exact", {"use_output_gradient": 0}, "options of method qera-exact: use_output_gradient: .*boolean"),
    ],
)
def test_a_wrong_type_or_value_is_refused_by_name(method: str, options: dict[str, Option], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        get_reconstructor(ReconstructConfig(method, options=options))


def test_a_split_above_the_rank_is_refused_by_layer() -> None:
    reconstructor = get_reconstructor(ReconstructConfig("srr", rank=8, options={"split": 9}))
    with pytest.raises(
        SchemeError, match=r"model\.layers\.1\.self_attn\.q_proj: option split .* is 9, above its rank 8"
    ):
        reconstructor.check(64, 64, "model.layers.1.self_attn.q_proj")
    get_reconstructor(ReconstructConfig("srr", rank=0, options={"split": 9})).check(64, 64, "a layer left uncorrected")
