"""The Triton backend by the three-way oracle: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import kd_oracle
import pytest
import torch
from kd_oracle import Case, ours
from test_fused_kd_loss import FACTORS, covering_case, describe, make, one_hot_case, pairwise
from torch import Tensor

from kdflow_kernels import (
    Divergence,
    HierarchicalRanking,
    cluster_rows,
    fused_kd_loss,
    get_divergence,
    list_divergences,
    triton_backend,
)
from kdflow_kernels.problem import GradientNeeds, Head, Problem

pytest.importorskip("triton")
pytestmark = pytest.mark.any_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = [name for name in list_divergences() if get_divergence(name).jit() is not None]
COVERED = {**FACTORS, "divergence": tuple(DIVERGENCES), "dtype": (torch.float32, torch.bfloat16, torch.float16)}
# A tie that rounding breaks the other way moves these by a jump; eager code has as many, in other places.
JUMPING = ("tvd", "adaptive_kl", "top1_ce", "hierarchical_ranking")
del COVERED["hidden_size"]  # means nothing here


def check(case: Case, dtype: torch.dtype, *, factor: float = 1.5) -> None:
    # The GPU's logarithm is good to 2^-22: 2.4e-6 of a probability's of e^-10. See jit_math.
    roundings = 2 if dtype != torch.float32 else 32 if DEVICE == "cuda" else 8
    kd_oracle.check_against_oracle(case, dtype, "triton", factor=factor, roundings=roundings)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Several blocks, the last one uneven, and several groups, at shapes that a test can afford."""
    monkeypatch.setattr(triton_backend, "LANES", 32)
    monkeypatch.setattr(triton_backend, "LOGITS_BYTES", 10 * 256 * 4)


@pytest.fixture(params=[False, True], ids=["logits in the head's dtype", "fp32 logits"])
def fp32_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_backend, "_fp32_logits", request.param)


