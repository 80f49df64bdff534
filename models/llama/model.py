"""The network: one lean decoder for calibration, evaluation and serving, over a ragged batch without padding.

Linear layers come from the weight source, so that dense, quantized and fake ones run through the same code. Activations
run in the dtype of the norm gains; the embedding and the head may be stored narrower, or as codes.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import KernelError
from ..layers.linear import LowRankLinear, apply_linear
from ..quant.activation import quantize_activations
from ..quant.grid import dequantize_rows
from ..scheme import EMBEDDING, HEAD
from ..types import QuantizedWeight, RowRanks
from .attention import AttentionPlan, LayerAttention
from .batch import Batch, TokenBatch
from .config import LlamaConfig
from .kv_cache import PagedKVCache
from .network import run_step
from .rope import Rotary, RotaryEmbedding
from .weights import WeightSource

HEAD_CHUNK_ELEMENTS = 1 << 18
"""Head weights upcast at a time: 1 MB of float32, small enough to stay in the processor's cache."""


def embed(token_ids: Tensor, weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of ``weight`` (vocab_size, hidden_size) for ``token_ids`` (n,): (n, hidden_size) in ``dtype``."""
    if isinstance(weight, QuantizedWeight):
        return dequantize_rows(weight, token_ids).to(dtype)
    return F.embedding(token_ids, weight).to(dtype)


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Next-token logits; a head stored narrower than float32 is upcast a few rows at a time, never whole.

    Args:
        hidden: (n, hidden_size), after the final norm.
        weight: (vocab_size, hidden_size), the head or the tied embedding.

    Returns:
        (n, vocab_size) float32.
    """
    if hidden.dtype == weight.dtype:
        return F.linear(hidden, weight).float()
    hidden = hidden.float()
    logits = hidden.new_empty(len(hidden), len(weight))
    num_rows = max(1, HEAD_CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), num_rows):
        rows = weight[start : start + num_rows]
        logits[:, start : start + num_rows] = F.linear(hidden, rows.float())
    return logits


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, computed in float32 whatever the dtype of ``x``."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, hidden_size) -> same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    quantize: what queries, keys and values (num_tokens, num_channels) go through before the products, so that the cache
        holds what comes out; None: nothing. Training puts in something of the same values that has gradients
    """

    quantize: Callable[[Tensor], Tensor] | None

    def __init__(self, config: LlamaConfig, layer_index: int, weights: WeightSource) -> None:
        super().__init__()
        path = f"model.layers.{layer_index}.self_attn"
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        scheme = config.attention
        self.quantize = None if scheme is None else partial(quantize_activations, scheme=scheme)
        self.q_proj = weights.linear(f"{path}.q_proj")
        self.k_proj = weights.linear(f"{path}.k_proj")
        self.v_proj = weights.linear(f"{path}.v_proj")
        self.o_proj = weights.linear(f"{path}.o_proj")

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        plan: LayerAttention,
        kv_cache: PagedKVCache | None,
        row_ranks: RowRanks | None = None,
    ) -> Tensor:
        """``x`` (num_tokens, hidden_size) -> same shape and dtype."""
        query = self._rounded(rotary.rotate(self._heads(apply_linear(self.q_proj, x, row_ranks))))
        key = self._rounded(rotary.rotate(self._heads(apply_linear(self.k_proj, x, row_ranks))))
        value = self._rounded(self._heads(apply_linear(self.v_proj, x, row_ranks)))
        attended = plan.attend(self.layer_index, query, key, value, kv_cache)
        return apply_linear(self.o_proj, attended, row_ranks)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.head_dim)

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.quantize is None else self._heads(self.quantize(x.flatten(1)))


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, layer_index: int, weights: WeightSource) -> None:
        super().__init__()
        path = f"model.layers.{layer_index}.mlp"
        self.gate_proj = weights.linear(f"{path}.gate_proj")
        self.up_proj = weights.linear(f"{path}.up_proj")
        self.down_proj = weights.linear(f"{path}.down_proj")

    def forward(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """``x`` (num_tokens, hidden_size) -> same shape and dtype."""
        gate = F.silu(apply_linear(self.gate_proj, x, row_ranks))
        return apply_linear(self.down_proj, gate * apply_linear(self.up_proj, x, row_ranks), row_ranks)


class DecoderLayer(nn.Module):
    """One transformer block; its children are named as in Hugging Face checkpoints."""

    def __init__(self, config: LlamaConfig, layer_index: int, weights: WeightSource) -> None:
        super().__init__()
        path = f"model.layers.{layer_index}"
        self.window = config.window(layer_index)
        self.input_layernorm = RMSNorm(weights.tensor(f"{path}.input_layernorm.weight"), config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index, weights)
        gain = weights.tensor(f"{path}.post_attention_layernorm.weight")
        self.post_attention_layernorm = RMSNorm(gain, config.rms_norm_eps)
        self.mlp = MLP(layer_index, weights)

    def forward(
        self,
        hidden: Tensor,
        batch: Batch,
        rotary: Rotary,
        kv_cache: PagedKVCache | None = None,
        plan: LayerAttention | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden: (num_tokens, hidden_size).
            batch: the rows' sequences.
            rotary: what ``RotaryEmbedding`` made of the batch.
            kv_cache: keys and values of earlier tokens; receives the new ones.
            plan: the attention plan for this layer's window; made here when not given.

        Returns:
            (num_tokens, hidden_size), same dtype.
        """
        plan = plan or AttentionPlan.of(batch, self.window, kv_cache is not None)
        ranks = batch.row_ranks
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, plan, kv_cache, ranks)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden), ranks)
        return output


