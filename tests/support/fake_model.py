"""A language model of arithmetic and a tokenizer of bytes: all that the engine and the API need, and predictable.

The next token depends on every token before it, and what came before is read back from the key-value cache: a wrong
block table, slot or position changes the text.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import tokenizers
import torch
from torch import Tensor, nn

from models.artifact.execution import Execution
from models.artifact.format import Manifest, Probe, TensorRecord, self_hash
from models.artifact.load import LoadedModel
from models.artifact.record import LinearRecord
from models.config import BuildConfig, ReconstructConfig
from models.llama.batch import Batch, TokenBatch
from models.llama.config import LlamaConfig
from models.llama.kv_cache import PagedKVCache
from models.scheme import QuantScheme

EOS = 256
BOS = 257
VOCAB_SIZE = 258
MODULUS = 9973
CONTEXT = 256
PROBE = list(b"a probe of the fake model")
LETTERS = b"abcdefghijklmnopqrstuvwxyz ,."


def fake_config(context: int = CONTEXT) -> LlamaConfig:
    return LlamaConfig(
        model_type="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=1,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Faults:
    """Tokens that make a forward pass fail, or its logits NaN; ``step_seconds`` slows every pass down."""

    fails_on: int | None = None
    nan_on: int | None = None
    step_seconds: float = 0.0


class FakeModel(nn.Module):
    """Hidden state: a hash of all tokens so far. Logits: letters only, in an order that the hash decides."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, context: int = CONTEXT, faults: Faults | None = None) -> None:
        super().__init__()
        self.config = fake_config(context)
        self.faults = faults or Faults()
        self.batch_sizes: list[int] = []

    def state(self, token_ids: Sequence[int]) -> int:
        """What decides the token that follows on ``token_ids``."""
        return state_of(token_ids)

    cache_block_bytes = PagedKVCache.bytes_per_block(fake_config())

    def new_cache(self, num_blocks: int) -> PagedKVCache:
        return PagedKVCache(self.config, num_blocks)

    def forward(self, batch: Batch, kv_cache: PagedKVCache | None = None) -> Tensor:
        time.sleep(self.faults.step_seconds)
        self.batch_sizes.append(len(batch.spans))
        if self.faults.fails_on in batch.token_ids.tolist():
            raise RuntimeError("the fake model was told to fail")
        if kv_cache is not None:
            rows = batch.token_ids[:, None, None].float()
            kv_cache.write(0, rows, rows, batch.slot_mapping)
        hidden = []
        for span in batch.spans:
            tokens = batch.token_ids[span.start : span.start + span.num_tokens]
            if kv_cache is not None and span.slots is not None:
                tokens = kv_cache.read(0, span.slots)[0].flatten()
            first = span.context_len - span.num_tokens
            assert batch.positions[span.start].item() == first
            rows = range(first, first + span.num_tokens)
            hidden += [ranked(self.state(tokens[: row + 1].tolist()), span.rank) for row in rows]
        return torch.tensor(hidden, dtype=torch.float32)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.full((len(hidden), VOCAB_SIZE), -30.0)
        letters = torch.tensor(list(LETTERS))
        logits[:, letters] = torch.sin(hidden.double() * (letters + 1) * 0.37).float() * 3
        logits[hidden[:, 0] < 0] = float("nan")
        return logits

    def step(self, tokens: TokenBatch, kv_cache: PagedKVCache | None) -> Tensor | None:
        batch, rows = tokens.tensors(self.device)
        hidden = self(batch, kv_cache)
        return self.logits(hidden[rows]) if len(rows) else None

    def next_token(self, token_ids: Sequence[int], rank: int | None = None) -> int:
        """The greedy choice after ``token_ids``, without batch or cache."""
        return int(self.logits(torch.tensor([[float(ranked(self.state(token_ids), rank))]]))[0].argmax())

    def continue_greedily(self, prompt: Sequence[int], num_tokens: int, rank: int | None = None) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(self.next_token(tokens, rank))
        return tokens[len(prompt) :]


class RepetitiveModel(FakeModel):
    """Mostly goes by the last token, and so in circles, from which any token before may lead out."""

    def state(self, token_ids: Sequence[int]) -> int:
        whole = state_of(token_ids)
        return whole if whole % 9 == 0 else state_of(token_ids[-1:])


class RandomModel(FakeModel):
    """Any byte or control token may come next: logits are random, and depend on the tokens so far."""

    spread = 2.0

    def logits(self, hidden: Tensor) -> Tensor:
        rows = [torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(int(row))) for row in hidden[:, 0]]
        return torch.stack(rows) * self.spread


class BrokenModel(FakeModel):
    """Its logits are NaN once the last token is ``faults.nan_on``."""

    def forward(self, batch: Batch, kv_cache: PagedKVCache | None = None) -> Tensor:
        hidden = super().forward(batch, kv_cache)
        hidden[batch.token_ids == self.faults.nan_on] = -1.0
        return hidden


