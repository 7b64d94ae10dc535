"""The chunked algorithm in torch: CPU, and the fallback on any device.

The head is cut into tiles of columns, the rows into groups, a group's rows into chunks. For each group:

1. the student's logits, a tile of the head at a time, each into the tile's block of memory;
2. for each chunk of rows the teacher's logits, then ``native_rows``, or where that does not reach ``torch_rows``, turns
   the student's into dloss/dlogits in place; of heads cut over ranks ``vocab_parallel_rows``;
3. a tile of the head at a time: dH += dz W_tile and dW_tile = dz^T H.

So a weight of the student is read (and, where the CPU is slow in its dtype, converted) twice a group, not three times a
chunk. And the blocks cost little: until a tile's dW is written, its memory is free. Up to Hs rows of logits live there;
see ``tiled_logits.spans``.

Shape suffixes: n rows of a group, c rows of a chunk, r rows of a row step, V columns in the order they are processed (the
K compared ones first), w columns of a tile, H hidden size.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kdflow_kernels.native_rows import NativeRows
from kdflow_kernels.problem import GradientNeeds, Gradients, Problem, RowTerms
from kdflow_kernels.tiled_logits import Blocks, Tile, TiledHead, spans, tiles
from kdflow_kernels.torch_rows import TorchRows
from kdflow_kernels.vocab_parallel_rows import VocabParallelRows

# Rows of teacher logits held at once: fewer make the products slower, more cost memory.
CHUNK_ROWS = 256
# Rows of student logits kept outside the weight gradient's memory.
SCRATCH_ROWS = 512


def run(problem: Problem, needs: GradientNeeds) -> tuple[RowTerms, Gradients]:
    """Row terms and the gradients needed.

    Gradients come in the student's dtype, but in fp32 for fp16: a loss scale applied later must still find them.
    """
    return _Run(problem, needs).run()


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (a 0-d tensor), for free where it is known to be 1."""
    if factor.device.type != "cpu" or factor.item() != 1.0:
        gradient.mul_(factor)


class _Run:
    def __init__(self, problem: Problem, needs: GradientNeeds) -> None:
        self.problem, self.needs = problem, needs
        head = problem.student
        self.num_rows, self.hidden_size = head.input.shape
        self.accumulate = torch.promote_types(head.weight.dtype, torch.float32)
        self.student = TiledHead(head, self.accumulate)
        order, self.labels = _column_order(problem)
        # Cross-entropy reads the student's whole head; without it only the compared columns are ever touched.
        self.num_columns = problem.num_compared if problem.labels is None else head.weight.shape[0]
        self.num_grad_columns = problem.num_compared if problem.ce_weight == 0.0 else self.num_columns
        self.tiles = tiles(self.num_columns, order)
        if problem.teacher is not None:
            self.teacher = TiledHead(problem.teacher, self.accumulate)
            self.teacher_tiles = tiles(problem.num_compared, problem.teacher.token_ids)

        self.filtering = bool(needs) and problem.grad_filter_eps > 0.0
        self.chunk_size = min(problem.chunk_size or CHUNK_ROWS, max(self.num_rows, 1))
        scratch_rows = min(SCRATCH_ROWS, 2 * self.chunk_size)
        self.in_place = (
            needs.weight
            and order is None
            and not self.filtering
            and 0 < self.num_rows <= self.hidden_size + scratch_rows
        )
        group_size = self.chunk_size if self.filtering else self.num_rows if self.in_place else scratch_rows
        self.group_size = min(group_size, self.num_rows)
        num_chunks = max(1, -(-self.group_size // self.chunk_size))
        self.chunk_size = max(1, -(-self.group_size // num_chunks))
        self.terms = RowTerms.empty(problem, self.accumulate)
        self.room: tuple[Tensor, Tensor] | None = None
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
        teacher_rows = teacher_maxima = None
        if self.problem.teacher is not None:
            shape = (self.chunk_size, self.problem.num_compared)
            teacher_rows = torch.empty(shape, dtype=self.teacher.storage, device=device)
            teacher_maxima = self.teacher.maxima(len(self.teacher_tiles), shape[0])
        self.blocks = Blocks(
            spans(self.num_columns, self.group_size, storage, device, home, self.hidden_size),
            self.student.maxima(len(self.tiles), self.group_size),
            teacher_rows,
            teacher_maxima,
        )
        rows = NativeRows if NativeRows.covers(self.problem, self.blocks) else TorchRows
        if self.problem.vocab_parallel is not None:
            rows = VocabParallelRows
        self.rows = rows(self.problem, self.labels, self.blocks, self.terms, form_gradients=bool(needs))

    def run(self) -> tuple[RowTerms, Gradients]:
        for start in range(0, self.num_rows, max(self.group_size, 1)):
            rows = slice(start, min(start + self.group_size, self.num_rows))
            blocks = [block[: rows.stop - start] for block in self.blocks.student_tiles()]
            self._logits_to_gradients(rows, blocks)
            if self.needs:
                self._multiply(rows, blocks)
        if self.grad_weight is not None:
            self.grad_weight = self.grad_weight.to(self.student.storage)
        parallel = self.problem.vocab_parallel
        if parallel is not None and parallel.reduce_input_grad and self.grad_input is not None:
            dist.all_reduce(self.grad_input, group=parallel.group)
        return self.terms, Gradients(self.grad_input, self.grad_weight, self.grad_bias)

    def _logits_to_gradients(self, rows: slice, blocks: list[Tensor]) -> None:
        """Steps 1 and 2 for a group of rows: leaves dloss/dlogits in blocks where gradients are needed."""
        hidden = self.student.hidden(rows)
        for number, (tile, block) in enumerate(zip(self.tiles, blocks, strict=True)):
            maxima = self.blocks.student_maxima
            maximum = None if maxima is None else maxima[number, : len(hidden)]
            self.student.write_logits(hidden, tile, block, maximum)
        for start in range(0, len(hidden), self.chunk_size):
            chunk = slice(start, min(start + self.chunk_size, len(hidden)))
            self._write_teacher_logits(slice(rows.start + chunk.start, rows.start + chunk.stop))
            self.rows.run(rows.start, chunk)

    def _write_teacher_logits(self, rows: slice) -> None:
        if self.problem.teacher is None:
            return
        hidden, maxima = self.teacher.hidden(rows), self.blocks.teacher_maxima
        for number, (tile, block) in enumerate(zip(self.teacher_tiles, self.blocks.teacher_tiles(), strict=True)):
            maximum = None if maxima is None else maxima[number, : len(hidden)]
            self.teacher.write_logits(hidden, tile, block[: len(hidden)], maximum)

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
                self._add_product(grad_hidden, grad_logits, weight)
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
            self._add_product(self.grad_weight[tokens], grad_logits_t, hidden)

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b, in total's dtype; in memory that is kept, since new memory costs page faults each time."""
        if total.dtype == a.dtype:
            total.addmm_(a, b)
            return
        if self.room is None or self.room[0].numel() < total.numel():
            self.room = a.new_empty(total.numel()), total.new_empty(total.numel())
        product, widened = (room[: total.numel()].view(total.shape) for room in self.room)
        torch.mm(a, b, out=product)
        total += widened.copy_(product)


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

    def cut(self, tile: Tile, grad_logits: Tensor, weight: Tensor | None):
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
