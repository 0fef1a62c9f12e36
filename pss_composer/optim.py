"""A recipe's optimizer and learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from composer.core import State, Time
from composer.models import ComposerModel
from composer.optim import CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler, LinearScheduler
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from pss_composer.settings import OptimizerSettings, SchedulerSettings


def build_optimizer(model: ComposerModel, settings: OptimizerSettings, batch_size: int) -> torch.optim.AdamW:
    """AdamW over timm's parameter groups.

    Args:
        model: Its `module` is a timm ViT.
        settings: A recipe's `optimizer`.
        batch_size: The global one, for the linear scaling of the learning rate.
    """
    vit = model.module
    lr = settings.lr * batch_size / (settings.lr_batch_size or batch_size)
    exempt = vit.no_weight_decay()
    if settings.layer_decay is None:
        groups = param_groups_weight_decay(vit, settings.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(
            vit, settings.weight_decay, no_weight_decay_list=exempt, layer_decay=settings.layer_decay
        )
        for group in groups:
            # only timm's own schedulers read lr_scale; Composer's multiply each group's lr
            group["lr"] = lr * group.pop("lr_scale")
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(settings.betas), eps=settings.eps)


def build_scheduler(settings: SchedulerSettings) -> Callable[[State, float], float]:
    """Composer's warm-up and cosine, with a warm-up that may start above 0."""
    if Time.from_timestring(settings.warmup).value == 0:
        return CosineAnnealingScheduler(alpha_f=settings.alpha_f)
    warmup = LinearScheduler(alpha_i=settings.alpha_i, alpha_f=1.0, t_max=settings.warmup)
    warmup_and_cosine = CosineAnnealingWithWarmupScheduler(t_warmup=settings.warmup, alpha_f=settings.alpha_f)

    def schedule(state: State, ssr: float = 1.0) -> float:
        share_of_warmup = warmup(state)
        return share_of_warmup if share_of_warmup < 1.0 else warmup_and_cosine(state, ssr)

    return schedule
