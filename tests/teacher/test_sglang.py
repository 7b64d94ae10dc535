"""Starting the real engine: in parallel, without its plugin system, with what must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdflow.errors import ConfigError, SlotAborted, TeacherFault
from support.sglang_engine import FAULTS, Reference, assert_rows, needs_sglang, random_ids, started

pytestmark = needs_sglang


def test_tensor_parallel(models) -> None:
    """Two schedulers compute, one writes; the last sample is as long as the model takes, which SGLang does not."""
    options = {"chunked_prefill_size": 64, "context_length": 1031}
    with started("sglang", models("qwen3"), tp_size=2, **options) as teacher:
        samples = [random_ids(n, length) for n, length in enumerate((200, 9, 1024))]
        assert_rows(teacher, Reference(models("qwen3")), samples)


def test_without_plugins_and_with_a_prefix_cache(models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook comes with the scheduler process itself, and the entry point is not loaded.

    Were the prefix cache on, the missing rows would be told, not handed over.
    """
    from kdflow.teacher import sglang

    monkeypatch.setattr(sglang, "_has_plugins", lambda: False)
    monkeypatch.setenv("SGLANG_PLUGINS", "none")
    made = sglang.engine_options
    monkeypatch.setattr(
        sglang, "engine_options", lambda *args, **kwargs: made(*args, **kwargs) | {"disable_radix_cache": False}
    )
    with started("sglang", models("llama")) as teacher:
        sample = random_ids(3, 60)
        assert_rows(teacher, Reference(models("llama")), [sample, random_ids(2, 7)])
        with pytest.raises(SlotAborted, match=r"rows of a request lie in a prefix of \d+ tokens that was not computed"):
            teacher.hidden_rows([np.concatenate([sample, random_ids(4, 5)])])


def test_option_that_sglang_does_not_have(models) -> None:
    with (
        pytest.raises(ConfigError, match='has no option mem_fraction; did you mean "mem_fraction_static"'),
        started("sglang", models("llama"), mem_fraction=0.5),
    ):
        pass


def test_plugin_that_cannot_be_loaded(models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fault").write_text("unloadable")
    monkeypatch.setenv("SGLANG_FAULT", str(tmp_path / "fault"))
    monkeypatch.syspath_prepend(FAULTS)
    with (
        pytest.raises(TeacherFault, match="without kdflow's plugin, which did not answer the first request"),
        started("sglang", models("llama")),
    ):
        pass
