"""AdamW and the schedule of its learning rate."""

from __future__ import annotations

import math

import torch

from kdflow.config import OptimizerConfig


def adamw(module: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Over the weights that are trained; weight decay on matrices alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def lr_factor(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Learning rate of a step as a part of the highest one."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    num_falling = num_steps - config.warmup_steps
    if config.schedule == "wsd":
        num_falling = min(num_falling, math.ceil(config.decay_ratio * num_steps))
    progress = 1.0 - (num_steps - step) / max(1, num_falling)
    progress = min(1.0, max(0.0, progress))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left
