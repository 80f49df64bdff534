"""``qerve bench`` on the demo's artifact, which is built first where `make demo` has not left one."""

import subprocess
import sys

from .demo import BUILD_OPTIONS, artifact_path, qerve
from .fetch_model import fetch_model


def main() -> None:
    """Build if necessary, then bench; options are passed on."""
    checkpoint = fetch_model()
    artifact = artifact_path(checkpoint)
    if not artifact.exists():
        subprocess.run(qerve("build", str(checkpoint), "--out", str(artifact), *BUILD_OPTIONS), check=True)
    sys.exit(subprocess.run(qerve("bench", str(artifact), *sys.argv[1:]), check=False).returncode)


if __name__ == "__main__":
    main()
