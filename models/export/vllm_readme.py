"""The page beside an export for vLLM: the line that serves it, and what would go wrong silently."""

from .vllm_plan import VllmPlan

_CORRECTED = """\
# {name} for vLLM

`base/` holds the quantized weights, `adapter/` the low-rank correction of their error as a LoRA adapter of rank {rank}.

```
VLLM_BATCH_INVARIANT=1 VLLM_CPU_INT4_W4A8=0 vllm serve base --served-model-name {name}-uncorrected --dtype {dtype} \\
    --enable-lora --max-lora-rank {rank} --max-loras 1 \\
    --lora-modules '{{"name": "{name}", "path": "adapter", "base_model_name": "{name}-uncorrected"}}'
```

Ask for `"model": "{name}"`.

- A request for `{name}-uncorrected` is answered too, silently without the correction.
- vLLM takes one adapter per request. To use one of your own as well, join the two first:
  `qerve export compose-adapter THIS_DIRECTORY YOUR_ADAPTER OUT`, and serve OUT as the adapter.
- `VLLM_BATCH_INVARIANT=1` (GPU): without it the adapter's products are summed in no fixed order, and equal requests may
  differ.
"""
_PLAIN = """\
# {name} for vLLM

`base/` holds the quantized weights; there is no correction beside them.

```
VLLM_CPU_INT4_W4A8=0 vllm serve base --served-model-name {name} --dtype {dtype}
```

"""
_COMMON = """\
- `VLLM_CPU_INT4_W4A8=0` (processors with AMX): without it 4-bit weights meet inputs rounded to 8 bits when the type is
  bfloat16. The numbers are then not those of this export.
- `--dtype {dtype}` is the type that the scales are stored in.
- `verification.json` says how far these files are from the artifact; `qerve export verify THIS_DIRECTORY` measures
  again.
"""


def vllm_readme(name: str, dtype: str, plan: VllmPlan) -> str:
    """Content of ``README.md``."""
    template = (_CORRECTED if plan.rank else _PLAIN) + _COMMON
    notes = "".join(f"- {note}.\n" for note in plan.notes)
    return template.format(name=name, dtype=dtype, rank=plan.rank) + notes
