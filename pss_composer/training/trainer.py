"""From a recipe to a Composer `Trainer`, and the run itself."""

from __future__ import annotations

import errno
import logging
import math
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from composer import Trainer
from composer.callbacks import SpeedMonitor
from composer.core import DataSpec
from composer.loggers import LoggerDestination, TensorboardLogger
from composer.models import ComposerModel
from composer.utils import dist, get_file, reproducibility

from pss_composer.checkpoints.reading import LATEST, find_latest
from pss_composer.checkpoints.transfer import load_checkpoint, load_pretrained
from pss_composer.checks import name_keys
from pss_composer.data.loader import Loader, reporting_dead_worker, restore_generators
from pss_composer.errors import InputError, to_line
from pss_composer.progress import Progress, count_batches
from pss_composer.training.builders import (
    build_algorithms,
    build_data,
    build_model,
    build_parallelism,
    check_model,
    compare_normalization,
    name_data_key,
)
from pss_composer.training.data_wait import DataWaitMonitor
from pss_composer.training.metrics_log import JSONLinesLogger
from pss_composer.training.optim import build_optimizer, build_scheduler
from pss_composer.training.recipe import Recipe
from pss_composer.training.rules import build_length_error
from pss_composer.training.run_folder import LOG_FILE, claim_folder, remove_torn_checkpoints, write_recipe

log = logging.getLogger(__name__)


def build_trainer(recipe: Recipe) -> Trainer:
    """A Composer `Trainer` that is ready to `fit()`.

    Raises:
        InputError: A mistake that cannot be found without weights or data.
    """
    with tempfile.TemporaryDirectory(prefix="pss-load-") as downloads:
        return _build_trainer(recipe, Path(downloads))


def _build_trainer(recipe: Recipe, downloads: Path) -> Trainer:
    device = recipe.device or ("gpu" if torch.cuda.is_available() else "cpu")
    if recipe.deterministic:
        reproducibility.configure_deterministic_mode()
    reproducibility.seed_all(recipe.seed)  # every rank starts from the same weights
    is_resumed = recipe.autoresume and (Path(recipe.save_folder) / LATEST).exists()
    model = build_model(recipe.model, run_folder=Path(recipe.save_folder) if is_resumed else None)
    check_model(model, recipe)
    load_path = None if is_resumed else _load_weights(model, recipe, downloads)
    if recipe.activation_checkpointing and recipe.parallelism == "ddp":
        model.enable_activation_checkpointing()
    dist.initialize_dist(device)
    # `initialize_dist` has made this process's own GPU the current one, so "cuda" needs no number
    batch_device = "cuda" if device == "gpu" else "cpu"
    train_data, eval_data = (build_data(recipe, split, batch_device) for split in ("train", "val"))
    _check_durations(recipe, train_data)
    loggers: list[LoggerDestination] = [JSONLinesLogger(Path(recipe.save_folder) / LOG_FILE)]
    if recipe.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(Path(recipe.save_folder) / "tensorboard")))
    return Trainer(
        model=model,
        train_dataloader=train_data,
        eval_dataloader=eval_data,
        max_duration=recipe.max_duration,
        eval_interval=recipe.eval_interval,
        optimizers=build_optimizer(model, recipe.optimizer, recipe.train_batch_size),
        schedulers=build_scheduler(recipe.scheduler),
        algorithms=build_algorithms(recipe),
        callbacks=[SpeedMonitor(window_size=10, time_unit="seconds"), DataWaitMonitor()],
        loggers=loggers,
        run_name=recipe.run_name,
        progress_bar=recipe.progress_bar,
        load_path=load_path,
        load_weights_only=recipe.load_weights_only,
        save_folder=recipe.save_folder,
        save_interval=recipe.save_interval,
        save_num_checkpoints_to_keep=recipe.save_num_checkpoints_to_keep,
        save_overwrite=recipe.save_overwrite,
        autoresume=recipe.autoresume,
        device=device,
        precision=recipe.precision or ("amp_bf16" if device == "gpu" else "fp32"),
        device_train_microbatch_size=recipe.microbatch_size,
        parallelism_config=build_parallelism(recipe),
        compile_config={} if recipe.compile else None,
        seed=recipe.seed,
    )


def train(recipe: Recipe) -> Trainer:
    """Train a recipe from its start, or with `autoresume` from the last checkpoint in its folder.

    A run that fails before its first checkpoint leaves no files.

    Returns:
        The Trainer after training; its loaders are closed.

    Raises:
        InputError: A mistake that the user can mend.
    """
    with claim_folder(recipe):
        trainer = build_trainer(recipe)
        is_at_end = trainer.state.timestamp >= trainer.state.max_duration
        if is_at_end and not recipe.autoresume:
            raise InputError(f"must be of a run before max_duration={recipe.max_duration}, {recipe.load_path} is at "
                             "its end: set load_weights_only=true to start from its weights", key="load_path")
        write_recipe(recipe, trainer.state.model)
        try:
            if not is_at_end:
                restore_generators(trainer)
                with (_reporting_full_disk(Path(recipe.save_folder)), name_keys(name_data_key),
                      reporting_dead_worker()):
                    trainer.fit()
        finally:
            _close(trainer)
    return trainer


