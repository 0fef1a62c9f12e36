"""From the groups of a recipe to what Composer's Trainer takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from composer.algorithms import GradientClipping, LabelSmoothing
from composer.core import Algorithm, DataSpec
from composer.models import ComposerModel
from composer.utils import FSDP2Config, FSDPConfig, dist

from pss_composer.algorithm import PatchSamplingSchedule
from pss_composer.checks import name_keys
from pss_composer.data.dataspec import build_dataspec
from pss_composer.errors import InputError
from pss_composer.models.deit import DeiT
from pss_composer.models.simmim import SimMIMClassifier
from pss_composer.pretraining.masking import PatchMasking
from pss_composer.pretraining.simmim import SimMIM, build_encoder
from pss_composer.pretraining.stratified import StratifiedSampler
from pss_composer.training.ema import EMA
from pss_composer.training.mixing import MixUpCutMix
from pss_composer.training.recipe import ModelSettings, PSSSettings, Recipe


def build_model(settings: ModelSettings) -> ComposerModel:
    """The model of a recipe, with its initial weights."""
    if settings.name == "simmim_pretrain":
        return SimMIM(build_encoder(settings))
    if settings.name == "simmim":
        return SimMIMClassifier(settings)
    return DeiT(
        settings, is_distilled=settings.is_distilled, relative_position_bias=settings.relative_position_bias
    )


def build_sampler(settings: PSSSettings) -> str | StratifiedSampler:
    """The sampler of a recipe, in a form that `apply_patch_sampling` takes."""
    return StratifiedSampler(settings.masked_share) if settings.sampler == "stratified" else settings.sampler


def build_algorithms(recipe: Recipe) -> list[Algorithm]:
    """PSS and the algorithms that a recipe combines it with."""
    algorithms: list[Algorithm] = []
    if recipe.pss is not None:
        algorithms.append(PatchSamplingSchedule(
            recipe.pss.built_schedule,
            sampler=build_sampler(recipe.pss),
            eval_keep_rate=recipe.pss.eval_keep_rate,
        ))
    if recipe.masking is not None:
        algorithms.append(PatchMasking(**asdict(recipe.masking)))
    if recipe.mixing is not None:
        algorithms.append(MixUpCutMix(recipe.model.num_classes, **asdict(recipe.mixing)))
    if recipe.label_smoothing:
        algorithms.append(LabelSmoothing(recipe.label_smoothing))
    if recipe.gradient_clipping is not None:
        algorithms.append(GradientClipping("norm", recipe.gradient_clipping))
    if recipe.ema is not None:
        algorithms.append(EMA(half_life=None, **asdict(recipe.ema)))
    return algorithms


def build_parallelism(recipe: Recipe) -> dict[str, Any] | None:
    """Composer's `parallelism_config`; None is DDP."""
    if recipe.parallelism == "ddp":
        return None
    # Composer takes FSDP1 and FSDP2 under the same key, and tells them apart by the class of the configuration
    if recipe.parallelism == "fsdp2":
        # "full" saves whole weights in one file, as DDP does: a ViT is small, and timm alone can read that file
        return {"fsdp": FSDP2Config(
            activation_checkpointing=recipe.activation_checkpointing, state_dict_type="full"
        )}
    return {"fsdp": FSDPConfig(
        activation_checkpointing=recipe.activation_checkpointing, activation_checkpointing_reentrant=False
    )}


def build_data(recipe: Recipe, split: str, device: str = "cpu") -> DataSpec:
    """The images of a split in batches; each rank has its share of the global batch.

    Args:
        recipe: The recipe.
        split: `train` or `val`.
        device: Where the Trainer gets the batches, in torch's words: `cpu` or `cuda`.

    Raises:
        InputError: A data setting that breaks a rule, or data that is not there.
    """
    key = "train_batch_size" if split == "train" else "eval_batch_size"
    batch_size, world_size = getattr(recipe, key), dist.get_world_size()
    if batch_size % world_size:
        raise InputError(f"must be divisible by the number of processes ({world_size}), got {batch_size}", key=key)
    with name_keys(lambda argument: key if argument == "batch_size" else name_data_key(argument)):
        return build_dataspec(
            recipe.data,
            recipe.augmentation,
            split=split,
            batch_size=batch_size // world_size,
            image_size=recipe.model.image_size,
            num_classes=None if recipe.masking is not None else recipe.model.num_classes,
            seed=recipe.seed,
            device=device,
        )


def name_data_key(argument: str) -> str:
    """The recipe's key for an argument or setting of `data`."""
    return f"model.{argument}" if argument in ("num_classes", "image_size") else f"data.{argument}"
