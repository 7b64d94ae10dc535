"""The active-vocabulary backward on a real model's hidden states: time beside the dense floor, and
the errors of the gradients. Random hidden states would say nothing: there, no column is inactive.

Teacher is the quickstart's, student a copy of it cut to fewer layers, both read the quickstart's
text; the rows are the positions that enter the loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch

from bench.cases.loss_floors import gemm_trial
from bench.cases.loss_providers import DTYPES, Inputs, Params, loss_trial
from bench.client import ROOT
from bench.model import Trial, UnavailableError
from kdflow.config_file import load_config
from kdflow.data import load_datasets
from kdflow.errors import ConfigError
from kdflow.modeling import forward_hidden_states, load_causal_lm, load_tokenizer, prune_layers
from kdflow.types import Microbatch
from kdflow_kernels import fused_kd_loss

MICROBATCH_TOKENS = 1024


def gemms(params: Params) -> Trial:
    return gemm_trial(model_inputs(params))


def exact(params: Params) -> Trial:
    return _kdflow(params, eps=0.0)


def eps_2e_5(params: Params) -> Trial:
    return _kdflow(params, eps=2e-5)


def eps_6e_5(params: Params) -> Trial:
    return _kdflow(params, eps=6e-5)


def eps_2e_4(params: Params) -> Trial:
    return _kdflow(params, eps=2e-4)


def _kdflow(params: Params, *, eps: float) -> Trial:
    inputs = model_inputs(params)
    trial = loss_trial(inputs, lambda given: _loss(given, eps))

    def check() -> dict[str, float]:
        """The loss, and ||gradient - exact|| / ||exact||, exact in fp32 on the same inputs."""
        found = [inputs.student_input.grad, inputs.student_weight.grad]
        truth = Inputs(*(tensor.detach().float() for tensor in vars(inputs).values()))
        truth.student_input.requires_grad_()
        truth.student_weight.requires_grad_()
        loss = _loss(truth, 0.0)
        loss.backward()
        errors = []
        for gradient, wanted in zip(found, (truth.student_input.grad, truth.student_weight.grad), strict=True):
            assert gradient is not None
            assert wanted is not None
            errors.append((torch.dist(gradient.float(), wanted) / wanted.norm()).item())
        return {"loss": loss.item(), "error_dH": errors[0], "error_dW": errors[1]}

    trial.check = check
    return trial


def _loss(inputs: Inputs, eps: float) -> torch.Tensor:
    return fused_kd_loss(
        inputs.student_input,
        inputs.student_weight,
        inputs.teacher_input,
        inputs.teacher_weight,
        grad_filter_eps=eps,
    ).loss


def model_inputs(params: Params) -> Inputs:
    """Hidden states and heads of the pair, computed once in fp32 and kept in the temporary folder."""
    os.chdir(ROOT)  # the config's paths are relative to the checkout
    config = load_config(params["config"], ["--output_dir=unused", "--data.num_eval_samples=0"])
    model = Path(config.teacher.model).expanduser()
    if not model.is_dir():
        raise UnavailableError("the quickstart's models are not there; run `make quickstart` once")
    weights = (model / "model.safetensors").stat()
    key = json.dumps([dict(params), weights.st_size, weights.st_mtime_ns], sort_keys=True)
    name = f"kdflow-bench-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    cache = Path(tempfile.gettempdir()) / name
    if not cache.exists():
        aside = cache.with_suffix(f".{os.getpid()}")
        torch.save(_hidden_states(params), aside)
        aside.rename(cache)
    dtype = DTYPES[params["dtype"]]
    tensors = [tensor.to(params["device"], dtype) for tensor in torch.load(cache, weights_only=True)]
    return Inputs(tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:])


@torch.no_grad()
def _hidden_states(params: Params) -> list[torch.Tensor]:
    config = load_config(params["config"], ["--output_dir=unused", "--data.num_eval_samples=0"])
    try:
        tokenizer = load_tokenizer(config.student.model)
    except ConfigError as error:
        raise UnavailableError(str(error)) from None
    train, _ = load_datasets(config.data, tokenizer, config.seed)
    teacher = load_causal_lm(config.teacher.model, torch.float32)
    student = prune_layers(load_causal_lm(config.teacher.model, torch.float32), params["student_layers"])
    rows: list[list[torch.Tensor]] = [[], []]
    samples = iter(train.samples)
    while sum(len(part) for part in rows[0]) < params["num_rows"]:
        chosen = [next(samples)]
        while sum(map(len, chosen)) < MICROBATCH_TOKENS:
            chosen.append(next(samples))
        batch = Microbatch.pack(chosen)
        positions = torch.from_numpy(batch.position_ids())
        for side, model in zip(rows, (student, teacher), strict=True):
            hidden = forward_hidden_states(
                model.base_model, torch.from_numpy(batch.input_ids).long(), positions, batch.sequence_lengths
            )
            side.append(hidden[torch.from_numpy(batch.loss_rows).long()])
    student_rows, teacher_rows = (torch.cat(side)[: params["num_rows"]].clone() for side in rows)
    heads = [model.get_output_embeddings().weight.detach().clone() for model in (student, teacher)]
    return [student_rows, heads[0], teacher_rows, heads[1]]
