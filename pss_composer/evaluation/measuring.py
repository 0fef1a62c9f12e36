"""Metrics and FLOPs of a trained model at each keep rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.runs import Run
from pss_composer.sampling import PatchSampler
from pss_composer.training.builders import build_data


def evaluate(
    model: ComposerModel, patch_sampler: PatchSampler, data: DataSpec, keep_rates: Sequence[float] = KEEP_RATES
) -> dict[float, dict[str, float]]:
    """A model's metrics at each keep rate.

    Args:
        model: A model with a sampler in it.
        patch_sampler: That sampler.
        data: Evaluation data.
        keep_rates: Shares of the tokens to keep, each in (0, 1].

    Returns:
        Keep rate -> metric name -> value.
    """
    # Composer needs an optimizer even if nothing is trained
    trainer = Trainer(model=model, optimizers=torch.optim.SGD(model.parameters()), progress_bar=False)
    metrics = {}
    for keep_rate in keep_rates:
        with patch_sampler.evaluating_at(keep_rate):
            # Composer takes each label once
            trainer.eval(Evaluator(label=f"keep_rate_{keep_rate}", dataloader=data))
        metrics[keep_rate] = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    trainer.close()
    return metrics


def evaluate_run(run: Run, keep_rates: Sequence[float] = KEEP_RATES) -> dict[float, dict[str, float]]:
    """`evaluate` on the evaluation data of a classifier's recipe."""
    # on the device that the Trainer of `evaluate` takes
    data = build_data(run.recipe, "val", "cuda" if torch.cuda.is_available() else "cpu")
    metrics = evaluate(run.model, run.patch_sampler, data, keep_rates)
    data.dataloader.close()
    return metrics


def count_flops(model: nn.Module, images: Tensor) -> int:
    """FLOPs of a forward pass over a batch, by torch's counter.

    Args:
        model: Any module that takes images.
        images: (B, 3, H, W).
    """
    # the counter does not know the CPU's fused attention, but it does know the matrix products that it is made of
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def flop_shares(run: Run, keep_rates: Sequence[float] = KEEP_RATES) -> dict[float, float]:
    """Keep rate -> FLOPs of a forward pass as a share of those at ρ = 1."""
    vit, size = run.model.vit.eval(), run.recipe.model.image_size
    images = torch.zeros(1, 3, size, size, device=next(vit.parameters()).device)
    flops = {}
    for keep_rate in {1.0, *keep_rates}:
        with run.patch_sampler.evaluating_at(keep_rate):
            flops[keep_rate] = count_flops(vit, images)
    return {keep_rate: flops[keep_rate] / flops[1.0] for keep_rate in keep_rates}
