"""Context parallelism: a packed microbatch cut along its tokens over the ranks of a group.

Every sample is cut into 2R even pieces, of which rank r has pieces r and 2R - 1 - r: an early one, whose tokens see few
others, and the late one that makes up for it. So each rank has as many tokens and as much causal attention as the next,
whatever samples are packed. All but attention works on a token by itself; for attention the ranks gather one another's
keys and values, a layer at a time, and each computes that of its own queries.

torch's ring attention (`context_parallel`) is causal over the whole sequence: packed samples would see one another.
Gathering is exact for any packing, and what Llama 3 was trained with (arXiv 2407.21783, section 3.3.2).

Shapes: T tokens of the microbatch, t of this rank, R ranks, K key heads, D head size, S keys of all its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kdflow.modeling.gather import gather
from kdflow.modeling.placement import to_device


@dataclass(frozen=True)
class ContextSplit:
    """What one rank has of a microbatch.

    Attributes:
        tokens: (t,) their positions in the microbatch, ascending; at least one.
        is_stand_in: whether the only token is another rank's: there were too few for all.
        query_lengths: of each of its pieces.
        key_lengths: for each piece the tokens of its sample up to the piece's end.
        keys: (S,) the keys of each piece, one after another, as places in what is gathered: rank * longest + token.
        longest: tokens of the rank that has most.
    """

    tokens: np.ndarray
    is_stand_in: bool
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    keys: np.ndarray
    longest: int

    @staticmethod
    def of(sequence_lengths: Sequence[int], rank: int, num_ranks: int) -> ContextSplit:
        """Rank `rank`'s part of samples of these lengths."""
        pieces = [_pieces(sequence_lengths, r, num_ranks) for r in range(num_ranks)]
        tokens = [np.concatenate([np.arange(0), *(np.arange(a, b) for _, a, b in own)]) for own in pieces]
        longest = max(len(own) for own in tokens)
        places = np.empty(sum(sequence_lengths), dtype=np.int64)
        for r, own in enumerate(tokens):
            places[own] = r * longest + np.arange(len(own))
        mine = pieces[rank] or [(0, 0, 1)]
        return ContextSplit(
            tokens=tokens[rank] if pieces[rank] else np.zeros(1, dtype=np.int64),
            is_stand_in=not pieces[rank],
            query_lengths=tuple(stop - start for _, start, stop in mine),
            key_lengths=tuple(stop - sample for sample, _, stop in mine),
            keys=np.concatenate([places[sample:stop] for sample, _, stop in mine]),
            longest=longest,
        )

    def loss_rows(self, loss_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the microbatch's loss rows (N,) this rank has, and at which of its tokens they are."""
        which = np.flatnonzero(np.isin(loss_rows, self.tokens)) if not self.is_stand_in else np.arange(0)
        return which, np.searchsorted(self.tokens, loss_rows[which])


def _pieces(sequence_lengths: Sequence[int], rank: int, num_ranks: int) -> list[tuple[int, int, int]]:
    """(start of its sample, start, stop) of each piece that is not empty, as positions in the microbatch."""
    found, sample = [], 0
    for length in sequence_lengths:
        for piece in (rank, 2 * num_ranks - 1 - rank):
            start, stop = (sample + length * edge // (2 * num_ranks) for edge in (piece, piece + 1))
            if stop > start:
                found.append((sample, start, stop))
        sample += length
    return found


class ContextKeys:
    """Brings to a rank the keys and values that its tokens see.

    Args:
        split: of the microbatch.
        group: the ranks that share it.
        device: of keys and values.
    """

    def __init__(self, split: ContextSplit, group: dist.ProcessGroup, device: torch.device) -> None:
        self.query_lengths, self.key_lengths = split.query_lengths, split.key_lengths
        self._group, self._longest = group, split.longest
        self._keys = to_device(split.keys, device)

    def gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, K, S, D) of both, the keys of each piece one after another, from (1, K, t, D)."""
        rows = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (key, value)], dim=1)  # (t, 2 * K * D)
        rows = F.pad(rows, (0, 0, 0, self._longest - len(rows)))
        rows = gather(rows, self._group).flatten(0, 1).index_select(0, self._keys)
        width = key.shape[1] * key.shape[3]
        gathered = (
            part.unflatten(1, (x.shape[1], x.shape[3])).transpose(0, 1)[None]
            for part, x in ((rows[:, :width], key), (rows[:, width:], value))
        )
        return next(gathered), next(gathered)
