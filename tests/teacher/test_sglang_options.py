"""What is refused before an engine starts; SGLang need not be there."""

from __future__ import annotations

import os

import pytest
import torch

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError
from kdflow.launcher.prepare import prepare
from kdflow.teacher import sglang_options
from kdflow.teacher.sglang_options import check_options, engine_options, prepare_environment


def config_of(**options: object) -> TeacherConfig:
    return TeacherConfig("model", "sglang", **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which SGLang there is does not matter here."""
    monkeypatch.setattr(sglang_options, "installed_version", lambda: "0.5.21")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dp_size", 2, "leave dp_size out; teacher.num_workers are the replicas"),
        ("disable_radix_cache", False, "always on, for rows of a cached prefix are not computed"),
        ("enable_dp_attention", True, "split over ranks"),
    ],
)
def test_options_that_are_not_the_users(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(config_of(engine_args={name: value}), sleeps=False)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"teacher\.backend: sglang is not installed; pip install 'kdflow\[sglang\]'"),
        ("0.5.9", r"expected sglang 0\.5\.18 or later \(tried: .*\), got 0\.5\.9"),
    ],
)
def test_versions_are_told_before_a_model_is_loaded(
    run_config, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    monkeypatch.setattr(sglang_options, "installed_version", lambda: version)
    with pytest.raises(ConfigError, match=message):
        prepare(run_config(teacher__backend="sglang"))
    monkeypatch.setattr(sglang_options, "installed_version", lambda: "0.6.0rc1")
    check_options(config_of(), sleeps=False)


def test_a_gpu_that_is_shared_in_turns_needs_torch_memory_saver(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, found = torch.device("cuda", 0), {"torch_memory_saver": None}
    monkeypatch.setattr(sglang_options, "resolve_device", lambda device: gpu)
    monkeypatch.setattr(sglang_options.importlib.util, "find_spec", found.get)
    with pytest.raises(ConfigError, match=r"schedule: colocate needs torch_memory_saver, .* pip install"):
        check_options(config_of(), sleeps=True)
    check_options(config_of(), sleeps=False)
    found["torch_memory_saver"] = object()  # type: ignore[assignment]
    check_options(config_of(), sleeps=True)


def test_who_sleeps_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """And starts without segments that expand, beside which torch_memory_saver does not."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for sleeps in (False, True):
        options = engine_options(config_of(), gpu, torch.bfloat16, sleeps=sleeps)
        assert options.get("enable_memory_saver", False) == options.get("enable_weights_cpu_backup", False) == sleeps
    with pytest.raises(ConfigError, match=r"teacher\.tp_size: 2 GPUs from 0 on are needed, there are 1"):
        engine_options(config_of(tp_size=2), gpu, torch.bfloat16)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", sglang_options.sglang_plugin.VARIABLE):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")
    wanted = "max_split_size_mb:512, expandable_segments:True"
    for sleeps, kept in ((False, wanted), (True, "max_split_size_mb:512")):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", wanted)
        prepare_environment(gpu, 1, sleeps=sleeps)
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == kept
