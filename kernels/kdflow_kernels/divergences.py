"""Divergences between teacher p and student q, and the registry that names them.

A divergence is a frozen dataclass; its fields are its parameters. It implements one of two methods:

* ``pointwise`` where it is a sum over the vocabulary of f(log p, log q). Backends call it on blocks of any
  shape, several times for the same entries, so it must be elementwise and free of side effects.
* ``rows`` where a row must be seen as a whole (sorting, top-k).

In a class derived from another divergence the formula written furthest down holds, and other forms of the parent's
(C++, Triton) are left behind with it.

Add one from any file::

    @register_divergence("squared_hellinger")
    @dataclass(frozen=True)
    class SquaredHellinger(Divergence):
        def pointwise(self, log_p, log_q):
            root_p, root_q = (0.5 * log_p).exp(), (0.5 * log_q).exp()
            return (root_p - root_q).square(), root_q * (root_q - root_p)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor


class JITPointwise(NamedTuple):
    """A divergence's Triton form.

    ``function`` is a ``triton.jit`` function (log_p, log_q, p, q, parameter) -> (f, df/dlog q), elementwise, as
    ``Divergence.pointwise``. ``gradient_sum`` is the sum over the vocabulary of df/dlog q where it is the same number in
    every row; it saves the kernel a pass. ``row_parameters`` is a kernel that finds a parameter for every row, and the
    row's gradient sum, from the logits and ``parameter``; see statistics_kernels.tail_share_kernel.
    """

    function: Callable
    parameter: float = 0.0
    gradient_sum: float | None = None
    row_parameters: Callable | None = None


class JITChoices(NamedTuple):
    """The Triton form of a divergence that sees no more than both sides' ``top_k`` likeliest tokens of a row.

    ``function`` is a ``triton.jit`` function of their log-probabilities; see jit_divergences.
    """

    function: Callable
    top_k: int


class Divergence:
    """Base of every divergence; override exactly one of ``pointwise`` and ``rows``.

    Class attributes:
        name: registered name, set by ``register_divergence``.
    """

    name: ClassVar[str] = ""

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Terms of the sum and their derivatives, elementwise.

        Shapes: log_p, log_q (..., V), log-probabilities in nats. Returns (f, df/dlog q), both (..., V).
        """
        raise NotImplementedError

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """``pointwise`` for a caller that has the probabilities at hand; override it to save their exp."""
        return self.pointwise(log_p, log_q)

    def jit(self) -> JITPointwise | JITChoices | None:
        """Its form for the kernels. None: the Triton backend leaves this divergence to torch.

        To give one, override it in a file that imports triton: ``return JITPointwise(my_jit_function, self.alpha)``.
        """
        from kdflow_kernels import jit_divergences

        return jit_divergences.twin(self)

    def rows(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence of each row, differentiable in log_q.

        Shapes: log_p, log_q (N, V), whole rows of log-probabilities in nats. Returns (N,).
        """
        f, _ = terms_of(self, log_p.exp(), log_q.exp(), log_p, log_q)
        return f.sum(-1)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A kernel is of the formula it was written for, not of one written below it.
        if _depth(cls, "jit") > min(_depth(cls, name) for name in ("pointwise", "terms", "rows")):
            cls.jit = Divergence.jit

    @classmethod
    def is_pointwise(cls) -> bool:
        return cls.pointwise is not Divergence.pointwise


def _depth(cls: type[Divergence], method: str) -> int:
    """How far up cls's line a method was last written; 0: in cls itself."""
    return next(depth for depth, base in enumerate(cls.__mro__) if method in vars(base))


def terms_of(divergence: Divergence, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """By ``terms`` or ``pointwise``, whichever was written further down. Raises ValueError for what fits no backend."""
    cls = type(divergence)
    name = "terms" if _depth(cls, "terms") <= _depth(cls, "pointwise") else "pointwise"
    found = divergence.terms(p, q, log_p, log_q) if name == "terms" else divergence.pointwise(log_p, log_q)
    if not isinstance(found, tuple) or [_shape(part) for part in found] != [log_q.shape] * 2:
        raise ValueError(
            f"{cls.__name__}.{name}: expected (f, df/dlog q), both of log_q's shape {tuple(log_q.shape)}, got "
            f"{_describe(found)}; return one number a token, not their sum"
        )
    return found


def rows_of(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``rows``. Raises ValueError unless it returns one number a row."""
    found = divergence.rows(log_p, log_q)
    if _shape(found) != log_q.shape[:-1]:
        raise ValueError(
            f"{type(divergence).__name__}.rows: expected shape {tuple(log_q.shape[:-1])}, one number a row, got "
            f"{_describe(found)}; sum over the last dimension alone"
        )
    return found


def _shape(found: object) -> torch.Size | None:
    return found.shape if isinstance(found, Tensor) else None


def _describe(found: object) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(_describe(part) for part in found)})"
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)


def check_class(what: str, cls: type[Divergence]) -> None:
    """Raises TypeError unless cls has exactly one of pointwise and rows."""
    has_rows = cls.rows is not Divergence.rows
    if cls.is_pointwise() == has_rows:
        raise TypeError(
            f"{what}: {cls.__name__} must override exactly one of pointwise and rows, "
            f"and has {'both' if has_rows else 'neither'}, its parents' included"
        )


_REGISTRY: dict[str, type[Divergence]] = {}
_DivergenceType = TypeVar("_DivergenceType", bound=type[Divergence])


def register_divergence(name: str) -> Callable[[_DivergenceType], _DivergenceType]:
    """Class decorator: make a divergence known under ``name``.

    Raises TypeError unless the class is a frozen dataclass deriving from Divergence that overrides exactly one of
    ``pointwise`` and ``rows``; ValueError when the name belongs to another class.
    """

    def register(cls: _DivergenceType) -> _DivergenceType:
        if not (isinstance(cls, type) and issubclass(cls, Divergence)):
            raise TypeError(f"register_divergence({name!r}): expected a subclass of Divergence, got {cls!r}")
        if not (is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise TypeError(
                f"register_divergence({name!r}): {cls.__name__} must be a frozen dataclass; put @dataclass(frozen=True) "
                "below @register_divergence"
            )
        check_class(f"register_divergence({name!r})", cls)
        known = _REGISTRY.get(name)
        # The same class defined again (a reloaded module, a notebook cell run twice) replaces its former self.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"register_divergence: {name!r} is already {known.__module__}.{known.__qualname__}; choose another name"
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def registered_name(cls: type[Divergence]) -> str:
    """The name of exactly this class, and no parent's; "" where it has none."""
    return cls.name if _REGISTRY.get(cls.name) is cls else ""


def list_divergences() -> list[str]:
    """Names of all registered divergences, sorted."""
    return sorted(_REGISTRY)


def get_divergence(name: str, **parameters: float) -> Divergence:
    """Instance of a registered divergence: ``get_divergence("jsd", beta=0.3)``.

    Raises ValueError for an unknown name (listing the known ones) and for parameters outside their range, TypeError for
    a parameter the divergence does not have.
    """
    cls = _REGISTRY.get(name)
    if cls is None:
        raise ValueError(f"divergence: unknown name {name!r}; known: {', '.join(list_divergences())}")
    known = {field.name for field in fields(cls) if field.init}  # type: ignore[arg-type]
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise TypeError(f"divergence {name!r}: unknown parameters {unknown}; it takes {sorted(known) or 'none'}")
    return cls(**parameters)


def _check_open_unit(name: str, parameter: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}: {parameter} must lie strictly between 0 and 1, got {value}")


class _OfProbabilities(Divergence):
    """Base of those written in p, q and their logarithms."""

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return self.terms(log_p.exp(), log_q.exp(), log_p, log_q)


def _log_mixture(share: float, a: Tensor, b: Tensor) -> Tensor:
    """log(share a + (1 - share) b); where both vanish any number will do, for a and b multiply it."""
    return (share * a + (1.0 - share) * b).clamp(min=torch.finfo(a.dtype).tiny).log()


def _share(weight: float, a: Tensor, other_weight: float, b: Tensor) -> Tensor:
    """weight a / (weight a + other_weight b), 0 where both vanish."""
    part = weight * a
    return part / (part + other_weight * b).clamp(min=torch.finfo(a.dtype).tiny)


@register_divergence("forward_kl")
@dataclass(frozen=True)
class ForwardKL(_OfProbabilities):
    """KL(p || q) = sum p (log p - log q): covers the teacher's modes."""

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return p * (log_p - log_q), -p


@register_divergence("reverse_kl")
@dataclass(frozen=True)
class ReverseKL(_OfProbabilities):
    """KL(q || p) = sum q (log q - log p): seeks the teacher's modes."""

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        f = q * (log_q - log_p)
        return f, f + q


@register_divergence("jsd")
@dataclass(frozen=True)
class JSD(_OfProbabilities):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    beta = 0 is forward KL and beta = 1 reverse KL, the convention of TRL and Liger.
    Source: arXiv 2306.13649 (GKD).
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"jsd: beta must lie in [0, 1], got {self.beta}")

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta == 0.0:
            return ForwardKL().terms(p, q, log_p, log_q)
        if self.beta == 1.0:
            return ReverseKL().terms(p, q, log_p, log_q)
        log_m = _log_mixture(self.beta, p, q)
        # dm/dlog q = (1 - beta) q makes the other two terms of the derivative cancel.
        g = (1.0 - self.beta) * q * (log_q - log_m)
        return self.beta * p * (log_p - log_m) + g, g


@register_divergence("skewed_forward_kl")
@dataclass(frozen=True)
class SkewedForwardKL(_OfProbabilities):
    """KL(p || alpha p + (1 - alpha) q). Source: arXiv 2402.03898 (DistiLLM)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_open_unit("skewed_forward_kl", "alpha", self.alpha)

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = _log_mixture(self.alpha, p, q)
        return p * (log_p - log_m), -p * _share(1.0 - self.alpha, q, self.alpha, p)


@register_divergence("skewed_reverse_kl")
@dataclass(frozen=True)
class SkewedReverseKL(_OfProbabilities):
    """KL(q || alpha q + (1 - alpha) p). Source: arXiv 2402.03898 (DistiLLM)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_open_unit("skewed_reverse_kl", "alpha", self.alpha)

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        f = q * (log_q - _log_mixture(self.alpha, q, p))
        return f, f + q * _share(1.0 - self.alpha, p, self.alpha, q)


@register_divergence("tvd")
@dataclass(frozen=True)
class TVD(_OfProbabilities):
    """Total variation 0.5 sum |p - q|; its subgradient at p = q is 0."""

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        difference = q - p
        return 0.5 * difference.abs(), 0.5 * difference.sign() * q


@register_divergence("jeffreys")
@dataclass(frozen=True)
class Jeffreys(_OfProbabilities):
    """KL(p || q) + KL(q || p) = sum (p - q)(log p - log q)."""

    def terms(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p_minus_q, log_ratio = p - q, log_p - log_q
        return p_minus_q * log_ratio, -(q * log_ratio + p_minus_q)


@register_divergence("adaptive_kl")
@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """(g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail).

    The tail is the least likely teacher tokens whose ascending cumulative mass is at most alpha; g_head and g_tail are
    the sums of |p - q| over head and tail, constants for the gradient. Source: arXiv 2404.02657.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_open_unit("adaptive_kl", "alpha", self.alpha)

    def rows(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        with torch.no_grad():
            ascending, order = p.sort(dim=-1)
            in_tail = torch.empty_like(p, dtype=torch.bool).scatter_(-1, order, ascending.cumsum(-1) <= self.alpha)
            gap = (p - q).abs()
            gap_sum = gap.sum(-1)
            # p = q leaves 0 / 0; both divergences are 0 there, so any share will do.
            tail_share = torch.where(gap_sum > 0, (gap * in_tail).sum(-1) / gap_sum, 0.5)
        forward_kl = (p * (log_p - log_q)).sum(-1)
        reverse_kl = (q * (log_q - log_p)).sum(-1)
        return (1.0 - tail_share) * forward_kl + tail_share * reverse_kl


@register_divergence("top1_ce")
@dataclass(frozen=True)
class Top1CE(Divergence):
    """-p(v*) log q(v*) with v* = argmax p: cross-entropy to the teacher's first choice, by its confidence."""

    def rows(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        top_log_p, top = log_p.max(dim=-1, keepdim=True)
        return -(top_log_p.exp() * log_q.gather(-1, top)).squeeze(-1)


@register_divergence("hierarchical_ranking")
@dataclass(frozen=True)
class HierarchicalRanking(Divergence):
    """Hinges on the order of the top_k tokens v_i of the teacher and u_j of the student.

    sum_i max(0, q(v_i) - q(v_1)) + sum_ij max(0, q(u_j) - q(v_i)) [p(v_i) > p(u_j)]: the teacher's first choice should
    lead its top-k, and no student favourite should pass a token that the teacher ranks above it.
    """

    top_k: int = 5

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"hierarchical_ranking: top_k must be at least 1, got {self.top_k}")

    def rows(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        top_k = min(self.top_k, log_p.shape[-1])
        p, q = log_p.exp(), log_q.exp()
        teacher_top = p.topk(top_k, dim=-1).indices
        student_top = q.detach().topk(top_k, dim=-1).indices
        q_teacher_top = q.gather(-1, teacher_top)
        lead = (q_teacher_top - q_teacher_top[..., :1]).clamp(min=0).sum(-1)
        overtaking = (q.gather(-1, student_top).unsqueeze(-2) - q_teacher_top.unsqueeze(-1)).clamp(min=0)
        p_teacher_top = p.gather(-1, teacher_top)
        wrong = p_teacher_top.unsqueeze(-1) > p.gather(-1, student_top).unsqueeze(-2)
        # p enters by comparisons alone, which would hide a NaN.
        return lead + (overtaking * wrong).sum((-2, -1)) + 0.0 * p_teacher_top.sum(-1)


_SHIPPED = frozenset(_REGISTRY.values())


def is_shipped(divergence: Divergence) -> bool:
    """Is it one of the above, and of no class derived from them, which may be another function?"""
    return type(divergence) in _SHIPPED
