"""The part of ``qerve plan`` that is about serving on a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .cli_output import MIB, print_json
from .errors import QerveError
from .sizes import parse_size

if TYPE_CHECKING:
    from .build.planned import Plan
    from .llama.config import LlamaConfig
    from .llama.device_memory import ServingPlan

_MANIFEST = "quantization.json"


@dataclass(frozen=True, slots=True)
class Card:
    """The options: a card's memory and how much is served at a time; without ``device_memory`` there is no plan."""

    device_memory: str | None
    utilization: float
    max_num_seqs: int
    step_tokens: int
    kv_cache_dtype: str

    @property
    def total(self) -> int | None:
        """Bytes of the card's memory.

        Raises:
            QerveError: the option is no size.
        """
        try:
            size = parse_size(self.device_memory)
        except ValueError as error:
            raise QerveError(f"--device-memory: {error}") from error
        return size if isinstance(size, int) else None

    def check(self) -> None:
        """Raise QerveError for an option that is wrong, before any work is done."""
        if not 0 < self.utilization <= 1:
            raise QerveError(f"--gpu-memory-utilization {self.utilization:g}: give a share above 0, 1 at most")
        _ = self.total

    def of_artifact(self, path: Path) -> "ServingPlan":
        """Serving the artifact in ``path``.

        Raises:
            QerveError: it is damaged, no memory is given, or too little.
        """
        from .artifact.reader import Description
        from .artifact.serving import artifact_weight_bytes, largest_rank

        self.check()
        description = Description.read(path)
        plan = self._plan(description.config, artifact_weight_bytes(description), largest_rank(description))
        if plan is None:
            raise QerveError(f"{path} is built already: give --device-memory 24GiB to plan serving it on a GPU")
        return plan

    def of_plan(self, config: "LlamaConfig", plan: "Plan") -> "ServingPlan | None":
        """Serving what a planned build would make; None: no memory is given."""
        from .llama.device_memory import weight_bytes

        codes = [(layer.num_weights, layer.num_bits) for layer in plan.linears.values()]
        components = {str(name): size for name, size in plan.component_bytes.items()}
        rank = max((layer.rank for layer in plan.linears.values()), default=0)
        return self._plan(config, weight_bytes(components, codes), rank)

    def _plan(self, config: "LlamaConfig", weights: int, rank: int) -> "ServingPlan | None":
        import torch

        from .llama.decode_graphs import graph_sizes
        from .llama.device_memory import ServingShape, plan_serving

        if (total := self.total) is None:
            return None
        dtypes = {"auto": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
        shape = ServingShape(
            self.max_num_seqs, self.step_tokens, graph_sizes(self.max_num_seqs), num_graphs=2 if rank else 1
        )
        cache_dtype = dtypes[self.kv_cache_dtype]
        return plan_serving(config, weights, shape, total=total, utilization=self.utilization, cache_dtype=cache_dtype)


def is_artifact(path: str) -> bool:
    """``path`` is a directory with an artifact's manifest."""
    return (Path(path) / _MANIFEST).is_file()


def serving_rows(plan: "ServingPlan | None") -> dict[str, str]:
    """Name -> value of a table; nothing without a plan."""
    if plan is None:
        return {}
    rows = {"served on a GPU": f"{plan.memory.budget / MIB:.1f} of {plan.total / MIB:.1f} MiB"}
    rows |= {f"  {kind.replace('_', '-')}": f"{size / MIB:.1f} MiB" for kind, size in plan.memory.by_kind().items()}
    return rows | {"  tokens in the kv-cache": f"{plan.kv_tokens:,}"}


def print_serving(artifact: str, plan: "ServingPlan", *, as_json: bool) -> None:
    """The plan of serving an artifact."""
    if as_json:
        print_json({"artifact": artifact, "serving": plan.to_dict()})
        return
    table = Table(title=artifact, show_header=False, title_justify="left")
    for name, value in serving_rows(plan).items():
        table.add_row(name, value)
    Console().print(table)
