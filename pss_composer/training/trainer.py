"""From a recipe to a Composer `Trainer`, and the run itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import GradientClipping, LabelSmoothing
from composer.callbacks import SpeedMonitor
from composer.core import Algorithm, DataSpec
from composer.loggers import TensorboardLogger
from composer.models import ComposerModel
from composer.utils import FSDP2Config, FSDPConfig, dist, reproducibility

from pss_composer.algorithm import PatchSamplingSchedule
from pss_composer.checkpoints import LATEST, find_latest, load_checkpoint, load_pretrained
from pss_composer.data import build_dataspec, restore_generators
from pss_composer.data.loader import name_dead_worker
from pss_composer.training.ema import EMA
from pss_composer.errors import InputError, exit_on_input_error, name_argument
from pss_composer.training.metrics_log import JSONLinesLogger
from pss_composer.pretraining.masking import PatchMasking
from pss_composer.training.mixing import MixUpCutMix
from pss_composer.models import DeiT, SimMIM, SimMIMClassifier
from pss_composer.models.simmim import build_encoder
from pss_composer.training.optim import build_optimizer, build_scheduler
from pss_composer.progress import Progress, count_batches
from pss_composer.training.reading import load_recipe
from pss_composer.training.rules import build_schedule
from pss_composer.training.run_folder import LOG_FILE, check_save_folder, remove_empty_run, write_recipe
from pss_composer.sampling import StratifiedSampler
from pss_composer.training.recipe import ModelSettings, PSSSettings, Recipe
from pss_composer.training.data_wait import DataWaitMonitor


def build_model(settings: ModelSettings) -> ComposerModel:
    """The model of a recipe, with its initial weights.

    Raises:
        InputError: Arguments that do not fit.
    """
    arguments = asdict(settings)
    name = arguments.pop("name")
    del arguments["pretrained"]
    if name != "deit":
        for deit_only in ("is_distilled", "relative_position_bias"):
            if arguments.pop(deit_only):
                raise InputError(f"model.{deit_only} must be false for model.name={name}, got true")
    with name_argument("model"):
        if name == "simmim_pretrain":
            del arguments["num_classes"]
            return SimMIM(build_encoder(**arguments))
        return {"deit": DeiT, "simmim": SimMIMClassifier}[name](**arguments)


def build_sampler(settings: PSSSettings) -> str | StratifiedSampler:
    """The sampler of a recipe, in a form that `apply_patch_sampling` takes."""
    return StratifiedSampler(settings.masked_share) if settings.sampler == "stratified" else settings.sampler


def build_algorithms(recipe: Recipe) -> list[Algorithm]:
    """PSS and the algorithms that a recipe combines it with."""
    algorithms: list[Algorithm] = []
    if recipe.pss is not None:
        algorithms.append(PatchSamplingSchedule(
            build_schedule(recipe.pss.schedule),
            sampler=build_sampler(recipe.pss),
            eval_keep_rate=recipe.pss.eval_keep_rate,
        ))
    if recipe.masking is not None:
        algorithms.append(PatchMasking(**asdict(recipe.masking)))
    if recipe.mixing is not None:
        with name_argument("mixing"):
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
    # Composer tells FSDP1 from FSDP2 by the class of the configuration, under the one key `fsdp`
    if recipe.parallelism == "fsdp2":
        # whole weights in one file, as under DDP: a ViT's are small, and plain timm reads them
        return {"fsdp": FSDP2Config(
            activation_checkpointing=recipe.activation_checkpointing, state_dict_type="full"
        )}
    return {"fsdp": FSDPConfig(
        activation_checkpointing=recipe.activation_checkpointing, activation_checkpointing_reentrant=False
    )}


def build_data(recipe: Recipe, split: str, device: str = "cpu") -> DataSpec:
    """The images of a split, each rank's share of the global batch at a time, on `device`.

    Raises:
        InputError: A data setting that breaks a rule, or data that are not there.
    """
    key = "train_batch_size" if split == "train" else "eval_batch_size"
    batch_size, world_size = getattr(recipe, key), dist.get_world_size()
    if batch_size % world_size:
        raise InputError(f"{key} must be divisible by the number of processes ({world_size}), got {batch_size}")
    return build_dataspec(
        recipe.data.name,
        split=split,
        path=recipe.data.path,
        image_size=recipe.model.image_size,
        num_classes=None if recipe.model.name == "simmim_pretrain" else recipe.model.num_classes,
        batch_size=batch_size // world_size,
        augmentation=recipe.augmentation,
        streaming=recipe.data,
        on_bad_sample=recipe.data.on_bad_sample,
        num_workers=recipe.data.num_workers,
        num_samples=recipe.data.num_samples,
        seed=recipe.seed,
        device=device,
    )


def build_trainer(recipe: Recipe) -> Trainer:
    """A Composer `Trainer` that is ready to `fit()`.

    Raises:
        InputError: What only model and data can tell of a recipe.
    """
    device = recipe.device or ("gpu" if torch.cuda.is_available() else "cpu")
    precision = recipe.precision or ("amp_bf16" if device == "gpu" else "fp32")
    if recipe.deterministic:
        reproducibility.configure_deterministic_mode()
    reproducibility.seed_all(recipe.seed)  # every rank starts from the same weights
    model = build_model(recipe.model)
    _load_weights(model, recipe)
    if recipe.activation_checkpointing and recipe.parallelism == "ddp":
        model.vit.set_grad_checkpointing()
    algorithms = build_algorithms(recipe)
    dist.initialize_dist(device)
    # the current GPU is this process's own since `initialize_dist`
    batch_device = "cuda" if device == "gpu" else "cpu"
    train_data, eval_data = (build_data(recipe, split, batch_device) for split in ("train", "val"))
    _check_durations(recipe, train_data)
    loggers = [JSONLinesLogger(Path(recipe.save_folder) / LOG_FILE)]
    if recipe.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(Path(recipe.save_folder) / "tensorboard")))
    is_local = recipe.load_path is not None and "://" not in recipe.load_path
    return Trainer(
        model=model,
        train_dataloader=train_data,
        eval_dataloader=eval_data,
        max_duration=recipe.max_duration,
        eval_interval=recipe.eval_interval,
        optimizers=build_optimizer(model, recipe.optimizer, recipe.train_batch_size),
        schedulers=build_scheduler(recipe.scheduler),
        algorithms=algorithms,
        callbacks=[SpeedMonitor(window_size=10, time_unit="seconds"), DataWaitMonitor()],
        loggers=loggers,
        run_name=recipe.run_name,
        progress_bar=recipe.progress_bar,
        # a run's folder stands for its last checkpoint; of a remote path Path would make another
        load_path=str(find_latest(recipe.load_path)) if is_local else recipe.load_path,
        load_weights_only=recipe.load_weights_only,
        save_folder=recipe.save_folder,
        save_interval=recipe.save_interval,
        save_num_checkpoints_to_keep=recipe.save_num_checkpoints_to_keep,
        save_overwrite=recipe.save_overwrite,
        autoresume=recipe.autoresume,
        device=device,
        precision=precision,
        device_train_microbatch_size=recipe.microbatch_size,
        parallelism_config=build_parallelism(recipe),
        compile_config={} if recipe.compile else None,
        seed=recipe.seed,
    )


def train(recipe: Recipe) -> Trainer:
    """Train a recipe from its start, or from its last checkpoint under `autoresume`.

    Raises:
        InputError: What a user can mend; nothing is written then.
    """
    check_save_folder(recipe)
    trainer = build_trainer(recipe)
    is_at_end = trainer.state.timestamp >= trainer.state.max_duration
    if is_at_end and not recipe.autoresume:
        raise InputError(f"load_path must be of a run before max_duration={recipe.max_duration}, {recipe.load_path} is "
                         "at its end: set load_weights_only=true to start from its weights")
    write_recipe(recipe)
    if not is_at_end:
        restore_generators(trainer)
        try:
            with name_dead_worker():
                trainer.fit()
        except InputError:
            _close(trainer)
            remove_empty_run(recipe)
            raise
    _close(trainer)
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `train.py`: a recipe and overrides. Exit status 1, with one line, on bad input."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a recipe: composer train.py yamls/digits_pss.yaml train_batch_size=32"
    )
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--debug", action="store_true", help="show the traceback of bad input, too")
    options = parser.parse_args(arguments)
    with exit_on_input_error(debug=options.debug):
        train(load_recipe(options.recipe, options.overrides))


def _close(trainer: Trainer) -> None:
    trainer.close()  # ends the workers of the training data alone
    for evaluator in trainer.state.evaluators:
        evaluator.dataloader.dataloader.close()


@contextmanager
def _name_checkpoint(key: str) -> Iterator[None]:
    """Lets the message of a checkpoint that is none begin with the recipe's key."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("checkpoint", key, 1)) from error


