"""What shapes a network of the LLaMA family, read from a Hugging Face ``config.json`` of any vintage."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ..errors import CheckpointError, SchemeError
from ..scheme import EMBEDDING, HEAD, ActivationScheme, VocabularyScheme
from .config_fields import ConfigFields
from .rope_config import RopeConfig, read_rope

__all__ = ["ARCHITECTURES", "LinearShape", "LlamaConfig", "RopeConfig"]

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
"""Supported architecture -> its ``model_type``."""

MAX_LAYERS = 1024
DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768}
DEFAULT_MISTRAL_WINDOW = 4096
DEFAULT_QWEN2_WINDOW = 4096
DEFAULT_QWEN2_WINDOW_LAYERS = 28
DEFAULT_ROPE = RopeConfig()


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Shape of one linear layer: weight (out_features, in_features)."""

    out_features: int
    in_features: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A network of the LLaMA family: LLaMA 1-3, Mistral, Qwen2.

    sliding_window:        tokens a position attends to, itself included; None: all before it
    full_attention_layers: layers that ignore the window
    eos_token_ids:         those of ``config.json``; ``generation_config.json`` may add more
    attention:             how queries, keys and values are quantized; not of Hugging Face's config: an artifact says it
    vocabulary:            module paths of embedding and head as far as they are quantized; an artifact says that too
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    sliding_window: int | None = None
    full_attention_layers: frozenset[int] = frozenset()
    rope: RopeConfig = DEFAULT_ROPE
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    attention: ActivationScheme | None = None
    vocabulary: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read ``values``, the content of a ``config.json``; ``where`` names it in messages.

        ``auto_map`` is ignored: code that comes with a checkpoint is never run.

        Raises:
            CheckpointError: an unsupported architecture, activation or rope type, a checkpoint that is already
                quantized, or sizes that are missing or do not fit together.
        """
        fields = ConfigFields(values, where)
        model_type = _model_type(fields)
        _refuse_unsupported(fields)
        num_layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
        num_heads = fields.integer("num_attention_heads")
        max_positions = fields.integer("max_position_embeddings", DEFAULT_MAX_POSITIONS[model_type])
        window, full_layers = _attention_windows(fields, model_type, num_layers)
        has_attention_bias = model_type == "llama" and fields.flag("attention_bias", False)
        config = cls(
            model_type=model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=_head_dim(fields, num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            has_qkv_bias=has_attention_bias or model_type == "qwen2",
            has_o_bias=has_attention_bias,
            has_mlp_bias=model_type == "llama" and fields.flag("mlp_bias", False),
            sliding_window=window,
            full_attention_layers=full_layers,
            rope=read_rope(fields, max_positions),
            bos_token_id=next(iter(fields.integers("bos_token_id")), None),
            eos_token_ids=fields.integers("eos_token_id"),
        )
        if num_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{where}: {num_heads} attention heads cannot share {config.num_key_value_heads} key-value heads evenly"
            )
        return config

    def with_attention(self, scheme: ActivationScheme | None) -> Self:
        """This network with queries, keys and values quantized by ``scheme``; None: as they are.

        Raises:
            SchemeError: the groups do not tile the heads of a token.
        """
        for part, num_heads in (("keys and values", self.num_key_value_heads), ("queries", self.num_attention_heads)):
            if scheme and scheme.group_size not in (fitting := scheme.fitting_group_sizes(num_heads * self.head_dim)):
                raise SchemeError(
                    f"attention: group_size {scheme.group_size} does not divide the {num_heads * self.head_dim} "
                    f"channels of the {part} of self_attn ({num_heads} x {self.head_dim}); choose one of {fitting}"
                )
        return replace(self, attention=scheme)

    def with_vocabulary(self, scheme: VocabularyScheme) -> Self:
        """This network with embedding and head quantized as ``scheme`` says.

        Raises:
            SchemeError: what ``scheme`` asks for makes no sense where the two are tied.
        """
        return replace(self, vocabulary=scheme.quantized(is_tied=self.tie_word_embeddings))

    def window(self, layer_index: int) -> int | None:
        """Sliding window of one layer; None: full attention."""
        return None if layer_index in self.full_attention_layers else self.sliding_window

    @property
    def windows(self) -> frozenset[int | None]:
        """The distinct ``window`` of all layers."""
        return frozenset(self.window(index) for index in range(self.num_hidden_layers))

    def linear_shapes(self) -> dict[str, LinearShape]:
        """Module path -> shape of every quantizable linear layer, in network order."""
        shapes: dict[str, LinearShape] = {}
        for layer_index in range(self.num_hidden_layers):
            shapes.update(self.layer_linear_shapes(layer_index))
        return shapes

    def layer_linear_shapes(self, layer_index: int) -> dict[str, LinearShape]:
        """Module path -> shape of the linear layers of one decoder layer."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": LinearShape(heads, hidden, self.has_qkv_bias),
            "self_attn.k_proj": LinearShape(kv_heads, hidden, self.has_qkv_bias),
            "self_attn.v_proj": LinearShape(kv_heads, hidden, self.has_qkv_bias),
            "self_attn.o_proj": LinearShape(hidden, heads, self.has_o_bias),
            "mlp.gate_proj": LinearShape(mlp, hidden, self.has_mlp_bias),
            "mlp.up_proj": LinearShape(mlp, hidden, self.has_mlp_bias),
            "mlp.down_proj": LinearShape(hidden, mlp, self.has_mlp_bias),
        }
        return {f"model.layers.{layer_index}.{name}": shape for name, shape in shapes.items()}

    def vocabulary_shapes(self) -> dict[str, LinearShape]:
        """Module path -> shape of embedding and head as far as they are quantized."""
        return {path: LinearShape(self.vocab_size, self.hidden_size, has_bias=False) for path in self.vocabulary}

    def unquantized_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of the norm gains, the embedding and, unless it is tied, the head: if not quantized."""
        shapes: dict[str, tuple[int, ...]] = {}
        if EMBEDDING not in self.vocabulary:
            shapes[f"{EMBEDDING}.weight"] = (self.vocab_size, self.hidden_size)
        for layer_index in range(self.num_hidden_layers):
            shapes[f"model.layers.{layer_index}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"model.layers.{layer_index}.post_attention_layernorm.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings and HEAD not in self.vocabulary:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of every parameter of the dense network."""
        shapes = replace(self, vocabulary=()).unquantized_shapes()
        for path, linear in self.linear_shapes().items():
            shapes[f"{path}.weight"] = (linear.out_features, linear.in_features)
            if linear.has_bias:
                shapes[f"{path}.bias"] = (linear.out_features,)
        return shapes

    @property
    def head_name(self) -> str:
        """Name of the matrix that makes logits: the embedding's where the two are tied."""
        return f"{EMBEDDING if self.tie_word_embeddings else HEAD}.weight"

    @property
    def is_head_quantized(self) -> bool:
        """The head is codes: of its own, or those of the embedding that it is tied to."""
        return HEAD in self.vocabulary or (self.tie_word_embeddings and EMBEDDING in self.vocabulary)

    @property
    def num_parameters(self) -> int:
        """Parameters of the dense network; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def _model_type(fields: ConfigFields) -> str:
    named = fields.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else None
    model_type = fields.get("model_type")
    expected = model_type if architecture is None else ARCHITECTURES.get(architecture)
    if expected not in ARCHITECTURES.values() or model_type not in (None, expected):
        name = architecture or model_type or "not named"
        if architecture in ARCHITECTURES:
            name = f"{architecture} with model_type {model_type}"
        raise CheckpointError(
            f"{fields.where}: the architecture is {name}; supported are {', '.join(ARCHITECTURES)} "
            "(LLaMA 1-3 and what is built like them, Mistral, Qwen2)"
        )
    return str(expected)


def _refuse_unsupported(fields: ConfigFields) -> None:
    quantization = fields.mapping("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{fields.where}: the checkpoint is already quantized ({method}); start from the original 16-bit checkpoint"
        )
    activation = fields.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{fields.where}: hidden_act is {activation!r}; only 'silu' is supported")


def _head_dim(fields: ConfigFields, num_heads: int) -> int:
    hidden = fields.integer("hidden_size")
    if fields.get("head_dim") is None and hidden % num_heads:
        raise CheckpointError(
            f"{fields.where}: hidden_size {hidden} is not a multiple of {num_heads} attention heads, "
            "and there is no head_dim"
        )
    head_dim = fields.integer("head_dim", hidden // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"{fields.where}: head_dim is {head_dim}; rotary embeddings need an even one")
    return head_dim


def _attention_windows(fields: ConfigFields, model_type: str, num_layers: int) -> tuple[int | None, frozenset[int]]:
    """The sliding window, and the layers that do not use it."""
    window: int | None = None
    first_sliding = 0
    if model_type == "mistral":
        # An absent key means the first Mistral's window; null means none.
        is_absent = "sliding_window" not in fields
        window = DEFAULT_MISTRAL_WINDOW if is_absent else fields.optional_integer("sliding_window", least=1)
    elif model_type == "qwen2" and fields.flag("use_sliding_window", False):
        window = fields.integer("sliding_window", DEFAULT_QWEN2_WINDOW)
        first_sliding = fields.integer("max_window_layers", DEFAULT_QWEN2_WINDOW_LAYERS, least=0)
    layer_types = fields.get("layer_types")
    if layer_types is None:
        is_sliding = [window is not None and layer >= first_sliding for layer in range(num_layers)]
    else:
        is_sliding = _sliding_layers(fields, layer_types, num_layers)
    if any(is_sliding) and window is None:
        raise CheckpointError(f"{fields.where}: layer_types has sliding_attention layers, but no window is in use")
    if not any(is_sliding):
        return None, frozenset()
    return window, frozenset(layer for layer, sliding in enumerate(is_sliding) if not sliding)


def _sliding_layers(fields: ConfigFields, layer_types: object, num_layers: int) -> list[bool]:
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(layer_types, list) or not all(item in tuple(known) for item in layer_types):
        raise CheckpointError(f"{fields.where}: layer_types is {layer_types!r:.80}; supported are {', '.join(known)}")
    if len(layer_types) != num_layers:
        raise CheckpointError(f"{fields.where}: layer_types names {len(layer_types)} layers of {num_layers}")
    return [known[item] for item in layer_types]
