"""The front door: what an operator sees when something is wrong, and that --help needs nothing heavy."""

import inspect
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from models.cli import make_cli
from models.errors import QerveError
from service.cli_serve import serve
from service.settings import Settings


@pytest.fixture
def cli(monkeypatch):
    for name in ("ARTIFACT", "PORT", "HOST", "DEVICE"):
        monkeypatch.delenv(f"QERVE_{name}", raising=False)
    command = make_cli()
    command.command("serve")(serve)
    monkeypatch.setenv("COLUMNS", "200")  # option names are not broken over lines

    def run(*arguments):
        return CliRunner().invoke(command, ["serve", *map(str, arguments)])

    return run


def test_serve_has_help_with_its_options(cli):
    result = cli("--help")
    assert result.exit_code == 0
    for option in ("--port", "--kv-cache-memory", "--max-model-len", "--api-key"):
        assert option in result.output


def test_every_setting_is_an_option_and_nothing_else_is(cli):
    given = {name for parameter in inspect.signature(serve).parameters.values() for name in [parameter.name]}
    assert given == {*Settings.model_fields, "print_config"}
    output = cli("--help").output
    for name in set(Settings.model_fields) - {"artifact"}:
        assert f"--{name.replace('_', '-')}" in output


def test_print_config_shows_the_settings_without_starting_or_telling_secrets(cli):
    result = cli("nowhere", "--port", 9000, "--api-key", "hunter2", "--print-config")
    assert result.exit_code == 0
    assert "port = 9000  # --port" in result.output
    assert "hunter2" not in result.output


def test_a_config_file_with_a_key_that_is_no_setting_is_named(cli, tmp_path):
    file = tmp_path / "qerve.toml"
    file.write_text("prot = 5")
    assert "'prot' is no setting" in str(cli(tmp_path, "--config", file).exception)


def test_a_missing_artifact_is_named(cli, tmp_path):
    result = cli(tmp_path / "nothing")
    assert isinstance(result.exception, QerveError)
    assert "there is no such directory" in str(result.exception)


def test_no_artifact_at_all_says_how_to_give_one(cli):
    assert "which artifact?" in str(cli().exception)


def test_a_port_in_use_is_noticed_before_the_artifact_is_read(cli, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli(tmp_path, "--port", taken.getsockname()[1])
    assert "is in use" in str(result.exception)


def test_a_directory_that_is_no_artifact_is_an_error_of_ours(cli, tmp_path):
    assert isinstance(cli(tmp_path, "--port", 0).exception, QerveError)


def test_a_setting_out_of_range_is_named(cli, tmp_path):
    assert "max_num_seqs" in str(cli(tmp_path, "--max-num-seqs", 0).exception)


def run_qerve(*arguments):
    code = "import sys; from service.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_errors_are_one_line_and_exit_status_1():
    result = run_qerve("serve", "/no/such/place")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: /no/such/place: there is no such directory")


def test_the_front_door_offers_all_verbs_without_loading_torch():
    code = (
        "import sys\n"
        "from service.cli import main\n"
        "try: main()\n"
        "finally: sys.exit('torch was imported') if 'torch' in sys.modules else None"
    )
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for verb in ("build", "eval", "inspect", "serve"):
        assert verb in result.stdout
