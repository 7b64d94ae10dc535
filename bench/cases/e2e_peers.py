"""The main job as one does it without kdflow: ``python -m bench.cases.e2e_peers NAME PARAMS FOLDER``.

Each writes ``metrics.jsonl`` with one line a step, in the form of ``kdflow train``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from bench.cases.e2e_job import Job, load_job
from kdflow.modeling import load_tokenizer
from kdflow.types import Sample

IGNORE = -100


class Lines:
    def __init__(self, folder: Path):
        self._file = (folder / "metrics.jsonl").open("a")

    def write(self, step: int, loss: float) -> None:
        record = {"kind": "train", "time": time.time(), "step": step, "loss": loss}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def load_models(job: Job) -> tuple[Any, Any]:
    """Teacher in the compute dtype, student in fp32 as for kdflow."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(str(Path(config.model).expanduser()), dtype=dtype)
        for config, dtype in ((job.config.teacher, job.dtype), (job.config.student, torch.float32))
    )
    return teacher.eval(), student.train()


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Padded on the right; labels are the tokens that the assistant said."""
    length = max(len(sample) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for row, sample in enumerate(samples):
        size = len(sample)
        ids, in_loss = torch.from_numpy(sample.input_ids).long(), torch.from_numpy(sample.loss_mask)
        input_ids[row, :size] = ids
        attention_mask[row, :size] = 1
        labels[row, :size][in_loss] = ids[in_loss]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def eager(job: Job, folder: Path) -> None:
    """Full logits of both models, the rows of the loss picked from them, ``kl_div``."""
    teacher, student = load_models(job)
    device = torch.device(job.config.student.device)
    teacher, student = teacher.to(device), student.to(device)
    pad_token_id = load_tokenizer(job.config.student.model).pad_token_id
    options = job.config.optimizer
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=0.0, fused=True
    )
    lines = Lines(folder)
    for step in job.steps:
        total = torch.zeros((), device=device)
        for samples in job.batches_of(step):
            batch = {k: v.to(device) for k, v in collate(samples, pad_token_id).items()}
            rows = batch["labels"][:, 1:] != IGNORE
            model_inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            with torch.no_grad():
                log_p = F.log_softmax(teacher(**model_inputs).logits[:, :-1][rows].float(), dim=-1)
            with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == torch.bfloat16):
                student_logits = student(**model_inputs).logits
            log_q = F.log_softmax(student_logits[:, :-1][rows].float(), dim=-1)
            loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / step.num_loss_tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(student.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lines.write(step.index + 1, total.item())


def trl(job: Job, folder: Path) -> None:
    run_gkd(job, folder, batch_size=job.peer_batch_size or job.config.training.samples_per_step)


def trl_one_by_one(job: Job, folder: Path) -> None:
    run_gkd(job, folder, batch_size=1)


def run_gkd(job: Job, folder: Path, *, batch_size: int) -> None:
    """GKDTrainer with lmbda=0 (off-policy) and beta=0 (forward KL), without its default gradient
    checkpointing, which would only slow it down here. It gets the tokens ready made."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher, student = load_models(job)
    tokenizer = load_tokenizer(job.config.student.model)
    options, device = job.config.optimizer, job.config.student.device
    lines = Lines(folder)

    class Writer(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is not None and "loss" in logs:
                lines.write(state.global_step, float(logs["loss"]))

    def collator(rows: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        return collate([job.samples[row["sample_id"]] for row in rows], tokenizer.pad_token_id)

    ids = [sample.sample_id for step in job.steps for sample in job.samples_of(step)]
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=str(folder / "trl"),
            lmbda=0.0,
            beta=0.0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=job.config.training.samples_per_step // batch_size,
            max_steps=len(job.steps),
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=options.betas[0],
            adam_beta2=options.betas[1],
            weight_decay=0.0,
            max_grad_norm=options.max_grad_norm,
            optim="adamw_torch_fused",
            bf16=job.dtype == torch.bfloat16,
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=collator,
        train_dataset=Dataset.from_dict({"sample_id": ids}),
        processing_class=tokenizer,
        callbacks=[Writer()],
    )
    trainer.train()


PEERS: dict[str, Callable[[Job, Path], None]] = {"eager": eager, "trl": trl, "trl_one_by_one": trl_one_by_one}

if __name__ == "__main__":
    PEERS[sys.argv[1]](load_job(json.loads(sys.argv[2])), Path(sys.argv[3]))
