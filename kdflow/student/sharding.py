"""What FSDP2 and its like make of a student's layers: recomputed, compiled, sharded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from kdflow.config import StudentConfig
from kdflow.errors import ConfigError

_WRAPPED = "_checkpoint_wrapped_module."
_ATEN = torch.ops.aten
# Outputs that selective checkpointing keeps: of products and of attention.
_KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._flash_attention_forward.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
}


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The list of a causal LM's layers, wherever its family keeps it.

    Raises:
        ConfigError: there is no list of as many modules as the config has layers.
    """
    number = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number:
            return module
    raise ConfigError(f"student.model: {type(model).__name__} has no list of {number} layers, so it cannot be sharded")


def wrap_layers(layers: torch.nn.ModuleList, config: StudentConfig) -> None:
    """Activation checkpointing and compilation, layer by layer."""
    for index, layer in enumerate(layers):
        if config.compile:  # what hooks and wrappers add around it stays as it is
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if config.activation_checkpointing == "full":
            layer = layers[index] = checkpoint_wrapper(layer)
        elif config.activation_checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _keep_products)
            layer = layers[index] = checkpoint_wrapper(layer, context_fn=contexts)


def _keep_products(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def make_mesh(config: StudentConfig, device: torch.device) -> DeviceMesh:
    """One dimension, or two: replicas of groups that shard."""
    num_ranks, replicas = dist.get_world_size(), config.replicate
    if replicas == 1:
        return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, num_ranks // replicas), mesh_dim_names=("replicate", "shard"))


def shard(
    module: torch.nn.Module,
    layers: torch.nn.ModuleList,
    config: StudentConfig,
    *,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    ignored: Iterable[torch.nn.Parameter] = (),
) -> None:
    """Each layer is a unit, and the root with embeddings, norm, head and loss is one; but for what is ignored."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.cpu_offload else OffloadPolicy()
    for unit in (*layers, module):
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=set(ignored))


@torch.no_grad()
def fill_from_first_rank(
    module: torch.nn.Module, source: torch.nn.Module | None, device: torch.device, *, cpu_offload: bool
) -> None:
    """Gives a sharded module on the meta device the weights and buffers of rank 0's whole one, one tensor at a time.

    Args:
        module: the root of what is sharded.
        source: the same, whole, on rank 0; None elsewhere.
    """
    tied: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
    for owner in module.modules():
        for name, weight in owner.named_parameters(recurse=False):
            tied.setdefault(weight, []).append((owner, name))
    module.to_empty(device="cpu" if cpu_offload else device)  # which parts what was tied
    for (first, name), *others in tied.values():
        for owner, other in others:
            setattr(owner, other, getattr(first, name))
    found = {} if source is None else dict(chain(source.named_parameters(), source.named_buffers()))
    for name, part in chain(module.named_parameters(), module.named_buffers()):
        full = torch.empty(part.shape, dtype=part.dtype, device=device)
        if source is not None:
            full.copy_(found[name.replace(_WRAPPED, "")])
        if isinstance(part, DTensor):
            own = distribute_tensor(full, part.device_mesh, part.placements)
            part.to_local().copy_(own.to_local())
        else:
            dist.broadcast(full, src=0)
            part.data = full
