"""Registers of the kernels: ptxas spills a few where that lets one more program run on a processor. Ours shall not.

Which forms it does that to differs between architectures and releases, so none is listed: a form that was found to spill
is compiled with the next larger allowance, and that is launched from then on.
"""

from typing import Any

import torch

# Three, two and one program of 8 warps on a processor with 65,536 registers.
ALLOWANCES = (80, 128, 255)

_allowances: dict[tuple, int | None] = {}


def next_allowance(registers: int) -> int | None:
    """The smallest allowance above so many registers; None: there is none."""
    return next((allowance for allowance in ALLOWANCES if allowance > registers), None)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *, allowance: int | None = None) -> None:
    """Starts a Triton kernel. allowance: of registers a thread, as long as it spills nothing; None leaves it to ptxas."""
    form = (
        kernel.fn,
        *(
            (value.dtype, value.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
            if name.isupper() or isinstance(value, torch.Tensor)
        ),
    )
    allowance = _allowances.get(form, allowance)
    compiled = kernel[grid](**arguments, **_option(allowance))
    # The interpreter returns nothing.
    if compiled is None or form in _allowances:
        return
    # At once, so that nothing is compiled or loaded later, while a CUDA graph is captured.
    _allowances[form] = allowance
    while compiled.n_spills:
        larger = next_allowance(compiled.n_regs)
        if larger is None:
            break
        compiled = kernel.warmup(grid=grid, **arguments, **_option(larger))
        compiled._init_handles()
        _allowances[form] = larger


def _option(allowance: int | None) -> dict[str, int]:
    return {} if allowance is None else {"maxnreg": allowance}
