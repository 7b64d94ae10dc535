"""The student under FSDP2: sharded fp32 master weights, the loss inside the root's forward.

Embeddings, final norm and head belong to the root unit, so its hooks gather the head before
the loss and reduce its gradient after it, tied or untied. Fetching the head from outside
(`full_tensor()`, a unit of its own) loses or unties gradients; see docs/design.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kdflow.algorithms import Algorithm
from kdflow.config import OptimizerConfig, StudentConfig
from kdflow.modeling import (
    empty_causal_lm,
    forward_decoder,
    head_options,
    load_causal_lm,
    map_causal_lm,
    resolve_dtype,
)
from kdflow.student.context_parallel import ContextParallel, StudentInput
from kdflow.student.lora import (
    add_lora,
    check_quantization,
    prepare_quantized,
    quantization_options,
    without_adapters,
    without_weights,
)
from kdflow.student.mixed_precision import LowPrecisionCopies
from kdflow.student.optimizer import adamw, lr_factor
from kdflow.student.router import router_loss, router_weight
from kdflow.student.rows import RowsToDevice, TeacherRows
from kdflow.student.sharding import decoder_layers, fill_from_first_rank, make_mesh, shard, wrap_layers
from kdflow.student.vocab_parallel import VocabShards
from kdflow.types import LMHead, LossRows, Microbatch
from kdflow_kernels import KDLossOutput


class _StudentModule(torch.nn.Module):
    """The FSDP root: causal LM and loss in one forward.

    Ranks may have another teacher each in the same forward: unless heads are cut over ranks, they are plain tensors,
    whole on every rank, and the loss speaks with no other rank.
    """

    def __init__(
        self,
        model: Any,
        algorithms: Mapping[str, Algorithm],
        teacher_heads: Mapping[str, LMHead | None],
        device: torch.device,
        router_weight: float,
        context: ContextParallel | None,
        vocab_shards: VocabShards | None,
    ) -> None:
        super().__init__()
        self.model = model
        self._router_weight = router_weight
        self._algorithms = algorithms
        self._teacher_heads = teacher_heads
        self._device = device
        self._rows_to_device = RowsToDevice(device)
        self._logit_scale, self._softcap = head_options(model.config)
        self._context = context
        self._vocab_shards = vocab_shards

    def forward(
        self,
        microbatch: Microbatch,
        teacher_rows: TeacherRows,
        num_items: float,
        training: bool,
    ) -> KDLossOutput:
        own = StudentInput.whole(microbatch, self._device) if self._context is None else self._context.part(microbatch)
        teacher_head, shards = self._teacher_heads[microbatch.teacher_name], self._vocab_shards
        base_rows = self._base_rows(microbatch.for_teacher()) if teacher_head is None else None
        balances = training and self._router_weight > 0.0
        asked = {"output_router_logits": True} if balances else {}
        hidden, told = self._loss_rows(own, microbatch.sequence_lengths, **asked)
        head = self._head(hidden)
        student = LossRows(hidden, head)
        if teacher_head is None:
            assert base_rows is not None
            teacher = LossRows(base_rows, head)
        else:
            teacher = LossRows(self._received(teacher_rows, microbatch, own, teacher_head.weight), teacher_head)
        # No sum over tokens, so what a rank computes at once counts by its part of the step's loss tokens.
        router_part = self._router_weight * len(own.rows) / num_items
        labels = own.shift_labels
        if shards is not None:
            student, teacher, labels = shards.gather(student, teacher, labels)
            num_items *= shards.num_ranks  # each of them has the loss of all their rows, and reports its part
        algorithm = self._algorithms[microbatch.teacher_name]
        compute = algorithm.loss if training else algorithm.evaluate
        output = compute(student, teacher, labels, num_items=num_items)
        if shards is not None:
            output = output._replace(num_tokens=torch.full_like(output.num_tokens, len(own.rows)))
        if balances:
            num_chosen = self.model.config.get_text_config().num_experts_per_tok
            output = output._replace(loss=output.loss + router_part * router_loss(told.router_logits, num_chosen))
        return output

    def _head(self, hidden: torch.Tensor) -> LMHead:
        """The student's, or this rank's part of it."""
        head = self.model.get_output_embeddings()
        if self._vocab_shards is None:
            return LMHead(head.weight, head.bias, self._logit_scale, self._softcap)
        return self._vocab_shards.student_head(head, hidden, self._logit_scale, self._softcap)

    def _loss_rows(
        self, own: StudentInput, sequence_lengths: Sequence[int], **options: Any
    ) -> tuple[torch.Tensor, Any]:
        """(n, H) hidden states of the rows that enter the loss, and all that the decoder told."""
        told = forward_decoder(
            self.model.base_model, own.input_ids, own.position_ids, sequence_lengths, own.context, **options
        )
        return told.last_hidden_state[0].index_select(0, own.rows), told

    @torch.no_grad()
    def _base_rows(self, microbatch: Microbatch) -> torch.Tensor:
        """Of the frozen base, as a teacher computes them: no adapters, no dropout."""
        training = self.model.training
        self.model.eval()
        with without_adapters(self.model):
            rows, _ = self._loss_rows(StudentInput.whole(microbatch, self._device), microbatch.sequence_lengths)
        self.model.train(training)
        return rows

    def _received(
        self, teacher_rows: TeacherRows, microbatch: Microbatch, own: StudentInput, like: torch.Tensor
    ) -> torch.Tensor:
        """The teacher's rows that belong to this rank's, of the width and dtype of its head's."""
        if self._context is None or own.which is None:
            return self._rows_to_device(teacher_rows)
        received = self._context.teacher_rows(
            lambda: self._rows_to_device(teacher_rows), microbatch.num_loss_tokens, like.shape[1], like.dtype
        )
        return received.index_select(0, own.which)


