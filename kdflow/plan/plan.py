"""A run on paper: memory by part, time by part, the schedule simulated, and what limits it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdflow.config import RunConfig
from kdflow.plan import work
from kdflow.plan.memory import Memory, student_memory, teacher_memory
from kdflow.plan.rates import Rates
from kdflow.plan.schedule import Costs, Outcome, Schedule, simulate
from kdflow.plan.shapes import ModelShape
from kdflow.plan.work import FP32, Work
from kdflow.plan.workload import Piece, Workload

# Of a device's memory, what allocators can hand out before they fail for want of one piece.
USABLE = 0.95
BUDGET_STEP = 256
MAX_BUDGET = 2**22
# Simulated but not timed: teachers fill the rings in the first step and rest in the last ones.
WARM_UP_STEPS, TAIL_STEPS = 1, 2
# A rank that waits for more than this share of the time is held up.
NOTICEABLE_WAIT = 0.05


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        num_devices: GPUs; students take the first ones, teachers those behind, counted round. A CPU is one.
        num_nodes: that they are spread over, evenly.
        item: bytes of a number in the compute dtype, on both sides.
    """

    rates: Rates
    num_devices: int
    num_nodes: int
    item: int

    @property
    def on_gpu(self) -> bool:
        return not self.rates.shared


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        student_memory, teacher_memory: of one rank and of one GPU of a worker.
        capacity_bytes: what the two, if they share a device, or each of them may take.
        sharing: a rank and a teacher are on one device.
        step_s: seconds of a step by part, each alone on its device, mean over ranks and steps.
        outcome: of the simulation.
        tokens_per_s: of the students, all together.
        hours: until the run's last step.
        largest_budget: the highest tokens_per_microbatch that fits; None where nothing does.
        bottleneck: what to change first.
    """

    config: RunConfig
    machine: Machine
    workload: Workload
    student: ModelShape
    teacher: ModelShape
    student_memory: Memory
    teacher_memory: Memory
    capacity_bytes: float
    sharing: bool
    step_s: Mapping[str, float]
    outcome: Outcome
    tokens_per_s: float
    hours: float
    largest_budget: int | None
    bottleneck: str

    @property
    def needed_bytes(self) -> float:
        student, teacher = self.student_memory.total, self.teacher_memory.total
        return student + teacher if self.sharing else max(student, teacher)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.capacity_bytes


def make_plan(
    config: RunConfig, student: ModelShape, teacher: ModelShape, workload: Workload, machine: Machine
) -> Plan:
    """The run as configured, with the workload's timed steps standing for all of them."""
    planner = _Planner(config, student, teacher, workload, machine)
    outcome = simulate(planner.schedule(), warm_up_steps=WARM_UP_STEPS, tail_steps=TAIL_STEPS)
    timed = timed_steps(workload)
    tokens = sum(piece.num_tokens for step in timed for ranks in step for piece in ranks)
    per_step = outcome.seconds / len(timed)
    on_student, on_teacher = planner.memory(
        workload.most_tokens, workload.most_rows, num_microbatches=workload.num_microbatches
    )
    return Plan(
        config=config,
        machine=machine,
        workload=workload,
        student=student,
        teacher=teacher,
        student_memory=on_student,
        teacher_memory=on_teacher,
        capacity_bytes=USABLE * machine.rates.capacity_bytes,
        sharing=planner.sharing,
        step_s=planner.step_seconds(),
        outcome=outcome,
        tokens_per_s=tokens / outcome.seconds,
        hours=config.training.num_steps * per_step / 3600,
        largest_budget=planner.largest_budget(),
        bottleneck=planner.bottleneck(outcome),
    )


def timed_steps(workload: Workload) -> Sequence[Sequence[Sequence[Piece]]]:
    return workload.steps[WARM_UP_STEPS : len(workload.steps) - TAIL_STEPS]


