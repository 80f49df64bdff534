"""Settings: options over environment over defaults, and messages for what is not allowed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.cuda_driver import driver_obstacle
from models.errors import QerveError
from models.sizes import parse_size
from service.configuration import describe, read_settings
from service.settings import Settings, no_such_gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (
        "PORT",
        "HOST",
        "MODEL_NAME",
        "KV_CACHE_MEMORY",
        "API_KEY",
        "ARTIFACT",
        "DEVICE",
        "MAX_NUM_SEQS",
        "CONFIG",
        "MAX_QUEUE",
    ):
        monkeypatch.delenv(f"QERVE_{name}", raising=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [("123", 123), ("2GiB", 2 << 30), ("2gi", 2 << 30), ("1.5 GiB", 3 << 29), ("512M", 512_000_000), ("4kB", 4000)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1e9", "5 TiB", "2 GiB extra", "NaN"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_the_command_line_goes_over_the_environment_over_the_defaults(monkeypatch):
    monkeypatch.setenv("QERVE_PORT", "9001")
    monkeypatch.setenv("QERVE_HOST", "0.0.0.0")
    monkeypatch.setenv("QERVE_KV_CACHE_MEMORY", "1MiB")
    monkeypatch.setenv("QERVE_ARTIFACT", "artifacts/x")
    settings = read_settings({"port": 9002})
    assert (settings.port, settings.host, settings.max_num_seqs) == (9002, "0.0.0.0", 8)
    assert settings.kv_cache_memory == 1 << 20
    assert settings.artifact == Path("artifacts/x")


def test_an_empty_variable_is_as_good_as_none(monkeypatch):
    monkeypatch.setenv("QERVE_MODEL_NAME", "")
    monkeypatch.setenv("QERVE_MAX_NUM_SEQS", "")
    assert read_settings({}).model_name is None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"port": 70000}, "port"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"dtype": "int3"}, "dtype"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory: .*is not a size"),
        ({"log_level": "loud"}, "log_level"),
        ({"speculative_tokens": 33}, "speculative_tokens"),
        ({"ngram_max": 0}, "ngram_max"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(options, word):
    with pytest.raises(QerveError, match=word):
        read_settings(options)


def test_the_api_key_does_not_show_in_the_settings():
    assert "secret" not in repr(read_settings({"api_key": "secret"}))


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99", "nonsense:1:2"])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(QerveError, match="device"):
        _ = read_settings({"device": device}).torch_device


def test_a_missing_driver_is_told_without_pytorch():
    """Seconds earlier than PyTorch could: in a process of its own, which never imports it."""
    code = (
        "import sys\n"
        "from service.configuration import read_settings\n"
        "try:\n    read_settings({'device': 'cuda:1'}).check_driver()\n"
        "except Exception as error:\n    print(error)\n"
        "print('torch' in sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert answer.endswith("False\n")
    if driver_obstacle() is not None:
        assert "device 'cuda:1' is not here: there is no" in answer
        assert "choose --device cpu" in answer


def test_what_keeps_a_gpu_away_is_said():
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    assert "no NVIDIA driver here (libcuda.so.1" in driver_obstacle(missing, "linux")
    assert driver_obstacle(lambda name: name, "linux") is None
    assert "no CUDA for darwin" in driver_obstacle(missing, "darwin")


@pytest.mark.parametrize(
    ("num_devices", "has_cuda", "words"),
    [(0, False, "built without CUDA"), (0, True, "sees no CUDA device"), (2, True, "sees cuda:0, cuda:1")],
)
def test_which_gpus_there_are_is_said(num_devices, has_cuda, words):
    assert words in no_such_gpu("cuda:7", num_devices, has_cuda=has_cuda)


def test_sizes_of_recorded_steps_are_a_list():
    assert read_settings({"cuda_graph_sizes": "1, 8,64"}).cuda_graph_sizes == (1, 8, 64)
    assert read_settings({}).cuda_graph_sizes == ()
    for wrong in ("1,many", "0", "2000"):
        with pytest.raises(QerveError, match="cuda_graph_sizes"):
            read_settings({"cuda_graph_sizes": wrong})


@pytest.mark.parametrize("share", [0, 1.01, -1, "all"])
def test_a_share_of_memory_is_above_0_and_1_at_most(share):
    with pytest.raises(QerveError, match="gpu_memory_utilization"):
        read_settings({"gpu_memory_utilization": share})


def test_dtype_auto_leaves_the_choice_to_the_device():
    assert read_settings({}).torch_dtype is None
    assert read_settings({"dtype": "bfloat16"}).torch_dtype is torch.bfloat16
    assert read_settings({"device": "cpu"}).torch_device == torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "qerve.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_options_go_over_variables_over_the_file_over_the_defaults(monkeypatch, config):
    path = config('port = 1\nhost = "file"\nmax_queue = 1\nkv_cache_memory = "1GiB"\n')
    monkeypatch.setenv("QERVE_HOST", "variable")
    monkeypatch.setenv("QERVE_PORT", "2")
    settings = read_settings({"config": path, "port": 3})
    assert (settings.port, settings.host, settings.max_queue, settings.max_num_seqs) == (3, "variable", 1, 8)
    assert settings.kv_cache_memory == 1 << 30


def test_the_file_may_be_named_by_a_variable(monkeypatch, config):
    monkeypatch.setenv("QERVE_CONFIG", config("max_queue = 7\n"))
    assert read_settings({}).max_queue == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("portt = 1\nport = 2\nhosts = 3", "'portt', 'hosts' is no setting"),
        ("[server]\nport = 1", "'server' is no setting"),
        ('config = "other.toml"', "'config' is no setting"),
        ("port = ", "not valid TOML"),
        ('port = "many"', "port: .*integer.*from file"),
        ("max_num_seqs = 0", "max_num_seqs: .*from file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_what_is_wrong(config, text, words):
    with pytest.raises(QerveError, match=words):
        read_settings({"config": config(text)})


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(QerveError, match=r"nothing\.toml: No such file"):
        read_settings({"config": str(tmp_path / "nothing.toml")})


def test_origins_may_be_written_with_commas_or_as_a_list(monkeypatch, config):
    monkeypatch.setenv("QERVE_CORS_ALLOW_ORIGINS", "http://a, http://b")
    assert read_settings({}).cors_allow_origins == ("http://a", "http://b")
    monkeypatch.delenv("QERVE_CORS_ALLOW_ORIGINS")
    path = config('cors_allow_origins = ["http://a", "http://b"]\n')
    assert read_settings({"config": path}).cors_allow_origins == ("http://a", "http://b")


def test_settings_as_printed_are_a_file_that_gives_the_same_settings(monkeypatch, config):
    monkeypatch.setenv("QERVE_API_KEY", "hunter2")
    monkeypatch.setenv("QERVE_MAX_QUEUE", "9")
    options = {
        "config": config('host = "::1"\nmodel_name = "a \\"b\\" # c"\n'),
        "max_num_seqs": "3",
        "cors_allow_origins": "http://a",
        "artifact": "some/where",
    }
    settings = read_settings(options)
    text = describe(settings, options)
    assert "hunter2" not in text
    origins = dict(line.split("  # ") for line in text.splitlines() if "  # " in line)
    assert origins["max_num_seqs = 3"] == "--max-num-seqs"
    assert origins["max_queue = 9"] == "QERVE_MAX_QUEUE"
    assert origins['host = "::1"'].startswith("file ")
    assert origins["port = 8000"] == "default"
    assert origins['# api_key = "**********"'] == "QERVE_API_KEY"
    again = read_settings({"config": config(text)})
    assert again.model_copy(update={"config": None}) == settings.model_copy(update={"config": None})


def test_every_setting_says_what_it_is_and_is_documented():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("serving*.md"))
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"| `{name}` |" in text, name
