"""The loss and every gradient by the three-way oracle, over the options, the odd shapes and the extreme values."""

from __future__ import annotations

import itertools
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kd_oracle import BY_HAND, Case, by_hand, check_against_oracle, ours
from torch import Tensor

from kdflow_kernels import (
    JSD,
    FusedKDLoss,
    fused_kd_loss,
    list_divergences,
    native_rows,
    tiled_logits,
    torch_backend,
    torch_rows,
)
from kdflow_kernels.native_rows import NativeRows

# What a case may vary. Every pair of values of two different factors occurs together in at least one of the cases that
# pairwise() makes: faults that need three options at once are left to hypothesis below.
FACTORS: dict[str, tuple] = {
    "divergence": tuple(list_divergences()),
    "dtype": (torch.float32, torch.bfloat16, torch.float64, torch.float16),
    "vocabulary": ("same", "padded", "paired"),
    "ce_weight": (0.0, 0.4),
    "kd_weight": (1.0, 0.7),
    "temperature": (1.0, 2.5),
    "reduction": ("mean", "none", "sum"),
    "labels": ("all", "some ignored", "none"),
    "row_weight": (False, True),
    "student_bias": (False, True),
    "teacher_bias": (False, True),
    "student_logit_scale": (1.0, 0.5),
    "teacher_logit_scale": (1.0, 2.0),
    "student_softcap": (None, 4.0),
    "teacher_softcap": (None, 6.0),
    "chunk_size": (None, 3),
    "hidden_size": (8, 48),  # fewer and more than the rows: gradients beside their home and in it
    "vocab": (7, 61, 150),
}


def pairwise(factors: dict[str, tuple], seed: int = 0) -> list[dict]:
    """Few combinations that contain every pair of values: of random candidates always the one with most new pairs."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}

    def pairs(case: dict) -> set:
        return set(itertools.combinations(case.items(), 2)) & missing

    cases = []
    while missing:
        seeded = dict(rng.choice(sorted(missing, key=repr)))
        candidates = [{n: seeded.get(n, rng.choice(factors[n])) for n in names} for _ in range(30)]
        best = max(candidates, key=lambda case: len(pairs(case)))
        missing -= pairs(best)
        cases.append(best)
    return cases


def make(
    *,
    num_rows: int = 13,
    vocab: int = 61,
    hidden_size: int = 8,
    vocabulary: str = "same",
    labels: str = "some ignored",
    row_weight: bool = False,
    student_bias: bool = False,
    teacher_bias: bool = False,
    seed: int = 0,
    **options,
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    teacher_vocab = vocab + (0 if vocabulary == "same" else 9)
    tensors = {
        "student_input": normal(num_rows, hidden_size).requires_grad_(),
        "student_weight": normal(vocab, hidden_size, scale=2 * hidden_size**-0.5).requires_grad_(),
        "teacher_input": normal(num_rows, 10),
        "teacher_weight": normal(teacher_vocab, 10, scale=0.6),
    }
    if student_bias:
        tensors["student_bias"] = normal(vocab).requires_grad_()
    if teacher_bias:
        tensors["teacher_bias"] = normal(teacher_vocab)
    if row_weight:
        tensors["row_weight"] = torch.rand(num_rows, generator=g, dtype=torch.float64)
    if labels != "none":
        tensors["shift_labels"] = torch.randint(0, vocab, (num_rows,), generator=g)
        if labels == "some ignored":
            tensors["shift_labels"][::4] = -100
    if vocabulary == "padded":
        options["vocab_size"] = vocab - 2
    if vocabulary == "paired":
        tensors["student_token_ids"] = torch.randperm(vocab, generator=g)[: vocab - 1]
        tensors["teacher_token_ids"] = torch.randperm(teacher_vocab, generator=g)[: vocab - 1]
    return Case(tensors, options)


def one_hot_case(divergence: str) -> Case:
    """Logits of ten thousand: rows as good as one-hot on both sides, the same token or another."""
    case = make(divergence=divergence, ce_weight=0.5, num_rows=6)
    for side in ("student", "teacher"):
        hidden = torch.zeros(6, case.tensors[f"{side}_input"].shape[1], dtype=torch.float64)
        hidden[:, 0] = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0]) * (1.0 if side == "student" else -1.0)
        weight = torch.zeros_like(case.tensors[f"{side}_weight"])
        weight[3, 0], weight[7, 0] = 1e4, -1e4
        case.tensors[f"{side}_input"], case.tensors[f"{side}_weight"] = hidden, weight.detach()
    case.tensors["student_input"].requires_grad_()
    case.tensors["student_weight"].requires_grad_()
    return case


def covering_case(case: dict) -> tuple[Case, torch.dtype]:
    case = dict(case)
    dtype = case.pop("dtype")
    if case["labels"] == "none":
        case["ce_weight"] = 0.0
    return make(**case), dtype


def describe(case: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """Several tiles, none of them even, at shapes that a test can afford."""
    monkeypatch.setattr(tiled_logits, "TILE_COLUMNS", 32)
    monkeypatch.setattr(torch_rows, "ROW_STEP_NUMBERS", 300)


@pytest.fixture(params=["torch", *native_rows.instruction_sets()])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both row steps of the torch backend, the native one as compiled for each of the processor's instruction sets."""
    if request.param == "torch":
        monkeypatch.setattr(NativeRows, "covers", lambda *_: False)
    else:
        monkeypatch.setattr(NativeRows, "instruction_set", request.param)
    return request.param


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=describe)
def test_covering_design(case: dict, rows: str):
    made, dtype = covering_case(case)
    # A tie that rounding breaks the other way moves these by a jump; eager has as many, in other places.
    jumps = case["divergence"] in ("hierarchical_ranking", "adaptive_kl", "top1_ce", "tvd")
    low = dtype in (torch.bfloat16, torch.float16)
    check_against_oracle(made, dtype, factor=3.0 if jumps and low else 1.5)


