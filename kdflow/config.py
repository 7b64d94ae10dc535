"""The configuration of a run: frozen dataclasses, each default in one place.

config_file.py reads it from a YAML file and dotted overrides; nothing changes it afterwards. Every option, its text in
`--help` and its limits stand here and nowhere else, which is why the file is a long one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kdflow.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

# Of a ring, as csrc/include/kdflow/layout.hpp has it; `requests NAME` has the slots of all ranks.
_MAX_SLOTS = 2**16
_MAX_NAME_BYTES = 47 - len("requests ")


@dataclass(frozen=True)
class TeacherConfig:
    """The model whose last hidden states are handed over.

    Args:
        model: Local folder or hub id; algorithms that learn from text alone (sft) and backend base need none.
        backend: Engine that prefills: a registered name. Or base: the student's own frozen base, without its adapters
            and without a process of its own (self-distillation; needs student.lora).
        dtype: Of weights and hidden states; auto is bfloat16 where the device computes in it, else float32.
        device: Where the teacher runs; auto takes a GPU if there is one.
        num_workers: Teacher processes; they share the requests.
        num_threads: CPU threads of each worker; 0 divides the cores among the workers.
        tp_size: GPUs that share each worker's weights (tensor parallelism); backend sglang alone has it.
        engine_args: Further options of the engine, by its own names, such as mem_fraction_static of sglang.
        max_restarts: How often a worker whose process was killed, or whose engine died, is started again.
        check_every: Microbatches of a worker between probes that it is still the same teacher; 0 probes at the start
            alone.
    """

    model: str = ""
    backend: str = "hf"
    dtype: Dtype = "auto"
    device: Device = "auto"
    num_workers: int = 1
    num_threads: int = 0
    tp_size: int = 1
    engine_args: dict[str, Any] = field(default_factory=dict)
    max_restarts: int = 2
    check_every: int = 0

    @property
    def is_base(self) -> bool:
        """Whether the student computes the teacher's hidden states itself."""
        return self.backend == "base"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen student, through peft.

    Args:
        rank: Of the adapters; 0 trains all weights instead.
        alpha: Adapters count alpha / rank times.
        dropout: Of what goes into them.
        target_modules: Names of the layers that get one; none is every linear layer but the head.
        quantization: Of the frozen base: nf4 (QLoRA) needs bitsandbytes and a single rank; none keeps it in
            compute_dtype.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    quantization: Literal["none", "nf4"] = "none"


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained, under FSDP2; docs/student.md says more.

    Args:
        model: Local folder or hub id; its weights are where training starts.
        compute_dtype: Of forward and backward; master weights, gradient reduction and optimizer state are float32.
        device: Where the student trains; auto takes GPUs if there are any.
        num_ranks: Processes that share the student (one a GPU).
        num_threads: CPU threads of each rank; 0 divides the cores among the ranks.
        replicate: Replicas of the student, each sharded over num_ranks / replicate ranks (HSDP).
        activation_checkpointing: What backward recomputes instead of keeping it: none of a layer, all of it (full), or
            what lies between its matrix products and attention (selective).
        cpu_offload: Weights, gradients and optimizer state stay in host memory, and the optimizer steps there.
        compile: torch.compile for each layer.
        router_aux_loss_coef: Weight of the load-balancing loss of a student with experts; "model" takes that of its
            config, 0 leaves the loss out.
        context_parallel: Ranks that share each microbatch, cut along its tokens; attention gathers keys and values.
        vocab_parallel: Each rank has its own tokens of both heads, and never a whole one; loss rows are gathered.
        lora: Adapters on a frozen student in place of training all of it.
    """

    model: str
    compute_dtype: Dtype = "auto"
    device: Device = "auto"
    num_ranks: int = 1
    num_threads: int = 0
    replicate: int = 1
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    cpu_offload: bool = False
    compile: bool = False
    router_aux_loss_coef: float | Literal["model"] = 0.0
    context_parallel: int = 1
    vocab_parallel: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def num_data_ranks(self) -> int:
        """Of ranks that share their microbatches one each."""
        return self.num_ranks // max(1, self.context_parallel)


@dataclass(frozen=True)
class DataSource:
    """One of several sources that are mixed.

    Args:
        source: As `data.train`.
        weight: Its part of the samples drawn is weight / sum of weights. A source that comes to its end goes on in its
            next epoch, in a new order.
        teacher: Which of `teachers` its samples learn from, where their rows do not say it.
    """

    source: str
    weight: float = 1.0
    teacher: str = ""


@dataclass(frozen=True)
class DataConfig:
    """Conversations: rows with a `messages` list of `role` and `content`; docs/data.md says more.

    Args:
        train: A .jsonl, .jsonl.gz, .json or .parquet file, a folder of them or one written by `datasets`, a hub id
            (`id:split`), or `module.py:function` that returns an iterable of rows. Several are a list of
            {source, weight, teacher}.
        eval: Held-out rows in the same forms; without it, `num_eval_samples` are taken from `train`.
        num_eval_samples: How many samples are held out and evaluated.
        max_length: Longest sample in tokens, on either side.
        long_samples: For longer ones: truncate drops the oldest tokens of the prompt, and then the end of the answer;
            skip drops the sample; split makes several samples of it, each of which sees its own tokens alone.
        loss_roles: Whose turns enter the loss.
        loss_turns: Of these turns: all, or the last one alone.
        teacher_context: A system prompt for the teacher alone, before the row's own. The columns `teacher_system` and
            `teacher_messages` (the whole conversation as the teacher reads it) of a row go before it.
        teacher_column: Name of a column that says which of `teachers` a row is for.
        cache_dir: Where tokenised sources are kept; none is $XDG_CACHE_HOME/kdflow/tokens or ~/.cache/kdflow/tokens.
    """

    train: list[DataSource | str] | str
    eval: list[DataSource | str] | str | None = None
    num_eval_samples: int = 16
    max_length: int = 1024
    long_samples: Literal["truncate", "skip", "split"] = "truncate"
    loss_roles: list[str] = field(default_factory=lambda: ["assistant"])
    loss_turns: Literal["all", "last"] = "all"
    teacher_context: str | None = None
    teacher_column: str | None = None
    cache_dir: str | None = None

    def train_sources(self) -> list[DataSource]:
        """`train` as a list, whichever way it was given."""
        return _sources(self.train)

    def eval_sources(self) -> list[DataSource]:
        """`eval` in the same way; empty where held-out samples are taken from `train`."""
        return [] if self.eval is None else _sources(self.eval)


def _sources(given: list[DataSource | str] | str) -> list[DataSource]:
    items = [given] if isinstance(given, str) else given
    return [DataSource(item) if isinstance(item, str) else item for item in items]


@dataclass(frozen=True)
class AlgorithmConfig:
    """What the student learns from the teacher.

    Args:
        name: A registered algorithm.
        divergence: A divergence of kdflow_kernels.
        divergence_args: Its parameters, such as `beta` of jsd.
        temperature: Divides both sides' logits in the distillation term.
        kd_weight: Weight of the distillation term.
        ce_weight: Weight of the cross-entropy with the data's own tokens.
        grad_filter_eps: Columns whose gradient stays below it are left out of the backward GEMMs; 0 is exact.
        chunk_size: Rows whose teacher logits are held at once; none chooses by size.
    """

    name: str = "vanilla"
    divergence: str = "forward_kl"
    divergence_args: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    grad_filter_eps: float = 0.0
    chunk_size: int | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a schedule.

    Args:
        learning_rate: At its highest.
        schedule: After the warm-up: cosine and linear fall to the floor over all steps, constant does not fall, and wsd
            (warm-up, stable, decay) falls linearly over the last ones.
        warmup_steps: Steps of linear warm-up.
        min_lr_ratio: The floor, as a part of learning_rate.
        decay_ratio: Part of the steps over which wsd falls.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Decoupled; on matrices only.
        max_grad_norm: Gradients are clipped to this norm.
    """

    learning_rate: float = 1e-5
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    decay_ratio: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, batches and what happens between them.

    Args:
        num_steps: Optimizer steps; epochs follow one another until they are done.
        samples_per_step: Samples of one optimizer step, over all ranks.
        tokens_per_microbatch: Most tokens that one rank takes at a time; at least data.max_length.
        eval_every: Steps between evaluations; 0 evaluates before the first and after the last step alone.
        save_every: Steps between checkpoints; 0 saves after the last step alone. Training goes on while one is written;
            one that cannot be written is told of and the earlier ones stay, but the last must be (docs/checkpoints.md).
        keep_last: Newest checkpoints that are kept; an older one goes once the next is whole.
        keep_best: Save after each evaluation that is the best so far, and keep that checkpoint, too; the best has the
            lowest KL with the teacher, or without a teacher the lowest cross-entropy.
        max_skipped_steps: How many steps of the run may have a loss or gradient that is not finite. Such a step moves
            neither weights nor optimizer; the next one beyond stops the run with the ids of its samples.
        log_every: Steps between lines of metrics.
    """

    num_steps: int = 100
    samples_per_step: int = 8
    tokens_per_microbatch: int = 2048
    eval_every: int = 0
    save_every: int = 0
    keep_last: int = 1
    keep_best: bool = False
    max_skipped_steps: int = 3
    log_every: int = 1


@dataclass(frozen=True)
class TransportConfig:
    """The ring between teacher and student.

    Args:
        schedule: overlap has teachers prefill ahead while the student trains; colocate has them take turns at one GPU:
            teachers prefill as many whole steps as num_slots microbatches hold, then sleep and leave their memory to
            the student (docs/teachers.md).
        num_slots: Microbatches in flight of each rank: how far teachers may run ahead, or what one turn holds.
        timeout_s: Longest wait for the other side, seconds.
        start_timeout_s: Longest wait for a teacher to load, seconds.
        checksum: Check each record with crc32c; host slots alone have it.
        placement: Where slots lie: device is the memory of the student's GPU, pinned is host memory that GPUs copy from
            and to by themselves; auto takes what the GPUs of both sides can reach.
    """

    schedule: Literal["overlap", "colocate"] = "overlap"
    num_slots: int = 4
    timeout_s: float = 300.0
    start_timeout_s: float = 600.0
    checksum: bool = False
    placement: Literal["auto", "host", "pinned", "device"] = "auto"


@dataclass(frozen=True)
class ProfileConfig:
    """What a run records of its own time, in `profile/` of its folder; each of them adds NVTX ranges on GPUs.

    Args:
        timeline: Write timeline.json: what teachers, rings and students did when, to be opened in ui.perfetto.dev.
        num_steps: Steps of each student, and as many prefills of each teacher, that torch.profiler records with all
            operators and kernels; 0 for none.
        first_step: The first of them.
    """

    timeline: bool = False
    num_steps: int = 0
    first_step: int = 3


@dataclass(frozen=True)
class ObserveConfig:
    """Where metrics go besides metrics.jsonl and TensorBoard.

    Args:
        wandb_project: Project of Weights & Biases; none leaves it out. Needs pip install 'kdflow[wandb]'.
        wandb_name: Of the run there; none is the name of output_dir.
    """

    wandb_project: str | None = None
    wandb_name: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One distillation run.

    Args:
        output_dir: Folder of checkpoints, metrics, logs and the exported model.
        teacher: The model that is distilled, where it is one.
        teachers: Several models by name, each with the options of `teacher`; the data says which sample learns from
            which of them (docs/teachers.md).
        student: The model that is trained.
        data: What both read.
        algorithm: The loss.
        optimizer: How weights move.
        training: Steps and batches.
        transport: The ring between the processes.
        profile: Timeline and profiles of the run.
        observe: Where else metrics go.
        seed: Of data order and dropout.
        resume: Go on from the newest checkpoint in output_dir; auto does where a run is there, and else starts one, so
            that a job which is queued again needs no other command.
        overwrite: Delete an earlier run in output_dir.
    """

    output_dir: str
    student: StudentConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    seed: int = 0
    resume: bool | Literal["auto"] = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check("output_dir", repr(self.output_dir), bool(self.output_dir), "a folder")
        at_least = {
            "student.num_ranks": 1,
            "student.num_threads": 0,
            "student.replicate": 1,
            "student.context_parallel": 1,
            "student.lora.rank": 0,
            "student.router_aux_loss_coef": 0.0,
            "data.num_eval_samples": 0,
            "data.max_length": 2,
            "training.num_steps": 0,
            "training.samples_per_step": self.student.num_data_ranks,
            "training.tokens_per_microbatch": self.data.max_length,
            "training.eval_every": 0,
            "training.save_every": 0,
            "training.keep_last": 1,
            "training.max_skipped_steps": 0,
            "training.log_every": 1,
            "transport.num_slots": 1,
            "profile.num_steps": 0,
            "profile.first_step": 1,
            "optimizer.warmup_steps": 0,
            "optimizer.eps": 0.0,
            "optimizer.weight_decay": 0.0,
            "algorithm.kd_weight": 0.0,
            "algorithm.ce_weight": 0.0,
            "algorithm.grad_filter_eps": 0.0,
            "algorithm.chunk_size": 1,
            "seed": 0,
        }
        above_zero = (
            "optimizer.learning_rate",
            "optimizer.max_grad_norm",
            "algorithm.temperature",
            "transport.timeout_s",
            "transport.start_timeout_s",
        )
        for name, low in at_least.items():
            value = _get(self, name)  # of some, none or a name stands for a choice by kdflow
            _check(name, value, not isinstance(value, int | float) or value >= low, f"at least {low}")
        for name in above_zero:
            _check(name, value := _get(self, name), 0 < value < math.inf, "more than 0")
        for name in ("optimizer.min_lr_ratio", "optimizer.decay_ratio", "student.lora.dropout"):
            _check(name, part := _get(self, name), 0 <= part <= 1, "between 0 and 1")
        betas = self.optimizer.betas
        _check("optimizer.betas", betas, all(0 <= beta < 1 for beta in betas), "two of at least 0 and below 1")
        _check("seed", self.seed, self.seed < 2**63, "less than 2^63")
        ranks, replicas = self.student.num_ranks, self.student.replicate
        _check("student.replicate", replicas, ranks % replicas == 0, f"a divisor of the {ranks} ranks")
        size = self.student.context_parallel
        _check("student.context_parallel", size, ranks % size == 0, f"a divisor of the {ranks} ranks")
        slots, most = self.transport.num_slots, _MAX_SLOTS // self.student.num_data_ranks
        _check("transport.num_slots", slots, slots <= most, f"at most {most}")
        _check_data(self.data)
        _check_teachers(self)
        if self.training.keep_best and self.data.num_eval_samples == 0:
            raise ConfigError(
                "training.keep_best: the best is found by evaluations, and data.num_eval_samples is 0; hold samples out"
            )
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other: give one of them")

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """All teachers, whichever way they were given; the name of a single `teacher` is empty."""
        return self.teachers or {"": self.teacher}


