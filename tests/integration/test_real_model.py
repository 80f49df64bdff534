"""SmolLM2-135M, quantized and served for real: the quality of each bit width, the client, and one number two ways."""

from dataclasses import replace

import openai
import pytest

from models.artifact.load import load_artifact
from models.build import build_artifact
from models.config import BuildConfig, CalibrationConfig, ReconstructConfig
from models.evaluate.load import load_for_evaluation
from models.evaluate.perplexity import perplexity
from models.llama.checkpoint import open_checkpoint
from models.scheme import QuantScheme
from tests.support.api_server import live_loaded_server
from tools.demo import PERPLEXITY_TEXT

pytestmark = pytest.mark.real_model
W4 = BuildConfig(
    scheme=QuantScheme(num_bits=4, group_size=64),
    reconstruct=ReconstructConfig(method="lqer", rank=8),
    calibration=CalibrationConfig(source="none"),
)


@pytest.fixture(scope="module")
def artifact(smollm2_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "smollm2-w4"
    build_artifact(open_checkpoint(str(smollm2_gguf)), out, W4)
    return out


@pytest.fixture(scope="module")
def loaded(artifact):
    return load_artifact(artifact)


@pytest.fixture(scope="module")
def server(loaded):
    with live_loaded_server(loaded, model_name="smollm2", max_num_seqs=4) as live:
        yield live


def test_the_client_gets_a_sensible_answer(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with client:
        answer = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=24, temperature=0)
    assert "Paris" in answer.choices[0].message.content


def test_offline_and_served_perplexity_agree(loaded, server):
    text = PERPLEXITY_TEXT * 3
    request = {"model": "smollm2", "text": text, "window": 64, "stride": 32}
    served = server.post("/v1/perplexity", json=request).json()
    offline = perplexity(loaded.model, loaded.tokenizer.encode(text), window=64, stride=32)
    assert served["num_tokens"] == offline.num_tokens
    assert served["nll"] == pytest.approx(offline.nll, abs=1e-4)
    assert served["perplexity"] == pytest.approx(offline.perplexity, rel=1e-4)


def test_weights_stay_packed_in_memory(loaded):
    num_weights = sum(shape.out_features * shape.in_features for shape in loaded.model.config.linear_shapes().values())
    others = {"unquantized", "head", "embedding", "norms"}
    in_layers = sum(size for name, size in loaded.resident_bytes.items() if name not in others)
    assert in_layers * 8 / num_weights < loaded.manifest.effective_bits + 1


@pytest.mark.slow
def test_four_bits_stay_near_the_dense_model_and_two_bits_do_not(smollm2_gguf, loaded, tmp_path):
    w2 = replace(W4, scheme=QuantScheme(num_bits=2, group_size=64))
    build_artifact(open_checkpoint(str(smollm2_gguf)), tmp_path / "w2", w2)
    dense = load_for_evaluation(str(smollm2_gguf), "cpu", "float32")
    token_ids = loaded.tokenizer.encode(PERPLEXITY_TEXT)
    models = (dense.model, loaded.model, load_artifact(tmp_path / "w2").model)
    best, four_bit, two_bit = (perplexity(model, token_ids).perplexity for model in models)
    assert four_bit == pytest.approx(best, rel=0.25)
    assert two_bit > 2 * four_bit
