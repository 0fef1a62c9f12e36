"""The settings of a recipe: every key of a YAML file, with its default and its rules."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from omegaconf import MISSING

from pss_composer.checks import collect_errors, find_broken, rename_keys
from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.settings import DataSettings, free_on_resume
from pss_composer.errors import InputError
from pss_composer.models.settings import ModelSettings
from pss_composer.pretraining.settings import MaskingSettings
from pss_composer.progress import check_time
from pss_composer.schedules import SCHEDULES, Schedule, check_keep_rate

LR_SCHEDULES = ("cosine", "multistep")
SAMPLERS = ("magnitude", "l2_magnitude", "random", "stratified")
PARALLELISMS = ("ddp", "fsdp", "fsdp2")
PRECISIONS = ("fp32", "amp_fp16", "amp_bf16")
DEVICES = ("cpu", "gpu")
MAX_BATCH_SIZE = 2**20  # streaming rounds an epoch up to whole batches, in memory
RUN_NAME = re.compile(r"[^/\\\0]+")


@dataclass
class OptimizerSettings:
    """torch's AdamW; no weight decay on what timm exempts: biases, norms, position embeddings, class token."""

    lr: float = MISSING
    lr_batch_size: int | None = None  # lr is for this global batch size and scales with it; null: lr as it is
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    layer_decay: float | None = None  # learning rate of a block as a share of the next block's

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        return find_broken(
            self,
            ("lr", 0 < self.lr < math.inf, "must be above 0 and finite"),
            ("lr_batch_size", self.lr_batch_size is None or self.lr_batch_size > 0, "must be above 0"),
            ("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
             "must be two numbers in [0, 1)"),
            ("eps", 0 < self.eps < math.inf, "must be above 0 and finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "must be at least 0 and finite"),
            ("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "must be in (0, 1]"),
        )


@dataclass
class SchedulerSettings:
    """Linear warm-up, then half a cosine or steps; shares of the learning rate, in Composer's words."""

    name: str = "cosine"  # or multistep
    warmup: str = "0ep"
    alpha_i: float = 0.0  # where the warm-up starts
    alpha_f: float = 0.0  # where the cosine ends
    milestones: list[str] = field(default_factory=list)  # of multistep: times at which the rate falls
    gamma: float = 0.1  # of multistep: what the rate is multiplied by

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        errors = find_broken(
            self,
            ("name", self.name in LR_SCHEDULES, f"must be one of {', '.join(LR_SCHEDULES)}"),
            ("alpha_i", 0 <= self.alpha_i <= 1, "must be in [0, 1]"),
            ("alpha_f", 0 <= self.alpha_f <= 1, "must be in [0, 1]"),
            ("milestones", bool(self.milestones) == (self.name == "multistep"),
             f"must be {'times' if self.name == 'multistep' else 'empty'} for scheduler.name={self.name}"),
            ("gamma", 0 < self.gamma < math.inf, "must be above 0 and finite"),
        )
        errors += collect_errors(check_time, self.warmup, "warmup", is_zero_allowed=True)
        for milestone in self.milestones:
            errors += collect_errors(check_time, milestone, "milestones")
        return errors


@dataclass
class MixingSettings:
    """Mixup or CutMix, one of the two for every batch.

    Args:
        mixup_alpha: Both parameters of the Beta distribution of mixup's shares; 0 turns mixup off.
        cutmix_alpha: The same for CutMix.
        switch_prob: Probability of CutMix where both are on, in [0, 1].
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    switch_prob: float = 0.5

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        errors = find_broken(
            self,
            ("mixup_alpha", 0 <= self.mixup_alpha < math.inf, "must be at least 0 and finite"),
            ("cutmix_alpha", 0 <= self.cutmix_alpha < math.inf, "must be at least 0 and finite"),
            ("switch_prob", 0 <= self.switch_prob <= 1, "must be in [0, 1]"),
        )
        if self.mixup_alpha == self.cutmix_alpha == 0:
            errors.append(InputError("or cutmix_alpha must be above 0, got 0 and 0", key="mixup_alpha"))
        return errors


@dataclass
class EMASettings:
    """Composer's moving average of the weights."""

    smoothing: float = MISSING
    update_interval: str = "1ba"

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        errors = find_broken(self, ("smoothing", 0 < self.smoothing < 1, "must be in (0, 1)"))
        return errors + collect_errors(check_time, self.update_interval, "update_interval", ("ba", "ep"))


@dataclass
class PSSSettings:
    """Arguments of `PatchSamplingSchedule`; `schedule` is a schedule's name with its arguments."""

    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "cyclic"})
    sampler: str = "magnitude"
    masked_share: float | None = None  # of the sampler `stratified`, for `model.name: simmim_pretrain`
    eval_keep_rate: float = 1.0

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        errors = collect_errors(lambda: self.built_schedule)
        errors += collect_errors(check_keep_rate, self.eval_keep_rate, "eval_keep_rate")
        if self.masked_share is not None:
            errors += collect_errors(check_keep_rate, self.masked_share, "masked_share")
        return errors + find_broken(
            self,
            ("sampler", self.sampler in SAMPLERS, f"must be one of {', '.join(SAMPLERS)}"),
            ("masked_share", self.masked_share is None or self.sampler == "stratified",
             "must be null unless pss.sampler=stratified"),
        )

    @cached_property
    def built_schedule(self) -> Schedule:
        """The schedule.

        Raises:
            InputError: Unknown name, unknown argument, bad value.
        """
        arguments = dict(self.schedule)
        name = arguments.pop("name", None)
        if not isinstance(name, str) or name not in SCHEDULES:
            raise InputError(f"must be one of {', '.join(SCHEDULES)}, got {name!r}", key="schedule.name")
        known = [argument.name for argument in dataclasses.fields(SCHEDULES[name])]
        for argument in arguments:
            if argument not in known:
                raise InputError(describe_unknown(argument, known, prefix="pss.schedule.", owner=name),
                                 key=f"schedule.{argument}")
        try:
            return SCHEDULES[name](**arguments)
        except InputError as error:
            raise InputError(error.rule, key=f"schedule.{error.key}") from error