class LlamaForCausalLM(nn.Module):
    """The whole network, built by asking ``weights`` for each parameter once, in order.

    cache_dtype: of the key-value caches that it makes; that of the activations unless it is set
    """

    def __init__(self, config: LlamaConfig, weights: WeightSource) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config, weights)
        self.layers = nn.ModuleList(DecoderLayer(config, index, weights) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(weights.tensor("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = _head(config, weights, self.embed_tokens)
        self.cache_dtype = self.norm.weight.dtype
        self._rotary = RotaryEmbedding(config, self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and batches must be."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.norm.weight.dtype

    def forward(self, batch: Batch, kv_cache: PagedKVCache | None = None) -> Tensor:
        """Hidden states (num_tokens, hidden_size) after the final norm."""
        has_cache = kv_cache is not None
        plans = {window: AttentionPlan.of(batch, window, has_cache) for window in self.config.windows}
        return self.attend_by(plans, batch, kv_cache)

    def attend_by(
        self, plans: Mapping[int | None, LayerAttention], batch: Batch, kv_cache: PagedKVCache | None
    ) -> Tensor:
        """``forward`` with the attention of every window planned by the caller.

        Of ``batch.spans``, nothing but a dynamic rotary embedding looks at them then.
        """
        rotary = self._rotary(batch, self.dtype)
        hidden = self._embed(batch.token_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, batch, rotary, kv_cache, plans[self.config.window(index)])
        output: Tensor = self.norm(hidden)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` (n, hidden_size) -> (n, vocab_size) float32."""
        if isinstance(self.lm_head, Tensor):
            return head_logits(hidden, self.lm_head)
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    @torch.inference_mode()
    def step(self, tokens: TokenBatch, kv_cache: PagedKVCache | None) -> Tensor | None:
        """Logits (n, vocab_size) float32 of the n ``tokens.logit_rows``; None where n is 0."""
        return run_step(self, tokens, kv_cache)

    def new_cache(self, num_blocks: int) -> PagedKVCache:
        """A key-value cache of ``num_blocks`` blocks of 16 tokens."""
        return PagedKVCache(self.config, num_blocks, dtype=self.cache_dtype, device=self.device)

    @property
    def cache_block_bytes(self) -> int:
        """Bytes that one of its blocks takes."""
        return PagedKVCache.bytes_per_block(self.config, dtype=self.cache_dtype)

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self.embed_tokens
        rows = table.rows(token_ids) if isinstance(table, LowRankLinear) else embed(token_ids, table, self.dtype)
        return rows.to(self.dtype)


def _embedding(config: LlamaConfig, weights: WeightSource) -> nn.Parameter | LowRankLinear:
    if EMBEDDING not in config.vocabulary:
        return nn.Parameter(weights.tensor(f"{EMBEDDING}.weight"), requires_grad=False)
    table = weights.linear(EMBEDDING)
    if not isinstance(table, LowRankLinear) or not table.has_rows:
        raise KernelError(f"{EMBEDDING}: a quantized embedding needs a backend that gives single rows, as reference")
    return table


def _head(
    config: LlamaConfig, weights: WeightSource, embedding: nn.Parameter | LowRankLinear
) -> nn.Parameter | nn.Module:
    if config.is_head_quantized:
        return weights.linear(HEAD)
    if config.tie_word_embeddings and isinstance(embedding, nn.Parameter):
        return embedding
    return nn.Parameter(weights.tensor(f"{HEAD}.weight"), requires_grad=False)
