"""Metrics for Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdflow.config import ObserveConfig
from kdflow.errors import ConfigError
from kdflow.observe.files import Outages
from kdflow.training import EvalMetrics, StepMetrics


def check_wandb(config: ObserveConfig) -> None:
    """Raises ConfigError where W&B is asked for and not installed."""
    if config.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("observe.wandb_project: wandb is not installed; pip install 'kdflow[wandb]'")


class WandbRecorder:
    """Tells W&B each step and evaluation once, however often the run is stopped and does some of them again.

    `wandb/run.json` in the run's folder has the id of the W&B run, which a resumed one goes on with, and the last step
    of each kind that was told. W&B counts calls; the axis of all charts is `step`.

    Args:
        folder: of the run.
        project: of W&B.
        name: of the run there.
        options: of the run, to be shown there.
        say: told once where `run.json` cannot be written.

    Raises:
        ConfigError: W&B takes no run (no login, no network).
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str,
        options: dict[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        import wandb

        self._state = folder / "wandb" / "run.json"
        self._state.parent.mkdir(exist_ok=True)
        self._outages = Outages(self._state, say)
        self._told: dict[str, Any] = {"id": secrets.token_hex(4), "train": -1, "eval": -1}
        if self._state.is_file():
            self._told = json.loads(self._state.read_text(encoding="utf-8"))
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=self._told["id"],
                resume="allow",
                dir=folder,
                config=options,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"observe.wandb_project: W&B takes no run ({str(error).splitlines()[0]}); log in with `wandb login`, "
                "or set WANDB_MODE=offline and send it later with `wandb sync`"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def on_step(self, metrics: StepMetrics) -> None:
        self._log("train", asdict(metrics))

    def on_eval(self, metrics: EvalMetrics) -> None:
        self._log("eval", asdict(metrics))

    def on_warning(self, text: str) -> None:
        self._run.alert(title="kdflow", text=text)

    def close(self) -> None:
        self._run.finish()

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        step, teachers = int(values.pop("step")), values.pop("teachers")
        if step <= self._told[kind]:
            return
        numbers = {f"{kind}/{name}": value for name, value in values.items()}
        for teacher, own in teachers.items():
            numbers |= {f"{kind}/{teacher}/{name}": value for name, value in own.items()}
        self._run.log({"step": step, **{name: value for name, value in numbers.items() if math.isfinite(value)}})
        self._told[kind] = step
        aside = self._state.with_suffix(".writing")
        with self._outages.passed():
            aside.write_text(json.dumps(self._told), encoding="utf-8")
            os.replace(aside, self._state)
