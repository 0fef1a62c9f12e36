"""What a trained model does at each keep rate, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.models import ComposerModel
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pss_composer.checkpoints import LATEST, load_checkpoint
from pss_composer.errors import InputError
from pss_composer.training.run_folder import RECIPE_FILE
from pss_composer.sampling import PatchSampler
from pss_composer.training.recipe import Recipe
from pss_composer.surgery import apply_patch_sampling
from pss_composer.training.trainer import build_data, build_model, build_sampler

KEEP_RATES = (1.0, 0.8, 0.6, 0.4, 0.2)


@dataclass
class Run:
    """A finished run, read from its folder: the recipe, the trained model with a sampler in it, the sampler."""

    name: str
    folder: Path
    recipe: Recipe
    model: ComposerModel
    patch_sampler: PatchSampler


def load_run(folder: str | Path) -> Run:
    """Read a run's recipe and its last checkpoint.

    Raises:
        InputError: No run in this folder, or one without a whole checkpoint of its model.
    """
    folder = Path(folder)
    for name in (RECIPE_FILE, LATEST):
        if not (folder / name).exists():
            raise InputError(f"run must be the save_folder of a trained recipe, no {name} in {folder}")
    try:
        settings = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(folder / RECIPE_FILE))
        recipe = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise InputError(f"run must hold a recipe of this version, {folder / RECIPE_FILE} is none: "
                         f"{str(error).splitlines()[0]}") from error
    model = build_model(recipe.model)
    patch_sampler = apply_patch_sampling(model, sampler=build_sampler(recipe.pss) if recipe.pss else "magnitude")
    load_checkpoint(model, folder / LATEST)
    return Run(recipe.run_name, folder, recipe, model, patch_sampler)


def evaluate(
    model: ComposerModel, patch_sampler: PatchSampler, data: DataSpec, keep_rates: Sequence[float] = KEEP_RATES
) -> dict[float, dict[str, float]]:
    """A model's metrics at each keep rate; its `eval_keep_rate` afterwards is what it was.

    Args:
        model: A model with a sampler in it.
        patch_sampler: That sampler.
        data: Evaluation data.
        keep_rates: Shares of the tokens to keep, each in (0, 1].

    Returns:
        Keep rate -> metric name -> value.
    """
    # Composer asks for an optimizer also where nothing is trained
    trainer = Trainer(model=model, optimizers=torch.optim.SGD(model.parameters()), progress_bar=False)
    before = patch_sampler.eval_keep_rate
    metrics = {}
    for keep_rate in keep_rates:
        patch_sampler.eval_keep_rate = keep_rate
        # Composer wants a label of its own for every evaluation
        trainer.eval(Evaluator(label=f"keep_rate_{keep_rate}", dataloader=data))
        metrics[keep_rate] = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    patch_sampler.eval_keep_rate = before
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
        run.patch_sampler.eval_keep_rate = keep_rate
        flops[keep_rate] = count_flops(vit, images)
    run.patch_sampler.eval_keep_rate = 1.0
    return {keep_rate: flops[keep_rate] / flops[1.0] for keep_rate in keep_rates}
