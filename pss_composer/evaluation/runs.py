"""A finished run, read from its folder: the recipe, the trained model and the log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml
from composer.models import ComposerModel
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pss_composer.checkpoints.reading import LATEST
from pss_composer.checkpoints.transfer import load_checkpoint
from pss_composer.errors import InputError, to_line
from pss_composer.sampling import PatchSampler
from pss_composer.surgery import apply_patch_sampling
from pss_composer.training.builders import build_model, build_sampler
from pss_composer.training.recipe import Recipe
from pss_composer.training.run_folder import LOG_FILE, RECIPE_FILE

TRAINING_LOSS = "loss/train/total"  # Composer logs it in every batch of training, and only there


@dataclass
class Run:
    """A finished run.

    Args:
        name: What tables and pictures call it.
        folder: The `save_folder` of the run.
        recipe: What it was trained with.
        model: The trained model, changed by `apply_patch_sampling`.
        patch_sampler: What `apply_patch_sampling` returned; it sets the keep rate of `model`.
    """

    name: str
    folder: Path
    recipe: Recipe
    model: ComposerModel
    patch_sampler: PatchSampler


def load_run(folder: str | Path) -> Run:
    """Read a run's recipe and its last checkpoint.

    Raises:
        InputError: The folder has no run, its recipe is not of this version, or its checkpoint is broken or of another
            model.
    """
    folder = Path(folder)
    for name in (RECIPE_FILE, LATEST):
        if not os.path.exists(folder / name):
            raise InputError(f"must be the save_folder of a trained recipe, no {name} in {folder}", key="run")
    path = folder / RECIPE_FILE
    try:
        recipe = cast(Recipe, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path))))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise InputError(f"must hold a recipe of this version, {path} is not one: {to_line(error)}",
                         key="run") from error
    model = build_model(recipe.model, run_folder=folder)
    try:
        # a run without PSS gets the paper's sampler, so that it can be compared at the same keep rates
        patch_sampler = apply_patch_sampling(model, sampler=build_sampler(recipe.pss) if recipe.pss else "magnitude")
    except TypeError as error:
        raise InputError(f"must be of a ViT that patch sampling fits into, {folder} is of {recipe.model.name}: "
                         f"{to_line(error)}", key="run") from error
    load_checkpoint(model, folder / LATEST)
    return Run(recipe.run_name, folder, recipe, model, patch_sampler)


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """`load_run` for several folders; if two runs have the same name, every run is called by its folder."""
    runs = [load_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        parent = os.path.commonpath([run.folder.absolute().parent for run in runs])
        runs = [replace(run, name=os.path.relpath(run.folder, parent)) for run in runs]
    return runs


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The log of a run in order of batches: a dictionary for each batch of training, and one for each evaluation.

    A resumed run may have logged a batch twice; then the later line counts. Incomplete lines, which a killed run may
    leave, are left out.

    Raises:
        InputError: There is no log, or it has no batch of training.
    """
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        raise InputError(f"must be the save_folder of a trained recipe, no {LOG_FILE} in {folder}", key="run")
    by_batch: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "batch" in metrics:  # the line of the settings has none
            key = metrics["batch"], TRAINING_LOSS in metrics
            by_batch[key] = by_batch.get(key, {}) | metrics  # after a batch, there may be several lines of evaluation
    if not any(is_training for _, is_training in by_batch):
        raise InputError(f"must have trained a batch, {path} has none", key="run")
    return [by_batch[key] for key in sorted(by_batch)]


def select_training(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The batches of training in the log of a run."""
    return [line for line in lines if TRAINING_LOSS in line]


def training_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that a run spent in training, those before a resumption included, those of evaluation not."""
    return max(line.get("time/train", 0.0) for line in lines)
