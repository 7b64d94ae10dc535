"""What every rank of a group has, on all of them, and its gradient back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        ctx.group = group
        gathered = values.new_empty((group.size(), *values.shape))
        dist.all_gather(list(gathered.unbind()), values.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        (gradient,) = gradients
        own = gradient.new_empty(gradient.shape[1:])
        dist.reduce_scatter(own, list(gradient.contiguous().unbind()), group=ctx.group)
        return own, None


def gather(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(R, *) of all R ranks, in their order, from the (*) of each; all of one shape.

    Backward gives each rank the sum over ranks of the gradients of its values.
    """
    gathered = _Gather.apply(values, group)
    assert isinstance(gathered, torch.Tensor)
    return gathered
