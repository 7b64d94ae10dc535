"""The nouns of the suite: a case is measured for each of its providers and gives one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

# In the workers' environment: where what a repetition leaves behind besides its row is kept, without suffix.
KEEP = "KDFLOW_BENCH_KEEP"
Role = Literal["ours", "peer", "floor", "bound"]
"""A floor is what the hardware needs for the job's indispensable part, and rows are stated in
percent of it; a bound is a stricter figure, shown beside it and not divided by."""
Status = Literal["ok", "cut", "failed", "unavailable"]


class UnavailableError(Exception):
    """Raised by a provider's entry that cannot run here; the message is the row's note."""


@dataclass(frozen=True)
class Provider:
    """One way to do a case's job.

    ``entry`` is ``"module:function"``; the function takes the case's params and returns a Trial.
    It is imported only in the provider's own process, so a provider that cannot be imported loses
    its row and nothing else. ``env`` is added to that process's environment. ``device_mib`` is
    about what that process takes of a GPU's memory. ``apart`` is for one whose processes go on
    working between its repetitions: it is measured after the others, beside floors alone.
    """

    name: str
    entry: str
    role: Role = "peer"
    env: tuple[tuple[str, str], ...] = ()
    device_mib: float = 0.0
    apart: bool = False


@dataclass(frozen=True)
class Case:
    """One job of known size; ``params`` is JSON and all that a provider gets.

    ``work`` is what one repetition does, in ``unit`` ("flop", "byte", "token", "message"), so that
    rates and the percentage of the floor need only the time. ``worker_mib`` is about what one
    provider's process holds: providers that do not fit into memory together run in groups.
    Without ``measures_memory`` a step says its own peak, if any; without ``warm_up`` the first
    repetition counts, since each begins afresh anyway; ``budget_scale`` multiplies the run's time
    budget where repetitions are long, ``reps_scale`` their number where two are to be told apart
    that are nearly equal. ``setup_timeout_s`` bounds imports and the making of the inputs,
    ``warm_up_timeout_s`` the compilation in the first step; neither counts in the budget.
    Cases in a row of the same ``worker_pool`` are measured by the same processes, one for each
    provider: for GPUs, where starting one takes longer than measuring.
    """

    suite: str
    name: str
    params: Mapping[str, Any]
    providers: tuple[Provider, ...]
    work: float
    unit: str
    worker_mib: float = 512.0
    measures_memory: bool = True
    warm_up: bool = True
    budget_scale: float = 1.0
    reps_scale: int = 1
    setup_timeout_s: float = 120.0
    warm_up_timeout_s: float = 120.0
    worker_pool: str = ""


@dataclass
class Trial:
    """What a provider's entry returns: one job, done once by each call of ``step``, before which
    ``prepare`` runs untimed.

    ``step`` returns nothing, and is then timed as a whole, or a mapping of further measures;
    ``seconds``, ``work`` and ``peak_mib`` in it replace what the harness would say, and ``wall_s``
    is what the repetition costs of the time budget. ``check`` gives values that providers must
    agree on; ``gradient_bytes`` are those of the results that a step must leave behind, which the
    peak is stated without; ``note`` goes beside the row. A step that queues its work ``on_stream``
    is timed by CUDA events behind another one, untimed, so that the clock sees a GPU with work
    waiting, as in training, and not the host's first launches.
    """

    step: Callable[[], Mapping[str, float] | None]
    check: Callable[[], Mapping[str, float]] | None = None
    prepare: Callable[[], None] | None = None
    close: Callable[[], None] | None = None
    gradient_bytes: int = 0
    note: str = ""
    on_stream: bool = False


@dataclass(frozen=True)
class Row:
    """One provider's result for one case. Times in seconds, memory in MiB.

    ``peak_mib`` is the highest memory of one step above the inputs and the gradients it returns;
    ``kept_mib`` is what the process holds between steps beyond its state right after the inputs
    were made (caches, code, compiled graphs). ``floor_percent`` is the floor's median over this
    row's median, floor and row measured in the same run.
    """

    suite: str
    case: str
    params: Mapping[str, Any]
    provider: str
    role: Role
    status: Status
    note: str = ""
    seconds: tuple[float, ...] = ()
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    work: float = 0.0
    unit: str = ""
    floor: str | None = None
    floor_percent: float | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    check: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """Work per second at the median time."""
        return self.work / self.median_s if self.median_s else None

    def as_json(self) -> dict[str, Any]:
        return {"kind": "row", **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        fields = {key: value for key, value in values.items() if key != "kind"}
        return cls(**{**fields, "seconds": tuple(fields["seconds"])})
