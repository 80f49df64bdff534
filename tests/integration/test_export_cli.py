"""``qerve export`` from the command line, and the libraries that read what it writes."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from models.artifact.load import load_artifact
from models.cli import make_cli
from models.errors import ExportError
from models.export.compose import compose_adapters
from models.llama.batch import Batch
from models.scheme import QuantScheme
from tests.support.artifact_builder import LinearKind
from tests.support.exports import exportable, write_exportable

# peft asks transformers for a name that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.arange(7, 47)[None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "artifact"
    write_exportable(path, exportable(LinearKind(QuantScheme(3, 32), rank=5)))
    return path


def run(*arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(make_cli(), ["export", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in arguments else {"text": result.stdout}


@torch.inference_mode()
def reference(artifact: Path) -> Tensor:
    model = load_artifact(artifact, dtype=torch.float32, backend="reference").model
    return model.logits(model(Batch.uncached(TOKENS, torch.device("cpu"))))


@torch.inference_mode()
def logits_of(model: torch.nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-3 of what separates tokens; these random networks have logits of 50."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.std()))


def test_transformers_loads_a_dense_export(artifact: Path, tmp_path: Path) -> None:
    values = run("dense", artifact, tmp_path / "out", "--dtype", "float32", "--json")
    assert values["top1_agreement"] == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert_close(logits_of(model), reference(artifact))
    assert "bfloat16" in str(run("dense", artifact, tmp_path / "half")["text"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_peft_loads_base_and_adapter_and_trains_the_adapter_alone(artifact: Path, tmp_path: Path) -> None:
    run("peft", artifact, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"), is_trainable=True)
    assert_close(logits_of(model), reference(artifact))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 28
    assert all("lora_" in name for name in trained)


def test_joined_adapters_add_up(artifact: Path, tmp_path: Path) -> None:
    run("peft", artifact, tmp_path / "out")
    base_path, own = tmp_path / "out" / "base", tmp_path / "out" / "adapter"
    user = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_path),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    user.save_pretrained(tmp_path / "user")
    assert "rank 16" in str(run("compose-adapter", tmp_path / "out", tmp_path / "user", tmp_path / "both")["text"])

    def with_adapter(*paths: Path) -> Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), str(paths[0]), "first")
        for path in paths[1:]:
            model.load_adapter(str(path), "second")
        model.base_model.set_adapter(["first", "second"][: len(paths)])
        return logits_of(model)

    assert_close(with_adapter(tmp_path / "both"), with_adapter(own, tmp_path / "user"))
    assert not torch.allclose(with_adapter(tmp_path / "both"), with_adapter(own), atol=0.1)


def test_adapters_that_cannot_be_joined_are_refused(artifact: Path, tmp_path: Path) -> None:
    run("peft", artifact, tmp_path / "out")
    adapter = tmp_path / "out" / "adapter"
    with pytest.raises(ExportError, match="is missing"):
        compose_adapters(tmp_path / "out", tmp_path, tmp_path / "both")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "IA3"}, "only LORA"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ExportError, match=message):
            compose_adapters(tmp_path / "out", adapter, tmp_path / "both")


def test_rank_stabilised_scaling_is_taken_into_the_joined_adapter(artifact: Path, tmp_path: Path) -> None:
    run("peft", artifact, tmp_path / "out")
    base_path = tmp_path / "out" / "base"
    settings = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["v_proj"], init_lora_weights=False)
    user = get_peft_model(AutoModelForCausalLM.from_pretrained(base_path), settings)
    expected = user.base_model.model.model.layers[1].self_attn.v_proj.get_delta_weight("default")
    user.save_pretrained(tmp_path / "user")
    compose_adapters(tmp_path / "user", tmp_path / "user", tmp_path / "both")
    twice = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), str(tmp_path / "both"))
    found = twice.base_model.model.model.layers[1].self_attn.v_proj.get_delta_weight("default")
    torch.testing.assert_close(found, 2 * expected)


def test_fine_tuning_needs_something_to_begin_with(tmp_path: Path) -> None:
    write_exportable(tmp_path / "artifact", exportable(LinearKind(QuantScheme(4, 32), form="none", rank=0)))
    result = CliRunner().invoke(make_cli(), ["export", "peft", str(tmp_path / "artifact"), str(tmp_path / "out")])
    assert isinstance(result.exception, ExportError)
    assert "qera-exact" in str(result.exception)


def test_nf4_base_is_exact(tmp_path: Path) -> None:
    kind = LinearKind(QuantScheme(format="nf4", group_size=64))
    write_exportable(tmp_path / "artifact", exportable(kind))
    values = run("peft", tmp_path / "artifact", tmp_path / "out", "--base", "nf4", "--json")
    assert float(str(values["worst_weight_error"])) < 1e-7


def test_every_verb_verifies(artifact: Path, tmp_path: Path) -> None:
    for verb in ("vllm", "gguf"):
        run(verb, artifact, tmp_path / verb)
        assert "largest difference" in str(run("verify", tmp_path / verb, "--artifact", artifact)["text"])
    result = CliRunner().invoke(make_cli(), ["export", "verify", str(tmp_path)])
    assert isinstance(result.exception, ExportError)
