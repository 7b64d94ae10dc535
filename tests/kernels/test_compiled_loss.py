"""torch.compile(fullgraph=True) around the loss: the same numbers as eager, whatever is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from kd_oracle import Case
from test_fused_kd_loss import make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kdflow_kernels import (
    JSD,
    Divergence,
    FusedKDLoss,
    HierarchicalRanking,
    divergences,
    fused_kd_loss,
    list_divergences,
    register_divergence,
)
from kdflow_kernels.compiled_loss import decode, encode, kd_loss


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(tensors: dict[str, Tensor], options: dict):
    return fused_kd_loss(**{"teacher_input": None, "teacher_weight": None, **tensors}, **options)


def check(case: Case, dtype: torch.dtype = torch.float32, *, compiler: str = "aot_eager", **options) -> None:
    case = Case(case.tensors, {**case.options, **options}).cast(dtype)
    expected = loss_of(case.tensors, case.options)
    found = torch.compile(lambda tensors: loss_of(tensors, case.options), fullgraph=True, backend=compiler)(
        case.tensors
    )
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=0, atol=0, equal_nan=True)
        assert value.requires_grad == (name == "loss" and expected.loss.requires_grad)
    if not expected.loss.requires_grad:
        return
    wanted = case.gradients(expected.loss)
    for name, gradient in case.gradients(found.loss).items():
        # A loss scale of 1 or 2 is exact; a compiler may round the last product once more in bf16.
        tolerance = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, wanted[name], rtol=tolerance, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", JSD(0.3), "adaptive_kl", HierarchicalRanking(top_k=3)], ids=str)
def test_equals_eager(divergence: str | Divergence, reduction: str):
    case = make(ce_weight=0.4, row_weight=True, student_bias=True, temperature=1.7)
    check(case, divergence=divergence, reduction=reduction)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_compilers(compiler: str, reduction: str):
    check(make(ce_weight=0.4, divergence="jsd"), compiler=compiler, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes(dtype: torch.dtype, reduction: str):
    check(make(student_bias=True), dtype, reduction=reduction)


@pytest.mark.parametrize("vocabulary", ["padded", "paired"])
@pytest.mark.parametrize("labels", ["all", "none"])
def test_vocabularies(vocabulary: str, labels: str):
    check(make(vocabulary=vocabulary, labels=labels, teacher_bias=True), student_softcap=4.0, teacher_logit_scale=2.0)


@pytest.mark.parametrize("options", [{"grad_filter_eps": 1e-3}, {"chunk_size": 3}, {"num_items": 17}], ids=str)
def test_options(options: dict):
    check(make(ce_weight=0.4), **options)


def test_num_items_as_a_tensor():
    check(make(num_items=torch.tensor(17)))


@pytest.mark.parametrize("frozen", ["student_input", "student_weight", "student_bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_tensors_get_none(frozen: str, reduction: str):
    case = make(student_bias=True, ce_weight=0.2, reduction=reduction)
    case.tensors[frozen].requires_grad_(False)
    check(case)


def test_without_gradients():
    case = make(ce_weight=0.2)
    with torch.no_grad():
        check(case)
    check(Case({n: t.detach() for n, t in case.tensors.items()}, case.options))


def test_cross_entropy_alone():
    case = make(kd_weight=0.0, ce_weight=1.0)
    for name in ("teacher_input", "teacher_weight"):
        del case.tensors[name]
    check(case)


def test_the_triton_backend():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(make(ce_weight=0.3, divergence="jsd").to(device), backend="triton")


def test_every_divergence_goes_through_as_text():
    for name in list_divergences():
        divergence = divergences.get_divergence(name)
        assert decode(encode(divergence)) == divergence
        assert decode(encode(name)) == divergence
    assert decode(encode(JSD(beta=0.1 + 0.2))) == JSD(beta=0.1 + 0.2)


def test_a_users_own_divergence():
    @register_divergence("test-weighted kl")
    @dataclass(frozen=True)
    class WeightedKL(Divergence):
        weight: float = 2.0
        mode: str = "forward"
        half: float = field(init=False, default=0.5)
        scale: ClassVar[float] = 3.0

        def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
            p = self.weight * log_p.exp()
            return p * (log_p - log_q), -p

    try:
        check(make(), divergence=WeightedKL(3.0))
        check(make(), divergence="test-weighted kl")
    finally:
        del divergences._REGISTRY["test-weighted kl"]


@dataclass(frozen=True)
class Nameless(Divergence):
    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return log_p.exp() * (log_p - log_q), -log_p.exp()


@dataclass(frozen=True)
class Derived(JSD):
    """Has its parent's name, which is not its own."""


