"""Low-precision forward and backward over float32 weights, on a rank that holds them whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LowPrecisionCopies:
    """Copies that stand in the place of a module's float32 weights while it computes.

    It is what FSDP does with sharded weights, less the gathering. The module, its optimizer and its
    checkpoints know the float32 weights alone; these get the gradients, which are summed in float32.
    Weights that are not float32 (a frozen base, say) stay where they are.

    Args:
        dtype: of the copies.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self._places: list[tuple[torch.nn.Module, str, int]] = []
        self._weights: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._versions: list[int] | None = None
        found: dict[torch.nn.Parameter, int] = {}  # tied weights have one copy in several places
        for owner in module.modules():
            for name, weight in owner.named_parameters(recurse=False):
                if weight.dtype == torch.float32 != dtype:
                    if weight not in found:
                        found[weight] = len(found)
                        self._add(weight, dtype)
                    self._places.append((owner, name, found[weight]))

    def _add(self, weight: torch.nn.Parameter, dtype: torch.dtype) -> None:
        copy = torch.nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=weight.requires_grad)

        def move_gradient(copy: torch.Tensor) -> None:
            gradient, copy.grad = copy.grad, None
            assert gradient is not None
            if weight.grad is None:
                weight.grad = gradient.float()
            else:
                weight.grad += gradient

        if copy.requires_grad:
            copy.register_post_accumulate_grad_hook(move_gradient)
        self._weights.append(weight)
        self._copies.append(copy)

    def outdate(self) -> None:
        """The weights have moved. A fused optimizer does not count it as a new version; all else does."""
        self._versions = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Around forward and backward, which may recompute a part of the forward."""
        if not self._weights:
            yield
            return
        versions = [weight._version for weight in self._weights]
        if versions != self._versions:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._weights)  # pyright: ignore[reportPrivateImportUsage]
            self._versions = versions
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(self._weights)

    def _put(self, parameters: list[torch.Tensor]) -> None:
        for owner, name, index in self._places:
            setattr(owner, name, parameters[index])
