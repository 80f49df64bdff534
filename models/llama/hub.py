"""Downloading a checkpoint from the Hugging Face Hub."""

import re
from pathlib import Path

from ..errors import CheckpointError

ALLOWED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
IGNORED = ["*/*", "consolidated*.safetensors"]
"""Other formats of the same weights: sub-folders, and Mistral's own naming next to the Hugging Face one."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is spelled like ``organisation/name``."""
    return _HUB_ID.fullmatch(name) is not None


def download_snapshot(hub_id: str, revision: str | None) -> Path:
    """Download ``hub_id`` (safetensors, configuration and tokenizer only), or find it in the local cache.

    Raises:
        CheckpointError: there is no such repository, access is denied, or the Hub cannot be reached.
    """
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=ALLOWED, ignore_patterns=IGNORED
        )
    except Exception as error:  # the client lets through the errors of whichever HTTP library it is built on
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(
            f"{hub_id}: there is no such path here, and downloading it{at} from the Hugging Face Hub failed: "
            f"{reason}; check the name and the connection, or pass a local directory"
        ) from error
    return Path(path)
