"""A plan on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kdflow.config import RunConfig, named
from kdflow.plan.memory import Memory
from kdflow.plan.plan import Plan
from kdflow.plan.shapes import ModelShape

GIB, MIB = 2**30, 2**20


def print_plan(plan: Plan, console: Console) -> None:
    machine = plan.machine
    devices = "this CPU" if machine.rates.shared else f"{machine.num_devices} x {machine.rates.name}"
    nodes = "" if machine.num_nodes == 1 else f" on {machine.num_nodes} nodes"
    lines = [
        f"student  {_model(plan.student)}, {plan.config.student.num_ranks} rank(s)",
        *(
            f"{named('teacher', name)}  {_model(shape)}, {plan.config.named_teachers()[name].num_workers} worker(s)"
            for name, shape in plan.teachers.items()
        ),
        f"machine  {devices}{nodes}; rates: {machine.rates.source}",
        f"data     {plan.workload.source}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_memory_table("memory of a student rank", plan.student_memory))
    for name, memory in plan.teacher_memory.items():
        console.print(_memory_table(f"memory of {named('teacher', name)}", memory))
    console.print(_time_table(plan))
    for line in summary(plan):
        console.print(line, highlight=False, soft_wrap=True)


def summary(plan: Plan) -> list[str]:
    """What one wants to know first, a line each."""
    together = "students and teachers together" if plan.sharing else "the larger of both"
    if not plan.teachers:
        together = "students alone"
    elif plan.config.transport.schedule == "colocate":
        together = "the larger of both turns"
    fit = "fits" if plan.fits else "does NOT fit"
    budget = plan.config.training.tokens_per_microbatch
    largest = f"{plan.largest_budget:,} tokens" if plan.largest_budget else "nothing"
    shown = plan.outcome
    busy = [f"{named('teacher', name)} {share:.0%}" for name, share in shown.busy.items()]
    if busy:
        busy.append(f"ranks wait {shown.wait:.0%} of the time")
    left_out = _left_out(plan.config)
    return [
        *(
            [f"left out    {', '.join(left_out)}: the run has it, and these figures are those without"]
            if left_out
            else []
        ),
        f"memory      {plan.needed_bytes / GIB:.2f} GiB, {together}, of {plan.capacity_bytes / GIB:.1f} usable: {fit}",
        f"microbatch  {largest} would fit; training.tokens_per_microbatch is {budget:,}",
        f"speed       {plan.tokens_per_s:,.0f} tokens/s, {plan.hours:,.2f} hours "
        f"for {plan.config.training.num_steps} steps",
        f"busy        {', '.join([f'students {shown.student_busy:.0%}', *busy])}",
        f"bottleneck  {plan.bottleneck}",
    ]


def _left_out(config: RunConfig) -> list[str]:
    """Options of the run that would change figures, and that a plan does not know."""
    student = config.student
    chosen = {
        "student.replicate": student.replicate > 1,
        "student.activation_checkpointing=selective": student.activation_checkpointing == "selective",
        "student.cpu_offload": student.cpu_offload,
        "student.compile": student.compile,
        "student.vocab_parallel": student.vocab_parallel,
        "student.lora": student.lora.rank > 0,
        "algorithm.grad_filter_eps": config.algorithm.grad_filter_eps > 0,
    }
    return [option for option, there in chosen.items() if there]


def _model(shape: ModelShape) -> str:
    tied = "tied" if shape.tied else "untied"
    return f"{shape.name}: {shape.num_params / 1e6:,.0f} million parameters, {shape.num_layers} layers, {tied} head"


def _memory_table(title: str, memory: Memory) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for part, num_bytes in memory.parts.items():
        if num_bytes:
            table.add_row(part, f"{num_bytes / MIB:,.1f}")
    table.add_section()
    table.add_row("peak", f"{memory.total / MIB:,.1f}", style="bold")
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title="time of a step, each part alone on its device", title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    for part, seconds in plan.step_s.items():
        table.add_row(part, f"{seconds * 1e3:,.2f}")
    table.add_section()
    steps = plan.outcome.step_seconds
    table.add_row("step, as simulated", f"{1e3 * sum(steps) / len(steps):,.2f}", style="bold")
    return table
