"""Comparisons made up of numbers, for tests of the report; nothing is built for them."""

import math

from models.config import BuildConfig
from models.report.result import (
    DENSE,
    Comparison,
    ExternalResult,
    LayerScore,
    RecipeResult,
    Spectrum,
    TaskScore,
    TextScore,
)

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def build(num_bits=4, method="qera-exact", rank=8, **changes):
    values = {"scheme": {"num_bits": num_bits}, "reconstruct": {"method": method, "rank": rank}}
    return BuildConfig.from_dict(values | changes).to_dict()


def layers(error, num_layers=4, num_bits=4, rank=8):
    return {
        f"model.layers.{depth}.{projection}": LayerScore(
            format="int",
            num_bits=num_bits,
            group_size=64,
            rank=rank,
            effective_bits=num_bits + 0.3125,
            weight_error=2 * error,
            output_error=error * (1 + depth / 10),
        )
        for depth in range(num_layers)
        for projection in PROJECTIONS
    }


def recipe(name, bits, perplexity, *, error=0.05, text="wiki", **settings):
    config = build(**settings)
    return RecipeResult(
        name=name,
        fingerprint="f",
        qerve_version="0.1.0",
        config=config,
        texts=(TextScore(text, math.log(perplexity) if perplexity else None, 100, 2),),
        tasks=(TaskScore("piqa", 50, acc=0.6, acc_stderr=0.07, acc_norm=0.62, acc_norm_stderr=0.069),),
        effective_bits=bits,
        artifact_bytes=1 << 20,
        build_seconds=1.5,
        eval_seconds=0.5,
        peak_memory_bytes=3 << 20,
        statistics="cached",
        layers=layers(error, rank=config["reconstruct"]["rank"]),
        spectra={"model.layers.2.mlp.down_proj": Spectrum((3.0, 2.0, 1.0), 14.0, (4.0, 1.0), 18.0)},
    )


def dense(perplexity=20.0, text="wiki"):
    score = TextScore(text, math.log(perplexity), 100, 2)
    tasks = (TaskScore("piqa", 50, acc=0.7, acc_stderr=0.065),)
    return RecipeResult(DENSE, "f", "0.1.0", texts=(score,), tasks=tasks, effective_bits=16.0, artifact_bytes=4 << 20)


def failed(name="broken"):
    return RecipeResult(name, "f", "0.1.0", error="layer 3: not finite <b>", config=build())


def comparison(*results, external=(), title="Recipes for tiny"):
    header = {"checkpoint": "tiny", "checkpoint sha256": "ab" * 32, "command": "qerve compare c.toml"}
    return Comparison(title, header, tuple(results), tuple(external))


def example():
    """Dense, five recipes of which two differ only in rank, a failed one, and one from elsewhere."""
    return comparison(
        dense(),
        recipe("rtn-w3", 3.31, 60.0, error=0.2, num_bits=3, method="none", rank=0),
        recipe("rtn-w4", 4.31, 30.0, error=0.1, method="none", rank=0),
        recipe("qera-w4-r8", 4.5, 25.0, error=0.06, rank=8),
        recipe("qera-w4-r32", 5.0, 23.0, error=0.04, rank=32),
        recipe("lqer-w4-r32", 5.0, 26.0, error=0.07, rank=32, method="lqer"),
        failed(),
        external=[ExternalResult("Q4_0", 4.5, 38.1, "wiki", "measured with llama-perplexity -m x")],
    )
