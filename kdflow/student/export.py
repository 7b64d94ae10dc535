"""Writes the student as a Hugging Face folder: from training, or from a checkpoint on disk."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, GenerationConfig

from kdflow.config import StudentConfig
from kdflow.errors import CheckpointError
from kdflow.modeling import (
    check_free,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    resolve_model,
    written_aside,
)
from kdflow.student.checkpoint_folder import DISK_TIMEOUT
from kdflow.student.fsdp2 import FSDP2Student
from kdflow.student.lora import (
    add_lora,
    check_quantization,
    dequantized_weights,
    has_lora,
    lora_scaling,
    merge_lora,
    quantization_options,
    save_adapter,
)

# Of a weight in a checkpoint: the part of the state, then the model's place in the student's module.
_PREFIX = "model.model."


def export_model(student: FSDP2Student, tokenizer: Any, folder: Path) -> None:
    """Safetensors in bfloat16, config, generation config, tokenizer and chat template.

    Adapters are merged into their base, and lie in `adapter` besides. Every rank calls it; rank 0 writes. What the
    folder held before is replaced once the new model is whole.

    Args:
        folder: in that of a run, whose last checkpoint is on disk.

    Raises:
        CheckpointError: on every rank, it could not be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(student.model, options=options)
    group = dist.new_group(backend="gloo", timeout=DISK_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    failure = None
    if dist.get_rank() == 0:
        tensors = {n: w for n, w in weights.items() if isinstance(w, torch.Tensor)}
        try:
            with written_aside(folder, replace=True) as aside:
                _write_student(student, tensors, tokenizer, aside)
        except CheckpointError as error:
            failure = str(error)
    outcomes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, failure, group=group)
    if outcomes[0] is not None:
        raise CheckpointError(
            f"{outcomes[0]}; the checkpoint of the last step is there: make room, and `kdflow export {folder.parent}` "
            "writes the model"
        )


def _write_student(student: FSDP2Student, tensors: dict[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
    tensors |= dequantized_weights(student.model)
    if has_lora(student.model):
        save_adapter(student.model, tensors, folder / "adapter")
        tensors = merge_lora(tensors, lora_scaling(student.model))
    tensors = {n: w.to(torch.bfloat16) for n, w in tensors.items()}
    config = copy.deepcopy(student.model.config)
    if hasattr(config, "quantization_config"):  # what is written is whole
        del config.quantization_config
    _write(_shell(config), student.model.generation_config, tensors, tokenizer, folder)


def export_checkpoint(checkpoint: Path, student: StudentConfig, folder: Path) -> None:
    """The same from a checkpoint, by one process that needs no GPU. Adapters are merged, and not written besides.

    It holds the weights in bfloat16 once; with adapters in float32.

    Args:
        student: of the run. The model that it started from must still be there, for its config and tokenizer.

    Raises:
        CheckpointError: the checkpoint cannot be read or is of another student, or `folder` holds something or cannot
            be written; then nothing is left of it.
        ConfigError: no such model, or no bitsandbytes for one with a 4-bit base.
    """
    check_free(folder)
    model, lora = student.model, student.lora
    config, tokenizer = load_model_config(model), load_tokenizer(model)
    try:
        generation = GenerationConfig.from_pretrained(resolve_model(model))
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    weights = read_weights(checkpoint, torch.float32 if lora.rank else torch.bfloat16)
    if lora.quantization != "none":
        weights |= _quantized_base(student)
    _check_rank(checkpoint, weights, lora.rank)
    if lora.rank:
        weights = {n: w.to(torch.bfloat16) for n, w in merge_lora(weights, lora.alpha / lora.rank).items()}
    shell = _shell(config)
    _check_names(checkpoint, weights, shell, model)
    with written_aside(folder) as aside:
        _write(shell, generation, weights, tokenizer, aside)


def _quantized_base(student: StudentConfig) -> dict[str, torch.Tensor]:
    """The 4-bit weights that a checkpoint has none of, in float32."""
    device = torch.device("cpu")
    check_quantization(student, device, num_ranks=1)
    options = quantization_options(student, device, torch.bfloat16)
    model = load_causal_lm(student.model, torch.float32, **options)
    add_lora(model, student, torch.float32)  # for the names: adapted layers have their base below them
    return dequantized_weights(model)


def read_weights(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint by their names in transformers, whole and in host memory.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        found = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(item.size, dtype=dtype)
            for name, item in found.items()
            if name.startswith(_PREFIX) and isinstance(item, TensorStorageMetadata)
        }
        with warnings.catch_warnings():  # one process is what is wanted
            warnings.simplefilter("ignore")
            dcp_loader.load(state, checkpoint_id=checkpoint, no_dist=True)
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error}") from None
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def _check_rank(checkpoint: Path, weights: Mapping[str, torch.Tensor], rank: int) -> None:
    """The number of adapters' rows is their rank."""
    found = max((len(weight) for name, weight in weights.items() if ".lora_A." in name), default=0)
    if found != rank:
        raise CheckpointError(
            f"{checkpoint}: expected adapters of rank {rank} (student.lora.rank of the run's config), got {found}; "
            "give the config the student that it was written with"
        )


def _check_names(checkpoint: Path, weights: Mapping[str, torch.Tensor], shell: Any, model: str) -> None:
    expected = {name: weight.shape for name, weight in shell.state_dict().items()}
    missing = [name for name, _ in shell.named_parameters() if name not in weights]
    others = [name for name, weight in weights.items() if expected.get(name) != weight.shape]
    if missing or others:
        raise CheckpointError(
            f"{checkpoint}: expected the weights of {model}, got {len(others)} others {others[:2]}, and "
            f"{len(missing)} are missing {missing[:2]}; give student.model the model that the run started from"
        )


def _shell(config: Any) -> Any:
    """Carries config and names; the weights come from the state."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _write(
    shell: Any, generation_config: Any, weights: Mapping[str, torch.Tensor], tokenizer: Any, folder: Path
) -> None:
    shell.generation_config = generation_config
    shell.save_pretrained(folder, state_dict=dict(weights))
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # so the tokenizers library tells of a full disk
            raise OSError(str(error)) from None
        raise
