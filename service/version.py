"""Which source this is: the commit, as far as the installation knows it."""

import json
import os
from importlib.metadata import PackageNotFoundError, distribution

VARIABLE = "QERVE_GIT_SHA"


def git_sha() -> str:
    """The source's commit: what an image's build wrote into ``QERVE_GIT_SHA``, or what pip installed; else empty."""
    return os.environ.get(VARIABLE) or _installed_commit()


def _installed_commit() -> str:
    """As pip records it (PEP 610) for what it installed from a repository."""
    try:
        text = distribution("qerve").read_text("direct_url.json")
    except PackageNotFoundError:
        return ""
    record = json.loads(text) if text else {}
    commit = record.get("vcs_info", {}).get("commit_id", "")
    return str(commit)