@pytest.mark.parametrize("divergence", [Nameless(), Derived()], ids=str)
def test_a_divergence_that_is_not_registered_is_named_in_the_error(divergence: Divergence):
    with pytest.raises(Exception, match=r"torch\.compile needs a registered one"):
        check(make(), divergence=divergence)


def test_errors_are_those_of_eager():
    case = make(ce_weight=0.5).cast(torch.float32)
    compiled = torch.compile(lambda tensors: loss_of(tensors, case.options).loss, fullgraph=True, backend="aot_eager")
    case.tensors["shift_labels"][3] = 61
    with pytest.raises(ValueError, match="shift_labels: expected 0 to 60"):
        compiled(case.tensors)
    case.tensors["teacher_input"] = case.tensors["teacher_input"][:, :4]
    with pytest.raises(ValueError, match="teacher_input: expected hidden size 10"):
        compiled(case.tensors)


def test_rows_and_items_that_change_do_not_compile_again():
    case = make(labels="none").cast(torch.float32)
    compiled = torch.compile(
        lambda tensors, items: loss_of(tensors, {"num_items": items}).loss, fullgraph=True, backend="aot_eager"
    )

    def rows(count: int) -> dict[str, Tensor]:
        return {n: t[:count] if n.endswith("input") else t for n, t in case.tensors.items()}

    for step, (count, items) in enumerate([(13, 13), (12, 12), (11, 30), (9, 31)]):
        with torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile"):
            found = compiled(rows(count), items)
        torch.testing.assert_close(found, loss_of(rows(count), {"num_items": items}).loss)


def test_backward_twice_through_a_retained_graph():
    case = make().cast(torch.float32)
    compiled = torch.compile(lambda tensors: loss_of(tensors, {}).loss, fullgraph=True, backend="aot_eager")
    loss, weight = compiled(case.tensors), case.tensors["student_weight"]
    (first,) = torch.autograd.grad(loss, weight, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(first, 3 * second)


def test_a_model_trains_as_it_does_in_eager():
    """The module between other layers, under autocast, with the head's weight used elsewhere too."""
    case = make(ce_weight=0.3, vocab=61).cast(torch.float32)
    criterion = FusedKDLoss(divergence=JSD(0.3), ce_weight=0.3)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        body, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 61, bias=False)

        def step(hidden: Tensor, body=body, head=head) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rows = torch.nn.functional.silu(body(hidden))
                t = case.tensors
                output = criterion(rows, head.weight, t["teacher_input"], t["teacher_weight"], t["shift_labels"])
            return output.loss + 1e-3 * head.weight.square().sum()

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.5)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(case.tensors["student_input"].detach())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(losses)
    assert results[0][-1] < results[0][0]
    assert results[1] == pytest.approx(results[0], rel=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: str):
    case = make(reduction=reduction).cast(torch.float32)
    compiled = torch.compile(lambda tensors: loss_of(tensors, case.options).loss, fullgraph=True, backend="eager")
    loss, hidden, weight = compiled(case.tensors).sum(), case.tensors["student_input"], case.tensors["student_weight"]
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*use backend='reference'"):
        torch.autograd.grad(loss + gradient.square().sum(), weight)


