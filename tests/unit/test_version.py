"""Which commit is served: what the build of an image says, or what pip recorded."""

import json
from importlib.metadata import PackageNotFoundError

import pytest

from service import version


class Installed:
    def __init__(self, record):
        self._text = None if record is None else json.dumps(record)

    def read_text(self, name):
        assert name == "direct_url.json"
        return self._text


@pytest.mark.parametrize(
    ("variable", "record", "commit"),
    [
        ("abc", {"vcs_info": {"commit_id": "def"}}, "abc"),
        ("", {"vcs_info": {"commit_id": "def"}}, "def"),
        ("", {"url": "file:///x", "dir_info": {"editable": True}}, ""),
        ("", None, ""),
    ],
)
def test_the_variable_comes_before_what_pip_recorded(monkeypatch, variable, record, commit):
    monkeypatch.setenv("QERVE_GIT_SHA", variable)
    monkeypatch.setattr(version, "distribution", lambda name: Installed(record))
    assert version.git_sha() == commit


def test_from_a_source_tree_it_is_not_known(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.delenv("QERVE_GIT_SHA", raising=False)
    monkeypatch.setattr(version, "distribution", missing)
    assert version.git_sha() == ""
