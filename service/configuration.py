"""Reads the settings from their sources and shows where each came from: options, environment, file, defaults."""

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource

from models.errors import QerveError

from .settings import Settings


def read_settings(options: Mapping[str, Any]) -> Settings:
    """``options`` (from the command line) over the environment over the file over the defaults.

    Raises:
        QerveError: a value that is not allowed, with its name and where it was found; a file that cannot be read or
            holds a key that is no setting.
    """
    origins = find_origins(options)
    try:
        return Settings(**options)
    except ValidationError as error:
        problems = "; ".join(_problem(item["loc"], item["msg"], origins) for item in error.errors())
        raise QerveError(f"settings: {problems}") from error


def find_origins(options: Mapping[str, Any]) -> dict[str, str]:
    """Setting -> where its value comes from, for all that are not at their default.

    Raises:
        QerveError: the file cannot be read or holds a key that is no setting.
    """
    environment = EnvSettingsSource(Settings)()
    path = options.get("config") or environment.get("config")
    origins = {} if path is None else dict.fromkeys(_read_file(Path(path)), f"file {path}")
    origins |= {name: f"QERVE_{name.upper()}" for name in environment}
    return origins | {name: f"--{name.replace('_', '-')}" for name in options}


def describe(settings: Settings, options: Mapping[str, Any]) -> str:
    """The effective settings as a TOML file, each with its origin; secrets and what is not set are comments."""
    return "".join(_lines(settings, find_origins(options)))


def _lines(settings: Settings, origins: Mapping[str, str]) -> Iterator[str]:
    for name in Settings.model_fields:
        value, origin = getattr(settings, name), origins.get(name, "default")
        if value is None:
            yield f"# {name} is not set\n"
        elif isinstance(value, SecretStr) or name == "config":
            yield f"# {_toml(name, str(value))}  # {origin}\n"
        else:
            yield f"{_toml(name, value)}  # {origin}\n"


def _toml(name: str, value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    if isinstance(plain, list):  # on one line
        return f"{name} = [{', '.join(tomli_w.dumps({'x': item})[4:].strip() for item in plain)}]"
    return tomli_w.dumps({name: plain}).strip()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QerveError(f"settings file {path}: {os.strerror(error.errno or 0)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise QerveError(f"settings file {path} is not valid TOML: {error}") from error
    unknown = [name for name in values if name not in Settings.model_fields or name == "config"]
    if unknown:
        raise QerveError(
            f"settings file {path}: {', '.join(map(repr, unknown))} is no setting; `qerve serve --help` lists them"
        )
    return values


def _problem(loc: tuple[int | str, ...], message: str, origins: Mapping[str, str]) -> str:
    origin = origins.get(str(loc[0])) if loc else None
    return f"{'.'.join(map(str, loc))}: {message}" + (f" (from {origin})" if origin else "")