def teacher_option(name: str) -> str:
    """Where the config has this teacher."""
    return f"teachers.{name}" if name else "teacher"


def named(what: str, name: str) -> str:
    """`teacher math`, or `teacher` alone where it has no name."""
    return f"{what} {name}".strip()


def _get(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {value}")


def _check_teachers(config: RunConfig) -> None:
    if config.teachers and config.teacher != TeacherConfig():
        raise ConfigError("teacher and teachers exclude each other: give one teacher, or each of several its options")
    at_least = {"num_workers": 1, "num_threads": 0, "tp_size": 1, "max_restarts": 0, "check_every": 0}
    for name, teacher in config.named_teachers().items():
        if not re.fullmatch(r"[\w-]*", name):
            raise ConfigError(f"teachers: expected names of letters, digits, _ and -, got {name!r}")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"teachers: expected names of at most {_MAX_NAME_BYTES} bytes, got {name}")
        if config.teachers and teacher.is_base:
            raise ConfigError(f"teachers.{name}.backend: base is not one of several teachers; give it as `teacher`")
        if config.teachers and not teacher.model:
            raise ConfigError(f"teachers.{name}.model: expected a folder or hub id, got nothing")
        for option, low in at_least.items():
            value = getattr(teacher, option)
            _check(f"{teacher_option(name)}.{option}", value, value >= low, f"at least {low}")
    if config.teacher.is_base:
        _check_base(config.teacher, config.student)
    if config.transport.schedule == "colocate" and config.student.context_parallel > 1:
        raise ConfigError(
            "transport.schedule: colocate needs every rank to ask teachers, and of those that share a microbatch "
            "(student.context_parallel) one asks; use overlap, or context_parallel 1"
        )


