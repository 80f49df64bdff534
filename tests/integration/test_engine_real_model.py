"""The engine and the API over a tiny quantized network from an artifact, against plain loops without cache or batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.artifact.load import load_artifact
from models.evaluate.perplexity import perplexity
from models.llama.batch import Batch
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine, EngineObserver
from service.engine.request import Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from tests.support.api_server import live_loaded_server
from tests.support.artifact_builder import GENERATION_CONFIG, tiny_model, write_artifact
from tests.support.tiny_checkpoints import CORPUS, VOCAB_SIZE, tokenizer_files

PROMPTS = [
    "The river runs",
    "She counted 123 boats",
    "x",
    "def add(a, b):\n    return",
    "日本語, emoji 🙂",
    "The river runs on. " * 4,
]
NUM_TOKENS = 24


@pytest.fixture(scope="module", params=["auto", "reference"])
def loaded(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("artifacts") / "tiny"
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    write_artifact(directory, model, tokenizer_files=tokenizer_files())
    return load_artifact(directory, dtype=torch.float32, backend=request.param)


@pytest.fixture(scope="module")
def server(loaded):
    with live_loaded_server(loaded, model_name="tiny", max_num_seqs=3) as live:
        yield live


@torch.inference_mode()
def greedy(loaded, prompt, num_tokens=NUM_TOKENS):
    """argmax after argmax, the whole sequence through the network every time."""
    tokens = loaded.tokenizer.encode(prompt)
    start = len(tokens)
    for _ in range(num_tokens):
        hidden = loaded.model(Batch.uncached([tokens]))
        tokens.append(int(loaded.model.logits(hidden[-1:]).argmax()))
    return tokens[start:]


def generate(loaded, prompts, max_num_seqs, budget=512):
    cache = loaded.model.new_cache(24)
    scheduler = Scheduler(BlockManager(24), max_num_seqs, budget)
    engine = Engine(Runner(loaded.model, cache), scheduler, loaded.tokenizer, EngineObserver())
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [Request(str(i), loaded.tokenizer.encode(prompt), params) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize(("max_num_seqs", "budget"), [(1, 512), (3, 512), (5, 32), (5, 16), (2, 16)])
def test_batched_generation_is_the_uncached_loop_over_every_prompt(loaded, max_num_seqs, budget):
    want = [greedy(loaded, prompt) for prompt in PROMPTS]
    assert generate(loaded, PROMPTS, max_num_seqs, budget) == want
    assert len({tuple(tokens) for tokens in want}) == len(PROMPTS)  # the network does look at its input


def test_text_over_http_is_that_of_the_uncached_loop(server, loaded):
    body = {"model": "tiny", "prompt": PROMPTS, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    answer = server.post("/v1/completions", json=body).json()
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        tokens = loaded.tokenizer.encode(prompt)
        whole = loaded.tokenizer.decode(tokens + greedy(loaded, prompt))
        assert choice["text"] == whole[len(loaded.tokenizer.decode(tokens)) :]


def test_a_chat_uses_the_models_template_without_a_second_marker(server, loaded):
    messages = [{"role": "user", "content": "Hello"}]
    answer = server.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    rendered = loaded.tokenizer.apply_chat_template(messages)
    assert answer["usage"]["prompt_tokens"] == len(loaded.tokenizer.encode(rendered, add_special_tokens=False))


def test_perplexity_over_http_is_that_of_the_offline_function_and_of_the_definition(server, loaded):
    text = "\n".join(CORPUS)
    tokens = loaded.tokenizer.encode(text)
    answer = server.post("/v1/perplexity", json={"text": text, "window": 32, "return_token_nlls": True}).json()
    offline = perplexity(loaded.model, tokens, window=32)
    assert answer["nll"] == pytest.approx(offline.nll, rel=1e-6)
    nlls = []
    for start in range(0, len(tokens), 32):
        window = torch.tensor(tokens[start : start + 32])
        with torch.inference_mode():
            logits = loaded.model.logits(loaded.model(Batch.uncached(window[None])))
        nlls += F.cross_entropy(logits[:-1].double(), window[1:], reduction="none").tolist()
    assert answer["token_nlls"] == pytest.approx(nlls, rel=1e-4, abs=1e-5)
    assert answer["perplexity"] == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-4)


def test_the_model_card_and_metrics_tell_what_the_artifact_is(server, loaded):
    card = server.get("/v1/models/tiny").json()
    manifest = loaded.manifest
    assert card["max_model_len"] == 128
    assert card["artifact"]["rank"] == 4
    schemes = [
        {name: scheme[name] for name in ("num_bits", "group_size", "is_symmetric")}
        for scheme in card["artifact"]["schemes"]
    ]
    assert schemes == [{"num_bits": 4, "group_size": 32, "is_symmetric": False}]
    assert card["artifact"]["effective_bits"] == manifest.effective_bits
    assert sum(card["backends"].values()) == len(manifest.linears)
    stored = sum(manifest.component_bytes.values())
    assert server.metric("qerve_model_weight_bytes") == stored
    assert server.metric("qerve_model_weight_bytes", component="lowrank_a") == manifest.component_bytes["lora_down"]
    assert server.metric("qerve_build_info", scheme="w4g32", rank="4") == 1


def test_every_end_token_of_the_generation_config_ends_a_text(loaded):
    assert set(GENERATION_CONFIG["eos_token_id"]) <= loaded.tokenizer.eos_token_ids
