"""The README says what is there."""

import re

import pytest

from tests.conftest import ROOT
from tools.readme_tree import BEGIN, END, summary, tracked_files, tree

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_tree_is_up_to_date():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the list of files is unknown")
    shown = README.split(BEGIN)[1].split(END)[0].strip()
    assert shown == tree(), "run `make tree`"


def test_every_source_file_says_what_it_is_for():
    silent = [str(path) for path in tracked_files() if path.suffix == ".py" and path.parts[0] != "tests"]
    silent = [name for name in silent if not summary(ROOT / name)]
    assert silent == []


def test_every_make_target_that_is_mentioned_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_relative_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
