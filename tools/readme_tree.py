"""Write the README's file tree: every source file with the first line of its docstring or opening comment.

Usage: python -m tools.readme_tree [--check]
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- tree: make tree -->", "<!-- /tree -->"
SHOWN_FILES = ("Makefile", "Dockerfile", "docker-compose.yml", "CHANGELOG.md", ".ci/run")
SHOWN = ("models/", "service/", "tests/", "tools/", "deploy/", "docs/")


def tracked_files() -> list[Path]:
    """Files that git tracks, or would track, under the shown folders and at the top level."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    paths = {Path(name) for name in names if name.startswith(SHOWN) or name in SHOWN_FILES}
    return sorted((path for path in paths if (ROOT / path).is_file()), key=lambda path: (path.parent, path.name))


def summary(path: Path) -> str:
    """One line about ``path``: first docstring line, first heading, or first comment."""
    if path.suffix == ".png":
        return ""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n", 1)[0]
    match = re.search(r"^(?:#+|//|--|/\*) (.+?)(?: \*/)?$", text, re.MULTILINE)
    if path.suffix == ".json":
        match = re.search(r'"(?:title|description)":\s*"([^"]+)"', text)
    return match.group(1) if match else ""


def tree() -> str:
    """The tree as a code block."""
    lines, folder = [], None
    for path in tracked_files():
        line = summary(path)
        if path.name == "py.typed" or (path.name == "__init__.py" and not line):
            continue
        if path.parent != folder:
            folder = path.parent
            lines.append(f"{folder}/")
        lines.append(f"    {path.name:<28} {line}".rstrip())
    return "\n".join(["```", *lines, "```"])


def main() -> int:
    """Rewrite the README, or with --check only say whether it is up to date."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    fresh = f"{before}{BEGIN}\n{tree()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        return 0 if fresh == text else 1
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