class _Planner:
    def __init__(
        self, config: RunConfig, student: ModelShape, teacher: ModelShape, workload: Workload, machine: Machine
    ) -> None:
        self._config, self._student, self._teacher = config, student, teacher
        self._workload, self._machine = workload, machine
        self._num_ranks = config.student.num_ranks
        self._shards = config.teacher.tp_size
        rates, per_node = machine.rates, math.ceil(machine.num_devices / machine.num_nodes)
        one_node = machine.num_nodes == 1
        self._gather_rate = rates.node_bytes if self._num_ranks <= per_node else rates.network_bytes
        self._row_rate = rates.link_bytes if one_node else rates.network_bytes
        self._students = [0 if rates.shared else rank % machine.num_devices for rank in range(self._num_ranks)]
        self._teachers = [
            0 if rates.shared else (self._num_ranks + worker * self._shards) % machine.num_devices
            for worker in range(config.teacher.num_workers)
        ]
        self.sharing = bool(set(self._students) & set(self._teachers))

    def schedule(self) -> Schedule:
        costs = [[[self._costs(piece) for piece in ranks] for ranks in step] for step in self._workload.steps]
        return Schedule(
            steps=costs,
            optimizer_s=self._seconds(self._optimizer()),
            student_devices=self._students,
            teacher_devices=self._teachers,
            num_slots=self._config.transport.num_slots,
        )

    def _seconds(self, amount: Work) -> float:
        """Eager operators run one after another: products, then all else."""
        rates = self._machine.rates
        return (
            amount.flops / rates.matmul_flops
            + amount.moved_bytes / rates.memory_bytes
            + amount.logits / rates.loss_logits
        )

    def _optimizer(self) -> Work:
        return work.optimizer_work(self._student.num_params / self._num_ranks, self._machine.item)

    def _costs(self, piece: Piece) -> Costs:
        student, item = self._student, self._machine.item
        forward = self._seconds(work.forward_work(student, piece.lengths, item))
        checkpointing = self._config.student.activation_checkpointing == "full"
        backward = work.backward_work(student, piece.lengths, item, recomputed=checkpointing)
        backward += work.accumulation_work(student.num_params, item)
        # Layers are gathered while others compute; a rank sends all but its own part.
        moved = student.num_params * (self._num_ranks - 1) / self._num_ranks
        gather, reduce = item * moved / self._gather_rate, FP32 * moved / self._gather_rate
        return Costs(
            prefill_s=self._prefill_s(piece),
            transfer_s=piece.num_rows * self._teacher.hidden_size * item / self._row_rate,
            forward_s=max(forward, gather),
            loss_s=self._seconds(work.loss_work(student, self._teacher, piece.num_rows)),
            backward_s=max(self._seconds(backward), gather + reduce),
        )

    def _prefill_s(self, piece: Piece) -> float:
        teacher, item = self._teacher, self._machine.item
        alone = self._seconds(work.forward_work(teacher, piece.teacher_lengths, item))
        # Two sums over the shards of a layer's output, each sent and received once.
        summed = 4 * teacher.num_layers * sum(piece.teacher_lengths) * teacher.hidden_size * item
        exchange = summed * (self._shards - 1) / self._shards / self._machine.rates.node_bytes
        return alone / self._shards + exchange

    def step_seconds(self) -> dict[str, float]:
        schedule = self.schedule()
        pieces = [costs for step in schedule.steps for ranks in step for costs in ranks]
        per_step = len(pieces) / len(schedule.steps) / self._num_ranks

        def mean(name: str) -> float:
            return statistics.fmean(getattr(costs, name) for costs in pieces) * per_step

        workers = self._config.teacher.num_workers
        return {
            "teacher: prefill": mean("prefill_s") * self._num_ranks / workers,
            "ring: transfer": mean("transfer_s"),
            "student: forward": mean("forward_s"),
            "student: loss": mean("loss_s"),
            "student: backward": mean("backward_s"),
            "student: optimizer": schedule.optimizer_s,
        }

    def memory(self, num_tokens: int, num_rows: int, *, num_microbatches: int) -> tuple[Memory, Memory]:
        """Of a rank and of a teacher's GPU, for a largest microbatch of so many tokens and rows."""
        machine, config = self._machine, self._config
        slots = config.transport.num_slots * config.training.tokens_per_microbatch
        on_student = student_memory(
            self._student,
            self._teacher,
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_ranks=self._num_ranks,
            num_microbatches=num_microbatches,
            item=machine.item,
            teacher_item=machine.item,
            checkpointing=config.student.activation_checkpointing == "full",
            on_gpu=machine.on_gpu,
            ring_bytes=float(slots * self._teacher.hidden_size * machine.item) if machine.on_gpu else 0.0,
            process_bytes=machine.rates.process_bytes,
        )
        on_teacher = teacher_memory(
            self._teacher,
            num_tokens=num_tokens,
            item=machine.item,
            with_kv=config.teacher.backend != "hf",
            process_bytes=machine.rates.process_bytes,
            num_shards=self._shards,
        )
        return on_student, on_teacher

    def largest_budget(self) -> int | None:
        """By halving, in steps of 256 tokens; a microbatch that is full, with the workload's share of loss rows."""
        step_tokens = self._workload.num_tokens / len(self._workload.steps)
        share = sum(p.num_rows for s in self._workload.steps for r in s for p in r) / self._workload.num_tokens

        def fits(budget: int) -> bool:
            microbatches = math.ceil(step_tokens / (self._num_ranks * budget))
            student, teacher = self.memory(budget, math.ceil(share * budget), num_microbatches=microbatches)
            needed = student.total + teacher.total if self.sharing else max(student.total, teacher.total)
            return needed <= USABLE * self._machine.rates.capacity_bytes

        low, high = 0, MAX_BUDGET // BUDGET_STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * BUDGET_STEP) else (low, middle - 1)
        return low * BUDGET_STEP or None

    def bottleneck(self, outcome: Outcome) -> str:
        if self.sharing:
            by_side = {"teacher": 0.0, "student": 0.0}
            for part, seconds in self.step_seconds().items():
                side = part.partition(":")[0]
                if side in by_side:
                    by_side[side] += seconds * (self._config.teacher.num_workers if side == "teacher" else 1)
            share = by_side["teacher"] / sum(by_side.values())
            return f"teacher and student share a device: {share:.0%} of its time is prefilling"
        if outcome.wait > NOTICEABLE_WAIT and outcome.teacher_busy > 0.9:
            needed = self._config.teacher.num_workers * self._student_share(outcome)
            return (
                f"teachers: ranks wait {outcome.wait:.0%} of the time; "
                f"about {math.ceil(needed)} workers instead of {self._config.teacher.num_workers} would keep up"
            )
        if outcome.wait > NOTICEABLE_WAIT:
            return (
                f"the ring: ranks wait {outcome.wait:.0%} of the time while teachers are idle "
                f"{1 - outcome.teacher_busy:.0%}; raise transport.num_slots above {self._config.transport.num_slots}"
            )
        parts = {k: v for k, v in self.step_seconds().items() if k.startswith("student")}
        most = max(parts, key=lambda part: parts[part])
        return f"students, which never wait; {most.partition(': ')[2]} takes {parts[most] / sum(parts.values()):.0%}"

    def _student_share(self, outcome: Outcome) -> float:
        """How many times the students' own pace is of the teachers'."""
        parts = self.step_seconds()
        return parts["teacher: prefill"] / sum(v for k, v in parts.items() if k.startswith("student"))