class FSDP2Student:
    """A causal LM, its optimizer and its schedule, on one rank of a process group.

    Args:
        config: which model and how it computes.
        optimizer: AdamW and its schedule.
        algorithms: the loss with each teacher, by its name.
        teacher_heads: by the same names, in the teacher's dtype; None is the student's frozen base, for
            which nobody is asked for teacher rows. Then it is the one teacher: all ranks compute its rows together.
        device: of this rank.
        num_steps: where the schedule ends.

    Raises:
        ConfigError: no such model, or options that it cannot have.
    """

    def __init__(
        self,
        config: StudentConfig,
        optimizer: OptimizerConfig,
        *,
        algorithms: Mapping[str, Algorithm],
        teacher_heads: Mapping[str, LMHead | None],
        device: torch.device,
        num_steps: int,
    ) -> None:
        self.num_ranks = dist.get_world_size()
        compute_dtype = resolve_dtype(config.compute_dtype, device)
        check_quantization(config, device, self.num_ranks)
        whole = self.num_ranks == 1  # on every rank; otherwise rank 0 alone has it, and the others its shape
        model: Any = _load(config, device, compute_dtype) if whole else _shell(config, compute_dtype)
        source: Any = None if whole or dist.get_rank() > 0 else _source(config, model)
        layers = decoder_layers(model)
        wrap_layers(layers, config)
        mesh = None if whole and not config.cpu_offload else make_mesh(config, device)
        self._vocab_shards = None
        if config.vocab_parallel and mesh is not None and not whole:
            self._vocab_shards = VocabShards(model, mesh, num_teachers=len(teacher_heads))
            teacher_heads = {n: head and self._vocab_shards.teacher_head(head) for n, head in teacher_heads.items()}
        context = None
        if config.context_parallel > 1:
            context = ContextParallel(config.context_parallel, model.config, device)
        teacher_heads = {name: head and head.to(device) for name, head in teacher_heads.items()}
        self.module = _StudentModule(
            model.train(),
            algorithms,
            teacher_heads,
            device,
            router_weight(config, model.config),
            context,
            self._vocab_shards,
        )
        self._copies = None
        if mesh is None:
            # FSDP would have nothing to shard, and copy every weight and gradient several times.
            self._copies = LowPrecisionCopies(self.module.to(device), compute_dtype)
        else:
            ignored = () if self._vocab_shards is None else self._vocab_shards.parameters
            shard(self.module, layers, config, mesh=mesh, compute_dtype=compute_dtype, ignored=ignored)
        if not whole:
            # Weights by their names in the whole module, of which the model is all that has any.
            whole_module = None if source is None else torch.nn.ModuleDict({"model": source})
            fill_from_first_rank(self.module, whole_module, device, cpu_offload=config.cpu_offload)
            if source is not None:
                model.generation_config = source.generation_config
        self._config = optimizer
        self._num_steps = num_steps
        self.optimizer = adamw(self.module, optimizer)

    @property
    def model(self) -> Any:
        """The transformers model, its parameters sharded."""
        return self.module.model

    def forward_backward(
        self,
        microbatch: Microbatch,
        teacher_rows: TeacherRows,
        *,
        num_items: float,
        last: bool,
        release: Callable[[], None] = lambda: None,
    ) -> KDLossOutput:
        """Adds the microbatch's gradient.

        Args:
            teacher_rows: called once the student's own hidden states exist; gives (N, Ht).
            num_items: loss tokens of the whole step, over all ranks and microbatches.
            last: the step's last microbatch; gradients are reduced with it alone.
            release: called between forward and backward: the loss has formed its gradients by then, and the teacher's
                rows are not needed any more.
        """
        if self._copies is None:
            cast(FSDPModule, self.module).set_requires_gradient_sync(last)
        with self._computing():
            # FSDP averages gradients over ranks; the sum over ranks is wanted.
            output = self.module(microbatch, teacher_rows, num_items / self.num_ranks, True)
            release()
            output.loss.backward()
        if last and self._vocab_shards is not None:
            self._vocab_shards.reduce_gradients()
        return output

    def _computing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._copies is None else self._copies.in_place()

    def optimizer_step(
        self, index: int, accept: Callable[[torch.Tensor], bool] = lambda norm: True
    ) -> tuple[torch.Tensor, float]:
        """Clips, updates and clears the gradients.

        Args:
            index: of the step; the learning rate is a function of it alone.
            accept: asked with the gradient norm before anything moves; its no drops the gradients and leaves weights
                and optimizer as they are. Every rank must answer alike.

        Returns:
            The gradient norm before clipping and the learning rate.
        """
        config = self._config
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.max_grad_norm)
        learning_rate = config.learning_rate * lr_factor(index, config, self._num_steps)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if accept(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            if self._copies is not None:
                self._copies.outdate()
        self.optimizer.zero_grad()
        return norm, learning_rate

    @torch.no_grad()
    def evaluate(self, microbatch: Microbatch, teacher_rows: TeacherRows, *, num_items: float) -> KDLossOutput:
        """Sums of KL and cross-entropy over the microbatch's rows, divided by `num_items`."""
        self.module.eval()
        with self._computing():
            output = self.module(microbatch, teacher_rows, num_items, False)
        self.module.train()
        return output


def _load(config: StudentConfig, device: torch.device, compute_dtype: torch.dtype) -> Any:
    options = quantization_options(config, device, compute_dtype)
    model = load_causal_lm(config.model, torch.float32, **options)
    if config.lora.rank:
        add_lora(model, config, compute_dtype)
        prepare_quantized(model)
    return model


def _shell(config: StudentConfig, compute_dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model = empty_causal_lm(config.model, torch.float32)
        if config.lora.rank:
            add_lora(model, config, compute_dtype)
    return model


def _source(config: StudentConfig, shell: Any) -> Any:
    """What the shell is filled from: mapped weights, and adapters as a single rank draws them."""
    model = map_causal_lm(config.model, shell)
    if config.lora.rank:
        with without_weights(model):
            add_lora(model, config, torch.float32)
    return model
