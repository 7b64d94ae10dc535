"""Which of the divergences written in C++ (cuda/divergences.hpp) a divergence is."""

from kdflow_kernels import divergences
from kdflow_kernels.divergences import Divergence


def cpp_twin(divergence: Divergence) -> tuple[str, float] | None:
    """Name of the struct, and its parameter; None: there is none."""
    if not divergences.is_shipped(divergence):
        return None
    match divergence:
        case divergences.ForwardKL() | divergences.JSD(beta=0.0):
            return "ForwardKL", 0.0
        case divergences.ReverseKL() | divergences.JSD(beta=1.0):
            return "ReverseKL", 0.0
        case divergences.JSD(beta=beta):
            return "JSD", beta
        case divergences.SkewedForwardKL(alpha=alpha):
            return "SkewedForwardKL", alpha
        case divergences.SkewedReverseKL(alpha=alpha):
            return "SkewedReverseKL", alpha
        case divergences.TVD():
            return "TVD", 0.0
        case divergences.Jeffreys():
            return "Jeffreys", 0.0
        case _:
            return None
