"""Registers of the kernels: ptxas spills a few where that lets one more program run on a processor. Ours shall not.

Which forms it does that to differs between architectures and releases, so none is listed: a form that was found to spill
is compiled once more with the next larger allowance.
"""

from typing import Any

import torch

# Three, two and one program of 8 warps on a processor with 65,536 registers.
ALLOWANCES = (80, 128, 255)

_allowances: dict[tuple, int] = {}


def next_allowance(registers: int) -> int | None:
    """The smallest allowance above so many registers; None: there is none."""
    return next((allowance for allowance in ALLOWANCES if allowance > registers), None)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Starts a Triton kernel; the second launch of a form that spills is compiled anew."""
    form = (
        kernel.fn,
        *(
            (value.dtype, value.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
            if name.isupper() or isinstance(value, torch.Tensor)
        ),
    )
    allowance = _allowances.get(form)
    compiled = kernel[grid](**arguments, **({} if allowance is None else {"maxnreg": allowance}))
    # The interpreter returns nothing.
    if compiled is not None and compiled.n_spills:
        larger = next_allowance(compiled.n_regs)
        if larger is not None:
            _allowances[form] = larger
