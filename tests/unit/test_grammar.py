"""Structured output: whatever a model prefers, a finished text keeps to its grammar; bad grammars are refused."""

import asyncio
import json
import re
import time

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.kv_cache import PagedKVCache
from service import grammar as grammar_module
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine, EngineObserver
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from service.grammar import MAX_CACHED, MAX_GRAMMAR_BYTES, GrammarCompiler
from service.grammar_source import BadGrammarError, GrammarSource
from tests.support.fake_model import EOS, VOCAB_SIZE, ByteTokenizer, RandomModel
from tests.support.grammars import hold_grammar

TOKENIZER = ByteTokenizer()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b", 3, None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["age", "kind"],
    "additionalProperties": False,
}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
PAIR = {"type": "array", "prefixItems": [DIGIT, {"type": "null"}], "minItems": 2, "maxItems": 2}
SCHEMAS = [
    PERSON,
    {"type": "integer", "minimum": -5, "maximum": 500},
    {"type": "string", "pattern": "^[ab]{2,5}$"},
    {"type": "array", "items": {"$ref": "#/$defs/pair"}, "minItems": 1, "maxItems": 2, "$defs": {"pair": PAIR}},
    {"anyOf": [{"const": {"x": [1, 2]}}, {"type": "boolean"}]},
    {"type": "object", "maxProperties": 0},
]


def make_compiler(**values):
    return GrammarCompiler(TOKENIZER.to_json, TOKENIZER.eos_token_ids, VOCAB_SIZE, **values)


def compile_all(sources, compiler=None):
    async def run():
        chosen = compiler or make_compiler()
        return [await chosen.compile(source) for source in sources]

    return asyncio.run(run())


def json_source(schema):
    return GrammarSource("json", json.dumps(schema))


GRAMMARS = compile_all(
    [json_source(schema) for schema in SCHEMAS]
    + [
        GrammarSource("regex", "(ab|c){1,4}!"),
        GrammarSource("choice", '["yes", "no", "n\\"o\\\\"]'),
        GrammarSource("lark", 'start: item ("," item)*\nitem: /[0-9]{1,3}/'),
    ]
)


def validates(place, text):
    """An oracle of its own for each of ``GRAMMARS``."""
    if place < len(SCHEMAS):
        jsonschema.validate(json.loads(text), SCHEMAS[place], jsonschema.Draft202012Validator)
        return True
    if place == len(SCHEMAS) + 1:
        return text in ["yes", "no", 'n"o\\']
    return re.fullmatch(["(ab|c){1,4}!", "", r"[0-9]{1,3}(,[0-9]{1,3})*"][place - len(SCHEMAS)], text) is not None


def generate(requests):
    """Text and finish reason of each of ``requests``, run together."""
    model = RandomModel(context=512)
    runner = Runner(model, PagedKVCache(model.config, 256))
    engine = Engine(runner, Scheduler(BlockManager(256), 8, 512), TOKENIZER, EngineObserver())
    texts, ends = {}, {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] = texts.get(output.request_id, "") + output.text
            if output.finish_reason:
                ends[output.request_id] = output
    return texts, ends


def make_request(name, grammar, **values):
    params = SamplingParams(**{"max_tokens": 200, "grammar": grammar, **values})
    return Request(name, TOKENIZER.encode("say: "), params)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "top_k": st.sampled_from([1, 20]),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 30),
        "num_logprobs": st.integers(0, 3),
    },
)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.lists(OPTIONS, min_size=len(GRAMMARS), max_size=len(GRAMMARS)))
def test_every_text_that_is_finished_keeps_to_its_grammar(seed, options):
    requests = [
        make_request(str(place), grammar, **{"seed": seed + place, **values})
        for place, (grammar, values) in enumerate(zip(GRAMMARS, options, strict=True))
    ]
    texts, ends = generate(requests)
    for place in range(len(GRAMMARS)):
        end = ends[str(place)]
        assert end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), end
        if end.finish_reason is FinishReason.STOP:
            assert validates(place, texts[str(place)]), texts[str(place)]


