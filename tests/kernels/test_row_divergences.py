"""Divergences of whole rows in the Triton backend, on logits that are given: ties, extremes, wide rows."""

from __future__ import annotations

import pytest
import torch
from kd_oracle import kl, ranking_of_logits
from test_fused_kd_loss import make
from torch import Tensor

from kdflow_kernels import AdaptiveKL, Divergence, HierarchicalRanking, Top1CE, fused_kd_loss, triton_backend

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OF_ROWS = [AdaptiveKL(), Top1CE(), HierarchicalRanking()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_backend, "LANES", 32)


def from_logits(student: Tensor, teacher: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient (N, V), by the kernels; the hidden states are unit vectors."""
    hidden = torch.eye(len(student), device=DEVICE)
    weight = student.T.float().contiguous().to(DEVICE).requires_grad_()
    teacher = teacher.T.float().contiguous().to(DEVICE)
    output = fused_kd_loss(
        hidden, weight, hidden, teacher, divergence=divergence, reduction="none", chunk_size=3, backend="triton"
    )
    (gradient,) = torch.autograd.grad(output.loss.sum(), weight)
    return output.loss.detach().double().cpu(), gradient.T.double().cpu()


def expected(student: Tensor, teacher: Tensor, rows) -> tuple[Tensor, Tensor]:
    z = student.double().requires_grad_()
    loss = rows(teacher.double().log_softmax(-1), z.log_softmax(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


def check(student: Tensor, teacher: Tensor, divergence: Divergence, rows, *, atol: float = 3e-6) -> None:
    # The GPU's logarithm is good to 2^-22; see jit_math.
    looser = 10.0 if DEVICE == "cuda" else 1.0
    for found, wanted in zip(from_logits(student, teacher, divergence), expected(student, teacher, rows), strict=True):
        torch.testing.assert_close(found, wanted, rtol=3e-5 * looser, atol=atol * looser)


def logits(num_rows: int, vocab: int, *, seed: int, integers: bool = False) -> Tensor:
    z = 2.0 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))
    return z.round() if integers else z


def adaptive_by_hand(alpha: float):
    """Of equal tokens the first ones are the tail's."""

    def rows(log_p: Tensor, log_q: Tensor) -> Tensor:
        losses = []
        for lp, lq in zip(log_p, log_q, strict=True):
            p, gap = lp.exp(), (lp.exp() - lq.exp()).abs().detach()
            order = p.argsort(stable=True)
            tail = order[p[order].cumsum(0) <= alpha]
            share = gap[tail].sum() / gap.sum()
            losses.append((1 - share) * kl(lp, lq) + share * kl(lq, lp))
        return torch.stack(losses)

    return rows


# Blocks of 128 columns: less than one, one, several with a rest.
@pytest.mark.parametrize("integers", [False, True], ids=["all distinct", "many equal"])
@pytest.mark.parametrize("alpha", [0.003, 0.3171, 0.5123, 0.9127])
@pytest.mark.parametrize("vocab", [2, 128, 300])
def test_the_tail_is_what_sorting_finds(vocab: int, alpha: float, integers: bool):
    student, teacher = (logits(4, vocab, seed=seed, integers=integers) for seed in (1, 2))
    check(student, teacher, AdaptiveKL(alpha), adaptive_by_hand(alpha))


@pytest.mark.parametrize("vocab", [3, 300])
@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_the_tail_of_a_uniform_teacher_is_its_first_columns(vocab: int, alpha: float):
    check(logits(4, vocab, seed=3), torch.zeros(4, vocab), AdaptiveKL(alpha), adaptive_by_hand(alpha))


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 50.0, 3e3])
def test_tails_of_flat_and_of_steep_teachers(spread: float):
    """Neighbouring floats at one end, probabilities that vanish at the other."""
    student, teacher = logits(5, 300, seed=4), 100.0 + spread * logits(5, 300, seed=5)
    # 3e3: the reverse divergence counts in thousands.
    check(student, teacher, AdaptiveKL(0.4321), adaptive_by_hand(0.4321), atol=3e-6 * max(1.0, spread))


