"""A recipe's optimizer and learning rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import State
from composer.models import ComposerModel
from composer.optim import (
    ComposerScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearScheduler,
    MultiStepScheduler,
)
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from pss_composer.progress import parse_time
from pss_composer.training.recipe import OptimizerSettings, SchedulerSettings


def build_optimizer(model: ComposerModel, settings: OptimizerSettings, batch_size: int) -> torch.optim.AdamW:
    """AdamW over timm's parameter groups.

    Args:
        model: One of `models`.
        settings: A recipe's `optimizer`.
        batch_size: The global one, for the linear scaling of the learning rate.
    """
    # who knows what is exempt: the model itself, or a timm ViT in it
    module: Any = model if hasattr(model, "no_weight_decay") else model.module
    lr = settings.lr * batch_size / (settings.lr_batch_size or batch_size)
    exempt = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
    if settings.layer_decay is None:
        groups = param_groups_weight_decay(module, settings.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(
            module, settings.weight_decay, no_weight_decay_list=exempt, layer_decay=settings.layer_decay
        )
        for group in groups:
            # only timm's own schedulers read lr_scale; Composer's multiply each group's lr
            group["lr"] = lr * group.pop("lr_scale")
    return torch.optim.AdamW(groups, lr=lr, betas=(settings.betas[0], settings.betas[1]), eps=settings.eps)


def build_scheduler(settings: SchedulerSettings) -> ComposerScheduler:
    """A linear warm-up that may start above 0, then Composer's cosine or multi-step schedule."""
    has_warmup = parse_time(settings.warmup)[0] > 0
    after_warmup: ComposerScheduler
    if settings.name == "multistep":
        after_warmup = MultiStepScheduler(milestones=[*settings.milestones], gamma=settings.gamma)
    elif has_warmup:
        after_warmup = CosineAnnealingWithWarmupScheduler(t_warmup=settings.warmup, alpha_f=settings.alpha_f)
    else:
        after_warmup = CosineAnnealingScheduler(alpha_f=settings.alpha_f)
    if not has_warmup:
        return after_warmup
    warmup = LinearScheduler(alpha_i=settings.alpha_i, alpha_f=1.0, t_max=settings.warmup)

    def schedule(state: State, ssr: float = 1.0) -> float:
        multiplier = warmup(state)  # of the learning rate
        return multiplier if multiplier < 1.0 else after_warmup(state, ssr)

    return schedule