def test_most_texts_are_finished_and_differ():
    requests = [
        make_request(f"{place}-{seed}", grammar, seed=seed)
        for place, grammar in enumerate(GRAMMARS)
        for seed in range(4)
    ]
    texts, ends = generate(requests)
    finished = [name for name, end in ends.items() if end.finish_reason is FinishReason.STOP]
    assert len(finished) > 0.8 * len(requests)
    assert len({texts[name] for name in finished}) > 15


def test_a_text_without_a_grammar_is_none_of_that():
    texts, _ = generate([make_request("plain", None, seed=1)])
    with pytest.raises(ValueError):
        json.loads(texts["plain"])


def test_a_grammar_that_is_complete_ends_the_request_whatever_else_it_says():
    (grammar,) = compile_all([GrammarSource("choice", '["abc"]')])
    texts, ends = generate([make_request("a", grammar, ignore_eos=True, min_tokens=50)])
    assert texts == {"a": "abc"}
    assert (ends["a"].finish_reason, ends["a"].num_output_tokens) == (FinishReason.STOP, 3)


def test_what_a_text_may_end_with_or_go_on_with_goes_on_until_min_tokens():
    (grammar,) = compile_all([GrammarSource("regex", "[0-9]+")])
    bias = ((EOS, 100.0),)
    texts, _ = generate([make_request("a", grammar, min_tokens=7, logit_bias=bias)])
    assert re.fullmatch("[0-9]{7}", texts["a"])


def test_a_stop_string_ends_a_text_inside_its_grammar():
    (grammar,) = compile_all([GrammarSource("choice", '["one two three"]')])
    texts, ends = generate([make_request("a", grammar, stop=(" three",))])
    assert (texts["a"], ends["a"].finish_reason) == ("one two", FinishReason.STOP)


def test_requests_of_one_grammar_do_not_disturb_each_other():
    grammar = GRAMMARS[0]
    alone = [generate([make_request("a", grammar, seed=seed)])[0]["a"] for seed in range(3)]
    together, _ = generate([make_request(str(seed), grammar, seed=seed) for seed in range(3)])
    assert [together[str(seed)] for seed in range(3)] == alone


def test_a_grammar_that_contradicts_the_allowed_tokens_fails_its_request_only():
    requests = [make_request("bad", GRAMMARS[0], allowed_token_ids=(5,)), make_request("good", GRAMMARS[1], seed=3)]
    texts, ends = generate(requests)
    assert (ends["bad"].finish_reason, ends["bad"].is_refused) == (FinishReason.ERROR, True)
    assert "no token is left" in ends["bad"].error
    assert validates(1, texts["good"])


def test_a_grammar_that_grows_too_complex_fails_its_request_and_says_so():
    ambiguous = GrammarSource("lark", 'start: e\ne: e e e | e e | "a" | "b" | "c"')
    (grammar,) = compile_all([ambiguous])
    _, ends = generate([make_request("a", grammar, bad_words=((EOS,),))])
    assert ends["a"].is_refused
    assert "cannot go on" in ends["a"].error
    assert "<" not in ends["a"].error


