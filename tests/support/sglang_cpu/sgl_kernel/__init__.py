"""Names of SGLang's kernel package for machines that have none.

SGLang imports some of them when it loads, also where it computes with torch alone. Prefilling calls none; what does
call one is told so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} was called, and this is the stand-in without kernels")

    return absent
