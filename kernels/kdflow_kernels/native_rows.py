"""The row step in C++ (csrc/src/rows): one pass over a row where torch takes a dozen, so CPUs run at the speed of their GEMMs.

For the divergences that ship with this package and fp32 arithmetic on the CPU; ``torch_rows`` serves the rest, and
everything where the extension was not built. What was built for several instruction sets runs with the best the
processor has, on torch's own threads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kdflow_kernels import tiled_logits
from kdflow_kernels.cpp_divergences import cpp_twin
from kdflow_kernels.problem import Problem, RowTerms
from kdflow_kernels.tiled_logits import Blocks

try:
    from kdflow_kernels import _rows
except ImportError:
    _rows = None  # type: ignore[assignment]


def instruction_sets() -> list[str]:
    """Those this build can use on this processor, the best first; none where the extension is missing."""
    return [] if _rows is None else _rows.instruction_sets()


class NativeRows:
    """See ``torch_rows.TorchRows``, whose place it takes where ``covers`` says so."""

    instruction_set = ""  # the best; tests name others

    def __init__(self, problem: Problem, labels: Tensor | None, blocks: Blocks, terms: RowTerms, form_gradients: bool):
        assert _rows is not None
        self.row_scale = problem.row_scale.contiguous()
        self.labels = None if labels is None else labels.contiguous()
        self.blocks, self.terms = blocks, terms
        twin = None if problem.teacher is None else cpp_twin(problem.divergence)
        kind, parameter = twin or ("None_", 0.0)
        self.options = _rows.Options(
            divergence=getattr(_rows.Divergence, kind),
            parameter=parameter,
            temperature=problem.temperature,
            kd_weight=problem.kd_weight,
            ce_weight=problem.ce_weight,
            logit_scale=problem.student.logit_scale,
            softcap=problem.student.softcap or 0.0,
            num_compared=problem.num_compared,
            tile_columns=_piece_columns(),
            form_gradients=form_gradients,
        )
        # Addresses of tiles; they must live as long as what points to them.
        self.student_table, self.student = _logits(blocks.student_tiles(), blocks.student_maxima)
        self.teacher_table, self.teacher = _logits(blocks.teacher_tiles(), blocks.teacher_maxima)

    @staticmethod
    def covers(problem: Problem, blocks: Blocks) -> bool:
        tiles = [*blocks.student_tiles(), *blocks.teacher_tiles()]
        per_row = [tensor for tensor in (problem.row_scale, problem.labels) if tensor is not None]
        return (
            _rows is not None
            # Addresses are taken of these, and what subclasses hold lies elsewhere.
            and all(type(tensor) is Tensor for tensor in (*per_row, *tiles))
            and problem.row_scale.device.type == "cpu"
            and problem.row_scale.dtype == torch.float32
            and all(tile.dtype in (torch.float32, torch.bfloat16) for tile in tiles)
            and (problem.teacher is None or cpp_twin(problem.divergence) is not None)
        )

    def run(self, group_start: int, chunk: slice) -> None:
        assert _rows is not None
        rows = slice(group_start + chunk.start, group_start + chunk.stop)

        def address(values: Tensor | None) -> int:
            return 0 if values is None else values[rows].data_ptr()

        terms = self.terms
        _rows.run(
            options=self.options,
            student=self.student,
            first_row=chunk.start,
            teacher=self.teacher,
            num_rows=chunk.stop - chunk.start,
            labels=address(self.labels),
            row_scale=address(self.row_scale),
            kd=address(terms.kd),
            ce=address(terms.ce),
            student_entropy=address(terms.student_entropy),
            teacher_entropy=address(terms.teacher_entropy),
            agreement=address(terms.top1_agreement),
            num_threads=torch.get_num_threads(),
            instruction_set=self.instruction_set,
        )


def _piece_columns() -> int:
    """Columns the extension takes at once: tiles, or pieces of them where they are wider than it can."""
    assert _rows is not None
    return min(tiled_logits.TILE_COLUMNS, _rows.MAX_TILE_COLUMNS)


def _logits(tiles: Iterator[Tensor], maxima: Tensor | None):
    """Tiles (rows, width) of one side and their maxima (tiles, rows), as a table of places and as the extension takes it."""
    assert _rows is not None
    table, bfloat16 = [], False
    for number, tile in enumerate(tiles):
        bfloat16 = tile.dtype == torch.bfloat16
        maximum = 0 if maxima is None else maxima[number].data_ptr()
        table += [
            (piece.data_ptr(), piece.stride(0), piece.shape[1], maximum)
            for piece in tile.split(_piece_columns(), dim=1)
        ]
    places = torch.tensor(table, dtype=torch.int64, device="cpu")
    return places, _rows.Logits(bfloat16=bfloat16, tiles=places.data_ptr(), num_tiles=len(table))
