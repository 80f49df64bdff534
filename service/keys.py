"""API keys: who may ask. Only digests are kept, and a key that is presented is compared with all of them.

A file holds one key a line, ``KEY`` or ``NAME:KEY``; empty lines and lines that begin with ``#`` are skipped. The name
is what logs and limits say instead of the key; without one it is made from the key's digest. Keys of the same name are
one client's, so that a key can be replaced without a moment at which none is valid.
"""

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.errors import QerveError

logger = logging.getLogger("qerve.keys")

ANONYMOUS = "anonymous"
"""Id of every client where no key is asked for."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """key_id: who it is; digest: SHA-256 of the key."""

    key_id: str
    digest: bytes


class KeyRing:
    """The keys that are valid now; without any, everybody is let in as ``ANONYMOUS``."""

    def __init__(self, api_key: str | None, file: Path | None) -> None:
        self._api_key = api_key
        self._file = file
        self._keys = self._read()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def is_open(self) -> bool:
        """No key is asked for."""
        return self._api_key is None and self._file is None

    def reload(self) -> None:
        """Read the file again.

        Raises:
            QerveError: it cannot be used; the keys stay as they were.
        """
        self._keys = self._read()

    def find(self, presented: str) -> str | None:
        """The id of the key ``presented``; None: it is not valid. Takes the same time whichever key it is."""
        digest = hashlib.sha256(presented.encode("latin-1")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.key_id
        return found

    def _read(self) -> list[ApiKey]:
        keys = [] if self._file is None else list(_read_file(self._file))
        return keys if self._api_key is None else [_make_key("", self._api_key), *keys]


def _make_key(name: str, key: str) -> ApiKey:
    # Headers come as latin-1; what a client wrote in UTF-8 is compared byte for byte.
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return ApiKey(name or f"key-{digest.hex()[:8]}", digest)


def _read_file(path: Path) -> Iterator[ApiKey]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise QerveError(f"API key file {path}: {reason}") from error
    if mode & stat.S_IROTH:
        logger.warning("API key file %s can be read by every user of this machine: chmod o-r it", path)
    digests: set[bytes] = set()
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            key = _parse_line(text, f"API key file {path}, line {number}")
            if key.digest in digests:
                raise QerveError(f"API key file {path}, line {number}: this key is there twice")
            digests.add(key.digest)
            yield key
    if not digests:
        raise QerveError(f"API key file {path} holds no key: nobody could be let in")


def _parse_line(text: str, where: str) -> ApiKey:
    name, separator, key = text.partition(":")
    if not separator:
        return _make_key("", text)
    if not _NAME.fullmatch(name):
        raise QerveError(f"{where}: write KEY or NAME:KEY, the name of letters, digits, '.', '_' and '-'")
    if not key.strip():
        raise QerveError(f"{where}: there is no key after the name")
    return _make_key(name, key.strip())
