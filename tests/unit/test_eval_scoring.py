"""Log-likelihoods against a float64 double loop through transformers' network, and the rules that split a text."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from models.errors import EvaluationError
from models.evaluate.encoding import encode_pair, encode_text, prefix_token
from models.evaluate.generate import generate_greedily
from models.evaluate.load import load_for_evaluation
from models.evaluate.perplexity import LOGIT_ROWS
from models.evaluate.scoring import Request, context_length, score_requests
from tests.support.tiny_checkpoints import CORPUS, VOCAB_SIZE, write_checkpoint

CONTEXT = 128
BOS = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("scoring") / "tiny")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_for_evaluation(str(checkpoint), "cpu", "float32")


@pytest.fixture(scope="module")
def next_token(checkpoint):
    """token ids -> float64 log-probabilities of the token after them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()

    @functools.cache
    def log_probabilities(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)

    return log_probabilities


def expected(next_token, request, max_length=CONTEXT):
    """(log-likelihood, is greedy), one forward pass per scored token."""
    tokens = request.context + request.continuation
    first = max(0, len(tokens) - max_length - 1)
    total, is_greedy = 0.0, True
    for position in range(len(request.context), len(tokens)):
        row = next_token(tokens[first:position])
        total += row[tokens[position]].item()
        is_greedy &= row.argmax().item() == tokens[position]
    return total, is_greedy


def random_requests(count, longest=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low):
        length = int(torch.randint(low, longest, (1,), generator=generator))
        return tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())

    return [Request(tokens(1), tokens(1)) for _ in range(count)]


def close_to(scores, wanted):
    assert [score.log_likelihood for score in scores] == pytest.approx([total for total, _ in wanted], abs=2e-4)
    assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in wanted]


def test_scores_equal_a_double_loop_over_requests_and_tokens(loaded, next_token):
    requests = random_requests(12)
    scores = score_requests(loaded.model, requests, CONTEXT)
    close_to(scores, [expected(next_token, request) for request in requests])


