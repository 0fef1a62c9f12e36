"""PSS as a Composer algorithm."""

from __future__ import annotations

import logging
import math
from weakref import WeakKeyDictionary

from composer.algorithms import NoOpModel
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from pss_composer.callback import ScheduledPatchSampling, count_samples, read_metrics
from pss_composer.errors import InputError
from pss_composer.progress import Progress, count_batches
from pss_composer.sampler_checks import describe
from pss_composer.sampling import PatchSampler
from pss_composer.surgery import apply_patch_sampling, find_samplers

log = logging.getLogger(__name__)


class PatchSamplingSchedule(ScheduledPatchSampling, Algorithm):
    """Trains a ViT on a varying share of its patch tokens (McDanel & Huynh 2022, https://arxiv.org/abs/2208.09520).

    The arguments are those of `ScheduledPatchSampling`. It runs on three events:

    - `INIT` puts a `PatchSampler` into the model.
    - `AFTER_DATALOADER` sets the keep rate of the batch. All of its microbatches and forward passes have the same, also
      the pass in which Composer's `SelectiveBackprop` scores the images.
    - `AFTER_LOAD` adds a callback to the trainer, `SamplerOwner`. It logs `pss/keep_rate`, and as `pss/tokens` the
      tokens of an image that the model's blocks saw. It also sets the model's keep rates to 1 again: that of training
      when `fit` ends, that of evaluation when the trainer is closed or garbage-collected.

    There is nothing to save: the keep rate follows from the timestamp alone, so a resumed run goes on where it was, and
    every rank has the same keep rate. One object serves several trainers.

    Raises:
        TypeError: When the trainer starts: a model that is not a supported ViT.
        ValueError: A bad argument; when the trainer starts: a second `PatchSamplingSchedule`, or an algorithm that
            leaves no ViT; when training starts: a schedule that does not fit the trainer's `max_duration`.

    Example:
        >>> trainer = Trainer(model=model, algorithms=[PatchSamplingSchedule()], ...)
    """

    def __repr__(self) -> str:
        return (f"PatchSamplingSchedule(schedule={describe(self.schedule)}, sampler={describe(self.sampler)}, "
                f"eval_keep_rate={self.eval_keep_rate})")

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.AFTER_LOAD, Event.AFTER_DATALOADER)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            _check_combination(state)
            patch_sampler = apply_patch_sampling(state.model, sampler=self.sampler)
            _owners.pop(patch_sampler, None)  # its keep rates are 1 until this trainer owns it
            slot = next(name for name, module in state.model.named_modules() if module is patch_sampler)
            log.info("Patch sampling in %s: %s", slot, patch_sampler)
            logger.log_hyperparameters({"pss/slot": slot, "pss/algorithm": repr(self)})
        elif event == Event.AFTER_LOAD:
            # at INIT, Composer would miss the state of this callback in checkpoints that were saved without it
            state.callbacks.append(SamplerOwner(self))
        else:
            self.set_keep_rate(state.model, read_progress(state))


def _check_combination(state: State) -> None:
    if sum(isinstance(algorithm, PatchSamplingSchedule) for algorithm in state.algorithms) > 1:
        raise InputError(f"must hold one PatchSamplingSchedule at most, got {state.algorithms}", key="algorithms")
    if any(isinstance(algorithm, NoOpModel) for algorithm in state.algorithms):
        raise InputError("must not hold PatchSamplingSchedule and NoOpModel, which replaces the ViT, "
                         f"got {state.algorithms}", key="algorithms")


_owners: WeakKeyDictionary[PatchSampler, SamplerOwner] = WeakKeyDictionary()  # by the trainer that used a sampler last


class SamplerOwner(Callback):
    """Owns the sampler of a trainer's model, until another trainer uses it or this one is closed or collected.

    Args:
        sampling: The settings.
    """

    def __init__(self, sampling: ScheduledPatchSampling) -> None:
        self.sampling = sampling
        self._metrics: dict[str, float] = {}

    def after_load(self, state: State, logger: Logger) -> None:
        self.fit_start(state, logger)

    def fit_start(self, state: State, logger: Logger) -> None:
        if not self._find_own(state):
            _owners[self.sampling.apply_to(state.model)] = self

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        if find_samplers(state.model):  # which may have been removed after training
            self.fit_start(state, logger)

    def predict_start(self, state: State, logger: Logger) -> None:
        self.eval_standalone_start(state, logger)

    def after_forward(self, state: State, logger: Logger) -> None:
        # a model may compute its training metrics in another forward pass, in eval mode, before the batch ends
        self._metrics = read_metrics(state.model)

    def batch_end(self, state: State, logger: Logger) -> None:
        # the step at which Composer logs the batch's loss; the timestamp already counts this batch
        logger.log_metrics(self._metrics, step=int(state.timestamp.batch) - 1)

    def fit_end(self, state: State, logger: Logger) -> None:
        for patch_sampler in self._find_own(state):
            patch_sampler.keep_rate = 1.0

    def close(self, state: State, logger: Logger) -> None:
        for patch_sampler in self._find_own(state):
            patch_sampler.keep_rate = patch_sampler.eval_keep_rate = 1.0
            del _owners[patch_sampler]

    def _find_own(self, state: State) -> list[PatchSampler]:
        """The model's sampler, unless another trainer used it last."""
        return [patch_sampler for patch_sampler in find_samplers(state.model) if _owners.get(patch_sampler) is self]


def read_progress(state: State) -> Progress:
    """Training progress in batches, whatever the unit of `max_duration`.

    Composer's own `state.get_elapsed_duration()` stands still for a whole epoch when `max_duration` is in epochs.

    Raises:
        ValueError: `max_duration` cannot be counted in batches.
    """
    batches_per_epoch = None if state.dataloader_len is None else int(state.dataloader_len)
    samples_per_batch, samples_per_epoch = count_samples(state.dataloader, batches_per_epoch, dist.get_world_size())
    now, max_duration = state.timestamp, state.max_duration
    epoch_start = {"ep": int(now.epoch), "ba": int(now.batch - now.batch_in_epoch),
                   "sp": int(now.sample - now.sample_in_epoch)}
    # counted from the start of this epoch: earlier ones may have had another loader
    unit = max_duration.unit.value
    left = count_batches(f"{max_duration.value - epoch_start.get(unit, 0)}{unit}", batches_per_epoch, samples_per_batch,
                         samples_per_epoch=samples_per_epoch)
    total_batches = epoch_start["ba"] + math.ceil(left)  # training ends with the batch that reaches max_duration
    return Progress(
        int(now.batch), total_batches, batches_per_epoch, samples_per_batch, samples_per_epoch, epoch_start
    )
