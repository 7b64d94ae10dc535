"""The chunked backend in torch."""

import dataclasses

import torch

from kdflow_kernels import reference
from kdflow_kernels.problem import GradientNeeds, Gradients, Problem, RowTerms

DEFAULT_CHUNK_SIZE = 128


def run(problem: Problem, needs: GradientNeeds) -> tuple[RowTerms, Gradients]:
    """Row terms and, where needed, gradients, a chunk of rows at a time."""
    student, teacher = problem.student, problem.teacher
    accumulate = torch.promote_types(student.weight.dtype, torch.float32)
    grad_input = torch.zeros_like(student.input) if needs.input else None
    grad_weight = torch.zeros_like(student.weight, dtype=accumulate) if needs.weight else None
    grad_bias = torch.zeros_like(student.bias, dtype=accumulate) if needs.bias else None
    chunk_size = problem.chunk_size or DEFAULT_CHUNK_SIZE
    chunks = []
    for start in range(0, max(len(student.input), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        hidden = student.input[rows].detach().requires_grad_(needs.input)
        weight = student.weight.detach().requires_grad_(needs.weight)
        bias = None if student.bias is None else student.bias.detach().requires_grad_(needs.bias)
        chunk = dataclasses.replace(
            problem,
            student=dataclasses.replace(student, input=hidden, weight=weight, bias=bias),
            teacher=None if teacher is None else dataclasses.replace(teacher, input=teacher.input[rows]),
            labels=None if problem.labels is None else problem.labels[rows],
            row_scale=problem.row_scale[rows],
        )
        with torch.set_grad_enabled(bool(needs)):
            terms = reference.row_terms(chunk)
            loss = torch.zeros_like(chunk.row_scale)
            if terms.kd is not None:
                loss = loss + problem.kd_weight * terms.kd
            if terms.ce is not None:
                loss = loss + problem.ce_weight * terms.ce
            loss = (loss * chunk.row_scale).sum()
        if needs:
            wanted = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
            found = dict(zip(map(id, wanted), torch.autograd.grad(loss, wanted), strict=True))
            if grad_input is not None:
                grad_input[rows] = found[id(hidden)]
            if grad_weight is not None:
                grad_weight += found[id(weight)]
            if grad_bias is not None:
                grad_bias += found[id(bias)]
        chunks.append(terms)

    def join(name: str):
        parts = [getattr(terms, name) for terms in chunks]
        return None if parts[0] is None else torch.cat(parts).detach()

    return (
        RowTerms(*(join(field.name) for field in dataclasses.fields(RowTerms))),
        Gradients(
            grad_input,
            None if grad_weight is None else grad_weight.to(student.weight.dtype),
            None if grad_bias is None else grad_bias.to(student.bias.dtype),
        ),
    )
