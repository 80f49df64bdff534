"""API keys: what a file may say, who is found, what stays when it changes; and what a key may ask for."""

import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import QerveError
from service.key_limits import KeyLimitError, KeyLimits
from service.keys import ANONYMOUS, KeyRing


@pytest.fixture
def key_file(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "keys"
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    return write


def test_keys_are_found_by_their_name(key_file):
    ring = KeyRing("from-the-environment", key_file("# people\nalice:one:with:colons\n\n  bob: two \nthree\n"))
    assert ring.find("one:with:colons") == "alice"
    assert ring.find("two") == "bob"
    unnamed = {ring.find("three"), ring.find("from-the-environment")}
    assert len(unnamed) == 2
    assert all(name.startswith("key-") for name in unnamed)
    for wrong in ("", "alice", "one", "alice:one:with:colons", "# people", "THREE"):
        assert ring.find(wrong) is None
    assert len(ring) == 4


def test_an_unnamed_keys_id_is_the_same_tomorrow_and_not_the_key(key_file):
    first, second = KeyRing("secret", None), KeyRing(None, key_file("other\nsecret\n"))
    assert first.find("secret") == second.find("secret")
    assert "secret" not in first.find("secret")


def test_two_keys_of_one_name_are_one_client(key_file):
    ring = KeyRing(None, key_file("alice:old\nalice:new\n"))
    assert ring.find("old") == ring.find("new") == "alice"


def test_without_keys_everybody_is_let_in():
    assert KeyRing(None, None).is_open
    assert not KeyRing("x", None).is_open


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("alice:\n", "line 1: there is no key after the name"),
        ("one\nal ice:two\n", "line 2: write KEY or NAME:KEY"),
        ("a:one\nb:one\n", "line 2: this key is there twice"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_telling_keys(key_file, text, words):
    with pytest.raises(QerveError, match=words):
        KeyRing(None, key_file(text))


def test_a_file_that_is_missing_or_no_text_is_refused(key_file, tmp_path):
    with pytest.raises(QerveError, match="No such file"):
        KeyRing(None, tmp_path / "nothing")
    path = key_file("x")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(QerveError, match="not UTF-8"):
        KeyRing(None, path)


@pytest.mark.parametrize(("mode", "is_warned"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_a_file_that_everybody_can_read_is_warned_about(key_file, caplog, mode, is_warned):
    caplog.set_level(logging.WARNING)
    KeyRing(None, key_file("secret\n", mode))
    assert ("chmod o-r" in caplog.text) == is_warned
    assert "secret" not in caplog.text


def test_a_reload_that_fails_leaves_the_keys_as_they_were(key_file):
    ring = KeyRing(None, key_file("alice:one\n"))
    key_file("")
    with pytest.raises(QerveError):
        ring.reload()
    assert ring.find("one") == "alice"
    key_file("alice:two\n")
    ring.reload()
    assert (ring.find("one"), ring.find("two")) == (None, "alice")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@given(st.lists(st.floats(0.0, 40.0), max_size=60), st.integers(1, 30))
def test_no_minute_has_more_requests_than_two_allowances_and_waiting_as_told_is_enough(pauses, per_minute):
    clock = Clock()
    limits = KeyLimits(None, per_minute, clock)
    taken = []
    for pause in pauses:
        clock.now += pause
        try:
            limits.acquire("alice")
        except KeyLimitError as error:
            assert error.retry_seconds >= 1
            clock.now += error.retry_seconds
            limits.acquire("alice")
        limits.release("alice")
        taken.append(clock.now)
    for start in taken:
        # A full bucket, and what it gains in a minute.
        assert sum(start <= time < start + 60 for time in taken) <= 2 * per_minute + 1


def test_a_bucket_holds_a_minutes_worth_and_no_more():
    clock = Clock()
    limits = KeyLimits(None, 3, clock)
    clock.now += 1e6
    for _ in range(3):
        limits.acquire("alice")
    with pytest.raises(KeyLimitError, match="3 requests per minute") as caught:
        limits.acquire("alice")
    assert caught.value.retry_seconds == 20
    limits.acquire("bob")
    clock.now += 20
    limits.acquire("alice")


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_running_requests_are_counted_per_key_and_given_back(seed, most):
    chance, limits = random.Random(seed), KeyLimits(most, None)
    running = {"alice": 0, "bob": 0}
    for _ in range(60):
        key = chance.choice(["alice", "bob"])
        if running[key] and chance.random() < 0.5:
            limits.release(key)
            running[key] -= 1
            continue
        try:
            limits.acquire(key)
            running[key] += 1
        except KeyLimitError as error:
            assert running[key] == most
            assert error.retry_seconds == 1
        assert running[key] <= most
    assert {key: limits.num_running(key) for key in running} == running


def test_a_refused_request_takes_no_place():
    limits = KeyLimits(1, None)
    limits.acquire(ANONYMOUS)
    for _ in range(3):
        with pytest.raises(KeyLimitError, match="1 requests under way"):
            limits.acquire(ANONYMOUS)
    limits.release(ANONYMOUS)
    limits.acquire(ANONYMOUS)
