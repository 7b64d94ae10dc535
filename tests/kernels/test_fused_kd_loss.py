"""The chunked backend against the eager reference in float64: loss and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdflow_kernels import fused_kd_loss, get_divergence, list_divergences

OPTIONS = {
    "plain": {},
    "cross-entropy": {"ce_weight": 0.3, "temperature": 2.0},
    "softcap": {"student_softcap": 5.0, "teacher_softcap": 7.0, "student_logit_scale": 0.5},
    "padded": {"vocab_size": 29, "ce_weight": 0.2},
    "small chunks": {"chunk_size": 3},
}


def make(num_rows: int = 11, vocab: int = 37, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(num_rows)
    labels = torch.randint(0, vocab, (num_rows,), generator=g)
    labels[1::4] = -100

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "student_input": normal(num_rows, 5).requires_grad_(),
        "student_weight": normal(vocab, 5).requires_grad_(),
        "teacher_input": normal(num_rows, 8),
        "teacher_weight": normal(vocab, 8),
        "shift_labels": labels,
        "student_bias": normal(vocab).requires_grad_(),
        "row_weight": torch.rand(num_rows, generator=g).to(dtype),
    }


def run(tensors: dict[str, torch.Tensor], **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = fused_kd_loss(**tensors, **options)
    inputs = [t for t in tensors.values() if t.requires_grad]
    return output.loss, list(torch.autograd.grad(output.loss * 1.7, inputs))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("divergence", list_divergences())
def test_torch_backend_equals_reference(divergence: str, options: dict) -> None:
    tensors = make()
    ours, ours_grads = run(tensors, divergence=divergence, backend="torch", **options)
    truth, truth_grads = run(tensors, divergence=divergence, backend="reference", **options)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)
    for a, b in zip(ours_grads, truth_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_errs_no_more_than_eager(divergence: str, dtype: torch.dtype) -> None:
    """Truth in float64 of the same values; eager in the dtype; ours within eager's error and a little."""
    low = make(40, 101, dtype)
    high = {n: t if t.dtype is torch.int64 else t.detach().double() for n, t in low.items()}
    for name in ("student_input", "student_weight", "student_bias"):
        high[name].requires_grad_()
    _, truth = run(high, divergence=divergence, backend="reference")
    _, eager = run(low, divergence=divergence, backend="reference")
    _, ours = run(low, divergence=divergence, backend="torch")
    for a, e, t in zip(ours, eager, truth, strict=True):
        error, allowed = (a.double() - t).norm(), (e.double() - t).norm()
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps * t.norm()


def test_forward_kl_is_what_torch_says() -> None:
    t = make()
    kept = t["shift_labels"] != -100
    z = F.linear(t["student_input"], t["student_weight"], t["student_bias"])[kept]
    p = F.linear(t["teacher_input"], t["teacher_weight"])[kept].log_softmax(-1)
    kl = F.kl_div(z.log_softmax(-1), p, log_target=True, reduction="none").sum(-1)
    ce = F.cross_entropy(z, t["shift_labels"][kept], reduction="none")
    expected = ((kl + 0.5 * ce) * t["row_weight"][kept]).sum() / 6
    ours = fused_kd_loss(**t, ce_weight=0.5, num_items=6)
    torch.testing.assert_close(ours.loss, expected)
    assert ours.num_tokens == kept.sum()
    assert not any(v.requires_grad for n, v in ours._asdict().items() if n != "loss")


def test_jsd_ends_are_the_two_kls() -> None:
    t = make()
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        end = fused_kd_loss(**t, divergence=get_divergence("jsd", beta=beta)).loss
        torch.testing.assert_close(end, fused_kd_loss(**t, divergence=name).loss)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(num_rows: int) -> None:
    loss, grads = run(make(num_rows), ce_weight=0.5)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)


def test_all_rows_ignored() -> None:
    t = make()
    t["shift_labels"].fill_(-100)
    loss, grads = run(t, ce_weight=0.5)
    assert loss == 0
    assert all((g == 0).all() for g in grads)


def test_paired_vocabularies() -> None:
    t = make()
    t["teacher_weight"] = torch.randn(50, 8, dtype=torch.float64)
    ids = {"student_token_ids": torch.tensor([3, 1, 30, 7]), "teacher_token_ids": torch.tensor([49, 0, 2, 8])}
    ours, ours_grads = run(t, backend="torch", ce_weight=0.4, **ids)
    truth, truth_grads = run(t, backend="reference", ce_weight=0.4, **ids)
    torch.testing.assert_close(ours, truth)
    for a, b in zip(ours_grads, truth_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_no_grad_and_frozen_head() -> None:
    t = make()
    with torch.no_grad():
        assert not fused_kd_loss(**t).loss.requires_grad
    t["student_weight"].requires_grad_(False)
    _, grads = run(t)
    assert len(grads) == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"divergence": "fkl"}, ValueError, "forward_kl"),
        ({"teacher_input": torch.zeros(3, 8, dtype=torch.float64)}, ValueError, "teacher_input"),
        ({"teacher_weight": torch.zeros(40, 8, dtype=torch.float64)}, ValueError, "vocab_size"),
        ({"shift_labels": torch.full((11,), 37)}, ValueError, "shift_labels"),
        ({"teacher_input": None, "teacher_weight": None}, ValueError, "kd_weight"),
        ({"backend": "triton"}, (ValueError, RuntimeError, NotImplementedError), "riton"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        fused_kd_loss(**{**make(), **change})
    assert message in str(caught.value)
