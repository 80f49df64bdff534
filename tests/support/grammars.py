"""Grammars that take their time."""

import threading

import pytest

from service import grammar as grammar_module
from service.grammar_source import GrammarSource, definition_of


def hold_grammar(monkeypatch: pytest.MonkeyPatch, text: str) -> threading.Event:
    """Let the compiling of the grammar ``text`` wait until the event that is returned, 30 seconds at most."""
    release = threading.Event()

    def slow(source: GrammarSource) -> str:
        if source.text == text:
            release.wait(30)
        return definition_of(source)

    monkeypatch.setattr(grammar_module, "definition_of", slow)
    return release
