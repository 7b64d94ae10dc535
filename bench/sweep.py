"""Runs a case: all providers alive at once, asked in turn, one repetition each.

Interleaving spreads whatever the machine does meanwhile (clocks, neighbours, thermal limits) over
all providers, so that ratios inside one run hold although the times drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from bench.client import WorkerClient, WorkerError, WorkerPool
from bench.environment import available_mib, free_device_mib
from bench.model import Case, Provider, Row, Status
from bench.timing import quantile

GPU_SHARE = 0.9  # of the free memory that providers may take together by their estimates
LATE = "not begun before the run's deadline"
MIN_TIMEOUT_S = 2.0  # at the deadline, so that what has been measured can still be checked


@dataclass(frozen=True)
class Settings:
    """How long to measure. ``budget_s`` bounds one provider's repetitions in one case; nothing
    begins after ``deadline``, a moment of ``time.monotonic``, and what is under way then is cut."""

    reps: int = 5
    budget_s: float = 30.0
    num_threads: int = 1
    deadline: float = float("inf")

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline


@dataclass
class _Lane:
    """One provider on its way through a case; ``client`` is None once it has failed."""

    provider: Provider
    client: WorkerClient | None
    deadline: float
    status: Status = "ok"
    notes: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    check: dict[str, float] = field(default_factory=dict)

    def ask(self, do: str, *, timeout_s: float, **values: object) -> dict[str, float]:
        """The worker's answer; a failure marks the lane and answers nothing."""
        if self.client is None:
            return {}
        try:
            timeout_s = max(MIN_TIMEOUT_S, min(timeout_s, self.deadline - time.monotonic()))
            return self.client.ask(do, timeout_s=timeout_s, **values)
        except WorkerError as error:
            self.client, self.status = None, error.status
            self.notes.append(str(error))
            return {}

    def step(self, *, timeout_s: float) -> None:
        if measures := self.ask("step", timeout_s=timeout_s):
            self.seconds.append(measures.pop("seconds"))
            self.metrics.append(measures)


def run_cases(
    cases: Sequence[Case], settings: Settings, *, say: Callable[[str], None] = lambda text: None
) -> Generator[list[Row], None, None]:
    """The rows of one case after the other; a provider that fails keeps a row that says why."""
    pool = WorkerPool()
    try:
        for case in cases:
            pool.open(case)
            yield _run_case(case, settings, pool, say)
    finally:
        pool.close()


def run_case(case: Case, settings: Settings, *, say: Callable[[str], None]) -> list[Row]:
    """As ``run_cases`` for one."""
    return [row for rows in run_cases([case], settings, say=say) for row in rows]


def _run_case(case: Case, settings: Settings, pool: WorkerPool, say: Callable[[str], None]) -> list[Row]:
    settings = replace(settings, budget_s=settings.budget_s * case.budget_scale, reps=settings.reps * case.reps_scale)
    groups = _groups(case)
    rows: dict[str, Row] = {}
    for index, group in enumerate(groups):
        if len(groups) > 1:
            say(f"{case.name}: group {index + 1} of {len(groups)}")
        for row in _run_group(case, group, settings, pool, say):
            rows.setdefault(row.provider, row)
    return [rows[provider.name] for provider in case.providers]


def _groups(case: Case) -> list[Sequence[Provider]]:
    """The providers in groups whose processes fit into memory together and leave one another alone, floors in each."""
    floors = [provider for provider in case.providers if provider.role == "floor"]
    apart = [provider for provider in case.providers if provider.apart]
    together = [provider for provider in case.providers if not provider.apart]
    return _fitting_groups(case, floors, together) + [[*floors, provider] for provider in apart]


def _fitting_groups(case: Case, floors: list[Provider], providers: list[Provider]) -> list[Sequence[Provider]]:
    others = [provider for provider in providers if provider not in floors]
    if _is_on_gpu(case):
        free = GPU_SHARE * free_device_mib(case.params["device"])
        free -= sum(provider.device_mib for provider in floors)
        return [floors + group for group in _packed(others, free)]
    fits = max(2, int(0.8 * available_mib() / case.worker_mib))
    if len(providers) <= fits:
        return [providers]
    floors = floors[: fits - 1]
    others = [provider for provider in providers if provider not in floors]
    size = fits - len(floors)
    return [floors + others[start : start + size] for start in range(0, len(others), size)]


def _is_on_gpu(case: Case) -> bool:
    return str(case.params.get("device", "cpu")).startswith("cuda")


def _packed(providers: Sequence[Provider], free_mib: float) -> list[list[Provider]]:
    """In order, a new group wherever the next one does not fit any more; one too big is alone."""
    groups: list[list[Provider]] = [[]]
    used = 0.0
    for provider in providers:
        if groups[-1] and used + provider.device_mib > free_mib:
            groups.append([])
            used = 0.0
        groups[-1].append(provider)
        used += provider.device_mib
    return groups


