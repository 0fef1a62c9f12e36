"""Recipes: a YAML file and overrides on the command line, read into typed settings and checked.

`load_recipe` finds every mistake that can be found without data or a model, each told in one line with its key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from composer.core import Time
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pss_composer.errors import InputError
from pss_composer.masking import PatchMasking, check_unit
from pss_composer.progress import check_time
from pss_composer.sampling import SAMPLERS, StratifiedSampler
from pss_composer.schedules import SCHEDULES, Schedule, check_keep_rate
from pss_composer.settings import Recipe

MODELS = ("deit", "simmim", "simmim_pretrain")
LR_SCHEDULES = ("cosine", "multistep")
PARALLELISMS = ("ddp", "fsdp", "fsdp2")
PRECISIONS = ("fp32", "amp_fp16", "amp_bf16")
DEVICES = ("cpu", "gpu")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it.

    Args:
        path: A YAML file; its name is the default `run_name`.
        overrides: Settings like `optimizer.lr=1e-3`, the later ones winning.

    Raises:
        InputError: No such file, no YAML, an unknown key, a value of the wrong type or outside its range.
    """
    path = Path(path)
    from_file = OmegaConf.create({"run_name": path.stem})
    from_file.merge_with(_read_yaml(path))
    from_overrides = _read_overrides(overrides)
    for source in (from_file, from_overrides):
        _check_keys(source, Recipe)
    _drop_settings_of_other_schedule(from_file, from_overrides)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), from_file, from_overrides)
        OmegaConf.resolve(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{missing[0]} must be set, in {path} or as {missing[0]}=VALUE")
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise InputError(f"{error.full_key or 'recipe'} has a value of the wrong type or form: {message}") from error
    check_recipe(recipe)
    return recipe


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
            raise InputError(_unknown_key(f"pss.schedule.{argument}", argument, known, f" of {name}"))
    with name_argument("pss.schedule"):
        return SCHEDULES[name](**arguments)


@contextmanager
def name_argument(key: str) -> Iterator[None]:
    """Turns a `ValueError` whose message begins with an argument's name into an `InputError` on a recipe's key."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{key}.{error}".lstrip(".")) from error


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
    if recipe.pss is not None:
        build_schedule(recipe.pss.schedule)
        # by magnitude, masked patches would never stay: the mask token is small
        samplers = ("random", "stratified") if recipe.model.name == "simmim_pretrain" else tuple(SAMPLERS)
        if recipe.pss.sampler not in samplers:
            raise InputError(f"pss.sampler must be one of {', '.join(samplers)} for model.name={recipe.model.name}, "
                             f"got {recipe.pss.sampler!r}")
        if recipe.pss.masked_share is not None:
            if recipe.pss.sampler != "stratified":
                raise InputError("pss.masked_share must be null unless pss.sampler=stratified, "
                                 f"got {recipe.pss.masked_share}")
            with name_argument("pss"):
                StratifiedSampler(recipe.pss.masked_share)
        with name_argument("pss"):
            check_keep_rate(recipe.pss.eval_keep_rate, "eval_keep_rate")
    _check_masking(recipe)
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
    with name_argument("masking"):
        PatchMasking(recipe.masking.unit, recipe.masking.ratio)
        check_unit(recipe.masking.unit, 2 * (recipe.model.image_size,), recipe.model.patch_size)


def _read_yaml(path: Path) -> DictConfig:
    try:
        settings = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"recipe must be a YAML file, no such file: {path}") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe must be a YAML file, {path} is not: {' '.join(str(error).split())}") from error
    if not isinstance(settings, DictConfig):
        raise InputError(f"recipe must be a YAML file of key: value lines, {path} is not")
    return settings


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise InputError(f"overrides must look like key=value, got {override!r}")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise InputError(f"overrides must be key=value with a YAML value: {message}") from error


def _check_keys(settings: DictConfig, schema: type, prefix: str = "") -> None:
    """Every key must be a field of the schema, at every level."""
    types = typing.get_type_hints(schema)
    for key in settings:
        if key not in types:
            raise InputError(_unknown_key(prefix + str(key), str(key), list(types)))
        inner = next((t for t in (types[key], *typing.get_args(types[key])) if dataclasses.is_dataclass(t)), None)
        value = settings._get_node(key)
        if inner is None or value._is_none() or value._is_interpolation():
            continue
        if not isinstance(value, DictConfig):
            raise InputError(f"{prefix}{key} must be a group of settings, got {settings[key]!r}")
        _check_keys(value, inner, f"{prefix}{key}.")


def _unknown_key(full_key: str, key: str, known: Sequence[str], where: str = "") -> str:
    prefix = full_key.removesuffix(key)
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
    return f"{full_key} is not a key{where or ' of a recipe'}; {hint}"


def _drop_settings_of_other_schedule(from_file: DictConfig, from_overrides: DictConfig) -> None:
    """Under `pss.schedule.name=linear`, what the file says of the period of its cyclic schedule goes."""
    name = OmegaConf.select(from_overrides, "pss.schedule.name")
    schedule = OmegaConf.select(from_file, "pss.schedule")
    is_known = isinstance(name, str) and name in SCHEDULES
    if is_known and isinstance(schedule, DictConfig) and schedule.get("name") != name:
        known = {argument.name for argument in dataclasses.fields(SCHEDULES[name])}
        for key in set(schedule) - known:
            del schedule[key]


def _get(recipe: Recipe, key: str) -> Any:
    value = recipe
    for name in key.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _list(allowed: Sequence[str | None]) -> str:
    return ", ".join("null" if value is None else value for value in allowed)
