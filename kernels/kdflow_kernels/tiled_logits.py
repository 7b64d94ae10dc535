"""A head in tiles of columns, and the memory for the logits of a group of rows in such tiles.

Shape suffixes: n rows of a group, c rows of a chunk, r rows of a row step, V columns in the order they are processed,
w columns of a tile, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kdflow_kernels.problem import LOWEST_LOGIT, Head

# A multiple of what the native row step takes at once, or less.
TILE_COLUMNS = 2048


def multiply_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype matrix products run in: ``dtype`` where the device is fast in it, else fp32.

    fp16 always goes to fp32: the gradients of a mean over many rows underflow in it.
    """
    if dtype == torch.bfloat16:
        fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return storage_dtype(dtype)


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Tile:
    """Columns start to stop; tokens picks their rows of the head's weight."""

    start: int
    stop: int
    tokens: slice | Tensor

    @property
    def width(self) -> int:
        return self.stop - self.start


def tiles(num_columns: int, order: Tensor | None) -> list[Tile]:
    """Tiles over the first num_columns columns; order (V,) is the token of each column, None: column = token."""
    tiles = []
    for start in range(0, num_columns, TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, num_columns))
        tiles.append(Tile(columns.start, columns.stop, columns if order is None else order[columns]))
    return tiles


class TiledHead:
    """A head whose logits are made a tile at a time."""

    def __init__(self, head: Head, accumulate: torch.dtype) -> None:
        self.head, self.accumulate = head, accumulate
        self.multiply = multiply_dtype(head.weight.dtype, head.weight.device)
        self.storage = storage_dtype(head.weight.dtype)
        self.converted = None  # room for one tile of the weight in the dtype of the products
        if self.multiply != head.weight.dtype:
            shape = (min(TILE_COLUMNS, head.weight.shape[0]), head.weight.shape[1])
            self.converted = torch.empty(shape, dtype=self.multiply, device=head.weight.device)

    def hidden(self, rows: slice) -> Tensor:
        return self.head.input[rows].to(self.multiply)

    def weight(self, tile: Tile) -> Tensor:
        """The tile's rows of the head; valid until the next call."""
        weight = self.head.weight[tile.tokens]
        return weight if self.converted is None else self.converted[: tile.width].copy_(weight)

    def maxima(self, num_tiles: int, num_rows: int) -> Tensor | None:
        """Room for write_logits's maxima (tiles, rows) where logits come in more digits than are stored, else None."""
        if self.multiply == self.storage:
            return None
        return torch.empty((num_tiles, num_rows), dtype=self.accumulate, device=self.head.weight.device)

    def write_logits(self, hidden: Tensor, tile: Tile, out: Tensor, maximum: Tensor | None) -> None:
        """softcap(logit_scale * (hidden @ weight.T + bias)) of a tile into out (n, w).

        Given maximum (n,), it gets the rows' largest logits and out the distances to them: bf16 keeps those of the
        likely tokens almost exactly, where it would round a logit of 20 to sixteenths. Gradients get ten times closer.
        """
        head, weight = self.head, self.weight(tile)
        if head.is_plain and self.multiply == out.dtype:
            torch.mm(hidden, weight.T, out=out)
            return
        z = torch.mm(hidden, weight.T).to(self.accumulate)
        if head.bias is not None:
            z.add_(head.bias[tile.tokens]).clamp_(min=LOWEST_LOGIT)
        if head.logit_scale != 1.0:
            z.mul_(head.logit_scale)
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        if maximum is not None:
            torch.amax(z, -1, out=maximum)
            z.sub_(maximum.unsqueeze(-1))
        out.copy_(z)


@dataclass(frozen=True)
class Span:
    """Memory of neighbouring tiles of one width, as one tensor: whole rows are copied in and out at once."""

    start: int  # columns
    stop: int
    blocks: Tensor  # (tiles, rows, width)

    def rows(self, rows: slice) -> Tensor:
        """(r, tiles, width)"""
        return self.blocks[:, rows].transpose(0, 1)

    def columns(self, whole_rows: Tensor) -> Tensor:
        """The same columns of a (r, V) tensor, as (r, tiles, width)."""
        return whole_rows[:, self.start : self.stop].unflatten(-1, (self.blocks.shape[0], self.blocks.shape[2]))


def spans(
    num_columns: int, num_rows: int, dtype: torch.dtype, device: torch.device, home: Tensor | None, hidden_size: int
) -> list[Span]:
    """Memory for num_rows rows of every tile; inside home, the weight gradient's (V * H,), as far as it goes.

    A tile needs num_rows * w numbers and owns H * w of home. With num_rows <= H it lies in its own part. Else blocks lie
    back to back against home's end and those that do not fit outside: writing weight gradients from the last tile to the
    first then overwrites only blocks that are done with.
    """
    step = max(num_rows, hidden_size)  # numbers of home that one column takes
    num_inside = 0 if home is None else home.numel() // step
    # Cut where the first tile begins that lies inside as a whole, and before a last tile of less than full width.
    first_inside = -(-(num_columns - num_inside) // TILE_COLUMNS) * TILE_COLUMNS
    full = num_columns // TILE_COLUMNS * TILE_COLUMNS
    cuts = sorted({0, min(first_inside, num_columns), full, num_columns})
    spans = []
    for start, stop in pairwise(cuts):
        width = min(TILE_COLUMNS, stop - start)
        shape = ((stop - start) // width, num_rows, width)
        if home is not None and start >= first_inside:
            offset = home.storage_offset() + home.numel() - (num_columns - start) * step
            blocks = home.as_strided(shape, (step * width, width, 1), offset)
        else:
            blocks = torch.empty(shape, dtype=dtype, device=device)
        spans.append(Span(start, stop, blocks))
    return spans


@dataclass(frozen=True)
class Blocks:
    """The logits of a group of rows and, a chunk of it at a time, the teacher's.

    Where there are maxima, logits are kept as distances to them; see ``TiledHead.write_logits``.
    """

    spans: list[Span]
    student_maxima: Tensor | None  # (tiles, n)
    teacher_rows: Tensor | None  # (c, K)
    teacher_maxima: Tensor | None  # (tiles, c)

    @property
    def num_columns(self) -> int:
        return self.spans[-1].stop if self.spans else 0

    def student_tiles(self) -> Iterator[Tensor]:
        """(n, w) each."""
        for span in self.spans:
            yield from span.blocks

    def teacher_tiles(self) -> Iterator[Tensor]:
        """(c, w) each."""
        if self.teacher_rows is not None and self.teacher_rows.shape[1]:
            yield from self.teacher_rows.split(TILE_COLUMNS, dim=1)