def test_fake_tensors_have_their_shapes_found():
    case = make(reduction="none", ce_weight=0.3).cast(torch.float32)
    mode = FakeTensorMode()
    tensors = {name: mode.from_tensor(tensor.detach()) for name, tensor in case.tensors.items()}
    with mode:
        inside = loss_of(tensors, case.options)
    for output in (inside, loss_of(tensors, case.options)):
        assert all(isinstance(value, FakeTensor) for value in output)
        assert output.loss.shape == case.tensors["shift_labels"].shape


def test_a_recorded_graph_has_the_loss_in_it():
    case = make(ce_weight=0.3).cast(torch.float32)

    def gradient(hidden: Tensor) -> Tensor:
        loss = loss_of({**case.tensors, "student_input": hidden}, case.options).loss
        return torch.autograd.grad(loss, hidden)[0]

    hidden = case.tensors["student_input"]
    graph = make_fx(gradient)(hidden)
    other = (hidden * 2.0).detach().requires_grad_()
    torch.testing.assert_close(graph(other), gradient(other))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_keeps_torchs_rules(reduction: str):
    """Schema, fake tensors, autograd: torch's own checks."""
    t = make(student_bias=True, ce_weight=0.3).cast(torch.float32).tensors
    numbers = {
        "divergence": "jsd(beta=0.3)", "temperature": 1.5, "kd_weight": 1.0, "ce_weight": 0.3,
        "ignore_index": -100, "reduction": reduction, "student_logit_scale": 1.0, "teacher_logit_scale": 1.0,
        "student_softcap": None, "teacher_softcap": None, "vocab_size": None, "chunk_size": None,
        "grad_filter_eps": 0.0, "backend": "torch", "needs": [True, True, True],
    }  # fmt: skip
    tensors = (
        t["student_input"], t["student_weight"], t["student_bias"], t["teacher_input"], t["teacher_weight"], None,
        t["shift_labels"], None, None, None, None, None,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kd_loss, tensors, numbers, test_utils=tests)


@pytest.mark.gpu
class TestOnTheGPU:
    @staticmethod
    def tensors(num_rows: int = 1024, vocab: int = 32_000, hidden: int = 256) -> dict[str, Tensor]:
        torch.manual_seed(0)
        made = {
            "student_input": torch.randn(num_rows, hidden), "student_weight": torch.randn(vocab, hidden) / 8,
            "teacher_input": torch.randn(num_rows, hidden), "teacher_weight": torch.randn(vocab, hidden) / 8,
        }  # fmt: skip
        made = {name: tensor.cuda().bfloat16() for name, tensor in made.items()}
        made["student_input"].requires_grad_()
        made["student_weight"].requires_grad_()
        made["shift_labels"] = torch.randint(0, vocab, (num_rows,), device="cuda")
        made["shift_labels"][::5] = -100
        return made

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    @pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "adaptive_kl", "hierarchical_ranking"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_equals_eager(self, divergence: str, mode: str, reduction: str):
        options = {"divergence": divergence, "ce_weight": 0.3, "reduction": reduction}
        tensors = self.tensors()
        expected = Case(tensors).gradients(loss_of(tensors, options).loss)
        compiled = torch.compile(lambda t: loss_of(t, options).loss, fullgraph=True, mode=mode)
        for _ in range(4):  # warm-up, recording, replays
            torch.compiler.cudagraph_mark_step_begin()
            found = {n: g.clone() for n, g in Case(tensors).gradients(compiled(tensors)).items()}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-6)

    def test_the_host_never_waits(self):
        tensors = self.tensors()
        compiled = torch.compile(lambda t: loss_of(t, {"ce_weight": 0.3}).loss, fullgraph=True)
        for _ in range(2):
            compiled(tensors).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(tensors).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_peak_memory_is_eagers(self):
        tensors = self.tensors(num_rows=4096, vocab=64_000, hidden=1024)
        peaks = []
        for step in (loss_of, torch.compile(loss_of, fullgraph=True)):
            for _ in range(2):
                tensors["student_input"].grad = tensors["student_weight"].grad = None
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(tensors, {}).loss.backward()
                torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        # Beyond it, at most one more gradient of the weight: the product with the loss's own.
        assert peaks[1] <= peaks[0] + 1.05 * tensors["student_weight"].nbytes