def run(recipe: Recipe) -> None:
    """Train a recipe for the command line; print the result and the next command, or after Ctrl-C how to go on.

    Raises:
        InputError: As `train` does.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer's would end the program without a message
    latest = Path(recipe.save_folder) / LATEST
    try:
        trainer = train(recipe)
    except KeyboardInterrupt:
        if dist.get_global_rank() == 0:
            if latest.exists():
                message = (f"{latest} is the checkpoint {latest.resolve().name}: the same command with "
                           "autoresume=true goes on from there")
            else:
                message = (f"there is no checkpoint yet (save_interval={recipe.save_interval}): the same command "
                           "starts anew")
            print(f"\nstopped; {message}", file=sys.stderr)
        sys.exit(130)
    if dist.get_global_rank() == 0:
        metrics = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
        if metrics:
            print(f"evaluation: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
        print(f"checkpoint: {latest}")
        is_pretraining = recipe.masking is not None
        command = "pss reconstruct {} --out reconstruction.png" if is_pretraining else "pss evaluate {}"
        print(f"next: {command.format(recipe.save_folder)}")


def _close(trainer: Trainer) -> None:
    # trainer.close() would wait for the other ranks; if this rank has failed, those wait for it in a step
    trainer.engine.close()  # ends the workers of the training data, but not those of the evaluation data
    for evaluator in trainer.state.evaluators:
        evaluator.dataloader.dataloader.close()


@contextmanager
def _reporting_full_disk(folder: Path) -> Iterator[None]:
    """Turn an error of a full disk into an `InputError`, and remove the checkpoint that was cut short."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch raises a RuntimeError without an errno where it cannot write a checkpoint
        has_removed = dist.get_global_rank() == 0 and remove_torn_checkpoints(folder)
        if not has_removed and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"must have room for the run, got {to_line(error)!r} in {str(folder)!r}",
                         key="save_folder") from error


def _load_weights(model: ComposerModel, recipe: Recipe, downloads: Path) -> str | None:
    """Load `model.pretrained` into the model, and check that `load_path` is a checkpoint of this model.

    Args:
        model: The model with its initial weights.
        recipe: The recipe.
        downloads: Folder for a checkpoint that is fetched from a store.

    Returns:
        The file of `load_path` on this machine, for Composer to load; None if there is none to load.

    Raises:
        InputError: A file cannot be fetched or read, or is not of this model.
    """
    if pretrained := recipe.model.pretrained:
        account = getattr(model, "loaded", None)  # by a library, when it made the model
        if account is None:
            with name_keys(lambda _: "model.pretrained"):
                account = load_pretrained(model, str(pretrained))
        if dist.get_global_rank() == 0:
            shown = "true" if pretrained is True else pretrained
            print(f"model.pretrained={shown}\n{account}{compare_normalization(model, recipe)}", flush=True)
    if recipe.load_path is None:
        return None
    if "://" in recipe.load_path:
        path = downloads / Path(recipe.load_path).name
        try:
            get_file(recipe.load_path, str(path))
        except Exception as error:  # the libraries of stores have no common class of errors
            raise InputError(f"must be a checkpoint that can be fetched, got {recipe.load_path!r}: {to_line(error)}",
                             key="load_path") from error
    else:
        path = find_latest(recipe.load_path)  # a run's folder stands for its last checkpoint
    with name_keys(lambda _: "load_path"):
        load_checkpoint(model, path)
    return str(path)


def _check_durations(recipe: Recipe, train_data: DataSpec) -> None:
    """Check that warm-up and cooldown fit into training, and warn if the period of the keep rate does not.

    `rules` compares lengths in the same unit; this also compares others, since the length of an epoch is known.
    """
    batches_per_epoch, samples_per_batch = len(cast(Loader, train_data.dataloader)), recipe.train_batch_size
    total = count_batches(recipe.max_duration, batches_per_epoch, samples_per_batch)
    warmup = count_batches(recipe.scheduler.warmup, batches_per_epoch, samples_per_batch, total)
    if warmup > total:
        raise build_length_error("scheduler.warmup", recipe.scheduler.warmup, recipe.max_duration)
    if recipe.scheduler.warmup.endswith("dur") and 0 < warmup < 1:
        raise InputError(f"must be at least a batch with max_duration={recipe.max_duration}, or 0ep, "
                         f"got {recipe.scheduler.warmup!r}", key="scheduler.warmup")
    if recipe.pss is None:
        return
    progress = Progress(0, math.ceil(total), batches_per_epoch, samples_per_batch)
    with name_keys(lambda key: f"pss.schedule.{key}"):
        recipe.pss.built_schedule(progress)  # raises an error if its cooldown is too long
    period = getattr(recipe.pss.built_schedule, "period", None)
    if period is not None and progress.num_batches(period) > total:
        log.warning("pss.schedule.period=%s is longer than max_duration=%s: training sees a part of one cycle",
                    period, recipe.max_duration)
