"""Settings of the server, each with its bounds, its default and what it means."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from models.cuda_driver import driver_obstacle
from models.errors import QerveError
from models.sizes import parse_size

if TYPE_CHECKING:
    import torch


def _split(value: object) -> object:
    """``"a, b"`` as a list; what is no text is passed on."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


ByteSize = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=1 << 50)]
BatchSizes = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], NoDecode, BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def no_such_gpu(name: str, num_devices: int, *, has_cuda: bool) -> str:
    """Why PyTorch, which sees ``num_devices``, does not have the GPU ``name``."""
    if not has_cuda:
        return f"device {name!r} is not here: this PyTorch is built without CUDA; install one that is, or choose cpu"
    names = ", ".join(f"cuda:{index}" for index in range(num_devices)) or "no CUDA device"
    return f"device {name!r} is not here: PyTorch sees {names}"


class Settings(BaseSettings):
    """Everything an operator decides: each field is an option, a variable ``QERVE_NAME`` and a key of the file.

    The command line's help is made from the descriptions here.
    """

    model_config = SettingsConfigDict(env_prefix="QERVE_", extra="forbid", env_ignore_empty=True)

    config: Path | None = Field(default=None, description="TOML file with settings; options and variables go over it")
    artifact: Path | None = Field(default=None, description="Artifact directory, as `qerve build` wrote it")
    model_name: str | None = Field(
        default=None, min_length=1, max_length=256, description="Name that clients ask for; unset: the directory's name"
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port; 0: any free one")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="Type of activations")
    backend: str = Field(default="auto", description="Kernel backend: auto, or a name such as native, reference")
    activations: Literal["auto", "8", "16"] = Field(
        default="auto", description="Bits to which native kernels round inputs that the artifact leaves alone; auto: 8"
    )
    kv_cache_dtype: Literal["auto", "fp16", "int8"] = Field(
        default="auto", description="Keys and values; auto: fp16 on native kernels, else as activations"
    )
    max_model_len: int | None = Field(
        default=None, ge=2, le=1 << 24, description="Tokens of prompt and output together; unset: the model's context"
    )
    max_num_seqs: int = Field(default=8, ge=1, le=1024, description="Sequences generated at once")
    max_num_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1 << 20,
        description="Tokens of one step; longer prompts run in chunks; unset: 512, on a GPU 2048",
    )
    prefix_caching: bool = Field(default=True, description="Reuse keys and values of prompts that begin alike")
    speculative_tokens: int = Field(
        default=0, ge=0, le=32, description="Guessed tokens that a step checks beside each sequence's next; 0: none"
    )
    ngram_max: int = Field(
        default=3, ge=1, le=8, description="Last tokens that are looked up together for a guess, at most"
    )
    kv_cache_memory: ByteSize | None = Field(
        default=None, description="Key-value cache, e.g. 2GiB; unset: from free memory"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU's memory for weights, cache, recorded steps and workspace"
    )
    cuda_graphs: bool = Field(default=True, description="Record decode steps on a GPU and replay them")
    cuda_graph_sizes: BatchSizes = Field(
        default=(), description="Batch sizes to record; unset: 1, 2, 4, ... up to max_num_seqs"
    )
    max_queue: int = Field(default=64, ge=0, le=100_000, description="Sequences that may wait")
    shed_rank_queue: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="From so many waiting requests on, new ones get less rank; unset: never",
    )
    shed_rank_floor: int = Field(default=0, ge=0, le=1 << 20, description="The rank that they then get")
    max_queued_tokens: int | None = Field(
        default=None, ge=1, le=1 << 40, description="Prompt tokens that may wait; unset: only sequences are counted"
    )
    max_prompts: int = Field(default=32, ge=1, le=32, description="Prompts of one request")
    max_choices: int = Field(default=8, ge=1, le=8, description="Choices (n) per prompt")
    max_perplexity_windows: int = Field(default=4096, ge=1, le=1 << 20, description="Windows of one perplexity request")
    max_logprobs: int = Field(
        default=20, ge=0, le=1024, description="Most likely tokens given with each one; for chats 20 at most"
    )
    max_body_bytes: ByteSize = Field(default=2 << 20, description="Size of a request body")
    max_json_depth: int = Field(default=32, ge=2, le=256, description="Nesting of a request body")
    request_timeout_seconds: float = Field(
        default=3600.0, gt=0, le=86400, description="Longest a request may take; clients may ask for less"
    )
    sse_heartbeat_seconds: float = Field(
        default=15.0,
        gt=0,
        le=3600,
        description="Silence in a stream after which a comment is sent, for proxies",
    )
    sse_write_timeout_seconds: float = Field(
        default=60.0, gt=0, le=3600, description="How long a stream's reader may take nothing before it is dropped"
    )
    drain_timeout_seconds: float = Field(
        default=30.0, ge=0, le=3600, description="How long a stopping server lets requests finish"
    )
    step_timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        le=86_400,
        description="A longer step counts as one that hangs: the process ends",
    )
    max_failed_steps: int = Field(
        default=3, ge=1, le=1000, description="Failed steps in a row after which the process ends"
    )
    api_key: SecretStr | None = Field(default=None, description="Key that clients must send; better as QERVE_API_KEY")
    api_keys_file: Path | None = Field(
        default=None, description="File of keys, one KEY or NAME:KEY per line; read again on SIGHUP"
    )
    max_concurrent_per_key: int | None = Field(
        default=None, ge=1, le=100_000, description="Requests of one key at the same time; unset: not limited"
    )
    requests_per_minute_per_key: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Requests of one key per minute; unset: not limited"
    )
    cors_allow_origins: Names = Field(
        default=(), description="Origins whose pages may call, separated by commas; unset: none"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged")
    log_format: Literal["text", "json"] = Field(default="text", description="Log lines for people or as JSON objects")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Options over the environment over the file that one of them names."""
        path = init_settings().get("config") or env_settings().get("config")
        file = () if path is None else (TomlConfigSettingsSource(settings_cls, toml_file=Path(path)),)
        return (init_settings, env_settings, *file)

    @property
    def torch_device(self) -> "torch.device":
        """``auto``: the first GPU, or the processor where there is none.

        Raises:
            QerveError: no such device here.
        """
        self.check_driver()
        import torch

        name = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise QerveError(f"device {name!r} is not known: choose auto, cpu, cuda or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise QerveError(f"device {name!r} is not supported: choose auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise QerveError(no_such_gpu(name, torch.cuda.device_count(), has_cuda=torch.version.cuda is not None))
        return device

    def check_driver(self) -> None:
        """Without importing PyTorch: raise QerveError when a GPU is asked for by name and none can be here."""
        if self.device.split(":")[0] == "cuda" and (obstacle := driver_obstacle()) is not None:
            raise QerveError(f"device {self.device!r} is not here: {obstacle}; choose --device cpu, or auto")

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """None: what suits the device."""
        import torch

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return dtypes.get(self.dtype)
