"""From the groups of a recipe to what Composer's Trainer takes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from composer.algorithms import GradientClipping, LabelSmoothing
from composer.core import Algorithm, DataSpec
from composer.models import ComposerModel
from composer.utils import FSDP2Config, FSDPConfig, dist

from pss_composer.algorithm import PatchSamplingSchedule
from pss_composer.checks import name_keys
from pss_composer.data.dataspec import build_dataspec
from pss_composer.errors import InputError, to_line
from pss_composer.models.deit import DeiT
from pss_composer.models.library import build_library_model
from pss_composer.models.settings import CONFIG_FILE, ModelSettings
from pss_composer.models.simmim import SimMIMClassifier
from pss_composer.pretraining.masking import PatchMasking
from pss_composer.pretraining.simmim import SimMIM, build_encoder
from pss_composer.pretraining.stratified import StratifiedSampler
from pss_composer.surgery import apply_patch_sampling, remove_patch_sampling
from pss_composer.training.ema import EMA
from pss_composer.training.mixing import MixUpCutMix
from pss_composer.training.recipe import PSSSettings, Recipe


def build_model(settings: ModelSettings, *, run_folder: Path | None = None) -> ComposerModel:
    """The model of a recipe, with its initial weights.

    Args:
        settings: A recipe's `model`.
        run_folder: The folder of a run that has trained this model: its weights will come from there. None for a new
            run, for which a library may download weights.

    Raises:
        InputError: A library does not know the model, or its arguments, or cannot give its weights.
    """
    if settings.library is not None:
        if run_folder is not None and settings.library == "hf" and (run_folder / CONFIG_FILE).is_file():
            settings = replace(settings, name=f"hf/{run_folder}")
        with name_keys(lambda key: f"model.{key}"):
            return build_library_model(settings, has_weights=run_folder is None)
    if settings.name == "simmim_pretrain":
        return SimMIM(build_encoder(settings.shape))
    if settings.name == "simmim":
        return SimMIMClassifier(settings.shape)
    return DeiT(
        settings.shape, is_distilled=settings.is_distilled, relative_position_bias=settings.relative_position_bias
    )


def check_model(model: ComposerModel, recipe: Recipe) -> None:
    """Check that patch sampling fits into the model of a recipe under PSS.

    Raises:
        InputError: It does not.
    """
    if recipe.pss is None:
        return
    try:
        with name_keys(lambda key: f"model.arguments.{key}"):
            apply_patch_sampling(model)
    except TypeError as error:
        raise InputError(f"must be a ViT that patch sampling fits into unless pss=null, got {recipe.model.name!r}: "
                         f"{to_line(error)}", key="model.name") from error
    finally:
        remove_patch_sampling(model)


def compare_normalization(model: ComposerModel, recipe: Recipe) -> str:
    """A line that says so where pre-trained weights expect other means and standard deviations than the recipe's."""
    expected, given = getattr(model, "normalization", None), recipe.augmentation
    if expected is None or (np.allclose(expected.mean, given.mean, atol=1e-3)
                            and np.allclose(expected.std, given.std, atol=1e-3)):
        return ""
    return (f"\n{recipe.model.name} was trained with augmentation.mean={[*expected.mean]} and augmentation.std="
            f"{[*expected.std]}, the recipe has {[*given.mean]} and {[*given.std]}")


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
