"""Settings: options over environment over defaults, and messages for what is not allowed."""

from pathlib import Path

import pytest
import torch

from models.errors import QerveError
from service.configuration import read_settings
from service.settings import parse_size


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("PORT", "HOST", "MODEL_NAME", "KV_CACHE_MEMORY", "API_KEY", "ARTIFACT", "DEVICE", "MAX_NUM_SEQS"):
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


def test_dtype_auto_leaves_the_choice_to_the_device():
    assert read_settings({}).torch_dtype is None
    assert read_settings({"dtype": "bfloat16"}).torch_dtype is torch.bfloat16
    assert read_settings({"device": "cpu"}).torch_device == torch.device("cpu")
