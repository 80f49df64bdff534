"""Rewritten checkpoints: the network computes what it did, to float32 tolerance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.errors import SchemeError
from models.llama.checkpoint import Checkpoint, DenseWeights
from models.llama.config import LlamaConfig
from models.llama.model import LlamaForCausalLM
from models.llama.rewrite import FlattenedCheckpoint, PermutedCheckpoint, RotatedCheckpoint
from models.llama.rewritten import RewrittenCheckpoint
from models.llama.safetensors_checkpoint import SafetensorsCheckpoint
from models.transform.flatten import share_over_query_heads
from tests.support.llama_variants import VARIANTS, hf_values, uncached_logits
from tests.support.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint

TOKENS = torch.randint(101, (24,), generator=torch.Generator().manual_seed(5)).tolist()
TOLERANCE = 1e-4
"""Of the largest logit: float32 behind scales over three orders of magnitude."""

OWNERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


class MemoryCheckpoint:
    """A checkpoint from a dictionary."""

    generation_config: dict[str, Any] = {"eos_token_id": 2}  # noqa: RUF012 - as a protocol's attribute
    tokenizer_files: dict[str, bytes] = {"tokenizer.json": b"{}"}  # noqa: RUF012
    fingerprint = "0" * 64

    def __init__(self, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.hf_config = values
        self.config = LlamaConfig.from_hf(values, "config.json")
        self.tensors = random_tensors(values, dtype=dtype)
        self.asked: list[str] = []

    @property
    def dense_bytes(self) -> int:
        return 2 * self.config.num_parameters

    def tensor(self, name: str, narrow: bool = False) -> Tensor:
        self.asked.append(name)
        tensor = self.tensors[name]
        return tensor.bfloat16() if narrow and tensor.dtype.itemsize > 2 else tensor


def network(checkpoint: Checkpoint) -> LlamaForCausalLM:
    return LlamaForCausalLM(checkpoint.config, DenseWeights(checkpoint)).requires_grad_(False)


def difference(rewritten: Checkpoint, base: Checkpoint) -> float:
    """Largest difference between the logits, as a share of the largest logit."""
    expected = uncached_logits(network(base), TOKENS)
    return float((uncached_logits(network(rewritten), TOKENS) - expected).abs().max() / expected.abs().max())


def random_scales(config: LlamaConfig, seed: int = 3) -> dict[str, Tensor]:
    """Scales over three orders of magnitude for every owner."""
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    for path, shape in config.linear_shapes().items():
        if path.endswith(OWNERS):
            scale = 10 ** (3 * torch.rand(shape.in_features, generator=generator, dtype=torch.float64) - 1.5)
            is_of_heads = path.endswith("o_proj")
            scales[path] = (
                share_over_query_heads(scale, config.num_key_value_heads, config.head_dim) if is_of_heads else scale
            )
    return scales


def random_orders(config: LlamaConfig, seed: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randperm(shape.in_features, generator=generator).to(torch.int32)
        for path, shape in config.linear_shapes().items()
        if path.endswith("down_proj")
    }


def flattened(base: Checkpoint) -> FlattenedCheckpoint:
    return FlattenedCheckpoint(base, random_scales(base.config))


def permuted(base: Checkpoint) -> PermutedCheckpoint:
    return PermutedCheckpoint(base, random_orders(base.config))


def rotated(base: Checkpoint) -> RotatedCheckpoint:
    return RotatedCheckpoint(base, seed=7)


REWRITES: dict[str, Callable[[Checkpoint], RewrittenCheckpoint]] = {
    "flattened": flattened,
    "permuted": permuted,
    "rotated": rotated,
    "rotated in blocks": lambda base: RotatedCheckpoint(base, block=4),
    "flattened over permuted": lambda base: flattened(permuted(base)),
    "permuted over flattened": lambda base: permuted(flattened(base)),
    "rotated over flattened": lambda base: rotated(flattened(base)),
    "all, flattened last": lambda base: flattened(permuted(rotated(base))),
    "rotated twice": lambda base: rotated(RotatedCheckpoint(base, block=4)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rewrite", REWRITES)
def test_logits_are_unchanged(variant: str, rewrite: str) -> None:
    base = MemoryCheckpoint(hf_values(variant))
    assert difference(REWRITES[rewrite](base), base) < TOLERANCE


@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_are_unchanged_where_heads_cannot_be_rotated(is_tied: bool) -> None:
    values = hf_values(
        "llama_biases", hidden_size=24, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=is_tied
    )
    base = MemoryCheckpoint(values)
    rewritten = rotated(base)
    assert (rewritten.block, rewritten.head_block) == (24, 0)
    assert difference(rewritten, base) < TOLERANCE


def test_every_parameter_but_biases_that_are_only_read_is_rewritten_by_rotation() -> None:
    base = MemoryCheckpoint(hf_values("llama_biases"))
    rewritten = rotated(base)
    same = {name for name in base.tensors if torch.equal(rewritten.tensor(name), base.tensors[name])}
    kept = ("q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert same == {name for name in base.tensors if name.endswith(kept)}
    assert all(bool((rewritten.tensor(name) == 1).all()) for name in base.tensors if name.endswith("norm.weight"))


def test_values_of_a_rotated_network_are_rotated_head_by_head_and_keys_are_not() -> None:
    base = MemoryCheckpoint(hf_values("llama_grouped_tied"))
    head_dim = base.config.head_dim
    outlier = torch.zeros(head_dim)
    outlier[3] = 8.0
    for name in ("v_proj", "k_proj"):
        base.tensors[f"model.layers.0.self_attn.{name}.weight"] = torch.outer(outlier.repeat(2), torch.ones(48))
    rewritten = rotated(base)
    value, key = (rewritten.tensor(f"model.layers.0.self_attn.{name}.weight") for name in ("v_proj", "k_proj"))
    assert torch.allclose(value.abs(), value.abs()[:1].expand_as(value), rtol=1e-5)
    assert set(key.abs().amax(1).nonzero().flatten().tolist()) == {3, 3 + head_dim}


class Recorder:
    """Largest magnitude of every input channel of every linear layer of a network."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        model = network(checkpoint)
        self.absmax: dict[str, Tensor] = {}
        for path in checkpoint.config.linear_shapes():
            model.get_submodule(path.removeprefix("model.")).register_forward_pre_hook(self._hook(path))
        uncached_logits(model, TOKENS)

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.absmax[path] = inputs[0].abs().amax(0)

        return record