def test_a_greedy_continuation_is_recognised_and_one_wrong_token_is_not(loaded, next_token):
    context = (5, 6, 7)
    written = ()
    for _ in range(4):
        written += (int(next_token(context + written).argmax()),)
    spoiled = (*written[:3], (written[3] + 1) % VOCAB_SIZE)
    scores = score_requests(loaded.model, [Request(context, written), Request(context, spoiled)], CONTEXT)
    assert [score.is_greedy for score in scores] == [True, False]


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 40, 10_000])
def test_batching_changes_neither_scores_nor_their_order(loaded, max_batch_tokens):
    requests = random_requests(40, seed=1)
    alone = [score_requests(loaded.model, [request], CONTEXT)[0] for request in requests]
    seen = []
    together = score_requests(
        loaded.model,
        requests,
        CONTEXT,
        max_batch_tokens=max_batch_tokens,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    close_to(together, [(score.log_likelihood, score.is_greedy) for score in alone])
    assert seen[-1] == (40, 40)
    assert seen == sorted(set(seen))


def test_one_token_answers_to_one_question_share_a_forward_pass(loaded, next_token):
    rows = []

    class Counting:
        device = loaded.model.device
        logits = staticmethod(loaded.model.logits)

        def __call__(self, batch):
            rows.append(batch.num_tokens)
            return loaded.model(batch)

    requests = [Request((3, 4, 5), (answer,)) for answer in (7, 8, 9, 7)]
    scores = score_requests(Counting(), requests, CONTEXT)
    assert rows == [3]
    close_to(scores, [expected(next_token, request) for request in requests])


def test_logits_are_computed_for_scored_rows_only_and_a_few_at_a_time(loaded):
    rows = []

    class Watching:
        device = loaded.model.device

        def __call__(self, batch):
            return loaded.model(batch)

        def logits(self, hidden):
            rows.append(len(hidden))
            return loaded.model.logits(hidden)

    requests = [Request(tuple(range(90)), (1, 2, index)) for index in range(50)]
    score_requests(Watching(), requests, CONTEXT)
    assert sum(rows) == 150
    assert max(rows) == LOGIT_ROWS


@pytest.mark.parametrize("num_context", [3, 7, 8, 9, 30])
def test_a_context_that_is_too_long_loses_its_beginning(loaded, next_token, num_context):
    request = Request(tuple(range(10, 10 + num_context)), (40, 41, 42))
    (score,) = score_requests(loaded.model, [request], 8)
    close_to([score], [expected(next_token, request, 8)])
    assert request.is_truncated(8) == (num_context + 3 > 9)
    assert len(request.inputs(8)) == min(8, num_context + 2)


@pytest.mark.parametrize("request_", [Request((), (1,)), Request((1,), ()), Request((1,), (2,) * 9)])
def test_a_request_that_cannot_be_scored_is_refused(loaded, request_):
    with pytest.raises(EvaluationError, match="request 0"):
        score_requests(loaded.model, [request_], 8)


def test_logits_that_are_not_finite_are_an_error(loaded):
    class Broken:
        device = loaded.model.device

        def __call__(self, batch):
            return loaded.model(batch)

        def logits(self, hidden):
            return loaded.model.logits(hidden) * float("nan")

    with pytest.raises(EvaluationError, match="not finite"):
        score_requests(Broken(), [Request((1,), (2,))], 8)


def test_the_context_is_the_models_own_unless_less_is_wanted(loaded):
    assert context_length(loaded.model, None) == CONTEXT
    assert context_length(loaded.model, 5) == 5
    with pytest.raises(EvaluationError, match="window 129"):
        context_length(loaded.model, CONTEXT + 1, "window")


words = st.sampled_from([*" ".join(CORPUS).split()[:40], " ", "  ", "\n", "é", "the"])


@settings(max_examples=200, deadline=None)
@given(st.lists(words, max_size=8).map("".join), st.lists(words, min_size=1, max_size=4).map("".join))
def test_a_split_text_is_the_whole_text_and_its_context_is_encoded_as_alone(tiny_tokenizer, context, continuation):
    kept = context.rstrip()
    try:
        request = encode_pair(tiny_tokenizer, context, continuation)
    except EvaluationError:
        whole, alone = tiny_tokenizer.encode(context + continuation), tiny_tokenizer.encode(kept)
        assert len(whole) <= len(alone)
        return
    if kept:
        assert list(request.context + request.continuation) == tiny_tokenizer.encode(context + continuation)
        assert len(request.context) == len(tiny_tokenizer.encode(kept))
    else:
        assert request.context == (BOS,)
        assert list(request.continuation) == tiny_tokenizer.encode(context + continuation)


@pytest.fixture(scope="module")
def tiny_tokenizer(loaded):
    return loaded.tokenizer


def test_spaces_at_the_end_of_the_context_move_to_the_continuation(tiny_tokenizer):
    assert encode_pair(tiny_tokenizer, "The river  ", "runs") == encode_pair(tiny_tokenizer, "The river", "  runs")


def test_a_continuation_that_starts_with_the_marker_needs_no_second_one(tiny_tokenizer):
    request = encode_pair(tiny_tokenizer, "", "<|im_start|>the mill")
    assert request.context == (BOS,)
    assert BOS not in request.continuation


@pytest.mark.parametrize(("context", "continuation"), [("The river", ""), ("", "")])
def test_nothing_to_score_is_an_error(tiny_tokenizer, context, continuation):
    with pytest.raises(EvaluationError, match="adds no token"):
        encode_pair(tiny_tokenizer, context, continuation)


class MarkingTokenizer:
    """Bytes behind a marker, as LLaMA's own tokenizer has one."""

    bos_token_id = 256
    eos_token_ids = frozenset({257, 258})

    def encode(self, text, add_special_tokens=True):
        marked = text.startswith("<s>")
        tokens = ([256] if marked else []) + list(text.removeprefix("<s>").encode())
        return [256, *tokens] if add_special_tokens else tokens

    def decode(self, ids, skip_special_tokens=True):
        return "".join(("" if skip_special_tokens else "<s>") if token == 256 else chr(token) for token in ids)


def test_a_marker_is_added_once_and_stands_in_the_context():
    tokenizer = MarkingTokenizer()
    assert encode_text(tokenizer, "ab") == [256, 97, 98]
    assert encode_text(tokenizer, "<s>ab") == [256, 97, 98]
    assert encode_pair(tokenizer, "a", "b") == Request((256, 97), (98,))
    assert encode_pair(tokenizer, "", "b") == Request((256,), (98,))


def test_a_text_without_bos_starts_from_eos_and_without_either_cannot_be_scored():
    tokenizer = MarkingTokenizer()
    tokenizer.bos_token_id = None
    assert prefix_token(tokenizer) == 257
    tokenizer.eos_token_ids = frozenset()
    assert encode_text(tokenizer, "ab") == [256, 97, 98]
    with pytest.raises(EvaluationError, match="neither a BOS"):
        prefix_token(tokenizer)


@pytest.mark.parametrize("num_new", [1, 6])
def test_greedy_generation_equals_the_network_without_a_cache(loaded, next_token, num_new):
    prompt = (5, 6, 7, 8)
    written = ()
    for _ in range(num_new):
        written += (int(next_token(prompt + written).argmax()),)
    assert tuple(generate_greedily(loaded.model, prompt, num_new, lambda _: False)) == written


def test_generation_ends_with_the_token_that_finished_it(loaded):
    assert len(generate_greedily(loaded.model, [5, 6], 50, lambda tokens: len(tokens) == 3)) == 3


@pytest.mark.parametrize(("device", "dtype"), [("cud", "auto"), ("cuda:99", "auto"), ("cpu", "int8"), ("cpu", "nn")])
def test_a_device_or_type_that_does_not_exist_is_named(checkpoint, device, dtype):
    with pytest.raises(EvaluationError, match=f"{device}|{dtype}"):
        load_for_evaluation(str(checkpoint), device, dtype)
