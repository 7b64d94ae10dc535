"""The load-balancing loss of a student with experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdflow.config import StudentConfig
from kdflow.errors import ConfigError


def router_weight(config: StudentConfig, model_config: Any) -> float:
    """What `router_loss` counts in the loss of this student.

    Raises:
        ConfigError: it is wanted of a model without routers, or of a family that balances them in another way.
    """
    if config.router_aux_loss_coef == 0.0:
        return 0.0
    values = model_config.get_text_config().to_dict()
    if values.get("router_aux_loss_coef") is None or not values.get("num_experts_per_tok"):
        raise ConfigError(
            f"student.router_aux_loss_coef: {config.model} ({values['model_type']}) has no load-balancing loss: it has "
            "no experts, or its family balances them in another way; leave the option at 0"
        )
    own = config.router_aux_loss_coef
    return float(values["router_aux_loss_coef"] if own == "model" else own)


def router_loss(router_logits: Sequence[torch.Tensor], num_chosen: int) -> torch.Tensor:
    """num_experts * sum_e f_e P_e over all layers' tokens together: f_e is how often a token went to expert e, P_e its
    mean probability. It is `num_chosen` where both are even. Differentiable in P alone.

    Switch Transformer (https://arxiv.org/abs/2101.03961), equation 4, as transformers computes it.

    Args:
        router_logits: (T, num_experts) of each layer that has experts.
        num_chosen: experts of each token.
    """
    logits = torch.cat(tuple(router_logits)).float()
    chosen = logits.topk(num_chosen, dim=-1).indices.flatten()
    counts = logits.new_zeros(logits.shape[1]).scatter_add_(0, chosen, torch.ones_like(chosen, dtype=logits.dtype))
    return logits.shape[1] * (counts / len(logits) * logits.softmax(-1).mean(0)).sum()