def _load_weights(model: ComposerModel, recipe: Recipe) -> None:
    """Pre-trained weights; and whether `load_path`, which Composer loads later, is of this model."""
    is_resumed = recipe.autoresume and (Path(recipe.save_folder) / LATEST).exists()
    if recipe.model.pretrained is not None and not is_resumed:
        with _name_checkpoint("model.pretrained"):
            transfer = load_pretrained(model, recipe.model.pretrained)
        if dist.get_global_rank() == 0:
            print(f"model.pretrained={recipe.model.pretrained}\n{transfer}", flush=True)
    if recipe.load_path is not None and "://" not in recipe.load_path:
        with _name_checkpoint("load_path"):
            load_checkpoint(model, recipe.load_path)


def _check_durations(recipe: Recipe, train_data: DataSpec) -> None:
    """Warm-up and cooldown must fit into training."""
    lengths = {"batches_per_epoch": len(train_data.dataloader), "samples_per_batch": recipe.train_batch_size}
    total_batches = count_batches(recipe.max_duration, **lengths)
    if count_batches(recipe.scheduler.warmup, **lengths, total_batches=total_batches) > total_batches:
        raise InputError(f"scheduler.warmup must be no longer than max_duration={recipe.max_duration}, "
                         f"got {recipe.scheduler.warmup!r}")
    if recipe.scheduler.warmup.endswith("dur") and 0 < count_batches(
        recipe.scheduler.warmup, **lengths, total_batches=total_batches
    ) < 1:
        raise InputError(f"scheduler.warmup must be at least a batch with max_duration={recipe.max_duration}, or 0ep, "
                         f"got {recipe.scheduler.warmup!r}")
    if recipe.pss is not None:
        with name_argument("pss.schedule"):
            build_schedule(recipe.pss.schedule)(Progress(0, total_batches, **lengths))
