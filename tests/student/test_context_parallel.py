"""Students whose tokens cannot be cut over ranks; that others train as whole ones is in test_fsdp2_layouts."""

from __future__ import annotations

import pytest
from transformers import GPTNeoXConfig, LlamaConfig

from kdflow.errors import ConfigError
from kdflow.student.context_parallel import check_model


def test_refused() -> None:
    with pytest.raises(ConfigError, match="are dynamic"):
        check_model(LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))


def test_taken() -> None:
    check_model(LlamaConfig())
    check_model(GPTNeoXConfig())
