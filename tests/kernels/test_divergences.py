from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kd_oracle import BY_HAND, Case, check_against_oracle, jsd
from torch import Tensor

from kdflow_kernels import (
    JSD,
    AdaptiveKL,
    Divergence,
    ForwardKL,
    HierarchicalRanking,
    SkewedForwardKL,
    SkewedReverseKL,
    fused_kd_loss,
    get_divergence,
    list_divergences,
    register_divergence,
)


def log_probs(num_rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_rows, vocab, generator=g, dtype=torch.float64)).log_softmax(-1)


def test_the_family_is_complete():
    assert set(list_divergences()) >= set(BY_HAND)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_equals_the_formula_by_hand(name: str):
    log_p, log_q = log_probs(6, 23, seed=1), log_probs(6, 23, seed=2).requires_grad_()
    ours, by_hand = get_divergence(name).rows(log_p, log_q), BY_HAND[name](log_p, log_q)
    torch.testing.assert_close(ours, by_hand)
    for a, b in zip(torch.autograd.grad(ours.sum(), log_q), torch.autograd.grad(by_hand.sum(), log_q), strict=True):
        torch.testing.assert_close(a, b)


# Adaptive KL holds its shares of head and tail constant, so differences do not give its gradient: it is compared with
# autograd through the same constants above.
@pytest.mark.parametrize("name", sorted(set(list_divergences()) - {"adaptive_kl"}))
def test_gradcheck(name: str):
    """Through softmax, as it is used; the derivative of ``pointwise`` is checked beside autograd's."""
    log_p, z = log_probs(3, 11, seed=3), log_probs(3, 11, seed=4).requires_grad_()
    divergence = get_divergence(name)
    assert torch.autograd.gradcheck(lambda z: divergence.rows(log_p, z.log_softmax(-1)), z)
    if divergence.is_pointwise():
        log_q = z.detach().log_softmax(-1).requires_grad_()
        f, g = divergence.pointwise(log_p, log_q)
        torch.testing.assert_close(torch.autograd.grad(f.sum(), log_q)[0], g.detach())


@pytest.mark.parametrize("name", sorted(set(list_divergences()) - {"top1_ce", "hierarchical_ranking"}))
def test_vanishes_where_p_is_q_and_only_there(name: str):
    log_p = log_probs(4, 13)
    divergence = get_divergence(name)
    log_q = log_p.clone().requires_grad_()
    loss = divergence.rows(log_p, log_q)
    torch.testing.assert_close(loss, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    # Up to what the softmax's backward takes away: g - q sum(g).
    (g,) = torch.autograd.grad(loss.sum(), log_q)
    assert (g - log_q.exp() * g.sum(-1, keepdim=True)).abs().max() < 1e-12
    assert (divergence.rows(log_p, log_probs(4, 13, seed=9)) > 1e-3).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_beta(beta: float):
    log_p, log_q = log_probs(3, 9, seed=1), log_probs(3, 9, seed=2)
    torch.testing.assert_close(JSD(beta=beta).rows(log_p, log_q), jsd(log_p, log_q, beta))


@pytest.mark.parametrize("name", list_divergences())
def test_one_hot_teacher_and_far_student(name: str):
    """Probabilities that vanish in the dtype leave no NaN behind."""
    log_p = torch.tensor([[1e4, 0.0, -1e4, 3.0]]).log_softmax(-1)
    log_q = torch.tensor([[-1e4, 1e4, 0.0, 5.0]]).log_softmax(-1).requires_grad_()
    loss = get_divergence(name).rows(log_p, log_q)
    (g,) = torch.autograd.grad(loss.sum(), log_q)
    assert loss.isfinite().all()
    assert g.isfinite().all()


def test_a_users_own_divergence():
    @register_divergence("test_squared_hellinger")
    @dataclass(frozen=True)
    class SquaredHellinger(Divergence):
        def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
            root_p, root_q = (0.5 * log_p).exp(), (0.5 * log_q).exp()
            return (root_p - root_q).square(), root_q * (root_q - root_p)

    g = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*shape, generator=g, dtype=torch.float64)
        for name, shape in {
            "student_input": (5, 4),
            "student_weight": (19, 4),
            "teacher_input": (5, 6),
            "teacher_weight": (19, 6),
        }.items()
    }
    tensors["student_input"].requires_grad_()
    try:
        check_against_oracle(Case(tensors, {"divergence": "test_squared_hellinger"}), torch.float64)
        by_name = fused_kd_loss(**tensors, divergence="test_squared_hellinger").loss
        assert by_name == fused_kd_loss(**tensors, divergence=SquaredHellinger()).loss
    finally:
        from kdflow_kernels import divergences

        del divergences._REGISTRY["test_squared_hellinger"]