def _check_base(teacher: TeacherConfig, student: StudentConfig) -> None:
    where = "teacher.backend base:"
    _check(f"{where} student.lora.rank", student.lora.rank, student.lora.rank > 0, "more than 0")
    same = teacher.model in ("", student.model)
    _check(f"{where} teacher.model", teacher.model, same, "nothing, as the teacher is student.model")
    cut = student.context_parallel > 1 or student.vocab_parallel
    _check(f"{where} context_parallel or vocab_parallel of the student", cut, not cut, "neither")


def _check_data(data: DataConfig) -> None:
    _check_sources("data.train", data.train, data.train_sources())
    if data.eval is not None:
        _check_sources("data.eval", data.eval, data.eval_sources())
    _check("data.loss_roles", data.loss_roles, bool(data.loss_roles), "at least one role, such as assistant")
    if data.long_samples == "split" and data.teacher_context is not None:
        raise ConfigError(
            "data.long_samples: split cuts a conversation into pieces, of which only the first would have "
            "data.teacher_context: use truncate or skip"
        )


def _check_sources(option: str, given: object, sources: Sequence[DataSource]) -> None:
    if not sources or any(not item.source or item.source.startswith(("[", "{")) for item in sources):
        raise ConfigError(f"{option}: expected a source or a list of {{source, weight}}, got {given!r}")
    for item in sources:
        _check(f"{option}: weight of {item.source}", item.weight, 0 < item.weight < math.inf, "more than 0")
    names = [item.source for item in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{option}: {twice[0]} is there twice: give it once, with the sum of the weights")
