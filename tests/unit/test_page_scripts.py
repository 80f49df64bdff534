"""The page's scripts: what they compute, their types, and that nothing in them could turn text into markup."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "service" / "page" / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
NODE = shutil.which("node")
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|srcdoc")
ELSEWHERE = re.compile(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}|@import\s+(?:url|[\"'])")
NAMESPACE = "http://www.w3.org/2000/svg"


class Elements(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def run(*command):
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def elements():
    return Elements((STATIC / "index.html").read_text(encoding="utf-8")).found


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "page").glob("*.test.js")), ids=lambda file: file.name)
def test_what_the_scripts_compute(file):
    result = run(NODE, "--test", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"(?:#|ℹ) pass [1-9]", result.stdout), result.stdout


def test_the_types_that_the_scripts_say_they_have():
    compiler = shutil.which("tsc") or shutil.which("tsc", path=str(ROOT / "node_modules" / ".bin"))
    if compiler is None:
        pytest.skip("the TypeScript compiler is not installed: npm install")
    result = run(compiler, "-p", "tests/page")
    assert result.returncode == 0, result.stdout


def test_text_cannot_become_markup():
    assert SCRIPTS
    for script in SCRIPTS:
        assert not MARKUP.search(script.read_text(encoding="utf-8")), script.name
    assert MARKUP.search("x.innerHTML = text")


def test_nothing_is_loaded_from_elsewhere():
    for file in STATIC.iterdir():
        assert not ELSEWHERE.search(file.read_text(encoding="utf-8").replace(NAMESPACE, "")), file.name
    assert ELSEWHERE.search('import "https://cdn.example.com/x.js"')


def test_the_document_has_no_code_or_style_of_its_own_which_its_policy_would_refuse():
    for tag, attributes in elements():
        assert tag != "style"
        assert tag != "script" or attributes.get("src"), attributes
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)


def test_what_the_document_and_the_modules_name_is_there():
    named = [
        attributes.get("src") or attributes.get("href") for tag, attributes in elements() if tag in ("script", "link")
    ]
    assert len(named) >= 5
    imported = [
        name for script in SCRIPTS for name in re.findall(r'from "\./([\w.]+)"', script.read_text(encoding="utf-8"))
    ]
    for name in [*(path.removeprefix("page/") for path in named), *imported]:
        assert (STATIC / name).is_file(), name
    assert {script.name for script in SCRIPTS} - set(imported) - {"types.js"} == {"main.js"}  # and none is left over


def test_every_field_has_a_label_and_every_id_is_there_once():
    found = elements()
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found:
        for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids), (tag, attributes)
    wanted = {
        name for script in SCRIPTS for name in re.findall(r'byId\("([\w-]+)"', script.read_text(encoding="utf-8"))
    }
    assert wanted <= set(ids)
