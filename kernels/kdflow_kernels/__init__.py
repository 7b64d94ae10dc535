"""Fused knowledge-distillation loss: from hidden states to the loss, without a (tokens x vocabulary) tensor."""

from kdflow_kernels.divergences import (
    JSD,
    TVD,
    AdaptiveKL,
    Divergence,
    ForwardKL,
    HierarchicalRanking,
    Jeffreys,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    Top1CE,
    get_divergence,
    list_divergences,
    register_divergence,
)
from kdflow_kernels.fused_kd_loss import FusedKDLoss, KDLossOutput, fused_kd_loss
from kdflow_kernels.vocab_parallel import VocabParallel

__all__ = [
    "JSD",
    "TVD",
    "AdaptiveKL",
    "Divergence",
    "ForwardKL",
    "FusedKDLoss",
    "HierarchicalRanking",
    "Jeffreys",
    "KDLossOutput",
    "ReverseKL",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "Top1CE",
    "VocabParallel",
    "fused_kd_loss",
    "get_divergence",
    "list_divergences",
    "register_divergence",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("kdflow")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
