"""The loss written a second time, the way one would by hand: full logits, torch's own functions, autograd.

In float64 it is the truth; in a low dtype (matrix products in it, softmax in float32) what eager code makes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kdflow_kernels import Divergence, get_divergence


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)


def mixture(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack((log_a + math.log(weight), log_b + math.log(1 - weight))), 0)


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    log_m = mixture(beta, log_p, log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def adaptive(log_p: Tensor, log_q: Tensor, alpha: float = 0.5) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    order = p.argsort(-1)
    in_order = p.gather(-1, order).double().cumsum(-1) <= alpha
    is_tail = torch.zeros_like(in_order).scatter(-1, order, in_order)
    gap = (p - q).abs().detach()
    g_tail = gap.where(is_tail, 0.0).sum(-1)
    g_head = gap.sum(-1) - g_tail
    both = (g_head + g_tail).clamp(min=torch.finfo(p.dtype).tiny)  # 0 / 0 where p is q
    return (g_head * kl(log_p, log_q) + g_tail * kl(log_q, log_p)) / both


def ranking(log_p: Tensor, log_q: Tensor, top_k: int = 5) -> Tensor:
    def top(log_probs: Tensor) -> list[list[int]]:
        return log_probs.exp().topk(min(top_k, log_probs.shape[-1])).indices.tolist()

    return _ranking(log_p, log_q, top(log_p), top(log_q))


def ranking_of_logits(log_p: Tensor, log_q: Tensor, top_k: int = 5) -> Tensor:
    """The same where probabilities vanish: by the logits, of equal ones the first."""

    def top(log_probs: Tensor) -> list[list[int]]:
        return log_probs.argsort(dim=-1, descending=True, stable=True)[:, :top_k].tolist()

    return _ranking(log_p, log_q, top(log_p), top(log_q))


def _ranking(log_p: Tensor, log_q: Tensor, teacher_top: list[list[int]], student_top: list[list[int]]) -> Tensor:
    losses = []
    for p, q, v, u in zip(log_p.exp(), log_q.exp(), teacher_top, student_top, strict=True):
        total = sum((q[i] - q[v[0]]).clamp(min=0) for i in v)
        total = total + sum((q[j] - q[i]).clamp(min=0) for i in v for j in u if p[i] > p[j])
        losses.append(total)
    return torch.stack(losses) if losses else log_q.sum(-1)


BY_HAND = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "skewed_forward_kl": lambda log_p, log_q: kl(log_p, mixture(0.1, log_p, log_q)),
    "skewed_reverse_kl": lambda log_p, log_q: kl(log_q, mixture(0.1, log_q, log_p)),
    "tvd": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    "jeffreys": lambda log_p, log_q: kl(log_p, log_q) + kl(log_q, log_p),
    "adaptive_kl": adaptive,
    "top1_ce": lambda log_p, log_q: F.nll_loss(log_q, log_p.argmax(-1), reduction="none") * log_p.exp().amax(-1),
    "hierarchical_ranking": ranking,
}


@dataclass
class Case:
    """Inputs of one loss. ``tensors`` and ``options`` are fused_kd_loss's, by name."""

    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype, with gradients asked for where they were."""
        made = {}
        for name, tensor in self.tensors.items():
            made[name] = tensor
            if tensor.is_floating_point():
                made[name] = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
        return Case(made, self.options)

    def to(self, device: torch.device | str) -> Case:
        moved = {name: t.detach().to(device).requires_grad_(t.requires_grad) for name, t in self.tensors.items()}
        return Case(moved, self.options)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        wanted = {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}
        # Uneven, so that a loss per row has a gradient of its own in every row.
        seed = torch.linspace(1.0, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), seed), strict=True))


def by_hand(case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    case = case.cast(dtype)
    t, o = case.tensors, case.options
    wide = torch.promote_types(dtype, torch.float32)

    def logits(side: str) -> Tensor:
        z = F.linear(t[f"{side}_input"], t[f"{side}_weight"], t.get(f"{side}_bias"))
        z = z * o.get(f"{side}_logit_scale", 1.0)
        cap = o.get(f"{side}_softcap")
        return (z if cap is None else cap * (z / cap).tanh()).to(wide)

    student, labels = logits("student"), t.get("shift_labels")
    keep = (
        torch.ones(len(student), dtype=torch.bool, device=student.device)
        if labels is None
        else labels != o.get("ignore_index", -100)
    )
    loss = torch.zeros(len(student), dtype=wide, device=student.device)
    if "teacher_input" in t and o.get("kd_weight", 1.0) != 0.0:
        ids = [t.get(f"{side}_token_ids", slice(0, o.get("vocab_size"))) for side in ("student", "teacher")]
        temperature = o.get("temperature", 1.0)
        log_q = (student[keep][:, ids[0]] / temperature).log_softmax(-1)
        log_p = (logits("teacher").detach()[keep][:, ids[1]] / temperature).log_softmax(-1)
        divergence = o.get("divergence", "forward_kl")
        name = divergence.name if isinstance(divergence, Divergence) else divergence
        rows = BY_HAND.get(name) or get_divergence(name).rows
        loss = loss.index_put((keep,), o.get("kd_weight", 1.0) * rows(log_p, log_q), accumulate=True)
    if o.get("ce_weight", 0.0):
        ce = F.cross_entropy(student, labels, reduction="none", ignore_index=o.get("ignore_index", -100))
        loss = loss + o["ce_weight"] * ce
    if "row_weight" in t:
        loss = loss * t["row_weight"].to(wide) * keep
    if o.get("reduction", "mean") != "none":
        loss = loss.sum()
    if o.get("reduction", "mean") == "mean":
        loss = loss / o.get("num_items", max(int(keep.sum()), 1))
    return loss, case.gradients(loss)


def ours(case: Case, dtype: torch.dtype, backend: str = "torch") -> tuple[Tensor, dict[str, Tensor]]:
    from kdflow_kernels import fused_kd_loss

    case = case.cast(dtype)
    given = {"teacher_input": None, "teacher_weight": None, **case.tensors}
    loss = fused_kd_loss(**given, **case.options, backend=backend).loss  # type: ignore[arg-type]
    return loss, case.gradients(loss)


def check_against_oracle(
    case: Case, dtype: torch.dtype, backend: str = "torch", *, factor: float = 1.5, roundings: int = 2
) -> None:
    """Ours may err from the truth ``factor`` times what eager code does, plus some roundings of the result.

    In float64, where eager is the truth, 1e-11 of the result.

    Truth and eager get the values the dtype can hold, so that only the arithmetic is compared.
    """
    case = case.cast(dtype)
    (true_loss, true_grads), (eager_loss, eager_grads) = by_hand(case, torch.float64), by_hand(case, dtype)
    loss, grads = ours(case, dtype, backend)
    eps = torch.finfo(dtype).eps
    assert grads.keys() == true_grads.keys()
    for name, got, eager, true in [
        ("loss", loss, eager_loss, true_loss),
        *((name, grads[name], eager_grads[name], true_grads[name]) for name in grads),
    ]:
        if name != "loss":
            assert got.dtype == dtype
        error, allowed = (got.double() - true).norm(), (eager.double() - true).norm()
        limit = factor * allowed + roundings * eps * true.norm() + eps * 1e-3
        if dtype == torch.float64:
            limit = 1e-11 * true.norm() + 1e-13
        assert error <= limit, f"{name}: error {error:.3e}, eager's {allowed:.3e}, limit {limit:.3e}"
