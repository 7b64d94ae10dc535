"""Heads cut over the ranks of a group: loss, metrics and gradients are those of whole heads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kd_oracle import Case, by_hand
from test_fused_kd_loss import FACTORS, make, pairwise

from kdflow_kernels import (
    KDLossOutput,
    VocabParallel,
    fused_kd_loss,
    get_divergence,
    list_divergences,
    tiled_logits,
    torch_rows,
    triton_backend,
)
from support.ranks import run_on_ranks

POINTWISE = tuple(name for name in list_divergences() if get_divergence(name).is_pointwise())
CASES = pairwise(
    FACTORS
    | {
        "divergence": POINTWISE,
        "dtype": (torch.float32, torch.float64),
        "vocabulary": ("same", "padded"),
        "reduction": ("mean", "none"),
        "vocab": (7, 61),
    }
)
# Where the parts of the ranks begin and end, as parts of the vocabulary: even, uneven, with a rank that has nothing.
CUTS = {2: [(0, 0.5, 1), (0, 0.95, 1)], 3: [(0, 0.2, 0.2, 1), (0, 0.4, 0.9, 1)]}
# Fewer, for the interpreter is slow; the last cut leaves a rank without columns.
TRITON_CASES = pairwise(
    {
        "divergence": POINTWISE,
        "dtype": (torch.float32, torch.bfloat16),
        "vocabulary": ("same", "padded"),
        "labels": ("some ignored", "none"),
        "ce_weight": (0.0, 0.4),
        "kd_weight": (1.0, 0.7),
        "temperature": (1.0, 2.5),
        "student_softcap": (None, 4.0),
        "vocab": (61, 300),
        "cut": ((0, 0.5, 1), (0, 0.99, 1), (0, 1, 1)),
    }
)
TRITON_CASES.append({**TRITON_CASES[0], "kd_weight": 0.0, "ce_weight": 1.0, "labels": "some ignored"})


def part(case: Case, cut: tuple[float, ...], **options: Any) -> tuple[Case, slice]:
    """What this rank is given of a case, and its tokens of the student's head."""
    rank, vocab = dist.get_rank(), len(case.tensors["student_weight"])
    start, stop = (round(share * vocab) for share in cut[rank : rank + 2])
    tokens = slice(start, stop)
    teacher = slice(start, stop if rank + 1 < dist.get_world_size() else None)
    places = {
        **dict.fromkeys(("student_weight", "student_bias"), tokens),
        **dict.fromkeys(("teacher_weight", "teacher_bias"), teacher),
    }
    tensors = {
        name: tensor.detach()[places.get(name, slice(None))].clone().requires_grad_(tensor.requires_grad)
        for name, tensor in case.tensors.items()
    }
    group = dist.group.WORLD
    assert group is not None
    parallel = VocabParallel(group, start, **options)
    return Case(tensors, {**case.options, "vocab_parallel": parallel}), tokens


def loss_of(case: Case) -> tuple[KDLossOutput, dict[str, torch.Tensor]]:
    output = fused_kd_loss(**case.tensors, **case.options)
    return output, case.gradients(output.loss)


def small_steps() -> None:
    tiled_logits.TILE_COLUMNS = 32
    torch_rows.ROW_STEP_NUMBERS = 100


def distance(found: torch.Tensor, true: torch.Tensor) -> float:
    """Relative; 0 where both are NaN throughout, as without a teacher."""
    found, true = found.detach().double(), true.detach().double()
    error = ((found - true).norm() / (true.norm() + 1e-2)).item()
    return 0.0 if bool(found.isnan().all() and true.isnan().all()) else error if error == error else 1e9


def differences() -> list[tuple[float, str]]:
    """For every case and cut how far its results are from those of whole heads, in tolerances; the worst."""
    small_steps()
    found = []
    for number, options in enumerate(CASES):
        options = dict(options)
        dtype = options.pop("dtype")
        tolerance = 1e-11 if dtype == torch.float64 else 2e-6
        if options["labels"] == "none":
            options["ce_weight"] = 0.0
        whole = make(**options).cast(dtype)
        true_loss, true_gradients = by_hand(whole, torch.float64)
        one_rank, _ = loss_of(whole)
        for cut in CUTS[dist.get_world_size()]:
            own, tokens = part(whole, cut)
            output, gradients = loss_of(own)
            errors = {"loss": distance(output.loss, true_loss)}
            for name in KDLossOutput._fields[1:]:
                errors[name] = distance(getattr(output, name), getattr(one_rank, name))
            for name, true in true_gradients.items():
                errors[name] = distance(gradients[name], true if name == "student_input" else true[tokens])
            found += [(error / tolerance, f"case {number}, cut {cut}, {name}") for name, error in errors.items()]
    return sorted(found, reverse=True)[:3]


@pytest.mark.parametrize("num_ranks", CUTS)
def test_parts_make_the_whole(tmp_path: Path, num_ranks: int) -> None:
    for worst in run_on_ranks(num_ranks, tmp_path / "ranks", differences):
        assert worst[0][0] < 1.0, worst