def test_a_tail_that_takes_everything():
    """alpha rounds to 1: the sums' rounding decides whether the most likely token is of the tail, too."""
    student, teacher = logits(4, 300, seed=6), logits(4, 300, seed=7)
    found, _ = from_logits(student, teacher, AdaptiveKL(1.0 - 1e-12))
    all_of_it, _ = expected(student, teacher, lambda log_p, log_q: kl(log_q, log_p))
    but_one, _ = expected(student, teacher, adaptive_by_hand(1.0 - 1e-12))
    assert (torch.minimum((found - all_of_it).abs(), (found - but_one).abs()) < 1e-4).all()


@pytest.mark.parametrize("integers", [False, True], ids=["all distinct", "many equal"])
@pytest.mark.parametrize("top_k", [1, 5, 20])
@pytest.mark.parametrize("vocab", [3, 300])
def test_ranking_of_the_first_choices(vocab: int, top_k: int, integers: bool):
    student, teacher = (logits(4, vocab, seed=seed, integers=integers) for seed in (8, 9))
    check(student, teacher, HierarchicalRanking(top_k), lambda log_p, log_q: ranking_of_logits(log_p, log_q, top_k))


def test_choices_that_share_a_place():
    """All favourites lie whole blocks apart, so that each is found where the one before was."""
    student, teacher = logits(4, 700, seed=10), logits(4, 700, seed=11)
    for side, offset in ((student, 5), (teacher, 77)):
        columns = torch.arange(offset, 700, 128)
        side[:, columns] = torch.linspace(9.0, 10.0, len(columns))[torch.randperm(len(columns))]
    check(student, teacher, HierarchicalRanking(5), lambda log_p, log_q: ranking_of_logits(log_p, log_q, 5))


def test_first_of_equal_choices_is_the_teachers():
    teacher = torch.zeros(2, 300)
    teacher[0, [40, 200, 299]] = teacher[1, [170, 171]] = 3.0
    check(logits(2, 300, seed=12), teacher, Top1CE(), Top1CE().rows)


@pytest.mark.parametrize("divergence", OF_ROWS, ids=lambda d: d.name)
@pytest.mark.parametrize("name", ["student_input", "teacher_input", "teacher_weight"])
def test_nan_reaches_the_loss(name: str, divergence: Divergence):
    case = make(labels="none").cast(torch.float32).to(DEVICE)
    case.tensors[name].data[2, 1] = torch.nan
    assert fused_kd_loss(**case.tensors, divergence=divergence, backend="triton").loss.isnan()


@pytest.mark.parametrize("divergence", OF_ROWS, ids=lambda d: d.name)
def test_masked_tokens_are_nobodys_choice(divergence: Divergence):
    """Fewer tokens than choices are left."""
    case = make(student_bias=True, teacher_bias=True, labels="none", vocab=200)
    cut = make(student_bias=True, teacher_bias=True, labels="none", vocab=200, vocab_size=3)
    for side in ("student", "teacher"):
        case.tensors[f"{side}_bias"].data[3:] = -torch.inf
        cut.tensors[f"{side}_bias"].data[3:] = 0.0
    found, truth = (
        fused_kd_loss(**c.tensors, **c.options, divergence=divergence, backend=backend).loss
        for c, backend in ((case.cast(torch.float32).to(DEVICE), "triton"), (cut.to(DEVICE), "reference"))
    )
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", OF_ROWS, ids=lambda d: d.name)
def test_without_gradients(divergence: Divergence):
    case = make(labels="none", vocab=300).cast(torch.float32).to(DEVICE)
    with torch.no_grad():
        loss = fused_kd_loss(**case.tensors, divergence=divergence, backend="triton").loss
    torch.testing.assert_close(
        loss, fused_kd_loss(**case.tensors, divergence=divergence, backend="triton").loss.detach()
    )