@dataclass
class Recipe:
    """Everything that a training run depends on. Batch sizes are global: the sum over all devices."""

    run_name: str = MISSING
    seed: int = 0
    deterministic: bool = False
    max_duration: str = MISSING
    train_batch_size: int = MISSING
    eval_batch_size: int = MISSING
    eval_interval: str = "1ep"

    device: str | None = None
    parallelism: str = "ddp"
    precision: str | None = None
    microbatch_size: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    masking: MaskingSettings | None = None
    mixing: MixingSettings | None = None
    label_smoothing: float = 0.0
    gradient_clipping: float | None = None
    ema: EMASettings | None = None
    pss: PSSSettings | None = None

    save_folder: str = "runs/${run_name}"
    save_interval: str = free_on_resume("1ep")
    save_num_checkpoints_to_keep: int = free_on_resume(1)
    save_overwrite: bool = free_on_resume(False)
    autoresume: bool = free_on_resume(False)
    load_path: str | None = free_on_resume(None)
    load_weights_only: bool = free_on_resume(False)

    progress_bar: bool = free_on_resume(True)
    tensorboard: bool = free_on_resume(False)

    def check(self) -> list[InputError]:
        """The rules that the settings break, those of the groups included."""
        errors = find_broken(
            self,
            ("run_name", RUN_NAME.fullmatch(self.run_name) is not None and self.run_name not in (".", ".."),
             "must be a name without separators"),
            ("save_folder", "://" not in self.save_folder, "must be a folder of this machine"),
            ("seed", 0 <= self.seed < 2**32, "must be in [0, 2^32)"),
            ("device", self.device in (None, *DEVICES), f"must be one of null, {', '.join(DEVICES)}"),
            ("parallelism", self.parallelism in PARALLELISMS, f"must be one of {', '.join(PARALLELISMS)}"),
            ("precision", self.precision in (None, *PRECISIONS), f"must be one of null, {', '.join(PRECISIONS)}"),
            *((name, getattr(self, name) is None or getattr(self, name) >= 1, "must be at least 1")
              for name in ("train_batch_size", "eval_batch_size", "microbatch_size")),
            *((name, getattr(self, name) <= MAX_BATCH_SIZE, f"must be at most {MAX_BATCH_SIZE}")
              for name in ("train_batch_size", "eval_batch_size")),
            ("microbatch_size", self.microbatch_size is None or self.microbatch_size <= self.train_batch_size,
             f"must be at most train_batch_size={self.train_batch_size}"),
            ("label_smoothing", 0 <= self.label_smoothing <= 1, "must be in [0, 1]"),
            ("gradient_clipping", self.gradient_clipping is None or 0 < self.gradient_clipping < math.inf,
             "must be above 0 and finite"),
            ("save_num_checkpoints_to_keep",
             self.save_num_checkpoints_to_keep >= 1 or self.save_num_checkpoints_to_keep == -1,
             "must be at least 1, or -1 for all"),
            ("save_overwrite", not (self.save_overwrite and self.autoresume),
             "must be false with autoresume=true: go on with a run or replace it"),
            ("load_weights_only", self.load_path is not None or not self.load_weights_only,
             "must be false without load_path"),
        )
        for name, units in {"max_duration": ("ep", "ba", "sp"), "eval_interval": ("ep", "ba"),
                            "save_interval": ("ep", "ba")}.items():
            errors += collect_errors(check_time, getattr(self, name), name, units)
        for setting in dataclasses.fields(self):
            errors += check_group(setting.name, getattr(self, setting.name))
        return errors


def check_group(name: str, settings: Any) -> list[InputError]:
    """The rules that a group of settings breaks, under the full keys; an empty list if it is not a group."""
    if not dataclasses.is_dataclass(settings):
        return []
    return rename_keys(settings.check(), lambda key: f"{name}.{key}")


def describe_unknown(name: str, known: Sequence[str], *, prefix: str = "", owner: str = "a recipe") -> str:
    """The message for an unknown key, with the nearest known one.

    Args:
        name: The unknown key, without its groups.
        known: The keys that its group has.
        prefix: Its groups, like `model.`.
        owner: What has the known keys, for the message.
    """
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
    return f"is not a key of {owner}; {hint}"
