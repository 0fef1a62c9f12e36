"""The folder of a run: its lock, and the files in it beside the checkpoints."""

from __future__ import annotations

import dataclasses
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.utils import dist
from omegaconf import OmegaConf
from torch import nn

from pss_composer.checkpoints.reading import LATEST
from pss_composer.checks import raise_errors
from pss_composer.errors import InputError
from pss_composer.locks import OWNER_FILE, FolderLock
from pss_composer.models.settings import CONFIG_FILE
from pss_composer.training.recipe import Recipe

RECIPE_FILE, LOG_FILE = "recipe.yaml", "metrics.jsonl"


@contextmanager
def claim_folder(recipe: Recipe) -> Iterator[None]:
    """Keep the folder of a run for this run while the block runs; rank 0 holds the lock.

    A run that fails before its first checkpoint leaves nothing behind.

    Raises:
        InputError: Another run uses the folder; it holds a run, and neither `autoresume` nor `save_overwrite` is set;
            or it cannot be written.
    """
    folder = Path(recipe.save_folder)
    _check_earlier_run(recipe, folder)
    if dist.get_global_rank() != 0:
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FolderLock(folder, key="save_folder")
    if recipe.autoresume:
        remove_unfinished_checkpoints(folder)
    try:
        yield
    finally:
        lock.release()
        if all(path.name in (RECIPE_FILE, LOG_FILE, OWNER_FILE, CONFIG_FILE) for path in folder.iterdir()):
            for path in folder.iterdir():
                path.unlink()
            for path in created:
                path.rmdir()


def _check_earlier_run(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder that holds a run, unless it is to be overwritten or `autoresume` goes on with the same recipe."""
    earlier = folder / RECIPE_FILE
    if recipe.save_overwrite or not earlier.is_file():
        return
    if not recipe.autoresume:
        raise InputError(f"must be free, {folder} holds a run: set autoresume=true to go on with it, "
                         "save_overwrite=true to replace it, or another run_name", key="save_folder")
    there = OmegaConf.to_container(OmegaConf.load(earlier))
    raise_errors(
        InputError(f"must be of the same recipe under autoresume, {folder} was trained with {difference}",
                   key="save_folder")
        for difference in _find_differences(there, recipe)
    )


def _find_differences(there: Any, here: Any, prefix: str = "") -> Iterator[str]:
    """What differs between an earlier recipe and this one, except for settings that are free on resume."""
    for setting in dataclasses.fields(here):
        name, value = setting.name, getattr(here, setting.name)
        if setting.metadata.get("free_on_resume"):
            continue
        earlier = there.get(name) if isinstance(there, dict) else None
        is_group = dataclasses.is_dataclass(value)
        if is_group and isinstance(earlier, dict):
            yield from _find_differences(earlier, value, f"{prefix}{name}.")
        elif earlier != (dataclasses.asdict(value) if is_group else value):
            yield f"{prefix}{name}={earlier!r}, got {value!r}"


def write_recipe(recipe: Recipe, model: nn.Module) -> None:
    """Save the recipe in the folder of its run, for `load_run` and a later `autoresume`; rank 0 writes.

    A model of transformers also has its configuration saved: nothing else says how it is built.
    """
    if dist.get_global_rank() == 0:
        OmegaConf.save(OmegaConf.structured(recipe), Path(recipe.save_folder) / RECIPE_FILE)
        if recipe.model.library == "hf":
            module: Any = next(module for module in model.modules() if hasattr(module, "save_pretrained"))
            module.config.save_pretrained(recipe.save_folder)


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Remove what a kill in the middle of saving leaves: a checkpoint that the link does not lead to yet.

    Composer refuses to go on beside a checkpoint that is later than the one it goes on from. Without the link, which a
    kill can leave for a moment, it is put back to the last whole checkpoint.
    """
    checkpoints, latest = sorted(folder.glob("ep*-ba*-rank0.pt"), key=_read_batch), folder / LATEST
    whole = [path for path in checkpoints if zipfile.is_zipfile(path)]
    if whole and not latest.exists():
        latest.unlink(missing_ok=True)  # it may lead nowhere
        latest.symlink_to(whole[-1].name)
    last = _read_batch(latest.resolve()) if latest.exists() else -1
    for path in checkpoints:
        if _read_batch(path) > last:
            path.unlink()


def _read_batch(path: Path) -> int:
    """The batch in the name of a checkpoint, like ep1-ba44-rank0.pt."""
    match = re.search(r"-ba(\d+)", path.name)
    return int(match[1]) if match else sys.maxsize


def remove_torn_checkpoints(folder: Path) -> bool:
    """Remove checkpoints that a full disk cut short: zip files without their end.

    Returns:
        Whether there was one.
    """
    torn = [path for path in folder.glob("ep*-rank*.pt") if path.is_file() and not zipfile.is_zipfile(path)]
    for path in torn:
        path.unlink()
    return bool(torn)