@pytest.mark.parametrize("variant", ["llama1_multi_head", "llama_biases", "mistral_full", "qwen2", "llama_multi_query"])
def test_flattening_by_the_activations_leaves_every_channel_with_a_largest_magnitude_of_one(variant: str) -> None:
    base = MemoryCheckpoint(hf_values(variant))
    config = base.config

    def shared(path: str, absmax: Tensor) -> Tensor:
        is_of_heads = path.endswith("o_proj")
        return share_over_query_heads(absmax, config.num_key_value_heads, config.head_dim) if is_of_heads else absmax

    scales = {path: shared(path, absmax) for path, absmax in Recorder(base).absmax.items() if path.endswith(OWNERS)}
    for path, absmax in Recorder(FlattenedCheckpoint(base, scales)).absmax.items():
        assert absmax.max() < 1.001
        assert torch.allclose(shared(path, absmax), torch.ones_like(absmax), rtol=0, atol=1e-3), path


def test_permutation_puts_the_hidden_channels_in_the_given_order() -> None:
    base = MemoryCheckpoint(hf_values("llama_biases"))
    orders = random_orders(base.config)
    before, after = Recorder(base).absmax, Recorder(PermutedCheckpoint(base, orders)).absmax
    for path, order in orders.items():
        assert torch.allclose(after[path], before[path][order], rtol=1e-4)