def triton_excesses() -> list[tuple[float, str]]:
    """How far the Triton backend's results on this rank's part are from fp64, in what eager code's distance allows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton_backend.LANES, triton_backend.CHUNK_ROWS = 32, 2  # several blocks of columns, chunks and groups of rows
    runs, run = [], triton_backend.run
    triton_backend.run = lambda *args: runs.append(run(*args)) or runs[-1]
    found = []
    for number, options in enumerate(TRITON_CASES):
        options = dict(options)
        dtype, cut = options.pop("dtype"), options.pop("cut")
        if options["labels"] == "none":
            options["ce_weight"] = 0.0
        whole = make(**options, num_rows=5, backend="triton").cast(dtype).to(device)
        (true_loss, true), (eager_loss, eager) = by_hand(whole, torch.float64), by_hand(whole, dtype)
        own, tokens = part(whole, cut)
        output, gradients = loss_of(own)
        results = [("loss", output.loss, eager_loss, true_loss)]
        for name, gradient in gradients.items():
            places = slice(None) if name == "student_input" else tokens
            results.append((name, gradient, eager[name][places], true[name][places]))
        for name, ours, theirs, truth in results:
            eps = torch.finfo(dtype).eps
            roundings = 2 if dtype != torch.float32 else 32 if device == "cuda" else 8
            limit = 1.5 * (theirs.double() - truth).norm() + eps * (roundings * truth.norm() + 1e-3)
            found.append((((ours.double() - truth).norm() / limit).item(), f"case {number}, cut {cut}, {name}"))
        expected, _ = loss_of(Case(whole.tensors, {**whole.options, "backend": "torch"}))
        for name in KDLossOutput._fields[1:]:
            tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
            error = distance(getattr(output, name), getattr(expected, name)) / tolerance
            found.append((error, f"case {number}, cut {cut}, {name}"))
    assert len(runs) == len(TRITON_CASES)
    return sorted(found, reverse=True)[:3]


def hard_cases() -> dict[str, float]:
    """Logits so large that a log-sum-exp in one number rounds away what is below them; no rows at all."""
    case = make(num_rows=64, vocab=1000, hidden_size=16, divergence="reverse_kl", labels="none")
    for name in ("student_weight", "teacher_weight"):
        case.tensors[name].data *= 150.0
    case = case.cast(torch.float32)
    _, true = by_hand(case, torch.float64)
    _, whole = loss_of(case)
    own, tokens = part(case, (0, 0.4, 1))
    _, cut = loss_of(own)
    truth = true["student_weight"]
    found = {
        "whole": distance(whole["student_weight"], truth),
        "cut": distance(cut["student_weight"], truth[tokens]),
    }
    for backend in ("torch", "triton"):
        empty, _ = part(make(num_rows=0, backend=backend).cast(torch.float32), (0, 0.4, 1))
        found[f"{backend} without rows"] = float(loss_of(empty)[0].loss)
    return found


def test_large_logits_and_no_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for found in run_on_ranks(2, tmp_path / "ranks", hard_cases):
        assert found["torch without rows"] == found["triton without rows"] == 0.0
        assert found["cut"] < 3 * found["whole"] + 1e-6


def test_parts_make_the_whole_in_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for worst in run_on_ranks(2, tmp_path / "ranks", triton_excesses):
        assert worst[0][0] < 1.0, worst


def other_options() -> dict[str, Any]:
    """What two ranks find with their gradients left partial, filtered, and with parts that do not fit."""
    small_steps()
    whole = make(num_rows=40, vocab=61, temperature=2.0, ce_weight=0.5)
    _, true = loss_of(whole)
    _, partial = loss_of(part(whole, (0, 0.3, 1), reduce_input_grad=False)[0])
    own_part = partial["student_input"].clone()
    dist.all_reduce(partial["student_input"])
    results: dict[str, Any] = {
        "own part": distance(own_part, true["student_input"]),
        "sum of parts": distance(partial["student_input"], true["student_input"]),
    }

    whole.options |= {"grad_filter_eps": 1e-2, "chunk_size": 2}
    _, filtered = loss_of(whole)
    own, tokens = part(whole, (0, 0.3, 1))
    _, found = loss_of(own)
    results["filter drops"] = distance(filtered["student_weight"], true["student_weight"])
    results["filtered weight"] = distance(found["student_weight"], filtered["student_weight"][tokens])
    results["filtered input"] = distance(found["student_input"], true["student_input"])

    whole.options["grad_filter_eps"] = 0.0
    group = own.options["vocab_parallel"].group
    own, _ = part(whole, (0, 0.3, 1))
    for message, changed in {
        "expected rank 1's part to start at token 18": {"vocab_parallel": VocabParallel(group, 20 * dist.get_rank())},
        "expected 18 tokens from token 0 on in rank 0": {"teacher_weight": own.tensors["teacher_weight"][1:]},
        "expected 1 to 61, the tokens of all ranks' student_weight, got 62": {"vocab_size": 62},
        "expected 0 to 60 (student_weight) or ignore_index=-100, got 61": {"shift_labels": torch.full((40,), 61)},
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            fused_kd_loss(**{**own.tensors, **own.options, **changed})
    return results


def test_partial_and_filtered_gradients_and_parts_that_do_not_fit(tmp_path: Path) -> None:
    for found in run_on_ranks(2, tmp_path / "ranks", other_options):
        assert found["own part"] > 0.1
        assert found["sum of parts"] < 1e-12
        assert found["filter drops"] > 1e-4
        assert found["filtered weight"] < 1e-12
        assert found["filtered input"] < 0.05


REFUSED = {
    "divergence 'adaptive_kl' needs whole rows": {"divergence": "adaptive_kl"},
    "backend: 'reference' cannot have vocab_parallel": {"backend": "reference"},
    "cannot be combined with student_token_ids": {
        "student_token_ids": torch.arange(5),
        "teacher_token_ids": torch.arange(5),
    },
}


def refusals() -> None:
    own, _ = part(make(), (0, 1))
    for message, changed in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            fused_kd_loss(**{**own.tensors, **own.options, **changed})
    compiled = torch.compile(lambda: fused_kd_loss(**own.tensors, **own.options).loss, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="vocab_parallel"):
        compiled()


def test_what_needs_whole_heads_is_refused(tmp_path: Path) -> None:
    run_on_ranks(1, tmp_path / "ranks", refusals)
