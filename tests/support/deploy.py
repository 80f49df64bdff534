"""Just enough reading of Dockerfile and .dockerignore to check them without an engine."""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

PINNED_IMAGE = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w.-]+)?")


@dataclass(frozen=True)
class Instruction:
    """One Dockerfile instruction: ``COPY`` and its unparsed arguments, and the build stage it is in."""

    name: str
    arguments: str
    stage: int

    def exec_form(self) -> list[str] | None:
        """The JSON list of an exec-form instruction, or None for the shell form."""
        text = self.arguments[self.arguments.find("[") :]
        try:
            values = json.loads(text)
        except ValueError:
            return None
        return values if isinstance(values, list) else None


def dockerfile_instructions(text: str) -> list[Instruction]:
    """Instructions in order, with comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    instructions: list[Instruction] = []
    stage = -1
    for line in filter(str.strip, joined.splitlines()):
        name, _, arguments = line.strip().partition(" ")
        stage += name.upper() == "FROM"
        instructions.append(Instruction(name.upper(), arguments.strip(), stage))
    return instructions


def image_of(instructions: list[Instruction], target: str) -> list[Instruction]:
    """What the image ``target`` is made of: the instructions of its stage after those of the stages it builds on."""
    parents = {}
    for step in (step for step in instructions if step.name == "FROM"):
        image, _, name = step.arguments.partition(" AS ")
        parents[name] = (image, step.stage)
    base, stage = parents[target]
    inherited = image_of(instructions, base) if base in parents else []
    return [*inherited, *(step for step in instructions if step.stage == stage)]


def environment_of(stage: list[Instruction]) -> dict[str, str]:
    """Variables that ``stage`` sets."""
    pairs = (pair for step in stage if step.name == "ENV" for pair in step.arguments.split())
    return dict(pair.split("=", 1) for pair in pairs)


def is_ignored(path: str, dockerignore: str) -> bool:
    """Whether ``path`` stays out of the build context: the last pattern that matches it or a parent decides."""
    parents = [*reversed([str(p) for p in PurePosixPath(path).parents if str(p) != "."]), path]
    ignored = False
    for line in dockerignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        is_exception = pattern.startswith("!")
        if any(_matches(parent, pattern.removeprefix("!").strip("/")) for parent in parents):
            ignored = not is_exception
    return ignored


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch(PurePosixPath(path).name, pattern[3:])
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)
