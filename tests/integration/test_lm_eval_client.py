"""lm_eval's ``local-completions`` client, unchanged, scores and generates through the server."""

import json

import pytest
import torch

from tests.support.api_server import live_server
from tests.support.fake_model import ByteTokenizer, FakeModel, state_of

lm_eval = pytest.importorskip("lm_eval")
TOKENIZER = ByteTokenizer()
MODEL = FakeModel()


@pytest.fixture
def tokenizer_directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<begin>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def scored(context, continuation):
    """Oracle: log-probability of ``continuation`` after ``context``, and whether it is the greedy one."""
    tokens, total, is_greedy = TOKENIZER.encode(context), 0.0, True
    for token in TOKENIZER.encode(continuation):
        logprobs = torch.log_softmax(MODEL.logits(torch.tensor([[float(state_of(tokens))]]))[0].double(), dim=-1)
        total += logprobs[token].item()
        is_greedy &= int(logprobs.argmax()) == token
        tokens.append(token)
    return total, is_greedy


@pytest.mark.filterwarnings("ignore")
def test_loglikelihoods_and_generations_are_the_models(tokenizer_directory, monkeypatch):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    greedy = TOKENIZER.decode(MODEL.continue_greedily(TOKENIZER.encode("once"), 8))
    pairs = [("hello", " world"), ("once", greedy), ("a b c", "d")]
    with live_server() as server:
        client = LocalCompletionsAPI(
            base_url=server.url + "/v1/completions",
            model="fake",
            tokenizer_backend="huggingface",
            tokenizer=str(tokenizer_directory),
            max_length=255,
            batch_size=2,
        )
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        for got, pair in zip(client.loglikelihood(requests), pairs, strict=True):
            total, is_greedy = scored(*pair)
            assert got == (pytest.approx(total, abs=1e-3), is_greedy)
        options = {"until": ["\n"], "max_gen_toks": 8}
        (text,) = client.generate_until([Instance("generate_until", {}, ("once", options), 0)])
        assert text == greedy
