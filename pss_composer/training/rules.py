"""The rules of a recipe that need neither data nor model."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from composer.core import Time

from pss_composer.data import ON_BAD_SAMPLE, check_streaming
from pss_composer.errors import InputError, name_argument
from pss_composer.pretraining.masking import PatchMasking, check_unit
from pss_composer.progress import check_time
from pss_composer.sampling import SAMPLERS, StratifiedSampler
from pss_composer.schedules import SCHEDULES, Schedule, check_keep_rate
from pss_composer.training.recipe import PSSSettings, Recipe

MODELS = ("deit", "simmim", "simmim_pretrain")
LR_SCHEDULES = ("cosine", "multistep")
PARALLELISMS = ("ddp", "fsdp", "fsdp2")
PRECISIONS = ("fp32", "amp_fp16", "amp_bf16")
DEVICES = ("cpu", "gpu")


def check_recipe(recipe: Recipe) -> None:
    """Every rule that needs neither data nor model.

    Raises:
        InputError: The first setting that breaks a rule.
    """
    choices = {
        "model.name": (recipe.model.name, MODELS),
        "scheduler.name": (recipe.scheduler.name, LR_SCHEDULES),
        "parallelism": (recipe.parallelism, PARALLELISMS),
        "precision": (recipe.precision, (None, *PRECISIONS)),
        "device": (recipe.device, (None, *DEVICES)),
        "data.on_bad_sample": (recipe.data.on_bad_sample, ON_BAD_SAMPLE),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise InputError(f"{key} must be one of {_list(allowed)}, got {value!r}")
    for key in ("train_batch_size", "eval_batch_size", "microbatch_size", "data.num_samples"):
        value = _get(recipe, key)
        if value is not None and value < 1:
            raise InputError(f"{key} must be at least 1, got {value}")
    if recipe.data.num_workers < 0:
        raise InputError(f"data.num_workers must be at least 0, got {recipe.data.num_workers}")
    for key in ("optimizer.lr", "optimizer.eps", "optimizer.lr_batch_size", "gradient_clipping",
                "scheduler.gamma"):
        value = _get(recipe, key)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{key} must be above 0 and finite, got {value}")
    layer_decay = recipe.optimizer.layer_decay
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise InputError(f"optimizer.layer_decay must be in (0, 1], got {layer_decay}")
    for key in ("scheduler.alpha_i", "scheduler.alpha_f", "label_smoothing"):
        value = _get(recipe, key)
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{key} must be in [0, 1], got {value}")
    if recipe.ema is not None and not 0 < recipe.ema.smoothing < 1:
        raise InputError(f"ema.smoothing must be in (0, 1), got {recipe.ema.smoothing}")
    if not 0 <= recipe.optimizer.weight_decay < math.inf:
        raise InputError(f"optimizer.weight_decay must be at least 0, got {recipe.optimizer.weight_decay}")
    if len(recipe.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        raise InputError(f"optimizer.betas must be two numbers in [0, 1), got {recipe.optimizer.betas}")
    check_streaming(recipe.data, name=recipe.data.name)
    _check_times(recipe)
    _check_masking(recipe)
    if recipe.pss is not None:
        _check_pss(recipe.pss, recipe.model.name)
    if recipe.autoresume and recipe.save_overwrite:
        raise InputError("save_overwrite must be false with autoresume=true: go on with a run or replace it, got true")
    if not 0 <= recipe.seed < 2**32:
        raise InputError(f"seed must be in [0, 2^32), got {recipe.seed}")
    if recipe.save_num_checkpoints_to_keep < 1 and recipe.save_num_checkpoints_to_keep != -1:
        raise InputError("save_num_checkpoints_to_keep must be at least 1, or -1 for all, "
                         f"got {recipe.save_num_checkpoints_to_keep}")
    has_gpu = torch.cuda.is_available() and recipe.device != "cpu"
    if recipe.device == "gpu" and not has_gpu:
        raise InputError("device must be cpu or null on a machine without a GPU, got 'gpu'")
    if recipe.parallelism == "fsdp" and not has_gpu:
        raise InputError("parallelism must be ddp or fsdp2 without a GPU (FSDP1 needs CUDA), got 'fsdp'")
    if recipe.precision not in (None, "fp32") and not has_gpu:
        raise InputError(f"precision must be fp32 or null without a GPU, got {recipe.precision!r}")


def build_schedule(settings: dict[str, Any]) -> Schedule:
    """The schedule of a recipe's `pss.schedule`.

    Raises:
        InputError: Unknown name, unknown argument, bad value.
    """
    arguments = dict(settings)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise InputError(f"pss.schedule.name must be one of {', '.join(SCHEDULES)}, got {name!r}")
    known = [argument.name for argument in dataclasses.fields(SCHEDULES[name])]
    for argument in arguments:
        if argument not in known:
            raise InputError(name_unknown_key(f"pss.schedule.{argument}", argument, known, f" of {name}"))
    with name_argument("pss.schedule"):
        return SCHEDULES[name](**arguments)


def name_unknown_key(full_key: str, key: str, known: Sequence[str], where: str = "") -> str:
    """The message for a key that is none, with the nearest one that is."""
    prefix = full_key.removesuffix(key)
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
    return f"{full_key} is not a key{where or ' of a recipe'}; {hint}"


def _check_times(recipe: Recipe) -> None:
    for key, units in {"max_duration": ("ep", "ba", "sp"), "eval_interval": ("ep", "ba"),
                       "save_interval": ("ep", "ba"), "scheduler.warmup": ("ep", "ba", "sp", "dur"),
                       "ema.update_interval": ("ba", "ep")}.items():
        value = _get(recipe, key)
        if value is not None:
            group, _, name = key.rpartition(".")
            with name_argument(group):
                check_time(value, name, units, is_zero_allowed=key == "scheduler.warmup")
    if bool(recipe.scheduler.milestones) != (recipe.scheduler.name == "multistep"):
        raise InputError("scheduler.milestones must be times for scheduler.name=multistep and empty for cosine, got "
                         f"{list(recipe.scheduler.milestones)} for {recipe.scheduler.name}")
    with name_argument("scheduler"):
        for milestone in recipe.scheduler.milestones:
            check_time(milestone, "milestones", ("ep", "ba", "sp", "dur"))
    # Composer compares the two and does not convert between samples and batches
    is_in_samples = [Time.from_timestring(time).unit.value == "sp" for time in
                     (recipe.max_duration, recipe.scheduler.warmup)]
    if is_in_samples[0] != is_in_samples[1] and not recipe.scheduler.warmup.endswith("dur"):
        units = "sp or dur" if is_in_samples[0] else "ep, ba or dur"
        raise InputError(f"scheduler.warmup must be in {units} with max_duration={recipe.max_duration}, "
                         f"got {recipe.scheduler.warmup!r}")


def _check_pss(pss: PSSSettings, model_name: str) -> None:
    build_schedule(pss.schedule)
    # by magnitude, masked patches would never stay: the mask token is small
    samplers = ("random", "stratified") if model_name == "simmim_pretrain" else tuple(SAMPLERS)
    if pss.sampler not in samplers:
        raise InputError(f"pss.sampler must be one of {', '.join(samplers)} for model.name={model_name}, "
                         f"got {pss.sampler!r}")
    if pss.masked_share is not None:
        if pss.sampler != "stratified":
            raise InputError("pss.masked_share must be null unless pss.sampler=stratified, "
                             f"got {pss.masked_share}")
        with name_argument("pss"):
            StratifiedSampler(pss.masked_share)
    with name_argument("pss"):
        check_keep_rate(pss.eval_keep_rate, "eval_keep_rate")


def _check_masking(recipe: Recipe) -> None:
    """Pre-training masks patches and has no labels to mix, smooth or count; nothing else masks."""
    is_pretraining = recipe.model.name == "simmim_pretrain"
    if is_pretraining != (recipe.masking is not None):
        raise InputError("masking must be set for model.name=simmim_pretrain and null for any other, got "
                         f"{'null' if is_pretraining else 'a group of settings'} for {recipe.model.name}")
    if not is_pretraining:
        return
    for key, unset in {"mixing": None, "label_smoothing": 0.0, "optimizer.layer_decay": None}.items():
        if _get(recipe, key) != unset:
            raise InputError(f"{key} must be {'null' if unset is None else unset} for model.name=simmim_pretrain")
    if recipe.augmentation.random_erasing and not recipe.augmentation.is_plain:
        raise InputError("augmentation.random_erasing must be 0 for model.name=simmim_pretrain, which would learn to "
                         f"paint its noise, got {recipe.augmentation.random_erasing}")
    with name_argument("masking"):
        PatchMasking(recipe.masking.unit, recipe.masking.ratio)
        if recipe.model.patch_size > 0:  # else the model tells
            check_unit(recipe.masking.unit, 2 * (recipe.model.image_size,), recipe.model.patch_size)


def _get(recipe: Recipe, key: str) -> Any:
    value = recipe
    for name in key.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _list(allowed: Sequence[str | None]) -> str:
    return ", ".join("null" if value is None else value for value in allowed)
