"""The chunked algorithm in torch: CPU, and the fallback on any device.

The head is cut into tiles of columns, the rows into groups, a group's rows into chunks. For each group:

1. the student's logits, a tile of the head at a time, each into the tile's block of memory;
2. for each chunk of rows the teacher's logits, then ``torch_rows`` turns the student's into dloss/dlogits in place;
3. a tile of the head at a time: dH += dz W_tile and dW_tile = dz^T H.

So a weight of the student is read (and, where the CPU is slow in its dtype, converted) twice a group, not three times a
chunk. And the blocks cost little: until a tile's dW is written, its memory is free. Up to Hs rows of logits live there;
see ``_spans``.

Shape suffixes: n rows of a group, c rows of a chunk, r rows of a row step, V columns in the order they are processed (the
K compared ones first), w columns of a tile, H hidden size.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from kdflow_kernels import torch_rows
from kdflow_kernels.problem import (
    LOWEST_LOGIT,
    GradientNeeds,
    Gradients,
    Head,
    Problem,
    RowTerms,
)

TILE_COLUMNS = 512
CHUNK_ROWS = 192
# Rows of student logits kept outside the weight gradient's memory, in chunks.
SCRATCH_CHUNKS = 3
# Numbers in a buffer of the row step, per thread: about eight such buffers should fit in the thread's share of cache.
ROW_STEP_NUMBERS = 2**18


def run(problem: Problem, needs: GradientNeeds) -> tuple[RowTerms, Gradients]:
    """Row terms and the gradients needed.

    Gradients come in the student's dtype, but in fp32 for fp16: a loss scale applied later must still find them.
    """
    return _Run(problem, needs).run()


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (a 0-d tensor), for free where it is known to be 1."""
    if factor.device.type != "cpu" or factor.item() != 1.0:
        gradient.mul_(factor)


def multiply_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype matrix products run in: ``dtype`` where the device is fast in it, else fp32.

    fp16 always goes to fp32: the gradients of a mean over many rows underflow in it.
    """
    if dtype == torch.bfloat16:
        fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return _storage_dtype(dtype)


def _storage_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class _Tile:
    """Columns start to stop; tokens picks their rows of the head's weight."""

    start: int
    stop: int
    tokens: slice | Tensor

    @property
    def width(self) -> int:
        return self.stop - self.start


def _tiles(num_columns: int, order: Tensor | None) -> list[_Tile]:
    """Tiles over the first num_columns columns; order (V,) is the token of each column, None: column = token."""
    tiles = []
    for start in range(0, num_columns, TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, num_columns))
        tiles.append(_Tile(columns.start, columns.stop, columns if order is None else order[columns]))
    return tiles


class _TiledHead:
    """A head whose logits are made a tile at a time."""

    def __init__(self, head: Head, accumulate: torch.dtype) -> None:
        self.head, self.accumulate = head, accumulate
        self.multiply = multiply_dtype(head.weight.dtype, head.weight.device)
        self.storage = _storage_dtype(head.weight.dtype)
        self.converted = None  # room for one tile of the weight in the dtype of the products
        if self.multiply != head.weight.dtype:
            shape = (min(TILE_COLUMNS, head.weight.shape[0]), head.weight.shape[1])
            self.converted = torch.empty(shape, dtype=self.multiply, device=head.weight.device)

    def hidden(self, rows: slice) -> Tensor:
        return self.head.input[rows].to(self.multiply)

    def weight(self, tile: _Tile) -> Tensor:
        """The tile's rows of the head; valid until the next call."""
        weight = self.head.weight[tile.tokens]
        return weight if self.converted is None else self.converted[: tile.width].copy_(weight)

    def maxima(self, num_tiles: int, num_rows: int) -> Tensor | None:
        """Room for write_logits's maxima (tiles, rows) where logits come in more digits than are stored, else None."""
        if self.multiply == self.storage:
            return None
        return torch.empty((num_tiles, num_rows), dtype=self.accumulate, device=self.head.weight.device)

    def write_logits(self, hidden: Tensor, tile: _Tile, out: Tensor, maximum: Tensor | None) -> None:
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