def state_of(token_ids: Sequence[int]) -> int:
    """Hash of a whole sequence; order matters."""
    state = 7
    for token in token_ids:
        state = (state * 31 + int(token) + 1) % MODULUS
    return state


def ranked(state: int, rank: int | None) -> int:
    """Another state for every rank; without one, as for all components."""
    return state if rank is None else (state + 1 + 131 * rank) % MODULUS


class ByteTokenizer:
    """One token per byte, plus an end and a beginning of text."""

    vocab_size = VOCAB_SIZE
    max_token_chars = 1
    eos_token_ids = frozenset({EOS})

    def __init__(self, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < EOS).decode("utf-8", errors="replace")

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        return [chr(token) if token < EOS else f"<{token}>" for token in ids]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""

    def to_json(self) -> str:
        """The same tokenizer, as the library has it."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_vocabulary(), merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<end>", "<begin>"])
        return backend.to_str()

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        if messages[-1]["role"] != "user" and add_generation_prompt:
            raise ValueError("the chat template rejects these messages: the last one must be the user's")
        prefix = (variables or {}).get("prefix", "")
        text = "".join(f"{item['role']}: {item['content']}\n" for item in messages)
        return f"{prefix}{text}assistant:" if add_generation_prompt else prefix + text


def byte_vocabulary() -> dict[str, int]:
    """Byte-level BPE's character of every byte -> the byte."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    encoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # What a character of two bytes is turned into tells both bytes' characters; the others follow in order.
    spelled = {}
    for code in range(0x800):
        text = chr(code)
        pieces = "".join(piece for piece, _ in encoder.pre_tokenize_str(text))
        spelled.update(zip(pieces, text.encode(), strict=True))
    rest = [character for character in characters if character not in spelled]
    spelled.update(zip(rest, sorted(set(range(256)) - set(spelled.values())), strict=True))
    return spelled


@dataclass
class FakeParts:
    """What a loaded fake model is made of; a test changes what it is about.

    rank, method: of the correction that its manifest tells of
    """

    model: FakeModel = field(default_factory=FakeModel)
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    rank: int = 0
    method: str = "qera-exact"

    def loaded(self) -> LoadedModel:
        return LoadedModel(
            model=cast(Any, self.model),
            tokenizer=cast(Any, self.tokenizer),
            manifest=fake_manifest(self.rank, self.method, self.probe_nll()),
            selections={},
            weight_bytes={"packed": 1000, "scale": 100, "lora_up": 64, "lora_down": 32, "unquantized": 7},
            resident_bytes={"reference": 1200},
            load_seconds=0.5,
            execution=Execution({}, "a fake network"),
        )

    def probe_nll(self) -> float:
        """Of the probe, as the model scores it."""
        states = [float(self.model.state(PROBE[:length])) for length in range(1, len(PROBE))]
        logprobs = self.model.logits(torch.tensor(states)[:, None]).log_softmax(-1)
        return -logprobs[range(len(states)), PROBE[1:]].mean().item()


def fake_record(rank: int) -> LinearRecord:
    return LinearRecord(
        scheme=QuantScheme(),
        in_features=256,
        out_features=256,
        rank=rank,
        lora_form="two-factor",
        factor_dtype="bfloat16",
        has_bias=False,
        has_input_scale=False,
        has_channel_order=False,
        rotation_block=0,
        activations=None,
        relative_weight_error=0.1,
        relative_output_error=None,
        effective_bits=5.0,
    )


def fake_manifest(rank: int = 0, method: str = "qera-exact", probe_nll: float = 3.1) -> Manifest:
    embedding = TensorRecord(file="model.safetensors", dtype="BF16", shape=(4, 2), sha256="0" * 64)
    values: dict[str, Any] = {
        "format": "qerve-1",
        "qerve_version": "0",
        "build": BuildConfig(reconstruct=ReconstructConfig(method=method)),
        "checkpoint_fingerprint": "0" * 64,
        "calibration_fingerprint": None,
        "linears": {"model.layers.0.mlp.up_proj": fake_record(rank)} if rank else {},
        "tensors": {"model.embed_tokens.weight": embedding},
        "files": {},
        "component_bytes": {},
        "effective_bits": 4.75,
        "dense_bytes": 5000,
        "evaluation": {"quantized_perplexity": 27.7},
        "probe": Probe(token_ids=tuple(PROBE), dense_nll=3.0, quantized_nll=probe_nll),
        "manifest_sha256": "0" * 64,
    }
    draft = Manifest(**values)
    return draft.model_copy(update={"manifest_sha256": self_hash(draft.model_dump(mode="json"))})
