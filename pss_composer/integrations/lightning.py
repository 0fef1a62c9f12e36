"""PSS as a Lightning callback."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from pss_composer.callback import ScheduledPatchSampling, count_samples, read_metrics
from pss_composer.errors import InputError
from pss_composer.progress import Progress
from pss_composer.surgery import find_samplers

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:  # the same library under its other name
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]


class PatchSamplingCallback(ScheduledPatchSampling, Callback):
    """Trains a LightningModule's ViT on a varying share of its patch tokens.

    The arguments are those of `ScheduledPatchSampling`.

    A `PatchSampler` comes into the module at `setup`, before the optimizers and DDP; into a ViT that the module's own
    `setup` or `configure_model` builds, when that is done. Batches are optimizer steps: all batches whose gradients are
    accumulated share a keep rate. Under manual optimization, where Lightning counts the steps of every optimizer, they
    are the batches of the data. Training logs `pss/keep_rate` and `pss/tokens`, the tokens of an image that the blocks
    saw. Validation, testing and prediction have `eval_keep_rate`. When `fit`, `validate`, `test` or `predict` ends,
    also by an exception, both keep rates are 1 again.

    Nothing is saved: the keep rate follows from the step alone, so a resumed run goes on where it was, and every rank
    has the same keep rate.

    Raises:
        TypeError: When the trainer starts: the module has no supported ViT, or more than one.
        ValueError: A bad argument; when the trainer starts: another callback that this one cannot work with; when
            training starts: a training whose length is not known, or a schedule that does not fit it.

    Example:
        >>> trainer = Trainer(callbacks=[PatchSamplingCallback()], ...)
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        names = [type(callback).__name__ for callback in callbacks]
        if sum(isinstance(callback, PatchSamplingCallback) for callback in callbacks) > 1:
            raise InputError(f"must hold one PatchSamplingCallback, got {', '.join(names)}", key="callbacks")
        if "GradientAccumulationScheduler" in names:
            raise InputError("must hold PatchSamplingCallback or GradientAccumulationScheduler, not both: an epoch has "
                             f"no fixed number of steps with the latter; got {', '.join(names)}", key="callbacks")
        with suppress(TypeError):  # the module may yet build its ViT; if it does not, the next hook says so
            self.apply_to(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not find_samplers(pl_module):
            self.apply_to(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.set_keep_rate(pl_module, read_progress(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.barebones:  # such a trainer warns of every value
            pl_module.log_dict(read_metrics(pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for patch_sampler in find_samplers(pl_module):
            patch_sampler.keep_rate = patch_sampler.eval_keep_rate = 1.0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


def read_progress(trainer: Trainer, batch_idx: int) -> Progress:
    """Training progress in optimizer steps, or in batches under manual optimization.

    Args:
        trainer: A trainer in a batch of training.
        batch_idx: The batch's index in its epoch.

    Raises:
        InputError: The length of training is not known.
    """
    num_batches = None if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)
    max_steps, epochs_left = trainer.max_steps, (trainer.max_epochs or 0) - trainer.current_epoch
    accumulation = trainer.accumulate_grad_batches
    steps_per_epoch = None if num_batches is None else math.ceil(num_batches / accumulation)
    if trainer.lightning_module.automatic_optimization:
        # that of this epoch: earlier ones may have had another loader, in an earlier fit
        first_step = trainer.global_step - batch_idx // accumulation
    elif max_steps != -1:
        raise InputError("must be -1 under manual optimization, where Lightning counts the steps of every optimizer: "
                         f"patch sampling needs max_epochs, got {max_steps}", key="max_steps")
    else:
        first_step = trainer.current_epoch * (num_batches or 0)
    lengths = []
    if max_steps != -1:
        lengths.append(max_steps)
    if trainer.max_epochs != -1 and steps_per_epoch is not None:
        lengths.append(first_step + epochs_left * steps_per_epoch)
    if not lengths:
        raise InputError("must be given under patch sampling, or max_epochs and data with a length, got "
                         f"max_steps={max_steps}, max_epochs={trainer.max_epochs}", key="max_steps")
    samples_per_batch, samples_per_epoch = count_samples(trainer.train_dataloader, num_batches, trainer.world_size)
    return Progress(
        first_step + batch_idx // accumulation,
        min(lengths),
        steps_per_epoch,
        None if samples_per_batch is None else samples_per_batch * accumulation,
        samples_per_epoch,
        {"ep": trainer.current_epoch, "ba": first_step},
    )
