"""Output heads cut by tokens over the ranks that shard the student, so that none ever holds a whole one.

FSDP would gather the student's head on every rank for the loss, and its gradient after it. Here each rank keeps its
tokens of both heads, and the loss rows of all ranks are gathered instead: N hidden sizes a rank, where heads have V.

Shapes: n loss rows of this rank, N of all ranks of the group, V tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kdflow.errors import ConfigError
from kdflow.modeling import gather
from kdflow.types import LMHead, LossRows


class _OwnPart(torch.autograd.Function):
    """``parameter.to_local().to(like)``, for parameters in host memory, too: DTensor would send their gradient to the
    mesh's device, where the parameter is not."""

    @staticmethod
    def forward(ctx: Any, parameter: Any, like: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(parameter)
        own: torch.Tensor = parameter.to_local().to(like)
        return own.view_as(own)  # a tensor of its own for the graph, where nothing had to be converted

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        (parameter,) = ctx.saved_tensors
        whole: Any = torch.empty_like(parameter)
        whole.to_local().copy_(gradients[0])
        return whole, None


class VocabShards:
    """Cuts a model's head over the mesh's dimension `shard`, and brings the rows that it is applied to together.

    Args:
        model: a causal LM, on the meta device or with its weights; its head's parameters become DTensors.
        mesh: of FSDP.
        num_teachers: whose rows ranks may have.

    Raises:
        ConfigError: the head is the embedding's matrix, which every rank needs for its own tokens; or ranks may have
            rows of different teachers.
    """

    def __init__(self, model: Any, mesh: DeviceMesh, *, num_teachers: int) -> None:
        if num_teachers > 1:
            raise ConfigError(
                f"student.vocab_parallel: expected a single teacher, got {num_teachers}; ranks may have rows of "
                "different ones at a time, and cut heads need those of one; leave the option out"
            )
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:
            raise ConfigError(
                "student.vocab_parallel: this student's head is tied to its embeddings (tie_word_embeddings), which "
                "every rank gathers for its own tokens; leave the option out, or choose a student with untied ones"
            )
        self._group = mesh.get_group("shard")
        self._replicas = mesh.get_group("replicate") if mesh.ndim > 1 else None
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        self.parameters: list[torch.nn.Parameter] = []
        num_tokens = len(head.weight)
        size = -(-num_tokens // self._group.size())  # as Shard(0) cuts
        self._start = min(self._group.rank() * size, num_tokens)
        self._stop = min(self._start + size, num_tokens)
        self._is_last = self._group.rank() == self._group.size() - 1
        for name, whole in list(head.named_parameters(recurse=False)):
            own = distribute_tensor(whole.detach(), mesh, placements)
            assert len(own.to_local()) == self._stop - self._start
            self.parameters.append(torch.nn.Parameter(own, requires_grad=whole.requires_grad))
            setattr(head, name, self.parameters[-1])

    @property
    def num_ranks(self) -> int:
        """How many share the loss of a row."""
        return self._group.size()

    def teacher_head(self, whole: LMHead) -> LMHead:
        """This rank's tokens of it; the last rank has also those that the student lacks."""
        tokens = slice(self._start, None if self._is_last else self._stop)
        bias = None if whole.bias is None else whole.bias[tokens].clone()
        return replace(whole, weight=whole.weight[tokens].clone(), bias=bias)

    def student_head(self, head: Any, like: torch.Tensor, logit_scale: float, softcap: float | None) -> LMHead:
        """This rank's tokens, in dtype and on the device of `like`."""
        weight, bias = (None if p is None else _OwnPart.apply(p, like) for p in (head.weight, head.bias))
        assert weight is not None
        return LMHead(weight, bias, logit_scale, softcap, vocab_start=self._start, vocab_group=self._group)

    def gather(
        self, student: LossRows, teacher: LossRows, labels: torch.Tensor
    ) -> tuple[LossRows, LossRows, torch.Tensor]:
        """The rows of all ranks of the group, in the order of the ranks: (N, H) twice, and (N,).

        The student's rows take back the sum over ranks of their gradients, times the number of ranks: each rank reports
        a part of the loss, and finds in its backward only what comes from its own tokens.
        """
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.num_ranks)]
        dist.all_gather(counts, torch.tensor([len(labels)]), group=self._group)
        lengths = [int(count) for count in counts]
        hidden = student.hidden
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * self.num_ranks)
        return (
            replace(student, hidden=self._gather(hidden, lengths)),
            replace(teacher, hidden=self._gather(teacher.hidden, lengths)),
            self._gather(labels, lengths),
        )

    def _gather(self, rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        if max(lengths) == 0:
            return rows  # with its place in the graph: other replicas wait for this one's backward
        padded = torch.cat((rows, rows.new_zeros((max(lengths) - len(rows), *rows.shape[1:]))))
        if padded.numel() == 0:  # without a teacher its rows have no columns
            return rows.new_zeros((sum(lengths), *rows.shape[1:]))
        return torch.cat([of_rank[:n] for of_rank, n in zip(gather(padded, self._group), lengths, strict=True)])

    def reduce_gradients(self) -> None:
        """Over replicas, each of which has seen other rows; as FSDP does for its own, their mean."""
        for parameter in self.parameters:
            if self._replicas is not None and parameter.grad is not None:
                own: torch.Tensor = parameter.grad.to_local()  # pyright: ignore[reportAttributeAccessIssue]
                own /= self._replicas.size()
                dist.all_reduce(own, group=self._replicas)
