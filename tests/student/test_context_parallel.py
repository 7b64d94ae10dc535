"""Students whose tokens cannot be cut over ranks; that others train as whole ones is in test_fsdp2_layouts."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3NextConfig

from kdflow.errors import ConfigError
from kdflow.student.context_parallel import check_model


@pytest.mark.parametrize(
    "config, message",
    [
        (Qwen3NextConfig(), "layers of linear_attention"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "are dynamic"),
    ],
)
def test_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(config)


def test_taken() -> None:
    check_model(LlamaConfig())
    check_model(GPTNeoXConfig())
