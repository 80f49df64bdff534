"""Settings of the server: command line over environment (``QERVE_*``) over defaults."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.errors import QerveError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


def parse_size(value: object) -> object:
    """``"512MiB"``, ``"2G"``, ``"1.5 GiB"`` or a plain number, in bytes; what is no text is passed on."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KiB, MiB, GiB, kB, MB or GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


ByteSize = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=1 << 50)]


class Settings(BaseSettings):
    """Everything an operator decides.

    model_name:       name that clients ask for; None: the artifact directory's name
    activations:      bits to which the native kernels round inputs that the artifact leaves unquantized; auto: 8
    kv_cache_dtype:   of the key-value cache; auto: fp16 on the native kernels, else the type of the activations
    max_model_len:    tokens of prompt and output together; None: the model's context
    max_num_seqs:     sequences generated at the same time
    max_num_batched_tokens: tokens of one step: a token of every sequence that decodes, then prompts in chunks, so that
                      a long prompt delays the others by one such step at a time; None: 512, on a GPU 2048
    prefix_caching:   prompts that begin like earlier ones start behind what the cache still has of those
    speculative_tokens: guessed tokens that a step checks besides the next one of a sequence; 0: none
    ngram_max:        the last tokens that are looked up together to guess what follows, at most
    kv_cache_memory:  bytes, or a text such as "2GiB"; None: from the memory that is available
    max_queue:        sequences that may wait beyond those that run
    max_perplexity_windows: windows of one perplexity request
    max_logprobs:     most likely tokens that a completion may ask for with each token; chats may ask for 20 at most
    max_body_bytes:   size of a request body
    api_key:          when set, everything but /health/* asks for it
    drain_timeout_seconds: how long a stopping server lets requests finish
    sse_heartbeat_seconds: silence in a stream after which a comment is sent, so that proxies keep it open
    """

    model_config = SettingsConfigDict(env_prefix="QERVE_", extra="ignore", env_ignore_empty=True)

    artifact: Path | None = None
    model_name: str | None = Field(default=None, min_length=1, max_length=256)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    backend: str = "auto"
    activations: Literal["auto", "8", "16"] = "auto"
    kv_cache_dtype: Literal["auto", "fp16", "int8"] = "auto"
    max_model_len: int | None = Field(default=None, ge=2, le=1 << 24)
    max_num_seqs: int = Field(default=8, ge=1, le=1024)
    max_num_batched_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    prefix_caching: bool = True
    speculative_tokens: int = Field(default=0, ge=0, le=32)
    ngram_max: int = Field(default=3, ge=1, le=8)
    kv_cache_memory: ByteSize | None = None
    max_queue: int = Field(default=64, ge=0, le=100_000)
    max_perplexity_windows: int = Field(default=4096, ge=1, le=1 << 20)
    max_logprobs: int = Field(default=20, ge=0, le=1024)
    max_body_bytes: ByteSize = 2 << 20
    api_key: SecretStr | None = None
    drain_timeout_seconds: float = Field(default=30.0, ge=0, le=3600)
    sse_heartbeat_seconds: float = Field(default=15.0, gt=0, le=3600)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def torch_device(self) -> "torch.device":
        """``auto``: the first GPU, or the processor where there is none.

        Raises:
            QerveError: no such device here.
        """
        import torch

        name = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise QerveError(f"device {name!r} is not known: choose auto, cpu, cuda or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise QerveError(f"device {name!r} is not supported: choose auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise QerveError(f"device {name!r} is not here: PyTorch sees {torch.cuda.device_count()} CUDA devices")
        return device

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """None: what suits the device."""
        import torch

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return dtypes.get(self.dtype)


def read_settings(options: Mapping[str, Any]) -> Settings:
    """``options`` (from the command line) over the environment over the defaults.

    Raises:
        QerveError: a value that is not allowed, with its name.
    """
    try:
        return Settings(**options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise QerveError(f"settings (options or QERVE_* variables): {problems}") from error