@pytest.mark.parametrize("divergence", sorted(BY_HAND))
def test_reference_backend(divergence: str):
    case = make(divergence=divergence, ce_weight=0.3, temperature=1.5, student_bias=True, row_weight=True)
    check_against_oracle(case, torch.float64, "reference")


@pytest.mark.parametrize("vocabulary", ["same", "padded", "paired"])
@pytest.mark.parametrize("num_rows", [13, 120])
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_on_cpus_that_multiply_it_and_on_others(
    vocabulary: str, num_rows: int, products: torch.dtype, rows: str, monkeypatch: pytest.MonkeyPatch
):
    """Correct, if slow, on all."""
    monkeypatch.setattr(tiled_logits, "multiply_dtype", lambda dtype, device: products)
    case = make(num_rows=num_rows, vocabulary=vocabulary, ce_weight=0.3, student_bias=vocabulary == "padded", vocab=150)
    check_against_oracle(case, torch.bfloat16)
    case.options["grad_filter_eps"] = 1e-9
    check_against_oracle(case, torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject):
    case = {name: data.draw(st.sampled_from(values), label=name) for name, values in FACTORS.items()}
    case |= {
        "dtype": torch.float64,
        "num_rows": data.draw(st.integers(0, 40), label="num_rows"),
        "vocab": data.draw(st.integers(6, 140), label="vocab"),
        "hidden_size": data.draw(st.integers(1, 40), label="hidden_size"),
        "chunk_size": data.draw(st.one_of(st.none(), st.integers(1, 50)), label="chunk_size"),
        "seed": data.draw(st.integers(0, 10), label="seed"),
    }
    check_against_oracle(*covering_case(case))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows, ignore", [(0, False), (1, False), (1, True), (9, True)])
