"""Lets PyPI's torchvision load beside a CPU build of torch.

torchvision registers fake versions of two operators that only its CUDA build defines, and fails at that. Importing this
defines them just before torchvision is loaded; make test-sglang has it imported at every start of the environment.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision(MetaPathFinder):
    library: Any = None  # an operator lives as long as the library that defined it

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if not torch.backends.cuda.is_built():
            _BeforeTorchvision.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                _BeforeTorchvision.library.define(name + _SIGNATURE)


sys.meta_path.insert(0, _BeforeTorchvision())