class _Run:
    def __init__(self, problem: Problem, needs: GradientNeeds) -> None:
        self.problem, self.needs = problem, needs
        head = problem.student
        self.num_rows, self.hidden_size = head.input.shape
        self.accumulate = torch.promote_types(head.weight.dtype, torch.float32)
        self.student = _TiledHead(head, self.accumulate)
        order, self.labels = _column_order(problem)
        # Cross-entropy reads the student's whole head; without it only the compared columns are ever touched.
        self.num_columns = problem.num_compared if problem.labels is None else head.weight.shape[0]
        self.num_grad_columns = problem.num_compared if problem.ce_weight == 0.0 else self.num_columns
        self.tiles = _tiles(self.num_columns, order)
        if problem.teacher is not None:
            self.teacher = _TiledHead(problem.teacher, self.accumulate)
            self.teacher_tiles = _tiles(problem.num_compared, problem.teacher.token_ids)

        self.filtering = bool(needs) and problem.grad_filter_eps > 0.0
        self.chunk_size = min(problem.chunk_size or CHUNK_ROWS, max(self.num_rows, 1))
        scratch_rows = SCRATCH_CHUNKS * self.chunk_size
        self.in_place = (
            needs.weight
            and order is None
            and not self.filtering
            and 0 < self.num_rows <= self.hidden_size + scratch_rows
        )
        group_size = self.chunk_size if self.filtering else self.num_rows if self.in_place else scratch_rows
        self.group_size = min(group_size, self.num_rows)
        self.terms = _empty_terms(problem, self.num_rows, self.accumulate)
        self._allocate()

    def _allocate(self) -> None:
        head, needs, storage, device = (
            self.problem.student,
            self.needs,
            self.student.storage,
            self.problem.student.weight.device,
        )
        self.grad_input = torch.empty(head.input.shape, dtype=storage, device=device) if needs.input else None
        self.grad_weight = self.grad_bias = None
        if needs.weight:
            # Sums over several groups are kept in fp32 and rounded once, at the end.
            many = self.group_size < self.num_rows
            make = torch.empty if self.in_place else torch.zeros
            self.grad_weight = make(head.weight.shape, dtype=self.accumulate if many else storage, device=device)
        if needs.bias:
            self.grad_bias = torch.zeros(head.weight.shape[0], dtype=self.accumulate, device=device)

        home = None
        if self.in_place and self.grad_weight is not None:
            home = self.grad_weight.view(-1)[: self.num_columns * self.hidden_size]
        self.spans = _spans(self.num_columns, self.group_size, storage, device, home, self.hidden_size)
        self.teacher_rows = None
        if self.problem.teacher is not None:
            shape = (min(self.chunk_size, self.group_size), self.problem.num_compared)
            self.teacher_rows = torch.empty(shape, dtype=self.teacher.storage, device=device)
            self.teacher_maxima = self.teacher.maxima(len(self.teacher_tiles), shape[0])
        self.student_maxima = self.student.maxima(len(self.tiles), self.group_size)

    def run(self) -> tuple[RowTerms, Gradients]:
        for start in range(0, self.num_rows, max(self.group_size, 1)):
            rows = slice(start, min(start + self.group_size, self.num_rows))
            blocks = [block for span in self.spans for block in span.blocks[:, : rows.stop - start]]
            self._logits_to_gradients(rows, blocks)
            if self.needs:
                self._multiply(rows, blocks)
        if self.grad_weight is not None:
            self.grad_weight = self.grad_weight.to(self.student.storage)
        return self.terms, Gradients(self.grad_input, self.grad_weight, self.grad_bias)

    def _logits_to_gradients(self, rows: slice, blocks: list[Tensor]) -> None:
        """Steps 1 and 2 for a group of rows: leaves dloss/dlogits in blocks where gradients are needed."""
        hidden = self.student.hidden(rows)
        for number, (tile, block) in enumerate(zip(self.tiles, blocks, strict=True)):
            maximum = None if self.student_maxima is None else self.student_maxima[number, : len(hidden)]
            self.student.write_logits(hidden, tile, block, maximum)

        step_rows = max(1, ROW_STEP_NUMBERS * torch.get_num_threads() // self.num_columns)
        z = torch.empty((step_rows, self.num_columns), dtype=self.accumulate, device=hidden.device)
        for chunk_start in range(0, len(hidden), self.chunk_size):
            chunk = slice(chunk_start, min(chunk_start + self.chunk_size, len(hidden)))
            self._write_teacher_logits(slice(rows.start + chunk.start, rows.start + chunk.stop))
            for start in range(chunk.start, chunk.stop, step_rows):
                in_group = slice(start, min(start + step_rows, chunk.stop))
                self._row_step(rows.start, chunk.start, in_group, z[: in_group.stop - start])

    def _row_step(self, group_start: int, chunk_start: int, in_group: slice, z: Tensor) -> None:
        """Turn the logits of a few rows of the group into gradients; z (r, V) is room for them."""
        for span in self.spans:
            span.columns(z).copy_(span.rows(in_group))
        _add_maxima(z, self.student_maxima, in_group)
        teacher_z = None
        if self.teacher_rows is not None:
            in_chunk = slice(in_group.start - chunk_start, in_group.stop - chunk_start)
            teacher_z = self.teacher_rows[in_chunk].to(self.accumulate)
            _add_maxima(teacher_z, self.teacher_maxima, in_chunk)
        rows = slice(group_start + in_group.start, group_start + in_group.stop)
        terms, gradient = torch_rows.step(
            self.problem,
            z,
            teacher_z,
            None if self.labels is None else self.labels[rows],
            self.problem.row_scale[rows],
            form_gradients=bool(self.needs),
        )
        if gradient is not None:
            if gradient.shape[1] < self.num_columns:
                gradient = torch.nn.functional.pad(gradient, (0, self.num_columns - gradient.shape[1]))
            for span in self.spans:
                span.rows(in_group).copy_(span.columns(gradient))
        # Copied at once: small tensors that outlive a step would keep its large ones from being allocated anew in the
        # same place (646 MiB instead of 157 MiB at N=1024, V=64000).
        for field in fields(RowTerms):
            found = getattr(terms, field.name)
            if found is not None:
                getattr(self.terms, field.name)[rows] = found

    def _write_teacher_logits(self, rows: slice) -> None:
        if self.teacher_rows is not None:
            hidden = self.teacher.hidden(rows)
            for number, tile in enumerate(self.teacher_tiles):
                out = self.teacher_rows[: len(hidden), tile.start : tile.stop]
                maximum = None if self.teacher_maxima is None else self.teacher_maxima[number, : len(hidden)]
                self.teacher.write_logits(hidden, tile, out, maximum)

    def _multiply(self, rows: slice, blocks: list[Tensor]) -> None:
        """Step 3 for a group of rows: add what its dloss/dlogits in blocks mean for input, weight and bias."""
        hidden = self.student.hidden(rows)
        grad_hidden = torch.zeros(hidden.shape, dtype=self.accumulate, device=hidden.device)
        tail = None
        if self.filtering:
            limit = self.problem.grad_filter_eps * self.problem.row_scale[rows].abs()
            tail = _Tail(limit.unsqueeze(-1), grad_hidden)
        # Backwards, because a tile's weight gradient is written over the blocks of later tiles.
        for tile, block in reversed(list(zip(self.tiles, blocks, strict=True))):
            if tile.start >= self.num_grad_columns:
                if self.in_place and self.grad_weight is not None:
                    self.grad_weight[tile.tokens] = 0.0
                continue
            if self.grad_bias is not None:
                self.grad_bias[tile.tokens] += block.sum(0, dtype=self.accumulate)
            grad_logits, tokens = block, tile.tokens
            weight = self.student.weight(tile) if self.needs.input else None
            if tail is not None:
                grad_logits, weight, tokens = tail.cut(tile, block, weight)
            grad_logits = grad_logits.to(self.student.multiply)
            if weight is not None:
                _add_product(grad_hidden, grad_logits, weight)
            if self.grad_weight is not None:
                self._add_weight_gradient(tokens, grad_logits.T, hidden)
        if self.in_place and self.grad_weight is not None:
            self.grad_weight[self.num_columns :] = 0.0
        if tail is not None:
            tail.finish()
        if self.grad_input is not None:
            self.grad_input[rows] = grad_hidden

    def _add_weight_gradient(self, tokens: slice | Tensor, grad_logits_t: Tensor, hidden: Tensor) -> None:
        assert self.grad_weight is not None
        if isinstance(tokens, Tensor):
            self.grad_weight.index_add_(0, tokens, torch.mm(grad_logits_t, hidden).to(self.grad_weight.dtype))
        elif self.in_place:
            # Not straight into place: that may be where grad_logits_t lies.
            self.grad_weight[tokens] = torch.mm(grad_logits_t, hidden)
        else:
            _add_product(self.grad_weight[tokens], grad_logits_t, hidden)


class _Tail:
    """The columns left out by grad_filter_eps, and the rank-1 term that stands for them in the input's gradient.

    The gradients left out differ little from one another, so their sum times the mean of their weights is most of what
    they would add.
    """

    def __init__(self, limit: Tensor, grad_hidden: Tensor) -> None:
        self.limit, self.grad_hidden = limit, grad_hidden
        self.mass = torch.zeros_like(limit)  # (n, 1)
        self.weight_sum = torch.zeros_like(grad_hidden[0])  # (H,)
        self.num_columns = 0

    def cut(self, tile: _Tile, grad_logits: Tensor, weight: Tensor | None):
        """The active columns of a tile: their gradients (n, a), weights (a, H) and tokens (a,)."""
        active = (grad_logits.abs() > self.limit).any(0)
        columns = active.nonzero().squeeze(-1)
        kept = grad_logits[:, columns]
        dtype = self.mass.dtype
        self.mass += grad_logits.sum(-1, keepdim=True, dtype=dtype) - kept.sum(-1, keepdim=True, dtype=dtype)
        if weight is not None:
            kept_weight = weight[columns]
            self.weight_sum += weight.sum(0, dtype=dtype) - kept_weight.sum(0, dtype=dtype)
            weight = kept_weight
        self.num_columns += tile.width - len(columns)
        tokens = tile.tokens[columns] if isinstance(tile.tokens, Tensor) else columns + tile.start
        return kept, weight, tokens

    def finish(self) -> None:
        if self.num_columns:
            self.grad_hidden.addcmul_(self.mass, self.weight_sum / self.num_columns)


def _add_maxima(z: Tensor, maxima: Tensor | None, rows: slice) -> None:
    """Undo write_logits's subtraction in whole rows z (r, V)."""
    if maxima is None:
        return
    per_tile = maxima[:, rows].T.unsqueeze(-1)  # (r, tiles, 1)
    num_full = z.shape[1] // TILE_COLUMNS
    full = num_full * TILE_COLUMNS
    z[:, :full].unflatten(-1, (num_full, TILE_COLUMNS)).add_(per_tile[:, :num_full])
    if full < z.shape[1]:
        z[:, full:].add_(per_tile[:, -1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


@dataclass(frozen=True)
class _Span:
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


def _spans(
    num_columns: int, num_rows: int, dtype: torch.dtype, device: torch.device, home: Tensor | None, hidden_size: int
) -> list[_Span]:
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
        spans.append(_Span(start, stop, blocks))
    return spans


def _column_order(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Token of each of the student's columns, compared ones first, and the labels as columns.

    None for the order means that columns are tokens.
    """
    ids, labels = problem.student.token_ids, problem.labels
    if ids is None:
        return None, labels
    if labels is None:
        return ids, None
    num_tokens = problem.student.weight.shape[0]
    # A stable sort by "is not compared" keeps the rest in order; then the compared ones get the order of the ids.
    others = torch.ones(num_tokens, dtype=torch.int8, device=ids.device).index_fill_(0, ids, 0)
    order = others.argsort(stable=True)
    order[: len(ids)] = ids
    column = torch.empty_like(order).scatter_(0, order, torch.arange(num_tokens, device=ids.device))
    return order, column[labels]


def _empty_terms(problem: Problem, num_rows: int, dtype: torch.dtype) -> RowTerms:
    def make(given: object) -> Tensor | None:
        if given is None:
            return None
        return torch.empty(num_rows, dtype=dtype, device=problem.row_scale.device)

    return RowTerms(
        kd=make(problem.teacher),
        ce=make(problem.labels),
        student_entropy=torch.empty(num_rows, dtype=dtype, device=problem.row_scale.device),
        teacher_entropy=make(problem.teacher),
        top1_agreement=make(problem.teacher),
    )
