"""Hub ids: what is asked for, and what is said when it cannot be had."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from models.errors import CheckpointError
from models.llama.checkpoint import open_checkpoint
from models.llama.hub import is_hub_id
from tests.support.tiny_checkpoints import write_checkpoint


class FakeHub:
    """Stands in for ``snapshot_download``: copies a local folder, filtered as the real one filters."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.calls: list[tuple[str, str | None]] = []

    def __call__(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        self.calls.append((repo_id, revision))
        for path in self.source.rglob("*"):
            name = path.relative_to(self.source).as_posix()
            is_allowed = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_file() and is_allowed and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (self.target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.target / name)
        return str(self.target)


def test_a_hub_id_downloads_safetensors_configuration_and_tokenizer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "remote", num_shards=2)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "onnx/config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not wanted")
    (tmp_path / "cache").mkdir()
    hub = FakeHub(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    checkpoint = open_checkpoint("some-org/tiny.Model_1", revision="v2")
    assert hub.calls == [("some-org/tiny.Model_1", "v2")]
    assert "chat_template.jinja" in checkpoint.tokenizer_files
    expected = {path.name for path in source.glob("*") if path.suffix in (".safetensors", ".json", ".jinja")}
    assert {path.name for path in (tmp_path / "cache").rglob("*")} == expected - {"consolidated.safetensors"}


def test_a_local_directory_is_preferred_to_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "org" / "name")
    hub = FakeHub(tmp_path, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").config.num_hidden_layers == 2
    assert hub.calls == []


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot find an appropriate cached snapshot folder"),
        OfflineModeIsEnabled("offline mode is enabled"),
        ConnectionError("no route to host"),
        RuntimeError(),
    ],
)
def test_a_failed_download_is_a_checkpoint_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any, **_kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/name", revision="abc")
    for word in ("org/name", "abc", "Hub", str(error) or "RuntimeError", "local directory"):
        assert word in str(caught.value)


def test_only_organisation_slash_name_is_a_hub_id() -> None:
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct")
    for name in ("gpt2", "./a/b", "../b", "/a/b", "a/b/c", "a/", "a/../b", "a b/c", "~/x", ""):
        assert not is_hub_id(name)
