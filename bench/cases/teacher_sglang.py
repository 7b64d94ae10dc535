"""Providers of what capture costs SGLang: three engines of one model, each handing over the same rows in its own way.

``bare`` hands over nothing. ``captured`` is kdflow's teacher, process, rings and all; ``stock`` is SGLang's own
``return_hidden_states``, whose lists of numbers nobody makes a tensor of, as a student would have to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.cases.e2e_job import Params
from bench.cases.e2e_models import NUM_TOKENS, model_folders
from bench.cases.teacher_providers import start_teacher
from bench.model import Trial
from kdflow.config import TeacherConfig
from kdflow.modeling import resolve_device, resolve_dtype
from kdflow.teacher.sglang import engine_options
from kdflow.types import Microbatch


def _config(params: Params) -> TeacherConfig:
    num_tokens = params["num_prompts"] * params["length"]
    return TeacherConfig(
        model_folders(params["models"])["teacher"],
        backend="sglang",
        device=params["device"].partition(":")[0],
        engine_args={
            "mem_fraction_static": 0.3,
            "max_total_tokens": 2 * num_tokens,
            "chunked_prefill_size": num_tokens,
            "max_prefill_tokens": num_tokens,
        },
    )


def _prompts(params: Params) -> list[np.ndarray]:
    shape = (params["num_prompts"], params["length"])
    return list(np.random.default_rng(0).integers(3, NUM_TOKENS, shape).astype(np.int32))


def captured(params: Params) -> Trial:
    """Every row of every prompt enters the loss, of a token more than is prefilled."""
    __import__("sglang")
    length = params["length"] + 1
    samples = [np.append(prompt, np.int32(3)) for prompt in _prompts(params)]
    ends = np.arange(1, len(samples) + 1, dtype=np.int32) * length - 1
    rows = np.setdiff1d(np.arange(len(samples) * length, dtype=np.int32), ends)
    microbatch = Microbatch(np.concatenate(samples), (length,) * len(samples), rows)
    config, found = _config(params), {}
    run, close = start_teacher(config, device=params["device"], tokens_per_microbatch=len(microbatch.input_ids))

    def step() -> None:
        found["mean_row"] = run([microbatch])

    return Trial(step, check=lambda: found, close=close, note=_note(config))


def bare(params: Params) -> Trial:
    engine, config = _engine(params)
    ids = [prompt.tolist() for prompt in _prompts(params)]

    def step() -> None:
        engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 0})

    return Trial(step, close=engine.shutdown, note=_note(config))


def stock(params: Params) -> Trial:
    engine, config = _engine(params)
    ids, found = [prompt.tolist() for prompt in _prompts(params)], {}

    def step() -> None:
        # With no token to generate there are no hidden states in the reply.
        replies = engine.generate(
            input_ids=ids, sampling_params={"max_new_tokens": 1, "temperature": 0.0}, return_hidden_states=True
        )
        found["mean_row"] = float(np.mean(replies[0]["meta_info"]["hidden_states"][0][0]))

    return Trial(step, check=lambda: found, close=engine.shutdown, note=_note(config))


def _engine(params: Params) -> tuple[Any, TeacherConfig]:
    """SGLang without kdflow, with the options that kdflow gives it."""
    from sglang import Engine

    config = _config(params)
    device = resolve_device(config.device, int(params["device"].partition(":")[2] or 0))
    return Engine(**engine_options(config, device, resolve_dtype(config.dtype, device))), config


def _note(config: TeacherConfig) -> str:
    dtype = resolve_dtype(config.dtype, torch.device(config.device))
    return f"computes in {dtype}".replace("torch.", "")
