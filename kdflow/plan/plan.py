"""A run on paper: memory by part, time by part, the schedule simulated, and what limits it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from kdflow.config import RunConfig, named
from kdflow.plan import work
from kdflow.plan.memory import Memory, student_memory, teacher_memory
from kdflow.plan.rates import Rates
from kdflow.plan.schedule import Costs, Outcome, Schedule, simulate
from kdflow.plan.shapes import ModelShape, teachers_of
from kdflow.plan.work import FP32, Work
from kdflow.plan.workload import Piece, Workload

# Of a device's memory, what allocators can hand out before they fail for want of one piece.
USABLE = 0.95
BUDGET_STEP = 256
MAX_BUDGET = 2**22
# Of a workload, simulated but not timed. In turns all steps are timed.
WARM_UP_STEPS = 1
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
        student_memory, teacher_memory: of one rank, and by teacher of one GPU of a worker.
        needed_bytes: of the fullest device, all processes on it together.
        capacity_bytes: what they may take.
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
    teachers: Mapping[str, ModelShape]
    student_memory: Memory
    teacher_memory: Mapping[str, Memory]
    needed_bytes: float
    capacity_bytes: float
    sharing: bool
    step_s: Mapping[str, float]
    outcome: Outcome
    tokens_per_s: float
    hours: float
    largest_budget: int | None
    bottleneck: str

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.capacity_bytes


def make_plan(
    config: RunConfig, student: ModelShape, teachers: Mapping[str, ModelShape], workload: Workload, machine: Machine
) -> Plan:
    """The run as configured, with the workload's timed steps standing for all of them."""
    planner = _Planner(config, student, teachers, workload, machine)
    warm_up, around = 0, 0
    if not planner.takes_turns:
        # Before the timed steps teachers fill the rings, and behind them there is a next microbatch for every slot.
        warm_up, around = WARM_UP_STEPS, -(-config.transport.num_slots // len(workload.steps[0]))
    schedule = planner.schedule(num_steps_around=around)
    outcome = simulate(schedule, warm_up_steps=around + warm_up, tail_steps=around)
    timed = workload.steps[warm_up:]
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
        teachers=teachers,
        student_memory=on_student,
        teacher_memory=on_teacher,
        needed_bytes=planner.needed_bytes(on_student, on_teacher),
        capacity_bytes=USABLE * machine.rates.capacity_bytes,
        sharing=planner.sharing,
        step_s=planner.step_seconds(),
        outcome=outcome,
        tokens_per_s=tokens / outcome.seconds,
        hours=config.training.num_steps * per_step / 3600,
        largest_budget=planner.largest_budget(),
        bottleneck=planner.bottleneck(outcome),
    )


def _prefill(name: str) -> str:
    """The part of a step."""
    return f"{named('teacher', name)}: prefill"


