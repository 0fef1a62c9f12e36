"""Reading a recipe: a YAML file and overrides on the command line become typed settings, checked as a whole."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pss_composer.checks import raise_errors
from pss_composer.errors import InputError, InputErrors, to_line
from pss_composer.schedules import SCHEDULES
from pss_composer.training.recipe import Recipe, check_group, describe_unknown
from pss_composer.training.rules import check_recipe

PACKAGED = Path(__file__).parent.parent / "yamls"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check all that can be checked without data or weights.

    Args:
        path: A YAML file, or the name of a recipe that comes with the package; its name is the default `run_name`.
        overrides: Settings like `optimizer.lr=1e-3`; later ones replace earlier ones.

    Raises:
        InputError: There is no such file, or it is not YAML. Unknown keys, values of a wrong type and values that break
            a rule are reported together.
    """
    path = find_recipe(path)
    from_file, from_overrides = _read_yaml(path), _read_overrides(overrides)
    _drop_settings_of_other_schedule(from_file, from_overrides)
    given = OmegaConf.to_container(OmegaConf.merge({"run_name": path.stem}, from_file, from_overrides))
    recipe, errors = OmegaConf.structured(Recipe), []
    for key, value, schema in _find_settings(typing.cast(dict, given), Recipe):
        try:
            _set(recipe, key, value, schema)
        except InputError as error:
            errors.append(error)
        except OmegaConfBaseException as error:
            errors.append(InputError(f"has a value of the wrong type or form: {str(error).splitlines()[0]}", key=key))
    wrong = {error.key for error in errors}
    try:
        missing = OmegaConf.missing_keys(recipe)
    except OmegaConfBaseException as error:
        raise InputErrors(errors or [_describe_interpolation(error)]) from error
    errors += [InputError(f"must be set, in {path} or as {key}=VALUE", key=key) for key in sorted(missing)
               if key not in wrong and key.split(".")[0] not in wrong]
    if missing:
        # a recipe with missing settings cannot be checked as a whole; check the groups that are complete
        groups = {str(key): recipe[key] for key in recipe if not OmegaConf.is_missing(recipe, key)}
        errors += [error for name, group in groups.items() if OmegaConf.is_dict(group)
                   and not OmegaConf.missing_keys(group) for error in check_group(name, OmegaConf.to_object(group))]
        raise_errors(errors)
    settings = _to_recipe(recipe)
    errors += [error for error in check_recipe(settings) if error.key not in wrong]
    raise_errors(errors)
    return settings


def _to_recipe(recipe: DictConfig) -> Recipe:
    try:
        OmegaConf.resolve(recipe)
        return typing.cast(Recipe, OmegaConf.to_object(recipe))
    except OmegaConfBaseException as error:
        raise _describe_interpolation(error) from error


def _describe_interpolation(error: OmegaConfBaseException) -> InputError:
    return InputError(f"has an interpolation that leads nowhere: {str(error).splitlines()[0]}",
                      key=error.full_key or "recipe")


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: the path itself, or that of the packaged recipe by this name.

    Raises:
        InputError: There is neither.
    """
    path, packaged = Path(path), PACKAGED / f"{Path(path).name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if len(path.parts) == 1 and packaged.is_file():
        return packaged
    names = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml")))
    raise InputError(f"recipe must be a YAML file, no such file: {path} (packaged recipes: {names})")


def _read_yaml(path: Path) -> DictConfig:
    try:
        settings = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe must be a YAML file, {path} is not: {to_line(error)}") from error
    if not isinstance(settings, DictConfig):
        raise InputError(f"recipe must be a YAML file of key: value lines, {path} is not")
    return settings


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    raise_errors(InputError(f"overrides must look like key=value, got {override!r}")
                 for override in overrides if "=" not in override)
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"overrides must be key=value with a YAML value: {to_line(error)}") from error


def _find_settings(given: dict[Any, Any], schema: type, prefix: str = "") -> Iterator[tuple[str, Any, type]]:
    """Every setting as its full key, its value and the dataclass that should have it.

    A group comes as an empty dictionary, followed by its settings.
    """
    for name, value in given.items():
        key, group = f"{prefix}{name}", _find_group(schema, name)
        if group is not None and isinstance(value, dict):
            yield key, {}, schema
            yield from _find_settings(value, group, f"{key}.")
        else:
            yield key, value, schema


def _find_group(schema: type, name: str) -> type | None:
    """The dataclass of a group of settings; None if `name` is not a group of the schema."""
    hint = typing.get_type_hints(schema).get(name)
    types = (hint, *typing.get_args(hint))
    return next((kind for kind in types if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _set(recipe: DictConfig, key: str, value: Any, schema: type) -> None:
    """Set one setting of the recipe; OmegaConf converts it to the type of its field.

    Raises:
        InputError: No such key, or a value that OmegaConf would silently convert.
        OmegaConfBaseException: A value of another type.
    """
    prefix, _, name = key.rpartition(".")
    types = typing.get_type_hints(schema)
    if name not in types:
        raise InputError(describe_unknown(name, list(types), prefix=f"{prefix}." if prefix else ""), key=key)
    if types[name] is bool and not isinstance(value, bool):
        raise InputError(f"must be true or false, got {value!r}", key=key)
    if _find_group(schema, name) is not None and value not in (None, {}):
        raise InputError(f"must be a group of settings, got {value!r}", key=key)
    OmegaConf.update(recipe, key, value, merge=True)


def _drop_settings_of_other_schedule(from_file: DictConfig, from_overrides: DictConfig) -> None:
    """Drop settings that an override of the schedule's name makes meaningless, like the period under `linear`."""
    name = OmegaConf.select(from_overrides, "pss.schedule.name")
    schedule = OmegaConf.select(from_file, "pss.schedule")
    is_known = isinstance(name, str) and name in SCHEDULES
    if is_known and isinstance(schedule, DictConfig) and schedule.get("name") != name:
        known = {argument.name for argument in dataclasses.fields(SCHEDULES[name])}
        for key in set(schedule) - known:
            del schedule[key]
