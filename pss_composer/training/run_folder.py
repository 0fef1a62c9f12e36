"""The folder of a run: whose it is, and what stands in it beside the checkpoints."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from composer.utils import dist
from omegaconf import OmegaConf

from pss_composer.errors import InputError
from pss_composer.training.recipe import Recipe

# settings that a resumed run may change: they have no part in what it computes
FREE_ON_RESUME = ("autoresume", "save_overwrite", "progress_bar", "tensorboard", "save_interval",
                  "save_num_checkpoints_to_keep", "load_path", "load_weights_only", "data.num_workers", "data.path",
                  "data.remote", "data.local", "data.cache_limit", "data.predownload", "data.download_retry",
                  "data.on_bad_sample")
RECIPE_FILE, LOG_FILE = "recipe.yaml", "metrics.jsonl"


def check_save_folder(recipe: Recipe) -> None:
    """A folder with a run in it is for the same recipe under `autoresume`, or to be overwritten.

    Raises:
        InputError: It is neither, or cannot be written.
    """
    folder = Path(recipe.save_folder)
    first_there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not first_there.is_dir() or not os.access(first_there, os.W_OK):
        raise InputError(f"save_folder must be a folder that can be written, got {recipe.save_folder!r}")
    earlier = folder / RECIPE_FILE
    if recipe.save_overwrite or not earlier.exists():
        return
    if not recipe.autoresume:
        raise InputError(f"save_folder must be free, {folder} holds a run: set autoresume=true to go on with it, "
                         "save_overwrite=true to replace it, or another run_name")
    there, here = _flatten(OmegaConf.to_container(OmegaConf.load(earlier))), _flatten(asdict(recipe))
    for key in {**there, **here}:
        if there.get(key) != here.get(key) and key not in FREE_ON_RESUME:
            raise InputError(f"save_folder must be of the same recipe under autoresume, {folder} was trained with "
                             f"{key}={there.get(key)!r}, got {here.get(key)!r}")


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def write_recipe(recipe: Recipe) -> None:
    """What the run was trained with, for `load_run` and a later `autoresume`; rank 0 writes."""
    if dist.get_global_rank() == 0:
        folder = Path(recipe.save_folder)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(recipe), folder / RECIPE_FILE)


def remove_empty_run(recipe: Recipe) -> None:
    """Bad data may show in the first batches only: what a run wrote that has no checkpoint yet goes again."""
    folder, written = Path(recipe.save_folder), (RECIPE_FILE, LOG_FILE)
    if dist.get_global_rank() == 0 and all(path.name in written for path in folder.iterdir()):
        for name in written:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