def test_registration_errors():
    with pytest.raises(TypeError, match="subclass of Divergence"):
        register_divergence("x")(object)  # type: ignore[type-var]

    class NotFrozen(Divergence):
        pass

    with pytest.raises(TypeError, match="frozen dataclass"):
        register_divergence("x")(NotFrozen)

    @dataclass(frozen=True)
    class Nothing(Divergence):
        pass

    with pytest.raises(TypeError, match="exactly one of pointwise and rows"):
        register_divergence("x")(Nothing)

    @dataclass(frozen=True)
    class Taken(Divergence):
        def rows(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            return log_q.sum(-1)

    with pytest.raises(ValueError, match="'jsd' is already"):
        register_divergence("jsd")(Taken)
    assert get_divergence("jsd") == JSD()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: JSD(beta=1.1), r"jsd: beta must lie in \[0, 1\], got 1.1"),
        (lambda: SkewedForwardKL(alpha=0.0), "skewed_forward_kl: alpha must lie strictly between 0 and 1, got 0.0"),
        (lambda: SkewedReverseKL(alpha=1.0), "skewed_reverse_kl: alpha must lie strictly"),
        (lambda: AdaptiveKL(alpha=2.0), "adaptive_kl: alpha must lie strictly"),
        (lambda: HierarchicalRanking(top_k=0), "hierarchical_ranking: top_k must be at least 1, got 0"),
        (lambda: get_divergence("kld"), "unknown name 'kld'; known: .*forward_kl.*tvd"),
    ],
)
def test_parameters_outside_their_range(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_parameter_names_the_known_ones():
    with pytest.raises(TypeError, match=r"unknown parameters \['alpha'\]; it takes \['beta'\]"):
        get_divergence("jsd", alpha=0.3)


def small() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"student_input": (5, 4), "student_weight": (19, 4), "teacher_input": (5, 6), "teacher_weight": (19, 6)}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


@dataclass(frozen=True)
class DoubledByTerms(ForwardKL):
    def terms(self, p, q, log_p, log_q):
        return 2.0 * p * (log_p - log_q), -2.0 * p


@dataclass(frozen=True)
class DoubledByPointwise(ForwardKL):
    def pointwise(self, log_p, log_q):
        f, g = super().pointwise(log_p, log_q)
        return 2.0 * f, 2.0 * g


@dataclass(frozen=True)
class DoubledAgain(DoubledByPointwise):
    def terms(self, p, q, log_p, log_q):
        return 4.0 * p * (log_p - log_q), -4.0 * p


@dataclass(frozen=True)
class DoubledRanking(HierarchicalRanking):
    def rows(self, log_p, log_q):
        return 2.0 * super().rows(log_p, log_q)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(
    "divergence, parent, factor",
    [
        (DoubledByTerms(), "forward_kl", 2.0),
        (DoubledByPointwise(), "forward_kl", 2.0),
        (DoubledAgain(), "forward_kl", 4.0),
        (DoubledRanking(), "hierarchical_ranking", 2.0),
    ],
)
def test_a_derived_divergence_is_not_taken_for_its_parent(divergence: Divergence, parent: str, factor: float, backend):
    """fp32 on the CPU: what has a form in C++ or Triton would run there."""
    if backend == "triton":
        pytest.importorskip("triton")
    loss = fused_kd_loss(**small(), divergence=divergence, backend=backend).loss
    torch.testing.assert_close(loss, factor * fused_kd_loss(**small(), divergence=parent, backend="reference").loss)


def test_a_kernel_is_inherited_with_the_formula_it_is_of():
    class Own(Divergence):
        def pointwise(self, log_p, log_q):
            return log_p, log_q

        def jit(self):
            return "a kernel"

    class AnotherParameter(Own):
        pass

    class AnotherFormula(Own):
        def terms(self, p, q, log_p, log_q):
            return p, q

    assert AnotherParameter().jit() == "a kernel"
    assert AnotherFormula().jit() is None


def returning(method: str, found) -> Divergence:
    return type("Wrong", (Divergence,), {method: lambda self, log_p, log_q: found(log_p, log_q)})()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "divergence, message",
    [
        (returning("rows", lambda log_p, log_q: log_q.sum(-1).mean()), r"Wrong\.rows: expected shape \(5,\).* \(\);"),
        (returning("rows", lambda log_p, log_q: log_q.sum(-1, keepdim=True)), r"Wrong\.rows: .* got .* \(5, 1\);"),
        (
            returning("pointwise", lambda log_p, log_q: (log_q.sum(-1), log_q)),
            r"Wrong\.pointwise: .* shape \(5,\), a tensor",
        ),
        (returning("pointwise", lambda log_p, log_q: (log_q, None)), r"Wrong\.pointwise: .* shape \(5, 19\), None\);"),
        (returning("pointwise", lambda log_p, log_q: log_q), r"Wrong\.pointwise: expected \(f, df/dlog q\)"),
    ],
)
def test_what_a_formula_returns_is_checked(divergence: Divergence, message: str, backend: str):
    with pytest.raises(ValueError, match=message):
        fused_kd_loss(**small(), divergence=divergence, backend=backend)


@pytest.mark.parametrize("divergence", [Divergence(), type("Both", (ForwardKL,), {"rows": lambda *_: None})()])
def test_a_divergence_has_exactly_one_formula(divergence: Divergence):
    with pytest.raises(TypeError, match="must override exactly one of pointwise and rows"):
        fused_kd_loss(**small(), divergence=divergence)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", list_divergences())
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_row_that_is_no_number_shows(name: str, value: float, backend: str):
    tensors = small()
    tensors["teacher_input"][1] = value
    loss = fused_kd_loss(**tensors, divergence=name, backend=backend, reduction="none").loss
    assert loss.isfinite().tolist() == [True, False, True, True, True]
