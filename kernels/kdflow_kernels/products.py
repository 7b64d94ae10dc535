"""Matrix products of the Triton backend: on CUDA cuBLAS, all sums in fp32; and those of the active vocabulary alone.

Shape suffixes: N rows, n rows of a group, V columns, a active ones, H hidden size.
"""

import torch
from torch import Tensor

from kdflow_kernels.problem import GradientNeeds, Problem

# So many active columns are gathered at once: 150 MB of gradients and weights at 2048 rows and a hidden size of 2560.
GATHERED_COLUMNS = 16384


def multiply(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b; summed in fp32 whatever the dtypes are."""
    if out.dtype == a.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.device.type == "cuda":
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out += a.to(out.dtype) @ b.to(out.dtype)
    else:
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


class FilteredProducts:
    """dH and dW of a group from the columns that grad_filter_eps leaves, and a rank-1 term in dH for the others.

    The gradients left out differ little from one another, so their sum times the mean of their weights is most of what
    they would add. Both products run over the gathered active columns; for the number of these the host waits once a
    group.
    """

    def __init__(self, problem: Problem, num_columns: int, needs: GradientNeeds) -> None:
        student = problem.student
        self.hidden, self.weight = student.input, student.weight[:num_columns]
        # Without cross-entropy only the compared columns have gradients.
        self.num_columns = num_columns if problem.ce_weight != 0.0 else problem.num_compared
        counted: slice | Tensor = slice(0, self.num_columns)
        if student.token_ids is not None and problem.ce_weight == 0.0:
            counted = student.token_ids
        self.weight_sum = torch.zeros((1, self.weight.shape[1]), dtype=torch.float32, device=self.weight.device)
        if needs.input:
            mask = torch.zeros((1, num_columns), dtype=self.weight.dtype, device=self.weight.device)
            mask[:, counted] = 1.0
            multiply(mask, self.weight, out=self.weight_sum)

    def add(
        self, rows: slice, dz: Tensor, active: Tensor, grad_input: Tensor | None, grad_weight: Tensor | None
    ) -> None:
        """Sets grad_input[rows] and adds to grad_weight; dz (n, V) is the group's dloss/dlogits, active (V,) its flags."""
        columns = active.nonzero().squeeze(-1)  # the host waits
        hidden = self.hidden[rows]
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=dz.device)
        tail_mass, tail_weight = dz.sum(1, dtype=torch.float32), self.weight_sum[0].clone()
        for some in columns.split(GATHERED_COLUMNS) if len(columns) else ():
            kept = dz.index_select(1, some)
            if grad_input is not None:
                weight = self.weight.index_select(0, some)
                multiply(kept, weight, out=grad_hidden, accumulate=True)
                tail_mass -= kept.sum(1, dtype=torch.float32)
                tail_weight -= weight.sum(0, dtype=torch.float32)
            if grad_weight is not None:
                product = torch.empty((len(some), hidden.shape[1]), dtype=grad_weight.dtype, device=dz.device)
                multiply(kept.T, hidden, out=product)
                grad_weight.index_add_(0, some, product)
        if grad_input is not None:
            num_dropped = self.num_columns - len(columns)
            if num_dropped > 0:
                grad_hidden.addr_(tail_mass, tail_weight, alpha=1.0 / num_dropped)
            grad_input[rows] = grad_hidden
