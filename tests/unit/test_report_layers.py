"""The page inside an artifact: small, complete in itself, and true to the manifest."""

import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from models.artifact.format import Manifest, TensorRecord
from models.artifact.record import LinearRecord
from models.config import BuildConfig
from models.report.layers import artifact_report
from models.report.svg import heatmap, line_chart, log_ticks
from models.scheme import QuantScheme

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
               "mlp.up_proj", "mlp.down_proj")  # fmt: skip

TENSOR = TensorRecord.model_construct(dtype="BF16", shape=(320, 128))


def record(weight_error, output_error, rank=0):
    return LinearRecord.model_construct(
        scheme=QuantScheme(),
        in_features=128,
        out_features=64,
        rank=rank,
        lora_form="two-factor" if rank else "none",
        factor_dtype="bfloat16" if rank else None,
        relative_weight_error=weight_error,
        relative_output_error=output_error,
        effective_bits=4.3125 + rank / 8,
    )


def manifest(num_layers=2, is_calibrated=True, source="corpus.txt"):
    linears = {
        f"model.layers.{depth}.{name}": record(
            0.1 + 0.01 * number, (0.01 + 0.02 * depth + 0.001 * number) if is_calibrated else None, rank=number % 2
        )
        for depth in range(num_layers)
        for number, name in enumerate(PROJECTIONS)
    }
    return Manifest.model_construct(
        format="qerve-1",
        qerve_version="0.1.0",
        build=BuildConfig.from_dict({"calibration": {"source": source}}),
        checkpoint_fingerprint="ab" * 32,
        linears=linears,
        vocabulary={},
        tensors={"model.embed_tokens.weight": TENSOR},
        component_bytes={"packed": 1 << 20, "scale": 1 << 18, "lora_up": 0},
        effective_bits=4.4,
        dense_bytes=1 << 24,
        evaluation={"dense_perplexity": 20.0, "quantized_perplexity": 23.456789},
    )


def svgs(page):
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def test_the_page_has_no_scripts_and_loads_nothing():
    page = artifact_report(manifest()).decode()
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", page)
    assert "default-src 'none'" in page


def test_every_layer_is_a_cell_that_says_its_figures():
    records = manifest()
    _lines, cells = svgs(artifact_report(records).decode())
    titles = [rect.find("title").text for rect in cells.findall("rect")]
    expected = {
        f"{path.split('.')[2]} {path.rsplit('.', 1)[1]}: output {item.relative_output_error:.4f}, weight "
        f"{item.relative_weight_error:.4f}, 4 bits" + (f", rank {item.rank}" if item.rank else "")
        for path, item in records.linears.items()
    }
    assert len(titles) == len(records.linears)
    assert set(titles) == expected


def test_projections_are_summed_up_by_root_mean_square():
    page = artifact_report(manifest()).decode()
    outputs = [0.01 + 0.006, 0.03 + 0.006]
    row = re.search(r"<tr><td>down_proj</td>(.*?)</tr>", page).group(1)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[:3] == ["4.312", "0.1600", f"{math.sqrt(sum(x * x for x in outputs) / 2):.4f}"]
    assert cells[3].startswith("1 down_proj")


def test_an_uncalibrated_build_is_drawn_by_its_weight_errors():
    page = artifact_report(manifest(is_calibrated=False, source="none")).decode()
    assert "Relative weight error by depth" in page
    assert "output 0" not in page
    assert "<dd>none</dd>" in page


def test_the_head_says_what_was_built_and_measured():
    page = unescape(artifact_report(manifest()).decode())
    for expected in ("INT4 g64", "4.400", "packed 1.0 MiB, scale 0.2 MiB", "corpus.txt", "23.4568", "ab" * 32):
        assert expected in page
    assert "lora_up 0" not in page


def test_a_network_of_eighty_layers_stays_below_100_kilobytes():
    assert len(artifact_report(manifest(num_layers=80))) < 100_000


def test_equal_manifests_give_equal_bytes_and_names_cannot_become_markup():
    assert artifact_report(manifest()) == artifact_report(manifest())
    assert b"<b>x" not in artifact_report(manifest(source="<b>x.txt"))


def test_points_lie_where_their_logarithm_is():
    chart = line_chart({"a": [(0, 0.1), (1, 1.0), (2, 10.0)], "b": [(0, 0.0), (2, 1.0)]})
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in chart.lines[0].points.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1 > y2
    assert chart.lines[1].points == f"{x2:.1f},{y1:.1f}"
    (tick,) = [tick for tick in chart.y_ticks if tick.text == "1"]
    assert tick.position == pytest.approx(y1, abs=0.2)
    assert all(0 <= y <= chart.height for y in (y0, y2))


def test_larger_errors_are_stronger_and_no_error_is_blank():
    drawn = heatmap({"a": [(0, 0.0, "none"), (1, 0.01, "small"), (2, 0.5, "large")]})
    strengths = [square.strength for square in drawn.squares]
    assert strengths[0] == 0.0 < strengths[1] < strengths[2] <= 1.0
    assert (drawn.least, drawn.largest) == (0.01, 0.5)


def test_drawings_of_nothing_are_possible():
    assert line_chart({"a": []}).lines[0].points == ""
    assert heatmap({"a": [(0, 0.0, "x")]}).squares[0].strength == 0.0


def test_ticks_are_one_two_five_times_powers_of_ten():
    assert log_ticks(-1.0, 0.35) == [0.1, 0.2, 0.5, 1.0, 2.0]