def test_a_grammar_that_takes_too_long_for_a_token_fails_its_request_and_says_so(monkeypatch):
    (grammar,) = compile_all([GrammarSource("regex", "[a-z]*")])
    monkeypatch.setattr(grammar_module, "MAX_TOKEN_SECONDS", -1.0)
    _, ends = generate([make_request("a", grammar)])
    assert ends["a"].is_refused
    assert "takes too long" in ends["a"].error


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (json_source({"type": "nonsense"}), "Invalid type"),
        (json_source({"$ref": "https://example.com/schema"}), "outside the schema"),
        (json_source({"properties": {"a": {"items": {"$ref": "other.json"}}}}), "outside the schema"),
        (json_source({"$ref": "#/nowhere"}), "nowhere"),
        (json_source({"not": {"type": "string"}}), "not"),
        (json_source({"x-guidance": {"lenient": True}, "not": {"type": "string"}}), "not"),
        (json_source({"enum": []}), "Unsatisfiable"),
        (json_source({"multipleOf": 999_983, "type": "integer"}), "multipleOf"),
        (json_source({"allOf": [{"multipleOf": 9967}, {"multipleOf": 0.9973}]}), "multipleOf"),
        (json_source([1]), "object"),
        (json_source({"enum": ["x" * MAX_GRAMMAR_BYTES]}), "bytes; at most"),
        (GrammarSource("regex", "("), "unclosed group"),
        (GrammarSource("lark", "start: missing"), "unknown name"),
        (GrammarSource("lark", ""), "Empty grammar"),
    ],
)
def test_a_bad_grammar_says_what_is_wrong_with_it(source, words):
    with pytest.raises(BadGrammarError, match=words) as caught:
        compile_all([source])
    assert len(str(caught.value)) < 500
    assert "Tokens:" not in str(caught.value)


def test_a_grammar_just_within_the_limit_is_compiled():
    text = json.dumps({"const": ""})
    compile_all([json_source({"const": "x" * (MAX_GRAMMAR_BYTES - len(text.encode()))})])


def test_multiples_within_the_limit_are_kept_to():
    (grammar,) = compile_all([json_source({"type": "integer", "multipleOf": 25, "minimum": 1, "maximum": 1000})])
    texts, ends = generate([make_request(str(seed), grammar, seed=seed) for seed in range(5)])
    numbers = [int(texts[name]) for name, end in ends.items() if end.finish_reason is FinishReason.STOP]
    assert numbers
    assert all(number % 25 == 0 for number in numbers)


def test_grammars_are_compiled_once_and_the_latest_are_remembered(monkeypatch):
    compiled = []
    original = grammar_module.definition_of
    monkeypatch.setattr(grammar_module, "definition_of", lambda source: compiled.append(source) or original(source))
    compiler = make_compiler()
    sources = [GrammarSource("regex", f"a{{{number}}}") for number in range(1, MAX_CACHED + 2)]
    first, again = compile_all([sources[0], sources[0]], compiler)
    assert first is again
    compile_all([*sources, sources[0], sources[-1]], compiler)
    assert compiled == [sources[0], *sources[1:], sources[0]]


def test_a_grammar_that_takes_too_long_is_given_up_and_others_are_compiled_still(monkeypatch):
    release = hold_grammar(monkeypatch, "slow")

    async def run():
        compiler = make_compiler(seconds=0.5)
        await compiler.compile(GrammarSource("regex", "warm"))
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(BadGrammarError, match="not compiled within"):
                await compiler.compile(GrammarSource("regex", "slow"))
            assert await compiler.compile(GrammarSource("regex", "warm"))
        assert time.monotonic() - started < 20
        with pytest.raises(BadGrammarError, match="try again later"):
            await compiler.compile(GrammarSource("regex", "next"))
        release.set()
        while True:
            try:
                return await compiler.compile(GrammarSource("regex", "next"))
            except BadGrammarError:
                await asyncio.sleep(0.01)

    assert asyncio.run(run()).start().allowed(VOCAB_SIZE).any()


def test_a_model_without_an_end_of_text_has_no_grammars():
    compiler = GrammarCompiler(TOKENIZER.to_json, frozenset(), VOCAB_SIZE)
    with pytest.raises(BadGrammarError, match="no token that ends a text"):
        compile_all([GrammarSource("regex", "a")], compiler)


def test_rows_of_the_head_beyond_the_tokenizer_are_never_allowed():
    compiler = GrammarCompiler(TOKENIZER.to_json, TOKENIZER.eos_token_ids, VOCAB_SIZE + 62)
    (grammar,) = compile_all([GrammarSource("regex", "(?s:.)*")], compiler)
    allowed = grammar.start().allowed(VOCAB_SIZE + 62)
    assert allowed.dtype == np.bool_
    assert allowed[EOS]
    assert allowed[ord("a")]
    assert not allowed[VOCAB_SIZE:].any()