class _Planner:
    def __init__(
        self,
        config: RunConfig,
        student: ModelShape,
        teachers: Mapping[str, ModelShape],
        workload: Workload,
        machine: Machine,
    ) -> None:
        self._config, self._student, self._shapes = config, student, teachers
        self._teachers = teachers_of(config)
        self._workload, self._machine = workload, machine
        self._num_ranks = config.student.num_ranks
        rates, per_node = machine.rates, math.ceil(machine.num_devices / machine.num_nodes)
        one_node = machine.num_nodes == 1
        self._gather_rate = rates.node_bytes if self._num_ranks <= per_node else rates.network_bytes
        self._row_rate = rates.link_bytes if one_node else rates.network_bytes
        number = itertools.count()  # a CPU is device 0 to all
        self._students = [next(number) % machine.num_devices for _ in range(self._num_ranks)]
        # Of each teacher, for each worker, the devices of its shards.
        self._shards = {
            name: [
                [next(number) % machine.num_devices for _ in range(teacher.tp_size)] for _ in range(teacher.num_workers)
            ]
            for name, teacher in self._teachers.items()
        }
        prefilling = {shards[0] for workers in self._shards.values() for shards in workers}
        self.sharing = bool(prefilling & set(self._students))
        self.takes_turns = bool(self._teachers) and config.transport.schedule == "colocate"

    def schedule(self, *, num_steps_around: int = 0) -> Schedule:
        """Of the workload, its first step so many times before it and its last one as often behind it."""
        costs = [[[self._costs(piece) for piece in ranks] for ranks in step] for step in self._workload.steps]
        costs = costs[:1] * num_steps_around + costs + costs[-1:] * num_steps_around
        return Schedule(
            steps=costs,
            optimizer_s=self._seconds(self._optimizer()),
            student_devices=self._students,
            teacher_devices={name: [shards[0] for shards in workers] for name, workers in self._shards.items()},
            num_slots=self._config.transport.num_slots,
            turn_s=self._turn_s() if self.takes_turns else None,
        )

    def _turn_s(self) -> float:
        """Weights to host memory or back, each worker's GPU its own at the same time; on a CPU they stay."""
        if not self._machine.on_gpu:
            return 0.0
        weights = (
            self._machine.item * self._shapes[name].decoder_params / teacher.tp_size
            for name, teacher in self._teachers.items()
        )
        return max(weights) / self._machine.rates.link_bytes

    def _seconds(self, amount: Work) -> float:
        """Eager operators run one after another: products, then all else."""
        rates = self._machine.rates
        return (
            amount.flops / rates.matmul_flops
            + amount.attention_flops / rates.attention_flops
            + amount.operator_bytes / rates.operator_bytes
            + amount.moved_bytes / rates.memory_bytes
            + amount.logits / rates.loss_logits
        )

    def _optimizer(self) -> Work:
        return work.optimizer_work(self._student.num_params / self._num_ranks, self._machine.item)

    def _costs(self, piece: Piece) -> Costs:
        student, item = self._student, self._machine.item
        # A sample may name its teacher in a run that asks none.
        teacher = self._shapes[piece.teacher_name] if self._teachers else None
        forward = self._seconds(work.forward_work(student, piece.lengths, item))
        checkpointing = self._config.student.activation_checkpointing == "full"
        backward = work.backward_work(student, piece.lengths, item, recomputed=checkpointing)
        backward += work.accumulation_work(student.num_params, item)
        # Layers are gathered while others compute; a rank sends all but its own part.
        moved = student.num_params * (self._num_ranks - 1) / self._num_ranks
        gather, reduce = item * moved / self._gather_rate, FP32 * moved / self._gather_rate
        return Costs(
            prefill_s=self._prefill_s(piece) if teacher else 0.0,
            transfer_s=piece.num_rows * teacher.hidden_size * item / self._row_rate if teacher else 0.0,
            forward_s=max(forward, gather),
            loss_s=self._seconds(work.loss_work(student, teacher, piece.num_rows)),
            backward_s=max(self._seconds(backward), gather + reduce),
            teacher=piece.teacher_name if teacher else None,
        )

    def _prefill_s(self, piece: Piece) -> float:
        teacher, item = self._shapes[piece.teacher_name], self._machine.item
        shards = self._teachers[piece.teacher_name].tp_size
        alone = self._seconds(work.forward_work(teacher, piece.teacher_lengths, item))
        # Two sums over the shards of a layer's output, each sent and received once.
        summed = 4 * teacher.num_layers * sum(piece.teacher_lengths) * teacher.hidden_size * item
        exchange = summed * (shards - 1) / shards / self._machine.rates.node_bytes
        return alone / shards + exchange

    def step_seconds(self) -> dict[str, float]:
        schedule = self.schedule()
        pieces = [costs for step in schedule.steps for ranks in step for costs in ranks]
        per_step = len(pieces) / len(schedule.steps) / self._num_ranks

        def mean(name: str) -> float:
            return statistics.fmean(getattr(costs, name) for costs in pieces) * per_step

        def prefill(name: str) -> float:
            seconds = sum(costs.prefill_s for costs in pieces if costs.teacher == name)
            return seconds / len(schedule.steps) / self._teachers[name].num_workers

        return {
            **{_prefill(name): prefill(name) for name in self._teachers},
            **({"ring: transfer": mean("transfer_s")} if self._teachers else {}),
            "student: forward": mean("forward_s"),
            "student: loss": mean("loss_s"),
            "student: backward": mean("backward_s"),
            "student: optimizer": schedule.optimizer_s,
        }

    def memory(self, num_tokens: int, num_rows: int, *, num_microbatches: int) -> tuple[Memory, dict[str, Memory]]:
        """Of a rank and of each teacher's GPU, for a largest microbatch of so many tokens and rows."""
        machine, config = self._machine, self._config
        slots = config.transport.num_slots * config.training.tokens_per_microbatch
        widest = max((shape.hidden_size for shape in self._shapes.values()), default=0)
        on_student = student_memory(
            self._student,
            list(self._shapes.values()),
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_ranks=self._num_ranks,
            num_microbatches=num_microbatches,
            item=machine.item,
            teacher_item=machine.item,
            checkpointing=config.student.activation_checkpointing == "full",
            on_gpu=machine.on_gpu,
            ring_bytes=float(slots * widest * machine.item) if machine.on_gpu and not self.takes_turns else 0.0,
            process_bytes=machine.rates.process_bytes,
        )
        on_teachers = {
            name: teacher_memory(
                self._shapes[name],
                num_tokens=num_tokens,
                item=machine.item,
                with_kv=teacher.backend != "hf",
                process_bytes=machine.rates.process_bytes,
                num_shards=teacher.tp_size,
            )
            for name, teacher in self._teachers.items()
        }
        return on_student, on_teachers

    def needed_bytes(self, student: Memory, teachers: Mapping[str, Memory]) -> float:
        """Of the fullest device; in turns, in whichever turn needs more."""
        if not self.takes_turns:
            return self._on_fullest(student.total, {name: memory.total for name, memory in teachers.items()})
        return max(
            self._on_fullest(student.total, {name: memory.resting for name, memory in teachers.items()}),
            self._on_fullest(student.resting, {name: memory.total for name, memory in teachers.items()}),
        )

    def _on_fullest(self, student_bytes: float, teacher_bytes: Mapping[str, float]) -> float:
        needed = [0.0] * self._machine.num_devices
        for device in self._students:
            needed[device] += student_bytes
        for name, workers in self._shards.items():
            for device in itertools.chain(*workers):
                needed[device] += teacher_bytes[name]
        return max(needed)

    def largest_budget(self) -> int | None:
        """By halving, in steps of 256 tokens; a microbatch that is full, with the workload's share of loss rows."""
        step_tokens = self._workload.num_tokens / len(self._workload.steps)
        share = sum(p.num_rows for s in self._workload.steps for r in s for p in r) / self._workload.num_tokens

        def fits(budget: int) -> bool:
            microbatches = math.ceil(step_tokens / (self._num_ranks * budget))
            memory = self.memory(budget, math.ceil(share * budget), num_microbatches=microbatches)
            return self.needed_bytes(*memory) <= USABLE * self._machine.rates.capacity_bytes

        low, high = 0, MAX_BUDGET // BUDGET_STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * BUDGET_STEP) else (low, middle - 1)
        return low * BUDGET_STEP or None

    def bottleneck(self, outcome: Outcome) -> str:
        parts = self.step_seconds()
        student_parts = {part: seconds for part, seconds in parts.items() if part.startswith("student: ")}
        student_s = sum(student_parts.values())
        most = max(student_parts, key=lambda part: student_parts[part])
        share = f"{most.partition(': ')[2]} takes {student_parts[most] / student_s:.0%}"
        if not self._teachers:
            return f"students, who learn from text alone; {share}"
        if self.takes_turns:
            return (
                f"turns: for {outcome.wait:.0%} of the time students rest while teachers wake, prefill and fall asleep "
                f"again; more transport.num_slots than {self._config.transport.num_slots} make fewer turns"
            )
        if self.sharing:
            teacher_s = sum(parts[_prefill(name)] * teacher.num_workers for name, teacher in self._teachers.items())
            return (
                f"teacher and student share a device: {teacher_s / (teacher_s + student_s):.0%} of its time is "
                "prefilling"
            )
        name = max(outcome.busy, key=lambda name: outcome.busy[name])
        if outcome.wait > NOTICEABLE_WAIT and outcome.busy[name] > 0.9:
            num_workers = self._teachers[name].num_workers
            # As many times faster as the students' own pace is than the teacher's.
            needed = math.ceil(num_workers * parts[_prefill(name)] / student_s)
            whose = f" of {named('teacher', name)}" if name else ""
            return (
                f"teachers: ranks wait {outcome.wait:.0%} of the time; "
                f"about {needed} workers{whose} instead of {num_workers} would keep up"
            )
        if outcome.wait > NOTICEABLE_WAIT:
            return (
                f"the ring: ranks wait {outcome.wait:.0%} of the time while teachers are idle "
                f"{1 - outcome.busy[name]:.0%}; raise transport.num_slots above {self._config.transport.num_slots}"
            )
        return f"students, which never wait; {share}"