def test_few_rows_and_all_ignored(num_rows: int, ignore: bool, reduction: str, backend: str):
    case = make(num_rows=num_rows, labels="all", ce_weight=0.5, reduction=reduction, student_bias=True)
    if ignore:
        case.tensors["shift_labels"].fill_(-100)
    loss, grads = ours(case, torch.float64, backend)
    truth, true_grads = by_hand(case, torch.float64)
    torch.testing.assert_close(loss, truth)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[name])
    output = fused_kd_loss(**case.tensors, **case.options, backend=backend)
    assert output.num_tokens == (0 if ignore else num_rows)
    assert output.student_entropy.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", list_divergences())
def test_logits_of_ten_thousand(divergence: str, dtype: torch.dtype, rows: str):
    """Nothing overflows."""
    check_against_oracle(one_hot_case(divergence), dtype)


@pytest.mark.parametrize("divergence", list_divergences())
def test_p_equals_q(divergence: str):
    case = make(divergence=divergence)
    for part in ("input", "weight"):
        case.tensors[f"teacher_{part}"] = case.tensors[f"student_{part}"].detach().clone()
    output = fused_kd_loss(**case.tensors, divergence=divergence)
    output.loss.backward()
    torch.testing.assert_close(output.student_entropy, output.teacher_entropy)
    assert output.top1_agreement == 1
    if divergence != "top1_ce":
        torch.testing.assert_close(output.loss.detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
        assert case.tensors["student_weight"].grad.abs().max() < 1e-12


def test_fields():
    case = make(student_bias=True, row_weight=True)
    t = case.tensors
    kept = t["shift_labels"] != -100
    z = F.linear(t["student_input"], t["student_weight"], t["student_bias"])[kept].detach()
    log_q = (z / 2).log_softmax(-1)
    log_p = (F.linear(t["teacher_input"], t["teacher_weight"])[kept] / 2).log_softmax(-1)
    kd = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    ce = F.cross_entropy(z, t["shift_labels"][kept], reduction="none")
    weight = t["row_weight"][kept] / 6
    expected = {
        "loss": (weight * (0.8 * kd + 0.5 * ce)).sum(),
        "kd_loss": (weight * kd).sum(),
        "ce_loss": (weight * ce).sum(),
        "student_entropy": torch.distributions.Categorical(logits=log_q).entropy().mean(),
        "teacher_entropy": torch.distributions.Categorical(logits=log_p).entropy().mean(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
        "num_tokens": kept.sum(),
    }
    for backend in ("torch", "reference"):
        found = fused_kd_loss(**t, temperature=2.0, kd_weight=0.8, ce_weight=0.5, num_items=6, backend=backend)
        for name, value in found._asdict().items():
            torch.testing.assert_close(value.detach(), expected[name], msg=lambda m, name=name: f"{name}: {m}")
            assert value.requires_grad == (name == "loss")


def test_agreement_finds_the_top_token_of_a_wide_row(rows: str):
    """The argmax in two steps, at every kind of place: first block, a later one, the columns left over."""
    vocab = 5 * 128 + 17
    hidden = torch.eye(4)
    weight = torch.randn(vocab, 4, generator=torch.Generator().manual_seed(0))
    for row, token in enumerate((0, 300, 639, vocab - 1)):
        weight[token, row] = 20.0
    output = fused_kd_loss(hidden, weight, hidden, weight.flip(0).flip(0), reduction="sum")
    assert output.top1_agreement == 1
    shifted = weight.roll(1, dims=0)
    assert fused_kd_loss(hidden, weight, hidden, shifted, reduction="sum").top1_agreement == 0


def test_cross_entropy_alone():
    case = make(kd_weight=0.0, ce_weight=1.0)
    for name in ("teacher_input", "teacher_weight"):
        del case.tensors[name]
    check_against_oracle(case, torch.float32)
    output = fused_kd_loss(
        teacher_input=None,
        teacher_weight=None,
        **case.tensors,
        **case.options,  # type: ignore[arg-type]
    )
    assert output.kd_loss == 0
    assert output.teacher_entropy.isnan()


def test_teacher_of_another_dtype(rows: str):
    case = make().cast(torch.float32)
    low = {n: t.bfloat16() if n.startswith("teacher") else t for n, t in case.tensors.items()}
    same = {n: t.bfloat16().float() if n.startswith("teacher") else t for n, t in case.tensors.items()}
    # Its logits are kept in bf16.
    torch.testing.assert_close(fused_kd_loss(**low).loss, fused_kd_loss(**same).loss, rtol=1e-2, atol=1e-3)


def test_autocast_casts_like_linear():
    case = make().cast(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_kd_loss(**case.tensors).loss
    loss.backward()
    low_loss, low_grads = ours(case.cast(torch.bfloat16), torch.bfloat16)
    torch.testing.assert_close(loss, low_loss)
    weight_grad = case.tensors["student_weight"].grad
    assert weight_grad is not None
    assert weight_grad.dtype == torch.float32
    torch.testing.assert_close(weight_grad, low_grads["student_weight"].float())


def test_autocast_leaves_fp64_alone_like_linear():
    case = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_kd_loss(**case.tensors).loss
    assert torch.equal(loss, fused_kd_loss(**case.tensors).loss)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_students_dtype_is_that_of_all_numbers(shape: tuple[int, ...], backend: str):
    case = make().cast(torch.float32)
    wide = {n: t.double() if n.startswith("teacher") else t for n, t in case.tensors.items()}
    output = fused_kd_loss(**wide, num_items=torch.full(shape, 17.0, dtype=torch.float64), backend=backend)
    assert {value.dtype for value in output[:-1]} == {torch.float32}
    torch.testing.assert_close(output.loss, fused_kd_loss(**wide, num_items=17).loss)


@pytest.mark.parametrize("frozen", ["student_input", "student_weight", "student_bias"])
@pytest.mark.parametrize("hidden_size", [8, 48])
def test_frozen_tensors_cost_nothing(frozen: str, hidden_size: int, monkeypatch: pytest.MonkeyPatch):
    case = make(student_bias=True, hidden_size=hidden_size, ce_weight=0.2)
    case.tensors[frozen].requires_grad_(False)
    formed = []
    run = torch_backend.run
    monkeypatch.setattr(torch_backend, "run", lambda *args: formed.append(run(*args)) or formed[-1])
    check_against_oracle(case, torch.float64)
    assert getattr(formed[-1][1], frozen.removeprefix("student_")) is None


def test_no_grad_forms_no_gradients(monkeypatch: pytest.MonkeyPatch):
    case = make(ce_weight=0.5)
    monkeypatch.setattr(torch_backend._Run, "_multiply", lambda *_: pytest.fail("gradients were formed"))
    with torch.no_grad():
        loss = fused_kd_loss(**case.tensors, **case.options).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_hand(case, torch.float64)[0].detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_through_a_retained_graph(reduction: str):
    case = make(reduction=reduction)
    loss = fused_kd_loss(**case.tensors, **case.options).loss.sum()
    weight = case.tensors["student_weight"]
    (first,) = torch.autograd.grad(loss, weight, 3.0 * torch.ones_like(loss), retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(first, 3 * second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["student_input", "student_weight", "teacher_input", "teacher_weight", "teacher_bias",
                                  "shift_labels", "row_weight", "student_token_ids"])  # fmt: skip
def test_a_tensor_changed_before_backward_raises_where_backward_reads_it(name: str, reduction: str):
    case = make(
        labels="all", ce_weight=0.4, row_weight=True, teacher_bias=True, vocabulary="paired", reduction=reduction
    )
    loss = fused_kd_loss(**case.tensors, **case.options).loss.sum()
    wanted = case.gradients(fused_kd_loss(**case.tensors, **case.options).loss.sum())
    with torch.no_grad():
        case.tensors[name].copy_(case.tensors[name].flip(0))
    if reduction == "none":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        for key, gradient in case.gradients(loss).items():
            assert torch.equal(gradient, wanted[key])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labels", ["all", "some ignored"])
def test_a_loss_that_is_kept_keeps_nothing_alive(labels: str, reduction: str):
    case = make(labels=labels, ce_weight=0.4, reduction=reduction)
    hidden = case.tensors["student_input"] * 1.0
    loss = fused_kd_loss(**{**case.tensors, "student_input": hidden}, **case.options).loss.sum()
    constants = ("teacher_input", "teacher_weight", "shift_labels")
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in (hidden, *(case.tensors.pop(n) for n in constants))]
    del hidden
    loss.backward()
    assert [storage() for storage in kept] == [None] * 4
    assert loss.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["student_weight", "scale"])
def test_a_second_derivative_is_refused(name: str, reduction: str):
    case = make(reduction=reduction)
    scale = torch.tensor(2.0, requires_grad=True)
    loss = scale * fused_kd_loss(**case.tensors, **case.options).loss.sum()
    (gradient,) = torch.autograd.grad(loss, case.tensors["student_input"], create_graph=True)
    by = {**case.tensors, "scale": scale}[name]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*use backend='reference'"):
        torch.autograd.grad(loss + gradient.square().sum(), by)


def test_fp16_gradients_survive_until_the_loss_scale():
    """A mean over many rows makes gradients below fp16's smallest number; a scaler's factor brings them back."""
    case = make(num_items=1e7).cast(torch.float16)
    (scaled,) = torch.autograd.grad(
        fused_kd_loss(**case.tensors, **case.options).loss * 2.0**20, case.tensors["student_weight"]
    )
    _, truth = ours(make(num_items=1e7 / 2**20), torch.float64)
    torch.testing.assert_close(scaled.double(), truth["student_weight"], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bias_of_minus_infinity_masks_a_token(backend: str):
    case = make(student_bias=True, teacher_bias=True, labels="none", vocab=61)
    for side in ("student", "teacher"):
        case.tensors[f"{side}_bias"].data[50:] = -torch.inf
    loss, grads = ours(case, torch.float64, backend)
    cut = make(student_bias=True, teacher_bias=True, labels="none", vocab=61, vocab_size=50)
    for side in ("student", "teacher"):
        cut.tensors[f"{side}_bias"].data[50:] = 0.0
    truth, true_grads = by_hand(cut, torch.float64)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(grads["student_weight"], true_grads["student_weight"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["student_input", "student_weight", "teacher_input", "teacher_weight"])
def test_nan_reaches_the_loss(name: str, backend: str):
    case = make(labels="none")
    case.tensors[name].data[2, 1] = torch.nan
    assert fused_kd_loss(**case.tensors, backend=backend).loss.isnan()


def test_nan_in_ignored_rows_reaches_nothing():
    case = make(labels="some ignored", ce_weight=0.5)
    case.tensors["student_input"].data[0] = torch.nan
    case.tensors["teacher_input"].data[4] = torch.inf
    loss, grads = ours(case, torch.float64)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["student_input"][::4] == 0).all()


def test_module_equals_function():
    case = make(vocabulary="paired", student_bias=True, row_weight=True, divergence="jsd", ce_weight=0.3)
    t = dict(case.tensors)
    fixed = {n: t.pop(n) for n in ("student_token_ids", "teacher_token_ids")}
    module = FusedKDLoss(**fixed, **case.options)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert "jsd" in repr(module).lower()
    torch.testing.assert_close(
        module(**t, num_items=5).loss, fused_kd_loss(**t, **fixed, **case.options, num_items=5).loss
    )


def test_beta_zero_and_one_are_the_two_kls():
    case = make()
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        end = fused_kd_loss(**case.tensors, divergence=JSD(beta=beta)).loss
        assert end == fused_kd_loss(**case.tensors, divergence=name).loss


def test_works_inside_torch_compile():
    case = make()
    compiled = torch.compile(lambda tensors: fused_kd_loss(**tensors).loss * 2, backend="eager")
    torch.testing.assert_close(compiled(case.tensors), fused_kd_loss(**case.tensors).loss * 2)