def test_paths_that_are_left_out_keep_their_parameters() -> None:
    base = MemoryCheckpoint(hf_values("qwen2"))
    scales = {path: scale for path, scale in random_scales(base.config).items() if "layers.1" in path and "mlp" in path}
    rewritten = FlattenedCheckpoint(base, scales)
    same = {name for name in base.tensors if rewritten.tensor(name) is base.tensors[name]}
    changed = ("post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    assert base.tensors.keys() - same == {f"model.layers.1.{name}" for name in changed}
    assert difference(rewritten, base) < TOLERANCE


@pytest.mark.parametrize("variant", ["llama_grouped_tied", "mistral_full"])
def test_rotation_unties_the_head(variant: str) -> None:
    base = MemoryCheckpoint(hf_values(variant))
    before = dict(base.hf_config)
    rewritten = rotated(base)
    assert rewritten.config == LlamaConfig.from_hf(rewritten.hf_config, "config.json")
    assert not rewritten.config.tie_word_embeddings
    assert base.hf_config == before
    shapes = rewritten.config.tensor_shapes()
    assert {name: rewritten.tensor(name).shape for name in shapes} == shapes
    assert rewritten.dense_bytes == 2 * sum(rewritten.tensor(name).numel() for name in shapes)
    assert rewritten.generation_config == base.generation_config
    assert rewritten.tokenizer_files == base.tokenizer_files


@pytest.mark.parametrize("rewrite", ["flattened", "permuted"])
def test_other_rewrites_leave_the_configuration(rewrite: str) -> None:
    base = MemoryCheckpoint(hf_values("qwen2"))
    rewritten = REWRITES[rewrite](base)
    assert (rewritten.config, rewritten.hf_config) == (base.config, base.hf_config)
    assert rewritten.dense_bytes == base.dense_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rewrite", REWRITES)
def test_narrow_parameters_are_the_wide_ones_rounded_to_16_bits(rewrite: str, dtype: torch.dtype) -> None:
    base = MemoryCheckpoint(hf_values("llama_biases", tie_word_embeddings=True), dtype)
    rewritten = REWRITES[rewrite](base)
    narrow_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    for name in rewritten.config.tensor_shapes():
        wide, narrow = rewritten.tensor(name), rewritten.tensor(name, narrow=True)
        assert narrow.dtype == narrow_dtype
        assert wide.is_contiguous()
        assert narrow.is_contiguous()
        # Once rounded for each of up to three rewrites and, from float32, for the base.
        bound = 8 * torch.finfo(narrow_dtype).eps * wide.float().abs().max()
        assert (narrow.float() - wide.float()).abs().max() <= bound


def test_rows_of_a_large_embedding_are_rotated_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    base = MemoryCheckpoint(hf_values("llama_grouped_tied"))
    whole = rotated(base)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    expected = [whole.tensor(name) for name in names]
    monkeypatch.setattr("models.llama.rewrite.CHUNK_ELEMENTS", 7 * base.config.hidden_size)
    for name, tensor in zip(names, expected, strict=True):
        assert torch.allclose(rotated(base).tensor(name), tensor, rtol=0, atol=1e-6)


def test_fingerprint_tells_rewrites_apart_and_repeats() -> None:
    base = MemoryCheckpoint(hf_values("llama1_multi_head"))
    other = MemoryCheckpoint(hf_values("llama1_multi_head"))
    other.fingerprint = "1" * 64
    config = base.config
    first = {path: scale for path, scale in random_scales(config).items() if "layers.0" in path}
    one_changed = {path: scale.clone() for path, scale in first.items()}
    one_changed["model.layers.0.mlp.down_proj"][5] *= 1 + 1e-12
    made = [
        lambda: FlattenedCheckpoint(base, first),
        lambda: FlattenedCheckpoint(base, one_changed),
        lambda: FlattenedCheckpoint(base, random_scales(config)),
        lambda: PermutedCheckpoint(base, random_orders(config)),
        lambda: PermutedCheckpoint(base, random_orders(config, seed=9)),
        lambda: RotatedCheckpoint(base),
        lambda: RotatedCheckpoint(base, seed=1),
        lambda: RotatedCheckpoint(base, block=4),
        lambda: RotatedCheckpoint(other),
        lambda: flattened(permuted(base)),
        lambda: permuted(flattened(base)),
    ]
    fingerprints = [make().fingerprint for make in made]
    assert fingerprints == [make().fingerprint for make in made]
    assert len({base.fingerprint, *fingerprints}) == len(made) + 1
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


def test_same_seed_gives_the_same_signs_and_another_gives_others() -> None:
    base = MemoryCheckpoint(hf_values("llama1_multi_head"))
    name = "model.embed_tokens.weight"
    first = RotatedCheckpoint(base, seed=1).tensor(name)
    assert torch.equal(first, RotatedCheckpoint(base, seed=1).tensor(name))
    assert not torch.equal(first, RotatedCheckpoint(base, seed=2).tensor(name))


def test_rewrites_are_lazy_and_read_only_what_a_parameter_needs() -> None:
    base = MemoryCheckpoint(hf_values("llama_grouped_tied"))
    rewritten = flattened(permuted(rotated(base)))
    assert base.asked == []
    rewritten.tensor("model.layers.2.mlp.up_proj.weight")
    layer = "model.layers.2"
    assert set(base.asked) == {f"{layer}.mlp.up_proj.weight", f"{layer}.post_attention_layernorm.weight"}


DOWN, O_PROJ = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda base: FlattenedCheckpoint(base, {"model.layers.9.mlp.down_proj": torch.ones(80)}), "layers.9.mlp.down"),
        (lambda base: FlattenedCheckpoint(base, {"model.layers.0.mlp.up_proj": torch.ones(48)}), "up_proj: is not the"),
        (lambda base: FlattenedCheckpoint(base, {DOWN: torch.ones(48)}), r"down_proj: .* shape \(48,\), not \(80,\)"),
        (lambda base: FlattenedCheckpoint(base, {DOWN: torch.zeros(80)}), "down_proj: .* positive and finite"),
        (lambda base: FlattenedCheckpoint(base, {DOWN: torch.full((80,), torch.nan)}), "positive and finite"),
        (lambda base: FlattenedCheckpoint(base, {O_PROJ: torch.arange(1.0, 49)}), "o_proj: .* differ between query"),
        (lambda base: PermutedCheckpoint(base, {DOWN: torch.zeros(80, dtype=torch.int32)}), "down_proj: .* once"),
        (lambda base: PermutedCheckpoint(base, {DOWN: torch.arange(79)}), r"shape \(79,\), not \(80,\)"),
        (lambda base: PermutedCheckpoint(base, {O_PROJ: torch.arange(48)}), "o_proj: is not the mlp.down_proj"),
        (lambda base: RotatedCheckpoint(base, 32), "residual stream: rotation_block 32 .* choose rotation_block 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_is_read(
    build: Callable[[Checkpoint], Checkpoint], message: str
) -> None:
    base = MemoryCheckpoint(hf_values("llama_grouped_tied"))
    with pytest.raises(SchemeError, match=message):
        build(base)
    assert base.asked == []


def test_residual_stream_without_a_hadamard_matrix_names_a_block() -> None:
    base = MemoryCheckpoint(hf_values("llama1_multi_head", hidden_size=72 * 3, num_attention_heads=12, head_dim=4))
    assert rotated(base).block == 216
    odd = MemoryCheckpoint(hf_values("llama1_multi_head", hidden_size=92, num_attention_heads=6, head_dim=4))
    with pytest.raises(SchemeError, match=r"the residual stream: no Hadamard matrix of order 92 .* rotation_block 4"):
        rotated(odd)
    assert difference(RotatedCheckpoint(odd, block=4), odd) < TOLERANCE


@pytest.mark.parametrize("rewrite", REWRITES)
def test_directory_on_disk_in_bfloat16_is_rewritten(tmp_path: Path, rewrite: str) -> None:
    values = tiny_config()
    base = SafetensorsCheckpoint(write_checkpoint(tmp_path, values, random_tensors(values, dtype=torch.bfloat16)))
    rewritten = REWRITES[rewrite](base)
    assert rewritten.fingerprint != base.fingerprint
    assert difference(rewritten, base) < TOLERANCE