def _run_group(
    case: Case, providers: Sequence[Provider], settings: Settings, pool: WorkerPool, say: Callable[[str], None]
) -> list[Row]:
    if settings.is_over:
        return [_row(case, _Lane(provider, None, settings.deadline, "cut", [LATE])) for provider in providers]
    lanes = [
        _Lane(provider, pool.take(provider, num_threads=settings.num_threads), settings.deadline)
        for provider in providers
    ]
    # On a GPU all start at once: the host has cores for their imports and compilers. On a CPU one
    # after the other, since the first step may be the only one that a slow provider has time for,
    # and so where the first step counts.
    executor = ThreadPoolExecutor(len(lanes) if _is_on_gpu(case) and case.warm_up else 1)
    try:
        say(f"{case.name}: starting {', '.join(provider.name for provider in providers)}")
        list(executor.map(lambda lane: _start(lane, case, settings), lanes))
        for rep in range(settings.reps if case.warm_up else settings.reps - 1):
            # Each round starts with another provider, so none always follows the same neighbour.
            first = rep % len(lanes)
            for lane in lanes[first:] + lanes[:first]:
                if _has_time(lane, settings):
                    say(f"{case.name}: {lane.provider.name} {rep + 1}/{settings.reps}")
                    lane.step(timeout_s=2 * settings.budget_s)
        for lane in lanes:
            say(f"{case.name}: memory and check of {lane.provider.name}")
            if case.measures_memory:
                lane.memory = lane.ask("memory", timeout_s=60 + 4 * settings.budget_s)
            lane.check = lane.ask("check", timeout_s=60 + settings.budget_s)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        pool.give([lane.client for lane in lanes if lane.client is not None])
    return _with_floor([_row(case, lane) for lane in lanes])


def _start(lane: _Lane, case: Case, settings: Settings) -> None:
    if settings.is_over and lane.client is not None:
        lane.client.close()
        lane.client, lane.status, lane.notes = None, "cut", [LATE]
        return
    answer = lane.ask(
        "setup",
        timeout_s=case.setup_timeout_s,
        entry=lane.provider.entry,
        params=dict(case.params),
    )
    if note := answer.get("note"):
        lane.notes.append(str(note))
    # The first step also loads code, compiles and fills caches: it is thrown away, unless the
    # provider is so slow that it is all that the budget allows.
    lane.step(timeout_s=case.warm_up_timeout_s + settings.budget_s)
    if not case.warm_up:
        return
    if lane.seconds and lane.seconds[0] <= settings.budget_s:
        lane.seconds.clear()
        lane.metrics.clear()
    elif lane.seconds:
        lane.notes.append("one repetition, not warmed up, for its time budget")


def _has_time(lane: _Lane, settings: Settings) -> bool:
    if lane.client is None or settings.is_over:
        return False
    spent = sum(measures.get("wall_s", lane.seconds[i]) for i, measures in enumerate(lane.metrics))
    return not spent or spent * (1 + 1 / len(lane.seconds)) <= settings.budget_s


def _row(case: Case, lane: _Lane) -> Row:
    seconds = lane.seconds
    row = Row(
        suite=case.suite,
        case=case.name,
        params=dict(case.params),
        provider=lane.provider.name,
        role=lane.provider.role,
        status=lane.status,
        note="; ".join(lane.notes),
        work=case.work,
        unit=case.unit,
        check=lane.check,
        peak_mib=lane.memory.get("peak_mib"),
        kept_mib=lane.memory.get("kept_mib"),
    )
    if not seconds:
        return row
    names = {name for measures in lane.metrics for name in measures}
    metrics = {
        name: quantile([measures[name] for measures in lane.metrics if name in measures], 0.5) for name in sorted(names)
    }
    metrics.pop("wall_s", None)
    return replace(
        row,
        work=metrics.pop("work", case.work),
        peak_mib=metrics.pop("peak_mib", row.peak_mib),
        seconds=tuple(seconds),
        median_s=quantile(seconds, 0.5),
        p20_s=quantile(seconds, 0.2),
        p80_s=quantile(seconds, 0.8),
        metrics=metrics,
    )


def _with_floor(rows: list[Row]) -> list[Row]:
    """Every row beside the fastest floor of its case."""
    floors = [row for row in rows if row.role == "floor" and row.median_s]
    if not floors:
        return rows
    floor = min(floors, key=lambda row: row.median_s or 0.0)
    assert floor.median_s is not None
    return [
        replace(row, floor=floor.provider, floor_percent=100 * floor.median_s / row.median_s) if row.median_s else row
        for row in rows
    ]
