"""The words for a configuration in tables and figures."""

import pytest

from models.report.labels import method_label, number_format, recipe_label
from tests.support.comparisons import build


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "INT4 g64, rtn, qera-exact r8"),
        ({"method": "none"}, "INT4 g64, rtn, no correction"),
        (
            {
                "quantizer": {"method": "gptq", "use_clip_search": True},
                "transform": {"rotation": "online", "rotation_block": 64},
                "activations": {"num_bits": 8},
            },
            "INT4 g64, A INT8 per token, gptq clip, online Hadamard 64, qera-exact r8",
        ),
        (
            {"activations": {"num_bits": 4, "clip_ratio": 0.9}, "attention": {"num_bits": 4, "group_size": 64}},
            "INT4 g64, A INT4 per token clip 0.9, QKV INT4 g64, rtn, qera-exact r8",
        ),
        ({"transform": {"flatten": 0.5}, "objective": "output"}, "INT4 g64, rtn, flatten 0.5, output objective, "
            "qera-exact r8"),
        ({"vocabulary": {"head_bits": 4}}, "INT4 g64, rtn, head 4 bits, qera-exact r8"),
        ({"vocabulary": {"head_bits": 8, "embedding_bits": 8}}, "INT4 g64, rtn, head 8 bits, embedding 8 bits, "
            "qera-exact r8"),
        ({"budget": {"target_bits": 3.5}}, "INT4 g64, rtn, budget 3.5 bits, qera-exact r8"),
    ],
)  # fmt: skip
def test_a_label_says_what_matters(settings, label):
    assert recipe_label(build(**settings)) == label


def test_formats_are_named_as_the_field_names_them():
    assert number_format({"format": "mxint", "num_bits": 4, "group_size": 32}) == "MXINT4 g32"
    assert number_format({"format": "nf4", "num_bits": 4, "group_size": 64}) == "NF4 g64"
    assert number_format({"num_bits": 8, "group_size": -1, "is_symmetric": True}) == "INT8 sym per row"


def test_methods_are_grouped_whatever_their_sizes():
    assert method_label(build(num_bits=3, rank=4)) == method_label(build(num_bits=4, rank=64)) == "rtn + qera-exact"
