"""Text as it comes: whole characters only, nothing of a stop string, and in sum exactly the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from service.engine.detokenizer import MAX_PENDING_TOKENS, Detokenizer, StopMatcher, TextStream, TokenTexts
from tests.support.fake_model import EOS, ByteTokenizer

BYTES = ByteTokenizer()


class Spelling:
    """A real tokenizer of the ``tokenizers`` library behind the engine's interface."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids, skip_special_tokens=True):
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def sentencepiece_like():
    """As LLaMA-2's: words carry their leading space, unknown characters are spelled in byte tokens."""
    words = ["▁Hello", "▁world", "▁", "wor", "ld", "!", "▁a", "b"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return Spelling(tokenizer), len(words)


def stream_all(decoder, prompt, tokens):
    detokenizer = Detokenizer(decoder, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.text(max_size=30), st.text(max_size=30))
def test_deltas_of_valid_text_join_to_the_text_and_are_never_half_a_character(prompt, text):
    deltas = stream_all(BYTES, BYTES.encode(prompt), BYTES.encode(text))
    assert "".join(deltas) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@given(st.binary(max_size=MAX_PENDING_TOKENS), st.text(max_size=8))
def test_deltas_of_any_bytes_join_to_the_full_decoding(data, prompt):
    deltas = stream_all(BYTES, BYTES.encode(prompt), data)
    assert "".join(deltas) == data.decode("utf-8", errors="replace")


def test_every_text_is_shown_as_soon_as_it_is_complete():
    assert stream_all(BYTES, [], "aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_a_prompt_that_ends_inside_a_character_does_not_swallow_output():
    assert "".join(stream_all(BYTES, "€".encode()[:2], b"xyz")) == "xyz"


def test_a_prompt_that_ends_inside_a_character_of_byte_tokens_does_not_swallow_output():
    decoder, first_byte = sentencepiece_like()
    first, second, third = (first_byte + byte for byte in "€".encode())
    assert "".join(stream_all(decoder, [0, first, second], [third, 7, 7, 7])).endswith("bbb")


def test_endless_garbage_is_let_through_and_does_not_pile_up():
    detokenizer = Detokenizer(BYTES, [])
    deltas = [detokenizer.push(0x80) for _ in range(1000)]
    assert len("".join(deltas)) > 900
    assert max(map(len, deltas)) <= MAX_PENDING_TOKENS + 1


def test_endless_tokens_without_text_do_not_pile_up():
    decoded = []

    class Counting(ByteTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            decoded.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    assert "".join(stream_all(Counting(), BYTES.encode("hi"), [EOS] * 1000 + [ord("a")])) == "a"
    assert max(decoded) < 2 * MAX_PENDING_TOKENS


def test_a_word_keeps_its_space_after_the_prompt_and_loses_none_in_between():
    decoder, _ = sentencepiece_like()
    hello, world = 0, 1
    assert stream_all(decoder, [hello], [world, hello, 5]) == [" world", " Hello", "!", ""]


@given(st.lists(st.sampled_from(["w0", "w1", "w3", "w4", "w5", "w7", "é", "€", "😀"]), max_size=20))
def test_byte_fallback_text_joins_to_the_full_decoding(pieces):
    decoder, first_byte = sentencepiece_like()
    tokens = []
    for piece in pieces:
        tokens += [int(piece[1:])] if piece[0] == "w" else [first_byte + byte for byte in piece.encode()]
    prompt = [0]
    full = decoder.decode(prompt + tokens)[len(decoder.decode(prompt)) :]
    deltas = stream_all(decoder, prompt, tokens)
    assert "".join(deltas) == full
    assert not any("\ufffd" in delta for delta in deltas)


def cut(text, stops):
    """Character by character: the text before the first stop string to be completed, and whether there was one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    st.lists(st.text("ab", max_size=4), max_size=10),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces, stops):
    matcher = StopMatcher(stops)
    shown = ""
    whole, is_stopped = cut("".join(pieces), stops)
    for piece in pieces:
        shown += matcher.push(piece)
        assert whole.startswith(shown)
    shown += matcher.flush()
    assert (shown, matcher.is_stopped) == (whole, is_stopped)


def test_only_the_longest_possible_beginning_of_a_stop_string_is_held_back():
    matcher = StopMatcher(["\n\nUser:", "END"])
    assert [matcher.push(text) for text in ("Hi", "\n", "\nU", "x", " EN", "Dless")] == [
        "Hi",
        "",
        "",
        "\n\nUx",
        " ",
        "",
    ]
    assert matcher.is_stopped


@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_token_stream_stops_as_its_text_does(text, stops):
    stream = TextStream(Detokenizer(BYTES, []), StopMatcher(stops))
    shown = "".join(stream.push(token) for token in BYTES.encode(text)) + stream.flush()
    assert (shown, stream.is_stopped) == cut(text, stops)


def test_a_stop_string_of_the_replacement_character_is_found_in_the_last_flush():
    stream = TextStream(Detokenizer(BYTES, []), StopMatcher(["\ufffd"]))
    assert [stream.push(token) for token in b"a\xe2\x82"] == ["a", "", ""]
    assert not stream.is_stopped
    assert stream.flush() == ""
    assert stream.is_stopped


@pytest.mark.parametrize("stops", [[], ["x"]])
def test_without_a_match_everything_comes_out(stops):
    matcher = StopMatcher(stops)
    assert matcher.push("hello") + matcher.flush() == "hello"


def test_texts_of_single_tokens_are_asked_for_once_and_change_no_text():
    asked = []

    class Counting(ByteTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            asked.append(list(ids))
            return super().decode(ids, skip_special_tokens)

    text = "abab€abab"
    assert "".join(stream_all(TokenTexts(Counting()), [], BYTES.encode(text))) == text
    assert asked.count([ord("a")]) == asked.count([ord("b")]) == 1
