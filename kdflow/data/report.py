"""What happened to the rows of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetReport:
    """How many rows were read, used, shortened and skipped, the latter by reason."""

    num_rows: int
    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    num_truncated: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        text = (
            f"{self.num_samples} samples of {self.num_rows} rows, {self.num_tokens} tokens, "
            f"{self.num_loss_tokens} in the loss"
        )
        if self.num_truncated:
            text += f"; {self.num_truncated} truncated"
        return text + "".join(f"; {n} skipped: {why}" for why, n in sorted(self.skipped.items()))

    @staticmethod
    def sum(reports: Sequence[DatasetReport]) -> DatasetReport:
        skipped: Counter[str] = Counter()
        for report in reports:
            skipped.update(report.skipped)
        return DatasetReport(
            num_rows=sum(r.num_rows for r in reports),
            num_samples=sum(r.num_samples for r in reports),
            num_tokens=sum(r.num_tokens for r in reports),
            num_loss_tokens=sum(r.num_loss_tokens for r in reports),
            num_truncated=sum(r.num_truncated for r in reports),
            skipped=dict(skipped),
        )
