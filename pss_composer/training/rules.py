"""The rules between the groups of a recipe, and those of the machine; they need neither data nor weights."""

from __future__ import annotations

from pss_composer.checks import rename_keys
from pss_composer.errors import InputError
from pss_composer.progress import parse_time
from pss_composer.training.recipe import Recipe


def check_recipe(recipe: Recipe) -> list[InputError]:
    """The rules that a recipe breaks; rules between groups are checked only if no group breaks a rule of its own."""
    errors = recipe.check()
    return errors or [*_check_pretraining(recipe), *_check_sampler(recipe), *_check_lengths(recipe),
                      *_check_machine(recipe)]


def _check_pretraining(recipe: Recipe) -> list[InputError]:
    """Pre-training masks patches, and has no labels to mix, smooth or count; fine-tuning has no masks."""
    is_pretraining = recipe.model.name == "simmim_pretrain"
    if is_pretraining != (recipe.masking is not None):
        return [InputError("must be set for model.name=simmim_pretrain and null for any other, got "
                           f"{'null' if is_pretraining else 'a group of settings'} for {recipe.model.name}",
                           key="masking")]
    if recipe.masking is None:
        return []
    rule = "for model.name=simmim_pretrain"
    errors = [
        InputError(f"must be {unset} {rule}", key=key)
        for key, is_unset, unset in (
            ("mixing", recipe.mixing is None, "null"),
            ("label_smoothing", recipe.label_smoothing == 0, "0.0"),
            ("optimizer.layer_decay", recipe.optimizer.layer_decay is None, "null"),
        ) if not is_unset
    ]
    erasing = recipe.augmentation.random_erasing
    if erasing and not recipe.augmentation.is_plain:
        errors.append(InputError(f"must be 0 {rule}, which would learn to reconstruct the noise, got {erasing}",
                                 key="augmentation.random_erasing"))
    shape = recipe.model.shape
    misfits = recipe.masking.check_fit(2 * (shape.image_size,), shape.patch_size)
    return errors + rename_keys(misfits, lambda key: f"masking.{key}")


def _check_sampler(recipe: Recipe) -> list[InputError]:
    if recipe.pss is None:
        return []
    is_pretraining = recipe.model.name == "simmim_pretrain"
    # by magnitude, masked patches would never stay: the mask token is small
    samplers = ("random", "stratified") if is_pretraining else ("magnitude", "l2_magnitude", "random")
    if recipe.pss.sampler in samplers:
        return []
    return [InputError(f"must be one of {', '.join(samplers)} for model.name={recipe.model.name}, "
                       f"got {recipe.pss.sampler!r}", key="pss.sampler")]


def _check_lengths(recipe: Recipe) -> list[InputError]:
    """Warm-up and cooldown must fit into training; `trainer` compares lengths whose units differ, which needs data."""
    duration, warmup = recipe.max_duration, recipe.scheduler.warmup
    lengths = {"scheduler.warmup": warmup}
    if recipe.pss is not None:
        lengths["pss.schedule.cooldown"] = recipe.pss.schedule.get("cooldown", "0ep")
    errors = [build_length_error(key, time, duration) for key, time in lengths.items() if _is_longer(time, duration)]
    value, unit = parse_time(warmup)
    is_in_samples = duration.endswith("sp")
    if value > 0 and unit != "dur" and (unit == "sp") != is_in_samples:
        # Composer compares the two, and does not convert between samples and batches
        units = "sp or dur" if is_in_samples else "ep, ba or dur"
        errors.append(InputError(f"must be in {units} with max_duration={duration}, got {warmup!r}",
                                 key="scheduler.warmup"))
    return errors


def build_length_error(key: str, time: str, duration: str) -> InputError:
    """The error for a part of training that is longer than training."""
    return InputError(f"must be no longer than max_duration={duration}, got {time!r}: make it shorter, like 0.1dur, "
                      "or 0ep for none", key=key)


def _is_longer(time: str, duration: str) -> bool:
    (value, unit), (limit, limit_unit) = parse_time(time), parse_time(duration)
    return value > 1 if unit == "dur" else unit == limit_unit and value > limit


def _check_machine(recipe: Recipe) -> list[InputError]:
    """The settings that need a GPU on a machine without one; torch is imported only if there is such a setting."""
    needs_gpu = {
        "device": (recipe.device == "gpu", "must be cpu or null on a machine without a GPU"),
        "parallelism": (recipe.parallelism == "fsdp", "must be ddp or fsdp2 without a GPU (FSDP1 needs CUDA)"),
        "precision": (recipe.precision not in (None, "fp32"), "must be fp32 or null without a GPU"),
    }
    asked = {key: rule for key, (is_asked, rule) in needs_gpu.items() if is_asked}
    if not asked:
        return []
    import torch

    if torch.cuda.is_available() and recipe.device != "cpu":
        return []
    return [InputError(f"{rule}, got {getattr(recipe, key)!r}", key=key) for key, rule in asked.items()]
