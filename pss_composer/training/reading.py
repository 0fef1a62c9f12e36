"""Recipes: a YAML file and overrides on the command line, read into typed settings and checked.

`load_recipe` finds every mistake that can be found without data or a model, each told in one line with its key.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pss_composer.errors import InputError
from pss_composer.training.rules import check_recipe, name_unknown_key
from pss_composer.schedules import SCHEDULES
from pss_composer.training.recipe import Recipe


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
            raise InputError(name_unknown_key(prefix + str(key), str(key), list(types)))
        inner = next((t for t in (types[key], *typing.get_args(types[key])) if dataclasses.is_dataclass(t)), None)
        value = settings._get_node(key)
        if inner is None or value._is_none() or value._is_interpolation():
            continue
        if not isinstance(value, DictConfig):
            raise InputError(f"{prefix}{key} must be a group of settings, got {settings[key]!r}")
        _check_keys(value, inner, f"{prefix}{key}.")


def _drop_settings_of_other_schedule(from_file: DictConfig, from_overrides: DictConfig) -> None:
    """Under `pss.schedule.name=linear`, what the file says of the period of its cyclic schedule goes."""
    name = OmegaConf.select(from_overrides, "pss.schedule.name")
    schedule = OmegaConf.select(from_file, "pss.schedule")
    is_known = isinstance(name, str) and name in SCHEDULES
    if is_known and isinstance(schedule, DictConfig) and schedule.get("name") != name:
        known = {argument.name for argument in dataclasses.fields(SCHEDULES[name])}
        for key in set(schedule) - known:
            del schedule[key]