@pytest.mark.parametrize("case", pairwise(COVERED), ids=describe)
def test_covering_design(case: dict):
    made, dtype = covering_case(case)
    low = dtype != torch.float32
    check(made.to(DEVICE), dtype, factor=3.0 if case["divergence"] in JUMPING and low else 1.5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.usefixtures("fp32_logits")
def test_every_divergence_in_bf16(divergence: str):
    case = make(divergence=divergence, ce_weight=0.3, vocab=300, num_rows=20).to(DEVICE)
    check(case, torch.bfloat16, factor=3.0 if divergence in JUMPING else 1.5)


def test_fp32_logits_are_closer_than_bf16_ones(monkeypatch: pytest.MonkeyPatch):
    """What the option is for: the truth is of the same bf16 inputs."""
    case = make(vocab=300, num_rows=24, labels="none").to(DEVICE).cast(torch.bfloat16)
    case.tensors["student_input"].data.mul_(4.0)
    _, truth = ours(case, torch.float64, "reference")
    errors = []
    for fp32 in (False, True):
        monkeypatch.setattr(triton_backend, "_fp32_logits", fp32)
        _, found = ours(case, torch.bfloat16, "triton")
        errors.append((found["student_input"].double() - truth["student_input"]).norm())
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows, ignore", [(0, False), (1, False), (1, True), (9, True)])
def test_few_rows_and_all_ignored(num_rows: int, ignore: bool, reduction: str):
    case = make(num_rows=num_rows, labels="all", ce_weight=0.5, reduction=reduction, student_bias=True).to(DEVICE)
    if ignore:
        case.tensors["shift_labels"].fill_(-100)
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand(divergence: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    # All but two of the teacher's probabilities vanish; what torch.topk takes of equals is no rule.
    monkeypatch.setitem(kd_oracle.BY_HAND, "hierarchical_ranking", kd_oracle.ranking_of_logits)
    check(one_hot_case(divergence).to(DEVICE), dtype)


@pytest.mark.parametrize("vocabulary", ["same", "padded", "paired"])
@pytest.mark.usefixtures("fp32_logits")
def test_rows_of_output_are_the_torch_backends(vocabulary: str):
    """Entropies, agreement and both terms, per row."""
    case = make(vocabulary=vocabulary, ce_weight=0.5, temperature=1.7, reduction="none", vocab=150).cast(torch.float32)
    case = case.to(DEVICE)
    found, expected = (fused_kd_loss(**case.tensors, **case.options, backend=name) for name in ("triton", "torch"))
    for name, value in found._asdict().items():
        torch.testing.assert_close(
            value, getattr(expected, name), rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("labels", ["all", "some ignored", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_inputs_may_be_views(labels: str, reduction: str):
    """Every second number of memory that holds NaN, or labels out of range, between them."""

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        other = 10**6 if tensor.dtype == torch.int64 else torch.nan
        wide = torch.full((*tensor.shape, 2), other, dtype=tensor.dtype, device=tensor.device)
        wide[..., 0] = tensor.detach()
        return wide[..., 0].requires_grad_(tensor.requires_grad)

    case = make(labels=labels, reduction=reduction, row_weight=True, student_bias=True, teacher_bias=True)
    case = case.cast(torch.float32).to(DEVICE)
    case.options["ce_weight"] = 0.0 if labels == "none" else 0.3
    loss, gradients = ours(case, torch.float32, "triton")
    views = Case({name: spread(tensor) for name, tensor in case.tensors.items()}, case.options)
    assert not views.tensors["row_weight"].is_contiguous()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Case, "cast", lambda self, dtype: self)  # would make them dense
        again, gradients_again = ours(views, torch.float32, "triton")
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("token", [0, 31, 128, 200, 256])
def test_agreement_finds_the_top_token(token: int):
    vocab = 257
    hidden = torch.eye(4, device=DEVICE)
    weight = torch.randn(vocab, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight[token] = 20.0
    output = fused_kd_loss(hidden, weight, hidden, weight.clone(), backend="triton")
    assert output.top1_agreement == 1
    assert fused_kd_loss(hidden, weight, hidden, weight.roll(1, 0), backend="triton").top1_agreement == 0


def test_of_equal_tokens_the_first_is_the_top():
    """As argmax has it: student and teacher tie between other tokens, with the same first one."""
    hidden = torch.ones(1, 1, device=DEVICE)
    student, teacher = (torch.zeros(257, 1, device=DEVICE) for _ in range(2))
    student[[37, 201]] = teacher[[37, 150]] = 5.0
    assert fused_kd_loss(hidden, student, hidden, teacher, backend="triton").top1_agreement == 1
    teacher[36] = 5.0
    assert fused_kd_loss(hidden, student, hidden, teacher, backend="triton").top1_agreement == 0


@pytest.mark.parametrize("kept_share", [0, 1, 2, 100])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("vocab", [60, 300])
def test_where_a_pass_is_cut_changes_nothing(
    vocab: int, divergence: str, kept_share: int, monkeypatch: pytest.MonkeyPatch
):
    """For the cache alone; a block, and three of them, the last one uneven."""
    case = make(divergence=divergence, ce_weight=0.3, temperature=1.5, vocab=vocab).to(DEVICE)
    expected_loss, expected = ours(case, torch.float32, "triton")
    monkeypatch.setattr(triton_backend, "KEPT_SHARE", kept_share)
    loss, gradients = ours(case, torch.float32, "triton")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


def test_cross_entropy_alone():
    case = make(kd_weight=0.0, ce_weight=1.0)
    for name in ("teacher_input", "teacher_weight"):
        del case.tensors[name]
    check(case.to(DEVICE), torch.float32)


def test_no_weight_no_gradient():
    """As where the divergence is warmed up from nothing, with labels for a mask."""
    case = make(kd_weight=0.0, student_bias=True)
    loss, gradients = ours(case.to(DEVICE), torch.float32, "triton")
    assert loss == 0.0
    assert set(gradients) == {"student_input", "student_weight", "student_bias"}
    assert not any(gradient.any() for gradient in gradients.values())


def test_every_token_paired_with_a_teacher_in_fp16():
    case = make(vocabulary="paired", vocab=50).to(DEVICE)
    case.tensors["student_token_ids"] = torch.arange(50, device=DEVICE)
    case.tensors["teacher_token_ids"] = torch.arange(9, 59, device=DEVICE)
    true, _ = ours(case, torch.float64, "reference")
    found, _ = ours(case, torch.float16, "triton")
    torch.testing.assert_close(found.double(), true, rtol=5e-3, atol=0.0)


def test_cross_entropy_alone_has_the_entropy_of_the_tokens_asked_for():
    case = make(vocabulary="paired", kd_weight=0.0, ce_weight=1.0).cast(torch.float32).to(DEVICE)
    case.tensors |= dict.fromkeys(("teacher_input", "teacher_weight", "teacher_token_ids"))
    expected = fused_kd_loss(**case.tensors, **case.options, backend="torch").student_entropy
    found = fused_kd_loss(**case.tensors, **case.options, backend="triton").student_entropy
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", ["student_input", "student_weight", "teacher_input", "teacher_weight"])
def test_nan_reaches_the_loss(name: str):
    case = make(labels="none").cast(torch.float32).to(DEVICE)
    case.tensors[name].data[2, 1] = torch.nan
    assert fused_kd_loss(**case.tensors, backend="triton").loss.isnan()


def test_bias_of_minus_infinity_masks_a_token():
    case = make(student_bias=True, teacher_bias=True, labels="none", vocab=61)
    cut = make(student_bias=True, teacher_bias=True, labels="none", vocab=61, vocab_size=50)
    for side in ("student", "teacher"):
        case.tensors[f"{side}_bias"].data[50:] = -torch.inf
        cut.tensors[f"{side}_bias"].data[50:] = 0.0
    loss, grads = ours(case.to(DEVICE), torch.float32, "triton")
    truth, true_grads = ours(cut.to(DEVICE), torch.float64, "reference")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads["student_weight"].double(), true_grads["student_weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", ["student_input", "student_weight", "student_bias"])
def test_frozen_tensors_cost_nothing(frozen: str, monkeypatch: pytest.MonkeyPatch):
    case = make(student_bias=True, ce_weight=0.2).to(DEVICE)
    case.tensors[frozen].requires_grad_(False)
    formed = []
    run = triton_backend.run
    monkeypatch.setattr(triton_backend, "run", lambda *args: formed.append(run(*args)) or formed[-1])
    check(case, torch.float32)
    assert getattr(formed[-1][1], frozen.removeprefix("student_")) is None


def test_a_scaled_loss_scales_the_gradients():
    case = make(labels="none").cast(torch.float32).to(DEVICE)
    weight = case.tensors["student_weight"]
    (found,) = torch.autograd.grad(3.0 * fused_kd_loss(**case.tensors, backend="triton").loss, weight)
    (expected,) = torch.autograd.grad(fused_kd_loss(**case.tensors, backend="triton").loss, weight)
    torch.testing.assert_close(found, 3.0 * expected)


def test_fp16_gradients_survive_until_the_loss_scale():
    case = make(num_items=1e7).cast(torch.float16).to(DEVICE)
    loss = fused_kd_loss(**case.tensors, **case.options, backend="triton").loss * 2.0**20
    (scaled,) = torch.autograd.grad(loss, case.tensors["student_weight"])
    _, truth = ours(make(num_items=1e7 / 2**20).to(DEVICE), torch.float64, "torch")
    torch.testing.assert_close(scaled.double(), truth["student_weight"], rtol=1e-2, atol=1e-4)


def test_a_teacher_much_wider_than_the_student_stays_within_32_bits():
    def head(vocab_size: int, paired: Tensor) -> Head:
        hidden, weight = torch.zeros(1, 1).expand(16384, 8), torch.zeros(1, 1).expand(vocab_size, 8)
        return Head(hidden, weight, None, 1.0, None, paired)

    problem = Problem(
        student=head(32_000, torch.arange(100)),
        teacher=head(262_144, torch.arange(100)),
        labels=None,
        row_scale=torch.ones(16384),
        num_compared=100,
        divergence=get_divergence("forward_kl"),
        temperature=1.0,
        kd_weight=1.0,
        ce_weight=0.0,
        chunk_size=16384,
        grad_filter_eps=0.0,
    )
    run = triton_backend._Run(problem, GradientNeeds(False, False, False))
    assert run.teacher_width >= 262_144
    assert run.chunk_rows * run.teacher_width < 2**31


@dataclass(frozen=True)
class WithoutJIT(Divergence):
    def pointwise(self, log_p: torch.Tensor, log_q: torch.Tensor):
        return log_p.exp() * (log_p - log_q), -log_p.exp()


@pytest.mark.parametrize("divergence", [WithoutJIT(), HierarchicalRanking(top_k=100)])
def test_what_the_kernels_do_not_cover_goes_to_torch(divergence: Divergence, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_backend, "run", lambda *_: pytest.fail("has no form of it"))
    case = make(divergence=divergence, labels="none").cast(torch.float32).to(DEVICE)
    assert fused_kd_loss(**case.tensors, **case.options, backend="triton").loss.isfinite()


def bf16_case(num_rows: int, vocab: int, hidden: int, teacher_hidden: int, **options) -> Case:
    """On the GPU; logits of a usual spread."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(shape, generator=g, device="cuda")).bfloat16()

    tensors = {
        "student_input": normal(num_rows, hidden).requires_grad_(),
        "student_weight": normal(vocab, hidden, std=2 * hidden**-0.5).requires_grad_(),
        "teacher_input": normal(num_rows, teacher_hidden),
        "teacher_weight": normal(vocab, teacher_hidden, std=2 * teacher_hidden**-0.5),
    }
    if options.get("ce_weight"):
        tensors["shift_labels"] = torch.randint(0, vocab, (num_rows,), generator=g, device="cuda")
        tensors["shift_labels"][::5] = -100
    return Case(tensors, options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
class TestOnTheGPU:
    @pytest.fixture(autouse=True, params=[False, True], ids=["row kernel", "clusters"])
    def small_blocks(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
        """As users have them; those that are covered with rows in clusters, too."""
        monkeypatch.undo()
        if request.param and cluster_rows.unavailable(torch.device("cuda", 0)) is not None:
            pytest.skip("this GPU has no clusters")
        monkeypatch.setattr(triton_backend, "CLUSTER_ROWS", request.param)
        torch.cuda.empty_cache()  # workers beside this one need it

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_every_divergence(self, divergence: str):
        case = bf16_case(700, 50_257, 256, 384, divergence=divergence, ce_weight=0.2, temperature=1.5)
        check(case, torch.bfloat16, factor=3.0 if divergence in JUMPING else 1.5)

    @pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
    @pytest.mark.usefixtures("fp32_logits")
    def test_a_wide_vocabulary(self, divergence: str):
        check(bf16_case(600, 151_936, 512, 256, divergence=divergence), torch.bfloat16)
        check(bf16_case(90, 262_144, 128, 128, divergence=divergence, ce_weight=0.3), torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_other_dtypes(self, dtype: torch.dtype):
        check(bf16_case(300, 32_000, 128, 128, ce_weight=0.5), dtype)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_the_same_again_is_the_same_to_the_bit(self, divergence: str):
        case = bf16_case(2500, 64_000, 256, 256, divergence=divergence)
        loss, grads = ours(case, torch.bfloat16, "triton")
        for _ in range(5):
            again, grads_again = ours(case, torch.bfloat16, "triton")
            assert torch.equal(loss, again)
            assert all(torch.equal(grads[name], grads_again[name]) for name in grads)

    def test_the_host_never_waits(self):
        case = bf16_case(3000, 32_000, 256, 256, ce_weight=0.5)
        ours(case, torch.bfloat16, "triton")  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours_loss = fused_kd_loss(**case.tensors, **case.options)
            ours_loss.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_peak_memory(self):
        """Beyond inputs and gradients, both blocks of logits and little more."""
        case = bf16_case(8192, 151_936, 256, 256)
        h, w = case.tensors["student_input"], case.tensors["student_weight"]
        fused_kd_loss(**case.tensors).loss.backward()
        h.grad = w.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_kd_loss(**case.tensors).loss.backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before - h.nbytes - w.nbytes
        assert peak < 2**30

    @pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "adaptive_kl", "hierarchical_ranking"])
    def test_in_a_cuda_graph(self, divergence: str):
        case = bf16_case(512, 32_000, 128, 128, divergence=divergence)
        tensors = case.tensors
        for name in ("student_input", "student_weight"):
            tensors[name].grad = torch.zeros_like(tensors[name])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fused_kd_loss(**tensors, **case.options).loss.backward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for name in ("student_input", "student_weight"):
            tensors[name].grad = None
        with torch.cuda.graph(graph):
            output = fused_kd_loss(**tensors, **case.options)
            output.loss.backward()
        tensors["student_input"].data.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        captured = tensors["student_weight"].grad.clone()
        loss, grads = ours(case, torch.bfloat16, "triton")
        torch.testing.assert_close(output.loss, loss)
        assert torch.equal(captured, grads["student_weight"])
